r"""
MMMU, validation: multiple choice and open questions, some with several images.

Paper: https://huggingface.co/papers/2311.16502. Schema: the card of `lmms-lab/MMMU` (the 30 subjects of `MMMU/MMMU` in
one), with the strings `id` (`validation_Art_1`), `question`, `options` (a Python list as text), `explanation`,
`img_type`, `answer`, `topic_difficulty`, `question_type` (`multiple-choice` or `open`), `subfield`, and the images
`image_1` to `image_7`; 900 rows. `<image 1>` in a question or an option marks the place of `image_1`. The answer to an
open question may be a list of right answers, as text.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from ...rewards.choices import letters_of, plain_text
from ...rewards.equivalence import is_equivalent
from ...rewards.numbers import is_close
from ..benchmark import Benchmark, Problem, Score
from .prompts import FREE_FORM, ONE_LETTER, ask, list_options
from .rows import read_row, to_image
from .scoring import accuracy_by, score_box, score_choice


DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""The published disciplines, with their subjects as spelled in the ids."""

_DISCIPLINE_OF = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects}
_ID = re.compile(r"[a-z]+_(\w+)_\d+")
_DECIMAL = re.compile(r"-?[0-9.,]+")
_IMAGE = re.compile(r"<image (\d)>")


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    row = read_row(row, "mmmu", i, ("id", "question", "options", "answer", "question_type"))
    subject = _ID.fullmatch(row["id"])
    if not subject or subject[1] not in _DISCIPLINE_OF:
        raise ValueError(f"`id` in row {i} of mmmu must look like `validation_Art_1`, got {row['id']!r}.")
    fields: dict[str, Any] = {"subject": subject[1], "discipline": _DISCIPLINE_OF[subject[1]]}
    question = row["question"]
    is_choice = row["question_type"] == "multiple-choice"
    if is_choice:
        options = _python_list(row["options"], "options", i)
        fields |= {"letters": letters_of(options), "options": options}
        if row["answer"] not in fields["letters"]:
            raise ValueError(f"`answer` in row {i} of mmmu must be one of {fields['letters']}, got {row['answer']!r}.")
        question = f"{question}\n{list_options(options)}"
    else:
        answer = row["answer"]
        fields["answers"] = _python_list(answer, "answer", i) if answer.startswith("[") else [answer]
        if not all(map(str.strip, fields["answers"])) or not fields["answers"]:
            raise ValueError(f"`answer` in row {i} of mmmu must not be empty, got {answer!r}.")
    if not _IMAGE.search(question):
        question = f"<image 1>{question}"
    names = [f"image_{number}" for number in _IMAGE.findall(question)]
    return Problem(
        id=row["id"],
        prompt=ask(question, ONE_LETTER if is_choice else FREE_FORM, len(names), in_place=True),
        answer=row["answer"],
        images=[to_image(row.get(name), f"`{name}` in row {i} of mmmu") for name in names],
        fields=fields,
    )


def score(problem: Problem, text: str) -> Score:
    if "letters" in problem.fields:
        return score_choice(problem, text)
    return score_box(text, lambda box: any(_is_right(box, gold) for gold in problem.fields["answers"]))


def _is_right(answer: str, gold: str) -> bool:
    """Whether both are equal as text, as numbers with two decimals (the authors' rule), or as mathematics."""
    if plain_text(answer) == plain_text(gold):
        return True
    if _DECIMAL.fullmatch(gold):
        return is_close(answer, gold, precision=2)
    return is_equivalent(answer, gold)


def _python_list(text: str, field: str, i: int) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"`{field}` in row {i} of mmmu must be a Python list as text, got {text!r}.") from error
    return [str(item) for item in value]


MMMU = Benchmark(
    name="mmmu",
    title="MMMU",
    dataset="lmms-lab/MMMU",
    split="validation",
    to_problem=to_problem,
    score=score,
    aggregate=accuracy_by("discipline"),
    right_answer=lambda problem: problem.fields.get("answers", [problem.answer])[0],
    scoring_note=(
        "If the authors' rules can read no option, they draw a random one. They count an open answer as right if a "
        "key phrase of the response contains the gold. Here no option is drawn. An open answer must stand in a box "
        "and equal the gold: as text, as a number with two decimals, or for the judge of `accuracy_reward`."
    ),
)
