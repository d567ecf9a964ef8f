"""Blocking work in a thread as a source, and its progress; on both backends, with real threads."""

import gc
import itertools
import json
import logging
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, Final

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import CapacityLimiter

from sseapp import GET, Run, Settings, SSEApp
from ssecore.errors import BadRequest
from ssecore.http.request import Request
from ssecore.streaming.progress import (
    MAX_THREADS,
    LogEntry,
    LogLevel,
    ProgressLogger,
    ProgressState,
    Report,
    WorkCancelled,
    from_thread,
)
from ssecore.streaming.pump import CLOSE_S
from ssecore.wire import Event
from tests.clients import ask, listening
from tests.house import Backend, in_virtual_time

#: After so many seconds a test has hung.
LIMIT_S: Final = 30

virtual_time = pytest.mark.parametrize(
    "anyio_backend", [("asyncio",), ("trio",)], ids=["asyncio", "trio"], indirect=True
)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    """In real time, since threads work here, unless the test asks for virtual time."""
    return (request.param, {}) if isinstance(request.param, str) else in_virtual_time(*request.param)


class Work:
    """Work for a thread, with a record of what became of it."""

    def __init__(self) -> None:
        self.began = 0
        self.ended = 0
        self.cancelled = 0
        self.reported = 0  #: items whose `report` has returned
        self.go = threading.Event()  #: what `wait` waits for
        self._lock = threading.Lock()

    def __call__(self, report: Report[int], *numbers: int, then: Callable[[], object] = lambda: None) -> None:
        """Report each, then do that."""
        with self._lock:
            self.began += 1
        try:
            for number in numbers:
                report(number)
                self.reported += 1
            then()
        except Exception:
            raise
        except WorkCancelled:
            with self._lock:
                self.cancelled += 1
            raise
        finally:
            with self._lock:
                self.ended += 1

    def endless(self, report: Report[int]) -> None:
        def go_on() -> None:
            for number in itertools.count():
                report(number)
                self.reported += 1

        self(report, then=go_on)

    def wait(self) -> None:
        assert self.go.wait(LIMIT_S)

    def check(self, report: Report[int]) -> None:
        """Report nothing, and check for ever."""

        def go_on() -> None:
            while True:
                report.check()

        self(report, then=go_on)


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    assert work.ended == work.began, "a thread was left behind"


async def until(condition: Callable[[], object]) -> None:
    """Give the others their turns until it holds."""
    while not condition():
        await anyio.lowlevel.checkpoint()


def blocked(items: from_thread[Any]) -> int:
    """How many threads stand in `report`."""
    return len(items._report._changed._waiters)  # type: ignore[attr-defined]


def fail(error: BaseException) -> Callable[..., None]:
    def work(*_: object) -> None:
        raise error

    return work


# Items


async def test_items_come_in_the_order_in_which_they_were_reported(work: Work) -> None:
    async with from_thread(work, *range(1000)) as items:
        assert [item async for item in items] == list(range(1000))
    assert work.ended == 1


@pytest.mark.parametrize("buffer", [1, 2, 16])
async def test_the_thread_waits_when_nobody_reads(buffer: int, work: Work) -> None:
    async with from_thread(work, *range(100), buffer=buffer) as items:
        await until(lambda: blocked(items))
        assert work.reported == buffer
        assert await anext(items) == 0
        await until(lambda: work.reported == buffer + 1 and blocked(items))
        assert [item async for item in items] == list(range(1, 100))


async def test_sixteen_items_wait_by_default(work: Work) -> None:
    async with from_thread(work.endless) as items:
        await until(lambda: blocked(items))
        assert work.reported == 16


async def test_a_buffer_holds_something() -> None:
    with pytest.raises(ValueError, match="buffer must be at least 1, not 0"):
        from_thread(print, buffer=0)


async def test_work_that_reports_nothing_is_an_empty_stream(work: Work) -> None:
    async with from_thread(work) as items:
        assert [item async for item in items] == []


