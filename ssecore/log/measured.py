"""Appends to a log, measured, and runs that end with one, counted: for any engine."""

from ssecore.log import Log
from ssecore.log.writer import Batch, failures
from ssecore.metrics import Metrics

__all__ = ["measured"]


def measured(log: Log, metrics: Metrics) -> Log:
    """The log itself; from now on what is appended to it is in the metrics. They are told once a commit."""

    def committed(batches: list[Batch], seconds: float) -> None:
        stored = [batch for batch in batches if batch.error is None]
        if failed := failures(batches):
            metrics.log_failures.inc(failed)
        if events := sum([len(batch.frames) for batch in stored]):
            metrics.appends.observe(seconds)
            metrics.appended.inc(events)
        for batch in stored:
            if batch.close and batch.meta is not None:
                metrics.runs_ended.labels(batch.meta["state"]).inc()

    log.on_commit = committed
    return log
