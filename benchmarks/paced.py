"""Runs at a human's pace, beside fleeting streams: CPU an event, and how long an event takes to its readers."""

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.crowd import Crowd
from benchmarks.fanout import publisher
from benchmarks.load import fetch
from benchmarks.process import PEERS_PYTHON, Server, ahead_of_others
from benchmarks.report import Check, Report, Spread

__all__ = ["run"]

CPU, P50, P99, RATE, WHOLE = "CPU µs/event", "p50 ms", "p99 ms", "events/s", "CPU ms/run of 8"
SQLITE, MEMORY, FLEETING, STARLETTE = "run, SQLite", "run, memory log", "fleeting", "sse-starlette, fleeting"
FOLLOWED, TOPIC, FULL = (
    "{:,} readers of {:,} runs, SQLite",
    "topic, {:,} readers, SQLite",
    "{:,} runs, as fast as it goes",
)
#: How many runs, and how many events a second each.
PACES = ((100, 20.0), (400, 20.0), (1000, 5.0))
#: More than a core takes.
FLOOD = (1000, 40.0)
UNLIMITED = {name: "none" for name in ("max_runs", "max_streams", "max_stream_s")}
WHOLE_RUNS = 500


def run(
    *,
    rounds: int = 3,
    seconds: int = 5,
    readers: int = 1000,
    followers: int = 2000,
    followed: int = 100,
    peers_python: Path = PEERS_PYTHON,
) -> Report:
    """100, 400 and 1,000 runs; `followers` of `followed` runs; a topic's events to the last of `readers`"""
    sizes = {"rounds": rounds, "seconds": seconds, "readers": readers, "followers": followers, "followed": followed}
    report = Report("paced", sizes)
    found = []
    with ahead_of_others():
        for _ in range(rounds):
            with ExitStack() as stack:
                found.append(_round(stack, seconds, readers, (followers, followed), peers_python))
    if not peers_python.exists():
        report.skipped.append(f"sse-starlette: there is no {peers_python}; `make bench` installs the peers")
    report.add_rounds(found)
    first, second, third = [_row(SQLITE, pace) for pace in PACES]
    if peers_python.exists():
        ratio = Spread.of(one[first][CPU] / one[_row(STARLETTE, PACES[0])][CPU] for one in found)
        report.checks.append(Check(f"{CPU}, {first}, against {STARLETTE}", ratio, at_most=1.6))
    report.checks.append(Check(f"{CPU}, {second}", report.rows[second][CPU], at_most=55))
    ratio = Spread.of(one[third][CPU] / one[first][CPU] for one in found)
    report.checks.append(Check(f"{CPU}, {third}, against {first}", ratio, at_most=1))
    for row, figure, bound in (
        (SQLITE, WHOLE, 1.2),
        (TOPIC.format(readers), P99, 6),
        (FOLLOWED.format(followers, followed), P99, 3),
    ):
        report.checks.append(Check(f"{figure}, {row}", report.rows[row][figure], at_most=bound))
    full = FULL.format(FLOOD[0])
    report.checks.append(Check(f"{RATE}, {full}", report.rows[full][RATE], at_least=20_000))
    return report


def _row(name: str, pace: tuple[int, float]) -> str:
    return f"{name}, {pace[0]:,} of {pace[1]:g} a second"


def _round(
    stack: ExitStack, seconds: float, readers: int, followed: tuple[int, int], peers_python: Path
) -> dict[str, dict[str, float]]:
    def start(log: str) -> Server:
        folder = stack.enter_context(TemporaryDirectory())
        return stack.enter_context(Server.app(folder, log, settings=UNLIMITED))

    sqlite, memory = start("sqlite"), start("memory")
    contenders = {
        SQLITE: (sqlite, "/ticks/durable"),
        MEMORY: (memory, "/ticks/durable"),
        FLEETING: (sqlite, "/ticks"),
    }
    if peers_python.exists():
        contenders[STARLETTE] = (stack.enter_context(Server.uvicorn("sse_starlette:app", peers_python)), "/ticks")
    found: dict[str, dict[str, float]] = {}
    for pace in PACES:
        for name, (server, target) in contenders.items():
            found[_row(name, pace)] = _pace(server, target, pace, seconds)
    for name in (SQLITE, MEMORY):
        found[name] = {WHOLE: _whole(contenders[name][0])}
    found[FOLLOWED.format(*followed)] = _follow(sqlite, *followed, seconds)
    found[TOPIC.format(readers)] = _publish(sqlite, readers, seconds)
    found[FULL.format(FLOOD[0])] = _pace(sqlite, "/ticks/durable", FLOOD, seconds)
    return found


def _pace(server: Server, target: str, pace: tuple[int, float], seconds: float) -> dict[str, float]:
    streams, rate = pace
    with Crowd(server.port, f"{target}?interval={1 / rate}") as crowd:
        crowd.join(streams)
        return _late(server, crowd, seconds)


def _late(server: Server, crowd: Crowd, seconds: float) -> dict[str, float]:
    crowd.late_ns(1.0)  # what gathered while they joined
    begin, cpu_s = time.perf_counter(), server.cpu_s()
    late = crowd.late_ns(seconds)
    took, cpu_s = time.perf_counter() - begin, server.cpu_s() - cpu_s
    cuts = statistics.quantiles(late, n=100)
    return {CPU: 1e6 * cpu_s / len(late), P50: cuts[49] / 1e6, P99: cuts[98] / 1e6, RATE: len(late) / took}


def _whole(server: Server) -> float:
    cpu_s = server.cpu_s()
    for _ in range(WHOLE_RUNS):
        if (events := fetch(server.port, "/durable?count=7&interval=0").events) != 8:
            raise RuntimeError(f"{events} events where 8 are expected")
    return 1e3 * (server.cpu_s() - cpu_s) / WHOLE_RUNS


def _follow(server: Server, followers: int, runs: int, seconds: float) -> dict[str, float]:
    """Readers that came later than the runs' own."""
    with Crowd(server.port, "/ticks/durable?interval=1") as crowd:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
            for _ in range(runs):
                answer = client.get("/ticks/durable?interval=1", headers={"prefer": "respond-async"})
                crowd.join(followers // runs, answer.url.join(answer.headers["location"]).path)
        return _late(server, crowd, seconds)


def _publish(server: Server, readers: int, seconds: float) -> dict[str, float]:
    """100 a second, from the request that publishes to the last reader."""
    took = []
    with Crowd(server.port, "/topics/paced") as crowd, publisher(server.port, "/topics/paced") as post:
        crowd.join(readers)
        for n in range(10 + round(100 * seconds)):
            due = time.perf_counter() + 0.01
            took.append(post(crowd, n))
            time.sleep(max(0.0, due - time.perf_counter()))
    cuts = statistics.quantiles(took[10:], n=100)
    return {P50: 1e3 * cuts[49], P99: 1e3 * cuts[98]}
