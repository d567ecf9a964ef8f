"""The table: which path finds which handler, what a path parameter may be, and which tables are refused."""

import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssecore.errors import BadRequest, MethodNotAllowed, NotFound
from ssecore.http.request import Request
from ssecore.http.routes import DELETE, GET, PATCH, POST, PUT, Route, Run, Table, Upload
from ssecore.wire import Event
from tests.needs import needs


async def handler(request: Request, **params: Any) -> None:
    """Takes whatever parameters its path has."""


async def stream(request: Request, **params: Any) -> AsyncIterator[Event]:
    yield Event("")


def found(table: Table, path: str, method: str = "GET") -> tuple[str, dict[str, Any]] | None:
    """The template of the route that answers, and the parameters; `None` is a 404."""
    try:
        route, params = table.match(method, path)
    except NotFound:
        return None
    return route.path, params


def table(*templates: str) -> Table:
    return Table([GET(template, handler) for template in templates])


# Paths


def test_a_path_without_parameters_is_taken_as_it_stands() -> None:
    routes = table("/", "/a", "/a/b", "/a.b", "/a+(b)|c")
    for path in ("/", "/a", "/a/b", "/a.b", "/a+(b)|c"):
        assert found(routes, path) == (path, {})
    for path in ("", "//", "/A", "/a/", "/a/b/", "a", "/axb", "/aa(b)", "/a\n", "/a\0"):
        assert found(routes, path) is None


@pytest.mark.parametrize(
    "value", ["x", "a b", "ä", "😀", "%2F", "a\nb", "\n", "\r\n", "a\0b", "\0", "..", "{name}", "()"]
)
def test_a_segment_is_any_text_without_a_slash(value: str) -> None:
    assert found(table("/users/{name}"), f"/users/{value}") == ("/users/{name}", {"name": value})
    assert found(table("/users/{name}/x"), f"/users/{value}/x") == ("/users/{name}/x", {"name": value})


@pytest.mark.parametrize("path", ["/users/", "/users", "/users/a/b", "/users/a/", "/users//", "/USERS/a", "/xusers/a"])
def test_a_segment_is_one_and_not_empty(path: str) -> None:
    assert found(table("/users/{name}"), path) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("7", 7), ("007", 7), ("-0", 0), ("-12", -12), ("9" * 18, 10**18 - 1), ("-" + "9" * 18, 1 - 10**18)],
)
def test_a_number_comes_as_an_int(text: str, number: int) -> None:
    assert found(table("/jobs/{id:int}"), f"/jobs/{text}") == ("/jobs/{id:int}", {"id": number})


@pytest.mark.parametrize(
    "text",
    [
        "-",
        "--1",
        "+1",
        "1.0",
        "1e3",
        "1_0",
        " 1",
        "1 ",
        "1\n",
        "1\0",
        "0x1",
        "abc",
        "٣",
        "²",
        "1" * 19,
        "1" * 10**5,
    ],
)
def test_what_is_no_number_that_a_database_holds_is_refused_by_its_name(text: str) -> None:
    for path, asked in (("/jobs/{id:int}", f"/jobs/{text}"), ("/{a}/{b:int}/{id:int}/c", f"/x/1/{text}/c")):
        with pytest.raises(BadRequest, match=r"^id in the path must be a whole number") as refusal:
            table(path).match("GET", asked)
        assert refusal.value.field == "id"


@pytest.mark.parametrize("text", ["", "1/", "a/b"])
def test_no_segment_and_more_than_one_are_nothing_there(text: str) -> None:
    assert found(table("/jobs/{id:int}"), f"/jobs/{text}") is None


def test_what_is_no_number_may_be_another_routes_word() -> None:
    assert found(table("/jobs/{id:int}", "/jobs/{name}"), "/jobs/abc") == ("/jobs/{name}", {"name": "abc"})


@pytest.mark.parametrize("rest", ["a", "a/b", "a/b/", "/", "//", "../a", "a\nb/c", "\0", "ä/ö"])
def test_a_path_parameter_takes_the_rest(rest: str) -> None:
    assert found(table("/files/{path:path}"), f"/files/{rest}") == ("/files/{path:path}", {"path": rest})


def test_the_rest_is_not_empty() -> None:
    assert found(table("/files/{path:path}"), "/files/") is None
    assert found(table("/files/{path:path}"), "/files") is None


