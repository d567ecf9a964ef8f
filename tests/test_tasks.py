"""Rows of a real database: what goes in comes out, and nothing that a client sends or does breaks the table."""

import csv
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Final

import anyio
import httpx
import pytest
from anyio import to_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers import database
from handlers.database import NewTask, open_tasks
from handlers.task_file import MAX_ROW_BYTES, TaskFile
from handlers.tasks import ROUTES
from sseapp import SSEApp
from ssecore.errors import SSEAppError
from ssecore.settings import Settings
from ssecore.testing import Transport, connect
from ssecore.wire import Decoder, Event
from tests.needs import needs
from tests.serving import serve

ROOT: Final = Path(__file__).parent.parent
CSV: Final = {"content-type": "text/csv"}
LIMIT_S: Final = 60


class Service:
    """The routes of tasks.py in an app of their own."""

    def __init__(self, app: SSEApp, client: httpx.AsyncClient) -> None:
        self.app = app
        self.client = client

    async def post(self, body: str | bytes) -> httpx.Response:
        return await self.client.post("/tasks/import", content=body, headers=CSV)

    async def import_csv(self, body: str | bytes) -> list[tuple[str, Any]]:
        return named(await self.post(body))

    async def runs(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = (await self.client.get("/runs")).json()["runs"]
        return listed

    async def rows(self, **query: Any) -> list[dict[str, Any]]:
        *rows, end = named(await self.client.get("/tasks/stream", params=query))
        assert end == ("done", "")
        assert all(name == "task" for name, _ in rows)
        return [row for _, row in rows]

    async def titles(self, **query: Any) -> list[str]:
        return [row["title"] for row in await self.rows(**query)]


@asynccontextmanager
async def service(data_dir: Path, **values: Any) -> AsyncIterator[Service]:
    @asynccontextmanager
    async def resources(app: SSEApp) -> AsyncIterator[Any]:
        async with open_tasks(data_dir) as tasks:
            yield SimpleNamespace(tasks=tasks)

    app = SSEApp(ROUTES, Settings(log="memory", **values), lifespan=resources)
    with anyio.fail_after(LIMIT_S):
        async with (
            app.running(),
            httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as client,
        ):
            yield Service(app, client)


@contextmanager
def real_server(data_dir: Path) -> Iterator[httpx.Client]:
    """The service in a process of its own, over a socket. It must end by itself on SIGINT, with exit code 0."""
    command = [sys.executable, "-W", "error", "-m", "sseapp", "serve", "--port", "0", "--data-dir", str(data_dir)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            log = []
            for line in process.stderr:
                log.append(line)
                if found := re.search(r"serving on (http://\S+)", line):
                    break
            else:
                pytest.fail("the server did not start:\n" + "".join(log))
            with httpx.Client(base_url=found[1], timeout=LIMIT_S, trust_env=False) as client:
                yield client
            process.send_signal(signal.SIGINT)
            assert process.wait(LIMIT_S) == 0
        finally:
            process.kill()


def named(response: httpx.Response) -> list[tuple[str, Any]]:
    """Each event's name and data. Those of a run have its ids, without a hole; the others none but the last one's."""
    assert response.status_code == 200, response.text
    events = Decoder().feed(response.content)
    run = response.headers.get("run-id")
    if run is not None:
        assert [event.id for event in events] == [f"{run}.{number}" for number in range(1, len(events) + 1)]
    else:
        assert [event.id for event in events] == [None] * (len(events) - 1) + ["end"]
    return [(event.event or "message", decoded(event)) for event in events]


def decoded(event: Event) -> Any:
    return json.loads(event.data) if event.data else ""


def csv_of(rows: Sequence[Sequence[Any]], header: str = "title,description,status,priority,due") -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header.split(","), *rows])
    return text.getvalue()


def numbered(count: int) -> str:
    return csv_of([(f"Task {n}", f"The text of {n}", "doing", n % 5 + 1, "2026-12-31") for n in range(1, count + 1)])


def errors_of(events: list[tuple[str, Any]]) -> list[tuple[int, str]]:
    return [(data["line"], data["error"]) for name, data in events if name == "item_error"]


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return dict(response.json())


# What goes in comes out


async def test_an_import_tells_its_progress_and_its_end(tmp_path: Path) -> None:
    async with service(tmp_path) as s:
        *progress, end = await s.import_csv(numbered(250))
        assert [(name, data["current"], data["total"]) for name, data in progress] == [
            ("progress", 100, None),
            ("progress", 200, None),
            ("progress", 250, None),
        ]
        percents = [data["percent"] for _, data in progress]
        assert percents == sorted(percents) and percents[-1] == 100 and 30 < percents[0] < 50
        assert end == ("complete", {"status": "success", "imported": 250, "failed": 0})


