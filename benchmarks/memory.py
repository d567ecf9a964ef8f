"""What the service grows by while it imports and streams rows of the tasks table, and sends a large file."""

from collections.abc import Callable
from functools import partial
from os import truncate
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.load import Reading, download, fetch
from benchmarks.process import Server, memory_bytes, rss_samples
from benchmarks.report import Check, Report

__all__ = ["run"]

MIB = 1024 * 1024
GROWTH = "growth MiB"
DOWNLOAD = "/download"
TITLE = b"Task of the benchmark"  #: once a row, whatever the format
IMPORT_ROWS = 100  #: an import tells its progress each so many


def run(*, rounds: int = 1, rows: int = 100_000, slow_bytes_s: int = 4_000_000, file_mib: int = 2048) -> Report:
    """`rows` rows imported, then read back: as fast as it goes, as CSV, and at `slow_bytes_s`; a file of `file_mib`."""
    sizes = {"rounds": rounds, "rows": rows, "slow_bytes_s": slow_bytes_s, "file_mib": file_mib}
    report = Report("memory", sizes)
    readers: dict[str, tuple[int, Callable[[int], Reading]]] = {
        "/tasks/stream": (rows + 1, lambda port: fetch(port, "/tasks/stream")),
        "/export.csv": (rows, lambda port: fetch(port, "/export.csv", mark=TITLE)),
        "/tasks/stream, slow reader": (rows + 1, lambda port: fetch(port, "/tasks/stream", max_bytes_s=slow_bytes_s)),
    }
    found: list[dict[str, dict[str, float]]] = []
    for _ in range(rounds):
        with TemporaryDirectory() as folder:
            csv = Path(folder, "tasks.csv")
            _write_csv(csv, rows)
            events = -(-rows // IMPORT_ROWS) + 1
            one = {"/tasks/import": _measure(folder, {"rows/s": rows}, events, partial(_import, csv))}
            for name, (events, read) in readers.items():
                one[name] = _measure(folder, {"rows/s": rows}, events, read)
            _make_sparse(Path(folder, "files", "sparse"), file_mib * MIB)
            one[DOWNLOAD] = _measure(
                folder, {"MiB/s": file_mib}, file_mib * MIB, lambda port: download(port, "/download/sparse")
            )
            found.append(one)
    report.add_rounds(found)
    report.checks = [Check(f"{name}, {GROWTH}", report.rows[name][GROWTH], at_most=20) for name in [*readers, DOWNLOAD]]
    return report


def _measure(data_dir: str, amounts: dict[str, int], events: int, read: Callable[[int], Reading]) -> dict[str, float]:
    """In a server just started, so that nothing that came before hides a growth."""
    with Server.service(data_dir) as server:
        fetch(server.port, "/stream?count=1&interval=0")  # it has started, and can stream
        idle = memory_bytes(server.pid)
        with rss_samples(server.pid) as samples:
            reading = read(server.port)
    if reading.events != events:
        raise RuntimeError(f"{reading.events} where {events} are expected")
    return {
        "idle MiB": idle / MIB,
        "peak MiB": max(samples) / MIB,
        GROWTH: (max(samples) - idle) / MIB,
        "first after s": reading.first_s,
        **{rate: amount / reading.seconds for rate, amount in amounts.items()},
    }


def _make_sparse(path: Path, size: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    truncate(path, size)


def _write_csv(path: Path, rows: int) -> None:
    description = "Some words that say what is to be done, by whom, and why it can't wait. "
    with path.open("w") as file:
        file.write("title,description,status,priority,due\r\n")
        for n in range(rows):
            status = ("open", "doing", "done")[n % 3]
            file.write(f'{TITLE.decode()} {n},"{description}{n}",{status},{n % 5 + 1},2026-12-{n % 28 + 1:02}\r\n')


def _import(csv: Path, port: int) -> Reading:
    with csv.open("rb") as file:
        return fetch(port, "/tasks/import", upload=file)
