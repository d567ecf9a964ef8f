"""The database of tasks and sessions by itself: older files, and what an agent keeps in it and asks of it."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers import database
from handlers.database import Exchange, Filter, NewTask, Tasks, open_tasks

LIMIT_S: Final = 20

#: A file as the first version of this program made it, with a row.
VERSION_1: Final = """
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    description TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('open', 'doing', 'done')),
    priority INTEGER NOT NULL CHECK (priority BETWEEN 1 AND 5),
    due TEXT,
    created TEXT NOT NULL
);
CREATE INDEX tasks_by_status ON tasks (status, id);
CREATE VIRTUAL TABLE words USING fts5 (title, description, content='tasks', content_rowid='id');
CREATE TRIGGER words_insert AFTER INSERT ON tasks BEGIN
    INSERT INTO words (rowid, title, description) VALUES (new.id, new.title, new.description);
END;
CREATE TRIGGER words_delete AFTER DELETE ON tasks BEGIN
    INSERT INTO words (words, rowid, title, description) VALUES ('delete', old.id, old.title, old.description);
END;
CREATE TRIGGER words_update AFTER UPDATE OF id, title, description ON tasks BEGIN
    INSERT INTO words (words, rowid, title, description) VALUES ('delete', old.id, old.title, old.description);
    INSERT INTO words (rowid, title, description) VALUES (new.id, new.title, new.description);
END;
PRAGMA application_id = 0x73736561;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
INSERT INTO tasks (title, description, status, priority, due, created)
    VALUES ('Kept', 'through the years', 'doing', 2, '2026-12-31', '2026-11-20T10:00:00Z');
