"""The chat that everybody writes: OpenAI's SDK behind a stream, as the documentation of each shows it.

FastAPI with a `StreamingResponse`: `/fastapi`, and `/fastapi-aiohttp` with the SDK's aiohttp transport. sse-starlette:
`/sse-starlette`. The SDK is told its server by `OPENAI_BASE_URL`.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI, DefaultAioHttpClient
from sse_starlette import EventSourceResponse

app = FastAPI()
clients: dict[str, Any] = {}


def client(kind: str) -> Any:
    """Made in the running loop, as aiohttp needs it; one for all requests."""
    if kind not in clients:
        clients[kind] = AsyncOpenAI(api_key="x", http_client=DefaultAioHttpClient() if kind == "aiohttp" else None)
    return clients[kind]


async def tokens(kind: str, prompt: str) -> AsyncIterator[str]:
    messages = [{"role": "user", "content": prompt}]
    stream = await client(kind).chat.completions.create(model="gpt-4o-mini", messages=messages, stream=True)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


async def events(kind: str, prompt: str) -> AsyncIterator[str]:
    async for token in tokens(kind, prompt):
        yield f"data: {json.dumps({'content': token})}\n\n"
    yield "data: [DONE]\n\n"


@app.get("/fastapi")
async def plain(prompt: str) -> StreamingResponse:
    return StreamingResponse(events("httpx", prompt), media_type="text/event-stream")


@app.get("/fastapi-aiohttp")
async def by_aiohttp(prompt: str) -> StreamingResponse:
    return StreamingResponse(events("aiohttp", prompt), media_type="text/event-stream")


async def dicts(prompt: str) -> AsyncIterator[dict[str, str]]:
    async for token in tokens("httpx", prompt):
        yield {"data": json.dumps({"content": token})}
    yield {"data": "[DONE]"}


@app.get("/sse-starlette")
async def sse_starlette(prompt: str) -> EventSourceResponse:
    return EventSourceResponse(dicts(prompt))
