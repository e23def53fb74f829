"""Where things are. Every path of the project is derived here.

The package lies in a checkout of the repository, with notebooks, weights and pages beside it; or it was installed
without. Then paths of data and results start from the current folder, and what is kept goes to the user's cache.
"""

import ctypes
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "Snakefile").is_file() else None
ROOT = CHECKOUT or Path.cwd()
DATA = ROOT / "data"
MODELS = DATA / "models"
TRAINED = DATA / "methods"
ALIGNMENT = DATA / "alignment"
RESULTS = ROOT / "results"
CACHE = DATA / "cache" if CHECKOUT else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sinkstudy"
PLAIN = CACHE / "plain"
NOTEBOOKS = ROOT / "notebooks"
BOOK = ROOT / "book"
RUNS = BOOK / "runs"
BUILD = ROOT / "_build"
DEFAULT_MODEL = "lab-llava"
FULL = f"{DEFAULT_MODEL}-full"  # the run with more pictures, from which verdicts come: data/full.yml
POSITIVE_CONTROL = "lab-llava-gist"  # the lab model whose sinks are there by construction
ADAPTER = "adapter_config.json"
HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
UNMERGED = (
    "an adapter has to be merged into its base first (merge_and_unload of peft), and the model that it makes saved"
)


def slug(model_name: str) -> str:
    """The name of a run: a model's name as one path component.

    `lab-llava` stays itself, `llava-hf/llava-1.5-7b-hf` becomes `llava-hf--llava-1.5-7b-hf`, and a folder
    becomes its last component, with `-` for what is no letter, digit, dot, dash or underline of ASCII. A name in which
    nothing else is left becomes `model-` and a digest.
    """
    path = Path(model_name).expanduser()
    if path.is_absolute() or model_name.startswith((".", "~")):
        model_name = path.resolve().name
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", model_name.strip("/").replace("/", "--")).lstrip("._-")[:120]
    return kept or f"model-{hashlib.sha256(model_name.encode()).hexdigest()[:8]}"


def check_name(run: str) -> None:
    """Raise ValueError unless `run` can be the name of a run."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}", run):
        raise ValueError(
            f"'{run[:80]}' is no name for a run: at most 120 letters, digits, '.', '_' and '-' only (--name)"
        )


def check_claim(run: str, model: str) -> None:
    """Make sure that `results/<run>` may take results of a model.

    Raises:
        ValueError: it has those of another model, or `run` is no name.
    """
    check_name(run)
    of = noted_model(RESULTS / run) or (run if run in lab_models() else model)
    if of != model:
        raise ValueError(f"the run {run} holds results of {of}: give those of {model} another name (--name)")


def claimed(run: str, model: str) -> None:
    """Note in `results/<run>` whose results they are, where the name does not say it: before the first is put there.

    Raises:
        ValueError: as `check_claim`.
    """
    check_claim(run, model)
    if run != model and not noted_model(RESULTS / run):
        with atomic(RESULTS / run / "model.txt") as temporary:
            temporary.write_text(f"{model}\n", encoding="utf-8")


def noted_model(run: Path) -> str:
    """The model whose results a run's folder holds, where its name does not say it; else empty."""
    note = run / "model.txt"
    return note.read_text(encoding="utf-8").strip() if note.is_file() else ""


def written(*patterns: str, root: Path = RESULTS) -> list[tuple[str, str, Path]]:
    """What runs wrote: (run, chapter, file) of the files `<run>/<chapter>/<name>`.

    The full run's come first, then the default run's, then the others' by name.
    """
    found = {file for pattern in patterns for file in root.glob(pattern)}
    named = [(file.parts[-3], file.parts[-2], file) for file in found]
    first = {FULL: 0, DEFAULT_MODEL: 1}
    return sorted(named, key=lambda of: (first.get(of[0], 2), of))


def place(path: str) -> Path:
    """A path as parameters have it: from `ROOT`, absolute, or with `~` for home."""
    return ROOT / Path(path).expanduser()


def below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those below, also behind links; each folder once, in the order of their names."""
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:  # a link that leads back, say
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (file for name in sorted(names) if (file := Path(here, name)).is_file())


def lab_models() -> list[str]:
    """Names of the lab models whose weights are there, in alphabetical order."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def model_folder(name: str) -> Path | None:
    """The folder of a model, or of an adapter; None for a model of the hub, whose name is an id `owner/name`.

    Raises:
        ValueError: no lab model, no folder with a config.json or an adapter_config.json, and no such id.
    """
    if name in lab_models():
        return MODELS / name
    if len(name) < 500 and "\n" not in name:
        folder = Path(name).expanduser()
        try:
            if (folder / "config.json").is_file() or (folder / ADAPTER).is_file():
                return folder
            if folder.is_dir():
                raise ValueError(f"the folder {name} holds no model: it has no config.json")
            if not folder.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
                return None
        except OSError as error:
            raise ValueError(f"the folder {name} cannot be read: {error.strerror}") from None
    raise ValueError(
        f"unknown model {name[:80]!r}: not one of {', '.join(lab_models()) or f'the lab models (none is in {MODELS})'},"
        " not a folder with config.json, not a hub id of the form owner/name"
    )


def hub_commit(model: str, revision: str | None) -> str | None:
    """The commit of a hub model in this machine's cache, once it was loaded; None for a folder or a lab model.

    Args:
        model: a name as notebooks take it; empty for none.
        revision: a branch, tag or commit; None or "" is the main branch.
    """
    if not model or model_folder(model) is not None:
        return None
    from huggingface_hub import try_to_load_from_cache  # only now: the engine starts without it

    config = try_to_load_from_cache(model, "config.json", revision=revision or None)
    return Path(config).parent.name if isinstance(config, str) else None  # the cache has a folder for each commit


def results_dir(run: str, notebook: str) -> Path:
    """The folder that a notebook writes its tables to, made if missing: `results/<run>/<notebook>`.

    While the engine executes a notebook, SINKSTUDY_RESULTS names another root; the engine moves the folder into
    place once the notebook has ended. A notebook that something else executes, such as plain papermill or Jupyter,
    writes to `PLAIN`, since nobody knows with which parameters: `results/` holds what the engine can vouch for. To
    *read* what an earlier run wrote, use `RESULTS / run / notebook`.
    """
    folder = Path(os.environ.get("SINKSTUDY_RESULTS", PLAIN)) / run / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_writable(folder: Path) -> Path:
    """See that files can be written to a folder or, where there is none, to the nearest above it, which is returned.

    Nothing is made. Raises ValueError.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError as error:
        raise ValueError(f"nothing can be written to {folder}: {error.strerror}") from None


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` (same suffix); rename it onto `path` on success, remove it on error.

    Write a file at the yielded path, or make a folder there: a folder replaces an earlier folder at `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    holder = Path(tempfile.mkdtemp(prefix=f".partial-{os.getpid()}-{HOST}-", dir=path.parent))
    temporary = holder / path.name
    try:
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            _sync(file)
        if not (temporary.is_dir() and path.exists() and _exchanged(temporary, path)):
            if temporary.is_dir() and path.exists():
                path.rename(holder / "replaced")
            temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk: after a power loss a renamed file is not empty."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders take each other's place in one step, where the system can: readers see the old or the new."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


PARTIAL = f".partial-[0-9]*-{HOST}-*"


def sweep(folder: Path, pattern: str = PARTIAL) -> None:
    """Remove half-made things of this machine whose process is gone; those of others in a shared folder are theirs.

    `pattern` is that of their names, in which the process stands behind the first dash.
    """
    for left in folder.glob(pattern):
        if (pid := left.name.split("-")[1]).isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
