"""The life of a stream, in virtual time: no test waits, and each moment is exact. Each test runs on both backends, and
on asyncio in the way of our runner as well, where streams are parked on lines.

Nothing here depends on the order in which ready tasks run (trio shuffles it on purpose).
"""

import asyncio
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, get_args

import anyio
import anyio.lowlevel
import orjson
import pytest
import trio
from anyio import CancelScope, current_time, get_cancelled_exc_class
from hypothesis import given, settings
from hypothesis import strategies as st

from sseapp import SSEApp
from ssecore.dialects import DATA_ONLY, NAMED
from ssecore.errors import NotFound, SSEAppError
from ssecore.http.request import EndReason, Request
from ssecore.http.responses import ByteStream, Response
from ssecore.http.routes import GET, POST, Route
from ssecore.settings import Settings
from ssecore.streaming.pump import CLOSE_S, FIRST_ITEM_S
from ssecore.testing import Exchange, connect
from ssecore.wire import HEARTBEAT, Decoder, Event, encode
from tests.clients import stand_still
from tests.house import Backend, in_virtual_time, settle
from tests.lines import is_parked, lines_offered
from tests.raising_app import KINDS

App = Callable[[MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Any]
Handler = Callable[..., AsyncIterator[Event]]

#: Seconds of virtual time after which a test has hung.
LIMIT_S: Final = 10_000
#: How long the handlers here take to close. Each of its waits is one at which a second cancellation could strike.
CLOSING_S: Final = 0.3
RETRY: Final = b"retry: 2000\n"
REFERENCE: Final = rb"internal error \(reference ([0-9a-f]{12})\)"


@pytest.fixture(params=["asyncio", "trio", "parked"])
def anyio_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with lines_offered(request.param == "parked"):
        yield in_virtual_time("trio" if request.param == "trio" else "asyncio")


def app_of(handler: Callable[..., Any], method: str = "GET", *, data_only: bool = False, **values: Any) -> SSEApp:
    """An app with this handler alone; `values` are settings."""
    return app_with(Route(method, "/", handler, dialect=DATA_ONLY if data_only else NAMED), **values)


def app_with(*routes: Route, **values: Any) -> SSEApp:
    return SSEApp(routes, Settings(log="memory", **values))


@asynccontextmanager
async def opened(app: SSEApp, *args: Any, through: App | None = None, **options: Any) -> AsyncIterator[Exchange]:
    """The app running, and one request to it (`through` what stands in front of it)."""
    with anyio.fail_after(LIMIT_S):
        async with app.running(), connect(through or app, *args, **options) as exchange:
            yield exchange


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  #: when each chunk came
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def events(self) -> list[Event]:
        return Decoder().feed(self.body)

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


async def rest(exchange: Exchange) -> Answer:
    """All that is still to come, to the end of the app."""
    answer = Answer()
    while (chunk := await exchange.chunk()) is not None:
        answer.chunks.append(chunk)
        answer.times.append(current_time())
    await exchange.ended.wait()
    answer.status, answer.headers, answer.complete = exchange.status, exchange.headers, exchange.complete
    return answer


async def ask(app: SSEApp, *args: Any, **options: Any) -> Answer:
    async with opened(app, *args, **options) as exchange:
        return await rest(exchange)


class Trace:
    """What became of a generator that ends with `finally: await trace.close(request.end_reason)`."""

    def __init__(self) -> None:
        self.reasons: list[EndReason] = []  #: what it knew in its `finally`
        self.closed_at: list[float] = []  #: when that had come to its end

    async def close(self, reason: EndReason) -> None:
        self.reasons.append(reason)
        # On trio a cleanup that awaits shields itself, in anybody's program.
        with CancelScope(shield=get_cancelled_exc_class() is trio.Cancelled):
            for _ in range(3):  # as a pool does that gives a connection back
                await anyio.sleep(CLOSING_S / 3)
        self.closed_at.append(current_time())

    def assert_closed(self, reason: EndReason) -> None:
        assert self.reasons == [reason]
        assert len(self.closed_at) == 1, "its cleanup was cut short"


def assert_undisturbed(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody had to be cancelled twice, and nothing failed."""
    assert [record.getMessage() for record in caplog.records if record.name == "sseapp"] == []


# A failure before the first event


async def test_a_failure_before_the_first_event_is_a_problem_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep(FIRST_ITEM_S / 2)
        raise RuntimeError("the password is hunter2")
        yield Event("never")

    answer = await ask(app_of(handler))
    assert (answer.status, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "cache-control" not in answer.headers and answer.complete
    assert answer.json["title"] == "Internal Server Error" and answer.json["code"] == "internal_error"
    assert b"hunter2" not in answer.body

    reference = re.fullmatch(REFERENCE, answer.json["detail"].encode())
    assert reference
    (record,) = caplog.records
    assert reference[1].decode() in record.getMessage()
    assert record.exc_info and "hunter2" in str(record.exc_info[1])


async def test_an_exception_of_our_own_before_the_first_event_keeps_status_text_and_field() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        raise NotFound("there is no such job", field="job", headers={"x-hint": "ask again"})
        yield Event("never")

    answer = await ask(app_of(handler))
    assert answer.status == 404 and answer.headers["x-hint"] == "ask again"
    assert answer.json == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "there is no such job",
        "code": "not_found",
        "field": "job",
    }


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (Event("x", event="a\nb"), "event"),
        (Event("x", id="a\0"), "id"),
        (Event("x", retry=True), "retry"),
        (Event("\ud800"), "data"),
        (Event(object()), "data"),
    ],
    ids=["event", "id", "retry", "surrogate", "json"],
)
async def test_a_first_event_that_cannot_be_encoded_is_a_problem_that_names_the_field(event: Event, name: str) -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield event
        finally:
            await trace.close(request.end_reason)

    answer = await ask(app_of(handler))
    assert (answer.status, answer.json["code"], answer.json["field"]) == (500, "encode_error", name)
    assert len(trace.closed_at) == 1


async def test_a_plain_value_error_before_the_first_event_is_an_internal_error() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        raise ValueError("secret")
        yield Event("never")

    answer = await ask(app_of(handler))
    assert answer.status == 500 and b"secret" not in answer.body and "field" not in answer.json


async def test_a_failure_after_the_first_second_is_an_event() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep(FIRST_ITEM_S + 0.001)
        raise NotFound("gone")
        yield Event("never")

    answer = await ask(app_of(handler))
    assert answer.status == 200
    assert answer.chunks == [RETRY, b'event: error\ndata: {"error":"gone","code":"not_found"}\nid: end\n\n']
    assert answer.times == pytest.approx([FIRST_ITEM_S, FIRST_ITEM_S + 0.001])


async def test_a_failure_at_the_very_end_of_the_first_second_is_a_problem_or_an_event_and_never_both() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep(FIRST_ITEM_S)
        raise NotFound("gone")
        yield Event("never")

    answer = await ask(app_of(handler))
    assert answer.complete
    if answer.status == 404:
        assert answer.json["detail"] == "gone"
    else:
        assert answer.status == 200
        assert answer.body == RETRY + b'event: error\ndata: {"error":"gone","code":"not_found"}\nid: end\n\n'


# A failure after the first event


@pytest.mark.parametrize("wait_s", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_failure_after_the_first_event_is_an_error_event(method: str, wait_s: float) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        if wait_s:
            await anyio.sleep(wait_s)
        raise RuntimeError("secret")

    answer = await ask(app_of(handler, method), method)
    assert (answer.status, answer.complete) == (200, True)
    end = b"id: end\n" if method == "GET" else b""
    error = b'event: error\ndata: {"error":"' + REFERENCE + b'","code":"internal_error"}\n'
    assert re.fullmatch(re.escape(RETRY + b"data: one\n\n") + error + end + b"\n", answer.body)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_failure_on_a_data_only_route_is_data_and_done(method: str) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(0.1)
        raise SSEAppError("the model is asleep", code="asleep")

    answer = await ask(app_of(handler, method, data_only=True), method)
    end = b"id: end\n" if method == "GET" else b""
    assert answer.body == (
        RETRY + b'data: one\n\ndata: {"type":"error","error":"the model is asleep","code":"asleep"}\n\n'
        b"data: [DONE]\n" + end + b"\n"
    )


async def test_a_later_event_that_cannot_be_encoded_is_an_error_event_and_no_byte_of_it_is_sent() -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            yield Event("two", event="a\rb")
            yield Event("three")
        finally:
            await trace.close(request.end_reason)

    answer = await ask(app_of(handler))
    assert [event.event for event in answer.events] == [None, "error"]
    assert orjson.loads(answer.events[1].data)["code"] == "encode_error"
    assert b"two" not in answer.body and b"three" not in answer.body
    assert len(trace.closed_at) == 1


@pytest.mark.parametrize("before", [0, 1])
async def test_a_handler_that_yields_something_else_is_told_what_to_do(
    before: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Request) -> AsyncIterator[Any]:
        for _ in range(before):
            yield Event("one")
        yield {"data": "x"}

    answer = await ask(app_of(handler))
    assert answer.status == (200 if before else 500)
    assert re.search(REFERENCE, answer.body)
    (record,) = caplog.records
    assert record.exc_info and record.exc_info[0] is TypeError
    assert str(record.exc_info[1]) == "a handler yields Event objects, not dict"


@pytest.mark.parametrize("before", [0, 1])
async def test_a_handler_that_is_cancelled_from_within_says_so(before: int, caplog: pytest.LogCaptureFixture) -> None:
    """A task it waits for was cancelled by somebody else: to the handler that looks like its own cancellation."""
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            for _ in range(before):
                yield Event("one")
            await cancelled_from_within()
        finally:
            await trace.close(request.end_reason)

    answer = await ask(app_of(handler))
    assert answer.complete
    if before:
        assert [event.event for event in answer.events] == [None, "error"]
    else:
        assert answer.status == 500
    assert re.search(REFERENCE, answer.body)
    trace.assert_closed("failed")


async def cancelled_from_within() -> None:
    if issubclass(get_cancelled_exc_class(), asyncio.CancelledError):
        task = asyncio.create_task(asyncio.sleep(1000))
        task.cancel()
        await task
    else:
        raise trio.Cancelled._create(source="explicit")


# What is no `Exception` (against real servers: test_failures.py)

raised = pytest.mark.parametrize("kind", KINDS)


@raised
async def test_a_handler_that_raises_what_is_no_exception_fails_alone(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Request, before: int) -> AsyncIterator[Event]:
        for number in range(before):
            yield Event(str(number))
            await anyio.sleep(0.1)
        raise KINDS[kind]()

    async def unary(request: Request) -> Response:
        await anyio.sleep(0.1)
        raise KINDS[kind]()

    app = app_with(GET("/{before:int}", handler), GET("/unary", unary))
    async with app.running():
        for target in ("/0", "/unary", "/2"):
            async with connect(app, "GET", target) as exchange:
                answer = await rest(exchange)
            assert answer.complete and re.search(REFERENCE, answer.body)
            if target != "/2":
                assert answer.status == 500
                continue
            assert [event.event for event in answer.events] == [None, None, "error"]
            assert answer.body.endswith(b'"code":"internal_error"}\nid: end\n\n')
    assert len(caplog.records) == 3


@raised
async def test_chunks_that_raise_what_is_no_exception_are_not_complete(kind: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        await anyio.sleep(0.1)
        raise KINDS[kind]()

    async def handler(request: Request) -> ByteStream:
        return ByteStream(chunks(), "text/plain")

    answer = await ask(app_of(handler))
    assert (answer.status, answer.body, answer.complete) == (200, b"one", False)


@raised
async def test_an_item_whose_encoding_raises_what_is_no_exception_fails_its_handler(kind: str) -> None:
    trace = Trace()

    async def chunks() -> AsyncIterator[Any]:
        try:
            yield b"one"
            yield Loud()
        finally:
            await trace.close("failed")

    class Loud(bytearray):
        def __bytes__(self) -> bytes:
            raise KINDS[kind]()

    async def handler(request: Request) -> ByteStream:
        return ByteStream(chunks(), "text/plain")

    answer = await ask(app_of(handler))
    assert answer.status == 500 or not answer.complete
    assert len(trace.closed_at) == 1


@raised
async def test_a_handler_that_raises_what_is_no_exception_while_it_is_closed_harms_nobody(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await anyio.sleep_forever()
        finally:
            raise KINDS[kind]()

    async with opened(app_of(handler)) as exchange:
        assert await exchange.chunk()
        exchange.disconnect()
        await exchange.ended.wait()
    assert exchange.failure is None
    assert [record.getMessage() for record in caplog.records] == ["a handler failed while it was closed (client)"]


async def test_a_failure_whose_text_is_no_unicode_is_an_error_event_all_the_same() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        raise NotFound("no file \ud800")

    answer = await ask(app_of(handler))
    assert answer.complete and [event.event for event in answer.events] == [None, "error"]
    assert orjson.loads(answer.events[1].data)["code"] == "encode_error"


# Why it ended, wherever the generator was


class Ending:
    """An app with one open stream, and the ways to end it."""

    def __init__(self, app: SSEApp, exchange: Exchange, host: CancelScope) -> None:
        self.app = app
        self.exchange = exchange
        self.host = host

    async def client(self) -> None:
        self.exchange.disconnect()

    async def drain(self) -> None:
        await self.app.drain(0)

    async def cancelled(self) -> None:
        """What a server does to what is left when it stops. A parked stream has no task of the request's."""
        if is_parked(self.exchange):
            for stream in list(self.app._streams):
                stream.abort("cancelled")
        else:
            self.host.cancel()

    async def slow(self) -> None:
        self.exchange.block()

    async def timeout(self) -> None:
        """It comes by itself."""


@asynccontextmanager
async def stream_to_end(app: SSEApp) -> AsyncIterator[Ending]:
    host = CancelScope()

    async def hosted(*args: Any) -> None:
        with host:
            await app(*args)

    async with opened(app, through=hosted) as exchange:
        yield Ending(app, exchange, host)


async def in_a_sleep(trace: Trace, request: Request) -> AsyncIterator[Event]:
    try:
        yield Event("first")
        await anyio.sleep_forever()
    finally:
        await trace.close(request.end_reason)


async def at_a_yield(trace: Trace, request: Request) -> AsyncIterator[Event]:
    """More than the buffer holds, without a wait: where the client doesn't read it stays at its `yield`."""
    try:
        yield Event("first")
        await anyio.sleep(2)
        while True:
            yield Event("x" * 1000)
    finally:
        await trace.close(request.end_reason)


async def in_an_inner_generator(trace: Trace, request: Request) -> AsyncIterator[Event]:
    closed = []

    async def inner() -> AsyncIterator[str]:
        try:
            yield "first"
            await anyio.sleep_forever()
        finally:
            with CancelScope(shield=get_cancelled_exc_class() is trio.Cancelled):
                await anyio.sleep(0.1)
            closed.append(True)

    try:
        async with aclosing(inner()) as items:  # type: ignore[type-var]
            async for item in items:
                yield Event(item)
    finally:
        assert closed
        await trace.close(request.end_reason)


async def in_a_timeout_of_its_own(trace: Trace, request: Request) -> AsyncIterator[Event]:
    try:
        yield Event("first")
        with anyio.fail_after(1000):
            await anyio.sleep_forever()
    finally:
        await trace.close(request.end_reason)


async def after_timeouts_of_its_own(trace: Trace, request: Request) -> AsyncIterator[Event]:
    """Each timeout that expires looks like a cancellation, and is none of ours."""
    try:
        yield Event("first")
        while True:
            with anyio.move_on_after(0.7):
                await anyio.sleep_forever()
            try:
                with anyio.fail_after(0.4):
                    await anyio.sleep_forever()
            except TimeoutError:
                pass
    finally:
        await trace.close(request.end_reason)


async def in_a_shield(trace: Trace, request: Request) -> AsyncIterator[Event]:
    try:
        yield Event("first")
        while True:
            with CancelScope(shield=True):
                await anyio.sleep(0.7)
            await anyio.lowlevel.checkpoint()
    finally:
        await trace.close(request.end_reason)


async def in_a_task_group_of_its_own(trace: Trace, request: Request) -> AsyncIterator[Event]:
    try:
        yield Event("first")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            tasks.start_soon(anyio.sleep_forever)
    finally:
        await trace.close(request.end_reason)


async def in_the_body_of_a_task_group(trace: Trace, request: Request) -> AsyncIterator[Event]:
    try:
        yield Event("first")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            await anyio.sleep_forever()
    finally:
        await trace.close(request.end_reason)


async def in_a_queue(trace: Trace, request: Request) -> AsyncIterator[Event]:
    into, out_of = anyio.create_memory_object_stream[str](1)
    with into, out_of:
        await into.send("first")
        try:
            async for item in out_of:
                yield Event(item)
        finally:
            await trace.close(request.end_reason)


PLACES: Final = [
    in_a_sleep,
    at_a_yield,
    in_an_inner_generator,
    in_a_timeout_of_its_own,
    after_timeouts_of_its_own,
    in_a_shield,
    in_a_task_group_of_its_own,
    in_the_body_of_a_task_group,
    in_a_queue,
]


def name_of(function: Callable[..., Any]) -> str:
    return function.__name__


@pytest.mark.parametrize("reason", ["client", "drain", "cancelled", "slow", "timeout"])
@pytest.mark.parametrize("place", PLACES, ids=name_of)
async def test_a_stream_that_is_ended_has_closed_its_generator_which_knows_why(
    place: Callable[[Trace, Request], AsyncIterator[Event]], reason: EndReason, caplog: pytest.LogCaptureFixture
) -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        async with aclosing(place(trace, request)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    max_stream_s = 4.0 if reason == "timeout" else None
    app = app_of(handler, heartbeat_s=2.0, send_timeout_s=10.0, max_stream_s=max_stream_s, buffer_bytes=4000)
    async with stream_to_end(app) as ending:
        exchange = ending.exchange
        assert await exchange.chunk() == RETRY + b"data: first\n\n"
        if place is at_a_yield:
            exchange.block()
            await anyio.sleep(3)
        else:
            await anyio.sleep(1)
        ended_at = current_time()
        await getattr(ending, reason)()
        if reason == "timeout":
            await anyio.sleep(4)  # until it has come
            exchange.unblock()
        elif reason == "drain":
            exchange.unblock()
        await exchange.ended.wait()
        assert current_time() - ended_at < CLOSING_S + {"slow": 14, "timeout": 7}.get(reason, 2)

    trace.assert_closed(reason)
    assert_undisturbed(caplog)
    assert exchange.complete == (reason in ("drain", "timeout"))
    assert exchange.failure is None


async def test_a_generator_that_comes_to_its_end_knows_that_it_has_finished() -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await anyio.sleep(1)
        finally:
            await trace.close(request.end_reason)

    assert (await ask(app_of(handler))).complete
    trace.assert_closed("finished")


async def test_a_generator_that_fails_knows_that_it_has_failed() -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await anyio.sleep(1)
            raise RuntimeError("broken")
        finally:
            await trace.close(request.end_reason)

    assert (await ask(app_of(handler))).complete
    trace.assert_closed("failed")


@pytest.mark.parametrize("item", [Event("x", id="\n"), {"data": "x"}], ids=["event", "dict"])
async def test_a_generator_whose_item_was_refused_knows_that_it_has_failed(item: Any) -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Any]:
        try:
            yield Event("one")
            yield item
        finally:
            await trace.close(request.end_reason)

    assert (await ask(app_of(handler))).complete
    trace.assert_closed("failed")


async def test_a_failure_that_the_handler_gets_over_is_none() -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            try:
                yield Event("one")
                raise RuntimeError("broken")
            except RuntimeError:
                yield Event("mended")
        finally:
            await trace.close(request.end_reason)

    assert [event.data for event in (await ask(app_of(handler))).events] == ["one", "mended"]
    trace.assert_closed("finished")


def test_every_reason_is_tried_here() -> None:
    elsewhere = {"unauthorized"}  # tests/test_guard.py
    assert set(get_args(EndReason)) - elsewhere == {
        "client",
        "timeout",
        "slow",
        "drain",
        "finished",
        "failed",
        "cancelled",
    }


async def test_timeouts_of_its_own_do_not_disturb_a_stream(caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            for number in range(30):
                with anyio.move_on_after(1):
                    await anyio.sleep_forever()
                yield Event(number)
        finally:
            await trace.close(request.end_reason)

    answer = await ask(app_of(handler))
    assert [event.data for event in answer.events] == [str(number) for number in range(30)]
    trace.assert_closed("finished")
    assert_undisturbed(caplog)


async def test_a_timeout_of_its_own_that_expired_does_not_limit_the_closing(caplog: pytest.LogCaptureFixture) -> None:
    """Its cleanup by itself, without anybody stopping it, takes what time it takes."""
    closed = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            with anyio.move_on_after(1):
                await anyio.sleep_forever()
            await anyio.sleep(10 * CLOSE_S)
            yield Event("two")
        finally:
            await anyio.sleep(10 * CLOSE_S)
            closed.append(True)

    answer = await ask(app_of(handler))
    assert [event.data for event in answer.events] == ["one", "two"]
    assert closed
    assert_undisturbed(caplog)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "parked"], indirect=True)
async def test_asyncios_own_timeout_in_a_handler_works_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            for number in range(3):
                try:
                    async with asyncio.timeout(1):
                        await asyncio.sleep(1000)
                except TimeoutError:
                    pass
                yield Event(number)
            async with asyncio.timeout(1000):
                await asyncio.sleep(999)
        finally:
            await trace.close(request.end_reason)

    async with opened(app_of(handler)) as exchange:
        for _ in range(3):
            assert await exchange.chunk()
    trace.assert_closed("client")
    assert_undisturbed(caplog)


async def test_a_stop_at_the_moment_of_a_timeout_of_its_own_is_not_lost() -> None:
    """Both strike at once; the handler goes on after its own, and must still be ended by the other."""
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            while True:
                with anyio.move_on_after(4):
                    await anyio.sleep_forever()
        finally:
            await trace.close(request.end_reason)

    answer = await ask(app_of(handler, max_stream_s=4.0))
    assert answer.complete
    trace.assert_closed("timeout")
    assert trace.closed_at[0] <= 4 + CLOSE_S + CLOSING_S


async def test_a_stop_while_the_generator_is_about_to_go_on_reaches_it_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is not waiting for anything when the client leaves: it passes a checkpoint, and waits only then."""
    trace = Trace()
    left = anyio.Event()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await left.wait()
            exchange.disconnect()
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            await anyio.sleep_forever()
        finally:
            await trace.close(request.end_reason)

    async with opened(app_of(handler)) as exchange:
        assert await exchange.chunk()
        left.set()
        await exchange.ended.wait()
        assert current_time() < 1
    trace.assert_closed("client")
    assert_undisturbed(caplog)


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_the_host_is_cancelled_natively(caplog: pytest.LogCaptureFixture) -> None:
    """What uvicorn does to its tasks: `Task.cancel`, and again."""
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await anyio.sleep_forever()
        finally:
            await trace.close(request.end_reason)

    app, host = app_of(handler), []

    async def hosted(*args: Any) -> None:
        host.append(asyncio.create_task(app(*args)))
        await asyncio.wait(host)

    async with opened(app, through=hosted) as exchange:
        assert await exchange.chunk()
        for _ in range(3):
            host[0].cancel()
            await settle()
        await exchange.ended.wait()
        assert host[0].cancelled()
    trace.assert_closed("cancelled")
    assert_undisturbed(caplog)


# Generators that don't close well


@pytest.mark.parametrize("suspended", ["wait", "yield"])
async def test_a_generator_that_takes_too_long_to_close_is_cancelled_again(
    suspended: str, caplog: pytest.LogCaptureFixture
) -> None:
    events = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            if suspended == "wait":
                await anyio.sleep_forever()
            while True:
                yield Event("x" * 1000)
        finally:
            events.append(("closing", current_time()))
            try:
                await anyio.sleep(1000)
            finally:
                events.append(("cancelled again", current_time()))

    async with opened(app_of(handler, buffer_bytes=3000)) as exchange:
        exchange.block()
        await anyio.sleep(1)
        exchange.disconnect()
        await exchange.ended.wait()
    assert [event for event, _ in events] == ["closing", "cancelled again"]
    if suspended == "wait" and get_cancelled_exc_class() is trio.Cancelled:  # there it comes again at once
        assert [at for _, at in events] == pytest.approx([1, 1])
        return
    assert [at for _, at in events] == pytest.approx([1, 1 + CLOSE_S])
    assert "did not close within" in caplog.text


async def test_a_generator_that_swallows_its_cancellation_and_goes_on_yielding_is_closed() -> None:
    swallowed = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        while True:
            yield Event("tick")
            try:
                await anyio.sleep(1)
            except get_cancelled_exc_class():
                swallowed.append(current_time())

    async with opened(app_of(handler, buffer_bytes=1000)) as exchange:
        for _ in range(3):
            assert await exchange.chunk()
    assert swallowed
    assert exchange.ended.is_set()


async def test_a_generator_that_swallows_its_cancellation_and_waits_on_is_cancelled_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        for _ in range(2):
            try:
                await anyio.sleep_forever()
            except get_cancelled_exc_class():
                times.append(current_time())

    async with opened(app_of(handler)) as exchange:
        assert await exchange.chunk()
    again_s = 0 if get_cancelled_exc_class() is trio.Cancelled else CLOSE_S
    assert times == pytest.approx([0, again_s], abs=0.01)
    assert caplog.text.count("did not close within") <= 1  # at the end it has given in, or not


async def test_a_drained_stream_does_not_end_for_good_although_its_handler_returned_quietly() -> None:
    """It catches the cancellation and returns, while what it gave before still waits for a slow client."""

    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(1)
        yield Event("two")
        yield Event("three")
        try:
            await anyio.sleep_forever()
        except get_cancelled_exc_class():
            return

    app = app_of(handler)
    async with opened(app) as exchange, anyio.create_task_group() as tasks:
        assert await exchange.chunk() == RETRY + b"data: one\n\n"
        exchange.block()
        await anyio.sleep(0.5)
        await anyio.sleep(1)  # two and three are taken, and wait in the send
        tasks.start_soon(app.drain, 0)
        await settle()
        exchange.unblock()
        body = (await rest(exchange)).body
    assert body.startswith(b"data: two\n\ndata: three\n\nretry: ") and b"id: end" not in body


async def test_a_drained_stream_whose_last_events_wait_in_the_buffer_does_not_end_for_good() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        for number in range(2):
            await anyio.sleep(1)
            yield Event(number)
        try:
            await anyio.sleep_forever()
        except get_cancelled_exc_class():
            return

    app = app_of(handler)
    async with opened(app) as exchange, anyio.create_task_group() as tasks:
        assert await exchange.chunk() == RETRY + b"data: one\n\n"
        exchange.block()
        await anyio.sleep(3)  # 0 waits in the send, 1 in the buffer
        tasks.start_soon(app.drain, 0)
        await settle()
        exchange.unblock()
        body = (await rest(exchange)).body
    assert body.startswith(b"data: 0\n\ndata: 1\n") and b"id: end" not in body


async def test_a_generator_that_ignores_its_closing_does_not_hold_the_app(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        while True:
            try:
                yield Event("x" * 1000)
            except GeneratorExit:
                yield Event("never")

    async with opened(app_of(handler, buffer_bytes=3000)) as exchange:
        exchange.block()
        await anyio.sleep(1)
        exchange.disconnect()
        await exchange.ended.wait()
    assert exchange.failure is None
    assert "failed while it was closed (client)" in caplog.text


@pytest.mark.parametrize("reason", ["client", "drain", "cancelled", "slow", "timeout"])
async def test_a_generator_that_fails_while_it_is_closed_is_logged_and_changes_nothing(
    reason: EndReason, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await anyio.sleep_forever()
        finally:
            raise RuntimeError("broken on the way out")

    max_stream_s = 4.0 if reason == "timeout" else None
    app = app_of(handler, heartbeat_s=2.0, send_timeout_s=10.0, max_stream_s=max_stream_s)
    async with stream_to_end(app) as ending:
        assert await ending.exchange.chunk()
        await getattr(ending, reason)()
        await ending.exchange.ended.wait()
        body = await ending.exchange.body() if reason != "client" else b""
    assert ending.exchange.failure is None
    (record,) = caplog.records
    assert record.getMessage() == f"a handler failed while it was closed ({reason})"
    assert record.exc_info and "broken on the way out" in str(record.exc_info[1])
    assert b"broken" not in body and (b'"code":"timeout"' in body) == (reason == "timeout")
    assert ending.exchange.complete == (reason in ("drain", "timeout"))


@pytest.mark.parametrize("reason", ["drain", "timeout"])
async def test_a_generator_that_fails_while_it_is_closed_in_the_first_second_leaves_an_answer(
    reason: EndReason,
) -> None:
    """Nothing is sent yet: the client must get a status all the same."""

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            await anyio.sleep_forever()
            yield Event("never")
        finally:
            raise RuntimeError("broken on the way out")

    app = app_of(handler, max_stream_s=0.5 if reason == "timeout" else None)
    async with stream_to_end(app) as ending:
        await anyio.sleep(0.2)
        await getattr(ending, reason)()
        await ending.exchange.ended.wait()
    assert ending.exchange.status
    assert ending.exchange.complete


# The client leaves


def counted(app: App, sent: list[Any]) -> App:
    """The app, with each message that it sends written down."""

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        async def count(message: Any) -> None:
            sent.append(message)
            await send(message)

        await app(scope, receive, count)

    return counting


async def test_an_idle_client_that_leaves_is_noticed_without_a_send() -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await anyio.sleep_forever()
        finally:
            await trace.close(request.end_reason)

    sent: list[Any] = []
    app = app_of(handler)
    async with opened(app, through=counted(app, sent)) as exchange:
        assert await exchange.chunk()
        await anyio.sleep(3)
        exchange.disconnect()
        await exchange.ended.wait()
    trace.assert_closed("client")
    assert trace.closed_at == pytest.approx([3 + CLOSING_S], abs=0.01)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


async def test_a_client_that_leaves_in_the_middle_of_its_body_starts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    started = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        started.append(True)
        yield Event("one")

    app = app_with(POST("/", handler, body=list[int]))
    sent: list[Any] = []

    async def through(scope: Any, receive: Any, send: Any) -> None:
        messages = [{"type": "http.request", "body": b"[1,", "more_body": True}, {"type": "http.disconnect"}]

        async def receive_half() -> Any:
            return messages.pop(0)

        await counted(app, sent)(scope, receive_half, send)

    async with opened(app, "POST", "/", headers={"content-type": "application/json"}, through=through) as exchange:
        await exchange.ended.wait()
    assert (started, sent, exchange.failure) == ([], [], None)
    assert_undisturbed(caplog)


async def test_a_client_that_leaves_between_its_body_and_the_first_event_gets_nothing() -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            await anyio.sleep_forever()
            yield Event("never")
        finally:
            await trace.close(request.end_reason)

    sent: list[Any] = []
    app = app_with(POST("/", handler, body=list[int]))
    headers = {"content-type": "application/json"}
    async with opened(
        app, "POST", "/", headers=headers, body=[b"[1", b",2", b"]"], through=counted(app, sent)
    ) as exchange:
        await anyio.sleep(FIRST_ITEM_S / 2)
        exchange.disconnect()
        await exchange.ended.wait()
    trace.assert_closed("client")
    assert sent == [] and exchange.failure is None


async def test_a_client_that_has_left_before_the_stream_begins_gets_nothing() -> None:
    entered, left = [], []

    async def handler(request: Request) -> AsyncIterator[Event]:
        entered.append(True)
        try:
            await anyio.sleep_forever()
            yield Event("never")
        finally:
            left.append(request.end_reason)

    sent: list[Any] = []
    app = app_of(handler)
    async with opened(app, through=counted(app, sent)) as exchange:
        exchange.disconnect()
        await exchange.ended.wait()
        assert current_time() < FIRST_ITEM_S
    assert len(left) == len(entered)
    assert set(left) <= {"client"}
    assert sent == [] and exchange.failure is None


async def test_an_app_that_is_cancelled_before_the_stream_begins_leaves_no_generator_open() -> None:
    entered, left = [], []

    async def handler(request: Request) -> AsyncIterator[Event]:
        entered.append(True)
        try:
            yield Event("one")
            await anyio.sleep_forever()
        finally:
            with CancelScope(shield=get_cancelled_exc_class() is trio.Cancelled):
                await anyio.sleep(CLOSING_S)
            left.append(request.end_reason)

    async with stream_to_end(app_of(handler)) as ending:
        ending.host.cancel()
        await ending.exchange.ended.wait()
    assert len(left) == len(entered)
    assert set(left) <= {"cancelled"}


async def test_a_client_that_leaves_while_send_is_blocked() -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            while True:
                yield Event("x" * 100)
        finally:
            await trace.close(request.end_reason)

    async with opened(app_of(handler)) as exchange:
        exchange.block()
        await anyio.sleep(1)
        exchange.disconnect()
        await exchange.ended.wait()
    trace.assert_closed("client")


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
async def test_a_send_that_raises_oserror_means_that_the_client_has_left(
    failing: int, caplog: pytest.LogCaptureFixture
) -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await anyio.sleep(1)
            yield Event("two")
            await anyio.sleep(1)
        finally:
            await trace.close(request.end_reason)

    app, sent = app_of(handler), []

    async def through(scope: Any, receive: Any, send: Any) -> None:
        async def failing_send(message: Any) -> None:
            sent.append(message)
            if len(sent) > failing:
                raise BrokenPipeError("gone")

        await app(scope, receive, failing_send)

    async with opened(app, through=through) as exchange:
        await exchange.ended.wait()
    assert exchange.failure is None
    assert len(sent) == failing + 1, "it sent on after the error"
    trace.assert_closed("finished" if failing == 3 else "client")
    assert_undisturbed(caplog)


@pytest.mark.parametrize("failing", [1, 2])
async def test_a_send_that_breaks_ends_the_stream_and_no_second_answer_is_begun(failing: int) -> None:
    """Servers raise `RuntimeError` too, as for a body that is longer than its content-length."""
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await anyio.sleep(1)
            yield Event("two")
            await anyio.sleep(1)
        finally:
            await trace.close(request.end_reason)

    app, sent = app_of(handler), []

    async def through(scope: Any, receive: Any, send: Any) -> None:
        async def breaking_send(message: Any) -> None:
            sent.append(message["type"])
            if len(sent) == failing + 1:
                raise RuntimeError("the server is at its wits' end")

        await app(scope, receive, breaking_send)

    try:
        async with opened(app, through=through) as exchange:
            await exchange.ended.wait()
    except Exception:  # the server's own error may come back to it, or be logged here
        pass
    assert len(trace.closed_at) == 1
    assert sent.count("http.response.start") == 1


# One send at a time


async def test_heartbeats_that_fall_due_while_send_is_blocked_do_not_enter_it_again() -> None:
    """`Exchange` raises where a send is entered while another is in flight."""

    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(200):
            yield Event(number)
            await anyio.sleep(0.5)

    app = app_of(handler, heartbeat_s=1.0, send_timeout_s=1000.0)
    async with opened(app) as exchange:
        for _ in range(20):
            exchange.block()
            await anyio.sleep(6)
            exchange.unblock()
            await anyio.sleep(0.7)
        answer = await rest(exchange)
    assert [event.data for event in answer.events] == [str(number) for number in range(200)]


@pytest.mark.parametrize("then", ["drain", "timeout", "client", "cancelled"])
async def test_a_stream_that_is_ended_while_send_is_blocked_does_not_enter_it_again(then: EndReason) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        while True:
            yield Event("x" * 100)
            await anyio.sleep(0.1)

    app = app_of(handler, heartbeat_s=1.0, send_timeout_s=1000.0, max_stream_s=5.0 if then == "timeout" else None)
    async with stream_to_end(app) as ending:
        assert await ending.exchange.chunk()
        ending.exchange.block()
        await anyio.sleep(3)
        await getattr(ending, then)()
        await anyio.sleep(10)
        ending.exchange.unblock()
        await ending.exchange.ended.wait()
    assert ending.exchange.failure is None


# Backpressure and coalescing


@pytest.mark.parametrize(("size", "buffer_bytes"), [(100, 1000), (100, 1), (1000, 1000), (5000, 1000), (7, 64 * 1024)])
async def test_a_source_runs_ahead_by_its_buffer_and_one_event_at_most(size: int, buffer_bytes: int) -> None:
    frame = len(encode(Event("x" * size)))
    produced = 0
    total = 3 * buffer_bytes // frame + 20

    async def handler(request: Request) -> AsyncIterator[Event]:
        nonlocal produced
        for number in range(total):
            produced += 1
            yield Event(str(number).rjust(size, "x"))

    async with opened(app_of(handler, buffer_bytes=buffer_bytes)) as exchange:
        exchange.block()
        await anyio.sleep(3)
        ahead = produced
        exchange.unblock()
        first = await exchange.chunk()
        assert first
        answer = await rest(exchange)
    in_flight = (len(first) - len(RETRY)) // frame
    assert 1 <= in_flight <= buffer_bytes // frame + 1
    # What fills the buffer up, and one that doesn't fit any more.
    assert (ahead - in_flight - 2) * frame < buffer_bytes
    numbers = [int(event.data.strip("x")) for event in Decoder().feed(first + answer.body)]
    assert numbers == list(range(total))


async def test_a_generator_that_works_and_never_waits_gives_the_others_their_turns() -> None:
    """Its events are few bytes, so the buffer doesn't fill. What it has given by then is sent."""
    made, others = [], 0

    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(60):
            time.sleep(0.005)  # noqa: ASYNC251
            made.append(number)
            yield Event(f"{number}")

    async def another() -> None:
        nonlocal others
        while len(made) < 60:
            others += 1
            await anyio.lowlevel.checkpoint()

    made_at_each_chunk = []
    async with anyio.create_task_group() as tasks, opened(app_of(handler)) as exchange:
        tasks.start_soon(another)
        while await exchange.chunk() is not None:
            made_at_each_chunk.append(len(made))
    assert made_at_each_chunk[0] < 30 and len(made_at_each_chunk) > 5
    assert others > 5


async def test_a_reader_that_is_slow_holds_the_source_back() -> None:
    produced = 0

    async def handler(request: Request) -> AsyncIterator[Event]:
        nonlocal produced
        while True:
            produced += 1
            yield Event("x" * 1000)

    async with opened(app_of(handler, buffer_bytes=2000), window=1) as exchange:
        for _ in range(10):
            await anyio.sleep(1)
            assert await exchange.chunk()
        await anyio.sleep(1)
        # ten read, one in the window, one in flight, the buffer: each of two events; and one in hand
        assert produced <= 13 * 2 + 2


async def test_events_that_are_ready_together_travel_together() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for _ in range(3):
            for number in range(5):
                yield Event(number)
            await anyio.sleep(1)

    answer = await ask(app_of(handler))
    five = b"".join(b"data: %d\n\n" % number for number in range(5))
    assert answer.chunks == [RETRY + five, five, five, b"id: end\n\n"]


async def test_an_event_that_is_alone_goes_at_once() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(5):
            yield Event(number)
            await anyio.sleep(10)

    answer = await ask(app_of(handler))
    assert answer.chunks[1:-1] == [b"data: %d\n\n" % number for number in range(1, 5)]
    assert answer.times == pytest.approx([0, 10, 20, 30, 40, 50], abs=0.001)


async def test_what_came_while_a_send_was_under_way_goes_in_one_write() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(10):
            yield Event(number)
            await anyio.sleep(1)

    async with opened(app_of(handler)) as exchange:
        assert await exchange.chunk() == RETRY + b"data: 0\n\n"
        await anyio.sleep(0.5)
        exchange.block()
        await anyio.sleep(5)
        exchange.unblock()
        assert await exchange.chunk() == b"data: 1\n\n"
        assert await exchange.chunk() == b"".join(b"data: %d\n\n" % number for number in range(2, 6))


@pytest.mark.parametrize("reason", ["client", "drain", "cancelled"])
async def test_a_source_that_never_waits_lets_others_run_and_can_be_ended(reason: EndReason) -> None:
    closed = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            while True:
                yield Event("x" * 50)
        finally:
            closed.append(request.end_reason)

    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with stream_to_end(app_of(handler, buffer_bytes=1000)) as ending, anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        for _ in range(50):
            assert await ending.exchange.chunk()
        assert turns >= 50
        await getattr(ending, reason)()
        await ending.exchange.ended.wait()
        tasks.cancel_scope.cancel()
    assert closed == [reason]


# Heartbeats and the first byte


@pytest.mark.parametrize("heartbeat_s", [15.0, 8.0, 1.0, 0.25])
async def test_a_heartbeat_comes_after_an_idle_time_and_one_sweep_at_most(heartbeat_s: float) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(3):
            yield Event(number)
            await anyio.sleep(3.3 * heartbeat_s)

    answer = await ask(app_of(handler, heartbeat_s=heartbeat_s))
    assert answer.chunks.count(HEARTBEAT) >= 6
    sweep = min(1.0, heartbeat_s / 8)
    for before, at, chunk in zip(answer.times, answer.times[1:], answer.chunks[1:], strict=False):
        if chunk == HEARTBEAT:
            assert heartbeat_s - 1e-6 <= at - before <= heartbeat_s + sweep + 1e-6
    assert set(answer.chunks) - {HEARTBEAT} == {
        RETRY + b"data: 0\n\n",
        b"data: 1\n\n",
        b"data: 2\n\n",
        b"id: end\n\n",
    }


async def test_heartbeats_are_invisible_to_a_client() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(3):
            yield Event({"number": number}, event="tick", id=str(number))
            await anyio.sleep(100)

    answer = await ask(app_of(handler))
    assert HEARTBEAT in answer.chunks
    decoder = Decoder()
    for chunk in answer.chunks:
        events = decoder.feed(chunk)
        assert (chunk == HEARTBEAT) <= (events == [])
    assert Decoder().feed(answer.body) == Decoder().feed(b"".join(c for c in answer.chunks if c != HEARTBEAT))
    assert decoder.last_event_id == "end"


async def test_no_heartbeat_comes_while_bytes_flow() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(50):
            yield Event(number)
            await anyio.sleep(1)

    assert HEARTBEAT not in (await ask(app_of(handler, heartbeat_s=1.5))).chunks


async def test_no_heartbeat_comes_before_the_answer_has_begun() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep(0.9)
        yield Event("one")

    assert (await ask(app_of(handler, heartbeat_s=0.1))).chunks == [RETRY + b"data: one\nid: end\n\n"]


async def test_heartbeats_can_be_turned_off() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(5000)

    app = app_of(handler, heartbeat_s=None)
    assert (await ask(app)).chunks == [RETRY + b"data: one\n\n", b"id: end\n\n"]


async def test_a_slow_first_event_does_not_hold_back_the_answer() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep(5)
        yield Event("one")
        await anyio.sleep(1)

    async with opened(app_of(handler, heartbeat_s=2.0, retry_ms=1234)) as exchange:
        await exchange.started.wait()
        assert current_time() == pytest.approx(FIRST_ITEM_S)
        assert exchange.headers == {
            "content-type": "text/event-stream",
            "cache-control": "no-cache, no-transform",
            "x-accel-buffering": "no",
        }
        answer = await rest(exchange)
    assert answer.chunks == [b"retry: 1234\n", HEARTBEAT, b"data: one\n\n", b"id: end\n\n"]
    assert answer.times[0] == pytest.approx(FIRST_ITEM_S)


async def test_a_fast_first_event_is_not_held_back_by_the_first_second() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep(0.25)
        yield Event("one")
        await anyio.sleep(1)

    answer = await ask(app_of(handler))
    assert answer.chunks[0] == RETRY + b"data: one\n\n"
    assert answer.times[0] == pytest.approx(0.25)


async def test_an_event_at_the_very_end_of_the_first_second_is_not_lost() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep(FIRST_ITEM_S)
        yield Event("one")
        await anyio.sleep(FIRST_ITEM_S)
        yield Event("two")

    assert (await ask(app_of(handler))).body == RETRY + b"data: one\n\ndata: two\nid: end\n\n"


async def test_what_a_middleware_does_to_one_answer_stays_with_it() -> None:
    """Middlewares append to the list of headers: one client's cookie must not reach the next."""

    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")

    app = app_of(handler)

    async def through(scope: Any, receive: Any, send: Any) -> None:
        async def add(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"set-cookie", b"session=1"))
            await send(message)

        await app(scope, receive, add)

    assert "set-cookie" in (await ask(app, through=through)).headers
    assert "set-cookie" not in (await ask(app)).headers


