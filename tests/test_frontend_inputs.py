"""What front ends may send us: any JSON gets an answer, and no more than it should."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import anyio
import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers import ROUTES, Resources, resources
from handlers.chat import MockModel
from handlers.database import MAX_SESSION_CHARS, Exchange
from handlers.parts import conversation, text_of
from sseapp import Settings, SSEApp, create_app
from ssecore.errors import BadRequest
from ssecore.testing import Transport
from ssecore.wire import Decoder

JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ROLES: Final = st.sampled_from(["user", "assistant", "system", "tool", ""])


@given(st.lists(st.tuples(ROLES, st.text(max_size=30)), max_size=30))
def test_any_messages_are_a_question_with_a_history_or_refused(messages: list[tuple[str, str]]) -> None:
    questions = [text for role, text in messages if role == "user" and text.strip()]
    if not questions:
        with pytest.raises(BadRequest, match="at least one message must be a user's"):
            conversation(messages)
        return
    question, history = conversation(messages)
    assert question == questions[-1]
    assert all(exchange.question in questions and exchange.answer for exchange in history)


def test_a_history_is_bounded_and_a_long_question_refused() -> None:
    rounds = [("user", "q" * 500), ("assistant", "a" * 500)] * 100
    question, history = conversation([*rounds, ("user", "now?")])
    assert question == "now?"
    assert 1 <= len(history) <= MAX_SESSION_CHARS // 1000
    assert history[0] == Exchange("q" * 500, "a" * 500)
    with pytest.raises(BadRequest, match="longer than 8000 characters"):
        conversation([("user", "q" * 8001)])


@given(JSON)
def test_a_text_is_found_in_any_content(content: Any) -> None:
    assert isinstance(text_of(content), str)
    assert text_of([{"type": "text", "text": "a"}, content, {"type": "input_text", "text": "b"}]).startswith("a")


# Over HTTP


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(data_dir=tmp_path, log="memory", mock_delay_s=0))
    with anyio.fail_after(30):
        async with app.running(), httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as http:
            yield http


USER: Final = {"role": "user", "content": "hello"}
PART: Final = {"role": "user", "parts": [{"type": "text", "text": "hello"}]}
IDS: Final = {"threadId": "t" * 22, "runId": "r" * 22}


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/ai/chat", {}, 400, "messages"),
        ("/ai/chat", {"messages": []}, 400, "messages"),
        ("/ai/chat", {"messages": [{"role": "assistant", "parts": []}]}, 400, "messages"),
        ("/ai/chat", {"messages": [PART] * 1001}, 400, "messages"),
        ("/ai/chat", {"messages": [PART], "id": "x" * 256}, 400, "id"),
        ("/ag-ui", {"messages": [USER]}, 400, "threadId"),
        ("/ag-ui", {"messages": [], **IDS}, 400, "messages"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [USER] * 1001}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "system"}], "stream": True}, 400, "messages"),
        ("/v1/responses", {"input": [{"role": "system"}], "stream": True, "model": "agent"}, 400, "input"),
        ("/v1/chat/completions", {"messages": [USER], "model": "gpt"}, 404, "model"),
        ("/v1/responses", {}, 400, "input"),
        ("/v1/responses", {"input": [{"type": "image"}]}, 400, "input"),
        ("/v1/responses", {"input": "x", "previous_response_id": "r"}, 400, "previous_response_id"),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function"}] * 129}, 400, "tools"),
        ("/v1/responses", {"input": "x", "metadata": {"a": 1}}, 400, None),
        ("/v1/responses", {"input": "x", "metadata": {"a": "x" * 513}}, 400, None),
    ],
)
async def test_what_cant_be_used_is_refused_before_there_is_an_event(
    http: httpx.AsyncClient, path: str, body: Any, status: int, field: str | None
) -> None:
    answer = await http.post(path, json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    if field is not None:
        assert answer.json()["field"] == field
    if path.startswith("/v1/"):  # so that OpenAI's SDKs show it
        assert answer.json()["error"]["message"] == answer.json()["detail"]


_JSON: Final = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "path",
    [
        "/ai/chat/no-such-chat-is-there/stream?startIndex=x",
        "/ai/chat/short/stream",
        "/ag-ui",
        "/ag-ui?threadId=short",
        "/v1/responses/resp_x?starting_after=-1",
    ],
)
async def test_a_query_that_cant_be_used_is_refused(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).status_code == 400


async def test_what_isnt_there_is_not_found(http: httpx.AsyncClient) -> None:
    assert (await http.get("/ai/chat/no-such-chat-is-there/stream")).status_code == 204
    assert (await http.post("/ai/chat/no-such-chat-is-there/stop")).status_code == 204
    assert (await http.get("/ag-ui?runId=no-such-run-is-there-at-all")).status_code == 404
    for path in ("/v1/responses/resp_x", "/v1/responses/resp_x?stream=true"):
        assert (await http.get(path)).status_code == 404
    assert (await http.post("/v1/responses/resp_x/cancel")).status_code == 404


async def test_ag_ui_is_told_in_events_that_a_run_is_no_longer_kept(http: httpx.AsyncClient) -> None:
    """TanStack AI doesn't ask for an event stream, and shows no more of a 410 than its number."""
    answer = await http.post("/ag-ui", json={**IDS, "messages": [USER]}, headers={"last-event-id": f"{'A' * 22}.7"})
    gap, error = [msgspec.json.decode(event.data) for event in Decoder().feed(answer.content + b"\n")]
    assert gap == {"type": "CUSTOM", "name": "gap", "value": {"reason": "expired", "from": 8, "to": None}}
    assert (error["type"], error["code"]) == ("RUN_ERROR", "gone")
    assert (await http.get("/runs")).json() == {"runs": []}  # nothing was started