async def test_a_full_last_batch_is_told_once_and_a_file_without_rows_not_at_all(tmp_path: Path) -> None:
    async with service(tmp_path) as s:
        assert [name for name, _ in await s.import_csv(numbered(100) + "\n")] == ["progress", "complete"]
        assert await s.import_csv("title\r\n") == [("complete", {"status": "success", "imported": 0, "failed": 0})]


async def test_a_row_comes_back_with_its_defaults(tmp_path: Path) -> None:
    async with service(tmp_path) as s:
        await s.import_csv("due,title\n,Bare\n2024-02-29,Leap\n")
        bare, leap = await s.rows()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", bare.pop("created"))
        assert bare == {"id": 1, "title": "Bare", "description": "", "status": "open", "priority": 3, "due": None}
        assert leap["due"] == "2024-02-29"


async def test_empty_fields_mean_the_defaults_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    async with service(tmp_path) as s:
        events = await s.import_csv("title,status,priority,due,description\n\r\nA,,,,\n\n\nB,done,5,,x\n\n")
        assert events[-1][1] == {"status": "success", "imported": 2, "failed": 0}
        assert [(row["title"], row["status"], row["priority"]) for row in await s.rows()] == [
            ("A", "open", 3),
            ("B", "done", 5),
        ]


async def test_thousands_of_blank_lines_are_passed_over(tmp_path: Path) -> None:
    async with service(tmp_path) as s:
        events = await s.import_csv("title\nA\n" + "\n" * 5000 + "B\n" + "\r\n" * 5000 + "\0\n" + "\n" * 5000)
        assert [name for name, _ in events] == ["item_error", "progress", "complete"]
        assert errors_of(events) == [(10004, "title: contains a NUL character")]
        assert events[-2][1] == {"current": 3, "total": None, "percent": 100.0}


def test_a_step_through_blank_lines_is_short() -> None:
    """A thread at work can't be cancelled: a gigabyte of line ends must not be one step."""
    file = TaskFile(io.BytesIO(b"title\n" + b"\n" * 5000))
    assert file.step() == ([], [])
    assert not file.finished


@pytest.mark.parametrize("head", [b"\xef\xbb\xbftitle", b'\xef\xbb\xbf"title"', b"title", b'"title"'])
async def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path, head: bytes) -> None:
    async with service(tmp_path) as s:
        await s.import_csv(head + "\r\nÜbung\r\n".encode())
        assert await s.titles() == ["Übung"]


def test_what_is_exported_can_be_imported_again(tmp_path: Path) -> None:
    awkward = [
        ('comma, quote " and ;', "two\r\nlines\nand\rmore", "open", 1, ""),
        ("=1+1", "\u2028 é 漢字 😀", "done", 5, "2026-01-31"),
        (" spaces ", "", "doing", 3, "0001-01-01"),
    ]
    with real_server(tmp_path / "a" / "b") as client:
        first = client.post("/tasks/import", content=csv_of(awkward).encode(), headers=CSV)
        assert named(first)[-1] == ("complete", {"status": "success", "imported": 3, "failed": 0})
        exported = client.get("/export.csv")
        assert exported.headers["content-type"] == "text/csv; charset=utf-8"
        assert exported.headers["content-disposition"] == 'attachment; filename="tasks.csv"'
        head, *rows = list(csv.reader(io.StringIO(exported.content.decode(), newline="")))
        assert head == ["id", "title", "description", "status", "priority", "due", "created"]
        assert [tuple(row[1:6]) for row in rows] == [(*row[:3], str(row[3]), row[4]) for row in awkward]
        assert exported.content.count(b"\r\n") == 4 + 1
        done = client.get("/export.csv", params={"status": "done"}).text.split("\r\n")
        assert len(done) == 3 and done[1].startswith("2,=1+1,")

        again = client.post("/tasks/import", content=exported.content, headers=CSV)
        assert named(again)[-1] == ("complete", {"status": "success", "imported": 3, "failed": 0})
        answer = client.get("/tasks/stream")
        assert answer.text.endswith("event: done\ndata: \nid: end\n\n")
        streamed = [data for name, data in named(answer) if name == "task"]
        assert [row["id"] for row in streamed] == [1, 2, 3, 4, 5, 6]
        fields = ("title", "description", "status", "priority", "due")
        assert [[row[name] for name in fields] for row in streamed[3:]] == [
            [*row[:4], row[4] or None] for row in awkward
        ]
    with real_server(tmp_path / "a" / "b") as client:  # what was stored is there after a restart
        assert [data for name, data in named(client.get("/tasks/stream")) if name == "task"] == streamed


