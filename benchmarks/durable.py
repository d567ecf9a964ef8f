"""A run beside the same generator fleeting: events a second, and the server's CPU time an event."""

from contextlib import ExitStack
from tempfile import TemporaryDirectory

from benchmarks.load import fetch
from benchmarks.process import Server
from benchmarks.report import Check, Report, Spread

__all__ = ["run"]

RATE, CPU, FIRST = "events/s", "CPU µs/event", "first after s"
#: Of a run's size.
UNLIMITED = {"retention_events": "none", "retention_bytes": "none"}
FLEETING, IN_MEMORY, ON_SQLITE = "fleeting", "run, memory log", "run, SQLite"


def run(*, rounds: int = 5, count: int = 200_000) -> Report:
    """`count` events of /stream, which never waits, as a run that its starter reads."""
    report = Report("durable", {"rounds": rounds, "count": count})
    with ExitStack() as stack:

        def start(log: str) -> Server:
            folder = stack.enter_context(TemporaryDirectory())
            return stack.enter_context(Server.app(folder, log, settings=UNLIMITED))

        sqlite, memory = start("sqlite"), start("memory")
        contenders = {
            FLEETING: (sqlite, "/stream"),
            IN_MEMORY: (memory, "/durable"),
            ON_SQLITE: (sqlite, "/durable"),
        }
        for server, target in contenders.values():
            _measure(server, target, 1000)  # warm
        found = [
            {name: _measure(server, target, count) for name, (server, target) in contenders.items()}
            for _ in range(rounds)
        ]
    report.add_rounds(found)
    for name, asked in ((ON_SQLITE, 0.5), (IN_MEMORY, 0.5)):
        ratio = Spread.of(one[name][RATE] / one[FLEETING][RATE] for one in found)
        report.checks.append(Check(f"{name}: events/s against fleeting", ratio, at_least=asked))
    return report


def _measure(server: Server, target: str, count: int) -> dict[str, float]:
    cpu_s = server.cpu_s()
    reading = fetch(server.port, f"{target}?count={count}&interval=0")
    cpu_s = server.cpu_s() - cpu_s
    if reading.events != count + 1:
        raise RuntimeError(f"{reading.events} events where {count + 1} are expected")
    return {RATE: reading.events / reading.seconds, CPU: 1e6 * cpu_s / reading.events, FIRST: reading.first_s}
