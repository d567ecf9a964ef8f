"""Runs when the machine is against them: a process that is killed, a full disk, a folder that can't be written."""

import errno
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import msgspec
import pytest

import sseapp
import ssecore.runs.worker
from sseapp import GET, Event, Run, Settings, SSEApp
from ssecore.dialects import DATA_ONLY, NAMED
from ssecore.errors import LogError
from ssecore.log.sqlite import SqliteLog
from ssecore.wire import Decoder
from tests.clients import BROWSER, Answer, ask, listen_like_a_browser, listening
from tests.house import Work, remount
from tests.needs import needs
from tests.serving import Server, serve_module, serve_uvicorn, wait_until

#: Real seconds after which a test has hung.
LIMIT_S: Final = 30
KEY: Final = "AAAAAAAAAAAAAAAAAAAAAA"

both_ways = pytest.mark.parametrize("data_only", [False, True], ids=["named", "data-only"])


# A process that is killed


class Stream:
    """What one client reads, over as many connections as it takes."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.run = ""
        self.events: list[Event] = []
        self._decoder = Decoder()

    def read(self, client: httpx.Client, events: int | None = None) -> int:
        """Go on with the last id, to the end or until so many events are there; the status."""
        self._decoder.reset()
        headers = dict(BROWSER)
        if self._decoder.last_event_id:
            headers["last-event-id"] = self._decoder.last_event_id
        with client.stream("GET", self.target, headers=headers) as response:
            self.run = response.headers.get("run-id", self.run)
            for chunk in response.iter_raw():
                self.events += self._decoder.feed(chunk)
                if events is not None and len(self.events) >= events:
                    break
            return response.status_code

    @property
    def told(self) -> list[tuple[str | None, str | None, str]]:
        return [(event.id, event.event, event.data) for event in self.events]


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()


def serve(folder: Path) -> Any:
    return serve_uvicorn(folder, app="tests.runs_app:make")


def state(server: Server, run: str) -> Any:
    return server.client.get(f"/runs/{run}").raise_for_status().json()["state"]


@pytest.mark.parametrize("family", ["named", "data"])
def test_after_a_kill_an_unfinished_run_is_interrupted_and_what_was_delivered_is_there(
    tmp_path: Path, family: str
) -> None:
    streams = {kind: Stream(f"/{family}/{kind}?key={KEY}") for kind in ("open", "complete", "finished")}
    silent = Stream(f"/{family}/silent")
    with serve(tmp_path) as server:
        for kind, stream in streams.items():
            assert stream.read(server.client, 3 if kind == "open" else 4) == 200
        started = server.client.get(silent.target, headers={"prefer": "respond-async"})
        silent.run = started.raise_for_status().json()["run"]
        before = {kind: stream.told for kind, stream in streams.items()}
        kill(server)

    ends: list[tuple[str | None, str]] = [("error", '{"error":"the service was stopped","code":"interrupted"}')]
    if family == "data":
        ends = [(None, '{"type":"error","error":"the service was stopped","code":"interrupted"}'), (None, "[DONE]")]
    with serve(tmp_path) as server:
        states = {"open": "interrupted", "complete": "completed", "finished": "completed"}
        for kind, stream in streams.items():
            assert state(server, stream.run) == states[kind]
            # Whoever reads it from its start gets what was delivered, with the same ids.
            again = Stream(f"/runs/{stream.run}/events")
            assert again.read(server.client) == 200
            delivered = len(before[kind])
            assert again.told[:delivered] == before[kind]
            assert [tuple(told[1:]) for told in again.told[delivered:]] == (ends if kind == "open" else [])
            # Whoever comes back gets the rest, and then a 204.
            statuses = [stream.read(server.client)]
            while statuses[-1] == 200 and len(statuses) < 10:
                statuses.append(stream.read(server.client))
            assert statuses == ([200, 204] if kind == "open" else [204])
            assert stream.told == again.told
            # And its key is still its own: nothing is started again.
            same = server.client.get(stream.target, headers={"prefer": "respond-async"})
            assert same.json()["run"] == stream.run

        silent.target = f"/runs/{silent.run}/events"
        assert silent.read(server.client) == 200 and [told[1:] for told in silent.told] == ends
        assert silent.read(server.client) == 204
        runs = server.client.get("/runs").json()["runs"]
        assert len(runs) == 4 and {run["state"] for run in runs} == {"completed", "interrupted"}


def test_a_run_in_full_flight_is_killed_and_no_delivered_event_is_lost(tmp_path: Path) -> None:
    stream = Stream("/counting")
    with serve(tmp_path) as server:
        assert stream.read(server.client, 5000) == 200
        kill(server)
    delivered = stream.told
    with serve(tmp_path) as server:
        again = Stream(f"/runs/{stream.run}/events")
        assert again.read(server.client) == 200
        assert again.told[: len(delivered)] == delivered
        *numbers, last = again.events
        assert [event.data.partition(" ")[0] for event in numbers] == [str(n + 1) for n in range(len(numbers))]
        assert [event.id for event in numbers] == [f"{stream.run}.{n + 1}" for n in range(len(numbers))]
        assert last.event == "error" and msgspec.json.decode(last.data)["code"] == "interrupted"
        assert stream.read(server.client) == 200 and stream.told == again.told
        assert stream.read(server.client) == 204
        assert state(server, stream.run) == "interrupted"


@needs("time")
def test_a_second_kill_changes_nothing(tmp_path: Path) -> None:
    stream = Stream("/named/open")
    with serve(tmp_path) as server:
        stream.read(server.client, 3)
        kill(server)
    with serve(tmp_path) as server:
        stream.read(server.client)
        assert len(stream.events) == 4
        kill(server)
    with serve(tmp_path) as server:
        assert stream.read(server.client) == 204
        again = Stream(f"/runs/{stream.run}/events")
        again.read(server.client)
        assert again.told == stream.told


@needs("time")
def test_one_sigterm_ends_the_app_although_a_run_swallows_its_cancellation(tmp_path: Path) -> None:
    with serve_module("tests.raising_app", tmp_path, {"SSEAPP_DRAIN_S": "0.5"}) as server:
        run = server.client.get("/runs-of/stubborn", headers={"prefer": "respond-async"}).json()["run"]
        began = time.monotonic()
        server.process.terminate()
        wait_until(lambda: f"run {run}: its handler did not end" in server.log())
        assert time.monotonic() - began < 0.5 + ssecore.runs.DRAIN_CLOSE_S + 2
        kill(server)
    with serve_module("tests.raising_app", tmp_path) as server:
        assert state(server, run) == "interrupted"


@needs("time")
def test_after_a_kill_a_run_with_a_very_large_last_event_is_closed_like_the_others(tmp_path: Path) -> None:
    """Of 20 MiB: the log takes more, and the decoder by itself less."""
    targets = {"open": "/named/open", "large": "/large/open", "large and complete": "/large/complete"}
    with serve(tmp_path) as server:
        started = {n: server.client.get(t, headers={"prefer": "respond-async"}).json() for n, t in targets.items()}
        runs = {name: answer["run"] for name, answer in started.items()}
        wait_until(lambda: all(server.client.get(f"/runs/{run}").json()["events"] for run in runs.values()))
        kill(server)
    with serve(tmp_path) as server:
        states = {name: state(server, run) for name, run in runs.items()}
        assert states == {"open": "interrupted", "large": "interrupted", "large and complete": "completed"}
        whole = server.client.get(f"/runs/{runs['large']}/events").content
        assert len(whole) > 20 * 1024 * 1024 and b'"code":"interrupted"' in whole[-200:]
    assert "Traceback" not in server.log()


def test_a_run_of_another_version_that_can_not_be_closed_does_not_stop_the_others(tmp_path: Path) -> None:
    """What stands in the log of it is no JSON, or isn't what this version writes."""
    with serve(tmp_path) as server:
        streams = [Stream(f"/named/open?n={number}") for number in range(4)]
        for stream in streams:
            stream.read(server.client, 3)
        kill(server)
    with closing(sqlite3.connect(tmp_path / "log.db")) as db, db:
        for stream, meta in zip(streams, ("{", '{"state": "running"}', "[1]"), strict=False):
            db.execute("UPDATE streams SET meta = ? WHERE name = ?", (meta, stream.run))
    with serve(tmp_path) as server:
        assert state(server, streams[3].run) == "interrupted"
        # Of the second enough is known to end it.
        assert b'"code":"interrupted"' in server.client.get(f"/runs/{streams[1].run}/events").content
        assert server.client.get(f"/runs/{streams[0].run}").status_code == 404
        wait_until(lambda: f"run {streams[2].run} was left behind, and can't be closed" in server.log())


