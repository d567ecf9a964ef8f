"""One tree of exceptions, each with the HTTP status it stands for.

`SSEAppError` is the root. Its text is meant for the client: write it so that the reader knows what to do, and put
nothing secret into it. Anything else that a handler raises is answered as `internal error` with a reference that is
in the log.

A failure before the first byte of a response becomes a problem (RFC 9457); after it, an `error` event with the data
`{"error": <text>, "code": <word>}`.
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
    "the app isn't running, so it has no runs and no topics: serve it with its lifespan, or, where it is "
    "mounted in another program, enter `async with app.running():` in that program's own. If it was running before, "
    "it has stopped or failed, and the log says why"
)


class SSEAppError(Exception):
    """The root. Raised itself by a handler that wants to answer 500 with a text of its own.

    `detail` is for the client, `field` names the parameter or member that is to blame, `headers` go out with the
    answer when it is a problem, `code` is the word that a program can act on (default: the class's).
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
    """A run or a topic before the app has started; raised by `Request.runs`, and wherever else they are asked for."""

    code = "not_running"

    def __init__(self, detail: str = _NOT_RUNNING, **options: Any) -> None:
        super().__init__(detail, **options)


class BadRequest(SSEAppError):
    """A parameter or a body that can't be used; raised by the request's decoding, and by handlers."""

    status, code = 400, "bad_request"


class Unauthorized(SSEAppError):
    """No credentials, or wrong ones."""

    status, code = 401, "unauthorized"


class Forbidden(SSEAppError):
    """The caller is known and may not."""

    status, code = 403, "forbidden"


class NotFound(SSEAppError):
    """Nothing is there, or it belongs to somebody else and the caller must not learn that it exists."""

    status, code = 404, "not_found"


class MethodNotAllowed(SSEAppError):
    """The path exists, the method doesn't; carries `Allow`. Raised by the route table."""

    status, code = 405, "method_not_allowed"


class RequestTimeout(SSEAppError):
    """The body stopped coming for `BODY_TIMEOUT_S`, or came more slowly than `MIN_BODY_BYTES_PER_S`."""

    status, code = 408, "request_timeout"


class Conflict(SSEAppError):
    """The request contradicts the state of what it names."""

    status, code = 409, "conflict"


class Gone(SSEAppError):
    """It was there once and is no longer kept."""

    status, code = 410, "gone"


class TooLarge(SSEAppError):
    """A body, or an event, over its limit; raised as soon as the limit is passed, not at the end."""

    status, code = 413, "too_large"


class TargetTooLong(SSEAppError):
    """Path and query over `max_target_bytes`."""

    status, code = 414, "target_too_long"


class UnsupportedMediaType(SSEAppError):
    """The body's media type is not the one that the route declares."""

    status, code = 415, "unsupported_media_type"


class UnprocessableContent(SSEAppError):
    """Well formed, but it contradicts an earlier request (an `Idempotency-Key` used again with another body)."""

    status, code = 422, "unprocessable_content"


class HeadersTooLarge(SSEAppError):
    """Headers over `max_header_bytes`, or more lines than `MAX_HEADER_LINES`."""

    status, code = 431, "headers_too_large"


class _Passing(SSEAppError):
    """What will pass. Carries `Retry-After`: `retry_after_s`, unless `headers` have one."""

    def __init__(self, detail: str = "", *, retry_after_s: int = 5, **options: Any) -> None:
        super().__init__(detail, **options)
        if "retry-after" not in map(str.lower, self.headers):
            self.headers = {"Retry-After": str(retry_after_s), **self.headers}


class TooManyRequests(_Passing):
    """The caller is over its own limit."""

    status, code = 429, "too_many_requests"


class UpstreamError(SSEAppError):
    """A server that a handler depends on (the language model) failed; `code` says how."""

    status, code = 502, "upstream_error"


class Unavailable(_Passing):
    """The service can't do it now and will be able to later (a full house, say)."""

    status, code = 503, "unavailable"


class Draining(Unavailable):
    """The service takes nothing new, for it is about to stop; whoever asks again reaches its successor."""

    def __init__(self, detail: str = "the service is about to stop; try again", **options: Any) -> None:
        # Spread, so that not all of them come back in one second.
        super().__init__(detail, **{"retry_after_s": random.randint(1, 5), **options})


class Interrupted(SSEAppError):
    """The process that worked on the run ended before the run did."""

    status, code = 503, "interrupted"


class LogUnavailable(Unavailable):
    """The event log can't be written or read at the moment: disk full, read-only, Redis away."""

    code = "log_unavailable"


class LogError(SSEAppError):
    """The event log's file or server is not usable at all: corrupt, foreign, of a newer version, already in use."""

    code = "log_error"


class StreamTimeout(SSEAppError):
    """A stream reached its longest life; said in the stream."""

    status, code = 504, "timeout"


class WriterFenced(SSEAppError):
    """A newer epoch has been opened on the stream (or it is closed): this writer may append nothing more."""

    code = "fenced"


class EncodeError(SSEAppError, ValueError):
    """An event that can't be put on the wire; raised by `wire.encode` before a byte of it is made. Names the field."""

    code = "encode_error"


class SettingsError(SSEAppError, ValueError):
    """A setting with an unusable value; raised at start-up, with the name, the value and what was expected."""

    code = "settings_error"


class ClientGone(SSEAppError):
    """The client left before its request was complete. Never seen by a client; ends the request quietly."""

    code = "client_gone"
