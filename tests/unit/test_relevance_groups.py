"""What the maps of groups of patches are like, against loops over patches; heads that divide the work, planted."""

import numpy as np
import pytest
import torch

from sinkstudy import sinks, stats
from sinkstudy.analyses import relevance
from sinkstudy.analyses.relevance import PatchGroups, Relevance
from sinkstudy.book import chapter
from sinkstudy.world import drawing

IMAGES, LAYERS, HEADS, PATCHES = 6, 3, 2, 20


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def some_maps(share_on: torch.Tensor | None = None) -> Relevance:
    names = ("spread", "within", "effective_patches")
    columns, rows = ({name: noise(IMAGES, LAYERS, HEADS, PATCHES, seed=10 * of + i) for i, name in enumerate(names)}
                     for of in (1, 2))
    if share_on is not None:
        columns["share_on"] = share_on
    uniform = {name: noise(IMAGES, LAYERS, 1, PATCHES, seed=30 + i) for i, name in enumerate(names)}
    return Relevance(columns, rows, uniform, noise(IMAGES, PATCHES), torch.ones(IMAGES, PATCHES, dtype=torch.bool))


def some_groups(draws: int = 3) -> PatchGroups:
    """Two patches of high norm in all pictures but the last; two things in every one."""
    sink, things = torch.zeros(2, IMAGES, PATCHES, dtype=torch.bool)
    sink[:-1, :2] = True
    things[:, 5:7] = True
    chosen = {"sinks": sink, "things": things}
    random = {name: [sinks.random_like(mask, draw, among=~sink) for draw in range(draws)]
              for name, mask in chosen.items()}
    near = sinks.next_in_norm(noise(IMAGES, PATCHES), sink)
    return PatchGroups(chosen | {"others": ~sink, "next in norm": near}, random)


def by_hand(values: torch.Tensor, mask: torch.Tensor, image: int) -> float:
    """Mean over patches, heads and the layers behind the first."""
    return float(np.mean([values[image, layer, head, patch] for layer in range(1, LAYERS)
                          for head in range(values.shape[2]) for patch in mask[image].nonzero()[:, 0]]))


def test_groups_of_the_lab():
    scenes = drawing.render("test", 0, 4)
    norms = noise(4, 144)
    norms[:, 7] = 5
    groups = relevance.patch_groups(norms, sinks.rule("above_median", 3.0), scenes, draws=2, seed=3)
    assert list(groups.masks) == ["sinks", "top 2 %", "calm", "things", "others", "next in norm"]
    assert list(groups.random) == ["sinks", "top 2 %", "calm", "things"]
    assert groups.masks["sinks"].nonzero()[:, 1].tolist() == [7] * 4
    assert (groups.masks["others"] != groups.masks["sinks"]).all()
    assert (groups.masks["things"] == (scenes.thing_share.flatten(1) > 0.5)).all()
    for group, drawn in groups.random.items():
        assert len(drawn) == 2
        for of in drawn:
            assert (of.sum(1) == groups.masks[group].sum(1)).all()
            assert not (of & (groups.masks[group] | groups.masks["sinks"])).any()


def test_groups_of_other_pictures():
    assert list(relevance.patch_groups(noise(4, 16), sinks.rule("percentile", 90.0)).random) == ["sinks", "top 2 %"]


def test_contents():
    groups, things = some_groups(), noise(IMAGES, PATCHES, seed=5)
    groups.masks["calm"], groups.random["calm"] = torch.zeros(IMAGES, PATCHES, dtype=torch.bool), []
    found = chapter.estimates(relevance.contents(groups, things), ["group", "measure"])
    assert chapter.one(found, group="sinks", measure="a picture").value == pytest.approx(2 * 5 / 6)
    covered = chapter.one(found, group="sinks", measure="on things, %")
    assert covered.value == pytest.approx(100 * things[:-1, :2].mean().item()) and covered.n == 5
    assert chapter.one(found, group="calm", measure="on things, %").n == 0
    assert set(relevance.contents(groups).measure) == {"a picture"}


def test_shapes():
    maps, groups = some_maps(), some_groups()
    found = relevance.shapes(maps, groups).set_index(["measure", "group", "against", "image_id"]).value
    sink, things, near = (groups.masks[name] for name in ("sinks", "things", "next in norm"))
    for measure, values, even in (("spread", maps.columns["spread"], maps.uniform["spread"]),
                                  ("within", 100 * maps.columns["within"], 100 * maps.uniform["within"]),
                                  ("row_spread", maps.rows["spread"], maps.uniform["spread"])):
        own, own_even = by_hand(values, sink, 2), by_hand(even, sink, 2)
        chance, chance_even = (np.mean([by_hand(of, mask, 2) for mask in groups.random["sinks"]])
                               for of in (values, even))
        expected = {"": own, "_minus_uniform": own - own_even, "_minus_random": own - chance,
                    "_minus_random_over_uniform": own - own_even - chance + chance_even,
                    "_minus_things": own - by_hand(values, things, 2),
                    "_minus_next_in_norm": own - by_hand(values, near, 2)}
        for against, value in expected.items():
            assert found[measure, "sinks", against, 2] == pytest.approx(value, abs=1e-5), (measure, against)
        assert np.isnan(found[measure, "sinks", "_minus_random", IMAGES - 1])  # a picture without sinks
    assert set(found.index.to_frame().query("group == 'others'").against) == {"", "_minus_uniform"}


