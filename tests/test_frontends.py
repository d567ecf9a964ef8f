"""Front ends by their own packages, against the real service over a line that breaks."""

import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from secrets import token_urlsafe
from typing import Any, Final

import openai
import pytest
from ag_ui_validate import create_validator
from playwright.sync_api import Browser

from ssecore.wire import Decoder
from tests import chromium, redis_server
from tests import upstream as llm
from tests.needs import needs
from tests.relay import relay
from tests.serving import Server, free_port, serve, wait_until
from tests.upstream import Upstream

browser = chromium.browser
node_clients = needs("node-clients")
#: Each with other cuts. All of the suite's: once. `SSEAPP_TEST_ROUNDS=30` makes it a thousand cuts.
rounds = pytest.mark.parametrize("seed", range(int(os.environ.get("SSEAPP_TEST_ROUNDS", "1"))))

NODE: Final = Path(__file__).parent / "node"
#: A question with two tools, and an answer of many words.
QUESTION: Final = "what is 6*7, and how many tasks are there?"
ENV: Final = {"SSEAPP_RETRY_MS": "1", "SSEAPP_MOCK_DELAY_S": "0.005", "SSEAPP_HEARTBEAT_S": "0.05"}
#: What the mock repeats for so long that a client can be cut, stopped, or leave.
LONG: Final = " ".join(f"word-{number}" for number in range(300))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("data"), env=ENV) as server:
        yield server


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with llm.serve() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Server]:
    """The service with an upstream that does what a test says."""
    env = {**ENV, "OPENAI_BASE_URL": upstream.url, "OPENAI_API_KEY": "key", "OPENAI_MODEL": "m"}
    with serve(tmp_path_factory.mktemp("data"), env=env) as server:
        yield server


WORDS: Final = [f"word-{number} " for number in range(10)]


def held(go_on: threading.Event) -> llm.Script:
    """An answer whose second half waits."""

    def script(call: llm.Call) -> None:
        call.head()
        call.send(llm.FIRST, *map(llm.token, WORDS[:5]))
        assert go_on.wait(llm.LIMIT_S)
        call.send(*map(llm.token, WORDS[5:]), llm.STOP, llm.DONE)
        call.end()

    return script


def broken(call: llm.Call) -> None:
    call.head()
    call.send(llm.FIRST, llm.token("half an "), b'data: {"error": {"message": "overloaded"}}\n\n')


class Told:
    """What a package made of it."""

    def __init__(self, lines: Sequence[str]) -> None:
        told = [json.loads(line) for line in lines]
        self.chunks = [value for what, value in told if what == "chunk"]
        self.rest = {what: value for what, value in told if what != "chunk"}


def node(client: str, **asked: Any) -> Told:
    command = ["node", "frontends.js", client, json.dumps(asked)]
    done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return Told(done.stdout.splitlines())


@contextmanager
def at_work(client: str, **asked: Any) -> Iterator["subprocess.Popen[str]"]:
    """The client's process, still reading."""
    command = ["node", "frontends.js", client, json.dumps(asked)]
    process = subprocess.Popen(command, cwd=NODE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: "subprocess.Popen[str]") -> Told:
    return Told(process.communicate(timeout=60)[0].splitlines())


def stored(server: Server, run: str) -> list[Any]:
    """What the log has of the run, `[DONE]` left out."""
    events = Decoder().feed(server.client.get(f"/runs/{run}/events").content)
    return [json.loads(event.data) for event in events if event.data != "[DONE]"]


def newest(server: Server, state: str = "completed") -> str:
    runs = server.client.get("/runs").json()["runs"]
    assert runs[0]["state"] == state
    run: str = runs[0]["run"]
    return run


def wait_for_run(server: Server, thread: str, events: int = 15) -> str:
    """The thread's run, once it has so many events."""

    def found() -> str | None:
        runs = server.client.get(f"/runs?thread={thread}&state=running").json()["runs"]
        return next((run["run"] for run in runs if run["events"] >= events), None)

    return str(wait_until(found))


def cuts(count: int, seed: object = 0) -> list[int]:
    """So many places, each in the first or the next events of its connection, anywhere in them."""
    random_of = random.Random(str(seed))
    return [random_of.randint(420, 900) for _ in range(count)]


def fresh() -> str:
    return token_urlsafe(16)


# AI SDK


