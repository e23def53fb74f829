"""Chapter 08 on a model and pictures that are not the lab's: it writes all the ledger's metrics, empty ones too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import yaml
from PIL import Image

from sinkstudy.paths import DATA, NOTEBOOKS, ROOT
from tests.model import architectures


def test_pictures_of_a_folder(tmp_path: Path):
    """A packed tower with windows takes no register, and unknown answers leave the parts on answers out."""
    architectures.write(tmp_path / "tiny", "qwen2_5_vl")
    (tmp_path / "pictures").mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{seed}.png")
    given = {"model": str(tmp_path / "tiny"), "images_dir": str(tmp_path / "pictures"), "criterion": "percentile",
             "threshold": 90.0, "controls": []}
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in given.items())
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / "08-criteria.ipynb", tmp_path / "out.ipynb", "-y", text]
    environment = os.environ | {"SINKSTUDY_RESULTS": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, cwd=NOTEBOOKS, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]

    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "the parts on answers are left out" in printed
    metrics = {row["name"]: row for row in json.loads((tmp_path / "tiny/08-criteria/metrics.json").read_text())}
    claims = yaml.safe_load((DATA / "claims.yml").read_text())["claims"]
    for claim in claims:
        if claim["chapter"] == "08-criteria":
            row = metrics[claim["metric"].format(model="tiny")]
            assert (row["n"] == 0) == (row["value"] is None)
    ratio = metrics["tiny.neurons.silenced.norm_ratio"]
    assert ratio["n"] == 4 and 0 < ratio["low"] <= ratio["value"] <= ratio["high"]  # of five pictures, one found them
    assert metrics["tiny.neurons.silenced.accuracy"]["n"] == 0
