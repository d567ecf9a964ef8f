"""The connection: uvicorn's protocol with bounds, and what becomes of it when its stream is parked.

All that this project knows of uvicorn stands here; `tests/test_protocol.py` says what breaks when it changes.

1.  Our protocol stands in the scope's extensions (`EXTENSION`): the engine asks it whether a `send` is its own, is told
    when the client leaves, and parks the connection.
2.  A parked connection's transport knows a `ParkedConnection`. uvicorn takes the answer for complete and keeps nothing:
    cycle, parser, its task and its protocol go. What is written then is what uvicorn's `send` would have written.
3.  A parked connection stands among the server's connections, and its tasks among the server's: shutdown, its grace
    time and the cancellation after it work as for any other.
4.  What a client sends to a parked connection is kept for the next request, `MAX_AHEAD_BYTES` of it; with more it is
    closed. At the answer's end the transport gets a protocol anew, and that gets what was kept.
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

#: How long a client may take to send the head of a request. nginx's client_header_timeout is 60.
HEAD_S = 30.0
#: On top of path, query and headers: the method, the version, colons and line ends.
HEAD_SYNTAX_BYTES = 16 * 1024
#: Requests that may wait on one connection for the answer to the one in front of them; a waiting one costs 5 KiB.
#: Browsers and proxies send none ahead.
MAX_PIPELINED = 8
#: What a connection may send while a request on it waits for its turn.
MAX_AHEAD_BYTES = 64 * 1024
#: A timer that fires so late says that this process stood still: what the client has sent meanwhile is not read yet.
LATE_S = 1.0
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """With bounds on what comes before there is a request, and behind one: neither the parser nor uvicorn has any.

    - A head (and what stands between the parts of a body: chunk sizes, trailers) may have so many bytes, and a head so
      much time. What is complete and yet too large is answered by the app (`ssecore.http.guard`).
    - Of pipelined requests a few wait. With one too many, or with bytes behind a request that are not a request, the
      connection ends when those before have their answers; what the client still sends is not looked at.
    - Reading goes on while requests wait: else the server would not notice that the client has left.
    - An idle connection keeps nothing of its last request. uvicorn would keep up to half a MiB.
    """

    # More in its dictionary would make that one of its own, for each connection: a KiB.
    __slots__ = ("_ahead", "_answering", "_barren", "_ignoring", "_left", "_overdue")
    max_head_bytes: int | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._barren = 0  # bytes that no request could use; those of a body make up for as many
        self._overdue: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None  # `cycle` is the last one that came, and may have to wait
        self._ahead = 0  # bytes that came while a request waited for this one's answer
        self._ignoring = False
        self._left: Callable[[], None] | None = None  # see `watch`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)
        # uvicorn's own does it only where there was no error: a connection that was reset would be kept for 620 s.
        self._unset_keepalive_if_required()
        if self._answering is not None and not self._answering.response_complete:  # uvicorn tells only the last one
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        if self._left is not None:
            self._left()
        self._forget()

    def data_received(self, data: bytes) -> None:
        if self.pipeline:
            self._ahead += len(data)
            if self._ahead > MAX_AHEAD_BYTES:
                self._ignore_rest()
        if self._ignoring:
            return
        if self._overdue is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        self._barren += len(data)
        self._parse(data)
        if self.pipeline:
            self.flow.resume_reading()
        if self.max_head_bytes is not None and self._barren > self.max_head_bytes and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(TOO_LARGE)
            self.transport.close()

    def _parse(self, data: bytes) -> None:
        """In place of uvicorn's `data_received`, which loses what follows the head of a request with `Upgrade`.

        A server may ignore `Upgrade` (RFC 9110, 7.8), and this one speaks HTTP/1.1 alone. The parser stops behind such
        a head and takes the body for another protocol's, so it gets the head once more, without that header.
        """
        self._unset_keepalive_if_required()
        try:
            while data:
                try:
                    return self.parser.feed_data(data)
                except HttpParserUpgrade as upgrade:
                    if self.parser.get_method() == b"CONNECT":  # what follows is meant for another server
                        return self._ignore_rest()
                    is_whole = len(self.headers) <= MAX_HEADER_LINES
                    head, data = self._head_without_upgrade(), data[upgrade.args[0] :]
                    self.parser = HttpRequestParser(self)  # with `Connection: close` the first one reads no more
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
                    self.parser.feed_data(head)
                    if not is_whole:  # the request is refused; its length may be among the headers that were dropped
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
        """The parser is about to stop, and the same request comes again."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise OverflowError("too many requests wait for their answers")  # `send_400_response` is next
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # One too many is enough for the guard to refuse. What comes after a head is a trailer: uvicorn would put it
        # into the head of a request that has been let in already.
        is_trailer = self.cycle is not None and self.cycle.scope is self.scope
        if len(self.headers) <= MAX_HEADER_LINES and not is_trailer:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._upgrade_ignored:
            return
        self._barren = 0
        self._head_is_here()
        self.scope["extensions"] = {EXTENSION: self}  # type: ignore[dict-item]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        # Chunks of a byte each cost the parser 36 ms for 256 KiB: their frames may not outweigh them for long.
        self._barren = max(0, self._barren - 2 * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrade_ignored:
            return
        self._barren = 0
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
            elif cycle is self.cycle and self._overdue is None:  # the next one's head has begun
                self._await_head()
        super().on_response_complete()

    def answers(self, send: Send) -> bool:
        """Whether this `send` is the connection's own, with nobody between.

        And its request is complete, and its client there.
        """
        cycle = self._answering
        return cycle is not None and send == cycle.send and not cycle.more_body and not cycle.disconnected

    def watch(self, left: Callable[[], None] | None) -> None:
        """Call `left` when the client leaves; until the connection is parked, or this is called with `None`."""
        self._left = left
        # uvicorn stops reading where a body has more than it wants to hold, and goes on when the app asks for more. An
        # app that has it all asks no more; and who doesn't read doesn't see that the client leaves.
        self.flow.resume_reading()

    def park(self, send: Send, left: Callable[[], None]) -> "ParkedConnection | None":
        """Let go of the request. `left` is called when the client leaves.

        `None` while there is more to do than to write chunks: behind the answer other requests wait, or one has begun.
        """
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
        self._head_is_here()
        self.parser = None  # type: ignore[assignment]
        self._forget()
        return parked

    def go_on(self, transport: asyncio.Transport, ahead: bytes) -> None:
        """Take a connection back, behind an answer on it; `ahead` is what came of the next request."""
        self.connection_made(transport)
        self._head_is_here()
        self.on_response_complete()
        if ahead:
            self.data_received(ahead)

    def _forget(self) -> None:
        """Else scope, cycle and this protocol keep each other until the garbage collector comes."""
        self._left = self._answering = self.scope = self.cycle = None  # type: ignore[assignment]

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        in_its_body = not self.pipeline and cycle is not None and cycle.more_body and not cycle.response_started
        if cycle is None or cycle.response_complete or in_its_body:
            super().send_400_response(msg)
        else:  # a 400 would be taken for the answer to a request before
            self._ignore_rest()

    def _ignore_rest(self) -> None:
        """Read no request any more: the connection ends after the last answer that is due, or after `HEAD_S`."""
        if not self._ignoring:
            self._ignoring = True
            self.cycle.keep_alive = False
            self._head_is_here()
            self._await_head()

    def _await_head(self) -> None:
        self._overdue = self.loop.call_later(HEAD_S, self._close)

    def _head_is_here(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _close(self) -> None:
        if self._is_late(self._overdue):
            self._overdue = self.loop.call_later(LATE_S, self._close)
        else:
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        if self._is_late(self.timeout_keep_alive_task):
            self.timeout_keep_alive_task = self.loop.call_later(LATE_S, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def _is_late(self, timer: asyncio.TimerHandle | None) -> bool:
        # uvloop runs its timers before it reads from the sockets.
        return timer is not None and self.loop.time() - timer.when() > LATE_S


class ParkedConnection(asyncio.Protocol):
    """A connection in the middle of an answer that goes on without its request: a `sender.Line`."""

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
        self._keep = keep  # for the next request
        self._ahead = b""
        self._drained: asyncio.Future[None] | None = None
        self._state.connections.add(self)  # type: ignore[arg-type]

    def write(self, data: bytes) -> None:
        # uvloop's transport raises when it is closed, and tells of that in the loop's next turn.
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
        protocol.go_on(self.transport, self._ahead)

    def close(self) -> None:
        if self.left is not None:
            self.left = None
            self.transport.close()

    def shutdown(self) -> None:
        """uvicorn stops: this answer is the last one."""
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
    """Call the app for a client of HTTP/1.0: it knows no chunks (RFC 9112, 6.1), which uvicorn would send.

    A body of unknown length ends with the connection.
    """
    unknown = False

    async def send_plain(message: MutableMapping[str, Any]) -> None:
        nonlocal unknown
        if message["type"] == "http.response.start":
            if unknown := all(name.lower() != b"content-length" for name, _ in message.get("headers", ())):
                cycle.chunked_encoding = False
        elif unknown:  # uvicorn takes each part for the whole body
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_plain)