# The end of a stream, and the reconnect after it


async def test_the_last_event_of_a_get_ends_it_for_good() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(1)
        yield Event("two")
        yield Event("three")

    answer = await ask(app_of(handler))
    assert answer.body == RETRY + b"data: one\n\ndata: two\n\ndata: three\nid: end\n\n"
    assert [event.id for event in answer.events] == [None, None, "end"]


@pytest.mark.parametrize("size", [10, 1000, 5000])
async def test_the_last_event_of_a_full_buffer_ends_it_for_good(size: int) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for _ in range(20):
            yield Event("x" * size)

    answer = await ask(app_of(handler, buffer_bytes=1000))
    assert [(event.data, event.id) for event in answer.events] == [("x" * size, None)] * 19 + [("x" * size, "end")]
    assert answer.body.endswith(b"x\nid: end\n\n")


async def test_a_get_that_waited_after_its_last_event_ends_for_good_in_a_block_of_its_own() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(1)

    answer = await ask(app_of(handler))
    assert answer.chunks == [RETRY + b"data: one\n\n", b"id: end\n\n"]
    decoder = Decoder()
    assert decoder.feed(answer.body) == [Event("one", retry=2000)]
    assert decoder.last_event_id == "end"


@pytest.mark.parametrize("wait_s", [0, 3])
async def test_an_empty_get_ends_for_good(wait_s: float) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep(wait_s)
        return
        yield Event("never")

    answer = await ask(app_of(handler))
    assert (answer.status, answer.body, answer.complete) == (200, RETRY + b"id: end\n\n", True)


