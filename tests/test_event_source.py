"""What a browser's `EventSource` gets besides what others get, and the cursor that a client brings.

The real engines are in tests/test_browsers.py.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Final

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseapp import GET, POST, Event, Request, Run, Settings, SSEApp, Subscription
from ssecore.wire import Decoder, cut, encode
from tests.clients import BROWSER, REAL_BROWSER, Answer, ask, listen_like_a_browser, listening

#: A cursor of a run that never was.
NOBODYS: Final = "BBBBBBBBBBBBBBBBBBBBBB.3"
TEXTS: Final = st.text(st.characters(exclude_categories=["Cs"]))
LINES: Final = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1)
EVENTS: Final = st.builds(Event, TEXTS, st.none() | LINES, st.none() | LINES, st.none() | st.integers(0, 10**6))


def plain(event: Event) -> tuple[str, str | None, str | None]:
    return event.data.replace("\r\n", "\n").replace("\r", "\n"), event.event, event.id


async def words(request: Request) -> AsyncIterator[Event]:
    for word in ("one", "two", "three"):
        yield Event(word)


async def late(request: Request) -> AsyncIterator[Event]:
    await anyio.sleep(1.1)
    yield Event("late")


async def late_end(request: Request) -> AsyncIterator[Event]:
    yield Event("only")
    await anyio.sleep(0.05)


async def topic(request: Request) -> Subscription:
    return Subscription("news", Event("hello", "init"))


def app_of(**settings: Any) -> SSEApp:
    routes = [
        GET("/run", words, run=Run()),
        GET("/late", late, run=Run()),
        GET("/fleeting", words),
        GET("/late-end", late_end),
        GET("/topic", topic),
        POST("/posted", words),
    ]
    return SSEApp(routes, Settings(log="memory", auth="off", **settings))


async def opening(app: SSEApp, target: str, headers: dict[str, str]) -> bytes:
    async with listening(app, target, headers=headers) as reading:
        assert reading.exchange.headers["content-type"] == "text/event-stream"
        await reading.chunk()
        return reading.raw


#: Each kind of answer that is an event stream: the target, the cursor, and the settings that make it so.
ANSWERS: Final = {
    "run": ("/run", "", {}),
    "topic": ("/topic", "", {}),
    "topic, expired": ("/topic", NOBODYS, {}),
    "fleeting": ("/fleeting", "", {}),
    "fleeting, an id of its handler": ("/fleeting", "größe 1", {}),
    "run, expired": ("/run", NOBODYS, {}),
    "refused softly": ("/run", NOBODYS, {"max_streams": 1}),
    "refused softly, at first": ("/fleeting", "", {"max_streams": 1}),
}


@pytest.mark.parametrize("kind", sorted(ANSWERS))
async def test_every_event_stream_puts_a_browsers_cursor_back_first(kind: str) -> None:
    target, cursor, settings = ANSWERS[kind]
    app = app_of(**settings)
    headers = REAL_BROWSER | ({"last-event-id": cursor.encode().decode("latin-1")} if cursor else {})
    async with app.running(), AsyncExitStack() as stack:
        if "refused" in kind:  # another one has taken the only place
            await stack.enter_async_context(listening(app, "/topic"))
        with anyio.fail_after(10):
            raw = await opening(app, target, headers)
            others = await opening(app, target, headers | BROWSER)
    assert raw.startswith(
        b":\nid: %b\nevent: cut\n\nretry: " % cursor.encode() if "expired" not in kind else b":\nid: "
    )
    assert b"cut" not in others and others.startswith((b"retry: ", b"data: ", b"event: "))


async def test_a_resumed_run_puts_a_browsers_cursor_back_first() -> None:
    app = app_of()
    async with app.running():
        run = (await ask(app, "/run")).headers["run-id"]
        for headers, target in (({"last-event-id": f"{run}.1"}, "/run"), ({}, f"/run?last_event_id={run}.1")):
            answer = await ask(app, target, headers=REAL_BROWSER | headers)
            assert answer.body.startswith(b":\nid: %b.1\nevent: cut\n\nretry: 2000\ndata: two\n" % run.encode())
            assert [event.data for event in answer.events] == ["two", "three"]


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", "/run", {}),
        ("GET", "/run", BROWSER),
        ("GET", "/run", {"accept": "text/event-stream", "user-agent": "Mozilla/5.0"}),
        ("GET", "/run", {"cache-control": "no-cache", "user-agent": "Mozilla/5.0"}),
        ("GET", "/run", BROWSER | {"user-agent": "Go Mozilla/5.0"}),
        ("POST", "/posted", REAL_BROWSER),
    ],
)
async def test_other_clients_see_nothing_of_it(method: str, target: str, headers: dict[str, str]) -> None:
    app = app_of()
    async with app.running():
        answer = await ask(app, target, method, headers=headers)
    assert answer.body.startswith(b"retry: 2000\ndata: one\n")


async def test_a_client_without_a_name_is_treated_as_a_browser_for_what_it_keeps() -> None:
    """npm's `eventsource` 2."""
    app = app_of()
    nameless = {name: value for name, value in BROWSER.items() if name != "user-agent"}
    async with app.running():
        assert (await ask(app, "/run", headers=nameless)).body.startswith(b":\nid: \nevent: cut\n\n")
        assert b"event: cursor" not in (await ask(app, "/late-end", headers=nameless)).body


