"""Checkpoints as they are found: what is absent, left over, damaged or foreign is refused by name, before work begins.

Faults are tried on a tiny random model of every architecture, and what no architecture changes on one of them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from architectures import WORDS, configure, write
from huggingface_hub import get_local_safetensors_metadata
from PIL import Image
from safetensors.torch import load_file, save_file

from sinkstudy.book import engine, memory
from sinkstudy.model import loading
from sinkstudy.model.specs import SPECS

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A copy of a tiny model's folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A tiny LLaVA."""
    return write(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture
def llava(one, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(one, tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
    """`change` gets all weights by name and returns those to be saved."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def part(path: str) -> str:
    """How the names of a part's weights begin in the file, or end in it: the last names of its dotted path."""
    return path.removeprefix("model.").split(".")[-1]


def without(names: dict, piece: str) -> dict:
    kept = {key: value for key, value in names.items() if piece not in key}
    assert len(kept) < len(names), (piece, list(names)[:5])
    return kept


def refused(folder: Path, match: str, **how: str) -> None:
    """By the check before a kernel, in one line that names the model; of LLaVA by the loader in the same line."""
    said = set()
    loads = json.loads((folder / "config.json").read_text()).get("model_type") == "llava"
    for call in (memory.check, loading.load) if loads else (memory.check,):
        with pytest.raises(ValueError, match=match) as problem:
            call(str(folder), **how)
        said.add(str(problem.value))
    assert len(said) == 1 and "\n" not in (line := said.pop()) and str(folder) in line


@pytest.mark.parametrize("what", ["tower", "connector", "one layer of the decoder", "one weight"])
def test_weights_that_are_absent(copy, what):
    spec = SPECS[json.loads((copy / "config.json").read_text())["model_type"]]
    piece = {"tower": part(spec.vision) + ".", "connector": part(spec.connector) + ".",
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
    loading.load(str(copy))


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
    text["num_hidden_layers"] = layers = 99 if config["model_type"] == "llava" else 9
    if "layer_types" in text:
        text["layer_types"] = (text["layer_types"] * layers)[:layers]
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, "the checkpoint lacks")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(copy, value):
    def spoil(weights):
        key = next(key for key in weights if key.endswith("mlp.up_proj.weight") and "vis" not in key)
        weights[key][0, 0] = value
        return weights

    rewrite(copy, spoil)
    for call in (loading.load, memory.check):
        with pytest.raises(ValueError, match=r"mlp.up_proj.weight holds values that are NaN or infinite in float32"):
            call(str(copy))


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
    configure(copy, quantization_config={"quant_method": method, "load_in_4bit": True})
    refused(copy, f"quantised .{method}.; the study needs the unquantised checkpoint")


@pytest.mark.parametrize("switch", ["output_attentions", "output_hidden_states", "use_cache", "return_dict"])
def test_switches_of_an_earlier_use_play_no_part(copy, switch):
    plain = loading.load(str(copy))
    on = switch.startswith("output")
    configure(copy, **{switch: on, f"text_config__{switch}": on, f"vision_config__{switch}": on})
    switched = loading.load(str(copy))
    assert {k: v for k, v in switched.model.config.to_dict().items() if k != "_name_or_path"} == {
        k: v for k, v in plain.model.config.to_dict().items() if k != "_name_or_path"}
    memory.check(str(copy))


# ------------------------------------------------------------------------------------------------- processors
def test_without_a_tokenizer(copy):
    for file in copy.glob("token*"):
        file.unlink()
    refused(copy, "cannot be read|does not prepare")


def test_a_chat_format_that_drops_the_picture(copy):
    if not (copy / "chat_template.jinja").exists():
        pytest.skip("it has no chat format")
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }} : {% endfor %}")
    refused(copy, "its chat format drops the picture|does not prepare a picture")


def test_another_image_token(copy):
    config = json.loads((copy / "config.json").read_text())
    configure(copy, **{"image_token_id" if "image_token_id" in config else "image_token_index": 9})
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


@pytest.mark.parametrize("add", [False, True], ids=["asked of the text alone", "as text"])
def test_a_chat_format_of_a_text_model(llava, add):
    text = "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{{ c.text }}{% endfor %}{% endfor %}"
    text = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}{% endfor %}" if add else text
    (llava / "chat_template.jinja").write_text(text)
    refused(llava, "does not prepare a picture and a question" if add else "its chat format drops the picture")


