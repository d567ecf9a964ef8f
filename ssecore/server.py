"""Our runner: uvicorn with a drain, and with the socket options that free a frozen client.

uvicorn tells an app of its end only after all connections are closed, which a stream never does by itself. So this
server drains the app first, and shuts down then. SIGTERM gives streams `drain_s` to finish, SIGINT (Ctrl-C) no time;
a second signal ends at once.
"""

import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
from types import FrameType
from typing import Any, Protocol

import uvicorn

from ssecore.errors import SettingsError
from ssecore.settings import Settings

__all__ = ["serve"]

logger = logging.getLogger("sseapp")

#: The kernel's buffer for one client. Linux would let it grow to 4 MiB: so much would a frozen client hold.
SEND_BUFFER_BYTES = 256 * 1024
BACKLOG = 4096
#: How long an idle connection is kept. Longer than a proxy in front keeps its own (nginx and AWS 60 s, Google 600): a
#: request that comes on a connection just as it is closed here is a 502 to its client.
KEEP_ALIVE_S = 620

#: The garbage collector's first generation, of 700 by default: a connection is some 60 objects that it looks at, and
#: where thousands of them wait it would look at them again and again. Much higher, and what connections leave behind
#: in cycles (13 objects of uvicorn's each) stays for long.
COLLECT_EACH = 5_000


class Drainable(Protocol):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    direct: bool

    async def drain(self, grace_s: float) -> None: ...

    def abort(self) -> None: ...


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: Drainable, drain_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._grace_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own: it raises the signal again at the end, and the exit code would not be 0.
        if self.should_exit:
            # At once: whatever else would have to be cancelled, and each task would say so in the log. Nothing is lost
            # by it: the event log withstands it, and runs are closed as interrupted at the next start.
            logging.shutdown()
            os._exit(0)
        if sig == signal.SIGINT:
            self._grace_s = 0
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is there now, code for the most part, stays: a full pass needn't look at it. With 1,000 streams, on a
        # busy machine, one took 0.14 s; it takes 0.01 s.
        gc.collect()
        gc.freeze()
        gc.set_threshold(COLLECT_EACH, 10, 10)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._app.drain(self._grace_s)
        self._app.abort()
        await super().shutdown(sockets)


class _TruncatedOnPurpose(logging.Filter):
    """A stream whose client stopped reading is cut, as it must be: no error of the app."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "without completing response" not in record.getMessage()


def serve(app: Drainable, settings: Settings) -> int:
    """Serve until a signal comes. Returns the exit code. Raises `SettingsError` where it can't or must not listen."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for name, level in (("uvicorn.error", logging.WARNING), ("httpx", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("uvicorn.error").addFilter(_TruncatedOnPurpose())
    sock = _listen(settings)
    host, port = sock.getsockname()[:2]
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
    )
    app.direct = True  # its `send` is uvicorn's
    server = _Server(config, app, settings.drain_s)
    logger.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[sock])
    return 0 if server.started else 3


def _listen(settings: Settings) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise SettingsError(f"can't listen on {settings.host!r}: {error.strerror}", field="host") from None
    if settings.auth != "off" and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise SettingsError(
            f"{settings.host} is not a loopback address, and nobody is asked for credentials: "
            "set SSEAPP_AUTH=off if everybody who can reach it may use it",
            field="host",
        )
    try:
        sock = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise SettingsError(f"can't listen on {settings.host}:{settings.port}: {error.strerror}") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Closing the transport waits for a client that never reads; the kernel doesn't. Accepted sockets inherit it.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(settings.send_timeout_s * 1000))
    return sock
