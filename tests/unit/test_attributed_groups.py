"""Groups of visual tokens beside their controls: on toy layouts, against arithmetic by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sinkstudy import sinks
from sinkstudy.analyses import attribution
from sinkstudy.book import chapter
from sinkstudy.model.layout import ImageLayout


def layout(patches: int = 16, newline: bool = False) -> ImageLayout:
    """A square picture whose patches are a token each; with a newline, a last token without a patch."""
    side, every = int(patches**0.5), torch.arange(patches)
    visual = torch.arange(patches + newline) + 5  # behind five tokens of text
    return ImageLayout(0, (side, side), 1, visual, every, every, every, visual[:patches, None])


@pytest.fixture
def scene() -> dict:
    """Two pictures of 16 patches: sinks on and off things in the first, none in the second."""
    sink, things = torch.zeros(2, 16, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.bool)
    sink[0, [0, 1, 9]] = True
    things[:, :6] = True
    norms = torch.arange(32.0).reshape(2, 16) % 16 + 1 + 100 * sink
    return {"norms": norms, "patches": {"sinks": sink, "things": things}, "things": things}


def grouped(scene, **how) -> attribution.MatchedGroups:
    return attribution.matched_groups([layout(newline=True)] * 2, **(scene | how), draws=3, seed=1)


def test_controls_are_as_many_other_tokens_of_the_picture(scene):
    of = grouped(scene)
    for (group, control), drawn in of.controls.items():
        mask = of.members[group]
        assert drawn.shape == (1 if control == "next in norm" else 3, 2, 17)
        assert not (drawn & mask).any() and not drawn[..., 16].any()  # neither the group's own nor a newline
        assert (drawn.sum(-1) == mask.sum(-1)).all()
    random, like = of.controls["sinks", "random"], of.controls["sinks", "like place"]
    assert (like[:, 0, :6].sum(-1) == 2).all() and (random != random[0]).any()
    assert of.controls["sinks", "next in norm"][0, 0].nonzero().flatten().tolist() == [13, 14, 15]
    everywhere = torch.ones(2, 17, dtype=torch.bool)
    everywhere[:, 16] = False
    assert torch.equal(random[0], sinks.random_like(of.members["sinks"], 1, among=everywhere))


def test_without_the_facts_no_token_is_of_like_place(scene):
    of = grouped(scene, things=None)
    assert not of.controls["sinks", "like place"].any() and not of.on_things.any()
    assert of.controls["sinks", "random"].any()


def test_a_token_is_in_the_first_group_that_it_fits(scene):
    first = grouped(scene).split(["sinks", "things"])
    assert first[0].tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 0, 2, 2, 2, 2, 2, 2, 2]
    assert first[1].tolist() == [1] * 6 + [2] * 11


@pytest.fixture
def said() -> pd.DataFrame:
    """A global and a local question about each of two pictures."""
    return pd.DataFrame({"model": "m", "question": range(4), "image": [0, 0, 1, 1], "type": ["global", "local"] * 2})


def test_ratios_are_of_means_over_questions_that_have_both(scene, said):
    of = grouped(scene)
    values = torch.full((4, 17), 2.0)
    values[0, of.members["sinks"][0]], values[1, of.members["sinks"][0]] = 10.0, 6.0
    seen = attribution.against_controls({"m": values}, {"m": of}, said)
    own = seen[(seen.group == "sinks") & (seen.control == "random")]
    assert own.inside.tolist()[:2] == [10.0, 6.0] and own.outside.tolist()[:2] == [2.0, 2.0]
    assert own.inside[2:].isna().all()  # the second picture has no sinks
    ratio = chapter.ratios(seen, ["model", "group", "control"]).set_index(["group", "control"])
    assert ratio.loc[("sinks", "random"), "value"] == 4 and ratio.loc[("sinks", "random"), "n"] == 1
    assert ratio.loc[("things", "random"), "n"] == 2
    by_type = chapter.ratios(own, ["type"]).set_index("type").value
    assert by_type["global"] == 5 and by_type["local"] == 3
    between = attribution.ratios_between(own, ["group"])
    assert between.value[0] == pytest.approx(5 / 3) and between.n[0] == 1
    assert attribution.ratios_between(own[own.type == "local"], ["group"]).n[0] == 0


def test_ratios_keep_a_cell_that_has_nothing():
    seen = pd.DataFrame({"model": ["a", "b"], "image": 0, "inside": [2.0, np.nan], "outside": 1.0})
    found = chapter.ratios(seen, ["model"])
    assert found.n.tolist() == [1, 0] and found.value[0] == 2 and np.isnan(found.value[1])


def test_shares_of_a_group_that_no_picture_has_are_missing(scene, said):
    scene["patches"]["none"] = torch.zeros(2, 16, dtype=torch.bool)
    found = attribution.shares({"m": torch.ones(4, 17)}, {"m": grouped(scene)}, said).groupby("group").value
    assert found.first()["sinks"] == pytest.approx(100 * 3 / 17) and found.last()["sinks"] == 0
    assert np.isnan(found.mean()["none"])


def linear(tokens: torch.Tensor) -> attribution.AnswerLogProb:
    """The sum of the tokens' entries in the place of a model's log p."""

    class Toy(attribution.AnswerLogProb):
        def __call__(self, tokens, rows):
            return tokens.sum((1, 2))

    return Toy(None, tokens, [None] * len(tokens), {}, torch.empty(len(tokens)), SimpleNamespace(), [])


@pytest.fixture
def explained() -> attribution.Explained:
    tokens = torch.randn(4, 17, 3, generator=torch.Generator().manual_seed(0))
    return attribution.explain(linear(tokens), steps=4)


def test_what_a_linear_function_gains_is_distributed_without_rest(explained):
    tokens = explained.f.tokens
    torch.testing.assert_close(explained.by_token, (tokens - tokens.mean((0, 1))).sum(-1))
    torch.testing.assert_close(explained.gain, explained.by_token.sum(1))
    assert explained.converged.all() and explained.missed < 0.01
    assert explained.early(0.1) == pytest.approx(10, rel=1e-3)
    part = explained.take([2, 0])
    torch.testing.assert_close(part.gain, explained.gain[[2, 0]])
    torch.testing.assert_close(part.f.values(part.baseline), explained.f.values(explained.baseline)[[2, 0]])


def test_whole_groups_of_a_linear_function_are_worth_their_tokens(explained, scene, said):
    of = grouped(scene)
    found = attribution.whole_groups({"m": explained}, {"m": of}, said, ["sinks", "things"], samples=2)
    member = of.split(["sinks", "things"])[torch.tensor(said.image)]
    for k, part in enumerate(["sinks", "things", "rest"]):
        worth = (explained.by_token * (member == k)).sum(1)
        for method in ("ablation", "shapley"):
            own = found[(found.group == part) & (found.method == method)]
            np.testing.assert_allclose(own.value, worth, atol=1e-4)
            assert own.tokens.tolist() == (member == k).sum(1).tolist()


def test_the_order_of_the_attributions_beats_a_random_one(explained, said):
    scores = {"m": {"right": explained.by_token, "wrong": -explained.by_token}}
    at = [0, 0.2, 0.5, 1]
    curves = attribution.curves({"m": explained}, scores, said, at, seed=3)
    ends = curves[curves.share.isin([0, 1]) & ~curves.kept].groupby(["order", "share"]).value.mean().unstack()
    np.testing.assert_allclose(ends[0], explained.logp.mean(), rtol=1e-5)
    np.testing.assert_allclose(ends[1], (explained.logp - explained.gain).mean(), rtol=1e-4, atol=1e-5)
    better = attribution.advantage(curves).groupby(["order", "way"]).value.mean()
    assert (better["right"] > 0).all() and (better["wrong"] < 0).all()
    one = curves[(curves.question == 2) & (curves.order == "right") & curves.kept]
    expected = np.trapezoid(one.value - one.random, at)
    found = attribution.advantage(curves).query("question == 2 and order == 'right' and way == 'insertion'")
    assert found.value.item() == pytest.approx(expected, rel=1e-5)


def test_agreement_is_by_rank_within_a_picture(said):
    first = torch.tensor([[1.0, 2, 3, 4]] * 4)
    found = attribution.rank_correlations({"m": {"a": first, "b": first**3, "c": -first}}, said)
    means = found.groupby(["first", "second"]).value.mean()
    assert means.round(6).to_dict() == {("b", "a"): 1, ("c", "a"): -1, ("c", "b"): -1}


def test_nine_areas_are_thirds_of_the_picture():
    areas = attribution.ninths(6, 9)
    assert areas[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and areas[:, 0].tolist() == [0, 0, 3, 3, 6, 6]
    assert attribution.ninths_of_tokens(layout(9, newline=True)).tolist() == [*range(9), 0]


def test_tokens_go_back_to_their_patches():
    found = attribution.on_patches(layout(9, newline=True), torch.arange(10))
    assert found.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_pictures_of_both_kinds_can_be_looked_at_and_blurred():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for picture in (image, torch.tensor(pixels.transpose(2, 0, 1))):
        assert np.array_equal(np.asarray(attribution.as_image(picture)), pixels)
        soft = np.asarray(attribution.blurred(picture)).astype(float)
        assert soft.shape == pixels.shape and soft.std() < 0.1 * pixels.std()
