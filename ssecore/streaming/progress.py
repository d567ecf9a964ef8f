"""Work that tells what it does as a handler's source: in a thread, or in a task; and how far it is.

    def work(report: Report[Event], folder: Path) -> None:                # in a worker thread
        progress = ProgressLogger.reporting(report, total_steps=2)
        progress.next_step("Reading")
        ...
        progress.complete()
        report(Event({"success": True, "data": figures}, "result"))

    async def handler(request: Request) -> AsyncIterator[Event]:
        async with from_thread(work, folder) as events:
            async for event in events:
                yield event

    async def status(report: TaskReport[Event], question: str) -> None:   # in the loop: an agent that takes a callback
        answer = await agent.run(question, on_status=lambda text: report(Event(text, "status")))
        await report(Event(answer, "result"))

`from_task(status, question)` is read in the same way.

Rules, cited by number at the code:

1.  A thread can't be stopped from outside. It is told to stop, and that reaches it as `WorkCancelled` where it reports.
2.  Leaving waits for the thread, however long it takes: what it holds (a half-written file, a place among the threads)
    is given back by nobody else, and the interpreter would wait for it in the end anyway.
3.  The loop takes a lock that a thread holds for a few instructions only, never one that is held while a thread waits.
4.  Work in a task is cancelled once, and may await in its `finally`, as a handler may (see `pump`).
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

#: Threads of `from_thread` at work in one loop; further ones wait for their turn. As many as anyio and trio have for
#: all their threads, and apart from those: the log and the database go on while each of these waits for its reader.
MAX_THREADS: Final = 40

#: Made by the loop that asks for it, and gone with it.
_limiter: Final[RunVar[CapacityLimiter]] = RunVar("sseapp.progress")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class WorkCancelled(BaseException):
    """The reader has left (rule 1). Raised in the thread by `report` and `report.check`, each time again.

    Not an `Exception`, so that a work's own `except Exception` doesn't take it for a failure; `finally` runs.
    """


class _Items(Generic[T]):
    """Items on their way to the one who reads them, in the loop that makes this; out of any thread."""

    def __init__(self, buffer: int) -> None:
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1, not {buffer}")
        self._buffer = buffer
        self._portal = BlockingPortal()
        self._loop_thread = threading.get_ident()
        self._items: deque[T] = deque()
        self._changed = threading.Condition()  # there is room, or it is over (rule 3)
        self._over = False  # the reader has left, or the work has ended
        self._wanted: anyio.Event | None = None  # whoever reads waits for an item

    def _added(self) -> None:
        """Wake whoever reads, out of any thread."""
        if self._wanted is None:
            return
        if threading.get_ident() == self._loop_thread:
            self._wake()
        else:
            with suppress(RuntimeError):  # the work has just ended, and its end wakes the reader
                self._portal.start_task_soon(self._wake)

    def _taken(self) -> None:
        """There is room for one more; called with the lock held."""

    def _wake(self) -> None:
        if self._wanted is not None:
            self._wanted.set()
            self._wanted = None

    def _end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._wake()

    async def _next(self) -> T:
        """Raises `EndOfStream` when it is over and all is taken."""
        await checkpoint()
        while True:
            with self._changed:
                if self._items:
                    item = self._items.popleft()
                    self._taken()
                    return item
                if self._over:
                    raise anyio.EndOfStream
                self._wanted = self._wanted or anyio.Event()
            await self._wanted.wait()


class Report(_Items[T]):
    """What work in a thread hands its items to. For any thread but the loop's: it blocks.

    An item costs one lock, and a call into the loop only where the reader waits for it.
    """

    def __call__(self, item: T) -> None:
        """Hand it over. Blocks while `buffer` items wait. Raises `WorkCancelled` when the reader has left."""
        if threading.get_ident() == self._loop_thread:
            raise RuntimeError("report is for worker threads: here it would block the loop")
        with self._changed:
            while len(self._items) >= self._buffer and not self._over:
                self._changed.wait()
            self.check()
            self._items.append(item)
        self._added()

    def check(self) -> None:
        """Raise `WorkCancelled` when the reader has left. Costs nothing: call it often."""
        if self._over:
            raise WorkCancelled

    def _taken(self) -> None:
        self._changed.notify()


class from_thread(Generic[T]):
    """A blocking function, run in a worker thread, as an async iterator of what it reports.

        async with from_thread(work, folder) as items:      # runs work(report, folder)
            async for item in items:
                yield Event(item)

    `work` calls `report(item)`, from its own thread or from threads that it has started. Items keep the order in which
    they were reported. At most `buffer` of them wait (default 16); then `report` blocks. What `work` raises is raised
    here, after the items before it; its return ends the iteration, and what it returns is dropped.

    Leaving the block, in any way, raises `WorkCancelled` in the thread at its next `report` or `report.check()`, also
    where it is blocked in `report`, and waits for the thread to end (rule 2). After `CLOSE_S` a warning is logged, and
    it waits on. A failure that nobody is there to see any more is logged.

    `limiter` is whose places such threads take, `MAX_THREADS` of the loop by default. Work that gets no place waits,
    and when its block is left before, it never runs.

    A handler may yield inside this block, although a task group is: no failure of the work ever cancels it.
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
        self._scope = CancelScope(shield=True)  # as in `merge`: leaving the block is the only way to cancel it
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
        self._scope.cancel()  # where it waits for its turn; a thread at work isn't touched by it
        with CancelScope(shield=True):  # rule 2
            with anyio.move_on_after(CLOSE_S):
                await self._ended.wait()
            if not self._ended.is_set():
                logger.warning("%s works on in its thread %s s after it was cancelled", self._name, CLOSE_S)
                await self._ended.wait()
        # Not told of the exception: it is the caller's, and would come back wrapped in a group.
        await self._tasks.__aexit__(None, None, None)
        if self._failure is not None:
            logger.warning("%s failed, and its reader had left", self._name, exc_info=self._failure)

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
            # SystemExit would end the server, and StopAsyncIteration the reader's loop without a word.
            if isinstance(error, Exception) and not isinstance(error, StopAsyncIteration):
                raise
            if not (isinstance(error, WorkCancelled) and self._report._over):
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
    """What work in a task hands its items to, in either of two ways:

        report(item)            # never waits: for a callback that isn't asynchronous; from any thread
        await report(item)      # waits while `buffer` items wait

    An item that finds no room and isn't awaited is dropped, and counted in `dropped`. What is reported when the reader
    has left goes nowhere.
    """

    def __init__(self, buffer: int) -> None:
        super().__init__(buffer)
        self.dropped = 0  #: how many items found no room
        self._waiting: deque[_Reported[T]] = deque()  # in their order; only where there is no room

    def __call__(self, item: T) -> Awaitable[None]:
        reported = _Reported(self, item)
        with self._changed:
            if self._over:
                reported.done = True
            elif len(self._items) < self._buffer:
                self._items.append(item)
                reported.done = True
            else:
                self.dropped += 1
        self._added()
        return reported

    def _taken(self) -> None:
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
            raise RuntimeError("await report(…) where the work runs; from another thread call it")
        with self._changed:
            self.dropped -= 1
            if len(self._items) < self._buffer:  # there is room since it was reported
                self._items.append(reported.item)
                reported.done = True
            else:
                reported.settled = anyio.Event()
                self._waiting.append(reported)
        if reported.done:
            return self._added()
        try:
            await reported.settled.wait()
        finally:
            with self._changed:
                if not reported.done and reported in self._waiting:
                    self._waiting.remove(reported)


