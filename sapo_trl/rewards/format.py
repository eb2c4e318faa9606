r"""Rewards for the shape of a response: they read tags, announcements and boxes, never whether the answer is right."""

import re

from .completion import Completion, completion_text


# What `segmentation="step"` cuts at.
_STEP = re.compile(r"Step\s*(\d+)\s*[:.]")


def format_reward(completions: list[Completion], **kwargs) -> list[float]:
    r"""
    1.0 for each completion that thinks between `<think>` and `</think>` and then gives a `\boxed{}`, else 0.0.

    The rule is the official recipe's, `<think>.*</think>.*\\boxed\{.*\}.*` on the whole text, without the spaces at
    both ends.

    Args:
        completions (`list`):
            Completions, each a string or a list of messages.
        **kwargs:
            The trainer's other columns, unused.

    Example:

    ```python
    >>> from sapo_trl.rewards import format_reward

    >>> format_reward(completions=[r"<think>1 + 1</think> \boxed{2}", r"\boxed{2}"])
    [1.0, 0.0]
    ```
    """
    return [float(_thinks_then_boxes(completion_text(completion).strip())) for completion in completions]


def step_format_reward(completions: list[Completion], **kwargs) -> list[float]:
    r"""
    1.0 for each completion that announces its steps as `Step 1:`, `Step 2:`, ..., and boxes an answer in or after the
    last one, else 0.0.

    Announcements are what `segmentation="step"` cuts at, wherever they stand. They count up from 1 without a gap or a
    repetition, so the number of segments is the number of steps.

    Args:
        completions (`list`):
            Completions, each a string or a list of messages.
        **kwargs:
            The trainer's other columns, unused.

    Example:

    ```python
    >>> from sapo_trl.rewards import step_format_reward

    >>> step_format_reward(completions=["Step 1: 1 + 1 = 2.\nStep 2: \\boxed{2}", "Step 2: \\boxed{2}"])
    [1.0, 0.0]
    ```
    """
    return [float(_counts_steps_then_boxes(completion_text(completion))) for completion in completions]


def role_format_reward(completions: list[Completion], **kwargs) -> list[float]:
    r"""
    1.0 for each completion of the form `<perception>...</perception><think>...</think>...\boxed{...}`, else 0.0.

    Each tag stands there once, both spans have text, and only space comes before the first and between the two. Then
    SRPO's role-aware weights (`sapo_trl.role_aware`) find both roles.

    Args:
        completions (`list`):
            Completions, each a string or a list of messages.
        **kwargs:
            The trainer's other columns, unused.

    Example:

    ```python
    >>> from sapo_trl.rewards import role_format_reward

    >>> role_format_reward(
    ...     completions=[
    ...         r"<perception>AB = 2</perception><think>2 + 2</think> \boxed{4}",
    ...         r"<think>2 + 2</think> \boxed{4}",
    ...     ]
    ... )
    [1.0, 0.0]
    ```
    """
    return [float(_perceives_thinks_then_boxes(completion_text(completion))) for completion in completions]


def _thinks_then_boxes(text: str) -> bool:
    # As a regular expression, four `.*` in a row take minutes on a response made of tags.
    return text.startswith("<think>") and _has_in_order(text, "<think>", "</think>", "\\boxed{", "}")


def _counts_steps_then_boxes(text: str) -> bool:
    steps = list(_STEP.finditer(text))
    # Leading zeros and all: numbers are compared as they are written.
    in_order = [step[1] for step in steps] == [str(number) for number in range(1, len(steps) + 1)]
    return bool(steps) and in_order and _has_in_order(text[steps[-1].end() :], "\\boxed{", "}")


def _perceives_thinks_then_boxes(text: str) -> bool:
    tags = ("<perception>", "</perception>", "<think>", "</think>")
    if any(text.count(tag) != 1 for tag in tags) or not _has_in_order(text, *tags, "\\boxed{", "}"):
        return False
    before, perception, between, reasoning, _ = re.split("|".join(tags), text)
    return not before.strip() and bool(perception.strip()) and not between.strip() and bool(reasoning.strip())


def _has_in_order(text: str, *parts: str) -> bool:
    position = 0
    for part in parts:
        position = text.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True
