"""Runs that behave as their path says, for servers that are killed."""

from collections.abc import AsyncIterator
from itertools import count

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from sseapp import GET, Event, Request, Response, Run, Settings, SSEApp
from ssecore.dialects import DATA_ONLY


async def work(request: Request, kind: str) -> AsyncIterator[Event]:
    """Three events and then nothing, but for `silent`; after `complete`, the last would be the end."""
    if kind != "silent":
        for number in (1, 2, 3):
            yield Event(str(number))
    if kind in ("finished", "complete"):
        yield Event("[DONE]") if request.dialect is DATA_ONLY else Event("", "complete")
    if kind != "finished":
        await anyio.sleep_forever()


async def large(request: Request, kind: str) -> AsyncIterator[Event]:
    """One event of 20 MiB, and nothing more."""
    yield Event("x" * (20 * 1024 * 1024), "complete" if kind == "complete" else None)
    await anyio.sleep_forever()


async def counting(request: Request) -> AsyncIterator[Event]:
    """As fast as it goes, for ever."""
    for number in count(1):
        yield Event(f"{number} {'x' * (number % 100)}")
        await checkpoint()


class Until(msgspec.Struct):
    path: str  #: of a file


async def talk(request: Request) -> AsyncIterator[Event]:
    """What a careless reader stumbles over, and a pause, filled with heartbeats, until that file is there."""
    for number in range(1, 31):
        yield Event(f"{number}: é 😀\u2028\x85 {{}}\nsecond line\n", "item" if number % 2 else None)
        while number == 20 and not await anyio.Path(request.query.path).exists():  # noqa: ASYNC110 - a file wakes nobody
            await anyio.sleep(0.02)
    yield Event("", "complete")


async def until(request: Request) -> AsyncIterator[Event]:
    """A few events in each hundredth of a second, until that file is there."""
    for number in count(1):
        if await anyio.Path(request.query.path).exists():
            break
        yield Event(f"{number} {'é' * (number % 50)}")
        if number % 3 == 0:
            await anyio.sleep(0.01)
    yield Event("", "complete")


async def numbers(request: Request) -> AsyncIterator[Event]:
    for number in range(1, 21):
        yield Event({"n": number})
    yield Event("[DONE]")


async def late_end(request: Request) -> AsyncIterator[Event]:
    """Its only event has long been sent when it turns out to be the last."""
    yield Event("only")
    await anyio.sleep(0.1)


async def healthz(request: Request) -> Response:
    return Response(b"well", media_type="text/plain")


def make() -> SSEApp:
    routes = [
        GET("/named/{kind}", work, run=Run()),
        GET("/data/{kind}", work, run=Run(), dialect=DATA_ONLY),
        GET("/large/{kind}", large, run=Run()),
        GET("/talk", talk, query=Until, run=Run()),
        GET("/counting", counting, run=Run()),
        GET("/numbers", numbers, run=Run(), dialect=DATA_ONLY),
        GET("/late-end", late_end),
        GET("/healthz", healthz),
        GET("/until", until, query=Until, run=Run()),
    ]
    return SSEApp(routes, Settings.from_env())
