"""Streams as answers of another framework's own routes, and runs that a program starts by itself."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, Final

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI, Header, HTTPException
from litestar import Litestar, get, post
from litestar import Request as LitestarRequest
from litestar.exceptions import HTTPException as LitestarHTTPException
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request as StarletteRequest
from starlette.routing import Route

from sseapp import GET, JSON, Event, EventStream, Request, Run, Settings, SSEApp, Subscription
from ssecore.client import connect
from ssecore.errors import BadRequest, Draining, NotFound, TooManyRequests
from ssecore.testing import Transport, assert_stream
from ssecore.testing import connect as connect_in_process
from tests.needs import needs
from tests.test_client import quick
from tests.test_house import installed, wheel
from tests.test_typing import FASTAPI, hosted_program

__all__ = ["quick", "wheel"]

ANN: Final = {"x-key": "ann"}
EVENTS: Final = [*({"number": number} for number in range(5)), ""]


class Program:
    """A program's agent, and its streams; the same routes in each framework."""

    def __init__(self, **settings: Any) -> None:
        self.streams = SSEApp([], Settings(log="memory", retry_ms=1, **settings))
        self.begun = 0
        self.closed = anyio.Event()
        self.go_on = anyio.Event()
        self.go_on.set()

    async def answer(self, count: int, refusal: Exception | None = None) -> AsyncIterator[Event]:
        self.begun += 1
        try:
            if refusal is not None:
                raise refusal
            for number in range(count):
                yield Event({"number": number}, "token")
                await self.go_on.wait()
            yield Event("", "done")
        finally:
            self.closed.set()


def fastapi(program: Program) -> Any:
    def user(x_key: Annotated[str, Header()]) -> str:
        if x_key == "nobody":
            raise HTTPException(401, "not you")
        return x_key

    app = FastAPI()

    async def answer(
        count: int, caller: Annotated[str, Depends(user)], run: bool = True, refused: int | None = None
    ) -> EventStream:
        refusal = HTTPException(refused, {"why": "asked"}) if refused else None
        return EventStream(program.streams, program.answer(count, refusal), run=Run() if run else None, caller=caller)

    for method in (app.get, app.post):
        method("/answer/{count}", response_class=EventStream)(answer)
    return app


def starlette(program: Program) -> Any:
    async def answer(request: StarletteRequest) -> EventStream:
        caller = request.headers["x-key"]
        if caller == "nobody":
            raise StarletteHTTPException(401, "not you")
        refused = request.query_params.get("refused")
        refusal = StarletteHTTPException(int(refused), "asked") if refused else None
        run = None if request.query_params.get("run") == "false" else Run()
        events = program.answer(request.path_params["count"], refusal)
        return EventStream(program.streams, events, run=run, caller=caller)

    return Starlette(routes=[Route("/answer/{count:int}", answer, methods=["GET", "POST"])])


def litestar(program: Program) -> Any:
    async def answer(request: LitestarRequest[Any, Any, Any]) -> EventStream:
        caller = request.headers["x-key"]
        if caller == "nobody":
            raise LitestarHTTPException("not you", status_code=401)
        refused = request.query_params.get("refused")
        refusal = LitestarHTTPException("asked", status_code=int(refused)) if refused else None
        run = None if request.query_params.get("run") == "false" else Run()
        events = program.answer(request.path_params["count"], refusal)
        return EventStream(program.streams, events, run=run, caller=caller)

    # Its own logging would set the level of the whole process.
    return Litestar([kind("/answer/{count:int}")(answer) for kind in (get, post)], logging_config=None)


HOSTS: Final[list[Callable[[Program], Any]]] = [fastapi, starlette, litestar]
EVERYWHERE: Final = pytest.mark.parametrize("host", HOSTS)


@EVERYWHERE
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_run_of_a_hosts_route_goes_on_over_cuts(host: Callable[[Program], Any], method: str) -> None:
    program = Program()
    transport = Transport(host(program), cuts=[90, 200])
    async with program.streams.running(), httpx.AsyncClient(transport=transport) as http:
        url = "http://localhost/answer/5?tag=a&tag=b"  # what the query means is the host's business
        with anyio.fail_after(20):
            async with connect(url, method=method, headers=ANN, client=http) as source:
                events = [json.loads(event.data or '""') async for event in source]
                last = source.last_event_id
            assert (events, program.begun) == (EVENTS, 1)
            answer = await http.request(method, url, headers={**ANN, "last-event-id": last})
            assert (answer.status_code, answer.content, program.begun) == (204, b"", 1)
            answer = await http.request(method, url, headers={"x-key": "bob", "last-event-id": last})
            assert (answer.status_code, program.begun) == (410, 1), "somebody else's"


