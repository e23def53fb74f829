"""What a model takes is what it takes once it is there; a model that does not fit is refused in one line."""

from types import SimpleNamespace

import architectures
import psutil
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from sinkstudy.book import memory
from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM


def stored(lvlm: LVLM) -> int:
    """Bytes of the weights' storages, each once, however many parameters share it."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in lvlm.model.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_a_lab_model(lab, dtype):
    there = loading.load(lab.name, dtype=dtype)
    outline = loading.outline(lab.name, dtype=dtype)
    assert memory.need(outline).weights == stored(there)
    assert memory.need(outline) == memory.need(there)
    assert all(p.is_meta for p in outline.model.parameters())  # no memory itself


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_weights_and_cache_of_every_architecture(name, tmp_path):
    there = architectures.load(tmp_path, name, dtype="bfloat16")
    need = memory.need(loading.outline(str(tmp_path), dtype="bfloat16"), batch_size=2)
    assert need.weights == stored(there)
    inputs = there.inputs([Image.new("RGB", memory.PICTURE)] * 2, [""] * 2)
    cache = DynamicCache()  # without a config it keeps all, sliding windows or not
    with torch.no_grad():
        there.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    assert need.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert need.activations > 0


def test_more_in_a_batch_takes_more_but_the_weights():
    outline = loading.outline("lab-llava")
    one, four = memory.need(outline), memory.need(outline, 4)
    assert four.weights == one.weights
    assert four.cache == 4 * one.cache and four.activations == 4 * one.activations


def test_what_is_free(monkeypatch):
    assert 0 < memory.free("cpu") <= psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3_000_000))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {0: (5, 9), 1: (7, 9), "cuda:1": (7, 9)}[device])
    assert memory.free("cpu") == 3_000_000
    assert memory.free("cuda:1") == 7
    assert memory.free("auto") == 3_000_012  # a model may be spread over all of them


def test_a_model_that_does_not_fit(tmp_path, monkeypatch):
    name = str(tmp_path)
    architectures.write(tmp_path, "llava")
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with pytest.raises(ValueError, match="needs about .* GB of weights, .* for a batch of 8") as found:
        memory.check(name, dtype="float32", batch_size=8)
    said = str(found.value)
    assert "\n" not in said and said.endswith(
        "GB free: try a smaller dtype (bfloat16), or a smaller batch size (it is 8), or a smaller model"
    )
    with pytest.raises(ValueError, match="device 'cpu' has 2e-06 GB free: try a smaller model$"):
        monkeypatch.setattr(memory, "free", lambda device: 2000)
        memory.check(name, dtype="bfloat16")


def test_a_model_that_fits(tmp_path, monkeypatch):
    architectures.write(tmp_path, "qwen2_5_vl")
    memory.check(str(tmp_path), dtype="bfloat16", batch_size=32)
    exactly = sum(memory.need(loading.outline(str(tmp_path))))
    monkeypatch.setattr(memory, "free", lambda device: exactly)
    memory.check(str(tmp_path))
    monkeypatch.setattr(memory, "free", lambda device: exactly - 1)
    with pytest.raises(ValueError, match="needs about"):
        memory.check(str(tmp_path))
