r"""Removes formatting from answers: typographic characters, and LaTeX and Markdown that only change a font."""

import re
import unicodedata


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_VULGAR_FRACTION = re.compile("[¼½¾⅐-⅞↉]")
# Before NFKC, which would take the dash for a hyphen of another kind.
_CHARACTERS = str.maketrans(
    {**dict.fromkeys("−–—‒―", "-"), "⁄": "/", "∕": "/", "。": ".", "、": ",", "’": "'", "‘": "'"}
)

_COLOUR = re.compile(r"\\(?:textcolor|color|colorbox)\s*\{[^{}]*\}")
_SPACE = re.compile(r"\\[,;:! ]|\\q?quad(?![a-zA-Z])|~")
_FONT = (
    r"text|textbf|textit|textrm|textsf|texttt|textnormal|textup|mathrm|mathbf|mathsf|mathit|mathtt|mathcal|mathbb|mathfrak"
    r"|mathnormal|boldsymbol|bm|mbox|hbox|fbox|boxed|operatorname|underline|emph|pmb"
)
_IN_FONT = re.compile(rf"\\(?:{_FONT})\s*\{{([^{{}}]*)\}}")
_SIZE = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|tiny|small|normalsize|large|Large|LARGE|huge|Huge|checkmark"
    r"|bf|rm|it|sf|tt|bfseries|itshape)(?![a-zA-Z])"
)
_FONT_ALONE = re.compile(rf"\\(?:{_FONT})(?![a-zA-Z])")
STRUCK = re.compile(r"~~(?=\S)[^~]+~~")
"""Text that Markdown strikes out."""
_UNDERLINED = re.compile(r"(?<![\w\\}])(_{1,2})(?=[^\s_])([^_\n]+)(?<=\S)\1(?!\w)")
_MARKDOWN = re.compile(r"\\[()\[\]]|[$*`]|^[ \t]*#{1,6}(?=\s)|\\(?=[{}])", re.MULTILINE)
_SIGNS = [
    (re.compile(pattern), sign)
    for pattern, sign in [
        (r"\\(?:geq?|geqslant)(?![a-zA-Z])|>=|[⩾≧]", "≥"),
        (r"\\(?:leq?|leqslant)(?![a-zA-Z])|<=|[⩽≦]", "≤"),
        (r"\\neq?(?![a-zA-Z])|!=", "≠"),
        (r"\\pm(?![a-zA-Z])", "±"),
    ]
]


def plain_characters(text: str) -> str:
    """Full-width and compatibility characters as ASCII; superscripts and fractions such as `½` as LaTeX."""
    return unicodedata.normalize("NFKC", powers_and_fractions(text).translate(_CHARACTERS))


def powers_and_fractions(text: str) -> str:
    r"""Characters such as `²` and `½` as LaTeX: `^{2}`, `\frac{1}{2}`."""
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    return _VULGAR_FRACTION.sub(_as_latex_fraction, text)


def without_fonts(text: str, edge: str = "") -> str:
    r"""LaTeX without fonts, colours and sizes: `\textbf{(B)}` as `(B)`, with `edge` where a font begins and ends."""
    text = _SIZE.sub("", _SPACE.sub(" ", _COLOUR.sub("", text)))
    for _ in range(3):  # \text{\textbf{\underline{B}}}
        text = _IN_FONT.sub(rf"{edge}\1{edge}", text)
    return _FONT_ALONE.sub("", text)


def unformatted(text: str) -> str:
    """A text in plain characters, without the formatting of LaTeX and Markdown, and without struck-out parts."""
    text = _UNDERLINED.sub(r"\2", STRUCK.sub("", text))
    text = _MARKDOWN.sub("", without_fonts(plain_characters(text)))
    for pattern, sign in _SIGNS:
        text = pattern.sub(sign, text)
    return text.strip()


def comparable(text: str) -> str:
    """A text without formatting, outer punctuation and redundant spaces."""
    return " ".join(unformatted(text).split()).strip(" .,:;!?\"'")


def _as_latex_fraction(match: re.Match) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"
