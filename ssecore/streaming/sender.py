"""The sender: one streaming response. ARCHITECTURE.md has its two states, *sending* and *parked*.

1.  At most one `send` of a connection is in flight; meanwhile `progress` is odd.
2.  Under our own runner a parked sender has no task: its request's call has returned, and its connection is a `Line`,
    which refers only to the sender. A task to catch up ends when it parks.
3.  Elsewhere it waits in the request's task, and another one in `receive` for the disconnect.
4.  Nothing is held back for larger writes.
5.  An event or a write reads no clock and sets no timer: the sweep (`Timekeeper`) reads `progress`.
6.  A parked one may be written to by a callback of the loop: without a task anyio's time and scopes don't work.
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

#: Our runner's `Server` in the ASGI scope's extensions.
EXTENSION: Final = "sseapp"


class Source(Protocol):
    """A generator's pump, or a reader of the log."""

    #: Events, with `retry:`, heartbeats and a farewell; or bytes, where a failure cuts the connection.
    events: bool
    #: An event stream's first bytes if nothing came in `first_s`.
    opening: bytes
    first_s: float
    #: Others have the same bytes after `after`: see `deliver`.
    is_shared: bool
    failure: Exception | None

    @property
    def ended(self) -> bool:
        """`stop` has no effect."""

    @property
    def finished(self) -> bool:
        """Ended, and all taken."""

    @property
    def has_something(self) -> bool:
        """Something to take, or the end."""

    @property
    def events_sent(self) -> int: ...

    def begin(self, sender: "Sender", tasks: TaskGroup | None) -> None:
        """Poke `sender` from now on, also at the end. `tasks` is for trio."""

    def ready(self) -> bytes | None:
        """Everything without waiting; `None`: await `from_log`."""

    async def from_log(self) -> bytes: ...

    def stop(self) -> None:
        """End it; what it has can be taken."""

    async def closed(self) -> None: ...

    def farewell(self, reason: EndReason | None) -> bytes:
        """Last bytes; no `reason` if it ended by itself."""

    def close(self) -> None: ...


class Line(Protocol):
    """A connection without its request."""

    transport: Any
    paused: bool  #: the client doesn't read

    def write(self, data: bytes) -> None: ...
    async def drained(self) -> None: ...
    def start(self, work: Coroutine[Any, Any, None]) -> None: ...
    def end(self, body: bytes) -> None: ...
    def close(self) -> None:
        """Cuts an incomplete response."""


class Server(Protocol):
    """Our runner, in `scope["extensions"]`."""

    def answers(self, send: Send) -> bool:
        """`send` is the connection's own, and the request complete."""

    def watch(self, left: Callable[[], None] | None) -> None:
        """Call `left` at a disconnect, until `park` or `watch(None)`."""

    def park(self, send: Send, left: Callable[[], None]) -> Line | None:
        """Release the request; returns its connection, if possible."""


def chunk(body: bytes) -> bytes:
    """An HTTP/1.1 chunk; an empty `body` would be the last."""
    return b"%x\r\n%b\r\n" % (len(body), body)


@dataclass(frozen=True, slots=True)
class SenderOptions:
    """The settings."""

    heartbeat_s: float | None
    send_timeout_s: float | None
    max_stream_s: float | None
    retry_ms: int
    #: Route and seconds, once for each stream.
    first_event: Callable[[str, float], None]
    ended: Callable[["Sender"], None]


