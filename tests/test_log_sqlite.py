"""What is SQLite's own in the event log: the file, its lock, its writer, and what they withstand."""

import gzip
import logging
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import pytest
from anyio.lowlevel import checkpoint

import ssecore.log
import ssecore.log.sqlite
from ssecore.errors import LogError, LogUnavailable, SSEAppError, WriterFenced
from ssecore.log import Cursor, Gap, Log, Retention, framed, locate, new_epoch
from ssecore.log.facts import cost
from ssecore.log.sqlite import SqliteLog
from tests.house import remount
from tests.needs import needs
from tests.test_log import Clock, Watched, everything, facts, frame, run, texts, topic

ROOT: Final = Path(__file__).parent.parent
MIB: Final = 1024 * 1024
VERSION_1: Final = ROOT / "tests" / "data" / "log-version-1.db.gz"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "log.sqlite"


def filled(path: Path) -> dict[str, Path]:
    """A log with a run of 300 events in 100 rows, closed properly."""

    async def fill() -> None:
        log = SqliteLog(path)
        async with log.running():
            epoch = await run(log)
            for number in range(100):
                await log.append("run", [frame(f"{number} {'x' * 300}")] * 3, epoch=epoch)

    anyio.run(fill)
    return {entry.name: entry for entry in path.parent.iterdir()}


def content(path: Path) -> bytes:
    return path.read_bytes()


def size(path: Path) -> int:
    return path.stat().st_size


async def written(log: Log, stream: str) -> list[str]:
    return texts(await everything(log, stream, max_bytes=MIB))


# Processes

KEEPER: Final = """
import sys, anyio
from ssecore.log import new_epoch
from ssecore.log.facts import cost
from ssecore.log.sqlite import SqliteLog
from ssecore.wire import Event, encode

async def append(log, stream, epoch, name):
    for number in range(1_000_000):
        data = [f"{name} {number} {part}" for part in range(3)]
        last = await log.append(stream, [encode(Event(one)) for one in data], epoch=epoch)
        print(stream, last, *data, sep=":", flush=True)

async def main():
    log = SqliteLog(sys.argv[1])
    async with log.running(), anyio.create_task_group() as group:
        print("ready", flush=True)
        if "append" in sys.argv:
            for stream in ("one", "two"):
                await log.create(stream, epoch=(epoch := new_epoch()))
                for name in range(4):
                    group.start_soon(append, log, stream, epoch, name)
        else:
            await anyio.sleep_forever()

anyio.run(main)
"""


