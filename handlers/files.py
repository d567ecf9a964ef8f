"""Downloads out of one flat folder: whole, in part (`Range`), or not at all where the client has them already.

Boundary of trust: the name comes from outside. It is one segment of the path, so it holds no slash; what begins with a
dot is not served (`..`, and files that are still being written); the file is opened without following a symbolic link
and without waiting for a FIFO's writer, and what was opened is looked at, not what the name meant a moment before.
Everything that is no regular file of the folder itself is the same 404.

Whoever puts a file here writes it under a name with a dot in front and renames it: one that is written in place changes
under those who are reading it.
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

#: Read at once, in a worker thread: 64 KiB halve the speed, and a download holds two or three of these.
CHUNK_BYTES: Final = 256 * 1024

#: The names' types as Python knows them: without the system's own table, which differs from machine to machine.
_MEDIA_TYPES: Final = {**MimeTypes().types_map[True], ".gz": "application/gzip"}  # as from Python 3.14 on
_UNKNOWN_TYPE: Final = "application/octet-stream"
#: With `nosniff` no page takes a script or a style from a file of another type than these; so no file has them. A page
#: of ours, whose policy allows what comes from its own origin, can't be made to run one.
_ACTIVE_TYPE: Final = re.compile(r"javascript|ecmascript|text/css")
#: Where a browser shows a file in spite of `attachment`, nothing in it runs or is of our origin.
_SAFETY: Final = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; sandbox",
}

#: The machine's trouble, and no answer to whether the file is there.
_TROUBLE: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}

#: One range. "A recipient MUST parse and ignore a reasonable number of empty list elements" (RFC 9110, 5.6.1.2). Digits
#: are bounded, since a number of a thousand of them costs time: it is malformed.
_RANGE: Final = re.compile(r"bytes=[ \t,]*(?:([0-9]{1,30})-([0-9]{0,30})|-([0-9]{1,30}))[ \t,]*", re.IGNORECASE)
_ENTITY_TAG: Final = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')
#: The longest form of a date in HTTP has 33 characters.
_MAX_DATE_CHARS: Final = 40

#: What a name may hold to stand between quotes. Not `"` and `\\`, which few read escaped, nor `%`, which some decode
#: (RFC 6266, appendix D).
_NOT_PLAIN: Final = re.compile(r"[^ !#$&-\[\]-~]")


class PreconditionFailed(SSEAppError):
    """`If-Match` or `If-Unmodified-Since`: the file is another one by now."""

    status, code = 412, "precondition_failed"


class RangeNotSatisfiable(SSEAppError):
    """The range begins behind the file's end; carries `Content-Range` with the size."""

    status, code = 416, "range_not_satisfiable"


class _Version(NamedTuple):
    """What conditional requests are compared with."""

    size: int
    etag: str  #: strong
    modified: int | None  #: in seconds; None where it is not in the past, so that a date says nothing

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'
        modified = int(status.st_mtime)
        # "An origin server with a clock MUST NOT generate a Last-Modified date that is later than the server's time of
        # message origination" (RFC 9110, 8.8.2.1).
        return cls(status.st_size, etag, modified if 0 <= modified <= time.time() else None)

    def headers(self) -> dict[str, str]:
        """What a 304 says as well."""
        headers = {"etag": self.etag, "cache-control": "private, no-cache"}
        if self.modified is not None:
            headers["last-modified"] = formatdate(self.modified, usegmt=True)
        return headers


class _Chunks:
    """A part of an open file; `aclose` closes it. (A generator that was never begun would leave it open.)"""

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
            raise SSEAppError("the file was made shorter while it was sent")
        self._at += len(chunk)
        return chunk

    async def aclose(self) -> None:
        self._file.close()


async def open_folder(data_dir: Path) -> Path:
    """The folder of the files in `data_dir`, made if it isn't there. Raises `SSEAppError` where it can't be."""
    folder = data_dir / "files"
    try:
        await to_thread.run_sync(lambda: folder.mkdir(parents=True, exist_ok=True))
    except OSError as error:
        raise SSEAppError(f"{folder} can't be used as the files folder: {error}") from error
    return folder


