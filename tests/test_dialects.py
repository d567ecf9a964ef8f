"""Dialects: what the engine itself says in a stream, in the language that the route speaks; threads; whole answers."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.lowlevel
import httpx
import pytest

from sseapp import GET, JSON, POST, About, Event, NotFound, Request, Response, Route, Run, Settings, SSEApp
from ssecore.dialects import AG_UI, DIALECTS, NAMED, Dialect, SoFar
from ssecore.log import new_epoch
from ssecore.testing import Transport
from ssecore.wire import Decoder, encode

SO_FAR: Final = SoFar("r" * 22, {"threadId": "t", "runId": "r", "model": "m"}, 7, Event('{"type":"x"}'))


class Ticker(Dialect):
    name = "ticker"

    def error(self, text: str, code: str, so_far: SoFar) -> list[Event]:
        return [Event(f"E {code} {so_far.events} {so_far.last and so_far.last.data} {so_far.note}")]

    def cancelled(self, reason: str, so_far: SoFar) -> list[Event]:
        return [Event(f"X {reason}")]

    def gap(self, gap: Any) -> Event:
        return Event(f"G {gap['reason']}")

    def is_last(self, event: Event) -> bool:
        return event.data[:1] in ("E", "X", ".")


TICKER: Final = Ticker()


async def ticking(request: Request, what: str) -> AsyncIterator[Event]:
    yield Event("1")
    if what == "fail":
        await anyio.lowlevel.checkpoint()
        raise NotFound("no more")
    if what == "end":
        yield Event(".")
    else:
        await anyio.sleep_forever()


async def shown(request: Request, id: str) -> Any:
    return await request.runs.view(request, id, after=int(request.query_params["after"]))


async def whole(request: Request, run: str) -> Response | None:
    if "stream" in request.query_params:
        return None
    events = await request.runs.whole(request, run)
    return JSON([event.data for event in events])


def about(request: Request) -> About:
    return About(thread=request.query_params.get("thread"), key=request.query_params.get("name"), note={"n": 1})


ROUTES: Final = [
    GET("/tick/{what}", ticking, dialect=TICKER, run=Run(about=about)),
    GET("/whole/{what}", ticking, dialect=TICKER, run=Run(accepted=whole)),
    GET("/shown/{id}", shown),
]


class Reader:
    def __init__(self, response: httpx.Response) -> None:
        self.run = response.headers["run-id"]
        self._decoder = Decoder()
        self._chunks = response.aiter_raw()
        self._events: list[Event] = []

    async def next(self) -> Event:
        while not self._events:
            self._events = self._decoder.feed(await anext(self._chunks))
        return self._events.pop(0)


@asynccontextmanager
async def client_of(app: SSEApp) -> AsyncIterator[httpx.AsyncClient]:
    with anyio.fail_after(10):
        async with httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as http:
            yield http


@asynccontextmanager
async def served(folder: Path, *routes: Route) -> AsyncIterator[httpx.AsyncClient]:
    app = SSEApp(routes or ROUTES, Settings(data_dir=folder))
    async with client_of(app) as http, app.running():
        yield http


@asynccontextmanager
async def reading(http: httpx.AsyncClient, path: str) -> AsyncIterator[Reader]:
    async with http.stream("GET", path) as response:
        yield Reader(response)


def data(response: httpx.Response) -> list[Any]:
    return [event.data for event in Decoder().feed(response.content)]


# What every dialect promises


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_the_engines_last_event_is_a_last_one_to_every_dialect(dialect: Dialect) -> None:
    for events in (dialect.error("text", "code", SO_FAR), dialect.cancelled("asked", SO_FAR)):
        told = Decoder().feed(b"".join(map(encode, events)))
        assert dialect.is_last(told[-1])
        assert not any(map(dialect.is_last, told[:-1]))


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
@pytest.mark.parametrize("text", ["", "[", "[1]", "null", '{"type": 5}', "\ud7ff", "[" * 100_000])
def test_no_data_of_a_handler_is_too_strange_for_a_dialect(dialect: Dialect, text: str) -> None:
    event = Event(text)
    assert not dialect.is_last(event)
    assert dialect.cancelled("asked", SoFar(last=event))


def test_a_dialect_that_only_knows_json_is_given_nothing_else() -> None:
    gap = {"reason": "trimmed", "from": 3, "to": 7}
    for dialect in DIALECTS.values():
        events = [*dialect.error("text", "code", SO_FAR), dialect.gap(gap), *dialect.gone(gap)]
        for event in Decoder().feed(b"".join(map(encode, events))):
            assert event.data == "[DONE]" or json.loads(event.data)


def test_two_dialects_of_one_name_are_refused() -> None:
    class Other(Dialect):
        """Without a name of its own."""

    with pytest.raises(ValueError, match=r"^Other: there is another dialect named 'named'"):
        SSEApp([GET("/tick/{what}", ticking, dialect=Other())])
    with pytest.raises(TypeError, match="dialect must be a Dialect"):
        GET("/tick/{what}", ticking, dialect="named")  # type: ignore[arg-type]


# A dialect of a program's own


async def test_a_programs_own_dialect_says_failures_cancellations_and_gaps(tmp_path: Path) -> None:
    async with served(tmp_path) as http:
        assert data(await http.get("/tick/fail")) == ["1", "E not_found 1 1 {'n': 1}"]
        async with reading(http, "/tick/wait") as reader:
            assert (await reader.next()).data == "1"
            await http.delete(f"/runs/{reader.run}")
            assert (await reader.next()).data == "X asked"
        lost = {"last-event-id": f"{new_epoch()}.5", "accept": "text/event-stream"}
        assert data(await http.get("/tick/wait", headers=lost)) == ["G expired"]


async def test_a_run_that_a_crash_left_behind_is_ended_in_its_own_dialect(tmp_path: Path) -> None:
    app = SSEApp(ROUTES, Settings(data_dir=tmp_path))
    async with app.running():
        assert app._services is not None
        log = app._services.runs.log
        runs = [new_epoch() for _ in range(4)]
        notes: list[dict[str, Any]] = [{"dialect": "ticker"}, {"data_only": True}, {"dialect": "of tomorrow"}, {}]
        for run, meta in zip(runs, notes, strict=True):
            await log.create(run, epoch=run, owner=None, meta={"state": "running", **meta})
            await log.append(run, [b"data: 1\n\n"], epoch=run)
    async with served(tmp_path) as http:
        ends = [data(await http.get(f"/runs/{run}/events"))[1:] for run in runs]
        named = '{"error":"the service was stopped","code":"interrupted"}'
        assert ends == [
            ["E interrupted 1 1 {}"],
            ['{"type":"error","error":"the service was stopped","code":"interrupted"}', "[DONE]"],
            [named],
            [named],
        ]


# AG-UI


@pytest.mark.parametrize(
    ("last", "closed"),
    [
        ({"type": "TEXT_MESSAGE_CONTENT", "messageId": "m", "delta": "x"}, ["TEXT_MESSAGE_END"]),
        ({"type": "TOOL_CALL_ARGS", "toolCallId": "c", "delta": "x"}, ["TOOL_CALL_END"]),
        ({"type": "REASONING_MESSAGE_START", "messageId": "m"}, ["REASONING_MESSAGE_END", "REASONING_END"]),
        ({"type": "TEXT_MESSAGE_END", "messageId": "m"}, []),
        ({"type": "RUN_STARTED", "threadId": "t"}, []),
    ],
)
def test_nothing_is_open_when_an_ag_ui_run_is_cancelled(last: dict[str, Any], closed: list[str]) -> None:
    so_far = SoFar("run", {"threadId": "t", "runId": "r"}, 1, Event(json.dumps(last)))
    *before, end = [event.data for event in AG_UI.cancelled("asked", so_far)]
    assert [event["type"] for event in before] == closed
    ids = {key: last[key] for key in last.keys() & {"messageId", "toolCallId"}}
    assert all(event == {"type": event["type"], **ids} for event in before)
    assert end == {"type": "RUN_FINISHED", "threadId": "t", "runId": "r", "outcome": {"type": "cancelled"}}


async def test_where_the_dialect_wants_it_each_id_stands_before_its_data(tmp_path: Path) -> None:
    class First(Ticker):
        name = "first"
        id_first = True

    async def translated(request: Request, id: str) -> Any:
        return await request.runs.view(request, id, translate=lambda event: Event(f"<{event.data}>"))

    routes = [GET("/tick/{what}", ticking, dialect=First(), run=Run()), GET("/translated/{id}", translated)]
    async with served(tmp_path, *routes) as http:
        answer = await http.get("/tick/end")
        run = answer.headers["run-id"]
        assert answer.text.endswith(f"\nid: {run}.1\ndata: 1\n\nid: {run}.2\ndata: .\n\n")
        assert (await http.get(f"/translated/{run}")).text.endswith(f"id: {run}.2\ndata: <.>\n\n")


# Threads, keys, and where a view begins


async def test_the_running_run_of_a_thread_is_found_and_no_other(tmp_path: Path) -> None:
    thread = "a-thread-of-its-own"
    async with served(tmp_path) as http:

        async def found(query: str) -> list[str]:
            return [run["run"] for run in (await http.get(f"/runs?{query}")).json()["runs"]]

        over = (await http.get(f"/tick/end?thread={thread}")).headers["run-id"]
        async with reading(http, f"/tick/wait?thread={thread}") as reader, reading(http, "/tick/wait") as other:
            await reader.next()
            assert await found(f"thread={thread}&state=running") == [reader.run]
            assert await found(f"thread={thread}") == [reader.run, over]
            assert set(await found("state=running")) == {reader.run, other.run}
            assert await found("thread=another-thread-of-all&state=running") == []
        refused = await http.get("/runs?thread=short")
        assert (refused.status_code, refused.json()["field"]) == (400, "thread")
        assert (await http.get("/runs?state=nonsense")).status_code == 400
        refused = await http.get(f"/tick/end?thread={'x' * 256}")
        assert (refused.status_code, refused.json()["field"]) == (400, "thread")


async def test_a_run_that_the_client_names_is_started_once(tmp_path: Path) -> None:
    async with served(tmp_path) as http:
        path = "/tick/end?name=a-name-of-its-own-for-this-run"
        assert (await http.get(path)).headers["run-id"] == (await http.get(path)).headers["run-id"]


async def test_a_view_may_begin_behind_the_first_events(tmp_path: Path) -> None:
    async with served(tmp_path) as http:
        run = (await http.get("/tick/end")).headers["run-id"]
        assert data(await http.get(f"/shown/{run}?after=0")) == ["1", "."]
        assert data(await http.get(f"/shown/{run}?after=1")) == ["."]
        assert (await http.get(f"/shown/{run}?after=2")).status_code == 204
        cursor = {"last-event-id": f"{run}.1"}
        assert data(await http.get(f"/shown/{run}?after=0", headers=cursor)) == ["."]


# Whole answers


async def test_a_route_may_wait_for_the_whole_run_or_stream_it(tmp_path: Path) -> None:
    async with served(tmp_path) as http:
        assert (await http.get("/whole/end")).json() == ["1", "."]
        assert data(await http.get("/whole/end?stream=1")) == ["1", "."]
        kept = {"idempotency-key": "the-same-answer-for-the-same-key"}
        first, second = [await http.get("/whole/end", headers=kept) for _ in range(2)]
        assert first.headers["run-id"] == second.headers["run-id"]


async def test_who_waits_for_the_whole_run_keeps_it_from_lingering(tmp_path: Path) -> None:
    go_on = anyio.Event()

    async def slow(request: Request) -> AsyncIterator[Event]:
        yield Event("1")
        await go_on.wait()
        yield Event(".")

    route = POST("/slow", slow, dialect=NAMED, run=Run(linger_s=0, accepted=whole))
    async with served(tmp_path, route) as http:
        answers: list[httpx.Response] = []

        async def ask(http_post: Callable[..., Any] = http.post) -> None:
            answers.append(await http_post("/slow"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.sleep(0.2)
            go_on.set()
        assert answers[0].json() == ["1", "."]
