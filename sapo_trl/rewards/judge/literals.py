"""Dates, times of the day, and numbers in other bases than ten."""

from __future__ import annotations

import re

from .values import Literal


_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = "|".join(f"{month}|{month[:3]}" for month in _MONTHS)
_TIME = re.compile(
    r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))? ?([ap])\.? ?m\.?|(\d{1,2}):(\d{2})(?::(\d{2}))?", re.IGNORECASE
)
_SLASHED = re.compile(r"(\d+) ?/ ?(\d+) ?/ ?(\d+)")
_ISO = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})|(\d{4}) ?年 ?(\d{1,2}) ?月 ?(\d{1,2}) ?日")
_DATE = re.compile(
    rf"(?:({_MONTH})\.? (\d{{1,2}})(?:st|nd|rd|th)?|(\d{{1,2}})(?:st|nd|rd|th)?(?: of)? ({_MONTH})\.?)"
    r"(?:,? ?(\d{4}))?",
    re.IGNORECASE,
)
_NUMBER_WORDS = {"two": 2, "eight": 8, "ten": 10, "three": 3, "five": 5, "six": 6, "seven": 7, "nine": 9, "four": 4}
_BASE = rf"(\d{{1,2}}|{'|'.join(_NUMBER_WORDS)})"
_BASED = re.compile(rf"\(?([0-9A-Z]+)\)? ?(?:_ ?\{{? ?\(?{_BASE}\)? ?\}}?|\(?base {_BASE}\)?)", re.IGNORECASE)


def read_literal(text: str) -> Literal | None:
    """The literal that a plain text is, `None` if it is none."""
    if match := _TIME.fullmatch(text):
        hour, minute, second = (int(x or 0) for x in (match.groups()[:3] if match[1] else match.groups()[4:]))
        if minute > 59 or second > 59 or hour > (12 if match[4] else 23):
            return None
        if match[4]:
            return Literal("time of day", (hour % 12 + (12 if match[4].lower() == "p" else 0), minute, second))
        return Literal("time of day" if hour > 12 else "time", (hour, minute, second))
    if match := _SLASHED.fullmatch(text):
        return Literal("slashed date", tuple(int(x) for x in match.groups()))
    if match := _ISO.fullmatch(text):
        return Literal("date", tuple(int(x) for x in match.groups() if x))
    if match := _DATE.fullmatch(text):
        month, day = (match[1], match[2]) if match[1] else (match[4], match[3])
        number = next(k for k, name in enumerate(_MONTHS, start=1) if name.startswith(month.lower()))
        return Literal("date", (int(match[5] or 0), number, int(day)))
    if (match := _BASED.fullmatch(text)) and any(x.isdigit() for x in match[1]):
        word = (match[2] or match[3]).lower()
        base = _NUMBER_WORDS.get(word) or int(word)
        # A1_2 may be a name; 1A_2 is nothing.
        if 2 <= base <= 36 and all(int(x, 36) < base for x in match[1]):
            return Literal("based number", (match[1].lstrip("0").upper(), base))
        return Literal("name", (match[1], base))
    return None
