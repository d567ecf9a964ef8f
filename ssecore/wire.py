"""The text/event-stream format, both directions, no I/O.

Source: HTML Standard, 9.2.5 "Parsing an event stream" and 9.2.6 "Interpreting an event stream",
https://html.spec.whatwg.org/multipage/server-sent-events.html

`encode` is the only place where an event becomes bytes. What reaches it may come from outside, so nothing in an
`Event` can forge a field or a second event: it is either encoded so that `Decoder` gives the same event back, or
refused with an `EncodeError` before a byte of it is made.
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

#: A comment with nothing in it. No blank line behind it: after an `id:` a blank line makes common clients see an event
#: that nobody sent (httpx-sse, openai-python).
HEARTBEAT: Final = b":\n"

#: How much of one event a `Decoder` holds before it gives up. The standard has no limit, so a server that never sends
#: a line end could fill the memory. Chromium's own limit is its memory; h11 takes 16 KiB for a header block.
DEFAULT_MAX_EVENT_BYTES: Final = 16 * 1024 * 1024

#: Whole milliseconds; what JavaScript holds exactly.
MAX_RETRY_MS: Final = 2**53 - 1

#: Names may come from outside, each of them once: what is kept of them is bounded, 64 KiB and some.
CACHED_NAMES, CACHED_NAME_LENGTH = 1024, 64

_TEXT: Final = (str, bytes, bytearray, memoryview)
#: What `_prefix` gives, by name. A pure function's results: no state of an app, and right in any loop and thread.
_PREFIXES: Final[dict[str | None, bytes]] = {None: b"data: "}

_LINE_BREAK: Final = re.compile(rb"\r\n|\r|\n")
#: A block as most servers write it. What is none ends the search at once: at each later place it would be looked for
#: again, a line of `data: data: data: …` quadratically.
_BLOCK: Final = re.compile(r"(?:id: (.*+)\n)?(?:event: (.*+)\n)?data: (.*+)\n(?:id: (.*+)\n)?\n|(?s:.+)")
_JSON_OPTIONS: Final = orjson.OPT_UTC_Z


class Event(msgspec.Struct, frozen=True, gc=False):
    """One event, in the names of the standard.

    A struct of msgspec, because it is made once for each event sent: a dataclass takes three times as long. No work for
    the garbage collector: its data can't point back to it, but by intent.
    """

    #: `str` goes out as it is, `bytes` as UTF-8 that is serialised already, anything else as JSON.
    data: Any
    #: The event's type; without one a browser calls it `message`.
    event: str | None = None
    #: What a client sends back as `Last-Event-ID`. On a run or a topic ids are the engine's, and this is refused.
    id: str | None = None
    #: The client's reconnection time from now on, in milliseconds.
    retry: int | None = None


def encode_json(data: Any) -> bytes:
    """JSON in UTF-8, on one line. Dataclasses, datetimes (RFC 3339, `Z` for UTC), UUIDs, msgspec structs, sets.

    More slowly also: pydantic's models, numpy's scalars and arrays, paths, deques and other collections, numbers of any
    size, and keys that are no strings. Raises `EncodeError` for what has no JSON form.
    """
    try:
        return orjson.dumps(data, msgspec.to_builtins, _JSON_OPTIONS)
    except TypeError:  # orjson.JSONEncodeError is one
        return _slow_json(data)


def _slow_json(data: Any) -> bytes:
    """The second attempt, for what orjson doesn't know. Raises `EncodeError`, whose cause has the type, for the log."""
    try:
        return msgspec.json.encode(data, enc_hook=_plain)
    except Exception as error:  # a model's own, too
        raise EncodeError("data can't be encoded as JSON", field="data") from error


def _plain(value: Any) -> Any:
    """What msgspec has no form for, in simpler types. By their methods: none of these packages has to be there."""
    if value is None or isinstance(value, bool):  # as a key only
        return {None: "null", True: "true", False: "false"}[value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic's, by its aliases as FastAPI does it
        return dump(mode="json", by_alias=True)
    if callable(as_list := getattr(value, "tolist", None)):  # numpy's
        return as_list()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence | Set):
        return list(value)
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} has no JSON form")


