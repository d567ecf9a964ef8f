"""Dialects: the form of the engine's own events in a stream (error, cancelled, gap, the last event).

Each route has a `Dialect`; `NAMED` is the default. The handler yields its own events. The engine asks the dialect for
the events that the handler can't yield, because it failed, was cancelled, or its process died.

A dialect of your own is a subclass, used as `GET(…, dialect=MyDialect())`:

    class Ticker(Dialect):
        name = "ticker"                                     # stored with each run: never change it

        def error(self, text, code, so_far):
            return [Event(f"E {code} {text}")]

        def cancelled(self, reason, so_far):
            return [Event("X")]

        def gap(self, gap):
            return Event(f"G {gap['from']}")

        def is_last(self, event):
            return event.data[:1] in ("E", "X", ".")
"""

import logging
import random
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from ssecore.errors import EncodeError, SSEAppError
from ssecore.wire import Event, encode

__all__ = [
    "AG_UI",
    "AI_SDK",
    "CURSOR_EVENT",
    "DATA_ONLY",
    "DIALECTS",
    "END_ID",
    "NAMED",
    "NOTHING",
    "OPENAI",
    "OPENAI_RESPONSES",
    "Dialect",
    "SoFar",
    "cancelled_frames",
    "error_frames",
    "failure_of",
    "log_failure",
    "public_text",
    "spread",
]

logger = logging.getLogger("sseapp")

#: In place of the blank line of a last event: a `Last-Event-ID` that is answered 204.
END_ID: Final = b"id: end\n\n"
#: Firefox and WebKit take an id only from an event that has data, so for them a block that sets the cursor is an event,
#: whose name has no listeners. Other clients get the bare id: some libraries hand over what the standard would drop.
CURSOR_EVENT: Final = b"event: cursor\ndata:\n"


@dataclass(frozen=True, slots=True)
class SoFar:
    """The state of a stream before the engine's events."""

    run: str = ""  #: the run's id; empty for a fleeting stream
    note: Mapping[str, Any] = field(default_factory=dict)  #: what the route stored with the run: see `routes.About`
    events: int = 0  #: the number of events in the run; 0 for a fleeting stream
    last: Event | None = None  #: the newest event, as a client decodes it


NOTHING: Final = SoFar()


class Dialect:
    """`NAMED`: the engine's events have a name, and JSON as their data."""

    #: Stored with each run, so that the engine can end the run in the same dialect after a restart.
    name: str = "named"
    #: In runs each `id:` stands before its `data:`. Only for clients that pair an id with the data behind it: see
    #: `log.framed` for what a cut does to others.
    id_first: bool = False
    #: The clients parse every event's data as JSON, so the engine sends no event with empty data.
    only_json: bool = False
    #: A client that resumes a run which is no longer kept gets `gone`, and not 410, even if it doesn't ask for an event
    #: stream.
    streams_gone: bool = False

    def headers(self, run: str) -> Mapping[str, str]:
        """Additional headers of an answer that streams the run."""
        return {}

    def error(self, text: str, code: str, so_far: SoFar) -> list[Event]:
        """The last events of a stream that failed. `text` is for people, `code` for programs."""
        return [Event({"error": text, "code": code}, "error")]

    def cancelled(self, reason: str, so_far: SoFar) -> list[Event]:
        """The last events of a cancelled stream. `reason`: `asked` (a client's request) or `linger` (no reader)."""
        return [Event({"reason": reason}, "cancelled")]

    def gap(self, gap: Mapping[str, Any]) -> Event:
        """Announces missing events: `{"reason", "from", "to"}`, with the first and the last missing sequence."""
        return Event(gap, "gap")

    def gone(self, gap: Mapping[str, Any]) -> list[Event]:
        """The last events of an answer that has lost the rest of its stream: a gap, and the end."""
        return [self.gap(gap)]

    def refusal(self, text: str, code: str, field: str | None) -> Mapping[str, Any]:
        """Additional members of the route's problem documents (RFC 9457)."""
        return {}

    def is_last(self, event: Event) -> bool:
        """Whether the stream is complete after this event. If a crash left it so, the engine adds no error.

        `result` doesn't count: handlers also yield it in the middle, and a complete run that is marked as interrupted
        is better than an incomplete one that is marked as complete.
        """
        return event.event in ("complete", "done", "error", "cancelled")


_DONE: Final = Event("[DONE]")


