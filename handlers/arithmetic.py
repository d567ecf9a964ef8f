"""Evaluates arithmetic such as `2 * (3 + 4) ** 2`, with Python's numbers and precedence.

Boundary of trust: the text. Its length, its nesting and the size of numbers are limited: `9**9**9` is refused at once.
"""

import math
import operator
import re
from collections.abc import Callable
from typing import Final

__all__ = ["MAX_CHARS", "CalculationError", "evaluate"]

Number = int | float

MAX_CHARS: Final = 200
#: Nested parentheses, signs and powers.
MAX_DEPTH: Final = 40
#: Of an integer: like the largest float, 308 digits.
MAX_BITS: Final = 1024

_TOKEN: Final = re.compile(r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(\*\*|//|[-+*/%()])|(\S))", re.ASCII)
#: Other characters that people type as operators.
_SIGNS: Final = str.maketrans({"\u00d7": "*", "·": "*", "÷": "/", "\u2212": "-", "^": "**"})
#: By precedence; left-associative.
_OPERATORS: Final[tuple[dict[str, Callable[[Number, Number], Number]], ...]] = (
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod},
)


class CalculationError(ValueError):
    """Its text is for the user."""


def evaluate(text: str) -> Number:
    """Returns an `int` or a finite `float`. Raises `CalculationError`."""
    if len(text) > MAX_CHARS:
        raise CalculationError(f"the expression is too long: at most {MAX_CHARS} characters are allowed")
    try:
        return _Reader(text.translate(_SIGNS)).whole()
    except ZeroDivisionError:
        raise CalculationError("division by zero") from None
    except OverflowError:
        raise CalculationError("the result is too large") from None


class _Reader:
    """Parses and computes in one pass, without a tree."""

    def __init__(self, text: str) -> None:
        self._tokens = [match.groups() for match in _TOKEN.finditer(text)]
        self._at = 0
        self._depth = 0

    def whole(self) -> Number:
        value = self._sum()
        if self._at < len(self._tokens):
            raise CalculationError(f"{self._next()!r} is not expected here")
        return value

    def _next(self) -> str:
        """The current token; "" at the end."""
        number, sign, other = self._tokens[self._at] if self._at < len(self._tokens) else ("", "", "")
        return number or sign or other or ""

    def _take(self, *wanted: str) -> str:
        """Consume the token if it is one of these, else return ""."""
        found = self._next()
        if found not in wanted:
            return ""
        self._at += 1
        return found

    def _sum(self, strength: int = 0) -> Number:
        if strength == len(_OPERATORS):
            return self._signed()
        value = self._sum(strength + 1)
        while sign := self._take(*_OPERATORS[strength]):
            value = _bounded(_OPERATORS[strength][sign](value, self._sum(strength + 1)))
        return value

    def _signed(self) -> Number:
        """Like Python: `-2**2` is -4, `2**-1` is 0.5."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise CalculationError("the expression is nested too deeply")
        sign = self._take("+", "-")
        value = self._signed() if sign else self._power()
        self._depth -= 1
        return -value if sign == "-" else value

    def _power(self) -> Number:
        base = self._operand()
        return _power(base, self._signed()) if self._take("**") else base

    def _operand(self) -> Number:
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                raise CalculationError("a closing parenthesis is missing")
            return value
        text = self._next()
        if not text:
            raise CalculationError("the expression is incomplete")
        if text[0] not in ".0123456789" or text == ".":
            raise CalculationError(f"{text!r} is not expected here")
        self._at += 1
        return _bounded(int(text) if text.isdecimal() else float(text))


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1 and exponent > 0:
        if (abs(base).bit_length() - 1) * exponent > MAX_BITS:  # a lower bound of the result's bits
            raise OverflowError
    value = base**exponent
    if isinstance(value, complex):
        raise CalculationError("can't take a root of a negative number")
    return _bounded(value)


def _bounded(value: Number) -> Number:
    if value.bit_length() > MAX_BITS if isinstance(value, int) else not math.isfinite(value):
        raise OverflowError
    return value
