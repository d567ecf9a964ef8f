"""Each program of examples/ does what it says."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from unittest.mock import ANY

import anyio
import httpx
import pytest
from playwright.sync_api import Browser
from streamlit.testing.v1 import AppTest

from examples import fastapi_host, merge_sources, status_callback
from ssecore.testing import Transport, assert_stream, connect, lifespan
from ssecore.testing.fixtures import OpenStream, open_stream
from tests import chromium, serving, upstream
from tests.needs import needs
from tests.relay import relay
from tests.serving import Server, serve, serve_uvicorn
from tests.test_client import cut, numbered, over, quick, stream
from tests.upstream import Call

__all__ = ["open_stream", "quick"]

browser, server = chromium.browser, serving.server

EXAMPLES: Final = Path(__file__).parent.parent / "examples"
NODE: Final = Path(__file__).parent / "node"


def test_all_of_them_are_here() -> None:
    tested = {"fastapi_host.py", "merge_sources.py", "status_callback.py", "streamlit_chat.py", "vanilla.html"}
    tested |= {"ai_sdk_chat.mjs", "ag_ui_chat.mjs", "openai_background.py"}
    tested |= {"react_chat.html", "react_chat.jsx"}  # in test_react.py
    tested |= {"langgraph_agent.py", "openai_agents_agent.py", "pydantic_ai_agent.py"}  # in test_agent_examples.py
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".html", ".mjs", ".jsx")} == tested


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_merged_sources_go_on_over_cuts_and_one_that_fails_is_said(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read() -> list[tuple[str | None, Any]]:
        app = merge_sources.make()
        async with app.running(), httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as http:
            with anyio.fail_after(20):
                async with http.stream("GET", "/merged") as response:
                    events = await assert_stream(response, ...)
        return [(event.event, event.data and json.loads(event.data)) for event in events]

    with upstream.serve() as one, upstream.serve() as other:
        one.plan(cut(numbered(1)), stream(numbered(2)), over)
        other.plan(upstream.refuse(403, b'{"detail": "not you"}'))
        monkeypatch.setenv("SOURCES", f"{one.url} {other.url}")
        told = anyio.run(read, backend=backend)
        one.settle()
        other.settle()
    assert [data for kind, data in told if kind is None] == [{"source": 0, "data": "1"}, {"source": 0, "data": "2"}]
    [failure] = [data["error"] for kind, data in told if kind == "source_failed"]
    assert "not you" in failure
    assert told[-1] == ("complete", "")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_whoever_leaves_the_merged_stream_leaves_its_sources(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler yields inside of a source's block and of `merge`'s: leaving ends both."""

    def forever(call: Call) -> None:
        call.head()
        call.send(numbered(1))
        call.wait_gone()

    async def leave() -> None:
        app = merge_sources.make()
        with anyio.fail_after(20):
            async with app.running(), connect(app, "GET", "/merged") as exchange:
                await assert_stream(exchange, (None, {"source": 0, "data": "1"}), ends=False)

    with upstream.serve() as source:
        source.plan(forever)
        monkeypatch.setenv("SOURCES", source.url)
        anyio.run(leave, backend=backend)
        source.settle()


async def test_a_callback_is_bounded_and_what_is_left_out_is_counted(open_stream: OpenStream) -> None:
    stream = open_stream(status_callback.make(), "GET", "/ask?question=why")
    steps = [("status", {"status": step}) for step in ("reading", "thinking", "writing")]
    events = await assert_stream(stream, *steps, ..., ("result", {"answer": "yhw", "left_out": ANY}), ...)
    statuses = [event for event in events if event.event == "status"]
    [result] = [json.loads(event.data) for event in events if event.event == "result"]
    assert 0 < result["left_out"] == 1003 - len(statuses)


async def test_the_hosts_users_are_the_callers() -> None:
    app = fastapi_host.make()
    async with lifespan(app), httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as http:
        refused = await http.get("/sse/news")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        await http.get("/")
        async with http.stream("GET", "/sse/news") as response:
            await assert_stream(response, ("init", {"hello": "guest 1"}), ends=False)
        accepted = await http.get("/sse/answer?question=why", headers={"prefer": "respond-async"})
        run = accepted.url.join(accepted.headers["location"])
        assert run.path.startswith("/sse/runs/")
        async with http.stream("GET", run) as response:
            await assert_stream(response, ("token", "You"), ..., ("token", "why"), ("done", ""))
        del http.cookies["session"]
        await http.get("/")
        assert (await http.get(run)).status_code == 404, "another guest's"


