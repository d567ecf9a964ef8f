"""Generated requests against every route of the service: none a 500, none hangs, none leaves a task behind.

`SSEAPP_TEST_REQUESTS=100000 pytest tests/test_generated.py` asks for more of them than usual, in some minutes.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers import ROUTES
from sseapp import Settings, SSEApp, create_app
from ssecore.http.request import Request
from ssecore.http.routes import DELETE, POST, Route, Upload
from ssecore.http.tokens import add_token, session_of
from ssecore.runs import ROUTES as RUN_ROUTES
from ssecore.testing import connect
from tests.needs import needs
from tests.serving import wait_until

pytestmark = needs("time")

REQUESTS: Final = int(os.environ.get("SSEAPP_TEST_REQUESTS", "2000"))
#: In one test, which has a limit of its own.
BATCH: Final = 2000
#: For an answer to begin. A stream waits a second for its first event.
HANGS_S: Final = 10.0

TEXTS: Final = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "0", "1", "-1", "3", "x", "end", "open", "analyze", "message", "..", "/", "\r\n", "\x00", "%", "é"]
    ),
    st.sampled_from(
        ["nan", "inf", "1e999", "9" * 30, "A" * 22, "A" * 22 + ".1", "2030-01-01", "x" * 5000, "true", "[]"]
    ),
    st.integers().map(str),
    st.floats().map(str),
)
JSONS: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
#: What some route has a use for.
USEFUL: Final = st.sampled_from(
    [
        [{"role": "user", "content": "hello"}],
        {"message": "count the tasks", "session_id": "a" * 30},
        {"task_id": 1, "operation": "analyze"},
        {"kind": "digest"},
        {"kind": "sleep", "input": {"steps": 2, "interval": 0}},
        ["one", 2, None],
        {"headline": "It works"},
    ]
)
HEADERS: Final[dict[bytes, st.SearchStrategy[str]]] = {
    b"accept": st.sampled_from(["text/event-stream", "*/*", "", "application/json"]),
    b"cache-control": st.sampled_from(["no-cache", "max-age=0"]),
    b"content-type": st.sampled_from(["application/json", "text/csv", "application/json; charset=x", "text/plain", ""]),
    b"content-length": TEXTS,
    b"last-event-id": TEXTS,
    b"idempotency-key": TEXTS | st.just("k" * 22),
    b"prefer": st.sampled_from(["respond-async", "respond-async, wait=10", "return=minimal", ""]),
    b"range": st.sampled_from(["bytes=0-1", "bytes=-5", "bytes=9-", "bytes=1-0", "bytes=x", "lines=1-2", ""]),
    b"if-none-match": st.sampled_from(["*", '"x"', "x"]),
    b"if-range": TEXTS,
    b"origin": st.sampled_from(["null", "http://localhost", "http://evil.example", "https://listed.example", "x"]),
    b"sec-fetch-site": st.sampled_from(["same-origin", "cross-site", "none", "x"]),
    b"access-control-request-method": st.sampled_from(["GET", "POST", "x y", ""]),
    b"access-control-request-headers": TEXTS,
    b"authorization": TEXTS | st.sampled_from(["Bearer x.y", "Bearer TOKEN"]),
    b"cookie": TEXTS | st.sampled_from(["sseapp_session=x", "sseapp_session=SESSION"]),
    b"host": st.sampled_from(["localhost", "127.0.0.1:8000", "evil.example", "[::1]", ""]),
    b"x-forwarded-for": st.just("192.0.2.1"),
}


async def unused(request: Request) -> None:
    """A route here is only a line to make requests of."""


#: A guarded service's own.
SESSION: Final = [POST("/session", unused), DELETE("/session", unused)]


class Asked(NamedTuple):
    guarded: bool  #: of the service that asks for tokens
    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: list[bytes]


def quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    """Mostly what a route asks for, with something in it that it doesn't."""
    route: Route = draw(st.sampled_from([*ROUTES, *RUN_ROUTES, *SESSION]))
    path = re.sub(r"{\w+:int}", lambda _: draw(st.sampled_from(["0", "1", "2", "9" * 18, "x"])), route.path)
    path = re.sub(r"{\w+(:path)?}", lambda _: draw(TEXTS), path)
    method = draw(st.sampled_from([route.method] * 30 + ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "x"]))
    names = list(getattr(route.query, "__struct_fields__", ()))
    values = {name: draw(TEXTS) for name in names if draw(st.booleans())}
    for name in ("interval", "limit", "total", "at", "count"):  # that nobody has to wait long
        if name in names and draw(st.integers(0, 9)):
            values[name] = draw(st.sampled_from(["0", "1", "2"]))
    pairs = [
        *values.items(),
        *draw(st.lists(st.tuples(st.sampled_from(["key", "last_event_id", "x", "token"]), TEXTS), max_size=1)),
    ]
    query = "&".join(f"{quoted(name)}={quoted(value)}" for name, value in pairs).encode()
    query = draw(st.sampled_from([query] * 9 + [query + b"&%ff=%f&&=;\xff"]))
    given = {
        name: draw(HEADERS[name]) for name in draw(st.lists(st.sampled_from(list(HEADERS)), max_size=3, unique=True))
    }
    if route.method == "POST" and draw(st.integers(0, 9)):
        given[b"content-type"] = "text/csv" if isinstance(route.body, Upload) else "application/json"
    guarded = draw(st.booleans())
    if guarded and draw(st.integers(0, 4)):
        given[b"authorization"] = "Bearer TOKEN"  # the right one takes these words' place
    headers = [(name, value.encode("utf-8", "surrogatepass")) for name, value in given.items()]
    return Asked(guarded, method, path, query, headers, draw(bodies(route)))


