"""All kinds of traffic at once for long: what a server holds afterwards, beside what it held before.

Callers come and go; each does one thing after the other, chosen by a seed: reads a stream to its end, leaves one in the
middle, starts a run and comes back to it, cancels one, publishes, subscribes, stops reading, asks for what isn't there.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import httpx

from benchmarks.process import Server, memory_bytes
from benchmarks.report import Check, Report

__all__ = ["AFTER", "WRONG", "measure", "more", "run"]

MIB = 1024 * 1024
BEFORE, HIGHEST, AFTER = "before", "highest", "after"
FILES, TASKS, MEMORY, LOG = "open files", "tasks", "memory MiB", "log MiB"
#: Short, so that what the log keeps comes to its end within the benchmark.
RETENTION_S = 1.0
SEND_TIMEOUT_S = 1.0
#: Longer than each of these, and the sweep's round.
QUIET_S = 2
SETTLE_S = 30.0
TOPICS = 10
WRONG = "wrong answers"
MORE_MEMORY, MORE_LOG_MIB = 1.1, 4.0
CSV = b"title\r\n" + b"a task\r\n" * 100


def run(*, rounds: int = 1, callers: int = 40, seconds: int = 60) -> Report:
    """Mixed traffic of `callers` for `seconds`, in a server that has had the same for a tenth of the time before."""
    report = Report("soak", {"rounds": rounds, "callers": callers, "seconds": seconds})
    report.add_rounds([measure(callers, seconds) for _ in range(rounds)])
    for figure in (FILES, TASKS, MEMORY, LOG):
        allowed = _allowed({name: spread.highest for name, spread in report.rows[BEFORE].items()})[figure]
        report.checks.append(Check(f"{figure}, {AFTER}", report.rows[AFTER][figure], at_most=round(allowed, 2)))
    report.checks.append(Check(WRONG, report.rows[AFTER][WRONG], at_most=0))
    return report


def more(rows: dict[str, dict[str, float]]) -> list[str]:
    """What a server holds more of after than before."""
    return _more(rows[AFTER], rows[BEFORE])


def _more(after: dict[str, float], before: dict[str, float]) -> list[str]:
    return [figure for figure, allowed in _allowed(before).items() if after[figure] > allowed]


def _allowed(before: dict[str, float]) -> dict[str, float]:
    """Memory that is kept for the next time, and the log's free pages, may be more."""
    memory, log = before[MEMORY] * MORE_MEMORY, before[LOG] + MORE_LOG_MIB
    return {FILES: before[FILES], TASKS: before[TASKS], MEMORY: memory, LOG: log}


def measure(callers: int, seconds: float) -> dict[str, dict[str, float]]:
    settings = {
        "retention_s": RETENTION_S,
        "send_timeout_s": SEND_TIMEOUT_S,
        "heartbeat_s": 1,
        "linger_s": 1,
        "mock_delay_s": 0.01,
        "max_body_bytes": 10_000,
    }
    with TemporaryDirectory() as folder, Server.app(folder, settings=settings) as server:
        return anyio.run(_Soak(server, Path(folder), callers).measure, seconds)


