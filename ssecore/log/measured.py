"""Appends to a log, measured, and runs that end with one, counted: for any engine."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from ssecore.errors import LogError, LogUnavailable
from ssecore.log import Log
from ssecore.metrics import Metrics

__all__ = ["measured"]


def measured(log: Log, metrics: Metrics) -> Log:
    """The log itself; from now on what is appended to it is in the metrics."""
    append = log.append

    async def counting(
        stream: str,
        frames: Sequence[bytes],
        *,
        epoch: str,
        close: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> int:
        began = perf_counter()
        try:
            last = await append(stream, frames, epoch=epoch, close=close, meta=meta)
        except (LogUnavailable, LogError):
            metrics.log_failures.inc()
            raise
        metrics.appends.observe(perf_counter() - began)
        metrics.appended.inc(len(frames))
        if close and meta is not None:
            metrics.runs_ended.labels(meta["state"]).inc()
        return last

    log.append = counting  # type: ignore[method-assign]
    return log
