"""The ceiling: blocks of 64 KiB framed beforehand. What is left is the server, the socket and the load generator."""

from typing import Any
from urllib.parse import parse_qs

from benchmarks.peers.bare import HEADERS

EVENT = b'event: message\ndata: {"count":123456,"message":"Update 123456"}\n\n'
EVENTS = 64 * 1024 // len(EVENT)
BLOCK = EVENT * EVENTS


async def app(scope: Any, receive: Any, send: Any) -> None:
    count = int(parse_qs(scope["query_string"])[b"count"][0])
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    for _ in range(count // EVENTS):
        await send({"type": "http.response.body", "body": BLOCK, "more_body": True})
    await send({"type": "http.response.body", "body": EVENT * (count % EVENTS) + EVENT})
