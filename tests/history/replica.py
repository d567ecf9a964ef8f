"""The server of a scenario as a process that is stopped and started again on the same port and log."""

import asyncio
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from benchmarks.process import ROOT, pin_server
from tests.history import History
from tests.history.client import free_port, listening

__all__ = ["Replica"]

#: How long a killed server's runs stay open, where the log is shared. Calls wait for Redis for half of it: on a busy
#: machine it may not answer for a second.
LEASE_S: Final = 4.0
#: From a signal to the server's end, on a machine that is busy: it may be starting.
STOP_S: Final = 20.0


class Replica:
    """Its output is checked when it is stopped for good."""

    def __init__(
        self, folder: str, history: History, log: str, lease_s: float = LEASE_S, *, pinned: bool = True
    ) -> None:
        self.port = free_port()
        self._pin = pin_server if pinned else None
        self._history = history
        self._output = Path(folder, f"output {self.port}")
        self._arguments = [folder, str(self.port), log, str(lease_s)]
        self._wanted = False
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        async with self._lock:
            await self._start()

    async def revive(self) -> None:
        """Start it again if it ended by itself, as it does where there is no log at its start."""
        async with self._lock:
            if self._wanted and self._process.returncode is not None:
                await self._start()

    async def _start(self) -> None:
        self._wanted = True
        command = [sys.executable, "-m", "tests.history.app", *self._arguments]
        with self._output.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, stdout=output, stderr=output, preexec_fn=self._pin
            )

    async def listening(self) -> None:
        await listening(self.port)

    def send(self, what: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(what)

    async def stop(self, by: signal.Signals) -> None:
        async with self._lock:
            await self._stop(by)

    async def _stop(self, by: signal.Signals) -> None:
        self._wanted = False
        if self._process.returncode is None:
            self._process.send_signal(by)
        try:
            code = await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            self._history.faults.append(f"the server goes on after {by.name}")
            self.send(signal.SIGKILL)
            code = await self._process.wait()
        # SIGTERM that comes before Python has begun ends it the system's way.
        expected = {-by, 0 if by is signal.SIGTERM else -by, 3 if self._history.log_goes else -by}
        if code not in expected:
            self._history.faults.append(f"the server ended with {code} on {by.name}")

    async def stop_for_good(self, *expected: str) -> None:
        """`expected`: what it may well have complained about."""
        await self.stop(signal.SIGTERM)
        for entry in re.split(r"(?m)^(?=[A-Z]{4,} )", self._output.read_text(errors="replace")):
            bad = entry.startswith(("ERROR", "CRITICAL")) or "Traceback" in entry
            if bad and not any(text in entry for text in ("a planned failure", *expected)):
                self._history.faults.append(f"the server said: {entry.strip()}")
