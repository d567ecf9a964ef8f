"""The ASGI app, and the service made of it. The command is `ssecore/server/cli.py`.

    app = SSEApp([GET("/countdown/{seconds:int}", countdown)])        # an ASGI app, to be served or mounted
    uvicorn --factory sseapp:create_app                               # the service
    sseapp serve                                                      # the same under our own runner

For each request the app finds the route, decodes query and body, and calls the handler. It streams what an async
generator yields, or sends what a coroutine returns. An error before that becomes a problem (RFC 9457).
"""

if __name__ == "__main__":  # before the imports: see `ssecore.server.command`
    from ssecore.server.command import main

    raise SystemExit(main())

import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import anyio
from anyio import get_cancelled_exc_class

from ssecore.dialects import (
    AG_UI,
    AI_SDK,
    DATA_ONLY,
    NAMED,
    OPENAI,
    OPENAI_RESPONSES,
    Dialect,
    SoFar,
    failure_of,
    public_text,
    spread,
)
from ssecore.errors import (
    ClientGone,
    Draining,
    EncodeError,
    NotFound,
    NotRunning,
    SettingsError,
    SSEAppError,
    Unavailable,
)
from ssecore.hosting import HOSTED, EventStream
from ssecore.http.guard import Caller, Guard
from ssecore.http.openapi import OpenAPI
from ssecore.http.rates import PublishRate
from ssecore.http.request import Receive, Request, RequestFacts, Room, Services
from ssecore.http.responses import (
    JSON,
    ByteStream,
    Response,
    Send,
    http_error,
    problem,
    raw_headers,
)
from ssecore.http.routes import DELETE, GET, PATCH, POST, PUT, About, Route, Run, Table, Upload
from ssecore.log import Log
from ssecore.log.measured import measured
from ssecore.log.memory import MemoryLog
from ssecore.log.sqlite import SqliteLog
from ssecore.log.tail import Attached, Reader, Tails
from ssecore.metrics import Facts, Metrics
from ssecore.runs import ROUTES as RUN_ROUTES
from ssecore.runs import Runs
from ssecore.server.signals import chained
from ssecore.server.stderr import dropped_lines
from ssecore.settings import Settings
from ssecore.streaming.merge import merge
from ssecore.streaming.progress import LogLevel, ProgressLogger, from_task, from_thread
from ssecore.streaming.pump import EventPump, Pump
from ssecore.streaming.sender import Sender, SenderOptions, Source, Timekeeper
from ssecore.topics import Subscription, Topics
from ssecore.wire import CONTENT_TYPE, Decoder, Event, encode

__all__ = [
    "AG_UI",
    "AI_SDK",
    "DATA_ONLY",
    "DELETE",
    "GET",
    "JSON",
    "NAMED",
    "OPENAI",
    "OPENAI_RESPONSES",
    "PATCH",
    "POST",
    "PUT",
    "About",
    "ByteStream",
    "Decoder",
    "Dialect",
    "Event",
    "EventStream",
    "LogLevel",
    "NotFound",
    "ProgressLogger",
    "Request",
    "Response",
    "Route",
    "Run",
    "SSEApp",
    "SSEAppError",
    "Settings",
    "SoFar",
    "Subscription",
    "Upload",
    "create_app",
    "encode",
    "from_task",
    "from_thread",
    "merge",
]

logger = logging.getLogger("sseapp")

_EVENT_STREAM_HEADERS = [
    (b"content-type", CONTENT_TYPE.encode()),
    (b"cache-control", b"no-cache, no-transform"),
    # Turns off nginx's buffering.
    (b"x-accel-buffering", b"no"),
]

#: Request bodies of `max_body_bytes` in memory at once, in all and for one caller.
BODIES: Final = 64
BODIES_PER_CALLER: Final = 16
#: Each takes `SPOOL_BYTES` in memory and up to `max_import_bytes` on the disk.
UPLOADS: Final = 32
UPLOADS_PER_CALLER: Final = 8
#: How long a client may take to read a stream's last bytes.
FAREWELL_S: Final = 1.0

_Pulse = tuple[Callable[[], Event], float]  # arguments of `Sender.pulse`

