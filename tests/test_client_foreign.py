"""Our client against servers of others: the same events, over lines that break."""

import random
from collections.abc import Iterator

import anyio
import httpx
import pytest

from benchmarks.nchan import PUBLISH, SUBSCRIBE, Nchan
from ssecore.client import connect
from ssecore.client import source as client
from ssecore.wire import Event
from tests.foreign_servers import DATA
from tests.needs import needs
from tests.relay import relay
from tests.serving import Server, serve_uvicorn

EVENTS = [Event(data, "item", str(number)) for number, data in enumerate(DATA, 1)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.001)
    monkeypatch.setattr(client, "MIN_BACKOFF_S", 0.001)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_uvicorn(tmp_path_factory.mktemp("data"), app="tests.foreign_servers:make") as server:
        yield server


async def read(url: str, count: int, *, once: bool = False) -> list[Event]:
    """`count` events, or to the end."""
    events: list[Event] = []
    with anyio.fail_after(20):
        async with httpx.AsyncClient(verify=False) as http, connect(url, client=http, once=once) as source:
            async for event in source:
                events.append(Event(event.data, event.event, event.id))
                if len(events) == count:
                    break
    return events


@pytest.mark.parametrize("path", ["/sse-starlette", "/fastapi/stream"])
async def test_a_stream_is_whole_at_once_and_over_cuts(foreign: Server, path: str) -> None:
    # FastAPI's ends by itself and would begin again for an id at its end: `once` takes the end for the end.
    once = path == "/fastapi/stream"
    assert await read(foreign.url + path, len(EVENTS) + 1, once=once) == EVENTS
    dice = random.Random(8)
    with relay(foreign.port, [dice.randrange(200, 3000) for _ in range(10)]) as line:
        assert await read(line.url + path, len(EVENTS) + 1, once=once) == EVENTS
        assert len([answer for answer in line.answers() if b"text/event-stream" in answer]) > 5


@needs("nchan")
async def test_nchan_is_followed_over_cuts() -> None:
    texts = [f"{number}: é 😀 {'x' * 50}" for number in range(8)]
    with Nchan() as server, relay(server.port, [300, 250, 330]) as line:
        async with httpx.AsyncClient(verify=False, base_url=f"http://127.0.0.1:{server.port}") as http:
            for text in texts[:5]:
                (await http.post(PUBLISH, content=text.encode())).raise_for_status()
            found: list[Event] = []
            with anyio.fail_after(20):
                async with connect(line.url + SUBSCRIBE, client=http) as source:
                    async for event in source:
                        found.append(event)
                        if len(found) == 5:  # the rest comes live
                            for text in texts[5:]:
                                (await http.post(PUBLISH, content=text.encode())).raise_for_status()
                        if len(found) == len(texts):
                            break
    assert [event.data for event in found] == texts
    assert all(event.id for event in found)
    assert len([answer for answer in line.answers() if b"text/event-stream" in answer]) > 1