@contextmanager
def keeper(path: Path, *arguments: str) -> Iterator[tuple[int, Iterator[str]]]:
    """Another process that has the log open; gives its pid and its lines after `ready`. Killed at the end."""
    command = [sys.executable, "-c", KEEPER, str(path), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            yield process.pid, (line.rstrip("\n") for line in process.stdout)
        finally:
            process.kill()


def test_what_was_acknowledged_is_there_after_a_sigkill(path: Path) -> None:
    with keeper(path, "append") as (pid, lines):
        acknowledged = [next(lines) for _ in range(500)]
        os.kill(pid, signal.SIGKILL)
        acknowledged += [line for line in lines if line.count(":") == 4]

    async def check() -> None:
        log = SqliteLog(path)
        async with log.running():
            whole = {stream: await written(log, stream) for stream in ("one", "two")}
            for line in acknowledged:
                stream, last, *data = line.split(":")
                assert whole[stream][int(last) - 3 : int(last)] == data
            assert [stat.stream for stat in await log.unfinished()] == ["one", "two"]
            for stat in await log.unfinished():
                assert stat.last == len(whole[stat.stream])
                assert stat.size == sum(len(row.body) for row in await everything(log, stat.stream))
                assert await log.find(epoch=stat.epochs[0][0]) == stat
                await log.open(stat.stream, epoch := new_epoch())
                assert await log.append(stat.stream, [frame("end")], epoch=epoch, close=True) == stat.last + 1
            assert await log.unfinished() == []

    anyio.run(check)


async def test_a_second_process_is_refused_and_told_of_the_first(path: Path) -> None:
    with keeper(path) as (pid, _):
        with pytest.raises(LogError, match=f"in use by process {pid}: stop it"):
            async with SqliteLog(path).running():
                pytest.fail("entered")
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                log = SqliteLog(path, lock_wait_s=30)

                async def enter() -> None:
                    async with log.running():
                        await run(log)

                group.start_soon(enter)
                await checkpoint()
                os.kill(pid, signal.SIGKILL)


async def test_in_one_process_the_file_is_opened_once_and_again_when_closed(path: Path) -> None:
    first, second = SqliteLog(path), SqliteLog(path)
    async with first.running():
        with pytest.raises(LogError, match=f"in use by process {os.getpid()}"):
            async with second.running():
                pytest.fail("entered")
        epoch = await run(first)
    async with second.running():
        assert await second.append("run", [frame("a")], epoch=epoch) == 1
    async with first.running():
        assert await written(first, "run") == ["a"]


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_on_trio_too_what_was_appended_is_read(path: Path, anyio_backend: str) -> None:
    log = SqliteLog(path)
    async with log.running():
        epoch = await run(log)
        for number in range(3):
            assert await log.append("run", [frame(str(number))], epoch=epoch, close=number == 2) == number + 1
        assert await written(log, "run") == ["0", "1", "2"]
        with pytest.raises(WriterFenced):
            await log.append("run", [frame("late")], epoch=epoch)


async def test_nothing_works_outside_of_running(path: Path) -> None:
    log = SqliteLog(path)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: run(log),
        lambda: log.append("run", [frame("a")], epoch=new_epoch()),
        lambda: log.read("run", 0, 1000),
        lambda: log.stat("run"),
    ]
    for _ in range(2):
        for call in calls:
            with pytest.raises(LogUnavailable):
                await call()
        async with log.running():
            await log.delete("run")


@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_was_asked_for_before_the_end_is_done(
    path: Path, cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssecore.log.writer, "_MAX_COMMIT_BYTES", 1)
    log = SqliteLog(path)
    done: list[int] = []

    async def append() -> None:
        done.append(await log.append("run", [frame("a")], epoch=epoch))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                async with log.running():
                    epoch = await run(log)
                    for _ in range(20):
                        group.start_soon(append)
                    await checkpoint()
                    if cancelled:
                        scope.cancel()
    assert sorted(done) == list(range(1, 21))
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["log.sqlite", "log.sqlite.lock"]


# The file


def foreign(path: Path, application_id: int = 0) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"PRAGMA application_id = {application_id}; CREATE TABLE precious (data); ")


def empty(path: Path) -> None:
    path.touch()


def newer(path: Path) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def damaged(path: Path) -> None:
    filled(path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (path.stat().st_size - 4096))


def truncated(path: Path) -> None:
    filled(path)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda path: path.write_text("a letter to my aunt\n" * 10), "is not a SQLite file: move it away"),
        (lambda path: path.write_bytes(b"\0" * 5000), "is not a SQLite file: move it away"),
        (lambda path: path.write_bytes(b"SQLite format 3\0"), "is another program's database: move it away"),
        (foreign, "is another program's database: move it away"),
        (lambda path: foreign(path, 0x12345678), "is another program's database: move it away"),
        (newer, "has version 99, and this program knows up to 3: start the newer program"),
        (damaged, r"is damaged \(.+\): put a copy of it back"),
        (truncated, r"is damaged \(.+\): put a copy of it back"),
    ],
    ids=["text", "zeros", "a header alone", "foreign", "foreign with an id", "newer", "damaged", "truncated"],
)
async def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(
    path: Path, spoil: Callable[[Path], object], text: str
) -> None:
    path.parent.mkdir()
    await anyio.to_thread.run_sync(spoil, path)
    before = content(path)
    for _ in range(2):
        with pytest.raises(LogError, match=text):
            async with SqliteLog(path).running():
                pytest.fail("entered")
    assert content(path) == before
    assert {entry.name for entry in path.parent.iterdir()} == {"log.sqlite", "log.sqlite.lock"}


