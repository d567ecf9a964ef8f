"""Topics: where a subscription begins, what it is told first, and what publishing promises.

Who is served how, and what a slow reader does to others, is in test_delivery.py.
"""

import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from itertools import count
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import anyio
import orjson
import pytest
from anyio.lowlevel import checkpoint

import sseapp
import ssecore.log
from sseapp import SSEApp
from ssecore.dialects import DATA_ONLY
from ssecore.errors import EncodeError, LogError, LogUnavailable
from ssecore.http.request import Request
from ssecore.http.routes import GET
from ssecore.log import Cursor, Stat, new_epoch
from ssecore.log.memory import MemoryLog
from ssecore.log.writer import Batch
from ssecore.settings import Settings
from ssecore.testing import Exchange, connect
from ssecore.topics import Subscription, Topics
from ssecore.wire import Event
from tests.house import Backend, in_virtual_time
from tests.lines import lines_offered

#: Seconds after which a test has hung: virtual ones but with SQLite.
LIMIT_S: Final = 30
EPOCH: Final = "A" * 22


once = pytest.mark.parametrize("parked", [False], ids=["waiting"], indirect=True)


@pytest.fixture
def virtual() -> bool:
    """SQLite works in threads: a virtual clock would run on meanwhile."""
    return True


@pytest.fixture
def anyio_backend(virtual: bool) -> Backend:
    return in_virtual_time() if virtual else ("asyncio", {})


with_sqlite = pytest.mark.parametrize("virtual", [False], ids=["sqlite"])


async def topic(request: Request, name: str) -> Subscription:
    return Subscription(name, Event({"topic": name}, "init"))


ROUTES: Final = [GET("/data/{name}", topic, dialect=DATA_ONLY), GET("/{name}", topic)]


@asynccontextmanager
async def running(parked: bool, **values: Any) -> AsyncIterator[SSEApp]:
    app = SSEApp(ROUTES, Settings(**({"log": "memory"} | values)))
    with lines_offered(parked), anyio.fail_after(LIMIT_S):
        async with app.running():
            yield app


def topics_of(app: SSEApp) -> Topics:
    assert app._services is not None
    topics: Topics = app._services.topics
    return topics


async def publish(app: SSEApp, count: int = 1, name: str = "news") -> Cursor:
    """So many events, one after the other; gives the last one's id."""
    for _ in range(count):
        cursor = await topics_of(app).publish(name, Event("x"))
    return cursor


async def take(exchange: Exchange, many: int) -> list[Event]:
    """The next so many events."""
    events: list[Event] = []
    while len(events) < many:
        chunk = await exchange.chunk()
        assert chunk is not None, f"it ended after {events}"
        events += exchange._decoder.feed(chunk)
    assert len(events) == many, events
    return events


async def read(app: SSEApp, many: int, last_id: object = "", target: str = "/news") -> list[Event]:
    """The first so many events of a subscription."""
    headers = {"last-event-id": str(last_id)} if last_id else {}
    async with connect(app, "GET", target, headers=headers) as exchange:
        return await take(exchange, many)


def sequences(events: Sequence[Event]) -> list[int]:
    return [int((event.id or "").partition(".")[2]) for event in events]


def gap_of(event: Event) -> dict[str, Any]:
    assert event.event == "gap"
    data: dict[str, Any] = orjson.loads(event.data)
    return data


async def refusal(app: SSEApp, target: str = "/news", **headers: str) -> tuple[Exchange, dict[str, Any]]:
    async with connect(app, "GET", target, headers=headers) as exchange:
        problem = orjson.loads(await exchange.body())
    assert exchange.status == problem["status"]
    return exchange, problem


# Where a subscription begins


async def test_a_fresh_subscription_begins_with_init_whose_id_is_the_top(parked: bool) -> None:
    async with running(parked) as app:
        await publish(app, 2)
        top = await publish(app)
        async with connect(app, "GET", "/news") as exchange:
            (init,) = await take(exchange, 1)
            assert (init.event, init.data, init.id) == ("init", '{"topic":"news"}', str(top))
            new = await publish(app)
            assert await take(exchange, 1) == [Event("x", None, str(new))]
            assert new == Cursor(top.epoch, 4)


