"""The cookie that a page changes its token for, since an `EventSource` can send no header."""

from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import pytest

from sseapp import GET, JSON, Request, Response, Settings, SSEApp
from ssecore.http.tokens import add_token, revoke_tokens, session_of
from ssecore.testing import connect
from tests.clients import Answer, ask
from tests.serving import serve


async def me(request: Request) -> Response:
    return JSON({"caller": request.caller})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def token(path: Path) -> str:
    return add_token(path, "ann")


@pytest.fixture
def app(path: Path, token: str) -> SSEApp:
    return SSEApp([GET("/me", me)], Settings(log="memory", tokens_file=path))


async def log_in(app: SSEApp, token: str, **headers: str) -> Answer:
    given = {"host": "localhost:8000", "authorization": f"Bearer {token}"}
    return await ask(app, "/session", "POST", headers=given | headers)


def cookie_of(answer: Answer) -> tuple[str, Any]:
    """`name=value`, as the browser sends it back, and the attributes."""
    (morsel,) = SimpleCookie(answer.headers["set-cookie"]).values()
    return f"{morsel.key}={morsel.value}", morsel


async def test_a_token_is_changed_for_a_cookie(app: SSEApp, token: str) -> None:
    answer = await log_in(app, token)
    assert (answer.status, answer.json) == (200, {"caller": "ann", "expires": None})
    assert answer.headers["cache-control"] == "no-store"
    cookie, attributes = cookie_of(answer)
    assert (attributes["httponly"], attributes["samesite"], attributes["path"]) == (True, "Strict", "/")
    assert (attributes["secure"], attributes["max-age"], attributes["domain"]) == ("", "", "")
    assert token.partition(".")[2] not in cookie, "the token can't be had from it"
    assert (await ask(app, "/me", headers={"cookie": cookie})).json == {"caller": "ann"}
    assert (await ask(app, "/me", headers={"cookie": f"a=b; {cookie}; c=d"})).json == {"caller": "ann"}


async def test_a_cookie_is_no_token_and_a_token_no_cookie(app: SSEApp, token: str) -> None:
    for headers in ({"authorization": f"Bearer {session_of(token)}"}, {"cookie": f"sseapp_session={token}"}):
        assert (await ask(app, "/me", headers=headers)).status == 401


async def test_a_cookie_dies_with_its_token(app: SSEApp, path: Path, token: str) -> None:
    cookie, _ = cookie_of(await log_in(app, token))
    revoke_tokens(path, "ann")
    assert (await ask(app, "/me", headers={"cookie": cookie})).status == 401


async def test_it_outlives_a_restart_and_holds_on_every_replica(app: SSEApp, path: Path, token: str) -> None:
    cookie, _ = cookie_of(await log_in(app, token))
    other = SSEApp([GET("/me", me)], Settings(log="memory", tokens_file=path))
    assert (await ask(other, "/me", headers={"cookie": cookie})).status == 200


@pytest.mark.parametrize(
    ("headers", "secure"),
    [
        ({}, False),
        ({"origin": "https://testserver", "host": "testserver"}, True),
        ({"x-forwarded-proto": "https"}, True),
        ({"x-forwarded-proto": "https", "host": "app.example"}, True),
    ],
)
async def test_over_https_it_goes_over_https_only(
    headers: dict[str, str], secure: bool, app: SSEApp, token: str
) -> None:
    _, attributes = cookie_of(await log_in(app, token, **headers))
    assert bool(attributes["secure"]) == secure


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "app.example"},
        {"host": "192.168.0.1:8000", "origin": "http://192.168.0.1:8000"},
        {"host": "app.example", "x-forwarded-proto": "http"},
        {"host": "[::ffff:127.0.0.1]:8000"},
        {"host": "0.0.0.0:8000"},
    ],
    ids=str,
)
async def test_without_https_there_is_no_cookie_but_on_loopback(
    headers: dict[str, str], app: SSEApp, token: str
) -> None:
    """A page of another port of the host is the same site: the browser would send the cookie along."""
    answer = await log_in(app, token, **headers)
    assert answer.problem == (403, "https_required")
    assert "set-cookie" not in answer.headers
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "app.localhost"):
        assert (await log_in(app, token, host=host)).status == 200


