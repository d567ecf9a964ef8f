"""Readers of the log, each test over both ways: a reader that waits in its request's task, and one that is parked.

The memory log runs in virtual time: nothing waits there, and a moment is exact. SQLite takes the time it takes.
"""

import asyncio
import math
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio
import orjson
import pytest
from anyio import CancelScope, current_time
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

import sseapp
import ssecore.log.tail
from sseapp import SSEApp
from ssecore.dialects import DATA_ONLY, NAMED
from ssecore.errors import LogError, LogUnavailable
from ssecore.http.request import Request
from ssecore.http.routes import GET
from ssecore.log import Cursor, Gap, Log, Row, framed, new_epoch
from ssecore.log.memory import MemoryLog
from ssecore.log.tail import Reader, Tails
from ssecore.settings import Settings
from ssecore.testing import Exchange
from ssecore.topics import Subscription, Topics
from ssecore.wire import Event, encode
from tests.clients import stand_still
from tests.house import Backend, in_virtual_time, settle
from tests.lines import is_parked, lines_offered
from tests.needs import needs

App = Callable[[MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Any]

TOPIC: Final = "news"
STREAM: Final = "topic:news"
#: Seconds after which a test has hung: virtual ones, and real ones with SQLite.
LIMIT_S: Final = {"memory": 1000, "sqlite": 30}
#: One event, or one announcement of a gap. Heartbeats and `retry:` are no frames.
_FRAME: Final = re.compile(
    rb"event: gap\ndata: (?P<gap>[^\n]*)\n\n"
    rb"|(?P<body>(?:(?:event|data): [^\n]*\n)+)id: (?P<epoch>[\w-]{22})\.(?P<seq>[0-9]+)\n\n"
)


class Way(NamedTuple):
    parked: bool
    engine: str
    backend: str

    @property
    def virtual(self) -> bool:
        return self.engine == "memory"


WAYS: Final = {
    "task-asyncio": Way(False, "memory", "asyncio"),
    "task-trio": Way(False, "memory", "trio"),
    "parked": Way(True, "memory", "asyncio"),
    "task-sqlite": Way(False, "sqlite", "asyncio"),
    "parked-sqlite": Way(True, "sqlite", "asyncio"),
}

on_memory = pytest.mark.parametrize("way", ["task-asyncio", "task-trio", "parked"], indirect=True)
on_lines = pytest.mark.parametrize("way", ["parked"], indirect=True)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@pytest.fixture
def anyio_backend(way: Way) -> Backend:
    return in_virtual_time(way.backend) if way.virtual else ("asyncio", {})


async def news(request: Request) -> Subscription:
    return Subscription(TOPIC, Event("hello", "init"))


async def pulsing(request: Request) -> Subscription:
    return Subscription(TOPIC, Event("hello", "init"), pulse=lambda: Event(current_time(), "pulse"))


ROUTES: Final = [GET("/", news), GET("/pulsing", pulsing), GET("/data", news, dialect=DATA_ONLY)]


class Client:
    """A subscriber that reads whatever it is sent."""

    def __init__(self, app: App, headers: dict[str, str], target: str) -> None:
        self.body = b""
        self.chunks: list[bytes] = []
        self.times: list[float] = []
        #: Sequence and bytes of each event of the log, but for `init`.
        self.frames: list[tuple[int, bytes]] = []
        self.gaps: list[dict[str, Any]] = []
        self.last_id = ""
        self._taken = 0
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "path": target,
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        self.exchange = Exchange(scope, [], math.inf)
        self.over = anyio.Event()  #: nothing more is read
        self._app = app
        self._came = anyio.Event()
        self._scope = CancelScope()
        self._connection = CancelScope()

    async def _connect(self) -> None:
        with self._connection:
            await self.exchange.run(self._app)

    async def _read(self) -> None:
        try:
            with self._scope:
                while (chunk := await self.exchange.chunk()) is not None:
                    self._take(chunk)
                    self._came.set()
        except Exception as error:
            if error is not self.exchange.failure:  # the app's: a test looks there
                raise
        finally:
            self.exchange.disconnect()
            self.over.set()
            self._came.set()

    async def until(self, true: Callable[["Client"], object]) -> None:
        """Read until this is true of what came."""
        while not true(self):
            assert not self.over.is_set(), self.body
            self._came = anyio.Event()
            await self._came.wait()

    async def opened(self) -> "Client":
        await self.until(lambda client: client.body)
        return self

    async def reached(self, seq: int) -> None:
        await self.until(lambda client: client.frames and client.frames[-1][0] == seq)

    async def ended(self) -> None:
        """Until the app has ended the answer."""
        await self.exchange.ended.wait()
        await self.over.wait()

    def go(self) -> None:
        """Leave, and don't wait for the app to notice."""
        self._scope.cancel()

    async def leave(self) -> None:
        self.go()
        await self.exchange.ended.wait()

    async def cancel(self) -> None:
        """The server cancels the connection's task; a parked stream has none."""
        self._connection.cancel()
        while not self.exchange.ended.is_set():
            if is_parked(self.exchange):  # it may have been parked just before
                return await self.leave()
            await checkpoint()
        self._scope.cancel()

    def _take(self, chunk: bytes) -> None:
        self.chunks.append(chunk)
        self.times.append(current_time())
        self.body += chunk
        for match in _FRAME.finditer(self.body, self._taken):
            self._taken = match.end()
            if match["gap"] is not None:
                self.gaps.append(orjson.loads(match["gap"]))
                continue
            self.last_id = f"{match['epoch'].decode()}.{match['seq'].decode()}"
            if not match["body"].startswith(b"event: init\n"):
                self.frames.append((int(match["seq"]), match[0]))

    @property
    def seqs(self) -> list[int]:
        return [seq for seq, _ in self.frames]


class House:
    """An app that is running, and its clients."""

    def __init__(self, app: SSEApp, tasks: TaskGroup) -> None:
        assert app._services is not None
        self.app = app
        self.topics: Topics = app._services.topics
        self.tails: Tails = self.topics._tails
        self.log: Log = self.topics._log
        self.published = 0
        self._tasks = tasks

    async def publish(self, *texts: str) -> Cursor:
        cursor = await self.topics.publish(TOPIC, *[Event(text) for text in texts])
        self.published = cursor.seq
        return cursor

    async def publish_each(self, count: int, text: str = "x") -> None:
        for _ in range(count):
            await self.publish(f"{self.published + 1} {text}")

    def connect(self, last_id: object = "", *, target: str = "/", through: App | None = None) -> Client:
        headers = {"last-event-id": str(last_id)} if last_id else {}
        client = Client(through or self.app, headers, target)
        self._tasks.start_soon(client._connect)
        self._tasks.start_soon(client._read)
        return client

    async def subscribe(self, last_id: object = "", *, target: str = "/", through: App | None = None) -> Client:
        """A client that has its first bytes."""
        return await self.connect(last_id, target=target, through=through).opened()

    async def audience(self, count: int) -> list[Client]:
        clients = [self.connect() for _ in range(count)]
        for client in clients:
            await client.opened()
        return clients

    def assert_left(self) -> None:
        """Nothing is held for readers that are gone."""
        assert self.topics.subscribers(TOPIC) == 0
        assert self.tails.get(STREAM) is None
        assert self.log._watchers._streams == {}
        assert self.app._streams == set()


@asynccontextmanager
async def house(way: Way, folder: Path, **values: Any) -> AsyncIterator[House]:
    app = SSEApp(ROUTES, Settings(log=way.engine, data_dir=folder, **values))
    with lines_offered(way.parked), anyio.fail_after(LIMIT_S[way.engine]):
        async with app.running(), anyio.create_task_group() as tasks:
            yield House(app, tasks)
            tasks.cancel_scope.cancel()


async def batch_of(reader: Reader) -> bytes:
    batch = reader.ready()
    return await reader.from_log() if batch is None else batch


@pytest.fixture
def small_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail of a few events, and steps of a few events through the log."""
    monkeypatch.setattr(ssecore.log.tail, "TAIL_BYTES", 200)
    monkeypatch.setattr(ssecore.log.tail, "READ_BYTES", 100)


@pytest.fixture
def framings(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each row was framed, by its first sequence."""
    counted: Counter[int] = Counter()

    def counting(row: Row, after: int = 0, *, id_first: bool = False) -> bytes:
        counted[row.first] += 1
        return framed(row, after, id_first=id_first)

    monkeypatch.setattr(ssecore.log.tail, "framed", counting)
    return counted


class Reads:
    """The readings of a log: counted, and held or failed where a test wants that."""

    def __init__(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        self.afters: list[int] = []
        self.failure: Exception | None = None
        self._read = log.read
        monkeypatch.setattr(log, "read", self)

    async def __call__(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        self.afters.append(after)
        if self.failure is not None:
            await checkpoint()
            raise self.failure
        return await self._read(stream, after, max_bytes)


# What every reader may rely on


async def test_everybody_gets_everything_in_order_and_as_the_same_bytes(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path) as service:
        clients = await service.audience(20)
        for size in (1, 3, 1, 10):
            await service.publish(*["x" * size] * size)
        late = await service.subscribe()
        await service.publish_each(50)
        for client in clients:
            await client.reached(65)
            assert client.seqs == [*range(1, 66)]
            assert client.frames == clients[0].frames
        await late.reached(65)
        assert late.seqs == [*range(16, 66)]


@on_memory
async def test_what_is_appended_together_travels_in_one_write(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path) as service:
        client = await service.subscribe()
        await service.publish("one", "two", "three")
        await client.reached(3)
        assert len(client.chunks) == 2
        for text in ("four", "five"):  # an event that is alone goes at once
            await service.publish(text)
            await settle()
        assert [chunk.count(b"data: ") for chunk in client.chunks] == [1, 3, 1, 1]


async def test_a_row_is_framed_once_however_many_read_it(way: Way, tmp_path: Path, framings: Counter[int]) -> None:
    async with house(way, tmp_path) as service:
        clients = await service.audience(50)
        for _ in range(10):
            await service.publish("one", "two")
            for client in clients:
                await client.reached(service.published)
        assert framings == Counter({first: 1 for first in range(1, 21, 2)})


async def test_a_reader_behind_the_tail_reads_the_log_and_comes_back_to_the_tail(
    way: Way, tmp_path: Path, small_tail: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(way, tmp_path) as service:
        reads = Reads(service.log, monkeypatch)
        slow, other = await service.audience(2)
        slow.exchange.block()
        await service.publish_each(60)
        await other.reached(60)
        assert not reads.afters  # so far nobody is behind

        slow.exchange.unblock()
        await slow.reached(60)
        assert slow.seqs == [*range(1, 61)] and not slow.gaps
        assert len(reads.afters) > 1 and reads.afters == sorted(set(reads.afters))

        reads.afters.clear()
        await service.publish_each(5)
        await slow.reached(65)
        await other.reached(65)
        assert not reads.afters
        assert slow.frames == other.frames


async def test_a_resumed_reader_gets_the_rest_from_the_log_and_then_what_is_new(
    way: Way, tmp_path: Path, small_tail: None
) -> None:
    async with house(way, tmp_path) as service:
        first = await service.publish("1")
        await service.publish_each(40)
        client = service.connect(first)
        for _ in range(20):  # while it reads the log
            await service.publish_each(1)
        await client.reached(61)
        assert client.seqs == [*range(2, 62)]


@on_memory
async def test_readers_behind_at_the_same_place_share_one_reading_of_the_log(
    way: Way, tmp_path: Path, small_tail: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(way, tmp_path) as service:
        first = await service.publish("1")
        await service.publish_each(20)
        reads = Reads(service.log, monkeypatch)
        clients = [service.connect(first) for _ in range(50)]
        for client in clients:
            await client.reached(21)
            assert client.seqs == [*range(2, 22)]
        assert reads.afters == sorted(set(reads.afters))


# A loss is never silent


async def test_a_reader_behind_the_retention_is_told_and_goes_on_from_the_oldest_kept(
    way: Way, tmp_path: Path, small_tail: None
) -> None:
    async with house(way, tmp_path, retention_events=10) as service:
        slow, other = await service.audience(2)
        slow.exchange.block()
        await service.publish_each(50)
        await other.reached(50)
        slow.exchange.unblock()
        await slow.reached(50)
        # What was on its way to it when it stopped reading is not lost.
        on_its_way = slow.gaps[0]["from"] - 1
        assert on_its_way < 10
        assert slow.gaps == [{"reason": "trimmed", "from": on_its_way + 1, "to": 40}]
        assert slow.seqs == [*range(1, on_its_way + 1), *range(41, 51)]
        await service.publish_each(1)
        await slow.reached(51)
        assert not other.gaps and other.seqs == [*range(1, 52)]


@on_memory
async def test_on_a_data_only_route_a_later_gap_is_data_too(way: Way, tmp_path: Path, small_tail: None) -> None:
    async with house(way, tmp_path, retention_events=10) as service:
        slow = await service.subscribe(target="/data")
        slow.exchange.block()
        await service.publish_each(50)
        slow.exchange.unblock()
        await slow.reached(50)
        (gap,) = re.findall(rb"\n\ndata: (\{.*\})\n\n", slow.body)
        assert orjson.loads(gap) | {"from": 0} == {"type": "gap", "reason": "trimmed", "from": 0, "to": 40}


@on_memory
async def test_a_reader_behind_a_topic_that_age_has_emptied_is_told_and_goes_on(
    way: Way, tmp_path: Path, small_tail: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept any more, but the stream goes on, and so does its reader."""
    now = [1e9]
    monkeypatch.setattr(sseapp, "open_log", lambda settings: MemoryLog(clock=lambda: now[0]))
    async with house(way, tmp_path, retention_s=60.0) as service:
        slow, other = await service.audience(2)
        slow.exchange.block()
        await service.publish_each(50)
        await other.reached(50)
        now[0] += 61
        await service.log.upkeep()
        slow.exchange.unblock()
        await settle()
        last = slow.seqs[-1] if slow.seqs else 0
        assert slow.gaps == [{"reason": "trimmed", "from": last + 1, "to": 50}]
        assert not slow.exchange.ended.is_set()
        await service.publish_each(2)
        await slow.reached(52)
        assert slow.seqs[-2:] == [51, 52]


async def test_a_deleted_topic_ends_its_readers(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path) as service:
        clients = await service.audience(5)
        await service.publish("one")
        await service.log.delete(STREAM)
        for client in clients:
            await client.ended()
            assert client.seqs == [1] and client.exchange.complete
        service.assert_left()


async def test_a_reader_behind_the_end_of_a_deleted_topic_is_told(way: Way, tmp_path: Path, small_tail: None) -> None:
    """What stands under the name afterwards is another stream, and no continuation."""
    async with house(way, tmp_path) as service:
        slow = await service.subscribe()
        slow.exchange.block()
        await service.publish_each(50)
        await service.log.delete(STREAM)
        await service.log.create(STREAM, epoch=(epoch := new_epoch()), kind="topic")
        await service.log.append(STREAM, [encode(Event("other"))] * 80, epoch=epoch)
        slow.exchange.unblock()
        await slow.ended()
        assert [gap["reason"] for gap in slow.gaps] == ["expired"]
        assert b"other" not in slow.body and slow.exchange.complete
        assert slow.seqs == [*range(1, len(slow.seqs) + 1)]


@on_lines
async def test_an_end_that_comes_while_slices_are_on_their_way_reaches_everybody(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssecore.log.tail, "SLICE", 1)
    async with house(way, tmp_path) as service:
        clients = await service.audience(10)
        tail = service.tails.get(STREAM)
        assert tail is not None and service.app._services is not None
        stat = await service.log.stat(STREAM)
        assert stat is not None
        epoch = stat.epochs[-1][0]
        row = Row(epoch, 1, encode(Event("one")), (len(encode(Event("one"))),))
        tail._on_append(row, None)
        for _ in range(4):  # a slice each
            await checkpoint()
        assert 0 < sum(bool(client.seqs) for client in clients) < 10
        tail._on_append(None, "deleted")
        for client in clients:
            await client.ended()
            assert client.seqs == [1]


# What one reader does is nobody else's trouble


class CountedSend:
    """In front of the app: counts the messages, and raises an error from the second body on, if it has one."""

    def __init__(self, app: App, error: Exception | None = None) -> None:
        self.app = app
        self.error = error
        self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def counted(message: MutableMapping[str, Any]) -> None:
            self.sent += 1
            if self.error is not None and self.sent > 2:
                raise self.error
            await send(message)

        await self.app(scope, receive, counted)


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), RuntimeError("a bug of the server")], ids=repr)
async def test_a_send_that_raises_ends_its_reader_alone(
    way: Way, tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(way, tmp_path) as service:
        failing = await service.subscribe(through=CountedSend(service.app, error))
        clients = await service.audience(5)
        for _ in range(10):
            await service.publish_each(1)
        for client in clients:
            await client.reached(10)
            assert client.seqs == [*range(1, 11)]
        await failing.exchange.ended.wait()
        assert failing.seqs == []
        assert service.topics.subscribers(TOPIC) == 5
        for client in clients:
            await client.leave()
        service.assert_left()


async def test_a_blocked_reader_delays_nobody_and_catches_up_in_order(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path) as service:
        clients = await service.audience(10)
        blocked = clients[::3]
        for round in range(1, 6):
            for client in blocked:
                client.exchange.block()
            await service.publish_each(20)
            for client in clients:
                if client not in blocked:
                    await client.reached(20 * round)
            assert all(client.seqs[-1:] != [20 * round] for client in blocked)
            for client in blocked:
                client.exchange.unblock()
            for client in blocked:
                await client.reached(20 * round)
        for client in clients:
            assert client.seqs == [*range(1, 101)]
            assert client.frames == clients[0].frames


async def test_a_blocked_reader_that_leaves_is_let_go_at_once(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path) as service:
        stays, leaves = await service.audience(2)
        leaves.exchange.block()
        await service.publish_each(10)
        await leaves.leave()
        assert service.topics.subscribers(TOPIC) == 1
        await service.publish_each(10)
        await stays.reached(20)
        await stays.leave()
        service.assert_left()


async def test_nothing_is_sent_to_a_reader_that_has_left(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path) as service:
        stays = await service.subscribe()
        sends = CountedSend(service.app)
        idle, blocked = await service.subscribe(through=sends), await service.subscribe(through=sends)
        blocked.exchange.block()
        await service.publish_each(3)
        await stays.reached(3)
        await idle.leave()
        await blocked.cancel()
        sent = sends.sent
        await service.publish_each(3)
        await stays.reached(6)
        await service.app.drain(1)
        assert sends.sent == sent


async def test_a_reader_whose_task_the_server_cancels_is_let_go(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path) as service:
        stays, idle, blocked = await service.audience(3)
        blocked.exchange.block()
        await service.publish_each(10)
        await idle.cancel()
        await blocked.cancel()
        assert service.topics.subscribers(TOPIC) == 1
        await service.publish_each(10)
        await stays.reached(20)
        assert stays.seqs == [*range(1, 21)]
        await stays.leave()
        service.assert_left()


@on_memory
async def test_a_reader_that_stays_blocked_is_dropped_after_the_send_timeout(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path, send_timeout_s=8.0) as service:
        reads_on, frozen, pauses = await service.audience(3)
        frozen.exchange.block()
        pauses.exchange.block()
        await service.publish("one")
        began = current_time()
        await anyio.sleep(6)
        assert service.topics.subscribers(TOPIC) == 3
        pauses.exchange.unblock()
        await frozen.exchange.ended.wait()
        assert 8 <= current_time() - began <= 10
        assert not frozen.exchange.complete and frozen.seqs == []
        assert service.topics.subscribers(TOPIC) == 2
        await anyio.sleep(60)
        await service.publish("two")
        for client in (reads_on, pauses):
            await client.reached(2)
            assert client.seqs == [1, 2]


@pytest.mark.parametrize("error", [LogUnavailable("the disk is full"), LogError("the file is damaged")], ids=repr)
async def test_a_log_that_cannot_be_read_ends_those_that_need_it_and_nobody_else(
    way: Way, tmp_path: Path, small_tail: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with house(way, tmp_path) as service:
        reads = Reads(service.log, monkeypatch)
        slow, other = await service.audience(2)
        slow.exchange.block()
        await service.publish_each(50)
        await other.reached(50)
        reads.failure = error
        slow.exchange.unblock()
        await slow.ended()
        assert slow.exchange.complete and not slow.gaps and slow.exchange.failure is None
        if isinstance(error, LogUnavailable):
            assert re.fullmatch(rb"(?s).*\nretry: [0-9]+\n", slow.body)
        reads.failure = None
        again = await service.subscribe(slow.last_id)
        await again.reached(50)
        assert slow.seqs + again.seqs == [*range(1, 51)]
        await service.publish_each(1)
        await other.reached(51)


@on_memory
async def test_a_log_that_cannot_be_read_at_the_beginning_is_an_honest_refusal(
    way: Way, tmp_path: Path, small_tail: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(way, tmp_path) as service:
        first = await service.publish("1")
        await service.publish_each(50)
        Reads(service.log, monkeypatch).failure = LogUnavailable("the disk is full")
        client = service.connect(first)
        await client.ended()
        assert client.exchange.status == 503
        service.assert_left()


# Signs of life, and the end


@on_memory
async def test_a_heartbeat_comes_after_each_idle_time_and_only_then(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path, heartbeat_s=8.0) as service:
        client = await service.subscribe()
        await anyio.sleep(30)
        beats = [time for time, chunk in zip(client.times, client.chunks, strict=True) if chunk == b":\n"]
        assert len(beats) == 3
        assert all(8 <= later - earlier <= 9.001 for earlier, later in pairwise(beats))
        for _ in range(30):
            await service.publish_each(1)
            await anyio.sleep(1)
        assert client.chunks.count(b":\n") == 3
        assert client.seqs == [*range(1, 31)]


@on_memory
async def test_a_heartbeat_never_comes_between_the_lines_of_what_is_being_sent(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path, heartbeat_s=1.0) as service:
        client = await service.subscribe()
        client.exchange.block()
        await service.publish("one")
        await anyio.sleep(10)
        client.exchange.unblock()
        await client.reached(1)
        assert b":\n" not in client.chunks


@on_memory
async def test_a_pulse_is_sent_each_5_s_without_an_id(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path, heartbeat_s=100.0) as service:
        plain = await service.subscribe()
        client = await service.subscribe(target="/pulsing")
        for _ in range(30):
            await anyio.sleep(1)
            await service.publish_each(1)
        await anyio.sleep(31)  # when nothing else comes, too
        await settle()
        pulses = re.findall(r"(id: .*\n)?event: pulse\ndata: (.*)\n\n", client.body.decode())
        times = [float(time) for _, time in pulses]
        assert 10 <= len(times) <= 12 and not any(id for id, _ in pulses)
        assert all(5 <= later - earlier <= 6.001 for earlier, later in pairwise(times))
        assert client.seqs == plain.seqs == [*range(1, 31)]
        assert b"pulse" not in plain.body


@on_memory
async def test_pulses_that_were_missed_while_the_server_stood_still_are_not_made_up_for(
    way: Way, tmp_path: Path
) -> None:
    async with house(way, tmp_path) as service:
        client = await service.subscribe(target="/pulsing")
        await anyio.sleep(12)
        assert client.body.count(b"event: pulse\n") == 2
        stand_still(100)
        await anyio.sleep(20)
        await settle()
        assert 2 + 4 <= client.body.count(b"event: pulse\n") <= 2 + 5


@on_memory
async def test_pulses_to_a_blocked_reader_come_when_it_reads_again(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path, send_timeout_s=100.0) as service:
        client = await service.subscribe(target="/pulsing")
        client.exchange.block()
        await service.publish("one")
        await anyio.sleep(22)
        assert b"pulse" not in client.body
        await service.publish("two")
        client.exchange.unblock()
        await client.reached(2)
        assert client.body.count(b"event: pulse\n") == 4
        assert client.seqs == [1, 2]


async def test_a_drain_ends_readers_at_once_with_a_retry_and_a_proper_end(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path, retry_ms=1000) as service:
        clients = await service.audience(20)
        catching_up = await service.subscribe()
        catching_up.exchange.block()
        await service.publish_each(5)
        for client in clients:
            await client.reached(5)
        catching_up.exchange.unblock()
        began = current_time()
        await service.app.drain(100)
        assert current_time() - began < 10
        waits = []
        for client in (*clients, catching_up):
            await client.ended()
            assert client.exchange.complete
            ending = re.fullmatch(rb"(?s)retry: 1000\n.*\n\nretry: ([0-9]+)\n", client.body)
            assert ending
            waits.append(int(ending[1]))
            assert client.seqs == [*range(1, len(client.seqs) + 1)]
        assert min(waits) >= 1000 and max(waits) <= 3000 and len(set(waits)) > 5
        service.assert_left()

        late = service.connect()
        await late.ended()
        assert late.exchange.status == 503


@on_memory
async def test_a_drain_does_not_wait_for_a_blocked_reader(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path) as service:
        client, frozen = await service.audience(2)
        frozen.exchange.block()
        await service.publish("one")
        await client.reached(1)
        began = current_time()
        await service.app.drain(2)
        assert current_time() - began == pytest.approx(3, abs=0.01)
        assert client.exchange.complete and not frozen.exchange.complete


@on_memory
async def test_the_longest_life_of_a_reader_ends_it_between_events(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path, max_stream_s=10.0) as service:
        client = await service.subscribe()
        await service.publish("one")
        await client.ended()
        assert 10 <= current_time() <= 12
        assert client.exchange.complete and client.seqs == [1]
        again = await service.subscribe(client.last_id)
        await service.publish("two")
        await again.reached(2)


# Many readers


@needs("time")
@pytest.mark.parametrize("way", ["task-asyncio", "parked"], indirect=True)
async def test_a_large_audience_gets_all_in_order_while_more_is_published(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssecore.log.tail, "SLICE", 32)
    async with house(way, tmp_path) as service:
        clients = await service.audience(1000)
        for burst in (1, 5, 1, 1, 10, 2, 20):
            clients.append(service.connect())
            await service.publish_each(burst)  # an append takes a turn of the loop, and so does a slice
            for _ in range(burst):
                await checkpoint()
        whole = 0
        for client in clients:
            await client.reached(40)
            seqs = client.seqs
            assert seqs == [*range(seqs[0], 41)]
            whole += seqs[0] == 1
        assert whole >= 1000
        for client in clients:
            await client.leave()
        service.assert_left()


@on_lines
async def test_readers_that_come_and_go_while_slices_are_on_their_way_are_served(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssecore.log.tail, "SLICE", 2)
    async with house(way, tmp_path) as service:
        clients = await service.audience(40)
        first = await service.publish("1")
        leaving = clients[20:30]
        for client in leaving:
            client.go()
        joining = [service.connect(first) for _ in range(10)]
        await service.publish_each(3)
        for client in (*clients[:20], *clients[30:]):
            await client.reached(4)
            assert client.seqs == [1, 2, 3, 4]
        for client in joining:
            await client.reached(4)
            assert client.seqs == [2, 3, 4]
        for client in leaving:
            await client.exchange.ended.wait()
        assert service.topics.subscribers(TOPIC) == 40


def tasks_at_work() -> Counter[str]:
    names = [
        task.get_coro().__qualname__ if task.get_name().startswith("Task-") else task.get_name()  # type: ignore[union-attr]
        for task in asyncio.all_tasks()
    ]
    return Counter(".".join(name.split(".")[-2:]) for name in names)


@pytest.mark.parametrize("way", ["task-asyncio", "parked"], indirect=True)
async def test_an_idle_reader_has_no_task_but_its_connections_own(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path) as service:
        before = tasks_at_work()
        clients = await service.audience(50)
        await service.publish_each(3)
        for client in clients:
            await client.reached(3)
        await settle()
        a_reader = {"Client._read": 50} | ({} if way.parked else {"Client._connect": 50, "Sender._watch": 50})
        assert tasks_at_work() - before == a_reader

        for client in clients[:5]:
            client.exchange.block()
        await service.publish_each(3)
        await clients[-1].reached(6)
        await settle()
        carried = {"Sender._work": 5} if way.parked else {}
        assert tasks_at_work() - before == a_reader | carried

        for client in clients[:5]:
            client.exchange.unblock()
            await client.reached(6)
        await settle()
        assert tasks_at_work() - before == a_reader  # idle again

        for client in clients[::2]:
            client.exchange.block()
        await service.publish_each(3)
        for client in clients:
            await client.leave()
        await settle()
        assert tasks_at_work() == before
        service.assert_left()


async def test_nothing_is_left_behind_by_readers_that_came_and_went(way: Way, tmp_path: Path) -> None:
    async with house(way, tmp_path) as service:
        for _ in range(3):
            clients = [service.connect() for _ in range(10)]
            for client in clients[::2]:
                await client.opened()
            await service.publish_each(2)
            for client in clients:  # some before their first byte
                await client.leave()
            service.assert_left()


# Tails


@pytest.mark.parametrize("at", ["before the stat", "after the stat"])
async def test_a_reader_that_comes_while_the_last_one_leaves_misses_nothing(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    async with house(way, tmp_path) as service:
        last = await service.subscribe()
        stat = service.log.stat

        async def stat_while_it_leaves(stream: str) -> Any:
            if at == "before the stat":
                await last.leave()
            found = await stat(stream)
            if at == "after the stat":
                await last.leave()
            return found

        monkeypatch.setattr(service.log, "stat", stat_while_it_leaves)
        client = await service.subscribe()
        monkeypatch.undo()
        await service.publish_each(3)
        await client.reached(3)
        assert client.seqs == [1, 2, 3]
        assert service.topics.subscribers(TOPIC) == 1
        await client.leave()
        service.assert_left()


async def test_a_subscription_that_fails_halfway_leaves_nothing_and_takes_nothing(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(way, tmp_path) as service:
        await service.publish("one")

        async def away(stream: str) -> Any:
            raise LogUnavailable("the disk is full")

        monkeypatch.setattr(service.log, "stat", away)
        refused = service.connect()
        await refused.ended()
        assert refused.exchange.status == 503
        service.assert_left()


@on_memory
async def test_a_reader_of_a_tail_that_has_ended_gets_what_is_there_and_the_end(way: Way) -> None:
    log = MemoryLog()
    async with log.running():
        tails, epoch = Tails(log), new_epoch()
        await log.create("run", epoch=epoch)
        await log.append("run", [encode(Event("one"))], epoch=epoch)
        tail = tails.acquire("run")
        await log.append("run", [encode(Event("two"))], epoch=epoch, close=True)
        assert tail.ended == "closed" and tail.top == 2
        reader = Reader(tail, 0, dialect=NAMED)
        tail.release()
        batches = [await batch_of(reader)]
        while not reader.finished:
            batches.append(await batch_of(reader))
        assert re.findall(rb"data: (\w+)\n", b"".join(batches)) == [b"one", b"two"]


@on_memory
async def test_a_stream_that_was_closed_before_anybody_watched_ends_its_reader(way: Way) -> None:
    log = MemoryLog()
    async with log.running():
        tails, epoch = Tails(log), new_epoch()
        await log.create("run", epoch=epoch)
        await log.append("run", [encode(Event("one"))], epoch=epoch, close=True)
        tail = tails.acquire("run")
        stat = await log.stat("run")
        assert stat is not None
        tail.apply(stat)
        reader = Reader(tail, 0, dialect=NAMED)
        tail.release()
        assert b"data: one\n" in await batch_of(reader)
        assert reader.ready() == b"" and reader.finished


@on_memory
async def test_the_end_comes_after_what_was_committed_and_not_yet_announced(way: Way) -> None:
    log = MemoryLog()
    async with log.running():
        tails, epoch = Tails(log), new_epoch()
        await log.create("run", epoch=epoch)
        tail = tails.acquire("run")
        await log.append("run", [encode(Event("one"))], epoch=epoch)
        tail.close()  # the announcements are late
        await log.append("run", [encode(Event("two")), encode(Event("three"))], epoch=epoch, close=True)
        stat = await log.stat("run")
        assert stat is not None
        tail.apply(stat)
        reader = Reader(tail, 0, dialect=NAMED)
        batches = [await batch_of(reader)]
        while not reader.finished:
            batches.append(await batch_of(reader))
        assert re.findall(rb"data: (\w+)\n", b"".join(batches)) == [b"one", b"two", b"three"]


@on_memory
async def test_a_tail_that_has_ended_is_replaced_and_its_last_readers_do_not_take_the_new_one_away(way: Way) -> None:
    log = MemoryLog()
    async with log.running():
        tails = Tails(log)
        await log.create("topic", epoch=new_epoch(), kind="topic")
        old = tails.acquire("topic")
        reader = Reader(old, 0, dialect=NAMED)
        old.release()
        await log.delete("topic")
        await log.create("topic", epoch=(epoch := new_epoch()), kind="topic")
        new = tails.acquire("topic")
        assert new is not old
        second = Reader(new, 0, dialect=NAMED)
        new.release()
        assert tails.subscribers("topic") == 1
        reader.close()
        reader.close()  # does nothing
        assert tails.get("topic") is new and tails.subscribers("topic") == 1
        await log.append("topic", [encode(Event("one"))], epoch=epoch)
        assert b"data: one\n" in (second.ready() or b"")
        second.close()
        assert tails.get("topic") is None and log._watchers._streams == {}


@on_memory
async def test_a_gap_is_announced_without_an_id_in_the_way_that_the_route_speaks(way: Way) -> None:
    gap = Gap("trimmed", 3, 7)
    named = ssecore.log.tail.gap_frames(gap, NAMED)
    assert named == b'event: gap\ndata: {"reason":"trimmed","from":3,"to":7}\n\n'
    data_only = ssecore.log.tail.gap_frames(gap, DATA_ONLY)
    assert data_only == b'data: {"type":"gap","reason":"trimmed","from":3,"to":7}\n\n'


# The whole of it, at random


class Person:
    """Somebody who reads a topic for long, over many connections: what it holds is what a program would hold."""

    def __init__(self, service: House) -> None:
        self.client: Client | None = None
        self.last_id = ""
        #: None before its first event.
        self.top: int | None = None
        self.trimmed = 0
        self._service = service
        self._taken = 0

    def connect(self) -> None:
        self.client = self._service.connect(self.last_id)
        self._taken = 0
        if self.last_id:  # a gap that came behind its last event is announced again
            self.top = int(self.last_id.partition(".")[2])

    def take(self, body: bytes, known: dict[int, tuple[bytes, bytes]]) -> None:
        """What is complete in these bytes of the connection, checked against what it had and what others got."""
        for match in _FRAME.finditer(body, self._taken):
            self._taken = match.end()
            if match["gap"] is not None:
                gap = orjson.loads(match["gap"])
                assert gap["reason"] == "trimmed" and self.top is not None
                assert gap["from"] == self.top + 1 <= gap["to"], f"{gap} after {self.top}"
                self.top, self.trimmed = gap["to"], self.trimmed + 1
                continue
            seq, epoch = int(match["seq"]), match["epoch"]
            self.last_id = f"{epoch.decode()}.{seq}"
            if match["body"].startswith(b"event: init\n"):
                assert self.top is None, "a resumed subscription has no init"
            else:
                assert seq == (self.top or 0) + 1, f"{seq} came after {self.top}"
                assert known.setdefault(seq, (epoch, match["body"])) == (epoch, match["body"])
            self.top = seq


async def act_at_random(service: House, rng: random.Random, steps: int) -> tuple[int, int]:
    """Readers that block, read on, leave, are cut at any byte and come back, beside one publisher.

    Gives the number of connections and of gaps.
    """
    people = [Person(service) for _ in range(12)]
    known: dict[int, tuple[bytes, bytes]] = {}
    connections = 0
    for _ in range(steps):
        for _ in range(rng.randrange(4)):
            texts = [f"{rng.random()} {'x' * rng.randrange(300)}" for _ in range(rng.choice((1, 1, 1, 4)))]
            await service.publish(*texts)
        person = rng.choice(people)
        client = person.client
        if client is None or client.exchange.ended.is_set():
            if client is not None:
                person.take(client.body, known)
            person.connect()
            connections += 1
        elif (action := rng.random()) < 0.35:
            client.exchange.block()
        elif action < 0.7:
            client.exchange.unblock()
        else:
            await (client.cancel() if action > 0.9 else client.leave())
            person.take(client.body[: rng.randint(0, len(client.body))], known)
            person.client = None
        await anyio.sleep(rng.choice((0, 0, 0, 0.001)))
    for person in people:
        if person.client is None:
            person.connect()
        assert person.client is not None
        person.client.exchange.unblock()
    await service.publish("the last")
    for person in people:
        assert person.client is not None
        await person.client.until(lambda client: b"data: the last\n" in client.body or client.exchange.ended.is_set())
        person.take(person.client.body, known)
        assert person.top == service.published
        await person.client.leave()
    service.assert_left()
    return connections, sum(person.trimmed for person in people)


@pytest.mark.parametrize("kept", [100_000, 25])
@pytest.mark.parametrize("seed", range(2))
async def test_every_reader_holds_a_contiguous_history_whatever_happens_to_its_connections(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, kept: int
) -> None:
    monkeypatch.setattr(ssecore.log.tail, "TAIL_BYTES", 3000)
    monkeypatch.setattr(ssecore.log.tail, "READ_BYTES", 1500)
    monkeypatch.setattr(ssecore.log.tail, "SLICE", 3)
    async with house(way, tmp_path, retention_events=kept) as service:
        connections, gaps = await act_at_random(service, random.Random(seed), 400 if way.virtual else 150)
        assert connections > 20
        assert (gaps > 0) == (kept == 25)
