"""The routes of topics, from a real server process; their heartbeat in virtual time."""

import re
import signal
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import anyio
import httpx
import orjson
import pytest
from anyio import current_time

from handlers.notifications import MAX_GROWTH, MAX_NAME, ROUTES
from sseapp import SSEApp
from ssecore.http.tokens import add_token
from ssecore.settings import Settings
from ssecore.testing import connect
from ssecore.wire import Decoder, Event
from tests import serving
from tests.house import Backend, in_virtual_time
from tests.lines import lines_offered
from tests.serving import Server, serve

server = serving.server

JSON: Final = {"content-type": "application/json"}


class Subscriber:
    """A stream that is read an event at a time."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.body = b""
        self._chunks = response.iter_bytes()
        self._decoder = Decoder()
        self._events: deque[Event] = deque()

    def next(self) -> Event:
        while not self._events:
            chunk = next(self._chunks)
            self.body += chunk
            self._events += self._decoder.feed(chunk)
        return self._events.popleft()

    def rest(self) -> bytes:
        """All that is still to come, to the answer's proper end."""
        return b"".join(self._chunks)


@contextmanager
def subscribed(server: Server, path: str, last_id: str = "") -> Iterator[Subscriber]:
    headers = {"last-event-id": last_id} if last_id else {}
    with server.client.stream("GET", path, headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"] == "text/event-stream"
        yield Subscriber(response)


def post(server: Server, path: str, body: Any) -> dict[str, Any]:
    """Publish; gives the answer."""
    response = server.client.post(path, json=body)
    assert response.status_code == 202, response.text
    answer: dict[str, Any] = response.json()
    return answer


def sequence(id: str | None) -> int:
    return int((id or "").partition(".")[2])


def published(server: Server, path: str) -> int:
    """How many events were published on this path before this one."""
    return sequence(post(server, path, "one more")["id"]) - 1


def refused(response: httpx.Response, status: int, field: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status and problem.get("field") == field


# What a page gets


def test_a_user_gets_notifications_and_messages_as_they_come(server: Server) -> None:
    with subscribed(server, "/users/ann/stream") as ann:
        init = ann.next()
        assert (init.event, orjson.loads(init.data)) == ("init", {"status": "connected"})
        for kind, name in (("notifications", "notification"), ("messages", "message")):
            answer = post(server, f"/users/ann/{kind}", {"text": kind})
            assert answer.keys() == {"id"}
            assert ann.next() == Event(f'{{"text":"{kind}"}}', name, answer["id"])


def test_a_topic_gets_what_is_published_under_the_name_that_was_asked_for(server: Server) -> None:
    with subscribed(server, "/topics/prices") as prices:
        init = prices.next()
        assert (init.event, orjson.loads(init.data)) == ("init", {"topic": "prices"})
        first = post(server, "/topics/prices", 1)
        assert first.keys() == {"id", "subscribers"} and first["subscribers"] == 1
        assert prices.next() == Event("1", "message", first["id"])
        second = post(server, "/topics/prices?event=price%20change", 2)
        assert prices.next() == Event("2", "price change", second["id"])
        assert sequence(second["id"]) == sequence(first["id"]) + 1 == sequence(init.id) + 2


def test_publishing_says_how_many_were_there_to_read_it(server: Server) -> None:
    assert post(server, "/topics/counted", 0)["subscribers"] == 0
    with subscribed(server, "/topics/counted") as one:
        one.next()
        with subscribed(server, "/topics/counted") as two:
            two.next()
            assert post(server, "/topics/counted", 0)["subscribers"] == 2
        serving.wait_until(lambda: post(server, "/topics/counted", 0)["subscribers"] == 1)


def test_users_and_topics_of_one_name_are_separate(server: Server) -> None:
    with subscribed(server, "/users/bo/stream") as user, subscribed(server, "/topics/bo") as topic:
        user.next()
        topic.next()
        post(server, "/users/bo/messages", "to the user")
        post(server, "/topics/bo", "to the topic")
        assert user.next().data == '"to the user"'
        assert topic.next().data == '"to the topic"'
        post(server, "/users/other/messages", "to somebody else")
        post(server, "/users/bo/messages", "again")
        assert user.next().data == '"again"'


def test_a_subscriber_that_comes_back_goes_on_where_it_was(server: Server) -> None:
    with subscribed(server, "/topics/resumed") as reader:
        init = reader.next()
    for number in range(5):
        post(server, "/topics/resumed", number)
    with subscribed(server, "/topics/resumed", init.id or "") as reader:
        events = [reader.next() for _ in range(3)]
        assert [event.data for event in events] == ["0", "1", "2"]
    with subscribed(server, f"/topics/resumed?last_event_id={events[-1].id}") as reader:
        assert [reader.next().data for _ in range(2)] == ["3", "4"]


def test_a_malformed_cursor_is_refused(server: Server) -> None:
    refused(server.client.get("/topics/resumed", headers={"last-event-id": "5"}), 400, "last_event_id")
    refused(server.client.get("/users/ann/stream?last_event_id=x.1"), 400, "last_event_id")


def test_a_cursor_of_another_topic_is_answered_with_a_gap(server: Server) -> None:
    other = post(server, "/topics/theirs", 1)["id"]
    post(server, "/topics/ours", 1)
    with subscribed(server, "/topics/ours", other) as reader:
        gap = reader.next()
        assert gap.event == "gap" and orjson.loads(gap.data)["reason"] == "expired"
        assert reader.next().data == "1"


def test_subscribers_go_on_at_the_restarted_server(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        with subscribed(server, "/topics/news") as reader:
            reader.next()
            seen = post(server, "/topics/news", "before")["id"]
            assert reader.next().id == seen
            server.process.send_signal(signal.SIGTERM)
            assert re.fullmatch(rb"retry: [0-9]+\n", reader.rest())
        assert server.wait() == 0
    with serve(tmp_path) as server:
        with subscribed(server, "/topics/news", seen) as reader:
            after = post(server, "/topics/news", "after")["id"]
            event = reader.next()
            assert (event.data, event.id) == ('"after"', after)
            assert sequence(after) == 2 and after.partition(".")[0] != seen.partition(".")[0]
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("way", ["task-asyncio", "task-trio", "parked"])
class TestInVirtualTime:
    @pytest.fixture(autouse=True)
    def lines(self, way: str) -> Iterator[None]:
        with lines_offered(way == "parked"):
            yield

    @pytest.fixture
    def anyio_backend(self, way: str) -> Backend:
        return in_virtual_time("trio" if way == "task-trio" else "asyncio")

    async def test_a_user_stream_has_a_heartbeat_every_5_s_without_an_id(self, way: str) -> None:
        app = SSEApp(ROUTES, Settings(log="memory"))
        async with app.running(), connect(app, "GET", "/users/ann/stream") as exchange:
            times: list[float] = []
            body = b""
            while len(times) < 10:
                chunk = await exchange.chunk()
                assert chunk is not None
                body += chunk
                if chunk.startswith(b"event: heartbeat\n"):
                    times.append(current_time())
                    (event,) = Decoder().feed(chunk)
                    time = datetime.fromisoformat(orjson.loads(event.data)["time"])
                    assert abs(datetime.now(UTC) - time).total_seconds() < 60
                    assert event.id is None
            assert all(5 <= later - earlier <= 6.001 for earlier, later in pairwise(times))
            assert body.count(b"id: ") == 1 and b"\n:\n" not in body

    async def test_a_topic_has_the_plain_heartbeat(self, way: str) -> None:
        app = SSEApp(ROUTES, Settings(log="memory", heartbeat_s=15))
        async with app.running(), connect(app, "GET", "/topics/news") as exchange:
            await exchange.chunk()
            for _ in range(3):
                assert await exchange.chunk() == b":\n"
            assert 45 <= current_time() <= 50


# What is published


PRETTY: Final = orjson.dumps({"a": [1, {"b": None}], "c": "x\ny"}, option=orjson.OPT_INDENT_2)


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"0",
        b'""',
        b'"text"',
        b"[]",
        b'{"b": 1,   "a" :[1,2 ]}',
        b'{"twice": 1, "twice": 2}',
        b"[1.0, 1e2, 1.50, -0.0]",
        b"123456789012345678901234567890",
        rb'"\u00e9 \/ \ud83d\ude00 \n"',
        '"é 😀 \u2028\u2029\x85"'.encode(),
        b'"data: x\\n\\nevent: y"',
        b"[[[[[[[[]]]]]]]]",
        PRETTY,
        b"[\n\n\n1,\n\n2\n]",
    ],
)
def test_json_goes_out_as_it_was_posted(server: Server, body: bytes) -> None:
    with subscribed(server, "/topics/exact") as reader:
        reader.next()
        response = server.client.post("/topics/exact", content=body, headers=JSON)
        assert response.status_code == 202
        event = reader.next()
        assert event.data.encode() == body and event.id == response.json()["id"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_line_ends_of_posted_json_arrive_as_lines(server: Server, end: bytes) -> None:
    """The format has no way to send a CR; and white space around the JSON is none of it."""
    with subscribed(server, "/topics/exact") as reader:
        reader.next()
        body = b" " + end + PRETTY.replace(b"\n", end) + end * 2
        assert server.client.post("/topics/exact", content=body, headers=JSON).status_code == 202
        assert reader.next().data.encode() == PRETTY
        assert b"\r" not in reader.body


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_publication_that_grows_by_its_line_breaks_beyond_the_bound_is_refused(server: Server, end: bytes) -> None:
    max_bytes = MAX_GROWTH * Settings().max_body_bytes
    most = (max_bytes - 2) // (len(end) + len(b"data: "))
    before = published(server, "/topics/lines")
    for path in ("/topics/lines", "/users/lines/messages", "/users/lines/notifications"):
        refused(server.client.post(path, content=b"[%b]" % (end * (most + 1)), headers=JSON), 413)
        assert server.client.post(path, content=b"[%b]" % (end * most), headers=JSON).status_code == 202
    assert published(server, "/topics/lines") == before + 2
    pretty = b"[\n%b  123456\n]" % (b"  123456,\n" * 100_000)  # almost as large as a body may be
    assert server.client.post("/topics/lines", content=pretty, headers=JSON).status_code == 202


def test_a_media_type_may_have_parameters(server: Server) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.client.post("/topics/typed", content=b"{}", headers=headers).status_code == 202


def test_a_body_over_the_limit_is_refused_and_one_at_it_is_not(server: Server) -> None:
    limit = Settings().max_body_bytes
    largest = b'"' + b"x" * (limit - 2) + b'"'
    with subscribed(server, "/topics/large") as reader:
        reader.next()
        refused(server.client.post("/topics/large", content=largest + b" ", headers=JSON), 413)
        assert server.client.post("/topics/large", content=largest, headers=JSON).status_code == 202
        event = reader.next()
        assert event.data.encode() == largest and sequence(event.id) == 1


@pytest.mark.parametrize(
    "event",
    ["", "a\nb", "a\rb", "a\r\nb", "\n", "a\n", "a\0b", "message\n\ndata: forged", "x" * 101],
    ids=lambda event: repr(event[:12]),
)
def test_an_event_name_that_would_break_the_format_is_refused_and_nothing_is_published(
    server: Server, event: str
) -> None:
    before = published(server, "/topics/named")
    refused(server.client.post(f"/topics/named?event={quote(event)}", json=1), 400, "event")
    assert published(server, "/topics/named") == before + 1


def test_an_event_name_that_is_no_text_or_stands_there_twice_is_refused(server: Server) -> None:
    before = published(server, "/topics/named")
    refused(server.client.post("/topics/named?event=%FF", json=1), 400)
    refused(server.client.post("/topics/named?event=%ED%A0%80", json=1), 400)
    refused(server.client.post("/topics/named?event=a&event=b", json=1), 400, "event")
    assert published(server, "/topics/named") == before + 1


@pytest.mark.parametrize("event", ["x" * 100, "a: b", " ", "ключ", "\u2028", "data"])
def test_any_other_event_name_arrives(server: Server, event: str) -> None:
    with subscribed(server, "/topics/named") as reader:
        reader.next()
        post(server, f"/topics/named?event={quote(event)}", 1)
        assert reader.next().event == event


# Names


def paths(name: str) -> list[tuple[str, str]]:
    return [
        ("GET", f"/topics/{name}"),
        ("POST", f"/topics/{name}"),
        ("GET", f"/users/{name}/stream"),
        ("POST", f"/users/{name}/messages"),
        ("POST", f"/users/{name}/notifications"),
    ]


@pytest.mark.parametrize(
    "name",
    ["a\nb", "\r", "a\0", "\x1b[2J", "\x7f", "\x85", "\u2028", "a\u202eb", "\ufeff", "x" * (MAX_NAME + 1)],
    ids=lambda name: ascii(name[:10]),
)
def test_names_that_cannot_be_shown_or_are_too_long_are_refused(server: Server, name: str) -> None:
    for method, path in paths(quote(name, safe="")):
        refused(server.client.request(method, path, json=1), 400, "name")


@pytest.mark.parametrize("name", ["a%2Fb", "%2F", "a%2f..%2fb", ""])
def test_a_name_is_one_segment_of_the_path_however_it_is_written(server: Server, name: str) -> None:
    for method, path in paths(name):
        refused(server.client.request(method, path, json=1), 404)


@pytest.mark.parametrize(
    "name", ["x" * MAX_NAME, "😀" * MAX_NAME, "ключ", "a b", "a:b", "topics", "%", "a.b@c.d", "'\"<>"]
)
def test_any_other_name_is_one_topic(server: Server, name: str) -> None:
    path = f"/topics/{quote(name, safe='')}"
    with subscribed(server, path) as reader:
        assert orjson.loads(reader.next().data) == {"topic": name}
        assert post(server, path, name)["subscribers"] == 1
        assert orjson.loads(reader.next().data) == name


# A frozen client among many


EVENTS: Final = 40
EVENT_BYTES: Final = 64 * 1024
READERS: Final = 50
_EVENT: Final = re.compile(rb"event: message\ndata: \"(x+)\"\nid: [\w-]{22}\.([0-9]+)\n\n")


def sequences(body: bytes) -> list[int]:
    """Of the events that came whole. The chunked coding cuts none: what is sent at once is one part of it."""
    assert all(len(match[1]) == EVENT_BYTES for match in _EVENT.finditer(body))
    return [int(match[2]) for match in _EVENT.finditer(body)]


def slow_client(url: str, path: str) -> tuple[socket.socket, bytes]:
    """A subscriber that has read as far as `init`. Its socket holds little more."""
    address = httpx.URL(url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
    sock.settimeout(10)
    sock.connect((address.host, address.port))
    sock.sendall(b"GET %b HTTP/1.1\r\nhost: localhost\r\n\r\n" % path.encode())
    body = b""
    while b"event: init\n" not in body:
        body += sock.recv(4096)
    return sock, body


def test_a_client_that_stops_reading_for_a_while_gets_all_in_order(server: Server) -> None:
    sock, body = slow_client(server.url, "/topics/slow")
    with sock:
        for _ in range(EVENTS):
            post(server, "/topics/slow", "x" * EVENT_BYTES)
        for last in (EVENTS, EVENTS + 1):  # and then as everybody else
            while len(got := sequences(body)) < last:
                body += sock.recv(1 << 20)
            assert got == [*range(1, last + 1)]
            post(server, "/topics/slow", "x" * EVENT_BYTES)


async def test_a_frozen_client_is_dropped_and_delays_nobody(tmp_path: Path) -> None:
    bodies = [bytearray() for _ in range(READERS)]
    done = 0

    async def read(body: bytearray, port: int, subscribed: anyio.Event) -> None:
        nonlocal done
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(b"GET /topics/big HTTP/1.1\r\nhost: localhost\r\n\r\n")
            while b'\ndata: "the last"\n' not in body[-1000:]:
                body += await stream.receive(1 << 20)
                if b"event: init\n" in body[:1000]:
                    subscribed.set()
        done += 1

    with serve(tmp_path, env={"SSEAPP_SEND_TIMEOUT_S": "1"}) as server:
        port = int(server.url.rpartition(":")[2])
        frozen, body = slow_client(server.url, "/topics/big")
        with frozen, anyio.fail_after(25):
            async with (
                httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
                anyio.create_task_group() as tasks,
            ):

                async def publish(text: str) -> int:
                    response = await client.post("/topics/big", json=text)
                    assert response.status_code == 202
                    subscribers: int = response.json()["subscribers"]
                    return subscribers

                for one in bodies:
                    subscribed = anyio.Event()
                    tasks.start_soon(read, one, port, subscribed)
                    await subscribed.wait()
                assert await publish("x" * EVENT_BYTES) == READERS + 1
                for _ in range(EVENTS - 1):
                    await publish("x" * EVENT_BYTES)
                while await publish("is it gone?") > READERS:
                    pass
                await publish("the last")
            for one in bodies:
                assert sequences(bytes(one)) == [*range(1, EVENTS + 1)]

            try:
                while part := frozen.recv(1 << 20):
                    body += part
            except ConnectionResetError:
                pass
            got = sequences(body)
            assert got == [*range(1, len(got) + 1)] and len(got) < EVENTS
            assert not body.endswith(b"\r\n0\r\n\r\n")  # cut, not ended
    assert done == READERS
    assert "Traceback" not in server.log() and "ERROR" not in server.log()


# What a token may

#: A short word for each request, for the table below.
REQUESTS: Final = {
    "notify": ("POST", "/users/ann/notifications"),
    "message": ("POST", "/users/ann/messages"),
    "publish": ("POST", "/topics/orders-1"),
    "publish other": ("POST", "/topics/news"),
    "subscribe": ("GET", "/topics/orders-1"),
    "subscribe other": ("GET", "/topics/news"),
    "metrics": ("GET", "/metrics"),
    "own stream": ("GET", "/users/shop/stream"),
    "another's stream": ("GET", "/users/ann/stream"),
    "work": ("GET", "/chat?prompt=hi"),
}
ALWAYS: Final = {"own stream", "work"}
RIGHTS: Final = [
    ([], set()),
    (["publish"], {"notify", "message", "publish", "publish other"}),
    (["publish:topics/orders-*"], {"publish"}),
    (["publish:users/*"], {"notify", "message"}),
    (["publish:users/bo"], set()),
    (["publish:users/ann", "publish:topics/n*"], {"notify", "message", "publish other"}),
    (["subscribe"], {"subscribe", "subscribe other"}),
    (["subscribe:topics/orders-*"], {"subscribe"}),
    (["metrics"], {"metrics"}),
    (["metrics", "subscribe", "publish"], REQUESTS.keys() - {"another's stream"}),
]


def test_a_token_reaches_what_its_rights_name_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    tokens = [add_token(path, "shop", may=may) for may, _ in RIGHTS]
    with serve(tmp_path / "data", env={"SSEAPP_TOKENS_FILE": str(path), "SSEAPP_MOCK_DELAY_S": "0"}) as server:
        for token, (may, allowed) in zip(tokens, RIGHTS, strict=True):
            reached = set()
            for name, (method, target) in REQUESTS.items():
                headers = {"authorization": f"Bearer {token}"}
                content = b"1" if method == "POST" else None
                with server.client.stream(
                    method, target, headers=headers | (JSON if content else {}), content=content
                ) as response:
                    if response.status_code != 403:
                        assert response.is_success
                        reached.add(name)
                    elif name != "another's stream":
                        assert 'error="insufficient_scope"' in response.headers["www-authenticate"]
            assert reached == allowed | ALWAYS, may
