"""What notebooks hand on: bytes that do not change, numbers for the prose, figures for both themes, provenance."""

import itertools
import json
import re
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

from sinkstudy.book import report
from sinkstudy.paths import BOOK
from sinkstudy.stats import Interval


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("SINKSTUDY_RESULTS", str(tmp_path))
    return report.Results("lab-llava", "01-norms")


def fill(results):
    results.table("norms", pd.DataFrame({"layer": [2, 1], "norm": [1 / 3, -0.0], "sink": [True, False]}, index=[7, 9]))
    results.metric("ratio", *Interval(2 / 3, 0.5, 0.75, 120), unit="%")
    results.metric("not measured", float("nan"))


def test_tables_have_six_digits_the_given_order_and_no_index(results):
    fill(results)
    results.write()
    assert (results.folder / "norms.csv").read_bytes() == b"layer,norm,sink\n2,0.333333,True\n1,0,False\n"


def test_metrics_are_sorted_rounded_and_null_where_there_is_nothing(results):
    fill(results)
    results.write()
    text = (results.folder / "metrics.json").read_text()
    rows = json.loads(text)
    assert rows[0] == {"name": "ratio", "value": 0.666667, "low": 0.5, "high": 0.75, "n": 120, "unit": "%"}
    assert rows[1]["value"] is None and rows[1]["n"] is None
    assert list(rows[0]) == sorted(rows[0]) and "NaN" not in text


def test_degrees_of_freedom_are_stored_only_where_there_are_any(results):
    results.metric("t", 1.0, 0.0, 2.0, 9, "points", df=2.3456789)
    results.metric("bootstrap", 1.0, 0.0, 2.0, 9, "points", df=float("nan"))
    results.write()
    first, second = json.loads((results.folder / "metrics.json").read_text())
    assert first["df"] == 2.34568 and "df" not in second


def test_an_estimate_without_interval_says_so():
    assert report.shown(report.stats.Interval(2.0, float("nan"), float("nan"), 1)) == "2.00 (one picture)"
    assert report.shown(report.stats.Interval(2.0, float("nan"), float("nan"), 9)) == "2.00 (no interval)"


def test_last_digits_that_processors_disagree_on_do_not_change_the_bytes(results, tmp_path):
    for noise, name in ((0.0, "a"), (-1e-14, "b")):
        other = report.Results("lab-llava", name)
        for x in (0.1234561, 0.0):
            other.metric(f"x{x}", x + noise)
        other.table("t", pd.DataFrame({"x": [0.1234561 + noise, noise]}))
        other.write()
    for file in ("metrics.json", "t.csv"):
        first, second = (tmp_path / "lab-llava" / name / file for name in "ab")
        assert first.read_bytes() == second.read_bytes()


def test_writing_again_leaves_nothing_of_the_earlier_run(results):
    fill(results)
    (results.folder / "stale.csv").write_text("old")
    results.write()
    results.write()
    assert sorted(path.name for path in results.folder.iterdir()) == ["metrics.json", "norms.csv"]
    assert [path.name for path in results.folder.parent.iterdir()] == ["01-norms"]


def test_a_write_that_fails_leaves_the_earlier_run_whole(results):
    fill(results)
    results.write()
    before = (results.folder / "metrics.json").read_bytes()
    results._tables["bad"] = SimpleNamespace(select_dtypes=None)
    with pytest.raises(TypeError):
        results.write()
    assert (results.folder / "metrics.json").read_bytes() == before


def test_a_name_is_given_once(results):
    fill(results)
    with pytest.raises(ValueError, match="metric 'ratio'"):
        results.metric("ratio", 1.0)
    with pytest.raises(ValueError, match="table 'norms'"):
        results.table("norms", pd.DataFrame())


def test_glue_does_nothing_outside_a_kernel(monkeypatch):
    monkeypatch.setattr("myst_nb.glue", lambda *arguments, **options: pytest.fail("there is no kernel"))
    report.glue("x", 1.0)


