"""Runs side by side: verdicts on the claims, headline numbers, and the figures that show them, as one HTML page."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sinkstudy import stats
from sinkstudy.book import claims, pages, report
from sinkstudy.paths import DEFAULT_MODEL, NOTEBOOKS, RESULTS, RUNS, atomic, noted_model, slug, written

OWN_MODEL = "{model}"
"""Stands for the model of each run, where these differ."""

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem }
:root { color-scheme: light dark }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid #8885; padding: .3rem .7rem; text-align: left; vertical-align: top }
.apart td { background: #cc7f0022 }
.beside { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)) }
figure { margin: 0 } img { max-width: 100% } .wide { overflow-x: auto }"""


def write(
    runs: Sequence[str], page: Path, results: Path = RESULTS, ledger: claims.Ledger | None = None
) -> pd.DataFrame:
    """Compare runs: write the page and, beside it with the suffix .csv, all their headline numbers.

    Args:
        runs: names of folders under `results`.
        page: an HTML file.

    Returns:
        The verdicts, of `run_verdicts`.

    Raises:
        ValueError: in one line, what is wrong with the runs, the ledger or the page's name.
    """
    check(runs, results)
    if page.suffix != ".html":
        raise ValueError(f"the page is HTML: give it a name that ends in .html, not '{page.name}'")
    ledger = ledger or claims.load()
    found, measured = run_verdicts(runs, results, ledger), numbers(runs, results)
    with atomic(page) as target:
        target.write_text(_page(runs, found, measured, ledger), encoding="utf-8")
    with atomic(page.with_suffix(".csv")) as target:
        measured.to_csv(target, index=False, float_format="%.6g")
    return found


def check(runs: Sequence[str], results: Path = RESULTS) -> None:
    """Raise ValueError unless these are two or more different runs that have numbers."""
    there = sorted({run for run, _, _ in written("*/*/metrics.json", root=results)})
    for run in runs:
        if run not in [folder.name for folder in results.glob("*")]:
            raise ValueError(f"there is no run '{run}': runs with results are {', '.join(there) or 'none'}")
        if run not in there:
            raise ValueError(f"the run '{run}' has no metrics.json: 'sinkstudy run --name {run}' makes them")
    if len(set(runs)) < 2 or len(set(runs)) < len(runs):
        raise ValueError(f"a comparison needs two or more different runs, not {' '.join(runs)}")


def own_models(runs: Sequence[str], results: Path) -> dict[str, str]:
    """Of each run the model that is compared as `OWN_MODEL`, as metrics call it; nothing where all runs have the same.

    A run is that of the model whose name it has, or that `model.txt` in its folder notes.
    """
    own = {run: claims.plain(slug(noted_model(results / run) or run)) for run in runs}
    return own if len(set(own.values())) > 1 else {}


def run_verdicts(runs: Sequence[str], results: Path, ledger: claims.Ledger) -> pd.DataFrame:
    """The verdicts of each run by its own numbers (`claims.verdicts`), of the models that two or more runs have."""
    own = own_models(runs, results)
    found = pd.concat([claims.verdicts(results, ledger, run).assign(run=run) for run in runs], ignore_index=True)
    found["model"] = found.model.mask(found.model == found.run.map(own), OWN_MODEL)
    return found[found.groupby("model").run.transform("nunique") > 1]


def numbers(runs: Sequence[str], results: Path = RESULTS) -> pd.DataFrame:
    """The headline numbers of each run, rows as of `claims.metrics`, in the order of `runs`."""
    of, own = claims.metrics(results), own_models(runs, results)
    of = of[of.run.isin(runs)]
    prefix = [f"{own.get(run)}." for run in of.run]
    names = [f"{OWN_MODEL}.{name.removeprefix(model)}" if name.startswith(model) else name
             for name, model in zip(of.name, prefix, strict=True)]
    of = of.assign(name=names)
    return of.sort_values("run", key=lambda run: run.map(list(runs).index), kind="stable", ignore_index=True)


