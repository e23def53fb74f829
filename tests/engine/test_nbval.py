"""`pytest --nbval` compares: a stored number broken on purpose is noticed, what cannot repeat itself is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """
import sys, time, tempfile
from sinkstudy.paths import results_dir
print("share 0.0312 of tokens")
print("took", round(time.time() % 7, 1), "s, wrote", tempfile.mkdtemp())
print(time.time(), file=sys.stderr)
_ = (results_dir("toy", "01") / "a.csv").write_text("x")
21 * 2
""".strip()
STREAM = "share 0.0312 of tokens\ntook 9.9 s, wrote /elsewhere/tmp1\n"


def store(path: Path, stream: str, result: str) -> None:
    outputs = [
        new_output("stream", name="stdout", text=stream),
        new_output("execute_result", data={"text/plain": result}, execution_count=1),
    ]
    nbformat.write(new_notebook(cells=[new_code_cell(SOURCE, outputs=outputs, execution_count=1)]), path)


def test_nbval_compares(tmp_path: Path):
    for name in ("conftest.py", "nbval.cfg", "sinkstudy/__init__.py", "sinkstudy/paths.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    store(tmp_path / "notebooks/01-equal-but-for-time-and-path.ipynb", STREAM, "42")
    store(tmp_path / "notebooks/02-number-in-a-line.ipynb", STREAM.replace("0.0312", "0.0313"), "42")
    store(tmp_path / "notebooks/03-result.ipynb", STREAM, "41")
    store(tmp_path / "notebooks/04-all-runs.ipynb", STREAM, "'results/*/01/a.csv'")  # what would differ is not compared
    (tmp_path / "results/owner--other/01").mkdir(parents=True)

    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--nbval", "notebooks"]
    environment = {key: value for key, value in os.environ.items() if key != "SINKSTUDY_RESULTS"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert ended.returncode == 1, ended.stdout
    assert "PASSED notebooks/01-equal" in ended.stdout
    assert "FAILED notebooks/02-number" in ended.stdout
    assert "FAILED notebooks/03-result" in ended.stdout
    assert "SKIPPED [1] notebooks/04-all-runs" in ended.stdout
    results = [path.name for path in (tmp_path / "results").iterdir()]
    assert results == ["owner--other"]  # the kernels' tables went elsewhere


def test_stored_notebooks_have_been_run():
    """nbval compares nothing in a cell without an execution count, and would call it passed."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = nbformat.read(path, as_version=4)
        code = [cell for cell in page.cells if cell.cell_type == "code"]
        counts = [cell.execution_count for cell in code]
        assert counts == list(range(1, len(code) + 1)), path.name
        assert any(cell.outputs for cell in code), path.name
        assert not any(output.output_type == "error" for cell in code for output in cell.outputs), path.name
