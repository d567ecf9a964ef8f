"""A language model: any server with OpenAI's chat completions, or a mock.

A request is not repeated if tokens may have been generated, since they cost money. Boundary of trust: the text of an
upstream's error goes to the log, without our key; `handlers.openai` may pass it on.
"""

import logging
import random
import re
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar
from urllib.parse import unquote_to_bytes

import anyio
import httpx
import msgspec
from msgspec import Meta

from handlers.answer import (
    AnswerReader,
    Chunk,
    ChunkReader,
    ModelError,
    Piece,
    Reader,
    Reasoning,
    Usage,
    error_object,
    says_error,
)
from handlers.local_model import LOCAL, local_model
from handlers.upstream import UpstreamTransport
from ssecore.client.outbound import Transport, http_client
from ssecore.dialects import DATA_ONLY
from ssecore.errors import BadRequest, SettingsError, TooLarge
from ssecore.http.request import Request
from ssecore.http.routes import GET, POST, Run
from ssecore.metrics import AnswerTimes
from ssecore.settings import Settings
from ssecore.streaming.pump import asyncio_loop
from ssecore.wire import CONTENT_TYPE, Event, encode_json

__all__ = ["LINGERING", "ROUTES", "ChatMessage", "MockModel", "Model", "OpenAIModel", "answer_times", "open_model"]

logger = logging.getLogger("sseapp")
T = TypeVar("T")

#: 60 s like most proxies. 5 s are three SYNs, so a connect isn't retried.
READ_TIMEOUT_S, CONNECT_TIMEOUT_S = 60.0, 5.0
#: Concurrent answers, one a connection.
MAX_CONNECTIONS, POOL_TIMEOUT_S = 1000, 5.0
#: Both backoffs take less than the second in which a failure is still an HTTP status (`pump.FIRST_ITEM_S`). A
#: `Retry-After` above MAX_PAUSE_S is left to the client.
MAX_RETRIES, BACKOFF_S, MAX_PAUSE_S = 2, 0.2, 5
#: From a finish reason to `[DONE]`, for the usage.
FINISH_TIMEOUT_S: Final = 1.0
#: From `[DONE]` to the body's end, without which the connection can't be reused.
END_TIMEOUT_S: Final = 0.1
#: Simple servers send text/plain, or none.
MEDIA_TYPES: Final = (CONTENT_TYPE, "text/plain", "application/octet-stream", "")
#: Servers refuse an unknown field with one of these, and name it.
UNKNOWN_FIELD: Final = (400, 422)
USAGE_FIELDS: Final = (b"stream_options", b"include_usage")
#: For the log.
MAX_REFUSAL_BYTES, REFUSAL_TIMEOUT_S = 16 * 1024, 0.5


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Meta(max_length=100_000)]


class Prompt(msgspec.Struct, forbid_unknown_fields=True):
    prompt: Annotated[str, Meta(min_length=1, max_length=8000)]


class Model(Protocol):
    def stream(self, messages: Sequence[ChatMessage]) -> AsyncGenerator[Piece, None]:
        """Use with `aclosing`. Raises `UpstreamError`."""


@dataclass(frozen=True)
class MockModel:
    """Repeats the last user message."""

    delay_s: float

    def stream(self, messages: Sequence[ChatMessage]) -> AsyncGenerator[Piece, None]:
        prompt = next((message.content for message in reversed(messages) if message.role == "user"), "")
        return self.say(f"This is a mock response to: {prompt}")

    async def say(self, text: str) -> AsyncGenerator[Piece, None]:
        """Yield words, each with the space after it."""
        for number, word in enumerate(re.findall(r"\S+\s*", text)):
            if number and self.delay_s:
                await anyio.sleep(self.delay_s)
            yield word


