"""A scenario: what is read, published and cut while a server runs, or is stopped and started again.

A seed makes the plan: which runs, which readers from when, where each is cut.
"""

import asyncio
import hashlib
import json
import random
import signal
import tempfile
from typing import Any, Final, Protocol

from tests.history import FINAL, RETENTION_EVENTS, Connection, History, Publication, Reader, Script
from tests.history.client import LIMIT_S, Answer, Cut, exchange
from tests.history.replica import Replica

__all__ = ["SCENARIOS", "Scenario", "Server", "play"]

#: What stops the server in each scenario.
SCENARIOS: Final[dict[str, signal.Signals | None]] = {"cut": None, "killed": signal.SIGKILL, "drained": signal.SIGTERM}
#: How much faster than a browser a reader comes back.
HASTE: Final = 20


class Server(Protocol):
    """What readers and publishers talk to."""

    port: int

    async def start(self) -> None: ...

    async def listening(self) -> None: ...

    async def stop_for_good(self) -> None: ...


class Scenario:
    runs_per_s = 8.0
    haste = HASTE

    def __init__(self, seed: int, seconds: float, history: History, server: Server) -> None:
        self.history, self.server = history, server
        self._seed, self._seconds = seed, seconds
        self._rng = self._random("plan")
        self._calm = False  #: nothing is cut and nothing published any more

    def _random(self, name: str) -> random.Random:
        return random.Random(f"{self._seed}/{name}")

    def _until_calm(self) -> float:
        return self._began + self._seconds - asyncio.get_running_loop().time()

    async def play(self) -> None:
        try:
            await self._play()
        finally:
            await self.server.stop_for_good()

    async def _play(self) -> None:
        await self.server.start()
        await self.server.listening()
        self._began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as tasks:
            readers = [tasks.create_task(reading) for reading in (*self._topics(), *self._runs())]
            publishers = [
                tasks.create_task(self._publisher(topic, f"publisher {number}"))
                for topic in self.history.topics
                for number in range(2)
            ]
            await self._trouble()
            await self.server.listening()
            self._calm = True
            await asyncio.wait(publishers)
            await self._all_begun()
            for topic in self.history.topics:
                await self._publish_final(topic)
            _, waiting = await asyncio.wait(readers, timeout=LIMIT_S)
            for reader in waiting:
                reader.cancel()

    async def _all_begun(self) -> None:
        """Until each reader of a topic has begun: who begins after what is published last has nothing to wait for."""
        left = asyncio.get_running_loop().time() + LIMIT_S
        waiting = [reader for reader in self.history.readers if reader.stream in self.history.topics]
        while waiting and asyncio.get_running_loop().time() < left:
            await asyncio.sleep(0.05)
            waiting = [one for one in waiting if not any(b.name == "init" for c in one.connections for b in c.blocks)]

    async def _publish_final(self, topic: str) -> None:
        """Until it is there. Readers stop at the first, if several go in."""
        publication = Publication(topic, "", FINAL)
        await self._publish(publication)
        while publication.id is None and self.history.log_goes:
            await asyncio.sleep(0.2)
            publication = Publication(topic, "", FINAL)
            await self._publish(publication)

    async def _trouble(self) -> None:
        """What happens to the server until all is calm."""
        await asyncio.sleep(self._until_calm())

    def _runs(self) -> list[Any]:
        """Each with two to five readers, of which the first two come at the same moment."""
        rng, readings = self._rng, []
        for number in range(int(self.runs_per_s * self._seconds)):
            route = rng.choice(["steady", "steady", "plain", "failing", "quick"])
            pause_ms = 0 if route == "quick" else rng.choice([50, 200])
            script = Script(route, rng.randrange(2**32), rng.randint(1, RETENTION_EVENTS - 20), pause_ms)
            key = hashlib.sha256(f"{self._seed} {number}".encode()).hexdigest()
            target = f"/{route}?seed={script.seed}&events={script.events}&pause_ms={pause_ms}&key={key}"
            self.history.runs[f"run {number} {route}"] = script
            begin = rng.uniform(0, 0.95 * self._seconds)
            for delay in (0, 0, *(rng.uniform(0, min(3, self._seconds / 2)) for _ in range(rng.randrange(4)))):
                name = f"reader {len(self.history.readers)} of run {number} {route}"
                readings.append(self._reader(Reader(name, f"run {number} {route}"), target, begin + delay))
        return readings

    def _topics(self) -> list[Any]:
        readings = []
        for number in range(4):
            topic = f"topic {number}"
            self.history.topics.append(topic)
            for reader in range(8):
                begin = self._rng.choice([0, self._rng.uniform(0, 0.9 * self._seconds)])
                sleepy = reader % 4 == 3
                name = f"reader {len(self.history.readers)} of {topic}"
                readings.append(self._reader(Reader(name, topic), f"/topics/topic%20{number}", begin, sleepy=sleepy))
        return readings

    def _reader(self, reader: Reader, target: str, begin_s: float, *, sleepy: bool = False) -> Any:
        self.history.readers.append(reader)
        return self._read(reader, target, begin_s, sleepy)

    async def _read(self, reader: Reader, target: str, begin_s: float, sleepy: bool) -> None:
        """As an `EventSource` reads: again and again, with the last id, until a 204."""
        rng, last_id, retry_ms = self._random(reader.name), "", 1000
        await asyncio.sleep(begin_s)
        while not reader.ended:
            connection = Connection(last_id)
            reader.connections.append(connection)
            answer = Answer(connection)
            head = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{self.server.port}\r\nAccept: text/event-stream\r\n"
            head += "Cache-Control: no-cache\r\n" + (f"Last-Event-ID: {last_id}\r\n" if last_id else "") + "\r\n"
            cut = self._cut(rng)
            connection.outcome = await exchange(self.server.port, head.encode(), answer, cut)
            ids = [block.id for block in connection.blocks if block.id is not None]
            last_id = ids[-1] if ids else last_id
            retry_ms = retry_ms if answer.retry_ms is None else answer.retry_ms
            reader.ended = answer.final or connection.status == 204
            if connection.status not in (0, 200, 204):
                return
            await asyncio.sleep(retry_ms / 1000 / self.haste)
            if sleepy and not self._calm:
                await asyncio.sleep(max(0, min(rng.uniform(0.5, 3), self._until_calm())))

    def _cut(self, rng: random.Random) -> Cut:
        after = round(10 ** rng.uniform(0, 4.7))
        if rng.random() < 0.05:
            after = -rng.randint(1, 100)
        cut = Cut(after, reset=rng.random() < 0.7, slow=rng.random() < 0.1)
        return Cut() if self._calm else cut

    async def _publisher(self, topic: str, name: str) -> None:
        rng, number = self._random(f"{topic} {name}"), 0
        while not self._calm:
            for _ in range(rng.randrange(20)):
                number += 1
                filler = "." * rng.choice([0, 10, 100, 1000])
                await self._publish(Publication(topic, name, f'"{topic} {name} {number}{filler}"'))
            await asyncio.sleep(rng.uniform(0, 0.3))

    async def _publish(self, publication: Publication) -> None:
        self.history.publications.append(publication)
        body = publication.data.encode()
        head = (
            f"POST /topics/{publication.topic.replace(' ', '%20')} HTTP/1.1\r\nHost: 127.0.0.1:{self.server.port}\r\n"
        )
        head += f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = Connection()
        answer = Answer(connection)
        outcome = await exchange(self.server.port, head.encode() + body, answer, Cut())
        if outcome == "refused":
            publication.status = -1
            await asyncio.sleep(0.05)
        elif outcome == "end":
            publication.status = connection.status
            if connection.status == 202:
                publication.id = json.loads(answer.body)["id"]


class _Stopped(Scenario):
    def __init__(self, seed: int, seconds: float, history: History, replica: Replica) -> None:
        super().__init__(seed, seconds, history, replica)
        self._replica = replica

    async def _trouble(self) -> None:
        """Stop the server at random moments, also while it starts, and start it again. Once at least."""
        rng, by = self._random("trouble"), self.history.stopped_by
        pause = rng.uniform(0.2, 0.6) * min(self._seconds, 5)
        while by is not None and (pause < self._until_calm() or not self.history.restarts):
            await asyncio.sleep(pause)
            await self._replica.stop(by)
            await asyncio.sleep(rng.choice([0, 0.3]))
            await self._replica.start()
            self.history.restarts += 1
            pause = rng.choice([0.2, 1, 4]) * rng.uniform(0.5, 2)
        await asyncio.sleep(self._until_calm())


def play(seed: int, seconds: float, stopped_by: signal.Signals | None = None, log: str = "sqlite") -> History:
    """A scenario of so many seconds, and until all readers have come to the end. `log` is as the setting."""
    history = History(stopped_by=stopped_by)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_Stopped(seed, seconds, history, Replica(folder, history, log)).play())
    return history