def test_a_chat_format_that_drops_the_question(llava):
    (llava / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    refused(llava, "its chat format drops the question")


def test_no_chat_format(copy):
    if not (copy / "chat_template.jinja").exists():
        pytest.skip("it has no chat format")
    (copy / "chat_template.jinja").unlink()
    if SPECS[json.loads((copy / "config.json").read_text())["model_type"]].prompt is None:
        refused(copy, "does not have a chat template")


OTHER = {  # entries of a processor's files that do not fit the model
    "llava": [("processor_config.json", {"patch_size": 16}), ("processor_config.json", {"patch_size": 4}),
              ("processor_config.json", {"num_additional_image_tokens": 0}),
              ("processor_config.json", {"vision_feature_select_strategy": "full"}),
              ("preprocessor_config.json", {"crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64}})],
    "llava_next": [("processor_config.json", {"num_additional_image_tokens": 0}),
                   ("preprocessor_config.json", {"image_grid_pinpoints": [[96, 32]]})],
    "llava_onevision": [("processor_config.json", {"num_image_tokens": 9})],
    "qwen2_vl": [("preprocessor_config.json", {"merge_size": 1}), ("preprocessor_config.json", {"patch_size": 16})],
    "qwen2_5_vl": [("preprocessor_config.json", {"merge_size": 4})],
    "qwen3_vl": [("preprocessor_config.json", {"patch_size": 4})],
    "internvl": [("processor_config.json", {"image_seq_length": 5}),
                 ("processor_config.json", {"image_seq_length": 8})],
    "aya_vision": [("processor_config.json", {"downsample_factor": 1}), ("processor_config.json", {"patch_size": 4})],
    "paligemma": [("preprocessor_config.json", {"image_seq_length": 32})],
    "gemma3": [("processor_config.json", {"image_seq_length": 8})],
    "idefics3": [("processor_config.json", {"image_seq_len": 8})],
    "smolvlm": [("processor_config.json", {"image_seq_len": 2})],
}  # fmt: skip


@pytest.mark.parametrize("name, file, entries", [(name, *of) for name, cases in OTHER.items() for of in cases])
def test_a_processor_that_counts_other_tokens(name, file, entries, tmp_path):
    write(tmp_path, name)
    configure(tmp_path, file, **entries)
    refused(tmp_path, "visual tokens|does not prepare a picture|its processor makes pictures of|makes patches of")


def test_a_tokenizer_of_another_model(llava):
    words = WORDS + [f"w{i}" for i in range(9)]
    configure(llava, "tokenizer.json", model__vocab={word: i for i, word in enumerate(words)})
    refused(llava, "its tokenizer is another model's")


@pytest.mark.parametrize("settings", [{"truncation": True}, {"truncation": "longest_first", "truncation_side": "left"},
                                      {"truncation": "only_first", "stride": 2}])
def test_a_tokenizer_that_would_cut_long_questions(llava, settings):
    """As one that was saved in training may: short questions fit, and nobody would see that long ones do not."""
    picture, question = [Image.new("RGB", (32, 32))], ["what is the texture " * 9]
    whole = loading.load(str(llava)).inputs(picture, question)
    configure(llava, "tokenizer_config.json", max_length=40, **settings)
    assert torch.equal(loading.load(str(llava)).inputs(picture, question)["input_ids"], whole["input_ids"])


def test_a_tokenizer_that_ends_each_prompt(copy):
    """As `add_eos_token` has it, which some fine-tuned checkpoints keep."""
    if SPECS[json.loads((copy / "config.json").read_text())["model_type"]].prompt:
        pytest.skip("its processor puts the prompt together")
    parts = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
             {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    tokens = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in (("<s>", 1), ("</s>", 2))}
    configure(copy, "tokenizer.json", post_processor={
        "type": "TemplateProcessing", "single": parts, "pair": [parts[1], {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": tokens})
    refused(copy, "its tokenizer ends each prompt")


# ------------------------------------------------------------------------------------------------- weights and names
def test_the_part_that_is_absent_is_named(llava):
    rewrite(llava, lambda weights: without(weights, "vision_tower."))
    refused(llava, r"the checkpoint lacks 55 weights \(model.vision_tower\)")


def test_an_output_layer_that_is_not_tied(llava):
    rewrite(llava, lambda weights: without(weights, "lm_head"))
    refused(llava, "the checkpoint lacks lm_head.weight")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_names_of_a_wrapper(llava, prefix):
    rewrite(llava, lambda weights: {prefix + key: value for key, value in weights.items()})
    refused(llava, "all of them .*: it was saved inside a wrapper")


def test_an_adapter_beside_its_base(llava):
    """The names that a model has while an adapter of peft is on it."""

    def wrapped(weights):
        key = next(key for key in weights if key.endswith("q_proj.weight") and "language_model" in key)
        there = key.removesuffix("weight")
        weights[f"{there}base_layer.weight"] = weights.pop(key)
        return weights | {f"{there}lora_{x}.default.weight": torch.zeros(2, 2) for x in "AB"}

    rewrite(llava, wrapped)
    refused(llava, "the checkpoint lacks model.language_model.layers.0.self_attn.q_proj.weight.* has to be merged")


def test_an_adapter_in_the_folder_of_a_model(llava):
    """Where the library would put it on top, merged or not."""
    about = {"peft_type": "LORA", "base_model_name_or_path": "owner/name", "r": 2}
    (llava / "adapter_config.json").write_text(json.dumps(about))
    save_file({"base_model.model.lora_A.weight": torch.zeros(2, 2)}, llava / "adapter_model.safetensors")
    refused(llava, "merged into its base first")


def test_the_layout_of_llavas_own_code(llava):
    rewrite(llava, lambda weights: {f"model.{k}".replace("multi_modal_projector.linear_1", "mm_projector.0"): v
                                    for k, v in weights.items()})  # fmt: skip
    refused(llava, "LLaVA's own code")


def test_weights_left_as_empty_pieces(llava):
    """As DeepSpeed's ZeRO-3 leaves them where they were not gathered."""
    rewrite(llava, lambda weights: {key: value[:0].flatten() for key, value in weights.items()})
    refused(llava, r"as \[0\] where the model has")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_weights_of_few_bits(llava, dtype):
    rewrite(llava, lambda weights: weights | {key: v.to(dtype) for key, v in weights.items() if "o_proj" in key})
    refused(llava, "quantised .*o_proj.weight .*; the study needs the unquantised checkpoint")


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.bool])
def test_weights_of_whole_numbers(llava, dtype):
    """Of the right names and shapes."""
    rewrite(llava, lambda weights: weights | {key: v.to(dtype) for key, v in weights.items() if "q_proj.w" in key})
    refused(llava, "quantised .*q_proj.weight .*; the study needs the unquantised checkpoint")


def test_weights_of_gptq(llava):
    """Of which the configuration says nothing."""
    def packed(weights):
        key = next(key for key in weights if "o_proj" in key).removesuffix("weight")
        weights.pop(f"{key}weight")
        return weights | {f"{key}qweight": torch.zeros(4, 32, dtype=torch.int32), f"{key}scales": torch.ones(1, 32)}

    rewrite(llava, packed)
    refused(llava, "it is quantised; the study needs the unquantised checkpoint")


def test_one_part_is_quantised(llava):
    configure(llava, text_config__quantization_config={"quant_method": "awq", "bits": 4})
    refused(llava, "quantised .awq.; the study needs the unquantised checkpoint")


def test_weights_too_large_for_a_dtype(llava):
    key = "language_model.model.norm.weight"
    rewrite(llava, lambda weights: weights | {key: weights[key] * 1e6})
    for call in (memory.check, loading.load):
        with pytest.raises(ValueError, match=r"norm.weight holds values that are NaN or infinite in float16.*bfloat16"):
            call(str(llava), dtype="float16")
        call(str(llava), dtype="bfloat16")


# ------------------------------------------------------------------------------------------------- several files
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def shard(folder: Path) -> dict[str, str]:
    """Split the weights into two files."""
    weights = load_file(folder / WEIGHTS)
    where = {key: FIRST if i < 5 else SECOND for i, key in enumerate(weights)}
    for file in (FIRST, SECOND):
        save_file({k: v for k, v in weights.items() if where[k] == file}, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_weights_in_several_files(copy):
    whole = loading.load(str(copy)).model.state_dict()
    shard(copy)
    memory.check(str(copy))
    split = loading.load(str(copy)).model.state_dict()
    assert whole.keys() == split.keys() and all(torch.equal(whole[key], split[key]) for key in whole)


def test_an_index_that_promises_what_no_file_has(llava):
    where = shard(llava)
    configure(llava, f"{WEIGHTS}.index.json", weight_map={**where, "language_model.model.layers.7.up": SECOND})
    refused(llava, "model.safetensors.index.json names language_model.model.layers.7.up, which no file has")


def test_a_file_without_a_weight_that_the_index_promises(llava):
    shard(llava)
    kept = load_file(llava / SECOND)
    kept.pop(gone := next(key for key in kept if "o_proj" in key))
    save_file(kept, llava / SECOND, metadata={"format": "pt"})
    refused(llava, f"model.safetensors.index.json names {gone}, which no file has")


def test_a_weight_in_two_files(llava):
    """Left over in the second file by an earlier save, with other values."""
    twice = next(key for key, file in shard(llava).items() if file == FIRST)
    kept = load_file(llava / SECOND)
    value = load_file(llava / FIRST)[twice]
    save_file(kept | {twice: value + 1}, llava / SECOND, metadata={"format": "pt"})
    refused(llava, f"two of its files have {twice}")


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../../b.safetensors"}}'])
def test_a_damaged_index(llava, index):
    shard(llava)
    (llava / f"{WEIGHTS}.index.json").write_text(index)
    refused(llava, "cannot be read: its model.safetensors.index.json is damaged")


def test_old_weights_beside_new_ones(llava):
    old = (llava / WEIGHTS).read_bytes()
    shard(llava)
    (llava / WEIGHTS).write_bytes(old)
    refused(llava, "names other files: remove what is not its own")


# ------------------------------------------------------------------------------------------------- configurations
@pytest.mark.parametrize("entry", ["text_config__rms_norm_eps", "vision_config__layer_norm_eps"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_that_are_no_numbers(llava, entry, value):
    configure(llava, **{entry: value})
    refused(llava, "in its config.json is (nan|inf), which is no number")


ODD = {
    "vision_feature_layer": [9, -9, 0, 1.5, "-2"],
    "image_token_index": [None, "x"],
    "text_config__num_hidden_layers": ["3", None, -1],
    "text_config__num_attention_heads": [0, 5],
    "vision_config__patch_size": [0, 16, None],
    "vision_config__image_size": [64, 0],
    "vision_config": [None, {}],
    "text_config__vocab_size": [7, 0],
}


@pytest.mark.parametrize("entry, value", [(entry, value) for entry, values in ODD.items() for value in values])
def test_odd_entries_of_a_configuration(llava, entry, value):
    configure(llava, **{entry: value})
    refused(llava, f"{llava}(:| cannot be read:) ")


# ------------------------------------------------------------------------------------------------- what is all right
def tied(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True, text_config__tie_word_embeddings=True)


@pytest.mark.parametrize("twice", [False, True])
def test_tied_weights_are_there_once_or_twice(copy, twice):
    plain = loading.load(str(copy))
    weights = load_file(copy / WEIGHTS)
    heads = [key for key in weights if "lm_head" in key]
    tied(copy)
    if twice:
        embedding = next(value for key, value in weights.items() if "embed_tokens" in key)
        rewrite(copy, lambda weights: weights | {heads[0] if heads else "lm_head.weight": embedding.clone()})
    elif heads:
        rewrite(copy, lambda weights: without(weights, "lm_head"))
    memory.check(str(copy))
    lvlm = loading.load(str(copy))
    embeddings = lvlm.model.get_input_embeddings().weight
    assert lvlm.model.get_output_embeddings().weight.data_ptr() == embeddings.data_ptr()
    assert torch.equal(embeddings, plain.model.get_input_embeddings().weight)
    assert memory.need(loading.outline(str(copy))) == memory.need(lvlm)


OLD = {"vision_tower.": "vision_tower.vision_model.", "language_model.model.": "model.language_model.",
       "multi_modal_projector.": "model.multi_modal_projector."}  # fmt: skip


@pytest.mark.parametrize("old, new", OLD.items())
def test_names_of_other_versions(llava, old, new):
    """Those of transformers before 5.6, and those that its modules have in memory."""
    plain = loading.load(str(llava)).model.state_dict()
    rewrite(llava, lambda weights: {key.replace(old, new): value for key, value in weights.items()})
    memory.check(str(llava))
    renamed = loading.load(str(llava)).model.state_dict()
    assert all(torch.equal(plain[key], renamed[key]) for key in plain)


@pytest.mark.parametrize("old, new", [*OLD.items(), ("language_model.lm_head", "lm_head")])
def test_a_weight_under_two_names(llava, old, new):
    """Old and new, with other values."""
    def twice(weights):
        key = next(key for key in weights if old in key)
        return weights | {key.replace(old, new): weights[key] + 1}

    rewrite(llava, twice)
    refused(llava, "its weights .* and .* are one of the model's")


def test_headers_of_a_hub_model_are_enough(llava, monkeypatch):
    """Before it is downloaded."""
    checkpoints = pytest.importorskip("sinkstudy.model.checkpoints")
    here = checkpoints.headers(str(llava))
    monkeypatch.setattr(checkpoints, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(checkpoints, "get_safetensors_metadata", lambda *a, **k: get_local_safetensors_metadata(llava))
    there = checkpoints.headers("owner/name")
    assert {key: (v.shape, v.dtype) for key, v in there.items()} == {key: (v.shape, v.dtype) for key, v in here.items()}


# ------------------------------------------------------------------------------------------------- models in memory
def test_what_is_wrapped_is_whole(one):
    lvlm = loading.load(str(one))
    assert loading.wrap(lvlm.model, lvlm.processor).model is lvlm.model
    with torch.device("meta"):
        empty = transformers.LlavaForConditionalGeneration(lvlm.model.config)
    with pytest.raises(ValueError, match="its weights are not there"):
        loading.wrap(empty, lvlm.processor)
    lvlm.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="lm_head.weight holds values that are NaN"):
        loading.wrap(lvlm.model, lvlm.processor)


def test_a_wrapped_model_that_is_being_trained(one):
    lvlm = loading.load(str(one))
    with pytest.raises(ValueError, match=r"it is being trained.*call eval\(\)"):
        loading.wrap(lvlm.model.train(), lvlm.processor)


@pytest.mark.parametrize("part", ["model", "decoder", "vision"])
def test_a_wrapped_model_of_another_attention(one, part):
    """Whose masks are of another form."""
    lvlm = loading.load(str(one))
    getattr(lvlm, part).set_attn_implementation("eager")
    loading.wrap(lvlm.model, lvlm.processor)
    getattr(lvlm, part).config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="its attention is flex_attention: load it with attn_implementation='sdpa'"):
        loading.wrap(lvlm.model, lvlm.processor)


def test_a_wrapped_model_whose_processor_is_anothers(one):
    lvlm = loading.load(str(one))
    lvlm.processor.patch_size = 16
    with pytest.raises(ValueError, match="its processor"):
        loading.wrap(lvlm.model, lvlm.processor)


def test_a_wrapped_model_with_an_adapter(one):
    peft = pytest.importorskip("peft")
    lvlm = loading.load(str(one))
    lvlm.model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="merged into its base first"):
        loading.wrap(lvlm.model, lvlm.processor)


# ------------------------------------------------------------------------------------------------- pictures of the lab
def asked(**values) -> None:
    engine.check_memory([("01-norms", engine.defaults("01-norms") | values)])


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (96, 96)).save(folder / "a.png")
    Image.new("RGB", (640, 480)).save(folder / "b.png")
    return folder


def test_a_lab_model_is_not_asked_about_other_pictures(pictures):
    with pytest.raises(engine.UserError, match="picture b.png: lab-llava takes pictures of 96 x 96"):
        asked(images_dir=str(pictures))


def test_a_lab_model_is_not_asked_about_public_benchmarks():
    with pytest.raises(engine.UserError, match="public benchmarks have many sizes"):
        asked(hub=True, benchmarks=["POPE"])


@pytest.mark.parametrize("name, takes", [("lab-llava", "96 x 96"), ("lab-qwen2vl", "whole 16s of")])
def test_a_lab_model_says_which_pictures_it_takes(name, takes):
    lvlm = loading.load(name)
    with pytest.raises(ValueError, match=f"{name} takes pictures of {takes} pixels.* this one has 90 x 50"):
        lvlm.inputs([Image.new("RGB", (90, 50))], ["how many ?"])


def test_a_lab_model_takes_pictures_of_its_own_size(pictures):
    (pictures / "b.png").unlink()
    memory.check_pictures("lab-llava", memory.asked_about(images_dir=str(pictures), limit=256))
