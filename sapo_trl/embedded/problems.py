"""Drawn-geometry problems: a quadrilateral with its side lengths in the picture, a sum of them in the question."""

import itertools
import random
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from datasets import Dataset, Features, Image, List, Value

from .drawing import draw_quadrilateral


Split = Literal["train", "test"]

SIDES = ("AB", "BC", "CD", "DA")
"""The sides, clockwise from the top corner A."""

TEST_FRACTION = 5
"""One in this many combinations of side lengths belongs to the test split."""


@dataclass(frozen=True)
class Problem:
    """
    One question about one quadrilateral, such as *Find AB-BC+CD-DA.*

    Args:
        lengths (`tuple[int, ...]` of length 4):
            Side lengths, each in 1..9, in the order of [`SIDES`].
        signs (`tuple[int, ...]` of length 3):
            `+1` or `-1` before each side but the first.
    """

    lengths: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def question(self) -> str:
        terms = "".join(f"{sign_character(sign)}{side}" for sign, side in zip(self.signs, SIDES[1:], strict=True))
        return f"Find {SIDES[0]}{terms}."

    @property
    def running_sums(self) -> tuple[int, ...]:
        """The four partial sums, the first side's length first and the answer last."""
        signed = (sign * length for sign, length in zip(self.signs, self.lengths[1:], strict=True))
        return tuple(itertools.accumulate(signed, initial=self.lengths[0]))

    @property
    def answer(self) -> str:
        return str(self.running_sums[-1])

    @property
    def split(self) -> Split:
        """
        A function of the side lengths alone. So the two splits share no picture for any question, and therefore no
        (picture, question) pair. It is a checksum, not a formula in the digits: a model cannot learn to tell the
        splits apart.
        """
        return "test" if zlib.crc32(bytes(self.lengths)) % TEST_FRACTION == 0 else "train"


def sign_character(sign: int) -> str:
    return "+" if sign > 0 else "-"


@lru_cache
def all_problems(split: Split) -> tuple[Problem, ...]:
    """Every problem of a split. A running sum below zero is left out: the task is reading and adding, not signs."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} does not exist; use 'train' or 'test'.")
    every_problem = (
        Problem(lengths, signs)
        for lengths in itertools.product(range(1, 10), repeat=len(SIDES))
        for signs in itertools.product((1, -1), repeat=len(SIDES) - 1)
    )
    return tuple(p for p in every_problem if p.split == split and min(p.running_sums) >= 0)


def sample_problems(n: int, *, split: Split = "train", seed: int = 0) -> list[Problem]:
    """Draw `n` distinct problems of a split. Raises `ValueError` if the split has fewer than `n`."""
    problems = all_problems(split)
    if not 0 <= n <= len(problems):
        raise ValueError(f"n={n} is not possible: the {split} split has {len(problems)} distinct problems.")
    return random.Random(seed).sample(problems, n)


def make_problems(n: int, *, split: Split = "train", seed: int = 0) -> Dataset:
    """
    Draw `n` distinct problems as a data set with the columns of `hiyouga/geometry3k`.

    Args:
        n (`int`):
            Number of problems, at most the size of the split (23,916 for train, 6,120 for test).
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`. No picture of one shows the side lengths of a picture of the other.
        seed (`int`, *optional*, defaults to `0`):
            Decides which problems are drawn, and how each label is placed.

    Returns:
        [`~datasets.Dataset`]: `images` (a list with one 56×56 PIL picture), `problem` (the question, with `<image>`
        where the picture belongs) and `answer` (the integer as text).
    """
    problems = sample_problems(n, split=split, seed=seed)
    rng = random.Random(seed)
    return Dataset.from_dict(
        {
            "images": [[draw_quadrilateral(p.lengths, rng)] for p in problems],
            "problem": [f"<image>{p.question}" for p in problems],
            "answer": [p.answer for p in problems],
        },
        features=Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")}),
    )
