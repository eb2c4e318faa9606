"""Solutions that the warm start imitates: all is right except decisions and readings, which follow beliefs."""

import random
from collections.abc import Sequence

from .config import TaskConfig
from .problems import Problem, world_of
from .vocabulary import FILLER_WORDS, LABELS, PREAMBLE, RIGHT, WRONG


def believed_cells(config: TaskConfig, problem: Problem, *, rng: random.Random) -> str:
    """
    The cells chosen by a policy that follows its beliefs about the signs, each decision on its own.

    Args:
        config ([`TaskConfig`]):
            The task, whose world has the beliefs.
        problem ([`Problem`]):
            The problem.
        rng (`random.Random`):
            Source of the choices.
    """
    world = world_of(config)
    chosen = []
    for sign in problem.signs:
        follows = rng.random() < config.confidence
        chosen.append(world.right[sign] if world.known[sign] == follows else world.decoy[sign])
    return "".join(chosen)


def believed_numbers(config: TaskConfig, problem: Problem, cells: str, *, rng: random.Random) -> list[int]:
    """
    The numbers read in certain cells by a policy that follows its beliefs, each reading on its own.

    Args:
        config ([`TaskConfig`]):
            The task, whose world has the beliefs.
        problem ([`Problem`]):
            The problem.
        cells (`str`):
            The cells.
        rng (`random.Random`):
            Source of the choices.
    """
    misread = world_of(config).misread
    numbers = []
    for cell in cells:
        number = problem.number(cell)
        if (cell, number) in misread and rng.random() < config.reading:
            number = misread[cell, number]
        numbers.append(number)
    return numbers


def write_solution(
    config: TaskConfig, problem: Problem, cells: str, *, rng: random.Random, numbers: Sequence[int] | None = None
) -> str:
    """
    Write the solution with certain decisions: the preamble if there is one, then a step a line.

    A step has the gate's label and sign, the free words, the chosen cell with its number, and the remark on the
    decision `reveal_delay` steps before. Remarks that are still missing at the end form a line of their own.

    Args:
        config ([`TaskConfig`]):
            The task.
        problem ([`Problem`]):
            The problem.
        cells (`str`):
            The cell chosen at each gate.
        rng (`random.Random`):
            Source of the free words.
        numbers (`Sequence[int]`, *optional*):
            The number read at each gate; by default the right ones.
    """
    numbers = [problem.number(cell) for cell in cells] if numbers is None else numbers
    choices = FILLER_WORDS[: config.filler_choices]
    verdicts = [RIGHT if cell == right else WRONG for cell, right in zip(cells, problem.right_cells, strict=True)]
    lines = []
    if config.preamble:
        lines.append(" ".join([PREAMBLE, *(rng.choice(choices) for _ in range(config.preamble))]))
    for step, (sign, cell, number) in enumerate(zip(problem.signs, cells, numbers, strict=True)):
        words = [LABELS[step], sign, *(rng.choice(choices) for _ in range(config.filler))]
        words.append(f"{cell}{number}")
        if config.reveal_delay is not None and step >= config.reveal_delay:
            words.append(verdicts[step - config.reveal_delay])
        lines.append(" ".join(words))
    if config.reveal_delay:
        lines.append(" ".join(verdicts[-config.reveal_delay :]))
    return "\n".join(lines)
