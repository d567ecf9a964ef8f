"""The agent without a model: chooses tools by the words of a question, and writes an answer from their results.

It uses a list of English words and no grammar. By default it searches the tasks for any of the question's words.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, Final

from handlers.answer import ToolCall
from handlers.tools import MAX_WORDS_CHARS
from ssecore.wire import encode_json

__all__ = ["counted", "plan", "write"]

_WORD: Final = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
#: Arithmetic between numbers; dates are excluded later.
_EXPRESSION: Final = re.compile(r"(?<![\w.])[-+( ]{0,20}\.?\d(?:[\d .()+*/%^\u00d7·÷\u2212-]|(?<=\d)[eE][+-]?(?=\d))*")
_OPERATOR: Final = re.compile(r"[\d)] ?(?:\*\*|//|[-+*/%^\u00d7·÷\u2212]) ?[-+(.\d]")
_DATE: Final = re.compile(r" *\d{4}-\d\d?-\d\d? *")
_SPOKEN: Final = {r"\bplus\b": "+", r"\bminus\b": "-", r"\btimes\b|\bmultiplied by\b": "*", r"\bdivided by\b": "/"}

#: `3-4` and `24/7` may be something else, but an expression with one of these signs is arithmetic.
_UNAMBIGUOUS: Final = re.compile(r"[+*^%\u00d7·÷]")
_CALCULATING: Final = frozenset("calculate compute calculation evaluate arithmetic math".split())
_TELLING_TIME: Final = frozenset("date day weekday time".split())
_COUNTING: Final = frozenset("count number total statistics overview breakdown group grouped".split())
_FINDING: Final = frozenset("search find list show task tasks todo todos due".split())
#: Words that don't describe the subject.
_PLAIN: Final = frozenset(
    """a about all am an and any are as at be been but by can could did do does each every equal equals for from get
    give got had has have how i if in into is it its know like many mention mentioning mentions me much my need of on or
    our out per please should so some tell that the their them then there these they this those to up us was we were
    today's what what's whats when where which who whose why will with without would you your status priority""".split()
)
_STATUSES: Final = {
    "open": "open",
    "doing": "doing",
    "progress": "doing",
    "done": "done",
    "finished": "done",
    "completed": "done",
}
_DAYS: Final = {"overdue": "overdue", "late": "overdue", "today": "today", "week": "week", "later": "later"}
#: These refer to the subject of the previous question.
_REFERRING: Final = frozenset("it its them these they those ones".split())
_GROUPS: Final = re.compile(r"\b(?:by|per|each|every)\s+(?:their\s+)?(status|priority|due)\b")
_PRIORITY: Final = re.compile(r"\b(?:priority|prio)\s*(?:of\s+|is\s+)?([1-5])\b")
_UNDATED: Final = re.compile(r"\b(?:no|without an?) (?:due )?date\b")


_Call = tuple[str, Mapping[str, Any]]

#: How many previous questions are read for what a question refers to.
MAX_EARLIER: Final = 10


def plan(question: str, earlier: Sequence[str] = ()) -> list[ToolCall]:
    """At most three calls; none for a question without a word. `earlier`: the previous questions."""
    selected: dict[str, Any] = {}
    for before in earlier[-MAX_EARLIER:]:
        _, selected = _planned(before, selected)
    calls, _ = _planned(question, selected)
    return [ToolCall(f"call_{number}", name, encode_json(given).decode()) for number, (name, given) in enumerate(calls)]


def _planned(question: str, before: dict[str, Any]) -> tuple[list[_Call], dict[str, Any]]:
    """The calls, and the arguments that select tasks, if the question is about tasks. `before`: the same of the
    previous question; a question that refers to it adds to them."""
    text = plain = " ".join(question.lower().split())
    for pattern, sign in _SPOKEN.items():
        text = re.sub(pattern, sign, text)
    calls: list[_Call] = []
    expression = _expression(text)
    text = text.replace(expression, " ") if expression else text
    words = _WORD.findall(text)
    if expression and (_UNAMBIGUOUS.search(expression) or _CALCULATING.intersection(words) or not _subject(words)):
        calls.append(("calculate", {"expression": expression.strip()}))
    elif expression:
        text, words = plain, _WORD.findall(plain)
    if _TELLING_TIME.intersection(words) and not _UNDATED.search(text) and "due" not in words:
        calls.append(("today", {}))
    refers = bool(_REFERRING.intersection(words)) or words[:1] == ["and"]
    which = (before if refers else {}) | _which(text, words)
    if _COUNTING.intersection(words) or "how many" in text:
        group = _GROUPS.search(text)
        calls.append(("count_tasks", which | ({"by": group[1]} if group else {})))
    elif _FINDING.intersection(words) or (not calls and which):
        calls.append(("search_tasks", which | ({"match": "any"} if "words" in which else {})))
    else:
        which = before if refers else {}
        if not calls and words:
            calls.append(("search_tasks", {"words": " ".join(words)[:MAX_WORDS_CHARS], "match": "any"}))
    return calls, which


def _expression(text: str) -> str:
    """The first arithmetic expression in a text, or ""."""
    pieces = (match[0].rstrip(" .+-*/%^(\u00d7·÷\u2212") for match in _EXPRESSION.finditer(text))
    return next((piece for piece in pieces if _OPERATOR.search(piece) and not _DATE.fullmatch(piece)), "")


def _which(text: str, words: Sequence[str]) -> dict[str, Any]:
    """The arguments that select tasks."""
    which: dict[str, Any] = {}
    for word in words:
        if word in _STATUSES:
            which["status"] = _STATUSES[word]
        if word in _DAYS:
            which["due"] = _DAYS[word]
    if "due" in which and _TELLING_TIME.intersection(words) and not _FINDING.intersection(words):
        del which["due"]  # "what day is today"
    if _UNDATED.search(text):
        which["due"] = "none"
    if priority := _PRIORITY.search(text):
        which["priority"] = int(priority[1])
        words = [word for word in words if word != priority[1]]
    if subject := _subject(words):
        which["words"] = " ".join(subject)[:MAX_WORDS_CHARS]
    return which


def _subject(words: Sequence[str]) -> list[str]:
    """The words to search for."""
    known = _PLAIN | _CALCULATING | _TELLING_TIME | _COUNTING | _FINDING | _STATUSES.keys() | _DAYS.keys()
    return [word for word in words if word not in known]


def write(results: Sequence[tuple[ToolCall, Mapping[str, Any]]]) -> str:
    """The answer."""
    if not results:
        return (
            "The question has no word that I could search for. I can search and count tasks, do arithmetic, and tell "
            "the date."
        )
    return "\n\n".join(_written(call, result) for call, result in results)


def _written(call: ToolCall, result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"I could not do that: {result['error']}."
    return _WRITERS[call.name](json.loads(call.arguments), result)


def _write_found(given: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    rows, total = result["tasks"], result["found"]
    if not total:
        return "I found no task that matches."
    shown = f"; the first {len(rows)} of them" if total > len(rows) else ""
    lines = [f"I found {counted(total, 'task')}{shown}:"]
    for row in rows:
        due = f", due {row['due']}" if row["due"] else ""
        lines.append(f"- #{row['id']} {row['title']} ({row['status']}, priority {row['priority']}{due})")
    return "\n".join(lines)


def _write_counted(given: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    which = ", ".join(f"{name} {given[name]}" for name in ("words", "status", "priority", "due") if name in given)
    text = f"I counted {counted(result['count'], 'task')}{f' ({which})' if which else ''}."
    groups = ", ".join(f"{name} {number}" for name, number in result.get("groups", {}).items())
    return f"{text} By {result['by']}: {groups}." if groups else text


def _write_calculated(given: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    return f"{result['expression']} = {result['value']}"


def _write_today(given: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    day = date.fromisoformat(result["date"])
    return f"Today is {result['weekday']}, {day.day} {day:%B %Y}, {result['time']} {result['timezone']}."


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


_WRITERS: Final = {
    "search_tasks": _write_found,
    "count_tasks": _write_counted,
    "calculate": _write_calculated,
    "today": _write_today,
}
