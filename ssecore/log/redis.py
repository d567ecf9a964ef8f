"""The event log in Redis Streams, for any number of processes. Redis 7.0 and later, and Valkey.

A finished call survives what Redis is configured to survive. Each process has three connections, each used by one task,
so a cancelled caller leaves none half read: two *lines* for calls, and one subscribed to the watched streams.
ARCHITECTURE.md draws it.

1.  Scripts are atomic. All keys have one hash tag.
2.  A call whose answer was lost is repeated. Redis keeps each process's last append answer, by the call's number, and
    returns it instead of appending twice.
3.  Facts name the instance (Redis' run id) that appended last. On another one a stream first gets a new epoch: clients
    may have seen sequences that it lost and will assign again. Watchers of streams that lost events are notified first.
4.  If a run's writer knows of more events than Redis has, its append raises `LogError` and the run fails.
5.  Messages may be lost, or arrive before the sync (`appendfsync always`), so they carry no data: they, resubscriptions
    and a regular poll mean "read on". Watchers get only what a call returned.
6.  A run's holder is the process that created it. `unfinished` are open runs whose holder's lease has expired; after a
    lost connection a process waits a whole lease first, since others may have lost theirs.
7.  If Redis is unreachable, a call waits `wait_s`, a read as long as its reader, and after `give_up` none.
8.  If Redis has data of another version, or foreign or partly deleted keys, calls for that stream raise `LogError` and
    its watchers are ended; everything else continues.
"""

import asyncio
import logging
import math
import random
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

import anyio
import msgspec
import orjson
from anyio import CancelScope, current_time
from anyio.lowlevel import checkpoint
from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

from ssecore.errors import LogError, LogUnavailable, SSEAppError
from ssecore.log import Log, facts
from ssecore.log.facts import (
    MAX_ROW_BYTES,
    Cursor,
    Ended,
    Retention,
    Row,
    Stat,
    Watcher,
    joined,
    locate,
    new_epoch,
    packed,
    refusal,
    unpacked,
)
from ssecore.log.scripts import COMMON, SCRIPTS
from ssecore.log.writer import Batch
from ssecore.wire import encode_json

__all__ = ["RedisLog"]

logger = logging.getLogger("sseapp")
T = TypeVar("T")

_MAX_PIPELINE: Final = 64
#: For calls once the service is stopping.
_LAST_S: Final = 0.4
_REMEMBER_S: Final = 3600
#: Temporary errors (RuntimeError: uvloop's, of a closed transport).
_BROKEN: Final = (RedisError, OSError, RuntimeError)
#: Of the subscribed connection.
_PING_S: Final = 2.0
_SILENCE_S: Final = 5.0
#: Before reconnecting.
_PAUSES_S: Final = (0.02, 1.0)
_RESTART_S: Final = 0.25
_STEP_STREAMS: Final = 64
#: In one call.
_MORE_STREAMS: Final = 64
_LOG_S: Final = 10.0


class _Session(NamedTuple):
    """A connection with the scripts loaded."""

    connection: Any
    instance: str
    shas: dict[str, str]


class _Call(NamedTuple):
    command: tuple[Any, ...]
    until: float
    answer: "asyncio.Future[Any]"

    def resolve(self, answer: Any) -> None:
        if not self.answer.done():  # cancelled, or already resolved
            self.answer.set_result(answer)


