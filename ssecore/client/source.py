"""A client for event streams that reconnects and resumes. docs/clients.md describes its behaviour.

1.  The stream ends at a 204, at the id `end`, and after a complete response without ids: another request would repeat
    the work. After any other response the client reconnects, like `EventSource`.
2.  Only GET, a resume from an id and a request with an `Idempotency-Key` are sent twice; any other request only if the
    server did not process it: no connection, 425, 429, 503.
3.  The reader has its own task, so cancelling a wait for an event loses neither an event nor the connection.

Boundary of trust: the server. Limits apply to events, headers (100 KiB, h11's own), redirects, refusals and pauses. The
caller's headers, such as credentials, are sent to no other origin.
"""

import logging
import random
import re
import ssl
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, Literal, Self

import anyio
import httpx
import orjson
from anyio import current_time
from anyio.abc import TaskGroup

from ssecore.client.outbound import http_client
from ssecore.errors import TooLarge, UpstreamError
from ssecore.wire import CONTENT_TYPE, DEFAULT_MAX_EVENT_BYTES, Decoder, Event

__all__ = [
    "Broken",
    "GapError",
    "GaveUp",
    "Refused",
    "Source",
    "SourceError",
    "batches",
    "connect",
    "is_gap",
    "json_object",
]

logger = logging.getLogger("sseapp")

#: Four heartbeats of our server: one may be lost.
IDLE_TIMEOUT_S: Final = 60.0
#: Longer than a restart of a service behind a proxy.
GIVE_UP_S: Final = 300.0
CONNECT_TIMEOUT_S: Final = 10.0
#: Some servers don't answer TLS's close_notify.
CLOSE_TIMEOUT_S: Final = 2.0
#: Random part of a pause: the first one, minimum, maximum.
BACKOFF_S: Final = 1.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 30.0
#: Limit for `retry:` and `Retry-After`.
MAX_ASKED_S: Final = 3600.0
#: Resets the backoff even without an event.
STEADY_S: Final = 10.0
#: Browsers follow 20.
MAX_REDIRECTS: Final = 10
MAX_PROBLEM_BYTES, PROBLEM_TIMEOUT_S = 64 * 1024, 5.0
MAX_TEXT: Final = 1000
#: Servers refuse heads above 8 to 16 KiB.
MAX_ID_BYTES: Final = 4096

