"""OpenAI's own routes (chat completions, Responses, models), for programs that only change their `base_url`.

There are two models: the upstream's (`OPENAI_MODEL`, or the mock), and `agent`, which uses the service's tools. Another
name is refused, so that a caller can't choose what the service's key pays for.

1.  Each answer is a run: a stream resumes after a cut, and a repeated request with its `Idempotency-Key` gets the same
    answer.
2.  A completion's request and chunks are passed on unchanged, except for the key, `model` and `stream`; a whole answer
    is also asked for its usage.
3.  A response's sequence numbers begin at 0, the log's at 1: `starting_after=n` means "after the log's event n+1".
4.  The agent's tool calls are `mcp_call` items: clients show those, but don't try to run them.
5.  `handlers.answer` decides whether an upstream's answer is whole, as for `/chat`. An answer that its maximum length
    or a content filter has cut keeps its finish reason in a completion, and ends a response with `response.incomplete`.
6.  If the upstream refuses the client's own request (`CLIENTS_MISTAKES`), the client gets the upstream's HTTP status
    and error object. If the upstream has no room at the moment (`PASSING`), the client gets that status and the
    `Retry-After`, by which SDKs retry. After the first second a streaming client gets all this in an event. So
    `response.created` is sent with the upstream's first piece, or after `PATIENCE_S`.

Boundary of trust: `max_body_bytes` and the limits of its lists apply to a request, `handlers.answer`'s to an upstream.
"""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Final, NamedTuple

import anyio
import msgspec
from msgspec import Meta

from handlers.agent import End
from handlers.answer import ModelError, Piece, Reasoning, ToolCall, Usage, error_object, loads_leniently
from handlers.chat import LINGERING, ChatMessage, Model, OpenAIModel, answer_times
from handlers.database import Exchange
from handlers.parts import Called, Closed, Delta, Opened, Returned, conversation, parts_of, question_of, text_of
from ssecore.dialects import OPENAI, OPENAI_RESPONSES
from ssecore.errors import BadRequest, NotFound, SSEAppError, UpstreamRefusal
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import GET, POST, About, Run
from ssecore.streaming.merge import merge
from ssecore.wire import Event, encode_json

__all__ = ["ROUTES"]

AGENT: Final = "agent"
MOCK: Final = "mock"
MAX_MESSAGES: Final = 1000
MAX_TOOLS: Final = 128  # OpenAI's own bound
#: The HTTP statuses of an upstream that are about the client's own request. Not 401, 402, 403 and 404: key, account,
#: URL and model are the service's. Not 409, which is about the upstream's state: SDKs retry it, as they retry a 502.
CLIENTS_MISTAKES: Final = (400, 413, 422)
PASSING: Final = (429, 503)
#: How long `response.created` waits for the upstream: less than the second in which a failure is an HTTP status.
PATIENCE_S: Final = 0.8

_List = Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)]
_Tools = Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)]
#: Part of each event that has the whole response. OpenAI's own bounds.
_Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
_Name = Annotated[str, Meta(max_length=200)]


class _Options(msgspec.Struct):
    include_usage: bool | None = None


class _Completion(msgspec.Struct):
    """The fields used here; the upstream gets all."""

    messages: _List
    model: _Name = ""
    stream: bool | None = None
    stream_options: _Options | None = None


class _Response(msgspec.Struct):
    input: str | _List
    model: _Name = ""
    instructions: str | None = None
    stream: bool | None = None
    background: bool | None = None
    tools: _Tools | None = None
    tool_choice: Any = None
    previous_response_id: str | None = None
    conversation: Any = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    parallel_tool_calls: bool | None = None
    metadata: _Metadata | None = None


class _Events(msgspec.Struct, forbid_unknown_fields=True, rename={"include": "include[]"}):
    """OpenAI's SDKs may also ask for parts (`include[]`) and for padding; both are ignored."""

    stream: bool = False
    include: Annotated[list[_Name], Meta(max_length=100)] = []
    include_obfuscation: bool = False
    starting_after: Annotated[int, Meta(ge=0, le=10**9)] | None = None


