"""What unary handlers return, and problem documents (RFC 9457)."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ssecore.dialects import NAMED, Dialect
from ssecore.errors import CODES, SSEAppError
from ssecore.wire import encode_json

__all__ = [
    "JSON",
    "ByteStream",
    "Problem",
    "Response",
    "Send",
    "http_error",
    "problem",
    "raw_headers",
]

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response; `content-type` and `content-length` are added."""

    body: bytes = b""
    status: int = 200
    media_type: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def JSON(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """See `wire.encode_json`."""
    return Response(encode_json(data), status, "application/json", headers or {})


@dataclass(frozen=True, slots=True)
class ByteStream:
    """A body in chunks, of which memory holds `buffer_bytes` and one.

    `chunks` is closed at the end, also unread and for HEAD. If it fails, the connection is cut. A `content-length` in
    `headers` must be exact.
    """

    chunks: AsyncIterator[bytes]
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200


class Problem(msgspec.Struct):
    """RFC 9457"""

    type: str
    title: str
    status: int
    detail: str
    code: str
    field: Annotated[str | UnsetType, Meta(description="The wrong parameter or member")] = UNSET
    reference: Annotated[str | UnsetType, Meta(description="Identifies the failure in the server's log")] = UNSET


def problem(error: SSEAppError, reference: str | None = None, dialect: Dialect = NAMED) -> Response:
    """For a failure before the first byte. `reference` is the log's."""
    title, field = HTTPStatus(error.status).phrase, UNSET if error.field is None else error.field
    made = Problem("about:blank", title, error.status, error.detail, error.code, field, reference or UNSET)
    data = msgspec.to_builtins(made) | dialect.refusal(error)
    return Response(encode_json(data), error.status, "application/problem+json", error.headers)


def raw_headers(media_type: str | None, headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Raises `ValueError` for CR, LF or NUL: they could forge a header."""
    items = [*headers.items(), *([("content-type", media_type)] if media_type else [])]
    for name, value in items:
        if any(char in name + value for char in "\r\n\0"):
            raise ValueError(f"the header {name!r:.60} contains CR, LF or NUL")
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in items]


def http_error(error: Exception) -> SSEAppError | None:
    """The `HTTPException` of FastAPI, Starlette or Litestar, known by `status_code` (400 to 599) and `detail`."""
    status, detail = getattr(error, "status_code", None), getattr(error, "detail", None)
    if isinstance(error, SSEAppError) or not isinstance(status, int) or detail is None or status not in _ERRORS:
        return None
    status = int(status)  # it may be an HTTPStatus
    code = CODES.get(status) or HTTPStatus(status).name.lower()
    given = getattr(error, "headers", None)
    headers = {str(name): str(value) for name, value in given.items()} if isinstance(given, Mapping) else {}
    ours = SSEAppError(detail if isinstance(detail, str) else encode_json(detail).decode(), code=code, headers=headers)
    ours.status = status
    ours.__cause__ = error
    return ours


_ERRORS: Final = frozenset(int(status) for status in HTTPStatus if status >= 400)