async def test_a_path_that_can_not_be_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "file" / "log.sqlite"):
        with pytest.raises(LogError, match="can't be"):
            async with SqliteLog(path).running():
                pytest.fail("entered")


async def test_an_empty_file_becomes_a_log_and_an_older_version_the_newest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    empty(path)
    log = SqliteLog(path)
    async with log.running():
        await run(log)
    steps = (*ssecore.log.sqlite._MIGRATIONS, "CREATE TABLE added (n); INSERT INTO added VALUES (7)")
    monkeypatch.setattr(ssecore.log.sqlite, "_MIGRATIONS", steps)
    async with log.running():
        assert await log.stat("run")
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT n FROM added").fetchall() == [(7,)]
        assert db.execute("PRAGMA user_version").fetchone() == (len(steps),)
        assert db.execute("PRAGMA quick_check").fetchall() == [("ok",)]


async def test_topics_without_events_of_a_file_that_kept_them_for_ever_are_forgotten(path: Path) -> None:
    clock = Clock()
    log = SqliteLog(path, clock=clock)
    async with log.running():
        await topic(log, "empty")
        epoch = await topic(log, "kept")
        await log.append("kept", [frame("a")], epoch=epoch)
        await run(log)
    with closing(sqlite3.connect(path)) as db:
        db.executescript("UPDATE streams SET due = NULL; DROP TABLE accounts; PRAGMA user_version = 1")
    clock.now += ssecore.log.facts.EMPTY_TOPIC_S
    async with log.running():
        await log.upkeep()
        assert [await log.stat(name) is not None for name in ("empty", "kept", "run")] == [False, True, True]


async def test_what_owners_use_is_counted_in_a_file_that_did_not_count_it(path: Path) -> None:
    log = SqliteLog(path)
    async with log.running():
        for number in range(3):
            epoch = await run(log, f"run {number}", owner="ann")
            await log.append(f"run {number}", [frame("x" * 100_000)], epoch=epoch, close=True)
    with closing(sqlite3.connect(path)) as db:
        db.executescript("DROP TABLE accounts; PRAGMA user_version = 1")
    log = SqliteLog(path, max_bytes=2_500_000)
    async with log.running():
        await log.upkeep()
        assert [await log.stat(f"run {number}") is not None for number in range(3)] == [False, True, True]
        for number in range(3):
            await log.delete(f"run {number}")
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM accounts").fetchone() == (0,)


