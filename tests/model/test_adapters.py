"""A folder with an adapter of peft and its base, against peft itself and against the closed form."""

import math
import shutil
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from architectures import configure, write
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from sinkstudy.book import memory, parameters
from sinkstudy.model import adapters, loading

WEIGHTS = "adapter_model.safetensors"
KINDS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "some larger": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5},
                    "alpha_pattern": {"v_proj": 2}},
    "a layer whole": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
}  # fmt: skip


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def base(request, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("base") / request.param, request.param)


def adapter(base: Path, folder: Path, **how) -> torch.nn.Module:
    """Write an adapter with random updates, and return the model with it."""
    torch.manual_seed(1)
    model = loading.load(str(base)).model
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "init_lora_weights": False, **how})
    made = peft.get_peft_model(model, config)
    for name, weight in made.named_parameters():
        if "modules_to_save" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    made.save_pretrained(folder, save_embedding_layers=False)
    settle(folder, base_model_name_or_path=str(base))
    return made


def logits(lvlm, model) -> torch.Tensor:
    inputs = lvlm.inputs([Image.linear_gradient("L").convert("RGB").resize((32, 32))], ["what is the texture"])
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_under_peft(base, tmp_path, kind):
    theirs = adapter(base, tmp_path / "adapter", **KINDS[kind])
    lvlm, plain = loading.load(str(tmp_path / "adapter")), loading.load(str(base))
    assert lvlm.name == str(tmp_path / "adapter")
    wanted = logits(lvlm, theirs)
    assert (logits(lvlm, lvlm.model) - wanted).abs().max() < 1e-4
    assert (logits(plain, plain.model) - wanted).abs().max() > 1e-2
    memory.check(str(tmp_path / "adapter"))


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_update_is_its_closed_form(base, tmp_path, stabilised):
    adapter(base, tmp_path / "adapter", target_modules=["q_proj"], use_rslora=stabilised, layers_to_transform=[1])
    found = dict(loading.load(str(tmp_path / "adapter")).model.named_parameters())
    before = dict(loading.load(str(base)).model.named_parameters())
    file = load_file(tmp_path / "adapter" / WEIGHTS)
    changed = [name for name in before if not torch.equal(found[name], before[name])]
    expected = {key for key in file if key.endswith("lora_A.weight")}
    assert len(changed) == len(expected) > 0
    for name in changed:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        scale = 7 / (math.sqrt(3) if stabilised else 3)
        update = scale * file[f"{key}.lora_B.weight"] @ file[f"{key}.lora_A.weight"]
        torch.testing.assert_close(found[name] - before[name], update, atol=1e-6, rtol=1e-5)


def test_linear_weights_are_never_transposed(base, tmp_path):
    """Whatever `fan_in_fan_out` says, also of square ones; as in peft."""
    theirs = adapter(base, tmp_path / "adapter", target_modules=r".*language_model.*\.1\.self_attn\.q_proj")
    settle(tmp_path / "adapter", fan_in_fan_out=True)
    lvlm = loading.load(str(tmp_path / "adapter"))
    assert (logits(lvlm, lvlm.model) - logits(lvlm, theirs)).abs().max() < 1e-4


