"""The streams of handlers/basics.py, byte for byte, from real servers: ours, plain uvicorn, and hypercorn on trio."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Server, serve, serve_hypercorn, serve_uvicorn


def serve_basics_on_trio(data_dir: Path) -> AbstractContextManager[Server]:
    return serve_hypercorn(data_dir, app="tests.basics_app:app")


@pytest.fixture(scope="session", params=[serve, serve_uvicorn, serve_basics_on_trio], ids=["sseapp", "uvicorn", "trio"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    start: Callable[[Path], AbstractContextManager[Server]] = request.param
    with start(tmp_path_factory.mktemp("data")) as server:
        yield server


def stream(*events: str) -> str:
    """The whole body: it opens with the reconnection time, and its last event says that it has ended for good."""
    *most, last = events
    return "retry: 2000\n" + "".join(f"{event}\n\n" for event in [*most, f"{last}\nid: end"])


def named(name: str, data: Any) -> str:
    return f"event: {name}\n{data_only(data)}"


def data_only(data: Any) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}"


def update(n: int) -> dict[str, Any]:
    return {"count": n, "message": f"Update {n}"}


DONE = named("complete", {"done": True})
ITEM_7 = named("item_error", {"error": "data contains a lone surrogate at position 7"})
TIME_IS_OVER = "Stream timeout exceeded"
FINISHED = named("complete", {"message": "Countdown finished!"})

BODIES = {
    "/stream?interval=0": stream(*(named("message", update(n)) for n in range(10)), DONE),
    "/stream?count=2&interval=0": stream(
        'event: message\ndata: {"count":0,"message":"Update 0"}',
        'event: message\ndata: {"count":1,"message":"Update 1"}',
        'event: complete\ndata: {"done":true}',
    ),
    "/stream?count=0&interval=0": stream(DONE),
    "/stream/data?count=2&interval=0": stream(*(data_only(update(n)) for n in range(2)), "data: [DONE]"),
    "/stream/data?interval=0": stream(*(data_only(update(n)) for n in range(10)), "data: [DONE]"),
    "/stream/data?count=0&interval=0": stream("data: [DONE]"),
    "/stream/hello?interval=0": stream(
        'event: message\ndata: {"text":"Hello"}',
        'event: message\ndata: {"text":"from"}',
        'event: message\ndata: {"text":"Server-Sent"}',
        'event: message\ndata: {"text":"Events!"}',
        DONE,
    ),
    "/stream/progress?interval=0": stream(*(named("progress", {"progress": n * 10}) for n in range(11)), DONE),
    "/stream/format?interval=0": stream(
        "data: data alone",
        "event: message\ndata: with an event type",
        'event: update\ndata: {"count":42}\nid: msg-123',
        "retry: 5000\nevent: config\ndata: Setting retry",
    ),
    "/stream/errors?total=20&at=9&interval=0": stream(
        'event: connected\ndata: {"status":"ok"}',
        *(f"data: Item {n}" for n in range(7)),
        ITEM_7,
        "data: Item 8",
        named("error", {"error": "the source failed at item 9", "type": "RuntimeError", "fatal": True}),
        "event: done\ndata: ",
    ),
    "/stream/errors?total=3&at=50&interval=0": stream(
        named("connected", {"status": "ok"}), *(f"data: Item {n}" for n in range(3)), "event: done\ndata: "
    ),
    "/stream/errors?at=0&interval=0": stream(
        named("connected", {"status": "ok"}),
        named("error", {"error": "the source failed at item 0", "type": "RuntimeError", "fatal": True}),
        "event: done\ndata: ",
    ),
    "/stream/timeout?limit=0&interval=0": stream(named("error", {"error": TIME_IS_OVER, "timeout": 0})),
    "/countdown/3?interval=0": stream(*(named("countdown", {"remaining": n}) for n in (3, 2, 1)), FINISHED),
    "/countdown/0?interval=0": stream(FINISHED),
    "/countdown/%31?interval=0": stream(named("countdown", {"remaining": 1}), FINISHED),
    "/countdown/3600?interval=0": stream(*(named("countdown", {"remaining": n}) for n in range(3600, 0, -1)), FINISHED),
    "/process/stream?interval=0": stream(
        *(named("progress", {"step": step}) for step in ("Analyzing", "Processing", "Finalizing")),
        'event: complete\ndata: {"result":"Done!"}',
    ),
}

ENGINE_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
SERVER_HEADERS = {"date", "server", "transfer-encoding"}


@pytest.mark.parametrize("target", BODIES)
def test_a_stream_has_exactly_these_bytes(target: str, server: Server) -> None:
    response = server.client.get(target)
    assert response.status_code == 200
    assert response.content.decode() == BODIES[target]


def test_a_long_stream_has_exactly_its_bytes(server: Server) -> None:
    body = server.client.get("/stream?count=50000&interval=0").content
    assert body.decode() == stream(*(named("message", update(n)) for n in range(50_000)), DONE)


def test_a_limit_ends_a_pause_and_nothing_comes_after_it(server: Server) -> None:
    wanted = stream(named("message", {"count": 0}), named("error", {"error": TIME_IS_OVER, "timeout": 0.02}))
    # Many times, because some loops' timers go off a little before their time.
    bodies = {server.client.get("/stream/timeout?limit=0.02&interval=3600").text for _ in range(40)}
    assert bodies == {wanted}


@pytest.mark.parametrize("interval", ["0", "0.001"])
def test_merged_sources_keep_their_own_order(interval: str, server: Server) -> None:
    body = server.client.get(f"/stream/merge?interval={interval}").text
    assert body.startswith("retry: 2000\n")
    assert body.endswith("\n\ndata: [DONE]\nid: end\n\n")
    *items, done = body.removeprefix("retry: 2000\n").removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]\nid: end"
    values = defaultdict(list)
    for item in items:
        match = re.fullmatch(r'data: \{"source":"([AB])","value":(\d)\}', item)
        assert match, item
        values[match[1]].append(int(match[2]))
    assert values == {"A": [0, 1, 2, 3, 4], "B": [0, 1, 2]}


# What each route does is asked in test_contract.py; here, what each server makes of it.


def test_a_stream_has_these_headers_and_none_of_the_connections(server: Server) -> None:
    headers = server.client.get("/stream/hello?interval=0").headers
    assert {name: value for name, value in headers.items() if name not in SERVER_HEADERS} == ENGINE_HEADERS
    assert headers["transfer-encoding"] == "chunked"


def test_head_has_the_headers_and_no_body_and_starts_nothing(server: Server) -> None:
    response = server.client.head("/countdown/3600?interval=3600")
    assert (response.status_code, response.content) == (200, b"")
    assert {name: value for name, value in response.headers.items() if name not in SERVER_HEADERS} == ENGINE_HEADERS
    # Out of range, but nobody has looked: that is the generator's to do.
    assert server.client.head("/countdown/3601").status_code == 200


def test_a_browser_that_has_seen_the_end_is_stopped(server: Server) -> None:
    for headers, query in (
        ({"last-event-id": "end"}, ""),
        ({}, "&last_event_id=end"),
        ({"last-event-id": ""}, "&last_event_id=end"),
    ):
        response = server.client.get("/stream/hello?interval=0" + query, headers=headers)
        assert (response.status_code, response.content) == (204, b"")
        assert "content-length" not in response.headers


@pytest.mark.parametrize("last_event_id", ["", "msg-123", "END", "0", "e.1", "end2"])
def test_another_last_id_starts_a_stream_anew(last_event_id: str, server: Server) -> None:
    target = "/stream/format?interval=0"
    response = server.client.get(target, headers={"last-event-id": last_event_id})
    assert response.text == BODIES[target]


@pytest.mark.parametrize(
    "target",
    [
        "/countdown",
        "/countdown/",
        "/countdown/1/",
        "/countdown/1%2F",
        "/stream/",
        "/Stream",
        "/stream/nothing",
    ],
)
def test_what_is_no_route_is_not_found(target: str, server: Server) -> None:
    response = server.client.get(target)
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize("text", ["ten", "1.5", "1e3", "+1", "1%0A", "%D9%A3", "9" * 19])
def test_what_is_no_number_is_refused_by_its_name(text: str, server: Server) -> None:
    response = server.client.get(f"/countdown/{text}")
    assert (response.status_code, response.json()["field"]) == (400, "seconds")


def test_nothing_of_this_was_an_error_to_the_server(server: Server) -> None:
    log = server.log()
    assert "Traceback" not in log
    assert "ERROR" not in log
