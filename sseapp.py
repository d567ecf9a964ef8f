"""The front door: the ASGI callable, and the service made of it. (The command `sseapp` is `ssecore/server/cli.py`.)

    app = SSEApp([GET("/countdown/{seconds:int}", countdown)])        # an ASGI app, to be served or mounted
    uvicorn --factory sseapp:create_app                               # the service
    sseapp serve                                                      # the same under our own runner

One request goes through here as: match the table, read and decode query and body, call the handler; then stream what an
async generator yields, or send what a coroutine returned; and any error on this way becomes a problem (RFC 9457).
"""

if __name__ == "__main__":  # first of all: see `ssecore.server.command`
    from ssecore.server.command import main

    raise SystemExit(main())

import logging
import random
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
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
    TooManyRequests,
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
    response_start,
    send_response,
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
from ssecore.streaming.sender import Sender, SenderOptions, Timekeeper
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
    # nginx buffers no answer that says so, whatever its configuration.
    (b"x-accel-buffering", b"no"),
]

#: Of bodies that requests and runs hold in memory at once: so many of the largest, and of one caller's.
BODIES: Final = 64
BODIES_PER_CALLER: Final = 16
#: The same for uploads, which hold `SPOOL_BYTES` each in memory and up to `max_import_bytes` on the disk.
UPLOADS: Final = 32
UPLOADS_PER_CALLER: Final = 8
#: How long a client may take to read a farewell.
FAREWELL_S: Final = 1.0

#: Makes what handlers find in `request.state`; left when the app stops.
Lifespan = Callable[["SSEApp"], AbstractAsyncContextManager[Any]]


