"""The rendered book in a real browser: every page, in the light and the dark theme and on a narrow screen.

The tests read `_build/html`, which `make book` makes. They need Chromium ($CHROMIUM, else /usr/bin/chromium or what
is on the path); without it they are skipped, or fail if SINKSTUDY_REQUIRE_BROWSER=1.
"""

import functools
import http.server
import os
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
import yaml

from sinkstudy import claims
from sinkstudy.paths import ROOT

BUILD = ROOT / "_build"
HTML = BUILD / "html"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
PATIENCE = 120_000  # milliseconds: a busy machine is slow, not broken
VIEWS = {  # name: (theme, width in CSS pixels)
    "light": ("light", 1280),
    "dark": ("dark", 1280),
    "narrow": ("light", 390),
}


def toc_pages() -> list[str]:
    """Every page of the table of contents that the book was rendered from, further runs included."""
    files = [path for path in (BUILD / "toc.yml", ROOT / "_toc.yml") if path.exists()]
    toc = yaml.safe_load(files[0].read_text())
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


PAGES = toc_pages()


@pytest.fixture(scope="module")
def html() -> Path:
    """The folder of the rendered book."""
    if not (HTML / "index.html").exists():
        pytest.fail("run make book first: there is no _build/html/index.html")
    return HTML


@pytest.fixture(scope="module")
def site(html):
    """Address of the book on a free port of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    wanted = (os.environ.get("CHROMIUM"), "/usr/bin/chromium", shutil.which("chromium"), shutil.which("google-chrome"))
    path = next((path for path in wanted if path and Path(path).exists()), None)
    if path is None:
        reason = "no Chromium: set CHROMIUM to its path"
        (pytest.fail if os.environ.get("SINKSTUDY_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture(params=VIEWS)
def view(request, browser):
    """A fresh browser context, as of a first-time reader, in one theme and width."""
    theme, width = VIEWS[request.param]
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    context.name, context.theme = request.param, theme
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


def open_page(context, site: str, path: str):
    """Open a page and wait until nothing is loading. Returns the page and all that went wrong meanwhile."""
    page, problems = context.new_page(), []

    def note(kind, text):
        problems.append(f"{kind}: {text}")

    page.on("console", lambda message: message.type in ("error", "warning") and note("console", message.text))
    page.on("pageerror", lambda error: note("script", error))
    page.on("requestfailed", lambda request: note("failed", request.url))
    page.on("response", lambda response: response.status >= 400 and note(response.status, response.url))
    page.on("request", lambda r: r.url.startswith((site, "data:", "blob:")) or note("to another host", r.url))
    response = page.goto(f"{site}/{path}", wait_until="networkidle")
    assert response.status == 200
    return page, problems


# For each element with text of its own: the contrast (WCAG 2) of its colour with the backgrounds behind it.
CONTRAST = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3])).concat(1);
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = rgb => 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]);
  const found = [];
  for (const element of document.querySelectorAll('.bd-article *')) {
    if (element.closest('svg, mjx-container, pre, .headerlink, summary') || !element.checkVisibility()) continue;
    if (![...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      layers.unshift(colour);
      if (colour[3] === 1) break;
    }
    const ground = layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
    const [a, b] = [light(ground), light(over(parse(getComputedStyle(element).color), ground))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([contrast, `${element.tagName} ${element.className}: ${element.textContent.trim().slice(0, 40)}`]);
  }
  return found;
}"""

IMAGES = """() => Promise.all([...document.querySelectorAll('.bd-article img')].map(async image => {
  image.loading = 'eager';
  await image.decode().catch(() => {});
  return [image.getAttribute('src'), image.naturalWidth, image.getBoundingClientRect().width, image.alt];
}))"""


@pytest.mark.parametrize("name", PAGES)
def test_page_loads_whole_and_is_readable(name, view, site):
    page, problems = open_page(view, site, f"{name}.html")
    assert not problems
    assert page.evaluate("document.documentElement.dataset.theme") == view.theme

    for source, natural, shown, alt in page.evaluate(IMAGES):
        assert natural > 0 and shown > 0, f"{source} does not show"
        assert alt and not alt.endswith((".png", ".svg")), f"{source} has no text for readers who cannot see it"
    assert page.locator("mjx-merror").count() == 0, "a formula does not parse"
    assert page.locator(".bd-article .math").count() <= page.locator(".bd-article mjx-container").count()

    texts = page.evaluate(CONTRAST)
    assert len(texts) > 3
    dim = [f"{contrast:.2f} {text}" for contrast, text in texts if contrast < 4.5]
    assert not dim, f"text too close to its background: {dim}"

    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= VIEWS[view.name][1], f"the page scrolls sideways: {width} pixels"


def test_chapters_have_figures(browser, site):
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    for name in (page for page in PAGES if "/runs/" in page):
        page, _ = open_page(context, site, f"{name}.html")
        assert page.locator(".bd-article img").count() > 0, name
    context.close()


def test_front_door_leads_to_the_introduction(browser, site):
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    page, _ = open_page(context, site, "index.html")
    page.wait_for_url(f"{site}/{PAGES[0]}.html")
    context.close()


def test_search_finds_a_word_without_a_network(browser, site):
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    page, problems = open_page(context, site, "search.html?q=register")
    page.locator("#search-results li a").first.wait_for()
    assert not problems
    context.close()


def test_verdicts_on_the_page_are_those_of_the_results(browser, site):
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    page, _ = open_page(context, site, "book/verdicts.html")
    judged = claims.verdicts()
    shown = page.locator("table.verdicts .verdict").all_inner_texts()
    shown = [text.partition(" ")[2] for text in shown]
    controls = claims.controls().state
    ledger = claims.load()["claims"]
    chapters = list(dict.fromkeys(claim["chapter"] for claim in ledger))
    ledger.sort(key=lambda claim: chapters.index(claim["chapter"]))  # a table for each chapter
    cells = judged.set_index(["claim", "model"]).verdict
    expected = [cells[claim["id"], model] for claim in ledger for model in judged.model.unique()]
    assert shown == expected + controls.tolist()

    folded = page.locator("table.verdicts details").first
    assert not folded.locator("code").is_visible()
    folded.locator("summary").focus()
    page.keyboard.press("Enter")
    assert folded.locator("code").is_visible()
    context.close()


class Anchors(HTMLParser):
    """The links of a page and the places in it that a link can point to."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        self.links += [values[key] for key in ("href", "src") if values.get(key)]


@pytest.mark.parametrize("name", PAGES)
def test_links_inside_the_book_resolve(name, html):
    read = functools.cache(lambda path: Anchors(path.read_text(encoding="utf-8")))
    page = html / f"{name}.html"
    broken = []
    for link in read(page).links:
        if urlparse(link).scheme or link.startswith(("#", "//")) and len(link) < 2:
            continue
        address, anchor = urldefrag(urljoin(f"{name}.html", link))
        target = html / unquote(urlparse(address).path)
        if not target.is_file():
            broken.append(link)
        elif anchor and target.suffix == ".html" and unquote(anchor) not in read(target).ids:
            broken.append(link)
    assert not broken
