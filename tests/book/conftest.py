"""The rendered book and a browser to read it with.

The tests read `_build/html`, which `make book` makes. They need Chromium ($CHROMIUM, else /usr/bin/chromium or what
is on the path); without it they are skipped, or fail if SINKSTUDY_REQUIRE_BROWSER=1.
"""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest

from sinkstudy.paths import ROOT

BUILD = ROOT / "_build"
HTML = BUILD / "html"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
PATIENCE = 120_000  # milliseconds: a busy machine is slow, not broken


@pytest.fixture(scope="session")
def html() -> Path:
    """The folder of the rendered book."""
    if not (HTML / "index.html").exists():
        pytest.fail("run make book first: there is no _build/html/index.html")
    return HTML


@pytest.fixture(scope="session")
def site(html):
    """Address of the book on a free port of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
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


# For each element inside a selector with text of its own: contrast (WCAG 2) of its colour with the backgrounds behind.
CONTRAST = """within => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3])).concat(1);
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = rgb => 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]);
  const found = [];
  for (const element of document.querySelectorAll(`${within} *`)) {
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
