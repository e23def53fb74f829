"""Faults of judgement: intervals of the wrong width, claims that pass without what they are about, words too strong.

References are closed forms and results made by hand; nothing is run.
"""

import copy
import json
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from sinkstudy import paths
from sinkstudy.answers import study
from sinkstudy.book import claims
from sinkstudy.trained import compared

LEDGER = {claim["id"]: claim for claim in claims.load()["claims"]}


# ---- pictures are drawn within each benchmark


def answers(sizes: list[int], means: list[float], spread: float, questions: int = 1, seed: int = 0) -> pd.DataFrame:
    """Normal answers about `sizes` pictures of each benchmark; questions of a picture share its value."""
    rng, rows = np.random.default_rng(seed), []
    for name, (n, mean) in enumerate(zip(sizes, means, strict=True)):
        value = mean + spread * scipy.stats.zscore(rng.normal(size=n), ddof=1)
        frame = pd.DataFrame({"benchmark": f"B{name}", "picture": [f"B{name} {i}" for i in range(n)], "right": value})
        rows.append(frame.loc[frame.index.repeat(questions)])
    return pd.concat(rows, ignore_index=True)


@pytest.mark.parametrize("sizes", [[80, 80], [60, 120, 240], [300, 40, 90]], ids=str)
@pytest.mark.parametrize("means", ["alike", "far apart"])
@pytest.mark.parametrize("questions", [1, 3])
def test_mean_over_benchmarks_has_the_width_of_a_stratified_mean(sizes, means, questions):
    """Its variance: those of the benchmarks' means, over their number squared. What lies between benchmarks is none."""
    level = [50.0] * len(sizes) if means == "alike" else [20.0 + 60.0 * i / len(sizes) for i in range(len(sizes))]
    found = study.mean_of_benchmarks(answers(sizes, level, 8.0, questions), "right")
    half = 1.96 * np.sqrt(sum(8.0**2 / n for n in sizes)) / len(sizes)
    assert found.value == pytest.approx(np.mean(level))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)


def test_interval_of_the_mean_covers_the_truth_as_often_as_it_says():
    hits, widths = 0, []
    for trial in range(120):
        rng = np.random.default_rng(trial)
        name = np.repeat(["A", "B", "C"], 50)
        right = 100.0 * (rng.random(150) < np.repeat([0.2, 0.5, 0.95], 50))
        rows = pd.DataFrame({"benchmark": name, "picture": range(150), "right": right})
        found = study.mean_of_benchmarks(rows, "right", seed=trial)
        hits += found.low <= 55.0 <= found.high
        widths.append(found.high - found.low)
    assert 0.88 <= hits / 120 <= 0.985  # intervals that are too wide cover always
    assert np.mean(widths) == pytest.approx(2 * 196 * np.sqrt((0.16 + 0.25 + 0.0475) / 50) / 3, rel=0.08)


@pytest.mark.parametrize("sizes", [[12, 144, 72], [9, 90], [30, 30, 30]], ids=str)
def test_where_nothing_changed_the_smallest_benchmark_says_how_much_may_have(sizes):
    """A change of the smallest benchmark alone that none of its n pictures shows, with 5 %, moves the mean so far."""
    found = study.mean_of_benchmarks(answers(sizes, [0.0] * len(sizes), 0.0).fillna(0.0), "right")
    low, high = claims.widen(found.low, found.high, found.n, "points")
    hidden = 100 * (1 - 0.05 ** (1 / min(sizes))) / len(sizes)
    assert low <= -hidden and high >= hidden and high < 1.2 * hidden


# ---- seeds


def trained_difference(effects: list[float], spread: float, n: int = 60) -> Any:
    """Chapter 11's interval of an arm against another: true effect of each seed, spread of pictures."""
    rng, rows = np.random.default_rng(0), []
    of_picture = spread * scipy.stats.zscore(rng.normal(size=n), ddof=1) if spread else np.zeros(n)
    for seed, effect in enumerate(effects):
        for i in range(n):
            base = {"model": "m", "seed": seed, "benchmark": "B", "id": str(i), "picture": f"B {i}", "type": "global"}
            rows += [base | {"arm": "two both", "right": effect + of_picture[i]}, base | {"arm": "one", "right": 0.0}]
    change = compared.difference(pd.DataFrame(rows), "two both", "one", "right")
    return study.mean_of_seeds(change.reset_index(), list(change), "right")[0]


