"""The history checker while everything breaks: `python -m tests.chaos --seconds 300 --seed 1 --log sqlite`.

What breaks depends on the event log, and the seed chooses when. Clients cut their connections, or read nothing for a
while, in any case.

- `redis`, `valkey`: nginx (as shipped in deploy/) passes each request to any of three replicas. The replicas are
  killed, drained and frozen. Redis (append-only file, every write synced) is killed, stopped and frozen, and its
  clients' connections are killed. nginx is reloaded and frozen.
- `sqlite`: one replica is killed, drained and frozen, and another program locks the log's file.
- `memory`: one replica is frozen. It is not killed: what is in memory is lost with the process.

The rules at the end are those of `tests.history`. Where Redis goes away there are three allowances: a run may end with
`log_unavailable`, its events may be under several epochs, and a publish that was refused may have gone in, once.

`--load 2` keeps both cores busy beside it: what depends on being in time fails then.
"""

import argparse
import asyncio
import random
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, get_args

from benchmarks.process import busy
from tests.history import Connection, History, violations
from tests.history.client import LIMIT_S, Answer, Cut, exchange, listening
from tests.history.replica import Replica
from tests.history.scenario import Scenario
from tests.nginx import nginx
from tests.redis_server import KINDS, RedisServer, serving

__all__ = ["FAULTS", "LOGS", "Log", "play"]

Log = Literal["memory", "sqlite", "redis", "valkey"]
LOGS: Final[tuple[Log, ...]] = get_args(Log)
REPLICAS: Final = 3
#: Of a replica's runs. Redis is away for less and for more than the half of it, which is how long calls wait.
LEASE_S: Final = 2.0
_STOPPED: Final = ("replicas killed", "replicas drained", "replicas frozen")
_REDIS: Final = (
    *_STOPPED,
    *(f"Redis {how}" for how in ("killed", "stopped", "frozen", "disconnected")),
    *(f"nginx {how}" for how in ("reloaded", "frozen")),
)
#: What breaks with each log.
FAULTS: Final[dict[Log, Sequence[str]]] = {
    "memory": ("replicas frozen",),
    "sqlite": (*_STOPPED, "file locked"),
    "redis": _REDIS,
    "valkey": _REDIS,
}
#: What replicas may complain about where Redis goes away.
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
    """What a scenario takes for its server: one replica, or with `redis` three behind nginx."""

    def __init__(self, folder: Path, history: History, log: str, redis: RedisServer | None) -> None:
        self.redis = redis
        self.file = folder / "log.db"  #: of the log in SQLite
        count = 1 if redis is None else REPLICAS
        self.replicas = [Replica(str(folder), history, log, LEASE_S, pinned=False) for _ in range(count)]
        self._ports = [replica.port for replica in self.replicas]
        self.port = self._ports[0]
        self._stack = ExitStack()

    async def start(self) -> None:
        for replica in self.replicas:
            await replica.start()
        if self.redis is not None:
            self.nginx = await asyncio.to_thread(self._stack.enter_context, nginx(*self._ports, changes=CHANGES))
            self.port = self.nginx.port
        await self.listening()

    async def listening(self) -> None:
        for port in {*self._ports, self.port}:
            await listening(port)

    async def supervise(self) -> None:
        """Starts the replicas that found no Redis at their start."""
        while True:
            for replica in self.replicas:
                await replica.revive()
            await asyncio.sleep(0.2)

    async def stop_for_good(self) -> None:
        for replica in self.replicas:
            await replica.stop_for_good(*([] if self.redis is None else EXPECTED))
        self._stack.close()


class Chaos(Scenario):
    # The machine is busy enough with starting replicas: what is to be seen is not how it copes with no time at all.
    runs_per_s = 3.0
    haste = 5

    def __init__(self, seed: int, seconds: float, history: History, installation: Installation, log: Log) -> None:
        super().__init__(seed, seconds, history, installation)
        self.installation = installation
        self._log = log

    async def _trouble(self) -> None:
        """Each part has its own. At the end all of them are well, and can write."""
        supervisor = asyncio.create_task(self.installation.supervise() if self._log in KINDS else asyncio.sleep(0))
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(self.installation.replicas)):
                tasks.create_task(self._again(f"replica {number}", 4.0, self._hurt_a_replica))
            if self._log == "sqlite":
                tasks.create_task(self._again("file", 6.0, self._lock_the_file))
            if self.installation.redis is not None:
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
        how = rng.choice(["killed", "killed", "drained", "frozen"]) if self.history.stopped_by else "frozen"
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

    async def _lock_the_file(self, name: str, rng: random.Random) -> str:
        """As a backup does, or a person with `sqlite3`; for less than the 5 s for which the log waits."""
        with closing(sqlite3.connect(self.installation.file, timeout=0, isolation_level=None)) as db:
            try:
                db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:  # the replica is writing at the moment
                return "file in use"
            await asyncio.sleep(rng.choice([0.05, 0.5, 1.5]) * rng.uniform(0.5, 2))
        return "file locked"

    async def _hurt_redis(self, name: str, rng: random.Random) -> str:
        redis = self.installation.redis
        assert redis is not None
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


def play(seed: int, seconds: float, log: Log = "valkey") -> History:
    """So many seconds of chaos, and until all readers have come to the end."""
    history = History(stopped_by=None if log == "memory" else signal.SIGKILL, log_goes=log in KINDS)
    started = serving(log, keeps=True) if log == "redis" or log == "valkey" else nullcontext()
    with tempfile.TemporaryDirectory() as folder, started as redis:
        installation = Installation(Path(folder), history, log if redis is None else redis.url, redis)
        asyncio.run(Chaos(seed, seconds, history, installation, log).play())
    return history


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seconds", type=float, default=60, help="until all is calm (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="chooses what breaks and when (default: 1)")
    parser.add_argument("--log", choices=LOGS, default="valkey", help="the event log (default: valkey)")
    parser.add_argument("--load", type=int, default=0, help="processes that keep the cores busy (default: 0)")
    options = parser.parse_args()
    with busy(options.load, options.seconds + 3 * LIMIT_S):
        history = play(options.seed, options.seconds, options.log)
    found = violations(history)
    print(f"seed {options.seed}, {options.log}: {history.summary()}")
    for violation in found[:50]:
        print(f"{violation[:300]} … {violation[-700:]}", file=sys.stderr)
    print(f"{len(found)} violations")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
