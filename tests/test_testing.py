"""`ssecore.testing`: endless answers in-process, leaving, a window that is shut, errors; and a clock that jumps."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

import anyio
import anyio.lowlevel
import httpx
import pytest
from anyio import current_time

from sseapp import GET, POST, Event, Request, Settings, SSEApp, Upload
from ssecore.testing import Transport, VirtualClockLoop, connect
from ssecore.wire import HEARTBEAT
from tests.house import Backend, in_virtual_time

#: Seconds of virtual time after which a test has hung.
LIMIT_S: Final = 10_000
START: Final = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


@pytest.fixture
def anyio_backend() -> Backend:
    """test_stream.py uses all of this on trio too."""
    return in_virtual_time()


def part(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Ticker:
    """A bare ASGI app, not of ours, with an endless answer. Takes its time to end."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.body = b""
        self.sent = 0
        self.gone_at: float | None = None  #: when it was told that the client has left
        self.ended = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        more = True
        while more:
            message = await receive()
            self.body += message["body"]
            more = message["more_body"]

        async def tick() -> None:
            await send(START)
            while True:
                await send(part(b"tick %d\n" % self.sent))
                self.sent += 1
                await anyio.sleep(1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            assert (await receive())["type"] == "http.disconnect"
            self.gone_at = current_time()
            tasks.cancel_scope.cancel()
        await anyio.sleep(0.5)
        self.ended += 1


async def countdown(request: Request, seconds: int) -> AsyncIterator[Event]:
    for remaining in range(seconds, 0, -1):
        yield Event({"remaining": remaining}, event="countdown")
        await anyio.sleep(1)
    yield Event("", event="complete")


async def echo(request: Request) -> AsyncIterator[Event]:
    yield Event(request.body.read().decode())


def ours() -> SSEApp:
    routes = [GET("/countdown/{seconds:int}", countdown), POST("/echo", echo, body=Upload("text/plain"))]
    return SSEApp(routes, Settings(log="memory"))


def client_of(app: Any, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=Transport(app, **options), base_url="http://localhost")


# connect


async def test_an_endless_answer_is_read_chunk_by_chunk() -> None:
    app = Ticker()
    async with connect(app) as exchange:
        for number in range(5):
            assert await exchange.chunk() == b"tick %d\n" % number
            assert current_time() == number
        assert (exchange.status, exchange.headers) == (200, {"content-type": "text/plain"})
        assert exchange.started.is_set() and not exchange.ended.is_set() and not exchange.complete


async def test_leaving_the_block_tells_the_app_and_waits_for_its_end() -> None:
    app = Ticker()
    async with connect(app) as exchange:
        await anyio.sleep(2.5)
    assert app.gone_at == 2.5
    assert app.ended == 1 and current_time() == 3
    assert exchange.ended.is_set() and not exchange.complete


async def test_one_can_leave_without_leaving_the_block() -> None:
    app = Ticker()
    async with connect(app) as exchange:
        await anyio.sleep(2.5)
        exchange.disconnect()
        await exchange.ended.wait()
        assert app.gone_at == 2.5
        with pytest.raises(anyio.ClosedResourceError):
            await exchange.chunk()


async def test_what_is_sent_after_the_client_has_left_goes_nowhere() -> None:
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        for _ in range(5):
            await anyio.sleep(1)
            await send(part(b"x"))
            sent.append(current_time())
        await send(part(b"", more=False))

    async with connect(app, window=1) as exchange:
        await anyio.sleep(1.5)
    assert sent == [1, 2, 3, 4, 5]
    assert not exchange.complete


async def test_an_app_that_does_not_end_when_its_client_leaves_is_a_timeout() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await anyio.sleep_forever()

    with pytest.raises(TimeoutError):
        async with connect(app, leave_s=3):
            pass
    assert current_time() == 3


async def test_an_exception_in_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError) as info:
        async with connect(Ticker()) as exchange:
            assert await exchange.chunk()
            raise KeyError("mine")
    assert info.value.args == ("mine",)
    del info, exchange
    gc.collect()  # nothing was left open: warnings are errors


