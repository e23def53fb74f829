"""Groups of visual tokens have the controls that they say, and what is made of the losses is what it says."""

import pandas as pd
import pytest
import torch

from sinkstudy import stats
from sinkstudy.effects import groups
from sinkstudy.effects.ablation import Tokens
from sinkstudy.model.layout import ImageLayout
from sinkstudy.world import drawing

LAYER = 2
HIGH = 9.0


@pytest.fixture(scope="module")
def scenes() -> drawing.Scenes:
    return drawing.render("test", 0, 4)


def tokens(scenes: drawing.Scenes, per_token: int, on_things: bool = True) -> Tokens:
    """Patches of norm 1, and three high ones in each picture; a visual token has so many patches beside each other."""
    of, layouts = {}, {}
    for i, share in enumerate(scenes.thing_share.flatten(1)):
        wanted = ((share > 0.5) == on_things).nonzero()[:3, 0]
        norms = 1 + 0.001 * torch.rand(len(share), generator=torch.Generator().manual_seed(i))
        norms[wanted] += HIGH
        of[f"p{i}"] = {LAYER: norms[:, None]}
        output, nothing = 100 * i + torch.arange(len(share)) // per_token, torch.empty(0)
        layouts[f"p{i}"] = ImageLayout(i, (drawing.GRID,) * 2, 1, nothing, nothing, nothing, output, output[:, None])
    return Tokens("input", of, layouts)


@pytest.fixture(scope="module", params=[1, 4])
def found(request, scenes) -> groups.Groups:
    return groups.choose(tokens(scenes, request.param), LAYER, "above_median", 3.0, scenes, doses=[1, 5, 500])


