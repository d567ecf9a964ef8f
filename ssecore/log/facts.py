"""What the log and its engines speak of: rows, facts, cursors, retention; and how facts change, as pure functions.

The rules stand on top of `ssecore.log`, and are cited here by number.
"""

import logging
import re
import secrets
import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, count
from typing import Any, Final, Literal, NamedTuple, TypeVar

import msgspec
import orjson
from msgspec.structs import replace

from ssecore.errors import BadRequest, LogUnavailable, TooLarge, TooManyRequests, WriterFenced
from ssecore.wire import encode_json

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
    "appended",
    "cost",
    "deleted_at",
    "due",
    "framed",
    "full",
    "joined",
    "legible",
    "locate",
    "new_epoch",
    "opened",
    "outlived",
    "over",
    "packed",
    "parse_cursor",
    "plain",
    "share_full",
    "unpacked",
]

logger = logging.getLogger("sseapp")
S = TypeVar("S")
T = TypeVar("T")

#: One append at most. It is held in memory as a whole, and SQLite stores no blob beyond 1 GB. An append over it is a
#: bug of a source that doesn't bound its buffer (64 KiB by default).
MAX_APPEND_BYTES: Final = 64 * 1024 * 1024
#: What merging appends makes of a row at most; one append of more is one row. A reader's step is as fine as that.
MAX_ROW_BYTES: Final = 64 * 1024
#: Epochs that a stream remembers beyond those of the events it keeps. A topic gets one more with each start of the
#: process; a cursor of a forgotten one is answered `expired`.
MAX_EPOCHS: Final = 1000

#: How long an open topic without events is kept: somebody who subscribed may have been disconnected, and resume. The
#: app writes to the topics that have readers more often than that.
EMPTY_TOPIC_S: Final = 900.0

#: What a stream, and an event, count besides the bodies: facts, names, indexes, rows (rule 7). Measured: a chat's run
#: of ten words is 6 KB in Redis (a stream's first node alone is 4) and 0.9 KB in SQLite's file. There the pages in use
#: count in all, and only an owner's share is counted by these.
STREAM_BYTES: Final = 6144
EVENT_BYTES: Final = 64
#: So many owners can fill the log.
OWNERS: Final = 10
#: A retention without an age, in seconds: what is kept for ever still has an order in which it goes (rule 7).
FOREVER_S: Final = 1e10

Kind = Literal["run", "topic"]
#: What ended a stream for its watchers.
Ended = Literal["closed", "deleted"]


# The memory engine keeps many, and nothing in them can point back: they are no work for the garbage collector.
class Row(msgspec.Struct, frozen=True, gc=False):
    """What went in as one: several events of one epoch. Engines may put appends that meet into one row."""

    epoch: str
    #: Sequence of the first event.
    first: int
    #: The frames one behind the other, each with the blank line that ends it.
    body: bytes
    #: Where each event ends in `body`.
    ends: tuple[int, ...]

    @property
    def last(self) -> int:
        return self.first + len(self.ends) - 1


class Retention(msgspec.Struct, frozen=True):
    """What a stream keeps (rule 6). `None`: no limit."""

    events: int | None = None
    #: Of bodies; an engine's own overhead comes on top.
    bytes: int | None = None
    #: Seconds.
    age_s: float | None = None


class Stat(msgspec.Struct, frozen=True):
    """The facts of a stream at one moment. Don't change its `meta`: it is shared."""

    stream: str
    kind: Kind
    #: (epoch, its first sequence), oldest first.
    epochs: tuple[tuple[str, int], ...]
    #: When it was created, and when something was last appended, opened, set or closed, or an open topic's last event
    #: was trimmed; Unix time.
    created: float
    updated: float
    #: Oldest sequence kept; `last + 1` when nothing is.
    first: int = 1
    #: The top; 0 when nothing was ever appended.
    last: int = 0
    #: Bytes of the bodies of the rows kept.
    size: int = 0
    closed: bool = False
    owner: str | None = None
    #: Small JSON of the stream's owner.
    meta: dict[str, Any] = {}
    key: str | None = None
    retention: Retention = Retention()


