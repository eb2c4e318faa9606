"""Sets of real numbers: intervals, their unions, and inequalities in one unknown."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import mpmath

from .agreement import same_number, value_of
from .evaluation import Number
from .nodes import Node, symbols
from .tokens import UnreadableError
from .values import Bound, Items, RealSet, Scalar, Value


_BELOW = Bound(None, False)
_OPEN = {"(": False, "[": True, ")": False, "]": True}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!="}


def everything(variable: str | None = None) -> RealSet:
    """All real numbers."""
    return RealSet(((_BELOW, _BELOW),), variable)


def interval(low: Value, high: Value, brackets: str) -> RealSet | None:
    """The interval between two numbers or infinities, `None` if these are none or in the wrong order."""
    ends = [_end(value, sign) for value, sign in ((low, -1), (high, 1))]
    if None in ends:
        return None
    lower, upper = (Bound(*end, _OPEN[mark]) for end, mark in zip([(e[0],) for e in ends], brackets, strict=True))
    if any(bound.closed and bound.value is None for bound in (lower, upper)):
        return None
    if lower.value is not None and upper.value is not None and not _less(lower.value, upper.value):
        return None
    return RealSet(((lower, upper),))


def as_real_set(value: Value) -> RealSet | None:
    """The real numbers that a value may also stand for: `(0, 1)` as an interval, `\\{0\\}` as a set of numbers."""
    if isinstance(value, RealSet):
        return value
    if not isinstance(value, Items):
        return None
    if value.brackets in ("()", "[]") and len(value.items) == 2:
        return interval(*value.items, value.brackets)
    if value.brackets in ("{}", ""):
        points = [_constant(item) for item in value.items]
        if None in points or any(isinstance(point, mpmath.mpc) for point in points):
            return None
        bounds = [Bound(point, True) for point in points]
        return RealSet(_merged([(bound, bound) for bound in bounds]))
    return None


def union(a: RealSet, b: RealSet) -> RealSet:
    """All numbers of both sets."""
    return RealSet(_merged([*a.intervals, *b.intervals]), a.variable)


def complement(a: RealSet) -> RealSet:
    """All other real numbers."""
    found = []
    low: Bound | None = _BELOW
    for lower, upper in a.intervals:
        if lower.value is not None:
            found.append((low, Bound(lower.value, not lower.closed)))
        low = None if upper.value is None else Bound(upper.value, not upper.closed)
    if low is not None:
        found.append((low, _BELOW))
    return RealSet(tuple(found), a.variable)


def intersection(a: RealSet, b: RealSet) -> RealSet:
    """The numbers that both sets share."""
    return RealSet(complement(union(complement(a), complement(b))).intervals, a.variable)


def joined(values: Sequence[RealSet], either: bool) -> RealSet | Items:
    """The solutions of several inequalities in one unknown: at least one must hold (`either`), or all."""
    if len({value.variable for value in values}) > 1:
        return Items(tuple(values), "")
    total = values[0]
    for value in values[1:]:
        total = union(total, value) if either else intersection(total, value)
    return total


def same_set(a: RealSet, b: RealSet) -> bool:
    """Whether two sets have the same numbers."""
    return len(a.intervals) == len(b.intervals) and all(
        _same_bound(one[0], other[0]) and _same_bound(one[1], other[1])
        for one, other in zip(a.intervals, b.intervals, strict=True)
    )


def solved(nodes: Sequence[Node], signs: Sequence[str]) -> RealSet | None:
    r"""
    The solutions of an inequality with one unknown. It must be linear in the unknown, or in an absolute value of it:
    `x > 3`, `1 < 2x \le 2`, `|x - 1| < 3`, `x \ne 3`. `None` for any other inequality.
    """
    names = set().union(*(symbols(node) for node in nodes))
    if len(names) != 1 or len(nodes) > 3:
        return None
    (name,) = names
    if len(nodes) == 3:
        if "!=" in signs or (signs[0] in ("<", "<=")) != (signs[1] in ("<", "<=")):
            return None
        halves = [_half(nodes[k], nodes[k + 1], signs[k], name) for k in (0, 1)]
        both = None if None in halves else intersection(*halves)
        return both if both and len(both.intervals) == 1 else None
    left, right, sign = nodes[0], nodes[1], signs[0]
    if not symbols(left):
        left, right, sign = right, left, _TURNED[sign]
    if left[0] == "absolute" and not symbols(right) and _infinite(right) is None:
        bound = value_of(right)
        if isinstance(bound, mpmath.mpc) or not bound > 0 or sign == "!=":
            return None
        strict = sign in ("<", ">=")
        ends = ("<", ">") if strict else ("<=", ">=")
        below = _half(left[1], ("number", bound), ends[0], name)
        above = _half(left[1], ("number", -bound), ends[1], name)
        inside = None if below is None or above is None else intersection(below, above)
        return inside if inside is None or sign in ("<", "<=") else complement(inside)
    return _half(left, right, sign, name)


def _half(left: Node, right: Node, sign: str, name: str) -> RealSet | None:
    """The numbers on one side of the zero of a linear function."""
    for node, turned in ((left, False), (right, True)):
        if infinite := _infinite(node):
            other = right if node is left else left
            below = (infinite == "+") != turned  # of `other < infinity`, written from either side
            holds = sign == (">" if below else "<")
            return everything(name) if other == ("symbol", name) and holds else None
    difference = ("sum", left, ("negative", right))
    try:
        values = [value_of(difference, {name: Fraction(x)}) for x in (0, 1, 2, 7)]
    except UnreadableError:
        return None
    if any(isinstance(value, mpmath.mpc) for value in values):
        return None
    start, slope = values[0], _minus(values[1], values[0])
    on_a_line = all(same_number(_minus(v, start), _times(slope, x)) for v, x in zip(values[2:], (2, 7), strict=True))
    if not on_a_line or slope == 0:
        return None
    zero = value_of(("quotient", ("number", _minus(Fraction(0), start)), ("number", slope)))
    if sign == "!=":
        return complement(RealSet(((Bound(zero, True),) * 2,), name))
    below = (sign in ("<", "<=")) == (slope > 0)
    bound = Bound(zero, sign in ("<=", ">="))
    return RealSet(((_BELOW, bound) if below else (bound, _BELOW),), name)


def _minus(a: Number, b: Number) -> Number:
    return value_of(("sum", ("number", a), ("negative", ("number", b))))


def _times(a: Number, factor: int) -> Number:
    return value_of(("product", ("number", a), ("number", Fraction(factor))))


def _infinite(node: Node) -> str | None:
    if node == ("constant", "infinity"):
        return "+"
    return "-" if node == ("negative", ("constant", "infinity")) else None


def _constant(value: Value) -> Number | None:
    if isinstance(value, Scalar) and value.unit is None and not value.percent and not symbols(value.node):
        return value_of(value.node)
    return None


def _end(value: Value, sign: int) -> tuple[Number | None] | None:
    """A bound in a tuple of its own, as `None` is one."""
    if isinstance(value, Scalar) and (infinite := _infinite(value.node)):
        return (None,) if (infinite == "+") == (sign > 0) else None
    number = None if isinstance(value, Scalar) and _has_infinity(value.node) else _constant(value)
    return None if number is None or isinstance(number, mpmath.mpc) else (number,)


def _has_infinity(node: Node) -> bool:
    return node == ("constant", "infinity") or any(isinstance(x, tuple) and _has_infinity(x) for x in node[1:])


def _merged(intervals: list[tuple[Bound, Bound]]) -> tuple[tuple[Bound, Bound], ...]:
    """The same numbers as intervals in order that do not touch."""
    found: list[tuple[Bound, Bound]] = []
    for lower, upper in sorted(intervals, key=lambda x: _key(x[0], lower=True)):
        if found and _touches(found[-1][1], lower):
            last = found[-1][1]
            if last.value is not None and (upper.value is None or _key(last, False) < _key(upper, False)):
                found[-1] = (found[-1][0], upper)
        else:
            found.append((lower, upper))
    return tuple(found)


def _key(bound: Bound, lower: bool) -> tuple[float, int]:
    if bound.value is None:
        return (float("-inf") if lower else float("inf"), 0)
    return (_float(bound.value), int(not bound.closed) if lower else int(bound.closed))


def _touches(upper: Bound, lower: Bound) -> bool:
    """Whether nothing lies between the end of one interval and the start of the next."""
    if upper.value is None or lower.value is None:
        return True
    if same_number(upper.value, lower.value):
        return upper.closed or lower.closed
    return _less(lower.value, upper.value)


def _same_bound(a: Bound, b: Bound) -> bool:
    if a.value is None or b.value is None:
        return a.value is b.value
    return a.closed == b.closed and same_number(a.value, b.value)


def _less(a: Number, b: Number) -> bool:
    return _float(a) < _float(b)


def _float(value: Number) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