async def test_the_first_subscription_of_all_begins_before_the_first_event(parked: bool) -> None:
    async with running(parked) as app:
        async with connect(app, "GET", "/news") as exchange:
            (init,) = await take(exchange, 1)
            epoch, _, seq = str(init.id).partition(".")
            assert seq == "0" and await publish(app) == Cursor(epoch, 1)


async def test_an_answer_opens_with_the_normal_retry_and_the_headers_of_an_event_stream(parked: bool) -> None:
    async with running(parked, retry_ms=1234) as app, connect(app, "GET", "/news") as exchange:
        assert (await exchange.chunk() or b"").startswith(b"retry: 1234\nevent: init\n")
        assert exchange.headers["content-type"] == "text/event-stream"
        assert exchange.headers["cache-control"] == "no-cache, no-transform"


async def test_a_cut_before_the_first_event_loses_nothing(parked: bool) -> None:
    async with running(parked) as app:
        await publish(app, 3)
        (init,) = await read(app, 1)
        await publish(app, 4)
        assert sequences(await read(app, 4, init.id)) == [4, 5, 6, 7]


async def test_a_resumed_subscription_has_no_init(parked: bool) -> None:
    async with running(parked) as app:
        first = await publish(app)
        await publish(app, 3)
        events = await read(app, 3, first)
        assert [event.event for event in events] == [None] * 3
        assert sequences(events) == [2, 3, 4]


async def test_one_that_has_everything_waits_for_what_is_new(parked: bool) -> None:
    async with running(parked) as app:
        top = await publish(app, 5)
        async with connect(app, "GET", "/news", headers={"last-event-id": str(top)}) as exchange:
            assert await exchange.chunk() == b"retry: 2000\n"
            await publish(app)
            assert sequences(await take(exchange, 1)) == [6]


async def test_a_cursor_may_stand_in_the_query_and_the_header_wins(parked: bool) -> None:
    async with running(parked) as app:
        one = await publish(app)
        two = await publish(app)
        await publish(app, 2)
        assert sequences(await read(app, 3, target=f"/news?last_event_id={one}")) == [2, 3, 4]
        assert sequences(await read(app, 2, two, target=f"/news?last_event_id={one}")) == [3, 4]
        assert (await read(app, 1, target="/news?last_event_id="))[0].event == "init"


@once
async def test_head_answers_the_headers_and_subscribes_nobody(parked: bool) -> None:
    async with running(parked) as app:
        async with connect(app, "HEAD", "/news") as exchange:
            assert await exchange.body() == b""
        assert exchange.status == 200 and exchange.headers["content-type"] == "text/event-stream"
        assert await topics_of(app)._log.stat("topic:news") is None


class MeddlingLog(MemoryLog):
    """Somebody publishes at each moment of a subscription."""

    app: SSEApp
    meddling = False

    async def stat(self, stream: str) -> Stat | None:
        if not self.meddling:
            return await super().stat(stream)
        await publish(self.app, 2)
        stat = await super().stat(stream)
        await publish(self.app, 2)
        return stat


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "resumed"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside others"])
async def test_what_is_published_while_somebody_subscribes_comes_once(
    parked: bool, monkeypatch: pytest.MonkeyPatch, fresh: bool, alone: bool
) -> None:
    log = MeddlingLog()
    monkeypatch.setattr(sseapp, "open_log", lambda settings: log)
    async with running(parked) as app:
        log.app = app
        cursor = await publish(app, 3)
        async with connect(app, "GET", "/news") as other:
            await take(other, 1)
            if alone:
                other.disconnect()
                await other.ended.wait()
            log.meddling = True
            headers = {} if fresh else {"last-event-id": str(cursor)}
            async with connect(app, "GET", "/news", headers=headers) as exchange:
                got = sequences(exchange._decoder.feed(await next_of(exchange)))
                log.meddling = False
                while got[-1:] != [7]:  # without anything new that would bring it along
                    got += sequences(exchange._decoder.feed(await next_of(exchange)))
                assert got == [*range(got[0], 8)]
                assert fresh or got[0] == 4
                await publish(app)
                assert sequences(await take(exchange, 1)) == [8]