def bodies(route: Route) -> st.SearchStrategy[list[bytes]]:
    as_json = (USEFUL | JSONS).map(lambda value: json.dumps(value).encode())
    rows = st.lists(st.lists(TEXTS, max_size=4).map(",".join), max_size=5).map(
        lambda lines: "\n".join(["title,status", *lines]).encode("utf-8", "surrogatepass")
    )
    whole = st.one_of(rows if isinstance(route.body, Upload) else as_json, as_json, st.binary(max_size=200))
    return whole.flatmap(lambda body: st.integers(0, len(body)).map(lambda at: [body[:at], body[at:]]))


class Running:
    """A private service and a guarded one, in a loop of their own, in another thread."""

    def __init__(self, private: SSEApp, guarded: SSEApp, token: str, portal: BlockingPortal) -> None:
        self.apps = (private, guarded)
        self.portal = portal
        self.words = ((b"TOKEN", token.encode()), (b"SESSION", session_of(token).encode()))
        self.tasks = portal.call(self._tasks)
        self.errors: list[str] = []  #: what would be a 500, or one in the middle of a stream

    async def _tasks(self) -> int:
        return len(asyncio.all_tasks())

    async def _ask(self, asked: Asked) -> int:
        async def shaped(scope: Any, receive: Any, send: Any) -> None:
            headers = asked.headers
            for word, secret in self.words:
                headers = [(name, value.replace(word, secret)) for name, value in headers]
            scope |= {"path": asked.path, "raw_path": quoted(asked.path).encode(), "query_string": asked.query}
            await self.apps[asked.guarded]({**scope, "headers": headers}, receive, send)

        async with connect(shaped, asked.method, "/", body=asked.body, leave_s=HANGS_S) as exchange:
            with anyio.fail_after(HANGS_S):
                await exchange.started.wait()
        return exchange.status

    def ask(self, asked: Asked) -> int:
        return self.portal.call(self._ask, asked)

    def left_behind(self) -> int:
        """Tasks, streams and places of streams."""
        tasks = self.portal.call(self._tasks) - self.tasks
        return tasks + sum(len(app._streams) + app._places._taken for app in self.apps)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("data")
    token = add_token(folder / "tokens", "ann", may=["publish", "subscribe", "metrics"])
    common: dict[str, Any] = {"mock_delay_s": 0, "linger_s": 0.1, "cors_origins": ("https://listed.example",)}
    private = create_app(Settings(data_dir=folder / "private", max_runs=None, **common))
    guarded = create_app(Settings(data_dir=folder / "guarded", tokens_file=folder / "tokens", **common))
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal("asyncio"))
        for app in (private, guarded):
            stack.enter_context(portal.wrap_async_context_manager(app.running()))
        running = Running(private, guarded, token, portal)
        errors = logging.Handler(logging.ERROR)
        errors.emit = lambda record: running.errors.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("sseapp").addHandler(errors)
        stack.callback(logging.getLogger("sseapp").removeHandler, errors)
        yield running


@pytest.mark.parametrize("batch", range(-(-REQUESTS // BATCH)))
@settings(max_examples=min(REQUESTS, BATCH), deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=requests())
def test_no_request_is_a_500_or_hangs(asked: Asked, batch: int, running: Running) -> None:
    status = running.ask(asked)
    assert status in range(200, 500) or status in (502, 503), f"{status} for {asked}"
    assert not running.errors, f"{asked}: {running.errors}"


def test_none_of_them_has_left_anything_behind(running: Running) -> None:
    wait_until(lambda: running.left_behind() == 0)
