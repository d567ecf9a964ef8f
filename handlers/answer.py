"""Parses a streamed chat completion into text, reasoning, tool calls and usage; no I/O.

Servers that claim to be compatible with OpenAI differ in nearly everything. The reader ignores what it doesn't need:

1.  An incomplete answer raises a `ModelError` after its text. An answer is complete with a finish reason of `_ENDINGS`,
    or with `[DONE]` after some text if there is no finish reason.
2.  Reasoning is never part of the text.
3.  Errors have several formats: see `_is_error`.
4.  Text is whole characters: the halves of a surrogate pair are joined, a lone half becomes U+FFFD.
5.  A gateway's client gets the chunks unchanged (`ChunkReader`). There an answer cut by its maximum length or a content
    filter is complete, since the client gets the finish reason.

Boundary of trust: the upstream. An event, the answer and the tool calls are limited. The text of an upstream's error
goes to the log, and to the client only as `error_object`, if the request was the client's own.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import httpx
import msgspec

from ssecore.errors import TooLarge, UpstreamError

__all__ = [
    "MAX_ANSWER_BYTES",
    "AnswerReader",
    "Chunk",
    "ChunkReader",
    "ModelError",
    "Piece",
    "Reader",
    "Reasoning",
    "ToolCall",
    "Usage",
    "error_object",
    "is_object",
    "loads_leniently",
    "says_error",
]

T_co = TypeVar("T_co", covariant=True)

#: Of an answer, and of an event. Today's longest answers have half.
MAX_ANSWER_BYTES: Final = 1024 * 1024
#: Of an upstream's error: its message, and each other field.
MAX_MESSAGE_CHARS, MAX_FIELD_CHARS = 2000, 200
MAX_TOOL_CALLS: Final = 32

_ENDINGS: Final = frozenset(("stop", "tool_calls", "function_call"))
#: Mistral, Zhipu and others have other names for these two.
_CUT: Final = frozenset(("length", "model_length", "max_tokens"))
_FILTERED: Final = ("content_filter", "safety", "sensitive")
#: Some servers write a missing value as "null" or "none".
_NO_REASON: Final = frozenset(("", "null", "none"))

_SETTING: Final = "OPENAI_BASE_URL must name a server that streams chat completions"
#: Code and text for the client, our HTTP status, and whether a retry is safe because nothing was generated.
_FAULTS: Final[dict[Any, tuple[str, str, int, bool]]] = {
    200: ("upstream_malformed", f"the model did not answer with an event stream: {_SETTING}", 502, False),
    "encoded": (
        "upstream_malformed",
        f"the model's answer is compressed, which this service can't read: {_SETTING}",
        502,
        False,
    ),
    401: ("upstream_auth", "the model's server rejected this service's credentials: check OPENAI_API_KEY", 502, False),
    403: ("upstream_auth", "the model's server rejected this service's credentials: check OPENAI_API_KEY", 502, False),
    404: (
        "upstream_error",
        "the model's server doesn't know the model or the URL: check OPENAI_MODEL and OPENAI_BASE_URL",
        502,
        False,
    ),
    429: ("upstream_rate_limited", "the model's rate limit is reached; try again", 503, True),
    503: ("upstream_error", "the model is not available; try again", 503, True),
    **dict.fromkeys(
        (301, 302, 303, 307, 308),
        # Not followed: an unknown address would get the key.
        ("upstream_error", "the model's server has moved: OPENAI_BASE_URL must be set to its new address", 502, False),
    ),
    "length": ("upstream_length", "the model's answer was cut: it reached the model's maximum length", 502, False),
    "filter": ("upstream_filtered", "the model's answer was cut by the model's content filter", 502, False),
    "unfinished": ("upstream_unfinished", "the model stopped before its answer was complete", 502, False),
    "cut": ("upstream_cut", "the model's answer was cut off", 502, False),
    httpx.PoolTimeout: ("upstream_timeout", "too many answers are under way; try again later", 503, False),
    httpx.TimeoutException: ("upstream_timeout", "the model did not answer in time", 504, False),
    httpx.ConnectError: ("upstream_unreachable", "the model can't be reached", 502, True),
    httpx.ProxyError: ("upstream_unreachable", "the model can't be reached", 502, True),
    httpx.HTTPError: ("upstream_cut", "the model's answer was cut off", 502, False),
    TooLarge: ("upstream_too_large", "the model's answer is too long", 502, False),
    ValueError: ("upstream_malformed", "the model's answer can't be read", 502, False),
    RecursionError: ("upstream_malformed", "the model's answer can't be read", 502, False),
}


class ModelError(UpstreamError):
    """`said` is for the log. `pause_s` before a retry; `None`: no retry."""

    def __init__(
        self, why: int | str | Exception | None, said: str = "", retry_after: str = "", body: bytes = b""
    ) -> None:
        status = f" with the HTTP status {why}" if isinstance(why, int) else ""
        fault = ("upstream_error", f"the model failed{status}", 502, False)
        keys = type(why).__mro__ if isinstance(why, Exception) else (why,)
        code, detail, self.status, again = next((_FAULTS[key] for key in keys if key in _FAULTS), fault)
        seconds = int(retry_after) if re.fullmatch("[0-9]{1,6}", retry_after) else None  # else a date, or nothing
        if detail.endswith("try again"):
            detail += " later" if seconds is None else f" in {seconds} s"
        super().__init__(detail, code=code)
        if re.fullmatch("[ -~]{1,40}", retry_after):
            self.headers["retry-after"] = retry_after
        self.pause_s = (seconds if retry_after else 0) if again else None
        self.refused = (
            why if isinstance(why, int) else None
        )  #: the HTTP status with which the upstream refused the request
        self.body = body  #: of that refusal; it may contain the service's key
        self.said = said or (f"{type(why).__name__}: {why}" if isinstance(why, Exception) else detail)


class Reasoning(msgspec.Struct, frozen=True):
    """A piece of a model's reasoning."""

    text: str


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Token counts, as far as the server sends them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None

    def __add__(self, other: "Usage") -> "Usage":
        both = ((getattr(self, name), getattr(other, name)) for name in self.__struct_fields__)
        return Usage(*(a if b is None else b if a is None else a + b for a, b in both))


