"""What a notebook hands on: figures in one style, tables and metrics, numbers for the prose, its provenance.

A notebook makes one `Results`, adds tables and metrics to it and writes it once, at its end: with the figures that it
gave a name (`glue_figure`), as PDF and SVG, and the tables that it showed, as LaTeX.
"""

import hashlib
import html
import io
import json
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from IPython.display import HTML

from sinkstudy import stats
from sinkstudy.paths import MODELS, atomic, lab_models, results_dir

PALETTE = ("#1a78c2", "#cc7f00", "#0fa37f", "#c26ab2", "#b5402a")
"""Blue, orange, green, pink, red: apart for colour-blind readers too, visible on white and on near-black pages."""

INK = "#707070"
"""Text, axes and reference lines: a grey that reads on white and, brightened by the book's style sheet, on black."""

WITHOUT = {"pdf": ("CreationDate", "Creator", "Producer"), "svg": ("Date", "Creator")}
"""Formats in which figures are kept, with what their metadata lack: times and versions, so that bytes are equal."""

IN_LATEX = {"−": "$-$", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "→": r"$\rightarrow$", "Δ": r"$\Delta$",
            "τ": r"$\tau$", "φ": r"$\varphi$", "–": "--", "\xa0": "~", "…": r"\ldots{}"}
"""Signs of the tables for which pdfLaTeX has no letter."""

_figures: dict[str, bytes] = {}  # files of the figures named since the last `Results` was made, which writes them


def style() -> list[str]:
    """Set the figure style of the book; call it once at the head of a notebook.

    Backgrounds are transparent and all ink is mid-grey, so that one figure serves the light and the dark page.
    In a notebook, figures become PNGs of twice the resolution.

    Returns:
        The palette, hex colours, in the order that plots take them.
    """
    sns.set_theme(
        context="notebook",
        style="ticks",
        palette=PALETTE,
        rc={
            "figure.figsize": (7.0, 4.0),  # inches
            "figure.constrained_layout.use": True,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "legend.framealpha": 0.0,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.labelsize": "medium",
            "legend.fontsize": "small",
            "legend.title_fontsize": "small",
            "grid.alpha": 0.35,
            "patch.linewidth": 0,
            "image.cmap": "viridis",
            "svg.hashsalt": "sinkstudy",
            "svg.fonttype": "none",  # text stays text, in the reader's fonts
            "pdf.fonttype": 42,  # TrueType, embedded: journals refuse Type 3
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
            **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
        },
    )
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina", metadata={"Software": None})  # no version inside: equal bytes
    return list(PALETTE)


