"""What a notebook follows from, and how one is executed.

Snakemake (see the `Snakefile`) decides what runs, by a notebook's *fingerprint*: SHA-256 digests of its own text, of
its parameters, of the `sinkstudy` modules that it imports, and of the model, data and result files that its parameters
name. An executed notebook carries its fingerprint, so that `sinkstudy check-fresh` needs no record of Snakemake's.

A notebook declares what it reads through the types of its parameters (`parameters.Names`): a model, files, a folder of
pictures, or a pattern of results of other notebooks, after which it is then executed.
"""

import ast
import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from sinkstudy import digests, paths, progress
from sinkstudy.book import parameters
from sinkstudy.book.parameters import UserError, cells, check_model, defaults, files, source
from sinkstudy.paths import DATA, DEFAULT_MODEL, FULL, NOTEBOOKS, PACKAGE, RESULTS, ROOT, RUNS, atomic, slug

WORK = RUNS / ".work"  # half-made things, never read by the book
LEAST_FREE = 50_000_000  # bytes: a run's notebooks and tables take less
VERSIONS = ("torch", "transformers", "captum", "numpy", "pandas", "scipy", "seaborn", "papermill", "jupyter-book")


# ---- notebooks and their fingerprints


def notebooks(only: Iterable[str] = ()) -> list[str]:
    """Names of the source notebooks, all or those that begin with one of `only`. Raises UserError if none does."""
    names = sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))
    for prefix in only:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"no notebook begins with '{prefix}'; there are: {', '.join(names)}")
    return [name for name in names if not only or name.startswith(tuple(only))]


