"""The agent for pages that speak AG-UI: CopilotKit, `@ag-ui/client`'s `HttpAgent`, TanStack AI.

The client names the run: `runId` is the run's idempotency key, and a second tab joins by `GET /ag-ui?runId=`. After a
cut TanStack sends the same POST with `Last-Event-ID`, which resumes the run. `GET /ag-ui?threadId=` answers with the
thread's messages and its running run. An answer is stored in the thread's session before the client gets its end.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from handlers.agent import End, Status
from handlers.chat import LINGERING
from handlers.database import Exchange
from handlers.parts import Called, Closed, Delta, Opened, Returned, blamed, conversation, parts_of, question_of, text_of
from ssecore.dialects import AG_UI
from ssecore.errors import BadRequest, NotFound
from ssecore.http.request import Request
from ssecore.http.responses import JSON
from ssecore.http.routes import GET, POST, About, Run
from ssecore.runs import MIN_ANONYMOUS_KEY, MIN_ANONYMOUS_THREAD
from ssecore.wire import Event, encode_json

__all__ = ["ROUTES"]

MAX_MESSAGES: Final = 1000
_Id = Annotated[str, Meta(min_length=1, max_length=255)]


class _Message(msgspec.Struct):
    role: str
    content: Any = None
    parts: Any = None  #: TanStack's own messages have these


class _Input(msgspec.Struct, rename="camel"):
    """The fields that are used here; the client also sends its state and its own tools."""

    thread_id: _Id
    run_id: _Id
    messages: Annotated[list[_Message], Meta(max_length=MAX_MESSAGES)]


class _Asked(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """TanStack joins a run from its start (`offset`). It may ask for a part of a thread, and gets all of it."""

    thread_id: _Id | None = None
    run_id: _Id | None = None
    offset: Literal["-1"] | None = None
    limit: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    before: _Id | None = None


def _event(type: str, **fields: Any) -> Event:
    return Event({"type": type, **fields})


async def run(request: Request) -> AsyncIterator[Event]:
    body: _Input = request.body
    question, history = conversation(_said(body))
    ids = {"threadId": body.thread_id, "runId": body.run_id}
    yield _event("RUN_STARTED", **ids)
    result: dict[str, Any] = {}
    async with aclosing(parts_of(request, question, history)) as parts:
        async for part in parts:
            match part:
                case Status(stage):
                    yield _event("CUSTOM", name="status", value={"stage": stage, "message": part.message})
                case Opened("text", id):
                    yield _event("TEXT_MESSAGE_START", messageId=id, role="assistant")
                case Opened("reasoning", id):
                    yield _event("REASONING_START", messageId=id)
                    yield _event("REASONING_MESSAGE_START", messageId=id, role="reasoning")
                case Delta("text", id, text):
                    yield _event("TEXT_MESSAGE_CONTENT", messageId=id, delta=text)
                case Delta("reasoning", id, text):
                    yield _event("REASONING_MESSAGE_CONTENT", messageId=id, delta=text)
                case Closed("text", id):
                    yield _event("TEXT_MESSAGE_END", messageId=id)
                case Closed("reasoning", id):
                    yield _event("REASONING_MESSAGE_END", messageId=id)
                    yield _event("REASONING_END", messageId=id)
                case Called(id, tool, arguments):
                    yield _event("TOOL_CALL_START", toolCallId=id, toolCallName=tool)
                    yield _event("TOOL_CALL_ARGS", toolCallId=id, delta=arguments)
                    yield _event("TOOL_CALL_END", toolCallId=id)
                case Returned(id, _, answer):
                    content = encode_json(answer).decode()
                    yield _event("TOOL_CALL_RESULT", messageId=f"{id}-result", toolCallId=id, content=content)
                case End(answer=answer, sources=sources, disclaimer=disclaimer):
                    result = {"sources": sources, "disclaimer": disclaimer}
                    if answer and _is_secret(request, body.thread_id):
                        exchange = Exchange(question, answer)
                        await request.state.tasks.add_exchange(request.caller, body.thread_id, exchange)
    yield _event("RUN_FINISHED", **ids, result=result, outcome={"type": "success"})


def _said(body: _Input) -> Iterator[tuple[str, str]]:
    return ((message.role, text_of(message.content) or text_of(message.parts)) for message in body.messages)


def _is_secret(request: Request, thread: str) -> bool:
    """Whether the session is protected: by credentials, or by a thread id that can't be guessed."""
    return bool(request.caller) or len(thread) >= MIN_ANONYMOUS_THREAD


async def read(request: Request) -> Any:
    """Stream the run that the client named, or answer with a thread's messages and running run."""
    asked: _Asked = request.query
    if asked.run_id is not None:
        with blamed("runId"):
            found = await request.runs.find(request, asked.run_id, method="POST", path="/ag-ui")
        if found is None:
            raise NotFound("there is no such run")
        return await request.runs.view(request, found)
    if asked.thread_id is None:
        raise BadRequest("the query must have a threadId or a runId", field="threadId")
    with blamed("threadId"):
        running = await request.runs.of_thread(request, asked.thread_id, state="running")
    active = next((run["note"]["runId"] for run in running if run["route"] == "POST /ag-ui"), None)
    said = await request.state.tasks.session(request.caller, asked.thread_id)
    messages = [
        {"id": f"{asked.thread_id}-{number}-{role}", "role": role, "parts": [{"type": "text", "content": text}]}
        for number, exchange in enumerate(said)
        for role, text in (("user", exchange.question), ("assistant", exchange.answer))
    ]
    return JSON({"messages": messages, "activeRun": {"runId": active} if active is not None else None})


def _about(request: Request) -> About:
    body: _Input = request.body
    note = {"threadId": body.thread_id, "runId": body.run_id}
    # Without credentials a short id could be guessed, and the run read.
    secret = request.caller is not None or len(body.run_id) >= MIN_ANONYMOUS_KEY
    key = body.run_id if secret else None
    return About(thread=body.thread_id, key=key, text=question_of(_said(body)), note=note)


ROUTES = [
    POST("/ag-ui", run, body=_Input, dialect=AG_UI, run=Run(linger_s=LINGERING.linger_s, about=_about)),
    GET("/ag-ui", read, query=_Asked, dialect=AG_UI),
]
