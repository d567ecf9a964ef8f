"""The event log: streams of events that outlive the connections that read them.

A stream is an append-only sequence of events, numbered from 1 without holes. A *run* ends and is kept whole; a *topic*
is trimmed.

1.  A reader sees only what is in the log: append first, then deliver.
2.  An append is atomic: events of one epoch, maybe the close and new `meta`, even if its caller is cancelled.
3.  Each writer (a run's worker, a process on a topic) opens an epoch before it appends. That fences earlier ones, which
    may still be alive.
4.  A cursor `<epoch>.<seq>`: the reader has this writer's events up to seq. It is valid if seq is below the next
    epoch's first sequence; else the log lost its tail (a crash, a restored backup), and the sequence would skip events.
5.  Stored bodies have no `id:` line, since a topic's id is known only after the append: `framed` inserts it.
6.  Retention trims open topics: exactly by count, by whole rows for bytes (never the newest) and age. A run's limits
    its worker. `age_s` after its close a stream is deleted; an open topic without events `EMPTY_TOPIC_S` after its last
    use.
7.  Above `max_bytes`, upkeep deletes early what expires next (but not within `EMPTY_TOPIC_S`): closed streams, topics'
    oldest rows; above a tenth of it, an owner's oldest closed runs. Open runs stay. A tenth above either bound,
    `create` and `append` raise `LogUnavailable` (`create` for an owner `TooManyRequests`), unless the append closes.
8.  Call `watch` before `stat` or `read`. A row appended in between arrives twice: drop one by its sequence.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

import anyio
from anyio import CancelScope
from anyio.lowlevel import checkpoint

from ssecore.errors import SSEAppError
from ssecore.log.facts import (
    Cursor,
    Ended,
    Gap,
    Kind,
    Retention,
    Row,
    Stat,
    Watcher,
    framed,
    json_copy,
    locate,
    new_epoch,
    parse_cursor,
)
from ssecore.log.watchers import Watchers
from ssecore.log.writer import GAP_S, Batch, Commits, Posted, Writer

__all__ = [
    "Cursor",
    "Ended",
    "Gap",
    "Log",
    "Peers",
    "Retention",
    "Row",
    "Stat",
    "Writer",
    "framed",
    "locate",
    "new_epoch",
    "parse_cursor",
]

logger = logging.getLogger("sseapp")


class Peers(Protocol):
    """Between processes that share a log."""

    #: Called in the loop for each command to this process.
    on_command: Callable[[str, str], None] | None

    async def send_command(self, stream: str, command: str) -> None:
        """To the run's process. Raises `NotFound`."""

    async def touch(self, stream: str, for_s: float) -> None:
        """The run is read here, for so long."""

    async def touched(self, stream: str) -> bool:
        """Whether it is read elsewhere."""

    async def mark_answered(self, stream: str) -> None:
        """See `Log.delete`. Raises `NotFound`."""


