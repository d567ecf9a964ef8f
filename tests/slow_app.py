"""An ASGI program of somebody's, without a lifespan: its answer begins, and ends after the signal to stop has come."""

from typing import Any

import anyio


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        raise ValueError("it knows HTTP only")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    await anyio.sleep(2)  # longer than uvicorn's own grace
    await send({"type": "http.response.body", "body": b"ended", "more_body": False})
