"""Scores that several benchmarks share."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...rewards.choices import extract_choice
from ...rewards.completion import answer_part, last_boxed
from ...rewards.equivalence import is_equivalent
from ..benchmark import Aggregate, Problem, Result, Score, mean_accuracy


LABELS = "ABCDEFGH"
"""Letters that questions give their options."""

_FORMATTING = re.compile(r"\\(?:text|textbf|mathrm|mathbf)(?![a-zA-Z])|\\[,;:! ]|[{}()\[\]$*]")


def choose(text: str, letters: str, options: Sequence[str] | None = None) -> str | None:
    """The letter that a response chooses, by [`extract_choice`]; a letter in a box is a label, no option's text."""
    box = last_boxed(answer_part(text))
    label = None if box is None else read_labels(box)
    if label is not None and len(label) == 1 and label in LABELS and label not in letters:
        return None
    return extract_choice(text, letters, options)


def score_choice(problem: Problem, text: str) -> Score:
    """Right if the chosen letter is the answer; `fields` has `letters`, and `options` where they are known."""
    letter = choose(text, problem.fields["letters"], problem.fields.get("options"))
    return Score(float(letter == problem.answer), letter)


def score_choices(problem: Problem, text: str, letters: str | None = None) -> Score:
    """As [`score_choice`], with exactly the right letters; several can only be chosen in a box."""
    box, letters = last_boxed(answer_part(text)), letters or problem.fields["letters"]
    labels = None if box is None else read_labels(box)
    if labels is None or not set(labels) <= {*letters, *problem.answer}:  # an option's text may be a digit
        labels = choose(text, letters, problem.fields.get("options"))
    return Score(float(labels == problem.answer), labels)


def read_labels(text: str) -> str | None:
    """The labels in a text that has nothing else, in order: `AC` for `C and A`; `None` if it has anything else."""
    parts = re.split(r"(?i)\s*(?:[,;&]|\band\b)\s*|\s+", _FORMATTING.sub("", text).strip(" ."))
    if len(parts) == 1 and parts[0].isupper() and parts[0].isalpha():
        parts = list(parts[0])
    parts = [part.strip(".:") for part in parts if part]
    if not parts or not all(len(part) == 1 and part.isascii() and part.isalnum() for part in parts):
        return None
    return "".join(sorted({part.upper() for part in parts}))


def lettered_options(text: str, *labels: str) -> dict[str, str]:
    """
    The options that are part of a text.

    Args:
        text (`str`):
            It.
        *labels (`str`):
            Patterns of an option's label, `LETTER` in the place of its letter. Of each letter the first pattern that
            is found counts, behind the letter before: so no letter inside an option is taken for a label.

    Returns:
        `dict[str, str]`: by letter, in order.
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
    What [`score_choices`] needs, of a question whose options are part of its text.

    Args:
        found (`Mapping[str, str]`):
            Options as they were found in the text, by letter; labels without texts are those of the image. Without the
            answer among them they were not found rightly: then any of A to H may be chosen.
        answer (`str`):
            The right letter, or several.
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
    """Right if the last box is; without a box there is no answer."""
    box = last_boxed(answer_part(text))
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
