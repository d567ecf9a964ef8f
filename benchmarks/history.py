"""The history checker: does every reader hear every event once, in order, whatever happens to its connection?

`play` runs a scenario: a real server with runs and topics on an SQLite or Redis log, publishers, and many readers that
behave as a browser's `EventSource` does. Each is cut at random bytes and comes back with its last id; the server itself
may be stopped now and then, by SIGKILL or SIGTERM, and started again on the same log. `violations` then looks at what
was heard, and at nothing else: it knows what a run has to say, and what publishers were told. `chaos` goes further.

1.  Sequences are contiguous from where a reader began. A hole is announced by a `gap` that explains it: in topics only,
    and only for what retention may have taken.
2.  One sequence has one id and one content, for all readers of a stream, before and after a restart.
3.  A run says what it has to, to its end. Where the server was stopped, a beginning of that and `interrupted`. All of
    its readers hear the same last event and get a 204 then.
4.  An acknowledged publish is there, under the id that was given, once. A refused one isn't; one whose answer was lost
    may be, once. Nobody else's is.
5.  Nobody waits for ever, gives up, or loses a connection to a server that wasn't stopped.

A seed makes the plan: which runs, who reads them from when, where each reader is cut. The parser is the checker's own:
what it has in common with the engine could be wrong in both.
"""

import asyncio
import contextlib
import hashlib
import json
import random
import re
import signal
import socket
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import anyio
import httptools
import msgspec

from benchmarks.process import ROOT, pin_server
from benchmarks.report import Check, Report, Spread
from sseapp import SSEApp
from ssecore.dialects import DATA_ONLY
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import GET, POST, Run
from ssecore.server.runner import serve
from ssecore.settings import Settings
from ssecore.topics import Subscription
from ssecore.wire import Event

__all__ = [
    "HASTE",
    "SCENARIOS",
    "Answer",
    "Block",
    "Connection",
    "Cut",
    "History",
    "Publication",
    "Reader",
    "Replica",
    "Scenario",
    "Script",
    "exchange",
    "free_port",
    "listening",
    "play",
    "run",
    "violations",
]

#: What stops the server in each scenario.
SCENARIOS: Final[dict[str, signal.Signals | None]] = {"cut": None, "killed": signal.SIGKILL, "drained": signal.SIGTERM}
#: Of a topic, so that a reader that stays away for a second or two misses something; more than a run ever has.
RETENTION_EVENTS: Final = 120
#: How much faster than a browser a reader comes back.
HASTE: Final = 20
#: How long a killed server's runs stay open, where the log is shared.
LEASE_S: Final = 1.0
#: From a signal to the server's end, on a machine that is busy: it may be starting.
STOP_S: Final = 20.0
#: From the end of the cuts to the end of the last reader.
LIMIT_S: Final = 60.0
#: Of a run's end where the log couldn't be reached, or had lost something.
LOG_CODES: Final = {"log_unavailable", "log_error"}
#: The last thing that is published to each topic.
FINAL: Final = '"final"'


# What is heard


class Block(NamedTuple):
    """What stands between two blank lines. `id` is the block's own, not the one that sticks."""

    id: str | None
    name: str | None
    data: str | None


class Script(NamedTuple):
    """A run's plan, and what makes its events."""

    route: str
    seed: int
    events: int
    pause_ms: int

    def lines(self) -> list[tuple[str | None, str]]:
        """Names and data of the events, without the last. Some are large, some have several lines."""
        rng = random.Random(self.seed)
        names = [None] if self.route == "plain" else [None, "step", "token"]
        texts = ["", "x", "é\u2028" * 50, "line\n" * 30, *(["large" * 6000] if self.route == "quick" else [])]
        return [(rng.choice(names), f"{n}:{rng.choice(texts)}") for n in range(self.events)]

    def whole(self) -> list[tuple[str | None, str]]:
        last: dict[str, list[tuple[str | None, str]]] = {"plain": [(None, "[DONE]")], "failing": []}
        return self.lines() + last.get(self.route, [("done", "")])


