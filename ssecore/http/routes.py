"""The table: which handler answers, with which path parameters, query and body.

    ROUTES = [
        GET("/countdown/{seconds:int}", countdown),
        POST("/chat/stream", chat, body=list[ChatMessage]),
    ]

A path parameter is `{name}` (one segment), `{name:int}` (a whole number) or `{name:path}` (the rest, slashes included);
the handler gets it as a keyword argument. `query` and `body` are types for msgspec (a `Struct` for the query), or
pydantic's models: they are checked before the handler runs, and stand decoded in `request.query` and `request.body`. A
name may stand in the query several times where its field is a list (or a set, a tuple).

Matching is one step, however many routes there are: a dictionary for the paths without parameters, one regular
expression for all the others. Its alternatives end in an empty group each, so that `match.lastindex` tells which one
it was: `/users/{id}/x` and `/topics/{name}` become `/users/([^/]+)/x()|/topics/([^/]+)()`.
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

#: An async generator of events, or a coroutine; of the request, and of the path's parameters by name.
Handler = Callable[..., AsyncIterator[Event] | Awaitable[Any]]

# 18 digits: what fits into SQLite's and JavaScript's idea of a whole number, and no time is lost on a longer one.
_CONVERTERS: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "": (r"([^/]+)", str),
    "int": (r"(-?[0-9]{1,18})", int),
    "path": (r"(.+)", str),
}
#: A parameter of a path: its name, and its type.
PARAMETER: Final = re.compile(r"{([^{}:]*)(?::([^{}]*))?}")


@dataclass(frozen=True, slots=True)
class Upload:
    """A body that is spooled to disk, not decoded: `request.body` is a binary file at its start."""

    media_type: str
    max_bytes: int | None = None  #: None: the setting `max_import_bytes`


@dataclass(frozen=True, slots=True)
class About:
    """Properties of a run, derived from the request that starts it."""

    #: The thread that the run belongs to, such as a chat. `GET /runs?thread=` lists a thread's runs.
    thread: str | None = None
    #: The idempotency key, if the client names the run in its body. It replaces the header `Idempotency-Key`.
    key: str | None = None
    #: What its caller knows it by: kept with the run, cut to `runs.MAX_ABOUT_CHARS`, and shown to that caller alone by
    #: `GET /runs` and `GET /runs/<id>`.
    text: str = ""
    #: A small JSON object, stored with the run. The dialect gets it when the engine ends the run, also after a restart.
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """Makes a route resumable: its generator works detached from any connection, into the log (see `runs`)."""

    #: What becomes of a run that nobody reads: it is cancelled after so many seconds; `None`: it goes on.
    #: "setting": as the setting `linger_s` says.
    linger_s: float | Literal["setting"] | None = None
    #: Makes the route *detached*: nobody reads the run here. A request is answered at once with what this gives for it
    #: and the run's id (a `Response`, to say where the run can be read), as others are with `Prefer: respond-async`.
    #: It may be an async function, which may wait for the run's end (`request.runs.whole`), and is not asked where the
    #: client prefers not to wait; `None` streams the run after all.
    accepted: Callable[[Any, str], Any] | None = None
    #: A function of the request: what its caller knows the run by in a list, such as the prompt; or an `About`, which
    #: has more. An exception refuses the request.
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
    """One line of the table. `streams` says whether the handler is an async generator (of events) or a coroutine."""

    method: str
    path: str
    handler: Callable[..., Any]
    query: Any = None
    body: Any = None
    #: The media types that a JSON body may have.
    media_types: Sequence[str] = ("application/json",)
    #: The form of the engine's own events (error, cancelled, gap, the last one) in this route's streams.
    dialect: Dialect = NAMED
    #: The stream survives its connection.
    run: Run | None = None
    #: Anybody may, whatever credentials are configured.
    open: bool = False
    #: Counts against the caller's rate of publications.
    publishes: bool = False
    #: For `/openapi.json`: the types of the events' data by their names, `"message"` for those without one. `str` is
    #: text as it is, `None` no data, anything else JSON. Nothing is checked by it. `{}`: a stream of any events.
    events: Mapping[str, Any] | None = None
    #: The right that a token needs for it, with path parameters: `publish:topics/{name}`. Empty: any token will do.
    may: str = ""
    #: Stands for a route of an embedding program, for one request: nothing of it is in a table, and `handler` gives an
    #: iterator that is there already.
    hosted: bool = False
    streams: bool = field(init=False)
    #: The parameters of the query that may come several times.
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
            object.__setattr__(self, "lists", frozenset(_lists(self.query)))
            if not isinstance(self.body, Upload):
                _check(self.body)
            for kind in (self.events or {}).values():
                _check(kind)
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
        """As "GET /chat"; of a run that a program starts by itself, the name that the program gave it."""
        return f"{self.method} {self.path}".strip()


class Options(TypedDict, total=False):
    """What a route may have besides its path and its handler; each as in `Route`."""

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
    """A route for GET, and for HEAD: that answers the headers and starts nothing. `options` are `Route`'s."""
    return Route("GET", path, handler, **options)


def POST(path: str, handler: Handler, **options: Unpack[Options]) -> Route:
    """A route for POST. `options` are `Route`'s."""
    return Route("POST", path, handler, **options)


def PUT(path: str, handler: Handler, **options: Unpack[Options]) -> Route:
    """A route for PUT. `options` are `Route`'s."""
    return Route("PUT", path, handler, **options)


def PATCH(path: str, handler: Handler, **options: Unpack[Options]) -> Route:
    """A route for PATCH. `options` are `Route`'s."""
    return Route("PATCH", path, handler, **options)


def DELETE(path: str, handler: Handler, **options: Unpack[Options]) -> Route:
    """A route for DELETE. `options` are `Route`'s."""
    return Route("DELETE", path, handler, **options)


