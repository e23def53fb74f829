"""Rules compared: masks by name, verdicts, probes from one patch, the layer in which norms rise."""

import numpy as np
import pandas as pd
import pytest
import torch

from sinkstudy import sinks
from sinkstudy.book import criteria
from sinkstudy.effects import neurons
from sinkstudy.model.layout import ImageLayout
from sinkstudy.paths import DATA

N = 12


def patches(norms: torch.Tensor, merged: int = 1) -> criteria.PatchReadings:
    """Patches of which `merged` in a row make one visual token; tokens stand from position 3 on."""
    n = norms.shape[-1]
    place = torch.arange(n)
    layout = ImageLayout(row=0, grid=(1, n), tiles=1, visual=3 + torch.arange(n // merged), vision=place,
                         connector=place, output=place // merged, positions=3 + place[:, None] // merged)
    phi = torch.linspace(0, 0.6, n // merged).expand(3, len(norms), -1)
    return criteria.PatchReadings([layout] * len(norms), norms[:, None], torch.ones_like(norms), phi)


def test_rules_are_those_of_sinks_and_the_run_s_own_is_among_them():
    norms = torch.rand(4, N, generator=torch.Generator().manual_seed(0)) + torch.tensor([9.0] + [0.5] * (N - 1))
    of = patches(norms)
    found = criteria.rule_masks(of, 0.5, "above_median", 4)
    assert len(found) == 18 and list(found)[-1] == "φ"
    assert torch.equal(found["above_median 4"], sinks.above_median(norms, 4))
    assert torch.equal(found["absolute 3"], norms >= 1.5)
    assert torch.equal(found["φ"], of.phi_of_patches >= criteria.PHI)
    assert not found["attended 3"].any()
    assert len(criteria.rule_masks(of, 0.5, "above_median", 3)) == 17
    assert len({criteria.rule_label(rule) for rule in found}) == 18


def test_values_of_tokens_reach_their_patches_and_masks_whole_tokens():
    of = patches(torch.ones(2, N), merged=4)
    assert of.phi_of_patches[0].tolist() == pytest.approx([0] * 4 + [0.3] * 4 + [0.6] * 4)
    mask = (torch.arange(N) == 5).expand(2, -1)
    assert of.whole(mask)[0].nonzero()[:, 0].tolist() == [4, 5, 6, 7]


def test_ratio_and_difference_are_over_whole_tokens_and_patches():
    of = patches(torch.ones(5, N), merged=4)
    mask = (torch.arange(N) == 5).expand(5, -1)
    numbers = {"attention": torch.where(of.whole(mask), 6.0, 2.0), "spread": torch.where(mask, 6.0, 2.0)}
    found = criteria.against_others(of, numbers, {"own": mask, "nothing": mask & False}).set_index("headline")
    assert found.rule.tolist() == ["own", "own"]
    assert found.value.to_dict() == {"attention": 3.0, "spread": 4.0}


def test_a_probe_reads_what_only_the_group_holds():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(N) == 2).expand(80, -1)
    label = torch.arange(80) % 2
    tokens = torch.randn(80, N, 6, generator=generator)
    tokens[:, 2, 0] = 10.0 * label
    side = criteria.ProbeSide(patches(torch.ones(80, N)), tokens, {"own": mask, "nothing": mask & False},
                              {"scene": label})
    found = criteria.probed(side, side, draws=2)
    assert found[found.rule == "own"].value.mean() > 25  # 100 % against about chance
    assert found[found.rule == "nothing"].value.isna().all()
    few = criteria.ProbeSide(side.patches, tokens[:40], {rule: of[:40] for rule, of in side.masks.items()},
                             {"scene": label[:40]})
    assert criteria.probed(few, side, draws=1).value.isna().all()  # too few to fit on


def test_verdicts_and_how_many_rules_agree():
    rows = pd.DataFrame({"model": "m", "rule": list("abcd"), "headline": "h", "value": [2.0, 3, 0.5, np.nan],
                         "low": [1.5, 1.1, 0.2, np.nan], "high": [2.5, 5, 0.8, np.nan], "n": [9, 9, 9, 0]})
    judged = criteria.with_verdicts(rows, {"h": 1})
    assert judged.verdict.tolist() == ["above", "above", "below", "none"]
    assert criteria.agreeing(judged, "a")[["value", "n"]].values.tolist() == [[50, 2]]
    silent = criteria.agreeing(judged, "d")
    assert silent.value.isna().all() and silent.n.tolist() == [0]


def test_sizes_are_ratios_of_norms_and_means_of_changes():
    mask = torch.tensor([[True, False], [True, False], [False, False]])
    norms = {"none": torch.tensor([[4.0, 9], [8, 9], [1, 1]]), "half": torch.tensor([[1.0, 9], [5, 9], [1, 1]])}
    rows = criteria.group_norms(norms, mask)
    said = pd.DataFrame({"intervention": "half", "image_id": ["0", "1"], "measure": "accuracy", "value": [0.0, -100]})
    found = criteria.effect_sizes(pd.concat([rows, said]), ["intervention"]).set_index("measure")
    assert found.value.to_dict() == {"norm_ratio": 0.5, "accuracy": -50}
    assert found.n.tolist() == [2, 2]


def test_flagged_shares():
    of = patches(torch.ones(2, N))
    found = criteria.flagged_of(of, {"first half": (torch.arange(N) < N // 2).expand(2, -1)}, [[], [1]])
    assert found.groupby("group").value.mean().round(4).to_dict() == {
        "all": 50, "all, by random dimensions": 50, "first half": 0}
    assert criteria.flagged_of(of, {}, [[1], []]).value.isna().all()  # none lit from the second layer on


def test_a_group_that_stands_out_in_one_dimension():
    tokens = torch.ones(2, N, 8)
    mask = (torch.arange(N) == 0).expand(2, -1)
    tokens[:, 0, 3] = 100
    lit, shape = criteria.stand_out(tokens, mask)
    assert lit == [3] and shape.lit == 1 and shape.cosine == pytest.approx(1)
    assert criteria.stand_out(tokens, ~mask)[0] == []


def test_the_layer_of_rise_is_half_the_way_of_the_norm_over_the_median_of_each_picture():
    """A picture of large norms, whose sinks rise late, does not outvote the others, as in a ratio of means it would."""
    of_sinks = torch.tensor([[1.0, 2, 5, 5], [1, 2, 5, 5], [1, 1, 1, 5]])  # times the median: [pictures, layers]
    norms = torch.ones(3, 4, 9)
    norms[:, :, 0] = of_sinks
    norms = norms * torch.tensor([1.0, 1, 100])[:, None, None]
    masks = (torch.arange(9) == 0).expand(3, -1)
    assert neurons.layer_of_rise(norms, masks) == 2  # 11 / 3 there, and half the way is 3
    over_means = norms[:, :, 0].mean(0) / norms.quantile(0.5, dim=-1).mean(0)
    assert int((over_means >= (1 + over_means.max()) / 2).nonzero()[0]) == 3
    assert neurons.layer_of_rise(norms[:, :2], masks) == 1
    with pytest.raises(ValueError, match="in no layer of the tower is it above"):
        neurons.layer_of_rise(norms, ~masks)


PUBLISHED = pd.DataFrame(
    [("LLM-emerged sinks", 7, "Qwen2.5-VL-7B", "one"), ("LLM-emerged sinks", 3, "Qwen2.5-VL-7B", "one"),
     ("propagated ViT sinks", 5, "Qwen2.5-VL-7B", "one"), ("LLM-emerged sinks", 4, "Qwen3-VL-8B", "one")],
    columns=["row", "value", "model", "source"])  # fmt: skip


@pytest.mark.parametrize("name", ["Qwen--Qwen2.5-VL-7B-Instruct", "my_qwen2_5_vl_7b"])
def test_dimensions_that_were_published_for_a_model_are_counted_over_its_layers(name: str):
    found = criteria.against_published(name, [[1, 7], [7, 9], [9, 7], [9], []], PUBLISHED)
    assert found.model.unique().tolist() == [name] and (found.of == 4).all()  # the first layer does not count
    counted = found.set_index("dimension")[["published", "layers"]]
    assert counted.T.to_dict("list") == {7: [True, 2], 3: [True, 0], 9: [False, 3]}
    said = criteria.published_in_words(found)
    assert "7 (2 of 4), 3 (0 of 4)" in said and "beside them: 9 (3 of 4)" in said


def test_of_other_models_nothing_was_published():
    found = [criteria.against_published(name, [[1], [7]], PUBLISHED) for name in ("lab-llava", "Qwen3-VL-80B")]
    assert all(of.empty for of in found)
    assert criteria.published_in_words(pd.concat(found)) == "No dimensions were published for any of these models."
    there = pd.read_csv(DATA / "paper" / "dimensions.csv")
    beside = criteria.against_published("OpenGVLab/InternVL3_5-8B-HF", [[], [233]], there)
    assert dict(zip(beside.dimension, beside.layers, strict=True)) == {2276: 0, 233: 1}
