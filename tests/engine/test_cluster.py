"""The notebooks as jobs of a cluster: what they ask for; and, where Slurm and its plugin are there, that it works.

`book/cluster.md` has the commands that bring up Slurm on one machine.
"""

import json
import shutil
import subprocess
from importlib.util import find_spec

import pytest
import yaml

from sinkstudy.book import engine
from sinkstudy.paths import ROOT
from tests.engine.conftest import FIRST, Project


def missing() -> str:
    """What of a cluster is not there; empty if all is."""
    if find_spec("snakemake_executor_plugin_slurm") is None:
        return "snakemake-executor-plugin-slurm is not installed (pip install -e '.[slurm]')"
    if shutil.which("sinfo") is None:
        return "Slurm is not installed: there is no sinfo"
    nodes = subprocess.run(["sinfo", "--noheader", "--states=idle,mixed"], capture_output=True, text=True, check=False)
    return "" if nodes.stdout.strip() else "Slurm has no node that takes jobs: sinfo names none"


def noting(project: Project, name: str, seconds: float, memory_mb: int) -> None:
    """Let a notebook say what its last execution took."""
    path = project.root / "notebooks" / f"{name}.ipynb"
    page = json.loads(path.read_text())
    page["metadata"]["sinkstudy"] = {"seconds": seconds, "memory_mb": memory_mb}
    path.write_text(json.dumps(page))


def test_the_profile_differs_from_the_default_in_the_place_alone():
    default, slurm = (yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text()) for name in
                      ("default", "slurm"))  # fmt: skip
    assert default.items() <= slurm.items() and slurm["executor"] == "slurm"
    assert slurm["keep-going"] is True


@pytest.mark.parametrize("notebook", engine.notebooks())
def test_what_a_notebook_asks_for(notebook: str):
    """Every chapter's time was measured; another model gets its own memory beside the chapter's, and a day."""
    took = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["metadata"]["sinkstudy"]
    here = engine.asks(notebook, {})
    assert here["mem_mb"] > 1.4 * took.get("memory_mb", 1000) and 60 * here["runtime"] > 5 * took["seconds"]
    assert here["gpu"] == 0
    other = engine.asks(notebook, {"model": "owner/name", "device": "cuda"}, 14_000)
    assert other == {"mem_mb": here["mem_mb"] + 14_000, "runtime": 24 * 60, "gpu": 1}


def test_what_a_model_needs_is_part_of_a_plan_for_elsewhere():
    """The estimate of an architecture, without its weights and without this machine's memory or device."""
    asked = [("01-norms", engine.defaults("01-norms") | {"model": str(ROOT / "data/models/lab-qwen2vl")})]
    asked[0][1]["device"] = "cuda:7"
    needed = engine.check_memory(asked, elsewhere=True)
    weights = (ROOT / "data/models/lab-qwen2vl/model.safetensors").stat().st_size / 1e6
    assert list(needed) == [asked[0][1]["model"]] and needed[asked[0][1]["model"]] > 0.9 * weights


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_on_slurm(project: Project):
    """One notebook fails, the other is executed all the same; each job got what it asked for."""
    project.notebook("01-first", FIRST + "\nraise ValueError('on purpose')")
    noting(project, "02-second", seconds=120, memory_mb=400)
    said = project.call("run", "--profile", "profiles/slurm", code=1)
    assert "01-first" in said and "the run lab-llava did not end well" in said
    assert (project.root / "results/lab-llava/02-second/copy.csv").read_text() == "x\n1\n"
    logs = list((project.root / ".snakemake/slurm_logs").rglob("*.log"))
    assert len(logs) == 1 and "ValueError: on purpose" in logs[0].read_text()
    jobs = subprocess.run(["scontrol", "show", "job", "-o"], capture_output=True, text=True, check=True).stdout
    own = [line for line in jobs.splitlines() if f"WorkDir={project.root} " in line]
    second = next(line for line in own if "02-second" in line)
    assert len(own) == 2 and "JobState=COMPLETED" in second
    assert "TRES=cpu=1,mem=1600M" in second and "TimeLimit=00:40:00" in second

    project.notebook("01-first", FIRST)
    assert project.executed("--profile", "profiles/slurm") == ["01-first"]
