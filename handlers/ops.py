"""Whether the service lives, and whether it wants work: for whoever watches over it."""

from ssecore.request import Request
from ssecore.responses import JSON, Response
from ssecore.routes import GET

__all__ = ["ROUTES"]


async def healthz(request: Request) -> Response:
    """The process answers: that is all. Restart it when it doesn't."""
    return JSON({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Whether to send requests here: not once the service is about to stop, nor while its event log is away."""
    if request.draining:
        return JSON({"status": "draining"}, status=503)
    if request.runs.log.away:
        return JSON({"status": "the event log is away"}, status=503)
    return JSON({"status": "ready"})


ROUTES = [GET("/healthz", healthz), GET("/readyz", readyz)]
