"""The full run: some chapters with parameters of their own, in a run of its own, which goes on after a kill."""

import os
import signal

from tests.engine.conftest import Project
from tests.engine.test_kill import wait_for


def test_full_run_stands_beside_the_default_run_and_resumes(project: Project):
    project.write("data/full.yml", "01-first: {limit: 12}\n02-second: {limit: 7}\n")
    assert project.executed() == ["01-first", "02-second"]
    project.write("pause", "600")
    process = project.start("run", "--full", "--jobs", "2")
    wait_for(lambda: (project.root / "book/runs/lab-llava-full/02-second.ipynb").is_file())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (project.root / "results/lab-llava-full/01-first").exists()
    project.write("pause", "0")
    assert project.executed("--full") == ["01-first"]  # 02 was finished
    assert project.executed("--full") == project.executed() == []
    for run, doubled in (("lab-llava", 6), ("lab-llava-full", 24)):
        assert (project.root / f"results/{run}/01-first/a.csv").read_text() == f"value\n{doubled}\n"
    assert project.page("02-second", run="lab-llava-full").metadata["sinkstudy"]["params"] == {"limit": 7}
    assert (project.root / "results/lab-llava-full/model.txt").read_text() == "lab-llava\n"


def test_full_run_is_of_its_chapters_alone(project: Project):
    project.write("data/full.yml", "01-first: {limit: 12}\n")
    assert project.executed("--full") == ["01-first"]
    printed = project.call("run", "--full", "--only", "02", code=1)
    assert printed == "sinkstudy: the full run has 01-first only\n"
    printed = project.call("run", "owner/name", "--full", code=1)
    assert printed == "sinkstudy: --full is a run of its own, of the default model: no other model or name\n"
    results = project.root / "results/lab-llava-full/01-first/a.csv"
    before = results.read_text()
    printed = project.call("run", "--full", "--limit", "4", code=1)  # as verdicts come from it
    assert printed == "sinkstudy: verdicts come from the full run, which takes limit from data/full.yml alone\n"
    assert results.read_text() == before
    project.write("data/full.yml", "01-first: {limit: 12}\n01-first: {limit: 8}\n")
    printed = project.call("run", "--full", code=1)
    assert printed == "sinkstudy: full.yml: the key '01-first' is there twice, again in line 2\n"
    project.write("data/full.yml", "01-first: {limit: 0}\n")
    assert "parameter 'limit' of 01-first is 1 at least, and 0 is not" in project.call("run", "--full", code=1)
