"""One event at a time, and bursts, to all readers of one topic: the server's CPU time a delivery, and its memory."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from benchmarks import nchan
from benchmarks.crowd import Crowd
from benchmarks.nchan import Nchan
from benchmarks.process import PEERS_PYTHON, Server, memory_bytes
from benchmarks.report import Check, Report, Spread

__all__ = ["BURST", "publisher", "run"]

CPU, CPU_RATIO, BURST_CPU, MEMORY = "CPU µs/delivery", "CPU / nchan", "in bursts", "KiB/connection"
ALL_MS, LOAD = "all have it after ms", "load busy %"
DIRECT, TASK, IN_MEMORY, NCHAN = "sseapp, SQLite", "sseapp, a task a reader", "sseapp, memory log", "nchan"
FLOOR, QUEUES = "prepared bytes", "sse-starlette, a queue a client"
#: Before memory and CPU are measured: what a server makes once.
WARM_READERS, WARM_EVENTS = 100, 10
#: Published back to back, without waiting for the readers.
BURST = 20
#: Slow ones deliver a fifth: they cost five times as much, and their figures need no more.
SLOW = 5


def run(
    *,
    rounds: int = 3,
    readers: int = 1000,
    more_readers: int = 4000,
    most_readers: int = 9000,
    deliveries: int = 100_000,
    peers_python: Path = PEERS_PYTHON,
) -> Report:
    """`deliveries` to `readers` of one topic, to more, and to most: ours, the peers, and the floor in Python."""
    sizes = {"rounds": rounds, "deliveries": deliveries}
    report = Report("fanout", sizes)
    contenders: dict[str, Callable[[int, int], dict[str, float]]] = {
        DIRECT: partial(_ours, Server.service, "sqlite"),
        IN_MEMORY: partial(_ours, Server.service, "memory"),
        TASK: partial(_ours, partial(Server.app, by_task=True), "memory"),
        FLOOR: partial(_peer, partial(Server.peer, "prepared")),
    }
    if nchan.MODULE.exists():
        contenders[NCHAN] = _nchan
    else:
        report.skipped.append(f"nchan: there is no {nchan.MODULE}; Debian has it in libnginx-mod-nchan")
    if peers_python.exists():
        contenders[QUEUES] = partial(_peer, partial(Server.uvicorn, "sse_starlette:app", peers_python))
    else:
        report.skipped.append(f"sse-starlette: there is no {peers_python}; `make bench` installs the peers")
    counts = list(dict.fromkeys((readers, more_readers, most_readers)))
    found: list[dict[str, dict[str, float]]] = []
    for _ in range(rounds):
        one: dict[str, dict[str, float]] = {}
        for count in counts:
            measured = {
                name: measure(count, max(deliveries // count // (SLOW if name in (TASK, QUEUES) else 1), 1))
                for name, measure in contenders.items()
            }
            if NCHAN in measured:
                for figures in measured.values():
                    figures[CPU_RATIO] = figures[CPU] / measured[NCHAN][CPU]
            one |= {_row(name, count): figures for name, figures in measured.items()}
        found.append(one)
    report.add_rounds(found)
    for count in counts:
        if NCHAN in contenders:
            ratio = report.rows[_row(DIRECT, count)][CPU_RATIO]
            report.checks.append(Check(f"CPU a delivery against nchan, {count:,} readers", ratio, at_most=1.15))
        if QUEUES in contenders:
            slower = Spread.of(one[_row(QUEUES, count)][CPU] / one[_row(DIRECT, count)][CPU] for one in found)
            what = f"CPU a delivery, sse-starlette with a queue a client against it, {count:,} readers"
            report.checks.append(Check(what, slower, at_least=5))
    return report


def _row(name: str, readers: int) -> str:
    return f"{name}, {readers:,} readers"


def _ours(start: Callable[[str, str], Server], log: str, readers: int, events: int) -> dict[str, float]:
    with TemporaryDirectory() as folder, start(folder, log) as server:
        return _measure(server, "/topics/benchmark", "/topics/benchmark", readers, events)


def _peer(start: Callable[[], Server], readers: int, events: int) -> dict[str, float]:
    with start() as server:
        return _measure(server, "/topic", "/topic", readers, events)


def _nchan(readers: int, events: int) -> dict[str, float]:
    with Nchan() as server:
        return _measure(server, nchan.SUBSCRIBE, nchan.PUBLISH, readers, events)


def _measure(server: Server | Nchan, subscribe: str, publish: str, readers: int, events: int) -> dict[str, float]:
    with Crowd(server.port, subscribe) as crowd:
        crowd.join(WARM_READERS)
        with publisher(server.port, publish) as post:
            for n in range(WARM_EVENTS):
                post(crowd, n)
    time.sleep(0.5)  # the server has seen them leave
    idle = memory_bytes(server.pid)
    with Crowd(server.port, subscribe) as crowd:
        crowd.join(readers)
        time.sleep(0.5)
        memory = memory_bytes(server.pid) - idle
        with publisher(server.port, publish) as post:  # only now: an idle connection would be closed
            for n in range(WARM_EVENTS, 2 * WARM_EVENTS):
                post(crowd, n)
            begin, cpu, own_cpu = time.perf_counter(), server.cpu_s(), time.process_time()
            took = [post(crowd, n) for n in range(2 * WARM_EVENTS, 2 * WARM_EVENTS + events)]
            seconds, cpu, own_cpu = time.perf_counter() - begin, server.cpu_s() - cpu, time.process_time() - own_cpu
            bursts = -(-events // BURST)
            burst_cpu = server.cpu_s()
            for n in range(bursts):
                post(crowd, 2 * WARM_EVENTS + events + n * BURST, BURST)
            burst_cpu = server.cpu_s() - burst_cpu
    return {
        CPU: 1e6 * cpu / readers / events,
        BURST_CPU: 1e6 * burst_cpu / readers / (bursts * BURST),
        MEMORY: memory / 1024 / readers,
        ALL_MS: 1000 * statistics.median(took),
        LOAD: 100 * own_cpu / seconds,
    }


class Waiting(Protocol):
    """A crowd, or several."""

    def until(self, mark: bytes) -> None: ...


@contextmanager
def publisher(port: int, target: str) -> Iterator[Callable[..., float]]:
    """Posts event number n, or so many from n on, and says after how many seconds all of the crowd had the last."""
    connection = HTTPConnection("127.0.0.1", port)

    def post(crowd: Waiting, n: int, events: int = 1) -> float:
        begin = time.perf_counter()
        for number in range(n, n + events):
            mark = b'"n":"%08d"' % number
            connection.request(
                "POST",
                target,
                b'{%b,"message":"an event of about sixty bytes"}' % mark,
                {"content-type": "application/json"},
            )
            if number < n + events - 1:
                _answered(connection, target)
        crowd.until(mark)
        took = time.perf_counter() - begin
        _answered(connection, target)
        return took

    try:
        yield post
    finally:
        connection.close()


def _answered(connection: HTTPConnection, target: str) -> None:
    answer = connection.getresponse()
    if not 200 <= answer.status < 300:
        raise RuntimeError(f"{target}: {answer.status} {answer.read()!r}")
    answer.read()
