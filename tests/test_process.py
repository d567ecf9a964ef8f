"""The life of the process: how it begins, how it ends whatever its handlers do, and what it does without a log.

All of it against the real process. Nothing here waits for a time to pass, but for the bounds that are promised.
"""

import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest

from sseapp import GET, Event, Request, Settings, SSEApp
from ssecore.streaming.sender import Timekeeper
from ssecore.testing import connect
from tests.needs import find, needs
from tests.serving import Server, free_port, is_clean, serve, serve_module, serve_uvicorn, wait_until
from tests.test_server import farewell, reading

ROOT: Final = Path(__file__).parent.parent
PROGRAM: Final = "tests.process_app"
#: From the signal to the end of the process, besides SSEAPP_DRAIN_S: END_S of `server`, one second more for what holds
#: the interpreter's lock, and room for a machine that is busy.
BOUND_S: Final = 3 + 1 + 3
#: Streams that don't end by themselves.
RUN: Final = "/chat?prompt=" + "word+" * 1000
ENDLESS: Final = ("/countdown/3600?interval=3600", "/topics/news", "/stream?count=1000000&interval=0.01")

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


# An app that fails


def test_an_app_that_fails_while_it_serves_ends_the_process_and_says_why(tmp_path: Path) -> None:
    with serve_module(PROGRAM, tmp_path, env={"SSEAPP_DRAIN_S": "60"}) as server, ExitStack() as stack:
        readers = [stack.enter_context(reading(server, target)) for target in (*ENDLESS, RUN)]
        assert server.client.get("/fail").is_success
        for reader in readers:  # who comes back finds another replica, or the next process
            assert farewell(reader.to_the_end())
        run = readers[-1].response.headers["run-id"]
        assert server.wait() == 1
        assert "ERROR the app failed" in server.log()
        assert "RuntimeError: the timekeeper broke" in server.log()
    with serve(tmp_path) as server:
        assert server.client.get(f"/runs/{run}").json()["state"] == "interrupted"


@needs("time")
def test_an_app_that_fails_ends_the_process_even_if_a_handler_does_not_end(tmp_path: Path) -> None:
    with serve_module(PROGRAM, tmp_path, env={"SSEAPP_DRAIN_S": "0.5"}) as server:
        with reading(server, "/swallow"), reading(server, "/swallow/run"):
            server.client.get("/fail")
            assert server.wait(0.5 + BOUND_S) == 1


def test_under_another_server_an_app_that_failed_is_not_healthy(tmp_path: Path) -> None:
    with serve_uvicorn(tmp_path, app=f"{PROGRAM}:make") as server:
        assert server.client.get("/healthz").status_code == 200
        assert server.client.get("/fail").is_success
        wait_until(lambda: server.client.get("/healthz").status_code == 500)
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/stream").status_code == 503
        wait_until(lambda: "the timekeeper broke" in server.log())


async def test_in_a_program_of_its_own_an_app_that_fails_ends_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = anyio.Event()

    async def run(self: Timekeeper) -> None:
        await failing.wait()
        raise RuntimeError("the timekeeper broke")

    async def ticks(request: Request) -> Any:
        yield Event("tick")
        await anyio.sleep_forever()

    monkeypatch.setattr(Timekeeper, "run", run)
    app = SSEApp([GET("/ticks", ticks)], Settings(log="memory"))
    with anyio.fail_after(10):
        with pytest.raises(ExceptionGroup) as raised:
            async with app.running(), connect(app, "GET", "/ticks") as exchange:
                await exchange.chunk()
                failing.set()
                await exchange.ended.wait()
                assert exchange.complete, "it got its farewell"
                await anyio.sleep_forever()
    assert raised.group_contains(RuntimeError, match="the timekeeper broke")


# The end has a bound


@needs("time")
@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("/swallow", "GET /swallow"),
        ("/swallow/run", "GET /swallow/run"),
        ("/asleep", "GET /asleep"),
        ("/compute", None),
    ],
)
def test_one_sigterm_ends_the_process_whatever_a_handler_does(target: str, named: str | None, tmp_path: Path) -> None:
    with serve_module(PROGRAM, tmp_path, env={"SSEAPP_DRAIN_S": "0.5"}) as server:
        with reading(server, target) as reader:
            reader.until("begun")
            if target in ("/asleep", "/compute"):
                wait_until(lambda: not answers(server))
            server.process.terminate()
            assert server.wait(0.5 + BOUND_S) == 1
        run = reader.response.headers.get("run-id")
        assert (named or "") in server.log() and (run or "") in server.log()
        if target == "/asleep":
            assert "time.sleep(3600)" in server.log()
    if run is not None:
        with serve(tmp_path) as server:
            assert server.client.get(f"/runs/{run}").json()["state"] == "interrupted"


