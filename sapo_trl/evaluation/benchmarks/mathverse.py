r"""
MathVerse, vision only: diagram and question are in the image, the text has neither.

Paper: https://huggingface.co/papers/2403.14624. Schema: the card of `CaraJ/MathVerse-lmmseval` (the authors' copy for
lmms-eval), with `sample_index`, `problem_index`, `problem_version`, `question`, `image`, `answer`, `question_type`
(`multi-choice` or `free-form`), `metadata` (struct of `split`, `source`, `subject`, `subfield`), `query_wo`,
`query_cot`, `question_for_eval`; a fifth of the 3,940 rows of testmini, 788. Multiple choice answers are letters.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..benchmark import Benchmark, Problem, Score
from .prompts import FREE_FORM, ONE_LETTER, ask
from .rows import require, to_image
from .scoring import choice_fields, score_choice, score_mathematics


VERSION = "Vision Only"
COLUMNS = ("sample_index", "problem_version", "question", "image", "answer", "question_type", "metadata")

_OPTION = re.compile(r"^\s*([A-H])\s*[.:]\s*(.*?)\s*$", re.MULTILINE)


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    require(row, "mathverse", i, COLUMNS)
    fields = {name: row["metadata"].get(name) for name in ("subject", "subfield")}
    is_choice = row["question_type"] == "multi-choice"
    answer = row["answer"].strip().strip("$")
    if is_choice:
        # The text that the authors' judge sees has the options; the model sees them in the image.
        fields |= choice_fields(dict(_OPTION.findall(row.get("question_for_eval") or "")), answer)
    question = row["question"].strip() or "Answer the question in the image."
    return Problem(
        id=row["sample_index"],
        prompt=ask(question, ONE_LETTER if is_choice else FREE_FORM, num_images=1),
        answer=answer,
        images=[to_image(row["image"], f"`image` in row {i} of mathverse")],
        fields=fields,
    )


def score(problem: Problem, text: str) -> Score:
    return score_choice(problem, text) if "letters" in problem.fields else score_mathematics(problem, text)


MATHVERSE = Benchmark(
    name="mathverse",
    title="MathVerse",
    dataset="CaraJ/MathVerse-lmmseval",
    config="testmini_version_split",
    split="vision_only",
    to_problem=to_problem,
    score=score,
    keep=lambda row: row.get("problem_version", VERSION) == VERSION,  # `to_problem` names a missing column
    scoring_note=(
        "The authors have one language model extract the answer and another compare it; here a letter is read by "
        "rules, and a free-form answer must stand in a box and is compared by math-verify. Their score of reasoning "
        "steps is not computed."
    ),
)
