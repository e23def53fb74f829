"""Architectures of vision-language models: one `Spec` for each, and what follows from a configuration alone.

A `Spec` says which classes to load, where the parts are, and how patches become visual tokens. How to add one stands in
`book/architectures.md`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Spec:
    """Where an architecture keeps its parts: dotted paths from the model, attention paths from a layer.

    The defaults are those of LLaVA: a tower that sees tiles of one size, [tiles, prefix + patches, width], and a
    connector that makes one visual token of each patch.
    """

    model_class: str
    processor_class: str
    vision: str = "model.vision_tower"
    vision_layers: str = "model.vision_tower.encoder.layers"
    vision_attention: str = "self_attn"
    vision_neurons: str = "mlp.fc2"  # the map that reads the neurons of a layer's MLP, behind the nonlinearity
    connector: str = "model.multi_modal_projector"
    deepstack: str | None = None  # further connectors, whose tokens are added to the residual stream of the decoder
    decoder: str = "model.language_model"
    decoder_layers: str = "model.language_model.layers"
    decoder_attention: str = "self_attn"
    # how many patches along each side become one visual token
    merge: int | Callable[[PretrainedConfig], int] = lambda config: 1
    # the order in which the connector reads patches: row by row; the patches of each visual token together; or as
    # "blocks", with the visual tokens of each attention window together
    order: Literal["rows", "blocks", "windows"] = "rows"
    packed: bool = False  # the tower sees all images as one sequence [patches, width], in the connector's order
    anyres: bool = False  # overview, then the tiles put together, padding cut off, with a newline token per row
    prompt: str | None = None  # for a model without chat format
    prefix: int | None = None  # tokens before the patches of a tile; None where `PREFIX` has it
    whole_rows: bool = False  # the connector reads a row of its own width for each patch: several layers side by side
    mixes: bool = False  # each visual token is made of all patches (Q-Former, resampler)
    measured: bool = False  # by `measure.spec`, and so are its layouts
    prefix_mask: bool = False  # the whole prompt sees itself, so that image tokens depend on the question


_QWEN: dict[str, Any] = dict(
    vision="model.visual",
    vision_layers="model.visual.blocks",
    vision_attention="attn",
    connector="model.visual.merger",
    merge=lambda config: config.vision_config.spatial_merge_size,
    packed=True,
)
_IDEFICS: dict[str, Any] = dict(
    processor_class="Idefics3Processor",  # that of SmolVLM does the same and needs num2words for videos
    vision="model.vision_model",
    vision_layers="model.vision_model.encoder.layers",
    connector="model.connector",
    decoder="model.text_model",
    decoder_layers="model.text_model.layers",
    merge=lambda config: config.scale_factor,
)

# By model_type of the config. By hand for speed: to measure takes 3 s for a picture of LLaVA-1.5, a minute for 16.
SPECS = {
    "llava": Spec("LlavaForConditionalGeneration", "LlavaProcessor"),
    "llava_next": Spec("LlavaNextForConditionalGeneration", "LlavaNextProcessor", anyres=True),
    "llava_onevision": Spec("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor", anyres=True),
    "qwen2_vl": Spec("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", order="blocks", **_QWEN),
    "qwen2_5_vl": Spec(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
        order="windows",
        vision_neurons="mlp.down_proj",
        **_QWEN,
    ),
    "qwen3_vl": Spec(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLProcessor",
        order="blocks",
        vision_neurons="mlp.linear_fc2",
        deepstack="model.visual.deepstack_merger_list",
        **_QWEN,
    ),
    "internvl": Spec(
        "InternVLForConditionalGeneration",
        "InternVLProcessor",
        vision_layers="model.vision_tower.encoder.layer",
        vision_attention="attention",
        merge=lambda config: round(1 / config.downsample_ratio),
        order="blocks",
    ),
    "paligemma": Spec(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaProcessor",
        prompt="<image>answer en {question}",
        prefix_mask=True,
    ),
    "gemma3": Spec(
        "Gemma3ForConditionalGeneration",
        "Gemma3Processor",
        merge=lambda config: tile_grid(config)[0] // round(config.mm_tokens_per_image**0.5),
    ),
    "aya_vision": Spec(
        "AyaVisionForConditionalGeneration", "AyaVisionProcessor", merge=lambda config: config.downsample_factor
    ),
    "idefics3": Spec("Idefics3ForConditionalGeneration", **_IDEFICS),
    "smolvlm": Spec("SmolVLMForConditionalGeneration", **_IDEFICS),
}

# tokens before the patches in the sequence that the layers of a tower see: CLS (and registers, see `n_prefix`)
PREFIX = {
    "clip_vision_model": 1,
    "clip_vision_model_with_sinks": 1,
    "siglip_vision_model": 0,
    "internvl_vision": 1,
    "idefics3_vision": 0,
    "smolvlm_vision": 0,
    "qwen2_vl_vision": 0,
    "qwen2_5_vl_vision": 0,
    "qwen3_vl_vision": 0,
}


def n_prefix(vision: PretrainedConfig) -> int:
    """Tokens before the patches in the sequence that the vision layers see."""
    if vision.model_type == "clip_vision_model_with_registers":
        return 1 + vision.num_register_tokens
    if vision.model_type not in PREFIX:
        raise ValueError(
            f"vision tower {vision.model_type!r} is not known; known: {', '.join(PREFIX)}; "
            "how to add one: book/architectures.md"
        )
    return PREFIX[vision.model_type]


def tile_grid(config: PretrainedConfig) -> tuple[int, int]:
    """(rows, columns) of the patches of a tile of a tower that sees tiles of one size."""
    image, patch = config.vision_config.image_size, config.vision_config.patch_size
    (high, wide), (patch_high, patch_wide) = pair(image), pair(patch)
    return high // patch_high, wide // patch_wide


def entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a configuration as a dict, and those of its parts."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from entries(value)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of what a configuration gives as one number where both are the same."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
