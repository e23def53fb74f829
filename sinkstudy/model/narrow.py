"""A narrow copy of a model: the configuration's classes, grids and merges, but few layers, few heads and one width.

Which patch ends in which visual token follows from the configuration, not from widths or weights. A narrow copy with
random weights therefore shows it in milliseconds, for a model of any size and without its weights.
"""

import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from sinkstudy.model.specs import entries

WIDTH, HEADS, HEAD, INNER, RANK, LAYERS, VOCABULARY = 128, 4, 32, 512, 32, 4, 512

# by the end of a key: what a number there becomes. Every width becomes the same one, so that all parts still fit.
_RULES: list[tuple[str, int]] = [
    (r"vocab_size(_per_layer_input)?$", VOCABULARY),
    (r"(num_hidden_layers|depth|n_layers|num_layers|encoder_layers|decoder_layers)$|^layers$", LAYERS),
    (r"(key_value_heads|num_key_heads)$", HEADS // 2),
    (r"(attention_heads|num_heads|n_heads|num_value_heads|mamba_num_heads)$", HEADS),
    (r"(num_experts|n_routed_experts|num_local_experts)$", 4),
    (r"(num_experts_per_tok|moe_k|moe_topk)$", 2),
    (r"(n_shared_experts|num_shared_experts|n_group|topk_group)$", 1),
    (r"qk_head_dim$", 2 * HEAD),
    (r"(head_dim|d_kv|query_pre_attn_scalar|ssm_state_size)$", HEAD),
    (r"lora_rank$", RANK),
    (r"(intermediate_size(_mlp)?|ffn_dim|mlp_dim|d_ff|expert_dim)$", INNER),
    (
        r"(hidden_size|hidden_dim|embed_dim|d_model|projection_dim|out_dim|in_dim|output_dim|input_dim|"
        r"hidden_size_per_layer_input|image_token_embed_dim|word_embed_proj_dim|downsample_channels)$",
        WIDTH,
    ),
]
_TOKEN = re.compile(r"(token_ids?|token_index|_start_id|_end_id|image_patch_id|newline_id)$")
_LAYERS_LISTED = re.compile(r"(indexes|indices|_idxs|_layers|feature_layer|vision_layer|source_layers|layer_ids?)$")


def narrow(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration with small widths: what says how a picture is cut, merged and ordered stays."""
    return CONFIG_MAPPING[config.model_type].from_dict(_narrowed(config.to_dict(), token_numbers(config)))


def token_numbers(config: PretrainedConfig) -> dict[int, int]:
    """The ids that a configuration names, and what they are in the vocabulary of its narrow copy."""
    named = [value for key, value in entries(config.to_dict()) if _TOKEN.search(str(key))]
    tokens = {v for value in named for v in (value if isinstance(value, list) else [value]) if _is_number(v) and v >= 0}
    return {token: place for place, token in enumerate(sorted(tokens))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _narrowed(config: dict[str, Any], tokens: dict[int, int], head: int | None = None) -> dict[str, Any]:
    layers = _layers(config) or LAYERS
    counted = _layers(config) or _layers(config.get("vision_config") or {}) or LAYERS  # what names of layers refer to
    heads = next((v for k, v in config.items() if re.search(_RULES[3][0], str(k)) and _is_number(v)), HEADS)
    width = next((config[k] for k in ("hidden_size", "embed_dim") if _is_number(config.get(k))), None)
    head = config.get("head_dim") or (width // heads if width else head)
    indexes = sorted(map(str, range(layers)))  # a list of all layers is none of what each layer is
    made: dict[str, Any] = {}
    for key, value in config.items():
        name = str(key)
        rule = next((number for pattern, number in _RULES if re.search(pattern, name)), None)
        if name == "per_layer_config" and value:
            made[key] = {layer: _narrowed(of, tokens, head) for layer, of in value.items() if int(layer) < LAYERS}
        elif isinstance(value, dict):
            made[key] = _narrowed(value, tokens, head)
        elif value is None or isinstance(value, bool):
            made[key] = value
        elif _TOKEN.search(name):
            made[key] = [tokens.get(v, v) for v in value] if isinstance(value, list) else tokens.get(value, value)
        elif name == "mrope_section":
            made[key] = _section(value, head or HEAD)
        elif rule is not None and isinstance(value, list) and len(value) == layers:
            made[key] = [rule] * LAYERS
        elif isinstance(value, list) and value and len(value) == layers and sorted(map(str, value)) != indexes:
            made[key] = _each_kind(value)
        elif rule is None and _LAYERS_LISTED.search(name) and isinstance(value, (list, int)):
            listed = [_scaled(v, layers if v < 0 else counted) for v in (value if isinstance(value, list) else [value])]
            made[key] = list(dict.fromkeys(listed)) if isinstance(value, list) else listed[0]
        elif rule is not None and isinstance(value, list):
            made[key] = [rule for _ in value]
        elif rule is not None and _is_number(value) and value > 0:
            made[key] = HEADS if rule == HEADS // 2 and value >= heads and "key_value" in name else rule
        else:
            made[key] = value
    return made


def _layers(config: dict[str, Any]) -> int | None:
    return next((v for k, v in config.items() if re.search(_RULES[1][0], str(k)) and _is_number(v)), None)


def _section(section: list[int], head: int) -> list[int]:
    """Parts of a rotary embedding for time, row and column, of heads as narrow as `HEAD`."""
    parts = [max(1, part * HEAD // head) for part in section[:-1]]
    return [*parts, sum(section) * HEAD // head - sum(parts)]


def _each_kind(values: list) -> list:
    """`LAYERS` values with one of each kind, in their order, the last kind at the end."""
    kinds = [value for index, value in enumerate(values) if value not in values[:index]][:LAYERS]
    return [kinds[0]] * (LAYERS - len(kinds)) + kinds


def _scaled(layer: int, layers: int) -> int:
    """A layer's place among `LAYERS`, counted from the same end."""
    return max(layer * LAYERS // layers, -LAYERS) if layer < 0 else min(layer * LAYERS // layers, LAYERS - 1)
