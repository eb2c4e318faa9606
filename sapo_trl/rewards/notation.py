r"""Brings answers into one notation: without `$`, boxes and formatting, with LaTeX for typographic characters."""

import math
import numbers
import re
import unicodedata
from decimal import Decimal

from .completion import last_boxed
from .markup import STRUCK, powers_and_fractions


# `\\[2pt]` is a line break in a matrix, no delimiter, and `\$` a currency.
_DELIMITERS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")

_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
_GREEK = {
    unicodedata.lookup(f"GREEK {size} LETTER {name.upper().replace('LAMBDA', 'LAMDA')}"): rf"\{letter} "
    for size in ("SMALL", "CAPITAL")
    for name in "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi"
    " chi psi omega".split()
    if (letter := name if size == "SMALL" else name.capitalize())
}
_CHARACTERS = str.maketrans(
    {
        **{chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)},  # full width, as in （3，4）
        **dict.fromkeys("−–—‐‑‒﹣", "-"),
        **dict.fromkeys("°º˚", r"^\circ "),
        **dict.fromkeys("∕⁄", "/"),
        **dict.fromkeys("·⋅∙", r"\cdot "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f", ""),
        **dict.fromkeys("′’", "'"),
        **dict.fromkeys("⟨〈", r"\langle "),
        **dict.fromkeys("⟩〉", r"\rangle "),
        **dict.fromkeys("∅⌀", r"\emptyset "),
        **_GREEK,
        "″": "''",
        "∶": ":",
        "∥": r"\parallel ",
        "⊥": r"\perp ",
        "≅": r"\cong ",
        "∼": r"\sim ",
        "π": r"\pi ",
        "ϕ": r"\phi ",
        "∞": r"\infty ",
        "×": r"\times ",
        "÷": r"\div ",
        "±": r"\pm ",
        "∓": r"\mp ",
        "≤": r"\le ",
        "⩽": r"\le ",
        "≥": r"\ge ",
        "⩾": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∖": r"\setminus ",
        "∈": r"\in ",
        "∠": r"\angle ",
        "△": r"\triangle ",
        "∴": r"\therefore ",
        "ℝ": r"\mathbb{R}",
        "ℤ": r"\mathbb{Z}",
        "ℚ": r"\mathbb{Q}",
        "ℕ": r"\mathbb{N}",
        "ℂ": r"\mathbb{C}",
        "…": "...",
        "、": ", ",
        "。": ".",
        "￥": "¥",
        "～": "~",
        "℃": r"^\circ C",
        "℉": r"^\circ F",
        "Ω": r"\Omega ",
        "µ": "μ",
        "∛": r"\sqrt[3]",
        "∜": r"\sqrt[4]",
    }
)
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+")
# LaTeX's own `\sqrt 12` is the root of 1, times 2, and is left alone.
_ROOT = re.compile(r"(√|\\sqrt\[[34]\]|\\sqrt(?= ?\()) ?(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))")

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:color|textcolor)\s*\{[^{}]*\}", ""),
        (r"\\(?:tiny|scriptsize|small|normalsize|large|Large|LARGE|huge|Huge|displaystyle|textstyle)(?![A-Za-z])", ""),
        (r"\\(?:limits|bf|it|boldmath|nonumber|hfill|strut)(?![A-Za-z])", ""),
        (r"\\(?:boldsymbol|bm|underline|fbox|framebox|emph)\s*(?=\{)", ""),
        (r"\^\s*(?:\{\s*((?:\\prime\s*)+)\}|(\\prime))", lambda match: "'" * match[0].count("prime")),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))", r" \\times "),
        (r"\*\*(?=\s*[\w({\\+-])", "^"),
        (r"\\q?quad(?![A-Za-z])", r", "),
        (r"\s*,(?:\s*,)+\s*", ", "),
        (r"\\begin\s*\{([a-zA-Z]+)\}", r"\\begin{\1}"),
        (r"\\end\s*\{([a-zA-Z]+)\}", r"\\end{\1}"),
        (r"(\\\\)\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\]", r"\1 "),
    ]
]
# A line break, in a matrix, or a command that was escaped twice.
_DOUBLE_BACKSLASH = re.compile(r"\\\\(?=[A-Za-z])")
_MARKDOWN = re.compile(r"(\*\*|__|\*|`|_)(?=\S)(.+?)(?<=\S)\1")
_ANSWER = (
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:(?:final\s+)?answer(?:\s+is|\s*:)|答案(?:是|为|:))\s*:?\s*"
)
_ABOUT = r"(?:about|approximately|approx\.?|roughly|约|大约)\s*"
_FIRST = re.compile(
    r"(?:(?:=|:|\\(?:approx|therefore|implies|Rightarrow|because)(?![A-Za-z]))\s*"
    rf"|\\text\s*\{{\s*(?:{_ANSWER}|{_ABOUT})?\}}\s*|\\text\s*\{{\s*(?:{_ANSWER}|{_ABOUT})(?=[\d\\$.-])"
    rf"|{_ANSWER}|{_ABOUT}(?=[\d\\$.-]))",
    re.IGNORECASE,
)
# Neither `\,` nor `\right.` nor dots.
_LAST = re.compile(r"(?:(?<![\\.])(?<!\\right)[.,;:]|\\\\|(?<!\\)\\[,;:! ]|(?<!\\)\\$)\s*$")

