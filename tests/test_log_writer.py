"""Group commit: what is gathered, what a failure takes with it, and that nobody waits for ever or finds a hole."""

import random
from collections import defaultdict
from collections.abc import Callable

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import ssecore.log.writer
from ssecore.errors import LogUnavailable, SSEAppError, TooLarge
from ssecore.log.writer import Batch, Commits, Writer

AWAY = LogUnavailable("the disk is full")


class Engine:
    """Stores when it is told to."""

    def __init__(self, gap_s: float | None = 0.001) -> None:
        self.commits = Commits(self._commit, gap_s)
        self.stored: dict[str, list[bytes]] = defaultdict(list)
        self.sizes: list[int] = []
        self.given: list[Batch] = []
        self.done: Callable[[], None] | None = None
        self.handed_over = anyio.Event()

    def _commit(self, batches: list[Batch], done: Callable[[], None]) -> None:
        assert self.done is None, "one commit under way"
        assert len({batch.stream for batch in batches}) == len(batches), "one batch of each stream"
        self.given, self.done = batches, done
        self.handed_over.set()

    def finish(self, error: SSEAppError | None = None) -> None:
        """The commit of the moment."""
        assert self.done is not None
        self.sizes.append(len(self.given))
        for batch in self.given:
            batch.error = error
            if error is None:
                self.stored[batch.stream] += batch.frames
                batch.last = len(self.stored[batch.stream])
        done, self.done = self.done, None
        self.handed_over = anyio.Event()
        done()

    async def next(self) -> list[Batch]:
        if self.done is None:
            await self.handed_over.wait()
        return self.given


class Told:
    """What a writer is told."""

    def __init__(self, engine: Engine, stream: str = "run") -> None:
        self.writer = Writer(engine.commits, stream, "epoch", self)
        self.told: list[tuple[int, SSEAppError | None]] = []

    def __call__(self, size: int, error: SSEAppError | None) -> None:
        self.told.append((size, error))

    def post(self, *frames: bytes) -> None:
        self.writer.post(list(frames), sum(map(len, frames)))


@pytest.fixture
async def engine() -> Engine:
    engine = Engine()
    engine.commits.open()
    return engine


async def test_what_is_posted_while_a_commit_is_under_way_is_the_next_one(engine: Engine) -> None:
    one, two = Told(engine, "one"), Told(engine, "two")
    one.post(b"a")
    one.post(b"b")
    await engine.next()
    two.post(b"c")
    one.post(b"d")
    await checkpoint()
    assert one.told == two.told == []
    engine.finish()
    assert one.told == [(2, None)]
    await engine.next()
    engine.finish()
    assert one.told == [(2, None), (1, None)] and two.told == [(1, None)]
    assert engine.stored == {"one": [b"a", b"b", b"d"], "two": [b"c"]}
    assert engine.sizes == [1, 2]


async def test_posts_wait_for_each_other_after_a_commit_and_what_is_awaited_does_not() -> None:
    engine = Engine(gap_s=3600)
    engine.commits.open()
    told = Told(engine)
    told.post(b"a")
    await engine.next()
    engine.finish()
    told.post(b"b")
    await checkpoint()
    await checkpoint()
    assert engine.done is None, "it waits for the gap to be over"
    engine.commits.add("topic", "epoch", [b"c"], 1)
    assert {batch.stream for batch in await engine.next()} == {"run", "topic"}, "and goes along with the other"


async def test_a_rows_worth_of_posts_waits_for_no_gap() -> None:
    engine = Engine(gap_s=3600)
    engine.commits.open()
    told = Told(engine)
    told.post(b"a")
    await engine.next()
    engine.finish()
    told.post(b"b" * 40_000)
    told.post(b"c" * 40_000)
    await engine.next()
    assert [batch.size for batch in engine.given] == [40_000], "a row grows no larger"


async def test_after_a_failed_commit_what_was_posted_behind_it_fails_too(engine: Engine) -> None:
    told, other = Told(engine), Told(engine, "other")
    told.post(b"a")
    await engine.next()
    told.post(b"b")
    other.post(b"c")
    engine.finish(AWAY)
    assert told.told == [(1, AWAY), (1, AWAY)] and other.told == []
    with pytest.raises(LogUnavailable, match="the disk is full"):
        told.post(b"d")
    assert told.told == [(1, AWAY), (1, AWAY)]
    await engine.next()
    engine.finish()
    assert other.told == [(1, None)] and engine.stored == {"other": [b"c"]}


