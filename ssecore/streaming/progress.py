"""Work in a thread or a task, and its progress; see docs/handlers.md.

1.  A thread can't be stopped from outside: its next report raises `WorkCancelled`.
2.  Leaving the block waits for the thread: only it can release its resources.
3.  The loop takes only locks that threads hold for a few instructions.
4.  Work in a task is cancelled once, and may await in its `finally`: see `pump`.
"""

import copy
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, Generic, Self, TypeVar, TypeVarTuple

import anyio
from anyio import CancelScope, CapacityLimiter
from anyio.lowlevel import RunVar, checkpoint, current_token

from ssecore.streaming.merge import Block
from ssecore.streaming.pump import CLOSE_S, GeneratorTask
from ssecore.wire import Event

__all__ = [
    "LogEntry",
    "LogLevel",
    "ProgressLogger",
    "ProgressState",
    "Report",
    "TaskReport",
    "WorkCancelled",
    "from_task",
    "from_thread",
]

logger = logging.getLogger("sseapp")

#: anyio's number, but apart: the log and the database must not wait for readers.
MAX_THREADS: Final = 40

_limiter: Final[RunVar[CapacityLimiter]] = RunVar("sseapp.progress")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class WorkCancelled(BaseException):
    """The reader has left (rule 1). Not an `Exception`, so that `except Exception` doesn't catch it."""


class _Items(Generic[T]):
    """Items from any thread to a reader in this loop."""

    def __init__(self, buffer: int) -> None:
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1, not {buffer}")
        self._buffer = buffer
        self._loop_thread = threading.get_ident()
        loop: Any = current_token().native_token
        self._call_soon = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon  # asyncio's or trio's
        self._items: deque[T] = deque()
        self._changed = threading.Condition()  # rule 3
        self._ended = False
        self._wanted: anyio.Event | None = None  # an item, or room for one: never both

    def _added(self) -> None:
        if threading.get_ident() == self._loop_thread:
            self._wake()
        elif self._wanted is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._call_soon(self._wake)

    def _wake(self) -> None:
        if self._wanted is not None:
            self._wanted.set()
            self._wanted = None

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._wake()

    async def _next(self) -> T:
        await checkpoint()
        while True:
            with self._changed:
                if self._items:
                    item = self._items.popleft()
                    self._changed.notify()
                    self._wake()
                    return item
                if self._ended:
                    raise anyio.EndOfStream
                self._wanted = self._wanted or anyio.Event()
            await self._wanted.wait()


class Report(_Items[T]):
    """Sends items from threads. One costs one lock, and a call into the loop if it waits."""

    def __call__(self, item: T) -> None:
        """Blocks while `buffer` items wait. Raises `WorkCancelled`."""
        if threading.get_ident() == self._loop_thread:
            raise RuntimeError("call report in a worker thread: here it would block the loop")
        with self._changed:
            while len(self._items) >= self._buffer and not self._ended:
                self._changed.wait()
            self.check()
            self._items.append(item)
        self._added()

    def check(self) -> None:
        """Raise `WorkCancelled` after the reader has left. Cheap."""
        if self._ended:
            raise WorkCancelled


class TaskReport(_Items[T]):
    """Sends items from a task:

        report(item)            # from any thread; dropped if `buffer` items wait
        await report(item)      # waits for room

    After the reader has left all are dropped.
    """

    dropped = 0

    def __call__(self, item: T) -> Awaitable[None]:
        if not (added := self._add(item)):
            self._count_dropped(1)
        return _Reported(self, item, added)

    def _count_dropped(self, number: int) -> None:
        with self._changed:
            self.dropped += number

    def _add(self, item: T) -> bool:
        """False if there is no room."""
        with self._changed:
            if not self._ended:
                if len(self._items) >= self._buffer:
                    return False
                self._items.append(item)
        self._added()
        return True

    async def _wait_for_room(self, item: T) -> None:
        if threading.get_ident() != self._loop_thread:
            raise RuntimeError("await report(…) only in the task of the work; in other threads call it without await")
        self._count_dropped(-1)
        while not self._add(item):
            self._wanted = self._wanted or anyio.Event()
            await self._wanted.wait()


class _Reported(Generic[T]):
    __slots__ = ("_added", "_item", "_report")

    def __init__(self, report: TaskReport[T], item: T, added: bool) -> None:
        self._report, self._item, self._added = report, item, added

    def __await__(self) -> Generator[Any, Any, None]:
        if self._report._ended:  # for cancellations of work that reports in a loop
            yield from checkpoint().__await__()
        elif not self._added:
            yield from self._report._wait_for_room(self._item).__await__()


class _Reading(Block[T]):
    """Work that reports, and its reader."""

    def __init__(self, report: _Items[T], run: Callable[[], Coroutine[Any, Any, object]], work: object) -> None:
        self._report = report
        self._work = _Work(report, run, getattr(work, "__qualname__", repr(work)))

    def _make_workers(self) -> list[GeneratorTask[Any]]:
        return [self._work]

    async def __aexit__(self, *error: object) -> None:
        await super().__aexit__(*error)
        if self._work.failure is not None:
            logger.warning("%s failed after its reader had left", self._work.what, exc_info=self._work.failure)

    async def __anext__(self) -> T:
        with suppress(anyio.EndOfStream):
            return await self._report._next()
        failure, self._work.failure = self._work.failure, None
        raise StopAsyncIteration if failure is None else failure


