"""
Statistics of a study's runs.

Runs are compared without pairs. A run's seed decides the order of problems and the sampling, and after a few rollouts
runs of equal seeds have nothing in common. Runs of one world share the policy and the problems that they start from:
worlds are blocks, and every comparison is made within them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from ..statistics import Interval, wilson_interval


Scores = Mapping[int, Sequence[float]]
"""The scores of some runs, by block."""
Side = Literal["two", "greater", "less"]


@dataclass(frozen=True)
class Contrast:
    """
    A weighted sum of means.

    Args:
        interval ([`~sapo_trl.statistics.Interval`]): the sum with its interval.
        error (`float`): its standard error.
        freedom (`float`): degrees of freedom.
    """

    interval: Interval
    error: float
    freedom: float

    def p_value(self, side: Side) -> float:
        """The p-value of a test against 0."""
        if self.error == 0:  # scores without any spread: there is nothing to test against
            return 1.0 if self.interval.value == 0 else float("nan")
        return _tail(self.interval.value / self.error, self.freedom, side)


def blocked_contrast(cells: Sequence[tuple[float, Scores]], confidence: float = 0.95) -> Contrast:
    """
    A weighted sum of cells' means, with a Student interval in which every cell and block has its own variance.

    A cell's mean is the mean of its blocks' means. Degrees of freedom are Welch's and Satterthwaite's. The interval is
    about these blocks: it does not generalise to other worlds.

    Args:
        cells (`Sequence[tuple[float, Scores]]`): each cell's weight and its scores.
        confidence (`float`, *optional*, defaults to `0.95`): in (0, 1).

    Returns:
        [`Contrast`]. Raises `ValueError` if a block has fewer than two scores, or if cells have other blocks.
    """
    blocks = sorted(cells[0][1])
    value, parts = 0.0, []
    for weight, scores in cells:
        if sorted(scores) != blocks:
            raise ValueError(f"Every cell must have the same blocks, got {blocks} and {sorted(scores)}.")
        for block in blocks:
            row = _checked(scores[block])
            if len(row) < 2:
                raise ValueError(f"Block {block} has {len(row)} score: at least 2 are needed to see their spread.")
            share = weight / len(blocks)
            value += share * row.mean()
            parts.append((share**2 * row.var(ddof=1) / len(row), len(row) - 1))
    variances, freedoms = np.array(parts, dtype=float).T
    variance = variances.sum()
    if variance == 0:
        return Contrast(Interval(float(value), float(value), float(value)), 0.0, float(freedoms.sum()))
    freedom = variance**2 / (variances**2 / freedoms).sum()
    reach = stats.t.ppf((1 + confidence) / 2, freedom) * variance**0.5
    return Contrast(
        Interval(float(value), float(value - reach), float(value + reach)), float(variance**0.5), float(freedom)
    )


def trend_weights(numbers: Sequence[float]) -> list[float]:
    """Weights of a contrast of cells' means that is the slope of a straight line over these numbers."""
    centred = np.asarray(numbers, dtype=float) - np.mean(numbers)
    if not (centred != 0).any():
        raise ValueError(f"A trend needs different numbers, got {list(numbers)}.")
    return (centred / (centred**2).sum()).tolist()


def permutation_p_value(ours: Mapping[int, Sequence[int]], theirs: Mapping[int, Sequence[int]], side: Side) -> float:
    """
    The exact permutation test of a difference between two cells of counts, with labels exchanged within blocks.

    All permutations are counted, none is drawn: sums of counts are whole numbers, so that a table of the number of
    ways to reach each sum is enough.

    Args:
        ours (`Mapping[int, Sequence[int]]`): counts of right answers, by block.
        theirs (`Mapping[int, Sequence[int]]`): the same of the other cell.
        side (`str`): `"two"`, `"greater"` (ours is larger) or `"less"`.

    Returns:
        `float`. Raises `ValueError` unless all blocks of both cells have the same number of counts.
    """
    sizes = {len(row) for row in (*ours.values(), *theirs.values())}
    if ours.keys() != theirs.keys() or len(sizes) != 1:
        raise ValueError("A permutation test within blocks needs equally many runs of both cells in every block.")
    (size,) = sizes
    ways = np.ones(1)
    for block, row in ours.items():
        ways = np.convolve(ways, _ways([*row, *theirs[block]], size))
    chances = ways / ways.sum()
    sums = np.arange(len(ways))
    found, middle = sum(map(sum, ours.values())), (chances * sums).sum()
    if side == "greater":
        extreme = sums >= found
    elif side == "less":
        extreme = sums <= found
    else:
        extreme = np.abs(sums - middle) >= abs(found - middle) - 1e-6
    return float(min(chances[extreme].sum(), 1.0))


