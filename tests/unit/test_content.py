"""What is asked of pictures, from which patches it is read, and what becomes of the words, on made-up tokens."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from sinkstudy import sinks
from sinkstudy.analyses import content, decoding, probing
from sinkstudy.model.layout import ImageLayout
from sinkstudy.world import drawing, questions

GRID = (12, 12)


def layout(grid: tuple[int, int] = GRID) -> ImageLayout:
    """Every patch is a token of its own."""
    n = torch.arange(grid[0] * grid[1])
    return ImageLayout(0, grid, 1, n, n, n, n, n[:, None])


def norms(*high: int, n: int = 144) -> torch.Tensor:
    """Norm 1, a little more for each patch, but 10 at these."""
    of = 1 + torch.arange(n) / 1000
    of[list(high)] = 10
    return of


@pytest.fixture(scope="module")
def scenes() -> drawing.Scenes:
    return drawing.render("val", 0, 6)


@pytest.fixture(scope="module")
def groups(scenes) -> content.PatchSampler:
    known = content.known(scenes, 6, 4, 1, GRID, seed=3)
    return content.PatchSampler(sinks.rule("above_median", 3.0), known, draws=2, most=3, seed=1)


def test_facts_are_those_of_the_scenes(scenes, groups):
    known = groups.known
    facts = questions.facts(scenes)
    for i, of in enumerate(facts):
        assert drawing.SCENES[known.true["scene"][i, 0]] == of.scene
        assert drawing.TEXTURES[known.true["main texture"][i, 0]] == of.parts[0][0]
        assert (known.true["number of things"][i] == len(of.things)).all()
    assert known.true["cell"][0].view(GRID)[::4, ::4].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert torch.equal(known.calm.view(-1, *GRID), scenes.calm)
    assert known.kinds["local"] == ["texture there", "colour there"]
    assert known.of_patch() == ["cell", "texture there", "colour there", "thing there"]
    assert decoding.true_words(scenes)[0] >= {facts[0].scene, facts[0].light, facts[0].things[0].kind}


def test_of_other_pictures_and_of_tiles_the_facts_of_a_patch_are_not_known(scenes):
    other, tiled = content.known(None, 6, 4, 1, GRID), content.known(scenes, 6, 4, 2, GRID)
    assert list(other.true) == ["cell"] and not other.kinds["global"] and decoding.true_words(None) == []
    assert tiled.calm is None and tiled.kinds["global"] and not tiled.kinds["local"] and len(tiled.places) == 288


def test_in_the_control_task_a_picture_has_the_labels_of_another_of_its_half(groups):
    true, dealt = groups.known.true["texture there"], groups.known.dealt["texture there"]
    for half in (slice(0, 4), slice(4, 6)):
        rows = sorted(map(tuple, true[half].tolist()))
        assert rows == sorted(map(tuple, dealt[half].tolist()))
    cells = groups.known.dealt["cell"]
    assert (cells == cells[0]).all() and cells[0].bincount().tolist() == [16] * 9


def test_groups_and_their_controls(groups):
    high, things = (3, 77), groups.known.things[2]
    masks = groups.masks(2, layout(), norms(*high))
    assert masks["sinks"].nonzero()[:, 0].tolist() == list(high) and masks["top 2 %"].sum() == 3
    assert not (masks["sinks on things"] & ~(masks["sinks"] & things)).any()
    for group, (own, random) in groups.tokens(2, layout(), masks).items():
        assert (random.sum(1) == own.sum()).all() and not (random & own).any(), group


def test_single_patches_are_of_their_group_and_the_controls_are_not(groups):
    index, of = 1, norms(5, 9)
    patch, weights = groups.patches(index, layout(), of)
    masks = groups.masks(index, layout(), of)
    n, rest = len(groups.singles), groups.most - 1
    assert patch.shape == (n, 3) and weights.shape == (n + 1 + n * rest + len(groups.means), 144)
    for i, single in enumerate(groups.singles):
        there = weights[i].isfinite().all()
        group, control = (single[0], True) if isinstance(single, tuple) else (single, False)
        if group in masks and there:
            assert masks[group][patch[i, 0]] != control
            assert weights[i].argmax() == patch[i, 0] and weights[i].sum() == 1
    torch.testing.assert_close(weights[n], torch.full((144,), 1 / 144))
    mean = weights[n + 1 + n * rest]  # of the two sinks
    assert mean[[5, 9]].tolist() == [0.5, 0.5] and mean.sum() == 1
    assert weights[n + 1 + 1].isnan().all()  # there is no third sink
    again, _ = groups.patches(index, layout(), of)
    assert torch.equal(patch, again)


def test_pictures_of_another_size_are_refused(groups):
    with pytest.raises(ValueError, match="cuts picture 4 into other patches"):
        groups.patches(4, layout((4, 4)), norms(n=16))


def test_what_a_token_says_is_read_and_what_is_not_there_is_nan():
    labels = torch.arange(160)[:, None] % 2
    tokens = torch.randn(160, 1, 5, generator=torch.Generator().manual_seed(0))
    tokens[:, 0, 2] += 20 * labels[:, 0]
    tokens[150] = float("nan")
    found = probing.hit_rates(tokens, {"label": labels}, 120)["label"]
    assert np.isnan(found[30]) and np.nanmean(found) == 1 and len(found) == 40
    assert np.isnan(probing.hit_rates(tokens, {"label": labels}, 120, 40)["label"]).all()  # too few to fit on
    numbers = tokens[:, :, 2:3].nan_to_num() * 3
    told = probing.explained(tokens, numbers, 120)
    assert np.isnan(told[30]) and np.nanmean(told) == pytest.approx(1, abs=1e-3)


def test_observations_hold_the_group_its_control_and_the_lead():
    found = {("token", "sinks"): {"a": np.array([1.0, 0.0]), "b": np.array([1.0, np.nan])},
             ("token", ("sinks", 0)): {"a": np.array([0.0, 0.0]), "b": np.array([1.0, 1.0])},
             ("token", ("sinks", 1)): {"a": np.array([1.0, 0.0]), "b": np.array([1.0, 0.0])},
             ("token", "all"): {"a": np.array([1.0, 1.0])}}
    table = content._table(found, {"a": ["a"], "both": ["a", "b"], "unknown": []}, 2, 2).set_index(["group", "what"])
    both = table.loc[("sinks", "both")]
    np.testing.assert_array_equal(both.value, [100, np.nan])
    np.testing.assert_array_equal(both.random, [75, 25])
    np.testing.assert_array_equal(both.lead, [25, np.nan])
    assert table.loc[("all", "a")].random.isna().all() and ("all", "both") not in table.index
    assert table.loc[("sinks", "unknown")].value.isna().all()
    assert len(content._table({("mean", "sinks"): {}}, {"unknown": []}, 1, 5)) == 5


def test_words_hit_where_they_are_true_and_by_chance_where_others_are():
    lexicon, truth = ["ball", "the", "red"], [{"ball", "red"}, {"red"}, {"red"}]
    said = [torch.tensor([[0, 0, 1, 2]]), torch.tensor([[2, 2, 1, 0]]), torch.tensor([[1, 1, 1, 1]])]
    first, rest = torch.tensor([[True, True, False, False]]), torch.tensor([[False, False, True, False]] * 2)
    hits = decoding._hits([first, first, first & False], [rest] * 3, said, lexicon, truth)
    np.testing.assert_array_equal(hits.value, [100, 100, np.nan])
    np.testing.assert_array_equal(hits.random, [0, 0, 0])
    np.testing.assert_array_equal(hits.chance, [0, 100, np.nan])
    assert decoding._hits([first] * 3, [rest] * 3, said, lexicon, []).value.isna().all()


def test_words_are_counted_by_their_spelling():
    counts = {("alone", "sinks"): (np.array([[2, 0, 1], [0, 1, 0]]), np.array([[[0, 0, 4], [0, 0, 0]]]))}
    table = decoding._histogram(counts, ["ball", "ball", "the"])
    assert table.to_dict("list") == {
        "reading": ["alone"] * 3, "group": ["sinks", "sinks", "random for sinks"], "word": ["ball", "the", "the"],
        "class": ["kind of thing", "other words", "other words"], "share": [75, 25, 100]}


def test_where_no_token_stands_alone_there_are_estimates_without_value(groups):
    stacked = SimpleNamespace(spec=SimpleNamespace(deepstack=True))
    spoken = decoding.spoken(stacked, [None] * 6, [], groups, None)
    assert spoken.hits.value.isna().all() and set(spoken.hits.group) == set(groups.names)
    assert (spoken.bits.n == 0).all() and isinstance(spoken.words, pd.DataFrame) and spoken.words.empty