async def next_of(exchange: Exchange) -> bytes:
    chunk = await exchange.chunk()
    assert chunk is not None
    return chunk


async def subscribe_beside_a_publisher(app: SSEApp) -> None:
    """Many come at every moment of its work, and each gets all from its beginning on."""
    first = await publish(app)
    left = count(39, -1)
    done = anyio.Event()

    async def subscriber(number: int) -> None:
        resumed = number % 2
        headers = {"last-event-id": str(first)} if resumed else {}
        async with connect(app, "GET", "/news", headers=headers) as exchange:
            got: list[int] = []
            while got[-1:] != [101]:
                got += sequences(exchange._decoder.feed(await next_of(exchange)))
            assert got == [*range(2 if resumed else got[0], 102)]
        if not next(left):
            done.set()

    async with anyio.create_task_group() as tasks:
        for number in range(40):
            tasks.start_soon(subscriber, number)
            await publish(app, 2)
        await publish(app, 20)
        await done.wait()
    assert topics_of(app).subscribers("news") == 0


async def test_many_that_subscribe_beside_a_publisher_each_get_a_contiguous_sequence(parked: bool) -> None:
    async with running(parked) as app:
        await subscribe_beside_a_publisher(app)


@with_sqlite
async def test_the_same_with_sqlite(parked: bool, tmp_path: Path) -> None:
    async with running(parked, log="sqlite", data_dir=tmp_path) as app:
        await subscribe_beside_a_publisher(app)


# What can't be given is announced


async def test_a_cursor_behind_the_retention_is_told_what_is_trimmed(parked: bool) -> None:
    async with running(parked, retention_events=5) as app:
        first = await publish(app, 2)
        await publish(app, 18)
        gap, *events = await read(app, 6, first)
        assert gap_of(gap) == {"reason": "trimmed", "from": 3, "to": 15}
        assert gap.id is None  # the cursor stays where it was until an event comes
        assert sequences(events) == [16, 17, 18, 19, 20]


async def test_a_cursor_just_before_the_oldest_kept_has_lost_nothing(parked: bool) -> None:
    async with running(parked, retention_events=5) as app:
        cursor = await publish(app, 15)
        await publish(app, 5)
        assert sequences(await read(app, 5, cursor)) == [16, 17, 18, 19, 20]


async def test_a_cursor_beyond_the_top_is_diverged_and_goes_on_from_where_they_part(parked: bool) -> None:
    async with running(parked) as app:
        top = await publish(app, 5)
        async with connect(app, "GET", "/news", headers={"last-event-id": f"{top.epoch}.8"}) as exchange:
            (gap,) = await take(exchange, 1)
            assert gap_of(gap) == {"reason": "diverged", "from": 6, "to": 8}
            await publish(app)
            assert sequences(await take(exchange, 1)) == [6]


async def test_a_cursor_that_the_log_does_not_know_is_expired_and_gets_all_that_is_kept(parked: bool) -> None:
    async with running(parked, retention_events=3) as app:
        await publish(app, 5)
        async with connect(app, "GET", "/news", headers={"last-event-id": f"{EPOCH}.7"}) as exchange:
            gap, *events = await take(exchange, 4)
            assert gap_of(gap) == {"reason": "expired", "from": 8, "to": None}
            assert sequences(events) == [3, 4, 5]
            await publish(app)
            assert sequences(await take(exchange, 1)) == [6]


async def test_a_cursor_of_another_topic_is_expired_too(parked: bool) -> None:
    async with running(parked) as app:
        other = await publish(app, 3, "weather")
        await publish(app)
        gap, event = await read(app, 2, other)
        assert gap_of(gap)["reason"] == "expired" and sequences([event]) == [1]


