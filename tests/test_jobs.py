"""Jobs, the report made in a thread, and items one by one: what they tell, how they end, and what they leave behind."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import anyio
import httpx
import pytest
from anyio import to_thread

from handlers import jobs
from handlers.database import NewTask, Tasks, open_tasks
from handlers.jobs import REPORT, ROUTES, SUMS, written_whole
from sseapp import SSEApp
from ssecore.errors import BadRequest, SSEAppError
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import POST, Run
from ssecore.settings import Settings
from ssecore.wire import Decoder, Event
from tests import serving
from tests.clients import AppWithCallers, ask, listening
from tests.serving import Server, wait_until

LIMIT_S: Final = 20
KEY: Final = "job-0123456789-0123456789"
#: Much more than can be hashed while a test runs, and no room on the disk.
ENDLESS_BYTES: Final = 1 << 40
DONE: Final = "[DONE]"
WAITING: Final = ("pending", 0, "waiting to start")

TODAY: Final = datetime.now(UTC).date()
ROWS: Final = [
    ("One two", "three", "open", 1, TODAY - timedelta(2)),
    ("Four", "", "doing", 2, TODAY - timedelta(2)),
    ("Five", "six seven", "done", 2, TODAY - timedelta(2)),  # done, so not overdue
    ("Eight", "", "open", 5, TODAY + timedelta(2)),
    ("Größe", "日本語", "open", 3, None),
]
FIGURES: Final = {
    "tasks": 5,
    "by_status": {"open": 3, "doing": 1, "done": 1},
    "by_priority": {"1": 1, "2": 2, "3": 1, "4": 0, "5": 1},
    "overdue": 2,
    "without_due": 1,
    "text": {"characters": 42, "words": 10, "words_per_task": 2.0, "longest_title": 7},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving.serve(folder) as server:
        fill(server, ROWS)
        yield server


@pytest.fixture
def files(server: Server, folder: Path) -> Iterator[Path]:
    """The server's folder of files, empty."""
    files = folder / "files"
    yield files
    for path in files.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.fixture(scope="module")
