"""The parts of the book that follow from all runs: results, verdicts, and the paper's numbers beside ours.

`render.book` has them written as MyST Markdown before each rendering; `book/intro.md`, `book/verdicts.md` and
`book/paper.md` include them. So the pages cannot fall behind `results/`, whichever run changed last.
"""

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sinkstudy import stats
from sinkstudy.book import claims, report
from sinkstudy.book.parameters import read_yaml
from sinkstudy.paths import DATA, DEFAULT_MODEL, FULL, POSITIVE_CONTROL, RUNS, atomic

PAPER, CONTROLS = DATA / "paper", DATA / "controls"
PAPER_COLUMNS = ("table", "row", "column", "value", "unit", "model", "source", "grade", "note")
SYMBOLS = dict(zip(claims.VERDICTS, "✓◐≈✗?–○", strict=True))
NBSP = "\N{NO-BREAK SPACE}"
HEADLINES = ("norm-draws-attention", "global-content", "sinks-used", "front-helps", "two-connectors-help")
"""Claims whose outcome the introduction gives, in `POSITIVE_CONTROL`."""
THEMES = {
    "Where attention goes": ("03-propagation", "04-relevance"),
    "What sinks hold": ("05-content",),
    "Whether answers depend on them": ("06-attribution", "07-ablation"),
    "Rules, neurons and dimensions": ("08-criteria",),
    "Moving and weighing, without training": ("10-training-free",),
    "Two connectors, routing and gates, trained": ("11-diysink",),
}
"""The chapters of a theme; every claim is in one."""
CONTROL_STATES = {"holds": "✓", "fails": "✗", "unclear": "?", "not run": "○"}


def write(folder: Path) -> None:
    """Write all parts: `<name>.md` to be included, and `verdicts.csv` with a row for each claim and model.

    Raises:
        ValueError: the ledger or the paper's tables have a mistake, in one line.
    """
    ledger, numbers, tables = claims.load(), claims.metrics(), paper_tables()
    judged = claims.verdicts(ledger=ledger)
    parts = {
        "intro-results": headlines(ledger, judged, numbers),
        "one-picture-numbers": five(ledger, judged),
        "one-picture-models": sinks_counted(numbers, judged.model.unique()),
        "numbers-from": numbers_from(judged),
        "verdicts-evidence": evidence(ledger, judged, numbers),
        "verdicts-summary": verdict_summary(ledger, judged),
        "verdicts-themes": themes(ledger, judged),
        "verdicts-matrix": matrix(ledger, judged),
        "verdicts-table": verdict_tables(ledger, judged),
        "verdicts-power": power_table(ledger, judged),
        "verdicts-controls": control_table(ledger),
        "verdicts-agreement": full_run_agreement(),
        "control-gates": control_gates(),
        "control-answers": control_answers(),
        "control-norms": control_norms(),
    }
    parts |= {f"paper-{table['table']}": paper_part(table, numbers, list(judged.model.unique())) for table in tables}
    for name, text in parts.items():
        with atomic(folder / f"{name}.md") as target:
            target.write_text(text + "\n", encoding="utf-8")
    with atomic(folder / "verdicts.csv") as target:
        judged.to_csv(target, index=False, float_format="%.6g")


# ---- the control whose sinks hold the gist


def control_gates() -> str:
    """A table of the gates (`lab.control`) as `sinkstudy lab gates` last wrote them."""
    rows = [["gate", "measured", "bound", ""]]
    for gate in pd.read_csv(CONTROLS / "gates.csv").itertuples():
        held = "holds" if gate.holds else "**missed**"
        measured, bound = f"{gate.value:{'.1f' if abs(gate.value) >= 9.5 else '.3g'}}", f"{gate.side} {gate.bound:g}"
        rows.append([gate.gate, measured.replace("-", "−"), bound.replace("-", "−"), held])
    return list_table(rows, "here")


