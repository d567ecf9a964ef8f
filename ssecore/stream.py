"""The life of one streaming response.

The sender knows only batches of framed bytes. Where they come from is a `Source`; here it is the `Pump` of an async
generator. Coalescing, heartbeats, deadlines, slow clients and farewells exist once, on the sender's side (`Stream`).

Three tasks work on a connection, in one task group:

    pump      makes every `anext` of the generator, frames what it gives and runs ahead into a bounded buffer
    sender    the connection's own task: takes all that is in the buffer, sends it in one write, waits for more
    watcher   waits in `receive` for the client to leave: the only one who ever hears of it

and one sweep for all connections (`Timekeeper`) tells senders that a heartbeat is due, and ends what is over its time.

Rules, cited by number at the code:

1.  Before `http.response.start` the first batch is awaited for at most `FIRST_ITEM_S`, so that what fails at once gets
    a real HTTP status.
2.  One task makes every `anext` and the `aclose` of a generator, inside one cancel scope entered before the first.
    Anything else lets anyio's scopes be left in another order than they were entered.
3.  At most one `send` of a connection is in flight: there is one sender, and it awaits each.
4.  Nothing is held back to make a write bigger. What is ready together travels together.
5.  After each flush the loop has had a turn: the sender only sends what the pump has put there, and each waits for
    the other when there is nothing to do.
6.  A cancellation reaches a generator once. Its `finally` may await; it has `CLOSE_S` for that. (anyio would deliver
    the cancellation again at each await: connection pools leak, since they don't get to give back what they hold.)
    On trio it does come again, as trio has it: there a `finally` that awaits shields itself.
7.  No clock is read and no timer armed for an event or a send. `Stream.progress` counts; the sweep looks at the count.
8.  A generator that never waits gives the loop a turn when its buffer is full, and each `TURN_S`. The pump looks at the
    clock for that: at a write's first events, then after twice as many bytes each time, at last each `LOOK_BYTES`.
"""

import logging
import random
import secrets
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar, overload

import anyio
from anyio import CancelScope, current_time, get_cancelled_exc_class
from anyio import Event as Signal
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from ssecore.errors import Draining, EncodeError, SSEAppError, Unavailable
from ssecore.request import EndReason, Request
from ssecore.responses import Send, http_error
from ssecore.wire import HEARTBEAT, Event, encode

__all__ = [
    "END_ID",
    "EventPump",
    "Pump",
    "Source",
    "Stream",
    "StreamOptions",
    "Timekeeper",
    "engine_frames",
    "error_frames",
    "failure_of",
    "merge",
    "public_text",
    "spread",
]

logger = logging.getLogger("sseapp")

#: Rule 1. After it heartbeats run, and a failure is an event.
FIRST_ITEM_S: Final = 1.0
#: Rule 6. What a generator may take to close; then it is cancelled at each await.
CLOSE_S: Final = 5.0
#: Rule 8. How long a generator may work before the other streams have their turn.
TURN_S: Final = 0.01
#: Rule 8. Some ten events: a look at the clock takes a twentieth of the time that an event takes.
LOOK_BYTES: Final = 1024

_DONE: Final = b"data: [DONE]\n\n"
#: In place of the blank line of a last event: a `Last-Event-ID` that is answered 204.
END_ID: Final = b"id: end\n\n"
#: Firefox and WebKit take an id only from an event that has data, so for them a block that sets the cursor is an event,
#: whose name has no listeners. Other clients get the bare id: some libraries hand over what the standard would drop.
_CURSOR_EVENT: Final = b"event: cursor\ndata:\n"

S = TypeVar("S")
T = TypeVar("T")


