"""The event log in one SQLite file, for one process: what a finished call says is there after a SIGKILL.

In WAL mode with `synchronous=NORMAL`; a lost power supply may take the last moments, which their readers are told
(`diverged`). `full_sync=True` syncs each commit, and withstands that too.

Theory of operation. A small commit is made on the event loop, where it takes some 50 µs; handing it to a thread and
back takes 150. What may take long goes to a thread that lives as long as the log (rule 8); all that was handed to it
while it was at work is its next transaction:

    append, post ──► Commits (writer.py): a batch a stream ──┬──► the loop ─────────────────┐
    create, open, delete, upkeep ────────────────────────────┴──► queue ──► the thread ─────┴──► watchers, callers
    read, find, … ──► a worker thread: one SELECT on one of a few connections

1.  A batch is a row. What an open run's rows say (`last`, `size`, `updated`) is not written a second time with each
    append: who asks the file gets it from the rows. With its close, its `meta` or an epoch the facts are written as
    they are. So an append is one statement; and a transaction of nothing but rows is that statement, without BEGIN and
    COMMIT.
2.  An operation is refused before it has changed anything, so a refusal fails nobody else. An error of SQLite fails
    every operation of the transaction with `LogUnavailable`; nothing of it is kept, and the next one tries anew.
3.  `_known`, the facts of the streams in use, is changed after a commit, and what a transaction changes are copies. The
    loop makes no transaction while the thread has something to do.
4.  A reader's transaction is one SELECT: none holds the WAL back, and each sees every commit before it.
5.  Nothing takes longer because of how much is to be deleted: a deleted stream's rows are `garbage` first, and the
    upkeep takes a bounded step in a transaction of its own, as often as there is something to do. For `max_bytes` the
    pages in use count, garbage too; so it is taken away before anything more is deleted for the sake of room.
6.  A file that isn't ours is never written to. A new one is made under another name: whenever there is a file by the
    log's name, the application id stands in its first bytes.
7.  Before each transaction it is checked that the file and its WAL are the ones that it opened: SQLite would go on
    writing to a deleted file. After a failure the log is `away` until a transaction has written to the file; the upkeep
    tries that from time to time.
8.  The thread does what the loop must not wait for: anything with `full_sync`; more than `_HERE_BYTES`; the upkeep; the
    checkpoint of the WAL, and the transaction behind it, which syncs the WAL's new header; all while the log is `away`.
    The loop does not wait for another program's lock: what fails on it is tried again by the thread. Behind a
    commit that took the loop longer than `_SLOW_S`, as on a disk that hangs, the thread makes those of a time that is
    `_SLOW_PAUSE` times as long.
"""

import logging
import os
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from functools import cache
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
from ssecore.log import Log
from ssecore.log.facts import OWNERS, Retention, Row, Stat, cost, legible, packed, unpacked
from ssecore.log.ledger import Entry, Ledger, LocalStore
from ssecore.log.writer import GAP_S, Batch
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
    # From here on the facts of an open run are behind its rows (rule 1): an older program would append over them.
    "",
)

