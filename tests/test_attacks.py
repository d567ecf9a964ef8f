"""What somebody tries who means harm: against real servers, over sockets where the shape of a request matters."""

import codecs
import csv
import gc
import hmac
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import StringIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import httpx
import pytest

from handlers import ROUTES
from sseapp import BODIES, UPLOADS_PER_CALLER, Settings, create_app
from ssecore.errors import Unauthorized
from ssecore.http.guard import MAX_HEADER_LINES
from ssecore.http.request import Request
from ssecore.http.routes import Route
from ssecore.http.tokens import Tokens, add_token, revoke_tokens, session_of
from ssecore.wire import Decoder, Event
from tests.needs import find, needs
from tests.serving import Server, free_port, serve, serve_hypercorn, serve_uvicorn, wait_until
from tests.upstream import refuse
from tests.upstream import serve as serve_upstream

FAST: Final = {"SSEAPP_MOCK_DELAY_S": "0", "SSEAPP_HEARTBEAT_S": "1"}
#: What would become a field, an event or a header of its own wherever it is written out as it came.
FORGED: Final = "x\r\nset-cookie: forged=1\r\n\r\nevent: forged\nid: forged\nretry: 1\ndata: forged\n\n\x00\u2028y"


class Guarded(NamedTuple):
    """A server with tokens, and the headers of two callers and of whom nobody knows."""

    server: Server
    tokens: Path
    ann: dict[str, str]
    ben: dict[str, str]
    token: str


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("data"), env=FAST) as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    tokens = folder / "tokens"
    ann, ben = (add_token(tokens, name, may=["publish"]) for name in ("ann", "ben"))
    with serve(folder / "data", env={**FAST, "SSEAPP_TOKENS_FILE": str(tokens)}) as server:
        yield Guarded(server, tokens, {"authorization": f"Bearer {ann}"}, {"authorization": f"Bearer {ben}"}, ann)
        log = server.log()
        assert "Traceback" not in log
        assert not any(secret.partition(".")[2] in log for secret in (ann, ben, session_of(ann), session_of(ben)))


