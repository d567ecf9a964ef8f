"""Operations on one task, as runs: what they tell, how they end, and that a wrong request starts nothing."""

import csv
import io
import json
import re
import sqlite3
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import anyio
import httpx
import pytest

from handlers import database
from handlers.chat import ChatMessage
from handlers.database import NewTask, open_tasks
from handlers.tasks import OPERATIONS, ROUTES, SUMMARIZE
from sseapp import SSEApp
from ssecore.settings import Settings
from ssecore.testing import Transport
from ssecore.wire import Decoder
from tests import serving
from tests.serving import Server, wait_until
from tests.upstream import DONE, FIRST, STOP, Call, Upstream, answer, refuse, token

LIMIT_S: Final = 20
TITLE, DESCRIPTION = "Write the report", "It needs figures. And who's to read it? Write well-known facts!"
TIME: Final = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
#: Of tasks 1 and 2; the others don't exist.
ROWS: Final = [(TITLE, DESCRIPTION), ("Bare", "")]


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving.serve(tmp_path_factory.mktemp("mock"), env={"SSEAPP_MOCK_DELAY_S": "0"}) as server:
        fill(server, ROWS)
        yield server


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, shared_upstream: Upstream) -> Iterator[Server]:
    # Nothing here lingers: with this, whatever did would be cancelled at once.
    env = {"OPENAI_BASE_URL": shared_upstream.url, "SSEAPP_LINGER_S": "0.01"}
    with serving.serve(tmp_path_factory.mktemp("llm"), env=env) as server:
        fill(server, ROWS)
        yield server


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Iterator[Upstream]:
    shared_upstream.plan()
    yield shared_upstream
    shared_upstream.settle()


@pytest.fixture(scope="module")
def unused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on which no run is ever started."""
    folder = tmp_path_factory.mktemp("unused")

    async def insert() -> None:
        async with open_tasks(folder) as tasks:
            await tasks.insert([NewTask("Only", "", "open", 1, None)])

    anyio.run(insert)
    with serving.serve(folder) as server:
        yield server


def fill(server: Server, rows: Sequence[tuple[str, str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("title", "description"), *rows])
    response = server.client.post("/tasks/import", content=text.getvalue(), headers={"content-type": "text/csv"})
    assert b'"failed":0' in response.content


def request(way: str, task_id: int, operation: str, **headers: str) -> dict[str, Any]:
    """The same request, one way or the other."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if way == "body":
        body = {"task_id": task_id, "operation": operation}
        return {"method": "POST", "url": "/tasks/execute/stream", "json": body, "headers": headers}
    url = f"/tasks/{task_id}/execute/stream"
    return {"method": "POST", "url": url, "params": {"operation": operation}, "headers": headers}


both_ways = pytest.mark.parametrize("way", ["body", "path"])


def execute(server: Server, operation: str, task_id: int = 1, way: str = "body", **headers: str) -> httpx.Response:
    return server.client.request(**request(way, task_id, operation, **headers))


