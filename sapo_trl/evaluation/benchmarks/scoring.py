"""Scorers that several benchmarks share."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...rewards.choices import extract_choice
from ...rewards.completion import answer_part, last_boxed
from ...rewards.equivalence import is_equivalent
from ..benchmark import Aggregate, Problem, Result, Score, mean_accuracy


LABELS = "ABCDEFGH"
"""Letters of options in questions."""

_FORMATTING = re.compile(r"\\(?:text|textbf|mathrm|mathbf)(?![a-zA-Z])|\\[,;:! ]|[{}()\[\]$*]")


def choose(text: str, letters: str, options: Sequence[str] | None = None) -> str | None:
    """The chosen letter of a response, by [`extract_choice`]. A letter in a box is a label, not an option's text."""
    box = last_boxed(answer_part(text))
    label = None if box is None else read_labels(box)
    if label is not None and len(label) == 1 and label in LABELS and label not in letters:
        return None
    return extract_choice(text, letters, options)


def score_choice(problem: Problem, text: str) -> Score:
    """Right if the chosen letter is the answer. The problem's `fields` have `letters`, and `options` if known."""
    letter = choose(text, problem.fields["letters"], problem.fields.get("options"))
    return Score(float(letter == problem.answer), letter)


def score_choices(problem: Problem, text: str, letters: str | None = None) -> Score:
    """Like [`score_choice`], for several right letters. Only a box can choose several letters."""
    box, letters = last_boxed(answer_part(text)), letters or problem.fields["letters"]
    labels = None if box is None else read_labels(box)
    if labels is None or not set(labels) <= {*letters, *problem.answer}:  # an option's text may be a digit
        labels = choose(text, letters, problem.fields.get("options"))
    return Score(float(labels == problem.answer), labels)


def read_labels(text: str) -> str | None:
    """The labels of a text, sorted: `AC` for `C and A`. `None` if the text has anything else than labels."""
    parts = re.split(r"(?i)\s*(?:[,;&]|\band\b)\s*|\s+", _FORMATTING.sub("", text).strip(" ."))
    if len(parts) == 1 and parts[0].isupper() and parts[0].isalpha():
        parts = list(parts[0])
    parts = [part.strip(".:") for part in parts if part]
    if not parts or not all(len(part) == 1 and part.isascii() and part.isalnum() for part in parts):
        return None
    return "".join(sorted({part.upper() for part in parts}))


def lettered_options(text: str, *labels: str) -> dict[str, str]:
    """
    The options listed in a text.

    Args:
        text (`str`):
            The text.
        *labels (`str`):
            Patterns of an option's label, with `LETTER` for its letter. For each letter the first pattern with a match
            counts. The search begins after the previous letter's label, so that letters inside an option are not
            taken for labels.

    Returns:
        `dict[str, str]`: options by letter, in order.
    """
    found: list[tuple[str, int, int]] = []
    for letter in LABELS:
        start = found[-1][2] if found else 0
        patterns = (re.compile(label.replace("LETTER", letter), re.MULTILINE) for label in labels)
        match = next((match for pattern in patterns if (match := pattern.search(text, start))), None)
        if match:
            found.append((letter, match.start(), match.end()))
    ends = [start for _, start, _ in found[1:]] + [len(text)]
    return {letter: text[start:end].strip(" ,;\n") for (letter, _, start), end in zip(found, ends, strict=False)}


def choice_fields(found: Mapping[str, str], answer: str) -> dict[str, Any]:
    """
    The fields that [`score_choices`] needs, for a question with its options in the text.

    Args:
        found (`Mapping[str, str]`):
            The options found in the text, by letter. Labels without texts belong to options in the image. If the
            answer is not among the options, they were not found correctly. Then any letter from A to H may be chosen.
        answer (`str`):
            The right letter or letters.
    """
    if answer and set(answer) <= set(found):
        return {"letters": "".join(found), "options": list(found.values()) if all(found.values()) else None}
    if not answer or not set(answer) <= set(LABELS):
        raise ValueError(f"The answer to a multiple choice question must be a letter from A to H, got {answer!r}.")
    return {"letters": LABELS, "options": None}


def score_mathematics(problem: Problem, text: str) -> Score:
    """Right if the last box equals the answer as mathematics."""
    return score_box(text, lambda box: is_equivalent(box, problem.answer))


def score_box(text: str, is_right: Callable[[str], bool]) -> Score:
    """Right if the last box is right. Without a box there is no answer."""
    box = last_boxed(answer_part(text))
    return Score(float(box is not None and is_right(box)), box)


def accuracy_by(field: str) -> Aggregate:
    """The mean over all results (`accuracy`), and over the results with each value of a field (`accuracy/value`)."""

    def aggregate(groups: Sequence[Sequence[Result]]) -> dict[str, float]:
        by_value: dict[str, list[float]] = {}
        for result in (result for group in groups for result in group):
            by_value.setdefault(result.fields[field], []).append(result.correct)
        parts = {f"accuracy/{value}": sum(scores) / len(scores) for value, scores in sorted(by_value.items())}
        return mean_accuracy(groups) | parts

    return aggregate


def share_of_groups_all_right(groups: Sequence[Sequence[Result]]) -> float:
    """The share of groups with only right answers."""
    return sum(all(result.correct == 1.0 for result in group) for group in groups) / len(groups)
