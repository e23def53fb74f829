"""Chapter 06 on models and pictures that are not the lab's: tiny random models, a folder of pictures."""

from pathlib import Path

import pandas as pd
import pytest

from tests.model import architectures, chapters, noise

FEW = {"limit": 3, "checked": 2, "steps": 2, "draws": 2, "orders": 1, "controls": [], "max_new_tokens": 2}


@pytest.mark.parametrize(("name", "folder"), [("qwen2_5_vl", True), ("llava_next", False)])
def test_other_models_and_pictures(name, folder, tmp_path: Path):
    """In the first run nothing is known of the pictures; in the second there are answers, but not the lab's patches."""
    architectures.write(tmp_path / f"tiny-{name}", name)
    pictures = noise.write(tmp_path / "pictures", [(32, 48)] * 3)
    tables = chapters.execute("06-attribution", tmp_path, model=tmp_path / f"tiny-{name}",
                              images_dir=str(pictures) if folder else "", **FEW)
    metrics = chapters.metrics(tables)
    ratio = metrics[f"tiny-{name}.attribution.top_2_percent_over_random.all"]
    assert ratio["n"] == 3 and 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    types = pd.read_csv(tables / "ratios.csv").questions.unique()
    assert list(types) == (["all", "generic"] if folder else ["all", "global", "local", "mixed"])
    twofold = metrics[f"tiny-{name}.attribution.top_2_percent.global_over_local"]
    assert (twofold["value"] is None and twofold["n"] == 0) if folder else twofold["value"] > 0
    assert str(tmp_path) not in (tables / "metrics.json").read_text()
