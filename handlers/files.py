"""Downloads from one flat folder, with ranges and conditional requests.

Boundary of trust: the file name. A slash or a leading dot is a 404, as is all but a regular file, checked after opening
it without following a link.

A file written in place changes during its downloads: write it under a name with a leading dot, then rename it.
"""

import errno
import os
import re
import stat
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC
from email.utils import formatdate, parsedate_to_datetime
from io import FileIO
from mimetypes import MimeTypes
from pathlib import Path
from typing import Final, NamedTuple, Self
from urllib.parse import quote

from anyio import to_thread

from ssecore.errors import NotFound, SSEAppError, Unavailable
from ssecore.http.request import Request
from ssecore.http.responses import ByteStream, Response
from ssecore.http.routes import GET

__all__ = ["ROUTES", "content_disposition", "open_folder"]

#: 64 KiB halve the speed.
CHUNK_BYTES: Final = 256 * 1024

#: Python's own table: the system's differs between machines.
_MEDIA_TYPES: Final = {**MimeTypes().types_map[True], ".gz": "application/gzip"}  # like Python 3.14
_UNKNOWN_TYPE: Final = "application/octet-stream"
#: Not served as such: with `nosniff` no page can use a file as a script or style.
_ACTIVE_TYPE: Final = re.compile(r"javascript|ecmascript|text/css")
#: If a browser displays a file despite `attachment`, no script runs.
_SAFETY: Final = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; sandbox",
}

#: The file may exist nevertheless.
_TEMPORARY: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}

#: With empty list elements (RFC 9110, 5.6.1.2). A number of a thousand digits would cost time.
_RANGE: Final = re.compile(r"bytes=[ \t,]*(?:([0-9]{1,30})-([0-9]{0,30})|-([0-9]{1,30}))[ \t,]*", re.IGNORECASE)
_ENTITY_TAG: Final = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')
#: HTTP's longest date has 33.
_MAX_DATE_CHARS: Final = 40

#: Few clients unescape `"` and `\\`, and some decode `%` (RFC 6266, appendix D).
_NOT_PLAIN: Final = re.compile(r"[^ !#$&-\[\]-~]")


class PreconditionFailed(SSEAppError):
    status, code = 412, "precondition_failed"


class RangeNotSatisfiable(SSEAppError):
    status, code = 416, "range_not_satisfiable"


class _Version(NamedTuple):
    size: int
    etag: str  #: strong
    modified: int | None  #: in seconds

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'
        modified = int(status.st_mtime)
        # Last-Modified must not be in the future (RFC 9110, 8.8.2.1).
        return cls(status.st_size, etag, modified if 0 <= modified <= time.time() else None)

    def headers(self) -> dict[str, str]:
        headers = {"etag": self.etag, "cache-control": "private, no-cache"}
        if self.modified is not None:
            headers["last-modified"] = formatdate(self.modified, usegmt=True)
        return headers


class _Chunks:
    """Not a generator: one that never started would leave the file open."""

    def __init__(self, file: FileIO, start: int, end: int) -> None:
        self._file = file
        self._at = start
        self._end = end

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._at >= self._end:
            raise StopAsyncIteration
        size = min(CHUNK_BYTES, self._end - self._at)
        chunk = await to_thread.run_sync(os.pread, self._file.fileno(), size, self._at)
        if not chunk:
            raise SSEAppError("the file was truncated during the download")
        self._at += len(chunk)
        return chunk

    async def aclose(self) -> None:
        self._file.close()


async def open_folder(data_dir: Path) -> Path:
    """Raises `SSEAppError`."""
    folder = data_dir / "files"
    try:
        await to_thread.run_sync(lambda: folder.mkdir(parents=True, exist_ok=True))
    except OSError as error:
        raise SSEAppError(f"can't use {folder} as the files folder: {error}") from error
    return folder


