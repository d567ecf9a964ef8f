"""Runs: the table of requests and answers, cursors, and the life of a run.

The table and the cursors are tested over the engines of the log and both ways of delivery; what has to do with time on
the memory log alone, in virtual time: no test waits, and each moment is exact.
"""

import gc
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import anyio
import anyio.lowlevel
import msgspec
import pytest
from anyio import CancelScope, current_time

import sseapp
import ssecore.log
from sseapp import SSEApp
from ssecore.dialects import DATA_ONLY, NAMED
from ssecore.errors import LogError, LogUnavailable, NotFound, SSEAppError, UpstreamError
from ssecore.http.request import EndReason, Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import GET, POST, Route, Run, Upload
from ssecore.log import Log, Stat
from ssecore.log.memory import MemoryLog
from ssecore.log.sqlite import SqliteLog
from ssecore.log.writer import Posted
from ssecore.runs import DRAIN_CLOSE_S, Worker
from ssecore.settings import Settings
from ssecore.streaming.pump import CLOSE_S, FIRST_ITEM_S
from ssecore.testing import connect
from ssecore.topics import Subscription
from ssecore.wire import Decoder, Event
from tests.clients import BROWSER, Answer, AppWithCallers, ask, listen_like_a_browser, listening, stand_still
from tests.house import Backend, Work, in_virtual_time, settle
from tests.lines import lines_offered

START: Final = 1_700_000_000.0
NEVER_S: Final = 10_000_000.0
#: 22 characters: what a key has at least where nobody has a name.
KEY: Final = "AAAAAAAAAAAAAAAAAAAAAA"
RETRY: Final = b"retry: 2000\n"
#: A cursor of a run that never was.
NOBODYS: Final = "BBBBBBBBBBBBBBBBBBBBBB.3"
EVENTS: Final = {"accept": "text/event-stream"}
ASYNC: Final = {"prefer": "respond-async"}


@dataclass(frozen=True)
class Mode:
    """An engine of the log, and whether streams are parked on lines."""

    name: str
    parked: bool = False

    @property
    def virtual(self) -> bool:
        return self.name != "sqlite"

    @property
    def limit_s(self) -> float:
        """After so long a test has hung."""
        return 100_000 if self.virtual else 30

    def __str__(self) -> str:
        return f"{self.name}-parked" if self.parked else self.name


MEMORY: Final = [Mode("memory"), Mode("memory", parked=True)]
SQLITE: Final = [Mode("sqlite"), Mode("sqlite", parked=True)]

#: For tests of what has to do with time, and of what needs none of the engines in particular.
virtual = pytest.mark.parametrize("mode", MEMORY, ids=str, indirect=True)
on_sqlite = pytest.mark.parametrize("mode", SQLITE, ids=str, indirect=True)
engines = pytest.mark.parametrize("mode", [MEMORY[0], SQLITE[0]], ids=str, indirect=True)
once = pytest.mark.parametrize("mode", MEMORY[:1], ids=str, indirect=True)
on_lines = pytest.mark.parametrize("mode", MEMORY[1:2], ids=str, indirect=True)

#: For routes with names of events, and without.
both_ways = pytest.mark.parametrize("data_only", [False, True], ids=["named", "data-only"])


@pytest.fixture(params=[*MEMORY, SQLITE[0]], ids=str)
def mode(request: pytest.FixtureRequest) -> Mode:
    mode: Mode = request.param
    return mode


@pytest.fixture
def anyio_backend(mode: Mode) -> Backend:
    return in_virtual_time() if mode.virtual else ("asyncio", {})


class House:
    """Where an app lives: it may be opened again, on the same file where there is one."""

    def __init__(self, mode: Mode, folder: Path) -> None:
        self.mode = mode
        self.path = folder / "log.db"
        self.now = START  #: Unix time, as the log has it
        self.log: Log

    def open_log(self, settings: Settings) -> Log:
        if self.mode.name == "sqlite":
            self.log = SqliteLog(self.path, clock=lambda: self.now, upkeep_s=NEVER_S)
        else:
            self.log = MemoryLog(clock=lambda: self.now, upkeep_s=NEVER_S)
        return self.log

    def put_back(self, copy: Path) -> None:
        """Make the log what it was. Only while no app is open."""
        for path in self.path.parent.glob(f"{self.path.name}*"):
            path.unlink()
        copy.rename(self.path)

    @asynccontextmanager
    async def open(self, *routes: Route, **values: Any) -> AsyncIterator[SSEApp]:
        """An app with these routes, running; `values` are settings."""
        app = AppWithCallers(routes, Settings(**values))
        with lines_offered(self.mode.parked), anyio.fail_after(self.mode.limit_s):
            async with app.running():
                yield app


