"""Tiny random LLaVAs, made here without any download, and the lab models where their weights are there."""

import architectures
import noise
import pytest
from PIL import Image
from tiny_llava import write_tiny_llava
from transformers import LlavaForConditionalGeneration

from sinkstudy import paths
from sinkstudy.model import loading
from sinkstudy.model.lvlm import LVLM


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


@pytest.fixture(scope="module", params=architectures.ARCHITECTURES)
def folder(request, tmp_path_factory) -> str:
    """A tiny random model of every architecture, on disk."""
    return str(architectures.write(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def lvlm(folder) -> LVLM:
    """The same, loaded."""
    return loading.load(folder)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> LVLM:
    return architectures.load(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="session")
def eager(tiny) -> LlavaForConditionalGeneration:
    """The same weights under eager attention, the reference that returns whole attention maps."""
    return LlavaForConditionalGeneration.from_pretrained(tiny.name, attn_implementation="eager", dtype="float32").eval()


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    return noise.pictures([(32, 32)] * 3)


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Three lengths, so that a batch needs padding."""
    return ["how many", "what is the texture", "what is the texture red blue yes no"]


@pytest.fixture(scope="session", params=["lab-llava", "lab-llava-sinks", "lab-llava-registers"])
def lab(request) -> LVLM:
    if request.param not in paths.lab_models():
        pytest.skip(f"the weights of {request.param} are not there")
    return loading.load(request.param)
