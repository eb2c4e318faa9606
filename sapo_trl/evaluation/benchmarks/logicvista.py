r"""
LogicVista: logical reasoning from pictures. One or several options are right.

Paper: https://huggingface.co/papers/2407.04973. Schema: the authors' repository (`Yijia-Xiao/LogicVista`,
`data/dataset.json`: `question`, `answer` such as `C`, `A, C` or `3`, `reasoning`, `skill`, 448 questions) and public
scripts that read the copy `lscpku/LogicVista` (there also `image` and `id`); no card with features was found.
"""

from collections.abc import Mapping
from typing import Any

from ..benchmark import Benchmark, Problem, Score
from .prompts import SEVERAL_LETTERS, ask
from .rows import is_given, read_row, to_image
from .scoring import read_labels, score_choices


LETTERS = "ABCDEFGHI"
"""Letters of options. Options are in the images; questions name at most A to I, or digits."""


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    row = read_row(row, "logicvista", i, ("question", "answer"), ("image",))
    answer = read_labels(row["answer"])
    if answer is None:
        raise ValueError(f"`answer` in row {i} of logicvista must be labels such as `A, C`, got {row['answer']!r}.")
    return Problem(
        id=str(row.get("id", i)),
        prompt=ask(row["question"], SEVERAL_LETTERS, num_images=1),
        answer=answer,
        images=[to_image(row["image"], f"`image` in row {i} of logicvista")],
        fields={"skill": row.get("skill")},
    )


def score(problem: Problem, text: str) -> Score:
    return score_choices(problem, text, LETTERS)


def has_text(row: Mapping[str, Any]) -> bool:
    """Whether a row has a question or an answer. A row without one of the columns stays: [`to_problem`] reports it."""
    return any(name not in row or is_given(row[name]) for name in ("question", "answer"))


LOGICVISTA = Benchmark(
    name="logicvista",
    title="LogicVista",
    dataset="lscpku/LogicVista",
    split="test",
    to_problem=to_problem,
    score=score,
    keep=has_text,
    scoring_note=(
        "The authors let a language model extract the letters; here rules read them. Both compare the sets of "
        "letters. Row v1_382 has neither question nor answer. It is left out, and 447 rows remain, as in VLMEvalKit's "
        "copy."
    ),
)
