"""Pictures of a data set: checked before they are decoded, converted to RGB, resized to limits in pixels."""

import base64
import binascii
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image, ImageOps, UnidentifiedImageError

from .question import BadRow
from .remote import fetch


# Pillow detects the format from the content. Unrestricted, it would also run Ghostscript on PostScript, and decoders
# that few people test.
FILE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

MAX_SOURCE_PIXELS = 89_478_485
"""
Largest width times height. Such a picture takes a quarter of a GiB. Above it, Pillow warns of decompression bombs.
"""

MAX_FILE_BYTES = 8 * MAX_SOURCE_PIXELS
"""Size of the largest picture as uncompressed 16-bit RGBA. A larger file is not read."""

MAX_ASPECT_RATIO = 200
"""Long side divided by short side. Qwen's image processors would stop the training at a narrower picture."""

_ORIENTATION = 0x0112  # EXIF


@dataclass(frozen=True)
class ImageLimits:
    """
    Limits for the number of pixels. Published Geometry3K recipes use 262,144 (512²) to 4,194,304 (2048²).

    Args:
        min_pixels (`int`, *optional*): smaller pictures are enlarged to this number.
        max_pixels (`int`, *optional*): larger pictures are reduced to this number; at least 200.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self):
        if self.min_pixels is not None and self.min_pixels < 1:
            raise ValueError(f"`min_pixels` must be at least 1, got {self.min_pixels}.")
        if self.max_pixels is not None and self.max_pixels < MAX_ASPECT_RATIO:  # a picture of 1 × 200 must still fit
            raise ValueError(f"`max_pixels` must be at least {MAX_ASPECT_RATIO}, got {self.max_pixels}.")
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:
            raise ValueError(f"`min_pixels` ({self.min_pixels}) must not exceed `max_pixels` ({self.max_pixels}).")

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """
        The new size for a picture of `width` by `height`.

        A picture within the limits keeps its size. Otherwise the result is the nearest size with the same aspect
        ratio. Rounding to whole pixels stays within the limits. If it makes a narrow picture too narrow, the long side
        is cut to `MAX_ASPECT_RATIO` times the short side.
        """
        pixels = width * height
        if self.max_pixels is not None and pixels > self.max_pixels:
            scale, whole = math.sqrt(self.max_pixels / pixels), math.floor
        elif self.min_pixels is not None and pixels < self.min_pixels:
            scale, whole = math.sqrt(self.min_pixels / pixels), math.ceil
        else:
            return width, height
        width, height = max(1, whole(width * scale)), max(1, whole(height * scale))
        return min(width, MAX_ASPECT_RATIO * height), min(height, MAX_ASPECT_RATIO * width)

    def resized(self, image: Image.Image) -> Image.Image:
        """An RGB image resized by [`fit`]; the same object if the size does not change."""
        size = self.fit(*image.size)
        # Bicubic, as Qwen's processors do.
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class FittedImage:
    """A picture ready for training: RGB, upright, within the limits."""

    source: bytes
    """The original file; for a PIL image, a PNG of it."""
    data: bytes
    """The file to train on: the source if nothing changed, otherwise a PNG."""
    before: tuple[int, int]
    """Width and height, upright."""
    after: tuple[int, int]


def rgb_image(value: Any, folders: Sequence[Path] = ()) -> Image.Image:
    """
    Read and check one picture as [`fit_image`] does, but without resizing it.

    Args:
        value (`Any`), folders (`Sequence[Path]`, *optional*):
            As for [`fit_image`].

    Returns:
        `PIL.Image.Image`: RGB and upright, with white for transparent areas. Raises [`BadRow`].
    """
    return _decoded(value, folders)[2]


def fit_image(
    value: Any, limits: ImageLimits | None = None, folders: Sequence[Path] = (), allow_remote: bool = False
) -> FittedImage:
    """
    Read, check and resize one picture. Nothing is decoded before the size in its header has been checked.

    Args:
        value (`Any`):
            An undecoded picture of [`~datasets.Dataset`] (a dictionary with `bytes` and `path`; from JSON, the bytes
            may be base64 text), a path, a `file:` or `data:` URI, an address, a file's bytes or a PIL image.
        limits ([`ImageLimits`], *optional*):
            Limits for its number of pixels; no limits by default.
        folders (`Sequence[Path]`, *optional*):
            Folders to search for a relative path.
        allow_remote (`bool`, *optional*, defaults to `False`):
            Fetch an address (`http:` or `https:`). Otherwise a picture with an address counts as missing.

    Returns:
        [`FittedImage`]. Raises [`BadRow`] for a picture that is missing, unreadable, huge or narrow.
    """
    source, image, upright = _decoded(value, folders, allow_remote)
    resized = (limits or ImageLimits()).resized(upright)
    return FittedImage(source, source if resized is image else _png(resized), upright.size, resized.size)


def _decoded(
    value: Any, folders: Sequence[Path], allow_remote: bool = False
) -> tuple[bytes, Image.Image, Image.Image]:
    """
    A picture's file, the decoded picture, and the picture as upright RGB. The latter two are the same object if the
    picture is upright RGB already.
    """
    if isinstance(value, Image.Image):
        _check_size(*value.size)
        try:
            value = _png(_rgb(value))
        except Exception as error:  # the image may be open, but not read yet
            raise BadRow("unreadable image", f"{type(error).__name__}: {error}") from error
    source = _read(value, folders, allow_remote)
    if not source:
        raise BadRow("empty image", "a file of 0 bytes")
    try:
        image = Image.open(io.BytesIO(source), formats=FILE_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadRow("huge image", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadRow("unreadable image", f"none of {', '.join(FILE_FORMATS)}, or without width or height") from error
    except Exception as error:  # a decoder may raise anything on a file that was made to break it
        raise BadRow("unreadable image", f"{type(error).__name__}: {error}") from error
    _check_size(*image.size)
    try:
        image.load()
        return source, image, _rgb(image)
    except Exception as error:
        raise BadRow("unreadable image", f"{type(error).__name__}: {error}") from error


def _read(value: Any, folders: Sequence[Path], allow_remote: bool) -> bytes:
    """The bytes of a picture's file."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            data = value["bytes"]
            return from_base64(data) if isinstance(data, str) else _as_bytes(data)
        value = value.get("path")
    if not isinstance(value, str | Path):
        return _as_bytes(value)
    scheme, colon, rest = str(value).partition(":")
    scheme = scheme.lower() if colon else ""
    if scheme in ("http", "https"):
        if not allow_remote:
            raise BadRow("missing image", f"{_start(value)} is an address, which `allow_remote_images` would fetch")
        return fetch(str(value), MAX_FILE_BYTES)
    if scheme == "data":
        kind, _, data = rest.partition(",")
        return from_base64(data) if kind.lower().endswith(";base64") else unquote(data, "latin-1").encode("latin-1")
    return _read_file(unquote(rest).removeprefix("//") if scheme == "file" else str(value), folders)


