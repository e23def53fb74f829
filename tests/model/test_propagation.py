"""Groups of visual tokens, what the decoder holds of them against an eager reference; chapter 03 on a tiny model."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sinkstudy import sinks
from sinkstudy.analyses import propagation
from sinkstudy.book import chapter
from sinkstudy.model.layout import ImageLayout
from tests.model import architectures, chapters, noise

close = dict(atol=1e-5, rtol=1e-4)


def layout(positions: list[int], visual: list[int]) -> ImageLayout:
    """One tile of 2 x n patches, each with its place among the visual tokens."""
    patches = torch.arange(len(positions))
    return ImageLayout(0, (2, len(positions) // 2), 1, torch.tensor(visual), patches, patches, patches,
                       torch.tensor(positions)[:, None])


def test_groups_leave_tokens_without_a_patch_out():
    """Six patches, and a newline after each row of three: no control takes it, even where there are too few others."""
    norms = torch.tensor([[1.0, 9.0, 1.0, 9.0, 9.0, 9.0], [1.0, 1.0, 9.0, 2.0, 1.0, 1.0]])
    layouts = [layout([5, 6, 7, 9, 10, 11], list(range(5, 13)))] * 2
    groups = propagation.token_groups(norms, layouts, None, criterion="absolute", threshold=5.0)
    newline = torch.tensor([False, False, False, True] * 2)
    assert torch.equal(~groups.patches, newline.expand(2, -1)) and groups.things is None
    assert groups.masks["sinks"].tolist() == [[False, True, False, False, True, True, True, False],
                                              [False, False, True] + [False] * 5]
    for control in propagation.SINK_CONTROLS:
        assert not (groups.masks[control] & (groups.masks["sinks"] | newline)).any()
        assert groups.masks[control].sum(1).tolist() == [2, 1]  # of four sinks there are two others only
    assert groups.masks["next in norm"][1].nonzero().item() == 4
    assert groups.marked == "sinks" and "calm patches" not in groups.masks

    found = propagation.sizes(groups).set_index(["group", "image"])
    assert found.tokens["sinks", 0] == 4 and found.norm["sinks", 0] == 1 and found.norm["sinks", 1] == 9
    values = torch.tensor([1.0, 5.0, 1.0, 100.0, 5.0, 5.0, 5.0, 100.0]).expand(2, 2, -1)  # newlines would show
    seen = propagation.contrast(values, groups, pd.DataFrame({"image": [0, 0]}))
    of = seen[(seen.group == "sinks")]
    assert of.layer.tolist() == [1, 2, 1, 2] and set(of.inside) == {5} and set(of.outside) == {1}
    assert chapter.ratios(seen, ["group"]).set_index("group").value["sinks"] == 5


def test_controls_are_set_against_patches_that_are_no_sinks():
    norms = torch.tensor([[9.0, 3.0, 2.0, 1.0]])
    whole = layout([0, 1, 2, 3], [0, 1, 2, 3])
    groups = propagation.token_groups(norms, [whole], None, criterion="absolute", threshold=5.0)
    seen = propagation.contrast(torch.tensor([[[8.0, 4.0, 1.0, 1.0]]]), groups, pd.DataFrame({"image": [0]}))
    of = seen.set_index("group")
    assert of.outside["sinks"] == 2 and of.inside["next in norm"] == 4 and of.outside["next in norm"] == 1


def test_ratios_without_a_value():
    seen = pd.DataFrame({"group": ["none", "none", "some", "some"], "image": [0, 1, 0, 1],
                         "inside": [np.nan, np.nan, 2.0, np.nan], "outside": [1.0, 1.0, 1.0, 5.0]})
    none, some = chapter.ratios(seen, ["group"]).itertuples(index=False)
    assert none.n == 0 and np.isnan(none.value)
    assert some.value == 2 and some.n == 1


@pytest.fixture
def masks(images) -> dict[str, torch.Tensor]:
    some = torch.zeros(len(images), 16, dtype=torch.bool)
    some[:, 3], some[1, 7] = True, True
    return {"sinks": some, "others": ~some}


def test_look_inside_is_what_the_eager_model_shows(tiny, eager, images, questions, masks):
    inside = propagation.look_inside(tiny, images, questions, masks, batch_size=2)
    profiles, rows = {"sinks": [], "others": []}, []
    for picture, question, mask in zip(images, questions, masks["sinks"], strict=True):
        inputs = tiny.inputs([picture], [question])
        with torch.no_grad():
            seen = eager(**inputs, output_hidden_states=True, output_attentions=True)
        visual, n = tiny.visual_positions(inputs.input_ids)[0], inputs.input_ids.shape[1]
        attention = torch.cat(seen.attentions)  # [layers, heads, tokens, tokens]
        received = attention.mean(1).sum(1) / torch.arange(n, 0, -1) / sinks.causal_uniform(n)
        light = sinks.rms_normalised(torch.cat(seen.hidden_states[1:3])).abs()  # the last is behind the final norm
        profiles["sinks"].append(light[:, visual[mask]])
        profiles["others"].append(light[:, visual[~mask]])
        rows.append((received[:, visual], attention[:, :, -1, 0], attention[:, :, -1, visual].sum(-1), light[:, 0]))
    received, to_first, to_visual, first = (torch.stack(of) for of in zip(*rows, strict=True))
    torch.testing.assert_close(inside.received, received, **close)
    torch.testing.assert_close(inside.to_first, to_first, **close)
    torch.testing.assert_close(inside.to_visual, to_visual, **close)
    torch.testing.assert_close(inside.profiles["first token"][:2], first.mean(0), **close)
    for group, of in profiles.items():
        torch.testing.assert_close(inside.profiles[group][:2], torch.cat(of, 1).mean(1), **close)


def test_phi_against_the_first_token():
    first = torch.full((2, 8), 1.0)
    first[:, 3] = 6.0  # the only lit dimension
    tokens = torch.ones(2, 4, 8)
    tokens[1, 2, 3], tokens[0, 0, 5] = 12.0, 60.0
    phi = propagation._relative_phi(tokens, first)
    assert phi[1, 2] == 2 and phi[0].tolist() == pytest.approx([1 / 6] * 4)
    assert not propagation._relative_phi(tokens, torch.ones(2, 8)).any()


def test_lit_dimensions_of_planted_profiles():
    flat = torch.ones(2, 10)
    sink, first = flat.clone(), flat.clone()
    sink[1, [2, 7]], first[1, 7] = 8.0, 9.0
    profiles = {"sinks": sink, "others": flat, "first token": first, "top 2 %": torch.full((2, 10), float("nan"))}
    found = propagation.lit_table(profiles).set_index(["group", "layer"])
    assert found.dimensions["sinks", 2] == "2 7" and found.largest_over_median["sinks", 2] == 8
    assert found.dimensions["sinks", 1] == "" and np.isnan(found.largest_over_median["top 2 %", 1])
    assert propagation.sharpest(profiles, "sinks") == 1
    lit = propagation.lit_by(profiles, "sinks", 1)
    assert (lit["layer"], lit["lit"], lit["also by first token"], lit["twice others"]) == (2, 2, 1, 2)


def test_fates_by_hand():
    tower = torch.tensor([[True, True, False, False], [False] * 4])
    decoder = torch.zeros(2, 2, 4, dtype=torch.bool)  # [images, layers, tokens]
    decoder[0, 1, [1, 2]] = True
    found = propagation.fates(tower, {"attention": decoder}).set_index(["layer", "image"])
    assert found.loc[(2, 0), ["propagated", "emerged", "stopped", "ordinary", "in_tower"]].tolist() == [1, 1, 1, 1, 2]
    assert found.jaccard[2, 0] == pytest.approx(1 / 3) and found.jaccard[1, 0] == 0 and np.isnan(found.jaccard[1, 1])

    attention = torch.tensor([[[1.0, 2.0, 3.0, 4.0]] * 2, [[10.0, 20.0, 30.0, 40.0]] * 2])  # two rows of image 0
    by_fate = propagation.attention_by_fate(attention, torch.tensor([0, 0]), tower, decoder)
    mean = by_fate.groupby("kind").value.mean()
    assert mean["propagated"] == 11 and mean["emerged"] == 16.5
    assert mean["stopped"] == pytest.approx((1.5 + 1 + 15 + 10) / 4)

    lies = propagation.lies_on(decoder, torch.tensor([[False, True, False, False]] * 2))
    assert lies.image.tolist() == [0, 0] and lies.value.tolist() == [1, 0]
    assert propagation.lies_on(decoder, None).empty


def test_chapter_on_pictures_of_a_folder(tmp_path: Path):
    """A tiny model, whose alignment stage nobody followed."""
    model = "tiny-qwen2_5_vl"
    architectures.write(tmp_path / model, "qwen2_5_vl")
    pictures = noise.write(tmp_path / "pictures", [(32, 64)] * 5)
    tables = chapters.execute("03-propagation", tmp_path, model=tmp_path / model, images_dir=str(pictures),
                              criterion="percentile", threshold=90.0, controls=[])
    metrics = {name.removeprefix(f"{model.lower()}."): row for name, row in chapters.metrics(tables).items()}
    assert not [name for name in metrics if "right" in name or "calm" in name or "things" in name]
    assert metrics["attention_ratio.random.output_tokens.generic"]["n"] <= 5  # half of the tokens may be sinks
    for name in ("attention_ratio.sinks.output_tokens.all", "output_attention.ordinary", "attention_on_visual"):
        assert metrics[name]["n"] == 5 and metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    tokens = sum(metrics[f"norm.{kind}"]["value"] for kind in ("propagated", "stopped"))
    assert tokens == pytest.approx(pd.read_csv(tables / "kinds.csv").eval(
        "propagated + stopped").mean(), abs=1e-4)

    assert not (tables / "alignment.csv").exists() and "alignment" not in str(metrics)
    assert "are kept for lab-llava, lab-llava-gist only" in (tmp_path / "out.ipynb").read_text()
