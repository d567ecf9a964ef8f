"""Clients of others against our server: the same events as ours, heartbeats unseen, and on after a cut.

All read the same kind of run, over a line that breaks. Browsers' `EventSource` and npm's `eventsource` come back by
themselves; with the others it is whoever uses them who sends the last id again.
"""

import asyncio
import json
import re
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import aiohttp
import anyio
import httpx
import pytest
import sseclient
from httpx_sse import connect_sse
from playwright.sync_api import Browser

from ssecore.client import connect
from ssecore.wire import Decoder
from tests import chromium
from tests.needs import needs
from tests.relay import relay
from tests.serving import Server, serve_uvicorn, wait_until

browser = chromium.browser

#: Id, type, data, as a browser names them.
Told = list[tuple[str, str, str]]

NODE: Final = Path(__file__).parent / "node"
STATIC: Final = Path(__file__).parent.parent / "handlers" / "page" / "static"
#: Bytes with the head, some 330; the pause of the stream comes behind them all.
CUTS: Final = [500, 600, 717]
COUNT: Final = 31


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environ = {"SSEAPP_HEARTBEAT_S": "0.05", "SSEAPP_RETRY_MS": "1", "SSEAPP_LOG": "memory"}
    with serve_uvicorn(tmp_path_factory.mktemp("data"), app="tests.runs_app:make", env=environ) as server:
        yield server


def check(server: Server, read: Callable[[str], Told], cuts: list[int], folder: Path) -> None:
    """The stream pauses until its last connection has had a heartbeat."""
    go_on = folder / "go-on"

    def wait_for_heartbeat() -> None:
        try:
            line.wait_streams(len(cuts) + 1)
            wait_until(lambda: any(re.search(rb"\n:\n", answer) for answer in line.answers()[-1:]))
        finally:
            go_on.touch()

    with relay(server.port, cuts) as line, ThreadPoolExecutor() as pool:
        heartbeat = pool.submit(wait_for_heartbeat)
        told = read(f"{line.url}/talk?path={go_on}")
        heartbeat.result()
        answers = line.answers()
    run = told[0][0].partition(".")[0]
    whole = Decoder().feed(server.client.get(f"/runs/{run}/events").content)
    assert len(whole) == COUNT
    assert told == [(event.id, event.event or "message", event.data) for event in whole]
    assert len([answer for answer in answers if b"text/event-stream" in answer.lower()]) == len(cuts) + 1


def resuming(read: Callable[[str, dict[str, str], Told], bool]) -> Callable[[str], Told]:
    """A client that is told what to go on from. `read` says whether there may be more."""

    def read_all(url: str) -> Told:
        told: Told = []
        while read(url, {"last-event-id": told[-1][0]} if told else {}, told):
            pass
        return told

    return read_all


