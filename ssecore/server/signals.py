"""Signals under other servers: uvicorn sends `lifespan.shutdown` only after all connections are closed."""

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
def chained(on_signal: Callable[[], object]) -> Iterator[None]:
    """Within the block SIGTERM, SIGINT and SIGHUP call `on_signal` in the asyncio loop, then the previous handler.

    Has no effect outside the main thread, on trio, and for a signal without a Python handler.
    """
    installed: list[tuple[signal.Signals, Handler, Handler]] = []
    with suppress(RuntimeError):  # trio
        loop = asyncio.get_running_loop()
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):  # Windows lacks the last one
            if (number := getattr(signal, name, None)) is None:
                continue
            old = signal.getsignal(number)
            if threading.current_thread() is threading.main_thread() and callable(old):
                ours = _handler(loop, on_signal, old)
                signal.signal(number, ours)
                installed.append((number, ours, old))
    try:
        yield
    finally:
        for number, ours, old in installed:
            if signal.getsignal(number) is ours:  # else a later handler calls this one
                signal.signal(number, old)


def _handler(loop: asyncio.AbstractEventLoop, on_signal: Callable[[], object], old: Handler) -> Handler:
    def handle(number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(on_signal)
        old(number, frame)

    return handle
