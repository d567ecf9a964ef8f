"""Topics: streams in the log with any number of writers and readers.

The log deletes a topic without events `EMPTY_TOPIC_S` after its last use; `keep` uses those that have readers here.

A subscription begins with `init`, whose id is the newest event's, or is resumed, with a `gap` if events are missing.
Unlike a run, an `expired` topic goes on with what it has.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import anyio

from ssecore.errors import LogError, LogUnavailable, NotFound, Unavailable
from ssecore.http.request import Request
from ssecore.log import Cursor, Log, Retention, Stat, facts, parse_cursor
from ssecore.log.facts import encoded
from ssecore.log.tail import Attached, Place, Tails
from ssecore.settings import Settings
from ssecore.wire import Event, encode

__all__ = ["Subscription", "Topics"]

#: Topics per commit.
KEEP_STEP: Final = 100
#: Uses in that time.
KEEPS: Final = 3


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a handler returns to subscribe its client to a topic.

    `init` is the first event; the engine sets its id. `pulse` makes an event every `pulse_s` seconds, without an id: it
    isn't in the log.
    """

    topic: str
    init: Event
    pulse: Callable[[], Event] | None = None
    pulse_s: float = 5.0


class Topics:
    """An app's topics."""

    def __init__(self, log: Log, tails: Tails, settings: Settings) -> None:
        self._log = log
        self._tails = tails
        self._settings = settings
        self._retention = Retention(settings.retention_events, settings.retention_bytes, settings.retention_s)

    async def publish(self, topic: str, *events: Event) -> Cursor:
        """Append the events, all or none. Returns the last one's id once they are stored.

        Raises `EncodeError`, `LogUnavailable`, `Unavailable`.
        """
        frames = [encoded(event) for event in events]
        return await self._log.publish(_stream(topic), frames, retention=self._retention)

    def subscribers(self, topic: str) -> int:
        """Readers in this process."""
        return self._tails.subscribers(_stream(topic))

    async def subscribe(self, request: Request, subscription: Subscription) -> Attached:
        """Raises `BadRequest`, `Unavailable`, `LogUnavailable`."""
        cursor = parse_cursor(request.last_event_id) if request.last_event_id else None
        stream = _stream(subscription.topic)
        init = subscription.init

        def make_init(top: Cursor) -> bytes:
            return encode(Event(init.data, init.event, str(top), init.retry))

        try:
            reader, _ = await self._tails.attach(
                stream, cursor or Place.TOP, dialect=request.dialect, make_first=make_init, get_stat=self._get_stat
            )
        except NotFound:
            raise Unavailable("the topic is being deleted; try again", retry_after_s=1) from None
        limit = self._settings.max_subscribers
        if limit is not None and self.subscribers(subscription.topic) > limit:
            reader.close()
            raise Unavailable("too many subscribers to this topic; try again")
        return Attached(reader, {})

    async def _get_stat(self, stream: str) -> Stat | None:
        """The facts. Creates the topic, or uses it."""
        stat = await self._log.stat(stream)
        if stat is None or _is_stale(stat):
            await self._touch(stream)
            stat = await self._log.stat(stream)
        return stat

    async def _touch(self, stream: str) -> None:
        await self._log.publish(stream, [], retention=self._retention, meta={})

    async def keep(self) -> None:
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
    return stat.first > stat.last and time.time() - stat.updated > facts.EMPTY_TOPIC_S / KEEPS


def _stream(topic: str) -> str:
    """Run ids have no colon."""
    return f"topic:{topic}"