@node_clients
@rounds
def test_ai_sdk_has_every_chunk_once_over_cuts(server: Server, seed: int) -> None:
    with relay(server.port, cuts(6, ("ai", seed))) as line:
        told = node("ai", url=f"{line.url}/ai/chat", chatId=fresh(), text=QUESTION, resuming=True)
        line.wait_streams(7)
    assert told.chunks == stored(server, newest(server))
    parts = told.rest["message"]["parts"]
    kinds = ["step-start", "reasoning", "reasoning", "tool-calculate", "tool-count_tasks", "reasoning", "text"]
    assert [part["type"] for part in parts] == kinds
    assert all(part.get("state", "done") in ("done", "output-available") for part in parts)
    assert parts[3]["input"] == {"expression": "6*7"} and parts[3]["output"]["value"] == "42"
    assert "42" in parts[-1]["text"] and told.rest["message"]["metadata"]["disclaimer"]


@node_clients
def test_workflow_chat_transport_resumes_by_itself(server: Server) -> None:
    """It gives up at the third answer in a row that breaks off; and at a page's reload it comes with the chat's id."""
    with relay(server.port, [900, 700, 1200]) as line:
        told = node("workflow", url=f"{line.url}/ai/chat", chatId=fresh(), text=QUESTION)
        line.wait_streams(4)
    assert told.chunks == stored(server, told.rest["run"])
    assert told.rest["message"]["parts"][-1]["state"] == "done"
    last = node("workflow", url=f"{server.url}/ai/chat", chatId=told.rest["run"], reconnect=True, startIndex=-2)
    assert last.chunks == told.chunks[-2:]


@node_clients
def test_a_reload_in_the_middle_gives_the_same_message(behind: Server, upstream: Upstream) -> None:
    chat, go_on = fresh(), threading.Event()
    upstream.plan(held(go_on))
    with relay(behind.port) as line:
        asked = {"url": f"{line.url}/ai/chat", "chatId": chat}
        with at_work("ai", **asked, text="hello") as first:
            run = wait_for_run(behind, chat)
            with at_work("ai", **asked, reconnect=True) as second:
                line.wait_streams(2)
                go_on.set()
                whole, again = ended(first), ended(second)
        assert again.chunks == whole.chunks == stored(behind, run)
        assert again.rest == whole.rest and whole.rest["message"]["parts"][-1]["text"] == "".join(WORDS)
        assert "nothing" in node("ai", **asked, reconnect=True).rest
        assert "nothing" in node("ai", **{**asked, "chatId": fresh()}, reconnect=True).rest
    upstream.settle()


@node_clients
def test_stop_ends_the_message_and_leaves_it_valid(behind: Server, upstream: Upstream) -> None:
    chat = fresh()
    upstream.plan(llm.silent(llm.FIRST, *map(llm.token, WORDS)))
    with at_work("ai", url=f"{behind.url}/ai/chat", chatId=chat, text="hello") as client:
        run = wait_for_run(behind, chat)
        assert behind.client.post(f"/ai/chat/{chat}/stop").status_code == 204
        told = ended(client)
    assert [chunk["type"] for chunk in told.chunks[-2:]] == ["abort", "finish"]
    assert told.rest["message"]["parts"][-1]["text"] == "".join(WORDS)
    assert behind.client.post(f"/ai/chat/{run}/stop").status_code == 204
    assert stored(behind, run) == told.chunks  # what there is of it stays
    upstream.settle()


@node_clients
def test_a_failure_and_a_gap_are_chunks_that_ai_sdk_knows(behind: Server, upstream: Upstream) -> None:
    upstream.plan(broken)
    told = node("ai", url=f"{behind.url}/ai/chat", chatId=fresh(), text="hello")
    assert told.rest["error"] == "the model failed"
    assert told.rest["message"]["parts"][-1]["text"] == "half an "
    run = newest(behind, "failed")
    beyond = {"last-event-id": f"{run}.999"}
    again = node("ai", url=f"{behind.url}/ai/chat", chatId=run, reconnect=True, headers=beyond)
    assert [chunk["type"] for chunk in again.chunks] == ["data-gap", "error", "finish"]
    upstream.settle()


# AG-UI


def check_ag_ui(events: Sequence[Any]) -> None:
    """By the protocol's own rules."""
    validator = create_validator()
    for event in events:
        validator.feed(event)
    validator.finalize()
    faults = [one for one in validator.report().diagnostics if one.severity == "error"]
    assert not faults, faults


@node_clients
@rounds
def test_ag_ui_has_every_event_once_over_cuts(server: Server, seed: int) -> None:
    asked = {"threadId": fresh(), "runId": fresh(), "text": QUESTION}
    with relay(server.port, cuts(6, ("ag-ui", seed))) as line:
        told = node("ag-ui", url=f"{line.url}/ag-ui", **asked, resuming=True)
        line.wait_streams(7)
    whole = stored(server, newest(server))
    check_ag_ui(whole)
    assert told.chunks == whole
    assert told.rest["outcome"] == "success"
    assert [message["role"] for message in told.rest["messages"]][-2:] == ["reasoning", "assistant"]
    assert "42" in told.rest["messages"][-1]["content"]
    again = node("ag-ui", url=f"{server.url}/ag-ui", **asked)
    assert again.chunks == told.chunks  # the client has named the run: it is not started again


