"""A Pydantic AI agent as a run: its tools report a status by a callback, its model streams tokens.

    pip install 'pydantic-ai-slim[openai]'
    OPENAI_API_KEY=… uvicorn --factory examples.pydantic_ai_agent:make
    curl -N 'localhost:8000/ask?question=what+is+due'

`OPENAI_BASE_URL` and `OPENAI_MODEL` choose another server and model.
"""

import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import msgspec
from openai import AsyncOpenAI
from pydantic_ai import Agent, RunContext
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from sseapp import GET, Event, Request, Run, Settings, SSEApp, from_task
from ssecore.streaming.progress import TaskReport

TASKS = ["write the docs", "call Ann"]


@dataclass
class Tools:
    """The dependencies of the agent's tools."""

    status: Callable[[str], object]


agent = Agent(deps_type=Tools, instructions="You answer questions about tasks.")


@agent.tool
def search_tasks(context: RunContext[Tools], words: str) -> list[str]:
    """Find tasks by words."""
    context.deps.status(f"searching for {words}")  # not async, so Pydantic AI calls it in a thread
    return TASKS


class Question(msgspec.Struct):
    question: str


async def work(report: TaskReport[Event], question: str) -> None:
    def status(text: str) -> object:
        return report(Event({"status": text}, "status"))

    async with AsyncOpenAI() as client:  # closes its connections with the work
        provider = OpenAIProvider(openai_client=client)
        model = OpenAIChatModel(os.environ.get("OPENAI_MODEL", "gpt-5-mini"), provider=provider)
        async with agent.run_stream(question, model=model, deps=Tools(status)) as answer:
            async for text in answer.stream_text(delta=True, debounce_by=None):
                await report(Event(text, "token"))
    await report(Event("", "complete"))


async def ask(request: Request) -> AsyncIterator[Event]:
    async with from_task(work, request.query.question) as events:
        async for event in events:
            yield event


def make() -> SSEApp:
    return SSEApp([GET("/ask", ask, query=Question, run=Run(linger_s=60))], Settings(log="memory"))
