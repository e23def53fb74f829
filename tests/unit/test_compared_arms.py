"""Arms, routers and seeds compared, on answers made up by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import save_file
from torch import zeros

from sinkstudy.answers import study
from sinkstudy.book import chapter
from sinkstudy.lab.arms import TUNE
from sinkstudy.trained import compared, routers

TYPES = ["global", "local", "mixed"] * 4
SIMPLE = [True] * 6 + [False] * 6


def judged(said: pd.DataFrame, route: str) -> pd.DataFrame:
    """What a model says that finds every picture simple and no question holistic, and a route."""
    index = said.head(12).set_index(["benchmark", "id"]).index
    return pd.DataFrame({"simple": 1.0, "holistic": -1.0, "route": route}, index=index)


def answers(arm: str, right: list[float], seed: int = 0, **more) -> pd.DataFrame:
    """Twelve answers, two benchmarks with six pictures each."""
    benchmark = ["POPE"] * 6 + ["MME"] * 6
    ids = [str(i) for i in range(12)]
    picture = [f"{b} {i}" for b, i in zip(benchmark, ids, strict=True)]
    intervention = arm.removeprefix("two ")
    return pd.DataFrame({"model": "m", "arm": arm, "seed": seed, "benchmark": benchmark, "id": ids, "picture": picture,
                         "type": TYPES, "simple": SIMPLE, "intervention": intervention, "right": right,
                         "logp": right} | more)


@pytest.fixture
def said() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    arms = ("two both", "two sinks", "two others", "one")
    seeds = [answers(arm, list(100.0 * rng.integers(0, 2, 12)), seed) for arm in arms for seed in (0, 1)]
    return pd.concat([answers("base", [100.0] * 12), *seeds], ignore_index=True)


def write(folder: Path, losses: list[float], **method: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "method.json").write_text(json.dumps({"kind": "diysink", **method}))
    log = {"stage": ["align"] + ["tune"] * len(losses), "step": range(len(losses) + 1), "loss": [9.0, *losses]}
    pd.DataFrame(log).to_csv(folder / "training.csv", index=False)
    save_file({"w": zeros(3, 2)}, folder / "weights.safetensors")


def test_losses_at_the_end(tmp_path: Path):
    write(tmp_path / "two-0", [8.0] + [2.0] * 20)
    write(tmp_path / "two-1", [2.2] * 20)
    write(tmp_path / "one-0", [2.0] * 20)
    write(tmp_path / "matched-0", [2.08] * 20)
    write(tmp_path / "rew-0", [0.1] * 20)
    write(tmp_path / "other-0", [1.0])
    (tmp_path / "two-x").mkdir()
    arms = compared.folders(tmp_path)
    assert list(arms) == ["one", "matched", "two", "rew"]  # the order of the tables, not of the alphabet
    ended = compared.trained({"m": arms})
    of = ended[ended.arm == "two"]
    assert of.loss.tolist() == pytest.approx([2.0, 2.2]) and of.steps.tolist() == [22, 21]
    assert (ended.parameters == 6).all()
    assert compared.against_one(ended)["m"] == pytest.approx({"one": 1, "matched": 1.04, "two": 1.05})
    assert compared.against_one(ended[ended.arm != "one"]) == {"m": {}}


def test_arms_without_verdict():
    ended = pd.DataFrame([("m", "one", 1.0, False), ("m", "two", 1.05, False), ("m", "random", 1.06, False),
                          ("m", "sinks", 3.0, False), ("n", "two", 1.2, False)],
                         columns=["model", "arm", "loss", "short"])
    # more than 5 %, not 5 %; what sees less has no ratio; without one connector nothing is known
    assert compared.under_trained(ended) == {"m": {"random"}, "n": set()}
    assert compared.under_trained(ended.assign(short=ended.arm == "sinks")) == {"m": {"random", "sinks"}, "n": set()}


def test_arms_of_fewer_steps_than_the_schedule_have_no_verdict(tmp_path: Path):
    assert compared.STEPS == TUNE.steps
    write(tmp_path / "one-0", [2.0] * 20, steps={"align": 80, "tune": compared.STEPS - 1})
    write(tmp_path / "two-0", [2.0] * 20, steps={"align, each connector": 120, "tune": compared.STEPS})
    write(tmp_path / "gates-0", [2.0] * 20, steps=120)
    write(tmp_path / "matched-0", [2.0] * 20, training={"settings": {"steps": 9}})  # of a user's own training
    assert compared.under_trained(compared.trained({"m": compared.folders(tmp_path)})) == {"m": {"one"}}


def test_which_comparisons_are_fair():
    of = {comparison.key: comparison for comparison in compared.COMPARISONS}
    pair = {key for key, one in of.items() if compared.unfair(one, {"two"})}
    on_pair = {key for key, one in of.items() if one.figure == "routers"}
    assert pair - on_pair == {"two_minus_one", "two_minus_matched", "two_minus_random", "two_minus_kept",
                              "soft_router_minus_one", "cot_router_minus_one"} and on_pair < pair
    random = {key for key, one in of.items() if compared.unfair(one, {"random"})}
    assert random == {"two_minus_random", "random_minus_one"}
    assert not any(compared.unfair(one, set()) for one in of.values())


def test_hard_routers_look_answers_up(said: pd.DataFrame):
    asked = {("m", 0): judged(said, "sinks")}
    found = compared.hard_routers(said, asked, seed=5)
    assert list(dict.fromkeys(found.arm)) == ["CoT router", "true router", "wrong router", "random router",
                                               "two-axis router"]
    for seed in (0, 1):
        passes = {way: said[(said.arm == f"two {way}") & (said.seed == seed)].right.tolist() for way in routers.ROUTES}
        rules = {"true router": ["sinks", "others", "both"] * 4, "wrong router": ["others", "sinks", "both"] * 4,
                 "two-axis router": ["sinks", "both", "both"] * 2 + ["both", "others", "both"] * 2}
        for router, ways in rules.items():
            own = found[(found.arm == router) & (found.seed == seed)].set_index("id").right
            assert [own[str(i)] for i in range(12)] == [passes[way][i] for i, way in enumerate(ways)]
    cot = found[found.arm == "CoT router"]
    sinks_only = said[(said.arm == "two sinks") & (said.seed == 0)]
    assert set(cot.seed) == {0} and cot.right.tolist() == sinks_only.right.tolist()
    routes = compared.hard_routes(said[said.seed == 1], seed=6)
    assert routes["random router"].value_counts().to_dict() == {"sinks": 4, "others": 4, "both": 4}
    assert routes["random router"].equals(routers.dealt_at_random(routes["true router"], 6))


def test_without_types_no_router_knows_the_truth(said: pd.DataFrame):
    said["type"] = None
    assert compared.hard_routers(said, {}).empty
    effects, _ = compared.comparisons(said, {})
    assert not set(effects.benchmark) & {"global", "local", "mixed"} and "two_minus_one" in set(effects.key)


def test_agreement_of_the_routers(said: pd.DataFrame):
    row = compared.agreements(said, {("m", 0): judged(said, "sinks")}).iloc[0]
    assert row.agreement == pytest.approx(2 / 12) and row.kappa == pytest.approx(0)
    assert row[["to sinks", "to others", "to both"]].tolist() == [12, 0, 0]
    assert row.complexity == 6 / 12 and row.question == 4 / 8  # six simple of twelve; four local of eight not mixed


def test_differences_are_paired_by_question_and_seed(said: pd.DataFrame):
    said = said.sample(frac=1, random_state=0)
    effects, seeds = compared.comparisons(said, {"m": {"two"}})
    own = effects[(effects.key == "two_minus_one") & (effects.measure == "right")].set_index("benchmark")
    of = said.set_index("arm")
    for seed in (0, 1):
        mean = {arm: of[of.seed == seed].loc[arm].groupby("benchmark").right.mean() for arm in ("two both", "one")}
        by_hand = (mean["two both"] - mean["one"]).mean()
        row = seeds[(seeds.key == "two_minus_one") & (seeds.seed == seed) & (seeds.measure == "right")]
        assert row[row.benchmark == "mean"].value.item() == pytest.approx(by_hand)
    assert own.value["mean"] == pytest.approx((own.value["POPE"] + own.value["MME"]) / 2)
    assert own.n["mean"] == 12 and own.n["global"] == 4 and own.df.notna().all()
    assert (effects.verdict == "under-trained, no verdict").all()  # all that these answers allow rest on the pair
    assert (own.way == "against one connector").all() and (own.method == "two connectors").all()
    fair, _ = compared.comparisons(said, {})
    assert fair.drop(columns="verdict").equals(effects.drop(columns="verdict"))  # the numbers stay as they are


def test_against_the_model_as_it_is():
    said = pd.concat([answers("base", [100.0, 0.0] * 6), answers("gates", [100.0] * 12, 0),
                      answers("gates", [0.0] * 12, 1)])
    effects, seeds = compared.comparisons(said, {})
    assert set(effects.key) == {"gates_minus_base"}
    own = seeds[(seeds.benchmark == "mean") & (seeds.measure == "right")]
    assert own.value.tolist() == [50, -50]
    assert (effects[effects.measure == "right"].verdict == "no clear difference").all()


def test_accuracy_of_arms(said: pd.DataFrame):
    table = compared.accuracy(said).query("measure == 'right'").set_index(["arm", "benchmark"])
    assert list(dict.fromkeys(table.index.get_level_values(1))) == ["POPE", "MME", "mean"]
    one = said[said.arm == "one"]
    assert table.value["one", "POPE"] == pytest.approx(one[one.benchmark == "POPE"].right.mean())
    assert np.isnan(table.df["base", "mean"]) and table.df["one", "mean"] > 1
    assert table.value["base", "mean"] == study.mean_of_benchmarks(said[said.arm == "base"], "right").value == 100
    assert table.low.min() >= 0 and table.high.max() == 100  # shares, of two seeds that differ


@pytest.mark.parametrize("low, high, words", [(0.1, 2, "better"), (-2, -0.1, "worse"), (-1, 1, "no clear difference")])
def test_verdicts(low: float, high: float, words: str):
    found = compared.stats.Interval((low + high) / 2, low, high, 9)
    assert compared.verdict(found) == words
    assert compared.verdict(found, no_verdict=True) == "under-trained, no verdict"
    assert compared.verdict(found._replace(low=np.nan, high=np.nan)) == "no clear difference"  # of one seed


def test_the_figure_marks_what_is_under_trained(said: pd.DataFrame):
    effects, seeds = compared.comparisons(said, {"m": {"two"}})
    chosen = [of[(of.benchmark == "mean") & (of.measure == "right")] for of in (effects, seeds)]
    fig = compared.forest_plot(*chosen, {"m": "#123456"})
    assert fig.axes[0].get_title() == "m"
    dots = [line for line in fig.axes[0].lines if line.get_marker() == "o"]
    assert len(dots) == len(chosen[0]) and all(line.get_markerfacecolor() == "none" for line in dots)
    assert all(len(line.get_xdata()) == 2 for line in fig.axes[0].lines if line.get_marker() == "|")


def test_without_any_method():
    assert compared.trained({}).empty and compared.against_one(compared.trained({})) == {}
    said = compared.answers_of_arms(None, {}, {})
    assert compared.hard_routers(said, {}).empty and compared.accuracy(said).empty
    effects, seeds = compared.comparisons(said, {})
    assert effects.empty and seeds.empty and len(compared.forest_plot(effects, seeds, {}).axes) == 1


# ------------------------------------------------------------------------------------------- the paper's tables
def test_arms_in_the_columns_of_the_papers_tables():
    """Two seeds of MME about one picture in each of two tasks: acc + acc+, worked out by hand, then their mean."""
    def of_arm(arm: str, seed: int, right: list[float]) -> pd.DataFrame:
        return pd.DataFrame({"model": "m", "arm": arm, "seed": seed, "benchmark": "MME", "id": list("abcd"),
                             "picture": ["MME i"] * 2 + ["MME j"] * 2, "category": ["count"] * 2 + ["scene"] * 2,
                             "right": right})
    said = pd.concat([of_arm("one", 0, [100.0, 0, 0, 0]), of_arm("two both", 0, [100.0, 100, 0, 0]),
                      of_arm("one", 1, [100.0, 0, 100, 0]), of_arm("two both", 1, [100.0, 0, 100, 100])])
    two_minus_one, soft = compared.COMPARISONS[0], compared.COMPARISONS[7]
    (row,) = compared.reported_comparisons(said, {"m": {"two"}}, [two_minus_one, soft]).itertuples()
    assert (row.model, row.key, row.column) == ("m", "two_minus_one", "MME all")
    assert (row.before, row.score) == ((50 + 100) / 2, (200 + 250) / 2)
    assert row.value == 150 and row.low <= row.value <= row.high and row.verdict == compared.UNDER_TRAINED


def test_a_table_of_the_paper_with_ours_below(tmp_path):
    (tmp_path / "front.csv").write_text("row,column,value,model\nas is,MME all,10,A\nto the front,MME all,9.5,A\n"
                                        "as is,MathVista,1,A\nto the front,MathVista,1.25,A\n")
    ours = pd.DataFrame([("m", "front", "MathVista", 50.0, 51.0, 1.0, -1.0, 3.0, 9)], columns=[
        "model", "method", "column", "before", "score", "value", "low", "high", "n"])
    shown = chapter.beside_paper(tmp_path / "front.csv", ours)
    assert shown.loc[("paper", "A", "to the front")].tolist() == ["10.00 → 9.50, −0.50", "1.00 → 1.25, +0.25"]
    assert shown.loc[("here", "m", "front")].tolist() == ["–", "50.0 → 51.0, +1.0 [−1.0, +3.0]"]
