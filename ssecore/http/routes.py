"""The table of routes.

A path parameter is `{name}` (one segment), `{name:int}` or `{name:path}` (the rest with slashes), a keyword argument of
the handler. Names may be repeated in the query if their fields are lists, sets or tuples.

A match takes one step: a dictionary for paths without parameters, one regular expression for the others. An empty group
behind each alternative selects the route by `match.lastindex`: `/users/([^/]+)/x()|/topics/([^/]+)()`.
"""

import inspect
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypedDict, Unpack, get_args, get_origin

import msgspec
from msgspec import inspect as types

from ssecore.dialects import DIALECTS, NAMED, Dialect
from ssecore.errors import BadRequest, MethodNotAllowed, NotFound
from ssecore.wire import Event

__all__ = [
    "DELETE",
    "GET",
    "PARAMETER",
    "PATCH",
    "POST",
    "PUT",
    "About",
    "Handler",
    "Options",
    "Route",
    "Run",
    "Table",
    "Upload",
    "is_model",
]

#: An async generator function of events, or a coroutine function.
Handler = Callable[..., AsyncIterator[Event] | Awaitable[Any]]

# 18 digits fit into SQLite's integers.
_CONVERTERS: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "": (r"([^/]+)", str),
    "int": (r"(-?[0-9]{1,18})", int),
    "path": (r"(.+)", str),
}
PARAMETER: Final = re.compile(r"{([^{}:]*)(?::([^{}]*))?}")


@dataclass(frozen=True, slots=True)
class Upload:
    """A body spooled to disk: `request.body` is a binary file."""

    media_type: str
    max_bytes: int | None = None  #: default: `max_import_bytes`


@dataclass(frozen=True, slots=True)
class About:
    """A run's properties."""

    #: Such as a chat, for `GET /runs?thread=`.
    thread: str | None = None
    #: Replaces the header `Idempotency-Key`.
    key: str | None = None
    #: A description for the caller, cut to `runs.MAX_ABOUT_CHARS`.
    text: str = ""
    #: A small JSON object, stored for the dialect.
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """Makes a route resumable: its generator runs detached, into the log."""

    #: Cancel it after these seconds without a reader; `None`: never; "setting": the setting's.
    linger_s: float | Literal["setting"] | None = None
    #: Makes the route *detached*: a function of the request and the run's id, whose result is the response; `None`
    #: streams the run. An async one may await the run's end (`request.runs.whole`), and isn't called for
    #: `Prefer: respond-async`.
    accepted: Callable[[Any, str], Any] | None = None
    #: A function of the request: the description, such as the prompt, or an `About`. Exceptions refuse it.
    about: "Callable[[Any], str | About] | None" = None

    def __post_init__(self) -> None:
        linger_s: Any = self.linger_s
        if linger_s is not None and linger_s != "setting":
            number = isinstance(linger_s, int | float) and not isinstance(linger_s, bool)
            if not (number and 0 <= linger_s < math.inf):
                raise TypeError(f"linger_s must be a number of seconds, None or 'setting', not {linger_s!r}")
        if self.accepted is not None and not callable(self.accepted):
            raise TypeError("accepted must be a function of the request and the run's id")
        if self.about is not None and (not callable(self.about) or inspect.iscoroutinefunction(self.about)):
            raise TypeError("about must be a plain function of the request")


