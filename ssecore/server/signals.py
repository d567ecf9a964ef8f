"""Hear of SIGTERM, SIGINT and SIGHUP under a server that tells an app of its end too late.

uvicorn says so (by the lifespan) when all connections are closed, which a stream never does by itself. So the app puts
a handler of its own before the server's, which tells the loop and then does what the server would have done.
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
    """Within the block a signal calls `heard` in the running asyncio loop, and the old handler besides.

    Does nothing outside of the main thread, on trio, and for a signal that nobody handles in Python: its default ends
    the process, and so it stays.
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
            if signal.getsignal(number) is ours:  # else somebody came after us, and calls us
                signal.signal(number, old)


def _handler(loop: asyncio.AbstractEventLoop, heard: Callable[[], object], old: Handler) -> Handler:
    def handle(number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(heard)
        old(number, frame)

    return handle
