"""The kit on apps of others: a FastAPI and a Starlette one with streams of their own, nothing of ours in them."""

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import ANY

import anyio
import httpx
import pytest
from fastapi import FastAPI
from fastapi.sse import EventSourceResponse as FastAPIResponse
from fastapi.sse import ServerSentEvent
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ssecore.client import connect as follow
from ssecore.testing import Transport, assert_stream, lifespan
from ssecore.testing.fixtures import OpenStream, open_stream
from ssecore.wire import HEARTBEAT, Event
from tests.house import virtual_time

__all__ = ["open_stream"]


class Host:
    """Both apps say the same. `closed` counts generators that came to their end, whoever ended them."""

    def __init__(self, kind: str) -> None:
        self.closed = 0
        self.app: Any = getattr(self, kind)()

    async def _count(self, first: int = 1) -> AsyncIterator[int]:
        try:
            for number in range(first, 10**9):
                yield number
                await anyio.sleep(20)  # longer than the servers' 15 s between pings
        finally:
            self.closed += 1

    @asynccontextmanager
    async def _life(self, app: Any) -> AsyncIterator[dict[str, str]]:
        yield {"greeting": "hello"}
        self.closed += 100

    def fastapi(self) -> FastAPI:
        app = FastAPI(lifespan=self._life)

        @app.get("/count", response_class=FastAPIResponse)
        async def count() -> AsyncIterable[ServerSentEvent]:
            async for number in self._count():
                yield ServerSentEvent(data={"n": number}, event="count", id=str(number))

        @app.get("/state")
        async def state(request: Request) -> dict[str, str]:
            return {"greeting": request.state.greeting}

        return app

    def starlette(self) -> Starlette:
        async def count(request: Request) -> Response:
            first = int(request.headers.get("last-event-id", 0)) + 1

            async def events() -> AsyncIterator[dict[str, str]]:
                async for number in self._count(first):
                    yield {"data": f'{{"n": {number}}}', "event": "count", "id": str(number)}

            return EventSourceResponse(events())

        async def state(request: Request) -> Response:
            return JSONResponse({"greeting": request.state.greeting})

        return Starlette(routes=[Route("/count", count), Route("/state", state)], lifespan=self._life)


@pytest.fixture(params=["fastapi", "starlette"])
def host(request: pytest.FixtureRequest) -> Host:
    return Host(request.param)


@virtual_time
async def test_an_endless_stream_is_read_and_left(host: Host, open_stream: OpenStream, anyio_backend: Any) -> None:
    stream = open_stream(host.app, "GET", "/count")
    await assert_stream(stream, ("count", {"n": 1}), ("count", {"n": 2}), Event(ANY, "count", "3"), ends=False)
    assert anyio.current_time() == 40
    stream.disconnect()
    await stream.ended.wait()
    assert not stream.complete


@virtual_time
async def test_heartbeats_are_seen_without_waiting_for_them(
    host: Host, open_stream: OpenStream, anyio_backend: Any
) -> None:
    stream = open_stream(host.app, "GET", "/count")
    chunks = [await stream.chunk() for _ in range(3)]
    assert anyio.current_time() == 20
    assert [bool(chunk and chunk.startswith(b":")) for chunk in chunks] == [False, True, False]
    assert HEARTBEAT not in chunks, "theirs have words, and a blank line"


@virtual_time
@pytest.mark.parametrize("kind", [FastAPI, Starlette])
async def test_a_client_whose_window_is_shut_holds_the_app_back(
    kind: Any, open_stream: OpenStream, anyio_backend: Any
) -> None:
    """Plain streams: the keep-alives of both servers' own SSE don't stand it (a second `send`; an error on leaving)."""
    sent = 0

    async def ticks() -> AsyncIterator[str]:
        nonlocal sent
        while True:
            sent += 1
            yield f"data: {sent}\n\n"
            await anyio.sleep(1)

    async def endless(request: Request) -> Response:
        return StreamingResponse(ticks(), media_type="text/event-stream")

    app = kind()
    app.router.routes.append(Route("/", endless))
    stream = open_stream(app)
    await assert_stream(stream, Event("1"), ends=False)
    stream.block()
    await anyio.sleep(1000)
    assert sent == 2
    stream.unblock()
    await assert_stream(stream, Event("2"), Event("3"), ends=False)