async def test_a_log_that_is_lost_with_its_process_is_announced(parked: bool) -> None:
    async with running(parked) as app:
        before = await publish(app, 9)
    async with running(parked) as app:
        await publish(app, 2)
        gap, *events = await read(app, 3, before)
        assert gap_of(gap) == {"reason": "expired", "from": 10, "to": None}
        assert sequences(events) == [1, 2]


async def test_on_a_data_only_route_a_gap_is_data(parked: bool) -> None:
    async with running(parked, retention_events=2) as app:
        first = await publish(app)
        await publish(app, 5)
        gap, *events = await read(app, 3, first, target="/data/news")
        assert gap.event is None and gap.id is None
        assert orjson.loads(gap.data) == {"type": "gap", "reason": "trimmed", "from": 2, "to": 4}
        assert sequences(events) == [5, 6]


@pytest.mark.parametrize(
    "cursor",
    [
        "abc",
        "5",
        ".5",
        EPOCH,
        f"{EPOCH}.",
        f"{EPOCH}.x",
        f"{EPOCH}.-1",
        f"{EPOCH}.+1",
        f"{EPOCH}.01",
        f"{EPOCH}. 1",
        f"{EPOCH}.1\n",
        f"{EPOCH}.1\0",
        f"{EPOCH}.1.2",
        f"{EPOCH}.{2**53}",
        f"{EPOCH}.{10**30}",
        f"{EPOCH}.\u0661",
        f"{EPOCH}A.1",
        f"{EPOCH[1:]}.1",
        f"{EPOCH[1:]}/.1",
    ],
)
@once
async def test_a_malformed_cursor_is_refused_and_nothing_is_replayed(parked: bool, cursor: str) -> None:
    async with running(parked) as app:
        await publish(app, 3)
        exchange, problem = await refusal(app, f"/news?last_event_id={quote(cursor)}")
        assert (exchange.status, problem["field"]) == (400, "last_event_id")
        assert topics_of(app).subscribers("news") == 0


# Over a restart, with SQLite


@with_sqlite
async def test_a_subscriber_goes_on_after_a_restart(parked: bool, tmp_path: Path) -> None:
    async with running(parked, log="sqlite", data_dir=tmp_path) as app:
        (init,) = await read(app, 1)
        before = await publish(app, 3)
    async with running(parked, log="sqlite", data_dir=tmp_path) as app:
        async with connect(app, "GET", "/news", headers={"last-event-id": str(init.id)}) as exchange:
            assert sequences(await take(exchange, 3)) == [1, 2, 3]
            after = await publish(app)
            assert sequences(await take(exchange, 1)) == [4]
        assert after.seq == 4 and after.epoch != before.epoch
        assert sequences(await read(app, 1, before)) == [4]
        async with connect(app, "GET", "/news", headers={"last-event-id": f"{before.epoch}.4"}) as exchange:
            (gap,) = (await take(exchange, 2))[:1]  # the old process never wrote a fourth
            assert gap_of(gap) == {"reason": "diverged", "from": 4, "to": 4}


@with_sqlite
@once
async def test_a_copy_of_the_file_put_back_is_announced_to_those_who_saw_more(parked: bool, tmp_path: Path) -> None:
    async with running(parked, log="sqlite", data_dir=tmp_path / "data") as app:
        await publish(app, 5)
        (file,) = (tmp_path / "data").glob("*.db")
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(tmp_path / "copy")) as copy:
            source.backup(copy)
        seen = await publish(app, 3)
    shutil.copyfile(tmp_path / "copy", file)
    async with running(parked, log="sqlite", data_dir=tmp_path / "data") as app:
        await publish(app, 2)
        gap, *events = await read(app, 3, seen)
        assert gap_of(gap) == {"reason": "diverged", "from": 6, "to": 8}
        assert sequences(events) == [6, 7]