@node_clients
def test_an_ag_ui_run_that_is_cancelled_or_fails_is_in_order(behind: Server, upstream: Upstream) -> None:
    thread = fresh()
    upstream.plan(llm.silent(llm.FIRST, *map(llm.token, WORDS)), broken)
    asked = {"url": f"{behind.url}/ag-ui", "threadId": thread, "text": "hello"}
    with at_work("ag-ui", **asked, runId=fresh()) as client:
        run = wait_for_run(behind, thread)
        behind.client.delete(f"/runs/{run}")
        cancelled = ended(client)
    assert cancelled.rest["outcome"] == "cancelled"
    assert [event["type"] for event in cancelled.chunks[-2:]] == ["TEXT_MESSAGE_END", "RUN_FINISHED"]
    failed = node("ag-ui", **asked, runId=fresh())
    assert failed.rest["error"] == "the model failed"
    for events in (cancelled.chunks, failed.chunks):
        check_ag_ui(events)
    upstream.settle()


# TanStack AI


@node_clients
@rounds
def test_tanstack_resumes_by_itself_over_five_cuts(server: Server, seed: int) -> None:
    thread, run = fresh(), fresh()
    with relay(server.port, cuts(5, ("tanstack", seed))) as line:
        told = node("tanstack", url=f"{line.url}/ag-ui", threadId=thread, runId=run, text=QUESTION)
        line.wait_streams(6)
    whole = stored(server, newest(server))
    both = zip(told.chunks, whole, strict=True)
    assert [{name: value for name, value in chunk.items() if name in known} for chunk, known in both] == whole
    joined = node("tanstack", url=f"{server.url}/ag-ui", runId=run, join=True)
    assert joined.chunks == told.chunks
    page = node("tanstack", url=f"{server.url}/ag-ui", threadId=thread, hydrate=True).rest["thread"]
    assert [message["role"] for message in page["messages"]] == ["user", "assistant"]
    assert page["activeRun"] is None


@node_clients
def test_tanstack_finds_the_run_that_is_at_work_on_a_thread(behind: Server, upstream: Upstream) -> None:
    thread, run, go_on = fresh(), fresh(), threading.Event()
    upstream.plan(held(go_on))
    asked = {"url": f"{behind.url}/ag-ui", "threadId": thread}
    with at_work("tanstack", **asked, runId=run, text="hello") as client:
        wait_for_run(behind, thread)
        assert node("tanstack", **asked, hydrate=True).rest["thread"]["activeRun"] == {"runId": run}
        go_on.set()
        ended(client)
    upstream.settle()


@node_clients
def test_a_tanstack_run_that_is_cancelled_or_fails_is_in_order(behind: Server, upstream: Upstream) -> None:
    thread = fresh()
    upstream.plan(llm.silent(llm.FIRST, *map(llm.token, WORDS)), broken)
    asked = {"url": f"{behind.url}/ag-ui", "threadId": thread, "text": "hello"}
    with at_work("tanstack", **asked, runId=fresh()) as client:
        run = wait_for_run(behind, thread)
        behind.client.delete(f"/runs/{run}")
        cancelled = ended(client)
    failed = node("tanstack", **asked, runId=fresh())
    assert [event["type"] for event in cancelled.chunks[-2:]] == ["TEXT_MESSAGE_END", "RUN_FINISHED"]
    assert cancelled.chunks[-1]["outcome"] == {"type": "cancelled"}
    last = failed.chunks[-1]
    assert (last["type"], last["message"], last["code"]) == ("RUN_ERROR", "the model failed", "upstream_error")
    for events in (cancelled.chunks, failed.chunks):
        check_ag_ui(events)
    upstream.settle()


# What the log no longer has, by AG-UI's clients

AG_UI_CLIENTS: Final = {"ag-ui": {"resuming": True}, "tanstack": {}}
#: In the second half of what `held` says.
CUT: Final = re.compile(rb"word-7 .*\n\n")


