"""A LangGraph agent as a run: its nodes report a status by a callback, its model streams tokens.

    pip install langgraph langchain-openai
    OPENAI_API_KEY=… uvicorn --factory examples.langgraph_agent:make
    curl -N 'localhost:8000/ask?question=what+is+due'

`OPENAI_BASE_URL` and `OPENAI_MODEL` choose another server and model. If the client disconnects, the graph continues;
the client resumes where it left off, and no token is paid for twice.
"""

import os
from collections.abc import AsyncIterator, Callable
from typing import Any, TypedDict

import msgspec
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from openai import DefaultAsyncHttpxClient

from sseapp import GET, Event, Request, Run, Settings, SSEApp, from_task
from ssecore.streaming.progress import TaskReport

TASKS = ["write the docs", "call Ann"]


class State(TypedDict, total=False):
    question: str
    found: str
    answer: str


def graph(model: ChatOpenAI, status_callback: Callable[[str], object]) -> Any:

    def search(state: State) -> State:  # not async, so LangGraph runs it in a thread
        status_callback("searching the tasks")
        return {"found": "; ".join(TASKS)}

    async def write(state: State) -> State:
        status_callback("writing the answer")
        prompt = f"Tasks: {state['found']}\nQuestion: {state['question']}"
        return {"answer": (await model.ainvoke(prompt)).text}

    steps = StateGraph(State)
    steps.add_node("search", search)
    steps.add_node("write", write)
    steps.add_edge(START, "search")
    steps.add_edge("search", "write")
    steps.add_edge("write", END)
    return steps.compile()


class Question(msgspec.Struct):
    question: str


async def work(report: TaskReport[Event], question: str) -> None:
    async with DefaultAsyncHttpxClient() as client:  # closes its connections with the work
        name = os.environ.get("OPENAI_MODEL", "gpt-5-mini")
        model = ChatOpenAI(model=name, streaming=True, http_async_client=client)
        agent = graph(model, lambda text: report(Event({"status": text}, "status")))
        async for message, _ in agent.astream({"question": question}, stream_mode="messages"):
            if isinstance(message, AIMessageChunk) and message.text:
                await report(Event(message.text, "token"))
    await report(Event("", "complete"))


async def ask(request: Request) -> AsyncIterator[Event]:
    async with from_task(work, request.query.question) as events:
        async for event in events:
            yield event


def make() -> SSEApp:
    return SSEApp([GET("/ask", ask, query=Question, run=Run(linger_s=60))], Settings(log="memory"))
