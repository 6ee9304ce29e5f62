"""Debian's Chromium, driven by playwright: for tests of the page as people use it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")


@contextmanager
def started() -> Iterator[Any]:
    """A browser."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def visited(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """The page in a window of its own, once its canvas is there. At the end, no script has failed and nothing was asked
    of any other host."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **options})
    failed, foreign = list[str](), list[str]()

    def refuse(route: Any) -> None:
        foreign.append(route.request.url)
        route.abort()

    context.set_default_timeout(20_000)
    # Own requests pass without a look at them: they would wait for a test that sleeps.
    context.route(re.compile(f"^(?!{re.escape(url)}|data:|blob:)"), refuse)
    page = context.new_page()
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(url)
    page.wait_for_selector(".chip[data-subject]", timeout=60_000)
    yield page
    context.close()
    assert not failed and not foreign


def drag(page: Any, start: tuple[float, float], end: tuple[float, float], steps: int = 4) -> None:
    """Press at one place of the picture, given in fractions, and let go at another."""
    stage = page.locator(".stage")
    stage.scroll_into_view_if_needed()  # clicks scroll the page
    box = stage.bounding_box()
    (x, y), (u, v) = ((box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in (start, end))
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move((x + u) / 2, (y + v) / 2, steps=steps)
    page.mouse.move(u, v, steps=steps)
    page.mouse.up()


def number(page: Any, name: str, value: float) -> None:
    """Set a control with a number."""
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def run(page: Any) -> None:
    """Generate, and wait for the end."""
    before = page.locator("#status p").first.inner_text()
    page.click("#go")
    page.wait_for_function(
        """(before) => {
            const said = document.querySelector("#status p")?.innerText ?? "";
            return said.startsWith("Done in") && said !== before;
        }""",
        arg=before,
        timeout=90_000,
    )
