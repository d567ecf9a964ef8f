"""The event log: streams of events that outlive the connections that read them.

A stream is a named, append-only sequence of events, numbered from 1 without holes. It may be closed for good, and has
a retention. Two kinds: a *run* has a beginning and an end and is kept whole; a *topic* goes on and is trimmed.
`Log` is what everybody uses. The engines are its stores: `memory` and `sqlite` leave the decisions to `ledger`, `redis`
to its scripts. The rules are cited by number at the code; tests/test_log.py runs over all stores.

1.  A reader sees only what is in the log: append first, deliver then. What "in the log" withstands is the engine's.
2.  An append is all or nothing: several events, one epoch, and with it, if asked for, the close and new `meta`.
    Who is cancelled while it waits doesn't know whether its append went in; it did wholly or not at all.
3.  Each writer's life (a run's writer, a process) opens an epoch on the stream before it appends. From then on writers
    of earlier epochs are fenced, so a writer that was believed dead can't write into the work of its successor.
4.  A cursor is `<epoch>.<seq>`: "I have what this writer wrote, up to here". It is valid if seq is below the first
    sequence of the next epoch: then that history is a prefix of ours, and a read after it is complete. Otherwise the
    log lost its tail after the reader saw it (a crash, a copy put back), and the sequence alone would skip events.
5.  Stored bodies hold no `id:` line. With many publishers an id is known only after the append; `framed` puts it in.
6.  Retention trims topics while they are open. `first` is exact by count, so a row may be expired in part; by bytes
    and age whole rows go, and by bytes the newest row stays. A run is not trimmed: its `retention` is its owner's
    limit. `age_s` after its close a stream is deleted. An open topic whose events have all gone keeps its numbers; if
    it isn't written to (or opened) for `EMPTY_TOPIC_S` after the last one has gone, it is deleted, too.
7.  An engine may have a bound, `max_bytes` in all. Over it the upkeep takes sooner what retention would take next:
    closed streams as a whole, topics' oldest rows, by the time at which they are due (but for those that are due
    within `EMPTY_TOPIC_S`: they go by themselves). An owner's runs may have a tenth of it: over that, its oldest
    closed runs go. Open runs are never touched. A tenth beyond either bound nothing new is taken: `create` raises
    `LogUnavailable` (`TooManyRequests` for the owner), `append` of events `LogUnavailable` unless it closes the stream.
8.  Who watches first and then looks (`stat`, `read`) misses nothing. What it has twice then, it tells by the sequence.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

import anyio
from anyio import CancelScope
from anyio.lowlevel import checkpoint

from ssecore.errors import SSEAppError
from ssecore.log.facts import (
    EMPTY_TOPIC_S,
    MAX_APPEND_BYTES,
    MAX_EPOCHS,
    MAX_ROW_BYTES,
    Cursor,
    Ended,
    Gap,
    Kind,
    Retention,
    Row,
    Stat,
    Watcher,
    framed,
    joined,
    locate,
    new_epoch,
    parse_cursor,
    plain,
)
from ssecore.log.writer import Batch, Commits, Posted, Writer

__all__ = [
    "EMPTY_TOPIC_S",
    "MAX_APPEND_BYTES",
    "MAX_EPOCHS",
    "MAX_ROW_BYTES",
    "Cursor",
    "Ended",
    "Gap",
    "Kind",
    "Log",
    "Peers",
    "Retention",
    "Row",
    "Shared",
    "Stat",
    "Store",
    "Watcher",
    "Writer",
    "framed",
    "joined",
    "locate",
    "new_epoch",
    "parse_cursor",
]

logger = logging.getLogger("sseapp")
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Peers(Protocol):
    """What the processes that share a log have to do with each other."""

    #: Called in the event loop with the stream and the word of each `call` to this process.
    on_call: Callable[[str, str], None] | None

    async def call(self, stream: str, word: str) -> None:
        """Hand a word to the process that works on the run: it gets it sooner or later. Raises `NotFound`."""

    async def touch(self, stream: str, for_s: float) -> None:
        """Somebody here is interested in the run, and will be for so long. For the process that works on it."""

    async def touched(self, stream: str) -> bool:
        """Whether somebody elsewhere is interested in the run."""

    async def tell(self, stream: str) -> None:
        """Somebody here has been told that the run is there: see `Log.delete`. Raises `NotFound`."""


class Store(Protocol):
    """An engine. Where it can't be used, its calls raise `LogUnavailable`, and nothing has changed."""

    #: Whether it could not be reached when it was last asked for something.
    away: bool
    #: Over its bound: the upkeep is wanted at once.
    crowded: bool
    #: The log is about to be closed: what can't be stored now fails.
    closing: bool
    #: As `Commits` has it.
    gap_s: float | None
    #: Where several processes share it.
    peers: Peers | None

    def running(self) -> AbstractAsyncContextManager[None]:
        """Opens it, keeps it working and closes it. Raises `LogError` where it can't be used at all."""

    async def create(self, stat: Stat) -> tuple[Stat, bool]:
        """See `Log.create`."""

    async def open(self, stream: str, epoch: str, retention: Retention | None) -> Stat:
        """See `Log.open`."""

    def commit(self, batches: list[Batch], done: Callable[[], None]) -> None:
        """Store the batches, all of different streams. When each has its `last` or its `error`, and the watchers have
        been told, `done` is called in the event loop."""

    async def read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        """See `Log.read`."""

    async def find(self, *, name: str | None = None, epoch: str | None = None, key: str | None = None) -> Stat | None:
        """See `Log.find`. One of them is given."""

    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        """See `Log.runs`."""

    async def unfinished(self) -> list[Stat]:
        """See `Log.unfinished`."""

    async def delete(self, stream: str, unless_told: bool) -> bool:
        """See `Log.delete`."""

    def watch(self, stream: str, watcher: Watcher) -> Callable[[], None]:
        """See `Log.watch`."""

    async def upkeep(self) -> bool:
        """One step of what retention asks for. False where there was nothing to do."""

    def give_up(self) -> None:
        """Fail what waits."""


