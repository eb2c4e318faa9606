r"""Rewards for the form of a response. They check tags, announcements and boxes, but not the answer."""

import re

from .completion import Completion, completion_text


# `segmentation="step"` cuts at these announcements.
_STEP = re.compile(r"Step\s*(\d+)\s*[:.]")


def format_reward(completions: list[Completion], **kwargs) -> list[float]:
    r"""
    1.0 for each completion that thinks between `<think>` and `</think>` and then gives a `\boxed{}`, else 0.0.

    The rule comes from the official recipe: `<think>.*</think>.*\\boxed\{.*\}.*` must match the whole text, without
    the spaces at both ends.

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
    last step, else 0.0.

    `segmentation="step"` cuts at the same announcements, anywhere in the text. They must count up from 1 without a gap
    or a repetition. The number of segments then equals the number of steps.

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

    Each tag must occur once, and both spans must have text. Before the first span and between the spans there may be
    only spaces. SRPO's role-aware weights (`sapo_trl.role_aware`) find both roles in this form.

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
    # A regular expression with four `.*` would take minutes on a response made of tags.
    return text.startswith("<think>") and _has_in_order(text, "<think>", "</think>", "\\boxed{", "}")


def _counts_steps_then_boxes(text: str) -> bool:
    steps = list(_STEP.finditer(text))
    # Compare the numbers as texts, so that leading zeros count as wrong.
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