def _names(model: Model) -> list[str]:
    return [model.model if isinstance(model, OpenAIModel) else MOCK, AGENT]


def _chosen(request: Request) -> str:
    """The model that is asked for. Raises `NotFound`."""
    names = _names(request.state.model)
    name: str = request.body.model or names[0]
    if name not in names:
        text = f"there is no model {name!r:.100}: use {' or '.join(map(repr, names))}"
        raise NotFound(text, code="model_not_found", field="model")
    return name


async def models(request: Request) -> Response:
    names = _names(request.state.model)
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "sseapp"} for name in names]
    return JSON({"object": "list", "data": data})


# Chat completions


async def completion(request: Request) -> AsyncIterator[Event]:
    chosen, model = _chosen(request), request.state.model
    if chosen != AGENT and isinstance(model, OpenAIModel):
        times = answer_times(request)
        try:
            async with aclosing(model.chunks(msgspec.json.decode(request.raw_body))) as chunks:
                async for data, is_token in chunks:
                    if is_token:
                        times.token()
                    yield Event(data)
        except ModelError as error:
            raise _for_client(error, model) from None
        times.end()
    else:
        question, history = conversation(_spoken(request.body.messages))
        answer = _agents(request, question, history) if chosen == AGENT else _mocks(request, model, question)
        head = {"id": f"chatcmpl-{request.run_id}", "object": "chat.completion.chunk", "created": int(time.time())}
        head["model"] = chosen
        choice: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        usage: Usage | None = None
        yield Event({**head, "choices": [choice]})
        async with aclosing(answer) as deltas:
            async for delta in deltas:
                if isinstance(delta, Usage):
                    usage = delta
                else:
                    yield Event({**head, "choices": [{**choice, "delta": delta}]})
        yield Event({**head, "choices": [{**choice, "delta": {}, "finish_reason": "stop"}]})
        options = request.body.stream_options
        if usage is not None and (not request.body.stream or (options is not None and options.include_usage)):
            yield Event({**head, "choices": [], "usage": usage})
    yield Event("[DONE]")


def _for_client(error: ModelError, model: Model | None) -> SSEAppError:
    """Rule 6. `model`: the one that got the client's own request."""
    if error.refused in PASSING:
        return UpstreamRefusal(error.detail, status=error.refused, code=error.code, headers=error.headers)
    if error.refused not in CLIENTS_MISTAKES or not isinstance(model, OpenAIModel):
        return error
    text = f"the model's server refused the request with the HTTP status {error.refused}"
    unsaid = {"message": text, "type": "invalid_request_error", "param": None, "code": None}
    given = error_object(error.body, model.key) or unsaid
    return UpstreamRefusal(given["message"] or text, status=error.refused, error=given, field=given["param"])


async def _agents(
    request: Request, question: str, history: list[Exchange]
) -> AsyncGenerator[dict[str, str] | Usage, None]:
    try:
        async with aclosing(parts_of(request, question, history)) as parts:
            async for part in parts:
                if isinstance(part, Delta):
                    yield {"content" if part.kind == "text" else "reasoning_content": part.text}
                elif isinstance(part, End) and part.usage is not None:
                    yield part.usage
    except ModelError as error:
        raise _for_client(error, None) from None


async def _mocks(request: Request, model: Model, question: str) -> AsyncGenerator[dict[str, str] | Usage, None]:
    times = answer_times(request)
    async with aclosing(model.stream([ChatMessage("user", question)])) as texts:
        async for text in texts:
            if isinstance(text, str):
                times.token()
                yield {"content": text}
    times.end()


