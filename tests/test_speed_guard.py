"""What a stream costs, counted and not timed: sends, turns of the loop, what is made and what is kept.

These fail where somebody makes an event dearer, on a busy machine as on an idle one. The figures on a clock are the
benchmarks'.
"""

import asyncio
import gc
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from types import FrameType, SimpleNamespace
from typing import Any, Final

import anyio
import pytest

import ssecore.log.tail
import ssecore.streaming.sender
from handlers.chat import Prompt, chat, open_model
from sseapp import SSEApp
from ssecore.http.request import Request
from ssecore.http.routes import GET, Run
from ssecore.settings import Settings
from ssecore.topics import Subscription
from ssecore.wire import Event
from tests.needs import needs
from tests.protocol import Wire, connected
from tests.upstream import DONE, FIRST, STOP, Call, token
from tests.upstream import serve as serve_upstream

EVENTS: Final = 1000
READERS: Final = 100
REQUEST: Final = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
#: What uvicorn, asyncio and this test's own waiting take around a stream, whatever its length.
AROUND: Final = 40


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Callbacks of the loop: a task that is woken is one."""
    found: Counter[str] = Counter()
    call_soon = asyncio.BaseEventLoop.call_soon

    def counting(self: Any, callback: Any, *args: Any, **options: Any) -> asyncio.Handle:
        found["callbacks"] += 1
        return call_soon(self, callback, *args, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon", counting)
    return found


@asynccontextmanager
async def running(handler: Callable[..., Any]) -> AsyncIterator[SSEApp]:
    app = SSEApp([GET("/", handler)], Settings(log="memory"))
    with anyio.fail_after(30):
        async with app.running():
            yield app


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 - turn by turn: it looks at what has no event
        await asyncio.sleep(0)


async def to_the_end(app: SSEApp) -> None:
    """Until the one stream there is has ended."""
    await until(lambda: app._streams)
    await app._no_streams()


async def whole(app: SSEApp) -> Wire:
    with connected(app, REQUEST) as (_, wire):
        await to_the_end(app)
    return wire


@pytest.mark.usefixtures("long_turns")
async def test_events_that_are_ready_together_travel_together(counted: Counter[str]) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for n in range(EVENTS):
            yield Event({"n": n, "message": f"Update {n}"}, "message")

    async with running(handler) as app:
        await whole(app)  # what is made once
        counted.clear()
        wire = await whole(app)
    body = wire.body
    assert body.count(b"\ndata: ") == EVENTS
    # The head; the events, 64 KiB at a time; the end with the last of them.
    assert len(wire.written) <= 1 + len(body) // 65536 + 1
    assert counted["callbacks"] <= AROUND


async def test_an_event_that_is_alone_costs_one_send_and_no_turn_of_the_loop(counted: Counter[str]) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for n in range(EVENTS):
            yield Event({"n": n})
            await asyncio.sleep(0)  # one callback: the generator's own

    async with running(handler) as app:
        await whole(app)
        counted.clear()
        wire = await whole(app)
    assert len(wire.written) <= EVENTS + 3
    assert counted["callbacks"] <= EVENTS + AROUND


async def test_a_models_token_costs_one_turn_of_the_loop_from_the_upstreams_socket_to_the_clients(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    tokens = 100

    def script(call: Call) -> None:
        call.head()
        call.send(FIRST)
        for _ in range(tokens):
            time.sleep(0.002)  # else some of them come together, and cost less
            call.send(token("Hi"))
        call.send(STOP, DONE)
        call.end()

    with serve_upstream() as upstream:
        upstream.plan(script, script)
        async with open_model(Settings(openai_base_url=upstream.url)) as model:

            async def handler(request: Request) -> AsyncIterator[Event]:
                request.state = SimpleNamespace(model=model)
                request.query = Prompt("Hello")
                async for event in chat(request):
                    yield event

            async with running(handler) as app:
                await whole(app)
                counted.clear()
                wire = await whole(app)
    assert wire.body.count(b'"Hi"') == tokens
    assert tokens / 2 < len(wire.written) <= tokens + 5
    assert counted["callbacks"] <= tokens + AROUND  # of the task that reads: nothing else is woken


@pytest.mark.parametrize("linger_s", [None, 60.0])
async def test_a_run_at_work_has_the_task_of_its_generator_and_no_other(linger_s: float | None) -> None:
    async def handler(request: Request | None) -> AsyncIterator[Event]:
        yield Event("here")
        await anyio.sleep_forever()

    async with running(handler) as app:
        before = len(asyncio.all_tasks())
        for _ in range(READERS):
            await app.runs.start(handler(None), caller=None, run=Run(linger_s=linger_s))
        assert len(asyncio.all_tasks()) == before + READERS


async def test_nothing_is_kept_of_events_that_were_sent() -> None:
    sizes: list[int] = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        for n in range(10 * EVENTS):
            yield Event({"n": n})
            if not n % 100:
                wires[-1].written.clear()
                await asyncio.sleep(0)
                sizes.append(sys.getallocatedblocks())

    wires: list[Wire] = []
    async with running(handler) as app:
        with connected(app, REQUEST) as (_, wire):
            wires.append(wire)
            await to_the_end(app)
    # Less than one object for ten events, after the first fifth.
    assert sizes[-1] - sizes[20] < 8 * EVENTS / 10


@needs("time")
@pytest.mark.parametrize("what", ["generator", "reader"])
async def test_a_stream_whose_client_left_leaves_nothing_to_the_garbage_collector(what: str) -> None:
    """Else what thousands of streams have left waits for its next pass, which is long."""

    async def generator(request: Request) -> AsyncIterator[Event]:
        yield Event("here")
        await anyio.sleep_forever()

    async def reader(request: Request) -> Subscription:
        return Subscription("news", Event("here", "init"))

    async with running(generator if what == "generator" else reader) as app:

        async def come_and_go() -> None:
            with connected(app, REQUEST) as (protocol, wire):
                await until(lambda: b"here" in wire.body)
            await until(lambda: not protocol.server_state.tasks)

        with connected(app, REQUEST) as (_, wire):  # stays, and with it what all share
            await until(lambda: b"here" in wire.body)
            gc.collect()
            gc.disable()
            try:
                for _ in range(READERS):
                    await come_and_go()
                assert gc.collect() < 20 * READERS  # uvicorn's own are 13
            finally:
                gc.enable()


@needs("time")
@pytest.mark.parametrize("size", [20, 10_000], ids=["small events", "large events"])
async def test_idle_readers_keep_nothing_of_what_they_read_from_the_log(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def news(request: Request) -> Subscription:
        return Subscription("news", Event("hello", "init"))

    monkeypatch.setattr(Wire, "write", lambda wire, data: wire.written.append(bytes(data[-100:])))
    async with running(news) as app:
        assert app._services is not None
        topics = app._services.topics
        first = await topics.publish("news", Event("first"))
        for _ in range(2_000_000 // size // 100):
            await topics.publish("news", *[Event("x" * size)] * 100)
        await topics.publish("news", Event("last"))
        request = b"GET / HTTP/1.1\r\nhost: localhost\r\nlast-event-id: %b\r\n\r\n" % str(first).encode()

        async def read() -> int:
            """Traced memory in use when three readers at once have read all of it."""
            with ExitStack() as stack:
                readers = [stack.enter_context(connected(app, request)) for _ in range(3)]
                await until(lambda: all(wire.written and b"data: last" in wire.written[-1] for _, wire in readers))
                gc.collect()
                return tracemalloc.get_traced_memory()[0]

        await read()  # what is made once
        await until(lambda: not app._streams)
        tracemalloc.start()
        try:
            kept = await read()
        finally:
            tracemalloc.stop()
    assert kept < 100 * 1024


@asynccontextmanager
async def audience() -> AsyncIterator[tuple[Callable[[str], Awaitable[Any]], list[Wire]]]:
    async def news(request: Request) -> Subscription:
        return Subscription("news", Event("hello", "init"))

    async with running(news) as app:
        with ExitStack() as stack:
            wires = [stack.enter_context(connected(app, REQUEST))[1] for _ in range(READERS)]
            await until(lambda: all(b"init" in wire.body for wire in wires))
            assert app._services is not None
            topics = app._services.topics
            try:
                yield lambda text: topics.publish("news", Event(text)), wires
            finally:
                app.abort()
                await until(lambda: not app._streams)


async def test_a_broadcast_is_framed_once_and_costs_each_reader_one_write(
    monkeypatch: pytest.MonkeyPatch, counted: Counter[str]
) -> None:
    made: Counter[str] = Counter()
    counters = ((ssecore.log.tail, "chunk"), (ssecore.log.tail, "framed"), (ssecore.streaming.sender.Sender, "_work"))
    for module, name in counters:
        original = getattr(module, name)

        def counting(*args: Any, name: str = name, original: Callable[..., Any] = original, **options: Any) -> Any:
            made[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(module, name, counting)
    async with audience() as (publish, wires):
        await publish("first")
        await until(lambda: all(b"first" in wire.body for wire in wires))
        before = [len(wire.written) for wire in wires]
        made.clear()
        counted.clear()
        for n in range(10):
            await publish(f"event {n}")
            await until(lambda n=n: all(f"event {n}".encode() in wire.written[-1] for wire in wires))  # type: ignore[misc]
        assert [len(wire.written) for wire in wires] == [10 + count for count in before]
        assert made == {"chunk": 10, "framed": 10}  # and no task
        # Not one for each of the thousand deliveries.
        assert counted["callbacks"] <= 10 * 20


@contextmanager
def lines_run() -> Iterator[Counter[str]]:
    """Counts the lines of the engine that run in this thread; a loop's count each time."""
    found: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if "ssecore" not in frame.f_code.co_filename:
            return None
        found[event] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield found
    finally:
        sys.settrace(before)


