"""Runs: generators that work detached from any connection, into the log; and their routes under /runs.

The first request to a resumable route starts a run: a stream in the log, whose name and first epoch are the run's id,
and a `Worker` that pumps the generator into it. Whoever started it reads the log like everybody else. A request with a
`Last-Event-ID` reads on after it, on the same route or on `/runs/<id>/events`; one with an `Idempotency-Key` that is
known reads the run that was started with it.

1.  A run's last event and its close are one append. The last event is the handler's own, or `error`, or `cancelled`.
2.  If a run fails in its first second before any event, it is deleted: every waiting request gets the HTTP error, and
    its idempotency key can be used again. So no request is answered 200 or 202 before the run has an event or the
    second is over; and who answers for another process's run tells the log first (`Log.tell`): then the run is kept,
    and ends with a stored `error`.
3.  A worker stands in `Runs._workers` before its stream is created: of two requests with one key, the second finds it.
4.  The handler's request is a copy, without a connection: what ends a reader says nothing about the run.
5.  What a crash left behind is closed at the next start: with `interrupted`, or, if its last event is a terminal one,
    as completed. Where processes share the log, by whichever of them sees it first.
6.  Somebody else's run looks like one that isn't there.
7.  Where processes share the log, each of them answers for every run. One process works on a run; what the others are
    asked for they hand on to it (`cancel`), and who reads it with them is a mark in the log that they renew.
"""

import asyncio
import hashlib
import logging
import math
from collections import Counter
from collections.abc import AsyncIterable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from inspect import isawaitable, iscoroutinefunction
from itertools import accumulate
from typing import Annotated, Any, Final, Literal

import anyio
import msgspec
from anyio import current_time
from anyio.abc import TaskGroup

from ssecore.dialects import DATA_ONLY, DIALECTS, NAMED, Dialect, SoFar, cancelled_frames, error_frames
from ssecore.errors import (
    BadRequest,
    Conflict,
    Draining,
    EncodeError,
    Forbidden,
    Gone,
    Interrupted,
    LogError,
    LogUnavailable,
    NotFound,
    SSEAppError,
    TooLarge,
    TooManyRequests,
    Unavailable,
    UnprocessableContent,
    WriterFenced,
)
from ssecore.http.request import CURSOR_PARAMETERS, Request, no_connection
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import DELETE, GET, About, Route, Run
from ssecore.log import Cursor, Gap, Log, Retention, Stat, facts, framed, locate, new_epoch, parse_cursor
from ssecore.log.tail import READ_BYTES, Attached, Place, Tails, Translate, gap_frames
from ssecore.settings import Settings
from ssecore.streaming.pump import FIRST_ITEM_S, Pump
from ssecore.wire import CONTENT_TYPE, Decoder, Event, encode

__all__ = ["ROUTES", "Runs", "State", "Worker"]

logger = logging.getLogger("sseapp")

State = Literal["running", "completed", "failed", "cancelled", "interrupted"]

#: Where no caller has a name, a key is as secret as a run's id: 22 characters of base64url are 128 bits.
MIN_ANONYMOUS_KEY: Final = 22
MAX_KEY: Final = 255
#: The same for a thread, which tells of a run only while its page is at work on it: 16 of base62 are 95 bits. So long
#: are the ids that the AI SDK gives its chats.
MIN_ANONYMOUS_THREAD: Final = 16
#: How far a run's generator may run ahead of the log, in buffers: half of it is handed to the log and not stored yet.
BUFFERS: Final = 4
#: How many runs `GET /runs` lists.
MAX_LIST: Final = 1000
#: Of what a run is about, in characters: two lines on a screen, and with `MAX_LIST` runs a list of some 300 KB.
MAX_ABOUT_CHARS: Final = 200
#: Pauses between attempts to store how a run ended, when the log is away.
RETRY_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0)
#: What handlers have to close in a drain, when their time to finish is over; then the app ends without them. `docker
#: stop` kills the process 2 s after the default `drain_s`, and servers give an app's end little more.
DRAIN_CLOSE_S: Final = 1.5
#: The linger time is counted in so many steps. A step that ends this much later than planned is not counted: the
#: process was stopped or its loop was blocked, so no reader could come back.
LINGER_STEPS: Final = 8
LATE_S: Final = 1.0