def first_version(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(gzip.decompress(VERSION_1.read_bytes()))


async def test_a_file_of_the_first_version_is_read_and_goes_on(path: Path) -> None:
    """Written by commit d856a06 (version 1): `ended` and `open` are ann's runs, `topic` keeps two of four events,
    `empty` none, and a deleted stream has left its row behind."""
    first_version(path)
    log = SqliteLog(path, clock=lambda: 1_700_000_100.0, upkeep_s=3600)
    async with log.running():
        ended, open = await facts(log, "ended"), await facts(log, "open")
        assert (ended.last, ended.size, ended.closed, ended.meta) == (3, 27, True, {"state": "completed"})
        assert await log.find(key="k") == await log.find(epoch="E" * 22) == ended
        assert (open.last, open.size, open.updated, open.retention.age_s) == (3, 31, 1_700_000_008.0, 60)
        assert await log.unfinished() == [open] and await log.runs("ann", 9) == [open, ended]
        assert await written(log, "open") == ["1", "2", "three"]
        assert await log.append("open", [frame("end")], epoch="O" * 22, close=True) == 4
        assert (await log.publish("topic", [frame(4)], retention=Retention(events=2))).seq == 5
        assert await written(log, "topic") == ["3", "4"]
        assert locate(await facts(log, "topic"), Cursor("T" * 22, 4)) == (4, None)
        await log.upkeep()
        assert await log.stat("empty") is not None
        assert await log.delete("ended") and await log.delete("open")
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM accounts").fetchone() == (0,)
        assert db.execute("PRAGMA quick_check").fetchall() == [("ok",)]


async def test_the_facts_of_an_open_run_that_a_crash_left_are_those_of_its_rows(path: Path) -> None:
    """And its owner pays for all of it once it is closed: until then what the file says of it is behind."""
    clock = Clock()
    log, copy = SqliteLog(path, clock=clock), path.with_suffix(".copy")
    async with log.running():
        epoch = await run(log, owner="ann")
        for size in (10, 200_000, 20):
            clock.now += 1
            await log.append("run", [frame("x" * size)] * 2, epoch=epoch)
        before = await facts(log, "run")
        with closing(sqlite3.connect(path)) as db, closing(sqlite3.connect(copy)) as other:
            assert db.execute("SELECT last < 6 FROM streams").fetchone() == (1,)
            db.backup(other)
    log = SqliteLog(copy, clock=clock)
    async with log.running():
        assert await log.unfinished() == [await facts(log, "run")] == [before]
        assert await log.append("run", [frame("end")], epoch=epoch, close=True) == 7
        bytes = cost(await facts(log, "run"))
    with closing(sqlite3.connect(copy)) as db:
        assert db.execute("SELECT bytes FROM accounts").fetchone() == (bytes,)
        assert db.execute("SELECT last, size FROM streams").fetchone() == (7, before.size + len(frame("end")))


async def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await anyio.to_thread.run_sync(filled, path)
    before = content(path)
    steps = (*ssecore.log.sqlite._MIGRATIONS, "CREATE TABLE added (n); INSERT INTO missing VALUES (7)")
    with monkeypatch.context() as patch:
        patch.setattr(ssecore.log.sqlite, "_MIGRATIONS", steps)
        with pytest.raises(LogError, match="no such table: missing"):
            async with SqliteLog(path).running():
                pytest.fail("entered")
    assert content(path) == before


async def test_a_copy_put_back_from_before_has_diverged(path: Path) -> None:
    log = SqliteLog(path)
    async with log.running():
        first = await topic(log)
        for number in range(1, 6):
            await log.append("topic", [frame(number)], epoch=first)
    copy = shutil.copy(path, path.with_suffix(".copy"))
    async with log.running():
        await log.open("topic", second := new_epoch())
        for number in range(6, 9):
            await log.append("topic", [frame(number)], epoch=second)
    shutil.copy(copy, path)
    async with log.running():
        stat = await log.open("topic", third := new_epoch())
        assert locate(stat, Cursor(first, 5)) == (5, None)
        assert locate(stat, Cursor(first, 6)) == (5, Gap("diverged", 6, 6)), "the first writer went on"
        assert locate(stat, Cursor(second, 8)) == (0, Gap("expired", 9)), "its epoch is not in the copy"
        assert await log.append("topic", [frame("other")], epoch=third) == 6
        assert await written(log, "topic") == ["1", "2", "3", "4", "5", "other"]


# The writer


async def test_appends_that_meet_are_one_row_and_one_commit(path: Path) -> None:
    log = SqliteLog(path)
    async with log.running():
        epochs = {name: await topic(log, name) for name in "ab"}
        watched = Watched(log, "a")
        async with anyio.create_task_group() as group:
            for _ in range(100):
                for name, epoch in epochs.items():
                    group.start_soon(append_one, log, name, epoch)
        assert [len(row.ends) for row in watched.rows] == [100]
        assert watched.rows == await everything(log, "a")


async def append_one(log: Log, stream: str, epoch: str, size: int = 1) -> None:
    await log.append(stream, [frame("x" * size)], epoch=epoch)


async def test_a_row_grows_to_a_bound_only(path: Path) -> None:
    log = SqliteLog(path)
    async with log.running():
        epoch = await topic(log)
        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(append_one, log, "topic", epoch, 10_000)
        rows = await everything(log, "topic")
        assert len(rows) > 10 and all(len(row.body) <= 65_536 for row in rows)
        assert rows[-1].last == 100


async def test_an_appended_row_reads_the_same_however_it_is_looked_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The facts of a stream that are kept in memory, and those in the file, are the same."""
    monkeypatch.setattr(ssecore.log.sqlite, "_MAX_KNOWN", 2)
    clock = Clock()
    log = SqliteLog(path, clock=clock)
    async with log.running():
        epochs = {f"run {n}": await run(log, f"run {n}", owner="ann", meta={"n": n}) for n in range(6)}
        for _ in range(3):
            for name, epoch in epochs.items():
                clock.now += 0.1
                await log.append(name, [frame(name)], epoch=epoch)
                assert await log.stat(name) == await log.find(epoch=epoch)
        listed = {stat.stream: stat for stat in await log.runs("ann", 10)}
    async with log.running():
        assert listed == {name: await log.stat(name) for name in epochs}
        assert [stat.last for stat in listed.values()] == [3] * 6


async def test_full_sync_is_said_to_sqlite(path: Path) -> None:
    log = SqliteLog(path, full_sync=True)
    async with log.running():
        assert log.connection
        assert log.connection.execute("PRAGMA synchronous").fetchone() == (2,)
        epoch = await run(log)
        assert await log.append("run", [frame("a")], epoch=epoch) == 1


@contextmanager
def statements(log: SqliteLog, delay_s: float = 0.0) -> Iterator[list[tuple[str, bool]]]:
    """What the writer executes, by its first word or pragma, and whether on the event loop. Each takes `delay_s`."""
    found: list[tuple[str, bool]] = []
    loop, writer = threading.get_ident(), log.connection
    assert writer

    def trace(statement: str) -> None:
        words = statement.replace("(", " ").split()
        found.append((words[words[0] == "PRAGMA"], threading.get_ident() == loop))
        time.sleep(delay_s)

    writer.set_trace_callback(trace)
    try:
        yield found
    finally:
        writer.set_trace_callback(None)


async def test_a_small_commit_is_made_on_the_loop_and_a_large_one_and_upkeep_are_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssecore.log.sqlite, "_SLOW_S", math.inf)  # this machine may be busy
    log = SqliteLog(path, upkeep_s=3600)
    async with log.running():
        epoch = await run(log)
        with statements(log) as found:
            await log.append("run", [frame("small")], epoch=epoch)
            assert found[-1] == ("INSERT", True)
            found.clear()
            await log.append("run", [frame("x" * 200_000)], epoch=epoch)
            await log.upkeep()
            assert found and not any(on_loop for _, on_loop in found)
        assert len(await written(log, "run")) == 2


async def test_with_full_sync_the_loop_commits_nothing(path: Path) -> None:
    log = SqliteLog(path, full_sync=True)
    async with log.running():
        epoch = await run(log)
        with statements(log) as found:
            await log.append("run", [frame("a")], epoch=epoch)
        assert ("INSERT", False) in found and not any(on_loop for _, on_loop in found)


async def test_a_checkpoint_and_the_commit_behind_it_are_not_made_on_the_loop(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sync a file."""
    monkeypatch.setattr(ssecore.log.sqlite, "_SLOW_S", math.inf)
    monkeypatch.setattr(ssecore.log.sqlite, "_CHECKPOINT_PAGES", 500)
    log = SqliteLog(path, upkeep_s=3600)
    async with log.running():
        epoch = await run(log)
        with statements(log) as found:
            for _ in range(1000):
                await log.append("run", [frame("x" * 100)], epoch=epoch)
        checkpoints = [number for number, (statement, _) in enumerate(found) if statement == "wal_checkpoint"]
        assert len(checkpoints) > 1
        for number in checkpoints[:-1]:
            assert found[number : number + 2] == [("wal_checkpoint", False), ("INSERT", False)]
        assert sum(on_loop for statement, on_loop in found if statement == "INSERT") > 900


async def test_most_of_the_wal_is_copied_while_the_loop_commits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssecore.log.sqlite, "_SLOW_S", math.inf)
    log = SqliteLog(path, upkeep_s=3600)
    async with log.running():
        epoch = await run(log)
        with statements(log) as found:
            while ("INSERT", False) not in found:  # it goes to the thread, and the checkpoint behind it
                await log.append("run", [frame("x" * 50_000)], epoch=epoch)
            await log.upkeep()  # waits for the thread
            assert size(path) > MIB
            assert "wal_checkpoint" not in dict(found), "the writer's connection had nothing to do with it"
            found.clear()
            await log.append("run", [frame("small")], epoch=epoch)
            assert found[-1] == ("INSERT", True)


