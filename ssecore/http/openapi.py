"""`GET /openapi.json`: an app's routes as an OpenAPI document, with their authentication.

3.2 has `itemSchema`, the schema of one event. 3.1, which most tools read, ignores it beside the body's schema.
"""

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec

from ssecore import __version__
from ssecore.dialects import NAMED
from ssecore.http.guard import COOKIE, Guard
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Problem, Response
from ssecore.http.routes import GET, PARAMETER, Route, Upload, is_model
from ssecore.wire import CONTENT_TYPE

__all__ = ["OpenAPI", "document"]

Version = Literal["3.1", "3.2"]

_REF: Final = "#/components/schemas/{name}"
_PATH_TYPES: Final[Mapping[str, dict[str, Any]]] = {
    "": {"type": "string", "minLength": 1},
    "int": {"type": "integer", "format": "int64"},
    "path": {"type": "string", "minLength": 1},
}
_TEXT: Final = {"type": "string"}
_RUN_PARAMETERS: Final = (
    ("header", "Last-Event-ID", "Resume after this event"),
    ("header", "Idempotency-Key", "A request with the same key reads the run that the first one started"),
    ("header", "Prefer", "`respond-async`: respond 202 at once, with the run's location"),
    ("query", "key", "As Idempotency-Key, for `EventSource`"),
    ("query", "last_event_id", "As Last-Event-ID"),
)


class Failure(msgspec.Struct):
    error: str
    code: str


class Cancelled(msgspec.Struct):
    reason: str


class Gap(msgspec.Struct):
    reason: str
    first: int = msgspec.field(name="from")
    to: int | None = None


_, _OWN = msgspec.json.schema_components((Problem, Failure, Cancelled, Gap))


class _Query(msgspec.Struct, forbid_unknown_fields=True):
    version: Version = "3.1"


class OpenAPI:
    """The document's route."""

    def __init__(self, routes: Iterable[Route], guard: Guard) -> None:
        self.route = GET("/openapi.json", self._answer, query=_Query)
        self._routes = [*routes, self.route]
        self._guard = guard
        self._made: dict[Version, dict[str, Any]] = {}

    async def _answer(self, request: Request) -> Response:
        """This document: every route, as OpenAPI 3.1 or 3.2"""
        version: Version = request.query.version
        if version not in self._made:
            self._made[version] = document(self._routes, self._guard, version)
        return JSON(self._made[version] | {"servers": [{"url": request.root_path.rstrip("/") or "/"}]})


def document(routes: Iterable[Route], guard: Guard, version: Version) -> dict[str, Any]:
    """Paths that differ only in parameter names stand once."""
    routes = list(routes)
    schemas = _Schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    shapes: dict[str, str] = {}
    for route in routes:
        path = PARAMETER.sub(r"{\1}", route.path)
        if shapes.setdefault(PARAMETER.sub("{}", route.path), path) == path:
            paths.setdefault(path, {}).setdefault(route.method.lower(), _operation(route, guard, schemas, version))
    components: dict[str, Any] = {"schemas": {"Problem": _OWN["Problem"], **schemas.components}}
    made: dict[str, Any] = {
        "openapi": f"{version}.0",
        "info": {"title": "sseapp", "version": __version__},
        "paths": paths,
        "components": components,
    }
    if guard.mode == "tokens":
        components["securitySchemes"] = {
            "token": {"type": "http", "scheme": "bearer"},
            "session": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "From POST /session"},
        }
        made["security"] = [{"token": []}, {"session": []}]
    return made


class _Schemas:
    def __init__(self, routes: Iterable[Route]) -> None:
        kinds: list[Any] = []
        for route in routes:
            declared = [route.query, None if isinstance(route.body, Upload) else route.body]
            kinds += [kind for kind in (*declared, *(route.events or {}).values()) if kind is not None]
        self.components: dict[str, Any] = {}
        found, components = msgspec.json.schema_components(kinds, schema_hook=self._of_model, ref_template=_REF)
        self.components |= components
        self._of = list(zip(kinds, found, strict=True))

    def _of_model(self, kind: type) -> dict[str, Any]:
        if not is_model(kind):
            raise NotImplementedError
        model: Any = kind
        schema: dict[str, Any] = model.model_json_schema(ref_template=_REF.replace("name", "model"))
        self.components |= schema.pop("$defs", {})
        return schema

    def of(self, kind: Any) -> dict[str, Any]:
        return next(schema for known, schema in self._of if known is kind)

    def fields(self, kind: Any) -> dict[str, Any]:
        """An object's schema, with references resolved."""
        schema = self.of(kind)
        while "$ref" in schema:
            schema = self.components[schema["$ref"].rpartition("/")[2]]
        return schema


