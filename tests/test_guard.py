"""Who may enter: tokens, the cookie, an embedding program's callers, and a service without credentials."""

import logging
import os
import stat
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseapp import GET, JSON, POST, Event, Request, Response, Run, Settings, SSEApp, Subscription
from ssecore.dialects import DATA_ONLY
from ssecore.errors import Forbidden, SettingsError, Unauthorized
from ssecore.http.guard import Caller
from ssecore.http.tokens import (
    MAX_RIGHT_CHARS,
    MAX_RIGHTS,
    Tokens,
    add_token,
    parse_expiry,
    read_tokens,
    revoke_tokens,
    session_of,
    set_rights,
)
from ssecore.testing import connect
from tests.clients import ask, listening
from tests.serving import call_sseapp, serve, wait_until


async def me(request: Request) -> Response:
    return JSON({"caller": request.caller})


async def ticks(request: Request) -> AsyncIterator[Event]:
    yield Event("tick")
    await anyio.sleep_forever()


async def named(request: Request, name: str) -> Response:
    return JSON({"name": name})


async def feed(request: Request) -> Subscription:
    return Subscription("feed", Event("init"))


ROUTES = [
    GET("/me", me),
    POST("/me", me),
    POST("/publish", me, publishes=True),
    GET("/open", me, open=True),
    GET("/ticks", ticks),
    GET("/data", ticks, dialect=DATA_ONLY),
    GET("/run", ticks, run=Run()),
    GET("/feed", feed),
    POST("/topics/{name}", named, body=Any, may="publish:topics/{name}"),
    GET("/topics/{name}", named, may="subscribe:topics/{name}"),
    GET("/figures", me, may="metrics"),
]


def app_of(caller: Caller | None = None, **settings: Any) -> SSEApp:
    return SSEApp(ROUTES, Settings(log="memory", **settings), caller=caller)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def caller_of(app: SSEApp, headers: dict[str, str]) -> Any:
    answer = await ask(app, "/me", headers=headers)
    assert answer.status == 200, answer.body
    return answer.json["caller"]


# Tokens


async def test_a_token_opens_the_door_under_its_name(path: Path) -> None:
    token = add_token(path, "ann")
    app = app_of(tokens_file=path)
    assert await caller_of(app, bearer(token)) == "ann"
    assert await caller_of(app, {"authorization": f"bearer  {token}"}) == "ann"


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer x", "Bearer .", "Basic YTpi", "{id}", "Bearer {id}.wrong"]
)
async def test_without_a_right_token_nothing_is_to_be_had(authorization: str | None, path: Path) -> None:
    token = add_token(path, "ann")
    headers = {}
    if authorization is not None:
        headers["authorization"] = authorization.replace("{id}", token.partition(".")[0])
    answer = await ask(app_of(tokens_file=path), "/ticks", headers=headers)
    assert answer.problem == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_the_secret_of_one_token_is_no_use_with_the_id_of_another(path: Path) -> None:
    ann, ben = add_token(path, "ann"), add_token(path, "ben")
    mixed = f"{ann.partition('.')[0]}.{ben.partition('.')[2]}"
    assert (await ask(app_of(tokens_file=path), "/me", headers=bearer(mixed))).status == 401


async def test_what_is_open_is_open_to_all(path: Path) -> None:
    app = app_of(tokens_file=path)
    assert (await ask(app, "/open")).json == {"caller": None}
    assert (await ask(app, "/nothing")).status == 404


@pytest.mark.parametrize("name", ["token", "access_token", "api_key", "q"])
async def test_a_token_in_a_url_is_refused_even_where_it_is_right(name: str, path: Path) -> None:
    token = add_token(path, "ann")
    for headers in ({}, bearer(token)):
        answer = await ask(app_of(tokens_file=path), f"/me?a=1&{name}={token}", headers=headers)
        assert answer.problem == (401, "unauthorized")
        assert "URL" in answer.json["detail"]


async def test_a_body_is_not_read_from_whom_nobody_knows(path: Path) -> None:
    app = SSEApp([POST("/any", me, body=Any)], Settings(log="memory", tokens_file=path))
    async with connect(
        app, "POST", "/any", headers={"content-type": "application/json"}, body=[b"1"] * 100
    ) as exchange:
        await exchange.ended.wait()
        assert exchange.status == 401
        assert len(exchange._to_app) == 100


async def test_a_token_is_known_and_revoked_without_a_restart(path: Path) -> None:
    app = app_of(tokens_file=path)
    for _ in range(3):
        token = add_token(path, "ann")
        assert await caller_of(app, bearer(token)) == "ann"
        revoke_tokens(path, "ann")
        assert (await ask(app, "/me", headers=bearer(token))).status == 401