async def test_a_disk_that_hangs_holds_the_loop_up_once(path: Path) -> None:
    log = SqliteLog(path, upkeep_s=3600)
    async with log.running():
        epoch = await run(log)
        with statements(log, delay_s=0.02) as found:
            for number in range(5):
                await log.append("run", [frame(str(number))], epoch=epoch)
        assert [on_loop for statement, on_loop in found if statement == "INSERT"] == [True, False, False, False, False]


async def test_another_programs_lock_does_not_hold_the_loop_up(path: Path) -> None:
    log = SqliteLog(path, upkeep_s=3600)
    async with log.running():
        epoch = await run(log)
        with closing(sqlite3.connect(path, isolation_level=None)) as other, statements(log) as found:
            other.execute("BEGIN IMMEDIATE")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(log.append, "run", [frame("a")], epoch=epoch))
                while not found:
                    await checkpoint()
                other.execute("ROLLBACK")
        assert [on_loop for statement, on_loop in found if statement == "INSERT"] == [True, False]
        assert await written(log, "run") == ["a"]


async def test_a_failing_transaction_fails_its_appends_and_nothing_else(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = SqliteLog(path)
    failures: list[LogUnavailable] = []

    async def append(text: str) -> None:
        try:
            await log.append("run", [frame(text)], epoch=epoch, close=True)
        except LogUnavailable as error:
            failures.append(error)

    async with log.running():
        epoch = await run(log)
        watched = Watched(log, "run")
        await log.append("run", [frame("before")], epoch=epoch)
        assert log.connection
        log.connection.execute("PRAGMA query_only = ON")
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(append, "lost")
        with pytest.raises(LogUnavailable):
            await log.create("other", epoch=new_epoch())
        assert len(failures) == 10
        assert failures[0].detail == (
            "the event log can't be written at the moment: attempt to write a readonly database"
        )
        assert failures[0].headers == {"Retry-After": "5"}
        assert await written(log, "run") == ["before"]
        assert (await facts(log, "run")).last == 1
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1 and str(path) in errors[0].getMessage(), "said once, with the path"

        log.connection.execute("PRAGMA query_only = OFF")
        assert await log.append("run", [frame("after")], epoch=epoch) == 2
        assert "is written again" in caplog.text
        assert texts(watched.rows) == await written(log, "run") == ["before", "after"]


async def test_after_a_failed_transaction_nothing_that_was_posted_behind_it_is_stored(path: Path) -> None:
    log = SqliteLog(path)
    told: list[tuple[int, bool]] = []
    over = anyio.Event()

    def tell(size: int, error: SSEAppError | None) -> None:
        told.append((size, error is None))
        if len(told) == 3:
            over.set()

    async with log.running():
        epoch = await run(log)
        writer = log.writer("run", epoch, tell)
        writer.post([frame("a")], 1)
        while not told:
            await checkpoint()
        assert log.connection
        log.connection.execute("PRAGMA query_only = ON")
        writer.post([frame("b")], 2)
        while not log._commits._in_flight:
            await checkpoint()
        writer.post([frame("c")], 4)
        await over.wait()
        log.connection.execute("PRAGMA query_only = OFF")
        assert told == [(1, True), (2, False), (4, False)]
        assert await log.append("run", [frame("end")], epoch=epoch, close=True) == 2
        assert await written(log, "run") == ["a", "end"]


async def test_a_bug_in_a_transaction_leaves_nobody_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = SqliteLog(path)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("with a secret in it")

    with anyio.fail_after(10):
        async with log.running():
            epoch = await run(log)
            with monkeypatch.context() as patch:
                patch.setattr(ssecore.log.ledger, "appended", fail)
                with pytest.raises(LogUnavailable, match=r"moment: internal error$"):
                    await log.append("run", [frame("a")], epoch=epoch)
            assert await log.append("run", [frame("a")], epoch=epoch) == 1


async def test_a_reader_that_fails_says_so_and_the_next_one_works(path: Path) -> None:
    log = SqliteLog(path)
    async with log.running():
        epoch = await run(log)
        await log.append("run", [frame("a")], epoch=epoch)
        assert await written(log, "run") == ["a"]
        (reader,) = log._idle
        reader.execute("ATTACH ':memory:' AS other")
        reader.execute("PRAGMA query_only = OFF")
        reader.execute("CREATE TEMP TABLE streams (n)")
        with pytest.raises(LogUnavailable, match="can't be read at the moment: no such column"):
            await log.read("run", 0, 1000)
        reader.execute("DROP TABLE temp.streams")
        assert await written(log, "run") == ["a"]


async def test_a_file_that_another_program_locks_for_some_seconds_is_waited_for(path: Path) -> None:
    log = SqliteLog(path)
    async with log.running():
        epoch = await run(log)
        await log.append("run", [frame("a")], epoch=epoch)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:
                    for text in ("b", "c"):
                        tasks.start_soon(partial(log.append, "run", [frame(text)], epoch=epoch))
                    await anyio.sleep(3.5)
                    assert await written(log, "run") == ["a"]
                    other.execute("ROLLBACK")
        assert await written(log, "run") == ["a", "b", "c"]


async def test_who_waits_for_a_locked_file_while_the_service_stops_is_told(path: Path) -> None:
    log = SqliteLog(path)
    failures: list[LogUnavailable] = []

    async def append() -> None:
        with pytest.raises(LogUnavailable, match="about to stop") as caught:
            await log.append("run", [frame("lost")], epoch=epoch)
        failures.append(caught.value)

    with anyio.fail_after(30):
        async with log.running():
            epoch = await run(log)
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                async with anyio.create_task_group() as group:
                    group.start_soon(append)
                    await anyio.wait_all_tasks_blocked()
                    for _ in range(3):  # behind the transaction that waits for the lock
                        group.start_soon(append)
                    await anyio.wait_all_tasks_blocked()
                    log.give_up()
                assert len(failures) == 4
                await append()
                other.execute("ROLLBACK")


# Disks


@needs("tmpfs")
async def test_on_a_full_disk_appends_fail_reads_go_on_and_with_room_it_goes_on(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * MIB)
    log = SqliteLog(small_disk / "log.sqlite")
    async with log.running():
        epoch = await run(log)
        watched = Watched(log, "run")
        acknowledged: list[str] = []
        with pytest.raises(LogUnavailable) as caught:
            for number in range(1000):
                await log.append("run", [frame(text := f"{number} {'x' * 10_000}")], epoch=epoch)
                acknowledged.append(text)
        assert "database or disk is full" in caught.value.detail
        assert str(small_disk) not in caught.value.detail
        for _ in range(3):
            with pytest.raises(LogUnavailable):
                await log.append("run", [frame("x" * 100_000)], epoch=epoch)
        assert len(acknowledged) > 50
        assert await written(log, "run") == acknowledged

        ballast.unlink()
        assert await log.append("run", [frame("room")], epoch=epoch, close=True) == len(acknowledged) + 1
        assert texts(watched.rows) == await written(log, "run") == [*acknowledged, "room"]
        with pytest.raises(WriterFenced):
            await log.append("run", [frame("late")], epoch=epoch)
    async with log.running():
        assert await written(log, "run") == [*acknowledged, "room"]


@needs("tmpfs")
async def test_a_folder_that_can_not_be_written_is_refused(small_disk: Path) -> None:
    path = small_disk / "log.sqlite"
    log = SqliteLog(path)
    async with log.running():
        await run(log)
    before = content(path)
    remount(small_disk, "ro")
    with pytest.raises(LogError, match=r"the folder of the event log .* can't be written: Read-only file system"):
        async with log.running():
            pytest.fail("entered")
    remount(small_disk, "rw")
    assert content(path) == before
    async with log.running():
        assert await log.stat("run")


# Retention


@needs("time")
async def test_the_file_stays_small_while_a_million_events_pass_through(path: Path) -> None:
    """With readers at work all the time, who get every event or are told from where on."""
    log = SqliteLog(path, upkeep_s=0.05)
    kept, batch = 8 * MIB, [frame("x" * 50)] * 1000
    sizes: list[int] = []
    done = False

    async def read() -> None:
        after = 0
        while not done:
            for row in await log.read("topic", after, 256 * 1024):
                after = row.last
                assert framed(row, after - 1)

    async with log.running():
        epoch = await topic(log, bytes=kept)
        async with anyio.create_task_group() as readers:
            readers.start_soon(read)
            readers.start_soon(read)
            for number in range(1000):
                assert await log.append("topic", batch, epoch=epoch) == (number + 1) * 1000
                if number % 20 == 0:
                    sizes.append(size(path))
                    assert size(path.with_name("log.sqlite-wal")) < 24 * MIB
            done = True
        stat = await facts(log, "topic")
        assert kept - len(b"".join(batch)) < stat.size <= kept
        assert max(sizes) <= 2 * kept
        assert len(await written(log, "topic")) == stat.last - stat.first + 1

        await log.open("topic", new_epoch(), retention=Retention(bytes=0))
        await log.upkeep()
    assert size(path) < 2 * MIB, "what has been given up is given back"


async def test_the_wal_is_taken_into_the_file_before_it_is_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssecore.log.sqlite, "_CHECKPOINT_PAGES", 64)
    log = SqliteLog(path)
    async with log.running():
        epoch = await run(log)
        for _ in range(50):
            await log.append("run", [frame("x" * 60_000)], epoch=epoch)
            assert size(path.with_name("log.sqlite-wal")) < MIB // 2


