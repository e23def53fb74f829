"""The ledger of claims and the verdicts that follow from it.

`data/claims.yml` says what was claimed, which metric tests it here and which values agree. A verdict is computed from
the `metrics.json` files under `results/` and from nothing else.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import yaml

from sinkstudy import stats
from sinkstudy.paths import BOOK, DATA, DEFAULT_MODEL, NOTEBOOKS, RESULTS

LEDGER = DATA / "claims.yml"
VERDICTS = ("supported", "contradicted", "inconclusive", "not applicable", "not run")
LEVEL = 0.05
"""Of the verdicts: largest p, after Holm's correction, that supports or contradicts a claim."""

GRADES = ("A", "B", "C", "D")
_CLAIM = ("id", "claim", "source", "where", "grade", "chapter", "figure", "metric", "unit", "supported")
_CONTROL = ("id", "rule", "chapter", "metric", "holds")
_OPTIONAL = ("seen", "note")  # a note was written after the run, and changes no verdict
_SHARES = ("%", "points")  # units in which one picture cannot move a mean of n by more than 100 / n
_Z = float(scipy.stats.norm.ppf(0.975))


# ---- the ledger


def load(
    path: Path = LEDGER, *, notebooks: Path = NOTEBOOKS, references: Path = BOOK / "references.bib"
) -> dict[str, list[dict[str, Any]]]:
    """Read and check the ledger.

    Args:
        path: of the ledger; its header explains it.
        notebooks: folder of the chapters. Once a notebook is there, it must have the figures that claims name.
        references: bibliography that must hold every source.

    Returns:
        `claims` and `controls`, each a list of rows in the order of the file.

    Raises:
        ValueError: one line that names the row and what is wrong with it.
    """
    ledger = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(ledger, dict) or sorted(ledger) != ["claims", "controls"]:
        raise ValueError(f"{path.name}: needs two lists, claims and controls")
    for kind, keys, rule in (("claims", _CLAIM, "supported"), ("controls", _CONTROL, "holds")):
        seen = set()
        for number, row in enumerate(ledger[kind], 1):
            name = f"{path.name}: {kind} {row.get('id', f'number {number}')}"
            missing = [key for key in keys if row.get(key) in (None, "")]
            unknown = sorted(set(row) - {*keys, *_OPTIONAL})
            if missing or unknown:
                raise ValueError(f"{name}: keys missing: {missing or 'none'}; unknown: {unknown or 'none'}")
            if row["id"] in seen:
                raise ValueError(f"{name}: the id is there twice")
            seen.add(row["id"])
            _region(row[rule], name)
            _check_chapter(row, name, notebooks)
    known = bibliography(references)
    for row in ledger["claims"]:
        name = f"{path.name}: claims {row['id']}"
        if row["source"] not in known:
            raise ValueError(f"{name}: source '{row['source']}' is not in {references.name}")
        if row["grade"] not in GRADES:
            raise ValueError(f"{name}: grade '{row['grade']}' is none of {', '.join(GRADES)}")
        if not row["metric"].startswith("{model}."):
            raise ValueError(f"{name}: the metric's name must begin with '{{model}}.'")
    return ledger


def bibliography(path: Path = BOOK / "references.bib") -> set[str]:
    """The keys of a BibTeX file."""
    return set(re.findall(r"(?m)^@\w+\{([^,\s]+),", path.read_text(encoding="utf-8")))