def encode(event: Event) -> bytes:
    """The event as it goes over the wire, with the blank line that ends it.

    Hot path: a JSON event costs one look into a dictionary and one join besides `orjson.dumps`, 0.15 µs.
    Raises `EncodeError` (a `ValueError`), whose `field` names what is wrong.
    """
    data = event.data
    if type(data) is dict or not isinstance(data, _TEXT):
        try:
            body = orjson.dumps(data, msgspec.to_builtins, _JSON_OPTIONS)  # never holds a line break
        except TypeError:
            body = _slow_json(data)
    else:
        body = _utf8(data, "data") if isinstance(data, str) else _checked_utf8(bytes(data))
        if b"\n" in body or b"\r" in body:
            # The standard's line ends only: U+2028 and the like stay inside a line.
            body = _LINE_BREAK.sub(b"\ndata: ", body)
    try:
        frame = b"".join((_PREFIXES[event.event], body, b"\n\n"))
    except (KeyError, TypeError):
        frame = b"".join((_prefix(event.event), body, b"\n\n"))
    if event.retry is not None:
        frame = b"retry: %d\n%b" % (_checked_retry(event.retry), frame)
    if event.id is not None:  # the last line: see `log.framed`
        frame = b"%bid: %b\n\n" % (frame[:-1], _field(event.id, "id"))
    return frame


def cut(cursor: str) -> bytes:
    """What an answer to a browser's `EventSource` begins with; `cursor` is the one that it sent, "" for none.

    When a connection is reset in the middle of an event, WebKit keeps the half, and reads the beginning of the next
    connection as its other half (seen: `{"contretry: 600`); npm's `eventsource` 2 keeps the lines of it. The colon and
    the line end complete a half line; where the half ended with a line, they are a comment (a line end alone would
    dispatch it). The blank line dispatches the rest to `cut`, an event without listeners. The id puts the cursor back,
    in case the half was of an id: an empty one too, for WebKit would send the half id of a first event as its cursor.
    A parser that follows the standard dispatches nothing, since the block has no data.

    Boundary of trust: the cursor comes from outside. One that would be more than a line counts as none.
    """
    try:
        id = _field(cursor, "id")
    except EncodeError:
        id = b""
    return b":\nid: %b\nevent: cut\n\n" % id


def _prefix(name: Any) -> bytes:
    """All that stands before the data. Kept for the next event of the name, if there is room."""
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
        raise EncodeError(f"{field} must not hold CR, LF or NUL", field=field)
    return _utf8(value, field)


