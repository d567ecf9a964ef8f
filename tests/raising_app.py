"""Handlers that raise what is no `Exception`, and handlers that don't end, for servers that have to live through both.

`python -m tests.raising_app` serves it with our own runner; `make` is a factory for other servers.
"""

import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import anyio
import anyio.lowlevel
from anyio import get_cancelled_exc_class

from sseapp import GET, JSON, Event, Request, Response, Run, Settings, SSEApp, Subscription, from_thread, merge
from ssecore.dialects import DATA_ONLY
from ssecore.server.runner import serve
from ssecore.streaming.progress import Report

__all__ = ["KINDS", "make"]


class Panic(BaseException):
    """As PyO3 raises it where code in Rust panics."""


KINDS: Final[dict[str, Callable[[], BaseException]]] = {
    "exit": lambda: SystemExit(3),
    "interrupt": KeyboardInterrupt,
    "generator-exit": GeneratorExit,
    "panic": lambda: Panic("index out of bounds"),
    "group": lambda: BaseExceptionGroup("several", [Panic("one"), ValueError("two")]),
}


async def first(request: Request, kind: str) -> AsyncIterator[Event]:
    """Before its first event."""
    raise KINDS[kind]()
    yield Event("never")


async def second(request: Request, kind: str) -> AsyncIterator[Event]:
    yield Event("1")
    await anyio.lowlevel.checkpoint()
    raise KINDS[kind]()


async def closing(request: Request, kind: str) -> AsyncIterator[Event]:
    """While it is closed."""
    try:
        yield Event("1")
        await anyio.sleep_forever()
    finally:
        raise KINDS[kind]()


async def merged(request: Request, kind: str) -> AsyncIterator[Event]:
    async with merge(second(request, kind)) as events:
        async for event in events:
            yield event


async def threaded(request: Request, kind: str) -> AsyncIterator[Event]:
    def work(report: Report[str]) -> None:
        report("1")
        raise KINDS[kind]()

    async with from_thread(work) as items:
        async for item in items:
            yield Event(item)


async def unary(request: Request, kind: str) -> Response:
    raise KINDS[kind]()


async def count(request: Request) -> AsyncIterator[Event]:
    for number in (1, 2, 3):
        yield Event(str(number))
    yield Event("", "complete")


async def seen(request: Request, kind: str, at: str, run: str) -> Any:
    """The run, of which the event `at` can't be translated."""

    def translate(event: Event) -> Event:
        if event.data == at:
            raise KINDS[kind]()
        return event

    return await request.runs.view(request, run, translate=translate)


async def pulsing(request: Request, kind: str) -> Subscription:
    def pulse() -> Event:
        raise KINDS[kind]()

    return Subscription("news", Event("", "init"), pulse, pulse_s=0.01)


def accepted(request: Request, run: str) -> Response:
    raise KINDS[request.path_params["kind"]]()


async def stubborn(request: Request) -> AsyncIterator[Event]:
    """Swallows every cancellation."""
    yield Event("1")
    while True:
        try:
            await anyio.sleep(0.05)
        except get_cancelled_exc_class():
            pass


async def fine(request: Request) -> Response:
    return JSON("fine")


def who(request: Request) -> str:
    if kind := request.headers.get("x-raise"):
        raise KINDS[kind]()
    return "ann"


def make() -> SSEApp:
    routes = [
        GET("/healthz", fine, open=True),
        GET("/count", count),
        GET("/first/{kind}", first),
        GET("/second/{kind}", second),
        GET("/data/{kind}", second, dialect=DATA_ONLY),
        GET("/closing/{kind}", closing),
        GET("/merged/{kind}", merged),
        GET("/threaded/{kind}", threaded),
        GET("/unary/{kind}", unary),
        GET("/pulsing/{kind}", pulsing),
        GET("/runs-of/count", count, run=Run()),
        GET("/runs-of/first/{kind}", first, run=Run()),
        GET("/runs-of/second/{kind}", second, run=Run()),
        GET("/runs-of/closing/{kind}", closing, run=Run()),
        GET("/runs-of/accepted/{kind}", closing, run=Run(accepted=accepted)),
        GET("/runs-of/stubborn", stubborn, run=Run()),
        GET("/stubborn", stubborn),
        GET("/seen/{kind}/{at}/{run}", seen),
    ]
    return SSEApp(routes, Settings.from_env(), caller=who)


if __name__ == "__main__":
    app = make()
    sys.exit(serve(app, app.settings))
