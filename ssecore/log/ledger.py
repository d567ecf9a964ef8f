"""The rules of `ssecore.log` for engines of one process. A `Ledger` decides; its subclass stores.

A refused operation has changed nothing, so it fails no other of its commit.
"""

import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Final, TypeVar

from msgspec.structs import replace

from ssecore.errors import SSEAppError
from ssecore.log import Log, facts
from ssecore.log.facts import FOREVER_S, OWNERS, Ended, Retention, Row, Stat, cost, joined, refusal
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
    epoch: int = 0
    saved: bool = True
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
        self.notices: list[tuple[str, Row | None, Ended | None]] = []

    # Operations

    def create(self, stat: Stat) -> tuple[Stat, bool]:
        there = self.look_up((stat.key and self.name_of(key=stat.key)) or stat.stream)
        if there is not None:
            return there.stat, False
        self.check_room()
        if stat.owner is not None and is_full(self.used(stat.owner), self.max_bytes // OWNERS):
            raise refusal("share")
        self._check_new(stat.epochs[0][0])
        self.insert(stat, deleted_at(stat))
        return stat, True

    def open(self, stream: str, epoch: str, retention: Retention | None) -> Stat:
        entry = self._entry(stream)
        self._open(entry, epoch, retention)
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
            self.remove(entry)
            self.notices.append((stream, None, "deleted"))

    def upkeep(self) -> bool:
        return self._visit(self.due_between(-inf, self.now)) or self._make_room()

    # Their parts

    def _append(self, batch: Batch) -> None:
        entry, retention = self.look_up(batch.stream), batch.retention
        if entry is None and retention is None:
            raise refusal("none")
        if entry is None or (batch.frames and not batch.close):
            self.check_room()
        if retention is not None:
            entry = self._topic(batch.stream, entry, retention)
            batch.epoch = entry.stat.epochs[-1][0]
        assert entry
        stat = entry.stat
        body, ends = joined(batch.frames)
        entry.stat = after = appended(stat, batch.epoch, len(ends), len(body), batch.close, batch.meta, self.now)
        batch.last = after.last
        row = Row(batch.epoch, stat.last + 1, body, ends) if ends else None
        if row is not None:
            self.insert_row(entry, row)
        if row is not None or batch.close:
            self.notices.append((batch.stream, row, "closed" if batch.close else None))
        if batch.close or (after.kind == "topic" and after is not stat and self._may_trim(entry, stat)):
            self._trim(entry)
        elif after.kind == "topic" or batch.meta is not None:
            self.save(entry)
        elif ends:
            self.grew(entry)

    def _topic(self, stream: str, entry: Entry | None, retention: Retention) -> Entry:
        if entry is not None and entry.stat.epochs[-1][0].startswith(self.process):
            return entry
        epoch = self.process + facts.new_epoch()[len(self.process) :]
        if entry is None:
            stat = Stat(stream, "topic", ((epoch, 1),), self.now, self.now, retention=retention)
            return self.insert(stat, deleted_at(stat))
        self._open(entry, epoch, retention)
        return entry

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

    def _open(self, entry: Entry, epoch: str, retention: Retention | None) -> None:
        """Raises `WriterFenced`, `Conflict`."""
        stat = entry.stat
        if stat.closed:
            raise refusal("closed")
        self._check_new(epoch)
        epochs, forgotten = [*stat.epochs, (epoch, stat.last + 1)], []
        while len(epochs) > facts.MAX_EPOCHS and epochs[1][1] <= stat.first:  # the oldest has no events
            forgotten.append(epochs.pop(0)[0])
        stat = replace(stat, epochs=tuple(epochs), retention=retention or stat.retention, updated=self.now)
        entry.stat = replace(stat, first=_first(stat, stat.last))
        self.insert_epoch(entry, *epochs[-1], forgotten)
        self.save(entry)

    def _trim(self, entry: Entry, *, forced: bool = False) -> None:
        """One step of dropping expired rows, or any (`forced`)."""
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
        if any(self._visit(runs, excess) for excess, runs in self.over_share(share)):
            return True
        excess = self.used() - self.max_bytes
        return excess > 0 and self._visit(self.due_between(self.now + facts.EMPTY_TOPIC_S, inf), excess)

    def _visit(self, streams: Sequence[str], excess: int | None = None) -> bool:
        """Delete or trim what has expired; with `excess`, closed streams and topics' rows until so much is free."""
        for stream in streams:
            entry = self._entry(stream)
            stat, at = entry.stat, deleted_at(entry.stat)
            if (at is not None and at <= self.now) or (stat.closed and excess is not None):
                self.delete(stream)
                freed = cost(stat)
            else:
                self._trim(entry, forced=excess is not None)
                freed = cost(stat) - cost(entry.stat)
            if excess is not None and (excess := excess - freed) <= 0:
                break
        return bool(streams)

    def check_room(self) -> None:
        used = self.used()
        if used > self.max_bytes:
            self.over_bound = True
            if is_full(used, self.max_bytes):
                raise refusal("full")

    def _entry(self, stream: str) -> Entry:
        entry = self.look_up(stream)
        if entry is None:
            raise refusal("none")
        return entry

    def _check_new(self, epoch: str) -> None:
        if self.name_of(epoch=epoch) is not None:
            raise refusal("conflict")

    # What an engine implements

    @abstractmethod
    def look_up(self, stream: str) -> Entry | None:
        """The stream, for this commit to change."""

    @abstractmethod
    def name_of(self, *, epoch: str | None = None, key: str | None = None) -> str | None:
        """The stream with this epoch or key."""

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
    def used(self, owner: str | None = None) -> int:
        """The bytes that count against `max_bytes`, or the owner's share."""

    @abstractmethod
    def over_share(self, share: int) -> Iterable[tuple[int, Sequence[str]]]:
        """Of each owner that uses more: by how much, and its oldest closed runs, one step."""

    @abstractmethod
    def due_between(self, after: float, until: float) -> Sequence[str]:
        """The earliest first, one step."""


def appended(
    stat: Stat, epoch: str, events: int, size: int, close: bool, meta: dict[str, Any] | None, now: float
) -> Stat:
    if stat.closed:
        raise refusal("closed")
    if stat.epochs[-1][0] != epoch:
        raise refusal("fenced")
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
    limit = stat.retention.events
    return stat.first if limit is None or stat.kind == "run" else max(stat.first, last - limit + 1)


def has_expired(stat: Stat, last: int, at: float, now: float) -> bool:
    """Whether an open topic's oldest row, up to `last` and appended `at`, has expired (rule 6)."""
    max_bytes, age_s = stat.retention.bytes, stat.retention.age_s
    return (
        last < stat.first
        or (max_bytes is not None and stat.size > max_bytes and last < stat.last)
        or (age_s is not None and at + age_s <= now)
    )


def deleted_at(stat: Stat) -> float | None:
    """When the stream is deleted as it is (rule 6)."""
    if stat.closed:
        return due(stat, stat.updated)
    return stat.updated + facts.EMPTY_TOPIC_S if stat.kind == "topic" and stat.first > stat.last else None


def due(stat: Stat, at: float) -> float:
    """When what was appended, or closed, `at` expires."""
    return at + (FOREVER_S if stat.retention.age_s is None else stat.retention.age_s)


def is_full(bytes: int, bound: int) -> bool:
    return bytes > bound + bound // 10


class LocalLog(Log):
    """A log of one process, on its ledger."""

    def __init__(self, clock: Callable[[], float], upkeep_s: float) -> None:
        super().__init__(clock, upkeep_s)
        self._process = secrets.token_urlsafe(8)

    def _over(self, ledger: Ledger) -> None:
        """Call after each commit, in the loop."""
        if ledger.over_bound:
            self._upkeep_wanted.set()
        notices, ledger.notices, ledger.over_bound = ledger.notices, [], False
        for notice in notices:
            self._watchers.notify(*notice)

    @abstractmethod
    async def _apply(self, work: Callable[[Ledger], T], *, long: bool = False) -> T:
        """In a commit. `long`: the loop must not wait for it."""

    async def _create(self, stat: Stat) -> tuple[Stat, bool]:
        return await self._apply(lambda ledger: ledger.create(stat))

    async def open(self, stream: str, epoch: str, *, retention: Retention | None = None) -> Stat:
        return await self._apply(lambda ledger: ledger.open(stream, epoch, retention))

    async def delete(self, stream: str, *, unless_answered: bool = False) -> bool:
        """No other process answers requests."""
        await self._apply(lambda ledger: ledger.delete(stream))
        return True

    async def _upkeep(self) -> bool:
        return await self._apply(lambda ledger: ledger.upkeep(), long=True)
