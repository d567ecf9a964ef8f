"""Rows, facts, cursors, retention, and how facts change. The rules are those of `ssecore.log`."""

import re
import secrets
import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Final, Literal, NamedTuple

import msgspec
import orjson

from ssecore.errors import (
    BadRequest,
    Conflict,
    EncodeError,
    LogError,
    LogUnavailable,
    NotFound,
    SSEAppError,
    TooLarge,
    TooManyRequests,
    WriterFenced,
)
from ssecore.wire import Event, encode, encode_json

__all__ = [
    "EMPTY_TOPIC_S",
    "EVENT_BYTES",
    "FOREVER_S",
    "MAX_APPEND_BYTES",
    "MAX_EPOCHS",
    "MAX_ROW_BYTES",
    "OWNERS",
    "STREAM_BYTES",
    "Cursor",
    "Ended",
    "Gap",
    "Kind",
    "Retention",
    "Row",
    "Stat",
    "Watcher",
    "cost",
    "encoded",
    "framed",
    "joined",
    "json_copy",
    "locate",
    "new_epoch",
    "packed",
    "parse_cursor",
    "refusal",
    "unpacked",
]


#: It is in memory as a whole.
MAX_APPEND_BYTES: Final = 64 * 1024 * 1024
#: Appends are merged into rows up to this size.
MAX_ROW_BYTES: Final = 64 * 1024
#: Epochs kept beyond those of the events. A topic gets one at each start of the process.
MAX_EPOCHS: Final = 1000

#: For subscribers to resume an open topic without events.
EMPTY_TOPIC_S: Final = 900.0

#: Besides the bodies (rule 7). Measured: a run of ten words takes 6 KB in Redis (a stream's first node alone 4), and
#: 0.9 KB in SQLite.
STREAM_BYTES: Final = 6144
EVENT_BYTES: Final = 64
#: An owner's share is `max_bytes` divided by this.
OWNERS: Final = 10
#: Instead of no `age_s`, to order deletions (rule 7).
FOREVER_S: Final = 1e10

Kind = Literal["run", "topic"]
Ended = Literal["closed", "deleted"]


class Row(msgspec.Struct, frozen=True, gc=False):
    """Events of one epoch: an append, or several."""

    epoch: str
    first: int
    #: The frames.
    body: bytes
    ends: tuple[int, ...]

    @property
    def last(self) -> int:
        return self.first + len(self.ends) - 1


class Retention(msgspec.Struct, frozen=True):
    """Limits of a stream (rule 6). `None`: no limit."""

    events: int | None = None
    #: Of bodies, without the store's overhead.
    bytes: int | None = None
    age_s: float | None = None


class Stat(msgspec.Struct, frozen=True):
    """A stream's facts. Don't change `meta`: it is shared."""

    stream: str
    kind: Kind
    epochs: tuple[tuple[str, int], ...]
    #: Unix times. `updated`: by an append, open, new `meta`, close, or trim to zero events.
    created: float
    updated: float
    #: Oldest sequence kept, or `last + 1`.
    first: int = 1
    last: int = 0
    size: int = 0
    closed: bool = False
    owner: str | None = None
    meta: dict[str, Any] = {}
    key: str | None = None
    retention: Retention = Retention()


class Cursor(NamedTuple):
    """`str()` gives the `id` on the wire."""

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.seq}"


