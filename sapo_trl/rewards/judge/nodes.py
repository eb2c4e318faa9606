"""Trees of expressions."""

from __future__ import annotations

from collections.abc import Iterator


Node = tuple
"""
A tree: `("number", value)`, `("symbol", name)`, `("constant", name)`, `("apply", name, arguments...)` of an unknown
function, or `(operation, operands...)`.
"""


def letter(name: str) -> Node:
    """A letter as a constant or an unknown."""
    return ("constant", name) if name in ("e", "i") else ("symbol", name)


def walk(node: Node) -> Iterator[Node]:
    """All trees within a tree."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += (part for part in node if isinstance(part, tuple))


def symbols(node: Node) -> set[str]:
    """Names of the unknowns, and of unknown functions."""
    return {part[1] for part in walk(node) if part[0] in ("symbol", "apply")}


def is_complex(node: Node) -> bool:
    """Whether the imaginary unit occurs."""
    return ("constant", "i") in walk(node)


def with_sign(node: Node, plus: bool) -> Node:
    r"""The tree with one of the two readings of `\pm`, the other one of `\mp`."""
    if node[0] in ("\\pm", "\\mp"):
        inner = with_sign(node[1], plus)
        return inner if plus == (node[0] == "\\pm") else ("negative", inner)
    return (node[0], *(with_sign(part, plus) if isinstance(part, tuple) else part for part in node[1:]))


def has_sign(node: Node) -> bool:
    r"""Whether `\pm` or `\mp` occurs."""
    return any(part[0] in ("\\pm", "\\mp") for part in walk(node))
