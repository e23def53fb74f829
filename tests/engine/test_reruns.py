"""What runs again after a change, and what does not."""

import json
import os

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

    project.notebook("02-second", SECOND, prose="# Other prose", parameters=PARAMETERS.replace("seed = 0", "seed = 1"))
    assert project.executed() == ["02-second"]

    project.write("data/models/lab-llava/config.json", '{"model_type": "llava"}')
    assert project.executed() == ["01-first", "02-second"]
    assert project.executed() == []


def test_data_results_and_parameters(project: Project):
    project.notebook("01-first", FIRST, parameters=PARAMETERS.replace('data = "data/table.csv"', "data = ''"))
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


def test_bare_snakemake_and_check_fresh(project: Project):
    import subprocess
    import sys

    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all"]
    environment = os.environ | {"PYTHONPATH": str(project.root)}
    subprocess.run(command, cwd=project.root, env=environment, check=True)
    assert project.executed() == []
    assert "up to date" in project.call("check-fresh")
    project.write("sinkstudy/alpha.py", "def double(x):\n    return x + x\n")
    assert "lab-llava/01-first" in project.call("check-fresh", code=1)
    subprocess.run(command, cwd=project.root, env=environment, check=True)
    assert "up to date" in project.call("check-fresh")


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
    assert "papermill" not in source.metadata and "sinkstudy" not in source.metadata
    assert project.executed() == []  # outputs are no part of the source
