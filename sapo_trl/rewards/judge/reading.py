"""Answers read as values of one kind each, before anything is compared."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

from . import real_sets
from .agreement import all_equal, is_within, value_of
from .expressions import matrix_of
from .groups import is_group, split
from .literals import read_literal
from .names import name_of, read_phrase, tuple_names
from .nodes import Node, symbols
from .quantities import read_angle, read_expression, read_scalar
from .spoken import read_spoken
from .tokens import Token, UnreadableError, tokenized
from .values import (
    Equation,
    Impossible,
    Inequality,
    Items,
    Matrix,
    Named,
    Ratio,
    RealSet,
    Rounded,
    Scalar,
    Value,
)


MAX_ITEMS = 30
_MAX_NESTING = 10
"""Of lists, brackets and relations, not of expressions."""
_RELATIONS = {
    "=": "=",
    "==": "=",
    "\\approx": "~",
    "\\simeq": "~",
    "\\doteq": "~",
    "\\equiv": "=",
    "<": "<",
    ">": ">",
    "\\lt": "<",
    "\\gt": ">",
    "\\le": "<=",
    "\\leq": "<=",
    "\\leqslant": "<=",
    "<=": "<=",
    "\\ge": ">=",
    "\\geq": ">=",
    "\\geqslant": ">=",
    ">=": ">=",
    "\\ne": "!=",
    "\\neq": "!=",
    "!=": "!=",
    "\\in": "in",
}
_CONJUNCTIONS = ("and", "or", "和", "或")
_POINTS = tuple("ABCDEFGHMNOPQRSTUVWXYZ")
_EMPTY = ("\\emptyset", "\\varnothing")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}")
_FULL_STOP = re.compile(r"(?<!\.)\.\Z")
_IN_WORDS: dict[str, Value] = {
    **dict.fromkeys(("all real numbers", "all reals", "all real values", "实数", "全体实数"), real_sets.everything()),
    **dict.fromkeys(("empty set", "the empty set", "no solution", "no solutions", "无解", "空集"), Items((), "{}")),
}


def read(latex: str) -> Value:
    """
    The value that an answer is.

    Raises:
        UnreadableError: if it has no reading, or more than one.
    """
    plain = plain_text(latex)
    if literal := (read_literal(plain) or read_spoken(plain)):
        return literal
    if plain.lower() in _IN_WORDS:
        return _IN_WORDS[plain.lower()]
    return _several(tokenized(latex), 0)


def plain_text(latex: str) -> str:
    r"""An answer without its commands for text: `5 cm` of `5\text{ cm}`."""
    return _FULL_STOP.sub("", " ".join(_TEXT_COMMAND.sub(r" \1 ", latex).split()))


def _several(tokens: list[Token], depth: int) -> Value:
    """A list, or a single value."""
    if depth > _MAX_NESTING:
        raise UnreadableError("too deep")
    parts, unions = split(tokens, lambda token: token.text in (",", ";") or _joins(token))
    if not (parts[0] and parts[-1]):
        raise UnreadableError("nothing beside a separator")
    parts = [part for part in parts if part]  # "1, 2, and 3"
    if len(parts) > MAX_ITEMS:
        raise UnreadableError("too many items")
    if len(parts) == 1:
        return _single(parts[0], depth)
    values = [_single(part, depth + 1) for part in parts]
    words = {token.text.lower() for token in unions if token.kind == "word" or token.kind == "letters"}
    either = bool(words & {"or", "或"}) or any(token.kind == "command" for token in unions)
    if all(isinstance(value, RealSet) and value.variable for value in values) and words:
        return real_sets.joined(values, either)
    return _as_items(values, "{}" if either else "")


def _joins(token: Token) -> bool:
    return (
        token.text.lower() in _CONJUNCTIONS and token.kind in ("word", "letters") or token.text in ("\\lor", "\\vee")
    )


def _is_pair(tokens: list[Token]) -> bool:
    return bool(tokens) and tokens[0].text == "(" and is_group(tokens) and any(token.text == "," for token in tokens)


def _as_items(values: list[Value], brackets: str) -> Items:
    flat: list[Value] = []
    for value in values:  # \pm 1, \pm 2
        flat += (
            value.items if isinstance(value, Items) and not value.brackets and not brackets.strip("{}") else [value]
        )
    return Items(tuple(flat), brackets)


def _single(tokens: list[Token], depth: int) -> Value:
    if not tokens or depth > _MAX_NESTING:
        raise UnreadableError("nothing, or too deep")
    if literal := read_literal("".join(" " * token.spaced + token.text for token in tokens).strip()):
        return literal
    parts, relations = split(tokens, lambda token: token.text in _RELATIONS)
    if relations:
        return _relation(parts, [_RELATIONS[token.text] for token in relations], depth)
    parts, colons = split(tokens, lambda token: token.text in (":", "\\colon"))
    if colons:
        if len(parts) == 2 and all(token.kind in ("letters", "word") for token in parts[0]) and name_of(parts[0]):
            if max(len(token.text) for token in parts[0]) < 3:
                raise UnreadableError("a ratio, or a name and its value")
            return Named((name_of(parts[0]),), _single(parts[1], depth + 1))  # Area: 5
        return Ratio(tuple(read_expression(part) for part in parts))
    if tokens[0].kind in ("letters", "word") and tokens[0].text in _POINTS and _is_pair(tokens[1:]):
        return Named((tokens[0].text,), _single(tokens[1:], depth + 1))  # the point P(2, 3)
    if angle := read_angle(tokens):
        return angle
    for read_as in (_brackets, _set_expression, _matrix):
        value = read_as(tokens, depth)
        if value is not None:
            return value
    try:
        return read_scalar(tokens)
    except UnreadableError:
        return _sentence(tokens, depth) or read_phrase(tokens)


def _sentence(tokens: list[Token], depth: int) -> Value | None:
    r"""`\text{The area is } 5`."""
    verb = next((k for k, token in enumerate(tokens) if token.text == "is"), 0)
    words = tokens[:verb]
    if not words or verb == len(tokens) - 1 or any(token.kind not in ("letters", "word") for token in words):
        return None
    name = name_of(words)
    return None if name is None else Named((name,), _single(tokens[verb + 1 :], depth + 1))


def _brackets(tokens: list[Token], depth: int) -> Value | None:
    """A tuple, a set or an interval: brackets around all, with commas in them."""
    opening, closing = tokens[0].text, tokens[-1].text
    if opening in _EMPTY and len(tokens) == 1:
        return Items((), "{}")
    if opening in ("{",) and closing == "}" and is_group(tokens):
        return _several(tokens[1:-1], depth + 1)
    if opening == "\\{" and closing == "\\}" and is_group(tokens):
        if len(tokens) == 2:
            return Items((), "{}")
        parts, bars = split(tokens[1:-1], lambda token: token.text in ("|", "\\mid", ":", "\\colon", "\\vert"))
        if len(parts) == 2 and bars:
            value = _several(parts[1], depth + 1)
            if isinstance(value, RealSet) and value.variable == _element_of(parts[0]):
                return RealSet(value.intervals)
            raise UnreadableError("a set of other things than real numbers")
        value = _several(tokens[1:-1], depth + 1)
        return _as_items(list(value.items) if _is_list(value) else [value], "{}")
    if opening not in ("(", "[", "]", "\\langle") or not is_group(tokens):
        return None
    parts, commas = split(tokens[1:-1], lambda token: token.text in (",", ";"))
    if not commas:
        value = _several(tokens[1:-1], depth + 1) if opening == "(" and closing == ")" else None
        return None if isinstance(value, Scalar) and value.letters is None else value
    if len(parts) > MAX_ITEMS:
        raise UnreadableError("too many items")
    names = {"\\langle": "<", "\\rangle": ">"}
    brackets = names.get(opening, opening) + names.get(closing, closing)
    values = tuple(_several(part, depth + 1) for part in parts)
    if brackets in ("(]", "[)", "][", "](", ")[", "]]", "[["):
        ends = brackets if brackets in ("(]", "[)") else _european(brackets)
        if len(values) != 2:
            raise UnreadableError("no interval")
        interval = real_sets.interval(values[0], values[1], ends)
        return interval or Items(values, ends)
    return Items(values, brackets)


def _element_of(tokens: list[Token]) -> str | None:
    r"""The `x` of `\{x \mid ...\}` and `\{x \in \mathbb{R} \mid ...\}`."""
    if [token.text for token in tokens[1:]] in ([], ["\\in", "\\mathbb{R}"]):
        return name_of(tokens[:1])
    return None


def _european(brackets: str) -> str:
    return ("(" if brackets[0] == "]" else "[") + (")" if brackets[1] == "[" else "]")


def _is_list(value: Value) -> bool:
    return isinstance(value, Items) and value.brackets == ""


def _set_expression(tokens: list[Token], depth: int) -> Value | None:
    r"""Sets of real numbers: `\mathbb{R}`, unions, intersections and differences."""
    operations = ("\\cup", "\\cap", "\\setminus", "\\backslash")
    if len(tokens) == 1 and tokens[0].text == "\\mathbb{R}":
        return real_sets.everything()
    parts, found = split(tokens, lambda token: token.text in operations)
    if not found:
        if tokens[0].text == "\\mathbb{R}" and len(tokens) > 2 and tokens[1].text == "-":
            parts, found = [tokens[:1], tokens[2:]], [Token("command", "\\setminus")]
        else:
            return None
    values = [_single(part, depth + 1) for part in parts]
    total = real_sets.as_real_set(values[0])
    for operation, value in zip(found, values[1:], strict=True):
        other = real_sets.as_real_set(value)
        if total is None or other is None:
            return None
        if operation.text == "\\cup":
            total = real_sets.union(total, other)
        elif operation.text == "\\cap":
            total = real_sets.intersection(total, other)
        else:
            total = real_sets.intersection(total, real_sets.complement(other))
    return total


def _matrix(tokens: list[Token], depth: int) -> Value | None:
    if tokens[0].text in ("[", "(") and is_group(tokens):
        tokens = tokens[1:-1]
    if len(tokens) < 3 or tokens[0].text != "\\begin" or tokens[2].text == "vmatrix":
        return None
    _, rows = matrix_of(tokens)
    return Matrix(tuple(tuple(_single(entry, depth + 1) for entry in row) for row in rows))


def _relation(parts: list[list[Token]], signs: list[str], depth: int) -> Value:
    if not parts[-1]:
        raise UnreadableError("nothing on the right")
    if {*signs} <= {"=", "~"}:
        return _equality(parts, depth) if signs[-1] == "=" else _approximation(parts, depth)
    if signs == ["in"]:
        value = real_sets.as_real_set(_several(parts[1], depth + 1))
        name = name_of(parts[0])
        if value is None or name is None:
            raise UnreadableError("no name in front of `\\in`, or no set of real numbers behind it")
        return RealSet(value.intervals, name)
    if {*signs} & {"in", "=", "~"} or ("!=" in signs and len(signs) > 1):
        raise UnreadableError("relations of several kinds")
    if not all(parts):
        raise UnreadableError("nothing on the left")
    nodes = [read_expression(part) for part in parts]
    found = real_sets.solved(nodes, signs)
    if found is not None:
        return found
    if any(not symbols(node) for node in nodes) and not any(symbols(node) for node in nodes):
        return Impossible()
    pairs = []
    for left, sign, right in zip(nodes, signs, nodes[1:], strict=False):
        if sign in (">", ">="):
            left, right, sign = right, left, sign.replace(">", "<")
        pairs.append(Inequality(left, right, sign))
    return pairs[0] if len(pairs) == 1 else Items(tuple(pairs), "<<")


def _equality(parts: list[list[Token]], depth: int) -> Value:
    """The value of a chain of equations, with its names; an equation; or a statement that is no answer."""
    if not parts[0]:  # = 5
        parts = parts[1:]
        if len(parts) == 1:
            return _several(parts[0], depth + 1)
    if not all(parts):
        raise UnreadableError("nothing between two signs")
    names = tuple_names(parts[0]) if len(parts) == 2 else None
    value = _several(parts[-1], depth + 1)
    if names and isinstance(value, Items) and value.ordered and len(names) == len(value.items):
        return Items(tuple(Named((n,), v) for n, v in zip(names, value.items, strict=True)), "names")
    nodes: list[Node | None] = []
    labels = []
    for position, part in enumerate(parts):
        if 0 < position < len(parts) - 1 and _two_statements(part):
            raise UnreadableError("two equations without a sign between them")
        try:
            scalar = read_scalar(part)
            nodes.append(scalar.node if isinstance(scalar, Scalar) else None)
        except UnreadableError:
            nodes.append(None)
        label = name_of(part)
        if label is not None:
            labels.append(label)
    numeric = [node for node in nodes if node is not None and not symbols(node)]
    if not all_equal(numeric):
        return Impossible()
    if len(parts) == 2 and name_of(parts[1]) is not None and nodes[0] is not None and not symbols(nodes[0]):
        return Named((name_of(parts[1]),), _several(parts[0], depth + 1), (nodes[0], nodes[1]) if nodes[1] else None)
    both = (nodes[0], nodes[-1]) if len(parts) == 2 and None not in nodes else None
    if both and both[0] == both[1]:
        return Impossible()
    first = name_of(parts[0])
    own = nodes[-1] is not None and first in symbols(nodes[-1])
    if first is not None and not own and not (isinstance(value, Items) and value.brackets == "" and both):
        if isinstance(value, Items) and value.brackets == "":
            return Items(tuple(Named(tuple(labels), item) for item in value.items), "")
        return Named(tuple(labels), value, both)
    if len(numeric) == len(parts):
        return value
    if both:
        return Equation(*both)
    if nodes[-1] is not None and not symbols(nodes[-1]) and len(parts) > 2:
        return Named(tuple(labels), value)
    raise UnreadableError("an equation of other things than expressions")


def _approximation(parts: list[list[Token]], depth: int) -> Value:
    r"""`x = 2\sqrt{3} \approx 3.46`: a number and the same one, rounded."""
    exact = _equality(parts[:-1], depth) if len(parts) > 2 else _several(parts[0], depth) if parts[0] else None
    inner = exact.value if isinstance(exact, Named) else exact
    if not isinstance(inner, Scalar) or symbols(inner.node) or inner.letters:
        return _equality(parts, depth)  # x \approx 3.46
    rounded = _several(parts[-1], depth)
    if not isinstance(rounded, Scalar) or symbols(rounded.node):
        raise UnreadableError("an approximation by no number")
    half = Fraction(1, 2 * 10 ** (rounded.places or 0))
    values = value_of(rounded.node), value_of(inner.node)
    if not is_within(*values, half, Fraction(1)):
        return Impossible()
    # \pi \approx 3 is no 3.
    return Rounded(exact, rounded) if is_within(*values, half, Fraction(1, 100)) else exact


def _two_statements(tokens: list[Token]) -> bool:
    """`1 y`, between the signs of `x=1 y=2`."""
    return any(a.kind == "number" and b.kind in ("letters", "word") and b.spaced for a, b in pairwise(tokens))
