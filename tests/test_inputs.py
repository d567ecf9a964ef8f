"""What comes in, as programs and browsers send it: queries with lists, models of pydantic's, headers, cookies."""

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import date
from http import HTTPStatus
from typing import Any, Literal, TypedDict

import httpx
import msgspec
import pytest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from sseapp import GET, JSON, POST, Event, Request, Response, Run, Settings, SSEApp
from ssecore.testing import Transport, assert_stream, connect


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Search(msgspec.Struct, forbid_unknown_fields=True):
    tag: list[str] = []
    number: set[int] | None = None
    colour: Colour | None = None
    order: Literal["up", "down"] = "up"


@dataclass
class Paged:
    page: list[int]


class Typed(TypedDict, total=False):
    tag: list[str]


class Page(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = Field(10, le=100)
    since: date | None = None
    tags: list[str] = Field([], alias="tag")


class Line(BaseModel):
    item: str
    count: int = Field(ge=1)


class Order(BaseModel):
    model_config = ConfigDict(strict=True)  # a date is a string in JSON all the same
    lines: list[Line]
    due: date


class Envelope(msgspec.Struct):
    order: Order
    kinds: dict[str, Literal["a", "b"]] = {}


async def echo(request: Request) -> Response:
    return JSON({"query": request.query, "body": request.body})


def changed(app: SSEApp, **scope_of: Any) -> Any:
    """The app, behind a server that gives it such a scope."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, **scope_of}, receive, send)

    return call


async def ask(app: SSEApp, method: str, url: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as client:
        return await client.request(method, url, **options)


@pytest.mark.parametrize(
    ("kind", "query", "found"),
    [
        (Search, "tag=a&tag=b", {"tag": ["a", "b"], "number": None, "colour": None, "order": "up"}),
        (Search, "tag=a&number=1&number=1", {"tag": ["a"], "number": [1], "colour": None, "order": "up"}),
        (Paged, "page=1&page=2&other=3", {"page": [1, 2]}),
        (Typed, "tag=x", {"tag": ["x"]}),
        (dict[str, str], "a=b", {"a": "b"}),
        (Page, "size=7&since=2026-01-02&tag=a&tag=b", {"size": 7, "since": "2026-01-02", "tag": ["a", "b"]}),
        (Page, "lastEventId=1.2", {"size": 10, "since": None, "tag": []}),
    ],
)
async def test_a_query_is_decoded(kind: Any, query: str, found: Any) -> None:
    answer = await ask(SSEApp([GET("/", echo, query=kind)]), "GET", f"/?{query}")
    assert answer.json() == {"query": found, "body": None}


@pytest.mark.parametrize(
    ("kind", "query", "field", "detail"),
    [
        (Search, "order=up&order=down", "order", "is given twice"),
        (Search, "order=sideways", "order", "expected down or up"),
        (Search, "colour=green", "colour", "expected red or blue"),
        (Search, "taag=a", "taag", "contains unknown field"),
        (Page, "size=101", "size", "less than or equal to 100"),
        (Page, "size=x", "size", "valid integer"),
        (Page, "page=1", "page", "Extra inputs"),
        (Page, "tag=a&size=1&size=2", "size", "is given twice"),
    ],
)
async def test_a_query_that_does_not_fit_is_refused(kind: Any, query: str, field: str, detail: str) -> None:
    answer = await ask(SSEApp([GET("/", echo, query=kind)]), "GET", f"/?{query}")
    assert (answer.status_code, answer.json()["field"]) == (400, field)
    assert detail in answer.json()["detail"]


@pytest.mark.parametrize("kind", [Order, list[Order], Envelope])
async def test_a_body_is_a_model(kind: Any) -> None:
    order = {"lines": [{"item": "cup", "count": 2}], "due": "2026-01-02"}
    wrapped: Any = {Order: order, list[Order]: [order]}.get(kind, {"order": order, "kinds": {"k": "a"}})

    async def look(request: Request) -> Response:
        body = request.body
        found = body if kind is Order else body[0] if isinstance(body, list) else body.order
        return JSON([type(found).__name__, found.lines[0].count, found.due.year])

    answer = await ask(SSEApp([POST("/", look, body=kind)]), "POST", "/", json=wrapped)
    assert answer.json() == ["Order", 2, 2026]


@pytest.mark.parametrize(
    ("kind", "body", "field", "detail"),
    [
        (Order, {"lines": [{"item": "cup", "count": 0}], "due": "2026-01-02"}, "lines[0].count", "greater than"),
        (Order, {"lines": []}, "due", "Field required"),
        (Order, 7, None, "should be an object"),
        (Envelope, {"order": {"lines": [], "due": "soon"}}, "order.due", "valid date"),
        (Envelope, {"order": {"lines": [], "due": "2026-01-02"}, "kinds": {"x": "c"}}, "kinds[...]", "a or b"),
        (list[Order], [{"lines": []}], "[0].due", "Field required"),
    ],
)
async def test_a_body_that_is_no_such_model_is_refused(kind: Any, body: Any, field: str | None, detail: str) -> None:
    answer = await ask(SSEApp([POST("/", echo, body=kind)]), "POST", "/", json=body)
    assert (answer.status_code, answer.json().get("field")) == (400, field)
    assert detail in answer.json()["detail"]


async def test_the_same_key_with_another_list_is_another_request() -> None:
    async def work(request: Request) -> AsyncIterator[Event]:
        yield Event(request.query.tag)

    app = SSEApp([GET("/", work, query=Search, run=Run())], Settings(log="memory"))
    key = "a-key-of-22-characters-or-so"
    async with app.running():
        statuses = [(await ask(app, "GET", f"/?key={key}&{query}")).status_code for query in ("tag=a&tag=b", "tag=a")]
    assert statuses == [200, 422]


async def test_headers_are_found_in_any_case_and_cookies_by_name() -> None:
    async def look(request: Request) -> Response:
        headers = request.headers
        assert "X-API-Key" in headers and "x-api-key" in headers and "x-other" not in headers
        with pytest.raises(KeyError):
            headers["X-Other"]
        assert headers.get("X-Other", "none") == "none" and headers.get("x-other") is None
        assert {**headers}["x-api-key"] == "1"
        return JSON([headers["X-Api-Key"], headers.get("X-API-KEY"), request.cookies])

    cookies = b'a=1; b="two words"; a=3; broken; =; c=d=e'
    headers = [(b"host", b"localhost"), (b"X-API-KEY", b"1"), (b"cookie", cookies), (b"cookie", b"f=g")]
    async with connect(changed(SSEApp([GET("/", look)]), headers=headers)) as exchange:
        assert msgspec.json.decode(await exchange.body()) == [
            "1",
            "1",
            {"a": "1", "b": "two words", "": "", "c": "d=e", "f": "g"},
        ]


@pytest.mark.parametrize("name", [7, True, b"ann", {"name": "ann"}])
async def test_a_callers_name_must_be_a_string(name: Any, caplog: pytest.LogCaptureFixture) -> None:
    answer = await ask(SSEApp([GET("/", echo)], caller=lambda request: name), "GET", "/")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert f"caller= must return a string, the caller's name, or None, not {type(name).__name__}" in caplog.text


@pytest.mark.parametrize("name", [None, ""])
async def test_a_caller_without_a_name_is_refused(name: Any) -> None:
    assert (await ask(SSEApp([GET("/", echo)], caller=lambda request: name), "GET", "/")).status_code == 401


# Errors of a framework


class Teapot(Exception):
    status_code = 418
    detail: Any = ("short", "stout")


@pytest.mark.parametrize(
    ("error", "status", "code", "detail"),
    [
        (HTTPException(404, "no such cup"), 404, "not_found", "no such cup"),
        (HTTPException(401, headers={"WWW-Authenticate": "Basic"}), 401, "unauthorized", "Unauthorized"),
        (HTTPException(HTTPStatus.CONFLICT, "taken"), 409, "conflict", "taken"),
        (HTTPException(402), 402, "payment_required", "Payment Required"),
        (HTTPException(503, "later"), 503, "unavailable", "later"),
        (Teapot(), 418, "im_a_teapot", '["short","stout"]'),
    ],
)
@pytest.mark.parametrize("run", [None, Run()])
async def test_an_error_of_a_framework_keeps_its_status(
    error: Exception, status: int, code: str, detail: str, run: Run | None
) -> None:
    async def fail(request: Request) -> AsyncIterator[Event]:
        raise error
        yield

    app = SSEApp([GET("/", fail, run=run)], Settings(log="memory"))
    async with app.running():
        answer = await ask(app, "GET", "/")
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["detail"] == detail
    assert answer.headers.get("www-authenticate") == ("Basic" if status == 401 else None)


async def test_an_error_of_a_framework_in_the_middle_is_an_event() -> None:
    async def fail(request: Request) -> AsyncIterator[Event]:
        yield Event("1")
        raise HTTPException(409, "somebody else was faster")

    async with connect(SSEApp([GET("/", fail)]), "GET", "/") as stream:
        await assert_stream(stream, Event("1"), ("error", {"error": "somebody else was faster", "code": "conflict"}))


@pytest.mark.parametrize("status", [200, 399, 600, 499, "404", None, True])
async def test_what_only_looks_like_one_is_an_internal_error(status: Any) -> None:
    class Odd(Exception):
        status_code = status
        detail = "secret"

    async def fail(request: Request) -> Response:
        raise Odd

    answer = await ask(SSEApp([GET("/", fail)]), "GET", "/")
    assert answer.status_code == 500 and "secret" not in answer.text


async def test_what_cannot_be_encoded_is_told_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def odd(request: Request) -> AsyncIterator[Event]:
        yield Event("1")
        yield Event({"a": object()})

    async def whole(request: Request) -> Response:
        return JSON(object())

    app = SSEApp([GET("/", odd), GET("/whole", whole)])
    async with connect(app, "GET", "/") as stream:
        error = {"error": "data can't be encoded as JSON", "code": "encode_error"}
        await assert_stream(stream, Event("1"), ("error", error))
    assert "builtins.object has no JSON form" in caplog.text
    caplog.clear()
    assert (await ask(app, "GET", "/whole")).json()["detail"] == "data can't be encoded as JSON"
    assert "builtins.object has no JSON form" in caplog.text


@pytest.mark.filterwarnings("ignore:Using `httpx` with")
def test_starlettes_test_client_is_this_machine() -> None:
    from starlette.testclient import TestClient

    app = SSEApp([GET("/", echo)])
    assert TestClient(app).get("/").status_code == 200
    assert TestClient(app, base_url="http://example.org").get("/").status_code == 403
    assert TestClient(app).get("/", headers={"origin": "http://example.org"}).status_code == 403


async def test_a_host_named_testserver_is_no_machine_of_a_network() -> None:
    for host, peer in (("testserver", "127.0.0.1"), ("testserver", "10.0.0.1"), ("localhost", "10.0.0.1")):
        app = changed(SSEApp([GET("/", echo)]), headers=[(b"host", host.encode())], client=(peer, 1))
        async with connect(app) as exchange:
            await exchange.started.wait()
            assert exchange.status == 403