@dataclass
class Connection:
    """One of a reader's connections: what it asked for, what came, and how it ended."""

    sent_id: str = ""
    status: int = 0  #: 0: the answer didn't get so far
    run: str = ""  #: the header `run-id`
    blocks: list[Block] = field(default_factory=list)
    #: "cut" by the reader itself; "end", the answer was complete; "lost" and "refused" are the server's doing.
    outcome: str = "cut"


@dataclass
class Reader:
    name: str
    stream: str
    connections: list[Connection] = field(default_factory=list)
    #: It has heard all that there is: a 204, or what is published last.
    ended: bool = False


@dataclass
class Publication:
    topic: str
    publisher: str
    data: str
    id: str | None = None
    status: int = 0  #: 0: no answer, so nobody knows; -1: nobody was there to take it


@dataclass
class History:
    runs: dict[str, Script] = field(default_factory=dict)
    topics: list[str] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    publications: list[Publication] = field(default_factory=list)
    restarts: int = 0
    #: What was done to it besides.
    done: Counter[str] = field(default_factory=Counter)
    stopped_by: signal.Signals | None = None
    #: The log itself is taken away: then a run may end with this, and a publish that is refused may have gone in.
    log_goes: bool = False
    #: What the server itself did wrong: exit codes, errors in its output.
    faults: list[str] = field(default_factory=list)

    @property
    def unsure(self) -> tuple[int, ...]:
        """The status of publications that may have gone in, or not."""
        return (0, 502, 503, 504) if self.log_goes else (0,)

    def counts(self) -> dict[str, float]:
        connections = [connection for reader in self.readers for connection in reader.connections]
        blocks = [block for connection in connections for block in connection.blocks]
        return {
            "runs": len(self.runs),
            "readers": len(self.readers),
            "cuts": sum(connection.outcome == "cut" for connection in connections),
            "resumes": sum(bool(connection.sent_id) and connection.status == 200 for connection in connections),
            "restarts": self.restarts,
            **self.done,
            "events": sum(block.data is not None for block in blocks),
            "gaps": sum(_is_gap(block) for block in blocks),
            "interrupted": len({r.stream for r in self.readers for b in _last_blocks(r) if _code(b) == "interrupted"}),
            "acknowledged": sum(publication.id is not None for publication in self.publications),
            "unknown": sum(publication.status == 0 for publication in self.publications),
        }


# The checks


def violations(history: History) -> list[str]:
    """What must not be, one line each; empty for a good history."""
    found: list[str] = []
    heard: dict[str, dict[int, Block]] = {stream: {} for stream in (*history.runs, *history.topics)}
    walks = [_Walk(reader, history, heard[reader.stream], found) for reader in history.readers]
    for stream, script in history.runs.items():
        _check_run(stream, script, history, heard[stream], found)
    for topic in history.topics:
        _check_topic(topic, history, heard[topic], found)
    for walk in walks:
        walk.check_end()
    return found + history.faults  # which may be many, and say less