def fingerprint(notebook: str, given: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of all that the outputs of `notebook` follow from where `given` differs from its defaults, by kind."""
    return {kind: of(notebook, given) for kind, of in KINDS.items()}


@cache
def _source(notebook: str) -> str:
    return digests.of_values(
        [[cell["cell_type"], _text(cell), cell["metadata"].get("tags", [])] for cell in cells(notebook)]
    )


@cache
def _package(notebook: str) -> str:
    return files_sha256(modules(notebook))


def _data(notebook: str, values: dict[str, Any]) -> str:
    data, results = (of(notebook, values) for of in (parameters.data_files, parameters.result_files))
    return _combined([*map(_line_once, data), *map(_line, results)])


# A process reads notebooks, modules, models and data once, however many runs it plans; results may change meanwhile.
KINDS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "source_sha256": lambda notebook, given: _source(notebook),
    "params_sha256": lambda notebook, given: digests.of_values(defaults(notebook) | given),
    "package_sha256": lambda notebook, given: _package(notebook),
    "model_sha256": lambda notebook, given: _combined(
        map(_line_once, parameters.model_files(notebook, defaults(notebook) | given))
    ),
    "data_sha256": lambda notebook, given: _data(notebook, defaults(notebook) | given),
}


def modules(notebook: str) -> list[Path]:
    """The files of `sinkstudy` that a notebook imports, directly or through one another (static, by syntax tree)."""
    code = "\n".join(_text(cell) for cell in cells(notebook) if cell["cell_type"] == "code")
    waiting = set(_imports(re.sub(r"(?m)^\s*[%!].*$", "", code), ""))
    found: set[Path] = set()
    while waiting:
        name = waiting.pop()
        base = ROOT.joinpath(*name.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file() and path not in found:
                found.add(path)
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                waiting |= _imports(path.read_text(encoding="utf-8"), package)
    return sorted(found)


@cache  # Snakemake asks for every notebook's fingerprint several times
def _imports(code: str, package: str) -> set[str]:
    """Dotted names under `sinkstudy` that `code`, a module of `package`, imports, with the packages around them."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}  # a name may be a submodule
    names = {name for name in names if name.split(".")[0] == "sinkstudy"}
    return {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}


def read_by(notebook: str, run: str, given: dict[str, Any]) -> list[str]:
    """The notebooks whose results in `run` a notebook reads: they have to be executed before it."""
    others = [name for name in notebooks() if name != notebook]
    return parameters.reads(notebook, run, defaults(notebook) | given, others)


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files; the same wherever the project lies."""
    return _combined(map(_line, paths))


def _combined(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256(b"".join(sorted(set(lines)))).hexdigest()
    digests.remember()
    return digest


def _line(path: Path) -> bytes:
    """A file's name, from the project's root, and the digest of its content."""
    name = os.path.relpath(path, ROOT).encode("utf-8", "surrogateescape")
    return name + b"\0" + bytes.fromhex(digests.sha256(path))


_line_once = cache(_line)


def _text(cell: dict) -> str:
    return "".join(cell["source"])


def asks(notebook: str, given: dict[str, Any], model_mb: int = 0) -> dict[str, int]:
    """What the execution of a notebook asks of a cluster: memory in MB, minutes, and GPUs.

    From what its last stored execution took (`update_notebooks`), on two shared CPU cores and the lab models: half as
    much memory again, and room for the job's own processes; five times the time, and half an hour. A model that is not
    the lab's gets `model_mb` more, of `check_memory`, and a day. `--set-resources notebook:runtime=600` says otherwise.
    """
    took = _stored(notebook)
    lab = (defaults(notebook) | given).get("model", DEFAULT_MODEL) in paths.lab_models()
    return {
        "mem_mb": 1000 + int(1.5 * took.get("memory_mb", 1200)) + model_mb,  # 1200: two at a time took 2.4 GB
        "runtime": 30 + int(5 * took.get("seconds", 300) / 60) if lab else 24 * 60,
        "gpu": int(given.get("device", "cpu") != "cpu"),
    }


def _stored(notebook: str) -> dict[str, Any]:
    """What the execution took whose outputs are stored in `notebooks/`: seconds and memory_mb, if known."""
    return source(notebook)["metadata"].get("sinkstudy", {})


# ---- executed notebooks


def record(run: str, notebook: str) -> dict[str, Any]:
    """What the engine noted in an executed notebook; empty if there is none that can be read whole."""
    try:
        page = json.loads((RUNS / run / f"{notebook}.ipynb").read_text(encoding="utf-8"))
        noted = page["metadata"].get("sinkstudy", {}) if isinstance(page["cells"], list) else {}
        return noted if isinstance(noted.get("params"), dict) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # cut off by a power loss, say
        return {}


def is_whole(run: str, notebook: str) -> bool:
    """Is there an executed notebook, and beside it what it wrote, unchanged?"""
    noted = record(run, notebook)
    return bool(noted) and noted.get("results_sha256") == files_sha256(files(RESULTS / run / notebook))


def is_fresh(run: str, notebook: str, given: dict[str, Any] | None = None) -> bool:
    """Is it whole, and does it follow from today's sources, under the values `given`, if any?"""
    if not is_whole(run, notebook) or not (NOTEBOOKS / f"{notebook}.ipynb").is_file():
        return False
    noted = record(run, notebook)
    try:
        now = fingerprint(notebook, noted["params"] if given is None else given)
    except ValueError:  # the folder of pictures that it names is gone
        return False
    return all(noted.get(key) == value for key, value in now.items())


def executed(run: str) -> list[str]:
    """Names of the executed notebooks of a run."""
    return sorted(path.stem for path in (RUNS / run).glob("[0-9]*.ipynb"))


def runs() -> list[str]:
    """Names of the runs that have an executed notebook, the default model's first."""
    found = {path.parent.name for path in RUNS.glob("[!.]*/[0-9]*.ipynb")}
    return sorted(found, key=lambda run: (run != DEFAULT_MODEL, run))


def stale() -> list[str]:
    """`run/notebook` of every executed notebook that is out of date."""
    return [f"{run}/{name}" for run in runs() for name in executed(run) if not is_fresh(run, name)]


def execute(notebook: str, run: str, given: dict[str, Any]) -> None:
    """Execute a notebook into `book/runs/<run>/` and its tables into `results/<run>/`, each appearing only whole.

    `given` are the parameters that differ from the notebook's defaults. Raises UserError, in one line, if a cell fails
    or anything else does; the notebook up to that cell, or the traceback, is kept under `book/runs/.work/failed/`.
    """
    failed = WORK / "failed" / f"{run}--{notebook}.ipynb"
    try:
        _execute(notebook, run, given, failed)
    except Exception as error:
        told = error if isinstance(error, UserError) else one_line(error, f"{notebook} failed on {run}", failed)
        raise told from None


def one_line(error: Exception, what: str, beside: Path) -> UserError:
    """Any error in one line, with what to do where that is known; its traceback goes to a file that the line names."""
    log = beside.with_suffix(".log")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
        seen = f" (see {log})"
    except OSError:
        seen = ""
    said = next(iter(str(error).strip().splitlines()), "")
    hint = ""
    if type(error).__name__ == "DeadKernelError":
        said, hint = "its kernel died", ": the system may have killed it for want of memory; try a smaller --batch-size"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = ": the disk is full; make room and run again, what was finished is kept"
    elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        hint = ": it must be writable"
    return UserError(f"{what}: {said or type(error).__name__}{hint}{seen}")


def _execute(notebook: str, run: str, given: dict[str, Any], failed: Path) -> None:
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    own = defaults(notebook)
    values = own | given
    if unknown := sorted(set(given) - set(own)):  # in a plan or on Snakemake's command line
        raise UserError(f"{notebook} has no parameter {', '.join(unknown)}")
    if "model" in values:
        claim(run, values["model"])
    with _alone(f"{run}--{notebook}") as work, _sockets() as sockets:
        if is_fresh(run, notebook, given):  # see the Snakefile; or an earlier process, thought dead, has done it
            return
        noted = {"run": run, "params": given, "values": values, **fingerprint(notebook, given)}
        noted |= surroundings() | {key: values.get(key) for key in ("model", "device", "dtype", "seed")}
        _kernel_environment(work, notebook, values)
        copy = work / f"{notebook}.ipynb"
        started = time.time()
        try:
            papermill.execute_notebook(
                NOTEBOOKS / f"{notebook}.ipynb",
                copy,
                given,
                kernel_name="python3",
                language="python",
                cwd=NOTEBOOKS,
                config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),  # no open ports
                progress_bar=progress.of_cells(notebook),
                stderr_file=_Progress(notebook),
            )
        except PapermillExecutionError as error:
            failed.parent.mkdir(exist_ok=True)
            copy.replace(failed)
            reason = next(iter(error.evalue.strip().splitlines()), "")
            problem = f"{notebook} failed on {run} in cell {error.cell_index + 1}: {error.ename}: {reason}"
            problem += f" (see {failed.relative_to(ROOT)})"
            raise UserError(problem) from None
        made = work / "results" / slug(values.get("model", run)) / notebook
        made.mkdir(parents=True, exist_ok=True)
        if "model" in values:
            paths.claimed(run, values["model"])
        _put(made, RESULTS / run / notebook)
        noted["results_sha256"] = files_sha256(files(RESULTS / run / notebook))
        noted["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
        noted["seconds"] = round(time.time() - started, 1)
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # the kernel's: KiB, on macOS bytes
        noted["memory_mb"] = largest // (1 << 20 if sys.platform == "darwin" else 1 << 10)
        noted["revision"] = paths.hub_commit(values.get("model", ""), values.get("revision")) or ""
        page = tidy(nbformat.read(copy, as_version=4))
        page.metadata["sinkstudy"] = noted
        with atomic(RUNS / run / f"{notebook}.ipynb") as target:
            nbformat.write(page, target)
    print(f"{notebook}: executed on {run} in {progress.minutes(noted['seconds'])}", file=sys.stderr)


class _Progress(progress.Lines):
    """A file for what a kernel writes to stderr: passes on how far its work is, and nothing else."""

    def __init__(self, notebook: str) -> None:
        self.beginning = f"{notebook}: "

    def write(self, text: str) -> None:
        for line in text.splitlines():
            if line.startswith(self.beginning):
                over = progress.on_terminal()  # behind a bar, whose next state is drawn over what stands last
                print(f"\n{line}" if over else line, end="" if over else "\n", file=sys.stderr)


@contextmanager
def _sockets() -> Iterator[str]:
    """A folder for a kernel's sockets, whose paths must be short; those that killed processes left are removed."""
    paths.sweep(Path(tempfile.gettempdir()), "sinkstudy-[0-9]*-*")
    with tempfile.TemporaryDirectory(prefix=f"sinkstudy-{os.getpid()}-") as folder:
        # the longest address of a socket is about 100 characters; below a longer TMPDIR there is /tmp
        if len(folder) < 70 or not os.access("/tmp", os.W_OK):
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix=f"sinkstudy-{os.getpid()}-", dir="/tmp") as short:
            yield short


