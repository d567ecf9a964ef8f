"""Merges streams of other servers into one, and resumes each after a cut.

    SOURCES='https://a.example/stream https://b.example/stream' uvicorn --factory examples.merge_sources:make
    curl -N localhost:8000/merged

Each event has the number of its source. If a source fails, an event `source_failed` is sent, and the others continue.
"""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from sseapp import GET, Event, Request, SSEApp, merge
from ssecore.client import Source, connect


async def numbered(number: int, source: Source) -> AsyncIterator[Event]:
    async for event in source:
        yield Event({"source": number, "data": event.data}, event.event)


async def merged(request: Request) -> AsyncIterator[Event]:
    async with AsyncExitStack() as stack:
        sources = [await stack.enter_async_context(connect(url, gaps="yield")) for url in os.environ["SOURCES"].split()]
        events = [numbered(number, source) for number, source in enumerate(sources)]
        items = await stack.enter_async_context(merge(*events, failures=True))
        async for item in items:
            yield Event({"error": str(item)}, "source_failed") if isinstance(item, Exception) else item
    yield Event("", "complete")


def make() -> SSEApp:
    return SSEApp([GET("/merged", merged)])
