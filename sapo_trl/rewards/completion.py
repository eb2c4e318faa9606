"""What a reward reads off a completion: its text, and its boxed answer."""

from collections.abc import Mapping, Sequence


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
    before, opening, rest = text.rpartition("\\boxed{")
    if not opening:
        return None
    depth = 1
    for i, character in enumerate(rest):
        if character in "{}" and not _is_escaped(rest, i):
            depth += 1 if character == "{" else -1
        if depth == 0:
            return rest[:i].strip()
    return None


def _is_escaped(text: str, i: int) -> bool:
    r"""Whether an odd number of backslashes stands before position `i`, as in `\{`, a brace that groups nothing."""
    return (i - len(text[:i].rstrip("\\"))) % 2 == 1
