"""The history checker over a whole installation, while everything in it breaks: nginx, replicas, one Redis.

Clients know nginx only (as shipped in deploy/), which passes each request to any replica. Meanwhile, each at moments
that the seed chooses: replicas are killed, drained and frozen; Redis (append-only file, every write synced) is killed,
stopped and frozen, and its clients' connections are killed; nginx is reloaded and frozen; clients cut their
connections, or read nothing for a while. What must be true at the end is what `history` says, with these allowances,
since the log itself goes away: a run may end with `log_unavailable`, its events may be under several epochs, and a
publish that was refused may have gone in, once.

`--load 2` keeps both cores busy beside it: what depends on being in time fails then.
"""

import asyncio
import random
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks.history import (
    LIMIT_S,
    Answer,
    Connection,
    Cut,
    History,
    Replica,
    Scenario,
    exchange,
    listening,
)
from benchmarks.history import violations as violations_of
from benchmarks.process import busy
from benchmarks.report import Check, Report, Spread
from tests.nginx import nginx
from tests.redis_server import Kind, RedisServer, serving

__all__ = ["FAULTS", "Installation", "play", "run"]

REPLICAS: Final = 3
#: Of a replica's runs. Redis is away for less and for more than the half of it, which is how long calls wait.
LEASE_S: Final = 2.0
FAULTS: Final = (
    *(f"replicas {how}" for how in ("killed", "drained", "frozen")),
    *(f"Redis {how}" for how in ("killed", "stopped", "frozen", "disconnected")),
    *(f"nginx {how}" for how in ("reloaded", "frozen")),
)
#: What replicas may complain about here.
EXPECTED: Final = (
    "can't reach the event log's Redis",
    "its events can't be stored",
    "the event log can't be used at the moment",
    "the event log's Redis can't be used",
    "Application startup failed",
)
#: Of the shipped configuration, which has more patience than we.
CHANGES: Final = {
    "worker_shutdown_timeout 20s": "worker_shutdown_timeout 1s",
    "proxy_read_timeout 60s": "proxy_read_timeout 2s",
    "stderr warn": "stderr crit",
}


class Installation:
    """What a scenario takes for its server."""

    def __init__(self, folder: Path, history: History, redis: RedisServer) -> None:
        self.redis = redis
        self.replicas = [Replica(str(folder), history, redis.url, LEASE_S, pinned=False) for _ in range(REPLICAS)]
        self._stack = ExitStack()
        self.port = 0

    async def start(self) -> None:
        for replica in self.replicas:
            await replica.start()
        ports = [replica.port for replica in self.replicas]
        self.nginx = await asyncio.to_thread(self._stack.enter_context, nginx(*ports, changes=CHANGES))
        self.port = self.nginx.port
        await self.listening()

    async def listening(self) -> None:
        for port in (*[replica.port for replica in self.replicas], self.nginx.port):
            await listening(port)

    async def supervise(self) -> None:
        """Starts the replicas that found no Redis at their start."""
        while True:
            for replica in self.replicas:
                await replica.revive()
            await asyncio.sleep(0.2)

    async def stop_for_good(self) -> None:
        for replica in self.replicas:
            await replica.stop_for_good(*EXPECTED)
        self._stack.close()


