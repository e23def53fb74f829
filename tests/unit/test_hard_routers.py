"""Hard routers in closed form."""

import numpy as np
import pandas as pd
import pytest

from sinkstudy.trained import routers

IDS = [f"{i:02d}" for i in range(12)]


def constant(ids, route: str) -> pd.Series:
    return pd.Series(route, index=pd.Index(ids, name="id"), name="route")


@pytest.fixture
def types() -> pd.Series:
    return pd.Series(["global", "local", "mixed", "local"] * 3, index=pd.Index(IDS, name="id"))


@pytest.fixture
def said() -> pd.DataFrame:
    """Answers that name their own pass; the rows are in no order."""
    rows = [
        {"id": i, "intervention": how, "prediction": f"{how} {i}"} for how in ("none", *routers.ROUTES) for i in IDS
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_the_questions_that_the_model_is_asked():
    """Exact texts: results under other words are other results."""
    assert routers.GENERAL == routers.Wording(
        image="Is this image simple and symbolic, like a chart or a drawing, or is it complex, like a photograph of "
        "the real world? Answer with one word, simple or complex.",
        simple=("simple",),
        complex=("complex",),
        question="Somebody asks about this image: {question}\nDo not answer that. Does it need a holistic "
        "understanding of the whole image, or a local understanding of one part of it? Answer with one word, "
        "holistic or local.",
        holistic=("holistic",),
        local=("local",),
    )
    assert routers.LAB == routers.Wording(
        image="how many parts are there ?",
        simple=("one",),
        complex=("two", "three", "four"),
        question="{question} options : A the scene , B one thing . answer with the letter .",
        holistic=("A",),
        local=("B",),
    )


def test_the_rule_of_the_paper():
    simple, holistic = pd.Series([True, True, False, False]), pd.Series([True, False, True, False])
    assert routers.decided(simple, holistic).tolist() == ["sinks", "both", "both", "others"]


def test_routers_that_know_the_type(types):
    assert routers.by_type(types)[["00", "01", "02"]].tolist() == ["sinks", "others", "both"]
    assert routers.opposite(routers.by_type(types))[["00", "01", "02"]].tolist() == ["others", "sinks", "both"]
    with pytest.raises(ValueError, match="unknown type of question 'whole'; known: global, local, mixed"):
        routers.by_type(types.replace("global", "whole"))


def test_the_oracle_of_both_axes_is_the_rule_of_the_paper(types):
    simple = pd.Series([True] * 4 + [False] * 8, index=types.index)
    route = routers.by_both_axes(types, simple)
    assert route.head(8).tolist() == ["sinks", "both", "both", "both", "both", "others", "both", "others"]
    sure = types != "mixed"
    assert route[sure].equals(routers.decided(simple, types == "global")[sure])


def test_a_random_router_picks_each_route_as_often(types):
    oracle = routers.by_type(types)
    dealt = [routers.dealt_at_random(oracle, seed) for seed in range(200)]
    assert all(d.value_counts().to_dict() == {"sinks": 3, "others": 6, "both": 3} for d in dealt)
    assert all(d.index.equals(oracle.index) for d in dealt)
    assert dealt[0].equals(routers.dealt_at_random(oracle, 0)) and not dealt[0].equals(dealt[1])
    # of independent draws 1/4 · 1/4 + 1/2 · 1/2 + 1/4 · 1/4 = 3/8 agree; 200 draws of 12 have a standard error of 0.01
    assert np.mean([(d == oracle).mean() for d in dealt]) == pytest.approx(3 / 8, abs=0.04)


def test_routed_answers_are_those_of_the_chosen_pass(said, types):
    route = routers.by_type(types).sample(frac=1, random_state=1)
    out = routers.routed(said, route)
    assert out.prediction.tolist() == [f"{r} {i}" for i, r in route.items()]
    assert out.id.tolist() == route.index.tolist()
    assert set(out.intervention) == {"routed"} and list(out.columns) == list(said.columns)
    for how in routers.ROUTES:
        same = routers.routed(said, constant(IDS, how))
        assert same.prediction.tolist() == [f"{how} {i}" for i in IDS]


def test_what_cannot_be_routed(said):
    with pytest.raises(ValueError, match="a route is one of sinks, others, both, not 'sink'"):
        routers.routed(said, constant(IDS, "sink"))
    with pytest.raises(ValueError, match="the question '00' has two routes"):
        routers.routed(said, constant(["00", "00"], "both"))
    with pytest.raises(ValueError, match="1 answers are missing, such as that to '99' under 'both'"):
        routers.routed(said, constant(["00", "99"], "both"))
    with pytest.raises(ValueError, match="12 answers are missing, such as that to '00' under 'sinks'"):
        routers.routed(said[said.intervention != "sinks"], constant(IDS, "sinks"))


def test_agreement_in_closed_form():
    """20 + 15 of 50 alike, marginals 25/25 and 30/20: p = 0.7, e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5, kappa = 0.4."""
    truth = pd.Series(["sinks"] * 25 + ["others"] * 25)
    route = pd.Series(["sinks"] * 20 + ["others"] * 5 + ["sinks"] * 10 + ["others"] * 15)
    found = routers.agreement(route.sample(frac=1, random_state=0), truth)
    assert found.table.to_numpy().tolist() == [[20, 5, 0], [10, 15, 0], [0, 0, 0]]  # rows the truth
    assert found.table.index.tolist() == found.table.columns.tolist() == ["sinks", "others", "both"]
    assert (found.accuracy, found.n) == (0.7, 50) and found.kappa == pytest.approx(0.4)
    assert routers.agreement(truth, truth).kappa == 1
    assert routers.agreement(truth.replace({"sinks": "others", "others": "sinks"}), truth).kappa == -1
    assert routers.agreement(constant(truth.index, "both"), truth)[1:3] == (0, 0)
    assert np.isnan(routers.agreement(*[constant(truth.index, "both")] * 2).kappa)
    with pytest.raises(ValueError, match="not decide about the same questions"):
        routers.agreement(truth, truth[:-1])


def test_balanced_samples(types):
    table = types.rename("type").reset_index()
    drawn = routers.balanced(table, 6, seed=3)
    assert drawn.type.value_counts().to_dict() == {"global": 2, "local": 2, "mixed": 2}
    assert not drawn.id.duplicated().any()
    assert (table.loc[drawn.index] == drawn).all(axis=None)  # rows stay whole
    assert drawn.equals(routers.balanced(table, 6, seed=3)) and not drawn.equals(routers.balanced(table, 6, seed=4))
    ever = {i for seed in range(50) for i in routers.balanced(table, 6, seed).id}
    assert ever == set(IDS)
    with pytest.raises(ValueError, match="7 samples cannot be balanced over 3 types; take a multiple of 3"):
        routers.balanced(table, 7)
    with pytest.raises(ValueError, match="4 rows of each type are needed; there are 3 of 'global'"):
        routers.balanced(table, 12)
