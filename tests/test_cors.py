"""CORS, as the Fetch standard has it: what pages of other origins may ask and read."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount

from sseapp import GET, POST, ByteStream, Event, Request, Response, Settings, SSEApp
from ssecore.errors import SettingsError
from ssecore.http.tokens import add_token
from tests.clients import Answer, ask

LISTED = "https://listed.example"
OTHER = "https://other.example"


async def stream(request: Request) -> AsyncIterator[Event]:
    yield Event("x")


async def plain(request: Request) -> Response:
    return Response(b"x")


async def chunks(request: Request) -> ByteStream:
    async def bytes_() -> AsyncIterator[bytes]:
        yield b"x"

    return ByteStream(bytes_(), "text/csv")


async def fails(request: Request) -> Response:
    raise LookupError


def app_of(*origins: str, **settings: Any) -> SSEApp:
    routes = [GET("/stream", stream), GET("/plain", plain), GET("/chunks", chunks), GET("/fails", fails)]
    return SSEApp([*routes, POST("/post", plain)], Settings(log="memory", cors_origins=origins or None, **settings))


def cors(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


#: One of each way in which an answer begins, errors included.
TARGETS = ["/stream", "/plain", "/chunks", "/fails", "/nothing", "/stream?last_event_id=end"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_listed_page_may_read_every_answer(target: str, method: str) -> None:
    answer = await ask(app_of(LISTED), target, method, headers={"origin": LISTED})
    assert answer.headers["access-control-allow-origin"] == LISTED
    assert answer.headers["access-control-allow-credentials"] == "true"
    exposed = answer.headers["access-control-expose-headers"].split(", ")
    assert {"run-id", "location", "content-location", "retry-after", "content-disposition", "etag"} <= set(exposed)
    assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize("target", TARGETS)
async def test_an_answer_says_that_it_depends_on_the_origin_even_without_one(target: str) -> None:
    answer = await ask(app_of(LISTED), target)
    assert (answer.headers["vary"], cors(answer)) == ("Origin", {})


@pytest.mark.parametrize(
    "origin", [OTHER, "null", "https://listed.example.evil.example", "http://listed.example", LISTED + ":444", "*"]
)
async def test_another_page_may_read_nothing(origin: str) -> None:
    assert cors(await ask(app_of(LISTED, auth="off"), "/plain", headers={"origin": origin})) == {}


async def test_without_origins_nothing_is_said() -> None:
    answer = await ask(app_of(auth="off"), "/plain", headers={"origin": OTHER})
    assert cors(answer) == {} and "vary" not in answer.headers


async def test_any_origin_goes_without_credentials() -> None:
    app = app_of("*", LISTED, auth="off")
    answer = await ask(app, "/plain", headers={"origin": OTHER})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    named = await ask(app, "/plain", headers={"origin": LISTED})
    assert named.headers["access-control-allow-origin"] == LISTED
    assert named.headers["access-control-allow-credentials"] == "true"


async def preflight(app: SSEApp, origin: str, **headers: str) -> Answer:
    headers = {"origin": origin, "access-control-request-method": "POST"} | headers
    return await ask(app, "/post", "OPTIONS", headers=headers)


async def test_a_preflight_is_answered_without_credentials(tmp_path: Path) -> None:
    add_token(tmp_path / "tokens", "ann")
    app = app_of(LISTED, tokens_file=tmp_path / "tokens")
    wanted = "authorization, content-type, idempotency-key"
    answer = await preflight(app, LISTED, **{"access-control-request-headers": wanted})
    assert (answer.status, answer.body) == (204, b"")
    assert cors(answer) == {
        "access-control-allow-origin": LISTED,
        "access-control-allow-credentials": "true",
        "access-control-allow-methods": "POST",
        "access-control-allow-headers": wanted,
        "access-control-max-age": "7200",
        "access-control-expose-headers": answer.headers["access-control-expose-headers"],
    }
    assert "content-length" not in answer.headers


async def test_a_preflight_of_another_page_is_refused() -> None:
    for app in (app_of(LISTED, auth="off"), app_of(auth="off")):
        answer = await preflight(app, OTHER)
        assert answer.status == 403 and cors(answer) == {}
        assert "Settings(cors_origins=…)" in answer.json["detail"]


async def test_options_that_are_no_preflight_are_a_method_like_any_other() -> None:
    assert (await ask(app_of(LISTED), "/post", "OPTIONS")).problem == (405, "method_not_allowed")


@pytest.mark.parametrize(
    "text",
    [
        "listed.example",
        "https://listed.example/",
        "https://listed.example/a",
        "https://Listed.example",
        "a b",
        "https://a.example,",
    ],
)
def test_what_is_no_origin_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match=r"SSEAPP_CORS_ORIGINS.*https://example\.com"):
        Settings.from_env({"SSEAPP_CORS_ORIGINS": text})


def test_origins_stand_with_commas_between() -> None:
    settings = Settings.from_env({"SSEAPP_CORS_ORIGINS": "https://a.example, http://localhost:3000"})
    assert settings.cors_origins == ("https://a.example", "http://localhost:3000")


async def test_the_cors_of_a_host_is_the_hosts() -> None:
    """Its middleware answers preflights and adds the headers, `caller=` says who it is. Ours adds nothing."""
    streams = SSEApp([POST("/post", plain)], caller=lambda request: request.cookies.get("user"))
    host: Any = Starlette(
        routes=[Mount("/s", streams)],
        middleware=[Middleware(CORSMiddleware, allow_origins=[LISTED], allow_credentials=True, allow_methods=["POST"])],
    )
    headers = {"origin": LISTED, "sec-fetch-site": "cross-site", "cookie": "user=ann"}
    answer = await ask(host, "/s/post", "POST", headers=headers)
    assert answer.status == 200
    assert cors(answer)["access-control-allow-origin"] == LISTED
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x-key"}
    assert (await ask(host, "/s/post", "OPTIONS", headers={"origin": OTHER, **asked})).status == 400
    # Who names origins to us as well has both.
    strict = SSEApp([POST("/post", plain)], Settings(cors_origins=(LISTED,)), caller=lambda request: "ann")
    assert (await ask(strict, "/post", "POST", headers={"origin": OTHER})).status == 403
    assert (await ask(strict, "/post", "POST", headers={"origin": LISTED})).status == 200
