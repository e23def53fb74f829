"""One lock file: the conda environment, the project file, the Makefile and what is installed follow it."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PINS = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#")
# the names of packages whose modules are called otherwise
PACKAGES = {"PIL": "pillow", "yaml": "PyYAML", "IPython": "ipython", "myst_nb": "myst-nb", "bs4": "beautifulsoup4"}


def test_every_line_is_an_exact_pin():
    assert all(re.fullmatch(r"[\w.+!-]+", version) for version in PINS.values())
    assert PINS["torch"] == "2.13.0"
    assert PINS["transformers"] == "5.23.0"
    assert PINS["jupyter-book"] == "1.0.4.post1"


def test_conda_environment_reads_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert packages == {"pip": ["-r requirements.lock", "-e ."]}  # no pin of its own, so none can differ
    assert pip == "pip"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert python.replace("python=", "==") + ".*" == project["project"]["requires-python"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.lock"]}


def test_installed_versions_are_the_pinned_ones():
    installed = {name: metadata.version(name).split("+")[0] for name in PINS}  # a build tag (+cpu) may follow
    assert installed == PINS


def test_every_import_is_pinned():
    imported = set()
    for path in [*ROOT.glob("*.py"), *(p for d in ("sinkstudy", "tests", "bench") for p in (ROOT / d).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - {"sinkstudy", "tests"}
    foreign -= {p.stem for p in (ROOT / "tests").rglob("*.py")}
    pinned = {name.lower().replace("-", "_") for name in PINS}
    assert {m for m in foreign if PACKAGES.get(m, m).lower().replace("-", "_") not in pinned} == set()


def setup(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/setup").write_bytes((ROOT / ".ci/setup").read_bytes())
    environment = {"PATH": "/usr/bin:/bin"} | environment
    command = ["sh", str(tmp_path / ".ci/setup"), ".venv/stamp"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def one_sentence(ended: subprocess.CompletedProcess) -> str:
    assert ended.returncode == 1
    assert ended.stdout == "" and len(ended.stderr.splitlines()) == 1
    return ended.stderr


def fake_python(tmp_path: Path, version: str, venv: bool) -> str:
    path = tmp_path / "a-python"
    path.write_text(f'#!/bin/sh\ncase "$2" in *version*) echo {version};; *) exit {0 if venv else 1};; esac\n')
    path.chmod(0o755)
    return str(path)


def test_wrong_python_is_one_sentence(tmp_path: Path):
    said = one_sentence(setup(tmp_path, PYTHON=fake_python(tmp_path, "3.12", venv=True)))
    assert "Python 3.11 is needed" in said and "PYTHON=" in said


def test_missing_venv_module_is_one_sentence(tmp_path: Path):
    said = one_sentence(setup(tmp_path, PYTHON=fake_python(tmp_path, "3.11", venv=False)))
    assert "lacks the venv module" in said


def test_full_disk_is_one_sentence(tmp_path: Path):
    python = fake_python(tmp_path, "3.11", venv=True)
    said = one_sentence(setup(tmp_path, PYTHON=python, SINKSTUDY_DISK_GB="99999999"))
    assert "need 99999999 GB of disk" in said


def test_wrong_venv_is_one_sentence(tmp_path: Path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    Path(fake_python(tmp_path, "3.9", venv=True)).rename(tmp_path / ".venv/bin/python")
    assert ".venv holds another Python than 3.11" in one_sentence(setup(tmp_path))
