"""Two small runs side by side: verdicts, numbers and figures that follow from them by hand, and what is refused."""

import base64

import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes
from typer.testing import CliRunner

from sinkstudy import cli
from sinkstudy.book import compare, engine
from tests.unit.test_claims import LEDGER, write

PICTURE = base64.b64encode(b"no real picture").decode()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Runs of two models, with the same control model in both; the page of the second has the figure."""
    write(tmp_path, "a-model", [("a-model.up.effect", 3.0, 2.5, 3.5, 99, "times"), ("only.here", 1, None, None, 5, ""),
                                ("gist.up.effect", 1.9, 1.8, 2.0, 50, "times")])
    rows = [("b-model.up.effect", 0.7, 0.6, 0.8, 20, "times"), ("gist.up.effect", 1.95, 1.9, 2.0, 50, "times")]
    write(tmp_path, "second", rows)
    (tmp_path / "second" / "model.txt").write_text("B-Model\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(compare, "RUNS", tmp_path / "runs")
    image = new_output("display_data", {"image/png": PICTURE}, metadata={"scrapbook": {"name": "toy"}})
    prose = "```{glue:figure} toy\n:name: fig-toy--second\n:alt: a toy\n```"
    page = tmp_path / "runs" / "second" / "90-toy.ipynb"
    page.parent.mkdir(parents=True)
    page.write_text(writes(new_notebook(cells=[new_code_cell(outputs=[image]), new_markdown_cell(prose)])))
    return tmp_path


def test_verdicts_of_each_run_by_its_own_numbers(results):
    found = compare.run_verdicts(["a-model", "second"], results, LEDGER)
    words = found.set_index(["model", "claim", "run"]).verdict
    assert words[compare.OWN_MODEL, "up", "a-model"] == "supported"
    assert words[compare.OWN_MODEL, "up", "second"] == "opposite sign"
    assert words["gist", "up", "a-model"] == words["gist", "up", "second"] == "supported"
    assert len(words) == 8 and (words[:, "same"] == "not run").all()


def test_models_keep_their_names_where_both_runs_have_the_same(results):
    (results / "second" / "model.txt").write_text("a-model\n")
    text = (results / "second" / "90-toy" / "metrics.json").read_text().replace("b-model", "a-model")
    (results / "second" / "90-toy" / "metrics.json").write_text(text)
    assert set(compare.run_verdicts(["a-model", "second"], results, LEDGER).model) == {"a-model", "gist"}


def test_numbers_beside_each_other(results):
    table = compare.beside(compare.numbers(["second", "a-model"], results)).set_index("name")
    assert list(table.index) == ["{model}.up.effect", "gist.up.effect"]  # what one run has alone is in the file only
    assert table.loc["{model}.up.effect", "second"] == "0.70 [0.60, 0.80], n = 20"
    assert table.loc["{model}.up.effect", "a-model"] == "3.00 [2.50, 3.50], n = 99"
    assert table.apart.tolist() == [True, False]


def test_page_and_file(results, tmp_path):
    page = tmp_path / "out" / "both.html"
    compare.write(["a-model", "second"], page, results, LEDGER)
    text = page.read_text()
    assert text.count("<b>✓ supported</b>") == 3 and text.count("<b>✗ opposite sign</b>") == 1
    assert "3.00 [2.50, 3.50] times<br>n = 99, p &lt; 0.001" in text
    assert text.count(f"data:image/png;base64,{PICTURE}") == 1 and text.count("no executed page here has it") == 1
    assert "2 that two or more runs have; of 1, shaded" in text
    rows = pd.read_csv(page.with_suffix(".csv")).set_index(["run", "name"])
    assert len(rows) == 5 and rows.value["a-model", "only.here"] == 1 and rows.low["second", "{model}.up.effect"] == 0.6


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["a-model", "third"], "there is no run 'third': runs with results are a-model, second"),
        (["a-model", "empty"], "the run 'empty' has no metrics.json: 'sinkstudy run --name empty' makes them"),
        (["a-model"], "a comparison needs two or more different runs, not a-model"),
        (["a-model", "a-model"], "a comparison needs two or more different runs, not a-model a-model"),
        (["a-model", ".."], "there is no run '..': runs with results are a-model, second"),
    ],
)
def test_refusals(results, tmp_path, runs, said):
    with pytest.raises(ValueError, match="^" + said.replace(".", r"\.").replace("?", r"\?") + "$"):
        compare.write(runs, tmp_path / "page.html", results, LEDGER)
    assert not (tmp_path / "page.html").exists()


def test_command_says_in_one_line_what_is_wrong(tmp_path):
    for arguments, said in (
        (["lab-llava"], "a comparison needs two or more different runs, not lab-llava"),
        (["lab-llava", "no-such-run"], "there is no run 'no-such-run': runs with results are "),
    ):
        ended = CliRunner().invoke(cli.app, ["compare", *arguments, "--out", str(tmp_path / "page.html")])
        assert isinstance(ended.exception, engine.UserError) and str(ended.exception).startswith(said)
    assert not any(tmp_path.iterdir())