class Cursor(NamedTuple):
    """A place in a stream, as a client has it: `str()` of it is the `id` on the wire."""

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.seq}"


class Gap(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """What a reader has to be told before it goes on; the `data` of the event `gap`.

    `from` and `to` are the first and the last sequence at which its history and the log's differ as far as it is
    concerned: `trimmed`, events that it hasn't seen and won't; `diverged`, events that it has seen and the log hasn't
    (what it gets from `from` on are others by the same numbers). `None`: not known.
    """

    reason: Literal["trimmed", "diverged", "expired"]
    from_: int | None = None
    to: int | None = None


#: Called in the event loop: the row, and the end if the stream ended with it. One of the two is there.
Watcher = Callable[[Row | None, Ended | None], None]


def framed(row: Row, after: int = 0, *, id_first: bool = False) -> bytes:
    """The row's events after sequence `after`, each with its `id:` line, as they go over the wire.

    The id is the last line of its block: some clients (`@microsoft/fetch-event-source` 2.0.1, npm `eventsource` 2.0.2)
    take an id as soon as its line is complete. If the connection is cut between such an id and its data, they resume
    behind an event that they never got. `id_first` is for a dialect whose clients pair an id with the data behind it.

    Hot path, once for each row and process: one slice and one format an event, one join a row; 0.2 µs an event.
    """
    if len(row.ends) == 1 and after < row.first and not id_first:  # as tokens come
        return b"%bid: %b.%d\n\n" % (row.body[:-1], row.epoch.encode(), row.first)
    skipped = min(max(after + 1 - row.first, 0), len(row.ends))
    ends = row.ends[skipped:]
    starts = (row.ends[skipped - 1] if skipped else 0, *ends)
    body = row.body
    sequences, epoch = count(row.first + skipped), row.epoch.encode()
    if id_first:
        frame = b"id: %b.%%d\n%%b" % epoch
        return b"".join([frame % (seq, body[a:z]) for seq, a, z in zip(sequences, starts, ends, strict=False)])
    frame = b"%%bid: %b.%%d\n\n" % epoch
    return b"".join([frame % (body[a : z - 1], seq) for seq, a, z in zip(sequences, starts, ends, strict=False)])


def new_epoch() -> str:
    """128 random bits: whoever has no credentials reads a run by knowing its epoch."""
    return secrets.token_urlsafe(16)


_CURSOR: Final = re.compile(r"([A-Za-z0-9_-]{22})\.(0|[1-9][0-9]{0,15})")


def parse_cursor(text: str) -> Cursor:
    """`<22 characters of base64url>.<0 to 2^53-1>`, in one spelling only: no signs, no zeros in front.

    Boundary of trust: the text comes from outside. Raises `BadRequest`.
    """
    match = _CURSOR.fullmatch(text)
    if match is None or (seq := int(match[2])) >= 2**53:
        raise BadRequest("last_event_id is not one of this server's event ids", field="last_event_id")
    return Cursor(match[1], seq)


def locate(stat: Stat, cursor: Cursor) -> tuple[int, Gap | None]:
    """The sequence after which the holder of the cursor reads on, and the gap to be announced first (rule 4).

    `expired` gives the place before the oldest event kept; whether one goes on from there is the caller's to say.
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


# What the engines share: how facts change, as pure functions.


def joined(frames: Sequence[bytes]) -> tuple[bytes, tuple[int, ...]]:
    """The body and the ends of a row. Raises `TooLarge`."""
    body = frames[0] if len(frames) == 1 else b"".join(frames)
    if len(body) > MAX_APPEND_BYTES:
        raise TooLarge(f"an append of {len(body)} bytes; the event log takes {MAX_APPEND_BYTES} at once")
    return body, tuple(accumulate(map(len, frames)))


def packed(ends: tuple[int, ...]) -> bytes:
    """A row's `ends` as they are stored."""
    return struct.pack(f"<{len(ends)}I", *ends)


def unpacked(ends: bytes) -> tuple[int, ...]:
    """What `packed` gave."""
    return struct.unpack(f"<{len(ends) // 4}I", ends)


def legible(read: Callable[[S], T], stored: Iterable[S]) -> list[T]:
    """What `read` makes of each: one that another version, or a bad disk, has written is logged and left out."""
    found = []
    for one in stored:
        try:
            found.append(read(one))
        except Exception:
            logger.exception("the facts of a stream in the event log can't be read: %.100r", one)
    return found


def plain(meta: dict[str, Any] | None) -> dict[str, Any] | None:
    """A copy as JSON has it, so that no engine keeps more than another. Raises `EncodeError`."""
    if meta is None:
        return None
    copy: dict[str, Any] = orjson.loads(encode_json(meta))
    return copy


def opened(stat: Stat, epoch: str, retention: Retention | None, now: float) -> Stat:
    """With the epoch opened after the top. Raises `WriterFenced` where it is closed."""
    if stat.closed:
        raise WriterFenced("the stream is closed")
    epochs = (*stat.epochs, (epoch, stat.last + 1))
    while len(epochs) > MAX_EPOCHS and epochs[1][1] <= stat.first:  # nothing that is kept is of the oldest
        epochs = epochs[1:]
    stat = replace(stat, epochs=epochs, retention=retention or stat.retention, updated=now)
    return replace(stat, first=_first(stat, stat.last))


def appended(
    stat: Stat, epoch: str, events: int, size: int, close: bool, meta: dict[str, Any] | None, now: float
) -> Stat:
    """With so many events more. Raises `WriterFenced` (rule 3)."""
    if stat.closed:
        raise WriterFenced("the stream is closed")
    if stat.epochs[-1][0] != epoch:
        raise WriterFenced("another writer has taken over the stream")
    if not events and not close and meta is None:
        return stat
    last = stat.last + events
    return replace(
        stat,
        first=_first(stat, last),
        last=last,
        size=stat.size + size,
        closed=close,
        meta=stat.meta if meta is None else meta,
        updated=now,
    )


def _first(stat: Stat, last: int) -> int:
    """The oldest to be kept by count, with `last` at the top."""
    limit = stat.retention.events
    return stat.first if limit is None or stat.kind == "run" else max(stat.first, last - limit + 1)


def outlived(stat: Stat, last: int, at: float, now: float) -> bool:
    """Whether the oldest row kept, which ends at `last` and was appended `at`, has to go (rule 6).

    Asked again with the new `first` and `size` until the answer is no.
    """
    if stat.kind != "topic" or stat.closed:
        return False
    max_bytes, age_s = stat.retention.bytes, stat.retention.age_s
    return (
        last < stat.first
        or (max_bytes is not None and stat.size > max_bytes and last < stat.last)
        or (age_s is not None and at + age_s <= now)
    )


def deleted_at(stat: Stat) -> float | None:
    """When the upkeep deletes the whole stream, if it stays as it is (rule 6)."""
    if stat.closed:
        return due(stat, stat.updated)
    return stat.updated + EMPTY_TOPIC_S if stat.kind == "topic" and stat.first > stat.last else None


def due(stat: Stat, at: float) -> float:
    """When retention takes what was appended, or closed, `at`."""
    return at + (FOREVER_S if stat.retention.age_s is None else stat.retention.age_s)


def cost(stat: Stat) -> int:
    """The bytes that count for a stream (rule 7)."""
    return STREAM_BYTES + stat.size + EVENT_BYTES * (stat.last - stat.first + 1)


def over(bytes: int, bound: int) -> bool:
    """Whether nothing new is taken (rule 7)."""
    return bytes > bound + bound // 10


def full() -> LogUnavailable:
    """Rule 7, for all."""
    return LogUnavailable("the event log is full; try again later")


def share_full() -> TooManyRequests:
    """Rule 7, for an owner."""
    return TooManyRequests("your runs fill your share of the event log; delete some, or wait until some have ended")
