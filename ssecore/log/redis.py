"""The event log in Redis Streams, for any number of processes. Redis 7.0 and later, and Valkey.

What a finished call says withstands what Redis is configured to withstand. Where it lost something (a restart without
its file, a failover), that is noticed, and said.

Theory of operation. One task, the writer, sends whatever has gathered while its last call was under way as one
pipeline, a Lua call for each stream; each caller goes on with the answer. One pub/sub connection hears of every append
to the streams that are watched here:

    callers    append ──► queue ──┐ all of it, one batch a stream
    writer     ──► pipeline: EVALSHA, EVALSHA, … ──► answers ──► watchers, callers ──► …
    Redis      facts (hash) + rows (stream, the id is the last sequence) + sizes (list) ──PUBLISH──► every process
    listener   ──► in sequence: watchers; a hole, or a subscription that began again: read it from the log

1.  One Lua call is one append: it checks the writer, gives the sequence, trims, and publishes, or changes nothing. The
    keys of a stream have one hash tag.
2.  A stream has one batch under way for each process, and remembers each process's last one. So an append whose answer
    was lost is asked for again, and goes in once.
3.  The scripts hold the server's run id. One that was restarted, or took over, knows none of them (NOSCRIPT): nothing
    is appended before this process has seen that it is another instance. There the stream gets an epoch first: what the
    old instance had and this one lacks was seen by somebody, and its numbers must not be given again in silence.
4.  A run whose writer knows of more events than Redis has lost some: it is told so (`LogError`), and fails its run.
5.  Pub/sub promises nothing. A message that leaves a hole, a second subscribe frame (the library has connected anew),
    and a look from time to time (the last message may be the lost one) each mean: read on from what was told.
6.  Each process has a lease, and each run a holder: the process that opened it last. `unfinished` are the open runs
    whose holder's lease has run out. Whoever was cut off from Redis doesn't look before a whole lease has passed: the
    others may have been cut off too. It is the epoch that fences a holder that comes back, not the lease.
7.  The index (epochs, keys, runs by owner, what is open, what is due) lies under another hash tag. What it names is
    looked up in the stream's own facts before it is believed, so a call that was cut off leaves only what is ignored.
"""

import logging
import random
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import chain, repeat
from typing import Any, Final, TypeVar

import anyio
import msgspec
import orjson
from anyio import CancelScope, current_time
from anyio import Event as Signal
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

import ssecore.log
from ssecore.errors import Conflict, LogError, LogUnavailable, NotFound, SSEAppError, WriterFenced
from ssecore.log import (
    Cursor,
    Ended,
    Gap,
    Kind,
    Retention,
    Row,
    Stat,
    Watcher,
    Watchers,
    joined,
    locate,
    new_epoch,
    plain,
)
from ssecore.wire import encode_json

__all__ = ["RedisLog"]

logger = logging.getLogger("sseapp")
T = TypeVar("T")

#: What merging makes of a row at most, and the largest row that is published; a larger one is read from the log.
_MAX_ROW_BYTES: Final = 64 * 1024
#: Bodies that wait for Redis in this process. More are refused at once.
_MAX_QUEUED_BYTES: Final = 64 * 1024 * 1024
#: Bodies in one pipeline: some 10 ms of work, which other processes' calls may have to wait for.
_MAX_PIPELINE_BYTES: Final = 4 * 1024 * 1024
#: A connection that gives no sign for so long is broken. Nothing here asks Redis to wait.
_SOCKET_TIMEOUT_S: Final = 5.0
#: Connections besides the one that listens.
_MAX_CONNECTIONS: Final = 16
#: How long a stream remembers the last append of a process that writes no more, where it has so many of them.
_REMEMBER_S: Final = 3600
_MANY_PROCESSES: Final = 64
#: How often the connection that listens is asked for a sign of life.
_PING_S: Final = 2.0
#: Streams that the upkeep looks at in one turn.
_STEP_STREAMS: Final = 64
#: Entries of one XRANGE.
_READ_ROWS: Final = 64
_RETRY_AFTER_S: Final = 5
#: What passes.
_AWAY: Final = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OSError)

