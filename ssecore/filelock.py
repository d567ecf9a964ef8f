"""A lock on an open file, released by the system when the process ends.

On POSIX and Windows. (The library `filelock` locks a separate path.)
"""

import errno
import os
import time
from typing import Any, Final

__all__ = ["FOLDERS", "lock", "try_lock"]

#: Windows: behind the file's end, because a locked byte can't be read. `msvcrt.locking` takes 31 bits.
_FAR: Final = 2**31 - 2
#: Windows has no wait without a timeout.
_POLL_S: Final = 0.05

fcntl: Any
msvcrt: Any
try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

#: Whether a folder can be opened and locked.
FOLDERS: Final = fcntl is not None


def try_lock(file: int) -> bool:
    """Lock it until it is closed. False: another process has."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            at = os.lseek(file, 0, os.SEEK_CUR)
            os.lseek(file, _FAR, os.SEEK_SET)
            try:
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(file, at, os.SEEK_SET)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def lock(file: int) -> None:
    """Wait for the lock of `try_lock`."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
    else:
        while not try_lock(file):
            time.sleep(_POLL_S)
