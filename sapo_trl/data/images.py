"""Pictures of a data set: checked before they are decoded, brought to RGB, resized to limits in pixels."""

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


# Pillow finds the format by content. It would also run Ghostscript on PostScript, and has decoders that few test.
FILE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

MAX_SOURCE_PIXELS = 89_478_485
"""Width times height that is still decoded: a quarter of a GiB, where Pillow starts to warn of decompression bombs."""

MAX_FILE_BYTES = 8 * MAX_SOURCE_PIXELS
"""A file of 16-bit RGBA without compression has no more. A larger one is not read."""

MAX_ASPECT_RATIO = 200
"""Long side by short side. Qwen's image processors refuse what is narrower, in the middle of a training."""

_ORIENTATION = 0x0112  # EXIF


@dataclass(frozen=True)
class ImageLimits:
    """
    How many pixels a picture may have. Geometry3K recipes publish 262,144 (512²) to 4,194,304 (2048²).

    Args:
        min_pixels (`int`, *optional*): smaller pictures are enlarged to it.
        max_pixels (`int`, *optional*): larger pictures are reduced to it; at least 200.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self):
        if self.min_pixels is not None and self.min_pixels < 1:
            raise ValueError(f"`min_pixels` must be at least 1, got {self.min_pixels}.")
        if self.max_pixels is not None and self.max_pixels < MAX_ASPECT_RATIO:  # the narrowest one has a pixel across
            raise ValueError(f"`max_pixels` must be at least {MAX_ASPECT_RATIO}, got {self.max_pixels}.")
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:
            raise ValueError(f"`min_pixels` ({self.min_pixels}) must not exceed `max_pixels` ({self.max_pixels}).")

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """
        The size for a picture of `width` by `height`: its own if that is within the limits, else the nearest one of
        the same shape. Whole pixels are rounded towards the inside of the limits, and the long side is cut to
        `MAX_ASPECT_RATIO` times the short one where rounding would make a narrow picture too narrow.
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
        """An RGB image in the size that [`fit`] gives; itself if that is its own."""
        size = self.fit(*image.size)
        # Bicubic, as Qwen's processors do.
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class FittedImage:
    """A picture that can be trained on: RGB, upright, within the limits."""

    source: bytes
    """The file it came from; PNG of a PIL image."""
    data: bytes
    """The file to train on: the source, if there was nothing to change, else PNG."""
    before: tuple[int, int]
    """Width and height, upright."""
    after: tuple[int, int]


def rgb_image(value: Any, folders: Sequence[Path] = ()) -> Image.Image:
    """
    Read and check one picture: as [`fit_image`], without limits and in memory.

    Args:
        value (`Any`), folders (`Sequence[Path]`, *optional*):
            As for [`fit_image`].

    Returns:
        `PIL.Image.Image`: RGB and upright, white where it was transparent. Raises [`BadRow`].
    """
    return _decoded(value, folders)[2]


def fit_image(
    value: Any, limits: ImageLimits | None = None, folders: Sequence[Path] = (), allow_remote: bool = False
) -> FittedImage:
    """
    Read, check and resize one picture. Nothing is decoded before the size in its header has been checked.

    Args:
        value (`Any`):
            An undecoded picture of [`~datasets.Dataset`] (a dictionary of `bytes` and `path`; the bytes may be base64
            text, as JSON has them), a path, a `file:` or `data:` URI, an address, a file's bytes or a PIL image.
        limits ([`ImageLimits`], *optional*):
            Its limits; none by default.
        folders (`Sequence[Path]`, *optional*):
            Where relative paths are looked up.
        allow_remote (`bool`, *optional*, defaults to `False`):
            Whether an address (`http:` or `https:`) is fetched. Otherwise the picture counts as missing.

    Returns:
        [`FittedImage`]. Raises [`BadRow`] for a picture that is missing, unreadable, huge or narrow.
    """
    source, image, upright = _decoded(value, folders, allow_remote)
    resized = (limits or ImageLimits()).resized(upright)
    return FittedImage(source, source if resized is image else _png(resized), upright.size, resized.size)


def _decoded(
    value: Any, folders: Sequence[Path], allow_remote: bool = False
) -> tuple[bytes, Image.Image, Image.Image]:
    """A picture's file, the picture in it, and the same as upright RGB: the very same object if it is that already."""
    if isinstance(value, Image.Image):
        _check_size(*value.size)
        try:
            value = _png(_rgb(value))
        except Exception as error:  # it may be open, but not read yet
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
    except Exception as error:  # what a decoder raises on a file made to break it is anyone's guess
        raise BadRow("unreadable image", f"{type(error).__name__}: {error}") from error
    _check_size(*image.size)
    try:
        image.load()
        return source, image, _rgb(image)
    except Exception as error:
        raise BadRow("unreadable image", f"{type(error).__name__}: {error}") from error


def _read(value: Any, folders: Sequence[Path], allow_remote: bool) -> bytes:
    """The bytes of a picture's file, wherever they are."""
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
        # `os.path.isfile`, because `Path.is_file` raises for a name that is too long, such as a whole file in base64.
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
    """The bytes that a base64 text stands for, line breaks left out. Raises [`BadRow`] for another text."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # the latter for letters that are not ASCII
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
    if image.mode.startswith("I;16"):  # 16 bits of grey, which `convert` would cut off at 255
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} does not say which number is white")
    if image.has_transparency_data:  # else what is transparent turns black, as does the ink on it
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image)
        image = paper
    return image if image.mode == "RGB" else image.convert("RGB")


def _png(image: Image.Image) -> bytes:
    """Written fast rather than small: files live in a cache."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
