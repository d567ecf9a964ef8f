"""SIGTERM with a full house: a thousand streams of every kind, each of which has to end as it should."""

import asyncio
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.needs import needs
from tests.serving import Server, is_clean, serve

pytestmark = needs("time")

STREAMS: Final = 1000
DRAIN_S: Final = 2.0
#: Those that would go on for longer than the drain, by the way that they are delivered.
ENDLESS: Final = [
    "/countdown/3600?interval=3600",
    "/stream?count=1000000&interval=0.1",
    "/stream/data?count=1000000&interval=0.5",
    "/stream/merge?interval=3600",
    "/stream/timeout?limit=3600&interval=3600",
    "/topics/news",
    "/users/ann/stream",
    "/runs/{endless}/events",
    "/jobs/{endless}/progress",
]
FAREWELL: Final = re.compile(rb"retry: \d+\n\r\n0\r\n\r\n\Z")


@pytest.fixture
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 2 * STREAMS:
        pytest.skip(f"needs {2 * STREAMS} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def opened(server: Server, target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    return reader, writer


async def ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, began: float) -> tuple[bytes, float]:
    """The whole body, and how long after `began` its end came."""
    body = await reader.read()
    writer.close()
    return body, time.monotonic() - began


def started(server: Server, **job: Any) -> str:
    return server.client.post("/jobs", json={"kind": "sleep", "input": job}).headers["run-id"]


async def test_a_thousand_streams_of_every_kind_see_a_farewell_and_a_proper_end(
    many_files: None, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "large").write_bytes(bytes(4_000_000))
    with serve(tmp_path, env={"SSEAPP_DRAIN_S": str(DRAIN_S)}) as server:
        endless, short = started(server, steps=10, interval=60), started(server, steps=3, interval=0.5)
        targets = [target.replace("{endless}", endless) for target in ENDLESS]
        streams = [await opened(server, targets[number % len(targets)]) for number in range(STREAMS)]
        streams += [await opened(server, "/stream?count=10&interval=0.1"), await opened(server, "/download/large")]
        began = time.monotonic()
        server.process.terminate()
        *ends, (whole, _), (file, _) = await asyncio.gather(*[ended(*stream, began) for stream in streams])
        assert await asyncio.to_thread(server.wait) == 0
    assert [body[-200:] for body, _ in ends if not FAREWELL.search(body)] == []
    assert max(seconds for _, seconds in ends) < DRAIN_S + 1
    elsewhere = [seconds for (_, seconds), n in zip(ends, range(STREAMS), strict=True) if n % len(targets) >= 5]
    assert max(elsewhere) < DRAIN_S, "who can go on elsewhere is sent there at once"
    assert whole.count(b"event: message") == 10 and whole.endswith(b"id: end\n\n\r\n0\r\n\r\n"), "there was time for it"
    assert len(file) == 4_000_000
    assert is_clean(server.log())

    with serve(tmp_path) as server:
        states = {run["run"]: run["state"] for run in server.client.get("/runs").json()["runs"]}
    assert states == {endless: "interrupted", short: "completed"}
