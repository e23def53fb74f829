"""The ledger against its rules, and verdicts against outcomes worked out by hand."""

import copy
import json
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import yaml

from sinkstudy import stats
from sinkstudy.book import claims
from sinkstudy.paths import DATA, TRAINED
from sinkstudy.trained.compared import ARM_LABELS, COMPARISONS

LEDGER = {
    "claims": [
        {
            "id": name,
            "claim": "Something.",
            "source": "luo2026sink",
            "where": "here",
            "grade": "A",
            "chapter": "90-toy",
            "figure": "fig-toy",
            "metric": f"{{model}}.{name}.effect",
            "unit": unit,
            "supported": rule,
            **more,
        }
        for name, unit, rule, more in (
            ("up", "times", {"above": 1.5}, {"matters": 1.1}),
            ("same", "points", {"between": [-2, 2]}, {}),
        )
    ],
    "controls": [
        {"id": "c", "rule": "It holds.", "chapter": "90-toy", "metric": "lab-llava.up.effect", "holds": {"below": 2}}
    ],
}


def write(root, run, rows, chapter="90-toy"):
    folder = root / run / chapter
    folder.mkdir(parents=True, exist_ok=True)
    keys = ("name", "value", "low", "high", "n", "unit")
    (folder / "metrics.json").write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))


def verdict(root, claim="up", model="lab-llava"):
    table = claims.verdicts(root, LEDGER).set_index(["claim", "model"])
    return table.loc[(claim, model)]


# ---- the ledger


def test_ledger_of_the_study_is_well_formed():
    ledger = claims.load()
    assert len(ledger["claims"]) > 20 and len(ledger["controls"]) > 5


def test_header_of_the_ledger_says_what_the_code_does():
    """Its words are those of the code, in the order in which an interval is held against them; its keys are read."""
    header = claims.LEDGER.read_text(encoding="utf-8").partition("claims:\n")[0]
    named = [line[4:34].strip() for line in header.splitlines() if line.startswith("#   ")]
    assert named == [*claims.verdict_rules(claim({"above": 5})), "inconclusive"]
    assert set(named) == set(claims.JUDGED)
    for key in (*claims._MEASURE, *claims._OPTIONAL):
        assert f"`{key}" in header, key


def test_bounds_are_at_most_half_of_what_was_published_but_for_the_one_that_claims_most():
    rows = [row for row in claims.load()["claims"] if "published" in row and "between" not in row["supported"]]
    over = {row["id"] for row in rows if abs(*row["supported"].values()) > abs(row["published"]) / 2}
    assert len(rows) > 10 and over == {"phi-not-discriminative"}


def test_rules_changed_after_their_number_say_so_and_what_they_were():
    """Also those of which the header once said otherwise: the models and chapter 01 were there before the ledger."""
    ledger = claims.load()
    rows = {row["id"]: row for kind in ("claims", "controls") for row in ledger[kind]}
    late = {"norm-draws-attention", "built-in-are-there", "registers-are-clean"}
    assert all(rows[name]["seen"] is True for name in late)
    seen = {name for name, row in rows.items() if row.get("seen")}
    assert seen == late | {name for name, row in rows.items() if "was" in row}
    assert all("was" in row for row in ledger["claims"] if "matched" in row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("source"), r"keys missing: \['source'\]"),
        (lambda c: c.update(colour="red"), r"unknown: \['colour'\]"),
        (lambda c: c.update(id="same"), "the id is there twice"),
        (lambda c: c.update(source="nobody2020"), "not in references.bib"),
        (lambda c: c.update(grade="E"), "none of A, B, C, D"),
        (lambda c: c.update(metric="lab-llava.effect"), "must begin with '{model}.'"),
        (lambda c: c.update(chapter="four"), "no chapter"),
        (lambda c: c.update(chapter="03-propagations"), "no chapter '03-propagations', but '03-propagation'"),
        (lambda c: c.update(chapter="03-propagation"), "no figure 'fig-toy' in 03-propagation.ipynb"),
        (lambda c: c.update(supported={"above": 1, "below": 3}), "needs one of above"),
        (lambda c: c.update(supported={"above": "much"}), "needs one of above"),
        (lambda c: c.update(supported={"above": True}), "needs one of above"),
        (lambda c: c.update(supported={"between": [2, 1]}), "needs one of above"),
        (lambda c: c.update(supported={"between": 1}), "needs one of above"),
        (lambda c: c.update(supported={"near": 1}), "needs one of above"),
        (lambda c: c.pop("matters"), "needs 'matters'"),
        (lambda c: c.update(matters="much"), "are numbers"),
        (lambda c: c.update(matters=1.6), "between no effect and the bound"),
        (lambda c: c.update(matters=1), "between no effect and the bound"),
        (lambda c: c.update(supported={"between": [1, 2]}), "leave out 'matters'"),
        (lambda c: c.update(published=1.4), "'published' must agree with the claim"),
        (lambda c: c.update(matched="x"), "'matched' maps models"),
        (lambda c: c.update(was="above 1"), "carries 'seen: true'"),
    ],
)
def test_ledger_with_a_mistake_is_one_clear_error(tmp_path, change, message):
    ledger = copy.deepcopy(LEDGER)
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump(ledger))
    assert claims.load(path) == ledger
    change(ledger["claims"][0])
    path.write_text(yaml.safe_dump(ledger))
    with pytest.raises(ValueError, match=message) as error:
        claims.load(path)
    assert "\n" not in str(error.value)