def test_where_several_patches_make_a_token():
    patches = groups.Patches(torch.tensor([1.0, 5.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    assert patches.highest.tolist() == [5.0, 3.0]
    assert patches.tokens(torch.tensor([False, True, False, False])).tolist() == [True, False]


def test_a_group_is_of_whole_tokens(found):
    for masks in found.masks.values():
        for image, mask in masks.items():
            patches = found.patches[image]
            assert torch.equal(mask, patches.patches(patches.tokens(mask)))


def test_what_is_chosen(found, scenes):
    for i, (image, patches) in enumerate(found.patches.items()):
        high = patches.norms > HIGH
        assert (found.masks["sinks", "itself"][image] & high).sum() == high.sum()
        assert (found.masks["things", "itself"][image] | ~(scenes.thing_share[i].flatten() > 0.5)).all()
        assert (found.masks["calm", "itself"][image] | ~scenes.calm[i].flatten()).all()
    assert found.there(4) == ["sinks", "top 2 %", "calm", "things"] and found.there(5) == []
    assert found.main(4) == ["sinks", "calm"] and found.main(5) == ["top 2 %"]


def test_controls_are_as_many_others(found):
    for group, which in found.masks:
        if which not in ("random 1", "random 2", "next in norm"):
            continue
        assert which != "next in norm" or group == "sinks"
        assert (found.tokens(group, which) == found.tokens(group)).all()
        for image, mask in found.masks[group, which].items():
            assert not (mask & found.masks[group, "itself"][image]).any()
    first, second = (found.masks["calm", which] for which in ("random 1", "random 2"))
    assert any((first[image] != second[image]).any() for image in found.patches)


def test_next_in_norm(found):
    for image, patches in found.patches.items():
        sink, next_ = (patches.tokens(found.masks["sinks", which][image]) for which in ("itself", "next in norm"))
        assert patches.highest[next_].min() >= patches.highest[~sink & ~next_].max()


def test_alike_are_as_many_and_on_things(found):
    own, others = (found.masks["alike", which] for which in groups.ALIKE)
    assert (found.tokens("alike", groups.ALIKE[0]) == found.tokens("alike", groups.ALIKE[1])).all()
    for image in found.patches:
        things, sinks = found.masks["things", "itself"][image], found.masks["sinks", "itself"][image]
        assert not (own[image] & ~(things & sinks)).any() and not (others[image] & ~(things & ~sinks)).any()
    assert groups.pairs(found, 1) and not groups.pairs(found, 5)


def test_nothing_is_alike_where_no_sink_lies_on_a_thing(scenes):
    found = groups.choose(tokens(scenes, 1, on_things=False), LAYER, "above_median", 3.0, scenes)
    assert (found.tokens("alike", groups.ALIKE[0]) == 0).all() and groups.pairs(found, 1) == []


def test_doses(found):
    """As many tokens as it says, nested, those of the highest norm first; what a picture does not have is left out."""
    everything = len(next(iter(found.patches.values())).highest)
    assert [dose for _, _, dose in groups.doses(found)] == ["1", "5", "all"] * 2
    for order in groups.ORDERS:
        assert (found.tokens(order, "5") == 5).all() and (found.tokens(order, "all") == everything).all()
        for image in found.patches:
            assert not (found.masks[order, "1"][image] & ~found.masks[order, "5"][image]).any()
    for image, patches in found.patches.items():
        first = patches.tokens(found.masks[groups.ORDERS[0], "5"][image])
        assert patches.highest[first].min() >= patches.highest[~first].max()


def test_draws_follow_the_seed(scenes):
    def masks(seed: int) -> list:
        of = groups.choose(tokens(scenes, 1), LAYER, "above_median", 3.0, scenes, seed=seed)
        return [of.masks["sinks", "random 1"][image].tolist() for image in of.patches]

    assert masks(0) == masks(0) != masks(1)


def test_patches_that_are_not_the_labs(scenes):
    """Nothing is known about calm patches and things."""
    found = groups.choose(tokens(scenes, 1), LAYER, "percentile", 90.0)
    assert {group for group, _ in found.masks} == {"sinks", "top 2 %", *groups.ORDERS}
    assert found.tokens("calm").empty and found.sizes().on_things.isna().all()


def test_sizes(found):
    of = found.sizes()
    assert list(of.picture.unique()) == [0, 1, 2, 3] and set(of.group) == set(groups.NAMES)
    assert (of[of.group == "things"].on_things == of[of.group == "things"].tokens).all()
    assert (of[of.group == "sinks"].on_things == of[of.group == "sinks"].tokens).all()


def test_what_is_taken_away():
    one = {f"p{i}": torch.arange(4) < size for i, size in enumerate((1, 1, 1))}
    most = {f"p{i}": torch.arange(4) < size for i, size in enumerate((4, 1, 1))}
    which = ("itself", "random 1", "random 2", "next in norm")
    found = groups.Groups({}, {("sinks", w): one for w in which} | {("calm", w): most for w in which[:2]})
    made = groups.cuts(found, ["sinks"], ["mean", "only", "shuffle"])
    assert [w for way, _, w in made if way == "mean"] == list(which)
    assert [w for way, _, w in made if way == "only"] == ["itself", "random 1"]
    assert [w for way, _, w in made if way == "shuffle"] == ["itself", "random 1"]
    assert groups.cuts(found, ["calm"], ["noise", "shuffle"]) == [("noise", "calm", w) for w in which[:2]]


def test_questions_of_the_lab(scenes):
    """Two draws; what is drawn twice counts once."""
    asked = groups.draw_questions(None, dict.fromkeys("0123"), scenes, "", seed=3)
    assert asked.id.is_unique and not asked.duplicated(["image_id", "question"]).any()
    assert set(asked.type) == {"global", "local", "mixed"} and asked.answer.notna().all()
    assert len(asked[asked.draw == 0]) == 12 and 0 < len(asked[asked.draw == 1]) <= 12


@pytest.fixture
def rows() -> pd.DataFrame:
    """Losses of two families in two models, two questions a picture."""
    return pd.DataFrame([{"model": model, "group": "calm", "image_id": f"p{i}", "id": f"{i}-{family}", "family": family,
                          "value": (-2.0 if family == worst else 0.1) + 0.01 * i}
                         for model, worst in (("a", "light"), ("b", "size")) for i in range(5)
                         for family in ("light", "size")])


def test_worst_family(rows):
    assert groups.worst_family(rows, 5)[rows.model == "a"].unique().tolist() == ["light"]
    assert groups.worst_family(rows, 5)[rows.model == "b"].unique().tolist() == ["size"]
    assert groups.worst_family(rows, 6).isna().all()
    few = rows.drop(rows[(rows.model == "a") & (rows.family == "light")].index[:2])  # three are left
    assert groups.worst_family(few, 4)[few.model == "a"].unique().tolist() == ["size"]


def test_a_row_a_measure_and_every_question_once_more():
    seen = pd.DataFrame({"id": ["1", "2"], "type": ["local", "global"], "right": [100.0, 0.0], "logp": [-1.0, -2.0]})
    long = groups.long_by_type(seen, {"right": "accuracy", "logp": "logp"})
    assert len(long) == 8 and list(long.columns) == ["id", "type", "measure", "value"]
    assert long[(long.type == "all") & (long.measure == "accuracy")].value.tolist() == [100.0, 0.0]
    assert long[(long.type == "global") & (long.measure == "logp")].value.tolist() == [-2.0]


def test_estimates_for_every_model_and_group():
    rows = pd.DataFrame([("a", "mean", "calm", 1.0, 0.0, 2.0, 9)],
                        columns=["model", "what", "group", "value", "low", "high", "n"])
    whole = groups.complete(rows, ["a", "b"])
    assert len(whole) == 2 * len(groups.NAMES) and (whole.what == "mean").all() and whole.n.tolist().count(0) == 7
    assert whole[whole.n > 0][["model", "group", "value"]].to_numpy().tolist() == [["a", "calm", 1.0]]


def test_mcnemar_takes_one_question_a_picture(rows):
    of = rows.assign(value=rows.value * 50)  # "light" first
    table = groups.mcnemar(of, ["model"], 5)
    assert table[["model", "pictures", "lost", "gained"]].to_numpy().tolist() == [["a", 5, 5, 0], ["b", 5, 0, 5]]
    assert table.p.tolist() == [pytest.approx(2 / 2**5)] * 2 and table.holm.tolist() == [pytest.approx(4 / 2**5)] * 2
    assert groups.mcnemar(of, ["model"], 6).empty


def test_sign_flips(rows):
    table = groups.sign_flips(rows, ["model", "group"])
    own = rows[rows.model == "a"]
    assert table.p[0] == stats.sign_flip_test(own.value, 0 * own.value, clusters=own.image_id)
    assert (table.p_holm >= table.p).all()
