"""The request: a read-only view of the scope, and the only one who calls `receive`.

Order matters with `receive`: the body is read first, to its end; then the watcher waits for the disconnect. A watcher
that starts earlier takes the body's parts away from whoever wants them.

Boundary of trust: all that a request holds comes from outside. The query and the body are bounded and decoded into the
types that the route declares before a handler sees them; `BadRequest` names the field that is to blame.
"""

import codecs
import copy
import hashlib
import json
import random
import re
import sys
from collections import Counter
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

#: How long a client may pause within its body, if it was fast enough before. nginx's client_body_timeout is 60.
BODY_TIMEOUT_S: Final = 30.0
#: What a body must bring on average: one as slow as this has no second to spare. Apache's MinRate is 500, too.
MIN_BODY_BYTES_PER_S: Final = 500
#: A timer that fires so late means that the process stood still; what has come meanwhile is not read yet.
LATE_S: Final = 1.0
#: What may come of a body that no handler reads. A client that sends more is disconnected.
MAX_UNREAD_BYTES: Final = 1024 * 1024
#: Where a cursor may stand in the query. event-source-polyfill adds `lastEventId` at each reconnect, so it wins over
#: `last_event_id`, which may be the page's own, from before.
CURSOR_PARAMETERS: Final = ("lastEventId", "last_event_id")
#: More names than any form of ours has; each one costs memory before it is looked at.
MAX_QUERY_FIELDS: Final = 100
#: Of what is told about a value that can't be used, and quotes it.
MAX_ERROR_CHARS: Final = 200
#: An upload smaller than this never touches the disk.
SPOOL_BYTES: Final = 1024 * 1024

_MISSING_FIELD: Final = re.compile(r"Object (?:missing required|contains unknown) field `(.+)`", re.DOTALL)
#: The escape of half of a character; in JSON that is right the other half stands beside it.
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class Room:
    """How much of something (`what`, in the plural) requests may hold at once: in all, and those of one caller."""

    def __init__(self, what: str, limit: int | None, limit_per_caller: int | None) -> None:
        self._what = what
        self._limit = limit
        self._limit_per_caller = limit_per_caller
        self._taken = 0
        self._taken_by: Counter[str] = Counter()

    def take(self, caller: str | None, amount: int) -> None:
        """Raises `TooManyRequests` if the caller would have more than its share, `Unavailable` if there is no more."""
        wait_s = random.randint(1, 5)
        if self._limit is not None and self._taken + amount > self._limit:
            raise Unavailable(f"too many {self._what} at once; try again", retry_after_s=wait_s)
        if caller is not None:
            limit = self._limit_per_caller
            if limit is not None and self._taken_by[caller] + amount > limit:
                raise TooManyRequests(f"too many {self._what} of yours at once; try again", retry_after_s=wait_s)
            self._taken_by[caller] += amount
        self._taken += amount

    def give_back(self, caller: str | None, amount: int) -> None:
        self._taken -= amount
        if caller is not None:
            self._taken_by[caller] -= amount
            if not self._taken_by[caller]:
                del self._taken_by[caller]


class Services(NamedTuple):
    """What of the engine a handler finds in its request. (`runs` and `topics` import this module, not the reverse.)"""

    runs: "Runs"
    topics: "Topics"
    metrics: "Metrics"


class Headers(dict[str, str]):
    """Headers by their names in lower case, found by a name in any case."""

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
    """What of a request is still needed when only its stream is left."""

    __slots__ = ("caller", "credential", "ended_for", "has_place", "method", "route")

    def __init__(self, method: str) -> None:
        self.method = method
        self.route: Route | None = None
        self.caller: str | None = None  #: the name of whoever asks; `None` where nobody has one
        self.credential: Credential | None = None  #: what it showed, where that may end before the request does
        self.has_place = False  #: counted as a stream
        self.ended_for: EndReason | None = None  #: why the stream ends; see `end_for`

    @property
    def dialect(self) -> Dialect:
        """The route's."""
        return self.route.dialect if self.route is not None else NAMED

    def end_for(self, reason: EndReason) -> None:
        """Note why the stream ends. The first reason is the one that counts."""
        if self.ended_for is None:
            self.ended_for = reason

    @property
    def end_reason(self) -> EndReason:
        """Why the stream ended, for the `finally` of its generator.

        `client` it left, `timeout` its longest life is over, `slow` it stopped reading, `drain` the service stops,
        `cancelled` somebody cancelled it, `unauthorized` the caller's token has ended. Where it was none of these the
        generator ends by itself: `failed` while an exception goes through it, else `finished`.
        """
        if self.ended_for is not None:
            return self.ended_for
        return "finished" if sys.exc_info()[0] in (None, GeneratorExit) else "failed"

    def close(self) -> None:
        """Give back what the request holds."""


