"""The contract of the event log, over every engine: a further one is a name in `ENGINES` and a branch in `make`."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import example, given
from hypothesis import strategies as st

import ssecore.log
from ssecore.errors import (
    BadRequest,
    Conflict,
    EncodeError,
    LogUnavailable,
    NotFound,
    SSEAppError,
    TooLarge,
    TooManyRequests,
    WriterFenced,
)
from ssecore.log import (
    Cursor,
    Ended,
    Gap,
    Log,
    Retention,
    Row,
    Stat,
    framed,
    locate,
    new_epoch,
    parse_cursor,
)
from ssecore.log.facts import joined
from ssecore.log.memory import MemoryLog
from ssecore.log.redis import RedisLog
from ssecore.log.sqlite import SqliteLog
from ssecore.log.writer import Batch
from ssecore.wire import Decoder, Event, encode, encode_json
from tests.needs import needs
from tests.redis_server import KINDS, Kind, serving

ALONE: Final = ("memory", "sqlite")
SHARED: Final = [pytest.param(kind, marks=needs(kind)) for kind in KINDS]
ENGINES: Final = (*ALONE, *SHARED)
START: Final = 1_700_000_000.0
NEVER_S: Final = 3600.0


class Clock:
    """Unix time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def redis_urls() -> Iterator[Callable[[Kind], str]]:
    with ExitStack() as stack:
        yield cache(lambda kind: stack.enter_context(serving(kind)).url)


@pytest.fixture
def make(request: pytest.FixtureRequest, engine: str, tmp_path: Path, clock: Clock) -> Callable[..., Log]:
    """Makes a log; a second one is on the same data."""

    def make(upkeep_s: float = NEVER_S, max_bytes: int | None = None) -> Log:
        if engine == "memory":
            return MemoryLog(clock=clock, upkeep_s=upkeep_s, max_bytes=max_bytes)
        if engine in KINDS:
            url = request.getfixturevalue("redis_urls")(engine)
            options: Any = {"upkeep_s": upkeep_s, "max_bytes": max_bytes, "wait_s": 20.0, "lease_s": 40.0}
            return RedisLog(url, prefix=str(tmp_path), clock=clock, **options)
        return SqliteLog(tmp_path / "log.sqlite", clock=clock, upkeep_s=upkeep_s, max_bytes=max_bytes)

    return make


@pytest.fixture
async def log(make: Callable[..., Log]) -> AsyncIterator[Log]:
    log = make()
    with anyio.fail_after(60):
        async with log.running():
            yield log


def frame(text: object) -> bytes:
    return encode(Event(str(text)))


async def topic(log: Log, name: str = "topic", **keep: Any) -> str:
    """A new topic; gives its epoch."""
    epoch = new_epoch()
    await log.create(name, epoch=epoch, kind="topic", retention=Retention(**keep))
    return epoch


async def run(log: Log, name: str = "run", **facts: Any) -> str:
    epoch = new_epoch()
    await log.create(name, epoch=epoch, **facts)
    return epoch


async def facts(log: Log, stream: str) -> Stat:
    stat = await log.stat(stream)
    assert stat is not None
    return stat


def texts(rows: list[Row], after: int = 0) -> list[str]:
    """What a browser would see."""
    return [event.data for event in Decoder().feed(b"".join(framed(row, after) for row in rows))]


async def everything(log: Log, stream: str, after: int = 0, max_bytes: int = 1000) -> list[Row]:
    """Reads to the end, and checks that the rows hold what a reader may expect of them."""
    rows: list[Row] = []
    while some := await log.read(stream, rows[-1].last if rows else after, max_bytes):
        rows += some
    for row in rows:
        assert row.ends and row.ends[-1] == len(row.body)
    for one, next in pairwise(rows):
        assert next.first == one.last + 1
    return rows


class Watched:
    """What a watcher was told."""

    def __init__(self, log: Log, stream: str) -> None:
        self.rows: list[Row] = []
        self.ends: list[Ended] = []
        self.ended = anyio.Event()
        self.unwatch = log.watch(stream, self)

    def __call__(self, row: Row | None, ended: Ended | None) -> None:
        assert row or ended
        assert not self.ends
        if row:
            self.rows.append(row)
        if ended:
            self.ends.append(ended)
            self.ended.set()


# Pure functions


def row_of(*data: str, first: int = 1, epoch: str = "e" * 22) -> Row:
    return Row(epoch, first, *joined([frame(one) for one in data]))


def test_a_framed_row_has_an_id_behind_each_event() -> None:
    row = row_of("one", "two\nlines", first=41)
    expected = b"data: one\nid: %b.41\n\ndata: two\ndata: lines\nid: %b.42\n\n"
    assert framed(row) == expected % (b"e" * 22, b"e" * 22)
    assert row.last == 42


def test_a_route_may_have_the_id_before_each_event() -> None:
    row = row_of("one", "two\nlines", first=41)
    expected = b"id: %b.41\ndata: one\n\nid: %b.42\ndata: two\ndata: lines\n\n"
    assert framed(row, id_first=True) == expected % (b"e" * 22, b"e" * 22)
    assert framed(row, 41, id_first=True) == b"id: %b.42\ndata: two\ndata: lines\n\n" % (b"e" * 22)


@given(
    data=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20),
    first=st.integers(1, 2**53),
    offset=st.integers(-3, 25),
)
def test_a_row_is_framed_after_any_sequence(data: list[str], first: int, offset: int) -> None:
    row = row_of(*data, first=first)
    after = first - 1 + offset
    events = Decoder().feed(framed(row, after))
    whole = Decoder().feed(framed(row))
    assert [event.id for event in whole] == [f"{row.epoch}.{seq}" for seq in range(first, first + len(data))]
    assert events == whole[max(offset, 0) :]


def test_epochs_are_unguessable_and_fit_a_cursor() -> None:
    epochs = {new_epoch() for _ in range(1000)}
    assert len(epochs) == 1000
    assert all(parse_cursor(f"{epoch}.0") == Cursor(epoch, 0) for epoch in epochs)


