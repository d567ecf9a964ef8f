"""The load generator for one stream: a plain socket, and events counted by the blank line that ends them.

Budget: one `recv` and one search a megabyte, about 1 ms of CPU. `throughput` shows its ceiling against prepared blocks.
"""

import re
import socket
import time
from dataclasses import dataclass
from typing import IO

__all__ = ["Reading", "download", "fetch"]

LF_BLANK_LINE = b"\n\n"
CRLF_BLANK_LINE = b"\r\n\r\n"
TIMEOUT_S = 120
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Reading:
    events: int
    first_s: float  #: from the request's end to the first event
    seconds: float  #: from the request's end to the body's
    cpu_s: float  #: the load generator's own


def fetch(
    port: int,
    target: str,
    *,
    mark: bytes = LF_BLANK_LINE,
    upload: IO[bytes] | None = None,
    max_bytes_s: int | None = None,
) -> Reading:
    """GET `target` to its end (POST with a CSV to `upload`) and count `mark`. `max_bytes_s` makes it a slow reader.

    Raises `RuntimeError` for any status but 200 and for a body that is cut off.
    """
    method = "GET" if upload is None else "POST"
    head = f"{method} {target} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n"
    if upload is not None:
        head += f"content-type: text/csv\r\ncontent-length: {upload.seek(0, 2)}\r\n"
        upload.seek(0)
    step = 1024 * 1024 if max_bytes_s is None else 16 * 1024
    with socket.socket() as sock:
        if max_bytes_s is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * step)  # so that the kernel doesn't read for it
        sock.settimeout(TIMEOUT_S)
        sock.connect(("127.0.0.1", port))
        sock.sendall(f"{head}\r\n".encode())
        if upload is not None:
            sock.sendfile(upload)
        begin, cpu = time.perf_counter(), time.process_time()
        _read_head(sock)
        events, received, kept, first_s = 0, 0, 0, 0.0
        buffer, end = bytearray(step + len(mark)), b""
        view = memoryview(buffer)
        while size := sock.recv_into(view[kept : kept + step]):
            received += size
            end = (end + view[kept + max(size - len(_LAST_CHUNK), 0) : kept + size])[-len(_LAST_CHUNK) :]
            size += kept
            events += buffer.count(mark, 0, size)
            if events and not first_s:
                first_s = time.perf_counter() - begin
            # What may be the beginning of a mark that was cut in two.
            rest = max(buffer.rfind(mark, 0, size) + len(mark), size - len(mark) + 1, 0)
            kept = size - rest
            view[:kept] = bytes(view[rest:size])
            if max_bytes_s is not None:
                time.sleep(max(0.0, begin + received / max_bytes_s - time.perf_counter()))
    if end != _LAST_CHUNK:
        raise RuntimeError(f"{target}: the body was cut off after {events} events")
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    return Reading(events - (mark == CRLF_BLANK_LINE), first_s, seconds, cpu_s)  # the last chunk ends by one too


def download(port: int, target: str) -> Reading:
    """GET a `target` that tells its length, to its end; its bytes are the events. Raises as `fetch`."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n\r\n".encode())
        begin, cpu = time.perf_counter(), time.process_time()
        found = re.search(rb"\r\ncontent-length: (\d+)\r\n", _read_head(sock), re.IGNORECASE)
        buffer, received, first_s = bytearray(1024 * 1024), 0, 0.0
        while size := sock.recv_into(buffer):
            first_s = first_s or time.perf_counter() - begin
            received += size
    if found is None or received != int(found[1]):
        raise RuntimeError(f"{target}: the body was cut off after {received} bytes")
    return Reading(received, first_s, time.perf_counter() - begin, time.process_time() - cpu)


def _read_head(sock: socket.socket) -> bytes:
    """Byte by byte, so that nothing of the body is read."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte:
            raise RuntimeError(f"no answer, but {head!r:.200}")
        head += byte
    if head.split(b" ", 2)[1] != b"200":
        raise RuntimeError(f"{head.decode()}{sock.recv(65536).decode(errors='replace')}")
    return head