class Gap(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """The `data` of a `gap` event: where the reader's history and the log's differ.

    `from`, `to`: the first and last sequence. `trimmed`: it will never get these. `diverged`: it has them, and the log
    lost them. `None`: not known.
    """

    reason: Literal["trimmed", "diverged", "expired"]
    from_: int | None = None
    to: int | None = None


#: Called in the event loop with a row, the end, or both.
Watcher = Callable[[Row | None, Ended | None], None]


def framed(row: Row, after: int = 0, *, id_first: bool = False) -> bytes:
    """The row's events after `after`, each with its `id:` line.

    The id comes last: some clients (`@microsoft/fetch-event-source` 2.0.1, npm `eventsource` 2.0.2) take it as soon as
    its line is complete. `id_first`: some dialects' clients pair an id with the data after it.

    Hot path, once per row and process; one format for all, 0.15 µs an event.
    """
    if len(row.ends) == 1 and after < row.first and not id_first:  # tokens
        return b"%bid: %b.%d\n\n" % (row.body[:-1], row.epoch.encode(), row.first)
    skipped = min(max(after + 1 - row.first, 0), len(row.ends))
    ends = row.ends[skipped:]
    starts = (row.ends[skipped - 1] if skipped else 0, *ends)
    blank = 0 if id_first else 1  # the block's last line end, which goes behind the id
    arguments: list[bytes | int] = [0] * (2 * len(ends))
    arguments[id_first::2] = [row.body[a : z - blank] for a, z in zip(starts, ends, strict=False)]
    arguments[not id_first :: 2] = range(row.first + skipped, row.last + 1)
    frame = (b"id: %b.%%d\n%%b" if id_first else b"%%bid: %b.%%d\n\n") % row.epoch.encode()
    return frame * len(ends) % tuple(arguments)


def new_epoch() -> str:
    """128 random bits: they may be the only right to read a run."""
    return secrets.token_urlsafe(16)


_CURSOR: Final = re.compile(r"([A-Za-z0-9_-]{22})\.(0|[1-9][0-9]{0,15})")


def parse_cursor(text: str) -> Cursor:
    """`<22 characters of base64url>.<0 to 2^53-1>`, no leading zeros.

    Boundary of trust. Raises `BadRequest`.
    """
    match = _CURSOR.fullmatch(text)
    if match is None or (seq := int(match[2])) >= 2**53:
        raise BadRequest("last_event_id is not one of this server's event ids", field="last_event_id")
    return Cursor(match[1], seq)


def locate(stat: Stat, cursor: Cursor) -> tuple[int, Gap | None]:
    """The sequence to read after, and the gap to announce first (rule 4).

    After `expired`, the caller may continue with the oldest event kept.
    """
    epoch, seq = cursor
    kept = stat.first - 1
    index = next((index for index, (name, _) in enumerate(stat.epochs, 1) if name == epoch), None)
    if index is None:
        return kept, Gap("expired", seq + 1)
    parted = stat.epochs[index][1] - 1 if index < len(stat.epochs) else stat.last
    if seq > parted:
        return max(parted, kept), Gap("diverged", parted + 1, max(seq, kept))
    if seq < kept:
        return kept, Gap("trimmed", seq + 1, kept)
    return seq, None


def joined(frames: Sequence[bytes]) -> tuple[bytes, tuple[int, ...]]:
    """Raises `TooLarge`."""
    body = frames[0] if len(frames) == 1 else b"".join(frames)
    if len(body) > MAX_APPEND_BYTES:
        raise TooLarge(f"an append of {len(body)} bytes; the event log takes {MAX_APPEND_BYTES} at once")
    return body, tuple(accumulate(map(len, frames)))


def encoded(event: Event) -> bytes:
    """Raises `EncodeError`."""
    if event.id is not None:
        raise EncodeError("id must be left out here: the event log assigns ids", field="id")
    return encode(event)


def packed(ends: tuple[int, ...]) -> bytes:
    """`ends` as stored."""
    return struct.pack(f"<{len(ends)}I", *ends)


def unpacked(ends: bytes) -> tuple[int, ...]:
    """The inverse of `packed`."""
    return struct.unpack(f"<{len(ends) // 4}I", ends)


def json_copy(meta: dict[str, Any] | None) -> dict[str, Any] | None:
    """A copy by way of JSON. Raises `EncodeError`."""
    if meta is None:
        return None
    copy: dict[str, Any] = orjson.loads(encode_json(meta))
    return copy


def cost(stat: Stat) -> int:
    """Rule 7."""
    return STREAM_BYTES + stat.size + EVENT_BYTES * (stat.last - stat.first + 1)


#: Of all engines; the names are those of Redis' scripts.
_REFUSALS: Final[dict[str, tuple[type[SSEAppError], str]]] = {
    "none": (NotFound, "no such stream"),
    "closed": (WriterFenced, "the stream is closed"),
    "fenced": (WriterFenced, "another writer has taken over the stream"),
    "conflict": (Conflict, "this epoch has been opened before"),
    "lost": (LogError, "the event log lost some of this run's events"),
    "full": (LogUnavailable, "the event log is full; try again later"),
    "share": (
        TooManyRequests,
        "your runs fill your share of the event log; delete some, or wait until some have ended",
    ),
    "shut": (LogUnavailable, "the event log is closed"),
    "stopping": (LogUnavailable, "the service is about to stop"),
}


def refusal(name: str) -> SSEAppError:
    """What is raised for it."""
    kind, text = _REFUSALS[name]
    return kind(text)
