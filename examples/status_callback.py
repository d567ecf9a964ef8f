"""Somebody's agent, which knows nothing of streams, takes a callback: here it tells a browser what it is doing.

    uvicorn --factory examples.status_callback:make
    curl -N 'localhost:8000/ask?question=why'

The callback never waits, and so many statuses are held at most: an agent that talks faster than its reader reads
doesn't fill the memory. What was left out is counted in the result.
"""

from collections.abc import AsyncIterator, Callable

import anyio
import msgspec

from sseapp import GET, Event, Request, SSEApp, from_task
from ssecore.streaming.progress import TaskReport


class Agent:
    """Not ours: stands for any library with a callback."""

    async def answer(self, question: str, on_status: Callable[[str], object]) -> str:
        for step in ("reading", "thinking", "writing"):
            on_status(step)
            await anyio.sleep(0.01)
        for number in range(1000):
            on_status(f"detail {number}")  # without a pause
        return question[::-1]


class Question(msgspec.Struct):
    question: str


async def work(report: TaskReport[Event], question: str) -> None:
    answer = await Agent().answer(question, lambda text: report(Event({"status": text}, "status")))
    left_out = report.dropped
    await report(Event({"answer": answer, "left_out": left_out}, "result"))  # waits for room: it isn't left out


async def ask(request: Request) -> AsyncIterator[Event]:
    async with from_task(work, request.query.question) as events:
        async for event in events:
            yield event


def make() -> SSEApp:
    return SSEApp([GET("/ask", ask, query=Question)])
