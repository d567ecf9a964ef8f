"""The floor: the service's own generator and `encode` with no server at all, in a process of its own.

`python -m benchmarks.serverless COUNT PAD` prints the CPU time an event, in µs.
"""

import asyncio
import sys
import time
from typing import Any

from benchmarks.app import Padded, padded
from handlers.basics import Counted, counter
from ssecore.http.request import Request
from ssecore.wire import encode


async def cpu_us(count: int, pad: int) -> float:
    async def receive() -> dict[str, Any]:
        raise AssertionError("nobody asks for a body here")

    request = Request({"type": "http", "method": "GET", "path": "/stream", "headers": []}, receive)
    request.query = Padded(count, pad) if pad else Counted(interval=0, count=count)
    events = padded(request) if pad else counter(request)
    begin = time.process_time_ns()
    async for event in events:
        encode(event)
    return (time.process_time_ns() - begin) / 1000 / (count + 1)


if __name__ == "__main__":
    count, pad = map(int, sys.argv[1:])
    asyncio.run(cpu_us(1000, pad))  # warm, as the servers are
    print(asyncio.run(cpu_us(count, pad)))