#: What one transaction does at most. Its appends have a bound of their own in `writer`.
_MAX_ORDERS: Final = 100
#: Rows that one statement inserts. Each number of them is a statement of its own, which SQLite keeps.
_ROWS_AT_ONCE: Final = 32
#: What a batch takes of the file, and of the WAL, besides its body, roughly. The pages in use are counted again when
#: so many bytes have been written that the bound could have been passed.
_BATCH_BYTES: Final = 1024
#: What a run may have grown since its owner was last charged for it (rule 1).
_UNCHARGED_BYTES: Final = 64 * 1024
#: Connections, and threads, for reading. Most of the work holds the interpreter's lock; a few hide the disk's latency.
_READERS: Final = 4
#: Streams whose facts are kept in memory, about 1 KB each.
_MAX_KNOWN: Final = 10_000
#: One step of upkeep, and of trimming at an append: rows, streams, pages. Each is some milliseconds,
#: and commits up to 20 ms where the rows are large.
_STEP_ROWS: Final = 32
_STEP_PAGES: Final = 256
#: The WAL is taken into the file after so many pages, 2 MiB. (SQLite's own 4 MiB would be half of a small log.)
_CHECKPOINT_PAGES: Final = 512
#: Readers can keep the WAL from starting over. Beyond this it is made to.
_MAX_WAL_BYTES: Final = 16 * 1024 * 1024
#: What the upkeep writes after a failure, to find out whether there is room again: a row of a stream that never exists.
_PROBE_STREAM: Final = 0
_PROBE_BYTES: Final = 64 * 1024
#: Rule 8.
_HERE_BYTES: Final = 64 * 1024
_SLOW_S: Final = 0.005
_SLOW_PAUSE: Final = 100
#: How long SQLite waits while another program (a backup, a person with `sqlite3`) locks the file. As long as the Redis
#: log waits for Redis.
_BUSY_S: Final = 5.0
_LOCK_POLL_S: Final = 0.05

