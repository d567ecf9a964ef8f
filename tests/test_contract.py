"""What each route of the service promises: one table, and the tests that hold a real server to it.

An entry says how a route is asked, what it answers and what it refuses. What can be told of a route without knowing its
subject (its ending, HEAD, other methods, bodies that can't be read, …) is tried on every entry by itself. Two tests
compare the table with the service's own, in both directions: there is no route without its contract.

    Stream(
        "GET /countdown/{seconds}",
        "/countdown/3?interval=0",
        FLEETING,
        "countdown{3} complete",
        {"countdown": {"remaining": int}, "complete": {"message": str}},
        bad=[Bad("/countdown/3601", "seconds")],
    )

The grammar is a regular expression over labels. A label is an event's name; where several shapes share one, each has a
word of its own behind a dot: `tool.calling` is an event `tool` (or one of this whole name), and `.done` one without a
name. A shape is the data's text, or a picture of its JSON (see `misfits`). `{run}` in a target is the id of a run that
is there (see `World`).
"""

import dataclasses
import re
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import httpx
import orjson
import pytest

from handlers import ROUTES
from handlers.jobs import MAX_ITEMS
from ssecore.errors import SSEAppError
from ssecore.http.request import MAX_QUERY_FIELDS
from ssecore.http.routes import Route, Upload
from ssecore.runs import ROUTES as RUN_ROUTES
from ssecore.wire import Decoder, Event
from tests.clients import BROWSER
from tests.serving import Server, serve

# The notation

#: FLEETING ends with its client, and once it has ended, it has ended for good; a RUN outlives its connection; a VIEW
#: reads a run that is there; a TOPIC has no end.
FLEETING, RUN, VIEW, TOPIC = "fleeting", "run", "view", "topic"

#: For `Bad.body`: that of the good request; for `Bad.field`: that of the answer.
SAME: Final = object()


@dataclass(frozen=True)
class Bad:
    """A request that is refused. `target` is another one than the good one, or another query (`?…`) for it."""

    target: str = ""
    field: Any = None  #: a text; `SAME`: whichever it blames
    status: int = 400
    code: str = ""  #: another one than its status has
    body: Any = SAME
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    route: str  #: as in the service's table, without the types of its path parameters
    target: str
    body: Any = dataclasses.field(default=None, kw_only=True)  #: JSON; text is a CSV
    bad: Sequence[Bad] = dataclasses.field(default=(), kw_only=True)
    #: Of its headers those that are its own.
    headers: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)
    #: Its refusals are also what OpenAI's SDKs read.
    openai: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def method(self) -> str:
        return self.route.partition(" ")[0]

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def declares_query(self) -> bool:
        """Whether the service's table has a type for its query."""
        return SERVED[self.route].query is not None

    def __str__(self) -> str:
        return f"{self.method} {self.target}"


@dataclass(frozen=True)
class Stream(Entry):
    """An event stream. `publish` are the POSTs that make a topic's events: paths and bodies."""

    kind: str
    grammar: str
    events: Mapping[str, Any]
    publish: Sequence[tuple[str, Any]] = dataclasses.field(default=(), kw_only=True)


@dataclass(frozen=True)
class Answer(Entry):
    """A whole answer. `shape` is that of its body."""

    shape: Any
    status: int = 200
    media_type: str | None = dataclasses.field(default="application/json", kw_only=True)


def misfits(value: Any, shape: Any, at: str = "data") -> Iterator[str]:
    """Where the value is not as the shape pictures it.

    A type: its instances (`float`: any number; `object`: anything). A dictionary: these keys and no others, but one
    that ends in `?` may be left out. A list of one shape: any number of it. A tuple: one of these. A pattern: a text
    that it matches. Anything else: itself.
    """
    if isinstance(shape, type):
        kinds = (int, float) if shape is float else shape
        if not isinstance(value, kinds) or (isinstance(value, bool) and shape not in (bool, object)):
            yield f"{at}: {value!r:.80} is no {shape.__name__}"
    elif isinstance(shape, dict):
        inner = {key.removesuffix("?"): part for key, part in shape.items()}
        if not isinstance(value, dict):
            yield f"{at}: {value!r:.80} is no object"
        elif unknown := value.keys() - inner:
            yield f"{at}: unknown {unknown}"
        elif missing := {key for key in shape if not key.endswith("?")} - value.keys():
            yield f"{at}: missing {missing}"
        else:
            for key, item in value.items():
                yield from misfits(item, inner[key], f"{at}.{key}")
    elif isinstance(shape, list):
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            yield from misfits(item, shape[0] if isinstance(value, list) else list, f"{at}[{index}]")
    elif isinstance(shape, tuple):
        if all(any(misfits(value, one, at)) for one in shape):
            yield f"{at}: {value!r:.80} is none of {shape}"
    elif isinstance(shape, re.Pattern):
        if not isinstance(value, str) or not shape.fullmatch(value):
            yield f"{at}: {value!r:.80} is not {shape.pattern}"
    elif type(value) is not type(shape) or value != shape:
        yield f"{at}: {value!r:.80} is not {shape!r}"


def read(text: str, shape: Any) -> Any:
    """The data as its shape looks at it; what is no JSON is a text."""
    with suppress(orjson.JSONDecodeError):
        return text if isinstance(shape, str | re.Pattern) else orjson.loads(text)
    return text


def label(event: Event, stream: Stream) -> str:
    """Which of the contract's events this one is."""
    wrong = [f"{event.event!r} is none of {list(stream.events)}"]
    for name, shape in stream.events.items():
        if event.event in (name, name.partition(".")[0] or None):
            found = list(misfits(read(event.data, shape), shape, name))
            if not found:
                return name
            wrong += found
    raise AssertionError(f"{event}: " + "; ".join(wrong))


def matches(labels: Sequence[str], grammar: str) -> bool:
    pattern = re.sub(r"[A-Za-z_.-]+", lambda match: f"(?:{re.escape(match[0])};)", grammar)
    return re.fullmatch(pattern.replace(" ", ""), "".join(f"{label};" for label in labels)) is not None


# The table

TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
ID: Final = re.compile(r"[\w-]{22}")
CURSOR: Final = re.compile(r"[\w-]{22}\.\d+")
SHA256: Final = re.compile("[0-9a-f]{64}")
#: Any text that is not empty.
TEXT: Final = re.compile("(?s).+")
ONE_TO_FIVE: Final = (1, 2, 3, 4, 5)

UPDATE: Final = {"count": int, "message": re.compile(r"Update \d+")}
DONE: Final = {"done": True}
#: Of each `interval`.
PACES: Final = [Bad(f"?interval={value}", "interval") for value in ("x", "-0.5", "nan", "inf", "3600.5", "")]
TASK: Final = {
    "id": int,
    "title": str,
    "description": str,
    "status": ("open", "doing", "done"),
    "priority": ONE_TO_FIVE,
    "due": (re.compile(r"\d{4}-\d\d-\d\d"), None),
    "created": TIME,
}
CSV: Final = "title,description,status,priority,due\nWrite,A long text. It ends.,open,2,2026-12-31\nRead,,done,,\n"
USER: Final = {"role": "user", "content": "Hello there"}
RUN_STATE: Final = {
    "run": ID,
    "route": str,
    "about": str,
    "state": ("running", "completed", "failed", "cancelled", "interrupted"),
    "created": TIME,
    "updated": TIME,
    "events": int,
    "last_event_id": CURSOR,
    "thread?": str,
    "note?": dict,
}
NOT_A_NAME: Final = ["a%0Ab", "%00", "%E2%80%A8", "x" * 201]
#: A run that nobody has heard of.
UNKNOWN: Final = "A" * 22


def executed(results: Mapping[str, Any], steps: str) -> tuple[str, Mapping[str, Any]]:
    """Grammar and events of an execution."""
    events = {
        "status.validating": {"task_id": int, "status": "validating", "timestamp": TIME},
        "status.step": {"task_id": int, "step": re.compile(steps), "progress": int, "timestamp": TIME},
        **{f"result.{name}": {"step": name, "result": result, "progress": int} for name, result in results.items()},
        "complete": {"task_id": int, "status": "completed", "duration_seconds": float, "timestamp": TIME},
    }
    grammar = " ".join(f"status.step result.{name}" for name in results)
    return f"status.validating {grammar} complete", events


ANALYZED: Final = executed(
    {
        "count": {"characters": int, "words": int, "sentences": int},
        "words": {"longest_word": str, "average_word_length": float, "distinct_words": int},
    },
    "count|words",
)
SUMMARIZED: Final = executed({"summarize": {"summary": TEXT}}, "summarize")
FINISHED: Final = executed({"finish": {"status": "done"}}, "finish")

