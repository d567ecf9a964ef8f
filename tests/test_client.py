"""The client against our own server, over lines that break, and against servers that misbehave."""

import json
import logging
import random
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest

from sseapp import GET, POST, Event, Request, Run, Settings, SSEApp, Subscription
from ssecore.client import Broken, GapError, GaveUp, Refused, SourceError, batches, connect, is_gap
from ssecore.client import source as client
from ssecore.dialects import DATA_ONLY
from ssecore.testing import Transport
from ssecore.wire import Decoder
from tests import upstream
from tests.house import virtual_time
from tests.relay import relay
from tests.serving import Server, free_port, serve
from tests.upstream import Call, Script, Upstream


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("data"), env={"SSEAPP_MOCK_DELAY_S": "0.001"}) as server:
        yield server


EITHER: Final = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a thousandth; but real ones where the clock is virtual."""
    if not isinstance(
        request.node.callspec.params.get("anyio_backend") if hasattr(request.node, "callspec") else 0, tuple
    ):
        monkeypatch.setattr(client, "BACKOFF_S", 0.001)
        monkeypatch.setattr(client, "MIN_BACKOFF_S", 0.001)


@pytest.fixture
def foreign() -> Iterator[Upstream]:
    with upstream.serve() as server:
        yield server
        server.settle()


async def collect(url: str, **options: Any) -> list[Event]:
    # Certificates take long to load, and there are none here.
    async with httpx.AsyncClient(verify=False) as http:
        with anyio.fail_after(20):
            async with connect(url, **{"client": http, **options}) as source:
                return [event async for event in source]


def pairs(events: list[Event]) -> list[tuple[str | None, str]]:
    return [(event.event, event.data) for event in events]


def told(events: list[Event]) -> list[tuple[str | None, str | None, str]]:
    """All but `retry`, which is the connection's."""
    return [(event.id, event.event, event.data) for event in events]


def stream(*pieces: bytes) -> Script:
    """A whole answer, to its proper end."""

    def script(call: Call) -> None:
        call.head()
        call.send(*pieces)
        call.end()

    return script


def cut(*pieces: bytes) -> Script:
    """An answer that breaks off behind these bytes."""

    def script(call: Call) -> None:
        call.head()
        call.send(*pieces)

    return script


def over(call: Call) -> None:
    call.raw(b"HTTP/1.1 204 No Content\r\n\r\n")


def numbered(*numbers: int) -> bytes:
    return b"".join(b"id: x.%d\ndata: %d\n\n" % (number, number) for number in numbers)


# Our own server


@EITHER
@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/stream/hello?interval=0", {}),
        ("/stream?count=1000&interval=0", {}),
        ("/stream/data?count=3&interval=0", {}),
        ("/stream/format?interval=0", {}),
        ("/stream/errors?total=5&at=3", {}),
        ("/countdown/0", {}),
        ("/chat?prompt=hi", {}),
        ("/chat/stream", {"json": [{"role": "user", "content": "hi"}]}),
        ("/process", {"json": ["one", "two", 3]}),
        ("/agent/stream?query=what+is+2%2B2", {}),
        ("/api/chat", {"json": {"message": "what is 2+2"}}),
        ("/tasks/stream", {}),
    ],
)
async def test_every_family_is_read_to_its_end_and_started_once(server: Server, path: str, options: Any) -> None:
    body = server.client.request("POST" if options else "GET", path, **options).content
    raw = Decoder().feed(body)
    async with connect(server.url + path, **options) as source:
        events = [event async for event in source]
        assert [event async for event in source] == [], "it had ended"
    if "/agent" not in path and "/api/chat" not in path:  # those tell times and totals
        assert pairs(events) == pairs(raw)
    assert [event.event for event in events] == [event.event for event in raw]
    assert source.last_event_id == events[-1].id
    assert (source.run_id is not None) == (events[-1].id != "end")
    assert not source.failed


