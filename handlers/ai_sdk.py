"""The agent for Vercel's AI SDK: UI message stream v1 (npm `ai` 7, `@ai-sdk/workflow` 2).

    useChat({ id, transport: new DefaultChatTransport({ api: "/ai/chat" }), resume: true })

Each logged event is one chunk, except the last one, `[DONE]`. So `startIndex=n` (`WorkflowChatTransport` has received
n chunks) means "after the n-th event".
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from handlers.agent import End, Status
from handlers.chat import LINGERING
from handlers.parts import Called, Closed, Delta, Opened, Returned, blamed, conversation, parts_of, question_of, text_of
from ssecore.dialects import AI_SDK
from ssecore.errors import NotFound
from ssecore.http.request import Request
from ssecore.http.responses import Response
from ssecore.http.routes import GET, POST, About, Run
from ssecore.wire import Event

__all__ = ["ROUTES"]

#: A page sends the whole conversation with each request.
MAX_MESSAGES: Final = 1000
_ROUTE: Final = "POST /ai/chat"


class _Message(msgspec.Struct):
    role: str
    parts: Any = None


class _Chat(msgspec.Struct):
    """The fields used here; clients send more."""

    messages: Annotated[list[_Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    id: Annotated[str, Meta(min_length=1, max_length=255)] | None = None  #: the chat's


class _From(msgspec.Struct, forbid_unknown_fields=True, rename={"start": "startIndex"}):
    start: Annotated[int, Meta(ge=-(10**9), le=10**9)] | None = None


def _chunk(type: str, **fields: Any) -> Event:
    return Event({"type": type, **fields})


async def chat(request: Request) -> AsyncIterator[Event]:
    question, history = conversation(_said(request.body))
    yield _chunk("start", messageId=f"msg_{request.run_id}")
    yield _chunk("start-step")
    end: dict[str, Any] = {}
    async with aclosing(parts_of(request, question, history)) as parts:
        async for part in parts:
            match part:
                case Status(stage):
                    yield _chunk("data-status", data={"stage": stage, "message": part.message}, transient=True)
                case Opened(kind, id):
                    yield _chunk(f"{kind}-start", id=id)
                case Delta(kind, id, text):
                    yield _chunk(f"{kind}-delta", id=id, delta=text)
                case Closed(kind, id):
                    yield _chunk(f"{kind}-end", id=id)
                case Called(id, tool, arguments):
                    call = {"toolCallId": id, "toolName": tool}
                    yield _chunk("tool-input-start", **call)
                    yield _chunk("tool-input-available", **call, input=msgspec.json.decode(arguments))
                case Returned(id, _, {"error": str(error)}):
                    yield _chunk("tool-output-error", toolCallId=id, errorText=error)
                case Returned(id, _, result):
                    yield _chunk("tool-output-available", toolCallId=id, output=result)
                case End(sources=sources, disclaimer=disclaimer):
                    for source in sources:
                        document = {"sourceId": str(source.id), "title": source.title}
                        yield _chunk("source-document", **document, mediaType="application/json")
                    end = {"disclaimer": disclaimer}
    yield _chunk("finish-step")
    yield _chunk("finish", finishReason="stop", messageMetadata=end)
    yield Event("[DONE]")


def _said(body: _Chat) -> Iterator[tuple[str, str]]:
    return ((message.role, text_of(message.parts)) for message in body.messages)


async def resume(request: Request, id: str) -> Any:
    """Stream the run with this id, or the chat's running one. 204 if no run of the chat is running."""
    runs, start = request.runs, request.query.start
    run = await _run_of(request, id)
    if run is None:
        return Response(status=204)
    if start is None or start >= 0:
        return await runs.view(request, run, only=_ROUTE, after=start)
    state = await runs.state(run, caller=request.caller)
    chunks = state["events"] - (state["state"] != "running")
    answer = await runs.view(request, run, only=_ROUTE, after=max(0, chunks + start))
    if isinstance(answer, Response):
        return answer
    return answer._replace(headers={**answer.headers, "x-workflow-stream-tail-index": str(chunks - 1)})


async def stop(request: Request, id: str) -> Response:
    """Cancel the chat's running answer, or the run with this id. Its events are kept."""
    run = await _run_of(request, id)
    if run is not None:
        await request.runs.cancel(run, caller=request.caller, keep=True)
    return Response(status=204)


async def _run_of(request: Request, id: str) -> str | None:
    try:
        state = await request.runs.state(id, caller=request.caller)
    except NotFound:
        with blamed("id"):
            running = await request.runs.of_thread(request, id, state="running")
        return next((run["run"] for run in running if run["route"] == _ROUTE), None)
    return id if state["route"] == _ROUTE else None


def _about(request: Request) -> About:
    return About(thread=request.body.id, text=question_of(_said(request.body)))


ROUTES = [
    POST(
        "/ai/chat",
        chat,
        body=_Chat,
        # `WorkflowChatTransport` sends its JSON without a content type, which `fetch` then makes text/plain.
        media_types=("application/json", "text/plain"),
        dialect=AI_SDK,
        run=Run(linger_s=LINGERING.linger_s, about=_about),
    ),
    GET("/ai/chat/{id}/stream", resume, query=_From, dialect=AI_SDK),
    POST("/ai/chat/{id}/stop", stop),
]
