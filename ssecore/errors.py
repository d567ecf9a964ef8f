"""All exceptions, each with its HTTP status.

Before the first byte of a response an exception becomes a problem document (RFC 9457), afterwards an `error` event with
the data `{"error": <text>, "code": <word>}`. Clients see the text of an `SSEAppError`: say what to do, and put nothing
secret into it. Of any other exception they see `internal error` and a reference to the log.
"""

import random
from http import HTTPStatus
from typing import Any, Final

__all__ = [
    "BadRequest",
    "ClientGone",
    "Conflict",
    "Draining",
    "EncodeError",
    "Forbidden",
    "Gone",
    "HeadersTooLarge",
    "Interrupted",
    "LogError",
    "LogUnavailable",
    "MethodNotAllowed",
    "NotFound",
    "NotRunning",
    "RequestTimeout",
    "SSEAppError",
    "SettingsError",
    "StreamTimeout",
    "TargetTooLong",
    "TooLarge",
    "TooManyRequests",
    "Unauthorized",
    "Unavailable",
    "UnprocessableContent",
    "UnsupportedMediaType",
    "UpstreamError",
    "WriterFenced",
]


_NOT_RUNNING: Final = (
    "the app isn't running, so it has no runs and no topics. Serve it with its lifespan; if it is mounted in another "
    "program, enter `async with app.running():` in that program's lifespan. If it was running before, it has stopped "
    "or failed: see the log"
)


class SSEAppError(Exception):
    """The root, and a 500 with a text of the handler's own.

    `detail` is the text. `field` names the wrong parameter or body member. `headers` are sent with a problem document.
    `code` is for programs; its default is the class's.
    """

    status: int = 500
    code: str = "internal_error"

    def __init__(
        self,
        detail: str = "",
        *,
        field: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail or HTTPStatus(self.status).phrase)
        self.field = field
        self.headers = headers or {}
        if code is not None:
            self.code = code

    @property
    def detail(self) -> str:
        return str(self.args[0])


class NotRunning(SSEAppError):
    """The app has not started. Raised by `Request.runs` and `Request.topics`."""

    code = "not_running"

    def __init__(self, detail: str = _NOT_RUNNING, **options: Any) -> None:
        super().__init__(detail, **options)


class BadRequest(SSEAppError):
    """A parameter or the body is invalid."""

    status, code = 400, "bad_request"


class Unauthorized(SSEAppError):
    """Credentials are missing or unknown."""

    status, code = 401, "unauthorized"


class Forbidden(SSEAppError):
    """The caller is known but not allowed."""

    status, code = 403, "forbidden"


class NotFound(SSEAppError):
    """Nothing is there, or only for another caller."""

    status, code = 404, "not_found"


class MethodNotAllowed(SSEAppError):
    """The path exists without this method; sets `Allow`."""

    status, code = 405, "method_not_allowed"


class RequestTimeout(SSEAppError):
    """The body paused for `BODY_TIMEOUT_S`, or was slower than `MIN_BODY_BYTES_PER_S`."""

    status, code = 408, "request_timeout"


class Conflict(SSEAppError):
    """The request contradicts the current state."""

    status, code = 409, "conflict"


class Gone(SSEAppError):
    """It existed and was deleted."""

    status, code = 410, "gone"


class TooLarge(SSEAppError):
    """A body or an event is over its limit; raised as soon as the limit is passed."""

    status, code = 413, "too_large"


class TargetTooLong(SSEAppError):
    """Path and query are over `max_target_bytes`."""

    status, code = 414, "target_too_long"


class UnsupportedMediaType(SSEAppError):
    """The body's media type is not the route's."""

    status, code = 415, "unsupported_media_type"


class UnprocessableContent(SSEAppError):
    """The request contradicts an earlier one: the same `Idempotency-Key` with another body."""

    status, code = 422, "unprocessable_content"


class HeadersTooLarge(SSEAppError):
    """The headers are over `max_header_bytes` or `MAX_HEADER_LINES`."""

    status, code = 431, "headers_too_large"


class _Passing(SSEAppError):
    """The client may retry: sets `Retry-After`, unless `headers` has it."""

    def __init__(self, detail: str = "", *, retry_after_s: int = 5, **options: Any) -> None:
        super().__init__(detail, **options)
        if "retry-after" not in map(str.lower, self.headers):
            self.headers = {"Retry-After": str(retry_after_s), **self.headers}


class TooManyRequests(_Passing):
    """The caller is over its own limit."""

    status, code = 429, "too_many_requests"


class UpstreamError(SSEAppError):
    """A server that the handler called failed; `code` says how."""

    status, code = 502, "upstream_error"


class Unavailable(_Passing):
    """The service is over a limit, or a part of it is down; a retry may succeed."""

    status, code = 503, "unavailable"


class Draining(Unavailable):
    """The service is shutting down; a retry reaches its successor."""

    def __init__(self, detail: str = "the service is about to stop; try again", **options: Any) -> None:
        # Random, so that clients don't all retry in the same second.
        super().__init__(detail, **{"retry_after_s": random.randint(1, 5), **options})


class Interrupted(SSEAppError):
    """The process that ran the run ended before the run."""

    status, code = 503, "interrupted"


class LogUnavailable(Unavailable):
    """The event log can't be read or written at the moment: disk full, read-only, Redis unreachable."""

    code = "log_unavailable"


class LogError(SSEAppError):
    """The event log can't be used: corrupt, foreign, of a newer version, or in use."""

    code = "log_error"


class StreamTimeout(SSEAppError):
    """A stream reached `max_stream_s`; sent in the stream."""

    status, code = 504, "timeout"


class WriterFenced(SSEAppError):
    """The stream is closed, or a newer writer has opened an epoch: this writer may not append."""

    code = "fenced"


class EncodeError(SSEAppError, ValueError):
    """The event can't be encoded; `field` names the reason. Raised by `wire.encode`."""

    code = "encode_error"


class SettingsError(SSEAppError, ValueError):
    """A setting has an invalid value. Raised at start-up."""

    code = "settings_error"


class ClientGone(SSEAppError):
    """The client disconnected before its request was complete. Never sent."""

    code = "client_gone"