@node_clients
@pytest.mark.parametrize("client", AG_UI_CLIENTS)
def test_a_run_that_was_deleted_meanwhile_ends_in_an_error(tmp_path: Path, upstream: Upstream, client: str) -> None:
    thread, go_on = fresh(), threading.Event()
    upstream.plan(held(go_on))
    env = {**ENV, "OPENAI_BASE_URL": upstream.url, "OPENAI_MODEL": "m", "SSEAPP_RETENTION_S": "0.2"}
    with serve(tmp_path, env=env) as server, relay(server.port, [CUT]) as line:
        asked = {"url": f"{line.url}/ag-ui", "threadId": thread, "runId": fresh(), "text": "hello"}
        with at_work(client, **asked, **AG_UI_CLIENTS[client]) as process:
            run = wait_for_run(server, thread)
            line.gate.clear()
            go_on.set()
            wait_until(lambda: server.client.get(f"/runs/{run}").status_code == 404)
            line.gate.set()
            told = ended(process)
    seen, last = told.chunks[:-2], told.chunks[-2:]
    if client == "tanstack":  # it resumes by the route itself
        gap = {"reason": "expired", "from": len(seen) + 1, "to": None}
        assert last[0] == {"type": "CUSTOM", "name": "gap", "value": gap}
        gone = {"message": "this answer is no longer kept by the server", "code": "gone"}
        assert last[1] == {"type": "RUN_ERROR", **gone}
        check_ag_ui(told.chunks)
    else:
        seen = told.chunks
        assert told.rest["threw"] == "can't resume the stream: 410, this run is no longer stored, or never existed"
        assert told.rest["messages"][-1]["content"] == "".join(WORDS[:8])
    assert seen[-1]["delta"] == WORDS[7]
    upstream.settle()


@node_clients
@pytest.mark.parametrize("client", AG_UI_CLIENTS)
def test_a_run_that_has_lost_its_newest_events_tells_of_a_gap(tmp_path: Path, upstream: Upstream, client: str) -> None:
    """The client has seen more than the log has: somebody put a backup of the log back."""
    thread, go_on = fresh(), threading.Event()
    upstream.plan(held(go_on))
    env = {**ENV, "OPENAI_BASE_URL": upstream.url, "OPENAI_MODEL": "m", "SSEAPP_PORT": f"{free_port()}"}
    asked = {"threadId": thread, "runId": fresh(), "text": "hello", **AG_UI_CLIENTS[client]}
    data = tmp_path / "data"
    with ExitStack() as stack:
        with serve(data, env=env) as server:
            line = stack.enter_context(relay(server.port, [CUT]))
            process = stack.enter_context(at_work(client, url=f"{line.url}/ag-ui", **asked))
            kept = 25
            wait_for_run(server, thread, kept)  # all of the first half
            backup(data, tmp_path / "backup")
            line.gate.clear()
            go_on.set()
            wait_until(lambda: CUT.search(line.answers()[0]))
            server.process.kill()
        shutil.rmtree(data)
        (tmp_path / "backup").rename(data)
        with serve(data, env=env) as server:
            line.gate.set()
            told = ended(process)
    # What the client has had stays, and nothing comes twice.
    texts = [chunk["delta"] for chunk in told.chunks if chunk["type"] == "TEXT_MESSAGE_CONTENT"]
    assert texts == WORDS[:8]
    gap, error = told.chunks[-2:]
    lost = {"reason": "diverged", "from": kept + 1, "to": len(told.chunks) - 2}
    assert gap == {"type": "CUSTOM", "name": "gap", "value": lost}
    assert (error["type"], error["code"]) == ("RUN_ERROR", "interrupted")
    check_ag_ui(told.chunks)
    if client == "ag-ui":
        assert told.rest["error"] == error["message"]
        assert told.rest["messages"][-1]["content"] == "".join(WORDS[:8])
    upstream.settle()


def backup(data: Path, to: Path) -> None:
    to.mkdir()
    for name in data.glob("*.db"):
        with closing(sqlite3.connect(name)) as source, closing(sqlite3.connect(to / name.name)) as target:
            source.backup(target)


# OpenAI


@node_clients
@rounds
def test_openai_node_streams_a_completion_over_cuts(server: Server, seed: int) -> None:
    with relay(server.port, cuts(6, ("openai", seed))) as line:
        told = node("openai", url=f"{line.url}/v1", model="mock", text=LONG, resuming=True)
        line.wait_streams(7)
    assert told.chunks == stored(server, newest(server))
    said = f"This is a mock response to: {LONG}"
    assert told.rest["final"]["choices"][0]["message"]["content"] == said
    whole = node("openai", url=f"{server.url}/v1", model="mock", text=LONG, whole=True).rest["final"]
    assert whole["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
    ]


@node_clients
@rounds
def test_openai_node_streams_a_response_over_cuts(server: Server, seed: int) -> None:
    with relay(server.port, cuts(6, ("responses", seed))) as line:
        asked = {"url": f"{line.url}/v1", "model": "agent", "responses": True}
        told = node("openai", **asked, text=QUESTION, resuming=True)
        line.wait_streams(7)
    run = newest(server)
    assert [chunk["sequence_number"] for chunk in told.chunks] == list(range(len(stored(server, run))))
    assert "42" in told.rest["final"]["output_text"]
    rest = node("openai", **{**asked, "url": f"{server.url}/v1"}, response_id=f"resp_{run}", starting_after=10)
    assert [chunk["sequence_number"] for chunk in rest.chunks] == list(range(11, len(told.chunks)))


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