@EVERYWHERE
async def test_a_key_finds_the_run_again(host: Callable[[Program], Any]) -> None:
    program = Program()
    headers = {**ANN, "idempotency-key": "one", "prefer": "respond-async"}
    async with program.streams.running(), httpx.AsyncClient(transport=Transport(host(program))) as http:
        first = await http.post("http://localhost/answer/2", headers=headers)
        again = await http.post("http://localhost/answer/2", headers=headers)
        other = await http.post("http://localhost/answer/2?refused=0", headers=headers)
    assert first.status_code == 200, "where the run could be read instead isn't known"
    assert "content-location" not in first.headers
    assert (again.text, again.headers["run-id"], program.begun) == (first.text, first.headers["run-id"], 1)
    assert other.status_code == 422


@EVERYWHERE
async def test_a_refusal_is_answered_by_the_host(host: Callable[[Program], Any]) -> None:
    program = Program()
    async with program.streams.running(), httpx.AsyncClient(transport=Transport(host(program))) as http:
        for query in ("", "?refused=418", "?refused=418&run=false"):
            headers = ANN if query else {"x-key": "nobody"}
            answer = await http.get(f"http://localhost/answer/2{query}", headers=headers)
            assert answer.status_code == (418 if query else 401)
            assert "problem" not in answer.headers["content-type"], "as the framework words it"
        assert await program.streams.runs.owned_by("ann") == []


@EVERYWHERE
async def test_a_fleeting_stream_ends_with_its_client(host: Callable[[Program], Any]) -> None:
    program = Program()
    program.go_on = anyio.Event()
    async with program.streams.running():
        async with connect_in_process(host(program), "GET", "/answer/2?run=false", headers=ANN) as exchange:
            await assert_stream(exchange, ("token", {"number": 0}), ends=False)
            assert not program.closed.is_set()
        with anyio.fail_after(20):
            await program.closed.wait()


@EVERYWHERE
async def test_a_drain_says_farewell(host: Callable[[Program], Any]) -> None:
    program = Program()
    program.go_on = anyio.Event()
    async with program.streams.running():
        async with connect_in_process(host(program), "GET", "/answer/2", headers=ANN) as exchange:
            await assert_stream(exchange, ("token", {"number": 0}), ends=False)
            await program.streams.drain(0)
            await exchange.ended.wait()
            assert exchange.complete
        async with connect_in_process(host(program), "GET", "/answer/2", headers=ANN) as exchange:
            await exchange.started.wait()
            assert exchange.status == 503


async def test_fastapi_documents_an_event_stream_and_sends_what_the_route_adds() -> None:
    program = Program()
    app = fastapi(program)

    @app.get("/cookie")  # type: ignore[untyped-decorator]
    async def cookie() -> EventStream:
        stream = EventStream(program.streams, program.answer(0))
        stream.set_cookie("a", "b")
        return stream

    async with program.streams.running(), httpx.AsyncClient(transport=Transport(app)) as http:
        answers = (await http.get("http://localhost/openapi.json")).json()["paths"]["/answer/{count}"]["get"][
            "responses"
        ]
        assert [*answers["200"]["content"]] == ["text/event-stream"]
        assert (await http.get("http://localhost/cookie")).headers["set-cookie"].startswith("a=b")


async def test_a_hosts_route_reads_a_topic_and_a_run_that_is_there() -> None:
    program = Program()
    app = FastAPI()

    @app.get("/news")
    async def news() -> EventStream:
        return EventStream(program.streams, Subscription("news", Event("", "init")))

    @app.get("/runs/{run}")
    async def read(run: str) -> EventStream:
        return EventStream(program.streams, run, caller="ann")

    async with program.streams.running(), httpx.AsyncClient(transport=Transport(app)) as http:
        run = await program.streams.runs.start(program.answer(5), caller="ann")
        async with connect(f"http://localhost/runs/{run}", client=http) as source:
            assert [json.loads(event.data or '""') async for event in source] == EVENTS
        assert (await http.get("http://localhost/runs/nothing")).status_code == 404
        async with connect_in_process(app, "GET", "/news") as exchange:
            await assert_stream(exchange, ("init", ""), ends=False)
            await program.streams.topics.publish("news", Event(1, "news"))
            await assert_stream(exchange, ("news", 1), ends=False)


async def test_a_callers_limits_count_for_a_hosts_routes() -> None:
    program = Program(max_streams_per_caller=1)
    program.go_on = anyio.Event()
    app = starlette(program)
    async with program.streams.running():
        async with connect_in_process(app, "GET", "/answer/2", headers=ANN) as exchange:
            await assert_stream(exchange, ("token", {"number": 0}), ends=False)
            async with connect_in_process(app, "GET", "/answer/2", headers=ANN) as other:
                await other.started.wait()
                assert other.status == TooManyRequests.status
        program.go_on.set()


async def test_without_running_a_run_says_what_is_missing() -> None:
    program = Program()
    async with httpx.AsyncClient(transport=Transport(starlette(program))) as http:
        answer = await http.get("http://localhost/answer/1", headers=ANN)
        assert (answer.status_code, "async with app.running()" in answer.json()["detail"]) == (500, True)
        assert (await http.get("http://localhost/answer/1?run=false", headers=ANN)).status_code == 200
    with pytest.raises(Exception, match="async with app"):
        program.streams.runs  # noqa: B018


