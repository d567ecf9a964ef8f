"""One HTTP request of a scenario, that may be cut at any byte."""

import asyncio
import random
import re
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httptools

from tests.history import FINAL, Block, Connection

__all__ = ["LIMIT_S", "Answer", "Cut", "exchange", "free_port", "listening"]

#: From the end of the cuts to the end of the last reader.
LIMIT_S = 60.0


class Answer:
    """An HTTP response as it comes; what `httptools` calls."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.complete = False
        self.final = False  #: what is published last has come
        self.retry_ms: int | None = None
        self.body = b""  # what is not a complete block yet; all of it for any other answer
        self._is_stream = False
        self._parser = httptools.HttpResponseParser(self)
        self.feed = self._parser.feed_data

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()  # nginx writes some of them large
        if name == b"run-id":
            self.connection.run = value.decode()
        elif name == b"content-type":
            self._is_stream = value == b"text/event-stream"

    def on_headers_complete(self) -> None:
        self.connection.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body += body
        if self._is_stream:
            *blocks, self.body = self.body.split(b"\n\n")
            for block in blocks:
                self._interpret(block)
            if found := re.match(rb"(?::\n)*retry: (\d+)\n", self.body):  # it counts at its line's end
                self.retry_ms = int(found[1])

    def on_message_complete(self) -> None:
        self.complete = True

    def _interpret(self, block: bytes) -> None:
        fields: dict[str, list[str]] = {}
        for line in block.decode().split("\n"):
            key, _, value = line.partition(":")
            fields.setdefault(key, []).append(value.removeprefix(" "))
        if "retry" in fields:
            self.retry_ms = int(fields["retry"][-1])
        id, name, data = (fields.get(field) for field in ("id", "event", "data"))
        if id or data:
            text = sys.intern("\n".join(data)) if data else None  # all readers hear the same: one copy
            self.connection.blocks.append(Block(id[-1] if id else None, name[-1] if name else None, text))
            self.final = self.final or data == [FINAL]


@dataclass(frozen=True)
class Cut:
    """Where and how a reader breaks its connection off. Below 0: so many bytes before the end of its request."""

    after: int | None = None
    reset: bool = True
    #: It takes little at a time and rests in between, with a small window.
    slow: bool = False
    #: It reads nothing for so long after what came first.
    frozen_s: float = 0


async def exchange(port: int, request: bytes, answer: Answer, cut: Cut) -> str:
    """One connection; gives its outcome."""
    loop = asyncio.get_running_loop()
    left = sys.maxsize if cut.after is None else cut.after
    with socket.socket() as sock:
        sock.setblocking(False)
        if cut.slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            await loop.sock_connect(sock, ("127.0.0.1", port))
        except OSError:
            return "refused"
        try:
            await loop.sock_sendall(sock, request[: min(left, 0) or None])
            while left > 0:
                data = await loop.sock_recv(sock, min(left, 700 if cut.slow else 65536))
                if not data:
                    return "lost"
                left -= len(data)
                answer.feed(data)
                if cut.frozen_s:
                    await asyncio.sleep(cut.frozen_s)
                    cut = replace(cut, frozen_s=0)
                if answer.complete:
                    return "end"
                if answer.final:
                    break
                if cut.slow:
                    await asyncio.sleep(0.01)
        except OSError:
            return "lost"
        if cut.reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return "cut"


async def listening(port: int) -> None:
    async with asyncio.timeout(LIMIT_S):
        outcome = "refused"
        while outcome == "refused":
            await asyncio.sleep(0.02)
            outcome = await exchange(port, b"", Answer(Connection()), Cut(after=0))


def free_port() -> int:
    """Not one that the system gives to clients: while nobody listens there, a client could connect to itself."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.SystemRandom().sample(range(10_000, lowest), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError("no port is free")
