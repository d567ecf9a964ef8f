"""uvicorn's protocol with limits, and parked connections (see ARCHITECTURE.md).

The module depends on uvicorn's internals; `tests/test_protocol.py` detects changes.

For a parked connection uvicorn takes the response for complete and drops cycle, parser, task and protocol; we write the
bytes that its `send` would write. What the client sends meanwhile is kept for a new protocol after the response.
"""

import asyncio
from collections.abc import Callable, Coroutine, MutableMapping
from functools import partial
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ssecore.http.guard import MAX_HEADER_LINES
from ssecore.http.responses import Send
from ssecore.streaming.sender import EXTENSION, chunk

__all__ = ["BoundedProtocol", "ParkedConnection"]

#: nginx's client_header_timeout is 60.
HEAD_S = 30.0
#: Method, version, colons and line ends.
HEAD_SYNTAX_BYTES = 16 * 1024
#: Each costs 5 KiB. Browsers and proxies don't pipeline.
MAX_PIPELINED = 8
#: Received while a request waits.
MAX_AHEAD_BYTES = 64 * 1024
#: If a timer is this late, the process stood still and bytes may be unread.
LATE_S = 1.0
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """Limits that neither the parser nor uvicorn has.

    - `max_head_bytes` also limits chunk sizes and trailers. The app refuses a complete head that is too large.
    - After one pipelined request too many, or other bytes, the connection closes after the last response that is due.
    """

    # More attributes in `__dict__` would end its key sharing: a KiB each.
    __slots__ = ("_ahead", "_answering", "_head_timer", "_ignoring", "_on_left", "_overhead")
    max_head_bytes: int | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._overhead = 0  # bytes of heads and framing; a body reduces it
        self._head_timer: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None  # `cycle` is the newest, which may wait
        self._ahead = 0
        self._ignoring = False
        self._on_left: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)
        # Without this, uvicorn's timer keeps a connection that was reset for 620 s.
        self._unset_keepalive_if_required()
        if self._answering is not None and not self._answering.response_complete:  # uvicorn notifies the newest only
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        if self._on_left is not None:
            self._on_left()
        self._forget()

    def data_received(self, data: bytes) -> None:
        if self.pipeline:
            self._ahead += len(data)
            if self._ahead > MAX_AHEAD_BYTES:
                self._ignore_rest()
        if self._ignoring:
            return
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._start_head_timer()
        self._overhead += len(data)
        self._parse(data)
        if self.pipeline:
            self.flow.resume_reading()
        if self.max_head_bytes is not None and self._overhead > self.max_head_bytes and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(TOO_LARGE)
            self.transport.close()

    def _parse(self, data: bytes) -> None:
        """Replaces uvicorn's `data_received`, which loses the body of a request with `Upgrade`.

        A server may ignore `Upgrade` (RFC 9110, 7.8), but the parser stops there.
        """
        self._unset_keepalive_if_required()
        try:
            while data:
                try:
                    return self.parser.feed_data(data)
                except HttpParserUpgrade as upgrade:
                    if self.parser.get_method() == b"CONNECT":
                        return self._ignore_rest()
                    is_whole = len(self.headers) <= MAX_HEADER_LINES
                    head, data = self._head_without_upgrade(), data[upgrade.args[0] :]
                    self.parser = HttpRequestParser(self)  # after `Connection: close` the old one reads no more
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # like uvicorn
                    self.parser.feed_data(head)
                    if not is_whole:  # Content-Length may have been dropped
                        return self._ignore_rest()
        except HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    @property
    def _upgrade_ignored(self) -> bool:
        """`_parse` will repeat the request."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise OverflowError("too many pipelined requests")  # leads to `send_400_response`
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # The guard refuses one header too many. uvicorn would add trailers to an admitted request's headers.
        is_trailer = self.cycle is not None and self.cycle.scope is self.scope
        if len(self.headers) <= MAX_HEADER_LINES and not is_trailer:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._upgrade_ignored:
            return
        self._overhead = 0
        self._stop_head_timer()
        self.scope["extensions"] = {EXTENSION: self}  # type: ignore[dict-item]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        # 256 KiB in chunks of one byte cost the parser 36 ms, so their framing counts.
        self._overhead = max(0, self._overhead - 2 * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrade_ignored:
            return
        self._overhead = 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering, self._ahead = cycle, 0
        if cycle.scope["http_version"] < "1.1":
            app = partial(_without_chunks, app, cycle)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        cycle = self._answering
        if cycle is not None:
            cycle.body.clear()
            if cycle is self.cycle and cycle.scope is self.scope:
                self.url, self.headers = b"", []
                self.scope = cycle.scope = None  # type: ignore[assignment]
            elif cycle is self.cycle and self._head_timer is None:  # the next head has begun
                self._start_head_timer()
        super().on_response_complete()

    def answers(self, send: Send) -> bool:
        """Whether `send` is the connection's own (no middleware), and its client connected."""
        cycle = self._answering
        return cycle is not None and send == cycle.send and not cycle.more_body and not cycle.disconnected

    def watch(self, left: Callable[[], None] | None) -> None:
        """Call `left` at a disconnect, until the connection is parked."""
        self._on_left = left
        # uvicorn may have paused reading, and would not detect a disconnect.
        self.flow.resume_reading()

    def park(self, send: Send, left: Callable[[], None]) -> "ParkedConnection | None":
        """`None` unless a chunked response is in progress and no other request has begun."""
        cycle = self._answering
        if not self.answers(send) or cycle is None or not cycle.response_started or cycle.response_complete:
            return None
        if not cycle.chunked_encoding or cycle.scope["method"] == "HEAD":
            return None
        if self.pipeline or cycle is not self.cycle or self.scope is not cycle.scope:
            return None
        parked = ParkedConnection(self, left, keep=cycle.keep_alive and not self._ignoring)
        self.transport.set_protocol(parked)
        cycle.response_complete = True
        self.connections.discard(self)
        self._stop_head_timer()
        self.parser = None  # type: ignore[assignment]
        self._forget()
        return parked

    def take_over(self, transport: asyncio.Transport, ahead: bytes) -> None:
        self.connection_made(transport)
        self._stop_head_timer()
        self.on_response_complete()
        if ahead:
            self.data_received(ahead)

    def _forget(self) -> None:
        """Breaks a reference cycle."""
        self._on_left = self._answering = self.scope = self.cycle = None  # type: ignore[assignment]

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        in_its_body = not self.pipeline and cycle is not None and cycle.more_body and not cycle.response_started
        if cycle is None or cycle.response_complete or in_its_body:
            super().send_400_response(msg)
        else:  # the client would take a 400 for an earlier request's response
            self._ignore_rest()

    def _ignore_rest(self) -> None:
        """Close after the last response that is due, or after `HEAD_S`."""
        if not self._ignoring:
            self._ignoring = True
            self.cycle.keep_alive = False
            self._stop_head_timer()
            self._start_head_timer()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        if self._is_late(self._head_timer):
            self._head_timer = self.loop.call_later(LATE_S, self._close)
        else:
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        if self._is_late(self.timeout_keep_alive_task):
            self.timeout_keep_alive_task = self.loop.call_later(LATE_S, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def _is_late(self, timer: asyncio.TimerHandle | None) -> bool:
        # uvloop runs timers before it reads from sockets.
        return timer is not None and self.loop.time() - timer.when() > LATE_S


class ParkedConnection(asyncio.Protocol):
    """A chunked response without its request: a `sender.Line`."""

    __slots__ = (
        "_ahead",
        "_config",
        "_drained",
        "_keep",
        "_lifespan_state",
        "_protocol_class",
        "_state",
        "left",
        "paused",
        "transport",
    )

    def __init__(self, server: BoundedProtocol, left: Callable[[], None], *, keep: bool) -> None:
        self.transport = server.transport
        self.paused: bool = server.flow.write_paused  #: the client doesn't read
        self.left: Callable[[], None] | None = left
        self._protocol_class = type(server)
        self._config, self._state, self._lifespan_state = server.config, server.server_state, server.app_state
        self._keep = keep
        self._ahead = b""
        self._drained: asyncio.Future[None] | None = None
        self._state.connections.add(self)  # type: ignore[arg-type]

    def write(self, data: bytes) -> None:
        # uvloop's transport raises between its close and `connection_lost`.
        if not self.transport.is_closing():
            self.transport.write(data)

    async def drained(self) -> None:
        if self.paused:
            self._drained = asyncio.get_running_loop().create_future()
            try:
                await self._drained
            finally:
                self._drained = None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def end(self, body: bytes) -> None:
        self.write((chunk(body) if body else b"") + b"0\r\n\r\n")
        if not self._keep or self.paused or self.left is None or self.transport.is_closing():
            return self.close()
        self.left = None
        self._state.connections.discard(self)
        protocol = self._protocol_class(self._config, self._state, self._lifespan_state)
        self.transport.set_protocol(protocol)
        protocol.take_over(self.transport, self._ahead)

    def close(self) -> None:
        if self.left is not None:
            self.left = None
            self.transport.close()

    def shutdown(self) -> None:
        self._keep = False

    def data_received(self, data: bytes) -> None:
        self._ahead += data
        if len(self._ahead) > MAX_AHEAD_BYTES:
            self._ahead, self._keep = b"", False
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(self)
        self.resume_writing()
        left, self.left = self.left, None
        if left is not None:
            left()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._drained is not None and not self._drained.done():  # done: it was cancelled
            self._drained.set_result(None)


async def _without_chunks(app: Any, cycle: RequestResponseCycle, scope: Any, receive: Any, send: Send) -> None:
    """For HTTP/1.0, which has no chunks (RFC 9112, 6.1): the end of the connection ends the body."""
    unknown = False

    async def send_plain(message: MutableMapping[str, Any]) -> None:
        nonlocal unknown
        if message["type"] == "http.response.start":
            if unknown := all(name.lower() != b"content-length" for name, _ in message.get("headers", ())):
                cycle.chunked_encoding = False
        elif unknown:  # so uvicorn takes each part for the whole body
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_plain)