class Log(ABC):
    """Its calls may raise `LogUnavailable`; then nothing has changed.

    Frames are those of `wire.encode`, without `id:`. `clock` returns Unix time. `max_bytes` of an engine: rule 7.
    """

    #: If several processes share it.
    peers: Peers | None = None
    unavailable = False
    #: See `Commits`.
    gap_s: float | None = GAP_S
    #: Calls don't wait any more.
    _closing = False

    def __init__(self, clock: Callable[[], float], upkeep_s: float) -> None:
        self._clock = clock
        self._upkeep_s = upkeep_s
        self._watchers = Watchers()
        self._commits = Commits(self._commit, self.gap_s)
        self._commits.on_commit = self._committed
        self._upkeep_wanted = anyio.Event()  # set it if upkeep is needed now (rule 7)
        #: Called with each commit's batches and seconds.
        self.on_commit: Callable[[list[Batch], float], None] | None = None

    def give_up(self) -> None:
        """Fail the waiting calls: the process ends."""
        self._commits.give_up()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the log, and close it after earlier calls.

        Raises `LogError` if the log can't be used.
        """
        failure = None
        async with anyio.create_task_group() as self._tasks:
            try:
                async with self._opened():
                    self._closing = False
                    self._upkeep_wanted = anyio.Event()
                    self._commits.open()
                    self._tasks.start_soon(self._keep_up)
                    try:
                        yield
                    finally:
                        self._closing = True
                        with CancelScope(shield=True):
                            await self._commits.close()
            except Exception as error:  # raised below: the task group would wrap it
                failure = error
            self._tasks.cancel_scope.cancel()
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
        """Create a stream. Returns its facts and True.

        If one has the `key` or the name: returns that, unchanged, and False. Raises `Conflict` if the epoch exists.
        """
        now, facts, keep = self._clock(), json_copy(meta) or {}, retention or Retention()
        stat = Stat(stream, kind, ((epoch, 1),), now, now, owner=owner, meta=facts, key=key, retention=keep)
        return await self._create(stat)

    @abstractmethod
    async def open(self, stream: str, epoch: str, *, retention: Retention | None = None) -> Stat:
        """Open a further epoch (rule 3). A new `retention` replaces the old one.

        Raises `NotFound`, `WriterFenced`, `Conflict` if the epoch exists.
        """

    async def append(
        self,
        stream: str,
        frames: Sequence[bytes],
        *,
        epoch: str,
        close: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> int:
        """Append, and return the stream's last sequence. `meta` replaces the old one.

        Without frames: close, set `meta`, or check the writer. Raises `WriterFenced`, `NotFound`, `TooLarge`.
        """
        return (await self._append(stream, frames, epoch, close, meta, None)).seq

    async def publish(
        self, topic: str, frames: Sequence[bytes], *, retention: Retention, meta: dict[str, Any] | None = None
    ) -> Cursor:
        """Append to a topic, and return the last event's id. Raises `TooLarge`, `WriterFenced`.

        Creates it, or opens an epoch, with this `retention`, if no process of this log has written to it yet.
        """
        return await self._append(topic, frames, "", False, meta, retention)

    async def _append(
        self,
        stream: str,
        frames: Sequence[bytes],
        epoch: str,
        close: bool,
        meta: dict[str, Any] | None,
        retention: Retention | None,
    ) -> Cursor:
        if self.gap_s is None:
            await checkpoint()
        size = sum(map(len, frames))
        batch = self._commits.add(stream, epoch, frames, size, close=close, meta=json_copy(meta), retention=retention)
        behind = len(batch.frames)
        if not batch.resolved and batch.signal is not None:
            await batch.signal.wait()
        if batch.error is not None:
            raise batch.error
        return Cursor(batch.epoch, batch.last - len(batch.frames) + behind)

    def writer(self, stream: str, epoch: str, on_stored: Posted) -> Writer:
        """For a run's only writer."""
        return Writer(self._commits, stream, epoch, on_stored)

    @abstractmethod
    async def read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        """The rows after `after`, without holes, until they pass `max_bytes`.

        The first may begin earlier: use `framed(row, after)`. If it begins later than `after + 1`, announce a gap.
        """

    async def stat(self, stream: str) -> Stat | None:
        return await self._find(name=stream)

    async def find(self, *, epoch: str | None = None, key: str | None = None) -> Stat | None:
        """By its epoch or key."""
        return await self._find(epoch=epoch, key=key)

    @abstractmethod
    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        """The owner's runs, newest first."""

    @abstractmethod
    async def unfinished(self) -> list[Stat]:
        """Open runs whose process has died, oldest first. If the log isn't shared, call it at the start."""

    @abstractmethod
    async def delete(self, stream: str, *, unless_answered: bool = False) -> bool:
        """Delete the stream, if it exists. `unless_answered`: if `Peers.mark_answered` was called, return False
        instead."""

    def watch(self, stream: str, watcher: Watcher) -> Callable[[], None]:
        """Call `watcher` with each new row, in order, and the end (rule 8), until the returned function is called.

        The stream need not exist yet. An earlier end isn't reported.
        """
        return self._watchers.add(stream, watcher)

    async def upkeep(self) -> None:
        """Apply retention now."""
        while await self._upkeep():
            pass

    async def _keep_up(self) -> None:
        while True:
            with anyio.move_on_after(self._upkeep_s):
                await self._upkeep_wanted.wait()
            self._upkeep_wanted = anyio.Event()
            with suppress(SSEAppError):
                await self.upkeep()

    def _committed(self, batches: list[Batch], seconds: float) -> None:
        if self.on_commit is not None:
            try:
                self.on_commit(batches, seconds)
            except Exception:
                logger.exception("what measures the event log failed")

    # Of each engine

    @abstractmethod
    def _opened(self) -> AbstractAsyncContextManager[None]:
        """Its tasks may run in `_tasks`."""

    @abstractmethod
    async def _create(self, stat: Stat) -> tuple[Stat, bool]: ...

    @abstractmethod
    def _commit(self, batches: list[Batch], done: Callable[[], None]) -> None:
        """Store batches of different streams: set `last` or `error`, notify watchers, call `done` in the loop."""

    @abstractmethod
    async def _find(self, *, name: str | None = None, epoch: str | None = None, key: str | None = None) -> Stat | None:
        """Takes one argument."""

    @abstractmethod
    async def _upkeep(self) -> bool:
        """One step. False if there was nothing to do."""
