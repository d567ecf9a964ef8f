"""Plain ASGI by hand: no framework, one `send` an event. No heartbeat, no watcher, no limits."""

import asyncio
from typing import Any
from urllib.parse import parse_qs

import orjson

from benchmarks.peers.work import pauses, tick, update

HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


async def app(scope: Any, receive: Any, send: Any) -> None:
    query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    if scope["path"] == "/ticks":
        await ticks(float(query["interval"]), receive, send)
        return
    pad = int(query.get("pad", 0))
    for n in range(int(query["count"])):
        body = b"event: message\ndata: %b\n\n" % orjson.dumps(update(n, pad))
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b'event: complete\ndata: {"done":true}\n\n'})


async def ticks(interval: float, receive: Any, send: Any) -> None:
    watcher = asyncio.ensure_future(left(receive))
    for pause in pauses(interval):
        if watcher.done():
            return
        body = b"data: %b\n\n" % orjson.dumps(tick())
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await asyncio.sleep(pause)


async def left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
