"""Delivery without a task a reader: whoever appended steps each idle reader's `send` once.

`stream.Stream` gives each connection a task that waits for its next batch. For a topic with thousands of readers most
of a delivery's cost is then to wake and switch to that task. Here the connection's own task only waits for the client
to leave, and sending is done by whoever has something to send:

- While a reader is *idle* (all it could have has been sent) it stands in its tail's `Audience`. When the tail changes,
  the audience steps each idle reader's `send` coroutine once. With a client that reads it finishes there, without
  suspension.
- Where the server's connection is known (`connection`), there isn't even a `send`: what is due is framed as a chunk
  once, and written to each.
- If it suspends, the client is slow: the suspended coroutine is carried on by a *carrier*, a task of the app's, which
  then sends what has come meanwhile, from the cursor, and makes the reader idle again when it has caught up.
- A reader begins with its opening, stepped in the same way. What the tail doesn't hold any more a carrier sends.

Rules:

1.  Only under our own runner, which knows its server: uvicorn's `send` awaits nothing but its own flow control, needs
    no task of its own to do so, and leaves the message alone. Under any other server, and on trio, a task a reader
    does the same job (`Stream`), and the same tests run over both.
2.  A suspended coroutine has handed its future to nobody yet. The first thing its carrier does is hand it to the loop.
3.  An exception out of one reader's `send` ends that reader: never the publisher, never the next reader.
4.  A large audience is stepped in slices of `SLICE`, with a turn of the loop between them.
5.  At most one `send` of a connection is in flight: a reader is idle, or it has a carrier.
6.  The connection's own task awaits the client's leaving and nothing else. A stream that ends by itself cancels what
    the task waits for, not the task: a cancel scope would cost each connection 0.7 KiB.
7.  A generator's events are sent in the moment in which it begins to wait, before the loop has its turn: no other
    task's work stands between an event and its client.
8.  The pump's task is asyncio's own, and only this module cancels it: once, and after `CLOSE_S` again and again. So
    it needs none of the cancel scopes that make anyio's cancellations come once (1.8 KiB a connection).
"""

import asyncio
import logging
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final

from anyio import CancelScope
from anyio.abc import TaskGroup

from ssecore.connection import Connection, chunk, connection_of
from ssecore.log import Ended
from ssecore.log.tail import Reader, Tail
from ssecore.request import Request
from ssecore.responses import Send
from ssecore.stream import CLOSE_S, FIRST_ITEM_S, Pump, Stream, StreamOptions, Timekeeper
from ssecore.wire import HEARTBEAT

__all__ = ["DirectStream", "PumpStream"]

logger = logging.getLogger("sseapp")

#: Rule 4. About 1 ms of sends. Events published between two slices travel together in the next round, so a burst costs
#: each reader fewer writes than it would with larger slices.
SLICE: Final = 64
#: Rule 8.
CANCEL_EACH_S: Final = 0.1
#: No reader is there: sequences begin at 1, cursors at 0.
NOBODY: Final = -1


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
        self._batch = self._chunk = b""

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
        self._batch = self._chunk = b""  # up to twice the tail's size, and what comes next is another one
        if self._seen != (tail.top, tail.ended):  # while the slices were on their way: who came first may not have it
            self.changed()

    def _deliver(self, streams: list["DirectStream"]) -> None:
        """Hot path: for a reader that is up to date and whose client reads, some comparisons and one write."""
        idle, chunk, after, last = self.idle, *self._next(streams)
        size = len(self._batch)
        for stream in streams:
            if stream not in idle:
                continue
            try:
                connection, source = stream.connection, stream.source
                if (
                    connection is not None
                    and source.after == after
                    and not connection.flow.write_paused
                    and not connection.disconnected
                ):
                    connection.transport.write(chunk)
                    source.after = last
                    stream.progress += 2
                    stream.sent_bytes += size
                else:
                    stream.step()
            except Exception as error:  # rule 3
                stream.failed(error)

    def _next(self, streams: list["DirectStream"]) -> tuple[bytes, int, int]:
        """The chunk for those who have read up to the first number; then they have read up to the second."""
        after = streams[0].source.after if streams else NOBODY
        held = self._tail.since(after) if self._tail.ended is None else None
        if held is None:
            return b"", NOBODY, NOBODY
        batch, last = held
        if batch is not self._batch:
            self._batch, self._chunk = batch, chunk(batch)
        return self._chunk, after, last


