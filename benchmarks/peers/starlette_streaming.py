"""Starlette's StreamingResponse, with events put together by hand: what most tutorials show."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette  # type: ignore[import-not-found]
from starlette.responses import StreamingResponse  # type: ignore[import-not-found]
from starlette.routing import Route  # type: ignore[import-not-found]

from benchmarks.peers.work import update


async def counter(count: int, pad: int) -> AsyncIterator[str]:
    for n in range(count):
        yield f"event: message\ndata: {json.dumps(update(n, pad))}\n\n"
    yield f"event: complete\ndata: {json.dumps({'done': True})}\n\n"


async def stream(request: Any) -> Any:
    query = request.query_params
    events = counter(int(query["count"]), int(query.get("pad", 0)))
    return StreamingResponse(events, media_type="text/event-stream")


app = Starlette(routes=[Route("/stream", stream)])
