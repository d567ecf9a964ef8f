"""A chat in plain ASGI by hand: aiohttp to the model's server, our reader of its answer, one `send` a token."""

import os
from typing import Any

import aiohttp
import orjson

from benchmarks.peers.bare import HEADERS
from handlers.answer import AnswerReader

URL = f"{os.environ['OPENAI_BASE_URL']}/chat/completions"
BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True})
sessions: list[aiohttp.ClientSession] = []


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    if not sessions:
        sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    reader = AnswerReader()
    async with sessions[0].post(URL, data=BODY) as answer:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        async for block in answer.content.iter_any():
            for piece in reader.feed(block):
                if type(piece) is str:
                    body = b"data: %b\n\n" % orjson.dumps({"content": piece})
                    await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
