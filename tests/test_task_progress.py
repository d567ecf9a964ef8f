"""The progress of a task's newest execution: a view that says each event in other words, over both ways of delivery."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import anyio
import httpx
import pytest
from anyio import current_time
from hypothesis import given
from hypothesis import strategies as st

import ssecore.log.tail
from handlers import database, tasks
from handlers.database import NewTask, Task, open_tasks
from handlers.tasks import ROUTES
from sseapp import SSEApp
from ssecore.http.request import Request
from ssecore.http.routes import GET, Run
from ssecore.log import Row, framed
from ssecore.log.tail import Translate
from ssecore.settings import Settings
from ssecore.wire import Decoder, Event, encode
from tests import serving
from tests.clients import BROWSER, AppWithCallers, Reading, ask, listen_like_a_browser, listening
from tests.house import Backend, virtual_time
from tests.lines import lines_offered
from tests.serving import Server

LIMIT_S: Final = 20
TIME: Final = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
TARGET: Final = "/tasks/1/progress/stream"
COMPLETED: Final = ("complete", {"task_id": 1, "final_status": "completed"})
STEPS: Final = ("one", "two", "three")
ASYNC: Final = {"prefer": "respond-async"}


once = pytest.mark.parametrize("parked", [False], ids=["waiting"], indirect=True)


@pytest.fixture
def small_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event is read from the log alone, if the reader isn't quite up to date."""
    monkeypatch.setattr(ssecore.log.tail, "TAIL_BYTES", 1)
    monkeypatch.setattr(ssecore.log.tail, "READ_BYTES", 1)


class Work:
    """An operation whose steps wait until the test lets them go on."""

    def __init__(self) -> None:
        self.gates = [anyio.Event() for _ in range(3)]
        self.failure: Exception | None = None
        self.steps = {name: partial(self._step, gate) for name, gate in zip(STEPS, self.gates, strict=True)}

    async def _step(self, gate: anyio.Event, request: Request, task: Task) -> str:
        await gate.wait()
        if self.failure is not None:
            raise self.failure
        return "x" * 100

    def go_on(self) -> None:
        next(gate for gate in self.gates if not gate.is_set()).set()


class House(NamedTuple):
    app: SSEApp
    work: Work

    async def execute(self, caller: str = "ann", task_id: int = 1) -> str:
        """Begin an execution; its run's id."""
        target = f"/tasks/{task_id}/execute/stream?operation=finish"
        answer = await ask(self.app, target, "POST", headers=ASYNC | {"x-caller": caller})
        assert answer.status == 202, answer.body
        return answer.headers["run-id"]

    def watching(self, caller: str = "ann", **headers: str) -> Any:
        headers = {name.replace("_", "-"): value for name, value in headers.items()} | {"x-caller": caller}
        return listening(self.app, TARGET, headers=headers)


