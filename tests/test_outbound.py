"""What the environment says of proxies and certificates breaks neither a start nor a client."""

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import anyio
import httpx
import pytest

from ssecore.client import connect
from ssecore.client.outbound import http_client
from tests import serving
from tests.serving import Server, is_clean, serve
from tests.upstream import answer
from tests.upstream import serve as serve_upstream

#: Variables that httpx alone raises for, each with how often it is named: once for each entry that can't be used.
UNUSABLE: Final = {
    "SSL_CERT_FILE": "/nonexistent/ca.pem",
    "SSLKEYLOGFILE": "/nonexistent/keys",
    "ALL_PROXY": "socks5://user:S3cret@127.0.0.1:9",
    "HTTPS_PROXY": "nothing://user:S3cret@127.0.0.1:9",
    "HTTP_PROXY": "http://user:S3cret@127.0.0.1:port",
    "NO_PROXY": "a:b",
}

#: As many of them at once as are looked at: without any proxy NO_PROXY is not.
ALL: Final = UNUSABLE | {"HTTP_PROXY": "http://127.0.0.1:9"}

server = serving.server


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*UNUSABLE, "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
async def proxy() -> AsyncIterator[tuple[str, list[str]]]:
    """A proxy's address, and the first lines of the requests that came there. It answers 200 to each."""
    asked: list[str] = []

    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            asked.append((await stream.receive()).partition(b"\r\n")[0].decode())
            await stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, answer)
        yield f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}", asked
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("variable", UNUSABLE)
async def test_a_variable_that_cant_be_used_is_skipped_and_named_in_one_line(
    variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, server: Server
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv(variable, UNUSABLE[variable])
    async with http_client() as client:
        assert (await client.get(f"{server.url}/healthz")).status_code == 200
    (message,) = [record.getMessage() for record in caplog.records if record.name == "sseapp"]
    assert message.startswith(f"{variable} is ignored: ") and "S3cret" not in message


@pytest.mark.parametrize(
    ("no_proxy", "direct"),
    [
        ("", []),
        ("[::1],::1,[2001:db8::1],a:b", []),
        ("[::1], a.test", ["a.test"]),
        (".a.test", []),
        ("http://a.test,192.0.2.1", ["a.test", "192.0.2.1"]),
        ("*", ["a.test", "192.0.2.1", "b.test"]),
    ],
)
async def test_the_proxy_is_used_but_for_loopback_and_where_no_proxy_exempts(
    no_proxy: str, direct: list[str], proxy: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    address, asked = proxy
    monkeypatch.setenv("HTTP_PROXY", address.removeprefix("http://"))
    monkeypatch.setenv("NO_PROXY", no_proxy)
    with anyio.fail_after(20):
        async with http_client(timeout=20) as client:
            for host in {"a.test", "192.0.2.1", "b.test"} - set(direct):
                assert (await client.get(f"http://{host}/x")).status_code == 200
            proxied = sorted(asked)
            for host in direct:
                with pytest.raises(httpx.TransportError):
                    await client.get(f"http://{host}/x", timeout=0.2)
            assert (await client.get(f"{server.url}/healthz")).text
    hosts = sorted({"a.test", "192.0.2.1", "b.test"} - set(direct))
    assert sorted(asked) == proxied == [f"GET http://{host}/x HTTP/1.1" for host in hosts]


async def test_a_source_reads_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    for name, value in ALL.items():
        monkeypatch.setenv(name, value)
    with anyio.fail_after(20):
        async with connect(f"{server.url}/stream?count=2&interval=0") as source:
            assert [event.event async for event in source][-1] == "complete"


def test_certificates_are_checked_where_the_file_of_them_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", UNUSABLE["SSL_CERT_FILE"])
    context = http_client()._transport._pool._ssl_context  # type: ignore[attr-defined]
    assert context.check_hostname and context.verify_mode.name == "CERT_REQUIRED"


def test_the_service_starts_and_asks_its_model_whatever_the_environment_says(tmp_path: Path) -> None:
    with serve_upstream() as upstream:
        upstream.plan(answer("Hello"))
        with serve(tmp_path, env=ALL | {"OPENAI_BASE_URL": f"{upstream.url}/v1"}) as server:
            assert "Hello" in server.client.get("/chat?prompt=hello").text
    assert is_clean(server.log()) and "S3cret" not in server.log()
    for name in set(ALL) - {"HTTP_PROXY"}:
        assert len(re.findall(rf"\b{name} is ignored: ", server.log())) == 1


def test_the_command_listens_whatever_the_environment_says(server: Server) -> None:
    command = [sys.executable, "-m", "sseapp", "listen", f"{server.url}/stream?count=2&interval=0"]
    result = subprocess.run(command, env=ALL, capture_output=True, text=True, timeout=20)
    assert result.returncode == 0 and "complete" in result.stdout
    assert result.stderr.count(" is ignored: ") == len(ALL) - 1
