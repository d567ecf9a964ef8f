"""Long work: jobs, which nobody has to wait for, and work in a thread that tells how far it is.

A job is a run of `POST /jobs`, which answers with its id at once. What it tells are states and nothing else:
`{"status", "progress", "message"}`, each change once, then `[DONE]`; on its own failure the last state is `failed`.
What ends it from outside (a cancel, a crash) the engine tells, in words of its own: `{"type": "cancelled", …}` or
`{"type": "error", …}`. For those who only know states `GET /jobs/{job_id}/progress` adds `"status": "failed"` to it,
and a `message`; the progress stays the one that was told last.

Results are files of the files folder, under fixed names, so that they don't pile up: a new one takes the old one's
place in one step. Of two jobs at once the later one's stays.
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

#: What `digest` writes, in the form that `sha256sum --check` reads.
SUMS: Final = "SHA256SUMS"
#: What `report` writes.
REPORT: Final = "tasks-report.json"
#: Hashed between two looks at whether the job is cancelled: about a millisecond.
CHUNK_BYTES: Final = 1024 * 1024
#: What a killed process left half-written is removed by the next job that writes the same file, when it is so old that
#: nobody is at work on it any more: the folder may be another process's too.
STALE_S: Final = 7 * 86400.0
#: Parts in which the tasks are read, as far as it is told: many enough to be watched.
PARTS: Final = 9
#: A `sleep` job only shows how a job looks, and takes a run's place while it sleeps. Where callers have no name,
#: nothing else bounds how long one caller holds all of those places.
MAX_SLEEP_S: Final = 600
#: Items of one request: each costs an event or two, and a run has a limit of those.
MAX_ITEMS: Final = 10_000
#: A text longer than this is hashed in a worker thread: here it would hold up everybody for some 100 µs.
LONG_TEXT_CHARS: Final = 64 * 1024


class _NoInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _Pauses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    steps: Annotated[int, Meta(ge=1, le=1000)] = 10
    interval: Annotated[float, Meta(ge=0, le=60)] = 1.0

    def __post_init__(self) -> None:
        if self.steps * self.interval > MAX_SLEEP_S:
            raise ValueError(f"steps times interval may be {MAX_SLEEP_S} seconds at most")


class _Digest(msgspec.Struct, tag_field="kind", tag="digest", forbid_unknown_fields=True):
    input: _NoInput = _NoInput()


class _Report(msgspec.Struct, tag_field="kind", tag="report", forbid_unknown_fields=True):
    input: _NoInput = _NoInput()


class _Sleep(msgspec.Struct, tag_field="kind", tag="sleep", forbid_unknown_fields=True):
    input: _Pauses = _Pauses()


#: How far a job is, in percent, and a word on it. With 100 it is the result.
_Far = tuple[int, str]


def accepted(request: Request, job_id: str) -> Response:
    return JSON({"job_id": job_id}, status=202, headers={"location": request.reference(f"/jobs/{job_id}/progress")})


async def job(request: Request) -> AsyncIterator[Event]:
    """Start a job, which works on by itself."""
    far: _Far = (0, "waiting for its turn")
    yield _state("pending", far)
    told: _Far | None = None
    try:
        async with aclosing(_work(request)) as work:
            async for far in work:
                if far[0] < 100 and far != told:
                    yield _state("running", far)
                    told = far
    except Exception as error:
        request.failed = True
        yield _state("failed", (far[0], public_text(error)))
    else:
        # Behind the block, so that the end and the run's close go into the log as one.
        yield _state("completed", far)
    yield Event("[DONE]")


def _state(status: Literal["pending", "running", "completed", "failed"], far: _Far) -> Event:
    return Event({"status": status, "progress": far[0], "message": far[1]})


async def _work(request: Request) -> AsyncGenerator[_Far, None]:
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
        thread = from_thread(_report, request.state.tasks, request.state.files)
    async with thread as told:
        async for far in told:
            yield far


async def job_progress(request: Request, job_id: str) -> Any:
    """How far a job is."""
    return await request.runs.view(request, job_id, only="POST /jobs", translate=_as_state)


def _as_state(event: Event) -> Event:
    """The engine's own last words, told as a state too."""
    if event.data == "[DONE]":
        return event
    data: dict[str, Any] = msgspec.json.decode(event.data)
    if "type" in data:
        data |= {"status": "failed", "message": data.get("error", data["type"])}
    return Event(data)


def _reporter(report: Report[_Far], steps: int) -> ProgressLogger:
    return ProgressLogger(steps, on_progress=lambda state: report((state.percent, state.step_name)))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# The files