@EITHER
@pytest.mark.parametrize("prefix", ["", "/in/a/host"])
async def test_a_post_starts_one_run_and_goes_on_at_its_events(prefix: str, anyio_backend_name: str) -> None:
    """In-process, cut after each chunk, mounted or not."""
    started = 0

    async def work(request: Request) -> AsyncIterator[Event]:
        nonlocal started
        started += 1
        for number in range(20):
            yield Event(number)
            await anyio.sleep(0.001)
        yield Event("", "done")

    app = SSEApp([POST("/work", work, body=dict, run=Run())], Settings(log="memory", retry_ms=0))
    targets = []

    class Cutting(Transport):
        """Cuts the first answers behind their first event, and knows nothing of its app's mount path."""

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            targets.append((request.method, request.url.path))
            url = request.url.copy_with(path=request.url.path.removeprefix(prefix))
            # Another request: the client resolves locations against the URL that it asked for.
            below = httpx.Request(request.method, url, headers=request.headers, stream=request.stream)
            below.extensions = request.extensions
            response = await super().handle_async_request(below)
            if response.status_code == 200 and len(targets) < 5:
                assert isinstance(response.stream, httpx.AsyncByteStream)
                response.stream = Cut(response.stream)
            return response

    async with app.running(), httpx.AsyncClient(transport=Cutting(app, root_path=prefix)) as http:
        events = await collect(f"http://localhost{prefix}/work", json={}, client=http)
    assert [event.data for event in events] == [*map(str, range(20)), ""]
    assert started == 1
    run = str(events[0].id).partition(".")[0]
    assert targets == [("POST", f"{prefix}/work")] + [("GET", f"{prefix}/runs/{run}/events")] * (len(targets) - 1)
    assert len(targets) >= 5


class Cut(httpx.AsyncByteStream):
    """A body that breaks off behind its first event."""

    def __init__(self, body: httpx.AsyncByteStream) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with aclosing(self._body.__aiter__()) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk
                if b"data" in chunk:
                    raise httpx.ReadError("cut")

    async def aclose(self) -> None:
        await self._body.aclose()


def test_a_run_over_forty_cuts_is_complete_and_nothing_is_done_twice(tmp_path: Path) -> None:
    items = [f"item {number}" for number in range(300)]
    cuts = [random.Random(8).randrange(150, 1500) for _ in range(40)]
    with serve(tmp_path, env={"SSEAPP_RETRY_MS": "1"}) as server, relay(server.port, cuts) as line:
        events = anyio.run(lambda: collect(f"{line.url}/process", json=items))
        runs = server.client.get("/runs").json()["runs"]
        whole = server.client.get(f"/runs/{runs[0]['run']}/events").content
    assert told(events) == told(Decoder().feed(whole))
    assert [run["state"] for run in runs] == ["completed"]
    streams = [answer for answer in line.answers() if b"text/event-stream" in answer]
    assert len(streams) > 20 and b"HTTP/1.1 204" in line.answers()[-1]


@pytest.mark.parametrize("path", ["/jobs", "/chat/stream"])
async def test_what_is_answered_by_202_is_followed(server: Server, path: str) -> None:
    body: Any = {"kind": "sleep", "input": {"steps": 3, "interval": 0}}
    headers = {"authorization": "Bearer x"}
    if path == "/chat/stream":
        body, headers = [{"role": "user", "content": "hi"}], {**headers, "prefer": "respond-async"}
    events = await collect(server.url + path, json=body, headers=headers)
    assert events[-1].data == ("[DONE]" if path == "/jobs" else "")
    assert str(events[-1].id).rpartition(".")[2] == str(len(events)) or path == "/jobs"


async def test_it_goes_on_from_a_given_id_and_a_stream_that_is_over_gives_nothing(server: Server) -> None:
    url = f"{server.url}/chat?prompt=hi"
    events = await collect(url)
    assert told(await collect(url, last_event_id=events[3].id)) == told(events[4:])
    assert await collect(url, last_event_id=events[-1].id) == []
    assert await collect(f"{server.url}/stream/hello", last_event_id="end") == []


