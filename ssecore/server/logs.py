"""Logging of the process: lines on standard error, as text or as JSON."""

import logging
from datetime import UTC, datetime
from typing import Literal

from ssecore.server import stderr
from ssecore.wire import encode_json

__all__ = ["set_up"]


class _DropTruncated(logging.Filter):
    """Drops uvicorn's error for a stream that ended because its client stopped reading."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "without completing response" not in record.getMessage()


class _JSONLines(logging.Formatter):
    """One object a line; a stream's end has a member for each fact."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "stream", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return encode_json(line).decode()


def set_up(log_format: Literal["text", "json"]) -> None:
    """Log to a standard error that never blocks, unless the app has configured logging."""
    stderr.unblock()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_JSONLines())
    for name, level in (("uvicorn.error", logging.WARNING), ("httpx", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("uvicorn.error").addFilter(_DropTruncated())
