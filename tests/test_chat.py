"""The chat routes, from a real server process, with a model made by hand (upstream.py) or the mock behind them."""

import base64
import gc
import json
import logging
import os
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest
import trio.testing

from handlers import chat
from handlers.answer import ModelError
from handlers.chat import ChatMessage, MockModel, open_model
from ssecore.errors import SettingsError, SSEAppError
from ssecore.settings import Settings
from ssecore.wire import HEARTBEAT, Decoder, Event
from tests.serving import wait_until
from tests.upstream import (
    DONE,
    FIRST,
    LIMIT_S,
    STOP,
    Call,
    Script,
    Upstream,
    answer,
    refuse,
    serve,
    silent,
    token,
)

ROOT: Final = Path(__file__).parent.parent
KEY: Final = "sk-test-0123456789"
HELLO: Final = [ChatMessage("user", "Hello")]
HELLO_JSON: Final = [{"role": "user", "content": "Hello"}]

both_backends = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


# The service, as a process


class Service:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.log: list[str] = []
        self._new: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process = process
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_logged("serving on ").rpartition(" ")[2]
        self.client = httpx.Client(base_url=self.url, timeout=LIMIT_S, trust_env=False)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line.rstrip())
            self._new.put(line.rstrip())

    def wait_logged(self, text: str) -> str:
        """The next line with the text. Those before it are passed over."""
        while True:
            try:
                line = self._new.get(timeout=LIMIT_S)
            except queue.Empty:
                pytest.fail(f"{text!r} was not logged:\n" + "\n".join(self.log))
            if text in line:
                return line

    def stop(self) -> int:
        self.client.close()
        self._process.terminate()
        code = self._process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        return code


@contextmanager
def service(folder: Path, **variables: str) -> Iterator[Service]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SSEAPP_", "OPENAI_"))}
    command = [sys.executable, "-m", "sseapp", "serve", "--port", "0", "--data-dir", str(folder)]
    environment = {**kept, "no_proxy": "*", **variables}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            running = Service(process)
            yield running
            assert running.stop() == 0
        finally:
            process.kill()
    assert not [line for line in running.log if line.startswith(("ERROR", "CRITICAL"))], running.log


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with service(tmp_path_factory.mktemp("mock"), SSEAPP_MOCK_DELAY_S="0") as running:
        yield running.client


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, shared_upstream: Upstream) -> Iterator[Service]:
    variables = {"OPENAI_BASE_URL": shared_upstream.url, "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "m"}
    times = {"SSEAPP_HEARTBEAT_S": "0.2", "SSEAPP_LINGER_S": "0.2"}
    with service(tmp_path_factory.mktemp("llm"), **variables, **times) as running:
        yield running


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Iterator[Upstream]:
    shared_upstream.plan()
    yield shared_upstream
    shared_upstream.settle()


OPENING: Final = b"retry: 2000\n"


def events(answer: "httpx.Response | Reading") -> list[Event]:
    """A whole answer's events, without the ids, which are the run's: in each frame the last line, without a hole."""
    run, body = answer.headers["run-id"].encode(), answer.content
    opening = re.match(rb"retry: 2000\n(id: %b\.0\n\n)?" % re.escape(run), body)
    assert opening, body
    return numbered_events(body[opening.end() :], run)


def numbered_events(body: bytes, run: bytes, first: int = 1) -> list[Event]:
    *frames, rest = body.split(b"\n\n")
    assert rest == b""
    found = []
    for number, frame in enumerate(frames, first):
        while frame.startswith(HEARTBEAT):
            frame = frame.removeprefix(HEARTBEAT)
        fields, _, id = frame.rpartition(b"\n")
        assert id == b"id: %b.%d" % (run, number)
        assert not re.search(rb"^id", fields, re.MULTILINE)
        found += Decoder().feed(fields + b"\n\n")
    return found


def framed(answer: httpx.Response, *frames: bytes) -> bytes:
    """What an answer must be, byte for byte, whose run has these frames."""
    run = answer.headers["run-id"].encode()
    assert re.fullmatch(rb"[A-Za-z0-9_-]{22}", run)
    return OPENING + b"".join(b"%b\nid: %b.%d\n\n" % (frame, run, number) for number, frame in enumerate(frames, 1))


def runs(running: Service) -> list[dict[str, Any]]:
    """All runs, newest first. Looking at the list counts as no interest in one."""
    listed: list[dict[str, Any]] = running.client.get("/runs").json()["runs"]
    return listed


def wait_lingered(running: Service) -> list[Event]:
    """Wait until the newest run is cancelled because nobody reads it, and give its events."""
    (newest,) = wait_until(lambda: [run for run in runs(running)[:1] if run["state"] != "running"])
    assert newest["state"] == "cancelled"
    *before, end = events(running.client.get(f"/runs/{newest['run']}/events"))
    if newest["route"] == "GET /chat":
        assert (before.pop(), end) == (Event('{"type":"cancelled","reason":"linger"}'), Event("[DONE]"))
    else:
        assert end == Event('{"reason":"linger"}', "cancelled")
    return before


def ask(running: Service, prompt: str = "Hello") -> httpx.Response:
    return running.client.get("/chat", params={"prompt": prompt})


def post(running: Service) -> httpx.Response:
    return running.client.post("/chat/stream", json=HELLO_JSON)


class Reading:
    """An answer still under way."""

    def __init__(self, response: httpx.Response) -> None:
        self.headers = response.headers
        self._bytes = response.iter_raw()
        self.seen = b""

    def until(self, end: bytes) -> bytes:
        while end not in self.seen:
            self.seen += next(self._bytes)
        return self.seen

    @property
    def content(self) -> bytes:
        """All of it, to its end."""
        self.seen += b"".join(self._bytes)
        return self.seen


@contextmanager
def stream_post(running: Service) -> Iterator[tuple[httpx.Response, Reading]]:
    with running.client.stream("POST", "/chat/stream", json=HELLO_JSON) as response:
        yield response, Reading(response)


def named(*texts: str) -> list[Event]:
    return [Event(text, "token") for text in texts]


# The mock, byte for byte


def test_mock_answers_a_prompt_with_data_only(mock: httpx.Client) -> None:
    response = mock.get("/chat", params={"prompt": "hi there"})
    assert response.headers["content-type"] == "text/event-stream"
    words = (b"This ", b"is ", b"a ", b"mock ", b"response ", b"to: ", b"hi ", b"there")
    frames = [b'data: {"content":"%b"}' % word for word in words]
    assert response.content == framed(response, *frames, b"data: [DONE]")


def test_mock_answers_the_last_user_message_with_tokens(mock: httpx.Client) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "no"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "neither"},
    ]
    response = mock.post("/chat/stream", json=messages)
    assert response.headers["content-type"] == "text/event-stream"
    words = (b"This ", b"is ", b"a ", b"mock ", b"response ", b"to: ", b"yes")
    frames = [b"event: token\ndata: %b" % word for word in words]
    assert response.content == framed(response, *frames, b"event: done\ndata: ")


