"""The server of a scenario: `python -m tests.history.app FOLDER PORT LOG LEASE_S`."""

import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import msgspec

from sseapp import SSEApp
from ssecore.dialects import DATA_ONLY
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import GET, POST, Run
from ssecore.server.runner import serve
from ssecore.settings import Settings
from ssecore.topics import Subscription
from ssecore.wire import Event
from tests.history import RETENTION_EVENTS, Script


class _Query(msgspec.Struct):
    seed: int
    events: int
    pause_ms: int = 0


async def _perform(request: Request) -> AsyncIterator[Event]:
    script = Script(request.path.strip("/"), **msgspec.structs.asdict(request.query))
    rng, burst = random.Random(script.seed), 0
    for name, data in script.lines():
        yield Event(data, name)
        burst -= 1
        if script.pause_ms and burst < 0:
            burst = rng.randrange(10)
            await anyio.sleep(rng.uniform(0, script.pause_ms / 1000))
    if script.route == "failing":
        raise RuntimeError("a planned failure")
    yield Event("[DONE]") if script.route == "plain" else Event("", "done")


async def _listen(request: Request, name: str) -> Subscription:
    return Subscription(name, Event({"topic": name}, "init"), pulse=lambda: Event("", "heartbeat"), pulse_s=0.2)


async def _publish(request: Request, name: str) -> Response:
    cursor = await request.topics.publish(name, Event(request.raw_body, "message"))
    return JSON({"id": str(cursor)}, status=202)


def _serve(folder: str, port: str, log: str, lease_s: str) -> int:
    settings = Settings(
        port=int(port),
        log=log,
        lease_s=float(lease_s),
        data_dir=Path(folder),
        auth="off",  # they come by nginx
        heartbeat_s=0.3,
        drain_s=1.0,
        retry_ms=400,
        retention_events=RETENTION_EVENTS,
    )
    runs = [GET(f"/{name}", _perform, query=_Query, run=Run()) for name in ("steady", "quick", "failing")]
    runs.append(GET("/plain", _perform, query=_Query, run=Run(), dialect=DATA_ONLY))
    routes = [*runs, GET("/topics/{name}", _listen), POST("/topics/{name}", _publish, body=Any)]
    return serve(SSEApp(routes, settings), settings)


if __name__ == "__main__":
    sys.exit(_serve(*sys.argv[1:]))