@dataclass
class ToolCall:
    """`arguments` should be a JSON object; it is as the model wrote it."""

    id: str
    name: str = ""
    arguments: str = ""


#: In this order: text and reasoning, then tool calls, then usage.
Piece = str | Reasoning | ToolCall | Usage


# The fields used here. `Any` because servers differ: an unexpected type must not fail the decoding.


class _Message(msgspec.Struct, gc=False):
    content: Any = None
    refusal: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None
    function_call: Any = None


class _Choice(msgspec.Struct, gc=False):
    index: Any = None
    delta: _Message | None = None
    message: _Message | None = None
    text: Any = None
    finish_reason: Any = None
    usage: Any = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice | None] | None = None
    error: Any = None
    message: Any = None
    detail: Any = None
    object: Any = None
    type: Any = None
    usage: Any = None


_decode: Final = msgspec.json.Decoder(_Chunk).decode


class Reader(Protocol[T_co]):
    """Splits a streamed answer into parts. Feed it until `done` or the body's end; then `end` returns the rest."""

    @property
    def finished(self) -> bool:
        """Whether each choice has its finish reason."""

    @property
    def done(self) -> bool:
        """Whether `[DONE]` was received."""

    def feed(self, block: bytes) -> Iterator[T_co]:
        """Raises `ModelError`, `TooLarge`, or for malformed data `ValueError` or `RecursionError`."""

    def end(self) -> Iterator[T_co]:
        """The rest, such as an event without a blank line. Raises `ModelError` if the answer is incomplete."""


