"""The front door: from a request to an answer, or to the problem that says why not. In-process, no sockets."""

import json
import logging
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
import msgspec
import pytest
from msgspec import Meta

from sseapp import (
    BODIES,
    BODIES_PER_CALLER,
    GET,
    JSON,
    POST,
    UPLOADS,
    UPLOADS_PER_CALLER,
    ByteStream,
    Event,
    Response,
    Run,
    Settings,
    SSEApp,
    Upload,
    create_app,
)
from ssecore import errors
from ssecore.errors import BadRequest, NotFound, SettingsError, SSEAppError, Unavailable
from ssecore.http.guard import MAX_HEADER_LINES
from ssecore.http.request import (
    BODY_TIMEOUT_S,
    MAX_QUERY_FIELDS,
    MAX_UNREAD_BYTES,
    MIN_BODY_BYTES_PER_S,
    SPOOL_BYTES,
    Request,
)
from ssecore.testing import Transport, connect
from tests.house import virtual_time


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apps with the settings' defaults keep their log in ./var: not in the one of a service that runs from here."""
    monkeypatch.chdir(tmp_path)


JSON_TYPE = {"content-type": "application/json"}
CSV_TYPE = {"content-type": "text/csv"}
EVENT_SOURCE = {"accept": "text/event-stream", "cache-control": "no-cache", "user-agent": "library/1.0"}

Message = MutableMapping[str, Any]
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        assert self.status == 200, self.body
        return json.loads(self.body)

    def problem(self, status: int, code: str, field: str | None = None) -> str:
        """It is this problem and has nothing else in it, but a 5xx its reference. Its detail."""
        problem = json.loads(self.body)
        detail = problem.pop("detail")
        if status >= 500 and "(reference " not in detail:
            assert re.fullmatch("[0-9a-f]{12}", problem.pop("reference"))
        wanted = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "code": code}
        assert problem == wanted | ({"field": field} if field else {})
        assert self.status == status
        assert self.headers["content-type"] == "application/problem+json"
        assert self.headers["content-length"] == str(len(self.body))
        assert isinstance(detail, str)
        assert detail
        return detail


async def ask(app: ASGIApp, method: str, target: str, **options: Any) -> Answer:
    """One request and its whole answer. `options` as of `ssecore.testing.connect`."""
    with anyio.fail_after(60):
        async with connect(app, method, target, **options) as exchange:
            body = await exchange.body()
            return Answer(exchange.status, exchange.headers, body)


class Wire:
    """The server's side of one request, by hand: it gives these messages, and then is silent."""

    def __init__(self, *messages: Message) -> None:
        self.messages = messages
        self.received = 0
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if self.received == len(self.messages):
            await anyio.sleep_forever()
        self.received += 1
        return self.messages[self.received - 1]

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self, app: ASGIApp, method: str, path: str, headers: Mapping[str, str]) -> None:
        raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": raw_headers}
        await app(scope, self.receive, self.send)

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        headers: list[tuple[bytes, bytes]] = self.sent[0]["headers"]
        return headers

    @property
    def answer(self) -> Answer:
        start, *parts = self.sent
        assert start["type"] == "http.response.start"
        assert [part.get("more_body", False) for part in parts] == [True] * (len(parts) - 1) + [False]
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], headers, b"".join(part.get("body", b"") for part in parts))


def part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


LEFT: Message = {"type": "http.disconnect"}


