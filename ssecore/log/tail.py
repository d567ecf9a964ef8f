"""Readers of the log: cursors into a tail that all of a stream's readers share.

A `Tail` has a stream's newest events, framed once per process. A `Reader` has only its position, and takes what comes
next from the tail, or else the log, or else gets a `gap`. So a slow reader costs no memory.

1.  A tail watches before it reads the facts (rule 8 of `ssecore.log`).
2.  `top` may briefly be beyond the newest row; readers then read the log, and skip duplicates.
3.  Readers behind at the same place share one read of the log, which is kept until the last has caught up.
4.  A `Translate` keeps the event's id, so cursors mean the same everywhere.
5.  A round on the loop's next turn delivers all that was appended in this one, to slices of readers, with a turn of the
    loop in between.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from enum import Enum
from typing import Final, NamedTuple

import anyio
from anyio.abc import TaskGroup

from ssecore.dialects import END_ID, Dialect, error_frames, failure_of
from ssecore.errors import LogError, LogUnavailable, NotFound
from ssecore.http.request import EndReason
from ssecore.log import Cursor, Ended, Gap, Log, Row, Stat, framed, locate
from ssecore.streaming.pump import asyncio_loop
from ssecore.streaming.sender import Sender, chunk, deliver
from ssecore.wire import Decoder, Event, encode

__all__ = ["Attached", "Place", "Reader", "Tail", "Tails", "Translate", "gap_frames"]

#: Of a tail, besides its newest row.
TAIL_BYTES: Final = 256 * 1024
READ_BYTES: Final = 256 * 1024
#: Of the reads that are kept (rule 3).
KEPT_BYTES: Final = 1024 * 1024
#: Half a millisecond of work. Smaller slices merge more events of a burst.
SLICE: Final = 64
#: Frames, the last one's sequence, and the gap before them.
_Reading = tuple[bytes, int, Gap | None]
#: Not a position.
NO_READER: Final = -1


#: Translates an event, or drops it (`None`), by the event alone, maybe repeatedly. Its id is ignored. A stream's last
#: event must not be dropped, or no client's cursor reaches the end.
Translate = Callable[[Event], Event | None]


def gap_frames(gap: Gap, dialect: Dialect, *, last: bool = False) -> bytes:
    """A `gap` event, without an id since it isn't in the log.

    `last`: it ends the stream, since a page can't tell 204 from 410; a resume after its id gets 204.
    """
    data = {"reason": gap.reason, "from": gap.from_, "to": gap.to}
    if not last:
        return encode(dialect.gap(data))
    return b"".join(map(encode, dialect.gone(data)))[:-1] + END_ID


class Tail:
    """A stream's newest events."""

    def __init__(self, tails: "Tails", stream: str, id_first: bool) -> None:
        self.tails = tails
        self.stream = stream
        self.id_first = id_first  #: see `framed`
        self.top = 0
        self.ended: Ended | None = None
        #: The last event, if it could not be stored.
        self.unstored_end = b""
        self.readers: dict[Reader, Sender | None] = {}
        #: Open readers, and calls of `acquire` without `release`.
        self.references = 0
        self.behind: set[Reader] = set()
        self._rows: deque[tuple[Row, bytes]] = deque()
        self._last = 0
        self._size = 0
        self._since: tuple[int, int, bytes] = (-1, -1, b"")
        self._reads: dict[int, _Reading] = {}
        #: Reads in flight, each with its result or failure.
        self._reading: dict[int, tuple[anyio.Event, list[_Reading | Exception]]] = {}
        self._scheduled = False  # a round is
        self._seen: tuple[int, Ended | None] = (0, None)
        self._framed: tuple[bytes, bytes] = (b"", b"")  # the round's batch, and its HTTP chunk
        self.close = tails.log.watch(stream, self._on_append)

    def release(self) -> None:
        """Not the last reader drops the tail: another may be about to be made."""
        self.references -= 1
        if not self.references:
            self.close()
            self.tails.drop(self)

    def apply(self, stat: Stat) -> None:
        """Rule 1."""
        self.top = max(self.top, stat.last)
        if stat.closed and self.ended is None:
            self.ended = "closed"

    def _on_append(self, row: Row | None, ended: Ended | None) -> None:
        if row is not None:
            if row.first != self._last + 1:
                self._rows.clear()
                self._size = 0
            frames = framed(row, id_first=self.id_first)
            self._rows.append((row, frames))
            self._last = row.last
            self._size += len(frames)
            while self._size > TAIL_BYTES and len(self._rows) > 1:
                self._size -= len(self._rows.popleft()[1])
            if self._last > self.top:
                self.top = self._last
        if ended is not None:
            self.ended = ended
        self._wake()

    def fail(self, unstored_end: bytes) -> None:
        self.unstored_end, self.ended = unstored_end, "closed"
        self._wake()

    def _wake(self) -> None:
        if self._scheduled or not self.readers:
            return
        if (loop := asyncio_loop()) is not None:
            self._scheduled = True
            loop.call_soon(self._begin_round)
        else:
            for sender in self._senders():
                sender.poke()

    def _senders(self) -> list[Sender]:
        return [sender for sender in self.readers.values() if sender is not None]

    def _begin_round(self) -> None:
        if len(self.readers) == 1:
            self._scheduled = False
            return deliver(self._senders(), b"", b"", NO_READER, NO_READER)
        self._seen = (self.top, self.ended)
        self._deliver(self._senders())

    def _deliver(self, rest: list[Sender]) -> None:
        now, rest = rest[:SLICE], rest[SLICE:]
        after = next((sender.source.after for sender in now if sender.parked), NO_READER)
        held = self.since(after) if self.ended is None else None
        if held is None:
            deliver(now, b"", b"", NO_READER, NO_READER)
        else:
            if held[0] is not self._framed[0]:
                self._framed = held[0], chunk(held[0])
            deliver(now, *self._framed, after, held[1])
        if rest:
            asyncio.get_running_loop().call_soon(self._deliver, rest)
            return
        self._scheduled = False
        self._framed = (b"", b"")  # frees up to twice the tail's size
        if self._seen != (self.top, self.ended):  # changed between slices
            self._wake()

    def since(self, after: int) -> tuple[bytes, int] | None:
        """Events after `after`, and the last sequence; `None` if some are missing."""
        if not self._rows or not self._rows[0][0].first <= after + 1 <= self._last:
            return None
        last = self._last
        newest, frames = self._rows[-1]
        if newest.first == after + 1:
            return frames, last
        if self._since[:2] != (after, last):
            parts: list[bytes] = []
            for row, frames in reversed(self._rows):
                if row.last <= after:
                    break
                parts.append(frames if row.first > after else framed(row, after, id_first=self.id_first))
            parts.reverse()
            self._since = (after, last, parts[0] if len(parts) == 1 else b"".join(parts))
        return self._since[2], last

    async def read(self, after: int) -> _Reading:
        """The next events from the log (rule 3)."""
        if (known := self._reads.get(after)) is not None:
            return known
        while (reading := self._reading.get(after)) is not None:
            done, outcome = reading
            await done.wait()
            if outcome:  # else its task was cancelled
                if isinstance(outcome[0], Exception):
                    raise outcome[0]
                return outcome[0]
        done, outcome = self._reading[after] = anyio.Event(), []
        try:
            result = await self._read(after)
            outcome.append(result)
            return result
        except Exception as error:
            outcome.append(error)
            raise
        finally:
            del self._reading[after]
            done.set()

    async def _read(self, after: int) -> _Reading:
        top = self.top
        rows = await self.tails.log.read(self.stream, after, READ_BYTES)
        stat = None if rows else await self.tails.log.stat(self.stream)
        # A closed run without rows is being deleted.
        gone = not rows and (stat is None or (stat.kind == "run" and stat.closed and stat.last <= top))
        if gone or self.ended == "deleted":
            return b"", self.top, Gap("expired", after + 1)
        if not rows:  # all have expired
            return b"", top, Gap("trimmed", after + 1, top)
        gap = Gap("trimmed", after + 1, rows[0].first - 1) if rows[0].first > after + 1 else None
        frames = [framed(row, after, id_first=self.id_first) for row in rows]
        result = (b"".join(frames), rows[-1].last, gap)
        if len(self.behind) > 1:
            self._reads[after] = result
            while len(self._reads) > 1 and sum(len(frames) for frames, _, _ in self._reads.values()) > KEPT_BYTES:
                del self._reads[next(iter(self._reads))]
        return result

    def caught_up(self, reader: "Reader") -> None:
        """Rule 3."""
        self.behind.discard(reader)
        if not self.behind:
            self._reads.clear()


