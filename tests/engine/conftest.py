"""A small project of its own, the real engine and Snakefile, two toy notebooks, no torch; and a copy of this one."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPOSITORY = Path(__file__).resolve().parents[2]

PARAMETERS = """
from sinkstudy.book.parameters import AtLeast1, Device, Dtype, Files, Finite, Model, Models, Revision, Seed

model: Model = "lab-llava"
device: Device = "cpu"
dtype: Dtype = "float32"
limit: AtLeast1 = 3
batch_size: AtLeast1 = 4
revision: Revision = ""
seed: Seed = 0
scale: Finite = 1.5
data: Files = "data/table.csv"
others: Models = ["lab-llava"]
"""
# 01 imports alpha, which imports beta; 02 imports neither. Each execution leaves a line in journal.txt.
FIRST = """
import time
from pathlib import Path
from sinkstudy.alpha import double
from sinkstudy.paths import ROOT, results_dir
out = results_dir("lab-llava", "01-first")
(out / "a.csv").write_text(f"value\\n{double(limit)}\\n")
time.sleep(float((ROOT / "pause").read_text()))
(out / "b.csv").write_text("value\\n1\\n")
(ROOT / "journal.txt").open("a").write("01-first\\n")
print(f"doubled: {double(limit)}")
"""
SECOND = """
from sinkstudy.paths import ROOT, results_dir
text = (ROOT / data).read_text()
(results_dir("lab-llava", "02-second") / "copy.csv").write_text(text)
(ROOT / "journal.txt").open("a").write("02-second\\n")
print(len(text), "characters")
"""


def copy_snakemake(root: Path) -> None:
    shutil.copy(REPOSITORY / "Snakefile", root / "Snakefile")
    shutil.copytree(REPOSITORY / "profiles", root / "profiles")


class Commands:
    """The command `sinkstudy` of a project in a temporary folder."""

    def __init__(self, root: Path, **environment: str):
        self.root = root
        self.environment = environment
        self.processes: list[subprocess.Popen] = []

    def start(self, *arguments: str, module: str = "sinkstudy.cli") -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(self.root)} | self.environment
        environment.pop("SINKSTUDY_RESULTS", None)
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=self.root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` would have it ignored
        )
        self.processes.append(process)
        return process

    def call(self, *arguments: str, code: int = 0, module: str = "sinkstudy.cli") -> str:
        """Run the command to its end and return what it printed."""
        process = self.start(*arguments, module=module)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == code, printed
        return printed

    def page(self, name: str, run: str = "lab-llava") -> nbformat.NotebookNode:
        return nbformat.read(self.root / "book" / "runs" / run / f"{name}.ipynb", as_version=4)

    def end(self) -> None:
        for process in self.processes:  # each began a session: its children too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class Project(Commands):
    """A toy project."""

    def __init__(self, root: Path):
        super().__init__(root)
        (root / "sinkstudy" / "book").mkdir(parents=True)
        base = ("__init__.py", "paths.py", "pictures.py", "digests.py", "devices.py", "progress.py", "cli.py")
        for name in (*base, "book/__init__.py", "book/parameters.py", "book/engine.py", "book/render.py"):
            shutil.copy(REPOSITORY / "sinkstudy" / name, root / "sinkstudy" / name)
        copy_snakemake(root)
        self.write("sinkstudy/alpha.py", "from .beta import TWO\n\n\ndef double(x):\n    return TWO * x\n")
        self.write("sinkstudy/beta.py", "TWO = 2\n")
        self.write("sinkstudy/unused.py", "")
        self.write("data/table.csv", "x\n1\n")
        self.write("data/models/lab-llava/config.json", "{}")
        self.write("data/models/lab-llava/README.md", "A card.")
        self.write("pause", "0")
        self.notebook("01-first", FIRST)
        self.notebook("02-second", SECOND)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def notebook(self, name: str, code: str, parameters: str = PARAMETERS, prose: str = "# A toy") -> None:
        cells = [new_markdown_cell(prose), new_code_cell(parameters.strip()), new_code_cell(code.strip())]
        cells[1].metadata["tags"] = ["parameters"]
        for index, cell in enumerate(cells):
            cell["id"] = f"cell-{index}"
        (self.root / "notebooks").mkdir(exist_ok=True)
        metadata = {
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        }
        nbformat.write(new_notebook(cells=cells, metadata=metadata), self.root / "notebooks" / f"{name}.ipynb")

    def snakemake(self, *arguments: str) -> str:
        """Run plain Snakemake to its end and return what it printed."""
        return self.call(*(arguments or ("--cores", "2")), module="snakemake")

    def executed(self, *arguments: str, by: Callable[..., str] | None = None) -> list[str]:
        """The notebooks that `sinkstudy run`, or `by`, executes, in alphabetical order."""
        (self.root / "journal.txt").unlink(missing_ok=True)
        by(*arguments) if by else self.call("run", *arguments)
        journal = self.root / "journal.txt"
        return sorted(journal.read_text().split()) if journal.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """A copy of this project, whose runs leave nothing in the original; it knows no hub but an empty cache."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("sinkstudy", "notebooks"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    copy_snakemake(root)
    (root / "data").symlink_to(REPOSITORY / "data")
    made = Commands(root, HF_HOME=str(root / "hub"), HF_HUB_OFFLINE="1")
    yield made
    made.end()
