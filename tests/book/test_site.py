"""The rendered book in a real browser: every page, in the light and the dark theme and on a narrow screen."""

import functools
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
import yaml

from sinkstudy.book import claims
from sinkstudy.paths import ROOT
from tests.book.conftest import BUILD, CONTRAST, PATIENCE, open_page

VIEWS = {  # name: (theme, width in CSS pixels)
    "light": ("light", 1280),
    "dark": ("dark", 1280),
    "narrow": ("light", 390),
}


def toc_pages() -> list[str]:
    """Every page of the table of contents that the book was rendered from, further runs included."""
    files = [path for path in (BUILD / "toc.yml", ROOT / "_toc.yml") if path.exists()]
    toc = yaml.safe_load(files[0].read_text())
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *(page["file"] for chapter in chapters for page in (chapter, *chapter.get("sections", [])))]


PAGES = toc_pages()


@pytest.fixture(params=VIEWS)
def view(request, browser):
    """A fresh browser context, as of a first-time reader, in one theme and width."""
    theme, width = VIEWS[request.param]
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    context.name, context.theme = request.param, theme
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


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

    texts = page.evaluate(CONTRAST, ".bd-article")
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


FOLDS = """() => [...document.querySelectorAll('.bd-article section')].map(
  section => section.querySelectorAll(':scope > .cell > details.hide').length)"""


def test_code_is_folded_once_a_section_and_none_is_lost(browser, site):
    name = next(name for name in PAGES if "07-ablation" in name)
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    page, _ = open_page(context, site, f"{name}.html")
    assert max(page.evaluate(FOLDS)) == 1
    sent = context.request.get(f"{site}/{name}.html").text()
    folds = page.locator(".bd-article details.hide")
    assert folds.locator(".cell_input").count() == sent.count('<div class="cell_input') > folds.count()
    folds.last.locator("summary").click()
    assert folds.last.locator(".cell_input").first.is_visible()
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
    # Sphinx looks for the anchors of modules by a selector in which their dots mean classes, and shows the page's start
    assert not [problem for problem in problems if "DOM query '[role=main] #module-" not in problem]
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
    judged["chapter"] = judged.claim.map({claim["id"]: claim["chapter"] for claim in ledger})
    some = judged.verdict.isin(claims.JUDGED).groupby([judged.chapter, judged.model]).transform("any")  # has a column
    cells = judged[some].set_index(["claim", "model"]).verdict
    expected = [cells[claim["id"], model] for claim in ledger for model in judged.model.unique()
                if (claim["id"], model) in cells.index]
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
