"""How the book is rendered: from its pages and the executed notebooks, if anything that it shows has changed."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sinkstudy import digests
from sinkstudy.book import engine
from sinkstudy.book.parameters import UserError, files
from sinkstudy.paths import BOOK, BUILD, DATA, DEFAULT_MODEL, FULL, NOTEBOOKS, PACKAGE, RESULTS, ROOT, RUNS, atomic


def book(*, stored: bool = False) -> None:
    """Render `_build/html` if a page, an executed notebook or anything else shown has changed.

    Chapters that the default run lacks are shown with the outputs stored in `notebooks/`, and named. Executed pages of
    that run whose notebook is gone, renamed say, are deleted: other pages have their labels.

    `stored`: show stored outputs where the default run is out of date, too (for tests of the pages). Raises UserError
    if a page is missing or Jupyter Book warns.
    """
    names, there = engine.notebooks(), engine.executed(DEFAULT_MODEL)
    for name in set(there) - set(names):
        (RUNS / DEFAULT_MODEL / f"{name}.ipynb").unlink()
    if lacking := [name for name in names if name not in there]:
        print(f"not executed here, so shown as stored in {NOTEBOOKS.name}/: {', '.join(lacking)}")
    for name in names:
        if name in lacking or stored and not engine.is_fresh(DEFAULT_MODEL, name, {}):
            with atomic(RUNS / DEFAULT_MODEL / f"{name}.ipynb") as target:
                shutil.copyfile(NOTEBOOKS / f"{name}.ipynb", target)
    _lead_to_what_is_there()
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    for page in _toc_pages(toc):
        if page.startswith("book/runs/") and not (ROOT / f"{page}.ipynb").is_file():
            raise UserError(f"{page}.ipynb is missing: 'sinkstudy run' makes it")
    write_provenance()
    told = (ROOT / name for name in ("_config.yml", "_toc.yml", "CITATION.cff"))
    shown = [path for of in (BOOK, DATA, RESULTS, *told) for path in files(of)]
    shown += PACKAGE.rglob("*.py")  # the pages of the API, and pages that are computed
    content, stamp, index = engine.files_sha256(shown), BUILD / "rendered-from", BUILD / "html" / "index.html"
    if index.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == content:
        print(f"the book is up to date: {index.relative_to(ROOT)}")
        return
    stamp.unlink(missing_ok=True)
    BUILD.mkdir(exist_ok=True)
    if (DATA / "claims.yml").is_file():  # pages that follow from the ledger and from the results of all runs
        from sinkstudy.book import pages  # only now: pandas and seaborn take seconds

        try:
            pages.write(BUILD / "pages")
        except ValueError as problem:
            raise UserError(str(problem)) from None
    (BUILD / "toc.yml").write_text(yaml.safe_dump(_with_runs(toc), sort_keys=False))
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", ".", "--toc", str(BUILD / "toc.yml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*command, "--all", "-W", "-n", "--keep-going"], cwd=ROOT, env=environment, check=False)
    if ended.returncode or not index.is_file():
        raise UserError("the book was not rendered without a warning: Jupyter Book's messages stand above")
    with atomic(stamp) as target:
        target.write_text(content, encoding="utf-8")
    print(f"the book is rendered: {index.relative_to(ROOT)}")


def _toc_pages(toc: Any) -> Iterator[str]:
    if isinstance(toc, dict):
        yield from (toc[key] for key in ("root", "file") if key in toc)
        toc = list(toc.values())
    if isinstance(toc, list):
        for item in toc:
            yield from _toc_pages(item)


def _lead_to_what_is_there() -> None:
    """Give the labels in the pages of every run but the default one names of that run, and lead references to them.

    The book shows one copy of a notebook for each run, and Sphinx wants every label once. Where a run lacks the page
    that one of its pages refers to, the default run's is meant.
    """
    defined = r"^(?:\((?=[\w.:-]+\)=)|:name: *)"
    anywhere = rf"(?m)({defined}|\]\(#?|\{{(?:numref|ref|eq)\}}`(?:[^`<]*<)?)([\w.:-]+)(?=[)`>\s]|$)"
    for run in engine.runs():
        if run == DEFAULT_MODEL:
            continue
        pages = {name: RUNS / run / f"{name}.ipynb" for name in engine.executed(run)}
        read = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in pages.items()}
        texts = ["".join(cell["source"]) for page in read.values() for cell in _prose(page)]
        found = {label for text in texts for label in re.findall(rf"(?m){defined}([\w.:-]+)", text)}
        own = {label.removesuffix(f"--{run}") for label in found}

        def label(found: re.Match, own: set[str] = own, run: str = run) -> str:
            plain = found[2].removesuffix(f"--{run}")
            return found[1] + (f"{plain}--{run}" if plain in own else plain)

        def link(found: re.Match, there: dict[str, Path] = pages) -> str:
            return f"]({'' if found[1] in there else f'../{DEFAULT_MODEL}/'}{found[1]}.ipynb"

        for name, page in read.items():
            before = json.dumps(page)
            for cell in _prose(page):
                text = re.sub(anywhere, label, "".join(cell["source"]))
                text = re.sub(rf"\]\((?:\.\./{DEFAULT_MODEL}/)?(\d\d-[\w-]+)\.ipynb", link, text)
                cell["source"] = text.splitlines(keepends=True)
            if json.dumps(page) != before:
                with atomic(pages[name]) as target:
                    target.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _prose(page: dict) -> list[dict]:
    return [cell for cell in page["cells"] if cell["cell_type"] == "markdown"]


def _with_runs(toc: dict) -> dict:
    """The table of contents with one part for each run of another model that `_toc.yml` does not name."""
    named = set(_toc_pages(toc))
    parts = [
        {"caption": "The full run" if run == FULL else f"On {run}", "chapters": [{"file": page} for page in pages]}
        for run in engine.runs()
        if (pages := [p for name in engine.executed(run) if (p := f"book/runs/{run}/{name}") not in named])
    ]
    if not parts:
        return toc
    rest = {key: value for key, value in toc.items() if key != "chapters"}
    return rest | {"parts": toc.get("parts", [{"chapters": toc.get("chapters", [])}]) + parts}


def write_provenance() -> None:
    """Write `book/runs/{provenance,versions,checksums}.csv` for the provenance page, from the executed notebooks."""
    columns = ("run", "notebook", "model", "device", "dtype", "seed", "git_commit", "dirty", "started", "seconds")
    tables: dict[str, list[tuple]] = {
        "provenance": [columns], "versions": [("run", "package", "version")], "checksums": [("file", "sha256")]
    }  # fmt: skip
    for run in engine.runs():
        for name in engine.executed(run):
            noted = engine.record(run, name) | {"notebook": name, "run": run}
            if noted.get("revision"):
                noted["model"] += f"@{noted['revision'][:12]}"
            tables["provenance"].append(tuple(noted.get(column, "") for column in columns))
        tables["versions"] += [(run, *of) for of in noted.get("versions", {}).items()]
    tables["checksums"] += [(str(path.relative_to(ROOT)), digests.sha256(path)) for path in sorted(files(DATA))]
    for stem, table in tables.items():
        if len(table) == 1:  # Sphinx refuses a table without a row; the pages show stored outputs, say
            table.append(("no notebook was executed here", *[""] * (len(table[0]) - 1)))
        with atomic(RUNS / f"{stem}.csv") as target, target.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