class Request(RequestFacts):
    """What a handler gets as its first argument.

    `state` is what the app's lifespan made (database, model, …); `query` and `body` are decoded as the route declares.
    """

    # In the class: most requests leave them as they are.
    answer_headers: Sequence[tuple[bytes, bytes]] = ()  #: what every answer to it carries besides its own headers
    _room: Room | None = None  # where its body is counted, until `close`
    _held = 0  # how much of it

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
        self.draining = draining  #: the service is about to stop
        self.root_path: str = scope.get("root_path", "")
        self.path_params: Mapping[str, Any] = {}
        self.query: Any = None
        self.body: Any = None
        self.raw_body = b""  #: a JSON body as it came, without a byte order mark
        self._receive = receive
        self.body_digest = ""  #: SHA-256 of the body as it came, where the route declares one
        self.run_id: str | None = None  #: the run's, in the handler of one
        #: Set by the handler of a run that tells of its failure in words of its own: the run's state is `failed` then.
        self.failed = False
        self._services = services
        self._upload: SpooledTemporaryFile[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether the app ran when the request came."""
        return self._services is not None

    @property
    def runs(self) -> "Runs":
        """The app's `Runs`."""
        return self._running().runs

    @property
    def topics(self) -> "Topics":
        """The app's `Topics`."""
        return self._running().topics

    @property
    def metrics(self) -> "Metrics":
        """The app's `Metrics`."""
        return self._running().metrics

    def _running(self) -> "Services":
        if self._services is None:
            raise NotRunning()
        return self._services

    @cached_property
    def path(self) -> str:
        """The path below the mount point. Servers and hosts put `root_path` into `path` too; older ones don't."""
        path: str = self.scope["path"]
        root = self.root_path
        if root.endswith("/") and not path.startswith(f"{root}/"):  # uvicorn joins `--root-path /api/` and the path
            root = root.rstrip("/")
        if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
            path = path[len(root) :]
        raw: bytes = self.scope.get("raw_path") or b""
        if path.endswith("/") and raw and not raw.lower().endswith((b"/", b"%2f")):
            path = path.removesuffix("/")  # a mount of Litestar's adds it
        return path or "/"

    def reference(self, target: str) -> str:
        """A relative reference (RFC 3986, 4.2) from the request's own URL to `target`, a path of this app.

        It leads there behind a proxy that strips a prefix too, which the app can't know.
        """
        raw: bytes = self.scope.get("raw_path") or b""
        depth = self.path.count("/") - 1 - raw.lower().count(b"%2f")  # an encoded slash is no level of the URL
        return "../" * depth + target.removeprefix("/")

    @cached_property
    def headers(self) -> Headers:
        """By names in any case; several headers of one name are joined by a comma (RFC 9110, 5.2)."""
        values: dict[str, list[str]] = {}
        for name, value in self.scope["headers"]:
            values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        return Headers({name: ", ".join(several) for name, several in values.items()})

    @property
    def cookies(self) -> dict[str, str]:
        """By name, without the quotes that may stand around a value. Of two of one name the first, the closest one.

        RFC 6265, 5.4: "Cookies with longer paths are listed before cookies with shorter paths."
        """
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
        """The query as it came, of a list its first value.

        Raises `BadRequest` for what is not UTF-8, and for a name given twice where the route has no list of this name.
        """
        params: dict[str, str] = {}
        for name, value in self.query_pairs():
            if name not in params:
                params[name] = value
            elif self.route is None or not (self.route.hosted or name in self.route.lists):
                raise BadRequest(f"{name!r:.60} is given twice", field=name[:60])
        return params

    def query_pairs(self) -> list[tuple[str, str]]:
        """All names and values of the query, in their order. Raises `BadRequest` for what is not UTF-8."""
        try:
            text = self.scope.get("query_string", b"").decode("ascii")
            return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS)
        except ValueError as error:
            raise BadRequest(f"the query can't be read: {error}") from None

    def _query_values(self, route: Route) -> dict[str, Any]:
        """The query without what is the engine's own, lists as lists."""
        own = (*CURSOR_PARAMETERS, "key") if route.run is not None else CURSOR_PARAMETERS
        values: dict[str, Any] = {name: value for name, value in self.query_params.items() if name not in own}
        for name in route.lists:
            if name in values:
                values[name] = [value for other, value in self.query_pairs() if other == name]
        return values

    @cached_property
    def last_event_id(self) -> str:
        """The client's cursor, without white space around it; "" if there is none. The header wins."""
        cursor = self.headers.get("last-event-id", "")
        with suppress(UnicodeDecodeError):  # browsers send UTF-8, some clients latin-1
            cursor = cursor.encode("latin-1").decode()
        if cursor := cursor.strip(" \t"):
            return cursor
        given = (self.query_params.get(name, "").strip(" \t") for name in CURSOR_PARAMETERS)
        return next(filter(None, given), "")

    @property
    def wants_event_stream(self) -> bool:
        return "text/event-stream" in self.headers.get("accept", "")

    @property
    def like_event_source(self) -> bool:
        """Whether the client sends what a browser's `EventSource` sends, which gives up for good at a 503.

        So do many libraries, some of which don't reconnect: it is no proof of a browser.
        """
        headers = self.headers
        return (
            self.method == "GET"
            and "text/event-stream" in headers.get("accept", "")
            and "no-cache" in headers.get("cache-control", "")
        )

    @property
    def from_browser(self) -> bool:
        """Whether a browser's `EventSource` sent it, as far as headers tell.

        Libraries outside of a browser have other names. A page's `fetch` with `cache: "no-store"` looks the same.
        """
        return self.like_event_source and self.headers.get("user-agent", "").startswith("Mozilla/")

    @property
    def preamble(self) -> bytes:
        """What an event stream begins with for a client that keeps half an event over a reset: see `wire.cut`.

        WebKit does, and npm's `eventsource` 2, which is recognized by sending no `User-Agent`. b"" for other clients:
        some (httpx-sse, sseclient) hand over an event that has a name and no data.
        """
        if not self.like_event_source or not self.headers.get("user-agent", "Mozilla/").startswith("Mozilla/"):
            return b""
        try:
            return cut(self.last_event_id)
        except BadRequest:  # the query can't be read, and the request is being refused for another reason
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
        """Take the route's path parameters, and read query and body as it declares. Raises the 4xx that fits.

        The body is counted in its `Room` before it is read: an upload as one, of another the bytes as they come.
        """
        self.route, self.path_params = route, params
        if route.query is not None:
            self.query = _convert(self._query_values(route), route.query)
        if isinstance(route.body, Upload):
            self._check_media_type([route.body.media_type])
            self._room = uploads
            self._hold(1)
            # Without a name: gone with the last who holds it, after a crash too.
            self.body = self._upload = SpooledTemporaryFile(SPOOL_BYTES)
            try:
                await self._read(route.body.max_bytes or max_upload_bytes, self._upload)
            except OSError as error:
                raise Unavailable(
                    f"the upload can't be stored ({error.strerror}) and was not used: free space in the server's "
                    "folder for temporary files (TMPDIR), then send it again"
                ) from error
        elif route.body is not None:
            self._check_media_type(route.media_types)
            self._room = body_bytes
            body = BytesIO()
            await self._read(max_body_bytes, body)
            self.raw_body = body.getvalue().removeprefix(codecs.BOM_UTF8)  # RFC 8259, 8.1: it may be ignored
            self.body = _decode_json(self.raw_body, route.body)

    def _check_media_type(self, expected: Sequence[str]) -> None:
        given = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given not in expected:
            raise UnsupportedMediaType(f"the body must be {expected[0]}, not {given or 'without a content-type'}")
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
        """The body's next part, whether more follows, and how long that may take: only waiting for it counts."""
        message = None
        while message is None:
            began = anyio.current_time()
            with anyio.move_on_after(wait_s):
                message = await self._receive()
            waited_s = anyio.current_time() - began
            if message is None:
                if waited_s < wait_s + LATE_S:
                    raise RequestTimeout("the body stopped coming, or came too slowly")
                wait_s = LATE_S
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left before its request was complete")
        body: bytes = message.get("body", b"")
        wait_s = min(max(wait_s - waited_s, 0) + len(body) / MIN_BODY_BYTES_PER_S, BODY_TIMEOUT_S)
        return body, message.get("more_body", False), wait_s

    async def _read(self, limit: int, file: IO[bytes]) -> None:
        """Write the body into `file`, at most `limit` bytes of it; off the loop where that may mean the disk."""
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
            raise TooLarge(f"the body may have {limit} bytes at most")
        size, more, wait_s, digest = 0, True, BODY_TIMEOUT_S, hashlib.sha256()
        while more:
            part, more, wait_s = await self._part(wait_s)
            size += len(part)
            digest.update(part)
            if size > limit:
                raise TooLarge(f"the body may have {limit} bytes at most")
            if self._upload is None:
                self._hold(len(part))
            if self._upload is None or size <= SPOOL_BYTES:
                file.write(part)
            else:
                await anyio.to_thread.run_sync(file.write, part)
            del part  # not for as long as the next one takes
        file.seek(0)
        self.body_digest = digest.hexdigest()

    def for_run(self, id: str) -> "Request":
        """A copy for the handler of a run, without the connection: what ends a reader says nothing about the run."""
        request = copy.copy(self)
        request.forget()
        request.run_id = id
        request._receive = no_connection
        return request

    def hand_over(self) -> None:
        """A run has taken what the request holds: its own copy of it will give it back."""
        self._upload = self._room = None

    def outlive(self, *, whole: bool) -> RequestFacts:
        """What is left when the server's call has returned, in which nothing is received any more."""
        if whole:
            self.forget()
            self.scope = {**self.scope, "extensions": {}}  # which keep the connection
            self._receive = no_connection
            return self
        self.close()
        facts = RequestFacts(self.method)
        for name in RequestFacts.__slots__:
            setattr(facts, name, getattr(self, name))
        return facts

    def forget(self) -> None:
        """What was decoded of the head is decoded again if somebody asks: 0.5 KiB for each connection that stays."""
        for name in ("headers", "query_params", "last_event_id"):
            self.__dict__.pop(name, None)

    def close(self) -> None:
        """Give back what the request holds: the spooled body, and its body's room."""
        if self._upload is not None:
            with suppress(OSError):  # of a full disk: it writes what is still buffered
                self._upload.close()
        if self._room is not None:
            self._room.give_back(self.caller, self._held)
            self._room = None

    async def disconnect(self) -> None:
        """Wait until the client has left, or has sent more than `MAX_UNREAD_BYTES`, which are thrown away.

        Only after the body's end.
        """
        unread = 0
        while unread <= MAX_UNREAD_BYTES and (message := await self._receive())["type"] != "http.disconnect":
            unread += len(message.get("body", b""))


