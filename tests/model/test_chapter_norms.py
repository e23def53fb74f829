"""Chapter 01 on a model that is not the lab's: what other pages ask for is written, whatever the pictures."""

from pathlib import Path

import nbformat
import pandas as pd
import pytest

from tests.model import architectures, chapters, noise


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return architectures.write(tmp_path_factory.mktemp("models") / "tiny-llava", "llava")


def run(model: Path, folder: Path, **parameters) -> pd.DataFrame:
    """Execute the chapter, with any patch above 1.05 medians called a sink; returns its metrics."""
    given = {"controls": [], "threshold": 1.05, "limit": 6} | parameters
    tables = chapters.execute("01-norms", folder, model=model, **given)
    return pd.DataFrame(chapters.metrics(tables).values()).set_index("name")


def glued(folder: Path, name: str) -> str:
    """What the page says where the text cites a name."""
    cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "metadata" in output]
    [found] = [output for output in outputs if output.metadata.get("scrapbook", {}).get("name", "").endswith(name)]
    return found.data["application/papermill.record/text/plain"]


def test_scenes_of_the_lab(model: Path, tmp_path: Path):
    metrics = run(model, tmp_path)
    for name in ("tiny-llava.sinks_per_image.chosen", "tiny-llava.max_over_median"):
        assert metrics.n[name] == 6 and metrics.low[name] <= metrics.value[name] <= metrics.high[name], name
    of = metrics.value.filter(like="tiny-llava.sinks_per_image.")
    assert of["tiny-llava.sinks_per_image.chosen"] == of["tiny-llava.sinks_per_image.times_median"]
    assert "The positive control was not run" in glued(tmp_path, "sure")


def test_no_sinks_at_all(model: Path, tmp_path: Path):
    metrics = run(model, tmp_path, threshold=50)
    assert metrics.value["tiny-llava.sinks_per_image.chosen"] == 0
    assert metrics.n["tiny-llava.rule_of_this_run.share_on.picture_border"] == 0
    assert "no patch is a sink by the rule of this run" in glued(tmp_path, "answer")
    assert "no picture has a sink" in glued(tmp_path, "no-sinks")


def test_pictures_of_a_folder(model: Path, tmp_path: Path):
    pictures = noise.write(tmp_path / "pictures", [(64, 48)] * 6)
    metrics = run(model, tmp_path, images_dir=str(pictures))
    assert not metrics.index.str.contains("calm").any()
    assert "on things" not in glued(tmp_path, "answer")
    assert glued(tmp_path, "on-things") == "'not known for these pictures'"
