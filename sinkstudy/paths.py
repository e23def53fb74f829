"""Where things are. Every path of the project is derived here, from the place of this file."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
MODELS = DATA / "models"
METHODS = DATA / "methods"
RESULTS = ROOT / "results"
NOTEBOOKS = ROOT / "notebooks"
BOOK = ROOT / "book"
RUNS = BOOK / "runs"
DEFAULT_MODEL = "lab-llava"


def slug(model_name: str) -> str:
    """The name of a run: a model's name as one path component.

    `lab-llava` stays itself, `llava-hf/llava-1.5-7b-hf` becomes `llava-hf--llava-1.5-7b-hf`, and a folder
    becomes its last component.
    """
    path = Path(model_name).expanduser()
    if path.is_absolute() or model_name.startswith((".", "~")):
        model_name = path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model_name.strip("/").replace("/", "--"))


def lab_models() -> list[str]:
    """Names of the lab models whose weights are there, in alphabetical order."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def hub_commit(model: str, revision: str | None = None) -> str | None:
    """The commit of a hub model in this machine's cache, once it was loaded; None for a folder or a lab model.

    Args:
        model: a name as notebooks take it.
        revision: a branch, tag or commit; None or "" is the main branch.
    """
    if model in lab_models() or model.count("/") != 1 or Path(model).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache  # only now: the engine starts without it

    config = try_to_load_from_cache(model, "config.json", revision=revision or None)
    return Path(config).parent.name if isinstance(config, str) else None  # the cache has a folder for each commit


def results_dir(run: str, notebook: str) -> Path:
    """The folder that a notebook writes its tables to, made if missing: `results/<run>/<notebook>`.

    While the engine executes a notebook, SINKSTUDY_RESULTS names another root; the engine moves the folder into
    place once the notebook has ended. To *read* what an earlier run wrote, use `RESULTS / run / notebook`.
    """
    folder = Path(os.environ.get("SINKSTUDY_RESULTS", RESULTS)) / run / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` (same suffix); rename it onto `path` on success, remove it on error.

    Write a file at the yielded path, or make a folder there: a folder replaces an earlier folder at `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent))
    temporary = holder / path.name
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            path.rename(holder / "replaced")
        temporary.rename(path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
