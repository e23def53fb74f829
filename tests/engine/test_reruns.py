"""What runs again after a change, and what does not."""

import json
import os
import re
import shutil

from tests.engine.conftest import FIRST, PARAMETERS, SECOND, Project


def test_only_dependents_run_again(project: Project):
    assert project.executed() == ["01-first", "02-second"]
    assert project.executed() == []

    for path in project.root.rglob("*"):  # touched, as by git clone: nothing
        if path.is_file():
            os.utime(path)
    assert project.executed() == []

    project.write("sinkstudy/unused.py", "X = 1\n")  # imported by nobody
    project.write("data/models/lab-llava/README.md", "Another card.")
    stored = json.loads((project.root / "notebooks/01-first.ipynb").read_text())
    stored["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["other outputs"]}]
    project.write("notebooks/01-first.ipynb", json.dumps(stored))
    assert project.executed() == []

    project.write("sinkstudy/beta.py", "TWO = 3\n")  # 01 imports alpha, alpha imports beta
    assert project.executed() == ["01-first"]
    assert (project.root / "results/lab-llava/01-first/a.csv").read_text() == "value\n9\n"

    project.notebook("02-second", SECOND, prose="# Other prose")
    assert project.executed() == ["02-second"]

    project.notebook("01-first", FIRST + "\nprint('more')")
    assert project.executed() == ["01-first"]

    project.notebook("02-second", SECOND, prose="# Other prose", parameters=PARAMETERS.replace("Seed = 0", "Seed = 1"))
    assert project.executed() == ["02-second"]

    project.write("data/models/lab-llava/config.json", '{"model_type": "llava"}')
    assert project.executed() == ["01-first", "02-second"]
    assert project.executed() == []


def test_data_results_and_parameters(project: Project):
    project.notebook("01-first", FIRST, parameters=PARAMETERS.replace('"data/table.csv"', '"data/models"'))
    assert project.executed("--jobs", "2") == ["01-first", "02-second"]

    project.write("data/table.csv", "x\n1\n2\n")  # only 02 declares it
    assert project.executed() == ["02-second"]

    project.write("results/lab-llava/02-second/copy.csv", "edited by hand")
    assert project.executed() == ["02-second"]
    assert (project.root / "results/lab-llava/02-second/copy.csv").read_text() == "x\n1\n2\n"

    assert project.executed("--only", "01", "--limit", "4") == ["01-first"]
    page = project.page("01-first")
    injected = [cell for cell in page.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert len(injected) == 1 and "hide-input" in injected[0].metadata["tags"]
    assert page.metadata["sinkstudy"]["params"] == {"limit": 4}
    assert project.executed("--only", "01", "--limit", "4") == []
    assert project.executed() == ["01-first"]  # back to the default
    assert not any("injected-parameters" in c.metadata.get("tags", []) for c in project.page("01-first").cells)


THIRD = """
from sinkstudy.paths import ROOT, results_dir
read = sorted(path for pattern in tables for path in ROOT.glob(pattern))
text = "".join(f"{path.relative_to(ROOT).parts[1]} {path.read_text().split()[-1]}\\n" for path in read)
(results_dir("lab-llava", "00-all") / "all.txt").write_text(text)
(ROOT / "journal.txt").open("a").write("00-all\\n")
"""
READS = """from sinkstudy.book.parameters import Model, ResultFiles

model: Model = "lab-llava"
tables: ResultFiles = ["results/*/01-*/a.csv", "results/*/extra/*.csv", "data/*.txt"]
"""


def test_results_of_other_notebooks_are_sources(project: Project):
    """Named 00, so that nothing but what it reads puts it behind 01."""
    project.notebook("00-all", THIRD, parameters=READS)
    project.write("pause", "1")
    everything = ["00-all", "01-first", "02-second"]
    made = project.root / "results/lab-llava/00-all/all.txt"

    assert project.executed("--jobs", "3") == everything  # as in a fresh clone: no table was there
    assert (project.root / "journal.txt").read_text().split().index("00-all") > 0
    assert made.read_text() == "lab-llava 6\n"
    assert project.executed("--jobs", "3") == []

    project.write("pause", "0")
    project.write("sinkstudy/beta.py", "TWO = 3\n")
    assert project.executed("--jobs", "3") == ["00-all", "01-first"]
    assert made.read_text() == "lab-llava 9\n"
    project.notebook("01-first", FIRST + "\nprint('the same tables')")
    assert project.executed() == ["01-first"]

    project.write("results/owner--other/01-first/a.csv", "value\n7\n")  # another run, and what no notebook wrote
    project.write("results/owner--other/extra/b.csv", "8")
    project.write("results/owner--other/02-second/a.csv", "nobody reads this")
    assert project.call("check-fresh", code=1) == "sinkstudy: out of date: lab-llava/00-all\n"
    assert project.executed("--only", "00") == ["00-all"]
    assert made.read_text() == "lab-llava 9\nowner--other 7\nowner--other 8\n"
    project.write("data/c.txt", "11")
    assert project.executed() == ["00-all"]
    assert project.executed() == []


def test_bare_snakemake_and_check_fresh(project: Project):
    assert project.executed(by=project.snakemake) == ["01-first", "02-second"]
    assert project.executed() == []
    assert "up to date" in project.call("check-fresh")
    project.write("sinkstudy/alpha.py", "def double(x):\n    return x + x\n")
    assert "lab-llava/01-first" in project.call("check-fresh", code=1)
    assert project.executed(by=project.snakemake) == ["01-first"]
    assert "up to date" in project.call("check-fresh")


def test_snakemake_says_why(project: Project):
    nothing = "Nothing to be done"
    project.notebook("00-all", THIRD, parameters=READS)
    assert "Missing output files" in project.snakemake("-n")
    project.snakemake()
    assert nothing in project.snakemake("-n")
    project.write("sinkstudy/beta.py", "TWO = 3\n")
    said = project.snakemake("-n")
    assert "Params have changed" in said and "package_sha256" in said and "source_sha256" not in said
    assert "Input files updated by another job" in said  # 00 reads what 01 writes
    project.snakemake()
    assert nothing in project.snakemake("-n")
    project.call("run", "--only", "01", "--limit", "4")
    assert nothing in project.snakemake("-n", "--configfile", "book/runs/.work/lab-llava.plan.json")
    assert """'{"limit": 4}'""" in project.snakemake("-n")


def test_several_models(project: Project):
    project.write("data/models/other/config.json", '{"model_type": "other"}')
    both = ["01-first", "01-first", "02-second", "02-second"]
    assert project.executed("lab-llava", "other", "--jobs", "2") == both
    assert project.executed("lab-llava", "other") == []
    project.write("data/models/other/config.json", '{"model_type": "changed"}')
    assert project.executed("lab-llava", "other") == ["01-first", "02-second"]
    assert "--name is for the run of one model" in project.call("run", "lab-llava", "other", "--name", "a", code=1)
    assert "runs of the same name" in project.call("run", "other", "other", code=1)


def test_without_the_records_of_snakemake(project: Project):
    project.call("run")
    shutil.rmtree(project.root / ".snakemake")
    assert project.executed() == []
    shutil.rmtree(project.root / ".snakemake")
    project.write("sinkstudy/beta.py", "TWO = 3\n")
    assert project.executed(by=project.snakemake) == ["01-first"]
    assert "Nothing to be done" in project.snakemake("-n")


def test_outputs_and_notes_of_an_executed_notebook(project: Project):
    noisy = "import sys, tqdm\nfor i in tqdm.tqdm(range(2)):\n    print(i)\n    sys.stdout.flush()\nprint(seed)"
    project.notebook("02-second", noisy)
    project.call("run", "--only", "02")
    page = project.page("02-second")
    assert [output.text for output in page.cells[2].outputs] == ["0\n1\n0\n"]  # one stream, no stderr
    assert "papermill" not in page.metadata and "papermill" not in page.cells[2].metadata
    noted = page.metadata["sinkstudy"]
    wanted = {"params", "source_sha256", "package_sha256", "model_sha256", "git_commit", "dirty", "device", "dtype"}
    assert wanted | {"seed", "versions", "started", "seconds"} <= noted.keys()


def test_update_notebooks_stores_what_nbval_compares(project: Project):
    import nbformat

    project.call("run", "--update-notebooks")
    source = nbformat.read(project.root / "notebooks/01-first.ipynb", as_version=4)
    assert source.cells[2].outputs[0].text == "doubled: 6\n"
    assert source.cells[2].execution_count == 2
    assert "papermill" not in source.metadata
    noted = project.page("01-first").metadata["sinkstudy"]
    took = {key: noted[key] for key in ("seconds", "memory_mb")}  # what a cluster is asked for
    assert source.metadata["sinkstudy"] == took and min(took.values()) > 0
    assert project.executed() == []  # outputs are no part of the source


def test_how_far_a_run_is_is_said(project: Project):
    """Before it what is to be done, at each chapter's end how many are; in between what its kernel says of its work."""
    slow = "progress.SECONDS = 0\nwith progress.Progress('pictures', 4) as bar:\n    bar.update(2)\n    bar.update(2)"
    head = "import sys\nfrom sinkstudy import progress\nprint('a warning', file=sys.stderr)"
    project.notebook("02-second", f"{head}\n{slow}")
    printed = project.call("run").replace("\r", "\n").splitlines()
    assert printed[0] == "2 of 2 chapters are out of date"
    assert any(line.startswith("02-second: pictures 2 of 4, ") and line.endswith(" left") for line in printed)
    done = [line for line in printed if ": executed on lab-llava in " in line]
    first, last = (line.partition("; ")[2] for line in done)
    assert re.fullmatch(r"1 of 2 chapters are up to date, about \d+ s left", first)
    assert last == "2 of 2 chapters are up to date"
    assert not any("warning" in line for line in printed)
    assert "pictures" not in str(project.page("02-second").cells[-1].outputs)
    project.notebook("01-first", "print(1)")
    project.notebook("02-second", "print(2)")
    assert project.call("run").startswith("2 of 2 chapters are out of date; the last time they took ")
