"""A tiny random instance of every architecture, written as a model folder like those of the hub, without any download.

Every folder has the weights, the configuration, the image processor, the tokenizer and the chat format. Weights are
large, so that attention is far from uniform. Towers have three layers of two heads and patches of 8 x 8 pixels.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM

SPECIAL = "<pad> <s> </s> <unk> <image> <video> <boi> <eoi> <fake_token_around_image> <end_of_utterance>".split()
SPECIAL += ["<global-img>"] + [f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2, 3)]
SPECIAL += "<|IMG_PATCH|> <|START_OF_IMG|> <|END_OF_IMG|> TILE TILE_GLOBAL".split()
WORDS = SPECIAL + "user : assistant answer en what is the texture how many red blue yes no".split()
NAMED = {  # the processors ask the tokenizer for these
    "image_token": "<image>",
    "context_image_token": "<image>",
    "video_token": "<video>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "start_image_token": "<boi>",
    "end_image_token": "<eoi>",
}
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
TOWER = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
)
CLIP = dict(TOWER, initializer_factor=3.0)
CROP = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
PATCHES = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
TEXT = dict(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def llava() -> tuple:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=4,
        image_seq_length=16,
    )
    return config, hf.CLIPImageProcessorPil(**CROP), PATCHES


def llava_siglip_qwen2() -> tuple:
    config = hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER),
        text_config=hf.Qwen2Config(**TEXT),
        vision_feature_select_strategy="full",
        image_token_index=4,
        image_seq_length=16,
    )
    settings = dict(patch_size=8, vision_feature_select_strategy="full", num_additional_image_tokens=0)
    return config, hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}), settings


def vipllava() -> tuple:
    """Without a `Spec`: its parts are measured. The connector reads two layers at once."""
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        vision_feature_layers=[-2, -3],
        image_token_index=4,
        image_seq_length=16,
    )
    return config, hf.CLIPImageProcessorPil(**CROP), PATCHES


def llava_next(layers: int | list[int] = -2) -> tuple:
    """Granite Vision is one whose connector reads several layers side by side."""
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=layers,
        image_token_index=4,
    )
    return config, hf.LlavaNextImageProcessorPil(**CROP, image_grid_pinpoints=PINPOINTS), PATCHES


def llava_onevision() -> tuple:
    """At most two tiles' worth of tokens, so that four tiles are shrunk."""
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER),
        text_config=hf.Qwen2Config(**TEXT),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=4,
        video_token_index=5,
        vision_aspect_ratio="anyres_max_2",
    )
    images = hf.LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    return config, images, dict(
        num_image_tokens=16, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2"
    )


def qwen(version: str) -> tuple:
    common = dict(depth=3, num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2)
    vision = {
        "Qwen2VL": dict(embed_dim=16, hidden_size=32, mlp_ratio=2),
        "Qwen2_5_VL": dict(
            hidden_size=16, out_hidden_size=32, intermediate_size=32, window_size=32, fullatt_block_indexes=[1]
        ),
        "Qwen3VL": dict(
            hidden_size=16,
            out_hidden_size=32,
            intermediate_size=32,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        ),
    }[version]
    config = getattr(hf, f"{version}Config")(
        vision_config={**common, **vision, "initializer_range": 0.3},
        text_config={**TEXT, "rope_parameters": MROPE, "head_dim": 8},
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 64 * 64}
    )
    return config, images, {}


def internvl() -> tuple:
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(
            **{**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
            initializer_range=0.3,
            layer_scale_init_value=1.0,
        ),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=4,
    )
    images = hf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4)
    return config, images, dict(image_seq_length=4)


def aya_vision() -> tuple:
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=hf.Cohere2Config(**TEXT, sliding_window=12, layer_types=LAYER_TYPES),
        image_token_index=WORDS.index("<|IMG_PATCH|>"),
        downsample_factor=2,
        alignment_intermediate_size=32,
    )
    images = hf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4)
    return config, images, dict(patch_size=8, img_size=32, downsample_factor=2)


def paligemma() -> tuple:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, projection_dim=32, vision_use_head=False),
        text_config=hf.GemmaConfig(**TEXT, head_dim=8),
        image_token_index=4,
        projection_dim=32,
    )
    images = hf.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    return config, images, {}


def gemma3() -> tuple:
    """8 x 8 patches pooled to 2 x 2 tokens; local layers see 12 tokens back."""
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**{**TOWER, "image_size": 64}, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(
            **TEXT,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=12,
            layer_types=LAYER_TYPES,
        ),
        image_token_index=4,
        boi_token_index=6,
        eoi_token_index=7,
        mm_tokens_per_image=4,
    )
    images = hf.Gemma3ImageProcessorPil(size={"height": 64, "width": 64})
    return config, images, dict(image_seq_length=4)


def idefics(version: str) -> tuple:
    config = getattr(hf, f"{version}Config")(
        vision_config=TOWER | {"initializer_range": 0.3},
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=4,
        scale_factor=2,
        pad_token_id=0,
    )
    images = getattr(hf, f"{version}ImageProcessorPil")(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    return config, images, dict(image_seq_len=4)


ARCHITECTURES = {
    "llava": llava,
    "llava-siglip-qwen2": llava_siglip_qwen2,
    "llava_next": llava_next,
    "llava_next-layers": lambda: llava_next([-3, 1, -1]),
    "llava_onevision": llava_onevision,
    "qwen2_vl": lambda: qwen("Qwen2VL"),
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VL"),
    "qwen3_vl": lambda: qwen("Qwen3VL"),
    "internvl": internvl,
    "aya_vision": aya_vision,
    "paligemma": paligemma,
    "gemma3": gemma3,
    "idefics3": lambda: idefics("Idefics3"),
    "smolvlm": lambda: idefics("SmolVLM"),
}
MEASURED = {"vipllava": vipllava}


def knowing(words: list[str]) -> Tokenizer:
    """A tokenizer of these words."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return made


def write(folder: Path, name: str) -> Path:
    """Write the tiny model folder of an architecture, and return it."""
    torch.manual_seed(0)
    config, image_processor, processor = (ARCHITECTURES | MEASURED)[name]()
    spec = loading.spec_of(name, config.model_type)
    model = getattr(hf, spec.model_class)(config)
    for parameter in model.parameters():  # biases, zero at first, must not hide a wrong order
        if parameter.ndim == 1 or parameter.std() < 0.05:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    words = knowing(WORDS)
    words.add_special_tokens(SPECIAL)
    hf.PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=NAMED, **ENDS).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": spec.processor_class, **processor}))
    if not spec.prompt:
        image = "<boi>" if name == "gemma3" else "<image>"
        (folder / "chat_template.jinja").write_text(CHAT.replace("IMAGE", image))
    return folder


def load(folder: Path, name: str, **how: Any) -> LVLM:
    """The tiny model of an architecture, written and loaded."""
    return loading.load(str(write(folder, name)), **how)


def configure(folder: Path, file: str = "config.json", **entries: Any) -> None:
    """Change entries of a configuration; `part__entry` is one of a part."""
    config = json.loads((folder / file).read_text())
    for key, value in entries.items():
        *part, entry = key.split("__")
        (config[part[0]] if part else config)[entry] = value
    (folder / file).write_text(json.dumps(config))