@pytest.mark.parametrize(
    ("value", "fmt", "text"),
    [
        (torch.tensor(1 / 3), ".3g", "0.333"),
        (np.float64(7.0456), ".2f", "7.05"),
        (np.int64(1234), ",d", "1,234"),
        (0.125, ".1%", "12.5 %"),
        ("lab-llava", ".3g", "lab-llava"),
    ],
)
def test_glue_stores_text_of_few_digits(monkeypatch, value, fmt, text):
    stored = {}
    monkeypatch.setattr(report, "get_ipython", lambda: object())
    monkeypatch.setattr("myst_nb.glue", lambda name, value, display: stored.update({name: value}))
    report.glue("x", value, fmt)
    assert stored == {"x": text}


def test_figures_are_transparent_and_in_mid_grey(tmp_path):
    with plt.rc_context():
        assert report.style() == list(report.PALETTE)
        figure, axes = plt.subplots(figsize=(2, 2))
        axes.plot([0, 1])
        assert mpl.colors.to_hex(axes.lines[0].get_color()) == report.PALETTE[0]
        figure.savefig(tmp_path / "figure.png")
        plt.close(figure)
    pixels = plt.imread(tmp_path / "figure.png")  # [height, width, RGBA]
    assert pixels[0, 0, 3] == 0, "the background must be transparent"
    assert pixels[..., 3].max() == 1