class Results:
    """The tidy tables and the headline numbers of one notebook, written whole to `results/<run>/<notebook>/`.

    Two runs that computed the same numbers write the same bytes: floats have six significant digits and at most
    twelve decimals, rows and columns keep their order, and neither times nor paths are stored.

    Args:
        run: slug of the model's name, as `paths.slug` makes it.
        notebook: name without suffix, "01-norms".
    """

    def __init__(self, run: str, notebook: str):
        self.folder = results_dir(run, notebook)
        self._shown: list[str] = []  # LaTeX of the tables that cells showed
        self._written = False
        _figures.clear()
        if (shell := get_ipython()) is not None:
            shell.display_formatter.formatters["text/latex"].for_type(pd.DataFrame, self._keep_shown)
        self._tables: dict[str, pd.DataFrame] = {}
        self._metrics: dict[str, dict[str, Any]] = {}

    def table(self, name: str, rows: pd.DataFrame) -> pd.DataFrame:
        """Keep a table for `<name>.csv`, one observation a row; the index is not written. Returns it.

        Raises:
            ValueError: a table of that name is there already.
        """
        if name in self._tables:
            raise ValueError(f"there is a table {name!r} already")
        self._tables[name] = rows.copy()
        return rows

    def metric(
        self,
        name: str,
        value: float,
        low: float | None = None,
        high: float | None = None,
        n: int | None = None,
        unit: str = "",
        df: float | None = None,
    ) -> None:
        """Keep one headline number: a row of `metrics.json`. Takes an interval as ``metric(name, *interval)``.

        Args:
            name: unique within the notebook, "attention_ratio.sinks_to_others".
            value: in `unit`; NaN is stored as null.
            low, high: its 95 % interval.
            n: number of independent units (images) behind it.
            unit: "%", "tokens", …; empty for a pure number.
            df: degrees of freedom of a t interval (`stats.seeds_interval`); stored only where there are any.

        Raises:
            ValueError: a metric of that name is there already.
        """
        if name in self._metrics:
            raise ValueError(f"there is a metric {name!r} already")
        row = {"name": name, "value": _six(value), "low": _six(low), "high": _six(high)}
        free = {} if _six(df) is None else {"df": _six(df)}
        self._metrics[name] = row | {"n": None if n is None else int(n), "unit": unit} | free

    def write(self) -> None:
        """Put the folder in place, whole: what an earlier run left there is gone."""
        with atomic(self.folder) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            for name, rows in self._tables.items():
                floats = rows.select_dtypes("float").columns
                rows = rows.assign(**{column: rows[column].round(12) + 0.0 for column in floats})  # −0 becomes 0
                rows.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
            text = json.dumps(list(self._metrics.values()), indent=1, sort_keys=True, ensure_ascii=False)
            (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
            for name, content in _figures.items():
                (folder / name).write_bytes(content)
            self._write_shown(folder)
        self._written = True

    def _keep_shown(self, table: pd.DataFrame) -> None:
        """IPython asks for the LaTeX of a table that it shows. It is kept for a file, and the page does without."""
        self._shown.append(latex(table))
        if self._written:
            self._write_shown(self.folder)

    def _write_shown(self, folder: Path) -> None:
        for number, text in enumerate(self._shown, 1):
            (folder / f"table-{number}.tex").write_text(text, encoding="utf-8")


def _six(value: float | None) -> float | None:
    """A float of six significant digits; None for None, NaN and ±inf, which JSON does not have."""
    if value is None or not np.isfinite(value):
        return None
    return float(f"{round(float(value), 12):.6g}") + 0.0


def latex(table: pd.DataFrame) -> str:
    """A table as it is shown, for LaTeX with the package booktabs; signs that LaTeX would read are escaped."""
    table = table.rename_axis(columns=None) if table.columns.nlevels == 1 else table
    text = table.to_latex(escape=True, index=not isinstance(table.index, pd.RangeIndex), float_format="%g")
    return re.sub("|".join(IN_LATEX), lambda found: IN_LATEX[found[0]], text)


def glue(name: str, value: float | str, fmt: str = ".3g") -> None:
    """Give a number a name for the prose: ``{glue:text}`name``` on a page shows it.

    The number is formatted here, so that the notebook stores few digits and reads the same on every processor.
    Outside a Jupyter kernel nothing is stored.

    Args:
        name: unique within the notebook.
        fmt: format specification, ".1f", ".1%", "d" (numbers only).
    """
    if not isinstance(value, str):
        value = format(int(value) if fmt.endswith("d") else float(value), fmt).replace("%", " %")
    if get_ipython() is not None:
        import myst_nb

        myst_nb.glue(name, value, display=False)


def glue_figure(name: str, figure: mpl.figure.Figure) -> None:
    """Show a figure and give it a name, so that a ``{glue:figure}`` directive can set it with a caption.

    Tag the cell `remove-output`: Jupyter shows the figure below the cell, the book where the directive stands.
    `Results.write` puts `<name>.pdf` and `<name>.svg` beside the tables.
    """
    if get_ipython() is not None:
        import myst_nb

        myst_nb.glue(name, figure, display=True)
    for suffix, without in WITHOUT.items():
        file = io.BytesIO()
        figure.savefig(file, format=suffix, metadata=dict.fromkeys(without), bbox_inches="tight", dpi=200)
        _figures[f"{name}.{suffix}"] = file.getvalue()
    plt.close(figure)


def plain_log(axis: mpl.axis.Axis) -> None:
    """Label a logarithmic axis 1, 2, 5, 10, … in plain numbers; call it after the scale is set."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def binned(x: np.ndarray, y: np.ndarray, edges: np.ndarray, *, min_images: int = 5) -> pd.DataFrame:
    """Mean of y in bins of x, with 95 % bootstrap intervals over images.

    Args:
        x, y: [images, tokens]; a row of x is one image.
        edges: bin borders, ascending; a bin holds low <= x < high, what lies outside is left out.
        min_images: a bin seen in fewer images is left out.

    Returns:
        A row a bin: `low_edge`, `high_edge`, `x` (mean in the bin), `y`, `low`, `high`, `images`, `tokens`.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    image = np.broadcast_to(np.arange(len(x))[:, None], x.shape)
    rows = []
    for low, high in pairwise(edges):
        inside = (x >= low) & (x < high)
        if len(np.unique(image[inside])) < min_images:
            continue
        mean = stats.mean_interval(y[inside], clusters=image[inside])
        rows.append((low, high, x[inside].mean(), mean.value, mean.low, mean.high, mean.n, int(inside.sum())))
    return pd.DataFrame(rows, columns=["low_edge", "high_edge", "x", "y", "low", "high", "images", "tokens"])


def key(*parts: str) -> str:
    """The name of a metric: its parts in small letters, other signs as underscores, joined by dots."""
    plain = (part.lower().replace("×", "times").replace("%", "percent") for part in parts)
    return ".".join(re.sub(r"[^a-z0-9.-]+", "_", part) for part in plain)


def digits(value: float) -> str:
    """The format of an estimate, and of its interval, that suits its size: 195, 2.86, 0.059."""
    return ".0f" if abs(value) >= 9.5 else ".2f" if abs(value) >= 0.3 else ".2g"


def shown(interval: stats.Interval, fmt: str | None = None) -> str:
    """An interval as text, "2.86 [2.70, 3.03]"; a dash if there is no estimate.

    An estimate without an interval says so: it is of one picture, or of several and one training only.

    Args:
        fmt: format of the numbers, as "+.1f"; by default digits that suit the size of the estimate.
    """
    value, low, high, n = interval
    if not np.isfinite(value):
        return "–"
    fmt = fmt or digits(value)
    if np.isfinite(low):
        text = f"{value:{fmt}} [{low:{fmt}}, {high:{fmt}}]"
    else:
        text = f"{value:{fmt}} ({'no interval' if n > 1 else 'one picture'})"
    return text.replace("-", "−")


def shown_p(p: float) -> str:
    """A p-value with three digits behind the point, or "< 0.001"; a dash if there is none."""
    return "–" if np.isnan(p) else f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def phrase(interval: stats.Interval, reference: float, above: str, below: str, unclear: str, missing: str) -> str:
    """The words that an interval allows, so that prose follows from the numbers.

    `above` or `below` if the whole interval lies on that side of `reference`, `unclear` if it does not or has no
    width to judge by, `missing` if there is no estimate.
    """
    if not np.isfinite(interval.value):
        return missing
    if interval.low > reference:
        return above
    return below if interval.high < reference else unclear


def provenance(lvlm: Any, parameters: Mapping[str, Any]) -> HTML:
    """What made this page: model, weights, precision, device, seed, parameters and versions, as an HTML table.

    It holds no times, so two runs on one machine agree; versions and device differ between machines, hence the
    tag `nbval-ignore-output` on its cell.
    """
    weights = lvlm.model
    one = next(weights.parameters())
    rows = {
        "Model": Path(lvlm.name).name if Path(lvlm.name).is_absolute() else lvlm.name,
        "Revision": lvlm.revision or ("in this repository" if lvlm.name in lab_models() else "none: a local folder"),
        "Weights, SHA-256": _weights_sha256(lvlm.name) or "not in a local folder: see the revision",
        "Class": type(weights).__name__,
        "Parameters": f"{sum(p.numel() for p in weights.parameters()):,}",
        "Number format": str(one.dtype).removeprefix("torch."),
        "Attention": str(getattr(weights.config, "_attn_implementation", "unknown")),
        "Device": _device_name(one.device),
        **{f"Parameter {name}": str(value) for name, value in parameters.items()},
        "Versions": versions(),
    }
    body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return HTML(f'<table class="dataframe provenance"><tbody>{body}</tbody></table>')


def versions() -> str:
    """Versions of Python and of the libraries that the numbers depend on."""
    libraries = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "numpy", "scipy", "pandas")]
    return ", ".join([f"Python {platform.python_version()}", *libraries])


def _weights_sha256(name: str) -> str | None:
    """SHA-256 over the safetensors files of a lab model or a local folder, in order of name; None for a hub id."""
    for folder in (MODELS / name, Path(name)):
        if files := sorted(folder.glob("*.safetensors")):
            digest = hashlib.sha256()
            for file in files:
                digest.update(file.read_bytes())
            return digest.hexdigest()
    return None


def _device_name(device: Any) -> str:
    """ "cpu", or the accelerator's name as its driver gives it."""
    if device.type == "cuda":
        import torch

        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type
