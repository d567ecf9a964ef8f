"""The conformance suite: our own service passes it, and a server with a fault fails the check that is about it."""

import asyncio
import itertools
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import pytest

from conformance.__main__ import main
from conformance.checks import CHECKS, LONG_BYTES
from tests.serving import serve, serve_uvicorn

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = "https://page.example"
EVENTS: Final = 4
STEP_S: Final = 0.15


def results(capsys: pytest.CaptureFixture[str], url: str, *options: str) -> dict[str, str]:
    """Of each check."""
    code = main([url, "--json", "--seed", "1", *options])
    found = {check["name"]: check["result"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert code == ("failed" in found.values())
    return found


def failed(capsys: pytest.CaptureFixture[str], url: str, *options: str) -> list[str]:
    return [name for name, result in results(capsys, url, *options).items() if result == "failed"]


def all_but(*not_applicable: str) -> dict[str, str]:
    return {check.name: "not applicable" if check.name in not_applicable else "ok" for check in CHECKS}


# Our own service


CLAIMS: Final = ["--keyed", "--origin", PAGE, "--lost", "AAAAAAAAAAAAAAAAAAAAAA.1"]


@pytest.mark.parametrize(
    ("log", "start"),
    [("memory", ["/chat?prompt=hello"]), ("sqlite", ["/chat/stream", "--post", '[{"role":"user","content":"hi"}]'])],
)
def test_a_run_of_ours_conforms(log: str, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(tmp_path, env={"SSEAPP_LOG": log, "SSEAPP_CORS_ORIGINS": PAGE}) as server:
        found = results(capsys, server.url + start[0], *start[1:], *CLAIMS)
        assert found == all_but("heartbeat", "last-word")
        failing = f"{server.url}/stream/timeout?limit=0.01&interval=0.004"
        assert results(capsys, failing, "--only", "last-word") == {"last-word": "ok"}


@pytest.mark.parametrize("log", ["memory", "sqlite"])
def test_a_topic_of_ours_conforms(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = {"SSEAPP_LOG": log, "SSEAPP_HEARTBEAT_S": "0.1", "SSEAPP_RETENTION_EVENTS": "100"}
    over = threading.Event()
    with serve(tmp_path, env=env) as server:
        first, *_ = [server.client.post("/topics/news", json=number).json()["id"] for number in range(150)]

        def publish() -> None:
            while not over.wait(0.2):
                server.client.post("/topics/news", json="news")

        publisher = threading.Thread(target=publish)
        publisher.start()
        try:
            claims = ["--events", "5", "--heartbeat", "0.1", "--lost", first]
            found = results(capsys, f"{server.url}/topics/news", *claims)
            assert found == all_but("last-word", "end", "key", "cors")
        finally:
            over.set()
            publisher.join()


# A small server, and what can be wrong with it


DROPS: Final = "drops what a slow reader doesn't take"

#: What is wrong, and the checks that fail.
FAULTS: Final = {
    "sends plain text": ["content-type"],
    "sends latin-1": ["content-type"],
    "may be cached": ["caching"],
    "begins with a BOM": ["format"],
    "breaks a line of data": ["format"],
    "stops in a block": ["format"],
    "is cut off": ["complete"],
    "sends no retry": ["retry"],
    "sends no ids": ["ids"],
    "repeats its ids": ["ids"],
    "sends the id first": ["id-last"],
    "gathers its events": ["arrival"],
    "sends no heartbeat": ["heartbeat"],
    "goes on after its error": ["last-word"],
    "ignores Last-Event-ID": ["resume", "readers", "query-cursor"],
    "repeats an event": ["resume", "cuts"],
    "skips an event": ["resume", "cuts"],
    "shares its events out": ["readers"],
    "looks at no query": ["query-cursor"],
    "begins again after the end": ["end"],
    "doesn't announce a loss": ["unknown-cursor", "lost"],
    "takes any cursor": ["unknown-cursor", "bad-cursor", "lost"],
    "fails at a bad cursor": ["bad-cursor"],
    "breaks at a bad cursor": ["bad-cursor", "alive"],
    "hangs up on a long header": ["long-cursor"],
    "refuses in plain text": ["problem"],
    "gives its gap an id": ["lost"],
    "doesn't know HEAD": ["head"],
    "leaves out Allow": ["method"],
    "ignores keys": ["key"],
    "sends no CORS headers": ["cors"],
    "answers no preflight": ["cors"],
    DROPS: ["slow-reader"],
}


class Raw:
    """A correct server of one resumable stream, in 80 lines over sockets; `fault` breaks one thing."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self._epochs: dict[str, str] = {}  # by key
        self._numbers = itertools.count(1)
        self._open = 0
        self._broken = False
        self._size = 1_000_000 if fault == DROPS else 1

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            method, target, headers = await self._head(reader)
            await self._respond(writer, method, target, headers)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _head(self, reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]]:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        return method, target, {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    async def _respond(self, writer: asyncio.StreamWriter, method: str, target: str, headers: dict[str, str]) -> None:
        fault = self.fault
        query = parse_qs(urlsplit(target).query)
        cursor = headers.get("last-event-id", "")
        if fault != "looks at no query":
            cursor = cursor or query.get("last_event_id", [""])[0]
        epoch, _, number = cursor.partition(".")
        garbage = bool(cursor) and not (len(epoch) == 22 and number.isdigit() and len(number) < 10)
        if self._broken:
            return self._refuse(writer, 500)
        if method == "OPTIONS" and fault != "answers no preflight":
            head = f"access-control-allow-origin: {PAGE}\r\naccess-control-allow-headers: last-event-id\r\n"
            return writer.write(f"HTTP/1.1 204 No Content\r\n{head}\r\n".encode())
        if method not in ("GET", "HEAD") or (method == "HEAD" and fault == "doesn't know HEAD"):
            return self._refuse(writer, 405, "" if fault == "leaves out Allow" else "allow: GET, HEAD\r\n")
        if len(cursor) > LONG_BYTES // 2:
            return None if fault == "hangs up on a long header" else self._refuse(writer, 431)
        if garbage and fault != "takes any cursor":
            self._broken = fault == "breaks at a bad cursor"
            return self._refuse(writer, 500 if fault == "fails at a bad cursor" else 400)
        ended = epoch in self._epochs.values() and number == str(EVENTS)
        if ended and fault != "begins again after the end":
            return writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        kind = {"sends plain text": "text/plain", "sends latin-1": "text/event-stream; charset=latin-1"}
        caching = "max-age=60" if fault == "may be cached" else "no-cache"
        head = f"content-type: {kind.get(fault, 'text/event-stream')}\r\ncache-control: {caching}\r\n"
        if fault != "sends no CORS headers":
            head += f"access-control-allow-origin: {PAGE}\r\n"
        writer.write(f"HTTP/1.1 200 OK\r\n{head}transfer-encoding: chunked\r\nconnection: close\r\n\r\n".encode())
        if method == "GET":
            await self._stream(writer, headers.get("idempotency-key", ""), "" if garbage else cursor)

    def _refuse(self, writer: asyncio.StreamWriter, status: int, head: str = "") -> None:
        body = json.dumps({"status": status, "code": "no", "detail": "no"}).encode()
        kind = "text/plain" if self.fault == "refuses in plain text" else "application/problem+json"
        head += f"content-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        writer.write(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{head}\r\n".encode() + body)

    async def _stream(self, writer: asyncio.StreamWriter, key: str, cursor: str) -> None:
        fault, gathered = self.fault, b""

        async def send(data: bytes, *, last: bool = False) -> None:
            nonlocal gathered
            gathered += data
            if gathered and (fault != "gathers its events" or last):
                taken = not cursor or fault != DROPS or not writer.transport.get_write_buffer_size()
                writer.write(b"%x\r\n%b\r\n" % (len(gathered), gathered) if taken else b"")
                gathered = b""
            if last and fault != "is cut off":
                writer.write(b"0\r\n\r\n")
            if not cursor or fault != DROPS:
                await writer.drain()

        if fault == DROPS:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        opening = b"" if fault == "sends no retry" else b"retry: 1000\n"
        await send((b"\xef\xbb\xbf" if fault == "begins with a BOM" else b"") + opening)
        epoch, _, number = cursor.partition(".")
        after = int(number or 0)
        if not cursor:
            key = key if key and fault != "ignores keys" else f"none {next(self._numbers)}"
            epoch = self._epochs.setdefault(key, f"{len(self._epochs):022}")
        elif epoch not in self._epochs.values() or after > EVENTS:
            if fault != "takes any cursor":
                data = json.dumps({"reason": "expired", "from": 1, "to": None})
                id = f"id: {epoch}.1\n" if fault == "gives its gap an id" else ""
                name = "sorry" if fault == "doesn't announce a loss" else "gap"
                return await send(f"event: {name}\ndata: {data}\n{id}\n".encode(), last=True)
        elif fault == "ignores Last-Event-ID" or (fault == "begins again after the end" and after == EVENTS):
            after = 0
        else:
            after += (fault == "skips an event") - (fault == "repeats an event")
        self._open += 1
        try:
            for event in range(after + 1, EVENTS + 1):
                if not cursor:
                    await asyncio.sleep(STEP_S / 2)
                    await send(b"" if fault == "sends no heartbeat" else b":\n")
                    await asyncio.sleep(STEP_S / 2)
                elif fault in (DROPS, "shares its events out"):
                    await asyncio.sleep(0.05)
                if fault == "shares its events out" and self._open > 1 and event % self._open:
                    continue
                await send(self._block(epoch, event))
        finally:
            self._open -= 1
        await send(b"data: half" if fault == "stops in a block" else b"", last=True)

    def _block(self, epoch: str, number: int) -> bytes:
        fault = self.fault
        name = "error" if number == (2 if fault == "goes on after its error" else EVENTS) else "number"
        data = f"{number}\ntwo lines" if fault == "breaks a line of data" else f"{number}" * self._size
        id = "" if fault == "sends no ids" else f"id: {epoch}.{1 if fault == 'repeats its ids' else number}\n"
        if fault == "sends the id first":
            return f"{id}event: {name}\ndata: {data}\n\n".encode()
        return f"event: {name}\ndata: {data}\n{id}\n".encode()


@contextmanager
def raw(fault: str = "") -> Iterator[str]:
    """Its address."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(Raw(fault).answer, "127.0.0.1", 0, limit=1 << 20))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/stream"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(asyncio.sleep(0.01))  # the connections that they have closed are gone then
        loop.close()


RAW_CLAIMS: Final = [*CLAIMS, "--heartbeat", str(STEP_S / 1.5), "--clients", "2"]


def test_the_small_server_conforms(capsys: pytest.CaptureFixture[str]) -> None:
    with raw() as url:
        assert results(capsys, url, *RAW_CLAIMS) == all_but()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_the_check_that_is_about_it(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    only = [f"--only={check}" for check in FAULTS[fault]]
    with raw(fault) as url:
        assert failed(capsys, url, *RAW_CLAIMS, *only) == FAULTS[fault]


def test_each_check_finds_a_fault() -> None:
    assert {check for checks in FAULTS.values() for check in checks} == {check.name for check in CHECKS}


# Servers of others


@pytest.mark.parametrize(
    ("path", "lacking"),
    [
        ("sse-starlette", ["id-last", "query-cursor", "unknown-cursor", "bad-cursor", "long-cursor"]),
        ("fastapi/stream", ["query-cursor", "end", "unknown-cursor", "bad-cursor", "problem", "head"]),
    ],
)
def test_what_a_server_of_another_library_lacks(
    path: str, lacking: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_uvicorn(tmp_path, app="tests.foreign_servers:make") as server:
        # Their stream is over at once, and nothing in it takes time.
        options = ["--clients", "2", "--skip", "slow-reader", "--skip", "arrival"]
        assert failed(capsys, f"{server.url}/{path}", *options) == lacking


# The command


def test_a_failure_says_what_is_required_and_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    with raw("leaves out Allow") as url:
        assert main([url, "--only", "method", "--only", "caching", "--seed", "7"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok   caching         no-cache",
        "FAIL method          Allow: was not sent",
        "     required: Another method gets 405, with Allow. (RFC 9110, 15.5.6)",
        f"     PATCH {url} -> 405: application/problem+json "
        '\'{"status": 405, "code": "no", "detail": "no"}\', the end',
        "1 ok, 1 failed, 0 not applicable (seed 7)",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["http://127.0.0.1:1/"],
        [],
        ["localhost:8000/stream"],
        ["http://localhost/", "--events", "1"],
        ["http://localhost/", "--header", "token"],
        ["http://localhost/", "--skip", "x"],
    ],
    ids=str,
)
def test_what_cannot_be_run_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(arguments)
    except SystemExit as usage:
        code = usage.code
    written = capsys.readouterr()
    assert (code, written.out) == (2, "") and written.err


def test_an_id_may_begin_with_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    with raw() as url:
        assert not failed(capsys, url, "--lost", "-abc.1", "--only", "retry")


def test_the_help_and_the_documentation_name_each_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--list"])
    assert not done.value.code
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    section = (ROOT / "docs" / "protocol.md").read_text().partition("## Conformance")[2]
    table = re.findall(r"^\| `([a-z-]+)` \|", section, re.M)
    assert listed == [check.name for check in CHECKS]
    assert sorted(table) == sorted(listed)
