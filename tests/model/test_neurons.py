"""Planted neurons are found, silenced and moved; nothing else changes, and nothing stays behind."""

import architectures
import noise
import pytest
import torch
from PIL import Image

from sinkstudy.effects import neurons
from sinkstudy.model.lvlm import LVLM

QUESTIONS = ["how many", "what is the texture", "what is the texture red blue yes no"]
LAYER, NEURON, SPOT = 1, 7, 5  # the planted neuron, and the patch where it fires
close = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return noise.pictures([(32, 32)] * 3)


@pytest.fixture(scope="module", params=["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def lvlm(request, tmp_path_factory) -> LVLM:
    return architectures.load(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> LVLM:
    """A tower that does nothing, but for one neuron that fires at one patch and writes a huge vector there."""
    lvlm = architectures.load(tmp_path_factory.mktemp("planted"), "llava")
    embeddings = lvlm.vision.embeddings
    embeddings.patch_embedding.weight.data[0] = 0  # dimension 0 says whether this is the spot
    embeddings.class_embedding.data[0] = 0
    embeddings.position_embedding.weight.data[:, 0] = 0
    embeddings.position_embedding.weight.data[1 + SPOT, 0] = 50
    for layer in lvlm.vision_layers:
        for end in (layer.self_attn.out_proj, layer.mlp.fc2):
            end.weight.data.zero_()
            end.bias.data.zero_()
    mlp = lvlm.vision_layers[LAYER].mlp
    mlp.fc1.weight.data[NEURON] = 0
    mlp.fc1.weight.data[NEURON, 0], mlp.fc1.bias.data[NEURON] = 10, -20
    mlp.fc2.weight.data[:, NEURON] = 1000
    return lvlm


@torch.no_grad()
def logits(lvlm, pictures) -> torch.Tensor:
    return lvlm.model(**lvlm.inputs(pictures, QUESTIONS)).logits


@torch.no_grad()
def norms(lvlm, pictures) -> torch.Tensor:
    """Of the patches where the connector reads them, [pictures, patches]."""
    seen = []
    with lvlm.editing(before=lambda hidden, layer: seen.append(hidden) or hidden):
        inputs = lvlm.inputs(pictures, QUESTIONS)
        lvlm.model(**inputs)
    return torch.stack([seen[-1][layout.connector].norm(dim=-1) for layout in lvlm.layout(inputs)])


def hooks(lvlm) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lvlm.model.modules())


def spot_mask(n=16) -> torch.Tensor:
    return (torch.arange(n) == SPOT).expand(3, -1)


# ----------------------------------------------------------------------------------------------- finding neurons
def test_the_planted_neuron_is_found_first(planted, pictures):
    spot = spot_mask()
    active = neurons.mean_activations(planted, pictures, {"spot": spot, "others": ~spot}, batch_size=2)
    score = active["spot"] - active["others"]
    assert neurons.strongest(score[:3], 1)[LAYER].tolist() == [NEURON]
    assert LAYER not in neurons.strongest(score[:LAYER], 5)
    high = norms(planted, pictures)
    assert (high[:, SPOT] > 100 * high.median(1).values).all()


def test_silencing_the_planted_neuron_takes_the_norm_away_and_random_ones_do_not(planted, pictures):
    inputs = planted.inputs(pictures, QUESTIONS)
    at = torch.cat([layout.vision[SPOT : SPOT + 1] for layout in planted.layout(inputs)])
    found = {LAYER: torch.tensor([NEURON])}
    before = norms(planted, pictures)
    column = planted.vision_layers[LAYER].mlp.fc2.weight.data[:, NEURON].clone()
    planted.vision_layers[LAYER].mlp.fc2.weight.data[:, NEURON] = 0
    expected = norms(planted, pictures)  # of a tower that never had it
    planted.vision_layers[LAYER].mlp.fc2.weight.data[:, NEURON] = column
    assert expected.max() < 0.01 * before.max()
    for tokens in (at, None):
        with neurons.setting(planted, found, tokens):
            torch.testing.assert_close(norms(planted, pictures), expected, **close)
    with neurons.setting(planted, neurons.random_neurons(found, 32, seed=0)):
        assert torch.equal(norms(planted, pictures), before)
    elsewhere = torch.cat([layout.vision[: SPOT] for layout in planted.layout(inputs)])
    with neurons.setting(planted, found, elsewhere):
        torch.testing.assert_close(norms(planted, pictures)[:, SPOT], before[:, SPOT])


def test_the_planted_neuron_makes_the_norm_anywhere(planted, pictures):
    spot = spot_mask()
    found = {LAYER: torch.tensor([NEURON])}
    signed = neurons.mean_activations(planted, pictures, {"spot": spot}, magnitude=False)["spot"]
    other = 11
    layouts = planted.layout(planted.inputs(pictures, QUESTIONS))
    at = torch.stack([layout.vision[other] for layout in layouts])
    with neurons.setting(planted, found, at, {LAYER: signed[LAYER, [NEURON]]}):
        high = norms(planted, pictures)
    torch.testing.assert_close(high[:, other], high[:, SPOT], rtol=0.01, atol=1)


def reference_activations(lvlm, picture) -> torch.Tensor:
    """Neurons of one picture from the first linear maps and the nonlinearity: [layers, tokens, neurons]."""
    kept: dict[str, list] = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: kept.setdefault(name, []).append(out))
        for layer in lvlm.vision_layers
        for name, module in layer.mlp.named_modules()
        if name in ("fc1", "linear_fc1", "gate_proj", "up_proj")
    ]
    with torch.no_grad():
        lvlm.model(**lvlm.inputs([picture], ["how many"]))
    for handle in handles:
        handle.remove()
    mlp = lvlm.vision_layers[0].mlp
    act = next(getattr(mlp, name) for name in ("activation_fn", "act_fn", "act") if hasattr(mlp, name))
    if "gate_proj" in kept:
        return torch.stack([act(g) * u for g, u in zip(kept["gate_proj"], kept["up_proj"])])
    (first,) = kept.values()
    return torch.stack([act(x).flatten(0, -2) for x in first])