class Log:
    """The event log over a store. Any of its calls may raise `LogUnavailable`; then nothing has changed.

    Frames are what `wire.encode` gives: not empty, no `id:`, with the blank line at the end. `clock` gives Unix time;
    `upkeep_s` is the pause between two looks at what age has ended.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float], upkeep_s: float) -> None:
        self.store = store
        self._clock = clock
        self._upkeep_s = upkeep_s
        self._commits = Commits(store.commit, store.gap_s)
        self._commits.on_commit = self._committed
        self._look = anyio.Event()
        #: Called in the event loop with the batches of each commit, and the seconds that it took.
        self.on_commit: Callable[[list[Batch], float], None] | None = None

    @property
    def peers(self) -> Peers | None:
        """Where several processes write to the log. A topic has one epoch for all of them then."""
        return self.store.peers

    @property
    def shared(self) -> bool:
        """Whether several processes write to it."""
        return self.store.peers is not None

    @property
    def away(self) -> bool:
        """Whether it could not be reached when it was last asked for something."""
        return self.store.away

    def give_up(self) -> None:
        """Fail what waits for an engine that is away: its process is about to end."""
        self.store.give_up()
        self._commits.give_up()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Opens the engine, keeps it working and closes it. One task enters and leaves; nothing works outside of it.

        On leaving, what was asked for before is done first. Raises `LogError` where the log can't be used at all.
        """
        failure = None
        async with self.store.running():
            self.store.closing = False
            self._look = anyio.Event()
            self._commits.open()
            async with anyio.create_task_group() as group:
                group.start_soon(self._keep_up)
                try:
                    yield
                except Exception as error:  # raised below: the task group would wrap it
                    failure = error
                finally:
                    self.store.closing = True
                    with CancelScope(shield=True):
                        await self._commits.close()
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
        """A new stream with its first epoch at sequence 1, and True.

        Where a stream has the `key`, or else the name, already: that one, untouched, and False. Two at the same
        moment: one is created. To go on with a stream that is there, `open` it. Raises `Conflict` as `open` does.
        """
        now, facts, keep = self._clock(), plain(meta) or {}, retention or Retention()
        stat = Stat(stream, kind, ((epoch, 1),), now, now, owner=owner, meta=facts, key=key, retention=keep)
        try:
            return await self.store.create(stat)
        finally:
            if self.store.crowded:
                self._look.set()

    async def open(self, stream: str, epoch: str, *, retention: Retention | None = None) -> Stat:
        """Opens a further epoch, after the top: earlier writers are fenced (rule 3).

        A new `retention` takes the place of the old one.
        Raises `NotFound`, `WriterFenced` where it is closed, `Conflict` for an epoch that has been opened before.
        """
        return await self.store.open(stream, epoch, retention)

    async def append(
        self,
        stream: str,
        frames: Sequence[bytes],
        *,
        epoch: str,
        close: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> int:
        """Appends, and gives the last sequence of the stream (rule 2). `meta` takes the place of the old one.

        No frames: only closes or sets `meta`, or asks whether the writer still may.
        Raises `WriterFenced` (closed, or not the newest epoch), `NotFound`, `TooLarge`.
        """
        return (await self._append(stream, frames, epoch, close=close, meta=meta)).seq

    async def publish(
        self, topic: str, frames: Sequence[bytes], *, retention: Retention, meta: dict[str, Any] | None = None
    ) -> Cursor:
        """Appends to a topic as one of any number of writers, and gives the last event's id; all or none.

        The topic is created where there is none. The epoch is the engine's: it opens one where this process has not
        written to the topic yet (processes that share the log share it, too), and the topic takes this `retention`
        then. No frames: only that. Raises `TooLarge`, `WriterFenced` where it is closed, and `Unavailable` where others
        open or delete it all the time.
        """
        return await self._append(topic, frames, "", meta=meta, retention=retention)

    async def _append(
        self,
        stream: str,
        frames: Sequence[bytes],
        epoch: str,
        *,
        close: bool = False,
        meta: dict[str, Any] | None = None,
        retention: Retention | None = None,
    ) -> Cursor:
        if self.store.gap_s is None:
            await checkpoint()
        size = sum(map(len, frames))
        batch = self._commits.add(stream, epoch, frames, size, close=close, meta=plain(meta), retention=retention)
        behind = len(batch.frames)
        if not batch.settled and batch.signal is not None:
            await batch.signal.wait()
        if batch.error is not None:
            raise batch.error
        return Cursor(batch.epoch, batch.last - len(batch.frames) + behind)

    def writer(self, stream: str, epoch: str, told: Posted) -> Writer:
        """Appends without waiting, for a run's only writer: `told` is called when what it posts is stored, or not."""
        return Writer(self._commits, stream, epoch, told)

    async def read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        """The rows that hold the events after `after`, in order and without holes, at least one if there is one.

        About `max_bytes`: the row that passes it is the last. Empty: nothing there, or no such stream. The first row
        may begin before, hence `framed(row, after)`. One that begins beyond `after + 1` says that what lies between
        has been trimmed since `locate`: announce it.
        """
        return await self.store.read(stream, after, max_bytes)

    async def stat(self, stream: str) -> Stat | None:
        """The stream's facts."""
        return await self.store.find(name=stream)

    async def find(self, *, epoch: str | None = None, key: str | None = None) -> Stat | None:
        """The stream that this epoch belongs to, or that was created with this key."""
        return await self.store.find(epoch=epoch, key=key)

    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        """The owner's runs (`None`: those of nobody), newest first."""
        return await self.store.runs(owner, limit)

    async def unfinished(self) -> list[Stat]:
        """Runs that are not closed though nobody works on them any more, oldest first: what a crash left behind.

        Where the log is not shared, ask at the start: all that are open are left behind then.
        """
        return await self.store.unfinished()

    async def delete(self, stream: str, *, unless_told: bool = False) -> bool:
        """Deletes it, open or not; where there is none, nothing happens. Epochs of it are unknown from now on.

        With `unless_told` a stream that `Peers.tell` was called for stays, and the answer is False.
        """
        return await self.store.delete(stream, unless_told)

    def watch(self, stream: str, watcher: Watcher) -> Callable[[], None]:
        """`watcher` gets each row that is appended from now on, in order, and the end; gives the un-watch (rule 8).

        The stream need not exist yet. With the end the watch is over; nobody tells of an end that was before it.
        """
        return self.store.watch(stream, watcher)

    async def upkeep(self) -> None:
        """Does at once what retention asks for. `running` does the same from time to time."""
        while await self.store.upkeep():
            pass

    async def _keep_up(self) -> None:
        while True:
            with anyio.move_on_after(self._upkeep_s):
                await self._look.wait()
            self._look = anyio.Event()
            with suppress(SSEAppError):
                await self.upkeep()

    def _committed(self, batches: list[Batch], seconds: float) -> None:
        if self.store.crowded:
            self._look.set()
        if self.on_commit is not None:
            try:
                self.on_commit(batches, seconds)
            except Exception:  # nobody who appended waits for ever because of it
                logger.exception("what measures the event log failed")


class Shared(Generic[K, T]):
    """One call for all who ask for the same thing at the same moment: they share its result, and its failure.

    If the task that makes the call is cancelled, the next one makes it again.
    """

    def __init__(self) -> None:
        self._calls: dict[K, _SharedCall[T]] = {}

    async def do(self, key: K, call: Callable[[], Awaitable[T]]) -> T:
        while (other := self._calls.get(key)) is not None:
            await other.done.wait()
            if other.failure is not None:
                raise other.failure
            if other.finished:
                return other.result
        mine = self._calls[key] = _SharedCall[T]()
        try:
            mine.result = await call()
            mine.finished = True
            return mine.result
        except Exception as error:
            mine.failure = error
            raise
        finally:
            del self._calls[key]
            mine.done.set()


class _SharedCall(Generic[T]):
    result: T
    failure: Exception | None = None
    finished = False

    def __init__(self) -> None:
        self.done = anyio.Event()
