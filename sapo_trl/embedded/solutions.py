"""Step-by-step solutions that the warm start imitates: right readings, and sums that are wrong now and then."""

import random

from .problems import SIDES, Problem, sign_character


def reference_solution(problem: Problem, *, error_rate: float = 0.0, rng: random.Random | None = None) -> str:
    """
    Write the solution of a problem: four readings, three running sums, the boxed answer, one a line.

    A wrong sum is off by one or two and is carried on to the end, so that its answer is (nearly always) wrong too.
    Imitating such solutions gives a *soft* policy: its most likely answer is right far more often than a sampled
    answer. Reinforcement learning can sharpen such a policy.

    Args:
        problem ([`Problem`]):
            The problem to solve.
        error_rate (`float`, *optional*, defaults to `0.0`):
            Probability in [0, 1] that a sum is wrong, for each sum on its own.
        rng (`random.Random`, *optional*):
            Source of the errors; needed if `error_rate` is above 0.
    """
    if error_rate > 0 and rng is None:
        raise ValueError(f"error_rate={error_rate} needs an `rng` to draw the errors from.")
    lines = [f"{side}={length}" for side, length in zip(SIDES, problem.lengths, strict=True)]
    total = problem.lengths[0]
    for sign, length in zip(problem.signs, problem.lengths[1:], strict=True):
        result = total + sign * length
        if error_rate > 0 and rng.random() < error_rate:
            result += rng.choice((-2, -1, 1, 2))
        lines.append(f"{total}{sign_character(sign)}{length}={result}")
        total = result
    lines.append(f"\\boxed{{{total}}}")
    return "\n".join(lines)
