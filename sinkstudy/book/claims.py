"""The ledger of claims and the verdicts that follow from it.

`data/claims.yml` says what was claimed, which metric tests it here, which values agree and which effect is too small to
matter. A verdict is computed from the `metrics.json` files under `results/` and from nothing else.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pybtex.database
import scipy.stats
from numpy.typing import ArrayLike

from sinkstudy import stats
from sinkstudy.book.parameters import read_yaml
from sinkstudy.paths import BOOK, DATA, DEFAULT_MODEL, FULL, NOTEBOOKS, RESULTS, written

Ledger = Mapping[str, list[dict[str, Any]]]
LEDGER = DATA / "claims.yml"
JUDGED = ("supported", "right sign, below the bound", "no effect", "opposite sign", "inconclusive")
VERDICTS = (*JUDGED, "not applicable", "not run")
ALPHA = 0.05
"""Of the verdicts: largest p, after Holm's correction, with which an interval says anything but "inconclusive"."""

GRADES = ("A", "B", "C", "D")
_CLAIM = ("id", "claim", "source", "where", "grade", "chapter", "figure", "metric", "unit", "supported")
_CONTROL = ("id", "rule", "chapter", "metric", "holds")
_OPTIONAL = ("seen", "was", "note")  # a note was written after the run, and changes no verdict
_MEASURE = ("matters", "published", "matched", "built")  # of claims
_SHARES = ("%", "points")  # units in which one picture cannot move a mean of n by more than 100 / n


# ---- the ledger


def load(path: Path = LEDGER, *, notebooks: Path = NOTEBOOKS, references: Path = BOOK / "references.bib") -> Ledger:
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
    ledger = read_yaml(path)
    if not isinstance(ledger, dict) or sorted(ledger) != ["claims", "controls"]:
        raise ValueError(f"{path.name}: needs two lists, claims and controls")
    for kind, keys, rule in (("claims", _CLAIM, "supported"), ("controls", _CONTROL, "holds")):
        seen = set()
        for number, row in enumerate(ledger[kind], 1):
            name = f"{path.name}: {kind} {row.get('id', f'number {number}')}"
            missing = [key for key in keys if row.get(key) in (None, "")]
            unknown = sorted(set(row) - {*keys, *_OPTIONAL, *(_MEASURE if kind == "claims" else ())})
            if missing or unknown:
                raise ValueError(f"{name}: keys missing: {missing or 'none'}; unknown: {unknown or 'none'}")
            if row["id"] in seen:
                raise ValueError(f"{name}: the id is there twice")
            seen.add(row["id"])
            _region(row[rule], name)
            _check_chapter(row, name, notebooks)
            if "was" in row and not row.get("seen"):
                raise ValueError(f"{name}: a rule that was another before carries 'seen: true'")
    known = bibliography(references)
    for row in ledger["claims"]:
        name = f"{path.name}: claims {row['id']}"
        if row["source"] not in known:
            raise ValueError(f"{name}: source '{row['source']}' is not in {references.name}")
        if row["grade"] not in GRADES:
            raise ValueError(f"{name}: grade '{row['grade']}' is none of {', '.join(GRADES)}")
        if not row["metric"].startswith("{model}."):
            raise ValueError(f"{name}: the metric's name must begin with '{{model}}.'")
        if not isinstance(row.get("matched", {}), dict):
            raise ValueError(f"{name}: 'matched' maps models to names of metrics")
        if not isinstance(row.get("built", []), list):
            raise ValueError(f"{name}: 'built' lists models")
        _check_sizes(row, name)
    return ledger


def _check_sizes(claim: Mapping[str, Any], name: str) -> None:
    """What matters lies between no effect and the bound, and what was published lies among what agrees."""
    lower, upper = _region(claim["supported"])
    numbers = [claim[key] for key in ("matters", "published") if key in claim]
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and np.isfinite(x) for x in numbers):
        raise ValueError(f"{name}: 'matters' and 'published' are numbers")
    if "between" in claim["supported"]:
        if "matters" in claim:
            raise ValueError(f"{name}: in a range, the range itself says what matters: leave out 'matters'")
    else:
        if "matters" not in claim:
            raise ValueError(f"{name}: needs 'matters', the smallest effect that matters")
        least, most = nothing(claim)
        if not least < most or not (lower >= most or upper <= least):
            raise ValueError(f"{name}: 'matters' must lie between no effect and the bound of 'supported'")
    if "published" in claim and not lower < claim["published"] < upper:
        raise ValueError(f"{name}: 'published' must agree with the claim, {claim['supported']}")


