"""Metrics of a log's appends and of the runs that end with them."""

from ssecore.errors import LogError, LogUnavailable
from ssecore.log import Log
from ssecore.log.writer import Batch
from ssecore.metrics import Metrics

__all__ = ["measured"]


def measured(log: Log, metrics: Metrics) -> Log:
    """Count the log's commits in the metrics from now on, and return the log."""

    def committed(batches: list[Batch], seconds: float) -> None:
        stored = [batch for batch in batches if batch.error is None]
        if failed := sum(isinstance(batch.error, LogUnavailable | LogError) for batch in batches):
            metrics.log_failures.inc(failed)
        if events := sum([len(batch.frames) for batch in stored]):
            metrics.appends.observe(seconds)
            metrics.appended.inc(events)
        for batch in stored:
            if batch.close and batch.meta is not None:
                metrics.runs_ended.labels(batch.meta["state"]).inc()

    log.on_commit = committed
    return log