class _Walk:
    """Along one reader's connections (rules 1, 2 and 5)."""

    def __init__(self, reader: Reader, history: History, heard: dict[int, Block], found: list[str]) -> None:
        self._reader, self._history, self._heard, self._found = reader, history, heard, found
        self._is_run = reader.stream in history.runs
        self._at: int | None = 0 if self._is_run else None
        for self._number, connection in enumerate(reader.connections):
            self._gap_to: int | None = None
            blocks = connection.blocks
            if blocks and blocks[0][1:] == ("cut", None):  # an answer may begin so, with the cursor that it was sent
                if blocks[0].id != connection.sent_id:
                    self._complain(f"another cursor than {connection.sent_id}: {_short(blocks[0])}")
                blocks = blocks[1:]
            for block in blocks:
                self._hear(block)
            self._check_outcome(connection)

    def _complain(self, text: str) -> None:
        self._found.append(f"{self._reader.name}, connection {self._number}: {text}")

    def _hear(self, block: Block) -> None:
        if _is_gap(block):
            self._hear_gap(json.loads(block.data or ""))
        elif block.id is None:
            if self._is_run and self._history.log_goes and (_code(block) in LOG_CODES or block.data == "[DONE]"):
                pass  # the run's last words, which could not be stored; the stored end comes with the next connection
            elif self._is_run or block.name != "heartbeat":
                self._complain(f"without an id: {_short(block)}")
        elif block.data is None:
            if not self._is_run or self._at or not block.id.endswith(".0"):
                self._complain(f"an id alone that isn't an opening: {_short(block)}")
        elif block.name == "init" and not self._is_run:
            if self._at is not None:
                self._complain(f"init again, at {self._at}")
            self._at = _seq(block.id)
        elif block.id == "end":
            self._complain(f"it ends for good, at {self._at}: {_short(block)}")
        elif self._at is None:
            self._complain(f"an event before init: {_short(block)}")
        else:
            self._hear_event(_seq(block.id), block, (self._gap_to or self._at) + 1)

    def _hear_event(self, seq: int, block: Block, expected: int) -> None:
        if seq < expected:
            self._complain(f"a duplicate: {seq} where {expected} comes next")
        elif seq > expected:
            self._complain(f"a hole: {seq} where {expected} comes next")
        if (known := self._heard.setdefault(seq, block)) != block:
            self._complain(f"another content: {_short(block)}; others heard {_short(known)}")
        self._at, self._gap_to = seq, None

    def _hear_gap(self, gap: dict[str, Any]) -> None:
        here = [p for p in self._history.publications if p.topic == self._reader.stream]
        top = max((_seq(p.id) for p in here if p.id), default=0) + sum(p.status in self._history.unsure for p in here)
        if self._is_run or gap["reason"] != "trimmed" or self._at is None:
            self._complain(f"a gap that can't be, at {self._at}: {gap}")
        elif gap["from"] != (self._gap_to or self._at) + 1 or gap["to"] + RETENTION_EVENTS > top:
            self._complain(f"a gap that doesn't explain the hole, at {self._at} of {top}: {gap}")
        else:
            self._gap_to = gap["to"]

    def _check_outcome(self, connection: Connection) -> None:
        if connection.status not in (0, 200, 204):
            self._complain(f"an EventSource gives up: status {connection.status}")
        if not self._history.stopped_by:
            early = connection.status == 200 and not self._is_run and connection.outcome == "end"
            if early or connection.outcome in ("lost", "refused"):
                self._complain(f"{connection.outcome}, and the server was there")

    def check_end(self) -> None:
        """Once all have been walked along, the top of the stream is known."""
        top = max(self._heard, default=0)
        if not self._reader.ended:
            self._complain(f"it never ended: at {self._at} of {top}")
        elif self._at != top:
            self._complain(f"it ended at {self._at} of {top}")


def _check_run(stream: str, script: Script, history: History, heard: dict[int, Block], found: list[str]) -> None:
    """Rule 3."""
    ids = {c.run for reader in history.readers if reader.stream == stream for c in reader.connections if c.run}
    if len(ids) != 1:
        found.append(f"{stream}: it is {len(ids)} runs: {ids}")
    said, whole = [heard[seq] for seq in sorted(heard)], script.whole()
    excuses = {"interrupted"} if history.stopped_by else set[str]()
    excuses |= LOG_CODES if history.log_goes else set()
    same = 0
    while same < min(len(said), len(whole)) and said[same][1:] == whole[same]:
        same += 1
    # A log that was taken away and given back begins an epoch of its own.
    if (strange := {_epoch(block.id) for block in said[:same]} - ids) and not history.log_goes:
        found.append(f"{stream}: events under {strange}, not under its own id")
    rest = said[same:]
    code = _code(rest[0]) if rest else None
    if script.route == "plain" and len(rest) == 2 and rest[1].data == "[DONE]":
        rest.pop()
    complete = same == len(whole)
    if script.route == "failing" and complete:
        fine = len(rest) == 1 and code in {"internal_error", *excuses}
    elif complete:
        fine = not rest
    else:
        fine = len(rest) == 1 and code in excuses
    if not fine:
        found.append(f"{stream}: {same} of {len(whole)} as planned, then {[_short(block) for block in rest[:3]]}")


