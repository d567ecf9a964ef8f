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

from ssecore.log import Ended
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
        self._done = 0  # of the round
        self._seen: tuple[int, Ended | None] = (0, None)  # what the tail had when the round began
        self._batch = b""
        self._message: dict[str, Any] = {}
        self._chunk = b""

    def changed(self) -> None:
        # On the loop's next turn: what is appended in this one travels together.
        if not self._planned:
            self._planned = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        tail = self._tail
        if not self._done:
            self._round, self._seen = list(self.idle), (tail.top, tail.ended)
        slice_ = self._round[self._done : self._done + SLICE]
        self._done += SLICE
        self._deliver(slice_)
        if self._done < len(self._round):
            self._loop.call_soon(self._step)
            return
        self._round, self._done, self._planned = [], 0, False
        if self._seen != (tail.top, tail.ended):  # while the slices were on their way: who came first may not have it
            self.changed()

    def _deliver(self, streams: list["DirectStream"]) -> None:
        """Hot path: for a reader that is up to date and whose client reads, a few comparisons and one write."""
        idle, tail = self.idle, self._tail
        after = last = -1
        chunk = b""
        if streams and tail.ended is None:
            after = streams[0].source.after
            if (held := tail.since(after)) is not None:
                batch, last = held
                chunk = self.chunk(batch)
        for stream in streams:
            if stream not in idle:
                continue
            try:
                if chunk and stream.source.after == after and (cycle := stream.cycle) is not None:
                    if not cycle.flow.write_paused and not cycle.disconnected:
                        cycle.transport.write(chunk)
                        stream.source.after = last
                        stream.progress += 2
                        continue
                stream.step()
            except Exception as error:  # rule 3
                stream.failed(error)

    def chunk(self, batch: bytes) -> bytes:
        """The same chunk for all who get the same batch."""
        self.message(batch)
        return self._chunk

    def message(self, batch: bytes) -> dict[str, Any]:
        """The same message for all who get the same batch (rule 1)."""
        if batch is not self._batch:
            self._batch = batch
            self._message = {"type": "http.response.body", "body": batch, "more_body": True}
            self._chunk = b"%x\r\n%b\r\n" % (len(batch), batch)
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
        #: Written to without `send`, while this stream is idle; see `connection`.
        self.connection: Connection | None = None
        self._carriers = carriers
        self._carrier: CancelScope | None = None
        self._over = False
        self._starting: asyncio.Task[None] | None = None
        self._waits_for: Any = None
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
            self._begin()
            await self._left(self._request.disconnect())
            if not self._over:
                self.abort("client")
        finally:
            if not self._over:
                self.abort("cancelled")
            self.source.close()
            timekeeper.streams.discard(self)
            self._log_unheard()
        self._raise_early()

    def _begin(self) -> None:
        batch = self.source.ready()
        if batch is None or self.source.finished:
            self.source.say(batch or b"")  # nobody has taken it yet
            self._start_carrier(self._open())
        else:
            self._step_through(self._opened(batch))

    async def _opened(self, batch: bytes) -> None:
        await self._send_start()
        await self._send_body(self._first(batch))

    @types.coroutine
    def _left(self, watching: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        """Await the client's leaving, or the end of this stream: then what is waited for is cancelled (rule 6)."""
        try:
            while not self._over:
                try:
                    self._waits_for = watching.send(None)
                except StopIteration:
                    return
                if not self._over:
                    yield self._waits_for
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._over or (task is not None and task.cancelling()):
                raise
        finally:
            self._waits_for = None
            watching.close()

    def _cut(self) -> None:
        self._leave()
        if self._carrier is not None:
            self._carrier.cancel()

    def _leave(self) -> None:
        """Nothing more is sent."""
        self._over = True
        self._audience.idle.pop(self, None)
        if self._waits_for is not None:
            self._waits_for.cancel()

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
                        self.cycle = getattr(self._send_message, "__self__", None)
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
