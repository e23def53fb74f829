"""The register tower: what the encoder sees, what it returns, and that it survives LLaVA and the disk."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from sinkstudy.model.registers import CLIPVisionModelWithRegisters, CLIPVisionWithRegistersConfig

SIZES = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # 4 x 4 = 16 patches


def tower(**kwargs) -> CLIPVisionModelWithRegisters:
    torch.manual_seed(0)
    return CLIPVisionModelWithRegisters(CLIPVisionWithRegistersConfig(**SIZES, **kwargs)).eval()


def test_no_registers_is_plain_clip(pixels):
    ours = tower(num_register_tokens=0)
    clip = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval()
    state = {k: v for k, v in ours.state_dict().items() if k != "embeddings.register_tokens"}
    clip.load_state_dict(state)
    a, b = ours(pixels, output_hidden_states=True), clip(pixels, output_hidden_states=True)
    assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    assert torch.equal(a.pooler_output, b.pooler_output)
    assert len(a.hidden_states) == len(b.hidden_states) == 4
    assert all(torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states))


def test_layers_see_the_registers_and_outputs_do_not(pixels):
    model, seen = tower(), []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    out = model(pixels, output_hidden_states=True)
    assert [tuple(h.shape) for h in seen] == [(2, 21, 16)] * 3
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 17, 16)] * 4
    for returned, hooked in zip(out.hidden_states[1:], seen):
        assert torch.equal(returned[:, 0], hooked[:, 0])
        assert torch.equal(returned[:, 1:], hooked[:, 5:])
    # registers carry no position: what enters the first layer is LayerNorm(register), alike for every image
    entering = model.pre_layrnorm(model.embeddings(pixels))[:, 1:5]
    assert torch.equal(entering[0], entering[1])
    assert torch.allclose(entering[0], model.pre_layrnorm(model.embeddings.register_tokens), atol=1e-6)


@pytest.mark.parametrize("selection", [-2, [-2], [1, -1]])
def test_selected_hidden_states(pixels, selection):
    model = tower()
    full = model(pixels, output_hidden_states=True).hidden_states
    some = model(pixels, output_hidden_states=selection).hidden_states
    wanted = {i % 4 for i in ([selection] if isinstance(selection, int) else selection)}
    assert {i for i, h in enumerate(some) if h is not None} == wanted
    assert all(torch.equal(some[i], full[i]) for i in wanted)


def test_tuple_output_and_gradients(pixels):
    model = tower().train()
    last, pooled = model(pixels, return_dict=False)[:2]
    assert last.shape == (2, 17, 16) and pooled.shape == (2, 16)
    last[:, 1:].square().mean().backward()  # what the patches hold depends on the registers
    assert model.embeddings.register_tokens.grad.abs().sum() > 0


def test_registers_start_apart():
    tokens = tower().embeddings.register_tokens
    assert tokens.shape == (4, 16)
    assert torch.pdist(tokens.detach()).min() > 0.1


def test_inside_llava_and_from_disk(pixels, tmp_path):
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionWithRegistersConfig(**SIZES),
        text_config=LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
        image_token_index=19,
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1] + [19] * 16 + [3, 4]] * 2)
    logits = model(input_ids=ids, pixel_values=pixels).logits
    features = model.get_image_features(pixels).pooler_output
    assert features[0].shape == (16, 16)

    model.save_pretrained(tmp_path)
    again, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again.model.vision_tower, CLIPVisionModelWithRegisters)
    assert again.config.vision_config.num_register_tokens == 4
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again.eval()(input_ids=ids, pixel_values=pixels).logits, logits)
