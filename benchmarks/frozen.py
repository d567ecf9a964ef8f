"""Clients that connect and never read, under a fast publisher: what they hold, and what the others notice of it."""

import os
import re
import socket
import statistics
import time
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.crowd import Crowd
from benchmarks.process import Server, memory_bytes, rss_samples
from benchmarks.report import Check, Report

__all__ = ["AFTER", "AMONG", "GROWTH", "KERNEL", "measure", "run"]

MIB = 1024 * 1024
TOPIC = "/topics/benchmark"
#: An event's size: what the kernel takes for a client who doesn't read (0.5 MiB) is full after some 130 of them.
PAD = b"x" * 4000
#: How long the others are alone, before and after, in parts of the whole time; and how long it takes at most until
#: nothing more goes to the frozen: until then they are a thousand readers more.
ALONE, FREEZE = 0.25, 0.1
#: How late a dropped client's socket may be gone: the sweep's round and the kernel's own.
LATE_S = 10.0
GROWTH, KERNEL, P50, P99 = "growth MiB", "kernel's growth MiB", "all have it ms, p50", "p99"
WORST = "worst"
ALONE_FIRST, FREEZING, AMONG = "readers alone", "while clients freeze", "among the frozen"
DROPPING, AFTER = "while those are dropped", "afterwards"


def run(*, rounds: int = 1, clients: int = 1000, readers: int = 50, seconds: int = 60) -> Report:
    """`clients` never read a topic for `seconds`, then they are dropped; `readers` do, as fast as it is published."""
    report = Report("frozen", {"rounds": rounds, "clients": clients, "readers": readers, "seconds": seconds})
    report.add_rounds([measure(clients, readers, seconds) for _ in range(rounds)])
    for figure in (P50, P99):
        ratio = report.rows[AMONG][f"{figure} / alone"]
        report.checks.append(Check(f"{figure}, among the frozen / alone", ratio, at_most=1.5))
    report.checks.append(Check(f"{AMONG}, {GROWTH}", report.rows[AMONG][GROWTH], at_most=0.1 * clients))
    report.checks.append(Check("sockets left of the frozen", report.rows[AFTER]["sockets"], at_most=0))
    return report


def measure(clients: int, readers: int, seconds: float) -> dict[str, dict[str, float]]:
    settings = {"send_timeout_s": seconds}
    with TemporaryDirectory() as folder, Server.app(folder, settings=settings) as server, ExitStack() as stack:
        crowd = stack.enter_context(Crowd(server.port, TOPIC))
        crowd.join(readers)
        publisher = _Publisher(stack.enter_context(closing(HTTPConnection("127.0.0.1", server.port))), crowd)
        publisher.publish(min(seconds, 1))  # what a server makes once
        alone = publisher.publish(ALONE * seconds)
        idle, kernel, before = memory_bytes(server.pid), _kernel_bytes(), _sockets(server.pid)
        for _ in range(clients):
            stack.enter_context(_frozen(server.port))
        with rss_samples(server.pid) as samples:
            freezing = publisher.publish(FREEZE * seconds)
            among = publisher.publish((1 - FREEZE) * seconds)
        grown, held = _kernel_bytes() - kernel, len(_sockets(server.pid) - before)
        dropping: list[float] = []
        deadline = time.monotonic() + LATE_S
        while (left := _sockets(server.pid) - before) and time.monotonic() < deadline:
            dropping += publisher.publish(0.1)
        after = publisher.publish(ALONE * seconds)
        memory = memory_bytes(server.pid)
        released = _kernel_bytes() - kernel
    return {
        ALONE_FIRST: {GROWTH: 0.0, KERNEL: 0.0, "sockets": 0.0, **_figures(alone, alone)},
        FREEZING: _figures(freezing, alone),
        AMONG: {GROWTH: (max(samples) - idle) / MIB, KERNEL: grown / MIB, "sockets": held, **_figures(among, alone)},
        DROPPING: _figures(dropping or after, alone),
        AFTER: {
            GROWTH: (memory - idle) / MIB,
            KERNEL: released / MIB,
            "sockets": len(left),
            **_figures(after, alone),
        },
    }


def _figures(took_ms: list[float], alone_ms: list[float]) -> dict[str, float]:
    def of(values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        return {P50: statistics.median(ordered), P99: ordered[int(0.99 * len(ordered))], WORST: ordered[-1]}

    figures, alone = of(took_ms), of(alone_ms)
    return {
        "events": len(took_ms),
        **figures,
        **{f"{name} / alone": figures[name] / alone[name] for name in (P50, P99)},
    }


class _Publisher:
    """Publishes the next event when all readers have the last one."""

    def __init__(self, connection: HTTPConnection, crowd: Crowd) -> None:
        self._connection = connection
        self._crowd = crowd
        self._n = 0

    def publish(self, seconds: float) -> list[float]:
        """How long each took until all had it, in ms."""
        took, began = [], time.perf_counter()
        while (begin := time.perf_counter()) < began + seconds:
            self._n += 1
            mark = b'"n":"%08d"' % self._n
            headers = {"content-type": "application/json"}
            self._connection.request("POST", TOPIC, b'{"pad":"%b",%b}' % (PAD, mark), headers)
            self._crowd.until(mark)
            took.append(1000 * (time.perf_counter() - begin))
            answer = self._connection.getresponse()
            answer.read()
            if answer.status != 202:
                raise RuntimeError(f"{TOPIC}: {answer.status}")
        return took


def _frozen(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(f"GET {TOPIC} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
    return sock


def _sockets(pid: int) -> set[str]:
    names = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed since
            names.add(os.readlink(entry.path))
    return {name for name in names if name.startswith("socket:")}


def _kernel_bytes() -> int:
    """What all TCP sockets of the machine hold."""
    found = re.search(r"^TCP: .* mem (\d+)$", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    return int(found[1]) * os.sysconf("SC_PAGE_SIZE") if found else 0
