r"""
GSM8K: the test split of `openai/gsm8k`, configuration `main`.

Paper: https://huggingface.co/papers/2110.14168. Schema: the data set's card, with `question` and `answer`; 1,319 rows.
The last line of an answer is `#### 18`, for example.
"""

from collections.abc import Mapping
from typing import Any

from ...rewards.equivalence import is_equivalent
from ...rewards.numbers import is_close
from ..benchmark import Benchmark, Problem, Score
from .prompts import FREE_FORM, ask
from .rows import read_row
from .scoring import score_box


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    row = read_row(row, "gsm8k", i, ("question", "answer"))
    _, mark, gold = row["answer"].rpartition("####")
    if not mark:
        raise ValueError(f"`answer` in row {i} of gsm8k must end with `#### number`, got {row['answer']!r}.")
    return Problem(id=str(i), prompt=ask(row["question"], FREE_FORM), answer=gold.replace(",", "").strip())


def score(problem: Problem, text: str) -> Score:
    # Read the answer as a number first, because it may have a unit or a currency.
    return score_box(text, lambda box: is_close(box, problem.answer) or is_equivalent(box, problem.answer))


GSM8K = Benchmark(
    name="gsm8k",
    title="GSM8K",
    dataset="openai/gsm8k",
    config="main",
    split="test",
    to_problem=to_problem,
    score=score,
    scoring_note=(
        "The evaluation is zero-shot, and the answer must stand in a box. The harnesses' `gsm8k` tasks give up to 8 "
        "examples and search the text for the last number or for `The final answer is`."
    ),
)
