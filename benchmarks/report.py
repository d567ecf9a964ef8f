"""What a benchmark found: figures with their spread, and whether they are as good as was asked."""

import dataclasses
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["RESULTS", "Check", "Report", "Spread"]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """Of the rounds of one figure."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])

    def __str__(self) -> str:
        if self.lowest == self.highest:
            return _short(self.median)
        return f"{_short(self.median)} ({_short(self.lowest)}-{_short(self.highest)})"


@dataclass(frozen=True)
class Check:
    """A figure that was asked for, and its limit: one of the two. The median counts."""

    what: str
    value: Spread
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def met(self) -> bool:
        return self.at_least <= self.value.median <= self.at_most

    @property
    def asked(self) -> str:
        return f"at most {self.at_most:g}" if self.at_least == -math.inf else f"at least {self.at_least:g}"


@dataclass
class Report:
    name: str
    sizes: Mapping[str, int | str]
    rows: dict[str, dict[str, Spread]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add_rounds(self, rounds: Sequence[dict[str, dict[str, float]]]) -> None:
        """Each round has the same rows with the same figures."""
        for name, figures in rounds[0].items():
            self.rows[name] = {figure: Spread.of(one[name][figure] for one in rounds) for figure in figures}

    def write(self) -> Path:
        document = {"machine": machine(), **dataclasses.asdict(self)}
        document["checks"] = [
            {"what": check.what, "value": dataclasses.asdict(check.value), "asked": check.asked, "met": check.met}
            for check in self.checks
        ]
        path = RESULTS / f"{self.name}.json"
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return path

    def __str__(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows.values() for column in row))
        table = [[self.name, *columns]]
        table += [[name, *(str(row.get(column, "")) for column in columns)] for name, row in self.rows.items()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        sizes = ", ".join(
            f"{name} {size if isinstance(size, str) else f'{size:,}'}" for name, size in self.sizes.items()
        )
        lines.append(f"{sizes}; median (lowest-highest)")
        checks = [f"{'met   ' if c.met else 'MISSED'} {c.what}: {c.value}, asked {c.asked}" for c in self.checks]
        return "\n".join([*lines, *checks, *(f"skipped {reason}" for reason in self.skipped)])


def machine() -> dict[str, str | int | float]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(": ")[2] if models else platform.machine(),
        "cores": os.cpu_count() or 1,
        "load_average": round(os.getloadavg()[0], 2),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
    }


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
