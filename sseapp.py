"""The front door: the ASGI callable, the service made of it, and the command `sseapp`.

    app = SSEApp([GET("/countdown/{seconds:int}", countdown)])        # an ASGI app, to be served or mounted
    uvicorn --factory sseapp:create_app                               # the service
    sseapp serve                                                      # the same under our own runner

One request goes through here as: match the table, read and decode query and body, call the handler; then stream what an
async generator yields, or send what a coroutine returned; and any error on this way becomes a problem (RFC 9457).
"""

import argparse
import logging
import random
import sys
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import anyio

from ssecore.errors import ClientGone, NotFound, SettingsError, SSEAppError, Unavailable
from ssecore.request import Receive, Request
from ssecore.responses import JSON, ByteStream, Response, Send, problem, raw_headers, send_response
from ssecore.routes import DELETE, GET, POST, Route, Table, Upload
from ssecore.settings import Settings, describe
from ssecore.stream import Pump, Stream, StreamOptions, Timekeeper, merge, public_text
from ssecore.wire import CONTENT_TYPE, Decoder, Event, encode

__all__ = [
    "DELETE",
    "GET",
    "JSON",
    "POST",
    "ByteStream",
    "Decoder",
    "Event",
    "NotFound",
    "Request",
    "Response",
    "Route",
    "SSEApp",
    "SSEAppError",
    "Settings",
    "Upload",
    "create_app",
    "encode",
    "main",
    "merge",
]

logger = logging.getLogger("sseapp")

_EVENT_STREAM_HEADERS = [
    (b"content-type", CONTENT_TYPE.encode()),
    (b"cache-control", b"no-cache, no-transform"),
    # nginx buffers no answer that says so, whatever its configuration.
    (b"x-accel-buffering", b"no"),
]

#: Makes what handlers find in `request.state`; left when the app stops.
Lifespan = Callable[["SSEApp"], AbstractAsyncContextManager[Any]]