@pytest.mark.parametrize("log", ["sqlite", "memory"])
async def test_a_topic_is_followed_through_a_drain_and_a_restart(tmp_path: Path, log: str) -> None:
    port = free_port()
    options = ("--port", str(port), "--log", log)
    environ = {"SSEAPP_RETRY_MS": "1"}
    async with connect(f"http://127.0.0.1:{port}/topics/news", gaps="yield") as source:
        with anyio.fail_after(30):
            with serve(tmp_path, *options, env=environ) as server:
                assert (await anext(source)).event == "init"
                server.client.post("/topics/news", json=1)
                assert (await anext(source)).data == "1"
                server.process.send_signal(signal.SIGTERM)
                server.wait()
            with serve(tmp_path, *options, env=environ) as server:
                server.client.post("/topics/news", json=2)
                event = await anext(source)
                if log == "memory":  # what it had is gone, and that is said
                    assert is_gap(event) and json.loads(event.data)["reason"] == "expired"
                    event = await anext(source)
                assert event.data == "2"


async def test_a_run_whose_server_stops_ends_with_what_it_says(tmp_path: Path) -> None:
    port = free_port()
    options, environ = ("--port", str(port)), {"SSEAPP_RETRY_MS": "1", "SSEAPP_DRAIN_S": "0"}
    body = {"kind": "sleep", "input": {"steps": 100, "interval": 1}}
    async with connect(f"http://127.0.0.1:{port}/jobs", json=body) as source:
        with anyio.fail_after(30):
            with serve(tmp_path, *options, env=environ) as server:
                await anext(source)
                server.process.send_signal(signal.SIGTERM)
                server.wait()
            with serve(tmp_path, *options, env=environ):
                events = [event async for event in source]
    assert json.loads(events[-2].data)["code"] == "interrupted"
    assert events[-1].data == "[DONE]"


@EITHER
async def test_a_gap_is_raised_or_handed_over_as_the_caller_chooses(anyio_backend_name: str) -> None:
    async def read(request: Request) -> Any:
        return Subscription("t", Event("", "init"))

    app = SSEApp([GET("/t", read), GET("/d", read, dialect=DATA_ONLY)], Settings(log="memory", retention_events=2))
    async with app.running(), httpx.AsyncClient(transport=Transport(app)) as http:
        assert app._services is not None
        topics = app._services.topics
        first = await topics.publish("t", Event("1"))
        await topics.publish("t", *(Event(str(number)) for number in (2, 3, 4, 5)))
        for path in ("/t", "/d"):
            begin: dict[str, Any] = {"client": http, "last_event_id": str(first)}
            async with connect(f"http://localhost{path}", **begin) as source:
                with pytest.raises(GapError, match="trimmed") as raised:
                    await anext(source)
                assert json.loads(raised.value.event.data)["to"] == 3
                assert [(await anext(source)).data, (await anext(source)).data] == ["4", "5"]
            async with connect(f"http://localhost{path}", gaps="yield", **begin) as source:
                assert is_gap(await anext(source))
                assert (await anext(source)).data == "4"


@pytest.mark.parametrize("data", ["", "[]", '{"type":"gap', '{"type":"gap"}', '{"reason":"spread"}', "1"])
def test_not_every_event_called_gap_is_a_loss(data: str) -> None:
    assert not is_gap(Event(data)) and not is_gap(Event(data, "gap"))


# Ends


async def test_the_proper_end_of_a_stream_without_ids_is_its_end(foreign: Upstream) -> None:
    foreign.plan(stream(b"retry: 5\n\n", b"data: 1\n\n", b"data: 2\n\n"))
    assert pairs(await collect(foreign.url)) == [(None, "1"), (None, "2")]


async def test_a_stream_without_ids_that_breaks_off_is_an_error_behind_its_events(foreign: Upstream) -> None:
    for end in (cut(b"data: 1\n\n"), stream(b"data: 1\n\n", b"data: 2\n"), stream(b"data: 1\n\nretry: 4\n")):
        foreign.plan(end)
        async with connect(foreign.url) as source:
            assert (await anext(source)).data == "1"
            for _ in range(2):
                with pytest.raises(Broken, match="have no ids"):
                    await anext(source)


async def test_once_ends_with_the_answer_but_goes_on_over_a_cut(foreign: Upstream) -> None:
    foreign.plan(cut(numbered(1)), stream(numbered(2, 3)))
    assert [event.data for event in await collect(foreign.url, once=True)] == ["1", "2", "3"]