class Source(Protocol):
    """Where a sender gets its batches from."""

    #: Nothing new will come any more.
    ended: bool
    #: And nothing is left to take.
    finished: bool
    #: Why it broke off, if it did.
    failure: Exception | None
    #: What an event stream opens with when nothing came in the first second: a bare id, or nothing.
    opening: bytes

    @property
    def events_taken(self) -> int:
        """How many events (or chunks) have been taken so far."""

    @property
    def events(self) -> bool:
        """Events, with `retry:`, heartbeats and a farewell; else bytes, where a failure cuts the connection."""

    @property
    def run(self) -> Callable[[], Coroutine[Any, Any, None]] | None:
        """Works in a task of its own until the source is finished, if it needs one. Raises only a cancellation."""

    async def first(self) -> bytes:
        """The first batch; b"" if it isn't there within a second (rule 1)."""

    async def batch(self) -> bytes:
        """Wait until something is there, and take all of it. b"" when woken, or when there is nothing more."""

    def wake(self) -> None:
        """Let a waiting `batch` return."""

    def stop(self) -> None:
        """End the source; what it has already given is still taken."""

    def say(self, frame: bytes) -> None:
        """Give this as well, as soon as may be."""

    def farewell(self, reason: EndReason | None) -> bytes:
        """The last bytes of an event stream that ended by itself (`None`) or for this reason."""

    def close(self) -> None:
        """The connection is over: give back what was held for it."""


class Pump(Generic[T]):
    """The source that an async generator is: runs ahead of the sender, at most `buffer_bytes` and one item.

    As it is it gives bytes; see `EventPump`.
    """

    events = False
    opening = b""

    def __init__(
        self, generator: AsyncIterator[T], frame: Callable[[T], bytes], request: Request, *, buffer_bytes: int
    ) -> None:
        self.events_taken = 0
        self.ended = False
        self.finished = False
        self.exhausted = False  #: the generator came to its own end
        self.failure: Exception | None = None
        self._generator = generator
        self._frame = frame
        self._request = request
        self._limit = buffer_bytes
        self._frames: list[bytes] = []
        self._wanted: Signal | None = None  # the sender waits for something to take
        self._room: Signal | None = None  # the pump waits for the sender to take
        #: Who sends for it, where nobody waits in `batch`; see `direct`.
        self.on_wake: Callable[[], None] | None = None
        #: Who is told of a `stop`, where it isn't `run` that iterates the generator; see `direct`.
        self.on_stop: Callable[[], None] | None = None
        self._scope: CancelScope | None = None
        self._stopped = False

    async def run(self) -> None:
        try:
            await self._drive()
        except BaseException as error:
            if not self.took(error):
                raise
        finally:
            self.end()

    def took(self, error: BaseException) -> bool:
        """Note it as the generator's failure: anything is, except a cancellation by `stop`."""
        if not isinstance(error, get_cancelled_exc_class()):
            failure = failure_of(error)
            self.failure = http_error(failure) or failure
        elif not self._stopped:
            # By a task that the generator waited for, not by us.
            self.failure = RuntimeError("the handler was cancelled from within")
        else:
            return False
        return True

    def end(self) -> None:
        """Nothing more will come."""
        self.ended = True
        self.finished = not self._frames
        self.wake()

    async def _drive(self) -> None:
        # Shielded, so that `stop` is the only way to cancel it: then `_stopped` tells a cancellation that is ours from
        # one inside the generator (a timeout of its own). Whoever runs a pump stops it.
        self._scope = CancelScope(shield=True)
        if self._stopped:
            self._scope.cancel()
        with self._scope:
            await _drive(self._generator, self._run_ahead(), lambda: self._stopped)

    async def aclose(self) -> None:
        """Close the generator."""
        aclose = getattr(self._generator, "aclose", None)
        if aclose is not None:
            await aclose()

    async def _run_ahead(self) -> None:
        """Hot path: an event costs one `anext`, one `frame`, one append; a signal only where somebody waits."""
        frame, frames, limit, size = self._frame, self._frames, self._limit, 0
        look = step = 0  # rule 8, in bytes
        turn_ends = 0.0
        async for item in self._generator:
            try:
                framed = frame(item)
            except BaseException as error:
                if self._request._end_reason is None:  # the generator is about to be closed, and will ask
                    self._request._end_reason = "failed"
                if isinstance(error, AttributeError) and not isinstance(item, Event):
                    raise TypeError(f"a handler yields Event objects, not {type(item).__name__}") from None
                raise
            if not frames or size >= look:
                if self._stopped:  # a generator that goes on after its cancellation
                    return
                # Before the append, so that the last item is still here when the generator ends without a wait.
                if frames and size >= limit:
                    await self._wait_for_room()
                    size = 0
                elif frames and monotonic() >= turn_ends:
                    await checkpoint()
                    step, turn_ends = 0, monotonic() + TURN_S
                if not frames:  # what was there has been taken: the loop has had its turn
                    size, step, turn_ends = 0, 0, monotonic() + TURN_S
                if self._wanted is not None:
                    self._wanted.set()
                step = min(2 * step + 16, LOOK_BYTES)
                look = min(size + step, limit)
            frames.append(framed)
            size += len(framed)
        self.exhausted = not self._stopped  # one that returned because it was cancelled is not

    async def _wait_for_room(self) -> None:
        self._room = Signal()
        await self._room.wait()

    async def first(self) -> bytes:
        batch = b""
        with anyio.move_on_after(FIRST_ITEM_S):
            batch = await self.batch()
        return batch

    async def batch(self) -> bytes:
        return b"".join(await self.frames())

    async def frames(self) -> list[bytes]:
        """As `batch`, each item by itself."""
        if not self._frames and not self.ended:
            self._wanted = Signal()
            await self._wanted.wait()
            self._wanted = None
        return self._take()

    def ready(self) -> bytes:
        """As `batch`, without waiting."""
        return b"".join(self._take())

    def _take(self) -> list[bytes]:
        taken = self._frames.copy()
        self.events_taken += len(taken)
        self._frames.clear()
        self.finished = self.ended
        if self._room is not None:
            self._room.set()
            self._room = None
        return taken

    def wake(self) -> None:
        if self._wanted is not None:
            self._wanted.set()
        elif self.on_wake is not None:
            self.on_wake()

    def stop(self) -> None:
        self._stopped = True
        if self.on_stop is not None:
            self.on_stop()
        elif self._scope is not None:
            self._scope.cancel()

    def say(self, frame: bytes) -> None:
        self.wake()
        self._frames.append(frame)

    def farewell(self, reason: EndReason | None) -> bytes:
        return b""

    def close(self) -> None:
        pass


