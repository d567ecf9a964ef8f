"""Our runner: uvicorn with a drain, and with the socket options that free a frozen client.

uvicorn tells an app of its end only after all connections are closed, which a stream never does by itself. So this
server drains the app first, and shuts down then. SIGTERM and SIGHUP give streams `drain_s` to finish, SIGINT (Ctrl-C)
no time; a second signal ends at once. The end has a bound, whatever handlers do: END_S after that time, and while
streams still end, as thousands do on a busy machine, MAX_END_S.
"""

import asyncio
import faulthandler
import gc
import importlib
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import Any, Final, Literal, NoReturn, Protocol

import uvicorn
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ssecore import stderr
from ssecore.errors import SettingsError
from ssecore.guard import MAX_HEADER_LINES
from ssecore.responses import Send
from ssecore.settings import Settings
from ssecore.wire import encode_json

__all__ = ["BoundedProtocol", "Hosted", "serve"]

logger = logging.getLogger("sseapp")

#: The kernel's buffer for one client. Linux would let it grow to 4 MiB: so much would a frozen client hold.
SEND_BUFFER_BYTES = 256 * 1024
BACKLOG = 4096
#: What is left of requests when all streams have ended: uvicorn then cancels them. Whole seconds, for uvicorn.
SHUTDOWN_S = 1
#: From the end of the drain's time, or from the last stream, run or request that ended since, to the process's own end,
#: at most: a second for farewells, SHUTDOWN_S, and a second for what is left, such as the event log's last commit. A
#: handler that ignores its cancellation is cut off here.
END_S = 3.0
#: From the end of the drain's time to the process's own end, whatever still ends.
MAX_END_S: Final = 10.0
#: Where `drain_s` is infinite, or so large that no timer takes it: eleven days.
LONGEST_S: Final = 1e6
#: The exit codes, besides 0 and (of the command) 2: the app failed while it served, or something ignored END_S.
FAILED: Final = 1
#: The app did not start.
NOT_STARTED: Final = 3
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
#: How long an idle connection is kept. Longer than a proxy in front keeps its own (nginx and AWS 60 s, Google 600): a
#: request that comes on a connection just as it is closed here is a 502 to its client.
KEEP_ALIVE_S = 620

#: How many of those still at work a cut-off end names in the log.
MAX_NAMED: Final = 20

#: The garbage collector's first generation, of 700 by default: a connection is some 60 objects that it looks at, and
#: where thousands of them wait it would look at them again and again. Much higher, and what connections leave behind
#: in cycles (13 objects of uvicorn's each) stays for long.
COLLECT_EACH = 5_000


class Drainable(Protocol):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    direct: bool
    failed: bool

    @property
    def private(self) -> bool: ...

    def at_work(self) -> list[str]: ...

    async def drain(self, grace_s: float) -> None: ...

    def abort(self) -> None: ...
    def give_up(self) -> None: ...