async def test_a_cut_before_the_first_event_asks_again(foreign: Upstream) -> None:
    foreign.plan(cut(b": hello\n"), stream(b"retry: 1\n\n"), lambda call: call.reset(), stream(b"data: 1\n\n"))
    assert pairs(await collect(foreign.url)) == [(None, "1")]
    assert "last-event-id" not in foreign.calls[-1].headers


async def test_a_server_that_begins_anew_is_found_out(foreign: Upstream) -> None:
    foreign.plan(stream(numbered(1, 2)), stream(numbered(1, 2)))
    async with connect(foreign.url) as source:
        assert [(await anext(source)).data, (await anext(source)).data] == ["1", "2"]
        with pytest.raises(SourceError, match="Last-Event-ID"):
            await anext(source)


async def test_the_last_id_is_the_one_of_the_last_complete_event(foreign: Upstream) -> None:
    foreign.plan(cut(numbered(1, 2) + b"id: x.3\ndata: half"), cut(b"id: x.3\ndata: whole\n\nid: \xc3\xa9\n\n"), over)
    events = await collect(foreign.url)
    assert [event.data for event in events] == ["1", "2", "whole"]
    assert [call.headers.get("last-event-id") for call in foreign.calls] == [None, "x.2", "é"]


@pytest.mark.parametrize("how", ["reset", "cut", "502"])
async def test_a_post_is_not_sent_twice_unless_it_has_a_key(foreign: Upstream, how: str) -> None:
    lose: Script = {
        "reset": lambda call: call.reset(),
        "cut": cut(b"data: 1\n\n"),
        "502": upstream.refuse(502, b"", content_type="text/html"),
    }[how]
    foreign.plan(lose)
    with pytest.raises(Broken, match="Idempotency-Key"):
        await collect(foreign.url, json={})
    foreign.settle()
    if how != "cut":
        foreign.plan(lose, stream(b"data: 2\n\n"))
        events = await collect(foreign.url, json={"a": 1}, headers={"Idempotency-Key": "k"})
        assert pairs(events) == [(None, "2")]
        assert [call.json for call in foreign.calls] == [{"a": 1}] * 2


async def test_a_post_that_was_surely_not_carried_out_is_sent_again(foreign: Upstream) -> None:
    foreign.plan(*(upstream.refuse(status, retry_after="0") for status in (503, 429)), stream(b"data: 1\n\n"))
    assert pairs(await collect(foreign.url, json={})) == [(None, "1")]


# Refusals


@EITHER
async def test_a_refusal_has_the_problems_text(server: Server, anyio_backend_name: str) -> None:
    with pytest.raises(Refused, match=r"^400 Bad Request: .*count") as raised:
        await collect(f"{server.url}/stream?count=x")
    assert raised.value.upstream_status == 400 and raised.value.problem["field"] == "count"
    with pytest.raises(Refused, match=r"^404"):
        await collect(f"{server.url}/runs/AAAAAAAAAAAAAAAAAAAAAA/events")
    with pytest.raises(Refused, match=r"^400"):
        await collect(f"{server.url}/chat?prompt=hi", last_event_id="nonsense")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 418, 500, 501, 599, 302])
async def test_what_will_not_pass_is_not_asked_again(foreign: Upstream, status: int) -> None:
    foreign.plan(upstream.refuse(status, b"no\x1b[31m\nmore", content_type="text/plain"))
    with pytest.raises(Refused, match=rf"^{status}.*: no\x1b\[31m$"):
        await collect(foreign.url)


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504])
async def test_what_will_pass_is_asked_again(foreign: Upstream, status: int) -> None:
    refuse = upstream.refuse(status, b"<h1>", content_type="text/html")
    foreign.plan(refuse, refuse, stream(b"data: 1\n\n"))
    assert len(await collect(foreign.url)) == 1


async def test_a_502_that_is_the_apps_own_word_is_final(foreign: Upstream) -> None:
    body = b'{"title": "x", "detail": "the model is away", "status": 502}'
    foreign.plan(upstream.refuse(502, body, content_type="application/problem+json"))
    with pytest.raises(Refused, match="the model is away"):
        await collect(foreign.url)


