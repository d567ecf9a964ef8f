"""The command `sseapp`, up to where the rest of it can be imported.

Imports take a third of a second, and files opened meanwhile take the lowest free descriptors. So this comes first, and
imports only what is cheap.
"""

import os
import signal
import sys
from types import FrameType

__all__ = ["main", "prepare"]


def main() -> int:
    """The command. Returns the exit code."""
    prepare()
    from ssecore.server import cli

    return cli.main()


def prepare() -> None:
    """What must be so before anything else is imported or opened. Touches signals only for `sseapp serve`."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a socket would get this number, and what is printed would go to a client
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number: this one
            stream = open(descriptor, mode, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    if sys.argv[1:2] == ["serve"]:
        # The kernel doesn't apply default actions to PID 1: in a container a signal without a handler is lost.
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """Until the server's own handler is there: nothing is served yet."""
    os._exit(0)
