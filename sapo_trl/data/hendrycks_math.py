r"""
MATH (Hendrycks et al., arXiv 2103.03874): competition problems. The answer is the last `\boxed{}` of `solution`.

MATH itself has 7,500 train and 5,000 test rows. The split of 12,000 and 500 was made for PRM800K (Lightman et al.,
arXiv 2305.20050): 4,500 test rows went to training, and the other 500 are "MATH500". Its files are
`math_splits/*.jsonl` of https://github.com/openai/prm800k, with the columns `problem`, `solution`, `answer`,
`subject`, `level` and `unique_id`. The first hub id below has both splits, the second has only the test split.
"""

from collections.abc import Mapping
from typing import Any

from ..rewards.completion import last_boxed
from .question import BadRow, DataFormat, Question, text_cell


def boxed_answer(solution: str) -> str:
    r"""
    The answer of a MATH solution: its last box. A few solutions write it as `\fbox{3}` or, without braces, `\boxed 3`.

    Args:
        solution (`str`): worked solution.

    Returns:
        `str`: LaTeX without `$`. Raises [`BadRow`] if there is no box.
    """
    _, box, rest = solution.replace(r"\fbox", r"\boxed").rpartition(r"\boxed")
    rest = rest.lstrip()
    answer = last_boxed(box + rest) if rest.startswith("{") else rest.split("$")[0].strip() if box else None
    if answer is None:
        raise BadRow("empty answer", rf"no \boxed{{}} in the solution {solution[-80:]!r}")
    return answer


def read(row: Mapping[str, Any]) -> Question:
    """The question of a row. A column `answer` is PRM800K's version of the same box, and is not used."""
    return Question(text_cell(row, "problem"), boxed_answer(text_cell(row, "solution")))


MATH = DataFormat(
    columns=("problem", "solution"),
    read=read,
    consumed=("problem",),
    hub_ids=("nlile/hendrycks-MATH-benchmark", "HuggingFaceH4/MATH-500"),
)
