"""Background jobs, and work in threads with progress.

A job is a run. Its events are states, `{"status", "progress", "message"}`, then `[DONE]`. After a cancel or a crash the
engine sends `{"type": "cancelled", …}` or `{"type": "error", …}`, to which `GET /jobs/{job_id}/progress` adds the
members of a state.

Results are files with fixed names, replaced atomically, so they don't accumulate.
"""

import hashlib
import os
import stat
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import IO, Annotated, Any, Final, Literal, get_args

import msgspec
from anyio import sleep, to_thread
from msgspec import Meta

from handlers.database import Status, Tasks
from handlers.tasks import outcome
from ssecore.dialects import DATA_ONLY, public_text
from ssecore.errors import SSEAppError
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import GET, POST, Run
from ssecore.streaming.progress import LogLevel, ProgressLogger, Report, from_thread
from ssecore.wire import Event, encode_json

__all__ = ["REPORT", "ROUTES", "SUMS"]

#: Written by `digest`, for `sha256sum --check`.
SUMS: Final = "SHA256SUMS"
#: Written by `report`.
REPORT: Final = "tasks-report.json"
#: Hashed in about a millisecond, between two checks for a cancellation.
CHUNK_BYTES: Final = 1024 * 1024
#: For temporary files of killed processes.
STALE_S: Final = 7 * 86400.0
#: Of the progress while tasks are read.
PARTS: Final = 9
#: Nothing else limits callers without a name.
MAX_SLEEP_S: Final = 600
#: Each item costs an event or two.
MAX_ITEMS: Final = 10_000
#: A longer text would block the event loop for 100 µs.
LONG_TEXT_CHARS: Final = 64 * 1024


class _NoInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _Pauses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    steps: Annotated[int, Meta(ge=1, le=1000)] = 10
    interval: Annotated[float, Meta(ge=0, le=60)] = 1.0

    def __post_init__(self) -> None:
        if self.steps * self.interval > MAX_SLEEP_S:
            raise ValueError(f"steps times interval must be at most {MAX_SLEEP_S} seconds")


class _Digest(msgspec.Struct, tag_field="kind", tag="digest", forbid_unknown_fields=True):
    input: _NoInput = _NoInput()


class _Report(msgspec.Struct, tag_field="kind", tag="report", forbid_unknown_fields=True):
    input: _NoInput = _NoInput()


class _Sleep(msgspec.Struct, tag_field="kind", tag="sleep", forbid_unknown_fields=True):
    input: _Pauses = _Pauses()


#: Percent and message; with 100 the message is the result.
_Progress = tuple[int, str]


def accepted(request: Request, job_id: str) -> Response:
    return JSON({"job_id": job_id}, status=202, headers={"location": request.reference(f"/jobs/{job_id}/progress")})


async def job(request: Request) -> AsyncIterator[Event]:
    """Start a job in the background."""
    progress: _Progress = (0, "waiting to start")
    yield _state("pending", progress)
    sent: _Progress | None = None
    try:
        async with aclosing(_work(request)) as work:
            async for progress in work:
                if progress[0] < 100 and progress != sent:
                    yield _state("running", progress)
                    sent = progress
    except Exception as error:
        request.failed = True
        yield _state("failed", (progress[0], public_text(error)))
    else:
        # After the block, so that this event and the run's end are one append.
        yield _state("completed", progress)
    yield Event("[DONE]")


def _state(status: Literal["pending", "running", "completed", "failed"], progress: _Progress) -> Event:
    return Event({"status": status, "progress": progress[0], "message": progress[1]})


async def _work(request: Request) -> AsyncGenerator[_Progress, None]:
    body: _Digest | _Report | _Sleep = request.body
    if isinstance(body, _Sleep):
        steps = body.input.steps
        for step in range(steps):
            yield 100 * step // steps, f"step {step + 1} of {steps}"
            await sleep(body.input.interval)
        yield 100, _counted(steps, "step")
        return
    if isinstance(body, _Digest):
        thread = from_thread(_digest, request.state.files)
    else:
        thread = from_thread(_report_job, request.state.tasks, request.state.files)
    async with thread as reports:
        async for progress in reports:
            yield progress


