"""Locks on files, and the library on a machine that has neither fcntl nor uvloop."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from ssecore.filelock import lock, try_lock


def test_a_lock_goes_with_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    mine, other = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert try_lock(mine) and not try_lock(other)
    os.close(mine)
    lock(other)
    os.close(other)


#: As on Windows there is neither fcntl nor uvloop nor SIGHUP. `lockf`, which a process has until it ends, plays the
#: lock of `msvcrt`. (Without one either there are no locks, as in a WebAssembly.)
ELSEWHERE: Final = """if True:
    import asyncio, os, random, signal, subprocess, sys, types
    sys.modules["fcntl"] = sys.modules["uvloop"] = None
    del os.register_at_fork, signal.SIGHUP
    if sys.argv[1] == "msvcrt":
        sys.modules["msvcrt"] = msvcrt = types.ModuleType("msvcrt")
        msvcrt.LK_NBLCK = 2
        msvcrt.locking = lambda file, mode, size: os.lockf(file, os.F_TLOCK, size)
    from tests import elsewhere
    elsewhere.main(other_tries=sys.argv[1] == "msvcrt")
"""


@pytest.mark.parametrize("locks", ["msvcrt", "none"])
def test_the_library_works_without_what_windows_lacks(locks: str) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE, locks]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
