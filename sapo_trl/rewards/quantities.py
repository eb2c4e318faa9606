r"""
Reads a number with its unit from an answer, in LaTeX or plain text.

It reads decimals with thousands separators, fractions, mixed numbers, powers, percent, roots, multiples of π, words
such as *million*, and the units of a list. It does not read a text with two readings: `1/2\pi`, `5m`, `12 - 13`.
"""

import math
import re
from dataclasses import dataclass, replace

from .markup import STRUCK, plain_characters, without_fonts
from .units import read_unit


# An answer is short; a longer text is not searched.
_MAX_CHARACTERS = 200
_MAX_DEPTH = 40
# Sides of an equation are equal up to this share: `x = 5/3 = 1.67`.
_ROUNDING = 0.01

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\%", "%"),
        (r"\\?\$|\\[()\[\]]|^\s*\*\*|\*\*\s*$", " "),
        (r"\{,\}", ","),
        (r"\\mu(?![a-zA-Z])", "μ"),
        (r"\\(?:Omega|ohm)(?![a-zA-Z])", "Ω"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])", "°"),
        (r"\\(?:approx|simeq|sim)(?![a-zA-Z])|[≃≅]", "≈"),
        (r"\*\*", "^"),
        (r"\\(?:times|cdot)(?![a-zA-Z])|[×·⋅∙]", "*"),
        (r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)", "*"),
        (r"÷|\\div(?![a-zA-Z])", "/"),
        (r"π|(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"∛", r"\\sqrt[3]"),
        (r"√|(?<![\\a-zA-Z])sqrt(?![a-zA-Z])", r"\\sqrt "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    ]
]

_COMPARISON = re.compile(
    r"[<>≤≥≠≮≯⩽⩾≦≧±∓∈]|!=|=!|\\(?:n?leq?|leqslant|n?geq?|geqslant|lt|gt|neq?|not|pm|mp|in)(?![a-zA-Z])"
)
_EQUALS = re.compile("[=≈]")
# A name in an equation: `x`, `AB`, `f(2)`, `m\angle A`. It has no digits and roots: in `2x = 12`, x is not 12.
_NAME = re.compile(
    r"(?=.*[^\W\d_])(?!\s*-|\s*\|\s*[a-vxy]\s*\|\s*\Z|.*\b(?:not|no|never)\b|.*\\(?:sqrt|frac))"
    r"(?:[^\W\d]|[\s'′|{}+:∠△-]|\\[a-zA-Z]+|(?<=[_{])[0-9]|\([^()]*\))++"
)
_ANNOUNCEMENT = re.compile(
    r"\A\s*(?:(?:so|thus|hence|therefore)\b[\s,]*)?(?:the\s+)?(?:(?:final|correct|exact)\s+)?"
    r"(?:answer|result|value|total|sum)\s*(?:is|equals|:)\s",
    re.IGNORECASE,
)
_ABOUT = re.compile(
    r"\A\s*(?:(?:about|approximately|approx\.?|around|roughly|exactly)(?![a-z])|大?[约約])", re.IGNORECASE
)
_MINUS = re.compile(r"\s*(?:(?:minus|negative)\s|[负負])", re.IGNORECASE)
# One dollar sign, or an escaped one, in front of a digit; two of them delimit a formula.
_DOLLARS = re.compile(r"[^$]*(?:\\\$|\$(?=[^$]*\Z))\s*[0-9.]")
_CURRENCY = re.compile(
    r"\A\s*([+-]?)\s*(?:[A-Z]{0,2}([€£¥₹₩₽₺₪₫₱₦₴])|(?:US|Rs\.?|USD|EUR|GBP|CNY|RMB|INR|JPY|CHF)(?![A-Za-z]))"
)

_SEPARATED = "|".join(rf"[1-9][0-9]{{0,2}}(?:{separator}[0-9]{{3}})+(?![0-9])" for separator in (",", "'", r"\s"))
_NUMBER = re.compile(
    rf"\s*({_SEPARATED}|[0-9]+|(?=\.[0-9]))"
    r"(?:\.([0-9]*)(?:\\(?:overline|bar|dot)\s*\{([0-9]{1,9})\})?)?([eE][+-]?[0-9]+)?"
)
_MIXED = re.compile(
    r"\s*([0-9]+)(?:\s*\\frac\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
    r"|\s+([0-9]{1,2})\s*/\s*([0-9]+))"
)
_DIGIT = re.compile(r"\s*([0-9])")
_INTEGER_OR_DECIMAL = re.compile(r"\s*([+-]?[0-9]+(?:\.[0-9]+)?)")
_INDEX = re.compile(r"\s*\[\s*([1-9][0-9]?)\s*\]")
_SYMBOL = re.compile(r"\s*\\(pi|sqrt|frac)(?![a-zA-Z])")

_MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
    **dict.fromkeys("万萬", 10**4),
    **dict.fromkeys("亿億", 10**8),
}
_MULTIPLIER = re.compile(rf"\s*(?:({'|'.join(_MULTIPLIERS)})(?![a-z]))", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|(?:percent|per\s+cent)(?![a-z]))", re.IGNORECASE)
_PER_MILLE = re.compile(r"\s*‰")


@dataclass(frozen=True)
class Quantity:
    """A finite number with its unit, in one notation. 75% has the value 75 and is a percentage."""

    value: float
    unit: str = ""
    is_percent: bool = False


def read_quantity(text: str) -> Quantity | None:
    r"""
    The quantity of an answer, or `None` if the answer is not exactly one quantity.

    Args:
        text (`str`):
            The answer alone, such as the content of a box. For an equation, `x = 5 \text{ cm}`, the last side counts.
            The other sides must be names or equal numbers.

    Example:

    ```python
    >>> from sapo_trl.rewards.quantities import read_quantity

    >>> read_quantity(r"x = 2\frac{1}{2}\,\mathrm{cm}"), read_quantity("x > 2")
    (Quantity(value=2.5, unit='cm', is_percent=False), None)
    ```
    """
    if len(text) > _MAX_CHARACTERS:
        return None
    in_dollars = _DOLLARS.match(text) is not None
    text = without_fonts(STRUCK.sub("", plain_characters(text)), edge=" ")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if _COMPARISON.search(text):
        return None
    first, *others = _EQUALS.split(_ANNOUNCEMENT.sub("", text))
    sides = [first, *others] if first.strip() or not others else others
    last = len(sides) - 1
    read = [_read_side(side, may_be_sum=i < last) for i, side in enumerate(sides)]
    if any(
        quantity is None and not (last and _NAME.fullmatch(side)) for quantity, side in zip(read, sides, strict=True)
    ):
        return None
    quantities = [quantity for quantity in read if quantity is not None]
    if not quantities or not all(_are_equal(quantity, quantities[-1]) for quantity in quantities):
        return None
    last_one = quantities[-1]
    return replace(last_one, unit="$") if in_dollars and not last_one.unit else last_one


def _are_equal(one: Quantity, other: Quantity) -> bool:
    scales = (1, 100, 0.01) if one.is_percent != other.is_percent else (1,)
    return any(math.isclose(one.value * scale, other.value, rel_tol=_ROUNDING) for scale in scales)


def _read_side(text: str, may_be_sum: bool) -> Quantity | None:
    text = _without_outer_brackets(_ABOUT.sub("", text).strip())
    if minus := _MINUS.match(text):
        text = f"-{text[minus.end() :]}"
    currency = _CURRENCY.match(text)
    text = _CURRENCY.sub(r"\1", text)
    reader = _Reader(text)
    try:
        value = reader.sum(may_be_plain=may_be_sum)
    except (_NotANumber, ZeroDivisionError, OverflowError, ValueError):  # the last: 0 to a negative power
        return None
    position = reader.position
    is_percent = False
    if multiplier := _MULTIPLIER.match(text, position):
        value *= _MULTIPLIERS[multiplier[1].lower()]
        position = multiplier.end()
    elif percent := _PERCENT.match(text, position):
        position, is_percent = percent.end(), True
    elif per_mille := _PER_MILLE.match(text, position):
        value, position = value / 1000, per_mille.end()
    rest = text[position:]
    if text[position - 1] == "." and rest.startswith("."):  # the start of a range, "9.."
        return None
    unit = read_unit(rest)
    if unit is None or not math.isfinite(value) or (is_percent and unit and not unit.startswith("/")):
        return None
    if currency and not unit and not is_percent:
        unit = currency[2] or ""
    return Quantity(value, unit, is_percent)


def _without_outer_brackets(text: str) -> str:
    for _ in range(_MAX_DEPTH):
        if text[:1] + text[-1:] not in ("()", "{}"):
            break
        depth = 0
        for i, character in enumerate(text):
            depth += (character in "({") - (character in ")}")
            if depth == 0 and i < len(text) - 1:
                return text
        text = text[1:-1].strip()
    return text