def prose(notebook: Path) -> str:
    """The Markdown of a notebook."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def labels(notebook: Path) -> set[str]:
    """The labels of the figures of a notebook."""
    return set(re.findall(r"(?m)^:name: *(\S+)", prose(notebook)))


def _check_chapter(row: Mapping[str, Any], name: str, notebooks: Path) -> None:
    """Chapters are called NN-name, as their notebooks will be; those that are there have the figure."""
    chapter = row["chapter"]
    if not re.fullmatch(r"\d\d-[a-z-]+", chapter):
        raise ValueError(f"{name}: '{chapter}' is no chapter; they are called like '03-propagation'")
    path = notebooks / f"{chapter}.ipynb"
    if path.is_file():
        if "figure" in row and row["figure"] not in labels(path):
            raise ValueError(f"{name}: there is no figure '{row['figure']}' in {path.name}")
    elif others := [other.stem for other in notebooks.glob(f"{chapter[:2]}-*.ipynb")]:
        raise ValueError(f"{name}: there is no chapter '{chapter}', but '{others[0]}'")


def _region(rule: Any, name: str = "rule") -> tuple[float, float]:
    """The ends of the values that agree with a rule, above: x | below: x | between: [x, y]. Raises ValueError."""
    problem = ValueError(f"{name}: needs one of above: x, below: x, between: [x, y] with numbers x < y, not {rule}")
    if not isinstance(rule, Mapping) or len(rule) != 1:
        raise problem
    ((kind, bound),) = rule.items()
    bounds = bound if kind == "between" and isinstance(bound, list) else [bound]
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and np.isfinite(x) for x in bounds):
        raise problem
    if kind == "between" and len(bounds) == 2 and bounds[0] < bounds[1]:
        return bounds[0], bounds[1]
    if kind in ("above", "below") and len(bounds) == 1:
        return (bounds[0], np.inf) if kind == "above" else (-np.inf, bounds[0])
    raise problem


# ---- one number against one rule


def side(low: float, high: float, rule: Mapping[str, Any]) -> str:
    """What a 95 % interval says to a rule, before any correction for the number of claims.

    Args:
        low, high: the interval; NaN where there is none.
        rule: {above: x}, {below: x} or {between: [x, y]}, the values that agree with a claim.

    Returns:
        "supported" if the whole interval agrees, "contradicted" if it lies wholly on one side of what agrees, else
        "inconclusive".

    Raises:
        ValueError: no such rule.
    """
    lower, upper = _region(rule)
    if lower < low and high < upper:
        return "supported"
    return "contradicted" if high < lower or low > upper else "inconclusive"


def p_value(value: float, low: float, high: float, rule: Mapping[str, Any]) -> float:
    """How surely an estimate lies on its side of a rule's bound: a p-value by the normal approximation.

    The half of the 95 % interval on the bound's side implies a standard error: z = (value − bound) / (half / 1.96).
    For `above` and `below` p is two-sided. For `between` it is the larger of two one-sided p-values if the value lies
    inside (equivalence; Schuirmann 1987), else that of the nearer bound, two-sided.

    Args:
        value, low, high: an estimate and its 95 % interval.
        rule: as in `side`.

    Returns:
        p, 0–1; NaN where the interval is missing or has no width: then nothing says how sure it is.

    Raises:
        ValueError: no such rule.
    """
    lower, upper = _region(rule)
    if not np.isfinite([value, low, high]).all() or high <= low:
        return float("nan")

    def one_sided(bound: float) -> float:
        near, far = (value - low, high - value) if value > bound else (high - value, value - low)
        half = near if near > 0 else far  # a skewed interval may leave its estimate outside
        return float(scipy.stats.norm.sf(abs(value - bound) / (half / _Z)))

    bounds = [bound for bound in (lower, upper) if np.isfinite(bound)]
    if len(bounds) == 2 and lower <= value <= upper:
        return max(map(one_sided, bounds))
    return 2 * one_sided(min(bounds, key=lambda bound: abs(value - bound)))


def widen(low: float, high: float, n: float, unit: str) -> tuple[float, float]:
    """The interval of a share or of a difference of shares; where no two pictures differ, the rule of three.

    A bootstrap of n equal values is a point, whatever n. If n of n pictures agree, up to 1 − 0.05^(1/n) ≈ 3/n of all
    may be otherwise, with 95 % confidence (Hanley & Lippman-Hand 1983), and each can move the mean by 100 at most.

    Args:
        low, high: in `unit`.
        n: the number of pictures.
        unit: "%" or "points"; in other units, which have no largest value, nothing changes.

    Returns:
        low, high.
    """
    if low == high and unit in _SHARES and n >= 1:
        half = 100 * (1 - 0.05 ** (1 / n))
        return low - half, high + half
    return low, high


# ---- all numbers against all rules


def metrics(results: Path = RESULTS) -> pd.DataFrame:
    """Every headline number under `results`: `run`, `chapter`, `name`, `value`, `low`, `high`, `n`, `unit`.

    The default run comes first, then the others by name.
    """
    files = sorted(results.glob("*/*/metrics.json"), key=lambda f: (f.parts[-3] != DEFAULT_MODEL, f.parts[-3:]))
    rows = [
        {"run": file.parts[-3], "chapter": file.parts[-2], **row}
        for file in files
        for row in json.loads(file.read_text(encoding="utf-8"))
    ]
    table = pd.DataFrame(rows, columns=["run", "chapter", "name", "value", "low", "high", "n", "unit"])
    return table.astype({"value": float, "low": float, "high": float, "n": float})


def models(numbers: pd.DataFrame, patterns: Iterable[tuple[str, str]]) -> list[str]:
    """The models that any of the metrics speaks of, in the order of `numbers`, those with a run of their own first.

    Args:
        numbers: of `metrics`.
        patterns: (chapter, name of a metric with "{model}" for the model).
    """
    found = {}
    for chapter, pattern in patterns:
        before, after = pattern.split("{model}")
        names = numbers.name[numbers.chapter == chapter]
        names = names[names.str.startswith(before) & names.str.endswith(after)]
        found |= dict.fromkeys(name[len(before) : len(name) - len(after)] for name in names)
    # "a.minus.b" is no model where "a" is one
    found = [model for model in found if not any(model.startswith(f"{other}.") for other in found)]
    return sorted(found, key=lambda model: not (numbers.run.map(_plain) == model).any())


def _plain(run: str) -> str:
    """A run's name as the names of metrics hold it: `report.key` writes small letters."""
    return re.sub(r"[^a-z0-9.-]+", "_", run.lower())