def _utf8(text: str, field: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EncodeError(f"{field} holds a lone surrogate at position {error.start}", field=field) from error


def _checked_utf8(data: bytes) -> bytes:
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise EncodeError(f"data is not UTF-8: invalid byte at position {error.start}", field="data") from error
    return data


def _checked_retry(retry: int) -> int:
    # `True` is an int to isinstance, and would become `retry: 1`: a client that hammers the server.
    if type(retry) is not int or not 0 <= retry <= MAX_RETRY_MS:
        raise EncodeError(f"retry must be a whole number of milliseconds from 0 to {MAX_RETRY_MS}", field="retry")
    return retry


class Decoder:
    """Bytes of a stream, cut anywhere, into events.

    `feed` gives the events that became complete. An event's `id` is the stream's last event id at that point, sticky
    as the standard has it (`MessageEvent.lastEventId`), `None` where it is empty; its `retry` is the one that stood in
    its own block. An event cut off by the end of the stream is not dispatched: throw the decoder away, or call `reset`
    and feed it the next connection.

    Boundary of trust: whatever is fed comes from outside. Any bytes are accepted; the only error is `TooLarge`, for
    an event of more than `max_event_bytes` (`None`: no limit), after the events before it; then only `reset` helps.
    """

    __slots__ = (
        "_bare_retry",
        "_data",
        "_data_bytes",
        "_event",
        "_id",
        "_retry",
        "_skip_lf",
        "_started",
        "_tail",
        "_tail_bytes",
        "_too_large",
        "last_event_id",
        "max_event_bytes",
        "retry_ms",
    )

    def __init__(self, *, max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES) -> None:
        self.max_event_bytes = max_event_bytes
        #: What to send as `Last-Event-ID`: that of the last complete block, with or without data. "" is none.
        self.last_event_id = ""
        #: The reconnection time in milliseconds that the stream asked for last. It holds from its line's end on.
        self.retry_ms: int | None = None
        self._id = ""
        self.reset()

    def reset(self) -> None:
        """Forget what is unfinished, for a new connection; `last_event_id` and `retry_ms` stay.

        A departure: to the letter the standard begins each connection with an empty id buffer, so that its first event
        without an id would clear the last one. Browsers keep it, and a client that resumes needs it.
        """
        self._id = self.last_event_id
        self._started = False
        self._skip_lf = False
        self._too_large = False
        self._bare_retry = False  # since the last event a block held a `retry:` and no data
        self._tail: list[bytes] = []  # pieces of the line that is not complete yet
        self._tail_bytes = 0
        self._clear()

    def _clear(self) -> None:
        self._data: list[bytes] = []
        self._event = b""
        self._retry: int | None = None
        self._data_bytes = 0

    @property
    def unfinished(self) -> bool:
        """Whether a line, or an event with data, has begun that isn't complete: at a stream's end it is lost."""
        return bool(self._tail or self._data)

    @property
    def farewell(self) -> bool:
        """Whether a `retry:` came after the last event: at the end of an answer it says "come back"."""
        return (self._bare_retry or self._retry is not None) and not self.unfinished

    def feed(self, chunk: bytes) -> list[Event]:
        if self._too_large:
            self._fail()
        if not chunk:
            return []
        if not self._started:
            chunk = b"".join((*self._tail, chunk))
            # "One leading U+FEFF BYTE ORDER MARK character must be ignored if any are present."
            if len(chunk) < 3 and b"\xef\xbb\xbf".startswith(chunk):
                self._tail = [chunk]
                return []
            self._started, self._tail = True, []
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        if self._skip_lf and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skip_lf = False
        if b"\r" in chunk:
            # A CR ends its line at once; the LF of a CRLF that was cut in two is swallowed when it comes.
            self._skip_lf = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in chunk:
            self._tail.append(chunk)
            self._tail_bytes += len(chunk)
            if self._over(self._tail_bytes):
                self._fail()
            return []
        if self._tail:
            chunk = b"".join((*self._tail, chunk))
            self._tail = []
        events: list[Event] = []
        first, end = chunk.find(b"\n\n") + 2, chunk.rfind(b"\n\n") + 2
        if 1 < first < end:  # what may have been begun by an earlier chunk; the whole blocks behind it; and the rest
            events = self._interpret(chunk[: first - 1].split(b"\n"))
            plain = [] if self._too_large else self._plain(chunk[first:end])
            events += plain
            chunk = b"" if self._too_large else chunk[end if plain else first :]
        lines = chunk.split(b"\n")
        last = lines.pop()
        events += self._interpret(lines)
        if last:
            self._tail.append(last)
        self._tail_bytes = len(last)
        if self._over(self._tail_bytes):
            self._too_large = True
        if self._too_large and not events:
            self._fail()
        return events

    def _plain(self, blocks: bytes) -> list[Event]:
        """Hot path: whole blocks, in a fifth of the time of `_interpret`. Nothing where one is out of the ordinary.

        The lists are cut out of one: between two blocks, id, event, data, id, and so on.
        """
        if self._over(len(blocks)) or b"\0" in blocks:
            return []
        parts: list[Any] = _BLOCK.split(blocks.decode("utf-8", "replace"))
        ids, names, data, last_ids = parts[1::5], parts[2::5], parts[3::5], parts[4::5]
        if None in data or "" in ids or "" in names or "" in last_ids:
            return []
        if any(last_ids):  # this service sends ids last, most servers first; both in one stream is not ordinary
            if any(ids):
                return []
            ids = last_ids
        if None in ids:
            last = self._id or None
            ids = [last := id or last for id in ids]
        self.last_event_id = self._id = ids[-1] or ""
        self._bare_retry = False
        return list(map(Event, data, names, ids))

    def _over(self, line_bytes: int) -> bool:
        return self.max_event_bytes is not None and self._data_bytes + line_bytes > self.max_event_bytes

    def _fail(self) -> None:
        self._too_large = True
        raise TooLarge(f"an event of more than {self.max_event_bytes} bytes")

    def _interpret(self, lines: list[bytes]) -> list[Event]:
        """Hot path: one pass, a handful of byte comparisons a line, one `Event` for each blank line with data."""
        events: list[Event] = []
        for line in lines:
            if not line:
                self.last_event_id = self._id
                if self._data:
                    data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                    name = self._event.decode("utf-8", "replace") if self._event else None
                    events.append(Event(data.decode("utf-8", "replace"), name, self._id or None, self._retry))
                    self._bare_retry = False
                elif self._retry is not None:
                    self._bare_retry = True
                self._clear()
                continue
            if self._over(len(line)):
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
                # "If the field value consists of only ASCII digits". Seventeen of them are over the limit already.
                self.retry_ms = self._retry = min(int(value.lstrip(b"0")[:17] or b"0"), MAX_RETRY_MS)
        return events
