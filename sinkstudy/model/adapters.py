"""A folder with a LoRA adapter of peft: its updates are added to the weights of its base, in memory.

An update is W + scale B A, with scale alpha / r, or alpha / sqrt(r) where it is rank-stabilised (arXiv 2106.09685,
2312.03732). Weights that were trained whole (`modules_to_save`) take the place of the base's. An adapter that does
anything else (DoRA, biases, an initialisation that changes the base, ..) is refused, and so is one of half a pair of
tied weights, or with pictures or a chat format that are not its base's.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ProcessorMixin
from transformers.pytorch_utils import Conv1D

from sinkstudy.model.checkpoints import check_values
from sinkstudy.paths import ADAPTER, UNMERGED, model_folder

ADAPTER_FILE = "adapter_model.safetensors"
# what says how it was trained or is checked below; any other setting has to be off
NEUTRAL = set(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core qalora_group_size "
    "runtime_config".split()
)


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to its base.

    Attributes:
        base, revision: the model that it was trained on.
        updates: B [rows, rank], A [rank, columns] and their scale, by the weight's name at training.
        whole: weights that take the place of the base's, by their name.
    """

    name: str
    base: str
    revision: str | None
    updates: dict[str, tuple[torch.Tensor, torch.Tensor, float]]
    whole: dict[str, torch.Tensor]

    @torch.no_grad()
    def merge(self, model: nn.Module) -> None:
        """Change the weights of its base; of one on torch's meta device only names and shapes are checked.

        Raises:
            ValueError: a weight that the base has not, or has twice, tied to another or in another shape.
        """
        weights = dict(model.named_parameters(remove_duplicate=False))
        for path, new in {**self.updates, **self.whole}.items():
            place = self._place(path, weights)
            weight = weights[place]
            if tied := [other for other in weights if weights[other] is weight and other != place]:
                raise ValueError(f"{self.name}: {path} is {tied[0]} too in its base, and was trained alone: {UNMERGED}")
            # as in peft, whatever `fan_in_fan_out` says: only these are [columns, rows]
            turned = isinstance(new, tuple) and isinstance(model.get_submodule(place.rpartition(".")[0]), Conv1D)
            up, down, scale = new if isinstance(new, tuple) else (new, None, 1.0)
            shape = up.shape if down is None else (up.shape[0], down.shape[1])[:: -1 if turned else 1]
            if tuple(shape) != tuple(weight.shape):
                raise ValueError(f"{self.name}: {path} is {list(shape)} and its base has {list(weight.shape)}")
            if weight.is_meta:
                continue
            if down is None:
                weight.copy_(up)
            else:
                update = scale * (up.to(weight.device).float() @ down.to(weight.device).float())
                weight.copy_(weight.float() + (update.T if turned else update))

    def _place(self, path: str, weights: dict[str, nn.Parameter]) -> str:
        """The name of a weight: exactly, or as other versions of transformers have it."""
        tests = (
            lambda name: name == path,
            lambda name: _plain(name) == _plain(path),
            lambda name: f".{_plain(name)}".endswith(f".{_plain(path)}"),
        )
        found = next((found for test in tests if (found := [name for name in weights if test(name)])), [])
        if len(found) != 1:
            raise ValueError(f"{self.name}: its base {self.base} has {len(found) or 'no'} weights {path}: {UNMERGED}")
        return found[0]


def read(name: str) -> Adapter | None:
    """The adapter in a folder that has no model of its own; None for a model.

    Raises:
        ValueError: one that cannot be read, or that does more than the module says.
    """
    folder = model_folder(name)
    if folder is None or (folder / "config.json").is_file():
        return None
    try:
        of = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base = of["base_model_name_or_path"]
        weights = {_path(key): weight for key, weight in load_file(folder / ADAPTER_FILE).items()}
    except Exception as error:  # whatever a damaged file provokes
        said = str(error).partition("\n")[0]
        raise ValueError(f"the adapter {name} cannot be read: {type(error).__name__}: {said}; {UNMERGED}") from None
    odd = [f"{key} {value!r}" for key, value in of.items() if value and key not in NEUTRAL]
    checked: dict[str, list] = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, False, "gaussian"]}
    odd += [f"{key} {of[key]!r}" for key, known in checked.items() if of.get(key, known[0]) not in known]
    scales = [of.get("lora_alpha", 8), *(of.get("alpha_pattern") or {}).values()]
    odd += [f"lora_alpha {scale!r}" for scale in scales if not isinstance(scale, (int, float))]
    odd += [path for path in weights if "lora_" in re.sub(r"\.lora_[AB]\.weight$", "", path)]
    if odd or not isinstance(base, str):
        what = ", ".join(odd[:3]) or "no base"
        raise ValueError(f"{name}: its adapter has {what}, which is not merged here: {UNMERGED}")
    check_values(name, weights.items(), torch.float32)
    halves = {path: weights.pop(path) for path in list(weights) if ".lora_" in path}
    updates = {}
    for path in sorted({re.sub(r"\.lora_[AB]\.weight$", "", half) for half in halves}):
        try:
            down, up = (halves[f"{path}.lora_{half}.weight"] for half in "AB")
        except KeyError as lacking:
            raise ValueError(f"{name}: its adapter lacks {lacking.args[0]}") from None
        updates[f"{path}.weight"] = up, down, _scale(path, len(down), of)
    return Adapter(name, base, of.get("revision"), updates, weights)


def check_processor(name: str, processor: ProcessorMixin) -> None:
    """Make sure that an adapter's folder has no pictures or chat format that are not those of its base's processor.

    Raises:
        ValueError: it was trained with others than the base is asked with.
    """
    folder = model_folder(name) or Path(name)

    def entry(file: str, *entries: str) -> Any:
        found = folder / file
        try:
            content = found.read_text(encoding="utf-8") if found.is_file() else ""
            of = json.loads(content or "null") if found.suffix == ".json" else content
        except ValueError:
            raise ValueError(f"{name}: its {file} is damaged: {UNMERGED}") from None
        for key in entries:
            of = of.get(key) if isinstance(of, dict) else None
        return of

    formats = [entry("chat_template.jinja"), *(entry(f, "chat_template") for f in
               ("chat_template.json", "tokenizer_config.json", "processor_config.json"))]  # fmt: skip
    known = (processor.chat_template, processor.tokenizer.chat_template)
    if any(isinstance(own, str) and own and own not in known for own in formats):
        raise ValueError(f"{name}: its chat format is not that of its base, which would be asked: {UNMERGED}")
    images, named = processor.image_processor, ("image_processor_type", "processor_class", "feature_extractor_type")
    base = images.to_dict()
    for own in (entry("preprocessor_config.json"), entry("processor_config.json", "image_processor")):
        settings = type(images).from_dict(own).to_dict() if isinstance(own, dict) else base
        if odd := [key for key, value in settings.items() if key not in named and value != base.get(key)]:
            raise ValueError(f"{name}: {odd[0]} of its pictures is not that of its base, which would count: {UNMERGED}")


def _scale(path: str, rank: int, of: dict[str, Any]) -> float:
    patterns = (of.get("alpha_pattern") or {}).items()
    alpha = next((alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", path)), of.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if of.get("use_rslora") else rank)


def _path(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".modules_to_save.", ".")


def _plain(name: str) -> str:
    """A weight's name without the levels that versions of transformers have added or taken away."""
    return ".".join(part for part in name.split(".") if part not in ("model", "vision_model"))
