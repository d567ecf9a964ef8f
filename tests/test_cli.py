"""The command `sseapp`: what it serves, and what it publishes. (`listen` and `token` have files of their own.)"""

import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import ssecore
from ssecore.errors import SettingsError
from ssecore.server.cli import load, main
from tests import serving, upstream
from tests.serving import Server, run_sseapp, serve
from tests.test_listen import foreign, logging_as_before
from tests.test_notifications import subscribed
from tests.upstream import Upstream

__all__ = ["foreign", "logging_as_before"]

server = serving.server


def test_it_tells_its_version(capsys: Any) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"sseapp {ssecore.__version__}\n"


def test_alone_it_prints_its_help() -> None:
    done = run_sseapp()
    assert done.returncode == 0 and not done.stderr
    assert all(f"\n    {command} " in done.stdout for command in ("serve", "token", "listen", "publish"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=str)
def test_it_serves_a_program_that_an_app_is_mounted_in(number: signal.Signals, tmp_path: Path) -> None:
    with serve(tmp_path, "tests.hosts:make") as server:
        assert server.client.post("/fastapi/none/publish", json={"a": 1}).is_success
        with server.client.stream("GET", "/fastapi/none/deep/sse/news") as answer:
            chunks = answer.iter_raw()
            assert b"event: init" in next(chunks)
            server.process.send_signal(number)
            assert b"".join(chunks).startswith(b"retry: "), "and its proper end, else httpx raises"
        assert server.wait() == 0
    assert serving.is_clean(server.log())


def test_a_request_of_a_program_may_end_within_the_drain(tmp_path: Path) -> None:
    with serve(tmp_path, "tests.slow_app:app", env={"SSEAPP_DRAIN_S": "15"}) as server:
        with server.client.stream("GET", "/") as answer:
            chunks = answer.iter_raw()
            assert next(chunks) == b"begun"
            server.process.send_signal(signal.SIGTERM)
            assert b"".join(chunks) == b"ended"
        assert server.wait() == 0
    assert serving.is_clean(server.log())


def test_it_serves_an_app_of_ones_own(tmp_path: Path) -> None:
    with serve(tmp_path, "tests.topics_app:make") as server:
        assert server.client.get("/runs").json() == {"runs": []}
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nothing", "is not MODULE:APP"),
        ("nothing.here:app", "no module named 'nothing'"),
        ("tests.nothing:app", "no module named 'tests.nothing'"),
        ("tests.hosts:nothing", "tests.hosts has no 'nothing'"),
        ("tests.hosts:FLOOD", "is not an ASGI app: its type is int"),
    ],
)
def test_what_cannot_be_served_is_named(target: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load(target)


def test_a_program_that_lacks_something_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking.py").write_text("import nothing_of_the_kind\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_the_kind"):
        load("lacking:app")


def test_the_log_of_a_program_is_for_its_code_to_choose(capsys: Any) -> None:
    assert main(["serve", "tests.hosts:make", "--log", "memory"]) == 2
    assert "Settings(log=…)" in capsys.readouterr().err


def test_an_event_is_published(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "event.json").write_text('{"from": "a file"}')
    with subscribed(server, "/topics/from%20a%20shell") as subscriber:
        subscriber.next()
        topic = ["publish", "from a shell", "--url", f"{server.url}/"]
        assert main([*topic, '{"from": "an argument"}', "--event", "näws"]) == 0
        assert main([*topic, f"@{tmp_path / 'event.json'}"]) == 0
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"3")))
        assert main([*topic, "@-"]) == 0
        events = [subscriber.next() for _ in range(3)]
    assert [(event.event, json.loads(event.data)) for event in events] == [
        ("näws", {"from": "an argument"}),
        ("message", {"from": "a file"}),
        ("message", 3),
    ]
    assert capsys.readouterr().out.split() == [event.id for event in events]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{"], "not JSON"),
        (["@nothing"], "can't read nothing"),
        (["1", "--url", "localhost:8000"], "is not an http"),
        (["1", "--token", "a\nb"], "can't be sent"),
    ],
)
def test_what_cannot_be_published_is_said_in_a_line(arguments: list[str], said: str, capsys: Any) -> None:
    assert main(["publish", "news", *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_refusal_and_a_service_that_is_not_there(foreign: Upstream, capsys: Any) -> None:
    foreign.plan(upstream.refuse(403, b'{"detail": "not\\u001b[2J you"}'))
    assert main(["publish", "news", "1", "--url", foreign.url, "--token", "secret"]) == 3
    assert foreign.calls[0].headers["authorization"] == "Bearer secret"
    assert capsys.readouterr().err == "sseapp: the service answered 403: not [2J you\n"
    assert main(["publish", "news", "1", "--url", f"http://127.0.0.1:{serving.free_port()}"]) == 4
    assert "no response from" in capsys.readouterr().err
