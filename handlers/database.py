"""The service's SQLite file, which several processes may share: tasks with full-text search, sessions, executions.

1.  One statement handles a whole page or batch, as JSON: the sqlite3 module releases the interpreter's lock at each
    step, and getting it back from a busy loop costs up to ten times the work.
2.  A reader fetches page after page by key (`id > last`), so memory is constant and the write-ahead log can be
    truncated.
3.  One writer at a time in each process, so writers that wait for the file's lock take no connection from readers.
"""

import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

import msgspec
from anyio import CancelScope, CapacityLimiter, to_thread

from ssecore.errors import SSEAppError, Unavailable

__all__ = [
    "COLUMNS",
    "Due",
    "Exchange",
    "Filter",
    "Grouping",
    "NewTask",
    "Status",
    "Task",
    "Tasks",
    "bounded",
    "open_tasks",
]

Status = Literal["open", "doing", "done"]
#: `none`: no date. `week`: the seven days after today.
Due = Literal["overdue", "today", "week", "later", "none", "done"]
Grouping = Literal["status", "priority", "due"]
COLUMNS: Final = ("id", "title", "description", "status", "priority", "due", "created")

#: Usually 40 KB; the longest rows that an import accepts make some 12 MB.
PAGE_ROWS: Final = 200
#: A page takes less than a millisecond.
READERS: Final = 3
#: A word costs up to a second if a million rows contain it.
MAX_WORDS: Final = 10
#: Of a description in a search result.
FOUND_CHARS: Final = 300
BUSY_TIMEOUT_S: Final = 30.0

#: In a session.
MAX_EXCHANGES: Final = 20
#: A small local model takes some 8,000 in all.
MAX_SESSION_CHARS: Final = 8000
#: For each caller: some 160 MB of text.
MAX_SESSIONS: Final = 5000
#: For each task and caller.
MAX_EXECUTIONS: Final = 20
#: Since the last use.
MAX_SESSION_AGE_S: Final = 7 * 86400.0

_APPLICATION_ID: Final = 0x73736561  # "ssea"
#: Migrations, from version 1 on. A released one never changes.
_VERSIONS: Final = (
    (
        """CREATE TABLE tasks (
            id INTEGER PRIMARY KEY,
            title TEXT NOT NULL,
            description TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('open', 'doing', 'done')),
            priority INTEGER NOT NULL CHECK (priority BETWEEN 1 AND 5),
            due TEXT,
            created TEXT NOT NULL
        )""",
        "CREATE INDEX tasks_by_status ON tasks (status, id)",
        "CREATE VIRTUAL TABLE words USING fts5 (title, description, content='tasks', content_rowid='id')",
        """CREATE TRIGGER words_insert AFTER INSERT ON tasks BEGIN
            INSERT INTO words (rowid, title, description) VALUES (new.id, new.title, new.description);
        END""",
        """CREATE TRIGGER words_delete AFTER DELETE ON tasks BEGIN
            INSERT INTO words (words, rowid, title, description) VALUES ('delete', old.id, old.title, old.description);
        END""",
        """CREATE TRIGGER words_update AFTER UPDATE OF id, title, description ON tasks BEGIN
            INSERT INTO words (words, rowid, title, description) VALUES ('delete', old.id, old.title, old.description);
            INSERT INTO words (rowid, title, description) VALUES (new.id, new.title, new.description);
        END""",
    ),
    (
        # A caller can't see or take another caller's session.
        """CREATE TABLE sessions (
            owner TEXT NOT NULL,
            id TEXT NOT NULL,
            used REAL NOT NULL,
            exchanges TEXT NOT NULL,
            PRIMARY KEY (owner, id)
        )""",
        "CREATE INDEX sessions_by_owner ON sessions (owner, used)",
        "CREATE INDEX sessions_by_use ON sessions (used)",
    ),
    (
        # Ordered by `number`: the clock is too coarse.
        """CREATE TABLE executions (
            number INTEGER PRIMARY KEY,
            run TEXT NOT NULL,
            task_id INTEGER NOT NULL,
            owner TEXT NOT NULL
        )""",
        "CREATE INDEX executions_by_task ON executions (task_id, owner, number)",
    ),
)

_INSERT: Final = f"""INSERT INTO tasks ({", ".join(COLUMNS[1:])})
    SELECT {", ".join(f"json_extract(value, '$[{at}]')" for at in range(5))}, ? FROM json_each(?)"""

#: Rule 1. JSON contains no line break; the inner LIMIT keeps the order.
_PAGE: Final = f"""SELECT max(id), CAST(group_concat(json, char(10)) AS BLOB) FROM (
    SELECT tasks.id AS id, json_object({", ".join(f"'{name}', tasks.{name}" for name in COLUMNS)}) AS json
    FROM {{source}} WHERE {{where}} ORDER BY {{key}} LIMIT :rows)"""

