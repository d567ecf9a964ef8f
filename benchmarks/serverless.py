"""The floor: the service's own generator and `encode` with no server at all, in a process of its own.

`python -m benchmarks.serverless COUNT` prints the CPU time an event, in µs.
"""

import asyncio
import sys
import time
from typing import Any

from handlers.basics import Counted, counter
from ssecore.request import Request
from ssecore.wire import encode


async def cpu_us(count: int) -> float:
    async def receive() -> dict[str, Any]:
        raise AssertionError("nobody asks for a body here")

    request = Request({"type": "http", "method": "GET", "path": "/stream", "headers": []}, receive)
    request.query = Counted(interval=0, count=count)
    begin = time.process_time_ns()
    async for event in counter(request):
        encode(event)
    return (time.process_time_ns() - begin) / 1000 / (count + 1)


if __name__ == "__main__":
    asyncio.run(cpu_us(1000))  # warm, as the servers are
    print(asyncio.run(cpu_us(int(sys.argv[1]))))
