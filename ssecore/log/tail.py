"""Readers of the log: each a cursor into a tail that all of a stream's readers share.

A `Tail` holds a stream's newest events, framed once for the whole process. A `Reader` is no queue: only the sequence
up to which it has read. What it wants next is in the tail, or, if it is behind that, in the log; if it is behind what
the log keeps, it is told by a `gap`. So a slow reader costs its cursor, whatever is published meanwhile.

1.  A tail watches before it asks for the top, so between the two nothing is missed.
2.  What the tail holds ends with the newest row that was announced. The top may be beyond it for a moment, when the
    log was asked after a commit and before its announcement; a reader then reads the log, and skips what comes twice.
3.  Readers that are behind at the same place (many clients that come back at once) share one reading of the log. A
    reading is kept only if others are behind at that moment, and until the last of them has caught up.
4.  A reader may be given a `Translate`. What it makes keeps the event's id, so that cursors mean the same everywhere.
5.  What changes is delivered in a round, on the loop's next turn: what is appended in this one travels together. Many
    readers are served in slices of `SLICE`, with a turn of the loop between them.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from typing import Final, NamedTuple

from anyio.abc import TaskGroup

from ssecore.dialects import END_ID, Dialect, error_frames, failure_of
from ssecore.errors import LogError, LogUnavailable, NotFound
from ssecore.http.request import EndReason
from ssecore.log import Cursor, Ended, Gap, Log, Row, Shared, Stat, framed, locate
from ssecore.streaming.sender import Sender, chunk, deliver
from ssecore.wire import Decoder, Event, encode

__all__ = ["Attached", "Place", "Reader", "Tail", "Tails", "Translate", "gap_frames"]

#: What a tail holds at most, and at least its newest row. A reader further behind reads the log: nobody is lost by it.
TAIL_BYTES: Final = 256 * 1024
#: What is read from the log at once for a reader that is behind.
READ_BYTES: Final = 256 * 1024
#: What is kept of such readings for others at the same place (rule 3), and at least the newest one.
KEPT_BYTES: Final = 1024 * 1024
#: Rule 5. About half a millisecond of writes. Events published between two slices travel together in the next round, so
#: a burst costs each reader fewer writes than it would with larger slices.
SLICE: Final = 64
#: No reader is there: sequences begin at 1, cursors at 0.
NOBODY: Final = -1


#: Says an event of the log in other words, or leaves it out (`None`). It is asked for an event as often as that is
#: read, anywhere in the stream, so what it gives depends on the event alone; an id in it is not looked at. A stream's
#: last event must become something: else no client's cursor gets to the end, and no browser is told to stop.
Translate = Callable[[Event], Event | None]


def gap_frames(gap: Gap, dialect: Dialect, *, last: bool = False) -> bytes:
    """The announcement of a gap. It is not in the log, so it has no `id:`.

    `last`: nothing comes behind it. A page can't tell 204 from 410, so it gets the gap; its end then gets a 204.
    """
    data = {"reason": gap.reason, "from": gap.from_, "to": gap.to}
    if not last:
        return encode(dialect.gap(data))
    return b"".join(map(encode, dialect.gone(data)))[:-1] + END_ID


class Tail:
    """The newest events of one stream. Made by `Tails`; lives as long as it has readers."""

    def __init__(self, log: Log, stream: str, gaps: "Counter[str]", *, id_first: bool = False) -> None:
        self.stream = stream
        self.id_first = id_first  #: where its frames have their ids: for all readers alike
        self.gaps = gaps
        self.top = 0
        self.ended: Ended | None = None
        #: What readers get after the top where it could not be stored: a terminal event without an id.
        self.last_words = b""
        #: With their senders, once these have begun.
        self.readers: dict[Reader, Sender | None] = {}
        #: Who entered and has not left; a reader is one of them from its making to its close.
        self.guests = 0
        #: Readers that read the log, because the tail doesn't hold what they need next.
        self.behind: set[Reader] = set()
        self._log = log
        self._rows: deque[tuple[Row, bytes]] = deque()  # each with its frames
        self._last = 0  # the last sequence in them
        self._size = 0
        self._since: tuple[int, int, bytes] = (-1, -1, b"")
        self._reads: dict[int, tuple[bytes, int, Gap | None]] = {}
        self._reading: Shared[int, tuple[bytes, int, Gap | None]] = Shared()
        self._is_planned = False  # a round is on its way
        self._seen: tuple[int, Ended | None] = (0, None)  # what was there when it began
        self._framed: tuple[bytes, bytes] = (b"", b"")  # the round's batch, and the same as a chunk
        self.close = log.watch(stream, self._changed)
        #: For `Reader.on_close`: one for all readers, not one each.
        self.leave: Callable[[], None] = lambda: None

    def settle(self, stat: Stat) -> None:
        """Take the facts that were asked for after the watch began (rule 1)."""
        self.top = max(self.top, stat.last)
        if stat.closed and self.ended is None:
            self.ended = "closed"

    def _changed(self, row: Row | None, ended: Ended | None) -> None:
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

    def fail(self, last_words: bytes) -> None:
        """End the readers with what could not be stored."""
        self.last_words, self.ended = last_words, "closed"
        self._wake()

    def _wake(self) -> None:
        if self._is_planned or not self.readers:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # trio
            for sender in self._senders():
                sender.poke()
        else:
            self._is_planned = True
            loop.call_soon(self._begin_round)

    def _senders(self) -> list[Sender]:
        return [sender for sender in self.readers.values() if sender is not None]

    def _begin_round(self) -> None:
        if len(self.readers) == 1:
            self._is_planned = False
            for sender in self._senders():
                sender.poke()
            return
        self._seen = (self.top, self.ended)
        self._deliver(self._senders())

    def _deliver(self, rest: list[Sender]) -> None:
        now, rest = rest[:SLICE], rest[SLICE:]
        after = next((sender.source.after for sender in now if sender.parked), NOBODY)
        held = self.since(after) if self.ended is None else None
        if held is None:
            deliver(now, b"", b"", NOBODY, NOBODY)
        else:
            if held[0] is not self._framed[0]:
                self._framed = held[0], chunk(held[0])
            deliver(now, *self._framed, after, held[1])
        if rest:
            asyncio.get_running_loop().call_soon(self._deliver, rest)
            return
        self._is_planned = False
        self._framed = (b"", b"")  # up to twice the tail's size, and what comes next is another one
        if self._seen != (self.top, self.ended):  # while the slices were on their way: who came first may not have it
            self._wake()

    def since(self, after: int) -> tuple[bytes, int] | None:
        """All events after `after` that the tail holds, and the last one's sequence; `None` if some are not here."""
        if not self._rows or not self._rows[0][0].first <= after + 1 <= self._last:
            return None
        last = self._last
        newest, frames = self._rows[-1]
        if newest.first == after + 1:
            return frames, last
        if self._since[:2] != (after, last):  # the same answer for all readers that are up to date
            parts: list[bytes] = []
            for row, frames in reversed(self._rows):  # a full tail has thousands; most readers lack the newest alone
                if row.last <= after:
                    break
                parts.append(frames if row.first > after else framed(row, after, id_first=self.id_first))
            parts.reverse()
            self._since = (after, last, parts[0] if len(parts) == 1 else b"".join(parts))
        return self._since[2], last

    async def read(self, after: int) -> tuple[bytes, int, Gap | None]:
        """The next events from the log: their frames, the last one's sequence, and the gap before them (rule 3)."""
        if (known := self._reads.get(after)) is not None:
            return known
        return await self._reading.do(after, partial(self._read, after))

    async def _read(self, after: int) -> tuple[bytes, int, Gap | None]:
        top = self.top
        rows = await self._log.read(self.stream, after, READ_BYTES)
        stat = None if rows else await self._log.stat(self.stream)
        # A run is kept whole: once it is closed, without rows it is being deleted, whatever its facts still say, or the
        # log lost them. And what stands under the name of a deleted stream now is another stream.
        gone = not rows and (stat is None or (stat.kind == "run" and stat.closed and stat.last <= top))
        if gone or self.ended == "deleted":
            return b"", self.top, Gap("expired", after + 1)
        if not rows:  # age has taken all of them; the stream goes on
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
        """The reader doesn't need the log any more, for now; the last one of them leaves no reading behind."""
        self.behind.discard(reader)
        if not self.behind:
            self._reads.clear()


