"""Odd values of every parameter of every notebook: refused in one line, by the engine and by the notebook itself."""

import json
import os
import subprocess
import sys
from typing import get_args

import nbformat
import pytest
from papermill.translators import PythonTranslator
from PIL import Image

from sinkstudy import benchmarks, paths, sinks
from sinkstudy.book import across, engine, parameters
from sinkstudy.lab.train import EMERGENCE_ARMS

NAN, INF = float("nan"), float("inf")
ODD = {  # by the type that a parameter is declared with
    "Model": ["lab-lava", "", "a/b/c", "notebooks", "x" * 5000, "a\nb", "../../etc", 3, None, "ünïcode/model",
              "a/b;rm -rf"],
    "LabModel": ["lab-lava", "owner/name", "", "notebooks", 3, None],
    "Models": [["lab-lava"], "lab-llava", [3], ["lab-llava", "lab-llava"], [None], {"a": 1}],
    "SomeModels": [[], ["lab-lava"], "lab-llava", ["lab-llava", "lab-llava"]],
    "Device": ["tpu", "", "cuda:-1", "cuda:x", "CPU", "cuda:99999", 0, None],
    "Dtype": ["int3", "", "float64", "half", None, 32],
    "Revision": ["a b", "x;y", 3, None, "naïve name", "a\n"],
    "AtLeast0": [-1, 2.5, "many", True, None, NAN, [1], "1e3"],
    "AtLeast1": [0, -1, 2.5, "many", True, None, NAN, [1]],
    "AtLeast4": [0, 1, 3, -5, 4.5, "many", False],
    "AtLeast8": [0, 1, 4, 7, -8, 8.5],
    "Seed": [-1, 1.5, 2**31, "x", True, None],
    "Switch": [1, 0, "yes", None, "on"],
    "Positive": [0.0, -1.0, NAN, INF, -INF, "x", True, None, [1.0]],
    "NotNegative": [-0.1, NAN, INF, "x", None],
    "Counts": [[], [0], [-1], [1.5], 3, "1,2", [1, 1], [None], [True]],
    "Weights": [[], [-1.0], [NAN], [INF], 1.0, ["x"], [1.0, 1.0]],
    "Criterion": ["norm", "", "ABOVE_MEDIAN", 3, None, "top_k"],
    "Benchmark": ["pope", "MMBench", 3, None, "POPE,MME"],
    "Benchmarks": [[], ["pope"], "POPE", ["POPE", "POPE"], [""], [3]],
    "Text": ["", "  ", 3, None],
    "Texts": [[], [""], "base", [3], ["base", "base"]],
    "Files": ["", "no/such/folder", "/no/such", "~/no/such", 3, None],
    "Methods": ["", "no/such/folder", 3, None],
    "FolderIfAny": ["no/such/folder", "/no/such", "README.md", "~nobody/x", 3, None],
    "PicturesIfAny": ["no/such/folder", "README.md", "data/models", 3, None],
    "ResultFiles": [[], "results/*", [""], [3]],
}
DECLARED = {nb: parameters.declarations(nb) for nb in engine.notebooks()}


def kind_of(declared: parameters.Declared) -> str:
    return next(name for name in ODD if getattr(parameters, name) == declared.type)


CASES = [(nb, name, value) for nb, of in DECLARED.items() for name, d in of.items() for value in ODD[kind_of(d)]]
# every value of a type once in the notebook's own check; every parameter of every notebook in the engine's
ONCE = list({(kind_of(DECLARED[nb][name]), repr(value)): (nb, name, value) for nb, name, value in CASES}.values())


@pytest.mark.parametrize("nb, name, value", CASES, ids=lambda v: str(v)[:20])
def test_the_engine_refuses(nb, name, value):
    model, given = (value, {}) if name == "model" else ("lab-llava", {name: value})
    if isinstance(value, str) and name != "model" and not isinstance(DECLARED[nb][name].default, str):
        given = {name: value}  # text as from a command line
    with pytest.raises((engine.UserError, ValueError)) as problem:
        parameters.fitted([nb], model, given)
    said = str(problem.value)
    assert "\n" not in said and len(said) < 500 and said


@pytest.mark.parametrize("nb, name, value", ONCE, ids=lambda v: str(v)[:20])
def test_the_notebook_refuses(nb, name, value):
    """What plain papermill would have put into it."""
    namespace = {key: d.default for key, d in DECLARED[nb].items()} | {name: value}
    namespace["__annotations__"] = {key: d.type for key, d in DECLARED[nb].items()}
    with pytest.raises(ValueError) as problem:
        parameters.check(namespace)
    assert "\n" not in str(problem.value)