@dataclass(frozen=True)
class OpenAIModel:
    """Any server with OpenAI's chat completions."""

    client: httpx.AsyncClient
    url: httpx.URL
    model: str
    key: str = field(repr=False)
    calls_tools: bool = True  #: False for the local model, which is too small for it

    def stream(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] = (),
        *,
        call: bool = True,
        options: Mapping[str, Any] = MappingProxyType({}),
        usage: bool = False,
    ) -> AsyncGenerator[Piece, None]:
        """Tool calls come after the text. `tools`: in OpenAI's format; without `call` they are sent because earlier
        messages may refer to them. `options`: more fields of the request. `usage`: some servers send it anyway.
        """
        body: dict[str, Any] = {**options, "model": self.model, "messages": messages, "stream": True}
        if tools:
            body |= {"tools": tools} if call else {"tools": tools, "tool_choice": "none"}
        return self._answer(body, AnswerReader(), usage)

    def chunks(self, asked: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        """The chunks of the answer to a caller's own request, unchanged. Raises `ModelError`.

        A whole answer always has the usage, so without a stream it is requested.
        """
        choices = asked.get("n")
        reader = ChunkReader(choices if type(choices) is int else 1)
        return self._answer({**asked, "model": self.model, "stream": True}, reader, usage=not asked.get("stream"))

    async def _answer(self, body: Mapping[str, Any], reader: Reader[T], usage: bool) -> AsyncGenerator[T, None]:
        content = encode_json(body)
        try:
            async with _body(await self._open_with_usage(body) if usage else await self._open(content)) as chunks:
                async for chunk in chunks:
                    for part in reader.feed(chunk):
                        yield part
                    if reader.finished or reader.done:
                        break
                for part in await _rest(reader, chunks):
                    yield part
            for part in reader.end():
                yield part
        except (ModelError, httpx.HTTPError, TooLarge, ValueError, RecursionError) as error:
            failure = error if isinstance(error, ModelError) else ModelError(error)
            said = failure.said.replace(self.key, "***") if self.key else failure.said
            logger.warning("%s: %.500r", failure.code, said)
            try:
                raise failure from None
            finally:
                del failure  # its traceback has this frame, and with it the request

    async def _open_with_usage(self, body: Mapping[str, Any]) -> httpx.Response:
        """Ask for the usage. If the server refuses that, ask once more without.

        A refusal with a text that doesn't name the field is about the rest of the request, which isn't repeated.
        """
        try:
            return await self._open(encode_json({**body, "stream_options": {"include_usage": True}}))
        except ModelError as error:
            named = any(field in error.body for field in USAGE_FIELDS)
            if error.refused not in UNKNOWN_FIELD or (not named and error_object(error.body, self.key)):
                raise
            return await self._open(encode_json(body))

    async def _open(self, content: bytes) -> httpx.Response:
        # Without `client.send`: its cookies, redirects and authentication, all unused, cost 0.15 ms.
        transport = self.client._transport_for_url(self.url)
        request = self.client.build_request("POST", self.url, content=content)
        retries = 0
        while True:
            try:
                response = await transport.handle_async_request(request)
                failure = await _refusal(response)
            except httpx.HTTPError as error:
                failure = ModelError(error)
            if failure is None:
                return response
            if failure.pause_s is None or failure.pause_s > MAX_PAUSE_S or retries == MAX_RETRIES:
                try:
                    raise failure
                finally:
                    del failure  # as in `_answer`
            logger.info("%s, trying again", failure.code)
            await anyio.sleep(max(failure.pause_s, BACKOFF_S * 2**retries * random.uniform(0.5, 1)))
            retries += 1


async def _rest(reader: Reader[T], chunks: AsyncIterator[bytes]) -> list[T]:
    """Read what follows the finish reason, up to `[DONE]` and the body's end, within short timeouts."""
    parts: list[T] = []
    with suppress(httpx.HTTPError):
        with anyio.move_on_after(FINISH_TIMEOUT_S):
            while not reader.done and (chunk := await anext(chunks, b"")):
                parts += reader.feed(chunk)
        if reader.done:
            with anyio.move_on_after(END_TIMEOUT_S):
                await anext(chunks, b"")
    return parts


@asynccontextmanager
async def _body(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """httpx nests generators and closes only the outermost. This runs the others to their end; else the garbage
    collector would close each in its own task."""
    chunks: AsyncIterator[bytes] = response.extensions.get("chunks") or response.aiter_raw()
    try:
        yield chunks
    finally:
        await response.aclose()
        with suppress(httpx.HTTPError, httpx.StreamError):
            async for _ in chunks:
                pass


async def _refusal(response: httpx.Response) -> ModelError | None:
    """The error of a response that is not a stream."""
    status, headers, said = response.status_code, response.headers, b""
    media_type = (
        re.split("[;,]", headers.get("content-type", ""), maxsplit=1)[0].strip().lower()
    )  # "," if it is sent twice
    encoding = headers.get("content-encoding", "").strip().lower()
    if status == 200 and media_type in MEDIA_TYPES and encoding in ("", "identity"):
        return None
    async with _body(response) as chunks:
        with suppress(httpx.HTTPError), anyio.move_on_after(REFUSAL_TIMEOUT_S):
            while len(said) < MAX_REFUSAL_BYTES and (chunk := await anext(chunks, b"")):
                said += chunk
    text = f"status {status}, {media_type:.100}: {said.decode(errors='replace')}"
    if location := headers.get("location"):
        text = f"redirected to {location:.200}, which is not followed: change OPENAI_BASE_URL; {text}"
    if status == 200 and says_error(said):
        return ModelError("error", text)
    if status == 200 and encoding not in ("", "identity"):
        return ModelError("encoded", f"content-encoding {encoding:.100}, though the request asked for none; {text}")
    return ModelError(status, text, headers.get("retry-after", "") if status in (429, 503) else "", said)


@asynccontextmanager
async def open_model(settings: Settings) -> AsyncIterator[Model]:
    """The mock, unless a key or a base URL is set. Raises `SettingsError`."""
    base, key = settings.openai_base_url, (settings.openai_api_key or "").strip()
    if not base and not key:
        yield MockModel(settings.mock_delay_s)
        return
    if base == LOCAL:
        async with local_model() as (base, key):
            async with open_model(replace(settings, openai_base_url=base, openai_api_key=key)) as model:
                yield replace(model, model=LOCAL, calls_tools=False) if isinstance(model, OpenAIModel) else model
        return
    try:
        url = httpx.URL(base or "https://api.openai.com/v1")
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        # Without the value: it may hold a password, or the key by mistake.
        raise SettingsError("OPENAI_BASE_URL: expected local, or http:// or https:// and a host")
    if not (key.isascii() and key.isprintable()):  # httpx' own error would print it
        raise SettingsError("OPENAI_API_KEY: expected printable ASCII")
    headers = {"accept": CONTENT_TYPE, "accept-encoding": "identity", "content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    if url.userinfo:
        headers["authorization"] = "Basic " + b64encode(unquote_to_bytes(url.userinfo)).decode()
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=POOL_TIMEOUT_S)
    limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=20)
    async with http_client(headers=headers, timeout=timeout, limits=limits, transport=_transport()) as client:
        url = url.copy_with(path=url.path.rstrip("/") + "/chat/completions")
        yield OpenAIModel(client, url, settings.openai_model, key)


def _transport() -> Transport | None:
    """Ours takes a third of the CPU of httpx's own, which is used under trio."""
    return UpstreamTransport if asyncio_loop() is not None else None


def answer_times(request: Request) -> AnswerTimes:
    assert request.route is not None
    times: AnswerTimes = request.metrics.answer(request.route.path)
    return times


async def chat(request: Request) -> AsyncIterator[Event]:
    """Ask a model with one prompt, for `EventSource.onmessage`."""
    # Each event has a `content`, so that joining them gives the answer's text.
    times = answer_times(request)
    async with aclosing(request.state.model.stream([ChatMessage("user", request.query.prompt)])) as answer:
        async for piece in answer:
            match piece:
                case str():
                    times.token()
                    yield Event({"content": piece})
                case Reasoning(text):
                    times.token()
                    yield Event({"type": "reasoning", "reasoning": text, "content": ""})
                case Usage():
                    yield Event({"type": "usage", "usage": piece, "content": ""})
    times.end()
    yield Event("[DONE]")


async def chat_stream(request: Request) -> AsyncIterator[Event]:
    """Ask a model with a conversation."""
    if not any(message.role == "user" for message in request.body):
        raise BadRequest("role: at least one message must have the role 'user'", field="role")
    times = answer_times(request)
    async with aclosing(request.state.model.stream(request.body)) as answer:
        async for piece in answer:
            match piece:
                case str():
                    times.token()
                    yield Event(piece, "token")
                case Reasoning(text):
                    times.token()
                    yield Event(text, "reasoning")
                case Usage():
                    yield Event(piece, "usage")
    times.end()
    yield Event("", "done")


_Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=100)]
#: Without a reader it costs no more tokens.
LINGERING: Final = Run(linger_s="setting")


def _prompt(request: Request) -> str:
    return str(request.query.prompt)


def _last_said(request: Request) -> str:
    return next((message.content for message in reversed(request.body) if message.role == "user"), "")


ROUTES = [
    GET("/chat", chat, query=Prompt, dialect=DATA_ONLY, run=replace(LINGERING, about=_prompt)),
    POST("/chat/stream", chat_stream, body=_Messages, run=replace(LINGERING, about=_last_said)),
]
