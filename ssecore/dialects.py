"""Dialects: the form of the engine's own events, after a failure, a cancellation or a crash.

A program's own is a subclass: see docs/handlers.md.
"""

import logging
import random
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import msgspec

from ssecore.errors import EncodeError, SSEAppError, UpstreamRefusal
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

#: Replaces a last event's blank line. A request with this id is answered 204.
END_ID: Final = b"id: end\n\n"
#: For Firefox and WebKit, which take an id only from an event with data.
CURSOR_EVENT: Final = b"event: cursor\ndata:\n"


@dataclass(frozen=True, slots=True)
class SoFar:
    """A stream's state."""

    run: str = ""
    note: Mapping[str, Any] = field(default_factory=dict)  #: see `routes.About`
    events: int = 0
    last: Event | None = None


NOTHING: Final = SoFar()


class Dialect:
    """The engine's events have a name and JSON data."""

    #: Stored with each run.
    name: str = "named"
    #: `id:` before `data:` in runs, only for clients that need it: see `log.framed`.
    id_first: bool = False
    #: Clients parse all data as JSON, so it is never empty.
    only_json: bool = False
    #: A client that resumes a deleted run gets `gone`, not 410, even if it doesn't accept event streams.
    streams_gone: bool = False

    def headers(self, run: str) -> Mapping[str, str]:
        """Additional headers of a response."""
        return {}

    def error(self, text: str, code: str, so_far: SoFar) -> list[Event]:
        """The last events; `code` is for programs."""
        return [Event({"error": text, "code": code}, "error")]

    def upstream_refusal(self, refusal: UpstreamRefusal, so_far: SoFar) -> list[Event]:
        """The last events if the upstream's refusal came too late for an HTTP status."""
        return self.error(refusal.detail, refusal.code, so_far)

    def cancelled(self, reason: str, so_far: SoFar) -> list[Event]:
        """The last events; `reason`: `asked` (by a client) or `linger` (no reader)."""
        return [Event({"reason": reason}, "cancelled")]

    def gap(self, gap: Mapping[str, Any]) -> Event:
        """Announces a loss: `{"reason", "from", "to"}`, two sequence numbers."""
        return Event(gap, "gap")

    def gone(self, gap: Mapping[str, Any]) -> list[Event]:
        """The last events if the rest of the stream is lost."""
        return [self.gap(gap)]

    def refusal(self, error: SSEAppError) -> Mapping[str, Any]:
        """Additional members of problem documents."""
        return {}

    def is_last(self, event: Event) -> bool:
        """Whether it completes the stream. Not `result`: handlers may yield more."""
        return event.event in ("complete", "done", "error", "cancelled")


_DONE: Final = Event("[DONE]")


class DataOnly(Dialect):
    """Events without names; the last is `[DONE]`."""

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
    """Vercel's UI message stream, version 1. Without `finish` `WorkflowChatTransport` reconnects forever."""

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
    """AG-UI. The note needs `threadId` and `runId`. Messages must not overlap: `cancelled` closes the newest."""

    name = "ag_ui"
    id_first = True  # @tanstack/ai-client 0.33 pairs a pending `id:` line with the next `data:` line
    only_json = True
    streams_gone = True  # @tanstack/ai-client 0.33 sends no `Accept`, and shows a 410's number only

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


def _openai_error(error: SSEAppError) -> Mapping[str, str | None]:
    if isinstance(error, UpstreamRefusal) and error.error is not None:
        return error.error
    limited = "rate_limit_error" if error.status == 429 else "invalid_request_error"
    kind = "server_error" if error.status >= 500 else limited
    return {"message": error.detail, "type": kind, "param": error.field, "code": error.code}


def _answer_of(refusal: UpstreamRefusal) -> Mapping[str, Any]:
    """For a route's whole answer."""
    return {"status": refusal.status, **({"headers": refusal.headers} if refusal.headers else {})}


