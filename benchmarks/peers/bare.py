"""Plain ASGI by hand: no framework, one `send` an event. No heartbeat, no watcher, no limits."""

from typing import Any
from urllib.parse import parse_qs

import orjson

HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


async def app(scope: Any, receive: Any, send: Any) -> None:
    count = int(parse_qs(scope["query_string"])[b"count"][0])
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    for n in range(count):
        body = b"event: message\ndata: %b\n\n" % orjson.dumps({"count": n, "message": f"Update {n}"})
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b'event: complete\ndata: {"done":true}\n\n'})