def _spoken(messages: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    return ((str(message.get("role")), text_of(message.get("content"))) for message in messages)


async def whole_completion(request: Request, run: str) -> Response | None:
    """The chunks as one `chat.completion`; `None` if the client asked for a stream."""
    if request.body.stream:
        return None
    whole: dict[str, Any] = {}
    for event in await request.runs.whole(request, run):
        if event.data == "[DONE]":
            break
        chunk = loads_leniently(event.data.encode())
        if chunk.get("error"):
            return JSON({"error": chunk["error"]}, chunk.get("status", 502), chunk.get("headers"))
        chunk["choices"] = [choice for choice in chunk.get("choices") or () if choice is not None]
        for choice in chunk["choices"]:
            choice.setdefault("index", 0)
            choice["message"] = choice.pop("delta", None) or choice.get("message")
        whole = _joined(whole, chunk)
    for choice in whole.get("choices") or ():
        for number, call in enumerate((choice.get("message") or {}).get("tool_calls") or ()):
            call.pop("index", number)
    # With ASCII only: a character whose halves came in two chunks is written as two escapes, which are one character.
    return Response(json.dumps({**whole, "object": "chat.completion"}).encode(), media_type="application/json")


#: Strings that later chunks repeat, rather than continue.
_FIXED: Final = frozenset("id object model role type finish_reason system_fingerprint service_tier".split())


def _joined(old: Any, new: Any, key: str = "") -> Any:
    """Merge two pieces of an answer: texts are concatenated, lists merged by their items' `index`, objects by key."""
    if old is None or new is None:
        return new if old is None else old
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {name: _joined(old.get(name), value, name) for name, value in new.items()}
    if isinstance(old, str) and isinstance(new, str):
        same = key in _FIXED or (key == "name" and old == new)  # a name comes in pieces from some servers only
        return (new or old) if same else old + new
    if isinstance(old, list) and isinstance(new, list):
        items = list(old)
        for item in new:
            index = item.get("index") if isinstance(item, dict) else None
            at = next((n for n, known in enumerate(items) if index is not None and known.get("index") == index), None)
            if at is None:
                items.append(item)
            else:
                items[at] = _joined(items[at], item)
        return items
    return new


# Responses


async def response(request: Request) -> AsyncIterator[Event]:
    body: _Response = request.body
    chosen, model = _chosen(request), request.state.model
    for field in ("previous_response_id", "conversation"):
        if getattr(body, field) is not None:
            text = "this service stores no conversations: send the earlier messages in `input`"
            raise BadRequest(text, code="unsupported", field=field)
    messages, tools = _messages(body), [_nested(tool) for tool in body.tools or ()]
    by_upstream = chosen != AGENT and isinstance(model, OpenAIModel)
    question, history = ("", []) if by_upstream else conversation(_spoken(messages), "input")
    writer = _Writer(request)
    if not by_upstream:
        for event in writer.begin():
            yield event
    try:
        if chosen == AGENT:
            async with aclosing(parts_of(request, question, history)) as parts:
                async for part in parts:
                    for event in writer.part(part):
                        yield event
        else:
            pieces: AsyncGenerator[Piece | None, None]
            if isinstance(model, OpenAIModel):
                pieces = _patiently(model.stream(messages, tools, options=_options(body), usage=True))
            else:
                pieces = model.stream([ChatMessage("user", question)])
            times = answer_times(request)
            async with aclosing(pieces):
                async for piece in pieces:
                    for event in writer.begin():
                        yield event
                    if isinstance(piece, str | Reasoning):
                        times.token()
                    for event in writer.piece(piece):
                        yield event
            times.end()
    except ModelError as error:
        if error.code not in _INCOMPLETE:
            raise _for_client(error, model if by_upstream else None) from None
        for event in (*writer.begin(), *writer.closed("incomplete")):
            yield event
        yield writer.response("incomplete", "incomplete", incomplete_details={"reason": _INCOMPLETE[error.code]})
    else:
        for event in (*writer.begin(), *writer.closed()):
            yield event
        yield writer.response("completed", "completed")


async def _patiently(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece | None, None]:
    """The pieces; before them `None` if the first takes longer than `PATIENCE_S`."""

    async def first() -> AsyncGenerator[list[Piece | None], None]:
        yield [piece] if (piece := await anext(pieces, None)) is not None else []

    async def patience() -> AsyncGenerator[list[Piece | None], None]:
        await anyio.sleep(PATIENCE_S)
        yield [None]

    async with aclosing(pieces):
        async with merge(first(), patience()) as begun:
            async for some in begun:
                for piece in some:
                    yield piece
                if some != [None]:
                    break
        async for piece in pieces:
            yield piece


#: OpenAI's names for an answer that the model's server has cut.
_INCOMPLETE: Final = {"upstream_length": "max_output_tokens", "upstream_filtered": "content_filter"}


def _options(body: _Response) -> dict[str, Any]:
    """The request's other fields for the upstream."""
    choice = body.tool_choice if body.tools else None
    options = {
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "parallel_tool_calls": body.parallel_tool_calls if body.tools else None,
        "tool_choice": _nested(choice) if isinstance(choice, dict) else choice,
    }
    return {name: value for name, value in options.items() if value is not None}


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    """A function tool in the form of chat completions."""
    if tool.get("type") != "function":
        raise BadRequest(f"tools: only the type 'function' is supported, not {tool.get('type')!r:.60}", field="tools")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _messages(body: _Response) -> list[dict[str, Any]]:
    """The input as messages of chat completions."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        match item.get("type", "message"):
            case "message":
                role = {"developer": "system"}.get(str(item.get("role")), item.get("role"))
                messages.append({"role": role, "content": text_of(item.get("content"))})
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                if messages and "tool_calls" in messages[-1]:
                    messages[-1]["tool_calls"].append(call)
                else:
                    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            case "function_call_output":
                output = item.get("output")
                content = output if isinstance(output, str) else text_of(output)
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
            case "reasoning" | "mcp_call" | "mcp_list_tools":
                pass  # items of an earlier answer that chat completions have no form for
            case kind:
                raise BadRequest(f"input: items of the type {kind!r:.60} are not supported", field="input")
    return messages


class _Kind(NamedTuple):
    """An output item that is written piece by piece into its only content."""

    prefix: str  #: of the item's id
    item: Mapping[str, Any]
    content: str  #: the content's type, and the name of its events
    fields: Mapping[str, Any]  #: more of the content
    event: Mapping[str, Any]  #: more of its events

    def part(self, text: str) -> dict[str, Any]:
        return {"type": self.content, "text": text, **self.fields}


_MESSAGE: Final = {"type": "message", "role": "assistant"}
_TEXT: Final = _Kind("msg", _MESSAGE, "output_text", {"annotations": [], "logprobs": []}, {"logprobs": []})
_REASONING: Final = _Kind("rs", {"type": "reasoning", "summary": []}, "reasoning_text", {}, {})


class _Writer:
    """Makes the events of one response: numbers them, and collects the output."""

    def __init__(self, request: Request) -> None:
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._item = ""  # the id of the one that is open
        self._kind: _Kind | None = None  # of the one that is open
        self._said: list[str] = []  # its content so far
        self._call: dict[str, Any] = {}  # the agent's, until its result is there
        self._run = request.run_id
        self._response = {**_facts(request.body, _chosen(request)), "id": f"resp_{request.run_id}"}

    def begin(self) -> list[Event]:
        """The first events, once."""
        if self._number:
            return []
        return [self.response(event, "in_progress") for event in ("created", "in_progress")]

    def _event(self, type: str, **fields: Any) -> Event:
        event = Event({"type": type, "sequence_number": self._number, **fields}, type)
        self._number += 1
        return event

    def response(self, event: str, status: str, **facts: Any) -> Event:
        response = {**self._response, "status": status, "output": self._output, **facts}
        return self._event(f"response.{event}", response=response)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": len(self._output)}

    def _added(self, item: dict[str, Any]) -> Event:
        self._item = item["id"]
        return self._event("response.output_item.added", output_index=len(self._output), item=item)

    def _done(self, item: dict[str, Any]) -> Event:
        event = self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        return event

    def piece(self, piece: Piece | None) -> list[Event]:
        """Of a model's answer."""
        match piece:
            case str():
                return self._write(_TEXT, piece)
            case Reasoning(text):
                return self._write(_REASONING, text)
            case ToolCall():
                return [*self.closed(), *self.call(piece)]
            case Usage():
                self._response["usage"] = _usage(piece)
        return []

    def _write(self, kind: _Kind, text: str) -> list[Event]:
        """Append to the item of this kind; if another one is open, or none, a new one is opened."""
        events = []
        if self._kind is not kind:
            events = self.closed()
            self._kind = kind
            item = {"id": f"{kind.prefix}_{self._run}-{len(self._output)}", **kind.item}
            events.append(self._added({**item, "status": "in_progress", "content": []}))
            events.append(self._content("added", kind.part("")))
        self._said.append(text)
        events.append(
            self._event(f"response.{kind.content}.delta", **self._place, content_index=0, delta=text, **kind.event)
        )
        return events

    def closed(self, status: str = "completed") -> list[Event]:
        """Close the item that `_write` has opened, if there is one."""
        if (kind := self._kind) is None:
            return []
        text = "".join(self._said)
        self._kind = None
        self._said.clear()
        item = {"id": self._item, **kind.item, "status": status, "content": [kind.part(text)]}
        return [
            self._event(f"response.{kind.content}.done", **self._place, content_index=0, text=text, **kind.event),
            self._content("done", kind.part(text)),
            self._done(item),
        ]

    def part(self, part: Any) -> list[Event]:
        """Of the agent's answer. What it thinks is a summary."""
        match part:
            case Delta("text", _, text):
                return self._write(_TEXT, text)
            case Closed("text"):
                return self.closed()
            case Opened("reasoning", id):
                return [
                    self._added({"id": f"rs_{id}", "type": "reasoning", "summary": []}),
                    self._summary("part.added", part={"type": "summary_text", "text": ""}),
                ]
            case Delta("reasoning", _, text):
                return [self._summary("text.delta", delta=text)]
            case Closed("reasoning", _, text):
                summary = {"type": "summary_text", "text": text}
                return [
                    self._summary("text.done", text=text),
                    self._summary("part.done", part=summary),
                    self._done({"id": self._item, "type": "reasoning", "summary": [summary]}),
                ]
            case Called(id, tool, arguments):
                self._call = {"id": f"mcp_{id}", "type": "mcp_call", "server_label": "tasks", "name": tool}
                item = {**self._call, "arguments": "", "status": "in_progress"}
                self._call["arguments"] = arguments
                return [
                    self._added(item),
                    self._event("response.mcp_call.in_progress", **self._place),
                    self._event("response.mcp_call_arguments.delta", **self._place, delta=arguments),
                    self._event("response.mcp_call_arguments.done", **self._place, arguments=arguments),
                ]
            case Returned(_, _, result):
                error = result.get("error")
                kind = "failed" if error is not None else "completed"
                output = None if error is not None else encode_json(result).decode()
                return [
                    self._event(f"response.mcp_call.{kind}", **self._place),
                    self._done({**self._call, "status": kind, "output": output, "error": error}),
                ]
            case End(sources=sources, disclaimer=disclaimer, usage=usage):
                about = {"disclaimer": disclaimer, "sources": ", ".join(str(source.id) for source in sources)}
                self._response["metadata"] = {**(self._response["metadata"] or {}), **about}
                if usage is not None:
                    self._response["usage"] = _usage(usage)
        return []

    def call(self, call: ToolCall) -> list[Event]:
        """A function that the client is to call."""
        item = {"id": f"fc_{self._number}_{call.id}", "type": "function_call", "call_id": call.id, "name": call.name}
        added = self._added({**item, "arguments": "", "status": "in_progress"})
        place = self._place
        return [
            added,
            self._event("response.function_call_arguments.delta", **place, delta=call.arguments),
            self._event("response.function_call_arguments.done", **place, arguments=call.arguments, name=call.name),
            self._done({**item, "arguments": call.arguments, "status": "completed"}),
        ]

    def _content(self, what: str, part: dict[str, Any]) -> Event:
        return self._event(f"response.content_part.{what}", **self._place, content_index=0, part=part)

    def _summary(self, what: str, **fields: Any) -> Event:
        return self._event(f"response.reasoning_summary_{what}", **self._place, summary_index=0, **fields)


def _usage(usage: Usage) -> dict[str, Any]:
    """OpenAI's form requires each count: 0 is also one that the model's server didn't send."""
    read, written = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "input_tokens": read,
        "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens or read + written,
    }


