"""Run an ASGI app in-process, including endless streams and disconnects. docs/testing.md has examples."""

import asyncio
import json
import math
import selectors
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager
from types import EllipsisType
from typing import Any, Self

import anyio
import httpx
from anyio.abc import TaskGroup

from ssecore.wire import CONTENT_TYPE, Decoder, Event

__all__ = ["Exchange", "Transport", "VirtualClockLoop", "assert_stream", "connect", "lifespan", "opening"]

App = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
]


class Exchange:
    """A request and its response in progress."""

    def __init__(self, scope: MutableMapping[str, Any], body: Sequence[bytes], window: float) -> None:
        self.scope = scope
        # Valid once `started` is set:
        self.status = 0
        self.headers: dict[str, str] = {}  #: names in lower case
        self.raw_headers: list[tuple[bytes, bytes]] = []
        self.started = anyio.Event()
        self.ended = anyio.Event()  #: the app has returned
        self.complete = False  #: the body is
        self.failure: BaseException | None = None  #: raised by the app
        self._to_app = list(body) or [b""]
        self._left = anyio.Event()
        self._open = anyio.Event()
        self._open.set()
        self._sending = False
        self._chunks_in, self._chunks = anyio.create_memory_object_stream[bytes](window)
        self._decoder = Decoder()
        self._events: deque[Event] = deque()

    async def run(self, app: App) -> None:
        try:
            await app(self.scope, self._receive, self._send)
        except Exception as error:
            self.failure = error
        finally:
            self._chunks_in.close()
            self.ended.set()
            self.started.set()

    async def _receive(self) -> dict[str, Any]:
        if self._to_app:
            part = self._to_app.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._to_app)}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        # ASGI doesn't define concurrent sends.
        assert not self._sending, "send was entered while another send was in flight"
        self._sending = True
        try:
            # Like a real server: an await only if it must wait.
            if not self._open.is_set():
                await self._open.wait()
            if message["type"] == "http.response.start":
                assert not self.status, "a second start"
                self.status = message["status"]
                self.raw_headers = list(message["headers"])
                self.headers = {name.decode(): value.decode("latin-1") for name, value in self.raw_headers}
                self.started.set()
            elif message["type"] == "http.response.body" and not self._left.is_set():
                assert self.status, "the body was sent before the start"
                assert not self.complete, "the body was sent after its end"
                if message.get("body"):
                    try:
                        self._chunks_in.send_nowait(message["body"])
                    except anyio.WouldBlock:
                        await self._chunks_in.send(message["body"])
                self.complete = not message.get("more_body", False)
                if self.complete:
                    self._chunks_in.close()
        except anyio.BrokenResourceError:
            pass  # disconnected: servers raise nothing
        finally:
            self._sending = False

    def block(self) -> None:
        """Block `send`, like a client that doesn't read."""
        if self._open.is_set():
            self._open = anyio.Event()

    def unblock(self) -> None:
        self._open.set()

    def disconnect(self) -> None:
        self._left.set()
        self._chunks.close()

    async def chunk(self) -> bytes | None:
        """The next chunk, as the app sent it; `None` at the end. Raises what the app raised."""
        try:
            return await self._chunks.receive()
        except anyio.EndOfStream:
            await self.started.wait()
            if self.failure is not None:
                raise self.failure from None
            return None

    async def body(self) -> bytes:
        """The rest of the body."""
        chunks = []
        while (chunk := await self.chunk()) is not None:
            chunks.append(chunk)
        return b"".join(chunks)

    async def events(self) -> AsyncGenerator[Event, None]:
        """The events from here on. May be called again to continue."""
        while True:
            while self._events:
                yield self._events.popleft()
            chunk = await self.chunk()
            if chunk is None:
                return
            self._events.extend(self._decoder.feed(chunk))


def _exchange(
    method: str = "GET",
    target: str = "/",
    *,
    headers: Mapping[str, str] | Sequence[tuple[bytes, bytes]] | None = None,
    body: bytes | Sequence[bytes] = b"",
    root_path: str = "",
    state: Mapping[str, Any] | None = None,
    window: float = math.inf,
) -> Exchange:
    url = httpx.URL("http://testserver" + target)
    if isinstance(headers, Mapping):
        headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": root_path + url.path,
        "raw_path": url.raw_path.partition(b"?")[0],
        "query_string": url.query,
        "root_path": root_path,
        "headers": list(headers or ()),
        "client": ("127.0.0.1", 50000),
        "server": ("testserver", 80),
        **({} if state is None else {"state": dict(state)}),
    }
    return Exchange(scope, [body] if isinstance(body, bytes) else body, window)