def bibliography(path: Path = BOOK / "references.bib") -> set[str]:
    """The keys of a BibTeX file."""
    return set(pybtex.database.parse_file(path, "bibtex").entries)


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


# ---- one number against one claim


def nothing(claim: Mapping[str, Any]) -> tuple[float, float]:
    """The values too near to no effect to matter: within `matters` of 0, or for a ratio within that factor of 1."""
    size = claim["matters"]
    return (1 / size, size) if claim["unit"] == "times" else (-size, size)


def verdict_rules(claim: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Which values earn which word: by verdict a rule, {above: x}, {below: x} or {between: [x, y]}.

    Where two overlap, the first that holds a whole interval counts. A claim of a range says that there is no effect;
    so outside it there is one, on either side, and "opposite sign" has no rule here.
    """
    rule, found = claim["supported"], {"supported": claim["supported"]}
    if "between" in rule:
        return found
    least, most = nothing(claim)
    zero = 1 if claim["unit"] == "times" else 0
    up = "above" in rule
    bound = rule["above" if up else "below"]
    return found | {
        "no effect": {"between": [least, most]},
        "right sign, below the bound": {"between": sorted([zero, bound])},
        "opposite sign": {"below" if up else "above": zero},
    }


def word(low: float, high: float, claim: Mapping[str, Any]) -> str:
    """What a 95 % interval, NaN where there is none, says to a claim before any correction: one of `JUDGED`."""
    for verdict, rule in verdict_rules(claim).items():
        if agrees(low, high, rule):
            return verdict
    outside = "between" in claim["supported"] and agrees(low, high, claim["supported"]) is False
    return "opposite sign" if outside else "inconclusive"


def agrees(low: float, high: float, rule: Mapping[str, Any]) -> bool | None:
    """Whether a whole interval, NaN where there is none, agrees with {above: x}, {below: x} or {between: [x, y]}.

    False if it lies wholly on one side of what does, else None. Raises ValueError if the rule is none of these.
    """
    lower, upper = _region(rule)
    if lower < low and high < upper:
        return True
    return False if high < lower or low > upper else None


def symmetric(unit: str, low: float) -> Callable[[ArrayLike], np.ndarray]:
    """The scale on which an interval has equal halves: logarithms for a ratio ("times"), else the numbers as they are.

    An interval that reaches zero (`low`) is not one of `stats.ratio_interval`'s logarithms, and stays as it is.
    """
    return np.log if unit == "times" and low > 0 else np.asarray


def p_value(
    value: float, low: float, high: float, rule: Mapping[str, Any], df: float = np.inf, *, unit: str = ""
) -> float:
    """How surely an estimate lies on its side of a rule's bound: a p-value by the normal approximation, or by t.

    The half of the 95 % interval on the bound's side implies a standard error: with normal quantiles, z = (value −
    bound) / (half / 1.96). For `above` and `below` p is two-sided. For `between` it is the larger of two one-sided
    p-values if the value lies inside (equivalence; Schuirmann 1987), else that of the nearer bound, two-sided.

    Args:
        value, low, high: an estimate and its 95 % interval.
        rule: as in `agrees`, which says what is none.
        df: degrees of freedom behind the interval, if it is Student's; infinite or NaN: a bootstrap's, taken as normal.
        unit: of the estimate; with "times" all of this is done with logarithms (`symmetric`).

    Returns:
        p, 0–1; NaN where the interval is missing or has no width: then nothing says how sure it is.
    """
    lower, upper = _region(rule)
    if not np.isfinite([value, low, high]).all() or high <= low:
        return float("nan")
    bounds = [bound for bound in (lower, upper) if np.isfinite(bound)]
    if min(bounds) > 0:
        scale = symmetric(unit, low)
        value, low, high = scale([value, low, high])
        bounds = list(scale(bounds))

    def one_sided(bound: float) -> float:
        near, far = (value - low, high - value) if value > bound else (high - value, value - low)
        half = near if near > 0 else far  # a skewed interval may leave its estimate outside
        return float(stats.t_or_normal(df).sf(abs(value - bound) / stats.standard_error(half, df)))

    if len(bounds) == 2 and bounds[0] <= value <= bounds[1]:
        return max(map(one_sided, bounds))
    return 2 * one_sided(min(bounds, key=lambda bound: abs(value - bound)))


def pictures_needed(claim: Mapping[str, Any], interval: stats.Interval, df: float = np.inf) -> float:
    """How many pictures would support the claim with a chance of 80 %, if the effect is the published one.

    Args:
        interval: of this run; its width and `n` say how much pictures differ.
        df: as in `stats.images_needed`.

    Returns:
        A number of pictures, before Holm's correction; NaN if nothing was published in this unit, nothing varies, or
        seeds are too few.
    """
    if "published" not in claim:
        return float("nan")
    scale = symmetric(claim["unit"], interval.low)
    bounds = scale([bound for bound in _region(claim["supported"]) if np.isfinite(bound)])
    effect = np.abs(bounds - scale(claim["published"])).min()
    value, low, high = scale(interval[:3])
    return stats.images_needed(stats.Interval(value, low, high, interval.n), effect, df=df)


def widen(low: float, high: float, n: float, unit: str) -> tuple[float, float]:
    """The interval of a share or of a difference of shares; where no two pictures differ, the rule of three.

    A bootstrap of n equal values is a point, whatever n. If n of n pictures agree, up to 1 − 0.05^(1/n) ≈ 3/n of all
    may be otherwise, with 95 % confidence (`stats.rule_of_three`), and each can move the mean by 100 at most: in "%" or
    "points". In other units, which have no largest value, nothing changes. A mean over benchmarks comes widened, from
    `study.mean_of_benchmarks`, which knows how many pictures each has.
    """
    if low == high and unit in _SHARES and n >= 1:
        half = 100 * stats.rule_of_three(n)
        return low - half, high + half
    return low, high


# ---- all numbers against all rules


def metrics(results: Path = RESULTS) -> pd.DataFrame:
    """Every headline number under `results`: `run`, `chapter`, `name`, `value`, `low`, `high`, `n`, `unit`, `df`.

    The full run comes first, then the default run, then the others by name.

    Raises:
        ValueError: a file that is damaged, with its name.
    """
    rows = []
    for run, chapter, file in written("*/*/metrics.json", root=results):
        try:
            rows += [{"run": run, "chapter": chapter, **row} for row in json.loads(file.read_text(encoding="utf-8"))]
        except (ValueError, TypeError) as problem:
            raise ValueError(f"{file} is damaged ({problem}): execute its chapter again") from None
    table = pd.DataFrame(rows, columns=["run", "chapter", "name", "value", "low", "high", "n", "unit", "df"])
    return table.astype({"value": float, "low": float, "high": float, "n": float, "df": float})


def models(numbers: pd.DataFrame, patterns: Iterable[tuple[str, str]]) -> list[str]:
    """The models that any of the metrics speaks of, in the order of `numbers`, those with a run of their own first.

    `patterns` are (chapter, name of a metric with "{model}" for the model).
    """
    found = {}
    for chapter, pattern in patterns:
        before, after = pattern.split("{model}")
        names = numbers.name[numbers.chapter == chapter]
        names = names[names.str.startswith(before) & names.str.endswith(after)]
        found |= dict.fromkeys(name[len(before) : len(name) - len(after)] for name in names)
    # "a.minus.b" is no model where "a" is one
    named = [model for model in found if not any(model.startswith(f"{other}.") for other in found)]
    return sorted(named, key=lambda model: not (numbers.run.map(plain) == model).any())


def plain(run: str) -> str:
    """A run's name, of the full run its model's, as the names of metrics hold it: `report.key` writes small letters."""
    return re.sub(r"[^a-z0-9.-]+", "_", (DEFAULT_MODEL if run == FULL else run).lower())


def look_up(numbers: pd.DataFrame, chapter: str, pattern: str, model: str = "") -> pd.Series | None:
    """The number of a metric for a model: from the model's own run, else as a control, first of the full run.

    `pattern` is its name, "{model}" standing for the model; what comes is a row of `numbers`, None if no run has it.
    """
    rows = numbers[(numbers.chapter == chapter) & (numbers.name == pattern.replace("{model}", model))]
    own = rows[rows.run.map(plain) == model]
    return next((found.iloc[0] for found in (own, rows) if len(found)), None)


def verdicts(results: Path = RESULTS, ledger: Ledger | None = None, run: str = "") -> pd.DataFrame:
    """The verdict on every claim in every model.

    The word is that of `word`, if the p of its rule (`verdict_rules`, `p_value`), corrected by Holm over the claims
    judged in that model, is at most 0.05; else the claim is inconclusive. It is not applicable where the metric has no
    value (the model has no such tokens), not run where no run has the metric. For a model that the claim's `matched`
    names, the metric there counts, if the model has such tokens.

    Args:
        results: the folder of all runs.
        ledger: of `load`; read from `data/claims.yml` without it.
        run: by the numbers of this run alone; without it by those of all.

    Returns:
        A row for each claim and model: `claim` (id), `model`, `run` and `metric` (what was judged), `value`, `low`,
        `high`, `n`, `df`, `p`, `p_holm`, `verdict`, and `needed`, the pictures that `pictures_needed` asks for. Without
        any metric there is no model and no row.
    """
    rows, numbers, ledger = [], metrics(results), ledger or load()
    numbers = numbers[numbers.run == run] if run else numbers
    for model in models(numbers, [(claim["chapter"], claim["metric"]) for claim in ledger["claims"]]):
        for claim in ledger["claims"]:
            row = {"claim": claim["id"], "model": model, "run": "", "verdict": "not run"}
            found = judged_metric(numbers, claim, model)
            if found is not None:
                row |= found[["run", "value", "low", "high", "n", "df"]].to_dict() | {"metric": found["name"]}
                row["low"], row["high"] = widen(found.low, found.high, found.n, claim["unit"])
                row["verdict"] = "not applicable"
                if np.isfinite(found.value):
                    row |= _judged(claim, row)
            rows.append(row)
    columns = ["claim", "model", "run", "metric", "value", "low", "high", "n", "df", "p", "verdict", "needed"]
    table = pd.DataFrame(rows, columns=columns).astype({"p": float, "needed": float})
    table.insert(10, "p_holm", table.groupby("model").p.transform(stats.holm) if len(table) else table.p)
    table.loc[table.verdict.isin(JUDGED) & ~(table.p_holm <= ALPHA), "verdict"] = "inconclusive"
    return table


def judged_metric(numbers: pd.DataFrame, claim: Mapping[str, Any], model: str) -> pd.Series | None:
    """The row of `numbers` that a claim is judged by in a model: its matched metric, or `look_up` of its own."""
    found = look_up(numbers, claim["chapter"], claim["metric"], model)
    closer = claim.get("matched", {}).get(model)
    if closer is None or (found is not None and not np.isfinite(found.value)):
        return found
    return look_up(numbers, claim["chapter"], f"{{model}}.{closer}", model)


def _judged(claim: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Word, p and pictures needed. If the interval says nothing, p is that of the word that the estimate points to."""
    value, low, high, df = (row[key] for key in ("value", "low", "high", "df"))
    verdict, rules = word(low, high, claim), verdict_rules(claim)
    towards = next((rule for rule in rules.values() if agrees(value, value, rule)), claim["supported"])
    p = p_value(value, low, high, rules.get(verdict, towards), df, unit=claim["unit"])
    needed = pictures_needed(claim, stats.Interval(value, low, high, int(row["n"])), df)
    return {"verdict": verdict, "p": p, "needed": needed}


