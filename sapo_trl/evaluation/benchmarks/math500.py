r"""
MATH500: `HuggingFaceH4/MATH-500`, 500 test problems of MATH.

Papers: https://huggingface.co/papers/2305.20050 (the 500), https://huggingface.co/papers/2103.03874 (MATH). Schema:
cards of copies of the data set (its own card has no features), with `problem`, `solution`, `answer` (LaTeX),
`subject`, `level` (int64) and `unique_id`.
"""

from collections.abc import Mapping
from typing import Any

from ..benchmark import Benchmark, Problem
from .prompts import FREE_FORM, ask
from .rows import read_row
from .scoring import score_mathematics


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    row = read_row(row, "math500", i, ("problem", "answer", "unique_id"), ("subject", "level"))
    return Problem(
        id=row["unique_id"],
        prompt=ask(row["problem"], FREE_FORM),
        answer=row["answer"].strip(),
        fields={"subject": row["subject"], "level": row["level"]},
    )


MATH500 = Benchmark(
    name="math500",
    title="MATH500",
    dataset="HuggingFaceH4/MATH-500",
    split="test",
    to_problem=to_problem,
    score=score_mathematics,
    scoring_note=(
        "The paper's own grader compares normalised text and then uses SymPy; here the judge of `accuracy_reward` "
        "compares. lmms-eval's `openai_math` asks a language model."
    ),
)
