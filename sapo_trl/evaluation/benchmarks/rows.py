"""Reads the texts and images of a row, and checks its columns."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from ...data.images import from_base64, rgb_image
from ...data.question import BadRow, as_list, is_missing, text_cell


def read_row(
    row: Mapping[str, Any], benchmark: str, i: int, texts: tuple[str, ...], others: tuple[str, ...] = ()
) -> dict[str, Any]:
    """
    A row with all its texts as strings. In a JSON or CSV file `42` would be a number.

    Args:
        row (`Mapping`): the row.
        benchmark (`str`), i (`int`): the row's name in an error.
        texts (`tuple[str, ...]`): columns of text; a cell may be empty.
        others (`tuple[str, ...]`, *optional*): further required columns.

    Returns:
        `dict`: the row. Raises `ValueError` with the missing columns, or with the unreadable cell.
    """
    missing = [name for name in (*texts, *others) if name not in row]
    if missing:
        raise ValueError(f"Row {i} of {benchmark} lacks the columns {missing}; it has {sorted(map(str, row))}.")
    try:
        return {**row, **{name: text_cell(row, name) for name in texts}}
    except BadRow as error:
        raise ValueError(f"Row {i} of {benchmark} has an unreadable cell: {error.detail}.") from error


def to_image(value: Any, where: str) -> Image.Image:
    """
    An image, read as in training: checked before it is decoded, upright, RGB.

    Args:
        value (`Any`):
            A PIL image, the bytes of a file, an undecoded image of `datasets` (a mapping with `bytes` or `path`), or
            base64 text, as in TSV tables.
        where (`str`):
            The image's name in an error.
    """
    try:
        data = from_base64(value) if isinstance(value, str) else value
    except BadRow as error:
        raise ValueError(f"{where} is neither an existing image file nor base64: {value[:80]!r}.") from error
    try:
        return rgb_image(data)
    except BadRow as error:
        raise ValueError(f"{where} is not a readable image: {error}") from error


def to_images(value: Any, where: str) -> list[Image.Image]:
    """The images of a cell, read by [`to_image`]. A cell holds one image, as in a CSV, or a list."""
    return [to_image(image, where) for image in as_list(value)]


def is_given(value: Any) -> bool:
    """Whether a cell is filled. In tables a missing text is empty, NaN or `nan`."""
    return not is_missing(value) and str(value).strip().lower() != "nan"
