"""The computed parts of the book: what they say for results made by hand, and that the paper's numbers are in order."""

import copy
import csv
import json
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from sinkstudy.book import claims, pages
from sinkstudy.paths import BOOK, POSITIVE_CONTROL
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
    write(tmp_path, "other", [("other.up.effect", 0.7, 0.6, 0.8, 20, ""), ("other.same.effect", *nothing)])
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
        "- [{ref}`✗ opposite sign <fig-toy--other>`]{.verdict .v-opposite-sign}\\",
        "- [{ref}`✗ opposite sign <fig-toy>`]{.verdict .v-opposite-sign}\\",
        "- [○ not run]{.verdict .v-not-run}",
        "- [{ref}`– not applicable <fig-toy--other>`]{.verdict .v-not-applicable}",
    ]
    assert "3.00 [2.50, 3.50]" in text and "−4.00 [−5.00, −3.00]" in text
    assert "n = 99, p < 0.001" in text


def test_a_model_in_which_nothing_of_a_chapter_was_judged_has_no_column(results):
    judged = claims.verdicts(results, LEDGER)
    none = judged.model == "other"
    assert "`other`" in pages.verdict_tables(LEDGER, judged)
    text = pages.verdict_tables(LEDGER, judged.assign(verdict=judged.verdict.where(~none, "not applicable")))
    assert "`other`" not in text and text.count("\n  - ") == 6  # a head and two claims; two models


def test_rule_stands_in_the_fold_of_each_claim(results):
    ledger = copy.deepcopy(LEDGER)
    ledger["claims"][0] |= {"published": 4, "matched": {"bare": "close"}, "seen": True, "was": "above 2 times"}
    text = pages.verdict_tables(ledger, claims.verdicts(results, ledger))
    assert "Supported: above 1.5 times. No effect: between 0.909 and 1.1 times." in text
    assert "Right sign, below the bound: between 1 and 1.5 times. Opposite sign: below 1 times." in text
    assert "Supported: between −2 and 2 points. Opposite sign: outside, on one side." in text
    assert "<code>{model}.up.effect</code>. In bare, against the same patches" in text and "like place: close." in text
    assert "Smallest published effect: 4 times." in text
    assert "The rule was changed after its number was known. Before: above 2 times." in text
    assert "The rule was written before the run.</details>" in text  # a range has no smallest effect beside it


def test_summary_counts(results):
    text = pages.verdict_summary(LEDGER, claims.verdicts(results, LEDGER))
    assert text.startswith("The ledger holds 2 claims from 1 work. In at least one model, 2 were judged; 1 came out")
    row = text[text.index("* - [✗ opposite sign]") :].splitlines()[:4]
    assert [line.split()[-1] for line in row[1:]] == ["1", "0", "1"]  # lab-llava, bare, other


def test_matrix_has_a_word_for_each_claim_and_model(results):
    text = pages.matrix(LEDGER, claims.verdicts(results, LEDGER))
    assert text.count("\n* - ") == 4  # a head, a theme (no chapter of the study: it stands for itself), two claims
    assert "* - **Chapter 90**" in text and '* - <a href="#claim-same">same</a>' in text
    assert '<span id="claim-same"></span>' in pages.verdict_tables(LEDGER, claims.verdicts(results, LEDGER))
    assert text.count("✓ supported") == 1 and text.count("✗ opposite sign") == 2 and text.count("? inconclusive") == 1
    assert "\n  - –\n" in text and "not applicable" not in text  # not judged: the sign alone


def test_a_sentence_for_each_theme(results):
    text = pages.themes(LEDGER, claims.verdicts(results, LEDGER))
    first = "`lab-llava` 1 supported (up), 1 opposite sign (same)"
    assert text == f"- **Chapter 90:** {first}; `bare` 1 inconclusive; `other` 1 opposite sign (up)."


@pytest.mark.parametrize("claim", claims.load()["claims"], ids=lambda claim: claim["id"])
def test_every_claim_of_the_study_is_in_one_theme(claim):
    assert sum(claim["chapter"] in chapters for chapters in pages.THEMES.values()) == 1


def test_evidence_says_first_what_its_sinks_are(results):
    judged = claims.verdicts(results, LEDGER)
    counts = "4 judgements of a claim in a model: 2 on `lab-llava`; 1 on `bare`; 1 on `other`."
    assert pages.evidence(LEDGER, judged, claims.metrics(results)) == counts
    planted = judged.replace({"model": {"lab-llava": POSITIVE_CONTROL}})
    write(results, "other", [("other.on_things.sinks", 81.0, 80.0, 82.0, 20, "%")], chapter="04-relevance")
    write(results, "bare", [("bare.on_things.sinks", 60.0, 50.0, 70.0, 20, "%")], chapter="04-relevance")
    text = pages.evidence(LEDGER, planted, claims.metrics(results))
    assert text.startswith("**Nearly all evidence on sinks that lie on nothing comes from one model, which has them")
    assert "where 81 % of what the rule takes for sinks lies on things" in text
    assert pages.evidence(LEDGER, judged[:0], claims.metrics(results)) == "No run has been made."


def test_what_a_model_was_made_for_is_marked_and_counted_apart(results):
    ledger = copy.deepcopy(LEDGER)
    ledger["claims"][0]["built"] = ["lab-llava", "other"]  # supported in the first, of opposite sign in the other
    judged = claims.verdicts(results, ledger)
    for text in (pages.matrix(ledger, judged), pages.verdict_tables(ledger, judged)):
        assert text.count("(built in)") == 1 and "✓ supported" in text[: text.index("(built in)")].splitlines()[-1]
    assert "1 of those that are supported (up) hold" in pages.evidence(ledger, judged, claims.metrics(results))
    assert "built" not in pages.matrix(LEDGER, judged)