@dataclass(frozen=True)
class Route:
    """One line of the table."""

    method: str
    path: str
    handler: Callable[..., Any]
    query: Any = None
    body: Any = None
    media_types: Sequence[str] = ("application/json",)
    dialect: Dialect = NAMED
    run: Run | None = None
    #: No authentication.
    open: bool = False
    #: Limited by the rate of publications.
    publishes: bool = False
    #: For `/openapi.json`: the data's types by event names ("message" without one). `str`: text; `None`: no data;
    #: others: JSON. `{}`: any.
    events: Mapping[str, Any] | None = None
    #: The right that a token needs: `publish:topics/{name}`.
    may: str = ""
    #: For one request of an embedding program; `handler` returns an existing iterator.
    hosted: bool = False
    streams: bool = field(init=False)
    #: Query parameters that may be repeated.
    lists: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        if self.hosted:
            object.__setattr__(self, "lists", frozenset())
            object.__setattr__(self, "streams", not inspect.iscoroutinefunction(self.handler))
            return
        if not self.path.startswith("/"):
            raise ValueError(f"{self.path!r}: a path begins with /")
        if self.run is not None and not isinstance(self.run, Run):
            raise TypeError(f"{self.method} {self.path}: run must be a Run, as in run=Run(), not {self.run!r}")
        try:
            object.__setattr__(self, "lists", frozenset(_list_fields(self.query)))
            if not isinstance(self.body, Upload):
                _type_info(self.body)
            for kind in (self.events or {}).values():
                _type_info(kind)
        except TypeError as error:
            raise TypeError(f"{self.method} {self.path}: {error}") from None
        if not isinstance(self.dialect, Dialect):
            raise TypeError(f"{self.method} {self.path}: dialect must be a Dialect, such as DATA_ONLY")
        names = {name: name for name, _ in PARAMETER.findall(self.path)}
        try:
            self.may.format(**names)
        except (KeyError, IndexError, ValueError):
            text = f"{self.method} {self.path}: may={self.may!r} has a parameter that is not in the path"
            raise ValueError(text) from None
        handler = self.handler
        streams = inspect.isasyncgenfunction(handler)
        if not streams and (self.run is not None or not inspect.iscoroutinefunction(handler)):
            what = "an async generator" if self.run is not None else "an async generator or an async function"
            raise TypeError(f"{self.method} {self.path}: the handler must be {what}")
        try:
            inspect.signature(handler).bind(None, **names)
        except TypeError as error:
            raise TypeError(
                f"{self.method} {self.path}: the handler doesn't take its path parameters: {error}"
            ) from None
        object.__setattr__(self, "streams", streams)

    @property
    def name(self) -> str:
        """Such as "GET /chat"; otherwise a program's name for its run."""
        return f"{self.method} {self.path}".strip()


class Options(TypedDict, total=False):
    """See `Route`."""

    query: Any
    body: Any
    media_types: Sequence[str]
    dialect: Dialect
    run: Run | None
    open: bool
    publishes: bool
    events: Mapping[str, Any] | None
    may: str


def GET(path: str, handler: Handler, **options: Unpack[Options]) -> Route:
    """A route for GET, and for HEAD, which starts nothing."""
    return Route("GET", path, handler, **options)


def POST(path: str, handler: Handler, **options: Unpack[Options]) -> Route:
    """See `GET`."""
    return Route("POST", path, handler, **options)


def PUT(path: str, handler: Handler, **options: Unpack[Options]) -> Route:
    """See `GET`."""
    return Route("PUT", path, handler, **options)


def PATCH(path: str, handler: Handler, **options: Unpack[Options]) -> Route:
    """See `GET`."""
    return Route("PATCH", path, handler, **options)


def DELETE(path: str, handler: Handler, **options: Unpack[Options]) -> Route:
    """See `GET`."""
    return Route("DELETE", path, handler, **options)


def is_model(kind: Any) -> bool:
    """A pydantic model; pydantic may not be installed."""
    return isinstance(kind, type) and all(
        hasattr(kind, name) for name in ("model_fields", "model_validate", "model_validate_json")
    )


def _type_info(kind: Any) -> Any:
    """msgspec's description. Raises `TypeError` if it can't be decoded."""
    if kind is None:
        return None
    if kind is Run or isinstance(kind, Upload | Run | Route):
        raise TypeError(f"{kind!r} is not the type of a body")
    try:
        info = types.type_info(kind)
        msgspec.json.Decoder(kind, dec_hook=lambda kind, value: value)
    except Exception as error:
        raise TypeError(f"{kind!r} can't be decoded into: {error}") from error
    for found in _type_and_parts(info, set()):
        if isinstance(found, types.CustomType) and not is_model(found.cls):
            raise TypeError(f"{found.cls!r} can't be decoded into: use a Struct, a dataclass or a pydantic model")
    return info


def _type_and_parts(info: Any, seen: set[int]) -> Iterator[types.Type]:
    if isinstance(info, types.Type):
        if id(info) in seen:
            return
        seen.add(id(info))
        yield info
    if isinstance(info, types.Type | types.Field):
        for name in info.__struct_fields__:
            yield from _type_and_parts(getattr(info, name), seen)
    elif isinstance(info, tuple):
        for part in info:
            yield from _type_and_parts(part, seen)


_LISTS: Final = (types.ListType, types.SetType, types.FrozenSetType, types.VarTupleType, types.TupleType)