@needs("time")
def test_a_hundred_thousand_rows_go_in_and_come_out(tmp_path: Path) -> None:
    with real_server(tmp_path) as client:
        *progress, end = named(client.post("/tasks/import", content=numbered(100_000).encode(), headers=CSV))
        assert end == ("complete", {"status": "success", "imported": 100_000, "failed": 0})
        assert [data["current"] for _, data in progress] == list(range(100, 100_001, 100))
        with client.stream("GET", "/tasks/stream") as response:
            decoder, expected = Decoder(), 1
            for chunk in response.iter_raw():
                for event in decoder.feed(chunk):
                    last = event
                    if event.event == "task":
                        row = json.loads(event.data)
                        assert (row["id"], row["title"]) == (expected, f"Task {expected}")
                        expected += 1
            assert expected == 100_001 and last.event == "done"
        assert client.get("/export.csv").text.count("\r\n") == 100_001


titles = st.text(min_size=1, max_size=500).filter(lambda text: "\0" not in text and not text.isspace())
descriptions = st.text(max_size=10_000).filter(lambda text: "\0" not in text)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(titles, descriptions), max_size=250),
    line_end=st.sampled_from(["\r\n", "\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_any_text_comes_back_exactly(rows: list[tuple[str, str]], line_end: str, quoting: Any) -> None:
    text = io.StringIO()
    # A lone CR is quoted by no writer whose own line end is LF, and is an error when it isn't quoted.
    quoting = csv.QUOTE_ALL if line_end == "\n" else quoting
    csv.writer(text, lineterminator=line_end, quoting=quoting).writerows([("title", "description"), *rows])

    async def there_and_back(data_dir: Path) -> list[tuple[str, str]]:
        file, back = TaskFile(io.BytesIO(text.getvalue().encode())), []
        async with open_tasks(data_dir) as tasks:
            while not file.finished:
                new, _ = file.step()
                await tasks.insert(new)
            assert (file.rows, file.failed) == (len(rows), 0)
            async for page in tasks.pages():
                back += [(row["title"], row["description"]) for row in map(json.loads, page)]
        return back

    with TemporaryDirectory() as folder:
        assert anyio.run(there_and_back, Path(folder)) == rows


@settings(max_examples=300, deadline=None)
@given(body=st.lists(st.sampled_from([b'"', b",", b"\n", b"\r\n", b"\r", b"\0", b"\xff", b"a", b"open", b" "])))
def test_any_bytes_are_read_to_their_end_with_every_row_accounted_for(body: list[bytes]) -> None:
    file, good, bad = TaskFile(io.BytesIO(b"title,status\n" + b"".join(body))), 0, []
    while not file.finished:
        tasks, events = file.step()
        good += len(tasks)
        bad += [event.data["line"] for event in events if event.event == "item_error"]
    assert good + len(bad) == file.rows and len(bad) == file.failed
    assert bad == sorted(set(bad)) and all(1 < line <= 1 + len(body) + 1 for line in bad)


# Rows that can't be used

HEADER: Final = "title,description,status,priority,due\n"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (b",a,open,1,", "title: must not be empty"),
        (b'" ",a,open,1,', "title: must not be empty"),
        (b"t" * 501 + b",a,open,1,", "title: has 501 characters, and at most 500 are allowed"),
        (b"t," + b"d" * 10_001 + b",open,1,", "description: has 10001 characters, and at most 10000 are allowed"),
        (b"t,a,closed,1,", "status: must be open, doing or done, not 'closed'"),
        (b"t,a,Open,1,", "status: must be open, doing or done, not 'Open'"),
        (b"t,a,open,0,", "priority: must be a whole number from 1 to 5, not '0'"),
        (b"t,a,open,1.0,", "priority: must be a whole number from 1 to 5, not '1.0'"),
        ("t,a,open,\u0663,".encode(), "priority: must be a whole number from 1 to 5, not '\u0663'"),
        (b"t,a,open,1,2026-02-29", "due: must be a date such as 2026-12-31, not '2026-02-29'"),
        (b"t,a,open,1,20260228", "due: must be a date such as 2026-12-31, not '20260228'"),
        (b"t,a,open,1,2026-W01-1", "due: must be a date such as 2026-12-31, not '2026-W01-1'"),
        (b"t,a,open,1,31.12.2026", "due: must be a date such as 2026-12-31, not '31.12.2026'"),
        (b"t,a,open,1", "4 fields where 5 are expected (title,description,status,priority,due)"),
        (b"t,a,open,1,,", "6 fields where 5 are expected (title,description,status,priority,due)"),
        (b"   ", "1 fields where 5 are expected (title,description,status,priority,due)"),
        (b"caf\xe9,a,open,1,", "title: is not UTF-8"),
        (b"t,\xff\xfe,open,1,", "description: is not UTF-8"),
        (b"t,\xed\xa0\x80,open,1,", "description: is not UTF-8"),
        (b"t,a,\xff,1,", r"status: must be open, doing or done, not '\udcff'"),
        (b"t\0,a,open,1,", "title: contains a NUL character"),
        (b"t,\0,open,1,", "description: contains a NUL character"),
        (b'"t"x,a,open,1,', "',' expected after '\"'"),
        (b"t,a\rb,open,1,", "new-line character seen in unquoted field"),
    ],
)
async def test_a_bad_row_is_told_with_its_line_and_the_others_go_on(tmp_path: Path, row: bytes, text: str) -> None:
    async with service(tmp_path) as s:
        events = await s.import_csv(HEADER.encode() + b"First,a,open,1,\n" + row + b"\nLast,a,open,1,\n")
        assert errors_of(events) == [(3, text)]
        assert events[-1][1] == {"status": "partial", "imported": 2, "failed": 1}
        assert await s.titles() == ["First", "Last"]