async def test_the_ids_of_a_handler_stay_and_its_last_event_ends_for_good_all_the_same() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one", id="1")
        yield Event("two", id="2")

    answer = await ask(app_of(handler))
    assert answer.body == RETRY + b"data: one\nid: 1\n\ndata: two\nid: 2\nid: end\n\n"
    assert [event.id for event in answer.events] == ["1", "end"]


@pytest.mark.parametrize("wait_s", [0, 1])
async def test_a_post_has_no_id_at_its_end(wait_s: float) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        if wait_s:
            await anyio.sleep(wait_s)

    answer = await ask(app_of(handler, "POST"), "POST", "/", headers={"last-event-id": "end"})
    assert (answer.status, answer.body, answer.complete) == (200, RETRY + b"data: one\n\n", True)


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        ("/", {"last-event-id": "end"}, 204),
        ("/?last_event_id=end", {}, 204),
        ("/?last_event_id=end", {"last-event-id": ""}, 204),
        ("/?last_event_id=7", {"last-event-id": "end"}, 204),
        ("/?last_event_id=end", {"last-event-id": "7"}, 200),
        ("/", {"last-event-id": "7"}, 200),
        ("/?last_event_id=", {}, 200),
        ("/", {"last-event-id": "END"}, 200),
        ("/", {"last-event-id": "end.1"}, 200),
    ],
)
async def test_a_client_that_has_seen_the_end_is_told_to_stop(
    target: str, headers: dict[str, str], status: int
) -> None:
    started = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        started.append(True)
        yield Event("one")

    answer = await ask(app_of(handler), "GET", target, headers=headers)
    assert answer.status == status
    if status == 204:
        assert answer.body == b"" and not started
        assert "content-length" not in answer.headers
    else:
        assert answer.body == RETRY + b"data: one\nid: end\n\n"