_DUE: Final = """CASE
    WHEN tasks.status = 'done' THEN 'done'
    WHEN tasks.due IS NULL THEN 'none'
    WHEN tasks.due < :today THEN 'overdue'
    WHEN tasks.due = :today THEN 'today'
    WHEN tasks.due <= date(:today, '+7 days') THEN 'week'
    ELSE 'later' END"""
_GROUPS: Final[dict[Grouping, str]] = {"status": "tasks.status", "priority": "tasks.priority", "due": _DUE}
_EXECUTIONS: Final = "FROM executions WHERE task_id = ? AND owner = ? ORDER BY number DESC"

#: Search only between the first and the last row with the status. FTS5 takes NULL for no lower bound, so without such a
#: row the bound is above all rows.
_FROM_FIRST_TO_LAST: Final = f"""words.rowid BETWEEN
    coalesce((SELECT min(id) FROM tasks WHERE status = :status AND id > :after), {sys.maxsize})
    AND (SELECT max(id) FROM tasks WHERE status = :status)"""

T = TypeVar("T")


class NewTask(msgspec.Struct, array_like=True):
    title: str
    description: str
    status: str
    priority: int
    due: str | None


class Task(NamedTuple):
    """In the order of `COLUMNS`."""

    id: int
    title: str
    description: str
    status: Status
    priority: int
    due: str | None
    created: str


@dataclass(frozen=True, kw_only=True)
class Filter:
    """`due="week"` includes today."""

    words: str | None = None
    any_word: bool = False  #: else all words must occur
    status: Status | None = None
    priority: int | None = None
    due: Due | None = None


class Exchange(msgspec.Struct, array_like=True, frozen=True):
    question: str
    answer: str


class Tasks:
    """Every method raises `Unavailable` while the file is locked or the disk full."""

    def __init__(self, connections: list[sqlite3.Connection], path: Path) -> None:
        self._free = connections
        self._path = path
        self._reading = CapacityLimiter(len(connections) - 1)
        self._writing = CapacityLimiter(1)

    async def insert(self, tasks: Sequence[NewTask]) -> None:
        await to_thread.run_sync(self._work, partial(_insert, tasks), limiter=self._writing)

    async def get(self, id: int) -> Task | None:
        return await to_thread.run_sync(self._work, partial(_get, id), limiter=self._reading)

    async def set_status(self, id: int, status: Status) -> bool:
        """Returns whether the task exists."""
        return await to_thread.run_sync(self._work, partial(_set_status, id, status), limiter=self._writing)

    async def pages(
        self, status: Status | None = None, text: str | None = None, limit: int = sys.maxsize
    ) -> AsyncIterator[list[bytes]]:
        """Yield pages of JSON objects. `text`: rows that contain all of its words."""
        source, key, where = "tasks", "tasks.id", "tasks.id > :after"
        if text is not None:
            # CROSS JOIN fixes the order of the lookups.
            source, key = "words CROSS JOIN tasks ON tasks.id = words.rowid", "words.rowid"
            bounds = "words.rowid > :after" if status is None else _FROM_FIRST_TO_LAST
            where = f"{bounds} AND words MATCH :words"
        if status is not None:
            where += " AND tasks.status = :status"
        sql = _PAGE.format(source=source, key=key, where=where)
        after = 0
        while limit > 0:
            wanted = min(PAGE_ROWS, limit)
            values = {"status": status, "words": _quoted(text or ""), "after": after, "rows": wanted}
            after, page = await to_thread.run_sync(self._work, partial(_read, sql, values), limiter=self._reading)
            if page is None:
                return
            rows = page.split(b"\n")
            yield rows
            limit = limit - wanted if len(rows) == wanted else 0

    async def search(self, wanted: Filter, limit: int, today: date) -> tuple[int, list[Task]]:
        """Number of rows, and the first by rank or, without words, by date. Descriptions are cut."""
        work = partial(_search, wanted, limit, today)
        return await to_thread.run_sync(self._work, work, limiter=self._reading)

    async def count(self, wanted: Filter, by: Grouping | None, today: date) -> dict[str, int]:
        """Non-empty groups; without `by` only `all`."""
        return await to_thread.run_sync(self._work, partial(_count, wanted, by, today), limiter=self._reading)

    def scan(self) -> Generator[tuple[int, int, list[bytes]], None, None]:
        """`pages` for a worker thread, on its own connection: yields the page's last id, the highest id, rows."""
        with _as_unavailable(), closing(_connect(self._path)) as connection:
            ((highest,),) = connection.execute("SELECT max(id) FROM tasks").fetchall()
            sql = _PAGE.format(source="tasks", key="tasks.id", where="tasks.id > :after")
            after = 0
            while True:
                after, page = _read(sql, {"after": after, "rows": PAGE_ROWS}, connection)
                if page is None:
                    return
                yield after, max(highest, after), page.split(b"\n")

    async def begin_execution(self, run: str, task_id: int, owner: str | None) -> None:
        work = partial(_begin_execution, run, task_id, owner or "")
        await to_thread.run_sync(self._work, work, limiter=self._writing)

    async def executions(self, task_id: int, owner: str | None) -> list[str]:
        """Run ids, newest first."""
        return await to_thread.run_sync(self._work, partial(_executions, task_id, owner or ""), limiter=self._reading)

    async def session(self, owner: str | None, id: str) -> list[Exchange]:
        """Oldest first."""
        return await to_thread.run_sync(self._work, partial(_session, owner or "", id), limiter=self._reading)

    async def add_exchange(self, owner: str | None, id: str, exchange: Exchange) -> None:
        await to_thread.run_sync(self._work, partial(_add_exchange, owner or "", id, exchange), limiter=self._writing)

    def _work(self, work: Callable[[sqlite3.Connection], T]) -> T:
        # The limiters guarantee a free connection.
        connection = self._free.pop()
        try:
            with _as_unavailable():
                return work(connection)
        finally:
            self._free.append(connection)

    async def close(self) -> None:
        with CancelScope(shield=True):
            for limiter in (self._reading, self._writing):
                for _ in range(int(limiter.total_tokens)):
                    await limiter.acquire_on_behalf_of(object())
            for connection in self._free:
                await to_thread.run_sync(connection.close)