def unused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on which no run is ever started."""
    with serving.serve(tmp_path_factory.mktemp("unused")) as server:
        yield server


def fill(server: Server, rows: list[tuple[str, str, str, int, date | None]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("title", "description", "status", "priority", "due"), *rows])
    response = server.client.post("/tasks/import", content=text.getvalue(), headers={"content-type": "text/csv"})
    assert b'"failed":0' in response.content


def start(server: Server, kind: str, input: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
    body: dict[str, Any] = {"kind": kind} | ({} if input is None else {"input": input})
    return server.client.post("/jobs", json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def started(response: httpx.Response) -> str:
    """The id of a job that was accepted."""
    assert response.status_code == 202, response.text
    id = response.headers["run-id"]
    assert re.fullmatch(r"[\w-]{22}", id)
    assert (response.json(), response.headers["location"]) == ({"job_id": id}, f"jobs/{id}/progress")
    return str(id)


def progress(server: Server, id: str, **headers: str) -> httpx.Response:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.client.get(f"/jobs/{id}/progress", headers=headers)


def events(response: httpx.Response) -> list[Event]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    return Decoder().feed(response.read())


def states(response: httpx.Response, first: int = 1) -> list[tuple[str, int, str]]:
    """All states of a job that ended by itself. They have no names, one id after the other, and three members."""
    told, id = events(response), response.headers["run-id"]
    assert [event.event for event in told] == [None] * len(told)
    assert [event.id for event in told] == [f"{id}.{number}" for number in range(first, first + len(told))]
    assert told.pop().data == DONE
    objects = [json.loads(event.data) for event in told]
    assert all(list(one) == ["status", "progress", "message"] for one in objects)
    return [tuple(one.values()) for one in objects]


def run_job(server: Server, kind: str, input: dict[str, Any] | None = None) -> list[tuple[str, int, str]]:
    told = states(progress(server, started(start(server, kind, input))))
    assert told[0] == WAITING
    assert len(set(told)) == len(told)  # each change once
    assert [far for _, far, _ in told] == sorted(far for _, far, _ in told)
    assert {status for status, _, _ in told[1:-1]} <= {"running"}
    return told


def state(server: Server, id: str) -> str:
    return str(server.client.get(f"/runs/{id}").json()["state"])


def runs(server: Server) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = server.client.get("/runs").json()["runs"]
    return listed


def is_running(server: Server, id: str, message: str = "") -> None:
    """Wait until a job is at work, and says so."""
    with server.client.stream("GET", f"/jobs/{id}/progress") as response:
        seen = b""
        chunks = response.iter_raw()
        while b'"running"' not in seen or message.encode() not in seen:
            seen += next(chunks)


# Jobs


def test_digest_writes_the_sums_of_all_files_that_are_served(server: Server, files: Path) -> None:
    contents = {"a.txt": b"hello", "empty": b"", "more than a chunk": os.urandom(jobs.CHUNK_BYTES + 1)}
    names: dict[bytes, bytes] = {os.fsencode(name): content for name, content in contents.items()}
    names |= {b"a\nb\\c\r": b"odd", "Größe ✓".encode(): b"unicode", b"\xff not UTF-8": b"bytes"}
    for name, content in names.items():
        (files / os.fsdecode(name)).write_bytes(content)
    (files / ".hidden").write_bytes(b"hidden")
    (files / "folder").mkdir()
    (files / "folder" / "inside").write_bytes(b"inside")
    (files / "link").symlink_to("a.txt")
    (files / "out").symlink_to("/etc/hostname")
    os.mkfifo(files / "fifo")  # nobody writes: whoever opens it waits
    for _ in range(2):  # the second time the first result is there as well
        *told, end = run_job(server, "digest")
        assert end == ("completed", 100, f"6 files: {SUMS}")
        assert told[1] == ("running", 0, "listing the files")
        sums = (files / SUMS).read_bytes()
        assert sums.count(b"\n") == len(names)
        for content in names.values():
            assert hashlib.sha256(content).hexdigest().encode() in sums
        check = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=files, capture_output=True)
        assert check.returncode == 0, check.stderr
        assert not list(files.glob(f".{SUMS}*"))


def test_digest_of_nothing(server: Server, files: Path) -> None:
    assert run_job(server, "digest")[-1] == ("completed", 100, f"0 files: {SUMS}")
    assert (files / SUMS).read_bytes() == b""


def test_digest_tells_the_share_that_is_hashed(server: Server, files: Path) -> None:
    (files / "large").touch()
    os.truncate(files / "large", 100 * jobs.CHUNK_BYTES)
    told = run_job(server, "digest")
    assert [far for _, far, _ in told] == [0, 0, *range(1, 100), 100]
    assert told[-2] == ("running", 99, "hashing large")


def test_many_files_cost_no_more_events_than_percents(server: Server, files: Path) -> None:
    for number in range(500):
        (files / f"{number}").touch()
    told = run_job(server, "digest")
    assert told[-1] == ("completed", 100, f"500 files: {SUMS}")
    assert len(told) <= 103


def test_report_writes_figures_about_the_tasks(server: Server, files: Path) -> None:
    assert run_job(server, "report") == [
        WAITING,
        ("running", 0, "reading the tasks"),
        ("running", 80, "reading the tasks"),
        ("running", 90, "writing the report"),
        ("completed", 100, f"5 tasks: {REPORT}"),
    ]
    figures = json.loads((files / REPORT).read_bytes())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", figures.pop("created"))
    assert figures == FIGURES
    assert os.listdir(files) == [REPORT]
    assert server.client.get(f"/download/{REPORT}").content == (files / REPORT).read_bytes()


def test_report_reads_page_after_page(tmp_path: Path) -> None:
    with serving.serve(tmp_path) as server:
        assert run_job(server, "report")[-1] == ("completed", 100, f"0 tasks: {REPORT}")
        fill(server, [("Title", "", "open", 1, None)] * 2050)
        told = run_job(server, "report")
        assert [far for _, far, _ in told] == [0, *range(0, 100, 10), 100]
        assert json.loads((tmp_path / "files" / REPORT).read_bytes())["tasks"] == 2050


def test_sleep_tells_its_steps(server: Server) -> None:
    assert run_job(server, "sleep", {"steps": 3, "interval": 0}) == [
        WAITING,
        ("running", 0, "step 1 of 3"),
        ("running", 33, "step 2 of 3"),
        ("running", 66, "step 3 of 3"),
        ("completed", 100, "3 steps"),
    ]
    assert len(run_job(server, "sleep", {"steps": 1000, "interval": 0.0})) == 1002


def test_a_job_that_is_over_is_completed_among_the_runs(server: Server, files: Path) -> None:
    id = started(start(server, "digest"))
    states(progress(server, id))
    shown = server.client.get(f"/runs/{id}").json()
    assert (shown["state"], shown["route"]) == ("completed", "POST /jobs")


# Starting


def test_one_key_is_one_job(server: Server, files: Path) -> None:
    before = len(runs(server))
    first, second = (started(start(server, "report", idempotency_key=KEY)) for _ in range(2))
    states(progress(server, first))
    third = started(start(server, "report", idempotency_key=KEY))  # it is over by now
    assert first == second == third
    assert start(server, "digest", idempotency_key=KEY).status_code == 422
    assert len(runs(server)) == before + 1


def test_respond_async_is_what_it_does_anyway(server: Server) -> None:
    response = start(server, "sleep", {"steps": 1, "interval": 0}, prefer="respond-async")
    started(response)
    assert response.headers["preference-applied"] == "respond-async"
    assert "preference-applied" not in start(server, "sleep", {"steps": 1, "interval": 0}).headers


def test_a_job_begins_when_it_is_accepted_and_needs_no_reader(server: Server, files: Path) -> None:
    id = started(start(server, "digest"))
    wait_until(lambda: state(server, id) == "completed")
    assert (files / SUMS).exists()


def test_a_cursor_starts_no_job(server: Server) -> None:
    id = started(start(server, "sleep", {"steps": 1, "interval": 0}))
    states(progress(server, id))
    before = runs(server)
    assert states(start(server, "sleep", last_event_id=f"{id}.1"), 2)[-1] == ("completed", 100, "1 step")
    assert start(server, "sleep", last_event_id="x").status_code == 400
    assert runs(server) == before


# Reading


def test_progress_goes_on_after_the_last_event_id_and_ends(server: Server) -> None:
    id = started(start(server, "sleep", {"steps": 2, "interval": 0}))
    whole = states(progress(server, id))
    for seen in range(len(whole)):
        assert states(progress(server, id, last_event_id=f"{id}.{seen}"), seen + 1) == whole[seen:]
    assert progress(server, id, last_event_id=f"{id}.{len(whole) + 1}").status_code == 204
    assert progress(server, id, last_event_id="end").status_code == 204
    assert progress(server, id, last_event_id=f"{id}.x").status_code == 400


def test_two_read_one_job_and_a_cut_loses_nothing(server: Server) -> None:
    id = started(start(server, "sleep", {"steps": 20, "interval": 0.02}))
    target, decoder = f"/jobs/{id}/progress", Decoder()
    with server.client.stream("GET", target) as cut, server.client.stream("GET", target) as other:
        seen = next(told for chunk in cut.iter_raw() if (told := decoder.feed(chunk)))[:1]
        cut.close()
        rest = events(progress(server, id, last_event_id=seen[0].id or ""))
        whole = [(event.id, event.data) for event in events(other)]
    assert [(event.id, event.data) for event in [*seen, *rest]] == whole
    assert len(whole) == 23


def test_what_is_no_job_is_not_found(server: Server) -> None:
    other = server.client.post("/process", json=["a"])
    run = other.headers["run-id"]
    one, two = (started(start(server, "sleep", {"steps": 1, "interval": 0})) for _ in range(2))
    for path, cursor in [(run, ""), (run, f"{run}.1"), ("x", ""), ("B" * 22, ""), ("%00", "")]:
        problem = progress(server, path, **({"last_event_id": cursor} if cursor else {}))
        assert (problem.status_code, problem.json()["code"]) == (404, "not_found"), (path, cursor)
    assert progress(server, one, last_event_id=f"{two}.1").status_code == 409
    assert server.client.head(f"/jobs/{run}/progress").status_code == 404
    head = server.client.head(f"/jobs/{one}/progress")
    assert (head.status_code, head.content) == (200, b"")


def test_a_job_whose_events_are_deleted_is_not_found(server: Server) -> None:
    id = started(start(server, "sleep", {"steps": 1, "interval": 0}))
    states(progress(server, id))
    assert server.client.delete(f"/runs/{id}").status_code == 204
    assert progress(server, id).status_code == 404
    assert progress(server, id, last_event_id=f"{id}.1").status_code == 410
    gap, done = events(progress(server, id, last_event_id=f"{id}.1", accept="text/event-stream"))
    assert json.loads(gap.data) == {"type": "gap", "reason": "expired", "from": 2, "to": None}
    assert (done.data, done.id) == (DONE, "end")  # as on any data-only route


# Ending before the end


def endless(files: Path) -> None:
    (files / "endless").touch()
    os.truncate(files / "endless", ENDLESS_BYTES)


def half_written(files: Path, name: str) -> list[Path]:
    return list(files.glob(f".{name}.*"))


def cancelled(server: Server, id: str) -> None:
    """Cancel it, and see how that is told."""
    assert server.client.delete(f"/runs/{id}").status_code == 202
    *_, last, done = events(progress(server, id))
    assert done.data == DONE
    assert json.loads(last.data) == {
        "type": "cancelled",
        "reason": "asked",
        "status": "failed",
        "message": "cancelled",
    }
    *_, last, done = events(server.client.get(f"/runs/{id}/events"))
    assert json.loads(last.data) == {"type": "cancelled", "reason": "asked"}
    assert state(server, id) == "cancelled"


def test_a_cancelled_digest_ends_within_a_chunk_and_leaves_no_file(server: Server, files: Path) -> None:
    (files / SUMS).write_text("the old one")
    endless(files)
    id = started(start(server, "digest"))
    wait_until(lambda: half_written(files, SUMS))
    cancelled(server, id)
    assert sorted(os.listdir(files)) == sorted([SUMS, "endless"])
    assert (files / SUMS).read_text() == "the old one"


def test_a_sleeping_job_is_cancelled_at_once(server: Server) -> None:
    id = started(start(server, "sleep", {"steps": 2, "interval": 60}))
    is_running(server, id)
    cancelled(server, id)


class Held(Tasks):
    """Tasks of which one page is read, and then nothing until somebody lets it go on."""

    def __init__(self, tasks: Tasks) -> None:
        super().__init__(tasks._free, tasks._path)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def scan(self) -> Generator[tuple[int, int, list[bytes]], None, None]:
        for page in super().scan():
            yield page
            self.reached.set()
            assert self.go_on.wait(LIMIT_S)


@asynccontextmanager
async def held_report(folder: Path) -> AsyncIterator[tuple[SSEApp, Held]]:
    async with open_tasks(folder) as tasks:
        await tasks.insert([NewTask("Title", "", "open", 1, None)] * 3)
        held = Held(tasks)
        (folder / "files").mkdir()

        @asynccontextmanager
        async def resources(app: SSEApp) -> AsyncIterator[Any]:
            yield SimpleNamespace(tasks=held, files=folder / "files")

        app = AppWithCallers(ROUTES, Settings(log="memory"), lifespan=resources)
        with anyio.fail_after(LIMIT_S):
            async with app.running():
                yield app, held


@pytest.mark.parametrize("target", ["/jobs", "/api/process/stream"])
async def test_a_cancelled_report_ends_within_a_page_and_leaves_no_file(tmp_path: Path, target: str) -> None:
    json_body = {"content-type": "application/json", "prefer": "respond-async"}
    method, body = ("POST", b'{"kind": "report"}') if target == "/jobs" else ("GET", b"")
    async with held_report(tmp_path) as (app, held):
        run = (await ask(app, target, method, headers=json_body, body=body)).headers["run-id"]
        await to_thread.run_sync(held.reached.wait, LIMIT_S)
        assert len(half_written(tmp_path / "files", REPORT)) == len(os.listdir(tmp_path / "files")) == 1
        assert (await ask(app, f"/runs/{run}", "DELETE")).status == 202
        held.go_on.set()
        last = (await ask(app, f"/runs/{run}/events")).events[-2:]
        assert "cancelled" in (last[-1].event or last[0].data)
        assert os.listdir(tmp_path / "files") == []
        assert (await ask(app, f"/runs/{run}")).json["state"] == "cancelled"


async def test_somebody_elses_job_is_not_found(tmp_path: Path) -> None:
    def as_(caller: str) -> dict[str, str]:
        return {"x-caller": caller, "content-type": "application/json"}

    async with held_report(tmp_path) as (app, held):
        held.go_on.set()
        answer = await ask(app, "/jobs", "POST", headers=as_("ann"), body=b'{"kind": "report"}', root_path="/mounted")
        location = answer.headers["location"]
        assert location == f"jobs/{answer.json['job_id']}/progress"
        target = f"/{location}"
        for headers in (as_("ben"), as_("ben") | {"last-event-id": answer.json["job_id"] + ".1"}):
            assert (await ask(app, target, headers=headers)).status in (404, 410)
        assert (await ask(app, target, headers=as_("ann"))).events[-1].data == DONE


def test_a_job_that_fails_says_so_in_its_last_state(server: Server, files: Path) -> None:
    for kind, name in (("digest", SUMS), ("report", REPORT)):
        (files / name).mkdir()
        (files / name / "in the way").touch()
        id = started(start(server, kind))
        *_, before, last = states(progress(server, id))
        assert last == ("failed", before[1], f"can't write {name}: Is a directory")
        assert state(server, id) == "failed"
        assert not list(files.glob(".*"))


def test_an_unforeseen_failure_says_nothing_of_itself(tmp_path: Path) -> None:
    with serving.serve(tmp_path) as server:
        (tmp_path / "files").rename(tmp_path / "gone")
        id = started(start(server, "digest"))
        status, _, message = states(progress(server, id))[-1]
        assert status == "failed" and state(server, id) == "failed"
        reference = re.fullmatch(r"internal error \(reference ([0-9a-f]{12})\)", message)
        assert reference is not None
        serving.wait_until(lambda: reference[1] in server.log())


def test_a_killed_process_leaves_no_half_written_file_under_a_served_name(tmp_path: Path) -> None:
    files = tmp_path / "files"
    with serving.serve_uvicorn(tmp_path, app="tests.jobs_app:make") as server:
        fill(server, ROWS)
        (files / SUMS).write_text("the old one")
        endless(files)
        ids = [started(start(server, kind)) for kind in ("digest", "report")]
        wait_until(lambda: half_written(files, SUMS) and half_written(files, REPORT))
        server.process.send_signal(signal.SIGKILL)
        server.wait()
    assert sorted(name for name in os.listdir(files) if not name.startswith(".")) == sorted([SUMS, "endless"])
    assert (files / SUMS).read_text() == "the old one"
    (files / "endless").unlink()
    with serving.serve(tmp_path) as server:
        for id in ids:
            *_, last, done = events(progress(server, id))
            assert done.data == DONE and state(server, id) == "interrupted"
            assert json.loads(last.data) == {
                "type": "error",
                "error": "the service was stopped",
                "code": "interrupted",
                "status": "failed",
                "message": "the service was stopped",
            }
        # What is left is hidden, not hashed, and goes when it is so old that nobody can be at work on it.
        (young,) = half_written(files, SUMS)
        assert server.client.get(f"/download/{young.name}").status_code == 404
        assert server.client.get(f"/download/{SUMS}").text == "the old one"
        assert run_job(server, "digest")[-1] == ("completed", 100, f"0 files: {SUMS}")
        assert half_written(files, SUMS) == [young]
        old = time.time() - jobs.STALE_S - 1
        os.utime(young, (old, old))
        assert run_job(server, "digest")[-1][0] == "completed"
        assert half_written(files, SUMS) == []


def test_a_drain_ends_a_job_within_its_time(tmp_path: Path) -> None:
    with serving.serve(tmp_path, env={"SSEAPP_DRAIN_S": "0.2"}) as server:
        endless(tmp_path / "files")
        id = started(start(server, "digest"))
        wait_until(lambda: half_written(tmp_path / "files", SUMS))
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert os.listdir(tmp_path / "files") == ["endless"]
    with serving.serve(tmp_path) as server:
        assert state(server, id) == "interrupted"


# Files that are whole or not there


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "name"
    path.write_text("old")
    with written_whole(path) as one, written_whole(path) as other:
        one.write(b"one")
        other.write(b"other")
        assert path.read_text() == "old"
    assert path.read_text() == "one"  # whoever is ready last
    assert os.listdir(tmp_path) == ["name"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    for failure in (KeyError(), OSError(28, "No space left on device"), SystemExit()):
        with pytest.raises(SSEAppError if isinstance(failure, OSError) else type(failure)):
            with written_whole(path) as one:
                one.write(b"half")
                raise failure
        assert (os.listdir(tmp_path), path.read_text()) == (["name"], "one")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# The report, told as it is made


def test_the_report_is_told_as_it_is_made(server: Server, files: Path) -> None:
    response = server.client.get("/api/process/stream")
    told = [(event.event, json.loads(event.data)) for event in events(response)]
    names = [name for name, _ in told]
    assert names == ["progress", "log", "progress", "log", "progress", "log", "progress", "result"]
    steps = [tuple(data.values()) for name, data in told if name == "progress"]
    assert steps == [
        (1, 10, "reading the tasks", 0),
        (9, 10, "reading the tasks", 80),
        (10, 10, "writing the report", 90),
        (10, 10, "writing the report", 100),
    ]
    assert list(told[0][1]) == ["current_step", "total_steps", "step_name", "percent"]
    logs = [data for name, data in told if name == "log"]
    for entry in logs:
        assert list(entry) == ["timestamp", "level", "message", "details"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry.pop("timestamp"))
    size = (files / REPORT).stat().st_size
    assert [tuple(entry.values()) for entry in logs] == [
        ("debug", "tasks read", {"tasks": 5}),
        ("warning", "some tasks are overdue", {"overdue": 2}),
        ("success", "report written", {"file": REPORT, "bytes": size}),
    ]
    result = told[-1][1]
    assert list(result) == ["success", "data"] and result["success"] is True
    assert result["data"] == json.loads((files / REPORT).read_bytes()) | {"file": REPORT}
    run = response.headers["run-id"]
    assert state(server, run) == "completed"
    again = server.client.get("/api/process/stream", headers={"last-event-id": f"{run}.7"})
    assert [event.event for event in events(again)] == ["result"]
    assert server.client.get("/api/process/stream", headers={"last-event-id": f"{run}.8"}).status_code == 204


def test_a_report_that_fails_ends_with_an_error(server: Server, files: Path) -> None:
    (files / REPORT).mkdir()
    response = server.client.get("/api/process/stream")
    *_, last = events(response)
    assert last.event == "error"
    assert json.loads(last.data) == {"error": f"can't write {REPORT}: Is a directory", "code": "internal_error"}
    assert state(server, response.headers["run-id"]) == "failed"
    assert os.listdir(files) == [REPORT]


def test_the_report_with_a_key_is_made_once(server: Server, files: Path) -> None:
    one, two = (server.client.get(f"/api/process/stream?key={KEY}") for _ in range(2))
    assert one.content == two.content


# Items of a request


def test_each_item_is_told_with_its_sum_and_length(server: Server) -> None:
    texts = ["a", "", "é日本", "x" * (jobs.LONG_TEXT_CHARS + 1)]
    others: list[tuple[Any, str]] = [
        (5, "a number"),
        (1.5, "a number"),
        (None, "null"),
        ([], "an array"),
        ({}, "an object"),
        (True, "a boolean"),
    ]
    response = server.client.post("/process", json=[*texts, *[item for item, _ in others], "b"])
    told = [(event.event, json.loads(event.data)) for event in events(response)]

    def done(number: int, text: str) -> tuple[str, Any]:
        figures = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "length": len(text)}
        return "progress", {"current": number, "total": 11, "percent": round(100 * number / 11, 1), "item": figures}

    expected: list[tuple[str, Any]] = [done(number, text) for number, text in enumerate(texts, 1)]
    for index, (_, kind) in enumerate(others, 4):
        expected.append(("item_error", {"index": index, "error": f"expected a string, not {kind}"}))
    expected.append(done(11, "b"))
    assert told == [*expected, ("complete", {"status": "partial", "processed": 5, "failed": 6})]
    assert state(server, response.headers["run-id"]) == "completed"


@pytest.mark.parametrize(
    ("items", "complete", "end"),
    [
        (["a", "b"], {"status": "success", "processed": 2, "failed": 0}, "completed"),
        ([1, None], {"status": "failed", "processed": 0, "failed": 2}, "failed"),
        ([], {"status": "success", "processed": 0, "failed": 0}, "completed"),
    ],
)
def test_the_end_says_how_many_items_failed(
    server: Server, items: list[Any], complete: dict[str, Any], end: str
) -> None:
    response = server.client.post("/process", json=items)
    last = events(response)[-1]
    assert (last.event, json.loads(last.data)) == ("complete", complete)
    assert state(server, response.headers["run-id"]) == end


def test_no_items_and_the_most_items(server: Server) -> None:
    assert [event.event for event in events(server.client.post("/process", json=[]))] == ["complete"]
    told = events(server.client.post("/process", json=["x", *[0] * (jobs.MAX_ITEMS - 1)]))
    assert len(told) == jobs.MAX_ITEMS + 1


# What is not there


def refused(server: Server, response: httpx.Response, status: int, field: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem.get("field")) == (status, field)
    assert runs(server) == []


def test_an_unknown_job_is_a_404(unused: Server) -> None:
    for id in ("x", "A" * 22, "A" * 10_000, "..", "%2e%2e"):
        assert unused.client.get(f"/jobs/{id}/progress").status_code == 404
    refused(unused, progress(unused, "A" * 22), 404)


# Detached routes, the engine's part


async def detached(request: Request) -> AsyncIterator[Event]:
    if request.body == "bad":
        raise BadRequest("this can't be used", field="x")
    if request.body == "slow":
        await anyio.sleep_forever()
    yield Event({"run": request.run_id}, "run")
    if request.body == "failed":
        request.failed = True
    yield Event("", "done")


def accept(request: Request, run: str) -> Response:
    return JSON({"mine": run}, status=202, headers={"x-own": "1"})


DETACHED: Final = [POST("/detached", detached, body=str, run=Run(accepted=accept))]


@asynccontextmanager
async def posting(body: str) -> AsyncIterator[Any]:
    app = SSEApp(DETACHED, Settings(log="memory"))
    with anyio.fail_after(LIMIT_S):
        async with app.running():
            headers = {"content-type": "application/json"}
            yield app, await ask(app, "/detached", "POST", headers=headers, body=json.dumps(body).encode())


async def test_a_detached_route_answers_with_its_own_words_and_the_runs_id() -> None:
    for body, end in (("good", "completed"), ("failed", "failed")):
        async with posting(body) as (app, answer):
            run = answer.headers["run-id"]
            assert (answer.status, answer.json, answer.headers["x-own"]) == (202, {"mine": run}, "1")
            told, _ = (await ask(app, f"/runs/{run}/events")).events
            assert json.loads(told.data) == {"run": run}  # the handler knows it as well
            assert (await ask(app, f"/runs/{run}")).json["state"] == end


async def test_a_detached_run_that_fails_at_once_is_none() -> None:
    async with posting("bad") as (app, answer):
        assert answer.problem == (400, "bad_request")
        assert (await ask(app, "/runs")).json == {"runs": []}


async def test_a_detached_run_is_accepted_before_its_first_event() -> None:
    async with posting("slow") as (app, answer):
        assert answer.status == 202
        async with listening(app, f"/runs/{answer.json['mine']}/events") as reading:
            await reading.chunk()
            assert reading.raw.endswith(f"id: {answer.json['mine']}.0\n\n".encode())
