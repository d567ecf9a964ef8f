"""What a real process keeps in all: many small requests fill no disk, and the newest runs are there."""

from pathlib import Path

from tests.needs import needs
from tests.redis_server import serving
from tests.serving import Server, serve, wait_until

KIB = 1024
BOUND = 512 * KIB
#: Each takes 0.9 KB in SQLite's file, and 6 KB in Redis.
RUNS = 800


def start(server: Server, count: int) -> list[str]:
    """Start so many runs, each by a request of some bytes, one after another."""
    runs = []
    for _ in range(count):
        answer = server.client.get("/chat?prompt=hi", headers={"prefer": "respond-async"})
        assert answer.status_code == 202, answer.text
        runs.append(answer.json()["run"])
    return runs


def exists(server: Server, run: str) -> bool:
    return server.client.get(f"/runs/{run}").status_code == 200


@needs("time")
def test_small_requests_fill_no_disk(tmp_path: Path) -> None:
    env = {"SSEAPP_LOG_MAX_BYTES": str(BOUND), "SSEAPP_MOCK_DELAY_S": "0"}
    with serve(tmp_path, env=env) as server:
        runs = start(server, RUNS)
        assert exists(server, runs[-1]) and exists(server, runs[-20])
        wait_until(lambda: not exists(server, runs[0]))
        (run,) = start(server, 1)
        wait_until(lambda: server.client.get(f"/runs/{run}").json()["state"] == "completed")
    assert server.process.returncode == 0
    # A quarter of the file may be free pages.
    assert (tmp_path / "log.db").stat().st_size < 1.5 * BOUND


@needs("valkey")
def test_small_requests_fill_no_redis(tmp_path: Path) -> None:
    with serving("valkey") as redis:

        def used() -> int:
            return int(redis.call("INFO", "memory").partition("used_memory:")[2].split()[0])

        env = {"SSEAPP_LOG": redis.url, "SSEAPP_LOG_MAX_BYTES": str(BOUND), "SSEAPP_MOCK_DELAY_S": "0"}
        with serve(tmp_path, env=env) as server:
            before = used()
            runs = start(server, RUNS)
            assert exists(server, runs[-1]) and exists(server, runs[-20])
            assert not exists(server, runs[0])
            # Besides the runs there are buffers of connections, and tables that grow by doubling.
            assert used() - before < 2 * BOUND, "without a bound it is 9 times as much"