@with_sqlite
@once
async def test_a_second_app_on_the_same_file_is_refused(parked: bool, tmp_path: Path) -> None:
    async with running(parked, log="sqlite", data_dir=tmp_path) as app:
        with pytest.raises(LogError, match="in use"):
            async with running(parked, log="sqlite", data_dir=tmp_path, drain_s=0.0):
                pass
        await publish(app)


async def test_two_apps_in_one_process_do_not_meet(parked: bool) -> None:
    async with running(parked) as app, running(parked) as other:
        async with connect(app, "GET", "/news") as exchange:
            await take(exchange, 1)
            assert (await publish(other, 2)).seq == 2
            assert topics_of(other).subscribers("news") == 0
            await publish(app)
            assert sequences(await take(exchange, 1)) == [1]


# Publishing


async def test_publishing_gives_the_id_of_the_last_event(parked: bool) -> None:
    async with running(parked) as app:
        async with connect(app, "GET", "/news") as exchange:
            await take(exchange, 1)
            cursor = await topics_of(app).publish("news", Event("a"), Event("b", "named"), Event({"c": 1}, retry=5))
            a, b, c = await take(exchange, 3)
            assert [a.data, b.data, c.data] == ["a", "b", '{"c":1}'] and b.event == "named" and c.retry == 5
            assert c.id == str(cursor)


@once
async def test_an_event_that_cannot_be_encoded_keeps_all_of_them_out(parked: bool) -> None:
    async with running(parked) as app:
        await publish(app)
        with pytest.raises(EncodeError):
            await topics_of(app).publish("news", Event("good"), Event("bad", "a\nb"))
        assert (await publish(app)).seq == 2


@once
async def test_an_id_of_the_publishers_own_is_refused(parked: bool) -> None:
    """A client would send it back as its cursor, which then means nothing."""
    async with running(parked) as app:
        with pytest.raises(EncodeError, match="id must be left out") as refusal:
            await topics_of(app).publish("news", Event("x", id="msg-1"))
        assert refusal.value.field == "id"
        assert (await publish(app)).seq == 1


async def test_the_order_of_one_publisher_is_the_order_of_the_log(parked: bool) -> None:
    async with running(parked) as app:
        ids: dict[str, list[int]] = {}

        async def publisher(name: str) -> None:
            ids[name] = []
            for number in range(20):
                ids[name].append((await topics_of(app).publish("news", Event(f"{name} {number}"))).seq)

        async with connect(app, "GET", "/news") as exchange:
            await take(exchange, 1)
            async with anyio.create_task_group() as tasks:
                for name in "abcde":
                    tasks.start_soon(publisher, name)
            got: list[Event] = []
            while len(got) < 100:
                got += exchange._decoder.feed(await next_of(exchange))
        assert sequences(got) == [*range(1, 101)]
        for name, seqs in ids.items():
            own = [event for event in got if event.data.startswith(name)]
            assert [event.data for event in own] == [f"{name} {number}" for number in range(20)]
            assert sequences(own) == seqs


async def test_topics_are_separate_whatever_their_names(parked: bool) -> None:
    async with running(parked) as app:
        names = ["news", "News", "topic:news", "a b", "ключ", "%2F"]
        async with connect(app, "GET", "/news") as exchange:
            await take(exchange, 1)
            for name in names[1:]:
                assert (await publish(app, name=name)).seq == 1
            await publish(app)
            assert sequences(await take(exchange, 1)) == [1]


@once
async def test_a_topic_is_never_taken_for_a_run(parked: bool) -> None:
    async with running(parked) as app:
        cursor = await publish(app)
        exchange, _ = await refusal(app, "/runs/topic:news")
        assert exchange.status == 404
        exchange, _ = await refusal(app, f"/runs/topic:news/events?last_event_id={cursor}")
        assert exchange.status == 410


