"""From a chapter's observations to what its reader meets: estimates, tables of text, sentences and figures.

Observations are one long tidy table, a row a measured value, with columns that say what was measured (model, image_id,
group, way, type of question, ..). `estimates` turns them into means with intervals over images, `paired` into
differences to a control on the same questions. Everything else takes estimates: rows with `value`, `low`, `high` and
`n` beside the columns that name them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from sinkstudy import stats
from sinkstudy.book import report

BLUE, ORANGE, GREEN, PINK, RED = report.PALETTE
GROUP_COLOURS = {"sinks": RED, "top 2 %": ORANGE, "calm": GREEN, "calm patches": GREEN, "things": BLUE,
                 "random": report.INK, "next in norm": PINK, "others": report.INK, "all": report.INK,
                 "blind": report.INK}
"""The colour of each group of tokens, the same in every chapter."""

MODEL_COLOURS = {"lab-llava": "#5661c9", "lab-llava-gist": "#6f8f1a", "lab-llava-registers": "#2b8f8a",
                 "lab-qwen2vl": "#8d6a1f", "lab-llava-sinks": "#93459c"}
"""The colour of each lab model where models share a panel; none is that of a group."""


def colour(name: str, among: Sequence[str] = ()) -> str:
    """The colour of a group or model. Models that are not the lab's take the free ones, in the order of `among`."""
    known = GROUP_COLOURS | MODEL_COLOURS
    if name in known:
        return known[name]
    free = [of for model, of in MODEL_COLOURS.items() if model not in among]
    others = [model for model in among if model not in known]
    return free[others.index(name) % len(free)] if name in others and free else report.INK


def estimates(
    observations: pd.DataFrame,
    by: Sequence[str],
    value: str = "value",
    *,
    over: str | None = None,
    images: str = "image_id",
    strata: str | None = None,
    least: int = 1,
    method: str = "BCa",
    seed: int = 0,
) -> pd.DataFrame:
    """Mean of a column in each cell, with its 95 % bootstrap interval that draws whole images.

    Args:
        observations: a row a value; rows in which it, or what it is divided by, is not finite are left out.
        by: columns that name a cell. Cells stand in the order of their first row.
        over: a column that says of how much `value` is a part, as in `stats.mean_interval`; a cell where that is
            nothing has no estimate, and `n` 0.
        images: the column that says which rows belong together.
        strata: a column, say the benchmark, within whose values images are drawn; see `stats.mean_interval`.
        least: cells that fewer images have get no estimate, and `n` 0.
        method, seed: of the bootstrap.

    Returns:
        `by`, `value` (in the unit of the column), `low`, `high`, `n` (images).
    """
    def mean(there: pd.DataFrame) -> stats.Interval:
        whole = None if over is None else there[over].to_numpy(float)
        if there[images].nunique() < least or (whole is not None and whole.sum() <= 0):
            return stats.NOTHING
        within = None if strata is None else there[strata].to_numpy()
        return stats.mean_interval(there[value].to_numpy(float), over=whole, clusters=there[images].to_numpy(),
                                   strata=within, method=method, seed=seed)

    return _each(observations, by, [value] if over is None else [value, over], mean)


def ratios(observations: pd.DataFrame, by: Sequence[str], above: str = "inside", below: str = "outside", *,
           images: str = "image") -> pd.DataFrame:
    """How many times the mean of one column is that of another, named as in tables of `analyses`, in each cell.

    Args:
        observations, by, images: as in `estimates`.
        above, below: the columns. A cell where `below` is nothing has no estimate, and `n` 0.

    Returns:
        As `estimates`; the intervals are those of `stats.ratio_interval`.
    """
    def ratio(there: pd.DataFrame) -> stats.Interval:
        if there[below].sum() <= 0:
            return stats.NOTHING
        return stats.ratio_interval(there[above], there[below], clusters=there[images].to_numpy())

    return _each(observations, by, [above, below], ratio)