#: Makes `request.state`. Exited when the app stops.
Lifespan = Callable[["SSEApp"], AbstractAsyncContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Answer:
    """`body`, or a stream from `source`."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    source: Source | None = None
    pulse: _Pulse | None = None


class SSEApp:
    """An ASGI app that streams what its handlers yield. Apps share no state.

    `request.state`, runs and topics need a running app. A server's lifespan starts it, but frameworks don't pass that
    on to a mounted app: there use `async with app.running():` in the program's own lifespan.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        settings: Settings | None = None,
        *,
        lifespan: Lifespan | None = None,
        caller: Caller | None = None,
    ) -> None:
        self.settings = settings or Settings()
        #: Authentication. Without `caller`, tokens or `auth="off"` only requests from this machine are accepted.
        self.guard = Guard(self.settings, caller)
        self._publish_rate = PublishRate(self.settings.max_publish_per_s)
        self.state: Any = None
        self.draining = False
        #: One of the app's own tasks failed after the start. Our runner ends the process then.
        self.failed = False
        self._running = False
        #: By our runner. Under another server a signal starts the drain.
        self.drained_by_runner = False
        table = [*routes, *RUN_ROUTES, *self.guard.routes]
        if not any(route.path == "/openapi.json" for route in routes):
            table.append(OpenAPI(table, self.guard).route)
        self._table = Table(table)
        self._lifespan = lifespan
        self._streams: set[Sender] = set()
        self._places = Room("open streams", self.settings.max_streams, self.settings.max_streams_per_caller)
        largest = self.settings.max_body_bytes
        self._body_bytes = Room("bytes of request bodies", BODIES * largest, BODIES_PER_CALLER * largest)
        self._uploads = Room("uploads", UPLOADS, UPLOADS_PER_CALLER)
        self._idle: anyio.Event | None = None
        self._services: Services | None = None
        self._runs: Runs | None = None
        self.metrics = Metrics(self._facts)
        self._options = SenderOptions(
            heartbeat_s=self.settings.heartbeat_s,
            send_timeout_s=self.settings.send_timeout_s,
            max_stream_s=self.settings.max_stream_s,
            retry_ms=self.settings.retry_ms,
            first_event=lambda route, seconds: self.metrics.first_event.labels(route).observe(seconds),
            ended=self._over,
        )

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._converse(scope, receive, send)
        request = Request(scope, receive, self.state, services=self._services, draining=self.draining)
        hosted: EventStream | None = scope.get(HOSTED)
        sender: Sender | None = None
        try:
            answer = await self._answer(request, hosted)
            if answer.source is not None:
                sender = Sender(request, send, answer.source, answer.headers, self._options, answer.status)
                if answer.pulse is not None:
                    sender.pulse(*answer.pulse)
                self._streams.add(sender)
                if self.draining and isinstance(sender.source, Reader):
                    sender.stop("drain")  # the drain began while the request waited for the log
                # Awaited here: each coroutine that waits costs a stream 0.3 KiB.
                return await sender.run(self._services is not None)
        except ClientGone:
            return
        except get_cancelled_exc_class():
            raise
        except BaseException as error:
            failure = failure_of(error)
            theirs = failure.__cause__ if isinstance(failure, SSEAppError) else failure
            try:
                if hosted is not None and isinstance(theirs, Exception) and http_error(theirs) is not None:
                    raise theirs from None
                answer = self._refused(request, http_error(failure) or failure)
                failure.__traceback__ = None
            finally:
                del failure, theirs  # cycles would hold the body
        finally:
            if sender is None:  # else `_over`: a parked stream outlives this call
                self._leave(request)
        headers = [*answer.headers, *request.answer_headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        body = b"" if request.method == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _converse(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._run_lifespan(receive, send)
        elif scope["type"] == "websocket":
            # Sent as 403.
            await receive()
            await send({"type": "websocket.close", "code": 1003, "reason": "server-sent events only"})
        else:
            raise ValueError(f"the ASGI scope {scope['type']!r} is not supported")

    # The app's own life

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the app. Raises `RuntimeError` if it is running already."""
        if self._running:
            raise RuntimeError("the app is running already")
        self._running = True
        try:
            async with self._opened():
                yield
        finally:
            self._running = False

    @property
    def private(self) -> bool:
        """No authentication is configured: only requests from this machine are accepted."""
        return self.guard.mode == "private"

    @property
    def topics(self) -> Topics:
        """For your own routes: `await app.topics.publish("news", Event(…))`. Raises `NotRunning`."""
        return self._running_services().topics

    @property
    def runs(self) -> Runs:
        """For your own code: `id = await app.runs.start(answer(user), caller=user.name)`. Raises `NotRunning`."""
        return self._running_services().runs

    def _running_services(self) -> Services:
        if self._services is None:
            raise NotRunning()
        return self._services

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        failure: Exception | None = None  # of the caller's block; the task group would wrap it
        async with AsyncExitStack() as stack:
            if self._lifespan is not None:
                self.state = await stack.enter_async_context(self._lifespan(self))
            log = measured(open_log(self.settings), self.metrics)
            await stack.enter_async_context(log.running())
            tasks = await stack.enter_async_context(anyio.create_task_group())
            tails = Tails(log)
            runs = self._runs = Runs(log, tails, self.settings, tasks, self._table.dialects)
            stack.push_async_callback(runs.close)
            await runs.recover()
            topics = Topics(log, tails, self.settings)
            self._services = Services(runs, topics, self.metrics)
            tasks.start_soon(Timekeeper(self._options, self._streams).run)
            if self.guard.tokens is not None:
                tasks.start_soon(self.guard.tokens.watch)
            tasks.start_soon(topics.keep)
            if log.peers is not None:
                tasks.start_soon(runs.keep_watch)
            self.draining = self.failed = False
            told = anyio.Event()
            if not self.drained_by_runner:
                stack.enter_context(chained(told.set))
                tasks.start_soon(self._leave_soon, told)
            try:
                yield
            except Exception as error:
                failure = error
            finally:
                if tasks.cancel_scope.cancel_called:  # one of its tasks failed
                    self.failed, self._services = True, None
                with anyio.CancelScope(shield=self.failed):  # so that streams end properly
                    await self.drain(0)
                tasks.cancel_scope.cancel()
                self._services = self.state = None
        if failure is not None:
            raise failure

    def _facts(self) -> Facts:
        if self._services is None:
            return Facts(self._streams, dropped_lines=dropped_lines())
        runs = self._services.runs
        return Facts(self._streams, runs.at_work, runs.tails.gaps, dropped_lines())

    def at_work(self) -> list[str]:
        """Routes of open streams and runs, for the log; of a run the id too. Thread-safe."""
        runs = self._runs.names() if self._runs is not None else []
        return [*runs, *(f"{stream.request.method} {stream.route}" for stream in list(self._streams))]

    async def drain(self, grace_s: float) -> None:
        """Refuse new streams, give running generators `grace_s` to finish, then end them.

        Readers of runs and topics are ended at once: they can resume elsewhere, or after the restart. Returns when all
        streams have ended, or `FAREWELL_S` later: a client that doesn't read keeps its stream until `abort`.
        """
        self.draining = True
        for stream in list(self._streams):
            if isinstance(stream.source, Reader):
                stream.stop("drain")
        async with anyio.create_task_group() as tasks:
            if self._services is not None:
                tasks.start_soon(self._services.runs.drain, grace_s)
            with anyio.move_on_after(grace_s):
                await self._no_streams()
            for stream in list(self._streams):
                stream.stop("drain")
            with anyio.move_on_after(FAREWELL_S):
                await self._no_streams()

    async def _leave_soon(self, told: anyio.Event) -> None:
        """Drain at a signal, under another server, which limits how long the shutdown takes."""
        await told.wait()
        await self.drain(0)
        self.abort()

    def abort(self) -> None:
        """Disconnect the remaining clients, before the server cancels their tasks and logs that."""
        for stream in list(self._streams):
            stream.abort("drain")

    def give_up(self) -> None:
        """Answer requests that wait for an unreachable log with 503, before the server cancels them."""
        if self._services is not None:
            self._services.runs.log.give_up()

    async def _no_streams(self) -> None:
        while self._streams:
            if self._idle is None:
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
        except (Exception, BaseExceptionGroup) as error:
            stage = "shutdown" if started else "startup"
            what = "the app" if self.failed else stage
            if isinstance(error, SSEAppError):
                logger.error("%s failed: %s", what, error)
            else:
                logger.exception("%s failed", what)
            self.failed = started
            await send({"type": f"lifespan.{stage}.failed", "message": str(error)})
        else:
            await send({"type": "lifespan.shutdown.complete"})

    # One request

    async def _answer(self, request: Request, hosted: EventStream | None) -> Answer:
        """If the answer has a source, a place was taken for it, and only its `Sender` closes it."""
        params: Mapping[str, Any] = {}
        if hosted is not None:
            route = hosted.take(request)
        else:
            request.answer_headers = self.guard.cors_headers(request)
            self.guard.admit(request)
            if (preflight := self.guard.preflight(request)) is not None:
                return _whole(preflight)
            route, params = await self._enter(request)
        pulse: _Pulse | None = None
        result = None if route.streams else await route.call(request, params)
        if route.streams or isinstance(result, Subscription):
            if route.streams and request.method in ("GET", "HEAD") and request.last_event_id == "end":
                return Answer(204, [])  # `EventSource` doesn't reconnect after a 204
            if request.method == "HEAD":
                return Answer(200, _EVENT_STREAM_HEADERS)
            self._take_place(request)
        if isinstance(result, Subscription):
            pulse = result.pulse and (result.pulse, result.pulse_s)
            result = await request.topics.subscribe(request, result)
        elif route.run is not None:
            result = await request.runs.respond(request, route, params)
        elif route.streams:
            pump = EventPump(
                route.call(request, params),
                request,
                buffer_bytes=self.settings.buffer_bytes,
                ends_for_good=request.method == "GET",
            )
            return Answer(200, _EVENT_STREAM_HEADERS, source=pump)
        return await self._ready(request, route, result, pulse)

    async def _ready(self, request: Request, route: Route, result: Any, pulse: _Pulse | None) -> Answer:
        """The answer for a handler's or a run's result. Closes a source that won't be sent."""
        if isinstance(result, Response):
            return _whole(result)
        async with AsyncExitStack() as unsent:
            if isinstance(result, Attached):
                source: Source = result.reader
                unsent.callback(source.close)
                status, headers = 200, [*_EVENT_STREAM_HEADERS, *raw_headers(None, result.headers)]
            elif isinstance(result, ByteStream):
                source = Pump(result.chunks, _chunk, request, buffer_bytes=self.settings.buffer_bytes)
                if hasattr(result.chunks, "aclose"):
                    unsent.push_async_callback(result.chunks.aclose)
                status, headers = result.status, raw_headers(result.media_type, result.headers)
            else:
                raise TypeError(f"{request.path}: the handler returned {type(result).__name__}, not a Response")
            if request.method == "HEAD":
                return Answer(status, headers)
            self._take_place(request)
            unsent.pop_all()
        if isinstance(source, Reader) and request.last_event_id:
            self.metrics.resumes.labels(route.path).inc()
        return Answer(status, headers, source=source, pulse=pulse)

    async def _enter(self, request: Request) -> tuple[Route, Mapping[str, Any]]:
        """Authenticate and decode the request. Raises the 4xx that fits."""
        settings = self.settings
        route, params = self._table.match(request.method, request.path)
        request.route = route
        if not route.open:
            await self.guard.enter(request)
            if route.may:
                self.guard.permit(request, route.may.format(**params))
        if route.publishes:
            self._publish_rate.spend(request.caller)
        if route.streams and route.body is not None:
            self._take_place(request)  # before the body is read: a refusal is cheap then
        await request.decode(
            route, params, settings.max_body_bytes, settings.max_import_bytes, self._body_bytes, self._uploads
        )
        return route, params

    def _leave(self, request: RequestFacts) -> None:
        if request.has_place:
            request.has_place = False
            self._places.give_back(request.caller, 1)
        request.close()

    def _over(self, stream: Sender) -> None:
        """Called at a stream's end, which may come after the request's call has returned."""
        self._streams.discard(stream)
        self._leave(stream.request)
        self._note(stream)
        if not self._streams and self._idle is not None:
            self._idle.set()
            self._idle = None

    def _note(self, stream: Sender) -> None:
        """Count and log a stream's end: the caller's name, and nothing of what was sent."""
        request, failure = stream.request, stream.source.failure
        reason: str = request.end_reason
        if reason == "failed" and isinstance(failure, SSEAppError) and failure.status < 500 and not stream.events_sent:
            reason = "refused"  # the handler raised a 4xx before its first event
        self.metrics.ended(stream, reason)
        if logger.isEnabledFor(logging.INFO):
            seconds = round(monotonic() - stream.began, 3)
            facts = {"method": request.method, "route": stream.route, "reason": reason, "seconds": seconds}
            facts |= {"events": stream.events_sent, "bytes": stream.sent_bytes, "caller": request.caller}
            text = "%(method)s %(route)s ended: %(reason)s after %(seconds)s s, %(events)s events, %(bytes)s bytes"
            logger.info(f"{text}, caller %(caller)s" if request.caller else text, facts, extra={"stream": facts})

    def _take_place(self, request: Request) -> None:
        """Count the request's stream against the limits until it ends. Raises `Draining`, and what `Room.take` does."""
        if request.has_place:
            return
        if self.draining:
            raise Draining
        self._places.take(request.caller, 1)
        request.has_place = True

    def _refused(self, request: Request, error: Exception) -> Answer:
        try:
            return _whole(self._refusal(request, error))
        except ValueError as bad_headers:
            return _whole(problem(SSEAppError(public_text(bad_headers))))

    def _refusal(self, request: Request, error: Exception) -> Response:
        reference: str | None = None
        if not isinstance(error, SSEAppError):
            error = SSEAppError(public_text(error))  # logged, with a reference
        else:
            reference = self._log_refusal(request, error)
        self.metrics.refused.labels(error.status).inc()
        # `EventSource` reconnects after a 200 that ends, never after a 503.
        if isinstance(error, Unavailable) and request.like_event_source:
            body = b"%bretry: %d\n" % (request.preamble, spread(self._options.retry_ms))
            return Response(body, media_type=CONTENT_TYPE, headers={"cache-control": "no-cache"})
        return problem(error, reference, request.dialect)

    def _log_refusal(self, request: Request, error: SSEAppError) -> str | None:
        """Returns the reference of a 5xx, which the client gets too."""
        route = request.route.path if request.route is not None else "none"
        text = "%s %s answered %d %s: %r"  # `%r`: the client's line ends
        detail = error.detail
        if isinstance(error, EncodeError) and error.__cause__ is not None:  # its type, which isn't sent
            detail += f": {error.__cause__!r}"
        facts = (request.method, route, error.status, error.code, detail)
        if error.status < 500:
            logger.debug(text, *facts)
            return None
        reference, level = secrets.token_hex(6), logging.ERROR if error.status == 500 else logging.WARNING
        logger.log(level, f"reference %s: {text}", reference, *facts)
        return reference


def _whole(response: Response) -> Answer:
    """Raises `ValueError` for invalid headers."""
    headers = raw_headers(response.media_type, response.headers)
    if response.status not in (204, 304):
        headers.append((b"content-length", b"%d" % len(response.body)))
    return Answer(response.status, headers, response.body)


def _chunk(item: bytes | bytearray | memoryview) -> bytes:
    # `bytes(3)` is three NULs.
    if not isinstance(item, bytes | bytearray | memoryview):
        raise TypeError(f"a ByteStream has chunks of bytes, not {type(item).__name__}")
    return bytes(item)


def open_log(settings: Settings) -> Log:
    """The event log that the settings name."""
    if settings.log == "memory":
        return MemoryLog(max_bytes=settings.log_max_bytes)
    if settings.log != "sqlite":
        try:
            from ssecore.log.redis import RedisLog
        except ModuleNotFoundError:
            raise SettingsError("the Redis log needs redis-py: pip install 'sseapp[redis]'", field="log") from None
        return RedisLog(settings.log, lease_s=settings.lease_s, max_bytes=settings.log_max_bytes)
    return SqliteLog(
        settings.data_dir / "log.db",
        full_sync=settings.log_full_sync,
        lock_wait_s=settings.drain_s,
        max_bytes=settings.log_max_bytes,
    )


def create_app(settings: Settings | None = None) -> SSEApp:
    """The service: an `SSEApp` with the routes of `handlers/`. `settings` default to the environment's."""
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
