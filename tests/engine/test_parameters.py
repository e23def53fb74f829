"""Parameters that do not fit: one clear line, exit code 1, before any kernel starts."""

import pytest

from tests.engine.conftest import Project

ALL = """from sinkstudy.book.parameters import AtLeast0, Model
model: Model = "lab-llava"
limit: AtLeast0 = 3  # pictures; 0: all
"""
BAD = {
    "unknown name": (["-p", "colour=red"], "unknown parameter 'colour'; the notebooks have: batch_size, data, device"),
    "no value": (["-p", "seed"], "-p takes NAME=VALUE, not 'seed'"),
    "twice": (["-p", "limit=3", "-p", "limit=4"], "the parameter 'limit' is given twice"),
    "twice in two ways": (["--limit", "3", "-p", "limit=4"], "the parameter 'limit' is given twice"),
    "a model": (["-p", "model=owner/name"], "a model is named without -p: sinkstudy run owner/name"),
    "wrong type": (["-p", "limit=many"], "parameter 'limit' of 01-first is of type int (default 3), and 'many' is not"),
    "float for int": (["-p", "limit=2.5"], "parameter 'limit' of 01-first is of type int (default 3), and 2.5 is not"),
    "bool for int": (["-p", "limit=true"], "parameter 'limit' of 01-first is of type int"),
    "unknown model": (["lab-lava"], "unknown model 'lab-lava': not one of lab-llava, not a folder"),
    "folder without a model": (["notebooks"], "the folder notebooks holds no model: it has no config.json"),
    "unknown model in a list": (["-p", 'others=["lab-lava"]'], "unknown model 'lab-lava'"),
    "missing path": (["-p", "data=data/none.csv"], "parameter 'data' of 01-first: there is no file or folder"),
    "unknown device": (["--device", "tpu"], "unknown device 'tpu': cpu, cuda, cuda:1, ..., mps or auto"),
    "unknown dtype": (["--dtype", "int3"], "parameter 'dtype' of 01-first is 'float32', 'bfloat16' or"),
    "no picture": (["--limit", "0"], "parameter 'limit' of 01-first is 1 at least, and 0 is not"),
    "empty batch": (["--batch-size", "0"], "parameter 'batch_size' of 01-first is 1 at least, and 0 is not"),
    "revision of a folder": (["--revision", "v1"], "lab-llava is a folder and has no revision 'v1'"),
    "unknown notebook": (["--only", "07"], "no notebook begins with '07'; there are: 01-first, 02-second"),
    "bad run name": (["--name", "a/b"], "'a/b' is no name for a run"),
    "long run name": (["--name", "n" * 300], f"'{'n' * 80}' is no name for a run: at most 120"),
    "update of another run": (["--update-notebooks", "--seed", "1"], "--update-notebooks is for the default run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parameter_is_one_line(project: Project, case: str):
    arguments, message = BAD[case]
    printed = project.call("run", *arguments, code=1)
    assert printed.startswith(f"sinkstudy: {message}")
    assert len(printed.splitlines()) == 1
    assert not (project.root / "book").exists() and not (project.root / "results").exists()


REFUSED = {
    "a second model that there is not": ["owner/name", "lab-lava"],
    "two runs of one name": ["owner/name", "owner/name"],
    "results of another model": ["owner/name", "--name", "taken"],
    "a value that a later notebook does not take": ["owner/name", "-p", "scale=x"],
    "a model that does not fit into memory": ["lab-llava", "owner/name"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_run_leaves_nothing(project: Project, case: str):
    project.write("results/taken/model.txt", "other/name\n")
    project.write("sinkstudy/model/loading.py", "")
    project.write("sinkstudy/book/memory.py", "import sys\nsys.exit('it does not fit')\n")
    project.notebook("01-first", "from sinkstudy.model import loading")

    def there() -> dict:
        files = [path for path in project.root.rglob("*") if "__pycache__" not in path.parts and path.suffix != ".pyc"]
        return {path: path.stat().st_mtime_ns for path in files if path.name not in ("book", "sinkstudy", "model")}

    before = there()
    project.call("run", *REFUSED[case], code=1)
    assert there() == before


def test_absent_cuda(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    printed = project.call("run", "--device", "cuda", code=1)
    assert printed == "sinkstudy: device 'cuda' is not there: torch finds no CUDA GPU on this machine\n"


def test_absent_cuda_index(monkeypatch: pytest.MonkeyPatch):
    import torch

    from sinkstudy.book import parameters

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    parameters.check_device("cuda")
    parameters.check_device("cuda:0")
    with pytest.raises(ValueError, match="'cuda:1' is not there: this machine has 1 GPU"):
        parameters.check_device("cuda:1")


def test_fitting_values_reach_the_notebook(project: Project):
    project.write("elsewhere/my-model/config.json", "{}")
    project.notebook("02-second", "print(model.rsplit('/', 1)[-1], scale, others, seed, dtype)")
    options = ["-p", "scale=2", "-p", 'others=["lab-llava", "owner/name"]', "--seed", "5", "--dtype", "bfloat16"]
    project.call("run", "elsewhere/my-model", "--only", "02", *options)
    page = project.page("02-second", run="my-model")
    assert page.cells[-1].outputs[0].text == "my-model 2.0 ['lab-llava', 'owner/name'] 5 bfloat16\n"
    assert "run my-model: 02-second\n" in project.call("models")


def test_options_reach_the_notebooks_that_have_them(project: Project):
    project.notebook("01-first", "print(model, batch_size, revision)")
    project.notebook("02-second", "print(model)", parameters=ALL.splitlines()[0] + '\nmodel: Model = "lab-llava"')
    project.call("run", "owner/name", "--revision", "v1", "--batch-size", "2")
    assert project.page("01-first", run="owner--name").cells[-1].outputs[0].text == "owner/name 2 v1\n"
    assert project.page("02-second", run="owner--name").cells[-1].outputs[0].text == "owner/name\n"


def test_no_limit_where_the_notebook_knows_it(project: Project):
    project.notebook("02-second", "print(limit)", parameters=ALL)
    project.call("run", "--only", "02", "--limit", "0", "--name", "all")
    assert project.page("02-second", run="all").cells[-1].outputs[0].text == "0\n"
    printed = project.call("run", "--only", "02", "--limit", "-1", code=1)
    assert printed == "sinkstudy: parameter 'limit' of 02-second is 0 at least, and -1 is not\n"


LAB = """from sinkstudy.book.parameters import LabModel
model: LabModel = "lab-llava"
"""
MANY = """from sinkstudy.book.parameters import AtLeast1, AtLeast4, Model
model: Model = "lab-llava"
limit: AtLeast4 = 9
min_pictures: AtLeast1 = 5
"""
TRAINED = """from sinkstudy.book.parameters import Methods, Model
model: Model = "lab-llava"
methods_dir: Methods = "data/methods"
"""


def test_what_is_none_for_a_model_or_for_so_few_pictures_is_left_out(project: Project):
    for name, parameters in {"00-lab": LAB, "03-many": MANY, "04-other": LAB, "05-trained": TRAINED}.items():
        project.notebook(name, "print(model)", parameters=parameters)
    project.write("data/methods/another/one.json", "{}")
    printed = project.call("run", "owner/name", "--limit", "4", "--only", "0")
    assert printed.splitlines()[0] == (
        "left out: 00-lab, 04-other (not about this model: the run lab-llava has it); "
        "03-many (it takes 5 pictures at least); "
        "05-trained (no method in data/methods was trained on this model)"
    )
    assert "run owner--name: 01-first, 02-second\n" in project.call("models")
    project.write("data/methods/owner--name/one.json", "{}")
    project.call("run", "owner/name", "--limit", "4", "-p", "min_pictures=4")
    assert "run owner--name: 01-first, 02-second, 03-many, 05-trained\n" in project.call("models")
    project.call("run", "--limit", "4", "--name", "lab")
    assert "run lab: 00-lab, 01-first, 02-second, 04-other, 05-trained\n" in project.call("models")


def test_what_is_left_out_is_refused_where_nothing_else_is_asked_for(project: Project):
    project.notebook("00-lab", "print(model)", parameters=LAB)
    project.notebook("03-many", "print(model)", parameters=MANY)
    about = "this notebook is about the lab's models or all runs, and owner/name is no lab model"
    assert project.call("run", "owner/name", "--only", "00", code=1) == f"sinkstudy: {about}\n"
    printed = project.call("run", "--only", "03", "--limit", "3", code=1)
    assert printed == "sinkstudy: parameter 'limit' of 03-many is 4 at least, and 3 is not\n"
    printed = project.call("run", "--only", "03", "--limit", "4", code=1)
    assert printed == "sinkstudy: 03-many: limit is 4, fewer pictures than min_pictures, 5\n"


def test_unknown_command_fails(project: Project):
    assert "No such command" in project.call("fly", code=2)