class _Soak:
    def __init__(self, server: Server, folder: Path, callers: int) -> None:
        self._server = server
        self._folder = folder
        self._callers = callers
        self._done: Counter[str] = Counter()
        self._unexpected: Counter[str] = Counter()

    async def measure(self, seconds: float) -> dict[str, dict[str, float]]:
        base = f"http://127.0.0.1:{self._server.port}"
        # No connection is kept: each of the server's sockets is a stream's, or a request's, and has to go.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=30, limits=limits) as self._client:
            answer = await self._client.post("/tasks/import", content=CSV, headers={"content-type": "text/csv"})
            answer.raise_for_status()
            await self._work(seconds / 10)
            before = await self._settled()
            self._done.clear()
            highest = before
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._work, seconds)
                began = time.monotonic()
                while time.monotonic() - began < seconds:
                    await anyio.sleep(min(1, seconds / 10))
                    now = await self._facts()
                    highest = {figure: max(highest[figure], value) for figure, value in now.items()}
            done, took = sum(self._done.values()), time.monotonic() - began
            after = await self._settled(before)
        if self._unexpected:
            print(self._unexpected)
        rows = {BEFORE: before, HIGHEST: highest, AFTER: after}
        rows[AFTER] |= {"done": done, "a second": done / took, WRONG: self._unexpected.total()}
        for row in (before, highest):
            row |= dict.fromkeys(("done", "a second", WRONG), 0.0)
        return rows

    async def _facts(self) -> dict[str, float]:
        pid, files = self._server.pid, 0
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # closed since
                files += ".db" not in os.readlink(entry.path)  # those are of two pools, which only grow to their size
        log = sum(path.stat().st_size for path in self._folder.glob("log.db*"))
        tasks = (await self._client.get("/alive")).json()["tasks"]
        return {FILES: files, TASKS: tasks, MEMORY: memory_bytes(pid) / MIB, LOG: log / MIB}

    async def _settled(self, before: dict[str, float] | None = None) -> dict[str, float]:
        """When all is as before; without that, when nothing goes down any more. At the latest after `SETTLE_S`."""
        quiet, deadline, now = 0, time.monotonic() + SETTLE_S, await self._facts()
        while quiet < QUIET_S and time.monotonic() < deadline:
            await anyio.sleep(1)
            last, now = now, await self._facts()
            quiet = 0 if any(now[figure] < last[figure] for figure in (FILES, TASKS, LOG)) else quiet + 1
            if before is not None:
                quiet = QUIET_S if not _more(now, before) else 0
        return now

    # The traffic

    async def _work(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        async with anyio.create_task_group() as tasks:
            for number in range(self._callers):
                tasks.start_soon(self._call, random.Random(number), deadline)

    async def _call(self, chance: random.Random, deadline: float) -> None:
        deeds: list[Callable[[random.Random], Awaitable[None]]] = [
            self._read_all,
            self._leave,
            self._resume,
            self._cancel,
            self._publish,
            self._publish,
            self._subscribe,
            self._freeze,
            self._ask_wrongly,
        ]
        while time.monotonic() < deadline:
            deed = chance.choice(deeds)
            try:
                await deed(chance)
            except (httpx.HTTPError, OSError) as error:
                self._unexpected[f"{deed.__name__}: {error!r}"] += 1
            self._done[deed.__name__] += 1

    def _expect(self, answer: httpx.Response, *statuses: int) -> None:
        if answer.status_code not in statuses:
            self._unexpected[f"{answer.request.method} {answer.request.url.path}: {answer.status_code}"] += 1

    async def _read_all(self, chance: random.Random) -> None:
        target = chance.choice(
            ["/stream?count=200&interval=0", "/stream/merge?interval=0.001", "/tasks/stream", "/export.csv"]
        )
        self._expect(await self._client.get(target), 200)

    async def _leave(self, chance: random.Random) -> None:
        target = chance.choice(["/countdown/3600?interval=0.01", "/stream?count=1000000&interval=0"])
        await self._read(target, chance.randint(1, 5))

    async def _read(self, target: str, chunks: int, **options: Any) -> httpx.Response:
        """Some of a stream; then the client leaves."""
        async with self._client.stream("GET", target, **options) as answer:
            self._expect(answer, 200)
            parts = answer.aiter_bytes()
            for _ in range(chunks):
                await anext(parts, b"")
        return answer

    async def _resume(self, chance: random.Random) -> None:
        begun = await self._read("/chat?prompt=some+words", 1)
        run = begun.headers["run-id"]
        answer = await self._client.get(f"/runs/{run}/events", headers={"last-event-id": f"{run}.1"})
        self._expect(answer, 200, 204, 410)  # on a busy machine it may no longer be kept
        if chance.random() < 0.5:
            self._expect(await self._client.delete(f"/runs/{run}"), 204, 404)

    async def _cancel(self, chance: random.Random) -> None:
        job = {"kind": "sleep", "input": {"steps": 1000, "interval": 0.01}}
        run = (await self._client.post("/jobs", json=job)).headers["run-id"]
        if chance.random() < 0.5:
            await self._read(f"/jobs/{run}/progress", 2)
        self._expect(await self._client.delete(f"/runs/{run}"), 202)

    async def _publish(self, chance: random.Random) -> None:
        event = {"text": "x" * chance.randint(0, 1000)}
        self._expect(await self._client.post(f"/topics/{chance.randrange(TOPICS)}", json=event), 202)

    async def _subscribe(self, chance: random.Random) -> None:
        await self._read(f"/topics/{chance.randrange(TOPICS)}", chance.randint(1, 5))

    async def _freeze(self, chance: random.Random) -> None:
        """Stop reading; be dropped, or leave before that."""
        target = chance.choice(["/stream?count=1000000&interval=0", f"/topics/{chance.randrange(TOPICS)}"])
        async with await anyio.connect_tcp("127.0.0.1", self._server.port) as stream:
            await stream.send(f"GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            await anyio.sleep(SEND_TIMEOUT_S * 2 * chance.random())

    async def _ask_wrongly(self, chance: random.Random) -> None:
        options: Any = chance.choice(
            [
                {"method": "GET", "url": "/nothing"},
                {"method": "GET", "url": "/stream?count=x"},
                {
                    "method": "POST",
                    "url": "/topics/0",
                    "content": b"{",
                    "headers": {"content-type": "application/json"},
                },
                {"method": "POST", "url": "/topics/0", "json": "x" * 20_000},
                {"method": "GET", "url": "/runs/x"},
                {"method": "GET", "url": "/topics/0", "headers": {"last-event-id": "x"}},
            ]
        )
        self._expect(await self._client.request(**options), 400, 404, 413)