async def test_a_token_expires(path: Path) -> None:
    token = add_token(path, "ann", datetime.now(UTC) - timedelta(seconds=1))
    assert (await ask(app_of(tokens_file=path), "/me", headers=bearer(token))).problem == (401, "token_expired")


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


async def test_a_broken_file_shuts_nobody_out_and_lets_nobody_in(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = add_token(path, "ann")
    app = app_of(tokens_file=path)
    append(path, "half an ed")
    assert await caller_of(app, bearer(token)) == "ann"
    assert "line 3" in caplog.text and "half an ed" not in caplog.text


def test_a_broken_file_is_refused_at_the_start(path: Path) -> None:
    path.write_text('{"id": 1}\n')
    with pytest.raises(SettingsError, match="line 1"):
        app_of(tokens_file=path)


def test_a_file_that_is_not_there_yet_holds_no_token_and_says_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app_of(tokens_file=path)
    assert "sseapp token add" in caplog.text


def test_the_file_holds_no_secret_and_is_for_its_owner_only(path: Path) -> None:
    token = add_token(path, "ann")
    text = path.read_text()
    assert token.partition(".")[2] not in text
    assert session_of(token).partition(".")[2] not in text
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert [name.name for name in path.parent.iterdir()] == ["tokens"], "nothing is left over"


def test_many_at_once_lose_no_token(path: Path) -> None:
    threads = [Thread(target=add_token, args=(path, f"caller{n}")) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry.name for entry in read_tokens(path)} == {f"caller{n}" for n in range(16)}


@pytest.mark.parametrize("name", ["", " ann", "a/b", "a\nb", "a\x00", "x" * 201])
def test_a_name_that_would_do_harm_is_refused(name: str, path: Path) -> None:
    with pytest.raises(SettingsError):
        add_token(path, name)
    assert not path.exists()


def test_an_expiry_is_a_time_from_now_or_a_date() -> None:
    now = datetime.now(UTC)
    assert timedelta(hours=11) < parse_expiry("12h") - now < timedelta(hours=13)
    assert parse_expiry("2999-12-31") == datetime(2999, 12, 31, tzinfo=UTC)
    assert parse_expiry("2999-12-31T01:00:00+01:00") == datetime(2999, 12, 31, tzinfo=UTC)
    for wrong in ("", "x", "12", "-1d", "9" * 9 + "d", "0001-01-01T00:00:00+23:59"):
        with pytest.raises(SettingsError, match="expected a time"):
            parse_expiry(wrong)


@pytest.mark.parametrize("text", ["2020-01-01", "2020-01-01T00:00:00+01:00", "0d", "0s", "000m"])
def test_a_token_that_would_be_dead_at_once_is_refused_in_words(text: str, path: Path) -> None:
    with pytest.raises(SettingsError, match="in the past"):
        parse_expiry(text)
    result = call_sseapp("token", "--tokens-file", str(path), "add", "ann", "--expires", text)
    assert (result.returncode, result.stdout) == (2, "")
    assert "in the past" in result.stderr
    assert not path.exists()


# While the file is being written


GRACE_S = 0.4


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssecore.http.tokens.GRACE_S", GRACE_S)
    monkeypatch.setattr("ssecore.http.tokens.REFRESH_S", 0.05)


def read(path: Path) -> bytes:
    return path.read_bytes()


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    """At the end of a line, so that what is left can be read."""
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


def replace_by_nothing(path: Path) -> None:
    """As an editor does: the old file is moved away, and a new one begins empty."""
    path.rename(path.with_name("tokens~"))
    path.touch()


ways_to_lose_a_line = pytest.mark.parametrize("lose", [delete, truncate, cut, replace_by_nothing])


@ways_to_lose_a_line
async def test_a_token_that_is_missing_for_a_moment_stays_valid_and_its_streams_open(
    lose: Callable[[Path], None], path: Path
) -> None:
    add_token(path, "first")
    token = add_token(path, "ann")
    content = read(path)
    app = app_of(tokens_file=path, heartbeat_s=0.05)
    async with app.running(), listening(app, "/ticks", headers=bearer(token)) as reading:
        await reading.event()
        with anyio.fail_after(10):
            for _ in range(2):
                lose(path)
                assert await caller_of(app, bearer(token)) == "ann"
                assert await reading.chunk() == b":\n"
                write(path, content)
                assert await caller_of(app, bearer(token)) == "ann"
                assert await reading.chunk() == b":\n"


@ways_to_lose_a_line
async def test_a_token_that_stays_missing_is_revoked_and_its_streams_end(
    lose: Callable[[Path], None], path: Path, short_grace: None, caplog: pytest.LogCaptureFixture
) -> None:
    add_token(path, "first")
    token = add_token(path, "ann")
    app = app_of(tokens_file=path, heartbeat_s=0.05)
    async with app.running(), listening(app, "/ticks", headers=bearer(token)) as reading:
        await reading.event()
        lose(path)
        with anyio.fail_after(10):
            *_, last = await reading.rest()
    assert "token_revoked" in last.data
    assert (await ask(app, "/me", headers=bearer(token))).status == 401
    assert sum("may be incomplete" in line for line in caplog.messages) == 1


async def test_a_broken_line_in_the_grace_keeps_the_tokens_until_it_is_mended(
    path: Path, short_grace: None, caplog: pytest.LogCaptureFixture
) -> None:
    token = add_token(path, "ann")
    content = read(path)
    app = app_of(tokens_file=path)
    truncate(path)
    assert await caller_of(app, bearer(token)) == "ann"
    write(path, content[:40])
    with anyio.fail_after(10):
        until = anyio.current_time() + 2 * GRACE_S
        while anyio.current_time() < until:
            assert await caller_of(app, bearer(token)) == "ann"
            await anyio.sleep(0.02)
    assert sum("line 1" in line for line in caplog.messages) == 1, "it is logged once, and not for each request"
    write(path, content)
    assert await caller_of(app, bearer(token)) == "ann"


async def test_a_deeply_nested_line_does_not_end_the_watch(
    path: Path, short_grace: None, caplog: pytest.LogCaptureFixture
) -> None:
    token = add_token(path, "ann")
    app = app_of(tokens_file=path, heartbeat_s=0.05)
    async with app.running(), listening(app, "/ticks", headers=bearer(token)) as reading:
        await reading.event()
        append(path, '{"x":' + "[" * 100_000 + "\n")
        with anyio.fail_after(10):
            while "line 3 is not a token" not in caplog.text:
                assert await reading.chunk() == b":\n"
            write(path, b"\n")
            *_, last = await reading.rest()
    assert "token_revoked" in last.data, "the watch goes on"


def test_a_service_whose_tokens_file_gets_a_deeply_nested_line_goes_on(path: Path) -> None:
    token = add_token(path, "ann")
    with serve(path.parent / "data", env={"SSEAPP_TOKENS_FILE": str(path)}) as server:
        append(path, '{"x":' + "[" * 100_000 + "\n")
        wait_until(lambda: "line 3 is not a token" in server.log())  # by the watch: no request has come
        assert server.client.get("/stream/hello?interval=0", headers=bearer(token)).status_code == 200
        assert "Traceback" not in server.log()


def test_a_deeply_nested_line_is_refused_at_the_start(path: Path) -> None:
    path.write_text('{"x":' + "[" * 100_000)
    with pytest.raises(SettingsError, match="line 1"):
        app_of(tokens_file=path)


async def test_a_time_without_a_zone_is_in_utc(path: Path) -> None:
    token = add_token(path, "ann", datetime.now(UTC) + timedelta(hours=1))
    line = msgspec.json.decode(read(path))
    for hours, status in ((1, 200), (-1, 401)):
        line["expires"] = (datetime.now(UTC) + timedelta(hours=hours)).isoformat()[:19]
        write(path, msgspec.json.encode(line))
        assert (await ask(app_of(tokens_file=path), "/me", headers=bearer(token))).status == status


@pytest.mark.parametrize(
    "change",
    [
        {"hash": "é" * 64},
        {"session": "short"},
        {"name": "a\nb"},
        {"expires": "soon"},
        {"may": "publish"},
        {"may": ["everything"]},
        {"may": ["publish"] * (MAX_RIGHTS + 1)},
    ],
    ids=str,
)
def test_a_line_that_would_fail_later_is_refused_at_the_start(change: dict[str, Any], path: Path) -> None:
    add_token(path, "ann")
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | change))
    with pytest.raises(SettingsError, match="line 1"):
        app_of(tokens_file=path)


