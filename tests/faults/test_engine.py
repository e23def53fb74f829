"""A run that is interrupted, doubled, starved or lied to: nothing finished is lost, readers see old or new, and the
user reads one line.

On the toy project of the engine's tests, with real processes.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkstudy import digests, paths
from sinkstudy.book import engine
from tests.engine.conftest import PARAMETERS, Project
from tests.engine.test_kill import begun, wait_for


def leftovers(root: Path) -> list[str]:
    work = root / "book/runs/.work"
    found = [*root.glob("**/.partial-*"), *work.glob("run-*")]
    return [str(path) for path in found]


def ended(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=seconds)
    return process.returncode, printed


# ------------------------------------------------------------------------------------------- signals and pipes
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_at_once_with_its_kernels(project: Project, sent: int):
    process = begun(project)
    began = time.time()
    process.send_signal(sent)
    code, printed = ended(process)
    assert time.time() - began < 20
    assert code in (130, -signal.SIGTERM)
    if sent == signal.SIGINT:
        said = [line for line in printed.replace("\r", "\n").splitlines() if line.strip() and ": cell " not in line]
        assert said == ["sinkstudy: interrupted; the same command goes on from what was finished"]
    wait_for(lambda: not alive(project.root), 30)


def alive(root: Path) -> list[str]:
    """Command lines of processes, kernels among them, that work in the project."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        of = process.info
        if of["cwd"] and Path(of["cwd"]).is_relative_to(root) and of["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(of["cmdline"] or []))
    return found


def test_a_run_whose_reader_goes_away_ends(project: Project):
    process = begun(project)
    process.kill()  # the command alone
    process.wait()
    process.stdout.close()
    wait_for(lambda: not alive(project.root), 30)
    project.write("pause", "0")
    assert project.executed("--only", "01") == ["01-first"]
    assert not leftovers(project.root)


# ------------------------------------------------------------------------------------------- two of one name
def test_two_runs_of_one_name(project: Project):
    first = begun(project)
    plan = project.root / "book/runs/.work/lab-llava.plan.json"
    before = plan.read_text()
    printed = project.call("run", "--only", "01", "--limit", "5", code=1)
    assert printed.startswith("sinkstudy: another process executes the run lab-llava: wait for it, or give this one")
    assert plan.read_text() == before  # which jobs on a cluster read
    project.write("pause", "0")
    project.call("run", "--only", "01", "--limit", "5", "--name", "other")  # another name goes beside it
    assert (project.root / "results/other/01-first/a.csv").read_text() == "value\n10\n"
    first.send_signal(signal.SIGINT)
    ended(first)
    assert project.executed("--only", "01") == ["01-first"]


def test_plain_snakemake_under_the_name_of_another_model(project: Project):
    project.write("data/models/other/config.json", "{}")
    process = project.start("--cores", "1", "--config", 'runs={"other": {"02-second": {}}}', module="snakemake")
    code, printed = ended(process)
    assert code == 1 and "the run other holds results of other: give those of lab-llava another name" in printed
    assert not list(project.root.glob("results/other/*")) + list(project.root.glob("book/runs/other/*"))


def test_a_mistyped_parameter_of_a_plan(project: Project):
    """Papermill would pass over it, and the page would say that it was used."""
    code, printed = ended(project.start("--cores", "1", "--config", 'runs={"x": {"02-second": {"limt": 5}}}',
                                        module="snakemake"))  # fmt: skip
    assert code == 1 and "sinkstudy: 02-second has no parameter limt" in printed
    assert not list(project.root.glob("results/x/*")) + list(project.root.glob("book/runs/x/*"))


@pytest.mark.parametrize("first, second, ends", [
    ("", "v2", "main, and this would be of v2"), ("v1", "", "v1, and this would be of main"), ("v1", "v1", None),
])
def test_a_run_is_of_one_revision(monkeypatch, tmp_path, first, second, ends):
    """Its verdicts would be of none. Whatever is executed anew may be of another."""
    monkeypatch.setattr(engine, "RUNS", tmp_path)
    model = {"model": "owner/name"}
    for notebook, values in (("01-norms", model | {"revision": first}), ("12-across-models", model)):
        page = tmp_path / "owner--name" / f"{notebook}.ipynb"
        page.parent.mkdir(exist_ok=True)
        noted = {"sinkstudy": {"params": {}, "values": values}}
        page.write_text(json.dumps({"cells": [], "metadata": noted}))
    given = {"revision": second} if second else {}
    engine.claim("owner--name", "owner/name", {"01-norms": given, "03-propagation": given})
    engine.claim("owner--name", "owner/name", {"12-across-models": {}})
    if ends is None:
        return engine.claim("owner--name", "owner/name", {"03-propagation": given})
    with pytest.raises(engine.UserError, match=f"^the run owner--name holds 01-norms of revision {ends}: .*--name"):
        engine.claim("owner--name", "owner/name", {"03-propagation": given})


# ------------------------------------------------------------------------------------------- damaged notebooks
DAMAGE = {"empty": b"", "cut off": None, "garbage": b"\x00\xff\x00", "a list": b"[]", "no cells": b'{"metadata": {}}',
          "other notes": b'{"cells": [], "metadata": {"sinkstudy": 3}}',
          "notes without parameters": b'{"cells": [], "metadata": {"sinkstudy": {"run": "x"}}}'}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_page_counts_as_not_there(monkeypatch, tmp_path, name):
    monkeypatch.setattr(engine, "RUNS", tmp_path)
    page = tmp_path / "lab-llava" / "01-norms.ipynb"
    page.parent.mkdir()
    whole = json.dumps({"cells": [], "metadata": {"sinkstudy": {"params": {}, "values": {}}}}).encode()
    page.write_bytes(whole[: len(whole) // 2] if DAMAGE[name] is None else DAMAGE[name])
    assert engine.record("lab-llava", "01-norms") == {}
    assert not engine.is_fresh("lab-llava", "01-norms")
    assert engine.stale() == ["lab-llava/01-norms"]


def test_a_cut_off_page_heals(project: Project):
    project.call("run", "--only", "02")
    page = project.root / "book/runs/lab-llava/02-second.ipynb"
    page.write_bytes(page.read_bytes()[:300])
    assert "02-second (out of date)" in project.call("models")
    assert project.executed("--only", "02") == ["02-second"]


# ------------------------------------------------------------------------------------------- disks
def test_results_that_are_a_file_or_cannot_be_written(project: Project):
    (project.root / "results").mkdir()
    (project.root / "results/lab-llava").write_text("a file")
    printed = project.call("run", "--only", "02", code=1)
    assert printed.startswith("sinkstudy: nothing can be written to") and len(printed.splitlines()) == 1


def test_results_on_another_file_system(project: Project):
    """A link to a disk of its own, where a rename from here fails (EXDEV)."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == project.root.stat().st_dev:
        pytest.skip("there is no other file system")
    scratch = elsewhere / f"sinkstudy-test-{os.getpid()}"
    scratch.mkdir()
    try:
        (project.root / "results").mkdir()
        (project.root / "results/lab-llava").symlink_to(scratch)
        assert project.executed("--only", "02") == ["02-second"]
        assert (scratch / "02-second/copy.csv").read_text() == "x\n1\n"
        project.write("data/table.csv", "x\n2\n")
        assert project.executed("--only", "02") == ["02-second"]
        assert (scratch / "02-second/copy.csv").read_text() == "x\n2\n"
    finally:
        shutil.rmtree(scratch)


def test_too_little_room_is_said_before_work(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "LEAST_FREE", 10**18)
    with pytest.raises(engine.UserError, match="MB are free on the disk of"):
        engine._writable(tmp_path)


ERRORS = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; make room and run again"),
    "read-only": (OSError(errno.EROFS, "Read-only file system"), "it must be writable"),
    "denied": (PermissionError(errno.EACCES, "Permission denied"), "it must be writable"),
    "several lines": (RuntimeError("first\nsecond"), "first"), "nothing said": (RuntimeError(), "RuntimeError"),
    "no UTF-8": (ValueError("caf\udce9"), "caf"),
    "a dead kernel": (type("DeadKernelError", (RuntimeError,), {})("Kernel died"), "its kernel died"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_any_error_of_a_run_is_one_line(monkeypatch, tmp_path, name):
    error, said = ERRORS[name]
    monkeypatch.setattr(engine, "WORK", tmp_path)
    monkeypatch.setattr(engine, "_execute", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(engine.UserError) as problem:
        engine.execute("01-norms", "lab-llava", {})
    told = str(problem.value)
    assert told.startswith("01-norms failed on lab-llava: ") and said in told and "\n" not in told
    log = tmp_path / "failed" / "lab-llava--01-norms.log"
    assert str(log) in told and "Traceback" in log.read_text(errors="replace")


# ------------------------------------------------------------------------------------------- every file operation
OPERATIONS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sinkstudy import paths
from sinkstudy.book import engine
root, at = Path(sys.argv[2]), int(sys.argv[3])
count = 0
def hook(event, arguments):
    global count
    writes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copytree", "shutil.rmtree")
    writes |= event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
    if writes and str(root) in str(arguments[0]):
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
made = root / "made"
sys.addaudithook(hook)
engine._put(made, root / "results")
with paths.atomic(root / "page.ipynb") as target:
    target.write_text("new")
print(count)
"""


def prepared(root: Path) -> None:
    for folder, text in (("made", "new"), ("results", "old")):
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir(parents=True)
        for name in ("a.csv", "b.csv"):
            (root / folder / name).write_text(text)
    (root / "page.ipynb").write_text("old")


def seen(root: Path) -> tuple:
    """What a reader finds: tables, and the page."""
    there = (root / "results").exists()
    tables = {path.name: path.read_text() for path in (root / "results").glob("*")} if there else None
    return tables, (root / "page.ipynb").read_text()


def test_killed_at_each_file_operation_readers_see_old_or_new(tmp_path):
    command = [sys.executable, "-c", OPERATIONS, str(engine.ROOT), str(tmp_path)]
    prepared(tmp_path)
    operations = int(subprocess.run([*command, "0"], capture_output=True, text=True, check=True).stdout)
    old, new = {"a.csv": "old", "b.csv": "old"}, {"a.csv": "new", "b.csv": "new"}
    assert operations >= 8 and seen(tmp_path) == (new, "new")
    for at in range(1, operations + 1):
        prepared(tmp_path)
        killed = subprocess.run([*command, str(at)], capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL
        tables, page = seen(tmp_path)
        assert tables in (old, new) and page in ("old", "new"), at
        assert not (page == "new" and tables == old), at  # the page is the last
        subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
        assert seen(tmp_path) == (new, "new") and not leftovers(tmp_path), at


WHOLE_RUN = """
import json, os, signal, sys
from pathlib import Path
import nbformat, papermill
from nbformat.v4 import new_output
from sinkstudy.book import engine
from sinkstudy.paths import RESULTS, ROOT, RUNS, results_dir
NAMES = "01-first", "02-second"
TABLE = ROOT / "data/table.csv"

def execute(source, copy, given, **_):  # in place of a kernel
    page, text = nbformat.read(source, as_version=4), TABLE.read_text()
    for name in ("a.csv", "b.csv"):
        (results_dir("lab-llava", Path(source).stem) / name).write_text(text)
    page.cells[-1].outputs = [new_output("stream", name="stdout", text=text)]
    nbformat.write(page, copy)

def one_after_another(plan, *_):  # in place of Snakemake, which calls the same in processes
    for run, notebooks in plan["runs"].items():
        for name, given in notebooks.items():
            engine.execute(name, run, given)

papermill.execute_notebook, engine._snakemake = execute, one_after_another
engine._line_once = engine._line  # the table changes while this process, whose forks run, looks on

def run(at):
    # In a process of its own, killed at the file operation `at`; whether it was.
    child = os.fork()
    if not child:
        left = [at]
        def hook(event, arguments):
            if writes(event, arguments):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        code = 1
        try:
            engine.run()
            code = 0
        except Exception:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)

def writes(event, arguments):
    if event == "open":
        opened = str(arguments[1])[:1] in ("w", "a", "x") or (arguments[2] or 0) & os.O_CREAT
    else:
        opened = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copytree", "shutil.rmtree")
    return bool(opened) and str(ROOT) in str(arguments[0])

def seen(name):
    try:
        page = json.loads((RUNS / "lab-llava" / f"{name}.ipynb").read_text())
        told = "".join("".join(o["text"]) for cell in page["cells"] for o in cell.get("outputs", []))
    except FileNotFoundError:
        told = None
    there = sorted((RESULTS / "lab-llava" / name).glob("*"))
    return {path.name: path.read_text() for path in there} or None, told

def whole(text):
    return ({"a.csv": text, "b.csv": text}, text) if text else (None, None)

old, at, failures = None, 0, []
while True:
    at += 1
    new = f"x\\n{at}\\n"
    TABLE.write_text(new)
    killed = run(at)
    for name in NAMES:
        tables, told = seen(name)
        before, after = whole(old)[0], whole(new)[0]
        if tables not in (before, after) or told not in (old, new) or told == new and tables != after:
            failures.append([at, name, tables, told])
    assert not run(0)
    left = [str(p) for p in ROOT.rglob(".partial-*")] + [str(p) for p in (RUNS / ".work").glob("run-*")]
    if [seen(name) for name in NAMES] != [whole(new)] * 2 or left or engine.stale():
        failures.append([at, "afterwards", left, engine.stale()])
    old = new
    if not killed:
        break
print(json.dumps({"operations": at - 1, "failures": failures}))
"""


def test_a_whole_run_killed_at_each_file_operation(project: Project):
    """Nothing half-made is in place, what is not finished is done by the next run, and nothing is left lying."""
    environment = os.environ | {"PYTHONPATH": str(project.root)}
    environment.pop("SINKSTUDY_RESULTS", None)
    command = [sys.executable, "-c", WHOLE_RUN]
    done = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["operations"] > 30 and not found["failures"], found
    print(f"{found['operations']} file operations")


def test_what_a_living_process_makes_is_left_alone(tmp_path):
    mine = tmp_path / f".partial-{os.getpid()}-{paths.HOST}-x"
    dead = tmp_path / f".partial-999999999-{paths.HOST}-x"
    elsewhere = tmp_path / ".partial-999999999-0123abcd-x"  # a process of another machine, which shares the folder
    for folder in (mine, dead, elsewhere):
        folder.mkdir()
    with paths.atomic(tmp_path / "a") as target:
        target.write_text("a")
    assert mine.is_dir() and elsewhere.is_dir() and not dead.exists()


# ------------------------------------------------------------------------------------------- remembered digests
@pytest.fixture
def remembered(monkeypatch, tmp_path):
    monkeypatch.setattr(digests, "REMEMBERED", tmp_path / "digests.json")
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    digests._known.cache_clear()
    digests._new.clear()
    yield tmp_path / "digests.json"
    digests._known.cache_clear()


def test_a_large_file_is_read_once_and_again_when_it_changed(remembered, tmp_path, monkeypatch):
    reads = []
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: reads.append(path) or read(path))
    file = tmp_path / "large"
    file.write_bytes(b"a" * 10**5)
    first = digests.sha256(file)
    digests.remember()
    digests._known.cache_clear()
    assert digests.sha256(file) == first and len(reads) == 1
    kept = file.stat()
    file.write_bytes(b"b" * 10**5)
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as rsync or a careful editor leaves it
    assert digests.sha256(file) != first and len(reads) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"%s": 3}', '{"%s": []}', '{"%s": [1, 2, 3, 4, "x"]}'])
def test_a_damaged_memory_of_digests_is_not_used(remembered, tmp_path, content):
    file = tmp_path / "large"
    file.write_bytes(b"a" * 10**5)
    remembered.write_text(content.replace("%s", str(file)))
    assert digests.sha256(file) == digests._read(file)


def test_a_file_that_just_changed_is_not_remembered(remembered, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", 2.0)
    file = tmp_path / "large"
    file.write_bytes(b"a" * 10**5)
    digests.sha256(file)
    digests.remember()
    assert not remembered.exists()


# ------------------------------------------------------------------------------------------- names and places
@pytest.mark.parametrize("arguments", [
    ["x" * 5000], ["a/" + "b" * 5000], ["--name", "x" * 300], ["--name", "名"], ["-p", "images_dir=\udce9"],
    ["--seed", "-1"], ["--jobs", "0"], ["--only", ""], ["-p", "="], ["-p", "limit"],
])
def test_odd_words_on_the_command_line_are_one_line(project: Project, arguments):
    project.notebook("02-second", "print(1)", parameters=PARAMETERS)
    process = project.start("run", "--only", "02", *arguments)
    code, printed = ended(process)
    assert code in (1, 2) if arguments != ["--only", ""] else code in (0, 1)
    assert "Traceback" not in printed and (code in (0, 2) or len(printed.splitlines()) <= 1)


def test_the_c_locale(project: Project):
    project.environment |= {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    project.notebook("02-second", SECOND_UNICODE)
    project.call("run", "--only", "02")


SECOND_UNICODE = """
from sinkstudy.paths import results_dir
(results_dir("lab-llava", "02-second") / "a.csv").write_text("ü\\n", encoding="utf-8")
print("×")
"""


def test_a_long_temporary_folder(project: Project, tmp_path):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    project.environment |= {"TMPDIR": str(deep)}
    project.call("run", "--only", "02")
