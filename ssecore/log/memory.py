"""The event log in memory: nothing outlives the process. On asyncio and on trio.

It keeps the rules of `ssecore.log` without locks and threads: between two awaits nobody else works, and each call
changes everything in one such step. The step comes after the call's only await, a turn for the loop (so that a source
that never waits lets the others run); who is cancelled there has changed nothing.
"""

import logging
import sys
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from operator import attrgetter
from typing import Any, Final, NamedTuple

import anyio
from anyio.lowlevel import checkpoint
from msgspec.structs import replace

import ssecore.log
from ssecore.errors import Conflict, NotFound
from ssecore.log import (
    OWNERS,
    Alone,
    Kind,
    Retention,
    Row,
    Stat,
    Watcher,
    Watchers,
    appended,
    cost,
    deleted_at,
    due,
    full,
    joined,
    opened,
    outlived,
    over,
    plain,
    share_full,
)
from ssecore.workers import SEVERAL, only_worker

__all__ = ["MemoryLog"]

logger = logging.getLogger("sseapp")

#: Streams looked at by the upkeep between two turns of the loop: about a millisecond.
_UPKEEP_STEP: Final = 1000

_last: Final = attrgetter("row.last")


class _Kept(NamedTuple):
    """A row and when it was appended."""

    row: Row
    at: float


class _Stream:
    __slots__ = ("rows", "stat")

    def __init__(self, stat: Stat) -> None:
        self.stat = stat
        self.rows: deque[_Kept] = deque()


