"""Our runner: uvicorn with a drain, and socket options that disconnect frozen clients.

uvicorn sends `lifespan.shutdown` after all connections are closed, so this server drains the app first.
"""

import asyncio
import faulthandler
import gc
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
from typing import TYPE_CHECKING, Any, Final, NoReturn

import uvicorn

from ssecore.errors import SettingsError
from ssecore.server import logs, stderr
from ssecore.server.protocol import HEAD_SYNTAX_BYTES, BoundedProtocol
from ssecore.settings import Settings
from ssecore.streaming.sender import EXTENSION

if TYPE_CHECKING:
    from sseapp import SSEApp

__all__ = ["Hosted", "serve"]

logger = logging.getLogger("sseapp")

#: Linux would let it grow to 4 MiB for each frozen client.
SEND_BUFFER_BYTES = 256 * 1024
BACKLOG = 4096
#: Until uvicorn cancels requests that outlive the drain; an integer for uvicorn.
SHUTDOWN_S = 1
#: From the drain's end, or the last stream, run or request that ended since, to the exit.
END_S = 3.0
#: To the exit, even while streams still end.
MAX_END_S: Final = 10.0
#: For an infinite `drain_s`.
LONGEST_S: Final = 1e6
#: Exit code if the app failed while it served, or something ignored END_S.
FAILED: Final = 1
NOT_STARTED: Final = 3
#: Longer than proxies (nginx and AWS 60 s, Google 600): a request that meets our close is a 502 to its client.
KEEP_ALIVE_S = 620

MAX_NAMED: Final = 20

#: The default, 700, scans thousands of connections again and again; a much higher one keeps those that are closed.
COLLECT_EACH = 5_000


class Hosted:
    """Any other ASGI app; authentication is its own."""

    drained_by_runner = failed = private = False

    def __init__(self, app: Any) -> None:
        self._app = app
        self._open: dict[int, str] = {}  # requests by number
        self._count = 0
        self._idle: asyncio.Event | None = None  # during the drain

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        self._count = number = self._count + 1
        self._open[number] = f"{scope.get('method', scope['type'])} {scope['path']!r:.200}"
        # Without EXTENSION nothing is parked: a middleware may have to outlast the response.
        extensions = {name: what for name, what in scope.get("extensions", {}).items() if name != EXTENSION}
        try:
            await self._app({**scope, "extensions": extensions}, receive, send)
        finally:
            del self._open[number]
            if not self._open and self._idle is not None:
                self._idle.set()

    def at_work(self) -> list[str]:
        return list(self._open.values())

    async def drain(self, grace_s: float) -> None:
        self._idle = asyncio.Event()
        if self._open:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)

    def abort(self) -> None:
        """uvicorn cancels open requests."""

    def give_up(self) -> None:
        pass


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: "SSEApp | Hosted", drain_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._grace_s = min(drain_s, LONGEST_S)
        self._limited = False
        self._grace: SimpleQueue[float] = SimpleQueue()  # reentrant, for the signal handler
        self._thread = threading.get_ident()
        self._devnull = open(os.devnull, "wb")  # later there may be no free descriptor
        threading.Thread(target=self._enforce_end, name="end", daemon=True).start()

    @property
    def exit_code(self) -> int:
        if not self.started:
            return NOT_STARTED
        return 0 if self.should_exit and not self._app.failed else FAILED

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own handler raises the signal again at the end: no exit code 0.
        if self.should_exit:
            # The event log survives this; the next start closes runs as interrupted.
            _exit(FAILED if self._app.failed else 0)
        if sig == signal.SIGINT:
            self._grace_s = 0
        self.should_exit = True
        self._limit_end(self._grace_s if self.started else 0)

    def _limit_end(self, grace_s: float) -> None:
        if not self._limited:
            self._limited = True
            self._grace.put(grace_s)
            self._exit_within(grace_s + END_S)

    def _exit_within(self, seconds: float) -> None:
        """Works even while C code holds the interpreter's lock."""
        # No traceback: writing to a standard error that is not read would block.
        faulthandler.dump_traceback_later(seconds + 1, exit=True, file=self._devnull)

    def _enforce_end(self) -> None:
        """In its own thread, because the event loop may be blocked."""
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
            "ending the process by force %.1f s after the signal; open requests: %d; still running: %s\n"
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
        # What exists now, mostly code, stays: a full collection with 1,000 streams takes 0.01 s, not 0.14.
        gc.collect()
        gc.freeze()
        gc.set_threshold(COLLECT_EACH, 10, 10)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._app.failed:  # it has stopped all streams already
            self._grace_s = 0
        self._limit_end(self._grace_s)
        await self._app.drain(self._grace_s)
        self._app.abort()
        loop = asyncio.get_running_loop()
        loop.call_later(SHUTDOWN_S / 2, self._app.give_up)
        loop.call_later(SHUTDOWN_S * 0.8, self._drop_connections)
        await super().shutdown(sockets)

    def _drop_connections(self) -> None:
        """Of clients that don't read; uvicorn would wait and log an error."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _exit(code: int) -> NoReturn:
    stderr.drain()
    os._exit(code)


def serve(app: "SSEApp | Hosted", settings: Settings) -> int:
    """Serve until a signal comes. Returns the exit code. Raises `SettingsError` if it can't or must not listen.

    END_S after `drain_s` the process ends by `os._exit`, including what the caller does after `serve`.
    """
    logs.set_up(settings.log_format)
    sock = _listen(settings, private=app.private)
    host, port = sock.getsockname()[:2]
    bounds = (settings.max_header_bytes, settings.max_target_bytes)
    limit = sum(filter(None, bounds)) + HEAD_SYNTAX_BYTES if None not in bounds else None
    config = uvicorn.Config(
        app,
        loop="auto",  # uvloop, except on Windows
        http=type("_Bounded", (BoundedProtocol,), {"max_head_bytes": limit}),
        ws="none",
        lifespan="auto" if isinstance(app, Hosted) else "on",  # not every app has one
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
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if threading.current_thread() is threading.main_thread() and hangup is not None:
        if signal.getsignal(hangup) is not signal.SIG_IGN:
            signal.signal(hangup, server.handle_exit)
    try:
        server.run(sockets=[sock])
    except (KeyboardInterrupt, SystemExit) as error:
        if server.started and not server.should_exit:
            logger.error("the server was ended by %r", error)
    return server.exit_code


def _listen(settings: Settings, *, private: bool) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise SettingsError(f"can't listen on {settings.host!r}: {error.strerror}", field="host") from None
    if private and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise SettingsError(
            f"can't listen on {settings.host}: it is not a loopback address, and no authentication is configured. Set "
            f"{settings.written('tokens_file')} to a file of tokens, or {settings.written('auth', 'off')} to let "
            "anyone who can reach the port use it",
            field="host",
        )
    try:
        # `::` includes the machine's IPv4 addresses.
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        sock = socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise SettingsError(f"can't listen on {settings.host}:{settings.port}: {error.strerror}") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Ends the wait of a close for a client that never reads. Accepted sockets inherit it.
        timeout_ms = min(round(settings.send_timeout_s * 1000), 2**31 - 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    return sock