def _check_topic(topic: str, history: History, heard: dict[int, Block], found: list[str]) -> None:
    """Rule 4. That who read past a sequence has heard it, or of its gap, is rule 1."""
    publications = [publication for publication in history.publications if publication.topic == topic]
    top, acknowledged = max(heard, default=0), Counter[str]()
    for publication in publications:
        if publication.id is None:
            continue
        seq = _seq(publication.id)
        if seq > top and not (publication.data == FINAL and history.log_goes and heard and heard[top].data == FINAL):
            found.append(f"{topic}: {publication.id} was acknowledged, and the readers ended at {top}")
        elif seq in heard and heard[seq] != Block(publication.id, "message", publication.data):
            found.append(f"{topic}: {publication.data[:40]} was acknowledged as {publication.id}: {_short(heard[seq])}")
        if seq <= acknowledged[publication.publisher]:
            found.append(f"{topic}: {publication.publisher} got {seq} after {acknowledged[publication.publisher]}")
        acknowledged[publication.publisher] = seq
    may_be = {publication.data for publication in publications if publication.status in (202, *history.unsure)}
    for data, times in Counter(block.data for block in heard.values()).items():
        if data not in may_be or times > 1:
            found.append(
                f"{topic}: heard {times} times, {'' if data in may_be else 'and nobody sent it'}: {data}"[:200]
            )


def _is_gap(block: Block) -> bool:
    """With the id `end` nothing comes behind it."""
    return block.id in (None, "end") and (block.name == "gap" or (block.data or "").startswith('{"type":"gap"'))


def _code(block: Block) -> str | None:
    """Of an error event."""
    if block.name != "error" and not (block.data or "").startswith('{"type":"error"'):
        return None
    code = json.loads(block.data or "")["code"]
    return str(code)


def _last_blocks(reader: Reader) -> list[Block]:
    return [block for connection in reader.connections for block in connection.blocks[-2:]]


def _seq(id: str | None) -> int:
    return int((id or "").rpartition(".")[2])


def _epoch(id: str | None) -> str:
    return (id or "").rpartition(".")[0]


def _short(block: Block) -> str:
    return f"{block.id} {block.name} {(block.data or '')[:60]!r}"


# The server


class _Query(msgspec.Struct):
    seed: int
    events: int
    pause_ms: int = 0


async def _perform(request: Request) -> AsyncIterator[Event]:
    script = Script(request.path.strip("/"), **msgspec.structs.asdict(request.query))
    rng, burst = random.Random(script.seed), 0
    for name, data in script.lines():
        yield Event(data, name)
        burst -= 1
        if script.pause_ms and burst < 0:
            burst = rng.randrange(10)
            await anyio.sleep(rng.uniform(0, script.pause_ms / 1000))
    if script.route == "failing":
        raise RuntimeError("a planned failure")
    yield Event("[DONE]") if script.route == "plain" else Event("", "done")


async def _listen(request: Request, name: str) -> Subscription:
    return Subscription(name, Event({"topic": name}, "init"), pulse=lambda: Event("", "heartbeat"), pulse_s=0.2)


async def _publish(request: Request, name: str) -> Response:
    cursor = await request.topics.publish(name, Event(request.raw_body, "message"))
    return JSON({"id": str(cursor)}, status=202)