async def test_a_late_run_sets_a_browsers_cursor_by_an_event_with_data() -> None:
    app = app_of()
    async with app.running():
        with anyio.fail_after(10):
            async with listening(app, "/late", headers=REAL_BROWSER) as reading:
                await reading.chunk()
                run = reading.run.encode()
                assert reading.raw == (b":\nid: \nevent: cut\n\nretry: 2000\nevent: cursor\ndata:\nid: %b.0\n\n" % run)
            heard = await listen_like_a_browser(app, "/late", cuts=[len(reading.raw)])
        assert (heard.data, heard.statuses) == (["late"], [200, 200, 204])


async def test_the_end_of_a_fleeting_stream_that_comes_alone_stops_a_browser() -> None:
    app = app_of()
    async with app.running():
        with anyio.fail_after(10):
            heard = await listen_like_a_browser(app, "/late-end")
            others = await ask(app, "/late-end", headers=BROWSER)
    assert (heard.data, heard.statuses) == (["only"], [200, 204])
    assert others.body == b"retry: 2000\ndata: only\n\nid: end\n\n"


@given(TEXTS)
def test_a_cursor_from_outside_forges_nothing(cursor: str) -> None:
    decoder = Decoder()
    opening = cut(cursor)
    assert opening.count(b"\n") == 4 and b"\r" not in opening and b"\0" not in opening
    assert decoder.feed(opening) == []
    assert decoder.last_event_id == ("" if set(cursor) & set("\r\n\0") else cursor)


@given(EVENTS, EVENTS, LINES, st.data())
def test_half_an_event_that_a_client_kept_goes_to_cut_and_the_rest_is_right(
    half: Event, event: Event, cursor: str, data: st.DataObject
) -> None:
    """A client that reads two connections as one stream, as WebKit does after a reset."""
    frame = encode(half)
    kept = frame[: data.draw(st.integers(0, len(frame) - 1))]
    decoder = Decoder()
    *junk, last = decoder.feed(kept + cut(cursor) + b"retry: 2000\n" + encode(event))
    assert all(event.event == "cut" and event.id == cursor for event in junk) and len(junk) <= 1
    assert plain(last) == plain(Event(event.data, event.event, event.id or cursor))


# The cursor


def cursor_of(query: str = "", **headers: bytes) -> str:
    raw = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    scope = {"method": "GET", "path": "/", "query_string": query.encode(), "headers": raw}

    async def receive() -> Any:
        raise AssertionError

    return Request(scope, receive).last_event_id


@pytest.mark.parametrize(
    ("query", "header", "cursor"),
    [
        ("", b"a.1", "a.1"),
        ("", b" \ta.1\t ", "a.1"),
        ("", "größe 😀".encode(), "größe 😀"),
        ("", "größe".encode("latin-1"), "größe"),
        ("last_event_id=b.2", b"", "b.2"),
        ("last_event_id=b.2", b" ", "b.2"),
        ("last_event_id=b.2", b"a.1", "a.1"),
        ("lastEventId=c.3", b"", "c.3"),
        ("lastEventId=c.3", b"a.1", "a.1"),
        ("lastEventId=%20c.3+", b"", "c.3"),
        ("lastEventId=c.3&last_event_id=b.2", b"", "c.3"),
        ("lastEventId=&last_event_id=b.2", b"", "b.2"),
        ("lastEventId=+&last_event_id=%20", b"", ""),
        ("", b"", ""),
    ],
)
def test_a_cursor_is_read_as_the_client_means_it(query: str, header: bytes, cursor: str) -> None:
    assert cursor_of(query, last_event_id=header) == cursor


@given(LINES)
def test_an_id_comes_back_as_it_was_sent(id: str) -> None:
    assert cursor_of(last_event_id=id.strip(" \t").encode()) == id.strip(" \t")


async def test_the_name_of_event_source_polyfill_resumes_the_same_run() -> None:
    """With other parameters besides, and where the run was started with a key."""
    app = app_of()
    async with app.running():
        for rest in ("x=1", "x=1&key=AAAAAAAAAAAAAAAAAAAAAA"):
            run = (await ask(app, f"/run?{rest}")).headers["run-id"]
            answer: Answer = await ask(app, f"/run?{rest}&lastEventId={run}.1")
            assert (answer.headers["run-id"], [event.data for event in answer.events]) == (run, ["two", "three"])
            assert (await ask(app, f"/run?{rest}&lastEventId={run}.3")).status == 204
        assert (await ask(app, "/fleeting?lastEventId=end")).status == 204
        again = await ask(app, "/run?x=1&key=AAAAAAAAAAAAAAAAAAAAAA&lastEventId=")
        assert again.headers["run-id"] == run
