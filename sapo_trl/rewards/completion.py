"""What a reward reads off a completion: its text, and its boxed answer."""

import re
from collections.abc import Mapping, Sequence


# Braces, and pairs of a backslash and what it escapes: `\{` groups nothing.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# Without a brace a box holds a number, a command or a single letter; anything else is prose about boxes.
_BOX = re.compile(
    r"\\boxed(?:\s*\{|(?![A-Za-z])\s*(?!\\boxed)(?P<bare>(?:[0-9+\-.(\\]|[A-Za-z](?![A-Za-z]))(?:(?!\\boxed)[^$\n])*))"
)

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


def answer_part(text: str) -> str:
    r"""
    The part of a response that may hold the answer: the text after the last `</think>`.

    The whole text where the response has no thinking, and the empty string where its thinking never ends, because the
    response was cut off.

    Example:

    ```python
    >>> from sapo_trl.rewards.completion import answer_part

    >>> answer_part(r"<think>maybe \boxed{3}</think> \boxed{4}"), answer_part(r"<think>maybe \boxed{3}")
    (' \\boxed{4}', '')
    ```
    """
    after = text.rpartition("</think>")[2]
    return "" if "<think>" in after else after


def last_boxed(text: str) -> str | None:
    r"""
    Content of the last `\boxed{...}`, its braces balanced; `None` if there is none.

    Of nested boxes the outer one counts, and an empty box counts only where there is no other. A last box that is
    never closed is no answer, and an earlier one does not stand in for it: the response was cut off while it gave its
    answer. `\boxed 4`, without braces, holds the rest of its line, up to a `$`.
    """
    content, position = None, 0
    is_open = False
    ends = _ends_of_groups(text)
    while box := _BOX.search(text, position):
        end = ends.get(box.end())
        is_open = box["bare"] is None and end is None
        position = box.end()
        if is_open:
            continue
        if box["bare"] is not None:
            found = box["bare"].strip().removesuffix(".")
        else:
            found, position = text[box.end() : end].strip(), end
        if found or content is None:
            content = found
    return None if is_open else content


def _ends_of_groups(text: str) -> dict[int, int]:
    """Where each group that is closed begins, behind its brace, and where it ends."""
    ends, begins = {}, []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            begins.append(match.end())
        elif match[0] == "}" and begins:
            ends[begins.pop()] = match.start()
    return ends