def _serve(folder: str, port: str, log: str, lease_s: str) -> int:
    settings = Settings(
        port=int(port),
        log=log,
        lease_s=float(lease_s),
        data_dir=Path(folder),
        auth="off",  # they come by nginx
        heartbeat_s=0.3,
        drain_s=1.0,
        retry_ms=400,
        retention_events=RETENTION_EVENTS,
    )
    runs = [GET(f"/{name}", _perform, query=_Query, run=Run()) for name in ("steady", "quick", "failing")]
    runs.append(GET("/plain", _perform, query=_Query, run=Run(), dialect=DATA_ONLY))
    routes = [*runs, GET("/topics/{name}", _listen), POST("/topics/{name}", _publish, body=Any)]
    return serve(SSEApp(routes, settings), settings)


class Replica:
    """The server as a process that is stopped and started again on the same port and file."""

    def __init__(
        self, folder: str, history: History, log: str, lease_s: float = LEASE_S, *, pinned: bool = True
    ) -> None:
        self.port = free_port()
        self._pin = pin_server if pinned else None
        self._history = history
        self._output = Path(folder, f"output {self.port}")
        self._arguments = [folder, str(self.port), log, str(lease_s)]
        self._wanted = False
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        async with self._lock:
            await self._start()

    async def revive(self) -> None:
        """Start it again if it ended by itself, as it does where there is no log at its start."""
        async with self._lock:
            if self._wanted and self._process.returncode is not None:
                await self._start()

    async def _start(self) -> None:
        self._wanted = True
        command = [sys.executable, "-m", "benchmarks.history", *self._arguments]
        with self._output.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, stdout=output, stderr=output, preexec_fn=self._pin
            )

    async def listening(self) -> None:
        await listening(self.port)

    def send(self, what: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(what)

    async def stop(self, by: signal.Signals) -> None:
        async with self._lock:
            await self._stop(by)

    async def _stop(self, by: signal.Signals) -> None:
        self._wanted = False
        if self._process.returncode is None:
            self._process.send_signal(by)
        try:
            code = await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            self._history.faults.append(f"the server goes on after {by.name}")
            self.send(signal.SIGKILL)
            code = await self._process.wait()
        # SIGTERM that comes before Python has begun ends it the system's way.
        expected = {-by, 0 if by is signal.SIGTERM else -by, 3 if self._history.log_goes else -by}
        if code not in expected:
            self._history.faults.append(f"the server ended with {code} on {by.name}")

    async def stop_for_good(self, *expected: str) -> None:
        """`expected`: what it may well have complained about."""
        await self.stop(signal.SIGTERM)
        for entry in re.split(r"(?m)^(?=[A-Z]{4,} )", self._output.read_text(errors="replace")):
            bad = entry.startswith(("ERROR", "CRITICAL")) or "Traceback" in entry
            if bad and not any(text in entry for text in ("a planned failure", *expected)):
                self._history.faults.append(f"the server said: {entry.strip()}")


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
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError("no port is free")


# The clients


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


class Server(Protocol):
    """What readers and publishers talk to."""

    port: int

    async def start(self) -> None: ...

    async def listening(self) -> None: ...

    async def stop_for_good(self) -> None: ...


class Scenario:
    runs_per_s = 8.0
    haste = HASTE

    def __init__(self, seed: int, seconds: float, history: History, server: "Server") -> None:
        self.history, self.server = history, server
        self._seed, self._seconds = seed, seconds
        self._rng = self._random("plan")
        self._calm = False  #: nothing is cut and nothing published any more

    def _random(self, name: str) -> random.Random:
        return random.Random(f"{self._seed}/{name}")

    def _until_calm(self) -> float:
        return self._began + self._seconds - asyncio.get_running_loop().time()

    async def play(self) -> None:
        try:
            await self._play()
        finally:
            await self.server.stop_for_good()

    async def _play(self) -> None:
        await self.server.start()
        await self.server.listening()
        self._began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as tasks:
            readers = [tasks.create_task(reading) for reading in (*self._topics(), *self._runs())]
            publishers = [
                tasks.create_task(self._publisher(topic, f"publisher {number}"))
                for topic in self.history.topics
                for number in range(2)
            ]
            await self._trouble()
            await self.server.listening()
            self._calm = True
            await asyncio.wait(publishers)
            await self._all_begun()
            for topic in self.history.topics:
                await self._publish_final(topic)
            _, waiting = await asyncio.wait(readers, timeout=LIMIT_S)
            for reader in waiting:
                reader.cancel()

    async def _all_begun(self) -> None:
        """Until each reader of a topic has begun: who begins after what is published last has nothing to wait for."""
        left = asyncio.get_running_loop().time() + LIMIT_S
        waiting = [reader for reader in self.history.readers if reader.stream in self.history.topics]
        while waiting and asyncio.get_running_loop().time() < left:
            await asyncio.sleep(0.05)
            waiting = [one for one in waiting if not any(b.name == "init" for c in one.connections for b in c.blocks)]

    async def _publish_final(self, topic: str) -> None:
        """Until it is there. Readers stop at the first, if several go in."""
        publication = Publication(topic, "", FINAL)
        await self._publish(publication)
        while publication.id is None and self.history.log_goes:
            await asyncio.sleep(0.2)
            publication = Publication(topic, "", FINAL)
            await self._publish(publication)

    async def _trouble(self) -> None:
        """What happens to the server until all is calm."""
        await asyncio.sleep(self._until_calm())

    def _runs(self) -> list[Any]:
        """Each with two to five readers, of which the first two come at the same moment."""
        rng, readings = self._rng, []
        for number in range(int(self.runs_per_s * self._seconds)):
            route = rng.choice(["steady", "steady", "plain", "failing", "quick"])
            pause_ms = 0 if route == "quick" else rng.choice([50, 200])
            script = Script(route, rng.randrange(2**32), rng.randint(1, RETENTION_EVENTS - 20), pause_ms)
            key = hashlib.sha256(f"{self._seed} {number}".encode()).hexdigest()
            target = f"/{route}?seed={script.seed}&events={script.events}&pause_ms={pause_ms}&key={key}"
            self.history.runs[f"run {number} {route}"] = script
            begin = rng.uniform(0, 0.95 * self._seconds)
            for delay in (0, 0, *(rng.uniform(0, min(3, self._seconds / 2)) for _ in range(rng.randrange(4)))):
                name = f"reader {len(self.history.readers)} of run {number} {route}"
                readings.append(self._reader(Reader(name, f"run {number} {route}"), target, begin + delay))
        return readings

    def _topics(self) -> list[Any]:
        readings = []
        for number in range(4):
            topic = f"topic {number}"
            self.history.topics.append(topic)
            for reader in range(8):
                begin = self._rng.choice([0, self._rng.uniform(0, 0.9 * self._seconds)])
                sleepy = reader % 4 == 3
                name = f"reader {len(self.history.readers)} of {topic}"
                readings.append(self._reader(Reader(name, topic), f"/topics/topic%20{number}", begin, sleepy=sleepy))
        return readings

    def _reader(self, reader: Reader, target: str, begin_s: float, *, sleepy: bool = False) -> Any:
        self.history.readers.append(reader)
        return self._read(reader, target, begin_s, sleepy)

    async def _read(self, reader: Reader, target: str, begin_s: float, sleepy: bool) -> None:
        """As an `EventSource` reads: again and again, with the last id, until a 204."""
        rng, last_id, retry_ms = self._random(reader.name), "", 1000
        await asyncio.sleep(begin_s)
        while not reader.ended:
            connection = Connection(last_id)
            reader.connections.append(connection)
            answer = Answer(connection)
            head = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{self.server.port}\r\nAccept: text/event-stream\r\n"
            head += "Cache-Control: no-cache\r\n" + (f"Last-Event-ID: {last_id}\r\n" if last_id else "") + "\r\n"
            cut = self._cut(rng)
            connection.outcome = await exchange(self.server.port, head.encode(), answer, cut)
            ids = [block.id for block in connection.blocks if block.id is not None]
            last_id = ids[-1] if ids else last_id
            retry_ms = retry_ms if answer.retry_ms is None else answer.retry_ms
            reader.ended = answer.final or connection.status == 204
            if connection.status not in (0, 200, 204):
                return
            await asyncio.sleep(retry_ms / 1000 / self.haste)
            if sleepy and not self._calm:
                await asyncio.sleep(max(0, min(rng.uniform(0.5, 3), self._until_calm())))

    def _cut(self, rng: random.Random) -> Cut:
        after = round(10 ** rng.uniform(0, 4.7))
        if rng.random() < 0.05:
            after = -rng.randint(1, 100)
        cut = Cut(after, reset=rng.random() < 0.7, slow=rng.random() < 0.1)
        return Cut() if self._calm else cut

    async def _publisher(self, topic: str, name: str) -> None:
        rng, number = self._random(f"{topic} {name}"), 0
        while not self._calm:
            for _ in range(rng.randrange(20)):
                number += 1
                filler = "." * rng.choice([0, 10, 100, 1000])
                await self._publish(Publication(topic, name, f'"{topic} {name} {number}{filler}"'))
            await asyncio.sleep(rng.uniform(0, 0.3))

    async def _publish(self, publication: Publication) -> None:
        self.history.publications.append(publication)
        body = publication.data.encode()
        head = (
            f"POST /topics/{publication.topic.replace(' ', '%20')} HTTP/1.1\r\nHost: 127.0.0.1:{self.server.port}\r\n"
        )
        head += f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = Connection()
        answer = Answer(connection)
        outcome = await exchange(self.server.port, head.encode() + body, answer, Cut())
        if outcome == "refused":
            publication.status = -1
            await asyncio.sleep(0.05)
        elif outcome == "end":
            publication.status = connection.status
            if connection.status == 202:
                publication.id = json.loads(answer.body)["id"]


class _Stopped(Scenario):
    def __init__(self, seed: int, seconds: float, history: History, replica: Replica) -> None:
        super().__init__(seed, seconds, history, replica)
        self._replica = replica

    async def _trouble(self) -> None:
        """Stop the server at random moments, also while it starts, and start it again. Once at least."""
        rng, by = self._random("trouble"), self.history.stopped_by
        pause = rng.uniform(0.2, 0.6) * min(self._seconds, 5)
        while by is not None and (pause < self._until_calm() or not self.history.restarts):
            await asyncio.sleep(pause)
            await self._replica.stop(by)
            await asyncio.sleep(rng.choice([0, 0.3]))
            await self._replica.start()
            self.history.restarts += 1
            pause = rng.choice([0.2, 1, 4]) * rng.uniform(0.5, 2)
        await asyncio.sleep(self._until_calm())


def play(seed: int, seconds: float, stopped_by: signal.Signals | None = None, log: str = "sqlite") -> History:
    """A scenario of so many seconds, and until all readers have come to the end. `log` is as the setting."""
    history = History(stopped_by=stopped_by)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_Stopped(seed, seconds, history, Replica(folder, history, log)).play())
    return history


def run(seconds: int = 60, seed: int = 1, log: str = "sqlite") -> Report:
    """histories of many readers that are cut, of a server that is killed, and of one that is drained"""
    report = Report("history", {"seconds": seconds, "seed": seed, "log": log.partition(":")[0]})
    for name, stopped_by in SCENARIOS.items():
        history = play(seed, seconds, stopped_by, log)
        found = violations(history)
        for violation in found[:20]:
            print(f"seed {seed}, {name}: {violation}", file=sys.stderr)
        report.rows[name] = {count: Spread.of([number]) for count, number in history.counts().items()}
        report.checks.append(Check(f"violations, {name}", Spread.of([len(found)]), at_most=0))
    return report


if __name__ == "__main__":
    sys.exit(_serve(*sys.argv[1:]))
