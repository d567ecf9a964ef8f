"""The event log in Redis, over real servers: several processes, lost connections, and instances that come and go.

The rules that it shares with the other engines are in tests/test_log.py.
"""

import shutil
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar

import anyio
import orjson
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from redis.asyncio.connection import Connection, UnixDomainSocketConnection

from ssecore.dialects import NAMED
from ssecore.errors import LogError, LogUnavailable, NotFound, WriterFenced
from ssecore.log import Cursor, Gap, Retention, Row, framed, locate, new_epoch
from ssecore.log import Ended as End
from ssecore.log.facts import packed
from ssecore.log.redis import RedisLog
from ssecore.log.tail import Reader, Tails
from ssecore.wire import Decoder, Event, encode
from tests.needs import needs
from tests.nginx import make_certificate
from tests.redis_server import Kind, RedisServer, serving
from tests.serving import free_port, wait_until

T = TypeVar("T")

KINDS = [pytest.param(kind, marks=needs(kind)) for kind in ("redis", "valkey")]


#: A short one, for tests that wait for its end. Half of it is how long a call waits for Redis.
LEASE_S: Final = 1.0


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    kind: Kind = request.param
    with serving(kind) as server:
        yield server


@pytest.fixture(params=KINDS)
def keeping(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server that has on disk what it has said."""
    kind: Kind = request.param
    with serving(kind, keeps=True) as server:
        yield server


@asynccontextmanager
async def logs(server: RedisServer, count: int = 2, **options: Any) -> AsyncIterator[list[RedisLog]]:
    """So many processes' logs, as far as Redis can tell."""
    options = {"poll_s": 0.05} | options
    with anyio.fail_after(30):
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(_running(RedisLog(server.url, **options))) for _ in range(count)]


@asynccontextmanager
async def _running(log: RedisLog) -> AsyncIterator[RedisLog]:
    async with log.running():
        yield log


def frames(*texts: object) -> list[bytes]:
    return [encode(Event(str(text))) for text in texts]


class Heard:
    """What a watcher was told, in sequence."""

    def __init__(self, log: RedisLog, stream: str) -> None:
        self.texts: list[str] = []
        self.last: int | None = None
        self.ended: End | None = None
        self._changed = anyio.Event()
        self.unwatch = log.watch(stream, self)

    def __call__(self, row: Row | None, ended: End | None) -> None:
        if row is not None:
            assert self.last is None or row.first == self.last + 1, "out of sequence"
            self.last = row.last
            self.texts += [event.data for event in Decoder().feed(framed(row))]
        self.ended = ended
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, text: object) -> None:
        while str(text) not in self.texts:
            await self._changed.wait()

    async def end(self) -> End:
        while self.ended is None:
            await self._changed.wait()
        return self.ended


async def until(ask: Callable[[], Awaitable[T]], true: Callable[[T], bool]) -> None:
    """For what Redis' own clock decides."""
    while not true(await ask()):  # noqa: ASYNC110
        await anyio.sleep(0.01)


async def whole(log: RedisLog, stream: str) -> list[str]:
    rows = await log.read(stream, 0, 1 << 30)
    return [event.data for event in Decoder().feed(b"".join(map(framed, rows)))]


async def topic(log: RedisLog, name: str = "topic", **keep: Any) -> str:
    epoch = new_epoch()
    await log.create(name, epoch=epoch, kind="topic", retention=Retention(**keep))
    return epoch


async def run(log: RedisLog, **facts: Any) -> str:
    """A run, whose name is its first epoch."""
    epoch = new_epoch()
    await log.create(epoch, epoch=epoch, **facts)
    return epoch


async def test_what_one_process_appends_is_told_in_another(server: RedisServer) -> None:
    async with logs(server) as (one, two):
        epoch = await topic(one)
        here, there = Heard(one, "topic"), Heard(two, "topic")
        assert (await two.stat("topic")) == (await one.stat("topic"))
        for number in range(100):
            await (one, two)[number % 2].append("topic", frames(number), epoch=epoch)
        await here.until(99)
        await there.until(99)
        await one.append("topic", [], epoch=epoch, close=True)
        assert await there.end() == await here.end() == "closed"
        assert here.texts == there.texts == await whole(two, "topic") == list(map(str, range(100)))


async def test_a_publication_goes_in_however_often_others_delete_the_topic(server: RedisServer) -> None:
    async with logs(server, 2) as (one, two):
        over = False

        async def delete() -> None:
            while not over:
                await two.delete("topic")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(delete)
            seqs = [(await one.publish("topic", frames("a"), retention=Retention())).seq for _ in range(200)]
            over = True
        assert seqs.count(1) > 1, "it was deleted in between"
        await one.delete("topic")
        created = await one.publish("topic", frames("a"), retention=Retention(events=7))
        stat = await two.stat("topic")
        assert stat is not None and (stat.kind, stat.epochs) == ("topic", ((created.epoch, 1),))
        assert stat.retention == Retention(events=7) and await two.find(epoch=created.epoch) == stat


async def test_a_process_is_told_of_a_run_or_the_run_is_deleted_and_never_both(server: RedisServer) -> None:
    async with logs(server) as (one, two):
        told: list[bool] = []

        async def tell(id: str) -> None:
            try:
                await two.mark_answered(id)
            except NotFound:
                told.append(False)
            else:
                told.append(True)

        for number in range(100):
            id = await run(one)
            deleted: list[bool] = []

            async def delete(id: str, deleted: list[bool] = deleted) -> None:
                deleted.append(await one.delete(id, unless_answered=True))

            async with anyio.create_task_group() as tasks:
                for task in (tell, delete)[:: 1 if number % 2 else -1]:
                    tasks.start_soon(task, id)
            assert told[-1] != deleted[0]
            assert (await one.stat(id) is not None) == told[-1]
        with pytest.raises(NotFound):
            await two.mark_answered("nothing")