def _read_file(path: str, folders: Sequence[Path]) -> bytes:
    for candidate in (Path(path), *(folder / path for folder in folders)):
        # `Path.is_file` raises for a name that is too long, such as a whole file in base64. `os.path.isfile` does not.
        if path and candidate.is_absolute() and os.path.isfile(candidate):
            try:
                size = candidate.stat().st_size
                if size > MAX_FILE_BYTES:
                    raise BadRow("huge image", f"{path!r} has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
                return candidate.read_bytes()
            except OSError as error:
                raise BadRow("missing image", str(error)) from error
    raise BadRow("missing image", f"no file {_start(path)}")


def from_base64(text: str) -> bytes:
    """The bytes of a base64 text, which may have line breaks. Raises [`BadRow`] for any other text."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # `ValueError` for characters that are not ASCII
        raise BadRow("unreadable image", f"{_start(text)} is no base64: {error}") from error


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise BadRow("missing image", f"neither bytes nor a path: {_start(value)}")


def _start(value: Any) -> str:
    """The first characters, for an error."""
    return repr(str(value) if isinstance(value, Path) else value)[:200]


def _check_size(width: int, height: int) -> None:
    if width * height == 0:
        raise BadRow("empty image", f"{width}×{height} pixels")
    if width * height > MAX_SOURCE_PIXELS:
        raise BadRow("huge image", f"{width}×{height} pixels, more than {MAX_SOURCE_PIXELS:,}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadRow("narrow image", f"{width}×{height} pixels, sides further apart than {MAX_ASPECT_RATIO} to 1")


def _rgb(image: Image.Image) -> Image.Image:
    """The image itself if it is upright RGB."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # 16 bits of grey; `convert` would cut values off at 255
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} does not say which number is white")
    if image.has_transparency_data:  # `convert("RGB")` makes transparent areas black, like the ink on them
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image)
        image = paper
    return image if image.mode == "RGB" else image.convert("RGB")


def _png(image: Image.Image) -> bytes:
    """A PNG file with fast, weak compression: the files live in a cache."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
