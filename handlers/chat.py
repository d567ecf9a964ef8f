"""A language model, token by token: any server that speaks OpenAI's chat completions, or a mock.

An answer is whole or its stream fails. What may have been generated is never asked for again: somebody pays for it.
Boundary of trust: what the upstream sends is bounded and checked here; its own words go to the log, without our key.
"""

import logging
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Protocol, overload

import anyio
import httpx
import msgspec
from msgspec import Meta

from handlers.local_model import LOCAL, local_model
from ssecore.dialects import DATA_ONLY
from ssecore.errors import BadRequest, SettingsError, TooLarge, UpstreamError
from ssecore.outbound import http_client
from ssecore.request import Request
from ssecore.routes import GET, POST, Run
from ssecore.settings import Settings
from ssecore.wire import CONTENT_TYPE, Decoder, Event, encode_json

__all__ = [
    "LINGERING",
    "ROUTES",
    "AnswerReader",
    "ChatMessage",
    "MockModel",
    "Model",
    "ModelError",
    "OpenAIModel",
    "ToolCall",
    "open_model",
]

logger = logging.getLogger("sseapp")

#: Most proxies, too, give up after 60 s without a byte. 5 s are three SYNs, so a connect that timed out isn't repeated.
READ_TIMEOUT_S, CONNECT_TIMEOUT_S = 60.0, 5.0
#: Answers under way at once, each on its own connection (httpx has 100). Who finds all taken is told so soon.
MAX_CONNECTIONS, POOL_TIMEOUT_S = 1000, 5.0
#: Both backoffs together stay below the second in which a failure is still an HTTP status (`stream.FIRST_ITEM_S`). A
#: `Retry-After` above MAX_PAUSE_S is left to the client, who waits better than an open stream.
MAX_RETRIES, BACKOFF_S, MAX_PAUSE_S = 2, 0.2, 5
#: Of an answer's text, and of one event. The longest answers of today's models have half of it.
MAX_ANSWER_BYTES = 1024 * 1024
#: In one answer. Nobody needs as many.
MAX_TOOL_CALLS: Final = 32
#: For the end of the body behind `[DONE]`: it is nearly always there, and without it the connection can't be kept.
END_TIMEOUT_S: Final = 0.1
#: What is read of a refusal, for the log, and how long that may take.
MAX_REFUSAL_BYTES, REFUSAL_TIMEOUT_S = 16 * 1024, 0.5

#: What goes wrong, by the upstream's HTTP status or by exception: code and text for the client, our own HTTP status,
#: and whether nothing can have been generated, so that it may be asked for again.
_FAULTS: Final[dict[Any, tuple[str, str, int, bool]]] = {
    200: ("upstream_malformed", "the model did not answer with an event stream", 502, False),
    401: ("upstream_auth", "the model doesn't accept this service's credentials", 502, False),
    403: ("upstream_auth", "the model doesn't accept this service's credentials", 502, False),
    429: ("upstream_rate_limited", "the model's rate limit is reached; try again", 503, True),
    503: ("upstream_error", "the model is not available; try again", 503, True),
    **dict.fromkeys(
        (301, 302, 303, 307, 308),
        # Not followed: a POST with the key in it would go to an address that nobody here has chosen.
        ("upstream_error", "the model's server has moved: OPENAI_BASE_URL must be set to its new address", 502, False),
    ),
    httpx.PoolTimeout: ("upstream_timeout", "too many answers are under way; try again later", 503, False),
    httpx.TimeoutException: ("upstream_timeout", "the model did not answer in time", 504, False),
    httpx.ConnectError: ("upstream_unreachable", "the model can't be reached", 502, True),
    httpx.ProxyError: ("upstream_unreachable", "the model can't be reached", 502, True),
    httpx.HTTPError: ("upstream_cut", "the model's answer was cut off", 502, False),
    TooLarge: ("upstream_too_large", "the model's answer is too long", 502, False),
    msgspec.DecodeError: ("upstream_malformed", "the model's answer can't be read", 502, False),
    RecursionError: ("upstream_malformed", "the model's answer can't be read", 502, False),
}


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Meta(max_length=100_000)]


@dataclass
class ToolCall:
    """What a model wants to be done. `arguments` ought to be a JSON object; it is as the model wrote it."""

    id: str
    name: str = ""
    arguments: str = ""


class Prompt(msgspec.Struct):
    prompt: Annotated[str, Meta(min_length=1, max_length=8000)]


class Model(Protocol):
    def stream(self, messages: Sequence[ChatMessage]) -> AsyncGenerator[str, None]:
        """The answer's text in pieces; to be closed with `aclosing`. Raises `UpstreamError`, whose `code` says how."""


