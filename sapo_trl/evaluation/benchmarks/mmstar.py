r"""
MMStar.

Paper: https://huggingface.co/papers/2403.20330. Schema: the card of `Lin-Chen/MMStar`, with `index` (int64),
`question` (which ends with its options: `Options: A: ..., B: ..., C: ..., D: ...`), `image`, `answer` (a letter),
`category`, `l2_category` and `meta_info` (struct); split `val`, 1,500 rows, 250 of each of the six categories, so that
the published average of categories is the mean of rows.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..benchmark import Benchmark, Problem
from .prompts import ONE_LETTER, ask
from .rows import require, to_image
from .scoring import accuracy_by, score_choice


LETTERS = "ABCD"

_OPTIONS = re.compile(r"Options:\s*A:\s*(.*?),?\s*\bB:\s*(.*?),?\s*\bC:\s*(.*?),?\s*\bD:\s*(.*)", re.DOTALL)
# Of questions that come from MMMU; there is one image.
_PLACEHOLDER = re.compile(r"<image \d>")


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    require(row, "mmstar", i, ("index", "question", "image", "answer", "category", "l2_category"))
    answer = row["answer"].strip()
    if answer not in LETTERS or len(answer) != 1:
        raise ValueError(f"`answer` in row {i} of mmstar must be one of {LETTERS}, got {answer!r}.")
    options = _OPTIONS.search(row["question"])
    return Problem(
        id=str(row["index"]),
        prompt=ask(_PLACEHOLDER.sub("", row["question"]), ONE_LETTER, num_images=1),
        answer=answer,
        images=[to_image(row["image"], f"`image` in row {i} of mmstar")],
        fields={
            "letters": LETTERS,
            "options": [text.strip(" ,.\n") for text in options.groups()] if options else None,
            "category": row["category"],
            "l2_category": row["l2_category"],
        },
    )


MMSTAR = Benchmark(
    name="mmstar",
    title="MMStar",
    dataset="Lin-Chen/MMStar",
    split="val",
    to_problem=to_problem,
    score=score_choice,
    aggregate=accuracy_by("category"),
    scoring_note=(
        "VLMEvalKit has a language model match a response that its rules cannot read; here such a response is wrong."
    ),
)
