"""Chapter 07 on models, pictures and questions that are not the lab's: it runs, and says what it leaves out."""

from pathlib import Path

import pandas as pd
import yaml

from sinkstudy.paths import DATA
from tests.benchmarks.test_data import FILES, write
from tests.model import architectures, chapters, noise

LEDGER = [c for c in yaml.safe_load((DATA / "claims.yml").read_text())["claims"] if c["chapter"] == "07-ablation"]


def run(folder: Path, name: str, **parameters) -> tuple[dict, pd.DataFrame, str]:
    """Execute the chapter on a tiny or a lab model; returns its metrics, its effects and what it printed."""
    if name in architectures.ARCHITECTURES:
        architectures.write(folder / "tiny", name)
    given = {"model": str(folder / "tiny"), "controls": [], "doses": [1, 3], "max_new_tokens": 2} | parameters
    tables = chapters.execute("07-ablation", folder, **given)
    return chapters.metrics(tables), pd.read_csv(tables / "effects.csv"), chapters.printed(folder)


def test_pictures_of_a_folder(tmp_path: Path):
    """Of two sizes, with a tower that packs them; without answers the model's own is what has to stay."""
    noise.write(tmp_path / "pictures", [(32, 64), (64, 32)] * 3)
    how = {"images_dir": str(tmp_path / "pictures"), "prompt": "what is the texture", "criterion": "percentile"}
    metrics, effects, printed = run(tmp_path, "qwen2_5_vl", threshold=90.0, **how)
    assert "calm: not known for these pictures" in printed and "things: not known for these pictures" in printed
    assert set(effects.measure) == {"agreement", "own_logp"} and set(effects.questions) == {"generic", "all"}
    own = effects[(effects.measure == "agreement") & (effects.which == "itself") & (effects.n > 0)]
    assert {"sinks", "top 2 %"} == set(own.group) and (own.value <= 0).all()
    assert not any(claim["metric"].format(model="tiny") in metrics for claim in LEDGER)  # nobody knows what is right


def test_a_model_without_sinks(tmp_path: Path):
    """All the ledger's metrics are there, empty."""
    how = {"model": "lab-llava", "criterion": "absolute", "threshold": 1e6, "limit": 5, "few": 5}
    metrics, effects, printed = run(tmp_path, "lab-llava", **how)
    assert "lab-llava has no sinks" in printed
    for claim in LEDGER:
        row = metrics[claim["metric"].format(model="lab-llava")]
        assert (row["value"], row["n"]) == (None, 0)
    assert set(effects[effects.n > 0].group) == {"top 2 %", "calm", "things"}


def test_a_public_benchmark(tmp_path: Path):
    """Its categories are the types of question."""
    write(tmp_path / "data" / "MME", FILES["MME"])
    metrics, effects, printed = run(tmp_path, "llava", benchmark="MME", data_dir=str(tmp_path / "data"), min_pictures=1)
    assert set(effects.measure) == {"accuracy", "logp"}
    assert "things: not known for these pictures" in printed
    assert set(effects.questions) == {"count", "code_reasoning", "all"}