BASICS: Final = [
    Stream(
        "GET /stream",
        "/stream?count=3&interval=0",
        FLEETING,
        "message{3} complete",
        {"message": UPDATE, "complete": DONE},
        bad=[*PACES, *(Bad(f"?count={value}", "count") for value in ("-1", "1000001", "1.5", "ten", "", "9" * 5000))],
    ),
    Stream(
        "GET /stream/data",
        "/stream/data?count=3&interval=0",
        FLEETING,
        ".update{3} .done",
        {".update": UPDATE, ".done": "[DONE]"},
        bad=[*PACES, Bad("?count=-1", "count"), Bad("?count=1000001", "count")],
    ),
    Stream(
        "GET /stream/hello",
        "/stream/hello?interval=0",
        FLEETING,
        "message{4} complete",
        {"message": {"text": ("Hello", "from", "Server-Sent", "Events!")}, "complete": DONE},
        bad=PACES,
    ),
    Stream(
        "GET /stream/progress",
        "/stream/progress?interval=0",
        FLEETING,
        "progress{11} complete",
        {"progress": {"progress": int}, "complete": DONE},
        bad=PACES,
    ),
    Stream(
        "GET /stream/format",
        "/stream/format?interval=0",
        FLEETING,
        ".alone message update config",
        {".alone": TEXT, "message": TEXT, "update": {"count": 42}, "config": "Setting retry"},
        bad=PACES,
    ),
    Stream(
        "GET /stream/merge",
        "/stream/merge?interval=0",
        FLEETING,
        ".item+ .done",
        {".item": {"source": ("A", "B"), "value": int}, ".done": "[DONE]"},
        bad=PACES,
    ),
    Stream(
        "GET /stream/errors",
        "/stream/errors?total=20&at=9&interval=0",
        FLEETING,
        "connected .item{7} item_error .item error done",
        {
            "connected": {"status": "ok"},
            ".item": re.compile(r"Item \d+"),
            "item_error": {"error": str},
            "error": {"error": str, "type": str, "fatal": True},
            "done": "",
        },
        bad=[
            *PACES,
            *(Bad(f"?total={value}", "total") for value in ("-1", "1000001", "x")),
            *(Bad(f"?at={value}", "at") for value in ("-1", "1000001", "x")),
        ],
    ),
    Stream(
        "GET /stream/timeout",
        "/stream/timeout?limit=0.01&interval=0.004",
        FLEETING,
        "message+ error",
        {"message": {"count": int}, "error": {"error": "Stream timeout exceeded", "timeout": float}},
        bad=[*PACES, *(Bad(f"?limit={value}", "limit") for value in ("-1", "3600.5", "nan", "x"))],
    ),
    Stream(
        "GET /countdown/{seconds}",
        "/countdown/3?interval=0",
        FLEETING,
        "countdown{3} complete",
        {"countdown": {"remaining": int}, "complete": {"message": "Countdown finished!"}},
        bad=[
            *PACES,
            *(Bad(f"/countdown/{value}", "seconds") for value in ("-1", "3601", "9" * 18)),
            Bad("/countdown/", status=404),
            *(Bad(f"/countdown/{value}", "seconds") for value in ("ten", "1.5", "1e3", "+1", "1%0A", "9" * 19)),
        ],
    ),
    Stream(
        "GET /process/stream",
        "/process/stream?interval=0",
        FLEETING,
        "progress{3} complete",
        {"progress": {"step": ("Analyzing", "Processing", "Finalizing")}, "complete": {"result": "Done!"}},
        bad=PACES,
    ),
]

TASKS: Final = [
    Stream(
        "POST /tasks/import",
        "/tasks/import",
        RUN,
        "item_error progress complete",
        {
            "item_error": {"line": 3, "error": TEXT},
            "progress": {"current": 3, "total": (int, None), "percent": (float, None)},
            "complete": {"status": "partial", "imported": 2, "failed": 1},
        },
        body="title,priority\nWrite,1\nRead,ten\nSing,\n",
        bad=[
            Bad(body=""),
            Bad(body="description\nA\n", field="title"),
            Bad(body="title,titel\nA,B\n", field="titel"),
            Bad(body="title,title\nA,B\n", field="title"),
            Bad(body="title;due\nA;\n", field="title;due"),
            Bad(body='"title\nA\n'),
        ],
    ),
    Stream(
        "GET /tasks/stream",
        "/tasks/stream?status=open&q=write&limit=1",
        FLEETING,
        "task done",
        {"task": TASK, "done": ""},
        bad=[
            *(Bad(f"?status={value}", "status") for value in ("closed", "", "OPEN", "null")),
            *(Bad(f"?limit={value}", "limit") for value in ("0", "-1", "1.5", "many", "")),
            *(Bad(f"?q={value}", "q") for value in ("", "%20", "*", "x" * 1001)),
        ],
    ),
    Answer(
        "GET /export.csv",
        "/export.csv?status=open",
        re.compile(r"(?s)id,title,description,status,priority,due,created\r\n.*\r\n"),
        media_type="text/csv; charset=utf-8",
        headers={"content-disposition": 'attachment; filename="tasks.csv"'},
        bad=[Bad("?status=closed", "status"), Bad("?status=", "status")],
    ),
    *(
        Stream("POST /tasks/execute/stream", "/tasks/execute/stream", RUN, *promised, body=body, bad=bad)
        for promised, body, bad in (
            (
                ANALYZED,
                {"task_id": 1, "operation": "analyze"},
                [
                    Bad(body={}, field="operation"),
                    Bad(body=[]),
                    Bad(body={"operation": "analyze"}, field="task_id"),
                    Bad(body={"task_id": 1}, field="operation"),
                    *(Bad(body={"task_id": 1, "operation": it}, field="operation") for it in ("", "drop", None, 1)),
                    *(
                        Bad(body={"task_id": id, "operation": "analyze"}, field="task_id")
                        for id in ("1", 1.5, None, True, 0, -1, 10**18)
                    ),
                    Bad(body={"task_id": 10**18 - 1, "operation": "analyze"}, status=404),
                ],
            ),
            (SUMMARIZED, {"task_id": 1, "operation": "summarize"}, []),
            (FINISHED, {"task_id": 2, "operation": "finish"}, []),
        )
    ),
    Stream(
        "POST /tasks/{task_id}/execute/stream",
        "/tasks/1/execute/stream?operation=analyze",
        RUN,
        *ANALYZED,
        bad=[
            *(
                Bad(f"/tasks/1/execute/stream{query}", "operation")
                for query in ("", *(f"?operation={it}" for it in ("", "drop", "Analyze", "analyze%00")))
            ),
            *(
                Bad(f"/tasks/{id}/execute/stream?operation=analyze", status=404)
                for id in ("0", "-1", "999999999999999999")
            ),
            *(
                Bad(f"/tasks/{id}/execute/stream?operation=analyze", "task_id")
                for id in ("9" * 19, "one", "1.5", "%00")
            ),
        ],
    ),
    Stream(
        "GET /tasks/{task_id}/progress/stream",
        "/tasks/{executed}/progress/stream",
        VIEW,
        "progress+ complete",
        {
            "progress": {"task_id": int, "step": str, "progress": int, "timestamp": TIME},
            "complete": {"task_id": int, "final_status": "completed"},
        },
        bad=[
            *(Bad(f"/tasks/{id}/progress/stream", status=404) for id in ("{unexecuted}", "999999999999999999", "0")),
            *(Bad(f"/tasks/{id}/progress/stream", "task_id") for id in ("one", "9" * 19)),
        ],
    ),
]

#: Longer than any question may be.
TOO_LONG: Final = "x" * 8001
QUERIES: Final = [Bad("?"), Bad("?query="), Bad(f"?query={TOO_LONG}"), Bad("?query=a&query=b")]
NOT_A_SESSION: Final = (5, "", "too-short", "x" * 129, "x" * 1000, "a" * 32 + "/", "a" * 32 + "\n")
ASKED: Final = "?query=How+many+tasks+are+open,+and+what+is+2+%2B+3%3F"
THOUGHT: Final = {"step": int, "total": int, "thought": TEXT}