class AnswerReader:
    """Yields an answer's pieces; the tool calls and the usage come from `end`.

    Hot path: a chunk of one token costs one `splitlines`, one decoding and no copy.
    """

    def __init__(self, choices: int = 1) -> None:
        self.finished = False
        self.done = False
        self.tool_calls: list[ToolCall] = []  #: complete at the answer's end
        self.usage: Usage | None = None
        self.mended: dict[str, Any] | None = None  #: the newest chunk that was not valid JSON
        self._data = _DataLines()
        self._choices = choices
        self._ended: set[str] = set()  # the choices that have a finish reason
        self._bytes_left = MAX_ANSWER_BYTES
        self._calls: dict[str, ToolCall] = {}  # by the index that the next pieces name
        self._fault: str | None = None  # by the first finish reason that is not one of _ENDINGS
        self._said = self._streamed = False  # there was text; a `delta` had text or calls
        self._halves: dict[str | int, str] = {}  # high surrogates that wait for their other half

    def feed(self, block: bytes) -> Iterator[str | Reasoning]:
        for data, is_error in self._data.feed(block):
            if self.done:
                return
            yield from self._read(data, is_error) or ()

    def end(self) -> Iterator[Piece]:
        if not self.done:
            with suppress(ValueError):  # a cut event
                for data, is_error in self._data.end():
                    yield from self._read(data, is_error) or ()
        for kind in self._halves:
            if isinstance(kind, int):
                self.tool_calls[kind].arguments += "\ufffd"
            else:
                yield Reasoning("\ufffd") if kind == "reasoning" else "\ufffd"
        self._check("length", "filter", "unfinished")
        yield from self.tool_calls
        if self.usage is not None:
            yield self.usage

    def _check(self, *faults: str) -> None:
        """Rule 1. Raises `ModelError`."""
        if not self._ended and not (self.done and (self._said or self.tool_calls)):
            raise ModelError("cut", "the end came too early")
        if self._fault in faults:
            raise ModelError(self._fault)

    def _read(self, data: bytes, is_error: bool) -> list[str | Reasoning] | None:
        """The pieces in an event; `None` if it is not a chunk."""
        if not is_error and not data.startswith(b"{") and data.strip(b' \t"') in (b"[DONE]", b""):
            self.done = b"[DONE]" in data
            return None
        try:
            chunk = _decode(data)
        except ValueError:
            if is_error:
                raise ModelError("error", _words(data)) from None
            if self.finished:
                return None  # nothing after it is needed
            self.mended = loads_leniently(data)
            chunk = msgspec.convert(self.mended, _Chunk)
        if is_error or _is_error(chunk):
            raise ModelError("error", _words(data))
        pieces: list[str | Reasoning] = []
        for choice in chunk.choices or ():
            if choice is not None:
                self._take(choice, pieces)
        if chunk.usage is not None:
            self._take_usage(chunk.usage)
        return pieces

    def _take(self, choice: _Choice, pieces: list[str | Reasoning]) -> None:
        if choice.delta is not None:
            self._streamed |= self._take_message(choice.delta, pieces)
        if choice.message is not None and not self._streamed:  # Perplexity repeats the deltas in it
            self._take_message(choice.message, pieces)
        if isinstance(choice.text, str) and choice.delta is None and choice.message is None:
            self._take_content(choice.text, pieces)
        if choice.usage is not None:  # Moonshot
            self._take_usage(choice.usage)
        if choice.finish_reason:
            self._finish(choice.finish_reason, _word(choice.index))

    def _take_message(self, message: _Message, pieces: list[str | Reasoning]) -> bool:
        """Return whether it has text or calls."""
        # OpenRouter, vLLM and others send it under both names.
        if reasoning := message.reasoning_content or message.reasoning:
            for thought, _ in _texts(reasoning):
                self._think(thought, pieces)
        before = len(pieces)
        if message.content:
            self._take_content(message.content, pieces)
        if message.refusal:
            self._take_content(message.refusal, pieces)
        calls = message.tool_calls or ()
        for piece in calls if isinstance(calls, list | tuple) else (calls,):
            self._add_call(piece)
        if message.function_call:
            self._add_call({"function": message.function_call})
        return len(pieces) > before or bool(calls or message.function_call)

    def _take_content(self, content: Any, pieces: list[str | Reasoning]) -> None:
        if not isinstance(content, str | list | dict):
            raise ValueError(f"content of the type {type(content).__name__}")
        for text, is_thought in ((content, False),) if type(content) is str else _texts(content):
            if is_thought:
                self._think(text, pieces)
            elif whole := self._whole(text, "text"):
                self._said = True
                pieces.append(whole)

    def _think(self, thought: str, pieces: list[str | Reasoning]) -> None:
        if whole := self._whole(thought, "reasoning"):
            pieces.append(Reasoning(whole))

    def _whole(self, text: str, kind: str | int) -> str:
        """Count the bytes, and keep half a character for the next text."""
        if text.isascii() and not self._halves:
            self._bytes_left -= len(text)
        else:
            text = self._halves.pop(kind, "") + text
            if "\ud800" <= text[-1:] <= "\udbff":
                self._halves[kind] = text[-1]
                text = text[:-1]
            text = _mended(text)
            self._bytes_left -= len(text.encode())
        if self._bytes_left < 0:
            raise TooLarge("the answer has more than its bound")
        return text

    def _finish(self, reason: Any, choice: str) -> None:
        word = reason.strip().casefold() if isinstance(reason, str) else "?"
        if word in _NO_REASON:
            return
        self._ended.add(choice)
        self.finished = len(self._ended) >= self._choices
        if word in _ENDINGS:
            return
        fault = "length" if word in _CUT else "filter" if word.startswith(_FILTERED) else "unfinished"
        self._fault = self._fault or fault

    def _take_usage(self, usage: Any) -> None:
        """The last one is valid: some servers send it with each chunk."""
        if isinstance(usage, dict):
            counts = (usage.get(name) for name in Usage.__struct_fields__)
            whole = Usage(*(count if type(count) is int and 0 <= count < 2**53 else None for count in counts))
            if whole != Usage():
                self.usage = whole

    def _add_call(self, piece: Any) -> None:
        """Continue the call with the same index, or begin one: see `_begins`."""
        if not isinstance(piece, dict):
            return
        function = piece.get("function")
        if not isinstance(function, dict):
            function = piece
        name, id, key = _word(function.get("name")), _word(piece.get("id")), _word(piece.get("index"))
        arguments = function.get("arguments")
        if isinstance(arguments, dict | list):
            arguments = json.dumps(arguments)
        elif not isinstance(arguments, str):
            arguments = ""
        call = self._calls.get(key)
        if call is None or _begins(call, id, name, arguments):
            if len(self.tool_calls) == MAX_TOOL_CALLS:
                raise TooLarge("too many tool calls")
            call = self._calls[key] = ToolCall(id or f"call_{len(self.tool_calls)}")
            self.tool_calls.append(call)
        if name != call.name:  # some servers repeat it with each piece, others split it
            self._bytes_left -= len(name.encode())
            call.name += name
        if arguments or self._bytes_left < 0:
            number = next(number for number, each in enumerate(self.tool_calls) if each is call)
            call.arguments += self._whole(arguments, number)


