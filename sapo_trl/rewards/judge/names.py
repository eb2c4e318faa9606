"""Names of values, and answers that are names or words themselves."""

from __future__ import annotations

from fractions import Fraction

from .groups import is_group, split
from .tokens import Token, UnreadableError
from .units import SCALES
from .values import Phrase


_DECORATIONS = (
    "\\overline",
    "\\angle",
    "\\triangle",
    "\\vec",
    "\\overrightarrow",
    "\\widehat",
    "\\hat",
    "\\bar",
    "\\odot",
)
_OPERATIONS = ("\\frac", "\\dfrac", "\\sqrt", "\\pm", "\\cdot", "\\times", "\\pi")
_DENIALS = frozenset("no not never nor neither cannot wrong false incorrect isn doesn if unless except".split())
"""Words that make a name a statement: "it is not true that x" = 5."""
_CALLED = tuple("fghFGHPE")
"""Letters of functions: `P(X = 2) = 5` has a name on the left."""


def read_phrase(tokens: list[Token]) -> Phrase:
    """Words and names, compared one by one in their order."""
    found: list[str | Fraction] = []
    spoken = False
    for token in tokens:
        spoken = (
            spoken
            or token.kind in ("letters", "word")
            or token.text in _DECORATIONS
            or token.text.startswith("\\mathbb")
        )
        if token.kind == "number":
            found.append(token.value)
        elif token.text not in ("{", "}", ".", "`", '"', "``", "''"):
            found.append(token.text)
    if not spoken:
        raise UnreadableError("neither an expression nor words")
    return Phrase(tuple(found))


def name_of(tokens: list[Token]) -> str | None:
    r"""
    The name of a value: `x`, `x_1`, `f(2)`, `AB`, `m\angle ABC`, `\text{Area}`, `|AB|`. `None` for other tokens.
    """
    allowed = ("(", ")", "_", "{", "}", "'", "|", "^", ",", ".", ":")
    texts = [token.text for token in tokens]
    if not texts or "^" in texts and "\\prime" not in texts:
        return None
    if not any(token.kind in ("letters", "word") or token.kind == "command" for token in tokens):
        return None
    if SCALES.keys() & {*texts}:
        return None
    if _DENIALS & {text.lower() for text in texts} or len(texts) > 12:
        return None
    if tokens[0].kind == "number" or texts in (["e"], ["i"], ["\\pi"], ["\\infty"]):
        return None
    called = texts[0] in _CALLED and len(tokens) > 3 and texts[1] == "(" and is_group(tokens[1:])
    for token in tokens:
        if token.kind == "mark" and token.text not in allowed and not called:
            return None
        if token.kind == "command" and token.text in _OPERATIONS:
            return None
    return "".join(text for text in texts if text not in ("{", "}", "."))


def tuple_names(tokens: list[Token]) -> list[str] | None:
    """The names of `(x, y)`."""
    if tokens[0].text != "(" or not is_group(tokens):
        return None
    parts, _ = split(tokens[1:-1], lambda token: token.text == ",")
    names = [name_of(part) for part in parts if part]
    return names if len(names) == len(parts) > 1 and None not in names else None
