"""What the service promises to a browser's own `EventSource`, in all three engines.

One window of each engine serves for all tests. What a page can do besides is in tests/test_page.py and
tests/test_browser.py, in Chromium.
"""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

import pytest

from ssecore.http.tokens import add_token
from tests import upstream
from tests.browsers import Browser, launched
from tests.chromium import Seen
from tests.needs import needs
from tests.nginx import nginx
from tests.relay import Relay, relay
from tests.serving import free_port, is_clean, serve, serve_uvicorn, wait_until

ENGINES: Final = [
    pytest.param("chromium", marks=needs("chromium")),
    pytest.param("firefox", marks=needs("firefox")),
    pytest.param("webkit", marks=[needs("webkit"), needs("xvfb")]),
]
KEY: Final = "0123456789abcdef0123456789"
RETRY: Final = {"SSEAPP_RETRY_MS": "50"}
#: Many reconnections, where there were any.
SILENCE_S: Final = 0.5
CUTS: Final = pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])


@pytest.fixture(scope="module", params=ENGINES)
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    with launched(request.param) as browser:
        yield browser


def begin(browser: Browser, origin: str, path: str) -> None:
    browser.goto(f"{origin}/healthz")
    browser.listen("it", path)


def text(seen: Seen) -> str:
    """The whole answer of the chat."""
    *tokens, end = seen.data
    assert end == "[DONE]"
    return "".join(json.loads(token)["content"] for token in tokens)


def sequences(seen: Seen) -> list[int]:
    return [int(id.rpartition(".")[2]) for id in seen.ids]


def is_whole(seen: Seen) -> bool:
    """Each event of one run, once and in order."""
    return sequences(seen) == list(range(1, len(seen.ids) + 1)) and len({id.partition(".")[0] for id in seen.ids}) == 1


def goes_quiet_after_one_204(line: Relay) -> bool:
    before = line.answers()
    time.sleep(SILENCE_S)
    after = line.answers()
    return len(after) == len(before) and sum(answer.count(b"HTTP/1.1 204") for answer in after) == 1


@CUTS
def test_a_run_that_is_cut_within_three_events_is_whole(browser: Browser, tmp_path: Path, reset: bool) -> None:
    """In the data of one event, within a character; in the id of another; and between the fields of a third."""
    words = [f"wört{number}🚀" for number in range(20)]
    cuts = ['wört2"'.encode()[:-1] + b"\xf0\x9f", 'wört9🚀 "}\nid: [^\n]{9}'.encode(), 'wört14🚀 "}\n'.encode()]
    path = "/chat?" + urlencode({"prompt": " ".join(words), "key": KEY})
    with serve(tmp_path, env=RETRY | {"SSEAPP_MOCK_DELAY_S": "0.03"}) as server:
        with relay(server.port, [*map(re.compile, cuts)], reset=reset) as line:
            begin(browser, line.url, path)
            seen = browser.wait_closed("it")
            assert goes_quiet_after_one_204(line)
        runs = server.client.get("/runs").json()["runs"]
    assert text(seen) == "This is a mock response to: " + " ".join(words)
    assert is_whole(seen)
    assert (seen.opened, [run["state"] for run in runs]) == (4, ["completed"])


@CUTS
def test_a_replay_of_3000_events_that_is_cut_within_three_is_whole(
    browser: Browser, tmp_path: Path, reset: bool
) -> None:
    words = ["a"] * 2993
    for place, word in ((700, "X"), (1500, "Y"), (2300, "Z")):
        words[place] = word
    cuts = [re.compile(rb'"content":"%b' % word) for word in (b"X", b"Y", b"Z")]
    path = "/chat?" + urlencode({"prompt": " ".join(words), "key": KEY})
    with serve(tmp_path, env=RETRY | {"SSEAPP_MOCK_DELAY_S": "0"}) as server:
        server.client.get(path)
        (run,) = server.client.get("/runs").json()["runs"]
        assert (run["state"], run["events"]) == ("completed", 3000)
        with relay(server.port, cuts, reset=reset) as line:
            begin(browser, line.url, path)
            seen = browser.wait_closed("it")
            assert goes_quiet_after_one_204(line)
        assert len(server.client.get("/runs").json()["runs"]) == 1
    assert text(seen) == "This is a mock response to: " + " ".join(words)
    assert is_whole(seen) and len(seen.ids) == 3000
    assert seen.opened == 4


