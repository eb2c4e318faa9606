r"""
DynaMath: 501 seed questions in ten variants each, average and worst case.

Paper: https://huggingface.co/papers/2411.00836. Schema: the card of `DynaMath/DynaMath_Sample`, ten splits
`sample_variant1` to `sample_variant10` of 501 rows with the strings `id`, `question`, `image` (a path),
`ground_truth`, `answer_type` (`float`, `multiple choice` or `text`), `subject`, `knowledge_level`, and the image
`decoded_image`. `id` is the seed question's and the same in all splits. Tolerance and worst case: the authors'
`evaluation/` and README, and VLMEvalKit's `dynamath.py`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...rewards.choices import plain_text
from ...rewards.equivalence import is_equivalent
from ...rewards.numbers import is_close
from ..benchmark import Benchmark, Problem, Result, Score
from .prompts import FREE_FORM, ONE_LETTER, ask
from .rows import require, to_image
from .scoring import choice_fields, score_box, score_choice, share_of_groups_all_right


COLUMNS = ("id", "question", "decoded_image", "ground_truth", "answer_type", "subject", "knowledge_level")
TOLERANCE = 0.001
"""Of floats, absolute. Golds have four decimals; the instruction asks for three."""

_TEMPLATES = {
    "float": FREE_FORM.replace("\n\n", "\n\nGive the answer as a number with three decimals. "),
    "multiple choice": ONE_LETTER,
    "text": FREE_FORM,
}
_OPTION = re.compile(r"\(([A-H])\)\s*(.*?)\s*(?=\([A-H]\)|$)", re.DOTALL)
_TIME = re.compile(r"(\d{1,2}):(\d{1,2})")


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    require(row, "dynamath", i, COLUMNS)
    kind, answer = row["answer_type"], row["ground_truth"].strip()
    if kind not in _TEMPLATES:
        raise ValueError(f"`answer_type` in row {i} of dynamath must be one of {list(_TEMPLATES)}, got {kind!r}.")
    fields = {"seed": row["id"], "answer_type": kind, "subject": row["subject"], "level": row["knowledge_level"]}
    if kind == "multiple choice":
        fields |= choice_fields(dict(_OPTION.findall(row["question"])), answer)
    return Problem(
        id=f"{row['id']}/{i}",  # rows do not say which variant they are
        prompt=ask(row["question"], _TEMPLATES[kind], num_images=1),
        answer=answer,
        images=[to_image(row["decoded_image"], f"`decoded_image` in row {i} of dynamath")],
        fields=fields,
    )


def score(problem: Problem, text: str) -> Score:
    if problem.fields["answer_type"] == "multiple choice":
        return score_choice(problem, text)
    if problem.fields["answer_type"] == "float":
        return score_box(text, lambda box: is_close(box, problem.answer, rel_tol=0.0, abs_tol=TOLERANCE))
    return score_box(text, lambda box: _is_same_text(box, problem.answer))


def _is_same_text(answer: str, gold: str) -> bool:
    answer, gold = plain_text(answer), plain_text(gold)
    times = _TIME.fullmatch(answer), _TIME.fullmatch(gold)
    if all(times):  # golds write five o'clock as 5:0
        return [int(part) for part in times[0].groups()] == [int(part) for part in times[1].groups()]
    return answer == gold or is_equivalent(answer, gold)


def aggregate(groups: Sequence[Sequence[Result]]) -> dict[str, float]:
    """The mean of all variants, and the share of seed questions with all their variants right."""
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
        "The authors ask for JSON with a `short answer`, take its first word as the number (within 0.001, as here), "
        "and look for a text gold inside the answer; here the answer must stand in a box (a letter may be announced), "
        "and texts must be equal but for case, spaces and punctuation."
    ),
)