class _Line:
    def __init__(self, log: "RedisLog") -> None:
        self._log = log
        self._calls: deque[_Call] = deque()  # until they have an answer
        self._wake = anyio.Event()
        self._scope = CancelScope(shield=True)
        self._closed = False
        self._stopping = False  # `give_up` was called
        self._stuck = False  # … and Redis hasn't answered since
        self._failure: Exception | None = None  # the last attempt's

    async def ask(self, *command: Any, wait_s: float | None = None) -> Any:
        """`wait_s`: instead of the log's; 0 makes one attempt."""
        if self._closed or self._stuck:
            await checkpoint()
            raise refusal("shut" if self._closed else "stopping")
        wait_s = self._log.wait_s if wait_s is None else wait_s
        loop = asyncio.get_running_loop()
        call = _Call(command, current_time() + wait_s, loop.create_future())
        self._calls.append(call)
        self._wake.set()
        # Else it would wait for earlier ones to fail.
        if self._stopping:
            wait_s = _LAST_S
        timer = loop.call_later(wait_s, self._overdue, call, wait_s) if 0 < wait_s < math.inf else None
        try:
            answer = await call.answer
        finally:
            if timer is not None:
                timer.cancel()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _overdue(self, call: _Call, wait_s: float) -> None:
        error = self._failure or RedisConnectionError(f"no answer within {wait_s:g} s")
        self._log.note_reachable(error)
        call.resolve(_unavailable(error))

    def give_up(self) -> None:
        self._stopping = True
        self._stuck = bool(self._calls)
        for call in self._calls:
            call.resolve(refusal("stopping"))

    def close(self) -> None:
        self._closed = True
        self._scope.cancel()

    async def run(self) -> None:
        """Shielded: callers may have calls to finish."""
        session: _Session | None = None
        pause = _PAUSES_S[0]
        try:
            with self._scope:
                while True:
                    while self._calls and self._calls[0].answer.done():
                        self._calls.popleft()
                    if not self._calls:
                        self._wake = anyio.Event()
                        await self._wake.wait()
                    calls = [call for call in islice(self._calls, _MAX_PIPELINE) if not call.answer.done()]
                    try:
                        if session is not None and session.instance != self._log.instance:
                            await _disconnect(session.connection)
                            session = None
                        session = session or await self._log.connect()
                        await self._send(session, calls)
                        self._log.note_reachable(None)
                        self._stuck, self._failure = False, None
                        pause = _PAUSES_S[0]
                    except Exception as error:
                        await _disconnect(session and session.connection)
                        session = None
                        self._stuck = self._stopping
                        self._fail(calls, error, pause)
                        await anyio.sleep(pause * random.uniform(0.5, 1))
                        pause = min(2 * pause, _PAUSES_S[1])
        finally:
            self._closed = True
            await _disconnect(session and session.connection)
            for call in self._calls:
                call.resolve(refusal("shut"))

    async def _send(self, session: _Session, calls: list[_Call]) -> None:
        shas = session.shas
        commands = [
            ("EVALSHA", shas[name], 0, *values) if name in shas else (name, *values) for (name, *values), _, _ in calls
        ]
        await session.connection.send_packed_command(session.connection.pack_commands(commands))
        for call in calls:
            try:
                call.resolve(await session.connection.read_response())
            except (NoScriptError, ReadOnlyError):
                raise
            except ResponseError as error:
                self._log.log_error(f"{call.command[0]} failed", error)
                call.resolve(_unavailable(error))

    def _fail(self, calls: list[_Call], error: Exception, pause: float) -> None:
        """All but those that are repeated (rule 2)."""
        passing = isinstance(error, _BROKEN)
        if passing:
            self._failure = error
            self._log.note_reachable(error)
        elif not isinstance(error, SSEAppError):
            self._log.log_error("the connection failed", error)
        for call in calls:
            if not passing or call.until <= current_time() + pause:
                call.resolve(error if isinstance(error, SSEAppError) else _unavailable(error))


