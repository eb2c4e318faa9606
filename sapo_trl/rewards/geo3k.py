"""The reward of the official Geometry3K recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .accuracy import score_boxes
from .completion import Completion
from .format import format_reward


@dataclass(frozen=True)
class Geo3KReward:
    r"""
    0.9 for a right answer and 0.1 for the form, as one reward function.

    The rules of [`accuracy_reward`] decide whether an answer is right. The official code uses mathruler's rules
    instead, and also accepts an answer from the thinking.

    The official code also has a length penalty, which its paper does not mention. It is 0.001 for each token beyond
    nine tenths of the longest allowed response, and 0.3 more from one token below that length on, together at most
    0.5. The penalty is off by default.

    Args:
        penalized_length (`int`, *optional*):
            Length of the longest allowed response in tokens: the trainer's `max_completion_length`, or 2048 in the
            official script. If it is set, the length penalty is on.

    Example:

    ```python
    >>> from sapo_trl.rewards.geo3k import Geo3KReward

    >>> reward = Geo3KReward(penalized_length=2048)
    >>> completions = [r"<think>1 + 1</think> \boxed{2}"] * 2
    >>> reward(completions=completions, answer=["2"] * 2, completion_ids=[[0] * 9, [0] * 2048])
    [1.0, 0.5]
    ```
    """

    __name__ = "geo3k_reward"  # the name in the log

    penalized_length: int | None = None

    def __post_init__(self):
        if self.penalized_length is not None and self.penalized_length < 1:
            raise ValueError(f"`penalized_length` must be at least 1 token, got {self.penalized_length}.")

    def __call__(
        self,
        completions: list[Completion],
        answer: list[str | int | float | None],
        completion_ids: list[list[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float | None]:
        """
        Score completions, see [`~sapo_trl.rewards.accuracy_reward`]. Only the penalty uses `completion_ids`.
        """
        accuracies = score_boxes(self.__name__, completions, answer, log_metric)
        forms = format_reward(completions)
        penalties = self._length_penalties(completions, completion_ids)
        return [
            None if accuracy is None else 0.9 * accuracy + 0.1 * form - penalty
            for accuracy, form, penalty in zip(accuracies, forms, penalties, strict=True)
        ]

    def _length_penalties(self, completions: list, completion_ids: list[list[int]] | None) -> list[float]:
        if self.penalized_length is None:
            return [0.0] * len(completions)
        if completion_ids is None:
            raise ValueError("`completion_ids` is needed for the length penalty; TRL's trainers pass it.")
        limit = self.penalized_length
        lengths = [len(ids) for ids in completion_ids]
        return [
            min(0.5, 0.001 * max(0, length - int(0.9 * limit)) + (0.3 if length >= limit - 1 else 0.0))
            for length in lengths
        ]


geo3k_reward = Geo3KReward()
"""[`Geo3KReward`] without a length penalty."""
