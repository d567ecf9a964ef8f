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
    """Open closed standard streams and, for `sseapp serve`, handle signals. Call it before any file is opened."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a socket would get this number, and printed text would go to a client
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
            stream = open(descriptor, mode, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    if sys.argv[1:2] == ["serve"]:
        # The kernel applies no default action to PID 1, so a container would ignore a signal without a handler.
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """Until the server installs its own handler: no request was accepted yet."""
    os._exit(0)
