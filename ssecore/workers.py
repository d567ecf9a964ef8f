"""Detect whether this process is one of several workers of a server.

Each worker locks a temporary file named after its parent process.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from ssecore.filelock import try_lock

__all__ = ["SEVERAL", "only_worker"]

SEVERAL: Final = (
    "start one worker only (leave --workers out), or give all of them the Redis log: SSEAPP_LOG=redis://… for the "
    "service, Settings(log='redis://…') in code. See docs/workers.md"
)


@contextmanager
def only_worker() -> Iterator[bool]:
    """False within the block if another worker is in it too. True without a server, or without the file."""
    parent = _server()
    file: int | None = None
    path = os.path.join(tempfile.gettempdir(), f"sseapp-worker-of-{parent}")
    only = True
    if parent is not None:
        with suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
            if try_lock(file):
                os.truncate(path, 0)
                os.write(file, b"%d" % os.getpid())
            else:  # perhaps by another app of this process
                only = os.read(file, 20) == b"%d" % os.getpid()
                os.close(file)
                file = None
    try:
        yield only
    finally:
        if file is not None:
            with suppress(OSError):
                os.unlink(path)
            os.close(file)


def _server() -> int | None:
    """The parent, if it is a server: gunicorn forks, others use `multiprocessing`."""
    if (parent := multiprocessing.parent_process()) is not None:
        return parent.pid
    return os.getppid() if "gunicorn" in sys.modules else None
