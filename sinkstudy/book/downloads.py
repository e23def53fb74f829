"""Beside the figures and tables of a chapter's page, links to what they can be taken away as, and which run it shows.

An extension of Sphinx.

A figure is there as PDF and SVG, a table as it is shown in LaTeX, and what was kept as CSV at the foot of the page.
The files are those of `results/<run>/<notebook>/`, which the book copies; a link stands only where there is a file.
A table has one row of heads, where pandas makes two of them, and is folded if it has more than `ROWS` rows.
Where there is a full run of the chapter, a line below the page's first box says how many pictures each has.
"""

import json
import re
from typing import Any

from docutils import nodes

from sinkstudy.paths import DEFAULT_MODEL, FULL, RESULTS, ROOT, RUNS

FOOT = "files"  # the anchor of the list at the foot of a page
ROWS = 12  # that a table may have without a fold
HEAD = re.compile(r"<thead>\s*<tr[^>]*>(.*?)</tr>\s*<tr[^>]*>(.*?)</tr>\s*</thead>", re.S)  # of two rows


def add_links(app: Any, doctree: nodes.document) -> None:
    """Add the links to a page as it is read, where it is that of a chapter."""
    name = app.env.docname
    page = ROOT / name
    if RUNS not in page.parents or app.builder.format != "html":
        return
    run, notebook = page.parts[-2:]
    files = sorted((RESULTS / run / notebook).glob("*"))
    base = "../" * name.count("/") + f"_static/{run}/{notebook}/"  # _config.yml copies results/ there

    def line(links: list[tuple[str, str]], kind: type = nodes.paragraph, before: str = "") -> nodes.Element:
        found = kind("", before, classes=["take-away"])
        for number, (text, address) in enumerate(links):
            found += [*([nodes.Text(" · ")] if number else []), nodes.reference("", text, refuri=address)]
        return found

    there = {path.name for path in files}
    listed = [path.name for path in files if path.suffix in (".csv", ".json")]
    for figure in doctree.findall(nodes.figure):
        stems = [name.removeprefix("fig-").removesuffix(f"--{run}") for name in figure["names"]]
        links = [(suffix.upper(), f"{base}{stem}.{suffix}") for stem in stems for suffix in ("pdf", "svg")
                 if f"{stem}.{suffix}" in there]
        caption = next(figure.findall(nodes.caption), None)
        if links and caption is not None:
            caption += line([*links, ("tables", f"#{FOOT}")] if listed else links, nodes.inline)
    shown = [raw for raw in doctree.findall(nodes.raw) if _is_table(raw)]
    latex = [f"table-{number}.tex" for number in range(1, len(shown) + 1)]
    if there.issuperset(latex) and f"table-{len(shown) + 1}.tex" not in there:  # of these very tables
        for raw, file in zip(shown, latex, strict=True):
            csv = [("CSV", f"#{FOOT}")] if listed and _rows(raw) > ROWS else []
            raw.parent.append(line([*csv, ("LaTeX", base + file)]))
    if listed:
        foot = line([(file, base + file) for file in listed], before="What this page shows, as files: ")
        foot["ids"].append(FOOT)
        doctree.children[-1].append(foot)


def add_run(app: Any, doctree: nodes.document) -> None:
    """Say on a chapter's page of the default run, and of the full run, which it shows and where verdicts come from."""
    page = ROOT / app.env.docname
    if page.parent not in (RUNS / DEFAULT_MODEL, RUNS / FULL) or app.builder.format != "html":
        return
    of = {run: RESULTS / run / page.name / "metrics.json" for run in (DEFAULT_MODEL, FULL)}
    if not all(file.is_file() for file in of.values()):
        return
    n = {run: max(row["n"] or 0 for row in json.loads(file.read_text("utf-8"))) for run, file in of.items()}
    other = DEFAULT_MODEL if page.parent.name == FULL else FULL
    shown = {DEFAULT_MODEL: "default run", FULL: "full run"}
    words = (f"This page shows the {shown[page.parent.name]}, numbers of up to {n[page.parent.name]:,} pictures; the "
             f"{shown[other]} has up to ")
    line = nodes.paragraph("", words, classes=["take-away"])
    number = f"{n[other]:,}"
    there = (RUNS / other / f"{page.name}.ipynb").is_file()
    line += nodes.reference("", number, refuri=f"../{other}/{page.name}.html") if there else nodes.Text(number)
    line += [nodes.Text(", and the "), nodes.reference("", "verdicts", refuri="../../verdicts.html"),
             nodes.Text(" come from the full run.")]
    box = next(doctree.findall(nodes.Admonition), None)
    if box is not None:
        box.parent.insert(box.parent.index(box) + 1, line)


def head_once(app: Any, doctree: nodes.document) -> None:
    """Set the names of a table's index and of its columns, two rows where each has gaps, in one row."""
    if RUNS in (ROOT / app.env.docname).parents and app.builder.format == "html":
        for raw in list(doctree.findall(nodes.raw)):
            if _is_table(raw):
                text = HEAD.sub(_one_row, raw.astext(), count=1)
                raw.replace_self(nodes.raw("", text, format="html", classes=raw["classes"]))


def _one_row(found: re.Match[str]) -> str:
    rows = [re.findall(r"<th[^>]*>(.*?)</th>", row, re.S) for row in found.groups()]
    if len(rows[0]) != len(rows[1]) or any(map(all, zip(*rows, strict=True))):
        return found[0]
    heads = [f'<th style="text-align: left;">{name}</th>' if name else f"<th>{column}</th>"
             for column, name in zip(*rows, strict=True)]
    return f'<thead>\n<tr style="text-align: right;">{"".join(heads)}</tr>\n</thead>'


def fold_long(app: Any, doctree: nodes.document) -> None:
    """Fold a chapter's tables of more than `ROWS` rows, that of its provenance among them."""
    if RUNS not in (ROOT / app.env.docname).parents or app.builder.format != "html":
        return
    for raw in list(doctree.findall(nodes.raw)):
        if raw.get("format") == "html" and (n := _rows(raw)) > ROWS:
            what = "A table of" if _is_table(raw) else "Model, weights, parameters and versions of this page:"
            folded = f'<details class="long"><summary>{what} {n} rows</summary>{raw.astext()}</details>'
            raw.replace_self(nodes.raw("", folded, format="html", classes=raw["classes"]))


def _rows(raw: nodes.raw) -> int:
    """The rows in the body of a DataFrame or of a page's provenance; none in anything else."""
    return len(re.findall("<tr", raw.astext().partition("<tbody")[2])) if 'class="dataframe' in raw.astext() else 0


def _is_table(raw: nodes.raw) -> bool:
    """Is it a DataFrame that a cell ended with? The one of the page's provenance has a further class."""
    return raw.get("format") == "html" and 'class="dataframe"' in raw.astext()


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("doctree-read", add_links)
    app.connect("doctree-read", add_run)
    app.connect("doctree-read", head_once)
    app.connect("doctree-read", fold_long)
    return {"parallel_read_safe": True}
