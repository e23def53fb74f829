"""The adapter: parts of a model, inputs, visual positions, and clear errors."""

import copy
import json

import httpx
import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from sinkstudy import devices
from sinkstudy.model import loading
from sinkstudy.model.capture import trace
from sinkstudy.model.lvlm import LVLM
from sinkstudy.model.specs import SPECS


def test_parts(tiny):
    registers = "registers" in tiny.name
    assert tiny.n_prefix == (5 if registers else 1)
    assert tiny.grid == (4, 4)
    assert tiny.feature_layer == 1  # -2 of three layers
    assert len(tiny.vision_layers) == len(tiny.decoder_layers) == 3
    assert isinstance(tiny.connector, nn.Module)
    assert tiny.revision is None
    assert tiny.model.dtype == torch.float32 and not tiny.model.training
    assert not any(p.requires_grad for p in tiny.model.parameters())


def test_feature_layer_is_what_the_connector_reads(tiny, images):
    seen = {}
    with (
        tiny.vision_layers[tiny.feature_layer].register_forward_hook(lambda m, a, out: seen.update(layer=out)),
        tiny.connector.register_forward_hook(lambda m, args, out: seen.update(connector=args[0])),
    ):
        tiny.model(**tiny.inputs(images[:1], ["how many"]))
    assert torch.equal(seen["layer"][:, tiny.n_prefix :], seen["connector"])
    assert seen["connector"].shape[1] == tiny.grid[0] * tiny.grid[1]


def test_inputs_pad_on_the_left(tiny, images, questions):
    inputs = tiny.inputs(images, questions)
    tokenizer = tiny.processor.tokenizer
    assert inputs.pixel_values.shape == (3, 3, 32, 32)
    assert inputs.input_ids[:, -1].tolist() == [tokenizer.convert_tokens_to_ids(":")] * 3
    assert inputs.attention_mask[:, -1].all() and not inputs.attention_mask[0, 0]
    assert (inputs.input_ids == tokenizer.bos_token_id).sum(-1).tolist() == [1, 1, 1]
    positions = tiny.visual_positions(inputs.input_ids)
    assert positions.shape == (3, 16)
    assert (inputs.input_ids.gather(1, positions) == tiny.image_token_id).all()
    assert (positions.diff(dim=1) == 1).all()


def test_prompt_and_image_types(tiny, images):
    assert tiny.prompt("how many") == "user : <image> how many assistant :"
    as_array = [np.array(image).transpose(2, 0, 1) for image in images]  # uint8 [3, height, width]
    as_tensor = [torch.from_numpy(array) for array in as_array]
    pixels = tiny.inputs(images, ["yes"] * 3).pixel_values
    assert torch.equal(tiny.inputs(as_array, ["yes"] * 3).pixel_values, pixels)
    assert torch.equal(tiny.inputs(as_tensor, ["yes"] * 3).pixel_values, pixels)


def test_bfloat16(tiny, images):
    half = loading.load(tiny.name, dtype="bfloat16")
    inputs = half.inputs(images[:1], ["how many"])
    assert inputs.pixel_values.dtype == torch.bfloat16 and inputs.input_ids.dtype == torch.long
    assert half.model(**inputs).logits.dtype == torch.bfloat16


def test_unequal_numbers(tiny, images):
    with pytest.raises(ValueError, match="3 images and 1 questions"):
        tiny.inputs(images, ["how many"])
    with pytest.raises(ValueError, match="same number of visual tokens"):
        tiny.visual_positions(torch.tensor([[4, 4], [4, 1]]))


@pytest.mark.parametrize("name", ["no-such-model", "./missing/folder", "a/b/c", "/tmp"])
def test_unknown_model(name):
    with pytest.raises(ValueError, match="unknown model|the folder /tmp holds no model"):
        loading.load(name)


def test_a_loaded_model_is_wrapped(tiny, images):
    own = loading.wrap(tiny.model, tiny.processor)
    assert (own.spec, own.grid, own.n_prefix) == (tiny.spec, tiny.grid, tiny.n_prefix) and own.model is tiny.model
    inputs = tiny.inputs(images[:1], ["how many"])
    assert torch.equal(own.inputs(images[:1], ["how many"]).input_ids, inputs.input_ids)


def test_what_cannot_be_wrapped(tiny):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    with pytest.raises(ValueError, match="architecture 'llama' is not known"):
        loading.wrap(LlamaForCausalLM(config), tiny.processor)
    with pytest.raises(ValueError, match="load it as LlavaForConditionalGeneration, not as LlavaModel"):
        loading.wrap(tiny.model.model, tiny.processor)
    with pytest.raises(ValueError, match="is no processor for pictures and text"):
        loading.wrap(tiny.model, tiny.processor.tokenizer)
    several = copy.deepcopy(tiny.model)
    several.config.vision_feature_layer = [-2, 4]
    with pytest.raises(ValueError, match="is none of the tower's layers"):
        loading.wrap(several, tiny.processor)


