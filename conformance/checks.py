"""The checks. A check's docstring is what it requires; its source is where that is written."""

import asyncio
import random
import re
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import httpx

from conformance.client import Client, Event, Reading, Target

__all__ = ["CHECKS", "Check", "Failed", "NotApplicable", "Subject"]

#: An id of the protocol's form that no server issues.
NEVER_ISSUED: Final = "AAAAAAAAAAAAAAAAAAAAAA.7"
GARBAGE: Final[Sequence[str | bytes]] = ("nonsense", "-1", "9" * 400, "../../etc/passwd", b"\xff", 'a; b="c"')
LONG_BYTES: Final = 128 * 1024
#: How many of a stream's events are resumed after; if it has more, they are chosen at random.
MAX_PLACES: Final = 60
MAX_CUTS: Final = 200  #: of one client


class Failed(Exception):
    """The server doesn't do what is required."""


class NotApplicable(Exception):
    """The server doesn't claim it, or this stream doesn't show it."""


class Subject:
    """The server under test: its stream, read once as a whole, and how to ask for more of it."""

    def __init__(self, given: Namespace, target: Target) -> None:
        self.given = given  #: the command's options
        self.target = target
        self.client = Client(given.timeout)
        self.random = random.Random(given.seed)
        self.whole: Reading
        self.where: Target  #: for resuming `whole`

    async def begin(self) -> None:
        self.whole = await self.client.read(self.target, events=self.given.events)
        self.where = self.resumed_at(self.whole)

    def resumed_at(self, reading: Reading) -> Target:
        location = reading.headers.get("content-location")
        return self.target.at(location) if location else self.target

    async def resume(self, after: str | bytes, where: Target | None = None, **limits: Any) -> Reading:
        return await self.client.read(where or self.where, {"last-event-id": after}, **limits)

    @property
    def events(self) -> list[Event]:
        """Those of the whole stream, if it can be resumed."""
        events = [event for event in self.whole.events if not event.is_gap]
        applies(len(events) > 1 and all(event.id for event in events), "fewer than two events, or some without an id")
        return events

    def limit(self, events: int) -> int | None:
        """How many events to read. `None`: to the end."""
        return None if self.given.events is None else events

    async def compare(self, number: int, *, in_query: bool = False, sleep_s: float = 0.0) -> None:
        """Resume after this event of the whole stream, and compare what comes with what came."""
        where, after, wanted = self.where, self.events[number].id or "", self.events[number + 1 :]
        if in_query:
            where = replace(where, url=str(httpx.URL(where.url).copy_merge_params({"last_event_id": after})))
        cursor = {} if in_query else {"last-event-id": after}
        reading = await self.client.read(where, cursor, events=self.limit(len(wanted)), sleep_s=sleep_s)
        same(after, wanted, answered(reading).events)