def control_answers() -> str:
    """A table of what answers lose without sinks, by group of questions and model (`lab.control.use`)."""
    rows = [["model", "questions", "n", "right, %", "without calm patches", "without random tokens", "difference"]]
    answers = pd.read_csv(CONTROLS / "answers.csv")
    for r in answers[answers["of"].isin(("gist", "local"))].itertuples():
        found = _shown(r.by_sinks, r.low, r.high, ".1f")
        changes = (f"{value:.1f}".replace("-", "−") for value in (r.without, r.random))
        rows.append([f"`{r.model}`", r.of, str(r.questions), f"{r.untouched:.1f}", *changes, found])
    return list_table(rows, "here")


def control_norms() -> str:
    """A table of norm and content of the calm patches set apart (`lab.norms`), for questions about the gist."""
    rows = [["calm patches", "norm", "connector", "attention on them, times others", "right, %", "lost without them"]]
    holds = {"lab-llava-gist": "hold the gist", "lab-llava": "do not"}
    cells = pd.read_csv(CONTROLS / "norms.csv")
    for r in cells[cells.about == "gist"].itertuples():
        attention = _shown(r.attention, r.attention_low, r.attention_high, ".2f")
        lost = _shown(r.lost, r.low, r.high, ".1f")
        rows.append([f"{holds[r.model]} (`{r.model}`)", r.norm, r.connector, attention, f"{r.right:.1f}", lost])
    return list_table(rows, "here")


# ---- what came out, in sentences


def headlines(ledger: claims.Ledger, judged: pd.DataFrame, numbers: pd.DataFrame) -> str:
    """A list: how many sinks each model has, then each of `HEADLINES` with number, interval, n, verdict and link."""
    sinks = sinks_counted(numbers, judged.model.unique())
    lines = [f"- **Sinks in a picture, by the rule:** {sinks}."] if sinks else []
    lines += [f"- **{claim['claim']}** {_outcome(claim, found)}" for claim, found in _headlines(ledger, judged)]
    return "\n".join(lines) or "No run has been made."


def _headlines(ledger: claims.Ledger, judged: pd.DataFrame) -> list[tuple[dict, pd.Series]]:
    """Those of `HEADLINES` that are judged in `POSITIVE_CONTROL`, each with its verdict there."""
    cells = _by_claim(judged)
    return [(claim, cells.loc[cell]) for claim in ledger["claims"]
            if claim["id"] in HEADLINES and (cell := (claim["id"], POSITIVE_CONTROL)) in cells.index]


def sinks_counted(numbers: pd.DataFrame, models: Iterable[str]) -> str:
    """How many sinks a picture has in each model, by the rule of the first chapter, and how many lie on things."""
    parts = []
    for model in models:
        found = claims.look_up(numbers, "01-norms", "{model}.sinks_per_image.chosen", model)
        if found is not None and np.isfinite(found.value):
            share = on_things(numbers, model) if found.value else np.nan
            of = [f"{share:.0f} % of them on things"] if np.isfinite(share) else []
            of = ["there by construction", *of] if model == POSITIVE_CONTROL else of
            parts.append(f"`{model}` {_interval(found)}" + (f" ({', '.join(of)})" if of else ""))
    return "; ".join(parts)


def five(ledger: claims.Ledger, judged: pd.DataFrame) -> str:
    """A table of `HEADLINES`: claim, number with interval, n and model, verdict, chapter."""
    rows = [["claim of others", "measured here", "verdict", "chapter"]]
    for claim, found in _headlines(ledger, judged):
        number = f"`{POSITIVE_CONTROL}`"
        if np.isfinite(found.value):
            number = f"**{_interval(found)}** {claim['unit']}\\\nn{NBSP}={NBSP}{int(found.n)}, {number}"
        sure = f"\\\n{p_phrase(found.p_holm)} after correction" if np.isfinite(found.p_holm) else ""
        title = _chapter(claim["chapter"])[0]
        there = (RUNS / DEFAULT_MODEL / f"{claim['chapter']}.ipynb").is_file()
        link = f"{{doc}}`{title} </book/runs/{DEFAULT_MODEL}/{claim['chapter']}>`" if there else title
        rows.append([claim["claim"], number, f"{_of_claim(claim, found)}{sure}", link])
    return list_table(rows, "verdicts", [40, 25, 20, 15]) if len(rows) > 1 else "No run has been made."