@pytest.mark.parametrize("magnitude", [True, False])
def test_mean_activations_are_those_of_one_picture_at_a_time(lvlm, pictures, magnitude):
    n = len(lvlm.layout(lvlm.inputs(pictures[:1], [""]))[0].vision)
    masks = torch.rand(3, n, generator=torch.Generator().manual_seed(0)) < 0.3
    got = neurons.mean_activations(lvlm, pictures, {"some": masks, "none": masks & False}, magnitude, batch_size=2)
    chosen = []
    for picture, mask in zip(pictures, masks):
        patches = lvlm.layout(lvlm.inputs([picture], ["how many"]))[0].vision[mask]
        chosen.append(reference_activations(lvlm, picture)[:, patches])
    expected = torch.cat(chosen, 1)
    torch.testing.assert_close(got["some"], (expected.abs() if magnitude else expected).mean(1), **close)
    assert got["none"].isnan().all()


def test_strongest_and_random_neurons():
    scores = torch.tensor([[0.0, 5.0, 1.0, 3.0], [4.0, -9.0, 2.0, 0.5], [99.0, 99.0, 99.0, 99.0]])
    found = neurons.strongest(scores[:2], 3)
    assert {layer: of.tolist() for layer, of in found.items()} == {0: [1, 3], 1: [0]}
    drawn = neurons.random_neurons(found, 4, seed=0)
    assert {layer: len(of) for layer, of in drawn.items()} == {0: 2, 1: 1}
    assert drawn[0].tolist() == [0, 2] and drawn[1].item() != 0
    draws = {neurons.random_neurons(found, 4, seed)[1].item() for seed in range(40)}
    assert draws == {1, 2, 3}
    with pytest.raises(ValueError, match="fewer than k = 9"):
        neurons.strongest(scores[:2], 9)


# ----------------------------------------------------------------------------------------------- setting them
def test_setting_changes_what_it_should_to_the_bit(lvlm, pictures):
    """The map behind the neurons gets their difference, at those tokens, and nothing else."""
    reader = lvlm.vision_layers[1].get_submodule(lvlm.spec.vision_neurons)
    seen = []
    of, at = torch.tensor([2, 9]), torch.tensor([3, 8, 12])
    value = torch.tensor([1.5, -2.0])
    for context in (neurons.setting(lvlm, {}), neurons.setting(lvlm, {1: of}, at, {1: value})):
        with context, reader.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2).clone())):
            logits(lvlm, pictures)
    before, after = seen
    expected = before.clone()
    expected[at[:, None], of] = value
    assert torch.equal(after, expected) and not torch.equal(before, expected)