@pytest.fixture
async def house(parked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    async with a_house(parked, tmp_path, monkeypatch) as house:
        yield house


@asynccontextmanager
async def a_house(parked: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> AsyncIterator[House]:
    work = Work()
    monkeypatch.setattr(tasks, "OPERATIONS", {"finish": work.steps})

    @asynccontextmanager
    async def resources(app: SSEApp) -> AsyncIterator[Any]:
        async with open_tasks(folder) as tasks:
            await tasks.insert([NewTask("Title", "", "open", 1, None)] * 2)
            yield SimpleNamespace(tasks=tasks)

    app = AppWithCallers(ROUTES, Settings(log="memory", data_dir=folder, **settings), lifespan=resources)
    with lines_offered(parked), anyio.fail_after(LIMIT_S):
        async with app.running():
            yield House(app, work)


def step(number: int) -> tuple[str, Any]:
    return "progress", {"task_id": 1, "step": STEPS[number], "progress": (0, 33, 66)[number]}


def said(event: Event) -> tuple[str | None, Any]:
    """Name and data, without the time, which is checked."""
    data = json.loads(event.data)
    if event.event == "progress":
        assert list(data) == ["task_id", "step", "progress", "timestamp"]
        assert re.fullmatch(TIME, data.pop("timestamp"))
    return event.event, data


async def next_said(reading: Reading) -> tuple[str | None, Any]:
    return said(await reading.event())


# What it says


async def test_the_steps_are_told_as_they_begin_and_then_the_end(house: House) -> None:
    run = await house.execute()
    async with house.watching() as one, house.watching() as other:
        for number in range(3):
            assert await next_said(one) == await next_said(other) == step(number)
            house.work.go_on()
        assert await next_said(one) == await next_said(other) == COMPLETED
        assert await one.rest() == await other.rest() == []
        assert one.run == run
        # Nothing but the events that are for it, each with the id that it has everywhere.
        assert one.raw == other.raw
        ids = [line for line in one.raw.split(b"\n") if line.startswith(b"id: ")]
        assert ids == [f"id: {run}.{number}".encode() for number in (2, 4, 6, 8)]
        assert b"result" not in one.raw and b"validating" not in one.raw and b"\n:" not in one.raw


async def test_who_comes_late_is_told_all_and_a_times_are_those_of_then(house: House, small_tail: None) -> None:
    await house.execute()
    async with house.watching() as live:
        for _ in range(3):
            house.work.go_on()
        whole = await live.rest()
    late = await ask(house.app, TARGET, headers={"x-caller": "ann"})
    assert [(event.id, event.data) for event in late.events] == [(event.id, event.data) for event in whole]


@pytest.mark.parametrize("code", ["failed", "cancelled"])
async def test_every_end_is_told(house: House, code: str) -> None:
    run = await house.execute()
    async with house.watching() as reading:
        assert await next_said(reading) == step(0)
        if code == "failed":
            house.work.failure = RuntimeError("a secret")
            house.work.go_on()
        else:
            target = f"/runs/{run}"
            assert (await ask(house.app, target, "DELETE", headers={"x-caller": "ann"})).status == 202
        assert [said(event) for event in await reading.rest()] == [("complete", {"task_id": 1, "final_status": code})]
        last_id = reading.last_event_id
    again = await ask(house.app, TARGET, headers={"x-caller": "ann", "last-event-id": last_id})
    assert again.status == 204


# Cuts


@once
async def test_a_cut_anywhere_loses_nothing_and_repeats_nothing(house: House, small_tail: None) -> None:
    run = await house.execute()
    for _ in range(3):
        house.work.go_on()
    headers = {"x-caller": "ann"}
    whole = (await ask(house.app, TARGET, headers=headers)).events
    assert len(whole) == 4
    for seen in range(8):
        rest = (await ask(house.app, TARGET, headers=headers | {"last-event-id": f"{run}.{seen}"})).events
        assert [event.id for event in rest] == [f"{run}.{number}" for number in (2, 4, 6, 8) if number > seen]
        assert [event.data for event in rest] == [event.data for event in whole[-len(rest) :]]
    assert (await ask(house.app, TARGET, headers=headers | {"last-event-id": f"{run}.8"})).status == 204
    malformed = await ask(house.app, TARGET, headers=headers | {"last-event-id": f"{run}.x"})
    assert malformed.problem == (400, "bad_request")


async def test_a_browser_is_told_to_stop_wherever_it_was_cut(
    parked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A browser has no header to say who it is.
    async with a_house(parked, tmp_path, monkeypatch) as house:
        answer = await ask(house.app, "/tasks/1/execute/stream?operation=finish", "POST", headers=ASYNC)
        for _ in range(3):
            house.work.go_on()
        await ask(house.app, f"/runs/{answer.headers['run-id']}/events")
        whole = await listen_like_a_browser(house.app, TARGET)
        assert [said(event) for event in whole.events] == [*map(step, range(3)), COMPLETED]
        assert whole.statuses == [200, 204]
        for cut in range(0, 600, 7):
            heard = await listen_like_a_browser(house.app, TARGET, cuts=[cut])
            assert (heard.data, heard.statuses[-1]) == (whole.data, 204), cut


async def test_a_cut_in_the_middle_goes_on_live(house: House) -> None:
    await house.execute()
    async with house.watching() as reading:
        assert await next_said(reading) == step(0)
        last_id = reading.last_event_id
    house.work.go_on()
    async with house.watching(last_event_id=last_id) as reading:
        assert await next_said(reading) == step(1)
        house.work.go_on()
        house.work.go_on()
        assert [said(event) for event in await reading.rest()] == [step(2), COMPLETED]


# Which execution


async def test_the_newest_execution_is_shown_and_a_cursor_goes_on_with_its_own(house: House) -> None:
    old = await house.execute()
    async with house.watching() as reading:
        assert await next_said(reading) == step(0)
        cursor = reading.last_event_id
    new = await house.execute()
    async with house.watching() as newest, house.watching(last_event_id=cursor) as older:
        assert (newest.run, older.run) == (new, old)
        for _ in range(3):
            house.work.go_on()
        assert said((await newest.rest())[-1]) == said((await older.rest())[-1]) == COMPLETED
        assert older.last_event_id == f"{old}.8"


async def test_each_caller_sees_their_own_executions(house: House) -> None:
    anns = await house.execute("ann")
    bens = await house.execute("ben")
    for caller, run, other in (("ann", anns, bens), ("ben", bens, anns)):
        async with house.watching(caller) as reading:
            assert reading.run == run
        async with house.watching(caller, last_event_id=f"{other}.1", accept="text/event-stream") as reading:
            assert [event.event for event in await reading.rest()] == ["gap"]  # as if it weren't there
    assert (await ask(house.app, TARGET, headers={"x-caller": "eve"})).problem == (404, "not_found")


async def test_executions_of_other_tasks_and_other_runs_are_not_shown(house: House) -> None:
    one, two = await house.execute(), await house.execute(task_id=2)
    async with house.watching() as reading:
        assert reading.run == one
    headers = {"x-caller": "ann", "last-event-id": f"{two}.1"}
    assert (await ask(house.app, TARGET, headers=headers)).problem == (409, "conflict")


async def test_an_execution_that_the_log_forgot_makes_way_for_the_one_before_it(house: House) -> None:
    ann = {"x-caller": "ann"}
    old, new = await house.execute(), await house.execute()
    for run in (new, old):
        async with house.watching() as reading:
            assert reading.run == run
        for _ in range(2):  # cancelled, and then deleted
            await ask(house.app, f"/runs/{run}", "DELETE", headers=ann)
            await ask(house.app, f"/runs/{run}/events", headers=ann)
    assert (await ask(house.app, TARGET, headers=ann)).problem == (404, "not_found")
    assert (await ask(house.app, TARGET, headers=ann | {"last-event-id": f"{new}.1"})).problem == (410, "gone")
    assert (await ask(house.app, TARGET, headers=ann | {"last-event-id": "end"})).status == 204


@once
async def test_retention_takes_the_newest_executions_progress_as_well(house: House) -> None:
    assert house.app._services is not None
    run = await house.execute()
    await house.app._services.runs.log.delete(run)  # as upkeep does
    assert (await ask(house.app, TARGET, headers={"x-caller": "ann"})).problem == (404, "not_found")


async def test_executions_that_are_remembered_are_bounded_for_each_caller_and_task(tmp_path: Path) -> None:
    kept = database.MAX_EXECUTIONS
    async with open_tasks(tmp_path) as tasks:
        await tasks.begin_execution("ben's", 1, "ben")
        await tasks.begin_execution("nobody's", 1, None)
        await tasks.begin_execution("another's", 2, "ann")
        for number in range(kept + 5):
            await tasks.begin_execution(str(number), 1, "ann")
        assert await tasks.executions(1, "ann") == [str(number) for number in range(kept + 4, 4, -1)]
        assert await tasks.executions(1, "ben") == ["ben's"]
        assert await tasks.executions(1, None) == ["nobody's"]
        assert await tasks.executions(2, "ann") == ["another's"]
        assert await tasks.executions(3, "ann") == []


@once
async def test_where_nobody_has_a_name_nobodys_executions_are_shown(
    parked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_house(parked, tmp_path, monkeypatch, auth="off") as house:
        assert (await ask(house.app, TARGET)).problem == (403, "forbidden")


# What is not for a reader, and time


async def quiet(request: Request) -> AsyncIterator[Event]:
    """For 100 seconds an event each second that nobody is told of, and then the end."""
    for _ in range(100):
        yield Event({}, "result")
        await anyio.sleep(1)
    yield Event({"task_id": 1}, "complete")


async def view(request: Request, run: str) -> Any:
    def ends(event: Event) -> Event | None:
        return event if event.event == "complete" else None

    return await request.runs.view(request, run, translate=ends)


@virtual_time
async def test_what_is_left_out_sends_nothing_and_holds_up_no_heartbeat(parked: bool, anyio_backend: Backend) -> None:
    app = SSEApp([GET("/quiet", quiet, run=Run()), GET("/view/{run}", view)], Settings(log="memory", heartbeat_s=15))
    async with app.running():
        run = (await ask(app, "/quiet", headers=ASYNC)).headers["run-id"]
        began, times = current_time(), list[float]()
        async with listening(app, f"/view/{run}") as reading:
            while await reading.chunk() is not None:
                times.append(current_time() - began)
        heartbeats = reading.raw.count(b"\n:")
        assert 5 <= heartbeats <= 6  # one for each 15 seconds without a byte, not one for each event
        assert reading.raw.startswith(b"retry: 2000\nid: %b.0\n\n" % run.encode())
        assert reading.raw.endswith(b'event: complete\ndata: {"task_id":1}\nid: %b.101\n\n' % run.encode())
        assert 99 <= times[-1] <= 101


_TEXTS: Final = st.text(st.characters(exclude_categories=["Cs"]))
_NAMES: Final = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1)


@given(st.lists(st.builds(Event, data=_TEXTS, event=_NAMES, retry=st.none() | st.integers(0, 2**53 - 1))))
def test_a_translation_that_says_the_same_changes_no_byte(events: list[Event]) -> None:
    frames = [encode(event) for event in events]
    row = Row("A" * 22, 1, b"".join(frames), tuple(accumulate(map(len, frames))))
    assert translated(framed(row), lambda event: event) == framed(row)
    assert translated(framed(row), lambda event: None) == b""
    assert translated(b"".join(frames), lambda event: event) == row.body  # last words: without ids


def translated(frames: bytes, translate: Translate) -> bytes:
    return b"".join(ssecore.log.tail._translate_all(frames, translate, False))


# Against a real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving.serve(tmp_path_factory.mktemp("progress"), env={"SSEAPP_MOCK_DELAY_S": "0"}) as server:
        headers = {"content-type": "text/csv"}
        server.client.post("/tasks/import", content="title\nOne\nTwo\n", headers=headers)
        yield server


def get(server: Server, task_id: object, **headers: str) -> httpx.Response:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.client.get(f"/tasks/{task_id}/progress/stream", headers=headers)


def test_the_progress_of_each_operation(server: Server) -> None:
    for operation, steps in (("analyze", [("count", 0), ("words", 50)]), ("summarize", [("summarize", 0)])):
        run = server.client.post(f"/tasks/1/execute/stream?operation={operation}").headers["run-id"]
        response = get(server, 1)
        assert response.headers["content-type"] == "text/event-stream"
        *told, end = [said(event) for event in Decoder().feed(response.content)]
        assert told == [("progress", {"task_id": 1, "step": name, "progress": at}) for name, at in steps]
        assert end == COMPLETED
        assert response.headers["run-id"] == run
        assert get(server, 1, last_event_id=Decoder().feed(response.content)[-1].id or "").status_code == 204


def test_what_is_no_task_or_was_never_executed_is_refused_and_starts_nothing(server: Server) -> None:
    before = server.client.get("/runs").json()
    for task_id in (2, 3, 0, -1, 10**18 - 1, 10**18, "x", "1.5", "%00", ""):
        response = get(server, task_id)
        number = isinstance(task_id, int) and task_id < 10**18
        assert response.status_code == (404 if number or task_id == "" else 400), task_id
        assert response.headers["content-type"] == "application/problem+json"
    response = server.client.post("/tasks/1/progress/stream")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
    assert get(server, 1, last_event_id="x").json()["field"] == "last_event_id"
    assert server.client.head("/tasks/2/progress/stream").status_code == 404
    assert server.client.get("/runs").json() == before


def test_an_interrupted_execution_is_told_after_the_restart(tmp_path: Path) -> None:
    env = {"SSEAPP_MOCK_DELAY_S": "60"}
    with serving.serve(tmp_path, env=env) as server:
        server.client.post("/tasks/import", content="title\nOne\n", headers={"content-type": "text/csv"})
        server.client.post("/tasks/1/execute/stream?operation=summarize", headers=ASYNC)
        with server.client.stream("GET", TARGET, headers=BROWSER) as response:
            decoder = Decoder()
            (seen,) = next(told for chunk in response.iter_raw() if (told := decoder.feed(chunk)))
            server.process.kill()
            server.wait()
    with serving.serve(tmp_path) as server:
        (end,) = Decoder().feed(get(server, 1, last_event_id=decoder.last_event_id).content)
        assert said(seen) == ("progress", {"task_id": 1, "step": "summarize", "progress": 0})
        assert said(end) == ("complete", {"task_id": 1, "final_status": "interrupted"})
        assert get(server, 1, last_event_id=end.id or "").status_code == 204
