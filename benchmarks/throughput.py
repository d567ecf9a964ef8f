"""One stream as fast as it goes: events a second, and the server's CPU time an event."""

import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.load import CRLF_BLANK_LINE, LF_BLANK_LINE, fetch
from benchmarks.process import PEERS_PYTHON, ROOT, Server, pin_server
from benchmarks.report import Check, Report, Spread

__all__ = ["run"]

RATE, CPU, LOAD = "events/s", "CPU µs/event", "load busy %"
OURS, BARE, BLOCKS, FLOOR = "sseapp", "bare ASGI, one send an event", "prepared 64 KiB blocks", "no server"
SSE_STARLETTE, FASTAPI = "sse-starlette", "FastAPI's own"
#: What an event of 60 bytes gets more to be one of a KiB.
SIZES = {"60 bytes": 0, "1 KiB": 964}
#: For each event of `peer_count`: so many of ours, and of prepared ones. They would be over too soon to be measured.
FAST, PREPARED = 4, 80


@dataclass(frozen=True)
class _Contender:
    server: Server
    times: int = 1  #: `peer_count`
    mark: bytes = LF_BLANK_LINE


def run(*, rounds: int = 5, peer_count: int = 50_000, peers_python: Path = PEERS_PYTHON) -> Report:
    """`peer_count` events of each peer, four times as many of ours, eighty times as many of prepared ones."""
    report = Report("throughput", {"rounds": rounds, "peer_count": peer_count})
    with ExitStack() as stack:
        start = stack.enter_context
        contenders = {
            OURS: _Contender(start(Server.app(start(TemporaryDirectory()))), FAST),
            BARE: _Contender(start(Server.uvicorn("bare:app")), FAST),
            BLOCKS: _Contender(start(Server.uvicorn("blocks:app")), PREPARED),
        }
        if peers_python.exists():
            peers = {
                SSE_STARLETTE: _Contender(start(Server.uvicorn("sse_starlette:app", peers_python)), 1, CRLF_BLANK_LINE),
                FASTAPI: _Contender(start(Server.uvicorn("fast_api:app", peers_python))),
                "Starlette, by hand": _Contender(start(Server.uvicorn("starlette_streaming:app", peers_python))),
                "Litestar": _Contender(start(Server.uvicorn("lite_star:app", peers_python)), 1, CRLF_BLANK_LINE),
                "aiohttp-sse": _Contender(start(Server.peer("aio_http", peers_python)), 1, CRLF_BLANK_LINE),
            }
            contenders |= peers
        else:
            report.skipped.append(f"the peers: there is no {peers_python}; `make bench` installs them")
        for contender in contenders.values():
            _measure(contender, 1000, 0)  # warm
        found = []
        for _ in range(rounds):
            one: dict[str, dict[str, float]] = {}
            for size, pad in SIZES.items():
                one[f"{FLOOR}, {size}"] = _no_server(FAST * peer_count, pad)
                for name, contender in contenders.items():
                    # A KiB has 16 times the bytes: less of those that cost nothing else.
                    times = contender.times if contender.times != PREPARED or not pad else PREPARED // 16
                    one[f"{name}, {size}"] = _measure(contender, times * peer_count, pad)
            found.append(one)
    report.add_rounds(found)
    ours = f"{OURS}, 60 bytes"
    for peer, asked in ((SSE_STARLETTE, 25), (FASTAPI, 90), (BARE, 5)):
        if peer in contenders:
            ratio = Spread.of(one[ours][RATE] / one[f"{peer}, 60 bytes"][RATE] for one in found)
            report.checks.append(Check(f"events/s against {peer}", ratio, at_least=asked))
    for size in SIZES:
        above = Spread.of(one[f"{OURS}, {size}"][CPU] - one[f"{FLOOR}, {size}"][CPU] for one in found)
        what = f"CPU µs/event above the same generator and encode without a server, {size}"
        # The kernel copies a KiB in 0.1 µs on either side; the figure asked for is of small events.
        report.checks.append(Check(what, above, at_most=0.3))
    return report


def _measure(contender: _Contender, count: int, pad: int) -> dict[str, float]:
    server, cpu_s = contender.server, contender.server.cpu_s()
    path = f"/stream?count={count}&pad={pad}"
    if pad and server.ours:
        path = f"/padded?count={count}&pad={pad}"
    elif server.ours:  # the service's own
        path = f"/stream?count={count}&interval=0"
    reading = fetch(server.port, path, mark=contender.mark)
    cpu_s = server.cpu_s() - cpu_s
    if reading.events != count + 1:
        raise RuntimeError(f"{path}: {reading.events} events where {count + 1} are expected")
    return {
        CPU: 1e6 * cpu_s / reading.events,
        RATE: reading.events / reading.seconds,
        LOAD: 100 * reading.cpu_s / reading.seconds,
    }


def _no_server(count: int, pad: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.serverless", str(count), str(pad)]
    return {
        CPU: float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, preexec_fn=pin_server).stdout)
    }