class SSEApp:
    """An ASGI app that streams what its handlers yield. Holds all its state itself: two apps never meet.

    It must be running before `request.state` is there and drain works: by the server's lifespan, or, where it is
    mounted in another program (hosts don't pass the lifespan on), by `async with app.running():` in the host's own.
    """

    def __init__(
        self, routes: Sequence[Route], settings: Settings | None = None, *, lifespan: Lifespan | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.state: Any = None
        self.draining = False
        self._table = Table(routes)
        self._lifespan = lifespan
        self._streams: set[Stream] = set()
        self._idle: anyio.Event | None = None
        self._timekeeper: Timekeeper | None = None
        self._options = StreamOptions(
            heartbeat_s=self.settings.heartbeat_s,
            send_timeout_s=self.settings.send_timeout_s,
            max_stream_s=self.settings.max_stream_s,
            retry_ms=self.settings.retry_ms,
        )

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._run_lifespan(receive, send)
        elif scope["type"] == "websocket":
            # Before the handshake is accepted a close is a 403 to the client.
            await receive()
            await send({"type": "websocket.close", "code": 1003, "reason": "server-sent events only"})
        else:
            raise ValueError(f"the ASGI scope {scope['type']!r} is not supported")

    # The app's own life

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run what belongs to the app as a whole: its lifespan, and the sweep over its streams. Once at a time."""
        if self._timekeeper is not None:
            raise RuntimeError("the app is running already")
        async with AsyncExitStack() as stack:
            if self._lifespan is not None:
                self.state = await stack.enter_async_context(self._lifespan(self))
            tasks = await stack.enter_async_context(anyio.create_task_group())
            self._timekeeper = Timekeeper(self._options)
            tasks.start_soon(self._timekeeper.run)
            self.draining = False
            try:
                yield
            finally:
                await self.drain(0)
                tasks.cancel_scope.cancel()
                self._timekeeper = self.state = None

    async def drain(self, grace_s: float) -> None:
        """Refuse new streams from now on, give those that are open `grace_s` to finish, then end them with a farewell.

        Returns when all have ended, or after a second more: a client that doesn't read keeps its stream.
        """
        self.draining = True
        with anyio.move_on_after(grace_s):
            await self._no_streams()
        for stream in list(self._streams):
            stream.stop("drain")
        with anyio.move_on_after(1):
            await self._no_streams()

    async def _no_streams(self) -> None:
        while self._streams:
            self._idle = anyio.Event()
            await self._idle.wait()

    async def _run_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        started = False
        try:
            async with self.running():
                started = True
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except Exception as error:
            stage = "shutdown" if started else "startup"
            if isinstance(error, SSEAppError):
                logger.error("%s failed: %s", stage, error)
            else:
                logger.exception("%s failed", stage)
            await send({"type": f"lifespan.{stage}.failed", "message": str(error)})
        else:
            await send({"type": "lifespan.shutdown.complete"})

    # One request

    async def _http(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        request = Request(scope, receive, self.state, draining=self.draining)
        head = request.method == "HEAD"
        try:
            answer = await self._answer(request, send, head=head)
        except ClientGone:
            return
        except SSEAppError as error:
            answer = problem(error)
        except Exception as error:
            answer = problem(SSEAppError(public_text(error)))
        finally:
            request.close()
        if answer is not None:
            await send_response(answer, send, head=head)

    async def _answer(self, request: Request, send: Send, *, head: bool) -> Response | None:
        """The answer to send, or `None` where it has been streamed."""
        settings = self.settings
        route, params = self._table.match(request.method, request.path)
        await request.decode(route, params, settings.max_body_bytes, settings.max_import_bytes)
        if not route.streams:
            answer = await route.handler(request, **params)
            if isinstance(answer, ByteStream):
                return await self._stream_bytes(request, send, answer, head=head)
            if not isinstance(answer, Response):
                raise TypeError(f"{route.path}: the handler returned {type(answer).__name__}, not a Response")
            return answer
        if request.method in ("GET", "HEAD") and request.last_event_id == "end":
            return Response(status=204)  # it has ended for good: an `EventSource` stops here
        if head:
            return Response(media_type=CONTENT_TYPE, headers={"cache-control": "no-cache, no-transform"})
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        once = request.method == "GET"
        pump = Pump(
            route.handler(request, **params),
            encode,
            buffer_bytes=settings.buffer_bytes,
            last_id=b"id: end\n\n" if once else None,
        )
        stream = Stream(request, send, pump, _EVENT_STREAM_HEADERS, self._options, ends_for_good=once)
        await self._run(stream)
        return None

    async def _stream_bytes(self, request: Request, send: Send, answer: ByteStream, *, head: bool) -> Response | None:
        if head:
            if hasattr(answer.chunks, "aclose"):
                await answer.chunks.aclose()
            return Response(media_type=answer.media_type, headers=answer.headers)
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        pump = Pump(answer.chunks, bytes, buffer_bytes=self.settings.buffer_bytes)
        headers = raw_headers(answer.media_type, answer.headers)
        await self._run(Stream(request, send, pump, headers, self._options, events=False))
        return None

    async def _run(self, stream: Stream) -> None:
        self._streams.add(stream)
        try:
            await stream.run(self._timekeeper)
        finally:
            self._streams.discard(stream)
            if not self._streams and self._idle is not None:
                self._idle.set()

    def _refusal(self, request: Request) -> Response | None:
        """Why no stream can be opened now, if so; it passes, so a browser's `EventSource` must not be killed by it."""
        limit = self.settings.max_streams
        if not self.draining and (limit is None or len(self._streams) < limit):
            return None
        if request.is_event_source:
            # Spread, so that not all of them come back in one second.
            retry_ms = random.randint(self._options.retry_ms, 3 * self._options.retry_ms)
            return Response(b"retry: %d\n" % retry_ms, media_type=CONTENT_TYPE, headers={"cache-control": "no-cache"})
        text = "the service is about to stop" if self.draining else "too many open streams"
        raise Unavailable(f"{text}; try again", headers={"retry-after": str(random.randint(1, 5))})


def create_app(settings: Settings | None = None) -> SSEApp:
    """The service: the engine with the routes of `handlers/`. Settings come from the environment if not given."""
    try:
        from handlers import ROUTES, resources
    except ModuleNotFoundError as error:
        if error.name != "handlers":
            raise
        raise SettingsError(
            "the service's handlers are not importable: start it in its checkout or its container; "
            "in a program of your own use SSEApp with your own routes"
        ) from None
    return SSEApp(ROUTES, settings or Settings.from_env(), lifespan=lambda app: resources(app.settings))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `sseapp`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="sseapp", description="Streams over Server-Sent Events.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="run the service",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"variables, each of them a setting (an option wins over its variable):\n{describe()}",
    )
    for option, meaning in (
        ("host", "address to listen on"),
        ("port", "port to listen on; 0 takes a free one"),
        ("data-dir", "folder of the data"),
    ):
        serve.add_argument(f"--{option}", help=meaning)
    options = vars(parser.parse_args(arguments))
    options.pop("command")
    try:
        from ssecore.server import serve as run

        settings = Settings.from_env(**options)
        return run(create_app(settings), settings)
    except SSEAppError as error:
        print(f"sseapp: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.path.insert(0, "")  # `python -m sseapp` in a checkout finds the handlers
    sys.exit(main())