@pytest.mark.parametrize("turned", [False, True])
def test_weights_of_gpt2_are_transposed(turned, tmp_path):
    """Those of the class of which peft says so, with `fan_in_fan_out` or without."""
    torch.manual_seed(2)
    base = torch.nn.ModuleDict({"c_attn": Conv1D(4, 4)})
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, init_lora_weights=False, fan_in_fan_out=turned)
    theirs = peft.get_peft_model(deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    settle(tmp_path, base_model_name_or_path="base")
    adapters.read(str(tmp_path)).merge(base)
    x = torch.randn(3, 4)
    torch.testing.assert_close(base["c_attn"](x), theirs.base_model.model["c_attn"](x))


OLD = {  # names of transformers 4
    "llava": {"model.language_model.": "language_model.model.",
              "model.vision_tower.encoder": "vision_tower.vision_model.encoder"},
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}  # fmt: skip


def test_names_of_older_versions(base, tmp_path):
    adapter(base, tmp_path / "adapter", target_modules="all-linear")
    wanted = dict(loading.load(str(tmp_path / "adapter")).model.named_parameters())
    names = {f"base_model.model.{new}": f"base_model.model.{old}" for new, old in OLD[base.name].items()}
    rename(tmp_path / "adapter", names)
    found = dict(loading.load(str(tmp_path / "adapter")).model.named_parameters())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_pages_follow_from_adapter_and_base(base, tmp_path):
    adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    values = parameters.defaults("01-norms") | {"model": str(tmp_path / "adapter"), "controls": []}
    files = parameters.model_files("01-norms", values)
    assert {tmp_path / "adapter" / WEIGHTS, base / "model.safetensors"} < set(files)


# ------------------------------------------------------------------------------------------------- refused
@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    write(folder / "base", "llava")
    adapter(folder / "base", folder / "adapter", target_modules=["q_proj"])
    return folder / "adapter"


@pytest.fixture
def copy(one, tmp_path) -> Path:
    """The adapter, with a base of its own beside it."""
    shutil.copytree(one.parent / "base", tmp_path / "base")
    folder = Path(shutil.copytree(one, tmp_path / "copy"))
    settle(folder, base_model_name_or_path=str(tmp_path / "base"))
    return folder


def settle(folder: Path, **settings) -> None:
    configure(folder, "adapter_config.json", **settings)


def rename(folder: Path, names: dict[str, str]) -> None:
    renamed = {}
    for key, value in load_file(folder / WEIGHTS).items():
        for new, old in names.items():
            key = key.replace(new, old)
        renamed[key] = value
    assert renamed.keys() != load_file(folder / WEIGHTS).keys()
    save_file(renamed, folder / WEIGHTS)


def change(folder: Path, end: str, by) -> None:
    weights = load_file(folder / WEIGHTS)
    key = next(key for key in weights if key.endswith(end))
    new = by(key, weights.pop(key))
    save_file({**weights, **new}, folder / WEIGHTS)


def beside(folder: Path, file: str, old: str, new: str) -> None:
    """A file of the base's processor in the adapter's folder, changed."""
    content = (folder.parent / "base" / file).read_text()
    assert old in content
    (folder / file).write_text(content.replace(old, new))


def tie(folder: Path) -> None:
    """The base's output layer is its embedding, and the adapter has one of the two."""
    base = folder.parent / "base"
    configure(base, tie_word_embeddings=True, text_config__tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    head = next(key for key in weights if "lm_head" in key)
    kept = {key: value for key, value in weights.items() if key != head}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    key = "base_model.model.model.language_model.embed_tokens.weight"
    save_file(load_file(folder / WEIGHTS) | {key: weights[head] + 1}, folder / WEIGHTS)
    settle(folder, modules_to_save=["embed_tokens"])


FAULTS = {
    "DoRA": (lambda folder: settle(folder, use_dora=True), "has use_dora True, which is not merged here"),
    "biases": (lambda folder: settle(folder, bias="all"), "has bias 'all', which is not merged here"),
    "a changed base": (lambda folder: settle(folder, init_lora_weights="pissa"), "'pissa', which is not merged"),
    "another method": (lambda folder: settle(folder, peft_type="IA3"), "has peft_type 'IA3', which is not"),
    "a setting of later versions": (lambda folder: settle(folder, use_new=True), "has use_new True, which"),
    "no base": (lambda folder: settle(folder, base_model_name_or_path=None), "has no base"),
    "a base that is not there": (lambda folder: settle(folder, base_model_name_or_path="/none"), "unknown model"),
    "damaged settings": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "cannot be read"),
    "pickled weights": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "cannot be read"),
    "half a pair": (lambda folder: change(folder, "lora_B.weight", lambda key, _: {}), r"lacks .*lora_B.weight"),
    "another shape": (lambda folder: change(folder, "lora_B.weight", lambda key, w: {key: w[:4].contiguous()}),
                      r"is \[4, .*\] and its base has"),
    "NaN": (lambda folder: change(folder, "lora_B.weight", lambda key, w: {key: w * float("nan")}), "NaN or infinite"),
    "no such weight": (lambda folder: rename(folder, {"q_proj": "x_proj"}), "has no weights .*x_proj.weight"),
    "an embedding that is also the output layer": (tie, "is .* too in its base, and was trained alone"),
    "no scale": (lambda folder: settle(folder, lora_alpha=None), "has lora_alpha None"),
    "a scale as text": (lambda folder: settle(folder, alpha_pattern={"q_proj": "8"}), "has lora_alpha '8'"),
    "another chat format": (lambda folder: beside(folder, "chat_template.jinja", "assistant", "answer"),
                            "its chat format is not that of its base"),
    "other pictures": (lambda folder: beside(folder, "preprocessor_config.json", "0.48145466", "0.5"),
                       "image_mean of its pictures is not that of its base"),
    "a damaged processor": (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "is damaged"),
    "an embedding": (lambda folder: change(folder, "lora_B.weight", lambda key, w: {f"{key}.lora_embedding_A": w}),
                     "lora_embedding_A, which is not merged"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(copy, fault):
    spoil, message = FAULTS[fault]
    spoil(copy)
    for call in (memory.check, loading.load):
        with pytest.raises(ValueError, match=message) as problem:
            call(str(copy))
        assert "\n" not in str(problem.value)


def test_the_processor_of_its_base_may_lie_beside_it(copy):
    for file in ("chat_template.jinja", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        shutil.copy(copy.parent / "base" / file, copy)
    loading.load(str(copy)).processor.save_pretrained(copy)  # as a trainer does
    loading.load(str(copy))


def test_a_revision_of_a_folder(copy):
    with pytest.raises(ValueError, match="is a folder and has no revision 'v1'"):
        loading.load(str(copy), revision="v1")
