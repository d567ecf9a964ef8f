"""The text/event-stream format in both directions, without I/O.

Source: HTML Standard, 9.2.5 and 9.2.6, https://html.spec.whatwg.org/multipage/server-sent-events.html

Boundary of trust: an `Event` from outside can't forge a field or a second event.
"""

import os
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, Final

import msgspec
import orjson

from ssecore.errors import EncodeError, TooLarge

__all__ = ["CONTENT_TYPE", "DEFAULT_MAX_EVENT_BYTES", "HEARTBEAT", "Decoder", "Event", "cut", "encode", "encode_json"]

CONTENT_TYPE: Final = "text/event-stream"

#: No blank line: after an `id:` httpx-sse and openai-python dispatch an event.
HEARTBEAT: Final = b":\n"

#: The standard has no limit.
DEFAULT_MAX_EVENT_BYTES: Final = 16 * 1024 * 1024

MAX_RETRY_MS: Final = 2**53 - 1

#: 64 KiB: names may come from outside.
CACHED_NAMES, CACHED_NAME_LENGTH = 1024, 64

_TEXT: Final = (str, bytes, bytearray, memoryview)
#: A pure function's results, so apps may share them.
_PREFIXES: Final[dict[str | None, bytes]] = {None: b"data: "}

_LINE_BREAK: Final = re.compile(rb"\r\n|\r|\n")
#: Most servers' blocks. The last alternative stops at another one: searching on takes quadratic time.
_BLOCK: Final = re.compile(r"(?:id: (.*+)\n)?(?:event: (.*+)\n)?data: (.*+)\n(?:id: (.*+)\n)?\n|(?s:.+)")
_JSON_OPTIONS: Final = orjson.OPT_UTC_Z


class Event(msgspec.Struct, frozen=True, gc=False):
    """A struct: a dataclass takes three times as long."""

    #: `str`, `bytes` (UTF-8), or anything else as JSON.
    data: Any
    #: Default: `message`.
    event: str | None = None
    #: For `Last-Event-ID`. Runs and topics set their own.
    id: str | None = None
    #: In milliseconds.
    retry: int | None = None


def encode_json(data: Any) -> bytes:
    """One line of JSON: dataclasses, datetimes (RFC 3339, `Z` for UTC), UUIDs, msgspec structs, sets.

    More slowly: pydantic models, numpy, paths, other collections, long integers. Raises `EncodeError`.
    """
    try:
        return orjson.dumps(data, msgspec.to_builtins, _JSON_OPTIONS)
    except TypeError:
        return _slow_json(data)


def _slow_json(data: Any) -> bytes:
    try:
        return msgspec.json.encode(data, enc_hook=_to_builtins)
    except Exception as error:
        raise EncodeError("data can't be encoded as JSON", field="data") from error


def _to_builtins(value: Any) -> Any:
    """By methods, because pydantic and numpy may not be installed."""
    if value is None or isinstance(value, bool):  # only as a key
        return {None: "null", True: "true", False: "false"}[value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if callable(dump := getattr(value, "model_dump", None)):
        return dump(mode="json", by_alias=True)
    if callable(as_list := getattr(value, "tolist", None)):
        return as_list()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence | Set):
        return list(value)
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} has no JSON form")


def encode(event: Event) -> bytes:
    """Hot path: one lookup and one join, 0.15 µs, besides `orjson.dumps`. Raises `EncodeError`."""
    data = event.data
    if type(data) is dict or not isinstance(data, _TEXT):
        try:
            body = orjson.dumps(data, msgspec.to_builtins, _JSON_OPTIONS)
        except TypeError:
            body = _slow_json(data)
    else:
        body = _utf8(data, "data") if isinstance(data, str) else _checked_utf8(bytes(data))
        if b"\n" in body or b"\r" in body:
            # Not U+2028 and others.
            body = _LINE_BREAK.sub(b"\ndata: ", body)
    try:
        frame = b"".join((_PREFIXES[event.event], body, b"\n\n"))
    except (KeyError, TypeError):
        frame = b"".join((_prefix(event.event), body, b"\n\n"))
    if event.retry is not None:
        frame = b"retry: %d\n%b" % (_checked_retry(event.retry), frame)
    if event.id is not None:  # the last line, see `log.framed`
        frame = b"%bid: %b\n\n" % (frame[:-1], _field(event.id, "id"))
    return frame


def cut(cursor: str) -> bytes:
    """The first bytes for a browser's `EventSource` that sent `cursor`.

    After a reset within an event WebKit joins the half event to the next connection; npm's `eventsource` 2 keeps its
    whole lines. Colon and line end complete a half line, or are a comment. The blank line dispatches the rest as `cut`,
    without listeners. The id replaces a half id. Without data the standard dispatches nothing.

    Boundary of trust: an invalid cursor becomes an empty id.
    """
    try:
        id = _field(cursor, "id") if cursor else b""
    except EncodeError:
        id = b""
    return b":\nid: %b\nevent: cut\n\n" % id


def _prefix(name: Any) -> bytes:
    prefix = b"event: %b\ndata: " % _field(name, "event")
    if len(name) <= CACHED_NAME_LENGTH and len(_PREFIXES) < CACHED_NAMES:
        _PREFIXES[name] = prefix
    return prefix


def _field(value: str, field: str) -> bytes:
    if not isinstance(value, str):
        raise EncodeError(f"{field} must be a string, not {type(value).__name__}", field=field)
    if not value:
        raise EncodeError(f"{field} must not be empty: leave it out instead", field=field)
    if "\n" in value or "\r" in value or "\0" in value:
        raise EncodeError(f"{field} must not contain CR, LF or NUL", field=field)
    return _utf8(value, field)


