"""Server processes on a core of their own, and what the kernel says about them. Linux only."""

import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

__all__ = [
    "PEERS_PYTHON",
    "ROOT",
    "Server",
    "ahead_of_others",
    "busy",
    "cpu_s",
    "memory_bytes",
    "pin_load",
    "pin_server",
    "raise_file_limit",
    "rss_samples",
    "samples",
]

ROOT = Path(__file__).parent.parent
#: Of the environment that requirements-peers.txt is installed in.
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
START_S = 20
#: The same core twice where there is only one: then the rates are of both together, the CPU times still each's own.
_SERVER_CORE, _LOAD_CORE = (sorted(os.sched_getaffinity(0)) * 2)[:2]
_ADDRESS = re.compile(rb"http://127\.0\.0\.1:(\d+)")  # both uvicorn and our runner say where they listen


def pin_server() -> None:
    os.sched_setaffinity(0, {_SERVER_CORE})


def pin_load() -> None:
    os.sched_setaffinity(0, {_LOAD_CORE})


@contextmanager
def busy(processes: int, limit_s: float) -> Iterator[None]:
    """So many processes that do nothing but take time, spread over both cores. They end after `limit_s` at the latest,
    also where this process was killed."""
    spin = f"import time\nend = time.monotonic() + {limit_s}\nwhile time.monotonic() < end: pass"
    running = []
    try:
        for number in range(processes):
            running.append(subprocess.Popen([sys.executable, "-c", spin]))
            os.sched_setaffinity(running[-1].pid, {(_SERVER_CORE, _LOAD_CORE)[number % 2]})
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def ahead_of_others() -> Iterator[None]:
    """For measuring less than a scheduler's slice (some ms): this process, and servers that are started in here, run
    whenever they can, whatever other programs want (SCHED_FIFO). All contenders alike; where it isn't permitted, none.
    """
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def raise_file_limit() -> None:
    """For thousands of sockets, here and in servers started from now on."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Server:
    """A server that runs until its `with` block ends, on a `port` that was free.

    `environ` is added to the environment. Raises `RuntimeError` with its output where it doesn't start.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        python: Path = Path(sys.executable),
        *,
        environ: Mapping[str, str] | None = None,
        ours: bool = False,
        pin: Callable[[], None] = pin_server,
    ) -> None:
        self.ours = ours
        self._log = tempfile.TemporaryFile()
        command = [str(python.absolute()), *arguments]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **(environ or {})},
            preexec_fn=pin,
        )
        self.pid = self._process.pid
        try:
            self.port = self._wait_for_port()
        except BaseException:
            self.__exit__()
            raise

    @classmethod
    def service(cls, data_dir: str, log: str = "sqlite") -> Self:
        return cls(["-m", "sseapp", "serve", "--port", "0", "--data-dir", data_dir, "--log", log], ours=True)

    @classmethod
    def app(
        cls,
        data_dir: str,
        log: str = "sqlite",
        *,
        by_task: bool = False,
        settings: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """`benchmarks.app`, with `settings` by their names."""
        given = {f"SSEAPP_{name.upper()}": str(value) for name, value in (settings or {}).items()}
        environ = {**(environ or {}), **given}
        way = ["--by-task"] if by_task else []
        return cls(["-m", "benchmarks.app", "--data-dir", data_dir, "--log", log, *way], environ=environ, ours=True)

    @classmethod
    def uvicorn(
        cls, peer: str, python: Path = Path(sys.executable), *, environ: Mapping[str, str] | None = None
    ) -> Self:
        """An app of `peers/` under uvicorn, with the settings of our runner."""
        options = "--port 0 --loop uvloop --http httptools --ws none --backlog 4096"
        options += " --no-access-log --no-server-header --no-proxy-headers"
        return cls(["-m", "uvicorn", f"benchmarks.peers.{peer}", *options.split()], python, environ=environ)

    @classmethod
    def peer(cls, peer: str, python: Path = Path(sys.executable)) -> Self:
        """A program of `peers/` that brings a server of its own."""
        return cls(["-m", f"benchmarks.peers.{peer}"], python)

    @classmethod
    def upstream(cls, peer: str, *arguments: str) -> Self:
        """A program of `peers/` that the servers ask, on the load's core."""
        return cls(["-m", f"benchmarks.peers.{peer}", *arguments], pin=pin_load)

    def _wait_for_port(self) -> int:
        deadline, output = time.monotonic() + START_S, b""
        while time.monotonic() < deadline and self._process.poll() is None:
            output = os.pread(self._log.fileno(), 1024 * 1024, 0)
            if found := _ADDRESS.search(output):
                return int(found[1])
            time.sleep(0.02)
        output = os.pread(self._log.fileno(), 1024 * 1024, 0)
        raise RuntimeError(f"{self._process.args!r} did not start:\n{output.decode()}")

    def cpu_s(self) -> float:
        return cpu_s(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def cpu_s(pid: int) -> float:
    """A process's user and system time, of threads that have ended too.

    /proc/<pid>/stat counts hundredths of a second, this clock nanoseconds. Its number is made as the kernel's
    MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) does (include/linux/posix-timers.h).
    """
    return time.clock_gettime((~pid << 3) | 2)


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    """From /proc/<pid>/status: `VmRSS`, or `VmHWM`, its highest so far. Raises `RuntimeError` if the process ended."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the process {pid} has ended")
    return int(found[1]) * 1024


@contextmanager
def samples(probe: Callable[[], int], every_s: float = 0.05) -> Iterator[list[int]]:
    """What `probe` says at equal intervals while the block runs."""
    found, over = [probe()], threading.Event()

    def sample() -> None:
        while not over.wait(every_s):
            found.append(probe())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


@contextmanager
def rss_samples(pid: int, every_s: float = 0.05) -> Iterator[list[int]]:
    """Samples of a process's memory in bytes while the block runs, and its highest point, if they missed that."""
    highest = memory_bytes(pid, "VmHWM")
    with samples(lambda: memory_bytes(pid), every_s) as found:
        yield found
    if memory_bytes(pid, "VmHWM") > highest:
        found.append(memory_bytes(pid, "VmHWM"))