#: What each script begins with, besides `instance` and `prefix`. `trim` does what `ssecore.log.outlived` says, for as
#: long as it says so, and gives first and size.
_COMMON: Final = """
local facts, rows, processes = unpack(KEYS)
local function num(n) return string.format('%.0f', n) end
local function get(...) return redis.call('HMGET', facts, ...) end
local function set(...) redis.call('HSET', facts, ...) end
local function trim(first, last, size, max_bytes, age_s, now)
  local cut = nil
  while true do
    local oldest = redis.call('XRANGE', rows, cut and num(cut + 1) or '-', '+', 'COUNT', 1)[1]
    if not oldest then break end
    local row, at, bytes = tonumber(string.match(oldest[1], '^%d+')), tonumber(oldest[2][6]), #oldest[2][8]
    if not (row < first or (max_bytes and size > max_bytes and row < last) or (age_s and at + age_s <= now)) then
      break
    end
    size, cut, first = size - bytes, row, math.max(first, row + 1)
  end
  if cut then redis.call('XTRIM', rows, 'MINID', num(cut + 1)) end
  return first, size
end
"""
#: KEYS are those of one stream. The index has the same hash tag and is named by `prefix`.
_SCRIPTS: Final = {
    # stream, epoch, kind, owner, key (both '' or '=…'), when it is due or '', then fields and values
    "create": """
local stream, epoch, kind, owner, key, due = unpack(ARGV)
local named = key ~= '' and redis.call('HGET', prefix .. 'keys', key)
if named and redis.call('EXISTS', prefix .. 'facts:' .. named) == 1 then return {'there', named} end
if redis.call('EXISTS', facts) == 1 then return {'there', stream} end
if redis.call('HSETNX', prefix .. 'epochs', epoch, stream) == 0 then return {'conflict'} end
set('instance', instance, unpack(ARGV, 7))
if key ~= '' then redis.call('HSET', prefix .. 'keys', key, stream) end
if kind == 'run' then
  local order = redis.call('INCR', prefix .. 'count')
  redis.call('ZADD', prefix .. 'open', order, stream)
  redis.call('ZADD', prefix .. 'runs:' .. owner, order, stream)
elseif due ~= '' then
  redis.call('ZADD', prefix .. 'due', due, stream)
end
return {'ok'}
""",
    # stream, epoch, now, why (a 'writer', who asks 'again'; the 'instance', if it has changed), most epochs,
    # retention (JSON, or ''), its events, bytes, age
    "open": """
local stream, epoch, now = ARGV[1], ARGV[2], tonumber(ARGV[3])
local f = get('closed', 'first', 'last', 'epochs', 'size', 'kind', 'instance', 'epoch')
if not f[1] then return 'none' end
if f[1] == '1' then return 'closed' end
-- An earlier try, whose answer was lost; or another process saw the instance first.
if (ARGV[4] == 'again' and f[8] == epoch) or (ARGV[4] == 'instance' and f[7] == instance) then return 'ok' end
if redis.call('HSETNX', prefix .. 'epochs', epoch, stream) == 0 then return 'conflict' end
local first, last, size = tonumber(f[2]), tonumber(f[3]), tonumber(f[5])
local names, starts = {}, {}
for name, start in string.gmatch(f[4] .. ' ' .. epoch .. ':' .. num(last + 1), '([^ :]+):(%d+)') do
  table.insert(names, name)
  table.insert(starts, tonumber(start))
end
local at = 1
while #names - at + 1 > tonumber(ARGV[5]) and starts[at + 1] <= first do
  redis.call('HDEL', prefix .. 'epochs', names[at])
  at = at + 1
end
local kept = {}
for n = at, #names do table.insert(kept, names[n] .. ':' .. num(starts[n])) end
set('epochs', table.concat(kept, ' '), 'epoch', epoch, 'updated', ARGV[3], 'instance', instance)
-- A run goes on with its writer. A topic's writers have to hear of the epoch: they tell its ids.
if ARGV[4] ~= 'instance' or f[6] == 'topic' then set('writer', epoch) end
if ARGV[6] ~= '' then set('retention', ARGV[6], 'max_events', ARGV[7], 'max_bytes', ARGV[8], 'age_s', ARGV[9]) end
if f[6] == 'topic' then
  local r = get('max_events', 'max_bytes', 'age_s')
  if tonumber(r[1]) then first = math.max(first, last - tonumber(r[1]) + 1) end
  first, size = trim(first, last, size, tonumber(r[2]), tonumber(r[3]), now)
  set('first', num(first), 'size', num(size))
  if tonumber(r[3]) then redis.call('ZADD', prefix .. 'due', ARGV[3], stream) end
end
return 'ok'
""",
    # stream, epoch, now, close, meta, events, ends, body, process, its number of the batch, the least that `last` must
    # be, what is published at most, how long a process is remembered, how many are
    "append": """
local stream, epoch, now, closes, meta, body, process = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[8], ARGV[9]
local events, number = tonumber(ARGV[6]), tonumber(ARGV[10])
local f = get('last', 'closed', 'writer', 'instance', 'first', 'size', 'kind', 'max_events', 'max_bytes', 'age_s',
  'epoch')
if not f[1] then return {'none'} end
local known, top, under = string.match(redis.call('HGET', processes, process) or '', '^(%d+) (%d+) (%S+)')
if known and tonumber(known) == number then return {'ok', top, under} end
if known and tonumber(known) > number then return {'late'} end
if f[2] == '1' then return {'closed'} end
if f[3] ~= epoch then return {'fenced'} end
if f[4] ~= instance then return {'instance'} end
local last = tonumber(f[1])
if last < tonumber(ARGV[11]) then return {'lost'} end
if events == 0 and closes == '0' and meta == '' then return {'ok', f[1], f[11]} end
local from, first, size, age_s = last + 1, tonumber(f[5]), tonumber(f[6]), tonumber(f[10])
if events > 0 then
  last = last + events
  size = size + #body
  redis.call('XADD', rows, num(last) .. '-0', 'e', f[11], 'n', ARGV[7], 't', now, 'b', body)
end
if f[7] == 'topic' then
  if tonumber(f[8]) then first = math.max(first, last - tonumber(f[8]) + 1) end
  if closes == '0' then first, size = trim(first, last, size, tonumber(f[9]), age_s, tonumber(now)) end
end
set('first', num(first), 'last', num(last), 'size', num(size), 'closed', closes, 'updated', now)
if meta ~= '' then set('meta', meta) end
if closes == '1' then
  redis.call('ZREM', prefix .. 'open', stream)
  if age_s then redis.call('ZADD', prefix .. 'due', string.format('%.6f', tonumber(now) + age_s), stream) end
end
redis.call('HSET', processes, process, table.concat({ARGV[10], num(last), f[11], now}, ' '))
redis.call('EXPIRE', processes, ARGV[13])
if redis.call('HLEN', processes) > tonumber(ARGV[14]) then
  local all = redis.call('HGETALL', processes)
  for n = 1, #all, 2 do
    local at = tonumber(string.match(all[n + 1], '(%S+)$'))
    if at + tonumber(ARGV[13]) < tonumber(now) then redis.call('HDEL', processes, all[n]) end
  end
end
if events > 0 or closes == '1' then
  local told = #body <= tonumber(ARGV[12]) and ARGV[7] .. body or ''
  redis.call('PUBLISH', prefix .. 'appended:' .. stream,
    table.concat({num(from), num(last), closes, f[11], told}, ' '))
end
return {'ok', num(last), f[11]}
""",
    # stream, now; whether it is to be deleted
    "trim": """
local stream, now = ARGV[1], tonumber(ARGV[2])
local f = get('first', 'last', 'size', 'closed', 'kind', 'max_bytes', 'age_s', 'updated')
local age_s, due = tonumber(f[7]), nil
if age_s and f[4] == '1' then
  due = tonumber(f[8]) + age_s
  if due <= now then return 1 end
elseif age_s and f[5] == 'topic' then
  local first, size = trim(tonumber(f[1]), tonumber(f[2]), tonumber(f[3]), tonumber(f[6]), age_s, now)
  set('first', num(first), 'size', num(size))
  local oldest = redis.call('XRANGE', rows, '-', '+', 'COUNT', 1)[1]
  due = (oldest and tonumber(oldest[2][6]) or now) + age_s
end
if due then
  redis.call('ZADD', prefix .. 'due', string.format('%.6f', due), stream)
else
  redis.call('ZREM', prefix .. 'due', stream)
end
return 0
""",
    # stream
    "delete": """
local stream = ARGV[1]
local f = get('owner', 'key', 'epochs')
if redis.call('DEL', unpack(KEYS)) == 0 then return end
redis.call('ZREM', prefix .. 'open', stream)
redis.call('ZREM', prefix .. 'due', stream)
redis.call('ZREM', prefix .. 'runs:' .. (f[1] and '=' .. f[1] or ''), stream)
if f[2] then redis.call('HDEL', prefix .. 'keys', '=' .. f[2]) end
for name in string.gmatch(f[3] or '', '([^ :]+):') do redis.call('HDEL', prefix .. 'epochs', name) end
redis.call('PUBLISH', prefix .. 'appended:' .. stream, '0 0 2 - ')
""",
    # after, how many
    "read": """
local first = tonumber(get('first')[1])
if not first then return {} end
return redis.call('XRANGE', rows, num(math.max(tonumber(ARGV[1]) + 1, first)), '+', 'COUNT', ARGV[2])
""",
    # process; the open runs that it holds, and those of processes without a lease
    "left": """
local left, alive = {}, {[ARGV[1]] = 0}
for _, stream in ipairs(redis.call('ZRANGE', prefix .. 'open', 0, -1)) do
  local holder = redis.call('HGET', prefix .. 'facts:' .. stream, 'holder') or ''
  alive[holder] = alive[holder] or redis.call('EXISTS', prefix .. 'lease:' .. holder)
  if alive[holder] == 0 then table.insert(left, stream) end
end
return left
""",
    # stream, word, for how long
    "call": """
local holder = get('holder')[1]
if not holder then return 0 end
redis.call('RPUSH', prefix .. 'calls:' .. holder, ARGV[2] .. ' ' .. ARGV[1])
redis.call('EXPIRE', prefix .. 'calls:' .. holder, ARGV[3])
redis.call('PUBLISH', prefix .. 'called:' .. holder, '')
return 1
""",
}


