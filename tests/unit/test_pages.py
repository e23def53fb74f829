"""The computed parts of the book: what they say for results made by hand, and that the paper's numbers are in order."""

import csv
import json
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from sinkstudy import claims, pages
from sinkstudy.paths import BOOK
from tests.unit.test_claims import LEDGER, write


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two models, one with a run of its own; the executed pages of both runs, the second without the figure."""
    monkeypatch.setattr(pages, "RUNS", tmp_path / "runs")
    for run, text in (("lab-llava", ":name: fig-toy"), ("other", ":name: fig-toy--other"), ("bare", "no figure")):
        page = new_notebook(cells=[new_markdown_cell("# Toys"), new_markdown_cell(f"```{{figure}} x\n{text}\n```")])
        path = tmp_path / "runs" / run / "90-toy.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(page, path)
    write(
        tmp_path,
        "lab-llava",
        [("lab-llava.up.effect", 3.0, 2.5, 3.5, 99, ""), ("lab-llava.same.effect", -4.0, -5.0, -3.0, 99, "points")],
    )
    nothing = (None, None, None, 0, "")
    write(tmp_path, "other", [("other.up.effect", 1.0, 0.9, 1.1, 20, ""), ("other.same.effect", *nothing)])
    write(tmp_path, "bare", [("bare.up.effect", 1.6, 1.2, 2.0, 20, "")])
    return tmp_path


def test_figures_are_linked_under_the_label_of_their_run(results):
    assert pages.figure("lab-llava", "90-toy", "fig-toy") == "fig-toy"
    assert pages.figure("other", "90-toy", "fig-toy") == "fig-toy--other"
    assert pages.figure("bare", "90-toy", "fig-toy") is None
    assert pages.figure("absent", "90-toy", "fig-toy") is None
    assert pages.figure("", "90-toy", "fig-toy") is None


def test_verdict_table_has_word_sign_number_and_link(results):
    judged = claims.verdicts(results, LEDGER)
    text = pages.verdict_tables(LEDGER, judged).replace(pages.NBSP, " ")
    assert text.startswith("### 90 Toys\n\n{doc}`The chapter </book/runs/lab-llava/90-toy>`")
    assert text.count("\n* - ") == 3 and text.count("\n  - ") == 9  # a head and two claims; three models
    cells = [line.strip() for line in text.splitlines() if line.startswith("  - ")]
    assert cells[:3] == ["- `lab-llava`", "- `bare`", "- `other`"]
    assert cells[3:] == [
        "- [{ref}`✓ supported <fig-toy>`]{.verdict .v-supported}\\",
        "- [? inconclusive]{.verdict .v-inconclusive}\\",
        "- [{ref}`✗ contradicted <fig-toy--other>`]{.verdict .v-contradicted}\\",
        "- [{ref}`✗ contradicted <fig-toy>`]{.verdict .v-contradicted}\\",
        "- [○ not run]{.verdict .v-not-run}",
        "- [{ref}`– not applicable <fig-toy--other>`]{.verdict .v-not-applicable}",
    ]
    assert "3.00 [2.50, 3.50]" in text and "−4.00 [−5.00, −3.00]" in text
    assert "n = 99, p < 0.001" in text


def test_rule_stands_in_the_fold_of_each_claim(results):
    text = pages.verdict_tables(LEDGER, claims.verdicts(results, LEDGER))
    assert "is above 1.5 times; contradicted" in text and "is between −2 and 2 points; contradicted" in text
    assert "<code>{model}.up.effect</code>" in text


def test_summary_counts(results):
    text = pages.verdict_summary(LEDGER, claims.verdicts(results, LEDGER))
    assert text.startswith("The ledger holds 2 claims from 1 work. In at least one model, 2 were judged; 1 came out")
    row = text[text.index("* - `other`") :].splitlines()[:6]
    assert [line.split()[-1] for line in row[1:]] == ["0", "1", "0", "1", "0"]


def test_pages_without_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RUNS", tmp_path)
    judged = claims.verdicts(tmp_path, LEDGER)
    assert pages.verdict_summary(LEDGER, judged).endswith("No run has been made.")
    assert "Chapter 90" in pages.verdict_tables(LEDGER, judged)


def test_everything_is_written_whole(tmp_path):
    pages.write(tmp_path)
    named = {f"paper-{table['table']}.md" for table in pages.paper_tables()}
    parts = {"verdicts-summary.md", "verdicts-table.md", "verdicts-controls.md", "verdicts.csv"}
    assert {path.name for path in tmp_path.iterdir()} == named | parts
    included = (BOOK / "paper.md").read_text() + (BOOK / "verdicts.md").read_text() + "verdicts.csv"
    assert not [name for name in named | parts if name not in included]
    table = pd.read_csv(tmp_path / "verdicts.csv")
    assert len(table) == len(claims.load()["claims"]) * table.model.nunique()


# ---- the paper's numbers


def test_numbers_of_the_paper_are_in_order_and_agree_with_one_another():
    tables = {table["table"]: table["rows"] for table in pages.paper_tables()}
    assert sum(map(len, tables.values())) > 180

    def value(table, **where):
        rows = tables[table]
        for column, wanted in where.items():
            rows = rows[rows[column] == wanted]
        return float(rows.value.squeeze())

    # The two tables about TinyLLaVA's baselines and the sum in the text come from different accounts.
    for model in ("TinyLLaVA-0.5B", "TinyLLaVA-3.1B"):
        one = value("connectors", model=model, row="one connector", column="MME all")
        assert one == value("diysink", model=model, row="baseline", column="MME all")
    cognition = value("token-types", row="all tokens", column="MME cognition (global)")
    assert cognition == value("connectors", model="TinyLLaVA-0.5B", row="one connector", column="MME cognition")
    one, nine = (value("token-types", row=r, column="MathVista NUM (global)") for r in ("all tokens", "sinks only"))
    assert round((nine - one) / 100 * 144) == 9
    ratio = value("attention", row="propagated ViT sink") / value("attention", row="token that is no sink")
    assert ratio == pytest.approx(value("attention", row="norm above 100, times ordinary"), rel=0.1)


def change(row, column, value):
    return lambda lines: lines[row].__setitem__(pages.COLUMNS.index(column), value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(0, "value", "seven"), "paper table attention: needs the columns"),
        (change(1, "value", "seven"), "paper table attention: a value is no number"),
        (change(1, "grade", "E"), "paper table attention: unknown grade or source: E"),
        (change(1, "source", "nobody2020"), "unknown grade or source: nobody2020"),
        (change(1, "table", "probes"), "'table' must be its name"),
        (change(1, "row", ""), "every line needs a 'row'"),
        (lambda lines: lines.append(lines[1]), "the same number is there twice"),
        (lambda lines: lines.__delitem__(slice(1, None)), "and a row"),
    ],
)
def test_paper_table_with_a_mistake_is_one_clear_error(tmp_path, edit, message):
    shutil.copytree(pages.PAPER, tmp_path / "paper")
    path = tmp_path / "paper" / "attention.csv"
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    edit(lines)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    with pytest.raises(ValueError, match=message) as error:
        pages.paper_tables(tmp_path / "paper")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {table: attention, title: A, here: [{label: x, claim: nothing}]}", "there is no claim 'nothing'"),
        ("- {table: attention, title: A, here: [{label: x, chapter: 03-propagation}]}", "lacks figure, metric, unit"),
        ("- {table: attention, tilte: A}", "takes table, title, here and note"),
        ("- {table: attention, title: A}\n- {table: attention, title: B}", "do not match: a name is there twice"),
        ("- {table: elsewhere, title: A}", "do not match: attention, elsewhere"),
    ],
)
def test_list_of_tables_with_a_mistake_is_one_clear_error(tmp_path, text, message):
    shutil.copy(pages.PAPER / "attention.csv", tmp_path)
    (tmp_path / "tables.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        pages.paper_tables(tmp_path)


def test_published_and_own_numbers_are_marked_and_apart(results):
    rows = pd.DataFrame(
        [
            ("t", "first", "score", "1.50", "%", "big", "luo2026sink", "A", ""),
            ("t", "second", "score", "-2", "%", "big", "luo2026sink", "B", "about"),
        ],
        columns=pages.COLUMNS,
    )
    here = {"label": "effect", "chapter": "90-toy", "figure": "fig-toy", "metric": "{model}.up.effect", "unit": "times"}
    table = {"table": "t", "title": "Toys", "rows": rows, "here": [here], "note": ""}
    text = pages.paper_part(table, claims.metrics(results), ["lab-llava", "bare", "absent"]).replace(pages.NBSP, " ")
    published, own = text.split("[Here]")
    assert published.startswith("[Published]") and "**Toys**, on big. {cite:t}`luo2026sink`" in published
    assert "  - score, %" in published and "  - 1.50\n" in published and "  - −2\n" in published
    assert "[A]{.grade .grade-a}" in published and "fig-toy" not in published
    assert "* - effect, times\n  - {ref}`3.00 [2.50, 3.50] <fig-toy>`\n  - 1.60 [1.20, 2.00]\n  - not run" in own
    without = pages.paper_part(table | {"here": []}, claims.metrics(results), ["lab-llava"])
    assert without.endswith("[Here]{.whose .whose-here} Not run.")


def test_interval_of_two_digits_keeps_a_decimal():
    row = pd.Series({"value": 38.3384, "low": 37.3006, "high": 39.4436})
    assert pages._interval(row).replace(pages.NBSP, " ") == "38.3 [37.3, 39.4]"
    assert pages._interval(pd.Series({"value": -0.02, "low": np.nan, "high": np.nan})) == "−0.02 (one picture)"


def test_metrics_files_of_the_study_can_all_be_read():
    table = claims.metrics()
    files = list(claims.RESULTS.glob("*/*/metrics.json"))
    assert len(table) == sum(len(json.loads(file.read_text())) for file in files)
    assert table.run.iloc[0] == "lab-llava"