async def test_an_idle_log_gives_its_wal_back(path: Path) -> None:
    wal = path.with_name("log.sqlite-wal")
    log = SqliteLog(path, upkeep_s=3600)
    async with log.running():
        epoch = await run(log)
        for _ in range(2):
            await log.append("run", [frame("x" * 60_000)], epoch=epoch)
            await log.upkeep()
            assert size(wal) > 60_000, "it was written to since the upkeep before"
        with closing(sqlite3.connect(path)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM rows").fetchall()
            with anyio.fail_after(4):  # nothing waits for another program's reader
                await log.upkeep()
        await log.append("run", [frame("y")], epoch=epoch)
        for _ in range(3):  # the third waits for what the second began
            await log.upkeep()
        assert size(wal) == 0
        assert await log.append("run", [frame("z")], epoch=epoch) == 4
        assert len(await written(log, "run")) == 4


async def test_a_large_run_is_deleted_step_by_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssecore.log.sqlite, "_STEP_ROWS", 10)
    clock = Clock()
    log = SqliteLog(path, clock=clock, upkeep_s=3600)
    async with log.running():
        for name in ("one", "two"):
            epoch = await run(log, name, retention=Retention(age_s=60))
            for _ in range(95):
                await log.append(name, [frame("x" * 3000)], epoch=epoch)
            await log.append(name, [frame("end")], epoch=epoch, close=True)
        clock.now += 60
        await log.delete("one")
        await log.upkeep()
        assert await log.stat("two") is None
    with closing(sqlite3.connect(path)) as db:
        for table in ("streams", "epochs", "rows", "garbage"):
            assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table


async def test_a_deletion_that_was_cut_off_is_finished_at_the_next_start(path: Path) -> None:
    log = SqliteLog(path, upkeep_s=3600)
    async with log.running():
        epoch = await run(log)
        await log.append("run", [frame("a")], epoch=epoch)
        await log.delete("run")
    log = SqliteLog(path, upkeep_s=3600)
    async with log.running():
        await log.upkeep()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM rows").fetchone() == (0,)
