"""
Lift: how much more the value changes at tokens of high entropy than at all tokens.

The SAPO paper draws a Lift–q curve (Fig. 3, Eq. 12) to argue that high-entropy tokens are where outcomes are decided.
Its formula was not available to us. The definition below is our reading and should be cited as ours.

A *jump* is `|V(after a token) - V(before it)|`. `Lift(q)` is the mean jump over the share `q` of each response's
tokens with the highest entropy, divided by the mean jump over all tokens. A response of `m` tokens gives exactly `q *
m` tokens to the numerator, the last of them with the remaining fraction. Tokens of equal entropy share their mean
jump. So if entropies say nothing about jumps within responses, numerator and denominator have the same expectation.
Lift is then 1 up to chance, for any lengths of responses and sizes of jumps. `Lift(1)` is exactly 1.

Sums run over all responses before the division, so a response with more jumps has more weight. Tokens of a response
are not independent. Therefore bands draw responses with replacement, never tokens, and the test of a trend ranks
within responses. Neither can rule out a common cause: if entropies and jumps both fall along responses, there is lift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import page_trend_test

from ..recordings.reading import flatten
from ..statistics import ratio_bands


STAGES = ("early", "middle", "late")
SHARES = tuple(np.arange(1, 21) / 20)


@dataclass(frozen=True)
class LiftCurve:
    """
    A curve and its pointwise bands.

    Args:
        shares (`np.ndarray`): float64 `(Q,)`, in (0, 1].
        lift (`np.ndarray`): float64 `(Q,)`, NaN if nothing jumps.
        low (`np.ndarray`): float64 `(Q,)`, lower end of the band.
        high (`np.ndarray`): float64 `(Q,)`, upper end.
        responses (`int`): that were used.
        jumps (`int`): of all of them.
    """

    shares: np.ndarray
    lift: np.ndarray
    low: np.ndarray
    high: np.ndarray
    responses: int
    jumps: int


@dataclass(frozen=True)
class Trend:
    """
    Page's test for jumps that rise with entropy.

    Args:
        statistic (`float`): Page's L.
        p_value (`float`): one-sided; NaN without a response long enough.
        responses (`int`): that were used.
        bins (`int`): of entropy, in each response.
    """

    statistic: float
    p_value: float
    responses: int
    bins: int


def token_jumps(responses: pd.DataFrame) -> pd.DataFrame:
    """
    The critic's jump at every loss token that another one follows.

    `values[t]` is the value before token `t`, so the jump at `t` is `|values[t + 1] - values[t]|`. The last token is
    left out: after it the response is over, and no value of that state is recorded.

    Args:
        responses (`pd.DataFrame`):
            from [`~sapo_trl.analysis.read_responses`], with `step`, `entropies` and `values`. Recorded lists have loss
            tokens only.

    Returns:
        `pd.DataFrame`: one row per jump: `cluster` (row of `responses`), `step`, `entropy`, `jump`.

    Raises:
        ValueError: if no value differs from another, as in runs without a critic.
    """
    row, tokens = flatten(responses, ("entropies", "values"))
    followed = np.flatnonzero(row[1:] == row[:-1])
    jumps = np.abs(tokens["values"][followed + 1] - tokens["values"][followed])
    if not (jumps > 0).any():
        raise ValueError(
            "`values` never change within a response: this run has no critic that values every token, or no response "
            "of more than one token."
        )
    steps = responses["step"].to_numpy()
    return pd.DataFrame(
        {
            "cluster": row[followed],
            "step": steps[row[followed]],
            "entropy": tokens["entropies"][followed],
            "jump": jumps,
        }
    )


def valued_state_jumps(responses: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """
    Jumps between the valued states of consecutive segments, by Monte Carlo and by the critic, with the entropy at the
    cut between them: at the last token of the earlier segment.

    A Monte-Carlo value is a mean of few rewards. Its noise adds to jumps and draws Lift towards 1. The squared jump
    can be freed from the noise: in expectation, the squared difference of two independent estimates exceeds the
    squared difference of the true values by the sum of their variances. So `squared_jump`, with the squared standard
    errors taken off, is unbiased for the square of the true jump (and may be negative).

    Args:
        responses (`pd.DataFrame`): from [`~sapo_trl.analysis.read_responses`], with `segment_ids` and `entropies`.
        values (`pd.DataFrame`): from [`~sapo_trl.analysis.read_values`], of the same run.

    Returns:
        `pd.DataFrame`: one row per pair of states: `cluster` (row of `responses`), `step`, `entropy`, `jump` (Monte
        Carlo), `squared_jump`, `critic_jump`.

    Raises:
        ValueError: if no pair of states has a recorded response.
    """
    row, tokens = flatten(responses, ("segment_ids", "entropies"))
    cuts = pd.DataFrame({"cluster": row, "segment": tokens["segment_ids"].astype(np.int64)})
    cuts["entropy"] = tokens["entropies"]
    # The last token of each segment: lists are in order.
    cuts = cuts.drop_duplicates(["cluster", "segment"], keep="last")
    key = ["step", "process", "response"]
    clusters = responses[key].assign(cluster=np.arange(len(responses)))
    states = values.merge(clusters, on=key, validate="many_to_one")
    later = states.assign(segment=states["segment"] - 1)
    pairs = states.merge(later, on=["cluster", "segment"], suffixes=("", "_later"), validate="one_to_one")
    pairs = pairs.merge(cuts, on=["cluster", "segment"], validate="one_to_one").dropna(
        subset=["monte_carlo_value", "monte_carlo_value_later"]
    )
    if pairs.empty:
        raise ValueError(
            "no two consecutive states of a recorded response are valued: record the responses of the same rollouts "
            "(`SegmentationCallback(every=…, max_responses=…)`) that `ValueDiagnostics` examines."
        )
    difference = pairs["monte_carlo_value_later"] - pairs["monte_carlo_value"]
    noise = pairs["standard_error"] ** 2 + pairs["standard_error_later"] ** 2
    jumps = pairs[["cluster", "step", "entropy"]].assign(
        jump=difference.abs(),
        squared_jump=difference**2 - noise,
        critic_jump=(pairs["value_later"] - pairs["value"]).abs(),
    )
    return jumps.sort_values("cluster", kind="stable", ignore_index=True)


def stages(steps: pd.Series) -> pd.Series:
    """
    Name the third of the recorded steps that each step is in.

    Args:
        steps (`pd.Series`): of the jumps.

    Returns:
        `pd.Series`: `"early"`, `"middle"` or `"late"`; of two recorded steps the second is `"middle"`.
        Thirds are of the number of different steps, not of the jumps.
    """
    recorded = np.unique(steps)
    names = {
        step: name
        for name, part in zip(STAGES, np.array_split(recorded, len(STAGES)), strict=True)
        for step in part.tolist()
    }
    return steps.map(names)


def lift_curve(
    jumps: pd.DataFrame,
    column: str = "jump",
    shares: tuple[float, ...] = SHARES,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> LiftCurve:
    """
    Lift at some shares, see the module, with bootstrap bands over responses.

    Args:
        jumps (`pd.DataFrame`): from [`token_jumps`] or [`valued_state_jumps`].
        column (`str`, *optional*, defaults to `"jump"`): column of `jumps` to compare.
        shares (`tuple[float]`, *optional*, defaults to 0.05, 0.1, …, 1): of tokens, in (0, 1].
        confidence (`float`, *optional*, defaults to `0.95`): of each point's band.
        num_resamples (`int`, *optional*, defaults to `2000`): bootstrap draws of responses.
        seed (`int`, *optional*, defaults to `0`): of the draws.

    Returns:
        [`LiftCurve`]
    """
    wanted = np.asarray(shares, dtype=np.float64)
    if wanted.ndim != 1 or not ((wanted > 0) & (wanted <= 1)).all():
        raise ValueError(f"`shares` must be numbers in (0, 1], got {shares}.")
    table = _sorted(jumps, column)
    sums = share_sums(table, column, wanted)
    totals = share_sums(table, column, np.ones(1))
    denominators = wanted * totals
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = sums.sum(axis=0) / denominators.sum(axis=0)
    low, high = ratio_bands(sums, denominators, confidence, num_resamples, seed)
    return LiftCurve(wanted, lift, low, high, responses=len(sums), jumps=len(table))


def share_sums(table: pd.DataFrame, column: str, shares: np.ndarray) -> np.ndarray:
    """
    Sum each response's jumps over its tokens of highest entropy.

    Args:
        table (`pd.DataFrame`): jumps sorted by `cluster` and falling `entropy`.
        column (`str`): column to sum.
        shares (`np.ndarray`): float64 `(Q,)`, in (0, 1].

    Returns:
        `np.ndarray`: float64 `(R, Q)` for `R` responses with at least one jump, in order of `cluster`.
    """
    # Tokens of equal entropy have no order: each counts with the mean of all of them.
    values = table.groupby(["cluster", "entropy"], sort=False)[column].transform("mean").to_numpy(dtype=np.float64)
    cluster = table["cluster"].to_numpy()
    starts = np.flatnonzero(np.diff(cluster, prepend=cluster[:1] - 1))
    counts = np.diff(starts, append=len(cluster))
    cumulative = np.concatenate([[0.0], np.cumsum(values)])
    taken = shares * counts[:, None]
    whole = np.minimum(np.floor(taken).astype(np.int64), counts[:, None])
    ends = starts[:, None] + whole
    # The token that is cut in two; none is where all are taken.
    partial = np.where(whole < counts[:, None], values[np.minimum(ends, len(values) - 1)], 0.0)
    return cumulative[ends] - cumulative[starts][:, None] + (taken - whole) * partial


def trend_test(jumps: pd.DataFrame, column: str = "jump", bins: int = 5) -> Trend:
    """
    Test whether jumps rise with entropy, with responses as the units.

    Each response's tokens are split by entropy into `bins` equal parts, and Page's test
    ([`~scipy.stats.page_trend_test`]) asks whether the parts' mean jumps are ordered as their entropies in more
    responses than by chance. Only ranks within a response enter, so neither long responses nor large values dominate.
    Parts are equal, because means over parts of different sizes would not be exchangeable: where a response's length
    is no multiple of `bins`, its tokens of middle entropy are left out. Responses with fewer than `bins` tokens are
    left out too.

    Args:
        jumps (`pd.DataFrame`): from [`token_jumps`] or [`valued_state_jumps`].
        column (`str`, *optional*, defaults to `"jump"`): column of `jumps` to test.
        bins (`int`, *optional*, defaults to `5`): parts of each response, at least 3.

    Returns:
        [`Trend`]: a small `p_value` speaks for jumps that rise with entropy.
    """
    if bins < 3:
        raise ValueError(f"`bins` must be at least 3, got {bins}.")
    table = _sorted(jumps, column)
    grouped = table.groupby("cluster", sort=False)
    place, size = grouped.cumcount().to_numpy(), grouped["cluster"].transform("size").to_numpy()
    width, surplus = size // bins, size % bins
    gap = (size - surplus) // 2
    kept = (width > 0) & ((place < gap) | (place >= gap + surplus))
    place = np.where(place < gap, place, place - surplus)
    part = bins - 1 - place[kept] // width[kept]  # the table starts with the highest entropy
    means = table[kept].groupby(["cluster", part])[column].mean().unstack()
    if len(means) < 2:
        return Trend(float("nan"), float("nan"), len(means), bins)
    result = page_trend_test(means.to_numpy())
    return Trend(float(result.statistic), float(result.pvalue), len(means), bins)


def _sorted(jumps: pd.DataFrame, column: str) -> pd.DataFrame:
    if jumps[["entropy", column]].isna().any().any():
        raise ValueError(f"`entropy` and `{column}` of the jumps must be numbers, got NaN.")
    order = np.lexsort((-jumps["entropy"].to_numpy(), jumps["cluster"].to_numpy()))
    return jumps.iloc[order]
