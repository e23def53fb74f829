"""What methods did to right answers, side by side: every method, model and benchmark of all runs.

A *cell* is the change of right answers, in points, under one method in one model on one benchmark, against the same
model left as it is; of a trained method, against what its row names.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sinkstudy import paths, stats
from sinkstudy.book import chapter, claims, report
from sinkstudy.effects import methods

CELL = ["model", "method", "way", "benchmark"]
MEAN = "mean"
"""In place of a benchmark: the mean over all that a chapter has. It is no cell."""
OUTCOMES = ("better", "worse", "not clear", "no change", "not applicable", "not run")

METHODS_SHOWN = {
    "to the front": ("front", ""),
    "to the front, renumbered": ("front-renumber", ""),
    "features × ½": ("features", "weight 0.5"),
    "register": ("test-time-registers", "k 10"),
    "keys × 0": ("keys", "weight 0"),
    "left out": ("others-only", ""),
    "only the top quarter": ("keep-top-k", ""),
    "two connectors − one": ("two connectors", "against one connector"),
    "two connectors − random split": ("two connectors", "against two connectors, random split"),
    "soft router − one connector": ("soft router", "against one connector"),
    "gates − adapters": ("gates", "against adapters"),
}
"""The methods of the chapter's figure, in the words of `methods.short`, each a (method, way) of the tables. Beside it
stands "random-" and its name, the same with random tokens or neurons; the control of a trained method is part of its
row."""


def read(patterns: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The effects on right answers in all tables under the project's folder that have the columns.

    Returns:
        Rows with the columns `CELL`, `group`, `value`, `low`, `high`, `n`, `df` (of Student's intervals), `run` and
        `source` (chapter or "route"). Of a model that several runs measured, first its own run (the default model's are
        the full run, then the default run), then the full run, the default run, and the others by name; within a run
        first what has most pictures. And the tables that lack columns.

    Raises:
        ValueError: there is no table.
    """
    found, left_out = [], []
    for run, source, file in paths.written(*patterns, root=paths.ROOT):
        rows = _tidied(pd.read_csv(file, keep_default_na=False, na_values=[""]))  # a run may be called null
        if {*CELL, "group", "measure", "value", "low", "high", "n"} <= set(rows):
            found.append(rows[rows.measure == "right"].assign(run=run, source=source))
        else:
            left_out.append(f"{run}/{source}/{file.name}")
    if not found:
        raise ValueError(f"no table of effects is there ({', '.join(patterns)}): 'sinkstudy run --only 10' makes one")
    rows = pd.concat(found, ignore_index=True).fillna({"group": "", "way": ""})
    full, default = rows.run == paths.FULL, rows.run == paths.DEFAULT_MODEL
    own = rows.run.where(~full, paths.DEFAULT_MODEL) == rows.model.map(paths.slug)
    rows = rows.assign(df=rows.get("df", np.nan), rank=-3.0 * own - 2.0 * full - default, fewer=-rows.n)
    return rows.sort_values(["rank", "run", "source", "fewer"], kind="stable", ignore_index=True), left_out


def answered(patterns: Sequence[str], asked: Sequence[tuple[str, str]] = ()) -> pd.DataFrame:
    """What models answer right, untouched, by the tables that chapter 09 writes as `headline.csv`.

    Args:
        patterns: of the tables, under the project's folder.
        asked: (model, "lab" or "public"), which are shown if they were not run, too.

    Returns:
        A row a model and kind of data, a column a benchmark and measure, as text with interval and pictures. A control
        stands as it was scored beside its model, unless a run of its own is there; of several runs the first of
        `paths.written` counts.
    """
    tables = [pd.read_csv(file, keep_default_na=False, na_values=[""])
              for _, _, file in paths.written(*patterns, root=paths.ROOT)]
    found = pd.concat([pd.DataFrame(columns=["model", "role", "arm", "data", "benchmark", "measure"]), *tables])
    found = found[found.arm == "model"].sort_values("role", ascending=False, kind="stable")  # "model", then "control"
    found = found.drop_duplicates(["model", "data", "benchmark", "measure"])
    found["what"] = found.benchmark + ", " + found.measure.replace("accuracy", "right")
    found["text"] = [report.shown(stats.Interval(row.value, row.low, row.high, row.pictures), fmt)
                     + f"{of}, n = {row.pictures:.0f}"
                     for row in found.itertuples()
                     for fmt, of in [(".0f", f" of {row.most:.0f}") if row.most > 100 else (".1f", " %")]]
    table = found.pivot_table(index=["model", "data"], columns="what", values="text", aggfunc="first", sort=False)
    return table.reindex(table.index.union(list(asked), sort=False)).fillna("not run").rename_axis(None, axis=1)