class ModelError(UpstreamError):
    """A fault of the table. `said` is for the log; `pause_s` before it is asked for again, `None`: it must not be."""

    def __init__(self, why: int | Exception | None, said: str = "", retry_after: str = "") -> None:
        fault = ("upstream_error", f"the model failed{f' with the HTTP status {why}' if why else ''}", 502, False)
        keys = type(why).__mro__ if isinstance(why, Exception) else (why,)
        code, detail, self.status, again = next((_FAULTS[key] for key in keys if key in _FAULTS), fault)
        seconds = int(retry_after) if re.fullmatch("[0-9]{1,6}", retry_after) else None  # else a date, or nothing
        if detail.endswith("try again"):
            detail += " later" if seconds is None else f" in {seconds} s"
        super().__init__(detail, code=code)
        if re.fullmatch("[ -~]{1,40}", retry_after):
            self.headers["retry-after"] = retry_after
        self.pause_s = (seconds if retry_after else 0) if again else None
        self.refused = why if isinstance(why, int) else None  #: the HTTP status of a request that was not taken
        self.said = said or f"{type(why).__name__}: {why}"


@dataclass(frozen=True)
class MockModel:
    """Repeats the last user message."""

    delay_s: float

    def stream(self, messages: Sequence[ChatMessage]) -> AsyncGenerator[str, None]:
        prompt = next((message.content for message in reversed(messages) if message.role == "user"), "")
        return self.say(f"This is a mock response to: {prompt}")

    async def say(self, text: str) -> AsyncGenerator[str, None]:
        """Any text, word by word; each word keeps the space behind it."""
        for number, word in enumerate(re.findall(r"\S+\s*", text)):
            if number and self.delay_s:
                await anyio.sleep(self.delay_s)
            yield word


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolDelta(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_ToolDelta] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None  # none in the one with the usage
    error: Any = None


class AnswerReader:
    """The bytes of a streamed answer, cut anywhere, into its texts; no I/O."""

    def __init__(self) -> None:
        self.complete = False  #: the model has finished: a `finish_reason` or `[DONE]` was there
        self.done = False  #: `[DONE]` was there; nothing behind it counts
        self.tool_calls: list[ToolCall] = []  #: whole once it is complete
        self._decoder = Decoder(max_event_bytes=MAX_ANSWER_BYTES)
        self._bytes_left = MAX_ANSWER_BYTES
        self._calls: dict[int | None, ToolCall] = {}  # by the index that the next pieces name

    def feed(self, data: bytes) -> Iterator[str]:
        """Raises what is in the table of faults, behind the texts that stand before it."""
        for event in self._decoder.feed(data):
            if self.done or event.data == "[DONE]":
                self.complete = self.done = True
                return
            chunk = msgspec.json.decode(event.data or "{}", type=_Chunk)
            if chunk.error:
                raise ModelError(None, event.data)
            for choice in chunk.choices or ():
                if choice.delta and choice.delta.content:
                    self._count(choice.delta.content)
                    yield choice.delta.content
                for piece in (choice.delta and choice.delta.tool_calls) or ():
                    self._add_tool_call(piece)
                self.complete = self.complete or bool(choice.finish_reason)

    def _count(self, text: str) -> None:
        self._bytes_left -= len(text.encode())
        if self._bytes_left < 0:
            raise TooLarge("too long an answer")

    def _add_tool_call(self, piece: _ToolDelta) -> None:
        """A new `id` begins a call, whatever its index (some servers count wrong); what has none goes on with one."""
        call = self._calls.get(piece.index)
        if call is None or (piece.id and piece.id != call.id):
            if len(self.tool_calls) == MAX_TOOL_CALLS:
                raise TooLarge("too many tool calls")
            call = self._calls[piece.index] = ToolCall(piece.id or f"call_{len(self.tool_calls)}")
            self.tool_calls.append(call)
        name, arguments = (
            (piece.function and piece.function.name) or "",
            (piece.function and piece.function.arguments) or "",
        )
        self._count(name + arguments)
        if name != call.name:  # repeated with every piece by some servers, in pieces itself by others
            call.name += name
        call.arguments += arguments


