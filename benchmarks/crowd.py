"""The load generator for thousands of readers: plain sockets in one epoll, in one thread.

Budget: a delivery costs one `read` and one search, and a share of one `epoll_wait`: about 3 µs of CPU. A load generator
on asyncio costs as much as the servers that it measures.
"""

import os
import re
import select
import socket
import time
from collections.abc import Mapping
from itertools import cycle
from typing import Self

__all__ = ["Crowd"]

TIMEOUT_S = 120.0
#: Connected and answered before the next ones: no server's backlog overflows.
_STEP = 200
#: Each crowd has an address of its own, and with it 28,000 ports: those of one that left are taken for a minute more.
_SOURCES = cycle([f"127.0.0.{number}" for number in range(2, 252)])
#: Whole ones: an event that is cut in two counts for nothing.
_SENT = re.compile(rb'"sent": ?(\d+)\}')
_HEAD_END = b"\r\n\r\n"
_LF = 10


class Crowd:
    """Readers of one target. `join` makes them; then they wait for what all of them have to get.

    Raises `RuntimeError` for a status that is not 200, for an answer that ends too early, and where nothing comes for
    `TIMEOUT_S`.
    """

    def __init__(self, port: int, target: str, headers: Mapping[str, str] | None = None) -> None:
        lines = [f"host: 127.0.0.1:{port}", "accept: text/event-stream"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self._head = "\r\n".join([*lines, "", ""])
        self._target = target
        self._port = port
        self._source = next(_SOURCES)
        self._sockets: dict[int, socket.socket] = {}
        self._poll = select.epoll()
        self._rests: dict[int, bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._poll.close()
        for sock in self._sockets.values():
            sock.close()

    def join(self, readers: int, target: str | None = None) -> None:
        """Connect them, some at a time, to the crowd's target or another; all have been answered when it returns."""
        for begin in range(0, readers, _STEP):
            joining = self.connect(min(_STEP, readers - begin))
            self.ask(joining, target)
            self._answered({sock.fileno() for sock in joining})

    def connect(self, readers: int) -> list[socket.socket]:
        """Without a request yet."""
        connected = []
        for _ in range(readers):
            sock = socket.create_connection(("127.0.0.1", self._port), TIMEOUT_S, (self._source, 0))
            sock.setblocking(False)
            self._sockets[sock.fileno()] = sock
            self._poll.register(sock, select.EPOLLIN)
            connected.append(sock)
        return connected

    def ask(self, readers: list[socket.socket], target: str | None = None) -> None:
        request = f"GET {target or self._target} HTTP/1.1\r\n{self._head}".encode()
        for sock in readers:
            sock.send(request)

    def until(self, mark: bytes) -> None:
        """Until each has got `mark`, which none of them had before.

        Hot path: once for each delivery.
        """
        rests, read, keep, missing = self._rests, os.read, 1 - len(mark), len(self._sockets)
        while missing:
            for fd, _ in self._ready():
                data = read(fd, 16384)
                if not data:
                    raise RuntimeError(f"{self._target}: the answer ended")
                if fd in rests:
                    data = rests.pop(fd) + data
                if mark in data:
                    missing -= 1
                else:
                    rests[fd] = data[keep:]

    def _answered(self, joining: set[int]) -> None:
        """Until each of them has got the head of its answer."""
        heads = dict.fromkeys(joining, b"")
        while heads:
            for fd, _ in self._ready():
                data = self._read(fd)
                if fd in heads:  # else more than its head, which nobody waits for
                    heads[fd] += data
                    if _HEAD_END in heads[fd]:
                        head = heads.pop(fd)
                        if not head.startswith(b"HTTP/1.1 200"):
                            raise RuntimeError(head.decode(errors="replace"))

    def _read(self, fd: int) -> bytes:
        data = os.read(fd, 16384)
        if not data:
            raise RuntimeError(f"{self._target}: the answer ended")
        return data

    def late_ns(self, seconds: float) -> list[int]:
        """What comes in so many seconds: how old each event is, by the time that stands in it."""
        late: list[int] = []
        until, now, find = time.monotonic() + seconds, time.monotonic_ns, _SENT.findall
        while (left := until - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left, 1024):
                data = self._read(fd)
                came = now()
                late += [came - int(sent) for sent in find(data)]
        return late

    def count(self, events: int) -> None:
        """Until each has got so many events, by the blank lines that end them. Their answers begin in here."""
        missing = dict.fromkeys(self._sockets, events)
        ended_in_lf: set[int] = set()
        heads = set(missing)
        buffer = bytearray(1024 * 1024)
        view = memoryview(buffer)
        while missing:
            for fd, _ in self._ready():
                size = self._sockets[fd].recv_into(view)
                if fd in heads and size:
                    # A head ends in CR LF CR LF, which is no blank line in this count.
                    heads.discard(fd)
                    if not buffer.startswith(b"HTTP/1.1 200"):
                        raise RuntimeError(buffer[:size].decode(errors="replace"))
                if fd not in missing or not size:
                    if fd in missing:
                        raise RuntimeError(f"{self._target}: the answer ended, {missing[fd]} events are missing")
                    self._poll.unregister(fd)
                    continue
                missing[fd] -= buffer.count(b"\n\n", 0, size) + (fd in ended_in_lf and buffer[0] == _LF)
                ended_in_lf.discard(fd)
                if buffer[size - 1] == _LF:
                    ended_in_lf.add(fd)
                if missing[fd] < 0:
                    raise RuntimeError(f"{self._target}: more than {events} events")
                if not missing[fd]:
                    del missing[fd]

    def _ready(self) -> list[tuple[int, int]]:
        if found := self._poll.poll(TIMEOUT_S, 1024):
            return found
        raise RuntimeError(f"{self._target}: nothing came for {TIMEOUT_S:.0f} s")