@asynccontextmanager
async def opening(*, leave_s: float = 10) -> AsyncIterator[Callable[..., Exchange]]:
    """Yields a function that opens requests, with the arguments of `connect`. The block's end disconnects all."""
    exchanges: list[Exchange] = []
    tasks = await anyio.create_task_group().__aenter__()

    def open_one(app: App, *arguments: Any, **options: Any) -> Exchange:
        exchange = _exchange(*arguments, **options)
        exchanges.append(exchange)
        tasks.start_soon(exchange.run, app)
        return exchange

    try:
        yield open_one
        for exchange in exchanges:
            await _leave(exchange, leave_s)
    finally:
        for exchange in exchanges:
            exchange.disconnect()
        tasks.cancel_scope.cancel()
        await tasks.__aexit__(None, None, None)  # without the error, which the group would wrap
    for exchange in exchanges:
        if exchange.failure is not None:
            raise exchange.failure


@asynccontextmanager
async def connect(
    app: App,
    method: str = "GET",
    target: str = "/",
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | Sequence[bytes] = b"",
    root_path: str = "",
    state: Mapping[str, Any] | None = None,
    window: float = math.inf,
    leave_s: float = 10,
) -> AsyncIterator[Exchange]:
    """Open a request. The block's end disconnects it; `TimeoutError` if the app doesn't return within `leave_s`.

    `state`: from `lifespan`. `window`: chunks that the app may send before one is read.
    """
    async with opening(leave_s=leave_s) as open_one:
        yield open_one(app, method, target, headers=headers, body=body, root_path=root_path, state=state, window=window)


async def _leave(exchange: Exchange, leave_s: float) -> None:
    exchange.disconnect()
    with anyio.fail_after(leave_s):
        await exchange.ended.wait()


class _Body(httpx.AsyncByteStream):
    def __init__(self, exchange: Exchange, leave_s: float, cut: float) -> None:
        self._exchange = exchange
        self._leave_s = leave_s
        self._left = cut  # bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await self._exchange.chunk()) is not None:
            if len(chunk) >= self._left:
                yield chunk[: int(self._left)]
                raise httpx.ReadError("the connection was cut by the test")
            self._left -= len(chunk)
            yield chunk
        if not self._exchange.complete:
            raise httpx.RemoteProtocolError("the app returned before the response was complete")

    async def aclose(self) -> None:
        await _leave(self._exchange, self._leave_s)
        if self._exchange.failure is not None:
            raise self._exchange.failure


class Transport(httpx.AsyncBaseTransport):
    """Calls an app for httpx. Use the client in an `async with` block, which contains the app's tasks.

    `cuts`: the n-th event stream breaks off after `cuts[n]` bytes.
    """

    def __init__(
        self,
        app: App,
        *,
        root_path: str = "",
        state: Mapping[str, Any] | None = None,
        window: float = 16,
        leave_s: float = 10,
        cuts: Iterable[int] = (),
    ) -> None:
        self._app = app
        self._options: dict[str, Any] = {"root_path": root_path, "state": state, "window": window}
        self._cuts = deque[float](cuts)
        self._leave_s = leave_s
        self._tasks: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        self._tasks = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._tasks is not None
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._tasks is None:
            raise RuntimeError("use `async with httpx.AsyncClient(transport=Transport(app)) as client`")
        headers = [(name.lower(), value) for name, value in request.headers.raw]
        target = request.url.raw_path.decode("ascii")
        body = [part async for part in request.stream]  # type: ignore[union-attr]
        exchange = _exchange(request.method, target, headers=headers, body=body, **self._options)
        self._tasks.start_soon(exchange.run, self._app)
        try:
            await exchange.started.wait()
        finally:
            if not exchange.status:  # cancelled, or no response
                exchange.disconnect()
        if not exchange.status:
            raise exchange.failure or httpx.RemoteProtocolError("the app returned without a response")
        streams = exchange.headers.get("content-type", "").startswith(CONTENT_TYPE)
        cut = self._cuts.popleft() if streams and self._cuts else math.inf
        answer = _Body(exchange, self._leave_s, cut)
        return httpx.Response(exchange.status, headers=exchange.raw_headers, stream=answer)