class _Append:
    """What one caller waits for."""

    def __init__(
        self, stream: str, body: bytes, ends: tuple[int, ...], epoch: str, close: bool, meta: dict[str, Any] | None
    ) -> None:
        self.stream, self.body, self.ends, self.epoch, self.close, self.meta = stream, body, ends, epoch, close, meta
        self.done = Signal()
        self.last = 0
        self.error: SSEAppError | None = None


class _Batch:
    """The appends that go in as one row: of one stream and epoch, and only the last one closes (rule 2)."""

    def __init__(self, first: _Append, number: int) -> None:
        self.appends = [first]
        self.number = number
        self.size = len(first.body)

    @property
    def head(self) -> _Append:
        return self.appends[0]

    @property
    def closes(self) -> bool:
        return self.appends[-1].close

    def takes(self, append: _Append) -> bool:
        return (
            append.epoch == self.head.epoch
            and not self.closes
            and self.size + len(append.body) <= _MAX_ROW_BYTES
            and all(one.meta is None for one in (append, *self.appends))
        )

    def add(self, append: _Append) -> None:
        self.appends.append(append)
        self.size += len(append.body)

    def row(self) -> tuple[bytes, tuple[int, ...]]:
        if len(self.appends) == 1:
            return self.head.body, self.head.ends
        ends: list[int] = []
        for append in self.appends:
            start = ends[-1] if ends else 0
            ends += [start + end for end in append.ends]
        return b"".join([append.body for append in self.appends]), tuple(ends)

    def settle(self, last: int) -> None:
        last -= sum(len(append.ends) for append in self.appends)
        for append in self.appends:
            last += len(append.ends)
            append.last = last
            append.done.set()

    def fail(self, error: SSEAppError) -> None:
        for append in self.appends:
            append.error = error
            append.done.set()


