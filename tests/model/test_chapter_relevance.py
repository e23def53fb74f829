"""Chapter 04 on a model and pictures that are not the lab's: it writes all the ledger's metrics, empty ones too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

from sinkstudy.paths import NOTEBOOKS, ROOT
from tests.model import architectures


def test_pictures_of_a_folder(tmp_path: Path):
    architectures.write(tmp_path / "tiny", "qwen2_5_vl")
    (tmp_path / "pictures").mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{seed}.png")
    given = {"model": str(tmp_path / "tiny"), "images_dir": str(tmp_path / "pictures"), "criterion": "percentile",
             "threshold": 90.0, "controls": []}
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in given.items())
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / "04-relevance.ipynb", tmp_path / "out.ipynb", "-y", text]
    environment = os.environ | {"SINKSTUDY_RESULTS": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, cwd=NOTEBOOKS, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]

    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "5 pictures of 8 x 4 patches\n" in printed and "skipped: calm patches, things" in printed
    rows = json.loads((tmp_path / "tiny" / "04-relevance" / "metrics.json").read_text())
    metrics = {row["name"].removeprefix("tiny."): row for row in rows}
    for name in ("spread.sinks_minus_random", "spread.others_minus_uniform"):
        assert metrics[name]["n"] == 5 and metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    assert metrics["head_specialisation.sinks_minus_random"]["n"] == 0
    assert metrics["head_specialisation.sinks_minus_random"]["value"] is None
