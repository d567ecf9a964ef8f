"""What a model's tokens cost on their way through a server: many chats at once, each at the pace of a model.

The model's server is a process of its own (`peers/chat_upstream.py`), on the load's core. Each chat is a request for an
answer of `tokens` tokens, `rate` a second. Its tokens carry the moment in which the upstream wrote them.
"""

import re
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.process import PEERS_PYTHON, Server, ahead_of_others, memory_bytes
from benchmarks.redis import has_redis
from benchmarks.report import Check, Report, Spread
from tests.redis_server import serving

__all__ = ["run"]

CPU, FIRST, LATE, GAP50, GAP99, KIB = (
    "CPU µs/token",
    "first token later by ms, p99",
    "token later by ms, p50",
    "between tokens ms, p50",
    "between tokens ms, p99",
    "KiB/chat",
)
OURS, SQLITE, REDIS = "sseapp, fleeting", "sseapp, run on SQLite", "sseapp, run on Redis"
GATEWAY = "sseapp, completions on SQLite"
FASTAPI, BARE = "FastAPI + OpenAI SDK", "bare ASGI + aiohttp"
UNLIMITED = {name: "none" for name in ("max_runs", "max_streams", "max_stream_s")}
#: How many chats begin in a second.
STARTS_PER_S = 200
TIMEOUT_S = 120.0

WARM = 20
_WRITTEN = re.compile(rb"t(\d{20}) ")

#: Starts a server, and gives the path of its chat.
Contender = Callable[[], AbstractContextManager[tuple[Server, str]]]


def run(
    *,
    rounds: int = 3,
    streams: int = 100,
    many: int = 400,
    most: int = 1000,
    rate: int = 20,
    tokens: int = 80,
    peers_python: Path = PEERS_PYTHON,
) -> Report:
    """`streams`, `many` and `most` chats at once, each of `tokens` tokens, `rate` a second"""
    sizes = {"rounds": rounds, "streams": streams, "many": many, "most": most, "rate": rate, "tokens": tokens}
    report = Report("tokens", sizes)
    found: list[dict[str, dict[str, float]]] = []
    with ahead_of_others(), ExitStack() as stack:
        upstream = stack.enter_context(Server.upstream("chat_upstream", str(rate), str(tokens)))
        environ = {"OPENAI_BASE_URL": f"http://127.0.0.1:{upstream.port}/v1", "OPENAI_API_KEY": "x"}
        contenders = _contenders(stack, report, environ, peers_python)
        for _ in range(rounds):
            one: dict[str, dict[str, float]] = {}
            for chats in dict.fromkeys((streams, many, most)):
                for name, start in contenders.items():
                    with start() as (server, target):
                        one[f"{name}, {chats:,} chats"] = _measure(server, target, chats, rate, tokens)
            found.append(one)
    report.add_rounds(found)
    if f"{FASTAPI}, {streams:,} chats" in found[0]:
        for chats, most_of in ((streams, 0.40), (many, 0.30)):
            report.checks.append(_ratio(found, CPU, chats, FASTAPI, most_of))
    report.checks.append(_ratio(found, CPU, streams, BARE, 2))
    report.checks.append(_ratio(found, CPU, streams, SQLITE, 1.2, ours=GATEWAY))
    later = Spread.of(one[f"{SQLITE}, {many:,} chats"][FIRST] for one in found)
    report.checks.append(Check(f"{FIRST}, {many:,} chats, {STARTS_PER_S} new ones a second", later, at_most=5))
    return report


def _ratio(
    found: list[dict[str, dict[str, float]]], figure: str, chats: int, peer: str, most: float, *, ours: str = SQLITE
) -> Check:
    behind = f", {chats:,} chats"
    ratio = Spread.of(one[ours + behind][figure] / one[peer + behind][figure] for one in found)
    return Check(f"{figure}, {ours} against {peer}{behind}", ratio, at_most=most)


def _contenders(
    stack: ExitStack, report: Report, environ: Mapping[str, str], peers_python: Path
) -> dict[str, Contender]:
    redis = stack.enter_context(serving("redis" if has_redis() else "valkey"))
    contenders: dict[str, Contender] = {
        OURS: partial(_ours, environ, "memory", "/chat/fleeting"),
        SQLITE: partial(_ours, environ, "sqlite", "/chat"),
        GATEWAY: partial(_ours, environ, "sqlite", "/v1/chat/completions"),
        REDIS: partial(_ours, environ, redis.url, "/chat"),
        BARE: partial(_peer, environ, "chat_bare:app", "/chat", Path(sys.executable)),
    }
    if peers_python.exists():
        contenders |= {
            FASTAPI: partial(_peer, environ, "chat_openai:app", "/fastapi", peers_python),
            f"{FASTAPI}, aiohttp": partial(_peer, environ, "chat_openai:app", "/fastapi-aiohttp", peers_python),
            "sse-starlette + SDK": partial(_peer, environ, "chat_openai:app", "/sse-starlette", peers_python),
        }
    else:
        report.skipped.append(f"the peers: there is no {peers_python}; `make bench` installs them")
    return contenders