ENTRY: dict[str, Any] = {
    "id": "0" * 16,
    "name": "ann",
    "hash": "0" * 64,
    "session": "0" * 64,
    "created": "2026-01-01T00:00:00Z",
    "expires": None,
    "may": [],
}
TEXTS = st.text(max_size=20) | st.sampled_from(["0" * 64, "publish:*", "0001-01-01T00:00:00+23:59", "9999-12-31T00:00"])
VALUES = st.none() | st.booleans() | st.integers() | TEXTS | st.lists(TEXTS, max_size=3)
LINES = st.binary(max_size=60) | st.dictionaries(st.sampled_from([*ENTRY, "x"]), VALUES, max_size=3).map(
    lambda change: msgspec.json.encode(ENTRY | change)
)


@given(lines=st.lists(LINES, max_size=4), right=TEXTS)
def test_whatever_stands_in_the_file_is_read_or_refused(
    lines: list[bytes], right: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "tokens"
    path.write_bytes(b"\n".join(lines))
    try:
        tokens = Tokens(path)
    except SettingsError:
        return
    for entry in read_tokens(path):
        with pytest.raises(Unauthorized):
            tokens.find(f"{entry.id}.wrong")
        tokens._known[entry.id].refusal()
        tokens._known[entry.id].may(right)


# What a token may


@pytest.mark.parametrize(
    ("may", "allowed"),
    [
        ((), set()),
        (("publish",), {"publish:topics/orders-1", "publish:topics/news"}),
        (("publish:topics/orders-*",), {"publish:topics/orders-1"}),
        (("publish:topics/orders-*", "publish:topics/news"), {"publish:topics/orders-1", "publish:topics/news"}),
        (("publish:topics/ORDERS-*", "publish:topics/orders-?", "publish:topics/[n]ews"), set()),
        (("publish:users/*",), set()),
        (("subscribe",), {"subscribe:topics/orders-1", "subscribe:topics/news"}),
        (("subscribe:topics/*s",), {"subscribe:topics/news"}),
        (
            ("subscribe:*", "publish:*/news"),
            {"subscribe:topics/orders-1", "subscribe:topics/news", "publish:topics/news"},
        ),
        (("metrics",), {"metrics"}),
        (("metrics", "subscribe:topics/news"), {"metrics", "subscribe:topics/news"}),
    ],
    ids=lambda rights: "+".join(sorted(rights)) or "none",
)
@pytest.mark.parametrize("shown", ["token", "cookie"])
async def test_a_token_may_what_its_rights_say_and_no_more(
    may: tuple[str, ...], allowed: set[str], shown: str, path: Path
) -> None:
    token = add_token(path, "ann", may=may)
    app = app_of(tokens_file=path)
    headers = bearer(token) if shown == "token" else {"cookie": f"sseapp_session={session_of(token)}"}
    headers["content-type"] = "application/json"
    found = set()
    for name in ("orders-1", "news"):
        for method, action in (("POST", "publish"), ("GET", "subscribe")):
            if (await ask(app, f"/topics/{name}", method, headers=headers, body=[b"1"])).status == 200:
                found.add(f"{action}:topics/{name}")
    if (await ask(app, "/figures", headers=headers)).status == 200:
        found.add("metrics")
    assert found == allowed
    assert await caller_of(app, headers) == "ann", "whatever its rights, it starts work"


async def test_what_a_token_lacks_is_named_and_how_to_get_it(path: Path) -> None:
    token = add_token(path, "it's ann", may=("subscribe",))
    answer = await ask(app_of(tokens_file=path), "/topics/two%20words", "POST", headers=bearer(token))
    assert answer.problem == (403, "insufficient_scope")
    assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="publish"'
    assert """sseapp token add 'it'"'"'s ann' --may 'publish:topics/two words'""" in answer.json["detail"]


async def test_a_long_or_hostile_name_of_a_topic_is_refused_like_any_other(path: Path) -> None:
    app = app_of(tokens_file=path)
    headers = bearer(add_token(path, "ann", may=("publish:topics/a*b*c",)))
    for name in ("a" * 50_000, "ab" * 20_000, "%0d%0aset-cookie:%20x=y", "%22,%20scope=%22metrics", "é%F0%9F%98%80"):
        with anyio.fail_after(5):
            answer = await ask(app, f"/topics/{name}", "POST", headers=headers)
        assert answer.problem == (403, "insufficient_scope")
        assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="publish"'
        assert "set-cookie" not in answer.headers
        assert len(answer.body) < 2000


async def test_a_body_is_not_read_from_a_token_that_may_not_send_it(path: Path) -> None:
    headers = {"content-type": "application/json", **bearer(add_token(path, "ann"))}
    async with connect(
        app_of(tokens_file=path), "POST", "/topics/news", headers=headers, body=[b"1"] * 100
    ) as exchange:
        await exchange.ended.wait()
        assert exchange.status == 403
        assert len(exchange._to_app) == 100


async def test_where_tokens_are_not_asked_for_no_right_is_needed() -> None:
    headers = {"content-type": "application/json"}
    for app in (app_of(), app_of(auth="off"), app_of(lambda request: "ann")):
        assert (await ask(app, "/topics/news", "POST", headers=headers, body=[b"1"])).status == 200
        assert (await ask(app, "/topics/news")).status == 200
        assert (await ask(app, "/figures")).status == 200


def without_rights(path: Path) -> None:
    """As if the file had been written before tokens had rights."""
    lines = [msgspec.json.decode(line) for line in path.read_bytes().split()]
    for line in lines:
        del line["may"]
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


async def test_an_old_file_works_as_it_did_and_says_how_to_change(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ann, figures = add_token(path, "ann"), add_token(path, "metrics")
    without_rights(path)
    new = add_token(path, "new")
    app = app_of(tokens_file=path)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "(2)" in warning and "sseapp token set NAME --may" in warning and str(path) in warning

    async def statuses(token: str) -> list[int]:
        headers = {"content-type": "application/json", **bearer(token)}
        return [
            (await ask(app, "/topics/any", "POST", headers=headers, body=[b"1"])).status,
            (await ask(app, "/topics/any", headers=headers)).status,
            (await ask(app, "/figures", headers=headers)).status,
        ]

    assert await statuses(ann) == [200, 200, 403]
    assert await statuses(figures) == [200, 200, 200]
    assert await statuses(new) == [403, 403, 403]
    set_rights(path, "ann", ["subscribe"])
    assert await statuses(ann) == [403, 200, 403], "the same token, without a restart"
    caplog.clear()
    set_rights(path, "metrics", ["metrics"])
    app_of(tokens_file=path)
    assert caplog.messages == []


async def test_other_rights_end_the_streams_that_the_old_ones_allowed(path: Path) -> None:
    mine, other = add_token(path, "ann"), add_token(path, "ben")
    app = app_of(tokens_file=path, heartbeat_s=0.05)
    async with (
        app.running(),
        listening(app, "/ticks", headers=bearer(other)) as stays,
        listening(app, "/ticks", headers=bearer(mine)) as ends,
    ):
        await stays.event()
        await ends.event()
        set_rights(path, "ann", ["publish"])
        with anyio.fail_after(10):
            *_, last = await ends.rest()
            assert await stays.chunk() == b":\n"
    assert "token_revoked" in last.data


@pytest.mark.parametrize(
    "right",
    ["", "everything", "publish:", "metrics:all", "Publish", "publish:a\nb", "publish:" + "x" * MAX_RIGHT_CHARS],
)
def test_what_is_not_a_right_is_refused(right: str, path: Path) -> None:
    with pytest.raises(SettingsError, match=r"publish:topics/orders-\*"):
        add_token(path, "ann", may=(right,))
    assert not path.exists()
    token = add_token(path, "ann")
    content = path.read_bytes()
    with pytest.raises(SettingsError):
        set_rights(path, "ann", (right,))
    assert path.read_bytes() == content and token


def test_a_route_can_name_only_its_own_parameters() -> None:
    for may in ("publish:{other}", "publish:{}", "publish:{name"):
        with pytest.raises(ValueError, match="may="):
            POST("/topics/{name}", named, may=may)


# A stream ends with its token


@pytest.mark.parametrize("target", ["/ticks", "/run", "/feed", "/data"])
async def test_a_stream_ends_when_its_token_is_revoked(target: str, parked: bool, path: Path) -> None:
    mine, other = add_token(path, "ann"), add_token(path, "ben")
    app = app_of(tokens_file=path, heartbeat_s=0.2)
    async with app.running():
        async with listening(app, target, headers=bearer(mine)) as stays:
            async with listening(app, target, headers=bearer(other)) as ends:
                await ends.event()
                revoke_tokens(path, "ben")
                await caller_of(app, bearer(mine))  # any request looks at the file; `watch` does where none comes
                with anyio.fail_after(10):
                    *_, last = events = await ends.rest()
            if target == "/data":
                assert last.data == "[DONE]"
                last = events[-2]
            assert "token_revoked" in last.data
            assert "id: end" not in ends.raw.decode()
            await stays.event()
            assert not stays.exchange.ended.is_set()
            assert app.metrics.text().count(b'reason="unauthorized"') == 2  # the counter, and when it was created


async def test_a_stream_ends_when_its_token_expires(path: Path) -> None:
    token = add_token(path, "ann", datetime.now(UTC) + timedelta(seconds=1))
    app = app_of(tokens_file=path, heartbeat_s=0.2)
    async with app.running(), listening(app, "/ticks", headers=bearer(token)) as reading:
        with anyio.fail_after(10):
            *_, last = await reading.rest()
    assert (last.event, "token_expired" in last.data) == ("error", True)


# An embedding program's callers


async def test_a_function_of_the_program_gives_the_name() -> None:
    app = app_of(lambda request: request.headers.get("x-user"))
    assert await caller_of(app, {"x-user": "ann", "host": "example.com", "x-forwarded-for": "192.0.2.1"}) == "ann"
    answer = await ask(app, "/me")
    assert answer.problem == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_function_of_the_program_may_wait_and_refuse_in_its_own_words() -> None:
    async def caller(request: Request) -> str:
        await anyio.lowlevel.checkpoint()
        raise Forbidden("not on sundays", code="sunday")

    assert (await ask(app_of(caller), "/me")).problem == (403, "sunday")
    assert (await ask(app_of(caller), "/open")).status == 200


async def test_a_function_that_fails_lets_nobody_in(caplog: pytest.LogCaptureFixture) -> None:
    def caller(request: Request) -> str:
        raise LookupError("the database is away")

    answer = await ask(app_of(caller), "/me")
    assert answer.problem == (500, "internal_error")
    assert b"database" not in answer.body


@pytest.mark.parametrize("settings", [{"auth": "off"}, {"tokens_file": Path("tokens")}])
def test_two_ways_to_say_who_may_enter_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="exclude"):
        app_of(lambda request: "ann", **settings)


# Limits for a caller


async def test_a_caller_publishes_at_its_rate_and_no_faster() -> None:
    app = app_of(lambda request: request.headers["x-user"], max_publish_per_s=3)
    answers = [await ask(app, "/publish", "POST", headers={"x-user": "ann"}) for _ in range(5)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].problem == (429, "too_many_requests")
    assert answers[-1].headers["retry-after"] == "1"
    assert (await ask(app, "/publish", "POST", headers={"x-user": "ben"})).status == 200
    assert (await ask(app, "/me", "POST", headers={"x-user": "ann"})).status == 200, "not all posts are publications"


async def test_a_rate_below_one_a_second_allows_one() -> None:
    app = app_of(lambda request: "ann", max_publish_per_s=0.1)
    answers = [await ask(app, "/publish", "POST") for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 10


async def test_where_nobody_has_a_name_there_is_no_limit_for_one() -> None:
    app = app_of(max_publish_per_s=1, max_streams_per_caller=1)
    assert [(await ask(app, "/publish", "POST")).status for _ in range(3)] == [200] * 3
    async with app.running(), listening(app, "/ticks"), listening(app, "/ticks") as second:
        await second.event()


async def test_a_caller_opens_so_many_streams_and_gets_a_place_back() -> None:
    app = app_of(lambda request: request.headers["x-user"], max_streams_per_caller=2)
    ann = {"x-user": "ann", "accept": "text/event-stream", "cache-control": "no-cache"}
    async with app.running():
        for _ in range(2):
            async with listening(app, "/ticks", headers=ann) as one, listening(app, "/feed", headers=ann) as two:
                await one.event()
                await two.event()
                for target in ("/ticks", "/feed", "/run"):
                    answer = await ask(app, target, headers=ann)
                    assert answer.problem == (429, "too_many_requests"), "never softly: it is the caller's own doing"
                    assert int(answer.headers["retry-after"]) > 0
                async with listening(app, "/ticks", headers={"x-user": "ben"}) as other:
                    await other.event()


# Without credentials


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost"},
        {"host": "LOCALHOST:8000"},
        {"host": "app.localhost:8000"},
        {"host": "127.0.0.1:8000"},
        {"host": "127.8.7.6"},
        {"host": "[::1]:8000"},
        {"host": "[::1]:8000", "user-agent": "Mozilla/5.0", "sec-fetch-site": "none"},
        {"host": "localhost:8000", "user-agent": "curl/8.5", "accept-language": "en", "x-request-id": "1"},
        {"host": "localhost:8000", "user-agent": "Mozilla/5.0", "origin": "http://localhost:8000"},
        {"host": "localhost:8000", "origin": "http://localhost:8000"},
        {"host": "localhost:8000", "origin": "http://127.0.0.1:8080", "sec-fetch-site": "same-origin"},
        {"host": "localhost:8000", "sec-fetch-site": "same-origin"},
        {"host": "localhost:8000", "sec-fetch-site": "none"},
        {"host": "localhost:8000", "origin": "https://listed.example", "sec-fetch-site": "cross-site"},
    ],
    ids=str,
)
async def test_a_private_service_answers_its_own_machine(headers: dict[str, str]) -> None:
    app = app_of(cors_origins=("https://listed.example",))
    for method in ("GET", "POST"):
        assert (await ask(app, "/me", method, headers=headers)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "localhost.evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost."},
        {"host": "localhost@evil.example"},
        {"host": "localhost, evil.example"},
        {"host": "192.168.0.1:8000"},
        {"host": "0.0.0.0:8000"},
        {"host": ""},
        {"host": "[::1"},
        {"host": "[::]:8000"},
        {"host": "[::ffff:127.0.0.1]:8000"},
        {"host": "[::ffff:7f00:1]:8000"},
        {"host": "[0:0:0:0:0:ffff:127.0.0.1]"},
        {"host": "localhost", "origin": "http://[::ffff:7f00:1]:8000"},
        {"host": "2130706433"},
        {"forwarded": "for=192.0.2.1"},
        {"x-forwarded-for": "127.0.0.1"},
        {"x-forwarded-host": "localhost"},
        {"x-forwarded-proto": "https"},
        {"x-real-ip": "127.0.0.1"},
        {"via": "1.1 proxy"},
        {"x-forwarded": "for=192.0.2.1"},
        {"x-forwarded-port": "443"},
        {"x-forwarded-ssl": "on"},
        {"x-original-forwarded-for": "192.0.2.1"},
        {"x-original-url": "/"},
        {"x-original-host": "example.com"},
        {"client-ip": "192.0.2.1"},
        {"true-client-ip": "192.0.2.1"},
        {"fastly-client-ip": "192.0.2.1"},
        {"x-client-ip": "192.0.2.1"},
        {"x-cluster-client-ip": "192.0.2.1"},
        {"cf-connecting-ip": "192.0.2.1"},
        {"cf-ray": "1"},
        {"cdn-loop": "cloudflare"},
        {"do-connecting-ip": "192.0.2.1"},
        {"fly-forwarded-proto": "https"},
        {"x-azure-ref": "1"},
        {"x-envoy-external-address": "192.0.2.1"},
        {"x-amzn-trace-id": "1"},
        {"x-remote-addr": "192.0.2.1"},
        {"x-proxied-by": "proxy"},
        {"x-varnish": "1"},
        {"tailscale-user-login": "ann@example.com"},
        {"host": "localhost", "origin": "http://evil.example"},
        {"host": "localhost", "origin": "null"},
    ],
    ids=str,
)
async def test_a_private_service_answers_nobody_else(headers: dict[str, str]) -> None:
    for target in ("/me", "/open", "/nothing"):
        answer = await ask(app_of(), target, headers=headers)
        assert answer.status == 403
    if "origin" not in headers:
        assert answer.json["code"] == "private"
        assert "caller=" in answer.json["detail"] and "Settings(auth='off')" in answer.json["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "http://localhost:8000"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://127.0.0.1:8000"},
    ],
    ids=str,
)
async def test_a_page_of_another_origin_starts_nothing_on_a_private_service(headers: dict[str, str]) -> None:
    headers["host"] = "localhost:8000"
    for method in ("GET", "POST"):
        answer = await ask(app_of(cors_origins=("*",)), "/me", method, headers=headers)
        assert answer.problem == (403, "forbidden")


