"""The agent's tools: search and count tasks, do arithmetic, tell the date. They are read-only.

Boundary of trust: the arguments come from a model or a question. They are converted to the tool's own type, with its
limits. A failed call has the result `{"error": <text>}`.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from handlers.arithmetic import MAX_CHARS, CalculationError, evaluate
from handlers.database import Due, Filter, Grouping, Status, Tasks
from ssecore.errors import BadRequest, SSEAppError

__all__ = ["DESCRIPTIONS", "MAX_ROWS", "use"]

#: Of a search.
MAX_ROWS: Final = 20
MAX_WORDS_CHARS: Final = 200

_DUE: Final = "by date; week: today and the next seven days; none: without a date; done: finished tasks, whatever date"


class _Which(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    words: (
        Annotated[str, Meta(max_length=MAX_WORDS_CHARS, description="words to find in title or description")]
        | UnsetType
    ) = UNSET
    match: Annotated[Literal["all", "any"], Meta(description="whether all of the words must occur, or any")] = "all"
    status: Status | UnsetType = UNSET
    priority: Annotated[int, Meta(ge=1, le=5)] | UnsetType = UNSET
    due: Annotated[Due, Meta(description=_DUE)] | UnsetType = UNSET

    def filter(self) -> Filter:
        words = self.words or None
        if words is not None and not any(char.isalnum() for char in words):
            raise BadRequest("words: must contain a word", field="words")
        return Filter(
            words=words,
            any_word=self.match == "any",
            status=self.status or None,
            priority=self.priority or None,
            due=self.due or None,
        )


class _Search(_Which):
    limit: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="how many of them to give")] = 10


class _Count(_Which):
    by: Annotated[Grouping, Meta(description="count each group by itself")] | UnsetType = UNSET


class _Calculation(msgspec.Struct, forbid_unknown_fields=True):
    expression: Annotated[str, Meta(max_length=MAX_CHARS, description="numbers, + - * / // % ** and parentheses")]


class _Nothing(msgspec.Struct):
    pass


async def _search(tasks: Tasks, asked: _Search) -> dict[str, Any]:
    total, found = await tasks.search(asked.filter(), asked.limit, datetime.now(UTC).date())
    return {"found": total, "tasks": [task._asdict() for task in found]}


async def _count(tasks: Tasks, asked: _Count) -> dict[str, Any]:
    groups = await tasks.count(asked.filter(), asked.by or None, datetime.now(UTC).date())
    if asked.by is UNSET:
        return {"count": groups["all"]}
    return {"count": sum(groups.values()), "by": asked.by, "groups": groups}


async def _calculate(tasks: Tasks, asked: _Calculation) -> dict[str, Any]:
    try:
        value = evaluate(asked.expression)
    except CalculationError as error:
        raise BadRequest(f"expression: {error}", field="expression") from None
    # A string, since JSON parsers may round large integers. 12 digits hide the error of binary fractions.
    return {"expression": asked.expression, "value": str(value) if isinstance(value, int) else f"{value:.12g}"}


async def _today(tasks: Tasks, asked: _Nothing) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"date": now.date().isoformat(), "weekday": f"{now:%A}", "time": f"{now:%H:%M}", "timezone": "UTC"}


@dataclass(frozen=True)
class _Tool:
    description: str
    input: type[Any]
    run: Callable[[Tasks, Any], Awaitable[dict[str, Any]]]


_TOOLS: Final[Mapping[str, _Tool]] = {
    "search_tasks": _Tool("Find tasks. Gives how many there are, and the first of them.", _Search, _search),
    "count_tasks": _Tool("Count tasks, all together or in groups.", _Count, _count),
    "calculate": _Tool("Do arithmetic.", _Calculation, _calculate),
    "today": _Tool("Tell today's date, weekday and time.", _Nothing, _today),
}


def _described(name: str, tool: _Tool) -> dict[str, Any]:
    _, components = msgspec.json.schema_components([tool.input], ref_template="{name}")
    schema = {key: value for key, value in components[tool.input.__name__].items() if key != "title"}
    return {"type": "function", "function": {"name": name, "description": tool.description, "parameters": schema}}


#: In OpenAI's format.
DESCRIPTIONS: Final = [_described(name, tool) for name, tool in _TOOLS.items()]


async def use(tasks: Tasks, name: str, arguments: str) -> dict[str, Any]:
    """A tool's result, or `{"error": <text>}`. `arguments` is a JSON object."""
    tool = _TOOLS.get(name)
    if tool is None:
        return {"error": f"unknown tool {name!r:.60}: the tools are {', '.join(_TOOLS)}"}
    try:
        given = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        # Models write null and "" for a missing argument, and "2" for 2.
        given = {key: value for key, value in given.items() if value not in (None, "")}
        return await tool.run(tasks, msgspec.convert(given, tool.input, strict=False))
    except msgspec.ValidationError as error:
        return {"error": f"invalid arguments: {error}"}
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return {"error": "the arguments are not a JSON object"}
    except SSEAppError as error:
        return {"error": error.detail}