def test_hub_id_passes():
    assert loading.find("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


def test_unknown_architecture_dtype_device(tiny, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2' is not known"):
        loading.load(str(tmp_path))
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        loading.load(tiny.name, dtype="int8")
    with pytest.raises(ValueError, match="device 'cuda:97' is not there"):
        loading.load(tiny.name, device="cuda:97")
    with pytest.raises(ValueError, match="unknown device 'abacus'"):
        loading.load(tiny.name, device="abacus")


def test_a_folder_that_cannot_be_read(tiny, tmp_path):
    """Weights as a pickle, weights cut short, and no processor: one line each, and a pickle is never opened."""
    tiny.model.config.save_pretrained(tmp_path)
    torch.save(tiny.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read: .*safetensors") as found:
        loading.load(str(tmp_path))
    assert "\n" not in str(found.value)
    tiny.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        loading.load(str(tmp_path))  # no processor
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        loading.load(str(tmp_path))


def test_a_hub_model_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="llava-hf/no-such-model cannot be read: .*connect"):
        loading.load("llava-hf/no-such-model")


def test_a_hub_model_that_cannot_be_reached(monkeypatch):
    """A connection that is refused, at once and at every further trial."""

    def refused(*args, **kwargs):
        raise httpx.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", refused)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="owner/no-such-model cannot be read: .*connect") as found:
        loading.load("owner/no-such-model")
    assert "\n" not in str(found.value)


def test_a_folder_has_no_revision(tiny):
    with pytest.raises(ValueError, match="is a folder and has no revision 'v1'"):
        loading.load(tiny.name, revision="v1")
    assert loading.load(tiny.name, revision="").revision is None


@pytest.mark.parametrize("dtype, others", [("float16", "bfloat16 or float32"), ("bfloat16", "float16 or float32")])
def test_a_device_that_lacks_a_dtype(tiny, monkeypatch, dtype, others):
    """The CPU of this torch computes in all three; one that does not raises, as older ones do."""
    devices.check("cpu", dtype)

    def lacks(one, other):
        raise RuntimeError(f"\"addmm_impl_cpu_\" not implemented for {one.dtype}")

    monkeypatch.setattr(torch.Tensor, "__matmul__", lacks)
    message = rf"device 'cpu' does not compute in {dtype}: take another dtype \({others}\)"
    with pytest.raises(ValueError, match=message):
        loading.load(tiny.name, dtype=dtype)


def test_an_outline_is_the_model_without_weights(tiny):
    outline = loading.outline(tiny.name, dtype="bfloat16")
    shapes = {name: tuple(p.shape) for name, p in tiny.model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in outline.model.named_parameters()} == shapes
    assert outline.model.dtype == torch.bfloat16 and outline.device.type == "meta"
    assert (outline.grid, outline.n_prefix, outline.prompt("how many")) == (
        tiny.grid,
        tiny.n_prefix,
        tiny.prompt("how many"),
    )


def test_auto_without_a_gpu_is_the_cpu(tiny, images, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    auto = loading.load(tiny.name, device="auto")
    inputs = auto.inputs(images[:1], ["how many"])
    assert auto.device.type == "cpu"
    assert torch.equal(auto.model(**inputs).logits, tiny.model(**inputs).logits)


def test_layouts_that_do_not_fit(tiny):
    for change, message in [
        ({"vision_feature_select_strategy": "full"}, "visual tokens are not the patches"),
        ({"vision_feature_layer": []}, "not a single layer"),
    ]:
        config = type(tiny.model.config).from_dict({**tiny.model.config.to_dict(), **change})
        with pytest.raises(ValueError, match=message):
            loading._check_layout("some-model", config)


def test_tower_without_cls(tiny_siglip, images):
    """Every vision token is a patch and a visual token."""
    assert (tiny_siglip.n_prefix, tiny_siglip.grid, tiny_siglip.feature_layer) == (0, (4, 4), 1)
    seen = trace(tiny_siglip, images, ["how many"] * 3)
    assert seen.vision_norms.shape == (3, 3, 16)
    torch.testing.assert_close(seen.vision_received.sum(-1), torch.ones(3, 3, 2))


def test_llava_15_layout():
    """The default config of LLaVA is LLaVA-1.5-7B; the model is made without weights."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig())
    lvlm = LVLM(model, None, "llava-1.5", None, SPECS["llava"])
    assert (lvlm.n_prefix, lvlm.grid, lvlm.feature_layer, lvlm.image_token_id) == (1, (24, 24), 22, 32000)
    assert (len(lvlm.vision_layers), len(lvlm.decoder_layers)) == (24, 32)
    loading._check_layout("llava-1.5", model.config)


def test_lab_model(lab):
    assert lab.n_prefix == (5 if lab.name == "lab-llava-registers" else 1)
    assert lab.grid == (12, 12)
    assert (len(lab.vision_layers), len(lab.decoder_layers), lab.feature_layer) == (8, 4, 6)
    image = torch.zeros(3, 96, 96, dtype=torch.uint8)
    inputs = lab.inputs([image, image], ["how many ?", "what is the dominant texture of the scene ?"])
    assert inputs.pixel_values.shape == (2, 3, 96, 96)
    assert lab.visual_positions(inputs.input_ids).shape == (2, 144)
    assert (inputs.input_ids == lab.processor.tokenizer.bos_token_id).sum(-1).tolist() == [1, 1]
    assert torch.isfinite(lab.model(**inputs).logits).all()