class Reader:
    """The source that a stream in the log is: what comes after `after`, and then what is appended.

    `before` goes out first, `opening` if nothing else is there in the first second.
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
        "on_close",
        "opening",
        "tail",
    )

    events = True
    #: Whoever started what is read has waited its second.
    first_s = 0.0
    has_something = True
    #: A drain ends it in any case: whoever reads it goes on elsewhere.
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
        #: Why it broke off: the log couldn't be read, or `translate` failed.
        self.failure: Exception | None = None
        self.on_close: Callable[[], None] | None = None
        #: It gets the tail's frames as they are.
        self.is_shared = translate is None
        self._dialect = dialect
        self._translate = translate
        self._before = before
        self._stopped = False
        tail.readers[self] = None
        tail.guests += 1

    def begin(self, sender: Sender, tasks: TaskGroup | None) -> None:
        """From now on the tail's rounds serve `sender`."""
        self.tail.readers[self] = sender

    @property
    def events_sent(self) -> int:
        """How many events have been read."""
        return self.after - self._uncounted

    def ready(self) -> bytes | None:
        """What can be had without waiting; b"" is nothing yet, `None` that the log has to be read."""
        tail = self.tail
        before, self._before = self._before, b""
        if self.finished:
            return before
        if self._stopped:
            self.finished = True
            return before
        if self.after < tail.top:
            held = tail.since(self.after)
            if held is None:
                self._before = before
                return None
            batch, self.after = held
            if self._translate is not None:
                batch = self._say_otherwise(batch, self._translate)
            before = before + batch if before else batch
        if tail.behind:
            tail.caught_up(self)
        if tail.ended is not None and self.after >= tail.top:
            self.finished = True
            last_words = tail.last_words
            before += last_words if self._translate is None else self._say_otherwise(last_words, self._translate)
        return before

    async def from_log(self) -> bytes:
        """What `ready` doesn't have."""
        self.tail.behind.add(self)
        try:
            frames, last, gap = await self.tail.read(self.after)
        except (LogUnavailable, LogError) as error:
            self.failure, self.finished = error, True
            return b""
        before, self._before = self._before, b""
        if gap is not None:
            self.tail.gaps[gap.reason] += 1
            self._uncounted += (last if gap.to is None else gap.to) - self.after
            self.finished = gap.reason == "expired"
            # Where the stream is there still, nothing else than this id ends a client that comes back.
            for_good = self.finished and self.tail.ended == "closed"
            before += gap_frames(gap, self._dialect, last=for_good)
        self.after = last
        return before + (frames if self._translate is None else self._say_otherwise(frames, self._translate))

    def _say_otherwise(self, frames: bytes, translate: Translate) -> bytes:
        """Rule 4. A `translate` that fails ends its reader, after the events before."""
        parts: list[bytes] = []
        try:
            parts.extend(_translated(frames, translate, self.tail.id_first))
        except BaseException as error:  # nothing awaits here, so it is no cancellation
            self.failure, self.finished = failure_of(error, "a translation"), True
        return b"".join(parts)

    def stop(self) -> None:
        self._stopped = True

    async def closed(self) -> None:
        """Nothing of it is at work."""

    def farewell(self, reason: EndReason | None) -> bytes:
        """Nothing: what ends a stream in the log is in the log; whoever is cut off before goes on elsewhere.

        Unless a translation failed: then the client must not come back, and fail at the same event again and again.
        """
        if self.failure is None or isinstance(self.failure, LogUnavailable | LogError):
            return b""
        return b"".join(error_frames(self.failure, self._dialect))[:-1] + END_ID

    def close(self) -> None:
        """A second time it does nothing."""
        self.tail.readers.pop(self, None)
        self.tail.caught_up(self)
        if self.on_close is not None:
            self.on_close()
            self.on_close = None