@pytest.mark.parametrize("before", ["nothing", "start", "body", "end"])
@pytest.mark.parametrize("reading", [True, False])
async def test_an_exception_of_the_app_comes_out(before: str, reading: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if before != "nothing":
            await send(START)
        if before == "body":
            await send(part(b"one"))
        if before == "end":
            await send(part(b"one", more=False))
        await anyio.sleep(1)
        raise LookupError("broken")

    with pytest.raises(LookupError, match="broken"):
        async with connect(app) as exchange:
            if reading:
                while await exchange.chunk() is not None:
                    pass
            else:
                await exchange.ended.wait()


async def test_an_exception_while_the_app_closes_comes_out() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await receive()
        await receive()
        raise LookupError("broken on the way out")

    with pytest.raises(LookupError, match="on the way out"):
        async with connect(app):
            await anyio.sleep(1)


async def test_an_app_that_returns_without_an_answer_has_no_status() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    async with connect(app) as exchange:
        assert await exchange.chunk() is None
        assert (exchange.status, exchange.complete) == (0, False)


async def test_a_send_that_is_entered_twice_is_an_error() -> None:
    blocked = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await blocked.wait()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send, part(b"one"))
            tasks.start_soon(send, part(b"two"))

    with pytest.raises(BaseExceptionGroup) as info:
        async with connect(app) as exchange:
            await exchange.started.wait()
            exchange.block()
            blocked.set()
            await exchange.ended.wait()
    assert info.group_contains(AssertionError, match="another send was in flight")


@pytest.mark.parametrize(
    "messages",
    [[part(b"x")], [START, part(b"x", more=False), part(b"y")], [START, START]],
    ids=["no start", "after the end", "two starts"],
)
async def test_an_answer_out_of_order_is_an_error(messages: list[Any]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    with pytest.raises(AssertionError):
        async with connect(app) as exchange:
            await exchange.ended.wait()


async def test_a_blocked_send_waits_until_it_is_unblocked() -> None:
    app = Ticker()
    async with connect(app) as exchange:
        assert await exchange.chunk() == b"tick 0\n"
        exchange.block()
        exchange.block()
        await anyio.sleep(10)
        assert app.sent == 1
        exchange.unblock()
        assert [await exchange.chunk() for _ in range(3)] == [b"tick 1\n", b"tick 2\n", b"tick 3\n"]
        assert current_time() == 12


async def test_a_send_can_be_blocked_from_the_very_start() -> None:
    app = Ticker()
    async with connect(app) as exchange:
        exchange.block()
        await anyio.sleep(10)
        assert not exchange.started.is_set() and exchange.status == 0
        exchange.unblock()
        await exchange.started.wait()
        assert exchange.status == 200


async def test_a_blocked_send_does_not_hold_up_the_client_that_leaves() -> None:
    app = Ticker()
    async with connect(app) as exchange:
        assert await exchange.chunk()
        exchange.block()
        await anyio.sleep(5)
    assert (app.gone_at, app.ended) == (5, 1)


@pytest.mark.parametrize("window", [0, 1, 5])
async def test_a_window_holds_an_app_back_whose_answer_nobody_reads(window: int) -> None:
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send(START)
        for _ in range(20):
            await send(part(b"x"))
            sent += 1
        await send(part(b"", more=False))

    async with connect(app, window=window) as exchange:
        for read in range(10):
            await anyio.sleep(1)
            assert sent == window + read
            assert await exchange.chunk() == b"x"
        assert len(await exchange.body()) == 10
        assert exchange.complete


async def test_a_body_arrives_in_as_many_parts_as_it_was_given() -> None:
    received = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            received.append((message["body"], message["more_body"]))
            more = message["more_body"]
        await send(START)
        await send(part(b"", more=False))

    for body in (b"", b"whole", [], [b"a"], [b"a", b"", b"b" * 100_000]):
        async with connect(app, "POST", "/", body=body) as exchange:
            assert await exchange.body() == b""
    assert received == [
        (b"", False),
        (b"whole", False),
        (b"", False),
        (b"a", False),
        (b"a", True),
        (b"", True),
        (b"b" * 100_000, False),
    ]


async def test_a_scope_is_as_a_server_makes_it() -> None:
    app = Ticker()
    async with connect(
        app, "PUT", "/a%20b/%C3%A9?q=%20&x=1", headers={"X-Name": "Märchen", "accept": "*/*"}, root_path="/mount"
    ) as exchange:
        await exchange.started.wait()
    (scope,) = app.scopes
    assert (scope["type"], scope["method"], scope["http_version"], scope["scheme"]) == ("http", "PUT", "1.1", "http")
    assert (scope["path"], scope["root_path"]) == ("/mount/a b/é", "/mount")
    assert scope["query_string"] == b"q=%20&x=1"
    assert scope["headers"] == [(b"x-name", "Märchen".encode("latin-1")), (b"accept", b"*/*")]
    assert scope["asgi"]["version"] == "3.0"


async def test_events_are_decoded_and_can_be_read_in_instalments() -> None:
    app = ours()
    async with app.running(), connect(app, "GET", "/countdown/3") as exchange:
        async with aclosing(exchange.events()) as events:
            seen = [await anext(events), await anext(events)]
        seen += [event async for event in exchange.events()]
    assert [(event.event, event.data) for event in seen] == [
        ("countdown", '{"remaining":3}'),
        ("countdown", '{"remaining":2}'),
        ("countdown", '{"remaining":1}'),
        ("complete", ""),
    ]
    assert exchange.complete


async def test_events_that_came_in_one_chunk_are_not_lost_between_instalments() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(part(b"data: one\n\ndata: two\n\ndata: th"))
        await send(part(b"ree\n\n", more=False))

    async with connect(app) as exchange:
        seen = []
        for _ in range(3):
            async with aclosing(exchange.events()) as events:
                seen.append((await anext(events)).data)
    assert seen == ["one", "two", "three"]


async def test_many_exchanges_with_one_app_stay_apart() -> None:
    app = Ticker()
    async with connect(app) as one, connect(app) as two:
        one.block()
        assert await two.chunk()
        two.disconnect()
        await two.ended.wait()
        one.unblock()
        assert await one.chunk()
    assert app.ended == 2


async def test_an_app_that_is_mounted_finds_its_path() -> None:
    app = ours()
    async with app.running(), connect(app, "GET", "/countdown/0", root_path="/deep/mount") as exchange:
        assert exchange.status in (0, 200)
        assert [event.event async for event in exchange.events()] == ["complete"]


# Transport


async def test_httpx_streams_an_endless_answer() -> None:
    app = Ticker()
    async with client_of(app) as client:
        async with client.stream("GET", "/") as response:
            assert (response.status_code, response.headers["content-type"]) == (200, "text/plain")
            chunks = response.aiter_raw()
            assert [await anext(chunks) for _ in range(3)] == [b"tick 0\n", b"tick 1\n", b"tick 2\n"]
            assert current_time() == 2
            await chunks.aclose()  # type: ignore[attr-defined]
        # The block has waited for the app.
        assert (app.gone_at, app.ended) == (2, 1)


async def test_httpx_reads_a_whole_answer() -> None:
    app = ours()
    async with app.running(), client_of(app) as client:
        response = await client.get("/countdown/2")
        assert response.status_code == 200
        assert response.text.startswith("retry: ") and response.text.endswith("event: complete\ndata: \nid: end\n\n")
        assert (await client.get("/nowhere")).json()["status"] == 404
        assert (await client.head("/countdown/2")).content == b""


async def test_httpx_sends_a_body_in_many_parts() -> None:
    async def content() -> AsyncIterator[bytes]:
        for letter in (b"a", b"b", b"c"):
            await anyio.sleep(1)
            yield letter * 1000

    app = ours()
    async with app.running(), client_of(app) as client:
        response = await client.post("/echo", content=content(), headers={"content-type": "text/plain"})
        assert f"data: {'a' * 1000 + 'b' * 1000 + 'c' * 1000}\n" in response.text
        response = await client.post("/echo", content=b"whole", headers={"content-type": "text/plain"})
        assert "data: whole\n" in response.text


async def test_httpx_requests_carry_root_path_query_and_headers() -> None:
    app = Ticker()
    async with client_of(app, root_path="/mount") as client:
        async with client.stream("GET", "/a%20b", params={"q": "x y"}, headers={"X-Name": "value"}):
            pass
    (scope,) = app.scopes
    assert (scope["root_path"], scope["path"], scope["query_string"]) == ("/mount", "/mount/a b", b"q=x+y")
    headers = dict(scope["headers"])
    assert headers[b"x-name"] == b"value" and headers[b"host"] == b"localhost"


async def test_httpx_sees_every_header_of_an_answer() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        cookies = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
        await send({"type": "http.response.start", "status": 200, "headers": cookies})
        await send(part(b"", more=False))

    async with client_of(app) as client:
        response = await client.get("/")
        assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]