@pytest.mark.parametrize("effects", [[-0.8, 0.9, 1.2], [3.0, 3.5, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]], ids=str)
def test_what_differs_between_seeds_is_in_the_interval(effects):
    """Pictures that all agree: nothing but seeds is left, and these have Student's interval."""
    found = trained_difference(effects, 0.0)
    low, high = scipy.stats.t.interval(0.95, len(effects) - 1, np.mean(effects), scipy.stats.sem(effects))
    assert found.value == pytest.approx(np.mean(effects))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_seeds_and_pictures_both_count():
    seeds_only, both = trained_difference([-1.0, 0.0, 1.0], 0.0), trained_difference([-1.0, 0.0, 1.0], 12.0)
    assert both.high - both.low > seeds_only.high - seeds_only.low > 0


def test_one_training_has_no_interval():
    assert not np.isfinite(trained_difference([5.0], 1.0).low)


# ---- five words


def toy(rule: dict[str, Any], unit: str, matters: float | None) -> dict[str, Any]:
    claim = {"id": "toy", "claim": "Something.", "source": "luo2026sink", "where": "here", "grade": "A"}
    claim |= {"chapter": "90-toy", "figure": "fig-toy", "metric": "{model}.toy", "unit": unit, "supported": rule}
    return {"claims": [claim | ({} if matters is None else {"matters": matters})], "controls": []}


def judged(folder, ledger, value, low, high, n=400) -> str:
    place = folder / "lab-llava" / "90-toy"
    place.mkdir(parents=True)
    row = {"name": "lab-llava.toy", "value": value, "low": low, "high": high, "n": n, "unit": ""}
    (place / "metrics.json").write_text(json.dumps([row]))
    return claims.verdicts(folder, ledger).verdict.iloc[0]


@pytest.mark.parametrize("content", ["", "[{", "3", '["x"]', '{"name": 1}'])
def test_damaged_numbers_are_named(tmp_path, content):
    judged(tmp_path, toy({"above": 5}, "points", 2), 7, 6, 8)
    file = tmp_path / "lab-llava" / "90-toy" / "metrics.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))} is damaged .*: execute its chapter again"):
        claims.metrics(tmp_path)


@pytest.mark.parametrize(
    ("rule", "unit", "matters", "interval", "expected"),
    [
        ({"above": 5}, "points", 2, (7, 6, 8), "supported"),
        ({"above": 5}, "points", 2, (3.5, 2.5, 4.5), "right sign, below the bound"),
        ({"above": 5}, "points", 2, (0.3, -0.8, 1.4), "no effect"),
        ({"above": 5}, "points", 2, (1.0, 0.5, 1.5), "no effect"),  # surely above zero, and too small to matter
        ({"above": 5}, "points", 2, (-4.0, -6.0, -2.0), "opposite sign"),
        ({"above": 5}, "points", 2, (1.0, -3.0, 4.0), "inconclusive"),  # no reason to call that contradicted
        ({"below": -5}, "points", 2, (-3.5, -4.5, -2.5), "right sign, below the bound"),
        ({"below": -5}, "points", 2, (4.0, 2.5, 5.5), "opposite sign"),
        ({"below": 0.5}, "times", 1.1, (0.86, 0.85, 0.87), "right sign, below the bound"),
        ({"below": 0.5}, "times", 1.1, (0.98, 0.97, 0.99), "no effect"),
        ({"above": 1.5}, "times", 1.1, (0.6, 0.5, 0.7), "opposite sign"),
        ({"above": 1.5}, "times", 1.1, (1.2, 0.7, 1.45), "inconclusive"),
        ({"between": [-2, 2]}, "nats", None, (0.0, -1.0, 1.0), "supported"),
        ({"between": [-2, 2]}, "nats", None, (-8.0, -9.0, -7.0), "opposite sign"),
    ],
)
def test_five_words(tmp_path, rule, unit, matters, interval, expected):
    assert judged(tmp_path, toy(rule, unit, matters), *interval) == expected


# ---- a claim has its control in its metric


@pytest.mark.parametrize("name", [name for name, claim in LEDGER.items() if claim["chapter"] == "07-ablation"])
def test_what_is_taken_away_is_held_against_as_many_others(name):
    metric = LEDGER[name]["metric"]
    assert "minus_" in metric, f"{metric} is the effect of the group alone"


