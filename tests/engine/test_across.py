"""Chapter 12 on planted tables of several runs: what it shows, what it prefers, what it calls not run."""

import json
from pathlib import Path

import pandas as pd
import pytest

from sinkstudy import paths
from sinkstudy.book import across, report
from sinkstudy.effects import methods
from tests.engine.conftest import Commands

PICTURES = 100
COLUMNS = ["model", "group", "method", "way", "benchmark", "measure", "value", "low", "high", "n"]


def effects(root: Path, folder: str, rows: list[tuple]) -> None:
    """Write a table of (model, method, way, benchmark, value, low, high)."""
    tidy = [(model, "sinks", *what, "right", value, low, high, PICTURES) for model, *what, value, low, high in rows]
    tidy += [(*row[:5], "logp", 9.0, 8.0, 10.0, PICTURES) for row in tidy]  # another measure, of no interest here
    file = root / "results" / folder
    file.parent.mkdir(parents=True)
    pd.DataFrame(tidy, columns=COLUMNS).to_csv(file, index=False)


@pytest.fixture(scope="module")
def shown(checkout: Commands) -> Path:
    """The chapter's folder of results."""
    front, random = ("front", ""), ("random-front", "")
    effects(
        checkout.root,
        "lab-llava/10-training-free/effects.csv",
        [
            ("lab-llava", *front, "POPE", 5, 4, 6),
            ("lab-llava", *front, "MME", 0, 0, 0),
            ("lab-llava", *front, "mean", 2.5, 2, 3),  # a mean is no cell
            ("lab-llava", *random, "POPE", -1, -1.9, -0.1),
            ("lab-llava", *random, "MME", 0.5, -1, 2),
            ("owner--big", *front, "POPE", -7, -9, -5),  # as a control; its own run says otherwise
            ("owner--big", *random, "POPE", None, None, None),
        ],
    )
    effects(checkout.root, "owner--big/10-training-free/effects.csv", [("owner--big", *front, "POPE", 8, 7, 9)])
    effects(
        checkout.root,
        "another/11-diysink/effects.csv",
        [
            ("lab-llava", *front, "POPE", 1, 0, 2),  # the default run has it
            ("lab-llava", "two connectors", "", "MMStar", -3, -3, -3),
        ],
    )
    effects(checkout.root, "lab-llava/09-benchmarks/effects.csv", [("lab-llava", "no method", "", "POPE", 1, 0, 2)])
    route = checkout.root / "results/lab-llava/route/front.csv"
    route.parent.mkdir()
    route.write_text("question,answer\nwhat,yes\n")
    done = {"model": "lab-llava", "group": "sinks", "method": "features", "option": "weight", "option_value": 0.5}
    done |= {"benchmark": "POPE", "data": "public", "measure": "right", "pictures": PICTURES}
    numbers = {"baseline": (90, 85, 95), "method": (92, 87, 97), "difference": (2, 1, 3)}
    rows = [done | {"what": what, "value": v, "low": low, "high": high} for what, (v, low, high) in numbers.items()]
    pd.DataFrame(rows).to_csv(route.with_name("features.csv"), index=False)
    checkout.call("run", "--only", "12")
    return checkout.root / "results" / "lab-llava" / "12-across-models"


def test_cells(checkout: Commands, shown: Path):
    cells = pd.read_csv(shown / "cells.csv", keep_default_na=False).set_index(["model", "method", "benchmark"])
    assert len(cells) == 2 * 4 * 4  # models, methods, benchmarks
    expected = {
        ("lab-llava", "features", "POPE (public)"): ("2.0", "better", "lab-llava"),
        ("lab-llava", "front", "POPE"): ("5.0", "better", "lab-llava"),
        ("lab-llava", "front", "MME"): ("0.0", "no change", "lab-llava"),
        ("lab-llava", "random-front", "POPE"): ("-1.0", "worse", "lab-llava"),
        ("lab-llava", "random-front", "MME"): ("0.5", "not clear", "lab-llava"),
        ("lab-llava", "two connectors", "MMStar"): ("-3.0", "worse", "another"),
        ("owner--big", "front", "POPE"): ("8.0", "better", "owner--big"),
        ("owner--big", "random-front", "POPE"): ("", "not applicable", "lab-llava"),
    }
    for key, (value, state, run) in expected.items():
        found = cells.loc[key]
        assert (str(found.value), found.state, found.run) == (value, state, run) or (
            (float(found.value), found.state, found.run) == (float(value), state, run)
        ), key
    others = cells.drop(index=list(expected))
    assert len(others) == 24 and set(others.state) == {"not run"}
    models = pd.read_csv(shown / "models.csv").set_index("model")
    counted = ["better", "worse", "not clear", "no change", "not applicable", "not run"]
    assert models.loc["lab-llava", counted].tolist() == [2, 2, 1, 1, 0, 10]
    assert models.loc["owner--big", counted].tolist() == [1, 0, 0, 0, 1, 14]
    assert models["worse, Holm"].tolist() == [0, 0] and models["better, Holm"].tolist() == [2, 1]


