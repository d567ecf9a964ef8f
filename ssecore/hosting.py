"""A stream as the answer of another framework's own route.

    @app.post("/answers")
    async def answers(question: Question, user: User = Depends(user_of)) -> EventStream:
        return EventStream(streams, answer(question, user), run=Run(), caller=user.name)

So dependencies, parameters, errors before the stream, and OpenAPI are the framework's. Everything behind that is as on
a route of an `SSEApp`: the log, resuming, keys, limits, drain. Four things differ:

1.  Whoever gets here was let in by the framework: our guard isn't asked, and CORS is the framework's.
2.  A run is resumed by the same request with a `Last-Event-ID`, by POST too: where the framework would have it read is
    not known. So there is no `Content-Location`, and `Prefer: respond-async` is not heeded.
3.  The body was read by the framework: of two requests with one `Idempotency-Key` the query is compared, and no more.
4.  An `HTTPException` that the generator raises before its first event is the framework's to answer.
"""

from collections.abc import AsyncIterable, MutableMapping
from typing import TYPE_CHECKING, Any, Final, Literal

from ssecore.dialects import NAMED, Dialect
from ssecore.http.request import Receive, Request
from ssecore.http.responses import Send
from ssecore.http.routes import Route, Run
from ssecore.topics import Subscription
from ssecore.wire import CONTENT_TYPE, Event

if TYPE_CHECKING:
    from starlette.responses import Response as _Response

    from sseapp import SSEApp
else:
    try:  # FastAPI and Starlette know an answer by its class
        from starlette.responses import Response as _Response
    except ModuleNotFoundError:
        _Response = object


__all__ = ["HOSTED", "EventStream"]

#: Where the scope has the `EventStream` that an `SSEApp` is called for.
HOSTED: Final = "sseapp.hosted"


class EventStream(_Response):
    """Returned by a route of FastAPI, Starlette or Litestar; an ASGI application, for any other framework.

    `streams` is the program's `SSEApp`; it must be `running()`, for runs and topics. It needn't be mounted.

    What is sent: `events`, an async generator (called already: `answer(user)`), which with `run=` works detached from
    the connection; or a topic's `Subscription`; or the id of a run, to read it. A generator that isn't needed, since
    the request resumes a run that is there, is never begun.

    `caller` is whose run it is, and whose limits count: nobody else can read it, or resume it. `None`: nobody's, so
    that whoever knows its id or its key may. `dialect` is as in `GET`. `status_code` is here for FastAPI's OpenAPI,
    which reads it of this signature where a route says `response_class=EventStream`.
    """

    media_type = CONTENT_TYPE

    def __init__(
        self,
        streams: "SSEApp",
        events: AsyncIterable[Event] | Subscription | str,
        *,
        run: Run | None = None,
        caller: str | None = None,
        dialect: Dialect = NAMED,
        status_code: Literal[200] = 200,
    ) -> None:
        if not isinstance(events, AsyncIterable | Subscription | str):
            hint = ", not called" if callable(events) else ""
            raise TypeError(f"EventStream takes an async iterator, a Subscription or a run's id, not {events!r}{hint}")
        if run is not None and not (isinstance(run, Run) and isinstance(events, AsyncIterable)):
            raise TypeError("run= must be a Run, as in run=Run(), and goes with an async iterator only")
        if caller is not None and not (isinstance(caller, str) and caller):
            raise TypeError(f"caller must be the caller's name, or None, not {caller!r}")
        self._streams = streams
        self._begun = False
        self.events = events
        self.run = run
        self.caller = caller
        self.dialect = dialect
        # What a response of Starlette's has: `headers` and `set_cookie` write here, and FastAPI adds background tasks.
        self.status_code = status_code
        self.body = b""
        self.raw_headers: list[tuple[bytes, bytes]] = []
        self.background = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        # Without our runner's extension: a framework's call is over when this one returns, and the stream must be, too.
        try:
            await self._streams({**scope, "extensions": {}, HOSTED: self}, receive, send)
        finally:
            if not self._begun and hasattr(self.events, "aclose"):
                await self.events.aclose()
        if self.background is not None:
            await self.background()

    def take(self, request: Request) -> Route:
        """Let the request in. Gives what stands for the framework's route, under the framework's path."""
        scope = request.scope
        path = getattr(scope.get("route"), "path", None) or scope.get("path_template")  # FastAPI's; Litestar's
        path = path or getattr(scope.get("endpoint"), "__name__", None) or "EventStream"  # Starlette's; any other's
        handler = self._begin if isinstance(self.events, AsyncIterable) else self._read
        route = Route(request.method, path, handler, dialect=self.dialect, run=self.run, hosted=True)
        request.caller, request.answer_headers, request.route = self.caller, self.raw_headers, route
        return route

    def _begin(self, request: Request) -> Any:
        self._begun = True
        return aiter(self.events)  # type: ignore[arg-type]

    async def _read(self, request: Request) -> Any:
        return await request.runs.view(request, self.events) if isinstance(self.events, str) else self.events