# ---- one number


def claim(rule, unit="points", **more):
    return {"supported": rule, "unit": unit, **({} if "between" in rule else {"matters": 1}), **more}


@pytest.mark.parametrize(
    ("low", "high", "rule", "expected"),
    [
        (1.6, 3.0, {"above": 1.5}, "supported"),
        (1.4, 3.0, {"above": 1.5}, "inconclusive"),  # the sign is sure, the bound is not
        (1.5, 3.0, {"above": 1.5}, "inconclusive"),  # the bound itself is not above the bound
        (0.5, 1.4, {"above": 1.5}, "right sign, below the bound"),
        (0.5, 0.9, {"above": 1.5}, "no effect"),
        (-0.9, 0.9, {"above": 1.5}, "no effect"),
        (-0.9, 1.1, {"above": 1.5}, "inconclusive"),
        (-3.0, -0.1, {"above": 1.5}, "opposite sign"),
        (-9.0, -5.1, {"below": -5}, "supported"),
        (-9.0, -4.0, {"below": -5}, "inconclusive"),
        (-4.0, -0.5, {"below": -5}, "right sign, below the bound"),
        (0.5, 3.0, {"below": -5}, "opposite sign"),
        (-1.0, 1.5, {"between": [-2, 2]}, "supported"),
        (-2.5, 1.5, {"between": [-2, 2]}, "inconclusive"),
        (2.1, 5.0, {"between": [-2, 2]}, "opposite sign"),
        (-5.0, -2.1, {"between": [-2, 2]}, "opposite sign"),
        (np.nan, np.nan, {"above": 1.5}, "inconclusive"),
    ],
)
def test_word(low, high, rule, expected):
    assert claims.word(low, high, claim(rule)) == expected


def test_no_effect_of_a_ratio_is_a_factor_around_one():
    times = claim({"above": 1.5}, "times", matters=1.25)
    assert claims.nothing(times) == (0.8, 1.25)
    assert claims.word(0.85, 1.2, times) == "no effect"
    assert claims.word(0.75, 0.95, times) == "opposite sign"
    assert claims.word(1.1, 1.4, times) == "right sign, below the bound"


@pytest.mark.parametrize(
    ("low", "high", "rule", "expected"),
    [
        (1, 2, {"above": 0}, True),
        (-1, 2, {"above": 0}, None),
        (-2, -1, {"above": 0}, False),
        (3, 4, {"between": [0, 2]}, False),
    ],
)
def test_agrees(low, high, rule, expected):
    assert claims.agrees(low, high, rule) is expected


def test_p_values_are_those_of_a_z_test():
    rng = np.random.default_rng(0)
    sample = rng.normal(0.3, 1.0, 400)
    error = sample.std(ddof=1) / 20
    low, high = sample.mean() - 1.959964 * error, sample.mean() + 1.959964 * error
    for bound in (0.0, 0.25, 0.9):
        expected = 2 * scipy.stats.norm.sf(abs(sample.mean() - bound) / error)
        assert claims.p_value(sample.mean(), low, high, {"above": bound}) == pytest.approx(expected)
        assert claims.p_value(sample.mean(), low, high, {"below": bound}) == pytest.approx(expected)


def test_p_value_takes_the_half_of_the_interval_that_faces_the_bound():
    assert claims.p_value(2.0, 1.0, 10.0, {"above": 0.0}) == pytest.approx(2 * scipy.stats.norm.sf(2 * 1.959964))
    assert claims.p_value(2.0, 1.0, 10.0, {"above": 18.0}) == pytest.approx(2 * scipy.stats.norm.sf(2 * 1.959964))
    at_the_edge = claims.p_value(2.0, 0.0, 9.0, {"above": 0.0})
    assert at_the_edge == pytest.approx(0.05)  # interval and p tell the same
    assert claims.p_value(1.0, 0.5, 2.0, {"above": 1.0}) == 1.0