def controls(results: Path = RESULTS, ledger: Ledger | None = None) -> pd.DataFrame:
    """Whether what must hold, if the instrument works, does hold in the full run, or else in the default run.

    Returns:
        A row for each control: `control` (id), `value`, `low`, `high`, `n`, `state`: "holds" if the whole 95 %
        interval agrees, "fails" if it lies wholly on the other side, "unclear" if neither, else "not run". Where no
        two pictures differ, the interval is a point and counts as one.
    """
    rows, numbers, ledger = [], metrics(results), ledger or load()
    numbers = numbers[numbers.run.isin([FULL, DEFAULT_MODEL])]
    states = {True: "holds", False: "fails", None: "unclear"}
    for control in ledger["controls"]:
        row = {"control": control["id"], "state": "not run"}
        found = look_up(numbers, control["chapter"], control["metric"])
        if found is not None:
            row |= found[["value", "low", "high", "n"]].to_dict()
            row["state"] = states[agrees(found.low, found.high, control["holds"])]
        rows.append(row)
    return pd.DataFrame(rows, columns=["control", "value", "low", "high", "n", "state"])


# ---- the default run against the full run


def default_beside_full(results: Path = RESULTS, ledger: Ledger | None = None) -> pd.DataFrame:
    """The number of every claim and model in the default run beside that of the full run.

    Returns:
        A row for each that has a value in the default run, of the chapters that the full run has: `claim`, `model`,
        `value`, `low`, `high` (default run), `full` (NaN: it has no such number), `p` (`p_value`: how far the full
        run's number is from the default run's, in the latter's interval; NaN where that has no width), `p_holm` over
        all of them, and `outside` (of the interval).
    """
    ledger = ledger or load()
    keys, there = ["claim", "model"], {path.parent.name for path in results.glob(f"{FULL}/*/metrics.json")}
    chapters, units = ({claim["id"]: claim[key] for claim in ledger["claims"]} for key in ("chapter", "unit"))
    default, full = (verdicts(results, ledger, run) for run in (DEFAULT_MODEL, FULL))
    rows = default[np.isfinite(default.value.astype(float)) & default.claim.map(chapters).isin(there)]
    rows = rows.merge(full[[*keys, "value"]].rename(columns={"value": "full"}), how="left", on=keys)
    rows = rows[[*keys, "value", "low", "high", "df", "full"]].astype(dict.fromkeys(("full", "df"), float))
    rows["p"] = [p_value(r.value, r.low, r.high, {"above": r.full}, r.df, unit=units[r.claim])
                 if np.isfinite(r.full) else np.nan for r in rows.itertuples()]
    outside = (rows.low > rows.full) | (rows.full > rows.high)
    return rows.drop(columns="df").assign(p_holm=stats.holm(rows.p), outside=outside & rows.p.notna())


