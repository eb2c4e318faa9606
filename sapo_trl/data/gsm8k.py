"""
[`openai/gsm8k`](https://huggingface.co/datasets/openai/gsm8k): grade-school word problems, 7,473 train and 1,319 test
rows. `answer` is a worked solution that ends with `#### 1,234`.
"""

from collections.abc import Mapping
from typing import Any

from .question import BadRow, DataFormat, Question, text_cell


def final_number(solution: str) -> str:
    """The text after the last `####`, without commas. Raises [`BadRow`] if there is no `####`."""
    _, mark, answer = solution.rpartition("####")
    if not mark:
        raise BadRow("empty answer", f"no #### in the solution {solution[-80:]!r}")
    return answer.replace(",", "").strip()


def read(row: Mapping[str, Any]) -> Question:
    """The question of a row. It has the final number as answer, not the worked solution in the column `answer`."""
    return Question(text_cell(row, "question"), final_number(text_cell(row, "answer")))


GSM8K = DataFormat(
    columns=("question", "answer"), read=read, consumed=("question",), hub_ids=("openai/gsm8k",), config="main"
)