class EventPump(Pump[Event]):
    """The source of a fleeting event stream. With `ends_for_good` its end carries `id: end`, which then gets a 204.

    The id stands in the last event, if that is still here when the generator ends; else in a block of its own.
    """

    events = True

    def __init__(
        self, generator: AsyncIterator[Event], request: Request, *, buffer_bytes: int, ends_for_good: bool
    ) -> None:
        super().__init__(generator, encode, request, buffer_bytes=buffer_bytes)
        self._ends_for_good = ends_for_good
        self._marked = False

    async def _run_ahead(self) -> None:
        await super()._run_ahead()
        if self.exhausted and self._ends_for_good and self._frames:
            self._frames[-1] = self._frames[-1][:-1] + END_ID
            self._marked = True

    def farewell(self, reason: EndReason | None) -> bytes:
        if reason == "drain":
            return b""
        failure = StreamTimeout("the stream's longest life is over") if reason == "timeout" else self.failure
        if failure is None:
            if not self._ends_for_good or not self.exhausted or self._marked:
                return b""
            return _CURSOR_EVENT + END_ID if self._request.from_browser else END_ID
        frames = b"".join(error_frames(failure, data_only=self._request.data_only))
        return frames[:-1] + END_ID if self._ends_for_good else frames


async def _drive(generator: AsyncIterator[Any], work: Coroutine[Any, Any, None], stopping: Callable[[], bool]) -> None:
    """Do `work`, which iterates `generator`, and close the generator behind it, whatever happened (rules 2 and 6)."""
    scope = CancelScope()

    def close() -> None:
        if not scope.shield:
            scope.shield = True
            scope.deadline = current_time() + CLOSE_S

    try:
        with scope:
            try:
                await _cancelled_once(work, lambda: close() if stopping() else None)
            finally:
                close()
                aclose = getattr(generator, "aclose", None)
                if aclose is not None:
                    await aclose()
    finally:
        if scope.cancel_called:
            logger.warning("a handler did not close within %s s and was cancelled again", CLOSE_S)


