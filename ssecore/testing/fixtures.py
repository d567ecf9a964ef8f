"""pytest's way to the kit of `ssecore.testing`: `pytest_plugins = ["ssecore.testing.fixtures"]` in a conftest.py.

Asynchronous fixtures and tests run under the plugin that anyio brings along: mark the tests with `@pytest.mark.anyio`,
or set `anyio_mode = "auto"`.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ssecore.testing import Exchange, opening

__all__ = ["OpenStream", "open_stream"]

OpenStream = Callable[..., Exchange]


@pytest.fixture
async def open_stream(anyio_backend: Any) -> AsyncIterator[OpenStream]:
    """Opens requests as `ssecore.testing.connect` does, with its arguments; all are left at the test's end.

    stream = open_stream(app, "GET", "/countdown/3")
    """
    async with opening() as open_one:
        yield open_one
