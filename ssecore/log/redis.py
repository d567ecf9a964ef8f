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
from typing import Any, Final, TypeVar

import anyio
import msgspec
import orjson
from anyio import CancelScope, current_time
from anyio import Event as Signal
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

import ssecore.log
from ssecore.errors import Conflict, LogError, LogUnavailable, NotFound, SSEAppError, WriterFenced
from ssecore.log import Ended, Kind, Retention, Row, Stat, Watcher, Watchers, joined, new_epoch, plain
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
#: Facts that no index names yet are forgotten after this: whoever made them was cut off.
_UNCLAIMED_S: Final = 60
#: How long a stream remembers the last append of a process that writes no more.
_REMEMBER_S: Final = 3600
#: Streams that the upkeep looks at in one turn.
_STEP_STREAMS: Final = 64
#: Entries of one XRANGE.
_READ_ROWS: Final = 64
_RETRY_AFTER_S: Final = 5

#: Trims rows and gives first, size: what `ssecore.log.outlived` says, for as long as it says so.
_TRIM: Final = """
local function num(n) return string.format('%.0f', n) end
local function trim(first, last, size, max_bytes, age_s, now)
  local cut = nil
  while true do
    local oldest = redis.call('LINDEX', KEYS[3], 0)
    if not oldest then break end
    local row, bytes, at = string.match(oldest, '^(%d+) (%d+) (.+)$')
    row, bytes = tonumber(row), tonumber(bytes)
    if not (row < first or (max_bytes and size > max_bytes and row < last)
        or (age_s and tonumber(at) + age_s <= now)) then break end
    redis.call('LPOP', KEYS[3])
    size, cut, first = size - bytes, row, math.max(first, row + 1)
  end
  if cut then redis.call('XTRIM', KEYS[2], 'MINID', num(cut + 1) .. '-0') end
  return first, size
end
"""
_SCRIPTS: Final = {
    # facts; seconds until it is forgotten, then fields and values
    "create": """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'instance', instance, unpack(ARGV, 2))
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
""",
    # facts, rows, sizes; epoch, now, holder ('' where the instance has changed, and only then), most epochs,
    # retention (JSON), its events, bytes, age
    "open": _TRIM
    + """
local f = redis.call('HMGET', KEYS[1], 'closed', 'first', 'last', 'epochs', 'size', 'kind', 'instance')
if not f[1] then return {'none'} end
if f[1] == '1' then return {'closed'} end
if ARGV[3] == '' and f[7] == instance then return {'ok'} end
local first, last, size, now = tonumber(f[2]), tonumber(f[3]), tonumber(f[5]), tonumber(ARGV[2])
local epochs, forgotten, starts, names = f[4] .. ' ' .. ARGV[1] .. ':' .. num(last + 1), {'ok'}, {}, {}
for name, start in string.gmatch(epochs, '([^ :]+):(%d+)') do
  table.insert(names, name)
  table.insert(starts, tonumber(start))
end
local at = 1
while #names - at + 1 > tonumber(ARGV[4]) and starts[at + 1] <= first do
  table.insert(forgotten, names[at])
  at = at + 1
end
local kept = {}
for n = at, #names do table.insert(kept, names[n] .. ':' .. num(starts[n])) end
redis.call('HSET', KEYS[1], 'epochs', table.concat(kept, ' '), 'epoch', ARGV[1], 'updated', ARGV[2],
  'instance', instance)
if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], 'holder', ARGV[3]) end
-- A run goes on with its writer. A topic's writers have to hear of the epoch: they tell its ids.
if ARGV[3] ~= '' or f[6] == 'topic' then redis.call('HSET', KEYS[1], 'writer', ARGV[1]) end
if ARGV[5] ~= '' then
  redis.call('HSET', KEYS[1], 'retention', ARGV[5], 'max_events', ARGV[6], 'max_bytes', ARGV[7], 'age_s', ARGV[8])
end
if f[6] == 'topic' then
  local r = redis.call('HMGET', KEYS[1], 'max_events', 'max_bytes', 'age_s')
  local max_events = tonumber(r[1])
  if max_events then first = math.max(first, last - max_events + 1) end
  first, size = trim(first, last, size, tonumber(r[2]), tonumber(r[3]), now)
  redis.call('HSET', KEYS[1], 'first', num(first), 'size', num(size))
end
return forgotten
""",
    # facts, rows, sizes, processes; epoch, now, close, meta, events, ends, body, process, its number of the batch,
    # the least that `last` must be, what is published at most, channel, how long a process is remembered
    "append": _TRIM
    + """
local f = redis.call('HMGET', KEYS[1], 'last', 'closed', 'writer', 'instance', 'first', 'size', 'kind',
  'max_events', 'max_bytes', 'age_s', 'epoch')
if not f[1] then return {'none'} end
local number, known = string.match(redis.call('HGET', KEYS[4], ARGV[8]) or '', '^(%d+) (%d+)$')
if number == ARGV[9] then return {'ok', known, f[11]} end
if f[2] == '1' then return {'closed'} end
if f[3] ~= ARGV[1] then return {'fenced'} end
if f[4] ~= instance then return {'instance'} end
local last, now, events = tonumber(f[1]), tonumber(ARGV[2]), tonumber(ARGV[5])
if last < tonumber(ARGV[10]) then return {'lost', f[1]} end
if events == 0 and ARGV[3] == '0' and ARGV[4] == '' then return {'ok', f[1], f[11]} end
local first, size = tonumber(f[5]), tonumber(f[6])
local from = last + 1
if events > 0 then
  last = last + events
  size = size + #ARGV[7]
  redis.call('XADD', KEYS[2], num(last) .. '-0', 'e', f[11], 'n', ARGV[6], 'b', ARGV[7])
  redis.call('RPUSH', KEYS[3], num(last) .. ' ' .. num(#ARGV[7]) .. ' ' .. ARGV[2])
end
if f[7] == 'topic' then
  local max_events = tonumber(f[8])
  if max_events then first = math.max(first, last - max_events + 1) end
  if ARGV[3] == '0' then first, size = trim(first, last, size, tonumber(f[9]), tonumber(f[10]), now) end
end
redis.call('HSET', KEYS[1], 'first', num(first), 'last', num(last), 'size', num(size), 'closed', ARGV[3],
  'updated', ARGV[2])
if ARGV[4] ~= '' then redis.call('HSET', KEYS[1], 'meta', ARGV[4]) end
redis.call('HSET', KEYS[4], ARGV[8], ARGV[9] .. ' ' .. num(last))
redis.call('EXPIRE', KEYS[4], ARGV[13])
local body = ''
if #ARGV[7] <= tonumber(ARGV[11]) then body = ARGV[6] .. ARGV[7] end
if events > 0 or ARGV[3] == '1' then
  redis.call('PUBLISH', ARGV[12], table.concat({num(from), num(last), ARGV[3], f[11], body}, ' '))
end
return {'ok', num(last), f[11]}
""",
    # facts, rows, sizes; now
    "trim": _TRIM
    + """
local f = redis.call('HMGET', KEYS[1], 'first', 'last', 'size', 'closed', 'kind', 'max_bytes', 'age_s', 'updated')
if not f[1] then return 'none' end
local age_s, now = tonumber(f[7]), tonumber(ARGV[1])
if f[4] == '1' then
  if not age_s then return 'never' end
  if tonumber(f[8]) + age_s <= now then return 'over' end
  return string.format('%.6f', tonumber(f[8]) + age_s)
end
if f[5] ~= 'topic' or not age_s then return 'never' end
local first, size = trim(tonumber(f[1]), tonumber(f[2]), tonumber(f[3]), tonumber(f[6]), age_s, now)
redis.call('HSET', KEYS[1], 'first', num(first), 'size', num(size))
local at = string.match(redis.call('LINDEX', KEYS[3], 0) or '', '(%S+)$')
return string.format('%.6f', (tonumber(at) or now) + age_s)
""",
    # all; channel
    "delete": """
local f = redis.call('HMGET', KEYS[1], 'owner', 'key', 'epochs')
if redis.call('DEL', unpack(KEYS)) == 0 then return {} end
redis.call('PUBLISH', ARGV[1], '0 0 2 - ')
return {f[1] or false, f[2] or false, f[3]}
""",
    # facts, rows; after, how many
    "read": """
local first = tonumber(redis.call('HGET', KEYS[1], 'first'))
if not first then return {} end
local from = math.max(tonumber(ARGV[1]) + 1, first)
return redis.call('XRANGE', KEYS[2], string.format('%.0f-0', from), '+', 'COUNT', ARGV[2])
""",
    # index: keys; key, stream, the stream that has it and is no more
    "claim": """
local there = redis.call('HGET', KEYS[1], ARGV[1])
if there and there ~= ARGV[3] then return there end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return false
""",
    # a hash, a field, the value that it must have
    "forget": """
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
return 0
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
        self._watchers = Watchers()
        #: Of each watched stream: up to where watchers were told; else where somebody looked first; else None.
        self._told: dict[str, int | None] = {}
        self._subscribed: dict[str, Signal] = {}
        self._queue: deque[_Append] = deque()
        self._queued_bytes = 0
        self._numbers = 0
        #: The top of runs that are written here (rule 4).
        self._tops: dict[str, int] = {}
        self._dirty: dict[str, None] = {}
        self._shas: dict[str, str] = {}
        self._running = False
        self.away = False
        self._back_at = 0.0

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
            self._redis: Any = Redis.from_pool(pool)
            self._listener: Any = Redis.from_url(self._url, **(options | {"socket_timeout": None}))
        except ValueError as error:
            raise LogError(f"the event log's Redis URL can't be used: {error}") from None
        self._wake, self._look, self._channels, self._called = Signal(), Signal(), Signal(), Signal()
        self._pubsub: Any = self._listener.pubsub()
        try:
            await self._start()
            self._back_at = current_time()
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
                await self._redis.delete(self._lease(self._process))
                await self._pubsub.aclose()  # type: ignore[no-untyped-call]
                await self._listener.aclose()
                await self._redis.aclose()
        if failure:
            raise failure

    async def _start(self) -> None:
        try:
            info = await self._load()
        except (RedisError, OSError) as error:
            raise LogError(f"the event log's Redis can't be used: {error}") from error
        version = info.get("redis_version", "0")
        if tuple(map(int, version.split(".")[:2])) < (7, 0):
            raise LogError(f"the event log needs Redis 7.0 or later; this is {version}")
        await self._pubsub.subscribe(self._call_channel(self._process))

    async def _load(self) -> dict[str, Any]:
        """The scripts, for the instance that answers now (rule 3)."""
        async with self._redis.client() as connection:  # one connection: one instance
            info: dict[str, Any] = await connection.info("server")
            head = f"local instance = '{info['run_id']}'\n"
            self._shas = {name: await connection.script_load(head + text) for name, text in _SCRIPTS.items()}
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
        return await self._patiently(lambda: self._create(stat))

    async def _create(self, stat: Stat) -> tuple[Stat, bool]:
        """The facts first, and then the index: what the index names is there (rule 7)."""
        stream, ((epoch, _),) = stat.stream, stat.epochs
        if stat.key is not None and (there := await self.find_key(stat.key)) is not None:
            return there, False
        if not await self._run("create", [stream], str(_UNCLAIMED_S), *_fields(stat, self._process)):
            there = await self._stat(stream)
            if there is None:
                return await self._create(stat)
            # Ours, where an earlier try was cut off before its end.
            if there.epochs[0][0] != epoch:
                return there, False
        if await self._redis.hsetnx(self._name("epochs"), epoch, stream) == 0:
            if await self._redis.hget(self._name("epochs"), epoch) != stream.encode():
                await self._run("delete", [stream], self._channel(stream))
                raise Conflict("this epoch has been opened before")
        if stat.key is not None and (there := await self._claim(stat.key, stream)) is not None:
            await self._run("delete", [stream], self._channel(stream))
            await self._run_index("forget", "epochs", epoch, stream)
            return there, False
        async with self._redis.pipeline(transaction=False) as pipe:
            if stat.kind == "run":
                order = await self._redis.incr(self._name("count"))
                pipe.zadd(self._name("open"), {stream: order})
                pipe.zadd(self._name(f"runs:{_owner(stat.owner)}"), {stream: order})
            elif stat.retention.age_s is not None:
                pipe.zadd(self._name("due"), {stream: stat.created + stat.retention.age_s})
            pipe.persist(self._keys(stream)[0])
            await pipe.execute()
        if stat.kind == "run":
            self._tops[stream] = 0
        return stat, True

    async def _claim(self, key: str, stream: str) -> Stat | None:
        """Give the key to the stream, or say who has it."""
        gone = ""
        while (named := await self._run_index("claim", "keys", key, stream, gone)) is not None:
            gone = named.decode()
            if (there := await self._stat(gone)) is not None:
                return None if gone == stream else there
        return None

    async def open(self, stream: str, epoch: str, *, retention: Retention | None = None) -> Stat:
        tried = False

        async def once() -> Stat:
            nonlocal tried
            again, tried = tried, True
            return await self._open(stream, epoch, retention, again=again)

        return await self._patiently(once)

    async def _open(
        self, stream: str, epoch: str, retention: Retention | None, *, writes: bool = True, again: bool = False
    ) -> Stat:
        stat = await self._stat(stream)
        if stat is None:
            raise NotFound("no such stream")
        if stat.closed:
            raise WriterFenced("the stream is closed")
        if not await self._redis.hsetnx(self._name("epochs"), epoch, stream) and not again:
            raise Conflict("this epoch has been opened before")
        if stat.epochs[-1][0] != epoch:  # else an earlier try, whose answer was lost
            keep = [encode_json(retention), *_limits(retention)] if retention is not None else ["", "", "", ""]
            most, holder = ssecore.log.MAX_EPOCHS, self._process if writes else ""
            said, *forgotten = await self._run("open", [stream], epoch, repr(self._clock()), holder, most, *keep)
            if said != b"ok":
                await self._run_index("forget", "epochs", epoch, stream)
                raise NotFound("no such stream") if said == b"none" else WriterFenced("the stream is closed")
            if forgotten:
                await self._redis.hdel(self._name("epochs"), *forgotten)
            if retention is not None and retention.age_s is not None and stat.kind == "topic":
                await self._redis.zadd(self._name("due"), {stream: 0})
        stat = await self._stat(stream)
        if stat is None:
            raise NotFound("no such stream")
        if writes and stat.kind == "run":
            self._tops[stream] = stat.last
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
            entries = await self._run("read", [stream], rows[-1].last if rows else after, _READ_ROWS)
            for id, (_, epoch, _, packed, _, body) in entries:
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
            self._told[stream] = stat.last
        return stat

    async def find(self, epoch: str) -> Stat | None:
        async def find() -> Stat | None:
            named = await self._redis.hget(self._name("epochs"), epoch)
            stat = await self._stat(named.decode()) if named is not None else None
            return stat if stat is not None and epoch in dict(stat.epochs) else None

        return await self._patiently(find)

    async def find_key(self, key: str) -> Stat | None:
        async def find() -> Stat | None:
            named = await self._redis.hget(self._name("keys"), key)
            stat = await self._stat(named.decode()) if named is not None else None
            return stat if stat is not None and stat.key == key else None

        return await self._patiently(find)

    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        async def runs() -> list[Stat]:
            names = await self._redis.zrevrange(self._name(f"runs:{_owner(owner)}"), 0, limit - 1)
            return await self._stats(names)

        return await self._patiently(runs)

    async def unfinished(self) -> list[Stat]:
        """Those whose holder's lease has run out (rule 6)."""
        if current_time() - self._back_at < self._lease_s:
            return []
        return await self._patiently(self._unfinished)

    async def _unfinished(self) -> list[Stat]:
        names = await self._redis.zrange(self._name("open"), 0, -1)
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hmget(self._keys(name.decode())[0], "holder", "closed")
            facts = dict(zip(names, await pipe.execute() if names else [], strict=True))
            holders = list({holder for holder, _ in facts.values() if holder is not None})
            for holder in holders:
                pipe.exists(self._lease(holder.decode()))
            alive = {
                holder for holder, there in zip(holders, await pipe.execute() if holders else [], strict=True) if there
            }
        for name, (_, closed) in facts.items():
            if closed != b"0":  # whoever closed or deleted it was cut off
                await self._closed(name.decode())
        left = [name for name, (holder, closed) in facts.items() if closed == b"0" and holder not in alive]
        return await self._stats(left)

    async def call(self, stream: str, word: str) -> None:
        holder = await self._patiently(lambda: self._redis.hget(self._keys(stream)[0], "holder"))
        if holder is None:
            raise NotFound("no such stream")
        calls = self._name(f"calls:{holder.decode()}")

        async def send() -> None:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.rpush(calls, f"{word} {stream}")
                pipe.expire(calls, _REMEMBER_S)
                pipe.publish(self._call_channel(holder.decode()), "")
                await pipe.execute()

        await self._patiently(send)

    async def _answer_calls(self) -> None:
        while calls := await self._redis.lpop(self._name(f"calls:{self._process}"), 100):
            for said in calls:
                word, _, stream = said.decode().partition(" ")
                if self.on_call is not None:
                    self.on_call(stream, word)

    async def touch(self, stream: str, for_s: float) -> None:
        await self._patiently(lambda: self._redis.set(self._keys(stream)[4], "", px=max(1, int(for_s * 1000))))

    async def touched(self, stream: str) -> bool:
        return bool(await self._patiently(lambda: self._redis.exists(self._keys(stream)[4])))

    async def _hold(self) -> None:
        """Keeps the lease, and answers calls that were missed."""
        while True:
            try:
                await self._redis.set(self._lease(self._process), "", px=int(self._lease_s * 1000))
                await self._answer_calls()
                self._is_back()
            except (RedisError, OSError) as error:
                self._is_away(error)
            with anyio.move_on_after(self._lease_s / 3):
                await self._called.wait()
            self._called = Signal()

    async def delete(self, stream: str) -> None:
        await self._patiently(lambda: self._delete(stream))

    async def _delete(self, stream: str) -> None:
        facts = await self._run("delete", [stream], self._channel(stream))
        if not facts:
            return
        owner, key, epochs = facts
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in ("open", "due", f"runs:{_owner(None if owner is None else owner.decode())}"):
                pipe.zrem(self._name(name), stream)
            pipe.hdel(self._name("epochs"), *[pair.partition(b":")[0] for pair in epochs.split()])
            await pipe.execute()
        if key is not None:
            await self._run_index("forget", "keys", key, stream)
        self._tops.pop(stream, None)
        self._announce(stream, None, "deleted")

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
            now = self._clock()
            names = await self._redis.zrangebyscore(self._name("due"), "-inf", now, start=0, num=_STEP_STREAMS)
            for name in names:
                stream = name.decode()
                said = (await self._run("trim", [stream], repr(now))).decode()
                if said == "over":
                    await self._delete(stream)
                elif said in ("none", "never"):
                    await self._redis.zrem(self._name("due"), stream)
                else:
                    await self._redis.zadd(self._name("due"), {stream: float(said)})
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
            except (RedisConnectionError, RedisTimeoutError, OSError) as error:
                self._is_away(error)
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
                values = (head.epoch, now, int(batch.closes), meta, len(ends), _packed(ends), body)
                least = self._tops.get(head.stream, 0)
                keys = self._keys(head.stream)
                more = (self._process, batch.number, least, _MAX_ROW_BYTES, self._channel(head.stream), _REMEMBER_S)
                pipe.evalsha(self._shas["append"], len(keys), *keys, *values, *more)
            answers = await pipe.execute(raise_on_error=False)
        again = []
        for batch, answer in zip(batches, answers, strict=True):
            if isinstance(answer, NoScriptError):
                again.append(batch)
            elif isinstance(answer, Exception):
                if not isinstance(answer, ResponseError):
                    raise answer
                self._settle(batch, _away(str(answer)))
            elif answer[0] == b"instance":
                with suppress(NotFound, WriterFenced):
                    await self._open(batch.head.stream, new_epoch(), None, writes=False)
                again.append(batch)
            else:
                await self._answered(batch, answer)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            await self._load()
        return again

    async def _answered(self, batch: _Batch, answer: list[bytes]) -> None:
        said, stream = answer[0], batch.head.stream
        if said == b"ok":
            last, (body, ends) = int(answer[1]), batch.row()
            if batch.closes:
                self._tops.pop(stream, None)
                await self._closed(stream)
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
        }
        self._settle(batch, refusals[said])

    def _settle(self, batch: _Batch, error: SSEAppError | None, last: int = 0) -> None:
        self._queued_bytes -= batch.size
        if error is None:
            batch.settle(last)
        else:
            batch.fail(error)

    async def _closed(self, stream: str) -> None:
        """Into the index: it is open no more, and due at its age."""
        stat = await self._stat(stream)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrem(self._name("open"), stream)
            if stat is not None and stat.retention.age_s is not None:
                pipe.zadd(self._name("due"), {stream: stat.updated + stat.retention.age_s})
            await pipe.execute()

    # What is heard of other processes

    def _announce(self, stream: str, row: Row | None, ended: Ended | None) -> None:
        """Tell the watchers, in sequence and once; what leaves a hole is read from the log instead (rule 5)."""
        if stream not in self._told:
            return
        told = self._told[stream]
        if row is not None and told is not None:
            if row.first > told + 1:
                self._suspect(stream)
                return
            if row.last <= told:
                row = None
        if row is not None:
            self._told[stream] = row.last
        if row is not None or ended is not None:
            self._watchers.notify(stream, row, ended)
        if ended is not None and not self._watchers.watched(stream):
            self._forget(stream)

    def _suspect(self, stream: str) -> None:
        self._dirty[stream] = None
        self._look.set()

    def _forget(self, stream: str) -> None:
        if self._told.pop(stream, 0) != 0 or stream in self._subscribed:
            self._subscribed.pop(stream, Signal()).set()
            self._channels.set()

    async def _watching(self, stream: str) -> None:
        """Whoever watches first and then looks misses nothing: the look waits for the subscription."""
        if (subscribed := self._subscribed.get(stream)) is not None and not subscribed.is_set():
            with anyio.move_on_after(self._wait_s):
                await subscribed.wait()
                return
            raise _away("Redis can't be reached")

    async def _subscribe(self) -> None:
        """Keeps the channels that are subscribed to those that are watched.

        One that is watched anew is subscribed anew, even if it still was: somebody waits for the answer.
        """
        there: dict[str, Signal] = {}
        while True:
            await self._channels.wait()
            self._channels = Signal()
            wanted = dict(self._subscribed)
            try:
                if new := [stream for stream, asked in wanted.items() if there.get(stream) is not asked]:
                    await self._pubsub.subscribe(*map(self._channel, new))
                if old := there.keys() - wanted.keys():
                    await self._pubsub.unsubscribe(*map(self._channel, old))
                there = wanted
            except (RedisError, OSError) as error:
                self._is_away(error)
                await anyio.sleep(0.1)
                self._channels.set()

    async def _listen(self) -> None:
        prefix = self._channel("").encode()
        while True:
            try:
                message = await self._pubsub.get_message(timeout=None)
            except (RedisError, OSError) as error:
                self._is_away(error)
                await anyio.sleep(0.1)
                continue
            if message is None:
                continue
            if not message["channel"].startswith(prefix):
                self._called.set()
                continue
            stream = message["channel"][len(prefix) :].decode()
            if message["type"] == "subscribe":
                subscribed = self._subscribed.get(stream)
                if subscribed is not None and subscribed.is_set():
                    self._suspect(stream)  # connected anew: what was published meanwhile is lost
                elif subscribed is not None:
                    subscribed.set()
            elif message["type"] == "message":
                self._heard(stream, message["data"])

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
                streams = list(self._dirty) or await self._behind()
                for stream in streams:
                    await self._read_on(stream)
                    self._dirty.pop(stream, None)
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
                if last is None or closed == b"1" or int(last) != self._told.get(stream):
                    behind.append(stream)
        return behind

    async def _read_on(self, stream: str) -> None:
        while (told := self._told.get(stream)) is not None:
            stat = await self._patiently(lambda: self._stat(stream))
            if stat is None:
                self._announce(stream, None, "deleted")
                return
            rows = await self._patiently(lambda after=told: self._read(stream, after, _MAX_ROW_BYTES))  # type: ignore[misc]
            for row in rows:
                if self._told.get(stream) == told or row.first == (self._told.get(stream) or 0) + 1:
                    self._told[stream] = row.first - 1  # what was trimmed meanwhile nobody can be told
                self._announce(stream, row, None)
            if not rows:
                if stat.closed:
                    self._announce(stream, None, "closed")
                elif stat.last < told:  # another instance, which has less: its next numbers are new ones
                    self._told[stream] = stat.last
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
            except (RedisConnectionError, RedisTimeoutError, OSError) as error:
                self._is_away(error)
                if until is not None and current_time() + pause > until:
                    raise _away("Redis can't be reached") from None
                await anyio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, 1.0)
            except RedisError as error:
                raise _away(str(error)) from error

    async def _run(self, script: str, streams: list[str], *values: object) -> Any:
        keys = [key for stream in streams for key in self._keys(stream)]
        return await self._redis.evalsha(self._shas[script], len(keys), *keys, *values)

    async def _run_index(self, script: str, name: str, *values: object) -> Any:
        return await self._redis.evalsha(self._shas[script], 1, self._name(name), *values)

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
        tag = f"{self._prefix}:{{{stream}}}"
        return [f"{tag}:facts", f"{tag}:rows", f"{tag}:sizes", f"{tag}:processes", f"{tag}:touched"]

    def _name(self, name: str) -> str:
        return f"{self._prefix}:{{index}}:{name}"

    def _lease(self, process: str) -> str:
        return self._name(f"lease:{process}")

    def _call_channel(self, process: str) -> str:
        return f"{self._prefix}:called:{process}"

    def _channel(self, stream: str) -> str:
        return f"{self._prefix}:appended:{stream}"

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


def _owner(owner: str | None) -> str:
    return "" if owner is None else f"={owner}"


def _packed(ends: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(ends)}I", *ends)


def _unpacked(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def _away(reason: str) -> LogUnavailable:
    headers = {"Retry-After": str(_RETRY_AFTER_S)}
    return LogUnavailable(f"the event log can't be used at the moment: {reason}", headers=headers)
