"""`to_file`: a stream in a file, whoever is killed when."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx
import orjson
import pytest

from ssecore.client import GapError, SourceError, connect, json_line, to_file
from ssecore.wire import Decoder, Event
from tests import test_client, upstream
from tests.needs import needs
from tests.serving import serve_uvicorn, wait_until
from tests.test_client import EITHER, cut, numbered, over, stream
from tests.upstream import Upstream

ROOT: Final = Path(__file__).parent.parent
KILLS: Final = 100

quick = test_client.quick

#: A gap before the third event, as our server tells it.
GAP: Final = b'event: gap\ndata: {"reason":"trimmed","from":2,"to":2}\n\n'


@pytest.fixture
def foreign() -> Iterator[Upstream]:
    with upstream.serve() as server:
        yield server
        server.settle()


async def write(url: str, path: Path, **options: Any) -> int:
    async with httpx.AsyncClient(verify=False) as http, connect(url, client=http, **options) as source:
        with anyio.fail_after(20):
            return await to_file(source, path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


@needs("time")
def test_a_file_is_exactly_the_run_however_often_its_writer_is_killed(tmp_path: Path) -> None:
    """SIGKILL, a hundred times, at random moments of a run that is going on."""
    path, dice, end = tmp_path / "run.jsonl", random.Random(8), tmp_path / "end"
    with serve_uvicorn(tmp_path, app="tests.runs_app:make", env={"SSEAPP_RETRY_MS": "1"}) as server:
        url = f"{server.url}/until?path={end}"
        with server.client.stream("GET", url) as response:
            run = response.headers["run-id"]
        command = [sys.executable, "-m", "tests.writer", f"{server.url}/runs/{run}/events", str(path)]
        writer = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with writer:
            assert writer.stdin is not None and writer.stdout is not None
            codes: list[int] = []
            grown = 0
            while len(codes) <= KILLS:
                before = size(path)
                print(file=writer.stdin, flush=True)
                child = int(writer.stdout.readline())
                if len(codes) < KILLS:
                    moment(path, dice)
                    os.kill(child, signal.SIGKILL)
                else:
                    end.touch()
                codes.append(int(writer.stdout.readline()))
                grown += size(path) > before
            writer.stdin.close()
        assert codes == [-signal.SIGKILL] * KILLS + [0] and grown > KILLS / 4
        whole = Decoder().feed(server.client.get(f"/runs/{run}/events").content)
    assert path.read_bytes() == b"".join(map(json_line, whole))
    assert whole[-1].event == "complete" and len(whole) > 100


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def moment(path: Path, dice: random.Random) -> None:
    """Wait for a random one: soon after the start, or when so much more has been written."""
    if dice.random() < 0.5:
        time.sleep(dice.uniform(0, 0.05))
        return
    deadline, enough = time.monotonic() + 5, size(path) + dice.randrange(1, 400)
    while size(path) < enough and time.monotonic() < deadline:
        time.sleep(0.0005)


@EITHER
async def test_a_file_that_is_begun_anywhere_becomes_the_same(
    foreign: Upstream, tmp_path: Path, anyio_backend_name: str
) -> None:
    """Whatever of it is there: nothing, some lines, and any part of the next."""
    path = tmp_path / "events"
    events = [Event(f"{number} \u2028 {{}}", id=f"x.{number}") for number in (1, 2, 3)]
    whole = b"".join(map(json_line, events))
    bodies = [f"id: {event.id}\ndata: {event.data}\n\n".encode() for event in events]
    for at in range(0, len(whole) + 1, 1 if anyio_backend_name == "asyncio" else 7):
        path.write_bytes(whole[:at])
        have = whole[:at].count(b"\n")
        foreign.plan(*([stream(*bodies[have:])] if have < 3 else []), over)
        assert await write(foreign.url, path) == 3 - have
        assert path.read_bytes() == whole
        assert foreign.calls[0].headers.get("last-event-id") == (f"x.{have}" if have else None)


async def test_each_event_is_in_the_file_before_the_next_is_waited_for(foreign: Upstream, tmp_path: Path) -> None:
    path = tmp_path / "events"

    def script(call: upstream.Call) -> None:
        call.head()
        for number in (1, 2, 3):
            call.send(numbered(number))
            deadline = time.monotonic() + 20
            while size(path) == 0 or len(lines(path)) < number:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        call.end()

    foreign.plan(script, over)
    assert await write(foreign.url, path) == 3


async def test_a_gap_that_nothing_followed_is_not_there_twice(foreign: Upstream, tmp_path: Path) -> None:
    path = tmp_path / "events"
    foreign.plan(cut(numbered(1)), stream(GAP), upstream.refuse(404))
    with pytest.raises(SourceError, match="404"):
        await write(foreign.url, path, gaps="yield")
    assert [line["event"] for line in lines(path)] == [None, "gap"]
    foreign.plan(stream(GAP, numbered(3)), over)
    await write(foreign.url, path, gaps="yield")
    assert [(line["event"], line["id"]) for line in lines(path)] == [(None, "x.1"), ("gap", "x.1"), (None, "x.3")]
    assert foreign.calls[0].headers["last-event-id"] == "x.1"


async def test_a_gap_can_be_raised_and_what_came_before_is_in_the_file(foreign: Upstream, tmp_path: Path) -> None:
    foreign.plan(stream(numbered(1), GAP))
    with pytest.raises(GapError):
        await write(foreign.url, tmp_path / "events")
    assert [line["id"] for line in lines(tmp_path / "events")] == ["x.1"]


async def test_a_server_that_begins_anew_is_found_out_from_the_file(foreign: Upstream, tmp_path: Path) -> None:
    path = tmp_path / "events"
    foreign.plan(cut(numbered(1, 2)), upstream.refuse(404))
    with pytest.raises(SourceError):
        await write(foreign.url, path)
    foreign.plan(stream(numbered(1, 2, 3)))
    with pytest.raises(SourceError, match="Last-Event-ID"):
        await write(foreign.url, path)
    assert [line["id"] for line in lines(path)] == ["x.1", "x.2"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a letter\nto somebody", "other content than events"),
        (b'{"idol"', "other content"),
        (b'{"id":"x.1"}\n', "is not an event"),
        (b'{"id":"x.1","event":null,"data":"1"}\n\0\0\0\n', "is not an event"),
        (b'{"id":null,"event":null,"data":"1"}\n', "has no id"),
    ],
)
async def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "letter"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=match):
        await write("http://127.0.0.1:1", path)
    assert path.read_bytes() == content


async def test_a_file_has_one_writer(foreign: Upstream, tmp_path: Path) -> None:
    path = tmp_path / "events"

    def script(call: upstream.Call) -> None:
        call.head()
        call.send(numbered(1))
        call.wait_gone()

    foreign.plan(script)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write, foreign.url, path)
        await anyio.to_thread.run_sync(wait_until, lambda: size(path))
        with pytest.raises(SourceError, match="by another process"):
            await write(foreign.url, path)
        tasks.cancel_scope.cancel()
    with pytest.raises(SourceError, match="not a regular file"):
        await write(foreign.url, Path(os.devnull))
    with pytest.raises(FileNotFoundError):
        await write(foreign.url, tmp_path / "nowhere" / "events")


async def test_a_full_disk_is_an_error_and_the_next_start_goes_on(
    foreign: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, room = tmp_path / "events", 60
    real = os.write

    def write_some(file: int, content: bytes) -> int:
        if size(path) >= room:
            raise OSError(28, "No space left on device")
        return real(file, content[: room - size(path)])

    monkeypatch.setattr(os, "write", write_some)
    foreign.plan(upstream.silent(numbered(1, 2)))  # an end would let the source ask again while the disk is tried
    with pytest.raises(OSError, match="No space"):
        await write(foreign.url, path)
    assert size(path) == room
    monkeypatch.undo()
    foreign.plan(stream(numbered(2)), over)
    await write(foreign.url, path)
    assert [line["id"] for line in lines(path)] == ["x.1", "x.2"]


async def test_a_source_that_is_being_read_is_not_taken_back(foreign: Upstream, tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_bytes(json_line(Event("1", id="x.1")))

    def waiting(call: upstream.Call) -> None:
        call.head()
        call.send(numbered(1))
        call.wait_gone()

    foreign.plan(waiting)
    async with connect(foreign.url) as source:
        await anext(source)
        with pytest.raises(RuntimeError, match="before its first event"):
            await to_file(source, path)
