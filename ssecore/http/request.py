"""The request. It alone calls `receive`: for the whole body, then for the disconnect.

Boundary of trust: query and body are bounded, and decoded to the route's types before a handler gets them.
"""

import codecs
import copy
import hashlib
import json
import random
import re
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from io import BytesIO
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar, overload
from urllib.parse import parse_qsl

import anyio
import msgspec
from msgspec import inspect as types

from ssecore.dialects import NAMED, Dialect
from ssecore.errors import (
    BadRequest,
    ClientGone,
    NotRunning,
    RequestTimeout,
    TooLarge,
    TooManyRequests,
    Unavailable,
    UnsupportedMediaType,
)
from ssecore.http.routes import Route, Upload
from ssecore.http.tokens import Credential
from ssecore.wire import cut

if TYPE_CHECKING:
    from ssecore.metrics import Metrics
    from ssecore.runs import Runs
    from ssecore.topics import Topics

__all__ = [
    "CURSOR_PARAMETERS",
    "EndReason",
    "Receive",
    "Request",
    "RequestFacts",
    "Room",
    "Services",
    "no_connection",
]

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
EndReason = Literal["client", "timeout", "slow", "drain", "finished", "failed", "cancelled", "unauthorized"]

#: The longest pause within a body; nginx's client_body_timeout is 60.
BODY_TIMEOUT_S: Final = 30.0
#: On average; Apache's MinRate.
MIN_BODY_BYTES_PER_S: Final = 500
#: If a timer is this late, the process stood still, with unread data.
LATE_S: Final = 1.0
#: Of a body that no handler reads; then the client is disconnected.
MAX_UNREAD_BYTES: Final = 1024 * 1024
#: event-source-polyfill adds `lastEventId` at each reconnect, so it precedes the page's older `last_event_id`.
CURSOR_PARAMETERS: Final = ("lastEventId", "last_event_id")
MAX_QUERY_FIELDS: Final = 100
MAX_ERROR_CHARS: Final = 200
SPOOL_BYTES: Final = 1024 * 1024

_MISSING_FIELD: Final = re.compile(r"Object (?:missing required|contains unknown) field `(.+)`", re.DOTALL)
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class Room:
    """A limit of `what`, in total and by caller."""

    def __init__(self, what: str, limit: int | None, limit_per_caller: int | None) -> None:
        self._what = what
        self._limit = limit
        self._limit_per_caller = limit_per_caller
        self._taken = 0
        self._taken_by: dict[str | None, int] = {}

    def take(self, caller: str | None, amount: int) -> None:
        """Raises `TooManyRequests` over the caller's limit, `Unavailable` over the total."""
        if self._limit is not None and self._taken + amount > self._limit:
            raise Unavailable(f"too many {self._what} at once; try again", retry_after_s=random.randint(1, 5))
        taken, limit = self._taken_by.get(caller, 0), self._limit_per_caller
        if caller is not None and limit is not None and taken + amount > limit:
            text = f"you have too many {self._what} at once; try again"
            raise TooManyRequests(text, retry_after_s=random.randint(1, 5))
        self._taken += amount
        self._taken_by[caller] = taken + amount

    def give_back(self, caller: str | None, amount: int) -> None:
        self._taken -= amount
        if left := self._taken_by.pop(caller, 0) - amount:
            self._taken_by[caller] = left


class Services(NamedTuple):
    """For handlers."""

    runs: "Runs"
    topics: "Topics"
    metrics: "Metrics"


class Headers(dict[str, str]):
    """Keys in lower case, lookups in any case."""

    def __missing__(self, name: str) -> str:
        if name == (lower := name.lower()):
            raise KeyError(name)
        return self[lower]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and dict.__contains__(self, name.lower())

    @overload
    def get(self, name: str, default: None = None, /) -> str | None: ...
    @overload
    def get(self, name: str, default: str, /) -> str: ...
    @overload
    def get(self, name: str, default: T, /) -> str | T: ...
    def get(self, name: str, default: Any = None, /) -> Any:
        return dict.get(self, name.lower(), default)


class RequestFacts:
    """What a stream needs of its request."""

    __slots__ = ("caller", "credential", "ended_for", "has_place", "method", "route")

    def __init__(self, method: str) -> None:
        self.method = method
        self.route: Route | None = None
        self.caller: str | None = None
        self.credential: Credential | None = None  #: if it can expire
        self.has_place = False
        self.ended_for: EndReason | None = None

    @property
    def dialect(self) -> Dialect:
        return self.route.dialect if self.route is not None else NAMED

    def end_for(self, reason: EndReason) -> None:
        """The first reason counts."""
        if self.ended_for is None:
            self.ended_for = reason

    @property
    def end_reason(self) -> EndReason:
        """For the `finally` of a stream's generator.

        `client`: disconnected. `timeout`: `max_stream_s`. `slow`: read too slowly. `drain`: shutdown. `cancelled`: by a
        request. `unauthorized`: its token ended. Otherwise `failed` during an exception, else `finished`.
        """
        if self.ended_for is not None:
            return self.ended_for
        return "finished" if sys.exc_info()[0] in (None, GeneratorExit) else "failed"

    def close(self) -> None:
        """Release what it uses."""


