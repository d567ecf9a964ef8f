"""The event log in one SQLite file, for one process. What a finished call stored survives a SIGKILL.

In WAL mode with `synchronous=NORMAL`: a power failure may lose the last moments; readers then get a `gap` (`diverged`).
`full_sync=True` syncs each commit, and survives that too. Small commits run on the event loop, others in a thread;
reads in other threads.

1.  An append to an open run writes no facts that its rows contain (`last`, `size`, `updated`): queries derive them
    until a close, `meta` or an epoch writes them. So it is one statement, without BEGIN and COMMIT.
2.  A refusal changes nothing and fails no other operation. An error of SQLite fails its whole transaction with
    `LogUnavailable`.
3.  `_known`, the facts of the streams in use, is changed after a commit. A transaction changes copies, and there is one
    at a time.
4.  A reader's transaction is one SELECT, so that it doesn't hold the WAL back.
5.  Upkeep deletes the rows of deleted streams (`garbage`) in steps, before it deletes more: `max_bytes` counts the
    pages in use.
6.  Another program's file is never written to. A new file is made under another name: by the log's name, each has the
    application id.
7.  Before each transaction the file and its WAL must be those that were opened: SQLite would go on with a deleted file.
    After a failure the log is `unavailable` until something was written; upkeep tries that.
8.  A small commit takes some 50 µs on the loop, and 150 by the thread, which does what may take long: all with
    `full_sync`, or while `unavailable`; more than `_LOOP_BYTES`; upkeep; checkpoints, and the transaction after one,
    which syncs the WAL's header; what failed on the loop, which doesn't wait for locks; and everything for
    `_SLOW_PAUSE` times as long as a commit of more than `_SLOW_S` took (a disk that hangs).
"""

import logging
import os
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from functools import cache
from math import inf
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

import anyio
import msgspec
import orjson
from anyio import CancelScope, CapacityLimiter, current_time
from anyio.lowlevel import current_token
from anyio.to_thread import run_sync

from ssecore.errors import LogError, LogUnavailable, SSEAppError
from ssecore.filelock import try_lock
from ssecore.log.facts import OWNERS, Retention, Row, Stat, cost, packed, refusal, unpacked
from ssecore.log.ledger import Entry, Ledger, LocalLog
from ssecore.log.writer import Batch
from ssecore.wire import encode_json
from ssecore.workers import SEVERAL

__all__ = ["SqliteLog"]

logger = logging.getLogger("sseapp")
T = TypeVar("T")
#: Device and inode.
_Files = tuple[tuple[int, int] | None, tuple[int, int] | None]

_APPLICATION_ID: Final = int.from_bytes(b"SSEL")
#: Script n migrates version n to n + 1.
_MIGRATIONS: Final = (
    # `garbage` needs ids that aren't reused.
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
    """
    UPDATE streams SET due = 0 WHERE kind = 'topic' AND closed = 0 AND due IS NULL;
    CREATE TABLE accounts (owner TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO accounts SELECT owner, sum(6144 + size + 64 * (last - first + 1))
        FROM streams WHERE owner IS NOT NULL GROUP BY owner;
    """,
    # From here on facts may lag behind rows (rule 1).
    "",
)

_MAX_ORDERS: Final = 100
_ROWS_AT_ONCE: Final = 32
#: Of a batch besides its body.
_BATCH_BYTES: Final = 1024
#: A run grows so much before its owner is charged.
_UNCHARGED_BYTES: Final = 64 * 1024
#: Threads: few, since reading mostly holds the interpreter's lock.
_READERS: Final = 4
#: Facts in memory, about 1 KB each.
_MAX_KNOWN: Final = 10_000
#: In a step of upkeep.
_STEP_ROWS: Final = 32
_STEP_PAGES: Final = 256
#: 2 MiB; a bounded log has an eighth at most. The end of a checkpoint holds appends up.
_CHECKPOINT_PAGES: Final = 512
_PAGE_BYTES: Final = 4096
#: Readers can keep the WAL from restarting.
_MAX_WAL_BYTES: Final = 16 * 1024 * 1024
_PROBE_STREAM: Final = 0
_PROBE_BYTES: Final = 64 * 1024
#: Rule 8. More than a run's full buffer.
_LOOP_BYTES: Final = 128 * 1024
_SLOW_S: Final = 0.005
_SLOW_PAUSE: Final = 100
_BUSY_S: Final = 5.0
_LOCK_POLL_S: Final = 0.05

