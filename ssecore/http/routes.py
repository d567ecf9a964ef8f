"""The table of routes.

A path parameter is `{name}` (one segment), `{name:int}` or `{name:path}` (the rest with slashes), a keyword argument of
the handler. Names may be repeated in the query if their fields are lists, sets or tuples.

A match takes one step: a dictionary for paths without parameters, one regular expression for the others, in which an
empty group behind each alternative selects the route: `/users/([^/]+)/x()|/topics/([^/]+)()`.
"""

import inspect
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Final, Literal, get_args, get_origin

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
    #: Makes the route *detached*: a function of the request and the run's id makes the response. An async one may await
    #: the run's end (`request.runs.whole`), and isn't called for `Prefer: respond-async`.
    accepted: Callable[[Any, str], Any] | None = None
    #: A function of the request: a description such as the prompt, or an `About`. Exceptions refuse it.
    about: "Callable[[Any], str | About] | None" = None

    def __post_init__(self) -> None:
        linger_s: Any = self.linger_s
        if linger_s is not None and linger_s != "setting":
            if isinstance(linger_s, bool) or not isinstance(linger_s, int | float) or not 0 <= linger_s < math.inf:
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
    handler: Handler
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

    def __post_init__(self) -> None:
        if not self.hosted:
            try:
                self._check()
            except (TypeError, ValueError) as error:
                raise type(error)(f"{self.name}: {error}") from None

    def _check(self) -> None:
        if not self.path.startswith("/"):
            raise ValueError("a path begins with /")
        if self.run is not None and not isinstance(self.run, Run):
            raise TypeError(f"run must be a Run, as in run=Run(), not {self.run!r}")
        if not isinstance(self.dialect, Dialect):
            raise TypeError("dialect must be a Dialect, such as DATA_ONLY")
        body = None if isinstance(self.body, Upload) else self.body
        for kind in (self.query, body, *(self.events or {}).values()):
            _check_type(kind)
        _ = self.lists
        names = {name: name for name, _ in PARAMETER.findall(self.path)}
        try:
            self.may.format(**names)
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"may={self.may!r} has a parameter that is not in the path") from None
        if not inspect.isasyncgenfunction(self.handler) and (self.run is not None or self.streams):
            what = "an async generator" if self.run is not None else "an async generator or an async function"
            raise TypeError(f"the handler must be {what}")
        try:
            inspect.signature(self.handler).bind(None, **names)
        except TypeError as error:
            raise TypeError(f"the handler doesn't take its path parameters: {error}") from None

    def call(self, request: Any, params: Mapping[str, Any]) -> Any:
        return self.handler(request, **params)

    @cached_property
    def streams(self) -> bool:
        return not inspect.iscoroutinefunction(self.handler)

    @cached_property
    def lists(self) -> frozenset[str]:
        """Query parameters that may be repeated."""
        return frozenset(_list_fields(self.query))

    @property
    def name(self) -> str:
        """Such as "GET /chat"; otherwise a program's name for its run."""
        return f"{self.method} {self.path}".strip()


#: A route for GET, and for HEAD, which starts nothing.
GET: Final = partial(Route, "GET")
POST: Final = partial(Route, "POST")
PUT: Final = partial(Route, "PUT")
PATCH: Final = partial(Route, "PATCH")
DELETE: Final = partial(Route, "DELETE")


def is_model(kind: Any) -> bool:
    """A pydantic model; pydantic may not be installed."""
    return isinstance(kind, type) and hasattr(kind, "model_validate_json")


def _check_type(kind: Any) -> None:
    """Raises `TypeError` if JSON can't be decoded into it."""
    try:
        info = types.type_info(kind)
    except Exception as error:
        raise TypeError(f"{kind!r} can't be decoded into: {error}") from error
    for found in _parts(info, set()):
        if isinstance(found, types.CustomType) and not is_model(found.cls):
            raise TypeError(f"{found.cls!r} can't be decoded into: use a Struct, a dataclass or a pydantic model")


def _parts(info: Any, seen: set[int]) -> Iterator[Any]:
    if isinstance(info, types.Type | types.Field | tuple) and id(info) not in seen:
        seen.add(id(info))
        yield info
        for part in info if isinstance(info, tuple) else msgspec.structs.astuple(info):
            yield from _parts(part, seen)


_LISTS: Final = (types.ListType, types.SetType, types.FrozenSetType, types.VarTupleType, types.TupleType)


def _list_fields(query: Any) -> Iterator[str]:
    """Raises `TypeError`."""
    info = types.type_info(query)
    if isinstance(info, types.NoneType | types.DictType):
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
        self.dialects = list(dict.fromkeys(route.dialect for route in routes))
        for dialect in self.dialects:
            if any(one.name == dialect.name and one is not dialect for one in (*DIALECTS.values(), *self.dialects)):
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
        pattern = "|".join(alternatives) or "(?!)"
        self._pattern = re.compile(pattern, re.DOTALL)
        self._lenient_pattern = re.compile(pattern.replace(_CONVERTERS["int"][0], _CONVERTERS[""][0]), re.DOTALL)

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
