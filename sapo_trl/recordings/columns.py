"""The recorded files: their names, their columns, and the kind of each column's cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Kind:
    """
    The kind of the cells of a column.

    Args:
        words (`str`): for errors.
        fits (`Callable`): whether a cell is one.
        optional (`bool`, *optional*, defaults to `False`): whether the column may be missing, or a cell be empty.
    """

    words: str
    fits: Callable[[Any], bool]
    optional: bool = False


def holds(kinds: str) -> Callable[[Any], bool]:
    """Whether a cell is a list whose entries have one of these kinds of NumPy's types."""

    def fits(cell: Any) -> bool:
        try:
            array = np.asarray(cell)
        except ValueError:  # rows of different lengths
            return False
        return array.ndim == 1 and (array.size == 0 or array.dtype.kind in kinds)

    return fits


def _are_texts(cell: Any) -> bool:
    # Not by NumPy: one long text would make every other one as large.
    return isinstance(cell, list | np.ndarray) and all(isinstance(entry, str) for entry in cell)


def _is_number(cell: Any) -> bool:
    try:
        return isinstance(cell, Real) and isinstance(float(cell), float)
    except OverflowError:  # JSON has integers of any size
        return False


def _are_segments(cell: Any) -> bool:
    return _INTEGERS(cell) and (len(cell) == 0 or (cell[0] == 0 and bool(np.isin(np.diff(cell), (0, 1)).all())))


_INTEGERS = holds("iu")
ANYTHING = Kind("anything", lambda cell: True)
TEXT = Kind("a text", lambda cell: isinstance(cell, str))
TEXTS = Kind("a list of texts", _are_texts)
INTEGER = Kind("an integer", lambda cell: isinstance(cell, Integral))
NUMBER = Kind("a number", _is_number)
NUMBERS = Kind("a list of numbers", holds("fiu"))
SEGMENTS = Kind("a list of segment numbers that begins at 0 and rises by 1 or by nothing", _are_segments)
REWARD = Kind("a number or empty", NUMBER.fits, optional=True)

NUMBERS_OF_TOKENS = ("logps", "entropies", "values", "advantages", "returns", "token_rewards")
"""Columns of numbers, with one entry per loss token."""

NUMBERS_IF_ASKED_FOR = ("visual_dependency", "policy_mask")
"""The same, of runs whose settings ask for them: the dependence on images; 1 where the policy learns, else 0."""

OPTIONAL_NUMBERS = ("token_rewards", *NUMBERS_IF_ASKED_FOR)
"""Columns of numbers that files may lack."""

TOKEN_COLUMNS = {
    "tokens": TEXTS,
    "segment_ids": SEGMENTS,
    **dict.fromkeys(NUMBERS_OF_TOKENS, NUMBERS),
    **dict.fromkeys(OPTIONAL_NUMBERS, replace(NUMBERS, optional=True)),
}
"""Columns of lists with one entry per loss token. Files of earlier versions lack the optional columns."""

RESPONSE_COLUMNS = {
    "step": INTEGER,
    "prompt": TEXT,
    "reward": REWARD,
    **TOKEN_COLUMNS,
    "special": Kind("a list of true and false", holds("b"), optional=True),
    "masked_tokens": replace(TEXTS, optional=True),
    "masked_positions": Kind("a list of integers", holds("iu"), optional=True),
    "images": replace(TEXTS, optional=True),
}
"""Columns of `segments_*`: a row per response. Files of earlier versions lack the optional columns."""

RATIO_COLUMNS = {"response": INTEGER, "log_ratios": NUMBERS}
"""Columns of `ratios_*`: a row per response of the file of responses with the same step and process."""

VALUE_COLUMNS = {
    **dict.fromkeys(("step", "response", "segment", "token"), INTEGER),
    **dict.fromkeys(("value", "monte_carlo_value", "standard_error"), NUMBER),
    "reward": REWARD,
}
"""Columns of `values_*`: a row per valued state."""


def file_name(kind: str, step: int, process: int, file_format: str) -> str:
    """The name of a recorded file, such as `segments_000010_000.parquet`."""
    return f"{kind}_{step:06d}_{process:03d}.{file_format}"
