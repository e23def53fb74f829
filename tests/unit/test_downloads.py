"""Links of a chapter's page to its figures and tables as files: where there is a file, and nowhere else."""

import re
from types import SimpleNamespace

import pandas as pd
import pytest
from docutils import nodes
from docutils.utils import new_document

from sinkstudy.book import downloads

TABLE = '<table border="1" class="dataframe"><tr><td>1</td></tr></table>'
PROVENANCE = '<table class="dataframe provenance"><tr><td>1</td></tr></table>'


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "RESULTS", tmp_path)
    folder = tmp_path / "lab-x" / "01-norms"
    folder.mkdir(parents=True)
    return folder


def page(figure: str = "fig-norms-layers", tables: tuple[str, ...] = (TABLE, PROVENANCE)) -> nodes.document:
    made = new_document("page")
    section = nodes.section("", nodes.title("", "Norms"))
    section += nodes.figure("", nodes.image(uri="x.png"), nodes.caption("", "Norms."), names=[figure])
    for table in tables:
        section += nodes.container("", nodes.raw("", table, format="html"))
    made += section
    return made


def links(made: nodes.document, name: str = "book/runs/lab-x/01-norms", format: str = "html") -> list[tuple[str, str]]:
    app = SimpleNamespace(env=SimpleNamespace(docname=name), builder=SimpleNamespace(format=format))
    downloads.add_links(app, made)
    return [(link.astext(), link["refuri"]) for link in made.findall(nodes.reference)]


def test_what_is_there_is_linked(results):
    for name in ("norms-layers.pdf", "norms-layers.svg", "table-1.tex", "counts.csv", "metrics.json", "explorer.js"):
        (results / name).touch()
    base = "../../../_static/lab-x/01-norms/"
    assert links(page()) == [
        ("PDF", f"{base}norms-layers.pdf"), ("SVG", f"{base}norms-layers.svg"), ("tables", "#files"),
        ("LaTeX", f"{base}table-1.tex"),
        ("counts.csv", f"{base}counts.csv"), ("metrics.json", f"{base}metrics.json"),
    ]  # fmt: skip


def test_labels_of_another_run_name_the_same_files(results):
    (results / "norms-layers.pdf").touch()
    assert [text for text, _ in links(page("fig-norms-layers--lab-x"))] == ["PDF"]


def test_nothing_leads_nowhere(results):
    assert links(page()) == []
    (results / "other.svg").touch()
    assert links(page()) == []


@pytest.mark.parametrize("kept", [1, 3])
def test_tables_of_another_execution_are_not_linked(results, kept):
    for number in range(1, kept + 1):
        (results / f"table-{number}.tex").touch()
    assert links(page(tables=(TABLE, TABLE, PROVENANCE))) == []


def test_other_pages_and_formats_stay_as_they_are(results):
    (results / "norms-layers.pdf").touch()
    assert links(page(), name="book/intro") == [] == links(page(), format="latex")


@pytest.mark.parametrize(("rows", "folds"), [(12, 0), (13, 2)])
def test_long_tables_are_folded_whole_and_lead_to_their_csv(results, rows, folds):
    for name in ("table-1.tex", "counts.csv"):
        (results / name).touch()
    head, body = "<thead><tr><th>n</th></tr></thead>", f"<tbody>{'<tr><td>1</td></tr>' * rows}</tbody>"
    long = [table.replace("<tr><td>1</td></tr>", head + body) for table in (TABLE, PROVENANCE)]
    made = page(tables=tuple(long))
    there = SimpleNamespace(docname="book/runs/lab-x/01-norms")
    app = SimpleNamespace(env=there, builder=SimpleNamespace(format="html"))
    assert ("CSV" in [text for text, _ in links(made)]) == bool(folds)
    downloads.fold_long(app, made)
    texts = [raw.astext() for raw in made.findall(nodes.raw)]
    assert sum(text.startswith("<details") for text in texts) == folds
    assert all(table in text for table, text in zip(long, texts, strict=True))
    assert not folds or "<summary>A table of 13 rows</summary>" in texts[0]


def headed(table: pd.DataFrame) -> list[list[str]]:
    """The rows of heads of a table on a chapter's page."""
    made = page(tables=(table.to_html(),))
    there = SimpleNamespace(docname="book/runs/lab-x/01-norms")
    downloads.head_once(SimpleNamespace(env=there, builder=SimpleNamespace(format="html")), made)
    (text,) = (raw.astext() for raw in made.findall(nodes.raw))
    assert text.partition("<tbody>")[2] == table.to_html().partition("<tbody>")[2]
    head = text.partition("<thead>")[2].partition("</thead>")[0]
    return [re.findall("<th[^>]*>(.*?)</th>", row) for row in head.split("</tr>")[:-1]]


def test_names_of_index_and_columns_stand_in_one_row():
    table = pd.DataFrame({"model": ["a", "b"], "group": ["x", "y"], "value": [1, 2]})
    assert headed(table.set_index(["model", "group"])) == [["model", "group", "value"]]
    assert headed(table.set_index("model").rename_axis(None)) == [["", "group", "value"]]
    two_deep = table.set_index("model")[["value"]].set_axis(pd.MultiIndex.from_tuples([("all", "n")]), axis=1)
    assert headed(two_deep) == [["", "all"], ["", "n"], ["model", ""]]
    named = table.set_index("model")[["value"]].rename_axis("what", axis=1)
    assert headed(named) == [["what", "value"], ["model", ""]]  # no gap for the second name
