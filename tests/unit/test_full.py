"""The full run: where its numbers count, and whether the default run agrees with it."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from docutils import nodes
from docutils.utils import new_document

from sinkstudy.book import across, claims, downloads, engine, pages, parameters
from sinkstudy.paths import DEFAULT_MODEL, FULL, RUNS
from tests.unit.test_claims import LEDGER, verdict, write

UP = "lab-llava.up.effect"
MANY = {"claims": [LEDGER["claims"][1] | {"id": f"c{i}", "metric": f"{{model}}.c{i}"} for i in range(60)],
        "controls": []}


def numbers(pictures: np.ndarray) -> list[tuple]:
    """The metrics of `MANY` for [claims, pictures], with the interval of a mean."""
    half = 1.96 * pictures.std(1, ddof=1) / pictures.shape[1] ** 0.5
    return [(f"lab-llava.c{i}", mean, mean - h, mean + h, pictures.shape[1], "points")
            for i, (mean, h) in enumerate(zip(pictures.mean(1), half, strict=True))]


def planted(root, seed, change=lambda default: default):
    """Two runs, the pictures of the default run the first quarter of the full run's; claims in sixes go together."""
    rng = np.random.default_rng(seed)
    pictures = np.repeat(rng.normal(size=(10, 400)), 6, axis=0) + rng.normal(size=(60, 400))
    write(root, DEFAULT_MODEL, numbers(change(pictures[:, :100])))
    write(root, FULL, numbers(pictures))
    return claims.default_beside_full(root, MANY)


# ---- what it is


def test_full_run_has_every_chapter_that_judges_a_claim_and_more_pictures():
    each = engine.full_parameters()
    ledger = claims.load()
    assert set(each) == {row["chapter"] for kind in ("claims", "controls") for row in ledger[kind]}
    fitted = parameters.fitted(list(each), DEFAULT_MODEL, {}, each)
    for notebook, values in each.items():
        before = parameters.defaults(notebook)
        assert values.keys() <= {"limit", "checked", "few"}, "a number would be of something else"
        assert all(value == 0 or value >= 4 * before[key] for key, value in values.items())  # 0: all there are
        assert fitted[notebook].items() >= values.items()


# ---- where its numbers count


def test_verdicts_come_from_the_full_run_where_it_has_the_number(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RUNS", tmp_path / "runs")
    write(tmp_path, DEFAULT_MODEL, [(UP, 1.6, 1.2, 2.0, 20, ""), ("lab-llava.same.effect", 0.1, -1, 1.2, 99, "points"),
                                    ("lab-other.up.effect", 3, 1, 5, 20, "")])
    alone = claims.verdicts(tmp_path, LEDGER)
    assert verdict(tmp_path).verdict == "inconclusive" and "has not been made" in pages.numbers_from(alone)
    write(tmp_path, "another", [(UP, 0.5, 0.4, 0.6, 99, "")])
    assert claims.verdicts(tmp_path, LEDGER).equals(alone)  # any other run changes nothing
    write(tmp_path, FULL, [(UP, 1.7, 1.6, 1.8, 80, ""), ("lab-other.up.effect", 2, 1.8, 2.2, 80, "")])
    judged = claims.verdicts(tmp_path, LEDGER)
    found = judged.set_index(["claim", "model"])
    assert found.run.to_dict() == {("up", "lab-llava"): FULL, ("same", "lab-llava"): DEFAULT_MODEL,
                                   ("up", "lab-other"): FULL, ("same", "lab-other"): ""}
    assert list(judged.model.unique()) == ["lab-llava", "lab-other"]
    assert verdict(tmp_path).verdict == "supported" and verdict(tmp_path).n == 80
    assert "show. 1 of 3 that it lacks are those of the default run.*" in pages.numbers_from(judged)
    assert claims.controls(tmp_path, LEDGER).iloc[0][["value", "state"]].tolist() == [1.7, "holds"]
    write(tmp_path, "lab-other", [("lab-other.up.effect", 9, 8, 10, 99, "")])
    assert verdict(tmp_path, model="lab-other").run == "lab-other"  # a model's own run comes first, as before


def test_figures_of_the_full_run_are_the_default_runs_where_its_pages_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RUNS", tmp_path)
    page = {"cells": [{"cell_type": "markdown", "source": ":name: fig-toy"}]}
    for run in (DEFAULT_MODEL, FULL):
        (tmp_path / run).mkdir()
        text = json.dumps(page).replace("fig-toy", "fig-toy" if run == DEFAULT_MODEL else f"fig-toy--{FULL}")
        (tmp_path / run / "90-toy.ipynb").write_text(text)
    assert pages.figure(FULL, "90-toy", "fig-toy") == f"fig-toy--{FULL}"
    (tmp_path / FULL / "90-toy.ipynb").unlink()
    assert pages.figure(FULL, "90-toy", "fig-toy") == "fig-toy"


@pytest.mark.parametrize("run", [DEFAULT_MODEL, FULL, "another"])
@pytest.mark.parametrize("full", [False, True])
def test_page_of_a_chapter_says_which_run_it_shows(tmp_path, monkeypatch, run, full):
    monkeypatch.setattr(downloads, "RESULTS", tmp_path)
    write(tmp_path, DEFAULT_MODEL, [(UP, 1, 0, 2, 1024, ""), (UP, 1, 0, 2, None, "")])
    if full:
        write(tmp_path, FULL, [(UP, 1, 0, 2, 4096, "")])
    made = new_document("page")
    made += nodes.section("", nodes.title("", "Toys"), nodes.admonition(), nodes.paragraph("", "Text."))
    name = str((RUNS / run / "90-toy").relative_to(downloads.ROOT))
    downloads.add_run(SimpleNamespace(env=SimpleNamespace(docname=name), builder=SimpleNamespace(format="html")), made)
    said = [node.astext() for node in made.findall(nodes.paragraph)]
    end = "and the verdicts come from the full run."
    words = "This page shows the {}, numbers of up to {} pictures; the {} has up to {}, "
    lines = {DEFAULT_MODEL: words.format("default run", "1,024", "full run", "4,096") + end,
             FULL: words.format("full run", "4,096", "default run", "1,024") + end}
    assert said == ([lines[run]] if full and run in lines else []) + ["Text."]
    assert [link["refuri"] for link in made.findall(nodes.reference)] == ["../../verdicts.html"] * (len(said) - 1)


def test_table_of_all_methods_has_the_full_run_before_the_default_run(tmp_path, monkeypatch):
    monkeypatch.setattr(across.paths, "ROOT", tmp_path)
    for run, model in ((DEFAULT_MODEL, DEFAULT_MODEL), (FULL, DEFAULT_MODEL), ("a-run", DEFAULT_MODEL),
                       (DEFAULT_MODEL, "other"), (FULL, "other"), ("other", "other"), (DEFAULT_MODEL, "late")):
        row = {"model": model, "method": "front", "way": "travel", "benchmark": "POPE", "group": "sinks",
               "measure": "right", "value": 1, "low": 0, "high": 2, "n": 9}
        folder = tmp_path / "results" / run / "10-toy"
        folder.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row]).to_csv(folder / f"{model}.csv", index=False)
    rows, _ = across.read(["results/*/10-*/*.csv"])
    assert {model: list(of.run) for model, of in rows.groupby("model")} == {
        DEFAULT_MODEL: [FULL, DEFAULT_MODEL, "a-run"], "other": ["other", FULL, DEFAULT_MODEL], "late": [DEFAULT_MODEL]}


