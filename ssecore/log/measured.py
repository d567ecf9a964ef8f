"""Metrics of a log's appends and of the runs that end with them."""

from ssecore.errors import LogError, LogUnavailable
from ssecore.log import Log
from ssecore.log.writer import Batch
from ssecore.metrics import Metrics

__all__ = ["measured"]


def measured(log: Log, metrics: Metrics) -> Log:
    """Count commits in the metrics. Returns the log."""

    def committed(batches: list[Batch], seconds: float) -> None:
        events = 0
        for batch in batches:
            if batch.error is None:
                events += len(batch.frames)
                if batch.close and batch.meta is not None:
                    metrics.runs_ended.labels(batch.meta["state"]).inc()
            elif isinstance(batch.error, LogUnavailable | LogError):
                metrics.log_failures.inc()
        if events:
            metrics.appends.observe(seconds)
            metrics.appended.inc(events)

    log.on_commit = committed
    return log