async def test_a_client_that_has_seen_the_end_is_told_to_stop_even_by_a_full_house() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")

    app = app_of(handler)
    async with app.running():
        await app.drain(0)
        async with connect(app, headers={"last-event-id": "end"}) as exchange:
            assert (await rest(exchange)).status == 204


# Limits


BROWSER: Final = {"accept": "text/event-stream", "cache-control": "no-cache", "user-agent": "library/1.0"}


async def endless(request: Request) -> AsyncIterator[Event]:
    yield Event("one")
    await anyio.sleep_forever()


@pytest.mark.parametrize("why", ["full", "draining"])
@pytest.mark.parametrize(
    ("method", "headers", "softly"),
    [
        ("GET", BROWSER, True),
        ("GET", {"accept": "text/event-stream"}, False),
        ("GET", {"cache-control": "no-cache"}, False),
        ("GET", {}, False),
        ("POST", BROWSER, False),
    ],
    ids=["EventSource", "fetch", "reload", "curl", "POST"],
)
async def test_a_stream_too_many_is_refused_so_that_the_client_comes_back(
    why: str, method: str, headers: dict[str, str], softly: bool
) -> None:
    app = app_with(GET("/", endless), POST("/", endless), max_streams=1)
    async with opened(app) as first:
        assert await first.chunk()
        if why == "draining":
            first.disconnect()
            await first.ended.wait()
            await app.drain(0)
        async with connect(app, method, headers=headers) as exchange:
            answer = await rest(exchange)
        assert answer.complete
        if softly:
            assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
            assert re.fullmatch(rb"retry: \d{4}\n", answer.body)
        else:
            assert (answer.status, answer.json["code"]) == (503, "unavailable")
            assert int(answer.headers["retry-after"]) >= 1
        if why == "full":
            first.disconnect()
            await first.ended.wait()
            async with connect(app, method, headers=headers) as exchange:
                assert await exchange.chunk() == RETRY + b"data: one\n\n"


