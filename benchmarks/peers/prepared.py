"""The floor of a broadcast in Python: connections of uvloop, and a chunk made beforehand. `python -m …`.

What is left is the kernel, the transport and the load generator. It knows just enough HTTP to be asked.
"""

import asyncio
import socket
from typing import cast

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ACCEPTED = b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n"


class Connection(asyncio.Protocol):
    def __init__(self, readers: dict[asyncio.Transport, None]) -> None:
        self._readers = readers
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its bases

    def connection_lost(self, _: Exception | None) -> None:
        self._readers.pop(self._transport, None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) != -1:
            if self._received.startswith(b"GET"):
                self._transport.write(HEAD)
                self._readers[self._transport] = None
                self._received = b""
                return
            size = int(self._received[:end].lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            if len(self._received) < end + 4 + size:
                return
            event = b"id: 1\ndata: %b\n\n" % self._received[end + 4 : end + 4 + size]
            self._received = self._received[end + 4 + size :]
            chunk = b"%x\r\n%b\r\n" % (len(event), event)
            for reader in self._readers:
                reader.write(chunk)
            self._transport.write(ACCEPTED)


async def main() -> None:
    readers: dict[asyncio.Transport, None] = {}
    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    await asyncio.get_running_loop().create_server(lambda: Connection(readers), sock=sock)
    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
