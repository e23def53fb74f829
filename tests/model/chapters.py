"""A chapter executed as a user's papermill would, on a model or pictures that are not the lab's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat

from sinkstudy.paths import NOTEBOOKS, ROOT


def execute(notebook: str, folder: Path, *, model: Path | str, **parameters) -> Path:
    """Execute a chapter: the page becomes `folder/out.ipynb`; returns the folder of its tables."""
    given = {"model": str(model), **parameters}
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in given.items())
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / f"{notebook}.ipynb", folder / "out.ipynb", "-y", text]
    environment = os.environ | {"SINKSTUDY_RESULTS": str(folder), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, cwd=NOTEBOOKS, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder / Path(model).name / notebook


def metrics(tables: Path) -> dict[str, dict]:
    """The metrics of an executed chapter by their name."""
    return {row["name"]: row for row in json.loads((tables / "metrics.json").read_text())}


def printed(folder: Path) -> str:
    """What the executed chapter in `folder` printed."""
    cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")
