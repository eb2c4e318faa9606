r"""
MMStar.

Paper: https://huggingface.co/papers/2403.20330. Schema: the card of `Lin-Chen/MMStar`, with `index` (int64),
`question`, `image`, `answer` (a letter), `category`, `l2_category` and `meta_info` (struct). A question ends with its
options, as `Options: A: ..., B: ..., C: ..., D: ...` or as lines `(A) ...`. The split `val` has 1,500 rows, 250 in
each of the six categories. The published average over categories therefore equals the mean over rows.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..benchmark import Benchmark, Problem
from .prompts import ONE_LETTER, ask
from .rows import is_given, read_row, to_image
from .scoring import accuracy_by, choice_fields, lettered_options, score_choice


LETTERS = "ABCD"

# Questions from MMMU have placeholders. Every question has one image.
_PLACEHOLDER = re.compile(r"<image \d>")


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    row = read_row(row, "mmstar", i, ("index", "question", "answer"), ("image", "category", "l2_category"))
    answer = row["answer"].strip()
    if answer not in LETTERS or len(answer) != 1:
        raise ValueError(f"`answer` in row {i} of mmstar must be one of {LETTERS}, got {answer!r}.")
    return Problem(
        id=row["index"],
        prompt=ask(_PLACEHOLDER.sub("", row["question"]), ONE_LETTER, num_images=1),
        answer=answer,
        images=[to_image(row["image"], f"`image` in row {i} of mmstar")],
        fields=choice_fields(_options(row["question"]), answer)
        | {"category": row["category"], "l2_category": row["l2_category"]},
    )


def _options(question: str) -> dict[str, str]:
    """The options of a question. Questions from MathVista list four as `(A) ...`; an option `nan` does not exist."""
    _, mark, listed = question.rpartition("Options:")
    labels = (r"(?:^|,)\s*LETTER:", r"\bLETTER:") if mark else (r"\(LETTER\)",)
    return {letter: text for letter, text in lettered_options(listed, *labels).items() if is_given(text)}


MMSTAR = Benchmark(
    name="mmstar",
    title="MMStar",
    dataset="Lin-Chen/MMStar",
    split="val",
    to_problem=to_problem,
    score=score_choice,
    aggregate=accuracy_by("category"),
    scoring_note=(
        "VLMEvalKit lets a language model match a response that its rules cannot read; here such a response is wrong."
    ),
)
