"""What a model's server streams, in the dialects of servers: through every route that asks one, and the reader alone.

The shapes are those of vLLM, llama.cpp, sglang, Mistral, Gemini, OpenRouter, LiteLLM, Ollama, Azure, Groq, DeepSeek,
Perplexity, Moonshot, Zhipu and DashScope, from their sources, their documentation and reports about them.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any, Final, NamedTuple

import anyio
import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers import answer as reading
from handlers import chat
from handlers.answer import AnswerReader, Chunk, ChunkReader, ModelError, Piece, Reasoning, ToolCall, Usage
from handlers.chat import ChatMessage, open_model
from ssecore.errors import TooLarge
from ssecore.settings import Settings
from ssecore.wire import Decoder
from tests import serving
from tests.serving import Server
from tests.upstream import DONE, FIRST, LIMIT_S, STOP, USAGE, Call, Script, Upstream, answer, chunk, refuse, token
from tests.upstream import serve as serve_upstream

HI: Final = token("Hi")


def event(data: Any, name: str = "") -> bytes:
    """One event; `data` is JSON as it stands, or is made JSON."""
    text = data if isinstance(data, str) else json.dumps(data)
    field = f"event: {name}\n" if name else ""
    return f"{field}data: {text}\n\n".encode()


def choice(**members: Any) -> bytes:
    return event({"choices": [{"index": 0, **members}]})


def sending(*pieces: bytes, content_type: str = "text/event-stream; charset=utf-8") -> Script:
    def script(call: Call) -> None:
        call.head(content_type)
        call.send(*pieces)
        call.end()

    return script


# Every route


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shared_upstream: Upstream) -> Iterator[Server]:
    env = {"OPENAI_BASE_URL": shared_upstream.url, "OPENAI_API_KEY": "sk-test-0123456789", "OPENAI_MODEL": "m"}
    with serving.serve(tmp_path_factory.mktemp("answer"), env=env) as server:
        yield server


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Iterator[Upstream]:
    shared_upstream.plan()
    yield shared_upstream
    shared_upstream.settle()


class Heard(NamedTuple):
    """What a client has of an answer, in whichever words a route gives it."""

    text: str = "Hi"
    reasoning: str = ""
    usage: Any = None
    code: str | None = None  #: of its failure


QUERY: Final = {"params": {"query": "Hello"}}
ROUTES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "/chat": ("GET", {"params": {"prompt": "Hello"}}),
    "/chat/stream": ("POST", {"json": [{"role": "user", "content": "Hello"}]}),
    "/api/chat": ("POST", {"json": {"message": "Hello"}}),
    "/agent/stream": ("GET", QUERY),
    "/agent/think/stream": ("GET", QUERY),
    "/agent/process/stream": ("POST", QUERY),
    "/v1/chat/completions": (
        "POST",
        {"json": {"messages": [{"role": "user", "content": "Hello"}], "stream": True}},
    ),
    "/v1/responses": ("POST", {"json": {"input": "Hello", "stream": True}}),
}


def hear(server: Server, route: str) -> Heard:
    method, request = ROUTES[route]
    response = server.client.request(method, route, **request)
    if response.status_code != 200:
        return Heard(text="", code=response.json()["code"])
    return {"/v1/chat/completions": of_completion, "/v1/responses": of_response}.get(route, heard)(route, response)


def of_completion(route: str, response: httpx.Response) -> Heard:
    """As our own reader has the chunks that were handed on."""
    reader, pieces, code = AnswerReader(), list[Piece](), None
    data = [event.data for event in Decoder().feed(response.content)]
    assert data[-1] == "[DONE]" and all(isinstance(json.loads(chunk), dict) for chunk in data[:-1])
    try:
        for piece in reader.feed(response.content):
            pieces.append(piece)
        pieces += reader.end()
    except ModelError as error:
        code = json.loads(error.said)["error"]["code"] if error.said.startswith("{") else error.code
    return of_pieces(pieces, code)


def of_response(route: str, response: httpx.Response) -> Heard:
    events = [json.loads(event.data) for event in Decoder().feed(response.content)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = {"response.output_text.delta": str, "response.reasoning_text.delta": Reasoning}
    pieces: list[Piece] = [kinds[event["type"]](event["delta"]) for event in events if event["type"] in kinds]
    last = events[-1]["response"]
    status, why = last["status"], last["incomplete_details"]
    assert events[-1]["type"] == f"response.{status}"
    for kind, part in (("message", "output_text"), ("reasoning", "reasoning_text")):
        items = [item["content"] for item in last["output"] if item["type"] == kind]
        assert status == "failed" or [part] * len(items) == [content["type"] for [content] in items]
    code = {"failed": (last["error"] or {}).get("code"), "incomplete": INCOMPLETE[why["reason"]] if why else None}
    if last["usage"] is not None:
        names = ("input_tokens", "output_tokens", "total_tokens")
        pieces.append(Usage(*(last["usage"][name] or None for name in names)))
    return of_pieces(pieces, code.get(status))


INCOMPLETE: Final = {"max_output_tokens": "upstream_length", "content_filter": "upstream_filtered"}


def of_pieces(pieces: Sequence[Piece], code: str | None) -> Heard:
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    usage = next((piece for piece in pieces if isinstance(piece, Usage)), None)
    return Heard(text, reasoning, usage and msgspec.to_builtins(usage), code)


def heard(route: str, response: httpx.Response) -> Heard:
    text, reasoning, usage, code, ends = "", "", None, None, list[str]()
    for event in Decoder().feed(response.content):
        if event.data == "[DONE]" or (event.event, event.data) == ("done", ""):
            ends.append("end")
            continue
        data = event.data if route == "/chat/stream" and event.event in ("token", "reasoning") else decoded(event.data)
        match event.event or (data.get("type") or "token"):
            case "token":
                text += data if isinstance(data, str) else data["content" if route == "/chat" else "token"]
            case "chunk":
                text += data["content"]
            case "reasoning":
                reasoning += data if isinstance(data, str) else data.get("reasoning") or data["content"]
                assert route != "/chat" or data["content"] == ""  # for whoever just joins contents
            case "usage":
                assert usage is None and (route != "/chat" or data["content"] == "")
                usage = data.get("usage", data)
            case "error":
                code = data["code"]
                ends.append("error")
            case "result":
                assert data["content"] == text
            case "complete":
                ends.append("end")
    assert ends == ["end"] if code is None else ends[0] == "error"
    return Heard(text, reasoning, usage, code)


def decoded(data: str) -> Any:
    return json.loads(data)


THINKING: Final = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Hi"}]
COUNTED: Final = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}

#: Answers that are whole, with what a client has of them; without that the text "Hi" alone.
WHOLE: Final[dict[str, tuple[Sequence[bytes], Heard]]] = {
    # How it ends
    "no [DONE]": ([FIRST, HI, STOP], Heard()),
    "no finish_reason": ([FIRST, HI, DONE], Heard()),
    "finish_reason with the last token": ([token("H"), chunk({"content": "i"}, "stop")], Heard()),
    "finish_reason in capitals": ([HI, chunk({}, "STOP"), DONE], Heard()),
    "finish_reason null as a word": ([chunk({"content": "H"}, "null"), token("i"), STOP, DONE], Heard()),
    "finish_reason empty": ([chunk({"content": "H"}, ""), token("i"), STOP, DONE], Heard()),
    "finish_reason tool_calls without calls": ([HI, chunk({}, "tool_calls"), DONE], Heard()),
    "finish_reason function_call": ([HI, chunk({}, "function_call"), DONE], Heard()),
    "finish_reason twice": ([HI, chunk({}, "tool_calls"), STOP, DONE], Heard()),
    "text behind finish_reason": ([chunk({"content": "H"}, "stop"), token("i"), DONE], Heard()),
    "more behind [DONE]": ([HI, STOP, DONE + token("!"), b"data: {\n\n"], Heard()),
    "rubbish behind finish_reason": ([HI, STOP, b"data: {\n\n", DONE], Heard()),
    "[DONE] without a space": ([HI, STOP, b"data:[DONE]\n\n"], Heard()),
    "[DONE] in quotes": ([HI, STOP, b'data: "[DONE]"\n\n'], Heard()),
    "[DONE] without a blank line": ([HI, b"data: [DONE]\n"], Heard()),
    "[DONE] without a line end": ([HI, b"data: [DONE]"], Heard()),
    "a last event without a blank line": ([token("H"), chunk({"content": "i"}, "stop")[:-1]], Heard()),
    "an empty answer": ([FIRST, STOP, DONE], Heard("")),
    "an empty answer at once": ([STOP, DONE], Heard("")),
    # How its lines are
    "CRLF": ([(FIRST + HI + STOP + DONE).replace(b"\n", b"\r\n")], Heard()),
    "CR": ([(FIRST + HI + STOP + DONE).replace(b"\n", b"\r")], Heard()),
    "CRLF cut": (
        [HI.replace(b"\n\n", b"\r\n\r"), b"\n" + STOP.replace(b"\n\n", b"\r"), b"\n\r", b"\n" + DONE],
        Heard(),
    ),
    "no space behind the colon": ([(HI + STOP + DONE).replace(b"data: ", b"data:")], Heard()),
    "ids, retry, names, comments": (
        [
            b": OPENROUTER PROCESSING\n\n:\nid: end\nretry: 1\nevent: message\n" + HI,
            b"id\nunknown: x\n\n\n\nevent: chat.completion.chunk\n" + STOP + b"event: done\nid: 7\n" + DONE,
        ],
        Heard(),
    ),
    "a ping": ([event({"type": "ping"}, "ping"), event("", "keepalive"), HI, STOP, DONE], Heard()),
    "a byte order mark": ([b"\xef\xbb", b"\xbf" + HI, STOP, DONE], Heard()),
    "several lines of data": ([HI.replace(b', "', b',\ndata: "'), STOP, DONE], Heard()),
    # What isn't needed
    "role with each token": ([chunk({"role": "assistant", "content": "Hi"}), STOP, DONE], Heard()),
    "empty and missing members": (
        [
            event({"choices": [{"delta": {"content": ""}}]}) + event({"choices": [{"delta": None}]}),
            event({"choices": [{}]}) + event({"choices": None}) + event({"error": None}) + event({}) + b"data\n\n",
            event({"choices": [None]}) + event({"choices": []}) + HI + STOP + DONE,
        ],
        Heard(),
    ),
    "Azure's filter results": (
        [
            event({"choices": [], "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}]}),
            HI,
            choice(content_filter_offsets={"check_offset": 44}, content_filter_results={}, finish_reason=None),
            STOP,
            DONE,
        ],
        Heard(),
    ),
    "NaN in the logprobs": ([HI.replace(b'"logprobs": null', b'"logprobs": [NaN, -Infinity]'), STOP, DONE], Heard()),
    "an integer without end": ([HI.replace(b'"index": 0', b'"index": %b' % (b"1" * 5000)), STOP, DONE], Heard()),
    "an exponent without end": ([HI.replace(b'"index": 0', b'"index": 1e999'), STOP, DONE], Heard()),
    "ids of any type": ([event('{"id": 5, "created": "now", "model": null, "choices": []}'), HI, STOP, DONE], Heard()),
    "index of any type": (
        [choice(delta={"content": "H"}), event('{"choices": [{"index": "x", "delta": {"content": "i"}}]}'), STOP, DONE],
        Heard(),
    ),
    "a control character": ([token("Hi").replace(b"Hi", b"H\\u0069"), event('{"x": "a\tb"}'), STOP, DONE], Heard()),
    "bytes that are not UTF-8": (
        [HI, b'data: {"model": "\xff", "choices": [{"delta": {"content": "\xff"}}]}\n\n', STOP],
        Heard("Hi\ufffd"),
    ),
    "data that is no object": ([event("[1]"), event("5"), event("null"), event('"x"'), event("[]"), HI, STOP], Heard()),
    "errors that are none": (
        [event({"error": False}), HI.replace(b'"choices"', b'"error": {}, "choices"'), STOP, DONE],
        Heard(),
    ),
    "reasoning of another type": (
        [chunk({"reasoning": 5, "content": "Hi"}), chunk({"reasoning_content": {}}), STOP, DONE],
        Heard(),
    ),
    "calls of another type": ([HI, chunk({"tool_calls": "x"}), chunk({"tool_calls": [5, None]}), STOP, DONE], Heard()),
    "usage of another type": ([HI, STOP, event({"choices": [], "usage": {"total_tokens": "7"}}), DONE], Heard()),
    # Where the text is
    "a message": ([choice(message={"role": "assistant", "content": "Hi"}, finish_reason="stop"), DONE], Heard()),
    "messages": ([choice(message={"content": "H"}), choice(message={"content": "i"}), STOP, DONE], Heard()),
    "a message and an empty delta": ([choice(delta={}, message={"content": "Hi"}, finish_reason="stop")], Heard()),
    "the message so far with each delta": (
        [
            choice(delta={"role": "assistant", "content": ""}, message={"role": "assistant", "content": ""}),
            choice(delta={"content": "H"}, message={"role": "assistant", "content": "H"}),
            choice(delta={"content": "i"}, message={"role": "assistant", "content": "Hi"}),
            choice(delta={"content": ""}, message={"role": "assistant", "content": "Hi"}, finish_reason="stop"),
        ],
        Heard(),
    ),
    "the message behind the deltas": ([HI, choice(message={"content": "Hi"}, finish_reason="stop")], Heard()),
    "a completion's text": ([choice(text="H"), choice(text="i", finish_reason="stop"), DONE], Heard()),
    "parts": (
        [chunk({"content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}), STOP, DONE],
        Heard(),
    ),
    "parts that are texts": ([chunk({"content": ["H", "i"]}), STOP, DONE], Heard()),
    "one part": ([chunk({"content": {"type": "text", "text": "Hi"}}), STOP, DONE], Heard()),
    "a part without a type": ([chunk({"content": [{"text": "Hi"}]}), STOP, DONE], Heard()),
    "a part with a value": ([chunk({"content": [{"type": "text", "text": {"value": "Hi"}}]}), STOP, DONE], Heard()),
    "a part of output": (
        [chunk({"content": [{"type": "output_text", "text": "Hi", "annotations": []}]}), STOP],
        Heard(),
    ),
    "parts that are something else": (
        [
            chunk({"content": [None, 5, {"type": "reference", "reference_ids": [1]}, {"type": "text", "text": "Hi"}]}),
            STOP,
        ],
        Heard(),
    ),
    "a refusal": ([chunk({"content": None, "refusal": "H"}), chunk({"refusal": "i"}), STOP, DONE], Heard()),
    # Reasoning
    "reasoning_content": ([chunk({"reasoning_content": "hm", "content": None}), HI, STOP, DONE], Heard(reasoning="hm")),
    "reasoning": ([chunk({"reasoning": "hm", "content": ""}), HI, STOP, DONE], Heard(reasoning="hm")),
    "reasoning under both names": (
        [chunk({"reasoning": "hm", "reasoning_content": "hm", "reasoning_details": [{"text": "hm"}]}), HI, STOP, DONE],
        Heard(reasoning="hm"),
    ),
    "reasoning with the text": ([chunk({"reasoning": "hm", "content": "Hi"}), STOP, DONE], Heard(reasoning="hm")),
    "reasoning behind the text": ([token("H"), chunk({"reasoning": "hm"}), token("i"), STOP], Heard(reasoning="hm")),
    "reasoning in a message": (
        [choice(message={"reasoning_content": "hm", "content": "Hi"}, finish_reason="stop")],
        Heard(reasoning="hm"),
    ),
    "thinking parts": ([chunk({"content": THINKING}), STOP, DONE], Heard(reasoning="hm")),
    "a thinking part with a text": (
        [chunk({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hi"}]}), STOP, DONE],
        Heard(reasoning="hm"),
    ),
    "a reasoning part": (
        [chunk({"content": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "Hi"}]}), STOP, DONE],
        Heard(reasoning="hm"),
    ),
    "nothing but reasoning": ([chunk({"reasoning": "hm"}), STOP, DONE], Heard("", reasoning="hm")),
    # Usage
    "usage at the end": (
        [HI, STOP, event({"choices": [], "usage": COUNTED | {"details": {}}}), DONE],
        Heard(usage=COUNTED),
    ),
    "usage with finish_reason": (
        [HI, event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": COUNTED})],
        Heard(usage=COUNTED),
    ),
    "usage with each chunk": (
        [
            event({"choices": [{"delta": {"content": "Hi"}}], "usage": {"total_tokens": 1}}),
            event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": COUNTED}),
            DONE,
        ],
        Heard(usage=COUNTED),
    ),
    "usage in the choice": ([HI, choice(delta={}, finish_reason="stop", usage=COUNTED), DONE], Heard(usage=COUNTED)),
    "a part of the usage": ([HI, STOP, USAGE, DONE], Heard(usage={"total_tokens": 3})),
    # Halves of characters
    "a pair in halves": (
        [
            event(r'{"choices": [{"delta": {"content": "\ud83d"}}]}'),
            event(r'{"choices": [{"delta": {"content": "\ude42!"}}]}'),
            STOP,
        ],
        Heard("🙂!"),
    ),
    "a half alone": ([event(r'{"choices": [{"delta": {"content": "\ud83d"}}]}'), HI, STOP, DONE], Heard("\ufffdHi")),
    "a second half alone": (
        [event(r'{"choices": [{"delta": {"content": "\ude42"}}]}'), HI, STOP, DONE],
        Heard("\ufffdHi"),
    ),
    "a half at the end": (
        [HI, event(r'{"choices": [{"delta": {"content": "\ud83d"}}]}'), STOP, DONE],
        Heard("Hi\ufffd"),
    ),
    "halves of reasoning": (
        [
            event(r'{"choices": [{"delta": {"reasoning": "\ud83d"}}]}'),
            HI,
            event(r'{"choices": [{"delta": {"reasoning": "\ude42"}}]}'),
            STOP,
        ],
        Heard(reasoning="🙂"),
    ),
}


@pytest.mark.parametrize(("pieces", "wanted"), WHOLE.values(), ids=WHOLE)
def test_a_whole_answer_of_any_dialect_reaches_every_route(
    server: Server, upstream: Upstream, pieces: Sequence[bytes], wanted: Heard
) -> None:
    upstream.plan(*[sending(*pieces)] * len(ROUTES))
    assert {route: hear(server, route) for route in ROUTES} == dict.fromkeys(ROUTES, wanted)


MESSAGE: Final = {"message": "boom", "type": "server_error", "code": 500}

#: Answers that are not, with the text that stands before their failure.
BROKEN: Final[dict[str, tuple[Sequence[bytes], str, str]]] = {
    # How it ends
    "length": ([HI, chunk({}, "length"), DONE], "Hi", "upstream_length"),
    "length with the last token": ([chunk({"content": "Hi"}, "length")], "Hi", "upstream_length"),
    "model_length": ([HI, chunk({}, "model_length"), DONE], "Hi", "upstream_length"),
    "length, then stop": ([HI, chunk({}, "length"), STOP, DONE], "Hi", "upstream_length"),
    "length and nothing else": ([FIRST, chunk({}, "length"), DONE], "", "upstream_length"),
    "content_filter": ([HI, chunk({}, "content_filter"), DONE], "Hi", "upstream_filtered"),
    "content_filter with its kind": ([HI, chunk({}, "content_filter: SAFETY"), DONE], "Hi", "upstream_filtered"),
    "content_filter and nothing else": ([chunk({}, "content_filter"), DONE], "", "upstream_filtered"),
    "sensitive": ([HI, chunk({}, "sensitive"), DONE], "Hi", "upstream_filtered"),
    "abort": ([HI, chunk({}, "abort"), DONE], "Hi", "upstream_unfinished"),
    "error": ([HI, chunk({}, "error"), DONE], "Hi", "upstream_unfinished"),
    "a finish_reason that is an object": (
        [HI, choice(delta={}, finish_reason={"type": "x"})],
        "Hi",
        "upstream_unfinished",
    ),
    "a finish_reason that is a number": ([HI, choice(delta={}, finish_reason=2)], "Hi", "upstream_unfinished"),
    "nothing": ([], "", "upstream_cut"),
    "[DONE] alone": ([DONE], "", "upstream_cut"),
    "[DONE] behind the role": ([FIRST, DONE], "", "upstream_cut"),
    "[DONE] behind comments": ([b": ping\n\n", b"event: end\n" + DONE], "", "upstream_cut"),
    "[DONE] behind reasoning": ([chunk({"reasoning": "hm"}), DONE], "", "upstream_cut"),
    "a text without an end": ([FIRST, HI], "Hi", "upstream_cut"),
    "cut in an event": ([HI, STOP[:-8]], "Hi", "upstream_cut"),
    # Errors
    "OpenAI's": ([HI, event({"error": MESSAGE}), DONE], "Hi", "upstream_error"),
    "a text": ([HI, event({"error": "boom"}), STOP, DONE], "Hi", "upstream_error"),
    "with choices": (
        [HI, event({"error": MESSAGE, "choices": [{"delta": {}, "finish_reason": "error"}]})],
        "Hi",
        "upstream_error",
    ),
    "with empty choices": ([HI, event({"error": "boom", "choices": []}), STOP, DONE], "Hi", "upstream_error"),
    "an empty object": ([HI, event({"error": {}}), STOP, DONE], "Hi", "upstream_error"),
    "vLLM's": ([HI, event({"object": "error", "param": None, **MESSAGE}), DONE], "Hi", "upstream_error"),
    "an object that says so alone": ([HI, event({"object": "error"}), STOP, DONE], "Hi", "upstream_error"),
    "a message": ([HI, event({"message": "boom"}), STOP, DONE], "Hi", "upstream_error"),
    "FastAPI's": ([HI, event({"detail": "boom"}), STOP, DONE], "Hi", "upstream_error"),
    "Anthropic's": ([HI, event({"type": "error", "error": MESSAGE}, "error")], "Hi", "upstream_error"),
    "Google's": ([HI, event([{"error": MESSAGE}])], "Hi", "upstream_error"),
    "llama.cpp's": ([HI, b'error: {"code": 500, "message": "boom"}\n\n'], "Hi", "upstream_error"),
    "by its name": ([HI, event({"code": "boom"}, "error"), STOP, DONE], "Hi", "upstream_error"),
    "by its name, a text": ([HI, event("boom", "error"), STOP, DONE], "Hi", "upstream_error"),
    "by its name, with NaN": ([HI, event("NaN", "error"), STOP, DONE], "Hi", "upstream_error"),
    "by its name, [DONE]": ([HI, event("[DONE]", "error")], "Hi", "upstream_error"),
    "behind finish_reason": ([HI, STOP, event({"error": MESSAGE}), DONE], "Hi", "upstream_error"),
    "without text": ([event({"error": MESSAGE})], "", "upstream_error"),
    "behind a half": (
        [HI, event(r'{"choices": [{"delta": {"content": "\ud83d"}}]}'), event({"error": "x"})],
        "Hi",
        "upstream_error",
    ),
    # What can't be read
    "no JSON": ([HI, event("internal error"), STOP, DONE], "Hi", "upstream_malformed"),
    "half of the JSON": ([HI, event('{"choices": [{"delta": {"content": "H'), STOP, DONE], "Hi", "upstream_malformed"),
    "a content that is a number": ([HI, chunk({"content": 5}), STOP, DONE], "Hi", "upstream_malformed"),
    "choices of another type": ([HI, event({"choices": {"delta": {}}}), STOP, DONE], "Hi", "upstream_malformed"),
    "a delta of another type": ([HI, choice(delta="H"), STOP, DONE], "Hi", "upstream_malformed"),
    "nested without end": ([HI, event('{"choices": ' + "[" * 100_000), STOP, DONE], "Hi", "upstream_malformed"),
}


@pytest.mark.parametrize(("pieces", "text", "code"), BROKEN.values(), ids=BROKEN)
def test_an_answer_that_is_not_whole_is_a_failure_behind_its_text_on_every_route(
    server: Server, upstream: Upstream, pieces: Sequence[bytes], text: str, code: str
) -> None:
    upstream.plan(*[sending(*pieces)] * len(ROUTES))
    for route in ROUTES:
        found = hear(server, route)
        assert (found.text, found.code) == (text, code), route


@pytest.mark.parametrize(
    "cut", [chunk({}, "length"), chunk({}, "content_filter"), chunk({}, "abort"), event({"error": "x"})]
)
def test_no_cut_answer_is_in_the_session(server: Server, upstream: Upstream, cut: bytes) -> None:
    upstream.plan(sending(token("Half"), cut, DONE), answer("Hi"))
    body = {"message": "Hello", "session_id": uuid.uuid4().hex}
    assert heard("/api/chat", server.client.post("/api/chat", json=body)).text == "Half"
    assert heard("/api/chat", server.client.post("/api/chat", json=body)).text == "Hi"
    assert [message["role"] for message in upstream.calls[1].json["messages"]] == ["system", "user"]


def test_reasoning_is_in_no_session_and_usage_is_of_all_rounds(server: Server, upstream: Upstream) -> None:
    call = {"index": 0, "id": "a", "function": {"name": "count_tasks", "arguments": "{}"}}
    counted = event({"choices": [], "usage": COUNTED})
    upstream.plan(
        sending(chunk({"reasoning": "hm"}), chunk({"tool_calls": [call]}), chunk({}, "tool_calls"), counted, DONE),
        sending(chunk({"reasoning": "so"}), HI, STOP, USAGE, DONE),
        answer("Hi"),
    )
    body = {"message": "Hello", "session_id": uuid.uuid4().hex}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 10}
    assert heard("/api/chat", server.client.post("/api/chat", json=body)) == Heard("Hi", "hmso", usage)
    server.client.post("/api/chat", json=body)
    assert [message["content"] for message in upstream.calls[2].json["messages"][1:]] == ["Hello", "Hi", "Hello"]


@pytest.mark.parametrize(
    "content_type",
    ["text/event-stream", "Text/Event-Stream;charset=UTF-8", "text/event-stream, text/event-stream", "text/plain", ""],
)
def test_an_event_stream_is_one_by_whatever_plain_name(server: Server, upstream: Upstream, content_type: str) -> None:
    upstream.plan(sending(HI, STOP, DONE, content_type=content_type))
    assert hear(server, "/chat") == Heard()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (refuse(200, b"\x1f\x8b", content_type="text/event-stream", content_encoding="gzip"), "compressed"),
        (refuse(200, b"\x1f\x8b", content_type="text/event-stream", content_encoding="BR, gzip"), "compressed"),
        (refuse(200, b"<html>", content_type="text/html"), "did not answer with an event stream"),
        (refuse(200, b'{"choices": [{"message": {"content": "Hi"}}]}'), "did not answer with an event stream"),
        (refuse(308, b"", location="/v2"), "has moved"),
    ],
    ids=["gzip", "br", "HTML", "JSON", "308"],
)
def test_another_kind_of_answer_names_the_setting(
    server: Server, upstream: Upstream, script: Script, said: str
) -> None:
    upstream.plan(script)
    problem = server.client.get("/chat?prompt=Hello").json()
    assert problem["status"] == 502 and said in problem["detail"] and "OPENAI_BASE_URL" in problem["detail"]


def test_an_error_in_a_good_answers_place_is_one(server: Server, upstream: Upstream) -> None:
    upstream.plan(refuse(200, json.dumps({"error": MESSAGE}).encode()))
    problem = server.client.get("/chat?prompt=Hello").json()
    assert (problem["code"], problem["detail"]) == ("upstream_error", "the model failed")


# Tool calls


def test_parallel_calls_without_ids_are_all_made(server: Server, upstream: Upstream) -> None:
    def called(name: str, *arguments: str) -> list[bytes]:
        pieces = [{"index": 0, "function": {"name": name, "arguments": ""}}]
        pieces += [{"index": 0, "function": {"arguments": piece}} for piece in arguments]
        return [chunk({"tool_calls": [piece]}) for piece in pieces]

    first = called("calculate", '{"expression":', '"6*7"}')
    upstream.plan(sending(*first, *called("count_tasks", "{}"), chunk({}, "tool_calls"), DONE), answer("Hi"))
    response = server.client.post("/agent/process/stream", params={"query": "Hello"})
    tools = [json.loads(event.data) for event in Decoder().feed(response.content) if event.event == "tool"]
    results = [tool["result"] for tool in tools if tool["status"] == "complete"]
    assert results == [{"expression": "6*7", "value": "42"}, {"count": 0}]
    asked = upstream.calls[1].json["messages"]
    assert [call["id"] for call in asked[2]["tool_calls"]] == ["call_0", "call_1"]
    assert [message["tool_call_id"] for message in asked[3:]] == ["call_0", "call_1"]


def read(*deltas: dict[str, Any]) -> list[tuple[str, str, str]]:
    reader = AnswerReader()
    for delta in deltas:
        assert not list(reader.feed(choice(delta={"tool_calls": [delta]})))
    return [(call.id, call.name, call.arguments) for call in reader.tool_calls]


def function(name: Any = None, arguments: Any = None, **members: Any) -> dict[str, Any]:
    return {**members, "function": {"name": name, "arguments": arguments}}


#: Pieces of calls, and the calls: id, name, arguments.
CALLS: Final[dict[str, tuple[Sequence[dict[str, Any]], list[tuple[str, str, str]]]]] = {
    "by turns": (
        [
            function("t", "", index=0, id="a"),
            function("u", "{", index=1, id="b"),
            {"index": 0, "function": {"arguments": "{}"}},
            {"index": 1, "function": {"arguments": "}"}},
        ],
        [("a", "t", "{}"), ("b", "u", "{}")],
    ),
    "one index for all": (
        [function("today", "{}", index=0, id="a"), function("today", "{}", index=0, id="b")],
        [("a", "today", "{}"), ("b", "today", "{}")],
    ),
    "name in pieces": (
        [
            function("count_", index=0, id="a"),
            function("tasks", index=0, id="a"),
            function("count_tasks", "{}", index=0, id="a"),
        ],
        [("a", "count_tasks", "{}")],
    ),
    "no index": (
        [function("today"), {"function": {"arguments": "{}"}}, {"id": "b", "type": "function"}],
        [("call_0", "today", "{}"), ("b", "", "")],
    ),
    "empty id": ([function("today", index=0, id="")], [("call_0", "today", "")]),
    "whole calls without ids": (
        [function("t", "{}", index=0), function("t", '{"x": 1}', index=0), function("u", "{}", index=0)],
        [("call_0", "t", "{}"), ("call_1", "t", '{"x": 1}'), ("call_2", "u", "{}")],
    ),
    "whole calls without anything": (
        [function("t", "{}"), function("u", "{}")],
        [("call_0", "t", "{}"), ("call_1", "u", "{}")],
    ),
    "pieces without ids": (
        [function("t", '{"x":'), function(None, ' "}"}'), function("u", ""), function(None, "{}")],
        [("call_0", "t", '{"x": "}"}'), ("call_1", "u", "{}")],
    ),
    "name with each piece": (
        [
            function("t", '{"x":', index=0, id="a"),
            function("t", "1}", index=0, id="a"),
            function("t", "", index=0, id="a"),
        ],
        [("a", "t", '{"x":1}')],
    ),
    "a new id with each piece": (
        [
            function("t", '{"x":', index=0, id="a"),
            function(None, "1", index=0, id="b"),
            function(None, "}", index=0, id="c"),
        ],
        [("a", "t", '{"x":1}')],
    ),
    "arguments that are an object": (
        [function("t", {"x": [1, "é"]}, index=0)],
        [("call_0", "t", '{"x": [1, "\\u00e9"]}')],
    ),
    "arguments of another type": ([function("t", 5, index=0), function(None, True, index=0)], [("call_0", "t", "")]),
    "ids and indices of any type": (
        [function("t", "{", index=0, id=7), function(None, "}", index=0.0), function("u", "{}", index="1", id=8.5)],
        [("7", "t", "{}"), ("8.5", "u", "{}")],
    ),
    "index that is an object": ([function("t", "{}", index={}, id=[])], [("call_0", "t", "{}")]),
    "name of another type": ([function(None, "{}", index=0, id="a"), function({}, "", index=0)], [("a", "", "{}")]),
    "no function": ([{"index": 0, "id": "a", "name": "t", "arguments": "{}"}], [("a", "t", "{}")]),
    "halves of characters": (
        [function("t\ud83d", '{"x": "\ud83d', index=0, id="\ud83d"), function(None, '\ude42"}', index=0)],
        [("\ufffd", "t\ufffd", '{"x": "🙂"}')],
    ),
}


@pytest.mark.parametrize(("deltas", "calls"), CALLS.values(), ids=CALLS)
def test_tool_calls_come_together_from_their_pieces(deltas: Sequence[dict[str, Any]], calls: list[Any]) -> None:
    assert read(*deltas) == calls


def test_a_function_call_and_calls_of_a_message_are_tool_calls() -> None:
    reader = AnswerReader()
    stream = chunk({"function_call": {"name": "t", "arguments": "{"}}) + chunk({"function_call": {"arguments": "}"}})
    assert list(reader.feed(stream + chunk({}, "function_call"))) == []
    assert list(reader.end()) == [ToolCall("call_0", "t", "{}")]

    reader = AnswerReader()
    stream = choice(message={"tool_calls": function("t", "{}", id="a")}, finish_reason="tool_calls")
    assert [*reader.feed(stream), *reader.end()] == [ToolCall("a", "t", "{}")]


def test_half_of_a_character_in_arguments_that_end_is_replaced() -> None:
    reader = AnswerReader()
    list(reader.feed(choice(delta={"tool_calls": [function("t", '"\ud83d', index=0)]}) + STOP))
    assert list(reader.end()) == [ToolCall("call_0", "t", '"\ufffd')]


def test_tool_calls_are_bounded() -> None:
    with pytest.raises(TooLarge):
        read(*[{"index": index, "id": str(index)} for index in range(33)])
    with pytest.raises(TooLarge):
        read(*[function(None, "x" * 100_000, index=0)] * 11)
    with pytest.raises(TooLarge):
        read(*[function("x" * 100_000 + str(n), index=0) for n in range(11)])


# The reader alone

STREAM: Final = (
    FIRST
    + chunk({"reasoning": "hm é"})
    + token("é🙂")
    + token("\u2028\r\n!")
    + chunk({"tool_calls": [function("é", '{"x": "🙂', index=0, id="a")]})
    + chunk({"tool_calls": [{"index": 0, "function": {"arguments": '"}'}}]})
    + chunk({}, "tool_calls")
    + USAGE
    + DONE
)
PIECES: Final = [
    Reasoning("hm é"),
    "é🙂",
    "\u2028\r\n!",
    ToolCall("a", "é", '{"x": "🙂"}'),
    Usage(total_tokens=3),
]


def read_all(blocks: Sequence[bytes]) -> list[Piece]:
    reader = AnswerReader()
    pieces: list[Piece] = [piece for block in blocks for piece in reader.feed(block)]
    assert reader.done
    return [*pieces, *reader.end()]


@pytest.mark.parametrize("behind", [b"", token("more"), b"data: {"], ids=["whole", "more", "rubbish"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_an_answer_cut_anywhere_is_the_same(behind: bytes, line_end: bytes) -> None:
    stream = STREAM.replace(b"\n", line_end) + behind
    assert read_all([bytes((byte,)) for byte in stream]) == PIECES
    for at in range(0, len(stream), 3):
        assert read_all([stream[:at], stream[at:]]) == PIECES


def handed_on(blocks: Sequence[bytes], choices: int = 1) -> list[Chunk]:
    reader = ChunkReader(choices)
    return [*(chunk for block in blocks for chunk in reader.feed(block)), *reader.end()]


def test_a_gateway_hands_each_chunk_on_as_it_is() -> None:
    data = [event.data for event in Decoder().feed(STREAM)][:-1]
    tokens = [False, True, True, True, False, False, False, False]
    chunks = list(map(Chunk, data, tokens))
    for at in range(0, len(STREAM), 3):
        assert handed_on([STREAM[:at], STREAM[at:]]) == chunks
    assert handed_on([STREAM[: -len(DONE) - 1]]) == chunks  # the last one without its blank line


def test_an_answer_of_several_choices_is_read_until_the_last_one_ends() -> None:
    first, second = (event({"choices": [{"index": index, "finish_reason": "stop"}]}) for index in (0, 1))
    reader = ChunkReader(2)
    for block, finished in ((first, False), (first, False), (second, True)):
        assert len(list(reader.feed(block))) == 1 and reader.finished is finished
    assert len(handed_on([HI, first], choices=2)) == 2  # a server that gives one choice, whatever it was asked for


def test_a_part_is_known_from_the_whole() -> None:
    for at in range(STREAM.index(b'"finish_reason": "tool_calls"') + 10):
        reader = AnswerReader()
        list(reader.feed(STREAM[:at]))
        with pytest.raises(ModelError) as caught:
            list(reader.end())
        assert caught.value.code == "upstream_cut"


def test_an_event_and_an_answer_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ANSWER_BYTES", 1000)
    for stream in (
        [b"data: " + b"x" * 1001 + b"\n\n"],
        [b"x" * 100] * 11,
        [b"data: " + b"x" * 100 + b"\n"] * 11,
        [token("é" * 100)] * 6,
        [chunk({"reasoning": "é" * 100})] * 6,
    ):
        reader = AnswerReader()
        with pytest.raises(TooLarge):
            for block in stream:
                list(reader.feed(block))
    reader = AnswerReader()
    for _ in range(20):  # comments are no part of an event, however many
        assert not list(reader.feed(b": " + b"x" * 100 + b"\n"))


TEXTS: Final = st.text(st.characters(exclude_categories=()), max_size=20)


@given(st.lists(TEXTS, max_size=8), st.integers(1, 50), st.booleans())
def test_texts_of_any_code_units_are_one_text_of_whole_characters(
    texts: list[str], size: int, ensure_ascii: bool
) -> None:
    made = [json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=ensure_ascii) for text in texts]
    stream = b"".join(b"data: %b\n\n" % text.encode("utf-8", "surrogatepass") for text in made) + STOP
    reader = AnswerReader()
    found = [piece for at in range(0, len(stream), size) for piece in reader.feed(stream[at : at + size])]
    text = "".join(piece for piece in [*found, *reader.end()] if isinstance(piece, str))
    text.encode()  # without halves
    wanted = "".join(texts)
    if ensure_ascii:  # else a half is three bytes that are not UTF-8
        assert text == wanted.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


NAMES: Final = (
    "choices delta message content text type thinking reasoning reasoning_content tool_calls function name arguments "
    "id index finish_reason usage total_tokens error object detail refusal function_call"
).split()
ANYTHING: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from(["stop", "error", "text", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
CHUNKS: Final = st.fixed_dictionaries(
    {"choices": st.lists(st.fixed_dictionaries({"delta": st.dictionaries(st.sampled_from(NAMES), ANYTHING)}))}
)


@given(st.lists(ANYTHING | CHUNKS, max_size=4), st.binary(max_size=20))
def test_whatever_comes_is_read_or_fails_as_promised(values: list[Any], rest: bytes) -> None:
    reader = AnswerReader()
    try:
        pieces = [piece for value in values for piece in reader.feed(event(value))]
        pieces += [*reader.feed(rest), *reader.feed(STOP), *reader.end()]  # type: ignore[list-item]
    except (ModelError, TooLarge, ValueError):
        return
    for piece in pieces:
        for text in (
            (piece,) if isinstance(piece, str) else (getattr(piece, "text", ""), getattr(piece, "arguments", ""))
        ):
            text.encode()


# The end of an answer, in time


async def pieces_of(url: str) -> list[Piece]:
    with anyio.fail_after(LIMIT_S):
        async with open_model(Settings(openai_base_url=url)) as model:
            async with aclosing(model.stream([ChatMessage("user", "Hello")])) as stream:
                return [piece async for piece in stream]


async def test_what_comes_behind_a_finish_reason_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "FINISH_TIMEOUT_S", 0.2)
    monkeypatch.setenv("no_proxy", "*")

    def script(call: Call) -> None:
        call.head()
        call.send(HI, STOP, USAGE)
        while True:
            call.send(b": keep-alive\n\n")

    with serve_upstream() as upstream:
        upstream.plan(script)
        assert await pieces_of(upstream.url) == ["Hi", Usage(total_tokens=3)]
        upstream.settle()  # it was left


# The metrics


def test_tokens_are_timed_by_route_and_of_whole_answers_alone(server: Server, upstream: Upstream) -> None:
    first, each = "gen_ai_server_time_to_first_token_seconds", "gen_ai_server_time_per_output_token_seconds"

    def counts(route: str) -> tuple[float, float]:
        text = server.client.get("/metrics").text
        lines = dict(line.rpartition(" ")[::2] for line in text.splitlines())
        label = f'{{route="{route}"}}'
        return float(lines.get(f"{first}_count{label}", 0)), float(lines.get(f"{each}_count{label}", 0))

    for route in ROUTES:
        before = counts(route)
        upstream.plan(
            sending(chunk({"reasoning": "hm"}), HI, STOP, DONE),
            sending(HI, STOP, DONE),  # one token has no time between
            sending(HI, HI, chunk({}, "length")),
            sending(FIRST, STOP, DONE),
        )
        for _ in range(4):
            hear(server, route)
        whole = 2 if route == "/v1/chat/completions" else 1  # there an answer of the maximum length is one
        assert [now - then for now, then in zip(counts(route), before, strict=True)] == [3, whole], route