def look_up(numbers: pd.DataFrame, chapter: str, pattern: str, model: str = "") -> pd.Series | None:
    """The number of a metric for a model: from the model's own run, else as a control, first of the default run.

    Args:
        numbers: of `metrics`.
        chapter: the notebook that wrote it.
        pattern: its name, "{model}" standing for the model.
        model: as `models` gives it.

    Returns:
        A row of `numbers`; None if no run has it.
    """
    rows = numbers[(numbers.chapter == chapter) & (numbers.name == pattern.replace("{model}", model))]
    own = rows[rows.run.map(_plain) == model]
    return next((found.iloc[0] for found in (own, rows) if len(found)), None)


def verdicts(results: Path = RESULTS, ledger: Mapping[str, list[dict[str, Any]]] | None = None) -> pd.DataFrame:
    """The verdict on every claim in every model.

    A claim is supported or contradicted in a model if the whole 95 % interval says so and p, corrected by Holm over the
    claims judged in that model, is at most 0.05 (`side`, `p_value`, `widen`, `stats.holm`). It is not applicable where
    the metric has no value (the model has no such tokens), not run where no run has the metric, else inconclusive.

    Args:
        results: the folder of all runs.
        ledger: of `load`; read from `data/claims.yml` without it.

    Returns:
        A row for each claim and model: `claim` (id), `model`, `run` (whose metric it is), `value`, `low`, `high`, `n`,
        `p`, `p_holm`, `verdict`. Without any metric there is no model and no row.
    """
    rows, numbers, ledger = [], metrics(results), ledger or load()
    for model in models(numbers, [(claim["chapter"], claim["metric"]) for claim in ledger["claims"]]):
        for claim in ledger["claims"]:
            row = {"claim": claim["id"], "model": model, "run": "", "p": np.nan, "verdict": "not run"}
            found = look_up(numbers, claim["chapter"], claim["metric"], model)
            if found is not None:
                row |= found[["run", "value", "low", "high", "n"]].to_dict()
                row["low"], row["high"] = widen(found.low, found.high, found.n, claim["unit"])
                row["verdict"] = "not applicable"
                if np.isfinite(found.value):
                    row["verdict"] = side(row["low"], row["high"], claim["supported"])
                    row["p"] = p_value(found.value, row["low"], row["high"], claim["supported"])
            rows.append(row)
    columns = ["claim", "model", "run", "value", "low", "high", "n", "p", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(8, "p_holm", table.groupby("model").p.transform(stats.holm) if len(table) else table.p)
    unsure = table.verdict.isin(["supported", "contradicted"]) & ~(table.p_holm <= LEVEL)
    table.loc[unsure, "verdict"] = "inconclusive"
    return table


def controls(results: Path = RESULTS, ledger: Mapping[str, list[dict[str, Any]]] | None = None) -> pd.DataFrame:
    """Whether what must hold, if the instrument works, does hold in the default run.

    Args:
        results, ledger: as in `verdicts`.

    Returns:
        A row for each control: `control` (id), `value`, `low`, `high`, `n`, `state`: "holds" if the whole 95 %
        interval agrees, "fails" if it lies wholly on the other side, "unclear" if neither, else "not run". Where no
        two pictures differ, the interval is a point and counts as one.
    """
    rows, numbers, ledger = [], metrics(results), ledger or load()
    numbers = numbers[numbers.run == DEFAULT_MODEL]
    states = {"supported": "holds", "contradicted": "fails", "inconclusive": "unclear"}
    for control in ledger["controls"]:
        row = {"control": control["id"], "state": "not run"}
        found = look_up(numbers, control["chapter"], control["metric"])
        if found is not None:
            row |= found[["value", "low", "high", "n"]].to_dict()
            row["state"] = states[side(found.low, found.high, control["holds"])]
        rows.append(row)
    return pd.DataFrame(rows, columns=["control", "value", "low", "high", "n", "state"])
