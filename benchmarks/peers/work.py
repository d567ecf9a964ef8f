"""What all of them send."""

import random
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["pauses", "tick", "update"]


def update(n: int, pad: int) -> dict[str, Any]:
    """About 60 bytes as an event, and `pad` more."""
    message = f"Update {n}"
    return {"count": n, "message": message.ljust(pad + len(message), ".") if pad else message}


def tick() -> dict[str, int]:
    """The moment it was made in, on a clock that all processes of this machine share."""
    return {"sent": time.monotonic_ns()}


def pauses(interval: float) -> Iterator[float]:
    """Between the ticks of one stream. The first is any part of one, so that many streams don't tick together."""
    yield interval * random.random()
    while True:
        yield interval