def _facts(body: _Response, model: str) -> dict[str, Any]:
    """The constant fields of a `response` object."""
    return {
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": body.metadata or {},
        "background": bool(body.background),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tool_choice": "auto",
        "tools": [],
        "usage": None,
    }


async def accepted_response(request: Request, run: str) -> Response | None:
    body: _Response = request.body
    if body.stream:
        return None
    if body.background:
        return JSON({**_facts(body, _chosen(request)), "id": f"resp_{run}", "status": "queued", "output": []})
    last = await _last_event(request, run)
    if "status" in last:  # the upstream's refusal came after the first second
        return JSON({"error": last["response"]["error"]}, last["status"], last.get("headers"))
    return JSON(last["response"])


async def _last_event(request: Request, run: str) -> dict[str, Any]:
    events = await request.runs.whole(request, run)
    return msgspec.json.decode(events[-1].data, type=dict[str, Any])


async def _whole_response(request: Request, run: str) -> Response:
    return JSON((await _last_event(request, run))["response"])


async def read_response(request: Request, id: str) -> Any:
    """The response in its current state; with `stream`, its events after the number `starting_after`."""
    asked, runs, run = request.query, request.runs, _run_of(id)
    if asked.stream:
        after = None if asked.starting_after is None else asked.starting_after + 1
        return await runs.view(request, run, only=_ROUTE, after=after)
    state = await _state_of(request, run)
    if state["state"] == "running":
        return JSON({**state["note"], "id": id, "status": "in_progress", "output": []})
    return await _whole_response(request, run)


