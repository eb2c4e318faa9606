r"""
LogicVista: logical reasoning from pictures, one option or several.

Paper: https://huggingface.co/papers/2407.04973. Schema: the authors' repository (`Yijia-Xiao/LogicVista`,
`data/dataset.json`: `question`, `answer` such as `C`, `A, C` or `3`, `reasoning`, `skill`, 448 questions) and public
scripts that read the copy `lscpku/LogicVista` (there also `image` and `id`); no card with features was found.
"""

import re
from collections.abc import Mapping
from typing import Any

from ...rewards.choices import extract_choice, plain_text
from ...rewards.completion import last_boxed
from ..benchmark import Benchmark, Problem, Score
from .prompts import SEVERAL_LETTERS, ask
from .rows import require, to_image


LETTERS = "ABCDEFGHI"
"""Options are in the images; questions name A to I at most, or digits."""

_FORMATTING = re.compile(r"\\(?:text|textbf|mathrm|mathbf)(?![a-zA-Z])|\\[,;:! ]|[{}()\[\]$*]")


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    require(row, "logicvista", i, ("question", "answer", "image"))
    return Problem(
        id=str(row.get("id", i)),
        prompt=ask(row["question"], SEVERAL_LETTERS, num_images=1),
        answer=read_labels(row["answer"]) or plain_text(row["answer"]),
        images=[to_image(row["image"], f"`image` in row {i} of logicvista")],
        fields={"skill": row.get("skill")},
    )


def read_labels(text: str) -> str | None:
    """The labels in a text that has nothing else, in order: `AC` for `C and A`; `None` if it has anything else."""
    parts = re.split(r"(?i)\s*(?:[,;&]|\band\b)\s*|\s+", _FORMATTING.sub("", text).strip(" ."))
    if len(parts) == 1 and parts[0].isupper() and parts[0].isalpha():
        parts = list(parts[0])
    parts = [part.strip(".:") for part in parts if part]
    if not parts or not all(len(part) == 1 and part.isascii() and part.isalnum() for part in parts):
        return None
    return "".join(sorted({part.upper() for part in parts}))


def score(problem: Problem, text: str) -> Score:
    """Right if exactly the right options are chosen; several can only be chosen in a box."""
    box = last_boxed(text)
    labels = extract_choice(text, LETTERS) if box is None else read_labels(box) or plain_text(box)
    return Score(float(labels == problem.answer), labels)


LOGICVISTA = Benchmark(
    name="logicvista",
    title="LogicVista",
    dataset="lscpku/LogicVista",
    split="test",
    to_problem=to_problem,
    score=score,
    scoring_note=(
        "The authors have a language model extract the letters, then compare the sets of letters, as here; here the "
        "letters are read by rules. VLMEvalKit's copy has 447 rows."
    ),
)