def by_node(script: str) -> Callable[[str], Told]:
    def read(url: str) -> Told:
        done = subprocess.run(["node", script, url], cwd=NODE, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        return [(id, kind, data) for id, kind, data in map(json.loads, done.stdout.split("\n")[:-1])]

    return read


def by_httpx_sse(url: str, headers: dict[str, str], told: Told) -> bool:
    with httpx.Client(verify=False) as http, connect_sse(http, "GET", url, headers=headers) as source:
        if source.response.status_code == 204:
            return False
        try:
            for event in source.iter_sse():
                told.append((event.id, event.event, event.data))
        except httpx.RemoteProtocolError:
            pass
    return True


def by_sseclient(url: str, headers: dict[str, str], told: Told) -> bool:
    with httpx.Client(verify=False) as http, http.stream("GET", url, headers=headers) as response:
        if response.status_code == 204:
            return False
        told += [
            (str(event.id), event.event, event.data) for event in sseclient.SSEClient(response.iter_raw()).events()
        ]
    return True


def by_aiohttp(url: str, headers: dict[str, str], told: Told) -> bool:
    async def read() -> bool:
        decoder = Decoder()
        decoder.last_event_id = headers.get("last-event-id", "")
        decoder.reset()
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
            try:
                async for chunk in response.content.iter_any():
                    told.extend((str(e.id), e.event or "message", e.data) for e in decoder.feed(chunk))
            except aiohttp.ClientPayloadError:
                pass
            return response.status != 204

    return asyncio.run(read())


def by_curl(url: str, headers: dict[str, str], told: Told) -> bool:
    options = [option for name, value in headers.items() for option in ("-H", f"{name}: {value}")]
    command = ["curl", "-sSN", "--noproxy", "*", "-w", "%{http_code}", *options, url]
    output = subprocess.run(command, capture_output=True, timeout=20).stdout
    decoder = Decoder()
    told += [(str(event.id), event.event or "message", event.data) for event in decoder.feed(output)]
    return not output.endswith(b"204")


def by_ours(url: str) -> Told:
    async def read() -> Told:
        async with httpx.AsyncClient(verify=False) as http, connect(url, client=http) as source:
            return [(str(event.id), event.event or "message", event.data) async for event in source]

    return anyio.run(read)


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(by_ours, id="ours"),
        pytest.param(by_node("eventsource.js"), id="eventsource", marks=needs("node-clients")),
        pytest.param(by_node("parser.js"), id="eventsource-parser", marks=needs("node-clients")),
        pytest.param(by_node("fetching.js"), id="resuming-fetch", marks=needs("node-clients")),
        pytest.param(resuming(by_httpx_sse), id="httpx-sse"),
        pytest.param(resuming(by_aiohttp), id="aiohttp"),
        pytest.param(resuming(by_curl), id="curl", marks=needs("curl")),
    ],
)
def test_a_client_of_others_hears_every_event_once_over_cuts(
    server: Server, read: Callable[[str], Told], tmp_path: Path
) -> None:
    check(server, read, CUTS, tmp_path)


def test_sseclient_hears_every_event_once(server: Server, tmp_path: Path) -> None:
    """Without cuts: it takes half an event at a stream's end for a whole one."""
    check(server, resuming(by_sseclient), [], tmp_path)


#: Both leave what they heard in `window.told`, and say when they are through.
EVENT_SOURCE: Final = """
(url) => {
  window.told = []
  const source = new EventSource(url)
  const note = (event) => window.told.push([event.lastEventId, event.type, event.data])
  for (const type of ["message", "item", "complete"]) source.addEventListener(type, note)
  source.addEventListener("error", () => { window.through = source.readyState === EventSource.CLOSED })
}
"""
FETCH: Final = """
async (url) => {
  window.told = []
  let last = ""
  for (;;) {
    const response = await fetch(url, {headers: last ? {"last-event-id": last} : {}, cache: "no-store"})
    if (response.status === 204) break
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    let text = ""
    for (;;) {
      const {done, value} = await reader.read().catch(() => ({done: true}))
      if (done) break
      const blocks = (text + value).split("\\n\\n")
      text = blocks.pop()
      for (const block of blocks) {
        const lines = block.split("\\n").map((line) => line.match(/^(\\w+): ?([^]*)$/)).filter((line) => line)
        const all = (name) => lines.filter((line) => line[1] === name).map((line) => line[2])
        last = all("id").at(-1) ?? last
        window.told.push([last, all("event").at(-1) ?? "message", all("data").join("\\n")])
      }
    }
  }
  window.through = true
}
"""


RESUMING_FETCH: Final = """
async (url) => {
  window.told = []
  const { eventSource, resumingFetch } = await import("data:text/javascript;base64,MODULE")
  const source = eventSource((await resumingFetch(url)).body)
  const note = (event) => window.told.push([event.lastEventId, event.type, event.data])
  for (const type of ["message", "item", "complete"]) source.addEventListener(type, note)
  source.addEventListener("error", () => { window.through = true })
}
""".replace("MODULE", b64encode((STATIC / "resuming-fetch.js").read_bytes()).decode())


