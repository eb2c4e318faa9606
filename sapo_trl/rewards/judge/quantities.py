"""Numbers and expressions with units, percent and currencies."""

from __future__ import annotations

import re
from fractions import Fraction

from .expressions import parsed
from .nodes import Node, has_sign, with_sign
from .tokens import Token, UnreadableError
from .units import CURRENCIES, SCALES, Unit, read_unit, unit_named
from .values import Items, Scalar, Value


_POWER_OF_TEN = re.compile(r"(?:(?:\\times|\\cdot|\*)10\^(?:-?\d|\{-?\d{1,4}\}))?")
_ANGLE = re.compile(r"(\d+)(?:\^?\\circ|\^\{\\circ\}|\\degree)(\d{1,2}(?:\.\d+)?)'(?:(\d{1,2}(?:\.\d+)?)(?:''|\"))?")
_COUNTRIES = ("US", "HK", "NT", "NZ", "AU", "A", "C", "CA", "S")


def read_scalar(tokens: list[Token]) -> Value:
    """A number or an expression with its unit; two of them for `\\pm`."""
    tokens, currency = _without_currency(tokens)
    scale, percent, unit = 1, False, None
    for start in range(1, len(tokens) + 1):
        suffix = _suffix(tokens[start:])
        if suffix is None:
            continue
        if start < len(tokens) and _are_words(tokens[:start]):
            continue
        try:
            node = parsed(tokens[:start])
        except UnreadableError:
            if start == len(tokens):
                raise
            continue
        scale, percent, unit = suffix
        break
    else:
        raise UnreadableError("no expression")
    literal = _literal_places(tokens[:start])
    if scale != 1:
        node, literal = ("product", node, ("number", Fraction(scale))), None
    if currency is not None:
        unit = currency if unit is None else currency * unit
    node, unit, percent = _without_marks(node, unit, percent)
    if has_sign(node):
        both = [Scalar(with_sign(node, plus), unit, percent) for plus in (True, False)]
        return Items(tuple(both), "")
    return Scalar(node, unit, percent, literal, _letters(tokens))


def read_angle(tokens: list[Token]) -> Scalar | None:
    r"""An angle in degrees and minutes, `35^\circ 30'`, with or without seconds."""
    match = _ANGLE.fullmatch("".join(token.text for token in tokens))
    if not match:
        return None
    degrees, minutes, seconds = (Fraction(part or 0) for part in match.groups())
    if minutes >= 60 or seconds >= 60 or (match[3] and minutes.denominator > 1):
        raise UnreadableError("more than 59 minutes or seconds of an angle")
    return Scalar(("number", degrees + minutes / 60 + seconds / 3600), Unit((("degree", 1),)))


def read_expression(tokens: list[Token]) -> Node:
    """An expression with one value."""
    node = parsed(tokens)
    if has_sign(node):
        raise UnreadableError("two values at once")
    return node


def _are_words(tokens: list[Token]) -> bool:
    """Letters that are no number of things: `no` of "no solution"."""
    return all(token.kind in ("letters", "word") for token in tokens) and (
        len(tokens) > 1 or len(tokens[0].text) > 1 or tokens[0].kind == "word" or tokens[0].text in "aAI"
    )


def _without_marks(node: Node, unit: Unit | None, percent: bool) -> tuple[Node, Unit | None, bool]:
    """`40^\\circ` as 40 degrees, `50%` as 50 percent: marks at the end of an expression are units."""
    if node[0] == "negative":
        inner, unit, percent = _without_marks(node[1], unit, percent)
        return ("negative", inner), unit, percent
    if node[0] == "percent" and unit is None and not percent:
        return node[1], None, True
    if node[0] == "product" and node[-1] == ("constant", "degree") and unit is None:
        return (node[1] if len(node) == 3 else node[:-1]), Unit((("degree", 1),)), percent
    if node[0] == "product" and node[-1][0] in ("product", "percent"):
        last, unit, percent = _without_marks(node[-1], unit, percent)
        return (*node[:-1], last), unit, percent
    return node, unit, percent


def _without_currency(tokens: list[Token]) -> tuple[list[Token], Unit | None]:
    """`\\$18`, `-\\$18`, `USD 18`."""
    sign = [tokens[0]] if tokens[0].text in ("+", "-") else []
    rest = tokens[len(sign) :]
    country = rest[0].text if len(rest) > 1 and rest[1].text == "$" and rest[0].text in _COUNTRIES else ""
    rest = rest[1:] if country else rest
    if rest and rest[0].text in CURRENCIES and len(rest) > 1:
        name = rest[0]
        rest = rest[2:] if rest[1].text == "." and len(rest) > 2 else rest[1:]
        unit = unit_named(Token("word", name.text))
        return sign + rest, unit if country in ("", "US") else Unit(((f"{country} dollar", 1),))
    return tokens, None


def _suffix(tokens: list[Token]) -> tuple[int, bool, Unit | None] | None:
    """Scale, percent and unit behind an expression; `None` if the tokens are anything else."""
    scale, percent = 1, False
    while tokens and tokens[0].text.lower() in SCALES and tokens[0].kind in ("word", "letters"):
        scale *= SCALES[tokens[0].text.lower()]
        tokens = tokens[1:]
    if tokens and (tokens[0].text in ("%", "percent", "percents")):
        percent, tokens = True, tokens[1:]
    if not tokens:
        return scale, percent, None
    if scale > 1 and tokens[0].text.lower() == "of":
        tokens = tokens[1:]
    texts = [token.text for token in tokens]
    for circle in (["^", "\\circ"], ["^", "{", "\\circ", "}"], ["\\circ"], ["\\degree"]):
        if texts[: len(circle)] == circle and texts[len(circle) :] in (["C"], ["F"]):
            return scale, percent, Unit((({"C": "celsius", "F": "fahrenheit"}[texts[-1]], 1),))
    if len(tokens) > 1 and tokens[-1].text == "old":  # years
        tokens = tokens[:-1]
    if tokens[0].text == "(" and tokens[-1].text == ")":
        tokens = tokens[1:-1]
    unit = read_unit(tokens) if not percent else None
    return None if unit is None else (scale, percent, unit)


def _literal_places(tokens: list[Token]) -> int | None:
    """Decimal places of a number that stands alone, or times a power of ten."""
    if tokens and tokens[0].text in ("+", "-"):
        tokens = tokens[1:]
    if tokens and tokens[0].kind == "number" and tokens[0].places:
        if _POWER_OF_TEN.fullmatch("".join(token.text for token in tokens[1:])):
            return tokens[0].places
    return None


def _letters(tokens: list[Token]) -> str | None:
    if all(token.kind in ("letters", "word") for token in tokens):
        joined = "".join(token.text for token in tokens)
        return joined if len(joined) > 1 and joined != "pi" else None
    capitals = [token for token in tokens if token.kind in ("letters", "word")]
    if "_" in (token.text for token in tokens) and sum(len(token.text) for token in capitals) > 1:
        # H_2O and A_1B_1 are names too, x_1x_2 is a product.
        named = all(token in capitals or token.kind == "number" or token.text in ("_", "{", "}") for token in tokens)
        joined = "".join(token.text for token in tokens if token.text not in ("{", "}"))
        return joined if named and joined.isupper() and tokens[0] in capitals else None
    return None
