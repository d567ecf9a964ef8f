"""What the engine itself says in a stream: failures, cancellations, the end; in the words that a route speaks."""

import logging
import random
import secrets
from typing import Any, Final

from ssecore.errors import EncodeError, SSEAppError
from ssecore.wire import Event, encode

__all__ = [
    "CURSOR_EVENT",
    "END_ID",
    "engine_frames",
    "error_frames",
    "failure_of",
    "log_failure",
    "public_text",
    "spread",
]

logger = logging.getLogger("sseapp")

_DONE: Final = b"data: [DONE]\n\n"
#: In place of the blank line of a last event: a `Last-Event-ID` that is answered 204.
END_ID: Final = b"id: end\n\n"
#: Firefox and WebKit take an id only from an event that has data, so for them a block that sets the cursor is an event,
#: whose name has no listeners. Other clients get the bare id: some libraries hand over what the standard would drop.
CURSOR_EVENT: Final = b"event: cursor\ndata:\n"


def error_frames(error: Exception, *, data_only: bool) -> list[bytes]:
    """A failure as the engine's own event, `{"error", "code"}`; on data-only routes a typed object and `[DONE]`.

    The texts of our own exceptions go to the client. Anything else goes to the log, and a reference to both.
    """
    code = error.code if isinstance(error, SSEAppError) else SSEAppError.code
    try:
        return engine_frames("error", {"error": public_text(error), "code": code}, data_only=data_only)
    except EncodeError as unfit:  # a text that is no Unicode, say
        return error_frames(unfit, data_only=data_only)


def engine_frames(name: str, data: dict[str, Any], *, data_only: bool) -> list[bytes]:
    """A terminal event of the engine's own, in the way that the route speaks."""
    if data_only:
        return [encode(Event({"type": name, **data})), _DONE]
    return [encode(Event(data, name))]


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
