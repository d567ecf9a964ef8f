"""The connection: what is written past uvicorn is what its own `send` would have written, whoever reads.

All that we know of uvicorn's insides is tried here: a new version of it that works in another way fails these.
"""

import asyncio
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from sseapp import SSEApp
from ssecore.http.request import Request
from ssecore.http.routes import GET
from ssecore.server.protocol import MAX_AHEAD_BYTES, BoundedProtocol, ParkedConnection
from ssecore.settings import Settings
from ssecore.streaming.sender import EXTENSION, chunk
from ssecore.wire import Event, cut
from tests.needs import find, needs
from tests.protocol import connected
from tests.serving import Server, is_clean, serve

TIMEOUT_S: Final = 20
START: Final = {"type": "http.response.start", "status": 200, "headers": []}
LAST: Final = {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that answers HTTP/1.0 as well, which a private one takes for a proxy's."""
    with serve(tmp_path_factory.mktemp("data"), env={"SSEAPP_AUTH": "off"}) as server:
        yield server


def part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}


def server_of(scope: Any) -> Any:
    return scope["extensions"][EXTENSION]


async def test_a_chunk_is_what_send_writes() -> None:
    bodies = [b"x", b"data: \xc3\xbc\n\n" * 5000]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        server = server_of(scope)
        assert server.answers(send) and server.park(send, lambda: None) is None, "before the start"
        await send(START)
        for body in bodies:
            await send(part(body))
        line = server.park(send, lambda: None)
        assert not line.paused
        for body in bodies:
            line.write(chunk(body))
        line.end(b"")

    with connected(app, b"GET / HTTP/1.1\r\n\r\n") as (protocol, wire):
        await asyncio.gather(*protocol.tasks)
        assert wire.written[1:3] == wire.written[3:5] and wire.written[5:] == [b"0\r\n\r\n"]
        assert not wire.closing and isinstance(wire.protocol, BoundedProtocol)


@pytest.mark.parametrize(
    ("request_head", "headers"),
    [(b"HEAD / HTTP/1.1\r\n\r\n", []), (b"GET / HTTP/1.1\r\n\r\n", [(b"content-length", b"1")])],
    ids=["HEAD", "of a known length"],
)
async def test_an_answer_that_is_not_chunked_goes_through_send(request_head: bytes, headers: list[Any]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "headers": headers})
        assert server_of(scope).park(send, lambda: None) is None
        await send({**LAST, "body": b"x"})

    with connected(app, request_head) as (protocol, _):
        await asyncio.gather(*protocol.tasks)


async def test_what_wraps_send_gets_each_message() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def wrapped(message: Any) -> None:
            await send(message)

        await send(START)
        server = server_of(scope)
        assert server.answers(send) and not server.answers(wrapped)
        assert server.park(wrapped, lambda: None) is None
        await send(LAST)

    with connected(app, b"GET / HTTP/1.1\r\n\r\n") as (protocol, _):
        await asyncio.gather(*protocol.tasks)


