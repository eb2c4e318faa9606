r"""
MathVista, testmini.

Paper: https://huggingface.co/papers/2310.02255. Schema: the card of `AI4Math/MathVista`, with `pid`, `question`,
`image` (a path), `decoded_image`, `choices` (list of strings), `unit`, `precision` (float64), `answer`,
`question_type` (`multi_choice` or `free_form`), `answer_type` (`text`, `integer`, `float` or `list`), `metadata`
(struct) and `query` (the published prompt, with options as `(A) ...`); 1,000 rows. The `answer` to a multiple choice
question is the option's text.
"""

from collections.abc import Mapping
from typing import Any

from ...rewards.choices import letters_of
from ...rewards.numbers import is_close, read_numbers
from ..benchmark import Benchmark, Problem, Score
from .prompts import FREE_FORM, ONE_LETTER, ask
from .rows import is_given, read_row, to_image
from .scoring import choose, score_box


TEXTS = ("pid", "query", "precision", "answer", "question_type", "answer_type")


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    row = read_row(row, "mathvista", i, TEXTS, ("decoded_image", "choices"))
    is_choice = row["question_type"] == "multi_choice"
    answer_type = "choice" if is_choice else row["answer_type"]
    if answer_type not in _RULES:
        raise ValueError(f"`answer_type` in row {i} of mathvista must be one of {list(_RULES)}, got {answer_type!r}.")
    choices = row["choices"] if isinstance(row["choices"], list) else []
    if is_choice and row["answer"] not in choices:
        raise ValueError(f"`answer` in row {i} of mathvista must be one of {choices}, got {row['answer']!r}.")
    return Problem(
        id=row["pid"],
        prompt=ask(row["query"], ONE_LETTER if is_choice else FREE_FORM, num_images=1),
        answer=row["answer"],
        images=[to_image(row["decoded_image"], f"`decoded_image` in row {i} of mathvista")],
        fields={
            "answer_type": answer_type,
            "precision": int(float(row["precision"])) if is_given(row["precision"]) else 0,
            "options": choices,
            "task": (row.get("metadata") or {}).get("task"),
        },
    )


def score(problem: Problem, text: str) -> Score:
    return _RULES[problem.fields["answer_type"]](problem, text)


def right_answer(problem: Problem) -> str:
    """The right answer as a response would give it: a letter for a choice, because an option can be named `(b)`."""
    options = problem.fields["options"]
    if problem.fields["answer_type"] == "choice":
        return letters_of(options)[options.index(problem.answer)]
    return problem.answer


def _score_choice(problem: Problem, text: str) -> Score:
    # Compare the options' texts, because a few questions list the same text twice.
    options = problem.fields["options"]
    letters = letters_of(options)
    letter = choose(text, letters, options)
    return Score(float(letter is not None and options[letters.index(letter)] == problem.answer), letter)


def _score_integer(problem: Problem, text: str) -> Score:
    return score_box(text, lambda box: is_close(box, problem.answer))


def _score_float(problem: Problem, text: str) -> Score:
    return score_box(text, lambda box: is_close(box, problem.answer, precision=problem.fields["precision"]))


def _score_list(problem: Problem, text: str) -> Score:
    gold = read_numbers(problem.answer)
    return score_box(text, lambda box: gold is not None and read_numbers(box) == gold)


_RULES = {"choice": _score_choice, "integer": _score_integer, "float": _score_float, "list": _score_list}

MATHVISTA = Benchmark(
    name="mathvista",
    title="MathVista",
    dataset="AI4Math/MathVista",
    split="testmini",
    to_problem=to_problem,
    score=score,
    right_answer=right_answer,
    scoring_note=(
        "The authors let a language model extract the answer. They take the option with the smallest edit distance to "
        "it, and cut decimals off integers, so that 14.7 counts as 14. Here the answer must stand in a box (a letter "
        "may be announced), name an option, and equal the integer. As in the authors' code, both floats are rounded "
        "to the question's precision."
    ),
)
