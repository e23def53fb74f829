"""A tiny random LLaVA, made here without any download."""

from pathlib import Path

import architectures
import torch
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


def write_tiny_llava(folder: Path, tower: str) -> None:
    """4 x 4 patches, 3 vision layers of 2 heads, 3 decoder layers of 4 heads that share 2 key heads."""
    words = architectures.knowing(WORDS)
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    processor = LlavaProcessor(
        CLIPImageProcessorPil(**architectures.CROP),
        PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **architectures.ENDS),
        patch_size=8,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        num_additional_image_tokens=0 if tower == "siglip" else 1,
        chat_template=architectures.CHAT.replace("IMAGE", "<image>"),
    )
    # large initial weights, so that attention is far from uniform
    towers = {
        "clip": lambda: CLIPVisionConfig(**architectures.CLIP),
        "registers": lambda: CLIPVisionWithRegistersConfig(**architectures.CLIP),
        "siglip": lambda: SiglipVisionConfig(**architectures.TOWER),
    }
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=towers[tower](),
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        text_config=LlamaConfig(**architectures.TEXT | {"vocab_size": len(WORDS)}),
        image_token_index=4,
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
