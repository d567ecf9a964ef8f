"""The whole service on trio, under hypercorn: runs, cuts, topics, jobs and tables, on both logs of one process.

test_basics.py reads the streams of handlers/basics.py from hypercorn too, byte for byte. What sends a stream runs on
trio in virtual time as well: test_stream.py, test_delivery.py, test_merge.py, test_progress.py. The rest of the tests
run on asyncio alone.
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssecore.wire import Decoder, Event
from tests.serving import Server, is_clean, serve_hypercorn

EVENTS = {"accept": "text/event-stream"}
ASYNC = {"prefer": "respond-async"}


@pytest.fixture(scope="module", params=["memory", "sqlite"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"SSEAPP_LOG": request.param, "SSEAPP_MOCK_DELAY_S": "0.01"}
    with serve_hypercorn(tmp_path_factory.mktemp("data"), env=env) as server:
        yield server
        assert is_clean(server.log())


def read(server: Server, target: str, last_id: str = "", events: int = 0, **options: Any) -> list[Event]:
    """All events, or the first so many: then the connection is cut."""
    headers = EVENTS | ({"last-event-id": last_id} if last_id else {})
    decoder, found = Decoder(), list[Event]()
    with server.client.stream(options.pop("method", "GET"), target, headers=headers, **options) as response:
        assert response.status_code == 200, response.read()
        for chunk in response.iter_raw():
            found += decoder.feed(chunk)
            if events and len(found) >= events:
                break
    # Without `retry`: each answer opens with one.
    found = [Event(event.data, event.event, event.id) for event in found]
    return found[:events] if events else found


def start(server: Server, target: str) -> str:
    run: str = server.client.get(target, headers=ASYNC).raise_for_status().json()["run"]
    return run


def test_it_is_ready(server: Server) -> None:
    assert server.client.get("/readyz").json() == {"status": "ready"}


def test_a_chat_that_is_cut_after_each_event_is_whole_and_then_over(server: Server) -> None:
    run = start(server, "/chat?prompt=hello")
    target = f"/runs/{run}/events"
    whole = read(server, target)
    assert [event.id for event in whole] == [f"{run}.{number}" for number in range(1, len(whole) + 1)]
    for number, event in enumerate(whole[:-1], 1):
        assert read(server, target, f"{event.id}") == whole[number:]
    over = server.client.get(target, headers=EVENTS | {"last-event-id": f"{whole[-1].id}"})
    assert (over.status_code, over.content) == (204, b"")


def test_a_run_goes_on_without_a_reader_and_is_cancelled_when_it_is_asked(server: Server) -> None:
    job = server.client.post("/jobs", json={"kind": "sleep", "input": {"steps": 1000, "interval": 0.05}})
    run = job.raise_for_status().headers["run-id"]
    first = read(server, f"/runs/{run}/events", events=1)
    assert read(server, f"/runs/{run}/events", f"{first[0].id}", events=1)
    assert server.client.delete(f"/runs/{run}").status_code == 202
    assert '"cancelled"' in read(server, f"/runs/{run}/events")[-2].data
    assert server.client.get(f"/runs/{run}").json()["state"] == "cancelled"


def test_a_topic_is_heard_live_and_after_a_cut(server: Server) -> None:
    def publish(number: int) -> None:
        assert server.client.post("/topics/news", json={"n": number}).status_code == 202

    decoder, found = Decoder(), list[Event]()
    with server.client.stream("GET", "/topics/news", headers=EVENTS) as response:
        for chunk in response.iter_raw():
            if len(found) < 4:
                found += decoder.feed(chunk)
                publish(len(found))
            else:
                break
    data = [event.data for event in found]
    assert data[1:4] == ['{"n":1}', '{"n":2}', '{"n":3}']
    assert read(server, "/topics/news", f"{found[1].id}", events=2) == found[2:4]


def test_rows_go_in_and_come_out(server: Server) -> None:
    rows = "".join(f"title {number},open\n" for number in range(500))
    headers = EVENTS | {"content-type": "text/csv"}
    answer = server.client.post("/tasks/import", content=f"title,status\n{rows}", headers=headers)
    last = Decoder().feed(answer.content)[-1]
    assert answer.status_code == 200 and last.event == "complete", last
    assert server.client.get("/export.csv").text.count("title ") == 500


def test_a_run_that_the_end_interrupted_is_there_at_the_next_start(tmp_path: Path) -> None:
    with serve_hypercorn(tmp_path, env={"SSEAPP_LOG": "sqlite"}) as server:
        answer = server.client.post("/jobs", json={"kind": "sleep", "input": {"steps": 9, "interval": 60}})
        run = answer.headers["run-id"]
        server.process.send_signal(signal.SIGTERM)
        server.wait()  # hypercorn ends itself by the signal
    assert is_clean(server.log())
    with serve_hypercorn(tmp_path, env={"SSEAPP_LOG": "sqlite"}) as server:
        assert server.client.get(f"/runs/{run}").json()["state"] == "interrupted"
