"""The watchers of a process."""

import logging
from collections.abc import Callable
from typing import Final

from ssecore.log.facts import Ended, Row, Watcher

__all__ = ["Watchers"]

logger: Final = logging.getLogger("sseapp")


class Watchers:
    """By stream. For one event loop."""

    def __init__(self) -> None:
        self._streams: dict[str, dict[object, Watcher]] = {}
        #: Called with a stream whose last watcher has gone.
        self.on_unwatched: Callable[[str], None] = lambda stream: None

    def add(self, stream: str, watcher: Watcher) -> Callable[[], None]:
        mark = object()
        watchers = self._streams.setdefault(stream, {})
        watchers[mark] = watcher

        def unwatch() -> None:
            watchers.pop(mark, None)
            if not watchers and self._streams.get(stream) is watchers:
                del self._streams[stream]
                self.on_unwatched(stream)

        return unwatch

    def notify(self, stream: str, row: Row | None, ended: Ended | None) -> None:
        """What one watcher raises is logged; the others are still called."""
        watchers = self._streams.get(stream)
        if watchers is None:
            return
        if ended:
            del self._streams[stream]
        for mark in list(watchers):
            watcher = watchers.get(mark)  # an earlier one may have removed it
            if watcher is None:
                continue
            try:
                watcher(row, ended)
            except Exception:
                logger.exception("a watcher of the event log failed")
        if ended and stream not in self._streams:
            self.on_unwatched(stream)
