"""The connection to a model's server: aiohttp's client, behind httpx's.

Of an answer that comes token by token, httpx's own transport takes 65 µs of CPU a chunk more than aiohttp does, this
one 5 µs. httpx-aiohttp is such a transport, too. It isn't used because a refused connection becomes a `ConnectTimeout`
there, a full pool can't be told from a slow server, and some of aiohttp's own exceptions come through (0.2.0): whether
a request may be sent again depends on them.

Requests through a proxy have httpx's own transport: see `ssecore.outbound`. So has trio, which aiohttp isn't for.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator

import aiohttp
import httpx
from yarl import URL

__all__ = ["AiohttpTransport"]

#: How long an idle connection is kept. As httpx: servers close theirs after 5 s (uvicorn) or later.
KEEP_ALIVE_S = 5.0


class AiohttpTransport(httpx.AsyncBaseTransport):
    """To be made inside a running loop. HTTP/1.1, plain or TLS; `limits.max_connections`, and httpx's `connect`, `read`
    and `pool` timeouts; raises httpx's exceptions. The request's body is sent as a whole."""

    def __init__(self, certificates: ssl.SSLContext, limits: httpx.Limits) -> None:
        # The bound is ours: aiohttp has one timeout for the wait in its pool and the connecting together.
        self._room = asyncio.Semaphore(limits.max_connections or 2**31)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=certificates, limit=0, keepalive_timeout=KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),  # httpx has its own
            auto_decompress=False,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        limits_s = request.extensions.get("timeout", {})
        content = await request.aread()
        try:
            async with asyncio.timeout(limits_s.get("pool")):
                await self._room.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout("all connections are in use", request=request) from None
        try:
            answer = await self._session.request(
                request.method,
                URL(str(request.url), encoded=True),
                data=content,
                headers=request.headers.multi_items(),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(connect=limits_s.get("connect"), sock_read=limits_s.get("read")),
            )
        except BaseException as error:
            self._room.release()
            if isinstance(error, aiohttp.ClientError | OSError):
                raise _translated(error) from error
            raise
        body = _Body(answer, self._room)
        # `chunks` is for whoever reads many small ones: httpx puts three generators around a body.
        return httpx.Response(answer.status, headers=answer.raw_headers, stream=body, extensions={"chunks": body})

    async def aclose(self) -> None:
        await self._session.close()


class _Body(httpx.AsyncByteStream):
    """A body in the chunks in which it arrives; its own iterator. Holds a place among the connections until it is
    closed."""

    def __init__(self, answer: aiohttp.ClientResponse, room: asyncio.Semaphore) -> None:
        self._answer = answer
        self._room: asyncio.Semaphore | None = room
        self._read = answer.content.readany

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._room is None:
            raise StopAsyncIteration
        try:
            chunk = await self._read()
        except (aiohttp.ClientError, OSError) as error:
            raise _translated(error) from error
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        if self._room is not None:
            self._room.release()
            self._room = None
            self._answer.release()  # keeps the connection where the body has been read to its end
            await asyncio.sleep(0)  # in which the loop closes it where not


def _translated(error: Exception) -> httpx.TransportError:
    """aiohttp's exceptions are more than one kind each, so the order counts; a timeout is an `OSError`."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return httpx.ConnectTimeout(text)
    if isinstance(error, TimeoutError):
        return httpx.ReadTimeout(text)
    if isinstance(error, aiohttp.ClientConnectorError):  # refused, no such name, a certificate that isn't accepted
        return httpx.ConnectError(text)
    return httpx.ReadError(text)
