"""Entry point of `sseapp`: prepares the process before the slow imports (a third of a second)."""

import os
import signal
import sys
from types import FrameType

__all__ = ["main", "prepare"]


def main() -> int:
    """Returns the exit code."""
    prepare()
    from ssecore.server import cli

    return cli.main()


def prepare() -> None:
    """Must run before any file is opened."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a socket would get this number, and a client the printed text
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets this number, the lowest free one
            stream = open(descriptor, mode, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    if sys.argv[1:2] == ["serve"]:
        # PID 1 has no default actions: a container would ignore the signal.
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(0)
