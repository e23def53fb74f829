"""A checkpoint's generation settings change no answer: those of the study hold, behind a shared prefix and alone."""

import json
import shutil
from pathlib import Path

import noise
import pandas as pd
import pytest
import torch
from architectures import configure, write
from PIL import Image
from transformers import LlavaForConditionalGeneration

from sinkstudy.answers.evaluate import NONE, Intervention, evaluate
from sinkstudy.model import capture, loading

TOKENS = 6
SETTINGS = {
    "no cache": {"use_cache": False},
    "n-grams": {"no_repeat_ngram_size": 2},
    "repetition": {"repetition_penalty": 1.7},
    "static cache": {"cache_implementation": "static"},
    "quantized cache": {"cache_implementation": "quantized"},
    "several answers": {"num_return_sequences": 3, "do_sample": True},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "samples": {"do_sample": True, "temperature": 5.0, "top_k": 3},
    "stop strings": {"stop_strings": ["red", "blue"]},
    "compiled": {"compile_config": {"mode": "reduce-overhead"}, "disable_compile": False},
    "least length": {"min_new_tokens": 5, "min_length": 40},
    "most length": {"max_length": 3, "max_new_tokens": 1},
    "suppressed": {"suppress_tokens": [8, 9, 10, 11], "bad_words_ids": [[12]]},
    "forced": {"forced_eos_token_id": 2, "forced_bos_token_id": 9},
    "contrast": {"penalty_alpha": 0.6, "top_k": 4, "guidance_scale": 3.0},
    "maps": {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": False},
}


@pytest.fixture(scope="module")
def table() -> tuple[pd.DataFrame, dict[str, Image.Image]]:
    """Two pictures, two questions of different length about each."""
    rows = [{"image_id": str(i), "question": q} for i in range(2) for q in ("how many", "what is the texture")]
    return pd.DataFrame(rows).assign(id=range(4)), dict(zip("01", noise.pictures([(32, 32)] * 2, seed=1)))


@pytest.fixture(scope="module")
def expected(folder, table) -> list[str]:
    """What the library's own `generate` says, greedily, to each question alone."""
    lvlm, (asked, images) = loading.load(folder), table
    said = []
    for row in asked.itertuples():
        inputs = lvlm.inputs([images[row.image_id]], [row.question])
        out = lvlm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, use_cache=True, pad_token_id=0,
                                  eos_token_id=2)
        said += lvlm.processor.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    return [text.strip() for text in said]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_checkpoint_play_no_part(folder, tmp_path, table, expected, setting):
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    ends = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    (copy / "generation_config.json").write_text(json.dumps(ends | SETTINGS[setting]))
    lvlm, (asked, images) = loading.load(str(copy)), table
    alone = Intervention("alone", asks=True)
    said = evaluate(lvlm, asked, [NONE, alone], images=images, max_new_tokens=TOKENS, cache=None)
    assert said.prediction[:4].tolist() == expected and said.prediction[4:].tolist() == expected
    seen = capture.trace(lvlm, list(images.values()), ["how many"] * 2, max_new_tokens=TOKENS)
    assert seen.answers == expected[::2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["text_config", "config"])
def test_a_decoder_that_was_trained_without_cache(folder, tmp_path, table, expected, part):
    """Fine-tuning with gradient checkpointing leaves `use_cache: false` in the configuration."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((copy / "config.json").read_text())
    of = config if part == "config" else config.get("text_config")
    if of is None:
        pytest.skip("its decoder has no configuration of its own")
    of["use_cache"] = False
    (copy / "config.json").write_text(json.dumps(config))
    lvlm, (asked, images) = loading.load(str(copy)), table
    said = evaluate(lvlm, asked, [NONE, Intervention("alone", asks=True)], images=images, max_new_tokens=TOKENS,
                    cache=None)
    assert said.prediction[:4].tolist() == expected and said.prediction[4:].tolist() == expected


@pytest.mark.filterwarnings("ignore")
def test_several_end_tokens_are_the_checkpoints(folder, tmp_path, table):
    """The one thing that counts: where an answer ends."""
    lvlm, (_, images) = loading.load(folder), table
    inputs = lvlm.inputs([images["0"]], ["how many"])
    first = int(lvlm.generate(inputs, 1).sequences[0, -1])
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first], "pad_token_id": 0}))
    ended = loading.load(str(copy))
    assert ended.ends == [2, first]
    out = ended.generate(ended.inputs([images["0"]], ["how many"]), TOKENS).sequences
    assert out.shape[1] == inputs["input_ids"].shape[1] + 1


ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 20},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 20},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                 "original_max_position_embeddings": 26},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_of_every_kind(kind, tmp_path, table):
    """Answers behind a shared prefix are those of a fresh model to the whole prompt in eager attention, or there are
    none: where frequencies depend on the length of the text, longer prompts than those are refused."""
    configure(write(tmp_path, "llava"), text_config__rope_parameters=ROPES[kind] | {"rope_theta": 10_000.0},
              text_config__max_position_embeddings=26)
    asked, images = table
    lvlm = loading.load(str(tmp_path))
    asked = asked.assign(answer="yes")
    said = evaluate(lvlm, asked, [NONE, Intervention("alone", asks=True)], images=images, cache=None, max_new_tokens=3)
    yes = lvlm.processor.tokenizer.convert_tokens_to_ids("yes")
    for row in said.itertuples():
        fresh = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager", dtype="float32")
        inputs = lvlm.inputs([images[row.image_id]], [row.question])
        with torch.no_grad():
            logp = fresh.eval()(**inputs).logits[0, -1].log_softmax(-1)
        assert row.logp_yes == pytest.approx(logp[yes].item(), abs=1e-4)
    long = asked.assign(question=asked.question + " how many red blue yes no" * 2)
    if kind not in ("dynamic", "longrope"):
        evaluate(lvlm, long, images=images, cache=None, max_new_tokens=3)
        return
    with pytest.raises(ValueError, match="beyond 26 the decoder's rotary embedding changes with the length"):
        evaluate(lvlm, long, images=images, cache=None, max_new_tokens=3)