def test_defaults_fit_and_every_notebook_checks_itself():
    for nb, of in DECLARED.items():
        for d in of.values():
            assert d.fit(d.default) == d.default
        cells = nbformat.read(paths.NOTEBOOKS / f"{nb}.ipynb", as_version=4).cells
        at = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
        assert "parameters.check(globals())" in cells[at + 1].source, nb
        namespace: dict = {}
        exec(cells[at].source, namespace)  # the cell as a kernel runs it
        parameters.check(namespace)
        assert {key: namespace[key] for key in of} == {key: d.default for key, d in of.items()}


def test_plain_papermill_is_no_way_around():
    """The cells up to the check, with a value in between, in a process of their own: it ends before work begins."""
    cells = nbformat.read(paths.NOTEBOOKS / "03-propagation.ipynb", as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"][:2]
    lines = code[1].split("parameters.check(globals())")[0] + "parameters.check(globals())"
    command = [sys.executable, "-c", "\n".join([code[0], "threshold = float('nan')", lines])]
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=paths.ROOT, env=environment)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "ValueError: parameter 'threshold' is a finite number, and nan is not")


def test_a_mistyped_name_is_no_way_around():
    """Papermill says that it does not know it, and goes on."""
    of = DECLARED["09-benchmarks"]
    cells = ["", "from sinkstudy.book.parameters import Model", PythonTranslator.codify({"limt": 3, "hub": False})]
    namespace = {key: d.default for key, d in of.items()} | {"In": cells, "limt": 3}
    namespace["__annotations__"] = {key: d.type for key, d in of.items()}
    with pytest.raises(ValueError, match="^unknown parameter 'limt'; the notebook has: .*limit"):
        parameters.check(namespace)
    parameters.check(namespace | {"In": [*cells[:2], PythonTranslator.codify({"limit": 3})]})


def test_choices_are_those_of_the_package():
    assert get_args(parameters.Criterion) == tuple(sinks.NORM_CRITERIA)
    assert get_args(parameters._Benchmark) == tuple(benchmarks.SOURCES)
    assert set(DECLARED["02-emergence"]["arms"].default) == set(EMERGENCE_ARMS)


@pytest.mark.parametrize("given, message", [
    ({"criterion": "percentile", "threshold": 100.0}, "below 100"),
    ({"min_pictures": 50, "limit": 10}, "fewer pictures than min_pictures"),
    ({"hub": True, "data_dir": "data"}, "public data are those of data_dir, 'data', or of the hub"),
])
def test_what_has_to_hold_between_parameters(given, message):
    with pytest.raises(engine.UserError, match=message):
        parameters.fitted(["07-ablation"], "lab-llava", given)


