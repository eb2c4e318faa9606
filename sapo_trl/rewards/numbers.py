r"""
Reward for a number that is close enough to the answer.

It is for measured or rounded golds. Exact mathematics is compared by
[`~sapo_trl.rewards.equivalence.is_equivalent`]. [`~sapo_trl.rewards.quantities`] decides which texts are numbers.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import ROUND_HALF_UP, Context, Decimal

from .completion import Completion, answer_part, completion_text, sole_answer
from .quantities import Quantity, read_quantity
from .units import scale_between


_MAX_CHARACTERS = 200  # in a list
_LIST = re.compile(r"\\?\[(.*)\\?\]|\\?\{(.*)\\?\}|\\?\((.*)\\?\)|(.*)", re.DOTALL)
# More digits than any finite float has before and after its point.
_EXACT = Context(prec=1100)


def read_number(text: str) -> float | None:
    r"""
    The number in an answer. A percentage is read without its sign, so that 75% is 75.

    Args:
        text (`str`):
            The answer alone, such as the content of a box.

    Returns:
        `float` or `None`: Always finite; `None` if the answer is not one number.

    Example:

    ```python
    >>> from sapo_trl.rewards.numbers import read_number

    >>> [read_number(text) for text in ("1,250 km", r"\frac{3}{4}", r"2\pi", "x + 1")]
    [1250.0, 0.75, 6.283185307179586, None]
    ```
    """
    quantity = read_quantity(text)
    return None if quantity is None else quantity.value


def read_numbers(text: str) -> list[float] | None:
    """The numbers of a list such as `[2007, 2008]`, in its order; `None` if the list has anything else."""
    if len(text) > _MAX_CHARACTERS:
        return None
    inner = next(group for group in _LIST.fullmatch(text.strip(" $")).groups() if group is not None)
    numbers = [read_number(part) for part in inner.removesuffix("\\").split(",")]
    return None if None in numbers else numbers


def is_close(
    answer: str, gold: str, *, rel_tol: float = 1e-9, abs_tol: float = 0.0, precision: int | None = None
) -> bool:
    """
    Whether two answers are numbers close to each other.

    A percentage may be written as a fraction of 1: both 75 and 0.75 are close to 75%. Up to 1% only the fraction
    counts, since 0.75 may be 0.75% or 75%. Where both have a unit, 0.05 m is 5 cm, and 5 m is not.

    Args:
        answer (`str`):
            The answer.
        gold (`str`):
            The right answer.
        rel_tol (`float`, *optional*, defaults to `1e-9`):
            Largest difference, as a share of the larger number.
        abs_tol (`float`, *optional*, defaults to `0.0`):
            Largest absolute difference. A smaller difference is always accepted.
        precision (`int`, *optional*):
            Number of decimals: both numbers are rounded to them and must then be equal. A 5 after the last decimal may
            be rounded up, as at school, or to the even digit, as in Python. The tolerances are not used.
    """
    quantity, right = read_quantity(answer), read_quantity(gold)
    if quantity is None or right is None:
        return False
    scale = scale_between(quantity.unit, right.unit)
    if scale is None:
        return False
    quantity = replace(quantity, value=quantity.value * scale)
    pairs = _readings(quantity, right)
    if precision is not None:
        return any(_round_alike(*pair, precision) for pair in pairs)
    return any(math.isclose(*pair, rel_tol=rel_tol, abs_tol=abs_tol) for pair in pairs)


def numeric_reward(
    completions: list[Completion],
    answer: list[str | int | float | None],
    precision: Sequence[int | None] | None = None,
    rel_tol: float = 1e-4,
    abs_tol: float = 0.0,
    **kwargs,
) -> list[float | None]:
    r"""
    1.0 for each completion with a number close to the answer in its last `\boxed{}`, else 0.0.

    Args:
        completions (`list`):
            Completions, each a string or a list of messages.
        answer (`list`):
            Right answers. [`read_number`] must be able to read each. A row with `None` has no answer to compare with.
        precision (`list[int]`, *optional*):
            Number of decimals for each answer; `None` uses the tolerances.
        rel_tol (`float`, *optional*, defaults to `1e-4`), abs_tol (`float`, *optional*, defaults to `0.0`):
            As for [`is_close`].
        **kwargs:
            The trainer's other columns, unused.

    Returns:
        `list[float | None]`:
            One reward per completion. A completion without a box scores 0.0. A row without an answer has `None`, which
            means "does not apply" to TRL.

    Example:

    ```python
    >>> from sapo_trl.rewards.numbers import numeric_reward

    >>> numeric_reward(completions=[r"\boxed{3.14 cm}", r"\boxed{3}"], answer=["3.1416"] * 2, rel_tol=0.01)
    [1.0, 0.0]
    ```
    """
    decimals = precision if precision is not None else [None] * len(completions)
    if not len(completions) == len(answer) == len(decimals):
        raise ValueError(
            f"{len(completions)} completions came with {len(answer)} values of `answer` and {len(decimals)} of "
            "`precision`; one each is needed."
        )
    rewards: list[float | None] = []
    for completion, gold, places in zip(completions, answer, decimals, strict=True):
        if gold is None:
            rewards.append(None)
            continue
        if read_number(str(gold)) is None:
            raise ValueError(f"`answer` must be a number for `numeric_reward`, got {gold!r}.")
        box = sole_answer(answer_part(completion_text(completion)))
        is_right = box is not None and is_close(box, str(gold), rel_tol=rel_tol, abs_tol=abs_tol, precision=places)
        rewards.append(float(is_right))
    return rewards


def _readings(quantity: Quantity, right: Quantity) -> list[tuple[float, float]]:
    """The pairs of numbers to compare."""
    percentage = next((x for x in (quantity, right) if x.is_percent), None)
    is_alike = quantity.is_percent == right.is_percent
    pairs = [(quantity.value, right.value)] if is_alike or abs(percentage.value) > 1 else []
    if quantity.is_percent and not right.is_percent:
        pairs.append((quantity.value / 100, right.value))
    if right.is_percent and not quantity.is_percent:
        pairs.append((quantity.value, right.value / 100))
    return pairs


def _round_alike(number: float, right: float, places: int) -> bool:
    return round(number, places) == round(right, places) or _half_up(number, places) == _half_up(right, places)


def _half_up(number: float, places: int) -> Decimal:
    return Decimal(repr(number)).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP, _EXACT)