"""


@asynccontextmanager
async def database_of(folder: Path, *rows: NewTask) -> AsyncIterator[Tasks]:
    with anyio.fail_after(LIMIT_S):
        async with open_tasks(folder) as tasks:
            if rows:
                await tasks.insert(rows)
            yield tasks


def schema(path: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name").fetchall()
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        # Without the layout: SQLite keeps a statement as it was written.
        return [("version", str(version)), *((name, " ".join(sql.split())) for name, sql in rows)]


async def test_a_file_of_the_first_version_is_brought_up_to_date_and_keeps_its_rows(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    with closing(sqlite3.connect(old / "tasks.db")) as connection:
        connection.executescript(VERSION_1)
    async with database_of(old) as tasks, database_of(new):
        kept = await tasks.get(1)
        assert kept == (1, "Kept", "through the years", "doing", 2, "2026-12-31", "2026-11-20T10:00:00Z")
        assert [page async for page in tasks.pages(text="years")]
        await tasks.add_exchange(None, "s", Exchange("q", "a"))
    assert schema(old / "tasks.db") == schema(new / "tasks.db")


async def test_an_update_that_fails_leaves_the_older_version_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(tmp_path / "tasks.db")) as connection:
        connection.executescript(VERSION_1)
    before = schema(tmp_path / "tasks.db")
    broken = ("CREATE TABLE half (id INTEGER)", "CREATE TABLE tasks (id INTEGER)")
    monkeypatch.setattr(database, "_VERSIONS", (*database._VERSIONS, broken))
    with pytest.raises(Exception, match="tasks already exists"):
        async with open_tasks(tmp_path):
            pytest.fail("it was opened")
    assert schema(tmp_path / "tasks.db") == before


# Sessions


async def test_a_session_is_there_after_a_restart_and_for_another_replica(tmp_path: Path) -> None:
    async with database_of(tmp_path) as tasks, database_of(tmp_path) as replica:
        await tasks.add_exchange("ann", "s", Exchange("one", "1"))
        await replica.add_exchange("ann", "s", Exchange("two", "2"))
        assert await tasks.session("ann", "s") == [Exchange("one", "1"), Exchange("two", "2")]
    async with database_of(tmp_path) as tasks:
        assert await tasks.session("ann", "s") == [Exchange("one", "1"), Exchange("two", "2")]


async def test_each_owner_has_sessions_of_their_own(tmp_path: Path) -> None:
    async with database_of(tmp_path) as tasks:
        for owner in ("ann", "ben", None):
            assert await tasks.session(owner, "s") == []
            await tasks.add_exchange(owner, "s", Exchange(f"I am {owner}", "hello"))
        for owner in ("ann", "ben", None):
            assert await tasks.session(owner, "s") == [Exchange(f"I am {owner}", "hello")]


async def test_exchanges_at_once_are_all_kept(tmp_path: Path) -> None:
    async with database_of(tmp_path) as tasks, database_of(tmp_path) as replica:
        async with anyio.create_task_group() as group:
            for number in range(8):
                for base in (tasks, replica):
                    group.start_soon(base.add_exchange, None, "s", Exchange(str(number), ""))
        assert sorted(int(kept.question) for kept in await tasks.session(None, "s")) == sorted([*range(8)] * 2)


async def test_a_session_keeps_its_newest_exchanges(tmp_path: Path) -> None:
    async with database_of(tmp_path) as tasks:
        for number in range(database.MAX_EXCHANGES + 5):
            await tasks.add_exchange(None, "s", Exchange(str(number), "é" * 10))
        kept = await tasks.session(None, "s")
        assert [exchange.question for exchange in kept] == [str(n) for n in range(5, database.MAX_EXCHANGES + 5)]

        limit = database.MAX_SESSION_CHARS
        await tasks.add_exchange(None, "s", Exchange("x" * (limit // 2 - 12), "y" * (limit // 2)))
        assert [len(exchange.answer) for exchange in await tasks.session(None, "s")] == [10, limit // 2]

        await tasks.add_exchange(None, "s", Exchange("x" * limit * 10, "y" * limit * 10))
        ((question, answer),) = [(e.question, e.answer) for e in await tasks.session(None, "s")]
        assert len(question) == len(answer) == limit // 2
        assert question.endswith("x…") and answer.endswith("y…")


async def test_an_owners_sessions_are_bounded_and_the_longest_unused_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "MAX_SESSIONS", 3)
    async with database_of(tmp_path) as tasks:
        await tasks.add_exchange("ben", "mine", Exchange("q", "a"))
        for id in ("a", "b", "c", "a", "d"):
            await tasks.add_exchange("ann", id, Exchange("q", id))
        assert [id for id in "abcd" if await tasks.session("ann", id)] == ["a", "c", "d"]
        assert await tasks.session("ben", "mine")


async def test_a_session_that_is_not_used_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    async with database_of(tmp_path) as tasks:
        for id in ("old", "used"):
            await tasks.add_exchange("ann", id, Exchange("q", "a"))
        now += database.MAX_SESSION_AGE_S - 1
        await tasks.add_exchange("ann", "used", Exchange("q", "a"))
        assert len(await tasks.session("ann", "old")) == 1
        now += 1
        assert (await tasks.session("ann", "old"), len(await tasks.session("ann", "used"))) == ([], 2)
        await tasks.add_exchange("ben", "new", Exchange("q", "a"))
        with closing(sqlite3.connect(tmp_path / "tasks.db")) as other:
            assert other.execute("SELECT id FROM sessions ORDER BY id").fetchall() == [("new",), ("used",)]


# Searching and counting

TODAY: Final = date(2026, 11, 21)
ROWS: Final = [
    NewTask("Send the invoice", "to Berlin", "open", 1, "2026-11-20"),
    NewTask("Invoice of May", "Paid late, see the invoice", "done", 2, "2026-05-31"),
    NewTask("Call Berlin", "", "doing", 2, "2026-11-21"),
    NewTask("Write the report", "of the quarter", "open", 3, "2026-11-28"),
    NewTask("Water the flowers", "x" * 1000, "open", 3, "2026-11-29"),
    NewTask("Sleep", "", "open", 5, None),
]


@pytest.fixture
async def filled(tmp_path: Path) -> AsyncIterator[Tasks]:
    async with database_of(tmp_path, *ROWS) as tasks:
        yield tasks


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        (Filter(), [2, 1, 3, 4, 5, 6]),
        (Filter(words="invoice"), [2, 1]),
        (Filter(words="INVOICE berlin"), [1]),
        (Filter(words="invoice berlin", any_word=True), [1, 3, 2]),
        (Filter(words="invoice berlin", any_word=True, status="doing"), [3]),
        (Filter(words="nothing"), []),
        (Filter(words='OR " NOT * NEAR(' + "\0"), []),
        (Filter(words="- invoice"), [2, 1]),
        (Filter(words="- invoice !", any_word=True), [2, 1]),
        (Filter(words="-", any_word=True), []),
        (Filter(words=""), []),
        (Filter(words="invoice " + "no " * database.MAX_WORDS, any_word=True), [2, 1]),
        (Filter(words="no " * database.MAX_WORDS + "invoice", any_word=True), []),
        (Filter(status="open"), [1, 4, 5, 6]),
        (Filter(priority=3, status="open"), [4, 5]),
        (Filter(due="overdue"), [1]),
        (Filter(due="today"), [3]),
        (Filter(due="week"), [3, 4]),
        (Filter(due="later"), [5]),
        (Filter(due="none"), [6]),
        (Filter(due="done"), [2]),
    ],
)
async def test_a_search_finds_what_is_wanted(filled: Tasks, wanted: Filter, ids: list[int]) -> None:
    total, found = await filled.search(wanted, 10, TODAY)
    assert (total, [task.id for task in found]) == (len(ids), ids)
    assert await filled.count(wanted, None, TODAY) == {"all": len(ids)}


async def test_a_search_gives_its_first_rows_with_short_descriptions_and_how_many_there_are(filled: Tasks) -> None:
    total, found = await filled.search(Filter(status="open"), 3, TODAY)
    assert (total, [task.id for task in found]) == (4, [1, 4, 5])
    assert found[0][:6] == (1, "Send the invoice", "to Berlin", "open", 1, "2026-11-20")
    assert found[2].description == "x" * database.FOUND_CHARS


async def test_rows_are_counted_in_groups(filled: Tasks) -> None:
    assert await filled.count(Filter(), "status", TODAY) == {"doing": 1, "done": 1, "open": 4}
    assert await filled.count(Filter(), "priority", TODAY) == {"1": 1, "2": 2, "3": 2, "5": 1}
    days = {"done": 1, "later": 1, "none": 1, "overdue": 1, "today": 1, "week": 1}
    assert await filled.count(Filter(), "due", TODAY) == days
    assert await filled.count(Filter(words="invoice"), "status", TODAY) == {"done": 1, "open": 1}
    assert await filled.count(Filter(words="nothing"), "status", TODAY) == {}


@settings(max_examples=20)
@given(st.lists(st.text(max_size=20), min_size=5, max_size=20), st.booleans())
def test_no_text_is_a_query_that_can_t_be_read(texts: list[str], any_word: bool) -> None:
    async def search() -> None:
        with TemporaryDirectory() as folder:
            async with database_of(Path(folder), *ROWS) as tasks:
                for text in texts:
                    wanted = Filter(words=f"invoice {text}", any_word=any_word)
                    total, _ = await tasks.search(wanted, 1, TODAY)
                    assert total == (await tasks.count(wanted, None, TODAY))["all"]
                    assert total >= 2 or not any_word

    anyio.run(search)