# A disk that is full, a folder that can't be written


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be stored is tried again soon."""
    monkeypatch.setattr(ssecore.runs.worker, "RETRY_S", (0.01,))


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    work.close()


@asynccontextmanager
async def opened(folder: Path, work: Work, *, data_only: bool = False) -> AsyncIterator[SSEApp]:
    app = SSEApp(
        [GET("/work", work.handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED)], Settings(data_dir=folder)
    )
    with anyio.fail_after(LIMIT_S):
        async with app.running():
            yield app


async def finished(app: SSEApp, work: Work) -> Answer:
    """A run whose events have been acknowledged."""
    work.say(*map(Event, ("1", "2", "end")), None)
    answer = await ask(app, f"/work?key={KEY}")
    assert [event.data for event in answer.events] == ["1", "2", "end"]
    return answer


async def state_of(app: SSEApp, run: str) -> Any:
    return (await ask(app, f"/runs/{run}")).json["state"]


def assert_the_end(events: Sequence[Event], text: str, data_only: bool) -> None:
    """What the log's trouble is, in the way that the route speaks."""
    error = msgspec.json.decode(events[0].data)
    assert error["code"] == "log_unavailable" and text in error["error"]
    assert "/" not in error["error"], "no path of the server's"
    if data_only:
        assert error["type"] == "error" and [event.data for event in events[1:]] == ["[DONE]"]
    else:
        assert [event.event for event in events] == ["error"]