async def test_a_place_is_free_again_however_a_stream_ended() -> None:
    async def handler(request: Request, how: str) -> AsyncIterator[Event]:
        if how == "problem":
            raise NotFound("no")
        yield Event("one")
        if how == "error":
            raise NotFound("no")

    app = app_with(GET("/{how}", handler), max_streams=1)
    async with app.running():
        for _ in range(2):
            for how, status in (("problem", 404), ("error", 200), ("end", 200)):
                async with connect(app, "GET", f"/{how}") as exchange:
                    assert (await rest(exchange)).status == status


async def test_at_most_so_many_streams_are_open_at_once() -> None:
    app = app_of(endless, max_streams=5)
    statuses: list[int] = []

    async def one() -> None:
        async with connect(app) as exchange:
            await exchange.started.wait()
            statuses.append(exchange.status)
            await anyio.sleep(1)

    async with app.running(), anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(one)
    assert sorted(statuses) == [200] * 5 + [503] * 15


@pytest.mark.parametrize(("data_only", "method"), [(False, "GET"), (False, "POST"), (True, "GET"), (True, "POST")])
async def test_a_stream_that_lives_too_long_is_told_so(data_only: bool, method: str) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        while True:
            yield Event("tick")
            await anyio.sleep(3)

    app = app_of(handler, method, data_only=data_only, max_stream_s=10.0)
    answer = await ask(app, method)
    assert answer.complete and 10 <= answer.times[-1] <= 11 + 1e-6
    end = b"id: end\n\n" if method == "GET" else b"\n"
    error = b'"error":"the stream reached its longest duration","code":"timeout"}\n'
    if data_only:
        assert answer.body.endswith(b'\n\ndata: {"type":"error",' + error + b"\ndata: [DONE]\n" + end)
    else:
        assert answer.body.endswith(b"\n\nevent: error\ndata: {" + error + end)
    assert answer.body.count(b"data: tick\n\n") == 4