def test_spread_by_layer():
    maps, groups = some_maps(), some_groups()
    found = relevance.spread_by_layer(maps, groups).set_index(["side", "group", "layer", "image_id"]).value
    others = groups.masks["others"]
    assert found["columns", "sinks", 3, 1] == pytest.approx(maps.columns["spread"][1, 2, :, :2].mean().item())
    assert found["rows", "others", 1, 4] == pytest.approx(maps.rows["spread"][4, 0][:, others[4]].mean().item())
    assert found["rows", "uniform map", 2, 0] == pytest.approx(maps.uniform["spread"][0, 1, 0, others[0]].mean().item())


def divided(gap: float) -> torch.Tensor:
    """A share of 0.5 on things, with a little noise; on sinks the two heads are `gap` above and below it."""
    share = 0.5 + 0.01 * (noise(IMAGES, LAYERS, HEADS, PATCHES) - 0.5)
    share[:, :, 0, :2] += gap
    share[:, :, 1, :2] -= gap
    return share


@pytest.mark.parametrize("gap", [0.0, 0.2])
def test_heads_that_divide_sinks(gap):
    """The deviation of two heads is half of their difference; random patches and things have none but noise."""
    groups = some_groups()
    found = relevance.head_specialisation(some_maps(divided(gap)), groups)
    own, random = (chapter.one(found, group="sinks", against=against) for against in ("", "random"))
    assert own.value == pytest.approx(100 * gap, abs=0.5) and own.n == IMAGES - 1
    assert random.value == pytest.approx(0, abs=0.5)
    for control in ("_minus_random", "_minus_things"):
        less = chapter.one(found, group="sinks", against=control)
        assert less.low <= less.value <= less.high and less.value == pytest.approx(100 * gap, abs=0.5)
    assert chapter.one(found, group="things", against="_minus_things") == stats.Interval(0, 0, 0, IMAGES)


def test_heads_without_sinks_or_things():
    groups = some_groups()
    groups.masks["sinks"][:] = False
    groups.random["sinks"] = [torch.zeros(IMAGES, PATCHES, dtype=torch.bool)] * 3
    for maps in (some_maps(divided(0.1)), some_maps()):
        found = relevance.head_specialisation(maps, groups)
        assert (found[found.group == "sinks"].n == 0).all() and len(found) == 8
    assert (found.n == 0).all()
    assert relevance.things_by_head(some_maps(), groups, ["others"]).empty


def test_things_by_head():
    share = divided(0.2)
    found = relevance.things_by_head(some_maps(share), some_groups(), ["sinks", "things"])
    assert len(found) == 2 * LAYERS * HEADS
    for head in (1, 2):
        of = chapter.one(found, group="sinks", layer=2, head=head)
        assert of.value == pytest.approx(100 * share[:-1, 1, head - 1, :2].mean().item(), rel=1e-5)
        assert of.n == IMAGES - 1 and of.low <= of.value <= of.high


def test_patches_to_look_at():
    scenes = drawing.render("test", 0, 12)
    image, patches = relevance.example_patches(noise(12, 144), scenes)
    assert list(patches) == ["calm", "things", "others"]
    calm, things = scenes.calm[image].flatten(), scenes.thing_share[image].flatten()
    assert calm[patches["calm"]] and things[patches["things"]] > 0.9
    assert not calm[patches["others"]] and not things[patches["others"]]
    for patch in patches.values():
        assert 2 <= patch // 12 <= 9 and 2 <= patch % 12 <= 9
    norms = torch.tensor([[3.0, 9.0, 1.0, 5.0, 4.0]])
    assert relevance.example_patches(norms) == (0, {"highest norm": 1, "median norm": 4})


def test_models_in_one_table():
    one = relevance.stacked({"a": relevance.contents(some_groups()), "b": relevance.contents(some_groups())})
    assert list(one) == ["model", "group", "measure", "image_id", "value"] and one.model.value_counts().to_dict() == {
        "a": 2 * IMAGES, "b": 2 * IMAGES}
    assert one.index.is_unique
