"""Counters and gauges, and the line that a stream's end leaves in the log."""

import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sseapp import GET, POST, ByteStream, Event, NotFound, Request, Response, Run, Settings, SSEApp, Subscription
from ssecore.errors import BadRequest, Unavailable
from ssecore.http.tokens import add_token
from ssecore.testing import connect
from tests.clients import BROWSER, ask, listening
from tests.serving import serve, wait_until


async def two(request: Request) -> AsyncIterator[Event]:
    yield Event("one")
    yield Event("two")


async def ticks(request: Request) -> AsyncIterator[Event]:
    yield Event("tick")
    await anyio.sleep_forever()


async def late(request: Request) -> AsyncIterator[Event]:
    await anyio.sleep(1.2)
    yield Event("late")


async def fails(request: Request) -> AsyncIterator[Event]:
    yield Event("secret payload")
    raise NotFound("gone")


async def feed(request: Request, name: str) -> Subscription:
    return Subscription(name, Event("init"))


async def publish(request: Request, name: str) -> Response:
    await request.topics.publish(name, Event("published"))
    return Response()


async def chunks(request: Request) -> ByteStream:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 10

    return ByteStream(parts(), "text/csv")


ROUTES = [
    GET("/two", two),
    GET("/ticks/{name}", feed),
    GET("/ticks", ticks),
    GET("/late", late),
    GET("/fails", fails),
    GET("/run", two, run=Run()),
    POST("/publish/{name}", publish),
    GET("/chunks", chunks),
]


@pytest.fixture
def app() -> SSEApp:
    return SSEApp(ROUTES, Settings(log="memory"))


