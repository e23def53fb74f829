"""Chapter 05 on a model that is not the lab's: what the ledger asks for is written, whatever the pictures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from sinkstudy.paths import DATA
from tests.model import architectures, chapters, noise

LEDGER = yaml.safe_load((DATA / "claims.yml").read_text(encoding="utf-8"))["claims"]
ASKED = [claim["metric"] for claim in LEDGER if claim["chapter"] == "05-content"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Patches of 8 x 8 in blocks of four, pictures shrunk to 64 x 64; any patch above 1.2 medians is called a sink."""
    return architectures.write(tmp_path_factory.mktemp("models") / "tiny-qwen", "qwen2_vl")


def run(model: Path, folder: Path, **parameters) -> tuple[Path, pd.DataFrame]:
    """Execute the chapter; returns the folder of its tables and its metrics."""
    given = {"controls": [], "threshold": 1.2, "fit": 60, "limit": 12, "draws": 2} | parameters
    tables = chapters.execute("05-content", folder, model=model, **given)
    return tables, pd.DataFrame(chapters.metrics(tables).values()).set_index("name")


def test_scenes_of_the_lab(model: Path, tmp_path: Path):
    tables, metrics = run(model, tmp_path)
    for name in (metric.format(model="tiny-qwen") for metric in ASKED):
        assert metrics.n[name] > 0 and metrics.low[name] <= metrics.value[name] <= metrics.high[name], name
    groups = pd.read_csv(tables / "groups.csv").set_index("group")
    assert groups.patches_a_picture["top 2 %"] == 2  # of 64
    layers = pd.read_csv(tables / "layers.csv")
    assert layers.groupby("side").layer.max().to_dict() == {"connector": 1, "decoder": 3, "tower": 3}
    words = pd.read_csv(tables / "words.csv")
    np.testing.assert_allclose(words.groupby(["reading", "group"]).share.sum(), 100, rtol=1e-4)


def test_pictures_without_facts(model: Path, tmp_path: Path):
    pictures = noise.write(tmp_path / "pictures", [(64, 48)] * 80)
    _, metrics = run(model, tmp_path, images_dir=str(pictures))
    known = {metric for metric in ASKED if metrics.n[metric.format(model="tiny-qwen")] > 0}
    of_place = {"{model}.probe.position.sinks_minus_random", "{model}.probe.pixels.sinks_minus_random"}
    assert known == of_place | {"{model}.decode.entropy.sinks_minus_random"}
    unknown = metrics.loc[[metric.format(model="tiny-qwen") for metric in ASKED if metric not in known]]
    assert unknown.value.isna().all() and (unknown.n == 0).all()
