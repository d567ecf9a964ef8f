"""Delivery without a task a reader: whoever appended steps each idle reader's `send` once.

`stream.Stream` gives each connection a task that waits for its next batch. For a topic with thousands of readers most
of a delivery's cost is then to wake and switch to that task. Here the connection's own task only waits for the client
to leave, and sending is done by whoever has something to send:

- While a reader is *idle* (all it could have has been sent) it stands in its tail's `Audience`. When the tail changes,
  the audience steps each idle reader's `send` coroutine once. With a client that reads it finishes there, without
  suspension.
- If it suspends, the client is slow: the suspended coroutine is carried on by a *carrier*, a task of the app's, which
  then sends what has come meanwhile, from the cursor, and makes the reader idle again when it has caught up.
- A reader begins with a carrier: opening, and what is in the log already.

Rules:

1.  Only under our own runner, which knows its server: uvicorn's `send` awaits nothing but its own flow control, needs
    no task of its own to do so, and leaves the message alone. Under any other server, and on trio, a task a reader
    does the same job (`Stream`), and the same tests run over both.
2.  A suspended coroutine has handed its future to nobody yet. The first thing its carrier does is hand it to the loop.
3.  An exception out of one reader's `send` ends that reader: never the publisher, never the next reader.
4.  A large audience is stepped in slices of `SLICE`, with a turn of the loop between them.
5.  At most one `send` of a connection is in flight: a reader is idle, or it has a carrier.
"""

import asyncio
import logging
import types
from collections.abc import Coroutine, Generator
from typing import Any, Final

from anyio import CancelScope
from anyio.abc import TaskGroup

from ssecore.log.tail import Reader, Tail
from ssecore.request import EndReason, Request
from ssecore.responses import Send
from ssecore.stream import Stream, StreamOptions, Timekeeper
from ssecore.wire import HEARTBEAT

__all__ = ["DirectStream"]

logger = logging.getLogger("sseapp")

#: Rule 4. About 3 ms of sends.
SLICE: Final = 256


class _Audience:
    """The idle readers of one tail."""

    def __init__(self, tail: Tail) -> None:
        self.idle: dict[DirectStream, None] = {}
        self._tail = tail
        self._loop = asyncio.get_running_loop()
        self._planned = False
        self._round: list[DirectStream] = []
        self._batch = b""
        self._message: dict[str, Any] = {}

    def changed(self) -> None:
        # On the loop's next turn: what is appended in this one travels together.
        if not self._planned:
            self._planned = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        if not self._round:
            self._round = list(self.idle)
        slice_, self._round = self._round[:SLICE], self._round[SLICE:]
        for stream in slice_:
            if stream in self.idle:
                try:
                    stream.step()
                except Exception as error:  # rule 3
                    stream.failed(error)
        if self._round:
            self._loop.call_soon(self._step)
            return
        self._planned = False
        # A change while the slices were on their way: who came first may not have it. Nobody is idle after the end.
        if any(stream.source.after < self._tail.top or self._tail.ended for stream in self.idle):
            self.changed()

    def message(self, batch: bytes) -> dict[str, Any]:
        """The same message for all who get the same batch (rule 1)."""
        if batch is not self._batch:
            self._batch = batch
            self._message = {"type": "http.response.body", "body": batch, "more_body": True}
        return self._message


class DirectStream(Stream):
    """A `Stream` of a `Reader` that needs no task but the connection's own."""

    source: Reader

    def __init__(
        self,
        request: Request,
        send: Send,
        source: Reader,
        headers: list[tuple[bytes, bytes]],
        options: StreamOptions,
        carriers: TaskGroup,
    ) -> None:
        super().__init__(request, send, source, headers, options)
        self._carriers = carriers
        self._carrier = CancelScope()
        self._over = False
        self._starting: asyncio.Task[None] | None = None
        audience = source.tail.audience
        if not isinstance(audience, _Audience):
            audience = source.tail.audience = _Audience(source.tail)
            source.tail.on_change = audience.changed
        self._audience: _Audience = audience
        source.on_wake = self._woken

    async def run(self, timekeeper: Timekeeper | None) -> None:
        assert timekeeper is not None, "an app with carriers is running, and has a timekeeper"
        timekeeper.streams.add(self)
        try:
            with self._scope:
                self._carriers.start_soon(self._carry, self._carrier, self._open())
                await self._request.disconnect()
                self.abort("client")
        finally:
            if not self._over:
                self.abort("cancelled")
            self.source.close()
            timekeeper.streams.discard(self)
            self._log_unheard()
        self._raise_early()

    def abort(self, reason: EndReason) -> None:
        self._leave()
        super().abort(reason)
        self._carrier.cancel()

    def _leave(self) -> None:
        self._over = True
        self._audience.idle.pop(self, None)

    def step(self) -> None:
        """Send what can be had without waiting. Only while idle."""
        batch = self.source.ready()
        if batch is None or self.source.finished:
            self._start_carrier(_given(batch or b""))
        elif batch:
            self._step_send(batch)

    def _woken(self) -> None:
        if self in self._audience.idle:
            self.step()

    def _beat(self) -> None:
        if self in self._audience.idle:
            self._step_send(HEARTBEAT)

    def _step_send(self, batch: bytes) -> None:
        """Hot path, once for each reader and change: one coroutine, one step of it."""
        self.progress += 1
        self._count(batch)
        sending = self._send_message(self._audience.message(batch))
        try:
            waits_for = sending.send(None)  # type: ignore[attr-defined]
        except StopIteration:
            self.progress += 1
        except Exception as error:  # rule 3
            self.failed(error)
        else:
            self._start_carrier(self._rest(sending, waits_for))  # type: ignore[arg-type]

    def _start_carrier(self, first: Coroutine[Any, Any, bytes | None]) -> None:
        # By a task: whoever steps may be a callback of the loop, where anyio doesn't know which library runs.
        del self._audience.idle[self]
        self._starting = asyncio.get_running_loop().create_task(self._start(first))

    async def _start(self, first: Coroutine[Any, Any, bytes | None]) -> None:
        self._carriers.start_soon(self._carry, self._carrier, first)

    async def _rest(self, sending: Coroutine[Any, Any, None], waits_for: Any) -> bytes:
        await _resumed(sending, waits_for)
        self.progress += 1
        return b""

    async def _carry(self, scope: CancelScope, first: Coroutine[Any, Any, bytes | None]) -> None:
        """Send what `first` gives and all that follows, until there is nothing more to be had without waiting."""
        source = self.source
        try:
            with scope:
                batch = await first
                while batch is not None and not self._over:
                    if source.finished:
                        await self._finish(batch)
                        break
                    if batch:
                        await self._send_body(batch)
                    batch = source.ready()
                    if batch is None:
                        batch = await source.from_log()
                    elif not batch and not source.finished:
                        # The next carrier's, from now on: an abort before its first step has to cancel it as well.
                        self._carrier = CancelScope()
                        self._audience.idle[self] = None
                        return
                self._leave()
                self._scope.cancel()
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """This reader is over; the others go on."""
        if not isinstance(error, OSError):
            logger.error("a server's send failed", exc_info=error)
        self.abort("client")


async def _given(batch: bytes) -> bytes:
    return batch


@types.coroutine
def _resumed(sending: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """Await what was begun elsewhere: it waits for something that nobody has been told of (rule 2)."""
    step, value = sending.send, None
    while True:
        try:
            value = yield waits_for
        except GeneratorExit:
            sending.close()
            raise
        except BaseException as thrown:
            step, value = sending.throw, thrown
        else:
            step = sending.send
        try:
            waits_for = step(value)
        except StopIteration:
            return