_SELECT: Final = """
    SELECT id, due, (SELECT max(id) FROM epochs WHERE stream = streams.id), first, last, size, name, kind,
        (SELECT json_group_array(json_array(epoch, first))
         FROM (SELECT epoch, first FROM epochs WHERE stream = streams.id ORDER BY id)),
        created,
        CASE WHEN kind = 'run' AND NOT closed
            THEN max(updated, coalesce((SELECT at FROM rows WHERE stream = streams.id ORDER BY last DESC LIMIT 1), 0))
            ELSE updated END,
        first,
        CASE WHEN kind = 'run' AND NOT closed
            THEN coalesce((SELECT max(last) FROM rows WHERE stream = streams.id), 0) ELSE last END,
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


class _Order(Generic[T]):
    """Something for the thread. `done` is called on the loop then, with what it failed with."""

    __slots__ = ("awaited", "done", "error", "result", "size", "work")

    def __init__(self, work: Callable[["_Transaction"], T], done: Callable[[Any], None], size: int) -> None:
        self.work = work
        self.done = done
        self.awaited = False
        self.size = size
        self.result: T
        self.error: SSEAppError | None = None


class SqliteLog(Log):
    """`Log` in the file `path`, whose folder is made if need be.

    `full_sync`: see above. `lock_wait_s`: how long to wait for another process to let go of the file. `clock` gives
    Unix time; `upkeep_s` is the pause between two looks at what age has ended; `max_bytes` is a bound in all (rule 7 of
    `ssecore.log`).
    """

    store: "SqliteStore"

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
        store = SqliteStore(Path(path), full_sync, lock_wait_s, clock, sys.maxsize if max_bytes is None else max_bytes)
        super().__init__(store, clock=clock, upkeep_s=upkeep_s)


class SqliteStore(LocalStore):
    """The file, the thread that writes to it, and its readers."""

    gap_s: float | None = GAP_S

    def __init__(
        self, path: Path, full_sync: bool, lock_wait_s: float, clock: Callable[[], float], max_bytes: int
    ) -> None:
        super().__init__()
        self.path = path
        self._full_sync = full_sync
        self._lock_wait_s = lock_wait_s
        self._clock = clock
        self.max_bytes = max_bytes
        self._orders: SimpleQueue[_Order[Any] | None] = SimpleQueue()
        self._under_way: dict[_Order[Any], None] = {}
        self._known: dict[str, Entry] = {}  # rule 3; the longest unused first
        self._idle: list[sqlite3.Connection] = []  # readers
        self.writer: sqlite3.Connection | None = None
        self._running = False
        self._stuck = False  # `give_up` was called, and what was under way then isn't over yet
        self._busy_s = _BUSY_S  # how long the writer waits for another program's lock
        self._wal_pages = 0  # written since the last checkpoint, roughly
        self._syncs_header = True  # the next transaction may
        self._slow_until = 0.0
        self._files: _Files = (None, None)
        #: The bytes of the pages in use when they were last counted, and those written since, roughly.
        self.used, self.written = 0, -1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        lock = await self._lock()
        self._reading = CapacityLimiter(_READERS)
        self._orders = SimpleQueue()
        token: Any = current_token().native_token
        self._tell = getattr(token, "call_soon_threadsafe", None) or token.run_sync_soon
        thread = threading.Thread(target=self._work, name="sseapp event log", daemon=True)
        try:
            self.writer = await run_sync(self._open_file)
            self._files, self.away, self.written = self._present(), False, -1
            thread.start()
            self._running = True
            try:
                yield
            finally:
                self._running = False
        finally:
            with CancelScope(shield=True):
                if thread.ident is not None:
                    self._orders.put(None)
                    await run_sync(thread.join)
                for _ in range(_READERS):  # whoever is still reading
                    await self._reading.acquire_on_behalf_of(object())
                await run_sync(self._close)
                os.close(lock)

    # What callers ask for

    def commit(self, batches: list[Batch], done: Callable[[], None]) -> None:
        def committed(order: _Order[None]) -> None:
            if order.error is not None:
                for batch in batches:
                    batch.error = order.error
            done()

        size = sum([batch.size + _BATCH_BYTES for batch in batches])
        self._put(_Order(lambda turn: turn.commit(batches), committed, size))

    async def apply(self, work: Callable[[Ledger], T], *, size: int = _BATCH_BYTES) -> T:
        if not self._running or self._stuck:
            raise LogUnavailable("the event log is closed" if not self._running else "the service is about to stop")
        signal = anyio.Event()
        order = _Order(work, lambda _: signal.set(), size)
        order.awaited = True
        self._put(order)
        await signal.wait()
        if order.error:
            raise order.error
        return order.result

    def give_up(self) -> None:
        """Another program may hold the file's lock: a transaction waits for it, and all others for the transaction."""
        for order in self._under_way:
            if order.awaited:  # else it is `Commits` that gives up
                order.awaited, order.error = False, LogUnavailable("the service is about to stop")
                order.done(order)
        self._stuck = bool(self._under_way)

    async def upkeep(self) -> bool:
        if self.away:
            with suppress(SSEAppError):
                await self.apply(_Transaction.probe)  # type: ignore[arg-type]
        return await self.apply(lambda ledger: ledger.upkeep(), size=_HERE_BYTES + 1)

    async def read(self, stream: str, after: int, max_bytes: int) -> list[Row]:
        return await self._query(lambda db: _read(db, stream, after, max_bytes))

    async def find(self, *, name: str | None = None, epoch: str | None = None, key: str | None = None) -> Stat | None:
        # A run's first epoch is its name.
        if (known := self._known.get(name or epoch or "")) and (name or known.stat.epochs[0][0] == epoch):
            return known.stat
        if name is not None:
            return await self._one("WHERE name = ?", name)
        if epoch is not None:
            return await self._one("WHERE id = (SELECT stream FROM epochs WHERE epoch = ?)", epoch)
        return await self._one("WHERE key = ?", key)

    async def runs(self, owner: str | None, limit: int) -> list[Stat]:
        return await self._all("WHERE kind = 'run' AND owner IS ? ORDER BY id DESC LIMIT ?", owner, limit)

    async def unfinished(self) -> list[Stat]:
        return await self._all("WHERE kind = 'run' AND closed = 0 ORDER BY id")

    # The writer

    def _put(self, order: _Order[Any]) -> None:
        here = not self._under_way and self._may_be_here(order)
        self._under_way[order] = None
        if not (here and self._is_done_here(order)):
            self._orders.put(order)

    def _may_be_here(self, order: _Order[Any]) -> bool:
        """Rule 8."""
        return (
            order.size <= _HERE_BYTES
            and not (self._full_sync or self.away or self._syncs_header or self.writer is None)
            and self._wal_pages < _CHECKPOINT_PAGES
            and time.monotonic() >= self._slow_until
        )

    def _is_done_here(self, order: _Order[Any]) -> bool:
        began = time.monotonic()
        try:
            outcome = self._transact([order], 0.0)
        except Exception:
            order.error = None  # the thread tries again, and logs why it fails
            return False
        ended = time.monotonic()
        if ended - began > _SLOW_S:
            self._slow_until = ended + _SLOW_PAUSE * (ended - began)
        self._done([order], outcome)
        return True

    def _work(self) -> None:
        """The thread."""
        while orders := self._take():
            outcome: _Transaction | BaseException
            try:
                outcome = self._transact(orders, _BUSY_S)
                self._checkpoint()
            except BaseException as error:  # SQLite's, or a bug of ours: nobody waits for ever, and the next may work
                outcome = error
            with suppress(RuntimeError):  # the loop is gone, and all who waited with it
                self._tell(self._done, orders, outcome)
            del orders, outcome

    def _take(self) -> list[_Order[Any]]:
        """What there is, and at least one; nothing at the end."""
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
        """On the loop."""
        if isinstance(outcome, BaseException):
            if not self.away:
                why = None if isinstance(outcome, _Replaced) else outcome
                logger.error("can't write the event log %s%s", self.path, outcome if why is None else "", exc_info=why)
            self.away = True
            for order in orders:
                order.error = _failure("written", outcome)
        else:
            if self.away and outcome.wrote:
                logger.warning("the event log %s is written again", self.path)
                self.away = False
            self.crowded = outcome.crowded
            for notice in outcome.notices:
                self._watchers.notify(*notice)
        for order in orders:
            del self._under_way[order]
            order.done(order)
        if not self._under_way:
            self._stuck = False

    def _transact(self, orders: list[_Order[Any]], busy_s: float) -> "_Transaction":
        """Each order has its result or its refusal then. `busy_s`: how long it may wait for another program's lock."""
        try:
            file, wal = self._present()
            if file != self._files[0] or (self.writer and wal != self._files[1]):
                raise _Replaced
            if self.writer is None:
                self.writer = self._connect()
                self._busy_s = _BUSY_S
                self.writer.execute("BEGIN IMMEDIATE")
                self._files = self._present()
                self.writer.execute("ROLLBACK")
            if busy_s != self._busy_s:
                self.writer.execute(f"PRAGMA busy_timeout = {round(busy_s * 1000)}")
                self._busy_s = busy_s
            changes = self.writer.total_changes
            transaction = _Transaction(self, self.writer, self._known, self._clock())
            for order in orders:
                try:
                    order.result = order.work(transaction)
                except SSEAppError as refusal:
                    order.error = refusal
            transaction.finish()
            changes = self.writer.total_changes - changes
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
        self._wal_pages += changes + 1 + size // 4096  # a page of the index for each row, and those of the bodies
        if self.written >= 0:
            self.written += size
        return transaction

    def _present(self) -> "_Files":
        """The file and the WAL that are there by these names now."""
        return _inode(self.path), _inode(f"{self.path}-wal")

    def _roll_back(self) -> None:
        db = self.writer
        if db and db.in_transaction:
            try:
                db.execute("ROLLBACK")
            except sqlite3.Error:
                self.writer = None  # the next transaction opens another
                db.close()

    def _checkpoint(self) -> None:
        """Take the WAL into the file, in the thread, once it is long enough."""
        self._syncs_header = self._wal_pages >= _CHECKPOINT_PAGES
        if self._syncs_header and self.writer:
            self._wal_pages = 0
            try:
                held_up = os.path.getsize(f"{self.path}-wal") > _MAX_WAL_BYTES
                self.writer.execute(f"PRAGMA wal_checkpoint({'TRUNCATE' if held_up else 'PASSIVE'})").fetchall()
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
            text = _complaint(db, error)
            if db:
                db.close()
            if isinstance(error, sqlite3.Error | OSError):
                raise LogError(f"the event log {self.path} {text}") from error
            raise
        return db

    def _make_file(self) -> None:
        """Under another name: a power failure in the middle would leave what doesn't look like a log (rule 6)."""
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
        """Refuses a file that isn't ours (rule 6), by its first bytes: SQLite itself may change what it opens."""
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
        connections = [*self._idle, *filter(None, [self.writer])]  # the last one takes the WAL into the file
        self._idle, self.writer = [], None
        self._known.clear()
        for db in connections:
            try:
                db.close()
            except sqlite3.Error as error:
                logger.warning("the event log %s was not closed properly: %s", self.path, error)