class SSEApp:
    """An ASGI app that streams what its handlers yield. Holds all its state itself: two apps never meet.

    It must be running before `request.state` is there and drain works: by the server's lifespan, or, where it is
    mounted in another program (hosts don't pass the lifespan on), by `async with app.running():` in the host's own.
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
        #: Who may enter. Without `caller`, tokens or `auth="off"` in the settings: this machine only.
        self.guard = Guard(self.settings, caller)
        self._publish_rate = PublishRate(self.settings.max_publish_per_s)
        self.state: Any = None
        self.draining = False
        #: It has ended by itself, since it started: our runner ends the process then.
        self.failed = False
        self._running = False
        #: Set by our runner: it says when a drain begins. Under another server a signal does.
        self.drained_by_runner = False
        table = [*routes, *RUN_ROUTES, *self.guard.routes]
        if not any(route.path == "/openapi.json" for route in routes):
            table.append(OpenAPI(table, self.guard).route)
        self._table = Table(table)
        self._lifespan = lifespan
        self._streams: set[Sender] = set()
        self._taken = 0  # places of streams, from the decision that there is room for one to its end
        self._places: Counter[str] = Counter()  # the same by caller
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
        # The body of what would be `_http`: while a stream runs each coroutine that waits costs it 0.3 KiB.
        request = Request(scope, receive, self.state, services=self._services, draining=self.draining)
        head = request.method == "HEAD"
        hosted: EventStream | None = scope.get(HOSTED)
        sender: Sender | None = None
        try:
            if hosted is None:
                request.answer_headers = self.guard.cors_headers(request)
                self.guard.admit(request)
                answer = self.guard.preflight(request) or await self._answer(request, send, head=head)
            else:
                answer = await self._answer_hosted(request, send, hosted, head=head)
            if isinstance(answer, Sender):
                sender = answer
                self._streams.add(sender)
                if self.draining and isinstance(sender.source, Reader):
                    sender.stop("drain")  # it was let in before, and has waited for the log
                return await sender.run(self._services is not None)
            start = response_start(answer) if answer is not None else None
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
                answer, start = self._refused(request, http_error(failure) or failure)
                failure.__traceback__ = None
            finally:
                # Else this frame (or a run's worker) and the traceback keep each other and the request's body until a
                # garbage collection.
                del failure, theirs
        finally:
            if sender is None:  # else at the stream's end, which may come long after this call's
                self._leave(request)
        if answer is not None and start is not None:
            start["headers"] += request.answer_headers
            await send_response(answer, start, send, head=head)

    async def _converse(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
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
        """Whether it answers its own machine only, since nothing says who else may."""
        return self.guard.mode == "private"

    @property
    def topics(self) -> Topics:
        """For a host's own routes: `await app.topics.publish("news", Event(…))`. Raises `NotRunning`."""
        return self._running_services().topics

    @property
    def runs(self) -> Runs:
        """For a host's own code: `id = await app.runs.start(answer(user), caller=user.name)`. Raises `NotRunning`."""
        return self._running_services().runs

    def _running_services(self) -> Services:
        if self._services is None:
            raise NotRunning()
        return self._services

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        failure: Exception | None = None  # of the host: raised outside of the group, which would wrap it
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
                with anyio.CancelScope(shield=self.failed):  # streams get their farewell all the same
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
        """The streams and runs that haven't ended, for the log: by their routes, a run by its id too. Thread-safe."""
        runs = self._runs.names() if self._runs is not None else []
        return [*runs, *(f"{stream.request.method} {stream.route}" for stream in list(self._streams))]

    async def drain(self, grace_s: float) -> None:
        """Refuse new streams from now on; give fleeting ones and runs `grace_s` to finish, then end them.

        Readers of runs and topics get their farewell at once: what they read goes on without them. Returns when all
        have ended, or after a second more: a client that doesn't read keeps its stream, until `abort`.
        """
        self.draining = True
        for stream in list(self._streams):
            if isinstance(stream.source, Reader):  # it goes on elsewhere, or here after the restart
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
        """Under another server: say farewell when a signal comes. How long the rest may take is the server's to say."""
        await told.wait()
        await self.drain(0)
        self.abort()

    def abort(self) -> None:
        """Cut off who is still there: before the server cancels their tasks, and says so in its log."""
        for stream in list(self._streams):
            stream.abort("drain")

    def give_up(self) -> None:
        """Fail requests that wait for a log that is away: each gets its 503, before the server cancels them."""
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

    async def _answer(self, request: Request, send: Send, *, head: bool) -> Response | Sender | None:
        """What to send or to run, or `None` where all has been said."""
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
            self._take_place(request)  # before its body is read: a refusal costs nothing then
        await request.decode(
            route, params, settings.max_body_bytes, settings.max_import_bytes, self._body_bytes, self._uploads
        )
        if not route.streams:
            answer = await route.handler(request, **params)
            return await self._send_answer(request, send, answer, head=head)
        return await self._open(request, send, route, params, head=head)

    async def _answer_hosted(
        self, request: Request, send: Send, hosted: EventStream, *, head: bool
    ) -> Response | Sender | None:
        """The same where the route is an embedding program's own, which has let the request in."""
        request.caller = hosted.caller
        request.answer_headers = hosted.raw_headers
        request.route = route = hosted.route(request.scope)
        events = hosted.events
        if isinstance(events, str):
            return await self._send_answer(request, send, await request.runs.view(request, events), head=head)
        if isinstance(events, Subscription):
            return await self._send_answer(request, send, events, head=head)
        return await self._open(request, send, route, {}, head=head)

    async def _open(
        self, request: Request, send: Send, route: Route, params: Mapping[str, Any], *, head: bool
    ) -> Response | Sender | None:
        """What to send or to run for what a generator gives."""
        settings = self.settings
        if request.method in ("GET", "HEAD") and request.last_event_id == "end":
            return Response(status=204)  # it has ended for good: an `EventSource` stops here
        if head:
            return await self._send_head(request, send, _EVENT_STREAM_HEADERS)
        if not request.has_place:
            self._take_place(request)
        if route.run is not None:
            answer = await request.runs.respond(request, route, params)
            if isinstance(answer, Response):
                return answer
            return self._reading(request, send, answer)  # without asking for room again: the run is at work
        pump = EventPump(
            route.handler(request, **params),
            request,
            buffer_bytes=settings.buffer_bytes,
            ends_for_good=request.method == "GET",
        )
        return Sender(request, send, pump, _EVENT_STREAM_HEADERS, self._options)

    async def _send_answer(self, request: Request, send: Send, answer: Any, *, head: bool) -> Response | Sender | None:
        """What to send or to run for what a handler returned."""
        if isinstance(answer, Response):
            return answer
        if isinstance(answer, ByteStream):
            return await self._send_bytes(request, send, answer, head=head)
        if head and isinstance(answer, Subscription):
            return await self._send_head(request, send, _EVENT_STREAM_HEADERS)
        if isinstance(answer, Subscription):
            self._take_place(request)
            attached = await request.topics.subscribe(request, answer)
            stream = self._reading(request, send, attached)
            if answer.pulse is not None:
                stream.pulse(answer.pulse, answer.pulse_s)
            return stream
        if not isinstance(answer, Attached):
            raise TypeError(f"{request.path}: the handler returned {type(answer).__name__}, not a Response")
        if head:
            answer.reader.close()
            return await self._send_head(request, send, [*_EVENT_STREAM_HEADERS, *raw_headers(None, answer.headers)])
        try:
            self._take_place(request)
        except SSEAppError:
            answer.reader.close()
            raise
        return self._reading(request, send, answer)

    def _reading(self, request: Request, send: Send, attached: Attached) -> Sender:
        """The stream that closes this reader."""
        reader = attached.reader
        if request.last_event_id and request.route is not None:
            self.metrics.resumes.labels(request.route.path).inc()
        try:
            headers = [*_EVENT_STREAM_HEADERS, *raw_headers(None, attached.headers)]
        except ValueError:
            reader.close()
            raise
        return Sender(request, send, reader, headers, self._options)

    async def _send_bytes(self, request: Request, send: Send, answer: ByteStream, *, head: bool) -> Sender | None:
        started = False
        try:
            headers = raw_headers(answer.media_type, answer.headers)
            if head:
                await self._send_head(request, send, headers, answer.status)
                return None
            self._take_place(request)
            started = True
            pump = Pump(answer.chunks, _chunk, request, buffer_bytes=self.settings.buffer_bytes)
            return Sender(request, send, pump, headers, self._options, answer.status)
        finally:
            if not started and hasattr(answer.chunks, "aclose"):
                await answer.chunks.aclose()
        return None

    async def _send_head(
        self, request: Request, send: Send, headers: list[tuple[bytes, bytes]], status: int = 200
    ) -> Response | None:
        """The headers that GET would have: without a length, unless the handler knew it."""
        headers = [*headers, *request.answer_headers]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None

    def _leave(self, request: RequestFacts) -> None:
        self._leave_place(request)
        request.close()

    def _over(self, stream: Sender) -> None:
        """It has ended: in its request's own call, or, where it was parked, long after that has returned."""
        self._streams.discard(stream)
        self._leave(stream.request)
        self._note(stream)
        if not self._streams and self._idle is not None:
            self._idle.set()
            self._idle = None

    def _note(self, stream: Sender) -> None:
        """A stream's end, in the metrics and in one line of the log. Of a caller the name, of a payload nothing."""
        request, failure = stream.request, stream.source.failure
        reason: str = request.end_reason
        if reason == "failed" and isinstance(failure, SSEAppError) and failure.status < 500 and not stream.events_sent:
            reason = "refused"  # by its handler, before it gave anything: the client's mistake
        self.metrics.ended(stream, reason)
        if logger.isEnabledFor(logging.INFO):
            seconds = round(monotonic() - stream.began, 3)
            facts = {"method": request.method, "route": stream.route, "reason": reason, "seconds": seconds}
            facts |= {"events": stream.events_sent, "bytes": stream.sent_bytes, "caller": request.caller}
            text = "%(method)s %(route)s ended: %(reason)s after %(seconds)s s, %(events)s events, %(bytes)s bytes"
            logger.info(f"{text}, caller %(caller)s" if request.caller else text, facts, extra={"stream": facts})

    def _take_place(self, request: Request) -> None:
        """Count the stream that the request is about to open, until its end.

        Raises `Unavailable` where none can be opened now, `TooManyRequests` where the caller has too many.
        """
        if self.draining:
            raise Draining
        limit, callers, wait_s = self.settings.max_streams, self.settings.max_streams_per_caller, random.randint(1, 5)
        if limit is not None and self._taken >= limit:
            raise Unavailable("too many open streams; try again", retry_after_s=wait_s)
        if callers is not None and request.caller is not None and self._places[request.caller] >= callers:
            raise TooManyRequests(f"you have {callers} open streams already; close one", retry_after_s=wait_s)
        request.has_place = True
        self._taken += 1
        if request.caller is not None:
            self._places[request.caller] += 1

    def _leave_place(self, request: RequestFacts) -> None:
        if request.has_place:
            request.has_place = False
            self._taken -= 1
            if request.caller is not None:
                self._places[request.caller] -= 1
                if not self._places[request.caller]:
                    del self._places[request.caller]

    def _refused(self, request: Request, error: Exception) -> tuple[Response, MutableMapping[str, Any]]:
        """The answer to a request that failed, ready to be sent."""
        try:
            answer = self._refusal(request, error)
            return answer, response_start(answer)
        except ValueError as bad_headers:
            answer = problem(SSEAppError(public_text(bad_headers)))
            return answer, response_start(answer)

    def _refusal(self, request: Request, error: Exception) -> Response:
        reference: str | None = None
        if not isinstance(error, SSEAppError):
            error = SSEAppError(public_text(error))  # with a reference in it, and logged
        else:
            reference = self._log_refusal(request, error)
        self.metrics.refused.labels(error.status).inc()
        # What will pass must not kill a browser's `EventSource`.
        if isinstance(error, Unavailable) and request.like_event_source:
            body = b"%bretry: %d\n" % (request.preamble, spread(self._options.retry_ms))
            return Response(body, media_type=CONTENT_TYPE, headers={"cache-control": "no-cache"})
        return problem(error, reference, request.dialect)

    def _log_refusal(self, request: Request, error: SSEAppError) -> str | None:
        """Gives the reference of a 5xx, which its client gets too."""
        route = request.route.path if request.route is not None else "none"
        text = "%s %s answered %d %s: %r"  # `%r`: a text may quote the client, line ends included
        detail = error.detail
        if isinstance(error, EncodeError) and error.__cause__ is not None:  # the type, which its client isn't told
            detail += f": {error.__cause__!r}"
        facts = (request.method, route, error.status, error.code, detail)
        if error.status < 500:
            logger.debug(text, *facts)
            return None
        reference, level = secrets.token_hex(6), logging.ERROR if error.status == 500 else logging.WARNING
        logger.log(level, f"reference %s: {text}", reference, *facts)
        return reference


def _chunk(item: bytes | bytearray | memoryview) -> bytes:
    # `bytes(3)` would be three NULs.
    if not isinstance(item, bytes | bytearray | memoryview):
        raise TypeError(f"a ByteStream has chunks of bytes, not {type(item).__name__}")
    return bytes(item)


def open_log(settings: Settings) -> Log:
    """The event log's engine that the settings name."""
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
