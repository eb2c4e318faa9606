r"""
ScienceQA: the test questions with an image, in the configuration `ScienceQA-IMG`.

Paper: https://huggingface.co/papers/2209.09513. Schema: the card of `lmms-lab/ScienceQA`, with `image`, `question`,
`choices` (list of strings), `answer` (int8, from 0), `hint`, `task`, `grade`, `subject`, `topic`, `category`, `skill`,
`lecture`, `solution`; 2,017 test rows. The 2,224 questions without an image are left out, also from `ScienceQA-FULL`.
They measure the language model, and multi-modal papers report the score of `ScienceQA-IMG`.
"""

from collections.abc import Mapping
from typing import Any

from ...rewards.choices import letters_of
from ..benchmark import Benchmark, Problem
from .prompts import ONE_LETTER, ask, list_options
from .rows import is_given, read_row, to_image
from .scoring import accuracy_by, score_choice


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    row = read_row(row, "scienceqa", i, ("question", "hint", "answer"), ("image", "choices", "subject"))
    if not isinstance(row["choices"], list) or not row["answer"].isdecimal():
        raise ValueError(
            f"Row {i} of scienceqa must have a list as `choices` and the number of a choice as `answer`, got "
            f"{row['choices']!r} and {row['answer']!r}."
        )
    options, answer = row["choices"], int(row["answer"])
    letters = letters_of(options)
    if not 0 <= answer < len(options):
        raise ValueError(f"`answer` in row {i} of scienceqa must lie in [0, {len(options)}), got {answer}.")
    context = f"Context: {row['hint']}\n" if is_given(row["hint"]) else ""
    return Problem(
        id=str(i),
        prompt=ask(f"{context}{row['question']}\n{list_options(options)}", ONE_LETTER, num_images=1),
        answer=letters[answer],
        images=[to_image(row["image"], f"`image` in row {i} of scienceqa")],
        fields={"letters": letters, "options": options, "subject": row["subject"]},
    )


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="ScienceQA",
    dataset="lmms-lab/ScienceQA",
    config="ScienceQA-IMG",
    split="test",
    to_problem=to_problem,
    score=score_choice,
    aggregate=accuracy_by("subject"),
    keep=lambda row: "image" not in row or row["image"] is not None,  # `to_problem` names a missing column
    scoring_note=(
        "lmms-eval accepts only a response that is a letter or starts with `A.`; here responses may reason first. The "
        "authors' average over text and image questions is not computed."
    ),
)
