"""A pytest plugin: `pytest_plugins = ["ssecore.testing.fixtures"]` in a conftest.py; needs anyio's plugin."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ssecore.testing import Exchange, opening

__all__ = ["OpenStream", "open_stream"]

OpenStream = Callable[..., Exchange]


@pytest.fixture
async def open_stream(anyio_backend: Any) -> AsyncIterator[OpenStream]:
    """Open requests, with the arguments of `connect`; all are disconnected at the end of the test."""
    async with opening() as open_one:
        yield open_one
