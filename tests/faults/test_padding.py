"""Padding of a wide picture: patches of the tower that LLaVA-NeXT and OneVision cut off, so that no token holds them.

They cannot be what a method acts on, nor its control, nor count as taken away.
"""

from functools import cache
from types import SimpleNamespace

import architectures
import noise
import numpy as np
import pytest
import torch

from sinkstudy import sinks
from sinkstudy.analyses import content, propagation
from sinkstudy.effects import ablation, groups, methods, moving, neurons
from sinkstudy.model.groups import of_patches
from sinkstudy.trained.connectors import DIYSink

pytestmark = pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
HOW = {"criterion": "percentile", "threshold": 70.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By kind: the model, a picture that is padded, its layout, and the norms of its patches by plain transformers."""

    @cache
    def model(kind: str) -> SimpleNamespace:
        lvlm = architectures.load(tmp_path_factory.mktemp(kind), kind)
        (picture,) = noise.pictures([(64, 20)], seed=3)
        inputs = lvlm.inputs([picture], ["what"])
        (layout,) = lvlm.layout(inputs)
        tiles = inputs["pixel_values"].flatten(0, 1)
        with torch.no_grad():
            states = lvlm.vision(tiles, output_hidden_states=True).hidden_states[lvlm.feature_layer + 1]
        norms = states.norm(dim=-1).flatten()[layout.vision]
        assert 0 < (~layout.read).sum() < len(norms)
        return SimpleNamespace(lvlm=lvlm, picture=picture, inputs=inputs, layout=layout, norms=norms)

    return model


def high(of) -> torch.Tensor:
    """What HOW says of the patches that are read, and of no other: bool [patches]."""
    bound = np.quantile(of.norms[of.layout.read].numpy(), HOW["threshold"] / 100)
    return (of.norms > bound) & of.layout.read


def test_what_methods_act_on(models, kind):
    of = models(kind)
    case = methods.Case(of.lvlm, {"": {"a": of.picture}}, **HOW)
    itself, at_random = (methods.ActedOn(case, "", which) for which in (False, True))
    torch.testing.assert_close(case.norms["", "a"], of.norms)
    for chosen, random in ((itself.tokens, at_random.tokens), (itself.highest(9), at_random.highest(9))):
        assert not (random["a"] & (chosen["a"] | ~of.layout.read)).any() and random["a"].sum() == chosen["a"].sum()
    assert torch.equal(itself.tokens["a"], high(of))
    assert of.norms[itself.highest(9)["a"]].sort().values.tolist() == pytest.approx(
        of.norms[of.layout.read].sort().values[-9:].tolist())  # fmt: skip
    assert itself.highest(None)["a"].sum() == of.layout.read.sum() // 4
    with pytest.raises(ValueError, match=f"has no more than {of.layout.read.sum()} patches"):
        itself.highest(int(of.layout.read.sum()))


def test_a_rule_judges_among_what_is_read(models, kind):
    """In every context that takes a rule, and in two connectors."""
    of = models(kind)
    rule, seen = sinks.rule(**HOW), []

    def seeing(norms: torch.Tensor) -> torch.Tensor:
        seen.append(norms)
        return rule(norms)

    with torch.no_grad(), moving.reordered(of.lvlm, of.inputs, seeing):
        of.lvlm.model(**of.inputs)
    torch.testing.assert_close(seen[0], of.norms[of.layout.read])
    assert torch.equal(DIYSink(of.lvlm, **HOW, decoder=False).chosen(of.norms, of.layout), high(of))


def test_groups_of_chapters(models, kind):
    of = models(kind)
    tokens = ablation.read_tokens(of.lvlm, {"a": of.picture}, "input", 1)
    found = groups.choose(tokens, of.lvlm.feature_layer, *HOW.values(), doses=[2, 5])
    for (group, which), masks in found.masks.items():
        assert not (masks["a"] & ~of.layout.read).any()
        assert found.tokens(group, which)["a"] == found.patches["a"].tokens(masks["a"]).sum()
    assert torch.equal(found.masks["sinks", "itself"]["a"], high(of))
    for which in ("random 1", "next in norm"):
        assert found.tokens("sinks", which)["a"] == high(of).sum()
    assert found.tokens("highest norm first", "all")["a"] == of.layout.read.sum()
    sampler = content.PatchSampler(sinks.rule(**HOW), SimpleNamespace(calm=None, things=None), 2, 3, 0)
    assert torch.equal(sampler.masks(0, of.layout, of.norms)["sinks"], high(of))
    among = propagation.token_groups(of.norms[None], [of.layout], None, **HOW)
    assert torch.equal(among.masks["sinks"][0], of.layout.lift(high(of), "any"))
    middle = of.norms[of.layout.read].quantile(0.5)
    torch.testing.assert_close(among.norms[0].nan_to_num(0.0).max(), of.norms[of.layout.read].max() / middle)


def test_the_mean_token_is_of_what_is_read(models, kind):
    of = models(kind)
    tokens = ablation.read_tokens(of.lvlm, {"a": of.picture}, "input", 1)
    (mean,) = tokens.mean().values()
    rows = next(iter(tokens.of["a"].values())).double()
    own = of.layout.at("input")[of.layout.read]
    torch.testing.assert_close(mean, rows[own - of.layout.at("input").min()].mean(0))


def test_pictures_without_padding_are_judged_as_before(models, kind):
    of = models(kind)
    whole, rule = torch.ones_like(of.layout.read), sinks.rule(**HOW)
    several = of_patches(torch.stack([of.norms, of.norms]), rule, read=torch.stack([whole, of.layout.read]))
    assert torch.equal(several["sinks"], torch.stack([rule(of.norms), high(of)]))
    assert neurons.norms(of.lvlm, {"a": of.picture}).keys() == {"a"}
