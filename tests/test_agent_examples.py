"""Agents of others' libraries as runs: each program of examples/ with the real package, and a model's server."""

import gc
import json
from collections.abc import AsyncIterator, Iterator
from importlib import import_module
from typing import Any, Final

import anyio
import httpx
import httpx2
import pytest

from sseapp import GET, Run, Settings, SSEApp
from ssecore.client import connect
from ssecore.testing import Transport, assert_stream
from ssecore.testing import connect as connect_in_process
from tests import upstream
from tests.needs import needs
from tests.test_client import quick
from tests.upstream import DONE, FIRST, Script, Upstream, chunk, token

__all__ = ["quick"]

WORDS: Final = [f"word{number} " for number in range(20)]


def calls_tool(call: upstream.Call) -> None:
    """As OpenAI sends it: the name first, and the arguments in pieces."""
    assert call.json["tools"][0]["function"]["name"] == "search_tasks"
    call.head()
    head = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "search_tasks", "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"words": ', '"due"}')]
    call.send(FIRST, *(chunk({"tool_calls": [each]}) for each in (head, *pieces)), chunk({}, "tool_calls"), DONE)
    call.end()


def answers(call: upstream.Call) -> None:
    assert "call Ann" in json.dumps(call.json["messages"]), "what the tool found"
    upstream.answer(*WORDS)(call)


#: Each with what its model says, and the statuses that a client gets.
AGENTS: Final[list[tuple[str, list[Script], list[str]]]] = [
    ("langgraph_agent", [answers], ["searching the tasks", "writing the answer"]),
    ("pydantic_ai_agent", [calls_tool, answers], ["searching for due"]),
    ("openai_agents_agent", [calls_tool, answers], ["using search_tasks"]),
]
#: The packages take seconds to import, so that is left to the tests.
pytestmark = [
    needs("time"),
    pytest.mark.parametrize(
        ("program", "scripts", "statuses"), AGENTS, ids=[a[0] for a in AGENTS], indirect=["program"]
    ),
]


@pytest.fixture
def program(request: pytest.FixtureRequest) -> Any:
    return import_module(f"examples.{request.param}")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstream]:
    with upstream.serve() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        yield server


@pytest.fixture(autouse=True)
async def connections() -> AsyncIterator[None]:
    """The packages keep their clients for the next question, and with them connections, which end with the test."""
    yield
    for client in [each for each in gc.get_objects() if isinstance(each, httpx.AsyncClient | httpx2.AsyncClient)]:
        await client._transport.aclose()


async def test_an_agent_goes_on_over_cuts_and_its_model_is_asked_once(
    program: Any, scripts: list[Script], statuses: list[str], model: Upstream
) -> None:
    model.plan(*scripts)
    app = SSEApp([GET("/ask", program.ask, query=program.Question, run=Run())], Settings(log="memory", retry_ms=1))
    transport = Transport(app, cuts=[250, 300, 400])
    with anyio.fail_after(30):
        async with app.running(), httpx.AsyncClient(transport=transport) as http:
            async with connect("http://localhost/ask?question=what+is+due", client=http) as source:
                events = [event async for event in source]
    model.settle()  # nothing was asked for twice
    assert "".join(event.data for event in events if event.event == "token") == "".join(WORDS)
    assert [json.loads(event.data)["status"] for event in events if event.event == "status"] == statuses
    assert events[-1].event == "complete"
    assert len({event.id for event in events}) == len(events)


async def test_a_run_that_is_cancelled_leaves_its_model(
    program: Any, scripts: list[Script], statuses: list[str], model: Upstream
) -> None:
    def endless(call: upstream.Call) -> None:
        call.head()
        call.send(FIRST, token("word"))
        call.wait_gone()

    model.plan(*scripts[:-1], endless)
    app = program.make()
    with anyio.fail_after(30):
        async with app.running():
            async with connect_in_process(app, "GET", "/ask?question=what+is+due") as exchange:
                await assert_stream(exchange, ..., ("token", "word"), ends=False)
                run = exchange.headers["run-id"]
                await app.runs.cancel(run, caller=None)
                assert (await app.runs.wait(run, caller=None))["state"] == "cancelled"
        await anyio.to_thread.run_sync(model.settle)


async def test_a_model_that_fails_in_the_middle_is_said(
    program: Any, scripts: list[Script], statuses: list[str], model: Upstream
) -> None:
    def breaks(call: upstream.Call) -> None:
        call.head()
        call.send(FIRST, token("word"))
        call.reset()

    model.plan(*scripts[:-1], breaks)
    app = program.make()
    with anyio.fail_after(30):
        async with app.running(), connect_in_process(app, "GET", "/ask?question=what+is+due") as exchange:
            events = [event async for event in exchange.events()]
    model.settle()
    assert [event.event for event in events][-2:] == ["token", "error"]
