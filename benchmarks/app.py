"""The service with what only benchmarks ask for, under our runner.

`GET /durable` is /stream as a run, `GET /chat/fleeting` is /chat without one. `GET /padded` is /stream with bigger
events, `GET /ticks` an event with its time each `interval` seconds (`/ticks/durable` as a run). `POST /written/{name}`
publishes to the topic /topics/{name} without a request an event. `GET /alive` tells how many tasks there are.
`--by-task` has a task for each reader, as under any other server.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import msgspec

from benchmarks.peers.work import pauses, tick, update
from handlers import ROUTES, resources
from handlers.basics import Counted, counter
from handlers.chat import Prompt, chat
from sseapp import SSEApp
from ssecore.dialects import DATA_ONLY
from ssecore.http.request import Receive, Request
from ssecore.http.responses import JSON, Response, Send
from ssecore.http.routes import GET, POST, Run
from ssecore.server.runner import serve
from ssecore.settings import Settings
from ssecore.wire import Event


class Padded(msgspec.Struct):
    count: int
    pad: int


class Ticking(msgspec.Struct):
    interval: float


async def padded(request: Request) -> AsyncIterator[Event]:
    query: Padded = request.query
    for n in range(query.count):
        yield Event(update(n, query.pad), "message")
    yield Event({"done": True}, "complete")


async def ticks(request: Request) -> AsyncIterator[Event]:
    query: Ticking = request.query
    for pause in pauses(query.interval):
        yield Event(tick())
        await asyncio.sleep(pause)  # as all the others do


class Written(msgspec.Struct):
    count: int
    batch: int = 100


async def write(request: Request, name: str) -> Response:
    """Answers when all are in the log, with the last one's id."""
    query: Written = request.query
    cursor = None
    for begin in range(0, query.count, query.batch):
        numbers = range(begin, min(begin + query.batch, query.count))
        events = [Event({"count": n, "message": f"Update {n}"}, "message") for n in numbers]
        cursor = await request.topics.publish(f"topics/{name}", *events)
    return JSON({"id": str(cursor)})


async def alive(request: Request) -> Response:
    return JSON({"tasks": len(asyncio.all_tasks())})


class ByTask(SSEApp):
    """Under another server, as it were: nothing can be parked."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await super().__call__({**scope, "extensions": {}}, receive, send)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.app")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--by-task", action="store_true")
    options = parser.parse_args()
    settings = Settings.from_env(port="0", data_dir=options.data_dir, log=options.log)
    routes = [
        *ROUTES,
        GET("/alive", alive),
        GET("/chat/fleeting", chat, query=Prompt, dialect=DATA_ONLY),
        GET("/durable", counter, query=Counted, run=Run()),
        GET("/padded", padded, query=Padded),
        GET("/ticks", ticks, query=Ticking),
        GET("/ticks/durable", ticks, query=Ticking, run=Run(linger_s=0.1)),
        POST("/written/{name}", write, query=Written),
    ]
    kind = ByTask if options.by_task else SSEApp
    return serve(kind(routes, settings, lifespan=lambda app: resources(app.settings)), settings)


if __name__ == "__main__":
    sys.exit(main())
