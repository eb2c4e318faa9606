"""Estimates with their intervals: shared by evaluation, analyses and studies."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True)
class Interval:
    """
    An estimate and its interval.

    Args:
        value (`float`): the estimate.
        low (`float`): lower end; the estimate itself if there is one sample only.
        high (`float`): upper end.
    """

    value: float
    low: float
    high: float


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson's score interval of a proportion: unlike mean ± 2 standard errors, it stays inside [0, 1].

    Raises:
        ValueError: unless `trials >= 1` and `0 <= successes <= trials`.
    """
    return _proportion_interval(successes, trials, confidence, "wilson")


def exact_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    The exact (Clopper-Pearson) interval of a proportion. It has a width even if all trials agree.

    Raises:
        ValueError: unless `trials >= 1` and `0 <= successes <= trials`.
    """
    return _proportion_interval(successes, trials, confidence, "exact")


def percentile_interval(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """
    Ends of the percentile-bootstrap interval.

    Args:
        values (`np.ndarray`): float64 `(R, ...)`, an estimate from each of `R` resamples; NaN where it has none.
        confidence (`float`): in (0, 1).

    Returns:
        `tuple[np.ndarray, np.ndarray]`: lower and upper ends, float64 `(...)`; NaN where no resample has an estimate.

    Raises:
        ValueError: if `confidence` is out of range.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` must lie in (0, 1), got {confidence}.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        low, high = np.nanquantile(values, ((1 - confidence) / 2, (1 + confidence) / 2), axis=0)
    return low, high


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
    return percentile_interval(values, confidence)


def _proportion_interval(successes: int, trials: int, confidence: float, method: str) -> tuple[float, float]:
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} of trials={trials}: need trials >= 1 and 0 <= successes <= trials.")
    interval = binomtest(successes, trials).proportion_ci(confidence, method=method)
    return float(interval.low), float(interval.high)
