"""Brackets, and the tokens between separators outside of them."""

from __future__ import annotations

from collections.abc import Callable

from .tokens import Token, UnreadableError


_OPENING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\langle": "\\rangle", "\\lfloor": "\\rfloor"}
_ALL_CLOSING = (")", "]", "}", "\\}", "\\rangle", "\\rfloor")


def split(tokens: list[Token], separates: Callable[[Token], bool]) -> tuple[list[list[Token]], list[Token]]:
    """Tokens cut at separators outside of brackets, and the separators."""
    parts: list[list[Token]] = [[]]
    found = []
    closings: list[str] = []
    environments = 0
    for position, token in enumerate(tokens):
        environments += (token.text == "\\begin") - (token.text == "\\end")
        if not closings and not environments and separates(token):
            parts.append([])
            found.append(token)
            continue
        if position == len(tokens) - 1 and (token.text, *closings) in (("[", "]"), ("[", "["), ("]", "[")):
            closings.pop()  # [0, 1[ and ]0, 1[ and ]0, 1]
        elif token.text in _OPENING:
            # [0, 1) and ]0, 1[ pair off too.
            closings.append(_OPENING[token.text])
        elif token.text in _ALL_CLOSING:
            if closings and (closings[-1] == token.text or {closings[-1], token.text} == {")", "]"}):
                closings.pop()
            elif not (token.text == "]" and position == 0):
                raise UnreadableError(f"`{token.text}` closes nothing")
            else:
                closings.append("[")
        parts[-1].append(token)
    if closings:
        raise UnreadableError("a bracket is never closed")
    return parts, found


def is_group(tokens: list[Token]) -> bool:
    """Whether the first bracket closes at the last token, and not before."""
    depth = 0
    for position, token in enumerate(tokens):
        is_last = token.text == "[" and position == len(tokens) - 1
        if (token.text in _OPENING and not is_last) or (token.text == "]" and position == 0):
            depth += 1
        elif token.text in _ALL_CLOSING or is_last:
            depth -= 1
        if depth == 0:
            return position == len(tokens) - 1
    return tokens[0].text == "]" and tokens[-1].text == "["