def value(app: SSEApp, name: str, **labels: str) -> float:
    """Of one sample; 0 where there is none."""
    for family in text_string_to_metric_families(app.metrics.text().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return 0


async def test_a_stream_is_counted_with_what_it_sent_and_why_it_ended(app: SSEApp) -> None:
    async with app.running():
        answers = [await ask(app, "/two") for _ in range(3)]
        await ask(app, "/fails")
        await ask(app, "/chunks")
    assert value(app, "sseapp_streams_ended_total", route="/two", reason="finished") == 3
    assert value(app, "sseapp_streams_ended_total", route="/fails", reason="failed") == 1
    assert value(app, "sseapp_events_sent_total", route="/two") == 6
    assert value(app, "sseapp_events_sent_total", route="/chunks") == 3
    assert value(app, "sseapp_sent_bytes_total", route="/two") == sum(len(answer.body) for answer in answers)
    assert value(app, "sseapp_sent_bytes_total", route="/chunks") == 30
    assert value(app, "sseapp_first_event_seconds_count", route="/two") == 3
    assert value(app, "sseapp_streams_open", route="/two") == 0


async def test_an_open_stream_counts_while_it_is_open(app: SSEApp, parked: bool) -> None:
    async with app.running():
        async with listening(app, "/ticks/news") as first, listening(app, "/ticks/news") as second:
            await first.event(), await second.event()
            for _ in range(5):
                await ask(app, "/publish/news", "POST")
            for _ in range(5):
                await first.event(), await second.event()
            assert value(app, "sseapp_streams_open", route="/ticks/{name}") == 2
            assert value(app, "sseapp_events_sent_total", route="/ticks/{name}") == 10
            sent = value(app, "sseapp_sent_bytes_total", route="/ticks/{name}")
            assert sent == len(first.raw) + len(second.raw)
            assert value(app, "sseapp_first_event_seconds_count", route="/ticks/{name}") == 2
        assert value(app, "sseapp_streams_open", route="/ticks/{name}") == 0
        assert value(app, "sseapp_sent_bytes_total", route="/ticks/{name}") == sent, "what it counted stays"
        assert value(app, "sseapp_streams_ended_total", route="/ticks/{name}", reason="client") == 2
    assert value(app, "sseapp_log_append_seconds_count") == value(app, "sseapp_log_events_total") == 5


async def test_the_first_event_is_the_first_and_no_opening(app: SSEApp) -> None:
    async with app.running():
        await ask(app, "/late")
    assert value(app, "sseapp_first_event_seconds_count", route="/late") == 1
    assert value(app, "sseapp_first_event_seconds_sum", route="/late") > 1.1


async def test_runs_are_counted_by_their_state(app: SSEApp) -> None:
    async with app.running():
        async with listening(app, "/run") as reading:
            await reading.rest()
        answer = await ask(app, "/run", headers={"last-event-id": f"{reading.run}.1"})
        assert [event.data for event in answer.events] == ["two"]
        assert value(app, "sseapp_runs_running") == 0
    assert value(app, "sseapp_runs_ended_total", state="completed") == 1
    assert value(app, "sseapp_resumes_total", route="/run") == 1
    assert value(app, "sseapp_events_sent_total", route="/run") == 3
    assert value(app, "sseapp_log_events_total") == 2


async def test_a_gap_is_counted_by_its_reason(app: SSEApp) -> None:
    unknown = {"last-event-id": "A" * 22 + ".7"}
    async with app.running():
        async with listening(app, "/ticks/news", headers=unknown) as reading:
            assert (await reading.event()).event == "gap"
        await ask(app, "/run", headers=unknown | {"accept": "text/event-stream"})
        assert value(app, "sseapp_gaps_total", reason="expired") == 2


async def test_refusals_are_counted_by_their_status(app: SSEApp) -> None:
    for target in ("/nothing", "/two?a=1&a=2", "/nothing"):
        await ask(app, target)
    await app.drain(0)
    assert (await ask(app, "/two", headers=BROWSER)).status == 200, "softly"
    assert value(app, "sseapp_refused_total", status="404") == 2
    assert value(app, "sseapp_refused_total", status="503") == 1


@pytest.mark.parametrize(("error", "reason"), [(BadRequest, "refused"), (Unavailable, "failed"), (KeyError, "failed")])
async def test_what_its_client_did_wrong_is_no_failure_of_a_stream(
    error: type[Exception], reason: str, parked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(request: Request) -> AsyncIterator[Event]:
        raise error("count: too many")
        yield

    async def refuse_late(request: Request) -> AsyncIterator[Event]:
        await anyio.sleep(1.1)  # the answer has begun
        raise error("count: too many")
        yield

    app = SSEApp([GET("/refuse", refuse), GET("/late", refuse_late)], Settings(log="memory"))
    with caplog.at_level(logging.INFO):
        async with app.running():
            await ask(app, "/refuse")
            await ask(app, "/late")
    for route in ("/refuse", "/late"):
        assert value(app, "sseapp_streams_ended_total", route=route, reason=reason) == 1
        assert f"GET {route} ended: {reason}" in caplog.text


async def test_time_with_a_client_that_does_not_read_is_seen() -> None:
    app = SSEApp([GET("/ticks", ticks)], Settings(log="memory", send_timeout_s=0.8))
    async with app.running(), connect(app, "GET", "/ticks") as exchange:
        exchange.block()
        with anyio.fail_after(20):
            await exchange.ended.wait()
    assert value(app, "sseapp_streams_ended_total", route="/ticks", reason="slow") == 1
    assert value(app, "sseapp_stalled_seconds_total", route="/ticks") > 0.5


def test_two_apps_do_not_share_a_count() -> None:
    first, second = SSEApp([]), SSEApp([])
    first.metrics.resumes.labels("/x").inc()
    assert value(second, "sseapp_resumes_total", route="/x") == 0
    assert b"sseapp_build_info" in second.metrics.text()


async def test_a_label_is_a_line_of_the_table_and_never_what_somebody_asked_for(app: SSEApp) -> None:
    async with app.running():
        for number in range(20):
            async with listening(app, f"/ticks/secret{number}") as reading:
                await reading.event()
    assert b"secret" not in app.metrics.text()


# One line a stream


async def test_a_stream_leaves_one_line(caplog: pytest.LogCaptureFixture) -> None:
    app = SSEApp(ROUTES, Settings(log="memory"), caller=lambda request: "ann")
    with caplog.at_level(logging.INFO):
        await ask(app, "/fails?password=hidden", headers={"authorization": "Bearer hidden"})
    (line,) = [message for message in caplog.messages if "ended" in message]
    assert re.fullmatch(r"GET /fails ended: failed after [0-9.]+ s, 1 events, [0-9]+ bytes, caller ann", line)
    assert "hidden" not in caplog.text and "payload" not in caplog.text


def test_as_json_each_fact_stands_by_itself(tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_LOG_FORMAT": "json"}) as server:
        server.client.get("/countdown/2?interval=0")
        ended = 'sseapp_streams_ended_total{reason="finished",route="/countdown/{seconds:int}"} 1.0'
        wait_until(lambda: ended in server.client.get("/metrics").text)  # its end comes after its last byte
        metrics = server.client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert "process_open_fds" in metrics.text
    lines: list[dict[str, Any]] = [json.loads(line) for line in server.log().splitlines()]
    (line,) = [line for line in lines if "reason" in line]
    assert (line["level"], line["route"], line["reason"], line["events"]) == (
        "INFO",
        "/countdown/{seconds:int}",
        "finished",
        3,
    )


def test_the_metrics_are_for_a_token_that_may_read_them(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    named = {name: add_token(tokens, name, may=may) for name, may in (("ann", ["publish"]), ("metrics", ["metrics"]))}
    with serve(tmp_path / "data", env={"SSEAPP_TOKENS_FILE": str(tokens)}) as server:
        statuses = [
            server.client.get("/metrics", headers=headers).status_code
            for headers in ({}, *({"authorization": f"Bearer {token}"} for token in named.values()))
        ]
    assert statuses == [401, 403, 200]
