"""Arithmetic from a text, with Python's numbers and its rules of precedence: `2 * (3 + 4) ** 2`.

Boundary of trust: any text may come. What it may cost is bounded before it is computed: its length, how deep it nests,
and how large a number becomes. `9**9**9` is refused at once.
"""

import math
import operator
import re
from collections.abc import Callable
from typing import Final

__all__ = ["MAX_CHARS", "CalculationError", "evaluate"]

Number = int | float

MAX_CHARS: Final = 200
#: Of parentheses, signs and powers within each other.
MAX_DEPTH: Final = 40
#: Of a whole number: the size at which floats end, 308 digits.
MAX_BITS: Final = 1024

_TOKEN: Final = re.compile(r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(\*\*|//|[-+*/%()])|(\S))", re.ASCII)
#: What people write for the operators: the signs of multiplication and minus among it.
_SIGNS: Final = str.maketrans({"\u00d7": "*", "·": "*", "÷": "/", "\u2212": "-", "^": "**"})
#: By how strongly they bind; all of them from the left.
_OPERATORS: Final[tuple[dict[str, Callable[[Number, Number], Number]], ...]] = (
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod},
)


class CalculationError(ValueError):
    """What can't be computed; its text says why."""


def evaluate(text: str) -> Number:
    """The value of the expression, an `int` or a finite `float`. Raises `CalculationError`."""
    if len(text) > MAX_CHARS:
        raise CalculationError(f"the expression may have {MAX_CHARS} characters at most")
    try:
        return _Reader(text.translate(_SIGNS)).whole()
    except ZeroDivisionError:
        raise CalculationError("a division by zero") from None
    except OverflowError:
        raise CalculationError("the result is too large") from None


class _Reader:
    """Reads and computes in one go: nothing is built that would have to be bounded, too."""

    def __init__(self, text: str) -> None:
        self._tokens = [match.groups() for match in _TOKEN.finditer(text)]
        self._at = 0
        self._depth = 0

    def whole(self) -> Number:
        value = self._sum()
        if self._at < len(self._tokens):
            raise CalculationError(f"{self._next()!r} is not expected there")
        return value

    def _next(self) -> str:
        """The token that is due; "" at the end."""
        number, sign, other = self._tokens[self._at] if self._at < len(self._tokens) else ("", "", "")
        return number or sign or other or ""

    def _take(self, *wanted: str) -> str:
        """The token that is due, if it is one of these; else ""."""
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
        """A sign binds less than a power on its right, and more than one on its left: `-2**2` is -4, `2**-1` 0.5."""
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
                raise CalculationError("a parenthesis is not closed")
            return value
        text = self._next()
        if not text:
            raise CalculationError("the expression ends too early")
        if text[0] not in ".0123456789" or text == ".":
            raise CalculationError(f"{text!r} is not expected there")
        self._at += 1
        return _bounded(int(text) if text.isdecimal() else float(text))


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1 and exponent > 0:
        if (abs(base).bit_length() - 1) * exponent > MAX_BITS:  # at least so many bits: not even begun
            raise OverflowError
    value = base**exponent
    if isinstance(value, complex):
        raise CalculationError("a root of a negative number")
    return _bounded(value)


def _bounded(value: Number) -> Number:
    if value.bit_length() > MAX_BITS if isinstance(value, int) else not math.isfinite(value):
        raise OverflowError
    return value
