"""A language model's server, made by hand for its faults: real sockets, OpenAI's streaming chat completions.

    with serve() as upstream:
        upstream.plan(answer("Hello", " world"), refuse(429))    # one script for each request, in their order
        ...                                                      # whoever is tested asks upstream.url
        assert upstream.calls[0].json["stream"]

A script is a function of the `Call`. It runs in the connection's own thread, and may wait for whatever it wants to.
When the other side leaves, it ends. What else goes wrong in it, a wait of `LIMIT_S` too, `settle` raises in the test.
"""

import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Final

__all__ = [
    "DONE",
    "FIRST",
    "LIMIT_S",
    "STOP",
    "USAGE",
    "Call",
    "Script",
    "Upstream",
    "answer",
    "chunk",
    "refuse",
    "serve",
    "silent",
    "token",
]

#: Nothing here takes as long, unless it never comes.
LIMIT_S: Final = 30.0

_CHUNK: Final = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1763719200, "model": "m"}


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    """One event of the stream, as OpenAI sends it."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return b"data: %b\n\n" % json.dumps({**_CHUNK, "choices": [choice], "usage": None}, ensure_ascii=False).encode()


def token(text: str) -> bytes:
    return chunk({"content": text})


FIRST: Final = chunk({"role": "assistant", "content": None, "refusal": None})
STOP: Final = chunk({}, "stop")
USAGE: Final = b"data: %b\n\n" % json.dumps({**_CHUNK, "choices": [], "usage": {"total_tokens": 3}}).encode()
DONE: Final = b"data: [DONE]\n\n"


class Call:
    """One request as it came, and the connection to answer on."""

    def __init__(self, connection: socket.socket, number: int, request_line: str, headers: dict[str, str], body: bytes):
        self.connection = number  #: which connection of the upstream it came on, from 1
        self.request_line = request_line
        self.headers = headers
        self.json: Any = json.loads(body) if body else None
        self.kept = False  #: whether the connection can take another request
        self._socket = connection

    def raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def head(self, content_type: str = "text/event-stream; charset=utf-8") -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n"
        self.raw(head.encode())

    def send(self, *pieces: bytes) -> None:
        """Each piece as one chunk of the transfer coding: a reader sees the cuts wherever the packets end."""
        for piece in pieces:
            self.raw(b"%x\r\n%b\r\n" % (len(piece), piece))

    def end(self) -> None:
        self.raw(b"0\r\n\r\n")
        self.kept = True

    def respond(self, status: int, body: bytes, **headers: str) -> None:
        """A whole answer. `retry_after="2"` is the header `retry-after`."""
        lines = [f"HTTP/1.1 {status} Whatever", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.raw("\r\n".join([*lines, "", ""]).encode() + body)
        self.kept = True

    def reset(self) -> None:
        """Break the connection off, as a server that dies does."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.kept = False

    def wait_gone(self) -> None:
        """Wait until the other side has closed the connection."""
        with suppress(ConnectionError):
            assert self._socket.recv(1) == b"", "something was sent behind the request"


Script = Callable[[Call], None]


def answer(*texts: str) -> Script:
    """A good answer, in every detail as OpenAI gives it: without a usage, since none is asked for."""

    def script(call: Call) -> None:
        call.head()
        call.send(FIRST, *map(token, texts), STOP, DONE)
        call.end()

    return script


def silent(*before: bytes) -> Script:
    """An answer that begins with these, if with any, and then says nothing more."""

    def script(call: Call) -> None:
        if before:
            call.head()
            call.send(*before)
        call.wait_gone()

    return script


def refuse(status: int, body: bytes = b'{"error": {"message": "no"}}', **headers: str) -> Script:
    headers.setdefault("content_type", "application/json")
    return lambda call: call.respond(status, body, **headers)


class Upstream:
    """Bound from the start, so that its address is known; connections are refused until it listens."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._scripts: deque[Script] = deque()
        self._failures: list[BaseException] = []
        self._changed = threading.Condition()
        self._running = 0
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def listen(self) -> None:
        self._listener.listen()
        self._start(self._accept)

    def plan(self, *scripts: Script) -> None:
        """What becomes of the next requests. Forgets the calls until now."""
        with self._changed:
            self._scripts = deque(scripts)
            self.calls = []

    def wait_call(self, count: int = 1) -> Call:
        """Wait for so many calls, and give the last of them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= count, LIMIT_S), "the upstream was not called"
            return self.calls[count - 1]

    def settle(self) -> None:
        """Wait for the scripts to end. Raises what failed in one, and where one was not asked for."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._running, LIMIT_S), "a script of the upstream hangs"
            failures, self._failures = self._failures, []
            left, self._scripts = len(self._scripts), deque()
        if failures:
            raise failures[0]
        assert not left, f"{left} scripts were not asked for"

    def close(self) -> None:
        with suppress(OSError):  # not listening
            self._listener.shutdown(socket.SHUT_RDWR)  # lets `accept` return
        for connection in self._connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(LIMIT_S)
        self._listener.close()

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections.append(connection)
                self._start(self._serve, connection, len(self._connections))

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection, connection.makefile("rb") as file, suppress(ConnectionError):
            while call := _read_call(connection, file, number):
                if not self._perform(call, connection):
                    return

    def _perform(self, call: Call, connection: socket.socket) -> bool:
        with self._changed:
            script = self._scripts.popleft() if self._scripts else _unplanned
            self._running += 1
            self.calls.append(call)
            self._changed.notify_all()
        connection.settimeout(LIMIT_S)
        try:
            script(call)
        except ConnectionError:  # whoever asked has left: the test sees on its own side whether that was right
            call.kept = False
        except BaseException as failure:
            self._failures.append(failure)
            call.kept = False
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
        if call.kept:
            connection.settimeout(None)
        return call.kept


def _unplanned(call: Call) -> None:
    raise AssertionError("the upstream was called once more than planned")


def _read_call(connection: socket.socket, file: BinaryIO, number: int) -> Call | None:
    request_line = file.readline().decode().rstrip()
    if not request_line:
        return None
    headers = {}
    while line := file.readline().decode().rstrip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = file.read(int(headers.get("content-length", 0)))
    return Call(connection, number, request_line, headers, body)


@contextmanager
def serve() -> Iterator[Upstream]:
    upstream = Upstream()
    upstream.listen()
    try:
        yield upstream
    finally:
        upstream.close()
