"""Chapter 08 on a model and pictures that are not the lab's: it writes all the ledger's metrics, empty ones too."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from sinkstudy.paths import DATA, RESULTS
from tests.model import architectures, chapters, noise


def test_pictures_of_a_folder(tmp_path: Path):
    """A packed tower with windows takes no register, and unknown answers leave the parts on answers out."""
    architectures.write(tmp_path / "tiny", "qwen2_5_vl")
    pictures = noise.write(tmp_path / "pictures", [(32, 64)] * 5)
    tables = chapters.execute("08-criteria", tmp_path, model=tmp_path / "tiny", images_dir=str(pictures),
                              criterion="percentile", threshold=90.0, controls=[])

    printed = chapters.printed(tmp_path)
    assert "the parts on answers are left out" in printed
    metrics = chapters.metrics(tables)
    claims = yaml.safe_load((DATA / "claims.yml").read_text())["claims"]
    for claim in claims:
        if claim["chapter"] == "08-criteria":
            row = metrics[claim["metric"].format(model="tiny")]
            assert (row["n"] == 0) == (row["value"] is None)
    ratio = metrics["tiny.neurons.silenced.norm_ratio"]
    assert ratio["n"] == 4 and 0 < ratio["low"] <= ratio["value"] <= ratio["high"]  # of five pictures, one found them
    assert metrics["tiny.neurons.silenced.accuracy"]["n"] == 0


@pytest.mark.parametrize("model", ["lab-llava-gist", "lab-qwen2vl"])
def test_probes_agree_with_those_of_the_chapter_on_content(model: str):
    """The same quantity on twice the pictures, other draws and another way to the vectors: intervals overlap."""
    expected = chapters.metrics(RESULTS / "lab-llava/05-content")[f"{model}.probe.global.sinks_minus_random"]
    table = pd.read_csv(RESULTS / "lab-llava/08-criteria/headlines.csv").set_index(["model", "rule", "headline"])
    found = table.loc[(model, "above_median 3", "probe")]
    assert found.low < expected["high"] and expected["low"] < found.high
    assert found.n > 100
