"""New connections at an even pace: how long each waits for its first event."""

import select
import socket
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.latency import tickers
from benchmarks.process import PEERS_PYTHON, Server, ahead_of_others
from benchmarks.report import Report

__all__ = ["run"]

P50, P99, CPU = "p50 ms", "p99 ms", "CPU µs/connection"
TIMEOUT_S = 30.0


def run(*, rounds: int = 3, per_second: int = 200, seconds: int = 5, peers_python: Path = PEERS_PYTHON) -> Report:
    """`per_second` connections a second, for `seconds`, each from its connect to its first event."""
    report = Report("first_byte", {"rounds": rounds, "per_second": per_second, "seconds": seconds})
    with ahead_of_others(), ExitStack() as stack:
        contenders = tickers(stack, report, peers_python)
        for server in contenders.values():
            _measure(server, per_second, 1)  # warm
        found = [
            {name: _measure(server, per_second, seconds) for name, server in contenders.items()} for _ in range(rounds)
        ]
    report.add_rounds(found)
    return report


def _measure(server: Server, per_second: int, seconds: int) -> dict[str, float]:
    """An even pace whatever the server does: a late answer delays nobody's connect."""
    request = f"GET /ticks?interval=3600 HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\n\r\n".encode()
    took: list[float] = []
    waiting: dict[int, tuple[socket.socket, float, bytes]] = {}
    poll, opened, count = select.epoll(), 0, per_second * seconds
    begin, cpu_s = time.perf_counter(), server.cpu_s()
    while len(took) < count:
        due = begin + opened / per_second - time.perf_counter() if opened < count else TIMEOUT_S
        found = poll.poll(max(due, 0.0))
        if not found and due == TIMEOUT_S:
            raise RuntimeError(f"no first event within {TIMEOUT_S:.0f} s")
        for fd, _ in found:
            sock, since, received = waiting[fd]
            received += sock.recv(16384)
            waiting[fd] = sock, since, received
            if b"data:" in received:
                took.append(time.perf_counter() - since)
                poll.unregister(fd)
                del waiting[fd]
                sock.close()
        if opened < count and time.perf_counter() >= begin + opened / per_second:
            since = time.perf_counter()
            sock = socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S)
            sock.sendall(request)
            waiting[sock.fileno()] = sock, since, b""
            poll.register(sock, select.EPOLLIN)
            opened += 1
    poll.close()
    cuts = statistics.quantiles(took, n=100)
    return {P50: 1000 * cuts[49], P99: 1000 * cuts[98], CPU: 1e6 * (server.cpu_s() - cpu_s) / count}