async def test_httpx_holds_an_app_back_whose_answer_nobody_reads() -> None:
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send(START)
        while sent < 100:
            await send(part(b"x"))
            sent += 1
        await send(part(b"", more=False))

    async with client_of(app, window=3) as client, client.stream("GET", "/") as response:
        await anyio.sleep(5)
        assert sent == 3
        assert len(await response.aread()) == 100


async def test_many_requests_at_once_over_one_client() -> None:
    app, counts = ours(), []

    async def read(client: httpx.AsyncClient, seconds: int) -> None:
        response = await client.get(f"/countdown/{seconds}")
        counts.append((response.text.count("event: countdown"), current_time()))

    async with app.running(), client_of(app) as client, anyio.create_task_group() as tasks:
        for seconds in range(10):
            tasks.start_soon(read, client, seconds)
    assert counts == [(seconds, seconds) for seconds in range(10)]


async def test_an_answer_that_is_cut_is_an_error_as_on_a_socket() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(part(b"half"))

    async with client_of(app) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")


async def test_no_answer_is_an_error_as_on_a_socket() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    async with client_of(app) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")


@pytest.mark.parametrize("before", ["nothing", "start", "body", "end"])
async def test_an_exception_of_the_app_comes_out_of_httpx(before: str) -> None:
    """Wherever it was raised: after the last part of its answer, too."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if before != "nothing":
            await send(START)
        if before == "body":
            await send(part(b"one"))
        if before == "end":
            await send(part(b"one", more=False))
        await anyio.sleep(1)
        raise LookupError("broken")

    with pytest.raises(LookupError, match="broken"):
        async with client_of(app) as client:
            await client.get("/")


async def test_an_exception_while_the_app_closes_comes_out_of_httpx() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await receive()
        await receive()
        raise LookupError("broken on the way out")

    with pytest.raises(LookupError, match="on the way out"):
        async with client_of(app) as client, client.stream("GET", "/"):
            await anyio.sleep(1)


async def test_an_app_that_does_not_end_when_its_client_leaves_is_a_timeout_of_httpx() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await anyio.sleep_forever()

    with pytest.raises(TimeoutError):
        async with client_of(app, leave_s=3) as client, client.stream("GET", "/"):
            pass
    assert current_time() == 3


async def test_an_exception_in_the_block_of_a_client_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with client_of(Ticker()) as client, client.stream("GET", "/"):
            raise KeyError("mine")


@pytest.mark.parametrize("answered", [False, True])
async def test_a_request_that_is_given_up_tells_the_app(answered: bool) -> None:
    """Cancelled while it waits for the answer's start, or for its body, as by a timeout of the caller."""
    gone = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if answered:
            await send(START)
        assert (await receive())["type"] == "http.disconnect"
        gone.append(current_time())

    async with client_of(app) as client:
        with anyio.move_on_after(2):
            await client.get("/")
        await anyio.sleep(1)
        assert gone == [2]


