"""The transport to a model's server: answers as servers frame them, TLS, a proxy, connections that are kept or not."""

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers import chat
from handlers import upstream as upstream_module
from handlers.answer import ModelError
from handlers.chat import ChatMessage, open_model
from handlers.upstream import UpstreamTransport
from ssecore.settings import Settings
from tests.needs import needs
from tests.nginx import make_certificate
from tests.upstream import DONE, LIMIT_S, STOP, Call, Script, answer, refuse, serve, token


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


async def ask(model: chat.Model) -> list[object]:
    with anyio.fail_after(LIMIT_S):
        async with aclosing(model.stream([ChatMessage("user", "Hello")])) as stream:
            return [piece async for piece in stream]


ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"


@asynccontextmanager
async def listening(context: ssl.SSLContext | None, asked: Callable[[bytes], None]) -> AsyncIterator[int]:
    """A server that answers each request with the one word, and its port."""
    body = token("Hi") + STOP + DONE

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                await reader.readexactly(length)
                asked(head)
                writer.write(ANSWER % len(body) + body)

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


@needs("openssl")
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": uvloop}) for uvloop in (False, True)])
async def test_a_model_behind_tls_is_asked_and_its_certificate_is_checked(
    anyio_backend: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "fullchain.pem", tmp_path / "privkey.pem")
    monkeypatch.setattr(chat, "BACKOFF_S", 0)
    heads: list[bytes] = []
    async with listening(context, heads.append) as port:
        settings = Settings(openai_base_url=f"https://127.0.0.1:{port}/v1", openai_api_key="sk-0123456789")
        async with open_model(settings) as model:
            with pytest.raises(ModelError) as caught:
                await ask(model)
        assert (caught.value.code, heads) == ("upstream_unreachable", [])
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "fullchain.pem"))
        async with open_model(settings) as model:
            assert [await ask(model) for _ in range(2)] == [["Hi"], ["Hi"]]
    assert all(b"authorization: bearer sk-0123456789\r\n" in head.lower() for head in heads)


async def test_a_model_elsewhere_is_asked_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[bytes] = []
    async with listening(None, heads.append) as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        async with open_model(Settings(openai_base_url="http://model.test/v1")) as model:
            assert await ask(model) == ["Hi"]
    assert heads[0].startswith(b"POST http://model.test/v1/chat/completions HTTP/1.1\r\n")


def cut(call: Call) -> None:
    call.head()
    call.send(token("Hi"))


def rubbish(call: Call) -> None:
    call.head()
    call.raw(b"zz\r\n")


def left(call: Call) -> None:
    call.head()
    call.send(token("Hi"))
    call.wait_gone()


async def test_a_place_among_the_connections_is_given_back_however_an_answer_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(chat, "POOL_TIMEOUT_S", 0.5)
    ends: list[Script] = [
        refuse(401),
        refuse(200),
        Call.reset,
        cut,
        rubbish,
        lambda call: call.raw(b"\x16\x03\x01\r\n"),
    ]
    with serve() as upstream:
        upstream.plan(*ends, left, *[answer("Hi")] * 2)
        async with open_model(Settings(openai_base_url=upstream.url)) as model:
            assert isinstance(model, chat.OpenAIModel) and isinstance(model.client._transport, UpstreamTransport)
            for _ in ends:
                with pytest.raises(ModelError) as caught:
                    await ask(model)
                assert caught.value.code != "upstream_timeout"
            async with aclosing(model.stream([ChatMessage("user", "Hello")])) as stream:
                assert await anext(stream) == "Hi"
            for _ in range(2):
                assert await ask(model) == ["Hi"]
        upstream.settle()


async def test_a_place_is_given_back_by_a_request_that_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(chat, "POOL_TIMEOUT_S", 0.5)
    with serve() as upstream:
        upstream.plan(lambda call: call.wait_gone(), answer("Hi"))
        async with open_model(Settings(openai_base_url=upstream.url)) as model:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask, model)
                await anyio.to_thread.run_sync(upstream.wait_call)
                tasks.cancel_scope.cancel()
            assert await ask(model) == ["Hi"]
        upstream.settle()


# Answers, as servers frame them

EVENTS = token("Hi") + STOP + DONE
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def chunked(*pieces: bytes, behind: bytes = b"0\r\n\r\n") -> bytes:
    return CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + behind


ANSWERS: Final = {
    "chunked": chunked(*(EVENTS[at : at + 7] for at in range(0, len(EVENTS), 7))),
    "with a length": HEAD + b"content-length: %d\r\n\r\n" % len(EVENTS) + EVENTS,
    "until the end": HEAD + b"connection: close\r\n\r\n" + EVENTS,
    "HTTP/1.0": HEAD.replace(b"1.1", b"1.0") + b"\r\n" + EVENTS,
    "behind 100 and 103": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + chunked(EVENTS),
    "with extensions and trailers": chunked(behind=b"%x;a=b\r\n%b\r\n0\r\nx: y\r\n\r\n" % (len(EVENTS), EVENTS)),
    "without a reason": chunked(EVENTS).replace(b"200 OK", b"200"),
}