@pytest.mark.parametrize("prompt", [" ", "  two\n\nlines \t", "\u2028é🙂\x1f\0x", "data: x\n\nevent: done", "w" * 8000])
def test_mock_pieces_joined_are_the_text(mock: httpx.Client, prompt: str) -> None:
    text = f"This is a mock response to: {prompt}"
    *pieces, end = events(mock.get("/chat", params={"prompt": prompt}))
    assert ("".join(json.loads(piece.data)["content"] for piece in pieces), end.data) == (text, "[DONE]")

    *tokens, done = events(mock.post("/chat/stream", json=[{"role": "user", "content": prompt}]))
    assert ("".join(piece.data for piece in tokens), done) == (text, Event("", "done"))


def test_prompt_may_have_8000_characters_whatever_their_bytes(mock: httpx.Client) -> None:
    assert mock.get("/chat", params={"prompt": "é" * 8000}).status_code == 200


def test_chat_ends_for_good(mock: httpx.Client) -> None:
    assert mock.get("/chat?prompt=x", headers={"last-event-id": "end"}).status_code == 204
    whole = mock.get("/chat?prompt=x")
    last = f"{whole.headers['run-id']}.{len(events(whole))}"
    assert mock.get("/chat?prompt=x", headers={"last-event-id": last}).status_code == 204


@pytest.mark.parametrize(
    "anyio_backend", [("trio", {"clock": trio.testing.MockClock(autojump_threshold=0)})], ids=["trio"]
)
async def test_mock_pauses_between_words(anyio_backend: Any) -> None:
    begin = anyio.current_time()
    times = []
    async with aclosing(MockModel(0.5).stream(HELLO)) as texts:
        async for _ in texts:
            times.append(anyio.current_time() - begin)  # noqa: PERF401
    assert times == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3])
    assert anyio.current_time() - begin == pytest.approx(3)


