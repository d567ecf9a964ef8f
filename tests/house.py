"""What tests of the engine share: virtual time, and a handler that does as it is told.

    @pytest.fixture
    def anyio_backend() -> Backend:
        return in_virtual_time()        # or in_virtual_time("trio")

`conftest.py` has the fixtures `anyio_backend`, which is asyncio in real time, and `parked`. The clients of an app in
the same process are in clients.py.
"""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import current_time
from trio.testing import MockClock

from ssecore.http.request import EndReason, Request
from ssecore.testing import VirtualClockLoop
from ssecore.wire import Event

__all__ = ["Backend", "Work", "in_virtual_time", "remount", "settle", "virtual_time"]

Backend = tuple[str, dict[str, Any]]


def in_virtual_time(name: str = "asyncio") -> Backend:
    """A backend with a clock of its own: no test waits, and each moment is exact."""
    if name == "trio":
        return name, {"clock": MockClock(autojump_threshold=0)}
    return name, {"loop_factory": VirtualClockLoop}


#: For a single test in which time passes.
virtual_time = pytest.mark.parametrize("anyio_backend", [in_virtual_time()], ids=["virtual"])


async def settle() -> None:
    """In virtual time: let everybody work until all wait for something. The clock stays, to a microsecond."""
    await anyio.sleep(1e-6)


def remount(disk: Path, way: str) -> None:
    """The fixture `small_disk`: read-only with `ro`, writable again with `rw`."""
    subprocess.run(["mount", "-o", f"remount,{way}", str(disk)], check=True)


class Work:
    """A handler that does what the test says, when it says so: gives an event, raises, or ends (`None`)."""

    def __init__(self, *orders: Event | Exception | None) -> None:
        self.started = 0
        self.reasons: list[EndReason] = []  #: what each knew in its `finally`
        self.ended_at: list[float] = []
        self._orders, self._to_do = anyio.create_memory_object_stream[Event | Exception | None](1000)
        self.say(*orders)

    def say(self, *orders: Event | Exception | None) -> None:
        for order in orders:
            self._orders.send_nowait(order)

    def close(self) -> None:
        self._orders.close()
        self._to_do.close()

    async def handler(self, request: Request) -> AsyncIterator[Event]:
        self.started += 1
        try:
            async for order in self._to_do:
                if order is None:
                    return
                if isinstance(order, Exception):
                    raise order
                yield order
        finally:
            self.reasons.append(request.end_reason)
            self.ended_at.append(current_time())