async def no_connection() -> Any:
    """What a request without a connection receives."""
    raise RuntimeError("this request has no connection any more: its body was read before")


class _Unfit(ValueError):
    """What a model of pydantic's says of its first mistake, and where it is, below the model."""

    def __init__(self, error: Any) -> None:
        first = error.errors(include_url=False)[0]
        super().__init__(first["msg"])
        self.place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])


def _model(kind: Any, value: Any, *, json: bool) -> Any:
    """A model of pydantic's out of what JSON gave, or out of a query's strings."""
    try:
        return kind.model_validate_json(msgspec.json.encode(value)) if json else kind.model_validate(value)
    except ValueError as error:
        if not hasattr(error, "errors"):
            raise
        raise _Unfit(error) from None


def _convert(values: Mapping[str, Any], kind: Any) -> Any:
    try:
        return msgspec.convert(values, kind, strict=False, dec_hook=partial(_model, json=False))
    except msgspec.ValidationError as error:
        raise _bad(error, kind) from None


def _decode_json(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind, dec_hook=partial(_model, json=True))
    except msgspec.ValidationError as error:
        raise _bad(error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        what = "it has half of a surrogate pair: a character was cut in two" if _has_half(body) else str(error)
        raise BadRequest(f"the body is not JSON: {what}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None


def _has_half(body: bytes) -> bool:
    """Whether half of a surrogate pair is all that is wrong: JavaScript's `slice` cuts an emoji so, and msgspec calls
    the input "truncated" then."""
    if not _SURROGATE.search(body):
        return False
    with suppress(ValueError, RecursionError):
        json.loads(body)
        return True
    return False


def _bad(error: msgspec.ValidationError, kind: Any) -> BadRequest:
    """What msgspec says, with the field to blame.

    It says "Expected `int` >= 0 - at `$.count`", "Object missing required field `title` - at `$[0]`", or of a key
    "Expected `int`, got `str` - at `key` in `$.by_number`". Of a word out of a list it quotes the value as it came,
    however long, whatever stands in it: "Invalid enum value 'x' - at `$.status`". It doesn't say what the list is.
    """
    whole = str(error)
    text, _, place = whole.rpartition(" - at ") if " - at " in whole else (whole, "", "")
    path = place.rpartition(" in ")[2].strip("`").removeprefix("$")
    if text.startswith("Invalid enum value") and (choices := _choices(types.type_info(kind), path)):
        text = f"expected {' or '.join(choices)}"
    if missing := _MISSING_FIELD.fullmatch(text):
        path += f".{missing[1]}"
    if isinstance(error.__cause__, _Unfit):
        path += error.__cause__.place
    field = path.removeprefix(".") or None
    if len(text) > MAX_ERROR_CHARS:
        text = f"{text[:MAX_ERROR_CHARS]}…"
    return BadRequest(f"{field}: {text}" if field else text, field=field)


def _choices(info: Any, path: str) -> list[str]:
    """The words that may stand at a place of msgspec's within a type: `.status`, `[...].kind`."""
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