def _utf8(text: str, field: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EncodeError(f"{field} contains a lone surrogate at position {error.start}", field=field) from error


def _checked_utf8(data: bytes) -> bytes:
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise EncodeError(f"data is not UTF-8: invalid byte at position {error.start}", field="data") from error
    return data


def _checked_retry(retry: int) -> int:
    # `True` would be `retry: 1`: clients reconnect at once.
    if type(retry) is not int or not 0 <= retry <= MAX_RETRY_MS:
        raise EncodeError(f"retry must be a whole number of milliseconds from 0 to {MAX_RETRY_MS}", field="retry")
    return retry


class Decoder:
    """Decodes a stream, in chunks of any size.

    As in `MessageEvent.lastEventId`, an event without an `id:` has an earlier one's.

    Boundary of trust: takes any bytes. An event over `max_event_bytes` raises `TooLarge`, after the events before it
    were returned; then `reset` is needed.
    """

    def __init__(self, *, max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES) -> None:
        self.max_event_bytes = max_event_bytes
        #: Of the last complete block, or "".
        self.last_event_id = ""
        self.retry_ms: int | None = None
        self._id = ""
        self.reset()

    def reset(self) -> None:
        """For a new connection. The id stays, as in browsers; in the standard an event without one clears it."""
        self._id = self.last_event_id
        self._started = False
        self._skip_lf = False
        self._too_large = False
        self._asked_to_retry = False
        self._tail: list[bytes] = []
        self._tail_bytes = 0
        self._clear()

    def _clear(self) -> None:
        self._data: list[bytes] = []
        self._event = b""
        self._retry: int | None = None
        self._data_bytes = 0

    @property
    def unfinished(self) -> bool:
        return bool(self._tail or self._data)

    @property
    def farewell(self) -> bool:
        """`retry:` after the last event asks the client to reconnect."""
        return self._asked_to_retry and not self.unfinished

    def feed(self, chunk: bytes) -> list[Event]:
        if self._too_large:
            self._fail()
        if self._skip_lf and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skip_lf = False
        if not chunk:
            return []
        if b"\r" in chunk:
            # The LF of a CRLF may be in the next chunk.
            self._skip_lf = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in chunk:
            self._tail.append(chunk)
            self._tail_bytes += len(chunk)
            if self._exceeds_limit(self._tail_bytes):
                self._fail()
            return []
        if self._tail:
            chunk = b"".join((*self._tail, chunk))
            self._tail = []
        events: list[Event] = []
        first, end = chunk.find(b"\n\n") + 2, chunk.rfind(b"\n\n") + 2
        if 1 < first < end:  # the first may have begun earlier
            events = self._interpret(chunk[: first - 1].split(b"\n"))
            plain = [] if self._too_large else self._decode_blocks(chunk[first:end])
            events += plain
            chunk = b"" if self._too_large else chunk[end if plain else first :]
        lines = chunk.split(b"\n")
        last = lines.pop()
        events += self._interpret(lines)
        if last:
            self._tail.append(last)
        self._tail_bytes = len(last)
        if self._exceeds_limit(self._tail_bytes):
            self._too_large = True
        if self._too_large and not events:
            self._fail()
        return events

    def _decode_blocks(self, blocks: bytes) -> list[Event]:
        """Hot path: a fifth of `_interpret`'s time. Empty unless all match `_BLOCK`."""
        if self._exceeds_limit(len(blocks)) or b"\0" in blocks:
            return []
        # Each match: id, event, data, id, "".
        parts: list[Any] = _BLOCK.split(blocks.decode("utf-8", "replace"))
        ids, names, data, last_ids = parts[1::5], parts[2::5], parts[3::5], parts[4::5]
        if None in data or "" in ids or "" in names or "" in last_ids:
            return []
        if any(last_ids):  # this service sends ids last, most servers first
            if any(ids):
                return []
            ids = last_ids
        if None in ids:
            last = self._id or None
            ids = [last := id or last for id in ids]
        self.last_event_id = self._id = ids[-1] or ""
        self._asked_to_retry = False
        return list(map(Event, data, names, ids))

    def _exceeds_limit(self, line_bytes: int) -> bool:
        return self.max_event_bytes is not None and self._data_bytes + line_bytes > self.max_event_bytes

    def _fail(self) -> None:
        self._too_large = True
        raise TooLarge(f"an event is larger than {self.max_event_bytes} bytes")

    def _interpret(self, lines: list[bytes]) -> list[Event]:
        if lines and not self._started:
            # "One leading U+FEFF BYTE ORDER MARK character must be ignored if any are present."
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            self._started = True
        events: list[Event] = []
        limit = self.max_event_bytes
        for line in lines:
            if not line:
                self.last_event_id = self._id
                if self._data:
                    data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                    name = self._event.decode("utf-8", "replace") if self._event else None
                    events.append(Event(data.decode("utf-8", "replace"), name, self._id or None, self._retry))
                    self._asked_to_retry = False
                self._clear()
                continue
            if limit is not None and self._data_bytes + len(line) > limit:  # inlined: 7 % faster
                self._too_large = True
                break
            name_bytes, _, value = line.partition(b":")
            if value[:1] == b" ":
                value = value[1:]
            if name_bytes == b"data":
                self._data.append(value)
                self._data_bytes += len(line)
            elif name_bytes == b"event":
                self._event = value
            elif name_bytes == b"id":
                # "If the field value does not contain U+0000 NULL, then set the last event ID buffer"
                if b"\0" not in value:
                    self._id = value.decode("utf-8", "replace")
            elif name_bytes == b"retry" and value.isdigit():
                # "If the field value consists of only ASCII digits"; seventeen exceed the limit.
                self.retry_ms = self._retry = min(int(value.lstrip(b"0")[:17] or b"0"), MAX_RETRY_MS)
                self._asked_to_retry = True
        return events
