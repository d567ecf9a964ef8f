"""The event log in one SQLite file, for one process: what a finished call says is there after a SIGKILL.

In WAL mode with `synchronous=NORMAL`; a lost power supply may take the last moments, which their readers are told
(`diverged`). `full_sync=True` syncs each commit, and withstands that too.

Theory of operation. One task, the writer, takes every operation that has gathered while its last transaction was under
way and commits them in one, in a worker thread; each caller goes on after the commit:

    callers      append, create, open, delete ──► queue ──┐ all of it (4 MiB)
    writer       ──► thread: BEGIN, each operation, rows and facts, COMMIT ──► facts, watchers, callers ──► …
    readers      read, stat, … ──► thread: one SELECT on one of a few connections

1.  Appends that meet in a transaction go in as one row (64 KiB), if they are of one stream and epoch.
2.  An operation is refused before it has changed anything, so a refusal fails nobody else. An error of SQLite fails
    every operation of the transaction with `LogUnavailable`; nothing of it is kept, and the next one tries anew.
3.  `_known`, the facts of the streams in use, changes only on the loop, after a commit, and the thread that reads it
    works only while the writer task waits for it. What a transaction changes are copies.
4.  A reader's transaction is one SELECT: none holds the WAL back, and each sees every commit before it.
5.  Nothing takes longer because of how much is to be deleted: a deleted stream's rows are `garbage` first, and the
    upkeep takes a bounded step in a transaction of its own, as often as there is something to do. For `max_bytes` the
    pages in use count, garbage too; so it is taken away before anything more is deleted for the sake of room.
6.  A file that isn't ours is never written to; the application id stands in its first bytes from the first commit on.
7.  Before each transaction the writer checks that the file and its WAL are the ones that it opened: SQLite would go on
    writing to a deleted file. After a failure the log is `away` until a transaction has written to the file; the upkeep
    tries that from time to time.
"""

import logging
import os
import sqlite3
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import anyio
import msgspec
import orjson
from anyio import CancelScope, CapacityLimiter, current_time
from anyio import Event as Signal
from anyio.to_thread import run_sync
from msgspec.structs import replace

import ssecore.log
from ssecore.errors import Conflict, LogError, LogUnavailable, NotFound, SSEAppError
from ssecore.filelock import try_lock
from ssecore.log import (
    MAX_ROW_BYTES,
    OWNERS,
    Alone,
    Ended,
    Kind,
    Retention,
    Row,
    Stat,
    Watcher,
    Watchers,
    appended,
    cost,
    deleted_at,
    due,
    full,
    joined,
    legible,
    opened,
    outlived,
    over,
    packed,
    plain,
    share_full,
    unpacked,
)
from ssecore.wire import encode_json
from ssecore.workers import SEVERAL

__all__ = ["SqliteLog"]

logger = logging.getLogger("sseapp")
T = TypeVar("T")
#: Device and inode of the file and of its WAL; `None`: not there.
_Files = tuple[tuple[int, int] | None, tuple[int, int] | None]

_APPLICATION_ID: Final = int.from_bytes(b"SSEL")
#: Script number n makes version n + 1 of the file out of version n.
_MIGRATIONS: Final = (
    # Ids of streams are never used again: `garbage` names them. `due` is when the upkeep has to look at it.
    """
    CREATE TABLE streams (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, kind TEXT NOT NULL,
        created REAL NOT NULL, updated REAL NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
        size INTEGER NOT NULL, closed INTEGER NOT NULL, owner TEXT, meta TEXT NOT NULL, key TEXT UNIQUE,
        retention TEXT NOT NULL, due REAL);
    CREATE INDEX streams_due ON streams (due) WHERE due IS NOT NULL;
    CREATE INDEX streams_runs ON streams (owner) WHERE kind = 'run';
    CREATE INDEX streams_unfinished ON streams (id) WHERE kind = 'run' AND closed = 0;
    CREATE TABLE epochs (
        id INTEGER PRIMARY KEY, epoch TEXT NOT NULL UNIQUE, stream INTEGER NOT NULL, first INTEGER NOT NULL);
    CREATE INDEX epochs_stream ON epochs (stream);
    CREATE TABLE rows (
        stream INTEGER NOT NULL, last INTEGER NOT NULL, epoch INTEGER NOT NULL, at REAL NOT NULL,
        ends BLOB NOT NULL, body BLOB NOT NULL);
    CREATE UNIQUE INDEX rows_last ON rows (stream, last);
    CREATE TABLE garbage (stream INTEGER PRIMARY KEY);
    """,
    # What owners use, as `cost` says. Topics without events were kept for ever: the upkeep looks at them once.
    """
    UPDATE streams SET due = 0 WHERE kind = 'topic' AND closed = 0 AND due IS NULL;
    CREATE TABLE accounts (owner TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO accounts SELECT owner, sum(6144 + size + 64 * (last - first + 1))
        FROM streams WHERE owner IS NOT NULL GROUP BY owner;
    """,
)

