"""FastAPI's own Server-Sent Events, as its documentation has them."""

import asyncio
from collections.abc import AsyncIterable

from fastapi import FastAPI  # type: ignore[import-not-found]
from fastapi.sse import EventSourceResponse, ServerSentEvent  # type: ignore[import-not-found]

from benchmarks.peers.work import pauses, tick, update

app = FastAPI()


@app.get("/stream", response_class=EventSourceResponse)  # type: ignore[untyped-decorator]
async def stream(count: int, pad: int = 0) -> AsyncIterable[ServerSentEvent]:
    for n in range(count):
        yield ServerSentEvent(data=update(n, pad), event="message")
    yield ServerSentEvent(data={"done": True}, event="complete")


@app.get("/ticks", response_class=EventSourceResponse)  # type: ignore[untyped-decorator]
async def ticks(interval: float) -> AsyncIterable[ServerSentEvent]:
    for pause in pauses(interval):
        yield ServerSentEvent(data=tick())
        await asyncio.sleep(pause)
