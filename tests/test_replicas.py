"""Several replicas of the service on one Redis and one data folder: each answers for every run and topic."""

import json
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
from redis import Redis

import ssecore.runs.worker
from sseapp import GET, Request, Run, Settings, SSEApp
from ssecore.errors import UpstreamError
from ssecore.wire import Decoder, Event
from tests import redis_server, upstream
from tests.clients import ask, listening
from tests.needs import needs
from tests.redis_server import RedisServer
from tests.serving import Server, run_sseapp, serve, wait_until

pytestmark = needs("valkey")

KEY: Final = "0123456789abcdef0123456789"
#: For a test that waits for its end. The others have the default: a replica that a busy machine doesn't let run for a
#: moment isn't taken for dead.
LEASE_S: Final = 1.0


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server.serving("valkey") as server:
        yield server


class Replicas:
    def __init__(self, redis: RedisServer, folder: Path, stack: ExitStack) -> None:
        self._redis, self._folder, self._stack = redis, folder, stack

    def start(self, **env: str) -> Server:
        environ = {"SSEAPP_LOG": self._redis.url, "SSEAPP_RETRY_MS": "50", **env}
        return self._stack.enter_context(serve(self._folder, env=environ))


@pytest.fixture
def replicas(redis: RedisServer, tmp_path: Path) -> Iterator[Replicas]:
    redis.call("FLUSHALL")
    with ExitStack() as stack:
        yield Replicas(redis, tmp_path, stack)


def read(server: Server, path: str, after: str = "", **headers: str) -> list[Event]:
    """To the proper end of the answer."""
    if after:
        headers["last-event-id"] = after
    answer = server.client.get(path, headers=headers)
    assert answer.status_code == 200, answer.text
    # `retry` is the connection's: it begins each answer.
    return [Event(event.data, event.event, event.id) for event in Decoder().feed(answer.content)]


def state(server: Server, run: str) -> str:
    answer: str = server.client.get(f"/runs/{run}").json()["state"]
    return answer


def start(server: Server, path: str, **headers: str) -> str:
    answer = server.client.get(path, headers={"prefer": "respond-async", **headers})
    assert answer.status_code == 202, answer.text
    run: str = answer.json()["run"]
    return run


def test_any_replica_serves_any_cursor(replicas: Replicas) -> None:
    one, two = replicas.start(SSEAPP_MOCK_DELAY_S="0.01"), replicas.start()
    whole = read(one, "/chat?prompt=hello%20there")
    assert whole == read(two, f"/runs/{str(whole[0].id).partition('.')[0]}/events")
    for event, rest in zip(whole[:-1], range(1, len(whole)), strict=True):
        assert read(two, "/chat?prompt=hello%20there", after=str(event.id)) == whole[rest:]
    assert two.client.get("/chat?prompt=hello%20there", headers={"last-event-id": str(whole[-1].id)}).status_code == 204
    assert [run["state"] for run in two.client.get("/runs").json()["runs"]] == ["completed"]


def test_a_run_is_read_live_at_a_replica_that_doesnt_work_on_it(replicas: Replicas) -> None:
    go_on = threading.Event()

    def script(call: upstream.Call) -> None:
        call.head()
        call.send(upstream.token("one "))
        assert go_on.wait(upstream.LIMIT_S)
        call.send(upstream.token("two"), upstream.STOP, upstream.DONE)
        call.end()

    with upstream.serve() as model:
        model.plan(script)
        one, two = replicas.start(OPENAI_BASE_URL=model.url), replicas.start()
        run = start(one, "/chat?prompt=hi")
        with httpx.stream("GET", f"{two.url}/runs/{run}/events", timeout=20) as answer:
            chunks, decoder, there = answer.iter_raw(), Decoder(), list[Event]()
            while not there:
                there += decoder.feed(next(chunks))
            assert state(two, run) == "running"
            go_on.set()
            there += decoder.feed(b"".join(chunks))
        model.settle()
    assert there == Decoder().feed(one.client.get(f"/runs/{run}/events").content)
    assert there[-1].data == "[DONE]"


def test_a_key_is_one_run_over_replicas(replicas: Replicas) -> None:
    one, two = replicas.start(SSEAPP_MOCK_DELAY_S="0"), replicas.start(SSEAPP_MOCK_DELAY_S="0")
    runs = {start(server, "/chat?prompt=hi", **{"idempotency-key": KEY}) for server in (one, two, one)}
    assert len(runs) == 1
    other = two.client.get("/chat?prompt=ho", headers={"idempotency-key": KEY})
    assert other.status_code == 422