def _each(
    observations: pd.DataFrame, by: Sequence[str], known: list[str], interval: Callable[[pd.DataFrame], stats.Interval]
) -> pd.DataFrame:
    """The interval of each cell's rows whose `known` columns are finite, as a table of estimates."""
    rows = []
    for cell, of in observations.groupby(list(by), sort=False, observed=True):
        rows.append((*cell, *interval(of[np.isfinite(of[known].astype(float)).all(axis=1)])))
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n"])


def paired(
    observations: pd.DataFrame, on: Sequence[str], which: str, own: str, control: str, value: str = "value"
) -> pd.DataFrame:
    """Differences between two ways on the same rows: the mean of `own` less the mean of `control`.

    Args:
        on: columns that name what is paired, the image among them (model, image_id, question, ..). Several rows of
            one way, such as draws of random tokens, are averaged first.
        which: the column that says `own` or `control`.

    Returns:
        `on` and the difference in the column `value`, for what has both, in the order of the first rows of `own`.
    """
    mean = {way: observations[observations[which] == way].groupby(list(on), sort=False)[value].mean()
            for way in (own, control)}
    return (mean[own] - mean[control].reindex(mean[own].index)).dropna().reset_index(name=value)


def one(rows: pd.DataFrame, **where: Any) -> stats.Interval:
    """The only estimate for which columns have these values; one without value and `n` 0 if there is none.

    Raises:
        ValueError: there are several.
    """
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    if len(rows) > 1:
        raise ValueError(f"{len(rows)} estimates for {where}")
    return stats.Interval(*rows[["value", "low", "high", "n"]].iloc[0]) if len(rows) else stats.NOTHING


def keep(results: report.Results, rows: pd.DataFrame, name: str, unit: str | Mapping[str, str] = "") -> None:
    """Every estimate becomes a metric.

    Args:
        name: with the columns of a row in braces, "{model}.{way}.{group}.accuracy"; see `report.key`.
        unit: of all rows, or by the row's `measure`.
    """
    for row in rows.to_dict("records"):
        of = unit if isinstance(unit, str) else unit[row["measure"]]
        filled = name.format(**{column: report.key(str(of)) for column, of in row.items()})
        results.metric(filled, row["value"], row["low"], row["high"], row["n"], unit=of)


def text_table(rows: pd.DataFrame, index: str | Sequence[str], columns: str, fmt: str | None = None) -> pd.DataFrame:
    """Estimates as a table of text, "2.86 [2.70, 3.03]"; a dash where there is none. Order as in `rows`."""
    index = [index] if isinstance(index, str) else list(index)
    text = [report.shown(_interval(row), fmt) for row in rows.itertuples()]
    table = rows.assign(text=text).pivot_table(index=index, columns=columns, values="text", aggfunc="first", sort=False)
    return table.fillna("–").rename_axis(None, axis=1)


def beside_paper(published: Path, ours: pd.DataFrame) -> pd.DataFrame:
    """A table of the paper with ours below, as text: "48.34 → 49.04, +0.70", ours with the interval of the change.

    Args:
        published: a file of `data/paper` in which the first row of each model is its baseline.
        ours: estimates of a change, with `model`, `method`, `column` (as in the file), `before` and `score`.
    """
    paper = pd.read_csv(published)
    paper["before"] = paper.groupby(["model", "column"]).value.transform("first")
    paper = paper[paper.row != paper.row.iloc[0]]
    of_paper = [f"{of.before:.2f} → {of.value:.2f}, {of.value - of.before:+.2f}".replace("-", "−")
                for of in paper.itertuples()]
    of_ours = [f"{of.before:.1f} → {of.score:.1f}, {report.shown(_interval(of), '+.1f')}" for of in ours.itertuples()]
    both = pd.concat([paper.assign(source="paper", method=paper.row, text=of_paper),
                      ours.assign(source="here", text=of_ours)])
    table = both.pivot_table(index=["source", "model", "method"], columns="column", values="text", aggfunc="first",
                             sort=False)
    return table[list(dict.fromkeys(paper.column))].fillna("–").rename_axis(None, axis=1)


