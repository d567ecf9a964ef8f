"""The page at `/`: what the service answers, and the page at work in Chromium.

With SSEAPP_SCREENSHOTS=<folder> the pictures of the page at work are kept there; `make pictures` makes README's.
"""

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, ViewportSize, expect

from ssecore.http.tokens import add_token, revoke_tokens
from tests import chromium
from tests.needs import needs
from tests.relay import relay
from tests.serving import Server, free_port, serve, wait_until
from tests.upstream import DONE, FIRST, LIMIT_S, STOP, USAGE, Call, chunk, token
from tests.upstream import serve as serve_upstream

STATIC: Final = Path(__file__).parent.parent / "handlers" / "page" / "static"
HOSTILE: Final = '<img src=x onerror="window.hurt = 1"><script>window.hurt = 1</script>'
PICTURES: Final = os.environ.get("SSEAPP_SCREENSHOTS")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"SSEAPP_MOCK_DELAY_S": "0.02", "SSEAPP_RETRY_MS": "100", "SSEAPP_LINGER_S": "20"}
    with serve(tmp_path_factory.mktemp("data"), env=env) as server:
        rows = "title,priority,due\nRenew the certificate,5,2026-12-01\nCall the printer,4,\n"
        answer = server.client.post("/tasks/import", content=rows, headers={"content-type": "text/csv"})
        assert '"imported":2' in answer.text
        yield server


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its answers take two seconds and more: time for a picture."""
    with serve(tmp_path_factory.mktemp("slow"), env={"SSEAPP_MOCK_DELAY_S": "0.06"}) as server:
        yield server


# What the service answers


def test_the_page_and_all_that_it_names_are_served(server: Server) -> None:
    page, docs = server.client.get("/"), server.client.get("/docs")
    assert page.headers["content-type"] == docs.headers["content-type"] == "text/html; charset=utf-8"
    names = set(re.findall(r'(?:href|src)="(static/[^"]+)"', page.text + docs.text))
    paths = sorted(STATIC.iterdir())
    # Modules too: none is waited for by another. What is there for other pages is not the page's own.
    assert names == {f"static/{path.name}" for path in paths if path.stem.partition(".")[0] != "resuming-fetch"}
    for path in paths:
        answer = server.client.get(f"/static/{path.name}")
        assert answer.status_code == 200
        assert answer.content == path.read_bytes()
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_nothing_may_run_on_the_page_but_its_own_modules(server: Server) -> None:
    policy = server.client.get("/").headers["content-security-policy"]
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= set(
        policy.split("; ")
    )
    assert "unsafe" not in policy


@pytest.mark.parametrize("path", ["/", "/static/main.js", "/docs", "/docs/runs.md"])
def test_what_has_not_changed_is_not_sent_again(server: Server, path: str) -> None:
    first = server.client.get(path)
    for tag in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = server.client.get(path, headers={"if-none-match": tag})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert server.client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    head = server.client.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", first.headers["etag"])


@pytest.mark.parametrize(
    "name", ["", "nothing.js", "../__init__.py", "..%2f__init__.py", "%2e%2e/index.html", "/etc/passwd", "main.js%00"]
)
def test_a_name_that_is_no_file_of_the_page_is_nowhere(server: Server, name: str) -> None:
    # A path as it stands: the client would resolve the dots.
    request = httpx.Request("GET", server.url)
    request.url = httpx.URL(server.url, raw_path=f"/static/{name}".encode())
    answer = server.client.send(request)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


# The page at work


browser = chromium.browser


class Tab:
    """The page in a tab. What the console says besides the failed requests that a test provokes is a failure."""

    def __init__(self, context: BrowserContext, origin: str) -> None:
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(f"{origin}/")

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def choose(self, subject: str, stream: str) -> None:
        self.page.locator(".subject label", has_text=subject).click()
        self.page.locator(".streams label").get_by_text(stream, exact=True).click()

    def sign_in(self, token: str) -> None:
        self.page.get_by_label("Sign in with a token").fill(token)
        self.page.get_by_role("button", name="Sign in").click()

    def fill(self, **fields: str) -> None:
        for name, value in fields.items():
            field = self.page.locator(f"#field-{name}")
            if field.evaluate("node => node.tagName") == "SELECT":
                field.select_option(value)
            else:
                field.fill(value)

    def start(self, subject: str, stream: str, **fields: str) -> Locator:
        """Start a stream; its view. Other views may come and go meanwhile."""
        self.choose(subject, stream)
        self.fill(**fields)
        before = self.views.count()
        self.page.get_by_role("button", name="Start").click()
        self.views.nth(before).wait_for()
        return self.pinned(self.views.first)

    def pinned(self, view: Locator) -> Locator:
        """The same view, wherever it is when others are opened."""
        number = view.evaluate("node => node.dataset.number ||= String(document.querySelectorAll('.view').length)")
        return self.page.locator(f'.view[data-number="{number}"]')

    @property
    def views(self) -> Locator:
        return self.page.locator(".view")

    def run_in_list(self, run: str) -> Locator:
        return self.page.locator(f'.runs li[data-run="{run}"]')

    def look(self, scheme: Literal["light", "dark"], size: ViewportSize, name: str, *, full_page: bool = False) -> None:
        """At the page in these colours, at this size: nothing is cut off, all of it can be read."""
        self.page.emulate_media(color_scheme=scheme)
        self.page.set_viewport_size(size)
        assert self.page.evaluate("document.documentElement.scrollWidth") == size["width"]
        assert self.page.evaluate(UNREADABLE) == []
        if PICTURES:
            Path(PICTURES).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{PICTURES}/{name}.png", full_page=full_page)


@pytest.fixture(scope="module")
def shared(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    context.set_default_timeout(15_000)
    yield context
    context.close()


@pytest.fixture(scope="module")
def first_tab(shared: BrowserContext, server: Server) -> Tab:
    return Tab(shared, server.url)


@pytest.fixture
def tab(first_tab: Tab, server: Server) -> Iterator[Tab]:
    """The same tab for all tests, which is faster than a new one, as if nobody had used it."""
    first_tab.page.bring_to_front()
    first_tab.page.evaluate("sessionStorage.clear()")
    first_tab.page.goto(f"{server.url}/?")  # without the address's last part: it may name a run
    yield first_tab
    complaints, first_tab.complaints = first_tab.complaints, []
    assert complaints == []


def becomes(view: Locator, state: str) -> None:
    """Wait for this state of the view's: `open`, or how it ended. (`expect` looks twice a second only.)"""
    view.locator(f'header .badge[data-state="{state}"]').wait_for(timeout=20_000)