def test_messages_up_to_their_bounds_are_taken(mock: httpx.Client) -> None:
    messages = [*99 * HELLO_JSON, {"role": "user", "content": "x" * 100_000, "name": "ignored"}]
    assert re.search(rb"event: done\ndata: \nid: .*\n\n\Z", mock.post("/chat/stream", json=messages).content)


# The upstream: what is asked of it, and a good answer


def test_upstream_is_asked_as_openai_is(llm: Service, upstream: Upstream) -> None:
    upstream.plan(answer("Hi"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é🙂"}]
    response = llm.client.post("/chat/stream", json=messages)
    assert response.content == framed(response, b"event: token\ndata: Hi", b"event: done\ndata: ")

    call = upstream.calls[0]
    assert call.request_line == "POST /v1/chat/completions HTTP/1.1"
    assert call.json == {"model": "m", "messages": messages, "stream": True}
    wanted = {"authorization": f"Bearer {KEY}", "content-type": "application/json", "accept": "text/event-stream"}
    assert wanted.items() <= call.headers.items()
    assert call.headers["accept-encoding"] == "identity"  # a compressor holds tokens back


def test_prompt_becomes_one_user_message(llm: Service, upstream: Upstream) -> None:
    upstream.plan(answer("Hi", "\n there"))
    response = ask(llm, "Hello")
    frames = (b'data: {"content":"Hi"}', b'data: {"content":"\\n there"}', b"data: [DONE]")
    assert response.content == framed(response, *frames)
    assert upstream.calls[0].json["messages"] == HELLO_JSON


def test_head_asks_nothing(llm: Service, upstream: Upstream) -> None:
    response = llm.client.head("/chat?prompt=x")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
    assert not upstream.calls


def test_token_goes_on_as_it_comes(llm: Service, upstream: Upstream) -> None:
    told = threading.Semaphore(0)

    def script(call: Call) -> None:
        call.head()
        for text in ("a", "b", "c"):
            call.send(token(text))
            assert told.acquire(timeout=LIMIT_S)
        call.send(STOP, DONE)
        call.end()

    upstream.plan(script)
    with stream_post(llm) as (_, reading):
        for text in ("a", "b", "c"):
            reading.until(b"event: token\ndata: %b\nid: " % text.encode())  # the upstream waits for it
            told.release()
        assert events(reading) == [*named("a", "b", "c"), Event("", "done")]


ANSWER: Final = (FIRST + token("é🙂") + token("\u2028\r\n!") + STOP + DONE).replace(b"\n", b"\r\n")


def test_token_cut_inside_a_character_and_inside_crlf_is_whole(llm: Service, upstream: Upstream) -> None:
    def script(call: Call) -> None:
        call.head()
        call.send(*(bytes((byte,)) for byte in ANSWER))
        call.end()

    upstream.plan(script)
    assert events(post(llm)) == [*named("é🙂", "\u2028\n!"), Event("", "done")]


# Faults


def cut(call: Call) -> None:
    call.end()


def reset(call: Call) -> None:
    call.reset()


def closed(call: Call) -> None:
    call.raw(b"ff\r\ndata: {")


def garbled(call: Call) -> None:
    call.raw(b"zz\r\n")  # no chunk's size
    call.wait_gone()


def told(call: Call) -> None:
    call.send(b'data: {"error": {"message": "overloaded, says %b", "code": 500}}\n\n' % KEY.encode())
    call.end()


def told_plainly(call: Call) -> None:
    call.send(b'event: error\ndata: {"error": "boom", "choices": []}\n\n', STOP, DONE)
    call.end()


def malformed(data: bytes) -> Script:
    def script(call: Call) -> None:
        call.send(b"data: " + data + b"\n\n", STOP, DONE)
        call.end()

    return script


def long_event(call: Call) -> None:
    call.send(*[b": " + b"x" * 65536 + b"\n"] * 32)  # comments are no part of an event, however many
    call.send(b"data: ", *[b"x" * 65536] * 32)


FAULTS: Final[dict[str, tuple[Script, str]]] = {
    "ended": (cut, "upstream_cut"),
    "reset": (reset, "upstream_cut"),
    "closed in a chunk": (closed, "upstream_cut"),
    "no chunk": (garbled, "upstream_cut"),
    "an error object": (told, "upstream_error"),
    "an error text": (told_plainly, "upstream_error"),
    "no JSON": (malformed(b'{"choices": [{"delta": {"content": "H'), "upstream_malformed"),
    "content of another type": (malformed(b'{"choices": [{"delta": {"content": 5}}]}'), "upstream_malformed"),
    "nested without end": (malformed(b'{"error": ' + b"[" * 100_000), "upstream_malformed"),
    "a text without quotes": (malformed(b"internal error"), "upstream_malformed"),
    "too large an event": (long_event, "upstream_too_large"),
}
faults = pytest.mark.parametrize(("fault", "code"), FAULTS.values(), ids=FAULTS)


@faults
def test_fault_before_the_first_token_is_a_problem(llm: Service, upstream: Upstream, fault: Script, code: str) -> None:
    def script(call: Call) -> None:
        call.head()
        call.send(FIRST)
        fault(call)

    upstream.plan(script, script)
    before = runs(llm)
    for response in (ask(llm), post(llm)):
        assert response.headers["content-type"] == "application/problem+json"
        assert (response.status_code, response.json()["code"]) == (502, code)
        assert KEY not in response.text
        assert "says" not in response.text
    assert len(upstream.calls) == 2  # none is asked for again
    assert runs(llm) == before  # nor is anything kept


@faults
def test_fault_behind_a_token_is_an_event(llm: Service, upstream: Upstream, fault: Script, code: str) -> None:
    told = threading.Semaphore(0)

    def script(call: Call) -> None:
        call.head()
        call.send(FIRST, token("Hi"))
        assert told.acquire(timeout=LIMIT_S)
        fault(call)

    upstream.plan(script, script)
    with stream_post(llm) as (_, reading):
        reading.until(b"data: Hi\nid: ")
        told.release()
        *tokens, failure = events(reading)
    assert (tokens, failure.event) == (named("Hi"), "error")
    error = json.loads(failure.data)
    assert error == {"error": error["error"], "code": code}

    told.release()
    data, failure, end = events(ask(llm))
    assert (data, end) == (Event('{"content":"Hi"}'), Event("[DONE]"))
    assert [run["state"] for run in runs(llm)[:2]] == ["failed"] * 2
    assert json.loads(failure.data) == {"type": "error", **error}
    assert failure.event is None
    assert len(upstream.calls) == 2  # somebody may have paid for the token


def test_fault_in_one_packet_with_a_token_comes_behind_it(llm: Service, upstream: Upstream) -> None:
    def script(call: Call) -> None:
        call.head()
        call.send(FIRST + token("H") + token("i") + b"data: {\n\n" + STOP + DONE)
        call.end()

    upstream.plan(script)
    *tokens, failure = events(post(llm))
    assert (tokens, failure.event) == (named("H", "i"), "error")


def test_break_behind_the_finish_is_no_fault(llm: Service, upstream: Upstream) -> None:
    def script(call: Call) -> None:
        call.head()
        call.send(token("Hi"), STOP)
        call.raw(b"ff\r\n")  # a part of a chunk, and the end

    upstream.plan(script)
    assert events(post(llm)) == [*named("Hi"), Event("", "done")]


def test_answer_without_end_is_cut_at_a_mebibyte(llm: Service, upstream: Upstream) -> None:
    def script(call: Call) -> None:
        call.head()
        while True:
            call.send(*[token("é" * 1000)] * 100)

    upstream.plan(script)
    *tokens, failure = events(post(llm))
    size = sum(len(event.data.encode()) for event in tokens)
    assert 1024 * 1024 - 2000 <= size <= 1024 * 1024
    assert json.loads(failure.data)["code"] == "upstream_too_large"


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (refuse(400), 502, "upstream_error"),
        (refuse(401), 502, "upstream_auth"),
        (refuse(403), 502, "upstream_auth"),
        (refuse(404), 502, "upstream_error"),
        (refuse(500), 502, "upstream_error"),
        (refuse(502, b"<html>", retry_after="1"), 502, "upstream_error"),
        (refuse(201), 502, "upstream_error"),
        (refuse(307, location="http://127.0.0.1:9/"), 502, "upstream_error"),
        (refuse(200, b'{"choices": []}'), 502, "upstream_malformed"),
        (refuse(200, STOP + DONE, content_type="text/html"), 502, "upstream_malformed"),
        (
            refuse(200, b"\x1f\x8b", content_type="text/event-stream", content_encoding="gzip"),
            502,
            "upstream_malformed",
        ),
        (Call.reset, 502, "upstream_cut"),
        (lambda call: call.raw(b"\x16\x03\x01\r\n\r\n"), 502, "upstream_cut"),
        (lambda call: None, 502, "upstream_cut"),
    ],
    ids=["400", "401", "403", "404", "500", "502", "201", "307", "JSON", "HTML", "gzip", "reset", "no HTTP", "closed"],
)
def test_refusal_is_a_problem_and_not_tried_again(
    llm: Service, upstream: Upstream, script: Script, status: int, code: str
) -> None:
    upstream.plan(script)
    response = ask(llm)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert len(upstream.calls) == 1
    assert "retry-after" not in response.headers


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_says_which_setting_to_change(
    llm: Service, upstream: Upstream, status: int
) -> None:
    upstream.plan(refuse(status, location=f"{upstream.url}/v2/chat/completions?at={status}"))
    response = ask(llm)
    assert (response.status_code, response.json()["code"]) == (502, "upstream_error")
    assert "OPENAI_BASE_URL" in response.json()["detail"] and "/v2/" not in response.text
    assert len(upstream.calls) == 1
    logged = llm.wait_logged(f"/v2/chat/completions?at={status}")
    assert "redirected to" in logged and "change OPENAI_BASE_URL" in logged