class _Transaction(Ledger):
    """What happens between BEGIN and COMMIT, in the thread."""

    def __init__(self, store: SqliteStore, db: sqlite3.Connection, known: dict[str, Entry], now: float) -> None:
        super().__init__(store._process)
        self._store = store
        self._db = db
        self._begun = False
        self._rows: list[tuple[object, ...]] = []  # to be inserted
        self._known = known
        self.now = now
        self.max_bytes = store.max_bytes
        self.wrote = False
        #: How much more the owners use.
        self._charges: Counter[str] = Counter()
        #: The streams that it has to do with, as they will be; None: deleted.
        self.entries: dict[str, Entry | None] = {}

    @property
    def db(self) -> sqlite3.Connection:
        """For anything but the last rows: in a transaction, with the rows before it."""
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
                self.charge(entry, 0 if entry.stat.owner is None else cost(entry.stat))
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
        """A copy that may be changed. The file is asked only for a stream that isn't known."""
        if stream in self.entries:
            return self.entries[stream]
        if known := self._known.get(stream):
            entry = Entry(known.stat, known.due, known.charged, known.id, known.epoch)
        elif row := self.db.execute(_SELECT + "WHERE name = ?", (stream,)).fetchone():
            entry = _entry(row)
        else:
            return None
        self.entries[stream] = entry
        return entry

    def by_key(self, key: str) -> str | None:
        found = self.db.execute("SELECT name FROM streams WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None

    def has_epoch(self, epoch: str) -> bool:
        return self.db.execute("SELECT 1 FROM epochs WHERE epoch = ?", (epoch,)).fetchone() is not None

    def insert(self, stat: Stat, due: float | None) -> Entry:
        values = (stat.stream, stat.kind, stat.owner, stat.key, stat.created, due, *_changing(stat))
        entry = self.entries[stat.stream] = Entry(stat, due, id=self._insert(_INSERT, values))
        self.insert_epoch(entry, *stat.epochs[0], [])
        self.charge(entry, 0 if stat.owner is None else cost(stat))
        return entry

    def insert_epoch(self, entry: Entry, epoch: str, first: int, forgotten: list[str]) -> None:
        if forgotten:
            self.db.executemany("DELETE FROM epochs WHERE epoch = ?", [(name,) for name in forgotten])
        values = (epoch, entry.id, first)
        entry.epoch = self._insert("INSERT INTO epochs (epoch, stream, first) VALUES (?, ?, ?)", values)

    def _insert(self, statement: str, values: tuple[object, ...]) -> int:
        id = self.db.execute(statement, values).lastrowid
        assert id is not None
        return id

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
        self.db.execute("DELETE FROM streams WHERE id = ?", (entry.id,))
        self.db.execute("DELETE FROM epochs WHERE stream = ?", (entry.id,))
        self.db.execute("INSERT INTO garbage VALUES (?)", (entry.id,))  # rule 5
        self.entries[entry.stat.stream] = None

    def charge(self, entry: Entry, bytes: int) -> None:
        if entry.stat.owner is not None:
            self._charges[entry.stat.owner] += bytes - entry.charged
            entry.charged = bytes

    def used(self) -> int:
        """The bytes of the pages in use. They are counted when they could be over the bound, and after a deletion."""
        store = self._store
        if self.max_bytes == sys.maxsize:
            return 0
        if store.written < 0 or store.used + 2 * store.written > self.max_bytes:
            names = ("page_count", "freelist_count", "page_size")
            pages, free, size = (self.db.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
            store.used, store.written = int((pages - free) * size), 0
        return store.used

    def account(self, owner: str) -> int:
        found = self.db.execute("SELECT bytes FROM accounts WHERE owner = ?", (owner,)).fetchone()
        return found[0] if found else 0

    def accounts_over(self, bytes: int) -> Sequence[tuple[str, int]]:
        return self.db.execute("SELECT owner, bytes FROM accounts WHERE bytes > ?", (bytes,)).fetchall()

    def closed_runs(self, owner: str) -> Sequence[str]:
        oldest = "SELECT name FROM streams WHERE kind = 'run' AND owner = ? AND closed ORDER BY id LIMIT ?"
        return self._names(oldest, owner, self.step_streams)

    def due_until(self, at: float) -> Sequence[str]:
        return self._names("SELECT name FROM streams WHERE due <= ? ORDER BY due LIMIT ?", at, self.step_streams)

    def due_after(self, at: float) -> Sequence[str]:
        return self._names("SELECT name FROM streams WHERE due > ? ORDER BY due LIMIT ?", at, self.step_streams)

    def _names(self, select: str, *values: object) -> list[str]:
        return [name for (name,) in self.db.execute(select, values)]

    def upkeep(self) -> bool:
        self._store.written = -1
        return super().upkeep()

    def sweep(self) -> bool:
        garbage = self.db.execute("SELECT stream FROM garbage LIMIT ?", (_STEP_ROWS,)).fetchall()
        rows = _STEP_ROWS
        for stream in garbage:
            oldest = "SELECT rowid FROM rows WHERE stream = ? ORDER BY last LIMIT ?"
            gone = self.db.execute(f"DELETE FROM rows WHERE rowid IN ({oldest})", (*stream, rows))
            rows -= gone.rowcount
            if not rows:
                break
            self.db.execute("DELETE FROM garbage WHERE stream = ?", stream)
        return bool(garbage)

    def give_back(self) -> bool:
        """Free pages to the file system, once they are a quarter of the file; until then they are used again."""
        pages, free = (self.db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
        if free <= max(_STEP_PAGES, pages // 4):
            return False
        for _ in range(_STEP_PAGES):
            self.db.execute("PRAGMA incremental_vacuum(1)")  # of a greater number Python 3.11 would do one, too
        return True

    def probe(self) -> None:
        """Write something that the upkeep deletes."""
        self.db.execute("INSERT OR IGNORE INTO garbage VALUES (?)", (_PROBE_STREAM,))
        row = (_PROBE_STREAM, self.now, _PROBE_BYTES)  # its number is the time: there may be one already
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


def _entry(row: tuple[Any, ...]) -> Entry:
    """From what `_SELECT` selects. What the facts themselves say, and not the rows, is what its owner has paid for."""
    id, due, epoch, first_written, last_written, size_written, *facts = row
    stream, kind, epochs, created, updated, first, last, size, closed, owner, meta, key, keep = facts
    epochs = tuple((name, start) for name, start in orjson.loads(epochs))
    closed, meta, keep = bool(closed), orjson.loads(meta), msgspec.json.decode(keep, type=Retention)
    stat = Stat(stream, kind, epochs, created, updated, first, last, size, closed, owner, meta, key, keep)
    paid = msgspec.structs.replace(stat, first=first_written, last=last_written, size=size_written)
    return Entry(stat, due, 0 if owner is None else cost(paid), id, epoch)


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


def _failure(doing: str, error: BaseException) -> SSEAppError:
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
