"""Real servers, each in a process of its own, for tests that need a socket.

    def test_a_countdown_ends(tmp_path: Path) -> None:
        with serve(tmp_path, env={"SSEAPP_DRAIN_S": "1"}) as server:
            assert server.client.get("/countdown/3?interval=0").is_success
            server.process.send_signal(signal.SIGTERM)
            assert server.wait() == 0
        assert "Traceback" not in server.log()

`serve` is our own runner, `sseapp serve`. `serve_uvicorn` and `serve_hypercorn` (its trio worker) serve the service, or
another app by its import name. They yield when the server answers, and end its process with the block; when the block
fails, the server's log stands under the traceback. A server sees none of the tests' own variables but `env`.

Tests that change nothing in the server can share one for the whole run:

    from tests import serving
    server = serving.server     # the fixture; a test takes it as the argument `server: Server`

`run_sseapp` and `call_sseapp` are for commands that end by themselves. `wait_until` waits for what can only be seen by
looking again. `assert_takes_less` is for a promised time.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import IO, Final, TypeVar

import httpx
import pytest

from ssecore.server.cli import main

__all__ = [
    "Server",
    "assert_takes_less",
    "call_sseapp",
    "free_port",
    "is_clean",
    "run_sseapp",
    "serve",
    "serve_hypercorn",
    "serve_module",
    "serve_uvicorn",
    "server",
    "wait_until",
    "written_on",
]

T = TypeVar("T")

_ROOT: Final = Path(__file__).parent.parent
#: For whatever takes part of a second. It is only used up where something is broken.
_TIMEOUT_S: Final = 20.0


class Server:
    """A server's process, and a client for it. Made by the functions of this module."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
        self.process = process
        self.url = ""  #: http://127.0.0.1:PORT
        self.port = 0
        self.client = httpx.Client()  #: has `url` as its base
        self._log = log
        self._whole_log = ""

    def log(self) -> str:
        """All that the process has written so far, stdout and stderr. It can still be read when the server is gone."""
        if self._log.closed:
            return self._whole_log
        # Not by seek and read: the process writes at the file's offset, which is the same for both.
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def wait(self, timeout_s: float = _TIMEOUT_S) -> int:
        """Wait until the process has ended by itself; its exit code."""
        return self.process.wait(timeout_s)

    def is_up_at(self, url: str) -> None:
        self.url = url
        self.port = int(url.rpartition(":")[2])
        self.client.close()
        # Neither proxies from the environment nor certificates, which take long to load.
        self.client = httpx.Client(base_url=url, trust_env=False, verify=False, timeout=_TIMEOUT_S)

    def answers(self) -> bool:
        with suppress(httpx.TransportError):
            self.client.get("/healthz")
            return True
        return False

    def end(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(3)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._whole_log = self.log()


def serve(
    data_dir: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    module: str = "sseapp",
    stderr: int | None = None,
) -> AbstractContextManager[Server]:
    """Our runner on a free port, `options` as of `sseapp serve`.

    With `stderr`, a file descriptor, its log goes there and can't be read here.
    """
    return _run([module, "serve", *options], data_dir, env, stderr)


def serve_module(
    module: str, data_dir: Path, env: Mapping[str, str] | None = None, stderr: int | None = None
) -> AbstractContextManager[Server]:
    """A program of its own that serves another app with our runner."""
    return _run([module], data_dir, env, stderr)


def _run(
    command: Sequence[str], data_dir: Path, env: Mapping[str, str] | None, stderr: int | None
) -> AbstractContextManager[Server]:
    port = 0 if stderr is None else free_port()
    env = {"SSEAPP_PORT": str(port), "SSEAPP_DATA_DIR": str(data_dir), **(env or {})}
    return _serving(command, env, _told_its_address if stderr is None else _answering_on(port), stderr)


def serve_uvicorn(
    data_dir: Path, *options: str, app: str = "sseapp:create_app", env: Mapping[str, str] | None = None
) -> AbstractContextManager[Server]:
    """Plain uvicorn. `app` is the name of a factory."""
    port = free_port()
    command = ["uvicorn", "--factory", app, "--port", str(port), *options]
    return _serving(command, {"SSEAPP_DATA_DIR": str(data_dir), **(env or {})}, _answering_on(port))


def serve_hypercorn(
    data_dir: Path, *options: str, app: str = "sseapp:create_app()", env: Mapping[str, str] | None = None
) -> AbstractContextManager[Server]:
    """hypercorn's trio worker. `app` is the name of an app, or with `()` of a factory."""
    port = free_port()
    # No workers: it serves in the process that we started, and that we end.
    command = ["hypercorn", "--worker-class", "trio", "--workers", "0", "--bind", f"127.0.0.1:{port}", *options, app]
    return _serving(command, {"SSEAPP_DATA_DIR": str(data_dir), **(env or {})}, _answering_on(port))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Our runner with its default settings, for tests that change nothing in it."""
    with serve(tmp_path_factory.mktemp("data")) as server:
        yield server


def run_sseapp(*arguments: str, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """The command `sseapp`, run to its end."""
    command = [sys.executable, "-m", "sseapp", *arguments]
    return subprocess.run(
        command, cwd=_ROOT, env=_environment(env or {}), capture_output=True, text=True, timeout=_TIMEOUT_S
    )


def call_sseapp(*arguments: str, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """The same in this process, in a fiftieth of the time: for commands that start and serve nothing."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        patch.setattr(os, "environ", _environment(env or {}))
        try:
            code = main(arguments)
        except SystemExit as exit:  # of argparse
            code = exit.code if isinstance(exit.code, int) else 1
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def is_clean(log: str) -> bool:
    return "Traceback" not in log and "ERROR" not in log


def wait_until(condition: Callable[[], T], timeout_s: float = _TIMEOUT_S) -> T:
    """Look again and again until the condition is true, and return what it gave. The test fails when it never is."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        time.sleep(0.02)
    return value


def assert_takes_less(limit_s: float, work: Callable[[], float]) -> None:
    """Of what `work` measures, the least of three: a machine is slow for a moment, and too long a wait is there each
    time."""
    took: list[float] = []
    while len(took) < 3 and not (took and took[-1] < limit_s):
        took.append(work())
    assert min(took) < limit_s, took


def written_on(terminal: int) -> bytes:
    """All that is written on the other side of this pseudoterminal, until that is closed."""
    written = b""
    try:
        while data := os.read(terminal, 65536):
            written += data
    except OSError:  # it has ended: Linux's way to say so
        pass
    return written


@contextmanager
def _serving(
    command: Sequence[str],
    env: Mapping[str, str],
    started: Callable[[Server], bool],
    stderr: int | None = None,
) -> Iterator[Server]:
    """Run a module of Python's as a server, until the block is left."""
    # A file, not a pipe: nobody has to read it for the server to go on.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=_ROOT,
            env=_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT if stderr is None else stderr,
        )
        server = Server(process, log)
        try:
            wait_until(lambda: process.poll() is not None or started(server))
            assert process.poll() is None, f"{command[0]} ended with exit code {process.returncode}"
            yield server
        except BaseException as error:
            error.add_note(f"the log of {command[0]}:\n{server.log()}")
            raise
        finally:
            server.end()


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "PATH", "TMPDIR")}
    return {**kept, "PYTHONUNBUFFERED": "1", **env}


def _told_its_address(server: Server) -> bool:
    if match := re.search(r'serving on (http://[^\s"]+)["\n]', server.log()):
        server.is_up_at(match[1])
    return bool(match) and server.answers()


def _answering_on(port: int) -> Callable[[Server], bool]:
    def started(server: Server) -> bool:
        if not server.url:
            server.is_up_at(f"http://127.0.0.1:{port}")
        return server.answers()

    return started


def free_port() -> int:
    """A port of loopback that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port
