"""Whether this process is one of several workers of a server (uvicorn, gunicorn, hypercorn, granian).

A worker can't ask its server how many there are. So each leaves its number in a file that it locks, in the folder for
temporary files, named after the process that has started it: who finds the file locked is not the only one.
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
    """Within the block this process counts as a worker. False: another one of the same server does already.

    True as well where no server has started it as a worker, and where no file can be written.
    """
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
            else:  # by another app of this process, maybe
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
    """The process that has started this one as a worker. gunicorn forks, the others use `multiprocessing`."""
    if (parent := multiprocessing.parent_process()) is not None:
        return parent.pid
    return os.getppid() if "gunicorn" in sys.modules else None
