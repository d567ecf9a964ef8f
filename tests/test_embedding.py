"""Our app inside of FastAPI and Starlette programs, at any path and behind their middleware."""

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount

from sseapp import Event, Settings, SSEApp
from ssecore.client import connect
from ssecore.testing import Transport, assert_stream
from ssecore.testing import connect as connect_in_process
from tests.hosts import FLOOD, MIDDLEWARE, routes
from tests.relay import relay
from tests.serving import Server, serve_uvicorn, wait_until
from tests.test_client import quick

__all__ = ["quick"]

HOSTS: Final = [f"/{kind}/{name}" for kind in ("fastapi", "starlette") for name in MIDDLEWARE]
EVERYWHERE: Final = pytest.mark.parametrize("host", HOSTS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_uvicorn(tmp_path_factory.mktemp("data"), app="tests.hosts:make") as server:
        yield server


@EVERYWHERE
def test_an_event_comes_at_once_and_leaving_is_noticed(server: Server, host: str) -> None:
    before = len(server.client.get(f"{host}/ended").json())
    with server.client.stream("GET", f"{host}/deep/sse/wait", headers={"accept-encoding": "gzip"}) as response:
        assert "content-encoding" not in response.headers
        assert b"data: 1\n\n" in next(response.iter_raw())
    assert wait_until(lambda: server.client.get(f"{host}/ended").json()[before:]) == ["client"]


@EVERYWHERE
def test_a_client_that_does_not_read_holds_the_generator_back(server: Server, host: str) -> None:
    def sent() -> int:
        ended: list[str] = server.client.get(f"{host}/ended").json()
        return ended.count("sent")

    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(f"GET {host}/deep/sse/flood HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        counts = [wait_until(sent)]
        while len(counts) < 2 or counts[-1] != counts[-2]:
            counts.append(sent())
    assert counts[-1] < FLOOD


@EVERYWHERE
async def test_a_run_is_found_again_under_the_mount_path(server: Server, host: str) -> None:
    url = f"{host}/deep/sse/work"
    answer = server.client.post(url, headers={"prefer": "respond-async"})
    assert answer.status_code == 202
    location = answer.headers["location"]
    assert location == answer.json()["events"] == f"{host}/deep/sse/runs/{answer.json()['run']}/events"
    with relay(server.port, [600]) as line:
        async with httpx.AsyncClient(verify=False) as http, connect(line.url + url, method="POST", client=http) as s:
            with anyio.fail_after(20):
                events = [event async for event in s]
        assert len([answer for answer in line.answers() if b"text/event-stream" in answer.lower()]) == 2
    assert [event.data for event in events] == [*map(str, range(20)), ""]
    assert (await collect(server.url + location))[-1].event == "complete"


async def collect(url: str) -> list[Any]:
    async with httpx.AsyncClient(verify=False) as http, connect(url, client=http) as source:
        with anyio.fail_after(20):
            return [event async for event in source]


@EVERYWHERE
async def test_a_host_publishes_from_routes_of_its_own(server: Server, host: str) -> None:
    async with httpx.AsyncClient(verify=False, base_url=server.url) as http:
        async with connect(f"{server.url}{host}/deep/sse/news", client=http) as source:
            with anyio.fail_after(20):
                assert (await anext(source)).event == "init"
                told = (await http.post(f"{host}/publish", json={"a": 1})).json()
                event = await anext(source)
    assert (event.event, json.loads(event.data), event.id) == ("news", {"a": 1}, told["id"])


def test_when_the_host_is_stopped_every_stream_gets_its_farewell(tmp_path: Path) -> None:
    with serve_uvicorn(tmp_path, app="tests.hosts:make") as server, ExitStack() as stack:
        answers = []
        for host in HOSTS:
            answer = stack.enter_context(server.client.stream("GET", f"{host}/deep/sse/news"))
            chunks = answer.iter_raw()
            assert b"event: init" in next(chunks)
            answers.append(chunks)
        server.process.send_signal(signal.SIGTERM)
        for chunks in answers:
            assert b"".join(chunks).startswith(b"retry: "), "and its proper end, else httpx raises"
        server.wait()
        assert "Traceback" not in server.log()


@pytest.mark.parametrize(("name", "middleware"), MIDDLEWARE.items(), ids=MIDDLEWARE)
async def test_behind_base_http_middleware_a_stream_that_was_cut_off_looks_finished(name: str, middleware: Any) -> None:
    """docs/handlers.md says so: whoever needs to know puts our app beside such a middleware, or uses runs."""
    streams = SSEApp(routes([]), Settings(log="memory"))
    host = Starlette(routes=[Mount("/s", streams)], middleware=[Middleware(middleware)] if middleware else [])
    async with streams.running(), connect_in_process(host, "GET", "/s/wait") as exchange:
        await assert_stream(exchange, Event("1"), ends=False)
        streams.abort()
        await exchange.ended.wait()
        assert exchange.complete is (name == "base")


async def test_without_running_a_run_says_what_is_missing() -> None:
    app = SSEApp(routes([]), Settings(log="memory"))
    async with httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as http:
        for method, path in (("POST", "/work"), ("GET", "/news"), ("GET", "/runs")):
            answer = await http.request(method, path)
            assert answer.status_code == 500
            assert "async with app.running()" in answer.json()["detail"]
    with pytest.raises(Exception, match="async with app"):
        app.topics  # noqa: B018