@given(seq=st.integers(0, 2**53 - 1))
def test_a_cursor_is_read_as_it_was_written(seq: int) -> None:
    cursor = Cursor("aZ09-_" * 3 + "abcd", seq)
    assert parse_cursor(str(cursor)) == cursor


E: Final = "e" * 22
MALFORMED: Final = (
    *(".", ".x", ".-1", ".+1", ".01", ".00", ". 1", ".1 ", ".1\n", ".1.2", "..1", ".1\0", ".1e3", ".1_0", " .1"),
    *(f".{2**53}", f".{10**30}", ".\u0661", ".\uff11", ".\u00b2"),
)


@pytest.mark.parametrize(
    "text",
    ["", "end", ".", E, *(E + seq for seq in MALFORMED), f"{E[1:]}.1", f"{E}e.1", f"{E[1:]}\u00e9.1", f"{E[1:]}/.1"],
)
def test_a_malformed_cursor_is_refused(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_cursor(text)
    assert caught.value.field == "last_event_id"


@given(text=st.text())
def test_any_text_is_a_cursor_in_its_one_spelling_or_refused(text: str) -> None:
    try:
        cursor = parse_cursor(text)
    except BadRequest:
        return
    assert str(cursor) == text


def test_a_gap_is_json_with_the_names_of_the_wire() -> None:
    assert encode_json(Gap("trimmed", 5, 9)) == b'{"reason":"trimmed","from":5,"to":9}'
    assert encode_json(Gap("expired", 5)) == b'{"reason":"expired","from":5,"to":null}'


class History:
    """A naive model: each event ever written is a number of its own, and a reader is the list of what it has seen.

    `restore` puts an earlier copy of the log back, and opens an epoch, as whoever starts on it has to.
    """

    def __init__(self) -> None:
        self.log: list[int] = []
        self.epochs: list[tuple[str, int]] = []
        self.first = 1
        self.seen: dict[Cursor, list[int]] = {}
        self.events, self.names = count(), count()
        self.copy: tuple[list[int], list[tuple[str, int]], int] = ([], [], 1)
        self.open()

    def look(self) -> None:
        self.seen[Cursor(self.epochs[-1][0], len(self.log))] = list(self.log)

    def open(self) -> None:
        self.epochs.append((f"epoch {next(self.names)}", len(self.log) + 1))
        self.look()

    def append(self) -> None:
        self.log.append(next(self.events))
        self.look()

    def trim(self) -> None:
        self.first = min(self.first + 1, len(self.log) + 1)

    def save(self) -> None:
        self.copy = (list(self.log), list(self.epochs), self.first)

    def restore(self) -> None:
        log, epochs, self.first = self.copy
        self.log, self.epochs = list(log), list(epochs)
        self.open()

    def expected(self, cursor: Cursor) -> tuple[int, Gap | None]:
        seen, kept = self.seen[cursor], self.first - 1
        if cursor.epoch not in dict(self.epochs):
            return kept, Gap("expired", cursor.seq + 1)
        common = 0
        while common < min(len(seen), len(self.log)) and seen[common] == self.log[common]:
            common += 1
        if common < len(seen):
            return max(common, kept), Gap("diverged", common + 1, max(len(seen), kept))
        if len(seen) < kept:
            return kept, Gap("trimmed", len(seen) + 1, kept)
        return len(seen), None


STEPS: Final = [*[History.append] * 3, History.trim, History.open, History.save, History.restore]


@given(steps=st.lists(st.sampled_from(STEPS), max_size=60))
@example(steps=[*[History.append] * 3, History.restore, *[History.append] * 4, *[History.trim] * 2])
@example(steps=[History.save, *[History.append] * 2, History.open, History.append, History.restore, History.append])
@example(
    steps=[History.append, History.save, History.append, History.restore, *[History.append] * 3, *[History.trim] * 3]
)
def test_a_cursor_is_located_where_what_was_seen_and_what_is_kept_part(steps: list[Callable[[History], None]]) -> None:
    history = History()
    for step in steps:
        step(history)
    stat = Stat("s", "topic", tuple(history.epochs), START, START, history.first, len(history.log))
    for cursor in history.seen:
        assert locate(stat, cursor) == history.expected(cursor)


def test_a_number_above_the_top_has_diverged() -> None:
    stat = Stat("s", "run", (("a", 1),), START, START, 1, 5)
    assert locate(stat, Cursor("a", 5)) == (5, None)
    assert locate(stat, Cursor("a", 6)) == (5, Gap("diverged", 6, 6))


# Streams and their facts


async def test_a_new_stream_is_empty_and_open(log: Log) -> None:
    epoch = new_epoch()
    keep = Retention(events=7, bytes=8, age_s=9.5)
    meta = {"state": "running", "parameters": [1, None, "ü"]}
    stat, new = await log.create("run/1", epoch=epoch, kind="run", owner="ann", meta=meta, key="a key", retention=keep)
    assert new
    assert stat == Stat("run/1", "run", ((epoch, 1),), START, START, 1, 0, 0, False, "ann", meta, "a key", keep)
    assert await log.stat("run/1") == await log.find(epoch=epoch) == await log.find(key="a key") == stat


async def test_what_is_not_there_is_none(log: Log) -> None:
    await run(log)
    assert await log.stat("other") is None
    assert await log.find(epoch=new_epoch()) is None
    assert await log.find(key="other") is None
    assert await log.read("other", 0, 1000) == []


async def test_a_name_is_given_once(log: Log) -> None:
    epoch = await run(log, meta={"n": 1})
    stat, new = await log.create("run", epoch=new_epoch(), meta={"n": 2})
    assert not new
    assert stat.epochs == ((epoch, 1),) and stat.meta == {"n": 1}


async def test_a_key_is_given_once_even_to_two_at_the_same_moment(log: Log) -> None:
    made: list[tuple[Stat, bool]] = []

    async def create(name: str) -> None:
        made.append(await log.create(name, epoch=new_epoch(), key="key"))

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(create, f"run {number}")
    assert [new for _, new in made].count(True) == 1
    assert len({stat.stream for stat, _ in made}) == 1
    assert len(await log.runs(None, 100)) == 1


async def test_a_key_is_free_again_after_its_stream(log: Log) -> None:
    await run(log, "one", key="key")
    await log.delete("one")
    stat, new = await log.create("two", epoch=new_epoch(), key="key")
    assert new and stat.stream == "two"


async def test_an_epoch_is_opened_once(log: Log) -> None:
    epoch = await run(log)
    with pytest.raises(Conflict):
        await log.create("another", epoch=epoch)
    assert await log.stat("another") is None
    with pytest.raises(Conflict):
        await log.open("run", epoch)


async def test_meta_is_json_and_a_copy(log: Log) -> None:
    meta: dict[str, Any] = {"pair": (1, 2)}
    epoch = await run(log, meta=meta)
    meta["pair"] = "changed later"
    assert (await facts(log, "run")).meta == {"pair": [1, 2]}
    with pytest.raises(EncodeError):
        await log.append("run", [frame(1)], epoch=epoch, meta={"no JSON": object()})
    with pytest.raises(EncodeError):
        await log.create("other", epoch=new_epoch(), meta={"no JSON": object()})
    assert (await facts(log, "run")).last == 0


# Append and read


async def test_sequences_start_at_one_and_have_no_holes(log: Log, clock: Clock) -> None:
    epoch = await run(log)
    assert await log.append("run", [frame("a")], epoch=epoch) == 1
    clock.now += 5
    assert await log.append("run", [frame("b"), frame("c")], epoch=epoch, meta={"n": 1}) == 3
    rows = await everything(log, "run")
    assert texts(rows) == ["a", "b", "c"]
    stat = await facts(log, "run")
    assert (stat.first, stat.last, stat.size) == (1, 3, sum(len(row.body) for row in rows))
    assert (stat.created, stat.updated, stat.meta) == (START, START + 5, {"n": 1})


async def test_an_append_of_nothing_asks_whether_the_writer_still_may(log: Log, clock: Clock) -> None:
    epoch = await run(log)
    await log.append("run", [frame("a")], epoch=epoch)
    before = await facts(log, "run")
    clock.now += 5
    assert await log.append("run", [], epoch=epoch) == 1
    assert await facts(log, "run") == before
    with pytest.raises(WriterFenced):
        await log.append("run", [], epoch=new_epoch())


async def test_an_append_to_nowhere_is_refused(log: Log) -> None:
    with pytest.raises(NotFound):
        await log.append("nowhere", [frame(1)], epoch=new_epoch())
    with pytest.raises(NotFound):
        await log.open("nowhere", new_epoch())


async def test_an_append_without_measure_is_refused(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = await run(log)
    monkeypatch.setattr(ssecore.log.facts, "MAX_APPEND_BYTES", 100)
    with pytest.raises(TooLarge):
        await log.append("run", [frame("x" * 60), frame("x" * 60)], epoch=epoch)
    assert (await facts(log, "run")).last == 0


async def test_a_read_begins_with_the_row_that_holds_the_next_event(log: Log) -> None:
    epoch = await run(log)
    for start in range(0, 100, 10):
        await log.append("run", [frame(n) for n in range(start + 1, start + 11)], epoch=epoch)
    for after in range(101):
        rows = await log.read("run", after, 100_000)
        assert texts(rows, after) == [str(n) for n in range(after + 1, 101)]
    assert await log.read("run", 1000, 100_000) == []


async def test_a_read_is_bounded_and_gives_a_row_at_least(log: Log) -> None:
    epoch = await run(log)
    for _ in range(10):
        await log.append("run", [frame("x" * 92)], epoch=epoch)
    assert len(await log.read("run", 0, 100)) == 1
    assert len(await log.read("run", 0, 101)) == 2
    assert len(await log.read("run", 3, 1_000_000)) == 7
    assert len(await log.read("run", 0, 0)) == 1


async def test_large_rows_and_any_byte_come_back_as_they_went_in(log: Log) -> None:
    epoch = await run(log)
    frames = [b"data: " + bytes(random.Random(1).randbytes(n * 997)) + b"\n\n" for n in range(100)]
    await log.append("run", frames, epoch=epoch)
    (row,) = await log.read("run", 0, 1)
    assert row == Row(epoch, 1, *joined(frames))


@pytest.mark.parametrize("seed", range(3))
async def test_many_appenders_make_one_sequence(log: Log, seed: int) -> None:
    """Each append is one block of the sequence, its caller knows where, and readers at work see only prefixes."""
    random_ = random.Random(seed)
    epochs = {name: await topic(log, name) for name in ("a", "b")}
    watched = {name: Watched(log, name) for name in epochs}
    blocks: dict[str, dict[int, list[str]]] = {name: {} for name in epochs}
    number = count()
    plans = [[(random_.choice("ab"), random_.randint(1, 5)) for _ in range(20)] for _ in range(30)]
    done = False

    async def append(plan: list[tuple[str, int]]) -> None:
        for stream, events in plan:
            data = [str(next(number)) for _ in range(events)]
            last = await log.append(stream, [frame(one) for one in data], epoch=epochs[stream])
            blocks[stream][last] = data
            rows = await log.read(stream, last - events, 1)
            assert texts(rows, last - events)[:events] == data, "who has appended reads it"

    async def read(stream: str) -> None:
        prefix: list[str] = []
        while not done:
            rows = await log.read(stream, len(prefix), 500)
            assert not rows or rows[0].first <= len(prefix) + 1 <= rows[0].last
            prefix += texts(rows, len(prefix))
            await checkpoint()
        whole = texts(await everything(log, stream))
        assert whole[: len(prefix)] == prefix

    async with anyio.create_task_group() as readers:
        readers.start_soon(read, "a")
        readers.start_soon(read, "b")
        async with anyio.create_task_group() as appenders:
            for plan in plans:
                appenders.start_soon(append, plan)
        done = True

    for stream in epochs:
        whole = texts(await everything(log, stream))
        assert texts(watched[stream].rows) == whole
        assert len(whole) == (await facts(log, stream)).last == sum(map(len, blocks[stream].values()))
        for last, data in blocks[stream].items():
            assert whole[last - len(data) : last] == data


async def test_a_refusal_fails_nobody_else(log: Log) -> None:
    epoch = await run(log)
    failures: list[SSEAppError] = []

    async def append(stream: str, epoch: str) -> None:
        try:
            await log.append(stream, [frame(1)], epoch=epoch)
        except SSEAppError as error:
            failures.append(error)

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(append, "run", epoch)
            group.start_soon(append, "run", new_epoch())
            group.start_soon(append, "nowhere", epoch)
    assert sorted(error.code for error in failures) == ["fenced"] * 10 + ["not_found"] * 10
    assert (await facts(log, "run")).last == 10


async def test_a_cancelled_append_went_in_wholly_or_not_at_all(log: Log) -> None:
    epoch = await run(log)
    done: dict[str, int] = {}

    async def append(name: str, cancelled: bool) -> None:
        with anyio.CancelScope() as scope:
            if cancelled:
                scopes.append(scope)
            done[name] = await log.append("run", [frame(f"{name} 1"), frame(f"{name} 2")], epoch=epoch)

    scopes: list[anyio.CancelScope] = []
    async with anyio.create_task_group() as group:
        for number in range(40):
            group.start_soon(append, str(number), number % 2 == 0)
            if number % 5 == 0:
                await checkpoint()
                for scope in scopes:
                    scope.cancel()
    assert await log.append("run", [frame("end")], epoch=epoch) == (await facts(log, "run")).last
    whole = texts(await everything(log, "run"))
    assert len(whole) == (await facts(log, "run")).last and len(set(whole)) == len(whole)
    assert {str(number) for number in range(1, 40, 2)} <= set(done)
    for name, last in done.items():
        assert whole[last - 2 : last] == [f"{name} 1", f"{name} 2"]
    for one, two in zip(whole[:-1:2], whole[1::2], strict=True):
        assert one.removesuffix("1") == two.removesuffix("2")


# Watching


async def test_who_watches_and_then_reads_misses_nothing(log: Log) -> None:
    epoch = await topic(log)
    lists: list[list[str]] = []

    async def append() -> None:
        for number in range(200):
            await log.append("topic", [frame(number)], epoch=epoch)

    async def read(turns: int) -> None:
        for _ in range(turns):
            await checkpoint()
        watched = Watched(log, "topic")
        rows = await everything(log, "topic")
        await finished.wait()
        top = rows[-1].last if rows else 0
        lists.append(texts(rows) + [text for row in watched.rows for text in texts([row], top)])
        for one, next in pairwise(watched.rows):
            assert next.first == one.last + 1

    finished = anyio.Event()
    async with anyio.create_task_group() as readers:
        async with anyio.create_task_group() as appender:
            appender.start_soon(append)
            for turns in range(0, 300, 10):
                readers.start_soon(read, turns)
        finished.set()
    assert lists == [[str(number) for number in range(200)]] * 30


async def test_a_watcher_is_told_when_it_is_in_the_log_and_before_its_writer_goes_on(log: Log) -> None:
    epoch = await topic(log)
    watched = Watched(log, "topic")
    for number in range(1, 4):
        await log.append("topic", [frame(number)], epoch=epoch)
        assert watched.rows[-1].last == number
    await log.append("topic", [], epoch=epoch, meta={"n": 1})
    assert watched.rows == await everything(log, "topic")
    watched.unwatch()
    watched.unwatch()
    await log.append("topic", [frame(4)], epoch=epoch)
    assert len(watched.rows) == 3


async def test_a_stream_can_be_watched_before_it_is_there(log: Log) -> None:
    watched = Watched(log, "run")
    epoch = await run(log)
    await log.append("run", [frame("a")], epoch=epoch, close=True)
    assert texts(watched.rows) == ["a"] and watched.ends == ["closed"]


async def test_a_watcher_that_fails_harms_neither_the_writer_nor_the_next(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    epoch = await topic(log)

    def fail(row: Row | None, ended: Ended | None) -> None:
        raise RuntimeError("a watcher's own trouble")

    log.watch("topic", fail)
    watched = Watched(log, "topic")
    assert await log.append("topic", [frame("a")], epoch=epoch) == 1
    assert await log.append("topic", [frame("b")], epoch=epoch) == 2
    assert texts(watched.rows) == ["a", "b"]
    assert "a watcher's own trouble" in caplog.text


async def test_a_watch_can_be_ended_by_another_watcher(log: Log) -> None:
    epoch = await topic(log)
    log.watch("topic", lambda row, ended: second.unwatch())
    second = Watched(log, "topic")
    await log.append("topic", [frame("a")], epoch=epoch, close=True)
    assert second.rows == [] and second.ends == []


# Close, fence, delete


async def test_a_close_goes_in_with_the_last_events(log: Log) -> None:
    epoch = await run(log)
    watched = Watched(log, "run")
    await log.append("run", [frame("a")], epoch=epoch)
    assert await log.append("run", [frame("b")], epoch=epoch, close=True, meta={"state": "completed"}) == 2
    stat = await facts(log, "run")
    assert stat.closed and stat.meta == {"state": "completed"}
    assert texts(watched.rows) == texts(await everything(log, "run")) == ["a", "b"]
    assert watched.ends == ["closed"]


async def test_a_closed_stream_is_closed_for_good(log: Log) -> None:
    epoch = await run(log)
    watched = Watched(log, "run")
    assert await log.append("run", [], epoch=epoch, close=True) == 0
    assert watched.ends == ["closed"] and watched.rows == []
    before = await facts(log, "run")
    for close, meta in ((False, None), (True, None), (False, {"n": 1})):
        with pytest.raises(WriterFenced):
            await log.append("run", [frame("late")], epoch=epoch, close=close, meta=meta)
    with pytest.raises(WriterFenced):
        await log.open("run", new_epoch())
    assert await facts(log, "run") == before


async def test_a_new_epoch_fences_earlier_writers(log: Log) -> None:
    old = await run(log)
    await log.append("run", [frame("a")], epoch=old)
    new = new_epoch()
    stat = await log.open("run", new)
    assert stat.epochs == ((old, 1), (new, 2))
    for close in (False, True):
        with pytest.raises(WriterFenced):
            await log.append("run", [frame("late")], epoch=old, close=close)
    assert await log.append("run", [frame("b")], epoch=new) == 2
    rows = await everything(log, "run")
    assert [(row.epoch, row.first) for row in rows] == [(old, 1), (new, 2)]
    assert await log.find(epoch=old) == await log.find(epoch=new) == await log.stat("run")


async def test_an_epoch_that_opens_among_appends_parts_them_cleanly(log: Log) -> None:
    old, new = await topic(log), new_epoch()
    refused = 0

    async def append(epoch: str) -> None:
        nonlocal refused
        try:
            await log.append("topic", [frame(epoch)], epoch=epoch)
        except WriterFenced:
            refused += 1

    async def take_over() -> None:
        await log.open("topic", new)
        for _ in range(5):
            tasks.start_soon(append, new)

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(append, old)
            if number == 10:
                tasks.start_soon(take_over)
    rows = await everything(log, "topic")
    stat = await facts(log, "topic")
    assert stat.last == 25 - refused
    assert all((row.epoch == new) == (row.first >= stat.epochs[1][1]) for row in rows)
    assert texts(rows) == [old] * (20 - refused) + [new] * 5


async def test_epochs_are_remembered_as_long_as_their_events_and_then_up_to_a_bound(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssecore.log.facts, "MAX_EPOCHS", 3)
    epochs = [await topic(log, events=2)]
    for number in range(1, 6):
        await log.append("topic", [frame(number)], epoch=epochs[-1])
        epochs.append(new_epoch())
        await log.open("topic", epochs[-1])
    stat = await facts(log, "topic")
    assert [epoch for epoch, _ in stat.epochs] == epochs[-3:]
    assert [epoch for epoch in epochs if await log.find(epoch=epoch)] == epochs[-3:]
    assert locate(stat, Cursor(epochs[0], 1)) == (3, Gap("expired", 2))

    kept = [await topic(log, "kept")]
    for number in range(5):
        await log.append("kept", [frame(number)], epoch=kept[-1])
        kept.append(new_epoch())
        await log.open("kept", kept[-1])
    assert [epoch for epoch, _ in (await facts(log, "kept")).epochs] == kept


async def test_a_deleted_stream_is_gone_and_its_name_free(log: Log) -> None:
    epoch = await run(log, key="key", owner="ann")
    await log.append("run", [frame("a")], epoch=epoch)
    watched = Watched(log, "run")
    await log.delete("run")
    assert watched.ends == ["deleted"]
    assert await log.stat("run") is await log.find(epoch=epoch) is await log.find(key="key") is None
    assert await log.read("run", 0, 1000) == []
    assert await log.runs("ann", 10) == []
    with pytest.raises(NotFound):
        await log.append("run", [frame("late")], epoch=epoch)
    await log.delete("run")

    again = await run(log)
    assert await log.find(key="key") is None
    assert await log.append("run", [frame("b")], epoch=again) == 1
    await log.upkeep()
    assert texts(await everything(log, "run")) == ["b"]
    assert locate(await facts(log, "run"), Cursor(epoch, 1)) == (0, Gap("expired", 2))


async def test_a_stream_is_deleted_unless_another_process_was_told_of_it(log: Log) -> None:
    await run(log)
    assert await log.delete("run", unless_answered=True)
    assert await log.stat("run") is None
    assert await log.delete("run", unless_answered=True), "a call may be made again"

    epoch = await run(log)  # under its name: what was told before is forgotten
    if log.peers is not None:
        await log.peers.mark_answered("run")
    # Where there is one process alone, that one knows whom it has told.
    assert await log.delete("run", unless_answered=True) == (not (log.peers is not None))
    if log.peers is not None:
        assert await log.append("run", [frame("a")], epoch=epoch, close=True) == 1
        assert await log.delete("run")
        await run(log)
        assert await log.delete("run", unless_answered=True)


async def test_what_measures_the_log_hears_of_each_commit_and_its_failure_harms_nobody(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    epoch = await run(log)
    heard: list[tuple[str, int, bool]] = []

    def measure(batches: list[Batch], seconds: float) -> None:
        assert seconds >= 0
        heard.extend((batch.stream, len(batch.frames), batch.error is None) for batch in batches)
        raise ZeroDivisionError

    log.on_commit = measure
    assert await log.append("run", [frame(1), frame(2)], epoch=epoch) == 2
    with pytest.raises(WriterFenced):
        await log.append("run", [frame(3)], epoch=new_epoch())
    assert heard == [("run", 2, True), ("run", 1, False)]
    assert "what measures the event log failed" in caplog.text


# What is posted, and not awaited


async def test_what_is_posted_is_stored_in_order_and_told_after_the_watchers(log: Log) -> None:
    epoch = await run(log)
    seen: list[str] = []
    done = anyio.Event()
    log.watch("run", lambda row, ended: seen.extend(texts([row] if row else [])))

    def told(size: int, error: SSEAppError | None) -> None:
        assert error is None
        sizes.append((size, len(seen)))
        if sum(size for size, _ in sizes) == len(b"".join(frames)):
            done.set()

    sizes: list[tuple[int, int]] = []
    frames = [frame(number) for number in range(50)]
    writer = log.writer("run", epoch, told)
    for number, one in enumerate(frames):
        writer.post([one], len(one))
        if number % 7 == 0:
            await checkpoint()
    await done.wait()
    assert seen == texts(await everything(log, "run")) == [str(number) for number in range(50)]
    assert sizes[-1][1] == 50
    assert await log.append("run", [frame("end")], epoch=epoch, close=True) == 51


async def test_a_writer_that_was_fenced_is_told_and_posts_no_more(log: Log) -> None:
    epoch = await run(log)
    heard: list[SSEAppError | None] = []
    done = anyio.Event()

    def told(size: int, error: SSEAppError | None) -> None:
        heard.append(error)
        done.set()

    writer = log.writer("run", epoch, told)
    await log.open("run", new_epoch())
    writer.post([frame("a")], len(frame("a")))
    await done.wait()
    assert isinstance(heard[0], WriterFenced)
    with pytest.raises(WriterFenced):
        writer.post([frame("b")], len(frame("b")))
    assert await everything(log, "run") == []


# Topics, whose epochs are the engine's


async def test_a_topic_is_created_when_it_is_first_published_to(log: Log) -> None:
    keep = Retention(events=2)
    first = await log.publish("topic", [frame(1), frame(2)], retention=keep)
    stat = await facts(log, "topic")
    assert (stat.kind, stat.epochs, stat.retention, first.seq) == ("topic", ((first.epoch, 1),), keep, 2)
    assert await log.publish("topic", [frame(3)], retention=keep) == Cursor(first.epoch, 3)
    assert await log.publish("topic", [], retention=keep) == Cursor(first.epoch, 3), "nothing, and where it would go"
    assert texts(await everything(log, "topic"), 1) == ["2", "3"]
    assert locate(await facts(log, "topic"), first) == (2, None)


async def test_publishers_that_meet_share_an_epoch_and_each_gets_its_own_id(log: Log) -> None:
    cursors: list[Cursor] = []

    async def publish(number: int) -> None:
        cursors.append(await log.publish("topic", [frame(number)] * 2, retention=Retention()))

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(publish, number)
    assert len({cursor.epoch for cursor in cursors}) == 1
    assert sorted(cursor.seq for cursor in cursors) == [*range(2, 42, 2)]


async def test_each_process_opens_an_epoch_of_its_own_unless_they_share_the_log(make: Callable[..., Log]) -> None:
    one, two = make(), make()
    async with one.running():
        before = await one.publish("topic", [frame(1)], retention=Retention())
    async with two.running():
        if await two.stat("topic") is None:
            return  # in memory
        after = await two.publish("topic", [frame(2)], retention=Retention(events=1))
        stat = await facts(two, "topic")
        assert (after.epoch == before.epoch) == (two.peers is not None)
        assert stat.retention.events == (None if (two.peers is not None) else 1)
        assert after.seq == 2 and locate(stat, before) == (1, None)
        assert (await two.publish("topic", [frame(3)], retention=Retention())).epoch == after.epoch


async def test_publishers_go_on_where_another_has_opened_or_deleted_the_topic(log: Log) -> None:
    before = await log.publish("topic", [frame(1)], retention=Retention())
    await log.open("topic", other := new_epoch())
    await log.append("topic", [frame("other")], epoch=other)
    after = await log.publish("topic", [frame(2)], retention=Retention())
    assert after.seq == 3 and after.epoch != before.epoch and (after.epoch == other) == (log.peers is not None)
    await log.delete("topic")
    assert (await log.publish("topic", [frame(1)], retention=Retention())).seq == 1


async def test_runs_are_listed_newest_first_by_owner(log: Log, clock: Clock) -> None:
    for number in range(6):
        await run(log, f"run {number}", owner=[None, "ann", "bob"][number % 3])
        clock.now += 1
    await topic(log)
    assert [stat.stream for stat in await log.runs("ann", 10)] == ["run 4", "run 1"]
    assert [stat.stream for stat in await log.runs(None, 10)] == ["run 3", "run 0"]
    assert [stat.stream for stat in await log.runs("bob", 1)] == ["run 5"]
    assert await log.runs("eve", 10) == []


@pytest.mark.parametrize("engine", ALONE, indirect=True)  # where others share the log: tests/test_log_redis.py
async def test_unfinished_are_the_runs_that_are_not_closed(log: Log) -> None:
    epochs = {name: await run(log, name) for name in ("one", "two", "three")}
    await topic(log)
    await log.append("two", [frame("end")], epoch=epochs["two"], close=True)
    assert [stat.stream for stat in await log.unfinished()] == ["one", "three"]


# Retention


@pytest.mark.parametrize("batch", [1, 3, 25])
async def test_a_topic_keeps_its_newest_events_exactly_by_count(log: Log, batch: int) -> None:
    epoch = await topic(log, events=10)
    for start in range(0, 100, batch):
        last = await log.append("topic", [frame(n + 1) for n in range(start, start + batch)], epoch=epoch)
        stat = await facts(log, "topic")
        assert (stat.first, stat.last) == (max(1, last - 9), last)
        rows = await everything(log, "topic")
        assert rows[0].first <= stat.first <= rows[0].last, "what is expired wholly is gone"
        assert stat.size == sum(len(row.body) for row in rows)
        assert texts(rows, stat.first - 1) == [str(n) for n in range(stat.first, last + 1)]


async def test_what_is_expired_is_not_read_even_where_it_is_still_there(log: Log) -> None:
    epoch = await topic(log, events=2)
    for number in range(1, 4):
        await log.append("topic", [frame(number)], epoch=epoch)
    await log.append("topic", [frame(4), frame(5)], epoch=epoch, close=True)
    assert (await facts(log, "topic")).first == 4
    assert texts(await everything(log, "topic")) == ["4", "5"]


async def test_a_topic_keeps_no_more_bytes_than_told_in_whole_rows(log: Log) -> None:
    epoch = await topic(log, bytes=1000)
    for number in range(1, 51):
        await log.append("topic", [frame("x" * 92)] * (number % 3 + 1), epoch=epoch)
        stat, rows = await facts(log, "topic"), await everything(log, "topic")
        assert stat.size == sum(len(row.body) for row in rows) <= 1000
        assert stat.first == rows[0].first
        assert stat.size > 600 or stat.first == 1
    await log.append("topic", [frame("x" * 5000)], epoch=epoch)
    (row,) = await everything(log, "topic")
    stat = await facts(log, "topic")
    assert stat.first == stat.last == row.first, "the newest row stays, however large"


async def test_a_topic_drops_what_is_older_than_its_age_and_keeps_its_numbers(log: Log, clock: Clock) -> None:
    epoch = await topic(log, age_s=60.0)
    for number in range(1, 11):
        await log.append("topic", [frame(number)], epoch=epoch)
        clock.now += 10
    assert (await facts(log, "topic")).first == 5, "appended 60 s ago and more: gone, with the last append"
    clock.now += 20
    await log.upkeep()
    stat = await facts(log, "topic")
    assert (stat.first, stat.last) == (8, 10)
    assert texts(await everything(log, "topic")) == ["8", "9", "10"]

    clock.now += 1_000_000
    await log.upkeep()
    stat = await facts(log, "topic")
    assert (stat.first, stat.last, stat.size, stat.closed) == (11, 10, 0, False)
    assert await log.read("topic", 0, 1000) == []
    assert locate(stat, Cursor(epoch, 8)) == (10, Gap("trimmed", 9, 10))
    assert locate(stat, Cursor(epoch, 10)) == (10, None)
    assert await log.append("topic", [frame(11)], epoch=epoch) == 11
    assert texts(await log.read("topic", 10, 1000)) == ["11"]


async def test_a_topic_without_events_is_deleted_when_it_has_not_been_written_to_for_a_while(
    log: Log, clock: Clock
) -> None:
    kept_s = ssecore.log.facts.EMPTY_TOPIC_S
    epoch, old = await topic(log), await topic(log, "old", age_s=60.0)
    await log.append("old", [frame("a")], epoch=old)
    forever = await topic(log, "forever")
    await log.append("forever", [frame("a")], epoch=forever)
    clock.now += kept_s - 1
    await log.upkeep()
    assert (await facts(log, "old")).first == 2, "it has been empty from now on"
    await log.append("topic", [], epoch=epoch, meta={})
    clock.now += kept_s - 1
    await log.upkeep()
    assert await log.stat("topic") and await log.stat("old")
    watched = Watched(log, "old")
    clock.now += 1
    await log.upkeep()
    with anyio.fail_after(10):  # over Redis it is a message
        await watched.ended.wait()
    assert watched.ends == ["deleted"]
    assert await log.stat("topic") is await log.find(epoch=epoch) is await log.stat("old") is None
    assert texts(await everything(log, "forever")) == ["a"]

    again = await topic(log)
    assert await log.append("topic", [frame("b")], epoch=again) == 1
    assert locate(await facts(log, "topic"), Cursor(epoch, 0)) == (0, Gap("expired", 1))


async def test_retention_can_be_changed_when_a_writer_takes_over(log: Log) -> None:
    epoch = await topic(log)
    await log.append("topic", [frame("old")] * 3, epoch=epoch)
    for number in range(20):
        await log.append("topic", [frame(number)], epoch=epoch)
    stat = await log.open("topic", new_epoch(), retention=Retention(events=5))
    assert (stat.first, stat.last, stat.retention) == (19, 23, Retention(events=5))
    assert stat == await facts(log, "topic")
    assert texts(await everything(log, "topic")) == ["15", "16", "17", "18", "19"]
    stat = await log.open("topic", new_epoch())
    assert stat.retention == Retention(events=5)


async def test_far_more_than_a_step_is_trimmed(log: Log) -> None:
    epoch = await topic(log)
    for number in range(1000):
        await log.append("topic", [frame(number)], epoch=epoch)
    await log.open("topic", epoch := new_epoch(), retention=Retention(bytes=50))
    await log.upkeep()
    stat = await facts(log, "topic")
    assert stat.size <= 50 and stat.first > 990
    assert len(await everything(log, "topic")) == 1001 - stat.first
    assert await log.append("topic", [frame("next")], epoch=epoch) == 1001


async def test_a_run_is_kept_whole_and_goes_at_its_age_after_its_close(log: Log, clock: Clock) -> None:
    epoch = await run(log, retention=Retention(events=2, bytes=10, age_s=60.0), key="key")
    for number in range(1, 6):
        clock.now += 100
        await log.append("run", [frame(number)], epoch=epoch)
        await log.upkeep()
    clock.now += 1000
    await log.append("run", [frame("end")], epoch=epoch, close=True)
    watched = Watched(log, "run")
    clock.now += 59
    await log.upkeep()
    assert texts(await everything(log, "run")) == ["1", "2", "3", "4", "5", "end"]
    assert (await facts(log, "run")).first == 1
    clock.now += 1
    await log.upkeep()
    with anyio.fail_after(10):  # over Redis it is a message
        await watched.ended.wait()
    assert watched.ends == ["deleted"]
    assert await log.stat("run") is await log.find(epoch=epoch) is await log.find(key="key") is None


async def test_a_closed_topic_goes_as_a_whole(log: Log, clock: Clock) -> None:
    epoch = await topic(log, age_s=60.0, events=100)
    await log.append("topic", [frame(1)], epoch=epoch)
    clock.now += 50
    await log.append("topic", [frame(2)], epoch=epoch, close=True)
    clock.now += 59
    await log.upkeep()
    assert texts(await everything(log, "topic")) == ["1", "2"]
    clock.now += 1
    await log.upkeep()
    assert await log.stat("topic") is None


async def test_retention_is_kept_without_being_asked(make: Callable[..., Log], clock: Clock) -> None:
    log = make(upkeep_s=0.001)
    with anyio.fail_after(10):
        async with log.running():
            epoch = await run(log, retention=Retention(age_s=60.0))
            await log.append("run", [], epoch=epoch, close=True)
            watched = Watched(log, "run")
            assert await log.stat("run"), "from here on it misses nothing"
            clock.now += 60
            await watched.ended.wait()
    assert watched.ends == ["deleted"]


async def test_what_ends_the_block_is_raised_as_it_is(make: Callable[..., Log]) -> None:
    with pytest.raises(ZeroDivisionError):
        async with make().running():
            raise ZeroDivisionError


async def test_a_cancelled_program_leaves_in_order(make: Callable[..., Log]) -> None:
    log = make()
    with anyio.CancelScope() as scope:
        async with log.running():
            epoch = await run(log)
            await log.append("run", [frame("a")], epoch=epoch)
            scope.cancel()
            await anyio.sleep_forever()
    async with log.running():
        assert texts(await everything(log, "run")) == ["a"]


# A bound in all

#: Of a run: its events are nearly all that it costs, in every engine.
RUN_BYTES: Final = 100_000
MIB: Final = 1024 * 1024


async def closed_run(log: Log, name: str, owner: str | None = None) -> None:
    epoch = await run(log, name, owner=owner, retention=Retention(age_s=86400.0))
    await log.append(name, [frame("x" * (RUN_BYTES // 2))], epoch=epoch)
    await log.append(name, [frame("x" * (RUN_BYTES // 2))], epoch=epoch, close=True)


async def kept(log: Log, names: list[str]) -> list[str]:
    return [name for name in names if await log.stat(name) is not None]


@pytest.fixture
async def small(make: Callable[..., Log]) -> AsyncIterator[Log]:
    """A log that keeps 2 MiB, and 0.2 of each owner."""
    log = make(max_bytes=2 * MIB)
    with anyio.fail_after(60):
        async with log.running():
            yield log


async def test_over_its_bound_the_log_keeps_the_newest_of_what_is_finished(small: Log, clock: Clock) -> None:
    at_work = await run(small, "at work")
    await small.append("at work", [frame("x" * RUN_BYTES)], epoch=at_work)
    names = [f"run {number}" for number in range(60)]
    for name in names:
        clock.now += 1
        await closed_run(small, name)
        await small.upkeep()
    left = await kept(small, names)
    assert left == names[-len(left) :], "the oldest have gone"
    assert 10 <= len(left) <= 20
    for name in left:
        assert [len(text) for text in texts(await everything(small, name))] == [RUN_BYTES // 2] * 2
    assert await small.append("at work", [frame("end")], epoch=at_work, close=True) == 2
    assert len(texts(await everything(small, "at work"))) == 2


async def test_over_its_bound_the_log_drops_the_oldest_events_of_topics_too(small: Log, clock: Clock) -> None:
    epoch = await topic(small)
    for _ in range(60):
        clock.now += 1
        await small.append("topic", [frame("x" * RUN_BYTES)], epoch=epoch)
        await small.upkeep()
    stat = await facts(small, "topic")
    assert stat.last == 60 and 0 < stat.size <= 2 * MIB
    assert len(await everything(small, "topic", max_bytes=MIB)) == stat.last - stat.first + 1
    assert locate(stat, Cursor(epoch, 1)) == (stat.first - 1, Gap("trimmed", 2, stat.first - 1))


async def test_an_owner_over_its_share_loses_its_own_oldest_runs(small: Log, clock: Clock) -> None:
    others = ["bob's", "nobody's"]
    await closed_run(small, "bob's", "bob")
    await closed_run(small, "nobody's")
    names = [f"ann's {number}" for number in range(10)]
    for name in names:
        clock.now += 1
        await closed_run(small, name, "ann")
        await small.upkeep()
    assert await kept(small, others) == others
    left = await kept(small, names)
    assert left in (names[-1:], names[-2:])
    for name in left:
        await small.delete(name)
    await closed_run(small, "again", "ann")
    await closed_run(small, "and again", "ann")
    await small.upkeep()
    assert "and again" in await kept(small, ["and again"])


async def test_an_owner_whose_runs_at_work_fill_its_share_starts_no_more(small: Log) -> None:
    epochs = {name: await run(small, name, owner="ann") for name in ("one", "two", "three")}
    for name, epoch in epochs.items():
        await small.append(name, [frame("x" * RUN_BYTES)], epoch=epoch)
    await small.upkeep()
    with pytest.raises(TooManyRequests) as caught:
        await run(small, "four", owner="ann")
    assert "your share of the event log" in caught.value.detail
    assert await small.stat("four") is None
    await run(small, "bob's", owner="bob")
    await run(small, "nobody's")
    for name, epoch in epochs.items():
        await small.append(name, [frame("end")], epoch=epoch, close=True)
    await small.upkeep()
    await run(small, "four", owner="ann")


async def test_a_log_full_of_runs_at_work_takes_nothing_new_until_there_is_room(small: Log) -> None:
    epochs = {f"run {number}": await run(small, f"run {number}") for number in range(60)}
    refused: list[str] = []
    for name, epoch in epochs.items():
        try:
            await small.append(name, [frame("x" * RUN_BYTES)], epoch=epoch)
        except LogUnavailable as error:
            assert error.detail == "the event log is full; try again later"
            refused.append(name)
    assert 30 < len(refused) < 45 and refused[0] == f"run {60 - len(refused)}"
    await small.upkeep()
    with pytest.raises(LogUnavailable, match="is full"):
        await run(small, "new")
    assert len(await small.unfinished()) in (0, 60), "no run at work is touched; over Redis their process is alive"
    # They can say how they end, and then there is room.
    for name, epoch in epochs.items():
        await small.append(name, [frame("end")], epoch=epoch, close=True)
    await small.upkeep()
    epoch = await run(small, "new")
    assert await small.append("new", [frame("x" * RUN_BYTES)], epoch=epoch) == 1


async def test_many_small_runs_are_bounded_as_well(make: Callable[..., Log], clock: Clock) -> None:
    """What a stream costs besides its bodies counts: of these, 30 bytes each, 60,000 would fit."""
    log = make(max_bytes=2 * MIB)
    names = [f"run {number}" for number in range(2000)]

    async def some(names: list[str]) -> None:
        for name in names:
            epoch = await run(log, name, retention=Retention(age_s=86400.0), meta={"of": "x" * 1000})
            await log.append(name, [frame("x" * 30)], epoch=epoch, close=True)

    async with log.running():
        for start in range(0, len(names), 20):
            clock.now += 1
            async with anyio.create_task_group() as group:
                for first in range(start, start + 20, 2):
                    group.start_soon(some, names[first : first + 2])
            await log.upkeep()
        left = await kept(log, names)
        assert 250 < len(left) < 1700
        assert set(names[20 - len(left) :]) <= set(left), "of those who ended in one second any may have gone"


async def test_what_is_counted_is_the_same_after_a_restart(make: Callable[..., Log], clock: Clock) -> None:
    log = make(max_bytes=2 * MIB)
    with anyio.fail_after(60):
        async with log.running():
            await closed_run(log, "one", "ann")
            epoch = await run(log, "two", owner="ann")
            await log.append("two", [frame("x" * RUN_BYTES)], epoch=epoch)
        async with log.running():
            clock.now += 1
            await log.append("two", [frame("x" * RUN_BYTES)], epoch=epoch, close=True)
            await log.upkeep()
            assert await kept(log, ["one", "two"]) == ["two"]
            await log.delete("two")
            await closed_run(log, "three", "ann")
            await closed_run(log, "four", "ann")
            await log.upkeep()
            assert await kept(log, ["three", "four"]) in (["three", "four"], ["four"])