async def test_publishers_go_on_when_another_process_has_opened_the_topic(
    parked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog()
    monkeypatch.setattr(sseapp, "open_log", lambda settings: log)
    async with running(parked) as app:
        await publish(app)
        async with connect(app, "GET", "/news") as exchange:
            await take(exchange, 1)
            await log.open("topic:news", other := new_epoch())
            await log.append("topic:news", [b"data: theirs\n\n"], epoch=other)
            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(publish, app)
            got: list[Event] = []
            while len(got) < 11:
                got += exchange._decoder.feed(await next_of(exchange))
            assert sequences(got) == [*range(2, 13)] and got[0].data == "theirs"
            epochs = {str(event.id).partition(".")[0] for event in got[1:]}
            assert len(epochs) == 1 and other not in epochs  # opened once for all of them


class AwayLog(MemoryLog):
    """Tells nothing until it is back."""

    back: anyio.Event | None = None

    async def stat(self, stream: str) -> Stat | None:
        if self.back is not None:
            await self.back.wait()
        return await super().stat(stream)


@once
async def test_a_reader_who_waits_for_the_log_while_the_drain_begins_is_sent_away(
    parked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AwayLog()
    monkeypatch.setattr(sseapp, "open_log", lambda settings: log)
    async with running(parked) as app:
        await publish(app)
        log.back = anyio.Event()
        async with connect(app, "GET", "/news") as exchange:
            await anyio.sleep(0.001)
            await app.drain(0)
            log.back.set()
            assert b"retry: " in await exchange.body() and exchange.complete


async def test_a_deleted_topic_begins_anew(parked: bool) -> None:
    async with running(parked) as app:
        before = await publish(app, 3)
        await topics_of(app)._log.delete("topic:news")
        assert (await publish(app)).seq == 1
        gap, event = await read(app, 2, before)
        assert gap_of(gap)["reason"] == "expired" and sequences([event]) == [1]


async def test_a_topic_deleted_under_its_readers_is_there_again_for_whoever_comes(parked: bool) -> None:
    async with running(parked) as app:
        await publish(app, 3)
        async with connect(app, "GET", "/news") as exchange:
            await take(exchange, 1)
            await topics_of(app)._log.delete("topic:news")
            assert await exchange.body() == b"" and exchange.complete
        assert sequences(await read(app, 1)) == [0]


# How many


async def test_subscribers_are_counted_for_each_topic(parked: bool) -> None:
    async with running(parked) as app:
        topics = topics_of(app)
        assert topics.subscribers("news") == 0
        async with connect(app, "GET", "/news") as one, connect(app, "GET", "/weather") as other:
            await take(one, 1)
            await take(other, 1)
            async with connect(app, "GET", "/news") as two:
                await take(two, 1)
                assert (topics.subscribers("news"), topics.subscribers("weather")) == (2, 1)
            assert topics.subscribers("news") == 1
        assert topics.subscribers("news") == topics.subscribers("weather") == 0


async def test_subscribers_over_the_limit_are_refused_for_the_moment(parked: bool) -> None:
    async with running(parked, max_subscribers=2) as app:
        async with connect(app, "GET", "/news") as one:
            await take(one, 1)
            async with connect(app, "GET", "/news") as two:
                await take(two, 1)
                exchange, problem = await refusal(app)
                assert (exchange.status, problem["code"]) == (503, "unavailable")
                assert int(exchange.headers["retry-after"]) > 0

                await read(app, 1, target="/weather")  # a limit of each topic

                browser = {"accept": "text/event-stream", "cache-control": "no-cache", "user-agent": "library/1.0"}
                async with connect(app, "GET", "/news", headers=browser) as exchange:
                    body = await exchange.body()
                    assert exchange.status == 200 and exchange.headers["content-type"] == "text/event-stream"
                    assert body.startswith(b"retry: ") and body.count(b"\n") == 1
                assert topics_of(app).subscribers("news") == 2
            await read(app, 1)


async def test_the_limit_holds_for_those_who_come_at_the_same_moment(parked: bool) -> None:
    async with running(parked, max_subscribers=3) as app:
        statuses: list[int] = []
        everybody, hold = anyio.Event(), anyio.Event()

        async def subscriber() -> None:
            async with connect(app, "GET", "/news") as exchange:
                await exchange.started.wait()
                statuses.append(exchange.status)
                if len(statuses) == 10:
                    everybody.set()
                await hold.wait()

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(subscriber)
            await everybody.wait()
            assert topics_of(app).subscribers("news") == 3
            hold.set()
        assert sorted(statuses) == [200] * 3 + [503] * 7


@once
async def test_any_number_of_topics_can_be_used_one_after_another(parked: bool) -> None:
    async with running(parked) as app:
        first = await publish(app, name="one")
        async with connect(app, target="/two") as reader:
            await take(reader, 1)
            for number in range(10):
                await read(app, 1, target=f"/read-{number}")
                await publish(app, name=f"published-{number}")
            two = await publish(app, name="two")
            assert await take(reader, 1) == [Event("x", None, str(two))]
        # The process opens no further epoch: each is kept in the log.
        assert await publish(app, name="one") == Cursor(first.epoch, 2)
        assert sequences(await read(app, 1, first, target="/one")) == [2]


@with_sqlite
@once
async def test_a_topic_without_events_is_deleted_unless_somebody_reads_it(
    parked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssecore.log.facts, "EMPTY_TOPIC_S", 1.5)
    async with running(parked, log="sqlite", data_dir=tmp_path) as app:
        log = topics_of(app)._log
        async with connect(app, target="/read") as reader:
            (init,) = await take(reader, 1)
            (left,) = await read(app, 1, target="/left")
            assert sequences(await read(app, 1, target="/left")) == [0], "it is there still"
            while await log.stat("topic:left") is not None:
                await log.upkeep()
                await anyio.sleep(0.05)
            await anyio.sleep(1.5)
            await log.upkeep()
            new = await publish(app, name="read")
            assert new == Cursor(str(init.id).partition(".")[0], 1), "the same topic"
            assert sequences(await take(reader, 1)) == [1]

        # Whoever comes finds it there again, and the client that had it before is told.
        async with connect(app, target="/left", headers={"last-event-id": str(left.id)}) as reader:
            assert gap_of((await take(reader, 1))[0])["reason"] == "expired"
            await publish(app, name="left")
            assert sequences(await take(reader, 1)) == [1]
        assert sequences(await read(app, 1, target="/left")) == [1]


async def test_a_topic_that_cant_be_stored_fails_all_who_wait_for_it_and_is_tried_again(
    parked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog()
    monkeypatch.setattr(sseapp, "open_log", lambda settings: log)
    failed: list[int] = []

    def refuse(batches: list[Batch], done: Callable[[], None]) -> None:
        for batch in batches:
            batch.error = LogUnavailable("it can't be reached")
        done()

    async def subscriber() -> None:
        exchange, _ = await refusal(app)
        failed.append(exchange.status)

    async def publisher() -> None:
        with pytest.raises(LogUnavailable):
            await publish(app)
        failed.append(0)

    async with running(parked) as app:
        with monkeypatch.context() as patch:
            patch.setattr(log._commits, "_commit", refuse)
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(subscriber)
                    tasks.start_soon(publisher)
        assert sorted(failed) == [0] * 5 + [503] * 5
        assert sequences(await read(app, 1)) == [0]
        assert (await publish(app)).seq == 1


@with_sqlite
@once
async def test_a_publisher_who_leaves_while_it_opens_the_topic_fails_nobody_else(parked: bool, tmp_path: Path) -> None:
    async with running(parked, log="sqlite", data_dir=tmp_path) as app:
        cursors: list[Cursor] = []

        async def publisher() -> None:
            cursors.append(await publish(app))

        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as leaving:
                    leaving.start_soon(publish, app)
                    tasks.start_soon(publisher)
                    tasks.start_soon(publisher)
                    await checkpoint()
                    scope.cancel()
        last = await publish(app)
        assert {cursor.epoch for cursor in cursors} == {last.epoch}
        assert len(cursors) == 2 and last.seq == max(cursor.seq for cursor in cursors) + 1 >= 3