@types.coroutine
def _cancelled_once(work: Coroutine[Any, Any, None], on_cancelled: Callable[[], None]) -> Generator[Any, Any, None]:
    """Await `work`, and call `on_cancelled` at the moment a cancellation arrives in it, before it sees it (rule 6).

    Budget: one Python frame for each suspension of the work, none for an item that is there.
    """
    cancelled = get_cancelled_exc_class()
    step: Callable[[Any], Any] = work.send
    value: Any = None
    while True:
        try:
            waits_for = step(value)
        except StopIteration:
            return
        try:
            value = yield waits_for
        except GeneratorExit:
            work.close()
            raise
        except BaseException as thrown:
            if isinstance(thrown, cancelled):
                on_cancelled()
            step, value = work.throw, thrown
        else:
            step = work.send


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What a stream needs of the settings; see there."""

    heartbeat_s: float | None
    send_timeout_s: float | None
    max_stream_s: float | None
    retry_ms: int
    #: Told once of each stream: its route, and how long its first event took.
    first_event: Callable[[str, float], None] | None = None


class Stream:
    """One streaming response: opens it, sends what its source gives, and ends it as it should."""

    __slots__ = (
        "_before_first",
        "_deadline",
        "_headers",
        "_options",
        "_pulse",
        "_pulse_at",
        "_request",
        "_scope",
        "_seen",
        "_send_message",
        "_since",
        "_status",
        "began",
        "progress",
        "sent_bytes",
        "source",
        "stalled_s",
    )

    def __init__(
        self,
        request: Request,
        send: Send,
        source: Source,
        headers: list[tuple[bytes, bytes]],
        options: StreamOptions,
        status: int = 200,
    ) -> None:
        self.progress = 0  #: odd while a send is in flight (rule 7)
        self.source = source
        self.sent_bytes = 0  #: of the body
        self.stalled_s = 0.0  #: in which a send waited for the client, as the sweep saw it
        self.began = monotonic()  # the loop's time can't be asked for where `direct` steps
        self._before_first = 1  # writes up to the first event's: one more where the opening holds none
        self._request = request
        self._send_message = send
        self._headers = headers
        self._status = status
        self._options = options
        self._scope: CancelScope | None = None
        self._seen = -1
        self._since = 0.0
        # Up to a tenth sooner: what began together (after a restart) doesn't end together.
        life_s = options.max_stream_s and options.max_stream_s * random.uniform(0.9, 1.0)
        self._deadline = current_time() + life_s if life_s else None
        self._pulse: tuple[Callable[[], Event], float] | None = None
        self._pulse_at = 0.0

    async def run(self, timekeeper: "Timekeeper | None") -> None:
        """Raises the source's own exception if it fails before anything was sent; else nothing of its."""
        try:
            async with anyio.create_task_group() as tasks:
                self._scope = tasks.cancel_scope
                if self.source.run is not None:
                    tasks.start_soon(self.source.run)
                tasks.start_soon(self._watch)
                if timekeeper is None:  # an app that isn't running has none: this stream keeps its own
                    timekeeper = Timekeeper(self._options)
                    tasks.start_soon(timekeeper.run)
                timekeeper.streams.add(self)
                try:
                    await self._send_all()
                except OSError:  # ASGI 2.4: what `send` raises when the client is gone; most servers only ignore it
                    self.abort("client")
                except Exception:  # the server's, and its answer has begun: there is nobody to tell
                    logger.exception("a stream broke off")
                    self.abort("failed")
                except get_cancelled_exc_class():
                    self.abort("cancelled")
                    raise
                finally:
                    self.source.stop()
                tasks.cancel_scope.cancel()
        finally:
            self.source.close()
            if timekeeper is not None:
                timekeeper.streams.discard(self)
            self._log_unheard()
        self._raise_early()

    @property
    def request(self) -> Request:
        return self._request

    @property
    def route(self) -> str:
        """The path as the table has it."""
        return self._request.route.path if self._request.route is not None else "none"

    @property
    def events(self) -> int:
        """Events (or chunks) so far."""
        return self.source.events_taken

    @property
    def end_reason(self) -> EndReason:
        return self._request.end_reason

    def _log_unheard(self) -> None:
        """What a handler failed with while it was closed can't be said to anybody."""
        failure, reason = self.source.failure, self._request._end_reason
        if failure is not None and reason not in (None, "failed"):
            logger.warning("a handler failed while it was closed (%s)", reason, exc_info=failure)

    def _raise_early(self) -> None:
        """A failure before anything was sent is an HTTP error, and so is a drain's end."""
        if self.progress:
            return
        if self.source.failure is not None and self._failed_by_itself():
            raise self.source.failure
        if self._request._end_reason == "drain":  # else the server would say 500, which ends an `EventSource`
            raise Draining

    def _failed_by_itself(self) -> bool:
        return self.source.failure is not None and self._request._end_reason in (None, "failed")

    def pulse(self, event: Callable[[], Event], every_s: float) -> None:
        """Say something each `every_s` seconds (as exactly as the sweep goes). Only where the source can `say` it."""
        self._pulse, self._pulse_at = (event, every_s), current_time() + every_s

    async def _watch(self) -> None:
        await self._request.disconnect()
        self.abort("client")

    def stop(self, reason: EndReason) -> None:
        """End the source, send what it has given, and say farewell. What has ended already ends as it would have."""
        if self.source.ended:
            return
        if self._request._end_reason is None:
            self._request._end_reason = reason
        self.source.stop()

    def abort(self, reason: EndReason) -> None:
        """End at once, nothing more is sent: nobody reads, or nobody will."""
        if self._request._end_reason is None:
            self._request._end_reason = reason
        self.source.stop()
        self._cut()

    def _cut(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def tick(self, now: float, round_s: float, late_s: float) -> None:
        """The sweep's look at this stream (rule 7): `round_s` after the last one, and later by `late_s` than planned.

        The loop was blocked or the process was stopped for `late_s`. That time doesn't count against the client's send
        timeout, since the server didn't look whether the client reads, and not as part of the stream's life.
        """
        if self._deadline is not None:
            self._deadline += late_s
        if self.progress != self._seen:
            self._seen, self._since = self.progress, now
        elif self.progress % 2:
            self.stalled_s += round_s
            self._since += late_s
            limit = self._options.send_timeout_s
            if limit is not None and now - self._since >= limit:
                self.abort("slow")
        elif self.progress and self.source.events and self._options.heartbeat_s is not None:
            if now - self._since >= self._options.heartbeat_s:
                self._beat()
        if self._request._end_reason is None and self._refusal() is not None:
            self.stop("unauthorized")
        if self._pulse is not None and now >= self._pulse_at:
            event, every_s = self._pulse
            self._pulse_at += every_s * ((now - self._pulse_at) // every_s + 1)  # those missed aren't made up for
            self.source.say(encode(event()))
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None
            self.stop("timeout")

    def _refusal(self) -> SSEAppError | None:
        """Why the caller's token holds no longer."""
        credential = self._request.credential
        return credential.refusal() if credential is not None else None

    def _beat(self) -> None:
        """Nothing was sent for `heartbeat_s`: send a heartbeat."""
        self.source.wake()

    async def _send(self, message: dict[str, Any]) -> None:
        self.progress += 1
        await self._send_message(message)
        self.progress += 1

    async def _send_all(self) -> None:
        source = self.source
        batch = await self._open()
        if batch is None:
            return
        while not source.finished:
            if batch:
                await self._send_body(batch)
            batch = await source.batch()
            if not batch and not source.finished and source.events:
                batch = HEARTBEAT
        await self._finish(batch)

    async def _open(self) -> bytes | None:
        """Send the start, and give the first batch; `None` where the source has failed before there was one."""
        source = self.source
        batch = await source.first()
        if source.finished and not batch and self._failed_by_itself():
            return None  # whoever runs this stream raises it: an HTTP error
        return await self._opened(batch)

    async def _opened(self, batch: bytes) -> bytes:
        source = self.source
        headers = [*self._headers, *self._request.answer_headers]
        await self._send({"type": "http.response.start", "status": self._status, "headers": headers})
        if source.events:
            self._before_first += not batch
            preamble, opening = self._request.preamble, source.opening
            self._request.forget()
            if opening and self._request.from_browser:
                opening = _CURSOR_EVENT + opening
            batch = b"%bretry: %d\n%b" % (preamble, self._options.retry_ms, batch or opening)
        return batch

    def _count(self, batch: bytes) -> None:
        """Hot path, once for each write."""
        self.sent_bytes += len(batch)
        if self._before_first and batch is not HEARTBEAT:
            self._before_first -= 1
            if not self._before_first and self._options.first_event is not None:
                self._options.first_event(self.route, monotonic() - self.began)

    async def _send_body(self, batch: bytes) -> None:
        self._count(batch)
        await self._send({"type": "http.response.body", "body": batch, "more_body": True})

    async def _finish(self, batch: bytes) -> None:
        """Send the last batch, and what a stream ends with."""
        source, reason, counted = self.source, self._request._end_reason, len(batch)
        if batch:
            self._count(batch)
        if reason is None:  # now: after the last send a server's `receive` says that the client has left
            self._request._end_reason = "failed" if source.failure else "finished"
        refusal = self._refusal() if reason == "unauthorized" else None
        if source.events and refusal is not None:
            batch += b"".join(error_frames(refusal, data_only=self._request.data_only))
        elif source.events:
            batch += source.farewell(reason)
            if reason == "drain" or isinstance(source.failure, Unavailable):
                # Spread, so that not all of them come back in one second.
                batch += b"retry: %d\n" % spread(self._options.retry_ms)
        elif source.failure is not None or reason is not None:
            if source.failure is not None:
                _log_failure(source.failure)
            return  # without the last part: the server cuts the connection, and the client sees that
        self.sent_bytes += len(batch) - counted
        await self._send({"type": "http.response.body", "body": batch, "more_body": False})


def spread(retry_ms: int) -> int:
    """A reconnection time at random around twice the normal one."""
    return random.randint(retry_ms, 3 * retry_ms)


class StreamTimeout(SSEAppError):
    """A stream reached its longest life; said in the stream."""

    status, code = 504, "timeout"


class Timekeeper:
    """One sweep for all streams of an app: heartbeats, clients that stopped reading, longest lives."""

    def __init__(self, options: StreamOptions) -> None:
        self.streams: set[Stream] = set()
        limits = (options.heartbeat_s, options.send_timeout_s, options.max_stream_s)
        self._tick_s = min([1.0, *(limit / 8 for limit in limits if limit is not None)])

    async def run(self) -> None:
        now = current_time()
        while True:
            await anyio.sleep(self._tick_s)
            last, now = now, current_time()
            late_s = max(0.0, now - last - self._tick_s)
            for stream in list(self.streams):
                try:
                    stream.tick(now, now - last - late_s, late_s)
                except BaseException:  # its pulse, say: its own trouble, not the next stream's; nothing awaits here
                    logger.exception("a stream's time could not be kept")
                    stream.abort("failed")


def error_frames(error: Exception, *, data_only: bool) -> list[bytes]:
    """A failure as the engine's own event, `{"error", "code"}`; on data-only routes a typed object and `[DONE]`.

    The texts of our own exceptions go to the client. Anything else goes to the log, and a reference to both.
    """
    code = error.code if isinstance(error, SSEAppError) else SSEAppError.code
    try:
        return engine_frames("error", {"error": public_text(error), "code": code}, data_only=data_only)
    except EncodeError as unfit:  # a text that is no Unicode, say
        return error_frames(unfit, data_only=data_only)


def engine_frames(name: str, data: dict[str, Any], *, data_only: bool) -> list[bytes]:
    """A terminal event of the engine's own, in the way that the route speaks."""
    if data_only:
        return [encode(Event({"type": name, **data})), _DONE]
    return [encode(Event(data, name))]


def public_text(error: Exception) -> str:
    """What a client may read of an exception; what it may not is logged under a reference."""
    if isinstance(error, SSEAppError):
        if isinstance(error, EncodeError) and error.__cause__ is not None:
            logger.error("a handler's event: %s: %r", error.detail, error.__cause__)
        return error.detail
    return f"internal error (reference {_log_failure(error)})"


def failure_of(error: BaseException, what: str = "a handler") -> Exception:
    """What a user's code raised, as a failure of that code alone.

    An `Exception` stays as it is. Anything else (`SystemExit`, `GeneratorExit`, a Rust panic, a group of such) becomes
    a `RuntimeError` with the original as its cause: raised on, it would end the event loop or the app's task group.
    The caller has sorted out cancellations of its own before.
    """
    if isinstance(error, Exception):
        return error
    failure = RuntimeError(f"{what} raised {type(error).__name__}")
    failure.__cause__ = error
    return failure


def _log_failure(error: Exception) -> str:
    reference = secrets.token_hex(6)
    logger.error("reference %s: a handler failed", reference, exc_info=error)
    return reference


class merge(Generic[T]):
    """Many async iterators as one, in the order in which their items come.

        async with merge(prices(), news()) as items:
            async for item in items:
                yield Event(item)

    At most `buffer` items wait (default 16); then the sources do. When a source fails its exception is raised here and
    ends all; with `failures=True` it is handed over as an item instead, and the others go on. Leaving the block closes
    every source, each in the task that ran it, and waits for that.

    A handler may yield inside this block, although a task group is: no failure of a source ever cancels it.
    """

    @overload
    def __init__(self, *sources: AsyncIterator[T], buffer: int = 16) -> None: ...
    @overload
    def __init__(
        self: "merge[S | Exception]", *sources: AsyncIterator[S], buffer: int = 16, failures: bool
    ) -> None: ...
    def __init__(self, *sources: AsyncIterator[Any], buffer: int = 16, failures: bool = False) -> None:
        self._sources = sources
        self._failures = failures
        self._buffer = buffer
        self._tasks: TaskGroup | None = None
        self._scopes: list[CancelScope] = []
        self._leaving = False

    async def __aenter__(self) -> Self:
        to_us, self._items = anyio.create_memory_object_stream[tuple[T | None, Exception | None]](self._buffer)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        with to_us:
            for source in self._sources:
                scope = CancelScope(shield=True)  # as in `Pump`: leaving the block is the only way to cancel it
                self._scopes.append(scope)
                self._tasks.start_soon(self._work, source, scope, to_us.clone())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._tasks is not None
        self._leaving = True
        self._items.close()
        for scope in self._scopes:
            scope.cancel()
        # Not told of the exception: it is the caller's, and would come back wrapped in a group.
        await self._tasks.__aexit__(None, None, None)

    async def _work(self, source: AsyncIterator[T], scope: CancelScope, to_us: Any) -> None:
        async def hand_over() -> None:
            async for item in source:
                await to_us.send((item, None))

        with to_us, scope:
            failure: Exception | None = None
            try:
                await _drive(source, hand_over(), lambda: self._leaving)
            except get_cancelled_exc_class():
                if self._leaving:
                    raise
                failure = RuntimeError("a source was cancelled from within")
            except BaseException as error:
                failure = failure_of(error, "a source")
            if failure is not None and not self._leaving:
                with suppress(anyio.BrokenResourceError):  # left while it waited for room
                    await to_us.send((None, failure))
            elif failure is not None and not isinstance(failure, anyio.BrokenResourceError):
                logger.warning("a merged source failed while it was closed", exc_info=failure)

    def __aiter__(self) -> Self:
        if self._tasks is None:
            raise RuntimeError("use `async with merge(...) as items`, so that the sources are closed")
        return self

    async def __anext__(self) -> T:
        try:
            item, error = await self._items.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        if error is None:
            return item  # type: ignore[return-value]
        if self._failures:
            return error  # type: ignore[return-value]  # the overload says so
        raise error
