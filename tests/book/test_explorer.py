"""The explorer of chapter 13 in a real browser: what it shows is what its data say, and every hand can use it."""

import base64
import json
import re

import matplotlib
import numpy as np
import pytest

from sinkstudy.paths import RESULTS
from tests.book.conftest import CONTRAST, PATIENCE

RUN = "lab-llava"
PAGE = f"book/runs/{RUN}/13-explorer.html"


@pytest.fixture(scope="module")
def data() -> dict:
    text = (RESULTS / RUN / "13-explorer" / "explorer.js").read_text()
    return json.loads(text.removeprefix("window.sinkstudyExplorer = ").rstrip(";\n"))


def unpacked(packed: dict) -> np.ndarray:
    return packed["low"] + packed["step"] * np.frombuffer(base64.b64decode(packed["codes"]), "<u2")


def of(data: dict, model: int, picture: int, quantity: str) -> np.ndarray:
    """The maps of a quantity, [.., patches]."""
    return unpacked(data["models"][model]["pictures"][picture][quantity]).reshape(-1, 144)


@pytest.fixture
def page(browser, html):
    """The page as a reader opens it from a disk, without a server; it must not ask for anything else."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    context.set_default_timeout(PATIENCE)
    page, problems = context.new_page(), []
    page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or problems.append(r.url))
    page.on("requestfailed", lambda r: problems.append(r.url))
    page.goto((html / PAGE).as_uri(), wait_until="load")
    page.locator(".explorer-grid").wait_for()
    yield page
    assert not problems
    context.close()


def choose(page, kind: str, index: int) -> None:
    page.locator(f".explorer-{kind} input").nth(index).check(force=True)


def show(page, quantity: str, colours: str | None = None) -> None:
    page.locator(".explorer-quantity select").select_option(quantity)
    if colours:
        page.locator(".explorer-range select").select_option(colours)


def colours(page) -> np.ndarray:
    """Colours of the map's cells, [patches, 3]."""
    texts = page.eval_on_selector_all("[role=gridcell]", "cells => cells.map(c => getComputedStyle(c).backgroundColor)")
    return np.array([[int(n) for n in re.findall(r"\d+", text)] for text in texts])


def read(page, row: str) -> str:
    return page.locator(f'.explorer-readout [data-of="{row}"]').inner_text()


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text.replace("−", "-"))]


def agree(shown: float, value: float) -> bool:
    """Equal as far as three significant digits tell."""
    return shown == pytest.approx(value, rel=0.006, abs=1e-6)


def test_colours_are_those_of_the_data(page, data):
    viridis, blue_red = matplotlib.colormaps["viridis"], matplotlib.colormaps["RdBu_r"]
    choose(page, "models", 1)
    choose(page, "pictures", 3)
    choose(page, "layers", 4)
    norms = [of(data, m, 3, "tower_norm") for m in range(len(data["models"]))]
    relative = [n / np.median(n, axis=1, keepdims=True) for n in norms]
    every, here = np.concatenate(relative), relative[1][4]
    for kind, among, scale in (("own", here, np.asarray), ("shared", every, np.asarray), ("log", every, np.log)):
        show(page, "tower_norm", kind)
        low, high = scale(among.min()), scale(among.max())
        at = (scale(here) - low) / (high - low)
        assert np.abs(colours(page) - 255 * viridis(at)[:, :3]).max() < 8, kind

    show(page, "attribution", "own")
    choose(page, "questions", 2)
    values = of(data, 1, 3, "attribution")[2]
    expected = 255 * blue_red(0.5 + 0.5 * values / np.abs(values).max())[:, :3]
    assert np.abs(colours(page) - expected).max() < 8


def test_every_choice_changes_the_map(page, data):
    seen = [colours(page)]
    steps = [
        lambda: choose(page, "pictures", 5),
        lambda: choose(page, "layers", 0),
        lambda: choose(page, "models", 2),
        lambda: show(page, "decoder_attention"),
        lambda: choose(page, "questions", 1),
        lambda: choose(page, "layers", 1),
        lambda: show(page, "tower_attention"),
        lambda: show(page, "decoder_norm"),
        lambda: show(page, "attribution"),
    ]
    for step in steps:
        step()
        seen.append(colours(page))
        assert not np.array_equal(seen[-1], seen[-2])


