"""Tasks in a database: import from CSV, stream, work on one, export."""

import csv
import io
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Final, Literal

import msgspec
from anyio import current_time, to_thread
from msgspec import UNSET, Meta, UnsetType

from handlers.chat import ChatMessage
from handlers.database import COLUMNS, Status, Task
from handlers.task_file import TaskFile
from ssecore.dialects import public_text
from ssecore.errors import BadRequest, Forbidden, NotFound, SSEAppError
from ssecore.http.request import Request
from ssecore.http.responses import ByteStream
from ssecore.http.routes import GET, POST, Run, Upload
from ssecore.wire import Event

__all__ = ["ROUTES", "outcome"]


class _Rows(msgspec.Struct, forbid_unknown_fields=True):
    status: Status | UnsetType = UNSET


class _Search(_Rows):
    q: Annotated[str, Meta(max_length=1000)] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1)] = sys.maxsize


Operation = Literal["analyze", "summarize", "finish"]


class _Operation(msgspec.Struct, forbid_unknown_fields=True):
    operation: Operation


class _Execution(_Operation):
    #: SQLite has 64 bits.
    task_id: Annotated[int, Meta(ge=1, lt=10**18)]


async def import_tasks(request: Request) -> AsyncIterator[Event]:
    """Import tasks from CSV; stream the progress and the errors by line."""
    file = await to_thread.run_sync(TaskFile, request.body)
    while not file.finished:
        tasks, events = await to_thread.run_sync(file.step)
        if tasks:
            await request.state.tasks.insert(tasks)
        for event in events:
            yield event
    imported = file.rows - file.failed
    status = outcome(imported, file.failed)
    request.failed = status == "failed"
    yield Event({"status": status, "imported": imported, "failed": file.failed}, "complete")


def outcome(done: int, failed: int) -> Literal["success", "partial", "failed"]:
    if not failed:
        return "success"
    return "partial" if done else "failed"


async def stream_tasks(request: Request) -> AsyncIterator[Event]:
    """Stream the tasks, one event each."""
    # Hot path: SQLite makes the JSON, and a row costs one `Event`.
    query: _Search = request.query
    text = None if query.q is UNSET else query.q
    if text is not None and not any(char.isalnum() for char in text):
        raise BadRequest("q: must contain a word", field="q")
    async with aclosing(request.state.tasks.pages(query.status or None, text, query.limit)) as pages:
        async for rows in pages:
            for row in rows:
                yield Event(row, "task")
    yield Event("", "done")


async def export_tasks(request: Request) -> ByteStream:
    """Export the tasks as CSV."""

    async def chunks() -> AsyncIterator[bytes]:
        yield _csv([COLUMNS])
        async with aclosing(request.state.tasks.pages(request.query.status or None)) as pages:
            async for rows in pages:
                yield _csv(msgspec.json.decode(row).values() for row in rows)

    headers = {"content-disposition": 'attachment; filename="tasks.csv"'}
    return ByteStream(chunks(), "text/csv; charset=utf-8", headers)