def beside(measured: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text, a row each that two or more runs have, a column a run; `apart`: two intervals do not meet."""
    keys = ["chapter", "name", "unit"]
    both = measured[measured.groupby(keys).run.transform("nunique") > 1].copy()
    both["text"] = [f"{report.shown(stats.Interval(r.value, r.low, r.high, 0 if np.isnan(r.n) else int(r.n)))}"
                    f"{'' if np.isnan(r.n) else f', n = {r.n:.0f}'}" for r in both.itertuples()]
    table = both.pivot_table(index=keys, columns="run", values="text", aggfunc="first", sort=False)
    ends = both.groupby(keys, sort=False)
    return table.assign(apart=ends.low.max() > ends.high.min()).reset_index().rename_axis(columns=None)


def figures(run: str, chapter: str) -> dict[str, str]:
    """The figures of a chapter as a run has them: label -> PNG in base64. None where it was not executed here."""
    page = RUNS / run / f"{chapter}.ipynb"
    page = NOTEBOOKS / page.name if run == DEFAULT_MODEL and not page.is_file() else page
    if not page.is_file():
        return {}
    labels = dict(re.findall(r"(?m)^```\{glue:figure\} (\S+)\n:name: *(\S+)", claims.prose(page)))
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    named = {output["metadata"].get("scrapbook", {}).get("name"): output["data"]["image/png"] for output in shown}
    return {label.removesuffix(f"--{run}"): "".join(named[name]) for name, label in labels.items() if name in named}


def _page(runs: Sequence[str], found: pd.DataFrame, measured: pd.DataFrame, ledger: claims.Ledger) -> str:
    title = html.escape(" · ".join(runs))
    parts = [f"<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{title}"
             f"</title><style>{_STYLE}</style><h1>{title}</h1><p>Verdicts follow from the ledger and from the numbers "
             "of each run alone; p is corrected by Holm over the claims judged in a model.</p>"]
    for model, of in found.groupby("model", sort=False):
        name = "each run's own model" if model == OWN_MODEL else model
        parts.append(f"<h2>Claims: {html.escape(name)}</h2><div class='wide'>{_claims(of, runs, ledger)}</div>")
    parts += ["<h2>Figures</h2>", *_figures(runs, ledger)]
    table = beside(measured)
    parts.append(f"<h2>Headline numbers</h2><details><summary>{len(table)} that two or more runs have; of "
                 f"{table.apart.sum()}, shaded, two 95 % intervals do not meet</summary>{_numbers(table)}</details>")
    return "\n".join(parts) + "\n"


def _claims(of: pd.DataFrame, runs: Sequence[str], ledger: claims.Ledger) -> str:
    cells, rows = of.set_index(["claim", "run"]), []
    for claim in ledger["claims"]:
        texts = [_verdict(cells.loc[(claim["id"], run)], claim) if (claim["id"], run) in cells.index else "–"
                 for run in runs]
        rows.append(f"<tr><td><a href='#{claim['figure']}'>{html.escape(claim['claim'])}</a><td>" + "<td>".join(texts))
    return f"<table><tr><th>claim<th>{'<th>'.join(map(html.escape, runs))}{''.join(rows)}</table>"


def _verdict(found: pd.Series, claim: Mapping[str, Any]) -> str:
    text = f"{pages.SYMBOLS[found.verdict]} {found.verdict}"
    if not np.isfinite(found.value):
        return text
    number = report.shown(stats.Interval(found.value, found.low, found.high, int(found.n)))
    p = "" if np.isnan(found.p_holm) else f", {html.escape(pages.p_phrase(found.p_holm))}"
    return f"<b>{text}</b><br>{number} {claim['unit']}<br>n = {found.n:.0f}{p}"


def _figures(runs: Sequence[str], ledger: claims.Ledger) -> list[str]:
    """The figures that claims name, each with what every run has of it."""
    of = {chapter: {run: figures(run, chapter) for run in runs}
          for chapter in dict.fromkeys(claim["chapter"] for claim in ledger["claims"])}
    parts = []
    for chapter, label in dict.fromkeys((claim["chapter"], claim["figure"]) for claim in ledger["claims"]):
        images = ""
        for run, found in of[chapter].items():
            image = "no executed page here has it"
            if label in found:
                image = f"<img alt='{label}' src='data:image/png;base64,{found[label]}'>"
            images += f"<figure><figcaption>{html.escape(run)}</figcaption>{image}</figure>"
        parts.append(f"<h3 id='{label}'>{chapter}: {label}</h3><div class='beside'>{images}</div>")
    return parts


def _numbers(table: pd.DataFrame) -> str:
    head = table.columns.drop("apart")
    rows = [f"<tr{' class=apart' if row.apart else ''}><td>" + "<td>".join(html.escape(str(row[c])) for c in head)
            for _, row in table.fillna("–").iterrows()]
    return f"<table><tr><th>{'<th>'.join(map(html.escape, head))}{''.join(rows)}</table>"