def _tidied(rows: pd.DataFrame) -> pd.DataFrame:
    """A table in the columns of the chapters; `sinkstudy route` writes before, after and difference."""
    if "what" in rows:
        rows = rows[rows.what == "difference"].rename(columns={"pictures": "n"})
        given = zip(rows.option, rows.option_value, strict=True)
        rows = rows.assign(way=[f"{option} {value:g}" if pd.notna(option) else "" for option, value in given])
    if "data" in rows:
        rows = rows.assign(benchmark=rows.benchmark + np.where(rows.data == "public", " (public)", ""))
    return rows


def effect_cells(effects: pd.DataFrame) -> pd.DataFrame:
    """Every combination in `read`'s effects of a method, a model and a benchmark; of what several runs have, the first.

    Returns:
        `CELL`, the other columns of `effects`, `state` (of `OUTCOMES`, by the 95 % interval), and `p` and `p_holm`,
        that the effect is not 0, as in the ledger (`claims.p_value`), corrected over all cells.
    """
    chosen = effects[effects.benchmark != MEAN].drop_duplicates(CELL)
    methods = list(dict.fromkeys(zip(chosen.method, chosen.way, strict=True)))
    every = [(model, *what, benchmark) for what in methods for model in chosen.model.unique()
             for benchmark in chosen.benchmark.unique()]
    columns = [*CELL, "group", "value", "low", "high", "n", "df", "run", "source"]
    of = pd.DataFrame(every, columns=CELL).merge(chosen[columns], how="left", on=CELL)
    same = (of.low == 0) & (of.high == 0)
    sides = [of.run.isna(), of.value.isna(), of.low > 0, of.high < 0, same]
    of["state"] = np.select(sides, ["not run", "not applicable", "better", "worse", "no change"], "not clear")
    of["p"] = [claims.p_value(r.value, *claims.widen(r.low, r.high, r.n, "points"), {"above": 0}, r.df)
               for r in of.itertuples()]
    return of.assign(p_holm=stats.holm(of.p))


def by_model(of: pd.DataFrame) -> pd.DataFrame:
    """How many cells, of `effect_cells`, came out how in each model.

    Returns:
        A row a model: `model`, `tokens` (those that methods act on), a column for each of `OUTCOMES`, and "better,
        Holm" and "worse, Holm", the number that is so after correction.
    """
    counts = pd.crosstab(of.model, of.state).reindex(index=of.model.unique(), columns=OUTCOMES, fill_value=0)
    for at, state in ((1, "better"), (3, "worse")):
        counts.insert(at, f"{state}, Holm", sure(of, state).groupby(of.model).sum())
    tokens = of.dropna(subset="group").groupby("model").group
    counts.insert(0, "tokens", tokens.agg(lambda group: ", ".join(filter(None, dict.fromkeys(group))) or "–"))
    return counts.rename_axis(columns=None).reset_index()


def sure(of: pd.DataFrame, state: str) -> pd.Series:
    """Which cells are better, or worse, after correction too: bool."""
    return (of.state == state) & (of.p_holm <= claims.ALPHA)


def beside_controls(effects: pd.DataFrame) -> pd.DataFrame:
    """Of `read`'s effects `METHODS_SHOWN` and their controls: the mean over benchmarks where there is one, else each.

    Returns:
        Estimates with `model`, `label` (which names the benchmark, unless it is the mean), `which` ("itself" or
        "random") and `group`.
    """
    names = [(label, which, before + method, way) for label, (method, way) in METHODS_SHOWN.items()
             for which, before in (("itself", ""), ("random", "random-"))]
    names = pd.DataFrame(names, columns=["label", "which", "method", "way"])
    rows = names.merge(effects.drop_duplicates(CELL).dropna(subset="value"), on=["method", "way"])
    means = rows.benchmark == MEAN
    return rows[means] if means.any() else rows.assign(label=rows.label + ", " + rows.benchmark)


def named(of: pd.DataFrame) -> str:
    """Which methods, in which models: "keys × 2 in a and b; gates against adapters in c"."""
    parts = [f"{methods.short(*what)} in {chapter.listed(rows.model)}"
             for what, rows in of.groupby(["method", "way"], sort=False)]
    return "; ".join(parts) or "none"


def everywhere(of: pd.DataFrame) -> str:
    """The methods that cost something, on some benchmark, in each of the several models that they were run in."""
    ran = of[~of.state.isin(["not run", "not applicable"])]
    lost = ran.assign(lost=ran.state == "worse").groupby(["method", "way", "model"], sort=False).lost.any()
    lost = lost.groupby(["method", "way"], sort=False).agg(["size", "all"])
    lost = lost.index[(lost["size"] > 1) & lost["all"]]
    return chapter.listed(methods.short(*what) for what in lost)
