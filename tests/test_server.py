"""Servers as processes: events come as they are made, signals end all in good order, a frozen client is dropped.

Nothing here waits for a time to pass: what takes a while is looked at again and again (`wait_until`), or read until it
ends.
"""

import asyncio
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from sseapp import GET, Event, Request, Settings, SSEApp
from ssecore.server.protocol import LATE_S, MAX_AHEAD_BYTES, MAX_PIPELINED, BoundedProtocol
from tests import serving
from tests.clients import listening
from tests.needs import find, needs
from tests.serving import Server, assert_takes_less, is_clean, run_sseapp, serve, serve_uvicorn, wait_until

server = serving.server

#: What looks into /proc, and at TCP_USER_TIMEOUT.
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

EVENT_SOURCE = {"accept": "text/event-stream", "cache-control": "no-cache"}

#: Streams that don't end by themselves within a test.
IDLE = "/countdown/3600?interval=3600"
BUSY = "/stream?count=1000000&interval=0.001"
ENDLESS = [IDLE, BUSY, "/stream/merge?interval=3600", "/stream/timeout?limit=3600&interval=3600"]


class Reader:
    """A stream that is being read, with what has come so far."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.body = ""
        self._chunks = response.iter_text()

    def until(self, text: str) -> None:
        while text not in self.body:
            self.body += next(self._chunks)

    def to_the_end(self) -> str:
        """Raises `httpx.RemoteProtocolError` when the body is cut off."""
        for chunk in self._chunks:
            self.body += chunk
        return self.body

    def whatever_comes(self) -> str:
        """As `to_the_end`, where being cut off is no failure."""
        with suppress(httpx.RemoteProtocolError):
            self.to_the_end()
        return self.body


@contextmanager
def reading(server: Server, target: str) -> Iterator[Reader]:
    """Open a stream and read its first bytes."""
    with server.client.stream("GET", target) as response:
        reader = Reader(response)
        reader.until("retry: 2000\n")
        yield reader


def farewell(body: str) -> int:
    """The reconnection time in milliseconds that a body ends with: a line behind the last event, without an id."""
    _, _, tail = body.rpartition("\n\n")
    match = re.fullmatch(r"retry: (\d+)\n", tail)
    assert match, f"no farewell: {tail!r}"
    return int(match[1])


# Events come as they are made


@needs("curl")
def test_curl_shows_an_event_while_the_stream_goes_on(server: Server) -> None:
    command = [find("curl"), "-sSN", "--noproxy", "*", f"{server.url}{IDLE}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as curl:
        try:
            assert curl.stdout is not None
            shown = b""
            while not shown.endswith(b"\n\n"):
                ready, _, _ = select.select([curl.stdout], [], [], 10)
                assert ready, f"nothing came after {shown!r}"
                more = curl.stdout.read(4096)
                assert more, f"the stream ended after {shown!r}"
                shown += more
            assert shown == b'retry: 2000\nevent: countdown\ndata: {"remaining":3600}\n\n'
            assert curl.poll() is None
        finally:
            curl.terminate()


@linux
def test_a_client_that_leaves_within_its_body_is_no_error(tmp_path: Path) -> None:
    head = b"POST /chat/stream HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
    with serve(tmp_path) as server:
        before = open_sockets(server)
        with connect(server) as sock:
            sock.sendall(head + b'[{"role": ')
            left = wait_until(lambda: open_sockets(server) - before)
        wait_until(lambda: not left & open_sockets(server))
        server.process.terminate()
        assert server.wait() == 0
    assert is_clean(server.log())


def test_a_body_that_is_too_large_is_refused_before_it_has_come(server: Server) -> None:
    head = b"POST /chat/stream HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with connect(server) as sock:
        sock.sendall(head + b"content-length: 100000000\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")
    with connect(server) as sock:
        # In chunks: more than the limit has to come, and not the end.
        sock.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        sock.sendall(b"100001\r\n" + b" " * 0x100001 + b"\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")


def connect(server: Server, *, receive_buffer_bytes: int | None = None) -> socket.socket:
    sock = socket.socket()
    if receive_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", server.port))
    return sock


def open_sockets(server: Server) -> set[str]:
    """The sockets that the server's process holds, each by a name that is its own."""
    names = set()
    for entry in os.scandir(f"/proc/{server.process.pid}/fd"):
        with suppress(FileNotFoundError):  # closed since
            names.add(os.readlink(entry.path))
    return {name for name in names if name.startswith("socket:")}