@asynccontextmanager
async def lifespan(app: App) -> AsyncIterator[dict[str, Any]]:
    """Yields the state for requests. Raises what the app raises, or `RuntimeError` for a `.failed` event."""
    state: dict[str, Any] = {}
    failure: BaseException | None = None
    started, leaving = anyio.Event(), anyio.Event()
    messages = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> dict[str, Any]:
        if started.is_set():
            await leaving.wait()
        return {"type": next(messages)}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal failure
        if message["type"].endswith(".failed"):
            failure = RuntimeError(f"{message['type']}: {message.get('message', '')}")
        started.set()

    async def run() -> None:
        nonlocal failure
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": state}
        try:
            await app(scope, receive, send)
        except Exception as error:
            failure = failure or error
        started.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await started.wait()
        try:
            if failure is None:
                yield state
        except Exception as error:
            failure = error
        leaving.set()
    if failure is not None:
        raise failure


async def assert_stream(
    stream: Exchange | httpx.Response, *expected: Event | tuple[str | None, Any] | EllipsisType, ends: bool = True
) -> list[Event]:
    """Compare a stream with the expected events. Returns the events read.

        await assert_stream(response, ("countdown", {"remaining": 1}), ..., Event("", "complete"))

    A pair is name and data; of an `Event` the set fields are compared. Data other than a string is compared as JSON
    (`unittest.mock.ANY` works). `...` matches any events. The stream must then be complete, unless `ends=False`.
    """
    if isinstance(stream, Exchange):
        await stream.started.wait()
        status, decoded = stream.status, stream.events()
    else:
        status, decoded = stream.status_code, _decoded(stream)
    media_type = stream.headers.get("content-type", "")
    if status != 200 or not media_type.startswith(CONTENT_TYPE):
        raise AssertionError(f"not an event stream: the answer is {status}, {media_type or 'without a Content-Type'}")
    steps, skips = deque[tuple[bool, Event | tuple[str | None, Any]]](), False
    for one in expected:
        if one is ...:
            skips = True
        else:
            steps.append((skips, one))
            skips = False
    received: list[Event] = []
    async with aclosing(decoded) as events:
        while (steps or ends) and (event := await anext(events, None)) is not None:
            received.append(event)
            may_skip, wanted = steps[0] if steps else (skips, None)
            if wanted is not None and _is(event, wanted):
                steps.popleft()
            elif not may_skip:
                raise AssertionError(_mismatch(received, "the end" if wanted is None else repr(wanted)))
    if steps:
        raise AssertionError(_mismatch(received, f"{steps[0][1]!r}, not the end"))
    if ends and isinstance(stream, Exchange) and not stream.complete:
        raise AssertionError(_mismatch(received, "a complete response, but it broke off"))
    return received


def _is(event: Event, expected: Event | tuple[str | None, Any]) -> bool:
    if isinstance(expected, tuple):
        expected = Event(expected[1], expected[0])
    if expected.event != event.event or expected.id not in (None, event.id):
        return False
    if expected.retry not in (None, event.retry):
        return False
    if expected.data == event.data:
        return True
    try:
        return not isinstance(expected.data, str) and bool(expected.data == json.loads(event.data))
    except ValueError:
        return False


def _mismatch(received: list[Event], wanted: str) -> str:
    lines = "".join(f"\n  {event!r}" for event in received)
    return f"expected {wanted}; received (the last event is wrong, or more were expected):{lines or ' nothing'}"


async def _decoded(response: httpx.Response) -> AsyncGenerator[Event, None]:
    decoder = Decoder()
    async for chunk in response.aiter_bytes():
        for event in decoder.feed(chunk):
            yield event


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """When all tasks sleep, time jumps to the next timer. A `loop_factory` for anyio or `asyncio.Runner`.

    Not for real sockets; time also jumps while a worker thread works.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncio's own
        """Its time limit would pass at once."""
        await super().shutdown_default_executor()


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:  # no timer: only a thread can wake this loop
            return super().select(None)
        ready = super().select(0)
        if not ready:
            self._loop._now += max(timeout, 0)
        return ready
