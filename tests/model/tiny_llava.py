"""A tiny random LLaVA, made here without any download."""

from pathlib import Path

import torch
from architectures import TEXT, TOWER
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from sinkstudy.model.registers import CLIPVisionWithRegistersConfig

WORDS = "<pad> <s> </s> <unk> <image> user : assistant what is the texture how many red blue yes no".split()
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def write_tiny_llava(folder: Path, tower: str) -> None:
    """4 x 4 patches, 3 vision layers of 2 heads, 3 decoder layers of 4 heads that share 2 key heads."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        num_additional_image_tokens=0 if tower == "siglip" else 1,
        chat_template=CHAT,
    )
    # large initial weights, so that attention is far from uniform
    towers = {
        "clip": lambda: CLIPVisionConfig(**TOWER, initializer_factor=3.0),
        "registers": lambda: CLIPVisionWithRegistersConfig(**TOWER, initializer_factor=3.0),
        "siglip": lambda: SiglipVisionConfig(**TOWER),
    }
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=towers[tower](),
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        text_config=LlamaConfig(**TEXT | {"vocab_size": len(WORDS)}),
        image_token_index=4,
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
