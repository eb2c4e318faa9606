"""What a data set is to this package: its columns, and how one row becomes a question."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from decimal import Decimal
from typing import Any


IMAGE_PLACEHOLDER = "<image>"
"""Where a picture belongs in a question's text."""


class BadRow(ValueError):
    """
    A row that cannot be trained on.

    Args:
        reason (`str`): what rows with the same fault are counted under, such as `"empty answer"`.
        detail (`str`): what is wrong with this one.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Question:
    """One row, read."""

    text: str
    """With one [`IMAGE_PLACEHOLDER`] for each picture."""
    answer: str
    """The right answer, as a reward reads it."""
    images: list[Any] | None = None
    """Undecoded pictures, as [`~sapo_trl.data.images.fit_image`] takes them; `None` in a data set without pictures."""


@dataclass(frozen=True)
class DataFormat:
    """The columns of a data set, and a function."""

    columns: tuple[str, ...]
    """Columns that must be there."""
    read: Callable[[Mapping[str, Any]], Question]
    """From a row. May raise [`BadRow`]."""
    consumed: tuple[str, ...]
    """Columns that the prompt takes the place of; the others stay for reward functions."""
    images: str | None = None
    """The column with pictures."""
    hub_ids: tuple[str, ...] = ()
    """Data sets on the hub that have this format."""
    config: str | None = None
    """Configuration of those data sets, where they have several."""


def as_list(images: Any) -> list[Any]:
    """A column that holds one picture, several or none (`None`) a row, as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def with_placeholders(text: str, images: list[Any]) -> str:
    """A text that says nothing about where its pictures belong, with all of them in front."""
    return text if IMAGE_PLACEHOLDER in text else IMAGE_PLACEHOLDER * len(images) + text


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: `None`, NaN, spaces, or an empty list or mapping."""
    match value:
        case float():
            return math.isnan(value)
        case str():
            return not value.strip()
        case Sequence() | Mapping():
            return not value
    return value is None


def text_cell(row: Mapping[str, Any], column: str) -> str:
    """
    A cell as the text that its file had.

    Args:
        row (`Mapping`): a row.
        column (`str`): the cell's column.

    Returns:
        `str`: Empty for a missing cell (`None`, NaN, an empty list). A list of one is its item. Raises [`BadRow`] for
        a cell whose text cannot be known: several items, a mapping, bytes, or a number that a float has rounded.
    """
    value = row[column]
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if is_missing(value):
        return ""
    match value:
        case str() | bool() | int() | Decimal():
            return str(value)
        # Whole numbers of a CSV are read as floats where a cell of their column is empty, and JSON's beyond 64 bits.
        case float() if abs(value) < 2**53:
            return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
        case datetime() if value.time() == time():  # `datasets` reads "2020-02-29" in JSON as a time, 0:00 of that day
            return str(value.date())
    raise BadRow("unreadable text", f"`{column}` is neither one text nor one exact number: {repr(value)[:200]}")