def exchange(port: int, request: bytes) -> bytes:
    """All that comes back for these bytes, until the server closes or has nothing more to say."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(10)  # for the first part: on a machine under load an answer may take its time
        answer = b""
        try:
            sock.sendall(request)
            while part := sock.recv(65536):
                answer += part
                sock.settimeout(0.3)
        except OSError:
            pass
        return answer


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


# Fields and headers forged through whatever can reach the wire


def asked(route: Route, value: str) -> dict[str, Any]:
    """A request to the route with the value in every place that takes one."""
    path = re.sub(r"{\w+:int}", "1", route.path)
    quoted = re.sub(r"{\w+(:path)?}", lambda _: "".join(f"%{byte:02X}" for byte in value.encode()), path)
    query = {"interval": "0", "count": "1", "limit": "1", "total": "1"}
    query = {name: text for name, text in query.items() if name in getattr(route.query, "__struct_fields__", ())}
    for name in getattr(route.query, "__struct_fields__", ()):
        query.setdefault(name, value)
    request: dict[str, Any] = {"url": quoted, "params": query, "headers": {"accept": "text/event-stream"}}
    if route.method == "POST":
        request["json"] = [{"role": "user", "content": value}] if "chat" in path else {"value": value, value: [value]}
    return request


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_nothing_that_is_asked_forges_a_field_or_a_header(route: Route, private: Server) -> None:
    with private.client.stream(route.method, **asked(route, FORGED)) as response:
        body, began = "", time.monotonic()
        for chunk in response.iter_text():
            body += chunk
            if "\n\n" in body and time.monotonic() - began > 0.3:  # a topic goes on
                break
            if route.path in ("/users/{user_id}/stream", "/topics/{name}"):
                break
    assert response.status_code < 500
    assert "set-cookie" not in response.headers
    for event in Decoder().feed(body.encode()):
        assert event.event != "forged" and event.id != "forged" and event.retry != 1


@pytest.mark.parametrize("cut", ["\r\n", "\n", "\r", "\x00"])
def test_an_event_name_that_holds_a_line_end_is_refused(cut: str, private: Server) -> None:
    answer = private.client.post("/topics/a", params={"event": f"a{cut}data: forged"}, json=1)
    assert (answer.status_code, answer.json()["field"]) == (400, "event")


@pytest.mark.parametrize(
    "data",
    [
        '"a\\r\\nid: forged\\n\\n"',
        '{\r\n"a":\r1,\n\n"b":\r\n\r\n"id: forged"\n}',
        '"\u2028event: forged\u2029\x85"',
        '""',
    ],
)
def test_what_is_published_comes_as_it_was_and_as_one_event(data: str, private: Server) -> None:
    with private.client.stream("GET", "/topics/forge") as response:
        chunks, body = response.iter_bytes(), b""
        while b"init" not in body:
            body += next(chunks)
        decoder = Decoder()
        decoder.feed(body)
        sent = private.client.post("/topics/forge", content=data.encode(), headers={"content-type": "application/json"})
        events: list[Event] = []
        while not events:
            events = decoder.feed(next(chunks))
        (event,) = events
        assert (event.event or "message", event.id) == ("message", sent.json()["id"])
        assert json.loads(event.data) == json.loads(data)


def test_what_is_imported_forges_nothing_when_it_is_read(private: Server) -> None:
    file = StringIO()
    forged = FORGED.replace("\x00", "")
    csv.writer(file).writerows([["title", "description"], ["a", forged], [forged, "b"]])
    headers = {"content-type": "text/csv"}
    told = private.client.post("/tasks/import", content=file.getvalue().encode(), headers=headers)
    read = private.client.get("/tasks/stream")
    assert told.status_code == read.status_code == 200
    for event in [*Decoder().feed(told.content), *Decoder().feed(read.content)]:
        assert event.event != "forged" and event.id != "forged" and event.retry != 1
    assert "event: forged" in read.text, "it is there, as data"
    assert not re.search("^event: forged", read.text, re.MULTILINE)


@pytest.mark.parametrize("cursor", ["x\nid: 1", "end\n", "A" * 22 + ".1\r\n", "A" * 22 + ".1e3", "../../1", "A" * 22])
def test_a_cursor_of_another_shape_is_refused(cursor: str, private: Server) -> None:
    for target in ("/topics/a", "/runs/x/events", "/chat?prompt=x"):
        answer = private.client.get(target, params={**dict(httpx.URL(target).params), "last_event_id": cursor})
        assert answer.status_code in (400, 404)


# Requests that two servers might read differently

POST: Final = b"POST /topics/a HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
HIDDEN: Final = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
CHUNKED: Final = b"1\r\n1\r\n0\r\n\r\n"


SHAPES: Final = [
    POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
    POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n1",
    POST + b"content-length: 1, 1\r\n\r\n1",
    POST + b"content-length: +1\r\n\r\n1",
    POST + b"content-length: -1\r\n\r\n1",
    POST + b"content-length: 0x1\r\n\r\n1",
    POST + b"transfer-encoding: xchunked\r\n\r\n" + CHUNKED,
    POST + b"transfer-encoding: chunked, identity\r\n\r\n" + CHUNKED,
    POST + b"transfer-encoding : chunked\r\n\r\n" + CHUNKED,
    POST + b"x: a\r\n content-length: 1\r\n\r\n1",
    POST + b"x: a\rcontent-length: 1\r\n\r\n1",
    POST + b"transfer-encoding: chunked\r\n\r\n1;\n\r\n1\r\n0\r\n\r\n",
    POST + b"transfer-encoding: chunked\r\n\r\n0x1\r\n1\r\n0\r\n\r\n",
    POST + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff1\r\n1\r\n0\r\n\r\n",
    POST + b"transfer-encoding: chunked\r\n\r\n-1\r\n1\r\n0\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx y: a\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nno colon\r\n\r\n",
    b"GET /healthz\x00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET healthz HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"CONNECT localhost:1 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: repr(shape.removeprefix(POST)[:60]))
def test_a_shape_that_hides_a_request_is_refused_and_the_connection_closed(shape: bytes, private: Server) -> None:
    assert statuses(exchange(private.port, shape + HIDDEN)) == [400]


def test_a_head_without_an_end_is_cut(private: Server) -> None:
    for endless in (
        b"GET /" + b"a" * 200_000,
        b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 40_000,
        b"\r\n" * 100_000,
        POST + b"transfer-encoding: chunked\r\n\r\n" + b"1;" + b"a" * 200_000,
        POST + b"transfer-encoding: chunked\r\n\r\n0\r\nx: " + b"a" * 200_000,
        POST + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 40_000,
    ):
        with socket.create_connection(("127.0.0.1", private.port)) as sock:
            sock.settimeout(10)
            with pytest.raises(OSError):
                for _ in range(20):
                    sock.sendall(endless)
                    endless = endless[-60_000:]
                while sock.recv(65536):
                    pass
                raise ConnectionResetError


def test_what_is_whole_and_too_long_gets_an_answer(private: Server) -> None:
    assert private.client.get("/stream", params={"x": "a" * 62_000}).json()["code"] == "target_too_long"
    assert private.client.get("/" + "a" * 62_000).status_code == 414
    answer = private.client.get("/stream", headers={"x": "a" * 40_000})
    assert (answer.status_code, answer.json()["code"]) == (431, "headers_too_large")


# Ways around the door


@pytest.mark.parametrize(
    "target",
    [
        "/runs",
        "//runs",
        "/runs/",
        "/RUNS",
        "/healthz/../runs",
        "/healthz%2f..%2fruns",
        "/healthz/%2e%2e/runs",
        "/healthz;/runs",
        "/healthz%00/runs",
        "/static/../runs",
        "/static/%2e%2e/runs",
        "/runs%20",
        "/runs%0d%0a",
        "/.//runs",
        "/session/../runs",
        "http://localhost/runs",
        "/runs?x=/healthz",
        "/runs#/healthz",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "get", "GETT"])
def test_no_spelling_of_a_path_leads_around_the_guard(method: str, target: str, guarded: Guarded) -> None:
    answer = exchange(
        guarded.server.port, f"{method} {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    )
    assert all(400 <= status < 500 for status in statuses(answer)), answer
    assert b'"runs"' not in answer


@pytest.mark.parametrize(
    "header",
    [
        "x-original-url: /healthz",
        "x-rewrite-url: /healthz",
        "x-http-method-override: OPTIONS",
        "x-forwarded-for: 127.0.0.1",
        "x-caller: ann",
        "remote-user: ann",
        "authorization: Bearer",
        "authorization: Bearer ann",
        "authorization: Bearer null\r\nauthorization: Bearer undefined",
        "cookie: sseapp_session",
        "cookie: sseapp_session=",
        "cookie: sseapp_session=\x01",
        "cookie: sseapp_session=" + "a" * 8000,
        "cookie: $Version=1; sseapp_session=x; $Path=/",
        "access-control-request-method: GET\r\norigin: null",
    ],
)
def test_no_header_leads_around_the_guard(header: str, guarded: Guarded) -> None:
    request = f"GET /runs HTTP/1.1\r\nhost: localhost\r\n{header}\r\nconnection: close\r\n\r\n"
    assert statuses(exchange(guarded.server.port, request.encode("latin-1")))[0] in (400, 401)


def test_a_second_authorization_header_is_no_second_try(guarded: Guarded) -> None:
    for pair in ((guarded.token, "wrong"), ("wrong", guarded.token)):
        lines = "".join(f"authorization: Bearer {token}\r\n" for token in pair)
        request = f"GET /runs HTTP/1.1\r\nhost: localhost\r\n{lines}connection: close\r\n\r\n"
        assert statuses(exchange(guarded.server.port, request.encode())) == [401]


@pytest.mark.parametrize(
    "name",
    ["..%2fdata", "..%2f..%2ftokens", "%2e%2e%2flog.db", "..%5clog.db", "%2fetc%2fpasswd", "a%00b", ".", "%2e%2e"],
)
def test_a_file_name_does_not_leave_its_folder(name: str, guarded: Guarded) -> None:
    answer = guarded.server.client.get(f"/download/{name}", headers=guarded.ann)
    assert answer.status_code in (400, 404)
    assert "root:" not in answer.text and "hash" not in answer.text


def test_the_right_secret_and_a_wrong_one_take_the_same_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In constant time, on both sides of it, and for ids that aren't there as well."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counted(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    token = add_token(tmp_path / "tokens", "ann")
    tokens = Tokens(tmp_path / "tokens")
    monkeypatch.setattr("hmac.compare_digest", counted)
    tokens.find(token)
    for wrong in (token[:-1], token + "x", token[:20], "x" + token, "", "x", token.partition(".")[0]):
        with pytest.raises(Unauthorized):
            tokens.find(wrong)
    assert compared == [(64, 64)] * 8


# Somebody else's


def test_nobody_gets_at_what_is_somebody_elses(guarded: Guarded) -> None:
    client, ann, ben = guarded.server.client, guarded.ann, guarded.ben
    key = {"idempotency-key": "the-same-key"}
    mine = client.get("/chat?prompt=mine", headers=ann | key)
    run, cursor = mine.headers["run-id"], mine.headers["run-id"] + ".1"
    assert "mine" in mine.text

    for target in (f"/runs/{run}", f"/runs/{run}/events"):
        assert client.get(target, headers=ann).status_code == 200
        assert client.get(target, headers=ben).status_code == 404
        assert client.get(target).status_code == 401
    assert client.delete(f"/runs/{run}", headers=ben).status_code == 404
    assert run not in client.get("/runs", headers=ben).text and run in client.get("/runs", headers=ann).text
    for target in ("/chat?prompt=mine", f"/runs/{run}/events"):
        answer = client.get(target, headers=ben | {"last-event-id": cursor})
        assert answer.status_code == 410, "as if it were not there"
    other = client.get("/chat?prompt=mine", headers=ben | key)
    assert other.headers["run-id"] != run, "the key is a name of the caller's own"

    job = client.post("/jobs", headers=ann, json={"kind": "sleep", "input": {"steps": 1, "interval": 0}})
    for target in (f"/jobs/{job.headers['run-id']}/progress", job.headers["location"]):
        assert client.get(target, headers=ann).status_code == 200
        assert client.get(target, headers=ben).status_code == 404
        first = {"last-event-id": f"{job.headers['run-id']}.1"}
        assert client.get(target, headers=ben | first).status_code == 410

    def say(message: str, caller: dict[str, str]) -> str:
        body = {"message": message, "session_id": "the-same-session"}
        return client.post("/api/chat", headers=caller, json=body).text

    say("Find the invoice", ann)
    assert "invoice" in say("How many of them are done?", ann)
    assert "invoice" not in say("How many of them are done?", ben)

    assert client.get("/users/ann/stream", headers=ben).status_code == 403
    assert client.post("/users/ann/messages", headers=ben, json=1).status_code == 202, "whoever may publish"
    assert client.get("/metrics", headers=ben).status_code == 403


def test_a_stream_ends_in_the_middle_when_its_token_is_revoked(guarded: Guarded) -> None:
    token = add_token(guarded.tokens, "eve")
    headers = {"authorization": f"Bearer {token}"}
    with guarded.server.client.stream("GET", "/countdown/3600?interval=0.01", headers=headers) as response:
        chunks = response.iter_text()
        body = next(chunks)
        revoke_tokens(guarded.tokens, "eve")
        began = time.monotonic()
        body += "".join(chunks)
    assert time.monotonic() - began < 5
    assert body.endswith('event: error\ndata: {"error":"this token was revoked or changed","code":"token_revoked"}\n\n')
    assert guarded.server.client.get("/runs", headers=headers).status_code == 401


# Pages of somebody else's


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
    ids=str,
)
def test_a_foreign_page_can_use_no_cookie(headers: dict[str, str], guarded: Guarded) -> None:
    client = guarded.server.client
    cookie = {"cookie": f"sseapp_session={session_of(guarded.token)}"}
    for media_type in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        form = {"content-type": media_type}
        assert client.post("/topics/a", content="1", headers=cookie | form | headers).status_code == 403
    assert client.get("/chat?prompt=x", headers=cookie | headers).status_code == 403
    assert client.delete("/runs/x", headers=cookie | headers).status_code == 403


def test_a_form_of_a_page_is_no_json(guarded: Guarded) -> None:
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        headers = guarded.ann | {"content-type": media_type}
        assert guarded.server.client.post("/topics/a", content='{"a":1}', headers=headers).status_code == 415


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:{port}"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost", "sec-fetch-site": "cross-site"},
        {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
        {"host": "localhost", "origin": "http://evil.example"},
        {"host": "localhost", "origin": "null"},
    ],
    ids=str,
)
def test_a_private_service_works_for_no_foreign_page(headers: dict[str, str], private: Server) -> None:
    headers = {name: value.replace("{port}", str(private.port)) for name, value in headers.items()}
    before = private.client.get("/runs").json()
    for method, target in (("GET", "/chat?prompt=x"), ("POST", "/topics/a"), ("GET", "/export.csv")):
        assert private.client.request(method, target, headers=headers).status_code == 403
    assert private.client.get("/runs").json() == before


@contextmanager
def nginx(port: int, directives: str) -> Iterator[int]:
    """As one writes it in a minute, in front of a port; gives its own."""
    with TemporaryDirectory() as name:
        listens = free_port()
        paths = "".join(
            f"{kind}_temp_path {name}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (Path(name) / "nginx.conf").write_text(
            f"""daemon off; pid {name}/pid; error_log {name}/error.log; events {{}}
            http {{ access_log off; {paths} upstream app {{ server 127.0.0.1:{port}; keepalive 1; }}
              server {{ listen 127.0.0.1:{listens}; location / {{ proxy_pass http://app; {directives} }} }} }}"""
        )
        command = [find("nginx"), "-e", "stderr", "-p", name, "-c", "nginx.conf"]
        if os.geteuid() == 0:  # else its workers would be nobody's, and could not write here
            os.chown(name, 65534, 65534)
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
        process = subprocess.Popen(command)
        try:
            wait_until(lambda: is_open(listens))
            yield listens
        finally:
            process.terminate()
            process.wait(10)


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return not sock.connect_ex(("127.0.0.1", port))


#: What makes nginx use a connection again, and a service on loopback answer it.
KEPT: Final = 'proxy_http_version 1.1; proxy_set_header Connection "";'


@needs("nginx")
@pytest.mark.parametrize(
    "directives",
    [
        "proxy_set_header Host localhost;",  # HTTP/1.0, its default before 1.29.7
        f"{KEPT} proxy_set_header Host $host;",
        f"{KEPT} proxy_set_header Host localhost; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;",
        f"{KEPT} proxy_set_header Host localhost; proxy_set_header X-Real-IP $remote_addr;",
        f"{KEPT} proxy_set_header Host localhost; proxy_set_header Forwarded for=$remote_addr;",
    ],
)
def test_an_nginx_on_the_same_machine_does_not_publish_a_private_service(directives: str, private: Server) -> None:
    with nginx(private.port, directives) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/stream", headers={"host": "app.example"}, trust_env=False)
    assert (answer.status_code, answer.json()["code"]) == (403, "private")
    assert "SSEAPP_TOKENS_FILE" in answer.json()["detail"]


@needs("nginx")
def test_a_shape_that_hides_a_request_is_refused_by_the_server_in_front(private: Server) -> None:
    with nginx(private.port, f"{KEPT} proxy_set_header Host localhost;") as port:
        for shape in SHAPES:
            assert statuses(exchange(port, shape + HIDDEN)) in ([400], [501]), shape
            # Over the connection that the two of them share: an answer too many would be taken for this one's.
            ready = httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
            assert ready.json() == {"status": "ready"}, shape


# Bodies that are meant to hurt


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 100_000, 400),
        (b"[" * 100_000 + b"]" * 100_000, 400),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
        (b"1" * 500_000, (202, 400)),
        (b"-1e" + b"9" * 100_000, (202, 400)),
        (b"1e400", (202, 400)),
        (b"0." + b"0" * 500_000 + b"1", (202, 400)),
        (b'{"a":1,"a":2}', 202),
        (b"{" + b",".join(b'"a":%d' % n for n in range(60_000)) + b"}", 202),
        (b'"' + b"\\u0000" * 100_000 + b'"', 202),
        (b'"\\ud800"', (202, 400)),
        (b'"\xff\xfe"', 400),
        (b"NaN", 400),
        (b"\xef\xbb\xbf1", 202),
        (b"1 1", 400),
        (b"", 400),
        (b" " * 1_000_000, 400),
        (b'"' + b"x" * 10_000_000 + b'"', 413),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_a_bomb_of_json_is_refused_or_an_event_like_any_other(body: bytes, status: Any, private: Server) -> None:
    headers = {"content-type": "application/json"}
    began = time.monotonic()
    for target in ("/topics/bombs", "/users/ann/messages"):
        answer = private.client.post(target, content=body, headers=headers)
        assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text[:300]
    chat = private.client.post("/chat/stream", content=body, headers=headers)
    assert chat.status_code in (400, 413)
    assert time.monotonic() - began < 5
    assert private.client.get("/healthz").is_success


@pytest.mark.parametrize(("target", "media_type"), [("/topics/a", "application/json"), ("/tasks/import", "text/csv")])
@pytest.mark.parametrize("encoding", ["gzip", "GZip", "br, gzip", "zstd"])
def test_a_compressed_body_is_refused_in_words(target: str, media_type: str, encoding: str, private: Server) -> None:
    headers = {"content-type": media_type, "content-encoding": encoding}
    answer = private.client.post(target, content=b"\x1f\x8b" + b"\x00" * 1000, headers=headers)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "identity")
    assert "Content-Encoding" in answer.json()["detail"]


def test_a_body_that_says_that_it_is_not_compressed_is_taken(private: Server) -> None:
    headers = {"content-type": "application/json", "content-encoding": "identity"}
    assert private.client.post("/topics/a", content=b"1", headers=headers).is_success


def test_a_byte_order_mark_before_a_json_body_is_ignored(private: Server) -> None:
    """As Windows' tools write it (RFC 8259, 8.1)."""
    headers = {"content-type": "application/json"}
    mark = codecs.BOM_UTF8
    assert private.client.post("/topics/bom", content=mark + b'{"a": 1}', headers=headers).is_success
    messages = mark + b'[{"role": "user", "content": "hello"}]'
    assert "event: done" in private.client.post("/chat/stream", content=messages, headers=headers).text
    for wrong in (mark, mark * 2 + b"1", b" " + mark + b"1", codecs.BOM_UTF16 + b"1"):
        assert private.client.post("/topics/bom", content=wrong, headers=headers).status_code == 400


# What one client may take from all others

#: What looks into /proc.
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

MIB: Final = 1024 * 1024
UPLOAD: Final = b"POST /tasks/import HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/csv\r\n"


def memory(server: Server, kind: str = "VmRSS") -> int:
    """The process's memory in bytes; `VmHWM` is the most that it ever had."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) * 1024


def cpu_s(server: Server) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def connections(server: Server, *sent: bytes) -> Iterator[list[socket.socket]]:
    """One for each of these, which are sent by a thread as far as the server takes them, while the block runs."""
    socks = [socket.create_connection(("127.0.0.1", server.port)) for _ in sent]
    left = {sock.fileno(): memoryview(data) for sock, data in zip(socks, sent, strict=True)}
    over = threading.Event()
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for sock in socks:
            stack.enter_context(sock).setblocking(False)
            selector.register(sock, selectors.EVENT_WRITE)

        def send() -> None:
            while not over.is_set() and selector.get_map():
                for key, _ in selector.select(0.05):
                    try:
                        left[key.fd] = left[key.fd][os.write(key.fd, left[key.fd][:65536]) :]
                    except BlockingIOError:
                        continue
                    except OSError:
                        left[key.fd] = left[key.fd][:0]
                    if not left[key.fd]:
                        selector.unregister(key.fileobj)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield socks
        finally:
            over.set()
            thread.join()


def settled(server: Server) -> bool:
    """It does nothing any more."""
    before = cpu_s(server)
    time.sleep(0.1)
    return cpu_s(server) == before


SHORT: Final = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
LONG: Final = b"GET /nothing HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * 60_000 + b"\r\n\r\n"
WITH_BODY: Final = POST + b"content-length: 30000\r\n\r\n" + b" " * 29_999 + b"1"
IDLE: Final = b"GET /countdown/3600?interval=3600 HTTP/1.1\r\nhost: localhost\r\n\r\n"


@linux
@pytest.mark.parametrize("front", [b"", IDLE], ids=["by itself", "behind a stream"])
@pytest.mark.parametrize("request_", [SHORT, LONG, WITH_BODY], ids=["short", "long", "with a body"])
def test_pipelined_requests_cost_others_neither_memory_nor_time(front: bytes, request_: bytes, tmp_path: Path) -> None:
    with serve(tmp_path, env=FAST) as server:
        for _ in range(20):
            server.client.get("/healthz")
        before = memory(server)
        waited: list[float] = []
        with connections(server, *[front + request_ * (MIB // len(request_))] * 100):
            while len(waited) < 50 or not settled(server):
                began = time.monotonic()
                assert server.client.get("/healthz").is_success
                waited.append(time.monotonic() - began)
        assert memory(server, "VmHWM") - before < 50 * MIB
        assert median(waited) < 0.1
        assert "Traceback" not in server.log()


def test_a_stream_whose_client_pipelined_and_left_ends(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(IDLE)
            answer = b""
            while b"remaining" not in answer:
                answer += sock.recv(65536)
            sock.sendall(HIDDEN)
        wait_until(lambda: "ended: client" in server.log())


@needs("time")
@linux
@pytest.mark.parametrize("start", [serve, serve_uvicorn, serve_hypercorn], ids=["sseapp", "uvicorn", "hypercorn"])
def test_a_head_of_very_many_lines_is_refused_at_little_cost(start: Any, tmp_path: Path) -> None:
    def asked(lines: int) -> bytes:
        return exchange(server.port, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n" + b"a:\r\n" * lines + b"\r\n")

    with start(tmp_path, env=FAST) as server:
        assert statuses(asked(MAX_HEADER_LINES - 1)) == [200]
        for lines in (MAX_HEADER_LINES, 5000):
            answer = asked(lines)
            assert statuses(answer) == [431] and b"headers_too_large" in answer
        before = cpu_s(server)
        for _ in range(10):
            assert statuses(asked(26_000)) in ([431], [400], []), "or by the server, or cut off by it"
        if start is serve:
            assert cpu_s(server) - before < 10 * 0.045


@linux
def test_trickled_uploads_of_one_caller_hold_little(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    ann = b"authorization: Bearer %b\r\n" % add_token(tokens, "ann").encode()
    upload = UPLOAD + ann + b"content-length: 2000000\r\n\r\ntitle\n" + b"x" * 1_100_000
    ben = {"authorization": f"Bearer {add_token(tokens, 'ben')}", "content-type": "text/csv"}
    with serve(tmp_path / "data", env={**FAST, "SSEAPP_TOKENS_FILE": str(tokens)}) as server:
        before = memory(server)
        with connections(server, *[upload] * 400) as socks:
            wait_until(lambda: len(answered(socks)) == 400 - UPLOADS_PER_CALLER)
            wait_until(lambda: settled(server))
            assert answered(socks) == [429] * (400 - UPLOADS_PER_CALLER)
            assert memory(server, "VmHWM") - before < 60 * MIB
            answer = server.client.post("/tasks/import", headers=ben, content=b"title\nx\n")
            assert answer.status_code == 200 and "success" in answer.text


@needs("time")
@linux
def test_trickled_bodies_hold_little_where_nobody_has_a_name(tmp_path: Path) -> None:
    with serve(tmp_path, env=FAST) as server:
        before = memory(server)
        with connections(server, *[POST + b"content-length: 1000000\r\n\r\n" + b" " * 999_999] * 400) as socks:
            wait_until(lambda: len(answered(socks)) > 400 - 1.1 * BODIES)
            wait_until(lambda: settled(server))
            assert set(answered(socks)) == {503}
            assert memory(server, "VmHWM") - before < 250 * MIB, "of 400 MB"
        wait_until(lambda: server.client.post("/topics/a", json="x" * 900_000).status_code == 202)


@pytest.mark.parametrize(
    ("path", "body", "status", "calls"),
    [
        ("/topics/a", b" " * 60_000, 413, 0),
        ("/nothing", b" " * 60_000, 404, 0),
        ("/topics/a?event=", b"1", 400, 0),
        ("/v1/chat/completions", b'{"model": "x", "messages": [{}]}', 404, 0),  # by its handler, in a run
        ("/v1/chat/completions", b'{"messages": [{}]}', 400, 1),  # by the model's server
        ("/v1/responses", b'{"input": "x"}', 400, 1),
        ("/chat/stream", b'[{"role": "user", "content": "x"}]', 502, 1),
    ],
)
async def test_a_refused_request_is_freed_without_a_garbage_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, body: bytes, status: int, calls: int
) -> None:
    """Its headers and what came of its body: a MiB each, of very many clients at once."""

    told: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": status == 413}

    async def send(message: Any) -> None:
        told.append(message.get("status", 0))

    monkeypatch.setenv("no_proxy", "*")
    path, _, query = path.partition("?")
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    with serve_upstream() as upstream:
        upstream.plan(*[refuse(400)] * calls)
        app = create_app(Settings(data_dir=tmp_path, max_body_bytes=100_000, auth="off", openai_base_url=upstream.url))
        async with app.running():
            gc.collect()
            gc.disable()
            try:
                scope = {"type": "http", "method": "POST", "path": path, "query_string": query.encode()}
                await app({**scope, "headers": headers}, receive, send)
                assert told == [status, 0]
                requests = [each for each in gc.get_objects() if isinstance(each, Request)]
                assert not [each for each in requests if each._receive is receive], "a run has its own"
            finally:
                gc.enable()
        upstream.settle()


def answered(socks: list[socket.socket]) -> list[int]:
    """The statuses that have come by now."""
    found: list[int] = []
    for sock in socks:
        with suppress(BlockingIOError):
            found += statuses(sock.recv(65536, socket.MSG_PEEK))
    return found


@linux
def test_an_idle_connection_keeps_nothing_of_what_it_sent(guarded: Guarded) -> None:
    head = b"POST /%b HTTP/1.1\r\nhost: localhost\r\nx: %b\r\n" % (b"a" * 50_000, b"x" * 30_000)
    whole = head + b"content-length: 60000\r\n\r\n" + b" " * 60_000
    before = memory(guarded.server)
    with ExitStack() as stack:
        for _ in range(300):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", guarded.server.port)))
            sock.sendall(whole)
            assert statuses(sock.recv(65536)) == [404]
        assert memory(guarded.server) - before < 20 * MIB


def test_a_body_in_tiny_chunks_is_cut_off_and_one_in_small_chunks_is_not(private: Server) -> None:
    def chunked(size: int) -> bytes:
        chunk = b"%x\r\n%b\r\n" % (size, b" " * size)
        return POST + b"transfer-encoding: chunked\r\n\r\n" + chunk * (400_000 // size) + b"1\r\n1\r\n0\r\n\r\n"

    with socket.create_connection(("127.0.0.1", private.port), 10) as sock:
        sock.sendall(chunked(8))
        assert statuses(sock.recv(65536)) == [202]
    with socket.create_connection(("127.0.0.1", private.port), 10) as sock, suppress(ConnectionError):
        sock.sendall(chunked(1))
        assert sock.recv(65536) == b""


def test_a_body_that_is_not_wanted_is_refused_before_it_is_asked_for(guarded: Guarded) -> None:
    """Without a `100 Continue`."""
    expect = b"expect: 100-continue\r\ncontent-length: 5\r\n"
    ann = b"authorization: Bearer %b\r\n" % guarded.token.encode()
    assert statuses(exchange(guarded.server.port, POST + expect + b"\r\n")) == [401]
    too_large = expect.replace(b"5", b"5000000")
    assert statuses(exchange(guarded.server.port, POST + ann + too_large + b"\r\n")) == [413]
    assert statuses(exchange(guarded.server.port, POST + ann + expect + b"\r\n")) == [100]


def test_all_that_was_tried_has_left_no_stream_open(private: Server, guarded: Guarded) -> None:
    def nothing_open(server: Server, headers: dict[str, str]) -> bool:
        text = server.client.get("/metrics", headers=headers).text
        return not re.search(r"^sseapp_streams_open\{.*\} [1-9]", text, re.MULTILINE)

    metrics = {"authorization": f"Bearer {add_token(guarded.tokens, 'prometheus', may=['metrics'])}"}
    wait_until(lambda: nothing_open(private, {}))
    wait_until(lambda: nothing_open(guarded.server, metrics))
