"""An `Exchange` that offers what our runner's protocol does: streams are parked on lines, in virtual time."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import sniffio

from ssecore.server.protocol import ParkedConnection
from ssecore.streaming.sender import EXTENSION
from ssecore.testing import Exchange

__all__ = ["is_parked", "lines_offered"]


class _Transport:
    """Takes chunks apart for an exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._closed = False

    def write(self, data: bytes) -> None:
        exchange = self._exchange
        while data:
            size, _, data = data.partition(b"\r\n")
            body, data = data[: int(size, 16)], data[int(size, 16) + 2 :]
            assert not exchange.complete, "a body came after its end"
            if not body:
                exchange.complete = True
            elif not exchange._left.is_set():
                with suppress(anyio.BrokenResourceError):
                    exchange._chunks_in.send_nowait(body)

    def close(self) -> None:
        self._closed = True

    def is_closing(self) -> bool:
        return self._closed


class _Parked(ParkedConnection):
    __slots__ = ("_exchange",)

    def __init__(self, exchange: Any, left: Any) -> None:
        server: Any = SimpleNamespace(
            transport=_Transport(exchange),
            server_state=SimpleNamespace(connections=set(), tasks=set()),
            flow=SimpleNamespace(write_paused=not exchange._open.is_set()),
            config=None,
            app_state=None,
        )
        super().__init__(server, left, keep=False)
        self._exchange = exchange

    def start(self, work: Any) -> None:
        before = set(self._state.tasks)
        super().start(work)
        (task,) = self._state.tasks - before
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception():
            self._exchange.failure = task.exception()
        if self.left is None:
            _end(self._exchange)


class _Server:
    """What an exchange offers in its scope."""

    def __init__(self, exchange: Any) -> None:
        self.left: Any = None
        self._exchange = exchange

    def answers(self, send: Any) -> bool:
        return (
            bool(send == self._exchange._send) and not self._exchange._left.is_set() and not any(self._exchange._to_app)
        )

    def watch(self, left: Any) -> None:
        self.left = left

    def park(self, send: Any, left: Any) -> ParkedConnection | None:
        exchange = self._exchange
        sized = any(name == b"content-length" for name, _ in exchange.raw_headers)
        if not self.answers(send) or exchange._chunks_in._state.max_buffer_size != math.inf or sized:
            return None
        exchange.line = _Parked(exchange, left)
        self.left = None
        return exchange.line  # type: ignore[no-any-return]


def _end(exchange: Exchange) -> None:
    exchange._chunks_in.close()
    exchange.ended.set()


def is_parked(exchange: Exchange) -> bool:
    """Whether its stream is on a line."""
    return getattr(exchange, "line", None) is not None


@contextmanager
def lines_offered(really: bool = True) -> Iterator[None]:
    """Within it every exchange on asyncio offers a line, if `really`."""
    if not really:
        yield
        return
    block, unblock, disconnect = Exchange.block, Exchange.unblock, Exchange.disconnect

    async def run(self: Any, app: Any) -> None:
        self.server, self.line = _Server(self), None
        self.scope = {**self.scope, "extensions": {EXTENSION: self.server}}
        try:
            await app(self.scope, self._receive, self._send)
        except Exception as error:
            self.failure = error
        finally:
            if self.line is None or self.line.left is None:
                _end(self)
            self.started.set()

    def blocking(self: Any) -> None:
        block(self)
        if is_parked(self):
            self.line.pause_writing()

    def unblocking(self: Any) -> None:
        unblock(self)
        if is_parked(self):
            self.line.resume_writing()

    def leaving(self: Any) -> None:
        gone = self._left.is_set()
        disconnect(self)
        if gone:
            return
        if is_parked(self):
            asyncio.get_running_loop().call_soon(self.line.connection_lost, None)
        elif getattr(self, "server", None) and self.server.left is not None:
            self.server.left()

    # Its own, since a test may undo what it has patched.
    with pytest.MonkeyPatch.context() as patch:
        for name, what in (("run", run), ("block", blocking), ("unblock", unblocking), ("disconnect", leaving)):
            patch.setattr(Exchange, name, what)
        # As under a server: where no task runs, nothing says which library does.
        sniffio.current_async_library_cvar.set(None)
        yield