async def test_a_run_of_another_route_is_no_response_and_no_chat(http: httpx.AsyncClient) -> None:
    run = (await http.get("/chat?prompt=hello")).headers["run-id"]
    for path in (f"/v1/responses/resp_{run}", f"/v1/responses/resp_{run}?stream=true"):
        assert (await http.get(path)).status_code == 404
    assert (await http.post(f"/v1/responses/resp_{run}/cancel")).status_code == 404
    assert (await http.get(f"/ai/chat/{run}/stream")).status_code == 204
    assert (await http.post(f"/ai/chat/{run}/stop")).status_code == 204
    assert (await http.get(f"/runs/{run}")).json()["state"] == "completed"


async def test_nobody_finds_what_is_anothers(tmp_path: Path) -> None:
    held = anyio.Event()

    class Waiting(MockModel):
        async def say(self, text: str) -> AsyncGenerator[str, None]:
            yield "one "
            await held.wait()

    @asynccontextmanager
    async def lifespan(app: SSEApp) -> AsyncIterator[Resources]:
        async with resources(app.settings) as opened:
            yield replace(opened, model=Waiting(0))

    app = SSEApp(ROUTES, Settings(data_dir=tmp_path), lifespan=lifespan, caller=lambda r: r.headers.get("x-caller"))
    ann, bob = {"x-caller": "ann"}, {"x-caller": "bob"}
    with anyio.fail_after(30):
        async with app.running(), httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as http:
            background = {"input": "hello", "background": True}
            response = (await http.post("/v1/responses", json=background, headers=ann)).json()["id"]
            asked = {"messages": [USER], "threadId": "t", "runId": "r"}  # short: whose it is is known
            body = {"messages": [PART], "id": "chat"}
            async with (
                http.stream("POST", "/ai/chat", json=body, headers=ann),
                http.stream("POST", "/ag-ui", json=asked, headers=ann),
            ):
                for path, others, own in (
                    (f"/v1/responses/{response}", 404, 200),
                    (f"/v1/responses/{response}?stream=true", 404, 200),
                    ("/ai/chat/chat/stream", 204, 200),
                    ("/ag-ui?runId=r", 404, 200),
                ):
                    for caller, expected in ((bob, others), (ann, own)):
                        async with http.stream("GET", path, headers=caller) as answer:
                            assert answer.status_code == expected, path
                for caller, expected_run in ((bob, None), (ann, {"runId": "r"})):
                    assert (await http.get("/ag-ui?threadId=t", headers=caller)).json()["activeRun"] == expected_run
                    found = (await http.get("/runs?thread=chat", headers=caller)).json()["runs"]
                    assert len(found) == (caller is ann)
                assert (await http.post(f"/v1/responses/{response}/cancel", headers=bob)).status_code == 404
                await http.post("/ai/chat/chat/stop", headers=bob)
                running = (await http.get("/runs?state=running", headers=ann)).json()["runs"]
                assert len(running) == 3  # all of them go on
            held.set()


async def test_any_json_gets_an_answer(http: httpx.AsyncClient) -> None:
    """As messages, as their contents, as an input: a problem of the client's, or a stream to its end."""

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def bodies(data: st.DataObject) -> None:
        strange = data.draw(JSON)
        message = {"role": data.draw(ROLES | JSON), "content": strange, "parts": strange}
        for path, body in (
            ("/ai/chat", {"id": strange, "messages": [message, PART]}),
            ("/ag-ui", {**IDS, "runId": f"{uuid4()}", "messages": [message, USER]}),
            ("/v1/chat/completions", {"messages": [message, USER], "stream": True, "stream_options": strange}),
            ("/v1/chat/completions", {"messages": [message, USER], "model": "agent"}),
            ("/v1/responses", {"input": strange, "stream": True}),
            ("/v1/responses", {"input": [message, USER], "tools": strange, "model": "agent"}),
        ):
            drawn.append((path, body))

    drawn: list[tuple[str, Any]] = []
    await anyio.to_thread.run_sync(bodies)
    for path, body in drawn[:240]:
        answer = await http.post(path, json=body)
        assert answer.status_code in (200, 400), (body, answer.text)
        if answer.headers["content-type"] == "text/event-stream":
            assert Decoder().feed(answer.content)
            assert "reference" not in answer.text, (body, answer.text)  # of an error of ours in the log
