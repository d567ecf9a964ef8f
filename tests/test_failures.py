"""Whatever a handler raises ends its own stream, and nothing else: against real processes.

In-process, with each way of delivery, the same is in test_stream.py, test_runs.py and test_merge.py.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import httpx
import pytest

from ssecore.wire import Decoder, Event
from tests.raising_app import KINDS
from tests.serving import Server, serve_hypercorn, serve_module, serve_uvicorn, wait_until

REFERENCE: Final = re.compile(r"internal error \(reference [0-9a-f]{12}\)")
SERVERS: Final = ("own", "uvicorn", "hypercorn")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests here: each of them leaves it alive."""
    folder, env = tmp_path_factory.mktemp("data"), {"SSEAPP_HEARTBEAT_S": "0.4"}  # sweeps 20 times a second
    if request.param == "own":
        serving = serve_module("tests.raising_app", folder, env)
    elif request.param == "uvicorn":
        serving = serve_uvicorn(folder, app="tests.raising_app:make", env=env)
    else:
        serving = serve_hypercorn(folder, app="tests.raising_app:make()", env={"SSEAPP_LOG": "memory", **env})
    with serving as server:
        yield server
        assert server.process.poll() is None


@pytest.fixture(autouse=True)
def goes_on(server: Server) -> Iterator[None]:
    """After each test new streams are whole, and runs work."""
    yield
    assert server.client.get("/healthz").json() == "fine"
    for target in ("/count", "/runs-of/count"):
        assert [event.data for event in events(server.client.get(target))] == ["1", "2", "3", ""]


def events(answer: httpx.Response) -> list[Event]:
    assert answer.status_code == 200, answer.text
    return Decoder().feed(answer.content)


def is_problem(answer: httpx.Response) -> bool:
    problem = answer.json()
    return (answer.status_code, problem["code"]) == (500, "internal_error") and bool(
        REFERENCE.fullmatch(problem["detail"])
    )


def is_error(event: Event) -> bool:
    error = json.loads(event.data)
    return error["code"] == "internal_error" and bool(REFERENCE.fullmatch(error["error"]))


@kinds
@pytest.mark.parametrize("target", ["/first", "/unary", "/runs-of/first", "/runs-of/accepted"])
def test_what_is_raised_before_the_first_event_is_a_problem(server: Server, target: str, kind: str) -> None:
    assert is_problem(server.client.get(f"{target}/{kind}"))


@kinds
@pytest.mark.parametrize("target", ["/second", "/merged", "/threaded"])
def test_what_is_raised_after_the_first_event_is_an_error_event(server: Server, target: str, kind: str) -> None:
    first, last = events(server.client.get(f"{target}/{kind}"))
    assert first.data == "1" and (last.event, last.id) == ("error", "end")
    assert is_error(last)


@kinds
def test_what_is_raised_on_a_data_only_route_is_data_and_done(server: Server, kind: str) -> None:
    first, error, done = events(server.client.get(f"/data/{kind}"))
    assert first.data == "1" and is_error(error) and (done.data, done.id) == ("[DONE]", "end")


@kinds
def test_a_run_that_raises_it_has_failed_with_a_stored_error(server: Server, kind: str) -> None:
    answer = server.client.get(f"/runs-of/second/{kind}")
    run = answer.headers["run-id"]
    first, last = events(answer)
    assert first.data == "1" and last.event == "error" and is_error(last)
    assert server.client.get(f"/runs/{run}").json()["state"] == "failed"
    assert events(server.client.get(f"/runs/{run}/events")) == [first, last]
    assert server.client.get(f"/runs/{run}/events", headers={"last-event-id": str(last.id)}).status_code == 204


@kinds
def test_what_is_raised_while_a_handler_is_closed_harms_nobody(server: Server, kind: str) -> None:
    with server.client.stream("GET", f"/closing/{kind}") as answer:
        assert answer.status_code == 200
    answer = server.client.get(f"/runs-of/closing/{kind}", headers={"prefer": "respond-async"})
    run = answer.json()["run"]
    assert server.client.delete(f"/runs/{run}").status_code == 202
    wait_until(lambda: server.client.get(f"/runs/{run}").json()["state"] == "cancelled")
    wait_until(lambda: server.log().count("failed while it was closed") >= 2)


@kinds
def test_a_translation_that_raises_it_ends_its_own_reader(server: Server, kind: str) -> None:
    run = server.client.get("/runs-of/count").headers["run-id"]
    assert is_problem(server.client.get(f"/seen/{kind}/1/{run}"))
    first, last = events(server.client.get(f"/seen/{kind}/2/{run}"))
    # For good: a browser that came back would fail at the same event again.
    assert first.data == "1" and (last.event, last.id) == ("error", "end") and is_error(last)
    assert server.client.get(f"/seen/{kind}/2/{run}", headers={"last-event-id": "end"}).status_code == 204


@kinds
def test_a_pulse_that_raises_it_ends_its_own_stream(server: Server, kind: str) -> None:
    with server.client.stream("GET", f"/pulsing/{kind}") as answer, suppress(httpx.RemoteProtocolError):
        for _ in answer.iter_raw():  # to its end, which is a cut under a server that can be told so
            pass


@kinds
def test_a_caller_function_that_raises_it_is_a_problem(server: Server, kind: str) -> None:
    assert is_problem(server.client.get("/count", headers={"x-raise": kind}))
