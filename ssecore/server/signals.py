"""SIGTERM, SIGINT and SIGHUP under any other server.

uvicorn sends `lifespan.shutdown` after all connections are closed, which endless streams never are. So the app
chains its own handler before the server's.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

__all__ = ["chained"]

Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def chained(heard: Callable[[], object]) -> Iterator[None]:
    """Within the block a signal calls `heard` in the running asyncio loop, then the previous handler.

    Does nothing outside the main thread, on trio, and for a signal without a Python handler: its default action stays.
    """
    installed: list[tuple[signal.Signals, Handler, Handler]] = []
    with suppress(RuntimeError):  # trio
        loop = asyncio.get_running_loop()
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):  # Windows lacks the last one
            if (number := getattr(signal, name, None)) is None:
                continue
            old = signal.getsignal(number)
            if threading.current_thread() is threading.main_thread() and callable(old):
                ours = _handler(loop, heard, old)
                signal.signal(number, ours)
                installed.append((number, ours, old))
    try:
        yield
    finally:
        for number, ours, old in installed:
            if signal.getsignal(number) is ours:  # else a later handler replaced this one, and calls it
                signal.signal(number, old)


def _handler(loop: asyncio.AbstractEventLoop, heard: Callable[[], object], old: Handler) -> Handler:
    def handle(number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(heard)
        old(number, frame)

    return handle
