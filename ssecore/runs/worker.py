"""A run at work. The rules are those of `ssecore.runs`."""

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from itertools import accumulate, chain, repeat
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio
import msgspec
from anyio import current_time

from ssecore.dialects import SoFar, cancelled_frames, error_frames
from ssecore.errors import Interrupted, LogError, LogUnavailable, NotFound, SSEAppError, TooLarge, WriterFenced
from ssecore.http.request import Request
from ssecore.http.routes import Route
from ssecore.log import facts
from ssecore.log.facts import encoded
from ssecore.streaming.pump import FIRST_ITEM_S, Pump
from ssecore.wire import Decoder, Event

if TYPE_CHECKING:
    from ssecore.runs import Runs

__all__ = ["Meta", "State", "Worker", "last_event"]

logger = logging.getLogger("sseapp")

State = Literal["running", "completed", "failed", "cancelled", "interrupted"]

#: Posted and not stored yet; the pump holds as much again.
BUFFERS: Final = 2
RETRY_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0)
#: Steps of the linger time. One that ends this late isn't counted: the process was stopped.
LINGER_STEPS: Final = 8
LATE_S: Final = 1.0


class Meta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A run's `meta`. Other versions may write other fields, which are kept."""

    state: str | None = None
    route: str | None = None
    dialect: str | None = None
    data_only: bool = False
    linger_s: float | None = None
    target: str | None = None
    request: str | None = None
    thread: str | None = None
    note: Mapping[str, Any] = {}
    about: str = ""