class Request(RequestFacts):
    """A handler's first argument. `state` is from the lifespan; `query` and `body` have the route's types."""

    # Few requests set these.
    answer_headers: Sequence[tuple[bytes, bytes]] = ()
    query: Any = None
    body: Any = None
    raw_body = b""
    body_digest = ""  #: SHA-256
    run_id: str | None = None  #: for the handler of a run
    #: Set by a run's handler that yields its own error event.
    failed = False
    _upload: SpooledTemporaryFile[bytes] | None = None
    _room: Room | None = None
    _held = 0

    def __init__(
        self,
        scope: MutableMapping[str, Any],
        receive: Receive,
        state: Any = None,
        *,
        services: "Services | None" = None,
        draining: bool = False,
    ) -> None:
        super().__init__(scope["method"])
        self.scope = scope
        self.state = state
        self.draining = draining
        self.root_path: str = scope.get("root_path", "")
        self.path_params: Mapping[str, Any] = {}
        self._receive = receive
        self._services = services

    @property
    def running(self) -> bool:
        return self._services is not None

    @property
    def runs(self) -> "Runs":
        return self._running().runs

    @property
    def topics(self) -> "Topics":
        return self._running().topics

    @property
    def metrics(self) -> "Metrics":
        return self._running().metrics

    def _running(self) -> "Services":
        if self._services is None:
            raise NotRunning()
        return self._services

    @cached_property
    def path(self) -> str:
        """Below the mount point. Older servers leave `root_path` out of `path`."""
        path: str = self.scope["path"]
        root = self.root_path
        if root.endswith("/") and not path.startswith(f"{root}/"):  # uvicorn joins `--root-path /api/` and path
            root = root.rstrip("/")
        if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
            path = path[len(root) :]
        raw: bytes = self.scope.get("raw_path") or b""
        if path.endswith("/") and raw and not raw.lower().endswith((b"/", b"%2f")):
            path = path.removesuffix("/")  # Litestar's mounts add it
        return path or "/"

    def reference(self, target: str) -> str:
        """A relative URL (RFC 3986, 4.2): a proxy may strip a prefix."""
        raw: bytes = self.scope.get("raw_path") or b""
        depth = self.path.count("/") - 1 - raw.lower().count(b"%2f")  # an encoded slash is not a level
        return "../" * depth + target.removeprefix("/")

    @cached_property
    def headers(self) -> Headers:
        """Repeated ones are joined by commas (RFC 9110, 5.2)."""
        values: dict[str, list[str]] = {}
        for name, value in self.scope["headers"]:
            values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        return Headers({name: ", ".join(several) for name, several in values.items()})

    @property
    def cookies(self) -> dict[str, str]:
        """Without quotes. Of two with one name the first, with the longer path (RFC 6265, 5.4)."""
        lines = [value.decode("latin-1") for name, value in self.scope["headers"] if name.lower() == b"cookie"]
        found: dict[str, str] = {}
        for part in ";".join(lines).split(";"):
            name, equals, value = part.strip(" \t").partition("=")
            if equals:
                value = value.strip(" \t")
                quoted = len(value) > 1 and value[0] == value[-1] == '"'
                found.setdefault(name.rstrip(" \t"), value[1:-1] if quoted else value)
        return found

    @cached_property
    def query_params(self) -> Mapping[str, str]:
        """The first value of each name. Raises `BadRequest` for repeated names, except lists."""
        params: dict[str, str] = {}
        for name, value in self.query_pairs:
            if name not in params:
                params[name] = value
            elif self.route is None or not (self.route.hosted or name in self.route.lists):
                raise BadRequest(f"{name!r:.60} is given twice", field=name[:60])
        return params

    @cached_property
    def query_pairs(self) -> list[tuple[str, str]]:
        try:
            text = self.scope.get("query_string", b"").decode("ascii")
            return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS)
        except ValueError as error:
            raise BadRequest(f"the query can't be read: {error}") from None

    def _query_values(self, route: Route) -> dict[str, Any]:
        own = (*CURSOR_PARAMETERS, "key") if route.run is not None else CURSOR_PARAMETERS
        values: dict[str, Any] = {name: value for name, value in self.query_params.items() if name not in own}
        for name in route.lists:
            if name in values:
                values[name] = [value for other, value in self.query_pairs if other == name]
        return values

    @cached_property
    def last_event_id(self) -> str:
        """The client's cursor, or ""; the header precedes the query."""
        if cursor := self.headers.get("last-event-id", "").strip(" \t"):
            with suppress(UnicodeDecodeError):  # browsers send UTF-8, some clients latin-1
                return cursor.encode("latin-1").decode()
            return cursor
        given = (self.query_params.get(name, "").strip(" \t") for name in CURSOR_PARAMETERS)
        return next(filter(None, given), "")

    @property
    def wants_event_stream(self) -> bool:
        return "text/event-stream" in self.headers.get("accept", "")

    @property
    def like_event_source(self) -> bool:
        """Seems an `EventSource`, which never reconnects after a 503."""
        return self.method == "GET" and self.wants_event_stream and "no-cache" in self.headers.get("cache-control", "")

    @property
    def from_browser(self) -> bool:
        """A browser's, or `fetch` with `cache: "no-store"`."""
        return self.like_event_source and self.headers.get("user-agent", "").startswith("Mozilla/")

    @property
    def preamble(self) -> bytes:
        """`wire.cut` for WebKit and npm's `eventsource` 2, which sends no `User-Agent`.

        httpx-sse and sseclient would dispatch an event without data.
        """
        if not self.like_event_source or not self.headers.get("user-agent", "Mozilla/").startswith("Mozilla/"):
            return b""
        try:
            return cut(self.last_event_id)
        except BadRequest:  # invalid, and refused elsewhere
            return cut("")

    async def decode(
        self,
        route: Route,
        params: Mapping[str, Any],
        max_body_bytes: int,
        max_upload_bytes: int,
        body_bytes: Room,
        uploads: Room,
    ) -> None:
        """Raises a 4xx. In its `Room` an upload counts as one, others by bytes."""
        self.route, self.path_params = route, params
        if route.query is not None:
            self.query = _convert(self._query_values(route), route.query)
        if isinstance(route.body, Upload):
            self._check_media_type([route.body.media_type])
            self._room = uploads
            self._hold(1)
            # Without a name: a crash deletes it, too.
            self.body = self._upload = SpooledTemporaryFile(SPOOL_BYTES)
            try:
                await self._read(route.body.max_bytes or max_upload_bytes, self._upload)
            except OSError as error:
                raise Unavailable(
                    f"the upload can't be stored ({error.strerror}) and was dropped: free space in the server's "
                    "folder for temporary files (TMPDIR), then send it again"
                ) from error
        elif route.body is not None:
            self._check_media_type(route.media_types)
            self._room = body_bytes
            body = BytesIO()
            await self._read(max_body_bytes, body)
            self.raw_body = body.getvalue().removeprefix(codecs.BOM_UTF8)  # RFC 8259, 8.1
            self.body = _decode_json(self.raw_body, route.body)

    def _check_media_type(self, expected: Sequence[str]) -> None:
        given = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given not in expected:
            raise UnsupportedMediaType(f"Content-Type must be {expected[0]}; {given or 'none'} was sent")
        encoding = self.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMediaType(
                f"compressed request bodies are not accepted ({encoding:.60}): send it without Content-Encoding",
                headers={"accept-encoding": "identity"},
            )

    def _hold(self, amount: int) -> None:
        if self._room is not None:
            self._room.take(self.caller, amount)
            self._held += amount

    async def _part(self, wait_s: float) -> tuple[bytes, bool, float]:
        """The next part, whether more follow, and the wait allowed for it."""
        message = None
        while message is None:
            with anyio.move_on_after(wait_s) as scope:
                message = await self._receive()
            waited_s = wait_s + anyio.current_time() - scope.deadline
            if message is None:
                if waited_s < wait_s + LATE_S:
                    raise RequestTimeout("the body arrived too slowly or not at all")
                wait_s = LATE_S
        if message["type"] == "http.disconnect":
            raise ClientGone("the client disconnected before its request was complete")
        body: bytes = message.get("body", b"")
        wait_s = min(max(wait_s - waited_s, 0) + len(body) / MIN_BODY_BYTES_PER_S, BODY_TIMEOUT_S)
        return body, message.get("more_body", False), wait_s

    async def _read(self, limit: int, file: IO[bytes]) -> None:
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
            raise TooLarge(f"the body is larger than {limit} bytes")
        size, more, wait_s, digest = 0, True, BODY_TIMEOUT_S, hashlib.sha256()
        while more:
            part, more, wait_s = await self._part(wait_s)
            size += len(part)
            digest.update(part)
            if size > limit:
                raise TooLarge(f"the body is larger than {limit} bytes")
            if self._upload is None:
                self._hold(len(part))
            if self._upload is None or size <= SPOOL_BYTES:
                file.write(part)
            else:
                await anyio.to_thread.run_sync(file.write, part)
            del part  # before waiting for the next
        file.seek(0)
        self.body_digest = digest.hexdigest()

    def for_run(self, id: str) -> "Request":
        """A copy without the connection."""
        request = copy.copy(self)
        request.forget()
        request.run_id = id
        request._receive = no_connection
        return request

    def hand_over(self) -> None:
        """The run's copy releases it."""
        self._upload = self._room = None

    def outlive(self, *, whole: bool) -> RequestFacts:
        if whole:
            self.forget()
            self.scope = {**self.scope, "extensions": {}}
            self._receive = no_connection
            return self
        self.close()
        facts = RequestFacts(self.method)
        for name in RequestFacts.__slots__:
            setattr(facts, name, getattr(self, name))
        return facts

    def forget(self) -> None:
        """Drop decoded headers: saves 0.5 KiB for each open connection."""
        for name in ("headers", "query_pairs", "query_params", "last_event_id"):
            self.__dict__.pop(name, None)

    def close(self) -> None:
        if self._upload is not None:
            with suppress(OSError):  # a full disk: closing flushes
                self._upload.close()
        if self._room is not None:
            self._room.give_back(self.caller, self._held)
            self._room = None

    async def disconnect(self) -> None:
        """After the body, wait for the disconnect or `MAX_UNREAD_BYTES` more."""
        unread = 0
        while unread <= MAX_UNREAD_BYTES and (message := await self._receive())["type"] != "http.disconnect":
            unread += len(message.get("body", b""))


