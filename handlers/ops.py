"""Whether the service lives, and whether it wants work: for whoever watches over it."""

from typing import Final

from ssecore.errors import Forbidden, NotRunning
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import GET
from ssecore.metrics import MEDIA_TYPE

__all__ = ["ROUTES"]

METRICS_CALLER: Final = "metrics"


async def healthz(request: Request) -> Response:
    """The process answers, and the app in it runs: that is all. Restart it otherwise."""
    if not request.running:  # it failed, under a server that doesn't end with it
        raise NotRunning
    return JSON({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Whether to send requests here: not once the service is about to stop, nor while its event log can't be used."""
    if request.draining:
        return JSON({"status": "draining"}, status=503)
    if request.runs.log.unavailable:
        return JSON({"status": "the event log can't be reached or written"}, status=503)
    return JSON({"status": "ready"})


async def metrics(request: Request) -> Response:
    """For Prometheus. A token needs the right to read it, since it tells of all callers.

    In a program with a `caller=` of its own, it is for the caller called `metrics`.
    """
    if request.credential is None and request.caller not in (None, METRICS_CALLER):
        raise Forbidden(f"the metrics are for the caller {METRICS_CALLER!r} only")
    return Response(request.metrics.text(), media_type=MEDIA_TYPE)


ROUTES = [
    GET("/healthz", healthz, open=True),
    GET("/readyz", readyz, open=True),
    GET("/metrics", metrics, may="metrics"),
]