class _Reported(Generic[T]):
    """An item that was reported; to be awaited, or not."""

    __slots__ = ("_report", "done", "item", "settled")

    def __init__(self, report: TaskReport[T], item: T) -> None:
        self._report = report
        self.item = item
        self.done = False  #: handed over, or nobody reads
        self.settled: anyio.Event  #: once it is awaited

    def __await__(self) -> Generator[Any, Any, None]:
        if self._report._over:  # nothing makes the work wait any more: else its cancellation would never reach it
            yield from checkpoint().__await__()
        elif not self.done:
            yield from self._report._wait_for_room(self).__await__()


class from_task(Generic[T]):
    """A coroutine function, run in a task of its own, as an async iterator of what it reports.

        async with from_task(work, question) as items:      # runs work(report, question)
            async for item in items:
                yield Event(item)

    `work` calls or awaits `report(item)` (see `TaskReport`); so it may be handed to a library as a callback, also to
    one that calls it from other threads. Items keep the order in which they were reported. At most `buffer` of them
    wait (default 100), then what is called is dropped and counted in `dropped`, and what is awaited waits. What `work`
    raises is raised here, after the items before it; its return ends the iteration, and what it returns is dropped.

    Leaving the block, in any way, cancels the work and waits for its end (rule 4). A failure that nobody is there to
    see any more is logged. A handler may yield inside this block.
    """

    def __init__(
        self, work: Callable[[TaskReport[T], *Ts], Coroutine[Any, Any, object]], *args: *Ts, buffer: int = 100
    ) -> None:
        self._report = TaskReport[T](buffer)
        self._work = _Work(lambda: work(self._report, *args), self._report)
        self._tasks: TaskGroup | None = None
        self._ended = anyio.Event()

    @property
    def dropped(self) -> int:
        """How many items found no room so far, and are lost."""
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
            # Not told of the exception: it is the caller's, and would come back wrapped in a group.
            await self._tasks.__aexit__(None, None, None)
        if self._work.failure is not None:
            logger.warning("work in a task failed, and its reader had left", exc_info=self._work.failure)

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
    """The task of one piece of work, which is a coroutine in place of a generator."""

    what = "a task"

    def __init__(self, work: Callable[[], Coroutine[Any, Any, object]], report: TaskReport[Any]) -> None:
        super().__init__(_nothing())
        self._begin = work
        self._report = report

    async def iterate(self) -> None:
        try:
            await self._begin()
        except StopAsyncIteration as error:  # it would end the reader's loop without a word
            raise RuntimeError(f"work in a task was ended by {error!r}") from error

    def over(self) -> None:
        self._report._end()


