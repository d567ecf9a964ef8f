"""An httpx transport for HTTP/1.1 to a model's server, with a low cost for each chunk of an answer.

A chunk with one token costs httpx's own transport 65 µs of CPU more, and aiohttp 10 µs more. aiohttp 3.14, by itself
and as httpx-aiohttp (0.2.0), also lost text before a break, and waited forever after a chunk that couldn't be parsed;
httpx-aiohttp raised `ConnectTimeout` for a refused connection, which decides about a retry.

Data that arrived before a failure is delivered. Not supported: proxies (see `ssecore.client.outbound`), HTTP/2,
streamed request bodies, HEAD, trio.

Boundary of trust: the upstream. The head and the buffered part of the body are limited.
"""

import asyncio
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

__all__ = ["UpstreamTransport"]

#: h11's limit is 100 KiB.
MAX_HEAD_BYTES: Final = 64 * 1024
#: Buffered of a body that is not read; beyond it reading pauses.
MAX_HELD_BYTES: Final = 256 * 1024
#: Shorter than servers keep idle connections (uvicorn 5 s): a request that meets their close can't be repeated.
KEEP_ALIVE_S: Final = 4.0

_Origin = tuple[str, str, int]


class UpstreamTransport(httpx.AsyncBaseTransport):
    """Create it in a running asyncio loop."""

    def __init__(self, certificates: ssl.SSLContext, limits: httpx.Limits) -> None:
        self._certificates = certificates
        self._room = asyncio.Semaphore(limits.max_connections or 2**31)
        self._most_idle = limits.max_keepalive_connections
        self._idle: dict[_Origin, list[_Connection]] = defaultdict(list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url, limits_s = request.url, request.extensions.get("timeout", {})
        origin = (url.scheme, url.raw_host.decode(), url.port or (443 if url.scheme == "https" else 80))
        head = [b"%b %b HTTP/1.1" % (request.method.encode(), url.raw_path)]
        head += [b"%b: %b" % field for field in request.headers.raw]
        content = b"\r\n".join([*head, b"", await request.aread()])
        try:
            async with asyncio.timeout(limits_s.get("pool")):
                await self._room.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout("all connections are in use") from None
        connection: _Connection | None = None
        try:
            connection = self._kept(origin) or await self._connect(origin, limits_s.get("connect"))
            connection.send(content, limits_s.get("read"))
            while not connection.has_head:
                await connection.wait()
        except BaseException:
            self.give_back(connection)
            raise
        body = _Body(self, connection)
        # `chunks` avoids the three generators that httpx puts around a body.
        return httpx.Response(connection.status, headers=connection.headers, stream=body, extensions={"chunks": body})

    def _kept(self, origin: _Origin) -> "_Connection | None":
        idle = self._idle[origin]
        connection = idle.pop() if idle else None
        if connection is not None and connection.on_idle_end is not None:
            connection.on_idle_end.cancel()
        return connection

    async def _connect(self, origin: _Origin, limit_s: float | None) -> "_Connection":
        scheme, host, port = origin
        tls: dict[str, Any] = {"ssl": self._certificates, "server_hostname": host} if scheme == "https" else {}
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit_s):
                _, made = await loop.create_connection(lambda: _Connection(self, origin, loop), host, port, **tls)
        except TimeoutError:
            raise httpx.ConnectTimeout("no connection in time") from None
        except (OSError, UnicodeError) as error:  # refused, unknown host, invalid certificate
            raise httpx.ConnectError(str(error)) from error
        return made

    def give_back(self, connection: "_Connection | None") -> None:
        """Keep or close the connection after a request."""
        self._room.release()
        if connection is None:
            return
        idle = self._idle[connection.origin]
        if connection.rest() and (self._most_idle is None or len(idle) < self._most_idle):
            connection.on_idle_end = connection.loop.call_later(KEEP_ALIVE_S, self.drop, connection)
            idle.append(connection)
        else:
            connection.transport.abort()

    def drop(self, connection: "_Connection") -> None:
        if connection in self._idle[connection.origin]:
            self._idle[connection.origin].remove(connection)
        if connection.on_idle_end is not None:
            connection.on_idle_end.cancel()
        connection.transport.abort()

    async def aclose(self) -> None:
        for idle in self._idle.values():
            for connection in idle.copy():
                self.drop(connection)
        await asyncio.sleep(0)  # the loop closes them


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, pool: UpstreamTransport, origin: _Origin, loop: asyncio.AbstractEventLoop) -> None:
        self.origin = origin
        self.loop = loop
        self.on_idle_end: asyncio.TimerHandle | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.chunks: list[bytes] = []  #: of the body, not yet taken
        self.has_head = False
        self.complete = True  #: no response is due
        self._pool = pool
        self._parser: HttpResponseParser | None = None
        self._keep = False
        self._lost = False
        self._error: httpx.TransportError | None = None
        self._head_bytes = self._held = 0
        self._paused = False
        self._read_s: float | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._waits_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def send(self, request: bytes, read_s: float | None) -> None:
        self._parser = HttpResponseParser(self)
        self.headers, self.has_head, self.complete = [], False, False
        self._head_bytes, self._read_s = 0, read_s
        if self._lost:
            self._fail(httpx.ReadError("the server has closed the connection"))
        else:
            self.transport.write(request)

    async def wait(self) -> None:
        """Wait for more. Raises httpx's exceptions."""
        if self._error is not None:
            raise self._error
        self._waiter = self.loop.create_future()
        self._waits_since = self.loop.time()
        if self._timer is None and self._read_s is not None:
            self._timer = self.loop.call_later(self._read_s, self._overdue)
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._error is not None and not self.chunks:
            raise self._error

    def take(self) -> bytes:
        data = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        self.chunks.clear()
        self._held = 0
        if self._paused and not self.transport.is_closing():  # else uvloop raises
            self._paused = False
            self.transport.resume_reading()
        return data

    def rest(self) -> bool:
        """End the request. Returns whether the connection can be reused."""
        self._parser = None  # breaks the reference cycle
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return self.complete and self._keep and not self._lost and not self.chunks

    def _overdue(self) -> None:
        """One timer for many chunks: it checks when the wait began."""
        self._timer = None
        if self._waiter is None or self._read_s is None:
            return
        left_s = self._waits_since + self._read_s - self.loop.time()
        if left_s > 0.001:
            self._timer = self.loop.call_later(left_s, self._overdue)
        else:
            self._fail(httpx.ReadTimeout("nothing came in time"))

    def _fail(self, error: httpx.TransportError) -> None:
        if self._error is None and not self.complete:
            self._error = error
        self._keep = False
        self.transport.abort()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # asyncio's

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.complete or self._parser is None:  # without a request
            self._keep = False
            self._pool.drop(self)
            return
        if not self.has_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._fail(httpx.RemoteProtocolError(f"the answer can't be parsed: {error!r:.200}"))
            return
        if not self.has_head and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(httpx.RemoteProtocolError("the answer's head is too large"))
        elif self.has_head:
            if self._held > MAX_HELD_BYTES and not self._paused:
                self._paused = True
                self.transport.pause_reading()
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self.complete:
            self._pool.drop(self)
        elif self.has_head and exc is None and not self._is_framed():
            self.complete = True  # the connection's end is the end of the body
            self._wake()
        else:
            self._fail(httpx.ReadError(str(exc or "the server closed the connection before the response was complete")))

    def _is_framed(self) -> bool:
        return any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    # httptools'

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.has_head:  # else a trailer
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.complete:  # a second response
            return
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        if self.status < 200:  # 100, 103
            self.headers = []
        else:
            self.has_head = True

    def on_body(self, body: bytes) -> None:
        if self.complete:
            self._keep = False
        else:
            self.chunks.append(body)
            self._held += len(body)

    def on_message_begin(self) -> None:
        if self.complete:
            self._keep = False

    def on_message_complete(self) -> None:
        if self.has_head and not self.complete:
            assert self._parser is not None
            self.complete, self._keep = True, self._parser.should_keep_alive()


class _Body(httpx.AsyncByteStream):
    """Iterates over the chunks as they arrive. Keeps its connection until it is closed."""

    def __init__(self, pool: UpstreamTransport, connection: _Connection) -> None:
        self._pool: UpstreamTransport | None = pool
        self._connection = connection

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        connection = self._connection
        while self._pool is not None:
            if connection.chunks:
                return connection.take()
            if connection.complete:
                break
            await connection.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.give_back(self._connection)
            await asyncio.sleep(0)  # the loop closes it, unless it is kept