class RedisLog(Log):
    """`Log` in the Redis at `url` (`redis://`, `rediss://` for TLS, `unix://`). On asyncio only.

    `wait_s`: see rule 7; at most half of `lease_s`. `poll_s`: of rule 5. `prefix` starts every key.
    """

    def __init__(
        self,
        url: str,
        *,
        wait_s: float = 5.0,
        lease_s: float = 10.0,
        prefix: str = "sseapp",
        clock: Callable[[], float] = time.time,
        upkeep_s: float = 5.0,
        poll_s: float = 2.0,
        max_bytes: int | None = None,
    ) -> None:
        super().__init__(clock, upkeep_s)
        self.peers = self
        self._watchers.on_unwatched = self._unwatched
        self.on_command: Callable[[str, str], None] | None = None
        self.wait_s = min(wait_s, lease_s / 2)  # the lease must outlast its holder's own waits
        self.instance = ""
        self._url = url
        self._lease_s = lease_s
        self._prefix = f"{{{prefix}}}:"  # one hash tag
        self._poll_s = poll_s
        self._max_bytes = max_bytes
        self._process = new_epoch()
        #: By watched stream: the last event that watchers got; else the top when its facts were first read; else the
        #: event before the first published one, of epoch "" (unknown); else None.
        self._notified: dict[str, Cursor | None] = {}
        self._subscribed: dict[str, anyio.Event] = {}
        self._dirty: dict[str, None] = {}
        self._number = 0
        #: The last sequence of runs running here (rules 4 and 6).
        self._tops: dict[str, int] = {}
        self._stopping = False
        self._reconnected_at = self._renewed_at = 0.0
        self._logged: dict[str, tuple[float, int]] = {}

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        self._make = self._connection_factory()
        self._dirtied, self._channels, self._command_signal = (anyio.Event() for _ in range(3))
        self._reads, self._writes = lines = _Line(self), _Line(self)
        try:
            for line in lines:
                self._tasks.start_soon(line.run)
            try:
                await self._reads.ask("PING")
            except LogUnavailable as error:
                raise LogError(f"the event log's Redis can't be used: {error.__cause__}") from error
            self._reconnected_at = self._renewed_at = current_time()
            for task in (self._listen, self._read_dirty, self._renew_lease):
                self._tasks.start_soon(self._restarting, task)
            try:
                yield
            finally:
                with anyio.move_on_after(1, shield=True), suppress(LogUnavailable):
                    names = self._name(f"lease:{self._process}"), self._name(f"calls:{self._process}")
                    await self._writes.ask("DEL", *names, wait_s=0)
        finally:
            for line in lines:
                line.close()

    def _connection_factory(self) -> Callable[[], Any]:
        try:
            options: dict[str, Any] = {
                **parse_url(self._url),
                "protocol": 2,
                "socket_timeout": self.wait_s,
                "socket_connect_timeout": self.wait_s,
                "retry": Retry(NoBackoff(), 0),  # `_Line` decides what may be repeated
            }
            make = partial(options.pop("connection_class", Connection), **options)
            make()
        except (ValueError, TypeError) as error:
            raise LogError(f"the event log's Redis URL can't be used: {error}") from None
        return make

    async def connect(self) -> _Session:
        connection = self._make()
        try:
            await connection.connect()
            (reply,) = await _exchange(connection, ("INFO",))
            info = dict(line.split(":", 1) for line in reply.decode().splitlines() if ":" in line)
            version, policy = info["redis_version"], info.get("maxmemory_policy", "noeviction")
            if tuple(map(int, version.split(".")[:2])) < (7, 0):
                raise LogError(f"the event log needs Redis 7.0 or later; this is {version}")
            if info.get("redis_mode") == "cluster":
                raise LogError("the event log can't use a Redis Cluster: use one Redis, with or without replicas")
            if info.get("role") != "master":
                raise RedisConnectionError("this Redis is a replica; the event log needs its master")
            instance = info["run_id"]
            if policy != "noeviction" and not self.instance:
                logger.warning(
                    "the event log's Redis evicts data when it is full (maxmemory-policy %s): set it to noeviction",
                    policy,
                )
            head = f"local instance, prefix = '{instance}', [==[{self._prefix}]==]\n{self._constants()}\n{COMMON}"
            shas = await _exchange(connection, *[("SCRIPT", "LOAD", head + text) for text in SCRIPTS.values()])
            session = _Session(connection, instance, dict(zip(SCRIPTS, map(bytes.decode, shas), strict=True)))
            if self.instance not in ("", instance):
                await self._check_all(session)
            self.instance = instance
        except BaseException:
            await _disconnect(connection)
            raise
        return session

    def _constants(self) -> str:
        bound = "math.huge" if self._max_bytes is None else self._max_bytes
        values = (facts.STREAM_BYTES, facts.EVENT_BYTES, facts.OWNERS, facts.FOREVER_S, facts.EMPTY_TOPIC_S)
        names = "stream_bytes, event_bytes, owners, forever_s, empty_s, remember_s, bound"
        return f"local {names} = {', '.join(map(str, (*values, _REMEMBER_S, bound)))}"

    async def _check_all(self, session: _Session) -> None:
        """Rule 3."""
        known = {stream: cursor for stream, cursor in self._notified.items() if cursor is not None}
        asked = [("EVALSHA", session.shas["find"], "0", "", stream) for stream in known]
        for (stream, cursor), found in zip(known.items(), await _exchange(session.connection, *asked), strict=True):
            self._check(stream, cursor, found)

    def give_up(self) -> None:
        self.wait_s = 0
        self._stopping = True
        for subscribed in self._subscribed.values():
            subscribed.set()
        for line in (self._reads, self._writes):
            line.give_up()
        super().give_up()

    def note_reachable(self, error: Exception | None) -> None:
        if error is not None and not self.unavailable:
            logger.error("can't reach the event log's Redis: %s", error)
        elif error is None and self.unavailable:
            logger.warning("the event log's Redis answers again")
        self.unavailable = error is not None

    def log_error(self, what: str, error: object) -> None:
        """Log at a limited rate: requests can cause many."""
        now = current_time()
        last, times = self._logged.get(what, (-math.inf, 0))
        if now - last < _LOG_S:
            self._logged[what] = last, times + 1
            return
        self._logged[what] = now, 0
        again = f" ({times} times more since this was last logged)" if times else ""
        trace = error if isinstance(error, Exception) and not isinstance(error, (*_BROKEN, SSEAppError)) else None
        logger.error("the event log's Redis: %s: %s%s", what, error, again, exc_info=trace)

    async def _restarting(self, task: Callable[[], Awaitable[None]]) -> None:
        """Repeat it, whatever fails (rule 8)."""
        while True:
            try:
                await task()
                await anyio.sleep(_PAUSES_S[0])
            except Exception as error:
                if isinstance(error, (*_BROKEN, LogError)):
                    self.note_reachable(error)
                else:
                    self.log_error("a task of the event log failed", error)
                await anyio.sleep(_RESTART_S)

    # What callers ask for

    async def _create(self, stat: Stat) -> tuple[Stat, bool]:
        stream, epoch = stat.stream, stat.epochs[0][0]
        at_work = stream in self._tops
        created = False
        if stat.kind == "run":
            self._tops.setdefault(stream, 0)
        try:
            names = (stream, epoch, stat.kind, _optional(stat.owner), _optional(stat.key))
            values = (repr(stat.created), encode_json(stat.meta), self._process, _limits(stat.retention))
            stat = await self._changed("create", *names, *values)
            created = (stat.stream, stat.epochs[0][0]) == (stream, epoch)
            return stat, created
        finally:
            if not created and not at_work:
                self._tops.pop(stream, None)

    async def open(self, stream: str, epoch: str, *, retention: Retention | None = None) -> Stat:
        now, limits = repr(self._clock()), "" if retention is None else _limits(retention)
        mark = new_epoch()
        return await self._changed("open", stream, epoch, now, facts.MAX_EPOCHS, mark, limits)

    async def _changed(self, *command: Any) -> Stat:
        answer = await self._writes.ask(*command)
        stat = None if isinstance(answer, bytes) else _stat(answer)
        if stat is None:
            raise _refusal(answer)
        return stat

    async def read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        await self._await_subscription(stream)
        return _rows(await self._reads.ask("read", stream, after, max_bytes, wait_s=math.inf))

    async def _find(self, *, name: str | None = None, epoch: str | None = None, key: str | None = None) -> Stat | None:
        if name is None:
            index = ("epochs", epoch) if epoch is not None else ("keys", _optional(key))
            return _stat(await self._reads.ask("find", *index))
        await self._await_subscription(name)
        stat = _stat(await self._reads.ask("find", "", name))
        if stat is not None and name in self._notified and self._notified[name] is None:
            self._notified[name] = Cursor(stat.epochs[-1][0], stat.last)
        return stat

    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        return self._stats(await self._reads.ask("runs", f"runs:{_optional(owner)}", limit - 1, ""))

    async def unfinished(self) -> list[Stat]:
        """Rule 6; also those held here without a worker."""
        if self._cut_off():
            return []
        left = await self._reads.ask("runs", "open", -1, self._process)
        if self._cut_off():
            return []
        return [stat for stat in reversed(self._stats(left)) if stat.stream not in self._tops]

    def _stats(self, found: list[Any]) -> list[Stat]:
        stats = (self._legible(_stat, one) for one in found)
        return [stat for stat in stats if stat is not None]

    def _legible(self, read: Callable[[Any], T], found: Any) -> T | None:
        """Rule 8."""
        try:
            return read(found)
        except LogError as error:
            self.log_error("a stream can't be read", error)
            return None

    def _cut_off(self) -> bool:
        """Whether others may have lost their leases, too (rule 6)."""
        now = current_time()
        return now - self._reconnected_at < self._lease_s or now - self._renewed_at > self._lease_s / 2

    async def _renew_lease(self) -> None:
        lease, calls = self._name(f"lease:{self._process}"), self._name(f"calls:{self._process}")
        while True:
            try:
                await self._writes.ask("SET", lease, "", "PX", int(self._lease_s * 1000))
                now = current_time()
                if now - self._renewed_at > self._lease_s / 2:
                    self._reconnected_at = now
                self._renewed_at = now
                while called := await self._writes.ask("LRANGE", calls, 0, 99):
                    for message in called:
                        command, _, stream = message.decode(errors="replace").partition(" ")
                        try:
                            if self.on_command is not None:
                                self.on_command(stream, command)
                        except Exception as error:
                            self.log_error("a call to this process failed", error)
                    await self._writes.ask("LTRIM", calls, len(called), -1)
            except SSEAppError:  # fails at once if Redis is full
                await anyio.sleep(self._lease_s / 10)
                continue
            with anyio.move_on_after(self._lease_s / 3):
                await self._command_signal.wait()
            self._command_signal = anyio.Event()

    async def send_command(self, stream: str, command: str) -> None:
        if not await self._writes.ask("call", stream, command):
            raise refusal("none")

    async def touch(self, stream: str, for_s: float) -> None:
        await self._writes.ask("SET", self._name(f"touched:{stream}"), "", "PX", max(1, int(for_s * 1000)))

    async def touched(self, stream: str) -> bool:
        return bool(await self._reads.ask("EXISTS", self._name(f"touched:{stream}")))

    async def mark_answered(self, stream: str) -> None:
        if not await self._writes.ask("mark_answered", stream):
            raise refusal("none")

    async def delete(self, stream: str, *, unless_answered: bool = False) -> bool:
        if not await self._writes.ask("delete", stream, int(unless_answered)):
            return False
        self._tops.pop(stream, None)
        self._notify(stream, None, "deleted")
        return True

    def watch(self, stream: str, watcher: Watcher) -> Callable[[], None]:
        stream.encode()  # raises for a lone surrogate, before it breaks the connection
        if stream not in self._notified:
            self._notified[stream] = None
            self._subscribed[stream] = anyio.Event()
            self._channels.set()
        return super().watch(stream, watcher)

    async def _upkeep(self) -> bool:
        looked_at: int = await self._writes.ask("upkeep", repr(self._clock()), _STEP_STREAMS)
        return looked_at >= _STEP_STREAMS

    # The writer

    def _commit(self, batches: list[Batch], done: Callable[[], None]) -> None:
        # No task of anyio: nothing cancels it.
        self._storing = asyncio.get_running_loop().create_task(self._store(batches, done))

    async def _store(self, batches: list[Batch], done: Callable[[], None]) -> None:
        try:
            await self._append_all(batches)
        except Exception as error:  # nothing may wait forever
            if not isinstance(error, SSEAppError):
                logger.exception("the event log can't be written")
            for batch in batches:
                batch.error = error if isinstance(error, SSEAppError) else _unavailable(error)
        done()

    async def _append_all(self, batches: list[Batch]) -> None:
        self._number += 1
        values: list[Any] = []
        rows = [joined(batch.frames) for batch in batches]
        for batch, (body, ends) in zip(batches, rows, strict=True):
            meta = b"" if batch.meta is None else encode_json(batch.meta)
            values += (batch.stream, batch.epoch, int(batch.close), meta, len(ends), packed(ends), body)
            values += self._tops.get(batch.stream, 0), "" if batch.retention is None else _limits(batch.retention)
        wait_s = 0.0 if self._closing else self.wait_s
        if self.unavailable:  # batches behind a failed call have waited as long
            wait_s += min(batch.since for batch in batches) - time.monotonic()
            if wait_s <= 0:
                raise _unavailable(RedisConnectionError())
        common = (self._process, self._number, repr(self._clock()), facts.MAX_EPOCHS, new_epoch())
        answers = await self._writes.ask("append", *common, *values, wait_s=wait_s)
        for batch, (body, ends), (status, *details) in zip(batches, rows, answers, strict=True):
            if status == b"ok":
                batch.last, batch.epoch = int(details[0]), details[1].decode()
                self._appended(batch, Row(batch.epoch, batch.last - len(ends) + 1, body, ends) if ends else None)
                continue
            if status == b"failed":
                self.log_error("append failed", details[0].decode(errors="replace"))
            elif status == b"lost" and batch.stream in self._tops:
                self._tops[batch.stream] = 0  # its worker still has to append the failure
            elif status != b"full":
                self._tops.pop(batch.stream, None)
            batch.error = _refusal(status, *details)

    def _appended(self, batch: Batch, row: Row | None) -> None:
        """Notify watchers, unless rows before it are missing (rule 5)."""
        stream = batch.stream
        if batch.close:
            self._tops.pop(stream, None)
        elif stream in self._tops:
            self._tops[stream] = batch.last
        known = self._notified.get(stream)
        first = batch.last + 1 if row is None else row.first
        if known is not None and (batch.epoch != known.epoch or first > known.seq + 1):
            self._mark_dirty(stream)
            return
        if known is not None and batch.last <= known.seq:
            row = None
        self._notify(stream, row, "closed" if batch.close else None)

    # What other processes append

    def _notify(self, stream: str, row: Row | None, ended: Ended | None) -> None:
        if stream not in self._notified:
            return
        if row is not None:
            self._notified[stream] = Cursor(row.epoch, row.last)
        if row is not None or ended is not None:
            self._watchers.notify(stream, row, ended)

    def _check(self, stream: str, known: Cursor, found: Any) -> bool:
        """Whether the log still has what watchers got. If not, ends the stream: clients resume with a `gap`."""
        stat = self._legible(_stat, found)
        fine = False
        if stat is not None:
            gap = locate(stat, Cursor(known.epoch or stat.epochs[-1][0], known.seq))[1]
            fine = gap is None or gap.reason == "trimmed"
        if not fine:
            self._notify(stream, None, "deleted")
        return fine

    def _mark_dirty(self, stream: str) -> None:
        if stream in self._notified:
            self._dirty[stream] = None
            self._dirtied.set()

    def _unwatched(self, stream: str) -> None:
        self._notified.pop(stream, None)
        self._dirty.pop(stream, None)
        self._subscribed.pop(stream, anyio.Event()).set()
        self._channels.set()

    async def _await_subscription(self, stream: str) -> None:
        """Rule 8 of `ssecore.log`: watch first."""
        if (subscribed := self._subscribed.get(stream)) is not None and not subscribed.is_set():
            with anyio.move_on_after(self.wait_s):
                await subscribed.wait()
            if self._stopping or not subscribed.is_set():
                raise refusal("stopping") if self._stopping else _unavailable(RedisConnectionError())

    async def _listen(self) -> None:
        session = await self.connect()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._subscribe, session)
                await self._receive_all(session)
                group.cancel_scope.cancel()
        finally:
            await _disconnect(session.connection)

    async def _subscribe(self, session: _Session) -> None:
        send = session.connection.send_command
        asked: dict[str, anyio.Event] = {}
        with suppress(*_BROKEN):
            await send("SUBSCRIBE", self._name(f"called:{self._process}"))
            while True:
                self._channels = anyio.Event()
                wanted = dict(self._subscribed)
                new = [stream for stream, signal in wanted.items() if asked.get(stream) is not signal]
                for verb, streams in (("SUBSCRIBE", new), ("UNSUBSCRIBE", asked.keys() - wanted.keys())):
                    if streams:
                        await send(verb, *[self._name(f"appended:{stream}") for stream in streams])
                asked = wanted
                with anyio.move_on_after(_PING_S) as pause:
                    await self._channels.wait()
                if pause.cancelled_caught:
                    await send("PING")

    async def _receive_all(self, session: _Session) -> None:
        """Until the connection breaks or is silent, or the instance changes."""
        message: Any = []
        try:
            while message is not None and session.instance == self.instance:
                message = await session.connection.read_response(timeout=_SILENCE_S, disconnect_on_error=False)
                if isinstance(message, list):
                    self._receive(*message)
        except ResponseError as error:
            self.log_error("SUBSCRIBE failed", error)
            await anyio.sleep(_PAUSES_S[1])
        except _BROKEN:
            pass

    def _receive(self, kind: bytes, name: bytes, data: Any = None) -> None:
        channel, _, stream = name.decode(errors="replace").removeprefix(self._prefix).partition(":")
        if channel == "called":
            self._command_signal.set()
        elif kind == b"message":
            self._on_message(stream, data)
        elif kind == b"subscribe" and (subscribed := self._subscribed.get(stream)) is not None:
            if subscribed.is_set():
                self._mark_dirty(stream)  # reconnected: messages in between were lost
            subscribed.set()

    def _on_message(self, stream: str, data: bytes) -> None:
        """Rule 5. Ignores our own appends."""
        first, *words = data.split(b" ", 4)
        if words[2:3] == [self._process.encode()]:
            return
        if stream in self._notified and self._notified[stream] is None:
            with suppress(ValueError):
                self._notified[stream] = Cursor("", int(first) - 1)
        self._mark_dirty(stream)

    async def _read_dirty(self) -> None:
        poll_at = current_time() + self._poll_s
        while True:
            with CancelScope(deadline=poll_at):
                await self._dirtied.wait()
            self._dirtied = anyio.Event()
            if current_time() >= poll_at:
                poll_at = current_time() + self._poll_s
                self._dirty.update(dict.fromkeys(self._notified))
            with suppress(SSEAppError):  # the next poll repeats it
                await self._read_all_dirty()

    async def _read_all_dirty(self) -> None:
        while self._dirty:
            streams = list(islice(self._dirty, _MORE_STREAMS))
            for stream in streams:
                del self._dirty[stream]
            asked = {stream: known for stream in streams if (known := self._notified.get(stream)) is not None}
            facts = [value for stream, known in asked.items() for value in (stream, *known)]
            for news in await self._reads.ask("more", MAX_ROW_BYTES, *facts):
                stream = news[0].decode()
                self._notify_rows(stream, asked[stream], *news)

    def _notify_rows(
        self, stream: str, asked: Cursor, name: bytes, last: int, closed: bytes, rows: Any, facts: Any
    ) -> None:
        if facts is not None and not self._check(stream, asked, [name, facts]):
            return
        found = self._legible(_rows, rows)
        if found is None:
            self._notify(stream, None, "deleted")
            return
        for row in found:
            known = self._notified.get(stream)
            if known is not None and row.last > known.seq:
                self._notify(stream, row, None)
        known = self._notified.get(stream)
        if known is not None and found and known.seq < last:
            self._mark_dirty(stream)
        elif known is not None and closed == b"1":
            self._notify(stream, None, "closed")

    def _name(self, name: str) -> str:
        return self._prefix + name


