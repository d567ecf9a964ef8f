"""The OpenAPI document of a table: valid, complete, true, and for those who may enter only."""

import copy
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import jsonschema
import msgspec
import pydantic
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, OpenAPIV32SpecValidator

from handlers import ROUTES
from sseapp import GET, JSON, POST, Event, Request, Response, Run, Settings, SSEApp, Subscription, Upload, create_app
from ssecore.errors import BadRequest
from ssecore.http.routes import PARAMETER, Route
from ssecore.http.tokens import add_token
from ssecore.runs import ROUTES as RUN_ROUTES
from ssecore.testing import Transport
from ssecore.wire import Decoder

VERSIONS: Final = ("3.1", "3.2")


class Pace(msgspec.Struct):
    interval: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    tag: list[str] = []


class Progress(msgspec.Struct):
    step: int
    of: int


class Address(pydantic.BaseModel):
    city: str


class Order(pydantic.BaseModel):
    item: str
    to: Address


async def count(request: Request, steps: int) -> AsyncIterator[Event]:
    """Count up.

    One event for each step.
    """
    for step in range(steps):
        yield Event(Progress(step, steps), "progress")
        yield Event("a text")
    if steps == 2:
        raise BadRequest("two is too few")
    yield Event("", "done")


async def order(request: Request, **where: str) -> Response:
    return JSON({})


async def news(request: Request, name: str) -> Subscription:
    return Subscription(name, Event("", "init"))


TABLE: Final = [
    GET(
        "/count/{steps:int}",
        count,
        query=Pace,
        run=Run(),
        events={"progress": Progress, "message": str, "done": None},
    ),
    POST("/orders", order, body=Order),
    POST("/upload/{where:path}", order, body=Upload("text/csv")),
    GET("/news/{name}", news, events={"init": None, "news": dict[str, Any]}, may="subscribe:topics/{name}"),
    GET("/open", order, open=True),
]


async def ask(app: SSEApp, target: str = "/openapi.json", **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=Transport(app), base_url="http://localhost") as http:
        return await http.get(target, headers=headers)


def assert_valid(document: dict[str, Any], version: str) -> None:
    assert document["openapi"] == f"{version}.0"
    if version == "3.2":
        OpenAPIV32SpecValidator(document).validate()
        return
    strict = copy.deepcopy(document)
    for operations in strict["paths"].values():
        for operation in operations.values():
            for response in operation["responses"].values():
                for content in response.get("content", {}).values():
                    content.pop("itemSchema", None)  # 3.1 has none: it is added to it, as FastAPI does
    OpenAPIV31SpecValidator(strict).validate()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tokens", [False, True])
async def test_the_services_document_is_valid_and_has_every_route(version: str, tokens: bool, tmp_path: Path) -> None:
    settings, headers = Settings(log="memory", data_dir=tmp_path), {}
    if tokens:
        file = tmp_path / "tokens"
        headers["authorization"] = f"Bearer {add_token(file, 'ann')}"
        settings = Settings(log="memory", data_dir=tmp_path, tokens_file=file)
    app = create_app(settings)
    document = (await ask(app, f"/openapi.json?version={version}", **headers)).json()
    assert_valid(document, version)
    ours: list[Route] = [*ROUTES, *RUN_ROUTES, *app.guard.routes]
    operations = {(path, method) for path, each in document["paths"].items() for method in each}
    assert {(PARAMETER.sub(r"{\1}", route.path), route.method.lower()) for route in ours} <= operations
    assert len({each[method]["operationId"] for each in document["paths"].values() for method in each}) == len(
        operations
    )
    assert ("security" in document) is tokens
    if tokens:
        assert document["paths"]["/healthz"]["get"]["security"] == []
        assert "publish:topics/{name}" in document["paths"]["/topics/{name}"]["post"]["description"]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_programs_own_routes_are_told_with_their_types(version: str) -> None:
    document = (await ask(SSEApp(TABLE, Settings(log="memory")), f"/openapi.json?version={version}")).json()
    assert_valid(document, version)
    paths, schemas = document["paths"], document["components"]["schemas"]
    told = paths["/count/{steps}"]["get"]
    assert (told["summary"], told["description"]) == ("Count up", "One event for each step.")
    parameters = {parameter["name"]: parameter for parameter in told["parameters"]}
    assert parameters["steps"]["schema"]["type"] == "integer" and parameters["steps"]["in"] == "path"
    assert parameters["interval"]["schema"] == {"type": "number", "minimum": 0, "default": 0.0}
    assert parameters["tag"]["schema"]["type"] == "array"
    assert {"Last-Event-ID", "Idempotency-Key", "Prefer", "key", "last_event_id"} <= {*parameters}
    body = paths["/orders"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["to"] == {"$ref": "#/components/schemas/Address"}
    assert schemas["Address"]["required"] == ["city"]
    assert [*paths["/upload/{where}"]["post"]["requestBody"]["content"]] == ["text/csv"]
    assert "text/event-stream" in paths["/news/{name}"]["get"]["responses"]["200"]["content"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("steps", [2, 3])
async def test_what_is_sent_is_what_the_document_says(version: str, steps: int) -> None:
    app = SSEApp(TABLE, Settings(log="memory"))
    async with app.running():
        document = (await ask(app, f"/openapi.json?version={version}")).json()
        stream = (await ask(app, f"/count/{steps}")).content
        refusal = (await ask(app, "/count/many")).json()
    item = document["paths"]["/count/{steps}"]["get"]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    events = Decoder().feed(stream)
    assert len(events) == 2 * steps + 1
    for event in events:
        told = {"event": event.event or "message", "data": event.data, "id": event.id}
        jsonschema.validate(told, {**item, "components": document["components"]})
        [kind] = [each for each in item["anyOf"] if each["properties"]["event"]["const"] == told["event"]]
        if (content := kind["properties"]["data"].get("contentSchema")) is not None:
            data = json.loads(event.data)
            jsonschema.validate(data, {**content, "components": document["components"]})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"event": "other", "data": ""}, item)
    jsonschema.validate(refusal, document["components"]["schemas"]["Problem"])


