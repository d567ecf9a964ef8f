"""Health checks and metrics."""

from typing import Final

from ssecore.errors import Forbidden, NotRunning
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import GET
from ssecore.metrics import MEDIA_TYPE

__all__ = ["ROUTES"]

METRICS_CALLER: Final = "metrics"


async def healthz(request: Request) -> Response:
    """Liveness: restart the process if this fails."""
    if not request.running:  # the app failed, and another server goes on without it
        raise NotRunning
    return JSON({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Readiness: 503 during a drain, and while the event log can't be used."""
    if request.draining:
        return JSON({"status": "draining"}, status=503)
    if request.runs.log.unavailable:
        return JSON({"status": "the event log can't be reached or written"}, status=503)
    return JSON({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Metrics for Prometheus. With a custom `caller=`, only the caller named `metrics` may read them."""
    if request.credential is None and request.caller not in (None, METRICS_CALLER):
        raise Forbidden(f"only the caller {METRICS_CALLER!r} may read the metrics")
    return Response(request.metrics.text(), media_type=MEDIA_TYPE)


ROUTES = [
    GET("/healthz", healthz, open=True),
    GET("/readyz", readyz, open=True),
    GET("/metrics", metrics, may="metrics"),
]
