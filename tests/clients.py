"""Clients of an app in the same process: one that asks, one that reads along, and one that behaves as a browser."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
import pytest
import sniffio
import trio.lowlevel
from trio.testing import MockClock

from sseapp import SSEApp
from ssecore.http.request import Request
from ssecore.testing import Exchange, VirtualClockLoop, connect
from ssecore.wire import Decoder, Event

__all__ = [
    "BROWSER",
    "REAL_BROWSER",
    "Answer",
    "AppWithCallers",
    "Heard",
    "Reading",
    "ask",
    "listen_like_a_browser",
    "listening",
    "stand_still",
]

#: What a browser's `EventSource` sends, as many libraries send it too, under their own name.
BROWSER: Final = {"accept": "text/event-stream", "cache-control": "no-cache", "user-agent": "library/1.0"}
#: What only a browser sends, from a page of the same origin.
REAL_BROWSER: Final = BROWSER | {
    "user-agent": "Mozilla/5.0 (X11; Linux x86_64; rv:153.0) Gecko/20100101 Firefox/153.0",
    "sec-fetch-site": "same-origin",
}
#: Connections after which a browser that is never told to stop has asked for ever.
PATIENCE: Final = 20


def stand_still(seconds: float) -> None:
    """In virtual time: as if the process had been stopped, or its loop blocked, for so long."""
    if sniffio.current_async_library() == "trio":
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, MockClock)
        clock.jump(seconds)
    else:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        loop._now += seconds


class AppWithCallers(SSEApp):
    """An app where the header `x-caller` says who asks."""

    async def _answer(self, request: Request, hosted: Any) -> Any:
        request.caller = request.headers.get("x-caller")
        return await super()._answer(request, hosted)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    @property
    def events(self) -> list[Event]:
        return Decoder().feed(self.body)

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def problem(self) -> tuple[int, str]:
        """Status and code, of what has to be a problem."""
        assert self.headers["content-type"] == "application/problem+json"
        assert self.json["status"] == self.status
        return self.status, self.json["code"]


class Reading:
    """An answer that is read as it comes."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.raw = b""
        self._decoder = Decoder()
        self._events: deque[Event] = deque()

    @property
    def run(self) -> str:
        return self.exchange.headers["run-id"]

    @property
    def last_event_id(self) -> str:
        return self._decoder.last_event_id

    async def chunk(self) -> bytes | None:
        chunk = await self.exchange.chunk()
        if chunk is not None:
            self.raw += chunk
            self._events += self._decoder.feed(chunk)
        return chunk

    async def event(self) -> Event:
        """The next one."""
        while not self._events:
            if await self.chunk() is None:
                pytest.fail(f"the answer has ended: {self.exchange.status} {self.raw!r}")
        return self._events.popleft()

    async def rest(self) -> list[Event]:
        """All that are left, to the proper end of the answer."""
        while await self.chunk() is not None:
            pass
        assert self.exchange.complete
        events, self._events = list(self._events), deque()
        return events


@asynccontextmanager
async def listening(app: SSEApp, target: str, method: str = "GET", **options: Any) -> AsyncIterator[Reading]:
    """Opens a stream; leaving the block leaves the stream."""
    async with connect(app, method, target, **options) as exchange:
        await exchange.started.wait()
        yield Reading(exchange)


async def ask(app: SSEApp, target: str, method: str = "GET", **options: Any) -> Answer:
    """The whole answer. For a stream that ends."""
    async with connect(app, method, target, **options) as exchange:
        body = await exchange.body()
        await exchange.ended.wait()
    return Answer(exchange.status, exchange.headers, body, exchange.complete)


@dataclass
class Heard:
    """What a page got of its `EventSource`."""

    events: list[Event] = field(default_factory=list)
    #: The status of each connection's answer.
    statuses: list[int] = field(default_factory=list)
    last_event_id: str = ""

    @property
    def data(self) -> list[str]:
        return [event.data for event in self.events]


async def listen_like_a_browser(
    app: SSEApp, target: str, *, last_event_id: str = "", cuts: Sequence[int] = ()
) -> Heard:
    """An `EventSource` from its making to its end: it comes back with its last id until the status isn't 200.

    The n-th connection is cut once `cuts[n]` bytes of its body have come. As in Firefox and WebKit, the cursor comes
    from events alone, and not from a block without data. The page doesn't listen for the engine's `cursor`.
    """
    heard, decoder = Heard(), Decoder()
    decoder.last_event_id = last_event_id
    budgets = deque(cuts)
    for _ in range(PATIENCE):
        decoder.reset()
        come: list[Event] = []
        headers = REAL_BROWSER | ({"last-event-id": decoder.last_event_id} if decoder.last_event_id else {})
        left = budgets.popleft() if budgets else None
        async with connect(app, "GET", target, headers=headers) as exchange:
            while left != 0 and (chunk := await exchange.chunk()) is not None:
                if left is not None:
                    chunk = chunk[:left]
                    left -= len(chunk)
                if exchange.status == 200:
                    come += decoder.feed(chunk)
            await exchange.started.wait()
        if come:
            last_event_id = come[-1].id or ""
        decoder.last_event_id = last_event_id
        heard.events += [event for event in come if event.event != "cursor"]
        heard.statuses.append(exchange.status)
        heard.last_event_id = decoder.last_event_id
        if exchange.status != 200:
            return heard
    pytest.fail(f"it asks for ever: {heard}")
