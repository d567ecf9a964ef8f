"""The sender: one streaming response, from its opening to its end.

    catch up   take what the source has, send it; again, until there is nothing more to be had without waiting
    park       until woken: by the source, the sweep, a drain, or the client's leaving

So a connection is *sending*, or it is *parked*: then nothing of it is in flight, and whoever has its next bytes may
write them past it, if the client reads (`deliver`, `poke`). Else it is woken, and catches up.

Rules, cited by number at the code:

1.  At most one `send` of a connection is in flight. `progress` is odd while it is.
2.  Under our own runner a parked sender has no task: its request's call has returned, and the connection is a `Line`
    that knows only this sender. To catch up it gets a task, which ends when it parks again.
3.  Elsewhere it waits in the request's own task, and another one waits in `receive` for the client to leave.
4.  Nothing is held back to make a write bigger. What is ready together travels together.
5.  No clock is read and no timer armed for an event or a write: the sweep (`Timekeeper`) looks at `progress`.
6.  What writes past a parked sender may be a callback of the loop, where no task is the current one: nothing of anyio
    may be asked there for the time or for a scope.
"""

import logging
import random
from collections.abc import Callable, Collection, Coroutine, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Protocol

import anyio
import anyio.lowlevel
from anyio import CancelScope, current_time, get_cancelled_exc_class
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from ssecore.dialects import CURSOR_EVENT, error_frames, log_failure, spread
from ssecore.errors import Draining, SSEAppError, Unavailable
from ssecore.http.request import EndReason, Request, RequestFacts
from ssecore.http.responses import Send
from ssecore.wire import HEARTBEAT, Event, encode

__all__ = ["EXTENSION", "Line", "Sender", "SenderOptions", "Server", "Source", "Timekeeper", "chunk", "deliver"]

logger = logging.getLogger("sseapp")

#: Under this name the ASGI scope of a server that can park a connection has its `Server`.
EXTENSION: Final = "sseapp"


class Source(Protocol):
    """Where a sender gets its bytes from."""

    #: Events, with `retry:`, heartbeats and a farewell; else bytes, where a failure cuts the connection.
    events: bool
    #: What an event stream opens with when nothing came in the first `first_s`: a bare id, or nothing.
    opening: bytes
    #: How long the answer's start waits for the first bytes, in seconds.
    first_s: float
    #: Others have the same next bytes at the same place, `after`: see `deliver`.
    is_shared: bool
    #: Why it broke off, if it did.
    failure: Exception | None

    @property
    def ended(self) -> bool:
        """Nothing new will come, so that `stop` would change nothing."""

    @property
    def finished(self) -> bool:
        """And nothing is left to take."""

    @property
    def has_something(self) -> bool:
        """Something to take, or the end."""

    @property
    def events_sent(self) -> int:
        """How many events (or chunks) have been taken so far."""

    def begin(self, sender: "Sender", tasks: TaskGroup | None) -> None:
        """From now on `sender` is poked when there is something, and at the end. `tasks`: where it works on trio."""

    def ready(self) -> bytes | None:
        """All that can be had without waiting; b"" is nothing yet, `None` that `from_log` has it."""

    async def from_log(self) -> bytes:
        """What `ready` doesn't have."""

    def stop(self) -> None:
        """End it; what it has already given is still taken."""

    async def closed(self) -> None:
        """Until nothing of it is at work."""

    def farewell(self, reason: EndReason | None) -> bytes:
        """The last bytes of an event stream that ended by itself (`None`) or for this reason."""

    def close(self) -> None:
        """The connection is over: give back what was held for it."""


class Line(Protocol):
    """A connection whose answer goes on without a task and without its request."""

    transport: Any  #: `write` takes what `chunk` made
    paused: bool  #: the client doesn't read

    def write(self, data: bytes) -> None: ...
    async def drained(self) -> None:
        """Until the client reads, or has left."""

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it in a task of the server's."""

    def end(self, body: bytes) -> None:
        """These are the answer's last bytes."""

    def close(self) -> None:
        """The stream is over; where the answer is not complete its client sees that."""


class Server(Protocol):
    """What our runner offers in `scope["extensions"]`."""

    def answers(self, send: Send) -> bool:
        """Whether this `send` is the connection's own, with nobody between, and its request complete."""

    def watch(self, left: Callable[[], None] | None) -> None:
        """Call `left` when the client leaves; until the connection is parked, or this is called with `None`."""

    def park(self, send: Send, left: Callable[[], None]) -> Line | None:
        """Let go of the request, and give the connection; `left` is called when its client leaves. `None`: it can't
        be had now."""


