"""An agent that reports its status by a callback, as a stream.

    uvicorn --factory examples.status_callback:make
    curl -N 'localhost:8000/ask?question=why'

The callback never waits, and a limited number of statuses is buffered, so an agent that reports faster than its client
reads doesn't fill the memory. The result has the number of statuses that were dropped.
"""

from collections.abc import AsyncIterator, Callable

import anyio
import msgspec

from sseapp import GET, Event, Request, SSEApp, from_task
from ssecore.streaming.progress import TaskReport


class Agent:
    """Stands for any library with a callback."""

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
    await report(Event({"answer": answer, "left_out": left_out}, "result"))  # waits for room, so it isn't dropped


async def ask(request: Request) -> AsyncIterator[Event]:
    async with from_task(work, request.query.question) as events:
        async for event in events:
            yield event


def make() -> SSEApp:
    return SSEApp([GET("/ask", ask, query=Question)])
