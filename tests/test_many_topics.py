"""Many topics one after another, on a real server and over a restart."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import anyio

from tests.needs import needs
from tests.serving import Server, serve_uvicorn, wait_until

pytestmark = needs("time")

#: 30,000 for a long evening.
USERS: Final = int(os.environ.get("SSEAPP_TEST_USERS", "1500"))
#: How many come at the same moment.
ABREAST: Final = 20


async def subscribe(port: int, user: int) -> None:
    """Read a user's stream up to its first event, and leave."""
    async with await anyio.connect_tcp("127.0.0.1", port) as client:
        await client.send(b"GET /users/user-%d/stream HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" % user)
        answer = b""
        while b"event: init" not in answer:
            answer += await client.receive()
        assert answer.startswith(b"HTTP/1.1 200 "), answer


async def subscribe_all(port: int, users: range) -> None:
    async def some(first: int) -> None:
        for user in users[first::ABREAST]:
            await subscribe(port, user)

    async with anyio.create_task_group() as tasks:
        for first in range(ABREAST):
            tasks.start_soon(some, first)


def topics(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "log.db", timeout=10)) as db:
        count: int = db.execute("SELECT count(*) FROM streams").fetchone()[0]
        assert db.execute("SELECT count(*) FROM epochs").fetchone()[0] <= count + 1, (
            "what is opened once more holds events"
        )
        return count


def test_every_user_gets_a_stream_and_the_log_forgets_those_who_left(tmp_path: Path) -> None:
    published: list[str] = []

    def publish(server: Server) -> None:
        answer = server.client.post("/users/user-0/notifications", json={"n": len(published)})
        assert answer.status_code == 202, answer.text
        published.append(answer.json()["id"])

    with serve_uvicorn(tmp_path, app="tests.topics_app:make") as server:
        anyio.run(subscribe_all, server.port, range(USERS))
        publish(server)
        wait_until(lambda: topics(tmp_path) == 1, timeout_s=60)
        anyio.run(subscribe_all, server.port, range(USERS, USERS + 200))
        server.process.kill()
        server.process.wait()
    assert topics(tmp_path) > 1
    with serve_uvicorn(tmp_path, app="tests.topics_app:make") as server:
        anyio.run(subscribe_all, server.port, range(200))
        publish(server)
        wait_until(lambda: topics(tmp_path) == 1, timeout_s=60)
    assert [id.partition(".")[2] for id in published] == ["1", "2"], "what holds events goes on"