async def _disconnect(connection: Any) -> None:
    if connection is not None:
        with CancelScope(shield=True), suppress(*_BROKEN):
            await connection.disconnect(nowait=True)


async def _exchange(connection: Any, *commands: tuple[str, ...]) -> list[Any]:
    await connection.send_packed_command(connection.pack_commands(commands))
    return [await connection.read_response() for _ in commands]


def _limits(retention: Retention) -> str:
    limits = (retention.events, retention.bytes, retention.age_s)
    return ",".join("" if limit is None else repr(limit) for limit in limits)


def _refusal(status: bytes, text: bytes = b"") -> SSEAppError:
    if status == b"failed":
        return _unavailable(OutOfMemoryError() if b"OOM" in text else ResponseError())
    return refusal(status.decode())


def _stat(found: list[Any]) -> Stat | None:
    name, fields = found
    if not fields and not isinstance(fields, Exception):
        return None
    try:
        facts: dict[str, Any] = {
            field.decode(): value.decode() for field, value in zip(fields[::2], fields[1::2], strict=True)
        }
        pairs = (pair.partition(":") for pair in facts["epochs"].split())
        limits = (facts[limit] or None for limit in ("max_events", "max_bytes", "age_s"))
        facts |= {
            "stream": name.decode(),
            "epochs": [(epoch, first) for epoch, _, first in pairs],
            "owner": facts["owner"][1:] if facts["owner"] else None,
            "key": facts["key"][1:] if facts["key"] else None,
            "meta": orjson.loads(facts["meta"]),
            "retention": dict(zip(Retention.__struct_fields__, limits, strict=True)),
        }
        if not facts["epochs"] or not facts.keys() >= set(Stat.__struct_fields__):
            raise ValueError("no epoch, or a fact is missing")
        return msgspec.convert(facts, Stat, strict=False)
    except (LookupError, TypeError, ValueError) as error:
        raise _unreadable(error) from error