async def job_progress(request: Request, job_id: str) -> Any:
    """Read a job's progress."""
    return await request.runs.view(request, job_id, only="POST /jobs", translate=_as_state)


def _as_state(event: Event) -> Event:
    if event.data == "[DONE]":
        return event
    data: dict[str, Any] = msgspec.json.decode(event.data)
    if "type" in data:
        data |= {"status": "failed", "message": data.get("error", data["type"])}
    return Event(data)


def _reporter(report: Report[_Progress], steps: int) -> ProgressLogger:
    return ProgressLogger(steps, on_progress=lambda state: report((state.percent, state.step_name)))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# The files


def _digest(report: Report[_Progress], folder: Path) -> None:
    """The SHA-256 of each file that can be downloaded."""
    progress = _reporter(report, 100)
    progress.set_step(1, "listing the files")
    sizes = dict(_files(folder, report.check))
    unread = done = 0
    total = sum(sizes.values()) + len(sizes)  # an empty file counts too
    with written_whole(folder / SUMS) as sums:
        for name in sorted(sizes):
            digest = hashlib.sha256()
            try:
                for chunk in _chunks(folder / name):
                    report.check()
                    digest.update(chunk)
                    done += len(chunk) or 1
                    step = min(1 + 100 * done // total, 100)  # a file may grow
                    if step > progress.state.current_step:
                        progress.set_step(step, f"hashing {_shown(name)}")
            except OSError:  # deleted or unreadable: continue with the other files
                unread += 1
            else:
                sums.write(_sum_line(digest.hexdigest(), name))
    message = f"{_counted(len(sizes) - unread, 'file')}: {SUMS}"
    report((100, f"{message} ({unread} could not be read)" if unread else message))


def _files(folder: Path, check: Callable[[], None]) -> Iterator[tuple[str, int]]:
    """Names and sizes of downloadable files."""
    with os.scandir(folder) as entries:
        for entry in entries:
            check()
            with suppress(FileNotFoundError):
                if entry.name != SUMS and not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                    yield entry.name, entry.stat(follow_symlinks=False).st_size


def _chunks(path: Path) -> Iterator[bytes]:
    """A file's chunks, then b""."""
    # The file may have been replaced by a link or a FIFO.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a file")
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
        yield b""


def _sum_line(digest: str, name: str) -> bytes:
    """If sha256sum escapes a name, the line begins with a backslash."""
    plain = os.fsencode(name)
    escaped = plain.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return b"%b%b  %b\n" % (b"\\" if escaped != plain else b"", digest.encode(), escaped)


def _shown(name: str) -> str:
    return os.fsencode(name).decode(errors="replace")


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that replaces `path` atomically at the end of the block. Raises `SSEAppError`."""
    temporary = path.with_name(f".{path.name}.{token_hex(8)}")
    try:
        for stale in path.parent.glob(f".{path.name}.*"):
            with suppress(FileNotFoundError):
                if stale.stat().st_mtime < time.time() - STALE_S:
                    stale.unlink()
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SSEAppError(f"can't write {path.name}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


# The tasks


class _Row(msgspec.Struct):
    title: str
    description: str
    status: str
    priority: int
    due: str | None


class _Figures:
    def __init__(self, today: str) -> None:
        self.tasks = self.overdue = self.without_due = self.characters = self.words = self.longest_title = 0
        self._today = today
        self._statuses: Counter[str] = Counter()
        self._priorities: Counter[int] = Counter()
        self._decode = msgspec.json.Decoder(_Row).decode

    def add(self, rows: list[bytes]) -> None:
        for line in rows:
            row = self._decode(line)
            self.tasks += 1
            self._statuses[row.status] += 1
            self._priorities[row.priority] += 1
            self.without_due += row.due is None
            # Dates have one format, so they compare as strings.
            self.overdue += row.due is not None and row.due < self._today and row.status != "done"
            self.characters += len(row.title) + len(row.description)
            self.words += len(row.title.split()) + len(row.description.split())
            self.longest_title = max(self.longest_title, len(row.title))

    def to_dict(self) -> dict[str, Any]:
        return {
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tasks": self.tasks,
            "by_status": {status: self._statuses[status] for status in get_args(Status)},
            "by_priority": {str(priority): self._priorities[priority] for priority in range(1, 6)},
            "overdue": self.overdue,
            "without_due": self.without_due,
            "text": {
                "characters": self.characters,
                "words": self.words,
                "words_per_task": round(self.words / max(self.tasks, 1), 2),
                "longest_title": self.longest_title,
            },
        }


def _make_report(progress: ProgressLogger, check: Callable[[], None], tasks: Tasks, folder: Path) -> dict[str, Any]:
    """`progress` has `PARTS + 1` steps."""
    figures = _Figures(datetime.now(UTC).date().isoformat())
    progress.set_step(1, "reading the tasks")
    with written_whole(folder / REPORT) as file:
        with closing(tasks.scan()) as pages:
            for read, highest, rows in pages:
                check()
                figures.add(rows)
                step = 1 + (PARTS - 1) * read // highest
                if step > progress.state.current_step:
                    progress.log("tasks read", LogLevel.DEBUG, {"tasks": figures.tasks})
                    progress.set_step(step, "reading the tasks")
        data = figures.to_dict()
        if figures.overdue:
            progress.log("some tasks are overdue", LogLevel.WARNING, {"overdue": figures.overdue})
        progress.set_step(PARTS + 1, "writing the report")
        file.write(msgspec.json.format(encode_json(data), indent=2) + b"\n")
        size = file.tell()
    progress.log("report written", LogLevel.SUCCESS, {"file": REPORT, "bytes": size})
    progress.complete()
    return data


def _report_job(report: Report[_Progress], tasks: Tasks, folder: Path) -> None:
    data = _make_report(_reporter(report, PARTS + 1), report.check, tasks, folder)
    report((100, f"{_counted(data['tasks'], 'task')}: {REPORT}"))


def _report_events(report: Report[Event], tasks: Tasks, folder: Path) -> None:
    data = _make_report(ProgressLogger.reporting(report, PARTS + 1), report.check, tasks, folder)
    report(Event({"success": True, "data": data | {"file": REPORT}}, "result"))


async def process_stream(request: Request) -> AsyncIterator[Event]:
    """Make the report, and stream its progress and log."""
    async with from_thread(_report_events, request.state.tasks, request.state.files) as events:
        async for event in events:
            if event.event != "result":
                yield event
    # After the block, so that this event and the run's end are one append.
    yield event


# Items of a request


async def process_items(request: Request) -> AsyncIterator[Event]:
    """Hash each item with SHA-256."""
    items: list[Any] = request.body
    failed = 0
    for index, item in enumerate(items):
        if not isinstance(item, str):
            error = f"expected a string, not {_JSON_NAMES.get(type(item), 'a number')}"
            yield Event({"index": index, "error": error}, "item_error")
            failed += 1
            continue
        long = len(item) > LONG_TEXT_CHARS
        figures = {"sha256": await to_thread.run_sync(_hashed, item) if long else _hashed(item), "length": len(item)}
        percent = round(100 * (index + 1) / len(items), 1)
        yield Event({"current": index + 1, "total": len(items), "percent": percent, "item": figures}, "progress")
    processed = len(items) - failed
    status = outcome(processed, failed)
    request.failed = status == "failed"
    yield Event({"status": status, "processed": processed, "failed": failed}, "complete")


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()  # JSON is read without lone surrogates


_JSON_NAMES: Final = {dict: "an object", list: "an array", bool: "a boolean", type(None): "null"}


def _kind(request: Request) -> str:
    return str(request.body.__struct_config__.tag)


def _items(request: Request) -> str:
    return f"{len(request.body)} items"


ROUTES = [
    POST("/jobs", job, body=_Digest | _Report | _Sleep, dialect=DATA_ONLY, run=Run(accepted=accepted, about=_kind)),
    GET("/jobs/{job_id}/progress", job_progress, dialect=DATA_ONLY),
    GET("/api/process/stream", process_stream, run=Run()),
    POST("/process", process_items, body=Annotated[list[Any], Meta(max_length=MAX_ITEMS)], run=Run(about=_items)),
]
