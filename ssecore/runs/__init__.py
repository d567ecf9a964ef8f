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
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from inspect import isawaitable, iscoroutinefunction
from typing import Annotated, Any, Final

import anyio
import msgspec
from anyio import current_time
from anyio.abc import TaskGroup

from ssecore.dialects import DATA_ONLY, DIALECTS, NAMED, Dialect, SoFar, error_frames
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
    TooManyRequests,
    Unavailable,
    UnprocessableContent,
    WriterFenced,
)
from ssecore.http.request import CURSOR_PARAMETERS, Request, no_connection
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import DELETE, GET, About, Route, Run
from ssecore.log import Cursor, Gap, Log, Peers, Retention, Stat, framed, locate, new_epoch, parse_cursor
from ssecore.log.tail import READ_BYTES, Attached, Place, Tails, Translate, gap_frames
from ssecore.runs.worker import Meta, State, Worker, last_event
from ssecore.settings import Settings
from ssecore.streaming.pump import asyncio_loop
from ssecore.wire import CONTENT_TYPE, Decoder, Event

__all__ = ["ROUTES", "Runs", "State", "Worker"]

logger = logging.getLogger("sseapp")

#: Without authentication a key is as secret as a run's id; 22 of base64url are 128 bits.
MIN_ANONYMOUS_KEY: Final = 22
MAX_KEY: Final = 255
#: For a thread, which finds only running runs: 16 of base62, as the AI SDK's chat ids, are 95 bits.
MIN_ANONYMOUS_THREAD: Final = 16
MAX_LIST: Final = 1000
#: Two lines on a screen; with `MAX_LIST` runs 300 KB.
MAX_ABOUT_CHARS: Final = 200
#: For handlers to close after a drain's grace: `docker stop` kills the process 2 s after the default `drain_s`.
DRAIN_CLOSE_S: Final = 1.5