async def test_it_stays_at_its_end(work: Work) -> None:
    async with from_thread(work, 1) as items:
        assert [item async for item in items] == [1]
        assert [item async for item in items] == []


async def test_a_reader_that_waits_is_woken_by_an_item_and_by_the_end(work: Work) -> None:
    go_on = threading.Event()

    def slowly(report: Report[str]) -> None:
        work.wait()
        report("late")
        assert go_on.wait(LIMIT_S)

    taken: list[str] = []

    async def read(items: from_thread[str]) -> None:
        async for item in items:
            taken.append(item)  # noqa: PERF401 it is looked at meanwhile

    async with from_thread(slowly) as items, anyio.create_task_group() as tasks:
        tasks.start_soon(read, items)
        await until(lambda: items._report._wanted)
        work.go.set()
        await until(lambda: taken and items._report._wanted)
        go_on.set()
    assert taken == ["late"]


async def test_many_tasks_may_read(work: Work) -> None:
    def late(report: Report[int]) -> None:
        work.wait()
        work(report, *range(100))

    taken: list[int] = []

    async def read(items: from_thread[int]) -> None:
        async for item in items:
            taken.append(item)  # noqa: PERF401 the readers share it

    async with from_thread(late, buffer=3) as items, anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(read, items)
        await until(lambda: items._report._wanted)
        work.go.set()
    assert sorted(taken) == list(range(100))


async def test_a_reader_that_never_waits_lets_others_run(work: Work) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with from_thread(work, *range(500), buffer=500) as items:
        await until(lambda: work.ended)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            assert len([item async for item in items]) == 500
            tasks.cancel_scope.cancel()
    assert turns >= 500


async def test_work_may_report_from_threads_of_its_own() -> None:
    def work(report: Report[tuple[int, int]]) -> None:
        def some(worker: int) -> None:
            for number in range(200):
                report((worker, number))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(some, range(8)))

    async with from_thread(work, buffer=3) as items:
        taken = [item async for item in items]
    assert len(taken) == 1600
    for worker in range(8):
        assert [number for who, number in taken if who == worker] == list(range(200))


async def test_a_thread_that_outlives_its_work_is_told_so() -> None:
    told: list[type[BaseException]] = []
    strays: list[threading.Thread] = []
    over = threading.Event()

    def stray(report: Report[int]) -> None:
        assert over.wait(LIMIT_S)
        try:
            report(1)
        except WorkCancelled as error:
            told.append(type(error))

    def work(report: Report[int]) -> None:
        strays.append(threading.Thread(target=stray, args=(report,)))
        strays[0].start()

    async with from_thread(work) as items:
        assert [item async for item in items] == []
        over.set()
        strays[0].join(LIMIT_S)
    assert told == [WorkCancelled]


async def test_the_thread_has_the_context_of_the_handler() -> None:
    name: ContextVar[str] = ContextVar("name")
    name.set("ann")
    async with from_thread(lambda report: report(name.get())) as items:
        assert [item async for item in items] == ["ann"]


async def test_the_loop_itself_may_not_report(work: Work) -> None:
    async with from_thread(work.endless) as items:
        with pytest.raises(RuntimeError, match="would block the loop"):
            items._report(1)


async def test_without_async_with_it_says_what_to_do(work: Work) -> None:
    with pytest.raises(RuntimeError, match="async with from_thread"):
        async for _ in from_thread(work, 1):
            pass


# Failures


async def test_what_the_work_raises_is_raised_at_the_reader_after_the_items_before_it(work: Work) -> None:
    error = BadRequest("broken")
    taken = []
    with pytest.raises(BadRequest) as raised:
        async with from_thread(lambda report: work(report, 1, 2, 3, then=fail(error))) as items:
            async for item in items:
                taken.append(item)  # noqa: PERF401 it must not be lost when the loop is left
    assert taken == [1, 2, 3]
    assert raised.value is error  # itself, not in a group


