"""A real browser's own `EventSource`: Chromium, over a line that breaks, and through nginx."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.parse import quote

import httpx
import pytest
from playwright.sync_api import Browser, Page

from tests import chromium, upstream
from tests.needs import find, needs
from tests.relay import relay
from tests.serving import free_port, serve, wait_until

pytestmark = needs("chromium")

#: Collects what an `EventSource` sees, and says when it has given up for good: after a 204 it doesn't come back.
LISTEN: Final = """
(url) => {
  const seen = window.seen = {events: [], opened: 0, errors: 0, closed: false}
  const source = new EventSource(url)
  const note = (event) => seen.events.push([event.type, event.data, event.lastEventId])
  for (const type of ["message", "complete", "done", "error_event", "gap"]) source.addEventListener(type, note)
  source.addEventListener("open", () => seen.opened++)
  source.addEventListener("error", (event) => {
    if (event.data !== undefined) { note(event); return }
    seen.errors++
    if (source.readyState === EventSource.CLOSED) seen.closed = true
  })
}
"""


browser = chromium.browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    yield page
    page.close()


def listen(page: Page, origin: str, path: str, *, limit_s: float = 30) -> dict[str, Any]:
    """What an `EventSource` on this path has seen when it has given up for good."""
    page.goto(f"{origin}/healthz")
    page.evaluate(LISTEN, path)
    page.wait_for_function("window.seen.closed", timeout=limit_s * 1000)
    seen: dict[str, Any] = page.evaluate("window.seen")
    return seen


def contiguous(ids: list[str]) -> bool:
    sequences = [int(id.rpartition(".")[2]) for id in ids]
    return sequences == list(range(1, len(ids) + 1))


def test_a_chat_goes_on_over_cuts_and_the_model_is_called_once(page: Page, tmp_path: Path) -> None:
    words = [f"word{n} " for n in range(400)]
    cuts = [900, 2500, 700, 1900, 333]

    def in_pieces(call: upstream.Call) -> None:
        """Each cut comes in the middle: the model goes on when the browser has come back."""
        call.head()
        for number in range(10):
            call.send(*map(upstream.token, words[number * 40 : number * 40 + 40]))
            line.wait_streams(min(number + 1, len(cuts)) + 1)
        call.send(upstream.STOP, upstream.DONE)
        call.end()

    with upstream.serve() as model:
        model.plan(in_pieces)
        environ = {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "k", "SSEAPP_RETRY_MS": "50"}
        with serve(tmp_path, env=environ) as server, relay(server.port, cuts) as line:
            seen = listen(page, line.url, "/chat?prompt=hi")
            runs = httpx.get(f"{server.url}/runs").json()["runs"]
            model.settle()
        assert len(model.calls) == 1
    texts = [data for _, data, _ in seen["events"]]
    assert texts.pop() == "[DONE]"
    assert "".join(json.loads(text)["content"] for text in texts) == "".join(words)
    assert contiguous([id for _, _, id in seen["events"]])
    assert seen["opened"] == len(cuts) + 1
    assert [run["state"] for run in runs] == ["completed"]
    assert sum(answer.count(b"HTTP/1.1 204") for answer in line.answers()) == 1


def test_with_a_key_a_cut_before_the_first_event_starts_nothing_twice(page: Page, tmp_path: Path) -> None:
    environ = {"SSEAPP_RETRY_MS": "50", "SSEAPP_MOCK_DELAY_S": "0"}
    with serve(tmp_path, env=environ) as server, relay(server.port, [100]) as line:
        seen = listen(page, line.url, "/chat?prompt=hi&key=0123456789abcdef0123456789")
        runs = httpx.get(f"{server.url}/runs").json()["runs"]
    assert len(runs) == 1
    assert contiguous([id for _, _, id in seen["events"]])
    assert seen["events"][-1][1] == "[DONE]"


def test_a_fleeting_stream_runs_once(page: Page, tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_RETRY_MS": "50"}) as server, relay(server.port) as line:
        seen = listen(page, line.url, "/stream/hello?interval=0.05")
        assert sum(answer.count(b"HTTP/1.1 204") for answer in line.answers()) == 1
    assert [data for _, data, _ in seen["events"]] == [
        *(f'{{"text":"{word}"}}' for word in ("Hello", "from", "Server-Sent", "Events!")),
        '{"done":true}',
    ]
    assert seen["events"][-1][2] == "end"


@contextmanager
def nginx(port: int, directives: str) -> Iterator[int]:
    """An unprivileged nginx in front of a port, in a folder of its own; gives its port."""
    with TemporaryDirectory() as name:
        folder, listen_port = Path(name), free_port()
        paths = "".join(
            f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"""daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}
            http {{ access_log off; {paths}
              server {{ listen 127.0.0.1:{listen_port}; location / {{
                proxy_pass http://127.0.0.1:{port}; proxy_http_version 1.1; proxy_set_header Connection "";
                proxy_next_upstream off; {directives} }} }} }}"""
        )
        command = [find("nginx"), "-e", "stderr", "-p", str(folder), "-c", "nginx.conf"]
        if os.geteuid() == 0:  # pytest's own folders are closed to others
            os.chown(folder, 65534, 65534)
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
        process = subprocess.Popen(command)
        try:
            wait_until(lambda: _answers(listen_port))
            yield listen_port
        finally:
            process.terminate()
            process.wait(10)


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    except httpx.HTTPError:
        return False


@needs("nginx")
def test_a_slow_first_event_behind_an_impatient_proxy_is_one_run(page: Page, tmp_path: Path) -> None:
    """10 s before the first event, through a proxy that gives up after 2 s without a byte."""
    gone = threading.Event()

    def late(call: upstream.Call) -> None:
        gone.wait(10)  # nobody sets it: the model thinks for 10 s
        call.head()
        call.send(upstream.token("late "), upstream.token("but whole"), upstream.STOP, upstream.DONE)
        call.end()

    with upstream.serve() as model:
        model.plan(late)
        environ = {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "k", "SSEAPP_RETRY_MS": "100"}
        with (
            serve(tmp_path, env=environ) as server,
            nginx(server.port, "proxy_read_timeout 2s;") as port,
        ):
            seen = listen(page, f"http://127.0.0.1:{port}", "/chat?prompt=hi")
            runs = httpx.get(f"{server.url}/runs").json()["runs"]
        assert len(model.calls) == 1
    assert [data for _, data, _ in seen["events"]] == ['{"content":"late "}', '{"content":"but whole"}', "[DONE]"]
    assert seen["errors"] >= 3, "the proxy was patient: this test shows nothing"
    assert [run["state"] for run in runs] == ["completed"]


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
