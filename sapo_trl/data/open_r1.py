r"""
[`lmms-lab/multimodal-open-r1-8k-verified`](https://huggingface.co/datasets/lmms-lab/multimodal-open-r1-8k-verified):
about 7,690 train rows of mixed visual mathematics, with `image`, `problem`, `solution`, `original_question` and
`original_answer`. A `solution` has the form `<think>…</think> <answer>…</answer>`.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..rewards.completion import last_boxed
from .question import BadRow, DataFormat, Question, as_list, text_cell, with_placeholders


def tagged_answer(solution: str) -> str:
    r"""
    The text inside the last `<answer>` tags. A `$…$` or `\boxed{…}` around the whole text is removed, because accuracy
    rewards take LaTeX without either. Raises [`BadRow`] if there are no tags.
    """
    found = re.findall(r"<answer>(.*?)</answer>", solution, re.DOTALL)
    if not found:
        raise BadRow("empty answer", f"no <answer> tags in the solution {solution[-80:]!r}")
    answer = found[-1].strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$" and answer.count("$") == 2:
        answer = answer[1:-1].strip()
    box = last_boxed(answer)
    return box if box is not None and re.fullmatch(r"\\boxed\{\s*" + re.escape(box) + r"\s*\}", answer) else answer


def read(row: Mapping[str, Any]) -> Question:
    """The question of a row. It has one picture, without a place for it in the text."""
    images = as_list(row["image"])
    return Question(
        with_placeholders(text_cell(row, "problem"), images), tagged_answer(text_cell(row, "solution")), images
    )


OPEN_R1 = DataFormat(
    columns=("image", "problem", "solution"),
    read=read,
    consumed=("problem", "image"),
    images="image",
    hub_ids=("lmms-lab/multimodal-open-r1-8k-verified",),
)