def named(response: httpx.Response, first: int = 1) -> list[tuple[str | None, Any]]:
    """Each event's name and data. Their ids are the run's, without a hole."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    events, run = Decoder().feed(response.read()), response.headers["run-id"]
    assert [event.id for event in events] == [f"{run}.{number}" for number in range(first, first + len(events))]
    return [(event.event, json.loads(event.data)) for event in events]


def checked(events: list[tuple[str | None, Any]], task_id: int = 1) -> list[tuple[str | None, Any]]:
    """What stands between the first event and the last one of an execution that went well."""
    (begin, validating), *steps, (end, complete) = events
    assert (begin, end) == ("status", "complete")
    assert re.fullmatch(TIME, validating.pop("timestamp"))
    assert validating == {"task_id": task_id, "status": "validating"}
    assert re.fullmatch(TIME, complete.pop("timestamp"))
    seconds = complete.pop("duration_seconds")
    assert isinstance(seconds, float) and 0 <= seconds < LIMIT_S
    assert complete == {"task_id": task_id, "status": "completed"}
    for name, data in steps:
        assert name == "result" or re.fullmatch(TIME, data.pop("timestamp"))
    return steps


def runs(server: Server) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = server.client.get("/runs").json()["runs"]
    return listed


def statuses(server: Server) -> dict[int, str]:
    rows = Decoder().feed(server.client.get("/tasks/stream").content)[:-1]
    return {row["id"]: row["status"] for row in (json.loads(row.data) for row in rows)}


# What they do


@both_ways
def test_analyze_tells_figures_about_the_text(mock: Server, way: str) -> None:
    assert checked(named(execute(mock, "analyze", way=way))) == [
        ("status", {"task_id": 1, "step": "count", "progress": 0}),
        ("result", {"step": "count", "result": {"characters": 81, "words": 14, "sentences": 4}, "progress": 50}),
        ("status", {"task_id": 1, "step": "words", "progress": 50}),
        (
            "result",
            {
                "step": "words",
                "result": {"longest_word": "well-known", "average_word_length": 4.57, "distinct_words": 12},
                "progress": 100,
            },
        ),
    ]


FIGURES: Final = [
    (("x", ""), (1, 1, 1, "x", 1.0, 1)),
    (("?!", "..."), (7, 0, 0, "", 0.0, 0)),
    (("It is 3.14", "e.g. here"), (21, 7, 3, "here", 1.86, 7)),
    (("Größe größe GRÖSSE", ""), (18, 3, 1, "GRÖSSE", 5.33, 1)),
    (("日本語。次\uff01", "ok"), (10, 3, 3, "日本語", 2.0, 3)),
    (("don't", "don\u2019t snake_case"), (23, 4, 2, "don't", 4.75, 4)),
    (("a", "." * 10_000), (10_003, 1, 1, "a", 1.0, 1)),
    (("a", "-x" * 5_000), (10_003, 2, 2, "-".join("x" * 5_000), 5000.0, 2)),
    (("a", "\n" * 9_999 + "b"), (10_003, 2, 2, "a", 1.0, 2)),
]


def test_figures_of_any_text(tmp_path: Path) -> None:
    with serving.serve(tmp_path) as server:
        fill(server, [text for text, _ in FIGURES])
        for number, (_, figures) in enumerate(FIGURES, 1):
            results = [data["result"] for name, data in named(execute(server, "analyze", number)) if name == "result"]
            assert tuple(results[0].values()) + tuple(results[1].values()) == figures, number


@both_ways
def test_summarize_asks_the_model(mock: Server, way: str) -> None:
    summary = f"This is a mock response to: {TITLE}\n\n{DESCRIPTION}"
    assert checked(named(execute(mock, "summarize", way=way))) == [
        ("status", {"task_id": 1, "step": "summarize", "progress": 0}),
        ("result", {"step": "summarize", "result": {"summary": summary}, "progress": 100}),
    ]
    bare = checked(named(execute(mock, "summarize", 2, way)), 2)
    assert bare[-1][1]["result"] == {"summary": "This is a mock response to: Bare"}


def test_the_model_gets_the_text_and_is_asked_once(llm: Server, upstream: Upstream) -> None:
    upstream.plan(answer("In", " short"))
    assert checked(named(execute(llm, "summarize")))[-1][1]["result"] == {"summary": "In short"}
    assert [call.json["messages"] for call in upstream.calls] == [
        [{"role": "system", "content": SUMMARIZE}, {"role": "user", "content": f"{TITLE}\n\n{DESCRIPTION}"}]
    ]


@both_ways
def test_finish_sets_done_in_the_database(tmp_path: Path, way: str) -> None:
    with serving.serve(tmp_path) as server:
        fill(server, ROWS)
        for _ in range(2):  # done stays done
            assert checked(named(execute(server, "finish", 2, way)), 2) == [
                ("status", {"task_id": 2, "step": "finish", "progress": 0}),
                ("result", {"step": "finish", "result": {"status": "done"}, "progress": 100}),
            ]
            assert statuses(server) == {1: "open", 2: "done"}


def test_only_finish_writes(mock: Server) -> None:
    for operation in set(OPERATIONS) - {"finish"}:
        checked(named(execute(mock, operation)))
    assert statuses(mock) == {1: "open", 2: "open"}


# As they go


def held(call: Call) -> None:
    """An answer that begins and never goes on."""
    call.head()
    call.send(FIRST, token("In"))
    call.wait_gone()


@contextmanager
def streaming(server: Server, operation: str) -> Iterator[tuple[httpx.Response, Iterator[bytes]]]:
    with server.client.stream(**request("path", 1, operation)) as response:
        yield response, response.iter_raw()


def read_until(chunks: Iterator[bytes], end: bytes) -> bytes:
    seen = b""
    while end not in seen:
        seen += next(chunks)
    return seen


def test_a_step_is_told_before_its_work_is_done_and_cancelling_ends_the_work(llm: Server, upstream: Upstream) -> None:
    upstream.plan(held)
    with streaming(llm, "summarize") as (response, chunks):
        seen = read_until(chunks, b'"step":"summarize"')
        upstream.wait_call()
        assert llm.client.delete(f"/runs/{response.headers['run-id']}").status_code == 202
        events = Decoder().feed(seen + b"".join(chunks))
    upstream.settle()  # the model was left
    assert [event.event for event in events] == ["status", "status", "cancelled"]
    assert json.loads(events[-1].data) == {"reason": "asked"}


def test_an_execution_goes_on_when_its_client_leaves(llm: Server, upstream: Upstream) -> None:
    go_on = threading.Event()

    def script(call: Call) -> None:
        call.head()
        call.send(token("In"))
        assert go_on.wait(LIMIT_S)
        call.send(token(" short"), STOP, DONE)
        call.end()

    upstream.plan(script)
    with streaming(llm, "summarize") as (response, chunks):
        read_until(chunks, b'"step":"summarize"')
        run = response.headers["run-id"]
    go_on.set()
    events = named(llm.client.get(f"/runs/{run}/events"))
    assert checked(events)[-1][1]["result"] == {"summary": "In short"}
    (state,) = wait_until(lambda: [one for one in runs(llm) if one["run"] == run and one["state"] != "running"])
    assert (state["state"], state["route"]) == ("completed", "POST /tasks/{task_id:int}/execute/stream")


# Failures in the middle


def cut(call: Call) -> None:
    call.head()
    call.send(FIRST, token("In"))


@pytest.mark.parametrize(
    ("script", "text", "type"),
    [
        (refuse(401), "the model's server rejected this service's credentials: check OPENAI_API_KEY", "upstream_auth"),
        (
            refuse(429, retry_after="60"),
            "the model's rate limit is reached; try again in 60 s",
            "upstream_rate_limited",
        ),
        (cut, "the model's answer was cut off", "upstream_cut"),
    ],
    ids=["refused", "limited", "cut"],
)
def test_a_failure_in_the_middle_is_the_last_event(
    llm: Server, upstream: Upstream, script: Any, text: str, type: str
) -> None:
    upstream.plan(script)
    begin, step, end = named(execute(llm, "summarize"))
    assert re.fullmatch(TIME, step[1].pop("timestamp"))
    assert (begin[0], step) == ("status", ("status", {"task_id": 1, "step": "summarize", "progress": 0}))
    assert end == ("error", {"error": text, "type": type, "task_id": 1})
    assert len(upstream.calls) == 1


class BrokenModel:
    async def stream(self, messages: Sequence[ChatMessage]) -> AsyncGenerator[str, None]:
        yield "In"
        raise RuntimeError("a secret")


@asynccontextmanager
async def app_client(data_dir: Path) -> AsyncIterator[httpx.AsyncClient]:
    @asynccontextmanager
    async def resources(app: SSEApp) -> AsyncIterator[Any]:
        async with open_tasks(data_dir) as tasks:
            await tasks.insert([NewTask(TITLE, DESCRIPTION, "open", 1, None)])
            yield SimpleNamespace(tasks=tasks, model=BrokenModel())

    app = SSEApp(ROUTES, Settings(log="memory"), lifespan=resources)
    with anyio.fail_after(LIMIT_S):
        async with app.running(), httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as client:
            yield client


async def test_an_unforeseen_failure_says_nothing_of_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with app_client(tmp_path) as client:
        *_, (name, error) = named(await client.request(**request("body", 1, "summarize")))
    reference = re.fullmatch(r"internal error \(reference ([0-9a-f]{12})\)", error.pop("error"))
    assert (name, error) == ("error", {"type": "internal_error", "task_id": 1})
    assert reference and reference[1] in caplog.text and "a secret" in caplog.text


async def test_a_task_that_goes_away_in_the_middle_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_status = database._set_status

    def too_late(id: int, status: database.Status, connection: sqlite3.Connection) -> bool:
        connection.execute("DELETE FROM tasks WHERE id = ?", (id,))
        return set_status(id, status, connection)

    monkeypatch.setattr(database, "_set_status", too_late)
    async with app_client(tmp_path) as client:
        *_, end = named(await client.request(**request("path", 1, "finish")))
    assert end == ("error", {"error": "task 1 was deleted", "type": "not_found", "task_id": 1})


# Resuming, and asking twice


@both_ways
def test_an_execution_goes_on_after_the_last_event_id(mock: Server, way: str) -> None:
    whole = execute(mock, "analyze", way=way)
    events, run, before = named(whole), whole.headers["run-id"], runs(mock)
    for number in range(len(events)):
        rest = execute(mock, "analyze", way=way, last_event_id=f"{run}.{number}")
        assert rest.headers["run-id"] == run
        assert named(rest, number + 1) == events[number:]
    assert execute(mock, "analyze", way=way, last_event_id=f"{run}.{len(events)}").status_code == 204
    assert execute(mock, "analyze", way=way, last_event_id="end").status_code == 204
    other = "path" if way == "body" else "body"
    assert execute(mock, "analyze", way=other, last_event_id=f"{run}.1").status_code == 409
    assert execute(mock, "analyze", way=way, last_event_id=f"{run}.x").status_code == 400
    assert runs(mock) == before  # nothing was started


@both_ways
def test_one_key_is_one_execution(llm: Server, upstream: Upstream, way: str) -> None:
    upstream.plan(answer("In short"))
    key = f"execute-0123456789-{way}"
    first, second = (execute(llm, "summarize", way=way, idempotency_key=key) for _ in range(2))
    assert checked(named(first))[-1][1]["result"] == {"summary": "In short"}
    assert (second.content, second.headers["run-id"]) == (first.content, first.headers["run-id"])
    assert execute(llm, "analyze", way=way, idempotency_key=key).status_code == 422
    assert len(upstream.calls) == 1


def test_an_execution_that_fails_at_once_leaves_its_key_free(tmp_path: Path) -> None:
    with serving.serve(tmp_path) as server:
        key = "execute-0123456789-free"
        assert execute(server, "analyze", way="path", idempotency_key=key).status_code == 404
        fill(server, ROWS)
        checked(named(execute(server, "analyze", way="path", idempotency_key=key)))


@both_ways
def test_respond_async_is_told_where_to_read(mock: Server, way: str) -> None:
    response = execute(mock, "analyze", way=way, prefer="respond-async")
    run = response.headers["run-id"]
    assert response.status_code == 202
    assert response.json() == {"run": run, "events": response.headers["location"]}
    assert response.url.join(response.headers["location"]).path == f"/runs/{run}/events"
    checked(named(mock.client.get(f"/runs/{run}/events")))


# Bad inputs


def refused(server: Server, response: httpx.Response, status: int, field: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem.get("field")) == (status, field)
    assert runs(server) == []


@both_ways
@pytest.mark.parametrize("prefer", ["", "respond-async"])
@pytest.mark.parametrize("task_id", [2, 10**18 - 1])
def test_an_unknown_task_is_a_404(unused: Server, way: str, prefer: str, task_id: int) -> None:
    for operation in OPERATIONS:
        response = execute(unused, operation, task_id, way, prefer=prefer)
        refused(unused, response, 404)
        assert response.json()["detail"] == f"there is no task {task_id}"
    assert statuses(unused) == {1: "open"}
