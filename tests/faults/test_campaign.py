"""Numbers that look fine and are not: padding, windows, whole prompts that see themselves, seeds that are missing."""

from types import SimpleNamespace

import architectures
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sinkstudy import sinks
from sinkstudy.analyses import norms, propagation
from sinkstudy.answers.study import answers
from sinkstudy.book import criteria, explorer
from sinkstudy.effects import ablation, methods, neurons
from sinkstudy.model import capture, loading
from sinkstudy.model.groups import of_patches
from sinkstudy.trained import compared

RULE = ("percentile", 80.0)
MARKS = [judge for judge, _ in explorer.sink_rules(*RULE).values()]
ASKED = pd.DataFrame({"question": ["what is the texture"], "answer": [None], "type": ["generic"]})


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A fresh tiny model of an architecture."""
    folders: dict = {}

    def of(kind: str):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            architectures.write(folders[kind], kind)
        return loading.load(str(folders[kind]))

    return of


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def attend_evenly(lvlm) -> None:
    """Queries of zero: every query attends alike to all that it sees."""
    for side in ("vision", "decoder"):
        for module in capture._attending(lvlm, side, None).values():
            for name, parameter in module.named_parameters():
                if "qkv" in name:
                    parameter.data[: len(parameter) // 3] = 0
                elif "q_proj" in name or "q_norm" in name:
                    parameter.data.zero_()


# ------------------------------------------------------------------------------------------------- the first token
@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl", "internvl", "aya_vision"])
def test_the_first_token_is_no_padding(load, kind):
    """Pictures of several sizes make prompts of several lengths; checkpoints give padding an embedding."""
    lvlm = load(kind)
    lvlm.model.get_input_embeddings().weight.data[0] = 40 * torch.eye(32)[7] + 1
    pictures = [picture(i, *size) for i, size in enumerate([(64, 64), (32, 64), (96, 32), (64, 20)])]
    alone = {tuple(methods.decoder_sink_dimensions(lvlm, [one])) for one in pictures}
    assert alone == {tuple(methods.decoder_sink_dimensions(lvlm, pictures))}


@pytest.mark.parametrize("kind", ["llava", "paligemma", "gemma3"])
def test_phi_does_not_depend_on_the_batch(load, kind, monkeypatch):
    """Where the whole prompt sees itself, its first token differs from picture to picture."""
    lvlm, of = load(kind), sinks.sink_dimensions
    monkeypatch.setattr(sinks, "sink_dimensions", lambda profile: of(profile, 2.0))  # tiny ones light few
    pictures, questions = [picture(i, 64, 64) for i in range(4)], ["how many"] * 4
    n = len(lvlm.layout(lvlm.inputs(pictures[:1], questions[:1]))[0].visual)
    masks = {"all": torch.ones(4, n, dtype=torch.bool)}
    one, four = (propagation.look_inside(lvlm, pictures, questions, masks, size).phi for size in (1, 4))
    torch.testing.assert_close(four, one, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- even attention
@pytest.mark.parametrize("kind", architectures.ARCHITECTURES)
def test_even_attention_is_1_in_the_decoder(load, kind):
    """Behind sliding windows, among a picture's tokens that see one another, and where a prompt sees itself."""
    lvlm = load(kind)
    attend_evenly(lvlm)
    pictures, questions = [picture(i, 64, 64) for i in range(2)], ["how many", "what is the texture"]
    n = len(lvlm.layout(lvlm.inputs(pictures[:1], questions[:1]))[0].visual)
    masks = {"all": torch.ones(2, n, dtype=torch.bool)}
    received = propagation.look_inside(lvlm, pictures, questions, masks).received
    torch.testing.assert_close(received, torch.ones_like(received), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_even_attention_is_even_in_the_explorer(load, kind):
    """A layer that attends within windows has fewer keys than the picture."""
    lvlm, shown = load(kind), picture(0, 64, 64)
    attend_evenly(lvlm)
    means = explorer.mean_tokens(lvlm, [shown])
    seen = []
    marks = [*MARKS[:-1], lambda norms, received: seen.append(received) or received > 5]
    explorer.explore(lvlm, shown, ASKED, marks, {}, means, draws=1, seed=0, batch_size=4)
    torch.testing.assert_close(seen[0], torch.ones_like(seen[0]), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- padding
@pytest.fixture(scope="module", params=["llava_next", "llava_onevision"])
def padded(request, load) -> SimpleNamespace:
    """Wide pictures: patches of the tower that no visual token holds."""
    lvlm, pictures = load(request.param), [picture(i, 64, 20) for i in range(6)]
    questions = ["what is the texture"] * 6
    patches = criteria.read_patches(lvlm, pictures, questions, [[1, 2]] * 3)
    read = torch.stack([layout.read for layout in patches.layouts])
    group = of_patches(patches.norms, sinks.rule(*RULE), read=read)["sinks"]
    assert (~read).any() and group.any()
    return SimpleNamespace(lvlm=lvlm, pictures=pictures, questions=questions, patches=patches, read=read, group=group)


def test_rules_that_are_compared_find_no_padding(padded):
    found = criteria.rule_masks(padded.patches, 1.0, *RULE)["percentile 80"]
    assert torch.equal(found, padded.group)


def test_what_a_group_is_held_against_has_no_padding(padded):
    """It has no attention of the decoder, which is not the same as attention of 0."""
    numbers = {"attention": criteria.quantities(padded.lvlm, padded.pictures, padded.questions, 2)["attention"]}
    got = criteria.against_others(padded.patches, numbers, {"rule": padded.group}).value.item()
    own, of = padded.patches.whole(padded.group), numbers["attention"]
    inside, outside = (np.mean([of[i][mask[i]].mean().item() for i in range(6)]) for mask in (own, ~own & padded.read))
    assert got == pytest.approx(inside / outside, rel=1e-4)


def test_as_many_others_are_left_out(padded, monkeypatch):
    """Padding that is left out takes nothing away."""
    made = {}
    monkeypatch.setattr(criteria, "answer_changes", lambda lvlm, asked, ways, **how: pd.DataFrame(
        {"intervention": [way.name for way in ways]}))
    monkeypatch.setattr(ablation, "replace", lambda name, tokens, masks: made.update({name: masks}) or SimpleNamespace(
        name=name))
    images = {str(i): of for i, of in enumerate(padded.pictures)}
    asked = pd.DataFrame({"image_id": list(images)})
    criteria.left_out(padded.lvlm, asked, images, padded.patches, {"rule": padded.group})
    taken = {way: [int(layout.lift(of[str(i)], "any").sum()) for i, layout in enumerate(padded.patches.layouts)]
             for way, of in made.items()}
    assert taken["random rule"] == taken["group rule"]


def test_first_chapters_sinks_are_no_padding(padded):
    found = norms.by_rule(norms.look(padded.lvlm, padded.pictures), criterion=RULE[0], threshold=RULE[1], tau=1.0)
    assert torch.equal(found[norms.RUN_RULE], padded.group)


def test_the_explorers_sinks_are_the_chapters(padded):
    means = explorer.mean_tokens(padded.lvlm, padded.pictures)
    for shown, group in zip(padded.pictures, padded.group, strict=True):
        seen = explorer.explore(padded.lvlm, shown, ASKED, MARKS, {}, means, draws=1, seed=0, batch_size=8)
        assert torch.equal(seen.groups["sinks"], group)


def test_register_neurons_are_told_from_what_is_read(padded):
    got = neurons.register_scores(padded.lvlm, padded.pictures, padded.group)
    masks = {"group": padded.group, "others": ~padded.group & padded.read}
    active = neurons.mean_activations(padded.lvlm, padded.pictures, masks)
    torch.testing.assert_close(got, (active["group"] - active["others"])[: len(got)])


# ------------------------------------------------------------------------------------------------- seeds, candidates
@pytest.mark.parametrize("there", [{"one": [0, 2], "two": [0, 1, 2]}, {"one": range(12), "two": range(12)}])
def test_a_seed_is_that_of_its_folder(tmp_path, there):
    """So that every seed is set against itself, where one was not trained and where there are more than ten."""
    for arm, seeds in there.items():
        for seed in seeds:
            (tmp_path / f"{arm}-{seed}").mkdir()
            pd.DataFrame({"step": [0], "loss": [float(seed)]}).to_csv(tmp_path / f"{arm}-{seed}" / "training.csv")
    found = compared.losses({"model": compared.folders(tmp_path)})
    assert found.seed.tolist() == found.loss.astype(int).tolist()


def test_all_options_can_be_the_likeliest(load, monkeypatch):
    """MMStar asks for A to D, whichever letters the questions that are asked have as answers."""
    seen = {}

    def asked(lvlm, once, interventions, **settings):
        from sinkstudy.answers import evaluate

        seen["options"] = evaluate._options(once, settings.get("candidates"))
        raise StopIteration

    monkeypatch.setattr("sinkstudy.answers.study.evaluate", asked)
    table = pd.DataFrame({"id": ["1", "2"], "image_id": ["1", "2"], "answer": ["A", "B"], "category": "x",
                          "l2_category": "y", "question": "what\nOptions: A: a, B: b, C: c, D: d"})
    with pytest.raises(StopIteration):
        answers(load("llava"), "MMStar", table, {}, [], public=True)
    assert seen["options"] == [tuple("ABCD")] * 2