#: Bodies in one transaction: about 10 ms of work, which a small append may have to wait for.
_MAX_TRANSACTION_BYTES: Final = 4 * 1024 * 1024
#: Connections, and threads, for reading. Most of the work holds the interpreter's lock; a few hide the disk's latency.
_READERS: Final = 4
#: Streams whose facts are kept in memory, about 1 KB each.
_MAX_KNOWN: Final = 10_000
#: One step of upkeep, and of trimming at an append: rows, streams, pages. Each is some milliseconds,
#: and commits up to 20 ms where the rows are large.
_STEP_ROWS: Final = 32
_STEP_STREAMS: Final = 64
_STEP_PAGES: Final = 256
#: SQLite takes the WAL into the file after so many pages, 2 MiB. (Its own 4 MiB would be half of a small log.)
_CHECKPOINT_PAGES: Final = 512
#: Readers can keep the WAL from starting over. Beyond this it is made to.
_MAX_WAL_BYTES: Final = 16 * 1024 * 1024
#: What the upkeep writes after a failure, to find out whether there is room again: a row of a stream that never exists.
_PROBE_STREAM: Final = 0
_PROBE_BYTES: Final = 64 * 1024
#: How long SQLite waits while another program (a backup, a person with `sqlite3`) locks the file. As long as the Redis
#: log waits for Redis.
_BUSY_S: Final = 5.0
_LOCK_POLL_S: Final = 0.05

_SELECT: Final = """
    SELECT id, due, (SELECT max(id) FROM epochs WHERE stream = streams.id), name, kind,
        (SELECT json_group_array(json_array(epoch, first))
         FROM (SELECT epoch, first FROM epochs WHERE stream = streams.id ORDER BY id)),
        created, updated, first, last, size, closed, owner, meta, key, retention
    FROM streams """
_INSERT: Final = """
    INSERT INTO streams (name, kind, owner, key, created, due, updated, first, last, size, closed, meta, retention)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_UPDATE: Final = """
    UPDATE streams SET updated = ?, first = ?, last = ?, size = ?, closed = ?, meta = ?, retention = ?, due = ?
    WHERE id = ?"""
_CHARGE: Final = """
    INSERT INTO accounts VALUES (?, ?) ON CONFLICT (owner) DO UPDATE SET bytes = bytes + excluded.bytes"""
_SELECT_ROWS: Final = """
    SELECT epochs.epoch, rows.last, rows.ends, rows.body
    FROM streams CROSS JOIN rows ON rows.stream = streams.id CROSS JOIN epochs ON epochs.id = rows.epoch
    WHERE streams.name = ? AND rows.last > max(?, streams.first - 1) ORDER BY rows.last"""


class _Operation(Generic[T]):
    """What a caller waits for: it is applied in the writer's thread, and `done` set on the loop."""

    def __init__(self, apply: Callable[["_Transaction"], T], size: int = 0) -> None:
        self.apply = apply
        self.size = size
        self.done = Signal()
        self.result: T
        self.error: SSEAppError | None = None


class _Entry:
    """A stream's facts, as the file has them, and in a transaction the row that is being gathered."""

    __slots__ = ("changed", "cost", "due", "ends", "epoch", "id", "parts", "size", "stat")

    def __init__(self, stat: Stat, id: int, due: float | None, epoch: int) -> None:
        self.stat = stat
        self.id = id
        self.due = due
        self.epoch = epoch  # the id of the newest
        self.cost = 0 if stat.owner is None else cost(stat)  # as it is in the owner's account
        self.parts: list[bytes] = []
        self.ends: list[int] = []
        self.size = 0
        self.changed = False


