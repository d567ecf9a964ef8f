"""The client: read streams of any server, reconnecting as needed; write them to a file."""

from ssecore.client.files import json_line, to_file
from ssecore.client.source import (
    Broken,
    GapError,
    GaveUp,
    Refused,
    Source,
    SourceError,
    batches,
    connect,
    is_gap,
    json_object,
)

__all__ = [
    "Broken",
    "GapError",
    "GaveUp",
    "Refused",
    "Source",
    "SourceError",
    "batches",
    "connect",
    "is_gap",
    "json_line",
    "json_object",
    "to_file",
]
