"""Topics: streams in the log that anybody may write to and many read, for as long as they like.

Publishing appends; every event that an append brings is framed once for all readers of this process (`log.tail`). Each
process opens an epoch of its own on a topic before it first writes there or lets somebody read; where processes share
the log, they share the epoch too. The process keeps the epochs of the topics that were used last, and asks the log for
the others: so any number of topics can be used one after another.

The log deletes a topic that holds no events and was not written to for `EMPTY_TOPIC_S`. `keep` writes to the topics
that have readers here, so that none of them is deleted; a reader that was disconnected has most of that time to resume.

A fresh subscription begins with `init`, whose id is the top that it reads from: a cut before the first event loses
nothing. A resumed one has no `init`; what it can't be given is announced by a `gap` first. Where its cursor means
nothing to this log any more (`expired`), a topic goes on with all that it keeps: there is no end to send it to.
"""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import anyio

import ssecore.log
from ssecore.dialects import Dialect
from ssecore.errors import EncodeError, LogError, LogUnavailable, NotFound, Unavailable, WriterFenced
from ssecore.log import Cursor, Log, Retention, Shared, Stat, locate, parse_cursor
from ssecore.log.tail import Attached, Reader, Tail, Tails, gap_frames
from ssecore.request import Request
from ssecore.settings import Settings
from ssecore.wire import Event, encode

__all__ = ["Subscription", "Topics"]

#: How many topics are written to at once by `Topics.keep`: what goes into one commit, or one call of Redis.
KEEP_STEP: Final = 100
#: All topics with readers are written to so often in the time after which the log would delete them.
KEEPS: Final = 3
#: How often a publication is tried whose topic another process opens, or deletes, each time before it is appended. Seen
#: twice in a row: Redis was restarted twice.
TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a handler returns to let its client read a topic.

    `init` begins a fresh subscription; its id is the engine's. `pulse` is made and sent each `pulse_s` seconds, without
    an id: it is not in the log.
    """

    topic: str
    init: Event
    pulse: Callable[[], Event] | None = None
    pulse_s: float = 5.0


class Topics:
    """All topics of an app."""

    def __init__(self, log: Log, tails: Tails, settings: Settings) -> None:
        self._log = log
        self._tails = tails
        self._settings = settings
        self._retention = Retention(settings.retention_events, settings.retention_bytes, settings.retention_s)
        self._epochs: dict[str, str] = {}  # the longest unused first
        self._opening: Shared[str, str] = Shared()
        #: The first half of the epochs that this process opens: in the log it recognizes them again.
        self._process = secrets.token_urlsafe(8)

    async def publish(self, topic: str, *events: Event) -> Cursor:
        """Append the events, all or none; returns when they are in the log, with the last one's id.

        Raises `EncodeError`, `LogUnavailable`, `Unavailable`.
        """
        frames = [_stored(event) for event in events]
        return await self._append(_stream(topic), frames)

    async def _append(self, stream: str, frames: list[bytes], meta: dict[str, Any] | None = None) -> Cursor:
        for _ in range(TRIES):
            epoch = await self._epoch(stream)
            try:
                return Cursor(epoch, await self._log.append(stream, frames, epoch=epoch, meta=meta))
            except (WriterFenced, NotFound):  # another process has opened the topic (it may be shared), or deleted it
                if self._epochs.get(stream) == epoch:  # else another publisher of ours has been here already
                    del self._epochs[stream]
        raise Unavailable("other processes open or delete this topic all the time; try again", retry_after_s=1)

    def subscribers(self, topic: str) -> int:
        """How many read the topic here at the moment."""
        return self._tails.subscribers(_stream(topic))

    async def subscribe(self, request: Request, subscription: Subscription) -> Attached:
        """A reader that begins where the request says. Raises `BadRequest`, `Unavailable`, `LogUnavailable`."""
        self._check_room(subscription.topic)
        cursor = parse_cursor(request.last_event_id) if request.last_event_id else None
        stream = _stream(subscription.topic)
        await self._epoch(stream)
        tail = self._tails.enter(stream)
        try:
            stat = await self._log.stat(stream)
            if stat is None or _is_stale(stat):
                await self._touch(stream)
                stat = await self._log.stat(stream)
            if stat is None or tail.ended == "deleted":  # deleted between two awaits
                self._epochs.pop(stream, None)
                raise Unavailable("the topic is being deleted; try again", retry_after_s=1)
            self._check_room(subscription.topic)  # many may have come at the same moment
            tail.settle(stat)
            after, before = self._begin(stat, tail, subscription, cursor, request.dialect)
            reader = Reader(tail, after, dialect=request.dialect, before=before)
        finally:
            self._tails.leave(tail)
        reader.on_close = tail.leave
        return Attached(reader, {})

    def _check_room(self, topic: str) -> None:
        limit = self._settings.max_subscribers
        if limit is not None and self.subscribers(topic) >= limit:
            raise Unavailable("too many subscribers to this topic; try again")

    def _begin(
        self, stat: Stat, tail: Tail, subscription: Subscription, cursor: Cursor | None, dialect: Dialect
    ) -> tuple[int, bytes]:
        if cursor is None:
            top = Cursor(stat.epochs[-1][0], max(stat.last, tail.top))
            init = subscription.init
            return top.seq, encode(Event(init.data, init.event, str(top), init.retry))
        after, gap = locate(stat, cursor)
        if gap is None:
            return after, b""
        self._tails.gaps[gap.reason] += 1
        return after, gap_frames(gap, dialect)

    async def _epoch(self, stream: str) -> str:
        """This process's epoch on the stream, opened when it is first needed."""
        epoch = self._epochs.pop(stream, None)
        if epoch is None:
            epoch = await self._opening.do(stream, partial(self._open, stream))
        self._epochs[stream] = epoch
        while len(self._epochs) > self._settings.max_topics:
            del self._epochs[next(iter(self._epochs))]
        return epoch

    async def _open(self, stream: str) -> str:
        epoch = self._process + secrets.token_urlsafe(8)
        stat, created = await self._log.create(stream, epoch=epoch, kind="topic", retention=self._retention)
        if created:
            return epoch
        newest = stat.epochs[-1][0]
        if self._log.shared or newest.startswith(self._process):
            return newest
        await self._log.open(stream, epoch, retention=self._retention)
        return epoch

    async def _touch(self, stream: str) -> None:
        """Write to the topic, but no event: the log counts that as use. Creates the topic if it was deleted."""
        await self._append(stream, [], meta={})

    async def keep(self) -> None:
        """Write to the topics that have readers here, from time to time, so that the log doesn't delete them."""
        while True:
            await anyio.sleep(ssecore.log.EMPTY_TOPIC_S / KEEPS)
            streams = [stream for stream in self._tails.streams() if stream.startswith(_stream(""))]
            for start in range(0, len(streams), KEEP_STEP):
                async with anyio.create_task_group() as tasks:
                    for stream in streams[start : start + KEEP_STEP]:
                        tasks.start_soon(self._keep, stream)

    async def _keep(self, stream: str) -> None:
        with suppress(LogUnavailable, LogError):
            await self._touch(stream)


def _is_stale(stat: Stat) -> bool:
    """Whether the log may soon delete the topic."""
    return stat.first > stat.last and time.time() - stat.updated > ssecore.log.EMPTY_TOPIC_S / KEEPS


def _stored(event: Event) -> bytes:
    if event.id is not None:
        raise EncodeError("id must be left out on a topic: ids are the log's", field="id")
    return encode(event)


def _stream(topic: str) -> str:
    """The stream's name. A run's has no colon: a topic can't be taken for one."""
    return f"topic:{topic}"
