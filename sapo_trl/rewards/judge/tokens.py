"""An answer cut into tokens: numbers with their exact values, letters, words of a text, commands and marks."""

import re
from dataclasses import dataclass
from fractions import Fraction


class UnreadableError(Exception):
    """An answer, or a part of one, that has no reading, or more than one."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token."""

    kind: str
    """`number`, `letters` (bare, as in `2xy`), `word` (inside `\\text{}`), `command` or `mark`."""
    text: str
    """The token as it is written, with its backslash."""
    spaced: bool = False
    """Whether a space stands before it."""
    value: Fraction | None = None
    """Of a number."""
    places: int = 0
    """Digits behind the decimal point of a number that is written as a finite decimal."""


MAX_TOKENS = 400
"""Of an answer. A longer one is not meant as one."""

_TEXT = r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathsf|mathit|mathtt|mbox|operatorname\*?|rm)"
_SIZES = r"\\(?:left|right|middle|[bB]ig{1,2}[lrm]?)(?![A-Za-z])"
_DOTS = r"\\(?:[lc]?dots|dotsc)(?![A-Za-z])|\.{3}"

_SPACE = re.compile(r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z])|\\[hv]space\s*\{[^{}]*\})+")
_SIZE = re.compile(rf"{_SIZES}\s*\.?(?![0-9])")
_TEXT_GROUP = re.compile(rf"{_TEXT}\s*\{{")
_BLACKBOARD = re.compile(r"\\mathbb\s*(?:\{\s*([A-Z])\s*\}|([A-Z]))")
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL)
_LETTERS = re.compile(r"[A-Za-z]+")
_OTHER_LETTERS = re.compile(r"[^\W\d_A-Za-z]+")

_GROUP = r"(?:\{,\}|\\,|\\ |\\;|\\:|\\!|~|[ ])"
_GROUPED = re.compile(rf"[1-9]\d{{0,2}}(?:{_GROUP}\d{{3}}(?!\d))+(?:\.\d+)?(?!{_GROUP}?\d)")
_COMMAS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?!\d|,\d)")
_EUROPEAN = re.compile(r"[1-9]\d{0,2}(?:\.\d{3})+,\d{1,2}(?![\d,.])")
_REPEATING = re.compile(
    rf"(\d*)\.(\d*)\s*(?:\\(?:overline|bar|dot)\s*\{{\s*(\d+)\s*\}}(?:(\d*)\\dot\s*\{{\s*(\d+)\s*\}})?|\((\d+)\)(?!\d))"
    rf"(?:\s*(?:{_DOTS}))?"
)
_DOTTED = re.compile(rf"(\d+)\.(\d*?)(?:(\d)\3{{2,}}|(\d{{2,10}}?)\4+)\s*(?:{_DOTS})")
_ENDS_IN_DOTS = re.compile(rf"\d+\.\d{{1,100}}\s*(?:{_DOTS})")
_SCIENTIFIC = re.compile(r"(\d+\.?\d*|\.\d+)[eE]([+-]?\d{1,4})(?![\d.A-Za-z])")
_DECIMAL = re.compile(r"\d+\.\d+|\.\d+|\d+\.(?![\d.])|\d+")

_OPENING = ("(", "[", "{", "\\{", "\\langle")
_CLOSING = (")", "]", "}", "\\}", "\\rangle")
_LONG_MARKS = ("<=", ">=", "!=", "->", "==")
_MARKS = {"\\%": "%", "\\$": "$", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]"}


def tokenized(latex: str) -> list[Token]:
    """
    The tokens of an answer.

    Raises:
        UnreadableError: if a number is written in a way that has two readings.
    """
    tokens = _tokens(latex, is_text=False)
    if len(tokens) > MAX_TOKENS:
        raise UnreadableError("too long")
    return tokens


