"""What docs/deploy.md promises of a lost power supply: of every acknowledged event, at any moment, on a disk that keeps
what was synced and any part of the rest.

A program appends to a log (tests/powerloss_writer.py); a preloaded library records each write and each sync of it, and
of Redis (tests/powerloss.c). The power fails at a random point of that record: of each file the disk has what was
synced, and of what was written since none, all, a beginning, or any writes in parts of 512 bytes. A file's being there,
and its name, is taken to be on disk at once.

A seed is a moment and what the disk made of it. SSEAPP_TEST_POWER_LOSSES=1000 tries so many in place of some dozens,
and an eighth of that over Redis.
"""

import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, NamedTuple

import anyio
import pytest

from ssecore.log import Cursor, Log, Retention, framed, locate, new_epoch
from ssecore.log.redis import RedisLog
from ssecore.log.sqlite import SqliteLog
from ssecore.wire import Decoder
from tests.needs import find, needs
from tests.powerloss_writer import text
from tests.redis_server import RedisServer

pytestmark = needs("cc")

SEEDS: Final = int(os.environ.get("SSEAPP_TEST_POWER_LOSSES", "40"))
ROOT: Final = Path(__file__).parent.parent
_HEAD: Final = struct.Struct("=cBQQ")


class Operation(NamedTuple):
    kind: Literal["w", "t", "u", "r", "s"]
    path: str
    offset: int
    data: bytes


class File:
    """What a disk has of a file, and what it was asked for since."""

    def __init__(self, content: bytes | None = None) -> None:
        self.synced = None if content is None else bytearray(content)
        self.since: list[Operation] = []

    def sync(self) -> None:
        for operation in self.since:
            self.synced = applied(self.synced, operation)
        self.since.clear()

    def after_the_loss(self, chance: random.Random, *, in_order: bool) -> bytearray | None:
        content = None if self.synced is None else bytearray(self.synced)
        kept = self.since
        match chance.choice(("none", "all", "beginning", *(() if in_order else ("any", "any")))):
            case "none":
                kept = []
            case "beginning":
                kept = kept[: chance.randrange(len(kept) + 1)]
                if kept and kept[-1].kind == "w":
                    kept[-1] = kept[-1]._replace(data=kept[-1].data[: chance.randrange(len(kept[-1].data) + 1)])
            case "any":
                kept = [part for one in kept for part in torn(one, chance)]
        for operation in kept:
            content = applied(content, operation)
        return content


def torn(operation: Operation, chance: random.Random) -> Iterator[Operation]:
    if operation.kind != "w" or chance.random() < 0.5:
        if chance.random() < 0.7:
            yield operation
        return
    for start in range(0, len(operation.data), 512):
        if chance.random() < 0.7:
            yield operation._replace(offset=operation.offset + start, data=operation.data[start : start + 512])


def applied(content: bytearray | None, operation: Operation) -> bytearray | None:
    if operation.kind == "u":
        return None
    content = bytearray() if content is None else content
    end = operation.offset + len(operation.data)
    if operation.kind == "t":
        del content[operation.offset :]
    content.extend(bytes(max(0, end - len(content))))
    content[operation.offset : end] = operation.data
    return content


class Disk:
    """The files of a folder, by their names."""

    def __init__(self, folder: Path, before: Path | None = None) -> None:
        self.folder = folder
        self.files: dict[str, File] = {}
        for path in before.rglob("*") if before else ():
            if path.is_file():
                self.files[str(path.relative_to(before or path))] = File(path.read_bytes())

    def do(self, operation: Operation) -> None:
        if operation.path == str(self.folder):  # the folder itself: what was deleted is gone
            for file in self.files.values():
                if file.since and file.since[-1].kind == "u":
                    file.sync()
            return
        if operation.kind == "r":
            moved = self.files.pop(self._name(operation.path))
            self.files[self._name(operation.data.decode())] = moved
            return
        file = self.files.setdefault(self._name(operation.path), File())
        if operation.kind == "s":
            file.sync()
        else:
            file.since.append(operation)

    def _name(self, path: str) -> str:
        return str(Path(path).relative_to(self.folder))

    def lose_power(self, chance: random.Random, folder: Path, *, in_order: bool) -> None:
        for name, file in self.files.items():
            content = file.after_the_loss(chance, in_order=in_order)
            if content is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)


class Recording(NamedTuple):
    """What a program did to `folder`, whose files were those of `before` when it began."""

    operations: list[Operation]
    folder: Path
    before: Path | None

    def acknowledged(self, until: int) -> list[tuple[str, Cursor]]:
        lines = b"".join(one.data for one in self.operations[:until] if one.path.endswith("/acknowledged"))
        found = (line.split() for line in lines.decode().splitlines())
        return [(stream, Cursor(epoch, int(seq))) for stream, epoch, seq in found]

    def lose_power(self, until: int, chance: random.Random, folder: Path, *, in_order: bool = False) -> None:
        disk = Disk(self.folder, self.before)
        for operation in self.operations[:until]:
            disk.do(operation)
        disk.lose_power(chance, folder, in_order=in_order)


