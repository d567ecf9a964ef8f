"""A topic that is written to for long, with a reader that follows: memory, the file's size, and writes a second."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.crowd import Crowd
from benchmarks.process import Server, memory_bytes, samples
from benchmarks.report import Check, Report

__all__ = ["run"]

MIB = 1024 * 1024
FILE_RATIO = "file / kept"


def run(*, rounds: int = 1, events: int = 1_000_000, singles: int = 200_000, kept_bytes: int = 8 * MIB) -> Report:
    """`events` in appends of 100 and `singles` one by one, where `kept_bytes` are kept."""
    report = Report("retention", {"rounds": rounds, "events": events, "singles": singles, "kept_bytes": kept_bytes})
    ways = {"appends of 100": (events, 100), "appends of one": (singles, 1)}
    report.add_rounds(
        [{name: _measure(count, batch, kept_bytes) for name, (count, batch) in ways.items()} for _ in range(rounds)]
    )
    report.checks = [Check(f"{name}, {FILE_RATIO}", report.rows[name][FILE_RATIO], at_most=2) for name in ways]
    return report


def _measure(count: int, batch: int, kept_bytes: int) -> dict[str, float]:
    limits = {"retention_bytes": kept_bytes, "retention_events": "none"}
    with TemporaryDirectory() as folder, Server.app(folder, settings=limits) as server:
        first_id = _write(server.port, 1, 1)
        with (
            Crowd(server.port, "/topics/benchmark", {"last-event-id": first_id}) as reader,
            ThreadPoolExecutor(1) as thread,
        ):
            reader.ask(reader.connect(1))
            begin, cpu = time.perf_counter(), server.cpu_s()
            with samples(lambda: memory_bytes(server.pid)) as memory, samples(lambda: _file_bytes(folder)) as files:
                writing = thread.submit(_write, server.port, count, batch)
                reader.count(count)
                writing.result()
            seconds, cpu = time.perf_counter() - begin, server.cpu_s() - cpu
            highest = memory_bytes(server.pid, "VmHWM")
    early = memory[: max(len(memory) // 10, 1)]
    return {
        "events/s": count / seconds,
        "appends/s": count / batch / seconds,
        "CPU µs/event": 1e6 * cpu / count,
        "MiB after a tenth": early[-1] / MIB,
        "MiB at the end": memory[-1] / MIB,
        "highest MiB": highest / MIB,
        "file MiB": max(files) / MIB,
        FILE_RATIO: max(files) / kept_bytes,
    }


def _write(port: int, count: int, batch: int) -> str:
    """Returns the last one's id."""
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("POST", f"/written/benchmark?count={count}&batch={batch}")
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(body.decode())
    return str(json.loads(body)["id"])


def _file_bytes(folder: str) -> int:
    """The log's and its write-ahead log's."""
    names = [name for name in os.listdir(folder) if name in ("log.db", "log.db-wal")]
    return sum(Path(folder, name).stat().st_size for name in names)