def is_model(kind: Any) -> bool:
    """Whether it is a class of pydantic's, which needn't be installed."""
    return isinstance(kind, type) and all(
        hasattr(kind, name) for name in ("model_fields", "model_validate", "model_validate_json")
    )


def _check(kind: Any) -> Any:
    """What msgspec finds in a type that a body is to be decoded into. Raises `TypeError` if that can't be done."""
    if kind is None:
        return None
    if kind is Run or isinstance(kind, Upload | Run | Route):
        raise TypeError(f"{kind!r} is not the type of a body")
    try:
        info = types.type_info(kind)
        msgspec.json.Decoder(kind, dec_hook=lambda kind, value: value)
    except Exception as error:  # of a name in an annotation that isn't there, say
        raise TypeError(f"{kind!r} can't be decoded into: {error}") from error
    for found in _inside(info, set()):
        if isinstance(found, types.CustomType) and not is_model(found.cls):
            raise TypeError(f"{found.cls!r} can't be decoded into: a Struct, a dataclass or a model of pydantic's can")
    return info


def _inside(info: Any, seen: set[int]) -> Iterator[types.Type]:
    """A type and those that it is made of, each once."""
    if isinstance(info, types.Type):
        if id(info) in seen:
            return
        seen.add(id(info))
        yield info
    if isinstance(info, types.Type | types.Field):
        for name in info.__struct_fields__:
            yield from _inside(getattr(info, name), seen)
    elif isinstance(info, tuple):
        for part in info:
            yield from _inside(part, seen)


_LISTS: Final = (types.ListType, types.SetType, types.FrozenSetType, types.VarTupleType, types.TupleType)


def _lists(query: Any) -> Iterator[str]:
    """The names of the fields that are lists. Raises `TypeError` for what is no type of a query."""
    info = _check(query)
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
        raise TypeError(f"query must be a Struct, a dataclass, a TypedDict or a model of pydantic's, not {query!r}")
    for of_struct in info.fields:
        kind = of_struct.type
        if any(isinstance(one, _LISTS) for one in (kind.types if isinstance(kind, types.UnionType) else (kind,))):
            yield of_struct.encode_name


class Table:
    """All routes, ready to match. Where two paths with parameters fit, the one that stands first wins."""

    def __init__(self, routes: Sequence[Route]) -> None:
        #: All that the routes have, for runs that were begun by an earlier process. Raises `ValueError`.
        self.dialects = list({id(route.dialect): route.dialect for route in routes}.values())
        for dialect in self.dialects:
            others = [other for other in [*DIALECTS.values(), *self.dialects] if other is not dialect]
            if any(other.name == dialect.name for other in others):
                raise ValueError(f"{type(dialect).__name__}: there is another dialect named {dialect.name!r}")
        by_path: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods = by_path.setdefault(route.path, {})
            if route.method in methods:
                raise ValueError(f"{route.method} {route.path} stands in the table twice")
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
        # DOTALL: a line end is a character of a path like any other.
        self._pattern = re.compile("|".join(alternatives) or "(?!)", re.DOTALL)
        # The same with any text where a whole number should be, to say what is wrong with it.
        pattern = "|".join(alternatives).replace(_CONVERTERS["int"][0], _CONVERTERS[""][0])
        self._nearly = re.compile(pattern or "(?!)", re.DOTALL)

    def match(self, method: str, path: str) -> tuple[Route, dict[str, Any]]:
        """The route and its path parameters. Raises `NotFound`, or `MethodNotAllowed` with `Allow`.

        `BadRequest`: of a path that is there but for a parameter that must be a whole number and isn't.
        """
        methods = self._static.get(path)
        parameters: dict[str, Any] = {}
        if methods is None:
            match = self._pattern.fullmatch(path)
            if match is None or match.lastindex is None:
                raise self._unknown(path)
            methods, first, converters = self._dynamic[match.lastindex]
            parameters = {name: convert(match[first + at]) for at, (name, convert) in enumerate(converters)}
        route = methods.get(method)
        if route is None:
            allow = ", ".join(sorted(methods))
            raise MethodNotAllowed(f"this path takes {allow}", headers={"allow": allow})
        return route, parameters

    def _unknown(self, path: str) -> NotFound | BadRequest:
        match = self._nearly.fullmatch(path)
        if match is not None and match.lastindex is not None:
            _, first, converters = self._dynamic[match.lastindex]
            for at, (name, convert) in enumerate(converters):
                if convert is int and not re.fullmatch(_CONVERTERS["int"][0], match[first + at]):
                    return BadRequest(f"{name} in the path must be a whole number, of 18 digits at most", field=name)
        return NotFound("there is nothing at this path")


def _compile(path: str) -> tuple[str, list[tuple[str, Callable[[str], Any]]]]:
    pattern, parameters, at = "", list[tuple[str, Callable[[str], Any]]](), 0
    for match in PARAMETER.finditer(path):
        name, kind = match[1], match[2] or ""
        if not re.fullmatch("[a-z_][a-z0-9_]*", name) or name in dict(parameters):
            raise ValueError(f"{path}: {name!r} is no name for a path parameter, or is there twice")
        if kind not in _CONVERTERS:
            raise ValueError(f"{path}: unknown type {kind!r} of a path parameter; there are int and path")
        group, convert = _CONVERTERS[kind]
        pattern += re.escape(path[at : match.start()]) + group
        parameters.append((name, convert))
        at = match.end()
    if "{" in path[at:] or "}" in PARAMETER.sub("", path):
        raise ValueError(f"{path}: a brace is left over; a path parameter is {{name}}, {{name:int}} or {{name:path}}")
    return pattern + re.escape(path[at:]), parameters