async def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    body = (
        "\ufeff" + HEADER  # 1
        + '"three\nlines\r\nhere",a,open,1,\n'  # 2, 3, 4
        + "\n"  # 5
        + "bad one,a,open,9,\r\n"  # 6
        + '"two","lines\n",open,9,\n'  # 7, 8
        + 'good,"\r\r",open,1,\n'  # 9: a CR alone ends no line
        + ",a,open,1,"  # 10, without an end
    )  # fmt: skip
    async with service(tmp_path) as s:
        assert errors_of(await s.import_csv(body)) == [
            (6, "priority: must be a whole number from 1 to 5, not '9'"),
            (7, "priority: must be a whole number from 1 to 5, not '9' (lines 7 to 8)"),
            (10, "title: must not be empty"),
        ]
        assert await s.titles() == ["three\nlines\r\nhere", "good"]


async def test_bad_rows_count_as_read(tmp_path: Path) -> None:
    async with service(tmp_path) as s:
        events = await s.import_csv("title,priority\n" + "good,1\nbad,6\n" * 75)
        assert [data["current"] for name, data in events if name == "progress"] == [100, 150]
        assert [line for line, _ in errors_of(events)] == list(range(3, 152, 2))
        assert events[-1] == ("complete", {"status": "partial", "imported": 75, "failed": 75})
        # What is told of a batch comes before its progress.
        assert [name for name, _ in events].index("progress") == 50


async def test_an_import_of_which_nothing_can_be_used_has_failed(tmp_path: Path) -> None:
    async with service(tmp_path) as s:
        response = await s.client.post("/tasks/import", content='title\n" "\n" "\n', headers=CSV)
        assert named(response)[-1] == ("complete", {"status": "failed", "imported": 0, "failed": 2})
        run = await s.client.get(f"/runs/{response.headers['run-id']}")
        assert run.json()["state"] == "failed"
        assert not await s.titles()