class Chaos(Scenario):
    # The machine is busy enough with starting replicas: what is to be seen is not how it copes with no time at all.
    runs_per_s = 3.0
    haste = 5

    def __init__(self, seed: int, seconds: float, history: History, installation: Installation) -> None:
        super().__init__(seed, seconds, history, installation)
        self.installation = installation

    async def _trouble(self) -> None:
        """Each part has its own. At the end all of them are well, and can write."""
        supervisor = asyncio.create_task(self.installation.supervise())
        async with asyncio.TaskGroup() as tasks:
            for number in range(REPLICAS):
                tasks.create_task(self._again(f"replica {number}", 4.0, self._hurt_a_replica))
            tasks.create_task(self._again("redis", 2.5, self._hurt_redis))
            tasks.create_task(self._again("nginx", 3.0, self._hurt_nginx))
        await self.installation.listening()
        for replica in self.installation.replicas:
            await self._answers(replica.port)
        supervisor.cancel()

    async def _again(self, name: str, every_s: float, hurt: Callable[[str, random.Random], Awaitable[str]]) -> None:
        rng = self._random(name)
        while (pause := every_s * rng.uniform(0.1, 1.9)) < self._until_calm():
            await asyncio.sleep(pause)
            what = await hurt(name, rng)
            self.history.done[what] += 1
        await asyncio.sleep(max(0, self._until_calm()))

    async def _hurt_a_replica(self, name: str, rng: random.Random) -> str:
        replica = self.installation.replicas[int(name.split()[1])]
        how = rng.choice(["killed", "killed", "drained", "frozen"])
        if how == "frozen":
            replica.send(signal.SIGSTOP)
            await asyncio.sleep(rng.choice([0.1, 1, 1.5]) * rng.uniform(0.5, 2))
            replica.send(signal.SIGCONT)
        else:
            await replica.stop(signal.SIGKILL if how == "killed" else signal.SIGTERM)
            await asyncio.sleep(rng.choice([0, 0.3]))
            await replica.start()
            self.history.restarts += 1
        return f"replicas {how}"

    async def _hurt_redis(self, name: str, rng: random.Random) -> str:
        redis = self.installation.redis
        how = rng.choice(["killed", "stopped", "frozen", "frozen", "normal", "pubsub"])
        if how in ("normal", "pubsub"):
            await asyncio.to_thread(redis.call, "CLIENT", "KILL", "TYPE", how)
            return "Redis disconnected"
        away_s = rng.choice([0.05, 0.5, 1.5]) * rng.uniform(0.5, 2)
        if how == "frozen":
            redis.freeze()
            await asyncio.sleep(away_s)
            redis.freeze(signal.SIGCONT)
        else:
            await asyncio.to_thread(redis.stop, signal.SIGKILL if how == "killed" else signal.SIGTERM)
            await asyncio.sleep(away_s)
            await asyncio.to_thread(redis.start)
        return f"Redis {how}"

    async def _hurt_nginx(self, name: str, rng: random.Random) -> str:
        proxy = self.installation.nginx
        if rng.random() < 0.5:
            await asyncio.to_thread(proxy.reload)
            return "nginx reloaded"
        proxy.send_workers(signal.SIGSTOP)
        await asyncio.sleep(rng.uniform(0.1, 1))
        proxy.send_workers(signal.SIGCONT)
        return "nginx frozen"

    async def _answers(self, port: int) -> None:
        """Until it can write to the log."""
        body = b'"probe"'
        head = f"POST /topics/probe HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = Connection()
        async with asyncio.timeout(LIMIT_S):
            while connection.status != 202:
                await asyncio.sleep(0.1)
                connection = Connection()
                await exchange(port, head.encode() + body, Answer(connection), Cut())

    def _cut(self, rng: random.Random) -> Cut:
        """Later than elsewhere: what is large comes through in some attempts, not in hundreds."""
        cut = super()._cut(rng)
        if self._calm:
            return cut
        if cut.after is not None and cut.after > 0:
            cut = replace(cut, after=round(10 ** rng.uniform(0, 6)))
        return replace(cut, frozen_s=rng.uniform(0.5, 3)) if rng.random() < 0.05 else cut


def play(seed: int, seconds: float, kind: Kind = "valkey") -> History:
    """So many seconds of chaos, and until all readers have come to the end."""
    history = History(stopped_by=signal.SIGKILL, log_goes=True)
    with tempfile.TemporaryDirectory() as folder, serving(kind, keeps=True) as redis:
        asyncio.run(Chaos(seed, seconds, history, Installation(Path(folder), history, redis)).play())
    return history


def run(*, seconds: int = 60, seed: int = 1, load: int = 0) -> Report:
    """nginx, three replicas and Redis, all of which break while many readers are cut: what is heard at the end"""
    report = Report("chaos", {"seconds": seconds, "seed": seed, "load": load})
    with busy(load, seconds + 3 * LIMIT_S):
        history = play(seed, seconds)
    found = violations_of(history)
    for violation in found[:50]:
        print(f"seed {seed}: {violation[:300]} … {violation[-700:]}", file=sys.stderr)
    report.rows["counts"] = {count: Spread.of([number]) for count, number in history.counts().items()}
    report.checks.append(Check("violations", Spread.of([len(found)]), at_most=0))
    return report