async def download(request: Request, filename: str) -> Response | ByteStream:
    """A file of the files folder; ranges and conditions as in RFC 9110."""
    with ExitStack() as unless_sent:
        file = unless_sent.enter_context(await to_thread.run_sync(_open, request.state.files, filename))
        version = _Version.of(os.fstat(file.fileno()))
        headers = version.headers()
        if _is_fresh(request.headers, version):
            return Response(status=304, headers=headers)
        # "A server MUST ignore a Range header field received with a request method […] for which range handling is not
        # defined. For this specification, GET is the only method" (RFC 9110, 14.2).
        wanted = _wanted_range(request.headers, version) if request.method == "GET" else None
        start, end = wanted or (0, version.size)
        headers |= _SAFETY | {"accept-ranges": "bytes", "content-length": str(end - start)}
        headers["content-disposition"] = content_disposition(filename)
        if wanted is not None:
            headers["content-range"] = f"bytes {start}-{end - 1}/{version.size}"
        unless_sent.pop_all()
        return ByteStream(_Chunks(file, start, end), _media_type(filename), headers, 206 if wanted else 200)


def _open(folder: Path, name: str) -> FileIO:
    """In a worker thread. Raises `NotFound` for all that is no file of the folder."""
    missing = NotFound("there is no file of this name")
    if name.startswith(".") or "/" in name:
        raise missing
    try:
        name.encode()  # what is not UTF-8 has no name in a header either
        file = open(folder / name, "rb", buffering=0, opener=_without_surprises)
    except (OSError, ValueError) as error:  # a ValueError: it holds a NUL
        if isinstance(error, OSError) and error.errno in _TROUBLE:
            raise Unavailable("the file can't be read now; try again") from error
        raise missing from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise missing
    return file


def _without_surprises(path: str, flags: int) -> int:
    """No link out of the folder, no waiting for a FIFO's writer, no terminal that becomes ours."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)


def _media_type(filename: str) -> str:
    media_type = _MEDIA_TYPES.get(Path(filename).suffix.lower(), _UNKNOWN_TYPE)
    return _UNKNOWN_TYPE if _ACTIVE_TYPE.search(media_type) else media_type


def content_disposition(filename: str) -> str:
    """The header that saves what comes under this name, whatever it holds (RFC 6266, RFC 8187).

    A name that needs it stands there twice: in ASCII for old programs, and as it is.
    """
    plain = _NOT_PLAIN.sub("_", filename)
    header = f'attachment; filename="{plain}"'
    return header if plain == filename else f"{header}; filename*=UTF-8''{quote(filename, safe='')}"


def _is_fresh(headers: Mapping[str, str], version: _Version) -> bool:
    """Whether the client has this version (304). Raises `PreconditionFailed`. In the order of RFC 9110, 13.2.2."""
    changed = PreconditionFailed("the file has changed: ask for it without the condition")
    if "if-match" in headers:
        if not _names(headers["if-match"], version.etag, weak=False):
            raise changed
    elif _is_later(version.modified, headers.get("if-unmodified-since")) is True:
        raise changed
    if "if-none-match" in headers:
        return _names(headers["if-none-match"], version.etag, weak=True)
    return _is_later(version.modified, headers.get("if-modified-since")) is False


def _wanted_range(headers: Mapping[str, str], version: _Version) -> tuple[int, int] | None:
    """The part to send, from the first byte to behind the last one; None for the whole file.

    What is malformed, several ranges, and any range of an empty file are ignored, as a server may (RFC 9110, 14.2).
    """
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
            f"the range begins behind the end: there are {size} bytes", headers={"content-range": f"bytes */{size}"}
        )
    return start, min(int(last) + 1, size) if last else size


def _is_unchanged(if_range: str | None, version: _Version) -> bool:
    """Of a part that the client has, and wants the rest of. Only a strong tag, or exactly the date, will do."""
    if if_range is None or if_range == version.etag:
        return True
    return version.modified is not None and _date(if_range) == version.modified


def _names(tags: str, etag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags holds this one. Compared strongly, a weak one is equal to none."""
    return tags == "*" or any(tag == etag and (weak or not mark) for mark, tag in _ENTITY_TAG.findall(tags))


def _is_later(modified: int | None, header: str | None) -> bool | None:
    """Whether the file is younger than the header's date; None where one of the two isn't there."""
    date = _date(header or "")
    return None if date is None or modified is None else modified > date


def _date(text: str) -> int | None:
    """A date in one of the three forms of HTTP, in seconds; None for what is none."""
    if len(text) > _MAX_DATE_CHARS:
        return None
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return int(date.replace(tzinfo=date.tzinfo or UTC).timestamp())  # asctime's form names no zone: it is UTC


ROUTES = [GET("/download/{filename}", download)]