class Chunk(NamedTuple):
    data: str  #: as the upstream sent it
    is_token: bool  #: whether there is text or reasoning in it


class ChunkReader:
    """Rule 5. Repairs chunks that are not valid JSON."""

    def __init__(self, choices: int = 1) -> None:
        self._answer = AnswerReader(choices)

    @property
    def finished(self) -> bool:
        return self._answer.finished

    @property
    def done(self) -> bool:
        return self._answer.done

    def feed(self, block: bytes) -> Iterator[Chunk]:
        return self._chunks(self._answer._data.feed(block))

    def end(self) -> Iterator[Chunk]:
        with suppress(ValueError):  # a cut event
            yield from self._chunks(self._answer._data.end())
        self._answer._check("unfinished")

    def _chunks(self, events: Iterator[tuple[bytes, bool]]) -> Iterator[Chunk]:
        answer = self._answer
        for data, is_error in events:
            if answer.done:
                return
            pieces = answer._read(data, is_error)
            if (mended := answer.mended) is not None:
                data, answer.mended = json.dumps(mended).encode(), None
            if pieces is not None and mended != {}:
                yield Chunk(_words(data), bool(pieces))


def _begins(call: ToolCall, id: str, name: str, arguments: str) -> bool:
    """Whether this piece, which has the index of `call`, begins another call.

    Some servers give all calls the index 0 or none, so a new id begins a call; but others give each piece a new id, so
    with arguments only it must follow a complete call. Some servers send no ids.
    """
    if id and id != call.id:
        return bool(name) or not arguments or is_object(call.arguments)
    return bool(name) and not id and is_object(call.arguments)


