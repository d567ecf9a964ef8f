"""One event at a time to all readers of one topic: the server's CPU time a delivery, and its memory a connection."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from tempfile import TemporaryDirectory

from benchmarks import nchan
from benchmarks.crowd import Crowd
from benchmarks.nchan import Nchan
from benchmarks.process import Server, memory_bytes
from benchmarks.report import Report

__all__ = ["run"]

CPU, CPU_RATIO, MEMORY = "CPU µs/delivery", "CPU / nchan", "KiB/connection"
ALL_MS, LOAD = "all have it after ms", "load busy %"
DIRECT, TASK, IN_MEMORY, NCHAN = "direct, SQLite", "by task, SQLite", "direct, memory log", "nchan"
#: Before memory and CPU are measured: what a server makes once.
WARM_READERS, WARM_EVENTS = 100, 10


def run(*, rounds: int = 3, readers: int = 1000, more_readers: int = 4000, deliveries: int = 200_000) -> Report:
    """`deliveries` to `readers` of one topic, and to `more_readers`: direct, by task, and nchan where it is there."""
    sizes = {"rounds": rounds, "readers": readers, "more_readers": more_readers, "deliveries": deliveries}
    report = Report("fanout", sizes)
    contenders: dict[str, Callable[[int, int], dict[str, float]]] = {
        DIRECT: partial(_ours, Server.service, "sqlite"),
        TASK: partial(_ours, partial(Server.app, by_task=True), "sqlite"),
        IN_MEMORY: partial(_ours, Server.service, "memory"),
    }
    if nchan.MODULE.exists():
        contenders[NCHAN] = _nchan
    else:
        report.skipped.append(f"nchan: there is no {nchan.MODULE}; Debian has it in libnginx-mod-nchan")
    found: list[dict[str, dict[str, float]]] = []
    for _ in range(rounds):
        one: dict[str, dict[str, float]] = {}
        for count in dict.fromkeys((readers, more_readers)):
            measured = {name: measure(count, max(deliveries // count, 1)) for name, measure in contenders.items()}
            if NCHAN in measured:
                for figures in measured.values():
                    figures[CPU_RATIO] = figures[CPU] / measured[NCHAN][CPU]
            one |= {f"{name}, {count:,} readers": figures for name, figures in measured.items()}
        found.append(one)
    report.add_rounds(found)
    return report


def _ours(start: Callable[[str, str], Server], log: str, readers: int, events: int) -> dict[str, float]:
    with TemporaryDirectory() as folder, start(folder, log) as server:
        return _measure(server, "/topics/benchmark", "/topics/benchmark", readers, events)


def _nchan(readers: int, events: int) -> dict[str, float]:
    with Nchan() as server:
        return _measure(server, nchan.SUBSCRIBE, nchan.PUBLISH, readers, events)


def _measure(server: Server | Nchan, subscribe: str, publish: str, readers: int, events: int) -> dict[str, float]:
    with Crowd(server.port, subscribe) as crowd:
        crowd.join(WARM_READERS)
        with _publisher(server.port, publish) as post:
            for n in range(WARM_EVENTS):
                post(crowd, n)
    time.sleep(0.5)  # the server has seen them leave
    idle = memory_bytes(server.pid)
    with Crowd(server.port, subscribe) as crowd:
        crowd.join(readers)
        time.sleep(0.5)
        memory = memory_bytes(server.pid) - idle
        with _publisher(server.port, publish) as post:  # only now: an idle connection would be closed
            for n in range(WARM_EVENTS, 2 * WARM_EVENTS):
                post(crowd, n)
            begin, cpu, own_cpu = time.perf_counter(), server.cpu_s(), time.process_time()
            took = [post(crowd, n) for n in range(2 * WARM_EVENTS, 2 * WARM_EVENTS + events)]
            seconds, cpu, own_cpu = time.perf_counter() - begin, server.cpu_s() - cpu, time.process_time() - own_cpu
    return {
        CPU: 1e6 * cpu / readers / events,
        MEMORY: memory / 1024 / readers,
        ALL_MS: 1000 * statistics.median(took),
        LOAD: 100 * own_cpu / seconds,
    }


@contextmanager
def _publisher(port: int, target: str) -> Iterator[Callable[[Crowd, int], float]]:
    """Posts event number n, and says after how many seconds all of the crowd had it."""
    connection = HTTPConnection("127.0.0.1", port)

    def post(crowd: Crowd, n: int) -> float:
        mark = b'"n":"%08d"' % n
        begin = time.perf_counter()
        connection.request(
            "POST",
            target,
            b'{%b,"message":"an event of about sixty bytes"}' % mark,
            {"content-type": "application/json"},
        )
        crowd.until(mark)
        took = time.perf_counter() - begin
        answer = connection.getresponse()
        if not 200 <= answer.status < 300:
            raise RuntimeError(f"{target}: {answer.status} {answer.read()!r}")
        answer.read()
        return took

    try:
        yield post
    finally:
        connection.close()
