"""The ceiling: blocks of 64 KiB framed beforehand. What is left is the server, the socket and the load generator."""

from typing import Any
from urllib.parse import parse_qs

import orjson

from benchmarks.peers.bare import HEADERS
from benchmarks.peers.work import update


async def app(scope: Any, receive: Any, send: Any) -> None:
    query = parse_qs(scope["query_string"])
    count, pad = int(query[b"count"][0]), int(query.get(b"pad", [b"0"])[0])
    event = b"event: message\ndata: %b\n\n" % orjson.dumps(update(123456, pad))
    events = 64 * 1024 // len(event)
    block = event * events
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    for _ in range(count // events):
        await send({"type": "http.response.body", "body": block, "more_body": True})
    await send({"type": "http.response.body", "body": event * (count % events) + event})
