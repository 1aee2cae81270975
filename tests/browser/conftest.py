"""Pages in Debian's headless Chromium: what they log, what they ask of other machines, and what axe-core finds.

All of it is marked slow, and skipped where the extra `browser` or Chromium itself is absent.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

HERE = {"", "localhost", "127.0.0.1", "[::1]"}
NARROW, WIDE = 390, 1440
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
COLOURS = ("light", "dark")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. Of a module only: playwright's event loop must not run where other tests start their own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium, as of Debian's package of that name")
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=chromium)
        yield launched
        launched.close()


@pytest.fixture
def problems() -> list[str]:
    """What pages logged as errors, and what they asked of other machines; a test that expects some clears it."""
    return []


@pytest.fixture
def visit(browser, problems) -> Iterator[Callable[..., Any]]:
    """Open a page: ``visit(url, width=390, colours="dark")``; further keywords are playwright's ``new_context``'s.

    When the test ends, no page may have logged an error or asked anything of another machine.
    """
    contexts: list[Any] = []

    def opened(url: str | Path, *, width: int = WIDE, colours: str = "light", **context: Any) -> Any:
        size = {"width": width, "height": 844 if width == NARROW else 900}
        contexts.append(
            made := browser.new_context(viewport=size, color_scheme=colours, reduced_motion="reduce", **context)
        )
        page = made.new_page()
        page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: problems.append(f"script: {error}"))
        page.on("request", lambda request: problems.extend(_elsewhere(request.url)))
        page.goto(url.resolve().as_uri() if isinstance(url, Path) else url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def address_of() -> Iterator[Callable[[Any], str]]:
    """Serve a front; a test that names it before ``visit`` has its pages closed before the server ends."""
    with contextlib.ExitStack() as stack:
        yield lambda front: f"http://127.0.0.1:{stack.enter_context(front.sockets())[0]}"


def _elsewhere(url: str) -> list[str]:
    parts = urlsplit(url)
    known = parts.scheme in {"data", "blob", "file", "about"} or (parts.hostname or "") in HERE
    return [] if known else [f"request of another machine: {url}"]


@pytest.fixture
def axe() -> Callable[[Any], list[str]]:
    """Return what axe-core finds on a page: rule, element and advice; empty if nothing."""
    library = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra browser")

    def check(page: Any) -> list[str]:
        found = library.Axe().run(page, options={"runOnly": {"type": "tag", "values": RULES}}).response
        return [
            f"{violation['id']} ({violation['impact']}): {node['target']}: {node['failureSummary']}"
            for violation in found["violations"]
            for node in violation["nodes"]
        ]

    return check


def overflows(page: Any) -> bool:
    """Return whether a page is wider than its window, so that a phone must scroll sideways."""
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
