"""Many slow streams at once: how long an event takes from the generator that makes it to its reader."""

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.crowd import Crowd
from benchmarks.process import PEERS_PYTHON, Server, ahead_of_others
from benchmarks.report import Check, Report, Spread

__all__ = ["run", "tickers"]

OURS, BARE = "sseapp", "bare ASGI"
P50, P99, P999, CPU, LOAD = "p50 ms", "p99 ms", "p99.9 ms", "CPU µs/event", "load busy %"
INTERVAL_S = 0.1


def run(*, rounds: int = 5, streams: int = 1000, seconds: int = 5, peers_python: Path = PEERS_PYTHON) -> Report:
    """`streams` of 10 events a second each, for `seconds`."""
    report = Report("latency", {"rounds": rounds, "streams": streams, "seconds": seconds})
    with ahead_of_others(), ExitStack() as stack:
        contenders = tickers(stack, report, peers_python)
        found = [
            {name: _measure(server, streams, seconds) for name, server in contenders.items()} for _ in range(rounds)
        ]
    report.add_rounds(found)
    ratio = Spread.of(one[OURS][P99] / one[BARE][P99] for one in found)
    report.checks.append(Check("p99 against bare ASGI", ratio, at_most=1.15))
    return report


def tickers(stack: ExitStack, report: Report, peers_python: Path) -> dict[str, Server]:
    """Those that answer `/ticks`."""
    start = stack.enter_context
    servers = {OURS: start(Server.app(start(TemporaryDirectory()))), BARE: start(Server.uvicorn("bare:app"))}
    if peers_python.exists():
        servers["sse-starlette"] = start(Server.uvicorn("sse_starlette:app", peers_python))
        servers["FastAPI's own"] = start(Server.uvicorn("fast_api:app", peers_python))
    else:
        report.skipped.append(f"the peers: there is no {peers_python}; `make bench` installs them")
    return servers


def _measure(server: Server, streams: int, seconds: float) -> dict[str, float]:
    with Crowd(server.port, f"/ticks?interval={INTERVAL_S}") as crowd:
        crowd.join(streams)
        crowd.late_ns(1.0)  # what gathered while they joined
        begin, cpu_s, own_cpu_s = time.perf_counter(), server.cpu_s(), time.process_time()
        late = crowd.late_ns(seconds)
        took, cpu_s, own_cpu_s = time.perf_counter() - begin, server.cpu_s() - cpu_s, time.process_time() - own_cpu_s
    cuts = statistics.quantiles(late, n=1000)
    return {
        P50: cuts[499] / 1e6,
        P99: cuts[989] / 1e6,
        P999: cuts[998] / 1e6,
        CPU: 1e6 * cpu_s / len(late),
        "events/s": len(late) / took,
        LOAD: 100 * own_cpu_s / took,
    }