def _digest(report: Report[_Far], folder: Path) -> None:
    """In a worker thread: the SHA-256 of each file that could be downloaded."""
    progress = _reporter(report, 100)
    progress.set_step(1, "listing the files")
    sizes = dict(_files(folder, report.check))
    unread = done = 0
    total = sum(sizes.values()) + len(sizes)  # an empty file is work as well
    with written_whole(folder / SUMS) as sums:
        for name in sorted(sizes):
            digest = hashlib.sha256()
            try:
                for chunk in _chunks(folder / name):
                    report.check()
                    digest.update(chunk)
                    done += len(chunk) or 1
                    step = min(1 + 100 * done // total, 100)  # it may grow while it is read
                    if step > progress.state.current_step:
                        progress.set_step(step, f"hashing {_shown(name)}")
            except OSError:  # it went away, or can't be read: that is no reason to keep the others' from everybody
                unread += 1
            else:
                sums.write(_sum_line(digest.hexdigest(), name))
    message = f"{_counted(len(sizes) - unread, 'file')}: {SUMS}"
    report((100, f"{message} ({unread} could not be read)" if unread else message))


def _files(folder: Path, check: Callable[[], None]) -> Iterator[tuple[str, int]]:
    """Name and size of each file that is served: regular ones, no links, no hidden ones. Without our own result."""
    with os.scandir(folder) as entries:
        for entry in entries:
            check()
            with suppress(FileNotFoundError):
                if entry.name != SUMS and not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                    yield entry.name, entry.stat(follow_symlinks=False).st_size


def _chunks(path: Path) -> Iterator[bytes]:
    """A file's, and b"" at its end."""
    # What stands under the name now: never a link, and no waiting for the other end of a FIFO.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a file")
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
        yield b""


def _sum_line(digest: str, name: str) -> bytes:
    """As sha256sum writes it: with a backslash, a newline or a CR escaped, and the line then marked by a backslash."""
    plain = os.fsencode(name)
    escaped = plain.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return b"%b%b  %b\n" % (b"\\" if escaped != plain else b"", digest.encode(), escaped)


def _shown(name: str) -> str:
    return os.fsencode(name).decode(errors="replace")


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into that is under its name as a whole or not at all; what was there stays until then.

    Meanwhile it has a hidden name, which isn't served. Raises `SSEAppError` where it can't be written.
    """
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
        raise SSEAppError(f"{path.name} can't be written: {error.strerror}") from error
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
    """Counts, in constant memory."""

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
            # Dates are in one form only, so they compare as texts.
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
    """In a worker thread: figures about the tasks, written to a file. `progress` has one step more than `PARTS`."""
    figures = _Figures(datetime.now(UTC).date().isoformat())
    progress.set_step(1, "reading the tasks")
    with written_whole(folder / REPORT) as file:
        with closing(tasks.scan()) as pages:
            for read, highest, rows in pages:
                check()
                figures.add(rows)
                step = 1 + (PARTS - 1) * read // highest
                if step > progress.state.current_step:
                    progress.log("tasks are read", LogLevel.DEBUG, {"tasks": figures.tasks})
                    progress.set_step(step, "reading the tasks")
        data = figures.to_dict()
        if figures.overdue:
            progress.log("some tasks are overdue", LogLevel.WARNING, {"overdue": figures.overdue})
        progress.set_step(PARTS + 1, "writing the report")
        file.write(msgspec.json.format(encode_json(data), indent=2) + b"\n")
        size = file.tell()
    progress.log("the report is written", LogLevel.SUCCESS, {"file": REPORT, "bytes": size})
    progress.complete()
    return data


def _report(report: Report[_Far], tasks: Tasks, folder: Path) -> None:
    data = _make_report(_reporter(report, PARTS + 1), report.check, tasks, folder)
    report((100, f"{_counted(data['tasks'], 'task')}: {REPORT}"))


def _reported(report: Report[Event], tasks: Tasks, folder: Path) -> None:
    data = _make_report(ProgressLogger.reporting(report, PARTS + 1), report.check, tasks, folder)
    report(Event({"success": True, "data": data | {"file": REPORT}}, "result"))


async def process_stream(request: Request) -> AsyncIterator[Event]:
    """The report, with all that is told while it is made."""
    async with from_thread(_reported, request.state.tasks, request.state.files) as events:
        async for event in events:
            if event.event != "result":
                yield event
    # Behind the block: the end and the run's close go into the log as one, and the thread has ended.
    yield event


# Items of a request


async def process_items(request: Request) -> AsyncIterator[Event]:
    """The SHA-256 of each item."""
    items: list[Any] = request.body
    failed = 0
    for index, item in enumerate(items):
        if not isinstance(item, str):
            error = f"a string is expected, not {_JSON_NAMES.get(type(item), 'a number')}"
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


_JSON_NAMES: Final = {dict: "an object", list: "an array", bool: "a truth value", type(None): "null"}


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