@contextmanager
def _ours(environ: Mapping[str, str], log: str, path: str) -> Iterator[tuple[Server, str]]:
    with TemporaryDirectory() as folder, Server.app(folder, log, settings=UNLIMITED, environ=environ) as server:
        yield server, path


@contextmanager
def _peer(environ: Mapping[str, str], peer: str, path: str, python: Path) -> Iterator[tuple[Server, str]]:
    with Server.uvicorn(peer, python, environ=environ) as server:
        yield server, path


def _measure(server: Server, path: str, chats: int, rate: int, tokens: int) -> dict[str, float]:
    """In a server of its own: what memory it holds afterwards says nothing about a chat."""
    _Chats(server.port, path, WARM, tokens).run()
    held, cpu_s = memory_bytes(server.pid), server.cpu_s()
    round_ = _Chats(server.port, path, chats, tokens)
    highest = round_.run(lambda: memory_bytes(server.pid))
    cpu_s = server.cpu_s() - cpu_s
    return {
        CPU: 1e6 * cpu_s / (chats * tokens),
        FIRST: _cut(round_.first_ns, 0.99) / 1e6 - 1000 / rate,
        LATE: _cut(round_.late_ns, 0.5) / 1e6,
        GAP50: _cut(round_.between_ns, 0.5) / 1e6,
        GAP99: _cut(round_.between_ns, 0.99) / 1e6,
        KIB: (highest - held) / chats / 1024,
    }


def _cut(values: list[int], part: float) -> float:
    return float(sorted(values)[int(part * (len(values) - 1))])


class _Chats:
    """So many requests, spread over time, and what comes of them: plain sockets in one epoll.

    Raises `RuntimeError` where an answer lacks a token, and where nothing comes for `TIMEOUT_S`.
    """

    def __init__(self, port: int, path: str, chats: int, tokens: int) -> None:
        self.first_ns: list[int] = []  #: from a request to the first token
        self.late_ns: list[int] = []  #: from a token's writing by the upstream to its arrival
        self.between_ns: list[int] = []  #: from a token to the next one of the same chat
        self._address = ("127.0.0.1", port)
        line, body = f"GET {path}?prompt=hi", ""
        if path.startswith("/v1/"):
            line, body = f"POST {path}", '{"stream": true, "messages": [{"role": "user", "content": "hi"}]}'
        head = f"{line} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\naccept: text/event-stream\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body else ""
        self._request = f"{head}\r\n{body}".encode()
        self._left, self._chats, self._tokens = chats, chats, tokens
        self._open: dict[int, _Chat] = {}
        self._poll = select.epoll()

    def run(self, probe: Callable[[], int] = lambda: 0) -> int:
        """To their end. The highest that `probe` gave, which is asked four times a second."""
        start, asked_at, highest, heard_at = time.monotonic(), 0.0, 0, time.monotonic()
        while self._left or self._open:
            now = time.monotonic()
            while self._left and now >= start + (self._chats - self._left) / STARTS_PER_S:
                self._begin()
            if now >= asked_at + 0.25:
                asked_at, highest = now, max(highest, probe())
            for fd, _ in self._poll.poll(0.001 if self._left else 0.1, 1024):
                heard_at = now
                self._hear(fd)
            if now > heard_at + TIMEOUT_S:
                raise RuntimeError(f"nothing came for {TIMEOUT_S:g} s")
        self._poll.close()
        return highest

    def _begin(self) -> None:
        sock = socket.create_connection(self._address, TIMEOUT_S)
        self._open[sock.fileno()] = _Chat(sock, time.monotonic_ns())
        sock.sendall(self._request)
        sock.setblocking(False)
        self._poll.register(sock, select.EPOLLIN)
        self._left -= 1

    def _hear(self, fd: int) -> None:
        chat = self._open[fd]
        data = chat.sock.recv(65536)
        now = time.monotonic_ns()
        for written in _WRITTEN.findall(chat.rest + data):
            (self.between_ns if chat.tokens else self.first_ns).append(now - chat.last_ns)
            self.late_ns.append(now - int(written))
            chat.last_ns, chat.tokens = now, chat.tokens + 1
        chat.rest = data[data.rfind(b"\n") + 1 :]
        if not data:
            if chat.tokens != self._tokens:
                raise RuntimeError(f"an answer ended after {chat.tokens} tokens of {self._tokens}")
            self._poll.unregister(fd)
            chat.sock.close()
            del self._open[fd]


@dataclass(slots=True)
class _Chat:
    sock: socket.socket
    last_ns: int  #: when its last token came; before the first, when it was asked
    tokens: int = 0
    rest: bytes = b""