class SqliteLog(Alone):
    """`Log` in the file `path`, whose folder is made if need be.

    `full_sync`: see above. `lock_wait_s`: how long to wait for another process to let go of the file. `clock` gives
    Unix time; `upkeep_s` is the pause between two looks at what age has ended; `max_bytes` is a bound in all (rule 7 of
    `ssecore.log`).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        full_sync: bool = False,
        lock_wait_s: float = 0.0,
        clock: Callable[[], float] = time.time,
        upkeep_s: float = 5.0,
        max_bytes: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._full_sync = full_sync
        self._lock_wait_s = lock_wait_s
        self._clock = clock
        self._upkeep_s = upkeep_s
        self._max_bytes = sys.maxsize if max_bytes is None else max_bytes
        self._watchers = Watchers()
        self._queue: deque[_Operation[Any]] = deque()
        self._known: dict[str, _Entry] = {}  # rule 3; the longest unused first
        self._idle: list[sqlite3.Connection] = []  # readers
        self._writer: sqlite3.Connection | None = None
        self._running = False
        self.away = False
        self._crowded = False  # over `max_bytes`
        self._files: _Files = (None, None)
        self._committing: list[_Operation[Any]] = []
        self._stuck = False  # `give_up` was called, and the transaction of that moment isn't over yet

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        failure = None
        lock = await self._lock()
        self._wake = Signal()
        self._writing, self._reading = CapacityLimiter(1), CapacityLimiter(_READERS)
        try:
            self._writer = await run_sync(self._open_file)
            self._files, self.away = self._present(), False
            async with anyio.create_task_group() as group:
                group.start_soon(self._write)
                self._running = True
                try:
                    yield
                except Exception as error:  # raised below: the task group would wrap it
                    failure = error
                finally:
                    self._running = False
                    self._wake.set()
        finally:
            with CancelScope(shield=True):
                for _ in range(_READERS):  # whoever is still reading
                    await self._reading.acquire_on_behalf_of(object())
                await run_sync(self._close)
                os.close(lock)
        if failure:
            raise failure

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
        return await self._submit(lambda turn: turn.create(stat))

    async def open(self, stream: str, epoch: str, *, retention: Retention | None = None) -> Stat:
        return await self._submit(lambda turn: turn.open(stream, epoch, retention))

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
        facts = plain(meta)
        return await self._submit(lambda turn: turn.append(stream, body, ends, epoch, close, facts), len(body))

    async def delete(self, stream: str, *, unless_told: bool = False) -> bool:
        await self._submit(lambda turn: turn.delete(stream))
        return True

    async def upkeep(self) -> None:
        while await self._submit(_Transaction.upkeep):
            pass

    async def read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        return await self._query(lambda db: _read(db, stream, after, max_bytes))

    async def stat(self, stream: str) -> Stat | None:
        if entry := self._known.get(stream):
            return entry.stat
        return await self._one("WHERE name = ?", stream)

    async def find(self, epoch: str) -> Stat | None:
        return await self._one("WHERE id = (SELECT stream FROM epochs WHERE epoch = ?)", epoch)

    async def find_key(self, key: str) -> Stat | None:
        return await self._one("WHERE key = ?", key)

    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        return await self._all("WHERE kind = 'run' AND owner IS ? ORDER BY id DESC LIMIT ?", owner, limit)

    async def unfinished(self) -> list[Stat]:
        return await self._all("WHERE kind = 'run' AND closed = 0 ORDER BY id")

    def watch(self, stream: str, watcher: Watcher) -> Callable[[], None]:
        return self._watchers.add(stream, watcher)

    # The writer

    async def _submit(self, apply: Callable[["_Transaction"], T], size: int = 0) -> T:
        if not self._running or self._stuck:
            raise LogUnavailable("the event log is closed" if not self._running else "the service is about to stop")
        operation = _Operation(apply, size)
        self._queue.append(operation)
        self._wake.set()
        await operation.done.wait()
        if operation.error:
            raise operation.error
        return operation.result

    def give_up(self) -> None:
        """Another program may hold the file's lock: a transaction waits for it, and all others for the transaction."""
        for operation in (*self._committing, *self._queue):
            operation.error = LogUnavailable("the service is about to stop")
            operation.done.set()
        self._queue.clear()
        self._stuck = bool(self._committing)

    async def _write(self) -> None:
        """The writer's task. It ends when `running` is left and nothing is queued any more, and not before."""
        due = current_time() + self._upkeep_s
        with CancelScope(shield=True):
            while self._running or self._queue:
                if not self._queue:
                    with anyio.move_on_after(max(0.0, due - current_time())):
                        await self._wake.wait()
                self._wake = Signal()
                if operations := self._take():
                    await self._commit(operations)
                if self._running and (self._crowded or current_time() >= due):
                    self._crowded = False
                    if self.away:
                        await self._commit([_Operation(_Transaction.probe)])
                    step = _Operation(_Transaction.upkeep)
                    await self._commit([step])
                    due = current_time() + (0.0 if not step.error and step.result else self._upkeep_s)

    def _take(self) -> list[_Operation[Any]]:
        operations = []
        size = 0
        while self._queue and size < _MAX_TRANSACTION_BYTES:
            operations.append(self._queue.popleft())
            size += operations[-1].size
        return operations

    async def _commit(self, operations: list[_Operation[Any]]) -> None:
        self._committing = operations
        try:
            transaction = await run_sync(self._transact, operations, limiter=self._writing)
        except Exception as error:  # SQLite's, or a bug of ours: nobody waits for ever, and the next one may work
            if not self.away:
                why = None if isinstance(error, _Replaced) else error
                logger.error("can't write the event log %s%s", self.path, error if why is None else "", exc_info=why)
            self.away = True
            for operation in operations:
                operation.error = _failure("written", error)
        else:
            if self.away and transaction.wrote:
                logger.warning("the event log %s is written again", self.path)
                self.away = False
            self._crowded = transaction.crowded
            for stream, entry in transaction.entries.items():
                self._known.pop(stream, None)
                if entry:
                    self._known[stream] = entry
            while len(self._known) > _MAX_KNOWN:
                del self._known[next(iter(self._known))]
            for notice in transaction.notices:
                self._watchers.notify(*notice)
        for operation in operations:
            operation.done.set()
        self._committing, self._stuck = [], False

    def _transact(self, operations: list[_Operation[Any]]) -> "_Transaction":
        """In the thread. Each operation has its result or its refusal then."""
        try:
            file, wal = self._present()
            if file != self._files[0] or (self._writer and wal != self._files[1]):
                raise _Replaced
            reopened = self._writer is None
            self._writer = self._writer or self._connect()
            self._writer.execute("BEGIN IMMEDIATE")
            if reopened:
                self._files = self._present()
            changes = self._writer.total_changes
            transaction = _Transaction(self._writer, self._known, self._clock(), self._max_bytes)
            for operation in operations:
                try:
                    operation.result = operation.apply(transaction)
                except SSEAppError as refusal:
                    operation.error = refusal
            transaction.finish()
            transaction.wrote = self._writer.total_changes > changes
            self._writer.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise
        self._bound_wal()
        return transaction

    def _present(self) -> "_Files":
        """The file and the WAL that are there by these names now."""
        return _inode(self.path), _inode(f"{self.path}-wal")

    def _roll_back(self) -> None:
        db = self._writer
        if db and db.in_transaction:
            try:
                db.execute("ROLLBACK")
            except sqlite3.Error:
                self._writer = None  # the next transaction opens another
                db.close()

    def _bound_wal(self) -> None:
        try:
            if self._writer and os.path.getsize(f"{self.path}-wal") > _MAX_WAL_BYTES:
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except (OSError, sqlite3.Error) as error:
            logger.warning("the WAL of %s can't be taken into the file: %s", self.path, error)

    # The readers

    async def _one(self, where: str, *values: object) -> Stat | None:
        found = await self._all(where, *values)
        return found[0] if found else None

    async def _all(self, where: str, *values: object) -> list[Stat]:
        return await self._query(lambda db: legible(lambda row: _entry(row).stat, db.execute(_SELECT + where, values)))

    async def _query(self, select: Callable[[sqlite3.Connection], T]) -> T:
        if not self._running:
            raise LogUnavailable("the event log is closed")
        return await run_sync(self._select, select, limiter=self._reading)

    def _select(self, select: Callable[[sqlite3.Connection], T]) -> T:
        db = None
        try:
            try:
                db = self._idle.pop()
            except IndexError:
                db = self._connect(query_only=True)
            return select(db)
        except sqlite3.Error as error:
            logger.error("the event log %s can't be read", self.path, exc_info=error)
            raise _failure("read", error) from error
        finally:
            if db:
                self._idle.append(db)

    # The file

    def _connect(self, *, query_only: bool = False) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute(f"PRAGMA synchronous = {'FULL' if self._full_sync else 'NORMAL'}")
            db.execute(f"PRAGMA journal_size_limit = {_MAX_WAL_BYTES // 2}")
            db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            db.execute(f"PRAGMA query_only = {query_only}")
        except BaseException:
            db.close()
            raise
        return db

    def _open_file(self) -> sqlite3.Connection:
        self._refuse_foreign()
        db = None
        try:
            db = self._connect()
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(_MIGRATIONS):
                raise LogError(
                    f"the event log {self.path} has version {version}, and this program knows up to"
                    f" {len(_MIGRATIONS)}: start the newer program, or name another data folder"
                )
            if version == 0:
                db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table, or never
            for number, script in enumerate(_MIGRATIONS[version:], version + 1):
                mark = f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {number}"
                db.executescript(f"BEGIN; {script}; {mark}; COMMIT")
            db.execute("PRAGMA journal_mode = WAL")  # after the first commit: rule 6
            db.execute("BEGIN IMMEDIATE")  # fails where the file can't be written
            for table in ("streams", "epochs", "rows", "garbage"):
                db.execute(f"SELECT * FROM {table} ORDER BY rowid DESC LIMIT 1").fetchall()
            db.execute("ROLLBACK")
        except BaseException as error:
            text = _complaint(db, error)
            if db:
                db.close()
            if isinstance(error, sqlite3.Error):
                raise LogError(f"the event log {self.path} {text}") from error
            raise
        return db

    def _refuse_foreign(self) -> None:
        """Looks at the file's first bytes only: SQLite itself may change what it opens (rule 6)."""
        try:
            with self.path.open("rb") as file:
                header = file.read(100)
        except FileNotFoundError:
            return
        except OSError as error:
            raise LogError(f"the event log {self.path} can't be read: {error.strerror}") from error
        if header and header[:16] != b"SQLite format 3\0":
            raise LogError(f"{self.path} is not a SQLite file: move it away, or name another data folder")
        if header and int.from_bytes(header[68:72]) != _APPLICATION_ID:
            raise LogError(f"{self.path} is another program's database: move it away, or name another data folder")

    async def _lock(self) -> int:
        """The lock file's descriptor. The lock is the kernel's: it goes with the process, whatever ends it."""
        until = current_time() + self._lock_wait_s
        while True:
            lock, holder = await run_sync(self._try_lock)
            if lock is not None:
                return lock
            if current_time() >= until:
                raise LogError(
                    f"the event log {self.path} is in use by {holder}: stop it, or name another data folder. "
                    f"If the two are workers of one server: {SEVERAL}"
                )
            await anyio.sleep(_LOCK_POLL_S)

    def _try_lock(self) -> tuple[int | None, str]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise LogError(f"the folder of the event log {self.path} can't be written: {error.strerror}") from error
        if not try_lock(lock):
            pid = os.read(lock, 20).strip().decode("ascii", "replace")
            os.close(lock)
            return None, f"process {pid}" if pid else "another process"
        with suppress(OSError):  # a full disk: it is only for people
            os.ftruncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())
        return lock, ""

    def _close(self) -> None:
        connections = [*self._idle, *filter(None, [self._writer])]  # the last one takes the WAL into the file
        self._idle, self._writer = [], None
        self._known.clear()
        for db in connections:
            try:
                db.close()
            except sqlite3.Error as error:
                logger.warning("the event log %s was not closed properly: %s", self.path, error)


