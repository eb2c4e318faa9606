r"""
Reward for a number that is close enough, and how numbers are read off answers.

Read are decimals with thousands separators, fractions, powers, percent, and multiples of roots and of π, in LaTeX or
plain text, with or without a unit. Anything else, such as two numbers or an unknown, is no number. This is for golds
that are measured or rounded; exact mathematics is [`~sapo_trl.rewards.equivalence.is_equivalent`].
"""

import math
import re
from collections.abc import Sequence

from .completion import Completion, completion_text, last_boxed


# An answer is short; a longer text is not searched.
_MAX_CHARACTERS = 200

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\[,;:! ]|\\(?:left|right)(?![a-zA-Z])|[$€£¥~]|\\\$", " "),
        (r"\{,\}", ","),
        (r"\\%", "%"),
        (r"[−–]", "-"),
        (r"\\(?:times|cdot)(?![a-zA-Z])|[×·]", "*"),
        (r"π", r"\\pi "),
        (r"√", r"\\sqrt "),
        (r"\\[dt]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\circ|\\degree", "°"),
        (r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"^.*(?:=|≈|\\approx)", ""),
        (r"^\s*(?:about|approximately|around|roughly)\s", ""),
    ]
]
_NUMBER = re.compile(
    r"\s*([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
)
_MIXED = re.compile(r"\s+([0-9]+)\s*/\s*([0-9]+)")
_SYMBOL = re.compile(r"\s*(\\pi(?![a-zA-Z])|\\sqrt(?![a-zA-Z])|\\frac|[{}*/^+-])")
# Words, and single letters only where they are units: 5x is no number. Squares and cubes may follow. Possessive, since
# there are exponentially many ways to cut letters into words.
_UNIT = re.compile(r"(?:\s|[%°'\"./²³]|\^\{?[23]\}?|[A-Za-zµμΩ]{2,}+|[mgshLNJKVAWCFTΩ](?![A-Za-z]))*+")


def read_number(text: str) -> float | None:
    r"""
    The number that an answer is; a percentage without its sign, so that 75% is 75.

    Args:
        text (`str`):
            The answer alone, such as what stands in a box.

    Returns:
        `float` or `None`: Always finite; `None` if the answer is not one number.

    Example:

    ```python
    >>> from sapo_trl.rewards.numbers import read_number

    >>> [read_number(text) for text in ("1,250 km", r"\frac{3}{4}", r"2\pi", "x + 1")]
    [1250.0, 0.75, 6.283185307179586, None]
    ```
    """
    return _read(text)[0]


def read_numbers(text: str) -> list[float] | None:
    """The numbers of a list such as `[2007, 2008]`, in its order; `None` if anything else is in it."""
    if len(text) > _MAX_CHARACTERS:
        return None
    inner = text.replace("\\", "").strip(" $").removeprefix("{").removesuffix("}").strip("[]() ")
    numbers = [read_number(part) for part in inner.split(",")]
    return None if None in numbers else numbers


def is_close(
    answer: str, gold: str, *, rel_tol: float = 1e-9, abs_tol: float = 0.0, precision: int | None = None
) -> bool:
    """
    Whether two answers are numbers that are close.

    A percentage may be written as a fraction of 1: both 75 and 0.75 are close to 75%.

    Args:
        answer (`str`):
            What was answered.
        gold (`str`):
            The right answer.
        rel_tol (`float`, *optional*, defaults to `1e-9`):
            Difference that is allowed, as a share of the larger number.
        abs_tol (`float`, *optional*, defaults to `0.0`):
            Difference that is allowed whatever the numbers are.
        precision (`int`, *optional*):
            Decimals that count: both numbers are rounded to so many and must then be equal. The tolerances are not
            used.
    """
    (number, is_percent), (right, gold_is_percent) = _read(answer), _read(gold)
    if number is None or right is None:
        return False
    pairs = [(number, right)]
    if is_percent != gold_is_percent:
        pairs.append((number / 100, right) if is_percent else (number, right / 100))
    if precision is not None:
        return any(round(a, precision) == round(b, precision) for a, b in pairs)
    return any(math.isclose(a, b, rel_tol=rel_tol, abs_tol=abs_tol) for a, b in pairs)