GET_HEAD: Final = b"GET / HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize(
    ("request_head", "meanwhile", "kept", "answers"),
    [
        (GET_HEAD, b"", True, 1),
        (b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n", b"", False, 1),
        (GET_HEAD, GET_HEAD, True, 2),
        (GET_HEAD, GET_HEAD * 2, True, 3),
        (GET_HEAD, b"GE", True, 1),
        (GET_HEAD, b"no request\r\n\r\n", False, 1),
        (b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n", GET_HEAD, False, 1),
    ],
    ids=["nothing more", "as it wants", "the next", "two", "a beginning", "no request", "one too many"],
)
async def test_behind_a_parked_answer_the_connection_goes_on(
    request_head: bytes, meanwhile: bytes, kept: bool, answers: int
) -> None:
    lines: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        line = server_of(scope).park(send, lambda: None)
        if line is None:  # others wait behind it
            await send({**LAST, "body": b"x"})
        else:
            lines.append(line)

    with connected(app, request_head) as (protocol, wire):
        state = protocol.server_state
        await asyncio.gather(*state.tasks)
        assert wire.protocol is lines[0] and state.connections == {lines[0]} and state.tasks == set()
        assert not any((protocol.cycle, protocol.parser, protocol.scope)), "nothing is kept of the request"
        if meanwhile:
            lines[0].data_received(meanwhile)
        while lines:
            lines.pop(0).end(b"x")
            while state.tasks:
                await asyncio.gather(*state.tasks)
        assert wire.body.count(b"1\r\nx\r\n0\r\n\r\n") == answers
        assert wire.closing is not kept
        if kept:
            assert state.connections == {wire.protocol} and isinstance(wire.protocol, BoundedProtocol)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\ncontent-length: 3\r\n\r\nx",
        GET_HEAD + GET_HEAD,
        GET_HEAD + b"GE",
        b"GET / HTTP/1.0\r\n\r\n",
    ],
    ids=["a body to come", "pipelined", "the next has begun", "HTTP/1.0"],
)
async def test_a_connection_with_more_to_do_is_not_parked(request_bytes: bytes) -> None:
    parked: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        if not parked:
            parked.append(server_of(scope).park(send, lambda: None))
        await send(LAST)

    with connected(app, request_bytes) as (protocol, _):
        await asyncio.gather(*protocol.tasks)
    assert parked == [None]


async def test_behind_a_large_body_the_client_is_heard_again() -> None:
    """uvicorn stops reading while it holds much of a body, and an app that has it all doesn't ask for more."""
    size = 200_000
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got, more = 0, True
        while more:
            message = await receive()
            got, more = got + len(message["body"]), message["more_body"]
        assert got == size and not wire.reading
        server_of(scope).watch(lambda: told.append("left"))

    head = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size
    with connected(app, head) as (protocol, wire):
        await asyncio.sleep(0)
        protocol.data_received(b"x" * size)
        await asyncio.gather(*protocol.tasks)
        assert wire.reading
    assert told == ["left"]


