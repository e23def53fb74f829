"""Chapter 04 on a model and pictures that are not the lab's: it writes all the ledger's metrics, empty ones too."""

from pathlib import Path

from tests.model import architectures, chapters, noise


def test_pictures_of_a_folder(tmp_path: Path):
    architectures.write(tmp_path / "tiny", "qwen2_5_vl")
    pictures = noise.write(tmp_path / "pictures", [(32, 64)] * 5)
    tables = chapters.execute("04-relevance", tmp_path, model=tmp_path / "tiny", images_dir=str(pictures),
                              criterion="percentile", threshold=90.0, controls=[])

    printed = chapters.printed(tmp_path)
    assert "5 pictures of 8 x 4 patches\n" in printed and "skipped: calm patches, things" in printed
    metrics = {name.removeprefix("tiny."): row for name, row in chapters.metrics(tables).items()}
    for name in ("spread.sinks_minus_random", "spread.others_minus_uniform"):
        assert metrics[name]["n"] == 5 and metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    assert metrics["head_specialisation.sinks_minus_random"]["n"] == 0
    assert metrics["head_specialisation.sinks_minus_random"]["value"] is None
