"""Inputs for any architecture, made from its configuration alone: no processor, no tokenizer, no download."""

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
GLM = {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
FITTING = {  # where a configuration's defaults do not fit each other, or the small pictures
    "aria": {"projector_patch_to_query_dict": {64: 16}, "max_value_projector_patch_to_query_dict": 16},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense"] + ["sparse"] * 11},
    "unlimited_ocr": {"text_config.mlp_layer_types": ["dense"] + ["sparse"] * 11},
    **{kind: {"image_token_id": 18} for kind in ("nemotron_h_omni", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "step3p7": {"text_config.sliding_window": 512},
    "hunyuan_vl": {
        "text_config.head_dim": 128,
        "text_config.rope_parameters": {**ROPE, "mrope_section": [16, 16, 16, 16]},
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**ROPE, "mrope_section": [22, 22, 20]}},
    **{
        kind: {"text_config.rope_parameters": GLM, "text_config.head_dim": 128}
        for kind in ("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga")
    },
    **{
        kind: {"text_config.rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]}}
        for kind in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl")
    },
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "text_config.rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]},
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652, "vision_end_token_id": 151653},
}


def small(kind: str) -> PretrainedConfig:
    """The default configuration of an architecture with tiles of 8 x 8 patches, where it has tiles of one size."""
    config = CONFIG_MAPPING[kind]()
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if size and patch and not isinstance(vision, dict):
        old, new = first(size), 8 * first(patch)
        vision.image_size = new if isinstance(size, int) else [new, new]
        if getattr(config, "image_grid_pinpoints", None):
            config.image_grid_pinpoints = [[side * new // old for side in one] for one in config.image_grid_pinpoints]
        if hasattr(config, "mm_tokens_per_image"):
            config.mm_tokens_per_image = 16
    for path, value in FITTING.get(kind, {}).items():
        part, _, key = path.rpartition(".")
        setattr(getattr(config, part) if part else config, key, value)
    return config


def first(value: Any) -> int:
    return value[0] if isinstance(value, (list, tuple)) else value


def pictures(model: PreTrainedModel, grids: list[tuple[int, int]], other: bool = False) -> dict[str, Any]:
    """Random pictures in the form that the model takes, as many patches high and wide as it lets them be.

    Args:
        other: in the rarer form: a patch of a packed tower is [3, height, width] and not one row of values; tiles and
            not pixels are marked as real.
    """
    config = model.config
    vision = getattr(config, "vision_config", config)
    seeing = getattr(model, "get_image_features", model.forward)
    takes = {**inspect.signature(seeing).parameters, **inspect.signature(model.forward).parameters}
    patch = first(getattr(vision, "patch_size", 16))
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random)

    grid = next((name for name in ("image_grid_thw", "image_grid_hws", "image_grid_hw") if name in takes), None)
    if grid:
        n = sum(rows * columns for rows, columns in grids)
        values = 3 * getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1)) * patch**2
        sizes = torch.tensor([[1, *g] if grid.endswith("thw") else list(g) for g in grids])
        more = {"image_merge_sizes": torch.full((len(grids),), 2)} if "image_merge_sizes" in takes else {}
        return {"pixel_values": noise(n, 3, patch, patch) if other else noise(n, values), grid: sizes, **more}
    if model.config.model_type.startswith("minicpm"):  # patches side by side in one long picture
        n = sum(rows * columns for rows, columns in grids)
        return {"pixel_values": noise(1, 3, patch, n * patch), "target_sizes": torch.tensor(grids)}
    if "spatial_shapes" in takes:
        longest = max(rows * columns for rows, columns in grids)
        mask = torch.stack([(torch.arange(longest) < rows * columns).long() for rows, columns in grids])
        return {
            "pixel_values": noise(len(grids), longest, 3 * patch**2),
            "spatial_shapes": torch.tensor(grids),
            "pixel_attention_mask": mask,
        }
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if "image_sizes" in inspect.signature(seeing).parameters and not pinpoints:
        high, wide = (patch * max(side) for side in zip(*grids))
        sizes = torch.tensor([[patch * rows, patch * columns] for rows, columns in grids])
        return {"pixel_values": noise(len(grids), 3, high, wide), "image_sizes": sizes}
    size = first(getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 224)
    if pinpoints:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        sizes = [[rows * size // 8, columns * size // 8] for rows, columns in grids]
        tiles = [image_size_to_num_patches(one, pinpoints, size) for one in sizes]
        return {"pixel_values": noise(len(grids), max(tiles), 3, size, size), "image_sizes": torch.tensor(sizes)}
    if "pixel_attention_mask" in takes:
        whole = torch.ones(len(grids), 1, *(() if other else (size, size)), dtype=torch.bool)
        return {"pixel_values": noise(len(grids), 1, 3, size, size), "pixel_attention_mask": whole}
    return {"pixel_values": noise(len(grids), 3, size, size)}


def features(model: PreTrainedModel, given: dict[str, Any]) -> list[int]:
    """How many visual tokens each picture has."""
    part = model if hasattr(model, "get_image_features") else model.model
    seen = part.get_image_features(**given)
    seen = getattr(seen, "pooler_output", None) if getattr(seen, "pooler_output", None) is not None else seen
    seen = getattr(seen, "last_hidden_state", seen)
    pictures = len(next((v for k, v in given.items() if k != "pixel_values"), given["pixel_values"]))
    if isinstance(seen, torch.Tensor):
        return [seen.numel() // seen.shape[-1] // pictures] * pictures
    counts = [one.numel() // one.shape[-1] for one in seen]
    return counts if len(counts) == pictures else [sum(counts) // pictures] * pictures


def inputs(model: PreTrainedModel, grids: list[tuple[int, int]], together: bool = False) -> dict[str, Any]:
    """A prompt for each picture, or one for all `together`, padded on the left."""
    config, given = model.config, pictures(model, grids)
    try:
        counts = features(model, given)
    except (RuntimeError, ValueError, IndexError) as error:
        given = pictures(model, grids, other=True)
        try:
            counts = features(model, given)
        except Exception:
            raise error from None
    image = getattr(config, "image_token_id", None)
    if image is None:
        raise ValueError("no token stands for a picture")
    taken = {v for k, v in config.to_dict().items() if isinstance(v, int) and "token" in k}
    words = [i for i in range(100, 130) if i not in taken]
    start, end = getattr(config, "vision_start_token_id", words[5]), getattr(config, "vision_end_token_id", words[6])
    blocks = [[start, *[image] * n, end] for n in counts]
    rows = [sum(blocks, [])] if together else blocks
    rows = [[words[0], words[1], *row, *words[2 : 5 + i]] for i, row in enumerate(rows)]
    longest = max(map(len, rows))
    pad = torch.tensor([[words[9]] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    made = {"input_ids": pad, "attention_mask": mask, **given}
    takes = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in takes:
            made[name] = (pad == image).long()
    return made


def blocks(model: PreTrainedModel) -> bool:
    """Does the processor put the patches of a visual token together? It does where the tower takes a temporal grid."""
    return "image_grid_thw" in inspect.signature(model.forward).parameters