async def test_a_client_that_floods_a_parked_connection_loses_it() -> None:
    told: list[str] = []
    lines: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        lines.append(server_of(scope).park(send, lambda: told.append("left")))

    with connected(app, GET_HEAD) as (protocol, wire):
        await asyncio.gather(*protocol.tasks)
        for _ in range(MAX_AHEAD_BYTES // 1024):
            lines[0].data_received(b"x" * 1024)
        assert not wire.closing
        lines[0].data_received(b"x")
        assert wire.closing and lines[0]._ahead == b""
    assert told == ["left"]


async def test_a_client_that_leaves_a_parked_connection_is_told_of_once_and_frees_who_waits() -> None:
    told: list[str] = []
    lines: list[ParkedConnection] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        lines.append(server_of(scope).park(send, lambda: told.append("left")))

    with connected(app, GET_HEAD) as (protocol, _):
        state = protocol.server_state
        await asyncio.gather(*protocol.tasks)
        (line,) = lines
        for free in (line.resume_writing, lambda: line.connection_lost(ConnectionResetError())):
            line.pause_writing()
            line.start(line.drained())
            await asyncio.sleep(0)
            assert len(state.tasks) == 1
            free()
            await asyncio.gather(*state.tasks)
        assert told == ["left"] and state.connections == set()
    assert told == ["left"]


async def test_who_waits_for_a_client_may_be_cancelled_before_that_reads_again() -> None:
    lines: list[ParkedConnection] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        lines.append(server_of(scope).park(send, lambda: None))

    with connected(app, GET_HEAD) as (protocol, _):
        await asyncio.gather(*protocol.tasks)
        lines[0].pause_writing()
        lines[0].start(lines[0].drained())
        (task,) = protocol.server_state.tasks
        await asyncio.sleep(0)
        task.cancel()
        lines[0].resume_writing()
        await asyncio.wait([task])
        assert task.cancelled()


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


def numbers(chunked: bytes, *, plain: bool = False) -> list[int]:
    """The numbers of the events in a chunked body, each chunk checked; or in a plain one."""
    body = b""
    if plain:
        body, chunked = chunked, b""
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        body, chunked = body + rest[:length], rest[length + 2 :]
    return [json.loads(line[6:])["n"] for line in body.split(b"\n") if line.startswith(b"data: ")]


@needs("time")
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
                    end = b"\n\n" if sock is old else b"\n\n\r\n"
                    ten = read_until(sock, lambda body, n=n, end=end: b'"n":%d,' % n in body and body.endswith(end))  # type: ignore[misc]
                    assert numbers(ten, plain=sock is old) == [*range(n - 9, n + 1)]
        for sock in (quick, old):
            end = b"\n\n" if sock is old else b"\n\n\r\n"
            rest = read_until(sock, lambda body, end=end: mark in body and body.endswith(end))  # type: ignore[misc]
            assert numbers(rest, plain=sock is old) == [*range(events - 10, events)]
        assert numbers(read_until(slow, lambda body: mark in body and body.endswith(b"\n\n\r\n"))) == [*range(events)]
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("browser", [True, False])
async def test_what_a_drain_cuts_off_before_it_began_comes_back(browser: bool) -> None:
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
    async with app.running():
        with connected(app, head + b"\r\n") as (protocol, wire):
            await waits.wait()
            app.abort()
            await asyncio.gather(*protocol.tasks)
    if browser:
        assert wire.body.startswith(cut("") + b"retry: ")
    assert b"".join(wire.written).startswith(b"HTTP/1.1 200 " if browser else b"HTTP/1.1 503 ")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/stream?count=3&interval=0"),
        ("GET", "/stream/data?count=3&interval=0"),
        ("GET", "/chat?prompt=hello"),
        ("GET", "/tasks/export"),
        ("GET", "/healthz"),
        ("GET", "/nowhere"),
        ("HEAD", "/stream"),
    ],
)
def test_a_client_of_http_1_0_gets_the_same_body_without_chunks_and_the_connections_end(
    method: str, target: str, version: str, server: Server
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S) as sock:
        # `keep-alive` is what clients of HTTP/1.0 offer; it needs a length.
        connection = "keep-alive" if version == "1.0" else "close"
        sock.sendall(f"{method} {target} HTTP/{version}\r\nhost: x\r\nconnection: {connection}\r\n\r\n".encode())
        answer = b""
        while data := sock.recv(1 << 16):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    if version == "1.0":
        assert b"transfer-encoding" not in head
    expected = httpx.request(method, server.url + target, trust_env=False).content
    if b"transfer-encoding: chunked" not in head:
        assert re.sub(rb"[\w-]{22}", b"RUN", body) == re.sub(rb"[\w-]{22}", b"RUN", expected)
    assert is_clean(server.log())


async def test_a_stream_of_http_1_0_ends_by_itself_and_with_its_client() -> None:
    ends: list[str] = []
    waits = asyncio.Event()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("first")
            await asyncio.sleep(0.05)
            yield Event("second")
            if request.path == "/endless":
                waits.set()
                await asyncio.sleep(TIMEOUT_S)
        finally:
            ends.append(request.end_reason)

    app = SSEApp([GET("/", handler), GET("/endless", handler)], Settings(log="memory", auth="off"))
    async with asyncio.timeout(TIMEOUT_S), app.running():
        with connected(app, b"GET / HTTP/1.0\r\nhost: x\r\n\r\n") as (protocol, wire):
            await asyncio.gather(*protocol.tasks)
            assert wire.closing
            assert wire.body == b"retry: 2000\ndata: first\n\ndata: second\nid: end\n\n"
        with connected(app, b"GET /endless HTTP/1.0\r\nhost: x\r\n\r\n") as (protocol, wire):
            await waits.wait()
            tasks = list(protocol.tasks)
        await asyncio.gather(*tasks)
    assert ends == ["finished", "client"]


# Upgrade

UPGRADES: Final = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
    "websocket": b"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\n",
    "any": b"connection: upgrade\r\nupgrade: tls/1.2, x\r\nupgrade: y\r\n",
    "last": b"connection: close, upgrade\r\nupgrade: h2c\r\n",
}
BODIES: Final = {
    "none": b"\r\n",
    "of no length": b"content-length: 0\r\n\r\n",
    "of a length": b"content-length: 5\r\n\r\nhello",
    "chunked": b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    "chunked, with a trailer": b"transfer-encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nupgrade: h2c\r\n\r\n",
}