def test_methods_beside_their_controls(checkout: Commands, shown: Path):
    found, _ = across.read(["results/lab-llava/1[01]-*/effects.csv"])  # of this repository, not of the copy
    table = across.beside_controls(found).set_index(["label", "which", "model"])
    source = pd.read_csv(paths.RESULTS / "lab-llava/10-training-free/effects.csv").fillna({"way": ""})
    source = source[(source.benchmark == "mean") & (source.measure == "right")].set_index(["method", "way", "model"])
    for which, method, way in (("itself", "others-only", ""), ("random", "random-others-only", "")):
        for model in ("lab-llava", "lab-qwen2vl"):
            expected = source.loc[(method, way, model)]
            assert table.value["left out", which, model] == expected.value
            assert table.high["left out", which, model] == expected.high
    assert set(table.benchmark) == {"mean"} and not table.index.duplicated().any()
    closing = outputs(checkout.page("12-across-models"), "text/plain")
    assert any("to the front" in text and "+2.5 [+2.0, +3.0]" in text for text in closing)


def test_counts_and_words(checkout: Commands, shown: Path):
    metrics = {row["name"]: row["value"] for row in json.loads((shown / "metrics.json").read_text())}
    assert metrics == {
        "cells.run": 7,
        "cells.not_run": 24,
        "cells.better": 3,
        "cells.better.holm": 3,
        "cells.worse": 2,
        "cells.worse.holm": 0,
        "cells.no_change": 1,  # -1 has p = 0.03 of seven; -3, without spread, is widened to cover 0
    }
    printed = "".join(
        output.get("text", "") for cell in checkout.page("12-across-models").cells for output in cell.get("outputs", [])
    )
    assert printed == (
        "read: another/11-diysink, lab-llava/10-training-free, lab-llava/route, owner--big/10-training-free\n"
        "not read, for want of columns: lab-llava/route/front.csv\n"
        f"{report.versions()}\n"
    )
    glued = " ".join(outputs(checkout.page("12-across-models"), "application/papermill.record/text/plain"))
    assert "one benchmark, 3 give clearly more right answers; 2, clearly fewer." in glued
    assert "By chance alone about 0 would give clearly more. After correction 0 still give fewer." in glued
    assert "More: to the front in lab-llava and owner--big; features × ½ in lab-llava; after" in glued
    assert "after correction: to the front in lab-llava and owner--big; features × ½ in lab-llava." in glued
    assert "Sinks left out: not run." in glued


@pytest.mark.parametrize(
    ("method", "way", "words"),
    [
        ("keys", "weight 0.5", "keys × ½"),
        ("random-keys", "weight 0", "keys × 0 (random)"),
        ("random-keep-top-k", "", "only the top quarter (random)"),
        ("test-time-registers", "k 10", "register"),
        ("test-time-registers", "k 3", "register k 3"),
        ("gates", "against adapters", "gates against adapters"),
    ],
)
def test_words_for_a_method(method, way, words):
    assert methods.short(method, way) == words


def test_figures_call_methods_by_the_same_words():
    free = {label: what for label, what in across.METHODS_SHOWN.items() if what[0] in methods.METHODS}
    assert len(free) == 7 and all(methods.short(*what) == label for label, what in free.items())


def outputs(page, kind: str) -> list[str]:
    return [
        output["data"][kind]
        for cell in page.cells
        for output in cell.get("outputs", [])
        if kind in output.get("data", {})
    ]


def test_nothing_to_read(checkout: Commands):
    printed = checkout.call("run", "--only", "12", "--name", "empty", "-p", 'effects=["results/none/*.csv"]', code=1)
    assert "no table of effects is there (results/none/*.csv): 'sinkstudy run --only 10' makes one" in printed


def test_what_models_answer(tmp_path, monkeypatch):
    """A model's own run before its scores beside another; whoever was not run is said to be so."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    columns = ["model", "role", "arm", "data", "benchmark", "measure", "value", "low", "high", "pictures", "most"]
    tables = {
        "lab-llava": [("lab-llava", "model", "model", "lab", "POPE", "accuracy", 80.0, 70.0, 90.0, 9, 100),
                      ("lab-llava", "model", "blind", "lab", "POPE", "accuracy", 50.0, 50.0, 50.0, 9, 100),
                      ("null", "control", "model", "lab", "POPE", "accuracy", 60.0, 50.0, 70.0, 9, 100),
                      ("null", "control", "model", "lab", "MME", "cognition", 300.0, 250.0, 350.0, 5, 800)],
        "null": [("null", "model", "model", "lab", "POPE", "accuracy", 65.0, 60.0, 70.0, 90, 100)],
    }  # fmt: skip
    for run, rows in tables.items():
        (tmp_path / "results" / run / "09-benchmarks").mkdir(parents=True)
        file = tmp_path / "results" / run / "09-benchmarks" / "headline.csv"
        pd.DataFrame(rows, columns=columns).to_csv(file, index=False)
    found = across.answered(["results/*/09-benchmarks/headline.csv"], [("null", "lab"), ("other", "public")])
    assert found["POPE, right"].to_dict() == {
        ("null", "lab"): "65.0 [60.0, 70.0] %, n = 90", ("lab-llava", "lab"): "80.0 [70.0, 90.0] %, n = 9",
        ("other", "public"): "not run"}  # fmt: skip
    of_mme = {"null": "300 [250, 350] of 800, n = 5", "lab-llava": "not run", "other": "not run"}
    assert found["MME, cognition"].droplevel("data").to_dict() == of_mme
    assert list(across.answered(["results/*/nothing.csv"], [("other", "lab")]).index) == [("other", "lab")]