@pytest.mark.parametrize("target", ["/ticks", "/run", "/feed", "/me"])
async def test_a_browser_that_names_no_page_starts_nothing_on_a_private_service(target: str) -> None:
    """An image of a page of another origin, say, where the browser sends no `Sec-Fetch-Site`."""
    headers = {"host": "localhost:8000", "user-agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"}
    with anyio.fail_after(10):
        answer = await ask(app_of(), target, headers=headers)
    assert answer.problem == (403, "forbidden")
    assert "Sec-Fetch-Site: none" in answer.json["detail"], "what a program may do that looks like a browser"
    assert (await ask(app_of(), "/open", headers=headers)).status == 200
    assert (await ask(app_of(auth="off"), "/me", headers=headers)).status == 200


async def test_a_program_with_a_token_may_look_like_a_browser(path: Path) -> None:
    app = app_of(tokens_file=path)
    headers = {"user-agent": "Mozilla/5.0 (Windows NT; en-US) WindowsPowerShell/5.1", **bearer(add_token(path, "ann"))}
    for method in ("GET", "POST"):
        assert (await ask(app, "/me", method, headers=headers)).status == 200


async def test_a_private_service_is_not_for_another_machine() -> None:
    app = app_of()
    for peer, status in (
        (("192.0.2.1", 1), 403),
        (("::ffff:192.0.2.1", 1), 403),
        (("::1", 1), 200),
        (("::ffff:127.0.0.1", 1), 200),  # through a socket that takes both families
        (("127.0.0.1", 1), 200),
        (None, 200),
    ):

        async def asked_from(scope: Any, receive: Any, send: Any, peer: Any = peer) -> None:
            await app({**scope, "client": peer}, receive, send)

        async with connect(asked_from, "GET", "/me") as exchange:
            await exchange.ended.wait()
        assert exchange.status == status


