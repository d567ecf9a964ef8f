"""A real Redis (Debian's) or Valkey (from PyPI) in a folder of its own, to be stopped, killed and started again.

with serving("redis", tmp_path) as server:
    log = RedisLog(server.url)
"""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Final, Literal, get_args

from tests.needs import find
from tests.serving import wait_until

__all__ = ["KINDS", "Kind", "RedisServer", "serving"]

Kind = Literal["redis", "valkey"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


class RedisServer:
    """One server, on a socket in `folder`. It keeps its data over a restart where `keeps` is true."""

    def __init__(self, kind: Kind, folder: Path, *, keeps: bool = False, options: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.path = folder / "redis.sock"
        self.url = f"unix://{self.path}"
        self.kind = kind
        self._options = (*options, "--appendonly", "yes", "--appendfsync", "always") if keeps else options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        program = find("redis") if self.kind == "redis" else str(_valkey())
        where = ["--port", "0", "--unixsocket", str(self.path), "--dir", str(self.folder)]
        command = [program, *where, "--save", "", *self._options, "--logfile", str(self.folder / "log")]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self._answers)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(how)
            self._process.wait(10)
            self._process = None

    def freeze(self, how: signal.Signals = signal.SIGSTOP) -> None:
        assert self._process is not None
        self._process.send_signal(how)

    def call(self, *words: str) -> str:
        """One command, as one would type it."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(self.path))
            client.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w.encode()) for w in words))
            return client.recv(1 << 20).decode(errors="replace")

    def _answers(self) -> bool:
        with suppress(OSError):
            return self.call("PING") == "+PONG\r\n"
        return False


def _valkey() -> Path:
    package = Path(find("valkey")).parent
    return next(path for path in package.rglob("valkey-server*") if os.access(path, os.X_OK) and path.is_file())


@contextmanager
def serving(kind: Kind, *, keeps: bool = False, options: tuple[str, ...] = ()) -> Iterator[RedisServer]:
    # pytest's own folders have names too long for a socket.
    folder = Path(mkdtemp(prefix="redis"))
    server = RedisServer(kind, folder, keeps=keeps, options=options)
    try:
        server.start()
        yield server
    finally:
        server.stop(signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