class DataOnly(Dialect):
    """No event has a name; the engine's are objects with a `type`. The last event is `[DONE]`."""

    name = "data_only"

    def error(self, text: str, code: str, so_far: SoFar) -> list[Event]:
        return [Event({"type": "error", "error": text, "code": code}), _DONE]

    def cancelled(self, reason: str, so_far: SoFar) -> list[Event]:
        return [Event({"type": "cancelled", "reason": reason}), _DONE]

    def gap(self, gap: Mapping[str, Any]) -> Event:
        return Event({"type": "gap", **gap})

    def gone(self, gap: Mapping[str, Any]) -> list[Event]:
        return [self.gap(gap), _DONE]

    def is_last(self, event: Event) -> bool:
        return bool(event.data == "[DONE]")


_GONE: Final = "this answer is no longer kept by the server"


class AISDK(DataOnly):
    """The UI message stream, version 1, of Vercel's AI SDK (npm `ai`).

    Each stream ends with `finish`: without it `WorkflowChatTransport` reconnects for ever.
    """

    name = "ai_sdk"
    only_json = True

    def headers(self, run: str) -> Mapping[str, str]:
        return {"x-vercel-ai-ui-message-stream": "v1", "x-workflow-run-id": run}

    def error(self, text: str, code: str, so_far: SoFar) -> list[Event]:
        finish = Event({"type": "finish", "finishReason": "error"})
        return [Event({"type": "error", "errorText": text}), finish, _DONE]

    def cancelled(self, reason: str, so_far: SoFar) -> list[Event]:
        finish = Event({"type": "finish", "finishReason": "other"})
        return [Event({"type": "abort", "reason": reason}), finish, _DONE]

    def gap(self, gap: Mapping[str, Any]) -> Event:
        return Event({"type": "data-gap", "data": gap, "transient": True})

    def gone(self, gap: Mapping[str, Any]) -> list[Event]:
        return [self.gap(gap), *self.error(_GONE, "gone", NOTHING)]


#: What has to be closed before an AG-UI run may finish, by the type of its newest event.
_CLOSE: Final[Mapping[str, Iterable[str]]] = {
    "TEXT_MESSAGE_START": ["TEXT_MESSAGE_END"],
    "TEXT_MESSAGE_CONTENT": ["TEXT_MESSAGE_END"],
    "TOOL_CALL_START": ["TOOL_CALL_END"],
    "TOOL_CALL_ARGS": ["TOOL_CALL_END"],
    "REASONING_START": ["REASONING_END"],
    "REASONING_MESSAGE_START": ["REASONING_MESSAGE_END", "REASONING_END"],
    "REASONING_MESSAGE_CONTENT": ["REASONING_MESSAGE_END", "REASONING_END"],
    "REASONING_MESSAGE_END": ["REASONING_END"],
}


class AGUI(Dialect):
    """AG-UI (CopilotKit's `HttpAgent`, TanStack AI). The note must hold `threadId` and `runId`.

    The handler must not interleave messages, tool calls and reasoning: `cancelled` closes what the newest event left
    open, and looks at no earlier event.
    """

    name = "ag_ui"
    id_first = True  # @tanstack/ai-client 0.33 pairs a pending `id:` line with the next `data:` line
    only_json = True
    streams_gone = True  # @tanstack/ai-client 0.33 sends no `Accept`, and shows no more of a 410 than its number

    def error(self, text: str, code: str, so_far: SoFar) -> list[Event]:
        return [Event({"type": "RUN_ERROR", "message": text, "code": code})]

    def cancelled(self, reason: str, so_far: SoFar) -> list[Event]:
        last = _object(so_far.last)
        ids = {key: last[key] for key in ("messageId", "toolCallId") if key in last}
        closed = [Event({"type": kind, **ids}) for kind in _CLOSE.get(str(last.get("type")), ())]
        ids = {key: so_far.note.get(key, "") for key in ("threadId", "runId")}
        return [*closed, Event({"type": "RUN_FINISHED", **ids, "outcome": {"type": "cancelled"}})]

    def gap(self, gap: Mapping[str, Any]) -> Event:
        return Event({"type": "CUSTOM", "name": "gap", "value": gap})

    def gone(self, gap: Mapping[str, Any]) -> list[Event]:
        return [self.gap(gap), *self.error(_GONE, "gone", NOTHING)]

    def is_last(self, event: Event) -> bool:
        return _object(event).get("type") in ("RUN_FINISHED", "RUN_ERROR")


def _openai_refusal(text: str, code: str, field: str | None) -> Mapping[str, Any]:
    return {"error": {"message": text, "type": "invalid_request_error", "param": field, "code": code}}


