"""The lab's POPE, MME and MMStar: balance and schema of their originals, right answers, the scorers."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import oracle

from sinkstudy import benchmarks as public
from sinkstudy.answers import study
from sinkstudy.benchmarks.data import COLUMNS, SOURCES, check
from sinkstudy.lab import score
from sinkstudy.world import benchmarks, drawing
from sinkstudy.world import questions as q
from sinkstudy.world.drawing import KINDS, render


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {"POPE": benchmarks.pope(), "MME": benchmarks.mme(), "MMStar": benchmarks.mmstar()}


@pytest.fixture(scope="module")
def facts(tables) -> dict[int, q.Facts]:
    """The facts of every test scene that is asked about."""
    last = max(table.scene.max() for table in tables.values())
    return dict(enumerate(q.facts(render("test", 0, int(last) + 1, pictures=False))))


def asked_kind(question: str) -> str:
    return question.removeprefix("is there a ").removesuffix(" ?")


@pytest.mark.parametrize("name", ["POPE", "MME", "MMStar"])
def test_built_again_a_table_is_the_same(tables, name):
    small = {"POPE": lambda: benchmarks.pope(4), "MME": lambda: benchmarks.mme(2),
             "MMStar": lambda: benchmarks.mmstar(2)}[name]
    pd.testing.assert_frame_equal(small(), small())


def test_schemas(tables):
    """The columns of the public benchmarks, whose own check they pass."""
    for name, table in tables.items():
        check(table, name)
        assert {*COLUMNS, *SOURCES[name].extra, "scene", "family", "type", "simple"} == set(table.columns)
        assert table.id.astype(int).tolist() == list(range(len(table)))
        assert (table.groupby("image_id").scene.nunique() == 1).all()
        assert table.image_id.nunique() == table.scene.nunique()
        assert table.notna().all(axis=None)
        assert (table.type == table.family.map(q.TYPES)).all()


@pytest.mark.parametrize("name", ["POPE", "MME"])
def test_yes_no_answers_are_right(tables, facts, name):
    for row in tables[name].itertuples():
        assert row.answer == oracle(row.question, facts[row.scene]), row


def test_only_the_test_split_is_asked_about(tables):
    """The tables name scenes by their number in the test split, and draw them from it."""
    assert tables["POPE"].image_id.str.startswith("test hidden-").all()
    assert tables["MMStar"].image_id.str.startswith("test-").all()
    for name, table in tables.items():
        first = int(table.scene.iloc[0])
        images, _ = benchmarks.pictures(table[table.scene == first])
        drawn = render("test hidden" if name == "POPE" else "test", first, 1)
        assert torch.equal(images, drawn.images)
        assert drawing.signature(drawn) % 100 >= drawing.SPLITS["test"][0]


def test_pictures_of_scattered_scenes():
    wanted = [("test", 300), ("test", 3), ("test simple", 258), ("test", 3), ("test simple", 3)]
    images, place = benchmarks.pictures(pd.DataFrame({"image_id": [f"{split}-{i:06d}" for split, i in wanted]}))
    assert len(images) == 4
    for (split, scene), at in zip(wanted, place, strict=True):
        assert torch.equal(images[at], render(split, scene, 1).images[0])


def test_of_simple_scenes_they_ask_the_same():
    """As many questions of each category; one ground, and a thing or two, as the pictures show."""
    table, shown = study.benchmark("MMStar", "", False, 2, simple=True)
    assert table.id.is_unique and set(shown) == set(table.image_id)
    assert (table.groupby("category").simple.agg(["sum", "count"]) == [2, 4]).all(axis=None)
    for row in table[table.simple].itertuples():
        split, _, scene = row.image_id.rpartition("-")
        scenes = render(split, int(scene), 1)
        assert (scenes.texture >= 0).sum() == 1 and (scenes.kind >= 0).sum() in (1, 2)
        assert torch.equal(shown[row.image_id], scenes.images[0])


# ---------------------------------------------------------------------------------------------- POPE
def test_pope_asks_six_questions_an_image(tables):
    table = tables["POPE"]
    assert set(table.category) == {"random", "popular", "adversarial"}
    assert table.scene.nunique() == 100 and len(table) == 1800
    for _, asked in table.groupby(["scene", "category"]):
        assert Counter(asked.answer) == {"yes": 3, "no": 3}
        assert asked.question.nunique() == 6
    # the positives are the same in the three categories, as in the original
    positive = table[table.answer == "yes"].groupby(["scene", "category"]).question.agg(frozenset).unstack()
    assert (positive.nunique(axis=1) == 1).all()


@pytest.fixture(scope="module")
def counts() -> tuple[np.ndarray, np.ndarray]:
    """How often kinds appear, [kinds], and appear together, [kinds, kinds], in the first 4096 training scenes."""
    kind = render("train", 0, 4096, pictures=False).kind
    shown = torch.stack([(kind == k).any(1) for k in range(len(KINDS))], 1).double()
    return shown.sum(0).numpy(), (shown.T @ shown).numpy()


def test_pope_asks_the_same_about_whole_things(tables):
    whole, what = benchmarks.pope(split="test"), ["question", "answer", "category", "scene"]
    pd.testing.assert_frame_equal(whole[what], tables["POPE"][what])
    assert whole.image_id.str.startswith("test-").all()


def test_pope_negatives(tables, facts, counts):
    often, together = counts
    negatives = tables["POPE"][tables["POPE"].answer == "no"]
    drawn = Counter()
    for (scene, category), asked in negatives.groupby(["scene", "category"]):
        present = [KINDS.index(t.kind) for t in facts[scene].things]
        absent = [k for k in range(len(KINDS)) if k not in present]
        chosen = [KINDS.index(asked_kind(question)) for question in asked.question]
        assert set(chosen) <= set(absent) and len(set(chosen)) == 3
        weight = {"popular": often, "adversarial": together[:, present].sum(1)}.get(category)
        if weight is None:
            drawn.update(chosen)
        else:  # the three largest, in whatever order ties allow
            assert sorted(weight[chosen]) == sorted(weight[absent])[-3:], (scene, category)
    assert len(drawn) == len(KINDS)


def test_the_negatives_are_of_three_different_sorts(tables):
    negatives = tables["POPE"][tables["POPE"].answer == "no"]
    sets = negatives.groupby(["scene", "category"]).question.agg(frozenset).unstack()
    assert (sets.popular != sets.adversarial).mean() > 0.3
    assert (sets.random != sets.popular).mean() > 0.8


# ----------------------------------------------------------------------------------------------- MME
def test_mme_asks_in_pairs(tables):
    table = tables["MME"]
    assert set(table.group) == {"perception", "cognition"}
    assert set(table[table.group == "cognition"].category) == set(benchmarks.COGNITION)
    assert set(table[table.group == "perception"].category) == set(benchmarks.PERCEPTION)
    assert (table.groupby("category").scene.nunique() == 30).all()
    for _, pair in table.groupby(["category", "scene"]):
        assert sorted(pair.answer) == ["no", "yes"] and pair.question.nunique() == 2


# -------------------------------------------------------------------------------------------- MMStar
def test_mmstar_gives_four_options(tables, facts):
    table = tables["MMStar"]
    assert table.category.nunique() == 6 and (table.category.value_counts() == 40).all()
    assert table.scene.is_unique  # one question an image
    for row in table.itertuples():
        stem, listed = row.question.removesuffix(" . answer with the letter .").split(" options : ")
        options = dict(option.split(" ", 1) for option in listed.split(" , "))
        assert list(options) == list("ABCD") and len(set(options.values())) == 4
        truth = oracle(stem, facts[row.scene])
        assert [letter for letter, option in options.items() if option == truth] == [row.answer]
        assert row.l2_category == row.family and row.family in benchmarks.CAPABILITIES[row.category]
    letters = Counter(table.answer)
    assert all(0.15 < letters[letter] / len(table) < 0.35 for letter in "ABCD"), letters


# ------------------------------------------------------------------------------------------- scorers
def test_texts_are_scored_as_those_of_the_public_benchmarks(tables):
    """A model that answers rightly has the best score of each, one that says nothing the worst."""
    for name, measure in (("POPE", "F1"), ("MME", "score"), ("MMStar", "accuracy")):
        asked = tables[name]
        for said, share in ((asked.answer + " .", 1), ("", 0)):
            of = public.observed(asked.assign(prediction=said), name, "strict")
            parts = of[of.measure == measure].groupby(["part", "level", "most"])[["value", "of"]].sum().reset_index()
            assert (parts.value / parts["of"] == share * parts.most).all() and len(parts) > 3, (name, said)
    assert of.id.nunique() == 240


def test_answers_of_the_lab_models():
    table = benchmarks.pope(1).iloc[:4]
    assert table.answer.tolist() == ["yes", "no", "yes", "no"]
    right = score.correct(table.set_index(pd.Index([3, 4, 5, 6])), "POPE", ["yes", "yes", "", "no ."])
    assert right.tolist() == [True, False, False, True]
    assert right.index.tolist() == [3, 4, 5, 6] and right.dtype == bool


def test_every_row_needs_an_answer():
    with pytest.raises(ValueError):
        score.correct(benchmarks.pope(1), "POPE", ["yes"])