class Reader:
    """A source for `Sender`: a stream's events after `after`.

    `before` is sent first, `opening` after a second without events.
    """

    __slots__ = (
        "_before",
        "_dialect",
        "_stopped",
        "_translate",
        "_uncounted",
        "after",
        "failure",
        "finished",
        "is_shared",
        "opening",
        "tail",
    )

    events = True
    #: `Runs` has waited already.
    first_s = 0.0
    has_something = True
    #: A drain ends it: its client resumes elsewhere.
    ended = False

    def __init__(
        self,
        tail: Tail,
        after: int,
        *,
        dialect: Dialect,
        before: bytes = b"",
        opening: bytes = b"",
        translate: Translate | None = None,
    ) -> None:
        self.tail = tail
        self.after = after
        self._uncounted = after
        self.opening = opening
        self.finished = False
        #: The log's, or `translate`'s.
        self.failure: Exception | None = None
        self.is_shared = translate is None
        self._dialect = dialect
        self._translate = translate
        self._before = before
        self._stopped = False
        tail.readers[self] = None
        tail.references += 1

    def begin(self, sender: Sender, tasks: TaskGroup | None) -> None:
        self.tail.readers[self] = sender

    @property
    def events_sent(self) -> int:
        return self.after - self._uncounted

    def ready(self) -> bytes | None:
        """What needs no waiting; `None`: call `from_log`."""
        tail = self.tail
        before, self._before = self._before, b""
        if self.finished or self._stopped:
            self.finished = True
            return before
        if self.after < tail.top:
            held = tail.since(self.after)
            if held is None:
                self._before = before
                return None
            batch, self.after = held
            batch = self._translated(batch)
            before = before + batch if before else batch
        if tail.behind:
            tail.caught_up(self)
        if tail.ended is not None and self.after >= tail.top:
            self.finished = True
            before += self._translated(tail.unstored_end)
        return before

    async def from_log(self) -> bytes:
        self.tail.behind.add(self)
        try:
            frames, last, gap = await self.tail.read(self.after)
        except (LogUnavailable, LogError) as error:
            self.failure, self.finished = error, True
            return b""
        before, self._before = self._before, b""
        if gap is not None:
            self.tail.tails.gaps[gap.reason] += 1
            self._uncounted += (last if gap.to is None else gap.to) - self.after
            self.finished = gap.reason == "expired"
            # Only this id ends a client that reconnects.
            for_good = self.finished and self.tail.ended == "closed"
            before += gap_frames(gap, self._dialect, last=for_good)
        self.after = last
        return before + self._translated(frames)

    def _translated(self, frames: bytes) -> bytes:
        """Rule 4."""
        if self._translate is None:
            return frames
        parts: list[bytes] = []
        try:
            parts.extend(_translate_all(frames, self._translate, self.tail.id_first))
        except BaseException as error:  # no await here, so not a cancellation
            self.failure, self.finished = failure_of(error, "a translation"), True
        return b"".join(parts)

    def stop(self) -> None:
        self._stopped = True

    async def closed(self) -> None:
        """Has no task."""

    def farewell(self, reason: EndReason | None) -> bytes:
        """Empty, but if `translate` failed: the client must not resume and fail again."""
        if self.failure is None or isinstance(self.failure, LogUnavailable | LogError):
            return b""
        return b"".join(error_frames(self.failure, self._dialect))[:-1] + END_ID

    def close(self) -> None:
        """Idempotent."""
        if self in self.tail.readers:
            del self.tail.readers[self]
            self.tail.caught_up(self)
            self.tail.release()