def test_openai_python_reads_models_completions_and_refusals(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mock", "agent"]
    asked: Any = {"messages": [{"role": "user", "content": "what is 6*7?"}]}
    whole = client.chat.completions.create(model="agent", **asked)
    with client.chat.completions.stream(model="agent", **asked) as stream:
        final = stream.get_final_completion()
    assert whole.choices[0].message.content == final.choices[0].message.content == "6*7 = 42"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'") as caught:
        client.chat.completions.create(model="gpt", **asked)
    assert caught.value.code == "model_not_found"


@rounds
def test_openai_python_resumes_a_response_by_its_last_number(server: Server, seed: int) -> None:
    numbers: list[int] = []
    final: Any = None
    with relay(server.port, cuts(6, ("python", seed))) as line:
        client = openai.OpenAI(api_key="none", base_url=f"{line.url}/v1", max_retries=0)
        id = ""
        while final is None:
            try:
                if not numbers:
                    stream: Any = client.responses.create(model="agent", input=QUESTION, background=True, stream=True)
                else:
                    stream = client.responses.retrieve(id, stream=True, starting_after=numbers[-1])
                for event in stream:
                    numbers.append(event.sequence_number)
                    id = event.response.id if event.type == "response.created" else id
                    final = event.response if event.type == "response.completed" else None
            except openai.APIError:
                continue
        line.wait_streams(7)
        client.close()
    assert numbers == list(range(len(numbers)))
    assert "42" in final.output_text
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1") as client:
        assert client.responses.retrieve(id).output == final.output


def test_openai_python_cancels_a_response(behind: Server, upstream: Upstream) -> None:
    upstream.plan(llm.silent(llm.FIRST, *map(llm.token, WORDS)))
    with openai.OpenAI(api_key="none", base_url=f"{behind.url}/v1", max_retries=0) as client:
        begun = client.responses.create(model="m", input="hello", background=True)
        assert begun.status == "queued"
        upstream.wait_call()
        assert client.responses.retrieve(begun.id).status == "in_progress"
        assert client.responses.cancel(begun.id).status == "cancelled"
        assert client.responses.retrieve(begun.id).status == "cancelled"
    upstream.settle()


@node_clients
def test_openai_node_cancels_a_response_that_it_reads(behind: Server, upstream: Upstream) -> None:
    upstream.plan(llm.silent(llm.FIRST, *map(llm.token, WORDS)))
    asked = {"url": f"{behind.url}/v1", "model": "m"}
    with at_work("openai", **asked, responses=True, text="hello") as client:
        upstream.wait_call()
        events = 4 + len(WORDS)
        [run] = behind.client.get("/runs?state=running").json()["runs"]
        wait_until(lambda: behind.client.get(f"/runs/{run['run']}").json()["events"] >= events)
        cancelled = node("openai", **asked, cancel=f"resp_{run['run']}").rest["final"]
        told = ended(client)
    assert cancelled["status"] == "cancelled"
    assert told.chunks[-1]["type"] == "response.incomplete" and len(told.chunks) == events + 1
    assert told.rest["final"]["status"] == "cancelled"
    upstream.settle()


def test_a_responses_numbers_go_on_over_a_restart_of_the_service(tmp_path: Path, upstream: Upstream) -> None:
    env = {**ENV, "OPENAI_BASE_URL": upstream.url, "OPENAI_API_KEY": "key", "OPENAI_MODEL": "m"}
    upstream.plan(llm.silent(llm.FIRST, *map(llm.token, WORDS)))
    with serve(tmp_path, env=env) as server:
        with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
            stream: Any = client.responses.create(model="m", input="hello", background=True, stream=True)
            begun = [next(stream) for _ in range(3 + len(WORDS))]
            server.process.kill()
    with serve(tmp_path, env=env) as server, openai.OpenAI(api_key="none", base_url=f"{server.url}/v1") as client:
        stream = client.responses.retrieve(begun[0].response.id, stream=True, starting_after=begun[-1].sequence_number)
        rest = list(stream)
    assert [event.sequence_number for event in [*begun, *rest]] == list(range(len(begun) + len(rest)))
    assert rest[-1].type == "response.failed" and rest[-1].response.error.code == "interrupted"


# A gateway


def test_a_completion_is_handed_through_with_all_that_is_in_it(behind: Server, upstream: Upstream) -> None:
    """What a client sends gets to the upstream, and back, but for the key and the model's name."""

    def answering(call: llm.Call) -> None:
        call.head()
        for piece in ({"arguments": '{"city": '}, {"arguments": '"Oslo"}'}):
            name = {"id": "call_1", "type": "function"} if ":" in piece["arguments"] else {}
            function = {**piece, **({"name": "weather"} if name else {})}
            call.send(llm.chunk({"role": "assistant", "tool_calls": [{"index": 0, **name, "function": function}]}))
        call.send(llm.chunk({"x_extension": {"a": 1}}), llm.chunk({}, "length"), llm.USAGE, llm.DONE)
        call.end()

    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "tools": tools, "seed": 7}
    upstream.plan(answering, answering)
    whole = behind.client.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["finish_reason"] == "length" and whole["usage"] == {"total_tokens": 3}
    message = whole["choices"][0]["message"]
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert message == {"role": "assistant", "tool_calls": [call], "x_extension": {"a": 1}}
    streamed = behind.client.post("/v1/chat/completions", json={**body, "stream": True})
    assert b"x_extension" in streamed.content and streamed.content.count(b"[DONE]") == 1
    first, second = [call.json for call in upstream.calls]
    assert first.pop("stream_options") == {"include_usage": True}  # a whole answer has its usage
    assert {**first, "stream": None} == {**second, "stream": None} == {**body, "stream": None}
    assert all(call.headers["authorization"] == "Bearer key" for call in upstream.calls)
    upstream.settle()


