"""The connection under uvicorn's `send`: a chunk is written to it without a message, a coroutine and a framing of its
own for each reader. All that this project knows of uvicorn's insides stands here.

What uvicorn's `send` (httptools) does with a part of a body: it waits while `flow.write_paused`; returns where the
client is gone (`disconnected`); frames the part as a chunk; calls `transport.write`, which hands it to the kernel at
once and buffers what doesn't fit. For a broadcast the chunk is the same for all readers, and so is made once.

Rules:

1.  Only after the answer's start and before its last part, and only where it is chunked: `connection_of` looks.
    (uvicorn chunks for a client of HTTP/1.0 as well: what is written here is what it would have written.)
2.  Only while neither `flow.write_paused` nor `disconnected`; else through `send`, which waits, or does nothing.
3.  Only where nobody stands between: the `send` is the connection's own. A middleware that wraps it gets each message.
4.  Only with a uvicorn that has been looked at. With any other, delivery goes through `send`: dearer, and right.
5.  One task at a time, and no `send` in flight: whoever writes here is the connection's only sender.
"""

from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

__all__ = ["Connection", "chunk", "connection_of"]

#: Rule 4. `tests/test_connection.py` holds what is written here against what these send.
KNOWN: Final = ("0.54.",)

#: What is used of it: `flow.write_paused`, `disconnected`, `transport.write`.
Connection = RequestResponseCycle


def connection_of(send: Any) -> Connection | None:
    """What is under this `send`, if it may be written to (rules 1, 3 and 4)."""
    cycle = getattr(send, "__self__", None)
    if type(cycle) is not RequestResponseCycle or not uvicorn.__version__.startswith(KNOWN):
        return None
    if not cycle.response_started or cycle.response_complete:
        return None
    return cycle if cycle.chunked_encoding and cycle.scope["method"] != "HEAD" else None


def chunk(body: bytes) -> bytes:
    """A part of a body as it goes over the wire. Never of no bytes: that would be the last one."""
    return b"%x\r\n%b\r\n" % (len(body), body)
