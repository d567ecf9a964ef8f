"""For the front ends' protocols: converts a client's messages to a question, and the agent's steps to parts.

Parts are opened, filled and closed one at a time. Their ids are the same in each replay.
"""

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from handlers.agent import MAX_QUESTION_CHARS, End, Status, Thought, Token, ToolResult, ToolStart, steps_of
from handlers.answer import Reasoning
from handlers.database import Exchange, bounded
from ssecore.errors import BadRequest
from ssecore.http.request import Request

__all__ = [
    "Called",
    "Closed",
    "Delta",
    "Opened",
    "Part",
    "Returned",
    "blamed",
    "conversation",
    "parts_of",
    "question_of",
    "text_of",
]

Kind = Literal["text", "reasoning"]


@dataclass(frozen=True, slots=True)
class Opened:
    kind: Kind
    id: str


@dataclass(frozen=True, slots=True)
class Delta:
    kind: Kind
    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    kind: Kind
    id: str
    text: str  #: all of it


@dataclass(frozen=True, slots=True)
class Called:
    id: str
    tool: str
    arguments: str  #: a JSON object


@dataclass(frozen=True, slots=True)
class Returned:
    id: str  #: the call's
    tool: str
    result: dict[str, Any]  #: `{"error": <text>}` if the tool failed


Part = Status | Opened | Delta | Closed | Called | Returned | End


async def parts_of(request: Request, question: str, history: list[Exchange]) -> AsyncGenerator[Part, None]:
    """The agent's answer. Use with `aclosing`. Raises what the model and the database raise."""
    ids = (f"{request.run_id}-{number}" for number in count(1))
    opened: Opened | None = None
    said: list[str] = []
    call = ""
    async with steps_of(request, question, history) as steps:
        async for step in steps:
            kind: Kind | None = (
                "text" if isinstance(step, Token) else "reasoning" if isinstance(step, Reasoning) else None
            )
            if opened is not None and opened.kind != kind:
                yield Closed(opened.kind, opened.id, "".join(said))
                opened, said = None, []
            match step:
                case Token(text) | Reasoning(text):
                    if opened is None:
                        assert kind is not None
                        opened = Opened(kind, next(ids))
                        yield opened
                    said.append(text)
                    yield Delta(opened.kind, opened.id, text)
                case Thought(_, text):
                    id = next(ids)
                    yield Opened("reasoning", id)
                    yield Delta("reasoning", id, text)
                    yield Closed("reasoning", id, text)
                case ToolStart(tool, arguments):
                    call = next(ids)  # not the model's, which some servers repeat in each round
                    yield Called(call, tool, arguments)
                case ToolResult(tool, result):
                    yield Returned(call, tool, result)
                case Status() | End():
                    yield step


def text_of(content: Any) -> str:
    """The text of a message's content, a string or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text", part.get("content")) for part in parts if isinstance(part, dict) and _is_text(part))
    return "".join(text for text in texts if isinstance(text, str))


def _is_text(part: dict[Any, Any]) -> bool:
    return part.get("type") in ("text", "input_text", "output_text")


@contextmanager
def blamed(field: str) -> Iterator[None]:
    """Sets the field of a `BadRequest` raised in the block to the client's name for it."""
    try:
        yield
    except BadRequest as error:
        error.field = field
        raise


def question_of(messages: Iterable[tuple[str, str]]) -> str:
    """The last user's text among roles and texts, for the list of runs. Empty if there is none."""
    return next((text for role, text in reversed([*messages]) if role == "user" and text.strip()), "")


def conversation(messages: Iterable[tuple[str, str]], field: str = "messages") -> tuple[str, list[Exchange]]:
    """The last question, and the exchanges before it, of roles and texts, oldest first. Raises `BadRequest` with the
    field."""
    exchanges: list[Exchange] = []
    question = answer = ""
    for role, text in messages:
        if role == "user" and text.strip():
            if question and answer:
                exchanges.append(Exchange(question, answer))
            question, answer = text, ""
        elif role == "assistant":
            answer += text
    if not question:
        raise BadRequest(f"{field}: at least one message must be a user's, with text", field=field)
    if len(question) > MAX_QUESTION_CHARS:
        raise BadRequest(f"{field}: the question is longer than {MAX_QUESTION_CHARS} characters", field=field)
    return question, bounded(exchanges) if exchanges else []
