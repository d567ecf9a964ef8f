"""Small streams to test a client with."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
import msgspec
from msgspec import Meta

from ssecore.dialects import DATA_ONLY
from ssecore.errors import BadRequest
from ssecore.http.request import Request
from ssecore.http.routes import GET
from ssecore.streaming.merge import merge
from ssecore.wire import Event, encode

__all__ = ["ROUTES"]

Interval = Annotated[float, Meta(ge=0, le=3600)]
DONE = Event("[DONE]")


class Paced(msgspec.Struct, forbid_unknown_fields=True):
    interval: Interval = 0.5


class Counted(Paced):
    count: Annotated[int, Meta(ge=0, le=1_000_000)] = 10


class Countdown(msgspec.Struct, forbid_unknown_fields=True):
    interval: Interval = 1.0


class Errors(msgspec.Struct, forbid_unknown_fields=True):
    total: Annotated[int, Meta(ge=0, le=1_000_000)] = 100
    at: Annotated[int, Meta(ge=0, le=1_000_000)] = 50
    interval: Interval = 0.05


class Limit(msgspec.Struct, forbid_unknown_fields=True):
    limit: Annotated[float, Meta(ge=0, le=3600)] = 30
    interval: Interval = 1.0


class Count(msgspec.Struct):
    count: int
    message: str


class Percent(msgspec.Struct):
    progress: Annotated[int, Meta(ge=0, le=100)]


class Remaining(msgspec.Struct):
    remaining: Annotated[int, Meta(ge=1)]


async def counter(request: Request) -> AsyncIterator[Event]:
    """Count, with named events."""
    query: Counted = request.query
    interval = query.interval
    for n in range(query.count):
        yield Event({"count": n, "message": f"Update {n}"}, "message")
        if interval:  # even `sleep(0)` would cost a turn of the loop for each event
            await anyio.sleep(interval)
    yield Event({"done": True}, "complete")


async def data_only(request: Request) -> AsyncIterator[Event]:
    """The same count without named events."""
    query: Counted = request.query
    for n in range(query.count):
        yield Event({"count": n, "message": f"Update {n}"})
        if query.interval:
            await anyio.sleep(query.interval)
    yield DONE


async def hello(request: Request) -> AsyncIterator[Event]:
    """Four words."""
    for word in ("Hello", "from", "Server-Sent", "Events!"):
        yield Event({"text": word}, "message")
        await _pause(request)
    yield Event({"done": True}, "complete")


async def progress(request: Request) -> AsyncIterator[Event]:
    """Progress in steps of ten."""
    for percent in range(0, 101, 10):
        yield Event({"progress": percent}, "progress")
        await _pause(request)
    yield Event({"done": True}, "complete")


async def shapes(request: Request) -> AsyncIterator[Event]:
    """The four forms of an event."""
    yield Event("data alone")
    await _pause(request)
    yield Event("with an event type", "message")
    await _pause(request)
    yield Event({"count": 42}, "update", "msg-123")
    await _pause(request)
    yield Event("Setting retry", "config", retry=5000)


async def merged(request: Request) -> AsyncIterator[Event]:
    """Merge two sources with different intervals, in the order of arrival."""

    async def source(name: str, count: int, interval: float) -> AsyncIterator[dict[str, Any]]:
        for n in range(count):
            yield {"source": name, "value": n}
            await anyio.sleep(interval)

    pace = request.query.interval
    async with merge(source("A", 5, pace), source("B", 3, pace * 1.7)) as items:
        async for item in items:
            yield Event(item)
    yield DONE


async def errors(request: Request) -> AsyncIterator[Event]:
    """Two kinds of failure: an item that can't be encoded is reported and skipped; a failing source ends the stream."""
    query: Errors = request.query

    async def source() -> AsyncIterator[Any]:
        for n in range(query.total):
            if n == query.at:
                raise RuntimeError(f"the source failed at item {n}")
            # One item in ten can't be encoded.
            yield f"Item {n}" if n % 10 != 7 else f"Item {n} \ud800"

    yield Event({"status": "ok"}, "connected")
    items = source()
    try:
        async for item in items:
            event = Event(item)
            try:
                encode(event)
            except ValueError as error:
                event = Event({"error": str(error)}, "item_error")
            yield event
            if query.interval:
                await anyio.sleep(query.interval)
    except RuntimeError as error:
        yield Event({"error": str(error), "type": type(error).__name__, "fatal": True}, "error")
    yield Event("", "done")


async def limited(request: Request) -> AsyncIterator[Event]:
    """Count until a time limit."""
    # Not by `move_on_after`: a generator must not yield inside a cancel scope.
    query: Limit = request.query
    ends_at, count = anyio.current_time() + query.limit, 0
    while anyio.current_time() < ends_at:
        yield Event({"count": count}, "message")
        count += 1
        left = ends_at - anyio.current_time()
        await anyio.sleep(min(query.interval, left))
        if left <= query.interval:  # the last pause; a timer may fire slightly early
            break
    yield Event({"error": "Stream timeout exceeded", "timeout": _plain(query.limit)}, "error")


async def countdown(request: Request, seconds: int) -> AsyncIterator[Event]:
    """Count down by seconds."""
    if not 0 <= seconds <= 3600:
        raise BadRequest("seconds: must be from 0 to 3600", field="seconds")
    for remaining in range(seconds, 0, -1):
        yield Event({"remaining": remaining}, "countdown")
        await _pause(request)
    yield Event({"message": "Countdown finished!"}, "complete")


async def process(request: Request) -> AsyncIterator[Event]:
    """Three steps and a result."""
    for step in ("Analyzing", "Processing", "Finalizing"):
        yield Event({"step": step}, "progress")
        await _pause(request)
    yield Event({"result": "Done!"}, "complete")


async def _pause(request: Request) -> None:
    if request.query.interval:
        await anyio.sleep(request.query.interval)


def _plain(number: float) -> float | int:
    """30, not 30.0."""
    return int(number) if number == int(number) else number


ROUTES = [
    GET("/stream", counter, query=Counted, events={"message": Count, "complete": Any}),
    GET("/stream/data", data_only, query=Counted, dialect=DATA_ONLY),
    GET("/stream/hello", hello, query=Paced, events={"message": Any, "complete": Any}),
    GET("/stream/progress", progress, query=Paced, events={"progress": Percent, "complete": Any}),
    GET("/stream/format", shapes, query=Paced, events={"message": str, "update": Any, "config": str}),
    GET("/stream/merge", merged, query=Paced, dialect=DATA_ONLY),
    GET(
        "/stream/errors",
        errors,
        query=Errors,
        events={"message": str, **dict.fromkeys(("connected", "item_error", "error"), Any), "done": None},
    ),
    GET("/stream/timeout", limited, query=Limit, events={"message": Any, "error": Any}),
    GET("/countdown/{seconds:int}", countdown, query=Countdown, events={"countdown": Remaining, "complete": Any}),
    GET("/process/stream", process, query=Paced, events={"progress": Any, "complete": Any}),
]