def _loop_limiter() -> CapacityLimiter:
    limiter = _limiter.get(None)
    if limiter is None:
        limiter = CapacityLimiter(MAX_THREADS)
        _limiter.set(limiter)
    return limiter


class LogLevel(StrEnum):
    """How much a log line matters, and `success`."""

    DEBUG = "debug"
    INFO = "info"
    SUCCESS = "success"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line of the log; the data of a `log` event."""

    timestamp: str  #: RFC 3339, UTC
    level: LogLevel
    message: str
    details: Any  #: what was given, as it was then; anything with a JSON form

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ProgressState:
    """How far the work is; the data of a `progress` event."""

    current_step: int  #: the one at work, from 1; 0 before the first
    total_steps: int
    step_name: str
    percent: int  #: 0 to 100: the steps that are done, so 100 when it is complete and not before

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ProgressLogger:
    """Steps and log lines of one piece of work, told to `on_progress` and `on_log` as they happen.

    From many threads at once: the callbacks are called one at a time, in the order of what they tell, by whichever
    thread caused it, and what they raise (`WorkCancelled`) is raised there. The others wait meanwhile; so a callback
    must not wait for another thread that uses the same logger. `state` can be read at any time, by the loop too.

    Steps may be done again: `set_step` goes back as well. After `complete` a step is a `RuntimeError`, a second
    `complete` does nothing, and `log` goes on: who cleans up may have something to say.
    """

    def __init__(
        self,
        total_steps: int,
        on_log: Callable[[LogEntry], object] | None = None,
        on_progress: Callable[[ProgressState], object] | None = None,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, not {total_steps}")
        #: A new object at each change, never one that changes (rule 3).
        self.state = ProgressState(0, total_steps, "", 0)
        self._on_log = on_log
        self._on_progress = on_progress
        self._completed = False
        self._lock = threading.RLock()  # a callback may log

    @classmethod
    def reporting(cls, report: Callable[[Event], object], total_steps: int) -> Self:
        """One that reports the events `progress` and `log`."""
        return cls(
            total_steps,
            on_log=lambda entry: report(Event(entry.to_dict(), "log")),
            on_progress=lambda state: report(Event(state.to_dict(), "progress")),
        )

    def set_step(self, n: int, name: str) -> None:
        """Step `n`, from 1, begins. Raises `ValueError` where there is no such step, and `RuntimeError` at the end."""
        with self._lock:
            total = self.state.total_steps
            if self._completed:
                raise RuntimeError("the progress is complete: no step comes after that")
            if not 1 <= n <= total:
                raise ValueError(f"there is no step {n}: they go from 1 to {total}")
            self._change(ProgressState(n, total, name, 100 * (n - 1) // total))

    def next_step(self, name: str) -> None:
        """The step after the current one begins. Raises as `set_step` does."""
        with self._lock:
            self.set_step(self.state.current_step + 1, name)

    def complete(self) -> None:
        """All steps are done: 100 percent, under the last step's name."""
        with self._lock:
            if not self._completed:
                self._completed = True
                total = self.state.total_steps
                self._change(ProgressState(total, total, self.state.step_name, 100))

    def log(self, message: str, level: LogLevel = LogLevel.INFO, details: Any = None) -> None:
        """Say something. `details` is copied: what is changed in it afterwards isn't told."""
        level, details = LogLevel(level), copy.deepcopy(details)
        with self._lock:
            if self._on_log is not None:
                now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
                self._on_log(LogEntry(now, level, message, details))

    def _change(self, state: ProgressState) -> None:
        self.state = state
        if self._on_progress is not None:
            self._on_progress(state)
