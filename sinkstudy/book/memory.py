"""Whether a model is whole, fits, and takes the pictures, said before a notebook is executed.

What it takes, and what the device has, is estimated without its weights.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from sinkstudy import devices
from sinkstudy.model import adapters, checkpoints, loading
from sinkstudy.model.lvlm import LVLM
from sinkstudy.paths import place
from sinkstudy.pictures import folder, opened

PICTURE = (640, 480)  # width, height: about the size of the public benchmarks' pictures
ROWS = 256  # queries whose attention `capture.attention_received` computes at a time


class Need(NamedTuple):
    """Bytes that a model takes while the study looks at it."""

    weights: int
    cache: int  # keys and values of a batch's prompts
    activations: int  # what one layer holds at a time


def need(lvlm: LVLM, batch_size: int = 1, size: tuple[int, int] = PICTURE) -> Need:
    """What a model takes with a batch of prompts: weights exactly, the rest roughly.

    Keys and values are counted for all tokens of a prompt in all layers of the decoder. Activations are those of one
    layer, of tower or decoder, whichever holds more: six copies of the residual stream, three of the MLP's inner
    width, and three float32 copies of the attention of `ROWS` queries, which is computed to be looked at. With them
    stand a batch's decoded pictures, as 8-bit RGB, and what the processor makes of them.

    Args:
        lvlm: a model of `loading.outline`, which takes no memory itself, or of `loading.load`.
        batch_size: prompts at a time.
        size: width and height of their pictures.
    """
    bytes_each = lvlm.model.dtype.itemsize
    weights = sum(p.numel() for p in lvlm.model.parameters()) * bytes_each  # tied ones once

    def layer(images: int, tokens: int, width: int, inner: int, heads: int) -> int:
        residual = images * tokens * (6 * width + 3 * inner) * bytes_each
        return residual + 3 * 4 * images * heads * min(tokens, ROWS) * tokens

    vision = lvlm.model.config.vision_config
    shown = loading.blank(lvlm, size)
    inputs = lvlm.inputs([shown], [""])
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
    pictures = batch_size * (3 * shown.width * shown.height + 4 * pixels.numel())
    return Need(weights, cache, max(decoder, tower) + pictures)


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


def check(
    model: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str = "",
    batch_size: int = 1,
    size: tuple[int, int] = PICTURE,
) -> int:
    """Make sure that a model can be read, is whole and fits. Weights that are on this machine are read, one at a time.

    Returns:
        Bytes that it needs, by the estimate of `need`.

    Raises:
        ValueError: as `loading.load`; or the estimate of `need` is more than is `free`.
    """
    devices.check(device, dtype)
    lvlm = loading.outline(model, dtype=dtype, revision=revision)
    needed, there = need(lvlm, batch_size, size), free(device)
    if sum(needed) > there:
        where = "the GPUs and main memory have" if device == "auto" else f"device '{device}' has"
        less = [
            "a smaller dtype (bfloat16)" if dtype == "float32" else "",
            f"a smaller batch size (it is {batch_size})" if batch_size > 1 else "",
            "smaller pictures" if size[0] * size[1] > 4 * PICTURE[0] * PICTURE[1] else "",
            "--device auto, which spreads the weights" if device.startswith("cuda") else "",
            "a smaller model",
        ]
        raise ValueError(
            f"{model} in {dtype} needs about {_gigabytes(sum(needed))} ({_gigabytes(needed.weights)} of weights, "
            f"{_gigabytes(needed.cache + needed.activations)} for a batch of {batch_size}"
            f"{f' of pictures of {size[0]} x {size[1]}' if size != PICTURE else ''}), and {where} "
            f"{_gigabytes(there)} free: try {', or '.join(filter(None, less))}"
        )
    while adapter := adapters.read(model):
        model, revision = adapter.base, adapter.revision
    checkpoints.check_values(model, checkpoints.stored(loading.find(model), revision), lvlm.model.dtype)
    return sum(needed)


def asked_about(
    *, images_dir: str = "", data_dir: str = "", benchmarks: Sequence[str] = (), limit: int = 0
) -> dict[str, tuple[int, int]]:
    """The pictures that a notebook asks about and their sizes (width, height), from their headers alone.

    Pictures of the hub are not fetched for it: of them nothing is known. Takes and raises what `study.pictures` does,
    for `images_dir`, or else `study.load_benchmarks`.
    """
    found: dict[str, Any] = {}
    if images_dir:
        found = {str(file): file for file in folder(place(images_dir), limit)[0]}
    elif data_dir:
        from sinkstudy.answers import study  # only now: the lab's world and pandas take seconds

        _, pictures = study.load_benchmarks(benchmarks, data_dir, False, limit)
        found = {f"{name} {image}": picture for name, of in pictures.items() for image, picture in of.items()}
    return {name: opened(picture, name).size for name, picture in found.items()}


def check_pictures(model: str, sizes: Mapping[str, tuple[int, int]], *, revision: str = "", hub: bool = False) -> None:
    """Make sure that a model whose processor does not resize, as those of the lab, is asked about pictures of its size.

    Raises:
        ValueError: pictures of another size, by name; as `loading.outline`.
    """
    lvlm = loading.outline(model, revision=revision)
    if getattr(lvlm.processor.image_processor, "do_resize", True):
        return
    if hub:
        raise ValueError(f"{model} takes pictures of its own size alone, and public benchmarks have many sizes")
    for name, size in sizes.items():
        try:
            lvlm.check_size(*size)
        except ValueError as problem:
            raise ValueError(f"picture {name}: {problem}") from None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _main(sets: Sequence[dict[str, Any]], elsewhere: bool = False) -> dict[str, int]:
    """Check what notebooks are asked for, by their parameters: a model once, with the largest of its batches.

    Returns:
        MB that each model needs; `elsewhere`, this is all that is done.
    """
    batches: dict[str, int] = {}
    sizes: dict[str, dict[str, tuple[int, int]]] = {}
    for of in sets:
        how = json.dumps({key: of[key] for key in ("model", "device", "dtype", "revision") if key in of})
        batches[how] = max(of.get("batch_size", 1), batches.get(how, 1))
        names = of.get("benchmarks") or ([of["benchmark"]] if of.get("benchmark") else [])
        names = list(dict.fromkeys([*names, *of.get("paper_benchmarks", ())]))
        where = {key: of[key] for key in ("images_dir", "data_dir") if of.get(key)}
        found = asked_about(**where, benchmarks=names, limit=of.get("limit", 0) + of.get("fit", 0)) if where else {}
        sizes.setdefault(how, {}).update(found)
        if found or of.get("hub"):
            check_pictures(of["model"], found, revision=of.get("revision", ""), hub=of.get("hub", False))
    needed: dict[str, int] = {}
    for how, batch_size in batches.items():
        of = json.loads(how)
        size = max([*sizes[how].values(), PICTURE], key=math.prod)
        if elsewhere:
            lvlm = loading.outline(of["model"], dtype=of.get("dtype", "float32"), revision=of.get("revision", ""))
            total = sum(need(lvlm, batch_size, size))
        else:
            total = check(**of, batch_size=batch_size, size=size)
        needed[of["model"]] = max(needed.get(of["model"], 0), total // 10**6)
    return needed


if __name__ == "__main__":  # called by the engine: parameters of notebooks as JSON, a set each
    try:
        arguments = [argument for argument in sys.argv[1:] if argument != "--elsewhere"]
        print(json.dumps(_main([json.loads(argument) for argument in arguments], "--elsewhere" in sys.argv)))
    except ValueError as problem:
        sys.exit(str(problem))
