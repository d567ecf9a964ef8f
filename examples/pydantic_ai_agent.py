"""An agent of Pydantic AI's as a run that survives: its tools tell a status by a callback, its model streams tokens.

    pip install 'pydantic-ai-slim[openai]'
    OPENAI_API_KEY=… uvicorn --factory examples.pydantic_ai_agent:make
    curl -N 'localhost:8000/ask?question=what+is+due'

`OPENAI_BASE_URL` and `OPENAI_MODEL` name another server, and its model.
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
class Told:
    """What the agent's tools are given."""

    status: Callable[[str], object]


agent = Agent(deps_type=Told, instructions="You answer questions about tasks.")


@agent.tool
def search_tasks(context: RunContext[Told], words: str) -> list[str]:
    """The tasks that are about these words."""
    context.deps.status(f"searching for {words}")  # isn't asynchronous: Pydantic AI calls it in a thread
    return TASKS


class Question(msgspec.Struct):
    question: str


async def work(report: TaskReport[Event], question: str) -> None:
    def status(text: str) -> object:
        return report(Event({"status": text}, "status"))

    async with AsyncOpenAI() as client:  # its connections end with the work, whatever ends it
        provider = OpenAIProvider(openai_client=client)
        model = OpenAIChatModel(os.environ.get("OPENAI_MODEL", "gpt-5-mini"), provider=provider)
        async with agent.run_stream(question, model=model, deps=Told(status)) as answer:
            async for text in answer.stream_text(delta=True, debounce_by=None):
                await report(Event(text, "token"))
    await report(Event("", "complete"))


async def ask(request: Request) -> AsyncIterator[Event]:
    async with from_task(work, request.query.question) as events:
        async for event in events:
            yield event


def make() -> SSEApp:
    return SSEApp([GET("/ask", ask, query=Question, run=Run(linger_s=60))], Settings(log="memory"))
