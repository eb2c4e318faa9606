"""The format of a data set: its columns, and a function that turns a row into a question."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from decimal import Decimal
from typing import Any


IMAGE_PLACEHOLDER = "<image>"
"""Marks the place of a picture in a question's text."""


class BadRow(ValueError):
    """
    A row that cannot be trained on.

    Args:
        reason (`str`): the kind of fault, such as `"empty answer"`. The report counts rows by it.
        detail (`str`): the fault of this row.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Question:
    """The question of one row."""

    text: str
    """The question's text, with one [`IMAGE_PLACEHOLDER`] for each picture."""
    answer: str
    """The right answer, in the form that a reward reads."""
    images: list[Any] | None = None
    """Undecoded pictures, for [`~sapo_trl.data.images.fit_image`]; `None` in a data set without pictures."""


@dataclass(frozen=True)
class DataFormat:
    """The columns of a data set, and a function that reads a row."""

    columns: tuple[str, ...]
    """Required columns."""
    read: Callable[[Mapping[str, Any]], Question]
    """Turns a row into a question. May raise [`BadRow`]."""
    consumed: tuple[str, ...]
    """Columns that the prompt replaces. The others stay for reward functions."""
    images: str | None = None
    """The column with pictures."""
    hub_ids: tuple[str, ...] = ()
    """Data sets on the hub with this format."""
    config: str | None = None
    """Configuration to load, if these data sets have several."""


def as_list(images: Any) -> list[Any]:
    """The pictures of a row as a list. A cell holds one picture, several, or none (`None`)."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def with_placeholders(text: str, images: list[Any]) -> str:
    """The text with places for its pictures. A text without any place gets all places in front."""
    return text if IMAGE_PLACEHOLDER in text else IMAGE_PLACEHOLDER * len(images) + text


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: `None`, NaN, spaces, or an empty list or mapping."""
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
    The text of a cell, as in its file.

    Args:
        row (`Mapping`): a row.
        column (`str`): the cell's column.

    Returns:
        `str`: Empty for a missing cell (`None`, NaN, an empty list). A list with one item gives this item. Raises
        [`BadRow`] if the cell's text is ambiguous: several items, a mapping, bytes, or a number rounded by a float.
    """
    value = row[column]
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if is_missing(value):
        return ""
    match value:
        case str() | bool() | int() | Decimal():
            return str(value)
        # Whole numbers are read as floats in two cases: a CSV column with an empty cell, and JSON beyond 64 bits.
        case float() if abs(value) < 2**53:
            return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
        case datetime() if value.time() == time():  # `datasets` reads the JSON text "2020-02-29" as 0:00 of this day
            return str(value.date())
    raise BadRow("unreadable text", f"`{column}` is neither one text nor one exact number: {repr(value)[:200]}")