@asynccontextmanager
async def open_tasks(data_dir: Path) -> AsyncIterator[Tasks]:
    """Raises `SSEAppError`, such as for another program's file, which is left unchanged."""
    path = data_dir / "tasks.db"
    tasks = Tasks(await to_thread.run_sync(_open, path), path)
    try:
        yield tasks
    finally:
        await tasks.close()


def _open(path: Path) -> list[sqlite3.Connection]:
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            connections = [stack.enter_context(closing(_connect(path))) for _ in range(READERS + 1)]
            _prepare(connections[0])
            for connection in connections:
                # A commit survives a killed process; a power failure may lose the last ones.
                connection.execute("PRAGMA synchronous = NORMAL")
        except (OSError, ValueError, sqlite3.Error) as error:
            raise SSEAppError(f"can't use {path} as the tasks database: {error}") from error
        stack.pop_all()
        return connections


def _connect(path: Path) -> sqlite3.Connection:
    # No isolation level: each statement is its own transaction.
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _prepare(connection: sqlite3.Connection) -> None:
    """Create or migrate the schema."""
    with _transaction(connection):  # several processes may start at once
        sources = ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        application, version, tables = (connection.execute(source).fetchall()[0][0] for source in sources)
        if application == version == tables == 0:
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        elif application != _APPLICATION_ID:
            raise ValueError("it is the database of another program")
        elif version > len(_VERSIONS):
            raise ValueError(f"it has version {version}, and sseapp supports version {len(_VERSIONS)}: update sseapp")
        for number, statements in enumerate(_VERSIONS[version:], version + 1):
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
    connection.execute("PRAGMA journal_mode = WAL")


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@contextmanager
def _as_unavailable() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:  # a bug
            raise
        raise Unavailable(f"can't use the tasks database at the moment: {error}") from error


def _insert(tasks: Sequence[NewTask], connection: sqlite3.Connection) -> None:
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    connection.execute(_INSERT, (created, msgspec.json.encode(tasks).decode()))


def _get(id: int, connection: sqlite3.Connection) -> Task | None:
    rows = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM tasks WHERE id = ?", (id,)).fetchall()
    return Task(*rows[0]) if rows else None


def _set_status(id: int, status: Status, connection: sqlite3.Connection) -> bool:
    return connection.execute("UPDATE tasks SET status = ? WHERE id = ?", (status, id)).rowcount > 0


def _read(sql: str, values: dict[str, Any], connection: sqlite3.Connection) -> tuple[int, bytes | None]:
    (row,) = connection.execute(sql, values).fetchall()  # all, which ends the read transaction
    last, page = row
    return last, page


def _begin_execution(run: str, task_id: int, owner: str, connection: sqlite3.Connection) -> None:
    with _transaction(connection):
        connection.execute("INSERT INTO executions (run, task_id, owner) VALUES (?, ?, ?)", (run, task_id, owner))
        older = f"SELECT number {_EXECUTIONS} LIMIT -1 OFFSET ?"
        connection.execute(f"DELETE FROM executions WHERE number IN ({older})", (task_id, owner, MAX_EXECUTIONS))


