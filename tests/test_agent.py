"""The agent's four routes: what each tells, over the mock and over a model that chooses tools; sessions; faults."""

import csv
import io
import json
import re
import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers import chat, tools
from handlers.agent import BY_MODEL, BY_PLANNER, MAX_CALLS, MAX_ROUNDS, ROUTES
from handlers.chat import MockModel, open_model
from handlers.database import NewTask, Tasks, open_tasks
from handlers.planner import plan
from handlers.tools import DESCRIPTIONS, use
from ssecore.errors import Unavailable
from ssecore.settings import Settings
from ssecore.wire import Decoder, Event
from tests import serving
from tests.clients import Answer, AppWithCallers, ask
from tests.serving import Server, wait_until
from tests.upstream import (
    DONE,
    FIRST,
    LIMIT_S,
    STOP,
    Call,
    Script,
    Upstream,
    answer,
    chunk,
    refuse,
    silent,
    token,
)
from tests.upstream import serve as serve_upstream

KEY: Final = "sk-test-0123456789"
ROWS: Final = [
    ("Send the invoice", "to Berlin", "open", 1, "2020-01-31"),
    ("Invoice of May", "", "done", 2, ""),
    ("Write the report", "of the quarter", "doing", 3, ""),
]
INVOICES: Final = [{"id": 1, "title": "Send the invoice"}, {"id": 2, "title": "Invoice of May"}]
MAY, BERLIN = "#2 Invoice of May (done, priority 2)", "#1 Send the invoice (open, priority 1, due 2020-01-31)"
FOUND: Final = f"I found 2 tasks:\n- {MAY}\n- {BERLIN}"
CITED: Final = f"I found 2 tasks:\n- {BERLIN}\n- {MAY}"
SESSION: Final = "0123456789012345678901"


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving.serve(tmp_path_factory.mktemp("mock"), env={"SSEAPP_MOCK_DELAY_S": "0"}) as server:
        fill(server)
        yield server


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, shared_upstream: Upstream) -> Iterator[Server]:
    env = {"OPENAI_BASE_URL": shared_upstream.url, "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "m", "SSEAPP_LINGER_S": "0.2"}
    with serving.serve(tmp_path_factory.mktemp("llm"), env=env) as server:
        fill(server)
        yield server


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Iterator[Upstream]:
    shared_upstream.plan()
    yield shared_upstream
    shared_upstream.settle()


def fill(server: Server) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("title", "description", "status", "priority", "due"), *ROWS])
    response = server.client.post("/tasks/import", content=text.getvalue(), headers={"content-type": "text/csv"})
    assert b'"imported":3,"failed":0' in response.content


#: How each route is asked, and how it ends.
ASK: Final[dict[str, tuple[str, str]]] = {
    "stream": ("GET", "/agent/stream"),
    "think": ("GET", "/agent/think/stream"),
    "process": ("POST", "/agent/process/stream"),
    "chat": ("POST", "/api/chat"),
}
each_route = pytest.mark.parametrize("route", ASK)


def request(route: str, query: str, **more: Any) -> dict[str, Any]:
    method, url = ASK[route]
    if route == "chat":
        return {"method": method, "url": url, "json": {"message": query, **more}}
    return {"method": method, "url": url, "params": {"query": query}}


def tell(server: Server, route: str, query: str, **more: Any) -> list[tuple[str | None, Any]]:
    return named(server.client.request(**request(route, query, **more)))