def numeric_reward(
    completions: list[Completion],
    answer: list[str],
    precision: Sequence[int | None] | None = None,
    rel_tol: float = 1e-4,
    abs_tol: float = 0.0,
    **kwargs,
) -> list[float]:
    r"""
    1.0 for each completion whose last `\boxed{}` is a number close to the answer, else 0.0.

    Args:
        completions (`list`):
            Completions, each a string or a list of messages.
        answer (`list[str]`):
            Right answers, each a number as [`read_number`] reads it.
        precision (`list[int]`, *optional*):
            Decimals that count, for each answer; `None` for the tolerances.
        rel_tol (`float`, *optional*, defaults to `1e-4`), abs_tol (`float`, *optional*, defaults to `0.0`):
            As for [`is_close`].
        **kwargs:
            The trainer's other columns, unused.

    Returns:
        `list[float]`: One reward a completion. A completion without a box scores 0.0.

    Example:

    ```python
    >>> from sapo_trl.rewards.numbers import numeric_reward

    >>> numeric_reward(completions=[r"\boxed{3.14 cm}", r"\boxed{3}"], answer=["3.1416"] * 2, rel_tol=0.01)
    [1.0, 0.0]
    ```
    """
    decimals = precision if precision is not None else [None] * len(completions)
    if not len(completions) == len(answer) == len(decimals):
        raise ValueError(
            f"{len(completions)} completions came with {len(answer)} values of `answer` and {len(decimals)} of "
            "`precision`; one each is needed."
        )
    rewards = []
    for completion, gold, places in zip(completions, map(str, answer), decimals, strict=True):
        if read_number(gold) is None:
            raise ValueError(f"`answer` must be a number for `numeric_reward`, got {gold!r}.")
        box = last_boxed(completion_text(completion))
        rewards.append(
            float(box is not None and is_close(box, gold, rel_tol=rel_tol, abs_tol=abs_tol, precision=places))
        )
    return rewards


def _read(text: str) -> tuple[float | None, bool]:
    """The number, and whether it is a percentage."""
    if len(text) > _MAX_CHARACTERS:
        return None, False
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    try:
        value, end = _quotient(text, 0)
    except (_NotANumber, ZeroDivisionError, OverflowError, ValueError):  # the last: 0 to a negative power
        return None, False
    unit = text[end:]
    if not math.isfinite(value) or not _UNIT.fullmatch(unit):
        return None, False
    return value, "%" in unit or "percent" in unit.lower()


class _NotANumber(Exception):
    """Nothing can be read at a place where a number has to be."""


# Each of these reads from a place in the text and returns a value and the place behind it.


def _quotient(text: str, start: int) -> tuple[float, int]:
    symbol, after = _symbol(text, start)
    sign, start = (-1.0 if symbol == "-" else 1.0, after) if symbol in ("+", "-") else (1.0, start)
    value, end = _product(text, start)
    if _symbol(text, end)[0] == "/":
        try:
            divisor, after = _product(text, _symbol(text, end)[1])
            value, end = value / divisor, after
        except _NotANumber:
            pass  # of a unit, as in m/s
    return sign * value, end


def _product(text: str, start: int) -> tuple[float, int]:
    value, end = _factor(text, start)
    while True:
        symbol, after = _symbol(text, end)
        try:
            if symbol == "*":
                factor, end = _factor(text, after)
            elif symbol == "\\frac" and float(value).is_integer() and text[start:end].strip().isdigit():
                part, end = _factor(text, end)  # 2\frac{1}{2} is two and a half
                value += part
                continue
            elif symbol in ("\\pi", "\\sqrt", "\\frac"):
                factor, end = _factor(text, end)
            else:
                mixed = _MIXED.match(text, end)
                if mixed and text[start:end].strip().isdigit():
                    value, end = value + int(mixed[1]) / int(mixed[2]), mixed.end()
                return value, end
        except _NotANumber:
            return value, end
        value *= factor


def _factor(text: str, start: int) -> tuple[float, int]:
    symbol, end = _symbol(text, start)
    if symbol == "\\pi":
        value = math.pi
    elif symbol == "\\sqrt":
        value, end = _group(text, end)
        if value < 0:
            raise _NotANumber
        value = math.sqrt(value)
    elif symbol == "\\frac":
        top, end = _group(text, end)
        bottom, end = _group(text, end)
        value = top / bottom
    else:
        value, end = _number(text, start)
    if symbol is None and _symbol(text, end)[0] == "^":
        exponent, end = _group(text, _symbol(text, end)[1])
        value = math.pow(value, exponent)
    return value, end


def _group(text: str, start: int) -> tuple[float, int]:
    """What stands between braces, or a bare number behind a command."""
    symbol, inside = _symbol(text, start)
    if symbol != "{":
        return _quotient(text, start) if symbol == "-" else _number(text, start)
    value, end = _quotient(text, inside)
    symbol, end = _symbol(text, end)
    if symbol != "}":
        raise _NotANumber
    return value, end


def _number(text: str, start: int) -> tuple[float, int]:
    match = _NUMBER.match(text, start)
    if not match:
        raise _NotANumber
    return float(match[1].replace(",", "") + (match[2] or "")), match.end()


def _symbol(text: str, start: int) -> tuple[str | None, int]:
    match = _SYMBOL.match(text, start)
    return (match[1], match.end()) if match else (None, start)