@CUTS
def test_a_cut_before_a_late_first_event_resumes_the_run_without_a_key(
    browser: Browser, tmp_path: Path, reset: bool
) -> None:
    def late(call: upstream.Call) -> None:
        """The model's first token comes when the browser has come back."""
        call.head()
        line.wait_streams(2)
        call.send(*map(upstream.token, ("late ", "but ", "whole")), upstream.STOP, upstream.DONE)
        call.end()

    with upstream.serve() as model:
        model.plan(late)
        environ = RETRY | {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "k"}
        with serve(tmp_path, env=environ) as server:
            with relay(server.port, [re.compile(rb"id: [\w-]{22}\.0\n\n")], reset=reset) as line:
                begin(browser, line.url, "/chat?prompt=hi")
                seen = browser.wait_closed("it")
                assert goes_quiet_after_one_204(line)
            (run,) = server.client.get("/runs").json()["runs"]
        assert len(model.calls) == 1
    assert (run["state"], seen.ids[0]) == ("completed", f"{run['run']}.1")
    assert text(seen) == "late but whole"
    assert is_whole(seen)


@CUTS
def test_a_topic_that_is_cut_within_an_event_misses_none(browser: Browser, tmp_path: Path, reset: bool) -> None:
    with serve(tmp_path, env=RETRY) as server:
        with relay(server.port, [re.compile(rb'"n":2'), re.compile(rb'"n":4}\nid: [\w-]{22}\.')], reset=reset) as line:
            begin(browser, line.url, "/topics/news")
            browser.wait_events("it", 1)
            for number in range(6):
                server.client.post("/topics/news", json={"n": number})
            seen = browser.wait_events("it", 7)
            browser.close_source("it")
    assert [json.loads(data) for data in seen.data[1:]] == [{"n": number} for number in range(6)]
    assert sequences(seen) == list(range(7))
    assert seen.opened == 3


def test_a_fleeting_stream_runs_once(browser: Browser, tmp_path: Path) -> None:
    with serve(tmp_path, env=RETRY) as server, relay(server.port) as line:
        begin(browser, line.url, "/stream/hello?interval=0.01")
        seen = browser.wait_closed("it")
        assert goes_quiet_after_one_204(line)
    assert [json.loads(data) for data in seen.data] == [
        *({"text": word} for word in ("Hello", "from", "Server-Sent", "Events!")),
        {"done": True},
    ]


def test_a_fleeting_stream_whose_last_event_was_not_known_to_be_the_last_runs_once(
    browser: Browser, tmp_path: Path
) -> None:
    """The id that ends it for good comes alone, behind the last event."""
    with serve_uvicorn(tmp_path, app="tests.runs_app:make", env=RETRY) as server, relay(server.port) as line:
        begin(browser, line.url, "/late-end")
        seen = browser.wait_closed("it")
        assert goes_quiet_after_one_204(line)
    assert seen.data == ["only"]


def test_a_run_and_a_topic_go_on_over_a_restart(browser: Browser, tmp_path: Path) -> None:
    options = ("--port", str(free_port()))
    environ = RETRY | {"SSEAPP_MOCK_DELAY_S": "0.02", "SSEAPP_DRAIN_S": "20"}
    words = [f"word{number}" for number in range(40)]
    with serve(tmp_path, *options, env=environ) as server:
        begin(browser, server.url, "/topics/news")
        browser.wait_events("it", 1)
        server.client.post("/topics/news", json={"n": 1})
        browser.wait_events("it", 2)
        browser.listen("run", "/chat?" + urlencode({"prompt": " ".join(words)}))
        browser.wait_events("run", 4)
        server.process.terminate()
        assert server.wait() == 0
    assert is_clean(server.log())
    with serve(tmp_path, *options, env=environ) as server:
        server.client.post("/topics/news", json={"n": 2})
        run = browser.wait_closed("run")
        topic = browser.wait_events("it", 3)
        (state,) = server.client.get("/runs").json()["runs"]
        browser.close_source("it")
    assert text(run) == "This is a mock response to: " + " ".join(words)
    assert is_whole(run) and state["state"] == "completed"
    assert topic.data == ['{"topic":"news"}', '{"n":1}', '{"n":2}']
    assert not topic.closed


def test_a_run_of_a_killed_process_ends_with_an_error(browser: Browser, tmp_path: Path) -> None:
    options, environ = ("--port", str(free_port())), RETRY | {"SSEAPP_MOCK_DELAY_S": "0.2"}
    with serve(tmp_path, *options, env=environ) as server:
        begin(browser, server.url, "/chat?prompt=" + "word+" * 1000)
        browser.wait_events("it", 3)
        server.process.kill()
        server.wait()
    with serve(tmp_path, *options, env=environ):
        seen = browser.wait_closed("it")
    *_, error, end = seen.data
    assert json.loads(error)["code"] == "interrupted" and end == "[DONE]"
    assert sequences(seen) == list(range(1, len(seen.ids) + 1))


