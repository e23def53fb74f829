"""Tiny random LLaVAs, made here without any download, and the lab models where their weights are there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, TEXT, TOWER, write
from PIL import Image
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

from sinkstudy import paths
from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM
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


@pytest.fixture(scope="session", params=["clip", "registers"])
def tiny(request, tmp_path_factory) -> LVLM:
    folder = tmp_path_factory.mktemp(f"tiny-{request.param}")
    write_tiny_llava(folder, request.param)
    return loading.load(str(folder))


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory) -> LVLM:
    folder = tmp_path_factory.mktemp("tiny-siglip")
    write_tiny_llava(folder, "siglip")
    return loading.load(str(folder))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory) -> str:
    """A tiny random model of every architecture, on disk."""
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, request.param)
    return str(folder)


@pytest.fixture(scope="module")
def lvlm(folder) -> LVLM:
    """The same, loaded."""
    return loading.load(folder)


@pytest.fixture(scope="session")
def eager(tiny) -> LlavaForConditionalGeneration:
    """The same weights under eager attention, the reference that returns whole attention maps."""
    return LlavaForConditionalGeneration.from_pretrained(tiny.name, attn_implementation="eager", dtype="float32").eval()


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Three lengths, so that a batch needs padding."""
    return ["how many", "what is the texture", "what is the texture red blue yes no"]


@pytest.fixture(scope="session", params=["lab-llava", "lab-llava-sinks", "lab-llava-registers"])
def lab(request) -> LVLM:
    if request.param not in paths.lab_models():
        pytest.skip(f"the weights of {request.param} are not there")
    return loading.load(request.param)
