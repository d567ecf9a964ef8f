"""A standard error that never blocks the process.

If its reader stops (a stuck log collector, Ctrl-S), writing would block the event loop. So a thread writes; lines that
don't fit in its queue are dropped and counted.
"""

import atexit
import io
import logging
import os
import sys
import threading
import time
from queue import Empty, SimpleQueue
from typing import Any, Final

__all__ = ["drain", "dropped_lines", "unblock"]

logger = logging.getLogger("sseapp")

MAX_QUEUED_BYTES: Final = 4 * 1024 * 1024
#: The capacity of a pipe.
WRITE_BYTES: Final = 64 * 1024
#: At the end of the process.
DRAIN_S: Final = 0.5


class _Unblocked(io.TextIOBase):
    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, descriptor: int) -> None:
        self.dropped_lines = 0
        self._descriptor = descriptor
        self._queue: SimpleQueue[bytes] = SimpleQueue()
        self._queued_bytes = 0
        self._forked = False
        self._lock = threading.RLock()  # a signal handler may write while the main thread writes
        threading.Thread(target=self._work, name="stderr", daemon=True).start()
        if hasattr(os, "register_at_fork"):  # Windows has no fork
            os.register_at_fork(after_in_child=self._in_child)

    def write(self, text: str) -> int:
        data = text.encode(self.encoding, self.errors)
        if self._forked:
            os.write(self._descriptor, data)
            return len(text)
        with self._lock:
            if self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
                self.dropped_lines += text.count("\n")
            else:
                self._queued_bytes += len(data)
                self._queue.put(data)
        return len(text)

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def drain(self, wait_s: float) -> None:
        until = time.monotonic() + wait_s
        while self._queued_bytes and not self._forked and time.monotonic() < until:
            time.sleep(0.005)

    def _work(self) -> None:
        reported = 0
        while True:
            data = self._queue.get()
            try:
                while len(data) < WRITE_BYTES:
                    data += self._queue.get_nowait()
            except Empty:
                pass
            written = self._write(data)
            with self._lock:
                self._queued_bytes -= len(data)
                if not written:
                    self.dropped_lines += data.count(b"\n")
            if written and self._queue.empty() and (dropped := self.dropped_lines - reported):
                reported += dropped
                logger.warning("dropped %d log lines: standard error was not read in time", dropped)

    def _write(self, data: bytes) -> bool:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process has set O_NONBLOCK on the shared file
                time.sleep(0.1)
            except OSError:  # the reader closed it
                return False
        return True

    def _in_child(self) -> None:
        self._forked = True  # the writing thread doesn't exist in a forked process


def unblock() -> None:
    """Replace `sys.stderr`, unless the app has replaced it already."""
    if sys.__stderr__ is not None and sys.stderr is sys.__stderr__:
        stream: Any = _Unblocked(sys.__stderr__.fileno())
        sys.stderr = stream
        atexit.register(drain)


def drain() -> None:
    """Wait until all lines are written, for `DRAIN_S` at most."""
    if isinstance(sys.stderr, _Unblocked):
        sys.stderr.drain(DRAIN_S)


def dropped_lines() -> int:
    """Since the process started."""
    return sys.stderr.dropped_lines if isinstance(sys.stderr, _Unblocked) else 0
