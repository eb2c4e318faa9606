"""The true steps of a response: start and end of each, the place of its decision, and whether it was right."""

import re
from dataclasses import dataclass

from .problems import Problem
from .vocabulary import CELLS, LABELS, PREAMBLE, RIGHT, WRONG


# A step begins with its gate's label and has the chosen cell with its number; the policy is free in between.
_STEP = re.compile(rf"([{LABELS}]) [^\n]*? ([{CELLS}])(\d)(?: (?:{RIGHT}|{WRONG}))?(?:\n|$)")
_OPENED = re.compile(rf"\b[{CELLS}](\d)")
_PREAMBLE = re.compile(rf"{PREAMBLE}[^\n]*\n")


@dataclass(frozen=True)
class Step:
    """
    One step of a response.

    Args:
        start (`int`): its first character.
        end (`int`): the character behind its last one, the line break.
        decision (`int`): the character that names the chosen cell.
        cell (`str`): the chosen cell.
        right (`bool`): whether it is the right one.
        read (`bool`): whether the number written beside it is the cell's.
    """

    start: int
    end: int
    decision: int
    cell: str
    right: bool
    read: bool


@dataclass(frozen=True)
class SolutionSteps:
    """
    The steps of a response.

    Args:
        steps (`tuple[Step, ...]`): its steps in order, up to the first that is missing or malformed.
        complete (`bool`): whether it has all of the problem's steps.
        correct (`bool`): whether the numbers that it opens are the answer; the reward depends on nothing else.
    """

    steps: tuple[Step, ...]
    complete: bool
    correct: bool

    @property
    def first_error(self) -> int | None:
        """Index of the first wrong decision; `None` without any."""
        return next((index for index, step in enumerate(self.steps) if not step.right), None)


def read_steps(problem: Problem, response: str) -> SolutionSteps:
    """
    Find the true steps of a response.

    Args:
        problem ([`Problem`]):
            The problem that it answers.
        response (`str`):
            The response, without special tokens.
    """
    steps = []
    preamble = _PREAMBLE.match(response)
    position = preamble.end() if preamble else 0
    for label, right in zip(LABELS, problem.right_cells, strict=False):
        match = _STEP.match(response, position)
        if match is None or match.group(1) != label:
            break
        cell = match.group(2)
        is_read = int(match.group(3)) == problem.number(cell)
        steps.append(Step(match.start(), match.end(), match.start(2), cell, cell == right, is_read))
        position = match.end()
    return SolutionSteps(tuple(steps), len(steps) == len(problem.signs), is_correct(response, problem.answer))


def is_correct(response: str, answer: str) -> bool:
    """
    Whether the numbers of the opened cells, in their order, are the answer.

    Nothing else counts. If the numbers had to be repeated at the end, a run this short would mostly learn to repeat
    them correctly: after one wrong label there, no reward tells good decisions from bad ones.
    """
    return "".join(_OPENED.findall(response)) == answer