# A websocket


@pytest.mark.parametrize("start", [serve, serve_uvicorn], ids=["sseapp", "uvicorn"])
def test_a_websocket_handshake_is_not_accepted(start: Any, tmp_path: Path) -> None:
    handshake = (
        b"GET /nothing HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with start(tmp_path) as server, connect(server) as sock:
        sock.sendall(handshake)
        status = sock.recv(4096).split(b" ")[1]
        # A server that knows websockets says 403 for the app; one that doesn't takes it for a GET.
        assert status in (b"403", b"404")
        assert server.client.get("/healthz").is_success
    assert "Traceback" not in server.log()


# Signals


def test_ctrl_c_ends_endless_streams_within_a_second(tmp_path: Path) -> None:
    def end() -> float:
        with serve(tmp_path) as server, ExitStack() as stack:
            readers = [stack.enter_context(reading(server, target)) for target in ENDLESS]
            begin = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            bodies = [reader.to_the_end() for reader in readers]
            assert server.wait() == 0
            seconds = time.monotonic() - begin
        for body in bodies:
            assert farewell(body)
        assert is_clean(server.log())
        return seconds

    assert_takes_less(1, end)


def test_farewells_are_spread_over_time(tmp_path: Path) -> None:
    with serve(tmp_path) as server, ExitStack() as stack:
        readers = [stack.enter_context(reading(server, IDLE)) for _ in range(12)]
        server.process.send_signal(signal.SIGINT)
        delays = [farewell(reader.to_the_end()) for reader in readers]
    # Around the normal one, and hardly two the same.
    assert len(set(delays)) > 6
    assert 1000 <= min(delays) <= max(delays) <= 10_000


def test_sigterm_lets_a_short_stream_finish(tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_DRAIN_S": "60"}) as server:
        with reading(server, "/countdown/3?interval=0.2") as reader:
            server.process.terminate()
            whole = reader.to_the_end()
        # It has not waited for the end of its time, as there was nothing to wait for.
        assert server.wait() == 0
    assert whole.count("\n\n") == 4
    assert whole.endswith('event: complete\ndata: {"message":"Countdown finished!"}\nid: end\n\n')


def test_sigterm_ends_an_endless_stream_when_the_time_is_over(tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_DRAIN_S": "0.5"}) as server:
        with reading(server, BUSY) as busy, reading(server, IDLE) as idle:
            begin = time.monotonic()
            server.process.terminate()
            bodies = [busy.to_the_end(), idle.to_the_end()]
            assert time.monotonic() - begin >= 0.5
        assert server.wait() == 0
    for body in bodies:
        assert farewell(body)
    assert is_clean(server.log())


def test_sigterm_refuses_new_streams_and_says_that_it_does(tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_DRAIN_S": "60"}) as server:
        with reading(server, IDLE) as endless:
            server.process.terminate()
            wait_until(lambda: server.client.get("/readyz").status_code == 503)
            assert server.client.get("/readyz").json() == {"status": "draining"}
            assert server.client.get("/healthz").json() == {"status": "ok"}

            refusal = server.client.get("/stream")
            problem = refusal.json()
            assert (refusal.status_code, problem["code"]) == (503, "unavailable")
            assert "about to stop" in problem["detail"]
            assert int(refusal.headers["retry-after"]) > 0

            soft = server.client.get("/stream", headers=EVENT_SOURCE)
            assert (soft.status_code, soft.headers["content-type"]) == (200, "text/event-stream")
            assert re.fullmatch(r"retry: [1-9]\d{3}\n", soft.text)
            # What is over is over, and what is wrong is wrong.
            assert server.client.get("/stream", headers=EVENT_SOURCE | {"last-event-id": "end"}).status_code == 204
            assert server.client.get("/stream?count=x", headers=EVENT_SOURCE).status_code == 400
            assert endless.body.count("\n\n") == 1
        # The last stream has gone: there is nothing more to wait for.
        assert server.wait() == 0


def test_a_client_that_takes_nothing_does_not_hold_up_the_end(tmp_path: Path) -> None:
    def end() -> float:
        with (
            serve(tmp_path, env={"SSEAPP_DRAIN_S": "0.1"}) as server,
            connect(server, receive_buffer_bytes=4096) as frozen,
        ):
            frozen.sendall(b"GET /stream?count=1000000&interval=0 HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert frozen.recv(1)
            begin = time.monotonic()
            server.process.terminate()
            assert server.wait() == 0
            seconds = time.monotonic() - begin
        assert is_clean(server.log()), server.log()
        return seconds

    assert_takes_less(3, end)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(second: signal.Signals, tmp_path: Path) -> None:
    def end() -> float:
        with serve(tmp_path, env={"SSEAPP_DRAIN_S": "60"}) as server:
            with reading(server, IDLE) as idle:
                server.process.terminate()
                wait_until(lambda: server.client.get("/readyz").status_code == 503)
                begin = time.monotonic()
                server.process.send_signal(second)
                assert server.wait() == 0
                seconds = time.monotonic() - begin
                assert "id: end" not in idle.whatever_comes()
        assert is_clean(server.log())
        return seconds

    assert_takes_less(2, end)


def test_a_signal_while_nothing_happens_ends_the_server(tmp_path: Path) -> None:
    for sent in (signal.SIGTERM, signal.SIGINT):
        with serve(tmp_path) as server:
            server.process.send_signal(sent)
            assert server.wait() == 0
        assert is_clean(server.log())


# Where it listens


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_address_for_all_is_refused_without_saying_so_aloud(host: str, tmp_path: Path) -> None:
    for result in (
        run_sseapp("serve", "--host", host, "--port", "0", "--data-dir", str(tmp_path)),
        run_sseapp("serve", "--port", "0", "--data-dir", str(tmp_path), env={"SSEAPP_HOST": host}),
    ):
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"sseapp: can't listen on {host}: it is not a loopback address")
        assert "SSEAPP_AUTH=off" in result.stderr


def test_an_address_for_all_is_taken_when_it_was_said_aloud(tmp_path: Path) -> None:
    with serve(tmp_path, "--host", "0.0.0.0", env={"SSEAPP_AUTH": "off"}) as server:
        assert server.client.get("/healthz").is_success


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
def test_any_loopback_address_is_taken(host: str, tmp_path: Path) -> None:
    with serve(tmp_path, "--host", host) as server:
        assert server.client.get("/healthz").is_success


def test_a_port_in_use_is_said_plainly(server: Server, tmp_path: Path) -> None:
    port = str(server.port)
    result = run_sseapp("serve", "--port", port, "--data-dir", str(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"sseapp: can't listen on 127\.0\.0\.1:{port}: .*in use.*\n", result.stderr)


def test_an_unknown_host_is_said_plainly(tmp_path: Path) -> None:
    result = run_sseapp("serve", "--host", "nowhere.invalid", "--data-dir", str(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"sseapp: can't listen on 'nowhere\.invalid': .+\n", result.stderr)


def test_a_start_that_fails_says_why_and_its_exit_code_does(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = run_sseapp("serve", "--port", "0", "--data-dir", str(file))
    assert result.returncode not in (0, 1)
    assert str(file) in result.stderr


# A client that stops reading


@linux
def test_a_frozen_client_is_dropped_and_its_socket_freed(tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_SEND_TIMEOUT_S": "1"}) as server:
        with reading(server, "/countdown/1?interval=1.5") as quiet:
            before = open_sockets(server)
            with connect(server, receive_buffer_bytes=4096) as frozen:
                frozen.sendall(b"GET /stream?count=1000000&interval=0 HTTP/1.1\r\nhost: localhost\r\n\r\n")
                held = wait_until(lambda: open_sockets(server) - before)
                wait_until(lambda: not held & open_sockets(server))
            # One that has nothing to say for longer than that is not taken for one that nobody reads.
            assert quiet.to_the_end().endswith("id: end\n\n")
        server.process.terminate()
        assert server.wait() == 0
    assert is_clean(server.log())


def stalled(server: Server, route: str) -> bool:
    """Whether the sweep has seen that a client of the route doesn't read."""
    found = re.search(
        rf'^sseapp_stalled_seconds_total{{route="{route}"}} (.*)$', server.client.get("/metrics").text, re.M
    )
    return found is not None and float(found[1]) > 0


@needs("time")
@linux
def test_a_stop_of_the_process_drops_only_the_client_that_does_not_read(tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_SEND_TIMEOUT_S": "2"}) as server, ExitStack() as stack:
        before = open_sockets(server)
        frozen = stack.enter_context(connect(server, receive_buffer_bytes=4096))
        frozen.sendall(b"GET /stream/data?count=1000000&interval=0 HTTP/1.1\r\nhost: localhost\r\n\r\n")
        held = wait_until(lambda: open_sockets(server) - before)
        healthy = stack.enter_context(reading(server, "/stream?count=50000&interval=0"))
        wait_until(lambda: stalled(server, "/stream"))
        server.process.send_signal(signal.SIGSTOP)
        body = stack.enter_context(ThreadPoolExecutor(1)).submit(healthy.to_the_end)  # it reads on meanwhile
        time.sleep(4)  # twice as long as a client may take
        server.process.send_signal(signal.SIGCONT)
        assert body.result().endswith("id: end\n\n")
        wait_until(lambda: not held & open_sockets(server))
        server.process.terminate()
        assert server.wait() == 0
    assert is_clean(server.log())


@needs("time")
def test_a_stop_of_the_process_is_not_part_of_a_streams_life(tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_MAX_STREAM_S": "3"}) as server:
        with reading(server, "/countdown/2?interval=0.5") as stream:
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(4)
            server.process.send_signal(signal.SIGCONT)
            assert "Countdown finished!" in stream.to_the_end()


# Under plain uvicorn, which tells an app of its end only when all connections are closed


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_under_uvicorn_streams_get_their_farewell_and_the_server_ends(sent: signal.Signals, tmp_path: Path) -> None:
    def end() -> float:
        with serve_uvicorn(tmp_path) as server, ExitStack() as stack:
            targets = [*ENDLESS, "/topics/news", "/users/ann/stream"]
            readers = [stack.enter_context(reading(server, target)) for target in targets]
            run = server.client.get("/chat?prompt=hello", headers={"prefer": "respond-async"})
            assert run.status_code == 202
            begin = time.monotonic()
            server.process.send_signal(sent)
            bodies = [reader.to_the_end() for reader in readers]
            # uvicorn raises the signal again when it is done.
            assert server.wait() in (-sent, 0, 130)
            seconds = time.monotonic() - begin
        for body in bodies:
            assert farewell(body)
        assert "Traceback" not in server.log().replace("KeyboardInterrupt", "") or sent == signal.SIGINT
        return seconds

    assert_takes_less(3, end)


def touched(file: Path, server: Server) -> Server:
    os.utime(file)
    return server


def test_under_uvicorn_a_reload_is_not_held_up_by_a_stream(tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    changed = watched / "changed.py"
    changed.touch()
    with serve_uvicorn(tmp_path / "data", "--reload", "--reload-dir", str(watched)) as server:
        with reading(server, IDLE) as idle:
            # Again and again: what is first seen is no change.
            wait_until(lambda: "Reloading" in touched(changed, server).log())
            assert farewell(idle.to_the_end())
        wait_until(lambda: server.log().count("Application startup complete.") == 2)
        with reading(server, IDLE):
            server.process.send_signal(signal.SIGTERM)
            server.wait()
    assert "Traceback" not in server.log()


async def test_an_embedded_app_puts_the_handlers_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    heard: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    app = SSEApp([GET("/ticks", ticks)], Settings(log="memory"))
    try:
        async with app.running(), listening(app, "/ticks") as stream:
            await stream.event()
            signal.raise_signal(signal.SIGTERM)
            with anyio.fail_after(20):
                assert await stream.rest() == []
            assert farewell(stream.raw.decode())
            assert heard == [signal.SIGTERM], "what the host does on it is done too"
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, old)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


async def ticks(request: Request) -> AsyncIterator[Event]:
    yield Event("tick")
    await anyio.sleep_forever()


# A client that sends half a head


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@asynccontextmanager
async def bounded(
    app: Any = nothing, keep_alive_s: int = 1
) -> AsyncIterator[tuple[tuple[str, int], list[BoundedProtocol]]]:
    """A server of this app; gives its address, and the connections that it got."""
    made: list[BoundedProtocol] = []

    config = uvicorn.Config(app, http=BoundedProtocol, ws="none", log_config=None, timeout_keep_alive=keep_alive_s)
    config.load()

    def protocol() -> BoundedProtocol:
        made.append(BoundedProtocol(config, ServerState(), {}))
        return made[-1]

    listener = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    async with listener:
        yield listener.sockets[0].getsockname(), made


@pytest.mark.parametrize("head", [b"", b"GET /healthz HTTP/1.1\r\nhost: loc"])
@pytest.mark.parametrize("first", [True, False], ids=["the first", "a later one"])
async def test_a_head_that_does_not_come_to_its_end_is_waited_for_so_long(
    head: bytes, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssecore.server.protocol.HEAD_S", 0.2)
    async with bounded() as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        with anyio.fail_after(10):
            if not first:
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
                assert await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            assert await reader.read() == b""
        writer.close()


HEALTH = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
PUBLISH = (
    b"POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 4\r\n\r\n1234"
)


@needs("time")
@linux
@pytest.mark.parametrize(
    ("before", "meanwhile", "status"),
    [(HEALTH[:20], HEALTH[20:], b"200"), (HEALTH, HEALTH, b"200"), (PUBLISH[:-3], PUBLISH[-3:], b"202")],
    ids=["a head", "the next request", "a body"],
)
def test_what_came_while_the_process_stood_still_is_in_time(
    before: bytes, meanwhile: bytes, status: bytes, tmp_path: Path
) -> None:
    """Timers fire before what has come meanwhile is read."""
    with serve(tmp_path, module="tests.impatient") as server, connect(server) as sock:
        sock.sendall(before)
        if before == HEALTH:
            answer = b""
            while not answer.endswith(b"}"):
                answer += sock.recv(4096)
        else:
            time.sleep(0.3)  # it has been read
        server.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: ") T " in Path(f"/proc/{server.process.pid}/stat").read_text())
        sock.sendall(meanwhile)
        time.sleep(2.5 + LATE_S)
        server.process.send_signal(signal.SIGCONT)
        assert sock.recv(4096).startswith(b"HTTP/1.1 %b " % status)
        while sock.recv(4096):
            pass  # and an idle connection is closed in time, as ever


# Requests behind one that is not answered yet


class Gate:
    """An app whose `/gate` is answered when it is opened; all others at once, with their paths."""

    def __init__(self) -> None:
        self.opened = anyio.Event()
        self.left = anyio.Event()  #: the client of `/gate` has left
        self.asked: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        if scope["path"] == "/gate":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, receive)
                await self.opened.wait()
                tasks.cancel_scope.cancel()
        body = scope["path"].encode() + b" "
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()
        self.opened.set()

    @asynccontextmanager
    async def asked_for(self, behind: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection with `/gate` in front, and these bytes behind, which the server has had."""
        async with bounded(self, keep_alive_s=60) as (address, _):
            reader, writer = await asyncio.open_connection(*address)
            with anyio.fail_after(10):
                writer.write(get("/gate") + behind)
                await anyio.wait_all_tasks_blocked()
                while not self.asked:  # noqa: ASYNC110 - what it waits for is bytes in a socket
                    await asyncio.sleep(0.01)
                yield reader, writer
            writer.close()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()


def paths(answers: bytes) -> list[str]:
    assert answers.count(b"HTTP/1.1 200 OK") == answers.count(b"HTTP/1.1"), answers
    return re.findall(r"/\w*(?= )", answers.decode().replace("HTTP/1.1", ""))


async def test_a_handful_of_requests_waits_for_its_turn() -> None:
    gate = Gate()
    async with gate.asked_for(b"".join(get(f"/{number}") for number in range(MAX_PIPELINED))) as (reader, writer):
        assert gate.asked == ["/gate"]
        gate.opened.set()
        answers = await reader.readuntil(f"/{MAX_PIPELINED - 1} ".encode())
        assert paths(answers) == ["/gate", *[f"/{number}" for number in range(MAX_PIPELINED)]]
        writer.write(get("/again"))
        assert paths(await reader.readuntil(b"/again ")) == ["/again"], "the connection goes on"


@pytest.mark.parametrize(
    ("behind", "answered"),
    [
        (b"".join(get(f"/{number}") for number in range(MAX_PIPELINED + 1)), MAX_PIPELINED),
        (b"".join(get(f"/{number}") for number in range(3000)), MAX_PIPELINED),
        (get("/0") + b"POST /1 HTTP/1.1\r\ncontent-length: x\r\n\r\n" + get("/2"), 1),
        (b"\x16\x03\x01" + get("/0"), 0),
        (b"GET / HTTP/9.9\r\n\r\n", 0),
    ],
    ids=["one too many", "thousands", "a bad length", "TLS", "a version"],
)
async def test_what_is_too_much_or_no_request_ends_the_connection_after_the_answers(
    behind: bytes, answered: int
) -> None:
    """No 400 in the place of an answer, or in the middle of one."""
    gate = Gate()
    async with gate.asked_for(behind) as (reader, writer):
        writer.write(get("/late"))
        await anyio.wait_all_tasks_blocked()
        gate.opened.set()
        answers = await reader.read()
        assert paths(answers) == ["/gate", *[f"/{number}" for number in range(answered)]]
        assert answers.count(b"connection: close") == 1


async def test_only_so_many_bytes_may_come_behind_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssecore.server.protocol.HEAD_S", 0.3)
    gate = Gate()
    async with gate.asked_for(b"") as (_, writer):
        writer.write(b"POST /1 HTTP/1.1\r\ncontent-length: 100000000\r\n\r\n")
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(OSError):
            while True:
                writer.write(b"x" * MAX_AHEAD_BYTES)
                await writer.drain()
        await gate.left.wait()
        assert gate.asked == ["/gate"]


@pytest.mark.parametrize("behind", [b"", get("/1"), get("/1") * MAX_PIPELINED, get("/1") * 3000, b"GET /1"])
@pytest.mark.parametrize("later", [False, True], ids=["with it", "later"])
async def test_a_client_that_leaves_with_requests_waiting_is_noticed(behind: bytes, later: bool) -> None:
    gate = Gate()
    async with gate.asked_for(b"" if later else behind) as (_, writer):
        if later:
            writer.write(behind)
            await anyio.wait_all_tasks_blocked()
        writer.close()
        await gate.left.wait()
        await anyio.wait_all_tasks_blocked()
    assert gate.asked == ["/gate"], "what waited is not begun"


async def test_half_a_head_behind_an_answer_is_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssecore.server.protocol.HEAD_S", 0.2)
    gate = Gate()
    async with gate.asked_for(b"GET /1 HTTP/1.1\r\nhost: loc") as (reader, _):
        gate.opened.set()
        assert paths(await reader.read()) == ["/gate"], "not for as long as an idle connection, a minute here"


# What a body brings along


async def test_a_trailer_is_not_a_header() -> None:
    heads: list[list[tuple[bytes, bytes]]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        heads.append(scope["headers"])
        await nothing(scope, receive, send)

    async with bounded(app) as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        with anyio.fail_after(10):
            for _ in range(2):
                writer.write(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\n1\r\n")
                await anyio.wait_all_tasks_blocked()
                writer.write(b"0\r\nauthorization: Bearer x\r\nidempotency-key: y\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
        writer.close()
    assert heads == [[(b"transfer-encoding", b"chunked")]] * 2


async def test_a_connection_that_is_reset_is_not_kept_for_a_next_request() -> None:
    async with bounded() as (address, made):
        reader, writer = await asyncio.open_connection(*address)
        with anyio.fail_after(10):
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert await reader.readuntil(b"\r\n\r\n")
            (connection,) = made
            assert connection.timeout_keep_alive_task is not None
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
            while connection.parser is not None:  # noqa: ASYNC110 - uvicorn's own sign that it is lost
                await asyncio.sleep(0)
        assert connection.timeout_keep_alive_task is None