async def cancel_response(request: Request, id: str) -> Response:
    run = _run_of(id)
    await _state_of(request, run)
    await request.runs.cancel(run, caller=request.caller, keep=True)
    return await _whole_response(request, run)


_ROUTE: Final = "POST /v1/responses"


def _run_of(id: str) -> str:
    return id.removeprefix("resp_")


async def _state_of(request: Request, run: str) -> Mapping[str, Any]:
    state: Mapping[str, Any] = await request.runs.state(run, caller=request.caller)
    if state["route"] != _ROUTE:
        raise NotFound("there is no such response")
    return state


def _about(request: Request) -> About:
    said = request.body.input
    text = said if isinstance(said, str) else question_of(_spoken(said))
    return About(text=text, note=_facts(request.body, _chosen(request)))


def _about_completion(request: Request) -> str:
    return question_of(_spoken(request.body.messages))


ROUTES = [
    GET("/v1/models", models, dialect=OPENAI),
    POST(
        "/v1/chat/completions",
        completion,
        body=_Completion,
        dialect=OPENAI,
        run=Run(linger_s=LINGERING.linger_s, accepted=whole_completion, about=_about_completion),
    ),
    # Runs to its end even without a reader: the client has its id, and may ask for it later.
    POST(
        "/v1/responses",
        response,
        body=_Response,
        dialect=OPENAI_RESPONSES,
        run=Run(accepted=accepted_response, about=_about),
    ),
    GET("/v1/responses/{id}", read_response, query=_Events, dialect=OPENAI_RESPONSES),
    POST("/v1/responses/{id}/cancel", cancel_response, dialect=OPENAI_RESPONSES),
]
