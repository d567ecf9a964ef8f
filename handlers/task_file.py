"""Reads a CSV file of tasks in bounded steps.

Boundary of trust: the file. An invalid row is one `item_error` event, and reading continues with the next line.
"""

import csv
import io
from datetime import date
from typing import IO, Final, get_args

from handlers.database import COLUMNS, NewTask, Status
from ssecore.errors import BadRequest
from ssecore.wire import Event

__all__ = ["TaskFile"]

#: For one transaction and one `progress` event.
BATCH_ROWS: Final = 100
#: In one step, so that a file of blank lines can be cancelled.
STEP_LINES: Final = 10 * BATCH_ROWS
MAX_TITLE_CHARS: Final = 500
MAX_DESCRIPTION_CHARS: Final = 10_000
#: The longest valid row has some 84 KB: 10,500 characters of 4 bytes, quotes doubled.
MAX_ROW_BYTES: Final = 128 * 1024

_STATUSES: Final = get_args(Status)
_PRIORITIES: Final = {str(number): number for number in range(1, 6)}
_BOM: Final = b"\xef\xbb\xbf"


class _BadRow(Exception):
    """The text names the column."""


class TaskFile:
    """Call it in worker threads. Raises `BadRequest` for an invalid header. `failed` of the `rows` read are invalid."""

    def __init__(self, file: IO[bytes]) -> None:
        self.rows = self.failed = 0
        self.finished = False
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        self._line = 0  # the last line read, from 1
        self._row_bytes = 0
        self._told = 0
        file.seek(0)
        if file.read(len(_BOM)) != _BOM:
            file.seek(0)
        # Strict: an unclosed quote is an error, not a long last field.
        self._reader = csv.reader(iter(self._read_line, ""), strict=True)
        self._columns = self._read_header()

    def step(self) -> tuple[list[NewTask], list[Event]]:
        """Read a batch. Returns the valid rows, and the events of this step."""
        tasks, events = [], []
        for _ in range(STEP_LINES):
            first, self._row_bytes = self._line + 1, 0
            try:
                fields = next(self._reader)
                if not fields:  # a blank line
                    continue
                tasks.append(self._task(fields))
            except StopIteration:
                self.finished = True
                break
            except (csv.Error, _BadRow) as error:
                text = _plain(error)
                if self._line > first:
                    text += f" (lines {first} to {self._line})"
                events.append(Event({"line": first, "error": text}, "item_error"))
                self.failed += 1
            self.rows += 1
            if self.rows % BATCH_ROWS == 0:
                break
        if self.rows > self._told and (self.finished or self.rows % BATCH_ROWS == 0):
            self._told = self.rows
            percent = round(100 * self._file.tell() / self._size, 1)
            events.append(Event({"current": self.rows, "total": None, "percent": percent}, "progress"))
        return tasks, events

    def _read_line(self) -> str:
        """The next line, "" at the end. Invalid UTF-8 affects only its own row."""
        line = self._file.readline(MAX_ROW_BYTES + 1 - self._row_bytes)
        if not line:
            return ""
        self._line += 1
        self._row_bytes += len(line)
        if self._row_bytes > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(MAX_ROW_BYTES)
            raise csv.Error(f"a line is too long, or a quote is not closed: over {MAX_ROW_BYTES} bytes in one row")
        return line.decode("utf-8", "surrogateescape")

    def _read_header(self) -> list[str]:
        try:
            columns = next(self._reader, [])
            "".join(columns).encode()
        except csv.Error as error:
            raise BadRequest(f"the header can't be read: {_plain(error)}") from None
        except UnicodeEncodeError:
            raise BadRequest("the header is not UTF-8") from None
        if not columns:
            raise BadRequest("the header is missing: the first line must name the columns")
        for column in columns:
            if column not in COLUMNS:
                text = f"unknown column {column!r:.60}: the columns are {', '.join(COLUMNS)}"
                if len(columns) == 1 and ";" in column:
                    text = "the columns are separated by semicolons: use commas"
                raise BadRequest(text, field=column[:60])
            if columns.count(column) > 1:
                raise BadRequest(f"the header has the column {column} twice", field=column)
        if "title" not in columns:
            raise BadRequest("the column title is missing", field="title")
        return columns

    def _task(self, fields: list[str]) -> NewTask:
        if len(fields) != len(self._columns):
            names = ",".join(self._columns)
            raise _BadRow(f"{len(fields)} fields where {len(self._columns)} are expected ({names})")
        values = dict(zip(self._columns, fields, strict=True))
        title = _text("title", values["title"], MAX_TITLE_CHARS)
        if not title or title.isspace():
            raise _BadRow("title: must not be empty")
        status = values.get("status") or "open"
        if status not in _STATUSES:
            raise _BadRow(f"status: must be open, doing or done, not {status!r:.40}")
        priority = values.get("priority") or "3"
        if priority not in _PRIORITIES:
            raise _BadRow(f"priority: must be a whole number from 1 to 5, not {priority!r:.40}")
        due = values.get("due") or None
        if due is not None and not _is_date(due):
            raise _BadRow(f"due: must be a date such as 2026-12-31, not {due!r:.40}")
        description = _text("description", values.get("description", ""), MAX_DESCRIPTION_CHARS)
        return NewTask(title, description, status, _PRIORITIES[priority], due)


def _text(column: str, text: str, max_chars: int) -> str:
    if len(text) > max_chars:
        raise _BadRow(f"{column}: has {len(text)} characters, and at most {max_chars} are allowed")
    if "\0" in text:
        raise _BadRow(f"{column}: contains a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"{column}: is not UTF-8") from None
    return text


def _plain(error: Exception) -> str:
    return str(error).partition(" - ")[0]  # without csv's advice to programmers


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text  # fromisoformat accepts other formats too
    except ValueError:
        return False
