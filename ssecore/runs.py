"""Runs: generators that run detached from any connection, into the log; and the routes under /runs.

The first request to a resumable route starts a run: a stream in the log, whose name and first epoch are the run's id,
and a `Worker` that pumps the generator into it. All clients read the log.

1.  A run's last event and its close are one append. The last event is the handler's own, or `error`, or `cancelled`.
2.  If a run fails in its first second before any event, it is deleted: every waiting request gets the HTTP error, and
    its idempotency key can be used again. So no request is answered 200 or 202 before. A process that answers for
    another's run first marks it (`Peers.mark_answered`): that run ends with a stored `error`.
3.  A worker is in `Runs._workers` before its stream exists, so that two requests with one key find each other.
4.  The handler's request is a copy without a connection: a reader's end doesn't affect it.
5.  A run that a crash left open is closed at the next start, or by another process: as `interrupted`, or as completed
    if its last event is a terminal one.
6.  Another caller's run is answered as one that doesn't exist.
7.  Each process that shares the log answers for every run. It forwards a `cancel`, and marks the runs that it reads.
"""

import asyncio
import hashlib
import logging
import sys
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from inspect import isawaitable, iscoroutinefunction
from itertools import accumulate, chain, repeat
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
from ssecore.log.facts import encoded
from ssecore.log.tail import READ_BYTES, Attached, Place, Tails, Translate, gap_frames
from ssecore.settings import Settings
from ssecore.streaming.pump import FIRST_ITEM_S, Pump, asyncio_loop
from ssecore.wire import CONTENT_TYPE, Decoder, Event

__all__ = ["ROUTES", "Runs", "State", "Worker"]

logger = logging.getLogger("sseapp")

State = Literal["running", "completed", "failed", "cancelled", "interrupted"]

#: Without authentication a key is as secret as a run's id; 22 of base64url are 128 bits.
MIN_ANONYMOUS_KEY: Final = 22
MAX_KEY: Final = 255
#: For a thread, which finds only running runs: 16 of base62, as the AI SDK's chat ids, are 95 bits.
MIN_ANONYMOUS_THREAD: Final = 16
#: How far a generator may be ahead of the log.
BUFFERS: Final = 4
MAX_LIST: Final = 1000
#: Two lines on a screen; with `MAX_LIST` runs 300 KB.
MAX_ABOUT_CHARS: Final = 200
RETRY_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0)
#: For handlers to close after a drain's grace: `docker stop` kills the process 2 s after the default `drain_s`.
DRAIN_CLOSE_S: Final = 1.5
#: Steps of the linger time. One that ends this late isn't counted: the process was stopped.
LINGER_STEPS: Final = 8
LATE_S: Final = 1.0


class _Meta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A run's `meta`. Other versions may write other fields, which are kept."""

    state: str | None = None
    #: Such as "GET /chat".
    route: str | None = None
    dialect: str | None = None
    data_only: bool = False  #: from versions without dialects
    linger_s: float | None = None
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


