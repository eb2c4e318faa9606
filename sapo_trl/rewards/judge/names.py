"""Names of values, and answers that are names or words themselves."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from .expressions import GREEK
from .groups import is_group, split
from .tokens import Token, UnreadableError
from .units import SCALES
from .values import Phrase


_DECORATIONS = tuple(
    f"\\{name}"
    for name in "overline angle triangle vec overrightarrow widehat hat bar tilde widetilde dot odot".split()
)
_IN_NAMES = frozenset(
    (
        *_DECORATIONS,
        *(f"\\{name}" for name in GREEK),
        *(f"\\{name}" for name in "sin cos tan cot sec csc max min det deg dim Pr lim to infty circ prime".split()),
        *(f"\\{name}" for name in "mathcal mathscr lvert rvert lVert rVert vert parallel".split()),
    )
)
"""Commands that a name may have: no logarithms and roots, since 5 is not the value of x in `\\ln x = 5`."""
_SAME_LOOK = {"\\bar": "\\overline", "\\widehat": "\\hat", "\\widetilde": "\\tilde"}
_DENIALS = frozenset(
    "no not never nor neither cannot wrong false incorrect isn doesn if unless except nothing anything minus opposite"
    " twice double triple than".split()
)
"""Words that make a name a statement: "it is not true that x" = 5."""
_BOUNDS = {("at", "least"), ("at", "most"), ("half", "of")}
_WITH_TWO_SIGNS = frozenset("abcdefghjklmnopqrstuvxy")
"""Letters of real numbers: `|x| = 5` has two solutions, while `|z| = 5` is about a complex one."""
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
        elif token.text in ("percent", "percents"):
            found.append("%")
        elif token.text not in ("{", "}", ".", "`", '"', "``", "''"):
            found.append(_SAME_LOOK.get(token.text, token.text))
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
    words = [text.lower() for text in texts]
    if _DENIALS & {*words} or _BOUNDS & {*pairwise(words)} or len(texts) > 12:
        return None
    if len(texts) == 3 and texts[0] == texts[2] == "|" and texts[1] in _WITH_TWO_SIGNS:
        return None
    if tokens[0].kind == "number" or texts in (["e"], ["i"], ["\\pi"], ["\\infty"]):
        return None
    called = texts[0] in _CALLED and len(tokens) > 3 and texts[1] == "(" and is_group(tokens[1:])
    for token in tokens:
        if token.kind == "mark" and token.text not in allowed and not called:
            return None
        if token.kind == "command" and not (token.text in _IN_NAMES or token.text.startswith("\\mathbb") or called):
            return None
    return "".join(text for text in texts if text not in ("{", "}", "."))


def tuple_names(tokens: list[Token]) -> list[str] | None:
    """The names of `(x, y)`."""
    if tokens[0].text != "(" or not is_group(tokens):
        return None
    parts, _ = split(tokens[1:-1], lambda token: token.text == ",")
    names = [name_of(part) for part in parts if part]
    return names if len(names) == len(parts) > 1 and None not in names else None