def _linear(colour):
    """Linear RGB of a hex colour (sRGB transfer function)."""
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _contrast(first, second):
    """WCAG 2 contrast of two hex colours."""
    low, high = sorted(_linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_stands_out_from_the_light_and_the_dark_page():
    style_sheet = (BOOK / "_static" / "sinkstudy.css").read_text()
    brighter = float(re.search(r"filter: brightness\((.*?)\)", style_sheet)[1])  # on the dark page, #121212
    for colour, least in [(report.INK, 4.5), *((colour, 3.0) for colour in report.PALETTE)]:
        lit = "#" + "".join(f"{min(255, round(int(colour[i : i + 2], 16) * brighter)):02x}" for i in (1, 3, 5))
        assert _contrast(colour, "#ffffff") > least
        assert _contrast(lit, "#121212") > least


# Linear-RGB simulation of colour blindness at full severity: Machado, Oliveira & Fernandes 2009, table 1.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def _lab(rgb):
    """CIE L*a*b* (D65) of linear RGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(rgb, 1e-3, 1) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_palette_stays_apart_for_colour_blind_readers(kind):
    colours = [_lab(np.array(BLINDNESS[kind]) @ _linear(colour)) for colour in report.PALETTE]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)]
    assert min(distances) > 12  # about 2 is just visible


@pytest.fixture
def lvlm(tmp_path):
    model = torch.nn.Linear(3, 2)
    model.config = SimpleNamespace(_attn_implementation="sdpa")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return SimpleNamespace(model=model, name=str(tmp_path), revision=None)


def test_provenance_names_what_made_the_page_and_agrees_with_itself(lvlm):
    table = report.provenance(lvlm, {"seed": 3, "criterion": "<mean + 3 sd>"}).data
    expected = (
        "float32",
        "sdpa",
        "cpu",
        "Linear",
        "seed</th><td>3",
        torch.__version__,
        "&lt;mean + 3 sd&gt;",
    )
    for part in expected:
        assert part in table
    assert re.search(r"[0-9a-f]{64}", table) and lvlm.name not in table
    assert table == report.provenance(lvlm, {"seed": 3, "criterion": "<mean + 3 sd>"}).data


def test_binned_means_draw_whole_images():
    x = np.tile([0.5, 1.5, 9.0], (6, 1))  # the last column lies outside the bins
    y = np.arange(18.0).reshape(6, 3)
    table = report.binned(x, y, np.array([0.0, 1.0, 2.0, 3.0]))
    assert table.low_edge.tolist() == [0.0, 1.0] and table.x.tolist() == [0.5, 1.5]  # the bin 2-3 is empty
    assert table.y.tolist() == [7.5, 8.5] and table.images.tolist() == [6, 6] and table.tokens.tolist() == [6, 6]
    assert (table.low < table.y).all() and (table.y < table.high).all()
    assert report.binned(x[:4], y[:4], np.array([0.0, 1.0])).empty  # seen in fewer than five images


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((2.0, 1.5, 2.5), "more"),
        ((0.5, 0.2, 0.9), "less"),
        ((1.1, 0.9, 1.3), "unclear"),
        ((2.0, np.nan, np.nan), "unclear"),
        ((np.nan, np.nan, np.nan), "missing"),
    ],
)
def test_phrase_says_what_the_interval_allows(interval, words):
    assert report.phrase(Interval(*interval, 9), 1.0, "more", "less", "unclear", "missing") == words


def test_plain_log_labels_read_as_numbers():
    fig, ax = plt.subplots()
    ax.plot([0.3, 30], [1, 1])
    ax.set_xscale("log")
    report.plain_log(ax.xaxis)
    fig.canvas.draw()
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert {"0.5", "1", "2", "5", "10"} <= set(labels)
    assert not any(label.get_text() for label in ax.get_xticklabels(minor=True))
    plt.close(fig)


@pytest.mark.parametrize(("p", "text"), [
    (1.0, "1.000"), (0.0314, "0.031"), (0.0005, "0.001"), (0.00049, "< 0.001"), (0.0, "< 0.001"), (float("nan"), "–")])
def test_shown_p(p: float, text: str):
    assert report.shown_p(p) == text


# ------------------------------------------------------------------------------------------------- to take away
def drawn():
    report.style()
    fig, ax = plt.subplots()
    ax.plot([0, 1], [2, 3])
    ax.set(title="norm − median", xlabel="layer")
    return fig


def test_figures_are_kept_with_the_tables_as_pdf_and_svg_of_equal_bytes(results, tmp_path, monkeypatch):
    report.glue_figure("norms", drawn())
    results.write()
    first = {path.name: path.read_bytes() for path in results.folder.iterdir()}
    assert set(first) == {"metrics.json", "norms.pdf", "norms.svg"}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")  # another day
    report.Results("lab-llava", "02-other").write()
    assert not list(tmp_path.glob("lab-llava/02-other/norms.*")), "figures of an earlier notebook"
    report.glue_figure("norms", drawn())
    results.write()
    assert first == {path.name: path.read_bytes() for path in results.folder.iterdir()}


def test_text_of_figures_stays_text(results):
    report.glue_figure("norms", drawn())
    results.write()
    assert ">norm − median</text>" in (results.folder / "norms.svg").read_text(encoding="utf-8")
    pdf = (results.folder / "norms.pdf").read_bytes()
    assert b"/TrueType" in pdf or b"/CIDFontType2" in pdf
    assert b"/Type3" not in pdf and b"/CreationDate" not in pdf


def test_tables_are_kept_as_they_were_shown(results, monkeypatch):
    shown = pd.DataFrame({"above 3 sd, %": ["2.86 [2.70, 3.03]", "−1.0"], "n_images": [7, 8]}, index=["lab_llava", "φ"])
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    monkeypatch.setattr(report, "get_ipython", lambda: shell)
    results = report.Results("lab-llava", "01-norms")
    page, _ = shell.display_formatter.format(shown)
    assert "lab_llava" in page["text/html"] and "text/latex" not in page
    shell.display_formatter.format("no table")
    results.write()
    shell.display_formatter.format(pd.DataFrame({"x": [1.5]}))  # below the cell that wrote
    assert sorted(path.name for path in results.folder.glob("*.tex")) == ["table-1.tex", "table-2.tex"]
    first = (results.folder / "table-1.tex").read_text(encoding="utf-8")
    assert first.isascii() and r"\toprule" in first
    body = [line.removesuffix(r" \\").split(" & ") for line in first.splitlines() if "&" in line]
    assert body == [["", r"above 3 sd, \%", r"n\_images"], [r"lab\_llava", "2.86 [2.70, 3.03]", "7"],
                    [r"$\varphi$", "$-$1.0", "8"]]
    assert (results.folder / "table-2.tex").read_text().split() == [
        r"\begin{tabular}{r}", r"\toprule", "x", r"\\", r"\midrule", "1.5", r"\\", r"\bottomrule",
        r"\end{tabular}"]