def _kernel_environment(work: Path, notebook: str, values: dict[str, Any]) -> None:
    """Settings that the kernel inherits: tables go to `work`, this checkout is imported, nothing is random."""
    os.environ |= {"SINKSTUDY_RESULTS": str(work / "results"), progress.CHAPTER: notebook}
    os.environ |= {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    # threads that wait for one another sleep: on a shared machine spinning takes several times as long as the work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if values.get("model") in paths.lab_models():
        os.environ["HF_HUB_OFFLINE"] = "1"  # the embedded models need no network


def _put(made: Path, target: Path) -> None:
    """Put a copy of the folder `made` in the place of `target`, which may lie on another file system, all at once."""
    if any(made.iterdir()):
        with atomic(target) as temporary:
            shutil.copytree(made, temporary)
    else:
        shutil.rmtree(target, ignore_errors=True)


def tidy(page):
    """Make an executed notebook fit to be read and compared.

    Drops what went to stderr (progress bars), merges consecutive stdout outputs, strips papermill's notes, and folds
    the cell of injected parameters.
    """
    page.metadata.pop("papermill", None)
    page.metadata.pop("widgets", None)  # their scripts lie on another host
    for cell in page.cells:
        for key in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(key, None)
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags and "hide-input" not in tags:
            cell.metadata["tags"] = [*tags, "hide-input"]
        if cell.cell_type != "code":
            continue
        merged = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                continue
            if output.output_type == "stream" and merged and merged[-1].output_type == "stream":
                merged[-1].text += output.text
            else:
                merged.append(output)
        cell.outputs = merged
    return page


def surroundings() -> dict[str, Any]:
    """Commit, whether tracked files differ from it, Python and the versions of the packages that matter."""

    def git(*arguments: str) -> str:
        try:
            ended = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return ended.stdout.strip()

    versions = {"python": sys.version.split()[0]}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):  # where books are not rendered, say
            versions[name] = metadata.version(name)
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "sinkstudy", "notebooks", "data")
    return {"git_commit": git("rev-parse", "HEAD"), "dirty": bool(changed), "versions": versions}


