"""Reward for a right answer."""

from .completion import Completion, completion_text, last_boxed
from .equivalence import is_equivalent


def accuracy_reward(completions: list[Completion], answer: list[str], **kwargs) -> list[float]:
    r"""
    1.0 for each completion whose last `\boxed{}` equals the answer as mathematics, else 0.0.

    Args:
        completions (`list`):
            Completions, each a string or a list of messages.
        answer (`list[str]`):
            Right answers as LaTeX without `$`, such as `6 \sqrt { 3 }`: the column that the data set has under this
            name.
        **kwargs:
            The trainer's other columns, unused.

    Returns:
        `list[float]`: One reward a completion. A completion without a box scores 0.0.

    Example:

    ```python
    >>> from sapo_trl.rewards import accuracy_reward

    >>> accuracy_reward(completions=[r"So \boxed{6\sqrt{3}}", r"So \boxed{3}"], answer=[r"6 \sqrt { 3 }"] * 2)
    [1.0, 0.0]
    ```
    """
    if len(completions) != len(answer):
        raise ValueError(
            f"{len(completions)} completions came with {len(answer)} values of `answer`; one each needed."
        )
    boxes = (last_boxed(completion_text(completion)) for completion in completions)
    return [
        float(box is not None and is_equivalent(box, gold)) for box, gold in zip(boxes, map(str, answer), strict=True)
    ]
