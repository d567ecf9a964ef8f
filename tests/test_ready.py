"""`/readyz` of a real process whose SQLite log can't be written: it says so, and refuses work instead of losing it."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.needs import needs
from tests.serving import Server, serve, wait_until
from tests.test_runs_faults import fill

UNREADY = {"status": "the event log can't be reached or written"}


def delete(log: Path) -> None:
    log.unlink()


def replace(log: Path) -> None:
    copy = log.with_suffix(".copy")
    shutil.copy(log, copy)
    copy.replace(log)


def delete_wal(log: Path) -> None:
    log.with_name("log.db-wal").unlink()


def post(server: Server) -> Any:
    """Start a run; gives the answer's status, and the code of a refusal."""
    answer = server.client.get("/chat?prompt=hi", headers={"prefer": "respond-async"})
    return answer.status_code, answer.json().get("code")


def is_unready(server: Server) -> bool:
    answer = server.client.get("/readyz")
    return answer.status_code == 503 and answer.json() == UNREADY


@pytest.mark.parametrize("lose", [delete, replace, delete_wal])
def test_a_service_whose_log_was_deleted_or_replaced_takes_no_work(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    with serve(tmp_path) as server:
        assert post(server) == (202, None)
        assert server.client.get("/readyz").status_code == 200
        lose(tmp_path / "log.db")
        assert post(server) == (503, "log_unavailable")
        assert is_unready(server)
        assert server.client.post("/topics/news", json=1).status_code == 503
        assert server.client.get("/healthz").status_code == 200
        wait_until(lambda: "was deleted or replaced while this process uses it" in server.log())
        wait_until(lambda: "start it again" in server.log())
        assert "Traceback" not in server.log()


def test_a_service_finds_out_by_itself_that_its_log_was_deleted_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        assert post(server) == (202, None)
        aside = tmp_path / "aside"
        (tmp_path / "log.db").rename(aside)
        wait_until(lambda: is_unready(server))
        aside.rename(tmp_path / "log.db")
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        assert post(server) == (202, None)


@needs("tmpfs")
def test_a_service_with_a_full_disk_is_not_ready_until_there_is_room(small_disk: Path) -> None:
    with serve(small_disk) as server:
        ballast = fill(small_disk)
        wait_until(lambda: server.client.post("/topics/news", json="x" * 60_000).status_code == 503)
        assert is_unready(server)
        # Nobody sends it requests then; it finds out by itself. And only when there really is room.
        wait_until(lambda: server.log().count("can't write the event log") == 1)
        with ballast.open("r+b") as file:
            file.truncate(ballast.stat().st_size - 1)
        assert not [status for _ in range(70) if (status := ready_soon(server)) != 503]
        ballast.unlink()
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        assert server.client.post("/topics/news", json="x" * 60_000).status_code == 202


def ready_soon(server: Server) -> int:
    """What `/readyz` answers a tenth of a second from now."""
    time.sleep(0.1)
    return server.client.get("/readyz").status_code
