"""Runs what a page of docs/ says to type, in its order and in one folder.

- ```python, first line `# name.py`: that file is written; without a name the block is a program, and run.
- ```sh: a script. `uvicorn …` and `sseapp serve` alone on a line start a server that ends with the
  page, on a free port; `localhost:8000` is that port from the start.
- ```text: what the last script printed; `…` stands for anything.
- ```js is left to the test, in a browser.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import httpx

from tests.serving import free_port

__all__ = ["Block", "Page", "blocks", "same"]

LIMIT_S: Final = 100
PLACE: Final = "localhost:8000"


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def same(shown: str, printed: str) -> bool:
    pattern = ".*?".join(map(re.escape, shown.rstrip("\n").split("…")))
    return re.fullmatch(pattern, printed.replace("\r\n", "\n").rstrip("\n"), re.DOTALL) is not None


class Page:
    """`bin_dir` is where `python` and the rest are found first. Ends what it has started with its `with` block."""

    def __init__(self, folder: Path, bin_dir: Path, **environ: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.printed = ""
        if not (bin_dir / "sseapp").exists():  # not installed: out of the checkout
            (folder / "sseapp").write_text(f'#!/bin/sh\nexec {sys.executable} -m sseapp "$@"\n')
            (folder / "sseapp").chmod(0o755)
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        path = os.pathsep.join([str(folder), str(bin_dir), os.environ.get("PATH", os.defpath)])
        self._environ = {**kept, "PATH": path, "NO_PROXY": "*", "PYTHONUNBUFFERED": "1", **environ}
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def perform(self, block: Block) -> None:
        text = block.text.replace(PLACE, f"localhost:{self.port}")
        if block.language == "python" and (name := re.match(r"# ([\w/]+\.py)\n", text)):
            (self.folder / name[1]).write_text(text)
        elif block.language == "python":
            self._run(["python", "-c", text])
        elif block.language == "sh" and re.match(r"(\.venv/bin/)?(uvicorn|sseapp serve)\b[^\n]*\n\Z", text):
            self._start(text)
        elif block.language == "sh":
            self._run(["bash", "-euo", "pipefail", "-c", text])
        elif block.language == "text":
            assert same(text, self.printed), f"the page shows\n{text}\nbut it is\n{self.printed}"

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command, cwd=self.folder, env=self._environ, capture_output=True, text=True, timeout=LIMIT_S
        )
        self.printed = done.stdout
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"

    def _start(self, line: str) -> None:
        self._stop()
        command = [*shlex.split(line, comments=True), "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self._server = subprocess.Popen(command, cwd=self.folder, env=self._environ, stdout=log, stderr=log)
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/", trust_env=False)
                return
            except httpx.TransportError:
                said = (self.folder / "server.log").read_text()
                assert self._server.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.05)

    def _stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            try:
                self._server.wait(5)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()

    def ask(self, path: str) -> Any:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", trust_env=False)
