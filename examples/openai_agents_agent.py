"""An agent of OpenAI's Agents SDK as a run: its hooks report a status, its model streams tokens.

    pip install openai-agents
    OPENAI_API_KEY=… uvicorn --factory examples.openai_agents_agent:make
    curl -N 'localhost:8000/ask?question=what+is+due'

`OPENAI_BASE_URL` and `OPENAI_MODEL` choose another server and model. The agent uses chat completions, which every such
server has. Tracing is off: it would send the questions to OpenAI as well.
"""

import os
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from agents import Agent, OpenAIChatCompletionsModel, RunConfig, RunHooks, Runner, Tool, function_tool
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent

from sseapp import GET, Event, Request, Run, Settings, SSEApp, from_task
from ssecore.streaming.progress import TaskReport

TASKS = ["write the docs", "call Ann"]


@function_tool
def search_tasks(words: str) -> list[str]:
    """Find tasks by words."""
    return TASKS


class Statuses(RunHooks[Any]):
    """The SDK calls these hooks at each step."""

    def __init__(self, report: TaskReport[Event]) -> None:
        self._report = report

    async def on_tool_start(self, context: Any, agent: Any, tool: Tool) -> None:
        self._report(Event({"status": f"using {tool.name}"}, "status"))


class Question(msgspec.Struct):
    question: str


async def work(report: TaskReport[Event], question: str) -> None:
    async with AsyncOpenAI() as client:
        model = OpenAIChatCompletionsModel(os.environ.get("OPENAI_MODEL", "gpt-5-mini"), client)
        agent = Agent("tasks", instructions="You answer questions about tasks.", model=model, tools=[search_tasks])
        config = RunConfig(tracing_disabled=True)
        answer = Runner.run_streamed(agent, question, hooks=Statuses(report), run_config=config)
        try:
            async for event in answer.stream_events():
                if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
                    await report(Event(event.data.delta, "token"))
        finally:
            answer.cancel()  # the SDK runs it in a separate task
    await report(Event("", "complete"))


async def ask(request: Request) -> AsyncIterator[Event]:
    async with from_task(work, request.query.question) as events:
        async for event in events:
            yield event


def make() -> SSEApp:
    return SSEApp([GET("/ask", ask, query=Question, run=Run(linger_s=60))], Settings(log="memory"))
