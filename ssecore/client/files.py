"""A stream's events in a file, one JSON object a line."""

import mmap
import os
import stat
from contextlib import aclosing
from pathlib import Path
from typing import Final

import anyio.to_thread
import msgspec
import orjson

from ssecore.client.source import Source, SourceError, batches, is_gap
from ssecore.filelock import try_lock
from ssecore.wire import Event

__all__ = ["json_line", "to_file"]

MAX_LINES: Final = 1000


class _Line(msgspec.Struct):
    id: str | None
    event: str | None
    data: str


_BEGINNING: Final = b'{"id":'


async def to_file(source: Source, path: str | os.PathLike[str]) -> int:
    """Append a stream's events to a file, one JSON object `{"id", "event", "data"}` a line. Returns their number.

    Called again it resumes after the last complete line. It cuts off an incomplete line, and `gap` events, which the
    server will send again.

    Raises `OSError`, what `Source` raises, and `SourceError` if the file has other content, another writer, or no id in
    its last event.
    """
    file = await anyio.to_thread.run_sync(_take, Path(path))
    try:
        first, last = await anyio.to_thread.run_sync(_mend, file)
        if last:
            source.resume_from(last, first)
        written = 0
        async with aclosing(batches(source, MAX_LINES, 0)) as groups:
            async for group in groups:
                lines = b"".join([json_line(event) for event in group])
                await anyio.to_thread.run_sync(_append, file, lines)
                written += len(group)
        return written
    finally:
        os.close(file)


def json_line(event: Event) -> bytes:
    """JSON Lines: `{"id", "event", "data"}`, with `data` always a string."""
    return orjson.dumps({"id": event.id, "event": event.event, "data": event.data}) + b"\n"


def _take(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise SourceError(f"{path} is not a regular file")
        if not try_lock(file):
            raise SourceError(f"{path} is being written by another process")
    except BaseException:
        os.close(file)
        raise
    return file


def _mend(file: int) -> tuple[str | None, str]:
    """Cut off what is incomplete. Returns the first and the last id."""
    size = os.fstat(file).st_size
    if not size:
        return None, ""
    with mmap.mmap(file, size, access=mmap.ACCESS_READ) as content:
        if content[: len(_BEGINNING)] != _BEGINNING[:size]:
            raise SourceError("the file has other content than events: choose another file")
        end = content.rfind(b"\n") + 1
        last: _Line | None = None
        while end:
            begin = content.rfind(b"\n", 0, end - 1) + 1
            last = _parse(content[begin:end])
            if last.id == "end" or not is_gap(Event(last.data, last.event)):
                break
            end, last = begin, None
        first = _parse(content[: content.find(b"\n") + 1]) if end else None
    if last is not None and not last.id:
        raise SourceError("can't resume after the file's last event, which has no id: choose another file")
    os.ftruncate(file, end)
    return (first.id if first else None), (last.id or "" if last else "")


def _parse(content: bytes) -> _Line:
    try:
        return msgspec.json.decode(content, type=_Line)
    except msgspec.DecodeError as error:
        raise SourceError(f"a line of the file is not an event ({error}): choose another file") from error


def _append(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]
