"""Solutions that the warm start imitates: everything is right except decisions, which follow beliefs about signs."""

import random

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


def write_solution(config: TaskConfig, problem: Problem, cells: str, *, rng: random.Random) -> str:
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
    """
    choices = FILLER_WORDS[: config.filler_choices]
    verdicts = [RIGHT if cell == right else WRONG for cell, right in zip(cells, problem.right_cells, strict=True)]
    lines = []
    if config.preamble:
        lines.append(" ".join([PREAMBLE, *(rng.choice(choices) for _ in range(config.preamble))]))
    for step, (sign, cell) in enumerate(zip(problem.signs, cells, strict=True)):
        words = [LABELS[step], sign, *(rng.choice(choices) for _ in range(config.filler))]
        words.append(f"{cell}{problem.number(cell)}")
        if config.reveal_delay is not None and step >= config.reveal_delay:
            words.append(verdicts[step - config.reveal_delay])
        lines.append(" ".join(words))
    if config.reveal_delay:
        lines.append(" ".join(verdicts[-config.reveal_delay :]))
    return "\n".join(lines)