class _Meta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the log keeps of a run besides its events. Another version may have written it: what it doesn't say is
    as it is here, what it says besides stays."""

    state: str | None = None
    #: As "GET /chat".
    route: str | None = None
    dialect: str | None = None
    data_only: bool = False  #: of versions that had no dialects
    #: `None`: it goes on unread.
    linger_s: float | None = None
    #: Hashes of what was asked for: the path and query, and all of it with the body.
    target: str | None = None
    request: str | None = None
    #: See `routes.About`.
    thread: str | None = None
    note: Mapping[str, Any] = {}
    about: str = ""


def _meta(stat: Stat) -> _Meta:
    try:
        return msgspec.convert(stat.meta, _Meta)
    except msgspec.ValidationError:
        return _Meta()


@dataclass(frozen=True, slots=True)
class _Print:
    """What makes two requests the same one: the target (path and query), and all of it with the body."""

    target: str
    whole: str


class Worker:
    """One run at work."""

    def __init__(
        self,
        runs: "Runs",
        id: str,
        route: Route,
        request: Request,
        params: Mapping[str, Any],
        meta: _Meta,
    ) -> None:
        self.id = id
        self.owner = request.caller
        self.settled = anyio.Event()  #: its first event is in the log, or it has ended
        self.failed_early: Exception | None = None  #: rule 2
        self.opened = False  #: somebody was answered 200 or 202: too late for rule 2
        self.readers = 0
        self.meta = meta
        self._runs = runs
        self._route = route
        self.began = current_time()
        self._reason: Literal["asked", "linger", "drain"] | None = None
        self._request = request.for_run(id)
        self._pump: Pump[Event] = Pump(
            route.handler(self._request, **params),
            _stored,
            self._request,
            buffer_bytes=BUFFERS // 2 * runs.settings.buffer_bytes,
        )
        self._pump.told = self._take
        self._writer = runs.log.writer(id, id, self._confirm)
        self._unstored = 0  # bytes that the log has, and has not said to be stored
        self._most_unstored = BUFFERS // 2 * runs.settings.buffer_bytes
        self._events_left = runs.retention.events or math.inf
        self._bytes_left = runs.retention.bytes or math.inf
        self._trouble: SSEAppError | None = None  # why nothing more can be stored
        self._over = anyio.Event()  # nothing more comes, and what came is stored, or can't be
        self._last = b""  # the newest event that is stored, or about to be
        self._stored = 0  # how many are
        self._read = anyio.Event()
        self._unread = anyio.Event()

    @property
    def route(self) -> str:
        return self._route.name

    async def run(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                self._pump.start(tasks)
                if (limit := self._runs.linger_s(self._route)) is not None:
                    tasks.start_soon(self._linger, limit)
                try:
                    await self._write()
                finally:
                    self._pump.stop()
                    await self._pump.closed()
                tasks.cancel_scope.cancel()
        except Exception:  # ours: the handler's own end up in its stream
            logger.exception("run %s: its worker failed", self.id)
        finally:
            self._request.close()
            self._runs._ended(self)
            self.settled.set()

    async def _write(self) -> None:
        try:
            try:
                await self._store()
            except (LogUnavailable, LogError, WriterFenced, NotFound):
                raise
            except Exception as error:  # an append that is too large; anything else is a bug of ours
                self._break_off()
                await self._append(error_frames(error, self._route.dialect, self._so_far()), "failed")
        except (LogUnavailable, LogError) as error:
            self._break_off()
            await self._end_unstored(error)
        except (WriterFenced, NotFound):
            self._break_off()
            logger.warning("run %s was taken over or deleted while it was at work", self.id)

    def _take(self) -> None:
        """Hand what the generator gives to the log; nobody waits for that to be stored.

        Hot path, once each time that the generator waits. Where too much is not stored yet, it waits for room in the
        pump until `_confirm` takes more.
        """
        if self._pump.ended or self._trouble is not None:
            self._look()
        elif self._unstored < self._most_unstored and self._pump.has_something:
            self._post(self._pump.take())
            if self._trouble is not None:
                self._look()

    def _post(self, frames: list[bytes]) -> None:
        frames, size = self._admitted(frames)
        if frames:
            self._unstored += size
            try:
                self._writer.post(frames, size)
            except SSEAppError as error:
                self._confirm(size, error)

    def _admitted(self, frames: list[bytes]) -> tuple[list[bytes], int]:
        """Those of them that the log keeps of this run, and their size. It is not trimmed while it runs: a reader that
        comes later would find no beginning."""
        size = sum(map(len, frames))
        if len(frames) > self._events_left or size > min(self._bytes_left, facts.MAX_APPEND_BYTES):
            self._trouble = TooLarge("the run is larger than the log keeps of one stream")
            frames = _fitting(frames, self._events_left, self._bytes_left)
            size = sum(map(len, frames))
        if frames:
            self._last = frames[-1]
            self._stored += len(frames)
            self._events_left -= len(frames)
            self._bytes_left -= size
        return frames, size

    def _confirm(self, size: int, error: SSEAppError | None) -> None:
        """So much of what was posted is stored, or can't be: then nothing behind it is. The first failure counts; but a
        run that is too large has what was posted before, or not."""
        self._unstored -= size
        if error is None:
            self.settled.set()
        elif self._trouble is None or isinstance(self._trouble, TooLarge):
            self._trouble = error
        if self._pump.has_something or self._trouble is not None:
            self._take()

    def _look(self) -> None:
        """The end is an append of its own, made when all that was posted is known to be stored: it would close the run
        over a hole."""
        if not self._unstored or not (self._trouble is None or isinstance(self._trouble, TooLarge)):
            self._over.set()

    async def _store(self) -> None:
        """Until the generator has ended and what it gave is stored; then the end, with what came last."""
        await self._over.wait()
        if self._trouble is not None:
            raise self._trouble
        frames, _ = self._admitted(self._pump.take())
        if self._trouble is not None:
            await self._runs.log.append(self.id, frames, epoch=self.id)
            raise self._trouble
        failure = self._pump.failure
        if failure is not None and not frames and self._reason is None and self._may_be_deleted():
            self.failed_early = failure
            if await self._runs.log.delete(self.id, unless_told=True):
                return
            self.failed_early = None
        last, state = self._ending()
        await self._append([*frames, *last], state)

    def _so_far(self) -> SoFar:
        return SoFar(self.id, self.meta.note, self._stored, _decoded(self._last))

    def _may_be_deleted(self) -> bool:
        """Rule 2, as far as this process knows."""
        return not self.opened and not self.settled.is_set() and current_time() - self.began < FIRST_ITEM_S

    def _break_off(self) -> None:
        """End the generator, which is not to blame: what it gives can't be kept."""
        self._request.end_for("failed")
        self._pump.stop()

    def _ending(self) -> tuple[list[bytes], State]:
        """What is to be said last, and the state. A generator that came to its own end has said it."""
        dialect = self._route.dialect
        if self._pump.exhausted:
            failed = self._request.failed or self._last.startswith(b"event: error\n")
            return [], "failed" if failed else "completed"
        if self._reason is not None and self._pump.failure is not None:
            logger.warning("run %s: its handler failed while it was closed", self.id, exc_info=self._pump.failure)
        if self._reason == "drain":
            return error_frames(Interrupted("the service stopped"), dialect, self._so_far()), "interrupted"
        if self._reason is not None:
            return cancelled_frames(self._reason, dialect, self._so_far()), "cancelled"
        failure = self._pump.failure or RuntimeError("the handler ended without an end")
        return error_frames(failure, dialect, self._so_far()), "failed"

    async def _append(self, frames: list[bytes], state: State) -> None:
        meta = msgspec.to_builtins(msgspec.structs.replace(self.meta, state=state))
        await self._runs.log.append(self.id, frames, epoch=self.id, close=True, meta=meta)

    async def _end_unstored(self, error: SSEAppError) -> None:
        """The log is away: readers hear of it now, without an id; it is stored when that is possible again."""
        frames = error_frames(error, self._route.dialect, self._so_far())
        logger.error("run %s: its events can't be stored: %s", self.id, error)
        if self.failed_early is None and self._may_be_deleted():
            self.failed_early = error
        tail = self._runs.tails.get(self.id)
        if tail is not None:
            tail.fail(b"".join(frames))
        self.settled.set()
        attempt = 0
        while self._reason != "drain":
            with anyio.move_on_after(RETRY_S[min(attempt, len(RETRY_S) - 1)]):
                await self._runs.stopping.wait()
            attempt += 1
            try:
                if self.failed_early is None or not await self._runs.log.delete(self.id, unless_told=True):
                    await self._append(frames, "failed")
                return
            except (LogUnavailable, LogError):
                if self._runs.stopping.is_set():
                    return

    def cancel(self, reason: Literal["asked", "linger", "drain"]) -> None:
        """End it; a second time, or at its own end, it does nothing."""
        if self._reason is None and not self._pump.exhausted and not self._pump.ended:
            self._reason = reason
            self._request.end_for("drain" if reason == "drain" else "cancelled")
            self._pump.stop()

    def attach(self) -> None:
        self.readers += 1
        self.touch()

    def detach(self) -> None:
        self.readers -= 1
        if not self.readers:
            self._unread.set()

    def touch(self) -> None:
        """Somebody is interested: the linger time begins anew."""
        self._read.set()

    async def _linger(self, limit: float) -> None:
        """Cancel it when nobody has read it for so many seconds; that begins with the first reader's end."""
        while True:
            await self._unread.wait()
            self._unread = anyio.Event()
            while not self.readers:
                self._read = anyio.Event()
                if not await self._is_unread_for(limit):
                    continue
                peers = self._runs.log.peers
                with suppress(LogUnavailable):  # nobody is cancelled because it can't be asked who reads
                    if peers is None or not await peers.touched(self.id):
                        self.cancel("linger")
                        return

    async def _is_unread_for(self, limit_s: float) -> bool:
        step_s, steps = limit_s / LINGER_STEPS, 0
        while steps < LINGER_STEPS:
            planned = current_time() + step_s
            with anyio.move_on_after(step_s):
                await self._read.wait()
                return False
            steps += current_time() < planned + LATE_S
        return True


