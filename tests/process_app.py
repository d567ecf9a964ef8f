"""The service with handlers that don't let it end, and one that makes it fail, for servers as processes.

`python -m tests.process_app` serves it with our own runner; `make` is a factory for other servers.
"""

import re
import sys
import time
from collections.abc import AsyncIterator
from typing import Final

import anyio
import msgspec

from handlers import ROUTES, resources
from sseapp import GET, Event, Request, Response, Run, Settings, SSEApp
from ssecore.server.runner import serve
from ssecore.streaming.sender import Timekeeper

_failing: Final = anyio.Event()


async def swallow(request: Request) -> AsyncIterator[Event]:
    """Goes on when it is cancelled."""
    yield Event("begun")
    await _sleep_on()


async def swallow_answer(request: Request) -> Response:
    print("begun", flush=True)
    await _sleep_on()
    return Response()


async def _sleep_on() -> None:
    while True:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            continue


async def asleep(request: Request) -> AsyncIterator[Event]:
    """Blocks the event loop; other threads run."""
    yield Event("begun")
    await anyio.sleep(0.1)
    time.sleep(3600)  # noqa: ASYNC251


async def compute(request: Request) -> AsyncIterator[Event]:
    """Blocks every thread of Python's: what it calls never lets go of the interpreter's lock."""
    yield Event("begun")
    await anyio.sleep(0.1)
    re.match("(a+)+$", "a" * 60 + "b")


class Loudness(msgspec.Struct):
    mib: int


async def shout(request: Request) -> Response:
    for _ in range(request.query.mib * 1024):
        sys.stderr.write("x" * 1023 + "\n")
    return Response()


async def fail(request: Request) -> Response:
    """What belongs to the app as a whole fails."""
    _failing.set()
    return Response()


async def run_timekeeper(self: Timekeeper) -> None:
    await _failing.wait()
    raise RuntimeError("the timekeeper broke")


def make() -> SSEApp:
    Timekeeper.run = run_timekeeper  # type: ignore[method-assign]
    own = [
        GET("/swallow", swallow),
        GET("/swallow/run", swallow, run=Run()),
        GET("/swallow/answer", swallow_answer),
        GET("/asleep", asleep),
        GET("/compute", compute),
        GET("/shout", shout, query=Loudness),
        GET("/fail", fail),
    ]
    return SSEApp([*ROUTES, *own], Settings.from_env(), lifespan=lambda app: resources(app.settings))


if __name__ == "__main__":
    app = make()
    sys.exit(serve(app, app.settings))