AGENT: Final = [
    Stream(
        "GET /agent/stream",
        f"/agent/stream{ASKED}",
        RUN,
        "status thought{3,5} token+ complete",
        {"status": {"message": TEXT}, "thought": THOUGHT, "token": {"token": str}, "complete": {**DONE, "query": TEXT}},
        bad=[Bad(bad.target, "query") for bad in QUERIES],
    ),
    Stream(
        "GET /agent/think/stream",
        f"/agent/think/stream{ASKED}",
        RUN,
        "thought.initial thought.planning{2,4} status token+ complete",
        {
            "thought.initial": {"type": "initial", "message": TEXT},
            "thought.planning": {"type": "planning", "step": int, "total_steps": int, "message": TEXT},
            "status": {"message": TEXT},
            "token": {"token": str},
            "complete": {"message": TEXT, "thoughts_count": int, "response_length": int},
        },
        bad=[Bad(bad.target, "query") for bad in QUERIES],
    ),
    Stream(
        "POST /agent/process/stream",
        f"/agent/process/stream{ASKED}",
        RUN,
        "thinking.understanding thinking.planning (tool.calling tool.complete){2} token+ complete",
        {
            "thinking.understanding": {"step": "understanding", "message": TEXT},
            "thinking.planning": {"step": "planning", "message": TEXT, "plan": [TEXT]},
            "tool.calling": {"tool": TEXT, "status": "calling"},
            "tool.complete": {"tool": TEXT, "status": "complete", "result": dict},
            "token": {"token": str},
            "complete": {"message": TEXT, "tokens": int},
        },
        bad=[Bad(bad.target, "query") for bad in QUERIES],
    ),
    Stream(
        "POST /api/chat",
        "/api/chat",
        RUN,
        ".analyzing .planning .retrieving .synthesizing .chunk+ .result .done",
        {
            **{
                f".{status}": {"type": "status", "status": status}
                for status in ("analyzing", "planning", "retrieving", "synthesizing")
            },
            ".chunk": {"type": "chunk", "content": str},
            ".result": {"type": "result", "content": TEXT, "sources": [{"id": int, "title": TEXT}], "disclaimer": TEXT},
            ".done": "[DONE]",
        },
        body={"message": "Which tasks are open?"},
        bad=[
            *(Bad(body=body, field="message") for body in ({}, {"message": 5}, {"message": None}, {"message": ""})),
            Bad(body={"message": TOO_LONG}, field="message"),
            Bad(body=[]),
            Bad(body="Hello"),
            *(Bad(body={"message": "Hi", "session_id": id}, field="session_id") for id in NOT_A_SESSION),
        ],
    ),
]

CHAT: Final = [
    Stream(
        "GET /chat",
        "/chat?prompt=Hello+there",
        RUN,
        ".token{8} .done",
        {".token": {"content": TEXT}, ".done": "[DONE]"},
        bad=[Bad("?", "prompt"), Bad("?prompt=", "prompt"), Bad(f"?prompt={TOO_LONG}", "prompt")],
    ),
    Stream(
        "POST /chat/stream",
        "/chat/stream",
        RUN,
        "token{8} done",
        {"token": TEXT, "done": ""},
        body=[{"role": "system", "content": "Be short"}, USER],
        bad=[
            Bad(body=[]),
            Bad(body=USER),
            Bad(body=None),
            Bad(body=[{**USER, "role": "robot"}], field="[0].role"),
            Bad(body=[USER, {**USER, "content": 5}], field="[1].content"),
            Bad(body=[{"role": "user"}], field="[0].content"),
            Bad(body=[{"content": "x"}], field="[0].role"),
            Bad(body=[{"role": "system", "content": "x"}], field="role"),
            Bad(body=[{**USER, "content": "x" * 100_001}], field="[0].content"),
            Bad(body=101 * [USER]),
            # Where nobody looks at it, too.
            Bad(body=b'[{"x": ' + b"[" * 100_000, headers={"content-type": "application/json"}),
            Bad(body=b'[{"role": "user", "content": "\\ud800"}]', headers={"content-type": "application/json"}),
        ],
    ),
]

#: Of the two tools that the question needs, and what is said before and behind them.
ASKED_TEXT: Final = "Which tasks are open, and what is 2 + 3?"
THREAD: Final = "t" * 22
#: An id of a part: the run's, and a number.
PART: Final = re.compile(r"[\w-]{22}-\d+")
#: Neither a list nor a text that says anything.
NO_MESSAGES: Final[list[Any]] = [[], 5, None]
TOOL: Final = ("calculate", "search_tasks")
STAGE: Final = {"stage": ("analyzing", "planning", "retrieving", "synthesizing"), "message": TEXT}

#: Vercel's AI SDK: its chunks, by their `type`.
CHUNKS: Final[dict[str, dict[str, Any]]] = {
    ".start": {"messageId": re.compile(r"msg_[\w-]{22}")},
    ".start-step": {},
    ".data-status": {"data": STAGE, "transient": True},
    ".reasoning-start": {"id": PART},
    ".reasoning-delta": {"id": PART, "delta": str},
    ".reasoning-end": {"id": PART},
    ".tool-input-start": {"toolCallId": PART, "toolName": TOOL},
    ".tool-input-available": {"toolCallId": PART, "toolName": TOOL, "input": dict},
    ".tool-output-available": {"toolCallId": PART, "output": dict},
    ".text-start": {"id": PART},
    ".text-delta": {"id": PART, "delta": str},
    ".text-end": {"id": PART},
    ".source-document": {"sourceId": re.compile(r"\d+"), "title": TEXT, "mediaType": "application/json"},
    ".finish-step": {},
    ".finish": {"finishReason": "stop", "messageMetadata": {"disclaimer": TEXT}},
}
UI_MESSAGE: Final = (
    ".start .start-step (.data-status|.reasoning-start .reasoning-delta+ .reasoning-end)+"
    " (.tool-input-start .tool-input-available .tool-output-available){2}"
    " (.data-status|.reasoning-start .reasoning-delta+ .reasoning-end)+"
    " .text-start .text-delta+ .text-end .source-document+ .finish-step .finish .done",
    {name: {"type": name[1:], **shape} for name, shape in CHUNKS.items()} | {".done": "[DONE]"},
)
UI_HEADERS: Final = {"x-vercel-ai-ui-message-stream": "v1", "x-workflow-run-id": ID}
UI_USER: Final = {"role": "user", "parts": [{"type": "text", "text": ASKED_TEXT}]}

AI_SDK: Final = [
    Stream(
        "POST /ai/chat",
        "/ai/chat",
        RUN,
        *UI_MESSAGE,
        headers=UI_HEADERS,
        body={"messages": [UI_USER], "trigger": "submit-message"},
        bad=[
            Bad(body=[]),
            Bad(body={}, field="messages"),
            *(Bad(body={"messages": it}, field="messages") for it in NO_MESSAGES),
            Bad(body={"messages": [{"parts": []}]}, field="messages[0].role"),
            # Nobody asks anything, or too much.
            Bad(body={"messages": [{**UI_USER, "role": "assistant"}]}, field="messages"),
            Bad(body={"messages": [{**UI_USER, "parts": [{"type": "text", "text": TOO_LONG}]}]}, field="messages"),
            Bad(body={"messages": 1001 * [UI_USER]}, field="messages"),
            *(Bad(body={"messages": [UI_USER], "id": id}, field="id") for id in (5, "", "x" * 256)),
        ],
    ),
    *(
        Stream("GET /ai/chat/{id}/stream", target, VIEW, grammar, UI_MESSAGE[1], headers=headers, bad=bad)
        for target, grammar, headers, bad in (
            (
                "/ai/chat/{answer_run}/stream",
                UI_MESSAGE[0],
                UI_HEADERS,
                [
                    *(Bad(f"?startIndex={value}", "startIndex") for value in ("x", "", "1.5", "9" * 20)),
                    # Where nobody has a name, a chat's must be no guess.
                    *(Bad(f"/ai/chat/{id}/stream", "id") for id in ("short", "%00")),
                ],
            ),
            (
                "/ai/chat/{answer_run}/stream?startIndex=-2",
                ".finish-step .finish .done",
                UI_HEADERS | {"x-workflow-stream-tail-index": re.compile(r"\d+")},
                [],
            ),
        )
    ),
    # The chat's answer is over, and nothing is there to be stopped.
    Answer(
        "POST /ai/chat/{id}/stop",
        "/ai/chat/{chat}/stop",
        "",
        204,
        media_type=None,
        bad=[Bad(f"/ai/chat/{id}/stop", "id") for id in ("short", "%00")],
    ),
]

