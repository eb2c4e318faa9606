"""Reward for the shape of a response."""

import re

from .completion import Completion, completion_text


_THINK_THEN_BOX = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


def format_reward(completions: list[Completion], **kwargs) -> list[float]:
    r"""
    1.0 for each completion that thinks between `<think>` and `</think>` and then gives a `\boxed{}`, else 0.0.

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
    return [float(_THINK_THEN_BOX.fullmatch(completion_text(c).strip()) is not None) for c in completions]
