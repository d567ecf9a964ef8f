"""What all of them send."""

import time
from typing import Any

__all__ = ["tick", "update"]


def update(n: int, pad: int) -> dict[str, Any]:
    """About 60 bytes as an event, and `pad` more."""
    message = f"Update {n}"
    return {"count": n, "message": message.ljust(pad + len(message), ".") if pad else message}


def tick() -> dict[str, int]:
    """The moment it was made in, on a clock that all processes of this machine share."""
    return {"sent": time.monotonic_ns()}
