"""Litestar's ServerSentEvent, as its documentation has it."""

import json
from collections.abc import AsyncIterator

from litestar import Litestar, get
from litestar.response import ServerSentEvent, ServerSentEventMessage

from benchmarks.peers.work import update


async def counter(count: int, pad: int) -> AsyncIterator[ServerSentEventMessage]:
    for n in range(count):
        yield ServerSentEventMessage(event="message", data=json.dumps(update(n, pad)))
    yield ServerSentEventMessage(event="complete", data=json.dumps({"done": True}))


@get("/stream", sync_to_thread=False)
def stream(count: int, pad: int = 0) -> ServerSentEvent:
    return ServerSentEvent(counter(count, pad))


app = Litestar([stream])
