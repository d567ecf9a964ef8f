"""Many async iterators as one, on both backends, in virtual time."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

import anyio
import anyio.lowlevel
import pytest
import trio
from anyio import CancelScope, current_time, get_cancelled_exc_class

from sseapp import GET, Event, Request, Settings, SSEApp, merge
from ssecore.testing import connect
from tests.house import Backend, in_virtual_time
from tests.raising_app import KINDS

#: Seconds of virtual time after which a test has hung.
LIMIT_S: Final = 10_000


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    return in_virtual_time(request.param)


class Sources:
    """Makes sources, and keeps a record of them."""

    def __init__(self) -> None:
        self.given = 0  #: items that they have given, all together
        self.tasks: dict[str, int] = {}  #: the task that ran each
        self.closed: dict[str, float] = {}  #: when each had closed, after awaits
        self.strangers: list[str] = []  #: those that were closed in another task than ran them

    async def source(
        self, name: str, *waits: float, error: BaseException | None = None, endless: bool = False
    ) -> AsyncIterator[str]:
        """An item after each wait; then it raises, or waits for ever, or ends."""
        self.tasks[name] = anyio.get_current_task().id
        try:
            for number, wait_s in enumerate(waits):
                if wait_s:
                    await anyio.sleep(wait_s)
                self.given += 1
                yield f"{name}{number}"
            if error is not None:
                raise error
            if endless:
                await anyio.sleep_forever()
        finally:
            # On trio a cleanup that awaits shields itself, in anybody's program.
            with CancelScope(shield=get_cancelled_exc_class() is trio.Cancelled):
                for _ in range(3):
                    await anyio.sleep(0.1)
            if anyio.get_current_task().id != self.tasks[name]:
                self.strangers.append(name)
            self.closed[name] = current_time()

    def assert_closed(self, *names: str) -> None:
        assert set(self.closed) == set(names)
        assert not self.strangers


def text(item: object) -> str:
    """What a source here gives; an exception is handed over only where a test asks for it."""
    assert isinstance(item, str)
    return item


@pytest.fixture
def sources() -> Sources:
    return Sources()


async def test_items_come_in_the_order_in_which_they_are_ready(sources: Sources) -> None:
    async with merge(sources.source("a", 1, 3, 3), sources.source("b", 2, 3, 3)) as items:
        taken = [(item, current_time()) async for item in items]
    assert taken == [("a0", 1), ("b0", 2), ("a1", 4), ("b1", 5), ("a2", 7), ("b2", 8)]
    sources.assert_closed("a", "b")


async def test_each_source_keeps_its_own_order(sources: Sources) -> None:
    async with merge(*(sources.source(name, *[0] * 100) for name in "abc"), buffer=3) as items:
        taken = [item async for item in items]
    assert len(taken) == 300
    for name in "abc":
        assert [item for item in taken if text(item)[0] == name] == [f"{name}{number}" for number in range(100)]


async def test_no_sources_are_an_empty_stream() -> None:
    async with merge[str]() as items:
        assert [item async for item in items] == []


async def test_a_source_that_is_empty_or_ends_early_does_not_end_the_others(sources: Sources) -> None:
    async with merge(sources.source("a"), sources.source("b", 1), sources.source("c", 5)) as items:
        assert [item async for item in items] == ["b0", "c0"]
    sources.assert_closed("a", "b", "c")


async def test_it_stays_at_its_end(sources: Sources) -> None:
    async with merge(sources.source("a", 1)) as items:
        assert [item async for item in items] == ["a0"]
        assert [item async for item in items] == []


@pytest.mark.parametrize("buffer", [0, 1, 16])
async def test_sources_wait_when_nobody_takes(buffer: int, sources: Sources) -> None:
    """At most `buffer` items wait, and one in the hand of each source."""
    async with merge(*(sources.source(name, *[0] * 1000) for name in "ab"), buffer=buffer) as items:
        await anyio.sleep(1)
        assert sources.given <= buffer + 2
        for _ in range(50):
            await anext(items)
        await anyio.sleep(1)
        assert sources.given <= 50 + buffer + 2
    sources.assert_closed("a", "b")


async def test_sixteen_items_wait_by_default(sources: Sources) -> None:
    async with merge(sources.source("a", *[0] * 1000)):
        await anyio.sleep(1)
        assert 16 <= sources.given <= 17


@pytest.mark.parametrize("buffer", [1, 16])
async def test_sources_that_never_wait_let_others_run(buffer: int) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async def source() -> AsyncIterator[int]:
        for number in range(500):
            yield number

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        async with merge(source(), source(), buffer=buffer) as items:
            assert len([item async for item in items]) == 1000
        tasks.cancel_scope.cancel()
    assert turns >= 1000 / (buffer + 2)


# Failures


async def test_a_source_that_fails_ends_all(sources: Sources) -> None:
    taken = []
    with pytest.raises(ValueError, match="broken") as raised:
        async with merge(
            sources.source("a", 1, error=ValueError("broken")), sources.source("b", 0.5, 3, endless=True)
        ) as items:
            async for item in items:
                taken.append(item)  # noqa: PERF401 it must not be lost when the loop is left
    assert taken == ["b0", "a0"]
    assert raised.type is ValueError  # itself, not in a group
    sources.assert_closed("a", "b")


async def test_what_came_before_a_failure_is_handed_over_first(sources: Sources) -> None:
    async with merge(sources.source("a", 0, 0, 0, error=ValueError("broken"))) as items:
        await anyio.sleep(1)
        assert [await anext(items) for _ in range(3)] == ["a0", "a1", "a2"]
        with pytest.raises(ValueError, match="broken"):
            await anext(items)


async def test_a_failure_can_be_handed_over_and_the_others_go_on(sources: Sources) -> None:
    error = ValueError("broken")
    async with merge(sources.source("a", 1, error=error), sources.source("b", 0.5, 3), failures=True) as items:
        assert [item async for item in items] == ["b0", "a0", error, "b1"]
    sources.assert_closed("a", "b")


async def test_all_sources_may_fail(sources: Sources) -> None:
    errors = [ValueError("one"), KeyError("two"), ExceptionGroup("three", [OSError()])]
    async with merge(
        *(sources.source(str(number), error=error) for number, error in enumerate(errors)), failures=True
    ) as items:
        assert {id(item) async for item in items} == {id(error) for error in errors}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_source_that_raises_what_is_no_exception_fails_alone(sources: Sources, kind: str) -> None:
    error = KINDS[kind]()
    async with merge(sources.source("a", 1, error=error), sources.source("b", 0.5, 3), failures=True) as items:
        *taken, failure, last = [item async for item in items]
    assert (taken, last) == (["b0", "a0"], "b1")
    assert isinstance(failure, RuntimeError) and failure.__cause__ is error
    sources.assert_closed("a", "b")
    with pytest.raises(RuntimeError, match=f"a source raised {type(error).__name__}"):
        async with merge(sources.source("a", error=KINDS[kind]())) as items:
            await anext(items)


async def test_only_the_first_of_several_failures_is_raised(sources: Sources, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="first"):
        async with merge(
            sources.source("a", 1, error=ValueError("first")), sources.source("b", 1.5, error=ValueError("second"))
        ) as items:
            await anyio.sleep(5)
            async for _ in items:
                pass
    sources.assert_closed("a", "b")


async def test_an_item_that_is_an_exception_is_an_item() -> None:
    error = ValueError("an item")

    async def source() -> AsyncIterator[ValueError]:
        yield error

    async with merge(source()) as items:
        assert [item async for item in items] == [error]


async def test_none_is_an_item() -> None:
    async def source() -> AsyncIterator[None]:
        yield None
        yield None

    async with merge(source()) as items:
        assert [item async for item in items] == [None, None]


async def test_a_source_that_is_cancelled_from_within_does_not_vanish_silently(sources: Sources) -> None:
    """Something it waits for was cancelled by somebody else."""

    async def source() -> AsyncIterator[str]:
        yield "one"
        if issubclass(get_cancelled_exc_class(), asyncio.CancelledError):
            task = asyncio.create_task(asyncio.sleep(1000))
            task.cancel()
            await task
        raise trio.Cancelled._create(source="explicit")

    with anyio.fail_after(LIMIT_S):
        async with merge(source(), sources.source("b", 1), failures=True) as items:
            taken = [item async for item in items]
    assert [item for item in taken if isinstance(item, str)] == ["one", "b0"]
    assert [type(item) for item in taken if not isinstance(item, str)] == [RuntimeError]


# Leaving


async def test_leaving_early_closes_every_source_and_waits_for_that(sources: Sources) -> None:
    async with merge(
        sources.source("a", 1, endless=True),
        sources.source("b", *[0] * 100),
        sources.source("c", 100),
        sources.source("d"),
    ) as items:
        await anyio.sleep(2)
        await anext(items)
        left_at = current_time()
    sources.assert_closed("a", "b", "c", "d")
    assert current_time() == pytest.approx(left_at + 0.3)  # all at once, not one after the other


async def test_leaving_at_once_closes_what_has_begun(sources: Sources) -> None:
    async with merge(sources.source("a", 1), sources.source("b", 0, 0)):
        pass
    sources.assert_closed(*sources.tasks)


@pytest.mark.parametrize("raised", [KeyError("mine"), anyio.EndOfStream(), StopAsyncIteration()], ids=repr)
async def test_an_exception_in_the_block_comes_out_as_it_is(raised: Exception, sources: Sources) -> None:
    with pytest.raises(type(raised)) as info:
        async with merge(sources.source("a", 1, endless=True)):
            await anyio.sleep(2)
            raise raised
    assert info.value is raised
    sources.assert_closed("a")


async def test_leaving_while_a_failure_waits_to_be_handed_over(sources: Sources) -> None:
    """The buffer is full, so the failed source stands there with its error when the block is left."""
    async with merge(sources.source("a", 0, error=ValueError("late")), buffer=1):
        await anyio.sleep(5)
    sources.assert_closed("a")


async def test_leaving_while_a_failure_waits_with_a_rendezvous(sources: Sources) -> None:
    async with merge(sources.source("a", error=ValueError("late")), sources.source("b", 0), buffer=0):
        await anyio.sleep(5)
    sources.assert_closed("a", "b")


async def test_a_source_that_fails_while_it_is_closed_is_logged(
    sources: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    async def source() -> AsyncIterator[str]:
        try:
            yield "one"
            await anyio.sleep_forever()
        finally:
            raise RuntimeError("broken on the way out")

    async with merge(source(), sources.source("b", endless=True)) as items:
        assert await anext(items) == "one"
        await anyio.sleep(1)
    sources.assert_closed("b")
    (record,) = caplog.records
    assert record.getMessage() == "a merged source failed while it was closed"


async def test_a_source_that_does_not_close_in_time_is_cancelled_again(caplog: pytest.LogCaptureFixture) -> None:
    async def source() -> AsyncIterator[str]:
        try:
            yield "one"
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(1000)

    async with merge(source()) as items:
        assert await anext(items) == "one"
        await anyio.sleep(1)
    if get_cancelled_exc_class() is trio.Cancelled:  # where the first cancellation comes again at once
        assert current_time() == 1
    else:
        assert 5 < current_time() < 8
        assert "did not close within" in caplog.text


async def test_a_consumer_that_is_cancelled_closes_every_source(sources: Sources) -> None:
    with anyio.move_on_after(2) as scope:
        async with merge(sources.source("a", 1, endless=True), sources.source("b", 100)) as items:
            async for _ in items:
                pass
    assert scope.cancelled_caught
    sources.assert_closed("a", "b")
    assert current_time() == pytest.approx(2.3)


async def test_timeouts_of_its_own_in_a_source_and_around_taking(sources: Sources) -> None:
    async def source() -> AsyncIterator[str]:
        for number in range(3):
            with anyio.move_on_after(1):
                await anyio.sleep_forever()
            yield f"s{number}"
        with anyio.fail_after(1000):
            await anyio.sleep_forever()

    taken: list[str] = []
    async with merge(source(), sources.source("b", 1.5, 100)) as items:
        while len(taken) < 4:
            with anyio.move_on_after(0.4):
                taken.append(text(await anext(items)))
    assert taken == ["s0", "b0", "s1", "s2"]
    sources.assert_closed("b")


async def test_an_iterator_without_aclose_can_be_merged() -> None:
    class Numbers:
        at = 0

        def __aiter__(self) -> "Numbers":
            return self

        async def __anext__(self) -> int:
            self.at += 1
            if self.at > 3:
                raise StopAsyncIteration
            return self.at

    async with merge(Numbers(), Numbers()) as items:
        assert sorted([str(item) async for item in items]) == ["1", "1", "2", "2", "3", "3"]


async def test_without_async_with_it_says_what_to_do(sources: Sources) -> None:
    merged = merge(sources.source("a", 1))
    with pytest.raises(RuntimeError, match="async with merge"):
        async for _ in merged:
            pass
    assert not sources.tasks


async def test_a_merge_within_a_merge(sources: Sources) -> None:
    async def inner() -> AsyncIterator[str]:
        async with merge(sources.source("a", 1, 3), sources.source("b", 2, endless=True)) as items:
            async for item in items:
                yield text(item)

    taken: list[str] = []
    async with merge(inner(), sources.source("c", 1.5, 3, endless=True)) as items:
        while len(taken) < 5:
            taken.append(text(await anext(items)))
    assert taken == ["a0", "c0", "b0", "a1", "c1"]
    sources.assert_closed("a", "b", "c")


# In a handler


def app_of(handler: Any, **values: Any) -> SSEApp:
    return SSEApp([GET("/", handler)], Settings(log="memory", **values))


@pytest.mark.parametrize("reason", ["client", "drain", "timeout", "failed", "finished"])
@pytest.mark.parametrize("suspended", ["waiting", "yielding"])
async def test_a_handler_that_merges_has_closed_all_when_its_stream_ends(
    reason: str, suspended: str, sources: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    reasons: list[str] = []
    if reason == "finished":
        last = sources.source("b", 2)
    elif reason == "failed":
        last = sources.source("b", 2, error=RuntimeError("broken"))
    else:
        last = sources.source("b", 2, 100)
    first = sources.source("a", 1, endless=reason not in ("finished",))

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            async with merge(first, last) as items:
                async for item in items:
                    yield Event(item)
                    if item == "a0" and suspended == "yielding" and reason not in ("failed", "finished"):
                        while True:
                            yield Event("x" * 1000)
        finally:
            reasons.append(request.end_reason)

    app = app_of(handler, buffer_bytes=3000, max_stream_s=8.0 if reason == "timeout" else None)
    with anyio.fail_after(LIMIT_S):
        async with app.running(), connect(app) as exchange, anyio.create_task_group() as tasks:
            await exchange.started.wait()
            exchange.block()
            await anyio.sleep(4)
            if suspended == "waiting":
                exchange.unblock()
            if reason == "client":
                exchange.disconnect()
            elif reason == "drain":
                tasks.start_soon(app.drain, 0)
            elif reason == "timeout":
                await anyio.sleep(5)
            await anyio.sleep(0.01)
            exchange.unblock()
            await exchange.ended.wait()
    assert reasons == [reason]
    sources.assert_closed("a", "b")
    assert exchange.failure is None
    levels = [record.levelno for record in caplog.records]
    assert levels == ([logging.ERROR] if reason == "failed" else [])


async def test_a_handler_streams_what_its_sources_give_together(sources: Sources) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        async with merge(sources.source("a", 1, 2), sources.source("b", 2, 2)) as items:
            async for item in items:
                yield Event(item)

    app = app_of(handler)
    async with app.running(), connect(app) as exchange:
        assert [event.data async for event in exchange.events()] == ["a0", "b0", "a1", "b1"]


async def test_a_handler_may_leave_its_merge_and_go_on(sources: Sources) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        async with merge(sources.source("a", 1, endless=True), sources.source("b", 100)) as items:
            async for item in items:
                yield Event(item)
                break
        yield Event("after")
        await anyio.sleep(1)
        with anyio.move_on_after(1):
            await anyio.sleep_forever()
        yield Event("end")

    app = app_of(handler)
    async with app.running(), connect(app) as exchange:
        assert [event.data async for event in exchange.events()] == ["a0", "after", "end"]
    sources.assert_closed("a", "b")


async def test_an_inner_generator_that_merges_is_closed_by_aclosing(sources: Sources) -> None:
    async def inner() -> AsyncIterator[str]:
        async with merge(sources.source("a", 1, endless=True), sources.source("b", 100)) as items:
            async for item in items:
                yield text(item)

    async with aclosing(inner()) as items:  # type: ignore[type-var]
        async for item in items:
            assert item == "a0"
            break
    sources.assert_closed("a", "b")
