"""Chapters on a model that is none of the lab's, from a folder and from the hub's cache; and what can go wrong."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.benchmarks.test_data import FILES, write
from tests.engine.conftest import Commands
from tests.model import architectures, noise

COMMITS = {"main": "1" * 40, "v1": "0123456789abcdef" * 2 + "01234567"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return architectures.write(tmp_path_factory.mktemp("models") / "tiny-qwen", "qwen2_5_vl")


def printed(page) -> str:
    return "".join(output.get("text", "") for cell in page.cells for output in cell.get("outputs", []))


def test_chapters_run_on_a_folder(checkout: Commands, model: Path, tmp_path: Path):
    pictures, data = noise.write(tmp_path / "pictures", [(64, 48)] * 4), tmp_path / "data"
    write(data / "POPE", FILES["POPE"])
    options = ["--only", "03", "--only", "09", "--batch-size", "3"]
    options += ["-p", f"images_dir={pictures}", "-p", f"data_dir={data}", "-p", 'benchmarks=["POPE"]']
    checkout.call("run", str(model), *options)
    results = checkout.root / "results" / "tiny-qwen"
    assert sorted(path.parent.name for path in results.glob("*/metrics.json")) == ["03-propagation", "09-benchmarks"]
    assert set(pd.read_csv(results / "09-benchmarks" / "data.csv").data) == {"public"}
    kinds = pd.read_csv(results / "03-propagation" / "kinds.csv").query("model == 'tiny-qwen'")
    assert set(kinds.layer) == {1, 2, 3}
    ordinary = kinds[["ordinary", "stopped", "propagated", "emerged"]].sum(axis=1)
    assert (ordinary == 3 * 4).all()  # visual tokens: four patches each of 6 x 8
    page = checkout.page("03-propagation", "tiny-qwen")
    assert printed(page).startswith(
        "4 pictures; models: tiny-qwen, lab-qwen2vl\nnot run: lab-llava-gist, lab-llava-registers\n")  # of other sizes
    assert page.metadata["sinkstudy"]["params"]["batch_size"] == 3
    assert "none: a local folder" in json.dumps(page.cells[-1].outputs)
    assert "cell" not in checkout.call("run", str(model), *options)  # nothing is executed again


def test_chapters_ask_the_labs_questions_in_words_that_a_tokenizer_lacks(checkout: Commands, model: Path):
    """Such an answer has no log-probability; the greedy text is judged all the same."""
    chapters = ["08-criteria", "10-training-free", "13-explorer"]
    only = [part for name in chapters for part in ("--only", name)]
    checkout.call("run", str(model), *only, "--limit", "4", "-p", "fit=4", "-p", "controls=[]", "--name", "foreign")
    results = checkout.root / "results" / "foreign"
    assert sorted(path.parent.name for path in results.glob("*/metrics.json")) == chapters
    effects = pd.read_csv(results / "10-training-free" / "effects.csv").set_index(["benchmark", "measure"])
    assert effects.n["MMStar", "right"].max() > 0 and effects.n["MMStar", "logp"].max() == 0
    assert effects.n["POPE", "logp"].max() > 0


def test_a_chapter_runs_on_a_revision_of_a_hub_model(checkout: Commands, model: Path, tmp_path: Path):
    """Without network, from the hub's cache as a download leaves it."""
    cache = checkout.root / "hub" / "hub" / "models--owner--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    for reference, commit in COMMITS.items():
        (cache / "refs" / reference).write_text(commit)
        (cache / "snapshots" / commit).symlink_to(model)
    pictures = noise.write(tmp_path / "pictures", [(64, 48)] * 2)
    checkout.call("run", "owner/tiny", "--revision", "v1", "--only", "01", "-p", f"images_dir={pictures}")
    page = checkout.page("01-norms", "owner--tiny")
    assert printed(page).startswith("2 pictures, 6 x 8 patches; models: owner--tiny, lab-qwen2vl\n")
    assert page.metadata["sinkstudy"]["revision"] == COMMITS["v1"]
    assert COMMITS["v1"] in json.dumps(page.cells[-1].outputs)


# ------------------------------------------------------------------------------------------------- messages
def test_a_model_that_cannot_be_used_is_refused_before_a_kernel_starts(checkout: Commands, model: Path, tmp_path: Path):
    LlamaConfig(vocab_size=8).save_pretrained(tmp_path / "text")
    blind = Path(shutil.copytree(model, tmp_path / "blind"))
    weights = load_file(blind / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith("visual.")}
    save_file(kept, blind / "model.safetensors", metadata={"format": "pt"})
    cases = [
        (tmp_path / "text", "1", "architecture 'llama' is not known; known: llava, "),
        (blind, "1", f"the checkpoint lacks {len(weights) - len(kept)} weights (model.visual). Nothing is filled"),
        (model, "1000000000", "tiny-qwen in float32 needs about "),
        ("llava-hf/llava-1.5-7b-hf", "1", "llava-hf/llava-1.5-7b-hf cannot be read: We couldn't connect to "),
    ]
    for name, batch_size, message in cases:
        printed = checkout.call("run", str(name), "--only", "01", "--batch-size", batch_size, code=1)
        assert message in printed and printed.startswith("sinkstudy: ")
        assert len(printed.splitlines()) == 1


def test_data_that_cannot_be_used_is_named_in_the_last_line(checkout: Commands, model: Path, tmp_path: Path):
    pictures = noise.write(tmp_path / "pictures", [(64, 64)] * 2)
    os.truncate(pictures / "1.png", 300)
    files = {name: [{k: v for k, v in row.items() if k != "answer"} for row in rows]
             for name, rows in FILES["POPE"].items()}
    write(tmp_path / "data" / "POPE", files)
    printed = checkout.call("run", str(model), "--only", "01", "-p", f"images_dir={pictures}", code=1)
    assert printed == "sinkstudy: 01-norms: picture 1.png cannot be read: it ends too early, the file is truncated\n"
    printed = checkout.call("run", str(model), "--only", "09", "-p", f"data_dir={tmp_path / 'data'}", code=1)
    assert printed.startswith("sinkstudy: POPE: column 'answer' is missing in ") and len(printed.splitlines()) == 1
