"""The parts of the book that follow from all runs: the verdicts, and the paper's numbers beside ours.

`engine.render` has them written as MyST Markdown before each rendering; `book/verdicts.md` and `book/paper.md` include
them. So the pages cannot fall behind `results/`, whichever run changed last.
"""

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from sinkstudy import claims, report, stats
from sinkstudy.paths import DATA, DEFAULT_MODEL, RUNS, atomic

PAPER = DATA / "paper"
COLUMNS = ("table", "row", "column", "value", "unit", "model", "source", "grade", "note")
SYMBOLS = dict(zip(claims.VERDICTS, "✓✗?–○", strict=True))
NBSP = "\N{NO-BREAK SPACE}"
STATES = {"holds": "✓", "fails": "✗", "unclear": "?", "not run": "○"}


def write(folder: Path) -> None:
    """Write all parts: `<name>.md` to be included, and `verdicts.csv` with a row for each claim and model.

    Raises:
        ValueError: the ledger or the paper's tables have a mistake, in one line.
    """
    ledger, numbers, tables = claims.load(), claims.metrics(), paper_tables()
    judged = claims.verdicts(ledger=ledger)
    parts = {
        "verdicts-summary": verdict_summary(ledger, judged),
        "verdicts-table": verdict_tables(ledger, judged),
        "verdicts-controls": control_table(ledger),
    }
    parts |= {f"paper-{table['table']}": paper_part(table, numbers, list(judged.model.unique())) for table in tables}
    for name, text in parts.items():
        with atomic(folder / f"{name}.md") as target:
            target.write_text(text + "\n", encoding="utf-8")
    with atomic(folder / "verdicts.csv") as target:
        judged.to_csv(target, index=False, float_format="%.6g")


# ---- verdicts


def verdict_summary(ledger: Mapping[str, list[dict]], judged: pd.DataFrame) -> str:
    """How many claims came out how: a sentence, and a table with a row for each model."""
    works = {claim["source"] for claim in ledger["claims"]}
    settled = judged[judged.verdict.isin(["supported", "contradicted", "inconclusive"])].claim.nunique()
    text = f"The ledger holds {len(ledger['claims'])} claims from {len(works)} work{'s' * (len(works) > 1)}. "
    text += f"In at least one model, {settled} {'was' if settled == 1 else 'were'} judged"
    both = judged.groupby("claim").verdict.agg(set)
    disputed = int(sum({"supported", "contradicted"} <= found for found in both))
    text += f"; {disputed or 'none'} came out both ways, supported in one model and contradicted in another.\n\n"
    counts = pd.crosstab(judged.model, judged.verdict).reindex(index=judged.model.unique(), columns=claims.VERDICTS)
    rows = [["model", *(_verdict(word) for word in claims.VERDICTS)]]
    rows += [[f"`{model}`", *(str(int(n)) for n in counts.loc[model].fillna(0))] for model in counts.index]
    return text + list_table(rows, "verdict-counts") if len(rows) > 1 else text + "No run has been made."


def verdict_tables(ledger: Mapping[str, list[dict]], judged: pd.DataFrame) -> str:
    """For each chapter a table: a row for each claim, a column for each model."""
    models, parts = list(judged.model.unique()), []
    cells = judged.set_index(["claim", "model"])
    for chapter in dict.fromkeys(claim["chapter"] for claim in ledger["claims"]):
        rows = [["claim", *(f"`{model}`" for model in models)]]
        for claim in ledger["claims"]:
            if claim["chapter"] == chapter:
                found = [cells.loc[(claim["id"], model)] for model in models]
                rows.append([_claim(claim), *(_cell(claim, cell) for cell in found)])
        title, line = _chapter(chapter)
        parts.append(f"### {title}\n\n{line}\n\n" + list_table(rows, "verdicts", [40] + [20] * len(models)))
    return "\n\n".join(parts)


def control_table(ledger: Mapping[str, list[dict]]) -> str:
    """What must hold if the instrument works, and whether it does."""
    states = claims.controls(ledger=ledger).set_index("control")
    rows = [["what must hold", "value", "state"]]
    for control in ledger["controls"]:
        found = states.loc[control["id"]]
        detail = f"`{control['metric']}` must be {_rule(control['holds'])}."
        detail += f"\n\n{_note(control)}" if "note" in control else ""
        value = f"{_interval(found)}\\\nn = {int(found.n)}" if found.state != "not run" else "–"
        state = f"[{STATES[found.state]} {found.state}]{{.verdict .v-{found.state.replace(' ', '-')}}}"
        rows.append([f"{control['rule']}\\\n{detail}", value, state])
    return list_table(rows, "verdicts", [60, 20, 20])