def test_several_parameters_each_get_their_own() -> None:
    routes = table("/{user}/jobs/{job_id:int}/files/{path:path}", "/{from}-{to}.{kind}")
    assert found(routes, "/ann/jobs/3/files/a/b") == (
        "/{user}/jobs/{job_id:int}/files/{path:path}",
        {"user": "ann", "job_id": 3, "path": "a/b"},
    )
    assert found(routes, "/1-2-3.a.b") == ("/{from}-{to}.{kind}", {"from": "1-2", "to": "3.a", "kind": "b"})


def test_characters_of_a_regular_expression_mean_themselves() -> None:
    routes = table("/a.b/{name}", "/(x)?/{name}", "/[0-9]+/{name}")
    assert found(routes, "/a.b/1") == ("/a.b/{name}", {"name": "1"})
    assert found(routes, "/(x)?/1") == ("/(x)?/{name}", {"name": "1"})
    assert found(routes, "/[0-9]+/1") == ("/[0-9]+/{name}", {"name": "1"})
    for path in ("/axb/1", "/x/1", "//1", "/12/1"):
        assert found(routes, path) is None


# Which of several


@pytest.mark.parametrize("templates", [("/x/{name}", "/x/me"), ("/x/me", "/x/{name}"), ("/{path:path}", "/x/me")])
def test_a_path_without_parameters_wins_over_those_with(templates: tuple[str, ...]) -> None:
    assert found(table(*templates), "/x/me") == ("/x/me", {})


@pytest.mark.parametrize(
    "templates", [("/x/{id:int}", "/x/{name}"), ("/x/{name}", "/x/{id:int}"), ("/{p:path}", "/x/{n}")]
)
def test_of_two_that_fit_the_first_wins(templates: tuple[str, str]) -> None:
    answer = found(table(*templates), "/x/12")
    assert answer is not None
    assert answer[0] == templates[0]


def test_a_template_that_fails_at_its_end_lets_the_next_try() -> None:
    routes = table("/x/{name}/end", "/x/{name}/{id:int}", "/x/{path:path}")
    assert found(routes, "/x/a/end") == ("/x/{name}/end", {"name": "a"})
    assert found(routes, "/x/a/12") == ("/x/{name}/{id:int}", {"name": "a", "id": 12})
    assert found(routes, "/x/a/12b") == ("/x/{path:path}", {"path": "a/12b"})


@needs("time")
def test_ten_thousand_routes_are_each_found() -> None:
    routes = table(*(f"/r{n}/{{name}}/{{id:int}}" for n in range(10_000)), *(f"/s{n}" for n in range(1_000)))
    for n in (0, 1, 99, 100, 101, 5_000, 9_999):
        assert found(routes, f"/r{n}/x/{n}") == (f"/r{n}/{{name}}/{{id:int}}", {"name": "x", "id": n})
        assert found(routes, f"/s{n}") == ((f"/s{n}", {}) if n < 1_000 else None)
    assert found(routes, "/r10000/x/1") is None


def test_an_empty_table_has_nothing() -> None:
    assert found(Table([]), "/") is None
    assert found(Table([]), "") is None


# Methods


def test_each_method_of_a_path_finds_its_own_route() -> None:
    routes = [GET("/a/{id}", handler), POST("/a/{id}", stream), DELETE("/a/{id}", handler), POST("/a", handler)]
    for route in routes:
        path = route.path.replace("{id}", "1")
        assert Table(routes).match(route.method, path)[0] is route


def test_head_is_answered_by_get() -> None:
    get = GET("/a", handler)
    assert Table([get]).match("HEAD", "/a") == (get, {})


def test_a_route_of_its_own_for_head_wins_over_that_of_get() -> None:
    get, head = GET("/a", handler), Route("HEAD", "/a", handler)
    for routes in ([head, get], [get, head]):
        assert Table(routes).match("HEAD", "/a")[0] is head
        assert Table(routes).match("GET", "/a")[0] is get