def _fitting(frames: list[bytes], events: float, size: float) -> list[bytes]:
    """The first of the frames: at most so many events, and bytes, and what one append takes."""
    size = min(size, facts.MAX_APPEND_BYTES)
    for before, total in enumerate(accumulate(map(len, frames))):
        if before >= events or total > size:
            return frames[:before]
    return frames


def _decoded(frame: bytes) -> Event | None:
    """One event as a client has it. Of any size: the log takes larger ones than the decoder does by itself."""
    events = Decoder(max_event_bytes=None).feed(frame)
    return events[-1] if events else None


def _stored(event: Event) -> bytes:
    if event.id is not None:
        raise EncodeError("id must be left out on a resumable route: ids are the log's", field="id")
    return encode(event)


class Runs:
    """All runs of an app."""

    def __init__(
        self, log: Log, tails: Tails, settings: Settings, tasks: TaskGroup, dialects: Iterable[Dialect] = ()
    ) -> None:
        self.log = log
        self._dialects = {**DIALECTS, **{dialect.name: dialect for dialect in dialects}}
        self.tails = tails
        self.settings = settings
        self.retention = Retention(settings.retention_events, settings.retention_bytes, settings.retention_s)
        self.draining = False
        self.stopping = anyio.Event()
        self._waiting: set[anyio.Event] = set()
        self._tasks = tasks
        self._workers: dict[str, Worker] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._idle = anyio.Event()
        #: Runs that a crash left behind and that can't be closed; tried once.
        self._unclosable: set[str] = set()
        self._give_up_at = 0.0  #: once `stopping` is set: what has not ended then is left to itself
        #: Readers here of lingering runs that another process works on.
        self._elsewhere: Counter[str] = Counter()
        self._peers = log.peers
        if log.peers is not None:
            log.peers.on_call = self._called

    def linger_s(self, route: Route) -> float | None:
        """How long a run of the route goes on unread; `None`: to its end."""
        linger_s = route.run.linger_s if route.run else None
        return self.settings.linger_s if linger_s == "setting" else linger_s

    async def keep_watch(self) -> None:
        """Where processes share the log: end what others leave behind, and tell them that their runs are read here."""
        while self._peers is not None:
            await anyio.sleep(self.settings.lease_s / 3)
            try:
                await self.recover()
                for run in list(self._elsewhere):
                    await self._peers.touch(run, max(self.settings.linger_s, self.settings.lease_s))
            except (LogUnavailable, LogError):
                pass  # the log tells of it
            except Exception:
                logger.exception("the runs of other processes can't be looked after; trying again")

    async def recover(self) -> None:
        """Close what a crash left behind (rule 5). A run that can't be closed doesn't stop the others."""
        for stat in await self.log.unfinished():
            if stat.stream in self._unclosable:
                continue
            try:
                await self._close_left_behind(stat)
            except (WriterFenced, NotFound):
                pass  # another process was as quick; or the run was deleted
            except LogUnavailable:
                raise
            except Exception:
                self._unclosable.add(stat.stream)
                logger.exception("run %s was left behind, and can't be closed", stat.stream)

    async def _close_left_behind(self, stat: Stat) -> None:
        state: State = "completed"
        frames: list[bytes] = []
        dialect, last = self._dialect(stat), await self._last_event(stat)
        if last is None or not dialect.is_last(last):
            so_far = SoFar(stat.stream, _meta(stat).note, stat.last, last)
            state, frames = "interrupted", error_frames(Interrupted("the service was stopped"), dialect, so_far)
        epoch = new_epoch()
        await self.log.open(stat.stream, epoch)
        await self.log.append(stat.stream, frames, epoch=epoch, close=True, meta=stat.meta | {"state": state})
        logger.warning("run %s was left behind and is now %s", stat.stream, state)

    def _dialect(self, stat: Stat) -> Dialect:
        """A run's dialect. Where the program doesn't know it any more, as where another version wrote it: `NAMED`."""
        meta = _meta(stat)
        if meta.dialect is not None:
            return self._dialects.get(meta.dialect, NAMED)
        return DATA_ONLY if meta.data_only else NAMED  # written before there were dialects

    async def _last_event(self, stat: Stat) -> Event | None:
        rows = await self.log.read(stat.stream, stat.last - 1, 1) if stat.last else []
        return _decoded(rows[-1].body[(0, *rows[-1].ends)[-2] :] if rows else b"")  # not all of the row

    def _called(self, run: str, word: str) -> None:
        """Another process hands on what it was asked for."""
        if (worker := self._workers.get(run)) is None:
            return
        if word == "cancel":
            worker.cancel("asked")
        elif word == "read":  # its linger time begins; whoever reads it there renews it by `touch`
            worker.attach()
            worker.detach()

    async def drain(self, grace_s: float) -> None:
        """Give runs `grace_s` to finish, then close them as interrupted. None begins any more."""
        self.draining = True
        with anyio.move_on_after(grace_s):
            await self._no_workers()
        if not self.stopping.is_set():
            self.stopping.set()
            self._give_up_at = current_time() + DRAIN_CLOSE_S
        for worker in list(self._workers.values()):
            worker.cancel("drain")
        with anyio.CancelScope(deadline=self._give_up_at):
            await self._no_workers()
        for worker in list(self._workers.values()):
            logger.error(
                "run %s: its handler did not end %s s after it was cancelled (%s); the run stays open in the log, "
                "and will be closed as interrupted",
                worker.id,
                DRAIN_CLOSE_S,
                worker.route,
            )
            self._ended(worker)
        for over in self._waiting:
            over.set()

    async def close(self) -> None:
        """End all runs, for the app ends."""
        with anyio.CancelScope(shield=True):
            await self.drain(0)

    async def _no_workers(self) -> None:
        while self._workers:
            await self._idle.wait()

    def _ended(self, worker: Worker) -> None:
        self._workers.pop(worker.id, None)
        self._idle.set()  # whoever waits for all looks again
        self._idle = anyio.Event()

    # Starting and attaching

    async def respond(self, request: Request, route: Route, params: Mapping[str, Any]) -> Response | Attached:
        """Answer a request to a resumable route: start, attach, or go on."""
        if request.last_event_id == "end":
            return Response(status=204)
        if request.last_event_id:
            return _located(request, await self._go_on(request, route=route))
        about = _about(route, request)
        key = self._key(request, about.key or _given_key(request))
        stat, worker = await self._start(request, route, params, key, about)
        preferred = not route.hosted and "respond-async" in request.headers.get("prefer", "").lower()
        accepted = route.run.accepted if route.run is not None else None
        if preferred and (accepted is None or iscoroutinefunction(accepted)):
            accepted = _accepted  # the route's own might wait for the end
        if accepted is not None:
            await _settled(worker)
            given: Any = accepted(request, stat.stream)
            answer: Response | None = await given if isawaitable(given) else given
            if answer is not None:
                headers = {**answer.headers, "run-id": stat.stream}
                if preferred:
                    headers["preference-applied"] = "respond-async"
                return replace(answer, headers=headers)
        if worker is not None:
            worker.attach()  # a client that leaves now was a reader, too
        tail = self.tails.enter(stat.stream, id_first=route.dialect.id_first)  # from now on it has what comes
        try:
            await _settled(worker)
            return _located(request, await self._attach(stat.stream, None, route.dialect))
        finally:
            self.tails.leave(tail)
            if worker is not None:
                worker.detach()

    async def start(
        self,
        events: AsyncIterable[Event],
        *,
        caller: str | None,
        run: Run | None = None,
        key: str | None = None,
        name: str | None = None,
    ) -> str:
        """Start a run out of a program's own code, and give its id. It belongs to `caller`.

        Waits for its first event, a second at most, and raises what `events` raises before (then there is no run).
        With the `key` of an earlier run of this caller and name: gives that one's id, and `events` isn't touched.
        `name` stands in the run's state, in the metrics and the log; the generator's own by default. Raises
        `Unavailable` where there are too many runs or the app is about to stop, `TooManyRequests`, `LogUnavailable`.
        """
        name = name or str(getattr(events, "__name__", type(events).__name__))
        if self.draining:
            raise Draining
        route = Route("", name, lambda request: aiter(events), run=run or Run(), hosted=True)
        request = Request({"method": "", "path": name, "headers": []}, no_connection)
        request.route, request.caller = route, caller
        hashed = None if key is None else _digest(caller or "", "", name, key)
        stat, worker = await self._start(request, route, {}, hashed, About())
        await _settled(worker)
        return stat.stream

    async def wait(self, run: str, *, caller: str | None) -> Mapping[str, Any]:
        """Wait for the run's end, and give its state then. Whoever waits doesn't read: `linger_s` goes on.

        Raises `NotFound` where there is no such run of the caller's, and `Draining` if this app stops before.
        """
        over = anyio.Event()
        unwatch = self.log.watch(run, lambda row, ended: over.set() if ended else None)
        self._waiting.add(over)
        try:
            stat = await self._owned(run, caller)
            if not stat.closed and not self.stopping.is_set():
                await over.wait()
                stat = await self._owned(run, caller)
            if not stat.closed:
                raise Draining
            return _state(stat)
        finally:
            self._waiting.discard(over)
            unwatch()

    async def _start(
        self, request: Request, route: Route, params: Mapping[str, Any], key: str | None, about: About
    ) -> tuple[Stat, Worker | None]:
        """A new run, or the one that was started with the same key."""
        printed = _fingerprint(request)
        while True:
            known = await self.log.find(key=key) if key is not None else None
            if known is None:
                known, worker = await self._create(request, route, params, about, key, printed)
                if worker is not None:
                    return known, worker
            worker = self._workers.get(known.stream)
            if worker is not None or await self._told(known.stream) is not None:
                return self._same(known, printed), worker
            # It failed while it was being looked for, and was deleted (rule 2): its key is free again.

    async def _create(
        self, request: Request, route: Route, params: Mapping[str, Any], about: About, key: str | None, printed: _Print
    ) -> tuple[Stat, Worker | None]:
        """A new run and its worker, at work; or the one that has the key already, and `None`."""
        self._check_room(request)
        if about.thread is not None and len(about.thread) > MAX_KEY:
            raise BadRequest(f"a thread has {MAX_KEY} characters at most", field="thread")
        meta = _Meta(
            state="running",
            route=route.name,
            dialect=route.dialect.name,
            linger_s=self.linger_s(route),
            target=printed.target,
            request=printed.whole,
            thread=about.thread,
            note=dict(about.note),
            about=_line(about.text),
        )
        worker = Worker(self, new_epoch(), route, request, params, meta)
        self._workers[worker.id] = worker  # rule 3
        started = False
        try:
            with anyio.CancelScope(shield=True):  # what is in the log has a worker
                stat, started = await self.log.create(
                    worker.id,
                    epoch=worker.id,
                    owner=request.caller,
                    meta=msgspec.to_builtins(meta),
                    key=key,
                    retention=self.retention,
                )
            if started:
                request.hand_over()
                self._set_to_work(worker)
                return stat, worker
        finally:
            if not started:
                self._ended(worker)
        return stat, None

    def _set_to_work(self, worker: Worker) -> None:
        """Not in the app's task group where there is another way: it would wait for a handler that never ends."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # trio
            self._tasks.start_soon(worker.run)
        else:
            task = loop.create_task(worker.run())
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def _same(self, stat: Stat, printed: _Print) -> Stat:
        if _meta(stat).request != printed.whole:
            raise UnprocessableContent("this Idempotency-Key was used with another query or body")
        return stat

    def _key(self, request: Request, key: str | None, method: str | None = None, path: str | None = None) -> str | None:
        if not key:
            return None
        if len(key) > MAX_KEY:
            raise BadRequest(f"an idempotency key has {MAX_KEY} characters at most", field="key")
        if request.caller is None and len(key) < MIN_ANONYMOUS_KEY:
            raise BadRequest("without credentials an idempotency key has at least 22 random characters", field="key")
        return _digest(request.caller or "", method or request.method, path or request.path, key)

    def _check_room(self, request: Request) -> None:
        limit = self.settings.max_runs
        if limit is not None and len(self._workers) >= limit:
            raise Unavailable("too many runs at work; try again")
        limit = self.settings.max_runs_per_caller
        if limit is not None and request.caller is not None:
            if sum(worker.owner == request.caller for worker in self._workers.values()) >= limit:
                raise TooManyRequests("too many runs of yours at work; try again")

    async def _go_on(
        self,
        request: Request,
        *,
        route: Route | None = None,
        run: str | None = None,
        only: str | None = None,
        translate: Translate | None = None,
    ) -> Response | Attached:
        """Read on after the request's cursor."""
        cursor = parse_cursor(request.last_event_id)
        stat = await self.log.find(epoch=cursor.epoch)
        if stat is None or stat.kind != "run" or stat.owner != request.caller:
            return self._expired(request, cursor)
        if run is not None and stat.stream != run:
            raise Conflict("this event id is of another run", field="last_event_id")
        meta = _meta(stat)
        asked = (route.name, _fingerprint(request).target) if route is not None else None
        if asked is not None and asked != (meta.route, meta.target):
            raise Conflict("this event id is of another request", field="last_event_id")
        if only is not None and meta.route != only:
            raise NotFound("there is no such run")
        return await self._attach(stat.stream, cursor, self._dialect(stat), translate=translate)

    def _expired(self, request: Request, cursor: Cursor) -> Response:
        if not (request.wants_event_stream or request.dialect.streams_gone):
            raise Gone("this run is no longer kept, or never was")
        self.tails.gaps["expired"] += 1
        body = request.preamble + gap_frames(Gap("expired", cursor.seq + 1), request.dialect, last=True)
        return Response(body, media_type=CONTENT_TYPE, headers={"cache-control": "no-cache"})

    async def _attach(
        self, run: str, cursor: Cursor | None, dialect: Dialect, *, translate: Translate | None = None
    ) -> Response | Attached:
        worker = self._workers.get(run)
        await _settled(worker)
        try:
            reader, stat = await self.tails.attach(
                run, cursor or Place.START, dialect=dialect, translate=translate, look=self._told
            )
        except NotFound:
            raise NotFound("there is no such run") from None
        if cursor is not None and stat.closed and locate(stat, cursor) == (stat.last, None):
            reader.close()
            return Response(status=204)
        reader.opening = b"" if reader.after else b"id: %b.0\n\n" % run.encode()
        peers = None if worker is not None or stat.closed or _meta(stat).linger_s is None else self._peers
        if worker is not None:
            worker.attach()
        elif peers is not None:
            self._elsewhere[run] += 1
        leave = reader.on_close

        def closed() -> None:
            if leave is not None:
                leave()
            if worker is not None:
                worker.detach()
            elif peers is not None:
                self._elsewhere -= Counter([run])  # without those that are at zero

        reader.on_close = closed
        if peers is not None:
            try:
                await self._interested(stat)
                await peers.call(run, "read")
            except BaseException:
                reader.close()
                raise
        return Attached(reader, {"run-id": run, **dialect.headers(run)})

    async def _told(self, run: str) -> Stat | None:
        """The run's facts. From then on no other process that works on it deletes it when it fails (rule 2)."""
        stat = await self.log.stat(run)
        if self._peers is not None and stat and not stat.closed and not stat.last and run not in self._workers:
            try:
                await self._peers.tell(run)
            except NotFound:
                return None
        return stat

    async def _interested(self, stat: Stat) -> None:
        """Tell the process that works on the run, if another one does."""
        linger_s = _meta(stat).linger_s
        if self._peers is not None and not stat.closed and linger_s is not None:
            await self._peers.touch(stat.stream, max(linger_s, self.settings.lease_s))

    async def view(
        self,
        request: Request,
        run: str,
        *,
        only: str | None = None,
        translate: Translate | None = None,
        after: int | None = None,
    ) -> Response | Attached:
        """Read a run that is there; never start one. For handlers that show a run under a path of their own.

        `only`: the route whose runs are shown, as "POST /jobs"; others are not there. `translate` puts each event into
        other words, or leaves it out (see `log.tail.Translate`); resuming, the end and delivery are as ever. `after`:
        begin behind so many events, unless the request has a cursor.
        """
        if request.last_event_id == "end":
            return Response(status=204)
        if request.last_event_id:
            return await self._go_on(request, run=run, only=only, translate=translate)
        stat = await self._owned(run, request.caller)
        if only is not None and _meta(stat).route != only:
            raise NotFound("there is no such run")
        cursor = Cursor(_epoch_at(stat, after), after) if after is not None else None
        return await self._attach(run, cursor, self._dialect(stat), translate=translate)

    async def whole(self, request: Request, run: str) -> list[Event]:
        """All events of a run, once it has ended. While this waits, somebody reads the run."""
        stat = await self._owned(run, request.caller)
        worker, ended = self._workers.get(run), anyio.Event()
        unwatch = self.log.watch(run, lambda row, end: ended.set() if end is not None else None)
        if worker is not None:
            worker.attach()
        try:
            while not stat.closed:  # asked again after the watch began, and while other processes work on it
                with anyio.move_on_after(self.settings.lease_s / 3):
                    await ended.wait()
                await self._interested(stat)
                stat = await self._owned(run, request.caller)
        finally:
            unwatch()
            if worker is not None:
                worker.detach()
        events: list[Event] = []
        after = 0
        while rows := await self.log.read(run, after, READ_BYTES):
            for row in rows:
                events += Decoder(max_event_bytes=None).feed(framed(row, after))
            after = rows[-1].last
        return events

    async def find(self, request: Request, key: str, *, method: str, path: str) -> str | None:
        """The run that the caller's request to this route has started with this key."""
        stat = await self.log.find(key=self._key(request, key, method, path) or "")
        return None if stat is None or stat.owner != request.caller else stat.stream

    async def of_thread(self, request: Request, thread: str, *, state: str | None = None) -> list[Mapping[str, Any]]:
        """The caller's runs of the thread, newest first; only those in this state. Of the newest `MAX_LIST` runs."""
        if request.caller is None and len(thread) < MIN_ANONYMOUS_THREAD:
            text = f"without credentials a thread has at least {MIN_ANONYMOUS_THREAD} random characters"
            raise BadRequest(text, field="thread")
        if state == "running" and self._peers is None:  # asked by each page that is opened: without the log
            mine = [worker for worker in self._workers.values() if worker.owner == request.caller]
            ids = [worker.id for worker in reversed(mine) if worker.meta.thread == thread]
            found = [stat for id in ids if (stat := await self.log.stat(id)) is not None]
        else:
            found = [s for s in await self.log.runs(request.caller, MAX_LIST) if _meta(s).thread == thread]
        return [_state(stat) for stat in found if state is None or _meta(stat).state == state]

    @property
    def at_work(self) -> int:
        """How many work in this process."""
        return len(self._workers)

    def names(self) -> list[str]:
        """Those at work in this process, for the log. Thread-safe."""
        return [f"run {worker.id} of {worker.route}" for worker in list(self._workers.values())]

    async def run_of(self, last_event_id: str) -> str | None:
        """The run that an event's id belongs to, whoever's it is. Raises `BadRequest` for what is no event id."""
        stat = await self.log.find(epoch=parse_cursor(last_event_id).epoch)
        return None if stat is None or stat.kind != "run" else stat.stream

    # For a program's own code, and the routes under /runs. `caller`: whose run it is (rule 6).

    async def _owned(self, run: str, caller: str | None) -> Stat:
        stat = await self.log.stat(run)
        if stat is None or stat.kind != "run" or stat.owner != caller:
            raise NotFound("there is no such run")
        return stat

    async def state(self, run: str, *, caller: str | None) -> Mapping[str, Any]:
        """What `GET /runs/<id>` answers. Asking counts as interest. Raises `NotFound`."""
        stat = await self._owned(run, caller)
        if (worker := self._workers.get(run)) is not None:
            worker.touch()
        else:
            await self._interested(stat)
        return _state(stat)

    async def owned_by(self, caller: str | None, *, state: str | None = None) -> list[Mapping[str, Any]]:
        """The states of the caller's runs, newest first; only those in this state."""
        found = [_state(stat) for stat in await self.log.runs(caller, MAX_LIST)]
        return [run for run in found if state is None or run["state"] == state]

    async def cancel(self, run: str, *, caller: str | None, keep: bool = False) -> int:
        """Running: cancel it, 202. Over: delete its events, unless they are to be kept, 204. Raises `NotFound`."""
        stat = await self._owned(run, caller)
        worker = self._workers.get(run)
        if worker is not None and not stat.closed:
            worker.cancel("asked")
            return 202
        if self._peers is not None and not stat.closed:
            await self._peers.call(run, "cancel")
            return 202
        if not keep:
            await self.log.delete(run)
        return 204