def is_object(arguments: str) -> bool:
    if not arguments.rstrip().endswith("}"):
        return False
    try:
        msgspec.json.decode(arguments, type=dict[str, Any])
    except (ValueError, RecursionError):
        return False
    return True


def says_error(body: bytes) -> bool:
    """Whether a body that is not an event stream is a server's error."""
    try:
        return _is_error(msgspec.convert(loads_leniently(body), _Chunk))
    except (ValueError, RecursionError):
        return False


def error_object(body: bytes, key: str) -> dict[str, str | None] | None:
    """OpenAI's error object from the body of a refusal, for the client whose request it was. `None` if it has no text.

    Only the four fields, if they are strings: bounded, without control characters, without the service's `key`.
    """
    try:
        given = loads_leniently(body)
    except (ValueError, RecursionError):
        return None
    error = given.get("error") or given
    fields: dict[str, Any] = error if isinstance(error, dict) else {"message": error}
    message = fields.get("message") or fields.get("detail")
    if isinstance(message, dict):  # Mistral's
        message = message.get("detail")
    if isinstance(message, list) and message and isinstance(message[0], dict):  # FastAPI's
        message = message[0].get("msg")
    if not (text := _public(message, MAX_MESSAGE_CHARS, key)):
        return None
    kind, param, code = (_public(fields.get(name), MAX_FIELD_CHARS, key) for name in ("type", "param", "code"))
    return {"message": text, "type": kind or "invalid_request_error", "param": param, "code": code}


def _public(value: Any, limit: int, key: str) -> str | None:
    if not isinstance(value, str):
        return None
    # A space in place of a control character: without it the parts of a key might join.
    text = "".join(char if char.isprintable() else " " for char in _mended(value)).strip()
    return (text.replace(key, "***") if key else text)[:limit]


def _is_error(chunk: _Chunk) -> bool:
    """OpenAI's `{"error": …}`; vLLM's, sglang's and Mistral's `{"object": "error", "message": …}`; a gateway's
    `{"message": …}`, `{"detail": …}`; Anthropic's `{"type": "error", …}`."""
    if chunk.error:
        return True
    if chunk.choices:
        return False
    return bool(
        chunk.message or chunk.detail or "error" in (chunk.object, chunk.type) or isinstance(chunk.error, dict | list)
    )


def loads_leniently(data: bytes) -> dict[str, Any]:
    """Accepts NaN and Infinity (as `None`), lone surrogates, invalid UTF-8, control characters, numbers of any length.
    Other data than an object becomes `{}`.

    Raises `ValueError` (msgspec's errors too) and `RecursionError`.
    """
    value = json.loads(
        data.decode(errors="replace"),
        strict=False,
        parse_int=lambda digits: int(digits[:20]),
        parse_float=lambda digits: number if isfinite(number := float(digits)) else None,
        parse_constant=lambda _: None,
    )
    if isinstance(value, list):  # Google's servers put an error into one
        value = next((item for item in value if isinstance(item, dict) and item.get("error")), None)
    return value if isinstance(value, dict) else {}