async def test_a_publication_costs_as_much_with_a_full_tail_as_with_an_empty_one() -> None:
    async with audience() as (publish, wires):

        async def cost() -> int:
            """The least of three: a publication may meet the end of the round before it."""
            costs = []
            for n in range(3):
                with lines_run() as found:
                    await publish(f"counted {n}")
                    await until(lambda n=n: all(f"counted {n}".encode() in wire.written[-1] for wire in wires))  # type: ignore[misc]
                costs.append(found["line"])
            return min(costs)

        await publish("first")
        await until(lambda: all(b"first" in wire.body for wire in wires))
        empty = await cost()
        for n in range(EVENTS):
            await publish(f"event {n}")
        await until(lambda: all(b"event 999" in wire.body for wire in wires))
        assert await cost() < empty + 100


async def test_a_delivery_makes_nothing_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with audience() as (publish, wires):
        delivered: Counter[int] = Counter()
        for number, wire in enumerate(wires):

            def noted(data: Any, number: int = number) -> None:
                delivered[number] += 1

            monkeypatch.setattr(wire, "write", noted)
        for n in range(20):
            await publish(f"warm {n}")
            await until(lambda n=n: len(delivered) == READERS and min(delivered.values()) > n)  # type: ignore[misc]
        tracemalloc.start()
        try:
            await publish("one more")
            await asyncio.sleep(0)
            await until(lambda: min(delivered.values()) == 21)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # All of it together: the event, its frames, the round. A message and a coroutine for each would be 40 KiB.
    assert peak < 100 * READERS
