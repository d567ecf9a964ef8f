"""What the model's server refuses, as OpenAI's routes answer it and as OpenAI's own packages raise it."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import pytest

from ssecore.streaming.pump import FIRST_ITEM_S
from ssecore.wire import Decoder
from tests.needs import needs
from tests.serving import Server, serve, wait_until
from tests.upstream import LIMIT_S, Call, Script, Upstream, answer, refuse

KEY: Final = "sk-test-0123456789"
NODE: Final = Path(__file__).parent / "node"
TOO_LONG: Final = {
    "message": "The maximum context length is 8192 tokens.",
    "type": "invalid_request_error",
    "param": "messages",
    "code": "context_length_exceeded",
}
MESSAGES: Final[Any] = [{"role": "user", "content": "hello"}]
#: Each way to ask: the path, and the body.
ASKED: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "a completion": ("/v1/chat/completions", {"messages": MESSAGES}),
    "a streamed completion": ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}),
    "a response": ("/v1/responses", {"input": "hello"}),
    "a streamed response": ("/v1/responses", {"input": "hello", "stream": True}),
    "a background response": ("/v1/responses", {"input": "hello", "background": True}),
}
#: What becomes of a limit that passes.
KINDS: Final = {429: "rate_limit_error", 503: "server_error"}
CODES: Final = {429: "upstream_rate_limited", 503: "upstream_error"}
each_way = pytest.mark.parametrize(("path", "body"), ASKED.values(), ids=ASKED)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shared_upstream: Upstream) -> Iterator[Server]:
    env = {"OPENAI_BASE_URL": shared_upstream.url, "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "m", "no_proxy": "*"}
    with serve(tmp_path_factory.mktemp("data"), env=env) as server:
        yield server
        assert KEY not in server.log() and "Traceback" not in server.log()


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Iterator[Upstream]:
    shared_upstream.plan()
    yield shared_upstream
    shared_upstream.settle()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


def refusing(status: int, error: Any = TOO_LONG, **headers: str) -> Script:
    return refuse(status, json.dumps({"error": error}).encode(), **headers)


def node(server: Server, **asked: Any) -> list[Any]:
    options = json.dumps({"url": f"{server.url}/v1", "model": "m", "text": "hello", **asked})
    command = ["node", "frontends.js", "openai", options]
    done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refusals(server: Server, status: int) -> float:
    text = server.client.get("/metrics").text
    found = re.search(rf'^sseapp_\w*refus\w*{{status="{status}"}} (\S+)', text, re.MULTILINE)
    return float(found[1]) if found else 0


# The client's own mistake


@each_way
@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_clients_mistake_has_the_upstreams_status_and_words(
    server: Server, upstream: Upstream, path: str, body: dict[str, Any], status: int
) -> None:
    before = refusals(server, status)
    upstream.plan(refusing(status, {**TOO_LONG, "innererror": {"revised_prompt": "x"}}))
    response = server.client.post(path, json=body)
    assert (response.status_code, response.json()["error"]) == (status, TOO_LONG)
    assert "innererror" not in response.text
    assert len(upstream.calls) == 1  # the usage is not what it is about
    assert refusals(server, status) == before + 1
    wait_until(lambda: str(TOO_LONG["message"]) in server.log())


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, openai.BadRequestError), (413, openai.APIStatusError), (422, openai.UnprocessableEntityError)],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_openais_python_package_raises_it(
    client: openai.OpenAI, upstream: Upstream, status: int, kind: type[openai.APIStatusError], stream: bool
) -> None:
    asks: list[Callable[[], Any]] = [
        lambda: client.chat.completions.create(model="m", messages=MESSAGES, stream=stream),
        lambda: client.responses.create(model="m", input="hello", stream=stream),
    ]
    for ask in asks:
        upstream.plan(refusing(status))
        with pytest.raises(kind, match="maximum context length") as caught:
            ask()
        error = caught.value
        assert (error.status_code, error.type, error.param, error.code) == (
            status,
            "invalid_request_error",
            "messages",
            "context_length_exceeded",
        )


@needs("node-clients")
@pytest.mark.parametrize(
    "asked", [{"whole": True}, {}, {"responses": True}], ids=["completion", "streamed completion", "response"]
)
def test_openais_node_package_raises_it(server: Server, upstream: Upstream, asked: dict[str, Any]) -> None:
    upstream.plan(refusing(400))
    told = node(server, **asked)
    assert told == [["threw", f"400 context_length_exceeded 400 {TOO_LONG['message']}"], ["refused", "BadRequestError"]]


def test_the_client_gets_no_more_than_four_short_texts_without_control_characters(
    server: Server, upstream: Upstream
) -> None:
    upstream.plan(refusing(400, {"message": "a\r\n\x1b[31mb\u2028" + "x" * 9000, "type": "t" * 900, "code": 400}))
    error = server.client.post("/v1/chat/completions", json={"messages": MESSAGES}).json()["error"]
    assert error == {"message": ("a   [31mb " + "x" * 9000)[:2000], "type": "t" * 200, "param": None, "code": None}


@each_way
def test_the_services_key_reaches_no_client(
    server: Server, upstream: Upstream, path: str, body: dict[str, Any]
) -> None:
    error = {name: f"{'x' * 195}{KEY} and {KEY}" for name in ("message", "type", "param", "code")}
    upstream.plan(refusing(400, error))
    response = server.client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == f"{'x' * 195}*** and ***"
    assert KEY[:6] not in response.text

    upstream.plan(refusing(400, {"message": f"{KEY[:5]}\0{KEY[5:]}"}))
    assert KEY not in server.client.post(path, json=body).text


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b'{"error": "no room"}', "no room"),
        (b'{"object": "error", "message": "no room", "type": "BadRequestError", "code": 400}', "no room"),
        (b'{"detail": "no room"}', "no room"),
        (b'{"detail": [{"loc": ["body", "seed"], "msg": "no room"}]}', "no room"),
        (b'{"object": "error", "message": {"detail": [{"msg": "no room"}]}}', "no room"),
        (b'[{"error": {"message": "no room", "status": "INVALID_ARGUMENT"}}]', "no room"),
        (b"<html>", "the model's server refused the request with the HTTP status 422"),
        (b"", "the model's server refused the request with the HTTP status 422"),
        (b'{"error": {"message": 5}}', "the model's server refused the request with the HTTP status 422"),
        (b'{"error": ' + b"[" * 9000, "the model's server refused the request with the HTTP status 422"),
    ],
    ids="text vllm detail fastapi mistral google html empty number nested".split(),
)
def test_any_servers_refusal_becomes_openais_error_object(
    server: Server, upstream: Upstream, said: bytes, message: str
) -> None:
    upstream.plan(refuse(422, said))
    streamed = {"messages": MESSAGES, "stream": True}
    response = server.client.post("/v1/chat/completions", json=streamed)
    error = response.json()["error"]
    assert (response.status_code, error["message"], error["param"], error["code"]) == (422, message, None, None)
    assert error["type"] in ("invalid_request_error", "BadRequestError")


# Refused after the first second


REFUSING: Final = refusing(400)


def after(condition: Callable[[], Any], script: Script = REFUSING) -> Script:
    def waiting(call: Call) -> None:
        condition()
        script(call)

    return waiting


def test_a_late_refusal_ends_a_streamed_completion_with_the_upstreams_words(
    client: openai.OpenAI, server: Server, upstream: Upstream
) -> None:
    upstream.plan(*[after(lambda: time.sleep(FIRST_ITEM_S + 0.2))] * 3)
    body = {"messages": MESSAGES, "stream": True}
    response = server.client.post("/v1/chat/completions", json=body)
    first, done = [event.data for event in Decoder().feed(response.content) if event.data]
    assert (json.loads(first), done) == ({"error": TOO_LONG, "status": 400}, "[DONE]")
    with pytest.raises(openai.APIError, match="maximum context length") as caught:
        list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.chat.completions.create(model="m", messages=MESSAGES)


def test_a_late_refusal_fails_a_response(client: openai.OpenAI, server: Server, upstream: Upstream) -> None:
    def begun() -> bool:
        run = server.client.get("/runs").json()["runs"][0]
        return bool(run["events"] >= 2 and run["state"] == "running")

    upstream.plan(*[after(lambda: wait_until(begun))] * 2)
    created, in_progress, failed = client.responses.create(model="m", input="hello", stream=True)
    assert (created.type, in_progress.type) == ("response.created", "response.in_progress")
    assert failed.type == "response.failed" and failed.sequence_number == 2
    assert failed.response.error and TOO_LONG.items() <= failed.response.error.model_dump().items()
    kept = client.responses.retrieve(failed.response.id)
    assert (kept.status, kept.error) == ("failed", failed.response.error)
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        client.responses.create(model="m", input="hello")
    assert (caught.value.param, caught.value.type) == ("messages", "invalid_request_error")


def test_openais_python_package_reads_a_stream_whose_first_token_is_slow(
    client: openai.OpenAI, upstream: Upstream
) -> None:
    opened = threading.Event()

    def script(call: Call) -> None:
        assert opened.wait(LIMIT_S)
        answer("Hi")(call)

    upstream.plan(script)
    stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)  # returns with the head
    opened.set()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hi"


# The usage


def test_a_refusal_of_the_usage_is_asked_once_more_without_and_the_second_answer_counts(
    server: Server, upstream: Upstream
) -> None:
    usage = refusing(400, {"message": "Unrecognized request argument supplied: stream_options"})
    for second, status in ((answer("Hi"), 200), (refusing(400), 400), (refusing(413), 413)):
        before = refusals(server, status)
        upstream.plan(usage, second)
        response = server.client.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert response.status_code == status
        assert status == 200 or response.json()["error"] == TOO_LONG
        assert ["stream_options" in call.json for call in upstream.calls] == [True, False]
        assert refusals(server, status) == before + (status != 200)


# What is not the client's mistake


@each_way
@pytest.mark.parametrize("status", [401, 402, 403, 404, 409, 500])
def test_what_is_not_the_clients_mistake_stays_a_502_and_is_logged(
    server: Server, upstream: Upstream, path: str, body: dict[str, Any], status: int
) -> None:
    upstream.plan(refusing(status, {**TOO_LONG, "message": f"secret words {KEY} {path} {status}"}))
    response = server.client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["type"]) == (502, "server_error")
    assert "secret words" not in response.text and "context_length" not in response.text
    assert status != 404 or "OPENAI_MODEL" in response.json()["error"]["message"]
    wait_until(lambda: f"secret words *** {path} {status}" in server.log())
    assert len(upstream.calls) == 1


@each_way
@pytest.mark.parametrize("status", [429, 503])
def test_a_limit_that_passes_has_its_retry_after(
    client: openai.OpenAI, server: Server, upstream: Upstream, path: str, body: dict[str, Any], status: int
) -> None:
    upstream.plan(refusing(status, retry_after="60"))
    response = server.client.post(path, json=body)
    assert (response.status_code, response.headers["retry-after"]) == (status, "60")
    error = response.json()["error"]
    assert error.pop("message").endswith("try again in 60 s")
    assert error == {"type": KINDS[status], "param": None, "code": CODES[status]}
    assert "maximum context length" not in response.text


def late(status: int, *, in_s: float = 60) -> Script:
    """A limit that passes, after the first second. The service leaves a pause that is a date to its client."""
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=in_s), usegmt=True)
    return after(lambda: time.sleep(FIRST_ITEM_S + 0.2), refusing(status, retry_after=at))


@pytest.mark.parametrize("model", ["m", "agent"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_limit_that_comes_late_has_its_status_in_a_whole_answer(
    client: openai.OpenAI, upstream: Upstream, model: str, status: int
) -> None:
    asks: list[Callable[[], Any]] = [
        lambda: client.chat.completions.create(model=model, messages=MESSAGES),
        lambda: client.responses.create(model=model, input="hello"),
    ]
    for ask in asks:
        upstream.plan(late(status))
        with pytest.raises(openai.RateLimitError if status == 429 else openai.InternalServerError) as caught:
            ask()
        error = caught.value
        assert (error.status_code, error.code) == (status, CODES[status])
        assert error.response.headers["retry-after"].endswith("GMT")


def test_openais_python_package_waits_and_asks_again_after_a_late_limit(
    client: openai.OpenAI, upstream: Upstream
) -> None:
    upstream.plan(late(429, in_s=4), answer("Hi"))
    begun = time.monotonic()
    whole = client.with_options(max_retries=1).chat.completions.create(model="m", messages=MESSAGES)
    assert whole.choices[0].message.content == "Hi"
    assert time.monotonic() - begun > 2.5  # its own pause would be 0.5 s


@needs("node-clients")
@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("status", [429, 503])
def test_openais_node_package_asks_again_after_a_limit(
    server: Server, upstream: Upstream, status: int, is_late: bool
) -> None:
    upstream.plan(late(status, in_s=2) if is_late else refusing(status, retry_after="60"), answer("Hi"))
    told = node(server, whole=True, maxRetries=int(is_late))
    if is_late:
        [[what, final]] = told
        assert (what, final["choices"][0]["message"]["content"]) == ("final", "Hi")
    else:
        kind = "RateLimitError" if status == 429 else "InternalServerError"
        assert told[1] == ["refused", kind] and told[0][1].startswith(f"{status} {CODES[status]} {status} ")
        upstream.plan()  # the second script is not asked for


@pytest.mark.parametrize("route", ["chat", "stream"])
def test_the_services_own_chat_doesnt_show_the_upstreams_words(server: Server, upstream: Upstream, route: str) -> None:
    upstream.plan(refusing(400))
    if route == "chat":
        response: httpx.Response = server.client.get("/chat?prompt=hello")
    else:
        response = server.client.post("/chat/stream", json=MESSAGES)
    assert (response.status_code, response.json()["code"]) == (502, "upstream_error")
    assert "maximum context length" not in response.text