#: AG-UI's, by their `type`.
AG_UI_EVENTS: Final[dict[str, dict[str, Any]]] = {
    ".RUN_STARTED": {"threadId": str, "runId": str},
    ".CUSTOM": {"name": "status", "value": STAGE},
    ".REASONING_START": {"messageId": PART},
    ".REASONING_MESSAGE_START": {"messageId": PART, "role": "reasoning"},
    ".REASONING_MESSAGE_CONTENT": {"messageId": PART, "delta": TEXT},
    ".REASONING_MESSAGE_END": {"messageId": PART},
    ".REASONING_END": {"messageId": PART},
    ".TOOL_CALL_START": {"toolCallId": PART, "toolCallName": TOOL},
    ".TOOL_CALL_ARGS": {"toolCallId": PART, "delta": TEXT},
    ".TOOL_CALL_END": {"toolCallId": PART},
    ".TOOL_CALL_RESULT": {"messageId": TEXT, "toolCallId": PART, "content": TEXT},
    ".TEXT_MESSAGE_START": {"messageId": PART, "role": "assistant"},
    ".TEXT_MESSAGE_CONTENT": {"messageId": PART, "delta": TEXT},
    ".TEXT_MESSAGE_END": {"messageId": PART},
    ".RUN_FINISHED": {
        "threadId": str,
        "runId": str,
        "result": {"sources": [{"id": int, "title": TEXT}], "disclaimer": TEXT},
        "outcome": {"type": "success"},
    },
}
REASONING: Final = (
    ".REASONING_START .REASONING_MESSAGE_START .REASONING_MESSAGE_CONTENT+ .REASONING_MESSAGE_END .REASONING_END"
)
AG_UI_RUN: Final = (
    f".RUN_STARTED (.CUSTOM|{REASONING})+"
    " (.TOOL_CALL_START .TOOL_CALL_ARGS .TOOL_CALL_END .TOOL_CALL_RESULT){2}"
    f" (.CUSTOM|{REASONING})+ .TEXT_MESSAGE_START .TEXT_MESSAGE_CONTENT+ .TEXT_MESSAGE_END .RUN_FINISHED",
    {name: {"type": name[1:], **shape} for name, shape in AG_UI_EVENTS.items()},
)
#: The run's name is too short to be its key: so the header's counts.
AG_UI_INPUT: Final = {
    "threadId": "short",
    "runId": "short",
    "messages": [{"id": "1", "role": "user", "content": ASKED_TEXT}],
    "state": {},
    "tools": [],
    "context": [],
}

AG_UI: Final = [
    Stream(
        "POST /ag-ui",
        "/ag-ui",
        RUN,
        *AG_UI_RUN,
        body=AG_UI_INPUT,
        bad=[
            Bad(body=[]),
            *(Bad(body={**AG_UI_INPUT, "messages": it}, field="messages") for it in NO_MESSAGES),
            Bad(body={**AG_UI_INPUT, "messages": [{"role": "user", "content": TOO_LONG}]}, field="messages"),
            Bad(body={**AG_UI_INPUT, "messages": [{"content": "x"}]}, field="messages[0].role"),
            Bad(body={**AG_UI_INPUT, "messages": 1001 * [USER]}, field="messages"),
            *(
                Bad(body={**AG_UI_INPUT, name: value}, field=name)
                for name in ("threadId", "runId")
                for value in ("", "x" * 256, 5, None)
            ),
        ],
    ),
    Stream(
        "GET /ag-ui",
        "/ag-ui?offset=-1&runId={named_run}",
        VIEW,
        *AG_UI_RUN,
        bad=[
            Bad("?", "threadId"),
            Bad(f"?runId={UNKNOWN}&offset=5", "offset"),
            Bad(f"?runId={UNKNOWN}", status=404),
            # Where nobody has a name, a run's and a thread's must be no guess.
            *(Bad(f"?runId={id}", "runId") for id in ("", "x" * 21, "x" * 256)),
            *(Bad(f"?threadId={id}", "threadId") for id in ("", "x" * 15, "x" * 256)),
        ],
    ),
    Answer(
        "GET /ag-ui",
        "/ag-ui?threadId={thread}&limit=20&before=x",
        {
            "messages": [
                {"id": TEXT, "role": ("user", "assistant"), "parts": [{"type": "text", "content": TEXT}]},
            ],
            "activeRun": None,
        },
    ),
]

COMPLETION_ID: Final = re.compile(r"chatcmpl-[\w-]{22}")