async def test_a_run_whose_facts_are_not_legible_hides_no_other(server: RedisServer) -> None:
    async with logs(server, lease_s=LEASE_S) as (one, two):
        runs = [await run(one) for _ in range(3)]
        server.call("HDEL", f"{{sseapp}}:facts:{runs[0]}", "first")
        server.call("HSET", f"{{sseapp}}:facts:{runs[1]}", "meta", "{")
        one._tops.clear()  # nobody works on them

        async def left() -> list[str]:
            return [stat.stream for stat in await one.unfinished()]

        await until(left, lambda found: found == runs[2:])  # none are while it was late to renew its lease
        assert [stat.stream for stat in await two.runs(None, 10)] == runs[2:]


async def test_a_key_is_given_once_among_processes(server: RedisServer) -> None:
    async with logs(server, 4) as all_logs:
        made: list[tuple[str, bool]] = []

        async def create(log: RedisLog) -> None:
            stat, new = await log.create(epoch := new_epoch(), epoch=epoch, key="key")
            made.append((stat.stream, new))

        async with anyio.create_task_group() as group:
            for _ in range(5):
                for log in all_logs:
                    group.start_soon(create, log)
        assert len({name for name, _ in made}) == 1
        assert [new for _, new in made].count(True) == 1
        assert len(await all_logs[0].runs(None, 100)) == 1


async def test_a_writer_that_was_taken_over_is_fenced_in_its_own_process(server: RedisServer) -> None:
    async with logs(server) as (one, two):
        id = await run(one)
        await one.append(id, frames("a"), epoch=id)
        await two.open(id, epoch := new_epoch())
        with pytest.raises(WriterFenced):
            await one.append(id, frames("late"), epoch=id)
        await two.append(id, frames("b"), epoch=epoch, close=True)
        assert await whole(one, id) == ["a", "b"]


@pytest.mark.parametrize("whom", ["pubsub", "normal"])
async def test_killed_connections_lose_nothing_and_repeat_nothing(server: RedisServer, whom: str) -> None:
    async with logs(server, 3) as (one, two, reader):
        epoch = await topic(one)
        heard = Heard(reader, "topic")
        await reader.stat("topic")

        async def publish(log: RedisLog, name: str) -> None:
            for number in range(150):
                await log.append("topic", frames(f"{name}{number}"), epoch=epoch)

        async def kill() -> None:
            for _ in range(20):
                server.call("CLIENT", "KILL", "TYPE", whom)
                await anyio.sleep(0.005)

        async with anyio.create_task_group() as group:
            group.start_soon(publish, one, "a")
            group.start_soon(publish, two, "b")
            group.start_soon(kill)
        await one.append("topic", frames("end"), epoch=epoch)
        await heard.until("end")
        assert heard.texts == await whole(two, "topic")
        assert sorted(heard.texts) == sorted([f"{name}{n}" for name in "ab" for n in range(150)] + ["end"])
        for name in "ab":
            assert [text for text in heard.texts if text[0] == name] == [f"{name}{n}" for n in range(150)]


async def test_a_last_message_that_was_lost_is_found_by_looking(server: RedisServer) -> None:
    """Without another message, and without a sign that the connection broke."""
    async with logs(server) as (one, two):
        epoch = await topic(one)
        heard = Heard(two, "topic")
        await two.stat("topic")
        await one.append("topic", frames("first"), epoch=epoch)
        await heard.until("first")
        deafened: list[bytes] = []
        two._on_message = lambda stream, data: deafened.append(data)  # type: ignore[method-assign]
        await one.append("topic", frames("second"), epoch=epoch)
        await heard.until("second")
        await one.append("topic", [], epoch=epoch, close=True)
        assert await heard.end() == "closed"


async def test_an_end_is_not_told_before_what_was_lost_on_the_way_to_it(server: RedisServer) -> None:
    async with logs(server, poll_s=60) as (one, two):
        id = await run(one)
        heard = Heard(two, id)
        await two.stat(id)
        real = two._on_message
        two._on_message = lambda stream, data: None  # type: ignore[method-assign]
        await one.append(id, frames("lost"), epoch=id)
        await two.send_command(id, "read")  # a turn of the connection that listens
        await anyio.sleep(0.05)
        two._on_message = real  # type: ignore[method-assign]
        await one.append(id, [], epoch=id, close=True)
        assert await heard.end() == "closed"
        assert heard.texts == ["lost"]


async def test_after_a_restart_with_its_file_all_goes_on_in_a_new_epoch(keeping: RedisServer) -> None:
    async with logs(keeping) as (one, two):
        id = await run(one)
        heard = Heard(two, id)
        await two.stat(id)
        await one.append(id, frames("a", "b"), epoch=id)
        keeping.stop(signal.SIGKILL)
        keeping.start()
        assert await one.append(id, frames("c"), epoch=id) == 3
        await heard.until("c")
        assert heard.texts == await whole(two, id) == ["a", "b", "c"]
        stat = await two.find(epoch=id)
        assert stat is not None and [first for _, first in stat.epochs] == [1, 3]
        assert locate(stat, Cursor(id, 2)) == (2, None)
        assert await two.find(epoch=stat.epochs[-1][0]) == stat
        await one.append(id, frames("d"), epoch=id, close=True)
        assert await heard.end() == "closed"