async def test_an_append_that_waited_behind_a_failed_one_is_tried(engine: Engine) -> None:
    first = engine.commits.add("topic", "epoch", [b"a"], 1, close=False, meta={"n": 1})
    await engine.next()
    second = engine.commits.add("topic", "epoch", [b"b"], 1)
    engine.finish(AWAY)
    await engine.next()
    engine.finish()
    assert first.error is AWAY and second.error is None and engine.stored["topic"] == [b"b"]


async def test_what_is_refused_at_once_is_not_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssecore.log.facts, "MAX_APPEND_BYTES", 3)
    monkeypatch.setattr(ssecore.log.writer, "_MAX_QUEUED_BYTES", 5)
    told = Told(engine)
    with pytest.raises(TooLarge):
        told.post(b"aaaa")
    told.post(b"aaa")
    told.post(b"bbb")
    with pytest.raises(LogUnavailable, match="too much waits"):
        engine.commits.add("topic", "epoch", [b"c"], 1)
    await engine.next()
    engine.finish()
    engine.commits.add("topic", "epoch", [b"c"], 1)
    assert told.told == [(6, None)]


async def test_who_waits_while_the_service_stops_is_told_and_the_commit_of_that_moment_tells_nobody_twice(
    engine: Engine,
) -> None:
    told = Told(engine)
    told.post(b"a")
    await engine.next()
    told.post(b"b")
    engine.commits.give_up()
    assert [(size, str(error)) for size, error in told.told] == [(1, "the service is about to stop")] * 2
    with pytest.raises(LogUnavailable, match="about to stop"):
        engine.commits.add("topic", "epoch", [b"c"], 1)
    engine.finish()
    assert len(told.told) == 2
    engine.commits.add("topic", "epoch", [b"c"], 1)
    await engine.next()
    with anyio.move_on_after(0.01) as scope:
        await engine.commits.close()
    assert scope.cancelled_caught, "what was taken before is waited for"
    engine.finish()
    await engine.commits.close()
    with pytest.raises(LogUnavailable, match="is closed"):
        engine.commits.add("topic", "epoch", [b"c"], 1)


async def test_a_writer_that_fails_over_the_answer_harms_no_other(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(size: int, error: SSEAppError | None) -> None:
        raise ZeroDivisionError

    Writer(engine.commits, "bad", "epoch", fail).post([b"a"], 1)
    good = Told(engine)
    good.post(b"b")
    await engine.next()
    engine.finish()
    assert good.told == [(1, None)] and "failed over the answer" in caplog.text


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), failing=st.floats(0, 0.3))
async def test_each_writer_stores_a_beginning_of_what_it_posted_and_hears_of_every_byte(
    seed: int, failing: float
) -> None:
    chance = random.Random(seed)
    engine = Engine(chance.choice([0.0, 0.001]))
    engine.commits.open()
    writers = [Told(engine, f"run {number}") for number in range(3)]
    posted: list[list[bytes]] = [[] for _ in writers]
    awaited: list[tuple[bytes, Batch]] = []
    for number in range(chance.randrange(60)):
        for _ in range(chance.randrange(3)):
            await checkpoint()
        if engine.done is not None and chance.random() < 0.5:
            engine.finish(AWAY if chance.random() < failing else None)
        which = chance.randrange(len(writers) + 1)
        frame = b"%d" % number
        if which < len(writers):
            try:
                writers[which].post(frame)
            except LogUnavailable:
                continue
            posted[which].append(frame)
        else:
            awaited.append((frame, engine.commits.add("topic", "epoch", [frame], len(frame))))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.commits.close)
            while engine.commits._queue or engine.commits._in_flight:
                await engine.next()
                engine.finish(AWAY if chance.random() < failing else None)
    for writer, frames in zip(writers, posted, strict=True):
        stored = engine.stored[f"run {writers.index(writer)}"]
        assert stored == frames[: len(stored)], "no hole"
        assert sum(size for size, error in writer.told if error is None) == sum(map(len, stored))
        assert sum(size for size, _ in writer.told) == sum(map(len, frames))
        assert (writer.writer.failed is None) == (stored == frames)
    assert engine.stored["topic"] == [frame for frame, batch in awaited if batch.error is None]
    assert all(batch.resolved for _, batch in awaited) and engine.commits._queued_bytes == 0