class _Stepped(Stream):
    """A `Stream` whose connection's own task only awaits the client's leaving; `send` is stepped, or carried."""

    __slots__ = ("_carrier", "_carriers", "_over", "_starting", "_waits_for", "connection")

    source: Any
    #: Written to without `send`, while this stream is idle; see `connection`.
    connection: Connection | None

    def __init__(
        self,
        request: Request,
        send: Send,
        source: Any,
        headers: list[tuple[bytes, bytes]],
        options: StreamOptions,
        status: int,
        carriers: TaskGroup,
    ) -> None:
        super().__init__(request, send, source, headers, options, status)
        self._carriers = carriers
        self._carrier: CancelScope | None = None
        self._over = False
        self._starting: asyncio.Task[None] | None = None
        self._waits_for: Any = None
        self.connection = None

    @types.coroutine
    def run(self, timekeeper: Timekeeper | None) -> Generator[Any, Any, None]:
        """As `Stream.run`; awaits the client's leaving, or the stream's end, which cancels that wait (rule 6)."""
        assert timekeeper is not None, "an app with carriers is running, and has a timekeeper"
        timekeeper.streams.add(self)
        watching = self._request.disconnect()
        try:
            self._begin()
            while not self._over:
                self._waits_for = watching.send(None)
                if not self._over:
                    yield self._waits_for
        except StopIteration:
            self.abort("client")
        except asyncio.CancelledError:
            if not self._over or _cancelling():
                raise
        finally:
            self._waits_for = None
            watching.close()
            if not self._over:
                self.abort("cancelled")
            try:
                yield from self._settled()
            finally:
                self.source.on_wake = None  # else the two hold each other until the garbage collector comes
                self.source.close()
                timekeeper.streams.discard(self)
                self._log_unheard()
        self._raise_early()

    def _begin(self) -> None:
        """Begin to send."""
        raise NotImplementedError

    async def _settled(self) -> None:
        """Until nothing works for this stream any more."""

    def _be_idle(self) -> None:
        """All that can be had without waiting has been sent."""
        raise NotImplementedError

    def _be_busy(self) -> None:
        """Not idle, from now on."""
        raise NotImplementedError

    async def _opened(self, batch: bytes) -> bytes:
        if self._over:
            raise ConnectionAbortedError("it was cut off before it began: the answer is the app's to give")
        return await super()._opened(batch)

    async def _greet(self, batch: bytes) -> None:
        batch = await self._opened(batch)
        if batch:
            await self._send_body(batch)

    def _cut(self) -> None:
        self._leave()
        if self._carrier is not None:
            self._carrier.cancel()

    def _leave(self) -> None:
        """Nothing more is sent."""
        self._over = True
        self._be_busy()
        if self._waits_for is not None:
            self._waits_for.cancel()

    def _step(self, sending: Coroutine[Any, Any, None], *, last: bool = False) -> bool:
        """One step of it, in which it ends where the client reads. Else a carrier goes on with it."""
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return True
        except Exception as error:  # rule 3
            self.failed(error)
        else:
            self._start_carrier(_rest(sending, waits_for, None if last else b""))
        return False

    def _start_carrier(self, first: Coroutine[Any, Any, bytes | None]) -> None:
        # By a task: whoever steps may be a callback of the loop, where anyio doesn't know which library runs.
        self._be_busy()
        self._starting = asyncio.get_running_loop().create_task(self._start(first))

    async def _start(self, first: Coroutine[Any, Any, bytes | None]) -> None:
        self._starting = None
        self._carrier = CancelScope()
        if self._over:  # an abort before this first step
            self._carrier.cancel()
        self._carriers.start_soon(self._carry, self._carrier, first)

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
                        self._carrier = None
                        self._be_idle()
                        return
                self._leave()
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """This stream is over; the others go on."""
        if not isinstance(error, OSError):
            logger.error("a server's send failed", exc_info=error)
        self.abort("client")


class DirectStream(_Stepped):
    """The stream of a `Reader`."""

    __slots__ = ("_audience",)

    source: Reader

    def _begin(self) -> None:
        """Most often all of the opening can be sent without waiting: then no carrier is needed."""
        source = self.source
        audience = source.tail.audience
        if not isinstance(audience, _Audience):
            audience = source.tail.audience = _Audience(source.tail)
            source.tail.on_change = audience.changed
        self._audience: _Audience = audience
        source.on_wake = self._woken
        batch = source.ready()
        if batch is None:
            self._start_carrier(self._open())
        elif source.finished and not batch and self._failed_by_itself():
            self._leave()  # `run` raises it: an HTTP error
        elif source.finished:
            self._start_carrier(self._opened(batch))
        elif self._step(self._greet(batch)):
            self._be_idle()

    def _be_idle(self) -> None:
        self._audience.idle[self] = None
        if self.connection is None and self.source.plain and not self._before_first:  # what is first is told
            self.connection = connection_of(self._send_message)

    def _be_busy(self) -> None:
        self._audience.idle.pop(self, None)

    def step(self) -> None:
        """Send what can be had without waiting. Only while idle."""
        batch = self.source.ready()
        if batch is None or self.source.finished:
            self._start_carrier(_given(batch or b""))
        elif batch:
            self._step(self._send_body(batch))

    def _woken(self) -> None:
        if self in self._audience.idle:
            self.step()

    def _beat(self) -> None:
        if self in self._audience.idle:
            self._step(self._send_body(HEARTBEAT))