def _ways(counts: Sequence[int], size: int) -> np.ndarray:
    """Number of ways to choose `size` of the counts, by their sum."""
    if any(count < 0 or count != int(count) for count in counts):
        raise ValueError(f"Counts must be whole numbers from 0 on, got {list(counts)}.")
    ways = np.zeros((size + 1, int(sum(counts)) + 1))
    ways[0, 0] = 1
    for count in map(int, counts):
        for chosen in range(size, 0, -1):
            ways[chosen, count:] += ways[chosen - 1, : ways.shape[1] - count]
    return ways[size]


def share_difference(ours: tuple[int, int], theirs: tuple[int, int], confidence: float = 0.95) -> Interval:
    """
    Difference of two shares with Newcombe's interval, which is made from Wilson's and stays inside [-1, 1].

    Args:
        ours (`tuple[int, int]`): successes and trials.
        theirs (`tuple[int, int]`): the same of the other cell.
        confidence (`float`, *optional*, defaults to `0.95`): in (0, 1).
    """
    (p, low, high), (q, q_low, q_high) = (_wilson(*pair, confidence) for pair in (ours, theirs))
    value = p - q
    below, above = ((p - low) ** 2 + (q_high - q) ** 2) ** 0.5, ((high - p) ** 2 + (q - q_low) ** 2) ** 0.5
    return Interval(value, max(value - below, -1.0), min(value + above, 1.0))


def fisher_p_value(ours: tuple[int, int], theirs: tuple[int, int], side: Side) -> float:
    """Fisher's exact test of two shares, given as successes and trials."""
    table = [[k, n - k] for k, n in (ours, theirs)]
    return float(stats.fisher_exact(table, alternative="two-sided" if side == "two" else side).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    P-values of a family of tests, adjusted by Holm's method. A test without a p-value (NaN) counts as 1.

    Args:
        p_values (`Sequence[float]`): in [0, 1], or NaN.
    """
    known = np.nan_to_num(np.asarray(p_values, dtype=float), nan=1.0)
    order = np.argsort(known, kind="stable")
    adjusted = np.empty_like(known)
    factors = np.arange(len(known), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(known[order] * factors), 1.0)
    return adjusted.tolist()


def median_interval(scores: Sequence[float], confidence: float = 0.95) -> Interval:
    """
    The median with the narrowest interval between two of the scores, at the same rank from both ends, that covers the
    true median at least this often, for any distribution. With fewer than six scores there is none at 95 %: then its
    ends are NaN.

    Args:
        scores (`Sequence[float]`): one for each run.
        confidence (`float`, *optional*, defaults to `0.95`): in (0, 1).
    """
    row = np.sort(_checked(scores))
    count = len(row)
    rank = int(stats.binom.ppf((1 - confidence) / 2, count, 0.5))
    while rank > 0 and 2 * stats.binom.cdf(rank - 1, count, 0.5) > 1 - confidence + 1e-12:
        rank -= 1
    median = float(np.median(row))
    if rank < 1:
        return Interval(median, float("nan"), float("nan"))
    return Interval(median, float(row[rank - 1]), float(row[count - rank]))


def _wilson(successes: int, trials: int, confidence: float) -> tuple[float, float, float]:
    return successes / trials, *wilson_interval(successes, trials, confidence)


def _tail(statistic: float, freedom: float, side: Side) -> float:
    if side == "greater":
        return float(stats.t.sf(statistic, freedom))
    if side == "less":
        return float(stats.t.cdf(statistic, freedom))
    return float(2 * stats.t.sf(abs(statistic), freedom))


def _checked(scores: Sequence[float]) -> np.ndarray:
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 1 or scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(f"Scores must be a non-empty list of finite numbers, got {scores.tolist()}.")
    return scores