_REPEATABLE: Final = frozenset(["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
#: The request was not processed.
_NOT_DONE: Final = frozenset([425, 429, 503])
_TRANSIENT: Final = _NOT_DONE | {408}
_FROM_PROXIES: Final = frozenset([502, 504])
#: h11 refuses control characters in a header, and strips white space.
_UNSENDABLE: Final = re.compile(r"[\x00-\x1f\x7f]|^\s|\s$")
_FAILURES: Final = ("error", "cancelled")
_RUN_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BODY_HEADERS: Final = ("content-type", "content-length", "transfer-encoding", "idempotency-key")


class SourceError(UpstreamError):
    """Base class. Texts never contain the URL."""

    code = "source_error"


class Refused(SourceError):
    """A 4xx or 5xx that a retry won't change."""

    code = "refused"

    def __init__(self, upstream_status: int, problem: Mapping[str, Any]) -> None:
        #: The server's; `status` is our service's.
        self.upstream_status = upstream_status
        #: Its members (RFC 9457), if the body was one.
        self.problem = dict(problem)
        text = self.problem.get("detail") or self.problem.get("title")
        phrase = httpx.codes.get_reason_phrase(upstream_status)
        super().__init__(f"{upstream_status} {phrase}".rstrip() + (f": {str(text)[:MAX_TEXT]}" if text else ""))


class Broken(SourceError):
    """It can't be resumed: no ids, or a request that may not be repeated."""

    code = "broken"


class GaveUp(SourceError):
    """No stream for `give_up_s`. Try again later with `last_event_id`."""

    code = "gave_up"


class GapError(SourceError):
    """Iterate again to continue after the gap."""

    code = "gap"

    def __init__(self, event: Event) -> None:
        #: Its data is `{"reason", "from", "to"}`.
        self.event = event
        super().__init__(f"events were lost: {event.data}")


class _Lost(Exception):
    def __init__(self, text: str, *, after_s: float = 0, at_once: bool = False) -> None:
        super().__init__(text)
        self.after_s = after_s
        self.at_once = at_once


class Source:
    """A stream's events, for `async with` and `async for` in one task at a time. Raises `SourceError`.

    `client`: an httpx client, which is not closed.
    `gaps`: raise `GapError` for a `gap` event, or yield the event.
    `once`: for servers that send ids but can't resume.
    `idle_timeout_s`: limit without a byte. `give_up_s`: limit without a stream. `None` turns a limit off.

    A handler may yield inside the block: a failure of the reader never cancels it.
    """

    def __init__(
        self,
        url: str | httpx.URL,
        *,
        method: str | None = None,
        json: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        client: httpx.AsyncClient | None = None,
        last_event_id: str = "",
        gaps: Literal["raise", "yield"] = "raise",
        once: bool = False,
        idle_timeout_s: float | None = IDLE_TIMEOUT_S,
        give_up_s: float | None = GIVE_UP_S,
        max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES,
    ) -> None:
        #: Of the last event delivered.
        self.last_event_id = last_event_id
        #: Set by the first response of a run.
        self.run_id: str | None = None
        self._gaps = gaps
        self._once = once
        self._idle_timeout_s = idle_timeout_s
        self._give_up_s = give_up_s
        self._given_client = client
        body = {"json": json} if json is not None else {"content": content} if content is not None else {}
        method = (method or ("POST" if body else "GET")).upper()
        self._request: dict[str, Any] = {"method": method, "url": url, "headers": httpx.Headers(headers), **body}
        self._decoder = Decoder(max_event_bytes=max_event_bytes)
        self._last_two: deque[Event] = deque(maxlen=2)
        self._first_id: str | None = None  # to detect a server that restarts the stream
        self._received = False  # an event, on this connection
        # Between the reader's task and the iterating one (rule 3).
        self._ready: deque[Event] = deque()
        self._arrived = anyio.Event()
        self._wanted = anyio.Event()
        self._waiting = False
        self._end: Exception | None = None
        self._started = False

    async def __aenter__(self) -> Self:
        self._client = self._given_client or http_client()
        self._tasks: TaskGroup = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._tasks.cancel_scope.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)  # without the error, which the group would wrap
        finally:
            if self._given_client is None:
                with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                    await self._client.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if not self._ready:
            await self._wait()
        event = self._ready.popleft()
        if event.id is not None:
            self.last_event_id = event.id
        if self._gaps == "raise" and is_gap(event):
            raise GapError(event)
        return event

    async def _wait(self) -> None:
        if self._waiting:
            raise RuntimeError("a source is read by one task at a time")
        if not self._started:
            self._started = True
            self._decoder.last_event_id = self.last_event_id
            self._tasks.start_soon(self._read)
        self._waiting = True
        try:
            while not self._ready:
                if self._end is not None:
                    raise self._end
                self._arrived = anyio.Event()
                self._wanted.set()
                await self._arrived.wait()
        finally:
            self._waiting = False

    def resume_from(self, last_event_id: str, first_event_id: str | None = None) -> None:
        """Begin after this event. `first_event_id`, the stream's first, is for detecting a server that restarts it."""
        if self._started:
            raise RuntimeError("the source is being read already: call this before its first event")
        self.last_event_id, self._first_id = last_event_id, first_event_id

    @property
    def failed(self) -> bool:
        """Whether the last event before `[DONE]` was our server's `error` or `cancelled`."""
        words = [event for event in self._last_two if event.data != "[DONE]"]
        if not words:
            return False
        name = words[-1].event
        return (json_object(words[-1].data).get("type") if name is None else name) in _FAILURES

    async def _read(self) -> None:
        try:
            await self._read_connections()
            self._end = StopAsyncIteration()
        except Exception as error:
            self._end = error
        self._arrived.set()

    async def _read_connections(self) -> None:
        attempt, lost_at = 0, current_time()
        while True:
            began, self._received = current_time(), False
            try:
                await self._connection()
                return
            except _Lost as error:
                lost = error
            if self._received or current_time() - began > STEADY_S:
                attempt, lost_at = 0, current_time()
            pause_s = self._pause_s(lost, attempt)
            if self._give_up_s is not None and current_time() + pause_s - lost_at > self._give_up_s:
                raise GaveUp(f"no stream for {self._give_up_s:g} s: {lost}") from lost
            attempt += 1
            logger.log(logging.DEBUG if lost.at_once else logging.INFO, "%s; again in %.1f s", lost, pause_s)
            await anyio.sleep(pause_s)

    def _pause_s(self, lost: _Lost, attempt: int) -> float:
        """The server's pause plus full jitter."""
        if lost.at_once and not attempt:
            return 0
        retry_ms = self._decoder.retry_ms
        retry_s = min((retry_ms or 0) / 1000, MAX_ASKED_S)
        first_s = BACKOFF_S if retry_ms is None else min(max(retry_s, MIN_BACKOFF_S), BACKOFF_S)
        most_s = min(first_s * 2 ** min(attempt, 10), MAX_BACKOFF_S)
        return max(retry_s, lost.after_s) + random.uniform(0, most_s)

    async def _connection(self) -> None:
        resumed_from = self._decoder.last_event_id
        response = await self._open()
        if response is None:
            return
        try:
            lost = await self._receive(response, resumed_from)
        finally:
            await response.aclose()
        if self._decoder.last_event_id == "end":
            return
        ended = lost is None and not self._decoder.farewell
        if ended and (self._once or not self._resumable()):
            return
        text = lost or ("the response has ended" if ended else "the server asked to reconnect")
        if self._resumable() or (not self._last_two and self._may_repeat()):
            raise _Lost(text, at_once=ended and self.run_id is not None)
        raise Broken(f"{text}, and the stream can't be resumed: {self._why_not()}. Start it again.")

    def _resumable(self) -> bool:
        return bool(self._decoder.last_event_id) and _sendable(self._decoder.last_event_id) and self._may_repeat()

    def _may_repeat(self) -> bool:  # rule 2
        headers, goes_on = self._request["headers"], self.run_id is not None and bool(self._decoder.last_event_id)
        return self._request["method"] in _REPEATABLE or "idempotency-key" in headers or goes_on

    def _why_not(self) -> str:
        if not self._may_repeat():
            return f"a {self._request['method']} without an Idempotency-Key may not be sent twice"
        return "its id can't be sent back" if self._decoder.last_event_id else "its events have no ids"

    async def _receive(self, response: httpx.Response, resumed_from: str) -> str | None:
        """Returns `None` for a complete response, else what ended it."""
        self._decoder.reset()
        try:
            async with _chunks(response) as chunks:
                while True:
                    with anyio.fail_after(self._idle_timeout_s):
                        chunk = await anext(chunks, None)
                    if events := self._decoder.feed(chunk or b""):  # b"" only raises `TooLarge`
                        await self._deliver(events, resumed_from)
                    if chunk is None:
                        break
        except TooLarge as error:
            raise SourceError(f"{error}: raise max_event_bytes if such events are expected") from error
        except TimeoutError:
            return f"no byte for {self._idle_timeout_s:g} s"
        except httpx.TransportError as error:
            return f"the connection broke: {error or type(error).__name__}"
        return "the response ended within an event" if self._decoder.unfinished else None

    async def _deliver(self, events: list[Event], resumed_from: str) -> None:
        first = events[0].id
        if self._first_id is None:
            if self._decoder.last_event_id:
                self._first_id = next((event.id for event in events if event.id), None)
        elif not self._received and first == self._first_id != resumed_from:
            raise SourceError("the server restarted the stream instead of resuming it: it ignores Last-Event-ID")
        self._received = True
        self._last_two.extend(events[-2:])
        self._ready.extend(events)
        self._arrived.set()
        while self._ready:
            self._wanted = anyio.Event()
            await self._wanted.wait()

    async def _open(self) -> httpx.Response | None:
        request = self._next_request()
        for _ in range(MAX_REDIRECTS + 1):
            response, following = await self._send(request), None
            try:
                following = await self._classify(response)
            finally:
                if following is not response:
                    with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                        await response.aclose()
            if not isinstance(following, httpx.Request):
                return following
            request = following
        raise SourceError(f"more than {MAX_REDIRECTS} redirects")

    def _next_request(self) -> httpx.Request:
        headers = httpx.Headers(self._request["headers"], encoding="utf-8")
        # No `cache-control: no-cache`: our server would answer as to a browser.
        headers.setdefault("accept", CONTENT_TYPE)
        headers["accept-encoding"] = "identity"
        last = self._decoder.last_event_id
        if last and _sendable(last):
            headers["last-event-id"] = last
        # Our own limits count bytes, with any transport.
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        return self._client.build_request(**{**self._request, "headers": headers, "timeout": timeout})

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            with anyio.fail_after(self._idle_timeout_s):
                return await self._client.send(request, stream=True, follow_redirects=False)
        except httpx.UnsupportedProtocol as error:
            raise SourceError("the URL must begin with http:// or https://") from error
        except httpx.LocalProtocolError as error:  # its text may contain the token
            raise SourceError("the request can't be sent: a header has an invalid character") from error
        except (TimeoutError, httpx.TransportError) as error:
            causes = list(_causes(error))
            if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
                raise SourceError(f"can't verify the server's certificate: {error}") from error
            if isinstance(error, httpx.RemoteProtocolError) and len(causes) > 2:  # h11 refused it: not just an end
                raise SourceError(f"the server's response can't be read: {error}") from error
            text = f"no response: {error or type(error).__name__}"
            if isinstance(error, TimeoutError):
                text = f"no response within {self._idle_timeout_s:g} s"
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
            raise self._lost(text, done=not unsent) from error

    def _lost(self, text: str, *, done: bool, after_s: float = 0) -> Exception:
        """`done`: the server may have processed the request."""
        if done and not self._may_repeat() and not self._decoder.last_event_id:
            return Broken(f"{text}; the server may have processed the request, and {self._why_not()}")
        return _Lost(text, after_s=after_s)

    async def _classify(self, response: httpx.Response) -> httpx.Response | httpx.Request | None:
        """The stream's response, the next request, or `None` at the end."""
        status = response.status_code
        if status == 204:
            return None
        if (request := response.next_request) is not None:
            if not _same_origin(response.url, request.url):
                # httpx removes only `Authorization`.
                for name in self._request["headers"].keys() - {"accept", "content-type"}:
                    request.headers.pop(name, None)
            return request
        if status == 202 and "location" in response.headers:
            self._continue_at(response, response.headers["location"])
            return self._next_request()
        if status != 200:
            raise await self._refusal(response)
        media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != CONTENT_TYPE:
            raise SourceError(f"the response's Content-Type is {media_type or 'missing'}, not {CONTENT_TYPE}")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise SourceError("the response is compressed, though the request asked for no compression")
        run = response.headers.get("run-id", "")
        if _RUN_ID.fullmatch(run):
            self.run_id = run
            if self._request["method"] != "GET" and "content-location" in response.headers:
                self._continue_at(response, response.headers["content-location"])
        return response

    def _continue_at(self, response: httpx.Response, location: str) -> None:
        url = response.url.join(location)
        if not _same_origin(response.url, url):
            raise SourceError("the run's events are on another server: connect there yourself")
        headers = self._request["headers"].copy()
        for name in _BODY_HEADERS:
            headers.pop(name, None)
        self._request = {"method": "GET", "url": url, "headers": headers}

    async def _refusal(self, response: httpx.Response) -> Exception:
        status, after_s = response.status_code, _retry_after_s(response)
        problem = await _problem(response)
        transient = (
            status in _TRANSIENT
            or (status in _FROM_PROXIES and "problem+json" not in response.headers.get("content-type", ""))
            or (status >= 500 and after_s is not None)
        )
        refused = Refused(status, problem)
        if not transient:
            return refused
        return self._lost(str(refused), done=status not in _NOT_DONE, after_s=after_s or 0)


connect = Source


def is_gap(event: Event) -> bool:
    """Whether it is our server's `gap`: by name, or by `type` on a data-only stream."""
    if event.event != "gap" and not (event.event is None and event.data.startswith('{"type":"gap"')):
        return False
    return json_object(event.data).get("reason") in ("trimmed", "diverged", "expired")


def json_object(text: str | bytes) -> dict[str, Any]:
    """`{}` for anything else."""
    try:
        data = orjson.loads(text)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


async def batches(source: Source, size: int, within_s: float) -> AsyncGenerator[list[Event], None]:
    """Yield lists of up to `size` events, each when it is full or `within_s` after its first event.

    Closing the iterator loses an unfinished batch.
    """
    if size < 1:
        raise ValueError(f"size is {size}: a batch has at least one event")
    ended: Exception | None = None
    while ended is None:
        batch: list[Event] = []
        try:
            batch.append(await anext(source))
            with anyio.move_on_after(within_s):
                while len(batch) < size:
                    batch.append(await anext(source))
        except Exception as error:
            ended = error
        if batch:
            yield batch
    if not isinstance(ended, StopAsyncIteration):
        raise ended


@asynccontextmanager
async def _chunks(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body. `aclose` of httpx's outermost generator leaves the inner ones to the garbage collector (an error under
    trio); a cancellation ends all of them."""
    chunks = response.aiter_raw()
    try:
        yield chunks
    finally:
        with anyio.CancelScope() as scope, suppress(httpx.TransportError):
            scope.cancel()
            while await anext(chunks, None) is not None:
                pass


async def _problem(response: httpx.Response) -> Mapping[str, Any]:
    """A problem's members; of a plain text, the first line as `detail`."""
    body = b""
    with suppress(httpx.TransportError), anyio.move_on_after(PROBLEM_TIMEOUT_S):
        async with _chunks(response) as chunks:
            async for chunk in chunks:
                body += chunk[: MAX_PROBLEM_BYTES - len(body)]
                if len(body) == MAX_PROBLEM_BYTES:
                    break
    media_type = response.headers.get("content-type", "")
    if "json" in media_type:
        return json_object(body)
    if media_type.startswith("text/plain"):
        return {"detail": body.decode(errors="replace").partition("\n")[0][:200]}
    return {}


def _retry_after_s(response: httpx.Response) -> float | None:
    """A date or a number of seconds (RFC 9110, 10.2.3)."""
    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text[:9]), MAX_ASKED_S)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return min(max((date - datetime.now(UTC)).total_seconds(), 0), MAX_ASKED_S)


def _sendable(id: str) -> bool:
    return len(id.encode()) <= MAX_ID_BYTES and _UNSENDABLE.search(id) is None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _same_origin(one: httpx.URL, other: httpx.URL) -> bool:
    return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)