@contextmanager
def _alone(name: str) -> Iterator[Path]:
    """Yield an empty folder of this name, which no other process has meanwhile; wait for one that has it.

    The system frees the lock when its holder dies; what a killed process left in the folder is removed.
    """
    folder = WORK / f"run-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(WORK / f"{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{name} is being executed by another process: waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


# ---- runs


def run(
    models: Sequence[str] = (DEFAULT_MODEL,),
    *,
    only: Iterable[str] = (),
    given: dict[str, Any] | None = None,
    name: str | None = None,
    full: bool = False,
    jobs: int | None = None,
    profile: Path | None = None,
) -> list[str]:
    """Bring the notebooks of a run for each model up to date and return the runs' names.

    Args:
        models: lab models, local folders with config.json, or hub ids `owner/name`.
        only: beginnings of notebook names; all notebooks without it.
        given: values for the notebooks' parameters, besides `model`.
        name: the name of the run, of one model; by default the slug of the model's.
        full: the run `FULL`, of the chapters and with the parameters of `data/full.yml`, which `given` cannot replace.
        jobs: notebooks executed at the same time; 1 without it, or what the profile says.
        profile: folder of a Snakemake profile that has the notebooks executed elsewhere, on a cluster say. Neither
            device nor memory of this machine count then; the memory that a model needs becomes part of the request.

    Notebooks that are none for the model, or for so few pictures, are left out, and named.

    Raises UserError, before any kernel starts, for parameters that no notebook has or that do not fit, and for a
    model that cannot be read or does not fit into memory; and after the run if a notebook failed.
    """
    wanted, given, each = notebooks(only), dict(given or {}), full_parameters() if full else {}
    if own := sorted({key for values in each.values() for key in values} & set(given)):
        raise UserError(f"verdicts come from the full run, which takes {', '.join(own)} from data/full.yml alone")
    if full:
        wanted, name = [notebook for notebook in wanted if notebook in each], FULL
    if not wanted:
        raise UserError(f"the full run has {', '.join(each)} only" if full else "there are no notebooks")
    if name and len(models) > 1:
        raise UserError(f"--name is for the run of one model, and there are {len(models)}")
    there = {"device": given.pop("device")} if profile and "device" in given else {}  # not for this machine to judge
    plans: dict[str, dict[str, dict]] = {}
    outdated: dict[tuple[str, str], dict[str, Any]] = {}
    for model in models:
        suited = _suited(wanted, model, given)
        plan = {
            notebook: {key: value for key, value in (values | there).items() if value != defaults(notebook)[key]}
            for notebook, values in parameters.fitted(suited, model, given, each).items()
        }
        run_name = name or slug(check_model(model))
        if run_name in plans:
            raise UserError(f"two of the models have runs of the same name, {run_name}")
        plans[run_name] = plan
        claim(run_name, check_model(model), plan)
        for folder in (WORK, RUNS / run_name, RESULTS / run_name):
            _writable(folder)
        outdated |= {(run_name, nb): defaults(nb) | plan[nb] for nb in plan if not is_fresh(run_name, nb, plan[nb])}
    chapters = _how_far(sum(map(len, plans.values())), list(outdated))
    needed = check_memory([(nb, values) for (_, nb), values in outdated.items()], elsewhere=bool(profile))
    for folder in (WORK, *(of / run_name for run_name in plans for of in (RUNS, RESULTS))):
        paths.sweep(folder)
    _snakemake({"runs": plans, "memory_mb": needed}, jobs, profile, chapters)
    return list(plans)


def _how_far(n: int, outdated: Sequence[tuple[str, str]]) -> progress.Chapters:
    """Say how many of n chapters, (run, notebook), are out of date and, if known, how long they took the last time."""
    took = [record(*of).get("seconds") for of in outdated]
    known = None not in took
    if len(outdated) > 1:
        last = f"; the last time they took {progress.minutes(sum(took))}, one after the other" if known else ""
        print(f"{len(outdated)} of {n} chapters are out of date{last}", file=sys.stderr, flush=True)
    if not known:  # then those stored in notebooks/, beside one another
        took = [_stored(notebook).get("seconds") for _, notebook in outdated]
    return progress.Chapters(n, dict(zip(map(" ".join, outdated), took, strict=True)))


def full_parameters() -> dict[str, dict[str, Any]]:
    """What each chapter of the full run takes in place of its defaults. Raises UserError for what none has."""
    try:
        each = parameters.read_yaml(DATA / "full.yml")
    except ValueError as problem:
        raise UserError(str(problem)) from None
    for notebook, values in each.items():
        if notebook not in notebooks():
            raise UserError(f"full.yml: there is no notebook {notebook}")
        if unknown := sorted(set(values) - set(defaults(notebook))):
            raise UserError(f"full.yml: {notebook} has no parameter {', '.join(unknown)}")
    return each


def _suited(wanted: Sequence[str], model: str, given: dict[str, Any]) -> list[str]:
    """Those of the notebooks that are some for the model and for so few pictures; the others are named, with why.

    If it is none of them, all: what they are given is then refused.
    """
    reasons = {notebook: parameters.unsuited(notebook, model, given) for notebook in wanted}
    if all(reasons.values()):
        return list(wanted)
    why = {why: [name for name in reasons if reasons[name] == why] for why in filter(None, reasons.values())}
    if why:
        print("left out: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in why.items()), flush=True)
    return [notebook for notebook in wanted if not reasons[notebook]]


def _writable(folder: Path) -> None:
    """See that files, and enough of them, can be written to a folder that is or will be made. Raises UserError."""
    try:
        free = shutil.disk_usage(paths.check_writable(folder)).free
    except ValueError as problem:
        raise UserError(str(problem)) from None
    if free < LEAST_FREE:
        raise UserError(f"{free / 1e6:.0f} MB are free on the disk of {folder}, and {LEAST_FREE / 1e6:.0f} are needed")


def _snakemake(plan: dict[str, dict], jobs: int | None, profile: Path | None, chapters: progress.Chapters) -> None:
    """Have Snakemake bring runs up to date, in processes that end when this one does. Raises if one fails."""
    names = list(plan["runs"])
    called = names[0] if len(names) == 1 else f"{len(names)}-runs-{digests.of_values(names)[:12]}"
    for run_name in names:  # whose plan would be replaced while its jobs read it
        taken(run_name).release()
    given = WORK / f"{called}.plan.json"
    with atomic(given) as target:
        target.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "--configfile", given]
    if profile:  # Snakemake tells of a job that failed, and where its log is: what it said is not heard here
        command += ["--workflow-profile", profile, *(["--jobs", jobs] if jobs else []), "--quiet", "rules", "progress"]
    else:
        command += ["--cores", jobs or 1, "--quiet", "all"]
    # a line is written at once, so that it is read at once
    environment = os.environ | {"SINKSTUDY_ENGINE": str(os.getpid()), "PYTHONUTF8": "1", "PYTHONUNBUFFERED": ""}
    environment[progress.TERMINAL] = "yes" if progress.on_terminal() and not profile else ""
    told = False
    with subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            while said := process.stderr.read1(1 << 16):  # all that is there, so lines are whole
                said = re.sub(rb"Using workflow specific profile .*\n", b"", said)
                sys.stderr.buffer.write(_counted(said, chapters))
                sys.stderr.flush()
                told |= b"sinkstudy: " in said
        except BaseException:  # interrupted, or nobody reads what is said any more
            _end_children()
            raise
    if process.returncode and told:
        sys.exit(1)
    if process.returncode:
        raise UserError(f"the run {called} did not end well: see the last file in {ROOT / '.snakemake' / 'log'}")


def taken(run: str) -> FileLock:
    """Take a run for this process, until it ends, however that happens. Raises UserError if another one has it."""
    lock = FileLock(WORK / f"{run}.plan.lock")
    try:
        lock.acquire(timeout=5)  # what a killed command has started takes two seconds to end
    except Timeout:
        busy = f"another process executes the run {run}: wait for it, or give this one another name (--name)"
        raise UserError(busy) from None
    return lock


def _counted(said: bytes, chapters: progress.Chapters) -> bytes:
    """What processes said, with how far the run is behind each line of a chapter that was executed."""

    def counted(line: re.Match[bytes]) -> bytes:
        notebook, how, run = (part.decode() for part in line.groups())
        far = chapters.ended(f"{run} {notebook}", well=how == "executed")
        return line[0] + (f"; {far}".encode() if far else b"")

    return re.sub(rb"([\w.-]+):? (executed|failed) on ([\w.-]+).*", counted, said)


def _end_children(patience: float = 3) -> None:
    """End all processes that this one has started, kernels included."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    for child in psutil.wait_procs(children, timeout=patience)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def end_with(parent: int) -> None:
    """Watch, in a thread, the process that started this one; when it is gone, end this one and all that it started."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        _end_children(patience=1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def claim(run: str, model: str, plan: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Make sure that the results of a run are of this model, or that there are none yet. Nothing is written.

    Args:
        plan: the parameters of the notebooks that will be executed: what stays beside them is of their revision.

    Raises:
        UserError: the run is that of another model or revision, or its name is none.
    """
    try:
        paths.check_claim(run, model)
        noted = {name: record(run, name).get("values", {}) for name in executed(run)}
        of = next((values["model"] for values in noted.values() if "model" in values), model)
    except ValueError as problem:
        raise UserError(str(problem)) from None
    if of != model:
        raise UserError(f"the run {run} holds results of {of}: give those of {model} another name (--name)")
    plan = plan or {}
    stays = {values["revision"]: name for name, values in noted.items() if name not in plan and "revision" in values}
    for revision in {(defaults(name) | of)["revision"] for name, of in plan.items() if "revision" in defaults(name)}:
        if other := stays.keys() - {revision}:
            left = stays[min(other)]
            raise UserError(f"the run {run} holds {left} of revision {min(other) or 'main'}, and this would be of "
                            f"{revision or 'main'}: give it another name (--name), or execute all of it anew")


def check_memory(asked: Sequence[tuple[str, dict[str, Any]]], *, elsewhere: bool = False) -> dict[str, int]:
    """Raise UserError unless the models that notebooks, or a command (""), load can be read and fit.

    Args:
        asked: notebooks and their parameters.
        elsewhere: they are loaded on another machine: nothing is said about this one.

    Lab models fit anywhere, and take their own pictures. The work is done in a process of its own, which gives back
    what torch takes of memory, on a GPU too, before a kernel needs it.

    Returns:
        What each model needs, in MB, by the estimate of `memory.need`; of the lab's nothing.
    """
    loader = ROOT / "sinkstudy" / "model" / "loading.py"
    pictures = ("images_dir", "data_dir", "hub")  # that are not the lab's
    keys = ("model", "device", "dtype", "revision", "batch_size", "benchmarks", "benchmark", "paper_benchmarks",
            "limit", "fit", *pictures)
    settings = {
        json.dumps({key: of[key] for key in keys if key in of})
        for notebook, of in asked
        if (not notebook or loader in modules(notebook))
        and (of.get("model") not in paths.lab_models() or any(map(of.get, pictures)))
    }
    if not settings:
        return {}
    command = [sys.executable, "-m", "sinkstudy.book.memory", *["--elsewhere"] * elsewhere, *sorted(settings)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UserError(ended.stderr.strip().splitlines()[-1])
    return json.loads(ended.stdout.splitlines()[-1])


def update_notebooks(only: Iterable[str] = ()) -> None:
    """Store the outputs of the default run in `notebooks/`, where nbval compares them and readers see them."""
    import nbformat

    for name in notebooks(only):
        stored = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        page = nbformat.read(RUNS / DEFAULT_MODEL / f"{name}.ipynb", as_version=4)
        for cell, done in zip(stored.cells, page.cells, strict=True):
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = done.outputs, done.execution_count
        stored.metadata["sinkstudy"] = {key: page.metadata["sinkstudy"][key] for key in ("seconds", "memory_mb")}
        with atomic(NOTEBOOKS / f"{name}.ipynb") as target:
            nbformat.write(tidy(stored), target)


if __name__ == "__main__":  # called by the Snakefile: run, notebook, parameters as JSON
    end_with(os.getppid())
    try:
        execute(sys.argv[2], sys.argv[1], json.loads(sys.argv[3]))
    except UserError as problem:
        sys.exit(f"sinkstudy: {problem}")