class Worker:
    """A run in this process. It has a task at its end only: the generator's and the log call `_advance`."""

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
        self.meta = meta
        self._runs = runs
        self._route = route
        self._began = current_time()
        self._started = anyio.Event()  # with its first stored event, or its end
        self._failed_early: Exception | None = None  # rule 2
        self._answered = False  # 200 or 202: too late for rule 2
        self._reason: Literal["asked", "linger", "drain"] | None = None
        self._request = request.for_run(id)
        self._most_unstored = BUFFERS // 2 * runs.settings.buffer_bytes
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
        self._last = b""  # the newest event
        self._count = 0  # their number
        self._touched: anyio.Event | None = None  # while it lingers

    def start(self) -> None:
        self._pump.start(self._runs.tasks)

    async def wait_started(self) -> None:
        """Before an answer. Raises an early failure (rule 2)."""
        if not self._answered:
            with anyio.move_on_after(FIRST_ITEM_S - (current_time() - self._began)):
                await self._started.wait()
            if self._failed_early is not None:
                raise self._failed_early
            self._answered = True

    def _advance(self) -> None:
        """Post the pump's frames, or leave them to `_confirm`. Hot path, once per wait of the generator.

        The end begins once all posts are stored: there must be no hole.
        """
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
        elif pump.on_ready is not None and (self._failure is not None or not self._unstored):
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
        """Posted bytes are stored, or have failed."""
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
                    raise self._failure
                await self._store(*self._ending())
            except (WriterFenced, NotFound):
                self._stop_generator()
                logger.warning("run %s was taken over or deleted while it was running", self.id)
            except Exception as error:  # the log's; else the dialect's, or ours
                self._stop_generator()
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
        """The last events."""
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
        return SoFar(self.id, self.meta.note, self._count, _decoded(self._last))

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
        """Restart the linger time."""
        if self._touched is not None:
            self._touched.set()

    def linger(self) -> None:
        """It has no readers here from now on."""
        limit_s = self.meta.linger_s
        if self._touched is None and limit_s is not None:
            self._touched = anyio.Event()
            self._runs.tasks.start_soon(self._linger, limit_s)
        self.touch()

    async def _linger(self, limit_s: float) -> None:
        """Cancel it after `limit_s` seconds without readers."""
        step_s, steps = limit_s / LINGER_STEPS, 0
        peers = self._runs.log.peers
        while self._runs.is_unread(self):
            self._touched, planned = anyio.Event(), current_time() + step_s
            with anyio.move_on_after(step_s):
                await self._touched.wait()
            steps = 0 if self._touched.is_set() else steps + (current_time() < planned + LATE_S)
            if steps == LINGER_STEPS and self._runs.is_unread(self):
                steps = 0
                with suppress(LogUnavailable):  # it may have readers elsewhere: don't cancel
                    if peers is None or not await peers.touched(self.id):
                        self.cancel("linger")
                        break
        self._touched = None


def _decoded(frame: bytes) -> Event | None:
    """Of any size."""
    events = Decoder(max_event_bytes=None).feed(frame)
    return events[-1] if events else None


