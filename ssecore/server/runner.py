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
from contextlib import suppress
from queue import SimpleQueue
from types import FrameType
from typing import Any, Final, Literal, NoReturn, Protocol

import uvicorn

from ssecore.errors import SettingsError
from ssecore.server import logs, stderr
from ssecore.server.protocol import HEAD_SYNTAX_BYTES, BoundedProtocol
from ssecore.settings import Settings
from ssecore.streaming.sender import EXTENSION

__all__ = ["Hosted", "serve"]

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

    drained_by_runner: bool
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

    drained_by_runner = failed = private = False

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
        # Nothing of it is parked: what stands in front of an app in it may have to last for as long as the answer does.
        extensions = {name: what for name, what in scope.get("extensions", {}).items() if name != EXTENSION}
        try:
            await self._app({**scope, "extensions": extensions}, receive, send)
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


def serve(app: Drainable, settings: Settings) -> int:
    """Serve until a signal comes. Returns the exit code. Raises `SettingsError` where it can't or must not listen.

    It ends the process by itself (`os._exit`) if that has not ended END_S after `drain_s`: what the caller does behind
    it has to be done by then. Lines for a standard error that is not read are dropped, unless the program has
    set up logging itself.
    """
    logs.set_up(settings.log_format)
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
    app.drained_by_runner = True
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
