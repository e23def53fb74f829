"""The lab's versions of benchmarks: balance and schema of their originals, right answers, the scorers."""

from collections import Counter
from functools import cache

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
def test_built_again_a_table_is_the_same(name):
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
        images, _ = benchmarks.render_pictures(table[table.scene == first])
        drawn = render("test hidden" if name == "POPE" else "test", first, 1)
        assert torch.equal(images, drawn.images)
        assert drawing.signature(drawn) % 100 >= drawing.SPLITS["test"][0]


def test_pictures_of_scattered_scenes():
    wanted = [("test", 300), ("test", 3), ("test simple", 258), ("test", 3), ("test simple", 3)]
    images, place = benchmarks.render_pictures(pd.DataFrame({"image_id": [f"{split}-{i:06d}" for split, i in wanted]}))
    assert len(images) == 4
    for (split, scene), at in zip(wanted, place, strict=True):
        assert torch.equal(images[at], render(split, scene, 1).images[0])


def test_of_simple_scenes_they_ask_the_same():
    """As many questions of each category; one ground, and a thing or two, as the pictures show."""
    table, shown = study.benchmark("MMStar", "", False, 24, simple=True)
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


# ---------------------------------------------------------------------- those of the paper's tables
MAKERS = {"GQA": benchmarks.gqa, "ScienceQA-IMG": benchmarks.scienceqa, "TextVQA": benchmarks.textvqa,
          "MMMU": benchmarks.mmmu, "MathVista": benchmarks.mathvista}


@pytest.fixture(scope="module")
def reported() -> dict[str, pd.DataFrame]:
    return {name: make() for name, make in MAKERS.items()}


@cache
def chunk(split: str, number: int) -> list[q.Facts]:
    return q.facts(render(split, number * drawing.CHUNK, drawing.CHUNK, pictures=False))


def truth(row) -> str:
    """The answer by the facts of the scene that the image's name says, read by the oracle."""
    split, _, scene = row.image_id.rpartition("-")
    number, place = divmod(int(scene), drawing.CHUNK)
    return oracle(row.question, chunk(split, number)[place])


@pytest.mark.parametrize("name", MAKERS)
def test_they_have_the_columns_of_the_loaders(reported, name):
    table = reported[name]
    check(table, name)
    assert {*COLUMNS, *SOURCES[name].extra, "scene", "family", "type", "simple"} == set(table.columns)
    assert table.id.astype(int).tolist() == list(range(len(table)))
    assert (table.type == table.family.map(q.TYPES)).all() and not table.simple.any()
    pd.testing.assert_frame_equal(MAKERS[name](), MAKERS[name]())


@pytest.mark.parametrize("name", MAKERS)
def test_their_answers_are_those_of_the_scene(reported, name):
    for row in reported[name].itertuples():
        said = truth(row)
        choices = getattr(row, "choices", None)
        if name in ("ScienceQA-IMG", "MMMU"):
            assert len(set(choices)) == 4 and choices["ABCD".index(row.answer)] == said, row
        elif row.category == "numeric":
            assert choices is None and int(row.answer) == q.NUMBERS.index(said), row
        else:
            assert row.answer == said and (choices is None or said in choices), row
        if name == "TextVQA":
            assert row.answers == [said] * 10


def test_no_scene_is_asked_about_by_two_benchmarks(tables, reported):
    """Half hidden things are those of the same scene."""
    scenes = [set(table.scene) for table in reported.values()]
    before = set().union(*(table.scene for table in tables.values()))
    assert not before & set().union(*scenes) and len(set().union(*scenes)) == sum(map(len, scenes))
    for name, table in reported.items():
        assert table.image_id.nunique() == len(scenes[list(reported).index(name)])


def test_their_balance(reported):
    gqa = reported["GQA"]
    assert gqa.image_id.nunique() == 60 and (gqa.groupby("image_id").size() == 6).all()
    assert gqa.image_id.str.startswith("test hidden-").all() and set(gqa.category) == {"query", "verify"}
    verify = gqa[gqa.category == "verify"]
    assert set(verify.answer) == {"yes", "no"} and 0.35 < (verify.answer == "yes").mean() < 0.65
    for name, of, each in (("ScienceQA-IMG", benchmarks.SUBJECTS, 60), ("MMMU", benchmarks.DISCIPLINES, 24),
                           ("MathVista", benchmarks.MATHEMATICS, 48), ("TextVQA", {"all": ("both",)}, 96)):
        table = reported[name]
        assert dict(table.category.value_counts()) == dict.fromkeys(of, each) and table.image_id.is_unique
        for category, families in of.items():
            asked = table[table.category == category].family.value_counts()
            assert set(asked.index) == set(families) and (asked == each / len(families)).all()
    letters = Counter(pd.concat([reported[name].answer for name in ("ScienceQA-IMG", "MMMU")]))
    assert all(0.15 < letters[letter] / 240 < 0.35 for letter in "ABCD"), letters
    hidden = reported["MathVista"].image_id.str.startswith("test hidden-")
    assert (hidden == (reported["MathVista"].category == "comparison")).all()
    assert 0.3 < (reported["MathVista"].query("category == 'comparison'").answer == "yes").mean() < 0.7


@pytest.mark.parametrize("name", MAKERS)
def test_they_are_asked_in_the_labs_words(reported, name):
    """Options stand in the form in which MMStar has them, which the models learned."""
    table = reported[name]
    for row, asked in zip(table.itertuples(), public.prompts(table, name, "lab"), strict=True):
        stem, _, listed = asked.partition(" options : ")
        options = dict(of.split(" ", 1) for of in listed.removesuffix(" . answer with the letter .").split(" , ") if of)
        assert stem == row.question
        chosen = getattr(row, "choices", None) or []
        assert list(options.values()) == ([] if chosen == ["yes", "no"] else chosen)


@pytest.mark.parametrize("name", MAKERS)
def test_what_the_lab_models_say_is_scored(reported, name):
    """They say numbers in words and options by letter."""
    table = reported[name]
    said = [q.NUMBERS[int(row.answer)] if row.category == "numeric"
            else "ABCD"[row.choices.index(row.answer)] if row.category == "numeric, with options" else row.answer
            for row in table.itertuples()]
    assert (public.right(table.assign(prediction=said), name) == 1).all()
    assert (public.right(table.assign(prediction=said[1:] + said[:1]), name).mean()) < 0.7
    assert (public.right(table.assign(prediction=""), name) == 0).all()


def test_pictures_are_limited_by_benchmark():
    """As many of each category; POPE's three share theirs. One of each at least."""
    for name, limit, pictures, each in (("POPE", 7, 7, 7), ("MME", 30, 24, 2), ("MMStar", 11, 6, 1), ("MME", 1, 12, 1),
                                        ("MMMU", 10, 10, 2), ("TextVQA", 500, 96, 96)):
        table, shown = study.benchmark(name, "", False, limit)
        assert len(shown) == table.image_id.nunique() == pictures, name
        assert (table.groupby("category").image_id.nunique() == each).all(), name


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
