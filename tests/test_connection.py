"""What is written to uvicorn's connections is what its own `send` would have written, whoever reads."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final

import pytest
import uvicorn

from sseapp import SSEApp
from ssecore.connection import KNOWN, chunk, connection_of
from ssecore.request import Request
from ssecore.routes import GET
from ssecore.settings import Settings
from ssecore.wire import Event, cut
from tests.protocol import connected
from tests.serving import Server, serve

TIMEOUT_S: Final = 20
START: Final = {"type": "http.response.start", "status": 200, "headers": []}
LAST: Final = {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that answers HTTP/1.0 as well, which a private one takes for a proxy's."""
    with serve(tmp_path_factory.mktemp("data"), env={"SSEAPP_AUTH": "off"}) as server:
        yield server


def part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}


def test_the_installed_uvicorn_has_been_looked_at() -> None:
    assert uvicorn.__version__.startswith(KNOWN), "compare httptools_impl.py with the rules of ssecore/connection.py"


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_a_chunk_is_what_send_writes(version: bytes) -> None:
    bodies = [b"x", b"data: \xc3\xbc\n\n" * 5000]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert connection_of(send) is None, "before the start"
        await send(START)
        for body in bodies:
            await send(part(body))
        connection = connection_of(send)
        assert connection is not None
        assert not connection.flow.write_paused and not connection.disconnected
        for body in bodies:
            connection.transport.write(chunk(body))
        await send(LAST)
        assert connection_of(send) is None, "after the end"

    with connected(app, b"GET / HTTP/%b\r\n\r\n" % version) as (protocol, wire):
        await asyncio.gather(*protocol.tasks)
        assert wire.written[1:3] == wire.written[3:5]


@pytest.mark.parametrize(
    ("request_head", "headers"),
    [(b"HEAD / HTTP/1.1\r\n\r\n", []), (b"GET / HTTP/1.1\r\n\r\n", [(b"content-length", b"1")])],
    ids=["HEAD", "of a known length"],
)
async def test_an_answer_that_is_not_chunked_goes_through_send(request_head: bytes, headers: list[Any]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "headers": headers})
        assert connection_of(send) is None
        await send({**LAST, "body": b"x"})

    with connected(app, request_head) as (protocol, _):
        await asyncio.gather(*protocol.tasks)


async def test_what_wraps_send_gets_each_message() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def wrapped(message: Any) -> None:
            await send(message)

        await send(START)
        assert connection_of(send) is not None
        assert connection_of(wrapped) is None
        await send(LAST)

    with connected(app, b"GET / HTTP/1.1\r\n\r\n") as (protocol, _):
        await asyncio.gather(*protocol.tasks)


async def test_a_uvicorn_that_nobody_has_looked_at_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        assert connection_of(send) is not None
        monkeypatch.setattr(uvicorn, "__version__", "0.99.0")
        assert connection_of(send) is None
        await send(LAST)

    with connected(app, b"GET / HTTP/1.1\r\n\r\n") as (protocol, _):
        await asyncio.gather(*protocol.tasks)


async def test_flow_control_and_a_left_client_are_seen() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        connection = connection_of(send)
        assert connection is not None
        protocol.pause_writing()
        assert connection.flow.write_paused
        protocol.resume_writing()
        assert not connection.flow.write_paused
        protocol.connection_lost(ConnectionResetError())
        assert connection.disconnected

    with connected(app, b"GET / HTTP/1.1\r\n\r\n") as (protocol, _):
        await asyncio.gather(*protocol.tasks)


# On real sockets


def subscribe(server: Server, version: str = "1.1", *, receive_buffer_bytes: int | None = None) -> socket.socket:
    """A subscriber that has got its `init`."""
    sock = socket.socket()
    if receive_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    sock.settimeout(TIMEOUT_S)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(f"GET /topics/wire HTTP/{version}\r\nhost: x\r\n\r\n".encode())
    read_until(sock, lambda body: b"event: init" in body)
    return sock


def read_until(sock: socket.socket, enough: Callable[[bytes], bool]) -> bytes:
    body = b""
    while not enough(body):
        data = sock.recv(1 << 16)
        assert data, "the answer ended"
        body += data
    return body


def numbers(chunked: bytes) -> list[int]:
    """The numbers of the events in a chunked body, each chunk checked."""
    body = b""
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        body, chunked = body + rest[:length], rest[length + 2 :]
    return [json.loads(line[6:])["n"] for line in body.split(b"\n") if line.startswith(b"data: ")]


def test_everybody_gets_the_same_however_they_read(server: Server) -> None:
    """One over HTTP/1.0, one that leaves, one that stops reading and goes on later; the others notice nothing."""
    events, padding = 600, "x" * 10_000  # more than the kernel and the transport hold for one who doesn't read
    with ExitStack() as stack:
        quick, old, slow = (
            stack.enter_context(subscribe(server)),
            stack.enter_context(subscribe(server, "1.0")),
            stack.enter_context(subscribe(server, receive_buffer_bytes=64 * 1024)),
        )
        leaves = stack.enter_context(subscribe(server))
        mark = b'"n":%d,' % (events - 1)
        for n in range(events):
            server.client.post("/topics/wire", json={"n": n, "padding": padding}).raise_for_status()
            if n == events // 2:
                leaves.close()
            if n % 10 == 9 and n < events - 10:
                for sock in (quick, old):
                    ten = read_until(sock, lambda body, n=n: b'"n":%d,' % n in body and body.endswith(b"\n\n\r\n"))  # type: ignore[misc]
                    assert numbers(ten) == [*range(n - 9, n + 1)]
        for sock in (quick, old):
            rest = read_until(sock, lambda body: mark in body and body.endswith(b"\n\n\r\n"))
            assert numbers(rest) == [*range(events - 10, events)]
        assert numbers(read_until(slow, lambda body: mark in body and body.endswith(b"\n\n\r\n"))) == [*range(events)]
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("browser", [True, False])
async def test_what_a_drain_cuts_off_before_it_began_comes_back(direct: bool, browser: bool) -> None:
    """Without an answer of ours uvicorn would say 500, which a browser's `EventSource` takes for the end."""
    waits = asyncio.Event()

    async def handler(request: Request) -> AsyncIterator[Event]:
        waits.set()
        await asyncio.sleep(TIMEOUT_S)
        yield Event("never")

    head = b"GET / HTTP/1.1\r\nhost: x\r\n"
    if browser:
        head += b"accept: text/event-stream\r\ncache-control: no-cache\r\n"
    app = SSEApp([GET("/", handler)], Settings(log="memory", auth="off"))
    app.direct = direct
    async with app.running():
        with connected(app, head + b"\r\n") as (protocol, wire):
            await waits.wait()
            app.abort()
            await asyncio.gather(*protocol.tasks)
    if browser:
        assert wire.body.startswith(cut("") + b"retry: ")
    assert b"".join(wire.written).startswith(b"HTTP/1.1 200 " if browser else b"HTTP/1.1 503 ")