def in_event(*choices: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps({"choices": choices}).encode()


HI: Final = {"role": "assistant", "content": "Hi"}
LETTERS: Final = [{"role": "assistant", "content": letter} for letter in "Hi"]


@pytest.mark.parametrize(
    "pieces",
    [
        [in_event(None, {"delta": HI}), in_event({"delta": {}, "finish_reason": "stop"})],
        [in_event({"message": HI, "finish_reason": "stop"})],
        [llm.chunk(LETTERS[0]), llm.chunk(LETTERS[1], "stop"), llm.USAGE],
        [*(in_event({"delta": {"content": a, "x": b}}) for a, b in ("H\ud83d", "i\ude42")), llm.STOP],
        [llm.chunk(HI, "stop").replace(b'"logprobs": null', b'"logprobs": [NaN]')],
    ],
    ids=["no index", "a whole message", "a role each time", "halves of characters", "not a number"],
)
def test_a_whole_completion_is_made_of_any_servers_chunks(
    behind: Server, upstream: Upstream, pieces: Sequence[bytes]
) -> None:
    def script(call: llm.Call) -> None:
        call.head()
        call.send(*pieces, llm.DONE)
        call.end()

    upstream.plan(script)
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    [choice] = behind.client.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["message"]["content"] == "Hi" and choice["finish_reason"] == "stop"
    assert choice["message"].get("role", "assistant") == "assistant"
    assert choice["message"].get("x", "🙂") == "🙂"
    upstream.settle()


@pytest.mark.parametrize(
    "piece", [b'{"message": "no", "type": "x"}', b'{"object": "error", "code": 5}', b'{"error": "no"}']
)
def test_an_error_of_the_upstreams_in_any_dress_ends_the_completion(
    behind: Server, upstream: Upstream, piece: bytes
) -> None:
    def script(call: llm.Call) -> None:
        call.head()
        call.send(llm.token("half "), b"data: %b\n\n" % piece)

    upstream.plan(script)
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    answer = behind.client.post("/v1/chat/completions", json=body).text
    assert [event.data for event in Decoder().feed(answer.encode())][1:] == [
        '{"error":{"message":"the model failed","type":"server_error","param":null,"code":"upstream_error"}}',
        "[DONE]",
    ]
    upstream.settle()


def test_a_completion_that_breaks_off_raises_in_openais_own_sdk(behind: Server, upstream: Upstream) -> None:
    def cut(call: llm.Call) -> None:
        call.head()
        call.send(llm.FIRST, llm.token("half an "))
        call.reset()

    upstream.plan(broken, cut, broken)
    asked: Any = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    with openai.OpenAI(api_key="none", base_url=f"{behind.url}/v1", max_retries=0) as client:
        for text in ("the model failed", "the model's answer was cut off"):
            with pytest.raises(openai.APIError, match=text):
                list(client.chat.completions.create(**asked, stream=True))
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            client.chat.completions.create(**asked)
    upstream.settle()


def test_reasoning_and_usage_are_in_a_response(behind: Server, upstream: Upstream) -> None:
    counts = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}

    def script(call: llm.Call) -> None:
        call.head()
        call.send(*(llm.chunk({"reasoning": text}) for text in ("I ", "think")), *map(llm.token, ("so", " I am")))
        call.send(llm.STOP, b"data: %b\n\n" % json.dumps({"choices": [], "usage": counts}).encode(), llm.DONE)
        call.end()

    upstream.plan(script)
    with openai.OpenAI(api_key="none", base_url=f"{behind.url}/v1", max_retries=0) as client:
        with client.responses.stream(model="m", input="hello") as stream:
            thought = [event.delta for event in stream if event.type == "response.reasoning_text.delta"]
            final = stream.get_final_response()
        kept: Any = client.responses.retrieve(final.id)
    assert thought == ["I ", "think"] and final.output_text == "so I am"
    assert [item.type for item in kept.output] == ["reasoning", "message"] and kept.output[0] == final.output[0]
    assert kept.output[0].content[0].text == "I think"
    assert (kept.usage.input_tokens, kept.usage.output_tokens, kept.usage.total_tokens) == (5, 2, 7)
    upstream.settle()


