"""The transport to a model's server: TLS, a proxy, and that a place among the connections is always given back."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, closing, suppress
from pathlib import Path

import anyio
import pytest

from handlers import chat
from handlers.answer import ModelError
from handlers.chat import ChatMessage, open_model
from handlers.upstream import AiohttpTransport
from ssecore.settings import Settings
from tests.needs import needs
from tests.nginx import make_certificate
from tests.upstream import DONE, LIMIT_S, STOP, Call, Script, answer, refuse, serve, token


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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
async def test_a_model_behind_tls_is_asked_and_its_certificate_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
            assert isinstance(model, chat.OpenAIModel) and isinstance(model.client._transport, AiohttpTransport)
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