@dataclass(frozen=True)
class OpenAIModel:
    """Any server with OpenAI's chat completions; `client` holds the headers and the connections."""

    client: httpx.AsyncClient
    url: httpx.URL
    model: str
    key: str = field(repr=False)
    calls_tools: bool = True  #: the local model is too small for it

    @overload
    def stream(self, messages: Sequence[ChatMessage]) -> AsyncGenerator[str, None]: ...

    @overload
    def stream(
        self, messages: Sequence[Any], tools: Sequence[Any], *, call: bool = True, options: Mapping[str, Any] = ...
    ) -> AsyncGenerator[str | ToolCall, None]: ...

    async def stream(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] = (),
        *,
        call: bool = True,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> AsyncGenerator[str | ToolCall, None]:
        """With `tools`, as OpenAI describes them, the calls that the model makes come behind its text.

        Without `call` it shall make none; the tools are told all the same, since earlier messages speak of them.
        `options` are more fields of the request.
        """
        body: dict[str, Any] = {**options, "model": self.model, "messages": messages, "stream": True}
        if tools:
            body |= {"tools": tools} if call else {"tools": tools, "tool_choice": "none"}
        content = encode_json(body)
        reader = AnswerReader()
        try:
            async with _body(await self._open(content)) as chunks:
                async for chunk in chunks:
                    for text in reader.feed(chunk):
                        yield text
                    if reader.done:
                        with anyio.move_on_after(END_TIMEOUT_S):
                            await anext(chunks, None)
                        break
            if not reader.complete:
                raise httpx.ReadError("the end came too early")
        except (ModelError, httpx.HTTPError, TooLarge, msgspec.DecodeError, RecursionError) as error:
            if not reader.complete or not isinstance(error, httpx.HTTPError):
                failure = error if isinstance(error, ModelError) else ModelError(error)
                said = failure.said.replace(self.key, "***") if self.key else failure.said
                logger.warning("%s: %.500r", failure.code, said)
                raise failure from None
        if tools:
            for tool_call in reader.tool_calls:
                yield tool_call

    @asynccontextmanager
    async def answer(self, asked: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of the streamed answer to a caller's own request. Raises `ModelError`, or what httpx raises."""
        async with _body(await self._open(encode_json({**asked, "model": self.model, "stream": True}))) as chunks:
            yield chunks

    async def _open(self, content: bytes) -> httpx.Response:
        request = self.client.build_request("POST", self.url, content=content)
        retries = 0
        while True:
            try:
                response = await self.client.send(request, stream=True)
                failure = await _refusal(response)
            except httpx.HTTPError as error:
                failure = ModelError(error)
            if failure is None:
                return response
            if failure.pause_s is None or failure.pause_s > MAX_PAUSE_S or retries == MAX_RETRIES:
                raise failure
            logger.info("%s, trying again", failure.code)
            await anyio.sleep(max(failure.pause_s, BACKOFF_S * 2**retries * random.uniform(0.5, 1)))
            retries += 1


@asynccontextmanager
async def _body(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """An answer's bytes; it is closed behind them. httpx nests generators and closes the outermost alone: the others
    are run to their end here, or the collector would close them, each in a task of its own."""
    chunks = response.aiter_raw()
    try:
        yield chunks
    finally:
        await response.aclose()
        with suppress(httpx.HTTPError, httpx.StreamError):
            async for _ in chunks:
                pass


async def _refusal(response: httpx.Response) -> ModelError | None:
    """What is wrong with an answer by its head: then it is closed."""
    status, headers, said = response.status_code, response.headers, b""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if status == 200 and media_type == CONTENT_TYPE and headers.get("content-encoding", "identity") == "identity":
        return None
    async with _body(response) as chunks:
        with suppress(httpx.HTTPError), anyio.move_on_after(REFUSAL_TIMEOUT_S):
            while len(said) < MAX_REFUSAL_BYTES and (chunk := await anext(chunks, b"")):
                said += chunk
    text = f"status {status}, {media_type:.100}: {said.decode(errors='replace')}"
    if location := headers.get("location"):
        text = f"redirected to {location:.200}, which is not followed: change OPENAI_BASE_URL; {text}"
    return ModelError(status, text, headers.get("retry-after", "") if status in (429, 503) else "")


@asynccontextmanager
async def open_model(settings: Settings) -> AsyncIterator[Model]:
    """The mock, unless a key or a base URL is set. Raises `SettingsError` for what can't be one."""
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
        # Not as it is: there may be a password in it, or a key that was meant for the next variable.
        raise SettingsError("OPENAI_BASE_URL: expected local, or http:// or https:// and a host")
    if not (key.isascii() and key.isprintable()):  # httpx' own error would print it
        raise SettingsError("OPENAI_API_KEY: expected printable ASCII")
    headers = {"accept": CONTENT_TYPE, "accept-encoding": "identity", "content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=POOL_TIMEOUT_S)
    limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=20)
    async with http_client(headers=headers, timeout=timeout, limits=limits) as client:
        url = url.copy_with(path=url.path.rstrip("/") + "/chat/completions")
        yield OpenAIModel(client, url, settings.openai_model, key)


async def chat(request: Request) -> AsyncIterator[Event]:
    async with aclosing(request.state.model.stream([ChatMessage("user", request.query.prompt)])) as answer:
        async for text in answer:
            yield Event({"content": text})
    yield Event("[DONE]")


async def chat_stream(request: Request) -> AsyncIterator[Event]:
    if not any(message.role == "user" for message in request.body):
        raise BadRequest("role: at least one message must be the user's", field="role")
    async with aclosing(request.state.model.stream(request.body)) as answer:
        async for text in answer:
            yield Event(text, "token")
    yield Event("", "done")


_Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=100)]
#: No tokens are paid for that nobody will read.
LINGERING: Final = Run(linger_s="setting")

ROUTES = [
    GET("/chat", chat, query=Prompt, dialect=DATA_ONLY, run=LINGERING),
    POST("/chat/stream", chat_stream, body=_Messages, run=LINGERING),
]