@pytest.mark.parametrize(
    ("routes", "method", "allow"),
    [
        ([GET("/a", handler)], "POST", "GET, HEAD"),
        ([POST("/a", handler)], "GET", "POST"),
        ([POST("/a", handler)], "HEAD", "POST"),
        ([POST("/a", handler), GET("/a", handler), DELETE("/a", handler)], "PUT", "DELETE, GET, HEAD, POST"),
        ([POST("/{x}", handler), GET("/{x}", handler)], "OPTIONS", "GET, HEAD, POST"),
        ([GET("/a", handler)], "get", "GET, HEAD"),
    ],
)
def test_another_method_is_refused_with_those_that_there_are(routes: list[Route], method: str, allow: str) -> None:
    with pytest.raises(MethodNotAllowed) as refused:
        Table(routes).match(method, "/a")
    assert refused.value.headers == {"allow": allow}
    assert refused.value.status == 405


def test_an_unknown_path_is_not_found_whatever_the_method() -> None:
    for method in ("GET", "POST", "BREW"):
        with pytest.raises(NotFound):
            table("/a").match(method, "/b")


# Tables that are refused when they are made


@pytest.mark.parametrize("template", ["/a", "/a/{name}"])
def test_a_route_that_stands_twice_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=rf"POST {re.escape(template)} .*twice"):
        Table([POST(template, handler), GET(template, handler), POST(template, stream)])


@pytest.mark.parametrize("kind", ["uuid", "str", "float", "integer", "int32", "INT"])
def test_an_unknown_type_of_a_parameter_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=kind):
        table(f"/a/{{name:{kind}}}")


@pytest.mark.parametrize("template", ["/a/{", "/a/{name", "/a/{}", "/a/{:int}", "/a/{NAME}", "/a/{na me}"])
def test_a_parameter_that_is_misspelt_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=re.escape(template)):
        table(template)


def test_two_parameters_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="name"):
        table("/a/{name}/{name}")


@pytest.mark.parametrize("template", ["", "a", "{path:path}"])
def test_a_path_that_does_not_begin_with_a_slash_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="/"):
        table(template)


def _plain(request: Request) -> None: ...


async def _takes_name(request: Request, name: str) -> None: ...


async def _takes_nothing() -> None: ...


async def _takes_more(request: Request, name: str, more: int) -> AsyncIterator[Event]:
    yield Event("")


@pytest.mark.parametrize("not_a_handler", [_plain, lambda request: None, dict, None, "handler"])
def test_a_handler_is_an_async_generator_or_an_async_function(not_a_handler: Any) -> None:
    with pytest.raises(TypeError, match="GET /a"):
        GET("/a", not_a_handler)


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        ("/a", _takes_name),
        ("/a/{other}", _takes_name),
        ("/a/{name}/{other}", _takes_name),
        ("/a", _takes_nothing),
        ("/a/{name}", _takes_more),
    ],
)
def test_a_handler_takes_the_parameters_of_its_path(template: str, wrong: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=f"GET {template}.*path parameters"):
        GET(template, wrong)


def test_a_route_knows_whether_it_streams() -> None:
    assert GET("/a", stream).streams
    assert not GET("/a", handler).streams


# Against a matcher that walks over all routes

#: A template is a sequence of texts and of kinds of parameters, which are one character each here.
_KINDS = {"#": "{%s:int}", "?": "{%s}", "*": "{%s:path}"}


def template(parts: str) -> str:
    """`/a/?` is `/a/{p0}`."""
    names = iter(f"p_{letter}" for letter in "abcdefghijklmnop")
    return "".join(_KINDS[part] % next(names) if part in _KINDS else part for part in parts)


def walk(parts: str, path: str) -> list[Any] | None:
    """The values of the parameters where the path fits: each takes as much as it can, the first first."""
    if not parts:
        return None if path else []
    part, rest = parts[0], parts[1:]
    if part not in _KINDS:
        return walk(rest, path[1:]) if path.startswith(part) else None
    for end in range(len(path), 0, -1):
        value = path[:end]
        if part == "?" and "/" in value:
            continue
        if part == "#" and not re.fullmatch("-?[0-9]{1,18}", value):
            continue
        more = walk(rest, path[end:])
        if more is not None:
            return [int(value) if part == "#" else value, *more]
    return None


def naive(routes: list[tuple[str, str]], method: str, path: str) -> Any:
    """What a walk over the table gives: a template with its values, or the methods that are allowed, or `None`."""
    fitting: tuple[str, list[Any]] | None = None
    for parts in [parts for _, parts in routes if parts == path] or [parts for _, parts in routes]:
        values = walk(parts, path)
        if values is not None:
            fitting = (parts, values)
            break
    if fitting is None:
        return None
    methods = {method for method, parts in routes if parts == fitting[0]}
    methods |= {"HEAD"} if "GET" in methods else set()
    return (template(fitting[0]), fitting[1]) if method in methods else ", ".join(sorted(methods))


