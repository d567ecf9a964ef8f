"""The request: a read-only view of the scope, and the only one who calls `receive`.

Order matters with `receive`: the body is read first, to its end; then the watcher waits for the disconnect. A watcher
that starts earlier takes the body's parts away from whoever wants them.

Boundary of trust: all that a request holds comes from outside. The query and the body are bounded and decoded into the
types that the route declares before a handler sees them; `BadRequest` names the field that is to blame.
"""

import hashlib
import re
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import cached_property
from io import BytesIO
from tempfile import SpooledTemporaryFile
from typing import IO, Any, Final, Literal, NamedTuple
from urllib.parse import parse_qsl

import anyio
import msgspec

from ssecore.errors import (
    BadRequest,
    ClientGone,
    NotRunning,
    SSEAppError,
    TooLarge,
    Unavailable,
    UnsupportedMediaType,
)
from ssecore.routes import Route, Upload
from ssecore.tokens import Credential

__all__ = ["EndReason", "Receive", "Request", "Services"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
EndReason = Literal["client", "timeout", "slow", "drain", "finished", "failed", "cancelled", "unauthorized"]

#: How long a client may pause in the middle of its body. nginx's client_body_timeout is 60.
BODY_TIMEOUT_S: Final = 30.0
#: More names than any form of ours has; each one costs memory before it is looked at.
MAX_QUERY_FIELDS: Final = 100
#: Of what is told about a value that can't be used, and quotes it.
MAX_ERROR_CHARS: Final = 200
#: An upload smaller than this never touches the disk.
SPOOL_BYTES: Final = 1024 * 1024

_MISSING_FIELD: Final = re.compile(r"Object (?:missing required|contains unknown) field `(.+)`", re.DOTALL)


class RequestTimeout(SSEAppError):
    """The body stopped coming for `BODY_TIMEOUT_S`."""

    status, code = 408, "request_timeout"


class Services(NamedTuple):
    """What of the engine a handler finds in its request. (`runs` and `topics` import this module, not the reverse.)"""

    runs: Any
    topics: Any
    metrics: Any


class Request:
    """What a handler gets as its first argument.

    `state` is what the app's lifespan made (database, model, …); `query` and `body` are decoded as the route declares.
    """

    # In the class: most requests leave them as they are.
    credential: Credential | None = None  #: what it showed, where that may end before the request does
    answer_headers: Sequence[tuple[bytes, bytes]] = ()  #: what every answer to it carries besides its own headers
    has_place = False  #: counted as a stream

    def __init__(
        self,
        scope: MutableMapping[str, Any],
        receive: Receive,
        state: Any = None,
        *,
        services: "Services | None" = None,
        draining: bool = False,
    ) -> None:
        self.scope = scope
        self.state = state
        self.draining = draining  #: the service is about to stop
        self.method: str = scope["method"]
        self.root_path: str = scope.get("root_path", "")
        self.route: Route | None = None
        self.path_params: Mapping[str, Any] = {}
        self.query: Any = None
        self.body: Any = None
        self.raw_body = b""  #: a JSON body as it came
        self._receive = receive
        self.body_digest = ""  #: SHA-256 of the body as it came, where the route declares one
        self.caller: str | None = None  #: the name of whoever asks; `None` where nobody has one
        self.run_id: str | None = None  #: the run's, in the handler of one
        #: Set by the handler of a run that tells of its failure in words of its own: the run's state is `failed` then.
        self.failed = False
        self._services = services
        self._upload: SpooledTemporaryFile[bytes] | None = None
        self._end_reason: EndReason | None = None

    @property
    def data_only(self) -> bool:
        """Whether the route speaks in data-only events."""
        return self.route is not None and self.route.data_only

    @property
    def running(self) -> bool:
        """Whether the app ran when the request came."""
        return self._services is not None

    @property
    def runs(self) -> Any:
        """The app's `Runs`."""
        return self._running().runs

    @property
    def topics(self) -> Any:
        """The app's `Topics`."""
        return self._running().topics

    @property
    def metrics(self) -> Any:
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
        root = self.root_path.rstrip("/")
        if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
            path = path[len(root) :]
        return path or "/"

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case; several headers of one name are joined by a comma (RFC 9110, 5.2).

        Made anew each time: a stream that is open for hours would keep 0.5 KiB of it.
        """
        headers: dict[str, str] = {}
        for raw_name, raw_value in self.scope["headers"]:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return headers

    @cached_property
    def query_params(self) -> Mapping[str, str]:
        """The query as it came. Raises `BadRequest` for a name given twice, and for what is not UTF-8."""
        try:
            text = self.scope.get("query_string", b"").decode("ascii")
            pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS)
        except ValueError as error:
            raise BadRequest(f"the query can't be read: {error}") from None
        params = dict(pairs)
        if len(params) != len(pairs):
            twice = next(name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1)
            raise BadRequest(f"{twice!r:.60} is given twice", field=twice[:60])
        return params

    @cached_property
    def last_event_id(self) -> str:
        """The cursor that the client brings: the header, else `?last_event_id=`; "" is none."""
        return self.headers.get("last-event-id") or self.query_params.get("last_event_id", "")

    @property
    def wants_event_stream(self) -> bool:
        return "text/event-stream" in self.headers.get("accept", "")

    @property
    def is_event_source(self) -> bool:
        """A browser's own `EventSource`, which gives up for good at any status but 200 and 204.

        The Fetch standard makes it send `Cache-Control: no-cache`; other clients don't.
        """
        return self.wants_event_stream and "no-cache" in self.headers.get("cache-control", "")

    @property
    def end_reason(self) -> EndReason:
        """Why the stream ended, for the `finally` of its generator.

        `client` it left, `timeout` its longest life is over, `slow` it stopped reading, `drain` the service stops,
        `cancelled` somebody cancelled it, `unauthorized` the caller's token has ended. Where it was none of these the
        generator ends by itself: `failed` while an exception goes through it, else `finished`.
        """
        if self._end_reason is not None:
            return self._end_reason
        return "finished" if sys.exc_info()[0] in (None, GeneratorExit) else "failed"

    async def decode(self, route: Route, params: Mapping[str, Any], max_body_bytes: int, max_upload_bytes: int) -> None:
        """Take the route's path parameters, and read query and body as it declares. Raises the 4xx that fits."""
        self.route, self.path_params = route, params
        if route.query is not None:
            self.query = _convert(dict(self.query_params), route.query)
        if isinstance(route.body, Upload):
            self._check_media_type(route.body.media_type)
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
            self._check_media_type("application/json")
            body = BytesIO()
            await self._read(max_body_bytes, body)
            self.raw_body = body.getvalue()
            self.body = _decode_json(self.raw_body, route.body)

    def _check_media_type(self, expected: str) -> None:
        given = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != expected:
            raise UnsupportedMediaType(f"the body must be {expected}, not {given or 'without a content-type'}")

    async def _part(self) -> tuple[bytes, bool]:
        """The body's next part, and whether more follows."""
        message = None
        with anyio.move_on_after(BODY_TIMEOUT_S):
            message = await self._receive()
        if message is None:
            raise RequestTimeout("the body stopped coming")
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left before its request was complete")
        return message.get("body", b""), message.get("more_body", False)

    async def _read(self, limit: int, file: IO[bytes]) -> None:
        """Write the body into `file`, at most `limit` bytes of it; off the loop where that may mean the disk."""
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
            raise TooLarge(f"the body may have {limit} bytes at most")
        size, more, digest = 0, True, hashlib.sha256()
        while more:
            part, more = await self._part()
            size += len(part)
            digest.update(part)
            if size > limit:
                raise TooLarge(f"the body may have {limit} bytes at most")
            if size <= SPOOL_BYTES:
                file.write(part)
            else:
                await anyio.to_thread.run_sync(file.write, part)
        file.seek(0)
        self.body_digest = digest.hexdigest()

    def hand_over(self) -> None:
        """A run has taken what the request holds: its own copy of it will give it back."""
        self._upload = None

    def forget(self) -> None:
        """What was decoded of the head is decoded again if somebody asks: 0.5 KiB for each connection that stays."""
        for name in ("headers", "query_params", "last_event_id"):
            self.__dict__.pop(name, None)

    def close(self) -> None:
        """Give back what the request holds: the spooled body."""
        if self._upload is not None:
            with suppress(OSError):  # of a full disk: it writes what is still buffered
                self._upload.close()

    async def disconnect(self) -> None:
        """Wait until the client has left. Only after the body's end; what it still sends is thrown away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _convert(values: Mapping[str, str], kind: Any) -> Any:
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _bad(error) from None


def _decode_json(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _bad(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None


def _bad(error: msgspec.ValidationError) -> BadRequest:
    """What msgspec says, with the field to blame.

    It says "Expected `int` >= 0 - at `$.count`", "Object missing required field `title` - at `$[0]`", or of a key
    "Expected `int`, got `str` - at `key` in `$.by_number`". Of a word out of a list it quotes the value as it came,
    however long, whatever stands in it: "Invalid enum value 'x' - at `$.status`".
    """
    whole = str(error)
    text, _, place = whole.rpartition(" - at ") if " - at " in whole else (whole, "", "")
    path = place.rpartition(" in ")[2].strip("`").removeprefix("$")
    if missing := _MISSING_FIELD.fullmatch(text):
        path += f".{missing[1]}"
    field = path.removeprefix(".") or None
    if len(text) > MAX_ERROR_CHARS:
        text = f"{text[:MAX_ERROR_CHARS]}…"
    return BadRequest(f"{field}: {text}" if field else text, field=field)
