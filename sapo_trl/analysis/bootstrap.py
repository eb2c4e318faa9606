"""Percentile bands of ratios of sums, by drawing clusters with replacement."""

from __future__ import annotations

import numpy as np


def ratio_bands(
    numerators: np.ndarray, denominators: np.ndarray, confidence: float, num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    Bootstrap `sum(numerators) / sum(denominators)` over clusters.

    Drawing `R` clusters with replacement is drawing how often each counts, from a multinomial distribution; sums over
    a resample are then a product of matrices.

    Args:
        numerators (`np.ndarray`): float64 `(R, Q)`, each cluster's part of `Q` numerators.
        denominators (`np.ndarray`): float64 `(R, Q)`.
        confidence (`float`): of the bands, in (0, 1).
        num_resamples (`int`): draws.
        seed (`int`): of the draws.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: lower and upper ends, float64 `(Q,)`. Resamples whose denominator is 0 do not
        count; NaN if none does.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` must lie in (0, 1), got {confidence}.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1, got {num_resamples}.")
    clusters, generator = len(numerators), np.random.default_rng(seed)
    # In pieces of about 32 MB, for runs with hundreds of thousands of responses.
    piece = max(1, 4_000_000 // max(clusters, 1))
    ratios = []
    for start in range(0, num_resamples, piece):
        size = min(piece, num_resamples - start)
        counts = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=size).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append((counts @ numerators) / (counts @ denominators))
    values = np.concatenate(ratios)
    values[~np.isfinite(values)] = np.nan
    known = ~np.isnan(values).all(axis=0)
    low, high = np.full((2, values.shape[1]), np.nan)
    if known.any():
        tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        low[known], high[known] = np.nanquantile(values[:, known], tails, axis=0)
    return low, high