def chunk(delta: Any, finish_reason: str | None = None) -> Any:
    """A chunk of a chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    head = {"id": COMPLETION_ID, "object": "chat.completion.chunk", "created": int, "model": "mock"}
    return {**head, "choices": [choice]}


RESPONSE_ID: Final = re.compile(r"resp_[\w-]{22}")
#: The id of an item: its kind, the run's, and a number.
ITEM_ID: Final = re.compile(r"(rs|msg|mcp)_[\w-]{22}(-\d+)?")
OUTPUT_TEXT: Final = {"type": "output_text", "text": str, "annotations": [], "logprobs": []}
SUMMARY_TEXT: Final = {"type": "summary_text", "text": str}
ITEM: Final = (
    {"id": ITEM_ID, "type": "reasoning", "summary": [SUMMARY_TEXT]},
    {
        "id": ITEM_ID,
        "type": "message",
        "role": "assistant",
        "status": ("in_progress", "completed"),
        "content": [OUTPUT_TEXT],
    },
    {
        "id": ITEM_ID,
        "type": "mcp_call",
        "server_label": "tasks",
        "name": TOOL,
        "arguments": str,
        "status": ("in_progress", "completed"),
        "output?": TEXT,
        "error?": None,
    },
)
RESPONSE: Final = {
    "object": "response",
    "id": RESPONSE_ID,
    "status": "completed",
    "created_at": int,
    "model": ("mock", "agent"),
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "metadata": dict,
    "background": bool,
    "parallel_tool_calls": True,
    "temperature": (float, None),
    "top_p": (float, None),
    "tool_choice": "auto",
    "tools": [],
    "usage": None,
    "output": [ITEM],
}
PLACE: Final = {"item_id": ITEM_ID, "output_index": int}
CONTENT: Final = {**PLACE, "content_index": 0}
SUMMARY: Final = {**PLACE, "summary_index": 0}
RESPONSE_EVENTS: Final[dict[str, dict[str, Any]]] = {
    "response.created": {"response": RESPONSE | {"status": "in_progress", "output": []}},
    "response.in_progress": {"response": RESPONSE | {"status": "in_progress", "output": []}},
    "response.output_item.added": {"output_index": int, "item": ITEM},
    "response.output_item.done": {"output_index": int, "item": ITEM},
    "response.reasoning_summary_part.added": {**SUMMARY, "part": SUMMARY_TEXT},
    "response.reasoning_summary_text.delta": {**SUMMARY, "delta": str},
    "response.reasoning_summary_text.done": {**SUMMARY, "text": str},
    "response.reasoning_summary_part.done": {**SUMMARY, "part": SUMMARY_TEXT},
    "response.mcp_call.in_progress": PLACE,
    "response.mcp_call_arguments.delta": {**PLACE, "delta": TEXT},
    "response.mcp_call_arguments.done": {**PLACE, "arguments": TEXT},
    "response.mcp_call.completed": PLACE,
    "response.content_part.added": {**CONTENT, "part": OUTPUT_TEXT},
    "response.output_text.delta": {**CONTENT, "delta": str, "logprobs": []},
    "response.output_text.done": {**CONTENT, "text": str, "logprobs": []},
    "response.content_part.done": {**CONTENT, "part": OUTPUT_TEXT},
    "response.completed": {"response": RESPONSE},
}
SUMMARIZED_REASONING: Final = (
    "(response.output_item.added response.reasoning_summary_part.added response.reasoning_summary_text.delta+"
    " response.reasoning_summary_text.done response.reasoning_summary_part.done response.output_item.done)"
)
MESSAGE: Final = (
    "response.output_item.added response.content_part.added response.output_text.delta+ response.output_text.done"
    " response.content_part.done response.output_item.done"
)
AGENT_RESPONSE: Final = (
    f"response.created response.in_progress {SUMMARIZED_REASONING}+"
    " (response.output_item.added response.mcp_call.in_progress response.mcp_call_arguments.delta"
    " response.mcp_call_arguments.done response.mcp_call.completed response.output_item.done){2}"
    f" {SUMMARIZED_REASONING}+ {MESSAGE} response.completed",
    {name: {"type": name, "sequence_number": int, **shape} for name, shape in RESPONSE_EVENTS.items()},
)
NO_MODEL: Final = [
    Bad(
        body={"messages": [USER], "input": "Hello", "model": name, "stream": stream},
        field="model",
        status=404,
        code="model_not_found",
    )
    for name in ("gpt", "Agent")
    for stream in (True, False)
]

OPENAI: Final = [
    Answer(
        "GET /v1/models",
        "/v1/models",
        {
            "object": "list",
            "data": [{"id": ("mock", "agent"), "object": "model", "created": 0, "owned_by": "sseapp"}],
        },
        openai=True,
    ),
    Stream(
        "POST /v1/chat/completions",
        "/v1/chat/completions",
        RUN,
        ".first .token{8} .last .done",
        {
            ".first": chunk({"role": "assistant", "content": ""}),
            ".token": chunk({"content": TEXT}),
            ".last": chunk({}, "stop"),
            ".done": "[DONE]",
        },
        body={"messages": [USER], "stream": True, "temperature": 1},
        openai=True,
        bad=[
            Bad(body=[]),
            Bad(body={}, field="messages"),
            *(Bad(body={"messages": it}, field="messages") for it in [*NO_MESSAGES, "Hello"]),
            Bad(body={"messages": ["Hello"]}, field="messages[0]"),
            Bad(body={"messages": 1001 * [USER]}, field="messages"),
            *(
                Bad(body={"messages": messages, "stream": stream}, field="messages")
                for messages in ([{"role": "system", "content": "Be short"}], [{**USER, "content": TOO_LONG}])
                for stream in (True, False)
            ),
            Bad(body={"messages": [USER], "stream": "yes"}, field="stream"),
            *(Bad(body={"messages": [USER], "model": it}, field="model") for it in (5, "x" * 201)),
            *NO_MODEL,
        ],
    ),
    Answer(
        "POST /v1/chat/completions",
        "/v1/chat/completions",
        {
            "id": COMPLETION_ID,
            "object": "chat.completion",
            "created": int,
            "model": "agent",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": TEXT, "reasoning_content": TEXT},
                    "finish_reason": "stop",
                }
            ],
        },
        body={"messages": [{"role": "user", "content": ASKED_TEXT}], "model": "agent"},
        openai=True,
    ),
    Stream(
        "POST /v1/responses",
        "/v1/responses",
        RUN,
        *AGENT_RESPONSE,
        body={"input": ASKED_TEXT, "model": "agent", "stream": True},
        openai=True,
        bad=[
            Bad(body=[]),
            Bad(body={}, field="input"),
            *(Bad(body={"input": it}, field="input") for it in NO_MESSAGES),
            Bad(body={"input": ["Hello"]}, field="input[0]"),
            Bad(body={"input": 1001 * [USER]}, field="input"),
            *(
                Bad(body={"input": input, "stream": stream}, field="input")
                for input in ("", TOO_LONG, [{"role": "assistant", "content": "x"}], [{**USER, "type": "image"}])
                for stream in (True, False)
            ),
            Bad(body={"input": "x", "tools": 5}, field="tools"),
            Bad(body={"input": "x", "tools": [{"type": "web_search"}]}, field="tools"),
            Bad(body={"input": "x", "tools": 129 * [{"type": "function"}]}, field="tools"),
            *(
                Bad(body={"input": "x", name: "resp_x"}, field=name, code="unsupported")
                for name in ("previous_response_id", "conversation")
            ),
            Bad(body={"input": "x", "metadata": dict.fromkeys(map(str, range(17)), "x")}, field="metadata"),
            *NO_MODEL,
        ],
    ),
    *(
        Answer("POST /v1/responses", "/v1/responses", shape, body={"input": "Hello", **more}, openai=True)
        for more, shape in (
            ({}, RESPONSE),
            ({"background": True}, RESPONSE | {"status": "queued", "output": []}),
        )
    ),
    Stream(
        "GET /v1/responses/{id}",
        "/v1/responses/{response}?stream=true",
        VIEW,
        f"response.created response.in_progress {MESSAGE} response.completed",
        AGENT_RESPONSE[1],
        openai=True,
        bad=[
            *(
                Bad(f"/v1/responses/{id}{query}", status=404)
                for id in ("x", f"resp_{UNKNOWN}", "resp_{run}", "%00", "x" * 5000)
                for query in ("", "?stream=true")
            ),
            *(Bad(f"?starting_after={value}", "starting_after") for value in ("-1", "x", "", "1.5", "9" * 20)),
            *(Bad(f"?stream={value}", "stream") for value in ("x", "", "2")),
        ],
    ),
    Stream(
        "GET /v1/responses/{id}",
        "/v1/responses/{response}?stream=true&starting_after=2",
        VIEW,
        MESSAGE.removeprefix("response.output_item.added ") + " response.completed",
        AGENT_RESPONSE[1],
        openai=True,
    ),
    *(
        Answer("GET /v1/responses/{id}", f"/v1/responses/{{response}}{query}", RESPONSE, openai=True)
        # As OpenAI's SDKs ask.
        for query in ("", "?include%5B%5D=reasoning.encrypted_content&include%5B%5D=x&include_obfuscation=false")
    ),
    # It is over: nothing is there to be cancelled, and it stays as it is.
    Answer(
        "POST /v1/responses/{id}/cancel",
        "/v1/responses/{response}/cancel",
        RESPONSE,
        openai=True,
        bad=[
            Bad(f"/v1/responses/{id}/cancel", status=404)
            for id in ("x", f"resp_{UNKNOWN}", "resp_{run}", "%00", "x" * 5000)
        ],
    ),
]

NOT_STEPS: Final = (-1, 0, 1001, 10**9, 1.5, "1", "x")
NOT_AN_INTERVAL: Final = (-1, 60.1, 1e9, "1", "x")
NOT_AN_INPUT: Final[list[object]] = [5, 0, "x", None, []]
JOBS_BODIES: Final[list[Mapping[str, Any]]] = [
    {"kind": "sleep", "input": {"steps": 2, "interval": 0}},
    {"kind": "digest"},
    {"kind": "report"},
]

JOBS: Final = [
    *(
        Answer(
            "POST /jobs",
            "/jobs",
            {"job_id": ID},
            202,
            headers={"location": re.compile(r"jobs/[\w-]{22}/progress")},
            body=body,
            bad=[
                Bad(body=[]),
                Bad(body="digest"),
                Bad(body={}, field="kind"),
                Bad(body={"input": {}}, field="kind"),
                Bad(body={**body, "inputs": {}}, field="inputs"),
                *(Bad(body={**body, "kind": kind}, field="kind") for kind in ("", "dig", 1, None)),
                *(Bad(body={**body, "input": it}, field="input") for it in NOT_AN_INPUT),
                *(Bad(body={**body, "input": {name: "/etc"}}, field=f"input.{name}") for name in ("folder", "pause")),
            ],
        )
        for body in JOBS_BODIES
    ),
    Answer(
        "POST /jobs",
        "/jobs",
        {"job_id": ID},
        202,
        body={"kind": "sleep", "input": {"steps": 1, "interval": 0}},
        bad=[
            *(Bad(body={"kind": "sleep", "input": {"steps": it}}, field="input.steps") for it in NOT_STEPS),
            *(Bad(body={"kind": "sleep", "input": {"interval": it}}, field="input.interval") for it in NOT_AN_INTERVAL),
            # Each is allowed, but not for so long.
            Bad(body={"kind": "sleep", "input": {"steps": 1000, "interval": 0.61}}, field="input"),
            Bad(body={"kind": "sleep", "input": {"steps": 11, "interval": 60}}, field="input"),
        ],
    ),
    Stream(
        "GET /jobs/{job_id}/progress",
        "/jobs/{job}/progress",
        VIEW,
        ".pending? .running* .completed .done",
        {
            f".{status}": {"status": status, "progress": int, "message": str}
            for status in ("pending", "running", "completed")
        }
        | {".done": "[DONE]"},
        # A run that is no job isn't there either.
        bad=[Bad(f"/jobs/{id}/progress", status=404) for id in ("x", UNKNOWN, "{run}", "%00", "x" * 5000)],
    ),
    Stream(
        "GET /api/process/stream",
        "/api/process/stream",
        RUN,
        "(progress|log)* progress (progress|log)* result",
        {
            "progress": {"current_step": int, "total_steps": int, "step_name": TEXT, "percent": float},
            "log": {"timestamp": TIME, "level": TEXT, "message": TEXT, "details": dict},
            "result": {"success": True, "data": dict},
        },
    ),
    Stream(
        "POST /process",
        "/process",
        RUN,
        "progress item_error progress complete",
        {
            "progress": {"current": int, "total": 3, "percent": float, "item": {"sha256": SHA256, "length": int}},
            "item_error": {"index": 1, "error": TEXT},
            "complete": {"status": "partial", "processed": 2, "failed": 1},
        },
        body=["one", 2, "three"],
        bad=[Bad(body={}), Bad(body="one"), Bad(body=None), Bad(body=[0] * (MAX_ITEMS + 1))],
    ),
]

NOTIFICATIONS: Final = [
    Stream(
        "GET /users/{user_id}/stream",
        "/users/ada/stream",
        TOPIC,
        "init notification message",  # and the heartbeat, which takes 5 s: see test_notifications
        {"init": {"status": "connected"}, "notification": {"text": "Hello"}, "message": [int]},
        publish=[("/users/ada/notifications", {"text": "Hello"}), ("/users/ada/messages", [1, 2])],
        bad=[Bad(f"/users/{name}/stream", "name") for name in NOT_A_NAME],
    ),
    Answer(
        "POST /users/{user_id}/notifications",
        "/users/bob/notifications",
        {"id": CURSOR},
        202,
        body={"text": "Hello"},
        bad=[Bad(f"/users/{name}/notifications", "name") for name in NOT_A_NAME],
    ),
    Answer(
        "POST /users/{user_id}/messages",
        "/users/bob/messages",
        {"id": CURSOR},
        202,
        body="Hello",
        bad=[Bad(f"/users/{name}/messages", "name") for name in NOT_A_NAME],
    ),
    Stream(
        "GET /topics/{name}",
        "/topics/news",
        TOPIC,
        "init message headline",
        {"init": {"topic": "news"}, "message": None, "headline": {"text": str}},
        publish=[("/topics/news", None), ("/topics/news?event=headline", {"text": "It works"})],
        bad=[Bad(f"/topics/{name}", "name") for name in NOT_A_NAME],
    ),
    Answer(
        "POST /topics/{name}",
        "/topics/quiet?event=note",
        {"id": CURSOR, "subscribers": 0},
        202,
        body=None,
        bad=[
            *(Bad(f"/topics/{name}", "name") for name in NOT_A_NAME),
            *(Bad(f"?event={value}", "event") for value in ("", "a%0Ab", "a%0D", "a%00b", "x" * 101)),
        ],
    ),
]

FILES: Final = [
    Answer(
        "GET /download/{filename}",
        "/download/{file}",
        "Hello!\n",
        media_type="text/plain",
        headers={
            "accept-ranges": "bytes",
            "content-disposition": 'attachment; filename="hello.txt"',
            "content-length": "7",
            "etag": TEXT,
            "last-modified": TEXT,
        },
        bad=[
            *(
                Bad(f"/download/{name}", status=404)
                for name in ("none.txt", "..%2Ftasks.db", "%2Fetc%2Fpasswd", "%00", "x" * 5000, "%FF", "", "a/b")
            ),
            Bad(headers={"range": "bytes=7-"}, status=416),
        ],
    ),
]

OPS: Final = [
    Answer("GET /session", "/session", {"caller": None, "expires": None}),
    Answer("GET /healthz", "/healthz", {"status": "ok"}),
    Answer("GET /readyz", "/readyz", {"status": "ready"}),
    Answer("GET /metrics", "/metrics", TEXT, media_type="text/plain; version=1.0.0; charset=utf-8"),
]

RUNS: Final = [
    Answer(
        "GET /runs",
        "/runs",
        {"runs": [RUN_STATE]},
        bad=[
            *(Bad(f"?state={value}", "state") for value in ("", "over", "Running")),
            # Where nobody has a name, a thread must be no guess.
            *(Bad(f"?thread={value}", "thread") for value in ("", "x" * 15, "x" * 256)),
        ],
    ),
    Answer(
        "GET /runs",
        "/runs?thread={chat}&state=completed",
        {"runs": [RUN_STATE | {"route": "POST /ai/chat", "state": "completed", "thread": str}]},
    ),
    Answer(
        "GET /runs/{id}",
        "/runs/{run}",
        RUN_STATE | {"route": "GET /chat", "state": "completed"},
        bad=[Bad(f"/runs/{id}", status=404) for id in ("x", UNKNOWN, "%00", "x" * 5000, "{run}.1")],
    ),
    Answer(
        "DELETE /runs/{id}",
        "/runs/{new_run}",
        "",
        204,
        media_type=None,
        bad=[Bad(f"/runs/{id}", status=404) for id in ("x", UNKNOWN, "%00")],
    ),
    Stream(
        "GET /runs/{id}/events",
        "/runs/{run}/events",
        VIEW,
        ".token+ .done",
        {".token": {"content": TEXT}, ".done": "[DONE]"},
        bad=[Bad(f"/runs/{id}/events", status=404) for id in ("x", UNKNOWN, "%00", "x" * 5000)],
    ),
]

PAGE: Final = [
    Answer("GET /", "/", re.compile(r"(?is)<!doctype html>.*"), media_type="text/html; charset=utf-8"),
    Answer(
        "GET /static/{name}",
        "/static/{script}",
        TEXT,
        media_type="text/javascript; charset=utf-8",
        bad=[Bad(f"/static/{name}", status=404) for name in ("none.js", "..%2F__init__.py", "%00")],
    ),
    Answer("GET /docs", "/docs", re.compile(r"(?is)<!doctype html>.*"), media_type="text/html; charset=utf-8"),
    Answer(
        "GET /docs/{name}",
        "/docs/routes.md",
        TEXT,
        media_type="text/plain; charset=utf-8",
        bad=[Bad(f"/docs/{name}", status=404) for name in ("none.md", "page.png", "..%2FREADME.md", "%00")],
    ),
]

FRONT_ENDS: Final = [*AI_SDK, *AG_UI, *OPENAI]

TABLE: Final[list[Entry]] = [
    *BASICS,
    *TASKS,
    *AGENT,
    *CHAT,
    *FRONT_ENDS,
    *JOBS,
    *NOTIFICATIONS,
    *FILES,
    *OPS,
    *RUNS,
    *PAGE,
]


# The two tables


def untyped(route: Route) -> str:
    return f"{route.method} {re.sub(':[a-z]+}', '}', route.path)}"


SERVED: Final = {untyped(route): route for route in (*ROUTES, *RUN_ROUTES)}
STREAMS: Final = [entry for entry in TABLE if isinstance(entry, Stream)]
ANSWERS: Final = [entry for entry in TABLE if isinstance(entry, Answer)]


def kind_of(entry: Entry) -> str | None:
    """Of a whole answer, whether it has begun a run."""
    if isinstance(entry, Stream):
        return entry.kind
    return RUN if SERVED[entry.route].run is not None else None


#: One entry for each route.
EACH: Final = list({entry.route: entry for entry in reversed(TABLE)}.values())[::-1]


@pytest.mark.parametrize("route", SERVED)
def test_a_route_has_a_contract(route: str) -> None:
    assert route in {entry.route for entry in TABLE}


@pytest.mark.parametrize("route", sorted({entry.route for entry in TABLE}))
def test_a_contract_has_a_route(route: str) -> None:
    assert route in SERVED


# The server


class World:
    """A server, and what is there on it for a target to name."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self._answers: dict[int, httpx.Response] = {}
        self.import_tasks()
        self.file = "hello.txt"
        (folder / "files").mkdir(exist_ok=True)
        (folder / "files" / self.file).write_text("Hello!\n")

    def __getitem__(self, name: str) -> str:
        return str(getattr(self, name))

    def import_tasks(self) -> None:
        response = self.server.client.post("/tasks/import", content=CSV, headers={"content-type": "text/csv"})
        assert b'"imported":2' in response.content

    @cached_property
    def run(self) -> str:
        return self.new_run

    @cached_property
    def another_run(self) -> str:
        return self.new_run

    @property
    def new_run(self) -> str:
        """A run that is over."""
        return self.server.client.get("/chat?prompt=x").headers["run-id"]

    @cached_property
    def chat(self) -> str:
        """A chat whose answer is over."""
        self._begin("/ai/chat", {"id": "c" * 22, "messages": [UI_USER]})
        return "c" * 22

    @cached_property
    def answer_run(self) -> str:
        return self._begin("/ai/chat", {"messages": [UI_USER]})

    @cached_property
    def named_run(self) -> str:
        """A run by its client's name."""
        self._begin("/ag-ui", {**AG_UI_INPUT, "threadId": THREAD, "runId": "r" * 22})
        return "r" * 22

    @cached_property
    def thread(self) -> str:
        """A thread in which something was said."""
        assert self.named_run
        return THREAD

    @cached_property
    def response(self) -> str:
        return f"resp_{self._begin('/v1/responses', {'input': 'Hello there'})}"

    def _begin(self, path: str, body: Any) -> str:
        response = self.server.client.post(path, json=body)
        assert response.is_success, response.text
        return response.headers["run-id"]

    @cached_property
    def job(self) -> str:
        answer = self.server.client.post("/jobs", json={"kind": "sleep", "input": {"steps": 2, "interval": 0}}).json()
        assert self.server.client.get(f"/jobs/{answer['job_id']}/progress").is_success  # to its end
        return str(answer["job_id"])

    @cached_property
    def executed(self) -> int:
        """A task that was worked on."""
        assert self.server.client.post("/tasks/1/execute/stream?operation=analyze").is_success
        return 1

    @cached_property
    def unexecuted(self) -> int:
        """A task that wasn't."""
        self.import_tasks()
        last = Decoder().feed(self.server.client.get("/tasks/stream").content)[-2]
        return int(orjson.loads(last.data)["id"])

    @cached_property
    def script(self) -> str:
        page = self.server.client.get("/").text
        match = re.search(r"/?static/([\w.-]+\.js)", page)
        assert match
        return match[1]

    def ask(
        self, method: str, target: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """`body` as in an entry; bytes are sent as they are, without a media type."""
        named = {name: value.format_map(self) for name, value in (headers or {}).items()}
        content = None
        if isinstance(body, bytes):
            content = body
        elif method == "POST":
            csv = target.startswith("/tasks/import")
            content = body.encode() if csv else orjson.dumps(body)
            named = {"content-type": "text/csv" if csv else "application/json"} | named
        return self.server.client.request(method, target.format_map(self), content=content, headers=named)

    def good(self, entry: Entry, headers: Mapping[str, str] | None = None, query: str = "") -> httpx.Response:
        target = entry.target + (("&" if "?" in entry.target else "?") + query if query else "")
        return self.ask(entry.method, target, entry.body, headers)

    def answer(self, entry: Entry) -> httpx.Response:
        """To the good request, asked once."""
        if id(entry) not in self._answers:
            self._answers[id(entry)] = (
                self._of_topic(entry) if isinstance(entry, Stream) and entry.kind == TOPIC else self.good(entry)
            )
        return self._answers[id(entry)]

    def _of_topic(self, stream: Stream, last_event_id: str = "") -> httpx.Response:
        """What a subscriber hears while the contract's events are published, or after its cursor; then it leaves."""
        headers = {"last-event-id": last_event_id} if last_event_id else {}
        body, decoder, events = b"", Decoder(), list[Event]()
        with self.server.client.stream("GET", stream.target, headers=headers) as response:
            waiting = [] if last_event_id else list(stream.publish)
            for chunk in response.iter_raw():
                body += chunk
                events += decoder.feed(chunk)
                if len(events) == len(stream.publish) + (not last_event_id):
                    break
                while events and waiting:
                    assert self.ask("POST", *waiting.pop(0)).status_code == 202
        answer = httpx.Response(response.status_code, headers=response.headers, content=body)
        del answer.headers["content-length"]  # httpx' own doing
        return answer

    def made(self) -> Any:
        """All that a request may leave behind: runs, topics, rows, files."""
        found: dict[str, Any] = {"runs": self.server.client.get("/runs").json()["runs"]}
        for path in self.folder.glob("*.db"):
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
                if path.name == "log.db":
                    found["streams"] = database.execute("SELECT name, last FROM streams").fetchall()
                else:
                    found |= {name: database.execute(f"SELECT count(*) FROM {name}").fetchone() for name in tables}
                    found["statuses"] = database.execute("SELECT id, status FROM tasks").fetchall()
        found["files"] = sorted(str(path) for path in self.folder.rglob("*"))
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("contract")
    with serve(folder, env={"SSEAPP_MOCK_DELAY_S": "0", "SSEAPP_MAX_IMPORT_BYTES": "100000"}) as server:
        yield World(server, folder)


def events_of(response: httpx.Response) -> list[Event]:
    assert response.status_code == 200, response.text
    # Without `retry`: each answer opens with one.
    return [Event(event.data, event.event, event.id) for event in Decoder().feed(response.content)]


def refused(response: httpx.Response, status: int, field: Any = None, *, code: str = "", openai: bool = False) -> None:
    """It is a problem of this status, which says whom it blames; OpenAI's error is another member of it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    detail = problem.pop("detail")
    if field is SAME:
        field = problem.get("field")
    code = code or CODES[status]
    wanted = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "code": code}
    if openai:
        kinds = {429: "rate_limit_error", 500: "server_error", 502: "server_error", 503: "server_error"}
        kind = kinds.get(status, "invalid_request_error")
        wanted["error"] = {"message": detail, "type": kind, "param": field, "code": code}
    assert problem == wanted | ({"field": field} if field is not None else {})
    assert detail and len(detail) < 500
    assert "Traceback" not in detail and "msgspec" not in detail


#: The word for each status.
CODES: Final = {kind.status: kind.code for kind in SSEAppError.__subclasses__() if kind.status < 500}

# What it answers


#: Besides what the server adds by itself.
STREAM_HEADERS: Final = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
SERVER_HEADERS: Final = {"date", "server", "transfer-encoding", "run-id", "content-location"}
#: Numbers that only go one way.
RISING: Final = ("count", "progress", "percent", "current", "current_step", "line", "index")


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_a_stream_has_the_events_of_its_contract(stream: Stream, world: World) -> None:
    events = events_of(world.answer(stream))
    labels = [label(event, stream) for event in events]
    assert matches(labels, stream.grammar), labels
    pictured = [(name, read(event.data, stream.events[name])) for name, event in zip(labels, events, strict=True)]
    for key in RISING:
        numbers = [
            data[key] for _, data in pictured if isinstance(data, dict) and isinstance(data.get(key), int | float)
        ]
        assert numbers == sorted(numbers)
    remaining = [data["remaining"] for _, data in pictured if isinstance(data, dict) and "remaining" in data]
    assert remaining == sorted(remaining, reverse=True)


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_a_stream_has_these_headers_and_opens_with_its_reconnection_time(stream: Stream, world: World) -> None:
    answer = world.answer(stream)
    heads = {name: value for name, value in answer.headers.items() if name not in SERVER_HEADERS}
    assert not list(misfits(heads, STREAM_HEADERS | dict(stream.headers), "headers"))
    assert ("run-id" in answer.headers) == (stream.kind in (RUN, VIEW))
    assert answer.content.startswith(b"retry: 2000\n")


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
def test_a_whole_answer_is_as_its_contract_says(answer: Answer, world: World) -> None:
    before = world.made()
    response = world.answer(answer)
    assert (response.status_code, response.headers.get("content-type")) == (answer.status, answer.media_type)
    body = response.json() if answer.media_type == "application/json" else response.text
    assert not list(misfits(body, answer.shape, "body"))
    heads = {name: response.headers.get(name) for name in answer.headers}
    assert not list(misfits(heads, dict(answer.headers), "headers"))
    if "location" in response.headers:  # what was begun comes to its end
        assert events_of(world.ask("GET", response.headers["location"]))
    elif answer.method == "GET":
        assert world.made() == before


# How it ends


@pytest.mark.parametrize("stream", [it for it in STREAMS if it.kind == FLEETING], ids=str)
def test_a_fleeting_stream_that_has_ended_has_ended_for_good(stream: Stream, world: World) -> None:
    ids = [event.id for event in events_of(world.answer(stream))]
    assert ids[-1] == "end" and "end" not in ids[:-1]
    for headers, query in (({"last-event-id": "end"}, ""), ({}, "last_event_id=end")):
        again = world.good(stream, headers, query)
        assert (again.status_code, again.content) == (204, b"")


@pytest.mark.parametrize("stream", [it for it in STREAMS if it.kind in (RUN, VIEW)], ids=str)
def test_a_run_can_be_read_on_after_each_of_its_events_and_not_after_its_end(stream: Stream, world: World) -> None:
    answer = world.answer(stream)
    events, run = events_of(answer), answer.headers["run-id"]
    ids = [event.id for event in events]
    numbers = [int(id.removeprefix(f"{run}.")) for id in ids if id]
    if stream.kind == RUN:
        assert numbers == list(range(1, len(events) + 1))
    else:  # which may leave some out
        assert len(numbers) == len(events) and all(left < right for left, right in pairwise([0, *numbers]))
    state = world.ask("GET", f"/runs/{run}").json()
    assert (state["state"], state["events"], state["last_event_id"]) == ("completed", numbers[-1], ids[-1])
    before = world.made()
    for number in {0, len(events) // 2, len(events) - 2}:
        rest = world.good(stream, {"last-event-id": ids[number] or ""})
        assert (rest.headers["run-id"], events_of(rest)) == (run, events[number + 1 :])
    ends = [
        world.good(stream, {"last-event-id": ids[-1] or ""}),
        world.good(stream, {"last-event-id": "end"}),
        world.good(stream, query=f"last_event_id={ids[-1]}"),
        world.ask("GET", f"/runs/{run}/events", headers={"last-event-id": ids[-1] or ""}),
    ]
    assert [(end.status_code, end.content) for end in ends] == [(204, b"")] * 4
    assert world.made() == before


@pytest.mark.parametrize("stream", [it for it in STREAMS if it.kind == TOPIC], ids=str)
def test_a_topic_goes_on_after_each_of_its_events(stream: Stream, world: World) -> None:
    events = events_of(world.answer(stream))
    epoch, _, first = (events[0].id or "").partition(".")
    assert [event.id for event in events] == [f"{epoch}.{int(first) + number}" for number in range(len(events))]
    assert events_of(world._of_topic(stream, events[0].id or "")) == events[1:]


@pytest.mark.parametrize("entry", [it for it in TABLE if kind_of(it) == RUN], ids=str)
def test_a_run_can_be_started_without_waiting_for_it_and_only_once(entry: Entry, world: World) -> None:
    headers = {"prefer": "respond-async", "idempotency-key": secrets.token_urlsafe(16)}
    begun = world.good(entry, headers)
    run = begun.headers["run-id"]
    assert (begun.status_code, begun.headers["preference-applied"]) == (202, "respond-async")
    location = begun.url.join(begun.headers["location"]).path
    if isinstance(entry, Stream):
        assert location == f"/runs/{run}/events"
        assert begun.json() == {"run": run, "events": begun.headers["location"]}
        # The run speaks as its route does, wherever it is read.
        assert matches([label(event, entry) for event in events_of(world.ask("GET", location))], entry.grammar)
    assert events_of(world.ask("GET", location))
    before = world.made()
    again = world.good(entry, headers)
    assert (again.status_code, again.headers["run-id"]) == (202, run)
    # An `EventSource` can say its key in the query alone; a POST can't.
    if entry.method == "GET":
        assert world.good(entry, query=f"key={headers['idempotency-key']}").headers["run-id"] == run
    if not entry.declares_query:
        target = f"{entry.target}?another=query"
    else:  # another word for the operation, or one letter more of what is asked
        target = entry.target.replace("=analyze", "=finish") if "=analyze" in entry.target else f"{entry.target}x"
    refused(world.ask(entry.method, target, entry.body, headers), 422, openai=entry.openai)
    assert world.made() == before


@pytest.mark.parametrize("entry", [it for it in EACH if it.method == "GET"], ids=str)
def test_head_has_the_headers_of_get_and_starts_nothing(entry: Entry, world: World) -> None:
    wanted = {name: value for name, value in world.answer(entry).headers.items() if name not in SERVER_HEADERS}
    before = world.made()
    head = world.ask("HEAD", entry.target)
    assert (head.status_code, head.content) == (200, b"")
    assert {name: value for name, value in head.headers.items() if name in wanted} == wanted or entry.route in (
        "GET /runs",
        "GET /metrics",
    )
    assert world.made() == before


# What it refuses


def all_refused(world: World, entry: Entry, bads: Iterable[Bad]) -> None:
    """Each with the problem that it should be, and nothing is left behind by any of them."""
    requests = []
    for bad in bads:
        target = entry.path + bad.target if bad.target.startswith("?") else bad.target or entry.target
        headers = {name: value.format_map(world) for name, value in bad.headers.items()}
        requests.append((target.format_map(world), entry.body if bad.body is SAME else bad.body, headers, bad))
    before = world.made()
    for target, body, headers, bad in requests:
        # As a browser's `EventSource` asks, too: what will not pass is refused to it all the same. But what is gone is
        # told it by a `gap`.
        for more in [{}, BROWSER] if entry.method == "GET" and bad.status != 410 else [{}]:
            try:
                answer = world.ask(entry.method, target, body, headers | more)
                refused(answer, bad.status, bad.field, code=bad.code, openai=entry.openai)
            except AssertionError as error:
                error.add_note(f"{entry.method} {target:.200}, {body!r:.200}, {headers}")
                raise
    assert world.made() == before


@pytest.mark.parametrize("entry", [it for it in TABLE if it.bad], ids=str)
def test_a_bad_request_is_refused_and_starts_nothing(entry: Entry, world: World) -> None:
    all_refused(world, entry, entry.bad)


#: Of each route that looks at its query; a stream looks for its cursor and its key.
BAD_QUERIES: Final = [
    ("x=1&y=2&x=3", "x"),
    ("last_event_id=a&last_event_id=a", "last_event_id"),
    ("x=%FF", None),
    ("%ED%A0%80=x", None),
    ("&".join(f"x{number}=" for number in range(MAX_QUERY_FIELDS + 1)), None),
]


@pytest.mark.parametrize("entry", [it for it in EACH if kind_of(it) or SERVED[it.route].query], ids=str)
def test_a_query_that_cannot_be_read_is_refused(entry: Entry, world: World) -> None:
    sign = "&" if "?" in entry.target else "?"
    all_refused(world, entry, [Bad(f"{entry.target}{sign}{query}", field) for query, field in BAD_QUERIES])


#: For any route that takes JSON.
BAD_JSON: Final = [
    b"",
    b" ",
    b"{",
    b"{]",
    b"nul",
    b"text",
    b"'a'",
    b"{a: 1}",
    b"[1,]",
    b"01",
    b"1 2",
    b"{}{}",
    b"\xff",
    b"{}\xef\xbb\xbf",
    "{}".encode("utf-16"),
    b"NaN",
    b"[-Infinity]",
    b"1e999",
    b"9" * 5000,
    b'"\\ud800"',
    b'"\n"',
    b'"\0"',
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b"[" * 100_000,
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize("entry", [it for it in EACH if SERVED[it.route].body is not None], ids=str)
def test_a_body_that_cannot_be_read_is_refused(entry: Entry, world: World) -> None:
    upload = isinstance(SERVED[entry.route].body, Upload)
    media_type, other = ("text/csv", "application/json") if upload else ("application/json", "text/csv")
    whole = entry.body.encode() if upload else orjson.dumps(entry.body)
    wrong_types: list[dict[str, str]] = [
        {},
        {"content-type": other},
        {"content-type": f"x{media_type}"},
        {"content-type": "multipart/form-data"},
    ]
    bads = [Bad(body=whole, status=415, headers=headers) for headers in wrong_types]
    bads.append(Bad(body=whole + b" " * 1024 * 1024, status=413, headers={"content-type": media_type}))
    if not upload:
        bads += [Bad(body=body, field=SAME, headers={"content-type": media_type}) for body in BAD_JSON]
    all_refused(world, entry, bads)


@pytest.mark.parametrize("entry", [it for it in EACH if kind_of(it) in (RUN, VIEW, TOPIC)], ids=str)
def test_a_cursor_or_a_key_that_is_none_is_refused(entry: Entry, world: World) -> None:
    kind = kind_of(entry)
    malformed = [
        "x",
        "1",
        UNKNOWN,
        f"{UNKNOWN}.",
        f"{UNKNOWN}.-1",
        f"{UNKNOWN}.01",
        f"{UNKNOWN}.{2**53}",
        f"x{UNKNOWN}.1",
    ]
    bads = [Bad(field="last_event_id", headers={"last-event-id": text}) for text in malformed]
    if kind in (RUN, VIEW):
        if not SERVED[entry.route].dialect.streams_gone:
            bads.append(Bad(status=410, headers={"last-event-id": f"{UNKNOWN}.1"}))
        # Another request's, and another run's.
        bads.append(Bad(field="last_event_id", status=409, headers={"last-event-id": "{another_run}.1"}))
    if kind == RUN:
        bads += [Bad(field="key", headers={"idempotency-key": key}) for key in ("x", "x" * 21, "x" * 256)]
    all_refused(world, entry, bads)


@pytest.mark.parametrize("path", sorted({route.partition(" ")[2] for route in SERVED}))
def test_another_method_is_refused_with_those_there_are(path: str, world: World) -> None:
    here = [entry for entry in TABLE if entry.route.partition(" ")[2] == path]
    methods = {entry.method for entry in here}
    methods |= {"HEAD"} if "GET" in methods else set()
    target = here[0].path.format_map(world)
    before = world.made()
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - methods:
        response = world.server.client.request(method, target)
        assert (response.status_code, response.headers["allow"]) == (405, ", ".join(sorted(methods)))
        if method != "HEAD":
            refused(response, 405)
    assert world.made() == before


@pytest.mark.parametrize("entry", EACH, ids=str)
def test_nothing_is_found_beside_a_path(entry: Entry, world: World) -> None:
    here = entry.path.rstrip("/")
    wrong = [f"{here}/{{run}}/", f"{here}%2F", f"{here}%00/x", "/x" * 30_000, *([f"{here}/"] if here else [])]
    # No route is there to say it in another way.
    all_refused(world, dataclasses.replace(entry, openai=False), [Bad(path, status=404) for path in wrong])


@pytest.mark.parametrize("entry", EACH, ids=str)
def test_a_name_in_the_query_that_means_nothing_is_refused_where_others_are_meant(entry: Entry, world: World) -> None:
    if entry.declares_query:
        refused(world.good(entry, query="unheard=of"), 400, "unheard", openai=entry.openai)
    elif entry.method == "GET":
        sign = "&" if "?" in entry.target else "?"
        assert world.ask("HEAD", f"{entry.target}{sign}unheard=of").status_code == 200
    elif not isinstance(entry, Stream):
        assert world.good(entry, query="unheard=of").status_code == world.answer(entry).status_code
    else:
        answer = world.good(entry, query="unheard=of")
        assert [label(event, entry) for event in events_of(answer)]


def test_nothing_of_this_was_an_error_to_the_server(world: World) -> None:
    log = world.server.log()
    assert "Traceback" not in log
    assert "ERROR" not in log
