"""A real browser: Chromium, with a page whose `EventSource`s write down what they see.

from tests import chromium
browser, page = chromium.browser, chromium.page     # the fixtures

def test_something(page: Page) -> None:
    page.goto(f"{origin}/healthz")
    page.evaluate(chromium.LISTEN, ["news", "/topics/news"])
    chromium.seen(page, "news").closed
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.needs import find

__all__ = ["LISTEN", "Seen", "browser", "launched", "page", "seen"]

expect.set_options(timeout=20_000)  # playwright's own 5 s are little for a machine that is busy

#: What it needs to run as root and without a screen, and nothing that it sends by itself.
ARGUMENTS: Final = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()

#: Collects what an `EventSource` sees, and says when it has given up for good: after a 204 it doesn't come back.
LISTEN: Final = """
([name, url]) => {
  const seen = {events: [], opened: 0, errors: 0, closed: false}
  ;(window.seen ??= {})[name] = seen
  const source = new EventSource(url)
  ;(window.sources ??= {})[name] = source
  const note = (event) => seen.events.push([event.type, event.data, event.lastEventId])
  for (const type of ["init", "message", "complete", "done", "gap"]) source.addEventListener(type, note)
  source.addEventListener("open", () => seen.opened++)
  source.addEventListener("error", (event) => {
    if (event.data !== undefined) { note(event); return }
    seen.errors++
    if (source.readyState === EventSource.CLOSED) seen.closed = true
  })
}
"""


@dataclass
class Seen:
    """What one `EventSource` has seen so far."""

    events: list[tuple[str, str, str]]  #: type, data, id
    opened: int
    errors: int
    closed: bool  #: it has given up for good

    @property
    def ids(self) -> list[str]:
        return [id for _, _, id in self.events]

    @property
    def data(self) -> list[str]:
        return [data for _, data, _ in self.events]


def seen(page: Page, name: str) -> Seen:
    return Seen(**page.evaluate(f"window.seen[{name!r}]"))


@contextmanager
def launched() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find("chromium"), headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(ignore_https_errors=True)
    yield page
    page.close()
