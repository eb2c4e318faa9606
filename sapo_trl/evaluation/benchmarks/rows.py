"""What is read off rows: that their columns are there, and their images."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ...data.images import rgb_image
from ...data.question import BadRow


def require(row: Mapping[str, Any], benchmark: str, i: int, columns: tuple[str, ...]) -> None:
    """Raise `ValueError` with the columns that a row lacks."""
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(f"Row {i} of {benchmark} lacks the columns {missing}; it has {sorted(map(str, row))}.")


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
        return rgb_image(base64.b64decode(value, validate=True) if isinstance(value, str) else value)
    except binascii.Error as error:
        raise ValueError(f"{where} is neither an image file that is there nor base64: {value[:80]!r}.") from error
    except BadRow as error:
        raise ValueError(f"{where} is no image that can be read: {error}") from error


def is_given(value: Any) -> bool:
    """Whether a cell of a table is filled: tables write a missing text as nothing, NaN or `nan`."""
    return value is not None and value == value and str(value).strip().lower() not in ("", "nan")
