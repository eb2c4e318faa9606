"""
[`hiyouga/geometry3k`](https://huggingface.co/datasets/hiyouga/geometry3k): geometry with a diagram, free-form answers.

Splits: 2,101 train, 300 validation, 601 test. `answer` is LaTeX without `$`, such as `2 \\sqrt { 221 }`. The card also
lists `id`, `choices` and `ground_truth` (the letter of the choice). These columns stay, but nothing uses them.
"""

from collections.abc import Mapping
from typing import Any

from .question import DataFormat, Question, as_list, text_cell


def read(row: Mapping[str, Any]) -> Question:
    """The question of a row. Its text already has its `<image>`."""
    return Question(text_cell(row, "problem"), text_cell(row, "answer"), as_list(row["images"]))


GEOMETRY3K = DataFormat(
    columns=("images", "problem", "answer"),
    read=read,
    consumed=("problem",),
    images="images",
    hub_ids=("hiyouga/geometry3k",),
)