class Sender:
    """A response."""

    __slots__ = (
        "_before_first",
        "_deadline",
        "_ended",
        "_full_request",
        "_headers",
        "_options",
        "_pulse",
        "_pulse_at",
        "_pushed",
        "_scope",
        "_seen_progress",
        "_send_message",
        "_server",
        "_status",
        "_unchanged_since",
        "_waiter",
        "began",
        "direct",
        "line",
        "parked",
        "progress",
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
        self.parked = False
        self.line: Line | None = None  #: rule 2
        self.direct = False  #: for `deliver`: no need to ask the source
        self.progress = 0  #: rule 1
        self.sent_bytes = 0
        self.stalled_s = 0.0  #: sends waited for the client; by the sweep
        self.began = monotonic()
        self._before_first = 1  # writes to the first event's; 2 if the opening has none
        self._full_request: Request | None = request
        self._send_message: Send | None = send
        self._server: Server | None = None
        self._headers = headers
        self._status = status
        self._options = options
        self._ended = False
        self._pushed = b""
        self._scope: CancelScope | None = None  # only while sending: 0.9 KiB
        self._waiter: anyio.Event | None = None
        self._seen_progress = -1
        self._unchanged_since = 0.0
        # Up to a tenth less, so that streams of a restart don't end together.
        life_s = options.max_stream_s and options.max_stream_s * random.uniform(0.9, 1.0)
        self._deadline = current_time() + life_s if life_s else None
        self._pulse: tuple[Callable[[], Event], float] | None = None
        self._pulse_at = 0.0

    async def run(self, has_sweep: bool) -> None:
        """Returns when it has ended, or is parked on a line.

        Without `has_sweep` it has its own. Before anything was sent, raises the source's failure, or `Draining`.
        """
        assert self._full_request is not None and self._send_message is not None
        server: Server | None = self._full_request.scope.get("extensions", {}).get(EXTENSION)
        if has_sweep and server is not None and server.answers(self._send_message):
            self._server = server
            server.watch(self._client_left)
            await self._open(None)
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, self._full_request)
                if not has_sweep:
                    tasks.start_soon(Timekeeper(self._options, [self]).run)
                await self._open(tasks)
                tasks.cancel_scope.cancel()
        self._raise_if_unstarted()

    async def _open(self, tasks: TaskGroup | None) -> None:
        source = self.source
        try:
            source.begin(self, tasks)
            if not source.has_something:
                await checkpoint()  # often enough for the first event, and cheaper than a scope
            if not source.has_something:
                with anyio.move_on_after(source.first_s):
                    while not self._ended and not source.has_something:
                        await self._wait()
        except BaseException:
            self.abort("cancelled")
            await self._end()
            raise
        await self._work()

    async def _work(self) -> None:
        try:
            while not self._ended:
                with CancelScope() as self._scope:
                    await self._catch_up()
                self._scope = None
                if self._ended:
                    break
                if self._park():
                    return
                await self._wait()
        except OSError:  # ASGI 2.4: `send` after a disconnect; most servers ignore it
            self.abort("client")
        except Exception:  # the server's
            logger.exception("sending a stream failed")
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
        while not self._ended:
            batch = source.ready()
            if batch is None:
                batch = await source.from_log()
            batch, self._pushed = self._pushed + batch, b""
            if not self.progress:
                if source.finished and not batch and self._failed_by_itself():
                    self._ended = True  # `run` raises the failure
                    return
                batch = await self._start(batch)
            if source.finished:
                await self._finish(batch)
                self._ended = True
            elif batch:
                self._count(batch)
                await self._send(batch)
            else:
                return

    def _park(self) -> bool:
        """Rule 2."""
        if self._server is not None:
            assert self._send_message is not None and self._full_request is not None
            self.line = self._server.park(self._send_message, self._client_left)
            if self.line is None:
                return False
            self.request = self._full_request.outlive(whole=self.source.first_s > 0)
            self._server = self._send_message = self._full_request = None
            self._headers = []
        if self.line is None:
            return False
        self.parked = True
        self.direct = self.source.is_shared and not self._before_first
        return True

    async def _wait(self) -> None:
        """Rule 3."""
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
            self._log_unsent_failure()
            self.request.end_for("failed" if source.failure is not None else "finished")
            self._options.ended(self)

    def wake(self) -> None:
        if self._waiter is not None:
            self._waiter.set()
        elif self.parked and self.line is not None:
            self.parked = False
            self.line.start(self._work())

    def poke(self) -> None:
        """The source has something: write directly, or wake."""
        line = self.line
        if line is None or not self.parked or line.paused:
            return self.wake()
        batch = self.source.ready()
        if batch is None or self.source.finished:
            self._pushed += batch or b""
            return self.wake()
        batch, self._pushed = self._pushed + batch, b""
        if batch:
            self._count(batch)
            line.write(chunk(batch))
            self.progress += 2
            self.direct = self.source.is_shared and not self._before_first

    def push(self, frame: bytes) -> None:
        """Send a frame besides the source's."""
        self._pushed += frame
        self.poke()

    async def _watch(self, request: Request) -> None:
        await request.disconnect()
        self._client_left()

    def _client_left(self) -> None:
        self.abort("client")

    def stop(self, reason: EndReason) -> None:
        """End the source, send the rest and the farewell."""
        if not self.source.ended:
            self.request.end_for(reason)
            self.source.stop()
            self.wake()

    def abort(self, reason: EndReason) -> None:
        """End at once, without a farewell."""
        self.request.end_for(reason)
        self._ended = True
        self.source.stop()
        if self._scope is not None:
            self._scope.cancel()
        self.wake()

    def _raise_if_unstarted(self) -> None:
        if self.progress:
            return
        if self._failed_by_itself():
            raise self.source.failure
        if self.request.ended_for == "drain":  # a server's 500 would end an `EventSource`
            raise Draining

    def _failed_by_itself(self) -> bool:
        return self.source.failure is not None and self.request.ended_for in (None, "failed")

    def _log_unsent_failure(self) -> None:
        failure, reason = self.source.failure, self.request.ended_for
        if failure is not None and reason not in (None, "failed"):
            logger.warning("a handler failed while it was closed (%s)", reason, exc_info=failure)

    def pulse(self, event: Callable[[], Event], every_s: float) -> None:
        """Send an event each `every_s` seconds, as exactly as the sweep."""
        self._pulse, self._pulse_at = (event, every_s), current_time() + every_s

    def tick(self, now: float, round_s: float, late_s: float) -> None:
        """Called by the sweep, `round_s` after the last time plus a delay of `late_s` (rule 5).

        In this delay the process stood still: it doesn't count for timeouts.
        """
        if self._deadline is not None:
            self._deadline += late_s
        if self.progress != self._seen_progress:
            self._seen_progress, self._unchanged_since = self.progress, now
        elif self.progress % 2:
            self.stalled_s += round_s
            self._unchanged_since += late_s
            limit = self._options.send_timeout_s
            if limit is not None and now - self._unchanged_since >= limit:
                self.abort("slow")
        elif self.progress and self.source.events and self._options.heartbeat_s is not None:
            if now - self._unchanged_since >= self._options.heartbeat_s:
                self.push(HEARTBEAT)
        if self.request.ended_for is None and self._refusal() is not None:
            self.stop("unauthorized")
        if self._pulse is not None and now >= self._pulse_at:
            event, every_s = self._pulse
            self._pulse_at += every_s * ((now - self._pulse_at) // every_s + 1)
            self.push(encode(event()))
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None
            self.stop("timeout")

    def _refusal(self) -> SSEAppError | None:
        credential = self.request.credential
        return credential.refusal() if credential is not None else None

    @property
    def route(self) -> str:
        return self.request.route.path if self.request.route is not None else "none"

    @property
    def events_sent(self) -> int:
        sent: int = self.source.events_sent
        return sent

    async def _start(self, batch: bytes) -> bytes:
        """Send the headers; returns the opening with the first batch."""
        assert self._full_request is not None and self._send_message is not None
        headers = [*self._headers, *self._full_request.answer_headers]
        self.progress += 1
        await self._send_message({"type": "http.response.start", "status": self._status, "headers": headers})
        self.progress += 1
        if self.source.events:
            self._before_first += not batch
            preamble, opening = self._full_request.preamble, self.source.opening
            if self._full_request.dialect.only_json:
                opening = b""  # openai-python parses the data of every block, also of one that has none
            elif opening and self._full_request.from_browser:
                opening = CURSOR_EVENT + opening
            self._full_request.forget()
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
        source, reason, counted = self.source, self.request.ended_for, len(batch)
        if batch:
            self._count(batch)
        if reason is None:  # before the last send, after which `receive` reports a disconnect
            self.request.end_for("failed" if source.failure else "finished")
        refusal = self._refusal() if reason == "unauthorized" else None
        if source.events and refusal is not None:
            batch += b"".join(error_frames(refusal, self.request.dialect))
        elif source.events:
            batch += source.farewell(reason)
            if reason == "drain" or isinstance(source.failure, Unavailable):
                # Random, to spread the reconnects.
                batch += b"retry: %d\n" % spread(self._options.retry_ms)
        elif source.failure is not None or reason is not None:
            if source.failure is not None:
                log_failure(source.failure)
            return  # the server cuts the connection, which the client detects
        self.sent_bytes += len(batch) - counted
        await self._send(batch, last=True)


def deliver(senders: Iterable[Sender], body: bytes, framed: bytes, after: int, last: int) -> None:
    """Hot path. Write `framed`, the chunk of `body`, to senders that have sent up to `after`, now up to `last`; poke
    others."""
    size = len(body)
    for sender in senders:
        if not sender.parked:
            continue
        source, line = sender.source, sender.line
        try:
            if sender.direct and source.after == after and line is not None and not line.paused:
                line.transport.write(framed)
                source.after = last
                sender.progress += 2
                sender.sent_bytes += size
            else:
                sender.poke()
        except Exception:
            if line is None or not line.transport.is_closing():
                logger.exception("writing to a stream failed")
            sender.abort("client")


class Timekeeper:
    """The sweep: heartbeats, slow clients, longest durations."""

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
                except BaseException:  # of its pulse
                    logger.exception("the sweep of a stream failed")
                    sender.abort("failed")