async def execute_task(request: Request, task_id: int | None = None) -> AsyncIterator[Event]:
    """Work on one task. A failure after the first event is the last event."""
    began = current_time()
    id: int = request.body.task_id if task_id is None else task_id
    operation: Operation = (request.body if task_id is None else request.query).operation
    task = await request.state.tasks.get(id)
    if task is None:
        raise NotFound(f"there is no task {id}")
    if request.run_id is not None:
        await request.state.tasks.begin_execution(request.run_id, id, request.caller)
    yield Event({"task_id": id, "status": "validating", "timestamp": _now()}, "status")
    steps = OPERATIONS[operation]
    try:
        for number, (step, work) in enumerate(steps.items()):
            # With a timestamp, for later readers (`task_progress`).
            begun = {"task_id": id, "step": step, "progress": 100 * number // len(steps), "timestamp": _now()}
            yield Event(begun, "status")
            result = await work(request, task)
            yield Event({"step": step, "result": result, "progress": 100 * (number + 1) // len(steps)}, "result")
    except Exception as error:
        code = error.code if isinstance(error, SSEAppError) else SSEAppError.code
        yield Event({"error": public_text(error), "type": code, "task_id": id}, "error")
        return
    seconds = round(current_time() - began, 3)
    end = {"task_id": id, "status": "completed", "duration_seconds": seconds, "timestamp": _now()}
    yield Event(end, "complete")


async def task_progress(request: Request, task_id: int) -> Any:
    """Read the progress of the caller's newest execution of the task. A cursor resumes its own execution.

    So a new execution doesn't break the `EventSource` of a client that reads an older one.
    """
    if request.runs.settings.auth == "off":  # an event's id would give access to another caller's run
        raise Forbidden("this needs authentication: with SSEAPP_AUTH=off callers can't be told apart")
    cursor = request.last_event_id
    executions = await request.state.tasks.executions(task_id, request.caller)
    run = await request.runs.run_of(cursor) if cursor not in ("", "end") else None
    if run not in executions:
        run = await _newest(request, executions)
    if run is None and not cursor:
        raise NotFound(f"there is no task {task_id}, or the log has no execution of it")
    return await request.runs.view(request, run or "", translate=partial(_progress, task_id))


async def _newest(request: Request, executions: Sequence[str]) -> str | None:
    for run in executions:
        with suppress(NotFound):
            await request.runs.state(run, caller=request.caller)
            return run
    return None


def _progress(task_id: int, event: Event) -> Event | None:
    """The progress for an event of an execution; the last event always has one."""
    data = msgspec.json.decode(event.data)
    match event.event:
        case "status" if "step" in data:
            return Event({name: data[name] for name in ("task_id", "step", "progress", "timestamp")}, "progress")
        case "complete":
            final = "completed"
        case "cancelled":
            final = "cancelled"
        case "error":
            final = "interrupted" if data.get("code") == "interrupted" else "failed"
        case _:
            return None
    return Event({"task_id": task_id, "final_status": final}, "complete")


async def _count(request: Request, task: Task) -> Mapping[str, int]:
    text = _text_of(task)
    sentences = [part for part in _SENTENCE_END.split(text) if any(map(str.isalnum, part))]
    return {"characters": len(text), "words": len(_WORD.findall(text)), "sentences": len(sentences)}


async def _measure_words(request: Request, task: Task) -> Mapping[str, str | int | float]:
    words = _WORD.findall(_text_of(task))
    return {
        "longest_word": max(words, key=len, default=""),
        "average_word_length": round(sum(map(len, words)) / max(len(words), 1), 2),
        "distinct_words": len(set(map(str.casefold, words))),
    }


async def _summarize(request: Request, task: Task) -> Mapping[str, str]:
    messages = [ChatMessage("system", SUMMARIZE), ChatMessage("user", _text_of(task))]
    async with aclosing(request.state.model.stream(messages)) as answer:
        return {"summary": "".join([piece async for piece in answer if isinstance(piece, str)])}


async def _finish(request: Request, task: Task) -> Mapping[str, str]:
    if not await request.state.tasks.set_status(task.id, "done"):
        raise NotFound(f"task {task.id} was deleted")
    return {"status": "done"}


def _text_of(task: Task) -> str:
    return f"{task.title}\n\n{task.description}" if task.description else task.title


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


SUMMARIZE: Final = "Summarize the task in one or two sentences."

#: The steps of each operation. A text has at most 10,502 characters, too few for a thread.
OPERATIONS: Final[Mapping[Operation, Mapping[str, Callable[[Request, Task], Awaitable[Any]]]]] = {
    "analyze": {"count": _count, "words": _measure_words},
    "summarize": {"summarize": _summarize},
    "finish": {"finish": _finish},
}

_WORD: Final = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
#: A mark before white space (not in 3.14), a full-width mark, or an empty line.
_SENTENCE_END: Final = re.compile(r"(?<=[.!?\u2026])\s+|(?<=[\u3002\uff01\uff1f])|\n\n")


def _csv(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)  # RFC 4180: CRLF
    return text.getvalue().encode()


def _work(request: Request) -> str:
    return f"{request.body.operation} task {request.body.task_id}"


ROUTES = [
    POST("/tasks/import", import_tasks, body=Upload("text/csv"), run=Run()),
    POST("/tasks/execute/stream", execute_task, body=_Execution, run=Run(about=_work)),
    POST("/tasks/{task_id:int}/execute/stream", execute_task, query=_Operation, run=Run()),
    GET("/tasks/{task_id:int}/progress/stream", task_progress),
    GET("/tasks/stream", stream_tasks, query=_Search),
    GET("/export.csv", export_tasks, query=_Rows),
]