async def test_after_a_restart_without_a_file_no_number_is_given_again_in_silence(server: RedisServer) -> None:
    async with logs(server) as (one, two):
        id, old = await run(one), await topic(one)
        readers = [Heard(two, id), Heard(two, "topic")]
        for stream in (id, "topic"):
            await two.stat(stream)
        await one.append(id, frames("a"), epoch=id)
        await one.append("topic", frames("a"), epoch=old)
        for heard in readers:
            await heard.until("a")
        server.stop()
        server.start()
        assert [await heard.end() for heard in readers] == ["deleted"] * 2
        for stream, epoch in ((id, id), ("topic", old)):
            with pytest.raises(NotFound):
                await one.append(stream, frames("b"), epoch=epoch)
            assert await two.find(epoch=epoch) is None
        new = await topic(two)
        await two.append("topic", frames("b"), epoch=new)
        stat = await one.stat("topic")
        assert stat is not None
        assert locate(stat, Cursor(old, 1)) == (0, Gap("expired", 2))


def replicated(server: RedisServer, role: str) -> int:
    """How far it is in the sequence of what is replicated."""
    return int(server.call("INFO", "replication").partition(f"{role}_repl_offset:")[2].split()[0])


@pytest.mark.parametrize("kind", KINDS)
async def test_after_a_failover_to_a_replica_that_has_it_all_everything_goes_on(kind: Kind) -> None:
    port = free_port()
    with (
        serving(kind, options=("--port", str(port), "--repl-diskless-sync-delay", "0")) as server,
        serving(kind, options=("--replicaof", "127.0.0.1", str(port))) as replica,
    ):
        wait_until(lambda: "master_link_status:up" in replica.call("INFO", "replication"))
        async with logs(server, wait_s=0.5) as (one, two):
            id, epoch = await run(one, key="key"), await topic(one)
            heard = [Heard(two, id), Heard(two, "topic")]
            for stream, writer in ((id, id), ("topic", epoch)):
                await two.stat(stream)
                await one.append(stream, frames("a", "b"), epoch=writer)
            wait_until(lambda: replicated(replica, "slave") >= replicated(server, "master"))
            server.stop(signal.SIGKILL)
            replica.path.rename(server.path)
            with pytest.raises(LogUnavailable):  # it is a replica still
                await two.delete("nothing")
            assert server.call("REPLICAOF", "NO", "ONE") == "+OK\r\n"
            assert await one.append(id, frames("c"), epoch=id, close=True) == 3
            with pytest.raises(WriterFenced):  # a topic's ids are its writers' to tell
                await one.append("topic", frames("c"), epoch=epoch)
            stat = await two.stat("topic")
            assert stat is not None and [first for _, first in stat.epochs] == [1, 3]
            assert await one.append("topic", frames("c"), epoch=stat.epochs[-1][0], close=True) == 3
            assert [await one.end() for one in heard] == ["closed"] * 2
            assert [one.texts for one in heard] == [["a", "b", "c"]] * 2
            assert (await two.find(key="key")) == (await two.find(epoch=id))


async def test_a_failover_that_lost_the_tail_is_told(server: RedisServer) -> None:
    """A replica that had fallen behind takes over: it has events 1 and 2, and somebody has seen 3."""
    with serving(server.kind) as replica:
        async with logs(server) as (one, two):
            id = await run(one)
            heard = Heard(two, id)
            await two.stat(id)
            await one.append(id, frames("a", "b"), epoch=id)
            replica.stop()
            server.call("SAVE")
            shutil.copy(server.folder / "dump.rdb", replica.folder / "dump.rdb")
            replica.start()  # with what the other had until now
            await one.append(id, frames("c"), epoch=id)
            await heard.until("c")
            server.stop(signal.SIGKILL)
            replica.path.rename(server.path)
            with pytest.raises(LogError, match="lost"):
                await one.append(id, frames("d"), epoch=id)
            await one.append(id, frames("failed"), epoch=id, close=True)
            assert await whole(two, id) == ["a", "b", "failed"]
            stat = await two.stat(id)
            assert stat is not None and [first for _, first in stat.epochs] == [1, 3]
            assert locate(stat, Cursor(id, 3)) == (2, Gap("diverged", 3, 3))
            assert await heard.end() == "deleted"  # it was told of an event that is no more
            assert heard.texts == ["a", "b", "c"]


async def test_an_instance_that_became_a_replica_is_left_for_its_successor(server: RedisServer) -> None:
    """It is still there, still answers whoever is connected, and has what its successor lacks."""
    with serving(server.kind) as successor:
        async with logs(server, lease_s=LEASE_S) as (one, two):
            id, epoch = await run(one), await topic(one)
            heard = [Heard(two, id), Heard(two, "topic")]
            for stream, writer in ((id, id), ("topic", epoch)):
                await two.stat(stream)
                await one.append(stream, frames("a", "b"), epoch=writer)
            successor.stop()
            server.call("SAVE")
            shutil.copy(server.folder / "dump.rdb", successor.folder / "dump.rdb")
            successor.start()
            await one.append("topic", frames("c"), epoch=epoch)
            await heard[1].until("c")
            server.path.rename(server.folder / "old")
            successor.path.rename(server.path)
            with socket.socket(socket.AF_UNIX) as old:
                old.connect(str(server.folder / "old"))
                old.sendall(b"REPLICAOF 127.0.0.1 1\r\n")
                assert old.recv(100) == b"+OK\r\n"
                assert await one.append(id, frames("c"), epoch=id, close=True) == 3
                assert await heard[1].end() == "deleted"
                assert await heard[0].end() == "closed"
            assert heard[0].texts == await whole(two, id) == ["a", "b", "c"]
            with pytest.raises(WriterFenced):
                await one.append("topic", frames("d"), epoch=epoch)
            stat = await two.stat("topic")
            assert stat is not None and locate(stat, Cursor(epoch, 3)) == (2, Gap("diverged", 3, 3))


