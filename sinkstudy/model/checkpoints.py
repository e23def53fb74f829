"""Whether a checkpoint holds the weights of its model, all of them and no others: names, shapes, values.

What the transformers library merely reports when it loads weights (missing, unexpected, of another shape) is refused
here, by name. Names and shapes stand in the headers of the safetensors files, so that they are known before a weight
is read. What a checkpoint may lack, or have too much, is the library's own list: tied weights, buffers, old names.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
from safetensors import safe_open
from torch import nn

from sinkstudy.paths import UNMERGED

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = ("I64", "I32", "I16", "BOOL")  # buffers, such as positions
UNQUANTISED = "the study needs the unquantised checkpoint"

# what the names of weights that are not the model's tell
SIGNS = {
    r"^base_model\.|\blora_|\.base_layer\.|\.modules_to_save\.": UNMERGED,
    r"\.(qweight|qzeros|absmax|quant_map|quant_state\S*|SCB|weight_scale|weight_packed)$":
        f"it is quantised; {UNQUANTISED}",
    r"^(module|_orig_mod|_fsdp_wrapped_module)\.": "it was saved inside a wrapper: save the model without it",
    r"\bmm_projector\.": "it has the layout of LLaVA's own code: take the converted model (llava-hf on the hub)",
}

# What a checkpoint may hold beyond the model: buffers that older versions of transformers saved, and the pooling head
# of a vision tower, which no vision-language model here has.
LEFT_OVER = re.compile(r"position_ids$|rotary_emb\.inv_freq$|masked_bias$|vision\w*\.(\w+\.)*head\.")


def weight_files(source: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model (a folder or a hub id) that are on this machine; none before a download.

    Raises:
        ValueError: a folder without such files, or whose index names files that are not there.
    """
    if Path(source).is_dir():
        return _files(Path(source))
    known = try_to_load_from_cache(source, "config.json", revision=revision or None)
    try:
        return _files(Path(known).parent) if isinstance(known, str) else []
    except ValueError:  # not all are here yet
        return []


def _files(folder: Path) -> list[Path]:
    single, index = folder / FILE, folder / INDEX
    shards = sorted(set(_index(index).values())) if index.is_file() else []
    if single.is_file():
        if set(shards) - {FILE}:
            raise ValueError(f"it has {FILE} and an {INDEX} that names other files: remove what is not its own")
        return [single]
    if not shards:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        others += sorted(path.name for path in folder.glob("*.safetensors"))
        there = f" (it has {', '.join(others[:3])})" if others else ""
        raise ValueError(
            f"there is no {FILE}{there}; weights are read from safetensors only, since other files can run code: load "
            "them where they were made, and save them with save_pretrained"
        )
    if lacking := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ValueError(f"its {INDEX} names {_list(lacking)}, which is not there")
    return [folder / shard for shard in shards]


def _index(file: Path) -> dict[str, str]:
    """The file of each weight."""
    try:
        found = json.loads(file.read_text())["weight_map"]
        if not all(Path(shard).name == shard for shard in found.values()):
            raise ValueError("a file outside the folder")
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {file.name} is damaged ({type(error).__name__}: {error})") from None


def headers(source: str, revision: str | None = None) -> dict[str, torch.Tensor]:
    """The weights of a model as the headers of its files have them: names, shapes, types, on torch's meta device.

    Of a hub model that is yet to be downloaded the headers alone are fetched.

    Raises:
        ValueError: as `weight_files`; weights that the index promises and no file has, or that two files have;
            quantised weights.
        OSError, SafetensorError: files that are damaged or out of reach.
    """
    found: dict[str, tuple[str, list[int]]] = {}

    def add(of: dict[str, tuple[str, list[int]]]) -> None:
        if twice := sorted(of.keys() & found.keys()):
            raise ValueError(f"two of its files have {twice[0]}, and which of them counts cannot be told")
        found.update(of)

    if there := weight_files(source, revision):
        for file in there:
            with safe_open(file, "pt") as opened:
                parts = ((key, opened.get_slice(key)) for key in opened.keys())  # noqa: SIM118 (no dict)
                add({key: (part.get_dtype(), part.get_shape()) for key, part in parts})
        index = there[0].parent / INDEX
        promised = _index(index) if index.is_file() else {}
    else:
        known = get_safetensors_metadata(source, revision=revision or None)
        for header in known.files_metadata.values():
            add({key: (part.dtype, part.shape) for key, part in header.tensors.items()})
        promised = known.weight_map
    if lacking := sorted(promised.keys() - found.keys()):
        raise ValueError(f"its {INDEX} names {_list(lacking)}, which no file has")
    odd = [f"{key} ({dtype})" for key, (dtype, _) in found.items()
           if dtype not in FLOATS and (dtype not in INTEGERS or key.endswith((".weight", ".bias")))]
    if odd:
        raise ValueError(f"its weights are quantised ({_list(odd)}); {UNQUANTISED}")
    return {
        key: torch.empty(shape, dtype=FLOATS.get(dtype, torch.int64), device="meta")
        for key, (dtype, shape) in found.items()
    }


