"""Scores that several benchmarks share."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...rewards.choices import extract_choice
from ...rewards.completion import last_boxed
from ...rewards.equivalence import is_equivalent
from ..benchmark import Aggregate, Problem, Result, Score, mean_accuracy


def score_choice(problem: Problem, text: str) -> Score:
    """Right if the chosen letter is the answer; `fields` has `letters`, and `options` where they are known."""
    letter = extract_choice(text, problem.fields["letters"], problem.fields.get("options"))
    return Score(float(letter == problem.answer), letter)


def choice_fields(found: Mapping[str, str], answer: str) -> dict[str, Any]:
    """
    What [`score_choice`] needs, of a question whose options are part of its text.

    Args:
        found (`Mapping[str, str]`):
            Options as they were found in the text, by letter. Without the answer among them they were not found
            rightly, or are in the image: then any of A to H may be chosen.
        answer (`str`):
            The right letter.
    """
    if answer in found:
        return {"letters": "".join(found), "options": [text.strip(" ,;\n") for text in found.values()]}
    if not re.fullmatch("[A-H]", answer):
        raise ValueError(f"The answer to a multiple choice question must be a letter from A to H, got {answer!r}.")
    return {"letters": "ABCDEFGH", "options": None}


def score_mathematics(problem: Problem, text: str) -> Score:
    """Right if the last box equals the answer as mathematics."""
    return score_box(text, lambda box: is_equivalent(box, problem.answer))


def score_box(text: str, is_right: Callable[[str], bool]) -> Score:
    """Right if the last box is; without a box there is no answer."""
    box = last_boxed(text)
    return Score(float(box is not None and is_right(box)), box)


def accuracy_by(field: str) -> Aggregate:
    """The mean of all results, as `accuracy`, and of those with each value of a field, as `accuracy/value`."""

    def aggregate(groups: Sequence[Sequence[Result]]) -> dict[str, float]:
        by_value: dict[str, list[float]] = {}
        for result in (result for group in groups for result in group):
            by_value.setdefault(result.fields[field], []).append(result.correct)
        parts = {f"accuracy/{value}": sum(scores) / len(scores) for value, scores in sorted(by_value.items())}
        return mean_accuracy(groups) | parts

    return aggregate


def share_of_groups_all_right(groups: Sequence[Sequence[Result]]) -> float:
    """How many of the groups have nothing but right answers, as a share."""
    return sum(all(result.correct == 1.0 for result in group) for group in groups) / len(groups)
