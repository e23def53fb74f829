"""Killed at any moment: no half-made file in place, and the next run ends what was begun."""

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.engine.conftest import Project


def wait_for(condition, seconds: float = 300) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def half_way(root: Path) -> bool:
    return any((root / "book/runs/.work").glob("run-*/results/lab-llava/01-first/a.csv"))


def begun(project: Project, pause: str = "600") -> subprocess.Popen:
    """A run that is in the middle of the first chapter, where it pauses for so many seconds."""
    project.write("pause", pause)
    process = project.start("run", "--only", "01")
    wait_for(lambda: half_way(project.root))
    return process


def test_killed_group_resumes(project: Project):
    process = begun(project)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (project.root / "results/lab-llava/01-first").exists()
    assert not (project.root / "book/runs/lab-llava/01-first.ipynb").exists()
    project.write("pause", "0")
    assert project.executed() == ["01-first", "02-second"]
    assert sorted(p.name for p in (project.root / "results/lab-llava/01-first").iterdir()) == ["a.csv", "b.csv"]
    assert not list((project.root / "book/runs/.work").glob("run-*"))


def test_killed_rerun_keeps_the_earlier_whole(project: Project):
    project.call("run", "--only", "01")
    before = (project.root / "book/runs/lab-llava/01-first.ipynb").read_bytes()
    project.write("sinkstudy/beta.py", "TWO = 5\n")
    process = begun(project, "3")
    process.kill()  # the command alone: Snakemake and the kernel live on as orphans
    process.wait()
    assert (project.root / "book/runs/lab-llava/01-first.ipynb").read_bytes() == before
    assert (project.root / "results/lab-llava/01-first/a.csv").read_text() == "value\n6\n"
    project.write("pause", "0")
    project.call("run", "--only", "01")  # waits for the orphan if it is still at work
    process.stdout.close()
    assert (project.root / "results/lab-llava/01-first/a.csv").read_text() == "value\n15\n"
    assert project.executed("--only", "01") == []


def test_killed_snakemake_leaves_no_orphan_and_resumes(project: Project):
    project.write("pause", "600")
    process = project.start("--cores", "2", module="snakemake")
    wait_for(lambda: half_way(project.root) and (project.root / "book/runs/lab-llava/02-second.ipynb").is_file())
    process.kill()  # Snakemake alone
    process.communicate(timeout=60)  # until the last of those that it started has closed its stderr
    project.write("pause", "0")
    assert project.executed(by=project.snakemake) == ["01-first"]


def test_failing_cell_is_named_and_the_rest_is_done(project: Project):
    project.notebook("01-first", "1 / 0")
    printed = project.call("run", code=1)
    assert "01-first failed on lab-llava in cell 3: ZeroDivisionError" in printed
    assert (project.root / "book/runs/.work/failed/lab-llava--01-first.ipynb").is_file()
    assert not (project.root / "book/runs/lab-llava/01-first.ipynb").exists()
    assert (project.root / "book/runs/lab-llava/02-second.ipynb").is_file()


def test_failed_rerun_keeps_the_earlier_and_is_tried_again(project: Project):
    project.call("run", "--only", "01")
    before = (project.root / "book/runs/lab-llava/01-first.ipynb").read_bytes()
    project.write("sinkstudy/beta.py", "TWO = None\n")
    printed = project.call("run", "--only", "01", code=1)
    assert [line for line in printed.replace("\r", "\n").splitlines() if line and ": cell " not in line] == [
        "sinkstudy: 01-first failed on lab-llava in cell 3: TypeError: unsupported operand type(s) for *: 'NoneType' "
        "and 'int' (see book/runs/.work/failed/lab-llava--01-first.ipynb)"
    ]
    assert (project.root / "book/runs/lab-llava/01-first.ipynb").read_bytes() == before
    assert project.call("run", "--only", "01", code=1).endswith(printed.splitlines()[-1].split("\r")[-1] + "\n")
    project.write("sinkstudy/beta.py", "TWO = 2\n")
    assert project.executed("--only", "01") == []  # the earlier one follows from this
