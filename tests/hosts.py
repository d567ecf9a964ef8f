"""Programs of others with our app mounted in them, behind the middleware that they use."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import anyio
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request as HostRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from sseapp import GET, POST, Event, Request, Run, Settings, SSEApp, Subscription

__all__ = ["MIDDLEWARE", "make", "routes"]

#: Events of /flood: more than all buffers on the way hold.
FLOOD: Final = 3000


class Ordinary:
    """As most are: plain ASGI, adds a header."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-host", b"yes"))
            await send(message)

        await self._app(scope, receive, send_on)


class Dispatching(BaseHTTPMiddleware):
    async def dispatch(self, request: HostRequest, call_next: Callable[[HostRequest], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["x-host"] = "yes"
        return response


MIDDLEWARE: Final[dict[str, Any]] = {
    "none": None,
    "ordinary": Ordinary,
    "gzip": GZipMiddleware,
    "base": Dispatching,
}


def routes(ended: list[str]) -> list[Any]:
    """`ended` is told why each generator ended."""

    async def wait(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("1")
            await anyio.sleep_forever()
        finally:
            ended.append(request.end_reason)

    async def flood(request: Request) -> AsyncIterator[Event]:
        for number in range(FLOOD):
            yield Event(f"{number} {'x' * 10_000}")
            ended.append("sent")

    async def work(request: Request) -> AsyncIterator[Event]:
        for number in range(20):
            yield Event(number)
            await anyio.sleep(0.001)
        yield Event("", "complete")

    async def news(request: Request) -> Subscription:
        return Subscription("news", Event("", "init"))

    return [GET("/wait", wait), GET("/flood", flood), POST("/work", work, run=Run()), GET("/news", news)]


class Host:
    """Our app at /deep/sse in a FastAPI or Starlette program, with two routes of the program's own."""

    def __init__(self, kind: Callable[..., Any], middleware: Any) -> None:
        self.ended: list[str] = []
        self.streams = SSEApp(routes(self.ended), Settings(log="memory", retry_ms=1))
        self.app = kind()
        self.app.router.routes += [
            Route("/publish", self.publish, methods=["POST"]),
            Route("/ended", self.tell),
        ]
        self.app.mount("/deep/sse", self.streams)
        if middleware is not None:
            self.app.add_middleware(middleware)

    async def publish(self, request: HostRequest) -> Response:
        cursor = await self.streams.topics.publish("news", Event(await request.json(), "news"))
        return JSONResponse({"id": str(cursor)})

    async def tell(self, request: HostRequest) -> Response:
        return JSONResponse(self.ended)


def make() -> Starlette:
    """/fastapi/none, /starlette/gzip and so on."""
    hosts = {
        f"/{kind.__name__.lower()}/{name}": Host(kind, middleware)
        for kind in (FastAPI, Starlette)
        for name, middleware in MIDDLEWARE.items()
    }

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for host in hosts.values():
                await stack.enter_async_context(host.streams.running())
            yield

    return Starlette(routes=[Mount(path, host.app) for path, host in hosts.items()], lifespan=lifespan)
