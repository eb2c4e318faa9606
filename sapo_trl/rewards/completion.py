"""What a reward reads off a completion: its text, and its boxed answer."""

import re
from collections.abc import Mapping, Sequence


# Braces, and pairs of a backslash and what it escapes: `\{` groups nothing.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

Completion = str | Sequence[Mapping]
"""Plain text, or the messages of a conversation (the trainer passes what the prompts were)."""


def completion_text(completion: Completion) -> str:
    """Text of a completion; of a conversation, the text of its last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, str):
        return content
    # `None` beside tool calls, or a list of blocks as vision-language models have it.
    return "".join(block.get("text", "") for block in content or ())


def last_boxed(text: str) -> str | None:
    r"""
    Content of the last `\boxed{...}`, its braces balanced; `None` if there is none.

    A last box that is never closed is no answer either, and an earlier one does not stand in for it: the response was
    cut off while it gave its answer.
    """
    _, opening, rest = text.rpartition("\\boxed{")
    if not opening:
        return None
    depth = 1
    for match in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[: match.start()].strip()
    return None