@dataclass(frozen=True)
class Check:
    source: str
    run: Callable[[Subject], Awaitable[str | None]]  #: gives what was found, if that says more than "ok"

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", "-")

    @property
    def required(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


CHECKS: Final[list[Check]] = []


def check(source: str) -> Callable[[Any], Any]:
    def add(run: Any) -> Any:
        CHECKS.append(Check(source, run))
        return run

    return add


def require(true: object, text: str) -> None:
    if not true:
        raise Failed(text)


def applies(true: object, reason: str) -> None:
    if not true:
        raise NotApplicable(reason)


def answered(reading: Reading) -> Reading:
    """It is an event stream that nothing cut off."""
    require(reading.is_stream, f"expected 200 and text/event-stream: {reading}")
    require(not reading.error, f"the answer broke off: {reading.error}")
    return reading


def same(after: str | None, wanted: list[Event], got: list[Event]) -> None:
    """What came after a cursor is what should. A loss that a gap announces is not silent."""
    if got and got[0].is_gap:
        got = got[1:]
        wanted = wanted[max(len(wanted) - len(got), 0) :]
    for index, event in enumerate(got):
        due = wanted[index] if index < len(wanted) else "the end"
        if event == due:
            continue
        require(event not in wanted[index:], f"after {after!r}: {due} is missing, and no gap announces it")
        require(event not in wanted and event.id != after, f"after {after!r}: {event} came twice")
        raise Failed(f"after {after!r}: {event} came instead of {due}")
    require(len(got) >= len(wanted), f"after {after!r}: {len(wanted) - len(got)} events are missing at the end")


def refused(reading: Reading) -> str:
    """It is a 4xx, or a stream whose first event announces the loss."""
    require(reading.status and reading.status < 500, f"expected a 4xx, or a gap: {reading}")
    gap = bool(reading.events) and reading.events[0].is_gap
    require(gap or reading.status >= 400, f"neither refused nor announced by a gap: {reading}")
    return "gap" if gap else str(reading.status)


# What one reading shows


@check("HTML standard, 9.2.3")
async def content_type(subject: Subject) -> str | None:
    """The answer is 200 and text/event-stream; a charset, if there is one, is utf-8."""
    given = subject.whole.headers.get("content-type", "")
    require(subject.whole.is_stream, f"expected 200 and text/event-stream: {subject.whole}")
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", given, re.I)
    require(charset is None or charset[1].lower() == "utf-8", f"Content-Type: {given}")
    return given


@check("RFC 9111, 5.2.2")
async def caching(subject: Subject) -> str | None:
    """No cache may reuse the answer: it has Cache-Control: no-cache, or no-store."""
    given = subject.whole.headers.get("cache-control", "")
    names = {name.strip().partition("=")[0].lower() for name in given.split(",")}
    require(names & {"no-cache", "no-store"}, f"Cache-Control: {given or 'was not sent'}")
    return given


@check("HTML standard, 9.2.5")
async def format(subject: Subject) -> str | None:
    """The body is UTF-8 without a byte order mark: comments and fields, in whole blocks."""
    parser = subject.whole.parser
    require(parser.events, f"no event came: {subject.whole}")
    require(not parser.faults, "; ".join(parser.faults[:3]))
    return f"{len(parser.events)} events, {parser.comments} comments"


@check("RFC 9112, 7.1 and 8")
async def complete(subject: Subject) -> None:
    """A stream that ends by itself ends with the proper end of its body; another one stays open."""
    require(subject.whole.ended == (subject.given.events is None), f"{subject.whole}")


@check("docs/protocol.md, The stream")
async def retry(subject: Subject) -> str | None:
    """retry comes before the first event, so that a client knows when to reconnect."""
    require(subject.whole.parser.retry_first, "no retry was sent, or only after an event")
    return f"{subject.whole.parser.retry} ms"


@check("docs/protocol.md, The stream")
async def ids(subject: Subject) -> None:
    """Each event except a gap has an id, and no two have the same."""
    events = [event for event in subject.whole.events if not event.is_gap]
    found = [event.id for event in events if event.id]
    require(len(found) == len(events), f"{len(events) - len(found)} of {len(events)} events have no id")
    require(len(found) == len(set(found)), f"an id came twice: {found[:10]}")


@check("docs/protocol.md, The stream")
async def id_last(subject: Subject) -> None:
    """The id is the last line of its block: a client that is cut before that line asks for the event again."""
    early = subject.whole.parser.id_early
    require(not early, f"{early} events have another line after their id")


@check("docs/protocol.md, Answers")
async def arrival(subject: Subject) -> str | None:
    """Events are sent when they are there, and not gathered until the end."""
    first_s, total_s = subject.whole.first_event_s or 0.0, answered(subject.whole).total_s
    applies(len(subject.whole.events) > 2 and total_s > 0.5, "name a stream that takes half a second for three events")
    found = f"the first event after {first_s:.2f} of {total_s:.2f} s"
    require(first_s < 0.9 * total_s, found)
    return found


@check("HTML standard, 9.2.7")
async def heartbeat(subject: Subject) -> str | None:
    """While there is no event, a comment is sent each --heartbeat seconds."""
    every_s, reading = subject.given.heartbeat, answered(subject.whole)
    applies(every_s is not None, "give --heartbeat SECONDS if the server claims them")
    applies(reading.pause_s > every_s, f"it was never {every_s} s without an event")
    require(reading.silence_s <= 2 * every_s + 1, f"{reading.silence_s:.1f} s without a byte")
    require(reading.parser.comments, f"{reading.pause_s:.1f} s without an event, and no comment")
    return f"{reading.parser.comments} comments"


@check("docs/protocol.md, The stream")
async def last_word(subject: Subject) -> str | None:
    """error and cancelled are the last event of their stream."""
    words = [index for index, event in enumerate(subject.whole.events) if event.name in ("error", "cancelled")]
    applies(words, "this stream didn't fail: name one that does")
    after = subject.whole.events[words[0] + 1 :]
    require(not after, f"{len(after)} events came after it")
    return str(subject.whole.events[words[0]])


# Resuming


@check("HTML standard, 9.2.4")
async def resume(subject: Subject) -> str | None:
    """After each event's id as Last-Event-ID comes the rest: nothing is missing, nothing comes twice."""
    count = len(subject.events) - 1
    chosen = subject.random.sample(range(count), min(count, MAX_PLACES))
    for start in range(0, len(chosen), subject.given.clients):
        await asyncio.gather(*(subject.compare(number) for number in chosen[start : start + subject.given.clients]))
    return f"at {len(chosen)} places"


@check("docs/protocol.md, A client, in order")
async def cuts(subject: Subject) -> str | None:
    """Clients that are cut at any byte, again and again, while the stream is at work, get each event once."""
    size = subject.whole.size // 3 if subject.events else 0
    seeds = [subject.random.random() for _ in range(subject.given.clients)]
    counts = await asyncio.gather(*(_cut_client(subject, random.Random(seed), size) for seed in seeds))
    return f"{len(counts)} clients, {sum(counts)} cuts"


async def _cut_client(subject: Subject, rng: random.Random, size: int) -> int:
    events, where, after, limit = list[Event](), subject.where, "", subject.given.events
    for cut in range(MAX_CUTS):
        at = rng.randint(1, size) + cut * 10  # sooner or later more than a block
        reading = await (
            subject.resume(after, where, size=at) if after else subject.client.read(subject.target, size=at)
        )
        if after and (reading.status == 204 or (reading.ended and not reading.events)):
            break
        if not after:  # begun anew: it had no complete block to resume after
            events, where = [], subject.resumed_at(answered(reading))
        for event in answered(reading).events:
            require(event not in events, f"after {after!r}: {event} came twice")
            events.append(event)
        after = reading.parser.last_id or after
        if limit is not None and len(events) >= limit:
            break
    else:
        raise Failed(f"no end after {MAX_CUTS} cuts: {len(events)} events, last id {after!r}")
    whole = await subject.resume(events[0].id or "", where, events=subject.limit(len(events) - 1))
    same(events[0].id, answered(whole).events[: subject.limit(len(events) - 1)], events[1:])
    return cut


@check("docs/protocol.md, Requests")
async def readers(subject: Subject) -> None:
    """Clients that read at the same time get the same events."""
    await asyncio.gather(*(subject.compare(0) for _ in range(subject.given.clients + 1)))


@check("docs/protocol.md, The stream")
async def slow_reader(subject: Subject) -> None:
    """A client that doesn't read for two seconds loses nothing."""
    await subject.compare(0, sleep_s=2.0)


@check("docs/protocol.md, Requests")
async def query_cursor(subject: Subject) -> None:
    """?last_event_id= means the same as the header."""
    await subject.compare(0, in_query=True)


@check("HTML standard, 9.2.3; docs/protocol.md, A client, in order")
async def end(subject: Subject) -> None:
    """A client that has read to the end and asks again gets 204, and stops."""
    applies(subject.given.events is None, "the stream has no end")
    reading = await subject.resume(subject.events[-1].id or "", events=1)
    require(reading.status == 204 and not reading.size, f"expected 204: {reading}")


@check("docs/protocol.md, Requests")
async def unknown_cursor(subject: Subject) -> str | None:
    """An id that the server never issued is refused, or a gap announces the loss."""
    cursors, last = [NEVER_ISSUED], subject.events[-1].id or ""
    if number := re.search(r"\d{1,15}$", last):  # an id of this stream, in the future
        cursors.append(f"{last[: number.start()]}{int(number[0]) + 1_000_000}")
    return ", ".join([refused(await subject.resume(cursor, events=1)) for cursor in cursors])


@check("docs/protocol.md, Statuses and codes")
async def bad_cursor(subject: Subject) -> str | None:
    """A Last-Event-ID that is not an id at all is refused, or a gap announces the loss."""
    return ", ".join([refused(await subject.resume(text, events=1)) for text in GARBAGE if subject.events])


@check("RFC 9110, 5.4; RFC 6585, 5")
async def long_cursor(subject: Subject) -> str | None:
    """A Last-Event-ID of 128 KiB gets a 4xx."""
    reading = await subject.resume("9" * LONG_BYTES, events=1)
    require(400 <= reading.status < 500, f"expected a 4xx, got {reading.status or reading.error}")
    return str(reading.status)


@check("RFC 9457; docs/protocol.md, Answers")
async def problem(subject: Subject) -> str | None:
    """A refusal is application/problem+json with status, code and detail."""
    reading = await subject.resume("nonsense", events=1)
    applies(400 <= reading.status < 500, "a bad cursor isn't refused")
    given = Event(None, "", reading.text).json
    good = given.get("status") == reading.status and given.get("code") and given.get("detail")
    require(good and reading.headers.get("content-type") == "application/problem+json", str(reading))
    return str(given["code"])


@check("docs/protocol.md, The stream")
async def lost(subject: Subject) -> str | None:
    """What is no longer kept is announced by a gap before any other event; it has no id, or end if nothing follows."""
    applies(subject.given.lost, "give --lost ID, an id after which events were dropped")
    events = answered(await subject.resume(subject.given.lost, events=1)).events
    require(events and events[0].is_gap, f"the first event is not a gap: {events[:1]}")
    require({"reason", "from", "to"} <= events[0].json.keys(), f"its data lacks reason, from or to: {events[0]}")
    require(events[0].id in (None, "end"), f"its id would become the client's cursor: {events[0]}")
    return events[0].data


# HTTP around it


@check("RFC 9110, 9.1 and 9.3.2")
async def head(subject: Subject) -> None:
    """HEAD has GET's status and Content-Type, and no body."""
    get = next((target for target in (subject.target, subject.where) if target.method == "GET"), None)
    applies(get is not None, "there is no GET for this stream")
    reading = await subject.client.read(replace(get or subject.target, method="HEAD"))
    good = reading.ended and not reading.size and reading.status == 200
    require(good and reading.headers.get("content-type") == subject.whole.headers.get("content-type"), str(reading))


@check("RFC 9110, 15.5.6")
async def method(subject: Subject) -> str | None:
    """Another method gets 405, with Allow."""
    reading = await subject.client.read(replace(subject.target, method="PATCH", content=None))
    allow = reading.headers.get("allow", "")
    require(reading.status == 405, f"expected 405: {reading}")
    require(subject.target.method in re.split(r"[,\s]+", allow), f"Allow: {allow or 'was not sent'}")
    return allow


@check("docs/protocol.md, Requests")
async def key(subject: Subject) -> None:
    """The same Idempotency-Key gives the same run."""
    applies(subject.given.keyed and subject.events, "give --keyed if the server claims it")
    headers = {"idempotency-key": f"{subject.random.getrandbits(128):032x}"}
    first, second = [answered(await subject.client.read(subject.target, headers)).events for _ in range(2)]
    require(first == second, "it was another stream")
    require(first != subject.whole.events, "without a key it is the same stream, too")


@check("Fetch standard, 3.2")
async def cors(subject: Subject) -> None:
    """Pages of --origin may read the answer and send Last-Event-ID."""
    origin = subject.given.origin
    applies(origin, "give --origin if the server claims it")
    ask = {"access-control-request-method": "GET", "access-control-request-headers": "last-event-id"}
    preflight = await subject.client.read(replace(subject.where, method="OPTIONS"), {"origin": origin, **ask})
    require(
        "last-event-id" in preflight.headers.get("access-control-allow-headers", "").lower(), str(preflight.headers)
    )
    allowed = (await subject.client.read(subject.target, {"origin": origin}, events=1)).headers
    require(allowed.get("access-control-allow-origin") in (origin, "*"), str(allowed))


@check("RFC 9110, 15.6")
async def alive(subject: Subject) -> None:
    """After all of this the server answers as in the beginning."""
    answered(await subject.client.read(subject.target, events=1))
