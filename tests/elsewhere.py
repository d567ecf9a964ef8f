"""A program that uses all of the library. tests/test_filelock.py runs it where much is hidden from it."""

import asyncio
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from sseapp import GET, Event, Request, Run, Settings, SSEApp
from ssecore.client import connect, to_file
from ssecore.filelock import try_lock
from ssecore.http.tokens import add_token, read_tokens
from ssecore.server.runner import serve
from ssecore.testing import assert_stream
from ssecore.testing import connect as connect_in_process
from tests.serving import free_port

loops: list[str] = []


async def numbers(request: Request) -> AsyncIterator[Event]:
    loops.append(type(asyncio.get_running_loop()).__module__)
    for number in range(3):
        yield Event(number)
    yield Event("", "complete")


async def use_all(folder: Path) -> None:
    routes = [GET("/fleeting", numbers), GET("/run", numbers, run=Run())]
    for log in ("memory", "sqlite"):
        app = SSEApp(routes, Settings(log=log, data_dir=folder))
        async with app.running():
            for path in ("/fleeting", "/run"):
                async with connect_in_process(app, "GET", path) as stream:
                    await assert_stream(stream, ..., ("complete", ""))
    add_token(folder / "tokens", "ann")
    assert [entry.name for entry in read_tokens(folder / "tokens")] == ["ann"]


def read(port: int, path: Path, written: list[int]) -> None:
    """In a thread: read what this process serves, and end it then as Ctrl-C does."""

    async def read_all() -> None:
        async with connect(f"http://127.0.0.1:{port}/run") as source:
            written.append(await to_file(source, path))

    try:
        asyncio.run(read_all())
    finally:
        signal.raise_signal(signal.SIGINT)


def main(*, other_tries: bool) -> None:
    """`other_tries`: another process tries the lock, in the way of the fake `msvcrt`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asyncio.run(use_all(folder))
        with (folder / "lock").open("wb+") as file:
            assert try_lock(file.fileno())
            if other_tries:
                program = "import os, sys; os.lockf(os.open(sys.argv[1], os.O_RDWR), os.F_TLOCK, 0)"
                other = subprocess.run([sys.executable, "-c", program, file.name], capture_output=True, text=True)
                assert other.returncode == 1 and "BlockingIOError" in other.stderr, other.stderr
        settings, written = Settings(port=free_port(), log="memory"), list[int]()
        app = SSEApp([GET("/run", numbers, run=Run())], settings)
        threading.Thread(target=read, args=(settings.port, folder / "events.jsonl", written)).start()
        assert serve(app, settings) == 0
        assert written == [4] and loops[-1].startswith("asyncio."), (written, loops)