async def test_while_redis_is_away_writers_wait_and_readers_stay(keeping: RedisServer) -> None:
    async with logs(keeping, wait_s=20.0) as (one, two):
        id = await run(one)
        heard = Heard(two, id)
        await two.stat(id)
        keeping.stop(signal.SIGKILL)
        results: list[Any] = []

        async def append(text: str) -> None:
            results.append(await one.append(id, frames(text), epoch=id))

        async def read() -> None:
            results.append(await whole(two, id))

        async with anyio.create_task_group() as group:
            for text in "abc":
                group.start_soon(append, text)
                await checkpoint()
            group.start_soon(read)
            for _ in range(20):
                await checkpoint()
            assert not results
            keeping.start()
        assert [one for one in results if isinstance(one, int)] == [1, 2, 3]
        await heard.until("c")
        assert heard.texts == await whole(two, id) == ["a", "b", "c"]


async def test_a_writer_waits_no_longer_than_it_was_told(server: RedisServer) -> None:
    async with logs(server, 1, wait_s=0.2) as (log,):
        id = await run(log)
        server.stop()
        for _ in range(2):
            with pytest.raises(LogUnavailable) as caught:
                await log.append(id, frames("a"), epoch=id)
            assert caught.value.headers["Retry-After"]
            with pytest.raises(LogUnavailable):
                await log.stat(id)