@pytest.mark.parametrize(
    ("events", "options", "text"),
    [
        (Program.answer, {}, "not called"),
        (7, {}, "async iterator"),
        ("run", {"run": Run()}, "run="),
        ("run", {"run": True}, "run="),
        ("run", {"caller": 7}, "caller"),
        ("run", {"caller": ""}, "caller"),
    ],
)
def test_what_makes_no_stream_is_an_error_at_once(events: Any, options: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        EventStream(SSEApp([], Settings(log="memory")), events, **options)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_program_starts_runs_waits_for_them_and_cancels_them() -> None:
    program = Program()
    async with program.streams.running():
        runs = program.streams.runs
        with anyio.fail_after(20):
            run = await runs.start(program.answer(2), caller="ann", key="first")
            state = await runs.wait(run, caller="ann")
            assert (state["state"], state["events"], state["route"]) == ("completed", 3, "answer")
            assert await runs.state(run, caller="ann") == state
            assert await runs.owned_by("ann") == [state] and await runs.owned_by("bob") == []
            assert await runs.start(program.answer(2), caller="ann", key="first") == run
            assert await runs.start(program.answer(2), caller="ann", key="first", name="other") != run
            for ask in (runs.state, runs.cancel, runs.wait):
                with pytest.raises(NotFound):
                    await ask(run, caller="bob")
            program.go_on = anyio.Event()
            endless = await runs.start(program.answer(2), caller=None)
            async with anyio.create_task_group() as tasks:

                @tasks.start_soon
                async def cancel() -> None:
                    assert await runs.cancel(endless, caller=None) == 202

                assert (await runs.wait(endless, caller=None))["state"] == "cancelled"
            assert await runs.cancel(endless, caller=None) == 204, "its events are deleted"
            with pytest.raises(NotFound):
                await runs.wait(endless, caller=None)
            with pytest.raises(BadRequest, match="no"):
                await runs.start(program.answer(1, BadRequest("no")), caller="ann", key="second")
            assert await runs.start(program.answer(0), caller="ann", key="second")


async def test_who_waits_for_a_run_hears_of_a_drain() -> None:
    program = Program()
    program.go_on = anyio.Event()
    states = []
    async with program.streams.running():
        runs = program.streams.runs
        run = await runs.start(program.answer(2), caller="ann")
        async with anyio.create_task_group() as tasks:

            @tasks.start_soon
            async def wait() -> None:
                states.append((await runs.wait(run, caller="ann"))["state"])

            await anyio.wait_all_tasks_blocked()
            await program.streams.drain(0)
        assert states == ["interrupted"]
        with pytest.raises(Draining):
            await runs.start(program.answer(2), caller="ann")


async def test_a_mounted_apps_requests_have_the_same_calls() -> None:
    """A handler and a host's route ask in the same way."""

    async def state(request: Request, id: str) -> Any:
        return JSON(await request.runs.state(id, caller=request.caller))

    streams = SSEApp([GET("/state/{id}", state)], Settings(log="memory"))
    async with streams.running(), httpx.AsyncClient(transport=Transport(streams)) as http:
        run = await streams.runs.start(Program().answer(0), caller=None)
        assert (await http.get(f"http://localhost/state/{run}")).json()["state"] == "completed"


#: Without FastAPI, Starlette and Litestar: an ASGI application of its own.
PLAIN: Final = """if True:
    import sys
    for name in ("fastapi", "starlette", "litestar"):
        sys.modules[name] = None
    import anyio, httpx
    from sseapp import Event, EventStream, Run, Settings, SSEApp
    from ssecore.testing import Transport

    streams = SSEApp([], Settings(log="memory"))

    async def answer():
        yield Event("1")

    async def app(scope, receive, send):
        await EventStream(streams, answer(), run=Run())(scope, receive, send)

    async def main():
        async with streams.running(), httpx.AsyncClient(transport=Transport(app)) as http:
            print((await http.get("http://localhost/")).text.count("data: 1"))

    anyio.run(main)
"""


def test_without_starlette_it_is_an_asgi_application() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


#: What docs/frameworks.md shows, run with the wheel: cut and resumed.
WITH_WHEEL: Final = """if True:
    import anyio, httpx
    from program import app, streams
    from ssecore.client import connect
    from ssecore.testing import Transport

    async def main():
        async with streams.running(), httpx.AsyncClient(transport=Transport(app, cuts=[90])) as http:
            url, ann = "http://localhost/answers", {"x-key": "ann"}
            async with connect(url, method="POST", json={"text": "a b c"}, headers=ann, client=http) as source:
                print([event.data async for event in source])
            print((await http.post(url, json={"text": "a"}, headers={"x-key": "eve"})).status_code)

    anyio.run(main)
"""


@needs("time")
def test_the_installed_wheel_answers_for_a_host(wheel: Any, tmp_path: Path) -> None:
    installed(wheel, tmp_path / ".venv", *FASTAPI)
    (tmp_path / "program.py").write_text(hosted_program())
    python = tmp_path / ".venv" / "bin" / "python"
    done = subprocess.run([python, "-c", WITH_WHEEL], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["['a', 'b', 'c', '']", "401"], done.stderr
