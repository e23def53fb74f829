"""Test-time registers and the choice by norm against arithmetic of the test's own, on tiny random models."""

import architectures
import noise
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.functional import layer_norm

from sinkstudy import sinks
from sinkstudy.answers.evaluate import evaluate
from sinkstudy.effects import ablation, moving, neurons
from sinkstudy.model.lvlm import LVLM

QUESTIONS = ["how many", "what is the texture red blue yes no"]
FOUND = {0: torch.tensor([3, 17]), 1: torch.tensor([30])}
close = dict(atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> LVLM:
    lvlm = architectures.load(tmp_path_factory.mktemp("llava"), "llava")
    first = lvlm.vision_layers[0].mlp.fc1  # a neuron that is below zero everywhere: its largest is its most negative
    first.weight.data[17] *= 0.1
    first.bias.data[17] = -0.6
    return lvlm


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    return dict(zip("ab", noise.pictures([(32, 32)] * 2)))


def normed(x: torch.Tensor, norm) -> torch.Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


@torch.no_grad()
def tower_with_register(lvlm, pixels) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's tower in eager arithmetic with one token more: patches [tiles, 16, width] and it [tiles, width]."""
    tower = lvlm.vision
    x = normed(tower.embeddings(pixels), tower.pre_layrnorm)
    x = torch.cat([x, torch.zeros(len(x), 1, x.shape[-1])], 1)
    for number, layer in enumerate(lvlm.vision_layers[: lvlm.feature_layer + 1]):
        attention, mlp = layer.self_attn, layer.mlp
        y = normed(x, layer.layer_norm1)
        q, k, v = (part(y).unflatten(-1, (2, 8)).transpose(1, 2)
                   for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = (q @ k.mT / 8**0.5).softmax(-1) @ v  # [tiles, heads, tokens, head width]
        x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        active = mlp.fc1(normed(x, layer.layer_norm2))
        active = active * torch.sigmoid(1.702 * active)
        for neuron in FOUND.get(number, torch.tensor([])).tolist():
            for tile in active:
                strongest = max(tile[:, neuron].tolist(), key=abs)
                tile[:, neuron] = 0
                tile[-1, neuron] = strongest
        x = x + mlp.fc2(active)
    return x[:, 1:-1], x[:, -1]


@torch.no_grad()
def logits_of(lvlm, inputs, patches) -> torch.Tensor:
    """What the model says if the connector reads these patches."""
    embeds = lvlm.model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == lvlm.image_token_id] = lvlm.connector(patches).flatten(0, 1)
    hidden = lvlm.decoder(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    return lvlm.model.lm_head(hidden)[:, -1]


def test_the_answer_is_that_of_a_tower_computed_by_hand(llava, pictures):
    """Not passed on, and passed on in the place of one patch of the first picture and two of the second."""
    inputs = llava.inputs(list(pictures.values()), QUESTIONS)
    patches, register = tower_with_register(llava, inputs["pixel_values"])
    with torch.no_grad():
        plain = llava.model(**inputs).logits[:, -1]
        with moving.registered(llava, inputs, neurons=FOUND):
            found = llava.model(**inputs).logits[:, -1]
    torch.testing.assert_close(found, logits_of(llava, inputs, patches), **close)
    assert not torch.allclose(found, plain, atol=1e-3)
    places = [[5], [0, 9]]
    masks = [torch.isin(torch.arange(16), torch.tensor(at)) for at in places]
    for image, at in enumerate(places):
        patches[image, at] = register[image]
    with torch.no_grad(), moving.registered(llava, inputs, masks, neurons=FOUND):
        passed = llava.model(**inputs).logits[:, -1]
    torch.testing.assert_close(passed, logits_of(llava, inputs, patches), **close)
    assert not torch.allclose(passed, found, atol=1e-3)
    with pytest.raises(ValueError, match="16 patches"), moving.registered(
        llava, inputs, [masks[0][:3], masks[1]], neurons=FOUND
    ):
        pass
    assert torch.equal(llava.model(**inputs).logits[:, -1], plain)


@pytest.mark.parametrize("name, norm_behind", [("llava_onevision", False), ("gemma3", True), ("idefics3", True)])
def test_each_tile_passes_its_own_register(name, norm_behind, tmp_path):
    """Where a picture is cut into tiles, and where several patches make a token: what the connector reads."""
    lvlm = architectures.load(tmp_path, name)
    inputs = lvlm.inputs(noise.pictures([(32, 64)], seed=1) * 2, QUESTIONS)
    last, read = [], []
    masks = [torch.zeros(len(layout.vision), dtype=torch.bool) for layout in lvlm.layout(inputs)]
    masks[0][[1, -2]] = True
    with (
        torch.no_grad(),
        lvlm.vision_layers[lvlm.feature_layer].register_forward_hook(lambda module, args, output: last.append(output)),
        moving.registered(lvlm, inputs, masks, neurons=FOUND),
        lvlm.connector.register_forward_pre_hook(lambda module, args: read.append(args[0])),
    ):
        lvlm.model(**inputs)
    tiles = lvlm.vision.post_layernorm(last[0]) if norm_behind else last[0]
    patches, n = tiles[:, lvlm.n_prefix : -1], tiles.shape[1] - lvlm.n_prefix - 1
    expected = patches.flatten(0, 1).clone()
    for place in lvlm.layout(inputs)[0].connector[masks[0]].tolist():
        expected[place] = tiles[place // n, -1]
    torch.testing.assert_close(read[0].flatten(0, 1), expected)
    assert (expected != patches.flatten(0, 1)).any(-1).sum() == 2


def test_in_evaluate_the_tower_is_computed_again(llava, pictures):
    """The tower's pass is shared by all that leave it alone, and a register does not."""
    table = pd.DataFrame([{"id": f"{i}{q}", "image_id": i, "question": q} for i in pictures for q in QUESTIONS])
    masks = {i: torch.arange(16) == 5 for i in pictures}
    plain = {layer: of.tolist() for layer, of in FOUND.items()}
    ways = [
        moving.intervention("features", moving.reweighted, masks, chosen_by=0.5),
        moving.intervention("left out", moving.registered, neurons=plain),
        moving.intervention("passed", moving.registered, masks, neurons=plain),
    ]
    said = evaluate(llava, table, ways, images=pictures, candidates=["yes", "no"], max_new_tokens=2, cache=None)
    for row in said[said.intervention != "features"].itertuples():
        inputs = llava.inputs([pictures[row.image_id]], [row.question])
        own = [masks[row.image_id]] if row.intervention == "passed" else None
        with torch.no_grad(), moving.registered(llava, inputs, own, neurons=FOUND):
            logp = llava.model(**inputs).logits[0, -1].log_softmax(-1)
        yes = llava.processor.tokenizer.convert_tokens_to_ids("yes")
        assert abs(logp[yes].item() - row.logp_yes) < 1e-4


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_towers_that_take_no_further_token(name, tmp_path):
    lvlm = architectures.load(tmp_path, name)
    inputs = lvlm.inputs([Image.new("RGB", (32, 32))], ["how many"])
    with pytest.raises(ValueError, match="takes no added token"), moving.registered(lvlm, inputs, neurons=FOUND):
        pass
    assert not lvlm.connector._forward_pre_hooks


def test_register_neurons_are_those_that_write_the_planted_norm(llava, pictures):
    """Neuron 7 of the second layer fires at one patch and writes a huge vector; a louder one fires everywhere."""
    layer, spot, neuron, loud = 1, 6, 7, 8
    state = {name: value.clone() for name, value in llava.model.state_dict().items()}
    embeddings, mlp = llava.vision.embeddings, llava.vision_layers[layer].mlp
    embeddings.position_embedding.weight.data[:, 0] = 0
    embeddings.position_embedding.weight.data[1 + spot, 0] = 80
    mlp.fc1.weight.data[[neuron, loud]] = 0
    mlp.fc1.weight.data[neuron, 0], mlp.fc1.bias.data[neuron], mlp.fc1.bias.data[loud] = 10, -15, 1000
    mlp.fc2.weight.data[:, neuron], mlp.fc2.weight.data[:, loud] = 300, 0
    masks = (torch.arange(16) == spot).expand(2, -1)
    found = neurons.strongest(neurons.register_scores(llava, list(pictures.values()), masks), 1)
    llava.model.load_state_dict(state)
    assert {at: of.tolist() for at, of in found.items()} == {layer: [neuron]}
    with pytest.raises(ValueError, match="one of the two is empty"):
        neurons.register_scores(llava, list(pictures.values()), torch.zeros(2, 16, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------- keep the top k
def test_top_k_are_the_first_in_order_of_norm():
    norms = torch.tensor([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert sinks.top_k(norms, 3).tolist()[0] == [True, False, True, True]
    assert sinks.top_k(norms, 2).sum(-1).tolist() == [2, 2] and sinks.top_k(norms, 9).all()
    with pytest.raises(ValueError, match="1 at least"):
        sinks.top_k(norms, 0)


@pytest.mark.parametrize("k", [1, 3, 16])
def test_keeping_k_is_the_sequence_of_k(llava, pictures, k):
    """Positions keep their gaps; all tokens kept is the model as it is."""
    inputs = llava.inputs([pictures["a"]], QUESTIONS[:1])
    with torch.no_grad():
        output = llava.model.model.get_image_features(inputs["pixel_values"])
        norms = llava.vision(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:].norm(dim=-1)
        with ablation.hidden(llava, inputs, [sinks.top_k(norms[0], k)], others=True):
            found = llava.model(**inputs).logits[0, -1]
        plain = llava.model(**inputs).logits[0, -1]
        ids = inputs["input_ids"][0]
        embeds = llava.model.get_input_embeddings()(ids)
        features = output.pooler_output if hasattr(output, "pooler_output") else output
        embeds[ids == llava.image_token_id] = features[0]
        visual = (ids == llava.image_token_id).nonzero()[:, 0]
        kept = set(visual[norms[0].argsort(descending=True)[:k]].tolist())
        places = torch.tensor([i for i in range(len(ids)) if i not in set(visual.tolist()) or i in kept])
        hidden = llava.decoder(inputs_embeds=embeds[None, places], position_ids=places[None]).last_hidden_state
        expected = llava.model.lm_head(hidden)[0, -1]
    torch.testing.assert_close(found, expected, **close)
    assert torch.allclose(found, plain, **close) == (k == 16)