def test_p_value_of_a_ratio_is_that_of_its_logarithm():
    low, high = np.exp(np.log(3) + 1.959964 * 0.4 * np.array([-1, 1]))
    expected = 2 * scipy.stats.norm.sf((np.log(3) - np.log(1.5)) / 0.4)
    of, inverse = (3.0, low, high), (1 / 3, 1 / high, 1 / low)
    assert claims.p_value(*of, {"above": 1.5}, unit="times") == pytest.approx(expected)
    assert claims.p_value(*inverse, {"below": 1 / 1.5}, unit="times") == pytest.approx(expected)
    assert claims.p_value(*of, {"above": 1.5}) != pytest.approx(expected)
    for not_logarithms in ((3.0, -1.0, 7.0, {"above": 1.5}), (3.0, 1.0, 5.0, {"above": 0.0})):
        assert claims.p_value(*not_logarithms, unit="times") == claims.p_value(*not_logarithms)


def test_pictures_needed_for_a_ratio_are_those_for_its_logarithm():
    claim = {"unit": "times", "supported": {"above": 1.5}, "published": 7}
    found = claims.pictures_needed(claim, stats.Interval(3.0, 3.0 / 2, 3.0 * 2, 28))
    assert found == stats.images_needed(stats.Interval(0.0, -np.log(2), np.log(2), 28), np.log(7 / 1.5))


def test_p_value_of_students_interval_is_that_of_the_t_test():
    sample = np.random.default_rng(2).normal(1.0, 1.0, 4)
    low, high = scipy.stats.t.interval(0.95, 3, sample.mean(), scipy.stats.sem(sample))
    for bound in (0.0, -1.5):
        expected = scipy.stats.ttest_1samp(sample, bound).pvalue
        assert claims.p_value(sample.mean(), low, high, {"above": bound}, 3) == pytest.approx(expected)
    assert claims.p_value(2.0, 1.0, 3.0, {"above": 0}, np.nan) == claims.p_value(2.0, 1.0, 3.0, {"above": 0})


def test_pictures_needed_count_from_the_published_effect_to_the_bound():
    interval = stats.Interval(0.0, -0.98, 0.98, 400)  # a standard deviation of 10
    above = claim({"above": 1}, published=2)
    assert claims.pictures_needed(above, interval) == pytest.approx(7.849 * 100, rel=0.01)  # (1.96 + 0.84)^2 sd^2
    below = claim({"below": -1}, published=-2)
    assert claims.pictures_needed(below, interval) == claims.pictures_needed(above, interval)
    within = claim({"between": [-1.5, 1.5]}, published=-0.5)
    assert claims.pictures_needed(within, interval) == claims.pictures_needed(above, interval)
    assert np.isnan(claims.pictures_needed(claim({"above": 1}), interval))


def test_equivalence_is_two_one_sided_tests():
    from statsmodels.stats.weightstats import ztost

    sample = np.random.default_rng(1).normal(0.4, 3.0, 200)
    half = 1.959964 * sample.std(ddof=1) / np.sqrt(200)
    p = claims.p_value(sample.mean(), sample.mean() - half, sample.mean() + half, {"between": [-1, 1]})
    assert p == pytest.approx(ztost(sample, -1, 1)[0], rel=1e-5)
    outside = claims.p_value(3.0, 2.5, 3.5, {"between": [-1, 1]})
    assert outside == pytest.approx(2 * scipy.stats.norm.sf(4 * 1.959964))


def test_interval_without_width():
    assert np.isnan(claims.p_value(1.0, 1.0, 1.0, {"above": 0.0}))
    low, high = claims.widen(0.0, 0.0, 128, "points")
    assert scipy.stats.binom.cdf(0, 128, high / 100) == pytest.approx(0.05)  # no event in 128, with 5 %
    assert low == -high and high == pytest.approx(300 / 128, rel=0.02)
    assert claims.widen(0.5, 0.5, 128, "nats") == (0.5, 0.5)
    assert claims.widen(1.0, 2.0, 128, "points") == (1.0, 2.0)