class MemoryLog(Alone):
    """`Log` in memory. `clock` gives Unix time; `upkeep_s` is the pause between two looks at what age has ended, and
    `max_bytes` a bound in all (rule 7 of `ssecore.log`)."""

    def __init__(
        self, *, clock: Callable[[], float] = time.time, upkeep_s: float = 5.0, max_bytes: int | None = None
    ) -> None:
        self._clock = clock
        self._upkeep_s = upkeep_s
        self._max_bytes = sys.maxsize if max_bytes is None else max_bytes
        self._used: Counter[str | None] = Counter()  # by owner; `None`: in all
        self._streams: dict[str, _Stream] = {}  # oldest first
        self._keys: dict[str, str] = {}
        self._epochs: dict[str, str] = {}
        self._watchers = Watchers()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        failure = None
        self._crowded = anyio.Event()
        async with AsyncExitStack() as stack:
            if not stack.enter_context(only_worker()):
                logger.warning(
                    "this server has several workers, each with a memory log of its own: a client that comes back may "
                    "reach one that doesn't know its run or topic; %s. (Streams without run= are not concerned.)",
                    SEVERAL,
                )
            group = await stack.enter_async_context(anyio.create_task_group())
            group.start_soon(self._keep_up)
            try:
                yield
            except Exception as error:  # raised below: the task group would wrap it
                failure = error
            group.cancel_scope.cancel()
        if failure:
            raise failure

    async def create(
        self,
        stream: str,
        *,
        epoch: str,
        kind: Kind = "run",
        owner: str | None = None,
        meta: dict[str, Any] | None = None,
        key: str | None = None,
        retention: Retention | None = None,
    ) -> tuple[Stat, bool]:
        await checkpoint()
        there = self._keys.get(key, stream) if key is not None else stream
        if there in self._streams:
            return self._streams[there].stat, False
        self._check_room()
        if owner is not None and over(self._used[owner], self._max_bytes // OWNERS):
            raise share_full()
        now, facts, keep = self._clock(), plain(meta) or {}, retention or Retention()
        stat = Stat(stream, kind, ((epoch, 1),), now, now, owner=owner, meta=facts, key=key, retention=keep)
        self._claim(epoch, stream)
        self._streams[stream] = _Stream(stat)
        self._charge(owner, cost(stat))
        if key is not None:
            self._keys[key] = stream
        return stat, True

    async def open(self, stream: str, epoch: str, *, retention: Retention | None = None) -> Stat:
        await checkpoint()
        entry = self._entry(stream)
        stat = opened(entry.stat, epoch, retention, self._clock())
        self._claim(epoch, stream)
        for forgotten, _ in entry.stat.epochs[: len(entry.stat.epochs) + 1 - len(stat.epochs)]:
            del self._epochs[forgotten]
        self._change(entry, stat)
        self._trim(entry)
        return entry.stat

    async def append(
        self,
        stream: str,
        frames: Sequence[bytes],
        *,
        epoch: str,
        close: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> int:
        await checkpoint()
        body, ends = joined(frames)
        entry, now = self._entry(stream), self._clock()
        if ends and not close:
            self._check_room()
        first = entry.stat.last + 1
        self._change(entry, appended(entry.stat, epoch, len(ends), len(body), close, plain(meta), now))
        row = Row(epoch, first, body, ends) if ends else None
        if row:
            entry.rows.append(_Kept(row, now))
            self._trim(entry)
        last = entry.stat.last
        if row or close:
            self._watchers.notify(stream, row, "closed" if close else None)
        return last

    async def read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        await checkpoint()
        found: list[Row] = []
        size = 0
        entry = self._streams.get(stream)
        if entry:
            start = bisect_right(entry.rows, max(after, entry.stat.first - 1), key=_last)
            for index in range(start, len(entry.rows)):
                row = entry.rows[index].row
                found.append(row)
                size += len(row.body)
                if size >= max_bytes:
                    break
        return found

    async def stat(self, stream: str) -> Stat | None:
        await checkpoint()
        return self._stat(stream)

    async def find(self, epoch: str) -> Stat | None:
        await checkpoint()
        return self._stat(self._epochs.get(epoch))

    async def find_key(self, key: str) -> Stat | None:
        await checkpoint()
        return self._stat(self._keys.get(key))

    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        await checkpoint()
        stats: list[Stat] = []
        for entry in reversed(self._streams.values()):
            if len(stats) >= limit:
                break
            if entry.stat.kind == "run" and entry.stat.owner == owner:
                stats.append(entry.stat)
        return stats

    async def unfinished(self) -> list[Stat]:
        await checkpoint()
        return [entry.stat for entry in self._streams.values() if entry.stat.kind == "run" and not entry.stat.closed]

    async def delete(self, stream: str, *, unless_told: bool = False) -> bool:
        await checkpoint()
        self._delete(stream)
        return True

    def watch(self, stream: str, watcher: Watcher) -> Callable[[], None]:
        return self._watchers.add(stream, watcher)

    async def upkeep(self) -> None:
        for index, (name, entry) in enumerate(list(self._streams.items())):
            if index % _UPKEEP_STEP == 0:
                await checkpoint()
            if self._streams.get(name) is not entry:
                continue
            self._trim(entry)
            at = deleted_at(entry.stat)
            if at is not None and at <= self._clock():
                self._delete(name)
        self._make_room()

    def _check_room(self) -> None:
        if self._used[None] > self._max_bytes:
            self._crowded.set()
            if over(self._used[None], self._max_bytes):
                raise full()

    def _make_room(self) -> None:
        """Rule 7."""
        share = self._max_bytes // OWNERS
        closed = [entry.stat for entry in self._streams.values() if entry.stat.closed]
        for stat in closed:
            if stat.owner is not None and self._used[stat.owner] > share:
                self._delete(stat.stream)
        if self._used[None] <= self._max_bytes:
            return
        spared = self._clock() + ssecore.log.EMPTY_TOPIC_S
        queue = [(due(stat, stat.updated), stat.stream) for stat in closed]
        queue += [
            (due(entry.stat, kept.at), name)
            for name, entry in self._streams.items()
            if entry.stat.kind == "topic" and not entry.stat.closed
            for kept in entry.rows
        ]
        for at, name in sorted(queue):
            if self._used[None] <= self._max_bytes:
                return
            if at > spared and (entry := self._streams.get(name)):
                if entry.stat.closed:
                    self._delete(name)
                else:
                    self._drop_row(entry)

    async def _keep_up(self) -> None:
        while True:
            with anyio.move_on_after(self._upkeep_s):
                await self._crowded.wait()
            self._crowded = anyio.Event()
            await self.upkeep()

    def _entry(self, stream: str) -> _Stream:
        try:
            return self._streams[stream]
        except KeyError:
            raise NotFound("no such stream") from None

    def _stat(self, stream: str | None) -> Stat | None:
        entry = self._streams.get(stream) if stream is not None else None
        return entry.stat if entry else None

    def _claim(self, epoch: str, stream: str) -> None:
        if epoch in self._epochs:
            raise Conflict("this epoch has been opened before")
        self._epochs[epoch] = stream

    def _trim(self, entry: _Stream) -> None:
        rows, now = entry.rows, self._clock()
        while rows and outlived(entry.stat, rows[0].row.last, rows[0].at, now):
            self._drop_row(entry)

    def _drop_row(self, entry: _Stream) -> None:
        """The oldest one."""
        gone, stat = entry.rows.popleft().row, entry.stat
        stat = replace(stat, first=max(stat.first, gone.last + 1), size=stat.size - len(gone.body))
        self._change(entry, stat if entry.rows else replace(stat, updated=self._clock()))

    def _change(self, entry: _Stream, stat: Stat) -> None:
        self._charge(stat.owner, cost(stat) - cost(entry.stat))
        entry.stat = stat

    def _charge(self, owner: str | None, bytes: int) -> None:
        for account in {None, owner}:
            self._used[account] += bytes
            if not self._used[account]:
                del self._used[account]

    def _delete(self, stream: str) -> None:
        entry = self._streams.pop(stream, None)
        if entry is None:
            return
        self._charge(entry.stat.owner, -cost(entry.stat))
        for epoch, _ in entry.stat.epochs:
            del self._epochs[epoch]
        if entry.stat.key is not None:
            del self._keys[entry.stat.key]
        self._watchers.notify(stream, None, "deleted")
