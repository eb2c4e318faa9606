"""Values of expressions at points: exact where they are rational, else with many digits, within limits of time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from random import Random
from typing import Any

import mpmath

from .nodes import Node


MAX_BITS = 20_000
"""Of an exact number. Longer ones are rounded or refused."""
Number = Any
"""`Fraction` where it is exact, else mpmath's `mpf` or `mpc`."""


class UndefinedError(Exception):
    """An expression has no value at this point."""


class TooLargeError(Exception):
    """Evaluating would take too long."""


def evaluate(node: Node, point: Mapping[str, Fraction]) -> Number:
    """
    The value of an expression where the symbols have these values, at mpmath's working precision.

    Raises:
        UndefinedError: if it has none.
        TooLargeError: if computing it would take too long.
    """
    operation, *parts = node
    if operation == "number":
        return parts[0]
    if operation == "symbol":
        return point[parts[0]]
    if operation == "constant":
        return _CONSTANTS[parts[0]]()
    if operation == "determinant":
        return _determinant([[evaluate(entry, point) for entry in row[1:]] for row in parts])
    if operation == "apply":
        values = [evaluate(part, point) for part in parts[1:]]
        return Fraction(Random(f"{parts[0]} of {mpmath.nstr(_mp(values[0]), 15)}").randint(1, 10**6), 997)
    values = [evaluate(part, point) for part in parts]
    return _bounded(_OPERATIONS[operation](*values))


def _bounded(value: Number) -> Number:
    if isinstance(value, Fraction) and value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        value = _mp(value)
    if not isinstance(value, Fraction) and not mpmath.isfinite(value):
        raise UndefinedError
    return value


def _mp(value: Number) -> Number:
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def _is_zero(value: Number) -> bool:
    return value == 0


def _real(value: Number) -> Number:
    """A real number as such."""
    if isinstance(value, mpmath.mpc):
        if value.imag != 0:
            raise UndefinedError
        return value.real
    return value


def _sum(*values: Number) -> Number:
    total = values[0]
    for value in values[1:]:
        total = _both(total, value, lambda a, b: a + b)
    return total


def _product(*values: Number) -> Number:
    total = values[0]
    for value in values[1:]:
        total = _bounded(_both(total, value, lambda a, b: a * b))
    return total


def _both(a: Number, b: Number, operation) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return operation(a, b)
    return operation(_mp(a), _mp(b))


def _quotient(a: Number, b: Number) -> Number:
    if _is_zero(b):
        raise UndefinedError
    return _both(a, b, lambda x, y: x / y)


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Fraction):
        if _is_zero(base):
            if exponent <= 0:
                raise UndefinedError
            return Fraction(0)
        if exponent.denominator == 1 and isinstance(base, Fraction):
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(exponent) <= MAX_BITS:
                return base ** int(exponent)
        if exponent.denominator > 1 and isinstance(base, Fraction) and exponent.denominator < 100:
            return _power(_root(Fraction(exponent.denominator), base), Fraction(exponent.numerator))
    elif _is_zero(base):
        raise UndefinedError
    size = abs(mpmath.log(abs(_mp(base)))) * abs(_mp(exponent))
    if size > 10**7 or abs(_mp(exponent)) > 10**9:
        raise TooLargeError
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        return _mp(base) ** int(exponent)
    return _mp(base) ** _mp(exponent)


def _root(degree: Number, value: Number) -> Number:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 < degree <= 1000:
        return _power(value, _quotient(Fraction(1), degree))
    degree = int(degree)
    if isinstance(value, Fraction) and degree == 2 and value >= 0:
        parts = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if parts[0] ** 2 == value.numerator and parts[1] ** 2 == value.denominator:
            return Fraction(*parts)
    value = _mp(value)
    if isinstance(value, mpmath.mpf) and value < 0 and degree % 2:
        return -mpmath.root(-value, degree)
    return mpmath.root(value, degree)


def _factorial(value: Number) -> Number:
    value = _real(value)
    if abs(value) > 1000:
        raise TooLargeError
    if isinstance(value, Fraction) and value.denominator == 1:
        if value < 0:
            raise UndefinedError
        return Fraction(math.factorial(int(value)))
    return mpmath.gamma(_mp(value) + 1)


def _binomial(n: Number, k: Number) -> Number:
    if not isinstance(k, Fraction) or k.denominator != 1 or not 0 <= k <= 200:
        return _quotient(_factorial(n), _product(_factorial(k), _factorial(_sum(n, -k))))
    total: Number = Fraction(1)
    for j in range(int(k)):
        total = _bounded(_quotient(_product(total, _sum(n, Fraction(-j))), Fraction(j + 1)))
    return total


def _integer_function(function):
    def of(*values: Number) -> Number:
        if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
            raise UndefinedError
        return Fraction(function(*(int(value) for value in values)))

    return of


def _floor(value: Number) -> Number:
    value = _real(value)
    return Fraction(math.floor(value)) if isinstance(value, Fraction) else Fraction(int(mpmath.floor(value)))


def _analytic(function, largest: float = 1e9):
    def of(value: Number) -> Number:
        value = _mp(value)
        if abs(value) > largest:
            raise TooLargeError
        try:
            return function(value)
        except (ValueError, ZeroDivisionError) as error:
            raise UndefinedError from error

    return of


def _logarithm(value: Number) -> Number:
    if _is_zero(value):
        raise UndefinedError
    return Fraction(0) if value == 1 else mpmath.log(_mp(value))


def _determinant(rows: list[list[Number]]) -> Number:
    if len(rows) == 1:
        return rows[0][0]
    total: Number = Fraction(0)
    for column, entry in enumerate(rows[0]):
        minor = [row[:column] + row[column + 1 :] for row in rows[1:]]
        term = _product(entry, _determinant(minor))
        total = _sum(total, term if column % 2 == 0 else -term)
    return total


def _infinity() -> Number:
    raise UndefinedError


_CONSTANTS = {
    "pi": lambda: +mpmath.pi,
    "e": lambda: +mpmath.e,
    "i": lambda: mpmath.mpc(0, 1),
    "degree": lambda: mpmath.pi / 180,
    "infinity": _infinity,
}
_OPERATIONS = {
    "sum": _sum,
    "negative": lambda value: -value,
    "product": _product,
    "quotient": _quotient,
    "percent": lambda value: _quotient(value, Fraction(100)),
    "power": _power,
    "root": _root,
    "absolute": abs,
    "lfloor": _floor,
    "lceil": lambda value: -_floor(-value),
    "factorial": _factorial,
    "binomial": _binomial,
    "ln": _logarithm,
    "max": lambda *values: max(map(_real, values)),
    "min": lambda *values: min(map(_real, values)),
    "gcd": _integer_function(math.gcd),
    "lcm": _integer_function(math.lcm),
    **{name: _analytic(getattr(mpmath, name)) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{name: _analytic(getattr(mpmath, name), 1e4) for name in ("sinh", "cosh", "tanh")},
    "arcsin": _analytic(mpmath.asin),
    "arccos": _analytic(mpmath.acos),
    "arctan": _analytic(mpmath.atan),
}
