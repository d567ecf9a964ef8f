"""One stream as fast as it goes: events a second, and the server's CPU time an event."""

import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.load import CRLF_BLANK_LINE, LF_BLANK_LINE, fetch
from benchmarks.process import PEERS_PYTHON, ROOT, Server, pin_server
from benchmarks.report import Check, Report, Spread

__all__ = ["run"]

RATE, CPU, LOAD = "events/s", "CPU µs/event", "load busy %"


@dataclass(frozen=True)
class _Contender:
    server: Server
    count: int
    mark: bytes = LF_BLANK_LINE


def run(
    *,
    rounds: int = 5,
    count: int = 200_000,
    peer_count: int = 50_000,
    block_count: int = 4_000_000,
    peers_python: Path = PEERS_PYTHON,
) -> Report:
    """`count` events of /stream, ours and bare ASGI; `peer_count` of slow peers, `block_count` of prepared ones."""
    sizes = {"rounds": rounds, "count": count, "peer_count": peer_count, "block_count": block_count}
    report = Report("throughput", sizes)
    with ExitStack() as stack:
        start = stack.enter_context
        contenders = {
            "sseapp": _Contender(start(Server.service(start(TemporaryDirectory()))), count),
            "bare ASGI, one send an event": _Contender(start(Server.uvicorn("bare:app")), count),
            "prepared 64 KiB blocks": _Contender(start(Server.uvicorn("blocks:app")), block_count),
        }
        if peers_python.exists():
            server = start(Server.uvicorn("sse_starlette:app", peers_python))
            contenders["sse-starlette"] = _Contender(server, peer_count, CRLF_BLANK_LINE)
        else:
            report.skipped.append(f"sse-starlette: there is no {peers_python}; `make bench` installs the peers")
        for contender in contenders.values():
            _measure(replace(contender, count=1000))  # warm
        found = [
            {"no server": _no_server(count)} | {name: _measure(contender) for name, contender in contenders.items()}
            for _ in range(rounds)
        ]
    report.add_rounds(found)
    if "sse-starlette" in contenders:
        ratio = Spread.of(one["sseapp"][RATE] / one["sse-starlette"][RATE] for one in found)
        report.checks.append(Check("events/s against sse-starlette", ratio, at_least=20))
    above = Spread.of(one["sseapp"][CPU] - one["no server"][CPU] for one in found)
    report.checks.append(Check("CPU µs/event above the same generator and encode without a server", above, at_most=0.5))
    return report


def _measure(contender: _Contender) -> dict[str, float]:
    server, count = contender.server, contender.count
    cpu_s = server.cpu_s()
    reading = fetch(server.port, f"/stream?count={count}&interval=0", mark=contender.mark)
    cpu_s = server.cpu_s() - cpu_s
    if reading.events != count + 1:
        raise RuntimeError(f"{reading.events} events where {count + 1} are expected")
    return {
        CPU: 1e6 * cpu_s / reading.events,
        RATE: reading.events / reading.seconds,
        LOAD: 100 * reading.cpu_s / reading.seconds,
    }


def _no_server(count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.serverless", str(count)]
    return {
        CPU: float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, preexec_fn=pin_server).stdout)
    }