def test_power_table_and_what_was_not_testable(results):
    ledger = copy.deepcopy(LEDGER)
    ledger["claims"][0]["published"] = 1.7  # `bare` is 1.6 [1.2, 2] times, of 20 pictures; the bound is 1.5
    judged = claims.verdicts(results, ledger)
    needed = 20 * (2.8016 * np.log(2 / 1.2) / 2 / 1.96 / np.log(1.7 / 1.5)) ** 2  # 170.2
    assert judged.set_index(["model", "claim"]).needed["bare", "up"] == np.ceil(needed)
    text = pages.power_table(ledger, judged).replace(pages.NBSP, " ")
    assert "  - **170**\\\n    20 here, sd 0.58" in text and "* - up\n  - 1.7 times\n  - above 1.5\n" in text
    assert "same" not in text  # nothing published in its unit
    cells = pages.verdict_tables(ledger, judged).replace(pages.NBSP, " ")
    assert cells.count("not testable here: n = 170 would be needed") == 1  # where it is inconclusive, and nowhere else


def test_five_numbers(results):
    write(results, "lab-llava", [(f"{POSITIVE_CONTROL}.up.effect", 3.0, 2.5, 3.5, 99, "")])
    ledger = copy.deepcopy(LEDGER)
    ledger["claims"][0]["id"] = pages.HEADLINES[0]
    text = pages.five(ledger, claims.verdicts(results, ledger)).replace(pages.NBSP, " ")
    assert text.count("\n* - ") == 2  # a head and the only claim that is a headline
    assert "* - Something.\n  - **3.00 [2.50, 3.50]** times\\\n    n = 99, `lab-llava-gist`\n" in text
    assert "✓ supported" in text and "p < 0.001 after correction" in text
    assert text.splitlines()[-2] == "  - {doc}`90 Toys </book/runs/lab-llava/90-toy>`"
    assert pages.five(ledger, claims.verdicts(results, ledger)[:0]) == "No run has been made."


def headline_of(results, row, **more):
    """The introduction's line on a toy claim in the planted model."""
    write(results, "lab-llava", [(f"{POSITIVE_CONTROL}.up.effect", *row)])
    ledger = copy.deepcopy(LEDGER)
    ledger["claims"][0] |= {"id": pages.HEADLINES[0], **more}
    return pages.headlines(ledger, claims.verdicts(results, ledger), claims.metrics(results)).replace(pages.NBSP, " ")


@pytest.mark.parametrize(
    ("row", "number", "verdict", "sure"),
    [
        (
            (3.0, 2.5, 3.5, 99, ""),
            "3.00 [2.50, 3.50] times, n = 99: ",
            "✓ supported",
            ", sure, p < 0.001 after correction",
        ),
        (
            (1.6, 1.2, 2.0, 20, ""),
            "1.60 [1.20, 2.00] times, n = 20: ",
            "? inconclusive",
            ", not sure; not testable here: n = 170 would be needed",
        ),
        ((None, None, None, 0, ""), "", "– not applicable", ""),
    ],
)
def test_line_of_the_introduction_says_number_interval_n_verdict_and_how_sure(results, row, number, verdict, sure):
    style = "-".join(verdict.split()[1:])
    linked = f"[{{ref}}`{verdict} <fig-toy>`]{{.verdict .v-{style}}}"
    assert headline_of(results, row, published=1.7) == f"- **Something.** {number}{linked}{sure}."


def test_introduction_has_five_or_six_lines_of_the_studys_results():
    ledger = claims.load()
    assert set(pages.HEADLINES) <= {claim["id"] for claim in ledger["claims"]}
    judged, numbers = claims.verdicts(ledger=ledger), claims.metrics()
    lines = pages.headlines(ledger, judged, numbers).splitlines()
    assert 5 <= len(lines) <= 6 and all(line.startswith("- **") for line in lines)
    cells = judged.set_index(["claim", "model"])
    in_order = [claim["id"] for claim in ledger["claims"] if claim["id"] in pages.HEADLINES]
    for line, name in zip(lines[1:], in_order, strict=True):
        assert f" {cells.verdict[name, POSITIVE_CONTROL]}" in line, "the line says what the verdict says"
    assert "_build/pages/intro-results.md" in (BOOK / "intro.md").read_text(encoding="utf-8")


def test_pages_without_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RUNS", tmp_path)
    judged = claims.verdicts(tmp_path, LEDGER)
    assert pages.verdict_summary(LEDGER, judged).endswith("No run has been made.")
    assert "Chapter 90" in pages.verdict_tables(LEDGER, judged)


def test_everything_is_written_whole(tmp_path):
    pages.write(tmp_path)
    named = {f"paper-{table['table']}.md" for table in pages.paper_tables()}
    parts = {"numbers-from.md", "intro-results.md", "one-picture-numbers.md", "one-picture-models.md", "verdicts.csv"}
    computed = ("evidence", "summary", "themes", "matrix", "table", "power", "controls", "agreement")
    parts |= {f"verdicts-{part}.md" for part in computed}
    parts |= {f"control-{part}.md" for part in ("gates", "answers", "norms")}
    assert {path.name for path in tmp_path.iterdir()} == named | parts
    shown = ("intro", "one-picture", "paper", "verdicts", "control")
    included = "".join((BOOK / f"{page}.md").read_text() for page in shown) + "verdicts.csv"
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
    return lambda lines: lines[row].__setitem__(pages.PAPER_COLUMNS.index(column), value)


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
        columns=pages.PAPER_COLUMNS,
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
    assert table.run.iloc[0] in ("lab-llava-full", "lab-llava")