def test_numbers_are_those_of_the_data(page, data):
    model, picture, question, tower, decoder, patch = 1, 4, 1, 5, 2, 77
    choose(page, "models", model)
    choose(page, "pictures", picture)
    choose(page, "questions", question)
    choose(page, "layers", tower)
    show(page, "decoder_attention")
    choose(page, "layers", decoder)
    page.locator("[role=gridcell]").nth(patch).hover()

    norm = of(data, model, picture, "tower_norm")[tower]
    assert all(map(agree, numbers(read(page, "tower_norm")), (norm[patch], norm[patch] / np.median(norm))))
    received = of(data, model, picture, "tower_attention")[tower, patch]
    uniform = data["models"][model]["uniform"][tower]
    assert all(map(agree, numbers(read(page, "tower_attention")), (received, received / uniform)))
    inner = of(data, model, picture, "decoder_norm")[decoder + 1]  # the first is the connector's
    assert all(map(agree, numbers(read(page, "decoder_norm")), (inner[patch], inner[patch] / np.median(inner))))
    attention = of(data, model, picture, "decoder_attention").reshape(3, -1, 144)[question, decoder, patch]
    assert agree(numbers(read(page, "decoder_attention"))[0], attention)
    assert agree(numbers(read(page, "attribution"))[0], of(data, model, picture, "attribution")[question, patch])
    assert read(page, "place") == data["pictures"][picture]["contents"][patch]
    said = page.locator(".explorer-readout [aria-live]").inner_text()
    assert said.startswith("Row 7, column 6: ") and agree(numbers(said)[2], attention)

    answers = data["models"][model]["pictures"][picture]["answers"][question]
    rows = page.locator(".explorer-answers tbody tr")
    assert agree(numbers(rows.nth(0).locator("td").nth(1).inner_text())[0], 100 * answers["p"])
    for i, group in enumerate(("sinks", "top_2_percent", "calm", "things"), start=1):
        tokens, p, random, word = rows.nth(i).locator("td").all_inner_texts()
        expected = answers["without"][group]
        assert int(tokens) == expected["tokens"] and word == expected["word"]
        assert agree(numbers(p)[0], 100 * expected["p"]) and agree(numbers(random)[0], 100 * expected["random"])
    answer = data["pictures"][picture]["questions"][question]["answer"]
    assert f"True answer: {answer}." in page.locator(".explorer-answers p").inner_text()


def test_sinks_are_outlined_by_the_chosen_rule(page, data):
    choose(page, "models", 1)
    rules = np.frombuffer(base64.b64decode(data["models"][1]["pictures"][0]["rules"]), np.uint8)
    for rule in range(len(data["rules"])):
        page.locator(".explorer-rule select").select_option(str(rule))
        marked = rules >> rule & 1
        assert f"({marked.sum()})" in page.locator(".explorer-rule").inner_text()
        grid = np.pad(marked.reshape(12, 12).astype(int), 1)
        edges = np.abs(np.diff(grid, axis=0)).sum() + np.abs(np.diff(grid, axis=1)).sum()
        path = page.locator(".explorer-map .explorer-sinks-line").get_attribute("d")
        assert path.count("M") == edges
    calm = page.locator(".explorer-map .explorer-calm-line")
    assert calm.count() == 1
    page.get_by_label("calm patches").uncheck()
    assert calm.count() == 0
    sink = int(rules.argmax())
    page.locator("[role=gridcell]").nth(sink).hover()
    assert read(page, "rules") == "; ".join(text for i, text in enumerate(data["rules"]) if rules[sink] >> i & 1)


def focused(page) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-label')")


def test_keyboard(page):
    page.locator(".explorer-layers input:checked").focus()
    before = colours(page)
    page.keyboard.press("ArrowLeft")
    assert not np.array_equal(before, colours(page))
    assert page.evaluate("document.activeElement.value") == "5"  # the focus stays with the choice that was made
    page.keyboard.press("Tab")
    assert focused(page) == "row 1, column 1"
    for key, row, column in (
        ("ArrowRight", 1, 2), ("ArrowDown", 2, 2), ("End", 2, 12), ("ArrowRight", 2, 12), ("PageDown", 12, 12),
        ("Home", 12, 1), ("ArrowUp", 11, 1), ("PageUp", 1, 1), ("ArrowUp", 1, 1), ("ArrowLeft", 1, 1),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert focused(page) == f"row {row}, column {column}"
        assert page.locator(".explorer-readout [aria-live]").inner_text().startswith(f"Row {row}, column {column}:")
    ring = page.locator(".explorer-map .explorer-here-line")
    assert ring.evaluate("e => getComputedStyle(e).stroke") == "rgb(255, 176, 0)"
    page.keyboard.press("Tab")  # one stop for the whole map
    assert page.evaluate("document.activeElement.matches('.explorer-rule select')")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.matches('.explorer-calm-box input:not(:checked)')")
    named = "e => e.labels.length === 1 && (e.labels[0].innerText.trim() || e.labels[0].querySelector('img').alt)"
    fields = page.locator(".explorer :is(input, select)")
    assert fields.count() > 25 and all(field.evaluate(named) for field in fields.all())


def test_dark_theme_and_narrow_screen(page):
    page.evaluate("document.documentElement.dataset.theme = 'dark'")  # as the book's switch does
    texts = page.evaluate(CONTRAST, ".explorer")
    assert len(texts) > 40 and min(texts)[0] >= 4.5, min(texts)
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    photo, grid = (page.locator(f".explorer-{name}").bounding_box() for name in ("photo", "map"))
    assert grid["y"] >= photo["y"] + photo["height"] and grid["width"] > 300
