r"""Answers as LaTeX that math-verify reads: out of `$`, boxes and typographic characters."""

import math
import numbers
import re
from decimal import Decimal

from .completion import last_boxed


# `\\[2pt]` is a line break in a matrix, no delimiter, and `\$` a currency.
_DELIMITERS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")

_CHARACTERS = str.maketrans(
    {
        **{chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)},  # full width, as in （3，4）
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "∞": r"\infty ",
        "·": r"\cdot ",
        "−": "-",
        "~": " ",
    }
)
# LaTeX's own `\sqrt 12` is the root of 1, times 2, and is left alone.
_ROOT = re.compile(r"(?:√|\\sqrt(?= ?\()) ?(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))")
_FIRST = re.compile(r"^(?:=|\\approx\b|\\therefore\b)\s*")
# Neither `\,` nor `\right.` nor dots.
_LAST = re.compile(r"(?<![\\.])(?<!\\right)[.,;]$")

# Plain numbers that math-verify takes for something else: 2 000 for 2 + 0, 1e5 for 1 * e * 5, 3 1/2 for (3 + 1) / 2;
# and 9.8 \times 10^{5} for a float beside 980000.
_THOUSANDS = re.compile(r"([+-]?\d{1,3})((?:(?: |,|\{,\}|\\[,;!: ])\d{3})+)(\.\d+)?")
_SCIENTIFIC = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+))"
    r"(?:[eE]([+-]?\d{1,3})| ?(?:\\times|\\cdot|×|\*) ?10 ?\^ ?(?:(\d)|\{ ?([+-]?\d{1,3}) ?\}))"
)
_MIXED = re.compile(r"([+-]?\d+) (\d+)/(\d+)")

_SPACE = re.compile(r" *([{}()\[\],+\-*/^_=<>&|]) *| +(?=\\)")


def as_latex(value: str | int | float) -> str:
    r"""
    An answer without what math-verify stumbles over; nothing else is changed.

    Args:
        value (`str`, `int` or `float`):
            LaTeX, bare or in `$...$`, `\(...\)`, `\boxed{...}`; plain text; or a number.

    Raises:
        TypeError: if it is none of these.
        ValueError: if it is a number that is not finite.

    Example:

    ```python
    >>> from sapo_trl.rewards.notation import as_latex

    >>> as_latex(r"$\boxed{ 6 \sqrt { 3 } }$."), as_latex("1.2e3"), as_latex(1e-5)
    ('6 \\sqrt { 3 }', '1200', '0.00001')
    ```
    """
    if not isinstance(value, str):
        return _number_as_latex(value)
    if value.isascii() and value.isdigit():
        return value
    text = _DELIMITERS.sub("", value)
    if "\\boxed{" in text:
        text = last_boxed(text) or text
    text = " ".join(text.translate(_CHARACTERS).split())
    text = _ROOT.sub(r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    text = _LAST.sub("", _FIRST.sub("", text)).strip()
    if match := _THOUSANDS.fullmatch(text):
        return match[1] + re.sub(r"\D", "", match[2]) + (match[3] or "")
    if match := _SCIENTIFIC.fullmatch(text):
        return format(Decimal(f"{match[1]}e{match[2] or match[3] or match[4]}"), "f")
    if match := _MIXED.fullmatch(text):
        return rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}"
    return text


def without_spaces(latex: str) -> str:
    r"""The same LaTeX without spaces that mean nothing: `6 \sqrt { 3 }` as `6\sqrt{3}`."""
    return _SPACE.sub(r"\1", latex)


def _number_as_latex(value: int | float) -> str:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"An answer must be a text, an int or a float, got {value!r}.")
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if not math.isfinite(value):
        raise ValueError(f"An answer must be finite, got {value!r}.")
    return format(Decimal(str(float(value))), "f")  # 1e-05 would be read as 1 * e - 5