async def _settled(worker: Worker | None) -> None:
    """Wait for a run's first event, or a second. Raises what it failed with before (rule 2)."""
    if worker is not None and not worker.opened:
        with anyio.move_on_after(FIRST_ITEM_S - (current_time() - worker.began)):
            await worker.settled.wait()
        if worker.failed_early is not None:
            raise worker.failed_early
        worker.opened = True


def _events_path(request: Request, run: str) -> str:
    return request.reference(f"/runs/{run}/events")


def _located(request: Request, answer: Response | Attached) -> Response | Attached:
    """Say where else the run can be read: a client of a POST goes on there."""
    if isinstance(answer, Response) or (request.route is not None and request.route.hosted):
        return answer
    path = _events_path(request, answer.headers["run-id"])
    return answer._replace(headers={**answer.headers, "content-location": path})


def _accepted(request: Request, run: str) -> Response:
    location = _events_path(request, run)
    return JSON({"run": run, "events": location}, status=202, headers={"location": location})


async def _events(request: Request, id: str) -> Any:
    """A run's events, from its start or after `Last-Event-ID`"""
    return await request.runs.view(request, id)


async def _get(request: Request, id: str) -> Response:
    """A run's state"""
    return JSON(await request.runs.state(id, caller=request.caller))


class _Which(msgspec.Struct, forbid_unknown_fields=True):
    thread: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_KEY)] | None = None
    state: State | None = None


