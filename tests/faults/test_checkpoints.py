"""Checkpoints as they are found: what is absent, left over, damaged or foreign is refused by name, before work begins.

Each fault is tried on a tiny random model of every architecture.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sinkstudy import memory, models

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A copy of a tiny model's folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
    """`change` gets all weights by name and returns those to be saved."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def part(folder: str, path: str) -> str:
    """How the names of a part's weights begin in the file, or end in it: the last names of its dotted path."""
    return path.removeprefix("model.").split(".")[-1]


def without(names: dict, piece: str) -> dict:
    kept = {key: value for key, value in names.items() if piece not in key}
    assert len(kept) < len(names), (piece, list(names)[:5])
    return kept


def refused(folder: Path, match: str) -> None:
    """By the loader, and by the check before a kernel, in one line that names the model."""
    for call in (models.load, memory.check):
        with pytest.raises(ValueError, match=match) as problem:
            call(str(folder))
        assert "\n" not in str(problem.value) and str(folder) in str(problem.value)


@pytest.mark.parametrize("what", ["tower", "connector", "one layer of the decoder", "one weight"])
def test_weights_that_are_absent(copy, what):
    spec = models.load(str(copy)).spec
    piece = {"tower": part(copy, spec.vision) + ".", "connector": part(copy, spec.connector) + ".",
             "one layer of the decoder": None, "one weight": None}[what]
    if piece is None:
        seen = ("vision", "visual")
        first = next(k for k in load_file(copy / WEIGHTS) if ".layers.1." in k and not any(s in k for s in seen))
        piece = first if what == "one weight" else first.split(".layers.1.")[0] + ".layers.1."
    rewrite(copy, lambda weights: without(weights, piece))
    refused(copy, "the checkpoint lacks")


def test_names_of_an_unmerged_adapter(copy):
    rewrite(copy, lambda weights: {f"base_model.model.{key}": value for key, value in weights.items()})
    refused(copy, "merged into its base first")


def test_other_names(copy):
    rewrite(copy, lambda weights: {f"other.{key}x": value for key, value in weights.items()})
    refused(copy, "the checkpoint lacks .* of which the model knows nothing")


def test_weights_left_over(copy):
    rewrite(copy, lambda weights: {**weights, "model.extra.weight": torch.zeros(2)})
    refused(copy, "extra.weight, of which the model knows nothing")


def test_buffers_of_older_versions_may_be_there(copy):
    rewrite(copy, lambda weights: {**weights, "model.vision_tower.embeddings.position_ids": torch.arange(4),
                                   "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    models.load(str(copy))


def test_another_shape(copy):
    def cut(weights):
        key = next(key for key in weights if key.endswith("mlp.down_proj.weight") and "vis" not in key)
        return {**weights, key: weights[key][:, :-1].contiguous()}

    rewrite(copy, cut)
    refused(copy, r"has .* as \[32, 63\] where the model has \[32, 64\]")


def test_a_file_without_weights(copy):
    save_file({}, copy / WEIGHTS, metadata={"format": "pt"})
    refused(copy, "the checkpoint lacks")


@pytest.mark.parametrize("content", [b"", b"garbage, not a header", None], ids=["empty", "garbage", "cut off"])
def test_a_damaged_file(copy, content):
    content = (copy / WEIGHTS).read_bytes()[:2000] if content is None else content
    (copy / WEIGHTS).write_bytes(content)
    refused(copy, "cannot be read")


def test_more_layers_in_the_config_than_in_the_weights(copy):
    config = json.loads((copy / "config.json").read_text())
    text = config["text_config"]
    text["num_hidden_layers"] = 99
    if "layer_types" in text:
        text["layer_types"] = (text["layer_types"] * 33)[:99]
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, "the checkpoint lacks")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(copy, value):
    def spoil(weights):
        key = next(key for key in weights if key.endswith("mlp.up_proj.weight") and "vis" not in key)
        weights[key][0, 0] = value
        return weights

    rewrite(copy, spoil)
    with pytest.raises(ValueError, match=r"mlp.up_proj.weight holds values that are NaN or infinite in float32"):
        models.load(str(copy))


def test_a_shard_that_is_absent(copy):
    names = list(load_file(copy / WEIGHTS))
    shards = {key: f"model-0000{1 + (i > 4)}-of-00002.safetensors" for i, key in enumerate(names)}
    weights = load_file(copy / WEIGHTS)
    first = "model-00001-of-00002.safetensors"
    save_file({key: weights[key] for key in names if shards[key] == first}, copy / first, metadata={"format": "pt"})
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (copy / WEIGHTS).unlink()
    refused(copy, "cannot be read|lacks")


def test_pickled_weights_are_not_read(copy):
    torch.save(load_file(copy / WEIGHTS), copy / "pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    refused(copy, "cannot be read")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "torchao", "compressed-tensors"])
def test_quantised_weights(copy, method):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, f"quantised .{method}.; the study needs the unquantised checkpoint")


@pytest.mark.parametrize("switch", ["output_attentions", "output_hidden_states", "use_cache", "return_dict"])
def test_switches_of_an_earlier_use_play_no_part(copy, switch):
    plain = models.load(str(copy))
    config = json.loads((copy / "config.json").read_text())
    for of in (config, config["text_config"], config["vision_config"]):
        of[switch] = switch.startswith("output")
    (copy / "config.json").write_text(json.dumps(config))
    switched = models.load(str(copy))
    assert {k: v for k, v in switched.model.config.to_dict().items() if k != "_name_or_path"} == {
        k: v for k, v in plain.model.config.to_dict().items() if k != "_name_or_path"}
    memory.check(str(copy))


# ------------------------------------------------------------------------------------------------- processors
def test_without_a_tokenizer(copy):
    for file in copy.glob("token*"):
        file.unlink()
    refused(copy, "cannot be read|does not prepare")


def test_a_chat_format_that_drops_the_picture(copy):
    if models.load(str(copy)).spec.prompt:
        pytest.skip("it has no chat format")
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }} : {% endfor %}")
    refused(copy, "its chat format drops the picture|does not prepare a picture")


def test_another_image_token(copy):
    config = json.loads((copy / "config.json").read_text())
    key = "image_token_id" if "image_token_id" in config else "image_token_index"
    config[key] = 9
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, "different image tokens|does not prepare")


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_processor(copy, name, content):
    if not (copy / name).exists():
        pytest.skip("no such file")
    (copy / name).write_text(content)
    refused(copy, "cannot be read|does not prepare")


def test_an_old_processor_without_patch_size(tmp_path, folder):
    processor = json.loads((Path(folder) / "processor_config.json").read_text())
    if "patch_size" not in processor:
        pytest.skip("its processor has no patch_size")
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    del processor["patch_size"]
    (copy / "processor_config.json").write_text(json.dumps(processor))
    refused(copy, "does not prepare a picture and a question|no image token")
