"""Numbers in words, and ordinal numbers."""

from __future__ import annotations

import re
from fractions import Fraction

from .values import Scalar


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen".split()
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBERS = {word: number for number, word in enumerate(_ONES)}
_NUMBERS |= {
    f"{ten}{rest}": 20 + 10 * position + one
    for position, ten in enumerate(_TENS)
    for one in range(10)
    for rest in ([""] if one == 0 else [f"-{_ONES[one]}", f" {_ONES[one]}"])
}
# Of plain text: `5^{ th }` was `5^{\\text{th}}`.
_ORDINAL = re.compile(r"([1-9]\d{0,5}) ?(?:\^ ?\{? ?)?(st|nd|rd|th) ?\}?")


def read_spoken(text: str) -> Scalar | None:
    """
    The number that a plain text is: `seven`, `twenty-one`, `5th`. `None` for any other, such as `fifth`, which may be
    a fifth.
    """
    number = _NUMBERS.get(text.lower())
    if number is None and (match := _ORDINAL.fullmatch(text)) and match[2] == _ending(int(match[1])):
        number = int(match[1])
    return None if number is None else Scalar(("number", Fraction(number)))


def _ending(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
