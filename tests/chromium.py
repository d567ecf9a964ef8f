"""A real browser for tests that need one.

from tests import chromium
browser = chromium.browser     # the fixture, one browser for a module; a test takes it as the argument `browser`
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.needs import find

__all__ = ["browser", "launched"]

#: What it needs to run as root and without a screen, and nothing that it sends by itself.
ARGUMENTS: Final = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


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