def test_any_replica_cancels_any_run(replicas: Replicas) -> None:
    one, two = replicas.start(SSEAPP_MOCK_DELAY_S="30"), replicas.start()
    run = start(one, "/chat?prompt=hi")
    assert two.client.delete(f"/runs/{run}").status_code == 202
    events = read(two, f"/runs/{run}/events")
    assert json.loads(events[-2].data) == {"type": "cancelled", "reason": "asked"}
    assert state(one, run) == state(two, run) == "cancelled"
    assert two.client.delete(f"/runs/{run}").status_code == 204
    assert one.client.get(f"/runs/{run}").status_code == 404


def test_runs_of_a_replica_that_died_are_closed_by_another(replicas: Replicas) -> None:
    environ = {"SSEAPP_LEASE_S": str(LEASE_S)}
    one, two = replicas.start(SSEAPP_MOCK_DELAY_S="30", **environ), replicas.start(**environ)
    run = start(one, "/chat?prompt=hi")
    one.process.send_signal(signal.SIGKILL)
    events = read(two, f"/runs/{run}/events")
    assert json.loads(events[-2].data)["code"] == "interrupted"
    assert events[-1].data == "[DONE]"
    assert state(two, run) == "interrupted"


def test_a_reader_elsewhere_keeps_a_run_and_its_leaving_lets_it_go(replicas: Replicas) -> None:
    lease_s = 2 * LEASE_S
    environ = {"SSEAPP_LINGER_S": "0.2", "SSEAPP_MOCK_DELAY_S": "30", "SSEAPP_LEASE_S": str(lease_s)}
    one, two = replicas.start(**environ), replicas.start(**environ)
    with ExitStack() as stack:
        with httpx.stream("GET", f"{one.url}/chat?prompt=hi", timeout=20) as first:
            held = first.iter_raw()  # it closes the answer when it is collected
            assert next(held)
            run = first.headers["run-id"]
            answer = stack.enter_context(httpx.stream("GET", f"{two.url}/runs/{run}/events", timeout=20))
            chunks = answer.iter_raw()
            assert next(chunks)
        time.sleep(lease_s + 0.4)  # one sign of interest is over by then, and the linger time several times
        assert state(two, run) == "running"
    wait_until(lambda: state_quietly(redis=replicas._redis, run=run) == "cancelled")


def state_quietly(redis: RedisServer, run: str) -> str:
    """Asking a replica would count as interest."""
    facts = redis.call("HGET", f"{{sseapp}}:facts:{run}", "meta")
    meta: str = json.loads(facts.partition("\r\n")[2])["state"]
    return meta


def test_a_topic_is_one_over_replicas(replicas: Replicas) -> None:
    one, two = replicas.start(), replicas.start()
    with httpx.stream("GET", f"{two.url}/topics/news", timeout=20) as answer:
        chunks = answer.iter_raw()
        decoder, events = Decoder(), list[Event]()
        while not events:
            events += decoder.feed(next(chunks))
        published = []
        for number in range(20):
            reply = (one, two)[number % 2].client.post("/topics/news", json={"n": number})
            published.append(reply.json()["id"])
        while len(events) < 21:
            events += decoder.feed(next(chunks))
    assert [event.id for event in events[1:]] == published
    assert [json.loads(event.data) for event in events[1:]] == [{"n": number} for number in range(20)]
    assert len({id.partition(".")[0] for id in published}) == 1


def test_runs_that_finish_while_their_replica_drains_are_read_to_the_end_elsewhere(replicas: Replicas) -> None:
    one, two = replicas.start(SSEAPP_MOCK_DELAY_S="0.1"), replicas.start()
    run = start(one, "/chat?prompt=hi")
    one.process.send_signal(signal.SIGTERM)
    events = read(two, f"/runs/{run}/events")
    assert "".join(json.loads(event.data)["content"] for event in events[:-1]) == "This is a mock response to: hi"
    assert state(two, run) == "completed"
    assert one.wait() == 0