def named(response: httpx.Response, first: int = 1) -> list[tuple[str | None, Any]]:
    """Each event's name and data. Their ids are the run's, without a hole."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    events, run = Decoder().feed(response.read()), response.headers["run-id"]
    assert [event.id for event in events] == [f"{run}.{number}" for number in range(first, first + len(events))]
    return [(event.event, decoded(event)) for event in events]


def decoded(event: Event) -> Any:
    return event.data if event.data == "[DONE]" else json.loads(event.data)


def runs(server: Server) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = server.client.get("/runs").json()["runs"]
    return listed


def statuses(*stages: str) -> list[tuple[str | None, Any]]:
    return [(None, {"type": "status", "status": stage}) for stage in stages]


def chunks(*texts: str) -> list[tuple[str | None, Any]]:
    return [(None, {"type": "chunk", "content": text}) for text in texts]


def result(content: str, sources: Sequence[Any], disclaimer: str) -> list[tuple[str | None, Any]]:
    data = {"type": "result", "content": content, "sources": sources, "disclaimer": disclaimer}
    return [(None, data), (None, "[DONE]")]


def tokens(*texts: str) -> list[tuple[str | None, Any]]:
    return [("token", {"token": text}) for text in texts]


# The four vocabularies, over the planner


def test_stream_tells_thoughts_and_tokens(mock: Server) -> None:
    assert tell(mock, "stream", "How many tasks are open?") == [
        ("status", {"message": "Reading the question"}),
        ("thought", {"step": 1, "total": 3, "thought": "The question is: How many tasks are open?"}),
        ("thought", {"step": 2, "total": 3, "thought": "I call count_tasks."}),
        ("thought", {"step": 3, "total": 3, "thought": "I answer from 1 result."}),
        *tokens("I ", "counted ", "1 ", "task ", "(status ", "open)."),
        ("complete", {"done": True, "query": "How many tasks are open?"}),
    ]


def test_think_tells_its_planning(mock: Server) -> None:
    assert tell(mock, "think", "invoice") == [
        ("thought", {"type": "initial", "message": "The question is: invoice"}),
        ("thought", {"type": "planning", "step": 1, "total_steps": 2, "message": "I call search_tasks."}),
        (
            "thought",
            {
                "type": "planning",
                "step": 2,
                "total_steps": 2,
                "message": "I answer from 1 result and 2 tasks.",
            },
        ),
        ("status", {"message": "Writing the answer"}),
        *tokens(*re.findall(r"\S+\s*", FOUND)),
        (
            "complete",
            {"message": "The answer is complete", "thoughts_count": 3, "response_length": len(FOUND)},
        ),
    ]


def test_process_tells_its_tools(mock: Server) -> None:
    assert tell(mock, "process", "What is 2 + 2 * 3, and how many tasks per status?") == [
        (
            "thinking",
            {
                "step": "understanding",
                "message": "The question is: What is 2 + 2 * 3, and how many tasks per status?",
            },
        ),
        (
            "thinking",
            {
                "step": "planning",
                "message": "I call calculate and count_tasks.",
                "plan": ["calculate", "count_tasks"],
            },
        ),
        ("tool", {"tool": "calculate", "status": "calling"}),
        ("tool", {"tool": "calculate", "status": "complete", "result": {"expression": "2 + 2 * 3", "value": "8"}}),
        ("tool", {"tool": "count_tasks", "status": "calling"}),
        (
            "tool",
            {
                "tool": "count_tasks",
                "status": "complete",
                "result": {"count": 3, "by": "status", "groups": {"doing": 1, "done": 1, "open": 1}},
            },
        ),
        *tokens("2 ", "+ ", "2 ", "* ", "3 ", "= ", "8\n\n"),
        *tokens("I ", "counted ", "3 ", "tasks. ", "By ", "status: ", "doing ", "1, ", "done ", "1, ", "open ", "1."),
        ("complete", {"message": "The answer is complete", "tokens": 19}),
    ]


def test_chat_tells_its_result_with_the_rows_that_it_found(mock: Server) -> None:
    assert tell(mock, "chat", "the Berlin invoices or the invoice") == [
        *statuses("analyzing", "planning", "retrieving", "synthesizing"),
        *chunks(*re.findall(r"\S+\s*", CITED)),
        *result(CITED, INVOICES, BY_PLANNER),
    ]


def test_question_without_a_word_is_answered_without_a_tool(mock: Server) -> None:
    events = tell(mock, "chat", "?!")
    assert events[:3] == statuses("analyzing", "planning", "synthesizing")
    assert events[-2][1]["content"].startswith("The question has no word")
    assert tell(mock, "process", "?!")[1][1]["plan"] == []


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("What is 9**9**9?", "I could not do that: expression: the result is too large."),
        ("flowers", "I found no task that matches."),
        ("Show me all of the tasks that are in progress", "I found 1 task:\n- #3 Write the report (doing, priority 3)"),
        ("How many tasks are overdue?", "I counted 1 task (due overdue)."),
    ],
)
def test_answer_says_what_the_tools_gave(mock: Server, query: str, told: str) -> None:
    assert tell(mock, "chat", query)[-2][1]["content"] == told


def test_answer_tells_the_date(mock: Server) -> None:
    before = datetime.now(UTC)
    content = tell(mock, "chat", "What day is it today?")[-2][1]["content"]
    days = {f"Today is {day:%A}, {day.day} {day:%B %Y}, " for day in (before, datetime.now(UTC))}
    assert content[: content.index(", ", 25) + 2 :] in days
    assert re.search(r", \d\d:\d\d UTC\.$", content)


@pytest.mark.parametrize(
    ("question", "calls"),
    [
        ("what is 2+2?", [("calculate", {"expression": "2+2"})]),
        ("Calculate 12 times (3 plus 1) divided by 4", [("calculate", {"expression": "12 * (3 + 1) / 4"})]),
        ("calculate 24/7", [("calculate", {"expression": "24/7"})]),
        ("24/7 support", [("search_tasks", {"words": "24 7 support", "match": "any"})]),
        ("what happened on 2026-12-31?", [("search_tasks", {"words": "happened 2026-12-31", "match": "any"})]),
        ("how many tasks mention an invoice", [("count_tasks", {"words": "invoice"})]),
        ("count tasks by priority", [("count_tasks", {"by": "priority"})]),
        ("count the tasks with priority 2", [("count_tasks", {"priority": 2})]),
        ("tasks due this week", [("search_tasks", {"due": "week"})]),
        ("tasks without a due date", [("search_tasks", {"due": "none"})]),
        ("list all", [("search_tasks", {})]),
        ("today's date and how many are done", [("today", {}), ("count_tasks", {"status": "done"})]),
        ("tell me", [("search_tasks", {"words": "tell me", "match": "any"})]),
        ("x" * 8000, [("search_tasks", {"words": "x" * 200, "match": "any"})]),
        ("\u2028 \0 ...", []),
    ],
)
def test_plan_is_made_from_the_words_of_a_question(question: str, calls: list[tuple[str, Any]]) -> None:
    assert [(call.name, json.loads(call.arguments)) for call in plan(question)] == calls


def test_plan_goes_on_with_what_the_question_before_was_about() -> None:
    (call,) = plan("And how many of them are done?", ["List the Berlin tasks that are open"])
    assert (call.name, json.loads(call.arguments)) == ("count_tasks", {"words": "berlin", "status": "done"})
    (call,) = plan("How many are done?", ["List the Berlin tasks that are open"])
    assert json.loads(call.arguments) == {"status": "done"}


@given(st.text(max_size=300) | st.text("0123 +-*/(.)e2%^", max_size=100))
def test_any_question_has_a_plan_that_the_tools_take(question: str) -> None:
    for call in plan(question):
        assert call.name in {description["function"]["name"] for description in DESCRIPTIONS}
        json.loads(call.arguments)


# The tools


@pytest.fixture
async def tasks(tmp_path: Path) -> AsyncIterator[Tasks]:
    with anyio.fail_after(LIMIT_S):
        async with open_tasks(tmp_path) as tasks:
            await tasks.insert([NewTask(*row[:4], row[4] or None) for row in ROWS])
            yield tasks


async def test_a_search_gives_rows(tasks: Tasks) -> None:
    found = await use(tasks, "search_tasks", '{"words": "invoice", "status": "open", "limit": 1}')
    (row,) = found.pop("tasks")
    assert found == {"found": 1}
    assert row.pop("created")
    assert row == {
        "id": 1,
        "title": "Send the invoice",
        "description": "to Berlin",
        "status": "open",
        "priority": 1,
        "due": "2020-01-31",
    }


async def test_what_models_write_for_nothing_is_nothing(tasks: Tasks) -> None:
    assert await use(tasks, "count_tasks", '{"words": "", "status": null, "priority": "2", "by": null}') == {"count": 1}
    assert await use(tasks, "count_tasks", "") == {"count": 3}
    assert (await use(tasks, "today", '{"timezone": "Berlin"}'))["timezone"] == "UTC"


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        (
            "delete_tasks",
            "{}",
            "unknown tool 'delete_tasks': the tools are search_tasks, count_tasks, calculate, today",
        ),
        ("x" * 1000, "{}", "unknown tool 'xxx"),
        ("search_tasks", '{"limit": 21}', "invalid arguments: Expected `int` <= 20 - at `$.limit`"),
        ("search_tasks", '{"limit": "many"}', "Expected `int`, got `str` - at `$.limit`"),
        ("search_tasks", '{"status": "lost"}', "Invalid enum value 'lost' - at `$.status`"),
        ("search_tasks", json.dumps({"words": "x" * 201}), "Expected `str` of length <= 200 - at `$.words`"),
        ("search_tasks", '{"words": "?!"}', "words: must contain a word"),
        ("search_tasks", '{"sql": "DROP TABLE tasks"}', "unknown field `sql`"),
        ("count_tasks", '{"by": "title"}', "Invalid enum value 'title'"),
        ("count_tasks", '{"priority": 6}', "Expected `int` <= 5"),
        ("calculate", "{}", "missing required field `expression`"),
        ("calculate", '{"expression": "9**9**9"}', "expression: the result is too large"),
        ("calculate", json.dumps({"expression": "1" * 201}), "Expected `str` of length <= 200"),
        ("calculate", '{"expression": "2', "the arguments are not a JSON object"),
        ("calculate", "[1]", "invalid arguments: Expected `object`, got `array`"),
        ("calculate", '{"expression": "\\ud800"}', "the arguments are not a JSON object"),
        ("calculate", '{"expression": ' + "[" * 100_000, "the arguments are not a JSON object"),
    ],
)
async def test_a_call_that_can_t_be_done_has_a_result_that_says_so(
    tasks: Tasks, name: str, arguments: str, told: str
) -> None:
    result = await use(tasks, name, arguments)
    assert result.keys() == {"error"}
    assert told in result["error"]


async def test_a_database_that_is_away_is_a_result(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    async def count(*arguments: Any) -> Any:
        raise Unavailable("can't use the tasks database at the moment: locked")

    monkeypatch.setattr(tasks, "count", count)
    assert await use(tasks, "count_tasks", "{}") == {"error": "can't use the tasks database at the moment: locked"}


async def test_a_value_is_told_as_people_write_it(tasks: Tasks) -> None:
    for expression, value in [
        ("0.1 + 0.2", "0.3"),
        ("10 / 4", "2.5"),
        ("2**100", str(2**100)),
        ("1 / 3", "0.333333333333"),
    ]:
        assert (await use(tasks, "calculate", json.dumps({"expression": expression})))["value"] == value


def test_each_tool_is_described_with_its_bounds() -> None:
    described = {description["function"]["name"]: description["function"] for description in DESCRIPTIONS}
    assert list(described) == ["search_tasks", "count_tasks", "calculate", "today"]
    search = described["search_tasks"]["parameters"]
    assert search["properties"]["limit"] == {
        "description": "how many of them to give",
        "type": "integer",
        "minimum": 1,
        "maximum": tools.MAX_ROWS,
        "default": 10,
    }
    assert search["additionalProperties"] is False
    assert "$ref" not in json.dumps(DESCRIPTIONS)


# A model that chooses tools


def calling(*calls: tuple[str, str], before: Sequence[str] = (), size: int = 1000) -> Script:
    """An answer with tool calls, their arguments in pieces of this size."""

    def script(call: Call) -> None:
        call.head()
        call.send(FIRST, *map(token, before))
        for index, (name, arguments) in enumerate(calls):
            begin = {"index": index, "id": f"call_{index}x", "type": "function"}
            call.send(chunk({"tool_calls": [begin | {"function": {"name": name, "arguments": ""}}]}))
            for at in range(0, len(arguments), size):
                piece = {"index": index, "function": {"arguments": arguments[at : at + size]}}
                call.send(chunk({"tool_calls": [piece]}))
        call.send(chunk({}, "tool_calls"), DONE)
        call.end()

    return script


def test_model_chooses_tools_and_writes_the_answer(llm: Server, upstream: Upstream) -> None:
    upstream.plan(
        calling(("search_tasks", '{"words": "invoice"}'), ("calculate", '{"expression": "6*7"}'), size=1),
        calling(("count_tasks", '{"by": "status"}')),
        answer("Two", " invoices."),
    )
    assert tell(llm, "chat", "Which invoices are there?") == [
        *statuses("analyzing", "planning", "retrieving", "synthesizing"),
        *chunks("Two", " invoices."),
        *result("Two invoices.", INVOICES[::-1], BY_MODEL),
    ]
    first, second, third = (call.json for call in upstream.calls)
    assert first["tools"] == DESCRIPTIONS
    assert "tool_choice" not in first
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert first["messages"][1]["content"] == "Which invoices are there?"

    asked, found, computed = second["messages"][2:]
    assert asked == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_0x",
                "type": "function",
                "function": {"name": "search_tasks", "arguments": '{"words": "invoice"}'},
            },
            {
                "id": "call_1x",
                "type": "function",
                "function": {"name": "calculate", "arguments": '{"expression": "6*7"}'},
            },
        ],
    }
    assert (found["role"], found["tool_call_id"], computed["tool_call_id"]) == ("tool", "call_0x", "call_1x")
    assert json.loads(found["content"])["found"] == 2
    assert json.loads(computed["content"]) == {"expression": "6*7", "value": "42"}
    assert [message["role"] for message in third["messages"][5:]] == ["assistant", "tool"]


def test_each_vocabulary_tells_a_model_s_rounds(llm: Server, upstream: Upstream) -> None:
    script = (calling(("count_tasks", "{}")), answer("Three", "."))
    upstream.plan(*script)
    assert [name for name, _ in tell(llm, "stream", "How many?")] == [
        "status",
        *["thought"] * 3,
        *["token"] * 2,
        "complete",
    ]
    upstream.plan(*script)
    assert [name for name, _ in tell(llm, "think", "How many?")] == [
        *["thought"] * 3,
        "status",
        *["token"] * 2,
        "complete",
    ]
    upstream.plan(*script)
    assert [name for name, _ in tell(llm, "process", "How many?")] == [
        *["thinking"] * 2,
        *["tool"] * 2,
        *["token"] * 2,
        "complete",
    ]


@each_route
def test_model_may_answer_without_a_tool_or_say_nothing(llm: Server, upstream: Upstream, route: str) -> None:
    upstream.plan(answer("Hello"), answer())
    spoken, silent = tell(llm, route, "Hi"), tell(llm, route, "Hi")
    thoughts = [data for name, data in spoken if name in ("thought", "thinking")]
    assert len(thoughts) == {"stream": 3, "think": 3, "process": 2, "chat": 0}[route]
    if route == "chat":
        assert spoken[:3] == silent[:3] == statuses("analyzing", "planning", "synthesizing")
        assert silent[3:] == result("", [], BY_MODEL)
    else:
        assert [event for event in spoken if event[0] == "token"] == tokens("Hello")
        assert [name for name, _ in silent] == [name for name, _ in spoken if name != "token"]


def test_what_a_model_says_before_it_calls_is_a_part_of_the_answer(llm: Server, upstream: Upstream) -> None:
    upstream.plan(calling(("count_tasks", "{}"), before=["I'll", " count."]), answer("Three."))
    assert tell(llm, "chat", "How many?") == [
        *statuses("analyzing", "planning", "synthesizing"),
        *chunks("I'll", " count."),
        *statuses("retrieving", "synthesizing"),
        *chunks("\n\n", "Three."),
        *result("I'll count.\n\nThree.", [], BY_MODEL),
    ]
    assert upstream.calls[1].json["messages"][2]["content"] == "I'll count."


def test_malformed_arguments_are_told_to_the_model_and_not_sent_back(llm: Server, upstream: Upstream) -> None:
    upstream.plan(calling(("count_tasks", '{"by": "sta'), ("no_such_tool", "{}")), answer("Sorry."))
    events = tell(llm, "process", "How many?")
    results = [data["result"]["error"] for name, data in events if name == "tool" and data["status"] == "complete"]
    assert results[0] == "the arguments are not a JSON object"
    assert results[1].startswith("unknown tool 'no_such_tool'")
    asked, *told = upstream.calls[1].json["messages"][2:]
    assert [call["function"]["arguments"] for call in asked["tool_calls"]] == ["{}", "{}"]
    assert [json.loads(message["content"])["error"] for message in told] == results


def test_rounds_and_calls_are_bounded(llm: Server, upstream: Upstream) -> None:
    many = calling(*[("today", "{}")] * (MAX_CALLS + 1))
    upstream.plan(many, *[calling(("today", "{}"))] * MAX_ROUNDS)
    *_, failure, end = tell(llm, "chat", "Go on")
    assert (failure, end) == (
        (None, {"type": "error", "message": "the model requested tools too many times", "code": "upstream_tools"}),
        (None, "[DONE]"),
    )
    asked = [call.json.get("tool_choice") for call in upstream.calls]
    assert asked == [None] * MAX_ROUNDS + ["none"]
    told = [message for message in upstream.calls[1].json["messages"] if message["role"] == "tool"]
    assert ["error" in json.loads(message["content"]) for message in told] == [False] * MAX_CALLS + [True]
    assert runs(llm)[0]["state"] == "failed"


@pytest.mark.parametrize("status", [400, 404, 422, 501])
def test_server_that_refuses_tools_writes_from_what_the_planner_found(
    llm: Server, upstream: Upstream, status: int
) -> None:
    upstream.plan(refuse(status, b'{"error": "m does not support tools"}'), answer("Two."))
    assert tell(llm, "chat", "invoice") == [
        *statuses("analyzing", "planning", "retrieving", "synthesizing"),
        *chunks("Two."),
        *result("Two.", INVOICES[::-1], BY_MODEL),
    ]
    told = upstream.calls[1].json
    assert "tools" not in told
    assert told["messages"][-1] == {"role": "user", "content": f"Facts: {FOUND}\n\nQuestion: invoice"}


def test_request_that_is_refused_without_tools_too_is_an_error(llm: Server, upstream: Upstream) -> None:
    upstream.plan(refuse(400), refuse(400))
    *_, (_, failure), _ = tell(llm, "chat", "invoice")
    assert failure["code"] == "upstream_error"


# Faults of the model


def cut(call: Call) -> None:
    call.head()
    call.send(FIRST, chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "today", "arguments": "{"}}]}))
    call.end()


def sending(*pieces: bytes) -> Script:
    def script(call: Call) -> None:
        call.head()
        call.send(*pieces)
        call.end()

    return script


FAULTS: Final[dict[str, tuple[Script, str]]] = {
    "401": (refuse(401, json.dumps({"error": f"bad key {KEY}"}).encode()), "upstream_auth"),
    "429": (refuse(429, retry_after="60"), "upstream_rate_limited"),
    "500": (refuse(500), "upstream_error"),
    "cut in a call": (cut, "upstream_cut"),
    "cut in the text": (sending(FIRST), "upstream_cut"),
    "reset": (Call.reset, "upstream_cut"),
    "no JSON": (sending(FIRST, b'data: {"choices": [\n\n', STOP, DONE), "upstream_malformed"),
    "choices of another type": (sending(b'data: {"choices": {"delta": {}}}\n\n', STOP, DONE), "upstream_malformed"),
    "an error object": (sending(FIRST, b'data: {"error": {"message": "boom"}}\n\n', STOP, DONE), "upstream_error"),
    "HTML": (refuse(200, b"<html>", content_type="text/html"), "upstream_malformed"),
}
faults = pytest.mark.parametrize(("fault", "code"), FAULTS.values(), ids=FAULTS)


@faults
@each_route
def test_fault_in_the_first_round_is_an_event(
    llm: Server, upstream: Upstream, route: str, fault: Script, code: str
) -> None:
    upstream.plan(fault)
    failed(llm, tell(llm, route, "How many?"), route, code)
    assert len(upstream.calls) == 1


@faults
def test_fault_behind_a_tool_and_a_token_is_an_event(llm: Server, upstream: Upstream, fault: Script, code: str) -> None:
    session = uuid.uuid4().hex
    upstream.plan(calling(("count_tasks", "{}"), before=["Well."]), fault)
    events = tell(llm, "chat", "How many?", session_id=session)
    assert events[:5] == [
        *statuses("analyzing", "planning", "synthesizing"),
        *chunks("Well."),
        *statuses("retrieving"),
    ]
    failed(llm, events, "chat", code)

    upstream.plan(answer("Hi"))  # and nothing of it is in the session
    tell(llm, "chat", "Hi", session_id=session)
    assert len(upstream.calls[0].json["messages"]) == 2


def failed(server: Server, events: list[tuple[str | None, Any]], route: str, code: str) -> None:
    if route == "chat":
        assert events.pop() == (None, "[DONE]")
        name, data = events.pop()
        assert name is None
        assert data == {"type": "error", "message": data["message"], "code": code}
        text = data["message"]
    else:
        name, data = events.pop()
        assert (name, data) == ("error", {"error": data["error"], "code": code})
        text = data["error"]
    assert text.startswith("the model") and KEY not in text and "boom" not in text
    assert "result" not in [data.get("type") for _, data in events]
    assert "complete" not in [name for name, _ in events]
    assert runs(server)[0]["state"] == "failed"


def test_long_retry_after_is_told(llm: Server, upstream: Upstream) -> None:
    upstream.plan(refuse(429, retry_after="60"))
    assert tell(llm, "chat", "Hi")[-2][1]["message"] == "the model's rate limit is reached; try again in 60 s"


@pytest.mark.parametrize("before", [[], [FIRST], [FIRST, token("Hi")]], ids=["head", "first token", "next token"])
async def test_silence_of_the_model_is_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[bytes]
) -> None:
    monkeypatch.setattr(chat, "READ_TIMEOUT_S", 0.1)
    monkeypatch.setenv("no_proxy", "*")
    with serve_upstream() as upstream:
        upstream.plan(calling(("count_tasks", "{}")), silent(*before))
        async with open_model(Settings(openai_base_url=upstream.url)) as model, service(tmp_path, model) as app:
            *_, failure, end = [decoded(event) for event in (await say(app, "How many?", None)).events]
        upstream.settle()
    assert (failure["type"], failure["code"], end) == ("error", "upstream_timeout", "[DONE]")


def test_steps_and_tokens_go_on_as_they_come(llm: Server, upstream: Upstream) -> None:
    told = threading.Semaphore(0)

    def script(call: Call) -> None:
        assert told.acquire(timeout=LIMIT_S)
        call.head()
        for text in ("a", "b"):
            call.send(token(text))
            assert told.acquire(timeout=LIMIT_S)
        call.send(STOP, DONE)
        call.end()

    upstream.plan(script)
    with llm.client.stream(**request("stream", "Hi")) as response:
        seen, parts = b"", response.iter_raw()
        for wanted in (b'"step":1', b'{"token":"a"}', b'{"token":"b"}'):
            while wanted not in seen:
                seen += next(parts)
            told.release()
        assert re.search(rb'{"done":true,"query":"Hi"}\nid: .*\n\n\Z', b"".join(parts))


# Cancelling, leaving, resuming


def test_cancel_in_the_middle_of_a_round_ends_the_work(llm: Server, upstream: Upstream) -> None:
    def script(call: Call) -> None:
        call.head()
        call.send(FIRST, chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "today"}}]}))
        call.wait_gone()

    upstream.plan(calling(("count_tasks", "{}")), script)
    prefer = {"prefer": "respond-async"}
    session = uuid.uuid4().hex
    run = llm.client.request(**request("chat", "Hi", session_id=session), headers=prefer).json()["run"]
    upstream.wait_call(2)
    assert llm.client.delete(f"/runs/{run}").status_code == 202
    upstream.settle()  # the model is left
    events = Decoder().feed(llm.client.get(f"/runs/{run}/events").content)
    assert [json.loads(event.data) for event in events[:-2]] == [
        {"type": "status", "status": status} for status in ("analyzing", "planning", "retrieving")
    ]
    assert [event.data for event in events[-2:]] == ['{"type":"cancelled","reason":"asked"}', "[DONE]"]

    upstream.plan(answer("Hi"))
    tell(llm, "chat", "Hi", session_id=session)
    assert len(upstream.calls[0].json["messages"]) == 2  # what was cancelled is not in the session


@each_route
def test_agent_that_nobody_reads_any_more_is_ended(llm: Server, upstream: Upstream, route: str) -> None:
    def script(call: Call) -> None:
        call.head()
        call.send(token("Hi"))
        call.wait_gone()

    upstream.plan(script)
    with llm.client.stream(**request(route, "Hi")) as response:
        seen, parts = b"", response.iter_raw()
        while b'"Hi"}' not in seen:
            seen += next(parts)
    upstream.settle()
    wait_until(lambda: runs(llm)[0]["state"] == "cancelled")


@each_route
def test_each_id_resumes_with_exactly_the_rest(mock: Server, route: str) -> None:
    asked = request(route, "invoice")
    whole = mock.client.request(**asked)
    run, events = whole.headers["run-id"], named(whole)
    for seen in range(len(events)):
        url = asked["url"] if seen % 2 else f"/runs/{run}/events"
        again = asked if seen % 2 else {"method": "GET", "url": url}
        rest = mock.client.request(**again, headers={"last-event-id": f"{run}.{seen}"})
        assert named(rest, seen + 1) == events[seen:]
    assert mock.client.request(**asked, headers={"last-event-id": f"{run}.{len(events)}"}).status_code == 204


def test_one_key_is_one_answer(llm: Server, upstream: Upstream) -> None:
    upstream.plan(answer("Hi"))
    key = {"idempotency-key": "k" * 22}
    both = [llm.client.request(**request("chat", "Hi"), headers=key) for _ in range(2)]
    assert both[0].content == both[1].content
    assert len(upstream.calls) == 1


# Sessions


@asynccontextmanager
async def service(folder: Path, model: Any = None) -> AsyncIterator[AppWithCallers]:
    @asynccontextmanager
    async def resources(app: Any) -> AsyncIterator[Any]:
        async with open_tasks(folder) as tasks:
            yield SimpleNamespace(tasks=tasks, model=model or MockModel(0))

    app = AppWithCallers(ROUTES, Settings(log="memory"), lifespan=resources)
    with anyio.fail_after(LIMIT_S):
        async with app.running():
            yield app


async def say(app: AppWithCallers, message: str, session: str | None = SESSION, caller: str | None = None) -> Answer:
    headers = {"content-type": "application/json"} | ({"x-caller": caller} if caller else {})
    body = {"message": message, "session_id": session}
    return await ask(app, "/api/chat", "POST", headers=headers, body=[json.dumps(body).encode()])


def test_session_carries_the_conversation_on_to_the_model(llm: Server, upstream: Upstream) -> None:
    upstream.plan(answer("Hello Ann."), answer("Ann."), answer("Who?"))
    session = "s" * 22
    for message, id in (("I am Ann", session), ("Who am I?", session), ("Who am I?", session[:-1] + "t")):
        tell(llm, "chat", message, session_id=id)
    first, second, other = ([(m["role"], m["content"]) for m in call.json["messages"][1:]] for call in upstream.calls)
    assert first == [("user", "I am Ann")]
    assert second == [("user", "I am Ann"), ("assistant", "Hello Ann."), ("user", "Who am I?")]
    assert other == [("user", "Who am I?")]


def test_session_carries_the_conversation_on_without_a_model(mock: Server) -> None:
    tell(mock, "chat", "Find the invoice", session_id=SESSION)
    events = tell(mock, "chat", "How many of them are done?", session_id=SESSION)
    assert events[-2][1]["content"] == "I counted 1 task (words invoice, status done)."


@pytest.mark.parametrize(
    ("questions", "told"),
    [
        (["what is 6*7?", "and how many tasks are there?"], "I counted 3 tasks."),
        (["what is 6 times 7?", "and how many of them are done?"], "I counted 1 task (status done)."),
        (["what time is it in Berlin?", "and how many tasks are there?"], "I counted 3 tasks."),
        (
            ["what is 6*7, and which tasks mention an invoice?", "How many of them?"],
            "I counted 2 tasks (words invoice).",
        ),
        (
            ["Find the invoice", "and what is 6*7?", "And how many are open?"],
            "I counted 1 task (words invoice, status open).",
        ),
        (
            ["Find the invoice", "Which of them are open?", "And how many?"],
            "I counted 1 task (words invoice, status open).",
        ),
        (["Find the invoice", "what is 6*7?", "And how many are there?"], "I counted 3 tasks."),
    ],
)
def test_a_question_goes_on_with_the_tasks_of_the_one_before_and_not_with_its_numbers(
    mock: Server, questions: list[str], told: str
) -> None:
    session = uuid.uuid4().hex
    answers = [tell(mock, "chat", question, session_id=session)[-2][1]["content"] for question in questions]
    assert answers[-1] == told

    messages: list[dict[str, str]] = []
    for question, text in zip(questions, answers, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    body = {"model": "agent", "messages": messages[:-1]}
    completion = mock.client.post("/v1/chat/completions", json=body).json()
    assert completion["choices"][0]["message"]["content"] == told


async def test_session_is_there_after_a_restart_and_belongs_to_its_caller(tmp_path: Path) -> None:
    async with service(tmp_path) as app:
        for caller in ("ann", "ben", None):
            assert (await say(app, f"hello from {caller}", SESSION, caller)).status == 200
    async with service(tmp_path) as app:
        for caller in ("ann", "ben", None):
            (kept,) = await app.state.tasks.session(caller, SESSION)
            assert kept.question == f"hello from {caller}"


async def test_two_at_once_on_one_session_are_both_kept(tmp_path: Path) -> None:
    async with service(tmp_path) as app:
        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(say, app, f"hello {number}")
        kept = await app.state.tasks.session(None, SESSION)
        assert sorted(exchange.question for exchange in kept) == [f"hello {number}" for number in range(5)]


async def test_session_of_somebody_without_a_name_has_a_long_id(tmp_path: Path) -> None:
    async with service(tmp_path) as app:
        refused = await say(app, "Hi", "short")
        assert refused.problem == (400, "bad_request")
        assert refused.json["field"] == "session_id"
        assert (await say(app, "Hi", SESSION[:21])).status == 400
        assert not (await ask(app, "/runs")).json["runs"]
        assert (await say(app, "Hi", "short", "ann")).status == 200


async def test_session_that_can_t_be_read_is_a_503_and_one_that_can_t_be_kept_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*arguments: Any) -> Any:
        raise Unavailable("can't use the tasks database at the moment: locked")

    async with service(tmp_path) as app:
        with monkeypatch.context() as patch:
            patch.setattr(app.state.tasks, "add_exchange", away)
            told = [decoded(event) for event in (await say(app, "Hi")).events]
        assert told[-2:] == [
            {"type": "error", "message": "can't use the tasks database at the moment: locked", "code": "unavailable"},
            "[DONE]",
        ]
        assert "result" not in [data["type"] for data in told[:-1]]
        monkeypatch.setattr(app.state.tasks, "session", away)
        assert (await say(app, "Hi")).problem == (503, "unavailable")


async def test_unforeseen_failure_says_nothing_of_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(MockModel):
        def say(self, text: str) -> Any:
            raise RuntimeError("secret")

    async with service(tmp_path, Broken(0)) as app:
        answered = await say(app, "Hi", None)
        assert b"secret" not in answered.body
        *_, failure, end = [decoded(event) for event in answered.events]
        assert (failure["type"], failure["code"], end) == ("error", "internal_error", "[DONE]")
        reference = re.fullmatch(r"internal error \(reference (\w+)\)", failure["message"])
        assert reference and reference[1] in caplog.text


# Bad inputs: a problem, and nothing is started


def test_queries_up_to_their_bound_are_taken(mock: Server) -> None:
    for route in ASK:
        assert tell(mock, route, "é" * 8000)[-1][0] in ("complete", None)