def operations(journal: bytes) -> Iterator[Operation]:
    at = 0
    while at < len(journal):
        kind, path_length, offset, length = _HEAD.unpack_from(journal, at)
        at += _HEAD.size
        path = journal[at : at + path_length].decode()
        at += path_length
        data = journal[at : at + length] if kind in b"wr" else b""
        at += len(data)
        yield Operation(kind.decode(), path, offset, data)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("powerloss") / "powerloss.so"
    source = Path(__file__).parent / "powerloss.c"
    subprocess.run([find("cc"), "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


def environment(recorder: Path, folder: Path, journal: Path) -> dict[str, str]:
    return {"LD_PRELOAD": str(recorder), "POWERLOSS_FOLDER": str(folder), "POWERLOSS_JOURNAL": str(journal)}


def write(environ: dict[str, str], *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "tests.powerloss_writer", *arguments]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, check=True, timeout=60)


async def check(log: Log, acknowledged: list[tuple[str, Cursor]], *, all_of_it: bool) -> int:
    """A reader with the id of an acknowledged event finds it as it was, or is told of the loss, whatever is written
    afterwards. Gives how many streams have lost some."""
    tops = dict(acknowledged)
    for left in await log.runs("ann", 100):  # as the app does with what a crash left behind
        if left.closed:
            continue
        await log.open(left.stream, epoch := new_epoch())
        await log.append(left.stream, [b"event: error\\ndata: interrupted\\n\\n"], epoch=epoch, close=True)
    await log.publish("topic", [b"data: after\n\n"] * 9, retention=Retention())
    lost = 0
    for stream, top in tops.items():
        stat = await log.find(epoch=top.epoch)
        gap = None if stat is None else locate(stat, top)[1]
        if stat is None or gap is not None:
            assert not all_of_it, f"{stream} has lost {top.seq}: {gap}"
            assert gap is None or gap.reason == "diverged"
            lost += 1
            if stat is None:
                continue
        kept = top.seq if gap is None or gap.from_ is None else gap.from_ - 1
        rows = await log.read(stream, 0, 1 << 30)
        events = Decoder(max_event_bytes=None).feed(b"".join(map(framed, rows)))
        assert [event.data for event in events[:kept]] == [text(stream, seq) for seq in range(1, kept + 1)]
    return lost


@pytest.mark.parametrize("sync", ["normal", "full"])
def test_sqlite_keeps_what_is_promised_when_the_power_fails(recorder: Path, tmp_path: Path, sync: str) -> None:
    folder, journal = tmp_path / "before", tmp_path / "journal"
    lost = 0

    async def look(number: int, acknowledged: list[tuple[str, Cursor]]) -> int:
        log = SqliteLog(tmp_path / str(number) / "log.db", upkeep_s=3600)
        async with log.running():
            return await check(log, acknowledged, all_of_it=sync == "full")

    for start in range(0, SEEDS, 100):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        journal.write_bytes(b"")
        write(environment(recorder, folder, journal), folder, sync, str(start))
        recording = Recording(list(operations(journal.read_bytes())), folder, None)
        for seed in range(start, min(start + 100, SEEDS)):
            chance = random.Random(seed)
            until = chance.randrange(len(recording.operations) + 1)
            recording.lose_power(until, chance, tmp_path / str(seed))
            lost += anyio.run(look, seed, recording.acknowledged(until))
            shutil.rmtree(tmp_path / str(seed), ignore_errors=True)
    assert (lost > 0) == (sync == "normal"), "the losses are real ones"


@contextmanager
def redis(folder: Path, fsync: str, environ: dict[str, str] | None = None) -> Iterator[RedisServer]:
    options = ("--appendonly", "yes", "--appendfsync", fsync, "--auto-aof-rewrite-percentage", "0")
    server = RedisServer("redis", folder, options=options)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environ or {}).items():
            patch.setenv(name, value)
        server.start()
    try:
        yield server
    finally:
        server.stop()


@needs("redis")
@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_redis_keeps_what_is_promised_when_the_power_fails(recorder: Path, tmp_path: Path, fsync: str) -> None:
    folder, journal, before = tmp_path / "redis", tmp_path / "journal", tmp_path / "before"
    folder.mkdir()
    environ = environment(recorder, folder, journal)
    with redis(folder, fsync, environ) as server:
        shutil.copytree(folder, before, ignore=shutil.ignore_patterns("*.sock"))
        journal.write_bytes(b"")
        write(environ, folder, server.url, "0")
        recording = Recording(list(operations(journal.read_bytes())), folder, before)
    lost = 0

    async def look(server: RedisServer, acknowledged: list[tuple[str, Cursor]]) -> int:
        log = RedisLog(server.url, upkeep_s=3600)
        async with log.running():
            return await check(log, acknowledged, all_of_it=fsync == "always")

    for seed in range(SEEDS // 8):
        chance = random.Random(seed)
        until = chance.randrange(len(recording.operations) + 1)
        after = tmp_path / str(seed)
        # Where its file has a hole, Redis doesn't start by itself: `redis-check-aof --fix` cuts it there.
        recording.lose_power(until, chance, after, in_order=True)
        with redis(after, fsync) as server:
            lost += anyio.run(look, server, recording.acknowledged(until))
        shutil.rmtree(after, ignore_errors=True)
    assert (lost > 0) == (fsync == "everysec"), "the losses are real ones"