def _operation(route: Route, guard: Guard, schemas: _Schemas, version: Version) -> dict[str, Any]:
    first, _, rest = (inspect.getdoc(route.handler) or "").partition("\n")
    described = [rest.strip(), f"Needs the right `{route.may}`." if route.may and guard.mode == "tokens" else ""]
    name = re.sub(r"\W+", "_", route.method.lower() + PARAMETER.sub(r"by_\1", route.path)).strip("_")
    operation: dict[str, Any] = {"operationId": name, "responses": _responses(route, schemas, version)}
    if first:
        operation["summary"] = first.rstrip(".")
    if any(described):
        operation["description"] = "\n\n".join(filter(None, described))
    if parameters := [*_parameters(route, schemas)]:
        operation["parameters"] = parameters
    if isinstance(route.body, Upload):
        operation["requestBody"] = {"required": True, "content": {route.body.media_type: {}}}
    elif route.body is not None:
        content = {"application/json": {"schema": schemas.of(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.open and guard.mode == "tokens":
        operation["security"] = []
    return operation


def _parameters(route: Route, schemas: _Schemas) -> Iterable[dict[str, Any]]:
    for name, kind in PARAMETER.findall(route.path):
        described = {"description": "May contain slashes"} if kind == "path" else {}
        yield {"name": name, "in": "path", "required": True, "schema": _PATH_TYPES[kind], **described}
    fields = schemas.fields(route.query) if route.query is not None else {}
    for name, schema in fields.get("properties", {}).items():
        yield {"name": name, "in": "query", "required": name in fields.get("required", ()), "schema": schema}
    for place, name, description in _RUN_PARAMETERS if route.run is not None else ():
        if place == "header" or route.method == "GET":
            yield {"name": name, "in": place, "description": description, "schema": _TEXT}


def _responses(route: Route, schemas: _Schemas, version: Version) -> dict[str, Any]:
    problem = {
        "description": "The problem",
        "content": {"application/problem+json": {"schema": {"$ref": _REF.format(name="Problem")}}},
    }
    responses: dict[str, Any] = {"4XX": problem, "5XX": problem}
    if not route.streams and route.events is None:
        return {"2XX": {"description": "Success"}, **responses}
    if route.run is not None:
        responses["202"] = {"description": "The run was started"}
    if route.run is None or route.run.accepted is None:
        stream: dict[str, Any] = {"itemSchema": _item(route, schemas)}
        if version == "3.1":
            stream["schema"] = _TEXT
        names = ", ".join(f"`{name}`" for name in route.events or ())
        description = f"An event stream of {names}" if names else "An event stream"
        responses["200"] = {"description": description, "content": {CONTENT_TYPE: stream}}
        responses["204"] = {"description": "There are no more events; a browser doesn't reconnect"}
    return responses


def _item(route: Route, schemas: _Schemas) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "event": _TEXT,
        "data": _TEXT,
        "id": {**_TEXT, "description": "Resume after it"},
        "retry": {"type": "integer", "minimum": 0, "description": "Reconnection time in milliseconds"},
    }
    item: dict[str, Any] = {"type": "object", "properties": fields}
    if route.events:
        known = {name: None if kind is None else schemas.of(kind) for name, kind in route.events.items()}
        if route.dialect is NAMED:
            of_run = {"cancelled": _OWN["Cancelled"], "gap": _OWN["Gap"]} if route.run is not None else {}
            known = {"error": _OWN["Failure"], **of_run, **known}
        item["anyOf"] = [_event(name, schema) for name, schema in known.items()]
    return item


def _event(name: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    data: dict[str, Any] = {"const": ""} if schema is None else _TEXT
    if schema is not None and schema != _TEXT:
        data = {**_TEXT, "contentMediaType": "application/json", "contentSchema": schema}
    if name == "message":
        return {"properties": {"data": data, "event": {"const": "message"}}, "required": ["data"]}
    return {"properties": {"event": {"const": name}, "data": data}, "required": ["event", "data"]}