def test_nothing_set_changes_nothing_and_nothing_stays(lvlm, pictures):
    plain, n = logits(lvlm, pictures), hooks(lvlm)
    nowhere, no_neurons = torch.tensor([], dtype=torch.long), {1: torch.tensor([], dtype=torch.long)}
    nothing = [
        neurons.setting(lvlm, {}),
        neurons.setting(lvlm, no_neurons),
        neurons.setting(lvlm, {1: torch.tensor([4])}, nowhere),
        neurons.setting_dimensions(lvlm, [], torch.tensor([0, 1]), 0.0),
        neurons.setting_dimensions(lvlm, [3], nowhere, 0.0),
    ]
    for context in nothing:
        with context:
            assert torch.equal(logits(lvlm, pictures), plain)
    something = [
        neurons.setting(lvlm, {1: torch.arange(32)}),
        neurons.setting_dimensions(lvlm, [3], torch.arange(9), 7.0),
    ]
    for context in something:
        with pytest.raises(KeyboardInterrupt), context:
            assert not torch.equal(logits(lvlm, pictures), plain)
            raise KeyboardInterrupt
    assert hooks(lvlm) == n and torch.equal(logits(lvlm, pictures), plain)


def test_setting_dimensions_touches_those_entries_only(lvlm, pictures):
    inputs = lvlm.inputs(pictures, QUESTIONS)
    patches = torch.cat([layout.connector[[1, 6]] for layout in lvlm.layout(inputs)])
    seen = []

    def read(module, args):
        seen.append(args[0].reshape(-1, 16).clone())

    value = torch.tensor([9.0, -3.0])
    for context in (neurons.setting(lvlm, {}), neurons.setting_dimensions(lvlm, [4, 11], patches, value)):
        with context, lvlm.connector.register_forward_pre_hook(read):
            logits(lvlm, pictures)
    expected = seen[0].clone()
    expected[patches, 4], expected[patches, 11] = 9.0, -3.0
    assert torch.equal(seen[1], expected) and not torch.equal(seen[0], expected)


# ----------------------------------------------------------------------------------------------- test-time register
@pytest.mark.parametrize(
    "name", ["llava", "llava-siglip-qwen2", "llava_next", "llava_onevision", "gemma3", "paligemma", "idefics3"]
)
def test_a_register_takes_the_largest_activation_and_leaves_no_token(name, pictures, tmp_path):
    lvlm = architectures.load(tmp_path, name)
    plain, n = logits(lvlm, pictures), hooks(lvlm)
    of = torch.tensor([2, 9])
    reader = lvlm.vision_layers[1].get_submodule(lvlm.spec.vision_neurons)
    seen = []

    def see(module, args):
        seen.append(args[0].clone())

    with neurons.moved_to_register(lvlm, {}), reader.register_forward_pre_hook(see):  # a token that nobody writes to
        logits(lvlm, pictures)
    with neurons.moved_to_register(lvlm, {1: of}), reader.register_forward_pre_hook(see):
        moved = logits(lvlm, pictures)
    before, after = seen  # [tiles, tokens + 1, neurons]
    high, low = before[..., of].amax(1), before[..., of].amin(1)
    torch.testing.assert_close(after[:, -1, of], torch.where(high > -low, high, low))
    assert (after[:, :-1, of] == 0).all()
    others = torch.tensor([i for i in range(32) if i not in of])
    assert torch.equal(after[..., others], before[..., others])
    assert moved.shape == plain.shape and not torch.equal(moved, plain)
    assert hooks(lvlm) == n and torch.equal(logits(lvlm, pictures), plain)


def test_a_register_takes_the_planted_norm(planted, pictures):
    with neurons.setting(planted, {LAYER: torch.tensor([NEURON])}):
        expected = norms(planted, pictures)
    with neurons.moved_to_register(planted, {LAYER: torch.tensor([NEURON])}):
        torch.testing.assert_close(norms(planted, pictures), expected, **close)


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_towers_that_take_no_further_token(name, tmp_path):
    lvlm = architectures.load(tmp_path, name)
    with pytest.raises(ValueError, match="takes no added token; silence"), neurons.moved_to_register(lvlm, {}):
        pass
