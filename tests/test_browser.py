"""A real browser's own `EventSource`: Chromium, over a line that breaks, and through nginx."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

import httpx
import pytest
from playwright.sync_api import Page

from ssecore.http.tokens import add_token
from tests import chromium, upstream
from tests.chromium import LISTEN, Seen, seen
from tests.needs import needs
from tests.nginx import nginx
from tests.relay import relay
from tests.serving import Server, free_port, is_clean, serve, wait_until

pytestmark = needs("chromium")

browser, page = chromium.browser, chromium.page


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """A private service, and a server on another port of the machine, for its pages."""
    with (
        serve(tmp_path_factory.mktemp("private"), env={"SSEAPP_MOCK_DELAY_S": "0"}) as server,
        serve(tmp_path_factory.mktemp("other")) as other,
    ):
        yield server, other


def listen(page: Page, origin: str, path: str, *, limit_s: float = 30) -> Seen:
    """What an `EventSource` on this path has seen when it has given up for good."""
    begin(page, origin, path)
    return ended(page, limit_s=limit_s)


def begin(page: Page, origin: str, path: str) -> None:
    page.goto(f"{origin}/healthz")
    page.evaluate(LISTEN, ["it", path])


def ended(page: Page, *, limit_s: float = 30) -> Seen:
    page.wait_for_function("window.seen.it.closed", timeout=limit_s * 1000)
    return seen(page, "it")


def contiguous(ids: list[str]) -> bool:
    sequences = [int(id.rpartition(".")[2]) for id in ids]
    return sequences == list(range(1, len(ids) + 1))


def test_a_chat_goes_on_over_cuts_and_the_model_is_called_once(page: Page, tmp_path: Path) -> None:
    words = [f"word{n} " for n in range(400)]
    cuts = [900, 2500, 700, 1900, 333]
    has_an_id = threading.Event()

    def in_pieces(call: upstream.Call) -> None:
        """Each cut comes in the middle: the model goes on when the browser has come back.

        A busy browser may throw away what came just before a cut. If that were all, it would begin anew: for that case
        there is `?key=`.
        """
        call.head()
        call.send(upstream.token("first "))
        assert has_an_id.wait(20)
        for number in range(10):
            call.send(*map(upstream.token, words[number * 40 : number * 40 + 40]))
            line.wait_streams(min(number + 1, len(cuts)) + 1)
        call.send(upstream.STOP, upstream.DONE)
        call.end()

    with upstream.serve() as model:
        model.plan(in_pieces)
        environ = {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "k", "SSEAPP_RETRY_MS": "50"}
        with serve(tmp_path, env=environ) as server, relay(server.port, cuts) as line:
            begin(page, line.url, "/chat?prompt=hi")
            page.wait_for_function("window.seen.it.events.length")
            has_an_id.set()
            heard = ended(page)
            runs = httpx.get(f"{server.url}/runs").json()["runs"]
            model.settle()
        assert len(model.calls) == 1
    texts = heard.data
    assert texts.pop() == "[DONE]"
    assert "".join(json.loads(text)["content"] for text in texts) == "".join(["first ", *words])
    assert contiguous(heard.ids)
    assert heard.opened == len(cuts) + 1
    assert [run["state"] for run in runs] == ["completed"]
    assert sum(answer.count(b"HTTP/1.1 204") for answer in line.answers()) == 1


def test_with_a_key_a_cut_before_the_first_event_starts_nothing_twice(page: Page, tmp_path: Path) -> None:
    environ = {"SSEAPP_RETRY_MS": "50", "SSEAPP_MOCK_DELAY_S": "0"}
    with serve(tmp_path, env=environ) as server, relay(server.port, [100]) as line:
        heard = listen(page, line.url, "/chat?prompt=hi&key=0123456789abcdef0123456789")
        runs = httpx.get(f"{server.url}/runs").json()["runs"]
    assert len(runs) == 1
    assert contiguous(heard.ids)
    assert heard.events[-1][1] == "[DONE]"


def test_a_fleeting_stream_runs_once(page: Page, tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_RETRY_MS": "50"}) as server, relay(server.port) as line:
        heard = listen(page, line.url, "/stream/hello?interval=0.05")
        assert sum(answer.count(b"HTTP/1.1 204") for answer in line.answers()) == 1
    assert heard.data == [
        *(f'{{"text":"{word}"}}' for word in ("Hello", "from", "Server-Sent", "Events!")),
        '{"done":true}',
    ]
    assert heard.events[-1][2] == "end"


def test_a_page_goes_on_by_itself_over_a_drain_and_a_restart(page: Page, tmp_path: Path) -> None:
    draining = threading.Event()

    def in_two(call: upstream.Call) -> None:
        call.head()
        call.send(upstream.token("one "), upstream.token("two "))
        assert draining.wait(upstream.LIMIT_S)
        call.send(upstream.token("three"), upstream.STOP, upstream.DONE)
        call.end()

    options, environ = ("--port", str(free_port())), {"SSEAPP_RETRY_MS": "50", "SSEAPP_DRAIN_S": "60"}
    with upstream.serve() as model, serve(tmp_path, *options, env=environ | {"OPENAI_BASE_URL": model.url}) as server:
        model.plan(in_two)
        with server.client.stream("GET", "/countdown/3600?interval=3600") as holding_the_drain_open:
            chunks = holding_the_drain_open.iter_bytes()
            next(chunks)
            begin(page, server.url, "/chat?prompt=hi")
            page.wait_for_function("window.seen.it.events.length == 2")
            server.process.terminate()
            wait_until(lambda: server.client.get("/readyz").status_code == 503)
            draining.set()
            page.wait_for_function("window.seen.it.opened > 3")  # refused softly, and again
        model.settle()
        assert server.wait() == 0, "the run has finished, and nobody else is there"
    assert is_clean(server.log())
    errors = seen(page, "it").errors
    page.wait_for_function(f"window.seen.it.errors > {errors + 1}")  # refused by the machine: nobody listens
    with serve(tmp_path, *options, env=environ) as server:
        heard = ended(page)
        (run,) = server.client.get("/runs").json()["runs"]
    assert (run["state"], len(heard.events)) == ("completed", run["events"])
    assert contiguous(heard.ids)
    assert heard.data[-1] == "[DONE]"


@needs("nginx")
def test_a_slow_first_event_behind_an_impatient_proxy_is_one_run(page: Page, tmp_path: Path) -> None:
    """Through a proxy that gives up after 2 s without a byte, while the model thinks for longer than that."""
    given_up = threading.Event()

    def late(call: upstream.Call) -> None:
        assert given_up.wait(upstream.LIMIT_S)
        call.head()
        call.send(upstream.token("late "), upstream.token("but whole"), upstream.STOP, upstream.DONE)
        call.end()

    with upstream.serve() as model:
        model.plan(late)
        environ = {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "k", "SSEAPP_RETRY_MS": "100", "SSEAPP_AUTH": "off"}
        with (
            serve(tmp_path, env=environ) as server,
            nginx(server.port, changes={"proxy_read_timeout 60s;": "proxy_read_timeout 2s;"}) as proxy,
        ):
            begin(page, proxy.url, "/chat?prompt=hi")
            page.wait_for_function("window.seen.it.errors >= 3")
            given_up.set()
            heard = ended(page)
            run = httpx.get(f"{server.url}/runs/{heard.ids[0].partition('.')[0]}").json()
        assert len(model.calls) == 1
    assert heard.data == ['{"content":"late "}', '{"content":"but whole"}', "[DONE]"]
    assert run["state"] == "completed"


# Pages of another port

#: Tries all that a page may do without asking first, each with its own address, and waits for their ends.
ATTACK: Final = """
async (target) => {
  let number = 0
  const url = () => `${target}${target.includes("?") ? "&" : "?"}key=0123456789abcdef01234${10 + number++}`
  const put = (tag, set) => new Promise((resolve) => {
    const element = document.createElement(tag)
    element.onload = element.onerror = resolve
    setTimeout(resolve, 2000)
    document.documentElement.append(element)
    set(element)
  })
  const submit = (frame) => {
    frame.name = `frame${number++}`
    const form = document.createElement("form")
    Object.assign(form, { action: target, target: frame.name })
    document.documentElement.append(form)
    form.submit()
  }
  const get = (options) => fetch(url(), { credentials: "include", ...options }).catch(() => {})
  const source = new EventSource(url(), { withCredentials: true })
  source.onopen = source.onerror = () => source.close()
  await Promise.all([
    put("img", (img) => { img.src = url() }),
    put("iframe", (frame) => { frame.src = url() }),
    put("iframe", (frame) => { frame.referrerPolicy = "no-referrer"; frame.src = url() }),
    put("script", (script) => { script.src = url() }),
    put("video", (video) => { video.src = url() }),
    put("iframe", submit),
    get({ mode: "no-cors" }),
    get({ mode: "no-cors", referrerPolicy: "no-referrer" }),
    get({ mode: "no-cors", headers: { "user-agent": "curl/8", "sec-fetch-site": "none" } }),
    get({}),
  ])
  return number
}
"""


def refused(server: Server) -> int:
    """Requests that were answered 403 so far."""
    match = re.search(r'^sseapp_refused_total\{status="403"\} (\d+)', server.client.get("/metrics").text, re.MULTILINE)
    return int(match[1]) if match else 0


def attack(page: Page, other: Server, server: Server, host: str, path: str) -> None:
    """All of `ATTACK`, and a link that is followed, from a page of the other server's port."""
    before = refused(server)
    target = f"http://{host}:{server.port}{path}"
    page.goto(f"{other.url}/healthz")
    tries = page.evaluate(ATTACK, target) + 1
    with page.expect_navigation():
        page.evaluate("(url) => { const a = document.createElement('a'); a.href = url; a.click() }", target)
    wait_until(lambda: refused(server) >= before + tries)