class Line(asyncio.Transport):
    """A connection to a server that sends these pieces, and then hangs up."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces
        self.protocol: asyncio.Protocol

    def write(self, data: object) -> None:
        loop = asyncio.get_running_loop()
        for piece in self._pieces:
            loop.call_soon(self.protocol.data_received, piece)
        loop.call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None: ...

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


#: Made once: it takes 20 ms.
CERTIFICATES: Final = ssl.create_default_context()


def client() -> httpx.AsyncClient:
    transport = UpstreamTransport(CERTIFICATES, httpx.Limits())
    return httpx.AsyncClient(transport=transport, verify=CERTIFICATES)


async def fetch(*pieces: bytes) -> tuple[httpx.Response, bytes]:
    """The answer to one request, and its body. Raises what reading it raises."""
    loop = asyncio.get_running_loop()

    async def connected(make: Callable[[], asyncio.Protocol], *_: object, **__: object) -> tuple[Line, Any]:
        line = Line(*pieces)
        line.protocol = make()
        line.protocol.connection_made(line)
        return line, line.protocol

    loop.create_connection = connected  # type: ignore[method-assign, assignment]
    async with client() as asking:
        response = await asking.get("http://model.test")
        return response, response.content


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_is_the_same_wherever_it_is_cut(answer: bytes) -> None:
    cuts = [[answer[:at], answer[at:]] for at in range(1, len(answer))]
    for pieces in (*cuts, [answer[at : at + 1] for at in range(len(answer))]):
        response, body = await fetch(*pieces)
        assert (response.status_code, response.headers["content-type"], body) == (200, "text/event-stream", EVENTS)
        assert "link" not in response.headers and "x" not in response.headers


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", httpx.ReadError),
        (HEAD, httpx.ReadError),
        (CHUNKED, httpx.ReadError),
        (chunked(EVENTS, behind=b""), httpx.ReadError),
        (chunked(EVENTS, behind=b"zz\r\n"), httpx.RemoteProtocolError),
        (HEAD + b"content-length: 9\r\n\r\nshort", httpx.ReadError),
        (HEAD + b"content-length: x\r\n\r\n", httpx.RemoteProtocolError),
        (b"\x16\x03\x01\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", httpx.RemoteProtocolError),
        (HEAD + b"x: %b\r\n" % (b"y" * 100_000), httpx.RemoteProtocolError),
        (HEAD + b"x: y\r\n" * 20_000, httpx.RemoteProtocolError),
    ],
)
async def test_an_answer_that_is_none_is_an_error(answer: bytes, error: type[Exception]) -> None:
    for pieces in ([answer], [answer[at : at + 4096] for at in range(0, len(answer), 4096)]):
        with pytest.raises(error):
            await fetch(*pieces)


@given(st.sampled_from([b"", HEAD, CHUNKED, chunked(EVENTS, behind=b"")]), st.binary(max_size=60), st.integers(1, 40))
def test_whatever_bytes_come_are_an_answer_or_an_error(head: bytes, rest: bytes, size: int) -> None:
    async def ended() -> None:
        data = head + rest
        with anyio.fail_after(LIMIT_S), suppress(httpx.TransportError):
            await fetch(*(data[at : at + size] for at in range(0, len(data), size)))

    anyio.run(ended)


@pytest.mark.parametrize("end", [b"zz\r\n", b"1\r\nx"], ids=["no chunk", "cut"])
async def test_what_came_in_one_packet_with_a_failure_is_given_before_it(end: bytes) -> None:
    def script(call: Call) -> None:
        call.raw(chunked(token("Hel") + token("lo"), behind=end))

    pieces = []
    with serve() as upstream:
        upstream.plan(script)
        async with open_model(Settings(openai_base_url=upstream.url)) as model:
            async with aclosing(model.stream([ChatMessage("user", "Hello")])) as stream:
                with pytest.raises(ModelError) as caught, anyio.fail_after(LIMIT_S):
                    async for piece in stream:
                        pieces.append(piece)  # noqa: PERF401 - kept where it fails
    assert (pieces, caught.value.code) == (["Hel", "lo"], "upstream_cut")


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": uvloop}) for uvloop in (False, True)])
async def test_a_server_waits_while_nobody_takes_its_answer(anyio_backend: object) -> None:
    sent = 0
    full = threading.Event()

    def script(call: Call) -> None:
        nonlocal sent
        call.head()
        call._socket.settimeout(0.3)
        try:
            while True:
                call.send(b": " + b"x" * 65536 + b"\n")
                sent += 65536
        except TimeoutError:
            full.set()

    with serve() as upstream:
        upstream.plan(script)
        async with client() as asking, asking.stream("GET", upstream.url) as response:
            assert await anyio.to_thread.run_sync(full.wait, LIMIT_S)
            assert sent < 32 * 1024 * 1024  # mostly the kernel's
            held = len(await anext(response.aiter_raw()))
        assert held < 2 * 1024 * 1024


# Connections


async def test_a_connection_that_nobody_uses_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module, "KEEP_ALIVE_S", 0.05)
    gone = threading.Event()

    def script(call: Call) -> None:
        answer("Hi")(call)
        call.wait_gone()
        gone.set()
        call.kept = False

    with serve() as upstream:
        upstream.plan(script)
        async with open_model(Settings(openai_base_url=upstream.url)) as model:
            assert await ask(model) == ["Hi"]
            assert await anyio.to_thread.run_sync(gone.wait, LIMIT_S)
        upstream.settle()


@pytest.mark.parametrize("behind", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b"rubbish"])
async def test_a_connection_that_is_closed_or_says_more_takes_no_other_request(behind: bytes) -> None:
    closed = threading.Event()

    def script(call: Call) -> None:
        answer("Hi")(call)
        if behind:
            call.raw(behind)
            call.wait_gone()
        call.kept = False
        closed.set()

    with serve() as upstream:
        upstream.plan(script)
        async with open_model(Settings(openai_base_url=upstream.url)) as model:
            assert await ask(model) == ["Hi"]
            assert await anyio.to_thread.run_sync(closed.wait, LIMIT_S)
            await anyio.to_thread.run_sync(upstream.settle)
            upstream.plan(answer("Hi"))
            await anyio.sleep(0.01)  # a FIN has no event on this side
            assert await ask(model) == ["Hi"]
            assert upstream.calls[0].connection == 2
        upstream.settle()