_SELECT: Final = """
    SELECT id, due, (SELECT max(id) FROM epochs WHERE stream = streams.id), first, last, size, name, kind,
        (SELECT json_group_array(json_array(epoch, first))
         FROM (SELECT epoch, first FROM epochs WHERE stream = streams.id ORDER BY id)),
        created, max(updated, coalesce((SELECT at FROM rows WHERE stream = streams.id ORDER BY last DESC LIMIT 1), 0)),
        first, max(last, coalesce((SELECT max(last) FROM rows WHERE stream = streams.id), 0)),
        CASE WHEN kind = 'run' AND NOT closed
            THEN coalesce((SELECT sum(length(body)) FROM rows WHERE stream = streams.id), 0) ELSE size END,
        closed, owner, meta, key, retention
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


@dataclass(eq=False, slots=True)
class _Order(Generic[T]):
    """Work for the thread. `done` is called in the loop."""

    work: Callable[["_Transaction"], T]
    done: Callable[[Any], None]
    size: int = _BATCH_BYTES
    awaited: bool = False
    long: bool = False
    result: T = field(init=False)
    error: SSEAppError | None = None


class SqliteLog(LocalLog):
    """`Log` in the file `path`, whose folder is created if needed. `lock_wait_s`: for another process to release it."""

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
        super().__init__(clock, upkeep_s)
        self.path = Path(path)
        self._full_sync = full_sync
        self._lock_wait_s = lock_wait_s
        self.max_bytes = sys.maxsize if max_bytes is None else max_bytes
        self._orders: SimpleQueue[_Order[Any] | None] = SimpleQueue()
        self._in_flight: dict[_Order[Any], None] = {}
        self._known: dict[str, Entry] = {}  # rule 3; least recently used first
        self._idle: list[sqlite3.Connection] = []  # readers
        self.connection: sqlite3.Connection | None = None
        self._running = False
        self._stuck = False  # since `give_up`, until earlier orders are done
        self._busy_s = _BUSY_S  # the writer's
        self._wal_pages = 0  # written since the last checkpoint, roughly
        self._copied = False  # most of them
        self._pages_then = 0  # `_wal_pages` at the last upkeep
        self._gives_back = False  # the next checkpoint empties the WAL
        self._most_wal_pages = min(_CHECKPOINT_PAGES, self.max_bytes // 8 // _PAGE_BYTES)
        self._due_pages = self._most_wal_pages * 7 // 8
        self._syncs_header = True
        self._slow_until = 0.0
        self._files: _Files = (None, None)
        #: Bytes of the pages in use when counted, and written since.
        self.used, self.written = 0, -1

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        lock = await self._lock()
        self._reading = CapacityLimiter(_READERS)
        self._orders = SimpleQueue()
        token: Any = current_token().native_token
        self._call_soon = getattr(token, "call_soon_threadsafe", None) or token.run_sync_soon
        thread = threading.Thread(target=self._work, name="sseapp event log", daemon=True)
        try:
            self.connection = await run_sync(self._open_file)
            self._files, self.unavailable, self.written = self._present(), False, -1
            thread.start()
            self._running = True
            yield
        finally:
            self._running = False
            with CancelScope(shield=True):
                if thread.ident is not None:
                    self._orders.put(None)
                    await run_sync(thread.join)
                for _ in range(_READERS):
                    await self._reading.acquire_on_behalf_of(object())
                await run_sync(self._close)
                os.close(lock)

    # What callers ask for

    def _commit(self, batches: list[Batch], done: Callable[[], None]) -> None:
        def committed(order: _Order[None]) -> None:
            if order.error is not None:
                for batch in batches:
                    batch.error = order.error
            done()

        size = sum([batch.size + _BATCH_BYTES for batch in batches])
        self._put(_Order(lambda turn: turn.commit(batches), committed, size))

    async def _apply(self, work: Callable[[Ledger], T], *, long: bool = False) -> T:
        if not self._running or self._stuck:
            raise refusal("stopping" if self._running else "shut")
        signal = anyio.Event()
        order = _Order(work, lambda _: signal.set(), awaited=True, long=long)
        self._put(order)
        await signal.wait()
        if order.error:
            raise order.error
        return order.result

    def give_up(self) -> None:
        """The thread may wait for another program's lock."""
        for order in self._in_flight:
            if order.awaited:  # else `Commits` fails it
                order.awaited, order.error = False, refusal("stopping")
                order.done(order)
        self._stuck = bool(self._in_flight)
        super().give_up()

    async def _upkeep(self) -> bool:
        if self.unavailable:
            with suppress(SSEAppError):
                await self._apply(_Transaction.probe)  # type: ignore[arg-type]
        # If nothing was written since the last.
        self._gives_back, self._pages_then = 0 < self._wal_pages == self._pages_then, self._wal_pages
        return await super()._upkeep()

    async def read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        return await self._query(lambda db: _read(db, stream, after, max_bytes))

    async def _find(self, *, name: str | None = None, epoch: str | None = None, key: str | None = None) -> Stat | None:
        # A run's first epoch is its name.
        if (known := self._known.get(name or epoch or "")) and (name or known.stat.epochs[0][0] == epoch):
            return known.stat
        found = await self._all(*_where(name, epoch, key))
        return found[0] if found else None

    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        return await self._all("WHERE kind = 'run' AND owner IS ? ORDER BY id DESC LIMIT ?", owner, limit)

    async def unfinished(self) -> list[Stat]:
        return await self._all("WHERE kind = 'run' AND closed = 0 ORDER BY id")

    # The writer

    def _put(self, order: _Order[Any]) -> None:
        self._in_flight[order] = None
        if len(self._in_flight) > 1 or not (self._may_run_on_loop(order) and self._run_on_loop(order)):
            self._orders.put(order)

    def _may_run_on_loop(self, order: _Order[Any]) -> bool:
        """Rule 8."""
        return (
            order.size <= _LOOP_BYTES
            and not (order.long or self._full_sync or self.unavailable or self._syncs_header or self.connection is None)
            and self._wal_pages < self._due_pages
            and time.monotonic() >= self._slow_until
        )

    def _run_on_loop(self, order: _Order[Any]) -> bool:
        began = time.monotonic()
        try:
            outcome = self._transact([order], 0.0)
        except Exception:
            order.error = None  # the thread tries again
            return False
        ended = time.monotonic()
        if ended - began > _SLOW_S:
            self._slow_until = ended + _SLOW_PAUSE * (ended - began)
        self._done([order], outcome)
        return True

    def _work(self) -> None:
        while orders := self._take():
            outcome: _Transaction | BaseException
            due = False
            try:
                outcome = self._transact(orders, _BUSY_S)
                due = self._wal_pages >= self._due_pages or self._gives_back
                self._syncs_header = due and (self._copied or self._gives_back)  # before the loop goes on (rule 8)
            except BaseException as error:  # nothing may wait forever
                outcome = error
            with suppress(RuntimeError):  # the loop has ended
                self._call_soon(self._done, orders, outcome)
            del orders, outcome
            if due:
                self._checkpoint()

    def _take(self) -> list[_Order[Any]]:
        orders: list[_Order[Any]] = []
        while len(orders) < _MAX_ORDERS and not (orders and self._orders.empty()):
            order = self._orders.get()
            if order is None:
                if orders:
                    self._orders.put(None)
                break
            orders.append(order)
        return orders

    def _done(self, orders: list[_Order[Any]], outcome: "_Transaction | BaseException") -> None:
        """In the loop."""
        if isinstance(outcome, BaseException):
            if not self.unavailable:
                why = None if isinstance(outcome, _Replaced) else outcome
                logger.error("can't write the event log %s%s", self.path, outcome if why is None else "", exc_info=why)
            self.unavailable = True
            for order in orders:
                order.error = _failure("written", outcome)
        else:
            if self.unavailable and outcome.wrote:
                logger.warning("the event log %s is written again", self.path)
                self.unavailable = False
            self._over(outcome)
        for order in orders:
            del self._in_flight[order]
            order.done(order)
        if not self._in_flight:
            self._stuck = False

    def _transact(self, orders: list[_Order[Any]], busy_s: float) -> "_Transaction":
        """`busy_s`: how long to wait for another program's lock."""
        try:
            file, wal = self._present()
            if file != self._files[0] or (self.connection and wal != self._files[1]):
                raise _Replaced
            if self.connection is None:
                self.connection = self._connect()
                self._busy_s = _BUSY_S
                self.connection.execute("BEGIN IMMEDIATE")
                self._files = self._present()
                self.connection.execute("ROLLBACK")
            self._set_busy(self.connection, busy_s)
            changes = self.connection.total_changes
            transaction = _Transaction(self, self.connection)
            for order in orders:
                try:
                    order.result = order.work(transaction)
                except SSEAppError as refusal:
                    order.error = refusal
            transaction.finish()
            changes = self.connection.total_changes - changes
            transaction.wrote = changes > 0
        except BaseException:
            self.written = -1
            self._roll_back()
            raise
        known = self._known
        for stream, entry in transaction.entries.items():
            known.pop(stream, None)
            if entry:
                known[stream] = entry
        while len(known) > _MAX_KNOWN:
            del known[next(iter(known))]
        size = sum([order.size for order in orders])
        if changes:
            self._wal_pages += 2 * changes + 1 + size // _PAGE_BYTES  # with the index, and bodies
        if self.written >= 0:
            self.written += size
        return transaction

    def _set_busy(self, db: sqlite3.Connection, busy_s: float) -> None:
        if busy_s != self._busy_s:
            db.execute(f"PRAGMA busy_timeout = {round(busy_s * 1000)}")
            self._busy_s = busy_s

    def _present(self) -> "_Files":
        return _inode(self.path), _inode(f"{self.path}-wal")

    def _roll_back(self) -> None:
        db = self.connection
        if db and db.in_transaction:
            try:
                db.execute("ROLLBACK")
            except sqlite3.Error:
                self.connection = None  # the next transaction opens another
                db.close()

    def _checkpoint(self) -> None:
        """In two steps. The first copies nearly all, beside the loop's commits. During the second, after which the WAL
        begins anew, `_syncs_header` stops those.
        """
        try:
            self._copied = not self._syncs_header
            self._due_pages = self._most_wal_pages * (8 if self._copied else 7) // 8
            if self._copied:
                self._select(lambda db: db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())
                return
            self._wal_pages, gives_back, self._gives_back = 0, self._gives_back, False
            assert self.connection
            if gives_back:  # commits may come while it would wait for a reader
                self._set_busy(self.connection, 0.0)
            empties = gives_back or os.path.getsize(f"{self.path}-wal") > _MAX_WAL_BYTES
            self.connection.execute(f"PRAGMA wal_checkpoint({'TRUNCATE' if empties else 'PASSIVE'})").fetchall()
        except Exception as error:
            logger.warning("can't checkpoint the WAL of %s: %s", self.path, error)

    # The readers

    async def _all(self, where: str, *values: object) -> list[Stat]:
        return await self._query(lambda db: list(_legible(db.execute(_SELECT + where, values))))

    async def _query(self, select: Callable[[sqlite3.Connection], T]) -> T:
        if not self._running:
            raise refusal("shut")
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

    def _connect(self, path: str | None = None, *, query_only: bool = False) -> sqlite3.Connection:
        db = sqlite3.connect(path or self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute(f"PRAGMA synchronous = {'FULL' if self._full_sync else 'NORMAL'}")
            db.execute(f"PRAGMA journal_size_limit = {_MAX_WAL_BYTES // 2}")
            db.execute("PRAGMA wal_autocheckpoint = 0")  # see `_checkpoint`
            db.execute(f"PRAGMA query_only = {query_only}")
        except BaseException:
            db.close()
            raise
        return db

    def _open_file(self) -> sqlite3.Connection:
        db = None
        try:
            if not self._is_there():
                self._make_file()
            db = self._connect()
            self._migrate(db)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN IMMEDIATE")  # fails where the file can't be written
            for table in ("streams", "epochs", "rows", "garbage"):
                db.execute(f"SELECT * FROM {table} ORDER BY rowid DESC LIMIT 1").fetchall()
            db.execute("ROLLBACK")
        except BaseException as error:
            text = _error_text(db, error)
            if db:
                db.close()
            if isinstance(error, sqlite3.Error | OSError):
                raise LogError(f"the event log {self.path} {text}") from error
            raise
        return db

    def _make_file(self) -> None:
        """Rule 6."""
        path = os.path.realpath(self.path)
        new = f"{path}.new"
        for left in (new, f"{new}-journal"):
            with suppress(FileNotFoundError):
                os.unlink(left)
        with closing(self._connect(new)) as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table, or never
            self._migrate(db)
        os.rename(new, path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _migrate(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(_MIGRATIONS):
            raise LogError(
                f"the event log {self.path} has version {version}, and this program knows up to"
                f" {len(_MIGRATIONS)}: start the newer program, or name another data folder"
            )
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            mark = f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {number}"
            db.executescript(f"BEGIN; {script}; {mark}; COMMIT")

    def _is_there(self) -> bool:
        """Rule 6. Not by SQLite, which may change what it opens."""
        try:
            with self.path.open("rb") as file:
                header = file.read(100)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise LogError(f"the event log {self.path} can't be read: {error.strerror}") from error
        if header and header[:16] != b"SQLite format 3\0":
            raise LogError(f"{self.path} is not a SQLite file: move it away, or name another data folder")
        if header and int.from_bytes(header[68:72]) != _APPLICATION_ID:
            raise LogError(f"{self.path} is another program's database: move it away, or name another data folder")
        return bool(header)

    async def _lock(self) -> int:
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
        with suppress(OSError):  # full disk
            os.ftruncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())
        return lock, ""

    def _close(self) -> None:
        connections = [*self._idle, *filter(None, [self.connection])]  # the last close checkpoints
        self._idle, self.connection = [], None
        self._known.clear()
        for db in connections:
            try:
                db.close()
            except sqlite3.Error as error:
                logger.warning("the event log %s was not closed properly: %s", self.path, error)


class _Transaction(Ledger):
    """One transaction."""

    def __init__(self, log: SqliteLog, db: sqlite3.Connection) -> None:
        super().__init__(log._process)
        self._log = log
        self._db = db
        self._begun = False
        self._rows: list[tuple[object, ...]] = []  # to be inserted
        self.now = log._clock()
        self.max_bytes = log.max_bytes
        self.wrote = False
        #: Bytes to add to the owners' accounts.
        self._charges: Counter[str] = Counter()
        #: Its streams as they will be; None: deleted.
        self.entries: dict[str, Entry | None] = {}

    @property
    def db(self) -> sqlite3.Connection:
        """In a transaction, after the rows so far."""
        if not self._begun:
            self._db.execute("BEGIN IMMEDIATE")
            self._begun = True
        if self._rows:
            self._insert_rows()
        return self._db

    def _insert_rows(self) -> None:
        rows, self._rows = self._rows, []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            step = rows[start : start + _ROWS_AT_ONCE]
            self._db.execute(_insert_rows(len(step)), [value for row in step for value in row])

    def finish(self) -> None:
        for entry in self.entries.values():
            if entry and not entry.saved:
                self._charge(entry, cost(entry.stat))
                self.db.execute(_UPDATE, (*_changing(entry.stat), entry.due, entry.id))
                entry.saved = True
        for owner, bytes in self._charges.items():
            self.db.execute(_CHARGE, (owner, bytes))
            if bytes < 0:
                self.db.execute("DELETE FROM accounts WHERE owner = ? AND bytes <= 0", (owner,))
        if self._begun or len(self._rows) > _ROWS_AT_ONCE:
            self.db.execute("COMMIT")
        elif self._rows:
            self._insert_rows()  # rule 1

    def look_up(self, stream: str) -> Entry | None:
        """A copy (rule 3)."""
        if stream in self.entries:
            return self.entries[stream]
        if known := self._log._known.get(stream):
            entry = Entry(known.stat, known.due, known.charged, known.id, known.epoch)
        elif row := self.db.execute(_SELECT + "WHERE name = ?", (stream,)).fetchone():
            entry = _entry(row)
        else:
            return None
        self.entries[stream] = entry
        return entry

    def name_of(self, *, epoch: str | None = None, key: str | None = None) -> str | None:
        where, value = _where(None, epoch, key)
        return next(iter(self._names(f"SELECT name FROM streams {where}", value)), None)

    def insert(self, stat: Stat, due: float | None) -> Entry:
        values = (stat.stream, stat.kind, stat.owner, stat.key, stat.created, due, *_changing(stat))
        entry = self.entries[stat.stream] = Entry(stat, due, id=self.db.execute(_INSERT, values).lastrowid or 0)
        self.insert_epoch(entry, *stat.epochs[0], [])
        self._charge(entry, cost(stat))
        return entry

    def insert_epoch(self, entry: Entry, epoch: str, first: int, forgotten: list[str]) -> None:
        if forgotten:
            self.db.executemany("DELETE FROM epochs WHERE epoch = ?", [(name,) for name in forgotten])
        insert = "INSERT INTO epochs (epoch, stream, first) VALUES (?, ?, ?)"
        entry.epoch = self.db.execute(insert, (epoch, entry.id, first)).lastrowid or 0

    def insert_row(self, entry: Entry, row: Row) -> None:
        self._rows.append((entry.id, row.last, entry.epoch, self.now, packed(row.ends), row.body))

    def save(self, entry: Entry) -> None:
        entry.saved = False

    def grew(self, entry: Entry) -> None:
        if entry.stat.owner is not None:
            grown = cost(entry.stat) - entry.charged
            if grown > min(_UNCHARGED_BYTES, self.max_bytes // OWNERS // 100):
                self.save(entry)

    def oldest(self, entry: Entry) -> Iterable[tuple[int, float, int]]:
        oldest = "SELECT last, at, length(body) FROM rows WHERE stream = ? ORDER BY last LIMIT ?"
        return self.db.execute(oldest, (entry.id, self.step_rows)).fetchall()

    def drop(self, entry: Entry, last: int) -> None:
        self.db.execute("DELETE FROM rows WHERE stream = ? AND last <= ?", (entry.id, last))

    def remove(self, entry: Entry) -> None:
        self._charge(entry, 0)
        self.db.execute("DELETE FROM streams WHERE id = ?", (entry.id,))
        self.db.execute("DELETE FROM epochs WHERE stream = ?", (entry.id,))
        self.db.execute("INSERT INTO garbage VALUES (?)", (entry.id,))  # rule 5
        self.entries[entry.stat.stream] = None

    def _charge(self, entry: Entry, bytes: int) -> None:
        if entry.stat.owner is not None:
            self._charges[entry.stat.owner] += bytes - entry.charged
            entry.charged = bytes

    def used(self, owner: str | None = None) -> int:
        """In all: counted when it may exceed the bound."""
        if owner is not None:
            found = self.db.execute("SELECT bytes FROM accounts WHERE owner = ?", (owner,)).fetchone()
            return found[0] if found else 0
        log = self._log
        if self.max_bytes == sys.maxsize:
            return 0
        if log.written < 0 or log.used + 2 * log.written > self.max_bytes:
            names = ("page_count", "freelist_count", "page_size")
            pages, free, size = (self.db.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
            log.used, log.written = int((pages - free) * size), 0
        return log.used

    def over_share(self, share: int) -> Iterator[tuple[int, Sequence[str]]]:
        oldest = "SELECT name FROM streams WHERE kind = 'run' AND owner = ? AND closed ORDER BY id LIMIT ?"
        for owner, used in self.db.execute("SELECT owner, bytes FROM accounts WHERE bytes > ?", (share,)).fetchall():
            yield used - share, self._names(oldest, owner, self.step_streams)

    def due_between(self, after: float, until: float) -> Sequence[str]:
        due = "SELECT name FROM streams WHERE due > ? AND due <= ? ORDER BY due LIMIT ?"
        return self._names(due, after, until, self.step_streams)

    def _names(self, select: str, *values: object) -> list[str]:
        return [name for (name,) in self.db.execute(select, values)]

    def upkeep(self) -> bool:
        self._log.written = -1
        expired, swept = self._visit(self.due_between(-inf, self.now)), self._sweep()
        return expired or swept or self._make_room() or self._give_back()

    def _sweep(self) -> bool:
        rows = "SELECT rowid FROM rows WHERE stream IN (SELECT stream FROM garbage) LIMIT ?"
        gone = self.db.execute(f"DELETE FROM rows WHERE rowid IN ({rows})", (_STEP_ROWS,)).rowcount
        if gone < _STEP_ROWS:
            gone += self.db.execute("DELETE FROM garbage WHERE true").rowcount  # else an empty one is written
        return gone > 0

    def _give_back(self) -> bool:
        """Once a quarter of the file is free."""
        pages, free = (self.db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
        if free <= max(_STEP_PAGES, pages // 4):
            return False
        for _ in range(_STEP_PAGES):
            self.db.execute("PRAGMA incremental_vacuum(1)")  # Python 3.11 frees one page a call, for any number
        return True

    def probe(self) -> None:
        """Write rows that upkeep deletes."""
        self.db.execute("INSERT OR IGNORE INTO garbage VALUES (?)", (_PROBE_STREAM,))
        row = (_PROBE_STREAM, self.now, _PROBE_BYTES)  # `last` is the time, to be unique
        self.db.execute(
            "INSERT INTO rows (stream, last, epoch, at, ends, body) VALUES (?, ?, 0, 0, x'', zeroblob(?))", row
        )


@cache
def _insert_rows(rows: int) -> str:
    return "INSERT INTO rows (stream, last, epoch, at, ends, body) VALUES " + ", ".join(["(?, ?, ?, ?, ?, ?)"] * rows)


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


def _where(name: str | None, epoch: str | None, key: str | None) -> tuple[str, str | None]:
    if name is not None:
        return "WHERE name = ?", name
    return (
        ("WHERE key = ?", key) if epoch is None else ("WHERE id = (SELECT stream FROM epochs WHERE epoch = ?)", epoch)
    )


def _legible(rows: Iterable[tuple[Any, ...]]) -> Iterator[Stat]:
    for row in rows:
        try:
            yield _entry(row).stat
        except Exception:
            logger.exception("the facts of a stream in the event log can't be read: %.100r", row)


def _entry(row: tuple[Any, ...]) -> Entry:
    """The owner is charged by the stored facts."""
    id, due, epoch, first_written, last_written, size_written, *facts = row
    stream, kind, epochs, created, updated, first, last, size, closed, owner, meta, key, keep = facts
    epochs = tuple((name, start) for name, start in orjson.loads(epochs))
    closed, meta, keep = bool(closed), orjson.loads(meta), msgspec.json.decode(keep, type=Retention)
    stat = Stat(stream, kind, epochs, created, updated, first, last, size, closed, owner, meta, key, keep)
    paid = msgspec.structs.replace(stat, first=first_written, last=last_written, size=size_written)
    return Entry(stat, due, cost(paid), id, epoch)


def _changing(stat: Stat) -> tuple[object, ...]:
    meta, retention = encode_json(stat.meta).decode(), encode_json(stat.retention).decode()
    return stat.updated, stat.first, stat.last, stat.size, stat.closed, meta, retention


def _inode(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class _Replaced(Exception):
    def __str__(self) -> str:
        return (
            ": the file or its -wal was deleted or replaced while this process uses it, and appends would be lost. Stop"
            " the service, put the files back if you have them, and start it again"
        )


def _damaged(error: BaseException) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _failure(doing: str, error: BaseException) -> SSEAppError:
    """For the client: only SQLite's texts contain no path."""
    if _damaged(error):
        return LogError("the event log's file is damaged")
    reason = error if isinstance(error, sqlite3.Error) else "internal error"
    if isinstance(error, _Replaced):
        reason = "its file was deleted or replaced"
    return LogUnavailable(f"the event log can't be {doing} at the moment: {reason}")


def _error_text(db: sqlite3.Connection | None, error: BaseException) -> str:
    if not _damaged(error):
        return f"can't be used: {error}"
    reason = str(error)
    if db:
        with suppress(sqlite3.Error):
            reason = db.execute("PRAGMA quick_check(1)").fetchone()[0].splitlines()[-1]
    return f"is damaged ({reason}): put a copy of it back, or move it away to begin a new one"
