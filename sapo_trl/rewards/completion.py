"""Reads the text of a completion and its boxed answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


# Braces, and escaped characters with their backslash: `\{` groups nothing.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# Without a brace a box holds a number, a command or a single letter; anything else is prose about boxes.
_BOX = re.compile(
    r"\\boxed(?:\s*\{|(?![A-Za-z])\s*(?!\\boxed)(?P<bare>(?:[0-9+\-.(\\]|[A-Za-z](?![A-Za-z]))(?:(?!\\boxed)[^$\n])*))"
)

_THINKING = re.compile(r"<(?P<closes>/?)think(?:ing)?\s*>", re.IGNORECASE)
# Between two boxes: the second one is another answer, or none.
_JOINED = re.compile(r"(?:[\s$.]*(?:,|/|&|\||\b(?:and|or|not)\b|\\(?:lor|vee|mid)\b))+[\s$]*")

Completion = str | Sequence[Mapping]
"""Plain text, or the messages of a conversation, in the form of the trainer's prompts."""


def completion_text(completion: Completion) -> str:
    """Text of a completion. For a conversation it is the text of the last message."""
    if isinstance(completion, str):
        return completion
    return message_text(completion[-1]) if completion else ""


def message_text(message: str | Mapping) -> str:
    """Text of a message, or of a plain text."""
    content = message if isinstance(message, str) else message.get("content")
    if isinstance(content, str):
        return content
    # The content is `None` with tool calls, or a list of blocks for vision-language models.
    return "".join(block.get("text", "") for block in content or ())


def answer_part(text: str) -> str:
    r"""
    The part of a response that may hold the answer: the text after the last `</think>`, or `</thinking>`.

    Without thinking it is the whole text. If the thinking never ends, because the response was cut off, it is empty.

    Example:

    ```python
    >>> from sapo_trl.rewards.completion import answer_part

    >>> answer_part(r"<think>maybe \boxed{3}</think> \boxed{4}"), answer_part(r"<think>maybe \boxed{3}")
    (' \\boxed{4}', '')
    ```
    """
    tag, end = None, 0
    for tag in _THINKING.finditer(text):
        end = tag.end()
    return text if tag is None else text[end:] if tag["closes"] else ""


def last_boxed(text: str) -> str | None:
    r"""
    Content of the last `\boxed{...}` with balanced braces; `None` if there is none.

    Of nested boxes the outer box counts, and an empty box counts only if there is no other box. If the last box is
    never closed, the response was cut off while it gave its answer. Then there is no answer, and no earlier box
    replaces it. `\boxed 4`, without braces, holds the rest of its line, up to a `$`.
    """
    boxes = _boxes(text)
    return boxes[-1].content if boxes else None


def sole_answer(text: str) -> str | None:
    r"""
    Content of the last `\boxed{...}` of a response; `None` also if it is one of two answers.

    Example:

    ```python
    >>> from sapo_trl.rewards.completion import sole_answer

    >>> sole_answer(r"First \boxed{3}, then \boxed{4}"), sole_answer(r"\boxed{3} or \boxed{4}")
    ('4', None)
    ```
    """
    boxes = _boxes(text)
    for one, other in pairwise(boxes[-2:]):
        if one.content != other.content and _JOINED.fullmatch(text, one.end, other.start):
            return None
    return boxes[-1].content if boxes else None


@dataclass(frozen=True)
class _Box:
    content: str
    start: int
    end: int


def _boxes(text: str) -> list[_Box]:
    """The boxes of a text in order, empty ones only if there is no other; none if the last one is never closed."""
    found: list[_Box] = []
    position = 0
    is_open = False
    ends = _ends_of_groups(text)
    while box := _BOX.search(text, position):
        end = ends.get(box.end())
        is_open = box["bare"] is None and end is None
        position = box.end()
        if is_open:
            continue
        if box["bare"] is not None:
            content = box["bare"].strip().removesuffix(".")
        else:
            content, position = text[box.end() : end].strip(), end
        found.append(_Box(content, box.start(), position + (box["bare"] is None)))
    return [] if is_open else [box for box in found if box.content] or found[-1:]


def _ends_of_groups(text: str) -> dict[int, int]:
    """The end of each closed group, by the group's beginning after its brace."""
    ends, begins = {}, []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            begins.append(match.end())
        elif match[0] == "}" and begins:
            ends[begins.pop()] = match.start()
    return ends
