"""The picture of a problem: a quadrilateral with one length written beside each side."""

import random
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont


IMAGE_SIZE = 56
"""Side of the square picture in pixels: with patches of 14 merged 2×2, Qwen2.5-VL sees it as 4 visual tokens."""

# Each label lies well inside one 28×28 merged patch, so that one visual token carries one length. Corners at the
# middle of the picture's edges would run the sides through the labels; 0.27 keeps them apart.
CORNER_DISTANCE = 0.27
LABEL_CENTRES = ((0.78, 0.22), (0.78, 0.78), (0.22, 0.78), (0.22, 0.22))
LABEL_JITTER = 0.5
FONT_SIZE = 15


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=FONT_SIZE)


def draw_quadrilateral(lengths: Sequence[int], rng: random.Random) -> Image.Image:
    """
    Draw the quadrilateral ABCD, A at the top and the corners clockwise, with the length of each side beside it.

    Args:
        lengths (`Sequence[int]` of length 4):
            Lengths of AB, BC, CD and DA, each one digit. The drawing is not to scale.
        rng (`random.Random`):
            Moves every label by up to half a pixel in each direction.

    Returns:
        [`~PIL.Image.Image`]: RGB picture of 56×56 pixels, black on white.
    """
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    canvas = ImageDraw.Draw(image)
    near, middle, far = (IMAGE_SIZE * (0.5 + offset) for offset in (-CORNER_DISTANCE, 0.0, CORNER_DISTANCE))
    canvas.polygon([(middle, near), (far, middle), (middle, far), (near, middle)], outline="black")
    for length, (x, y) in zip(lengths, LABEL_CENTRES, strict=True):
        position = tuple(IMAGE_SIZE * z + rng.uniform(-LABEL_JITTER, LABEL_JITTER) for z in (x, y))
        canvas.text(position, str(length), fill="black", font=_font(), anchor="mm")
    return image