@needs("tmpfs")
@pytest.mark.parametrize("mib", [3, 20], ids=["full at its end", "full in the middle"])
def test_an_import_that_the_temporary_folder_has_no_room_for_is_refused_whole(tmp_path: Path, mib: int) -> None:
    """And what it took there is free again."""
    row = "x" * 490 + "\n"
    small = "title\n" + row * (2 * 1024 * 1024 // len(row))
    large = "title\n" + row * (mib * 1024 * 1024 // len(row))
    (disk := tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3000k", "tmpfs", str(disk)], check=True)
    try:
        with serve(tmp_path / "data", env={"TMPDIR": str(disk)}) as server:
            for _ in range(2):
                refused = server.client.post("/tasks/import", content=large, headers=CSV)
                assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
                assert "No space left on device" in refused.json()["detail"] and "TMPDIR" in refused.json()["detail"]
                assert server.client.get("/tasks/stream").text.count("event: task\n") == 0
            imported = named(server.client.post("/tasks/import", content=small, headers=CSV))[-1]
            assert imported == ("complete", {"status": "success", "imported": small.count("\n") - 1, "failed": 0})
        assert "Traceback" not in server.log()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Watched(io.BytesIO):
    """A file that notes how much is asked of it at once."""

    most = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None and size > 0
        self.most = max(self.most, size)
        return super().readline(size)


@pytest.mark.parametrize(
    ("hostile", "last_line"),
    [
        pytest.param(b"x" * 5_000_000, 3, id="a line without an end"),
        pytest.param(b'"' + b"x" * 5_000_000, 3, id="a quoted line without an end"),
        pytest.param(b"x," * 1_000_000, 3, id="a million fields"),
        pytest.param(b'"x' + b'\n","' * 200_000, None, id="a million fields on a million lines"),
        pytest.param(b'"never closed\n' + b"row,\n" * 100_000, None, id="a quote that is not closed"),
        pytest.param(b"x" * (MAX_ROW_BYTES - 1), 3, id="at the limit"),
    ],
)
def test_a_row_without_an_end_is_left_in_bounded_memory(hostile: bytes, last_line: int | None) -> None:
    source = Watched(b"title,due\nfirst,\n" + hostile + b"\nlast,\n")
    file, titles, errors, most = TaskFile(source), [], [], 0
    while not file.finished:
        tasks, events = file.step()
        titles += [task.title for task in tasks]
        errors += [event.data for event in events if event.event == "item_error"]
        most = max(most, len(str(events)))
    assert source.most <= MAX_ROW_BYTES + 1 and most < 100_000
    assert titles[0] == "first" and titles[-1] == "last"
    assert errors[0]["line"] == 3
    if last_line is None:  # the lines that one row has swallowed are told
        assert re.search(r"over 131072 bytes in one row \(lines 3 to \d+\)$", errors[0]["error"])
    else:
        assert len(errors) == 1 and "lines" not in errors[0]["error"]


def test_a_quote_that_is_still_open_at_the_end_is_no_row() -> None:
    file = TaskFile(io.BytesIO(b'title\nfirst\n"open\nsecond\nthird\n'))
    tasks, events = file.step()
    assert [task.title for task in tasks] == ["first"]
    assert events[0].data == {"line": 3, "error": "unexpected end of data (lines 3 to 5)"}


# Files that are refused as a whole


@pytest.mark.parametrize(
    ("body", "detail", "field"),
    [
        (b"", "the header is missing: the first line must name the columns", None),
        (b"\xef\xbb\xbf", "the header is missing: the first line must name the columns", None),
        (b"\ntitle\nA\n", "the header is missing: the first line must name the columns", None),
        (b"description\nA\n", "the column title is missing", "title"),
        (b"title,titel\nA,B\n", "unknown column 'titel': the columns are id, title, description, status", "titel"),
        (b"title,\nA,\n", "unknown column ''", ""),
        (b"Title\nA\n", "unknown column 'Title'", "Title"),
        (b"title,due,title\nA,,B\n", "the header has the column title twice", "title"),
        (b"title;due\nA;\n", "the columns are separated by semicolons: use commas", "title;due"),
        (b"titl\xe9\nA\n", "the header is not UTF-8", None),
        ("title\nA\n".encode("utf-16"), "the header is not UTF-8", None),
        (b'"title\nA\n', "the header can't be read: unexpected end of data", None),
        (b"title\rA\rB\r", "the header can't be read: new-line character seen in unquoted field", None),
        (b"title," * 100_000, "the header can't be read: a line is too long", None),
    ],
)
async def test_a_file_without_a_good_header_is_a_400_and_starts_nothing(
    tmp_path: Path, body: bytes, detail: str, field: str | None
) -> None:
    async with service(tmp_path) as s:
        answer = problem(await s.post(body), 400)
        assert answer["detail"].startswith(detail)
        assert answer.get("field") == field
        assert await s.rows() == []
        assert await s.runs() == []


async def test_another_media_type_is_a_415_and_too_large_a_file_a_413(tmp_path: Path) -> None:
    async with service(tmp_path, max_import_bytes=100) as s:
        answer = await s.client.post("/tasks/import", content=b"[]", headers={"content-type": "application/json"})
        problem(answer, 415)
        problem(await s.post(b"title\n" + b"x\n" * 50), 413)
        assert await s.rows() == []
        assert await s.runs() == []
        assert (await s.import_csv(b"title\n" + b"x\n" * 47))[-1][1]["imported"] == 47


# What a client may ask for

TEXTS: Final = [
    ("Write the report", "quarterly figures"),
    ("A well-known bug", 'says "hello" to the user'),
    ("École d'été", "naïve, nai\u0308f"),
    ("NEAR AND OR NOT", "title: report*"),
    ("日本語", "snake_case"),
]


@pytest.mark.parametrize(
    ("q", "found"),
    [
        ("report", [1, 4]),
        ("REPORT figures", [1]),
        ("figures report", [1]),
        ("figures bug", []),
        ("rep*", []),
        ("report*", [1, 4]),
        ("^report", [1, 4]),
        ('"report', [1, 4]),
        ('"', None),
        ('""report""', [1, 4]),
        ("report OR bug", []),
        ("NOT report", [4]),
        ("report NOT figures", []),
        ("title:report", [4]),
        ("{title description}:report", []),
        ("NEAR(report, 2)", []),
        ("report)", [1, 4]),
        ("report + figures", [1]),
        ("report -", [1, 4]),
        ("well-known", [2]),
        ("-known", [2]),
        ("hello", [2]),
        ("'; DROP TABLE tasks; --", []),
        ("ecole ÉTÉ", [3]),
        ("e\u0301cole", [3]),
        ("naïf naive", [3]),
        ("日本語", [5]),
        ("snake case", [5]),
        ("report\0figures", [1]),
        ("report\U0001f600", [1, 4]),
        ("report \U0001f600", [1, 4]),
        ("report " * 140, [1, 4]),
        ("report " + ". " * 490, [1, 4]),
        ("", None),
        ("  ", None),
        ("*-()^\U0001f600", None),
    ],
)
async def test_all_words_of_q_must_occur_and_nothing_in_it_is_syntax(
    tmp_path: Path, q: str, found: list[int] | None
) -> None:
    async with service(tmp_path) as s:
        await s.import_csv(csv_of(TEXTS, "title,description"))
        if found is None:
            answer = problem(await s.client.get("/tasks/stream", params={"q": q}), 400)
            assert answer["field"] == "q"
        else:
            assert [row["id"] for row in await s.rows(q=q)] == found


async def test_status_words_and_limit_go_together_over_many_pages(tmp_path: Path) -> None:
    states = ("open", "doing", "done")
    async with service(tmp_path) as s:
        await s.import_csv(
            csv_of([(f"{n}", "even" if n % 2 == 0 else "odd", states[n % 3], 1, "") for n in range(3000)])
        )
        everything = [str(n) for n in range(3000)]
        even_done = [str(n) for n in range(3000) if n % 2 == 0 and n % 3 == 2]
        assert await s.titles() == everything
        assert await s.titles(status="done") == everything[2::3]
        assert await s.titles(q="even") == everything[::2]
        assert await s.titles(q="even", status="done") == even_done
        for limit in (1, 199, 200, 201, 400, 450, 500, 10**30):
            assert await s.titles(limit=limit) == everything[:limit]
            assert await s.titles(q="even", status="done", limit=limit) == even_done[:limit]
        exported = (await s.client.get("/export.csv", params={"status": "doing"})).text
        assert [row["title"] for row in csv.DictReader(io.StringIO(exported))] == everything[1::3]


async def test_rows_of_a_status_are_found_without_looking_at_all_those_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, connect = [0], database._connect

    def count() -> int:
        steps[0] += 1
        return 0

    def connect_counted(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.set_progress_handler(count, 100)  # each so many instructions of SQLite's
        return connection

    monkeypatch.setattr(database, "_connect", connect_counted)
    async with open_tasks(tmp_path) as tasks:
        await tasks.insert([NewTask("word", "", "done", 1, None)] * 10_000)
        await tasks.insert([NewTask("word", "", "open", 1, None)] * 3)
        asked: list[tuple[database.Status, str | None, int]] = [("open", "word", 3), ("doing", "word", 0)]
        for status, text, rows in [*asked, ("open", None, 3), ("doing", None, 0)]:
            steps[0] = 0
            assert sum([len(page) async for page in tasks.pages(status, text)]) == rows
            assert steps[0] < 20, "a thousandth of what it takes to read them"


@pytest.mark.parametrize(
    ("target", "field"),
    [
        ("/tasks/stream?status=closed", "status"),
        ("/tasks/stream?status=", "status"),
        ("/tasks/stream?status=null", "status"),
        ("/tasks/stream?status=OPEN", "status"),
        ("/tasks/stream?status=open%00", "status"),
        ("/tasks/stream?status=" + "x" * 20_000, "status"),
        ("/tasks/stream?status=x - at `$.limit`", "status"),
        ("/tasks/stream?status=field `limit`", "status"),
        ("/tasks/stream?status=open&status=done", "status"),
        ("/tasks/stream?limit=0", "limit"),
        ("/tasks/stream?limit=-1", "limit"),
        ("/tasks/stream?limit=many", "limit"),
        ("/tasks/stream?limit=", "limit"),
        ("/tasks/stream?limit=1.5", "limit"),
        ("/tasks/stream?limit=null", "limit"),
        ("/tasks/stream?limit=" + "9" * 5000, "limit"),
        ("/tasks/stream?limit=5&limit=6", "limit"),
        ("/tasks/stream?q=" + "x" * 1001, "q"),
        ("/tasks/stream?q=%ff", None),
        ("/tasks/stream?" + "&".join(f"q{n}=x" for n in range(101)), None),
        ("/export.csv?status=closed", "status"),
        ("/export.csv?status=", "status"),
        ("/export.csv?status=" + "x" * 20_000, "status"),
        ("/export.csv?status=open&status=open", "status"),
        ("/export.csv?status=%ff", None),
    ],
)
async def test_a_bad_parameter_is_a_400_that_names_it(tmp_path: Path, target: str, field: str | None) -> None:
    async with service(tmp_path) as s:
        answer = problem(await s.client.get(target), 400)
        assert answer.get("field") == field
        assert len(answer["detail"]) < 300


@pytest.mark.parametrize("target", ["/tasks/stream", "/export.csv"])
async def test_rows_are_only_read(tmp_path: Path, target: str) -> None:
    async with service(tmp_path) as s:
        for method in ("POST", "PUT", "DELETE"):
            answer = await s.client.request(method, target)
            problem(answer, 405)
            assert answer.headers["allow"] == "GET, HEAD"
        problem(await s.client.get(f"{target}/1"), 404)
        head = await s.client.head(f"{target}?status=open")
        assert (head.status_code, head.content) == (200, b"")


async def test_an_empty_table_is_an_empty_stream_and_a_header(tmp_path: Path) -> None:
    async with service(tmp_path) as s:
        assert await s.rows() == [] == await s.rows(q="word", status="open")
        assert (await s.client.get("/export.csv")).content == b"id,title,description,status,priority,due,created\r\n"


# Clients that leave


async def test_leaving_in_the_middle_of_a_stream_gives_its_connection_back(tmp_path: Path) -> None:
    async with service(tmp_path) as s:
        await s.import_csv(numbered(5000))
        for target in ("/tasks/stream", "/tasks/stream?q=text", "/export.csv"):
            for _ in range(2 * database.READERS):
                async with connect(s.app, "GET", target, window=1) as exchange:
                    assert await exchange.chunk()
            assert not exchange.complete
        assert len(await s.rows()) == 5000


class Held:
    """Imports that wait in the third batch, in its thread, until they may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on, self.batches = threading.Event(), threading.Event(), 0
        self._insert = database._insert
        monkeypatch.setattr(database, "_insert", self._third_waits)

    def _third_waits(self, tasks: Sequence[NewTask], connection: sqlite3.Connection) -> None:
        self.batches += 1
        if self.batches == 3:
            self.reached.set()
            assert self.go_on.wait(LIMIT_S)
        self._insert(tasks, connection)


async def test_an_import_goes_on_to_its_end_when_its_client_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    async with service(tmp_path, linger_s=0.001) as s:
        body = numbered(5000).encode()
        async with connect(s.app, "POST", "/tasks/import", headers=CSV, body=body) as exchange:
            assert await exchange.chunk()
            run = exchange.headers["run-id"]
            assert await to_thread.run_sync(held.reached.wait, LIMIT_S)
            exchange.disconnect()
            await exchange.ended.wait()
        held.go_on.set()
        *progress, end = named(await s.client.get(f"/runs/{run}/events"))
        assert [data["current"] for _, data in progress] == list(range(100, 5001, 100))
        assert end == ("complete", {"status": "success", "imported": 5000, "failed": 0})
        assert held.batches == 50
        assert await s.titles() == [f"Task {n}" for n in range(1, 5001)]


async def test_an_import_ends_within_one_batch_when_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    async with service(tmp_path) as s:
        body = numbered(5000).encode()
        async with connect(s.app, "POST", "/tasks/import", headers=CSV, body=body) as exchange:
            assert await to_thread.run_sync(held.reached.wait, LIMIT_S)
            await exchange.started.wait()
            assert (await s.client.delete(f"/runs/{exchange.headers['run-id']}")).status_code == 202
            await anyio.wait_all_tasks_blocked()
            held.go_on.set()
            events = Decoder().feed(await exchange.body())
            await exchange.ended.wait()
        assert [(event.event, decoded(event)) for event in events] == [
            ("progress", {"current": 100, "total": None, "percent": decoded(events[0])["percent"]}),
            ("progress", {"current": 200, "total": None, "percent": decoded(events[1])["percent"]}),
            ("cancelled", {"reason": "asked"}),
        ]
        assert held.batches == 3
        with anyio.fail_after(LIMIT_S):  # the batch's thread isn't waited for
            while await s.titles() != [f"Task {n}" for n in range(1, 301)]:
                pass


# The file


def limited(monkeypatch: pytest.MonkeyPatch, pragma: str) -> None:
    connect = database._connect

    def connect_limited(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute(pragma)
        return connection

    monkeypatch.setattr(database, "_connect", connect_limited)


async def test_a_full_disk_in_the_middle_ends_the_import_and_keeps_what_was_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, "PRAGMA max_page_count = 50")
    async with service(tmp_path) as s:
        *progress, end = await s.import_csv(numbered(5000))
        told = "can't use the tasks database at the moment: database or disk is full"
        assert end == ("error", {"error": told, "code": "unavailable"})
        assert {name for name, _ in progress} == {"progress"}
        assert len(await s.rows()) == progress[-1][1]["current"] > 0


async def test_a_locked_database_is_a_503_to_who_writes_and_nothing_to_who_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, "PRAGMA busy_timeout = 0")
    async with service(tmp_path) as s:
        await s.import_csv(numbered(5))
        with closing(sqlite3.connect(tmp_path / "tasks.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = await s.post(numbered(5))
            told = problem(answer, 503)
            assert told["detail"] == "can't use the tasks database at the moment: database is locked"
            assert answer.headers["retry-after"] == "5"
            assert len(await s.rows()) == 5
        assert (await s.import_csv(numbered(5)))[-1][0] == "complete"


async def test_a_reader_holds_no_transaction_between_its_pages(tmp_path: Path) -> None:
    async with open_tasks(tmp_path) as tasks:
        await tasks.insert([NewTask(f"Task {n}", "", "open", 1, None) for n in range(1000)])
        pages = tasks.pages()
        assert len(await anext(pages)) == database.PAGE_ROWS
        with closing(sqlite3.connect(tmp_path / "tasks.db", isolation_level=None, timeout=0)) as other:
            # Busy if anybody were reading: a log that can't be cut grows for as long as the slowest client reads.
            assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        await pages.aclose()  # type: ignore[attr-defined]


def make_foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY, title TEXT)")
        connection.execute("PRAGMA user_version = 1")


def make_newer(path: Path) -> None:
    async def make() -> None:
        async with open_tasks(path.parent):
            pass

    anyio.run(make)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (make_foreign, "it is the database of another program"),
        (make_newer, "it has version 99, and sseapp supports version 3: update sseapp"),
        (lambda path: path.write_bytes(b"no database at all, but long enough " * 100), "file is not a database"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 8000), "file is not a database"),
        (lambda path: path.mkdir(), "unable to open database file"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(tmp_path: Path, make: Any, told: str) -> None:
    async def start() -> None:
        async with open_tasks(tmp_path):
            pytest.fail("it was opened")

    path = tmp_path / "tasks.db"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(SSEAppError, match=re.escape(f"can't use {path} as the tasks database: {told}")):
        anyio.run(start)
    assert (path.read_bytes() if path.is_file() else b"") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["tasks.db"]


async def test_a_folder_that_can_t_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SSEAppError, match="as the tasks database"):
        async with open_tasks(tmp_path / "file" / "data"):
            pytest.fail("it was opened")


OPEN_AND_INSERT: Final = """
import anyio, pathlib, sys
from handlers.database import NewTask, open_tasks
async def main():
    sys.stdin.read()
    async with open_tasks(pathlib.Path(sys.argv[1])) as tasks:
        for n in range(20):
            await tasks.insert([NewTask(f"{n}", "", "open", 1, None)] * 10)
anyio.run(main)
"""


def test_several_processes_share_the_file_from_its_making_on(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", OPEN_AND_INSERT, str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, env=environ) for _ in range(4)]
    for process in processes:  # all of them wait for this, and start as one
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(LIMIT_S) for process in processes] == [0] * 4

    async def count() -> int:
        async with open_tasks(tmp_path) as tasks:
            return sum([len(page) async for page in tasks.pages()])

    assert anyio.run(count) == 4 * 20 * 10


@pytest.mark.parametrize("change", ["UPDATE tasks SET title = 'other words' WHERE id = 1", "DELETE FROM tasks"])
async def test_the_words_follow_the_rows(tmp_path: Path, change: str) -> None:
    async with service(tmp_path) as s:
        await s.import_csv("title\nsome title\n")
        with closing(sqlite3.connect(tmp_path / "tasks.db", isolation_level=None)) as other:
            other.execute(change)
            other.execute("INSERT INTO words (words) VALUES ('integrity-check')")
        assert await s.titles(q="title") == []
        assert await s.titles(q="words") == (["other words"] if "UPDATE" in change else [])