def test_an_upstream_that_refuses_to_tell_the_usage_is_asked_without(behind: Server, upstream: Upstream) -> None:
    refusal = llm.refuse(422, b'{"detail": "stream_options: extra fields not permitted"}')
    upstream.plan(refusal, llm.answer("Hi"), refusal, llm.answer("Hi"), llm.refuse(422, b""), llm.refuse(422))
    asked: Any = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    with openai.OpenAI(api_key="none", base_url=f"{behind.url}/v1", max_retries=0) as client:
        completion = client.chat.completions.create(**asked)
        assert (completion.choices[0].message.content, completion.usage) == ("Hi", None)
        response = client.responses.create(model="m", input="hello")
        assert (response.output_text, response.usage) == ("Hi", None)
        with pytest.raises(openai.UnprocessableEntityError, match="no"):
            client.chat.completions.create(**asked)
    assert ["stream_options" in call.json for call in upstream.calls] == [True, False] * 3
    upstream.settle()


def test_a_response_of_its_maximum_length_is_incomplete(behind: Server, upstream: Upstream) -> None:
    def script(call: llm.Call) -> None:
        call.head()
        call.send(llm.token("half an "), llm.chunk({}, "length"), llm.DONE)
        call.end()

    upstream.plan(script)
    with openai.OpenAI(api_key="none", base_url=f"{behind.url}/v1", max_retries=0) as client:
        response: Any = client.responses.create(model="m", input="hello", max_output_tokens=16)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.output_text, response.output[0].status) == ("half an ", "incomplete")
    upstream.settle()


def test_the_agents_usage_is_in_its_completions_and_responses(behind: Server, upstream: Upstream) -> None:
    def script(call: llm.Call) -> None:
        call.head()
        call.send(llm.token("Hi"), llm.STOP, llm.USAGE, llm.DONE)
        call.end()

    upstream.plan(*[script] * 4)
    asked: Any = {"model": "agent", "messages": [{"role": "user", "content": "hello"}]}
    with openai.OpenAI(api_key="none", base_url=f"{behind.url}/v1", max_retries=0) as client:
        whole = client.chat.completions.create(**asked)
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        streamed: list[Any] = list(client.chat.completions.create(**asked, **options))
        without: list[Any] = list(client.chat.completions.create(**asked, stream=True))
        response: Any = client.responses.create(model="agent", input="hello")
    usages = [whole.usage, streamed[-1].usage, response.usage]
    assert [usage and usage.total_tokens for usage in usages] == [3, 3, 3]
    assert not any(chunk.usage for chunk in [*streamed[:-1], *without])
    upstream.settle()


def test_a_function_of_the_clients_is_called_in_a_response(behind: Server, upstream: Upstream) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}

    def calling(call: llm.Call) -> None:
        call.head()
        piece = {"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": "{}"}}
        call.send(llm.token("Let me see."), llm.chunk({"tool_calls": [piece]}), llm.chunk({}, "tool_calls"), llm.DONE)
        call.end()

    upstream.plan(calling, llm.answer("Rain."))
    with openai.OpenAI(api_key="none", base_url=f"{behind.url}/v1", max_retries=0) as client:
        with client.responses.stream(model="m", input="weather?", tools=[tool]) as stream:
            first = stream.get_final_response()
        message, call = first.output
        assert (message.type, call.type) == ("message", "function_call")
        assert first.output_text == "Let me see."
        output: Any = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}
        asked: Any = [{"role": "user", "content": "weather?"}, *(item.model_dump() for item in first.output), output]
        assert client.responses.create(model="m", input=asked, tools=[tool]).output_text == "Rain."
    assert [message["role"] for message in upstream.calls[1].json["messages"]] == [
        "user",
        "assistant",
        "assistant",
        "tool",
    ]
    assert upstream.calls[1].json["tools"][0]["function"]["name"] == "weather"
    upstream.settle()


# In a list of runs


