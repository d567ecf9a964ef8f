"""A program that appends to a log as fast as it goes, and writes down each event that it was told to be stored.

    python -m tests.powerloss_writer FOLDER LOG SEED

LOG is `normal` or `full` (SQLite in FOLDER), or a Redis URL. A line of FOLDER/acknowledged: stream, epoch, sequence.
"""

import os
import random
import sys
from functools import partial
from pathlib import Path

import anyio

import ssecore.log.sqlite
from ssecore.errors import SSEAppError
from ssecore.log import Log, Retention, new_epoch
from ssecore.log.redis import RedisLog
from ssecore.log.sqlite import SqliteLog
from ssecore.wire import Event, encode

RUNS, EVENTS = 3, 60


def text(stream: str, seq: int) -> str:
    """What the event holds: it is known from its place, and of any size."""
    return f"{stream} {seq} " + "x" * (random.Random(f"{stream} {seq}").choice([0, 10, 100, 3000]))


def frames(stream: str, first: int, count: int) -> list[bytes]:
    return [encode(Event(text(stream, seq))) for seq in range(first, first + count)]


async def main(folder: str, where: str, seed: str) -> None:
    ssecore.log.sqlite._CHECKPOINT_PAGES = 16  # type: ignore[misc]
    path = Path(folder) / "log.db"
    log: Log = RedisLog(where) if "://" in where else SqliteLog(path, full_sync=where == "full")
    out = os.open(f"{folder}/acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    chance = random.Random(seed)

    def acknowledge(stream: str, epoch: str, seq: int) -> None:
        os.write(out, f"{stream} {epoch} {seq}\n".encode())

    async def run(stream: str) -> None:
        told = anyio.Event()
        posted = stored = 0
        sizes: list[tuple[int, int]] = []

        def tell(size: int, error: SSEAppError | None) -> None:
            nonlocal stored, told
            assert error is None, error
            while size:
                bytes, count = sizes.pop(0)
                size -= bytes
                stored += count
            acknowledge(stream, epoch, stored)
            told.set()

        epoch = new_epoch()
        await log.create(stream, epoch=epoch, owner="ann")
        acknowledge(stream, epoch, 0)
        writer = log.writer(stream, epoch, tell)
        while posted < EVENTS:
            some = frames(stream, posted + 1, chance.randrange(1, 4))
            sizes.append((sum(map(len, some)), len(some)))
            posted += len(some)
            writer.post(some, sizes[-1][0])
            if chance.random() < 0.7:
                told = anyio.Event()
                await told.wait()
        while stored < posted:
            told = anyio.Event()
            await told.wait()
        last = await log.append(stream, frames(stream, posted + 1, 1), epoch=epoch, close=True, meta={"n": 1})
        acknowledge(stream, epoch, last)

    async def publish() -> None:
        seq = 0
        while seq < EVENTS:
            cursor = await log.publish("topic", frames("topic", seq + 1, 3), retention=Retention())
            seq = cursor.seq
            acknowledge("topic", cursor.epoch, seq)

    async with log.running(), anyio.create_task_group() as tasks:
        for number in range(RUNS):
            tasks.start_soon(run, f"run-{number}-{seed}")
        tasks.start_soon(publish)


if __name__ == "__main__":
    anyio.run(partial(main, *sys.argv[1:]))
