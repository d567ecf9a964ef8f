"""The command `sseapp listen`, on a terminal and in a pipe."""

import json
import logging
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssecore.server.cli import main
from tests import serving, upstream
from tests.serving import Server, call_sseapp, written_on
from tests.test_client import cut, numbered, over, quick, stream
from tests.upstream import Upstream

__all__ = ["quick"]

server = serving.server


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command sets up the logging of its process, which here is that of all tests."""
    loggers = [logging.getLogger(), logging.getLogger("sseapp")]
    before = [(one, one.level, one.handlers[:]) for one in loggers]
    yield
    for one, level, handlers in before:
        one.setLevel(level)
        one.handlers[:] = handlers


@pytest.fixture
def foreign() -> Iterator[Upstream]:
    with upstream.serve() as server:
        yield server
        server.settle()


def test_in_a_pipe_each_event_is_a_line(server: Server, capfdbinary: Any) -> None:
    assert main(["listen", f"{server.url}/chat/stream", "--post", '[{"role": "user", "content": "hi"}]']) == 0
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert "".join(line["data"] for line in lines) == "This is a mock response to: hi"
    assert [line["event"] for line in lines] == ["token"] * (len(lines) - 1) + ["done"]
    assert lines[0]["id"].endswith(".1")


def test_in_batches_each_line_is_an_array(foreign: Upstream, capfdbinary: Any) -> None:
    foreign.plan(stream(numbered(1, 2, 3, 4, 5)), over)
    assert main(["listen", foreign.url, "--batch", "2"]) == 0
    arrays = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [[event["data"] for event in array] for array in arrays] == [["1", "2"], ["3", "4"], ["5"]]


def test_into_a_file_and_on_from_there(foreign: Upstream, tmp_path: Path, capfdbinary: Any) -> None:
    path = tmp_path / "events.jsonl"
    foreign.plan(cut(numbered(1)), upstream.refuse(404))
    assert main(["listen", foreign.url, "--to", str(path)]) == 3
    foreign.plan(stream(numbered(2)), over)
    assert main(["listen", foreign.url, "--to", str(path)]) == 0
    assert [json.loads(line)["data"] for line in path.read_bytes().splitlines()] == ["1", "2"]
    assert foreign.calls[0].headers["last-event-id"] == "x.1"
    assert not capfdbinary.readouterr().out


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (stream(b"data: 1\n\n"), 0),
        (stream(b'event: error\ndata: {"error": "no"}\n\n'), 1),
        (upstream.refuse(403, b'{"detail": "not you"}'), 3),
        (cut(b"data: 1\n\n"), 4),
        (upstream.refuse(200, b"<html>", content_type="text/html"), 2),
    ],
)
def test_the_exit_code_says_how_it_ended(foreign: Upstream, body: upstream.Script, code: int, capfd: Any) -> None:
    foreign.plan(body)
    assert main(["listen", foreign.url]) == code
    told = capfd.readouterr().err
    assert ("not you" in told) == (code == 3) and "Traceback" not in told


@pytest.mark.parametrize(
    "arguments",
    [
        ["ftp://example.org"],
        ["http://127.0.0.1:x"],
        ["http://127.0.0.1:1", "--post", "{"],
        ["http://127.0.0.1:1", "--batch", "0"],
        ["http://127.0.0.1:1", "--batch", "2", "--to", "file"],
        ["http://127.0.0.1:1", "--to", "/dev/null"],
        ["http://127.0.0.1:1", "--header", "X-Name"],
        ["http://127.0.0.1:1", "--header", "X Name: 1"],
        ["http://127.0.0.1:1", "--method", "P T"],
        ["http://127.0.0.1:1", "--post", "@nothing"],
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments: list[str], capfd: Any) -> None:
    assert main(["listen", *arguments]) == 2
    said = capfd.readouterr().err
    assert said.startswith("sseapp: ") and said.count("\n") == 1


def test_any_method_any_header_and_a_body_out_of_a_file(foreign: Upstream, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text('{"a": 1}')
    foreign.plan(stream(b"data: 1\n\n"))
    headers = ["--header", "X-Api-Key: secret", "--header", "accept-language:de"]
    assert main(["listen", foreign.url, "--method", "put", "--post", f"@{tmp_path / 'body.json'}", *headers]) == 0
    [call] = foreign.calls
    assert call.request_line.startswith("PUT ") and call.json == {"a": 1}
    assert (call.headers["x-api-key"], call.headers["accept-language"]) == ("secret", "de")


def test_a_file_that_is_complete_already_is_said_to_be(foreign: Upstream, tmp_path: Path, capfd: Any) -> None:
    listening = ["listen", foreign.url, "--to", str(tmp_path / "events.jsonl")]
    foreign.plan(stream(numbered(1)), over)
    assert main(listening) == 0
    assert "complete" not in capfd.readouterr().err
    foreign.plan(over)
    assert main(listening) == 0
    assert "events.jsonl is complete" in capfd.readouterr().err


def test_a_token_that_no_header_can_hold_is_not_tried_again(server: Server, capfd: Any) -> None:
    assert main(["listen", f"{server.url}/stream", "--token", "a\nb"]) == 2
    said = capfd.readouterr().err
    assert "can't be sent" in said and "a\\nb" not in said


def test_the_token_may_stand_in_the_environment(
    foreign: Upstream, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    monkeypatch.setenv("SSEAPP_TOKEN", "from-the-environment")
    foreign.plan(over, over)
    main(["listen", foreign.url])
    main(["listen", foreign.url, "--token", "given"])
    assert [c.headers["authorization"] for c in foreign.calls] == ["Bearer from-the-environment", "Bearer given"]


def on_a_terminal(url: str) -> str:
    """What the command writes on one."""
    terminal, screen = pty.openpty()
    command = [sys.executable, "-m", "sseapp", "listen", url]
    with subprocess.Popen(command, stdout=screen, stderr=screen, stdin=subprocess.DEVNULL) as process:
        os.close(screen)
        written = written_on(terminal)
    os.close(terminal)
    assert process.returncode == 0
    return written.decode()


def test_on_a_terminal_progress_is_a_bar_and_tokens_are_text(foreign: Upstream) -> None:
    events = [
        b'event: progress\ndata: {"percent": 50, "message": "half"}\n\n',
        b'event: progress\ndata: {"current": 3, "total": 3}\n\n',
        b"event: token\ndata: Hello\n\n",
        b'event: token\ndata: {"token": ", you"}\n\n',
        b'data: {"type": "chunk", "content": "!"}\n\n',
        b"event: note\ndata: \x1b[2Jwiped \xe2\x80\xae\n\n",
        b"data: [DONE]\n\n",
    ]
    foreign.plan(stream(*events))
    assert on_a_terminal(foreign.url) == (
        "[###############---------------]  50% half"
        "\r\x1b[K[##############################] 100% progress\r\n"
        "Hello, you!\r\n"
        "note: \ufffd[2Jwiped \ufffd\r\n"
    )


def test_a_reader_that_has_enough_and_ctrl_c(server: Server) -> None:
    command = f"{sys.executable} -m sseapp listen '{server.url}/stream?count=100000&interval=0' | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20)
    assert json.loads(done.stdout)["event"] == "message" and not done.stderr
    listening = [sys.executable, "-m", "sseapp", "listen", f"{server.url}/topics/silence"]
    with subprocess.Popen(listening, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert "init" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130 and not process.stderr.read()
        finally:
            process.kill()  # else leaving the block would wait for it


def test_its_help_tells_the_exit_codes() -> None:
    done = call_sseapp("listen", "--help")
    assert "130  Ctrl-C" in done.stdout and "SSEAPP_TOKEN" in done.stdout