class RedisLog:
    """`Log` in the Redis that `url` names (`redis://`, `rediss://` for TLS, `unix://`; user and password in it).

    `wait_s`: how long a call waits for a Redis that is away, half of `lease_s` at most. `lease_s`: how long a process
    may be silent before its runs are closed. `clock` gives Unix time; `upkeep_s` is the pause between two looks at what
    age has ended, and `look_s` that between two at the watched streams (rule 5). `prefix` begins the name of every key.
    On asyncio only.
    """

    shared = True
    on_call: Callable[[str, str], None] | None = None

    def __init__(
        self,
        url: str,
        *,
        wait_s: float = 5.0,
        lease_s: float = 10.0,
        prefix: str = "sseapp",
        clock: Callable[[], float] = time.time,
        upkeep_s: float = 5.0,
        look_s: float = 2.0,
    ) -> None:
        self._url = url
        self._wait_s = min(wait_s, lease_s / 2)  # a lease outlasts its holder's own waiting
        self._lease_s = lease_s
        self._prefix = prefix
        self._clock = clock
        self._upkeep_s = upkeep_s
        self._look_s = look_s
        self._process = new_epoch()
        self._instance = ""
        self._loading = anyio.Lock()
        self._watchers = Watchers()
        #: Of each watched stream: what watchers were told last; else what somebody saw first; else None.
        self._told: dict[str, Cursor | None] = {}
        self._subscribed: dict[str, Signal] = {}
        #: What the connection of the moment was asked for, of `_subscribed`.
        self._asked: dict[str, Signal] = {}
        self._ear: Any = None
        self._asking = anyio.Lock()
        self._queue: deque[_Append] = deque()
        self._queued_bytes = 0
        self._numbers = 0
        #: The top of the runs at work here (rules 4 and 6), and those that are being created.
        self._tops: dict[str, int] = {}
        self._creating: set[str] = set()
        self._dirty: dict[str, None] = {}
        self._shas: dict[str, str] = {}
        self._running = False
        self.away = False
        self._back_at = self._held_at = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        failure = None
        options: dict[str, Any] = {
            "socket_timeout": _SOCKET_TIMEOUT_S,
            "socket_connect_timeout": _SOCKET_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),  # ours, which know what may be asked for twice
        }
        try:
            # Whoever finds all connections taken waits for one.
            pool = BlockingConnectionPool.from_url(self._url, max_connections=_MAX_CONNECTIONS, timeout=None, **options)
        except ValueError as error:
            raise LogError(f"the event log's Redis URL can't be used: {error}") from None
        self._redis: Any = Redis.from_pool(pool)
        self._wake, self._look, self._channels, self._called = Signal(), Signal(), Signal(), Signal()
        try:
            await self._start()
            self._back_at = self._held_at = current_time()
            async with anyio.create_task_group() as group:
                for task in (self._listen, self._subscribe, self._refill, self._hold, self._keep_up):
                    group.start_soon(task)
                self._running = True
                try:
                    async with anyio.create_task_group() as writing:
                        writing.start_soon(self._write)
                        try:
                            yield
                        except Exception as error:  # raised below: a task group would wrap it
                            failure = error
                        finally:
                            self._running = False
                            self._wake.set()
                finally:
                    group.cancel_scope.cancel()
        finally:
            with CancelScope(shield=True), suppress(RedisError, OSError):
                await self._redis.delete(self._name(f"lease:{self._process}"), self._name(f"calls:{self._process}"))
            with CancelScope(shield=True):
                await self._redis.aclose()
        if failure:
            raise failure

    async def _start(self) -> None:
        try:
            info = await self._patiently(self._load)
        except LogUnavailable as error:
            raise LogError(f"the event log's Redis can't be used: {error.__cause__}") from error
        version, mode, policy = (info.get(name, "") for name in ("redis_version", "redis_mode", "maxmemory_policy"))
        if tuple(map(int, version.split(".")[:2])) < (7, 0):
            raise LogError(f"the event log needs Redis 7.0 or later; this is {version}")
        if mode == "cluster":
            raise LogError("the event log needs one Redis with its replicas; this is a node of a Redis Cluster")
        if policy not in ("noeviction", ""):
            logger.warning("the event log's Redis drops data when it is full (maxmemory-policy %s): noeviction", policy)

    async def _load(self) -> dict[str, Any]:
        """The scripts, for the instance that answers now; watchers of what it hasn't got are told (rule 3)."""
        async with self._loading, self._redis.client() as connection:  # one connection: one instance
            info: dict[str, Any] = await connection.info()
            head = f"local instance, prefix = '{info['run_id']}', [==[{self._name('')}]==]\n{_COMMON}"
            shas = {name: await connection.script_load(head + text) for name, text in _SCRIPTS.items()}
            if self._instance not in ("", info["run_id"]):
                for stream in list(self._told):
                    facts = await connection.hgetall(self._keys(stream)[0])
                    self._check(stream, _stat(stream, facts) if facts else None)
            # Only now: until then who reads gets NOSCRIPT, and waits for the lock.
            self._instance, self._shas = info["run_id"], shas
        return info

    # What callers ask for

    async def create(
        self,
        stream: str,
        *,
        epoch: str,
        kind: Kind = "run",
        owner: str | None = None,
        meta: dict[str, Any] | None = None,
        key: str | None = None,
        retention: Retention | None = None,
    ) -> tuple[Stat, bool]:
        now, facts, keep = self._clock(), plain(meta) or {}, retention or Retention()
        stat = Stat(stream, kind, ((epoch, 1),), now, now, owner=owner, meta=facts, key=key, retention=keep)
        self._creating.add(stream)
        try:
            there, created = await self._patiently(lambda: self._create(stat))
            if created and kind == "run":
                self._tops[stream] = 0
            return there, created
        finally:
            self._creating.discard(stream)

    async def _create(self, stat: Stat) -> tuple[Stat, bool]:
        ((epoch, _),), age_s = stat.epochs, stat.retention.age_s
        due = "" if age_s is None else repr(stat.created + age_s)
        values = (epoch, stat.kind, _maybe(stat.owner), _maybe(stat.key), due, *_fields(stat, self._process))
        said, *named = await self._run("create", stat.stream, stat.stream, *values)
        if said == b"conflict":
            raise Conflict("this epoch has been opened before")
        if said == b"ok":
            return stat, True
        there = await self._stat(named[0].decode())
        if there is None:  # deleted just now
            return await self._create(stat)
        return there, there.epochs[0][0] == epoch  # ours: an earlier try, whose answer was lost

    async def open(self, stream: str, epoch: str, *, retention: Retention | None = None) -> Stat:
        who = chain(["writer"], repeat("again"))
        return await self._patiently(lambda: self._open(stream, epoch, retention, next(who)))

    async def _open(self, stream: str, epoch: str, retention: Retention | None, who: str) -> Stat:
        keep = [encode_json(retention), *_limits(retention)] if retention is not None else ["", "", "", ""]
        now, most = repr(self._clock()), ssecore.log.MAX_EPOCHS
        said = await self._run("open", stream, stream, epoch, now, who, most, *keep)
        if said == b"closed":
            raise WriterFenced("the stream is closed")
        if said == b"conflict":
            raise Conflict("this epoch has been opened before")
        stat = await self._stat(stream) if said == b"ok" else None
        if stat is None:
            raise NotFound("no such stream")
        return stat

    async def append(
        self,
        stream: str,
        frames: Sequence[bytes],
        *,
        epoch: str,
        close: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> int:
        body, ends = joined(frames)
        append = _Append(stream, body, ends, epoch, close, plain(meta))
        if not self._running:
            raise LogUnavailable("the event log is closed")
        if self._queued_bytes + len(body) > _MAX_QUEUED_BYTES:
            raise _away("too much waits to be written")
        self._queue.append(append)
        self._queued_bytes += len(body)
        self._wake.set()
        await append.done.wait()
        if append.error is not None:
            raise append.error
        return append.last

    async def read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        """Waits for a Redis that is away as long as its caller does: readers stay, with their heartbeats."""
        await self._watching(stream)
        return await self._patiently(lambda: self._read(stream, after, max_bytes), wait_s=None)

    async def _read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        rows: list[Row] = []
        size = 0
        while True:
            entries = await self._run("read", stream, rows[-1].last if rows else after, _READ_ROWS)
            for id, (_, epoch, _, packed, _, _, _, body) in entries:
                last, ends = int(id.partition(b"-")[0]), _unpacked(packed)
                rows.append(Row(epoch.decode(), last - len(ends) + 1, body, ends))
                size += len(body)
                if size >= max_bytes:
                    return rows
            if len(entries) < _READ_ROWS:
                return rows

    async def stat(self, stream: str) -> Stat | None:
        await self._watching(stream)
        stat = await self._patiently(lambda: self._stat(stream))
        if stat is not None and stream in self._told and self._told[stream] is None:
            self._told[stream] = Cursor(stat.epochs[-1][0], stat.last)
        return stat

    async def find(self, epoch: str) -> Stat | None:
        async def find() -> Stat | None:
            named = await self._redis.hget(self._name("epochs"), epoch)
            stat = await self._stat(named.decode()) if named is not None else None
            return stat if stat is not None and epoch in dict(stat.epochs) else None

        return await self._patiently(find)

    async def find_key(self, key: str) -> Stat | None:
        async def find() -> Stat | None:
            named = await self._redis.hget(self._name("keys"), _maybe(key))
            stat = await self._stat(named.decode()) if named is not None else None
            return stat if stat is not None and stat.key == key else None

        return await self._patiently(find)

    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        async def runs() -> list[Stat]:
            names = await self._redis.zrevrange(self._name(f"runs:{_maybe(owner)}"), 0, limit - 1)
            return await self._stats(names)

        return await self._patiently(runs)

    async def unfinished(self) -> list[Stat]:
        """Those whose holder's lease has run out, and those that are held here and nobody works on (rule 6)."""
        if self._cut_off():
            return []
        names: list[bytes] = await self._patiently(lambda: self._run("left", None, self._process))
        left = [name for name in names if (stream := name.decode()) not in self._tops and stream not in self._creating]
        stats = await self._patiently(lambda: self._stats(left))
        return [] if self._cut_off() else [stat for stat in stats if not stat.closed]

    def _cut_off(self) -> bool:
        """Whether others may have been cut off from Redis for so long that they lost their leases."""
        now = current_time()
        return now - self._back_at < self._lease_s or now - self._held_at > self._lease_s / 2

    async def _hold(self) -> None:
        """Keeps the lease, and answers calls that were missed."""
        while True:
            try:
                await self._redis.set(self._name(f"lease:{self._process}"), "", px=int(self._lease_s * 1000))
                await self._answer_calls()
                self._is_back()
                now = current_time()
                if now - self._held_at > self._lease_s / 2:
                    self._back_at = now
                self._held_at = now
            except (RedisError, OSError) as error:
                self._is_away(error)
            with anyio.move_on_after(self._lease_s / 3):
                await self._called.wait()
            self._called = Signal()

    async def call(self, stream: str, word: str) -> None:
        if not await self._patiently(lambda: self._run("call", stream, stream, word, _REMEMBER_S)):
            raise NotFound("no such stream")

    async def _answer_calls(self) -> None:
        while calls := await self._redis.lpop(self._name(f"calls:{self._process}"), 100):
            for said in calls:
                word, _, stream = said.decode().partition(" ")
                if self.on_call is not None:
                    self.on_call(stream, word)

    async def touch(self, stream: str, for_s: float) -> None:
        await self._patiently(lambda: self._redis.set(self._keys(stream)[3], "", px=max(1, int(for_s * 1000))))

    async def touched(self, stream: str) -> bool:
        return bool(await self._patiently(lambda: self._redis.exists(self._keys(stream)[3])))

    async def delete(self, stream: str) -> None:
        await self._patiently(lambda: self._run("delete", stream, stream))
        self._tops.pop(stream, None)
        self._tell(stream, None, "deleted")

    def watch(self, stream: str, watcher: Watcher) -> Callable[[], None]:
        unwatch = self._watchers.add(stream, watcher)
        if stream not in self._told:
            self._told[stream] = None
            self._subscribed[stream] = Signal()
            self._channels.set()

        def done() -> None:
            unwatch()
            if not self._watchers.watched(stream):
                self._forget(stream)

        return done

    async def upkeep(self) -> None:
        await self._patiently(self._upkeep)

    async def _upkeep(self) -> None:
        while True:
            now = repr(self._clock())
            names = await self._redis.zrangebyscore(self._name("due"), "-inf", now, start=0, num=_STEP_STREAMS)
            for stream in [name.decode() for name in names]:
                if await self._run("trim", stream, stream, now):
                    await self.delete(stream)
            if len(names) < _STEP_STREAMS:
                return

    async def _keep_up(self) -> None:
        while True:
            await anyio.sleep(self._upkeep_s)
            with suppress(LogUnavailable):
                await self.upkeep()

    # The writer

    async def _write(self) -> None:
        """The writer's task. It ends when `running` is left and nothing is queued any more, and not before."""
        with CancelScope(shield=True):
            while self._running or self._queue:
                if not self._queue:
                    await self._wake.wait()
                self._wake = Signal()
                if batches := self._take():
                    await self._send(batches)

    def _take(self) -> list[_Batch]:
        """What goes into one pipeline, one batch a stream (rule 2); the rest keeps its order."""
        batches: dict[str, _Batch] = {}
        left: deque[_Append] = deque()
        full: set[str] = set()
        size = 0
        while self._queue and size < _MAX_PIPELINE_BYTES:
            append = self._queue.popleft()
            batch = batches.get(append.stream)
            if append.stream in full or (batch is not None and not batch.takes(append)):
                full.add(append.stream)
                left.append(append)
                continue
            if batch is None:
                self._numbers += 1
                batches[append.stream] = _Batch(append, self._numbers)
            else:
                batch.add(append)
            size += len(append.body)
        self._queue.extendleft(reversed(left))
        return list(batches.values())

    async def _send(self, batches: list[_Batch]) -> None:
        """Until each has its answer, or Redis has been away for too long."""
        until = current_time() + self._wait_s
        pause = 0.01
        while batches:
            try:
                batches = await self._try(batches)
                self._is_back()
                pause = 0.01
            except _AWAY as error:
                await self._lost(error)
                if current_time() + pause > until or not self._running:
                    break
                await anyio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, 1.0)
            except Exception as error:  # Redis is full, or a bug of ours: nobody waits for ever
                logger.exception("the event log can't be written")
                for batch in batches:
                    self._settle(batch, _away(str(error) if isinstance(error, RedisError) else "internal error"))
                return
        for batch in batches:
            self._settle(batch, _away("Redis can't be reached"))

    async def _try(self, batches: list[_Batch]) -> list[_Batch]:
        """One pipeline. Gives those that have to be sent again, with an unknown script or in a new epoch (rule 3)."""
        now = repr(self._clock())
        async with self._redis.pipeline(transaction=False) as pipe:
            for batch in batches:
                body, ends = batch.row()
                head, last = batch.head, batch.appends[-1]
                meta = encode_json(last.meta) if last.meta is not None else b""
                values = (head.stream, head.epoch, now, int(batch.closes), meta, len(ends), _packed(ends), body)
                limits = (self._tops.get(head.stream, 0), _MAX_ROW_BYTES, _REMEMBER_S, _MANY_PROCESSES)
                keys = self._keys(head.stream)
                pipe.evalsha(self._shas["append"], len(keys), *keys, *values, self._process, batch.number, *limits)
            answers = await pipe.execute(raise_on_error=False)
        again = []
        for batch, answer in zip(batches, answers, strict=True):
            if isinstance(answer, NoScriptError):
                again.append(batch)
            elif isinstance(answer, Exception):
                if isinstance(answer, _AWAY) or not isinstance(answer, ResponseError):
                    raise answer
                self._settle(batch, _away(str(answer)))
            elif answer[0] == b"instance":
                with suppress(NotFound, WriterFenced):
                    await self._open(batch.head.stream, new_epoch(), None, "instance")
                again.append(batch)
            else:
                self._answered(batch, answer)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            await self._load()
        return again

    def _answered(self, batch: _Batch, answer: list[bytes]) -> None:
        said, stream = answer[0], batch.head.stream
        if said == b"ok":
            last, (body, ends) = int(answer[1]), batch.row()
            if batch.closes:
                self._tops.pop(stream, None)
            elif stream in self._tops:
                self._tops[stream] = last
            row = Row(answer[2].decode(), last - len(ends) + 1, body, ends) if ends else None
            if row or batch.closes:
                self._announce(stream, row, "closed" if batch.closes else None)
            self._settle(batch, None, last)
            return
        self._tops.pop(stream, None)
        refusals: dict[bytes, SSEAppError] = {
            b"none": NotFound("no such stream"),
            b"closed": WriterFenced("the stream is closed"),
            b"fenced": WriterFenced("another writer has taken over the stream"),
            b"lost": LogError("the event log lost some of this run's events"),
            b"late": _away("it was asked for too late"),
        }
        self._settle(batch, refusals[said])

    def _settle(self, batch: _Batch, error: SSEAppError | None, last: int = 0) -> None:
        self._queued_bytes -= batch.size
        if error is None:
            batch.settle(last)
        else:
            batch.fail(error)

    # What is heard of other processes

    def _announce(self, stream: str, row: Row | None, ended: Ended | None) -> None:
        """Tell the watchers what has been appended; read it from the log instead where it isn't the next (rule 5)."""
        told = self._told.get(stream)
        if row is not None and told is not None:
            if row.epoch != told.epoch or row.first > told.seq + 1:
                self._suspect(stream)
                return
            if row.last <= told.seq:
                row = None
        self._tell(stream, row, ended)

    def _tell(self, stream: str, row: Row | None, ended: Ended | None) -> None:
        if stream not in self._told:
            return
        if row is not None:
            self._told[stream] = Cursor(row.epoch, row.last)
        if row is not None or ended is not None:
            self._watchers.notify(stream, row, ended)
        if ended is not None and not self._watchers.watched(stream):
            self._forget(stream)

    def _check(self, stream: str, stat: Stat | None) -> bool:
        """Whether all that watchers were told is in the log. If not, the stream that they know is gone: they are told
        so, and come back with their cursors."""
        told = self._told.get(stream)
        if told is not None:
            gap = Gap("expired") if stat is None else locate(stat, told)[1]
            if gap is not None and gap.reason != "trimmed":
                self._tell(stream, None, "deleted")
                return False
        return True

    def _suspect(self, stream: str) -> None:
        self._dirty[stream] = None
        self._look.set()

    def _forget(self, stream: str) -> None:
        self._told.pop(stream, None)
        self._subscribed.pop(stream, Signal()).set()
        self._channels.set()

    async def _watching(self, stream: str) -> None:
        """Whoever watches first and then looks misses nothing: the look waits for the subscription."""
        if (subscribed := self._subscribed.get(stream)) is not None and not subscribed.is_set():
            with anyio.move_on_after(self._wait_s):
                await subscribed.wait()
                return
            raise _away("Redis can't be reached")

    async def _listen(self) -> None:
        """One connection after another: each is asked for all that is watched, and none is made by the library."""
        while True:
            ear = self._redis.connection_pool.make_connection()
            try:
                await ear.connect()
                await ear.send_command("SUBSCRIBE", self._name(f"called:{self._process}"))
                self._ear, self._asked = ear, {}
                self._channels.set()
                while True:
                    message = await ear.read_response(
                        timeout=_SOCKET_TIMEOUT_S, disconnect_on_error=False, push_request=True
                    )
                    self._hear(message)
            except (RedisError, OSError) as error:
                self._is_away(error)
            finally:
                self._ear = None
                with CancelScope(shield=True):
                    async with self._asking:
                        await ear.disconnect(nowait=True)
            await anyio.sleep(0.1)

    async def _subscribe(self) -> None:
        """Asks the connection of the moment for what it hasn't been asked for, and now and then whether it is there."""
        while True:
            with anyio.move_on_after(_PING_S):
                await self._channels.wait()
            self._channels = Signal()
            if (ear := self._ear) is None:
                continue
            wanted = dict(self._subscribed)
            new = [stream for stream, signal in wanted.items() if self._asked.get(stream) is not signal]
            old = self._asked.keys() - wanted.keys()
            self._asked = wanted
            try:
                for word, streams in (("SUBSCRIBE", new), ("UNSUBSCRIBE", old), ("PING", [])):
                    async with self._asking:  # the library fails where somebody disconnects meanwhile
                        if self._ear is not ear or not ear.is_connected:  # it would connect again, by itself
                            break
                        if streams or word == "PING":
                            await ear.send_command(word, *map(self._channel, streams))
            except (RedisError, OSError):
                pass  # who listens on it hears of that too

    def _hear(self, message: Any) -> None:
        if not isinstance(message, list) or message[0] not in (b"subscribe", b"message"):
            return
        kind, channel, data = message
        stream = channel.decode().removeprefix(self._channel(""))
        if channel.startswith(self._name("called:").encode()):
            self._called.set()
        elif kind == b"message":
            self._heard(stream, data)
        elif (subscribed := self._subscribed.get(stream)) is not None:
            if subscribed.is_set():
                self._suspect(stream)  # connected anew: what was published meanwhile is lost
            subscribed.set()

    def _heard(self, stream: str, data: bytes) -> None:
        first, last, flag, epoch, rest = data.split(b" ", 4)
        ended: Ended | None = {b"1": "closed", b"2": "deleted"}.get(flag)  # type: ignore[assignment]
        events = int(last) - int(first) + 1 if flag != b"2" else 0
        if events and not rest:  # too large to be published
            self._suspect(stream)
            return
        row = Row(epoch.decode(), int(first), rest[4 * events :], _unpacked(rest[: 4 * events])) if events else None
        self._announce(stream, row, ended)

    async def _refill(self) -> None:
        """Reads what watchers were not told, where something says so, and from time to time for all (rule 5)."""
        while True:
            with anyio.move_on_after(self._look_s):
                await self._look.wait()
            self._look = Signal()
            try:
                for stream in list(self._dirty) or await self._behind():
                    self._dirty.pop(stream, None)
                    await self._read_on(stream)
            except (RedisError, OSError, SSEAppError) as error:
                self._is_away(error)
                await anyio.sleep(0.1)
                for stream in self._told:
                    self._suspect(stream)

    async def _behind(self) -> list[str]:
        """The watched streams of which Redis has more, or which have ended."""
        streams = [stream for stream, told in self._told.items() if told is not None]
        behind = []
        for start in range(0, len(streams), 1000):
            some = streams[start : start + 1000]
            async with self._redis.pipeline(transaction=False) as pipe:
                for stream in some:
                    pipe.hmget(self._keys(stream)[0], "last", "closed")
                facts = await pipe.execute()
            for stream, (last, closed) in zip(some, facts, strict=True):
                told = self._told.get(stream)
                if told is not None and (last is None or closed == b"1" or int(last) != told.seq):
                    behind.append(stream)
        return behind

    async def _read_on(self, stream: str) -> None:
        while (told := self._told.get(stream)) is not None:
            stat = await self._patiently(lambda: self._stat(stream))
            if not self._check(stream, stat):
                return
            rows = await self._patiently(lambda after=told.seq: self._read(stream, after, _MAX_ROW_BYTES))  # type: ignore[misc]
            for row in rows:
                told = self._told.get(stream)
                if told is not None and row.last > told.seq:
                    self._tell(stream, row, None)
            if not rows:
                if stat is not None and stat.closed:
                    self._tell(stream, None, "closed")
                return

    # Calls

    async def _patiently(self, call: Callable[[], Awaitable[T]], *, wait_s: float | None = 0.0) -> T:
        """Again and again while Redis is away, for `wait_s` (0: as the engine is set; None: without an end)."""
        limit = self._wait_s if wait_s == 0.0 else wait_s
        until = None if limit is None else current_time() + limit
        pause = 0.01
        while True:
            try:
                result = await call()
                self._is_back()
                return result
            except NoScriptError:
                with suppress(RedisError, OSError):
                    await self._load()
            except _AWAY as error:
                await self._lost(error)
                wrong_password = isinstance(error, AuthenticationError)
                if wrong_password or (until is not None and current_time() + pause > until):
                    raise _away("Redis can't be reached") from error
                await anyio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, 1.0)
            except RedisError as error:
                raise _away(str(error)) from error

    async def _run(self, script: str, stream: str | None, *values: object) -> Any:
        keys = [] if stream is None else self._keys(stream)
        return await self._redis.evalsha(self._shas[script], len(keys), *keys, *values)

    async def _stat(self, stream: str) -> Stat | None:
        facts = await self._redis.hgetall(self._keys(stream)[0])
        return _stat(stream, facts) if facts else None

    async def _stats(self, names: list[bytes]) -> list[Stat]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hgetall(self._keys(name.decode())[0])
            facts = await pipe.execute() if names else []
        return [_stat(name.decode(), one) for name, one in zip(names, facts, strict=True) if one]

    def _keys(self, stream: str) -> list[str]:
        return [self._name(f"{part}:{stream}") for part in ("facts", "rows", "processes", "touched")]

    def _name(self, name: str) -> str:
        """Of a key or a channel. All have one hash tag."""
        return f"{{{self._prefix}}}:{name}"

    def _channel(self, stream: str) -> str:
        return self._name(f"appended:{stream}")

    async def _lost(self, error: Exception) -> None:
        """Redis is away. One that has become a replica still answers, but what took over is found by connecting."""
        self._is_away(error)
        if isinstance(error, ReadOnlyError):
            await self._redis.connection_pool.disconnect(inuse_connections=False)

    def _is_away(self, error: Exception) -> None:
        if not self.away:
            logger.error("the event log's Redis is away: %s", error)
        self.away = True

    def _is_back(self) -> None:
        if self.away:
            logger.warning("the event log's Redis is back")
            self._back_at = current_time()
        self.away = False


