"""The book is rendered when something it shows has changed, and never executes a notebook."""

import re

from tests.engine.conftest import Project

CONFIG = """
title: Toy
only_build_toc_files: true
exclude_patterns: [_build, notebooks/**, .snakemake/**]
execute: {execute_notebooks: "off"}
sphinx: {config: {numfig: true}}
"""
TOC = """
format: jb-book
root: book/intro
chapters:
  - file: book/runs/lab-llava/01-first
  - file: book/runs/lab-llava/02-second
"""
PROSE = """# A toy

(part)=
## Part

```{figure} ../../dot.png
:name: fig-dot
A dot.
```
See {ref}`part` and {numref}`fig-dot`.
"""
DOT = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d4944415478da636460f85f0f0002870180eb47ba920000000049454e44ae426082"
)

PAGES = """
from sinkstudy.paths import RESULTS, atomic


def write(folder):
    with atomic(folder / "part.md") as target:
        target.write_text("Computed from " + (RESULTS / "lab-llava/02-second/metrics.json").read_text())
"""


def begin(project: Project) -> None:
    """The book's own files."""
    project.write("_config.yml", CONFIG)
    project.write("_toc.yml", TOC)
    project.write("book/intro.md", "# Intro\n")
    (project.root / "book/dot.png").write_bytes(DOT)


def test_render(project: Project):
    begin(project)
    project.notebook("01-first", "print(limit)", prose=PROSE)
    project.notebook("02-second", "print(seed)")

    printed = project.call("book")  # pages without outputs: none is stored yet
    assert printed.startswith("not executed here, so shown as stored in notebooks/: 01-first, 02-second\n")
    assert "the book is rendered" in printed
    project.write("_toc.yml", TOC + "  - file: book/runs/lab-llava/03-third\n")
    printed = project.call("book", code=1)
    assert printed == "sinkstudy: book/runs/lab-llava/03-third.ipynb is missing: 'sinkstudy run' makes it\n"
    project.write("_toc.yml", TOC)
    project.call("run")
    assert "the book is rendered" in project.call("book")
    html = project.root / "_build/html"
    assert ">3\n" in (html / "book/runs/lab-llava/01-first.html").read_text()
    assert (project.root / "book/runs/provenance.csv").read_text().count("\n") == 3

    times = {path: path.stat().st_mtime_ns for path in html.rglob("*.html")}
    assert project.call("book") == "the book is up to date: _build/html/index.html\n"
    assert "up to date" in project.call("book", "--stored")
    assert times == {path: path.stat().st_mtime_ns for path in html.rglob("*.html")}

    project.call("run", "owner/other", "--only", "01", "--limit", "7")
    project.write("book/intro.md", "# Another title\n")
    printed = project.call("book")
    assert "the book is rendered" in printed  # no label twice: -W would have failed
    intro = (html / "book/intro.html").read_text()
    assert "Another title" in intro and "On owner--other" in intro
    other = (html / "book/runs/owner--other/01-first.html").read_text()
    assert ">7\n" in other and re.search(r'href="#part-owner-other"', other)

    project.write("sinkstudy/book/pages.py", PAGES)
    project.write("data/claims.yml", "claims: []")
    project.write("results/lab-llava/02-second/metrics.json", "4711")
    project.write("book/intro.md", "# Intro\n\n```{include} ../_build/pages/part.md\n```\n")
    project.call("book")
    assert "Computed from 4711" in (html / "book/intro.html").read_text()
    assert "up to date" in project.call("book")
    project.write("results/lab-llava/02-second/metrics.json", "0815")  # another run, say: the page follows
    project.call("book")
    assert "Computed from 0815" in (html / "book/intro.html").read_text()
    project.write("sinkstudy/book/pages.py", "def write(folder):\n    raise ValueError('claim 3 has no source')\n")
    assert project.call("book", code=1) == "sinkstudy: claim 3 has no source\n"

    project.write("book/intro.md", "# Intro\n\n{ref}`nowhere`\n")
    project.write("sinkstudy/book/pages.py", PAGES)
    assert "was not rendered without a warning" in project.call("book", code=1)
    assert "was not rendered without a warning" in project.call("book", code=1)  # not taken for a whole book


def test_any_chapters_of_a_run(project: Project):
    """A page refers to its run's other pages where they are, else to the default run's; also once they come or go."""
    begin(project)
    project.notebook("01-first", "print(limit)", prose=PROSE)
    project.notebook("02-second", "print(seed)", prose="# Two\n\nSee {ref}`that <part>`, [](01-first.ipynb).")
    project.call("run", "--only", "02")
    project.call("run", "owner/other", "--only", "02")
    printed = project.call("book")  # -W: a reference that leads nowhere would fail
    assert printed.startswith("not executed here, so shown as stored in notebooks/: 01-first\n")
    page = project.root / "_build/html/book/runs/owner--other/02-second.html"
    assert 'href="../lab-llava/01-first.html#part"' in page.read_text()
    project.call("run", "owner/other", "--only", "01")
    project.call("book")
    assert 'href="01-first.html#part-owner-other"' in page.read_text()
    assert "lab-llava/01-first.html#part" not in page.read_text()
    (project.root / "book/runs/owner--other/01-first.ipynb").unlink()
    project.call("book")
    assert 'href="../lab-llava/01-first.html#part"' in page.read_text()
    project.call("run", "owner/other", "--only", "01")
    (project.root / "book/runs/owner--other/02-second.ipynb").unlink()
    project.call("book")
    assert not page.exists() or "owner--other/02-second" not in (project.root / "_build/toc.yml").read_text()


def test_renamed_notebook(project: Project):
    """The page of the old name goes, so no label stands twice; a page of another run stays."""
    begin(project)
    project.notebook("01-first", "print(limit)")
    project.notebook("02-second", "print(seed)", prose=PROSE)
    project.call("run")
    project.call("run", "owner/other", "--only", "02")
    (project.root / "notebooks/02-second.ipynb").rename(project.root / "notebooks/03-third.ipynb")
    project.write("_toc.yml", TOC.replace("02-second", "03-third"))
    project.call("run")
    assert "the book is rendered" in project.call("book")
    assert not (project.root / "book/runs/lab-llava/02-second.ipynb").exists()
    assert (project.root / "book/runs/owner--other/02-second.ipynb").exists()