async def test_said_aloud_everybody_may_and_nobodys_runs_are_listed() -> None:
    app = app_of(auth="off")
    everybody = {"host": "example.com", "x-forwarded-for": "192.0.2.1", "origin": "http://evil.example"}
    assert await caller_of(app, everybody) is None
    async with app.running():
        assert (await ask(app, "/runs", headers=everybody)).problem == (403, "forbidden")


# Pages of other origins, with credentials


async def test_a_page_of_another_origin_may_not_use_an_unsafe_method(path: Path) -> None:
    token = add_token(path, "ann")
    app = app_of(tokens_file=path, cors_origins=("https://listed.example",))
    site = {"host": "app.example", **bearer(token)}

    async def status(method: str, **headers: str) -> int:
        return (await ask(app, "/me", method, headers=site | headers)).status

    assert await status("POST") == 200, "no browser"
    assert await status("POST", origin="https://app.example") == 200
    assert await status("POST", origin="https://listed.example") == 200
    assert await status("POST", origin="https://evil.example") == 403
    assert await status("POST", origin="null") == 403
    assert await status("POST", origin="https://app.example.evil.example") == 403
    assert await status("GET", origin="https://evil.example") == 200, "it has shown a token of its own"


async def test_any_origin_may_ask_with_a_token_where_that_is_said(path: Path) -> None:
    token = add_token(path, "ann")
    app = app_of(tokens_file=path, cors_origins=("*",))
    foreign = {"host": "app.example", "origin": "https://evil.example"}
    assert (await ask(app, "/me", "POST", headers=foreign | bearer(token))).status == 200
    cookie = {"cookie": f"sseapp_session={session_of(token)}"}
    for method in ("GET", "POST"):
        assert (await ask(app, "/me", method, headers=foreign | cookie)).status == 403


