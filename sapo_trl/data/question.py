"""What a data set is to this package: its columns, and how one row becomes a question."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


def as_text(value: Any) -> str:
    """A cell as text; empty for `None`."""
    if value is None:
        return ""
    # Whole numbers of a CSV are read as floats where a cell of their column is empty. Beyond 2**53 not each is exact.
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value) if is_whole else value)