def _outcome(claim: Mapping[str, Any], found: pd.Series) -> str:
    """Number, interval, n, verdict with its link, and how sure that is, in a line."""
    verdict = _of_claim(claim, found)
    if not np.isfinite(found.value):
        return f"{verdict}."
    matched = str(found.metric).endswith(tuple(f".{name}" for name in claim.get("matched", {}).values()))
    control = ", against the same patches in the matched model" if matched else ""
    number = f"{_interval(found)} {claim['unit']}, n = {int(found.n)}{control}".replace("n = ", f"n{NBSP}={NBSP}")
    sure = "not sure" if found.verdict == "inconclusive" else f"sure, {p_phrase(found.p_holm)} after correction"
    return f"{number}: {verdict}, {sure}{_untestable(claim, found, '; ')}."


def evidence(ledger: claims.Ledger, judged: pd.DataFrame, numbers: pd.DataFrame) -> str:
    """Whose tokens the verdicts speak of: how many judgements each model has, what its sinks are, what is built in."""
    counts = judged[judged.verdict.isin(claims.JUDGED)].model.value_counts(sort=False)
    if counts.empty:
        return "No run has been made."
    parts, natural = [], 0
    for model, n in counts.items():
        share = on_things(numbers, model)
        what = ", which has them by construction" if model == POSITIVE_CONTROL else ""
        if share > 50:
            what = f", where {share:.0f} % of what the rule takes for sinks lies on things and holds what is there"
        natural += 0 if what else n
        parts.append(f"{n} on `{model}`{what}")
    text = f"{counts.sum()} judgements of a claim in a model: {'; '.join(parts)}."
    by_id = {claim["id"]: claim for claim in ledger["claims"]}
    built = [_short(found.claim) for _, found in judged.iterrows() if _is_built(by_id[found.claim], found)]
    if built:
        text += (f" {len(built)} of those that are supported ({', '.join(built)}) hold because the model was made so: "
                 "they show that the instrument works.")
    lead = "**Nearly all evidence on sinks that lie on nothing comes from one model, which has them by construction.** "
    return (lead if POSITIVE_CONTROL in counts and natural <= counts.sum() / 5 else "") + text


def numbers_from(judged: pd.DataFrame) -> str:
    """Which of the lab's runs the numbers on a page are from: the full run where it has them, else the default run."""
    counts = judged.run[judged.value.notna()].value_counts()
    default, full = counts.get(DEFAULT_MODEL, 0), counts.get(FULL, 0)
    if not full:
        return ("*These numbers are those of the default run, which the chapters show. The full run, with four times "
                "the pictures (`make full`), has not been made.*")
    rest = f" {default} of {full + default} that it lacks are those of the default run." if default else ""
    return (f"*These numbers are those of the full run, which has about four times the pictures that the chapters show."
            f"{rest}*")


def full_run_agreement() -> str:
    """Whether the default run agrees with the full run (`claims.disagreements`)."""
    beside = claims.default_beside_full()
    wrong = "".join(f"\n- {line}" for line in claims.disagreements(beside))
    if beside.empty:
        return claims.agreed(beside)
    return f"**{'They disagree' if wrong else 'They agree'}.** {claims.agreed(beside)}\n{wrong}"


def on_things(numbers: pd.DataFrame, model: str) -> float:
    """The share of a model's sinks that lie on things, %; NaN where it was not measured."""
    found = claims.look_up(numbers, "04-relevance", "{model}.on_things.sinks", model)
    return float("nan") if found is None else float(found.value)


def themes(ledger: claims.Ledger, judged: pd.DataFrame) -> str:
    """A sentence for each theme: which claims came out how in each model, and how many did not."""
    lines = []
    for theme, of in _by_theme(ledger).items():
        own = judged[judged.claim.isin([claim["id"] for claim in of]) & judged.verdict.isin(claims.JUDGED)]
        models = []
        for model, rows in own.groupby("model", sort=False):
            words = []
            for word in claims.JUDGED:
                if names := [_short(name) for name in rows.claim[rows.verdict == word]]:
                    words.append(f"{len(names)} {word}" + (f" ({', '.join(names)})" if word != "inconclusive" else ""))
            models.append(f"`{model}` {', '.join(words)}")
        lines.append(f"- **{theme}:** {'; '.join(models) or 'not run'}.")
    return "\n".join(lines)


