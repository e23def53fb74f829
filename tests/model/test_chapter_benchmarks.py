"""Chapter 09 on models and data that are not the lab's: tiny random models, files of the public data sets' schemas."""

from pathlib import Path

import pandas as pd

from tests.benchmarks.test_data import FILES, write
from tests.model import architectures, chapters
from tests.model.chapters import printed


def run(folder: Path, name: str, notebook: str = "09-benchmarks", **parameters) -> Path:
    """Execute a chapter on the tiny model `name`; returns the folder of its tables, beside it `out.ipynb`."""
    architectures.write(folder / f"tiny-{name}", name)
    short = {"max_new_tokens": 3} if notebook == "09-benchmarks" else {}
    return chapters.execute(notebook, folder, model=folder / f"tiny-{name}", **(short | parameters))


def test_public_files(tmp_path: Path):
    for benchmark in ("POPE", "MME", "GQA"):
        write(tmp_path / "data" / benchmark, FILES[benchmark])
    tables = run(tmp_path, "qwen2_5_vl", data_dir=str(tmp_path / "data"), benchmarks=["POPE", "MME", "MMStar", "GQA"])

    assert "controls not run: lab-llava-gist, lab-llava-registers" in printed(tmp_path)
    assert "benchmarks not run: MMStar" in printed(tmp_path)
    data = pd.read_csv(tables / "data.csv")
    assert list(data.benchmark) == ["POPE", "MME", "GQA"]
    assert set(data.data) == {"public"} and set(data.prompts) == {"qwen2_vl"}
    headline = pd.read_csv(tables / "headline.csv")
    assert set(headline.data) == {"public"} and set(headline.role) == {"model"}
    assert str(tmp_path) not in (tables / "data.csv").read_text()
    written = sorted(file.name for file in (tables / "harnesses").rglob("*") if file.is_file())
    who = [f"tiny-qwen2_5_vl{arm}_{name}.tsv" for arm in ("--blind", "") for name in ("GQA", "MME", "POPE")]
    assert [name for name in written if name.endswith(".tsv")] == sorted(who)
    assert written.count("pope_samples_pope.jsonl") == written.count("gqa_results.json") == 2


def test_lab_questions_to_another_model(tmp_path: Path):
    tables = run(tmp_path, "llava", limit=2)
    scores = pd.read_csv(tables / "scores.csv")
    assert set(scores.benchmark) == {"POPE", "MME", "MMStar"}
    assert scores.n.max() == 9  # MME perception: one picture of each of nine categories, the least that there can be
    rules = pd.read_csv(tables / "rules.csv")
    agreed = rules[(rules.model == "tiny-llava") & (rules.measure == "same as first token")]
    agreed = agreed.set_index("benchmark").value
    assert list(agreed.index[agreed.isna()]) == ["MMStar"]  # there are no letters among its words