def _texts(content: Any) -> Iterator[tuple[str, bool]]:
    """Texts, each with whether it is reasoning, from a string, a part such as `{"type": "text", "text": …}`, or a list
    of parts."""
    if isinstance(content, str):
        yield content, False
    elif isinstance(content, list):
        for part in content:
            yield from _texts(part)
    elif isinstance(content, dict):
        kind = content.get("type")
        is_thought = isinstance(kind, str) and kind.startswith(("thinking", "reasoning"))
        names = ("thinking", "reasoning", "summary", "text") if is_thought else ("text", "value", "refusal")
        inner = next((content[name] for name in names if isinstance(content.get(name), str | list | dict)), ())
        for text, was_thought in _texts(inner):
            yield text, is_thought or was_thought


def _mended(text: str) -> str:
    """Rule 4."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _word(value: Any) -> str:
    """An id, an index or a name as text; 0 and 0.0 are equal."""
    if isinstance(value, str):
        return _mended(value)
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None or isinstance(value, bool | list | dict) else str(value)


def _words(data: bytes) -> str:
    return data.decode(errors="replace")


def _is_one_event(block: bytes) -> bool:
    """Whether it is one event of one line, such as `data: {…}` and a blank line."""
    return (
        block.startswith(b"data: ")
        and block.endswith(b"\n\n")
        and block.find(b"\n") == len(block) - 2
        and b"\r" not in block
        and len(block) <= MAX_ANSWER_BYTES
    )


class _DataLines:
    """Like `wire.Decoder`, but yields bytes, and whether a field of the event makes it an error."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # of an unfinished line
        self._lines: list[bytes] = []  # of an event's data
        self._held = 0  # bytes of both
        self._is_error = self._after_cr = False
        self._is_first = True
        self._is_between_events = False

    def feed(self, block: bytes) -> Iterator[tuple[bytes, bool]]:
        if self._is_between_events and _is_one_event(block):  # hot path: most tokens
            yield block[6:-2], False
            return
        self._is_between_events = False
        if self._after_cr and block.startswith(b"\n"):
            block = block[1:]
        if not block:
            self._after_cr = False
            return
        self._after_cr = block.endswith(b"\r")
        lines = block.splitlines(keepends=True)
        rest = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        if lines and self._parts:
            lines[0] = b"".join((*self._parts, lines[0]))
            self._parts.clear()
            self._held = sum(map(len, self._lines))
        for line in lines:
            if (data := self._take(line.rstrip(b"\r\n"))) is not None:
                yield data
        if rest:
            self._hold(self._parts, rest)
        self._is_between_events = not (self._parts or self._lines or self._is_error or self._after_cr)

    def end(self) -> Iterator[tuple[bytes, bool]]:
        """The last event, if no blank line ended it."""
        for line in (b"".join(self._parts), b""):
            if (data := self._take(line)) is not None:
                yield data

    def _take(self, line: bytes) -> tuple[bytes, bool] | None:
        if self._is_first:
            self._is_first, line = False, line.removeprefix(b"\xef\xbb\xbf")
        if line.startswith(b"data:"):
            self._hold(self._lines, line[6:] if line[5:6] == b" " else line[5:])
        elif not line:
            event = (b"\n".join(self._lines), self._is_error) if self._lines else None
            self._lines, self._held, self._is_error = [], 0, False
            return event
        elif line == b"data":
            self._hold(self._lines, b"")
        elif line.startswith(b"event:"):
            self._is_error = line[6:].strip() == b"error"
        elif line.startswith(b"error:"):  # llama.cpp's own field
            self._hold(self._lines, line[6:])
            self._is_error = True
        return None

    def _hold(self, where: list[bytes], data: bytes) -> None:
        self._held += len(data)
        if self._held > MAX_ANSWER_BYTES:
            raise TooLarge("too large an event")
        where.append(data)
