"""Work in a thread (`from_thread`) or a task (`from_task`), with its progress; see docs/handlers.md.

Rules, cited by number at the code:

1.  A thread can't be stopped from outside: its next report raises `WorkCancelled`.
2.  Leaving the block waits for the thread: only it can release its resources, and the interpreter would wait too.
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
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, TypeVarTuple

import anyio
from anyio import CancelScope, CapacityLimiter
from anyio.abc import TaskGroup, TaskStatus
from anyio.from_thread import BlockingPortal
from anyio.lowlevel import RunVar, checkpoint

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

#: anyio's and trio's number, but apart: the log and the database must not wait for readers.
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
        self._portal = BlockingPortal()
        self._loop_thread = threading.get_ident()
        self._items: deque[T] = deque()
        self._changed = threading.Condition()  # rule 3
        self._ended = False
        self._wanted: anyio.Event | None = None

    def _wake_reader(self) -> None:
        if self._wanted is None:
            return
        if threading.get_ident() == self._loop_thread:
            self._wake()
        else:
            with suppress(RuntimeError):  # the work has ended, which wakes the reader too
                self._portal.start_task_soon(self._wake)

    def _item_taken(self) -> None:
        """With the lock."""

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
                    self._item_taken()
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
        self._wake_reader()

    def check(self) -> None:
        """Raise `WorkCancelled` after the reader has left. Cheap."""
        if self._ended:
            raise WorkCancelled

    def _item_taken(self) -> None:
        self._changed.notify()


class from_thread(Generic[T]):
    """Runs a blocking function in a worker thread; iterates over its reports.

        async with from_thread(work, folder) as items:      # work(report, folder)
            async for item in items:
                yield Event(item)

    `report(item)`, from any thread, blocks while `buffer` items wait. What `work` raises is raised here, after the
    items. Leaving the block raises `WorkCancelled` at the next `report` or `report.check()`, and waits for the thread
    (rule 2), with a warning after `CLOSE_S`. Work that still waits for `limiter` never runs.
    """

    def __init__(
        self,
        work: Callable[[Report[T], *Ts], object],
        *args: *Ts,
        buffer: int = 16,
        limiter: CapacityLimiter | None = None,
    ) -> None:
        self._work: Callable[[Report[T]], object] = lambda report: work(report, *args)
        self._name = getattr(work, "__qualname__", repr(work))
        self._limiter = limiter
        self._failure: Exception | None = None
        self._report = Report[T](buffer)
        self._tasks: TaskGroup | None = None
        self._scope = CancelScope(shield=True)
        self._ended = anyio.Event()

    async def __aenter__(self) -> Self:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._tasks is not None
        self._report._end()
        self._scope.cancel()  # while it waits for a thread
        with CancelScope(shield=True):  # rule 2
            with anyio.move_on_after(CLOSE_S):
                await self._ended.wait()
            if not self._ended.is_set():
                logger.warning("%s still runs in its thread %s s after it was cancelled", self._name, CLOSE_S)
                await self._ended.wait()
        # Without the caller's exception, which it would wrap.
        await self._tasks.__aexit__(None, None, None)
        if self._failure is not None:
            logger.warning("%s failed after its reader had left", self._name, exc_info=self._failure)

    async def _run(self) -> None:
        with self._scope:
            async with self._report._portal:
                try:
                    await anyio.to_thread.run_sync(self._in_thread, limiter=self._limiter or _loop_limiter())
                except Exception as error:
                    self._failure = error
        self._report._end()
        self._ended.set()

    def _in_thread(self) -> None:
        try:
            self._work(self._report)
        except BaseException as error:
            # SystemExit would end the server, StopAsyncIteration the loop.
            if isinstance(error, Exception) and not isinstance(error, StopAsyncIteration):
                raise
            if not (isinstance(error, WorkCancelled) and self._report._ended):
                raise RuntimeError(f"work in a thread was ended by {error!r}") from error

    def __aiter__(self) -> Self:
        if self._tasks is None:
            raise RuntimeError("use `async with from_thread(...) as items`, so that the thread is ended")
        return self

    async def __anext__(self) -> T:
        with suppress(anyio.EndOfStream):
            return await self._report._next()
        failure, self._failure = self._failure, None
        raise StopAsyncIteration if failure is None else failure


class TaskReport(_Items[T]):
    """Sends items from a task:

        report(item)            # from any thread; dropped if `buffer` items wait
        await report(item)      # waits for room

    After the reader has left all are dropped.
    """

    def __init__(self, buffer: int) -> None:
        super().__init__(buffer)
        self.dropped = 0
        self._waiting: deque[_Reported[T]] = deque()

    def __call__(self, item: T) -> Awaitable[None]:
        reported = _Reported(self, item)
        with self._changed:
            if self._ended:
                reported.done = True
            elif len(self._items) < self._buffer:
                self._items.append(item)
                reported.done = True
            else:
                self.dropped += 1
        self._wake_reader()
        return reported

    def _item_taken(self) -> None:
        if self._waiting:
            first = self._waiting.popleft()
            self._items.append(first.item)
            first.done = True
            first.settled.set()

    def _end(self) -> None:
        super()._end()
        for reported in self._waiting:
            reported.settled.set()

    async def _wait_for_room(self, reported: "_Reported[T]") -> None:
        if threading.get_ident() != self._loop_thread:
            raise RuntimeError("await report(…) only in the task of the work; in other threads call it without await")
        with self._changed:
            self.dropped -= 1
            if len(self._items) < self._buffer:
                self._items.append(reported.item)
                reported.done = True
            else:
                reported.settled = anyio.Event()
                self._waiting.append(reported)
        if reported.done:
            return self._wake_reader()
        try:
            await reported.settled.wait()
        finally:
            with self._changed:
                if not reported.done and reported in self._waiting:
                    self._waiting.remove(reported)


class _Reported(Generic[T]):
    __slots__ = ("_report", "done", "item", "settled")

    def __init__(self, report: TaskReport[T], item: T) -> None:
        self._report = report
        self.item = item
        self.done = False
        self.settled: anyio.Event

    def __await__(self) -> Generator[Any, Any, None]:
        if self._report._ended:  # for cancellations of work that reports in a loop
            yield from checkpoint().__await__()
        elif not self.done:
            yield from self._report._wait_for_room(self).__await__()


class from_task(Generic[T]):
    """As `from_thread`, for a coroutine function in a task (rule 4)."""

    def __init__(
        self, work: Callable[[TaskReport[T], *Ts], Coroutine[Any, Any, object]], *args: *Ts, buffer: int = 100
    ) -> None:
        self._report = TaskReport[T](buffer)
        self._work = _Work(lambda: work(self._report, *args), self._report)
        self._tasks: TaskGroup | None = None
        self._ended = anyio.Event()

    @property
    def dropped(self) -> int:
        return self._report.dropped

    async def __aenter__(self) -> Self:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        await self._tasks.start(self._serve_threads)
        self._work.start(self._tasks)
        return self

    async def _serve_threads(self, *, task_status: TaskStatus[None]) -> None:
        with CancelScope(shield=True):
            async with self._report._portal:
                task_status.started()
                await self._ended.wait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._tasks is not None
        self._report._end()
        self._work.stop()
        try:
            await self._work.closed()
        finally:
            self._ended.set()
            await self._tasks.__aexit__(None, None, None)
        if self._work.failure is not None:
            logger.warning("work in a task failed after its reader had left", exc_info=self._work.failure)

    def __aiter__(self) -> Self:
        if self._tasks is None:
            raise RuntimeError("use `async with from_task(...) as items`, so that the task is ended")
        return self

    async def __anext__(self) -> T:
        with suppress(anyio.EndOfStream):
            return await self._report._next()
        failure, self._work.failure = self._work.failure, None
        raise StopAsyncIteration if failure is None else failure


async def _nothing() -> AsyncGenerator[Any, None]:
    return
    yield


class _Work(GeneratorTask[Any]):
    what = "a task"

    def __init__(self, work: Callable[[], Coroutine[Any, Any, object]], report: TaskReport[Any]) -> None:
        super().__init__(_nothing())
        self._begin = work
        self._report = report

    async def iterate(self) -> None:
        try:
            await self._begin()
        except StopAsyncIteration as error:
            raise RuntimeError(f"work in a task was ended by {error!r}") from error

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ProgressState:
    """A `progress` event's data."""

    current_step: int  #: from 1; 0 before the first
    total_steps: int
    step_name: str
    percent: int  #: of completed steps

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        self._completed = False
        self._lock = threading.RLock()  # a callback may log

    @classmethod
    def reporting(cls, report: Callable[[Event], object], total_steps: int) -> Self:
        return cls(
            total_steps,
            on_log=lambda entry: report(Event(entry.to_dict(), "log")),
            on_progress=lambda state: report(Event(state.to_dict(), "progress")),
        )

    def set_step(self, n: int, name: str) -> None:
        """Begin step `n`, from 1. Raises `ValueError`, or `RuntimeError` after `complete`."""
        with self._lock:
            total = self.state.total_steps
            if self._completed:
                raise RuntimeError("no step can begin after complete()")
            if not 1 <= n <= total:
                raise ValueError(f"there is no step {n}: steps go from 1 to {total}")
            self._change(ProgressState(n, total, name, 100 * (n - 1) // total))

    def next_step(self, name: str) -> None:
        with self._lock:
            self.set_step(self.state.current_step + 1, name)

    def complete(self) -> None:
        with self._lock:
            if not self._completed:
                self._completed = True
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