def _meta(stat: Stat) -> Meta:
    try:
        return msgspec.convert(stat.meta, Meta)
    except msgspec.ValidationError:
        return Meta()


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
        self._marked: set[str] = set()  #: lingering elsewhere, and read here
        self._peers = log.peers
        if log.peers is not None:
            log.peers.on_command = self._on_command

    async def keep_watch(self) -> None:
        """Rules 5 and 7."""
        while self._peers is not None:
            await anyio.sleep(self.settings.lease_s / 3)
            try:
                await self.recover()
                self._marked = {run for run in self._marked if self.tails.get(run) is not None}
                for run in list(self._marked):
                    await self._peers.touch(run, max(self.settings.linger_s, self.settings.lease_s))
            except (LogUnavailable, LogError):
                pass  # logged
            except Exception:
                logger.exception("can't check the runs of other processes; trying again")

    async def recover(self) -> None:
        """Rule 5."""
        for stat in await self.log.unfinished():
            if stat.stream in self._unclosable:
                continue
            try:
                await self._close_left_behind(stat)
            except (WriterFenced, NotFound):
                pass  # closed by another process, or deleted
            except LogUnavailable:
                raise
            except Exception:
                self._unclosable.add(stat.stream)
                logger.exception("run %s was left behind, and can't be closed", stat.stream)

    async def _close_left_behind(self, stat: Stat) -> None:
        state: State = "completed"
        frames: list[bytes] = []
        rows = await self.log.read(stat.stream, stat.last - 1, 1) if stat.last else []
        last = last_event(rows[-1].body[(0, *rows[-1].ends)[-2] :]) if rows else None  # not all of the row
        dialect = self._dialect(stat)
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

    def _on_command(self, run: str, command: str) -> None:
        if command == "cancel" and (worker := self._workers.get(run)) is not None:
            worker.cancel("asked")
        elif command == "read":
            self._on_unread(run)

    def _on_unread(self, run: str) -> None:
        if (worker := self._workers.get(run)) is not None:
            worker.linger()

    def is_unread(self, worker: Worker) -> bool:
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
        """On asyncio the app's task group doesn't wait for a handler that never ends."""
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
        run = await self._start(request, route, params, key, about)
        preferred = not route.hosted and "respond-async" in request.headers.get("prefer", "").lower()
        accepted = route.run.accepted if route.run is not None else None
        if preferred and (accepted is None or iscoroutinefunction(accepted)):
            accepted = _accepted  # the route's own might wait for the end
        if accepted is not None:
            await self._wait_started(run)
            given: Any = accepted(request, run)
            answer: Response | None = await given if isawaitable(given) else given
            if answer is not None:
                headers = {**answer.headers, "run-id": run}
                if preferred:
                    headers["preference-applied"] = "respond-async"
                return replace(answer, headers=headers)
        return _with_location(request, await self._attach(run, None, route.dialect))

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
        id = await self._start(request, route, {}, hashed, About())
        await self._wait_started(id)
        return id

    async def wait(self, run: str, *, caller: str | None) -> Mapping[str, Any]:
        """Wait for the run's end and return its state. Waiting isn't reading: `linger_s` goes on.

        Raises `NotFound`, and `Draining` if this app stops before.
        """
        over = anyio.Event()
        unwatch = self.log.watch(run, lambda row, ended: over.set() if ended else None)
        self._waiting.add(over)
        try:
            stat = await self._owned(run, caller)
            if not stat.closed and not (self.stopping.is_set() and not self._workers):
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
    ) -> str:
        target = _target(request)
        linger_s = route.run.linger_s if route.run else None
        meta = Meta(
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
            if stat.stream in self._workers or await self._stat_for_answer(stat.stream) is not None:
                if stat.meta.get("request") != meta.request:
                    raise UnprocessableContent(
                        "this Idempotency-Key was used with another query or body: use a new one"
                    )
                return stat.stream
            # Deleted meanwhile (rule 2): the key is free.

    async def _create(
        self, request: Request, route: Route, params: Mapping[str, Any], meta: Meta, key: str | None
    ) -> Stat:
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

    async def _wait_started(self, run: str) -> None:
        """Raises the run's failure (rule 2)."""
        if (worker := self._workers.get(run)) is not None:
            await worker.wait_started()

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
        if route is not None and (route.name, _target(request)) != (meta.route, meta.target):
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
        tail = self.tails.acquire(run, id_first=dialect.id_first)  # a reader from now on, even if it disconnects
        try:
            await self._wait_started(run)
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

    async def _stat_for_answer(self, run: str) -> Stat | None:
        """The run's facts; it can't be deleted any more (rule 2)."""
        stat = await self.log.stat(run)
        if stat is not None and not stat.last and (peers := self._elsewhere(stat)) is not None:
            try:
                await peers.mark_answered(run)
            except NotFound:
                return None
        return stat

    async def _stat_to_read(self, run: str) -> Stat | None:
        """And it is read now."""
        stat = await self._stat_for_answer(run)
        if stat is not None and (peers := await self._mark_read(stat)) is not None:
            await peers.send_command(run, "read")
        return stat

    async def _mark_read(self, stat: Stat) -> Peers | None:
        """For another process, if the run lingers there."""
        peers = self._elsewhere(stat)
        if peers is None or (linger_s := _meta(stat).linger_s) is None:
            return None
        self._marked.add(stat.stream)
        await peers.touch(stat.stream, max(linger_s, self.settings.lease_s))
        return peers

    def _elsewhere(self, stat: Stat) -> Peers | None:
        """If another process has the run."""
        return None if stat.closed or stat.stream in self._workers else self._peers

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
            await self._mark_read(stat)
            await self.wait(run, caller=request.caller)
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
        return len(self._workers)

    def names(self) -> list[str]:
        """For the log. Thread-safe."""
        return [f"run {worker.id} of {worker.meta.route}" for worker in list(self._workers.values())]

    async def run_of(self, last_event_id: str) -> str | None:
        """By an event's id, of any caller. Raises `BadRequest`."""
        stat = await self.log.find(epoch=parse_cursor(last_event_id).epoch)
        return None if stat is None or stat.kind != "run" else stat.stream

    async def _owned(self, run: str, caller: str | None) -> Stat:
        stat = await self.log.stat(run)
        if stat is None or stat.kind != "run" or stat.owner != caller:  # rule 6
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
        if (peers := self._elsewhere(stat)) is not None:
            await peers.send_command(run, "cancel")
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
    if given.thread is not None and len(given.thread) > MAX_KEY:
        raise BadRequest(f"thread must have at most {MAX_KEY} characters", field="thread")
    return given


def _line(text: str) -> str:
    # Cut first: the text may have megabytes.
    line = " ".join(text[: 4 * MAX_ABOUT_CHARS].split())
    return line if len(line) <= MAX_ABOUT_CHARS else f"{line[: MAX_ABOUT_CHARS - 1]}…"


def _target(request: Request) -> str:
    own = ("key", *CURSOR_PARAMETERS)
    query = sorted((name, value) for name, value in request.query_pairs if name not in own)
    return _digest(request.path, repr(query))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
