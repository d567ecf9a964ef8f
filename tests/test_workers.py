"""Several workers of one server, and no log that they share."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from ssecore import workers
from tests.needs import needs
from tests.serving import free_port, wait_until

ROOT = Path(__file__).parent.parent


def workers_of_uvicorn(folder: Path, *more: str, **env: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "uvicorn", "--factory", "sseapp:create_app", *more, "--port", str(free_port())]
    environ = {**os.environ, "SSEAPP_DATA_DIR": str(folder), "TMPDIR": str(folder), **env}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)


def ended(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    finally:
        process.kill()


@needs("time")
def test_workers_with_sqlite_end_in_words_that_say_what_to_do(tmp_path: Path) -> None:
    process = workers_of_uvicorn(tmp_path, "--workers", "2", SSEAPP_DRAIN_S="0.1")
    try:
        process.wait(30)  # uvicorn stops all workers when one doesn't start
    finally:
        process.kill()
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert re.search("If the two are workers of one server: start one worker only.*SSEAPP_LOG=redis://", log)


@pytest.mark.parametrize(("more", "told"), [(["--workers", "2"], 1), ([], 0)])
def test_workers_with_memory_logs_are_warned_about(more: Sequence[str], told: int, tmp_path: Path) -> None:
    process = workers_of_uvicorn(tmp_path, *more, SSEAPP_LOG="memory")
    try:
        started = max(told + 1, 1)
        log = wait_until(lambda: (text := (tmp_path / "log").read_text()).count("startup complete") == started and text)
    finally:
        ended(process)
    assert log and log.count("this server has several workers, each with a memory log of its own") == told
    assert not list(tmp_path.glob("sseapp-worker-of-*"))


@needs("time")
def test_gunicorns_workers_are_warned_about_too_and_say_farewell(tmp_path: Path) -> None:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-k",
        "asgi",
        "-w",
        "2",
        "-b",
        f"127.0.0.1:{port}",
        "--no-control-socket",
    ]
    environ = {**os.environ, "SSEAPP_DATA_DIR": str(tmp_path), "SSEAPP_LOG": "memory", "TMPDIR": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "sseapp:create_app()"], cwd=ROOT, env=environ, stdout=log, stderr=log)
    try:
        told = wait_until(lambda: (text := (tmp_path / "log").read_text()).count("server listening") == 2 and text)
        assert told and told.count("this server has several workers") == 1
        with httpx.stream("GET", f"http://127.0.0.1:{port}/topics/news", trust_env=False) as answer:
            chunks = answer.iter_raw()
            assert b"event: init" in next(chunks)
            process.terminate()
            assert b"".join(chunks).startswith(b"retry: "), "and its proper end, else httpx raises"
        assert process.wait(20) == 0
    finally:
        process.kill()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_two_apps_of_one_process_are_one_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workers, "_server", lambda: 4711)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with workers.only_worker() as one, workers.only_worker() as two:
        assert one and two
    assert not list(tmp_path.iterdir())