class OpenAI(DataOnly):
    """OpenAI's chat completions. OpenAI's SDKs raise an event with `error` as an `APIError`."""

    name = "openai"
    only_json = True

    def refusal(self, text: str, code: str, field: str | None) -> Mapping[str, Any]:
        return _openai_refusal(text, code, field)

    def error(self, text: str, code: str, so_far: SoFar) -> list[Event]:
        return [Event({"error": {"message": text, "type": "server_error", "param": None, "code": code}}), _DONE]

    def cancelled(self, reason: str, so_far: SoFar) -> list[Event]:
        return self.error(f"the answer was cancelled ({reason})", "cancelled", so_far)

    def gap(self, gap: Mapping[str, Any]) -> Event:
        return self.error(f"a part of this answer is missing ({gap['reason']})", "gap", NOTHING)[0]


class OpenAIResponses(Dialect):
    """OpenAI's Responses. The note must hold the constant fields of the `response` object."""

    name = "openai_responses"
    only_json = True

    def refusal(self, text: str, code: str, field: str | None) -> Mapping[str, Any]:
        return _openai_refusal(text, code, field)

    def error(self, text: str, code: str, so_far: SoFar) -> list[Event]:
        return [_response("failed", so_far, error={"code": code, "message": text})]

    def cancelled(self, reason: str, so_far: SoFar) -> list[Event]:
        # The API has no event `response.cancelled` (openai 3.57); the response's status is `cancelled`.
        return [_response("incomplete", so_far, status="cancelled")]

    def gap(self, gap: Mapping[str, Any]) -> Event:
        text = f"a part of this answer is missing ({gap['reason']})"
        data = {"type": "error", "code": "gap", "message": text, "param": None, "sequence_number": gap["from"] - 1}
        return Event(data, "error")

    def is_last(self, event: Event) -> bool:
        return event.event in ("response.completed", "response.failed", "response.incomplete")


def _response(kind: str, so_far: SoFar, **facts: Any) -> Event:
    response = {**so_far.note, "id": f"resp_{so_far.run}", "status": kind, "output": [], **facts}
    event = f"response.{kind}"
    return Event({"type": event, "sequence_number": so_far.events, "response": response}, event)


def _object(event: Event | None) -> Mapping[str, Any]:
    """An event's data; empty where it isn't a JSON object."""
    try:
        return msgspec.json.decode(event.data, type=dict[str, Any]) if event is not None else {}
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return {}


NAMED: Final = Dialect()
DATA_ONLY: Final = DataOnly()
AI_SDK: Final = AISDK()
AG_UI: Final = AGUI()
OPENAI: Final = OpenAI()
OPENAI_RESPONSES: Final = OpenAIResponses()
#: The dialects of the library, by name.
DIALECTS: Final = {spoken.name: spoken for spoken in (NAMED, DATA_ONLY, AI_SDK, AG_UI, OPENAI, OPENAI_RESPONSES)}


def error_frames(error: Exception, dialect: Dialect, so_far: SoFar = NOTHING) -> list[bytes]:
    """The last events of a stream that failed.

    The client gets the texts of our own exceptions. Of other exceptions it gets a reference; the log has the rest.
    """
    code = error.code if isinstance(error, SSEAppError) else SSEAppError.code
    try:
        return [encode(event) for event in dialect.error(public_text(error), code, so_far)]
    except EncodeError as unfit:  # a text that is no Unicode, say
        return error_frames(unfit, dialect, so_far)


def cancelled_frames(reason: str, dialect: Dialect, so_far: SoFar) -> list[bytes]:
    """The last events of a stream that was cancelled."""
    return [encode(event) for event in dialect.cancelled(reason, so_far)]


def public_text(error: Exception) -> str:
    """What a client may read of an exception; what it may not is logged under a reference."""
    if isinstance(error, SSEAppError):
        if isinstance(error, EncodeError) and error.__cause__ is not None:
            logger.error("a handler's event: %s: %r", error.detail, error.__cause__)
        return error.detail
    return f"internal error (reference {log_failure(error)})"


def failure_of(error: BaseException, what: str = "a handler") -> Exception:
    """What a user's code raised, as a failure of that code alone.

    An `Exception` stays as it is. Anything else (`SystemExit`, `GeneratorExit`, a Rust panic, a group of such) becomes
    a `RuntimeError` with the original as its cause: raised on, it would end the event loop or the app's task group.
    The caller has sorted out cancellations of its own before.
    """
    if isinstance(error, Exception):
        return error
    failure = RuntimeError(f"{what} raised {type(error).__name__}")
    failure.__cause__ = error
    return failure


def log_failure(error: Exception) -> str:
    """Log it, and give the reference that it has in the log."""
    reference = secrets.token_hex(6)
    logger.error("reference %s: a handler failed", reference, exc_info=error)
    return reference


def spread(retry_ms: int) -> int:
    """A reconnection time at random around twice the normal one."""
    return random.randint(retry_ms, 3 * retry_ms)