@needs("time")
def test_one_sigterm_ends_the_process_with_an_answer_that_never_comes(tmp_path: Path) -> None:
    with serve_module(PROGRAM, tmp_path, env={"SSEAPP_DRAIN_S": "0.5"}) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"GET /swallow/answer HTTP/1.1\r\nhost: localhost\r\n\r\n")
            wait_until(lambda: "begun\n" in server.log())
            server.process.terminate()
            assert server.wait(0.5 + BOUND_S) == 1
        assert "open requests: 1" in server.log()


def test_a_drain_without_an_end_is_no_error(tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_DRAIN_S": "inf"}) as server:
        with reading(server, "/countdown/2?interval=0.2") as whole:
            server.process.terminate()
            assert whole.to_the_end().endswith("id: end\n\n")
        assert server.wait() == 0
    assert is_clean(server.log())


@needs("time")
def test_others_are_drained_while_a_handler_does_not_end(tmp_path: Path) -> None:
    with serve_module(PROGRAM, tmp_path, env={"SSEAPP_DRAIN_S": "0.5"}) as server, ExitStack() as stack:
        stack.enter_context(reading(server, "/swallow/run"))
        readers = [stack.enter_context(reading(server, target)) for target in ENDLESS]
        server.process.terminate()
        for reader in readers:
            assert farewell(reader.to_the_end())
        assert server.wait(0.5 + BOUND_S) == 1


def answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/healthz", timeout=0.5, trust_env=False).is_success
    except httpx.TransportError:
        return False


# Signals before the service is up, and SIGHUP


@pytest.fixture
def signalled_at_its_first_import(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that gets SIGTERM while it imports what it needs, and then hangs there."""
    (tmp_path / "anyio.py").write_text("import os, time\nos.kill(os.getpid(), 15)\ntime.sleep(60)\n")
    return {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}


SERVE: Final = ("serve", "--port", "0")


@pytest.mark.parametrize("way", ["module", "script"])
def test_sigterm_before_the_imports_are_done_ends_it_in_good_order(
    way: str, signalled_at_its_first_import: dict[str, str]
) -> None:
    done = subprocess.run([*started(way), *SERVE], env=signalled_at_its_first_import, cwd=ROOT, timeout=30)
    assert done.returncode == 0


@needs("unshare")
@pytest.mark.parametrize("way", ["module", "script"])
def test_sigterm_before_the_imports_are_done_ends_pid_1(
    way: str, signalled_at_its_first_import: dict[str, str]
) -> None:
    """To PID 1 of a container the kernel delivers no signal that it has no handler for."""
    command = [find("unshare"), "--pid", "--fork", "--kill-child", *started(way), *SERVE]
    done = subprocess.run(command, env=signalled_at_its_first_import, cwd=ROOT, timeout=30)
    assert done.returncode == 0


def started(way: str) -> list[str]:
    """How the command begins: as in the container, or as its script does."""
    script = "from ssecore.server.command import main; raise SystemExit(main())"
    return [sys.executable, *(["-m", "sseapp"] if way == "module" else ["-c", script])]


def test_importing_it_leaves_signals_alone() -> None:
    program = (
        "import signal as s, sys; before = [s.getsignal(n) for n in (1, 2, 15)]; import sseapp, ssecore.server.runner; "
    )
    program += "sys.exit(before != [s.getsignal(n) for n in (1, 2, 15)])"
    assert subprocess.run([sys.executable, "-c", program, "serve"], cwd=ROOT).returncode == 0


def test_sighup_drains(tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_DRAIN_S": "60"}) as server:
        with reading(server, "/countdown/3?interval=0.2") as whole, reading(server, "/topics/news") as topic:
            server.process.send_signal(signal.SIGHUP)
            assert whole.to_the_end().endswith("id: end\n\n")
            assert farewell(topic.to_the_end())
        assert server.wait() == 0
    assert is_clean(server.log())


def test_under_nohup_sighup_is_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a child inherits it
    try:
        with serve(tmp_path) as server:
            server.process.send_signal(signal.SIGHUP)
            with reading(server, "/countdown/2?interval=0.2") as whole:
                assert whole.to_the_end().endswith("id: end\n\n")
            assert server.client.get("/readyz").json() == {"status": "ready"}
            server.process.terminate()
            assert server.wait() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# A log that is not read


class Pipe:
    """The smallest that there is, as a server's standard error. It is not read before `read_until`."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = reader
        self.writer = writer
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)

    def read_until(self, pattern: str) -> "re.Match[str]":
        """Read on until what was read from now on matches."""
        text = ""
        while not (match := re.search(pattern, text, re.MULTILINE)):
            assert select.select([self._reader], [], [], 20)[0], f"nothing came after {text!r}"
            text = text[-500:] + os.read(self._reader, 1 << 20).decode()
        return match


@contextmanager
def pipe() -> Iterator[Pipe]:
    reader, writer = os.pipe()
    try:
        yield Pipe(reader, writer)
    finally:
        os.close(reader)
        os.close(writer)


def end_streams(server: Server, count: int) -> None:
    for _ in range(count):
        assert server.client.get("/countdown/1?interval=0").is_success


@linux
@pytest.mark.parametrize("signals", [1, 2], ids=["one signal", "two signals"])
def test_a_log_that_is_not_read_holds_up_nothing(signals: int, tmp_path: Path) -> None:
    with pipe() as unread, serve(tmp_path, env={"SSEAPP_DRAIN_S": "60"}, stderr=unread.writer) as server:
        end_streams(server, 300)  # of some 90 bytes each
        with reading(server, ENDLESS[0]) as reader:
            server.process.terminate()
            if signals == 2:
                wait_until(lambda: server.client.get("/readyz").status_code == 503)
                server.process.terminate()
                reader.whatever_comes()
        assert server.wait() == 0


@needs("time")
@linux
def test_a_handler_that_does_not_end_is_cut_off_without_a_log(tmp_path: Path) -> None:
    with (
        pipe() as unread,
        serve_module(PROGRAM, tmp_path, env={"SSEAPP_DRAIN_S": "0"}, stderr=unread.writer) as server,
    ):
        end_streams(server, 100)
        with reading(server, "/swallow"):
            server.process.terminate()
            assert server.wait(BOUND_S) == 1


@linux
def test_what_was_dropped_is_counted_and_told_when_the_log_is_read_again(tmp_path: Path) -> None:
    with pipe() as unread, serve_module(PROGRAM, tmp_path, stderr=unread.writer) as server:
        server.client.get("/shout?mib=6")  # the queue takes 4
        dropped = re.search(r"^sseapp_dropped_lines_total ([1-9]\d*\.\d*)", metrics(server), re.MULTILINE)
        assert dropped
        told = unread.read_until(r"^WARNING dropped (\d+) log lines")
        assert int(told[1]) == float(dropped[1])
        end_streams(server, 1)
        unread.read_until("ended: finished")


def metrics(server: Server) -> str:
    return server.client.get("/metrics").text


@linux
def test_a_log_whose_reader_is_gone_holds_up_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with serve(tmp_path, stderr=writer) as server:
        os.close(writer)
        os.close(reader)
        end_streams(server, 20)
        server.process.terminate()
        assert server.wait() == 0


def test_all_that_was_logged_is_written_before_the_end(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        end_streams(server, 200)
        server.process.terminate()
        assert server.wait() == 0
        assert server.log().count("GET /countdown/{seconds:int} ended: finished") == 200


# Without standard streams


@linux
def test_started_without_standard_streams_it_serves_and_ends(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "sseapp", "serve", "--port", str(port), "--data-dir", str(tmp_path)]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    process = subprocess.Popen(shell, cwd=ROOT, env={"PATH": os.environ["PATH"]})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

            def is_up() -> bool:
                assert process.poll() is None
                try:
                    return client.get("/countdown/1?interval=0").is_success
                except httpx.TransportError:
                    return False

            wait_until(is_up)
        for descriptor in range(3):
            assert os.readlink(f"/proc/{process.pid}/fd/{descriptor}") == os.devnull
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