def _translate_all(frames: bytes, translate: Translate, id_first: bool) -> Iterator[bytes]:
    for event in Decoder(max_event_bytes=None).feed(frames):
        made = translate(event)
        if made is not None and id_first and event.id is not None:
            yield b"id: %b\n%b" % (event.id.encode(), encode(Event(made.data, made.event, None, made.retry)))
        elif made is not None:
            yield encode(Event(made.data, made.event, event.id, made.retry))


class Place(Enum):
    """For readers without a cursor."""

    START = "start"
    TOP = "top"


class Attached(NamedTuple):
    """A reader, to be closed, and the answer's headers."""

    reader: Reader
    headers: Mapping[str, str]


class Tails:
    """Of the streams that have readers here."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.gaps: Counter[str] = Counter()  #: sent, by reason
        #: Called with a stream that has no readers here any more.
        self.on_unread: Callable[[str], None] | None = None
        self._tails: dict[str, Tail] = {}

    def get(self, stream: str) -> Tail | None:
        return self._tails.get(stream)

    def streams(self) -> list[str]:
        return list(self._tails)

    def subscribers(self, stream: str) -> int:
        tail = self._tails.get(stream)
        return len(tail.readers) if tail else 0

    async def attach(
        self,
        stream: str,
        place: Cursor | Place,
        *,
        dialect: Dialect,
        translate: Translate | None = None,
        make_first: Callable[[Cursor], bytes] | None = None,
        get_stat: Callable[[str], Awaitable[Stat | None]] | None = None,
    ) -> tuple[Reader, Stat]:
        """A reader from `place`, after any gap, and the facts. Only `Reader.close` undoes it.

        `make_first` makes the event of a reader at the top; `get_stat` replaces `Log.stat`. Raises `NotFound`.
        """
        tail = self.acquire(stream, id_first=dialect.id_first)
        try:
            stat = await (get_stat or self.log.stat)(stream)
            if stat is None or tail.ended == "deleted":  # meanwhile
                raise NotFound("no such stream")
            tail.apply(stat)
            after, gap, before = 0, None, b""
            if place is Place.TOP:
                after = max(stat.last, tail.top)
                before = b"" if make_first is None else make_first(Cursor(stat.epochs[-1][0], after))
            elif isinstance(place, Cursor):
                after, gap = locate(stat, place)
            if gap is not None:
                self.gaps[gap.reason] += 1
                before = gap_frames(gap, dialect, last=stat.closed and after >= stat.last)
            reader = Reader(tail, after, dialect=dialect, before=before, translate=translate)
        finally:
            tail.release()
        return reader, stat

    def acquire(self, stream: str, *, id_first: bool = False) -> Tail:
        """The stream's tail, which watches from now on. Then `apply` its facts."""
        tail = self._tails.get(stream)
        if tail is None or tail.ended == "deleted" or tail.unstored_end:
            tail = self._tails[stream] = Tail(self, stream, id_first)
        tail.references += 1
        return tail

    def drop(self, tail: Tail) -> None:
        if self._tails.get(tail.stream) is tail:
            del self._tails[tail.stream]
            if self.on_unread is not None:
                self.on_unread(tail.stream)
