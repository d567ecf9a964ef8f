"""A standard error that never makes the process wait.

Whatever reads it may stop: a stuck log collector, Ctrl-S on a terminal. A pipe holds 64 KiB, and the write after that
would block the event loop, and with it the handling of signals. So a thread writes; what its queue has no room for is
dropped and counted.
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

#: What waits to be written: some 40,000 lines.
MAX_QUEUED_BYTES: Final = 4 * 1024 * 1024
#: What goes into one write: a pipe's capacity.
WRITE_BYTES: Final = 64 * 1024
#: How long the end of the process waits for what is queued.
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
        self._lock = threading.RLock()  # a signal's handler may write while the main thread does
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
        """Wait until all is written, but no longer."""
        until = time.monotonic() + wait_s
        while self._queued_bytes and not self._forked and time.monotonic() < until:
            time.sleep(0.005)

    def _work(self) -> None:
        told = 0
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
            if written and self._queue.empty() and (dropped := self.dropped_lines - told):
                told += dropped
                logger.warning("%d lines of the log were dropped: standard error was not read in time", dropped)

    def _write(self, data: bytes) -> bool:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process has set O_NONBLOCK on what we share with it
                time.sleep(0.1)
            except OSError:  # its reader is gone
                return False
        return True

    def _in_child(self) -> None:
        """A forked process has no thread that writes."""
        self._forked = True


def unblock() -> None:
    """Put one in place of `sys.stderr`, unless the program has replaced that itself."""
    if sys.__stderr__ is not None and sys.stderr is sys.__stderr__:
        stream: Any = _Unblocked(sys.__stderr__.fileno())
        sys.stderr = stream
        atexit.register(drain)


def drain() -> None:
    """Wait until what was written to standard error has left the process, at most for `DRAIN_S`."""
    if isinstance(sys.stderr, _Unblocked):
        sys.stderr.drain(DRAIN_S)


def dropped_lines() -> int:
    """How many lines were dropped so far."""
    return sys.stderr.dropped_lines if isinstance(sys.stderr, _Unblocked) else 0