class Worker:
    """A run in this process. It has a task only at its end; before, the pump and the log call `_advance`."""

    def __init__(
        self,
        runs: "Runs",
        id: str,
        route: Route,
        request: Request,
        params: Mapping[str, Any],
        meta: Meta,
    ) -> None:
        self.id = id
        self.owner = request.caller
        self.meta = meta
        self._runs = runs
        self._route = route
        self._began = current_time()
        self._started = anyio.Event()  # with its first stored event, or its end
        self._failed_early: Exception | None = None  # rule 2
        self._answered = False  # 200 or 202: too late for rule 2
        self._reason: Literal["asked", "linger", "drain"] | None = None
        self._request = request.for_run(id)
        self._most_unstored = BUFFERS * runs.settings.buffer_bytes
        self._pump: Pump[Event] = Pump(
            route.call(self._request, params), encoded, self._request, buffer_bytes=self._most_unstored
        )
        self._pump.on_ready = self._advance
        self._writer = runs.log.writer(id, id, self._confirm)
        self._unstored = 0  # bytes posted and not stored yet
        self._failure: SSEAppError | None = None  # the log's
        self._events_left = runs.retention.events or sys.maxsize
        self._bytes_left = runs.retention.bytes or sys.maxsize
        self._too_large = False
        self._last = b""
        self._count = 0
        self._touched: anyio.Event | None = None  # while it lingers

    def start(self) -> None:
        self._pump.start(self._runs.tasks)

    async def wait_started(self) -> None:
        if not self._answered:
            with anyio.move_on_after(FIRST_ITEM_S - (current_time() - self._began)):
                await self._started.wait()
            if self._failed_early is not None:
                raise self._failed_early
            self._answered = True

    def _advance(self) -> None:
        """Post what the pump has, or leave it to `_confirm`; or end. Hot path, once per wait of the generator."""
        pump = self._pump
        if self._failure is None and not pump.ended:
            if self._unstored < self._most_unstored and pump.has_something:
                frames, size = self._admit(pump.take())
                if frames:
                    self._unstored += size
                    try:
                        self._writer.post(frames, size)
                    except SSEAppError as error:
                        self._confirm(size, error)
        elif pump.on_ready is not None and (self._failure is not None or not self._unstored):  # no hole
            pump.close()
            self._runs.spawn(self._end)

    def _admit(self, frames: list[bytes]) -> tuple[list[bytes], int]:
        """The frames that fit the run's retention, and their size."""
        size, room = sum(map(len, frames)), min(self._bytes_left, facts.MAX_APPEND_BYTES)
        if len(frames) > self._events_left or size > room:
            frames = frames[: self._events_left]
            frames = [frame for frame, end in zip(frames, accumulate(map(len, frames)), strict=True) if end <= room]
            size = sum(map(len, frames))
            self._too_large, self._events_left = True, len(frames)  # none behind them
            self._stop_generator()
        if frames:
            self._last = frames[-1]
            self._count += len(frames)
            self._events_left -= len(frames)
            self._bytes_left -= size
        return frames, size

    def _confirm(self, size: int, error: SSEAppError | None) -> None:
        self._unstored -= size
        if error is None:
            self._started.set()
        elif self._failure is None:
            self._failure = error
        if self._pump.has_something or self._failure is not None:
            self._advance()

    def _stop_generator(self) -> None:
        self._request.end_for("failed")
        self._pump.stop()

    async def _end(self) -> None:
        try:
            try:
                if self._failure is not None:
                    self._stop_generator()
                    raise self._failure
                await self._store(*self._ending())
            except (WriterFenced, NotFound):
                logger.warning("run %s was taken over or deleted while it was running", self.id)
            except Exception as error:  # the log's; else the dialect's, or ours
                await self._store_later(error)
        except Exception:
            logger.exception("run %s: its worker failed", self.id)
        finally:
            await self._pump.closed()
            self._request.close()
            self._runs._ended(self)
            self._started.set()
            del self._writer  # no cycle holds the body

    def _ending(self) -> tuple[list[bytes], State]:
        frames, _ = self._admit(self._pump.take())
        failure, dialect = self._pump.failure, self._route.dialect
        if self._too_large:
            failure = TooLarge("the run is larger than the log keeps of one stream")
        elif self._pump.exhausted:
            failed = self._request.failed or self._last.startswith(b"event: error\n")
            return frames, "failed" if failed else "completed"
        elif self._reason is not None:
            if failure is not None:
                logger.warning("run %s: its handler failed while it was closed", self.id, exc_info=failure)
            if self._reason != "drain":
                return [*frames, *cancelled_frames(self._reason, dialect, self._so_far())], "cancelled"
            stopped = error_frames(Interrupted("the service stopped"), dialect, self._so_far())
            return [*frames, *stopped], "interrupted"
        elif failure is not None and not frames and self._may_be_deleted():
            self._failed_early = failure
        failure = failure or RuntimeError("the handler was stopped without a reason")
        return [*frames, *error_frames(failure, dialect, self._so_far())], "failed"

    async def _store(self, frames: list[bytes], state: State) -> None:
        """Append the end, or delete the run (rule 2)."""
        if self._failed_early is not None and await self._runs.log.delete(self.id, unless_answered=True):
            return
        self._failed_early = None
        meta = msgspec.to_builtins(msgspec.structs.replace(self.meta, state=state))
        await self._runs.log.append(self.id, frames, epoch=self.id, close=True, meta=meta)

    async def _store_later(self, error: Exception) -> None:
        """Send readers an error without an id; store it when possible."""
        frames = error_frames(error, self._route.dialect, self._so_far())
        logger.error("run %s: its events can't be stored: %s", self.id, error)
        if self._failed_early is None and self._may_be_deleted():
            self._failed_early = error
        tail = self._runs.tails.get(self.id)
        if tail is not None:
            tail.fail(b"".join(frames))
        self._started.set()
        for wait_s in chain(RETRY_S, repeat(RETRY_S[-1])):
            if self._runs.stopping.is_set():
                return
            with anyio.move_on_after(wait_s):
                await self._runs.stopping.wait()
            with suppress(LogUnavailable, LogError):
                return await self._store(frames, "failed")

    def _so_far(self) -> SoFar:
        return SoFar(self.id, self.meta.note, self._count, last_event(self._last))

    def _may_be_deleted(self) -> bool:
        """Rule 2, for this process."""
        return not self._answered and not self._started.is_set() and current_time() - self._began < FIRST_ITEM_S

    def cancel(self, reason: Literal["asked", "linger", "drain"]) -> None:
        """Idempotent."""
        if self._reason is None and not self._pump.exhausted and not self._pump.ended:
            self._reason = reason
            self._request.end_for("drain" if reason == "drain" else "cancelled")
            self._pump.stop()

    def touch(self) -> None:
        if self._touched is not None:
            self._touched.set()

    def linger(self) -> None:
        limit_s = self.meta.linger_s
        if self._touched is None and limit_s is not None:
            self._touched = anyio.Event()
            self._runs.spawn(partial(self._linger, limit_s))
        self.touch()

    async def _linger(self, limit_s: float) -> None:
        """Cancel it after `limit_s` seconds without readers."""
        step_s, steps = limit_s / LINGER_STEPS, 0
        peers = self._runs.log.peers
        while self._runs.is_unread(self):
            if steps == LINGER_STEPS:
                steps = 0
                with suppress(LogUnavailable, LogError):  # it may have readers elsewhere: don't cancel
                    if peers is None or not await peers.touched(self.id):
                        self.cancel("linger")
                        break
            self._touched, planned = anyio.Event(), current_time() + step_s
            with anyio.move_on_after(step_s):
                await self._touched.wait()
            steps = 0 if self._touched.is_set() else steps + (current_time() < planned + LATE_S)
        self._touched = None


def last_event(frame: bytes) -> Event | None:
    """Of any size."""
    events = Decoder(max_event_bytes=None).feed(frame)
    return events[-1] if events else None