class OpenAI(DataOnly):
    """OpenAI's chat completions."""

    name = "openai"
    only_json = True

    def refusal(self, error: SSEAppError) -> Mapping[str, Any]:
        return {"error": _openai_error(error)}

    def error(self, text: str, code: str, so_far: SoFar) -> list[Event]:
        return [Event({"error": {"message": text, "type": "server_error", "param": None, "code": code}}), _DONE]

    def upstream_refusal(self, refusal: UpstreamRefusal, so_far: SoFar) -> list[Event]:
        return [Event({"error": _openai_error(refusal), **_answer_of(refusal)}), _DONE]

    def cancelled(self, reason: str, so_far: SoFar) -> list[Event]:
        return self.error(f"the answer was cancelled ({reason})", "cancelled", so_far)

    def gap(self, gap: Mapping[str, Any]) -> Event:
        return self.error(f"a part of this answer is missing ({gap['reason']})", "gap", NOTHING)[0]


class OpenAIResponses(Dialect):
    """OpenAI's Responses. The note needs the constant fields of `response`."""

    name = "openai_responses"
    only_json = True

    def refusal(self, error: SSEAppError) -> Mapping[str, Any]:
        return {"error": _openai_error(error)}

    def error(self, text: str, code: str, so_far: SoFar) -> list[Event]:
        return [_response("failed", so_far, error={"code": code, "message": text})]

    def upstream_refusal(self, refusal: UpstreamRefusal, so_far: SoFar) -> list[Event]:
        error = _openai_error(refusal)
        error = {**error, "code": error["code"] or refusal.code}  # here it must be a string
        return [_response("failed", so_far, _answer_of(refusal), error=error)]

    def cancelled(self, reason: str, so_far: SoFar) -> list[Event]:
        # There is no `response.cancelled` (openai 3.57).
        return [_response("incomplete", so_far, status="cancelled")]

    def gap(self, gap: Mapping[str, Any]) -> Event:
        text = f"a part of this answer is missing ({gap['reason']})"
        data = {"type": "error", "code": "gap", "message": text, "param": None, "sequence_number": gap["from"] - 1}
        return Event(data, "error")

    def is_last(self, event: Event) -> bool:
        return event.event in ("response.completed", "response.failed", "response.incomplete")


def _response(kind: str, so_far: SoFar, more: Mapping[str, Any] = MappingProxyType({}), **facts: Any) -> Event:
    response = {**so_far.note, "id": f"resp_{so_far.run}", "status": kind, "output": [], **facts}
    event = f"response.{kind}"
    return Event({"type": event, "sequence_number": so_far.events, "response": response, **more}, event)


def _object(event: Event | None) -> Mapping[str, Any]:
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
DIALECTS: Final = {dialect.name: dialect for dialect in (NAMED, DATA_ONLY, AI_SDK, AG_UI, OPENAI, OPENAI_RESPONSES)}


def error_frames(error: Exception, dialect: Dialect, so_far: SoFar = NOTHING) -> list[bytes]:
    """A failed stream's last events."""
    code = error.code if isinstance(error, SSEAppError) else SSEAppError.code
    try:
        if isinstance(error, UpstreamRefusal):
            return [encode(event) for event in dialect.upstream_refusal(error, so_far)]
        return [encode(event) for event in dialect.error(public_text(error), code, so_far)]
    except EncodeError as invalid:
        return error_frames(invalid, dialect, so_far)


def cancelled_frames(reason: str, dialect: Dialect, so_far: SoFar) -> list[bytes]:
    """A cancelled stream's last events."""
    return [encode(event) for event in dialect.cancelled(reason, so_far)]


def public_text(error: Exception) -> str:
    """An `SSEAppError`'s own text, otherwise a reference to the log."""
    if isinstance(error, SSEAppError):
        if isinstance(error, EncodeError) and error.__cause__ is not None:
            logger.error("a handler's event: %s: %r", error.detail, error.__cause__)
        return error.detail
    return f"internal error (reference {log_failure(error)})"


def failure_of(error: BaseException, what: str = "a handler") -> Exception:
    """What user code raised: `SystemExit` or a Rust panic would end the event loop or the app's task group."""
    if isinstance(error, Exception):
        return error
    failure = RuntimeError(f"{what} raised {type(error).__name__}")
    failure.__cause__ = error
    return failure


def log_failure(error: Exception) -> str:
    """Returns the reference in the log."""
    reference = secrets.token_hex(6)
    logger.error("reference %s: a handler failed", reference, exc_info=error)
    return reference


def spread(retry_ms: int) -> int:
    """Random, twice the time on average."""
    return random.randint(retry_ms, 3 * retry_ms)
