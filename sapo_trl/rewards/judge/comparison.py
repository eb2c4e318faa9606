"""Whether two values are equal. Values of different kinds are different, but for the readings listed here."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from . import real_sets
from .agreement import agree, is_within, ratio_of, value_of
from .nodes import Node, symbols
from .values import (
    Equation,
    Impossible,
    Inequality,
    Items,
    Literal,
    Matrix,
    Named,
    Phrase,
    Ratio,
    RealSet,
    Rounded,
    Scalar,
    Value,
)


_PLACES = 6
"""Decimal places from which on a decimal may stand for a number that has more."""
_RELATIVELY = Fraction(1, 10**5)

_SHORT_WORDS = frozenset(
    "yes no odd even true false am pm may jan feb mar apr jun jul aug sep oct nov dec mon tue wed thu fri sat sun red"
    " one two six ten all none both east west asa sas sss aas hl".split()
)
_VOWELS = frozenset("aeiouy")
_SYMMETRIC = {"\\angle": 3, "\\overline": 2}
"""Names of so many letters that read the same backwards."""


def equal(answer: Value, gold: Value) -> bool:
    """Whether an answer is the gold answer."""
    return _equal(_alone(answer), _alone(gold))


def _equal(answer: Value, gold: Value) -> bool:
    """Of elements of a set too, where `\\{5\\}` is no 5."""
    if isinstance(answer, Impossible) or isinstance(gold, Impossible):
        return False
    for a, b in ((answer, gold), (gold, answer)):
        if isinstance(a, Rounded):
            return any(equal(x, b) for x in (a.exact, a.rounded))
        if isinstance(a, Named) and not isinstance(b, Named):
            return _named_is(a, b)
        if isinstance(a, Phrase) and isinstance(b, (Scalar, Phrase)) and (words := _spelled(b)) is not None:
            return _same_words(a.tokens, words)
        if isinstance(a, RealSet) and (other := real_sets.as_real_set(b)) is not None:
            return _same_variable(a, other) and real_sets.same_set(a, other)
        if isinstance(a, Ratio) and isinstance(b, Scalar):
            return len(a.parts) == 2 and b.unit is None and agree(("quotient", *a.parts), b.node)
        if isinstance(a, Matrix) and isinstance(b, Items):
            return (
                b.brackets in ("()", "<>") and 1 in (len(a.rows), len(a.rows[0])) and _in_order(_entries(a), b.items)
            )
    if type(answer) is not type(gold):
        return False
    return _COMPARISONS[type(answer)](answer, gold)


def _alone(value: Value) -> Value:
    """The only element of a set or a list."""
    if isinstance(value, Items) and len(value.items) == 1 and not isinstance(value.items[0], Items):
        return value.items[0]
    return value


def _scalars(a: Scalar, b: Scalar) -> bool:
    if a.letters and b.letters:
        return same_word(a.letters, b.letters)
    if any(x.letters and (x.letters.isupper() or _is_word(x.letters)) for x in (a, b)):
        return False  # a name is no product: ASA is not S * A^2
    if a.unit is not None and b.unit is not None and not a.percent and not b.percent:
        if a.unit.powers != b.unit.powers and a.unit.powers and b.unit.powers:
            return False
        if a.unit.powers and b.unit.powers and a.unit.factor != b.unit.factor:
            return agree(_times(a.node, a.unit.factor), _times(b.node, b.unit.factor))
    if a.percent != b.percent:
        return _percent_is(a, b) if a.percent else _percent_is(b, a)
    return _nodes(a, b)


def _nodes(a: Scalar, b: Scalar) -> bool:
    if ("constant", "infinity") in (_unsigned(a.node), _unsigned(b.node)):
        return a.node == b.node
    return agree(a.node, b.node) or _rounds_to(a, b) or _rounds_to(b, a)


def _percent_is(percent: Scalar, number: Scalar) -> bool:
    """50% is 0.5, and 50 too. But ½ may be ½% or 50%: of numbers up to 1 only the fraction is taken."""
    if number.unit is not None:
        return False
    if _nodes(Scalar(("percent", percent.node)), number):
        return True
    return not symbols(percent.node) and abs(value_of(percent.node)) > 1 and _nodes(Scalar(percent.node), number)


def _rounds_to(decimal: Scalar, exact: Scalar) -> bool:
    """Whether a decimal of six places or more is a number that has more places, rounded."""
    if decimal.places is None or decimal.places < _PLACES or symbols(exact.node) or symbols(decimal.node):
        return False
    a, b = value_of(decimal.node), value_of(exact.node)
    # Floating point noise: 0.1 + 0.2.
    if decimal.places >= 15 and is_within(a, b, abs(a), Fraction(1, 10**14)):
        return True
    if exact.places is not None and exact.places <= decimal.places:
        return False
    return is_within(a, b, _last_place(decimal, a) * Fraction(501, 1000), _RELATIVELY)


def _last_place(decimal: Scalar, value: Fraction) -> Fraction:
    """The worth of the last place of a decimal, also in scientific notation."""
    unit = Fraction(1, 10**decimal.places)
    node = decimal.node[1] if decimal.node[0] == "negative" else decimal.node
    if node[0] == "product" and node[1][0] == "number" and node[1][1]:
        return unit * abs(value / node[1][1])
    return unit


def _unsigned(node: Node) -> Node:
    return node[1] if node[0] == "negative" else node


def _times(node: Node, factor: Fraction) -> Node:
    return ("product", node, ("number", factor))


def _named_is(named: Named, value: Value) -> bool:
    """Whether a named value equals a value: `x = 5` is 5, for any name."""
    if isinstance(value, Equation):
        return named.equation is not None and _equations(Equation(*named.equation), value)
    return isinstance(value, (Scalar, Items, RealSet, Matrix, Ratio, Literal, Phrase)) and equal(named.value, value)


def _both_named(a: Named, b: Named) -> bool:
    if {*a.names} & {*b.names} and equal(a.value, b.value):
        return True
    if a.equation is None or b.equation is None:
        # Words are not unknowns: \text{Area} = 5 is A = 5.
        return _in_words(a) != _in_words(b) and equal(a.value, b.value)
    return bool(symbols(a.equation[1]) | symbols(b.equation[1])) and _equations(
        Equation(*a.equation), Equation(*b.equation)
    )


def _in_words(named: Named) -> bool:
    return all(len(name) > 3 and name.isalpha() for name in named.names)


def _equations(a: Equation, b: Equation) -> bool:
    return ratio_of(_difference(a), _difference(b)) is not None


def _inequalities(a: Inequality, b: Inequality) -> bool:
    ratio = ratio_of(_difference(a), _difference(b))
    return a.sign == b.sign and ratio is not None and (ratio > 0 or a.sign == "!=")


def _difference(relation: Equation | Inequality) -> Node:
    return ("sum", relation.left, ("negative", relation.right))


def _items(a: Items, b: Items) -> bool:
    if a.brackets == b.brackets == "{}":
        a = Items(_without_repeats(a.items), "{}")
    if len(a.items) != len(b.items):
        return False
    if "names" in (a.brackets, b.brackets) or _has_names(a) or _has_names(b):
        return _named_items(a, b)
    if a.ordered and b.ordered:
        alike = a.brackets == b.brackets or {a.brackets, b.brackets} == {"()", "<>"}
        return alike and _in_order(a.items, b.items)
    if a.ordered or b.ordered:
        ordered, other = (a, b) if a.ordered else (b, a)
        # (1, 2) is a list in the same order; [1, 2] is an interval.
        return (
            other.brackets == ""
            and ordered.brackets in ("()", "<>")
            and not any(isinstance(item, Named) for item in other.items)
            and _in_order(a.items, b.items)
        )
    return _in_any_order(a.items, b.items)


def _has_names(value: Items) -> bool:
    return bool(value.items) and all(isinstance(item, Named) for item in value.items)


def _named_items(a: Items, b: Items) -> bool:
    if not _has_names(a):
        a, b = b, a
    if _has_names(b):
        alike = (a.brackets == "{}") == (b.brackets == "{}")
        return (alike or len(_all_names(a)) == 1) and _in_any_order(a.items, b.items)
    if any(isinstance(item, Named) for item in b.items) and b.ordered is False and len(_all_names(a)) > 1:
        return False
    names = [item.names[0] for item in a.items]
    values = [item.value for item in a.items]
    if len({name.partition("_")[0] for name in names}) == 1 and not b.ordered:  # x = 1 or x = 2; x_1 = 1, x_2 = 2
        return _in_any_order(values, b.items)
    if len({*names}) < len(names) or b.brackets in ("{}", "[]"):
        return False
    if a.brackets != "names":
        order = sorted(range(len(names)), key=lambda k: names[k])
        if order != list(range(len(names))) and any(len(name) > 1 for name in names):
            return False
        values = [values[k] for k in order]
    return _in_order(values, b.items)


def _all_names(value: Items) -> set[str]:
    return {name for item in value.items if isinstance(item, Named) for name in item.names}


def _in_order(a: Sequence[Value], b: Sequence[Value]) -> bool:
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _without_repeats(items: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(item for k, item in enumerate(items) if not any(_equal(item, other) for other in items[:k]))


def _in_any_order(a: Sequence[Value], b: Sequence[Value]) -> bool:
    rest = list(b)
    for item in a:
        found = next((k for k, other in enumerate(rest) if _equal(item, other)), None)
        if found is None:
            return False
        del rest[found]
    return not rest


def _same_variable(a: RealSet, b: RealSet) -> bool:
    return a.variable is None or b.variable is None or a.variable == b.variable


def _entries(matrix: Matrix) -> list[Value]:
    return [entry for row in matrix.rows for entry in row]


def _matrices(a: Matrix, b: Matrix) -> bool:
    return len(a.rows) == len(b.rows) and all(_in_order(x, y) for x, y in zip(a.rows, b.rows, strict=True))


def _ratios(a: Ratio, b: Ratio) -> bool:
    if len(a.parts) != len(b.parts):
        return False
    first = [("product", a.parts[0], part) for part in b.parts[1:]]
    other = [("product", b.parts[0], part) for part in a.parts[1:]]
    nonzero = not any(agree(part, ("number", Fraction(0))) for part in (a.parts[0], b.parts[0]))
    return nonzero and all(agree(x, y) for x, y in zip(first, other, strict=True))


def _spelled(value: Scalar | Phrase) -> tuple[str | Fraction, ...] | None:
    if isinstance(value, Phrase):
        return value.tokens
    if value.letters:
        return (value.letters,)
    return (value.node[1],) if value.node[0] == "symbol" else None


def _same_words(a: tuple[str | Fraction, ...], b: tuple[str | Fraction, ...]) -> bool:
    a, b = _joined(a), _joined(b)
    if len(a) == len(b) and all(map(_same_token, a, b)):
        return True
    for x, y in ((a, b), (b, a)):
        if x[:1] == ("\\overline",) and len(y) == 1 and y[0] in (*x[1:], *(_reversed_name(x) or ())[1:]):
            # A segment with and without its bar. Over one letter it is a conjugate, a mean or a complement.
            return len(x) == 2 and len(y[0]) > 1 and y[0].isupper()
    return _reversed_name(a) is not None and _reversed_name(a) == b


def _reversed_name(tokens: tuple[str | Fraction, ...]) -> tuple[str, str] | None:
    """An angle or a segment named from its other end: angle ABC is angle CBA."""
    if len(tokens) != 2 or not isinstance(tokens[1], str) or not tokens[1].isalpha():
        return None
    if tokens[0] == "\\overline" and not tokens[1].isupper():
        return None  # a number by its digits
    return (tokens[0], tokens[1][::-1]) if _SYMMETRIC.get(tokens[0]) == len(tokens[1]) else None


def _joined(tokens: tuple[str | Fraction, ...]) -> tuple[str | Fraction, ...]:
    """Letters next to each other as one word: `A B C` is ABC."""
    found: list[str | Fraction] = []
    for token in tokens:
        together = found and isinstance(token, str) and isinstance(found[-1], str)
        if together and token.isalpha() and found[-1].isalpha() and len(token) == 1:
            found[-1] += token
        else:
            found.append(token)
    return tuple(found)


def _same_token(a: str | Fraction, b: str | Fraction) -> bool:
    return same_word(a, b) if isinstance(a, str) and isinstance(b, str) else a == b


def same_word(a: str, b: str) -> bool:
    """Whether two words are the same; letters that may be unknowns in the same case."""
    return a == b or (a.lower() == b.lower() and _is_word(a) and _is_word(b))


def _is_word(text: str) -> bool:
    if not (text.islower() or text.istitle() or text.isupper()):
        return False
    return text.lower() in _SHORT_WORDS or (len(text) > 3 and bool(_VOWELS & {*text.lower()}))


_COMPARISONS = {
    Scalar: _scalars,
    Phrase: lambda a, b: _same_words(a.tokens, b.tokens),
    Items: _items,
    Named: _both_named,
    Equation: _equations,
    Inequality: _inequalities,
    RealSet: lambda a, b: _same_variable(a, b) and real_sets.same_set(a, b),
    Matrix: _matrices,
    Ratio: _ratios,
    Literal: lambda a, b: a == b,
}