async def test_a_failure_keeps_its_own_cause() -> None:
    cause = OSError("the disk")

    def work(report: Report[int]) -> None:
        raise ValueError("broken") from cause

    async with from_thread(work) as items:
        with pytest.raises(ValueError, match="broken") as raised:
            await anext(items)
    assert raised.value.__cause__ is cause


async def test_a_failure_with_a_full_buffer_is_not_lost(work: Work) -> None:
    async with from_thread(lambda report: work(report, 1, 2, then=fail(ValueError("broken"))), buffer=2) as items:
        await until(lambda: work.ended)
        assert [await anext(items), await anext(items)] == [1, 2]
        with pytest.raises(ValueError, match="broken"):
            await anext(items)
        assert [item async for item in items] == []


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), StopIteration(), StopAsyncIteration(), WorkCancelled()], ids=repr
)
async def test_what_would_end_more_than_the_work_is_a_failure_of_it(error: BaseException) -> None:
    with pytest.raises(RuntimeError):
        async with from_thread(fail(error)) as items:
            async for _ in items:
                pass


async def test_a_failure_that_nobody_was_there_to_see_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with from_thread(fail(ValueError("unseen"))) as items:
        await until(items._ended.is_set)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "unseen" in caplog.text


async def test_an_exception_in_the_block_comes_out_as_it_is(work: Work) -> None:
    error = KeyError("mine")
    with pytest.raises(KeyError) as raised:
        async with from_thread(work.endless) as items:
            await anext(items)
            raise error
    assert raised.value is error
    assert (work.cancelled, work.ended) == (1, 1)


# Leaving


async def test_leaving_cancels_the_work_at_its_next_report(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    async with from_thread(work.endless) as items:
        assert [await anext(items) for _ in range(5)] == list(range(5))
    assert (work.cancelled, work.ended) == (1, 1)
    assert not caplog.records


async def test_leaving_cancels_work_that_is_blocked_in_report(work: Work) -> None:
    async with from_thread(work.endless, buffer=2) as items:
        await until(lambda: blocked(items))
    assert (work.cancelled, work.reported) == (1, 2)


async def test_leaving_cancels_every_thread_that_is_blocked_in_report(work: Work) -> None:
    def crowd(report: Report[int]) -> None:
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(work.endless, report) for _ in range(8)]:
                future.result()

    async with from_thread(crowd) as items:
        await until(lambda: blocked(items) == 8)
    assert (work.cancelled, work.ended) == (8, 8)


async def test_leaving_cancels_work_that_only_checks(work: Work) -> None:
    async with from_thread(work.check):
        await until(lambda: work.began)
    assert work.cancelled == 1


async def test_work_that_holds_its_cancellation_for_a_failure_is_cancelled_again() -> None:
    """`except Exception` doesn't catch it; whoever catches all gets it each time again."""
    caught: list[str] = []

    def stubborn(report: Report[int]) -> None:
        for attempt in range(3):
            try:
                for number in itertools.count():
                    report(number)
            except Exception:
                caught.append("an exception")
            except BaseException:
                caught.append(f"attempt {attempt}")

    async with from_thread(stubborn) as items:
        await anext(items)
    assert caught == ["attempt 0", "attempt 1", "attempt 2"]


