"""
How often cuts fall on true borders between steps, and how often chance would put them there.

A cut or a border at position `t` means: a segment or step ends with the response's token `t`. The last token ends both
by definition; it is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pandas as pd
from scipy.stats import norm

from ..statistics import ratio_bands


@dataclass(frozen=True)
class BorderAgreement:
    """
    Cuts beside borders, summed over responses.

    Chance is the same number of cuts in each response at random places among its inner positions: the number of hits
    is then hypergeometric with mean `cuts * borders / positions`.

    Args:
        hits (`int`): cuts on a border.
        cuts (`int`): inner cuts of all responses.
        borders (`int`): inner borders of all responses.
        expected_hits (`float`): by chance.
        p_value (`float`):
            probability of at least so many hits by chance, by the normal approximation to the sum of the responses'
            hypergeometric counts, with continuity correction; NaN if chance leaves no choice.
        intervals (`dict[str, tuple[float, float]]`):
            bootstrap intervals of `precision`, `recall` and `f1`, responses drawn with replacement.
        responses (`int`): that were used.
    """

    hits: int
    cuts: int
    borders: int
    expected_hits: float
    p_value: float
    intervals: dict[str, tuple[float, float]]
    responses: int

    @property
    def precision(self) -> float:
        """Share of the cuts that are on a border; NaN without cuts."""
        return _quotient(self.hits, self.cuts)

    @property
    def recall(self) -> float:
        """Share of the borders that have a cut; NaN without borders."""
        return _quotient(self.hits, self.borders)

    @property
    def f1(self) -> float:
        """Harmonic mean of the two; NaN with neither cuts nor borders."""
        return _quotient(2 * self.hits, self.cuts + self.borders)

    def table(self) -> pd.DataFrame:
        """One row per measure: `measure`, `value`, `low`, `high`, `chance`."""
        chance = {
            "precision": _quotient(self.expected_hits, self.cuts),
            "recall": _quotient(self.expected_hits, self.borders),
            "f1": _quotient(2 * self.expected_hits, self.cuts + self.borders),
        }
        rows = [
            {"measure": name, "value": getattr(self, name), "low": low, "high": high, "chance": chance[name]}
            for name, (low, high) in self.intervals.items()
        ]
        return pd.DataFrame(rows)


def border_agreement(
    cuts: Sequence[Sequence[int]],
    borders: Sequence[Sequence[int]],
    lengths: Sequence[int],
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> BorderAgreement:
    """
    Compare cuts with borders.

    Args:
        cuts (`Sequence[Sequence[int]]`):
            for each response, the positions of tokens that end a segment, in `0..length-1`, each once, in any order.
            The last token's position may be there and is ignored.
        borders (`Sequence[Sequence[int]]`): the same for true steps.
        lengths (`Sequence[int]`): tokens of each response.
        confidence (`float`, *optional*, defaults to `0.95`): of the intervals.
        num_resamples (`int`, *optional*, defaults to `2000`): bootstrap draws of responses.
        seed (`int`, *optional*, defaults to `0`): of the draws.

    Returns:
        [`BorderAgreement`]

    Raises:
        ValueError: if the three differ in length, or for a position out of range or named twice.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(cuts) == len(borders) == len(sizes) > 0:
        raise ValueError(
            "`cuts`, `borders` and `lengths` must have one entry per response and at least one, got "
            f"{len(cuts)}, {len(borders)} and {len(sizes)}."
        )
    cut_rows, cut_positions = _inner("cuts", cuts, sizes)
    border_rows, border_positions = _inner("borders", borders, sizes)
    stride = int(sizes.max()) + 1
    is_hit = np.isin(cut_rows * stride + cut_positions, border_rows * stride + border_positions)

    hits, num_cuts, num_borders = (
        np.bincount(rows, minlength=len(sizes)).astype(np.float64)
        for rows in (cut_rows[is_hit], cut_rows, border_rows)
    )
    slots = np.maximum(sizes - 1, 0).astype(np.float64)
    share = num_borders / np.maximum(slots, 1)
    expected = num_cuts * share
    variance = expected * (1 - share) * (slots - num_cuts) / np.maximum(slots - 1, 1)
    spread = float(variance.sum()) ** 0.5
    p_value = float(norm.sf((hits.sum() - 0.5 - expected.sum()) / spread)) if spread > 0 else float("nan")

    numerators = np.stack([hits, hits, 2 * hits], axis=1)
    denominators = np.stack([num_cuts, num_borders, num_cuts + num_borders], axis=1)
    low, high = ratio_bands(numerators, denominators, confidence, num_resamples, seed)
    return BorderAgreement(
        hits=int(hits.sum()),
        cuts=int(num_cuts.sum()),
        borders=int(num_borders.sum()),
        expected_hits=float(expected.sum()),
        p_value=p_value,
        intervals=dict(zip(("precision", "recall", "f1"), zip(low.tolist(), high.tolist(), strict=True), strict=True)),
        responses=len(sizes),
    )


def cuts_of(segment_ids: Sequence[int]) -> list[int]:
    """Positions of the tokens that end a segment but the last one, from a response's recorded `segment_ids`."""
    return np.flatnonzero(np.diff(np.asarray(segment_ids))).tolist()


def borders_of(tokens: Sequence[str], pattern: str) -> list[int]:
    """
    Positions of the tokens in which a match of a regular expression ends.

    Args:
        tokens (`Sequence[str]`): a response's recorded `tokens`.
        pattern (`str`): regular expression that ends a step, such as `r"\\n+"`.

    Returns:
        `list[int]`: in order, each once.
    """
    ends = np.array([0, *accumulate(len(token) for token in tokens)])
    characters = [match.end() - 1 for match in re.finditer(pattern, "".join(tokens)) if match.end() > match.start()]
    # The token that covers a character is the last one that starts at or before it.
    return np.unique(np.searchsorted(ends, np.array(characters, dtype=np.int64), side="right") - 1).tolist()


def _inner(name: str, positions: Sequence[Sequence[int]], sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([len(row) for row in positions], dtype=np.int64)
    rows = np.repeat(np.arange(len(sizes)), counts)
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(row, dtype=np.int64) for row in positions)])
    outside = (flat < 0) | (flat >= sizes[rows])
    if outside.any():
        index = int(outside.argmax())
        row = int(rows[index])
        raise ValueError(
            f"`{name}` of response {row} must lie in 0..{int(sizes[row]) - 1}, its tokens; got {int(flat[index])}."
        )
    keys = rows * (int(sizes.max()) + 1) + flat
    if len(np.unique(keys)) < len(keys):
        ordered = np.sort(keys)
        row = int(ordered[1:][ordered[1:] == ordered[:-1]][0] // (int(sizes.max()) + 1))
        raise ValueError(f"`{name}` of response {row} has a position twice: {list(positions[row])}.")
    inner = flat < sizes[rows] - 1
    return rows[inner], flat[inner]


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