def _rows(entries: list[Any]) -> list[Row]:
    """Raises `LogError` (rule 8)."""
    rows = []
    try:
        for id, (_, epoch, _, blob, _, _, _, body, *_) in entries:
            last, ends = int(id.partition(b"-")[0]), unpacked(blob)
            if not ends or ends[-1] != len(body):
                raise ValueError("its events don't end where they should")
            rows.append(Row(epoch.decode(), last - len(ends) + 1, body, ends))
    except (struct.error, TypeError, ValueError) as error:
        raise _unreadable(error) from error
    return rows


def _unreadable(error: Exception) -> LogError:
    return LogError(f"the event log in Redis contains data that this version can't read ({type(error).__name__})")


def _optional(text: str | None) -> str:
    return "" if text is None else f"={text}"


def _unavailable(error: Exception) -> LogUnavailable:
    """For the client: Redis' own texts may name users and keys."""
    reason = "Redis can't be reached"
    if isinstance(error, OutOfMemoryError):
        reason = "Redis is full"
    elif isinstance(error, ResponseError):
        reason = "Redis returned an error"
    elif not isinstance(error, _BROKEN):
        reason = "internal error"
    unavailable = LogUnavailable(f"the event log can't be used at the moment: {reason}")
    unavailable.__cause__ = error
    return unavailable
