"""Arithmetic from a text: Python's own results, and nothing that takes time or memory."""

import math
import time
from typing import Final

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from handlers.arithmetic import MAX_BITS, MAX_CHARS, CalculationError, evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 2", 4),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("-2**2", -4),
        ("2**-1", 0.5),
        ("2**3**2", 512),
        ("2 ^ 10", 1024),
        ("6 \u00d7 7 ÷ 2 \u2212 1 · 1", 20.0),
        ("7 // 2 % 2", 1),
        ("-7 // 2", -4),
        ("10 - 3 - 2", 5),
        (" \t1e3\n", 1000.0),
        (".5 + 5.", 5.5),
        ("007", 7),
        ("+-+1", -1),
        ("1**" + "9" * 190, 1),
        ("2**1023 + (2**1023 - 1)", 2**1024 - 1),
    ],
)
def test_an_expression_has_pythons_value(text: str, value: int | float) -> None:
    assert (evaluate(text), type(evaluate(text))) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is incomplete"),
        ("  ", "is incomplete"),
        ("2 +", "is incomplete"),
        ("()", "')' is not expected"),
        ("(1", "closing parenthesis"),
        ("1)", "')' is not expected"),
        ("1 2", "'2' is not expected"),
        ("1,000", "',' is not expected"),
        ("2x", "'x' is not expected"),
        ("abs(1)", "'a' is not expected"),
        ("__import__('os')", "'_' is not expected"),
        ("٣", "is not expected"),
        ("1\0", "is not expected"),
        ("1e", "'e' is not expected"),
        (".", "is not expected"),
        ("1 / 0", "division by zero"),
        ("1 // 0", "division by zero"),
        ("1 % 0.0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("(-8) ** 0.5", "negative number"),
        ("1e999", "too large"),
        ("1e308 * 10", "too large"),
        ("1e308 * 10 - 1e308 * 10", "too large"),
        ("2**1024", "too large"),
        ("10.0 ** 400", "too large"),
        ("2**1023 * 2.5", "too large"),
        ("-" * 100 + "1", "too deeply"),
        ("(" * 100 + "1" + ")" * 99, "too deeply"),
        ("2**" * 60 + "1", "too deeply"),
        ("1" * (MAX_CHARS + 1), "200 characters"),
    ],
)
def test_what_can_t_be_computed_is_told(text: str, told: str) -> None:
    with pytest.raises(CalculationError, match=told.replace("(", r"\(").replace(")", r"\)")):
        evaluate(text)


@pytest.mark.parametrize("text", ["9**9**9", "9**9**9**9", "(9**9)**(9**9)", "2**(2**1023)", "-9**9**9", "99**9999999"])
def test_a_tower_of_powers_is_refused_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(CalculationError, match="too large"):
        evaluate(text)
    assert time.process_time() - began < 0.1


NUMBERS: Final = st.one_of(st.integers(0, 10**6).map(str), st.floats(0.01, 1e6).map(repr), st.sampled_from("012"))
POWERS: Final = st.tuples(NUMBERS, st.sampled_from(["0", "1", "2", "3", "-1", "0.5"])).map(lambda pair: "**".join(pair))


def composed(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    signs = st.sampled_from(["+", "-", "*", "/", "//", "%"])
    return st.one_of(st.tuples(parts, signs, parts).map(" ".join), parts.map("({})".format), parts.map("-{}".format))


@given(st.recursive(NUMBERS | POWERS, composed, max_leaves=8))
def test_any_expression_has_pythons_own_value(text: str) -> None:
    """With numbers that stay small enough, whatever is done with eight of them."""
    assume(len(text) <= MAX_CHARS)
    try:
        value = eval(text)
    except ZeroDivisionError:
        with pytest.raises(CalculationError, match="division by zero"):
            evaluate(text)
    else:
        assert (type(evaluate(text)), evaluate(text)) == (type(value), value)


@given(st.text(max_size=300) | st.text("0123456789.e+-*/%()^ ", max_size=300))
def test_any_text_has_a_finite_value_or_is_told_why_not(text: str) -> None:
    try:
        value = evaluate(text)
    except CalculationError as error:
        assert str(error)
    else:
        assert value.bit_length() <= MAX_BITS if isinstance(value, int) else math.isfinite(value)
