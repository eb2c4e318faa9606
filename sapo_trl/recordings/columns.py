"""The recorded files: their names, their columns, and the kind of each column's cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..json_files import Shape


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


def _are_rewards(cell: Any) -> bool:
    return isinstance(cell, list | np.ndarray) and all(entry is None or _is_number(entry) for entry in cell)


_INTEGERS = holds("iu")
ANYTHING = Kind("anything", lambda cell: True)
TEXT = Kind("a text", lambda cell: isinstance(cell, str))
TEXTS = Kind("a list of texts", _are_texts)
INTEGER = Kind("an integer", lambda cell: isinstance(cell, Integral))
NUMBER = Kind("a number", _is_number)
NUMBERS = Kind("a list of numbers", holds("fiu"))
SEGMENTS = Kind("a list of segment numbers that begins at 0 and rises by 1 or by nothing", _are_segments)
REWARD = Kind("a number or empty", NUMBER.fits, optional=True)
REWARDS = Kind("a list of numbers or empty entries", _are_rewards, optional=True)

NUMBERS_OF_TOKENS = ("logps", "entropies", "values", "advantages", "returns", "token_rewards")
"""Columns of numbers, with one entry per loss token."""

NUMBERS_OF_SOME_RUNS = ("visual_dependency", "policy_mask", "raw_advantages", "td_errors", "value_states")
"""The same, of runs that have them: the dependence on images; 1 where the policy learns, else 0; advantages before
whitening; TD errors of the tokens' segments; 1 where the value before the token is used for advantages, else 0."""

OPTIONAL_NUMBERS = ("token_rewards", *NUMBERS_OF_SOME_RUNS)
"""Columns of numbers that files may lack."""

TOKEN_COLUMNS = {
    "tokens": TEXTS,
    "segment_ids": SEGMENTS,
    **dict.fromkeys(NUMBERS_OF_TOKENS, NUMBERS),
    **dict.fromkeys(OPTIONAL_NUMBERS, replace(NUMBERS, optional=True)),
}
"""Columns of lists with one entry per loss token. Files of earlier versions lack the optional columns."""

REWARD_COLUMNS = {
    "reward_names": replace(TEXTS, optional=True),
    "reward_weights": replace(NUMBERS, optional=True),
    "reward_values": REWARDS,
}
"""Columns of lists with one entry per reward function; a value is not weighted, and empty if there was none."""

RESPONSE_COLUMNS = {
    "step": INTEGER,
    "prompt": TEXT,
    "reward": REWARD,
    **TOKEN_COLUMNS,
    "special": Kind("a list of true and false", holds("b"), optional=True),
    "masked_tokens": replace(TEXTS, optional=True),
    "masked_positions": Kind("a list of integers", holds("iu"), optional=True),
    "images": replace(TEXTS, optional=True),
    "corrupted_images": replace(TEXTS, optional=True),
    "answer": replace(TEXT, optional=True),
    **REWARD_COLUMNS,
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


SETTINGS_FILE = "run.json"
"""The file with the algorithm and the settings of a run, beside its recorded files."""

SETTINGS_SHAPE: Shape = {
    **dict.fromkeys(("preset", "summary", "critic", "value_state", "image_corruption"), str),
    **dict.fromkeys(("differences", "other_settings"), dict),
    "whiten_advantages": bool,
}
"""The names in this file at least: the nearest preset with its summary, the algorithm's differences from it, other
settings that were changed, and settings that explain recorded columns."""


def file_name(kind: str, step: int, process: int, file_format: str) -> str:
    """The name of a recorded file, such as `segments_000010_000.parquet`."""
    return f"{kind}_{step:06d}_{process:03d}.{file_format}"