class Hosted:
    """Any ASGI program, as `serve` takes one: who may use it is for the program to decide.

    A `SSEApp` that is mounted in it hears of the signal by itself, as under other servers, and says farewell at once.
    """

    direct = failed = private = False

    def __init__(self, app: Any) -> None:
        self._app = app
        self._open: dict[int, str] = {}  # requests by a number
        self._count = 0
        self._change: asyncio.Event | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Call the program, and count its requests."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        self._count = number = self._count + 1
        self._open[number] = f"{scope.get('method', scope['type'])} {scope['path']!r:.200}"
        try:
            await self._app(scope, receive, send)
        finally:
            del self._open[number]
            if not self._open and self._change is not None:
                self._change.set()

    def at_work(self) -> list[str]:
        """The open requests."""
        return list(self._open.values())

    async def drain(self, grace_s: float) -> None:
        """Wait until no request is open, at most so long."""
        self._change = asyncio.Event()
        if self._open:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._change.wait(), min(grace_s, LONGEST_S))

    def abort(self) -> None:
        """Nothing: uvicorn cancels what is still open."""

    def give_up(self) -> None:
        """Nothing."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: Drainable, drain_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._grace_s = drain_s
        self._bounded = False
        #: The drain's time, once the end has begun. A queue, because a signal's handler may put into it at any moment.
        self._grace: SimpleQueue[float] = SimpleQueue()
        self._thread = threading.get_ident()
        self._nowhere = open(os.devnull, "wb")  # now, since a signal may come when all descriptors are taken
        threading.Thread(target=self._cut_off, name="end", daemon=True).start()

    @property
    def exit_code(self) -> int:
        if not self.started:
            return NOT_STARTED
        return 0 if self.should_exit and not self._app.failed else FAILED

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own: it raises the signal again at the end, and the exit code would not be 0.
        if self.should_exit:
            # At once: whatever else would have to be cancelled, and each task would say so in the log. Nothing is lost
            # by it: the event log withstands it, and runs are closed as interrupted at the next start.
            _exit(FAILED if self._app.failed else 0)
        if sig == signal.SIGINT:
            self._grace_s = 0
        self.should_exit = True
        self._bound(self._grace_s if self.started else 0)

    def _bound(self, grace_s: float) -> None:
        """From now on the end takes `grace_s` and END_S, or MAX_END_S, at most."""
        if not self._bounded:
            self._bounded = True
            grace_s = min(grace_s, LONGEST_S)
            self._grace.put(grace_s)
            self._exit_within(grace_s + END_S)

    def _exit_within(self, seconds: float) -> None:
        """For what holds the interpreter's lock, so that no other thread of Python's runs: ends the process with 1."""
        # It writes into nothing: a write to a standard error that is not read would not return.
        faulthandler.dump_traceback_later(seconds + 1, exit=True, file=self._nowhere)

    def _cut_off(self) -> None:
        """In a thread of its own: it may be the event loop that stands still. The event log withstands this as well."""
        grace_s = self._grace.get()
        time.sleep(grace_s)
        over = time.monotonic()
        until, latest = over + END_S, over + MAX_END_S
        working, fewest = self._app.at_work(), math.inf
        while (now := time.monotonic()) < until:
            time.sleep(min(END_S / 10, until - now))
            working = self._app.at_work()
            left = len(working) + len(self.server_state.tasks)
            if left < fewest:
                fewest = left
                until = min(max(until, time.monotonic() + END_S), latest)
                self._exit_within(until - time.monotonic())
        stack = "".join(traceback.format_stack(sys._current_frames().get(self._thread)))
        logger.error(
            "the process ends now, %.1f s after it was told to; requests still open: %d; still at work: %s\n"
            "the event loop is in:\n%s",
            grace_s + time.monotonic() - over,
            len(self.server_state.tasks),
            "; ".join(working[:MAX_NAMED]) + (f"; and {len(working) - MAX_NAMED} more" if working[MAX_NAMED:] else ""),
            stack,
        )
        _exit(FAILED)

    async def on_tick(self, counter: int) -> bool:
        return self._app.failed or await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is there now, code for the most part, stays: a full pass needn't look at it. With 1,000 streams, on a
        # busy machine, one took 0.14 s; it takes 0.01 s.
        gc.collect()
        gc.freeze()
        gc.set_threshold(COLLECT_EACH, 10, 10)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._app.failed:  # it has told all streams to end, at once
            self._grace_s = 0
        self._bound(self._grace_s)
        await self._app.drain(self._grace_s)
        self._app.abort()
        loop = asyncio.get_running_loop()
        loop.call_later(SHUTDOWN_S / 2, self._app.give_up)
        loop.call_later(SHUTDOWN_S * 0.8, self._let_go)
        await super().shutdown(sockets)

    def _let_go(self) -> None:
        """Who has not taken its last bytes by now won't. uvicorn would wait for that, and then speak of an error."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _exit(code: int) -> NoReturn:
    """Without waiting for anything but, for a moment, the log's last lines."""
    stderr.drain()
    os._exit(code)