def test_while_redis_is_away_readers_stay_and_go_on_when_it_is_back(tmp_path: Path) -> None:
    environ = {"SSEAPP_LEASE_S": str(LEASE_S), "SSEAPP_HEARTBEAT_S": "0.2", "SSEAPP_MOCK_DELAY_S": "30"}
    with redis_server.serving("valkey", keeps=True) as redis, ExitStack() as stack:
        server = stack.enter_context(serve(tmp_path, env={"SSEAPP_LOG": redis.url, **environ}))
        run = start(server, "/chat?prompt=hi")
        reading = stack.enter_context(httpx.stream("GET", f"{server.url}/topics/news", timeout=20))
        chunks, decoder = reading.iter_raw(), Decoder()
        assert [event.event for event in decoder.feed(next(chunks))] == ["init"]
        redis.stop(signal.SIGKILL)
        wait_until(lambda: server.client.get("/readyz").status_code == 503)
        assert server.client.get("/readyz").json() == {"status": "the event log can't be reached or written"}
        assert server.client.get("/healthz").status_code == 200
        refused = server.client.post("/topics/news", json=1)
        assert (refused.status_code, refused.json()["code"]) == (503, "log_unavailable")
        assert refused.headers["retry-after"]
        while b":\n" not in (chunk := next(chunks)):  # a heartbeat
            assert not decoder.feed(chunk)
        redis.start()
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        id = wait_until(lambda: server.client.post("/topics/news", json=2).json().get("id"))
        events: list[Event] = []
        while not events:
            events += [event for event in decoder.feed(next(chunks)) if event.data is not None]
        assert [(event.id, event.data) for event in events] == [(id, "2")]
        assert state(server, run) == "running"


def test_who_waits_for_the_log_while_the_service_stops_is_told(tmp_path: Path) -> None:
    with redis_server.serving("valkey") as redis:
        with serve(tmp_path, env={"SSEAPP_LOG": redis.url, "SSEAPP_DRAIN_S": "0.1"}) as server:
            redis.freeze()
            head = f"POST /topics/news HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\nexpect: 100-continue\r\n"
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
                sock.sendall(f"{head}content-type: application/json\r\ncontent-length: 1\r\n\r\n".encode())
                assert sock.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
                sock.sendall(b"1")
                server.process.terminate()
                answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
            assert server.wait() == 0
        redis.freeze(signal.SIGCONT)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"log_unavailable"' in answer
    assert "graceful shutdown exceeded" not in server.log()


def statuses(server: Server, requests: Sequence[Callable[[], httpx.Response]]) -> tuple[list[int], float]:
    """What they are answered who ask at the same moment, and how long the last one waits."""
    began = time.monotonic()
    with ThreadPoolExecutor(len(requests)) as threads:
        answers = [threads.submit(request) for request in requests]
        found = [answer.result().status_code for answer in answers]
    return found, time.monotonic() - began


def waiters(server: Server) -> list[Callable[[], httpx.Response]]:
    """For topics that nobody has opened, for one that is open, and for runs with a key."""

    def open(method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, f"{server.url}{path}", timeout=60, trust_env=False, verify=False, **options)

    return [
        *[partial(open, "POST", "/topics/new", json=1)] * 6,
        *[partial(open, "GET", "/topics/new")] * 6,
        *[partial(open, "POST", f"/topics/new-{number}", json=1) for number in range(3)],
        *[partial(open, "POST", "/topics/old", json=1)] * 3,
        *[partial(open, "GET", "/topics/old")] * 3,
        *[partial(open, "GET", "/chat?prompt=hi", headers={"idempotency-key": KEY})] * 3,
    ]


def test_all_who_wait_for_a_frozen_redis_wait_once(tmp_path: Path) -> None:
    with redis_server.serving("valkey") as redis:
        wait_s = 3.0  # half a lease
        with serve(tmp_path, env={"SSEAPP_LOG": redis.url, "SSEAPP_LEASE_S": str(2 * wait_s)}) as server:
            assert server.client.post("/topics/old", json=1).status_code == 202
            redis.freeze()
            for _ in range(2):
                found, seconds = statuses(server, waiters(server))
                assert set(found) == {503}
                assert seconds < 2 * wait_s
            redis.freeze(signal.SIGCONT)
            wait_until(lambda: server.client.post("/topics/new", json=1).status_code == 202)


def test_all_who_wait_for_a_frozen_redis_while_the_service_stops_are_told(tmp_path: Path) -> None:
    with redis_server.serving("valkey") as redis:
        with serve(tmp_path, env={"SSEAPP_LOG": redis.url, "SSEAPP_DRAIN_S": "0.1", "SSEAPP_LEASE_S": "60"}) as server:
            assert server.client.post("/topics/old", json=1).status_code == 202
            redis.freeze()
            requests = waiters(server)
            with ThreadPoolExecutor() as threads:
                answers = threads.submit(statuses, server, requests)
                log = server.log()
                wait_until(lambda: len(unread(server)) >= len(requests))
                time.sleep(0.2)  # they are connected, and send
                wait_until(lambda: not any(unread(server)))
                server.process.terminate()
                found, _ = answers.result()
            assert set(found) == {503}
            assert server.wait() == 0
            assert "Traceback" not in server.log().removeprefix(log)
        redis.freeze(signal.SIGCONT)