@pytest.mark.parametrize("cut_at", ["nowhere", "behind each byte", "behind the head"])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("upgrade", UPGRADES)
async def test_a_request_that_offers_an_upgrade_is_handled_as_if_it_did_not(
    upgrade: str, body: str, cut_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And so is each one that follows on the connection."""
    seen: list[tuple[str, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert b"upgrade" not in dict(scope["headers"])
        content, more = b"", True
        while more:
            message = await receive()
            content, more = content + message["body"], message["more_body"]
        seen.append((f"{scope['method']} {scope['path']}?{scope['query_string'].decode()}", content))
        await send({**START, "headers": [(b"content-length", b"0")]})
        await send(LAST)

    request = b"POST /a?b=c HTTP/1.1\r\nhost: x\r\n" + UPGRADES[upgrade] + BODIES[body]
    following = b"GET /2 HTTP/1.1\r\nhost: x\r\n\r\n"
    kept = upgrade != "last"
    if kept:
        request += request + following
    head = request.index(b"\r\n\r\n") + 4
    ends: Any = {"nowhere": [], "behind each byte": range(1, len(request)), "behind the head": [head]}[cut_at]
    parts = [request[begin:end] for begin, end in zip([0, *ends], [*ends, len(request)], strict=True)]
    with connected(app, parts[0]) as (protocol, wire):
        for part in parts[1:]:
            await asyncio.sleep(0)
            protocol.data_received(part)
        while protocol.tasks:
            await asyncio.gather(*protocol.tasks)
        assert wire.closing is not kept
    posted = ("POST /a?b=c", b"hello" if "of no" not in body and body != "none" else b"")
    assert seen == ([posted, posted, ("GET /2?", b"")] if kept else [posted])
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("request_head", "statuses"),
    [
        (b"CONNECT host:1 HTTP/1.1\r\nhost: host:1\r\n\r\n", 1),
        (b"POST / HTTP/1.1\r\n" + UPGRADES["h2c"] + b"x: y\r\n" * 200 + b"content-length: 25\r\n\r\n", 1),
    ],
    ids=["CONNECT", "a head of too many lines"],
)
def test_what_follows_a_refused_upgrade_is_not_taken_for_a_request(
    request_head: bytes, statuses: int, server: Server
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S) as sock:
        sock.sendall(request_head + b"GET /healthz HTTP/1.1\r\n\r\n")
        answer = b""
        while data := sock.recv(1 << 16):
            answer += data
    assert answer.count(b"HTTP/1.1 ") == statuses and not answer.startswith(b"HTTP/1.1 2")
    assert "upgrade" not in server.log().lower()


JAVA_CLIENT: Final = """
import java.net.URI;
import java.net.http.*;

public class Client {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (int i = 0; i < 2; i++) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0]))
                .header("Content-Type", "application/json")
                .POST(HttpRequest.BodyPublishers
                    .ofString("[{\\"role\\": \\"user\\", \\"content\\": \\"hello\\"}]")).build();
            HttpResponse<java.util.stream.Stream<String>> response =
                client.send(request, HttpResponse.BodyHandlers.ofLines());
            System.out.println(response.statusCode() + " " + response.version());
            response.body().forEach(System.out::println);
        }
    }
}
"""


@needs("java")
def test_javas_client_posts_with_its_defaults(server: Server, tmp_path: Path) -> None:
    """It offers h2c with each request to http://."""
    (tmp_path / "Client.java").write_text(JAVA_CLIENT)
    java = Path(find("java")).with_name("java")
    command = [str(java), "-XX:TieredStopAtLevel=1", str(tmp_path / "Client.java"), f"{server.url}/chat/stream"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("200 HTTP_1_1\n") == 2 and result.stdout.count("event: done\n") == 2
    assert is_clean(server.log()) and "pgrade" not in server.log()
