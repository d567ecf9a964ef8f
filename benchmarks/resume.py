"""Readers that all come back at the same moment: how soon each has what it missed, and what that costs."""

import json
import time
from http.client import HTTPConnection
from tempfile import TemporaryDirectory

from benchmarks.crowd import Crowd
from benchmarks.load import fetch
from benchmarks.process import Server, memory_bytes, rss_samples
from benchmarks.report import Check, Report, Spread

__all__ = ["run"]

MIB = 1024 * 1024
#: One reader resumes so often in a row: once is too short to be measured.
ALONE = 20
LIVE = "one stream, live"
#: Of as many events as all resume: enough for one live stream to be measured.
LIVE_PART = 20


def run(*, rounds: int = 3, readers: int = 1000, missed: int = 10_000) -> Report:
    """`readers` resume `missed` events of a finished run, and of a topic, on SQLite; and one reader alone."""
    report = Report("resume", {"rounds": rounds, "readers": readers, "missed": missed})
    found: list[dict[str, dict[str, float]]] = []
    for _ in range(rounds):
        one: dict[str, dict[str, float]] = {LIVE: _one_stream(readers * missed // LIVE_PART)}
        for kind in ("run", "topic"):
            alone = one[f"{kind}, one reader"] = _measure(kind, 1, missed, ALONE)
            together = one[f"{kind}, {readers:,} readers"] = _measure(kind, readers, missed, 1)
            alone["rate / alone"] = 1.0
            together["rate / alone"] = together["events/s"] / alone["events/s"]
        found.append(one)
    report.add_rounds(found)
    for kind in ("run", "topic"):
        ratio = Spread.of(one[f"{kind}, {readers:,} readers"]["events/s"] / one[LIVE]["events/s"] for one in found)
        report.checks.append(Check(f"{kind}: events/s of all together against one live stream", ratio, at_least=0.5))
    return report


def _one_stream(count: int) -> dict[str, float]:
    with TemporaryDirectory() as folder, Server.app(folder) as server:
        fetch(server.port, "/stream?count=1000&interval=0")  # warm
        reading = fetch(server.port, f"/stream?count={count}&interval=0")
    return {"events/s": reading.events / reading.seconds}


def _measure(kind: str, readers: int, missed: int, times: int) -> dict[str, float]:
    """In a server just started, so that its highest memory is of this."""
    with TemporaryDirectory() as folder, Server.app(folder) as server:
        target, last_id = _started(server.port, missed) if kind == "run" else _written(server.port, missed)
        time.sleep(0.5)
        idle, cpu, own_cpu, seconds = memory_bytes(server.pid), server.cpu_s(), time.process_time(), 0.0
        with rss_samples(server.pid) as samples:
            for _ in range(times):
                with Crowd(server.port, target, {"last-event-id": last_id}) as crowd:
                    connected = crowd.connect(readers)
                    begin = time.perf_counter()
                    crowd.ask(connected)
                    crowd.count(missed)
                    seconds += time.perf_counter() - begin
        cpu, own_cpu = server.cpu_s() - cpu, time.process_time() - own_cpu
    events = readers * missed * times
    return {
        "events/s": events / seconds,
        "CPU µs/event": 1e6 * cpu / events,
        "all have all after s": seconds / times,
        "growth MiB": (max(samples) - idle) / MIB,
        "load busy %": 100 * own_cpu / seconds,
    }


def _started(port: int, missed: int) -> tuple[str, str]:
    """A finished run, and the id before the last `missed` events of it."""
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("GET", f"/durable?count={missed}&interval=0")
    answer = connection.getresponse()
    run = answer.headers["run-id"]
    answer.read()
    connection.close()
    return f"/runs/{run}/events", f"{run}.1"  # its own `complete` is one more


def _written(port: int, missed: int) -> tuple[str, str]:
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("POST", f"/written/benchmark?count={missed}")
    epoch, _, last = json.loads(connection.getresponse().read())["id"].rpartition(".")
    connection.close()
    return "/topics/benchmark", f"{epoch}.{int(last) - missed}"