def _list_fields(query: Any) -> Iterator[str]:
    """Names of list fields. Raises `TypeError`."""
    info = _type_info(query)
    if info is None or isinstance(info, types.DictType):
        return
    if isinstance(info, types.CustomType):
        model: Any = info.cls
        for name, of_model in model.model_fields.items():
            kinds = (of_model.annotation, *get_args(of_model.annotation))
            if any((get_origin(kind) or kind) in (list, set, frozenset, tuple) for kind in kinds):
                yield of_model.alias or name
        return
    if not isinstance(info, types.StructType | types.DataclassType | types.TypedDictType):
        raise TypeError(f"query must be a Struct, a dataclass, a TypedDict or a pydantic model, not {query!r}")
    for of_struct in info.fields:
        kind = of_struct.type
        if any(isinstance(one, _LISTS) for one in (kind.types if isinstance(kind, types.UnionType) else (kind,))):
            yield of_struct.encode_name


class Table:
    """Matches routes; the first wins."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.dialects = list({id(route.dialect): route.dialect for route in routes}.values())
        for dialect in self.dialects:
            others = [other for other in [*DIALECTS.values(), *self.dialects] if other is not dialect]
            if any(other.name == dialect.name for other in others):
                raise ValueError(f"{type(dialect).__name__}: there is another dialect named {dialect.name!r}")
        by_path: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods = by_path.setdefault(route.path, {})
            if route.method in methods:
                raise ValueError(f"{route.method} {route.path} is in the table twice")
            methods[route.method] = route
        for methods in by_path.values():
            if "GET" in methods:
                methods.setdefault("HEAD", methods["GET"])
        self._static = {path: methods for path, methods in by_path.items() if "{" not in path}
        self._dynamic: dict[int, tuple[dict[str, Route], int, list[tuple[str, Callable[[str], Any]]]]] = {}
        alternatives = []
        groups = 0
        for path, methods in by_path.items():
            if path in self._static:
                continue
            pattern, parameters = _compile(path)
            alternatives.append(f"{pattern}()")
            first = groups + 1
            groups += len(parameters) + 1
            self._dynamic[groups] = (methods, first, parameters)
        # DOTALL: a path may contain line ends.
        self._pattern = re.compile("|".join(alternatives) or "(?!)", re.DOTALL)
        pattern = "|".join(alternatives).replace(_CONVERTERS["int"][0], _CONVERTERS[""][0])
        self._lenient_pattern = re.compile(pattern or "(?!)", re.DOTALL)

    def match(self, method: str, path: str) -> tuple[Route, dict[str, Any]]:
        """With path parameters. Raises `NotFound`, `MethodNotAllowed`, `BadRequest` for a whole number."""
        methods = self._static.get(path)
        parameters: dict[str, Any] = {}
        if methods is None:
            match = self._pattern.fullmatch(path)
            if match is None or match.lastindex is None:
                raise self._not_found(path)
            methods, first, converters = self._dynamic[match.lastindex]
            parameters = {name: convert(match[first + at]) for at, (name, convert) in enumerate(converters)}
        route = methods.get(method)
        if route is None:
            allow = ", ".join(sorted(methods))
            raise MethodNotAllowed(f"this path takes {allow}", headers={"allow": allow})
        return route, parameters

    def _not_found(self, path: str) -> NotFound | BadRequest:
        match = self._lenient_pattern.fullmatch(path)
        if match is not None and match.lastindex is not None:
            _, first, converters = self._dynamic[match.lastindex]
            for at, (name, convert) in enumerate(converters):
                if convert is int and not re.fullmatch(_CONVERTERS["int"][0], match[first + at]):
                    return BadRequest(f"{name} in the path must be a whole number of at most 18 digits", field=name)
        return NotFound("there is nothing at this path")


def _compile(path: str) -> tuple[str, list[tuple[str, Callable[[str], Any]]]]:
    pattern, parameters, at = "", list[tuple[str, Callable[[str], Any]]](), 0
    for match in PARAMETER.finditer(path):
        name, kind = match[1], match[2] or ""
        if not re.fullmatch("[a-z_][a-z0-9_]*", name) or name in dict(parameters):
            raise ValueError(f"{path}: {name!r} is not a valid name of a path parameter, or is there twice")
        if kind not in _CONVERTERS:
            raise ValueError(f"{path}: unknown type {kind!r} of a path parameter: use int or path")
        group, convert = _CONVERTERS[kind]
        pattern += re.escape(path[at : match.start()]) + group
        parameters.append((name, convert))
        at = match.end()
    if "{" in path[at:] or "}" in PARAMETER.sub("", path):
        raise ValueError(f"{path}: a brace is left over: a path parameter is {{name}}, {{name:int}} or {{name:path}}")
    return pattern + re.escape(path[at:]), parameters