# ---- whether the default run agrees


def test_runs_of_the_same_code_agree(tmp_path):
    """60 numbers, 20 pairs of runs: one in twenty pairs may disagree by chance, though numbers go together."""
    wrong = [bool(claims.disagreements(planted(tmp_path, seed))) for seed in range(20)]
    assert sum(wrong) <= 1


def test_one_number_of_another_sign_is_named(tmp_path):
    def change(pictures):
        return pictures + np.where(np.arange(60) == 7, 1, 0)[:, None]  # seven standard errors

    beside = planted(tmp_path, 0, change)
    (line,) = claims.disagreements(beside)
    assert line.startswith("c7 in lab-llava: ") and ", in the full run " in line
    assert beside.set_index("claim").outside["c7"] and len(beside) == 60


def test_a_small_shift_of_all_numbers_is_seen(tmp_path):
    """None is far enough outside to be named alone, mostly; together they are too many."""
    lines = claims.disagreements(planted(tmp_path, 0, lambda pictures: pictures + 0.25))
    assert lines[-1].endswith("of 60 numbers of the full run lie outside the default run's interval")


def test_what_is_compared(tmp_path):
    assert claims.agreed(claims.default_beside_full(tmp_path, LEDGER)).startswith("No full run")
    same = "lab-llava.same.effect"
    write(tmp_path, DEFAULT_MODEL, [(UP, 2.0, 1.0, 4.0, 20, ""), (same, 0.0, 0.0, 0.0, 100, "points")])
    beside = claims.default_beside_full(tmp_path, LEDGER)
    assert beside.empty and not claims.disagreements(beside)
    write(tmp_path, FULL, [(UP, 1.2, 1.1, 1.3, 80, "")], chapter="91-other")
    assert claims.default_beside_full(tmp_path, LEDGER).empty  # the full run lacks the chapter: it was killed, say
    write(tmp_path, FULL, [(UP, 1.2, 1.1, 1.3, 80, ""), (same, 2.0, 1.0, 3.0, 400, "points")])
    beside = claims.default_beside_full(tmp_path, LEDGER).set_index("claim")
    # by hand, a ratio: z = log(2 / 1.2) / (log(2) / 1.96), the half of the interval on the full run's side
    assert beside.p["up"] == pytest.approx(0.1486, abs=1e-4) and not beside.outside.any()
    assert beside.high["same"] == pytest.approx(2.95, abs=0.01)  # where nothing varies, the rule of three
    write(tmp_path, FULL, [(UP, 1.2, 1.1, 1.3, 80, "")])
    (line,) = claims.disagreements(claims.default_beside_full(tmp_path, LEDGER))
    assert line.startswith("same in lab-llava: 0 [-2.95, 2.95], in the full run nan")
    assert "1 have no interval there, or no number" in claims.agreed(claims.default_beside_full(tmp_path, LEDGER))


def test_number_without_an_interval_is_not_compared(tmp_path):
    ledger = copy.deepcopy(LEDGER)
    write(tmp_path, DEFAULT_MODEL, [(UP, 2.0, None, None, 1, "")])
    write(tmp_path, FULL, [(UP, 9.0, 8.0, 10.0, 1, "")])
    beside = claims.default_beside_full(tmp_path, ledger)
    assert not claims.disagreements(beside) and claims.agreed(beside).startswith("Of 0 numbers")


def test_default_run_of_the_study_agrees_with_its_full_run():
    beside = claims.default_beside_full()
    if beside.empty:
        pytest.skip("results/ has no full run")
    assert not claims.disagreements(beside), claims.agreed(beside)


def test_parameters_that_no_chapter_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "DATA", tmp_path)
    for each, message in (({"99-none": {}}, "no notebook 99-none"), ({"01-norms": {"size": 1}}, "no parameter size")):
        (tmp_path / "full.yml").write_text(yaml.safe_dump(each))
        with pytest.raises(parameters.UserError, match=message):
            engine.full_parameters()