def test_each_run_is_listed_by_what_its_user_asked(server: Server) -> None:
    system, earlier = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}
    last = {"role": "user", "content": [{"type": "text", "text": QUESTION}]}
    parts = [{"role": "user", "parts": [{"type": "text", "text": text}]} for text in ("hello", QUESTION)]
    messages = [system, earlier, {"role": "assistant", "content": "Hi"}, last]
    for path, body in {
        "/ai/chat": {"messages": parts},
        "/ag-ui": {"threadId": fresh(), "runId": fresh(), "messages": messages},
        "/v1/chat/completions": {"messages": messages},
        "/v1/responses": {"input": messages},
    }.items():
        assert server.client.post(path, json=body).status_code == 200
        listed = server.client.get("/runs").json()["runs"][0]
        assert (listed["route"], listed["about"]) == (f"POST {path}", QUESTION)
    server.client.post("/v1/responses", json={"input": "what is 6*7?"})
    assert server.client.get("/runs").json()["runs"][0]["about"] == "what is 6*7?"


# In a page


@needs("chromium")
def test_a_page_posts_and_hears_every_event_once_over_cuts(server: Server, browser: Browser) -> None:
    """By the module that the service serves."""
    script = """async (body) => {
      const { eventSource, resumingFetch } = await import("/static/resuming-fetch.js")
      const headers = { "content-type": "application/json" }
      const response = await resumingFetch("/v1/chat/completions", { method: "POST", headers, body })
      const told = []
      const source = eventSource(response.body)
      source.addEventListener("message", (event) => told.push(event.data))
      await new Promise((resolve) => source.addEventListener("error", resolve))
      return told
    }"""
    asked = {"model": "agent", "stream": True, "messages": [{"role": "user", "content": QUESTION}]}
    with relay(server.port, cuts(4, "page")) as line:
        page = browser.new_page()
        page.goto(f"{line.url}/healthz")
        told = page.evaluate(script, json.dumps(asked))
        page.close()
        line.wait_streams(5)
    assert [json.loads(data) for data in told[:-1]] == stored(server, newest(server))
    assert told[-1] == "[DONE]"


# Two replicas on one Redis


@needs("valkey")
@node_clients
def test_every_client_goes_on_at_another_replica(tmp_path: Path, upstream: Upstream) -> None:
    """Each connection goes to the other one of the two."""
    thread, run = fresh(), fresh()
    upstream.plan(*[llm.answer(*WORDS * 5)] * 5, llm.silent(llm.FIRST, *map(llm.token, WORDS)))
    with redis_server.serving("valkey") as redis, ExitStack() as stack:
        env = {**ENV, "SSEAPP_LOG": redis.url, "OPENAI_BASE_URL": upstream.url, "OPENAI_MODEL": "m"}
        first, second = [stack.enter_context(serve(tmp_path / name, env=env)) for name in ("1", "2")]

        def over_cuts(client: str, path: str, cut: Sequence[int], **asked: Any) -> Told:
            with relay([first.port, second.port], cut) as line:
                told = node(client, url=f"{line.url}{path}", **asked)
                line.wait_streams(len(cut) + 1)
            return told

        told = over_cuts("ai", "/ai/chat", cuts(5), chatId=fresh(), text=QUESTION, resuming=True)
        assert told.chunks == stored(second, newest(second))
        told = over_cuts("workflow", "/ai/chat", [900, 700, 1200], chatId=fresh(), text=QUESTION)
        assert told.chunks == stored(second, told.rest["run"])
        told = over_cuts("ag-ui", "/ag-ui", cuts(5), threadId=thread, runId=fresh(), text=QUESTION, resuming=True)
        assert told.chunks == stored(second, newest(second))
        told = over_cuts("tanstack", "/ag-ui", cuts(5), threadId=thread, runId=run, text=QUESTION)
        assert len(told.chunks) == len(stored(second, newest(second)))
        told = over_cuts("openai", "/v1", cuts(5), model="agent", responses=True, text=QUESTION, resuming=True)
        assert [chunk["sequence_number"] for chunk in told.chunks] == list(range(len(told.chunks)))
        assert told.rest["final"]["status"] == "completed"
        # A page's reload, and its stop, at the replica that doesn't work on the run.
        chat = fresh()
        with at_work("ai", url=f"{first.url}/ai/chat", chatId=chat, text=QUESTION) as client:
            found = wait_for_run(second, chat)
            with relay(second.port) as line:
                with at_work("ai", url=f"{line.url}/ai/chat", chatId=chat, reconnect=True) as again:
                    line.wait_streams(1)
                    assert second.client.post(f"/ai/chat/{chat}/stop").status_code == 204
                    assert ended(client).chunks == stored(second, found) == ended(again).chunks
    upstream.settle()