def ends(view: Locator, outcome: str = "completed") -> None:
    becomes(view, outcome)


def run_of(view: Locator) -> str:
    """The id of the view's run, once it has one."""
    link = view.get_by_role("link", name="New tab")
    expect(link).to_be_visible()
    return (link.get_attribute("href") or "").removeprefix("#run=")


def cancel(view: Locator) -> list[str]:
    """End a job that outlasts its test; what was shown of its steps."""
    view.get_by_role("button", name="Cancel").click()
    ends(view, "cancelled")
    return [text for text in view.locator(".log span").all_inner_texts() if text.startswith("step ")]


def text_of(view: Locator) -> str:
    return view.locator(".text").inner_text()


FAST: Final = {"interval": "0"}
FOUND: Final = re.compile(r"Today is.*I found \d tasks?:.*Renew the certificate", re.DOTALL)
#: Each kind of stream: subject, name, fields, and what its view shows at the end.
STREAMS: Final[list[tuple[str, str, dict[str, str], dict[str, str | re.Pattern[str]]]]] = [
    ("Basics", "Counter", FAST, {".log li >> nth=9": re.compile("Update 9")}),
    ("Basics", "Counter, data only", FAST, {".log li >> nth=9": re.compile("Update 9")}),
    ("Basics", "Hello", FAST, {".log": re.compile("Hello.*from.*Server-Sent.*Events!")}),
    ("Basics", "Progress", FAST, {".bar .percent": "100 %"}),
    ("Basics", "Format", FAST, {".log li[data-level=info] b >> nth=1": "config"}),
    ("Basics", "Merge", FAST, {".log": re.compile("A.*4")}),
    ("Basics", "Errors", FAST, {".log [data-level=error]": re.compile("RuntimeError: the source failed at item 25")}),
    ("Basics", "Countdown", {"seconds": "3", **FAST}, {".figure": "0", ".bar .step": "Countdown finished!"}),
    ("Basics", "Three steps", FAST, {".bar .step": "Done!"}),
    ("Tasks", "Import a CSV", {}, {".facts": "imported6failed0"}),
    ("Tasks", "List", {"q": "certificate"}, {"td[data-column=title] >> nth=0": "Renew the certificate"}),
    ("Tasks", "Work on a task", {"operation": "analyze"}, {".bar .step": "done", ".log b >> nth=0": "count"}),
    ("Tasks", "Follow a task", {}, {".facts": "statuscompleted"}),
    ("Agent", "Steps and answer", {}, {".timeline li >> nth=0": "Reading the question", ".text": FOUND}),
    ("Agent", "Thoughts", {}, {".timeline [data-kind=thought] >> nth=2": re.compile("2 of 2"), ".text": FOUND}),
    ("Agent", "Tool calls", {}, {".timeline [data-kind=tool] >> nth=1": re.compile("^search_tasks"), ".text": FOUND}),
    (
        "Agent",
        "Conversation",
        {"message": "Which tasks have priority 4?"},
        {".sources li >> nth=0": re.compile("Call the printer")},
    ),
    ("Chat", "One prompt", {"prompt": "one two"}, {".text": "This is a mock response to: one two"}),
    ("Chat", "Conversation", {"content": "three"}, {".text": "This is a mock response to: three"}),
    ("Jobs", "Report with log", {}, {".log [data-level=success]": re.compile("report written")}),
    ("Jobs", "Job", {"steps": "4", **FAST}, {".bar .step": "4 steps", ".bar .percent": "100 %"}),
    ("Jobs", "Job", {"kind": "report"}, {".facts a": "tasks-report.json"}),
    ("Jobs", "Items", {}, {".bar .step": "3 of 3", ".log b >> nth=2": "5"}),
    ("Jobs", "Items", {"items": '["a", 1]'}, {".log [data-level=warning]": re.compile("index 1.*not a number")}),
]


@needs("chromium")
def test_each_kind_of_stream_is_started_and_seen_to_its_end(tab: Tab) -> None:
    for subject, stream, fields, shown in STREAMS:
        view = tab.start(subject, stream, **fields)
        ends(view)
        for place, text in shown.items():
            expect(view.locator(place), f"{subject}, {stream}: {place}").to_have_text(text)
        view.get_by_role("button", name=f"Close {stream}").click()
        expect(tab.views).to_have_count(0)


@needs("chromium")
def test_a_time_limit_ends_in_its_error(tab: Tab) -> None:
    view = tab.start("Basics", "Time limit", limit="0.1", interval="0.05")
    ends(view, "failed")
    expect(view.locator(".remark")).to_have_text("Stream timeout exceeded")


@needs("chromium")
def test_a_flood_of_events_is_shown_by_its_end(tab: Tab) -> None:
    view = tab.start("Basics", "Counter", count="20000", interval="0")
    ends(view)
    expect(view.locator(".count")).to_have_text("20,001 events")
    lines = view.locator(".log li")
    assert lines.count() == 300
    expect(lines.last).to_contain_text("Update 19999")
    expect(view.locator(".forgotten")).to_have_text("19,700 earlier not shown")


