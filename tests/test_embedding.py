"""Our app inside of FastAPI and Starlette programs, at any path and behind their middleware."""

import json
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount

from sseapp import POST, Event, Request, Run, Settings, SSEApp
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
    assert answer.headers["location"] == answer.json()["events"]
    location = answer.url.join(answer.headers["location"]).path
    assert location == f"{host}/deep/sse/runs/{answer.json()['run']}/events"
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


class Stripped:
    """As behind a proxy that strips a prefix (`location /sse/ { proxy_pass http://app/; }`) and tells of none."""

    def __init__(self, app: Any, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"].startswith(f"{self._prefix}/")
        path = scope["path"].removeprefix(self._prefix)
        await self._app(
            {**scope, "path": path, "raw_path": scope["raw_path"].removeprefix(self._prefix.encode())}, receive, send
        )


@pytest.mark.parametrize("prefix", ["", "/sse", "/deep/sse"])
@pytest.mark.parametrize("path", ["/work", "/tasks/3/execute/stream", "/named/a%20b", "/slash/a%2Fb"])
async def test_a_location_leads_to_the_run_behind_a_proxy_that_strips_a_prefix(path: str, prefix: str) -> None:
    async def work(request: Request, **params: Any) -> AsyncIterator[Event]:
        yield Event("1")

    paths = ("/work", "/tasks/{id:int}/execute/stream", "/named/{name}", "/slash/a/b")
    app = SSEApp([POST(each, work, run=Run()) for each in paths], Settings(log="memory"))
    transport = Transport(Stripped(app, prefix))
    url = f"http://localhost{prefix}{path}"
    async with app.running(), httpx.AsyncClient(transport=transport, verify=False) as http:
        with anyio.fail_after(20):
            started = await http.post(url, headers={"prefer": "respond-async"})
            assert started.status_code == 202
            located = (await http.post(url)).headers
            assert not located["content-location"].startswith("/")
            for response, reference in (
                (started, started.headers["location"]),
                (started, started.json()["events"]),
                (started, located["content-location"]),
            ):
                answer = await http.get(response.url.join(reference))
                assert (answer.status_code, "data: 1\n" in answer.text) == (200, True)
            async with connect(url, method="POST", headers={"prefer": "respond-async"}, client=http) as source:
                assert [event.data async for event in source] == ["1"]


class Slashed:
    """A mount as Litestar's: it takes its prefix off `path`, adds a slash, sets no `root_path` and keeps `raw_path`."""

    def __init__(self, app: Any, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].removeprefix(self._prefix).strip("/")
        await self._app({**scope, "path": f"/{path}/" if path else "/"}, receive, send)


@pytest.mark.parametrize("path", ["/work", "/tasks/3/execute/stream"])
async def test_a_mount_that_adds_a_slash_and_sets_no_root_path(path: str) -> None:
    async def work(request: Request, **params: Any) -> AsyncIterator[Event]:
        yield Event("1")

    routes = [POST(each, work, run=Run()) for each in ("/work", "/tasks/{id:int}/execute/stream")]
    app = SSEApp(routes, Settings(log="memory"))
    url = f"http://localhost/deep/sse{path}"
    transport = Transport(Slashed(app, "/deep/sse"))
    async with app.running(), httpx.AsyncClient(transport=transport, verify=False) as http:
        with anyio.fail_after(20):
            started = await http.post(url, headers={"prefer": "respond-async"})
            answer = await http.get(started.url.join(started.headers["location"]))
            assert "data: 1\n" in answer.text
            assert (await http.post(f"{url}/")).status_code == 404, "a slash of the client's own"


@pytest.mark.parametrize("root", ["/api", "/api/", "/deep/api/"])
def test_a_root_path_may_end_with_a_slash(root: str, tmp_path: Path) -> None:
    with serve_uvicorn(tmp_path, "--root-path", root) as server:
        started = server.client.get("/chat?prompt=hi", headers={"prefer": "respond-async"})
        assert (started.status_code, started.headers["location"][:5]) == (202, "runs/")
        assert server.client.get(f"/{started.headers['location']}").is_success
        assert server.client.get("/static/main.js").is_success
        assert server.client.get("/").is_success