# Plain numbers with separators of thousands.
_THOUSANDS = re.compile(r"([+-]?[1-9]\d{0,2})((?:(?: |,|\{,\}|\\[,;!: ]|~)\d{3})+)(\.\d+)?")

_SPACE = re.compile(r" *([{}()\[\],+\-*/^_=<>&|]) *| +(?=\\)")


def as_latex(value: str | int | float) -> str:
    r"""
    An answer without its wrapping: delimiters, a box around the whole answer, formatting, typographic characters.

    Args:
        value (`str`, `int` or `float`):
            LaTeX, bare or in `$...$`, `\(...\)`, `\boxed{...}`; plain text; or a number.

    Raises:
        TypeError: if the value has another type.
        ValueError: if the value is a number that is not finite.

    Example:

    ```python
    >>> from sapo_trl.rewards.notation import as_latex

    >>> as_latex(r"$\boxed{ 6 \sqrt { 3 } }$."), as_latex("**x²**"), as_latex(1e-5)
    ('6 \\sqrt { 3 }', 'x^{2}', '0.00001')
    ```
    """
    if not isinstance(value, str):
        return _number_as_latex(value)
    if value.isascii() and value.isdigit():
        return value
    text = _DELIMITERS.sub("", value).strip()
    if STRUCK.fullmatch(text):
        return ""
    while (box := last_boxed(text)) is not None and _is_only(box, text):
        text = box
    if markdown := _MARKDOWN.fullmatch(text.rstrip(".")):
        text = markdown[2]
    text = powers_and_fractions(text)
    text = _LOWERED.sub(lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}", text)
    text = text.translate(_CHARACTERS)
    if "\\begin" not in text:
        text = _DOUBLE_BACKSLASH.sub(r"\\", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    text = _ROOT.sub(_root, text).replace("√", r"\sqrt ")
    text = _without_lead(text)
    text = _repeatedly(_LAST, text).strip(" ,")
    if match := _THOUSANDS.fullmatch(text):
        return match[1] + re.sub(r"\D", "", match[2]) + (match[3] or "")
    return text


def gold_as_latex(value: str | int | float) -> str:
    """[`as_latex`] of a gold answer. It may also stand in a box inside a solution."""
    if isinstance(value, str) and "\\boxed" in value:
        value = last_boxed(value) or value
    return as_latex(value)


def _is_only(box: str, text: str) -> bool:
    r"""Whether the text is only the box with this content."""
    return re.fullmatch(r"\\(?:f?boxed)\s*\{?\s*" + re.escape(box) + r"\s*\}?[\s.,]*", text) is not None


def _repeatedly(pattern: re.Pattern, text: str) -> str:
    while (shorter := pattern.sub("", text).strip()) != text:
        text = shorter
    return text


def _without_lead(text: str) -> str:
    """The text without an equals sign or "the answer is" in front."""
    while match := _FIRST.match(text):
        # The rest of `\\text{about 5 cm}` is a text too.
        opened = match[0].count("{") > match[0].count("}")
        text = (r"\text{" if opened else "") + text[match.end() :].strip()
    return text


def _root(match: re.Match) -> str:
    command = match[1].replace("√", r"\sqrt")
    return rf"{command}{{{match[2]}}}"


def without_spaces(latex: str) -> str:
    r"""The same LaTeX without redundant spaces: `6 \sqrt { 3 }` as `6\sqrt{3}`."""
    return _SPACE.sub(r"\1", latex)


def _number_as_latex(value: int | float) -> str:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"An answer must be a text, an int or a float, got {value!r}.")
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if not math.isfinite(value):
        raise ValueError(f"An answer must be finite, got {value!r}.")
    return format(Decimal(str(float(value))), "f")  # 1e-05 would be read as 1 * e - 5