async def test_with_a_cookie_a_browser_says_which_page_asks(app: SSEApp, token: str) -> None:
    cookie, _ = cookie_of(await log_in(app, token))
    browser = {"cookie": cookie, "host": "localhost:8000", "user-agent": "Mozilla/5.0 (X11; Linux x86_64)"}
    for method in ("GET", "HEAD"):
        assert (await ask(app, "/me", method, headers=browser)).status == 403
        assert (await ask(app, "/me", method, headers=browser | {"sec-fetch-site": "same-origin"})).status == 200
        assert (await ask(app, "/me", method, headers=browser | {"origin": "http://localhost:8000"})).status == 200
        assert (await ask(app, "/me", method, headers=browser | {"origin": "http://localhost:9000"})).status == 403
        assert (await ask(app, "/me", method, headers={"cookie": cookie})).status == 200, "a program"


async def test_under_a_mount_path_it_is_for_that_path_only(app: SSEApp, token: str) -> None:
    headers = {"host": "localhost", "authorization": f"Bearer {token}"}
    async with connect(app, "POST", "/session", headers=headers, root_path="/stream") as exchange:
        await exchange.ended.wait()
    assert "; Path=/stream;" in exchange.headers["set-cookie"]


async def test_leaving_takes_the_cookie_away_whatever_it_is_worth(app: SSEApp) -> None:
    for headers in ({}, {"cookie": "sseapp_session=x"}):
        answer = await ask(app, "/session", "DELETE", headers=headers)
        assert answer.status == 204
        cookie, attributes = cookie_of(answer)
        assert (cookie, attributes["max-age"], attributes["path"]) == ("sseapp_session=", "0", "/")


async def test_nobody_logs_in_without_a_token(app: SSEApp, token: str) -> None:
    assert (await ask(app, "/session", "POST")).status == 401
    assert (await log_in(app, "wrong.token")).status == 401
    cookie, _ = cookie_of(await log_in(app, token))
    assert (await ask(app, "/session", "POST", headers={"cookie": cookie})).problem == (400, "bad_request")


async def test_a_page_of_another_origin_can_neither_use_nor_make_one(app: SSEApp, token: str) -> None:
    cookie, _ = cookie_of(await log_in(app, token))
    for site in ("cross-site", "same-site"):  # the neighbour under the same domain gets even a strict cookie sent
        assert (await ask(app, "/me", headers={"cookie": cookie, "sec-fetch-site": site})).status == 403
    assert (await log_in(app, token, **{"sec-fetch-site": "cross-site"})).status == 403


async def test_a_second_cookie_of_the_name_is_not_chosen_from(app: SSEApp, token: str) -> None:
    mine, _ = cookie_of(await log_in(app, token))
    for cookies in (f"{mine}; sseapp_session=other", f"sseapp_session=other; {mine}"):
        answer = await ask(app, "/me", headers={"cookie": cookies})
        assert answer.status == 401 and "several" in answer.json["detail"]
    assert (await ask(app, "/me", headers={"cookie": f"{mine}; {mine}"})).status == 200


async def test_a_wrong_token_is_not_made_good_by_a_right_cookie(app: SSEApp, token: str) -> None:
    cookie, _ = cookie_of(await log_in(app, token))
    answer = await ask(app, "/me", headers={"cookie": cookie, "authorization": "Bearer wrong"})
    assert answer.status == 401


async def test_without_tokens_there_is_nothing_to_log_in_to() -> None:
    for app in (SSEApp([], Settings(log="memory")), SSEApp([], Settings(log="memory"), caller=lambda _: "ann")):
        assert (await ask(app, "/session", "POST")).status == 404


def test_a_served_page_logs_in_and_reads_its_own_feed(tmp_path: Path) -> None:
    """The whole way over a socket, with a client that keeps cookies as a browser does."""
    token = add_token(tmp_path / "tokens", "ann", may=["publish:users/*"])
    with serve(tmp_path / "data", env={"SSEAPP_TOKENS_FILE": str(tmp_path / "tokens")}) as server:
        client = server.client
        assert client.get("/users/ann/stream").status_code == 401
        assert client.post("/session", headers={"authorization": f"Bearer {token}"}).status_code == 200
        with client.stream("GET", "/users/ann/stream") as response:
            assert "connected" in next(response.iter_text())
        assert client.get("/users/ben/stream").status_code == 403
        assert client.post("/users/ben/messages", json={"hello": "ben"}).status_code == 202
        assert client.get("/metrics").status_code == 403
        assert client.delete("/session").status_code == 204
        assert client.get("/users/ann/stream").status_code == 401
    assert token not in server.log() and session_of(token) not in server.log()
