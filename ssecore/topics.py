"""Topics: streams in the log that anybody may write to and many read, for as long as they like.

Publishing appends; every event that an append brings is framed once for all readers of this process (`log.tail`). The
epochs that its ids are of are the log's business (`Log.publish`), which creates a topic when it is first needed. A
process keeps nothing about a topic that has no readers here: so any number of topics can be used.

The log deletes a topic that holds no events and was not written to for `EMPTY_TOPIC_S`. `keep` writes to the topics
that have readers here, so that none of them is deleted; a reader that was disconnected has most of that time to resume.

A fresh subscription begins with `init`, whose id is the top that it reads from: a cut before the first event loses
nothing. A resumed one has no `init`; what it can't be given is announced by a `gap` first. Where its cursor means
nothing to this log any more (`expired`), a topic goes on with all that it keeps: there is no end to send it to.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import anyio

from ssecore.errors import EncodeError, LogError, LogUnavailable, NotFound, Unavailable
from ssecore.http.request import Request
from ssecore.log import Cursor, Log, Retention, Stat, facts, parse_cursor
from ssecore.log.tail import Attached, Place, Tails
from ssecore.settings import Settings
from ssecore.wire import Event, encode

__all__ = ["Subscription", "Topics"]

#: How many topics are written to at once by `Topics.keep`: what goes into one commit, or one call of Redis.
KEEP_STEP: Final = 100
#: All topics with readers are written to so often in the time after which the log would delete them.
KEEPS: Final = 3


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

    async def publish(self, topic: str, *events: Event) -> Cursor:
        """Append the events, all or none; returns when they are in the log, with the last one's id.

        Raises `EncodeError`, `LogUnavailable`, `Unavailable`.
        """
        frames = [_stored(event) for event in events]
        return await self._log.publish(_stream(topic), frames, retention=self._retention)

    def subscribers(self, topic: str) -> int:
        """How many read the topic here at the moment."""
        return self._tails.subscribers(_stream(topic))

    async def subscribe(self, request: Request, subscription: Subscription) -> Attached:
        """A reader that begins where the request says. Raises `BadRequest`, `Unavailable`, `LogUnavailable`."""
        self._check_room(subscription.topic)
        cursor = parse_cursor(request.last_event_id) if request.last_event_id else None
        stream = _stream(subscription.topic)
        init = subscription.init

        def greet(top: Cursor) -> bytes:
            return encode(Event(init.data, init.event, str(top), init.retry))

        try:
            reader, _ = await self._tails.attach(
                stream, cursor or Place.TOP, dialect=request.dialect, greet=greet, look=self._look
            )
        except NotFound:
            raise Unavailable("the topic is being deleted; try again", retry_after_s=1) from None
        try:
            self._check_room(subscription.topic, itself=1)  # many may have come at the same moment
        except Unavailable:
            reader.close()
            raise
        return Attached(reader, {})

    async def _look(self, stream: str) -> Stat | None:
        """The topic's facts. It is created, or kept from being deleted, where that is needed."""
        stat = await self._log.stat(stream)
        if stat is None or _is_stale(stat):
            await self._touch(stream)
            stat = await self._log.stat(stream)
        return stat

    def _check_room(self, topic: str, itself: int = 0) -> None:
        limit = self._settings.max_subscribers
        if limit is not None and self.subscribers(topic) - itself >= limit:
            raise Unavailable("too many subscribers to this topic; try again")

    async def _touch(self, stream: str) -> None:
        """Write to the topic, but no event: the log counts that as use. Creates the topic if it was deleted."""
        await self._log.publish(stream, [], retention=self._retention, meta={})

    async def keep(self) -> None:
        """Write to the topics that have readers here, from time to time, so that the log doesn't delete them."""
        while True:
            await anyio.sleep(facts.EMPTY_TOPIC_S / KEEPS)
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
    return stat.first > stat.last and time.time() - stat.updated > facts.EMPTY_TOPIC_S / KEEPS


def _stored(event: Event) -> bytes:
    if event.id is not None:
        raise EncodeError("id must be left out on a topic: ids are the log's", field="id")
    return encode(event)


def _stream(topic: str) -> str:
    """The stream's name. A run's has no colon: a topic can't be taken for one."""
    return f"topic:{topic}"
