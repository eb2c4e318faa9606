"""
[`hiyouga/math12k`](https://huggingface.co/datasets/hiyouga/math12k): MATH with its answers apart from the solutions,
12,000 train and 500 test rows of `problem` and `answer`.
"""

from collections.abc import Mapping
from typing import Any

from .question import DataFormat, Question, as_text


def read(row: Mapping[str, Any]) -> Question:
    """Nothing to take apart."""
    return Question(as_text(row["problem"]), as_text(row["answer"]))


MATH12K = DataFormat(columns=("problem", "answer"), read=read, consumed=("problem",), hub_ids=("hiyouga/math12k",))
