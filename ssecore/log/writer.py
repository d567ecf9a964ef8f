"""Group commit: appends during a commit form the next one, a batch for each stream.

1.  Concurrent appends of one stream and epoch are one batch, and one row (`MAX_ROW_BYTES`).
2.  A batch is committed with the loop's next turn, or after the commit in flight; if nothing awaits it, `GAP_S` after
    the last commit, or with a row's worth.
3.  If a post fails, all later posts of its writer fail, too: there is never a hole.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Any, Final

import anyio
from anyio.lowlevel import current_token

from ssecore.errors import LogUnavailable, SSEAppError, TooLarge
from ssecore.log import facts
from ssecore.log.facts import MAX_ROW_BYTES, Retention, refusal

__all__ = ["GAP_S", "Batch", "Commits", "Posted", "Writer"]

logger: Final = logging.getLogger("sseapp")

#: Between commits that nothing awaits. uvloop's timers are whole milliseconds.
GAP_S: Final = 0.002
_MAX_COMMIT_BYTES: Final = 4 * 1024 * 1024
_MAX_COMMIT_STREAMS: Final = 100
#: Above, appends are refused, but not posts: their writers are bounded.
_MAX_QUEUED_BYTES: Final = 64 * 1024 * 1024

#: Called in the event loop: a post's bytes are stored, or have failed.
Posted = Callable[[int, SSEAppError | None], None]


@dataclass(eq=False, slots=True)
class Batch:
    """A row. Only its last append may close the stream or set `meta`.

    With `retention` it is a topic's: the engine creates it and chooses the epoch. It sets `epoch` and `last`, or
    `error`.
    """

    stream: str
    epoch: str
    retention: Retention | None
    writer: "Writer | None"
    frames: list[bytes]
    since: float
    size: int = 0
    close: bool = False
    meta: dict[str, Any] | None = None
    last: int = 0
    error: SSEAppError | None = None
    signal: anyio.Event | None = None
    resolved: bool = False


class Writer:
    """Appends to one stream, in order, without waiting."""

    __slots__ = ("_commits", "_epoch", "_stream", "failed", "on_stored")

    def __init__(self, commits: "Commits", stream: str, epoch: str, on_stored: Posted) -> None:
        self._commits, self._stream, self._epoch, self.on_stored = commits, stream, epoch, on_stored
        self.failed: SSEAppError | None = None

    def post(self, frames: Sequence[bytes], size: int) -> None:
        """Append frames of `size` bytes; `on_stored` is called with the outcome, maybe at once.

        The caller bounds what isn't stored yet, and waits for it before an `append`. Raises an earlier post's failure.
        """
        if self.failed is not None:
            raise self.failed
        self._commits.add(self._stream, self._epoch, frames, size, writer=self)


class Commits:
    """A process's appends. `gap_s`: rule 2; `None`: each append is a commit, which takes no time."""

    def __init__(self, commit: Callable[[list[Batch], Callable[[], None]], None], gap_s: float | None) -> None:
        self._commit = commit
        self._gap_s = gap_s
        self._queue: dict[str, deque[Batch]] = {}
        self._queued_bytes = 0
        self._awaited = False
        self._in_flight: list[Batch] = []
        self._committed_at = -inf
        self._planned: Any = None  # the next commit: its handle, whether it is a timer
        self._call_soon: Any = None
        self._call_later: Any = None
        self._idle = anyio.Event()
        self._refused: str | None = "shut"
        #: See `Log.on_commit`.
        self.on_commit: Callable[[list[Batch], float], None] | None = None

    def open(self) -> None:
        """Call in the event loop."""
        loop: Any = current_token().native_token
        self._call_soon = getattr(loop, "call_soon", None) or loop.run_sync_soon
        self._call_later = getattr(loop, "call_later", None)  # trio has none outside of tasks: nothing waits
        self._refused = None

    async def close(self) -> None:
        """Refuse appends, and wait for earlier ones."""
        self._refused = "shut"
        while self._queue or self._in_flight:
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
        """The frames' batch, in which they are last. Hot path."""
        if self._refused is not None:
            raise refusal(self._refused)
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
            batch = Batch(stream, epoch, retention, writer, [], monotonic())
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
        if not self._in_flight:
            self._plan()
        return batch

    def give_up(self) -> None:
        """Fail all, and appends until the commit is over."""
        if self._in_flight and self._refused is None:
            self._refused = "stopping"
        batches = self._in_flight + [batch for waiting in self._queue.values() for batch in waiting]
        self._queue.clear()
        for batch in batches:
            batch.error = refusal("stopping")
            self._resolve(batch)

    def _plan(self) -> None:
        if self._gap_s is None:
            self._start_commit()
            return
        at_once = self._awaited or self._queued_bytes >= MAX_ROW_BYTES or self._call_later is None
        wait_s = 0.0 if at_once else self._committed_at + self._gap_s - monotonic()
        if self._planned is not None:
            if wait_s > 0 or not self._planned[1]:
                return
            self._planned[0].cancel()
        if wait_s > 0:
            self._planned = self._call_later(wait_s, self._start_commit), True
        else:
            self._planned = self._call_soon(self._start_commit), False

    def _start_commit(self) -> None:
        self._planned = None
        batches = self._in_flight = self._take()
        if batches:
            self._committed_at = monotonic()
            self._commit(batches, self._done)
        elif not self._queue:
            self._idle.set()

    def _take(self) -> list[Batch]:
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
                queue[stream] = waiting  # after the others
        if not queue:
            self._awaited = False
        return batches

    def _done(self) -> None:
        batches, self._in_flight = self._in_flight, []
        if self._refused == "stopping":
            self._refused = None
        if self.on_commit is not None:
            self.on_commit(batches, monotonic() - self._committed_at)
        for batch in batches:
            self._resolve(batch)
            if batch.error is not None and batch.writer is not None:
                self._fail_later(batch)
        if self._queue:
            self._plan()
        else:
            self._idle.set()

    def _fail_later(self, failed: Batch) -> None:
        """Rule 3."""
        waiting = self._queue.pop(failed.stream, deque())
        kept = deque(batch for batch in waiting if batch.writer is not failed.writer)
        if kept:
            self._queue[failed.stream] = kept
        for batch in waiting:
            if batch.writer is failed.writer:
                batch.error = failed.error
                self._resolve(batch)

    def _resolve(self, batch: Batch) -> None:
        if not batch.resolved:  # by `give_up`
            batch.resolved = True
            self._queued_bytes -= batch.size
            if batch.signal is not None:
                batch.signal.set()
            if batch.writer is not None:
                batch.writer.failed = batch.writer.failed or batch.error
                try:
                    batch.writer.on_stored(batch.size, batch.error)
                except Exception:
                    logger.exception("a writer of the event log failed over the answer")
