"""What is read off rows: their texts and images, and that their columns are there."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from ...data.images import from_base64, rgb_image
from ...data.question import BadRow, as_list, is_missing, text_cell


def read_row(
    row: Mapping[str, Any], benchmark: str, i: int, texts: tuple[str, ...], others: tuple[str, ...] = ()
) -> dict[str, Any]:
    """
    A row with its texts as texts, whatever types a file gave them: `42` of a JSON or CSV file is a number.

    Args:
        row (`Mapping`): the row.
        benchmark (`str`), i (`int`): what to call it in an error.
        texts (`tuple[str, ...]`): columns of text; a cell may be empty.
        others (`tuple[str, ...]`, *optional*): further columns that must be there.

    Returns:
        `dict`: the row. Raises `ValueError` with the columns that it lacks, or the text that cannot be read.
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
    An image as training sees it: checked before it is decoded, upright, RGB.

    Args:
        value (`Any`):
            A PIL image, the bytes of a file, a mapping with them under `bytes` or with their `path` (as `datasets`
            gives images that it has not decoded), or their base64 text (as tables in TSV have them).
        where (`str`):
            What to name in an error.
    """
    try:
        data = from_base64(value) if isinstance(value, str) else value
    except BadRow as error:
        raise ValueError(f"{where} is neither an image file that is there nor base64: {value[:80]!r}.") from error
    try:
        return rgb_image(data)
    except BadRow as error:
        raise ValueError(f"{where} is no image that can be read: {error}") from error


def to_images(value: Any, where: str) -> list[Image.Image]:
    """The images of a cell that holds one, as in a CSV, or a list, each as [`to_image`] reads it."""
    return [to_image(image, where) for image in as_list(value)]


def is_given(value: Any) -> bool:
    """Whether a cell of a table is filled: tables write a missing text as nothing, NaN or `nan`."""
    return not is_missing(value) and str(value).strip().lower() != "nan"
