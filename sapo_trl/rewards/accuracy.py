"""Reward for a right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .completion import Completion, answer_part, completion_text, sole_answer
from .equivalence import Verdict, are_equivalent


def accuracy_reward(
    completions: list[Completion],
    answer: list[str | int | float | None],
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""
    1.0 for each completion with a last `\boxed{}` that equals the answer as mathematics, else 0.0.

    Args:
        completions (`list`):
            Completions, each a string or a list of messages.
        answer (`list`):
            Right answers, from the data set's column of this name. An answer is LaTeX such as `6 \sqrt { 3 }` (bare,
            in `$` or in a box), plain text, or a number. A row with `None` has no answer to compare with.
        log_metric (`Callable`, *optional*):
            The trainer's function for logging. It gets the share of unparsed answers
            (`rewards/accuracy_reward/unparsed`) and of comparisons out of time (`rewards/accuracy_reward/timed_out`).
        **kwargs:
            The trainer's other columns, unused.

    Returns:
        `list[float | None]`:
            One reward per completion. A completion without a box scores 0.0. A row without an answer has `None`, which
            means "does not apply" to TRL.

    Example:

    ```python
    >>> from sapo_trl.rewards import accuracy_reward

    >>> accuracy_reward(completions=[r"So \boxed{6\sqrt{3}}", r"So \boxed{3}"], answer=[r"6 \sqrt { 3 }"] * 2)
    [1.0, 0.0]
    ```
    """
    return score_boxes("accuracy_reward", completions, answer, log_metric)


def score_boxes(
    name: str,
    completions: Sequence[Completion],
    answers: Sequence[str | int | float | None],
    log_metric: Callable[[str, float], None] | None = None,
) -> list[float | None]:
    """[`accuracy_reward`] for a reward function with another name in the log."""
    if len(completions) != len(answers):
        raise ValueError(
            f"{len(completions)} completions came with {len(answers)} values of `answer`; one each is needed."
        )
    rewards: list[float | None] = [None if gold is None else 0.0 for gold in answers]
    boxes = [sole_answer(answer_part(completion_text(completion))) for completion in completions]
    rows = [row for row, gold in enumerate(answers) if gold is not None and boxes[row] is not None]
    verdicts = are_equivalent([boxes[row] for row in rows], [answers[row] for row in rows])
    for row, verdict in zip(rows, verdicts, strict=True):
        rewards[row] = float(verdict is Verdict.EQUAL)
    number = len(rewards) - rewards.count(None)
    if log_metric is not None and number:
        for verdict in (Verdict.UNPARSED, Verdict.TIMED_OUT):
            log_metric(f"rewards/{name}/{verdict}", verdicts.count(verdict) / number)
    return rewards
