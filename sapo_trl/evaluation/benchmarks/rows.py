"""What is read off rows: that their columns are there, and their images."""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, UnidentifiedImageError


def require(row: Mapping[str, Any], benchmark: str, i: int, columns: tuple[str, ...]) -> None:
    """Raise `ValueError` with the columns that a row lacks."""
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(f"Row {i} of {benchmark} lacks the columns {missing}; it has {sorted(map(str, row))}.")


def to_image(value: Any, where: str) -> Image.Image:
    """
    An image in RGB.

    Args:
        value (`Any`):
            A PIL image, the bytes of a file, a mapping with them under `bytes` (as `datasets` stores images that it
            has not decoded), or their base64 text (as tables in TSV have them).
        where (`str`):
            What to name in an error.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes")
    try:
        if isinstance(value, str):
            value = base64.b64decode(value, validate=True)
        if isinstance(value, bytes):
            value = Image.open(io.BytesIO(value))
        if isinstance(value, Image.Image):
            return value.convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} is no image that can be read: {error}") from error
    raise ValueError(f"{where} must be an image, its bytes or their base64 text, got {type(value).__name__}.")


def is_given(value: Any) -> bool:
    """Whether a cell of a table is filled: tables write a missing text as nothing, NaN or `nan`."""
    return value is not None and value == value and str(value).strip().lower() not in ("", "nan")