async def test_streams_that_began_together_do_not_end_together() -> None:
    app = app_of(endless, max_stream_s=1000.0, heartbeat_s=1000.0)
    ends: list[float] = []

    async def read() -> None:
        async with connect(app) as exchange:
            ends.append((await rest(exchange)).times[-1])

    async with app.running(), anyio.create_task_group() as tasks:
        for _ in range(30):
            tasks.start_soon(read)
    assert 900 <= min(ends) <= max(ends) <= 1001 + 1e-6
    assert len(set(ends)) > 10


async def test_a_longest_life_within_the_first_second_is_a_whole_answer() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep_forever()
        yield Event("never")

    answer = await ask(app_of(handler, max_stream_s=0.5))
    assert (answer.status, answer.complete) == (200, True)
    assert b'"code":"timeout"' in answer.body


async def test_a_stream_that_has_finished_is_not_told_that_it_lived_too_long() -> None:
    """Its generator is done; only the client is slow."""

    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(1)
        yield Event("two")
        await anyio.sleep(1)
        yield Event("three", event="complete")

    async with opened(app_of(handler, max_stream_s=5.0)) as exchange:
        assert await exchange.chunk()
        exchange.block()
        await anyio.sleep(8)
        exchange.unblock()
        answer = await rest(exchange)
    assert answer.body == b"data: two\n\nevent: complete\ndata: three\nid: end\n\n"


@pytest.mark.parametrize("when", ["start", "later"])
async def test_a_client_that_does_not_read_is_dropped(when: str) -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            while True:
                yield Event("tick")
                await anyio.sleep(1)
        finally:
            await trace.close(request.end_reason)

    async with opened(app_of(handler, send_timeout_s=30.0)) as exchange:
        if when == "later":
            for _ in range(100):
                assert await exchange.chunk()
        blocked_at = current_time()
        exchange.block()
        await exchange.ended.wait()
        assert 30 <= current_time() - blocked_at <= 33
    trace.assert_closed("slow")
    assert not exchange.complete and exchange.failure is None


async def test_a_client_is_not_dropped_because_the_server_stood_still() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for _ in range(3):
            yield Event("x" * 1000)

    async with opened(app_of(handler, send_timeout_s=10.0, buffer_bytes=1000), window=0) as exchange:
        exchange.block()
        await anyio.sleep(5)
        stand_still(60)
        await anyio.sleep(1)  # the sweep has looked
        exchange.unblock()
        answer = await rest(exchange)
    assert (answer.body.count(b"data: "), answer.complete) == (3, True)


async def test_a_client_that_does_not_read_after_the_server_stood_still_is_dropped() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        while True:
            yield Event("x" * 1000)

    async with opened(app_of(handler, send_timeout_s=10.0, buffer_bytes=1000), window=0) as exchange:
        exchange.block()
        await anyio.sleep(5)
        stand_still(60)
        went_on_at = current_time()
        await exchange.ended.wait()
        assert 4 <= current_time() - went_on_at <= 8
        assert not exchange.complete


async def test_a_stream_does_not_reach_its_longest_life_while_the_server_stands_still() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for number in range(3):
            yield Event(f"{number}")
            await anyio.sleep(1)

    async with opened(app_of(handler, max_stream_s=10.0)) as exchange:
        assert await exchange.chunk()
        stand_still(60)
        answer = await rest(exchange)
    assert answer.body.endswith(b"data: 2\n\nid: end\n\n") and b"timeout" not in answer.body


async def test_a_client_that_reads_slowly_but_steadily_is_not_dropped() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        for _ in range(50):
            yield Event("x" * 1000)

    async with opened(app_of(handler, send_timeout_s=10.0, buffer_bytes=1000), window=0) as exchange:
        events = 0
        while (chunk := await exchange.chunk()) is not None:
            events += chunk.count(b"data: ")
            await anyio.sleep(9)
    assert (events, exchange.complete) == (50, True)


# Drain


