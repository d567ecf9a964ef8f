"""The history checker: does every reader hear every event once, in order, whatever happens to its connection?

`python -m tests.history --seconds 60` plays scenarios (scenario.py) and checks what came of each. A real server
(app.py) has runs and topics on an event log. Publishers publish, and many readers behave as a browser's `EventSource`
does: each is cut at random bytes and resumes with its last id. The server may be stopped by SIGKILL or SIGTERM and
started again on the same log. `violations` then checks what the readers received. It knows only the plan of each run
and the answers that the publishers got. `python -m tests.chaos` breaks more.

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

import json
import random
import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

__all__ = [
    "FINAL",
    "RETENTION_EVENTS",
    "Block",
    "Connection",
    "History",
    "Publication",
    "Reader",
    "Script",
    "violations",
]

#: Of a topic, so that a reader that stays away for a second or two misses something; more than a run ever has.
RETENTION_EVENTS: Final = 120
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

    def summary(self) -> str:
        return ", ".join(f"{name} {number:,.0f}" for name, number in self.counts().items())


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