class Recorder:
    """Handlers that keep the requests they were called with."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def unary(self, request: Request, **params: Any) -> Response:
        self.requests.append(request)
        return JSON({"query": request.query, "body": request.body, "params": params})

    async def stream(self, request: Request, **params: Any) -> AsyncIterator[Event]:
        self.requests.append(request)
        yield Event({"query": request.query, "body": request.body, "params": params})


@pytest.fixture
def calls() -> Recorder:
    return Recorder()


# The query


class Query(msgspec.Struct):
    word: str = "x"
    count: Annotated[int, Meta(ge=0, le=10)] = 1
    pause: Annotated[float, Meta(ge=0, le=3600)] = 0.5
    loud: bool = False
    limit: int | None = None


class Required(msgspec.Struct):
    prompt: Annotated[str, Meta(min_length=1, max_length=5)]


def query_app(calls: Recorder) -> SSEApp:
    return SSEApp(
        [
            GET("/q", calls.unary, query=Query),
            GET("/required", calls.unary, query=Required),
            GET("/stream", calls.stream, query=Required),
        ]
    )


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        (
            "word=a&count=3&pause=1.5&loud=true&limit=7",
            {"word": "a", "count": 3, "pause": 1.5, "loud": True, "limit": 7},
        ),
        ("word=a%20b%26c%3D%C3%A4+d", {"word": "a b&c=ä d"}),
        ("word=", {"word": ""}),
        ("word=7", {"word": "7"}),
        ("word=%0A%00", {"word": "\n\0"}),
        ("count=0&pause=0&loud=0", {"count": 0, "pause": 0, "loud": False}),
        ("count=10&pause=3600&loud=1", {"count": 10, "pause": 3600, "loud": True}),
        ("pause=1e-3", {"pause": 0.001}),
        ("limit=null", {"limit": None}),
        ("unknown=1", {}),
    ],
)
async def test_a_query_comes_in_its_types(text: str, values: dict[str, Any], calls: Recorder) -> None:
    answer = await ask(query_app(calls), "GET", f"/q?{text}")
    assert answer.json()["query"] == msgspec.to_builtins(Query(**values))
    assert isinstance(calls.requests[0].query, Query)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("count=-1", "count"),
        ("count=11", "count"),
        ("count=1.5", "count"),
        ("count=", "count"),
        ("count", "count"),
        ("count=x", "count"),
        ("count=1_0", "count"),
        ("count=0x1", "count"),
        ("count=%D9%A3", "count"),
        ("count=99999999999999999999999", "count"),
        (f"count={'9' * 10_000}", "count"),
        ("pause=nan", "pause"),
        ("pause=NaN", "pause"),
        ("pause=inf", "pause"),
        ("pause=-inf", "pause"),
        ("pause=Infinity", "pause"),
        ("pause=1e999", "pause"),
        ("pause=-0.1", "pause"),
        ("pause=3600.1", "pause"),
        ("loud=yes", "loud"),
        ("loud=2", "loud"),
        ("limit=x", "limit"),
        ("count=1&count=1", "count"),
        ("word=a&count=1&word=b", "word"),
        ("unknown=1&unknown=2", "unknown"),
    ],
)
async def test_a_wrong_query_names_the_field_and_starts_nothing(text: str, field: str, calls: Recorder) -> None:
    answer = await ask(query_app(calls), "GET", f"/q?{text}")
    assert field in answer.problem(400, "bad_request", field)
    assert len(answer.body) < 500
    assert calls.requests == []


@pytest.mark.parametrize("path", ["/required", "/stream"])
@pytest.mark.parametrize("text", ["", "?prompt=", "?prompt=longer", "?Prompt=a"])
async def test_a_missing_or_empty_parameter_is_named(path: str, text: str, calls: Recorder) -> None:
    answer = await ask(query_app(calls), "GET", path + text, headers=EVENT_SOURCE)
    assert "prompt" in answer.problem(400, "bad_request", "prompt")
    assert calls.requests == []


@pytest.mark.parametrize("text", ["word=%FF", "%FF=a", "word=%ED%A0%80", "word=%C3"])
async def test_a_query_that_is_not_utf8_is_refused(text: str, calls: Recorder) -> None:
    answer = await ask(query_app(calls), "GET", f"/q?{text}")
    assert "utf-8" in answer.problem(400, "bad_request")
    assert calls.requests == []


async def test_a_query_with_bytes_that_are_not_ascii_is_refused(calls: Recorder) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await query_app(calls)({**scope, "query_string": b"word=\xff"}, receive, send)

    (await ask(app, "GET", "/q")).problem(400, "bad_request")


async def test_a_query_may_have_so_many_fields_and_no_more(calls: Recorder) -> None:
    fields = [f"name{n}=1" for n in range(MAX_QUERY_FIELDS + 1)]
    assert (await ask(query_app(calls), "GET", f"/q?{'&'.join(fields[:-1])}")).status == 200
    (await ask(query_app(calls), "GET", f"/q?{'&'.join(fields)}")).problem(400, "bad_request")
    assert len(calls.requests) == 1


async def test_a_long_name_is_not_repeated_in_full(calls: Recorder) -> None:
    name = "x" * 5000
    answer = await ask(query_app(calls), "GET", f"/q?{name}=1&{name}=2")
    assert answer.status == 400
    assert len(answer.body) < 400


# A body of JSON


class Item(msgspec.Struct):
    title: str
    tags: list[int] = []


class Order(msgspec.Struct):
    item: Item
    note: str | None = None


def body_app(calls: Recorder, settings: Settings | None = None) -> SSEApp:
    routes = [
        POST("/items", calls.unary, body=list[Item]),
        POST("/order", calls.unary, body=Order),
        POST("/any", calls.unary, body=Any),
        POST("/numbers", calls.unary, body=dict[int, str]),
        POST("/stream", calls.stream, body=list[Item]),
    ]
    return SSEApp(routes, settings)


async def test_a_body_comes_in_its_types(calls: Recorder) -> None:
    answer = await ask(body_app(calls), "POST", "/items", headers=JSON_TYPE, body=b'[{"title": "\xc3\xa4", "x": 1}]')
    assert answer.json()["body"] == [{"title": "ä", "tags": []}]
    assert calls.requests[0].body == [Item("ä")]


@pytest.mark.parametrize("size", [1, 2, 7])
async def test_a_body_may_come_in_many_parts(size: int, calls: Recorder) -> None:
    body = json.dumps([{"title": "ä😀", "tags": [*range(50)]}], ensure_ascii=False).encode()
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    answer = await ask(body_app(calls), "POST", "/items", headers=JSON_TYPE, body=[b"", *parts, b""])
    assert answer.json()["body"] == [{"title": "ä😀", "tags": [*range(50)]}]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/items", b'[{"title": 1}]', "[0].title"),
        ("/items", b'[{"title": "a"}, {"title": null}]', "[1].title"),
        ("/items", b'[{"title": "a", "tags": [1, 2, "3"]}]', "[0].tags[2]"),
        ("/items", b'[{"title": "a", "tags": [1.5]}]', "[0].tags[0]"),
        ("/items", b'[{"title": "a", "tags": {}}]', "[0].tags"),
        ("/items", b'["a"]', "[0]"),
        ("/items", b"{}", None),
        ("/items", b"null", None),
        ("/order", b"{}", "item"),
        ("/order", b'{"item": {"title": true}}', "item.title"),
        ("/order", b'{"item": {"title": "a"}, "note": 5}', "note"),
        ("/order", b"[]", None),
    ],
)
async def test_a_wrong_body_names_the_member_and_starts_nothing(
    path: str, body: bytes, field: str | None, calls: Recorder
) -> None:
    answer = await ask(body_app(calls), "POST", path, headers=JSON_TYPE, body=body)
    assert (field or "Expected") in answer.problem(400, "bad_request", field)
    assert calls.requests == []


@pytest.mark.parametrize(
    ("path", "body", "field"), [("/items", b"[{}]", "[0].title"), ("/order", b'{"item": {}}', "item.title")]
)
async def test_a_missing_member_is_named_with_the_way_to_it(
    path: str, body: bytes, field: str, calls: Recorder
) -> None:
    answer = await ask(body_app(calls), "POST", path, headers=JSON_TYPE, body=body)
    answer.problem(400, "bad_request", field)


async def test_a_wrong_key_is_told_without_the_decoders_own_signs(calls: Recorder) -> None:
    answer = await ask(body_app(calls), "POST", "/numbers", headers=JSON_TYPE, body=b'{"a": "b"}')
    assert answer.status == 400
    assert "`" not in json.loads(answer.body).get("field", "")


@pytest.mark.parametrize("path", ["/any", "/items", "/stream"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"[",
        b"nope",
        b"{'a': 1}",
        b"NaN",
        b"[1,]",
        b"[] []",
        b"\xff",
        b"[]\xef\xbb\xbf",
        b'[{"title": "\xff"}]',
        b'[{"title": "\xed\xa0\x80"}]',
        b'[{"title": "\\ud800"}]',
        b'[{"title": "a\nb"}]',
        '[{"title": "a"}]'.encode("utf-16"),
    ],
)
async def test_a_body_that_is_not_json_in_utf8_is_refused(path: str, body: bytes, calls: Recorder) -> None:
    answer = await ask(body_app(calls), "POST", path, headers=JSON_TYPE, body=body)
    assert answer.status == 400
    if path == "/any":  # elsewhere the first thing that is wrong may be a type
        assert "not JSON" in answer.problem(400, "bad_request")
    assert calls.requests == []


@pytest.mark.parametrize("text", ["a\ud83d", "\ude42b", "\ud83d\ud83d\ude42"])
async def test_a_body_with_half_of_a_character_is_refused_by_that_name(text: str, calls: Recorder) -> None:
    body = json.dumps([{"title": text}]).encode()
    answer = await ask(body_app(calls), "POST", "/any", headers=JSON_TYPE, body=body)
    assert "half of a surrogate pair" in answer.problem(400, "bad_request")
    answer = await ask(body_app(calls), "POST", "/any", headers=JSON_TYPE, body=body[:-1])
    assert "half" not in answer.problem(400, "bad_request")
    assert calls.requests == []


@pytest.mark.parametrize("unit", [b"[", b'{"a":', b"[{", b'[{"a":['])
async def test_a_body_of_a_hundred_thousand_levels_is_refused(unit: bytes, calls: Recorder) -> None:
    (await ask(body_app(calls), "POST", "/any", headers=JSON_TYPE, body=unit * 100_000)).problem(400, "bad_request")
    assert (await ask(body_app(calls), "POST", "/items", headers=JSON_TYPE, body=unit * 100_000)).status == 400
    assert calls.requests == []


@pytest.mark.parametrize(
    "media_type",
    ["application/json", "application/json; charset=utf-8", "Application/JSON;charset=UTF-8", "application/json ;x"],
)
async def test_a_media_type_may_have_parameters(media_type: str, calls: Recorder) -> None:
    answer = await ask(body_app(calls), "POST", "/items", headers={"content-type": media_type}, body=b"[]")
    assert answer.json()["body"] == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json, text/plain"},
    ],
)
async def test_another_media_type_is_refused_before_the_body_is_read(headers: dict[str, str], calls: Recorder) -> None:
    wire = Wire(part(b"[]", more=False))
    await wire.run(body_app(calls), "POST", "/items", headers)
    assert "application/json" in wire.answer.problem(415, "unsupported_media_type")
    assert wire.received == 0
    assert calls.requests == []


# The body's bounds


async def test_a_body_up_to_the_limit_is_taken(calls: Recorder) -> None:
    app = body_app(calls, Settings(max_body_bytes=20))
    assert (await ask(app, "POST", "/any", headers={**JSON_TYPE, "content-length": "20"}, body=b"1" * 20)).status == 200
    assert (await ask(app, "POST", "/any", headers=JSON_TYPE, body=[b"1" * 10, b"2" * 10])).status == 200


@pytest.mark.parametrize("length", ["21", "1000000", "9" * 19])
async def test_a_body_that_declares_too_much_is_refused_unread(length: str, calls: Recorder) -> None:
    wire = Wire(part(b"1"))
    await wire.run(
        body_app(calls, Settings(max_body_bytes=20)), "POST", "/any", {**JSON_TYPE, "content-length": length}
    )
    assert "20 bytes" in wire.answer.problem(413, "too_large")
    assert wire.received == 0
    assert calls.requests == []


@pytest.mark.parametrize("length", ["", "5", "x", "-1", "²", "9" * 400])
async def test_a_body_that_becomes_too_large_is_read_no_further(length: str, calls: Recorder) -> None:
    wire = Wire(part(b"1" * 10), part(b"1" * 10), part(b"1"), part(b"1"), part(b"", more=False))
    headers = {**JSON_TYPE, "content-length": length} if length else JSON_TYPE
    await wire.run(body_app(calls, Settings(max_body_bytes=20)), "POST", "/any", headers)
    wire.answer.problem(413, "too_large")
    assert wire.received == 3
    assert calls.requests == []


@pytest.mark.parametrize("path", ["/any", "/stream"])
@pytest.mark.parametrize("parts", [[], [part(b"[")], [part(b"["), part(b"1")], [part(b"[]")]])
async def test_a_client_that_leaves_within_its_body_is_dropped_quietly(
    path: str, parts: list[Message], calls: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    wire = Wire(*parts, LEFT)
    with anyio.fail_after(20):
        await wire.run(body_app(calls), "POST", path, JSON_TYPE)
    assert wire.sent == []
    assert calls.requests == []
    assert caplog.messages == []


@virtual_time
@pytest.mark.parametrize("parts", [[], [part(b"[")]])
async def test_a_body_that_stops_coming_is_given_up(parts: list[Message], calls: Recorder) -> None:
    wire = Wire(*parts)
    begin = anyio.current_time()
    with anyio.fail_after(10 * BODY_TIMEOUT_S):
        await wire.run(body_app(calls), "POST", "/items", JSON_TYPE)
    wire.answer.problem(408, "request_timeout")
    assert anyio.current_time() - begin == BODY_TIMEOUT_S
    assert calls.requests == []


class SlowWire(Wire):
    """Each part comes so long after the one before."""

    def __init__(self, pauses_s: Iterable[float], *messages: Message) -> None:
        super().__init__(*messages)
        self._pauses_s = iter(pauses_s)

    async def receive(self) -> Message:
        await anyio.sleep(next(self._pauses_s, 0))
        return await super().receive()


@virtual_time
@pytest.mark.parametrize("pause_s", [1, BODY_TIMEOUT_S - 1])
async def test_a_body_that_comes_slowly_is_waited_for(pause_s: float, calls: Recorder) -> None:
    parts = [part(b" " * int(MIN_BODY_BYTES_PER_S * pause_s)) for _ in range(50)]
    wire = SlowWire([0, *[pause_s] * 50], part(b"[]"), *parts, part(b"", more=False))
    await wire.run(body_app(calls), "POST", "/any", JSON_TYPE)
    assert wire.answer.json()["body"] == []
    assert anyio.current_time() >= 50 * pause_s


@virtual_time
@pytest.mark.parametrize("parts", [[b"["] * 1000, [b" " * 500_000, *[b" "] * 1000]], ids=["all", "its end"])
async def test_a_body_that_trickles_is_given_up(parts: list[bytes], calls: Recorder) -> None:
    """However much of it came in time: what was fast at first keeps its place for no longer."""
    wire = SlowWire([0, *[20.0] * 1000], *map(part, parts))
    begin = anyio.current_time()
    with anyio.fail_after(10 * BODY_TIMEOUT_S):
        await wire.run(body_app(calls), "POST", "/any", JSON_TYPE)
    wire.answer.problem(408, "request_timeout")
    assert BODY_TIMEOUT_S <= anyio.current_time() - begin < BODY_TIMEOUT_S + 1
    assert calls.requests == []


@pytest.mark.parametrize("path", ["/stream", "/unread"])
async def test_a_body_that_no_handler_reads_is_not_read_for_ever(path: str, calls: Recorder) -> None:
    async def endless(request: Request) -> AsyncIterator[Event]:
        yield Event("first")
        await anyio.sleep_forever()

    app = SSEApp([GET("/unread", endless), POST("/stream", endless)])
    piece = part(b"x" * 65536)
    wire = Wire(*[piece] * (2 * MAX_UNREAD_BYTES // 65536))
    with anyio.fail_after(10):
        await wire.run(app, "GET" if path == "/unread" else "POST", path, {})
    assert wire.received == MAX_UNREAD_BYTES // 65536 + 1
    assert not app._streams


# What bodies may hold in all


@asynccontextmanager
async def sending(
    app: ASGIApp, path: str, *parts: bytes, user: str = "", content_type: str = "application/json"
) -> AsyncIterator[Answer | None]:
    """A request whose body stands still after these parts, while the block runs; with its answer if it has one."""
    wire = Wire(*map(part, parts))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wire.run, app, "POST", path, {"content-type": content_type, "x-user": user})
        await anyio.wait_all_tasks_blocked()
        yield wire.answer if wire.sent else None
        tasks.cancel_scope.cancel()


#: The largest body that this app takes.
LARGEST = b'"%b"' % (b"x" * 98)


def holding_app(calls: Recorder, *, named: bool, **settings: Any) -> SSEApp:
    routes = [
        POST("/any", calls.unary, body=Any),
        POST("/stream", calls.stream, body=Any),
        POST("/upload", calls.unary, body=Upload("text/csv")),
    ]
    caller = (lambda request: request.headers["x-user"] or "somebody") if named else None
    return SSEApp(routes, Settings(max_body_bytes=100, **settings), caller=caller)


@pytest.mark.parametrize("named", [True, False])
async def test_bodies_that_are_not_complete_hold_a_bounded_part_of_the_memory(named: bool, calls: Recorder) -> None:
    app = holding_app(calls, named=named)
    limit = BODIES_PER_CALLER if named else BODIES
    async with AsyncExitStack() as held:
        for _ in range(limit):
            assert await held.enter_async_context(sending(app, "/any", b"1" * 50, b"1" * 50, user="ann")) is None
        answer = await ask(app, "POST", "/any", headers={**JSON_TYPE, "x-user": "ann"}, body=b"1")
        answer.problem(*((429, "too_many_requests") if named else (503, "unavailable")))
        assert 1 <= int(answer.headers["retry-after"]) <= 5
        other = await ask(app, "POST", "/any", headers={**JSON_TYPE, "x-user": "ben"}, body=b"1")
        assert other.status == (200 if named else 503)
    # Not a few of them for ever: each gives back what it held.
    for _ in range(2 * limit):
        assert (await ask(app, "POST", "/any", headers=JSON_TYPE | {"x-user": "ann"}, body=LARGEST)).status == 200


async def test_small_bodies_are_counted_by_their_size(calls: Recorder) -> None:
    app = holding_app(calls, named=True)
    async with AsyncExitStack() as held:
        for _ in range(5 * BODIES_PER_CALLER):
            assert await held.enter_async_context(sending(app, "/any", b"[", user="ann")) is None


@pytest.mark.parametrize("named", [True, False])
async def test_uploads_that_are_not_complete_are_so_many(named: bool, calls: Recorder) -> None:
    app = holding_app(calls, named=named)
    limit = UPLOADS_PER_CALLER if named else UPLOADS
    async with AsyncExitStack() as held:
        for _ in range(limit):
            assert await held.enter_async_context(sending(app, "/upload", user="ann", content_type="text/csv")) is None
        async with sending(app, "/upload", user="ann", content_type="text/csv") as answer:
            assert answer is not None
            answer.problem(*((429, "too_many_requests") if named else (503, "unavailable")))
        async with sending(app, "/upload", user="ben", content_type="text/csv") as other:
            assert (other is None) == named
        async with sending(app, "/any", b"[", user="ann") as body:
            assert body is None
    async with sending(app, "/upload", user="ann", content_type="text/csv") as again:
        assert again is None


async def test_a_streams_place_is_taken_before_its_body_is_read(calls: Recorder) -> None:
    app = holding_app(calls, named=True, max_streams_per_caller=2)
    async with sending(app, "/stream", b"[", user="ann") as one, sending(app, "/stream", user="ann") as two:
        assert one is two is None
        wire = Wire(part(b"[]", more=False))
        await wire.run(app, "POST", "/stream", {**JSON_TYPE, "x-user": "ann"})
        wire.answer.problem(429, "too_many_requests")
        assert wire.received == 0
        assert (await ask(app, "POST", "/stream", headers={**JSON_TYPE, "x-user": "ben"}, body=b"1")).status == 200
    assert (await ask(app, "POST", "/stream", headers={**JSON_TYPE, "x-user": "ann"}, body=b"1")).status == 200
    wrong = await ask(app, "POST", "/stream", headers={**JSON_TYPE, "x-user": "ann"}, body=b"[")
    wrong.problem(400, "bad_request")


async def test_a_runs_body_is_counted_until_the_run_ends() -> None:
    go_on = anyio.Event()

    async def work(request: Request) -> AsyncIterator[Event]:
        yield Event("first")
        await go_on.wait()

    app = SSEApp([POST("/run", work, body=Any, run=Run())], Settings(log="memory", max_body_bytes=100))
    headers = {**JSON_TYPE, "prefer": "respond-async"}
    async with app.running():
        for _ in range(BODIES):
            assert (await ask(app, "POST", "/run", headers=headers, body=LARGEST)).status == 202
        (await ask(app, "POST", "/run", headers=headers, body=b"1")).problem(503, "unavailable")
        go_on.set()
        await anyio.wait_all_tasks_blocked()
        assert (await ask(app, "POST", "/run", headers=headers, body=LARGEST)).status == 202


# The head


@pytest.mark.parametrize("names", [["x"], [f"x-{number}" for number in range(10)]], ids=["one name", "ten names"])
async def test_a_head_has_so_many_lines_at_most(names: list[str], calls: Recorder) -> None:
    app = SSEApp([GET("/unary", calls.unary)])

    async def asked(lines: int) -> Wire:
        wire = Wire()
        headers = [(names[number % len(names)].encode(), b"%d" % number) for number in range(lines)]
        scope = {"type": "http", "method": "GET", "path": "/unary", "query_string": b"", "headers": headers}
        await app(scope, wire.receive, wire.send)
        return wire

    assert (await asked(MAX_HEADER_LINES)).answer.status == 200
    read = ", ".join(calls.requests[0].headers[name] for name in names).split(", ")
    assert sorted(map(int, read)) == list(range(MAX_HEADER_LINES)), "none of them is lost"
    assert str(MAX_HEADER_LINES) in (await asked(MAX_HEADER_LINES + 1)).answer.problem(431, "headers_too_large")


async def test_a_head_is_decoded_once() -> None:
    class Counted(list[tuple[bytes, bytes]]):
        read = 0

        def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
            self.read += 1
            return super().__iter__()

    async def unary(request: Request) -> Response:
        return JSON([request.headers["x"] for _ in range(10)])

    headers, wire = Counted([(b"x", b"y"), (b"accept", b"text/event-stream")]), Wire()
    scope = {"type": "http", "method": "GET", "path": "/unary", "query_string": b"", "headers": headers}
    await SSEApp([GET("/unary", unary)])(scope, wire.receive, wire.send)
    assert wire.answer.json() == ["y"] * 10
    assert headers.read <= 2, "once to be decoded, once for its size"


# An upload


class Uploads:
    """Handlers that look at the file, and keep it."""

    def __init__(self) -> None:
        self.file: Any = None
        self.on_disk: list[bool] = []
        self.content: list[bytes] = []

    def _look(self, request: Request) -> None:
        self.file = request.body
        assert not self.file.closed
        assert self.file.tell() == 0
        self.on_disk.append(self.file._rolled)
        self.content.append(self.file.read())

    async def unary(self, request: Request) -> Response:
        self._look(request)
        return JSON(len(self.content[0]))

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        self._look(request)
        yield Event("first")
        self.file.seek(0)
        self.content.append(self.file.read())
        yield Event("second")

    async def failing(self, request: Request) -> Response:
        self._look(request)
        raise BadRequest("no")

    async def endless(self, request: Request) -> AsyncIterator[Event]:
        self._look(request)
        yield Event("first")
        await anyio.sleep_forever()


@pytest.fixture
def uploads() -> Uploads:
    return Uploads()


def upload_app(uploads: Uploads, settings: Settings | None = None) -> SSEApp:
    routes = [
        POST("/unary", uploads.unary, body=Upload("text/csv")),
        POST("/stream", uploads.stream, body=Upload("text/csv")),
        POST("/failing", uploads.failing, body=Upload("text/csv")),
        POST("/endless", uploads.endless, body=Upload("text/csv")),
        POST("/small", uploads.unary, body=Upload("text/csv", max_bytes=10)),
    ]
    return SSEApp(routes, settings)


@pytest.mark.parametrize(
    ("parts", "on_disk"),
    [
        ([b""], False),
        ([b"a,b\n", b"", b"\xff\0\r"], False),
        ([b"x" * SPOOL_BYTES], False),
        ([b"x" * SPOOL_BYTES, b"y"], True),
        ([b"x" * (SPOOL_BYTES + 1)], True),
        ([b"0123456789abcdef" * 4096] * 40, True),
    ],
)
async def test_an_upload_is_a_file_at_its_start_and_gone_after_the_request(
    parts: list[bytes], on_disk: bool, uploads: Uploads
) -> None:
    answer = await ask(upload_app(uploads), "POST", "/unary", headers=CSV_TYPE, body=parts)
    assert answer.json() == sum(map(len, parts))
    assert uploads.content == [b"".join(parts)]
    assert uploads.on_disk == [on_disk]
    assert uploads.file.closed


async def test_an_upload_lasts_as_long_as_the_stream(uploads: Uploads) -> None:
    answer = await ask(upload_app(uploads), "POST", "/stream", headers=CSV_TYPE, body=b"a,b")
    assert answer.body == b"retry: 2000\ndata: first\n\ndata: second\n\n"
    assert uploads.content == [b"a,b", b"a,b"]
    assert uploads.file.closed


async def test_an_upload_is_gone_when_its_handler_fails(uploads: Uploads) -> None:
    (await ask(upload_app(uploads), "POST", "/failing", headers=CSV_TYPE, body=b"a,b")).problem(400, "bad_request")
    assert uploads.file.closed


async def test_an_upload_is_gone_when_its_client_is(uploads: Uploads) -> None:
    with anyio.fail_after(10):
        async with connect(upload_app(uploads), "POST", "/endless", headers=CSV_TYPE, body=b"a,b") as exchange:
            assert await exchange.chunk() == b"retry: 2000\ndata: first\n\n"
            assert not uploads.file.closed
    assert uploads.file.closed


async def test_an_upload_has_the_limit_of_its_route_or_of_the_settings(uploads: Uploads) -> None:
    app = upload_app(uploads, Settings(max_import_bytes=20, max_body_bytes=5))
    assert (await ask(app, "POST", "/small", headers=CSV_TYPE, body=b"x" * 10)).status == 200
    (await ask(app, "POST", "/small", headers=CSV_TYPE, body=b"x" * 11)).problem(413, "too_large")
    assert (await ask(app, "POST", "/unary", headers=CSV_TYPE, body=b"x" * 20)).status == 200
    (await ask(app, "POST", "/unary", headers=CSV_TYPE, body=b"x" * 21)).problem(413, "too_large")
    (await ask(app, "POST", "/unary", headers={**CSV_TYPE, "content-length": "21"})).problem(413, "too_large")


async def test_an_upload_has_the_media_type_of_its_route(uploads: Uploads) -> None:
    answer = await ask(upload_app(uploads), "POST", "/unary", headers=JSON_TYPE, body=b"[]")
    assert "text/csv" in answer.problem(415, "unsupported_media_type")
    assert uploads.file is None


# Errors


def raising(error: Exception) -> SSEApp:
    async def unary(request: Request) -> Response:
        raise error

    async def stream(request: Request) -> AsyncIterator[Event]:
        raise error
        yield Event("never")

    return SSEApp([GET("/unary", unary), GET("/stream", stream), POST("/unary", unary)])


OURS = [
    kind
    for name in errors.__all__
    if issubclass(kind := getattr(errors, name), SSEAppError) and kind is not errors.ClientGone
]


@pytest.mark.parametrize("path", ["/unary", "/stream"])
@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
async def test_an_error_of_ours_is_a_problem_with_its_own_text(path: str, kind: type[SSEAppError]) -> None:
    error = kind("the text", field="name", headers={"Retry-After": "3"})
    answer = await ask(raising(error), "GET", path)
    assert answer.problem(kind.status, kind.code, "name") == "the text"
    assert answer.headers["retry-after"] == "3"


@pytest.mark.parametrize("path", ["/unary", "/stream"])
@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
async def test_a_5xx_is_logged_with_the_reference_that_its_client_gets_and_a_4xx_for_debugging(
    path: str, kind: type[SSEAppError], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "sseapp"):
        answer = await ask(raising(kind("the\ntext")), "GET", f"{path}?a=hidden")
    (record,) = [record for record in caplog.records if "answered" in record.getMessage()]
    assert f"GET {path} answered {kind.status} {kind.code}: 'the\\ntext'" in record.getMessage(), "in one line"
    assert "hidden" not in caplog.text
    if kind.status >= 500:
        assert json.loads(answer.body)["reference"] in record.getMessage()
    expected = logging.DEBUG if kind.status < 500 else logging.ERROR if kind.status == 500 else logging.WARNING
    assert record.levelno == expected


async def test_an_error_without_a_text_says_its_title() -> None:
    assert (await ask(raising(NotFound()), "GET", "/unary")).problem(404, "not_found") == "Not Found"


async def test_an_error_may_have_a_code_of_its_own() -> None:
    answer = await ask(raising(SSEAppError("text", code="my_word")), "GET", "/unary")
    assert answer.problem(500, "my_word") == "text"


@pytest.mark.parametrize("path", ["/unary", "/stream"])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("the secret"),
        KeyError("the secret"),
        OSError(2, "the secret"),
        TimeoutError("the secret"),
        StopIteration("the secret"),
        StopAsyncIteration("the secret"),
        ExceptionGroup("the secret", [ValueError("the secret")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_other_exception_is_a_reference_to_the_log(
    path: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await ask(raising(error), "GET", path)
    text, _, reference = answer.problem(500, "internal_error").rstrip(")").partition(" (reference ")
    assert text == "internal error"
    assert len(reference) >= 12
    assert b"secret" not in answer.body
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert reference in record.getMessage()
    assert "the secret" in caplog.text
    assert "Traceback" in caplog.text


async def test_each_failure_has_a_reference_of_its_own() -> None:
    app = raising(ValueError())
    assert (await ask(app, "GET", "/unary")).body != (await ask(app, "GET", "/unary")).body


@pytest.mark.parametrize(
    "given", [None, "text", b"bytes", {"a": 1}, 204, Event("x")], ids=lambda given: type(given).__name__
)
async def test_a_handler_that_returns_no_response_is_an_internal_error(
    given: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Request) -> Any:
        return given

    answer = await ask(SSEApp([GET("/a", handler)]), "GET", "/a")
    assert answer.problem(500, "internal_error").startswith("internal error (reference ")
    assert f"/a: the handler returned {type(given).__name__}, not a Response" in caplog.text


async def test_what_json_cannot_hold_is_a_problem() -> None:
    async def handler(request: Request) -> Response:
        return JSON({"a": object()})

    assert "JSON" in (await ask(SSEApp([GET("/a", handler)]), "GET", "/a")).problem(500, "encode_error", "data")


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "BREW"])
async def test_an_unknown_path_is_a_problem(method: str) -> None:
    answer = await ask(SSEApp([]), method, "/nothing")
    if method == "HEAD":
        assert (answer.status, answer.body) == (404, b"")
    else:
        answer.problem(404, "not_found")


async def test_another_method_is_a_problem_with_those_that_there_are(calls: Recorder) -> None:
    app = SSEApp([GET("/a", calls.unary), POST("/a", calls.stream)])
    answer = await ask(app, "DELETE", "/a")
    assert "GET, HEAD, POST" in answer.problem(405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, POST"
    assert calls.requests == []


# Headers of an answer


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/headers", "/media_type", "/chunks", "/error"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("location", "/x\r\nset-cookie: a=b"),
        ("location", "a\0b"),
        ("location", "\U0001f600"),
        ("a\r\nb", "x"),
    ],
)
async def test_headers_that_could_forge_another_are_a_problem(
    name: str, value: str, path: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def headers(request: Request) -> Response:
        return Response(b"body", headers={name: value})

    async def media_type(request: Request) -> Response:
        return Response(b"body", media_type=f"text/plain; {name}={value}")

    async def chunks(request: Request) -> Any:
        return ByteStream(_no_chunks(), "text/csv", {name: value})

    async def error(request: Request) -> Response:
        raise NotFound(headers={name: value})

    routes = [GET(f"/{handler.__name__}", handler) for handler in (headers, media_type, chunks, error)]
    wire = Wire(part(b"", more=False))
    await wire.run(SSEApp(routes), method, path, {})
    assert wire.answer.status == 500
    assert wire.answer.headers.keys() == {"content-type", "content-length"}
    if method == "GET":
        wire.answer.problem(500, "internal_error")
    assert "Traceback" in caplog.text


async def _no_chunks() -> AsyncIterator[bytes]:
    return
    yield b""


async def test_the_names_of_headers_go_out_in_lower_case() -> None:
    async def handler(request: Request) -> Response:
        return Response(b"body", 201, "text/plain", {"X-Name": "é"})

    wire = Wire(part(b"", more=False))
    await wire.run(SSEApp([GET("/a", handler)]), "GET", "/a", {})
    assert sorted(wire.raw_headers) == [
        (b"content-length", b"4"),
        (b"content-type", b"text/plain"),
        (b"x-name", b"\xe9"),
    ]


# HEAD


async def test_head_of_a_whole_answer_has_the_headers_of_get() -> None:
    async def handler(request: Request) -> Response:
        return Response(b"body", 203, "text/plain", {"etag": '"1"'})

    app = SSEApp([GET("/a", handler)])
    get, head = await ask(app, "GET", "/a"), await ask(app, "HEAD", "/a")
    assert (head.status, head.headers) == (get.status, get.headers)
    assert (get.body, head.body) == (b"body", b"")


async def test_head_of_a_stream_has_the_headers_of_get_and_starts_nothing(calls: Recorder) -> None:
    app = SSEApp([GET("/a", calls.stream)])
    get, head = Wire(part(b"", more=False)), Wire(part(b"", more=False))
    await get.run(app, "GET", "/a", {})
    assert len(calls.requests) == 1
    await head.run(app, "HEAD", "/a", {})
    assert len(calls.requests) == 1
    assert sorted(head.raw_headers) == sorted(get.raw_headers)
    assert (head.answer.status, head.answer.body) == (200, b"")


@pytest.mark.parametrize("status", [200, 206])
@pytest.mark.parametrize("headers", [{}, {"content-length": "3", "etag": '"1"'}])
async def test_head_of_a_stream_of_bytes_has_the_status_and_the_headers_of_get(
    headers: dict[str, str], status: int
) -> None:
    begun: list[bool] = []

    async def chunks() -> AsyncIterator[bytes]:
        begun.append(True)
        yield b"abc"

    async def handler(request: Request) -> Any:
        return ByteStream(chunks(), "text/csv", headers, status)

    app = SSEApp([GET("/a", handler)])
    get, head = Wire(part(b"", more=False)), Wire(part(b"", more=False))
    await get.run(app, "GET", "/a", {})
    await head.run(app, "HEAD", "/a", {})
    assert (get.answer.status, get.answer.body) == (status, b"abc")
    assert sorted(head.raw_headers) == sorted(get.raw_headers)
    assert (head.answer.status, head.answer.body) == (status, b"")
    assert begun == [True]


# A full house


async def endless(request: Request) -> AsyncIterator[Event]:
    yield Event("first")
    await anyio.sleep_forever()


async def test_one_stream_too_many_is_refused_and_softly_for_a_browser() -> None:
    async def unary(request: Request) -> Response:
        return JSON("unary")

    app = SSEApp([GET("/a", endless), GET("/unary", unary)], Settings(max_streams=1))
    with anyio.fail_after(10):
        async with connect(app, target="/a") as exchange:
            await exchange.chunk()
            answer = await ask(app, "GET", "/a")
            assert "too many" in answer.problem(503, Unavailable.code)
            assert int(answer.headers["retry-after"]) > 0
            for headers in ({"accept": "text/event-stream"}, {"cache-control": "no-cache"}):
                assert (await ask(app, "GET", "/a", headers=headers)).status == 503
            soft = await ask(app, "GET", "/a", headers=EVENT_SOURCE)
            assert (soft.status, soft.headers["content-type"]) == (200, "text/event-stream")
            assert soft.body.startswith(b"retry: ")
            assert soft.body.count(b"\n") == 1
            assert (await ask(app, "GET", "/unary")).json() == "unary"
        async with connect(app, target="/a") as exchange:
            assert await exchange.chunk() == b"retry: 2000\ndata: first\n\n"


async def test_a_run_without_a_place_for_its_reader_is_not_started(calls: Recorder) -> None:
    app = SSEApp([POST("/a", calls.stream, run=Run()), GET("/endless", endless)], Settings(max_streams=1, log="memory"))
    async with app.running(), connect(app, target="/endless") as exchange:
        await exchange.chunk()
        assert (await ask(app, "POST", "/a")).status == 503
        assert not calls.requests and not app.runs.at_work


async def test_a_reader_that_is_not_sent_is_closed() -> None:
    app = SSEApp([GET("/a", endless, run=Run())], Settings(max_streams=1, log="memory"))
    async with app.running(), connect(app, target="/a") as exchange:
        await exchange.chunk()
        run = exchange.headers["run-id"]
        for method, status in (("HEAD", 200), ("GET", 503)):
            assert (await ask(app, method, f"/runs/{run}/events")).status == status
            assert app.runs.tails.subscribers(run) == 1


# Other scopes


async def test_a_websocket_is_closed_before_its_handshake() -> None:
    wire = Wire({"type": "websocket.connect"})
    await SSEApp([])({"type": "websocket", "path": "/", "headers": []}, wire.receive, wire.send)
    (message,) = wire.sent
    assert message["type"] == "websocket.close"
    assert wire.received == 1


async def test_an_unknown_scope_is_refused_by_name() -> None:
    wire = Wire()
    with pytest.raises(ValueError, match="'carrier-pigeon'"):
        await SSEApp([])({"type": "carrier-pigeon"}, wire.receive, wire.send)
    assert wire.sent == []


# The app's own life


class Resource:
    """A lifespan that can fail."""

    def __init__(self, *, at_start: Exception | None = None, at_end: Exception | None = None) -> None:
        self.at_start, self.at_end = at_start, at_end
        self.log: list[str] = []

    @asynccontextmanager
    async def __call__(self, app: SSEApp) -> AsyncIterator[str]:
        self.log.append("start")
        if self.at_start is not None:
            raise self.at_start
        try:
            yield "the state"
        finally:
            self.log.append("end")
            if self.at_end is not None:
                raise self.at_end


STARTUP: Message = {"type": "lifespan.startup"}
SHUTDOWN: Message = {"type": "lifespan.shutdown"}


async def state(request: Request) -> Response:
    return JSON(request.state)


async def test_the_server_is_told_that_the_app_is_up_and_down() -> None:
    resource = Resource()
    wire = Wire(STARTUP, SHUTDOWN)
    await SSEApp([], lifespan=resource)({"type": "lifespan"}, wire.receive, wire.send)
    assert wire.sent == [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]
    assert resource.log == ["start", "end"]


@pytest.mark.parametrize("error", [SettingsError("no such folder"), OSError("disk full")])
async def test_a_failure_to_start_is_reported_to_the_server(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    resource = Resource(at_start=error)
    app = SSEApp([GET("/state", state)], lifespan=resource)
    wire = Wire(STARTUP)
    await app({"type": "lifespan"}, wire.receive, wire.send)
    assert wire.sent == [{"type": "lifespan.startup.failed", "message": str(error)}]
    assert str(error) in caplog.text
    # A text of our own says all; what nobody thought of comes with its traceback.
    assert ("Traceback" in caplog.text) == (not isinstance(error, SSEAppError))

    resource.at_start = None
    async with app.running():
        assert (await ask(app, "GET", "/state")).json() == "the state"


async def test_a_failure_to_stop_is_reported_to_the_server(caplog: pytest.LogCaptureFixture) -> None:
    wire = Wire(STARTUP, SHUTDOWN)
    await SSEApp([], lifespan=Resource(at_end=OSError("disk full")))({"type": "lifespan"}, wire.receive, wire.send)
    assert wire.sent == [
        {"type": "lifespan.startup.complete"},
        {"type": "lifespan.shutdown.failed", "message": "disk full"},
    ]
    assert "disk full" in caplog.text


async def test_handlers_find_what_the_lifespan_made() -> None:
    app = SSEApp([GET("/state", state)], lifespan=Resource())
    assert (await ask(app, "GET", "/state")).json() is None
    async with app.running():
        assert (await ask(app, "GET", "/state")).json() == "the state"
    assert app.state is None


async def test_an_app_runs_once_at_a_time() -> None:
    app = SSEApp([], lifespan=Resource())
    async with app.running():
        with pytest.raises(RuntimeError, match="running already"):
            async with app.running():
                pytest.fail("it ran twice")
        assert app.state == "the state"
    async with app.running():
        assert app.state == "the state"


async def test_an_app_that_is_still_starting_is_not_started_again() -> None:
    starting, go_on = anyio.Event(), anyio.Event()
    outcomes: list[str] = []

    @asynccontextmanager
    async def slow(app: SSEApp) -> AsyncIterator[None]:
        starting.set()
        await go_on.wait()
        yield

    async def start(app: SSEApp) -> None:
        try:
            async with app.running():
                outcomes.append("ran")
        except RuntimeError as error:
            outcomes.append(str(error))

    app = SSEApp([], lifespan=slow)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start, app)
            await starting.wait()
            tasks.start_soon(start, app)
            await anyio.wait_all_tasks_blocked()
            go_on.set()
    assert outcomes == ["the app is running already", "ran"]


async def test_an_exception_of_the_host_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="of the host"):
        async with SSEApp([], lifespan=Resource()).running():
            raise KeyError("of the host")


async def test_streams_end_with_a_farewell_when_the_app_stops() -> None:
    ended: list[str] = []

    async def endless(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("first")
            await anyio.sleep_forever()
        finally:
            ended.append(request.end_reason)

    app = SSEApp([GET("/a", endless)])
    with anyio.fail_after(10):
        async with app.running():
            async with connect(app, target="/a") as exchange:
                assert await exchange.chunk() == b"retry: 2000\ndata: first\n\n"
                await app.drain(0)
                rest = await exchange.body()
                assert exchange.complete
                answer = await ask(app, "GET", "/a")
                assert "stop" in answer.problem(503, Unavailable.code)
    assert rest.startswith(b"retry: ")
    assert rest.count(b"\n") == 1
    assert ended == ["drain"]


async def test_the_service_without_its_handlers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "handlers", None)
    with pytest.raises(SettingsError, match="handlers are not importable"):
        create_app()


# Mounted in another app


def mount(app: ASGIApp, prefix: str, *, strip: bool) -> ASGIApp:
    """What a host does: the standard keeps `path` whole beside `root_path`; old hosts take the prefix off."""

    async def host(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"  # hosts keep the lifespan to themselves
        root = scope.get("root_path", "")
        below = scope["path"].removeprefix(root)
        assert below.startswith(prefix)
        path = below.removeprefix(prefix) if strip else scope["path"]
        await app({**scope, "root_path": root + prefix, "path": path}, receive, send)

    return host


@pytest.mark.parametrize("strip", [False, True], ids=["path whole", "prefix taken off"])
@pytest.mark.parametrize("prefixes", [["/api"], ["/api", "/v1"], ["/ä b"]], ids=lambda prefixes: "".join(prefixes))
async def test_a_mounted_app_streams_and_answers_below_its_mount_point(prefixes: list[str], strip: bool) -> None:
    async def numbers(request: Request, count: int) -> AsyncIterator[Event]:
        for n in range(count):
            yield Event(n)
        yield Event({"root": request.root_path, "path": request.path})

    async def home(request: Request) -> Response:
        return JSON(request.path)

    async def failing(request: Request) -> Response:
        raise ValueError("the secret")

    app: ASGIApp = SSEApp([GET("/", home), GET("/numbers/{count:int}", numbers), GET("/failing", failing)])
    for prefix in reversed(prefixes):
        app = mount(app, prefix, strip=strip)
    root = "".join(prefixes)

    with anyio.fail_after(10):
        async with httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as client:
            stream = await client.get(f"{root}/numbers/2")
            where = json.dumps({"root": root, "path": "/numbers/2"}, ensure_ascii=False, separators=(",", ":"))
            assert stream.text == f"retry: 2000\ndata: 0\n\ndata: 1\n\ndata: {where}\nid: end\n\n"
            assert (await client.get(f"{root}/")).json() == "/"
            assert (await client.get(root)).json() == "/"
            assert (await client.head(f"{root}/numbers/2")).status_code == 200
            assert (await client.get(f"{root}/numbers/2", headers={"last-event-id": "end"})).status_code == 204
            assert (await client.get(f"{root}/nothing")).json()["code"] == "not_found"
            assert (await client.get(f"{root}/numbers/x")).json()["field"] == "count"
            assert (await client.delete(f"{root}/numbers/2")).headers["allow"] == "GET, HEAD"
            assert (await client.get(f"{root}/failing")).json()["code"] == "internal_error"


@pytest.mark.parametrize("root", ["", "/", "/api", "/api/"])
async def test_the_root_path_is_taken_off_only_where_it_is_one(root: str, calls: Recorder) -> None:
    app = SSEApp([GET("/a", calls.unary), GET("/apix", calls.unary), GET("/api/a", calls.unary)])

    async def path(path: str) -> str | None:
        async def host(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "root_path": root, "path": path}, receive, send)

        answer = await ask(host, "GET", "/")
        return calls.requests[-1].path if answer.status == 200 else None

    assert await path("/a") == "/a"
    assert await path("/apix") == "/apix"
    assert await path("/api/a") == ("/a" if root.startswith("/api") else "/api/a")


@virtual_time
async def test_an_app_that_nobody_started_keeps_its_streams_alive() -> None:
    async def slow(request: Request) -> AsyncIterator[Event]:
        yield Event("first")
        await anyio.sleep(40)
        yield Event("second")

    answer = await ask(mount(SSEApp([GET("/slow", slow)]), "/api", strip=False), "GET", "/api/slow")
    assert answer.body == b"retry: 2000\ndata: first\n\n:\n:\ndata: second\nid: end\n\n"