class BoundedProtocol(HttpToolsProtocol):
    """With bounds on what comes before there is a request, and behind one: neither the parser nor uvicorn has any.

    - A head (and what stands between the parts of a body: chunk sizes, trailers) may have so many bytes, and a head so
      much time. What is complete and yet too large is answered by the app (`ssecore.guard`).
    - Of pipelined requests a few wait. With one too many, or with bytes behind a request that are not a request, the
      connection ends when those before have their answers; what the client still sends is not looked at.
    - Reading goes on while requests wait: else the server would not notice that the client has left.
    - An idle connection keeps nothing of its last request. uvicorn would keep up to half a MiB.
    """

    # More in its dictionary would make that one of its own, for each connection: a KiB.
    __slots__ = ("_ahead", "_answering", "_barren", "_ignoring", "_overdue")
    max_head_bytes: int | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._barren = 0  # bytes that no request could use; those of a body make up for as many
        self._overdue: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None  # `cycle` is the last one that came, and may have to wait
        self._ahead = 0  # bytes that came while a request waited for this one's answer
        self._ignoring = False

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


class _TruncatedOnPurpose(logging.Filter):
    """A stream whose client stopped reading is cut, as it must be: no error of the app."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "without completing response" not in record.getMessage()


class _JSONLines(logging.Formatter):
    """One JSON object a line; of a stream's end each fact by itself."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "stream", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return encode_json(line).decode()


def serve(app: Drainable, settings: Settings) -> int:
    """Serve until a signal comes. Returns the exit code. Raises `SettingsError` where it can't or must not listen.

    It ends the process by itself (`os._exit`) if that has not ended END_S after `drain_s`: what the caller does behind
    it has to be done by then. Lines for a standard error that is not read are dropped, unless the program has
    set up logging itself.
    """
    stderr.unblock()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if settings.log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_JSONLines())
    for name, level in (("uvicorn.error", logging.WARNING), ("httpx", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("uvicorn.error").addFilter(_TruncatedOnPurpose())
    sock = _listen(settings, private=app.private)
    host, port = sock.getsockname()[:2]
    bounds = (settings.max_header_bytes, settings.max_target_bytes)
    limit = sum(filter(None, bounds)) + HEAD_SYNTAX_BYTES if None not in bounds else None
    config = uvicorn.Config(
        app,
        loop=_loop(),
        http=type("_Bounded", (BoundedProtocol,), {"max_head_bytes": limit}),
        ws="none",
        lifespan="auto" if isinstance(app, Hosted) else "on",  # not every program has one
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    app.direct = True  # its `send` is uvicorn's
    server = _Server(config, app, settings.drain_s)
    logger.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows; the other two are uvicorn's
    if threading.current_thread() is threading.main_thread() and hangup is not None:
        if signal.getsignal(hangup) is not signal.SIG_IGN:
            signal.signal(hangup, server.handle_exit)
    try:
        server.run(sockets=[sock])
    except (KeyboardInterrupt, SystemExit) as error:
        if server.started and not server.should_exit:
            logger.error("the server was ended by %r", error)
    return server.exit_code


def _loop() -> Literal["uvloop", "asyncio"]:
    try:
        importlib.import_module("uvloop")
    except ImportError:  # there is none for Windows
        return "asyncio"
    return "uvloop"


def _listen(settings: Settings, *, private: bool) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise SettingsError(f"can't listen on {settings.host!r}: {error.strerror}", field="host") from None
    if private and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise SettingsError(
            f"{settings.host} is not a loopback address, and nobody is asked for credentials: set "
            f"{settings.written('tokens_file')} to a file of tokens, or {settings.written('auth', 'off')} if everybody "
            "who reaches it may use it",
            field="host",
        )
    try:
        # `::` is every address of this machine, those of IPv4 too.
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        sock = socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise SettingsError(f"can't listen on {settings.host}:{settings.port}: {error.strerror}") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Closing the transport waits for a client that never reads; the kernel doesn't. Accepted sockets inherit it.
        timeout_ms = min(round(settings.send_timeout_s * 1000), 2**31 - 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    return sock
