"""Chains of gates: each carries a sign that means a cell of the picture; the numbers in those cells are the answer."""

import itertools
import random
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from datasets import Dataset, Features, Image, List, Value

from .config import TaskConfig
from .drawing import draw_cells
from .vocabulary import CELLS, LABELS, SIGNS


Split = Literal["train", "tune", "test"]
SPLITS = ("train", "tune", "test")

HELD_OUT_FRACTION = 10
"""One in this many pictures belongs to the tuning split, and as many to the test split."""


@dataclass(frozen=True)
class Problem:
    """
    A picture and a chain of gates.

    Args:
        numbers (`tuple[int, ...]` of length 4):
            Numbers in the cells, in the order of `CELLS`: different ones, each in 1..9.
        signs (`tuple[str, ...]`):
            The sign of each gate.
        right_cells (`str`):
            The cell that opens each gate.
    """

    numbers: tuple[int, ...]
    signs: tuple[str, ...]
    right_cells: str

    def number(self, cell: str) -> int:
        return self.numbers[CELLS.index(cell)]

    def code(self, cells: str) -> str:
        """The numbers that opening certain cells gives, such as `73`."""
        return "".join(str(self.number(cell)) for cell in cells)

    @property
    def answer(self) -> str:
        return self.code(self.right_cells)

    @property
    def chain(self) -> str:
        """The gates as text, one a line, such as `a bak`."""
        return "\n".join(f"{label} {sign}" for label, sign in zip(LABELS, self.signs, strict=False))

    @property
    def cells_as_text(self) -> str:
        """The content of the picture, as text."""
        return " ".join(f"{cell}{number}" for cell, number in zip(CELLS, self.numbers, strict=True))


@dataclass(frozen=True)
class World:
    """
    The signs' meanings, and the warm-started policy's beliefs about signs and about the numbers in the picture.

    Args:
        right (`dict[str, str]`): the cell that a sign means.
        decoy (`dict[str, str]`): the other cell that the warm-started policy considers.
        known (`dict[str, bool]`): whether it thinks the right cell likelier than the decoy.
        misread (`dict[tuple[str, int], int]`): by cell and number, the other number that the policy reads there.
    """

    right: dict[str, str]
    decoy: dict[str, str]
    known: dict[str, bool]
    misread: dict[tuple[str, int], int]


def world_of(config: TaskConfig) -> World:
    """The world of a task. Each pair of a right cell and a decoy is as frequent as any other, up to rounding."""
    return _world(config.signs, config.known, config.world, config.misread)


@lru_cache
def _world(num_signs: int, known: float, seed: int, misread: float) -> World:
    rng = random.Random(f"world {seed}")
    pairs = list(itertools.permutations(CELLS, 2))
    signs = rng.sample(SIGNS[:num_signs], num_signs)
    cells = {sign: pairs[index % len(pairs)] for index, sign in enumerate(signs)}
    known_signs = set(rng.sample(signs, round(known * num_signs)))
    return World(
        right={sign: right for sign, (right, _) in cells.items()},
        decoy={sign: decoy for sign, (_, decoy) in cells.items()},
        known={sign: sign in known_signs for sign in signs},
        misread=_misread(misread, seed),
    )


def _misread(share: float, seed: int) -> dict[tuple[str, int], int]:
    rng = random.Random(f"reading {seed}")  # of its own: a world's signs do not depend on how it is read
    pairs = list(itertools.product(CELLS, range(1, 10)))
    wrong = rng.sample(pairs, round(share * len(pairs)))
    return {(cell, number): rng.choice([n for n in range(1, 10) if n != number]) for cell, number in wrong}


@lru_cache
def pictures_of(split: Split) -> tuple[tuple[int, ...], ...]:
    """The numbers in every picture of a split; the splits share no picture."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist; use one of {', '.join(map(repr, SPLITS))}.")
    return tuple(
        numbers for numbers in itertools.permutations(range(1, 10), len(CELLS)) if _split_of(numbers) == split
    )


def _split_of(numbers: tuple[int, ...]) -> Split:
    # A checksum, not a formula in the numbers: a model cannot learn to tell the splits apart.
    remainder = zlib.crc32(bytes(numbers)) % HELD_OUT_FRACTION
    return {0: "test", 1: "tune"}.get(remainder, "train")


def sample_problems(config: TaskConfig, n: int, *, split: Split = "train", seed: int = 0) -> list[Problem]:
    """Draw `n` problems of a split, each on its own: a picture, and a sign for each gate."""
    if n < 0:
        raise ValueError(f"n={n} is not possible: it must be at least 0.")
    world, pictures = world_of(config), pictures_of(split)
    rng = random.Random(f"{split} {seed}")
    problems = []
    for _ in range(n):
        numbers = rng.choice(pictures)
        signs = tuple(rng.choice(SIGNS[: config.signs]) for _ in range(config.gates))
        problems.append(Problem(numbers, signs, "".join(world.right[sign] for sign in signs)))
    return problems


def question(config: TaskConfig, problem: Problem) -> str:
    """The prompt's text, with `<image>` where the picture belongs."""
    start = "<image>" if config.pictures else f"{problem.cells_as_text}\n"
    return f"{start}{problem.chain}"


def make_problems(config: TaskConfig, n: int, *, split: Split = "train", seed: int = 0) -> Dataset:
    """
    Draw problems as a data set with the columns of `hiyouga/geometry3k`.

    Args:
        config ([`TaskConfig`]):
            The task.
        n (`int`):
            Number of problems.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"tune"` (to choose settings on) or `"test"`. No picture is in two of them.
        seed (`int`, *optional*, defaults to `0`):
            Decides which problems are drawn, and how each number is placed.

    Returns:
        [`~datasets.Dataset`]: `images` (a list with one 56×56 PIL picture; not for a task without pictures), `problem`
        (the chain, with `<image>` where the picture belongs) and `answer` (the numbers).
    """
    problems = sample_problems(config, n, split=split, seed=seed)
    columns = {"problem": [question(config, p) for p in problems], "answer": [p.answer for p in problems]}
    features = {"problem": Value("string"), "answer": Value("string")}
    if config.pictures:
        rng = random.Random(seed)
        columns = {"images": [[draw_cells(p.numbers, rng)] for p in problems], **columns}
        features = {"images": List(Image()), **features}
    return Dataset.from_dict(columns, features=Features(features))