def copied(tmp_path, **changed: list[str]):
    """The committed metrics of a chapter, with the natural model's calm patches in the place of the planted sinks."""
    for chapter, names in changed.items():
        chapter = chapter[1:].replace("_", "-")
        rows = json.loads((paths.RESULTS / "lab-llava" / chapter / "metrics.json").read_text())
        by_name = {row["name"]: row for row in rows}
        for name in names:
            twin = by_name[f"lab-llava.{name.replace('sinks_', 'calm_')}"]
            by_name[f"lab-llava-gist.{name}"] = twin | {"name": f"lab-llava-gist.{name}"}
            matched = f"lab-llava-gist.{name.replace('sinks_', 'calm_')}.against.lab-llava"
            half = (twin["high"] - twin["low"]) / 2
            by_name[matched] = twin | {"name": matched, "value": 0.1, "low": 0.1 - half, "high": 0.1 + half}
        folder = tmp_path / "lab-llava" / chapter
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(list(by_name.values())))
    return tmp_path


@pytest.mark.parametrize(
    ("claim", "metric"),
    [("global-content", "probe.global.sinks_minus_random"), ("decoder-content", "probe.decoder.sinks_minus_random")],
)
def test_no_claim_on_content_passes_without_sinks(tmp_path, claim, metric):
    results = copied(tmp_path, _05_content=[metric])
    ledger = {"claims": [LEDGER[claim]], "controls": []}  # alone: no correction stands in the way
    found = claims.verdicts(results, ledger).set_index("model").verdict
    assert found["lab-llava-gist"] != "supported"


def test_no_control_passes_without_sinks(tmp_path):
    results = copied(tmp_path, _05_content=["probe.global.sinks_minus_random"])
    ledger = copy.deepcopy(claims.load())
    ledger["controls"] = [control for control in ledger["controls"] if control["id"] == "built-in-are-global"]
    assert claims.controls(results, ledger).state.tolist() == ["unclear"]


# ---- bounds that the source's own effect can reach, and what was known when


def smallest(table: str, rows: tuple[str, str], scores: dict[str, float]) -> float:
    """Of all models the smallest mean difference between two rows of a published table, in % of each full score."""
    known = pd.read_csv(paths.DATA / "paper" / f"{table}.csv")
    wide = known.pivot(index=["model", "row"], columns="column", values="value")[list(scores)] * 100 / pd.Series(scores)
    return float((wide.xs(rows[1], level="row") - wide.xs(rows[0], level="row")).mean(axis=1).min())


THREE = {"LLaVA-eval average": 100, "MME all": 2800, "MathVista": 100}
PUBLISHED = {
    "front-helps": ("front", ("as is", "sinks to the front"), THREE),
    "front-renumbered-helps": ("front", ("as is", "sinks to the front"), THREE),
    "diysink-helps": ("diysink", ("baseline", "DIYSink, soft routing (ReW)"), THREE),
    "two-connectors-help": (
        "connectors",
        ("one connector", "two connectors"),
        {"ScienceQA": 100, "MMMU": 100, "MME all": 2800},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bound_can_be_reached_by_the_published_effect(name):
    effect = smallest(*PUBLISHED[name])
    assert LEDGER[name]["supported"]["above"] <= effect / 2 + 0.01
    assert LEDGER[name]["published"] == pytest.approx(effect, abs=0.02)


@pytest.mark.parametrize("again", ["supported: {above: 0}", "id: another", "unit: points"])
def test_a_key_of_the_ledger_twice(tmp_path, again):
    """YAML would take the last, and the verdict follow from it."""
    lines = claims.LEDGER.read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("supported:"))
    indent = len(lines[at]) - len(lines[at].lstrip())
    (tmp_path / "claims.yml").write_text("\n".join([*lines[: at + 1], " " * indent + again, *lines[at + 1 :]]))
    with pytest.raises(ValueError, match=f"^claims.yml: the key '{again.split(':')[0]}' is there twice, again in line"):
        claims.load(tmp_path / "claims.yml")


@pytest.mark.parametrize("name", ["built-in-are-there", "registers-are-clean"])
def test_rules_of_the_first_chapter_were_written_after_it(name):
    control = next(control for control in claims.load()["controls"] if control["id"] == name)
    assert control.get("seen") is True


@pytest.mark.parametrize("page", ["intro", "verdicts"])
def test_pages_state_results_by_including_what_is_computed(page):
    """No page that a reader meets first has a typed result: what sinks do, or do not, comes from the ledger."""
    text = " ".join((paths.BOOK / f"{page}.md").read_text(encoding="utf-8").split())
    typed = "changed nothing|answers worse|hardly attributed|looks at them|was not use|no verdict above is worth"
    assert not re.findall(typed, text)
    assert "_build/pages/verdicts-evidence.md" in text