async def test_an_append_whose_answer_was_lost_goes_in_once(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, cuts = Connection.read_response, 0

    async def lost(connection: Any, *args: Any, **options: Any) -> Any:
        nonlocal cuts
        answer: Any = await real(connection, *args, **options)
        if isinstance(answer, list) and answer and isinstance(answer[0], list) and answer[0][0] == b"ok" and cuts < 3:
            cuts += 1
            raise ConnectionResetError("the answer was lost")
        return answer

    monkeypatch.setattr(UnixDomainSocketConnection, "read_response", lost)
    async with logs(server, 1) as (log,):
        id = await run(log)
        assert await log.append(id, frames("a", "b"), epoch=id) == 2
        assert await log.append(id, frames("c"), epoch=id) == 3
        assert cuts == 3
        assert await whole(log, id) == ["a", "b", "c"]


async def test_unfinished_are_the_open_runs_whose_process_is_gone(server: RedisServer) -> None:
    async with logs(server, 1, lease_s=LEASE_S) as (watch,):
        async with logs(server, 2, lease_s=LEASE_S) as (one, two):
            left, closed, taken = await run(one), await run(one), await run(one)
            await one.append(closed, frames("end"), epoch=closed, close=True)
            await two.open(taken, new_epoch())  # and then it was cut off: whoever opens a run doesn't hold it
            at_work = await run(two)
            assert await watch.unfinished() == []
        mine = await run(watch)
        await until(watch.unfinished, lambda found: len(found) >= 3)
        found = await watch.unfinished()
        assert [stat.stream for stat in found] == [left, taken, at_work]
        assert mine not in [stat.stream for stat in found]


async def test_a_call_reaches_whoever_works_on_the_run(server: RedisServer) -> None:
    async with logs(server, 3) as (one, two, three):
        heard: list[tuple[str, str, str]] = []
        arrived = anyio.Event()

        def listener(name: str) -> Callable[[str, str], None]:
            def on_command(stream: str, word: str) -> None:
                heard.append((name, stream, word))
                if len(heard) == 2:
                    arrived.set()

            return on_command

        one.on_command, two.on_command = listener("one"), listener("two")
        first, second = await run(one), await run(two)
        await three.send_command(first, "cancel")
        await three.send_command(second, "read")
        await arrived.wait()
        assert sorted(heard) == [("one", first, "cancel"), ("two", second, "read")]
        with pytest.raises(NotFound):
            await three.send_command("nothing", "cancel")


async def test_who_is_interested_is_known_for_a_while(server: RedisServer) -> None:
    async with logs(server) as (one, two):
        id = await run(one)
        assert not await one.touched(id)
        await two.touch(id, 0.05)
        assert await one.touched(id)
        await until(lambda: one.touched(id), lambda touched: not touched)


def evalsha_calls(server: RedisServer) -> int:
    stats = server.call("INFO", "commandstats")
    return int(stats.partition("cmdstat_evalsha:calls=")[2].partition(",")[0])


async def test_appends_that_meet_are_one_call(server: RedisServer) -> None:
    """Of one stream: one row. Of several: one call, a row each."""
    async with logs(server, 1, poll_s=60, lease_s=60) as (log,):
        ids = [await run(log) for _ in range(20)]

        async def append(id: str) -> None:
            for number in range(50):
                await log.append(id, frames(number), epoch=id)

        before = evalsha_calls(server)
        async with anyio.create_task_group() as group:
            for id in ids:
                group.start_soon(append, id)
        assert evalsha_calls(server) - before < 0.2 * 20 * 50
        before = evalsha_calls(server)
        async with anyio.create_task_group() as group:
            for number in range(1000):
                group.start_soon(partial(log.append, ids[0], frames(number), epoch=ids[0]))
        assert evalsha_calls(server) - before <= 10
        for id in ids:
            assert (await whole(log, id))[:50] == list(map(str, range(50)))
        assert len(await whole(log, ids[0])) == 1050


async def test_many_watchers_of_many_streams_take_three_connections(server: RedisServer) -> None:
    async with logs(server, 1) as (log,):
        ids = [await run(log) for _ in range(200)]
        heard = [Heard(log, id) for id in ids for _ in range(5)]
        async with anyio.create_task_group() as group:
            for id in ids:
                group.start_soon(log.stat, id)
        clients = [line for line in server.call("CLIENT", "LIST").splitlines() if "cmd=" in line]
        subscribed = [int(line.partition(" sub=")[2].split()[0]) for line in clients if "cmd=client" not in line]
        assert sorted(subscribed) == [0, 0, 201]
        for id in ids:
            await log.append(id, frames("a"), epoch=id)
        for one in heard:
            await one.until("a")


async def test_a_caller_that_is_cancelled_breaks_nobody(server: RedisServer) -> None:
    async with logs(server, 1) as (log,):
        ids = [await run(log) for _ in range(10)]
        wrong = []

        async def ask(id: str, turns: int) -> None:
            with anyio.CancelScope() as scope:
                for turn in range(20):
                    if turn == turns:
                        scope.cancel()
                    stat = await log.stat(id)
                    if stat is None or stat.stream != id:
                        wrong.append(stat)

        async with anyio.create_task_group() as group:
            for number in range(100):
                group.start_soon(ask, ids[number % 10], number // 4)
        assert not wrong
        assert await log.append(ids[0], frames("a"), epoch=ids[0]) == 1


async def test_facts_that_are_older_than_what_was_told_are_no_loss(server: RedisServer) -> None:
    """A look at a stream that grows meanwhile: its readers are not sent away."""
    async with logs(server, poll_s=0.0001) as (one, two):
        epoch = await topic(one)
        heard = Heard(two, "topic")
        await two.stat("topic")
        for number in range(300):
            two._mark_dirty("topic")
            await one.append("topic", frames(number), epoch=epoch)
        await heard.until(299)
        assert heard.ended is None
        assert heard.texts == list(map(str, range(300)))


async def test_a_reader_slower_than_trimming_is_told_what_it_missed(server: RedisServer) -> None:
    async with logs(server) as (one, two):
        epoch = await topic(one, events=30)
        tails = Tails(two)
        tail = tails.acquire("topic")
        stat = await two.stat("topic")
        assert stat is not None
        tail.apply(stat)
        reader = Reader(tail, 0, dialect=NAMED)
        at, decoder, gaps = 0, Decoder(), 0
        for number in range(1, 2001):
            await one.append("topic", frames(number, "x" * 20_000), epoch=epoch)
            if number % 40 and number < 2000:
                continue
            while at < 2 * number:
                for event in decoder.feed(reader.ready() or await reader.from_log()):
                    if event.event == "gap":
                        gap = orjson.loads(event.data)
                        assert (gap["reason"], gap["from"]) == ("trimmed", at + 1)
                        at, gaps = gap["to"], gaps + 1
                    else:
                        assert event.id == f"{epoch}.{at + 1}"
                        at += 1
        assert gaps > 10
        reader.close()
        tail.release()


async def test_nothing_is_left_of_what_retention_has_taken(server: RedisServer) -> None:
    now = 1_000_000.0

    async def live() -> None:
        for number in range(30):
            id = await run(log, owner=f"owner {number}", key=f"key {number}", retention=Retention(age_s=60))
            await log.append(id, frames("a"), epoch=id)
            await log.open(id, epoch := new_epoch())
            await log.touch(id, 60)
            await log.send_command(id, "read")
            await log.append(id, frames("b"), epoch=epoch, close=True)
            epoch = await topic(log, f"topic {number}", age_s=60)
            await log.append(f"topic {number}", frames("a"), epoch=epoch, close=True)

    async with logs(server, 1, clock=lambda: now, upkeep_s=60) as (log,):
        await live()
        now += 100
        await log.upkeep()
        await until(lambda: size(server, log), lambda keys: keys <= 3)  # its lease, its last answer, a counter
        await live()
        assert await size(server, log) > 100
        now += 100
        await log.upkeep()
        await until(lambda: size(server, log), lambda keys: keys <= 3)
    assert "calls:" not in server.call("KEYS", "*")


async def size(server: RedisServer, log: RedisLog) -> int:
    await log.stat("nothing")  # a turn: the calls are answered
    return int(server.call("DBSIZE").strip(":\r\n"))


async def test_a_full_redis_refuses_and_goes_on_when_there_is_room(server: RedisServer) -> None:
    async with logs(server, 1) as (log,):
        id, epoch = await run(log), await topic(log)
        await log.append(id, frames("a"), epoch=id)
        server.call("CONFIG", "SET", "maxmemory", "1")
        for stream, writer in ((id, id), ("topic", epoch)):
            with pytest.raises(LogUnavailable, match="Redis is full"):
                await log.append(stream, frames("lost"), epoch=writer)
        with pytest.raises(LogUnavailable, match="Redis is full"):
            await run(log)
        assert await whole(log, id) == ["a"]
        log._reconnected_at -= 60
        assert await log.unfinished() == []  # somebody works on it here, still
        server.call("CONFIG", "SET", "maxmemory", "0")
        assert await log.append(id, frames("b"), epoch=id) == 2
        assert await log.append("topic", frames("a"), epoch=epoch) == 1
        await log.delete(id)
        assert [stat.stream for stat in await log.runs(None, 10)] == []


async def test_what_waits_for_redis_is_bounded_in_bytes(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssecore.log.writer._MAX_QUEUED_BYTES", 10_000)
    async with logs(server, 1) as (log,):
        id = await run(log)
        server.freeze()
        async with anyio.create_task_group() as group:
            for _ in range(9):
                group.start_soon(partial(log.append, id, frames("x" * 1000), epoch=id))
            await checkpoint()
            with pytest.raises(LogUnavailable, match="too much waits"):
                await log.append(id, frames("x" * 1000), epoch=id)
            server.freeze(signal.SIGCONT)
        assert await log.append(id, frames("x" * 1000), epoch=id) == 10


#: What a user needs. `info` tells which instance it is.
ACL = "~{sseapp}:* &{sseapp}:* +@read +@write +@pubsub +@connection +@scripting -@dangerous +info"


async def test_a_user_of_its_own_is_enough(server: RedisServer) -> None:
    server.call("ACL", "SETUSER", "app", "on", ">pass word", *ACL.split())
    async with anyio.create_task_group(), AsyncExitStack() as stack:
        log = RedisLog(f"unix://app:pass%20word@{server.path}", poll_s=0.05)
        await stack.enter_async_context(_running(log))
        epoch = await topic(log, events=2, age_s=60)
        heard = Heard(log, "topic")
        await log.stat("topic")
        for number in range(5):
            await log.append("topic", frames(number), epoch=epoch)
        await heard.until(4)
        id = await run(log, key="key", owner="ann")
        assert await log.find(key="key") == (await log.runs("ann", 1))[0]
        await log.send_command(id, "read")
        await log.touch(id, 1)
        await log.open(id, new_epoch())
        await log.upkeep()
        await log.delete(id)
    with pytest.raises(LogError, match="Redis can't be used: "):
        async with RedisLog(f"unix://app:wrong@{server.path}", wait_s=0.1).running():
            pass


async def test_a_user_that_may_not_is_told_apart_from_a_redis_that_is_away(server: RedisServer) -> None:
    server.call("ACL", "SETUSER", "app", "on", ">secret", *ACL.split(), "-xadd")
    async with _running(RedisLog(f"unix://app:secret@{server.path}")) as log:
        id = await run(log)
        with pytest.raises(LogUnavailable, match="Redis returned an error"):
            await log.append(id, frames("a"), epoch=id)
        assert not log.unavailable


@needs("redis")
@needs("openssl")
async def test_over_tls() -> None:
    port = free_port()
    with serving("redis") as plain:
        make_certificate(plain.folder)
        key, certificate = plain.folder / "privkey.pem", plain.folder / "fullchain.pem"
        files = (
            "--tls-key-file",
            str(key),
            "--tls-cert-file",
            str(certificate),
            "--tls-ca-cert-file",
            str(certificate),
        )
        with serving("redis", options=("--tls-port", str(port), "--tls-auth-clients", "no", *files)):
            with pytest.raises(LogError, match=r"certificate verify failed|CERTIFICATE_VERIFY_FAILED"):
                async with RedisLog(f"rediss://127.0.0.1:{port}", wait_s=1.0).running():
                    pass
            url = f"rediss://127.0.0.1:{port}/1?ssl_ca_certs={certificate}"
            async with _running(RedisLog(url)) as one, _running(RedisLog(url)) as two:
                id = await run(one)
                heard = Heard(two, id)
                await two.stat(id)
                await one.append(id, frames("a"), epoch=id)
                await heard.until("a")


async def test_an_older_redis_is_refused_by_name(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Connection.read_response

    async def older(connection: Any, *args: Any, **options: Any) -> Any:
        answer: Any = await real(connection, *args, **options)
        return answer.replace(b"redis_version:7", b"redis_version:6") if isinstance(answer, bytes) else answer

    monkeypatch.setattr(UnixDomainSocketConnection, "read_response", older)
    with pytest.raises(LogError, match=r"7\.0 or later; this is 6"):
        async with RedisLog(server.url).running():
            pass


async def test_a_redis_that_is_not_there_is_said_at_the_start() -> None:
    with pytest.raises(LogError, match="can't be used"):
        async with RedisLog("redis://127.0.0.1:1", wait_s=0.1).running():
            pass
    with pytest.raises(LogError, match="URL"):
        async with RedisLog("http://127.0.0.1").running():
            pass


# What Redis holds and sends that this version can't read; what it has lost in part


def client(server: RedisServer) -> Redis:
    return Redis(unix_socket_path=str(server.path))


def key(name: str) -> str:
    return f"{{sseapp}}:{name}"


async def test_a_message_alone_delivers_nothing(server: RedisServer) -> None:
    """Redis may send it before the append is on disk, and lose that: only what it answers to a call is delivered."""
    async with logs(server) as (one, two):
        epoch = await topic(one)
        heard = Heard(two, "topic")
        await two.stat("topic")
        body = frames("not in the log")[0]
        message = b"1 1 0 %b %b" % (epoch.encode(), packed((len(body),)) + body)  # as earlier builds sent them
        with client(server) as redis:
            assert redis.publish(key("appended:topic"), message) == 1
        await one.append("topic", frames("a"), epoch=epoch)
        await heard.until("a")
        assert heard.texts == await whole(two, "topic") == ["a"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=st.lists(
        st.binary(max_size=80)
        | st.lists(st.sampled_from([b"0", b"1", b"2", b"-", b"-1", b"x", b"\xff", b"", b"9" * 5000])).map(b" ".join),
        min_size=1,
        max_size=5,
    )
)
def test_whatever_is_published_on_its_channels_the_log_goes_on(server: RedisServer, messages: list[bytes]) -> None:
    async def play() -> None:
        async with logs(server, poll_s=60) as (one, two):
            await one.delete("topic")
            epoch = await topic(one)
            heard, own = Heard(two, "topic"), Heard(one, "topic")
            for log in (one, two):
                await log.stat("topic")
            with client(server) as redis:
                channels = redis.pubsub_channels()
                assert len(channels) == 3
                for message in messages:
                    for channel in channels:
                        redis.publish(channel, message)
                    await one.append("topic", frames("a"), epoch=epoch)
                    redis.rpush(key(f"calls:{two._process}"), message)
            await one.append("topic", frames("z"), epoch=epoch)
            await heard.until("z")
            assert heard.texts == own.texts == ["a"] * len(messages) + ["z"]

    anyio.run(play)


def test_whatever_an_older_version_hears_from_this_one_it_looks_into_the_log(server: RedisServer) -> None:
    """In a rolling deploy. It takes five fields, and a message with events but without bodies for "look"."""

    async def play() -> None:
        async with logs(server, 1) as (log,):
            epoch = await topic(log)
            with client(server) as redis, redis.pubsub() as listening:
                listening.subscribe(key("appended:topic"))
                assert listening.get_message(timeout=20)
                await log.append("topic", frames("a", "b"), epoch=epoch)
                await log.append("topic", [], epoch=epoch, close=True)
                await log.delete("topic")
                messages = [listening.get_message(timeout=20)["data"].split(b" ", 4) for _ in range(3)]
            assert [(int(m[0]), int(m[1]), m[2], m[4]) for m in messages[:2]] == [(1, 2, b"0", b""), (3, 2, b"1", b"")]
            assert messages[1][3] != epoch.encode()  # it doesn't know this epoch: it looks then, too
            assert messages[2] == [b"0", b"0", b"2", b"-", b""]

    anyio.run(play)


FACTS = ("kind", "epochs", "epoch", "created", "updated", "first", "last", "size", "closed", "owner", "meta", "key")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    facts=st.dictionaries(st.sampled_from([*FACTS, "max_events", "age_s", "new"]), st.binary(max_size=30), min_size=1),
    missing=st.sets(st.sampled_from(FACTS), max_size=2),
)
def test_facts_that_cant_be_read_are_an_error_of_their_stream_alone(
    server: RedisServer, facts: dict[str, bytes], missing: set[str]
) -> None:
    async def play() -> None:
        async with logs(server) as (one, two):
            bad, good = await run(one), await run(one)
            heard, well = Heard(two, bad), Heard(two, good)
            for id in (bad, good):
                await one.append(id, frames("a"), epoch=id)
                await two.stat(id)
            with client(server) as redis:
                redis.hset(key(f"facts:{bad}"), mapping=facts)
                if missing:
                    redis.hdel(key(f"facts:{bad}"), *missing)
                redis.publish(key(f"appended:{bad}"), b"")
            for ask in (two.stat(bad), two.find(epoch=bad), two.read(bad, 0, 1)):
                try:
                    await ask
                except (LogError, LogUnavailable):
                    pass
            assert good in [stat.stream for stat in await two.runs(None, 1000)]
            await two.unfinished()
            await two.upkeep()
            await one.append(good, frames("b"), epoch=good)
            await well.until("b")
            assert heard.ended in (None, "closed", "deleted")
            for id in (bad, good):
                with suppress(LogUnavailable):
                    await one.delete(id)
            server.call("FLUSHALL")

    anyio.run(play)


@pytest.mark.parametrize("part", ["facts", "rows"])
async def test_a_foreign_key_in_the_place_of_a_streams_is_an_error_of_that_stream_alone(
    server: RedisServer, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with logs(server, lease_s=LEASE_S) as (one, two):
        bad, good = await run(one), await run(one)
        await topic(one, age_s=60)
        heard = [Heard(two, stream) for stream in (bad, good, "topic")]
        for stream in (bad, good, "topic"):
            await two.stat(stream)
        await one.append(good, frames("a"), epoch=good)
        with client(server) as redis:
            for stream in (bad, "topic"):
                redis.set(key(f"{part}:{stream}"), "somebody else's")
                if part == "rows":
                    redis.hset(key(f"facts:{stream}"), mapping={"last": 5})
                redis.publish(key(f"appended:{stream}"), "more")
        assert await heard[0].end() == await heard[2].end() == "deleted"
        for _ in range(20):
            with pytest.raises(LogError if part == "facts" else LogUnavailable):
                await (two.stat(bad) if part == "facts" else two.read(bad, 0, 1))
        assert [stat.stream for stat in await two.runs(None, 10)] == [good] if part == "facts" else [good, bad]
        await until(two.unfinished, lambda found: True)
        for log in (one, two):
            log._clock = lambda: 2_000_000_000.0
            await log.upkeep()
            await log.upkeep()
        await one.append(good, frames("b"), epoch=good)
        await heard[1].until("b")
        server.stop()
        server.start()
        assert await heard[1].end() == "deleted"  # connected again, whatever stood there
    said = [record.message for record in caplog.records if "refuses" in record.message]
    assert len(said) <= 3, said


async def test_what_a_newer_version_adds_is_passed_over(server: RedisServer) -> None:
    async with logs(server) as (one, two):
        id = await run(one)
        heard = Heard(two, id)
        await two.stat(id)
        with client(server) as redis:
            redis.hset(key(f"facts:{id}"), "colour", "blue")
            body = frames("a")[0]
            fields = {"e": id, "n": packed((len(body),)), "t": "1", "b": body, "colour": "blue"}
            redis.xadd(key(f"rows:{id}"), fields, id="1-0")
            redis.hset(key(f"facts:{id}"), "last", 1)
            redis.publish(key(f"appended:{id}"), '{"version": 2}')
        await heard.until("a")
        assert await one.append(id, frames("b"), epoch=id) == 2
        assert await whole(two, id) == ["a", "b"]


async def test_a_run_at_work_fails_when_redis_loses_its_rows_alone(server: RedisServer) -> None:
    async with logs(server) as (one, two):
        id = await run(one)
        heard = Heard(two, id)
        await two.stat(id)
        await one.append(id, frames("a", "b"), epoch=id)
        await heard.until("b")
        server.call("DEL", key(f"rows:{id}"))
        with pytest.raises(LogError, match="lost"):
            await one.append(id, frames("c"), epoch=id)
        assert await one.append(id, frames("failed"), epoch=id, close=True) == 3
        assert await heard.end() == "closed"
        assert heard.texts == ["a", "b", "failed"]
        assert await whole(two, id) == ["failed"]
        stat = await two.stat(id)
        assert stat is not None and (stat.first, stat.last, stat.closed) == (3, 3, True)
        assert locate(stat, Cursor(id, 1)) == (2, Gap("trimmed", 2, 2))


async def test_a_topic_whose_rows_alone_are_lost_goes_on_with_all_of_its_room(server: RedisServer) -> None:
    async with logs(server, 1) as (log,):
        epoch = await topic(log, bytes=3000)
        for number in range(3):
            await log.append("topic", frames("x" * 1000, number), epoch=epoch)
        server.call("DEL", key("rows:topic"))
        await log.append("topic", frames("y" * 1000, "new"), epoch=epoch)
        stat = await log.stat("topic")
        assert stat is not None and (stat.first, stat.last) == (7, 8)
        assert locate(stat, Cursor(epoch, 2)) == (6, Gap("trimmed", 3, 6))
        await log.append("topic", frames("z" * 1000, "newer"), epoch=epoch)
        assert (await whole(log, "topic"))[1::2] == ["new", "newer"]


async def test_a_stream_whose_facts_alone_are_lost_is_gone_and_can_begin_anew(server: RedisServer) -> None:
    async with logs(server) as (one, two):
        id, epoch = await run(one, owner="ann", key="key"), await topic(one)
        heard = [Heard(two, id), Heard(two, "topic")]
        for stream, writer in ((id, id), ("topic", epoch)):
            await two.stat(stream)
            await one.append(stream, frames("a", "b"), epoch=writer)
        server.call("DEL", key(f"facts:{id}"), key("facts:topic"))
        assert [await one.end() for one in heard] == ["deleted"] * 2
        with pytest.raises(NotFound):
            await one.append(id, frames("c"), epoch=id)
        assert await two.find(epoch=id) is await two.find(key="key") is None
        assert await two.runs("ann", 10) == []
        epoch = await topic(two)
        assert await two.append("topic", frames("new"), epoch=epoch) == 1
        assert await whole(one, "topic") == ["new"]
        one._reconnected_at -= 60
        assert await one.unfinished() == []
        assert "0" in server.call("EXISTS", key(f"rows:{id}"))  # nor is anything left of it


async def test_a_full_redis_is_not_asked_without_a_pause(server: RedisServer) -> None:
    async with logs(server, 1) as (log,):
        server.call("CONFIG", "SET", "maxmemory", "1")
        log._command_signal.set()
        with pytest.raises(LogUnavailable):
            await run(log)
        server.call("CONFIG", "RESETSTAT")
        await anyio.sleep(0.3)
        _, _, said = server.call("INFO", "commandstats").partition("cmdstat_set:")
        refused = said.partition("rejected_calls=")[2].partition(",")[0]
        assert int(refused or 0) < 5


async def test_a_call_to_a_frozen_redis_ends_soon_once_the_process_is_about_to_end(server: RedisServer) -> None:
    """The server cuts off whoever has no answer 0.3 s later."""
    async with logs(server, 1, wait_s=20, lease_s=40) as (log,):
        Heard(log, "topic")
        server.freeze()
        failed: list[str] = []

        async def ask(name: str) -> None:
            with pytest.raises(LogUnavailable):
                await log.stat(name)
            failed.append(name)

        async with anyio.create_task_group() as group:
            for name in ("topic", "other"):
                group.start_soon(ask, name)
            for _ in range(10):
                await checkpoint()
            with anyio.fail_after(20):
                log.give_up()
                await ask("late")
        assert sorted(failed) == ["late", "other", "topic"]
        server.freeze(signal.SIGCONT)


async def test_a_name_that_cant_be_encoded_is_its_callers_mistake(server: RedisServer) -> None:
    async with logs(server) as (one, two):
        epoch = await topic(one)
        heard = Heard(two, "topic")
        await two.stat("topic")
        with pytest.raises(UnicodeEncodeError):
            two.watch("topic:\ud800", heard)
        with pytest.raises((UnicodeEncodeError, LogUnavailable)):
            await two.create("topic:\ud800", epoch=new_epoch(), kind="topic")
        await one.append("topic", frames("a"), epoch=epoch)
        await heard.until("a")