def check_names(name: str, model: nn.Module, report: dict[str, Any]) -> None:
    """Refuse a model whose checkpoint is not exactly its weights.

    Args:
        report: what `from_pretrained` gives for `output_loading_info`.

    Raises:
        ValueError: weights are missing, of another shape, or not the model's.
    """
    own, missing = set(model.state_dict()), set(report["missing_keys"])
    left_over = {key for key in report["unexpected_keys"] if not LEFT_OVER.search(key)}
    shapes = [
        f"{key} as {list(there)} where the model has {list(wanted)}"
        for key, there, wanted in sorted(report["mismatched_keys"])
    ]
    problems = [f"lacks {_weights(missing, own - missing)}"] if missing else []
    problems += [f"has {_weights(left_over, own)}, of which the model knows nothing"] if left_over else []
    problems += [f"has {_list(shapes, 1)}"] if shapes else []
    if problems:
        told = [hint for sign, hint in SIGNS.items() if any(re.search(sign, key) for key in left_over)]
        told += ["the names are those of another model class or version"] if missing and left_over else []
        hint = f": {told[0]}" if told else ""
        raise ValueError(f"{name}: the checkpoint {'; it '.join(problems)}{hint}. Nothing is filled with random values")


LEVELS = ("model", "language_model", "vision_model")  # which versions of transformers have added or taken away


def check_once(name: str, model: nn.Module, stored: Iterable[str]) -> None:
    """Refuse a checkpoint that has a weight under two names, of an older and a newer version of transformers.

    Raises:
        ValueError: with both names; transformers would take either.
    """

    def plain(key: str) -> str:
        return ".".join(part for part in key.split(".") if part not in LEVELS)

    there, own = Counter(map(plain, stored)), Counter(map(plain, model.state_dict()))
    for key, times in there.items():
        if times > own[key] > 0:
            both = " and ".join(sorted(other for other in stored if plain(other) == key))
            raise ValueError(f"{name}: its weights {both} are one of the model's: remove what is not its own")


def _weights(names: set[str], others: set[str]) -> str:
    if len(names) == 1:
        return next(iter(names))
    return f"{len(names)} weights{'' if others else ', all of them'} ({_list(_modules(names, others))})"


def _modules(names: set[str], others: set[str]) -> list[str]:
    """The names, but one name for those of a module that has none of the others."""

    def within(name: str) -> Iterator[str]:  # its modules from the outermost, then itself
        parts = name.split(".")
        return (".".join(parts[:i]) for i in range(1, len(parts) + 1))

    alive = {module for name in others for module in within(name)}
    return sorted({next((module for module in within(name) if module not in alive), name) for name in names})


def check_values(name: str, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Refuse weights that are NaN or infinite, or become so in `dtype`.

    Raises:
        ValueError: with the first weight's name.
    """
    for key, weight in weights:
        if weight.is_meta or not weight.is_floating_point() or not weight.numel():  # meta: on disk, of a large model
            continue
        ends = torch.stack(torch.aminmax(weight.detach())).to(dtype)  # NaN, if one is
        if not ends.isfinite().all():
            short = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{name}: {key} holds values that are NaN or infinite in {short}: the checkpoint is damaged, or needs "
                "another dtype (bfloat16 or float32 in place of float16)"
            )


def stored(source: str, revision: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each weight in the files that are on this machine, one at a time."""
    for file in weight_files(source, revision):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no dict)
                yield key, opened.get_tensor(key)


def _list(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