def unread(server: Server) -> list[int]:
    """Of each connection that is open at the server, the bytes that it has not read."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(row[4].split(":")[1], 16) for row in rows if row[1].endswith(f":{server.port:04X}") and row[3] == "01"]


def test_a_full_redis_is_said_to_who_publishes_and_ends_a_run_with_a_reason(tmp_path: Path) -> None:
    with redis_server.serving("valkey") as redis:
        environ = {"SSEAPP_LOG": redis.url, "SSEAPP_MOCK_DELAY_S": "0.2"}
        with serve(tmp_path, env=environ) as server:
            with httpx.stream("GET", f"{server.url}/chat?prompt={'word+' * 1000}", timeout=20) as answer:
                chunks, decoder = answer.iter_raw(), Decoder()
                events = decoder.feed(next(chunks))
                redis.call("CONFIG", "SET", "maxmemory", "1")
                refused = server.client.post("/topics/news", json=1)
                assert (refused.status_code, refused.json()["code"]) == (503, "log_unavailable")
                assert "Redis is full" in refused.json()["detail"]
                for chunk in chunks:
                    events += decoder.feed(chunk)
            assert json.loads(events[-2].data)["code"] == "log_unavailable"
            assert (events[-2].id, events[-1].data) == (events[-3].id, "[DONE]")  # none of its own
            assert server.client.get("/readyz").status_code == 200
            redis.call("CONFIG", "SET", "maxmemory", "0")
            run = answer.headers["run-id"]
            wait_until(lambda: state(server, run) == "failed")
            assert read(server, f"/runs/{run}/events")[-2].data == events[-2].data


def test_a_password_in_the_url_is_not_printed(tmp_path: Path) -> None:
    answer = run_sseapp(
        "serve", "--data-dir", str(tmp_path), "--log", "redis://:secret@127.0.0.1:1/0", env={"SSEAPP_LEASE_S": "1"}
    )
    assert answer.returncode == 3
    assert "Redis can't be used" in answer.stderr
    assert "secret" not in answer.stderr + answer.stdout
    answer = run_sseapp("serve", "--log", "http://:secret@127.0.0.1:1/0")
    assert "expected sqlite, memory, or a Redis URL" in answer.stderr
    assert "secret" not in answer.stderr + answer.stdout


# A run that fails in its first second, at one replica, while others ask for it


class Replica:
    """An app of its own on the same Redis, whose runs fail when they are told to."""

    def __init__(self, redis: RedisServer) -> None:
        self.app = SSEApp([GET("/work", self.work, run=Run())], Settings(log=redis.url))
        self.runs: list[str] = []
        self.started, self.fail = anyio.Event(), anyio.Event()

    async def work(self, request: Request) -> AsyncIterator[Event]:
        self.runs.append(request.run_id or "")
        self.started.set()
        await self.fail.wait()
        raise UpstreamError("the model is away", code="away")
        yield Event("never")

    async def run(self) -> str:
        """The first one's id, when it is at work."""
        await self.started.wait()
        return self.runs[0]


@asynccontextmanager
async def two_replicas(redis: RedisServer) -> AsyncIterator[tuple[Replica, Replica]]:
    redis.call("FLUSHALL")
    with anyio.fail_after(30):
        async with AsyncExitStack() as stack:
            one, two = Replica(redis), Replica(redis)
            for replica in (one, two):
                await stack.enter_async_context(replica.app.running())
            yield one, two


