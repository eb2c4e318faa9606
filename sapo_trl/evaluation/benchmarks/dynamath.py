r"""
DynaMath: 501 seed questions, each in ten variants. Scores are the average and the worst case.

Paper: https://huggingface.co/papers/2411.00836. Schema: the card of `DynaMath/DynaMath_Sample`, ten splits
`sample_variant1` to `sample_variant10` of 501 rows with the strings `id`, `question`, `image` (a path),
`ground_truth`, `answer_type` (`float`, `multiple choice`, `text`; in the authors' `dataset/dataset.json` also `int`
and `single answer`, both for numbers), `subject`, `knowledge_level`, and the image `decoded_image`. `id` identifies
the seed question and is the same in all splits. Tolerance and worst case: the authors' `evaluation/` and README, and
VLMEvalKit's `dynamath.py`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...rewards.choices import plain_text
from ...rewards.numbers import is_close, read_number
from ..benchmark import Benchmark, Problem, Result, Score
from .prompts import FREE_FORM, ONE_LETTER, ask
from .rows import read_row, to_image
from .scoring import choice_fields, lettered_options, score_box, score_choice, share_of_groups_all_right


TEXTS = ("id", "question", "ground_truth", "answer_type")
TOLERANCE = 0.001
"""Absolute tolerance of floats. Golds have four decimals; the instruction asks for three."""

_NUMBER = FREE_FORM.replace("\n\n", "\n\nGive the answer as a number with three decimals. ")
_TEMPLATES = {
    "float": _NUMBER,
    "int": _NUMBER,
    "single answer": _NUMBER,
    "multiple choice": ONE_LETTER,
    "text": FREE_FORM,
}
_LABELS = (r"\(LETTER\)", r"^LETTER[.:]")
# Forms of golds of the type `text`, in lower case.
_TIMES = (re.compile(r"(\d{1,2}):(\d{1,2})"), re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})"))
_EQUATION = re.compile(r"([a-z])\s*=\s*(.+)")
_EDGE = re.compile(r"(?:\\overline\s*)?\{?([a-z])\s*[-–,]?\s*([a-z])\}?")
_BRACKETS = re.compile(r"\((.*)\)|\[(.*)\]")
_COMMA = re.compile(r",(?![^{]*\})")
MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    row = read_row(row, "dynamath", i, TEXTS, ("decoded_image", "subject", "knowledge_level"))
    kind, answer = row["answer_type"], row["ground_truth"].strip()
    if kind not in _TEMPLATES:
        raise ValueError(f"`answer_type` in row {i} of dynamath must be one of {list(_TEMPLATES)}, got {kind!r}.")
    fields = {"seed": row["id"], "answer_type": kind, "subject": row["subject"], "level": row["knowledge_level"]}
    if kind == "multiple choice":
        fields |= choice_fields(lettered_options(row["question"], *_LABELS), answer)
    return Problem(
        id=f"{row['id']}/{i}",  # a row does not name its variant
        prompt=ask(row["question"], _TEMPLATES[kind], num_images=1),
        answer=answer,
        images=[to_image(row["decoded_image"], f"`decoded_image` in row {i} of dynamath")],
        fields=fields,
    )


def score(problem: Problem, text: str) -> Score:
    if problem.fields["answer_type"] == "multiple choice":
        return score_choice(problem, text)
    if problem.fields["answer_type"] == "text":
        return score_box(text, lambda box: is_same_text(box, problem.answer))
    return score_box(text, lambda box: _is_same_number(box, problem.answer))


def _is_same_number(answer: str, gold: str) -> bool:
    return is_close(answer, gold, rel_tol=0.0, abs_tol=TOLERANCE)


def is_same_text(answer: str, gold: str) -> bool:
    """
    Whether an answer equals a gold of the type `text`.

    A gold is a word, a month, a time, a date, an equation, numbers in their order, or the edge of a graph, which has
    two names. Its form decides how it is compared. It is not read as mathematics: a date would be a quotient and an
    edge a product.
    """
    answer, gold = plain_text(answer), plain_text(gold)
    if answer == gold:
        return True
    for pattern in _TIMES:  # a gold has 5:0 for five o'clock
        if pattern.fullmatch(gold):
            return _whole_numbers(pattern, answer) == _whole_numbers(pattern, gold)
    if equation := _EQUATION.fullmatch(gold):
        other = _EQUATION.fullmatch(answer)
        return other is not None and other[1] == equation[1] and _is_same_number(other[2], equation[2])
    if len(numbers := _numbers(gold)) > 1:
        others = _numbers(answer)
        return len(others) == len(numbers) and all(map(_is_same_number, others, numbers))
    if len(gold) == 2 and gold.isalpha():
        edge = _EDGE.fullmatch(answer)
        return edge is not None and sorted(edge.groups()) == sorted(gold)
    return _month(answer) == _month(gold) is not None


def _whole_numbers(pattern: re.Pattern[str], text: str) -> list[int] | None:
    match = pattern.fullmatch(text)
    return [int(part) for part in match.groups()] if match else None


def _numbers(text: str) -> list[str]:
    """The numbers of a list or a point, with or without brackets. Empty for a set and for any other text."""
    inside = _BRACKETS.fullmatch(text)
    parts = _COMMA.split(text if inside is None else inside[1] or inside[2] or "")
    return parts if all(read_number(part) is not None for part in parts) else []


def _month(word: str) -> int | None:
    """The number of a month, from its name or the first three letters; `None` for another word."""
    return next((i for i, name in enumerate(MONTHS) if word in (name, name[:3])), None)


def aggregate(groups: Sequence[Sequence[Result]]) -> dict[str, float]:
    """The mean over all variants, and the share of seed questions with all variants right."""
    scores = [result.correct for group in groups for result in group]
    return {"average": sum(scores) / len(scores), "worst": share_of_groups_all_right(groups)}


DYNAMATH = Benchmark(
    name="dynamath",
    title="DynaMath",
    dataset="DynaMath/DynaMath_Sample",
    split="+".join(f"sample_variant{variant}" for variant in range(1, 11)),
    to_problem=to_problem,
    score=score,
    aggregate=aggregate,
    headline="worst",
    group_of=lambda problem: problem.fields["seed"],
    scoring_note=(
        "The authors ask for JSON with a `short answer`. They take its first word as the number (within 0.001, as "
        "here), and accept an answer that contains a text gold. Here the answer must stand in a box (a letter may be "
        "announced). A text must equal the gold: the same word apart from case, the same month, time, date, equation "
        "or edge, or the same numbers in their order."
    ),
)