def _translated(frames: bytes, translate: Translate, id_first: bool = False) -> Iterator[bytes]:
    for event in Decoder(max_event_bytes=None).feed(frames):
        said = translate(event)
        if said is not None and id_first and event.id is not None:
            yield b"id: %b\n%b" % (event.id.encode(), encode(Event(said.data, said.event, None, said.retry)))
        elif said is not None:
            yield encode(Event(said.data, said.event, event.id, said.retry))


class Place(Enum):
    """Where a reader without a cursor begins."""

    START = "start"
    TOP = "top"


class Attached(NamedTuple):
    """What a request is answered with: a reader of its own, to be closed, and the headers that go with it."""

    reader: Reader
    headers: Mapping[str, str]


class Tails:
    """The tails of an app, one for each stream that has readers here."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.gaps: Counter[str] = Counter()  #: announced here, by reason
        self._tails: dict[str, Tail] = {}

    def get(self, stream: str) -> Tail | None:
        return self._tails.get(stream)

    def streams(self) -> list[str]:
        """All that have readers here."""
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
        greet: Callable[[Cursor], bytes] | None = None,
        look: Callable[[str], Awaitable[Stat | None]] | None = None,
    ) -> tuple[Reader, Stat]:
        """A reader of the stream that begins there, after the gap that has to be announced first; and the facts.

        `Reader.close` is the only undo. `greet` makes what a reader at the top gets first, out of the top's id. `look`
        asks for the facts, if not the log: the tail watches before (rule 1).
        Raises `NotFound` where there is no such stream.
        """
        tail = self.enter(stream, id_first=dialect.id_first)
        try:
            stat = await (look or self.log.stat)(stream)
            if stat is None or tail.ended == "deleted":  # between two awaits
                raise NotFound("no such stream")
            tail.settle(stat)
            after, gap, before = 0, None, b""
            if place is Place.TOP:
                after = max(stat.last, tail.top)
                before = b"" if greet is None else greet(Cursor(stat.epochs[-1][0], after))
            elif isinstance(place, Cursor):
                after, gap = locate(stat, place)
            if gap is not None:
                self.gaps[gap.reason] += 1
                before = gap_frames(gap, dialect, last=stat.closed and after >= stat.last)
            reader = Reader(tail, after, dialect=dialect, before=before, translate=translate)
            reader.on_close = tail.leave
        finally:
            self.leave(tail)
        return reader, stat

    def enter(self, stream: str, *, id_first: bool = False) -> Tail:
        """The stream's tail, watching from now on. `settle` it with facts asked for after this; then make readers.

        `id_first`, as the stream's dialect has it, is the same for whoever enters it.
        """
        tail = self._tails.get(stream)
        if tail is None or tail.ended == "deleted" or tail.last_words:
            tail = self._tails[stream] = Tail(self.log, stream, self.gaps, id_first=id_first)
            tail.leave = partial(self.leave, tail)
        tail.guests += 1
        return tail

    def leave(self, tail: Tail) -> None:
        """Somebody who entered, or a reader, is done. The tail goes with the last of them.

        Not with the last reader: somebody may have entered and not have made its reader yet.
        """
        tail.guests -= 1
        if not tail.guests:
            tail.close()
            if self._tails.get(tail.stream) is tail:
                del self._tails[tail.stream]