async def _list(request: Request) -> Response:
    """The caller's runs, newest first"""
    thread, state = request.query.thread, request.query.state
    if thread is not None:
        return JSON({"runs": await request.runs.of_thread(request, thread, state=state)})
    if request.runs.settings.auth == "off":
        raise Forbidden("without credentials nobody's runs can be told from everybody's")
    return JSON({"runs": await request.runs.owned_by(request.caller, state=state)})


async def _delete(request: Request, id: str) -> Response:
    """Cancel a run (202); of one that is over, delete the events (204)"""
    return Response(status=await request.runs.cancel(id, caller=request.caller))


#: The engine's own routes: an embedding program has them too, under its mount path.
ROUTES: Final = [
    GET("/runs", _list, query=_Which),
    GET("/runs/{id}", _get),
    DELETE("/runs/{id}", _delete),
    GET("/runs/{id}/events", _events, events={}),
]


def _epoch_at(stat: Stat, seq: int) -> str:
    return next(epoch for epoch, first in reversed(stat.epochs) if first <= max(seq, 1))


def _state(stat: Stat) -> dict[str, Any]:
    meta, epoch = _meta(stat), _epoch_at(stat, stat.last)
    return {
        **({"thread": meta.thread} if meta.thread is not None else {}),
        **({"note": meta.note} if meta.note else {}),
        "run": stat.stream,
        "route": meta.route,
        "about": meta.about,
        "state": meta.state,
        "created": datetime.fromtimestamp(stat.created, UTC),
        "updated": datetime.fromtimestamp(stat.updated, UTC),
        "events": stat.last,
        "last_event_id": str(Cursor(epoch, stat.last)),
    }


def _given_key(request: Request) -> str:
    key = request.headers.get("idempotency-key", "").strip().strip('"')
    return key or (request.query_params.get("key", "") if request.method == "GET" else "")


def _about(route: Route, request: Request) -> About:
    given: Any = route.run.about(request) if route.run is not None and route.run.about is not None else About()
    if isinstance(given, str):
        return About(text=given)
    if not isinstance(given, About):
        raise TypeError(f"about= must return a string or an About, not {type(given).__name__}")
    return given


def _line(text: str) -> str:
    """One line, of a bounded length: it is kept with the run, and a list has a thousand of them."""
    # Cut first: the text may have megabytes, and what is left of its white space is little.
    line = " ".join(text[: 4 * MAX_ABOUT_CHARS].split())
    return line if len(line) <= MAX_ABOUT_CHARS else f"{line[: MAX_ABOUT_CHARS - 1]}…"


def _fingerprint(request: Request) -> _Print:
    own = ("key", *CURSOR_PARAMETERS)
    query = sorted((name, value) for name, value in request.query_pairs() if name not in own)
    target = _digest(request.path, repr(query))
    media_type = request.headers.get("content-type", "")
    return _Print(target, _digest(target, media_type, request.body_digest))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
