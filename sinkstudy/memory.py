"""Whether a model fits, said before its weights are read: what it takes, and what the device has."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from sinkstudy import models
from sinkstudy.models import LVLM

PICTURE = (640, 480)  # width, height: about the size of the public benchmarks' pictures
ROWS = 256  # queries whose attention `capture.attention_received` computes at a time


class Need(NamedTuple):
    """Bytes that a model takes while the study looks at it."""

    weights: int
    cache: int  # keys and values of a batch's prompts
    activations: int  # what one layer holds at a time


def need(lvlm: LVLM, batch_size: int = 1) -> Need:
    """What a model takes with a batch of prompts: weights exactly, the rest roughly.

    Keys and values are counted for all tokens of a prompt in all layers of the decoder. Activations are those of one
    layer, of tower or decoder, whichever holds more: six copies of the residual stream, three of the MLP's inner
    width, and three float32 copies of the attention of `ROWS` queries, which is computed to be looked at.

    Args:
        lvlm: a model of `models.outline`, which takes no memory itself, or of `models.load`.
        batch_size: prompts at a time, each with a picture of `PICTURE`.
    """
    bytes_each = lvlm.model.dtype.itemsize
    weights = sum(p.numel() for p in lvlm.model.parameters()) * bytes_each  # tied ones once

    def layer(images: int, tokens: int, width: int, inner: int, heads: int) -> int:
        residual = images * tokens * (6 * width + 3 * inner) * bytes_each
        return residual + 3 * 4 * images * heads * min(tokens, ROWS) * tokens

    vision = lvlm.model.config.vision_config
    inputs = lvlm.inputs([models.blank(lvlm, PICTURE)], [""])
    prompt = inputs["input_ids"].shape[1]
    text = lvlm.model.config.get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head * batch_size * prompt * bytes_each
    decoder = layer(batch_size, prompt, text.hidden_size, text.intermediate_size, heads)

    pixels = inputs["pixel_values"]
    heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
    if lvlm.spec.packed:  # [patches, pixels of a patch]
        tiles, tokens = 1, len(pixels)
    else:  # [.., 3, height, width]
        tiles, tokens = pixels[..., 0, 0, 0].numel(), lvlm.n_prefix + lvlm.grid[0] * lvlm.grid[1]
    tower = layer(batch_size * tiles, tokens, lvlm.vision_width, 4 * lvlm.vision_width, heads)
    return Need(weights, cache, max(decoder, tower))


def free(device: str) -> int:
    """Bytes that are free on a device; for "auto" on all GPUs and in main memory, which take a model together."""
    main = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        main = min(main, int(text))
    if device == "auto":
        return main + sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return main


def check(model: str, *, device: str = "cpu", dtype: str = "float32", revision: str = "", batch_size: int = 1) -> None:
    """Make sure that a model can be read, is whole and fits, without reading its weights.

    Raises:
        ValueError: as `models.load`; or the estimate of `need` is more than is `free`.
    """
    models.check_device(device, dtype)
    needed, there = need(models.outline(model, dtype=dtype, revision=revision), batch_size), free(device)
    if sum(needed) > there:
        where = "the GPUs and main memory have" if device == "auto" else f"device '{device}' has"
        less = [
            "a smaller dtype (bfloat16)" if dtype == "float32" else "",
            f"a smaller batch size (it is {batch_size})" if batch_size > 1 else "",
            "--device auto, which spreads the weights" if device.startswith("cuda") else "",
            "a smaller model",
        ]
        raise ValueError(
            f"{model} in {dtype} needs about {_gigabytes(sum(needed))} ({_gigabytes(needed.weights)} of weights, "
            f"{_gigabytes(needed.cache + needed.activations)} for a batch of {batch_size}), and {where} "
            f"{_gigabytes(there)} free: try {', or '.join(filter(None, less))}"
        )
    models.check_weights(model, revision)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


if __name__ == "__main__":  # called by the engine: the arguments of `check` as JSON, a set each
    try:
        for arguments in sys.argv[1:]:
            check(**json.loads(arguments))
    except ValueError as problem:
        sys.exit(str(problem))
