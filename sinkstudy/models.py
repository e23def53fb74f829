"""Load a vision-language model and say where its parts are.

Every path into a model of the transformers library stands in this file and nowhere else. An architecture is
one `Spec`: the class to load and the dotted paths of its parts. To add one, add a `Spec` to `SPECS` and, when
its vision tower is new, the number of leading tokens that are not patches to `_n_prefix`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    BatchFeature,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from sinkstudy.lab import registers  # noqa: F401  (makes the register tower known to AutoModel)
from sinkstudy.paths import MODELS, lab_models


@dataclass(frozen=True)
class Spec:
    """Where an architecture keeps its parts: dotted paths from the model, attention paths from a layer."""

    model_class: str
    vision: str
    vision_layers: str
    vision_attention: str
    connector: str
    decoder: str
    decoder_layers: str
    decoder_attention: str


SPECS = {  # by model_type of the config
    "llava": Spec(
        model_class="LlavaForConditionalGeneration",
        vision="model.vision_tower",
        vision_layers="model.vision_tower.encoder.layers",
        vision_attention="self_attn",
        connector="model.multi_modal_projector",
        decoder="model.language_model",
        decoder_layers="model.language_model.layers",
        decoder_attention="self_attn",
    ),
}


@dataclass(frozen=True)
class LVLM:
    """A loaded model with its processor, and the names that the study uses for their parts.

    Layers count from 0 and *layer l* always means the residual stream after layer l. The vision sequence is
    `n_prefix` tokens (CLS, registers) and then the patches, row by row.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    name: str
    revision: str | None  # commit of a hub model; None for a local folder
    spec: Spec

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vision(self) -> PreTrainedModel:
        return self.model.get_submodule(self.spec.vision)

    @property
    def decoder(self) -> PreTrainedModel:
        return self.model.get_submodule(self.spec.decoder)

    @property
    def vision_layers(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.spec.vision_layers))

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.spec.decoder_layers))

    @property
    def connector(self) -> nn.Module:
        """The module that maps patches [.., vision width] to visual tokens [.., decoder width]."""
        return self.model.get_submodule(self.spec.connector)

    @property
    def n_prefix(self) -> int:
        """Leading tokens of the vision sequence that are not patches: CLS and registers."""
        return _n_prefix(self.model.config.vision_config)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches; token `n_prefix + row * columns + column` is the patch."""
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    @property
    def feature_layer(self) -> int:
        """Index of the vision layer whose output enters the connector (LLaVA's -2 is the last but one)."""
        layer = self.model.config.vision_feature_layer  # indexes hidden_states, which begin with the embeddings
        n_layers = self.model.config.vision_config.num_hidden_layers
        return n_layers + layer if layer < 0 else layer - 1

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder that stands once for each visual token in `input_ids`."""
        return self.model.config.image_token_id

    def prompt(self, question: str) -> str:
        """The question about one image in the model's own chat format, up to where the answer begins."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True)

    def inputs(self, images: Sequence[Any], questions: Sequence[str]) -> BatchFeature:
        """Model inputs for one question per image, padded on the left, on the model's device.

        Args:
            images: PIL images, or arrays or tensors uint8 [3, height, width]; n of them.
            questions: n plain questions, without the chat format.

        Returns:
            `pixel_values` float [n, 3, height, width] in the model's dtype, `input_ids` and
            `attention_mask` int [n, tokens].

        Raises:
            ValueError: if the numbers of images and questions differ.
        """
        if len(images) != len(questions):
            raise ValueError(f"one question per image: got {len(images)} images and {len(questions)} questions")
        prompts = [self.prompt(question) for question in questions]
        bos = self.processor.tokenizer.bos_token
        batch = self.processor(
            images=list(images),
            text=prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=not (bos and prompts[0].startswith(bos)),  # never two BOS
            return_tensors="pt",
        )
        return batch.to(self.device, dtype=self.model.dtype)

    def visual_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Positions of the visual tokens, long [batch, n_visual]; visual token j is patch j.

        Raises:
            ValueError: if the rows of `input_ids` [batch, tokens] hold different numbers of them, or none.
        """
        visual = input_ids == self.image_token_id
        counts = visual.sum(-1)
        if counts.min() == 0 or counts.min() != counts.max():
            raise ValueError(f"every prompt needs the same number of visual tokens, got {counts.tolist()}")
        return visual.nonzero()[:, 1].view(len(input_ids), -1)


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
) -> LVLM:
    """Load a model for study: evaluation mode, no gradients to weights, SDPA attention.

    Args:
        name: a lab model (a folder of `data/models`), the path of a local folder, or a hub id "owner/name".
        device: "cpu", "cuda", "cuda:1", …; "auto" spreads a large model over the GPUs that are there.
        dtype: "float32", "bfloat16" or "float16"; lab weights are stored in bfloat16 and run in float32.
        revision: commit, tag or branch of a hub model.

    Raises:
        ValueError: unknown model, architecture, dtype or vision layout, or a device that is not there.
    """
    dtype = _dtype(dtype)
    _check_device(device)
    source = find(name)
    config = AutoConfig.from_pretrained(source, revision=revision)
    if config.model_type not in SPECS:
        raise ValueError(f"{name}: architecture {config.model_type!r} is not known; known: {', '.join(SPECS)}")
    _check_layout(name, config)
    spec = SPECS[config.model_type]
    # a progress bar in a notebook is a widget, and a page with a widget asks another host for its scripts
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, spec.model_class).from_pretrained(
        source,
        revision=revision,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map="auto" if device == "auto" else None,
    )
    if device != "auto":
        model = model.to(device)
    # the PIL image processor, because the torchvision one gives slightly different pixels
    processor = AutoProcessor.from_pretrained(source, revision=revision, backend="pil")
    return LVLM(
        model=model.eval().requires_grad_(False),
        processor=processor,
        name=name,
        revision=getattr(config, "_commit_hash", None),
        spec=spec,
    )


def find(name: str) -> str:
    """What `from_pretrained` needs for `name`: a folder's path, or the hub id itself.

    Raises:
        ValueError: if `name` is no lab model, no folder with a config.json, and does not look like a hub id.
    """
    if name in lab_models():
        return str(MODELS / name)
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    looks_like_hub_id = name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))
    if folder.exists() or not looks_like_hub_id:
        known = ", ".join(lab_models()) or "none are there"
        raise ValueError(f"unknown model {name!r}: not a lab model ({known}), a model folder, or a hub id owner/name")
    return name


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in known.values():
        return dtype
    if dtype not in known:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(known)}")
    return known[dtype]


def _check_device(device: str) -> None:
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # torch raises AssertionError where it was built without CUDA
        raise ValueError(f"device {device!r} is not there: {str(error).splitlines()[0]}") from error


def _n_prefix(vision: PretrainedConfig) -> int:
    """Tokens before the patches in the sequence that the vision layers see."""
    if vision.model_type == "clip_vision_model_with_registers":
        return 1 + vision.num_register_tokens
    known = {"clip_vision_model": 1, "siglip_vision_model": 0}
    if vision.model_type not in known:
        raise ValueError(f"vision tower {vision.model_type!r} is not known; known: {', '.join(known)}")
    return known[vision.model_type]


def _check_layout(name: str, config: PretrainedConfig) -> None:
    """The study needs one visual token for each patch, taken from one vision layer."""
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"{name}: vision_feature_layer {config.vision_feature_layer} is not a single layer")
    wanted = "default" if _n_prefix(config.vision_config) else "full"  # "default" drops the first token, CLS
    if config.vision_feature_select_strategy != wanted:
        raise ValueError(f"{name}: visual tokens are not the patches (strategy is not {wanted!r})")
