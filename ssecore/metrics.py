"""Prometheus' counters and gauges, one registry an app.

Streams count per write and are read at each scrape. A model's token costs 0.1 µs.
"""

from collections import Counter as Sums
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from platform import python_version
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

import ssecore

if TYPE_CHECKING:
    from ssecore.streaming.sender import Sender

__all__ = ["MEDIA_TYPE", "AnswerTimes", "Facts", "Metrics"]

MEDIA_TYPE: Final = CONTENT_TYPE_LATEST
#: From a commit of SQLite to when people reload the page.
_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
#: The buckets of OpenTelemetry's conventions for generative AI:
#: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
_FIRST_TOKEN_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_OUTPUT_TOKEN_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_SENT: Final = (
    ("events_sent", "sseapp_events_sent", "Events sent to clients (chunks, if the stream is bytes), by route"),
    ("sent_bytes", "sseapp_sent_bytes", "Bytes of bodies written for streams, by route"),
    ("stalled_s", "sseapp_stalled_seconds", "Time in which writes waited for slow clients, by route"),
)


class Facts(NamedTuple):
    """Read at each scrape."""

    streams: "Collection[Sender]" = ()
    runs: int = 0
    gaps: Mapping[str, int] = {}
    dropped_lines: int = 0


class AnswerTimes:
    """One answer of a model."""

    __slots__ = ("_began", "_first", "_first_at", "_last_at", "_per_token", "_tokens")

    def __init__(self, first: Histogram, per_token: Histogram) -> None:
        self._first, self._per_token = first, per_token
        self._began = self._first_at = self._last_at = monotonic()
        self._tokens = 0

    def token(self) -> None:
        self._last_at = monotonic()
        self._tokens += 1
        if self._tokens == 1:
            self._first_at = self._last_at
            self._first.observe(self._first_at - self._began)

    def end(self) -> None:
        """Only complete answers count for the time per token."""
        if self._tokens > 1:
            self._per_token.observe((self._last_at - self._first_at) / (self._tokens - 1))


class Metrics:
    """One app's."""

    def __init__(self, facts: Callable[[], Facts]) -> None:
        self._facts = facts
        self._past = {attribute: Sums[str]() for attribute, _, _ in _SENT}
        self._registry = registry = CollectorRegistry()

        def times(name: str, meaning: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, meaning, labels, buckets=buckets, registry=registry)

        def count(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(name, meaning, labels, registry=registry)

        self.first_event = times(
            "sseapp_first_event_seconds", "From a stream's opening to its first event, by route", _SECONDS, "route"
        )
        self._first_token = times(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request to a model to the first token of its answer, by route",
            _FIRST_TOKEN_S,
            "route",
        )
        self._output_token = times(
            "gen_ai_server_time_per_output_token_seconds",
            "Time per token after the first, averaged over an answer, by route",
            _OUTPUT_TOKEN_S,
            "route",
        )
        self.appends = times("sseapp_log_append_seconds", "Duration of the event log's commits", _SECONDS)
        self.appended = count("sseapp_log_events", "Events appended to the event log")
        self.log_failures = count("sseapp_log_failures", "Failed appends to the event log")
        self.resumes = count("sseapp_resumes", "Streams that resumed after a cursor, by route", "route")
        self.runs_ended = count("sseapp_runs_ended", "Runs that ended, by state", "state")
        self.refused = count("sseapp_refused", "Refused requests and streams, by status", "status")
        self._ended = count("sseapp_streams_ended", "Streams that ended, by route and reason", "route", "reason")
        build = Info("sseapp_build", "Versions of the service and of Python", registry=registry)
        build.info({"version": ssecore.__version__, "python": python_version()})
        ProcessCollector(registry=registry)
        registry.register(self)

    def answer(self, route: str) -> AnswerTimes:
        return AnswerTimes(self._first_token.labels(route), self._output_token.labels(route))

    def ended(self, stream: "Sender", reason: str) -> None:
        self._ended.labels(stream.route, reason).inc()
        for attribute, sums in self._past.items():
            sums[stream.route] += getattr(stream, attribute)

    def collect(self) -> Iterable[Metric]:
        streams, runs, gaps, dropped_lines = self._facts()
        open_streams = GaugeMetricFamily("sseapp_streams_open", "Open streams, by route", labels=["route"])
        yield _filled(open_streams, Sums(stream.route for stream in streams))
        for attribute, name, meaning in _SENT:
            sums = self._past[attribute].copy()
            for stream in streams:
                sums[stream.route] += getattr(stream, attribute)
            yield _filled(CounterMetricFamily(name, meaning, labels=["route"]), sums)
        yield GaugeMetricFamily("sseapp_runs_running", "Running runs of this process", value=runs)
        announced = CounterMetricFamily("sseapp_gaps", "Gaps announced to readers, by reason", labels=["reason"])
        yield _filled(announced, gaps)
        yield CounterMetricFamily(
            "sseapp_dropped_lines", "Log lines dropped because standard error was not read in time", value=dropped_lines
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