class Runs:
    """An app's runs."""

    def __init__(
        self, log: Log, tails: Tails, settings: Settings, tasks: TaskGroup, dialects: Iterable[Dialect] = ()
    ) -> None:
        self.log = log
        self._dialects = {**DIALECTS, **{dialect.name: dialect for dialect in dialects}}
        self.tails = tails
        tails.on_unread = self._on_unread
        self.settings = settings
        self.retention = Retention(settings.retention_events, settings.retention_bytes, settings.retention_s)
        self.draining = False
        self.stopping = anyio.Event()
        self._waiting: set[anyio.Event] = set()
        self.tasks = tasks
        self._workers: dict[str, Worker] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._idle = anyio.Event()
        #: Runs that could not be closed.
        self._unclosable: set[str] = set()
        self._give_up_at = 0.0  #: of the drain
        self._peers = log.peers
        if log.peers is not None:
            log.peers.on_command = self._on_command

    async def keep_watch(self) -> None:
        """Rules 5 and 7, if processes share the log."""
        while self._peers is not None:
            await anyio.sleep(self.settings.lease_s / 3)
            try:
                await self.recover()
                for run in self.tails.streams():
                    if ":" in run or run in self._workers:  # a topic, or read here
                        continue
                    await self._peers.touch(run, max(self.settings.linger_s, self.settings.lease_s))
            except (LogUnavailable, LogError):
                pass  # the log has logged it
            except Exception:
                logger.exception("can't check the runs of other processes; trying again")

    async def recover(self) -> None:
        """Rule 5. One that can't be closed doesn't stop the others."""
        for stat in await self.log.unfinished():
            if stat.stream in self._unclosable:
                continue
            try:
                await self._close_left_behind(stat)
            except (WriterFenced, NotFound):
                pass  # another process closed it, or it was deleted
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
        meta = _meta(stat)
        if meta.dialect is not None:
            return self._dialects.get(meta.dialect, NAMED)
        return DATA_ONLY if meta.data_only else NAMED  # from versions without dialects

    async def _last_event(self, stat: Stat) -> Event | None:
        rows = await self.log.read(stat.stream, stat.last - 1, 1) if stat.last else []
        return _decoded(rows[-1].body[(0, *rows[-1].ends)[-2] :] if rows else b"")  # not all of the row

    def _on_command(self, run: str, command: str) -> None:
        if command == "cancel" and (worker := self._workers.get(run)) is not None:
            worker.cancel("asked")
        elif command == "read":
            self._on_unread(run)

    def _on_unread(self, run: str) -> None:
        if (worker := self._workers.get(run)) is not None:
            worker.linger()

    def is_unread(self, worker: Worker) -> bool:
        """It is at work, and has no readers here."""
        return worker.id in self._workers and self.tails.get(worker.id) is None

    async def drain(self, grace_s: float) -> None:
        """Start no more runs, wait `grace_s`, interrupt the rest."""
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
                worker.meta.route,
            )
            self._ended(worker)
        for over in self._waiting:
            over.set()

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            await self.drain(0)

    async def _no_workers(self) -> None:
        while self._workers:
            if self._idle.is_set():
                self._idle = anyio.Event()
            await self._idle.wait()

    def _ended(self, worker: Worker) -> None:
        self._workers.pop(worker.id, None)
        worker.touch()
        if not self._workers:
            self._idle.set()

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Not in the app's task group: it would wait for a handler that never ends."""
        if (loop := asyncio_loop()) is not None:
            task = loop.create_task(work())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        else:
            self.tasks.start_soon(work)

    async def respond(self, request: Request, route: Route, params: Mapping[str, Any]) -> Response | Attached:
        if request.last_event_id:
            return _with_location(request, await self._resume(request, route=route))
        about = _about(route, request)
        key = self._key(request, about.key or _given_key(request))
        stat, worker = await self._start(request, route, params, key, about)
        preferred = not route.hosted and "respond-async" in request.headers.get("prefer", "").lower()
        accepted = route.run.accepted if route.run is not None else None
        if preferred and (accepted is None or iscoroutinefunction(accepted)):
            accepted = _accepted  # the route's own might wait for the end
        if accepted is not None:
            if worker is not None:
                await worker.wait_started()
            given: Any = accepted(request, stat.stream)
            answer: Response | None = await given if isawaitable(given) else given
            if answer is not None:
                headers = {**answer.headers, "run-id": stat.stream}
                if preferred:
                    headers["preference-applied"] = "respond-async"
                return replace(answer, headers=headers)
        return _with_location(request, await self._attach(stat.stream, None, route.dialect))

    async def start(
        self,
        events: AsyncIterable[Event],
        *,
        caller: str | None,
        run: Run | None = None,
        key: str | None = None,
        name: str | None = None,
    ) -> str:
        """Start a run from a program's own code, owned by `caller`; returns its id.

        Waits for the first event, at most a second, and raises earlier failures (rule 2). With the `key` of an earlier
        run of this caller and name: returns its id; `events` isn't used. Raises `Unavailable` (too many runs, or
        stopping), `TooManyRequests`, `LogUnavailable`.
        """
        name = name or str(getattr(events, "__name__", type(events).__name__))
        if self.draining:
            raise Draining
        route = Route("", name, lambda request: aiter(events), run=run or Run(), hosted=True)
        request = Request({"method": "", "path": name, "headers": []}, no_connection)
        request.route, request.caller = route, caller
        hashed = None if key is None else _digest(caller or "", "", name, key)
        stat, worker = await self._start(request, route, {}, hashed, About())
        if worker is not None:
            await worker.wait_started()
        return stat.stream

    async def wait(self, run: str, *, caller: str | None) -> Mapping[str, Any]:
        """Wait for the run's end and return its state. Waiting isn't reading: `linger_s` goes on.

        Raises `NotFound`, and `Draining` if this app stops before.
        """
        return _state(await self._end_of(run, caller))

    async def _end_of(self, run: str, caller: str | None, *, reading: bool = False) -> Stat:
        over = anyio.Event()
        unwatch = self.log.watch(run, lambda row, ended: over.set() if ended else None)
        self._waiting.add(over)
        try:
            while not (stat := await self._owned(run, caller)).closed:
                if over.is_set() or (self.stopping.is_set() and not self._workers):
                    raise Draining
                if reading:
                    await self._mark_read(stat)
                with anyio.move_on_after(self.settings.lease_s / 3):
                    await over.wait()
            return stat
        finally:
            self._waiting.discard(over)
            unwatch()

    async def _start(
        self, request: Request, route: Route, params: Mapping[str, Any], key: str | None, about: About
    ) -> tuple[Stat, Worker | None]:
        """A new run, or the key's, and its worker if it runs here."""
        target = _target(request)
        linger_s = route.run.linger_s if route.run else None
        meta = _Meta(
            state="running",
            route=route.name,
            dialect=route.dialect.name,
            linger_s=self.settings.linger_s if linger_s == "setting" else linger_s,
            target=target,
            request=_digest(target, request.headers.get("content-type", ""), request.body_digest),
            thread=about.thread,
            note=dict(about.note),
            about=_line(about.text),
        )
        while True:
            stat = await self.log.find(key=key) if key is not None else None
            stat = stat or await self._create(request, route, params, meta, key)
            worker = self._workers.get(stat.stream)
            if worker is not None or await self._stat_for_answer(stat.stream) is not None:
                if stat.meta.get("request") != meta.request:
                    raise UnprocessableContent(
                        "this Idempotency-Key was used with another query or body: use a new one"
                    )
                return stat, worker
            # Deleted meanwhile (rule 2): the key is free.

    async def _create(
        self, request: Request, route: Route, params: Mapping[str, Any], meta: _Meta, key: str | None
    ) -> Stat:
        """Start a run, unless there is one with the key."""
        self._check_room(request)
        worker = Worker(self, new_epoch(), route, request, params, meta)
        self._workers[worker.id] = worker  # rule 3
        created = False
        try:
            with anyio.CancelScope(shield=True):  # a created run must be started
                stat, created = await self.log.create(
                    worker.id,
                    epoch=worker.id,
                    owner=request.caller,
                    meta=msgspec.to_builtins(meta),
                    key=key,
                    retention=self.retention,
                )
        finally:
            if created:
                request.hand_over()
                worker.start()
            else:
                self._ended(worker)
        return stat

    def _key(self, request: Request, key: str | None, method: str | None = None, path: str | None = None) -> str | None:
        if not key:
            return None
        if len(key) > MAX_KEY:
            raise BadRequest(f"an idempotency key must have at most {MAX_KEY} characters", field="key")
        if request.caller is None and len(key) < MIN_ANONYMOUS_KEY:
            text = f"without credentials an idempotency key must have at least {MIN_ANONYMOUS_KEY} random characters"
            raise BadRequest(text, field="key")
        return _digest(request.caller or "", method or request.method, path or request.path, key)

    def _check_room(self, request: Request) -> None:
        limit = self.settings.max_runs
        if limit is not None and len(self._workers) >= limit:
            raise Unavailable("too many runs are running; try again later")
        limit = self.settings.max_runs_per_caller
        if limit is not None and request.caller is not None:
            if sum(worker.owner == request.caller for worker in self._workers.values()) >= limit:
                raise TooManyRequests("too many of your runs are running; cancel one, or try again later")

    async def _resume(
        self,
        request: Request,
        *,
        route: Route | None = None,
        run: str | None = None,
        only: str | None = None,
        translate: Translate | None = None,
    ) -> Response | Attached:
        if request.last_event_id == "end":
            return Response(status=204)
        cursor = parse_cursor(request.last_event_id)
        stat = await self.log.find(epoch=cursor.epoch)
        if stat is None or stat.kind != "run" or stat.owner != request.caller:
            return self._expired(request, cursor)
        if run is not None and stat.stream != run:
            raise Conflict("this event id belongs to another run", field="last_event_id")
        meta = _meta(stat)
        asked = (route.name, _target(request)) if route is not None else None
        if asked is not None and asked != (meta.route, meta.target):
            raise Conflict("this event id belongs to another request", field="last_event_id")
        if only is not None and meta.route != only:
            raise NotFound("there is no such run")
        return await self._attach(stat.stream, cursor, self._dialect(stat), translate=translate)

    def _expired(self, request: Request, cursor: Cursor) -> Response:
        if not (request.wants_event_stream or request.dialect.streams_gone):
            raise Gone("this run is no longer stored, or never existed")
        self.tails.gaps["expired"] += 1
        body = request.preamble + gap_frames(Gap("expired", cursor.seq + 1), request.dialect, last=True)
        return Response(body, media_type=CONTENT_TYPE, headers={"cache-control": "no-cache"})

    async def _attach(
        self, run: str, cursor: Cursor | None, dialect: Dialect, *, translate: Translate | None = None
    ) -> Response | Attached:
        worker = self._workers.get(run)
        tail = self.tails.acquire(run, id_first=dialect.id_first)  # a reader from now on, even if it disconnects
        try:
            if worker is not None:
                await worker.wait_started()
            try:
                reader, stat = await self.tails.attach(
                    run, cursor or Place.START, dialect=dialect, translate=translate, get_stat=self._stat_to_read
                )
            except NotFound:
                raise NotFound("there is no such run") from None
        finally:
            tail.release()
        if cursor is not None and stat.closed and locate(stat, cursor) == (stat.last, None):
            reader.close()
            return Response(status=204)
        reader.opening = b"" if reader.after else b"id: %b.0\n\n" % run.encode()
        return Attached(reader, {"run-id": run, **dialect.headers(run)})

    async def _stat_to_read(self, run: str) -> Stat | None:
        """The run's facts; its process has been told that it is read."""
        stat = await self._stat_for_answer(run)
        if self._peers is not None and stat is not None and run not in self._workers and await self._mark_read(stat):
            await self._peers.send_command(run, "read")
        return stat

    async def _stat_for_answer(self, run: str) -> Stat | None:
        """The run's facts; it can't be deleted any more (rule 2)."""
        stat = await self.log.stat(run)
        if self._peers is not None and stat and not stat.closed and not stat.last and run not in self._workers:
            try:
                await self._peers.mark_answered(run)
            except NotFound:
                return None
        return stat

    async def _mark_read(self, stat: Stat) -> bool:
        """For another process's run, if it lingers."""
        linger_s = _meta(stat).linger_s
        if self._peers is None or stat.closed or linger_s is None:
            return False
        await self._peers.touch(stat.stream, max(linger_s, self.settings.lease_s))
        return True

    async def view(
        self,
        request: Request,
        run: str,
        *,
        only: str | None = None,
        translate: Translate | None = None,
        after: int | None = None,
    ) -> Response | Attached:
        """Read an existing run.

        `only`: the route whose runs are shown, such as "POST /jobs". `translate`: see `log.tail.Translate`. `after`:
        skip this many events, unless the request has a cursor.
        """
        if request.last_event_id:
            return await self._resume(request, run=run, only=only, translate=translate)
        stat = await self._owned(run, request.caller)
        if only is not None and _meta(stat).route != only:
            raise NotFound("there is no such run")
        cursor = Cursor(_epoch_at(stat, after), after) if after is not None else None
        return await self._attach(run, cursor, self._dialect(stat), translate=translate)

    async def whole(self, request: Request, run: str) -> list[Event]:
        """All events of a run, once it has ended. Counts as reading."""
        stat = await self._owned(run, request.caller)
        tail = self.tails.acquire(run, id_first=self._dialect(stat).id_first)
        try:
            await self._end_of(run, request.caller, reading=True)
        finally:
            tail.release()
        events: list[Event] = []
        after = 0
        while rows := await self.log.read(run, after, READ_BYTES):
            for row in rows:
                events += Decoder(max_event_bytes=None).feed(framed(row, after))
            after = rows[-1].last
        return events

    async def find(self, request: Request, key: str, *, method: str, path: str) -> str | None:
        """The caller's run of this route and key."""
        stat = await self.log.find(key=self._key(request, key, method, path) or "")
        return None if stat is None or stat.owner != request.caller else stat.stream

    async def of_thread(self, request: Request, thread: str, *, state: str | None = None) -> list[Mapping[str, Any]]:
        """The caller's runs of the thread, newest first."""
        if request.caller is None and len(thread) < MIN_ANONYMOUS_THREAD:
            text = f"without credentials thread must have at least {MIN_ANONYMOUS_THREAD} random characters"
            raise BadRequest(text, field="thread")
        if state == "running" and self._peers is None:  # asked on each load of a page: without the log
            mine = [worker for worker in self._workers.values() if worker.owner == request.caller]
            ids = [worker.id for worker in reversed(mine) if worker.meta.thread == thread]
            found = [stat for id in ids if (stat := await self.log.stat(id)) is not None]
        else:
            found = [s for s in await self.log.runs(request.caller, MAX_LIST) if _meta(s).thread == thread]
        return [_state(stat) for stat in found if state is None or _meta(stat).state == state]

    @property
    def at_work(self) -> int:
        """Runs running in this process."""
        return len(self._workers)

    def names(self) -> list[str]:
        """For the log. Thread-safe."""
        return [f"run {worker.id} of {worker.meta.route}" for worker in list(self._workers.values())]

    async def run_of(self, last_event_id: str) -> str | None:
        """By an event's id, of any caller. Raises `BadRequest`."""
        stat = await self.log.find(epoch=parse_cursor(last_event_id).epoch)
        return None if stat is None or stat.kind != "run" else stat.stream

    # `caller`: the run's owner (rule 6).

    async def _owned(self, run: str, caller: str | None) -> Stat:
        stat = await self.log.stat(run)
        if stat is None or stat.kind != "run" or stat.owner != caller:
            raise NotFound("there is no such run")
        return stat

    async def state(self, run: str, *, caller: str | None) -> Mapping[str, Any]:
        """Restarts the linger time. Raises `NotFound`."""
        stat = await self._owned(run, caller)
        if (worker := self._workers.get(run)) is not None:
            worker.touch()
        else:
            await self._mark_read(stat)
        return _state(stat)

    async def owned_by(self, caller: str | None, *, state: str | None = None) -> list[Mapping[str, Any]]:
        """The caller's runs, newest first."""
        found = [_state(stat) for stat in await self.log.runs(caller, MAX_LIST)]
        return [run for run in found if state is None or run["state"] == state]

    async def cancel(self, run: str, *, caller: str | None, keep: bool = False) -> int:
        """Cancel a run: 202. If it has ended, delete it, unless `keep`: 204. Raises `NotFound`."""
        stat = await self._owned(run, caller)
        worker = self._workers.get(run)
        if worker is not None and not stat.closed:
            worker.cancel("asked")
            return 202
        if self._peers is not None and not stat.closed:
            await self._peers.send_command(run, "cancel")
            return 202
        if not keep:
            await self.log.delete(run)
        return 204


