"""Streams mounted in a FastAPI program under /sse, with the program's own users.

    uvicorn --factory examples.fastapi_host:make
    open http://127.0.0.1:8000/ in a browser

- `/sse/answer?question=…` is a run: after a reload or a cut, the page resumes it.
- `/sse/news` is a topic; the program's own route `POST /news` publishes to it.
- The program's lifespan enters `streams.running()`: runs and topics need it, and streams get a proper end.
"""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
from fastapi import FastAPI
from fastapi.responses import FileResponse

from sseapp import GET, Event, Request, Run, Settings, SSEApp, Subscription


class Question(msgspec.Struct):
    question: str


async def answer(request: Request) -> AsyncIterator[Event]:
    for word in f"You asked: {request.query.question}".split():
        yield Event(word, event="token")
        await anyio.sleep(0.05)
    yield Event("", event="done")


async def news(request: Request) -> Subscription:
    return Subscription("news", Event({"hello": request.caller}, event="init"))


def make() -> FastAPI:
    sessions: dict[str, str] = {}  # stands for the program's sessions: a cookie's value and the user's name

    def caller(request: Request) -> str | None:
        """The program's users are the streams' callers. `None` is refused with 401."""
        return sessions.get(request.cookies.get("session", ""))

    streams = SSEApp(
        [GET("/answer", answer, query=Question, run=Run(linger_s=60)), GET("/news", news)],
        Settings(log="memory"),
        caller=caller,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with streams.running():
            yield

    app = FastAPI(lifespan=lifespan)
    app.mount("/sse", streams)

    @app.get("/")
    async def page() -> FileResponse:
        session = secrets.token_urlsafe()
        sessions[session] = f"guest {len(sessions) + 1}"
        response = FileResponse(Path(__file__).with_name("vanilla.html"))
        response.set_cookie("session", session, httponly=True, samesite="strict")
        return response

    @app.post("/news")
    async def publish(headline: str) -> dict[str, str]:
        cursor = await streams.topics.publish("news", Event({"headline": headline}, event="news"))
        return {"id": str(cursor)}

    return app