# ---- all together


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((3.0, 2.5, 3.5, 99, ""), "supported"),
        ((1.0, 0.95, 1.05, 99, ""), "no effect"),
        ((0.7, 0.6, 0.8, 99, ""), "opposite sign"),
        ((1.3, 1.2, 1.4, 99, ""), "right sign, below the bound"),
        ((1.6, 1.4, 1.8, 99, ""), "inconclusive"),
        ((None, None, None, 0, ""), "not applicable"),
        ((3.0, None, None, 1, ""), "inconclusive"),  # one picture has no interval
        ((3.0, 3.0, 3.0, 99, ""), "inconclusive"),  # nothing varies, and a ratio has no largest value
    ],
)
def test_verdict_of_one_claim(tmp_path, row, expected):
    write(tmp_path, "lab-llava", [("lab-llava.up.effect", *row)])
    assert verdict(tmp_path).verdict == expected
    assert verdict(tmp_path, "same").verdict == "not run"


def test_share_without_spread_is_judged_by_the_number_of_pictures(tmp_path):
    write(tmp_path, "lab-llava", [("lab-llava.same.effect", 0.0, 0.0, 0.0, 100, "points")])
    assert verdict(tmp_path, "same").verdict == "inconclusive"  # up to 3 points may have been missed
    write(tmp_path, "lab-llava", [("lab-llava.same.effect", 0.0, 0.0, 0.0, 1000, "points")])
    found = verdict(tmp_path, "same")
    assert found.verdict == "supported" and found.high == pytest.approx(0.299, abs=0.001)


def test_a_few_seeds_make_p_larger(tmp_path):
    """By the normal approximation it would be 0.003 and survive; with two degrees of freedom it does not."""
    row = {"name": "lab-llava.up.effect", "value": 3.0, "low": 2.0, "high": 4.0, "n": 99, "unit": ""}
    ledger = {"claims": LEDGER["claims"] * 3, "controls": []}  # three claims: Holm takes three times p
    for df, expected in ((None, "supported"), (2, "inconclusive")):
        write(tmp_path, "lab-llava", [])
        rows = [row | ({} if df is None else {"df": df})]
        (tmp_path / "lab-llava" / "90-toy" / "metrics.json").write_text(json.dumps(rows))
        assert set(claims.verdicts(tmp_path, ledger).query("claim == 'up'").verdict) == {expected}


def test_matched_metric_counts_where_the_model_has_such_tokens(tmp_path):
    """The sinks' own metric says whether there are any; the matched one, whose control is closer, is judged."""
    ledger = copy.deepcopy(LEDGER)
    ledger["claims"][0]["matched"] = {"lab-twin": "matched", "lab-none": "matched", "lab-late": "matched"}
    high, low = (3.0, 2.5, 3.5, 99, ""), (1.0, 0.95, 1.05, 99, "")
    rows = [(f"{name}.up.effect", *high) for name in ("lab-llava", "lab-twin", "lab-late")]
    rows += [("lab-twin.matched", *low), ("lab-none.up.effect", None, None, None, 0, ""), ("lab-none.matched", *low)]
    write(tmp_path, "lab-llava", rows)
    found = claims.verdicts(tmp_path, ledger).query("claim == 'up'").set_index("model")
    assert found.verdict.to_dict() == {
        "lab-llava": "supported",
        "lab-twin": "no effect",
        "lab-late": "not run",  # not judged by the looser control until the closer one is there
        "lab-none": "not applicable",
    }
    assert found.metric["lab-twin"] == "lab-twin.matched"


def test_holm_runs_over_the_claims_of_one_model(tmp_path):
    barely = (2.0, 1.5087, 2.65, 99, "")  # supported at p = 0.0455 if it stands alone
    write(tmp_path, "lab-llava", [("lab-llava.up.effect", *barely), ("lab-llava.same.effect", 1.0, -5.0, 7.0, 99, "")])
    write(tmp_path, "alone", [("alone.up.effect", *barely)])
    table = claims.verdicts(tmp_path, LEDGER).set_index(["claim", "model"])
    assert table.verdict["up", "alone"] == "supported"
    assert table.p["up", "lab-llava"] == table.p["up", "alone"] == pytest.approx(0.0455, abs=1e-4)
    assert table.p_holm["up", "lab-llava"] == pytest.approx(2 * table.p["up", "lab-llava"])
    assert table.verdict["up", "lab-llava"] == "inconclusive"  # two claims were judged there


