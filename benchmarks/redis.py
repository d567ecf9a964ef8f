"""The event log in Redis, with one replica and with two, beside the logs in memory and in SQLite.

Appending (a run that never waits), fan-out (one topic, its readers spread over the replicas), what Redis is asked for
an event of many token streams, read at their own replica and at another one, and what it costs that many runs are read
by many who wait.
"""

import re
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory

import httpx

from benchmarks.crowd import Crowd
from benchmarks.fanout import BURST, publisher
from benchmarks.load import fetch
from benchmarks.process import Server, cpu_s, memory_bytes
from benchmarks.report import Check, Report, Spread
from tests.needs import find
from tests.redis_server import RedisServer, serving

__all__ = ["has_redis", "run"]

APPEND, APPEND_CPU, REDIS_CPU = "events/s", "CPU µs/event", "Redis µs/event"
FAN_OUT, BURSTS, ALL_MS = "CPU µs/delivery", "in bursts", "all have it after ms"
TOPIC = "/topics/benchmark"
UNLIMITED = {
    name: "none"
    for name in ("retention_events", "retention_bytes", "max_runs", "max_streams", "max_subscribers", "max_stream_s")
}
#: A token each 20 ms, as of a model that is read as it writes.
TOKEN_S = 0.02
WARM = 10
#: The log, or else the Redis that stands by, and the number of replicas.
CONTENDERS = {"memory": ("memory", 1), "SQLite": ("sqlite", 1), "Redis": ("", 1), "Redis, 2 replicas": ("", 2)}