@needs("chromium")
def test_what_is_published_is_seen_in_two_tabs_and_after_a_reload(
    shared: BrowserContext, tab: Tab, server: Server
) -> None:
    mine = tab.start("Topics", "Topic", name="news")
    becomes(mine, "open")
    other = Tab(shared, server.url)
    theirs = other.start("Topics", "Topic", name="news", listen="alarm")
    expect(theirs.locator(".count")).to_have_text("1 event")
    tab.page.bring_to_front()
    mine.get_by_label("Event name").fill("alarm")
    mine.get_by_label("Text or JSON to publish").fill('{"title": "Backup", "text": "All is well"}')
    mine.get_by_role("button", name="Publish").click()
    for view in (mine, theirs):
        expect(view.locator(".notes li")).to_have_text(re.compile("alarm.*Backup.*All is well"))
    mine.get_by_label("Event name").fill("message")
    mine.get_by_label("Text or JSON to publish").fill("only a text")
    mine.get_by_role("button", name="Publish").click()
    expect(theirs.locator(".notes li")).to_have_count(2)
    other.page.reload()
    expect(other.views.locator(".notes li", has_text="only a text")).to_be_visible()
    other.page.close()
    assert other.complaints == []


@needs("chromium")
def test_notifications_of_a_user(tab: Tab) -> None:
    view = tab.start("Topics", "Notifications", user_id="ann")
    becomes(view, "open")
    view.get_by_label("Text or JSON to publish").fill("hello")
    view.get_by_role("button", name="Publish").click()
    expect(view.locator(".notes li b")).to_have_text("notification")


@needs("chromium")
def test_a_jobs_file_is_saved_and_one_that_is_not_there_is_refused(tab: Tab) -> None:
    view = tab.start("Jobs", "Job", kind="report")
    with tab.page.expect_download() as download:
        view.get_by_role("link", name="tasks-report.json").click()
    assert '"by_status"' in download.value.path().read_text()
    tab.choose("Files", "Download")
    tab.fill(filename="nothing.txt")
    tab.page.get_by_role("button", name="Download").click()
    expect(tab.page.locator("#start form > .error")).to_have_text("there is no file of this name")
    tab.fill(filename="tasks-report.json")
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "tasks-report.json"


@needs("chromium")
def test_an_export_is_saved_as_a_file(tab: Tab) -> None:
    tab.choose("Tasks", "Export as CSV")
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "tasks.csv"
    assert download.value.path().read_text().startswith("id,title,")


#: What the service refuses: subject, stream, fields, the field to blame, and what is said there.
REFUSED: Final = [
    ("Basics", "Counter", {"count": "-1"}, "count", "count"),
    ("Basics", "Countdown", {"seconds": "9999"}, "seconds", "must be from 0 to 3600"),
    ("Chat", "One prompt", {"prompt": ""}, "prompt", "prompt"),
    ("Chat", "Conversation", {"content": "x" * 100_001}, "content", "100000"),
    ("Agent", "Conversation", {"session_id": "short"}, "session_id", "at least 22"),
    ("Tasks", "List", {"q": "!?"}, "q", "must contain a word"),
    ("Tasks", "Work on a task", {"task_id": "0"}, "task_id", "task_id"),
    ("Jobs", "Job", {"steps": "0"}, "steps", ">= 1"),
]


@needs("chromium")
def test_what_the_service_refuses_stands_at_the_field(tab: Tab) -> None:
    for subject, stream, fields, place, said in REFUSED:
        tab.choose(subject, stream)
        tab.fill(**fields)
        tab.page.get_by_role("button", name="Start").click()
        field = tab.page.locator(f"#field-{place}")
        tab.page.locator(f"#field-{place}[aria-invalid]:focus").wait_for()
        expect(field).to_have_attribute("aria-describedby", f"field-{place}-about")
        expect(tab.page.locator(f"#field-{place}-about")).to_contain_text(said)
        expect(tab.views).to_have_count(0)


@needs("chromium")
def test_what_has_no_field_stands_at_the_forms_end(tab: Tab) -> None:
    tab.choose("Tasks", "Work on a task")
    tab.fill(task_id="999999")
    tab.page.get_by_role("button", name="Start").click()
    expect(tab.page.get_by_role("alert").filter(has_text="there is no task 999999")).to_be_visible()
    expect(tab.views).to_have_count(0)