@pytest.mark.parametrize("path", ["/chat?prompt=hi", "/stream/hello?interval=0"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
def test_a_page_of_another_port_starts_nothing_on_a_private_service(
    host: str, path: str, page: Page, private: tuple[Server, Server]
) -> None:
    server, other = private
    attack(page, other, server, host, path)
    assert server.client.get("/runs").json()["runs"] == []
    assert "ended" not in server.log()


@pytest.mark.parametrize("path", ["/chat?prompt=hi", "/stream/hello?interval=0"])
def test_a_page_of_another_port_starts_nothing_by_the_cookie(path: str, page: Page, tmp_path: Path) -> None:
    """To the browser it is the same site, so the cookie goes along: it would be 401 without."""
    token = add_token(tmp_path / "tokens", "ann", may=["metrics"])
    environ = {"SSEAPP_TOKENS_FILE": str(tmp_path / "tokens"), "SSEAPP_MOCK_DELAY_S": "0"}
    with serve(tmp_path / "data", env=environ) as server, serve(tmp_path / "other") as other:
        server.client.headers["authorization"] = f"Bearer {token}"
        page.goto(f"{server.url}/healthz")
        log_in = "(token) => fetch('/session', {method: 'POST', headers: {authorization: `Bearer ${token}`}})"
        assert page.evaluate(f"(token) => ({log_in})(token).then((answer) => answer.status)", token) == 200
        attack(page, other, server, "127.0.0.1", path)
        assert server.client.get("/runs").json()["runs"] == []
        assert "ended" not in server.log()
        assert listen(page, server.url, path).events, "its own page may"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_private_services_own_page_works_under_each_of_its_names(host: str, page: Page, tmp_path: Path) -> None:
    address = "::1" if host == "[::1]" else "127.0.0.1"
    with serve(tmp_path, "--host", address, env={"SSEAPP_MOCK_DELAY_S": "0"}) as server:
        heard = listen(page, f"http://{host}:{server.port}", "/chat?prompt=hi")
    assert heard.data[-1] == "[DONE]"


# Downloads

NAMES: Final = ["a b;c=d, 'e' %41.txt", "Übung 日本語 😀.csv", "page.html", "picture.svg", "script.js"]


def test_a_browser_saves_a_download_under_its_name_and_runs_nothing_of_it(page: Page, tmp_path: Path) -> None:
    script = "window.ran = true"
    with serve(tmp_path) as server:
        for name in NAMES:
            (tmp_path / "files" / name).write_text(script if name.endswith(".js") else f"<script>{script}</script>")
        page.goto(f"{server.url}/healthz")
        for name in NAMES:
            with page.expect_download() as download:
                page.evaluate("(url) => { location.href = url }", f"/download/{quote(name)}")
            assert download.value.suggested_filename == name
            assert Path(download.value.path()).read_bytes() == (tmp_path / "files" / name).read_bytes()
        for element in ("script", "link"):
            page.evaluate(LOAD, [element, "/download/script.js"])
        assert page.evaluate("import('/download/script.js').then(() => 'imported', () => 'refused')") == "refused"
        assert page.evaluate("window.ran") is None


#: Puts an element with this source into the page, and waits until it is loaded or refused.
LOAD: Final = """
([name, url]) => new Promise((resolve) => {
  const element = document.createElement(name)
  element.rel = "stylesheet"
  element.onload = element.onerror = resolve
  element.src = element.href = url
  document.documentElement.append(element)
})
"""
