"""The results as pictures: one SVG of bars for each figure that the README shows. Readable on light and on dark."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

__all__ = ["Chart", "draw"]


@dataclass(frozen=True)
class Chart:
    """One figure of a benchmark's rows, as bars from the best to the worst.

    Of the rows whose names end in `rows`; the rest of the name is the bar's. The median is the bar's length, the
    lowest and highest of the rounds a line on it.
    """

    name: str
    benchmark: str
    figure: str
    title: str
    rows: str = ""
    more_is_better: bool = False


CHARTS = (
    Chart("tokens", "tokens", "CPU µs/token", "1,000 chats of 20 tokens a second: CPU µs a token", ", 1,000 chats"),
    Chart("throughput", "throughput", "events/s", "One stream: events a second", ", 60 bytes", more_is_better=True),
    Chart("fanout", "fanout", "CPU µs/delivery", "A broadcast to 4,000: CPU µs a delivery", ", 4,000 readers"),
    Chart("idle", "idle", "KiB/connection", "9,000 idle connections: KiB of memory each"),
    Chart("latency", "latency", "CPU µs/event", "1,000 streams of 10 events a second: CPU µs an event"),
    Chart("first_byte", "first_byte", "p50 ms", "200 connections a second: ms to the first event, median"),
)

OURS = "sseapp"
#: Prepared bytes are 10 times faster than anything that makes its events: the other bars would be points.
LEFT_OUT = ("prepared 64 KiB blocks", "no server")
_WIDTH, _LABEL, _VALUE, _ROW, _BAR = 760, 210, 150, 26, 16
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.small { font-size: 11px; fill: #59636e }
.peer { fill: #8c959f }
.ours { fill: #0969da }
.spread { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .small { fill: #9198a1 }
  .peer { fill: #6e7681 }
  .ours { fill: #58a6ff }
  .spread { stroke: #e6edf3 }
}
"""


def draw(folder: Path = RESULTS) -> list[Path]:
    """Draw what there are results for; the files that were written."""
    written = []
    for chart in CHARTS:
        source = folder / f"{chart.benchmark}.json"
        if source.exists():
            path = folder / f"{chart.name}.svg"
            path.write_text(_svg(chart, json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")
            written.append(path)
    return written


def _svg(chart: Chart, result: Mapping[str, Any]) -> str:
    bars: list[tuple[str, Mapping[str, float]]] = [
        (name.removesuffix(chart.rows), figures[chart.figure])
        for name, figures in result["rows"].items()
        if name.endswith(chart.rows) and chart.figure in figures and not name.startswith(LEFT_OUT)
    ]
    bars.sort(key=lambda bar: bar[1]["median"], reverse=chart.more_is_better)
    top = max((spread["highest"] for _, spread in bars), default=1.0)
    scale, height = (_WIDTH - _LABEL - _VALUE) / top, 40 + _ROW * len(bars) + 24
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">',
        f"<title>{escape(chart.title)}</title><style>{_STYLE}</style>",
        f'<text x="0" y="18" class="title">{escape(chart.title)}</text>',
    ]
    for row, (name, spread) in enumerate(bars):
        y = 36 + _ROW * row
        middle, length = y + _BAR / 2, max(spread["median"] * scale, 1)
        kind = "ours" if name.startswith(OURS) else "peer"
        low, high = _LABEL + spread["lowest"] * scale, _LABEL + spread["highest"] * scale
        lines += [
            f'<text x="{_LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LABEL}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="2" class="{kind}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" class="spread"/>',
            f'<text x="{max(_LABEL + length, high) + 8:.1f}" y="{y + 13}">{_number(spread["median"])}</text>',
        ]
    machine = result["machine"]
    about = f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}; "
    about += f"load average before {machine['load_average']}; line: lowest to highest round"
    lines += [f'<text x="0" y="{height - 6}" class="small">{escape(about)}</text>', "</svg>", ""]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
