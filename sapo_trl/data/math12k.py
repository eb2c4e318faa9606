"""
[`hiyouga/math12k`](https://huggingface.co/datasets/hiyouga/math12k): MATH with short answers instead of solutions,
12,000 train and 500 test rows with `problem` and `answer`.
"""

from collections.abc import Mapping
from typing import Any

from .question import DataFormat, Question, text_cell


def read(row: Mapping[str, Any]) -> Question:
    """The question of a row."""
    return Question(text_cell(row, "problem"), text_cell(row, "answer"))


MATH12K = DataFormat(columns=("problem", "answer"), read=read, consumed=("problem",), hub_ids=("hiyouga/math12k",))