class PumpStream(_Stepped):
    """The stream of a `Pump`, which has a task: it steps `send` each time that its generator waits (rule 7)."""

    __slots__ = ("_begun", "_closing", "_idle", "_opening", "_planned", "_pumping")

    source: Pump[Any]

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        self._idle = True
        self._planned = False
        self._begun = False
        self._closing: asyncio.TimerHandle | None = None
        self.source.on_wake, self.source.on_stop = self._woken, self._stop_pump
        self._pumping = loop.create_task(self._pump())
        #: Until the answer has begun: rule 1 of `stream`.
        self._opening: asyncio.TimerHandle | None = loop.call_later(FIRST_ITEM_S, self._woken)

    async def _pump(self) -> None:
        """As the source's `run`: iterate the generator, and close it, whatever happened (rule 8)."""
        source = self.source
        self._begun = True
        try:
            try:
                if not source._stopped:
                    work = source._run_ahead()
                    waits_for = work.send(None)
                    self._waits()
                    await _resumed(work, waits_for, self._waits)
            except StopIteration:  # it never waited
                pass
            finally:
                self._close_in_time()
                try:
                    await source.aclose()
                finally:
                    if self._closing is not None:
                        self._closing.cancel()
        except BaseException as error:
            if not source.took(error):
                raise
        finally:
            source.end()

    def _stop_pump(self) -> None:
        if self._begun and self._closing is None and not self._pumping.done():
            self._close_in_time()
            self._pumping.cancel()

    def _close_in_time(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().call_later(CLOSE_S, self._cut_short)

    def _cut_short(self) -> None:
        logger.warning("a handler did not close within %s s and was cancelled again", CLOSE_S)
        self._again()

    def _again(self) -> None:
        if not self._pumping.done():
            self._pumping.cancel()
            self._closing = asyncio.get_running_loop().call_later(CANCEL_EACH_S, self._again)

    async def _settled(self) -> None:
        self._opened_or_never()
        again: asyncio.CancelledError | None = None
        if not self._pumping.done():
            with CancelScope(shield=True):  # against anyio's cancellations; a server's `Task.cancel` comes through
                while not self._pumping.done():
                    try:
                        await asyncio.wait([self._pumping])
                    except asyncio.CancelledError as error:
                        again = error
        self.source.on_stop = None
        del self._pumping  # its task keeps the exception that ended it, whose traceback keeps this stream
        if again is not None:
            try:
                raise again
            finally:
                del again

    def _opened_or_never(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None

    def _be_idle(self) -> None:
        self._idle = True

    def _be_busy(self) -> None:
        self._idle = False

    def _woken(self) -> None:
        # On the loop's next turn: what wakes is still at work.
        if not self._planned:
            self._planned = True
            asyncio.get_running_loop().call_soon(self._wake_up)

    def _wake_up(self) -> None:
        self._planned = False
        if self._idle:
            self._flush()

    def _waits(self) -> None:
        """Hot path, once for each time that the generator waits, or the buffer is full: in the pump's own task."""
        if self._idle and self.source._frames:
            self._flush()

    def _flush(self) -> None:
        source, connection = self.source, self.connection
        batch = source.ready()
        if source.finished:
            if self._step(self._end(batch), last=True):
                self._leave()
        elif connection is not None and batch and not connection.flow.write_paused and not connection.disconnected:
            try:
                self._count(batch)
                connection.transport.write(chunk(batch))
                self.progress += 2
            except Exception as error:  # rule 3
                self.failed(error)
        elif self._opening is not None:
            self._opened_or_never()
            if self._step(self._greet(batch)):
                self.connection = connection_of(self._send_message)
        elif batch:
            self._step(self._send_body(batch))

    async def _end(self, batch: bytes) -> None:
        if self._opening is not None:
            self._opened_or_never()
            if not batch and self._failed_by_itself():
                return  # `run` raises it: an HTTP error
            batch = await self._opened(batch)
        await self._finish(batch)

    def _beat(self) -> None:
        if self._idle:
            self._step(self._send_body(HEARTBEAT))


def _cancelling() -> bool:
    """Whether it is this task that somebody wants to end, and not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _given(batch: bytes) -> bytes:
    return batch


async def _rest(sending: Coroutine[Any, Any, None], waits_for: Any, then: bytes | None) -> bytes | None:
    await _resumed(sending, waits_for)
    return then


@types.coroutine
def _resumed(
    work: Coroutine[Any, Any, None], waits_for: Any, on_wait: Callable[[], None] | None = None
) -> Generator[Any, Any, None]:
    """Await what was begun elsewhere: it waits for something that nobody has been told of (rule 2)."""
    step: Callable[[Any], Any]
    value: Any
    try:
        while True:
            try:
                step, value = work.send, (yield waits_for)
            except GeneratorExit:
                work.close()
                raise
            except BaseException as thrown:
                step, value = work.throw, thrown
            waits_for = step(value)
            if on_wait is not None:
                on_wait()
    except StopIteration:
        return
    finally:
        value = None  # else an exception's traceback would keep this frame, and the frame the exception