def fill(folder: Path) -> Path:
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (64 * 1024, 4096, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return ballast


async def assert_the_run_fails_and_the_service_goes_on(
    app: SSEApp, work: Work, before: Answer, text: str, data_only: bool, trouble: Any, mend: Any
) -> None:
    work.say(Event("1"))
    async with listening(app, "/work") as reading, listening(app, f"/runs/{reading.run}/events") as other:
        first = await reading.event()
        assert await other.event() == first
        trouble()
        work.say(Event("x" * 50_000))
        events = await reading.rest()
        assert_the_end(events, text, data_only)
        assert_the_end(await other.rest(), text, data_only)
        assert {event.id for event in events} == {first.id}, "without an id of its own"
        assert work.reasons[-1] == "failed"

    # The service goes on: what was acknowledged can be read, of the others' runs and of this one.
    run = before.headers["run-id"]
    assert (await ask(app, f"/runs/{run}/events")).body == before.body
    assert (await ask(app, f"/work?key={KEY}")).body == before.body
    assert (await ask(app, "/work", headers={"last-event-id": f"{run}.3"})).status == 204
    assert len((await ask(app, "/runs")).json["runs"]) == 2
    assert (await ask(app, f"/runs/{reading.run}")).json["events"] == 1
    async with listening(app, f"/runs/{reading.run}/events") as again:
        assert (await again.event()).id == first.id

        # New work is refused, and a browser is sent away to come back.
        work.say(*[Event("y" * 50_000)] * 2)
        refused = await ask(app, "/work")
        assert refused.problem == (503, "log_unavailable") and int(refused.headers["retry-after"]) > 0
        soft = await ask(app, "/work", headers=BROWSER)
        assert soft.status == 200 and soft.events == [] and soft.body.startswith(b"retry: ")

        mend()
        assert_the_end(await again.rest(), text, data_only)
    assert await state_of(app, reading.run) == "failed"
    heard = await listen_like_a_browser(app, "/work", last_event_id=str(first.id))
    assert_the_end(heard.events, text, data_only)
    assert [event.id for event in heard.events] == [f"{reading.run}.{n + 2}" for n in range(len(events))]
    assert heard.statuses[-1] == 204


@needs("tmpfs")
@both_ways
async def test_on_a_full_disk_a_run_fails_and_the_service_goes_on(
    small_disk: Path, work: Work, parked: bool, data_only: bool
) -> None:
    async with opened(small_disk, work, data_only=data_only) as app:
        before = await finished(app, work)
        await assert_the_run_fails_and_the_service_goes_on(
            app,
            work,
            before,
            "database or disk is full",
            data_only,
            lambda: fill(small_disk),
            lambda: (small_disk / "ballast").unlink(),
        )


@both_ways
async def test_when_the_log_becomes_read_only_a_run_fails_and_the_service_goes_on(
    tmp_path: Path, work: Work, parked: bool, data_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SQLite's own switch: Linux lets nobody make a folder read-only in which a file is open for writing."""
    log = SqliteLog(tmp_path / "log.db")
    monkeypatch.setattr(sseapp, "open_log", lambda settings: log)

    def switch(to: str) -> None:
        assert log.connection
        log.connection.execute(f"PRAGMA query_only = {to}")

    async with opened(tmp_path, work, data_only=data_only) as app:
        before = await finished(app, work)
        await assert_the_run_fails_and_the_service_goes_on(
            app,
            work,
            before,
            "attempt to write a readonly database",
            data_only,
            lambda: switch("ON"),
            lambda: switch("OFF"),
        )


@needs("tmpfs")
async def test_in_a_folder_that_is_read_only_the_service_does_not_start_and_nothing_is_lost(
    small_disk: Path, work: Work
) -> None:
    async with opened(small_disk, work) as app:
        before = await finished(app, work)
    remount(small_disk, "ro")
    with pytest.raises(LogError, match="can't be written: Read-only file system"):
        async with opened(small_disk, work):
            pytest.fail("it has started")
    remount(small_disk, "rw")
    async with opened(small_disk, work) as app:
        run = before.headers["run-id"]
        assert (await ask(app, f"/runs/{run}/events")).body == before.body


@needs("tmpfs")
async def test_a_run_that_could_not_be_closed_before_the_end_is_interrupted_at_the_next_start(
    small_disk: Path, work: Work
) -> None:
    async with opened(small_disk, work) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            fill(small_disk)
            work.say(Event("x" * 50_000))
            assert len(await reading.rest()) == 1
    os.unlink(small_disk / "ballast")
    async with opened(small_disk, work) as app:
        answer = await ask(app, f"/runs/{reading.run}/events")
        assert [event.data for event in answer.events][:1] == ["1"]
        assert msgspec.json.decode(answer.events[1].data)["code"] == "interrupted"
        assert await state_of(app, reading.run) == "interrupted"
