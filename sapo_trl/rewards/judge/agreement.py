"""Whether two numbers, or two expressions at many points, are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from random import Random

import mpmath

from .evaluation import Number, TooLargeError, UndefinedError, evaluate
from .nodes import Node, is_complex, symbols, walk
from .tokens import UnreadableError


_DIGITS = 50
_CLOSE = mpmath.mpf(10) ** -25
_SMALL = mpmath.mpf(10) ** -20
_POINTS = 16
_MORE_POINTS = 24
"""Of expressions with corners and steps, which two smooth pieces do not show."""
_FINE_DIGITS = 400
_ALMOST = mpmath.mpf(10) ** -300
_CORNERS = frozenset("absolute max min lfloor lceil root ln arcsin arccos arctan".split())
_NO_UNKNOWNS: Mapping[str, Fraction] = {}
_ENOUGH = 4
"""Points at which two expressions have to agree."""


def value_of(node: Node, point: Mapping[str, Fraction] = _NO_UNKNOWNS) -> Number:
    """
    The value of an expression, at a point if it has unknowns.

    Raises:
        UnreadableError: if it has none, or none that can be computed.
    """
    try:
        with mpmath.workdps(_DIGITS):
            return evaluate(node, point)
    except (UndefinedError, TooLargeError, KeyError, OverflowError, ZeroDivisionError) as error:
        raise UnreadableError("no value") from error


def same_number(a: Number, b: Number) -> bool:
    """Whether two values, other than sums that cancel, are equal to 25 digits."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    with mpmath.workdps(_DIGITS):
        a, b = _rounded(a), _rounded(b)
        return abs(a - b) <= _CLOSE * max(abs(a), abs(b))


def is_within(a: Number, b: Number, distance: Number, relatively: Number) -> bool:
    """Whether two numbers are at most a distance apart, and at most a share of the second."""
    with mpmath.workdps(_DIGITS):
        a, b = _rounded(a), _rounded(b)
        return abs(a - b) <= min(_rounded(distance), abs(b) * _rounded(relatively))


def same_constant(a: Node, b: Node) -> bool:
    """Whether two expressions without unknowns are equal."""
    return _agree_at(a, b, {}) is True and _agree_finely(a, b, {})


def all_equal(nodes: Sequence[Node]) -> bool:
    """Whether expressions without unknowns are equal, to the places of a decimal among them."""
    return all(same_constant(nodes[0], node) for node in nodes[1:])


def agree(a: Node, b: Node) -> bool:
    """
    Whether two expressions are equal wherever one of them is a real number; of complex ones, everywhere.

    They are compared at fixed points that look random, of all signs and of small and large size.
    """
    names = tuple(sorted(symbols(a) | symbols(b)))
    if not names:
        return same_constant(a, b)
    complex_too = is_complex(a) or is_complex(b)
    verdicts = []
    for index in range(_POINTS):
        verdicts.append(_agree_at(a, b, point(names, index), complex_too))
        if verdicts[-1] is False:
            return False
    real, other = verdicts.count(True), verdicts.count("complex")
    if not (real >= _ENOUGH or (real == 0 and other >= _ENOUGH)):
        return False
    if not _agree_finely(a, b, point(names, verdicts.index(True if real else "complex"))):
        return False
    return not (_has_corners(a) or _has_corners(b)) or _agree_at_more_points(a, b, names, complex_too)


def ratio_of(a: Node, b: Node) -> Fraction | mpmath.mpf | None:
    """
    The number that the first expression is of the second one at all points; `None` if there is no such number, or if
    the expressions have the same value everywhere.
    """
    names = tuple(sorted(symbols(a) | symbols(b)))
    found: list[Number] = []
    varies = False
    last: Number | None = None
    more = _MORE_POINTS if _has_corners(a) or _has_corners(b) else 0
    for index in range(_POINTS + more):
        try:
            with mpmath.workdps(_DIGITS):
                above, below = evaluate(a, point(names, index)), evaluate(b, point(names, index))
                if not (_is_real(above) and _is_real(below)):
                    continue
                vanishing = _vanishes(a, above, names, index), _vanishes(b, below, names, index)
                if all(vanishing) and index >= _POINTS:  # a whole number may be a solution
                    continue
                if any(vanishing):
                    return None
                found.append(evaluate(("quotient", ("number", above), ("number", below)), {}))
        except UndefinedError:
            continue
        except TooLargeError:
            if index < _POINTS:
                raise
            continue
        if not same_number(found[0], found[-1]):
            return None
        varies = varies or (last is not None and not same_number(last, above))
        last = above
    return found[0] if varies and len(found) >= _ENOUGH else None


@lru_cache(maxsize=256)
def point(names: tuple[str, ...], index: int) -> dict[str, Fraction]:
    """Values of unknowns: the same for a name wherever it occurs."""
    return {name: _coordinate(name, index) for name in names}


