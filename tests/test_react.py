"""examples/react_chat.jsx in Chromium: the AI SDK's `useChat` over a line that breaks, over a reload, and stopped."""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import Page, expect

from tests import chromium
from tests import upstream as llm
from tests.needs import needs
from tests.relay import Relay, relay
from tests.serving import Server, serve, wait_until
from tests.test_frontends import ENV, LONG, NODE, WORDS, held
from tests.upstream import Upstream

pytestmark = [needs("chromium"), needs("node-clients")]
browser, page = chromium.browser, chromium.page

ROOT: Final = Path(__file__).parent.parent


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is, bundled as its first lines say."""
    folder = tmp_path_factory.mktemp("page")
    for file in ("examples/react_chat.html", "examples/react_chat.jsx", "handlers/page/static/resuming-fetch.js"):
        shutil.copy(ROOT / file, folder)
    (folder / "node_modules").symlink_to(NODE / "node_modules")
    bundle = ["node_modules/.bin/esbuild", "react_chat.jsx", "--bundle", "--jsx=automatic", "--outdir=."]
    done = subprocess.run(bundle, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{files.server_port}"
        files.shutdown()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with llm.serve() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, origin: str, upstream: Upstream) -> Iterator[Server]:
    env = {**ENV, "OPENAI_BASE_URL": upstream.url, "OPENAI_MODEL": "m", "SSEAPP_CORS_ORIGINS": origin}
    with serve(tmp_path_factory.mktemp("data"), env=env) as server:
        yield server


def ask(page: Page, origin: str, line: Relay) -> None:
    page.goto(f"{origin}/react_chat.html?service={line.url}")
    page.fill("input", "hello")
    page.click("text=Ask")


def is_shown(page: Page, answer: str, status: str = "ready") -> None:
    """The question and the answer, each once."""
    expect(page.locator("p")).to_have_text(["hello", answer, status], timeout=20_000)


#: Each within an event. None within a head: before the page knows `retry:`, it waits for seconds.
CUTS: Final = [re.compile(rb"word-%d\b" % number) for number in range(40, 280, 40)]


def paced(call: llm.Call) -> None:
    call.head()
    call.send(llm.FIRST)
    for word in LONG.split():
        call.send(llm.token(f"{word} "))
        time.sleep(0.005)
    call.send(llm.STOP, llm.DONE)
    call.end()


def test_an_answer_is_whole_over_cuts(page: Page, origin: str, server: Server, upstream: Upstream) -> None:
    upstream.plan(paced)
    with relay(server.port, CUTS) as line:
        ask(page, origin, line)
        is_shown(page, LONG)
        line.wait_streams(1 + len(CUTS))
    upstream.settle()


def test_a_reload_in_the_middle_shows_the_same_messages(
    page: Page, origin: str, server: Server, upstream: Upstream
) -> None:
    go_on = threading.Event()
    upstream.plan(held(go_on))
    with relay(server.port) as line:
        ask(page, origin, line)
        is_shown(page, "".join(WORDS[:5]), "streaming")
        page.reload()
        is_shown(page, "".join(WORDS[:5]), "streaming")
        go_on.set()
        is_shown(page, "".join(WORDS))
        page.reload()  # nothing is active
        is_shown(page, "".join(WORDS))
        assert len(upstream.calls) == 1
    upstream.settle()


def test_stop_ends_the_answer_and_keeps_what_is_there(
    page: Page, origin: str, server: Server, upstream: Upstream
) -> None:
    upstream.plan(llm.silent(llm.FIRST, *map(llm.token, WORDS)))
    with relay(server.port) as line:
        ask(page, origin, line)
        is_shown(page, "".join(WORDS), "streaming")
        page.click("text=Stop")
        is_shown(page, "".join(WORDS))
        wait_until(lambda: server.client.get("/runs").json()["runs"][0]["state"] == "cancelled")
    upstream.settle()
