"""Work in a task as a source: what a callback tells, with no reader waited for, or with."""

import logging
import threading
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any, Final

import anyio
import pytest
import trio
from anyio import CancelScope, get_cancelled_exc_class
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from sseapp import GET, Event, Request, Run, Settings, SSEApp, from_task
from ssecore.errors import BadRequest
from ssecore.streaming.progress import TaskReport
from ssecore.testing import assert_stream, connect

LIMIT_S: Final = 30
pytestmark = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


async def called(report: TaskReport[int], *numbers: int) -> None:
    for number in numbers:
        report(number)


async def awaited(report: TaskReport[int], *numbers: int) -> None:
    for number in numbers:
        await report(number)


async def failing(report: TaskReport[int], error: BaseException) -> None:
    report(1)
    raise error


async def endless(report: TaskReport[int]) -> None:
    number = 0
    while True:
        await report(number)
        number += 1


async def test_what_is_called_never_waits_and_what_finds_no_room_is_counted() -> None:
    async with from_task(called, *range(10), buffer=4) as items:
        assert [item async for item in items] == [0, 1, 2, 3]
        assert items.dropped == 6
    async with from_task(called, *range(200)) as items:
        assert [item async for item in items] == [*range(100)]


async def test_what_is_awaited_waits_for_room() -> None:
    with anyio.fail_after(LIMIT_S):
        async with from_task(awaited, *range(50), buffer=1) as items:
            await anyio.wait_all_tasks_blocked()
            assert len(items._report._items) == 1
            assert [item async for item in items] == [*range(50)]
            assert items.dropped == 0


@settings(deadline=None)
@given(steps=st.lists(st.sampled_from(["call", "await", "take"]), max_size=40), buffer=st.integers(1, 4))
def test_what_was_not_dropped_comes_in_its_order(anyio_backend: str, steps: list[str], buffer: int) -> None:
    anyio.run(_reads_all, steps, buffer, backend=anyio_backend)


async def _reads_all(steps: list[str], buffer: int) -> None:
    """Whoever reads takes one item for each "take", and the rest at the end."""
    kept: list[int] = []
    may_take, took = anyio.create_memory_object_stream[None](len(steps) + 1)

    async def work(report: TaskReport[int]) -> None:
        with may_take:
            for number, step in enumerate(steps):
                if step == "take":
                    may_take.send_nowait(None)
                    for _ in range(5):
                        await checkpoint()
                    continue
                before = report.dropped
                reported = report(number)
                if step == "await":
                    if len(report._items) >= buffer:
                        may_take.send_nowait(None)
                    await reported
                if report.dropped == before:
                    kept.append(number)

    with anyio.fail_after(LIMIT_S), took:
        async with from_task(work, buffer=buffer) as items:
            found = [await anext(items, None) async for _ in took]
            found += [item async for item in items]
            assert [item for item in found if item is not None] == kept
            assert items.dropped == len([step for step in steps if step != "take"]) - len(kept)


async def test_other_threads_may_call_it_but_not_await_it() -> None:
    go_on, done = anyio.Event(), anyio.Event()

    async def work(report: TaskReport[int]) -> None:
        def in_thread() -> None:
            report(2)
            with pytest.raises(RuntimeError, match="in other threads call it without await"):
                report(3).__await__().send(None)

        await anyio.to_thread.run_sync(report, 1)
        await go_on.wait()
        await anyio.to_thread.run_sync(in_thread)
        done.set()
        await anyio.sleep_forever()

    with anyio.fail_after(LIMIT_S):
        async with from_task(work, buffer=1) as items:
            assert await anext(items) == 1
            go_on.set()
            await done.wait()
            assert await anext(items) == 2
            assert items.dropped == 1


async def test_a_failure_comes_after_the_items_before_it(anyio_backend: str) -> None:
    for error in (ValueError("no"), BadRequest("no")):
        async with from_task(failing, error) as items:
            assert await anext(items) == 1
            with pytest.raises(type(error)) as caught:
                await anext(items)
            assert caught.value is error
            with pytest.raises(StopAsyncIteration):
                await anext(items)


@pytest.mark.parametrize("error", [StopAsyncIteration(), SystemExit(1), KeyboardInterrupt()])
async def test_what_would_end_more_than_the_work_is_a_failure_of_it(error: BaseException) -> None:
    async with from_task(failing, error) as items:
        assert await anext(items) == 1
        with pytest.raises(RuntimeError):
            await anext(items)


async def test_a_failure_that_nobody_was_there_to_see_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work(report: TaskReport[int]) -> None:
        try:
            await endless(report)
        finally:
            raise ValueError("while it was closed")

    async with from_task(work) as items:
        await anext(items)
    [record] = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert "its reader had left" in record.getMessage() and "while it was closed" in (record.exc_text or "")


async def test_leaving_cancels_the_work_once_and_waits_for_it() -> None:
    closed = []

    async def work(report: TaskReport[int]) -> None:
        try:
            await endless(report)
        finally:
            # On trio a cleanup that awaits shields itself, in anybody's program.
            with CancelScope(shield=get_cancelled_exc_class() is trio.Cancelled):
                await checkpoint()  # gives back what it holds
            closed.append(report.dropped)

    with anyio.fail_after(LIMIT_S):
        async with from_task(work) as items:
            assert await anext(items) == 0
        assert closed == [0]
        with anyio.move_on_after(0.01):
            async with from_task(work) as items:
                await anyio.sleep_forever()
        assert closed == [0, 0], "whatever the block is left by"
        with pytest.raises(ValueError, match="mine"):
            async with from_task(work):
                raise ValueError("mine")
    await called(items._report, 1)
    assert items.dropped == 0, "nobody reads any more"


async def test_the_work_has_the_context_of_the_handler() -> None:
    name = ContextVar("name", default=0)
    name.set(7)

    async def work(report: TaskReport[int]) -> None:
        report(name.get())

    async with from_task(work) as items:
        assert [item async for item in items] == [7]


async def test_it_says_how_it_is_used() -> None:
    with pytest.raises(ValueError, match="buffer"):
        from_task(endless, buffer=0)
    with pytest.raises(RuntimeError, match="async with"):
        aiter(from_task(endless))


@pytest.mark.parametrize("run", [None, Run(linger_s=0)])
async def test_a_client_that_leaves_cancels_the_work(run: Run | None) -> None:
    cancelled = anyio.Event()

    async def work(report: TaskReport[Event]) -> None:
        try:
            report(Event("1", "status"))
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    async def handler(request: Request) -> AsyncIterator[Event]:
        async with from_task(work) as events:
            async for event in events:
                yield event

    app = SSEApp([GET("/", handler, run=run)], Settings(log="memory"))
    with anyio.fail_after(LIMIT_S):
        async with app.running():
            async with connect(app, "GET", "/") as exchange:
                await assert_stream(exchange, ("status", "1"), ends=False)
            await cancelled.wait()


def test_nothing_of_it_is_a_thread(anyio_backend: str) -> None:
    async def main() -> None:
        async with from_task(awaited, 1, 2) as items:
            assert [item async for item in items] == [1, 2]

    before: Any = threading.active_count()
    anyio.run(main, backend=anyio_backend)
    assert threading.active_count() == before
