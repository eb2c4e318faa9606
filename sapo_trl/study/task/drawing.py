"""The picture of a problem: four cells with a number each."""

import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ...embedded.drawing import IMAGE_SIZE, LABEL_JITTER, _font


# Each cell is one 28×28 merged patch, one visual token.
CELL_CENTRES = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))


def draw_cells(numbers: Sequence[int], rng: random.Random) -> Image.Image:
    """
    Draw the cells A and B above C and D, with the number of each.

    Args:
        numbers (`Sequence[int]` of length 4):
            Numbers of A, B, C and D, each one digit.
        rng (`random.Random`):
            Moves every number by up to half a pixel in each direction.

    Returns:
        [`~PIL.Image.Image`]: RGB picture of 56×56 pixels, black on white.
    """
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, IMAGE_SIZE - 1, IMAGE_SIZE - 1), outline="black")
    for number, (x, y) in zip(numbers, CELL_CENTRES, strict=True):
        position = tuple(IMAGE_SIZE * z + rng.uniform(-LABEL_JITTER, LABEL_JITTER) for z in (x, y))
        canvas.text(position, str(number), fill="black", font=_font(), anchor="mm")
    return image
