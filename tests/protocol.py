"""uvicorn's own protocol over a transport that only notes what is written: its inside, without a socket."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from ssecore.server.protocol import BoundedProtocol

__all__ = ["Wire", "connected"]


class Wire(asyncio.Transport):
    """What came over it stands in `written`, a write each."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closing = False
        self.reading = True
        self.protocol: Any = None  #: as the transport knows it

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    @property
    def body(self) -> bytes:
        """The body as it was framed, without the head."""
        return b"".join(self.written).partition(b"\r\n\r\n")[2]


@contextmanager
def connected(app: Any, request: bytes) -> Iterator[tuple[BoundedProtocol, Wire]]:
    """One connection to the app, and this request on it. The client leaves with the block."""
    config = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    config.loaded_app = app  # without uvicorn's own wrappers, as our runner has it
    protocol, wire = BoundedProtocol(config, ServerState(), {}), Wire()
    wire.set_protocol(protocol)
    protocol.connection_made(wire)
    protocol.data_received(request)
    try:
        yield protocol, wire
    finally:
        wire.protocol.connection_lost(None)
        wire.protocol = None