# The command


def test_the_command_prints_the_token_alone(path: Path) -> None:
    result = call_sseapp("token", "add", "ann", "--expires", "90d", env={"SSEAPP_TOKENS_FILE": str(path)})
    assert (result.returncode, result.stdout.count("\n")) == (0, 1)
    token = result.stdout.strip()
    assert "ann" in result.stderr and token not in result.stderr
    (entry,) = read_tokens(path)
    assert (entry.id, entry.name) == (token.partition(".")[0], "ann")
    assert entry.expires is not None

    listed = call_sseapp("token", "--tokens-file", str(path), "list")
    assert listed.stdout.rstrip("\n").split("\t")[:2] == [entry.id, "ann"]
    assert listed.stdout.rstrip("\n").split("\t")[4] == "-"
    assert entry.hash not in listed.stdout

    assert call_sseapp("token", "--tokens-file", str(path), "revoke", "ben").returncode == 1
    assert call_sseapp("token", "--tokens-file", str(path), "revoke", entry.id).returncode == 0
    assert read_tokens(path) == []


def test_the_command_says_where_the_tokens_should_be() -> None:
    result = call_sseapp("token", "add", "ann")
    assert (result.returncode, result.stdout) == (2, "")
    assert "SSEAPP_TOKENS_FILE" in result.stderr


def test_the_command_gives_lists_and_changes_rights(path: Path) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        result = call_sseapp("token", *arguments, env={"SSEAPP_TOKENS_FILE": str(path)})
        return result.returncode, result.stdout, result.stderr

    def rights() -> list[str]:
        return [line.split("\t")[4] for line in command("list")[1].splitlines()]

    code, _, remarks = command("add", "shop", "--may", "publish:topics/orders-*", "--may", "subscribe")
    assert code == 0 and "publish:topics/orders-*, subscribe" in remarks
    assert rights() == ["publish:topics/orders-*, subscribe"]
    assert command("set", "shop", "--may", "metrics")[0] == 0
    assert rights() == ["metrics"]
    assert command("set", "shop")[0] == 0
    assert rights() == ["-"]
    assert command("set", "nobody", "--may", "metrics")[0] == 1
    for wrong in ("publish:orders-*", "subscribe:users/*", "everything"):
        code, _, remarks = command("add", "other", "--may", wrong)
        assert code == 2 and "topics/" in remarks
    assert len(read_tokens(path)) == 1