def chunk(body: bytes) -> bytes:
    """A part of a body as it goes over the wire. Never of no bytes: that would be the last one."""
    return b"%x\r\n%b\r\n" % (len(body), body)


@dataclass(frozen=True, slots=True)
class SenderOptions:
    """What a sender needs of the settings; see there."""

    heartbeat_s: float | None
    send_timeout_s: float | None
    max_stream_s: float | None
    retry_ms: int
    #: Told once of each stream: its route, and how long its first event took.
    first_event: Callable[[str, float], None]
    #: Told once of each stream that it has ended, wherever it does.
    ended: Callable[["Sender"], None]


class Sender:
    """One streaming response: opens it, sends what its source gives, and ends it as it should."""

    __slots__ = (
        "_before_first",
        "_deadline",
        "_headers",
        "_options",
        "_over",
        "_pulse",
        "_pulse_at",
        "_said",
        "_scope",
        "_seen",
        "_send_message",
        "_server",
        "_since",
        "_status",
        "_waiter",
        "_whole",
        "began",
        "line",
        "parked",
        "progress",
        "quick",
        "request",
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
        options: SenderOptions,
        status: int = 200,
    ) -> None:
        self.request: RequestFacts = request
        self.source: Any = source
        self.parked = False  #: nothing is in flight
        self.line: Line | None = None  #: rule 2
        self.quick = False  #: it may be written to without being asked; see `deliver`
        self.progress = 0  #: rule 1
        self.sent_bytes = 0  #: of the body
        self.stalled_s = 0.0  #: in which a send waited for the client, as the sweep saw it
        self.began = monotonic()
        self._before_first = 1  # writes up to the first event's: one more where the opening holds none
        self._whole: Request | None = request  # until it is parked on a line
        self._send_message: Send | None = send
        self._server: Server | None = None
        self._headers = headers
        self._status = status
        self._options = options
        self._over = False
        self._said = b""  # goes out before what the source has next
        self._scope: CancelScope | None = None  # while it sends: a parked one needs none, at 0.9 KiB
        self._waiter: anyio.Event | None = None  # rule 3
        self._seen = -1
        self._since = 0.0
        # Up to a tenth sooner: what began together (after a restart) doesn't end together.
        life_s = options.max_stream_s and options.max_stream_s * random.uniform(0.9, 1.0)
        self._deadline = current_time() + life_s if life_s else None
        self._pulse: tuple[Callable[[], Event], float] | None = None
        self._pulse_at = 0.0

    async def run(self, has_sweep: bool) -> None:
        """Returns when the stream has ended, or is parked on a line.

        `has_sweep`: an app that isn't running has none; then this stream keeps its own. Raises the source's own
        exception if it fails before anything was sent, and `Draining` if a drain ends it before; else nothing of its.
        """
        assert self._whole is not None and self._send_message is not None
        server: Server | None = self._whole.scope.get("extensions", {}).get(EXTENSION)
        if has_sweep and server is not None and server.answers(self._send_message):
            self._server = server
            server.watch(self._client_left)
            await self._open(None)
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, self._whole)
                if not has_sweep:
                    tasks.start_soon(Timekeeper(self._options, [self]).run)
                await self._open(tasks)
                tasks.cancel_scope.cancel()
        self._raise_early()

    # Sending and parked: see ARCHITECTURE.md

    async def _open(self, tasks: TaskGroup | None) -> None:
        source = self.source
        try:
            source.begin(self, tasks)
            if not source.has_something:
                await checkpoint()  # most generators give their first event at once, and need no scope for it
            if not source.has_something:
                with anyio.move_on_after(source.first_s):
                    while not self._over and not source.has_something:
                        await self._wait()
        except BaseException:
            self.abort("cancelled")
            await self._end()
            raise
        await self._work()

    async def _work(self) -> None:
        """Until it is parked on a line, or has ended."""
        try:
            while not self._over:
                with CancelScope() as self._scope:
                    await self._catch_up()
                self._scope = None
                if self._over:
                    break
                if self._park():
                    return
                await self._wait()
        except OSError:  # ASGI 2.4: what `send` raises when the client is gone; most servers only ignore it
            self.abort("client")
        except Exception:  # the server's, and its answer has begun: there is nobody to tell
            logger.exception("a stream broke off")
            self.abort("failed")
        except get_cancelled_exc_class():
            self.abort("cancelled")
            raise
        finally:
            self._scope = None
            if not self.parked:
                await self._end()

    async def _catch_up(self) -> None:
        source = self.source
        while not self._over:
            batch = source.ready()
            if batch is None:
                batch = await source.from_log()
            batch, self._said = self._said + batch, b""
            if not self.progress:
                if source.finished and not batch and self._failed_by_itself():
                    self._over = True  # `run` raises it: an HTTP error
                    return
                batch = await self._start(batch)
            if source.finished:
                await self._finish(batch)
                self._over = True
            elif batch:
                self._count(batch)
                await self._send(batch)
            else:
                return

    def _park(self) -> bool:
        """Park on a line, if there is one to be had (rule 2)."""
        if self._server is not None:
            assert self._send_message is not None and self._whole is not None
            self.line = self._server.park(self._send_message, self._client_left)
            if self.line is None:
                return False
            self.request = self._whole.outlive(whole=self.source.first_s > 0)
            self._server = self._send_message = self._whole = None
            self._headers = []
        if self.line is None:
            return False
        self.parked = True
        self.quick = self.source.is_shared and not self._before_first
        return True

    async def _wait(self) -> None:
        """Park in the request's own task (rule 3)."""
        self._waiter = anyio.Event()
        self.parked = True
        try:
            await self._waiter.wait()
        finally:
            self._waiter = None
            self.parked = False

    async def _end(self) -> None:
        source = self.source
        source.stop()
        try:
            await source.closed()
        finally:
            source.close()
            if self.line is not None:
                self.line.close()
            elif self._server is not None:
                self._server.watch(None)
            self._log_unheard()
            self.request.end_for("failed" if source.failure is not None else "finished")
            self._options.ended(self)

    def wake(self) -> None:
        """Let a parked one catch up; one that sends looks for more by itself."""
        if self._waiter is not None:
            self._waiter.set()
        elif self.parked and self.line is not None:
            self.parked = False
            self.line.start(self._work())

    def poke(self) -> None:
        """There is something for it: write it past it, if it is parked and its client reads; else wake it."""
        line = self.line
        if line is None or not self.parked or line.paused:
            return self.wake()
        batch = self.source.ready()
        if batch is None or self.source.finished:
            self._said += batch or b""
            return self.wake()
        batch, self._said = self._said + batch, b""
        if batch:
            self._count(batch)
            line.write(chunk(batch))
            self.progress += 2
            self.quick = self.source.is_shared and not self._before_first

    def say(self, frame: bytes) -> None:
        """Send this as soon as may be. It is not the source's."""
        self._said += frame
        self.poke()

    # Its end

    async def _watch(self, request: Request) -> None:
        await request.disconnect()
        self._client_left()

    def _client_left(self) -> None:
        self.abort("client")

    def stop(self, reason: EndReason) -> None:
        """End the source, send what it has given, and say farewell. What has ended already ends as it would have."""
        if not self.source.ended:
            self.request.end_for(reason)
            self.source.stop()
            self.wake()

    def abort(self, reason: EndReason) -> None:
        """End at once, nothing more is sent: nobody reads, or nobody will."""
        self.request.end_for(reason)
        self._over = True
        self.source.stop()
        if self._scope is not None:
            self._scope.cancel()
        self.wake()

    def _raise_early(self) -> None:
        """A failure before anything was sent is an HTTP error, and so is a drain's end."""
        if self.progress:
            return
        if self.source.failure is not None and self._failed_by_itself():
            raise self.source.failure
        if self.request.ended_for == "drain":  # else the server would say 500, which ends an `EventSource`
            raise Draining

    def _failed_by_itself(self) -> bool:
        return self.source.failure is not None and self.request.ended_for in (None, "failed")

    def _log_unheard(self) -> None:
        """What a handler failed with while it was closed can't be said to anybody."""
        failure, reason = self.source.failure, self.request.ended_for
        if failure is not None and reason not in (None, "failed"):
            logger.warning("a handler failed while it was closed (%s)", reason, exc_info=failure)

    # The sweep

    def pulse(self, event: Callable[[], Event], every_s: float) -> None:
        """Say something each `every_s` seconds, as exactly as the sweep goes."""
        self._pulse, self._pulse_at = (event, every_s), current_time() + every_s

    def tick(self, now: float, round_s: float, late_s: float) -> None:
        """The sweep's look at this stream (rule 5): `round_s` after the last one, and later by `late_s` than planned.

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
                self.say(HEARTBEAT)
        if self.request.ended_for is None and self._refusal() is not None:
            self.stop("unauthorized")
        if self._pulse is not None and now >= self._pulse_at:
            event, every_s = self._pulse
            self._pulse_at += every_s * ((now - self._pulse_at) // every_s + 1)  # those missed aren't made up for
            self.say(encode(event()))
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None
            self.stop("timeout")

    def _refusal(self) -> SSEAppError | None:
        """Why the caller's token holds no longer."""
        credential = self.request.credential
        return credential.refusal() if credential is not None else None

    # What is told of it

    @property
    def route(self) -> str:
        """The path as the table has it."""
        return self.request.route.path if self.request.route is not None else "none"

    @property
    def events_sent(self) -> int:
        """Events (or chunks) so far."""
        sent: int = self.source.events_sent
        return sent

    # Bytes

    async def _start(self, batch: bytes) -> bytes:
        """Send the start. Gives the first batch with what goes before it."""
        assert self._whole is not None and self._send_message is not None
        headers = [*self._headers, *self._whole.answer_headers]
        self.progress += 1
        await self._send_message({"type": "http.response.start", "status": self._status, "headers": headers})
        self.progress += 1
        if self.source.events:
            self._before_first += not batch
            preamble, opening = self._whole.preamble, self.source.opening
            if opening and self._whole.from_browser and not self._whole.dialect.only_json:
                opening = CURSOR_EVENT + opening
            self._whole.forget()
            batch = b"%bretry: %d\n%b" % (preamble, self._options.retry_ms, batch or opening)
        return batch

    async def _send(self, body: bytes, *, last: bool = False) -> None:
        self.progress += 1
        if self.line is None:
            assert self._send_message is not None
            await self._send_message({"type": "http.response.body", "body": body, "more_body": not last})
        else:
            await self.line.drained()
            if last:
                self.line.end(body)
            else:
                self.line.write(chunk(body))
        self.progress += 1

    def _count(self, batch: bytes) -> None:
        """Hot path, once for each write."""
        self.sent_bytes += len(batch)
        if self._before_first and batch != HEARTBEAT:
            self._before_first -= 1
            if not self._before_first:
                self._options.first_event(self.route, monotonic() - self.began)

    async def _finish(self, batch: bytes) -> None:
        """Send the last batch, and what a stream ends with."""
        source, reason, counted = self.source, self.request.ended_for, len(batch)
        if batch:
            self._count(batch)
        if reason is None:  # now: after the last send a server's `receive` says that the client has left
            self.request.end_for("failed" if source.failure else "finished")
        refusal = self._refusal() if reason == "unauthorized" else None
        if source.events and refusal is not None:
            batch += b"".join(error_frames(refusal, self.request.dialect))
        elif source.events:
            batch += source.farewell(reason)
            if reason == "drain" or isinstance(source.failure, Unavailable):
                # Spread, so that not all of them come back in one second.
                batch += b"retry: %d\n" % spread(self._options.retry_ms)
        elif source.failure is not None or reason is not None:
            if source.failure is not None:
                log_failure(source.failure)
            return  # without the last part: the server cuts the connection, and the client sees that
        self.sent_bytes += len(batch) - counted
        await self._send(batch, last=True)