def _by_theme(ledger: claims.Ledger) -> dict[str, list[dict]]:
    """The claims of each theme that has any; a chapter that is in none stands for itself."""
    theme_of = {chapter: theme for theme, chapters in THEMES.items() for chapter in chapters}
    found: dict[str, list[dict]] = {theme: [] for theme in THEMES}
    for claim in ledger["claims"]:
        found.setdefault(theme_of.get(claim["chapter"], f"Chapter {claim['chapter'][:2]}"), []).append(claim)
    return {theme: of for theme, of in found.items() if of}


def _by_claim(judged: pd.DataFrame) -> pd.DataFrame:
    return judged.set_index(["claim", "model"], drop=False)


def _short(name: str) -> str:
    return name.replace("-", " ")


def matrix(ledger: claims.Ledger, judged: pd.DataFrame) -> str:
    """A row for each claim, a column for each model in which any was judged: the word, linked to its figure.

    Where a claim was not judged stands the sign alone, so that what was judged is seen.
    """
    of = judged[judged.verdict.isin(claims.JUDGED)].model
    models, cells = list(of.unique()), _by_claim(judged)
    if not models:
        return "No run has been made."
    rows = [["claim", *(f"`{model}`" for model in models)]]
    for theme, claimed in _by_theme(ledger).items():
        rows.append([f"**{theme}**", *("" for _ in models)])
        for claim in claimed:
            words = [cells.loc[(claim["id"], model)] for model in models]
            shown = [_of_claim(claim, w) if w.verdict in claims.JUDGED else SYMBOLS[w.verdict] for w in words]
            rows.append([f'<a href="#claim-{claim["id"]}">{_short(claim["id"])}</a>', *shown])
    return list_table(rows, "verdict-matrix", [34] + [18] * len(models))


# ---- verdicts, one by one


def verdict_summary(ledger: claims.Ledger, judged: pd.DataFrame) -> str:
    """How many claims came out how: a sentence, and a table with a row for each word."""
    works = {claim["source"] for claim in ledger["claims"]}
    settled = judged[judged.verdict.isin(claims.JUDGED)].claim.nunique()
    text = f"The ledger holds {len(ledger['claims'])} claims from {len(works)} work{'s' * (len(works) > 1)}. "
    text += f"In at least one model, {settled} {'was' if settled == 1 else 'were'} judged"
    both = judged.groupby("claim").verdict.agg(set)
    disputed = int(sum({"supported", "opposite sign"} <= found for found in both))
    text += f"; {disputed or 'none'} came out both ways, supported in one model and of opposite sign in another.\n\n"
    models = list(judged.model.unique())
    counts = pd.crosstab(judged.verdict, judged.model).reindex(index=claims.VERDICTS, columns=models, fill_value=0)
    rows = [["", *(f"`{model}`" for model in models)]]
    rows += [[_verdict(word), *(str(n) for n in counts.loc[word])] for word in claims.VERDICTS]
    return text + (list_table(rows, "verdict-counts") if models else "No run has been made.")


def verdict_tables(ledger: claims.Ledger, judged: pd.DataFrame) -> str:
    """For each chapter a table: a row for each claim, a column for each model in which any of them was judged."""
    parts, cells = [], _by_claim(judged)
    for chapter in dict.fromkeys(claim["chapter"] for claim in ledger["claims"]):
        of = [claim for claim in ledger["claims"] if claim["chapter"] == chapter]
        own = judged[judged.claim.isin([claim["id"] for claim in of])]
        models = list(own.model[own.verdict.isin(claims.JUDGED)].unique()) or list(judged.model.unique())
        rows = [["claim", *(f"`{model}`" for model in models)]]
        rows += [[_claim(claim), *(_cell(claim, cells.loc[(claim["id"], model)]) for model in models)] for claim in of]
        title, line = _chapter(chapter)
        parts.append(f"### {title}\n\n{line}\n\n" + list_table(rows, "verdicts", [40] + [20] * len(models)))
    return "\n\n".join(parts)


