"""sse-starlette under Starlette, as its README has it: a generator of dicts, JSON by the standard library."""

import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.routing import Route


async def counter(count: int) -> AsyncIterator[dict[str, str]]:
    for n in range(count):
        yield {"event": "message", "data": json.dumps({"count": n, "message": f"Update {n}"})}
    yield {"event": "complete", "data": json.dumps({"done": True})}


async def stream(request: Any) -> Any:
    return EventSourceResponse(counter(int(request.query_params["count"])))


app = Starlette(routes=[Route("/stream", stream)])