class _Transaction:
    """What happens between BEGIN and COMMIT, in the writer's thread."""

    def __init__(self, db: sqlite3.Connection, known: dict[str, _Entry], now: float, max_bytes: int) -> None:
        self.db = db
        self.known = known
        self.now = now
        self.max_bytes = max_bytes
        self.wrote = False
        self.crowded = False
        #: How much more the owners use.
        self.charges: Counter[str] = Counter()
        #: The streams that it has to do with, as they will be; None: deleted.
        self.entries: dict[str, _Entry | None] = {}
        #: What watchers will be told.
        self.notices: list[tuple[str, Row | None, Ended | None]] = []

    def create(self, stat: Stat) -> tuple[Stat, bool]:
        same_key = self.db.execute("SELECT name FROM streams WHERE key = ?", (stat.key,)).fetchone()
        if there := self.look_up(same_key[0] if same_key else stat.stream):
            return there.stat, False
        if self.full:
            raise full()
        if stat.owner is not None:
            account = self.db.execute("SELECT bytes FROM accounts WHERE owner = ?", (stat.owner,)).fetchone()
            if account and over(account[0], self.max_bytes // OWNERS):
                raise share_full()
        ((epoch, first),) = stat.epochs
        self.check_new(epoch)
        at = deleted_at(stat)
        values = (stat.stream, stat.kind, stat.owner, stat.key, stat.created, at, *_changing(stat))
        id = self.insert(_INSERT, values)
        entry = self.entries[stat.stream] = _Entry(stat, id, at, self.insert_epoch(id, epoch, first))
        self.charge(entry, entry.cost)
        return stat, True

    def open(self, stream: str, epoch: str, retention: Retention | None) -> Stat:
        entry = self.entry(stream)
        stat = opened(entry.stat, epoch, retention, self.now)
        self.check_new(epoch)
        self.write_row(entry)
        if forgotten := len(entry.stat.epochs) + 1 - len(stat.epochs):
            oldest = "SELECT id FROM epochs WHERE stream = ? ORDER BY id LIMIT ?"
            self.db.execute(f"DELETE FROM epochs WHERE id IN ({oldest})", (entry.id, forgotten))
        entry.epoch = self.insert_epoch(entry.id, epoch, stat.last + 1)
        entry.stat, entry.changed = stat, True
        self.trim(entry)
        return entry.stat

    def append(
        self, stream: str, body: bytes, ends: tuple[int, ...], epoch: str, close: bool, meta: dict[str, Any] | None
    ) -> int:
        entry = self.entry(stream)
        if ends and not close and self.full:
            raise full()
        stat = appended(entry.stat, epoch, len(ends), len(body), close, meta, self.now)
        if entry.size + len(body) > MAX_ROW_BYTES:
            self.write_row(entry)
        if ends:
            entry.ends += [entry.size + end for end in ends] if entry.size else ends
            entry.parts.append(body)
            entry.size += len(body)
        entry.changed |= stat is not entry.stat
        entry.stat = stat
        if close:
            self.write_row(entry, "closed")
        return stat.last

    def delete(self, stream: str) -> None:
        entry = self.look_up(stream)
        if entry is None:
            return
        self.write_row(entry)
        self.db.execute("DELETE FROM streams WHERE id = ?", (entry.id,))
        self.db.execute("DELETE FROM epochs WHERE stream = ?", (entry.id,))
        self.db.execute("INSERT INTO garbage VALUES (?)", (entry.id,))  # rule 5
        self.charge(entry, -entry.cost)
        self.entries[stream] = None
        self.notices.append((stream, None, "deleted"))

    def upkeep(self) -> bool:
        """One step (rule 5). False where there was nothing to do."""
        overdue = self.db.execute(
            "SELECT name FROM streams WHERE due <= ? ORDER BY due LIMIT ?", (self.now, _STEP_STREAMS)
        ).fetchall()
        for (stream,) in overdue:
            entry = self.entry(stream)
            at = deleted_at(entry.stat)
            if at is not None and at <= self.now:
                self.delete(stream)
            else:
                entry.changed = True  # `finish` trims it
        garbage = self.db.execute("SELECT stream FROM garbage LIMIT ?", (_STEP_ROWS,)).fetchall()
        rows = _STEP_ROWS
        for stream in garbage:
            oldest = "SELECT rowid FROM rows WHERE stream = ? ORDER BY last LIMIT ?"
            gone = self.db.execute(f"DELETE FROM rows WHERE rowid IN ({oldest})", (*stream, rows))
            rows -= gone.rowcount
            if not rows:
                break
            self.db.execute("DELETE FROM garbage WHERE stream = ?", stream)
        return bool(overdue or garbage) or self.make_room() or self.give_back()

    def make_room(self) -> bool:
        """One step of what a bound asks for. False where there was nothing to do, or nothing can be done."""
        share = self.max_bytes // OWNERS
        account = self.db.execute("SELECT owner, bytes - ? FROM accounts WHERE bytes > ?", (share, share))
        for owner, excess in account.fetchall():
            oldest = "SELECT name FROM streams WHERE kind = 'run' AND owner = ? AND closed ORDER BY id LIMIT ?"
            if self.take(self.db.execute(oldest, (owner, _STEP_STREAMS)).fetchall(), excess):
                return True
        excess = self.used() - self.max_bytes
        if excess <= 0:
            return False
        spared = self.now + ssecore.log.EMPTY_TOPIC_S
        oldest = "SELECT name FROM streams WHERE due > ? ORDER BY due LIMIT ?"
        return self.take(self.db.execute(oldest, (spared, _STEP_STREAMS)).fetchall(), excess)

    def take(self, streams: list[tuple[str]], excess: int) -> bool:
        """Deletes these, or of topics the oldest rows, until so much is gone."""
        for (stream,) in streams:
            entry = self.entry(stream)
            before = cost(entry.stat)
            if entry.stat.closed:
                self.delete(stream)
                excess -= before
            else:
                self.trim(entry, forced=True)
                entry.changed = True
                excess -= before - cost(entry.stat)
            if excess <= 0:
                break
        return bool(streams)

    @cached_property
    def full(self) -> bool:
        """Whether nothing new is taken. Asked once for all of a transaction."""
        used = self.used()
        self.crowded = used > self.max_bytes
        return over(used, self.max_bytes)

    def used(self) -> int:
        """The bytes of the pages in use."""
        pages, free, size = (
            self.db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def charge(self, entry: _Entry, bytes: int) -> None:
        if entry.stat.owner is not None:
            self.charges[entry.stat.owner] += bytes

    def probe(self) -> None:
        """Write something that the upkeep deletes."""
        self.db.execute("INSERT OR IGNORE INTO garbage VALUES (?)", (_PROBE_STREAM,))
        row = (_PROBE_STREAM, self.now, _PROBE_BYTES)  # its number is the time: there may be one already
        self.db.execute(
            "INSERT INTO rows (stream, last, epoch, at, ends, body) VALUES (?, ?, 0, 0, x'', zeroblob(?))", row
        )

    def give_back(self) -> bool:
        """Free pages to the file system, once they are a quarter of the file; until then they are used again."""
        pages, free = (self.db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
        if free <= max(_STEP_PAGES, pages // 4):
            return False
        for _ in range(_STEP_PAGES):
            self.db.execute("PRAGMA incremental_vacuum(1)")  # of a greater number Python 3.11 would do one, too
        return True

    def finish(self) -> None:
        for entry in self.entries.values():
            if entry and entry.changed:
                self.write_row(entry)
                self.trim(entry)
                self.db.execute(_UPDATE, (*_changing(entry.stat), entry.due, entry.id))
                if entry.stat.owner is not None:
                    before, entry.cost = entry.cost, cost(entry.stat)
                    self.charge(entry, entry.cost - before)
        for owner, bytes in self.charges.items():
            self.db.execute(_CHARGE, (owner, bytes))
            if bytes < 0:
                self.db.execute("DELETE FROM accounts WHERE owner = ? AND bytes <= 0", (owner,))

    def trim(self, entry: _Entry, *, forced: bool = False) -> None:
        """Takes the oldest rows that have to go, or all (`forced`), at most a step; `due` says when to look again."""
        stat = entry.stat
        entry.due = deleted_at(stat)
        if stat.closed or stat.kind == "run":
            return
        oldest = "SELECT last, at, length(body) FROM rows WHERE stream = ? ORDER BY last LIMIT ?"
        gone = count = 0
        with closing(self.db.execute(oldest, (entry.id, _STEP_ROWS))) as rows:
            for last, at, size in rows:
                if not forced and not outlived(stat, last, at, self.now):
                    entry.due = due(stat, at)
                    break
                stat = replace(stat, first=max(stat.first, last + 1), size=stat.size - size)
                gone, count = last, count + 1
        if gone:
            self.db.execute("DELETE FROM rows WHERE stream = ? AND last <= ?", (entry.id, gone))
            if stat.first > stat.last:
                stat = replace(stat, updated=self.now)
                entry.due = deleted_at(stat)
            entry.stat = stat
        if count == _STEP_ROWS:
            entry.due = 0.0

    def entry(self, stream: str) -> _Entry:
        entry = self.look_up(stream)
        if entry is None:
            raise NotFound("no such stream")
        return entry

    def look_up(self, stream: str) -> _Entry | None:
        """A copy that may be changed. The file is asked only for a stream that isn't known."""
        if stream in self.entries:
            return self.entries[stream]
        if known := self.known.get(stream):
            entry = _Entry(known.stat, known.id, known.due, known.epoch)
        elif row := self.db.execute(_SELECT + "WHERE name = ?", (stream,)).fetchone():
            entry = _entry(row)
        else:
            return None
        self.entries[stream] = entry
        return entry

    def check_new(self, epoch: str) -> None:
        if self.db.execute("SELECT 1 FROM epochs WHERE epoch = ?", (epoch,)).fetchone():
            raise Conflict("this epoch has been opened before")

    def insert_epoch(self, stream: int, epoch: str, first: int) -> int:
        return self.insert("INSERT INTO epochs (epoch, stream, first) VALUES (?, ?, ?)", (epoch, stream, first))

    def insert(self, statement: str, values: tuple[object, ...]) -> int:
        id = self.db.execute(statement, values).lastrowid
        assert id is not None
        return id

    def write_row(self, entry: _Entry, ended: Ended | None = None) -> None:
        """What has been gathered, as one row (rule 1)."""
        row = None
        if entry.ends:
            last, ends = entry.stat.last, tuple(entry.ends)
            row = Row(entry.stat.epochs[-1][0], last - len(ends) + 1, b"".join(entry.parts), ends)
            self.db.execute(
                "INSERT INTO rows (stream, last, epoch, at, ends, body) VALUES (?, ?, ?, ?, ?, ?)",
                (entry.id, last, entry.epoch, self.now, packed(ends), row.body),
            )
            entry.parts, entry.ends, entry.size = [], [], 0
        if row or ended:
            self.notices.append((entry.stat.stream, row, ended))


def _read(db: sqlite3.Connection, stream: str, after: int, max_bytes: int) -> list[Row]:
    found: list[Row] = []
    size = 0
    with closing(db.execute(_SELECT_ROWS, (stream, after))) as rows:
        for epoch, last, blob, body in rows:
            ends = unpacked(blob)
            found.append(Row(epoch, last - len(ends) + 1, body, ends))
            size += len(body)
            if size >= max_bytes:
                break
    return found


def _entry(row: tuple[Any, ...]) -> _Entry:
    """From what `_SELECT` selects."""
    id, due, epoch, stream, kind, epochs, created, updated, first, last, size, closed, owner, meta, key, keep = row
    epochs = tuple((name, start) for name, start in orjson.loads(epochs))
    closed, meta, keep = bool(closed), orjson.loads(meta), msgspec.json.decode(keep, type=Retention)
    stat = Stat(stream, kind, epochs, created, updated, first, last, size, closed, owner, meta, key, keep)
    return _Entry(stat, id, due, epoch)


def _changing(stat: Stat) -> tuple[object, ...]:
    """The columns of a stream that change in its life, but for `due`."""
    meta, retention = encode_json(stat.meta).decode(), encode_json(stat.retention).decode()
    return stat.updated, stat.first, stat.last, stat.size, stat.closed, meta, retention


def _inode(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class _Replaced(Exception):
    """For the operator's log, behind the path."""

    def __str__(self) -> str:
        return (
            ": the file or its -wal was deleted or replaced while this process uses it, and what is appended would be"
            " lost. Stop the service, put the files back if you have them, and start it again"
        )


def _damaged(error: BaseException) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _failure(doing: str, error: Exception) -> SSEAppError:
    """For the client: SQLite's own words name no path, anything else might."""
    if _damaged(error):
        return LogError("the event log's file is damaged")
    reason = error if isinstance(error, sqlite3.Error) else "internal error"
    if isinstance(error, _Replaced):
        reason = "its file was deleted or replaced"
    text = f"the event log can't be {doing} at the moment: {reason}"
    return LogUnavailable(text)


def _complaint(db: sqlite3.Connection | None, error: BaseException) -> str:
    """For whoever starts the program."""
    if not _damaged(error):
        return f"can't be used: {error}"
    reason = str(error)
    if db:
        with suppress(sqlite3.Error):
            reason = db.execute("PRAGMA quick_check(1)").fetchone()[0].splitlines()[-1]
    return f"is damaged ({reason}): put a copy of it back, or move it away to begin a new one"