def power_table(ledger: claims.Ledger, judged: pd.DataFrame) -> str:
    """Of claims whose source gives its effect in the unit of the metric: how many pictures would show it, by model."""
    testable = judged[judged.needed.notna()]
    cells, models = testable.set_index(["claim", "model"]), list(testable.model.unique())
    rows = [["claim", "published", "bound", *(f"`{model}`" for model in models)]]
    for claim in ledger["claims"]:
        found = [cells.loc[(claim["id"], m)] if (claim["id"], m) in cells.index else None for m in models]
        if any(of is not None for of in found):
            published = f"{claim['published']:g} {claim['unit']}".replace("-", "−")
            powers = [_power(claim, of) for of in found]
            rows.append([_short(claim["id"]), published, _rule(claim["supported"]), *powers])
    return list_table(rows, "power") if len(rows) > 1 else "No run has been made."


def _power(claim: Mapping[str, Any], found: pd.Series | None) -> str:
    """Pictures needed, pictures here, standard deviation; "–" where nothing was measured."""
    if found is None:
        return "–"
    low, high = claims.symmetric(claim["unit"], found.low)([found.low, found.high])
    sd = stats.standard_error((high - low) / 2, found.df) * found.n**0.5
    needed = f"**{_round(found.needed)}**" if found.needed > found.n else _round(found.needed)
    return f"{needed}\\\n{int(found.n)} here, sd{NBSP}{sd:.2g}"


def _round(n: float) -> str:
    """A number of pictures to two digits, with thousands apart."""
    return f"{int(float(f'{n:.2g}')):,}"


def _untestable(claim: Mapping[str, Any], found: pd.Series, before: str) -> str:
    """Where the published effect could not have been seen: the number of pictures that it takes; or that it is out."""
    if found.verdict != "inconclusive" or "published" not in claim:
        return ""
    if found.low > claim["published"] or found.high < claim["published"]:
        return f"{before}the published {claim['published']:+g} lies outside".replace("-", "−")
    if np.isfinite(found.df) and np.isnan(found.needed):
        return f"{before}too few seeds to say what it would take"
    if not found.needed > found.n:
        return ""
    seeds = ", and as many times the seeds," if np.isfinite(found.df) else ""
    return f"{before}not testable here: n{NBSP}={NBSP}{_round(found.needed)}{seeds} would be needed"


def control_table(ledger: claims.Ledger) -> str:
    """What must hold if the instrument works, and whether it does."""
    states = claims.controls(ledger=ledger).set_index("control")
    by_state = {state: [_short(of) for of in states.index[states.state == state]] for state in CONTROL_STATES}
    held = f"{len(by_state.pop('holds'))} of {len(states)} hold."
    held += "".join(f" {state.capitalize()}: {', '.join(of)}." for state, of in by_state.items() if of)
    rows = [["what must hold", "value", "state"]]
    for control in ledger["controls"]:
        found = states.loc[control["id"]]
        detail = f"`{control['metric']}` must be {_rule(control['holds'])}."
        detail += f" {_written(control)}" if control.get("seen") else ""
        detail += f"\n\n{_note(control)}" if "note" in control else ""
        value = f"{_interval(found)}\\\nn = {int(found.n)}" if found.state != "not run" else "–"
        state = f"[{CONTROL_STATES[found.state]} {found.state}]{{.verdict .v-{found.state.replace(' ', '-')}}}"
        rows.append([f"{control['rule']}\\\n{detail}", value, state])
    return f"{held}\n\n" + list_table(rows, "verdicts", [60, 20, 20])


