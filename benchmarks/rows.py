"""Time to the first row, and memory, of tables of growing size: neither may depend on it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.load import LF_BLANK_LINE, fetch
from benchmarks.process import Server, memory_bytes, rss_samples
from benchmarks.report import Check, Report, Spread

__all__ = ["run"]

MIB = 1024 * 1024
SMALL_SIZES = (1_000, 100_000)
FIRST, GROWTH = "first row after ms", "growth MiB"
TITLE = b"Task of the benchmark"


def run(*, rounds: int = 3, rows: int = 1_000_000) -> Report:
    """Tables of 1,000, 100,000 and `rows` rows, streamed whole, by status, by words, and by both; and as CSV.

    The last hundredth is open and all before it is done, so that who asks for open ones has much to pass over.
    """
    report = Report("rows", {"rounds": rounds, "rows": rows})
    sizes = sorted({*SMALL_SIZES, rows})
    found: list[dict[str, dict[str, float]]] = [{} for _ in range(rounds)]
    for size in sizes:
        with TemporaryDirectory() as folder:
            _fill(folder, size)
            for one in found:
                for target, expected in _targets(size).items():
                    one[_name(target, size)] = _measure(folder, target, expected)
    report.add_rounds(found)
    for target in _targets(rows):
        name = _name(target, rows)
        report.checks.append(Check(f"{name}, {GROWTH}", report.rows[name][GROWTH], at_most=20))
        of_few = report.rows[_name(target, sizes[0])][FIRST].median
        later = Spread.of(one[name][FIRST] / of_few for one in found)
        report.checks.append(Check(f"{name}, first row, times as late as of {sizes[0]:,}", later, at_most=3))
    return report


def _targets(size: int) -> dict[str, int]:
    """What is asked for, and how many rows that are."""
    still_open = size - _first_open(size)
    return {
        "/tasks/stream": size,
        "/tasks/stream?status=open": still_open,
        "/tasks/stream?q=words": size,
        "/tasks/stream?q=words&status=open": still_open,
        "/tasks/stream?q=words&status=doing": 0,
        "/tasks/stream?q=seldom": 1,
        "/export.csv": size,
        "/export.csv?status=open": still_open,
    }


def _first_open(size: int) -> int:
    return size * 99 // 100


def _name(target: str, size: int) -> str:
    return f"{target}, {size:,}"


def _measure(data_dir: str, target: str, rows: int) -> dict[str, float]:
    """In a server just started, so that nothing that came before hides a growth."""
    csv = target.startswith("/export.csv")
    with Server.service(data_dir) as server:
        fetch(server.port, "/stream?count=1&interval=0")  # it has started, and can stream
        idle = memory_bytes(server.pid)
        with rss_samples(server.pid) as samples:
            reading = fetch(server.port, target, mark=TITLE if csv else LF_BLANK_LINE)
    expected = rows if csv else rows + 1  # `done`
    if reading.events != expected:
        raise RuntimeError(f"{target}: {reading.events} where {expected} are expected")
    rate = {"rows/s": rows / reading.seconds} if rows > 1 else {}
    return {FIRST: 1000 * reading.first_s, GROWTH: (max(samples) - idle) / MIB, **rate}


def _fill(folder: str, rows: int) -> None:
    """By an import, as a user would."""
    path, first_open = Path(folder, "tasks.csv"), _first_open(rows)
    with path.open("w") as file:
        file.write("title,description,status\r\n")
        for n in range(rows):
            status = "open" if n >= first_open else "done"
            seldom = " seldom" if n == rows - 1 else ""
            file.write(f"{TITLE.decode()} {n},Some words that say what is to be done and by whom{seldom},{status}\r\n")
    with Server.service(folder) as server, path.open("rb") as file:
        fetch(server.port, "/tasks/import", upload=file)