async def test_streams_that_finish_within_the_grace_finish_whole() -> None:
    async def handler(request: Request, seconds: int) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(seconds)
        yield Event("two")

    app = app_with(GET("/{seconds:int}", handler))
    answers: dict[int, Answer] = {}

    async def read(seconds: int) -> None:
        async with connect(app, "GET", f"/{seconds}") as exchange:
            answers[seconds] = await rest(exchange)

    async with app.running(), anyio.create_task_group() as tasks:
        for seconds in (1, 4, 9, 1000):
            tasks.start_soon(read, seconds)
        await settle()
        await app.drain(5)
        assert current_time() == pytest.approx(5, abs=0.1)
    whole = RETRY + b"data: one\n\ndata: two\nid: end\n\n"
    assert [answers[seconds].body for seconds in (1, 4)] == [whole, whole]
    for seconds in (9, 1000):
        assert re.fullmatch(RETRY + rb"data: one\n\nretry: \d+\n", answers[seconds].body)
    assert all(answer.complete for answer in answers.values())


async def test_a_drain_returns_as_soon_as_the_last_stream_has_ended() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(2)

    app = app_of(handler)
    async with opened(app) as exchange:
        assert await exchange.chunk()
        await app.drain(100)
        assert current_time() == pytest.approx(2, abs=0.1)
        assert exchange.complete


async def test_a_drain_without_streams_returns_at_once() -> None:
    app = app_of(endless)
    async with app.running():
        await app.drain(100)
        assert current_time() == pytest.approx(0, abs=0.001)


async def test_two_drains_at_once_both_return_when_the_streams_have_ended() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(2)

    app, returned = app_of(handler), []

    async def drain(grace_s: float) -> None:
        await app.drain(grace_s)
        returned.append(current_time())

    async with opened(app) as exchange, anyio.create_task_group() as tasks:
        assert await exchange.chunk()
        tasks.start_soon(drain, 100)
        tasks.start_soon(drain, 200)
    assert returned == pytest.approx([2, 2], abs=0.1)


async def test_a_second_drain_without_grace_ends_the_first() -> None:
    """The second SIGTERM."""
    app, returned = app_of(endless), []

    async def drain() -> None:
        await app.drain(100)
        returned.append(current_time())

    async with opened(app) as exchange, anyio.create_task_group() as tasks:
        assert await exchange.chunk()
        tasks.start_soon(drain)
        await anyio.sleep(1)
        await app.drain(0)
    assert returned == pytest.approx([1], abs=0.1)
    assert exchange.complete


async def test_clients_that_are_sent_away_do_not_all_come_back_in_one_moment() -> None:
    app = app_of(endless)
    bodies: list[bytes] = []

    async def read() -> None:
        async with connect(app) as exchange:
            bodies.append((await rest(exchange)).body)

    async with app.running(), anyio.create_task_group() as tasks:
        for _ in range(30):
            tasks.start_soon(read)
        await settle()
        await app.drain(0)
    farewells = {body.removeprefix(RETRY + b"data: one\n\n") for body in bodies}
    assert all(re.fullmatch(rb"retry: \d+\n", farewell) for farewell in farewells)
    assert len(farewells) > 10


async def test_a_client_that_does_not_read_does_not_hold_a_drain_for_ever() -> None:
    app = app_of(endless)
    async with opened(app) as exchange:
        assert await exchange.chunk()
        exchange.block()
        await app.drain(3)
        assert current_time() < 6
    assert exchange.ended.is_set()


async def test_a_drain_waits_for_generators_that_close() -> None:
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await anyio.sleep_forever()
        finally:
            await trace.close(request.end_reason)

    app = app_of(handler)
    async with opened(app) as exchange:
        assert await exchange.chunk()
        await app.drain(0)
        trace.assert_closed("drain")


async def test_leaving_running_ends_what_is_open() -> None:
    app = app_of(endless)
    answers: list[Answer] = []

    async def read() -> None:
        async with connect(app) as exchange:
            answers.append(await rest(exchange))

    async with anyio.create_task_group() as tasks:
        async with app.running():
            tasks.start_soon(read)
            await settle()
    (answer,) = answers
    assert answer.complete and b"id: end" not in answer.body


async def test_a_request_that_arrives_during_a_drain_is_refused_although_its_body_took_long() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event(request.body)

    app = app_with(POST("/", handler, body=list[int]))
    drained = anyio.Event()

    async def through(scope: Any, receive: Any, send: Any) -> None:
        async def late() -> Any:
            await drained.wait()
            return await receive()

        await app(scope, late, send)

    headers = {"content-type": "application/json"}
    async with opened(app, "POST", "/", headers=headers, body=b"[]", through=through) as exchange:
        await app.drain(0)
        drained.set()
        assert (await rest(exchange)).status == 503


async def test_a_failure_that_waits_behind_a_slow_client_is_told_although_the_app_drains() -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(1)
        yield Event("two")
        await anyio.sleep(1)
        raise NotFound("lost")

    app = app_of(handler, "POST")
    async with opened(app, "POST") as exchange, anyio.create_task_group() as tasks:
        assert await exchange.chunk()
        exchange.block()
        await anyio.sleep(3)
        tasks.start_soon(app.drain, 0)
        await settle()
        exchange.unblock()
        answer = await rest(exchange)
    assert b'data: {"error":"lost","code":"not_found"}' in answer.body


# Byte streams


def bytes_app(chunks: Callable[[], AsyncIterator[Any]], headers: dict[str, str] | None = None, **values: Any) -> SSEApp:
    async def handler(request: Request) -> Response | ByteStream:
        return ByteStream(chunks(), "text/csv", headers or {})

    return app_of(handler, **values)


async def test_a_byte_stream_is_sent_unchanged() -> None:
    parts = [b"id,name\r\n", b"", b"\0\xff\n\n", b":\n", b"x" * 100_000, b"end"]

    async def chunks() -> AsyncIterator[bytes]:
        for part in parts:
            yield part
            await anyio.sleep(50)

    answer = await ask(bytes_app(chunks, {"content-disposition": "attachment"}))
    assert answer.headers == {"content-type": "text/csv", "content-disposition": "attachment"}
    assert (answer.status, answer.body, answer.complete) == (200, b"".join(parts), True)
    assert HEARTBEAT not in answer.chunks[:2]


async def test_an_empty_byte_stream_is_an_empty_answer() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        return
        yield b"never"

    answer = await ask(bytes_app(chunks))
    assert (answer.status, answer.body, answer.complete) == (200, b"", True)


async def test_a_byte_stream_gets_no_heartbeat() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        await anyio.sleep(100)
        yield b"one"
        await anyio.sleep(100)
        yield b"two"

    assert (await ask(bytes_app(chunks, heartbeat_s=1.0))).chunks == [b"one", b"two"]


async def test_a_byte_stream_that_fails_before_its_first_chunk_is_a_problem() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        await anyio.sleep(0.5)
        raise NotFound("no such file")
        yield b"never"

    answer = await ask(bytes_app(chunks))
    assert (answer.status, answer.json["detail"], answer.complete) == (404, "no such file", True)


