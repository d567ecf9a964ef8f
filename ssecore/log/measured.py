"""A log whose appends are measured, and whose runs are counted: any engine, with all that it can do."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any, cast

from ssecore.errors import LogError, LogUnavailable
from ssecore.log import Log
from ssecore.metrics import Metrics

__all__ = ["measured"]


def measured(log: Log, metrics: Metrics) -> Log:
    """The same log; what is appended through it is in the metrics."""
    return cast(Log, _Measured(log, metrics))


class _Measured:
    def __init__(self, log: Log, metrics: Metrics) -> None:
        self._log = log
        self._metrics = metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def append(
        self,
        stream: str,
        frames: Sequence[bytes],
        *,
        epoch: str,
        close: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> int:
        began = perf_counter()
        try:
            last = await self._log.append(stream, frames, epoch=epoch, close=close, meta=meta)
        except (LogUnavailable, LogError):
            self._metrics.log_failures.inc()
            raise
        self._metrics.appends.observe(perf_counter() - began)
        self._metrics.appended.inc(len(frames))
        if close and meta is not None:
            self._metrics.runs_ended.labels(meta["state"]).inc()
        return last