@needs("chromium")
def test_the_page_without_a_library_goes_on_over_a_cut(browser: Browser, tmp_path: Path) -> None:
    with serve_uvicorn(tmp_path, app="examples.fastapi_host:make") as host, relay(host.port, [10_000, 700]) as line:
        page = browser.new_page()
        failures: list[str] = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(line.url)
        page.wait_for_function("state.textContent === 'hello, guest 1'")
        host.client.post("/news?headline=It+works")
        page.wait_for_selector("#news li")
        assert page.text_content("#news li") == "It works"
        page.click("button")
        page.wait_for_function("state.textContent === 'done'")
        assert page.text_content("#answer") == "You asked: does this survive a cut? "
        assert len([a for a in line.answers() if b"event: token" in a]) == 2 and not failures
        page.close()


@pytest.fixture
def chat(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppTest]:
    monkeypatch.setenv("SSEAPP_URL", server.url)
    yield AppTest.from_file(str(EXAMPLES / "streamlit_chat.py"), default_timeout=20)


@needs("time")
def test_a_chat_in_streamlit_shows_status_answer_and_sources(chat: AppTest, server: Server) -> None:
    server.client.post("/tasks/import", content="title\nWrite the docs\n", headers={"content-type": "text/csv"}).read()
    page = chat.run()
    assert not page.exception
    page = page.chat_input[0].set_value("which tasks are about docs?").run()
    assert not page.exception and not page.error
    assert [message.name for message in page.chat_message] == ["user", "assistant"]
    answer = page.chat_message[1]
    assert answer.status[0].label == "done" and "Write the docs" in answer.markdown[0].value
    assert answer.caption, "the sources"
    page = page.chat_input[0].set_value("and what is 2 + 2?").run()
    assert len(page.chat_message) == 4 and "4" in page.chat_message[3].markdown[0].value


def test_a_chat_in_streamlit_says_what_is_wrong(chat: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSEAPP_URL", "http://127.0.0.1:1")
    page = chat.run().chat_input[0].set_value("hi").run()
    assert not page.exception and "can't be reached" in page.error[0].value


# Front ends, each over a line that breaks


@pytest.fixture(scope="module")
def nearby(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Where nobody waits for long before the next try."""
    with serve(tmp_path_factory.mktemp("nearby"), env={"SSEAPP_RETRY_MS": "1"}) as server:
        yield server


def run(command: list[str], folder: Path, url: str, input: str = "") -> str:
    environ = {"PATH": os.environ["PATH"], "SSEAPP_URL": url, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=folder, env=environ, input=input, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def node_program(server: Server, folder: Path, name: str) -> list[str]:
    """The command of an example, with what its head says to install beside it."""
    (folder / "node_modules").symlink_to(NODE / "node_modules")
    (folder / "resuming-fetch.js").write_bytes(server.client.get("/static/resuming-fetch.js").content)
    (folder / "package.json").write_text('{"type": "module"}')
    program = folder / name
    program.write_bytes((EXAMPLES / name).read_bytes())
    return ["node", str(program)]


@needs("node-clients")
@pytest.mark.parametrize(
    ("name", "arguments", "input", "shown"),
    [
        ("ai_sdk_chat.mjs", ["what is 6*7?"], "", ["(I call calculate.)", '"value":"42"', "6*7 = 42"]),
        ("ag_ui_chat.mjs", [], "what is 6*7?\nand 6*8?\n", ["[calculate", "6*7 = 42", "6*8 = 48"]),
    ],
)
def test_a_chat_in_node_goes_on_over_cuts(
    nearby: Server, tmp_path: Path, name: str, arguments: list[str], input: str, shown: list[str]
) -> None:
    command = node_program(nearby, tmp_path, name)
    with relay(nearby.port, [900, re.compile(b"text-delta|TEXT_MESSAGE_CONTENT")]) as line:
        printed = run([*command, *arguments], tmp_path, line.url, input)
        line.wait_streams(3)
    assert all(text in printed for text in shown), printed


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ai_sdk_chat.mjs", marks=needs("node-clients")),
        pytest.param("ag_ui_chat.mjs", marks=needs("node-clients")),
        "openai_background.py",
    ],
)
def test_a_client_without_its_service_says_in_one_line_what_to_do(server: Server, tmp_path: Path, name: str) -> None:
    url = f"http://127.0.0.1:{serving.free_port()}"
    command = node_program(server, tmp_path, name) if name.endswith(".mjs") else [sys.executable, str(EXAMPLES / name)]
    environ = {"PATH": os.environ["PATH"], "SSEAPP_URL": url}
    done = subprocess.run(
        [*command, "hello"], cwd=tmp_path, env=environ, input="hello\n", capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (1, "")
    assert done.stderr == f"can't reach {url}: start the service (make run), or set SSEAPP_URL\n"


@needs("time")
def test_a_response_in_the_background_is_read_over_cuts(nearby: Server, tmp_path: Path) -> None:
    with relay(nearby.port, [1500, re.compile(b"output_text.delta")]) as line:
        program = str(EXAMPLES / "openai_background.py")
        printed = run([sys.executable, program, "what is 6*7?"], tmp_path, line.url)
        line.wait_streams(3)
    assert printed.endswith('[{"expression":"6*7"}]\n6*7 = 42\n')
