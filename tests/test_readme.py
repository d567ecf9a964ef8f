"""What the README says to type is typed here: lines for a shell in one, scripts in a browser, programs in Python."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, Final
from unittest.mock import ANY

import pytest

from ssecore.testing import assert_stream, connect
from tests.chromium import launched
from tests.needs import needs
from tests.serving import Server, serve

ROOT: Final = Path(__file__).parent.parent
README: Final = (ROOT / "README.md").read_text()
BLOCKS: Final = [match[0] for match in re.finditer(r"(?m)(?:^ {4}.*\n|^\n(?= {4}))+", README)]
LINES: Final = [line.strip() for block in BLOCKS for line in block.splitlines() if line.startswith("    curl ")]
COMMANDS: Final = [
    line for block in BLOCKS for line in block.splitlines() if re.match("    sseapp (listen|publish) ", line)
]
PROGRAMS: Final = [dedent(block) for block in BLOCKS if re.search("(?m)^    (import|from) ", block)]
SCRIPTS: Final = [block for block in BLOCKS if "new EventSource(" in block]
#: A stream that doesn't end by itself is left. (28 is curl's own word for that.)
PATIENCE_S: Final = 1
LEFT: Final = 28
SHELL: Final = (
    f'set -e; curl() {{ command curl -sS -f --noproxy "*" --max-time {PATIENCE_S} "$@" || test $? = {LEFT}; }}\n'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the files that the lines name."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "sseapp").write_text(f'#!/bin/sh\nexec {sys.executable} -m sseapp "$@"\n')
    (folder / "sseapp").chmod(0o755)
    (folder / "var" / "files").mkdir(parents=True)
    for name in re.findall(r"/download/([\w.-]+)", README):
        (folder / "var" / "files" / name).write_text("{}\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serve(folder / "var", env={"SSEAPP_MOCK_DELAY_S": "0.01"}) as server:
        yield server


@needs("curl")
@pytest.mark.parametrize("line", LINES)
def test_a_line_with_curl_does_what_it_says(line: str, server: Server, folder: Path) -> None:
    typed = line.replace("localhost:8000", server.url.removeprefix("http://"))
    if "<id>" in line:
        typed = typed.replace("<id>", server.client.get("/chat?prompt=hi").headers["run-id"])
    if "<job_id>" in line:
        typed = typed.replace("<job_id>", server.client.post("/jobs", json={"kind": "digest"}).json()["job_id"])
    done = subprocess.run(["sh", "-c", SHELL + typed], cwd=folder, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    if " -N" in line:  # a stream says something before it is left
        assert "data: " in done.stdout
    if " -O" in line:
        assert (folder / line.partition("#")[0].split()[-1].rpartition("/")[2]).stat().st_size > 0
    if "-i " in line:
        status = re.search(r"# (\d\d\d)", line)
        assert status is None or done.stdout.startswith(f"HTTP/1.1 {status[1]}")


def typed(text: str, server: Server, folder: Path) -> "subprocess.CompletedProcess[str]":
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}
    text = text.replace("localhost:8000", server.url.removeprefix("http://"))
    return subprocess.run(["sh", "-ec", text], cwd=folder, env=environ, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_line_with_sseapp_does_what_it_says(line: str, server: Server, folder: Path) -> None:
    where = f" --url {server.url}" if " publish " in line else ""
    done = typed(line + where, server, folder)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_tokens_are_made_listed_and_revoked(server: Server, folder: Path) -> None:
    [block] = [block for block in BLOCKS if "token revoke" in block]
    lines = [line for line in block.splitlines() if not re.match("    (curl|sseapp serve)", line)]
    done = typed("\n".join(lines), server, folder)
    assert done.returncode == 0 and re.search("\tann\t", done.stdout), done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_program_does_what_it_says(
    program: str, server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "SSEApp(" in program:
        monkeypatch.chdir(tmp_path)  # its log is in ./var
        found: dict[str, Any] = {}
        exec(program, found)
        async with found["app"].running(), connect(found["app"], "GET", "/countdown/1") as stream:
            await assert_stream(stream, ("countdown", {"remaining": 1}), ("complete", ANY))
    else:
        (folder / "program.py").write_text(program.replace("localhost:8000", server.url.removeprefix("http://")))
        done = typed(f"{sys.executable} program.py", server, folder)
        assert done.returncode == 0 and '{"content":"mock "}' in done.stdout, done.stdout + done.stderr


@needs("chromium")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_does_what_it_says_and_ends(script: str, server: Server) -> None:
    with launched() as browser:
        page = browser.new_page()
        failures: list[str] = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(f"{server.url}/healthz")
        page.evaluate("window.output = document.body.appendChild(document.createElement('output'))")
        page.evaluate(f"{script}; window.source = source; 0")
        page.wait_for_function("window.source.readyState === EventSource.CLOSED")
        assert page.evaluate("window.output.textContent") == "This is a mock response to: hi"
        assert not failures


def test_there_is_something_to_type() -> None:
    assert len(LINES) > 8 and SCRIPTS and len(PROGRAMS) == 2 and len(COMMANDS) == 3
