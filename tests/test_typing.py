"""A program that uses the installed wheel is type-checked: each wrong argument, and nothing else, is an error."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Final
from zipfile import ZipFile

import pytest

from tests.needs import find, needs
from tests.test_house import installed, wheel

__all__ = ["wheel"]

#: A line with an error ends with `# wrong`.
PROGRAM: Final = """
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from fastapi import FastAPI

from sseapp import GET, JSON, PATCH, POST, Event, EventStream, Request, Response, Run, Settings, SSEApp, from_thread
from ssecore.client import connect


class Pace(msgspec.Struct):
    interval: float = 1.0


async def countdown(request: Request, seconds: int) -> AsyncIterator[Event]:
    for remaining in range(seconds, 0, -1):
        yield Event({"remaining": remaining}, event="countdown")


async def publish(request: Request) -> Response:
    cursor = await request.topics.publish("news", Event(request.body, event="news"))
    state = await request.runs.state("run", caller=request.caller)
    agent = request.headers.get("User-Agent", "").lower() + request.cookies["user"].lower()
    return JSON({"id": str(cursor), "state": state["state"], "agent": agent}, status=202)


streams = SSEApp(
    [
        GET("/countdown/{seconds:int}", countdown, query=Pace, run=Run(linger_s=60)),
        POST("/news", publish, body=dict[str, str], may="publish:news"),
        PATCH("/news", publish, body=list[Pace], open=True),
    ],
    Settings(log="memory", heartbeat_s=5),
    caller=lambda request: request.headers.get("x-user"),
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with streams.running():
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/streams", streams)


async def read() -> list[str]:
    async with connect("https://example.org/streams/countdown/3") as source:
        return [event.event or "message" async for event in source]


def plain(request: Request) -> Response:
    return JSON(1)


GET("/a", countdown, run=60)  # wrong
GET("/a", countdown, quary=Pace)  # wrong
GET("/a", plain)  # wrong
Event("x", event=5)  # wrong
Event("x", name="y")  # wrong
Settings(port="8000")  # wrong
Settings(prot=8000)  # wrong
SSEApp([countdown])  # wrong
SSEApp([], caller=lambda request: 7)  # wrong
Run(linger=5)  # wrong
EventStream(streams, countdown)  # wrong
EventStream(streams, "a-run", caller=7)  # wrong
EventStream(app, "a-run")  # wrong
JSON(1, status="ok")  # wrong


async def wrong(request: Request) -> None:
    await request.topics.publish("news", "text")  # wrong
    request.runs.begin()  # wrong
    await streams.runs.start(countdown(request, 3))  # wrong
    await streams.runs.wait("a-run")  # wrong
    request.metrics.nothing  # wrong
    request.headers.get(5)  # wrong
    from_thread(3)  # wrong
"""
WRONG: Final = {number for number, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")}


FILES: Final = ("program.py", "hosted.py")

#: With what it imports, as far as that is not ours as well.
FASTAPI: Final = (
    *("annotated-doc", "annotated-types", "fastapi", "opentelemetry-api", "pydantic", "pydantic_core", "starlette"),
    "typing-inspection",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, wheel: ZipFile) -> Path:
    """A program, and an environment with the wheel beside it."""
    folder = tmp_path_factory.mktemp("typing")
    installed(wheel, folder / ".venv", *FASTAPI)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "hosted.py").write_text(hosted_program())
    return folder


def hosted_program() -> str:
    """The program of docs/frameworks.md whose own routes return streams."""
    page = (Path(__file__).parent.parent / "docs" / "frameworks.md").read_text()
    return page.partition("# with_depends.py\n")[2].partition("```")[0]


@needs("time")
def test_mypy_knows_the_types(folder: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", ".venv/bin/python", *FILES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "hosted.py" not in done.stdout, done.stdout
    assert {int(line) for line in re.findall(r"^program\.py:(\d+): error", done.stdout, re.MULTILINE)} == WRONG, (
        done.stdout + done.stderr
    )


@needs("pyright")
def test_pyright_knows_the_types(folder: Path) -> None:
    command = ["node", find("pyright"), "--outputjson", "--pythonpath", ".venv/bin/python", *FILES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert not [one for one in found if one["file"].endswith("hosted.py")], done.stdout
    lines = {one["range"]["start"]["line"] + 1 for one in found if one["severity"] == "error"}
    assert lines == WRONG, done.stdout + done.stderr
