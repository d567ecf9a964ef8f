"""Connections that come and go: what the server has grown by when very many have been there."""

import time
from tempfile import TemporaryDirectory

from benchmarks.crowd import Crowd
from benchmarks.process import Server, memory_bytes
from benchmarks.report import Check, Report, Spread

__all__ = ["run"]

MIB = 1024 * 1024
FIRST, LAST, GROWTH = "MiB after a tenth", "MiB at the end", "end / tenth"
WAVE = 200
TARGETS = ("/topics/churn", "/ticks?interval=3600")


def run(*, rounds: int = 1, connections: int = 100_000) -> Report:
    """`connections` connect, get their first bytes and leave, 200 at a time; half read a topic, half a generator."""
    report = Report("churn", {"rounds": rounds, "connections": connections})
    report.add_rounds([{"sseapp": _measure(connections)} for _ in range(rounds)])
    growth: Spread = report.rows["sseapp"][GROWTH]
    report.checks.append(Check("memory at the end against after the first tenth", growth, at_most=1.05))
    return report


def _measure(connections: int) -> dict[str, float]:
    waves = max(connections // WAVE, 10)
    with TemporaryDirectory() as folder, Server.app(folder) as server:
        begin, cpu_s, first = time.perf_counter(), server.cpu_s(), 0.0
        for wave in range(waves):
            with Crowd(server.port, TARGETS[wave % 2]) as crowd:
                crowd.join(WAVE)
            if wave + 1 == waves // 10:
                first = _settled(server)
        cpu_s, seconds = server.cpu_s() - cpu_s, time.perf_counter() - begin
        last = _settled(server)
    return {
        FIRST: first / MIB,
        LAST: last / MIB,
        GROWTH: last / first,
        "connections/s": waves * WAVE / seconds,
        "CPU µs/connection": 1e6 * cpu_s / waves / WAVE,
    }


def _settled(server: Server) -> float:
    time.sleep(1)  # all that left have been noticed
    return memory_bytes(server.pid)
