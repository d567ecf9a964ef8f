"""The rules of `ssecore.log` for engines of one process. A `Ledger` decides; its subclass stores.

A refused operation has changed nothing, so it fails no other of its commit.
"""

import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

from msgspec.structs import replace

from ssecore.errors import Conflict, NotFound, SSEAppError
from ssecore.log import Log, facts
from ssecore.log.facts import (
    OWNERS,
    Ended,
    Retention,
    Row,
    Stat,
    Watcher,
    appended,
    cost,
    deleted_at,
    due,
    has_expired,
    is_full,
    joined,
    log_full,
    opened,
    share_full,
)
from ssecore.log.watchers import Watchers
from ssecore.log.writer import Batch

__all__ = ["Entry", "Ledger", "LocalLog"]

logger: Final = logging.getLogger("sseapp")
T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Entry:
    """A stream's facts. `id`, `epoch` and `rows` are the engine's."""

    stat: Stat
    due: float | None
    charged: int = 0  #: bytes in the owner's account (rule 7)
    id: int = 0
    epoch: int = 0  #: the newest one's id
    saved: bool = True  #: False: the facts must be written
    rows: Any = None


class Ledger(ABC):
    """All streams, in one commit at `now` (Unix time)."""

    now: float
    max_bytes: int
    #: Rows, and streams, in one step of upkeep.
    step_rows: ClassVar[int] = 32
    step_streams: ClassVar[int] = 64

    def __init__(self, process: str) -> None:
        #: Prefix of this process's epochs on topics.
        self.process = process
        self.over_bound = False
        #: For the watchers, after the commit.
        self.notices: list[tuple[str, Row | None, Ended | None]] = []

    # Operations

    def create(self, stat: Stat) -> tuple[Stat, bool]:
        there = self.look_up((stat.key and self.by_key(stat.key)) or stat.stream)
        if there is not None:
            return there.stat, False
        self.check_room()
        if stat.owner is not None and is_full(self.account(stat.owner), self.max_bytes // OWNERS):
            raise share_full()
        self._check_new(stat.epochs[0][0])
        self.insert(stat, deleted_at(stat))
        return stat, True

    def open(self, stream: str, epoch: str, retention: Retention | None) -> Stat:
        entry = self._entry(stream)
        self._open(entry, opened(entry.stat, epoch, retention, self.now))
        self._trim(entry)
        return entry.stat

    def commit(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            try:
                self._append(batch)
            except SSEAppError as refusal:
                batch.error = refusal

    def delete(self, stream: str) -> None:
        if (entry := self.look_up(stream)) is not None:
            self.charge(entry, 0)
            self.remove(entry)
            self.notices.append((stream, None, "deleted"))

    def upkeep(self) -> bool:
        """One step. False if there was nothing to do."""
        overdue = self.due_until(self.now)
        for stream in overdue:
            entry = self._entry(stream)
            at = deleted_at(entry.stat)
            if at is not None and at <= self.now:
                self.delete(stream)
            else:
                self._trim(entry)
        swept = self.sweep()
        return bool(overdue) or swept or self._make_room() or self.give_back()

    # Their parts

    def _append(self, batch: Batch) -> None:
        entry = self.look_up(batch.stream)
        if entry is None:
            if batch.retention is None:
                raise NotFound("no such stream")
            self.check_room()
            epoch, now = self.process + facts.new_epoch()[len(self.process) :], self.now
            stat = Stat(batch.stream, "topic", ((epoch, 1),), now, now, retention=batch.retention)
            entry = self.insert(stat, deleted_at(stat))
        stat = entry.stat
        body, ends = joined(batch.frames)
        if ends and not batch.close:
            self.check_room()
        if batch.retention is not None:
            epoch = stat.epochs[-1][0]
            if not epoch.startswith(self.process):
                epoch = self.process + facts.new_epoch()[len(self.process) :]
                self._open(entry, opened(stat, epoch, batch.retention, self.now))
                stat = entry.stat
        else:
            epoch = batch.epoch
        entry.stat = after = appended(stat, epoch, len(ends), len(body), batch.close, batch.meta, self.now)
        batch.last, batch.epoch = after.last, epoch
        if ends:
            row = Row(epoch, stat.last + 1, body, ends)
            self.insert_row(entry, row)
            self.notices.append((batch.stream, row, "closed" if batch.close else None))
        elif batch.close:
            self.notices.append((batch.stream, None, "closed"))
        if batch.close or (after.kind == "topic" and after is not stat and self._may_trim(entry, stat)):
            self._trim(entry)
        elif after.kind == "topic" or batch.meta is not None:
            self.save(entry)
        elif ends:
            self.grew(entry)

    def _may_trim(self, entry: Entry, before: Stat) -> bool:
        """Whether an append may have expired a row, or added the first."""
        stat = entry.stat
        limit = stat.retention.bytes
        return (
            stat.first != before.first
            or before.first > before.last
            or (limit is not None and stat.size > limit)
            or entry.due is None
            or entry.due <= self.now
        )

    def _open(self, entry: Entry, stat: Stat) -> None:
        epoch, first = stat.epochs[-1]
        self._check_new(epoch)
        forgotten = [name for name, _ in entry.stat.epochs[: len(entry.stat.epochs) + 1 - len(stat.epochs)]]
        entry.stat = stat
        self.insert_epoch(entry, epoch, first, forgotten)
        self.save(entry)

    def _trim(self, entry: Entry, *, forced: bool = False) -> None:
        """One step of dropping the oldest rows that have expired, or any (`forced`)."""
        stat = entry.stat
        entry.due = deleted_at(stat)
        if stat.kind == "topic" and not stat.closed:
            count = gone = 0
            for last, at, size in self.oldest(entry):
                if not forced and not has_expired(stat, last, at, self.now):
                    entry.due = due(stat, at)
                    break
                stat = replace(stat, first=max(stat.first, last + 1), size=stat.size - size)
                gone, count = last, count + 1
            if gone:
                self.drop(entry, gone)
                if stat.first > stat.last:
                    stat = replace(stat, updated=self.now)
                    entry.due = deleted_at(stat)
                entry.stat = stat
            if count == self.step_rows:
                entry.due = 0.0
        self.save(entry)

    def _make_room(self) -> bool:
        """One step of rule 7. False if nothing can be done."""
        share = self.max_bytes // OWNERS
        for owner, used in self.accounts_over(share):
            if self._take(self.closed_runs(owner), used - share):
                return True
        excess = self.used() - self.max_bytes
        return excess > 0 and self._take(self.due_after(self.now + facts.EMPTY_TOPIC_S), excess)

    def _take(self, streams: Sequence[str], excess: int) -> bool:
        """Delete closed streams, or rows of topics, until `excess` bytes are free."""
        for stream in streams:
            entry = self._entry(stream)
            before = cost(entry.stat)
            if entry.stat.closed:
                self.delete(stream)
                excess -= before
            else:
                self._trim(entry, forced=True)
                excess -= before - cost(entry.stat)
            if excess <= 0:
                break
        return bool(streams)

    def check_room(self) -> None:
        """Raises `LogUnavailable` (rule 7)."""
        used = self.used()
        if used > self.max_bytes:
            self.over_bound = True
            if is_full(used, self.max_bytes):
                raise log_full()

    def _entry(self, stream: str) -> Entry:
        entry = self.look_up(stream)
        if entry is None:
            raise NotFound("no such stream")
        return entry

    def _check_new(self, epoch: str) -> None:
        if self.has_epoch(epoch):
            raise Conflict("this epoch has been opened before")

    # What an engine implements

    @abstractmethod
    def look_up(self, stream: str) -> Entry | None:
        """The stream, for this commit to change."""

    @abstractmethod
    def by_key(self, key: str) -> str | None: ...

    @abstractmethod
    def has_epoch(self, epoch: str) -> bool: ...

    @abstractmethod
    def insert(self, stat: Stat, due: float | None) -> Entry: ...

    @abstractmethod
    def insert_epoch(self, entry: Entry, epoch: str, first: int, forgotten: list[str]) -> None:
        """And delete the `forgotten` ones."""

    @abstractmethod
    def insert_row(self, entry: Entry, row: Row) -> None:
        """The facts have changed already."""

    @abstractmethod
    def save(self, entry: Entry) -> None:
        """The facts must be written with this commit."""

    def grew(self, entry: Entry) -> None:
        """As `save`, if a run's rows contain it."""
        self.save(entry)

    @abstractmethod
    def oldest(self, entry: Entry) -> Iterable[tuple[int, float, int]]:
        """At most `step_rows`: last sequence, time of the append, bytes."""

    @abstractmethod
    def drop(self, entry: Entry, last: int) -> None:
        """The rows up to this sequence."""

    @abstractmethod
    def remove(self, entry: Entry) -> None:
        """With its rows, key and epochs."""

    @abstractmethod
    def charge(self, entry: Entry, bytes: int) -> None:
        """Charge the owner so much for the stream."""

    @abstractmethod
    def used(self) -> int:
        """The bytes that count against `max_bytes`."""

    @abstractmethod
    def account(self, owner: str) -> int: ...

    @abstractmethod
    def accounts_over(self, bytes: int) -> Sequence[tuple[str, int]]:
        """And how much they use."""

    @abstractmethod
    def closed_runs(self, owner: str) -> Sequence[str]:
        """The oldest, one step."""

    @abstractmethod
    def due_until(self, at: float) -> Sequence[str]:
        """The earliest first, one step."""

    @abstractmethod
    def due_after(self, at: float) -> Sequence[str]:
        """The earliest first, one step."""

    def sweep(self) -> bool:
        """One step of deleting rows of deleted streams."""
        return False

    def give_back(self) -> bool:
        """One step of returning space to the system."""
        return False


class LocalLog(Log):
    """A log of one process, on its ledger."""

    def __init__(self, clock: Callable[[], float], upkeep_s: float) -> None:
        super().__init__(clock, upkeep_s)
        self._watchers = Watchers()
        self._process = secrets.token_urlsafe(8)

    @abstractmethod
    async def _apply(self, work: Callable[[Ledger], T], *, long: bool = False) -> T:
        """Run `work` on the ledger, in a commit. `long`: the loop must not wait for it."""

    async def _create(self, stat: Stat) -> tuple[Stat, bool]:
        return await self._apply(lambda ledger: ledger.create(stat))

    async def open(self, stream: str, epoch: str, *, retention: Retention | None = None) -> Stat:
        return await self._apply(lambda ledger: ledger.open(stream, epoch, retention))

    async def delete(self, stream: str, *, unless_answered: bool = False) -> bool:
        """`unless_answered` has no effect: no other process answers requests."""
        await self._apply(lambda ledger: ledger.delete(stream))
        return True

    async def _upkeep(self) -> bool:
        return await self._apply(lambda ledger: ledger.upkeep(), long=True)

    def watch(self, stream: str, watcher: Watcher) -> Callable[[], None]:
        return self._watchers.add(stream, watcher)
