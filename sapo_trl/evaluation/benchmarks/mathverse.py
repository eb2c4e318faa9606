r"""
MathVerse, vision only: the image shows the diagram and the question. The text has neither.

Paper: https://huggingface.co/papers/2403.14624. Schema: the card of `CaraJ/MathVerse-lmmseval` (the authors' copy for
lmms-eval), with `sample_index`, `problem_index`, `problem_version`, `question`, `image`, `answer`, `question_type`
(`multi-choice` or `free-form`), `metadata` (struct of `split`, `source`, `subject`, `subfield`), `query_wo`,
`query_cot`, `question_for_eval`; 788 rows, a fifth of testmini's 3,940. Answers to multiple choice questions are
letters, with a few exceptions in the published rows: `(C)`, two letters on separate lines, or an option's text.
"""

import re
from collections.abc import Mapping
from typing import Any

from ...rewards.choices import plain_text
from ..benchmark import Benchmark, Problem, Score
from .prompts import FREE_FORM, ONE_LETTER, SEVERAL_LETTERS, ask
from .rows import read_row, to_image
from .scoring import choice_fields, lettered_options, read_labels, score_choices, score_mathematics


VERSION = "Vision Only"
TEXTS = ("sample_index", "problem_version", "question", "answer", "question_type", "question_for_eval")

_LABEL = r"^[ \t]*LETTER[ \t]*[.:]"
# `Area $=9.4 \mathrm{~cm}^{2}$`, `Slope =-4`, `=\frac{7}{4}`: the text before the sign only names the quantity.
_NAME = re.compile(r"\s*(?:[A-Za-z. ]*[A-Za-z]{2}[A-Za-z. ]*|S\.A\.[A-Za-z ]*)?=\s*(?=[^\s=])")


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    # The options stand in the text for the authors' judge. The model sees them in the image.
    row = read_row({"question_for_eval": None, **row}, "mathverse", i, TEXTS, ("image", "metadata"))
    fields = {name: row["metadata"].get(name) for name in ("subject", "subfield")}
    answer, template = read_gold(row["answer"]), FREE_FORM
    if row["question_type"] == "multi-choice":
        options = lettered_options(row["question_for_eval"], _LABEL)
        answer = _letters(row["answer"], options)
        fields |= choice_fields(options, answer)
        template = ONE_LETTER if len(answer) == 1 else SEVERAL_LETTERS
    return Problem(
        id=row["sample_index"],
        prompt=ask(row["question"].strip() or "Answer the question in the image.", template, num_images=1),
        answer=answer,
        images=[to_image(row["image"], f"`image` in row {i} of mathverse")],
        fields=fields,
    )


def read_gold(text: str) -> str:
    """A free-form gold without dollars and the quantity's name. `掳`, from a wrong encoding, becomes `°`."""
    text = text.replace("$", "").replace("掳", "°").strip()
    return _NAME.sub("", text, count=1) if _NAME.match(text) else text


def _letters(answer: str, options: Mapping[str, str]) -> str:
    """The letters of a gold. A few golds have parentheses, two letters on separate lines, or an option's text."""
    written = plain_text(answer)
    by_text = [letter for letter, option in options.items() if plain_text(option) == written]
    return by_text[0] if len(by_text) == 1 else read_labels(answer) or answer


def score(problem: Problem, text: str) -> Score:
    return score_choices(problem, text) if "letters" in problem.fields else score_mathematics(problem, text)


MATHVERSE = Benchmark(
    name="mathverse",
    title="MathVerse",
    dataset="CaraJ/MathVerse-lmmseval",
    config="testmini_version_split",
    split="vision_only",
    to_problem=to_problem,
    score=score,
    keep=lambda row: row.get("problem_version", VERSION) == VERSION,  # `to_problem` names a missing column
    scoring_note=(
        "The authors let one language model extract the answer and another compare it. Here rules read a letter. A "
        "free-form answer must stand in a box, and the judge of `accuracy_reward` compares it. The authors' score of "
        "reasoning steps is not computed."
    ),
)
