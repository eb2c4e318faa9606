"""
Writes questions from packages to JSONL files in the form of GSM8K.

A row has a `question`, and an `answer` that ends in `#### 42`.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict


# GSM8K's scorers read a number after `#### `. Every answer here is an integer.
_INTEGER = re.compile(r"-?[0-9]+")


class Row(TypedDict):
    """One line of a file."""

    question: str
    answer: str
    source: str


def write_questions(folder: str | Path, train: int = 256, test: int = 16, seed: int = 0) -> Path:
    """
    Write `train.jsonl` (sums) and `test.jsonl` (equally many sums, word problems and competition problems).

    Args:
        folder (`str` or `Path`):
            Folder for the two files.
        train (`int`, *optional*, defaults to `256`):
            Number of training questions.
        test (`int`, *optional*, defaults to `16`):
            Number of held-out questions of each source, at most 79.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generated questions, and of the choice of competition problems.

    Returns:
        `Path`: The folder. `datasets` loads it with the splits `train` and `test`, which share no question.
    """
    sums = _distinct(_sums(2 * (train + test), seed))  # twice as many, because sums of small numbers repeat
    held_out, kept = sums[:test], sums[test : test + train]
    competition = list(_competition())
    if test > len(competition) or len(kept) < train:
        raise ValueError(
            f"{len(competition)} competition problems and {len(sums)} sums are too few for `test={test}` of each and "
            f"`train={train}` sums."
        )
    chosen = random.Random(seed).sample(competition, test)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.jsonl", kept)
    _write(folder / "test.jsonl", [*held_out, *_word_problems(test, seed), *chosen])
    return folder


def _sums(count: int, seed: int) -> Iterator[Row]:
    """`4 + 17 =` and `62 - 9 =`, made by reasoning-gym."""
    # Both packages are imported only when they are used: this one takes seconds, and the other reads 70 MB.
    import reasoning_gym

    for item in reasoning_gym.create_dataset(
        "chain_sum", size=count, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    ):
        yield Row(question=item["question"], answer=f"#### {item['answer']}", source="sums")


def _word_problems(count: int, seed: int) -> Iterator[Row]:
    """Questions of GSM8K with other names and numbers (GSM-Symbolic), made by reasoning-gym."""
    import reasoning_gym

    items = reasoning_gym.create_dataset("gsm_symbolic", size=2 * count, seed=seed)
    items = [item for item in items if _INTEGER.fullmatch(item["answer"])]  # nearly all
    for item in items[:count]:
        yield Row(question=item["question"], answer=f"#### {item['answer']}", source="word problems")


def _competition() -> Iterator[Row]:
    """The problems of CHAMP with an integer answer, and the steps of their solution."""
    import champ_dataset

    for problem in champ_dataset.load("v0").problems.values():
        if _INTEGER.fullmatch(problem.answer):
            steps = "\n".join(step.text for step in problem.solution.steps)
            yield Row(question=problem.text, answer=f"{steps}\n#### {problem.answer}", source="competition")


def _distinct(rows: Iterable[Row]) -> list[Row]:
    return list({row["question"]: row for row in rows}.values())


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
