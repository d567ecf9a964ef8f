"""The same stream from servers of others, with ids and resuming as their own documentation has it."""

from collections.abc import AsyncIterable, AsyncIterator
from typing import Annotated, Any, Final

from fastapi import FastAPI, Header
from fastapi.sse import EventSourceResponse as FastAPIResponse
from fastapi.sse import ServerSentEvent
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

__all__ = ["DATA", "make"]

#: What a stream says; each event has a name, and its number from 1 as id.
DATA: Final = [f"{number}: é 😀\u2028\x85 {{}}\nsecond line\n" for number in range(1, 301)]


async def starlette_stream(request: Request) -> Response:
    first = int(request.headers.get("last-event-id", 0))

    async def events() -> AsyncIterator[dict[str, Any]]:
        for number, data in enumerate(DATA[first:], first + 1):
            yield {"data": data, "event": "item", "id": str(number), "retry": 1}

    # Its own way to say that there is no more: 204, as the standard has it.
    return Response(status_code=204) if first == len(DATA) else EventSourceResponse(events(), ping=1)


fastapi = FastAPI()


@fastapi.get("/stream", response_class=FastAPIResponse)
async def fastapi_stream(last_event_id: Annotated[int, Header()] = 0) -> AsyncIterable[ServerSentEvent]:
    yield ServerSentEvent(comment="hello", retry=1)
    for number, data in enumerate(DATA[last_event_id:], last_event_id + 1):
        yield ServerSentEvent(raw_data=data, event="item", id=str(number))


def make() -> Starlette:
    return Starlette(routes=[Route("/sse-starlette", starlette_stream), Mount("/fastapi", fastapi)])