def test_neither_key_nor_the_upstreams_words_reach_a_client_and_no_key_the_log(
    llm: Service, upstream: Upstream
) -> None:
    words = f"Incorrect API key provided: {KEY}.\n\x1b[31mforged line"
    upstream.plan(refuse(401, json.dumps({"error": {"message": words}}).encode()))
    response = ask(llm)
    assert response.json()["code"] == "upstream_auth"
    assert not [word for word in (KEY, "Incorrect", "forged") if word in response.text]
    assert "Incorrect API key provided: ***." in llm.wait_logged("Incorrect")

    def script(call: Call) -> None:
        call.head()
        told(call)

    upstream.plan(script)
    assert KEY not in ask(llm).text
    assert "overloaded, says ***" in llm.wait_logged("overloaded, says *")
    assert not [line for line in llm.log if KEY in line or "\x1b" in line]


def test_refusal_that_never_ends_is_not_waited_for(llm: Service, upstream: Upstream) -> None:
    def script(call: Call) -> None:
        call.raw(b"HTTP/1.1 500 Whatever\r\ncontent-length: 100\r\n\r\nsome")
        call.wait_gone()

    upstream.plan(script)
    assert ask(llm).json()["code"] == "upstream_error"


async def test_refusal_is_read_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(call: Call) -> None:
        call.raw(b"HTTP/1.1 500 Whatever\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            call.send(b"x" * 1000)

    monkeypatch.setattr(chat, "REFUSAL_TIMEOUT_S", 10 * LIMIT_S)
    with serve() as upstream:
        upstream.plan(script)
        assert (await fails(upstream.url)).code == "upstream_error"


@pytest.mark.parametrize("status", [400, 500])
async def test_refusal_is_freed_without_a_garbage_collection(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Its frames have the request: up to a MiB of messages."""
    monkeypatch.setenv("no_proxy", "*")
    with serve() as upstream:
        upstream.plan(refuse(status))
        gc.collect()
        gc.disable()
        try:
            with suppress(ModelError):  # `pytest.raises` would keep it
                await texts(upstream.url)
            assert len(upstream.calls) == 1
            assert not [each for each in gc.get_objects() if isinstance(each, ModelError)]
        finally:
            gc.enable()


# Asking again


@pytest.mark.parametrize("refusals", [[429], [503], [429, 503]])
def test_refusal_that_passes_is_tried_again(llm: Service, upstream: Upstream, refusals: list[int]) -> None:
    upstream.plan(*(refuse(status, retry_after="0") for status in refusals), answer("Hi"))
    assert events(post(llm)) == [*named("Hi"), Event("", "done")]
    assert len(upstream.calls) == len(refusals) + 1
    assert len({json.dumps(call.json) for call in upstream.calls}) == 1  # the same request


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (429, "upstream_rate_limited", "the model's rate limit is reached; try again in 0 s"),
        (503, "upstream_error", "the model is not available; try again in 0 s"),
    ],
)
def test_refusal_is_tried_three_times_in_all(
    llm: Service, upstream: Upstream, status: int, code: str, text: str
) -> None:
    upstream.plan(*[refuse(status, retry_after="0")] * 3)
    response = ask(llm)
    assert (response.status_code, response.headers["retry-after"]) == (503, "0")
    assert (response.json()["code"], response.json()["detail"]) == (code, text)


def test_refusals_without_a_time_fail_within_the_first_second(llm: Service, upstream: Upstream) -> None:
    upstream.plan(*[refuse(429)] * 3)
    response = ask(llm)
    assert response.status_code == 503  # a 200 with an error event after a second
    assert "retry-after" not in response.headers
    assert response.json()["detail"].endswith("; try again later")


IN_A_MINUTE: Final = format_datetime(datetime.now(UTC) + timedelta(minutes=1), usegmt=True)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("6", "in 6 s"),
        ("3600", "in 3600 s"),
        (IN_A_MINUTE, "later"),
    ],
    ids=["6", "3600", "date"],
)
def test_long_retry_after_is_handed_on(llm: Service, upstream: Upstream, given: str, text: str) -> None:
    upstream.plan(refuse(429, retry_after=given))
    response = ask(llm)
    assert (response.status_code, response.headers["retry-after"]) == (503, given)
    assert response.json()["detail"] == f"the model's rate limit is reached; try again {text}"
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("given", ["9" * 5000, "é", "x" * 5000])
def test_retry_after_that_is_rubbish_is_not(llm: Service, upstream: Upstream, given: str) -> None:
    upstream.plan(refuse(429, retry_after=given))
    response = ask(llm)
    assert (response.status_code, response.headers.get("retry-after")) == (503, None)


@pytest.mark.parametrize("given", ["1", "5"])
async def test_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    with serve() as upstream:
        upstream.plan(refuse(429, retry_after=given), refuse(503), answer("Hi"))
        assert await texts(upstream.url) == ["Hi"]
    assert pauses[0] == float(given)
    assert chat.BACKOFF_S <= pauses[1] <= 2 * chat.BACKOFF_S


# Time


def test_slow_first_token_finds_a_stream_that_lives(llm: Service, upstream: Upstream) -> None:
    opened = threading.Event()

    def script(call: Call) -> None:
        assert opened.wait(LIMIT_S)
        answer("Hi")(call)

    upstream.plan(script)
    with stream_post(llm) as (response, reading):
        assert response.status_code == 200
        opening = b"id: %b.0\n\n" % response.headers["run-id"].encode()  # a cut here resumes the run
        assert reading.until(HEARTBEAT) == OPENING + opening + HEARTBEAT
        opened.set()
        assert events(reading) == [*named("Hi"), Event("", "done")]


@pytest.mark.parametrize(
    ("fault", "code"),
    [(refuse(401), "upstream_auth"), (refuse(429, retry_after="60"), "upstream_rate_limited")],
    ids=["auth", "rate limit"],
)
def test_late_refusal_is_an_event(llm: Service, upstream: Upstream, fault: Script, code: str) -> None:
    opened = threading.Event()

    def script(call: Call) -> None:
        assert opened.wait(LIMIT_S)
        fault(call)

    upstream.plan(script)
    with llm.client.stream("GET", "/chat?prompt=x") as response:
        assert response.status_code == 200
        opened.set()
        response.read()
        failure, end = events(response)
    assert json.loads(failure.data)["code"] == code
    assert end == Event("[DONE]")


@both_backends
@pytest.mark.parametrize("before", [[], [FIRST], [FIRST, token("Hi")]], ids=["head", "first token", "next token"])
async def test_silence_is_a_timeout_and_not_tried_again(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch, before: list[bytes]
) -> None:
    monkeypatch.setattr(chat, "READ_TIMEOUT_S", 0.1)
    with serve() as upstream:
        upstream.plan(silent(*before))
        failure = await fails(upstream.url)
        upstream.wait_call()  # on a busy machine it comes after the timeout
        upstream.settle()
        assert len(upstream.calls) == 1
    assert (failure.code, failure.status) == ("upstream_timeout", 504)


@both_backends
async def test_connection_that_nobody_takes_is_a_timeout(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "CONNECT_TIMEOUT_S", 0.1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        with socket.create_connection(address):  # fills the queue: the kernel lets the next SYN wait
            failure = await fails(f"http://127.0.0.1:{address[1]}/v1")
    assert (failure.code, failure.status) == ("upstream_timeout", 504)


@both_backends
async def test_answer_that_finds_no_connection_free_is_told_so(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(chat, "POOL_TIMEOUT_S", 0.1)

    def script(call: Call) -> None:
        call.head()
        call.send(token("Hi"))
        call.wait_gone()

    with serve() as upstream:
        upstream.plan(script)
        async with open_model(Settings(openai_base_url=upstream.url)) as model, aclosing(model.stream(HELLO)) as first:
            assert await anext(first) == "Hi"
            async with aclosing(model.stream(HELLO)) as second:
                with pytest.raises(ModelError) as caught:
                    await anext(second)
        assert (caught.value.code, caught.value.status) == ("upstream_timeout", 503)
        upstream.settle()


# Connections


async def texts(base_url: str, key: str | None = None) -> list[str]:
    with anyio.fail_after(LIMIT_S):
        async with open_model(Settings(openai_base_url=base_url, openai_api_key=key)) as model:
            async with aclosing(model.stream(HELLO)) as stream:
                return [piece async for piece in stream if isinstance(piece, str)]


async def fails(base_url: str) -> SSEAppError:
    with pytest.raises(ModelError) as caught:
        await texts(base_url)
    return caught.value


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@both_backends
async def test_refused_connection_is_tried_three_times(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chat, "BACKOFF_S", 0)
    caplog.set_level(logging.INFO, "sseapp")
    upstream = Upstream()  # bound, but it does not listen
    failure = await fails(upstream.url)
    upstream.close()
    assert (failure.code, failure.status) == ("upstream_unreachable", 502)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.INFO] == [
        "upstream_unreachable, trying again"
    ] * 2


@both_backends
async def test_a_name_and_a_password_in_the_url_are_sent_in_place_of_the_key(anyio_backend: str) -> None:
    with serve() as upstream:
        upstream.plan(answer("Hi"))
        assert await texts(upstream.url.replace("//", "//us%40er:p%3Ass@"), KEY) == ["Hi"]
        (call,) = upstream.calls
    assert call.headers["authorization"] == "Basic " + base64.b64encode(b"us@er:p:ss").decode()


@both_backends
async def test_upstream_that_comes_up_is_found(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = Upstream()
    upstream.plan(answer("Hi"))

    async def sleep(seconds: float) -> None:  # the pause behind the first refused connection
        upstream.listen()

    monkeypatch.setattr(anyio, "sleep", sleep)
    try:
        assert await texts(upstream.url) == ["Hi"]
    finally:
        upstream.close()


@both_backends
async def test_name_that_is_unknown_is_unreachable(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(chat, "BACKOFF_S", 0)
    assert (await fails("http://model.test/v1")).code == "upstream_unreachable"


@both_backends
async def test_connection_is_kept_for_the_next_answer(anyio_backend: str) -> None:
    with serve() as upstream:
        upstream.plan(answer("a"), refuse(429, retry_after="60"), answer("b"))
        async with open_model(Settings(openai_base_url=upstream.url + "/")) as model:
            for wanted in (["a"], ModelError, ["b"]):
                async with aclosing(model.stream(HELLO)) as stream:
                    if wanted is ModelError:
                        with pytest.raises(ModelError):
                            await anext(stream)
                    else:
                        assert [text async for text in stream] == wanted
        assert [call.connection for call in upstream.calls] == [1, 1, 1]
        assert {call.request_line for call in upstream.calls} == {"POST /v1/chat/completions HTTP/1.1"}


@both_backends
async def test_connection_held_open_behind_done_is_not_waited_for(anyio_backend: str) -> None:
    def script(call: Call) -> None:
        call.head()
        call.send(token("Hi"), DONE)
        call.wait_gone()

    with serve() as upstream:
        upstream.plan(script)
        assert await texts(upstream.url) == ["Hi"]
        upstream.settle()


@both_backends
async def test_model_that_is_left_closes_its_connection(anyio_backend: str) -> None:
    def script(call: Call) -> None:
        call.head()
        call.send(token("a") + token("b"), token("c"))
        call.wait_gone()

    with serve() as upstream:
        upstream.plan(script)
        async with open_model(Settings(openai_base_url=upstream.url)) as model:
            async with aclosing(model.stream(HELLO)) as stream:
                assert await anext(stream) == "a"
            upstream.settle()


# Clients that leave: their run is cancelled when nobody has come back for the linger time


def test_answer_that_nobody_reads_any_more_is_ended(llm: Service, upstream: Upstream) -> None:
    def script(call: Call) -> None:
        call.head()
        call.send(token("Hi"))
        call.wait_gone()

    upstream.plan(script)
    with stream_post(llm) as (_, reading):
        reading.until(b"data: Hi\nid: ")
    upstream.settle()
    assert len(upstream.calls) == 1
    assert wait_lingered(llm) == named("Hi")


def test_answer_under_way_that_nobody_reads_any_more_is_ended(llm: Service, upstream: Upstream) -> None:
    def script(call: Call) -> None:
        call.head()
        while True:
            call.send(token("Hi"))

    upstream.plan(script)
    with stream_post(llm) as (_, reading):
        reading.until(b"data: Hi\nid: ")
    upstream.settle()
    assert {(event.event, event.data) for event in wait_lingered(llm)} == {("token", "Hi")}


@pytest.mark.parametrize("before", [[], [FIRST]], ids=["head", "first token"])
def test_answer_that_nobody_waits_for_is_ended(llm: Service, upstream: Upstream, before: list[bytes]) -> None:
    def script(call: Call) -> None:
        if before:
            call.head()
            call.send(*before)
        call.wait_gone()

    upstream.plan(script)
    host, _, port = llm.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET /chat?prompt=x HTTP/1.1\r\nhost: %b\r\n\r\n" % host.encode())
        upstream.wait_call()
    upstream.settle()
    assert len(upstream.calls) == 1
    assert wait_lingered(llm) == []


def test_tries_that_nobody_waits_for_are_ended(llm: Service, upstream: Upstream) -> None:
    upstream.plan(refuse(429, retry_after="5"))
    host, _, port = llm.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET /chat?prompt=x HTTP/1.1\r\nhost: %b\r\n\r\n" % host.encode())
        upstream.wait_call()
        llm.wait_logged("upstream_rate_limited, trying again")
    assert wait_lingered(llm) == []
    upstream.plan(answer("Hi"))
    assert events(post(llm)) == [*named("Hi"), Event("", "done")]
    assert len(upstream.calls) == 1


def test_client_that_comes_back_in_time_finds_its_answer_whole(tmp_path: Path, upstream: Upstream) -> None:
    left = threading.Event()

    def script(call: Call) -> None:
        call.head()
        call.send(token("a"))
        assert left.wait(LIMIT_S)
        call.send(token("b"), token("c"), STOP, DONE)
        call.end()

    upstream.plan(script)
    with service(tmp_path, OPENAI_BASE_URL=upstream.url) as running:
        with stream_post(running) as (_, reading):
            reading.until(b"data: a\nid: ")
        left.set()
        upstream.settle()  # it was not cut
        run = reading.headers["run-id"]
        for number, rest in enumerate(([*named("a", "b", "c")], [*named("b", "c")], [*named("c")], [])):
            after = {"last-event-id": f"{run}.{number}"}
            response = running.client.post("/chat/stream", json=HELLO_JSON, headers=after)
            assert response.headers["run-id"] == run
            body = response.content.removeprefix(OPENING).removeprefix(b"id: %b.0\n\n" % run.encode())
            assert numbered_events(body, run.encode(), number + 1) == [*rest, Event("", "done")]
    assert len(upstream.calls) == 1


def test_asking_twice_with_one_key_asks_the_model_once(llm: Service, upstream: Upstream) -> None:
    upstream.plan(answer("Hi"))
    key = {"idempotency-key": "chat-0123456789-0123456789"}
    first, second = (llm.client.post("/chat/stream", json=HELLO_JSON, headers=key) for _ in range(2))
    assert events(first) == [*named("Hi"), Event("", "done")]
    assert second.content == first.content
    assert len(upstream.calls) == 1


# Settings


async def test_mock_is_there_without_a_key_and_a_base_url() -> None:
    async with open_model(Settings(mock_delay_s=0)) as model:
        assert model == MockModel(0)


async def test_key_alone_means_openai() -> None:
    async with open_model(Settings(openai_api_key=f"{KEY}\n")) as model:
        assert isinstance(model, chat.OpenAIModel)
        assert str(model.url) == "https://api.openai.com/v1/chat/completions"
        assert model.client.headers["authorization"] == f"Bearer {KEY}"
        assert KEY not in repr(model)


async def test_base_url_alone_sends_no_key() -> None:
    with serve() as upstream:
        upstream.plan(answer("Hi"))
        assert await texts(upstream.url) == ["Hi"]
        assert "authorization" not in upstream.calls[0].headers


async def test_base_url_keeps_its_query() -> None:
    with serve() as upstream:
        upstream.plan(answer("Hi"))
        assert await texts(upstream.url + "?api-version=1") == ["Hi"]
        assert upstream.calls[0].request_line == "POST /v1/chat/completions?api-version=1 HTTP/1.1"


@pytest.mark.parametrize("url", ["api.openai.com/v1", "ftp://host/v1", "http://", "http://host:x/v1", "http:///v1"])
async def test_base_url_that_is_none_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(SettingsError, match=r"(?i)openai_base_url"):
        await texts(url)


@pytest.mark.parametrize("key", ["kéy-0123", "key\n0123", "key\x7f0123"])
async def test_key_that_is_none_is_refused_and_not_said(key: str) -> None:
    with pytest.raises(SettingsError, match="OPENAI_API_KEY") as caught:
        await texts("http://127.0.0.1:9/v1", key)
    assert "0123" not in str(caught.value)