@needs("chromium")
@pytest.mark.parametrize(
    "script", [EVENT_SOURCE, FETCH, RESUMING_FETCH], ids=["EventSource", "fetch", "resuming-fetch"]
)
def test_chromium_hears_every_event_once_over_cuts(
    server: Server, browser: Browser, script: str, tmp_path: Path
) -> None:
    def read(url: str) -> Told:
        page = browser.new_page()
        page.goto(url.partition("/talk")[0] + "/nothing")  # for its origin
        page.evaluate(f"({script})({json.dumps(url)}); 0")
        page.wait_for_function("window.through", timeout=20_000)
        told: Told = [(id, kind, data) for id, kind, data in page.evaluate("window.told")]
        page.close()
        return told

    check(server, read, CUTS, tmp_path)


# Cut anywhere in an event


def check_cuts(server: Server, read: Callable[[str], list[list[str]]], client: str) -> None:
    """The n-th connection is cut in the n-th event, three bytes further in than the one before.

    But not between the id's line and the blank line behind it: a client that takes an id at its line's end loses the
    event there, whatever the server does (`@microsoft/fetch-event-source` 2.0.1, `eventsource` 2.0.2).
    """
    path = f"/numbers?key=a-key-of-its-own-for-each-{client}"
    run = server.client.get(path).headers["run-id"]
    blocks = re.findall(rb"(?:id|data): .*?\n\n", server.client.get(f"/runs/{run}/events").content, re.DOTALL)
    cuts = [
        re.compile(rb"(?=%b).{%d}" % (re.escape(block), place), re.DOTALL)
        for block, place in zip(blocks, range(0, len(blocks[-1]) - 1, 3), strict=False)
    ]
    with relay(server.port, cuts) as line:
        told = read(line.url + path)
        line.wait_streams(len(cuts) + 1)
    assert told == [[event.id, event.data] for block in blocks for event in Decoder().feed(block)]


@needs("node-clients")
@pytest.mark.parametrize(
    "client",
    ["@microsoft/fetch-event-source", "event-source-polyfill", "eventsource", "eventsource-client", "eventsource2"],
)
def test_a_client_of_npm_loses_no_event_wherever_in_an_event_it_is_cut(server: Server, client: str) -> None:
    def read(url: str) -> list[list[str]]:
        done = subprocess.run(["node", "reading.js", client, url], cwd=NODE, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    check_cuts(server, read, client)


#: For pages only: Node has no XMLHttpRequest.
SSE_JS: Final = """
(url) => {
  window.told = []
  const source = new SSE(url, {autoReconnect: true, reconnectDelay: 1})
  source.addEventListener("message", (event) => {
    window.told.push([event.lastEventId, event.data])
    if (event.data === "[DONE]") { source.autoReconnect = false; source.close(); window.through = true }
  })
}
"""


@needs("chromium")
@needs("node-clients")
def test_sse_js_loses_no_event_wherever_in_an_event_it_is_cut(server: Server, browser: Browser) -> None:
    def read(url: str) -> list[list[str]]:
        page = browser.new_page()
        page.goto(url.partition("/numbers")[0] + "/healthz")
        page.add_script_tag(content=(NODE / "node_modules/sse.js/lib/sse.js").read_text().partition("\nexport")[0])
        page.evaluate(f"({SSE_JS})({json.dumps(url)}); 0")
        page.wait_for_function("window.through", timeout=60_000)
        told: list[list[str]] = page.evaluate("window.told")
        page.close()
        return told

    check_cuts(server, read, "sse.js")


@needs("node-clients")
def test_resuming_fetch_withstands_a_server_that_does_everything_wrong() -> None:
    done = subprocess.run(["node", "resuming.js"], cwd=NODE, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_lock_for_node_names_no_address() -> None:
    lock = json.loads((NODE / "package-lock.json").read_text())
    assert all(re.match("sha512-", package["integrity"]) for name, package in lock["packages"].items() if name)
    assert "resolved" not in json.dumps(lock)