def _events_path(request: Request, run: str) -> str:
    return request.reference(f"/runs/{run}/events")


def _with_location(request: Request, answer: Response | Attached) -> Response | Attached:
    """A client of a POST resumes at the `Content-Location`."""
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


class _ListQuery(msgspec.Struct, forbid_unknown_fields=True):
    thread: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_KEY)] | None = None
    state: State | None = None


async def _list(request: Request) -> Response:
    """The caller's runs, newest first"""
    thread, state = request.query.thread, request.query.state
    if thread is not None:
        return JSON({"runs": await request.runs.of_thread(request, thread, state=state)})
    if request.runs.settings.auth == "off":
        raise Forbidden("authentication is off, so runs have no owners and can't be listed")
    return JSON({"runs": await request.runs.owned_by(request.caller, state=state)})


async def _delete(request: Request, id: str) -> Response:
    """Cancel a run (202), or delete the events of one that has ended (204)"""
    return Response(status=await request.runs.cancel(id, caller=request.caller))


#: Also an embedding program's, under its mount path.
ROUTES: Final = [
    GET("/runs", _list, query=_ListQuery),
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
    # Cut first: the text may have megabytes.
    line = " ".join(text[: 4 * MAX_ABOUT_CHARS].split())
    return line if len(line) <= MAX_ABOUT_CHARS else f"{line[: MAX_ABOUT_CHARS - 1]}…"


def _target(request: Request) -> str:
    """A hash of path and query."""
    own = ("key", *CURSOR_PARAMETERS)
    query = sorted((name, value) for name, value in request.query_pairs if name not in own)
    return _digest(request.path, repr(query))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