@pytest.mark.parametrize("body", [b"\xff\xfe", b"[1]", b"{", b"[" * 60_000, b'{"detail": 5}', b"{}" + b" " * 200_000])
async def test_a_refusals_body_may_be_anything(foreign: Upstream, body: bytes) -> None:
    def script(call: Call) -> None:
        call.respond(400, body, content_type="application/json")
        call.kept = False

    foreign.plan(script)
    with pytest.raises(Refused, match=r"^400 Bad Request"):
        await collect(foreign.url)


class Scripted:
    """An ASGI app that answers as planned, and knows when it was asked. For a virtual clock."""

    def __init__(self, *answers: tuple[int, dict[str, str], bytes, float | None]) -> None:
        self.answers = list(answers)
        self.times: list[float] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._answer, send)
            await receive()
            await receive()  # the client has left
            tasks.cancel_scope.cancel()

    async def _answer(self, send: Any) -> None:
        self.times.append(anyio.current_time())
        status, headers, body, stay_s = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        if status == 200:
            raw.append((b"content-type", b"text/event-stream"))
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body, "more_body": stay_s is not None})
        for _ in range(int(stay_s or 0)):
            await anyio.sleep(1)
            await send({"type": "http.response.body", "body": b":\n", "more_body": True})
        if stay_s is not None:
            await anyio.sleep_forever()

    async def read(self, **options: Any) -> list[Event]:
        async with (
            httpx.AsyncClient(transport=Transport(self)) as http,
            connect("http://localhost", client=http, **options) as s,
        ):
            return [event async for event in s]

    @property
    def pauses(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


GONE: Final = (204, dict[str, str](), b"", None)


@virtual_time
async def test_a_pause_is_what_the_server_asks_for_and_a_random_share_of_a_time_that_doubles(
    anyio_backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    app = Scripted((200, {}, numbered(1), None), *[(503, {}, b"", None)] * 7, GONE)
    await app.read()
    assert app.pauses == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30])
    app = Scripted((200, {}, b"retry: 500\n" + numbered(1), None), *[(503, {}, b"", None)] * 3, GONE)
    await app.read()
    assert app.pauses == pytest.approx([1, 1.5, 2.5, 4.5])
    app = Scripted((503, {"retry-after": "7"}, b"", None), (200, {}, numbered(1), None), GONE)
    await app.read()
    assert app.pauses == pytest.approx([8, 1])