def _claim(claim: Mapping[str, Any]) -> str:
    """A claim with its source and, folded, how it is judged."""
    rules = claims.verdict_rules(claim).items()
    how = " ".join(f"{word.capitalize()}: {_rule(rule, claim['unit'])}." for word, rule in rules)
    how += " Opposite sign: outside, on one side." if "between" in claim["supported"] else ""
    facts = f"Metric <code>{html.escape(claim['metric'])}</code>. "
    for model, name in claim.get("matched", {}).items():
        closer = "against the same patches of a matched model or tokens of like place"
        facts += f"In {model}, {closer}: {html.escape(name)}. "
    facts += f"Source: {html.escape(claim['where'])}. "
    if "published" in claim:
        facts += f"Smallest published effect: {claim['published']:g} {claim['unit']}. ".replace("-", "−")
    folded = f"<details><summary>how it is judged</summary>{facts}{how} {_written(claim)}</details>"
    note = f"\n\n{_note(claim)}" if "note" in claim else ""
    name = f'<span id="claim-{claim["id"]}"></span>'
    return f"{name}{claim['claim']}\\\n{{cite:t}}`{claim['source']}` {_grade(claim['grade'])}{note}\n\n{folded}"


def _written(row: Mapping[str, Any]) -> str:
    """When a rule was written, and what it was before."""
    if not row.get("seen"):
        later = "; the smallest effect that matters was added after it" if "matters" in row else ""
        return f"The rule was written before the run{later}."
    before = f" Before: {row['was']}." if "was" in row else ""
    return f"The rule was {'changed' if before else 'written'} after its number was known.{html.escape(before)}"


def _note(row: Mapping[str, Any]) -> str:
    """What has to be known beside a verdict, as it was written after the run."""
    note = re.sub(r"(?<![\w.])-(?=\d)", "−", " ".join(row["note"].split()))
    return f"*After the run:* {note}"


def _cell(claim: Mapping[str, Any], found: pd.Series) -> str:
    """The verdict on a claim in a model, linked to the figure that shows it, with the number behind it."""
    text = _of_claim(claim, found)
    if np.isfinite(found.value):
        text += f"\\\n{_interval(found)}"
        sure = [] if np.isnan(found.p_holm) else [p_phrase(found.p_holm)]
        text += "\\\n" + ", ".join(part.replace(" ", NBSP) for part in [f"n = {int(found.n)}", *sure])
        text += _untestable(claim, found, "\\\n")
    return text


def p_phrase(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _verdict(word: str, label: str | None = None) -> str:
    text, style = f"{SYMBOLS[word]} {word}", "-".join(re.findall("[a-z]+", word))
    return f"[{f'{{ref}}`{text} <{label}>`' if label else text}]{{.verdict .v-{style}}}"


def _of_claim(claim: Mapping[str, Any], found: pd.Series) -> str:
    """The verdict on a claim in a model, linked to its figure, and whether the model was made so that it holds."""
    built = " (built in)" if _is_built(claim, found) else ""
    return _verdict(found.verdict, figure(found.run, claim["chapter"], claim["figure"])) + built


def _is_built(claim: Mapping[str, Any], found: pd.Series) -> bool:
    """Does a claim hold in a model because the model was made so? Then it tests the instrument."""
    return found.verdict == "supported" and found.model in claim.get("built", ())


def _rule(rule: Mapping[str, Any], unit: str = "") -> str:
    """A rule in words, "above 1.5 times"."""
    ((kind, bound),) = rule.items()
    bounds = " and ".join(f"{x:.3g}" for x in (bound if kind == "between" else [bound]))
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
    """The label of a figure as the book has it for a run (`render.book`); None if the book does not show it."""
    if run == FULL and not (RUNS / run / f"{chapter}.ipynb").is_file():
        run = DEFAULT_MODEL  # the full run's numbers are in git, its pages are not
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
    tables = read_yaml(folder / "tables.yml")
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
        if tuple(rows.columns) != PAPER_COLUMNS or not len(rows):
            raise ValueError(f"{name}: needs the columns {', '.join(PAPER_COLUMNS)}, and a row")
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
    return _shown(row.value, row.low, row.high, ".1f" if 9.5 <= abs(row.value) < 100 else None)


def _shown(value: float, low: float, high: float, fmt: str | None) -> str:
    """`report.shown` in one piece, which is not broken across lines."""
    return report.shown(stats.Interval(value, low, high, 0), fmt).replace(", ", f",{NBSP}")


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