SCHEMES: Final[tuple[Literal["light", "dark"], ...]] = ("light", "dark")
WIDE: Final[ViewportSize] = {"width": 1280, "height": 1060}
#: The texts that are smaller than 13 pixels, or that stand out by less than 4.5 to 1 (WCAG 2.2, 1.4.3).
UNREADABLE: Final = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true})
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1)
    canvas.fillStyle = color
    canvas.fillRect(0, 0, 1, 1)
    return [...canvas.getImageData(0, 0, 1, 1).data]
  }
  const light = (color) => {
    const [r, g, b] = color.map((part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const below = (node) => {
    for (; node; node = node.parentElement) {
      const color = rgba(getComputedStyle(node).backgroundColor)
      if (color[3] === 255) return color
    }
    return [255, 255, 255, 255]
  }
  const found = new Set()
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement
    if (!texts.currentNode.data.trim() || !node.checkVisibility() || node.closest(".unseen, noscript")) continue
    const style = getComputedStyle(node)
    const [one, two] = [light(rgba(style.color)), light(below(node))].sort((a, b) => b - a)
    const contrast = (one + 0.05) / (two + 0.05)
    if (parseFloat(style.fontSize) < 13 || contrast < 4.5 || style.opacity !== "1")
      found.add(`${node.className || node.tagName}: ${style.fontSize}, ${contrast.toFixed(2)}`)
  }
  return [...found]
}"""


@needs("chromium")
def test_the_page_at_work_wide_and_narrow_light_and_dark(browser: Browser, slow: Server) -> None:
    """Nothing is wider than the screen, and all of it can be read. The pictures are of this."""
    for run in slow.client.get("/runs").json()["runs"]:
        slow.client.delete(f"/runs/{run['run']}")
    context = browser.new_context(viewport=WIDE, reduced_motion="reduce", device_scale_factor=1)
    tab = Tab(context, slow.url)
    ends(tab.start("Tasks", "Import a CSV"))
    notifications = tab.start("Topics", "Notifications")
    for said in ('{"title": "Backup", "text": "All machines are saved"}', "The report is ready"):
        notifications.get_by_label("Text or JSON to publish").fill(said)
        notifications.get_by_role("button", name="Publish").click()
        expect(notifications.get_by_label("Text or JSON to publish")).to_have_value("")
    ends(tab.start("Jobs", "Report with log"))
    prompt = "what comes over this line is kept, so that a page which loses it goes on where it was"
    chat = tab.start("Chat", "One prompt", prompt=" and ".join([prompt] * 8))
    talk = tab.start("Agent", "Conversation")
    ends(talk)
    talk.get_by_label("Your reply").fill("Which of them have priority 5?")
    talk.get_by_label("Your reply").press("Enter")
    talk.locator(".sources").wait_for()
    job = tab.start("Jobs", "Job", steps="200", interval="0.1")
    job.locator(".log li").nth(2).wait_for()
    job.get_by_role("button", name="Cut the connection").click()
    ends(tab.start("Agent", "Tool calls"))
    expect(job.locator(".cut-note")).to_contain_text("It resumed with event")
    expect(chat.locator(".text")).to_contain_text("goes on where it was")
    assert chat.locator(".text").evaluate("node => getComputedStyle(node, '::after').animationName") == "none"
    for scheme in SCHEMES:
        tab.look(scheme, WIDE, f"page-{scheme}")
    for scheme in SCHEMES:
        tab.look(scheme, {"width": 390, "height": 844}, f"narrow-{scheme}", full_page=True)
    for details in tab.page.locator(".events summary").all():
        details.click()
    tab.look("light", {"width": 360, "height": 740}, "narrow-open", full_page=True)
    context.close()
    assert tab.complaints == []


@needs("chromium")
def test_an_agents_run_goes_on_over_a_reload(shared: BrowserContext, tmp_path: Path) -> None:
    reloaded = threading.Event()

    def calling(call: Call) -> None:
        function = {"name": "calculate", "arguments": '{"expression": "6*7"}'}
        call.head()
        call.send(chunk({"tool_calls": [{"index": 0, "id": "1", "function": function}]}), chunk({}, "tool_calls"), DONE)
        call.end()

    def script(call: Call) -> None:
        call.head()
        call.send(FIRST, token("Today is "))
        assert reloaded.wait(LIMIT_S)
        call.send(token("Monday."), STOP, DONE)
        call.end()

    with serve_upstream() as upstream, serve(tmp_path, env={"OPENAI_BASE_URL": upstream.url}) as server:
        upstream.plan(calling, script)
        tab = Tab(shared, server.url)
        view = tab.start("Agent", "Tool calls")
        expect(view.locator(".text")).to_contain_text("Today")
        run, before = run_of(view), view.locator(".timeline").inner_text()
        assert "calculate" in before
        tab.page.reload()
        view = tab.views.first
        becomes(view, "open")  # it is still at work
        reloaded.set()
        ends(view)
        assert run_of(view) == run
        assert view.locator(".timeline").inner_text() == before
        assert text_of(view) == "Today is Monday."
        expect(tab.run_in_list(run)).to_have_count(1)
        upstream.settle()
        tab.page.close()
        assert tab.complaints == []


@needs("chromium")
def test_a_conversation_remembers_what_was_said(tab: Tab) -> None:
    ends(tab.start("Agent", "Conversation", message="How many open tasks are there?"))
    view = tab.start("Agent", "Conversation", message="Which of them have priority 4?")
    ends(view)
    assert "Call the printer" in text_of(view)


@needs("chromium")
def test_a_conversation_goes_on_in_its_view_and_after_a_reload(tab: Tab, server: Server) -> None:
    """Each turn is a run of its own, which is told all that was said before; the instruction stays."""
    view = tab.start("Chat", "Conversation", system="Be brief.", content="one")
    answer = view.get_by_label("Your reply")
    for said in ("two", "three"):
        ends(view)
        answer.fill("first line")
        answer.press("Shift+Enter")
        answer.press_sequentially(said)
        answer.press("Enter")
        expect(view.locator(".said").last).to_have_text(f"first line\n{said}", use_inner_text=True)
        ends(view)
    answers = [f"This is a mock response to: {said}" for said in ("one", "first line two", "first line three")]
    assert [" ".join(text.split()) for text in view.locator(".text").all_inner_texts()] == answers
    runs = [run for run in server.client.get("/runs").json()["runs"] if "first line" in run["about"]]
    assert [run["about"] for run in runs[:2]] == ["first line three", "first line two"]
    with tab.page.expect_request("**/chat/stream") as request:
        answer.fill("four")
        view.get_by_role("button", name="Send").click()
    asked: Any = request.value.post_data_json
    assert [message["role"] for message in asked] == ["system", *["user", "assistant"] * 3, "user"]
    assert (asked[0]["content"], asked[1]["content"], asked[-1]["content"]) == ("Be brief.", "one", "four")
    expect(view.locator(".said")).to_have_count(4)
    tab.page.reload()
    view = tab.views.first
    expect(view.locator(".said")).to_have_count(4)
    ends(view)
    assert len(view.locator(".text").all_inner_texts()) == 4
    tab.run_in_list(runs[1]["run"]).get_by_role("link").click()  # it is open: as a turn of this one
    expect(tab.views).to_have_count(1)


@needs("chromium")
def test_what_is_said_back_and_refused_can_be_said_again(tab: Tab) -> None:
    view = tab.start("Agent", "Conversation", message="How many tasks are there?")
    ends(view)
    answer = view.get_by_label("Your reply")
    answer.fill("x" * 8001)
    answer.press("Enter")
    expect(view.get_by_role("alert")).to_contain_text("8000")
    answer.fill("which of them have priority 4?")
    answer.press("Enter")
    expect(view.locator(".text").last).to_contain_text("Call the printer")
    expect(view.locator(".said")).to_have_count(2)


@needs("chromium")
def test_enter_sends_where_one_text_is_asked_for(tab: Tab) -> None:
    tab.choose("Chat", "One prompt")
    prompt = tab.page.locator("#field-prompt")
    prompt.fill("by Enter")
    # The Enter that ends the choice of a character sends nothing.
    prompt.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    prompt.dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
    prompt.press("Shift+Enter")
    expect(prompt).to_have_value("by Enter\n")
    assert tab.views.count() == 0
    prompt.press("Enter")
    ends(tab.views.first)
    tab.choose("Jobs", "Items")
    items = tab.page.locator("#field-items")
    items.fill("one")
    items.press("Enter")
    expect(items).to_have_value("one\n")
    items.press("ControlOrMeta+Enter")
    ends(tab.views.first)
    expect(tab.views).to_have_count(2)


@needs("chromium")
def test_a_connection_that_is_cut_by_hand_resumes_and_a_fleeting_one_ends(tab: Tab) -> None:
    view = tab.start("Jobs", "Job", steps="600", interval="0.05")
    fleeting = tab.start("Basics", "Counter", count="1000", interval="0.05")
    view.locator(".log li").nth(2).wait_for()
    view.get_by_role("button", name="Cut the connection").click()
    becomes(view, "cut")
    fleeting.get_by_role("button", name="Cut the connection").click()
    ends(fleeting, "lost")
    expect(fleeting.locator(".remark")).to_contain_text("start it again")
    expect(view.locator(".cut-note")).to_contain_text("It resumed")
    note = view.locator(".cut-note").inner_text()
    found = re.fullmatch(r"You cut the connection after event (\d+)\. It resumed with event (\d+)\.", note)
    assert found is not None and int(found[2]) == int(found[1]) + 1, note
    steps = cancel(view)
    assert len(steps) > 40, "those that came while it was cut, too"
    assert steps == [f"step {n} of 600" for n in range(1, len(steps) + 1)]


#: What is started and its code taken, and what both of its codes print.
CODES: Final = [
    ("Chat", "One prompt", {"prompt": 'it\'s $HOME\n`id` & "more"'}, "it's"),
    ("Chat", "Conversation", {"content": 'it\'s $(id) \\ "<b>"'}, "$(id)"),
    ("Agent", "Tool calls", {"query": "what is 6 * 7?"}, "42"),
    ("Jobs", "Items", {"items": '["a\'b", "c"]'}, '"processed":2'),
    ("Tasks", "Import a CSV", {"csv": "title\n@it's\n"}, '"imported":1'),
    ("Basics", "Hello", FAST, "Server-Sent"),
]


@needs("chromium")
def test_the_code_of_what_is_shown_does_the_same(tab: Tab) -> None:
    for subject, stream, fields, said in CODES:
        view = tab.start(subject, stream, **fields)
        ends(view)
        view.get_by_text("Code", exact=True).click()
        view.locator(".code pre").first.wait_for()
        codes = view.locator(".code pre").all_inner_texts()
        curl, script = codes[0], codes[-1]
        done = subprocess.run(["bash", "-c", f"{curl} -sS"], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0 and said in done.stdout, f"{curl}\n{done.stdout}{done.stderr}"
        with tab.page.expect_console_message(lambda message, said=said: said in message.text):  # type: ignore[misc]
            tab.page.evaluate(f"async () => {{ {script} }}")
        view.get_by_role("button", name=f"Close {stream}").click()


@needs("chromium")
def test_runs_are_listed_by_what_they_are_about_with_their_states_and_live_counts(tab: Tab, server: Server) -> None:
    ends(tab.start("Chat", "One prompt", prompt="about penguins"))
    done = tab.run_in_list(run_of(tab.views.first))
    expect(done.get_by_role("link")).to_have_text("about penguins")
    expect(done.locator(".badge")).to_have_text("completed")
    view = tab.start("Jobs", "Job", steps="600", interval="0.05")
    item = tab.run_in_list(run_of(view))
    expect(item.locator(".badge")).to_have_text("running")
    expect(tab.page.locator("#runs-summary [data-state=running]")).to_have_text("1 running")
    colours = [row.locator(".badge").evaluate("node => getComputedStyle(node).color") for row in (done, item)]
    assert colours[0] != colours[1]
    tab.page.route("**/runs", lambda route: route.abort())  # the list can't be asked for any more
    before = item.locator(".events-so-far").inner_text()
    expect(item.locator(".events-so-far")).not_to_have_text(before)
    tab.page.unroute("**/runs")
    view.get_by_role("button", name="Cancel").click()
    ends(view, "cancelled")
    expect(item.locator(".badge")).to_have_text("cancelled")


@needs("chromium")
def test_where_there_are_no_tasks_some_are_offered_and_the_first_question_finds_something(
    shared: BrowserContext, tmp_path: Path
) -> None:
    with serve(tmp_path, env={"SSEAPP_MOCK_DELAY_S": "0"}) as server:
        tab = Tab(shared, server.url)
        offer = tab.page.get_by_role("button", name="Add six samples")
        offer.wait_for()
        tab.page.get_by_role("button", name="Start").click()
        ends(tab.views.first)
        assert "8760" in text_of(tab.views.first)
        offer.click()
        expect(offer).to_have_count(0)
        expect(tab.page.locator("#field-query")).to_have_value(re.compile("priority 5"))
        tab.page.get_by_role("button", name="Start").click()
        expect(tab.views.first.locator(".text")).to_contain_text("I found 2 tasks")
        tab.page.close()
        assert tab.complaints == []


@needs("chromium")
def test_the_docs_are_shown_with_nothing_left_of_their_markdown_and_links_that_lead_somewhere(
    shared: BrowserContext, server: Server
) -> None:
    tab = Tab(shared, server.url)
    assert tab.page.get_by_role("link", name="Docs").get_attribute("href") == "docs"
    anchors: dict[str, set[str]] = {}
    links: set[tuple[str, str]] = set()
    for page in server.client.get("/docs/pages.json").json():
        name, source = page["name"], server.client.get(f"/docs/{page['name']}.md").text
        tab.page.goto(f"{server.url}/docs?page={name}")
        expect(tab.page.locator("#doc h1")).to_have_text(page["title"])
        shown = tab.page.locator("#doc")
        assert shown.locator("h1, h2, h3").count() == len(re.findall(r"^#{1,3} ", unfenced(source), re.MULTILINE)), name
        assert shown.locator("pre").count() >= source.count("\n```") / 2, name
        left = shown.evaluate(
            """node => { const copy = node.cloneNode(true)
            copy.querySelectorAll("code").forEach((code) => code.remove()); return copy.textContent }"""
        )
        assert re.findall(r"\*\*|`|\]\(|^\s*\||^#", left, re.MULTILINE) == [], name
        anchors[name] = set(shown.locator("[id]").evaluate_all("nodes => nodes.map((node) => node.id)"))
        for href in shown.locator("a").evaluate_all("nodes => nodes.map((node) => node.getAttribute('href'))"):
            if not href.startswith("https:"):
                to, _, section = href.partition("#")
                links.add((to.removeprefix("?page=") or name, section))
    assert len(links) > 5
    assert [(to, section) for to, section in links if section and section not in anchors[to]] == []
    assert {to for to, _ in links} <= anchors.keys()
    tab.look("light", {"width": 390, "height": 844}, "docs-narrow")
    tab.page.goto(f"{server.url}/docs?page=<b>none")
    expect(tab.page.locator("#doc")).to_have_text("there is no page <b>none")
    tab.page.close()
    assert tab.complaints == []


def unfenced(markdown: str) -> str:
    return re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL)


@needs("chromium")
def test_a_run_goes_on_over_a_reload_and_in_another_tab(shared: BrowserContext, tab: Tab) -> None:
    words = " ".join(f"word{n}" for n in range(60))
    view = tab.start("Chat", "One prompt", prompt=words)
    expect(view.locator(".text")).to_contain_text("word5 ")
    run = run_of(view)
    tab.page.reload()
    view = tab.views.first
    expect(view.locator(".text")).to_contain_text("word6 ")
    assert run_of(view) == run
    with shared.expect_page() as opened:
        view.get_by_role("link", name="New tab").click()
    theirs = opened.value.locator(".view")
    ends(view)
    ends(theirs)
    assert text_of(view) == text_of(theirs) == f"This is a mock response to: {words}"
    assert run_of(theirs) == run
    opened.value.close()


@needs("chromium")
def test_a_reload_before_the_first_event_starts_nothing_twice(tab: Tab, server: Server) -> None:
    """The run's id is not known yet: the key in its address is."""
    before = len(server.client.get("/runs").json()["runs"])
    tab.page.evaluate(
        """() => sessionStorage.setItem("sseapp.open", JSON.stringify([{title: "One prompt", about: "", life: "run",
            route: "GET /chat", url: "chat?prompt=again&key=0123456789abcdef0123456789"}]))"""
    )
    for _ in range(2):
        tab.page.reload()
        ends(tab.views.first)
        assert text_of(tab.views.first) == "This is a mock response to: again"
    assert len(server.client.get("/runs").json()["runs"]) == before + 1


@needs("chromium")
def test_a_job_goes_on_over_a_line_that_is_away_for_three_seconds(shared: BrowserContext, server: Server) -> None:
    with relay(server.port) as line:
        tab = Tab(shared, line.url)
        view = tab.start("Jobs", "Job", steps="600", interval="0.05")
        view.locator(".log li").nth(2).wait_for()
        shared.set_offline(True)
        line.cut()
        becomes(view, "reconnecting")
        seen = view.locator(".log span").count()
        tab.page.wait_for_timeout(3000)  # the line is away for this long
        run = run_of(view)
        wait_until(lambda: server.client.get(f"/runs/{run}").json()["events"] > seen + 10)
        shared.set_offline(False)
        expect(view.locator(".resumed")).to_have_text(re.compile("resumed 1"))
        view.locator(".log span").nth(seen + 10).wait_for()  # those that came meanwhile, too
        steps = cancel(view)
        assert steps == [f"step {n} of 600" for n in range(1, len(steps) + 1)]  # none twice, none missing
        tab.page.close()
        assert [text for text in tab.complaints if "ERR_INTERNET" not in text] == []


@needs("chromium")
def test_a_soft_refusal_is_not_counted_as_a_resumption(shared: BrowserContext, tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_MAX_STREAMS": "1", "SSEAPP_RETRY_MS": "50"}) as server:
        with relay(server.port) as line:
            tab = Tab(shared, line.url)
            wait_until(lambda: "/tasks/stream ended" in server.log())  # the page's own, which has the only place
            with server.client.stream("GET", "/topics/full") as full:
                assert full.status_code == 200
                chunks = full.iter_bytes()  # kept: it closes the answer with itself
                next(chunks)
                view = tab.start("Topics", "Topic", name="news")
                line.wait_streams(4)
            view.get_by_text("Events", exact=True).click()
            expect(view.locator(".raw li")).to_have_count(1)  # its `init`: it has been let in
            assert view.locator(".resumed").inner_text() == ""
            line.cut()
            wait_until(lambda: server.client.post("/topics/news", json="back").json()["subscribers"])
            expect(view.locator(".notes li").last).to_contain_text("back")
            expect(view.locator(".resumed")).to_have_text(re.compile("resumed 1"))
            tab.page.close()
            assert tab.complaints == []


@needs("chromium")
def test_a_finished_run_is_opened_again_and_deleted(tab: Tab) -> None:
    view = tab.start("Chat", "Conversation", content="once more")
    ends(view)
    run = run_of(view)
    view.get_by_role("button", name="Close Conversation").click()
    item = tab.run_in_list(run)
    expect(item.locator(".badge")).to_have_text("completed")
    item.get_by_role("link").click()
    ends(tab.views.first)
    assert text_of(tab.views.first) == "This is a mock response to: once more"
    item.get_by_role("button", name="Delete").click()
    expect(item).to_have_count(0)


@needs("chromium")
def test_a_run_is_cancelled_from_the_list(tab: Tab) -> None:
    view = tab.start("Jobs", "Job", steps="600", interval="1")
    expect(view.locator(".bar")).to_be_visible()
    tab.run_in_list(run_of(view)).get_by_role("button", name="Cancel").click()
    ends(view, "cancelled")
    expect(view.locator(".remark")).to_have_text("Cancelled.")
    expect(tab.run_in_list(run_of(view)).locator(".badge")).to_have_text("cancelled")


@needs("chromium")
def test_a_paused_view_goes_on_where_it_was(tab: Tab, server: Server) -> None:
    view = tab.start("Jobs", "Job", steps="600", interval="0.05")
    steps = view.locator(".log span")
    view.locator(".log li").nth(2).wait_for()
    view.get_by_role("button", name="Pause").click()
    becomes(view, "paused")
    run, seen = run_of(view), steps.count()
    wait_until(lambda: server.client.get(f"/runs/{run}").json()["events"] > seen + 10)
    assert steps.count() < seen + 10
    view.get_by_role("button", name="Resume").click()
    steps.nth(seen + 10).wait_for()
    # Those that came while it was paused are there, each once.
    assert steps.all_inner_texts()[1 : seen + 10] == [f"step {n} of 600" for n in range(1, seen + 10)]
    cancel(view)


@needs("chromium")
def test_four_streams_are_open_at_once_and_a_fifth_takes_the_oldest_ones_place(
    shared: BrowserContext, tab: Tab, server: Server
) -> None:
    views = [tab.start("Topics", "Topic", name=f"topic{number}") for number in range(4)]
    for view in views:
        becomes(view, "open")
    expect(tab.page.locator("#connections")).to_have_text("4 of 4 connections")
    # Another tab shares the four; with none of its own to park, it waits.
    other = Tab(shared, server.url)
    waiting = other.start("Topics", "Topic", name="topic5")
    becomes(waiting, "waiting")
    expect(waiting.locator(".remark")).to_contain_text("at most 4 streams")
    tab.page.bring_to_front()  # behind another one it draws once a second
    newest = tab.start("Topics", "Topic", name="topic4")
    becomes(newest, "open")
    becomes(views[0], "waiting")
    for view in (newest, views[1], views[2]):
        view.get_by_role("button", name="Pause").click()
    becomes(views[0], "open")
    becomes(waiting, "open")
    other.page.close()


@needs("chromium")
def test_what_a_stream_says_is_only_ever_text(tab: Tab, server: Server) -> None:
    chat = tab.start("Chat", "One prompt", prompt=HOSTILE)
    ends(chat)
    assert HOSTILE in text_of(chat)
    topic = tab.start("Topics", "Topic", name="<b>hostile")
    becomes(topic, "open")
    for said in ({"title": HOSTILE, "text": HOSTILE, HOSTILE: HOSTILE}, HOSTILE, [HOSTILE], {"href": "javascript:1"}):
        server.client.post("/topics/%3Cb%3Ehostile", json=said)
    expect(topic.locator(".notes li")).to_have_count(4)
    topic.get_by_text("Events", exact=True).click()
    expect(topic.locator(".raw li")).to_have_count(5)
    row = f'title,description\n"{HOSTILE.replace(chr(34), chr(34) * 2)}",x\n'
    server.client.post("/tasks/import", content=row, headers={"content-type": "text/csv"})
    ends(tab.start("Tasks", "List"))
    expect(tab.page.get_by_role("cell", name=HOSTILE)).to_be_visible()
    # And nothing could parse it: the browser refuses, and says so on the console.
    refused = tab.page.evaluate("try { document.body.innerHTML = '<i></i>' } catch (error) { error.name }")
    assert refused == "TypeError"
    assert len(tab.complaints) == 1 and "TrustedHTML" in tab.complaints.pop()
    assert tab.page.evaluate("window.hurt") is None
    assert tab.page.locator("main :is(img, script, b > b)").count() == 0


@needs("chromium")
def test_a_stream_is_started_and_closed_by_the_keyboard_alone(tab: Tab) -> None:
    keys = tab.page.keyboard
    tab.page.locator(".subject input").first.focus()
    keys.press("ArrowRight")  # Chat
    keys.press("Tab")
    keys.press("ArrowDown")  # Conversation
    keys.press("Tab")
    keys.press("Tab")
    expect(tab.page.locator("#field-content")).to_be_focused()
    keys.press("ControlOrMeta+A")
    keys.type("keys")
    keys.press("Tab")
    keys.press("Enter")
    ends(tab.views)
    assert text_of(tab.views) == "This is a mock response to: keys"
    outline = tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    while tab.page.evaluate("document.activeElement.className") != "quiet close":
        keys.press("Tab")
    keys.press("Enter")
    expect(tab.views).to_have_count(0)


@needs("chromium")
def test_where_nobodys_runs_are_listed_the_page_lists_its_own(shared: BrowserContext, tmp_path: Path) -> None:
    with serve(tmp_path, env={"SSEAPP_AUTH": "off", "SSEAPP_MOCK_DELAY_S": "0"}) as server:
        assert server.client.get("/runs").status_code == 403
        tab = Tab(shared, server.url)
        view = tab.start("Chat", "One prompt", prompt="mine")
        ends(view)
        run = run_of(view)
        expect(tab.run_in_list(run).locator(".badge")).to_have_text("completed")
        tab.page.reload()
        expect(tab.run_in_list(run)).to_be_visible()
        tab.page.close()
        assert tab.complaints == []


@needs("chromium")
def test_a_models_reasoning_is_shown_apart_from_its_answer(shared: BrowserContext, tmp_path: Path) -> None:
    def script(call: Call) -> None:
        call.head()
        call.send(FIRST, *(chunk({"reasoning": text}) for text in ("1", "2")), token("Hi"), STOP, USAGE, DONE)
        call.end()

    streams = [
        ("Chat", "One prompt"),
        ("Chat", "Conversation"),
        ("Agent", "Steps and answer"),
        ("Agent", "Conversation"),
    ]
    with serve_upstream() as upstream, serve(tmp_path, env={"OPENAI_BASE_URL": upstream.url}) as server:
        upstream.plan(*[script] * len(streams))
        tab = Tab(shared, server.url)
        for subject, stream in streams:
            view = tab.start(subject, stream)
            ends(view)
            for part, text in {"reasoning": "12", "text": "Hi", "facts": "total tokens3"}.items():
                expect(view.locator(f"[data-part={part}]"), f"{stream}: {part}").to_have_text(text)
            view.get_by_role("button", name=f"Close {stream}").click()
        tab.page.close()
        assert tab.complaints == []


@needs("chromium")
def test_a_service_that_restarts_is_found_again(shared: BrowserContext, tmp_path: Path) -> None:
    """A topic is read on when the service is back: the page asks again where the browser has given up."""
    port = str(free_port())
    with serve(tmp_path, "--port", port, env={"SSEAPP_DRAIN_S": "0", "SSEAPP_RETRY_MS": "100"}) as server:
        tab = Tab(shared, server.url)
        view = tab.start("Topics", "Topic", name="news")
        becomes(view, "open")
    becomes(view, "reconnecting")
    with serve(tmp_path, "--port", port) as server:
        becomes(view, "open")
        wait_until(lambda: server.client.post("/topics/news", json="back").json()["subscribers"])
        expect(view.locator(".notes li")).to_contain_text("back")
        tab.page.close()


@needs("chromium")
def test_what_a_token_may_not_is_said_where_it_was_tried(shared: BrowserContext, tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens", "ann", may=["subscribe:topics/news"])
    with serve(tmp_path / "data", env={"SSEAPP_TOKENS_FILE": str(tmp_path / "tokens")}) as server:
        tab = Tab(shared, server.url)
        tab.sign_in(token)
        tab.choose("Topics", "Topic")
        tab.fill(name="orders")
        tab.page.get_by_role("button", name="Start").click()
        expect(tab.page.get_by_text("subscribe:topics/orders").first).to_be_visible()
        view = tab.start("Topics", "Topic", name="news")
        becomes(view, "open")
        view.get_by_label("Text or JSON to publish").fill("hi")
        view.get_by_role("button", name="Publish").click()
        expect(view.get_by_role("alert")).to_contain_text("publish:topics/news")
        becomes(view, "open")
        tab.page.get_by_role("button", name="Sign out").click()
        tab.page.close()
        assert tab.complaints == []


@needs("chromium")
def test_signing_in_and_out(shared: BrowserContext, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    ann, bob = add_token(path, "ann"), add_token(path, "bob")
    with serve(tmp_path / "data", env={"SSEAPP_TOKENS_FILE": str(path), "SSEAPP_MOCK_DELAY_S": "0"}) as server:
        tab = Tab(shared, server.url)
        who, alert = tab.page.locator("#who"), tab.page.locator("#door").get_by_role("alert")
        for wrong, why in ((f"{ann}x", "unknown token"), ("\u20ac", "this is not a token")):
            tab.sign_in(wrong)
            expect(alert).to_contain_text(why)
        tab.sign_in(ann)
        expect(who).to_contain_text("Signed in as ann")
        view = tab.start("Chat", "One prompt", prompt="for ann only")
        ends(view)
        view.get_by_text("Code", exact=True).click()
        expect(view.locator(".code pre").first).to_contain_text('-H "authorization: Bearer $TOKEN"')
        assert ann not in tab.page.content()
        tab.page.reload()
        expect(who).to_contain_text("Signed in as ann")
        ends(tab.views.first)
        tab.page.get_by_role("button", name="Sign out").click()
        expect(tab.page.locator("#token")).to_be_focused()
        expect(tab.views).to_have_count(0)
        expect(tab.page.locator(".runs li")).to_have_count(0)
        assert not tab.page.get_by_text("for ann only").count()
        tab.sign_in(bob)
        expect(who).to_contain_text("Signed in as bob")
        expect(tab.page.locator("#runs .hint")).to_have_text(re.compile("No runs yet"))
        tab.page.evaluate(
            "(token) => fetch('/session', {method: 'POST', headers: {authorization: `Bearer ${token}`}})", ann
        )
        tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # as from another tab
        expect(who).to_contain_text("Signed in as ann")
        expect(tab.page.locator(".runs li")).to_have_count(1)
        revoke_tokens(path, "ann")
        tab.page.get_by_role("button", name="Start").click()
        expect(alert).to_contain_text("You are signed out")
        expect(who).to_contain_text("Signed out")
        tab.page.close()
        assert tab.complaints == []