@virtual_time
@pytest.mark.parametrize("header", ["", "-1", "1.5", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Xyz 99999"])
async def test_a_retry_after_that_means_nothing_is_none(anyio_backend_name: str, header: str) -> None:
    app = Scripted((503, {"retry-after": header}, b"", None), GONE)
    await app.read()
    assert app.pauses[0] <= 1


@virtual_time
@pytest.mark.parametrize("wait", [{"retry-after": "9" * 30}, {"retry-after": "Wed, 21 Oct 2125 07:28:00 GMT"}])
async def test_a_server_cannot_put_the_client_to_sleep_for_years(anyio_backend_name: str, wait: dict[str, str]) -> None:
    app = Scripted((503, wait, b"", None), GONE)
    await app.read(give_up_s=None)
    assert app.pauses[0] <= 3602
    app = Scripted((200, {}, b"retry: 99999999999999\n" + numbered(1), None), GONE)
    await app.read(give_up_s=None)
    assert app.pauses[0] <= 3602
    with pytest.raises(GaveUp, match="no stream for 300 s: 503"):
        await Scripted((503, wait, b"", None)).read()


@virtual_time
async def test_it_gives_up_when_nothing_came_for_too_long_and_not_earlier(anyio_backend_name: str) -> None:
    app = Scripted(*[(200, {}, numbered(number), 100.0) for number in range(1, 9)], (503, {}, b"", None))
    began = anyio.current_time()
    with pytest.raises(GaveUp, match="no stream for 300 s"):
        await app.read()
    assert anyio.current_time() - began > 8 * 160  # each stood for 100 s and was then silent for 60
    assert 240 < anyio.current_time() - app.times[8] <= 300


@virtual_time
async def test_a_connection_without_a_byte_is_given_up_and_heartbeats_are_bytes(anyio_backend_name: str) -> None:
    app = Scripted((200, {}, numbered(1), 500.0), GONE)
    await app.read(idle_timeout_s=5)
    assert 505 <= app.pauses[0] <= 507
    app = Scripted((200, {}, b"data: 1\n\n", 0.0))
    with pytest.raises(Broken, match="no byte for 5 s"):
        await app.read(idle_timeout_s=5)


async def test_a_server_that_takes_the_request_and_says_nothing_is_given_up(foreign: Upstream) -> None:
    foreign.plan(Call.wait_gone, stream(b"data: 1\n\n"))
    assert len(await collect(foreign.url, idle_timeout_s=0.1)) == 1


async def test_it_waits_for_a_server_that_is_not_there_yet() -> None:
    server = Upstream()
    events: list[Event] = []

    async def read() -> None:
        events.extend(await collect(server.url))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        server.plan(stream(b"data: 1\n\n"))
        server.listen()
    server.close()
    assert len(events) == 1


# Hostile servers


@pytest.mark.parametrize("at", range(1, 27))
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
async def test_a_cut_at_any_byte_loses_and_repeats_nothing(foreign: Upstream, at: int, end: bytes) -> None:
    """Inside of a UTF-8 character and of CRLF, too; as two chunks, and as two connections."""
    body = end.join(["id: 1.é".encode(), "data: €😀".encode(), b"", b""])
    at = min(at, len(body) - 1)
    foreign.plan(stream(body[:at], body[at:]), over)
    whole = [Event("€😀", None, "1.é")]
    assert await collect(foreign.url) == whole
    foreign.plan(cut(body[:at]), *([] if Decoder().feed(body[:at]) else [stream(body)]), over)
    assert await collect(foreign.url) == whole


@EITHER
async def test_a_line_without_an_end_is_bounded(foreign: Upstream, anyio_backend_name: str) -> None:
    sent = 0

    def endless(call: Call) -> None:
        nonlocal sent
        call.head()
        call.send(b"data: 1\n\ndata: ")
        for _ in range(1600):
            call.send(b"x" * 65536)
            sent += 65536

    foreign.plan(endless)
    async with connect(foreign.url) as source:
        assert (await anext(source)).data == "1"
        with pytest.raises(SourceError, match="an event is larger than 16777216 bytes: raise max_event_bytes"):
            await anext(source)
    assert sent < 30_000_000


async def test_an_event_that_is_too_large_in_its_last_chunk_is_not_lost_silently(foreign: Upstream) -> None:
    foreign.plan(stream(b"data: 1\n\ndata: " + b"x" * 100 + b"\n\n"))
    async with connect(foreign.url, max_event_bytes=50) as source:
        assert (await anext(source)).data == "1"
        with pytest.raises(SourceError, match="larger than 50 bytes"):
            await anext(source)


async def test_headers_without_an_end_are_bounded(foreign: Upstream) -> None:
    def endless(call: Call) -> None:
        call.raw(b"HTTP/1.1 200 OK\r\n")
        for number in range(100_000):
            call.raw(b"x-%d: %b\r\n" % (number, b"y" * 1000))

    foreign.plan(endless)
    with pytest.raises(SourceError, match="the server's response can't be read"):
        await collect(foreign.url)


async def test_headers_that_drip_are_bounded_in_time(foreign: Upstream) -> None:
    gone = anyio.Event()

    def drip(call: Call) -> None:
        call.raw(b"HTTP/1.1 200 OK\r\nx: ")
        while not gone.is_set():
            call.raw(b"y")
            threading.Event().wait(0.02)

    foreign.plan(drip)
    with pytest.raises(GaveUp, match=r"no response within 0\.2 s"):
        await collect(foreign.url, idle_timeout_s=0.2, give_up_s=0.1)
    gone.set()


@pytest.mark.parametrize("answer", [b"\0" * 100, b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 abc\r\n\r\n"])
async def test_what_is_not_http_is_an_error_at_once(foreign: Upstream, answer: bytes) -> None:
    def script(call: Call) -> None:
        call.raw(answer + b"\r\n\r\n")
        call.wait_gone()

    foreign.plan(script)
    with pytest.raises(SourceError, match="can't be read"):
        await collect(foreign.url)


@pytest.mark.parametrize("media_type", ["text/html", "application/json", "text/event-streams", "nonsense"])
async def test_another_content_type_is_an_error(foreign: Upstream, media_type: str) -> None:
    foreign.plan(upstream.refuse(200, b"data: 1\n\n", content_type=media_type))
    with pytest.raises(SourceError, match=f"Content-Type is {media_type}, not text/event-stream"):
        await collect(foreign.url)


async def test_a_compressed_answer_is_an_error(foreign: Upstream) -> None:
    foreign.plan(upstream.refuse(200, b"\x1f\x8b", content_type="text/event-stream", content_encoding="gzip"))
    with pytest.raises(SourceError, match="compressed"):
        await collect(foreign.url)
    assert foreign.calls[0].headers["accept-encoding"] == "identity"


def redirect(to: str, status: int = 307) -> Script:
    return upstream.refuse(status, b"", location=to)


async def test_a_redirect_is_followed_and_a_loop_is_not(foreign: Upstream) -> None:
    foreign.plan(redirect("/a"), redirect("/b", 308), stream(b"data: 1\n\n"))
    assert len(await collect(foreign.url, json=[1])) == 1
    assert [call.json for call in foreign.calls] == [[1]] * 3
    foreign.plan(*[redirect("/again")] * 11)
    with pytest.raises(SourceError, match="more than 10 redirects"):
        await collect(foreign.url)


async def test_credentials_do_not_go_to_another_server(foreign: Upstream) -> None:
    headers = {"Authorization": "Bearer s3cret", "X-API-Key": "s3cret", "Cookie": "s3cret=1"}
    with upstream.serve() as other:
        foreign.plan(redirect(other.url), redirect("/same"), stream(b"data: 1\n\n"))
        other.plan(stream(b"data: 1\n\n"))
        await collect(foreign.url, headers=headers)
        assert "s3cret" not in str(other.calls[0].headers)
        await collect(foreign.url, headers=headers)
        assert foreign.calls[2].headers["x-api-key"] == foreign.calls[1].headers["x-api-key"] == "s3cret"
        foreign.plan(upstream.refuse(202, b"", location=f"{other.url}/runs/x/events"))
        with pytest.raises(SourceError, match="on another server"):
            await collect(foreign.url, json={}, headers=headers)
        other.settle()


@pytest.mark.parametrize("id", [b"\x01", b" a", b"a ", b"a\tb", b"x" * 5000, b"\x7f"])
async def test_an_id_that_no_header_can_hold_is_not_sent_back(foreign: Upstream, id: bytes) -> None:
    foreign.plan(cut(b"id: %b\ndata: 1\n\n" % id))
    async with connect(foreign.url) as source:
        await anext(source)
        with pytest.raises(Broken, match="id can't be sent back"):
            await anext(source)


@pytest.mark.parametrize(
    ("line", "sent_back"),
    [(b"id: a\rid: b", "b"), (b"id: a\rretry: 1", "a"), (b"id: a\0b", "x.1"), (b"id: \xff", "\ufffd"), (b"id", None)],
)
async def test_ids_with_odd_bytes_are_what_the_standard_says(
    foreign: Upstream, line: bytes, sent_back: str | None
) -> None:
    foreign.plan(cut(numbered(1) + line + b"\ndata: 2\n\n"), over)
    if sent_back is None:
        with pytest.raises(Broken, match="no ids"):
            await collect(foreign.url)
        foreign.plan()
    else:
        assert len(await collect(foreign.url)) == 2
        assert foreign.calls[1].headers["last-event-id"] == sent_back


@pytest.mark.parametrize("url", ["ftp://example.org", "example.org/stream", "/stream"])
async def test_an_address_that_is_none_is_said_at_once(url: str) -> None:
    with pytest.raises(SourceError, match="must begin with http"):
        await collect(url)


# Whoever reads


@EITHER
async def test_a_wait_can_be_cancelled_and_nothing_is_lost(foreign: Upstream, anyio_backend_name: str) -> None:
    go_on = [threading.Event() for _ in range(5)]

    def slowly(call: Call) -> None:
        call.head()
        for number, event in enumerate(go_on):
            assert event.wait(upstream.LIMIT_S)
            call.send(b"data: %d\n\n" % number)
        call.end()

    foreign.plan(slowly)
    seen = []
    async with connect(foreign.url) as source:
        for event in go_on:
            with anyio.move_on_after(0.01):
                await anext(source)
                pytest.fail("nothing was sent yet")
            event.set()
            seen.append((await anext(source)).data)
    assert seen == ["0", "1", "2", "3", "4"]


@EITHER
async def test_leaving_early_leaves_the_server(foreign: Upstream, anyio_backend_name: str) -> None:
    def forever(call: Call) -> None:
        call.head()
        call.send(b"data: 1\n\n" * 10)
        call.wait_gone()

    for leave in (None, ValueError, KeyboardInterrupt):
        foreign.plan(forever)
        with pytest.raises(leave or RuntimeError, match="mine"):
            async with connect(foreign.url) as source:
                async for _ in source:
                    break
                raise (leave or RuntimeError)("mine")
        foreign.settle()


async def test_a_source_is_read_by_one_task_at_a_time(foreign: Upstream) -> None:
    foreign.plan(Call.wait_gone)
    async with connect(foreign.url) as source, anyio.create_task_group() as tasks:
        tasks.start_soon(anext, source)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="one task at a time"):
            await anext(source)
        tasks.cancel_scope.cancel()


@EITHER
async def test_a_slow_reader_holds_the_server_back(foreign: Upstream, anyio_backend_name: str) -> None:
    sent = 0

    def fast(call: Call) -> None:
        nonlocal sent
        call.head()
        for _ in range(2000):
            call.send(b"data: %b\n\n" % (b"x" * 60_000))
            sent += 60_000

    foreign.plan(fast)
    async with connect(foreign.url) as source:
        await anext(source)
        seen = -1
        while seen != sent:
            seen = sent
            await anyio.sleep(0.2)  # what the sockets hold fills up
        assert sent < 40_000_000


async def test_batches_are_full_or_on_time(foreign: Upstream) -> None:
    go_on = threading.Event()

    def script(call: Call) -> None:
        call.head()
        call.send(numbered(1, 2, 3, 4, 5))
        assert go_on.wait(upstream.LIMIT_S)
        call.send(numbered(6))
        call.end()

    foreign.plan(script, over)
    sizes = []
    async with connect(foreign.url) as source:
        async for batch in batches(source, 2, 0.05):
            sizes.append([event.data for event in batch])
            if len(sizes) == 3:
                go_on.set()
    assert sizes == [["1", "2"], ["3", "4"], ["5"], ["6"]]
    with pytest.raises(ValueError, match="at least one"):
        await anext(batches(source, 0, 1))


async def test_a_batch_that_has_begun_is_handed_over_before_the_error(foreign: Upstream) -> None:
    foreign.plan(cut(b"data: 1\n\ndata: 2\n\n"))
    async with connect(foreign.url) as source:
        groups = batches(source, 10, 5)
        assert len(await anext(groups)) == 2
        with pytest.raises(Broken):
            await anext(groups)


@pytest.mark.parametrize(
    ("body", "failed"),
    [
        (b"data: 1\n\n", False),
        (b"", False),
        (b"event: error\ndata: {}\n\n", True),
        (b"event: cancelled\ndata: {}\n\n", True),
        (b'data: {"type": "error"}\n\ndata: [DONE]\n\n', True),
        (b"data: [DONE]\n\n", False),
        (b"event: error\ndata: {}\n\nevent: complete\ndata:\n\n", False),
    ],
)
async def test_a_stream_that_failed_is_known_by_its_last_word(foreign: Upstream, body: bytes, failed: bool) -> None:
    foreign.plan(stream(body) if body else over)
    async with connect(foreign.url) as source:
        async for _ in source:
            pass
        assert source.failed is failed


def test_no_text_holds_the_address(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "sseapp")
    with pytest.raises(GaveUp) as raised:
        anyio.run(lambda: collect(f"http://127.0.0.1:{free_port()}/s3cret?token=s3cret", give_up_s=0.01))
    assert "s3cret" not in str(raised.value) + "".join(r.getMessage() for r in caplog.records if r.name == "sseapp")
