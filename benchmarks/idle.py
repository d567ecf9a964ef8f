"""Thousands of connections that wait: the server's memory for each, and its CPU time with heartbeats on."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import nchan
from benchmarks.crowd import Crowd
from benchmarks.nchan import Nchan
from benchmarks.process import PEERS_PYTHON, Server, memory_bytes
from benchmarks.report import Check, Report

__all__ = ["run"]

MEMORY, CPU = "KiB/connection", "CPU %"
TOPIC, FLEETING = "sseapp, topic readers", "sseapp, fleeting generators"
TICKS = "/ticks?interval=3600"
#: Before memory is measured: what a server makes once.
WARM = 200


def run(*, rounds: int = 1, connections: int = 9000, seconds: int = 16, peers_python: Path = PEERS_PYTHON) -> Report:
    """`connections` that wait, watched for `seconds`: a heartbeat is due after 15 (bare ASGI and nchan send none)."""
    report = Report("idle", {"rounds": rounds, "connections": connections, "seconds": seconds})
    contenders: dict[str, tuple[Callable[[str], AbstractContextManager[Server | Nchan]], str]] = {
        TOPIC: (Server.service, "/topics/benchmark"),
        FLEETING: (Server.app, TICKS),
        "bare ASGI": (lambda _: Server.uvicorn("bare:app"), TICKS),
    }
    if nchan.MODULE.exists():
        contenders["nchan"] = (lambda _: Nchan(), nchan.SUBSCRIBE)
    else:
        report.skipped.append(f"nchan: there is no {nchan.MODULE}; Debian has it in libnginx-mod-nchan")
    if peers_python.exists():
        start = partial(Server.uvicorn, "sse_starlette:app", peers_python)
        contenders["sse-starlette"] = (lambda _: start(), TICKS)
    else:
        report.skipped.append(f"sse-starlette: there is no {peers_python}; `make bench` installs the peers")
    found = []
    for _ in range(rounds):
        one: dict[str, dict[str, float]] = {}
        for name, (begin, target) in contenders.items():
            with TemporaryDirectory() as folder, begin(folder) as server:
                one[name] = _measure(server, target, connections, seconds)
        found.append(one)
    report.add_rounds(found)
    report.checks = [
        Check(f"{MEMORY}, {TOPIC}", report.rows[TOPIC][MEMORY], at_most=11),
        Check(f"{MEMORY}, {FLEETING}", report.rows[FLEETING][MEMORY], at_most=16),
    ]
    return report


def _measure(server: Server | Nchan, target: str, connections: int, seconds: int) -> dict[str, float]:
    with Crowd(server.port, target) as crowd:
        crowd.join(WARM)
    time.sleep(1)  # it has seen them leave
    empty = memory_bytes(server.pid)
    with Crowd(server.port, target) as crowd:
        crowd.join(connections)
        time.sleep(2)
        memory, cpu_s = memory_bytes(server.pid) - empty, server.cpu_s()
        time.sleep(seconds)
        cpu_s = server.cpu_s() - cpu_s
    return {MEMORY: memory / 1024 / connections, CPU: 100 * cpu_s / seconds}