async def no_connection() -> Any:
    """`receive` without a connection."""
    raise RuntimeError("this request has no connection any more: its body was read before")


class _ModelError(ValueError):
    def __init__(self, error: Any) -> None:
        first = error.errors(include_url=False)[0]
        super().__init__(first["msg"])
        self.place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])


def _model(kind: Any, value: Any, *, json: bool) -> Any:
    try:
        return kind.model_validate_json(msgspec.json.encode(value)) if json else kind.model_validate(value)
    except ValueError as error:
        if not hasattr(error, "errors"):
            raise
        raise _ModelError(error) from None


def _convert(values: Mapping[str, Any], kind: Any) -> Any:
    try:
        return msgspec.convert(values, kind, strict=False, dec_hook=partial(_model, json=False))
    except msgspec.ValidationError as error:
        raise _bad_request(error, kind) from None


def _decode_json(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind, dec_hook=partial(_model, json=True))
    except msgspec.ValidationError as error:
        raise _bad_request(error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        half = "it has half of a surrogate pair: a character was cut in two"
        what = half if _has_lone_surrogate(body) else str(error)
        raise BadRequest(f"the body is not JSON: {what}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None


def _has_lone_surrogate(body: bytes) -> bool:
    """JavaScript's `slice` can cut an emoji in two; msgspec then reports "truncated" input."""
    if not _SURROGATE.search(body):
        return False
    with suppress(ValueError, RecursionError):
        json.loads(body)
        return True
    return False


def _bad_request(error: msgspec.ValidationError, kind: Any) -> BadRequest:
    """msgspec's forms:

    "Expected `int` >= 0 - at `$.count`", "Object missing required field `title` - at `$[0]`", "Expected `int`, got
    `str` - at `key` in `$.by_number`", "Invalid enum value 'x' - at `$.status`" (whole value, no choices)
    """
    whole = str(error)
    text, _, place = whole.rpartition(" - at ") if " - at " in whole else (whole, "", "")
    path = place.rpartition(" in ")[2].strip("`").removeprefix("$")
    if text.startswith("Invalid enum value") and (choices := _choices(types.type_info(kind), path)):
        text = f"expected {' or '.join(choices)}"
    if missing := _MISSING_FIELD.fullmatch(text):
        path += f".{missing[1]}"
    if isinstance(error.__cause__, _ModelError):
        path += error.__cause__.place
    field = path.removeprefix(".") or None
    if len(text) > MAX_ERROR_CHARS:
        text = f"{text[:MAX_ERROR_CHARS]}…"
    return BadRequest(f"{field}: {text}" if field else text, field=field)


def _choices(info: Any, path: str) -> list[str]:
    """The valid words at a path such as `.status` or `[...].kind`."""
    if isinstance(info, types.UnionType):
        return [choice for part in info.types for choice in _choices(part, path)]
    if not path:
        values: Any = info.values if isinstance(info, types.LiteralType) else ()
        if isinstance(info, types.EnumType):
            values = [member.value for member in info.cls]
        return [str(value) for value in values]
    if path.startswith("[...]"):
        inner = getattr(info, "item_type", None) or getattr(info, "value_type", None)
        return _choices(inner, path.removeprefix("[...]"))
    for field in getattr(info, "fields", ()):
        rest = path.removeprefix(f".{field.encode_name}")
        if rest != path and rest[:1] in ("", ".", "["):
            return _choices(field.type, rest)
    return []
