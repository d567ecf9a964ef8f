"""All exceptions, each with its HTTP status.

They become a problem document (RFC 9457), or after a response's first byte an `error` event. Clients see the text: say
what to do, and no secret.
"""

import random
from collections.abc import Mapping
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
    "UpstreamRefusal",
    "WriterFenced",
]


_NOT_RUNNING: Final = (
    "the app isn't running, so it has no runs and no topics. Serve it with its lifespan; if it is mounted in another "
    "program, enter `async with app.running():` in that program's lifespan. If it was running before, it has stopped "
    "or failed: see the log"
)


#: By status: its first class's.
CODES: Final = {500: "internal_error"}


class SSEAppError(Exception):
    """The root, and a 500 with a text.

    `field` is the wrong parameter or member, `code` for programs, `headers` for the problem document.
    """

    status: int = 500
    code: str = "internal_error"

    def __init_subclass__(cls) -> None:
        CODES.setdefault(cls.status, cls.code)

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
    """The app has not started."""

    code = "not_running"

    def __init__(self, detail: str = _NOT_RUNNING, **options: Any) -> None:
        super().__init__(detail, **options)


class BadRequest(SSEAppError):
    """An invalid parameter or body."""

    status, code = 400, "bad_request"


class Unauthorized(SSEAppError):
    """Missing or unknown credentials."""

    status, code = 401, "unauthorized"


class Forbidden(SSEAppError):
    """The caller is not allowed."""

    status, code = 403, "forbidden"


class NotFound(SSEAppError):
    """Nothing is there for this caller."""

    status, code = 404, "not_found"


class MethodNotAllowed(SSEAppError):
    """Sets `Allow`."""

    status, code = 405, "method_not_allowed"


class RequestTimeout(SSEAppError):
    """The body was too slow."""

    status, code = 408, "request_timeout"


class Conflict(SSEAppError):
    """It contradicts the current state."""

    status, code = 409, "conflict"


class Gone(SSEAppError):
    """It was deleted."""

    status, code = 410, "gone"


class TooLarge(SSEAppError):
    """A body or an event is over its limit."""

    status, code = 413, "too_large"


class TargetTooLong(SSEAppError):
    """Path and query are over `max_target_bytes`."""

    status, code = 414, "target_too_long"


class UnsupportedMediaType(SSEAppError):
    """The body's media type is not the route's."""

    status, code = 415, "unsupported_media_type"


class UnprocessableContent(SSEAppError):
    """An `Idempotency-Key` was reused with another body."""

    status, code = 422, "unprocessable_content"


class HeadersTooLarge(SSEAppError):
    """Headers over `max_header_bytes` or `MAX_HEADER_LINES`."""

    status, code = 431, "headers_too_large"


class _Passing(SSEAppError):
    """Sets `Retry-After`, unless `headers` has it."""

    def __init__(self, detail: str = "", *, retry_after_s: int = 5, **options: Any) -> None:
        super().__init__(detail, **options)
        if "retry-after" not in map(str.lower, self.headers):
            self.headers = {"Retry-After": str(retry_after_s), **self.headers}


class TooManyRequests(_Passing):
    """The caller is over its own limit."""

    status, code = 429, "too_many_requests"


class UpstreamError(SSEAppError):
    """A server that the handler called failed."""

    status, code = 502, "upstream_error"


class UpstreamRefusal(UpstreamError):
    """A server that the handler called refused with this `status`, which the client gets.

    `error`: that server's own, in OpenAI's form (`message`, `type`, `param`, `code`).
    """

    status, code = 400, "upstream_refused"

    def __init__(
        self, detail: str = "", *, status: int = 400, error: Mapping[str, str | None] | None = None, **options: Any
    ) -> None:
        super().__init__(detail, **options)
        self.status = status
        self.error = error


class Unavailable(_Passing):
    """A limit is reached, or something is down."""

    status, code = 503, "unavailable"


class Draining(Unavailable):
    """The service is shutting down; a retry reaches its successor."""

    def __init__(self, detail: str = "the service is about to stop; try again", **options: Any) -> None:
        super().__init__(detail, **{"retry_after_s": random.randint(1, 5), **options})


class Interrupted(SSEAppError):
    """The process ended before its run."""

    status, code = 503, "interrupted"


class LogUnavailable(Unavailable):
    """At the moment: disk full, read-only, Redis unreachable."""

    code = "log_unavailable"


class LogError(SSEAppError):
    """The log is corrupt, foreign, of a newer version, or in use."""

    code = "log_error"


class StreamTimeout(SSEAppError):
    """A stream reached `max_stream_s`."""

    status, code = 504, "timeout"


class WriterFenced(SSEAppError):
    """The stream is closed, or a newer writer has opened an epoch."""

    code = "fenced"


class EncodeError(SSEAppError, ValueError):
    """An invalid event."""

    code = "encode_error"


class SettingsError(SSEAppError, ValueError):
    """An invalid setting."""

    code = "settings_error"


class ClientGone(SSEAppError):
    """The client disconnected during its request. Never sent."""

    code = "client_gone"
