"""A stream as the response of another framework's route: see docs/frameworks.md.

There is no path to a run, so no `Content-Location`, and `Prefer: respond-async` is ignored.
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
    try:
        from starlette.responses import Response as _Response
    except ModuleNotFoundError:
        _Response = object


__all__ = ["HOSTED", "EventStream"]

#: The scope's key for the `EventStream`.
HOSTED: Final = "sseapp.hosted"


class EventStream(_Response):
    """A response for FastAPI, Starlette and Litestar, and an ASGI application.

    `events` is an async generator, which isn't started if the request resumes a run, a `Subscription`, or a run's id.
    `caller` owns the run; `None`: anyone with its id or key can read it. `status_code` is for FastAPI's OpenAPI.
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
        # Starlette's `headers` and `set_cookie` write to these, FastAPI adds background tasks.
        self.status_code = status_code
        self.body = b""
        self.raw_headers: list[tuple[bytes, bytes]] = []
        self.background = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        # Without our runner's extension, which sends on after this call.
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
