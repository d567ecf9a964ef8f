"""aiohttp-sse, under aiohttp's own server on uvloop. `python -m benchmarks.peers.aio_http`."""

import asyncio
import json
import socket
from typing import Any

import uvloop
from aiohttp import web  # type: ignore[import-not-found]
from aiohttp_sse import sse_response  # type: ignore[import-not-found]

from benchmarks.peers.work import update


async def stream(request: Any) -> Any:
    count, pad = int(request.query["count"]), int(request.query.get("pad", 0))
    async with sse_response(request) as response:
        for n in range(count):
            await response.send(json.dumps(update(n, pad)), event="message")
        await response.send(json.dumps({"done": True}), event="complete")
    return response


async def main() -> None:
    app = web.Application()
    app.router.add_get("/stream", stream)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    await web.SockSite(runner, sock).start()
    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