@pytest.mark.parametrize("wait_s", [0, 1])
async def test_a_byte_stream_that_fails_in_the_middle_is_not_complete(
    wait_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        await anyio.sleep(wait_s)
        raise RuntimeError("the disk is broken")

    answer = await ask(bytes_app(chunks))
    assert (answer.status, answer.complete) == (200, False)
    assert answer.body in (b"one", b"")
    assert "the disk is broken" in caplog.text


@pytest.mark.parametrize("reason", ["drain", "timeout"])
async def test_a_byte_stream_that_is_ended_is_not_complete(reason: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        await anyio.sleep_forever()

    app = bytes_app(chunks, max_stream_s=4.0 if reason == "timeout" else None)
    async with stream_to_end(app) as ending:
        assert await ending.exchange.chunk() == b"one"
        await getattr(ending, reason)()
        assert not (await rest(ending.exchange)).complete


@pytest.mark.parametrize("item", ["text", 3, None])
async def test_a_byte_stream_of_something_else_is_a_problem(item: Any) -> None:
    async def chunks() -> AsyncIterator[Any]:
        yield item

    assert (await ask(bytes_app(chunks))).status == 500


class Chunks:
    """An async iterator that isn't a generator, as those of HTTP clients and files are."""

    def __init__(self) -> None:
        self.steps = 0
        self.closed = 0

    def __aiter__(self) -> "Chunks":
        return self

    async def __anext__(self) -> bytes:
        self.steps += 1
        await anyio.sleep(1)
        return b"chunk"

    async def aclose(self) -> None:
        await anyio.sleep(0.1)
        self.closed += 1


async def test_chunks_are_closed_when_the_client_leaves() -> None:
    chunks = Chunks()
    async with opened(bytes_app(lambda: chunks)) as exchange:
        assert await exchange.chunk() == b"chunk"
    assert chunks.closed == 1


async def test_chunks_are_closed_when_the_stream_is_refused() -> None:
    chunks = Chunks()
    app = bytes_app(lambda: chunks)
    async with app.running():
        await app.drain(0)
        async with connect(app) as exchange:
            assert (await rest(exchange)).status == 503
    assert (chunks.steps, chunks.closed) == (0, 1)


async def test_chunks_are_closed_when_their_headers_are_refused() -> None:
    chunks = Chunks()
    answer = await ask(bytes_app(lambda: chunks, {"x-name": "a\r\nset-cookie: b"}))
    assert answer.status == 500 and "set-cookie" not in answer.headers
    assert (chunks.steps, chunks.closed) == (0, 1)


async def test_an_iterator_that_cannot_be_closed_is_streamed_all_the_same() -> None:
    class Bare:
        left = 3

        def __aiter__(self) -> "Bare":
            return self

        async def __anext__(self) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise StopAsyncIteration
            return b"x"

    assert (await ask(bytes_app(Bare))).body == b"xxx"
    assert (await ask(bytes_app(Bare), "HEAD")).status == 200


# HEAD


async def test_head_has_the_headers_of_the_stream_and_starts_nothing() -> None:
    """It must not say what the GET doesn't: a length of 0 would be a lie."""
    started = []

    async def handler(request: Request) -> AsyncIterator[Event]:
        started.append(True)
        yield Event("one")

    app = app_of(handler)
    head = await ask(app, "HEAD")
    assert not started and head.body == b"" and head.complete
    get = await ask(app)
    assert (head.status, head.headers) == (get.status, get.headers)


async def test_head_closes_a_byte_stream_without_starting_it() -> None:
    chunks = Chunks()
    headers = {"content-disposition": "attachment"}
    head = await ask(bytes_app(lambda: chunks, headers), "HEAD")
    assert (chunks.steps, chunks.closed) == (0, 1)
    assert (head.status, head.body, head.complete) == (200, b"", True)
    assert head.headers == {"content-type": "text/csv", "content-disposition": "attachment"}


async def test_head_of_a_stream_that_has_ended_for_good_says_so() -> None:
    assert (await ask(app_of(endless), "HEAD", "/", headers={"last-event-id": "end"})).status == 204


# Apps, loops, threads


@pytest.mark.parametrize("backends", [("asyncio", "asyncio"), ("trio", "trio"), ("asyncio", "trio")], ids="-".join)
def test_two_apps_in_two_loops_do_not_meet(backends: tuple[str, str]) -> None:
    """Each in a thread of its own, in step with each other, so that they do run at the same time."""
    together = threading.Barrier(2, timeout=30)
    answers: dict[int, Answer] = {}

    async def run(number: int) -> None:
        async def handler(request: Request) -> AsyncIterator[Event]:
            for step in range(20):
                await anyio.to_thread.run_sync(together.wait)
                yield Event(f"{number}.{step}")

        app = app_of(handler, heartbeat_s=None, send_timeout_s=1e6)
        async with app.running(), connect(app) as exchange:
            answers[number] = await rest(exchange)

    # On clocks that stand still while a thread works; time plays no part.
    threads = [
        threading.Thread(target=partial(anyio.run, run, number, backend=name)) for number, name in enumerate(backends)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, answer in answers.items():
        assert [event.data for event in answer.events] == [f"{number}.{step}" for step in range(20)]
    assert len(answers) == 2


@pytest.mark.parametrize("name", ["asyncio", "trio"])
def test_one_app_runs_in_one_loop_after_the_other(name: str) -> None:
    async def handler(request: Request) -> AsyncIterator[Event]:
        yield Event("one")
        await anyio.sleep(20)

    app = app_of(handler)
    for _ in range(2):
        kind, options = in_virtual_time(name)
        answer = anyio.run(ask, app, backend=kind, backend_options=options)
        assert answer.chunks == [RETRY + b"data: one\n\n", HEARTBEAT, b"id: end\n\n"]


@pytest.mark.parametrize("reason", ["timeout", "slow", "client"])
async def test_an_app_that_is_not_running_has_heartbeats_and_deadlines_all_the_same(reason: EndReason) -> None:
    """Mounted in a program that passes no lifespan on."""
    trace = Trace()

    async def handler(request: Request) -> AsyncIterator[Event]:
        try:
            yield Event("one")
            await anyio.sleep_forever()
        finally:
            await trace.close(request.end_reason)

    app = app_of(handler, heartbeat_s=4.0, send_timeout_s=8.0, max_stream_s=20.0 if reason == "timeout" else None)
    with anyio.fail_after(LIMIT_S):
        async with connect(app) as exchange:
            assert await exchange.chunk() == RETRY + b"data: one\n\n"
            assert await exchange.chunk() == HEARTBEAT
            if reason == "client":
                exchange.disconnect()
            elif reason == "slow":
                exchange.block()
            await exchange.ended.wait()
    trace.assert_closed(reason)


async def test_streams_of_an_app_that_is_not_running_can_be_drained() -> None:
    app = app_of(endless)
    with anyio.fail_after(LIMIT_S):
        async with connect(app) as exchange:
            assert await exchange.chunk()
            await app.drain(0)
            assert exchange.complete


async def test_many_streams_at_once_stay_apart() -> None:
    async def handler(request: Request, number: int) -> AsyncIterator[Event]:
        for step in range(5):
            yield Event(f"{number}.{step}")
            await anyio.sleep(number % 7 / 10)

    app = app_with(GET("/{number:int}", handler))
    bodies: dict[int, list[str]] = {}

    async def read(number: int) -> None:
        async with connect(app, "GET", f"/{number}") as exchange:
            bodies[number] = [event.data async for event in exchange.events()]

    async with app.running(), anyio.create_task_group() as tasks:
        for number in range(100):
            tasks.start_soon(read, number)
    assert bodies == {number: [f"{number}.{step}" for step in range(5)] for number in range(100)}


# Anything at any time


@dataclass
class Plan:
    """What a handler does, step by step, and what befalls its stream meanwhile. Times are quarters of a second."""

    steps: list[tuple[str, int]]
    befalls: list[tuple[int, str]]


STEPS: Final = st.tuples(
    st.sampled_from(["yield", "yield", "sleep", "timeout", "shield", "checkpoint", "group", "queue"]), st.integers(1, 8)
)
BEFALLS: Final = st.tuples(
    st.integers(0, 40), st.sampled_from(["client", "drain", "cancelled", "block", "unblock", "unblock"])
)
PLANS: Final = st.builds(Plan, st.lists(STEPS, max_size=12), st.lists(BEFALLS, max_size=4).map(sorted))


async def act(step: str, amount: int) -> None:
    seconds = amount / 4
    if step == "sleep":
        await anyio.sleep(seconds)
    elif step == "timeout":
        with anyio.move_on_after(seconds):
            await anyio.sleep(1000)
    elif step == "shield":
        with CancelScope(shield=True):
            await anyio.sleep(seconds)
    elif step == "checkpoint":
        for _ in range(amount):
            await anyio.lowlevel.checkpoint()
    elif step == "group":
        async with anyio.create_task_group() as tasks:
            for number in range(amount):
                tasks.start_soon(anyio.sleep, number / 4)
    elif step == "queue":
        into, out_of = anyio.create_memory_object_stream[int](amount)
        with into, out_of:
            for number in range(amount):
                await into.send(number)
                assert await out_of.receive() == number


@pytest.mark.parametrize("name", ["asyncio", "trio"])
@given(plan=PLANS)
@settings(max_examples=150, deadline=None)
def test_whatever_befalls_a_stream_its_generator_is_closed_and_what_came_is_in_order(name: str, plan: Plan) -> None:
    kind, options = in_virtual_time(name)
    anyio.run(follow, plan, backend=kind, backend_options=options)


async def follow(plan: Plan) -> None:
    trace = Trace()
    given_out: list[str] = []
    disturbed: list[str] = []
    interrupted = False

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            disturbed.append(record.getMessage())

    async def handler(request: Request) -> AsyncIterator[Event]:
        nonlocal interrupted
        try:
            for step, amount in plan.steps:
                if step == "yield":
                    for _ in range(amount):
                        given_out.append(f"{len(given_out)}".rjust(100, "x"))
                        yield Event(given_out[-1])
                else:
                    await act(step, amount)
        except BaseException:
            interrupted = True
            raise
        finally:
            await trace.close(request.end_reason)

    logger, listener = logging.getLogger("sseapp"), Listener()
    logger.addHandler(listener)
    chunks: list[bytes] = []

    async def read(exchange: Exchange) -> None:
        try:
            while (chunk := await exchange.chunk()) is not None:
                chunks.append(chunk)
        except anyio.ClosedResourceError:  # it has left itself
            pass

    try:
        app = app_of(handler, heartbeat_s=1.0, send_timeout_s=6.0, buffer_bytes=500)
        async with stream_to_end(app) as ending, anyio.create_task_group() as tasks:
            exchange = ending.exchange
            tasks.start_soon(read, exchange)
            for at, what in plan.befalls:
                await anyio.sleep(at / 4 - current_time())
                if what == "drain":
                    tasks.start_soon(app.drain, 0)
                elif what in ("block", "unblock"):
                    getattr(exchange, what)()
                else:
                    await getattr(ending, what)()
            await exchange.ended.wait()
    finally:
        logger.removeHandler(listener)

    assert disturbed == []
    assert exchange.failure is None
    assert len(trace.reasons) == 1 or not given_out
    # One that was closing by itself already is cancelled there, as any code is: nobody can tell it from its work.
    assert len(trace.closed_at) == 1 or not interrupted
    body = b"".join(chunks)
    seen = [event.data for event in Decoder().feed(body)]
    assert seen == given_out[: len(seen)]
    if not {"client", "drain", "cancelled", "block"} & {what for _, what in plan.befalls}:
        assert seen == given_out
        assert trace.reasons == ["finished"]
    if trace.reasons == ["finished"] and exchange.complete:
        assert seen == given_out
    if b"id: end" in body:
        assert trace.reasons == ["finished"]