class from_thread(_Reading[T]):
    """Runs a blocking function in a worker thread; iterates over its reports.

        async with from_thread(work, folder) as items:      # work(report, folder)
            async for item in items:
                yield Event(item)

    `report(item)`, from any thread, blocks while `buffer` items wait. What `work` raises is raised here, after the
    items. Leaving the block raises `WorkCancelled` at the next `report` or `report.check()`, and waits for the thread
    (rule 2), with a warning after `CLOSE_S`. Work that still waits for `limiter` never runs.
    """

    _report: Report[T]

    def __init__(
        self,
        work: Callable[[Report[T], *Ts], object],
        *args: *Ts,
        buffer: int = 16,
        limiter: CapacityLimiter | None = None,
    ) -> None:
        report = Report[T](buffer)
        super().__init__(report, self._in_thread, work)
        self._call = lambda: work(report, *args)
        self._limiter = limiter
        self._scope = CancelScope(shield=True)
        self._ended = anyio.Event()

    async def _in_thread(self) -> None:
        try:
            with self._scope:
                await anyio.to_thread.run_sync(self._call, limiter=self._limiter or _loop_limiter())
        except WorkCancelled:
            if not self._report._ended:
                raise
        finally:
            self._ended.set()

    def _stop(self) -> None:
        self._report._end()
        self._scope.cancel()  # while it waits for a thread

    async def __aexit__(self, *error: object) -> None:
        self._stop()
        try:
            with CancelScope(shield=True), anyio.move_on_after(CLOSE_S):
                await self._ended.wait()
            if not self._ended.is_set():
                logger.warning("%s still runs in its thread %s s after it was cancelled", self._work.what, CLOSE_S)
        finally:
            await super().__aexit__(*error)  # rule 2


class from_task(_Reading[T]):
    """As `from_thread`, for a coroutine function in a task (rule 4)."""

    _report: TaskReport[T]

    def __init__(
        self, work: Callable[[TaskReport[T], *Ts], Coroutine[Any, Any, object]], *args: *Ts, buffer: int = 100
    ) -> None:
        report = TaskReport[T](buffer)
        super().__init__(report, lambda: work(report, *args), work)

    @property
    def dropped(self) -> int:
        return self._report.dropped

    def _stop(self) -> None:
        self._report._end()
        super()._stop()


async def _nothing() -> AsyncGenerator[Any, None]:
    return
    yield


class _Work(GeneratorTask[Any]):
    def __init__(self, report: _Items[Any], run: Callable[[], Coroutine[Any, Any, object]], what: str) -> None:
        super().__init__(_nothing())
        self.what = what
        self._run = run
        self._report = report

    async def iterate(self) -> None:
        run = self._run
        del self._run  # breaks a reference cycle
        try:
            await run()
        except StopAsyncIteration as error:
            raise RuntimeError(f"{self.what} was ended by {error!r}") from error

    def on_end(self) -> None:
        self._report._end()


def _loop_limiter() -> CapacityLimiter:
    limiter = _limiter.get(None)
    if limiter is None:
        limiter = CapacityLimiter(MAX_THREADS)
        _limiter.set(limiter)
    return limiter


class LogLevel(StrEnum):
    """Of a `log` event."""

    DEBUG = "debug"
    INFO = "info"
    SUCCESS = "success"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A `log` event's data."""

    timestamp: str  #: RFC 3339, UTC
    level: LogLevel
    message: str
    details: Any


@dataclass(frozen=True, slots=True)
class ProgressState:
    """A `progress` event's data."""

    current_step: int  #: from 1; 0 before the first
    total_steps: int
    step_name: str
    percent: int  #: 100 after `complete` only


class ProgressLogger:
    """Reports steps and log lines.

    Thread-safe: callbacks are called one at a time, in the calling thread, which gets their exceptions. They must not
    wait for threads that use the same logger. Steps may go back, but not after `complete`; `log` still works then.
    """

    def __init__(
        self,
        total_steps: int,
        on_log: Callable[[LogEntry], object] | None = None,
        on_progress: Callable[[ProgressState], object] | None = None,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, not {total_steps}")
        self.state = ProgressState(0, total_steps, "", 0)
        self._on_log = on_log
        self._on_progress = on_progress
        self._lock = threading.RLock()  # a callback may log

    @classmethod
    def reporting(cls, report: Callable[[Event], object], total_steps: int) -> Self:
        return cls(
            total_steps,
            on_log=lambda entry: report(Event(asdict(entry), "log")),
            on_progress=lambda state: report(Event(asdict(state), "progress")),
        )

    def set_step(self, n: int, name: str) -> None:
        """Begin step `n`, from 1. Raises `ValueError`, or `RuntimeError` after `complete`."""
        with self._lock:
            total = self.state.total_steps
            if self.state.percent == 100:
                raise RuntimeError("no step can begin after complete()")
            if not 1 <= n <= total:
                raise ValueError(f"there is no step {n}: steps go from 1 to {total}")
            self._change(ProgressState(n, total, name, 100 * (n - 1) // total))

    def next_step(self, name: str) -> None:
        with self._lock:
            self.set_step(self.state.current_step + 1, name)

    def complete(self) -> None:
        with self._lock:
            if self.state.percent < 100:
                total = self.state.total_steps
                self._change(ProgressState(total, total, self.state.step_name, 100))

    def log(self, message: str, level: LogLevel = LogLevel.INFO, details: Any = None) -> None:
        level, details = LogLevel(level), copy.deepcopy(details)
        with self._lock:
            if self._on_log is not None:
                now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
                self._on_log(LogEntry(now, level, message, details))

    def _change(self, state: ProgressState) -> None:
        self.state = state
        if self._on_progress is not None:
            self._on_progress(state)