def run(
    *,
    rounds: int = 3,
    count: int = 100_000,
    readers: int = 1000,
    deliveries: int = 100_000,
    streams: int = 100,
    tokens: int = 100,
    runs: int = 1000,
    connections: int = 10_000,
) -> Report:
    """memory, SQLite, Redis with one replica and with two; commands an event of token streams; many who wait"""
    sizes = {"rounds": rounds, "count": count, "readers": readers, "deliveries": deliveries, "streams": streams}
    report = Report("redis", {**sizes, "tokens": tokens, "runs": runs, "connections": connections})
    found: list[dict[str, dict[str, float]]] = []
    asked: list[dict[str, float]] = []
    elsewhere: list[dict[str, float]] = []
    for _ in range(rounds):
        one: dict[str, dict[str, float]] = {}
        for name, (log, replicas) in CONTENDERS.items():
            with _started(log, replicas) as (servers, redis):
                one[name] = _append(servers, redis, count) | _fan_out(servers, readers, deliveries // readers)
        found.append(one)
        with _started("", 1) as (servers, redis):
            asked.append(_commands(servers[0], redis, streams, tokens))
        with _started("", 2) as (servers, redis):
            elsewhere.append(_elsewhere(servers, redis, streams, tokens))
    report.add_rounds(found)
    name = f"{streams} token streams"
    report.rows[name] = {column: Spread.of(one[column] for one in asked) for column in asked[0]}
    report.checks.append(Check(f"commands an event, {name}", report.rows[name]["commands/event"], at_most=0.2))
    report.rows[f"{name}, read elsewhere"] = {
        column: Spread.of(one[column] for one in elsewhere) for column in elsewhere[0]
    }
    with _started("", 1) as (servers, redis):
        waiting = _wait(servers[0], redis, runs, connections)
    name = f"{connections:,} readers of {runs:,} runs"
    report.rows[name] = {column: Spread.of([value]) for column, value in waiting.items()}
    report.checks.append(Check("connections that listen", report.rows[name]["listening"], at_most=1))
    return report


@contextmanager
def _started(log: str, replicas: int) -> Iterator[tuple[list[Server], RedisServer]]:
    """A Redis stands by, whatever the log is."""
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        redis = stack.enter_context(serving("redis" if has_redis() else "valkey"))
        servers = [
            stack.enter_context(Server.app(folder, log or redis.url, settings=UNLIMITED)) for _ in range(replicas)
        ]
        yield servers, redis


def has_redis() -> bool:
    try:
        return bool(find("redis"))
    except LookupError:
        return False


def _append(servers: Sequence[Server], redis: RedisServer, count: int) -> dict[str, float]:
    """A run on each, all at the same time."""

    def measure(count: int) -> float:
        with ThreadPoolExecutor() as threads:
            readings = list(threads.map(lambda one: fetch(one.port, f"/durable?count={count}&interval=0"), servers))
        return max(reading.seconds for reading in readings)

    measure(1000)
    cpu, redis_cpu = sum(server.cpu_s() for server in servers), cpu_s(redis.pid)
    seconds = measure(count)
    events = count * len(servers)
    cpu, redis_cpu = sum(server.cpu_s() for server in servers) - cpu, cpu_s(redis.pid) - redis_cpu
    return {APPEND: events / seconds, APPEND_CPU: 1e6 * cpu / events, REDIS_CPU: 1e6 * redis_cpu / events}


class _Crowds:
    """As one crowd is waited for."""

    def __init__(self, crowds: Sequence[Crowd]) -> None:
        self._crowds = crowds

    def until(self, mark: bytes) -> None:
        for crowd in self._crowds:
            crowd.until(mark)


def _fan_out(servers: Sequence[Server], readers: int, events: int) -> dict[str, float]:
    """What is published at the first replica comes to the readers of all."""
    with ExitStack() as stack:
        crowds = [stack.enter_context(Crowd(server.port, TOPIC)) for server in servers]
        for crowd in crowds:
            crowd.join(readers // len(crowds))
        post, all_of_them = stack.enter_context(publisher(servers[0].port, TOPIC)), _Crowds(crowds)
        for n in range(WARM):
            post(all_of_them, n)
        cpu = sum(server.cpu_s() for server in servers)
        took = [post(all_of_them, n) for n in range(WARM, WARM + events)]
        cpu = sum(server.cpu_s() for server in servers) - cpu
        bursts = -(-events // BURST)
        burst_cpu = sum(server.cpu_s() for server in servers)
        for n in range(bursts):
            post(all_of_them, WARM + events + n * BURST, BURST)
        burst_cpu = sum(server.cpu_s() for server in servers) - burst_cpu
    return {
        FAN_OUT: 1e6 * cpu / readers / events,
        BURSTS: 1e6 * burst_cpu / readers / (bursts * BURST),
        ALL_MS: 1000 * statistics.median(took),
    }


def _commands(server: Server, redis: RedisServer, streams: int, tokens: int) -> dict[str, float]:
    """All at the same time, each with its pauses. What a script does inside is none of its own."""
    redis.call("CONFIG", "RESETSTAT")
    with ExitStack() as stack:
        begin, cpu, redis_cpu = time.perf_counter(), server.cpu_s(), cpu_s(redis.pid)
        crowd = stack.enter_context(Crowd(server.port, f"/durable?count={tokens}&interval={TOKEN_S}"))
        crowd.ask(crowd.connect(streams))
        crowd.until(b"event: complete")
        seconds, cpu, redis_cpu = time.perf_counter() - begin, server.cpu_s() - cpu, cpu_s(redis.pid) - redis_cpu
    events = streams * (tokens + 1)
    return {
        APPEND: events / seconds,
        APPEND_CPU: 1e6 * cpu / events,
        REDIS_CPU: 1e6 * redis_cpu / events,
        "commands/event": _asked(redis) / events,
    }


def _asked(redis: RedisServer) -> int:
    stats = dict(re.findall(r"cmdstat_(\S+?):calls=(\d+)", redis.call("INFO", "commandstats")))
    return sum(int(stats.get(name, 0)) for name in ("evalsha", "set", "lrange", "subscribe", "unsubscribe", "ping"))


def _elsewhere(servers: Sequence[Server], redis: RedisServer, streams: int, tokens: int) -> dict[str, float]:
    """All work at the first replica, and each is read at the second."""
    one, two = servers
    redis.call("CONFIG", "RESETSTAT")
    with ExitStack() as stack:
        begin, cpus, redis_cpu = time.perf_counter(), (one.cpu_s(), two.cpu_s()), cpu_s(redis.pid)
        crowds = []
        for place in _begun(one, streams, f"/durable?count={tokens}&interval={TOKEN_S}"):
            crowds.append(crowd := stack.enter_context(Crowd(two.port, place)))
            crowd.ask(crowd.connect(1))
        _Crowds(crowds).until(b"event: complete")
        seconds, redis_cpu = time.perf_counter() - begin, cpu_s(redis.pid) - redis_cpu
        wrote, read = one.cpu_s() - cpus[0], two.cpu_s() - cpus[1]
    events = streams * (tokens + 1)
    return {
        APPEND: events / seconds,
        APPEND_CPU: 1e6 * wrote / events,
        "CPU µs/event, reader": 1e6 * read / events,
        REDIS_CPU: 1e6 * redis_cpu / events,
        "commands/event": _asked(redis) / events,
    }


def _begun(server: Server, runs: int, target: str) -> list[str]:
    """So many runs, and where each can be read."""
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60, trust_env=False) as client:
        started = [client.get(target, headers={"prefer": "respond-async"}) for _ in range(runs)]
        return [answer.url.join(answer.headers["location"]).path for answer in started]


def _wait(server: Server, redis: RedisServer, runs: int, connections: int) -> dict[str, float]:
    places = _begun(server, runs, "/durable?count=2&interval=3600")
    memory = memory_bytes(server.pid)
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(Crowd(server.port, place)).join(connections // runs)
        time.sleep(1)
        memory = memory_bytes(server.pid) - memory
        redis.call("CONFIG", "RESETSTAT")
        cpu, redis_cpu = server.cpu_s(), cpu_s(redis.pid)
        time.sleep(10)
        cpu, redis_cpu = server.cpu_s() - cpu, cpu_s(redis.pid) - redis_cpu
        clients = [
            line for line in redis.call("CLIENT", "LIST").splitlines() if "cmd=" in line and "cmd=client" not in line
        ]
    return {
        "connections": len(clients),
        "listening": sum(" sub=0 " not in line for line in clients),
        "KiB/reader": memory / 1024 / connections,
        "CPU %": 10 * cpu,
        "Redis CPU %": 10 * redis_cpu,
    }