async def test_a_client_that_is_closed_leaves_what_is_open() -> None:
    app = Ticker()
    client = client_of(app)
    async with client:
        request = client.build_request("GET", "/")
        response = await client.send(request, stream=True)
        assert response.status_code == 200
        await anyio.sleep(1)
    await response.aclose()
    assert app.sent >= 1


async def test_a_client_without_its_block_says_what_to_do() -> None:
    client = client_of(Ticker())
    with pytest.raises(RuntimeError, match="async with"):
        await client.get("/")


async def test_the_example_of_the_module_works() -> None:
    app = ours()
    async with (
        app.running(),
        client_of(app) as client,
        client.stream("GET", "/countdown/3") as response,
    ):
        lines = [line async for line in response.aiter_lines()]
    assert lines.count("event: countdown") == 3


# Clocks


async def test_a_sleep_takes_no_time_and_time_passes() -> None:
    await anyio.sleep(86_400)
    assert current_time() == pytest.approx(86_400)


async def test_those_who_sleep_wake_in_the_order_of_their_times() -> None:
    woken = []

    async def sleep(seconds: float) -> None:
        await anyio.sleep(seconds)
        woken.append((seconds, current_time()))

    async with anyio.create_task_group() as tasks:
        for seconds in (30, 0.1, 7, 1000, 0.2):
            tasks.start_soon(sleep, seconds)
    assert [seconds for seconds, _ in woken] == [0.1, 0.2, 7, 30, 1000]
    assert all(at == pytest.approx(seconds) for seconds, at in woken)


async def test_time_stands_still_while_somebody_works() -> None:
    with anyio.move_on_after(0.001):
        for _ in range(1000):
            await anyio.lowlevel.checkpoint()
        assert current_time() == 0


async def test_heartbeats_are_seen_without_waiting_for_them() -> None:
    async def quiet(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep(3600)
        yield Event("at last")

    app = SSEApp([GET("/", quiet)], Settings(log="memory"))
    with anyio.fail_after(LIMIT_S):
        async with app.running(), connect(app) as exchange:
            body = await exchange.body()
    assert body.count(HEARTBEAT) >= 220
    assert body.endswith(b"data: at last\nid: end\n\n")


def test_a_loop_of_virtual_time_serves_asyncio_alone() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        called = loop.create_future()
        loop.call_later(5000, called.set_result, None)
        await asyncio.wait_for(called, 10_000)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100):
                await asyncio.sleep(1000)
        return loop.time()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        assert runner.run(main()) == pytest.approx(5100)


def test_a_loop_of_virtual_time_is_woken_by_a_thread() -> None:
    async def main() -> int:
        return await asyncio.to_thread(lambda: 42)

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        assert runner.run(main()) == 42


def test_two_loops_of_virtual_time_have_two_clocks() -> None:
    async def main(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return asyncio.get_running_loop().time()

    with (
        asyncio.Runner(loop_factory=VirtualClockLoop) as one,
        asyncio.Runner(loop_factory=VirtualClockLoop) as two,
    ):
        assert one.run(main(100)) == pytest.approx(100)
        assert two.run(main(1)) == pytest.approx(1)
