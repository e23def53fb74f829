"""The package as a wheel, without its repository: every command from an empty folder, and the package as a library."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import noise
import pytest
import typer
from architectures import write

from sinkstudy import cli

ROOT = Path(__file__).resolve().parents[2]
WORKS = {"route", "diysink"}  # without a checkout
NEEDS = {"run", "book", "compare", "models", "check-fresh", "check-full", "lab train", "lab gates", "lab norms",
         "lab diysink", "lab alignment"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of installed packages with the wheel alone."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.lock"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "sinkstudy", source / "sinkstudy", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", source, "--no-deps", "--no-build-isolation", "-w", source / "dist"], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *source.glob("dist/*.whl")], check=True)
    return site


@pytest.fixture
def python(site, tmp_path):
    """Call Python from an empty folder, which it returns with what was printed."""
    empty, home = tmp_path / "empty", tmp_path / "home"
    for folder in (empty, home):
        folder.mkdir()

    def call(*arguments, code: int = 0) -> tuple[str, str, Path]:
        environment = os.environ | {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        for key in ("SINKSTUDY_ANSWERS", "SINKSTUDY_RESULTS"):
            environment.pop(key, None)
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr, empty

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "tiny", "llava")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Four pictures, questions about them, and conversations."""
    folder = noise.write(tmp_path_factory.mktemp("data") / "own", [(48, 40)] * 4)
    questions, samples = [], []
    for i in range(4):
        questions.append({"question": "is the texture red", "answer": ("yes", "no")[i % 2], "image": f"{i}.png"})
        said = [{"from": "human", "value": "<image>\nhow many"}, {"from": "gpt", "value": "red"}]
        samples.append({"id": str(i), "image": f"{i}.png", "conversations": said})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder.parent / "samples.json").write_text(json.dumps(samples))
    return folder


def commands(group, before: str = "") -> set[str]:
    names = set()
    for name, command in group.commands.items():
        names |= commands(command, f"{name} ") if hasattr(command, "commands") else {before + name}
    return names


def test_every_command_has_its_place_here():
    assert commands(typer.main.get_command(cli.app)) == WORKS | NEEDS


@pytest.mark.parametrize("command", sorted(NEEDS))
def test_a_command_that_needs_the_checkout_says_so(python, command):
    runs = ("one", "another") if command == "compare" else ()
    said, told, folder = python("-m", "sinkstudy.cli", *command.split(), *runs, code=2)
    assert not said and len(told.splitlines()) == 1
    assert "was installed without: clone its repository, run `make setup`" in told
    assert not any(folder.iterdir())


def test_help_of_every_command(python):
    for command in WORKS | NEEDS:
        assert "Usage: " in python("-m", "sinkstudy.cli", *command.split(), "--help")[0]


def test_methods_are_measured_on_own_pictures(python, site, model, pictures):
    before = sorted(path for path in site.rglob("*") if path.suffix != ".pyc")
    options = ["--benchmark", "own", "--data-dir", pictures.parent, "--method", "front"]
    said, _, folder = python("-m", "sinkstudy.cli", "route", model, *options)
    table = folder / "results" / "tiny" / "route" / "public-own-front.csv"
    assert f"written: {table}" in said and table.is_file()
    assert [path.name for path in folder.iterdir()] == ["results"]
    assert (folder.parent / "home" / "sinkstudy" / "answers").is_dir()  # what is kept, in the user's cache
    assert sorted(path for path in site.rglob("*") if path.suffix not in (".pyc", "")) == [
        path for path in before if path.suffix != ""]


def test_a_lab_model_is_not_there(python):
    _, told, folder = python("-m", "sinkstudy.cli", "route", "lab-llava", "--method", "front", code=1)
    assert f"unknown model 'lab-llava': not one of the lab models (none is in {folder / 'data/models'})" in told
    assert len(told.splitlines()) == 1 and not any(folder.iterdir())


def test_what_fails_leaves_its_traceback_in_the_users_cache(python, model, pictures, tmp_path):
    results, options = tmp_path / "empty" / "results", ["--data-dir", pictures.parent, "--method", "front"]
    results.write_text("a file where a folder should be")
    log = tmp_path / "home" / "sinkstudy" / "failed" / "command.log"
    _, told, _ = python("-m", "sinkstudy.cli", "route", model, "--benchmark", "own", *options, code=1)
    assert told.startswith("sinkstudy: nothing can be written to ") and len(told.splitlines()) == 1  # before any work
    assert not log.exists()
    results.unlink()
    (results / "tiny" / "route" / "public-own-front.csv").mkdir(parents=True)  # a folder where the table should be
    _, told, folder = python("-m", "sinkstudy.cli", "route", model, "--benchmark", "own", *options, code=1)
    *_, last = told.splitlines()
    assert last.startswith("sinkstudy: route: ") and f"(see {log})" in last
    assert "Traceback" in log.read_text() and [path.name for path in folder.iterdir()] == ["results"]


def test_a_method_is_trained(python, model, pictures):
    how = ["--stage", "pretrain", "--method", "one-connector", "--steps", "1", "--batch-size", "2", "--accumulate", "1"]
    where = ["--data", pictures.parent / "samples.json", "--images", pictures, "--out", "out", "--device", "cpu"]
    _, _, folder = python("-m", "sinkstudy.cli", "diysink", model, *how, *where)
    assert list((folder / "out").glob("*.safetensors"))


LIBRARY = """
import sys
from PIL import Image
from sinkstudy import benchmarks, paths
from sinkstudy.model import capture, loading
model, pictures = sys.argv[1:]
table = benchmarks.load("own", path=pictures)
lvlm = loading.load(model)
norms, *_ = capture.trace_tower(lvlm, [table.image[0].open()])
print(len(table), norms.isfinite().all().item(), paths.CHECKOUT)
"""


def test_as_a_library(python, model, pictures):
    said, _, folder = python("-c", LIBRARY, model, pictures)
    assert said.split() == ["4", "True", "None"] and not any(folder.iterdir())
