"""`device="auto"` where a model does not fit on one device: here the rest of it lies on disk, for want of a second GPU.

Whatever reads a weight by itself, and not through the module that has it, finds nothing there.
"""

import architectures
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers.integrations import accelerate

from sinkstudy.effects import methods
from sinkstudy.model import capture, loading
from sinkstudy.model.lvlm import LVLM


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def models(request, tmp_path_factory) -> tuple[LVLM, LVLM]:
    """A tiny model in memory, and one of which the last layers and the output are on disk."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = architectures.load(folder, request.param)
    size = sum(weight.nbytes for weight in whole.model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "get_max_memory", lambda max_memory=None: {"cpu": int(0.6 * size)})
        spread = loading.load(str(folder), device="auto")
    assert set(spread.model.hf_device_map.values()) == {"cpu", "disk"}
    assert spread.model.lm_head.weight.is_meta and not next(spread.model.parameters()).is_meta
    return whole, spread


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=random).numpy()
    return {name: Image.fromarray(of) for name, of in zip("abc", pixels, strict=True)}


def test_traces(models, pictures):
    whole, spread = (capture.trace(lvlm, list(pictures.values()), ["how many"] * 3) for lvlm in models)
    for name, values in vars(whole).items():
        if torch.is_tensor(values):
            assert torch.equal(values, getattr(spread, name)), name


@pytest.mark.parametrize("method", methods.METHODS)
def test_answers(models, pictures, method):
    asked = [("how many", "yes"), ("what is the texture", "no")]
    rows = [(f"{name}{i}", name, *asked[i], "random") for name in pictures for i in range(2)]
    table = pd.DataFrame(rows, columns=["id", "image_id", "question", "answer", "category"])
    how = {"criterion": "percentile", "threshold": 80.0, "max_new_tokens": 2, "cache": None}
    found = []
    for lvlm in models:
        try:
            found.append(methods.effect(lvlm, method, methods.option(method), "POPE", table, pictures, **how))
        except ValueError as told:  # what the method cannot work on
            found.append(pd.DataFrame([str(told)]))
    pd.testing.assert_frame_equal(*found)