@pytest.mark.parametrize("beside", [["lab-llava-gist", "a/lab-llava"], ["a/other", "b/other"]])
def test_two_models_of_one_short_name(tmp_path, beside):
    """In the chapters' tables, and in `study.load`, one would stand in the place of the other."""
    for name in ("a/lab-llava", "a/other", "b/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    controls = [str(tmp_path / name) if "/" in name else name for name in beside]
    with pytest.raises(engine.UserError, match=f"would both be called {controls[-1].rpartition('/')[2]}: rename a"):
        parameters.fitted(["07-ablation"], "lab-llava", {"controls": controls})
    with pytest.raises(engine.UserError, match="would both be called lab-llava: rename a folder"):
        parameters.fitted(["07-ablation"], str(tmp_path / "a/lab-llava"), {"controls": ["lab-llava"]})
    assert parameters.fitted(["07-ablation"], "lab-llava", {"controls": ["lab-llava", controls[0]]})


# ------------------------------------------------------------------------------------------- what values name
@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(parameters, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(engine, "_line_once", engine._line)  # files change here while one process looks
    for folder in ("pics", "sub/pics"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / folder / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("name", ["{}/pics", "pics", "~/pics", "sub/pics", "./pics", "pics/"])
def test_other_pictures_are_seen(home, name):
    """However the folder is written, its pictures are in the fingerprint: those within the limit and no other."""
    name = name.format(home)
    values = parameters.defaults("01-norms") | {"images_dir": name, "limit": 4}
    parameters.fitted(["01-norms"], "lab-llava", {"images_dir": name, "limit": 4})
    folder = paths.place(name)
    assert [path.name for path in parameters.data_files("01-norms", values)] == ["0.png", "1.png", "2.png", "3.png"]
    before = engine.fingerprint("01-norms", {"images_dir": name, "limit": 4})
    Image.new("RGB", (8, 8), "blue").save(folder / "5.png")
    assert engine.fingerprint("01-norms", {"images_dir": name, "limit": 4}) == before
    Image.new("RGB", (8, 8), "blue").save(folder / "2.png")
    after = engine.fingerprint("01-norms", {"images_dir": name, "limit": 4})
    assert {key for key in after if after[key] != before[key]} == {"data_sha256"}


def test_data_behind_links_are_seen(home, tmp_path_factory):
    """A folder of data holds links to where the data lie, one of which leads back to itself."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "parts").mkdir()
    (elsewhere / "parts/a.csv").write_text("1")
    (elsewhere / "back").symlink_to(elsewhere)
    (home / "data").mkdir()
    (home / "data/pope").symlink_to(elsewhere)
    given = {"data_dir": "data"}
    values = parameters.defaults("09-benchmarks") | given
    assert parameters.data_files("09-benchmarks", values) == [home / "data/pope/parts/a.csv"]
    before = engine.fingerprint("09-benchmarks", given)
    (elsewhere / "parts/a.csv").write_text("2")
    after = engine.fingerprint("09-benchmarks", given)
    assert {key for key in after if after[key] != before[key]} == {"data_sha256"}


def test_a_folder_of_bad_pictures_is_refused_before_a_kernel(home):
    (home / "pics" / "0.png").write_text("no picture")
    with pytest.raises(engine.UserError, match="picture 0.png cannot be read"):
        parameters.fitted(["01-norms"], "lab-llava", {"images_dir": "pics"})
    (home / "none").mkdir()
    with pytest.raises(engine.UserError, match="holds no picture"):
        parameters.fitted(["01-norms"], "lab-llava", {"images_dir": "none"})


@pytest.mark.parametrize("limit", [1, 11, 12, 13, 0])
def test_what_is_given_is_given(limit):
    """Also where it equals the default, which is 12."""
    assert parameters.fitted(["10-training-free"], "lab-llava", {"limit": limit})["10-training-free"]["limit"] == limit
    text = parameters.fitted(["10-training-free"], "lab-llava", {"limit": str(limit)})
    assert text["10-training-free"]["limit"] == limit


def test_values_of_a_command_line_are_read_as_json():
    found = parameters.fitted(["07-ablation"], "lab-llava", {"doses": "[1, 2]", "hub": "true", "threshold": "2"})
    assert found["07-ablation"] == {"model": "lab-llava", "doses": [1, 2], "hub": True, "threshold": 2.0}
    assert json.dumps(found)


# ------------------------------------------------------------------------------------------- whose results
@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("first, second", [
    ("/a/run-a/checkpoint-final", "/a/run-b/checkpoint-final"), ("owner/name--x", "/b/owner--name--x"),
    ("/a/模型", "/b/模型"), ("lab-llava", "/elsewhere/lab-llava"), ("a/b--c", "a--b/c"),
])
def test_another_models_results_are_not_replaced(results, first, second):
    name = paths.slug(first)
    paths.claimed(name, first)
    paths.claimed(name, first)
    if paths.slug(second) == name:
        with pytest.raises(ValueError, match=rf"the run {name} holds results of .*--name"):
            paths.claimed(name, second)
    paths.claimed("another", second)


@pytest.mark.parametrize("folder", ["模型", "/tmp/модель", "ü", "...", " ", "a b", "/x/-weights-", "x" * 400])
def test_a_folder_in_any_script_gets_a_usable_name(results, folder):
    paths.claimed(paths.slug(folder), folder)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "x" * 300, "-a", "a b", "名"])
def test_names_that_are_none(results, name):
    with pytest.raises(ValueError, match="is no name for a run"):
        paths.claimed(name, "lab-llava")


@pytest.mark.parametrize("run", ["null", "NA", "nan", "None"])
def test_a_run_whose_name_is_that_of_nothing(monkeypatch, tmp_path, run):
    """pandas would read it as no name, and its rows would be gone where rows are put together by their model."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    file = tmp_path / "results" / run / "10-training-free" / "effects.csv"
    file.parent.mkdir(parents=True)
    file.write_text("model,method,way,benchmark,group,measure,value,low,high,n\n"
                    f"{run},front,,POPE,,right,1,0.5,1.5,100\n{run},end,,POPE,,right,,,,100\n")
    found, left_out = across.read(["results/*/1[01]-*/effects.csv"])
    assert set(found.model) == {run} and not left_out
    of = across.effect_cells(found).set_index("method")
    assert of.state.to_dict() == {"front": "better", "end": "not applicable"}


def test_plain_execution_leaves_committed_results_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("SINKSTUDY_RESULTS", raising=False)
    monkeypatch.setattr(paths, "PLAIN", tmp_path)
    assert paths.results_dir("lab-llava", "03-propagation").is_relative_to(tmp_path)
