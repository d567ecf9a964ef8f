"""The event log in memory, for one process; it ends with the process. On asyncio and on trio.

It needs no locks: each call changes everything in one step without an await. The one await, a checkpoint, comes before
it (so that a source which never waits lets others run); a call cancelled there has changed nothing.
"""

import sys
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from heapq import nsmallest
from itertools import islice
from typing import TypeVar

from anyio.lowlevel import checkpoint

from ssecore.errors import LogUnavailable
from ssecore.log.facts import Row, Stat, cost
from ssecore.log.ledger import Entry, Ledger, LocalLog, logger
from ssecore.log.writer import Batch
from ssecore.workers import SEVERAL, only_worker

__all__ = ["MemoryLog"]

T = TypeVar("T")


class MemoryLog(LocalLog):
    """`Log` in memory."""

    gap_s = None

    def __init__(
        self, *, clock: Callable[[], float] = time.time, upkeep_s: float = 5.0, max_bytes: int | None = None
    ) -> None:
        super().__init__(clock, upkeep_s)
        self._ledger = _Streams(self._process, sys.maxsize if max_bytes is None else max_bytes)

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        with only_worker() as alone:
            if not alone:
                logger.warning(
                    "this server has several workers, each with a memory log of its own: a client that reconnects may "
                    "reach a worker that doesn't have its run or topic; %s. (Streams without run= aren't affected.)",
                    SEVERAL,
                )
            yield

    async def _apply(self, work: Callable[[Ledger], T], *, long: bool = False) -> T:
        await checkpoint()
        self._ledger.now = self._clock()
        try:
            return work(self._ledger)
        finally:
            self._over(self._ledger)

    def _commit(self, batches: list[Batch], done: Callable[[], None]) -> None:
        self._ledger.now = self._clock()
        try:
            self._ledger.commit(batches)
        except Exception:
            logger.exception("the event log can't be written")
            for batch in batches:
                batch.error = LogUnavailable("the event log can't be written at the moment: internal error")
        self._over(self._ledger)
        done()

    async def read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        await checkpoint()
        found: list[Row] = []
        size = 0
        entry = self._ledger.streams.get(stream)
        if entry:
            start = bisect_right(entry.rows, max(after, entry.stat.first - 1), key=lambda kept: kept[0].last)
            for index in range(start, len(entry.rows)):
                row = entry.rows[index][0]
                found.append(row)
                size += len(row.body)
                if size >= max_bytes:
                    break
        return found

    async def _find(self, *, name: str | None = None, epoch: str | None = None, key: str | None = None) -> Stat | None:
        await checkpoint()
        entry = self._ledger.look_up(name or self._ledger.name_of(epoch=epoch, key=key) or "")
        return entry.stat if entry else None

    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        await checkpoint()
        stats = (entry.stat for entry in reversed(self._ledger.streams.values()))
        return list(islice((stat for stat in stats if stat.kind == "run" and stat.owner == owner), limit))

    async def unfinished(self) -> list[Stat]:
        await checkpoint()
        stats = (entry.stat for entry in self._ledger.streams.values())
        return [stat for stat in stats if stat.kind == "run" and not stat.closed]


class _Streams(Ledger):
    #: About a millisecond of work.
    step_streams = 1000

    def __init__(self, process: str, max_bytes: int) -> None:
        super().__init__(process)
        self.max_bytes = max_bytes
        self.streams: dict[str, Entry] = {}  # oldest first
        self.keys: dict[str, str] = {}
        self.epochs: dict[str, str] = {}
        self._accounts: Counter[str | None] = Counter()  # `None`: in all

    def look_up(self, stream: str) -> Entry | None:
        return self.streams.get(stream)

    def name_of(self, *, epoch: str | None = None, key: str | None = None) -> str | None:
        return self.keys.get(key or "") if epoch is None else self.epochs.get(epoch)

    def insert(self, stat: Stat, due: float | None) -> Entry:
        entry = self.streams[stat.stream] = Entry(stat, due)
        entry.rows = deque()  # of rows, each with the time of its append
        self.epochs[stat.epochs[0][0]] = stat.stream
        if stat.key is not None:
            self.keys[stat.key] = stat.stream
        self.save(entry)
        return entry

    def insert_epoch(self, entry: Entry, epoch: str, first: int, forgotten: list[str]) -> None:
        self.epochs[epoch] = entry.stat.stream
        for name in forgotten:
            del self.epochs[name]

    def insert_row(self, entry: Entry, row: Row) -> None:
        entry.rows.append((row, self.now))

    def save(self, entry: Entry) -> None:
        self._charge(entry, cost(entry.stat))

    def oldest(self, entry: Entry) -> Iterable[tuple[int, float, int]]:
        return [(row.last, at, len(row.body)) for row, at in islice(entry.rows, self.step_rows)]

    def drop(self, entry: Entry, last: int) -> None:
        while entry.rows and entry.rows[0][0].last <= last:
            entry.rows.popleft()

    def remove(self, entry: Entry) -> None:
        stat = entry.stat
        self._charge(entry, 0)
        del self.streams[stat.stream]
        for epoch, _ in stat.epochs:
            del self.epochs[epoch]
        if stat.key is not None:
            del self.keys[stat.key]

    def _charge(self, entry: Entry, bytes: int) -> None:
        more, entry.charged = bytes - entry.charged, bytes
        for account in {None, entry.stat.owner}:
            self._accounts[account] += more
            if not self._accounts[account]:
                del self._accounts[account]

    def used(self, owner: str | None = None) -> int:
        return self._accounts[owner]

    def over_share(self, share: int) -> Iterator[tuple[int, Sequence[str]]]:
        for owner, used in list(self._accounts.items()):
            if owner is not None and used > share:
                stats = (entry.stat for entry in self.streams.values() if entry.stat.owner == owner)
                closed = (stat.stream for stat in stats if stat.closed and stat.kind == "run")
                yield used - share, list(islice(closed, self.step_streams))

    def due_between(self, after: float, until: float) -> Sequence[str]:
        found = ((due, name) for name, entry in self.streams.items() if (due := entry.due) is not None)
        return [name for _, name in nsmallest(self.step_streams, (one for one in found if after < one[0] <= until))]