def test_own_run_comes_before_control_and_names_may_differ_in_case(tmp_path):
    number = (3.0, 2.5, 3.5, 99, "")
    write(
        tmp_path,
        "lab-llava",
        [
            ("lab-llava.up.effect", *number),
            ("lab-twin.up.effect", 1.0, 0.8, 1.2, 99, ""),
            ("lab-twin.minus.lab-llava.up.effect", *number),
            ("lab-other.up.effect", *number),
        ],
    )
    write(tmp_path, "lab-twin", [("lab-twin.up.effect", *number)])
    write(tmp_path, "owner--Model-1.5", [("owner--model-1.5.up.effect", *number)])
    write(tmp_path, "owner--Model-1.5", [("owner--model-1.5.up.effect", *number)], chapter="05-unrelated")
    table = claims.verdicts(tmp_path, LEDGER)
    ups = table[table.claim == "up"].set_index("model")
    assert list(ups.index) == ["lab-llava", "lab-twin", "owner--model-1.5", "lab-other"]
    assert ups.run.to_dict() == {
        "lab-llava": "lab-llava",
        "lab-twin": "lab-twin",
        "owner--model-1.5": "owner--Model-1.5",
        "lab-other": "lab-llava",
    }
    assert ups.verdict["lab-twin"] == "supported"


def test_nothing_was_run(tmp_path):
    assert claims.verdicts(tmp_path, LEDGER).empty
    assert claims.controls(tmp_path, LEDGER).state.tolist() == ["not run"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((1.0, 0.8, 1.2, 99, ""), "holds"),
        ((1.9, 1.8, 2.1, 99, ""), "unclear"),
        ((3.0, 2.8, 3.1, 99, ""), "fails"),
        ((0.0, 0.0, 0.0, 99, ""), "holds"),
    ],
)
def test_state_of_a_control(tmp_path, row, expected):
    write(tmp_path, "another-run", [("lab-llava.up.effect", 9.0, 8.0, 10.0, 99, "")])
    assert claims.controls(tmp_path, LEDGER).state.tolist() == ["not run"]  # no run of another name counts
    write(tmp_path, "lab-llava", [("lab-llava.up.effect", *row)])
    assert claims.controls(tmp_path, LEDGER).state.tolist() == [expected]


@pytest.mark.parametrize("number", range(len(claims.load()["controls"])))
def test_controls_of_the_study_hold_in_the_committed_results(number):
    """What must hold if the instrument works, whichever way the claims come out."""
    control = claims.load()["controls"][number]
    found = claims.controls().set_index("control").loc[control["id"]]
    if not (claims.RESULTS / "lab-llava" / control["chapter"]).is_dir():
        pytest.skip(f"chapter {control['chapter']} has no results yet")
    # one that does not hold says why in its note, and stays in the ledger; with a note about nothing it fails here
    interval = stats.Interval(*found[["value", "low", "high", "n"]])
    assert (found.state != "holds") == ("note" in control), f"{control['rule']} {interval}"


@pytest.mark.parametrize("row", [row for rows in claims.load().values() for row in rows if "note" in row],
                         ids=lambda row: row["id"])
def test_intervals_in_notes_are_those_of_the_committed_results(row):
    """Of the run that verdicts come from: a note was typed, and numbers change when a chapter is run again."""
    numbers = claims.metrics().drop_duplicates(["chapter", "name"])  # the full run comes first
    known = numbers.loc[numbers.chapter == row["chapter"], ["value", "low", "high"]].to_numpy().tolist()
    of_control = ["attention", "attention_low", "attention_high"]
    known += pd.read_csv(DATA / "controls" / "norms.csv")[of_control].to_numpy().tolist()
    for found in re.findall(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]", row["note"]):
        digits = len(found[0].partition(".")[2])
        assert found in {tuple(f"{x:.{digits}f}" for x in of) for of in known}, f"{row['id']}: {found}"


def test_chapters_write_the_metrics_that_the_ledger_names():
    """For one model at least: what is trained is not there for all. What waits for an arm, or has one that is
    under-trained only, is excused until then."""
    table = claims.verdicts()
    absent = (table.verdict == "not run").groupby(table.claim).all()
    untrained = ARM_LABELS.keys() - {path.name.rpartition("-")[0] for path in TRAINED.glob("*/*-*")}
    wait = {of.key for of in COMPARISONS if untrained & {of.first, of.second}}
    metrics = {claim["id"]: claim["metric"].split(".")[1] for claim in claims.load()["claims"]}
    not_run = [claim for claim in absent.index[absent] if metrics[claim] not in wait]
    chapters = {claim["id"]: claim["chapter"] for claim in claims.load()["claims"]}
    names = claims.metrics().name
    weak = {name.split(".under_trained.")[1].split(".")[0] for name in names if ".under_trained." in name}
    not_run = [claim for claim in not_run if metrics[claim] not in weak]
    late = [claim for claim in not_run if (claims.RESULTS / "lab-llava" / chapters[claim]).is_dir()]
    assert not late, "the chapter has results, but not the metric of these claims"
