"""Somebody's agent, which knows nothing of streams, takes a callback: here it tells a browser what it is doing.

    uvicorn --factory examples.status_callback:make
    curl -N 'localhost:8000/ask?question=why'

The callback never waits and holds at most `LIMIT` statuses: an agent that talks faster than its reader reads doesn't
fill the memory. What was left out is counted in the result.
"""

from collections.abc import AsyncIterator, Callable

import anyio
import msgspec

from sseapp import GET, Event, Request, SSEApp, merge

LIMIT = 100


class Agent:
    """Not ours: stands for any library with a callback."""

    async def answer(self, question: str, on_status: Callable[[str], None]) -> str:
        for step in ("reading", "thinking", "writing"):
            on_status(step)
            await anyio.sleep(0.01)
        for number in range(1000):
            on_status(f"detail {number}")  # without a pause
        return question[::-1]


class Question(msgspec.Struct):
    question: str


async def ask(request: Request) -> AsyncIterator[Event]:
    to_us, events = anyio.create_memory_object_stream[Event](LIMIT)
    left_out, none = 0, tuple[Event, ...]()  # the agent says all by the callback

    def on_status(text: str) -> None:
        nonlocal left_out
        try:
            to_us.send_nowait(Event({"status": text}, "status"))
        except anyio.WouldBlock:
            left_out += 1

    async def work() -> AsyncIterator[Event]:
        with to_us:
            answer = await Agent().answer(request.query.question, on_status)
            await to_us.send(Event({"answer": answer, "left_out": left_out}, "result"))
        for event in none:
            yield event

    async with merge(work(), events) as items:
        async for item in items:
            yield item


def make() -> SSEApp:
    return SSEApp([GET("/ask", ask, query=Question)])
