"""Metrics with bootstrap intervals: avg@k and pass@k of repeated generations, and a benchmark's own metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln

from ..statistics import Interval, exact_interval, percentile_interval, ratio_bands
from .benchmark import Aggregate, Result, mean_accuracy


CONFIDENCE = 0.95
RESAMPLES = 1000


def pass_at_k(correct: np.ndarray, n: int, k: int) -> np.ndarray:
    """
    Probability that at least one of `k` generations is right: the unbiased estimate from `n` generations.

    With `c` right generations it is `1 - C(n - c, k) / C(n, k)` (https://huggingface.co/papers/2107.03374). It is
    computed with logarithms, because the binomials are too large.

    Args:
        correct (`np.ndarray`): numbers `c` of right generations, each in `0..n`.
        n (`int`): number of generations.
        k (`int`): in `1..n`.

    Returns:
        `np.ndarray`: float64 of `correct`'s shape, in [0, 1].
    """
    if not 1 <= k <= n:
        raise ValueError(f"`k` must lie between 1 and n={n}, got {k}.")
    wrong = n - np.asarray(correct, dtype=np.float64)
    enough = wrong >= k
    # log C(n - c, k) - log C(n, k); k! cancels. If fewer than k generations are wrong, the first binomial is 0.
    kept = np.where(enough, wrong, k)
    log_ratio = gammaln(kept + 1) - gammaln(kept - k + 1) - gammaln(n + 1) + gammaln(n - k + 1)
    # Clip at 0, because the logarithms of equal binomials may differ in the last digit.
    return np.where(enough, np.clip(-np.expm1(log_ratio), 0.0, 1.0), 1.0)


def pass_counts(n: int) -> list[int]:
    """The reported `k` of pass@k: powers of two up to `n`, and `n`."""
    return sorted({2**power for power in range(n.bit_length())} | {n}) if n > 0 else []


def repeated_metrics(groups: Sequence[Sequence[Sequence[float]]], seed: int = 0) -> dict[str, Interval]:
    """
    avg@n and pass@k, with intervals over groups. The bootstrap draws all problems of a group together. If all scores
    are 0, or all are 1, every resample is the same, and the interval is the exact one for that many groups.

    Args:
        groups (`Sequence[Sequence[Sequence[float]]]`):
            scores of the `n` generations of each problem of each group, each score in [0, 1].
        seed (`int`, *optional*, defaults to `0`): seed of the resampling.

    Returns:
        `dict[str, Interval]`: `avg@n`, and `pass@k` for some `k` if `n` is more than 1. For pass@k a generation is
        right if its score is 1.
    """
    scores = [np.asarray(group, dtype=np.float64) for group in groups]  # each (problems of the group, n)
    n = scores[0].shape[1]
    columns = {f"avg@{n}": [group.mean(axis=1) for group in scores]}
    if n > 1:
        right = [(group == 1.0).sum(axis=1) for group in scores]
        columns |= {f"pass@{k}": [pass_at_k(counts, n, k) for counts in right] for k in pass_counts(n)}
    numerators = np.array([[values.sum() for values in column] for column in columns.values()]).T
    sizes = np.array([[len(group)] for group in scores], dtype=np.float64)
    denominators = np.repeat(sizes, len(columns), axis=1)
    low, high = ratio_bands(numerators, denominators, CONFIDENCE, RESAMPLES, seed)
    values = numerators.sum(axis=0) / denominators.sum(axis=0)
    found = {name: Interval(float(values[i]), float(low[i]), float(high[i])) for i, name in enumerate(columns)}
    return {name: _with_width(interval, len(groups)) for name, interval in found.items()}


def benchmark_metrics(
    generations: Sequence[Sequence[Sequence[Result]]], aggregate: Aggregate, seed: int = 0
) -> dict[str, Interval]:
    """
    A benchmark's metrics, averaged over generations, with intervals over groups.

    A metric other than the accuracy has no interval (NaN) if all resamples agree: they tell nothing about its error.

    A metric such as the worst case over variants is not a mean. It is computed as the benchmark defines it, from one
    generation of each problem. Then it is averaged over repetitions of the whole benchmark.

    Args:
        generations (`Sequence[Sequence[Sequence[Result]]]`):
            results of the problems of each group, for each generation. All generations have the same groups.
        aggregate (`Aggregate`): the benchmark's aggregation.
        seed (`int`, *optional*, defaults to `0`): seed of the resampling.

    Returns:
        `dict[str, Interval]`: metrics by the names from `aggregate`.
    """
    if aggregate is mean_accuracy:  # the same result, computed faster with matrices
        scores = [
            [[result.correct for result in repeated] for repeated in zip(*group, strict=True)]
            for group in zip(*generations, strict=True)
        ]
        return {"accuracy": next(iter(repeated_metrics(scores, seed).values()))}

    def averaged(chosen: Sequence[int]) -> dict[str, float]:
        found = [aggregate([groups[i] for i in chosen]) for groups in generations]
        return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}

    size = len(generations[0])
    values = averaged(range(size))
    rng = np.random.default_rng(seed)
    resampled = [averaged(rng.integers(size, size=size)) for _ in range(RESAMPLES)]
    intervals = {}
    for name, value in values.items():
        # A resample may lack all questions of a metric, such as a rare category.
        drawn = np.array([metrics.get(name, np.nan) for metrics in resampled])
        low, high = map(float, percentile_interval(drawn, CONFIDENCE))
        intervals[name] = Interval(value, low, high) if low < high else Interval(value, math.nan, math.nan)
    return intervals


def _with_width(interval: Interval, groups: int) -> Interval:
    """The exact interval for a score that is 0, or 1, in all groups; any other interval as it is."""
    if interval.value not in (0.0, 1.0):
        return interval
    return Interval(interval.value, *exact_interval(round(interval.value) * groups, groups, CONFIDENCE))