async def download(request: Request, filename: str) -> Response | ByteStream:
    """Download a file, with ranges and conditions as in RFC 9110."""
    with ExitStack() as unless_sent:
        file = unless_sent.enter_context(await to_thread.run_sync(_open, request.state.files, filename))
        version = _Version.of(os.fstat(file.fileno()))
        headers = version.headers()
        if _is_fresh(request.headers, version):
            return Response(status=304, headers=headers)
        # Ranges are defined for GET only (RFC 9110, 14.2).
        wanted = _wanted_range(request.headers, version) if request.method == "GET" else None
        start, end = wanted or (0, version.size)
        headers |= _SAFETY | {"accept-ranges": "bytes", "content-length": str(end - start)}
        headers["content-disposition"] = content_disposition(filename)
        if wanted is not None:
            headers["content-range"] = f"bytes {start}-{end - 1}/{version.size}"
        unless_sent.pop_all()
        return ByteStream(_Chunks(file, start, end), _media_type(filename), headers, 206 if wanted else 200)


def _open(folder: Path, name: str) -> FileIO:
    missing = NotFound("there is no file of this name")
    if name.startswith(".") or "/" in name:
        raise missing
    try:
        name.encode()  # a header needs UTF-8
        file = open(folder / name, "rb", buffering=0, opener=_open_safely)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        if isinstance(error, OSError) and error.errno in _TEMPORARY:
            raise Unavailable("the file can't be read at the moment; try again") from error
        raise missing from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise missing
    return file


def _open_safely(path: str, flags: int) -> int:
    """Follow no link, wait for no FIFO, adopt no terminal."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)


def _media_type(filename: str) -> str:
    media_type = _MEDIA_TYPES.get(Path(filename).suffix.lower(), _UNKNOWN_TYPE)
    return _UNKNOWN_TYPE if _ACTIVE_TYPE.search(media_type) else media_type


def content_disposition(filename: str) -> str:
    """Content-Disposition for any file name (RFC 6266, RFC 8187): in ASCII and, if that differs, in UTF-8."""
    plain = _NOT_PLAIN.sub("_", filename)
    header = f'attachment; filename="{plain}"'
    return header if plain == filename else f"{header}; filename*=UTF-8''{quote(filename, safe='')}"


def _is_fresh(headers: Mapping[str, str], version: _Version) -> bool:
    """Whether to answer 304. In the order of RFC 9110, 13.2.2."""
    changed = PreconditionFailed("the file has changed: repeat the request without the condition")
    if "if-match" in headers:
        if not _names(headers["if-match"], version.etag, weak=False):
            raise changed
    elif _is_later(version.modified, headers.get("if-unmodified-since")) is True:
        raise changed
    if "if-none-match" in headers:
        return _names(headers["if-none-match"], version.etag, weak=True)
    return _is_later(version.modified, headers.get("if-modified-since")) is False


def _wanted_range(headers: Mapping[str, str], version: _Version) -> tuple[int, int] | None:
    """A malformed range, several ranges, and a range of an empty file are ignored, as RFC 9110, 14.2, allows."""
    size = version.size
    match = _RANGE.fullmatch(headers.get("range", ""))
    if match is None or not size or not _is_unchanged(headers.get("if-range"), version):
        return None
    first, last, suffix = match.groups()
    if first and last and int(last) < int(first):
        return None
    start = max(size - int(suffix), 0) if suffix else int(first)
    if start >= size:
        raise RangeNotSatisfiable(
            f"the range begins after the end of the file, which has {size} bytes",
            headers={"content-range": f"bytes */{size}"},
        )
    return start, min(int(last) + 1, size) if last else size


def _is_unchanged(if_range: str | None, version: _Version) -> bool:
    """Only a strong tag, or exactly the date, matches."""
    if if_range is None or if_range == version.etag:
        return True
    return version.modified is not None and _date(if_range) == version.modified


def _names(tags: str, etag: str, *, weak: bool) -> bool:
    """In a strong comparison no weak tag matches."""
    return tags == "*" or any(tag == etag and (weak or not mark) for mark, tag in _ENTITY_TAG.findall(tags))


def _is_later(modified: int | None, header: str | None) -> bool | None:
    """None if either date is missing."""
    date = _date(header or "")
    return None if date is None or modified is None else modified > date


def _date(text: str) -> int | None:
    """In seconds, from any of HTTP's three formats."""
    if len(text) > _MAX_DATE_CHARS:
        return None
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return int(date.replace(tzinfo=date.tzinfo or UTC).timestamp())  # asctime's format has no zone: UTC


ROUTES = [GET("/download/{filename}", download)]