def _executions(task_id: int, owner: str, connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute(f"SELECT run {_EXECUTIONS}", (task_id, owner)).fetchall()
    return [run for (run,) in rows]


def _session(owner: str, id: str, connection: sqlite3.Connection) -> list[Exchange]:
    sql = "SELECT exchanges FROM sessions WHERE owner = ? AND id = ? AND used > ?"
    rows = connection.execute(sql, (owner, id, time.time() - MAX_SESSION_AGE_S)).fetchall()
    return msgspec.json.decode(rows[0][0], type=list[Exchange]) if rows else []


def _add_exchange(owner: str, id: str, exchange: Exchange, connection: sqlite3.Connection) -> None:
    now = time.time()
    with _transaction(connection):
        exchanges = bounded([*_session(owner, id, connection), exchange])
        values = (owner, id, now, msgspec.json.encode(exchanges).decode())
        connection.execute("INSERT OR REPLACE INTO sessions (owner, id, used, exchanges) VALUES (?, ?, ?, ?)", values)
        connection.execute("DELETE FROM sessions WHERE used <= ?", (now - MAX_SESSION_AGE_S,))
        over = "SELECT rowid FROM sessions WHERE owner = ? ORDER BY used DESC, rowid DESC LIMIT -1 OFFSET ?"
        connection.execute(f"DELETE FROM sessions WHERE rowid IN ({over})", (owner, MAX_SESSIONS))


def bounded(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """The newest exchanges that fit; the newest is cut."""
    half = MAX_SESSION_CHARS // 2
    newest = Exchange(_cut(exchanges[-1].question, half), _cut(exchanges[-1].answer, half))
    kept, left = [newest], MAX_SESSION_CHARS - len(newest.question) - len(newest.answer)
    for exchange in reversed(exchanges[-MAX_EXCHANGES:-1]):
        left -= len(exchange.question) + len(exchange.answer)
        if left < 0:
            break
        kept.append(exchange)
    return kept[::-1]


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 1] + "\u2026"


def _search(wanted: Filter, limit: int, today: date, connection: sqlite3.Connection) -> tuple[int, list[Task]]:
    source, values = _matching(wanted, today)
    order = "tasks.due IS NULL, tasks.due, tasks.id" if wanted.words is None else "words.rank, tasks.id"
    columns = ", ".join(COLUMNS).replace("description", "substr(description, 1, :chars)")
    # Sort numbers only, then read the few rows.
    found = f"SELECT tasks.id AS found, count(*) OVER () AS total, row_number() OVER (ORDER BY {order}) AS place"
    sql = f"""SELECT total, {columns} FROM ({found} FROM {source} ORDER BY place LIMIT :rows)
        CROSS JOIN tasks ON tasks.id = found ORDER BY place"""
    rows = connection.execute(sql, {**values, "rows": limit, "chars": FOUND_CHARS}).fetchall()
    return (rows[0][0] if rows else 0), [Task(*row[1:]) for row in rows]


def _count(wanted: Filter, by: Grouping | None, today: date, connection: sqlite3.Connection) -> dict[str, int]:
    source, values = _matching(wanted, today)
    if by is None:
        return {"all": connection.execute(f"SELECT count(*) FROM {source}", values).fetchall()[0][0]}
    sql = f"SELECT {_GROUPS[by]}, count(*) FROM {source} GROUP BY 1 ORDER BY 1"
    return {str(name): number for name, number in connection.execute(sql, values).fetchall()}


def _matching(wanted: Filter, today: date) -> tuple[str, dict[str, Any]]:
    """The text after FROM, and its values."""
    source, where = "tasks", ["TRUE"]
    words = _quoted(wanted.words or "", " OR " if wanted.any_word else " ", MAX_WORDS)
    if wanted.words is not None:
        source = "words CROSS JOIN tasks ON tasks.id = words.rowid"
        where.append("words MATCH :words")
    if wanted.status is not None:
        where.append("tasks.status = :status")
    if wanted.priority is not None:
        where.append("tasks.priority = :priority")
    if wanted.due == "week":
        where.append(f"{_DUE} IN ('today', 'week')")
    elif wanted.due is not None:
        where.append(f"{_DUE} = :due")
    values = {"words": words, "status": wanted.status, "priority": wanted.priority, "due": wanted.due}
    return f"{source} WHERE {' AND '.join(where)}", {**values, "today": today.isoformat()}


def _quoted(text: str, between: str = " ", most: int | None = None) -> str:
    """Every word quoted, so that none is an operator (https://www.sqlite.org/fts5.html, 3.1)."""
    words = text.replace("\0", " ").split()[:most]
    return between.join('"' + word.replace('"', '""') + '"' for word in words or [""])