@virtual_time
async def test_httpx_streams_and_a_cut_is_a_cut(host: Host, anyio_backend: Any) -> None:
    async with httpx.AsyncClient(transport=Transport(host.app, cuts=[20]), base_url="http://localhost") as client:
        async with client.stream("GET", "/count") as response:
            with pytest.raises(httpx.ReadError, match="cut"):
                await assert_stream(response, ("count", {"n": 1}))
        async with client.stream("GET", "/count") as response:
            await assert_stream(response, ..., ("count", {"n": 3}), ends=False)


@virtual_time
async def test_a_client_that_resumes_is_tried_with_scripted_cuts(anyio_backend: Any) -> None:
    transport = Transport(Host("starlette").app, cuts=[100, 150, 120])
    async with (
        httpx.AsyncClient(transport=transport) as client,
        follow("http://localhost/count", client=client) as source,
    ):
        assert [(await anext(source)).id for _ in range(9)] == [str(number) for number in range(1, 10)]


async def test_a_lifespan_runs_around_the_requests_and_gives_them_its_state(host: Host) -> None:
    async with lifespan(host.app) as state:
        async with httpx.AsyncClient(transport=Transport(host.app, state=state), base_url="http://localhost") as client:
            assert (await client.get("/state")).json() == {"greeting": "hello"}
        assert host.closed == 0
    assert host.closed == 100


@pytest.mark.parametrize("when", ["startup", "shutdown"])
async def test_a_lifespan_that_fails_says_so(when: str) -> None:
    @asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        if when == "startup":
            raise ValueError("no database")
        yield
        raise ValueError("no database")

    with pytest.raises((RuntimeError, ValueError), match="no database"):
        async with lifespan(Starlette(lifespan=life)):
            pass


def answering(*parts: str, media_type: str = "text/event-stream", status: int = 200) -> Starlette:
    async def whole(request: Request) -> Response:
        async def body() -> AsyncIterator[str]:
            for part in parts:
                if part == "cut":
                    raise OSError("cut")
                yield part

        return StreamingResponse(body(), status, media_type=media_type)

    return Starlette(routes=[Route("/", whole)])


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ((Event("1"), Event("2", "two")), None),
        (((None, 1), ("two", 2)), None),
        ((..., ("two", ANY)), None),
        (((None, "1"), ...), None),
        ((..., Event("1"), ..., Event("2", "two"), ...), None),
        ((Event("1"),), "expected the end"),
        ((Event("1"), Event("2")), "expected Event"),
        ((Event("1"), Event("2", "two"), Event("3")), "not the end"),
        ((..., Event("3")), "not the end"),
        ((Event("1", id="x"), ...), "expected Event"),
        ((Event("1", retry=5), ...), "expected Event"),
        ((Event({"a": 1}), ...), "expected Event"),
        ((), "expected the end"),
    ],
)
async def test_what_a_stream_should_say_is_compared(
    open_stream: OpenStream, expected: tuple[Any, ...], words: str | None
) -> None:
    app = answering("data: 1\n\nevent: two\n", "data: 2\n\n")
    if words is None:
        assert len(await assert_stream(open_stream(app), *expected)) == 2
        return
    with pytest.raises(AssertionError, match=words) as raised:
        await assert_stream(open_stream(app), *expected)
    assert "data='1'" in str(raised.value), "it tells what came"


async def test_what_is_no_stream_is_said(open_stream: OpenStream) -> None:
    with pytest.raises(AssertionError, match="the answer is 200, text/html"):
        await assert_stream(open_stream(answering("x", media_type="text/html")), ...)
    with pytest.raises(AssertionError, match="the answer is 500"):
        await assert_stream(open_stream(answering("x", status=500)), ...)