def _tokens(latex: str, is_text: bool) -> list[Token]:
    tokens: list[Token] = []
    position, depth, spaced = 0, 0, False
    while position < len(latex):
        if match := (_SPACE.match(latex, position) or _SIZE.match(latex, position)):
            spaced = spaced or match[0][0] != "\\" or match[0][1] in ",;:! q"
            position = match.end()
            continue
        if match := _TEXT_GROUP.match(latex, position):
            end = end_of_group(latex, match.end())
            inner = _tokens(latex[match.end() : end], is_text=True)
            if inner and spaced and not inner[0].spaced:
                inner[0] = Token(inner[0].kind, inner[0].text, True, inner[0].value, inner[0].places)
            tokens += inner
            # The end of a text is the end of a word.
            position, spaced = end + 1, True
            continue
        if number := _number(latex, position, depth):
            end, value, places = number
            tokens.append(Token("number", latex[position:end], spaced, value, places))
        elif match := _BLACKBOARD.match(latex, position):
            end = match.end()
            tokens.append(Token("command", rf"\mathbb{{{match[1] or match[2]}}}", spaced))
        elif match := _COMMAND.match(latex, position):
            end = match.end()
            text = _MARKS.get(match[0], match[0])
            kind = "command" if match[0][1:].isalpha() and text == match[0] else "mark"
            tokens.append(Token(kind, text, spaced))
        elif match := _LETTERS.match(latex, position):
            end = match.end()
            tokens.append(Token("word" if is_text else "letters", match[0], spaced))
        elif match := _OTHER_LETTERS.match(latex, position):
            end = match.end()
            tokens.append(Token("word", match[0], spaced))
        else:
            end = position + (2 if latex.startswith(_LONG_MARKS, position) else 1)
            tokens.append(Token("mark", latex[position:end], spaced))
        depth += (tokens[-1].text in _OPENING) - (tokens[-1].text in _CLOSING)
        position, spaced = end, False
    return tokens


def end_of_group(latex: str, start: int) -> int:
    """Where the brace closes that opened just before `start`."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(latex, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise UnreadableError("a brace is never closed")


def _number(latex: str, position: int, depth: int) -> tuple[int, Fraction, int] | None:
    """End, value and decimal places of the number that starts here, if one does."""
    if not (latex[position].isdigit() and latex[position].isascii() or latex[position] == "."):
        return None
    dotted = _ENDS_IN_DOTS.match(latex, position) and _DOTTED.match(latex, position)
    if match := (_REPEATING.match(latex, position) or dotted):
        return match.end(), _repeating(match), 0
    if match := _EUROPEAN.match(latex, position) if depth == 0 else None:
        text = match[0].replace(".", "").replace(",", ".")
        return match.end(), Fraction(text), len(text.partition(".")[2])
    # Inside brackets a comma separates: (1,234) is a pair.
    if match := (_GROUPED.match(latex, position) or (_COMMAS.match(latex, position) if depth == 0 else None)):
        text = re.sub(r"[^\d.]", "", match[0])
        return match.end(), Fraction(text), len(text.partition(".")[2])
    if match := _SCIENTIFIC.match(latex, position):
        digits = match[1].rstrip(".")
        return match.end(), Fraction(digits) * Fraction(10) ** int(match[2]), len(digits.partition(".")[2])
    if match := _DECIMAL.match(latex, position):
        text = match[0].rstrip(".")
        return match.end(), Fraction(text), len(text.partition(".")[2])
    return None


def _repeating(match: re.Match) -> Fraction:
    if match.re is _DOTTED:
        whole, start, period = match[1], match[2], match[3] or match[4]
    else:
        if match[6] and match[2]:
            raise UnreadableError("0.5(3) is a product or a repeating decimal")
        period = match[6] or match[3] + (match[4] or "") + (match[5] or "")
        whole, start = match[1] or "0", match[2]
    fixed = Fraction(int(whole + start), 10 ** len(start))
    return fixed + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(start))