async def test_work_that_fails_while_it_is_cancelled_is_logged(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    def broken(report: Report[int]) -> None:
        try:
            work.endless(report)
        finally:
            raise OSError("no space left to clean up")

    async with from_thread(broken) as items:
        await anext(items)
    assert "no space left to clean up" in caplog.text


async def test_a_cancellation_from_outside_waits_for_the_thread(work: Work) -> None:
    with anyio.CancelScope() as scope:
        async with from_thread(work.endless) as items:
            async for item in items:
                if item == 50:
                    scope.cancel()
    assert scope.cancelled_caught
    assert (work.cancelled, work.ended) == (1, 1)


async def test_a_timeout_around_one_item_leaves_the_others(work: Work) -> None:
    def late(report: Report[int]) -> None:
        work.wait()
        work(report, 1, 2, 3)

    async with from_thread(late) as items:
        with anyio.move_on_after(0):
            await anext(items)
        work.go.set()
        assert [item async for item in items] == [1, 2, 3]


@virtual_time
async def test_work_that_does_not_notice_is_complained_of_and_waited_for(
    work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    """Time jumps where only the thread works. It goes on when the complaint has been made."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            work.go.set()

    def deaf(report: Report[int]) -> None:
        work(report, 1, then=work.wait)

    listener = Listener()
    logging.getLogger("sseapp").addHandler(listener)
    try:
        async with from_thread(deaf) as items:
            await anext(items)
            left_at = anyio.current_time()
        assert work.ended == 1
        assert anyio.current_time() - left_at >= CLOSE_S
    finally:
        logging.getLogger("sseapp").removeHandler(listener)
    (record,) = caplog.records
    assert "deaf still runs in its thread 5.0 s after it was cancelled" in record.getMessage()


async def test_nothing_is_left_of_it(work: Work) -> None:
    limiter = CapacityLimiter(1)

    async def some() -> weakref.ref[Report[int]]:
        async with from_thread(work.endless, limiter=limiter) as items:
            await anext(items)
            assert limiter.borrowed_tokens == 1
        return weakref.ref(items._report)

    report = await some()
    assert limiter.borrowed_tokens == 0
    await anyio.to_thread.run_sync(lambda: None)  # a worker keeps its last job until the next
    gc.collect()
    assert report() is None


# Places


async def test_work_waits_for_its_place_and_leaves_it_to_the_next(work: Work) -> None:
    limiter = CapacityLimiter(1)
    second = Work()

    async def hold() -> None:
        async with from_thread(work.endless, limiter=limiter):
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hold)
        await until(lambda: work.began)
        async with from_thread(second, 7, limiter=limiter) as items:
            await until(lambda: limiter.statistics().tasks_waiting)
            assert not second.began
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                assert [item async for item in items] == [7]
    assert (work.ended, second.ended) == (1, 1)
    assert limiter.borrowed_tokens == 0


async def test_work_that_got_no_place_before_its_block_was_left_never_runs(work: Work) -> None:
    limiter = CapacityLimiter(1)
    async with limiter:
        async with from_thread(work, 1, limiter=limiter):
            await until(lambda: limiter.statistics().tasks_waiting)
    assert work.began == 0


async def test_a_place_that_is_waited_for_can_be_cancelled(work: Work) -> None:
    limiter = CapacityLimiter(1)
    async with limiter:
        with anyio.move_on_after(0) as scope:
            async with from_thread(work, 1, limiter=limiter) as items:
                await anext(items)
    assert scope.cancelled_caught
    assert work.began == 0


async def test_threads_at_work_are_bounded_and_leave_other_threads_alone(work: Work) -> None:
    """All places are taken by work whose readers don't read; the log's threads are others."""

    async def hold() -> None:
        async with from_thread(work.endless):
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        for _ in range(MAX_THREADS + 5):
            tasks.start_soon(hold)
        await until(lambda: work.began == MAX_THREADS)
        assert await anyio.to_thread.run_sync(lambda: "the log") == "the log"
        assert work.began == MAX_THREADS
        tasks.cancel_scope.cancel()
    assert work.began == work.cancelled


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_each_loop_has_places_of_its_own(backend: str) -> None:
    async def use() -> list[int]:
        async with from_thread(lambda report: report(1)) as items:
            return [item async for item in items]

    for _ in range(2):
        assert anyio.run(use, backend=backend) == [1]


# As a handler's source


async def test_a_client_that_leaves_cancels_the_thread(work: Work) -> None:
    async def numbers(request: Request) -> AsyncIterator[Event]:
        async with from_thread(work.endless) as items:
            async for item in items:
                yield Event(item)

    async with listening(SSEApp([GET("/", numbers)]), "/") as reading:
        assert [(await reading.event()).data for _ in range(3)] == ["0", "1", "2"]
    assert (work.cancelled, work.ended) == (1, 1)


async def test_a_client_that_does_not_read_stops_the_thread(work: Work) -> None:
    async def numbers(request: Request) -> AsyncIterator[Event]:
        async with from_thread(work.endless) as items:
            opened.append(items)
            async for item in items:
                yield Event(item)

    opened: list[from_thread[int]] = []
    app = SSEApp([GET("/", numbers)], Settings(buffer_bytes=1000))
    async with listening(app, "/") as reading:
        reading.exchange.block()
        await until(lambda: blocked(opened[0]))
        before = work.reported
        reading.exchange.unblock()
        await until(lambda: work.reported > before)
    assert work.cancelled == 1


async def test_work_that_fails_at_once_is_an_http_error() -> None:
    async def broken(request: Request) -> AsyncIterator[Event]:
        async with from_thread(fail(BadRequest("no such folder"))) as items:
            async for item in items:
                yield Event(item)

    answer = await ask(SSEApp([GET("/", broken)]), "/")
    assert answer.problem == (400, "bad_request")


@pytest.mark.parametrize("stuck", [False, True], ids=["at work", "blocked"])
async def test_a_run_is_cancelled_together_with_its_thread(work: Work, stuck: bool) -> None:
    opened: list[from_thread[int]] = []

    def some(report: Report[int]) -> None:
        report(1)
        (work.endless if stuck else work.check)(report)

    async def numbers(request: Request) -> AsyncIterator[Event]:
        async with from_thread(some) as items:
            opened.append(items)
            yield Event(await anext(items), "first")
            if stuck:
                await anyio.sleep_forever()
            async for item in items:
                yield Event(item)

    app = SSEApp([GET("/", numbers, run=Run(linger_s=None))], Settings(log="memory"))
    async with app.running(), listening(app, "/") as reading:
        assert (await reading.event()).event == "first"
        await until(lambda: blocked(opened[0]) if stuck else work.began)
        assert (await ask(app, f"/runs/{reading.run}", "DELETE")).status == 202
        (last,) = await reading.rest()
        assert (last.event, json.loads(last.data)) == ("cancelled", {"reason": "asked"})
        assert (work.cancelled, work.ended) == (1, 1)
        assert (await ask(app, f"/runs/{reading.run}")).json["state"] == "cancelled"


# Progress


class Told:
    """What a logger has told, in order."""

    def __init__(self, total_steps: int) -> None:
        self.states: list[ProgressState] = []
        self.entries: list[LogEntry] = []
        self.progress = ProgressLogger(total_steps, self.entries.append, self.states.append)


def test_steps_are_told_as_they_begin_and_at_the_end() -> None:
    told = Told(4)
    told.progress.next_step("Reading")
    told.progress.next_step("Counting")
    told.progress.set_step(4, "Writing")
    told.progress.complete()
    assert [asdict(state) for state in told.states] == [
        {"current_step": 1, "total_steps": 4, "step_name": "Reading", "percent": 0},
        {"current_step": 2, "total_steps": 4, "step_name": "Counting", "percent": 25},
        {"current_step": 4, "total_steps": 4, "step_name": "Writing", "percent": 75},
        {"current_step": 4, "total_steps": 4, "step_name": "Writing", "percent": 100},
    ]
    assert told.progress.state is told.states[-1]


@pytest.mark.parametrize("total", [1, 3, 7, 1000])
def test_percent_is_a_whole_number_and_100_at_the_end_only(total: int) -> None:
    told = Told(total)
    for number in range(total):
        told.progress.next_step(f"{number}")
    told.progress.complete()
    percents = [state.percent for state in told.states]
    assert percents == sorted(percents)
    assert percents[0] == 0
    assert percents[-1] == 100
    assert percents.count(100) == 1
    assert {type(percent) for percent in percents} == {int}


def test_before_the_first_step_nothing_is_told() -> None:
    told = Told(2)
    assert told.progress.state == ProgressState(0, 2, "", 0)
    assert not told.states


@pytest.mark.parametrize("n", [-1, 0, 4, 10**30])
def test_a_step_that_is_none_is_refused_and_changes_nothing(n: int) -> None:
    told = Told(3)
    told.progress.set_step(2, "two")
    with pytest.raises(ValueError, match=f"there is no step {n}: steps go from 1 to 3"):
        told.progress.set_step(n, "none")
    assert told.progress.state == ProgressState(2, 3, "two", 33)
    assert len(told.states) == 1


def test_there_is_no_step_after_the_last() -> None:
    told = Told(1)
    told.progress.next_step("all")
    with pytest.raises(ValueError, match="there is no step 2: steps go from 1 to 1"):
        told.progress.next_step("more")


@pytest.mark.parametrize("total", [0, -1])
def test_there_is_at_least_one_step(total: int) -> None:
    with pytest.raises(ValueError, match=f"total_steps must be at least 1, not {total}"):
        ProgressLogger(total)


def test_a_step_may_be_done_again() -> None:
    told = Told(3)
    told.progress.set_step(3, "check")
    told.progress.set_step(1, "read again")
    assert [state.current_step for state in told.states] == [3, 1]


def test_after_its_end_there_are_no_steps_but_log_lines() -> None:
    told = Told(2)
    told.progress.set_step(1, "one")
    told.progress.complete()
    told.progress.complete()
    with pytest.raises(RuntimeError, match="complete"):
        told.progress.set_step(1, "again")
    with pytest.raises(RuntimeError, match="complete"):
        told.progress.next_step("more")
    told.progress.log("cleaned up")
    assert [state.percent for state in told.states] == [0, 100]
    assert [entry.message for entry in told.entries] == ["cleaned up"]


def test_a_log_line_says_when_and_how_much_it_matters() -> None:
    told = Told(1)
    told.progress.log("hello")
    told.progress.log("careful", LogLevel.WARNING, {"file": "a.txt", "sizes": [1, 2]})
    first, second = (asdict(entry) for entry in told.entries)
    assert list(first) == ["timestamp", "level", "message", "details"]
    assert (first["level"], first["message"], first["details"]) == ("info", "hello", None)
    assert (second["level"], second["details"]) == ("warning", {"file": "a.txt", "sizes": [1, 2]})
    assert first["timestamp"].endswith("Z")
    assert datetime.fromisoformat(first["timestamp"]).utcoffset() == timedelta(0)
    assert first["timestamp"] <= second["timestamp"]
    json.dumps([first, second])


def test_levels_are_five() -> None:
    assert [*LogLevel] == ["debug", "info", "success", "warning", "error"]
    with pytest.raises(ValueError, match="'loud' is not a valid LogLevel"):
        ProgressLogger(1).log("hey", "loud")  # type: ignore[arg-type]


def test_details_are_told_as_they_were() -> None:
    told = Told(1)
    details = {"files": ["a"]}
    told.progress.log("so far", details=details)
    details["files"].append("b")
    assert told.entries[0].details == {"files": ["a"]}


def test_without_callbacks_it_keeps_its_state() -> None:
    progress = ProgressLogger(2)
    progress.log("nobody hears")
    progress.next_step("one")
    progress.complete()
    assert progress.state == ProgressState(2, 2, "one", 100)


def test_what_a_callback_raises_is_raised_at_the_call_and_the_logger_goes_on() -> None:
    progress = ProgressLogger(2, on_progress=fail(WorkCancelled()))
    for _ in range(2):
        with pytest.raises(WorkCancelled):
            progress.next_step("one")
    assert progress.state.current_step == 2


def test_a_callback_may_log() -> None:
    told = Told(1)
    progress = ProgressLogger(1, told.entries.append, lambda state: progress.log(f"at {state.current_step}"))
    progress.next_step("one")
    assert [entry.message for entry in told.entries] == ["at 1"]


def test_many_threads_at_once_are_told_one_after_the_other() -> None:
    workers, steps = 8, 250
    told = Told(workers * steps)
    inside = 0

    def alone(tell: Callable[[Any], None]) -> Callable[[Any], None]:
        def callback(item: Any) -> None:
            nonlocal inside
            inside += 1
            assert inside == 1, "two callbacks at once"
            tell(item)
            inside -= 1

        return callback

    progress = ProgressLogger(workers * steps, alone(told.entries.append), alone(told.states.append))

    def some(worker: int) -> None:
        for number in range(steps):
            progress.next_step(f"{worker}/{number}")
            progress.log(f"{worker}/{number}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(some, range(workers)))
    finally:
        sys.setswitchinterval(interval)
    progress.complete()
    assert [state.current_step for state in told.states[:-1]] == list(range(1, workers * steps + 1))
    assert all(state.percent == 100 * (state.current_step - 1) // (workers * steps) for state in told.states[:-1])
    timestamps = [entry.timestamp for entry in told.entries]
    assert timestamps == sorted(timestamps)
    for worker in range(workers):
        own = [f"{worker}/{number}" for number in range(steps)]
        assert [entry.message for entry in told.entries if entry.message.startswith(f"{worker}/")] == own
        assert [state.step_name for state in told.states[:-1] if state.step_name.startswith(f"{worker}/")] == own


# Both together


async def test_a_report_streams_progress_log_and_result() -> None:
    def figures(report: Report[Event], numbers: list[int]) -> None:
        progress = ProgressLogger.reporting(report, total_steps=2)
        progress.next_step("Counting")
        progress.log("2 numbers", LogLevel.SUCCESS, {"count": len(numbers)})
        progress.next_step("Adding")
        total = sum(numbers)
        progress.complete()
        report(Event({"success": True, "data": {"sum": total}}, "result"))

    async def handler(request: Request) -> AsyncIterator[Event]:
        async with from_thread(figures, [1, 2]) as events:
            async for event in events:
                yield event

    app = SSEApp([GET("/api/process/stream", handler, run=Run(linger_s=None))], Settings(log="memory"))
    async with app.running():
        events = (await ask(app, "/api/process/stream")).events
    told = [(event.event, json.loads(event.data)) for event in events]
    assert told[1][1].pop("timestamp").endswith("Z")
    assert told == [
        ("progress", {"current_step": 1, "total_steps": 2, "step_name": "Counting", "percent": 0}),
        ("log", {"level": "success", "message": "2 numbers", "details": {"count": 2}}),
        ("progress", {"current_step": 2, "total_steps": 2, "step_name": "Adding", "percent": 50}),
        ("progress", {"current_step": 2, "total_steps": 2, "step_name": "Adding", "percent": 100}),
        ("result", {"success": True, "data": {"sum": 3}}),
    ]


async def test_many_threads_that_report_through_one_logger_are_cancelled_together() -> None:
    """One of them is blocked in `report` and holds the logger, the others wait for it; the loop reads its state."""
    ended: list[type[BaseException]] = []
    loggers: list[ProgressLogger] = []

    def crowd(report: Report[Event]) -> None:
        progress = ProgressLogger.reporting(report, total_steps=10**6)
        loggers.append(progress)

        def one() -> None:
            try:
                while True:
                    progress.next_step("at work")
            except BaseException as error:
                ended.append(type(error))

        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(one)

    async with from_thread(crowd) as items:
        await until(lambda: blocked(items))
        assert loggers[0].state.current_step == 17  # 16 wait, and one is in hand
        assert json.loads(json.dumps((await anext(items)).data))["current_step"] == 1
    assert ended == [WorkCancelled] * 4