def _coordinate(name: str, index: int) -> Fraction:
    random = Random(f"{name} at {index}")
    if index >= _POINTS and name != "the base of log":
        return _unusual(random, name, index - _POINTS)
    # Logarithms, roots and inverse sines are real at the first ones only; a sign that is lost shows at the last ones.
    size = Fraction(random.randint(1, 996), 997) if index % 2 == 0 else Fraction(random.randint(998, 20_000), 997)
    negative = index >= _POINTS // 2 and random.random() < 0.6
    if name == "the base of log":
        return abs(size) + Fraction(1, 3)
    return -size if negative else size


def _unusual(random: Random, name: str, index: int) -> Fraction:
    """A whole number, one just beside a whole number, or a large one."""
    turn, kind = divmod(index, 3)
    if kind == 2:
        # Each name has as many large values of either sign, in an order of its own.
        sign = (-1) ** (turn & Random(name).randint(1, 3)).bit_count()
        return Fraction(sign * random.randint(10**2, 10**4 - 1) * (1 if turn < 4 else 1000), 7)
    return random.choice((-1, 1)) * random.randint(1, 12) + kind * Fraction(random.choice((-1, 1)), 10**6)


def _has_corners(node: Node) -> bool:
    return any(part[0] in _CORNERS or (part[0] == "power" and not _is_whole(part[2])) for part in walk(node))


def _is_whole(node: Node) -> bool:
    node = node[1] if node[0] == "negative" else node
    return node[0] == "number" and node[1].denominator == 1


def _agree_at_more_points(a: Node, b: Node, names: tuple[str, ...], complex_too: bool) -> bool:
    """Whether two expressions are equal wherever both have a value that can be computed."""
    for index in range(_POINTS, _POINTS + _MORE_POINTS):
        values = point(names, index)
        try:
            defined = None not in (_at(a, values, _DIGITS), _at(b, values, _DIGITS))
            if defined and _agree_at(a, b, values, complex_too) is False:
                return False
        except TooLargeError:
            continue
    return True


def _agree_finely(a: Node, b: Node, values: dict[str, Fraction]) -> bool:
    r"""Whether two expressions that agree do so to 300 digits: `\sin(10^{-15})` is almost `10^{-15}`."""
    x, y = _at(a, values, _FINE_DIGITS), _at(b, values, _FINE_DIGITS)
    if x is None or y is None or (isinstance(x, Fraction) and isinstance(y, Fraction)):
        return x == y
    with mpmath.workdps(_FINE_DIGITS):
        x, y = _rounded(x), _rounded(y)
        size = max(abs(x), abs(y))
        return size < _ALMOST or abs(x - y) <= _ALMOST * size


def _agree_at(a: Node, b: Node, values: dict[str, Fraction], complex_too: bool = False) -> bool | str | None:
    """`None` where neither has a value, and `"complex"` where both are equal and not real."""
    x, y = _at(a, values, _DIGITS), _at(b, values, _DIGITS)
    if not complex_too and values and (not _is_real(x)) and (not _is_real(y)):
        return "complex" if x is not None and y is not None and _close(a, b, x, y, values) else None
    if x is None or y is None:
        return None if x is y and values else False
    if not complex_too and values and _is_real(x) != _is_real(y):
        return False
    return _close(a, b, x, y, values)


def _close(a: Node, b: Node, x: Number, y: Number, values: dict[str, Fraction]) -> bool:
    if same_number(x, y):
        return True
    with mpmath.workdps(_DIGITS):
        if max(abs(_rounded(x)), abs(_rounded(y))) > _SMALL:
            return False
    # Both are small: numbers, or the remains of a sum that cancels. Remains get smaller with more digits.
    finer = [_at(node, values, 2 * _DIGITS) for node in (a, b)]
    rest = [Fraction(0) if _shrinks(old, new) else new for old, new in zip((x, y), finer, strict=True)]
    return same_number(*rest)


def _vanishes(node: Node, value: Number, names: tuple[str, ...], index: int) -> bool:
    if value == 0:
        return True
    if isinstance(value, Fraction) or abs(value) > _SMALL:
        return False
    return _shrinks(value, _at(node, point(names, index), 2 * _DIGITS))


def _shrinks(old: Number, new: Number) -> bool:
    return not isinstance(old, Fraction) and abs(_rounded(new)) < abs(old) * _SMALL


def _at(node: Node, values: dict[str, Fraction], digits: int) -> Number | None:
    try:
        with mpmath.workdps(digits):
            return evaluate(node, values)
    except (UndefinedError, ZeroDivisionError):
        return None


def _is_real(value: Number | None) -> bool:
    return value is not None and (not isinstance(value, mpmath.mpc) or value.imag == 0)


def _rounded(value: Number) -> Number:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value