def test_a_full_house_refuses_softly_and_any_other_refusal_is_final(browser: Browser, tmp_path: Path) -> None:
    with serve(tmp_path, env=RETRY | {"SSEAPP_MAX_STREAMS": "1"}) as server, relay(server.port) as line:
        with server.client.stream("GET", "/topics/news") as full:
            chunks = full.iter_bytes()  # kept: it closes the answer with itself
            next(chunks)
            begin(browser, line.url, "/stream/hello?interval=0")
            line.wait_streams(3)
            assert browser.seen("it").events == []
        seen = browser.wait_closed("it")
        assert seen.data[-1] == '{"done":true}' and len(seen.data) == 5
        browser.listen("not there", "/chat?prompt=")
        assert browser.wait_closed("not there").opened == 0


@needs("nginx")
def test_nginx_without_a_backend_keeps_it_alive(browser: Browser, tmp_path: Path) -> None:
    port = free_port()
    environ = RETRY | {"SSEAPP_AUTH": "off", "SSEAPP_MOCK_DELAY_S": "0.2"}
    with nginx(
        port, changes={"25% 1000": "25% 100", "25% 1500": "25% 100", "25% 2000": "25% 100", "* 2500": "* 100"}
    ) as proxy:
        with serve(tmp_path, "--port", str(port), env=environ) as server:
            begin(browser, proxy.url, "/topics/news")
            browser.wait_events("it", 1)
            server.client.post("/topics/news", json={"n": 1})
            browser.wait_events("it", 2)
            server.process.kill()
            server.wait()
        browser.wait_opened("it", 3)
        browser.listen("run", "/chat?prompt=hi")
        browser.wait_opened("run", 2)
        assert not browser.seen("it").closed and not browser.seen("run").closed
        with serve(tmp_path, "--port", str(port), env=environ) as server:
            server.client.post("/topics/news", json={"n": 2})
            topic, run = browser.wait_events("it", 3), browser.wait_closed("run")
            browser.close_source("it")
    assert topic.data == ['{"topic":"news"}', '{"n":1}', '{"n":2}']
    assert text(run) == "This is a mock response to: hi"
    assert is_whole(run)


LOG_IN: Final = """
window.logged = 0
fetch("/session", {method: "POST", headers: {authorization: `Bearer ${arguments[0]}`}})
  .then((response) => { window.logged = response.status })
"""


def test_a_sessions_cookie_lets_it_in(browser: Browser, tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens", "ann")
    with serve(tmp_path, env=RETRY | {"SSEAPP_TOKENS_FILE": str(tmp_path / "tokens")}) as server:
        begin(browser, server.url, "/chat?prompt=hi")
        assert browser.wait_closed("it").opened == 0
        browser.run(LOG_IN, token)
        assert wait_until(lambda: browser.run("return window.logged")) == 200
        browser.listen("it", "/chat?prompt=hi")
        assert text(browser.wait_closed("it")) == "This is a mock response to: hi"


def test_the_page_shows_a_run_and_goes_on_over_a_cut(browser: Browser, tmp_path: Path) -> None:
    """Opened as it is after a reload; what its forms and views do is in tests/test_page.py."""
    words = " ".join(f"word{number}" for number in range(20))
    view = {"title": "One prompt", "about": "", "life": "run", "route": "GET /chat"}
    view["url"] = "chat?" + urlencode({"prompt": words, "key": KEY})
    with serve(tmp_path, env=RETRY | {"SSEAPP_MOCK_DELAY_S": "0.03"}) as server:
        # One of the first two: the page also looks for tasks.
        with relay(server.port, [re.compile(rb'"content":"word7')] * 2) as line:
            browser.goto(f"{line.url}/healthz")
            browser.run("sessionStorage.setItem('sseapp.open', JSON.stringify([arguments[0]]))", view)
            browser.goto(f"{line.url}/")
            wait_until(
                lambda: browser.run("return document.querySelector('.view .badge')?.dataset.state") == "completed"
            )
            shown = browser.run("return document.querySelector('.view .text').innerText")
            assert browser.run("return document.querySelector('.view .resumed').innerText").startswith("resumed 1")
            browser.run("sessionStorage.clear()")
        assert len(server.client.get("/runs").json()["runs"]) == 1
    assert shown.strip() == f"This is a mock response to: {words}"
