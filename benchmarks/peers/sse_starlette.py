"""sse-starlette under Starlette, as its README has it: generators of dicts, JSON by the standard library.

`/topic` is a broadcast: a queue for each client. `POST /topic` puts into all of them.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse  # type: ignore[import-not-found]
from starlette.applications import Starlette  # type: ignore[import-not-found]
from starlette.responses import Response  # type: ignore[import-not-found]
from starlette.routing import Route  # type: ignore[import-not-found]

from benchmarks.peers.work import pauses, tick, update

queues: set[asyncio.Queue[str]] = set()


async def counter(count: int, pad: int) -> AsyncIterator[dict[str, str]]:
    for n in range(count):
        yield {"event": "message", "data": json.dumps(update(n, pad))}
    yield {"event": "complete", "data": json.dumps({"done": True})}


async def stream(request: Any) -> Any:
    query = request.query_params
    return EventSourceResponse(counter(int(query["count"]), int(query.get("pad", 0))))


async def clock(interval: float) -> AsyncIterator[dict[str, str]]:
    for pause in pauses(interval):
        yield {"data": json.dumps(tick())}
        await asyncio.sleep(pause)


async def ticks(request: Any) -> Any:
    return EventSourceResponse(clock(float(request.query_params["interval"])))


async def subscription() -> AsyncIterator[dict[str, str]]:
    queue: asyncio.Queue[str] = asyncio.Queue()
    queues.add(queue)
    try:
        yield {"event": "init", "data": "{}"}
        while True:
            yield {"event": "message", "data": await queue.get()}
    finally:
        queues.remove(queue)


async def subscribe(request: Any) -> Any:
    return EventSourceResponse(subscription())


async def publish(request: Any) -> Any:
    body = (await request.body()).decode()
    for queue in queues:
        queue.put_nowait(body)
    return Response(status_code=202)


app = Starlette(
    routes=[
        Route("/stream", stream),
        Route("/ticks", ticks),
        Route("/topic", subscribe),
        Route("/topic", publish, methods=["POST"]),
    ]
)
