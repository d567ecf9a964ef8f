"""Group commit: what is appended while a commit is under way is the next one, a batch for each stream.

    append (awaited) ──┐
    Writer.post (told) ┴─► a batch a stream ──► the engine's commit, one under way ──► watchers ──► callers ──► …

1.  Appends that meet are one batch, and one row, if they are of one stream and epoch (`MAX_ROW_BYTES`).
2.  While no commit is under way, what is appended is handed over with the loop's next turn, so that what comes in this
    one goes with it. What was only posted waits until `GAP_S` after the last commit was handed over, or until there is
    a row's worth of it: so many slow writers make one commit in that time, and not one an event.
3.  When something that was posted fails, all that its writer posted behind it fails, too: there is never a hole.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import Any, Final

import anyio
from anyio.lowlevel import current_token

from ssecore.errors import LogUnavailable, SSEAppError, TooLarge
from ssecore.log import facts
from ssecore.log.facts import MAX_ROW_BYTES, Retention

__all__ = ["GAP_S", "Batch", "Commits", "Posted", "Writer"]

logger: Final = logging.getLogger("sseapp")

#: From one commit to the next where nobody awaits it. Whole milliseconds: uvloop's timers are no finer.
GAP_S: Final = 0.002
#: Bodies, and streams, in one commit: some milliseconds of an engine's work, which others may have to wait for.
_MAX_COMMIT_BYTES: Final = 4 * 1024 * 1024
_MAX_COMMIT_STREAMS: Final = 100
#: Bodies that wait for a commit. More is not appended, but refused at once. Posts are not: each of their writers has a
#: bound of its own.
_MAX_QUEUED_BYTES: Final = 64 * 1024 * 1024

_CLOSED: Final = "the event log is closed"
_STOPPING: Final = "the service is about to stop"

#: Called in the event loop when what was posted is stored: how many bytes, and what it failed with, if it did.
Posted = Callable[[int, SSEAppError | None], None]


class Batch:
    """What goes in as one row: of one stream and epoch. Only the last append of it closes the stream or sets `meta`.

    `retention`, of a topic: it is created where there is none, and the engine chooses the epoch. The engine fills in
    `epoch`, `last`, or `error`.
    """

    __slots__ = (
        "close",
        "epoch",
        "error",
        "frames",
        "last",
        "meta",
        "retention",
        "settled",
        "signal",
        "since",
        "size",
        "stream",
        "writer",
    )

    def __init__(self, stream: str, epoch: str, retention: Retention | None, writer: "Writer | None") -> None:
        self.stream = stream
        self.epoch = epoch
        self.retention = retention
        self.writer = writer
        self.frames: list[bytes] = []
        self.size = 0
        self.close = False
        self.meta: dict[str, Any] | None = None
        self.since = monotonic()
        self.last = 0
        self.error: SSEAppError | None = None
        self.signal: anyio.Event | None = None
        self.settled = False

    def settle(self) -> None:
        """Tell all who wait for it."""
        self.settled = True
        if self.signal is not None:
            self.signal.set()
        if self.writer is not None:
            self.writer.tell(self.size, self.error)


class Writer:
    """Appends to one stream, in order, and is told in the loop what came of it. Made by `Log.writer`."""

    __slots__ = ("_commits", "_epoch", "_stream", "_told", "failed")

    def __init__(self, commits: "Commits", stream: str, epoch: str, told: Posted) -> None:
        self._commits, self._stream, self._epoch, self._told = commits, stream, epoch, told
        self.failed: SSEAppError | None = None

    def post(self, frames: Sequence[bytes], size: int) -> None:
        """Hand over frames of `size` bytes. `told` is called once they are stored, or not; it may be at once.

        An `append` that is to follow is made when all that was posted is known to be stored.
        Raises what an earlier post failed with, `TooLarge`, `LogUnavailable`: then `told` is not called. How much is
        posted and not stored yet is the caller's to bound.
        """
        if self.failed is not None:
            raise self.failed
        self._commits.add(self._stream, self._epoch, frames, size, writer=self)

    def tell(self, size: int, error: SSEAppError | None) -> None:
        if error is not None and self.failed is None:
            self.failed = error
        try:
            self._told(size, error)
        except Exception:
            logger.exception("a writer of the event log failed over the answer")


class Commits:
    """The appends of a process, on their way into the engine. `commit` calls back when all of the batches are done.

    `gap_s` as rule 2 has it; `None`: a commit takes no time, and each append is one.
    """

    def __init__(self, commit: Callable[[list[Batch], Callable[[], None]], None], gap_s: float | None) -> None:
        self._commit = commit
        self._gap_s = gap_s
        self._queue: dict[str, deque[Batch]] = {}
        self._queued_bytes = 0
        self._awaited = False  # something of the queue is
        self._under_way: list[Batch] = []
        self._handed_at = -inf
        self._planned: Any = None  # the handle of what hands over next
        self._loop: Any = None
        self._idle = anyio.Event()
        self._refused: str | None = _CLOSED  # why nothing is taken
        #: Called with the batches of each commit, and how many seconds it took.
        self.on_commit: Callable[[list[Batch], float], None] | None = None

    def open(self) -> None:
        """In the event loop that is to be told."""
        token: Any = current_token().native_token
        self._loop = token if hasattr(token, "call_later") else _Trio(token)
        self._refused = None

    async def close(self) -> None:
        """Takes nothing more, and waits for what was taken before."""
        self._refused = _CLOSED
        while self._queue or self._under_way:
            self._idle = anyio.Event()
            await self._idle.wait()

    def add(
        self,
        stream: str,
        epoch: str,
        frames: Sequence[bytes],
        size: int,
        *,
        close: bool = False,
        meta: dict[str, Any] | None = None,
        retention: Retention | None = None,
        writer: Writer | None = None,
    ) -> Batch:
        """The batch that the frames are in now, as its last ones. Hot path, once for each append or post."""
        if self._refused is not None:
            raise LogUnavailable(self._refused)
        if size > facts.MAX_APPEND_BYTES:
            raise TooLarge(f"an append of {size} bytes; the event log takes {facts.MAX_APPEND_BYTES} at once")
        if writer is None and self._queued_bytes + size > _MAX_QUEUED_BYTES:
            raise LogUnavailable("the event log can't be used at the moment: too much waits for it")
        waiting = self._queue.get(stream)
        batch = waiting[-1] if waiting else None
        if (
            batch is None
            or batch.writer is not writer
            or batch.epoch != epoch
            or batch.size + size > MAX_ROW_BYTES
            or batch.close
            or batch.meta is not None
        ):
            batch = Batch(stream, epoch, retention, writer)
            if waiting:
                waiting.append(batch)
            else:
                self._queue[stream] = deque((batch,))
        batch.frames += frames
        batch.size += size
        batch.close = close
        batch.meta = meta
        self._queued_bytes += size
        if writer is None:
            if batch.signal is None:
                batch.signal = anyio.Event()
            self._awaited = True
        if not self._under_way:
            self._plan()
        return batch

    def give_up(self) -> None:
        """Fail what waits. As long as the commit of this moment isn't over, nothing more is taken."""
        if self._under_way and self._refused is None:
            self._refused = _STOPPING
        batches = self._under_way + [batch for waiting in self._queue.values() for batch in waiting]
        self._queue.clear()
        for batch in batches:
            batch.error = LogUnavailable(_STOPPING)
            self._settle(batch)

    def _plan(self) -> None:
        if self._gap_s is None:
            self._hand_over()
            return
        at_once = self._awaited or self._queued_bytes >= MAX_ROW_BYTES
        wait_s = 0.0 if at_once else self._handed_at + self._gap_s - monotonic()
        if self._planned is not None:
            if wait_s > 0 or not self._planned[1]:
                return
            self._planned[0].cancel()
        if wait_s > 0:
            self._planned = self._loop.call_later(wait_s, self._hand_over), True
        else:
            self._planned = self._loop.call_soon(self._hand_over), False

    def _hand_over(self) -> None:
        self._planned = None
        batches = self._under_way = self._take()
        if batches:
            self._handed_at = monotonic()
            self._commit(batches, self._done)
        elif not self._queue:
            self._idle.set()

    def _take(self) -> list[Batch]:
        """The oldest batch of each stream."""
        batches: list[Batch] = []
        size = 0
        queue = self._queue
        for stream in list(queue) if len(queue) > 1 else tuple(queue):
            if size >= _MAX_COMMIT_BYTES or len(batches) >= _MAX_COMMIT_STREAMS:
                break
            waiting = queue.pop(stream)
            batches.append(batch := waiting.popleft())
            size += batch.size
            if waiting:
                queue[stream] = waiting  # behind the others
        if not queue:
            self._awaited = False
        return batches

    def _done(self) -> None:
        batches, self._under_way = self._under_way, []
        if self._refused == _STOPPING:
            self._refused = None
        if self.on_commit is not None:
            self.on_commit(batches, monotonic() - self._handed_at)
        for batch in batches:
            self._settle(batch)
            if batch.error is not None and batch.writer is not None:
                self._fail_behind(batch)
        if self._queue:
            self._plan()
        else:
            self._idle.set()

    def _fail_behind(self, failed: Batch) -> None:
        """Rule 3."""
        waiting = self._queue.pop(failed.stream, deque())
        kept = deque(batch for batch in waiting if batch.writer is not failed.writer)
        if kept:
            self._queue[failed.stream] = kept
        for batch in waiting:
            if batch.writer is failed.writer:
                batch.error = failed.error
                self._settle(batch)

    def _settle(self, batch: Batch) -> None:
        if not batch.settled:  # else it was given up
            self._queued_bytes -= batch.size
            batch.settle()


class _Trio:
    """What `Commits` needs of a loop. Trio has no timers for those without a task: nothing waits there."""

    def __init__(self, token: Any) -> None:
        self._token = token

    def call_soon(self, call: Callable[[], None]) -> "_Trio":
        self._token.run_sync_soon(call)
        return self

    def call_later(self, wait_s: float, call: Callable[[], None]) -> "_Trio":
        return self.call_soon(call)

    def cancel(self) -> None:
        """What is due with the next turn comes."""
