"""A chapter executed as a user's papermill would, on a model or pictures that are not the lab's."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

from sinkstudy.paths import NOTEBOOKS, ROOT


def execute(notebook: str, folder: Path, **parameters) -> None:
    """Execute a chapter: the page becomes `folder/out.ipynb`, its tables `folder/<run>/<notebook>/`."""
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in parameters.items())
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / f"{notebook}.ipynb", folder / "out.ipynb", "-y", text]
    environment = os.environ | {"SINKSTUDY_RESULTS": str(folder), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, cwd=NOTEBOOKS, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


def printed(folder: Path) -> str:
    """What the executed chapter in `folder` printed."""
    cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def write_pictures(folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
    """Pictures of noise, `0.png` and on, of these (heights, widths)."""
    folder.mkdir()
    for seed, (high, wide) in enumerate(sizes):
        pixels = np.random.default_rng(seed).integers(0, 256, (high, wide, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