def told(
    rows: pd.DataFrame,
    above: str,
    below: str,
    unclear: str = "not clearly different",
    *,
    reference: float = 0,
    fmt: str | None = None,
    unit: str = "",
    label: str = "{model}",
    none: str = "no model of this run has such tokens",
) -> str:
    """Estimates in a sentence: "lab-llava −1.2 [−2.0, −0.4] points (loss); ..". What has no value is left out.

    Args:
        above, below, unclear: words where the whole interval lies above `reference`, below it, or on neither side.
        fmt, unit: of the numbers.
        label: what names a row, with its columns in braces.
        none: the sentence if no row has a value.
    """
    parts = []
    for row in rows.itertuples():
        found = _interval(row)
        if words := report.phrase(found, reference, above, below, unclear, ""):
            number = f"{report.shown(found, fmt)} {unit}".strip()
            parts.append(f"{label.format(**row._asdict())} {number} ({words})")
    return "; ".join(parts) or none


def dots(
    rows: pd.DataFrame,
    *,
    y: str,
    hue: str,
    panels: str = "model",
    lines: str | None = None,
    hollow: str | None = None,
    unit: str = "",
    reference: float = 0,
    titles: Mapping[str, str] | None = None,
) -> mpl.figure.Figure:
    """Dots with intervals: a column of panels for each model, a row of dots for each type, a colour for each group.

    Args:
        y, hue, panels, lines: columns whose values become rows of dots, colours (`colour`), columns and rows of panels.
        hollow: a column; where it is "random", dots are hollow and thin: the control beside its group.
        unit: label of the x axis.
        reference: where the dotted line of no effect stands.
        titles: words for the values of `lines`.
    """
    down = list(dict.fromkeys(rows[lines])) if lines else [None]
    across, ys, hues = (list(dict.fromkeys(rows[column])) for column in (panels, y, hue))
    height = 0.9 + len(down) * (0.6 + 0.17 * len(ys) * max(2, len(hues)))
    fig, axes = plt.subplots(len(down), len(across), figsize=(1.2 + 1.9 * len(across), height), squeeze=False,
                             sharey=True, sharex="row")
    for line, row_of_axes in zip(down, axes, strict=True):
        for panel, ax in zip(across, row_of_axes, strict=True):
            of = rows[(rows[panels] == panel) & ((rows[lines] == line) if lines else True)]
            for i, name in enumerate(hues):
                own = of[of[hue] == name]
                _dots(ax, own, [ys.index(at) for at in own[y]], 0.7 * ((i + 0.5) / len(hues) - 0.5),
                      colour(name, hues), own[hollow] == "random" if hollow else None)
            for i in range(1, len(ys), 2):  # every other row has a ground, for the eye to follow it
                ax.axhspan(i - 0.5, i + 0.5, color=report.INK, alpha=0.08, lw=0)
            ax.axvline(reference, ls=":", color=report.INK)
            title = "" if line is None else f"\n{(titles or {}).get(line, line)}"
            ax.set(title=f"{panel}{title}", ylim=(len(ys) - 0.5, -0.5), yticks=range(len(ys)), yticklabels=ys)
        row_of_axes[len(across) // 2].set_xlabel(unit, x=0.5 * (len(across) % 2))  # below the middle of the row
    legend(fig, hues, random=hollow is not None)
    return fig


def _dots(ax: Any, rows: pd.DataFrame, at: Sequence[int], offset: float, of: str, thin: pd.Series | None) -> None:
    for i, row in zip(at, rows.itertuples(), strict=True):
        control = thin is not None and thin[row.Index]
        nudge = 0.06 if control else 0
        half = [[row.value - row.low], [row.high - row.value]]
        ax.errorbar(row.value, i + offset + nudge, xerr=half, fmt="o", ms=4.5, lw=0.8 if control else 1.2, color=of,
                    mfc="none" if control else of, mew=1)


def legend(fig: mpl.figure.Figure, names: Iterable[str], *, random: bool = False) -> None:
    """A legend below the figure: a dot for each name, and one for what is hollow."""
    names = list(names)
    of = [mpl.lines.Line2D([], [], marker="o", ls="", color=colour(name, names), label=name) for name in names]
    if random:
        of.append(mpl.lines.Line2D([], [], marker="o", ls="", color=report.INK, mfc="none", label="as many random"))
    fig.legend(handles=of, loc="outside lower center", ncols=min(5, len(of)))


def listed(items: Iterable[str]) -> str:
    """Different items as "a, b and c"; "none" for none."""
    items = list(dict.fromkeys(items))
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else "".join(items) or "none"


class Number(NamedTuple):
    """An estimate that the box at the top cites: rounded in its answer, with its interval in the line below."""

    found: stats.Interval
    unit: str = ""
    fmt: str | None = None  # by default digits that suit the size of the estimate

    def __str__(self) -> str:
        """The estimate alone, "+32 points"."""
        return self._text(self.found.value)

    def interval(self) -> str:
        """Its interval, "+30 to +34 points"."""
        return f"{self._digits(self.found.low)} to {self._text(self.found.high)}"

    def _text(self, value: float) -> str:
        return f"{self._digits(value)} {self.unit}".strip()

    def _digits(self, value: float) -> str:
        return f"{value:{self.fmt or report.digits(self.found.value)}}".replace("-", "−").replace("%", " %")


def leading(rows: pd.DataFrame, run: str) -> str | None:
    """The model whose numbers the box cites: the run's own if it has an estimate there, or else the first that has."""
    there = list(rows.model[rows.n > 0])
    return run if run in there else there[0] if there else None


def sides(
    rows: pd.DataFrame, above: str, below: str, unclear: str = "not clearly different", *, reference: float = 0
) -> str:
    """On which side of `reference` models lie, without numbers: "more in lab-llava-gist; less in lab-qwen2vl"."""
    names: dict[str, list[str]] = {}
    for row in rows.itertuples():
        if words := report.phrase(_interval(row), reference, above, below, unclear, ""):
            names.setdefault(words, []).append(row.model)
    return "; ".join(f"{words} in {listed(of)}" for words, of in names.items())


def answer(
    text: str,
    numbers: Sequence[Number],
    over: str,
    models: Iterable[str],
    but: str = "",
    *,
    trained: str = "one training of each model",
) -> None:
    """What the box at the top of a chapter says below its question, in the same form in every chapter.

    Args:
        text: the answer, in plain words, with its numbers.
        numbers: the estimates that it cites, two at most, in its order; the rest stands in the chapter.
        over: what was seen, with n, "128 pictures"; intervals are over it.
        models: that the answer is about.
        but: what a reader has to know before believing it, in a sentence or two.
        trained: how often models were trained.

    Raises:
        ValueError: more than two numbers, or one that has no value: then the answer needs other words.
    """
    if len(numbers) > 2 or not all(np.isfinite(number.found.value) for number in numbers):
        raise ValueError(f"a box cites at most two numbers, each with a value: {', '.join(map(str, numbers))}")
    found = [number.interval() for number in numbers if np.isfinite(number.found.low)]
    intervals = f"95 % interval{'s' * (len(found) > 1)} {' and '.join(found)}, " if found else "No interval, "
    about = ", ".join(dict.fromkeys(models))
    report.glue("answer", " ".join(text.split()))
    report.glue("sure", " ".join(f"{intervals}{over}; {about}; {trained}. {but}".split()))


def _interval(row: Any) -> stats.Interval:
    return stats.Interval(row.value, row.low, row.high, row.n)
