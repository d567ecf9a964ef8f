"""Through a real nginx, with the configuration that is shipped in deploy/."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import httpx
import pytest
from playwright.sync_api import Page

from ssecore.server.runner import KEEP_ALIVE_S
from ssecore.wire import Decoder
from tests import chromium, redis_server, upstream
from tests.chromium import LISTEN, seen
from tests.clients import BROWSER, REAL_BROWSER
from tests.needs import needs
from tests.nginx import DEPLOY, Nginx, nginx
from tests.serving import Server, free_port, serve, wait_until

pytestmark = needs("nginx")
browser, page = chromium.browser, chromium.page


def kernel_bytes(name: str) -> int:
    """What the kernel lets a buffer grow to while it is emptied fast, as all are at first."""
    return int(Path(f"/proc/sys/net/ipv4/{name}").read_text().split()[2])


#: What stands between a service and a client that doesn't read: nginx's buffer from the service and its buffer to the
#: client, both the kernel's; and small ones, the service's two (256 and 64 KiB), nginx's own and the client's (2 MiB).
IN_FLIGHT_BYTES: Final = kernel_bytes("tcp_rmem") + kernel_bytes("tcp_wmem") + (3 << 20)
OFF: Final = {"SSEAPP_AUTH": "off"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("data"), env={**OFF, "SSEAPP_MAX_IMPORT_BYTES": "200000000"}) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(service: Server) -> Iterator[Nginx]:
    with nginx(service.port) as proxy:
        yield proxy


def counted(server: Server, what: str) -> int:
    """Bytes that the process has read (`rchar`) or written (`wchar`) so far, to sockets and files."""
    lines = Path(f"/proc/{server.process.pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[what])


def at_rest(value: Callable[[], int], rest_s: float = 1) -> int:
    """The value, once it has been the same for so long."""
    seen_at, last = time.monotonic(), value()

    def rests() -> bool:
        nonlocal seen_at, last
        if (now := value()) != last:
            seen_at, last = time.monotonic(), now
        return time.monotonic() - seen_at > rest_s

    wait_until(rests)
    return last


def request(proxy: Nginx, head: str) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # else the kernel may let it grow to 32 MiB
    sock.settimeout(20)
    sock.connect(("127.0.0.1", proxy.port))
    sock.sendall(f"{head}\r\nhost: x\r\n".encode())
    return sock


# Nothing is held back


def read_late(proxy: Nginx, service: Server, path: str) -> tuple[int, bytes]:
    """All of an answer, of which nothing is read until the service has come to rest: its size and its end."""
    last, size = b"", 0

    def read(sock: socket.socket) -> None:
        nonlocal last, size
        while data := sock.recv(1 << 20):
            last, size = (last + data)[-200:], size + len(data)

    with request(proxy, f"GET {path} HTTP/1.0") as sock:
        sock.sendall(b"\r\n")
        assert sock.recv(1)
        at_rest(lambda: counted(service, "wchar"))
        service.process.send_signal(signal.SIGSTOP)  # what it has got rid of is what still comes
        try:
            sock.settimeout(1)
            with pytest.raises(TimeoutError):
                read(sock)
            assert size < IN_FLIGHT_BYTES
            assert proxy.spooled_bytes() == 0
        finally:
            service.process.send_signal(signal.SIGCONT)
        sock.settimeout(20)
        read(sock)
    return size, last


def test_a_client_that_stalls_holds_the_source_back(proxy: Nginx, service: Server) -> None:
    """More is ready than fits in between. The service must not get rid of it before somebody reads it."""
    size, last = read_late(proxy, service, "/stream?count=1000000&interval=0")
    assert size > 1.4 * IN_FLIGHT_BYTES, "too little to fill the buffers: this test shows nothing"
    assert last.endswith(b'event: complete\ndata: {"done":true}\nid: end\n\n'), last


def test_an_import_and_an_export_are_not_laid_aside_on_their_way(proxy: Nginx, service: Server) -> None:
    """The service has the first part of an import before the second is sent. An export waits for who reads it."""
    row = b"a title,open," + b"x" * 9986 + b"\n"
    rows, part = IN_FLIGHT_BYTES * 3 // 2 // len(row), 1000
    before = counted(service, "rchar")
    with request(proxy, "POST /tasks/import HTTP/1.1") as sock:
        length = len("title,status,description\n") + rows * len(row)
        sock.sendall(f"content-type: text/csv\r\ncontent-length: {length}\r\n\r\ntitle,status,description\n".encode())
        sock.sendall(row * part)
        wait_until(lambda: counted(service, "rchar") - before >= part * len(row))
        assert proxy.spooled_bytes() == 0
        sock.sendall(row * (rows - part))
        answer = b""
        while b"event: complete" not in answer:
            answer += sock.recv(1 << 16)
    assert b'"imported":%d' % rows in answer
    size, last = read_late(proxy, service, "/export.csv")
    assert size > 1.4 * IN_FLIGHT_BYTES
    assert b"xxx" in last


def test_a_body_that_is_too_large_is_refused_by_the_service(proxy: Nginx) -> None:
    answer = httpx.post(f"{proxy.url}/topics/news", json="x" * 1_100_000)
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")
    with request(proxy, "POST /tasks/import HTTP/1.1") as sock:
        sock.sendall(b"content-type: text/csv\r\ncontent-length: 300000000\r\n\r\ntitle\n")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_the_first_event_comes_as_soon_as_without_it(proxy: Nginx, service: Server) -> None:
    def first_event_s(port: int) -> float:
        started, decoder = time.monotonic(), Decoder()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            sock.sendall(b"GET /stream?interval=30 HTTP/1.1\r\nhost: x\r\naccept-encoding: gzip\r\n\r\n")
            body = sock.recv(1 << 16).partition(b"\r\n\r\n")[2]
            while not decoder.feed(body):
                body = sock.recv(1 << 16)
            return time.monotonic() - started

    pairs = [(first_event_s(proxy.port), first_event_s(service.port)) for _ in range(20)]
    with_it, without = map(min, zip(*pairs, strict=True))
    assert with_it - without < 0.05


def test_events_are_not_compressed_and_other_answers_are(proxy: Nginx, service: Server) -> None:
    for number in range(30):
        service.client.post("/topics/long", json={"number": number, "text": "x" * 100})
    gzip = {"accept-encoding": "gzip"}
    events = httpx.get(f"{proxy.url}/stream?count=1000&interval=0", headers=gzip)
    assert "content-encoding" not in events.headers
    assert len(events.content) > 10_000
    table = httpx.get(f"{proxy.url}/export.csv?status=doing", headers=gzip)
    assert table.headers["content-encoding"] == "gzip"
    assert table.text.startswith("id,title,")


# What the service hears, and what is not for everybody


def test_a_client_cant_say_who_it_is() -> None:
    heard: list[bytes] = []

    def answer_once() -> None:
        for _ in range(2):  # nginx's own health, and the request
            connection, _ = listener.accept()
            with connection:
                heard.append(connection.recv(1 << 16))
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_once)
        thread.start()
        with nginx(listener.getsockname()[1]) as proxy:
            forged = {
                "forwarded": "for=1.2.3.4",
                "x-forwarded-for": "1.2.3.4",
                "x-forwarded-proto": "https",
                "x-forwarded-host": "other.example",
                "x-real-ip": "1.2.3.4",
                "host": "page.example:8443",
            }
            assert httpx.get(f"{proxy.url}/runs", headers=forged).status_code == 204
        thread.join(10)
    lines = heard[1].decode().lower().split("\r\n")
    assert {line for line in lines if line.startswith(("forwarded", "x-", "host", "connection"))} == {
        "host: page.example:8443",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-host: page.example:8443",
        "x-forwarded-proto: http",
    }


def test_health_is_open_and_metrics_are_not(proxy: Nginx) -> None:
    assert httpx.get(f"{proxy.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{proxy.url}/readyz").json() == {"status": "ready"}
    assert httpx.get(f"{proxy.url}/metrics").status_code == 404


def test_prompts_and_keys_are_not_in_the_access_log(proxy: Nginx) -> None:
    httpx.get(f"{proxy.url}/stream/hello?interval=0&secret=prompt")
    wait_until(lambda: any("/stream/hello" in line for line in proxy.log()))
    assert not [line for line in proxy.log() if "secret" in " ".join(line)]


# No replica


def test_only_an_event_source_is_put_off_while_no_replica_answers() -> None:
    accept = {"accept": "text/event-stream"}
    with nginx(free_port()) as proxy:
        answer = httpx.get(f"{proxy.url}/topics/news", headers=BROWSER)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
        assert answer.text.startswith("retry: ")
        assert Decoder().feed(answer.content) == []
        honest = [
            httpx.get(f"{proxy.url}/topics/news"),
            httpx.get(f"{proxy.url}/topics/news", headers=accept),
            httpx.get(f"{proxy.url}/topics/news", headers={"cache-control": "no-cache"}),
            httpx.get(f"{proxy.url}/healthz", headers=BROWSER),
            httpx.post(f"{proxy.url}/chat/stream", headers=BROWSER),
            httpx.head(f"{proxy.url}/topics/news", headers=BROWSER),
        ]
        assert {answer.status_code for answer in honest} == {502}


@pytest.mark.parametrize("cursor", ["", "end", f"{'e' * 22}.12", "the-handlers-own", "e.1", "id: x"])
def test_nginx_puts_a_browsers_cursor_back_while_no_replica_answers(cursor: str) -> None:
    """As the service does: a test in tests/test_event_source.py says what for."""
    browser = REAL_BROWSER | ({"last-event-id": cursor} if cursor else {})
    with nginx(free_port()) as proxy:
        answer = httpx.get(f"{proxy.url}/topics/news", headers=browser)
        another = httpx.get(f"{proxy.url}/topics/news", headers=browser | BROWSER)
    known = cursor in ("", "end", f"{'e' * 22}.12")
    opening = f":\nid: {cursor}\nevent: cut\n\n" if known else ""
    assert re.fullmatch(re.escape(opening) + r"retry: \d+\n", answer.text)
    assert re.fullmatch(r"retry: \d+\n", another.text)


def test_a_refusal_of_the_service_is_passed_on_as_it_is(tmp_path: Path) -> None:
    with serve(tmp_path, env={**OFF, "SSEAPP_MAX_STREAMS": "1"}) as server, nginx(server.port) as proxy:
        with httpx.stream("GET", f"{proxy.url}/topics/news") as first:
            chunks = first.iter_raw()  # held: it closes the answer when it is collected
            assert next(chunks)
            other = httpx.get(f"{proxy.url}/topics/news", headers={"accept": "text/event-stream"})
            assert (other.status_code, other.headers["content-type"]) == (503, "application/problem+json")
            assert "retry-after" in other.headers


def test_a_request_is_not_passed_on_to_another_replica(service: Server) -> None:
    """The first may have started the work before it broke off. Only the checks of health, which start nothing, are."""

    def break_off() -> None:
        for _ in range(4):
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)

    changes = {"max_fails=1": "max_fails=0"}  # so that each turn is taken
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=break_off, daemon=True).start()
        with nginx(listener.getsockname()[1], service.port, changes=changes) as proxy:
            assert {httpx.get(f"{proxy.url}/readyz").status_code for _ in range(4)} == {200}
            answers = [httpx.get(f"{proxy.url}/stream/hello?interval=0") for _ in range(2)]
    assert sorted(answer.status_code for answer in answers) == [200, 502]


def test_nginx_closes_idle_connections_before_the_service_does() -> None:
    """Otherwise a request would now and then be sent on a connection that is being closed: 502."""
    [nginx_s] = re.findall(r"^    keepalive_timeout (\d+)s;", (DEPLOY / "sseapp/http.conf").read_text(), re.MULTILINE)
    assert int(nginx_s) < KEEP_ALIVE_S


def publish(url: str, count: int, topic: str = "news") -> list[str]:
    """The ids of so many acknowledged events."""
    ids: list[str] = []
    while len(ids) < count:
        answer = httpx.post(f"{url}/topics/{topic}", json={"n": len(ids)})
        answer.raise_for_status()
        ids.append(answer.json()["id"])
    return ids


def listen(page: Page, origin: str, name: str, path: str) -> None:
    if not page.url.startswith(origin):
        page.goto(f"{origin}/healthz")
    page.evaluate(LISTEN, [name, path])


def has_events(page: Page, name: str, count: int) -> None:
    page.wait_for_function(f"window.seen[{name!r}].events.length >= {count}", timeout=20_000)


@needs("chromium")
def test_an_event_source_survives_a_moment_without_a_replica(page: Page, tmp_path: Path) -> None:
    options, environ = ["--port", str(free_port())], {**OFF, "SSEAPP_RETRY_MS": "50"}
    with ExitStack() as stack:
        server = stack.enter_context(serve(tmp_path, *options, env=environ))
        proxy = stack.enter_context(nginx(server.port))
        listen(page, proxy.url, "news", "/topics/news")
        has_events(page, "news", 1)
        ids = publish(server.url, 5)
        server.process.terminate()
        server.wait()
        # Put off, each time with a 200: the browser has not given up.
        page.wait_for_function("window.seen.news.opened >= 2", timeout=20_000)
        with serve(tmp_path, *options, env=environ):
            ids += publish(server.url, 5)
            has_events(page, "news", 11)
        heard = seen(page, "news")
    assert heard.ids[1:] == ids
    assert not heard.closed


# A reload


@needs("chromium")
def test_streams_go_on_over_a_reload(page: Page, service: Server) -> None:
    with nginx(service.port, changes={"worker_shutdown_timeout 20s;": "worker_shutdown_timeout 3s;"}) as proxy:
        listen(page, proxy.url, "news", "/topics/reload")
        has_events(page, "news", 1)
        ids = publish(service.url, 3, "reload")
        has_events(page, "news", 4)
        proxy.reload()
        ids += publish(proxy.url, 3, "reload")  # new connections are served, and the old stream still is
        has_events(page, "news", 7)
        assert seen(page, "news").opened == 1
        page.wait_for_function("window.seen.news.opened >= 2", timeout=20_000)  # cut with its old worker
        ids += publish(proxy.url, 3, "reload")
        has_events(page, "news", 10)
        assert seen(page, "news").ids[1:] == ids


# HTTP/2


def streams_of(proxy: Nginx) -> list[list[str]]:
    return [line for line in proxy.log() if line[5] == "/topics/h2"]


@needs("chromium")
@needs("openssl")
def test_a_hundred_streams_share_one_connection_over_http2(page: Page, service: Server) -> None:
    with nginx(service.port, config="nginx-tls.conf") as proxy:
        for number in range(100):
            listen(page, proxy.tls_url, f"s{number}", f"/topics/h2?reader={number}")
        has_all = "Object.values(window.seen).every((one) => one.events.length == %d)"
        page.wait_for_function(has_all % 1, timeout=20_000)
        [id] = publish(service.url, 1, "h2")
        page.wait_for_function(has_all % 2, timeout=20_000)
        assert {seen(page, f"s{number}").ids[1] for number in (0, 50, 99)} == {id}
        page.goto("about:blank")
        wait_until(lambda: len(streams_of(proxy)) == 100)
        streams = streams_of(proxy)
    assert {protocol for _, _, _, protocol, *_ in streams} == {"HTTP/2.0"}
    assert len({connection for _, connection, *_ in streams}) == 1


# A rolling restart


def keep_publishing(url: str, topic: str, stop: threading.Event, acknowledged: list[str]) -> None:
    with httpx.Client(base_url=url) as client:
        while not stop.wait(0.02):
            answer = client.post(f"/topics/{topic}", json={})
            if answer.status_code == 202:  # else nobody was there: the caller would have to try again
                acknowledged.append(answer.json()["id"])


@needs("valkey")
@needs("chromium")
def test_an_event_source_goes_on_over_a_rolling_restart_of_all_replicas(page: Page, tmp_path: Path) -> None:
    ports, draining = (free_port(), free_port()), threading.Event()

    def short_answer(call: upstream.Call) -> None:
        """It finishes while its replica drains."""
        call.head()
        call.send(upstream.token("one "))
        assert draining.wait(upstream.LIMIT_S)
        call.send(upstream.token("two"), upstream.STOP, upstream.DONE)
        call.end()

    with redis_server.serving("valkey") as redis, upstream.serve() as model, ExitStack() as stack:
        environ = {"SSEAPP_LOG": redis.url, "SSEAPP_RETRY_MS": "50", "SSEAPP_DRAIN_S": "3", **OFF}
        environ["OPENAI_BASE_URL"] = model.url
        model.plan(short_answer, upstream.silent(upstream.token("one ")))

        def replica(port: int) -> Server:
            return stack.enter_context(serve(tmp_path, "--port", str(port), env=environ))

        def start(server: Server) -> str:
            answer = server.client.get("/chat?prompt=hi", headers={"prefer": "respond-async"})
            run: str = answer.json()["run"]
            return run

        replicas = [replica(port) for port in ports]
        proxy = stack.enter_context(nginx(*ports))
        acknowledged: list[str] = []
        stop = threading.Event()
        publisher = threading.Thread(target=keep_publishing, args=(proxy.url, "news", stop, acknowledged))
        listen(page, proxy.url, "news", "/topics/news")
        has_events(page, "news", 1)
        publisher.start()
        stack.callback(publisher.join)
        stack.callback(stop.set)
        for number, name in enumerate(("short", "long"), 1):
            run = start(replicas[0])
            model.wait_call(number)
            listen(page, proxy.url, name, f"/runs/{run}/events")
            has_events(page, name, 1)
        for server, port in zip(replicas, ports, strict=True):
            server.process.terminate()
            if not draining.is_set():
                wait_until(lambda server=server: server.client.get("/readyz").status_code == 503)  # type: ignore[misc]
                draining.set()
            assert server.wait() == 0
            replica(port)
        stop.set()
        publisher.join()
        page.wait_for_function("window.seen.short.closed && window.seen.long.closed", timeout=20_000)
        page.wait_for_function(f"window.seen.news.events.at(-1)[2] === {acknowledged[-1]!r}", timeout=20_000)
        news, short_run, long_run = (seen(page, name) for name in ("news", "short", "long"))
        model.settle()
    assert not news.closed
    assert news.opened >= 2  # its replica went away under it
    assert contiguous(news.ids[1:])
    assert set(acknowledged) <= set(news.ids)
    assert "".join(json.loads(data)["content"] for data in short_run.data[:-1]) == "one two"
    assert short_run.data[-1] == "[DONE]"
    assert contiguous(short_run.ids)
    assert json.loads(long_run.data[-2])["code"] == "interrupted"
    assert long_run.data[-1] == "[DONE]"
    assert contiguous(long_run.ids)


def contiguous(ids: list[str]) -> bool:
    """One after the other: none is missing and none comes twice."""
    sequences = [int(id.rpartition(".")[2]) for id in ids]
    return sequences == list(range(sequences[0], sequences[0] + len(ids)))