def _fields(stat: Stat, holder: str) -> list[str | bytes]:
    """A new stream's facts, as HSET takes them."""
    ((epoch, first),) = stat.epochs
    fields: dict[str, Any] = {
        "kind": stat.kind,
        "created": repr(stat.created),
        "updated": repr(stat.updated),
        "first": 1,
        "last": 0,
        "size": 0,
        "closed": 0,
        "meta": encode_json(stat.meta),
        "epochs": f"{epoch}:{first}",
        "epoch": epoch,
        "writer": epoch,
        "holder": holder,
        "retention": encode_json(stat.retention),
    }
    fields |= zip(("max_events", "max_bytes", "age_s"), _limits(stat.retention), strict=True)
    fields |= {name: value for name, value in (("owner", stat.owner), ("key", stat.key)) if value is not None}
    return [part for pair in fields.items() for part in pair]


def _limits(retention: Retention) -> list[str]:
    return ["" if limit is None else repr(limit) for limit in (retention.events, retention.bytes, retention.age_s)]


def _stat(stream: str, facts: dict[bytes, bytes]) -> Stat:
    pairs = (pair.partition(":") for pair in facts[b"epochs"].decode().split())
    owner, key = facts.get(b"owner"), facts.get(b"key")
    return Stat(
        stream,
        "run" if facts[b"kind"] == b"run" else "topic",
        tuple((name, int(first)) for name, _, first in pairs),
        float(facts[b"created"]),
        float(facts[b"updated"]),
        int(facts[b"first"]),
        int(facts[b"last"]),
        int(facts[b"size"]),
        facts[b"closed"] == b"1",
        None if owner is None else owner.decode(),
        orjson.loads(facts[b"meta"]),
        None if key is None else key.decode(),
        msgspec.json.decode(facts[b"retention"], type=Retention),
    )


def _maybe(text: str | None) -> str:
    return "" if text is None else f"={text}"


def _packed(ends: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(ends)}I", *ends)


def _unpacked(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def _away(reason: str) -> LogUnavailable:
    headers = {"Retry-After": str(_RETRY_AFTER_S)}
    return LogUnavailable(f"the event log can't be used at the moment: {reason}", headers=headers)