async def test_the_document_is_for_those_who_may_enter(tmp_path: Path) -> None:
    private = SSEApp(TABLE, Settings(log="memory"))
    assert (await ask(private)).status_code == 200
    assert (await ask(private, **{"x-forwarded-for": "192.0.2.1"})).status_code == 403
    users = SSEApp(TABLE, Settings(log="memory"), caller=lambda request: request.headers.get("x-user"))
    assert (await ask(users)).status_code == 401
    assert (await ask(users, **{"x-user": "ann"})).status_code == 200
    token = add_token(tmp_path / "tokens", "ann")
    tokens = SSEApp(TABLE, Settings(log="memory", tokens_file=tmp_path / "tokens"))
    assert (await ask(tokens)).status_code == 401
    assert (await ask(tokens, authorization=f"Bearer {token}")).status_code == 200, "no right is needed"
    everybody = SSEApp(TABLE, Settings(log="memory", auth="off"))
    assert (await ask(everybody, **{"x-forwarded-for": "192.0.2.1"})).status_code == 200


async def test_an_unknown_version_is_refused_and_a_mount_is_told() -> None:
    app = SSEApp(TABLE, Settings(log="memory"))
    refused = await ask(app, "/openapi.json?version=2.0")
    assert (refused.status_code, refused.json()["detail"]) == (400, "version: expected 3.1 or 3.2")
    async with httpx.AsyncClient(transport=Transport(app, root_path="/live"), base_url="http://localhost") as http:
        assert (await http.get("/openapi.json")).json()["servers"] == [{"url": "/live"}]


async def test_a_programs_own_document_takes_the_place_of_ours() -> None:
    app = SSEApp([GET("/openapi.json", order)], Settings(log="memory"))
    assert (await ask(app)).json() == {}


def test_events_that_have_no_type_are_an_error_when_the_table_is_made() -> None:
    with pytest.raises(TypeError, match="GET /x"):
        GET("/x", order, events={"progress": 7})


TRIED: Final = (
    *("/stream", "/stream/hello", "/stream/progress", "/stream/format", "/process/stream"),
    *("/stream/errors?at=9", "/stream/timeout?limit=0.01", "/countdown/2"),
)


async def test_what_the_service_sends_is_what_its_document_says(tmp_path: Path) -> None:
    app = create_app(Settings(log="memory", data_dir=tmp_path))
    async with app.running():
        paths = (await ask(app)).json()["paths"]
        for target in TRIED:
            path, _, query = target.partition("?")
            path = path.replace("/2", "/{seconds}")
            content = paths[path]["get"]["responses"]["200"]["content"]["text/event-stream"]
            schemas = (await ask(app)).json()["components"]
            events = Decoder().feed((await ask(app, f"{path.format(seconds=2)}?interval=0&{query}")).content)
            assert events
            for event in events:
                told = {"event": event.event or "message", "data": event.data}
                jsonschema.validate(told, {**content["itemSchema"], "components": schemas})
                kinds = content["itemSchema"]["anyOf"]
                [kind] = [each for each in kinds if each["properties"]["event"]["const"] == told["event"]]
                if (data := kind["properties"]["data"].get("contentSchema")) is not None:
                    jsonschema.validate(json.loads(event.data), {**data, "components": schemas})