class _NotANumber(Exception):
    """The text is not a number, or has two readings."""


class _Reader:
    """A recursive-descent parser. Each method reads from `position` on, and moves it to the end of its part."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.depth = 0
        self.has_symbol = False

    def sum(self, may_be_plain: bool = True) -> float:
        """Read a sum. `12 - 13` and `12+` may be ranges, so plain numbers are added only with `may_be_plain`."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _NotANumber
        sign = self._one_of("+-")
        value = self._product() * (-1 if sign == "-" else 1)
        is_sum = False
        while sign := self._one_of("+-"):
            value += self._product() * (-1 if sign == "-" else 1)
            is_sum = True
        if is_sum and not may_be_plain and not self.has_symbol:
            raise _NotANumber
        self.depth -= 1
        return value

    def _product(self) -> float:
        value = self._factor()
        is_divided = False
        while True:
            start = self.position
            if self._one_of("*"):
                value *= self._factor()
            elif self._one_of("/"):
                try:
                    divisor = self._factor()
                except _NotANumber:  # of a unit, as in m/s
                    self.position = start
                    return value
                if is_divided:
                    raise _NotANumber
                value, is_divided = value / divisor, True
            elif _SYMBOL.match(self.text, start):
                try:
                    factor = self._factor()
                except _NotANumber:  # of a unit, as in \frac{m}{s}
                    self.position = start
                    return value
                if is_divided:  # 1/2\pi
                    raise _NotANumber
                value *= factor
            else:
                return value

    def _factor(self) -> float:
        if mixed := _MIXED.match(self.text, self.position):
            self.position = mixed.end()
            whole, top, bottom = (int(group) for group in mixed.groups() if group)
            if top >= bottom or self._one_of("^"):
                raise _NotANumber
            return whole + top / bottom
        value = self._base()
        if self._one_of("^"):
            value = math.pow(value, self._argument(_INTEGER_OR_DECIMAL))
            if self._one_of("^"):
                raise _NotANumber
        return value

    def _base(self) -> float:
        symbol = _SYMBOL.match(self.text, self.position)
        if not symbol:
            return self._group() if self._next() in ("(", "{") else self._number()
        self.position = symbol.end()
        if symbol[1] == "frac":
            top = self._argument(_DIGIT)
            return top / self._argument(_DIGIT)
        self.has_symbol = True
        return math.pi if symbol[1] == "pi" else self._root()

    def _root(self) -> float:
        index = _INDEX.match(self.text, self.position)
        degree = int(index[1]) if index else 2
        self.position = index.end() if index else self.position
        value = self._argument(None)
        if value < 0 and degree % 2 == 0:
            raise _NotANumber
        return math.copysign(abs(value) ** (1 / degree), value) if degree != 2 else math.sqrt(value)

    def _argument(self, bare: re.Pattern | None) -> float:
        """The argument of a command or a power: a group, π, or a number without braces (in the form `bare`)."""
        if self._next() in ("(", "{"):
            return self._group()
        symbol = _SYMBOL.match(self.text, self.position)
        if symbol and symbol[1] == "pi":
            return self._base()
        if bare is None:
            return self._number()
        match = bare.match(self.text, self.position)
        if not match:
            raise _NotANumber
        self.position = match.end()
        return float(match[1])

    def _group(self) -> float:
        closing = {"(": ")", "{": "}"}[self._one_of("({")]
        value = self.sum()
        if not self._one_of(closing):
            raise _NotANumber
        return value

    def _number(self) -> float:
        match = _NUMBER.match(self.text, self.position)
        if not match:
            raise _NotANumber
        self.position = match.end()
        whole, decimals, repeated, exponent = match.groups()
        decimals = decimals or ""
        value = float(f"{re.sub('[^0-9]', '', whole) or 0}.{decimals}{exponent or ''}")
        if repeated:
            if exponent:
                raise _NotANumber
            value += int(repeated) / (10 ** len(repeated) - 1) / 10 ** len(decimals)
        return value

    def _next(self) -> str:
        return self.text[self.position :].lstrip()[:1]

    def _one_of(self, characters: str) -> str | None:
        """The next character, if it is one of these."""
        found = self._next()
        if not found or found not in characters:
            return None
        self.position = self.text.index(found, self.position) + 1
        return found