@pytest.fixture
def house(mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    house = House(mode, tmp_path)
    monkeypatch.setattr(sseapp, "open_log", house.open_log)
    return house


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    work.close()


def said(*names: object) -> list[Event]:
    return [Event(str(name)) for name in names]


async def count(request: Request) -> AsyncIterator[Event]:
    """Three events and an end."""
    for number in (1, 2, 3):
        yield Event(str(number))
    yield Event("", "complete")


async def count_data(request: Request) -> AsyncIterator[Event]:
    for number in (1, 2, 3):
        yield Event(str(number))
    yield Event("[DONE]")


COUNTED: Final = ["1", "2", "3", ""]
COUNT: Final = GET("/count", count, run=Run())


def counting(*, data_only: bool = False) -> Route:
    return GET("/count", count_data if data_only else count, run=Run(), dialect=DATA_ONLY if data_only else NAMED)


def engine_event(name: str, data: dict[str, Any], data_only: bool) -> list[tuple[str | None, Any]]:
    """A terminal event of the engine's own, as `plainly` has it."""
    return [(None, {"type": name, **data}), (None, "[DONE]")] if data_only else [(name, data)]


def plainly(events: Sequence[Event]) -> list[tuple[str | None, Any]]:
    """Names, and data decoded where it is an object."""
    return [
        (event.event, msgspec.json.decode(event.data) if event.data.startswith("{") else event.data) for event in events
    ]


def data(events: Sequence[Event]) -> list[Any]:
    return [event.data for event in events]


def ids(events: Sequence[Event]) -> list[str | None]:
    return [event.id for event in events]


def numbered(run: str, first: int, last: int) -> list[str]:
    return [f"{run}.{number}" for number in range(first, last + 1)]


async def turns(until: Callable[[], bool]) -> None:
    """Turns of the loop until it is so. Where the log is SQLite, whose threads don't know of virtual time."""
    while not until():
        await anyio.lowlevel.checkpoint()


@dataclass
class Call:
    """What the log was asked for, and said."""

    args: tuple[Any, ...]
    options: dict[str, Any]
    result: Any


def spy(log: Log, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Those of the calls of the log's method `name` that have returned, from now on."""
    calls: list[Call] = []
    method = getattr(log, name)

    async def call(*args: Any, **options: Any) -> Any:
        result = await method(*args, **options)
        calls.append(Call(args, options, result))
        return result

    monkeypatch.setattr(log, name, call)
    if name == "append":  # what is posted is appended, too
        make = log.writer

        def writer(stream: str, epoch: str, told: Posted) -> Any:
            own = make(stream, epoch, told)

            def post(frames: list[bytes], size: int) -> None:
                own.post(frames, size)
                calls.append(Call((stream, frames), {}, None))

            return SimpleNamespace(post=post)

        monkeypatch.setattr(log, "writer", writer)
    return calls


async def state_of(app: SSEApp, run: str) -> Any:
    answer = await ask(app, f"/runs/{run}")
    assert answer.status == 200
    return answer.json["state"]


async def start(app: SSEApp, target: str, method: str = "GET", **options: Any) -> str:
    """Start a run without reading it; gives its id."""
    answer = await ask(app, target, method, headers=ASYNC | options.pop("headers", {}), **options)
    assert answer.status == 202, answer.body
    run: str = answer.json["run"]
    return run


async def refused(app: SSEApp, target: str, method: str = "GET", **options: Any) -> tuple[int, str]:
    return (await ask(app, target, method, **options)).problem


def resuming(id: str, **headers: str) -> dict[str, str]:
    return {"last-event-id": id, **headers}


# The first request


@engines
async def test_a_run_tells_its_caller_what_it_is_about(house: House) -> None:
    """In one line of a bounded length; somebody else's run is told of to nobody."""
    about = Run(about=lambda request: request.query_params.get("said", ""))
    ann, bob = {"x-caller": "ann"}, {"x-caller": "bob"}
    async with house.open(GET("/work", count, run=about), COUNT) as app:
        for said, line in (("two%20%0A lines", "two lines"), ("x" * 5000, "x" * 199 + "…"), ("", "")):
            run = await start(app, f"/work?said={said}", headers=ann)
            assert (await ask(app, f"/runs/{run}", headers=ann)).json["about"] == line
            assert await refused(app, f"/runs/{run}", headers=bob) == (404, "not_found")
        assert (await ask(app, "/runs", headers=ann)).json["runs"][-1]["about"] == "two lines"
        assert (await ask(app, "/runs", headers=bob)).json == {"runs": []}


@engines
async def test_the_first_request_starts_a_run_and_streams_it_from_its_start(house: House) -> None:
    async with house.open(COUNT) as app:
        answer = await ask(app, "/count")
        run = answer.headers["run-id"]
        assert answer.status == 200 and answer.complete
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.body.startswith(RETRY)
        assert len(run) == 22
        assert ids(answer.events) == numbered(run, 1, 4)
        assert data(answer.events) == COUNTED

        again = await ask(app, "/count")
        assert again.headers["run-id"] != run, "without a key or an id it is another run"


async def test_a_run_that_has_ended_is_freed_without_a_garbage_collection(house: House) -> None:
    """It has the request, with its body."""
    async with house.open(COUNT) as app:
        gc.collect()
        gc.disable()
        try:
            assert (await ask(app, "/count")).complete
            await anyio.wait_all_tasks_blocked()
            assert not [each for each in gc.get_objects() if isinstance(each, Worker)]
        finally:
            gc.enable()


@engines
async def test_what_gives_no_text_starts_nothing(house: House) -> None:
    with pytest.raises(TypeError, match="plain function"):
        Run(about=anyio.sleep)  # type: ignore[arg-type]
    async with house.open(GET("/work", count, run=Run(about=lambda request: None))) as app:  # type: ignore[arg-type, return-value]
        assert await refused(app, "/work") == (500, "internal_error")
        assert (await ask(app, "/runs")).json == {"runs": []}


async def test_events_come_as_they_are_made(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            for number in (1, 2, 3):
                event = await reading.event()
                assert (event.data, event.id) == (str(number), f"{reading.run}.{number}")
                work.say(Event(str(number + 1)))
            work.say(None)
            assert data(await reading.rest()) == ["4"]
        assert work.started == 1


async def test_with_respond_async_a_run_is_started_and_its_place_is_told(house: House, work: Work) -> None:
    async with house.open(POST("/work", work.handler, body=list[int], run=Run())) as app:
        work.say(Event("1"))
        headers = {"prefer": "wait=10, Respond-Async", "content-type": "application/json"}
        answer = await ask(app, "/work", "POST", headers=headers, body=b"[1]", root_path="/mount")
        run = answer.headers["run-id"]
        assert answer.status == 202
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["location"] == f"runs/{run}/events"
        assert answer.headers["preference-applied"] == "respond-async"
        assert answer.json == {"run": run, "events": f"runs/{run}/events"}

        async with listening(app, f"/runs/{run}/events", root_path="/mount") as reading:
            assert (await reading.event()).id == f"{run}.1"
            assert reading.run == run
            work.say(Event("2"), None)
            assert ids(await reading.rest()) == [f"{run}.2"]
        assert work.started == 1


@engines
async def test_other_preferences_are_no_wish_for_a_202(house: House) -> None:
    async with house.open(COUNT) as app:
        answer = await ask(app, "/count", headers={"prefer": "return=minimal"})
        assert answer.status == 200 and data(answer.events) == COUNTED


@engines
async def test_head_answers_the_headers_and_starts_nothing(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        answer = await ask(app, "/work", "HEAD")
        assert (answer.status, answer.body) == (200, b"") and "run-id" not in answer.headers
        assert (await ask(app, "/runs")).json == {"runs": []}
        assert work.started == 0


# Going on


@pytest.mark.parametrize("seen", [0, 1, 2])
@pytest.mark.parametrize("how", ["header", "query"])
@pytest.mark.parametrize("place", ["route", "view"])
async def test_a_reader_that_was_cut_goes_on_right_after_its_last_id_and_live(
    house: House, work: Work, place: str, how: str, seen: int
) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(*said(1, 2))
        async with listening(app, "/work") as reading:
            run = reading.run
            events = [await reading.event() for _ in range(2)]
        work.say(Event("3"))

        target = "/work" if place == "route" else f"/runs/{run}/events"
        cursor = f"{run}.{seen}"
        target, headers = (target, resuming(cursor)) if how == "header" else (f"{target}?last_event_id={cursor}", {})
        async with listening(app, target, headers=headers) as reading:
            assert reading.run == run
            events[seen:] = [await reading.event() for _ in range(seen, 3)]
            work.say(Event("4"), None)
            events += await reading.rest()
        assert data(events) == ["1", "2", "3", "4"]
        assert ids(events) == numbered(run, 1, 4)
        assert work.started == 1


@engines
async def test_the_header_wins_over_the_query(house: House) -> None:
    async with house.open(COUNT) as app:
        run = await start(app, "/count")
        for target in (f"/count?last_event_id={run}.1", f"/runs/{run}/events?last_event_id={run}.1"):
            answer = await ask(app, target, headers=resuming(f"{run}.3"))
            assert ids(answer.events) == [f"{run}.4"]
            assert (await ask(app, f"{target}&", headers=resuming("+"))).problem == (400, "bad_request")


@engines
async def test_an_empty_id_is_none(house: House) -> None:
    async with house.open(COUNT) as app:
        run = await start(app, "/count")
        for target, headers in (
            ("/count", resuming("")),
            ("/count?last_event_id=", resuming("")),
            ("/count?last_event_id=%20", resuming("")),
            ("/count?lastEventId=", resuming(" \t")),
            ("/count", {}),
        ):
            answer = await ask(app, target, headers=headers)
            assert data(answer.events) == COUNTED and answer.headers["run-id"] != run
        answer = await ask(app, f"/count?last_event_id={run}.3", headers=resuming(""))
        assert ids(answer.events) == [f"{run}.4"]
        answer = await ask(app, f"/runs/{run}/events?last_event_id=", headers=resuming(""))
        assert ids(answer.events) == numbered(run, 1, 4)


@engines
async def test_after_everything_was_delivered_a_browser_is_told_to_stop(house: House) -> None:
    async with house.open(COUNT) as app:
        run = (await ask(app, "/count")).headers["run-id"]
        for target in ("/count", f"/runs/{run}/events"):
            for headers in (resuming(f"{run}.4"), resuming(f"{run}.4", **BROWSER)):
                answer = await ask(app, target, headers=headers)
                assert (answer.status, answer.body, answer.complete) == (204, b"", True)
        answer = await ask(app, f"/count?last_event_id={run}.4")
        assert answer.status == 204


async def test_a_reader_of_all_there_is_waits_while_the_run_goes_on(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            async with listening(app, "/work", headers=resuming(reading.last_event_id)) as other:
                assert other.exchange.status == 200
                work.say(Event("2"), None)
                assert data(await other.rest()) == data(await reading.rest()) == ["2"]


@engines
@both_ways
@pytest.mark.parametrize("place", ["route", "view"])
async def test_an_unknown_run_is_gone_or_for_an_event_source_a_gap_and_the_end(
    house: House, place: str, data_only: bool
) -> None:
    async with house.open(counting(data_only=data_only)) as app:
        target = "/count" if place == "route" else f"/runs/{NOBODYS[:22]}/events"
        assert await refused(app, target, headers=resuming(NOBODYS)) == (410, "gone")
        answer = await ask(app, target, headers=resuming(NOBODYS, **EVENTS))
        assert answer.status == 200 and answer.headers["content-type"] == "text/event-stream"
        gap = {"reason": "expired", "from": 4, "to": None}
        if data_only and place == "route":  # of a run that nobody knows, nobody knows how it spoke
            assert plainly(answer.events) == [(None, {"type": "gap", **gap}), (None, "[DONE]")]
        else:
            assert plainly(answer.events) == [("gap", gap)]
        assert ids(answer.events)[-1] == "end"
        assert ids(answer.events)[:-1] == [None] * (len(answer.events) - 1)
        assert (await ask(app, target, headers=resuming("end", **EVENTS))).status == 204


@engines
@pytest.mark.parametrize("place", ["route", "view"])
async def test_a_run_that_age_has_taken_is_expired(house: House, place: str) -> None:
    async with house.open(COUNT, retention_s=60) as app:
        run = (await ask(app, "/count")).headers["run-id"]
        target = "/count" if place == "route" else f"/runs/{run}/events"
        house.now += 59
        await house.log.upkeep()
        assert ids((await ask(app, target, headers=resuming(f"{run}.3"))).events) == [f"{run}.4"]
        house.now += 1
        await house.log.upkeep()
        assert await refused(app, target, headers=resuming(f"{run}.3")) == (410, "gone")
        answer = await ask(app, target, headers=resuming(f"{run}.3", **EVENTS))
        assert plainly(answer.events) == [("gap", {"reason": "expired", "from": 4, "to": None})]
        assert await refused(app, f"/runs/{run}") == (404, "not_found")


async def test_a_running_run_does_not_age(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run()), retention_s=60) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            house.now += 1000
            await house.log.upkeep()
            work.say(Event("2"), None)
            assert ids(await reading.rest()) == [f"{reading.run}.2"]
            house.now += 59
            await house.log.upkeep()
            answer = await ask(app, f"/runs/{reading.run}/events")
            assert data(answer.events) == ["1", "2"]


@engines
@both_ways
async def test_somebody_elses_run_is_as_one_that_never_was(house: House, data_only: bool) -> None:
    ann, bob = {"x-caller": "ann"}, {"x-caller": "bob"}
    async with house.open(counting(data_only=data_only)) as app:
        run = (await ask(app, "/count", headers=ann)).headers["run-id"]
        for stranger in (bob, {}):
            for target in ("/count", f"/runs/{run}/events"):
                assert await refused(app, target, headers=resuming(f"{run}.1", **stranger)) == (410, "gone")
                answer = await ask(app, target, headers=resuming(f"{run}.1", **stranger, **EVENTS))
                unknown = await ask(app, target, headers=resuming(NOBODYS[:23] + "1", **stranger, **EVENTS))
                assert (answer.status, answer.headers, answer.body) == (200, unknown.headers, unknown.body)
                assert ids(answer.events)[-1] == "end"
            assert await refused(app, f"/runs/{run}/events", headers=stranger) == (404, "not_found")
            assert await refused(app, f"/runs/{run}", headers=stranger) == (404, "not_found")
            assert await refused(app, f"/runs/{run}", "DELETE", headers=stranger) == (404, "not_found")
            assert (await ask(app, "/runs", headers=stranger)).json == {"runs": []}
        assert ids((await ask(app, "/count", headers=resuming(f"{run}.3", **ann))).events) == [f"{run}.4"]
        assert (await ask(app, f"/runs/{run}", headers=ann)).json["state"] == "completed"


def malformed(run: str) -> dict[str, str]:
    """Ids that are none, by what is wrong with them; in latin-1, as headers are."""
    return {
        "letters": f"{run}.x",
        "hexadecimal": f"{run}.0x1",
        "a minus": f"{run}.-1",
        "a plus": f"{run}.+1",
        "a space": f"{run}. 1",
        "a space behind": f"{run}.1 x",
        "an underscore": f"{run}.1_0",
        "a fraction": f"{run}.1.0",
        "two dots": f"{run}..1",
        "10^30": f"{run}.1" + "0" * 30,
        "2^53": f"{run}.{2**53}",
        "zeros in front": f"{run}.01",
        "an empty sequence": f"{run}.",
        "no sequence": run,
        "no epoch": ".1",
        "a short epoch": f"{run[1:]}.1",
        "a long epoch": f"A{run}.1",
        "NUL": f"{run}.1\0",
        "only NUL": "\0",
        "a line end": f"{run}.1\n",
        "digits of another script": f"{run}.\N{ARABIC-INDIC DIGIT ONE}",
        "a superscript": f"{run}.\N{SUPERSCRIPT TWO}",
        "a star": "*",
        "End": "End",
        "very long": f"{run}.1" + "x" * 10_000,
    }


@engines
@pytest.mark.parametrize("wrong", sorted(malformed("")))
async def test_a_malformed_id_is_a_400_and_never_a_full_replay(house: House, wrong: str) -> None:
    async with house.open(COUNT) as app:
        run = await start(app, "/count")
        id = malformed(run)[wrong]
        header = id.encode().decode("latin-1")
        quoted = "".join(f"%{byte:02X}" for byte in id.encode())
        for target in ("/count", f"/runs/{run}/events"):
            for accept in ({}, BROWSER):
                assert await refused(app, target, headers=resuming(header, **accept)) == (400, "bad_request")
                answer = await ask(app, f"{target}?last_event_id={quoted}", headers=accept)
                assert answer.problem == (400, "bad_request")
                assert answer.json["field"] == "last_event_id"
        assert len((await ask(app, "/runs")).json["runs"]) == 1, "and starts nothing"


@engines
async def test_an_id_of_another_route_or_other_parameters_is_a_conflict(house: House) -> None:
    routes = [COUNT, GET("/other", count, run=Run()), POST("/count", count, run=Run())]
    async with house.open(*routes, GET("/items/{item}", named_item, run=Run())) as app:
        run = await start(app, "/count?a=1&b=2")
        for target, method in (
            ("/other?a=1&b=2", "GET"),
            ("/count?a=1&b=3", "GET"),
            ("/count?a=1", "GET"),
            ("/count?a=1&b=2&c=", "GET"),
            ("/count?a=1&b=2", "POST"),
        ):
            for seq in (1, 4, 99):
                assert await refused(app, target, method, headers=resuming(f"{run}.{seq}")) == (409, "conflict")
        for target in ("/count?a=1&b=2", "/count?b=2&a=1", f"/count?a=1&b=2&key={KEY}"):
            assert ids((await ask(app, target, headers=resuming(f"{run}.3"))).events) == [f"{run}.4"]

        item = await start(app, "/items/1")
        assert await refused(app, "/items/2", headers=resuming(f"{item}.1")) == (409, "conflict")
        assert (await ask(app, "/items/1", headers=resuming(f"{item}.1"))).status == 204
        assert len((await ask(app, "/runs")).json["runs"]) == 2


async def named_item(request: Request, item: str) -> AsyncIterator[Event]:
    yield Event(item)


@engines
async def test_a_view_with_an_id_of_another_run_is_a_conflict(house: House) -> None:
    async with house.open(COUNT) as app:
        one, other = [await start(app, "/count") for _ in range(2)]
        assert await refused(app, f"/runs/{one}/events", headers=resuming(f"{other}.1")) == (409, "conflict")


async def test_an_id_of_a_topic_is_none_of_a_run(house: House) -> None:
    async with house.open(COUNT, *TOPIC) as app:
        async with listening(app, "/topic") as reading:
            init = await reading.event()
        assert init.id
        assert await refused(app, "/count", headers=resuming(init.id)) == (410, "gone")


async def publish(request: Request) -> Response:
    return JSON({"id": str(await request.topics.publish("news", Event("x")))})


async def subscribe(request: Request) -> Subscription:
    return Subscription("news", Event("", "init"))


TOPIC: Final = [GET("/topic", subscribe), POST("/topic", publish)]


# Keys


def posting(key: str, **headers: str) -> dict[str, str]:
    return {"idempotency-key": key, "content-type": "application/json", **headers}


@pytest.mark.parametrize("finished", [False, True], ids=["running", "finished"])
async def test_the_same_key_is_the_same_run(house: House, work: Work, finished: bool) -> None:
    async with house.open(POST("/work", work.handler, body=list[int], run=Run())) as app:
        work.say(*said(1, 2))
        async with listening(app, "/work", "POST", headers=posting(KEY), body=b"[1]") as reading:
            events = [await reading.event(), await reading.event()]
            if finished:
                work.say(None)
                await reading.rest()
            for headers in (posting(KEY), posting(f'"{KEY}"'), posting(f" {KEY} ")):
                async with listening(app, "/work", "POST", headers=headers, body=b"[1]") as again:
                    assert again.run == reading.run
                    assert [await again.event(), await again.event()] == events, "from its start"
            answer = await ask(app, "/work", "POST", headers=posting(KEY, **ASYNC), body=b"[1]")
            assert (answer.status, answer.json["run"]) == (202, reading.run)
            if not finished:
                work.say(None)
                assert await reading.rest() == []
        assert work.started == 1


@engines
async def test_on_a_get_the_key_may_stand_in_the_query(house: House) -> None:
    async with house.open(COUNT) as app:
        run = (await ask(app, f"/count?key={KEY}&a=1")).headers["run-id"]
        again = await ask(app, f"/count?a=1&key={KEY}")
        assert again.headers["run-id"] == run and ids(again.events) == numbered(run, 1, 4)
        assert (await ask(app, "/count?a=1", headers={"idempotency-key": KEY})).headers["run-id"] == run
        other = await ask(app, f"/count?a=1&key={KEY}", headers={"idempotency-key": f"{KEY}B"})
        assert other.headers["run-id"] != run, "the header wins"


@engines
async def test_on_a_post_the_key_in_the_query_is_none(house: House) -> None:
    async with house.open(POST("/count", count, run=Run())) as app:
        one, other = [await ask(app, f"/count?key={KEY}", "POST") for _ in range(2)]
        assert one.headers["run-id"] != other.headers["run-id"]
        assert (await ask(app, "/count?key=short", "POST")).status == 200


@engines
async def test_the_same_key_with_another_request_is_refused(house: House) -> None:
    async with house.open(POST("/count", count, body=list[int], run=Run()), GET("/count", count, run=Run())) as app:
        run = await start(app, "/count?a=1", "POST", headers=posting(KEY), body=b"[1]")
        differing: list[tuple[str, bytes, dict[str, str]]] = [
            ("/count?a=2", b"[1]", {}),
            ("/count", b"[1]", {}),
            ("/count?a=1&b=", b"[1]", {}),
            ("/count?a=1", b"[2]", {}),
            ("/count?a=1", b"[ 1]", {}),
            ("/count?a=1", b"[1]", {"content-type": "application/json; charset=utf-16"}),
        ]
        for target, body, headers in differing:
            answer = await ask(app, target, "POST", headers=posting(KEY, **headers), body=body)
            assert answer.problem == (422, "unprocessable_content")
            answer = await ask(app, target, "POST", headers=posting(KEY, **headers, **ASYNC), body=body)
            assert answer.problem == (422, "unprocessable_content")
        assert await start(app, "/count?a=1", "POST", headers=posting(KEY), body=b"[1]") == run

        await start(app, f"/count?a=1&key={KEY}")
        assert await refused(app, f"/count?a=2&key={KEY}") == (422, "unprocessable_content")


@engines
async def test_a_key_is_of_its_caller_method_and_path(house: House) -> None:
    ann, bob = {"x-caller": "ann"}, {"x-caller": "bob"}
    routes = [COUNT, POST("/count", count, run=Run()), GET("/items/{item}", named_item, run=Run())]
    async with house.open(*routes) as app:
        runs = [
            await start(app, target, method, headers={"idempotency-key": KEY, **caller})
            for caller in (ann, bob, {})
            for target, method in (("/count", "GET"), ("/count", "POST"), ("/items/1", "GET"), ("/items/2", "GET"))
        ]
        assert len(set(runs)) == 12


@engines
async def test_without_credentials_a_key_has_128_bits(house: House) -> None:
    async with house.open(COUNT) as app:
        for key in ("a", KEY[1:], f'"{KEY[1:]}"'):
            answer = await ask(app, "/count", headers={"idempotency-key": key})
            assert answer.problem == (400, "bad_request") and answer.json["field"] == "key"
        assert await refused(app, f"/count?key={KEY[1:]}") == (400, "bad_request")
        assert (await ask(app, "/runs")).json == {"runs": []}
        headers = {"idempotency-key": "1", "x-caller": "ann"}
        assert await start(app, "/count", headers=headers) == await start(app, "/count", headers=headers)


@engines
async def test_a_key_has_an_upper_limit(house: House) -> None:
    async with house.open(COUNT) as app:
        for caller in ({}, {"x-caller": "ann"}):
            assert (await ask(app, "/count", headers={"idempotency-key": "k" * 255, **caller})).status == 200
            assert await refused(app, "/count", headers={"idempotency-key": "k" * 256, **caller}) == (
                400,
                "bad_request",
            )


@engines
async def test_an_empty_key_is_none(house: House) -> None:
    async with house.open(COUNT) as app:
        runs = {
            (await ask(app, "/count?key=", headers={"idempotency-key": key})).headers["run-id"]
            for key in ("", '""', " ")
        }
        assert len(runs) == 3


@engines
async def test_with_a_key_and_an_id_the_id_counts(house: House) -> None:
    """As a page does it: `?key=` stands in its address, and the browser adds the id."""
    async with house.open(COUNT) as app:
        run = (await ask(app, f"/count?key={KEY}")).headers["run-id"]
        answer = await ask(app, f"/count?key={KEY}", headers=resuming(f"{run}.3"))
        assert ids(answer.events) == [f"{run}.4"]
        assert (await ask(app, f"/count?key={KEY}", headers=resuming(f"{run}.4"))).status == 204


async def test_of_many_at_the_same_moment_one_starts_the_run(house: House, work: Work) -> None:
    answers: list[Answer] = []
    async with house.open(GET("/work", work.handler, run=Run())) as app:

        async def start() -> None:
            answers.append(await ask(app, f"/work?key={KEY}"))

        work.say(*said(1, 2), None)
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(start)
        assert work.started == 1
        (run,) = {answer.headers["run-id"] for answer in answers}
        for answer in answers:
            assert ids(answer.events) == numbered(run, 1, 2)
        assert len((await ask(app, "/runs")).json["runs"]) == 1


async def test_of_many_at_the_same_moment_all_get_the_problem_and_the_key_is_free_again(
    house: House, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Answer] = []
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        found, created = spy(house.log, "find", monkeypatch), spy(house.log, "create", monkeypatch)

        async def start(headers: dict[str, str]) -> None:
            answers.append(await ask(app, f"/work?key={KEY}", headers=headers))

        async with anyio.create_task_group() as tasks:
            for headers in ({}, ASYNC) * 5:
                tasks.start_soon(start, headers)
            await turns(lambda: work.started == 1)
            await turns(lambda: len(created) + sum(call.result is not None for call in found) == 10)
            work.say(UpstreamError("the model is away", code="away"))
        assert [answer.problem for answer in answers] == [(502, "away")] * 10
        assert work.started == 1
        assert (await ask(app, "/runs")).json == {"runs": []}

        work.say(Event("1"), None)
        answer = await ask(app, f"/work?key={KEY}")
        assert answer.status == 200 and data(answer.events) == ["1"]


@engines
async def test_the_key_of_a_run_that_was_deleted_is_free_again(house: House) -> None:
    async with house.open(COUNT) as app:
        run = (await ask(app, f"/count?key={KEY}")).headers["run-id"]
        assert (await ask(app, f"/runs/{run}", "DELETE")).status == 204
        assert (await ask(app, f"/count?key={KEY}")).headers["run-id"] != run


# The state


async def test_the_state_of_a_run(house: House, work: Work) -> None:
    async with house.open(GET("/items/{item}", named_item, run=Run()), GET("/work", work.handler, run=Run())) as app:
        work.say(*said(1, 2))
        async with listening(app, "/work?x=1") as reading:
            await reading.event()
            await reading.event()
            answer = await ask(app, f"/runs/{reading.run}")
            now = datetime.fromtimestamp(START, UTC).isoformat().replace("+00:00", "Z")
            assert answer.status == 200 and answer.headers["content-type"] == "application/json"
            assert answer.json == {
                "run": reading.run,
                "route": "GET /work",
                "about": "",
                "state": "running",
                "created": now,
                "updated": now,
                "events": 2,
                "last_event_id": f"{reading.run}.2",
            }
            house.now += 1.5
            work.say(None)
            await reading.rest()
            after = (await ask(app, f"/runs/{reading.run}")).json
            assert (after["state"], after["events"], after["last_event_id"]) == ("completed", 2, f"{reading.run}.2")
            assert after["created"] == now and datetime.fromisoformat(after["updated"]).timestamp() == START + 1.5

        run = await start(app, "/items/7")
        assert (await ask(app, f"/runs/{run}")).json["route"] == "GET /items/{item}"


@engines
async def test_the_state_of_a_run_without_events_names_its_beginning(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(None)
        run = await start(app, "/work")
        state = (await ask(app, f"/runs/{run}")).json
        assert (state["state"], state["events"], state["last_event_id"]) == ("completed", 0, f"{run}.0")
        assert (await ask(app, f"/runs/{run}/events", headers=resuming(f"{run}.0"))).status == 204


async def test_a_run_that_failed_says_so(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"), UpstreamError("the model is away", code="away"))
        answer = await ask(app, "/work")
        run = answer.headers["run-id"]
        assert plainly(answer.events) == [(None, "1"), ("error", {"error": "the model is away", "code": "away"})]
        assert ids(answer.events) == numbered(run, 1, 2)
        assert await state_of(app, run) == "failed"
        assert work.reasons == ["failed"]


async def test_a_failure_that_is_not_ours_keeps_its_text_to_itself(
    house: House, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"), ValueError("a secret"))
        event = (await ask(app, "/work")).events[-1]
        error = msgspec.json.decode(event.data)
        assert event.event == "error" and error["code"] == "internal_error"
        reference = error["error"].partition("(reference ")[2].rstrip(")")
        (record,) = [record for record in caplog.records if reference in record.getMessage()]
        assert record.exc_info and "a secret" in str(record.exc_info[1])


@both_ways
async def test_what_the_engine_says_last_is_said_in_the_routes_way(house: House, work: Work, data_only: bool) -> None:
    async with house.open(GET("/work", work.handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED)) as app:
        work.say(Event("1"), UpstreamError("no", code="away"))
        answer = await ask(app, "/work")
        run = answer.headers["run-id"]
        expected = engine_event("error", {"error": "no", "code": "away"}, data_only)
        assert plainly(answer.events) == [(None, "1"), *expected]
        assert ids(answer.events) == numbered(run, 1, 1 + len(expected))
        assert (await ask(app, f"/runs/{run}/events")).body == answer.body, "and in the view the same"


# The list


@engines
async def test_the_list_has_the_callers_runs_newest_first(house: House) -> None:
    ann, bob = {"x-caller": "ann"}, {"x-caller": "bob"}
    async with house.open(COUNT) as app:
        runs: dict[str, list[str]] = {"ann": [], "bob": []}
        for caller in (ann, bob, ann, ann, bob):
            runs[caller["x-caller"]].append((await ask(app, "/count", headers=caller)).headers["run-id"])
        for caller in (ann, bob):
            answer = await ask(app, "/runs", headers=caller)
            assert answer.status == 200
            listed = answer.json["runs"]
            assert [run["run"] for run in listed] == runs[caller["x-caller"]][::-1]
            assert listed[0] == (await ask(app, f"/runs/{listed[0]['run']}", headers=caller)).json
        assert (await ask(app, "/runs")).json == {"runs": []}


@engines
async def test_a_private_service_lists_its_runs(house: House) -> None:
    async with house.open(COUNT) as app:
        runs = [await start(app, "/count") for _ in range(3)]
        assert [run["run"] for run in (await ask(app, "/runs")).json["runs"]] == runs[::-1]


@engines
async def test_where_nobody_is_asked_who_he_is_there_is_no_list(house: House) -> None:
    async with house.open(COUNT, auth="off") as app:
        run = await start(app, "/count")
        assert await refused(app, "/runs") == (403, "forbidden")
        assert await state_of(app, run) == "completed", "whoever knows its id may ask"


# Cancelling


@both_ways
async def test_a_running_run_is_cancelled_and_says_so_last(house: House, work: Work, data_only: bool) -> None:
    async with house.open(GET("/work", work.handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            answer = await ask(app, f"/runs/{reading.run}", "DELETE")
            assert (answer.status, answer.body) == (202, b"")
            events = await reading.rest()
            expected = engine_event("cancelled", {"reason": "asked"}, data_only)
            assert plainly(events) == expected
            assert ids(events) == numbered(reading.run, 2, 1 + len(expected))
        assert work.reasons == ["cancelled"]
        assert await state_of(app, reading.run) == "cancelled"
        answer = await ask(app, f"/runs/{reading.run}/events", headers=resuming(f"{reading.run}.1"))
        assert plainly(answer.events) == expected, "it is in the log"


async def test_a_run_may_be_cancelled_twice(house: House) -> None:
    closing, closed = anyio.Event(), anyio.Event()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("1")
            await anyio.sleep_forever()
        finally:
            with CancelScope(shield=True):
                closing.set()
                await closed.wait()

    async with house.open(GET("/work", handler, run=Run())) as app, listening(app, "/work") as reading:
        await reading.event()
        assert (await ask(app, f"/runs/{reading.run}", "DELETE")).status == 202
        await closing.wait()
        assert (await ask(app, f"/runs/{reading.run}", "DELETE")).status == 202
        assert await state_of(app, reading.run) == "running", "until it has closed"
        closed.set()
        assert plainly(await reading.rest()) == [("cancelled", {"reason": "asked"})]


@engines
async def test_a_finished_run_is_deleted_with_its_events(house: House) -> None:
    async with house.open(COUNT) as app:
        answer = await ask(app, "/count")
        run = answer.headers["run-id"]
        answer = await ask(app, f"/runs/{run}", "DELETE")
        assert (answer.status, answer.body) == (204, b"")
        assert await refused(app, f"/runs/{run}") == (404, "not_found")
        assert await refused(app, f"/runs/{run}/events") == (404, "not_found")
        assert await refused(app, f"/runs/{run}", "DELETE") == (404, "not_found")
        assert (await ask(app, "/runs")).json == {"runs": []}
        for target in ("/count", f"/runs/{run}/events"):
            for seq in (1, 4):
                assert await refused(app, target, headers=resuming(f"{run}.{seq}")) == (410, "gone")


async def test_a_cancelled_run_is_deleted_by_asking_again(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            assert (await ask(app, f"/runs/{reading.run}", "DELETE")).status == 202
            await reading.rest()
        assert (await ask(app, f"/runs/{reading.run}", "DELETE")).status == 204
        assert await refused(app, f"/runs/{reading.run}") == (404, "not_found")


async def test_an_unknown_run_is_not_found(house: House) -> None:
    async with house.open(*TOPIC) as app:
        async with listening(app, "/topic") as reading:  # a topic is no run either
            await reading.event()
            for id in (NOBODYS[:22], "x", "topic:news", "topic%3Anews", "%00", "..."):
                for method, target in (
                    ("GET", f"/runs/{id}"),
                    ("DELETE", f"/runs/{id}"),
                    ("GET", f"/runs/{id}/events"),
                ):
                    assert await refused(app, target, method) == (404, "not_found")


@engines
async def test_a_view_never_starts_a_run(house: House, work: Work) -> None:
    async def progress(request: Request, id: str) -> Any:
        return await request.runs.view(request, id)

    async with house.open(GET("/work", work.handler, run=Run()), GET("/work/{id}", progress)) as app:
        id = NOBODYS[:22]
        for target in (f"/runs/{id}/events", f"/work/{id}"):
            for headers in ({}, BROWSER, {"idempotency-key": KEY}, ASYNC):
                assert await refused(app, target, headers=headers) == (404, "not_found")
            assert await refused(app, f"{target}?key={KEY}") == (404, "not_found")
            assert (await ask(app, target, headers=resuming(NOBODYS, **BROWSER))).status == 200
            assert (await ask(app, target, headers=resuming("end"))).status == 204
        assert work.started == 0 and (await ask(app, "/runs")).json == {"runs": []}

        work.say(Event("1"), None)
        run = await start(app, "/work")
        answer = await ask(app, f"/work/{run}", headers={"idempotency-key": KEY, **ASYNC})
        assert (answer.status, ids(answer.events), answer.headers["run-id"]) == (200, [f"{run}.1"], run)
        assert (await ask(app, f"/work/{run}", headers=resuming(f"{run}.1"))).status == 204
        assert work.started == 1


# Cursors


@engines
async def test_the_cursor_before_the_first_event_gets_all_of_it(house: House) -> None:
    async with house.open(COUNT) as app:
        run = await start(app, "/count")
        for target in ("/count", f"/runs/{run}/events"):
            answer = await ask(app, target, headers=resuming(f"{run}.0"))
            assert ids(answer.events) == numbered(run, 1, 4)


@both_ways
async def test_a_number_above_the_top_of_a_running_run_is_announced_and_the_rest_follows(
    house: House, work: Work, data_only: bool
) -> None:
    async with house.open(GET("/work", work.handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED)) as app:
        work.say(*said(1, 2))
        async with listening(app, "/work") as reading:
            await reading.event()
            await reading.event()
            async with listening(app, "/work", headers=resuming(f"{reading.run}.5")) as ahead:
                gap = await ahead.event()
                content = {"reason": "diverged", "from": 3, "to": 5}
                expected = (None, {"type": "gap", **content}) if data_only else ("gap", content)
                assert plainly([gap]) == [expected] and gap.id is None
                work.say(Event("3"), None)
                assert ids(await ahead.rest()) == [f"{reading.run}.3"]


@engines
@both_ways
async def test_a_number_above_the_top_of_a_finished_run_is_announced_and_that_is_the_end(
    house: House, data_only: bool
) -> None:
    async with house.open(counting(data_only=data_only)) as app:
        run = await start(app, "/count")
        for target in ("/count", f"/runs/{run}/events"):
            for seq in (5, 2**53 - 1):
                answer = await ask(app, target, headers=resuming(f"{run}.{seq}"))
                gap = {"reason": "diverged", "from": 5, "to": seq}
                expected = [(None, {"type": "gap", **gap}), (None, "[DONE]")] if data_only else [("gap", gap)]
                assert plainly(answer.events) == expected
                assert ids(answer.events)[-1] == "end"
        assert (await ask(app, "/count", headers=resuming("end"))).status == 204


@on_sqlite
async def test_after_an_older_copy_was_put_back_a_reader_is_told_where_they_part(
    house: House, work: Work, tmp_path: Path
) -> None:
    route = GET("/work", work.handler, run=Run())
    work.say(*said(1, 2))
    async with house.open(route) as app:
        async with listening(app, "/work") as reading:
            run = reading.run
            await reading.event()
            await reading.event()
            with closing(sqlite3.connect(house.path)) as file, closing(sqlite3.connect(tmp_path / "copy")) as copy:
                file.backup(copy)
            work.say(*said(3, 4))
            await reading.event()
            assert (await reading.event()).id == f"{run}.4"
    house.put_back(tmp_path / "copy")

    async with house.open(route) as app:
        for seen, gap in ((4, True), (3, True), (2, False), (1, False)):
            answer = await ask(app, "/work", headers=resuming(f"{run}.{seen}"))
            events = plainly(answer.events)
            assert events.pop() == ("error", {"error": "the service was stopped", "code": "interrupted"})
            if gap:
                assert events == [("gap", {"reason": "diverged", "from": 3, "to": seen})]
                assert answer.events[0].id is None
            else:
                assert events == [(None, "2")] * (2 - seen)
            last = answer.events[-1].id
            assert last and last.endswith(".3") and not last.startswith(run), "of another epoch"
            assert (await ask(app, "/work", headers=resuming(last))).status == 204
        assert await state_of(app, run) == "interrupted"
        heard = await listen_like_a_browser(app, "/work", last_event_id=f"{run}.4")
        assert [event.event for event in heard.events] == ["gap", "error"] and heard.statuses == [200, 204]
    assert work.started == 1


# As a browser does it: it comes back until it is told not to


@engines
@pytest.mark.parametrize("cuts", [(), (0, 40, 41, 90), tuple(range(1, 18)), (200,)])
@both_ways
async def test_a_browser_gets_each_event_of_a_run_once_and_stops(
    house: House, data_only: bool, cuts: Sequence[int]
) -> None:
    async with house.open(counting(data_only=data_only)) as app:
        heard = await listen_like_a_browser(app, f"/count?key={KEY}", cuts=cuts)
        run = heard.last_event_id[:22]
        assert ids(heard.events) == numbered(run, 1, 4)
        assert heard.data == [*COUNTED[:3], "[DONE]" if data_only else ""]
        assert set(heard.statuses[:-1]) == {200} and heard.statuses[-1] == 204
        assert len((await ask(app, "/runs")).json["runs"]) == 1


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (UpstreamError("no"), "error"),
        (None, None),
        ("cancel", "cancelled"),
    ],
    ids=["failing", "finishing", "cancelled"],
)
@both_ways
async def test_a_browser_that_reads_along_stops_at_the_end(
    house: House, work: Work, data_only: bool, end: Any, name: str | None
) -> None:
    async with house.open(GET("/work", work.handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED)) as app:
        work.say(*said(1, 2))
        async with listening(app, f"/work?key={KEY}") as reading:
            await reading.event()
            await reading.event()

            async def finish() -> None:
                if end == "cancel":
                    await ask(app, f"/runs/{reading.run}", "DELETE")
                else:
                    work.say(Event("3"), end)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(finish)
                heard = await listen_like_a_browser(app, f"/work?key={KEY}", cuts=[60, 1])
        stored = (await ask(app, f"/runs/{reading.run}/events")).events
        assert plainly(heard.events) == plainly(stored) and ids(heard.events) == ids(stored)
        assert heard.statuses[-1] == 204
        if name is not None:
            last = stored[-2 if data_only else -1]
            assert (last.event == name) if not data_only else plainly([last])[0][1]["type"] == name
        assert work.started == 1


@engines
@both_ways
@pytest.mark.parametrize("place", ["route", "view"])
async def test_a_browser_whose_run_is_gone_stops(house: House, place: str, data_only: bool) -> None:
    async with house.open(counting(data_only=data_only)) as app:
        run = (await ask(app, "/count")).headers["run-id"]
        await ask(app, f"/runs/{run}", "DELETE")
        target = "/count" if place == "route" else f"/runs/{run}/events"
        heard = await listen_like_a_browser(app, target, last_event_id=f"{run}.2")
        assert heard.statuses == [200, 204] and heard.last_event_id == "end"
        assert len(heard.events) == (2 if data_only and place == "route" else 1)
        assert (await ask(app, "/runs")).json == {"runs": []}, "nothing was started"


@engines
@both_ways
async def test_a_browser_that_is_ahead_of_a_finished_run_stops(house: House, data_only: bool) -> None:
    async with house.open(counting(data_only=data_only)) as app:
        run = await start(app, "/count")
        heard = await listen_like_a_browser(app, "/count", last_event_id=f"{run}.9")
        assert heard.statuses == [200, 204] and heard.last_event_id == "end"
        assert "diverged" in heard.data[0]


async def test_a_browser_is_cut_before_the_run_has_ended_and_finds_it_deleted(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"), None)
        run = (await ask(app, "/work")).headers["run-id"]
        await ask(app, f"/runs/{run}", "DELETE")
        heard = await listen_like_a_browser(app, "/work", last_event_id=f"{run}.0")
        assert plainly(heard.events) == [("gap", {"reason": "expired", "from": 1, "to": None})]
        assert heard.statuses == [200, 204]
        assert work.started == 1


@pytest.mark.parametrize("last_event_id", ["", NOBODYS])
async def test_a_topic_has_no_end_for_a_browser(house: House, last_event_id: str) -> None:
    async with house.open(*TOPIC) as app:
        async with anyio.create_task_group() as tasks:
            published = [(await ask(app, "/topic", "POST")).json["id"] for _ in range(3)]
            headers = BROWSER | ({"last-event-id": last_event_id} if last_event_id else {})
            seen: list[str | None] = []
            for turn in range(5):  # it is cut each time
                async with listening(app, "/topic", headers=headers) as reading:
                    assert reading.exchange.status == 200
                    if turn == 0:
                        first = await reading.event()
                        assert first.event == ("gap" if last_event_id else "init")
                        if last_event_id:  # it goes on with all there is
                            assert first.id is None and "expired" in first.data
                            seen += [(await reading.event()).id for _ in published]
                            assert seen == published
                    published.append((await ask(app, "/topic", "POST")).json["id"])
                    seen.append((await reading.event()).id)
                    assert not reading.exchange.ended.is_set()
                    headers = BROWSER | {"last-event-id": reading.last_event_id}
            assert seen == published[-len(seen) :]
            tasks.cancel_scope.cancel()


# The first second


@virtual
async def test_a_run_whose_first_event_is_late_opens_with_a_cursor(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        began = current_time()
        async with listening(app, "/work") as reading:
            assert current_time() - began == pytest.approx(FIRST_ITEM_S)
            assert await reading.chunk() == RETRY + b"id: %b.0\n\n" % reading.run.encode()
            assert reading.last_event_id == f"{reading.run}.0"
            run = reading.run
        # It was cut before the first event. It comes back, twice, and finds its run.
        async with listening(app, "/work", headers=resuming(f"{run}.0", **BROWSER)) as reading:
            assert await reading.chunk() == RETRY + b"id: %b.0\n\n" % run.encode()
        async with listening(app, "/work", headers=resuming(f"{run}.0", **BROWSER)) as reading:
            work.say(*said(1), None)
            assert ids(await reading.rest()) == [f"{run}.1"]
        assert work.started == 1


@virtual
async def test_a_browser_that_is_cut_again_and_again_before_a_late_first_event_starts_one_run(
    house: House, work: Work
) -> None:
    """10 s to the first event, behind a proxy that gives up after 2 s."""
    async with house.open(GET("/work", work.handler, run=Run())) as app, anyio.create_task_group() as tasks:

        async def speak() -> None:
            await anyio.sleep(10)
            work.say(*said(1, 2), None)

        tasks.start_soon(speak)
        headers, seen = dict(BROWSER), []
        for _ in range(20):
            with anyio.move_on_after(2):
                async with listening(app, "/work", headers=headers) as reading:
                    if reading.exchange.status == 204:
                        break
                    with anyio.CancelScope():
                        while await reading.chunk() is not None:
                            pass
            headers["last-event-id"] = reading.last_event_id
            seen += Decoder().feed(reading.raw)
        assert reading.exchange.status == 204
        assert data(seen) == ["1", "2"] and work.started == 1


@once
async def test_a_view_of_a_run_that_fails_in_its_first_second_gets_the_problem_too(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app, anyio.create_task_group() as tasks:
        tasks.start_soon(refused, app, "/work")
        await anyio.sleep(0.5)
        (run,) = (await ask(app, "/runs")).json["runs"]

        async def fail() -> None:
            await anyio.sleep(0.1)
            work.say(UpstreamError("the model is away", code="away"))

        tasks.start_soon(fail)
        assert await refused(app, f"/runs/{run['run']}/events") == (502, "away")
        assert await refused(app, f"/runs/{run['run']}/events") == (404, "not_found")


@virtual
async def test_a_view_that_comes_in_the_first_second_is_answered_with_the_first_event(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app, anyio.create_task_group() as tasks:
        tasks.start_soon(ask, app, "/work")
        await anyio.sleep(0.25)
        (run,) = (await ask(app, "/runs")).json["runs"]

        async def speak() -> None:
            await anyio.sleep(0.25)
            work.say(Event("1"), None)

        began = current_time()
        tasks.start_soon(speak)
        async with listening(app, f"/runs/{run['run']}/events") as reading:
            assert current_time() - began == pytest.approx(0.25)
            assert data(await reading.rest()) == ["1"]


@virtual
async def test_an_event_within_the_first_second_goes_at_once(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        began = current_time()
        async with anyio.create_task_group() as tasks:

            async def speak() -> None:
                await anyio.sleep(0.25)
                work.say(Event("1"))

            tasks.start_soon(speak)
            async with listening(app, "/work") as reading:
                assert current_time() - began == pytest.approx(0.25)
                assert await reading.chunk() == RETRY + b"data: 1\nid: %b.1\n\n" % reading.run.encode()


@pytest.mark.parametrize("headers", [{}, ASYNC, BROWSER], ids=["plain", "respond-async", "browser"])
async def test_a_run_that_fails_at_once_is_none(house: House, work: Work, headers: dict[str, str]) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(UpstreamError("the model is away", code="away"))
        answer = await ask(app, f"/work?key={KEY}", headers=headers)
        assert answer.problem == (502, "away") and answer.json["detail"] == "the model is away"
        assert "run-id" not in answer.headers and "location" not in answer.headers
        assert "preference-applied" not in answer.headers
        assert (await ask(app, "/runs")).json == {"runs": []}
        assert work.reasons == ["failed"]

        work.say(Event("1"), None)
        answer = await ask(app, f"/work?key={KEY}")
        assert answer.status == 200 and data(answer.events) == ["1"], "the key is free"


@once
@pytest.mark.parametrize("headers", [{}, ASYNC], ids=["plain", "respond-async"])
async def test_a_run_that_fails_just_before_the_second_is_over_is_none(
    house: House, work: Work, headers: dict[str, str]
) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app, anyio.create_task_group() as tasks:

        async def fail() -> None:
            await anyio.sleep(FIRST_ITEM_S - 0.001)
            work.say(NotFound("no such thing"))

        tasks.start_soon(fail)
        assert await refused(app, "/work", headers=headers) == (404, "not_found")
        assert (await ask(app, "/runs")).json == {"runs": []}


@virtual
@pytest.mark.parametrize("headers", [{}, ASYNC], ids=["plain", "respond-async"])
@both_ways
async def test_a_run_that_fails_after_its_first_second_has_a_stored_error(
    house: House, work: Work, headers: dict[str, str], data_only: bool
) -> None:
    route = GET("/work", work.handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED)
    async with house.open(route) as app, anyio.create_task_group() as tasks:

        async def fail() -> None:
            await anyio.sleep(FIRST_ITEM_S + 0.001)
            work.say(NotFound("no such thing"))

        tasks.start_soon(fail)
        answer = await ask(app, f"/work?key={KEY}", headers=headers)
        assert answer.status == (202 if headers else 200)
        run = answer.headers["run-id"]
        await anyio.sleep(1)
        assert await state_of(app, run) == "failed"
        stored = await ask(app, f"/runs/{run}/events")
        expected = engine_event("error", {"error": "no such thing", "code": "not_found"}, data_only)
        assert plainly(stored.events) == expected
        assert ids(stored.events) == numbered(run, 1, len(expected))
        if not headers:
            assert answer.body == RETRY + b"id: %b.0\n\n" % run.encode() + stored.body.removeprefix(RETRY)
        heard = await listen_like_a_browser(app, f"/work?key={KEY}")
        assert plainly(heard.events) == expected and heard.statuses == [200, 204]
        assert work.started == 1


@virtual
async def test_a_failure_after_an_event_is_an_event_within_the_first_second_too(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"), NotFound("no such thing"))
        answer = await ask(app, "/work")
        assert answer.status == 200 and [event.event for event in answer.events] == [None, "error"]
        assert await state_of(app, answer.headers["run-id"]) == "failed"


@virtual
async def test_who_comes_with_the_key_while_it_is_deleted_gets_a_run_of_its_own(
    house: House, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It found the run just before that failed: there is nothing left to read."""
    async with house.open(GET("/work", work.handler, run=Run())) as app, anyio.create_task_group() as tasks:
        find = house.log.find

        async def slow_find(**by: Any) -> Stat | None:
            stat = await find(**by)
            if stat is not None:
                await anyio.sleep(0.5)
            return stat

        monkeypatch.setattr(house.log, "find", slow_find)
        answers: list[Answer] = []

        async def come(after_s: float) -> None:
            await anyio.sleep(after_s)
            answers.append(await ask(app, f"/work?key={KEY}"))

        tasks.start_soon(come, 0)
        tasks.start_soon(come, 0.1)
        await anyio.sleep(0.2)
        work.say(NotFound("no such thing"), Event("1"), None)
        await anyio.sleep(1)
        assert [answer.status for answer in answers] == [404, 200]
        assert data(answers[1].events) == ["1"]
        assert work.started == 2


@once
async def test_a_request_that_is_given_up_while_its_run_is_created_leaves_a_run_that_works(
    house: House, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        create = house.log.create

        async def slow_create(*args: Any, **options: Any) -> tuple[Stat, bool]:
            result = await create(*args, **options)
            await anyio.sleep(0.2)
            return result

        monkeypatch.setattr(house.log, "create", slow_create)
        with anyio.move_on_after(0.1):  # as a host does whose own limit of time is over
            await ask(app, f"/work?key={KEY}")
        work.say(Event("1"), None)
        async with listening(app, f"/work?key={KEY}") as reading:
            with anyio.fail_after(10):
                assert data(await reading.rest()) == ["1"]
        assert work.started == 1


@once
async def test_a_run_without_any_event_is_completed(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(None)
        heard = await listen_like_a_browser(app, "/work")
        assert heard.events == [] and heard.statuses == [200, 204]
        run = heard.last_event_id[:22]
        assert await state_of(app, run) == "completed"


# The end


@virtual
@pytest.mark.parametrize("failing", [False, True], ids=["finished", "failed"])
@both_ways
async def test_the_last_event_and_the_close_are_one_append(
    house: House, monkeypatch: pytest.MonkeyPatch, data_only: bool, failing: bool
) -> None:
    go_on = anyio.Event()

    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("1")
        await go_on.wait()
        yield Event("2")
        if failing:
            raise NotFound("no")

    async with house.open(GET("/work", handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED)) as app:
        appends = spy(house.log, "append", monkeypatch)
        async with listening(app, "/work") as reading:
            await reading.event()
            go_on.set()
            last = await reading.rest()
        assert [call.options.get("close", False) for call in appends] == [False, True]
        assert appends[-1].args[1][0] == b"data: 2\n\n"
        assert len(appends[-1].args[1]) == len(last)
        state = "failed" if failing else "completed"
        assert appends[-1].options["meta"]["state"] == state == await state_of(app, reading.run)


@virtual
async def test_the_cancelled_event_and_the_close_are_one_append(
    house: House, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        appends = spy(house.log, "append", monkeypatch)
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            await ask(app, f"/runs/{reading.run}", "DELETE")
            await reading.rest()
        assert [call.options.get("close", False) for call in appends] == [False, True]
        (frame,) = appends[-1].args[1]
        assert frame == b'event: cancelled\ndata: {"reason":"asked"}\n\n'


@once
@pytest.mark.usefixtures("long_turns")
async def test_events_that_are_ready_together_are_one_append(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(1000):
            yield Event(str(number))

    async with house.open(GET("/work", handler, run=Run())) as app:
        appends = spy(house.log, "append", monkeypatch)
        answer = await ask(app, "/work")
        assert data(answer.events) == [str(number) for number in range(1000)]
        assert len(appends) == 1


@virtual
async def test_a_handler_that_sets_an_id_is_refused_as_a_problem_or_an_error(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1", id="mine"))
        answer = await ask(app, "/work")
        assert answer.problem == (500, "encode_error") and answer.json["field"] == "id"
        assert "id must be left out" in answer.json["detail"]

        work.say(Event("1"), Event("2", id="mine"))
        answer = await ask(app, "/work")
        assert [event.event for event in answer.events] == [None, "error"]
        error = msgspec.json.decode(answer.events[-1].data)
        assert error["code"] == "encode_error" and "id must be left out" in error["error"]
        assert await state_of(app, answer.headers["run-id"]) == "failed"
        assert work.reasons == ["failed", "failed"]


@virtual
async def test_what_is_no_event_fails_the_run(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"))
        work.say("2")  # type: ignore[arg-type]
        answer = await ask(app, "/work")
        assert [event.event for event in answer.events] == [None, "error"]
        assert await state_of(app, answer.headers["run-id"]) == "failed"


@both_ways
@pytest.mark.parametrize("limit", [{"retention_events": 3}, {"retention_bytes": 30}], ids=["events", "bytes"])
async def test_a_run_that_is_too_large_ends(house: House, work: Work, limit: dict[str, int], data_only: bool) -> None:
    async with house.open(
        GET("/work", work.handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED), **limit
    ) as app:
        work.say(Event("1"))  # 9 bytes
        async with listening(app, "/work") as reading:
            for number in (1, 2, 3):
                assert (await reading.event()).data == str(number)
                work.say(Event(str(number + 1)))
            events = await reading.rest()
            text = "the run is larger than the log keeps of one stream"
            expected = engine_event("error", {"error": text, "code": "too_large"}, data_only)
            assert plainly(events) == expected
            assert ids(events) == numbered(reading.run, 4, 3 + len(expected))
        assert await state_of(app, reading.run) == "failed"
        assert work.reasons == ["failed"]
        answer = await ask(app, "/work", headers=resuming(f"{reading.run}.0"))
        assert data(answer.events)[:3] == ["1", "2", "3"], "nothing was trimmed"


@on_sqlite
async def test_a_reader_of_a_run_that_is_being_deleted_hears_that_it_is_gone(house: House, work: Work) -> None:
    """Its rows are gone, and its facts are still known: the moment between a deletion and its news."""
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(*said("x" * 200_000, "y" * 200_000), None)  # more than a tail holds
        run = (await ask(app, "/work")).headers["run-id"]
        with closing(sqlite3.connect(house.path)) as db, db:
            db.execute("DELETE FROM rows")
        for headers in ({}, resuming(f"{run}.1")):
            answer = await ask(app, f"/runs/{run}/events", headers=headers)
            first = 2 if headers else 1
            assert plainly(answer.events) == [("gap", {"reason": "expired", "from": first, "to": None})]


@once
@pytest.mark.parametrize(
    ("limit", "kept"),
    [({"retention_events": 5}, 5), ({"retention_bytes": 50}, 5), ({"retention_bytes": 8}, 0)],
    ids=str,
)
async def test_a_run_over_its_limit_keeps_what_fits_and_ends(
    house: House, work: Work, limit: dict[str, int], kept: int
) -> None:
    """The events come together, so that the limit is passed in the middle of what would go in as one."""

    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(1, 9):
            yield Event(str(number))  # 9 bytes

    async with house.open(GET("/work", handler, run=Run()), **limit) as app:
        answer = await ask(app, "/work")
        assert data(answer.events)[:-1] == [str(number) for number in range(1, kept + 1)]
        assert msgspec.json.decode(answer.events[-1].data)["code"] == "too_large"
        run = answer.headers["run-id"]
        assert ids(answer.events) == numbered(run, 1, kept + 1)
        assert await state_of(app, run) == "failed"


@engines
async def test_a_run_as_large_as_the_log_keeps_is_not_too_large(house: House) -> None:
    async with house.open(COUNT, retention_events=4) as app:
        answer = await ask(app, "/count")
        assert data(answer.events) == COUNTED
        assert await state_of(app, answer.headers["run-id"]) == "completed"


@virtual
@pytest.mark.usefixtures("long_turns")
async def test_a_run_that_never_waits_is_too_large_soon(house: House) -> None:
    reasons: list[EndReason] = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            while True:
                yield Event("x" * 100)
        finally:
            reasons.append(request.end_reason)

    async with house.open(GET("/work", handler, run=Run()), retention_bytes=300_000) as app:
        answer = await ask(app, "/work")
        assert msgspec.json.decode(answer.events[-1].data)["code"] == "too_large"
        assert len(answer.events) > 1000, "what fitted is kept"
        assert reasons == ["failed"]


@virtual
async def test_one_event_that_the_log_does_not_take_ends_the_run(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssecore.log.facts, "MAX_APPEND_BYTES", 1000)
    reasons: list[EndReason] = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            for text in ("1", "2", "3", "x" * 1000):
                yield Event(text)
            await anyio.sleep_forever()
        finally:
            reasons.append(request.end_reason)

    async with house.open(GET("/work", handler, run=Run()), retention_bytes=None) as app:
        async with listening(app, "/work") as reading:
            *before, event = await reading.rest()
            assert data(before) == ["1", "2", "3"]
            assert event.event == "error" and msgspec.json.decode(event.data)["code"] == "too_large"
        assert await state_of(app, reading.run) == "failed"
        assert reasons == ["failed"]


# Readers come and go


@virtual
async def test_a_run_goes_on_when_its_reader_leaves(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
        await anyio.sleep(1000)
        assert work.reasons == []
        work.say(Event("2"), None)
        answer = await ask(app, "/work", headers=resuming(reading.last_event_id))
        assert data(answer.events) == ["2"] and work.reasons == ["finished"]


@virtual
async def test_a_reader_that_does_not_read_holds_up_neither_the_run_nor_the_others(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run()), send_timeout_s=5) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as frozen:
            await frozen.event()
            frozen.exchange.block()
            async with listening(app, "/work", headers=resuming(f"{frozen.run}.1")) as reading:
                for number in range(2, 1000):
                    work.say(Event(str(number)))
                    assert (await reading.event()).data == str(number)
                work.say(None)
                assert await reading.rest() == []
            await frozen.exchange.ended.wait()  # dropped: it is slow
        answer = await ask(app, "/work", headers=resuming(f"{frozen.run}.1"))
        assert len(answer.events) == 998


@virtual
async def test_many_readers_get_the_same(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app, anyio.create_task_group() as tasks:
        answers: list[Answer] = []

        async def read(target: str) -> None:
            answers.append(await ask(app, target))

        run = None
        work.say(Event("0"))
        async with listening(app, "/work") as reading:
            run = reading.run
            for number in range(1, 50):
                tasks.start_soon(read, f"/runs/{run}/events")
                await settle()
                work.say(Event(str(number)))
            work.say(None)
            await reading.rest()
        await settle()
        assert len(answers) == 49
        assert {answer.body for answer in answers} == {reading.raw}


async def test_what_a_run_has_given_is_read_while_it_works_on_and_never_waits(house: House) -> None:
    made = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(60):
            time.sleep(0.005)  # noqa: ASYNC251
            made.append(number)
            yield Event(f"{number}")

    async with house.open(GET("/work", handler, run=Run())) as app, listening(app, "/work") as reading:
        await reading.event()
        assert len(made) < 60
        await reading.rest()


# Nobody reads


LINGERING: Final = Run(linger_s=60)


@virtual
async def test_an_unread_run_is_cancelled_exactly_when_its_linger_time_is_over(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            await anyio.sleep(1000)
            assert work.reasons == [], "somebody reads it"
            left = current_time()
        await anyio.sleep(59.999)
        assert await state_of_log(house, reading.run) == "running" and work.reasons == []
        await anyio.sleep(1)
        assert work.reasons == ["cancelled"]
        assert work.ended_at == [pytest.approx(left + 60, abs=1e-9)]
        heard = await listen_like_a_browser(app, "/work", last_event_id=reading.last_event_id)
        assert plainly(heard.events) == [("cancelled", {"reason": "linger"})] and heard.statuses == [200, 204]
        assert await state_of(app, reading.run) == "cancelled"


async def state_of_log(house: House, run: str) -> Any:
    """As the log has it: asking the app counts as interest."""
    stat = await house.log.stat(run)
    return stat and stat.meta["state"]


@virtual
async def test_a_run_is_not_cancelled_as_unread_because_the_server_stood_still(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
        await anyio.sleep(58)
        stand_still(1000)
        await anyio.sleep(5)  # its readers need a moment to come back
        async with listening(app, "/work", headers=resuming(reading.last_event_id)):
            await anyio.sleep(1000)
            assert work.reasons == []
        await anyio.sleep(30)
        stand_still(1000)
        await anyio.sleep(61)
        assert work.reasons == ["cancelled"]


@virtual
async def test_the_linger_time_may_be_the_settings(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run(linger_s="setting")), linger_s=7) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            left = current_time()
        await anyio.sleep(100)
        assert work.ended_at == [pytest.approx(left + 7, abs=1e-9)]


@virtual
@both_ways
async def test_the_last_of_several_readers_counts(house: House, work: Work, data_only: bool) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING, dialect=DATA_ONLY if data_only else NAMED)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as one:
            await one.event()
            async with listening(app, f"/runs/{one.run}/events") as two:
                await two.event()
                one.exchange.disconnect()
                await anyio.sleep(500)
                left = current_time()
        await anyio.sleep(100)
        assert work.ended_at == [pytest.approx(left + 60, abs=1e-9)]
        answer = await ask(app, f"/runs/{one.run}/events")
        assert plainly(answer.events)[1:] == engine_event("cancelled", {"reason": "linger"}, data_only)


@virtual
@pytest.mark.parametrize("back_after_s", [0.0, 30.0, 59.999])
async def test_a_reader_that_comes_back_in_time_keeps_the_run(house: House, work: Work, back_after_s: float) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
        await anyio.sleep(back_after_s)
        async with listening(app, "/work", headers=resuming(reading.last_event_id)) as reading:
            await anyio.sleep(1000)
            left = current_time()
        await anyio.sleep(100)
        assert work.ended_at == [pytest.approx(left + 60, abs=1e-9)]


@virtual
async def test_a_reader_in_between_begins_the_time_anew(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
        for _ in range(5):
            await anyio.sleep(59)
            async with listening(app, f"/runs/{reading.run}/events") as again:
                await again.event()
                left = current_time()
        await anyio.sleep(100)
        assert work.ended_at == [pytest.approx(left + 60, abs=1e-9)]


@virtual
async def test_asking_for_the_state_begins_the_time_anew(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
        for _ in range(5):
            await anyio.sleep(59)
            assert await state_of(app, reading.run) == "running"
            asked = current_time()
        await anyio.sleep(100)
        assert work.ended_at == [pytest.approx(asked + 60, abs=1e-9)]


@virtual
async def test_somebody_elses_asking_is_no_interest(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING)) as app:
        work.say(Event("1"))
        async with listening(app, "/work", headers={"x-caller": "ann"}) as reading:
            await reading.event()
            left = current_time()
        await anyio.sleep(59)
        assert await refused(app, f"/runs/{reading.run}", headers={"x-caller": "bob"}) == (404, "not_found")
        await anyio.sleep(100)
        assert work.ended_at == [pytest.approx(left + 60, abs=1e-9)]


@virtual
async def test_with_respond_async_a_run_waits_for_its_first_reader_without_a_limit(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING)) as app:
        run = await start(app, "/work")
        await anyio.sleep(1000)
        assert await state_of(app, run) == "running"
        await anyio.sleep(1000)
        assert work.reasons == [], "asking for the state is no reading"
        work.say(Event("1"))
        async with listening(app, f"/runs/{run}/events") as reading:
            await reading.event()
            left = current_time()
        await anyio.sleep(100)
        assert work.ended_at == [pytest.approx(left + 60, abs=1e-9)]


@once
async def test_a_client_that_leaves_within_the_first_second_was_a_reader(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING)) as app:
        began = current_time()
        async with connect(app, "GET", "/work"):
            await anyio.sleep(0.3)
        (run,) = (await ask(app, "/runs")).json["runs"]
        await anyio.sleep(1000)
        assert work.reasons == ["cancelled"]
        assert began + 60 < work.ended_at[0] <= began + FIRST_ITEM_S + 60 + 1e-6
        assert await state_of(app, run["run"]) == "cancelled"


@once
async def test_where_a_route_does_not_linger_a_run_goes_on(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run()), linger_s=1) as app:
        async with connect(app, "GET", "/work"):
            await anyio.sleep(0.3)
        await anyio.sleep(1000)
        assert work.reasons == []


@virtual
async def test_a_slow_reader_that_is_dropped_reads_no_more(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING), send_timeout_s=8) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            reading.exchange.block()
            work.say(Event("2"))
            await reading.exchange.ended.wait()
            left = current_time()
            await anyio.sleep(100)
            assert work.ended_at == [pytest.approx(left + 60, abs=1e-9)]


@virtual
async def test_a_run_that_ends_while_nobody_reads_is_completed(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
        await anyio.sleep(59)
        work.say(Event("2"), None)
        await anyio.sleep(100)
        assert await state_of(app, reading.run) == "completed" and work.reasons == ["finished"]


# The cancellation, seen from the handler


@virtual
async def test_a_handler_that_holds_something_gives_it_back_before_its_run_is_cancelled(house: House) -> None:
    given_back: list[float] = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("1")
            await anyio.sleep_forever()
        finally:
            with CancelScope(shield=True):
                for _ in range(3):
                    await anyio.sleep(0.1)
            given_back.append(current_time())
            assert request.end_reason == "cancelled"

    async with house.open(GET("/work", handler, run=Run())) as app, listening(app, "/work") as reading:
        await reading.event()
        asked = current_time()
        assert (await ask(app, f"/runs/{reading.run}", "DELETE")).status == 202
        assert current_time() == asked, "the answer doesn't wait for it"
        assert plainly([await reading.event()]) == [("cancelled", {"reason": "asked"})]
        assert given_back == [current_time()] == [pytest.approx(asked + 0.3)]


@virtual
async def test_a_handler_that_does_not_close_is_cancelled_again(house: House, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("1")
            await anyio.sleep_forever()
        finally:
            await anyio.sleep_forever()

    async with house.open(GET("/work", handler, run=Run())) as app, listening(app, "/work") as reading:
        await reading.event()
        asked = current_time()
        await ask(app, f"/runs/{reading.run}", "DELETE")
        assert plainly(await reading.rest()) == [("cancelled", {"reason": "asked"})]
        assert current_time() == pytest.approx(asked + CLOSE_S)
        assert "was cancelled again" in caplog.text


@virtual
async def test_a_handler_that_fails_while_it_is_closed_was_cancelled_and_that_is_logged(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("1")
            await anyio.sleep_forever()
        finally:
            raise ValueError("could not give it back")

    async with house.open(GET("/work", handler, run=Run())) as app, listening(app, "/work") as reading:
        await reading.event()
        await ask(app, f"/runs/{reading.run}", "DELETE")
        assert plainly(await reading.rest()) == [("cancelled", {"reason": "asked"})]
        assert await state_of(app, reading.run) == "cancelled"
        (record,) = [record for record in caplog.records if record.name == "sseapp"]
        assert reading.run in record.getMessage() and record.exc_info
        assert "could not give it back" in str(record.exc_info[1])


@virtual
async def test_a_handler_that_never_waits_can_be_cancelled(house: House) -> None:
    reasons: list[EndReason] = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            while True:
                yield Event("x" * 1000)
        finally:
            reasons.append(request.end_reason)

    async with house.open(GET("/work", handler, run=Run()), retention_bytes=None, retention_events=None) as app:
        async with listening(app, "/work") as reading:
            await reading.event()
            assert (await ask(app, f"/runs/{reading.run}", "DELETE")).status == 202
            events = await reading.rest()
        assert events[-1].event == "cancelled" and reasons == ["cancelled"]
        assert ids(events) == numbered(reading.run, 2, len(events) + 1)


@virtual
async def test_a_handler_that_goes_on_after_its_cancellation_is_ended(house: House) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        number = 0
        while True:
            try:
                yield Event(str(number := number + 1))
                await anyio.sleep(10)
            except anyio.get_cancelled_exc_class():
                pass

    async with house.open(GET("/work", handler, run=Run())) as app, listening(app, "/work") as reading:
        await reading.event()
        await ask(app, f"/runs/{reading.run}", "DELETE")
        events = await reading.rest()
        assert events[-1].event == "cancelled" and ids(events) == numbered(reading.run, 2, len(events) + 1)
        assert await state_of(app, reading.run) == "cancelled"


@once
@pytest.mark.parametrize("headers", [{}, ASYNC], ids=["plain", "respond-async"])
async def test_a_run_may_be_cancelled_before_its_first_event(house: House, work: Work, headers: dict[str, str]) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app, anyio.create_task_group() as tasks:

        async def cancel() -> None:
            await anyio.sleep(0.5)
            (run,) = (await ask(app, "/runs")).json["runs"]
            assert run["state"] == "running"
            assert (await ask(app, f"/runs/{run['run']}", "DELETE")).status == 202

        tasks.start_soon(cancel)
        began = current_time()
        answer = await ask(app, "/work", headers=headers)
        assert current_time() == pytest.approx(began + 0.5)
        run = answer.headers["run-id"]
        assert answer.status == (202 if headers else 200)
        events = (await ask(app, f"/runs/{run}/events")).events
        assert plainly(events) == [("cancelled", {"reason": "asked"})]
        assert work.reasons == ["cancelled"] and await state_of(app, run) == "cancelled"


@pytest.mark.parametrize("end", [None, NotFound("no")], ids=["finishing", "failing"])
@pytest.mark.parametrize("turns_between", [0, 1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("cancel_first", [False, True])
async def test_a_cancel_at_the_moment_of_the_end_leaves_one_end(
    house: House, work: Work, end: Exception | None, turns_between: int, cancel_first: bool
) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            first = await reading.event()
            statuses: list[int] = []

            async def cancel() -> None:
                statuses.append((await ask(app, f"/runs/{reading.run}", "DELETE")).status)

            async with anyio.create_task_group() as tasks:
                if cancel_first:
                    tasks.start_soon(cancel)
                else:
                    work.say(Event("2"), end)
                for _ in range(turns_between):
                    await anyio.lowlevel.checkpoint()
                if cancel_first:
                    work.say(Event("2"), end)
                else:
                    tasks.start_soon(cancel)
            events = [first, *await reading.rest()]
        assert len(work.reasons) == 1
        (status,) = statuses
        if status == 204:  # it was over
            assert await refused(app, f"/runs/{reading.run}") == (404, "not_found")
            return
        assert status == 202
        assert ids(events) == numbered(reading.run, 1, len(events))
        names = [event.event for event in events]
        expected = {"completed": [None, None], "failed": [None, None, "error"]}
        state = await state_of(app, reading.run)
        if state == "cancelled":
            assert names in ([None, "cancelled"], [None, None, "cancelled"])
        else:
            assert state == ("failed" if end else "completed") and names == expected[state]
        stored = await ask(app, f"/runs/{reading.run}/events")
        assert plainly(stored.events) == plainly(events)


# What a run holds


@pytest.mark.parametrize(
    ("mode", "size"),
    # On the disk only where time is real: a thread puts it there.
    [*((mode, 100) for mode in [*MEMORY, *SQLITE]), *((mode, 3_000_000) for mode in SQLITE)],
    ids=str,
    indirect=["mode"],
)
async def test_an_upload_lives_as_long_as_its_run(house: House, size: int) -> None:
    go_on, files = anyio.Event(), []

    async def handler(request: Request) -> AsyncIterator[Event]:
        files.append(request.body)
        yield Event(request.body.read(10))
        await go_on.wait()
        yield Event({"rest": len(request.body.read())})

    route = POST("/import", handler, body=Upload("text/csv"), run=Run())
    body = [b"0123456789", b"x" * (size - 10)]
    headers = {"content-type": "text/csv", "idempotency-key": KEY}
    async with house.open(route) as app:
        async with listening(app, "/import", "POST", headers=headers, body=body) as reading:
            assert (await reading.event()).data == "0123456789"
        # The same again, with a body of its own, which is closed.
        async with listening(app, "/import", "POST", headers=headers, body=body) as again:
            assert again.run == reading.run and (await again.event()).data == "0123456789"
        (file,) = files
        assert not file.closed
        go_on.set()
        answer = await ask(app, f"/runs/{reading.run}/events", headers=resuming(f"{reading.run}.1"))
        assert plainly(answer.events) == [(None, {"rest": size - 10})]
        await until_idle(app)
        assert file.closed


async def until_idle(app: SSEApp) -> None:
    """Until the engine has put away what ended: shortly after a reader sees the end."""
    assert app._services
    await turns(lambda: not app._services or not app._services.runs._workers)


@engines
async def test_an_upload_is_given_back_where_its_run_is_none(house: House, work: Work) -> None:
    files = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        files.append(request.body)
        raise NotFound("no")
        yield

    async with house.open(POST("/import", handler, body=Upload("text/csv"), run=Run())) as app:
        answer = await ask(app, "/import", "POST", headers={"content-type": "text/csv"}, body=b"a")
        assert answer.problem == (404, "not_found")
        await until_idle(app)
        assert files[0].closed


@virtual
async def test_a_run_knows_its_request_but_has_no_connection(house: House) -> None:
    go_on = anyio.Event()

    async def handler(request: Request, item: str) -> AsyncIterator[Event]:
        yield Event([item, request.query_params["a"], request.body, request.headers["x-b"], request.caller])
        await go_on.wait()
        with pytest.raises(RuntimeError, match="no connection"):
            await request.disconnect()
        yield Event("2")

    route = POST("/items/{item}", handler, body=list[int], run=Run())
    async with house.open(route) as app:
        headers = {"content-type": "application/json", "x-b": "b", "x-caller": "ann"}
        async with listening(app, "/items/7?a=1", "POST", headers=headers, body=b"[1]") as reading:
            assert (await reading.event()).data == '["7","1",[1],"b","ann"]'
        go_on.set()
        answer = await ask(app, f"/runs/{reading.run}/events", headers={"x-caller": "ann"})
        assert len(answer.events) == 2 and answer.events[-1].data == "2"


# Limits


@once
async def test_over_the_limit_of_runs_one_is_told_to_come_back(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run()), max_runs=2) as app:
        runs = [await start(app, f"/work?key={KEY}{number}") for number in range(2)]
        for headers in ({}, ASYNC, EVENTS, {"x-caller": "ann"}):
            answer = await ask(app, "/work", headers=headers)
            assert answer.problem == (503, "unavailable") and int(answer.headers["retry-after"]) > 0
        answer = await ask(app, f"/work?key={KEY}", headers=BROWSER)
        assert answer.status == 200 and answer.headers["content-type"] == "text/event-stream"
        assert answer.events == [] and "run-id" not in answer.headers and answer.complete
        retry = answer.body.decode().removeprefix("retry: ")
        assert 2000 <= int(retry) <= 6000 and retry.endswith("\n") and "\n\n" not in retry
        assert work.started == 2

        assert await start(app, f"/work?key={KEY}0") == runs[0], "what is there may be read"
        assert (await ask(app, f"/runs/{runs[0]}", "DELETE")).status == 202
        await settle()
        await start(app, "/work")
        assert work.started == 3


@once
async def test_a_caller_over_its_own_limit_is_refused_and_never_softly(house: House, work: Work) -> None:
    ann, bob = {"x-caller": "ann"}, {"x-caller": "bob"}
    async with house.open(GET("/work", work.handler, run=Run()), max_runs_per_caller=2) as app:
        run, _ = [await start(app, "/work", headers=ann) for _ in range(2)]
        for headers in ({}, ASYNC, BROWSER):
            answer = await ask(app, "/work", headers=ann | headers)
            assert answer.problem == (429, "too_many_requests") and int(answer.headers["retry-after"]) > 0
        await start(app, "/work", headers=bob)
        for _ in range(3):
            await start(app, "/work")  # nobody's own limit
        await ask(app, f"/runs/{run}", "DELETE", headers=ann)
        await settle()
        await start(app, "/work", headers=ann)


@once
async def test_a_run_that_failed_at_once_makes_room(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run()), max_runs=1) as app:
        for _ in range(3):
            work.say(NotFound("no"))
            assert await refused(app, "/work") == (404, "not_found")
            await settle()
        work.say(None)
        assert (await ask(app, "/work")).status == 200


# The service stops


def is_farewell(body: bytes) -> bool:
    """The end of a stream that goes on elsewhere: a time to come back, and no id."""
    line = body.rpartition(b"\n\n")[2]
    return line.startswith(b"retry: ") and line.endswith(b"\n") and line.count(b"\n") == 1


@virtual
async def test_in_a_drain_readers_leave_at_once_and_a_run_may_finish(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app, anyio.create_task_group() as tasks:
        work.say(Event("1"))
        async with listening(app, "/work") as reading, listening(app, f"/runs/{reading.run}/events") as other:
            await reading.event()
            await other.event()
            began = current_time()
            tasks.start_soon(app.drain, 8)
            assert await reading.rest() == [] and await other.rest() == []
            assert current_time() == began
            assert is_farewell(reading.raw) and is_farewell(other.raw)
            run = reading.run
            for target, method in (("/work", "GET"), (f"/runs/{run}/events", "GET")):
                assert await refused(app, target, method) == (503, "unavailable")
                answer = await ask(app, target, headers=BROWSER)
                assert answer.status == 200 and answer.body.startswith(b"retry: ") and answer.events == []
            assert await refused(app, "/work", headers=ASYNC) == (503, "unavailable")
            assert await state_of(app, run) == "running"

            await anyio.sleep(7.9)
            work.say(Event("2"), None)
            await anyio.sleep(1)
            assert await state_of(app, run) == "completed" and work.reasons == ["finished"]


@virtual
@both_ways
async def test_a_run_that_does_not_finish_in_a_drain_is_interrupted(house: House, work: Work, data_only: bool) -> None:
    async with house.open(GET("/work", work.handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            began = current_time()
            await app.drain(8)
            assert current_time() == pytest.approx(began + 8)
            assert work.ended_at == [pytest.approx(began + 8)] and work.reasons == ["drain"]
            assert await reading.rest() == [] and is_farewell(reading.raw)
        rows = await house.log.read(reading.run, 1, 10_000)
        expected = engine_event("error", {"error": "the service stopped", "code": "interrupted"}, data_only)
        assert plainly(Decoder().feed(b"".join(row.body for row in rows))) == expected
        state = (await ask(app, f"/runs/{reading.run}")).json
        assert state["state"] == "interrupted" and state["events"] == 1 + len(expected)


@once
async def test_a_drain_without_time_interrupts_at_once(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        run = await start(app, "/work")
        began = current_time()
        await app.drain(0)
        assert current_time() == began
        assert await state_of(app, run) == "interrupted" and work.reasons == ["drain"]


@once
async def test_in_a_drain_a_handler_may_clean_up(house: House) -> None:
    reasons: list[EndReason] = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("1")
            await anyio.sleep_forever()
        finally:
            with CancelScope(shield=True):
                await anyio.sleep(0.5)
            reasons.append(request.end_reason)

    async with house.open(GET("/work", handler, run=Run())) as app:
        run = await start(app, "/work")
        await app.drain(2)
        assert reasons == ["drain"] and await state_of(app, run) == "interrupted"


class Stubborn:
    """A handler that swallows each cancellation, until the test is over."""

    def __init__(self) -> None:
        self.over = False
        self.ended = anyio.Event()

    async def handler(self, request: Request) -> AsyncIterator[Event]:
        yield Event("1")
        while not self.over:
            with suppress(BaseException):
                await anyio.sleep(0.1)
        self.ended.set()


@once
@pytest.mark.parametrize("grace_s", [0, 8])
async def test_a_drain_ends_although_a_handler_swallows_its_cancellation(
    house: House, grace_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    stubborn = Stubborn()
    async with house.open(GET("/work", stubborn.handler, run=Run()), COUNT) as app:
        async with anyio.create_task_group() as tasks:
            run = await start(app, "/work")
            began = current_time()
            tasks.start_soon(app.drain, grace_s)
        assert current_time() - began == pytest.approx(grace_s + DRAIN_CLOSE_S)
        await app.drain(0)
        assert current_time() - began == pytest.approx(grace_s + DRAIN_CLOSE_S), "only one drain waits"
        assert caplog.text.count(f"run {run}: its handler did not end") == 1
        assert await state_of(app, run) == "running", "the next start closes it"
        stubborn.over = True


@engines
async def test_an_app_ends_although_a_handler_swallows_its_cancellation(house: House) -> None:
    stubborn = Stubborn()
    async with house.open(GET("/work", stubborn.handler, run=Run())) as app:
        run = await start(app, "/work")
    assert not stubborn.ended.is_set()
    if house.mode.name == "sqlite":
        async with house.open(GET("/work", stubborn.handler, run=Run())) as app:
            assert await state_of(app, run) == "interrupted"
    stubborn.over = True
    await stubborn.ended.wait()


@once
async def test_a_host_that_is_cancelled_interrupts_its_runs(house: House, work: Work) -> None:
    with CancelScope() as scope:
        async with house.open(GET("/work", work.handler, run=Run())) as app:
            run = await start(app, "/work")
            log = house.log
            scope.cancel()
            await anyio.sleep_forever()
    assert work.reasons == ["drain"]
    stat = await log.stat(run)
    assert stat is not None and stat.closed and stat.meta["state"] == "interrupted"


@once
async def test_a_run_that_can_not_be_made_leaves_nothing_that_a_drain_would_wait_for(house: House, work: Work) -> None:
    route = GET("/work", work.handler, run=Run())
    object.__setattr__(route, "run", True)  # a table refuses it
    async with house.open(route) as app:
        assert await refused(app, "/work") == (500, "internal_error")
        began = current_time()
        await app.drain(100)
        assert current_time() == began


@once
async def test_a_run_that_fails_in_a_drain_has_failed(house: House, work: Work) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app, anyio.create_task_group() as tasks:
        run = await start(app, "/work")
        tasks.start_soon(app.drain, 8)
        await anyio.sleep(1)
        work.say(NotFound("no"))
        await anyio.sleep(1)
        assert await state_of(app, run) == "failed"


@on_sqlite
@both_ways
async def test_after_a_restart_an_interrupted_run_is_read_to_its_end(house: House, work: Work, data_only: bool) -> None:
    route = GET("/work", work.handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED)
    async with house.open(route) as app:
        work.say(*said(1, 2))
        async with listening(app, f"/work?key={KEY}") as reading:
            await reading.event()
            await reading.event()
            await app.drain(0)
            assert await reading.rest() == [] and is_farewell(reading.raw)
    async with house.open(route) as app:
        heard = await listen_like_a_browser(app, f"/work?key={KEY}", last_event_id=f"{reading.run}.1")
        ended = engine_event("error", {"error": "the service stopped", "code": "interrupted"}, data_only)
        assert plainly(heard.events) == [(None, "2"), *ended]
        assert ids(heard.events) == numbered(reading.run, 2, 2 + len(ended))
        assert heard.statuses[-1] == 204
        assert await state_of(app, reading.run) == "interrupted"
        assert await start(app, f"/work?key={KEY}") == reading.run, "its key is kept"
        assert work.started == 1


@pytest.mark.parametrize("mode", SQLITE[:1], ids=str, indirect=True)
async def test_after_a_restart_a_finished_run_is_there_with_all_of_it(house: House) -> None:
    async with house.open(COUNT) as app:
        before = await ask(app, f"/count?key={KEY}")
        run = before.headers["run-id"]
        state = (await ask(app, f"/runs/{run}")).json
    async with house.open(COUNT) as app:
        assert (await ask(app, f"/runs/{run}/events")).body == before.body
        assert (await ask(app, f"/count?key={KEY}")).body == before.body
        assert (await ask(app, f"/runs/{run}")).json == state
        assert (await ask(app, "/runs")).json == {"runs": [state]}
        assert (await ask(app, "/count", headers=resuming(f"{run}.4"))).status == 204
        assert (await ask(app, f"/runs/{run}", "DELETE")).status == 204


# The log is away


@dataclass
class Trouble:
    """What the log answers to appends and deletions, while it is in trouble."""

    error: SSEAppError | None = None


@pytest.fixture
def trouble(house: House, monkeypatch: pytest.MonkeyPatch) -> Trouble:
    trouble, open_log = Trouble(), house.open_log

    def open_troubled(settings: Settings) -> Log:
        log = open_log(settings)
        for name in ("append", "delete"):
            monkeypatch.setattr(log, name, troubled(getattr(log, name)))
        make = log.writer

        def writer(stream: str, epoch: str, told: Posted) -> Any:
            own = make(stream, epoch, told)

            def post(frames: list[bytes], size: int) -> None:
                if trouble.error is not None:
                    told(size, trouble.error)
                else:
                    own.post(frames, size)

            return SimpleNamespace(post=post)

        monkeypatch.setattr(log, "writer", writer)
        return log

    def troubled(method: Any) -> Any:
        async def call(*args: Any, **options: Any) -> Any:
            await anyio.lowlevel.checkpoint()
            if trouble.error is not None:
                raise trouble.error
            return await method(*args, **options)

        return call

    monkeypatch.setattr(sseapp, "open_log", open_troubled)
    return trouble


AWAY: Final = LogUnavailable("the disk is full", headers={"retry-after": "5"})
trouble_of_a_kind = pytest.mark.parametrize(
    ("error", "code"),
    [(AWAY, "log_unavailable"), (LogError("the file is damaged"), "log_error")],
    ids=["away", "damaged"],
)


@virtual
@both_ways
@trouble_of_a_kind
async def test_when_the_log_is_away_readers_hear_of_it_and_it_is_stored_later(
    house: House, work: Work, trouble: Trouble, data_only: bool, error: SSEAppError, code: str
) -> None:
    async with house.open(GET("/work", work.handler, run=Run(), dialect=DATA_ONLY if data_only else NAMED)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading, listening(app, f"/runs/{reading.run}/events") as other:
            await reading.event()
            await other.event()
            trouble.error = error
            work.say(Event("2"))
            events = await reading.rest()
            expected = engine_event("error", {"error": error.detail, "code": code}, data_only)
            assert plainly(events) == expected == plainly(await other.rest())
            assert set(ids(events)) == {f"{reading.run}.1"}, "they have no id of their own"
            assert reading.raw.count(b"id: ") == 1
        assert work.reasons == ["failed"]
        await anyio.sleep(100)
        assert await state_of_log(house, reading.run) == "running"

        async with listening(app, "/work", headers=resuming(f"{reading.run}.1")) as back:
            trouble.error = None
            stored = await back.rest()
            assert plainly(stored) == expected
            assert ids(stored) == numbered(reading.run, 2, 1 + len(expected))
        assert await state_of(app, reading.run) == "failed"
        assert (await ask(app, "/work", headers=resuming(back.last_event_id))).status == 204


@virtual
@trouble_of_a_kind
async def test_when_the_log_is_away_at_the_end_that_is_stored_later_too(
    house: House, work: Work, trouble: Trouble, error: SSEAppError, code: str
) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            trouble.error = error
            work.say(None)
            assert plainly(await reading.rest()) == [("error", {"error": error.detail, "code": code})]
        trouble.error = None
        await anyio.sleep(100)
        assert await state_of(app, reading.run) == "failed"


@virtual
async def test_when_the_log_is_away_at_the_beginning_there_is_no_run(
    house: House, work: Work, trouble: Trouble
) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        trouble.error = AWAY
        work.say(Event("1"))
        answer = await ask(app, f"/work?key={KEY}")
        assert answer.problem == (503, "log_unavailable") and answer.headers["retry-after"] == "5"
        assert await refused(app, f"/work?key={KEY}", headers=ASYNC) == (503, "log_unavailable")
        answer = await ask(app, f"/work?key={KEY}", headers=BROWSER)
        assert answer.status == 200 and answer.body.startswith(b"retry: ") and answer.events == []
        assert work.started == 1 and work.reasons == ["failed"]

        trouble.error = None
        await anyio.sleep(100)
        assert (await ask(app, "/runs")).json == {"runs": []}, "nothing is kept"
        work.say(Event("2"), None)
        answer = await ask(app, f"/work?key={KEY}")
        assert data(answer.events) == ["2"], "the key is free"


@virtual
async def test_a_run_too_large_while_the_log_is_away_ends_too(house: House, work: Work, trouble: Trouble) -> None:
    async with house.open(GET("/work", work.handler, run=Run()), retention_events=1) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            trouble.error = AWAY
            work.say(Event("2"))
            assert [event.event for event in await reading.rest()] == ["error"]
        trouble.error = None
        await anyio.sleep(100)
        assert await state_of(app, reading.run) == "failed"


@virtual
async def test_a_drain_does_not_wait_for_a_log_that_is_away(house: House, work: Work, trouble: Trouble) -> None:
    async with house.open(GET("/work", work.handler, run=Run())) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            trouble.error = AWAY
            work.say(Event("2"))
            await reading.rest()
        began = current_time()
        await app.drain(8)
        assert current_time() == pytest.approx(began + 8)
    assert work.reasons == ["failed"]


@virtual
async def test_a_run_that_is_cancelled_while_the_log_is_away_ends(house: House, work: Work, trouble: Trouble) -> None:
    async with house.open(GET("/work", work.handler, run=LINGERING)) as app:
        work.say(Event("1"))
        async with listening(app, "/work") as reading:
            await reading.event()
            trouble.error = AWAY
            assert (await ask(app, f"/runs/{reading.run}", "DELETE")).status == 202
            assert [event.event for event in await reading.rest()] == ["error"]
            assert (await ask(app, f"/runs/{reading.run}", "DELETE")).status == 202
        await anyio.sleep(1000)
        trouble.error = None
        await anyio.sleep(100)
        stored = await ask(app, f"/runs/{reading.run}/events")
        assert len(stored.events) == 2 and await state_of(app, reading.run) == "failed"
        assert work.reasons == ["cancelled"]


@once
async def test_a_reader_that_can_not_read_the_log_is_sent_away_to_come_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.open(COUNT) as app:
        run = await start(app, "/count")

        async def read(*_: object) -> Any:
            raise AWAY

        with monkeypatch.context() as patch:
            patch.setattr(house.log, "read", read)
            assert await refused(app, f"/runs/{run}/events") == (503, "log_unavailable")
            answer = await ask(app, f"/runs/{run}/events", headers=BROWSER)
            assert answer.status == 200 and answer.body.startswith(b"retry: ") and answer.events == []
        assert data((await ask(app, f"/runs/{run}/events")).events) == COUNTED


@once
async def test_a_log_that_can_not_be_written_starts_no_run(
    house: House, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def create(*_: object, **__: object) -> Any:
        raise AWAY

    async with house.open(GET("/work", work.handler, run=Run()), max_runs=1) as app:
        monkeypatch.setattr(house.log, "create", create)
        for _ in range(3):
            assert await refused(app, "/work") == (503, "log_unavailable")
        assert work.started == 0


@once
async def test_an_embedding_program_that_forgot_to_run_the_app_is_told(work: Work) -> None:
    app = SSEApp([GET("/work", work.handler, run=Run())], Settings(log="memory"))
    answer = await ask(app, "/work")
    assert answer.status == 500 and "async with app.running()" in answer.json["detail"]