@pytest.fixture
def a_long_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how fast this machine is."""
    monkeypatch.setattr(ssecore.runs.worker, "FIRST_ITEM_S", 25.0)


def assert_stored_error(events: list[Event], run: str) -> None:
    assert [(event.id, event.event, event.data) for event in events] == [
        (f"{run}.1", "error", '{"error":"the model is away","code":"away"}')
    ]


@pytest.mark.parametrize("place", ["view", "key", "202"])
async def test_who_was_told_of_a_run_elsewhere_reads_its_early_failure(
    redis: RedisServer, a_long_second: None, place: str
) -> None:
    async with two_replicas(redis) as (one, two), anyio.create_task_group() as tasks:
        tasks.start_soon(ask, one.app, f"/work?key={KEY}")
        run = await one.run()
        if place == "202":
            answer = await ask(two.app, f"/work?key={KEY}", headers={"prefer": "respond-async"})
            assert (answer.status, answer.json["run"]) == (202, run)
            one.fail.set()
            assert_stored_error((await ask(two.app, f"/runs/{run}/events")).events, run)
        else:
            target = f"/runs/{run}/events" if place == "view" else f"/work?key={KEY}"
            async with listening(two.app, target) as reading:
                assert (reading.exchange.status, reading.run) == (200, run)
                one.fail.set()
                assert_stored_error(await reading.rest(), run)
        for replica in (one, two):
            assert (await ask(replica.app, f"/runs/{run}")).json["state"] == "failed"
            assert_stored_error((await ask(replica.app, f"/work?key={KEY}")).events, run)
        assert (one.runs, two.runs) == ([run], [])


async def test_a_run_that_failed_early_has_never_been_for_other_replicas(
    redis: RedisServer, a_long_second: None
) -> None:
    async with two_replicas(redis) as (one, two), anyio.create_task_group() as tasks:
        one.fail.set()
        assert (await ask(one.app, f"/work?key={KEY}")).problem == (502, "away")
        assert (await ask(two.app, "/runs")).json == {"runs": []}
        # Its key is free: the other one starts a run of its own.
        tasks.start_soon(ask, two.app, f"/work?key={KEY}")
        assert await two.run() not in one.runs
        two.fail.set()


@pytest.mark.parametrize("place", ["view", "key"])
async def test_who_finds_a_run_elsewhere_just_before_it_is_deleted_is_not_told_of_it(
    redis: RedisServer, a_long_second: None, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_replicas(redis) as (one, two), anyio.create_task_group() as tasks:
        failed = anyio.Event()

        async def ask_one() -> None:
            assert (await ask(one.app, f"/work?key={KEY}")).problem == (502, "away")
            failed.set()

        tasks.start_soon(ask_one)
        run = await one.run()
        two.fail.set()
        peers = two.app._services.runs.log.peers  # type: ignore[union-attr]
        assert peers is not None
        tell = peers.mark_answered

        async def too_late(stream: str) -> None:
            one.fail.set()
            await failed.wait()
            await tell(stream)

        monkeypatch.setattr(peers, "mark_answered", too_late)
        if place == "view":
            assert (await ask(two.app, f"/runs/{run}/events")).problem == (404, "not_found")
        else:
            assert (await ask(two.app, f"/work?key={KEY}")).problem == (502, "away")
        assert len(two.runs) == (place == "key")


# Another version's messages, and what Redis loses in part


def test_another_versions_messages_end_no_replica(replicas: Replicas, redis: RedisServer) -> None:
    """In a rolling deploy: on each channel that it listens to, and in the list of its calls."""
    one, two = replicas.start(SSEAPP_MOCK_DELAY_S="0.05"), replicas.start(SSEAPP_MOCK_DELAY_S="0")
    with Redis(unix_socket_path=str(redis.path)) as other, ExitStack() as stack:
        reading = [stack.enter_context(httpx.stream("GET", f"{one.url}/topics/news", timeout=20)) for one in (one, two)]
        readers = [(answer.iter_raw(), Decoder()) for answer in reading]
        for chunks, decoder in readers:
            assert [event.event for event in decoder.feed(next(chunks))] == ["init"]
        run = start(one, "/chat?prompt=a%20b%20c%20d")
        for message in (
            b"",
            b"\xff\xfe",
            b"{}",
            b"1 2 3 4 5",
            b"1 x 0 - ",
            b"1 1 0 \xff x",
            b"9 1 0 - \0\0\0\0",
            b"1 1",
        ):
            channels = other.pubsub_channels()
            assert len(channels) >= 3
            for channel in channels:
                assert other.publish(channel, message)
                if b":called:" in channel:
                    other.rpush(channel.replace(b":called:", b":calls:"), message)
                    other.publish(channel, b"")
        for server in (one, two):
            id = server.client.post("/topics/news", json=1).json()["id"]
            for chunks, decoder in readers:
                events: list[Event] = []
                while not events:
                    events += decoder.feed(next(chunks))
                assert [event.id for event in events] == [id]
        assert read(two, f"/runs/{run}/events") == read(one, f"/runs/{run}/events")
        assert state(two, run) == "completed"
        for server in (one, two):
            assert server.client.get("/readyz").status_code == 200
            assert server.client.get("/chat?prompt=hi").status_code == 200


def lose(redis: RedisServer, part: str, run: str) -> None:
    assert redis.call("DEL", f"{{sseapp}}:{part}:{run}") == ":1\r\n"


@pytest.mark.parametrize("after", [None, 0, 2])
def test_a_run_that_is_over_and_whose_events_redis_lost_ends_its_readers_once(
    replicas: Replicas, redis: RedisServer, after: int | None
) -> None:
    one, two = replicas.start(SSEAPP_MOCK_DELAY_S="0"), replicas.start()
    run = start(one, "/chat?prompt=hi")
    wait_until(lambda: state(two, run) == "completed")
    lose(redis, "rows", run)
    gap, end = read(two, f"/runs/{run}/events", after="" if after is None else f"{run}.{after}")
    assert json.loads(gap.data) == {"type": "gap", "reason": "expired", "from": (after or 0) + 1, "to": None}
    assert (end.data, end.id) == ("[DONE]", "end")
    assert two.client.get(f"/runs/{run}/events", headers={"last-event-id": "end"}).status_code == 204


def test_a_run_at_work_whose_events_redis_lost_fails_and_says_so(replicas: Replicas, redis: RedisServer) -> None:
    one, two = replicas.start(SSEAPP_MOCK_DELAY_S="0.3"), replicas.start()
    run = start(one, "/chat?prompt=" + "word+" * 1000)
    with ExitStack() as stack:
        live = [
            stack.enter_context(httpx.stream("GET", f"{server.url}/runs/{run}/events", timeout=20))
            for server in (one, two)
        ]
        readers = [answer.iter_raw() for answer in live]
        heard = [next(chunks) for chunks in readers]
        lose(redis, "rows", run)
        for said, chunks in zip(heard, readers, strict=True):
            events = Decoder().feed(said + b"".join(chunks))
            assert [json.loads(event.data)["code"] for event in events[-2:-1]] == ["log_error"]
    wait_until(lambda: state(two, run) == "failed")
    gap, error, done = read(two, f"/runs/{run}/events")
    lost = json.loads(gap.data)
    assert (lost["reason"], lost["from"]) == ("trimmed", 1)
    assert json.loads(error.data)["code"] == "log_error"
    assert [error.id, done.id] == [f"{run}.{lost['to'] + 1}", f"{run}.{lost['to'] + 2}"]
    assert two.client.get(f"/runs/{run}/events", headers={"last-event-id": str(done.id)}).status_code == 204


def test_a_run_whose_facts_redis_lost_ends_its_readers_once(replicas: Replicas, redis: RedisServer) -> None:
    one, two = replicas.start(SSEAPP_MOCK_DELAY_S="30"), replicas.start()
    run = start(one, "/chat?prompt=hi")
    with ExitStack() as stack:
        live = [
            stack.enter_context(httpx.stream("GET", f"{server.url}/runs/{run}/events", timeout=20))
            for server in (one, two)
        ]
        readers = [answer.iter_raw() for answer in live]
        for chunks in readers:
            next(chunks)
        lose(redis, "facts", run)
        for chunks in readers:
            b"".join(chunks)  # it ends
    headers = {"last-event-id": f"{run}.1", "accept": "text/event-stream"}
    for path in (f"/runs/{run}/events", "/chat?prompt=hi"):
        events = Decoder().feed(two.client.get(path, headers=headers).content)
        assert "expired" in events[0].data
        assert [event.id for event in events][-1] == "end"
    assert two.client.get(f"/runs/{run}").status_code == 404


def test_a_topic_whose_facts_redis_lost_begins_anew(replicas: Replicas, redis: RedisServer) -> None:
    one, two = replicas.start(), replicas.start()
    old = [server.client.post("/topics/news", json=number).json()["id"] for number, server in enumerate((one, two))]
    with Redis(unix_socket_path=str(redis.path)) as other:
        (topic,) = other.keys("*:facts:*")
        assert other.delete(topic)
    new = [server.client.post("/topics/news", json="new").json()["id"] for server in (one, two)]
    assert [id.partition(".")[2] for id in new] == ["1", "2"]
    with httpx.stream("GET", f"{two.url}/topics/news", headers={"last-event-id": old[0]}, timeout=20) as answer:
        chunks, decoder, events = answer.iter_raw(), Decoder(), list[Event]()
        while len(events) < 3:
            events += decoder.feed(next(chunks))
    assert json.loads(events[0].data)["reason"] == "expired"
    assert [(event.id, event.data) for event in events[1:]] == [(id, '"new"') for id in new]
