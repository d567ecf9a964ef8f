"""The history checker over a whole installation, while everything in it breaks: nginx, replicas, one Redis.

Clients know nginx only, which passes each request to any replica. Meanwhile, each at moments that the seed chooses:
replicas are killed, drained and frozen; Redis (append-only file, every write synced) is killed, stopped and frozen, and
its clients' connections are killed; nginx is reloaded and frozen; clients cut their connections, or read nothing for a
while. What must be true at the end is what `history` says, with two allowances, since the log itself goes away: a run
may end with `log_unavailable`, and a publish that was refused may have gone in, once.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
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
    free_port,
    listening,
)
from benchmarks.history import violations as violations_of
from benchmarks.report import Check, Report, Spread
from tests.redis_server import Kind, RedisServer, serving

__all__ = ["Installation", "play", "run"]

REPLICAS: Final = 3
#: Of a replica's runs. Redis is away for less and for more than the half of it, which is how long calls wait.
LEASE_S: Final = 2.0
#: What replicas may complain about here.
EXPECTED: Final = (
    "the event log's Redis is away",
    "its events can't be stored",
    "the event log can't be used at the moment",
    "the event log's Redis can't be used",
    "Application startup failed",
)
_NOBODY: Final = 65534
_NGINX: Final = """
daemon off;
worker_processes 1;
worker_shutdown_timeout 1s;
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
events {{ worker_connections 8000; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream replicas {{
        {replicas}
        keepalive 32;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $http_host;
        proxy_buffering off;
        proxy_next_upstream off;
        proxy_read_timeout 2s;
        location / {{
            proxy_pass http://replicas;
            if ($request_method = GET) {{
                error_page 502 503 504 = @down;
            }}
        }}
        location @down {{
            default_type text/event-stream;
            return 200 "retry: 500\\n\\n";
        }}
    }}
}}
"""


class Nginx:
    """In front of the replicas; unprivileged where it can be, in a folder of its own."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        self.port = free_port()
        self._folder = folder / "nginx"
        self._folder.mkdir()
        replicas = "\n        ".join(f"server 127.0.0.1:{port} max_fails=1 fail_timeout=1s;" for port in ports)
        text = _NGINX.format(folder=self._folder, port=self.port, replicas=replicas)
        (self._folder / "nginx.conf").write_text(text)

    def start(self) -> None:
        # Not where a user's own path leads.
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
        if program is None:
            raise LookupError("needs nginx: not installed")
        command = [program, "-e", "stderr", "-p", str(self._folder), "-c", str(self._folder / "nginx.conf")]
        if os.geteuid() == 0:
            for path in (self._folder.parent, self._folder, self._folder / "nginx.conf"):
                os.chown(path, _NOBODY, _NOBODY)
            command = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", *command]
        self._process = subprocess.Popen(command)

    def reload(self) -> None:
        self._process.send_signal(signal.SIGHUP)

    def send_workers(self, what: signal.Signals) -> None:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        for pid in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):  # an old one, after a reload
                os.kill(int(pid), what)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


class Installation:
    """What a scenario takes for its server."""

    def __init__(self, folder: Path, history: History, redis: RedisServer) -> None:
        self.redis = redis
        self.replicas = [Replica(str(folder), history, redis.url, LEASE_S, pinned=False) for _ in range(REPLICAS)]
        self.nginx = Nginx(folder, [replica.port for replica in self.replicas])
        self.port = self.nginx.port

    async def start(self) -> None:
        for replica in self.replicas:
            await replica.start()
        self.nginx.start()
        await self.listening()

    async def listening(self) -> None:
        for port in (*[replica.port for replica in self.replicas], self.nginx.port):
            await listening(port)

    async def supervise(self) -> None:
        """Starts the replicas that found no Redis at their start."""
        while True:
            for replica in self.replicas:
                if replica.gave_up:
                    await replica.start()
            await asyncio.sleep(0.2)

    async def stop_for_good(self) -> None:
        for replica in self.replicas:
            await replica.stop_for_good(*EXPECTED)
        self.nginx.stop()


class Chaos(Scenario):
    def __init__(self, seed: int, seconds: float, history: History, installation: Installation) -> None:
        super().__init__(seed, seconds, history, installation)
        self.installation = installation

    async def _trouble(self) -> None:
        """Each part has its own. At the end all of them are well, and have been for a moment."""
        supervisor = asyncio.create_task(self.installation.supervise())
        async with asyncio.TaskGroup() as tasks:
            for number in range(REPLICAS):
                tasks.create_task(self._again(f"replica {number}", 4.0, self._hurt_a_replica))
            tasks.create_task(self._again("redis", 2.5, self._hurt_redis))
            tasks.create_task(self._again("nginx", 3.0, self._hurt_nginx))
        await self.installation.listening()
        for replica in self.installation.replicas:
            await self._answers(replica.port, 1)
        await self._answers(self.installation.port, 2 * REPLICAS)  # it may still think that one of them is down
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
            return "connections killed"
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
        nginx = self.installation.nginx
        if rng.random() < 0.5:
            nginx.reload()
            return "nginx reloaded"
        nginx.send_workers(signal.SIGSTOP)
        await asyncio.sleep(rng.uniform(0.1, 1))
        nginx.send_workers(signal.SIGCONT)
        return "nginx frozen"

    async def _answers(self, port: int, times: int) -> None:
        """Until it has written to the log so many times, one after the other."""
        body = b'"probe"'
        head = f"POST /topics/probe HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        row = 0
        async with asyncio.timeout(LIMIT_S):
            while row < times:
                connection = Connection()
                await exchange(port, head.encode() + body, Answer(connection), Cut())
                row = row + 1 if connection.status == 202 else 0
                if not row:
                    await asyncio.sleep(0.1)

    def _cut(self, rng: random.Random) -> Cut:
        cut = super()._cut(rng)
        if not self._calm and rng.random() < 0.05:
            cut = replace(cut, frozen_s=rng.uniform(0.5, 3))
        return cut


def play(seed: int, seconds: float, kind: Kind = "valkey") -> History:
    """So many seconds of chaos, and until all readers have come to the end."""
    history = History(stopped_by=signal.SIGKILL, log_goes=True)
    with tempfile.TemporaryDirectory() as folder, serving(kind, keeps=True) as redis:
        asyncio.run(Chaos(seed, seconds, history, Installation(Path(folder), history, redis)).play())
    return history


def run(*, seconds: int = 60, seed: int = 1) -> Report:
    """nginx, three replicas and Redis, all of which break while many readers are cut: what is heard at the end"""
    report = Report("chaos", {"seconds": seconds, "seed": seed})
    history = play(seed, seconds)
    found = violations_of(history)
    for violation in found[:50]:
        print(f"seed {seed}: {violation[:1000]}", file=sys.stderr)
    report.rows["counts"] = {count: Spread.of([number]) for count, number in history.counts().items()}
    report.checks.append(Check("violations", Spread.of([len(found)]), at_most=0))
    return report
