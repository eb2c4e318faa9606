"""Coloured tokens for notebooks: a piece of HTML with one response, where a whole page would be too much."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.colors import Normalize, to_rgb

from ..foreign_text import visible
from ..plots import SEGMENT_COLOURS
from .page import colour_scales


# On white in a dark notebook too: the colours belong to the light theme.
_BOX = "font-family:monospace;line-height:1.8;white-space:pre-wrap;background:#fff;color:#000;padding:.3em .6em"


def token_html(
    tokens: Sequence[str],
    segment_ids: Sequence[int],
    numbers: Sequence[float] | None = None,
    *,
    limits: tuple[float, float] | None = None,
    title: str = "",
) -> Markup:
    """
    One response as HTML: a bar after each token that ends a segment, and colours for numbers, or for segments where
    there are no numbers. The text that appears when the pointer rests on a token has both. Line breaks are shown as
    `↵`. Invisible controls, which could turn the text around, are shown by their numbers: `⟨U+202E⟩`.

    Args:
        tokens (`Sequence[str]`): texts of the tokens. They are escaped.
        segment_ids (`Sequence[int]`): segment of each token, `-1` for a token of none.
        numbers (`Sequence[float]`, *optional*):
            number of each token, such as its entropy, value or advantage; finite. From yellow to blue; if some are
            negative, those are orange, zero is white, and positive ones are blue.
        limits (`tuple[float, float]`, *optional*):
            numbers at the two ends of the colours, to compare responses; by default the extremes of `numbers`.
        title (`str`, *optional*): what to write above.

    Returns:
        [`~markupsafe.Markup`]: for `IPython.display.HTML`.

    Raises:
        ValueError: if there are not as many segment ids, or numbers, as tokens.
    """
    for name, given in (("segment_ids", segment_ids), ("numbers", numbers)):
        if given is not None and len(given) != len(tokens):
            raise ValueError(f"`{name}` must have one entry a token, {len(tokens)}, got {len(given)}.")
    colours = [_segment_colour(segment) for segment in segment_ids] if numbers is None else _colours(numbers, limits)
    spans = []
    for place, (token, colour) in enumerate(zip(tokens, colours, strict=True)):
        hint = f"segment {segment_ids[place]}" + ("" if numbers is None else f", {numbers[place]:.3g}")
        style = f"background:{colour};color:{_readable_on(colour)}"
        if place + 1 == len(tokens) or segment_ids[place + 1] != segment_ids[place]:
            style += ";border-right:2px solid #000;margin-right:2px"
        text = visible(token).replace("\n", "↵")
        spans.append(Markup('<span style="{}" title="{}">{}</span>').format(style, hint, text))
        if "\n" in token:
            spans.append(Markup("<br>"))
    heading = (
        Markup('<div style="font-family:sans-serif;line-height:1.4">{}</div>').format(visible(title)) if title else ""
    )
    return Markup('<div style="{}">{}{}</div>').format(_BOX, heading, Markup("").join(spans))


def _segment_colour(segment: int) -> str:
    return "#ffffff" if segment < 0 else SEGMENT_COLOURS[segment % len(SEGMENT_COLOURS)]


def _colours(numbers: Sequence[float], limits: tuple[float, float] | None) -> list[str]:
    low, high = limits or (min(numbers, default=0.0), max(numbers, default=0.0))
    kind = "sequential"
    if low < 0:  # zero has the middle colour
        kind, high = "diverging", max(-low, high)
        low = -high
    scale = colour_scales()["light"][kind]
    share = Normalize(low, high, clip=True)
    return [scale[round(float(share(number)) * (len(scale) - 1))] for number in numbers]


def _readable_on(colour: str) -> str:
    """Black or white, whichever contrasts more as web accessibility measures it: at least 4.5 to 1."""
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour))
    return "#000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#fff"
