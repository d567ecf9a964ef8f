"""What the pages of docs/ say to type is typed here, and what they show is what comes."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from playwright.sync_api import Browser

from handlers import ROUTES
from ssecore.client import SourceError
from ssecore.errors import ClientGone, SSEAppError
from ssecore.http.guard import Guard
from ssecore.http.openapi import OpenAPI
from ssecore.runs import ROUTES as RUN_ROUTES
from ssecore.settings import Settings
from tests import chromium, serving
from tests.needs import needs
from tests.pages import Page, blocks, same
from tests.serving import Server

browser, server = chromium.browser, serving.server

ROOT: Final = Path(__file__).parent.parent
DOCS: Final = ROOT / "docs"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """An empty folder with the wheel in it, after the quick start's `pip install`."""
    folder = tmp_path_factory.mktemp("stranger")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    # The versions that the locks have, so that tomorrow's don't decide about today's test.
    known = {dist.metadata["Name"]: dist.version for dist in distributions() if dist.metadata["Name"] != "sseapp"}
    (folder / "known.txt").write_text("".join(f"{name}=={version}\n" for name, version in known.items()))
    environ = {"PIP_CONSTRAINT": "known.txt", "PIP_NO_COMPILE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with Page(folder, Path(sys.executable).parent, **environ) as page:
        yield page


@needs("curl")
def test_a_stranger_comes_from_an_empty_folder_to_a_stream_that_resumes(stranger: Page) -> None:
    for block in blocks(DOCS / "quickstart.md"):
        stranger.perform(block)
    shown = stranger.folder / ".venv" / "bin" / "python"
    found = subprocess.run([shown, "-I", "-c", "import sseapp; print(sseapp.__file__)"], capture_output=True, text=True)
    assert found.stdout.startswith(str(stranger.folder)), "it was the checkout's"


@needs("chromium")
def test_the_quick_starts_page_counts_down(stranger: Page, browser: Browser) -> None:
    [script] = [block.text for block in blocks(DOCS / "quickstart.md") if block.language == "js"]
    assert in_page(browser, stranger.port, script) == "3 2 1 "


@needs("chromium")
def test_the_clients_page_reads_a_chat(server: Server, browser: Browser) -> None:
    [script] = [block.text for block in blocks(DOCS / "clients.md") if block.language == "js"]
    assert in_page(browser, server.port, script) == "This is a mock response to: hi"


def in_page(browser: Browser, port: int, script: str) -> str:
    """What `output` holds when the script's `source` is closed."""
    page = browser.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(f"http://127.0.0.1:{port}/nothing")
    page.evaluate("window.output = document.body.appendChild(document.createElement('output'))")
    page.evaluate(f"{script}; window.source = source; 0")
    page.wait_for_function("window.source.readyState === EventSource.CLOSED")
    told = page.text_content("output") or ""
    page.close()
    assert not failures
    return told


@needs("curl")
@pytest.mark.parametrize("name", [path.name for path in sorted(DOCS.glob("*.md")) if path.name != "quickstart.md"])
def test_each_snippet_of_a_page_does_what_it_says(name: str, tmp_path: Path) -> None:
    environ = {"PYTHONPATH": str(ROOT), "SSEAPP_MOCK_DELAY_S": "0.001"}
    with Page(tmp_path, Path(sys.executable).parent, **environ) as page:
        for block in blocks(DOCS / name):
            page.perform(block)


def test_every_block_of_a_page_has_a_language() -> None:
    """Without one nobody would run it."""
    for path in DOCS.glob("*.md"):
        fences = re.findall(r"^```(\w*)$", path.read_text(), re.MULTILINE)
        assert all(fences[::2]) and not any(fences[1::2]), path.name
        assert {*fences[::2]} <= {"python", "sh", "text", "js", "drawing"}, path.name


def test_the_protocol_has_every_status_and_code() -> None:
    def kinds(of: type[SSEAppError]) -> set[type[SSEAppError]]:
        return {of}.union(*map(kinds, of.__subclasses__()))

    assert ROUTES, "the handlers' own errors count as well"
    page = (DOCS / "protocol.md").read_text()
    ours = {kind for kind in kinds(SSEAppError) if kind.__module__.startswith(("ssecore", "handlers"))}
    # Not of the client's, nor ever sent: a client that has left, and what `ssecore.client` raises.
    missing = [k for k in ours if k is not ClientGone and not issubclass(k, SourceError) and f"`{k.code}`" not in page]
    assert not missing
    in_events = {"interrupted", "timeout"}
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    for kind in ours - {ClientGone}:
        if not issubclass(kind, SourceError) and kind.code not in in_events:
            assert any(str(kind.status) in row and f"`{kind.code}`" in row for row in rows), kind


def test_every_route_is_there_with_its_parameters() -> None:
    page = (DOCS / "routes.md").read_text()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    with_tokens = Guard(Settings(tokens_file=Path("tokens"))).routes
    document = OpenAPI([], Guard(Settings())).route
    for route in (*ROUTES, *RUN_ROUTES, *with_tokens, document):
        name = f"{route.method} {re.sub(':(int|path)', '', route.path)}"
        row = rows.pop(name)
        fields: Any = msgspec.inspect.type_info(route.query) if route.query else None
        for field in fields.fields if fields else ():
            assert f"`{field.encode_name}`" in row, row
        assert (" R |" in row) == (route.run is not None), row
    assert not rows


def test_links_lead_somewhere() -> None:
    for path in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_what_is_shown_may_leave_out_but_not_differ() -> None:
    assert same("a … c\n", "a b c\n") and same("a\n…\nb", "a\nx\ny\nb\n")
    assert not same("a", "ab") and not same("a … c", "a b d")