def _claim(claim: Mapping[str, Any]) -> str:
    """A claim with its source and, folded, how it is judged."""
    unit = claim["unit"]
    how = f"Supported if the whole 95 % interval is {_rule(claim['supported'], unit)}; contradicted if the whole"
    how += " interval is outside, on one side; else inconclusive. Both have to survive Holm's correction."
    written = "after its number was known" if claim.get("seen") else "before the run"
    facts = f"Metric <code>{html.escape(claim['metric'])}</code>. Source: {html.escape(claim['where'])}."
    folded = f"<details><summary>how it is judged</summary>{facts} {how} The rule was written {written}.</details>"
    note = f"\n\n{_note(claim)}" if "note" in claim else ""
    return f"{claim['claim']}\\\n{{cite:t}}`{claim['source']}` {_grade(claim['grade'])}{note}\n\n{folded}"


def _note(row: Mapping[str, Any]) -> str:
    """What has to be known beside a verdict, as it was written after the run."""
    return f"*After the run:* {' '.join(row['note'].split())}"


def _cell(claim: Mapping[str, Any], found: pd.Series) -> str:
    """The verdict on a claim in a model, linked to the figure that shows it, with the number behind it."""
    text = _verdict(found.verdict, figure(found.run, claim["chapter"], claim["figure"]))
    if np.isfinite(found.value):
        text += f"\\\n{_interval(found)}"
        p = found.p_holm
        sure = [] if np.isnan(p) else ["p < 0.001" if p < 0.001 else f"p = {p:.2g}"]
        text += "\\\n" + ", ".join(part.replace(" ", NBSP) for part in [f"n = {int(found.n)}", *sure])
    return text


def _verdict(word: str, label: str | None = None) -> str:
    text = f"{SYMBOLS[word]} {word}"
    return f"[{f'{{ref}}`{text} <{label}>`' if label else text}]{{.verdict .v-{word.replace(' ', '-')}}}"


def _rule(rule: Mapping[str, Any], unit: str = "") -> str:
    """A rule in words, "above 1.5 times"."""
    ((kind, bound),) = rule.items()
    bounds = " and ".join(f"{x:g}" for x in (bound if kind == "between" else [bound]))
    return f"{kind} {bounds} {unit}".replace("-", "−").strip()


def _chapter(chapter: str) -> tuple[str, str]:
    """The title of a chapter, and a line that leads to it where the default run has it."""
    page = RUNS / DEFAULT_MODEL / f"{chapter}.ipynb"
    if not page.is_file():
        return f"Chapter {chapter[:2]}", f"The book does not show the chapter `{chapter}`."
    title = re.search(r"(?m)^# (.+)$", claims.prose(page)).group(1)
    link = f"{{doc}}`The chapter </book/runs/{DEFAULT_MODEL}/{chapter}>`"
    return f"{chapter[:2]} {title}", f"{link} shows how it was measured."


def figure(run: str, chapter: str, label: str) -> str | None:
    """The label of a figure as the book has it for a run (`engine.execute`); None if the book does not show it."""
    page = RUNS / run / f"{chapter}.ipynb"
    label = label if run == DEFAULT_MODEL else f"{label}--{run}"
    return label if run and page.is_file() and label in claims.labels(page) else None


# ---- the paper's numbers


def paper_tables(folder: Path = PAPER) -> list[dict[str, Any]]:
    """Read and check the paper's numbers.

    Args:
        folder: with `tables.yml`, whose header explains it, and a CSV file for each table that it names.

    Returns:
        The tables in the order of the file: `table`, `title`, `rows` (a frame of text columns), `here` (each with
        label, chapter, figure, metric and unit) and `note`.

    Raises:
        ValueError: one line that names the table and what is wrong with it.
    """
    tables = yaml.safe_load((folder / "tables.yml").read_text(encoding="utf-8"))
    names = [table.get("table") for table in tables]
    files = {path.stem for path in folder.glob("*.csv")}
    if len(set(names)) < len(names) or set(names) != files:
        wrong = sorted(map(str, set(names) ^ files)) or ["a name is there twice"]
        raise ValueError(f"tables.yml and the CSV files do not match: {', '.join(wrong)}")
    ledger = {claim["id"]: claim for claim in claims.load()["claims"]}
    known = claims.bibliography()
    for table in tables:
        name = f"paper table {table['table']}"
        if set(table) - {"table", "title", "here", "note"} or not table.get("title"):
            raise ValueError(f"{name}: takes table, title, here and note, not {sorted(table)}")
        rows = pd.read_csv(folder / f"{table['table']}.csv", dtype=str, keep_default_na=False)
        if tuple(rows.columns) != COLUMNS or not len(rows):
            raise ValueError(f"{name}: needs the columns {', '.join(COLUMNS)}, and a row")
        if (rows.table != table["table"]).any() or (rows.row == "").any():
            raise ValueError(f"{name}: 'table' must be its name, and every line needs a 'row'")
        if bad := sorted(set(rows.grade) - set(claims.GRADES)) + sorted(set(rows.source) - known):
            raise ValueError(f"{name}: unknown grade or source: {', '.join(bad)}")
        if pd.to_numeric(rows.value, errors="coerce").isna().any():
            raise ValueError(f"{name}: a value is no number")
        if rows.duplicated(["row", "column", "model", "value"]).any():
            raise ValueError(f"{name}: the same number is there twice")
        table["rows"], table["note"] = rows, table.get("note", "")
        table["here"] = [_here(entry, ledger, name) for entry in table.get("here", [])]
    return tables