def disagreements(beside: pd.DataFrame) -> list[str]:
    """Why, by `default_beside_full`, the default run does not agree with the full run, a line each; none if it does.

    The default run's pictures are the first of the full run's, so its 95 % interval misses the full run's number less
    often than in one case of twenty: the difference of the two means has 1 - n/N of the variance of the default run's.
    The runs disagree if one number lies so far outside that it does not survive Holm's correction over all, which holds
    however they depend on one another; if more lie outside than a binomial of 5 % has with a chance of 5 % (numbers
    over the same pictures miss together, for which the first sentence leaves room); or if the full run lacks one.
    """
    named = [f"{r.claim} in {r.model}: {r.value:.3g} [{r.low:.3g}, {r.high:.3g}], in the full run {r.full:.3g}"
             for r in beside[(beside.p_holm <= ALPHA) | beside.full.isna()].itertuples()]
    n, outside = beside.p.notna().sum(), beside.outside.sum()
    if n and scipy.stats.binom.sf(outside - 1, n, 0.05) <= ALPHA:
        named.append(f"{outside} of {n} numbers of the full run lie outside the default run's interval")
    return named


def agreed(beside: pd.DataFrame) -> str:
    """How many numbers were compared (`default_beside_full`), and how many lie outside; a sentence."""
    if beside.empty:
        return "No full run has been made, so the default run has nothing to agree with."
    n, lacking = beside.p.notna().sum(), beside.p.isna().sum()
    without = f"; {lacking} have no interval there, or no number in the full run" if lacking else ""
    return (f"Of {n} numbers of the full run, {beside.outside.sum()} lie outside the default run's 95 % interval, "
            f"where chance would have at most about {0.05 * n:.2g}{without}.")
