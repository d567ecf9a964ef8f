"""Limits the rate of publications."""

import math
from typing import Final

from anyio import current_time

from ssecore.errors import TooManyRequests

__all__ = ["PublishRate"]

#: Beyond it, callers with a full bucket are dropped.
MAX_CALLERS: Final = 10_000


class PublishRate:
    """Token buckets: for each caller when it is full again."""

    def __init__(self, per_s: float | None) -> None:
        self._per_s = per_s
        self._full_at: dict[str, float] = {}

    def spend(self, caller: str | None) -> None:
        """Count one publication. Raises `TooManyRequests`."""
        per_s = self._per_s
        if per_s is None or caller is None:
            return
        now = current_time()
        full_at = max(self._full_at.get(caller, now), now)
        wait_s = full_at + 1 / per_s - now - max(1.0, 1 / per_s)
        if wait_s > 0:
            detail = f"more than {per_s:g} publications a second; try again"
            raise TooManyRequests(detail, retry_after_s=math.ceil(wait_s))
        if len(self._full_at) >= MAX_CALLERS:
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        self._full_at[caller] = full_at + 1 / per_s