def deliver(senders: Iterable[Sender], body: bytes, framed: bytes, after: int, last: int) -> None:
    """Hot path. Write `framed`, which is `body` as a chunk, to those that have read up to `after`; then they have read
    up to `last`. Whoever is elsewhere is poked. What fails for one is not the next one's trouble."""
    size = len(body)
    for sender in senders:
        if not sender.parked:
            continue
        source, line = sender.source, sender.line
        try:
            if sender.quick and source.after == after and line is not None and not line.paused:
                line.transport.write(framed)
                source.after = last
                sender.progress += 2
                sender.sent_bytes += size
            else:
                sender.poke()
        except Exception:
            if line is None or not line.transport.is_closing():
                logger.exception("a stream could not be written to")
            sender.abort("client")


class Timekeeper:
    """One sweep for all streams of an app: heartbeats, clients that stopped reading, longest lives."""

    def __init__(self, options: SenderOptions, senders: Collection[Sender]) -> None:
        self._senders = senders
        limits = (options.heartbeat_s, options.send_timeout_s, options.max_stream_s)
        self._tick_s = min([1.0, *(limit / 8 for limit in limits if limit is not None)])

    async def run(self) -> None:
        now = current_time()
        while True:
            await anyio.sleep(self._tick_s)
            last, now = now, current_time()
            late_s = max(0.0, now - last - self._tick_s)
            for sender in list(self._senders):
                try:
                    sender.tick(now, now - last - late_s, late_s)
                except BaseException:  # its pulse, say: its own trouble, not the next stream's; nothing awaits here
                    logger.exception("a stream's time could not be kept")
                    sender.abort("failed")