def _here(entry: Mapping[str, str], ledger: Mapping[str, dict], name: str) -> dict[str, str]:
    """A metric of this study with label, chapter, figure, metric and unit, filled up from the claim if it names one."""
    if "claim" in entry:
        if entry["claim"] not in ledger:
            raise ValueError(f"{name}: there is no claim '{entry['claim']}' in claims.yml")
        entry = {key: ledger[entry["claim"]][key] for key in ("chapter", "figure", "metric", "unit")} | dict(entry)
    missing = [key for key in ("label", "chapter", "figure", "metric", "unit") if not entry.get(key)]
    if missing:
        raise ValueError(f"{name}: an entry of 'here' lacks {', '.join(missing)}")
    return dict(entry)


def paper_part(table: Mapping[str, Any], numbers: pd.DataFrame, models: list[str]) -> str:
    """A table of published numbers and, under it, the metrics here that come nearest to it."""
    rows = table["rows"]
    sources = ", ".join(f"{{cite:t}}`{source}`" for source in rows.source.unique())
    several = rows.model.nunique() > 1
    about = "" if several or not rows.model[0] else f", on {rows.model[0]}"
    published = f"[Published]{{.whose .whose-paper}} **{table['title']}**{about}. {sources}\n\n"
    published += list_table(_published(rows, several), "published")
    own = "[Here]{.whose .whose-here} "
    own += table["note"].strip() or ("What comes nearest to it." if table["here"] else "Not run.")
    if table["here"]:
        lines = [["", *(f"`{model}`" for model in models)]]
        for entry in table["here"]:
            label = f"{entry['label']}, {entry['unit']}"
            lines.append([label, *(_own(entry, numbers, model) for model in models)])
        own += "\n\n" + list_table(lines, "here")
    return f"{published}\n\n{own}"


def _published(rows: pd.DataFrame, several: bool) -> list[list[str]]:
    """Lines of text of a published table: what, its numbers, grade, note."""
    columns = list(rows.column.unique())
    units = {column: set(rows.unit[rows.column == column]) for column in columns}
    shared = {column: next(iter(found)) if len(found) == 1 else None for column, found in units.items()}
    noted = (rows.note != "").any()
    plain = columns in (["value"], [""])
    names = ["published"] if plain else columns
    heads = [f"{name}, {shared[c]}" if shared[c] else name for name, c in zip(names, columns, strict=True)]
    lines = [["", *heads, "grade", *(["note"] if noted else [])]]
    for (model, row), group in rows.groupby(["model", "row"], sort=False):
        cells = []
        for column in columns:
            found = group[group.column == column]
            unit = "" if shared[column] is not None else "".join(found.unit.unique())
            cells.append(f"{', '.join(found.value)} {unit}".strip().replace("-", "−"))
        grades = " ".join(_grade(grade) for grade in sorted(set(group.grade)))
        notes = [". ".join(dict.fromkeys(note for note in group.note if note))] if noted else []
        lines.append([f"{model}: {row}" if several and model else row, *cells, grades, *notes])
    return lines


def _own(entry: Mapping[str, str], numbers: pd.DataFrame, model: str) -> str:
    """Our number for a metric and a model with its interval, linked to its figure; "not run" if there is none."""
    found = claims.look_up(numbers, entry["chapter"], entry["metric"], model)
    if found is None:
        return "not run"
    if not np.isfinite(found.value):
        return "not applicable"
    label = figure(found.run, entry["chapter"], entry["figure"])
    return f"{{ref}}`{_interval(found)} <{label}>`" if label else _interval(found)


# ---- shared by both


def _interval(row: pd.Series) -> str:
    digits = ".1f" if 9.5 <= abs(row.value) < 100 else None
    return report.shown(stats.Interval(row.value, row.low, row.high, 0), digits).replace(", ", f",{NBSP}")


def _grade(grade: str) -> str:
    return f"[{grade}]{{.grade .grade-{grade.lower()}}}"


def list_table(rows: Iterable[Iterable[str]], style: str, widths: list[int] | None = None) -> str:
    """A MyST list-table, whose cells may hold any Markdown; the first row is its head."""
    lines = ["```{list-table}", ":header-rows: 1", f":class: {style}"]
    lines += [f":widths: {' '.join(map(str, widths))}"] if widths else []
    for row in rows:
        for number, cell in enumerate(row):
            lines.append(("  - " if number else "* - ") + cell.replace("\n", "\n    "))
    return "\n".join([*lines, "```"])