_PARTS = st.lists(st.sampled_from(["/", "a", "b", ".", "(", "/a/", "/?", "/#", "/*", "?", "-", "1"]), max_size=5).map(
    lambda parts: re.sub(r"([?#*])[?#*]+", r"\1", "/" + "".join(parts))
)
_ROUTES = st.lists(
    st.tuples(st.sampled_from(["GET", "POST"]), _PARTS), max_size=6, unique_by=lambda route: (route[0], route[1])
)
_PATHS = st.lists(st.sampled_from(["/", "a", "b", ".", "(", "/a/", "-", "1", "\n", "12"]), max_size=7).map(
    lambda parts: "/" + "".join(parts)
)


@settings(deadline=None, max_examples=500)
@given(routes=_ROUTES, path=_PATHS, method=st.sampled_from(["GET", "HEAD", "POST", "PUT"]))
@example(routes=[("GET", "/?/x/?"), ("GET", "/?/x")], path="/a/x", method="GET")
@example(routes=[("GET", "/?-?/b"), ("POST", "/*"), ("GET", "/?")], path="/a-b", method="HEAD")
@example(routes=[("GET", "/#"), ("POST", "/?")], path="/1", method="POST")
@example(routes=[("GET", "/?"), ("GET", "/a")], path="/a", method="GET")
def test_the_table_answers_as_a_walk_over_its_routes_does(
    routes: list[tuple[str, str]], path: str, method: str
) -> None:
    made = Table([Route(of, template(parts), handler) for of, parts in routes])
    answer: Any
    try:
        route, params = made.match(method, path)
        answer = route.path, list(params.values())
    except (NotFound, BadRequest):
        answer = None
    except MethodNotAllowed as error:
        answer = error.headers["allow"]
    assert answer == naive(routes, method, path)


@pytest.mark.parametrize("run", [True, False, 60, Run, {}])
def test_what_is_no_run_does_not_make_a_route_resumable(run: Any) -> None:
    with pytest.raises(TypeError, match=r"^GET /work: run must be a Run, as in run=Run\(\)"):
        GET("/work", stream, run=run)


class Plain:
    pass


class Recursive(msgspec.Struct):
    inner: "Recursive | None" = None
    plain: Plain | None = None


@pytest.mark.parametrize("query", [int, str, list[int], Plain, "Page", 5, Upload("text/csv"), Run, Run(), {}])
def test_what_is_no_type_of_a_query_is_refused_when_the_table_is_made(query: Any) -> None:
    with pytest.raises(TypeError, match=r"^GET /work: .*(query must be|can't be decoded into|is not the type)"):
        GET("/work", stream, query=query)


@pytest.mark.parametrize("body", [Plain, list[Plain], Recursive, 5, "Page", Run(), {}, dict[Plain, int]])
def test_what_is_no_type_of_a_body_is_refused_when_the_table_is_made(body: Any) -> None:
    with pytest.raises(TypeError, match=r"^POST /work: .*(can't be decoded into|is not the type)"):
        POST("/work", stream, body=body)


@pytest.mark.parametrize(
    ("method", "make"), [("GET", GET), ("POST", POST), ("PUT", PUT), ("PATCH", PATCH), ("DELETE", DELETE)]
)
def test_each_method_has_its_function(method: str, make: Callable[..., Route]) -> None:
    route = make("/work", handler, body=list[int], may="publish")
    assert (route.method, route.may) == (method, "publish")


async def later(request: Request) -> None:
    """Would have to be awaited."""


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"linger_s": "60"}, "linger_s"),
        ({"linger_s": True}, "linger_s"),
        ({"linger_s": -1}, "linger_s"),
        ({"linger_s": float("nan")}, "linger_s"),
        ({"linger_s": float("inf")}, "linger_s"),
        ({"accepted": "text"}, "accepted"),
        ({"about": "text"}, "about"),
        ({"about": later}, "about"),
    ],
)
def test_a_run_with_options_that_no_run_can_use_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be "):
        Run(**options)
