"""Advantages: generalized estimation over segments, mean baselines, normalisation. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch

from .segments import Segments, accumulation_dtype


LengthRule = Literal["reciprocal", "root"]


def discounted_suffix_sum(x: torch.Tensor, discount: float | torch.Tensor) -> torch.Tensor:
    """
    `y[:, m] = sum_{l >= 0} discount**l * x[:, m + l]`, in `ceil(log2(M))` vectorised steps.

    After step `k`, `y[:, m]` sums the `2**k` terms from `m` on: two neighbouring windows make one of twice the length.
    Only sums of products with powers of `discount` are formed, so no discount in `[0, 1]` can overflow. The closed
    form with a cumulative sum would divide by a power that may underflow.

    Args:
        x (`torch.Tensor`): float tensor of shape `(B, M)`.
        discount (`float` or `torch.Tensor`): in `[0, 1]`; a tensor of shape `(B, 1)` discounts each row on its own.

    Returns:
        `torch.Tensor`: `(B, M)`.
    """
    window = 1
    while window < x.size(1):
        shifted = torch.nn.functional.pad(x[:, window:], (0, window))
        x = x + discount * shifted
        discount = discount * discount
        window *= 2
    return x


def td_errors(
    rewards: torch.Tensor,
    values: torch.Tensor,
    segments: Segments,
    gamma: float = 1.0,
    value_state: str = "start",
) -> torch.Tensor:
    """
    The TD error of each segment: `delta_m = r_m + gamma * V_{m+1} - V_m`, with 0 as the value after the last segment.

    Args:
        rewards (`torch.Tensor`): float tensor of shape `(B, T)`, per-token rewards.
        values (`torch.Tensor`): float tensor of shape `(B, T)`; `values[:, t]` is the value *before* token `t`.
        segments ([`Segments`]): the partition of the `(B, T)` tokens.
        gamma (`float`, *optional*, defaults to `1.0`): discount per segment, in `[0, 1]`.
        value_state (`str`, *optional*, defaults to `"start"`): see [`Segments.state_mask`].

    Returns:
        `torch.Tensor`: `(B, M)` with `M` the largest number of segments, 0 beyond a row's count; float32 or wider.
    """
    dtype = accumulation_dtype(rewards, values)
    segment_values = segments.at_state(values.to(dtype), value_state)
    # Beyond a row's last segment the values are 0, which is the value of the terminal state.
    next_values = torch.nn.functional.pad(segment_values[:, 1:], (0, 1))[:, : segment_values.size(1)]
    return segments.sum(rewards.to(dtype)) + gamma * next_values - segment_values


@torch.no_grad()
def segment_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    segments: Segments,
    gamma: float = 1.0,
    lam: float | torch.Tensor = 0.99,
    value_state: str = "start",
    critic_lam: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Generalized advantage estimation with segments as the time steps (SAPO paper, values as in its Eq. 6).

    With `V_m` the value of segment `m`'s state and `delta_m` its TD error ([`td_errors`]), the advantage is
    `A_m = sum_l (gamma * lam)**l * delta_{m+l}` with `l` counted in segments, and the return is `A_m + V_m`. One-token
    segments make this the usual token-level GAE.

    Args:
        rewards (`torch.Tensor`): float tensor of shape `(B, T)`, per-token rewards.
        values (`torch.Tensor`):
            float tensor of shape `(B, T)`; `values[:, t]` is the value of the state *before* token `t`.
        segments ([`Segments`]): the partition of the `(B, T)` tokens.
        gamma (`float`, *optional*, defaults to `1.0`): discount per segment, in `[0, 1]`.
        lam (`float` or `torch.Tensor`, *optional*, defaults to `0.99`):
            GAE's λ, in `[0, 1]`; a tensor of shape `(B, 1)` gives each row its own, see [`length_adaptive_lam`].
        value_state (`str`, *optional*, defaults to `"start"`):
            state that gives a segment's value: `"start"` (the paper) or `"end"` (the official code), see
            [`Segments.state_mask`].
        critic_lam (`float`, *optional*):
            λ of the return targets. `None` uses `lam`; `1.0` makes them Monte-Carlo returns (decoupled GAE of VC-PPO,
            https://huggingface.co/papers/2503.01491).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`:
            advantages and returns, both of shape `(B, T)` in float32 or wider, without gradient. Each token carries
            its segment's number; tokens of no segment carry 0.
    """
    for name, coefficient in (("gamma", gamma), ("lam", lam), ("critic_lam", critic_lam)):
        # A tensor's range is not checked: reading it would wait for the device.
        if isinstance(coefficient, float | int) and not 0.0 <= coefficient <= 1.0:
            raise ValueError(f"`{name}` must lie in [0, 1], got {coefficient}.")
    dtype = accumulation_dtype(rewards, values)
    lam = lam.to(dtype) if isinstance(lam, torch.Tensor) else lam
    segment_values = segments.at_state(values.to(dtype), value_state)
    deltas = td_errors(rewards, values, segments, gamma, value_state)
    advantages = discounted_suffix_sum(deltas, gamma * lam)
    if critic_lam is None:
        returns = advantages + segment_values
    else:
        returns = discounted_suffix_sum(deltas, gamma * critic_lam) + segment_values
    return segments.expand(advantages), segments.expand(returns)


@torch.no_grad()
def mean_baseline_advantages(
    rewards: torch.Tensor,
    segments: Segments,
    gamma: float = 1.0,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages without a critic: each segment's Monte-Carlo return minus the mean of all segments' returns.

    The return of segment `m` is `G_m = sum_l gamma**l * r_{m+l}`, with `r` the summed token rewards of a segment. The
    advantage is `A_m = G_m - mean(G)`, with the mean over all segments of all rows. This is [`segment_gae`] with λ = 1
    and `mean(G)` as the value of every state: a critic with an explained variance of exactly 0.

    Args:
        rewards (`torch.Tensor`): float tensor of shape `(B, T)`, per-token rewards.
        segments ([`Segments`]): the partition of the `(B, T)` tokens.
        gamma (`float`, *optional*, defaults to `1.0`): discount per segment, in `[0, 1]`.
        reduce (`Callable`, *optional*): sums a tensor over all processes, see [`masked_moments`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: advantages and returns, shaped as in [`segment_gae`].
    """
    _, returns = segment_gae(rewards, torch.zeros_like(rewards), segments, gamma, lam=1.0)
    # One token of each segment, so that every segment counts once.
    mean, _ = masked_moments(returns, segments.is_last, reduce)
    return torch.where(segments.mask, returns - mean, 0), returns


def length_adaptive_lam(segments: Segments, number: float, rule: LengthRule = "reciprocal") -> torch.Tensor:
    """
    λ that grows with a response's length `l`, so that rewards reach its beginning.

    `"reciprocal"` is `max(0, 1 - 1 / (number * l))` (VAPO, https://huggingface.co/papers/2504.05118). The published
    formula is negative for `l < 1 / number`. A λ cannot be negative, so it is clamped at 0. `"root"` is
    `number ** (1 / l)` (JustRL-II): after `l` steps a reward keeps the share `number` at any length. For long
    responses it is `"reciprocal"` with `-1 / log(number)`.

    The sources count tokens; here `l` counts the time steps of the estimation, which are segments (of one token, in
    PPO).

    Args:
        segments ([`Segments`]): the partition of the tokens of `B` rows.
        number (`float`): the larger, the closer to 1; positive, and for `"root"` at most 1.
        rule (`str`, *optional*, defaults to `"reciprocal"`): `"reciprocal"` or `"root"`.

    Returns:
        `torch.Tensor`: float64 `(B, 1)`, in `[0, 1]`.
    """
    if number <= 0.0 or (rule == "root" and number > 1.0):
        raise ValueError(f'`number` must be positive, and at most 1 with `rule="root"`, got {number} ({rule=}).')
    lengths = segments.count.clamp(min=1).unsqueeze(1).double()
    if rule == "reciprocal":
        return (1 - 1 / (number * lengths)).clamp(min=0)
    if rule == "root":
        return number ** (1 / lengths)
    raise ValueError(f"`rule` must be one of {get_args(LengthRule)}, got {rule!r}.")


def leave_one_out_advantages(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Each response's reward minus the mean reward of the other responses to its prompt (RLOO,
    https://huggingface.co/papers/2402.14740).

    Args:
        rewards (`torch.Tensor`): float tensor of shape `(B,)`, the responses to one prompt next to each other; NaN for
            a response without reward, which is left out of the baselines.
        num_generations (`int`): responses for each prompt.

    Returns:
        `torch.Tensor`: `(B,)`, 0 for a response without reward or without another response to compare with.
    """
    if rewards.numel() % num_generations != 0:
        raise ValueError(f"{rewards.numel()} rewards are no whole number of groups of {num_generations}.")
    grouped = rewards.view(-1, num_generations)
    num_others = (~grouped.isnan()).sum(dim=1, keepdim=True) - 1
    baselines = (grouped.nansum(dim=1, keepdim=True) - grouped) / num_others
    # NaN where the response has no reward (its own NaN) or no other response has one (0 / 0).
    return (grouped - baselines).view(-1).nan_to_num(nan=0.0)


def masked_moments(
    x: torch.Tensor,
    mask: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and unbiased variance over the masked entries, of all processes when `reduce` is given.

    Args:
        x (`torch.Tensor`): float tensor of any shape.
        mask (`torch.Tensor`): bool tensor of the same shape.
        reduce (`Callable`, *optional*):
            sums a tensor over all processes, e.g. `partial(accelerator.reduce, reduction="sum")`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`:
            two 0-dimensional tensors, both 0 without entries; the variance of a single entry is 0.
    """
    mean, variance, _ = _moments(x, mask.bool(), reduce)
    return mean, variance


def _moments(
    x: torch.Tensor, mask: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`masked_moments`], and the deviations from the mean, 0 outside the mask."""
    x = torch.where(mask, x, 0).to(accumulation_dtype(x))
    # Two passes: the mean first, then squared deviations from it. The one-pass formula cancels catastrophically when
    # the mean is large against the spread.
    totals = torch.stack([mask.count_nonzero().to(x.dtype), x.sum()])
    count, total = reduce(totals) if reduce is not None else totals
    mean = total / count.clamp(min=1)
    deviations = (x - mean) * mask
    squared_deviations = deviations.square().sum()
    if reduce is not None:
        squared_deviations = reduce(squared_deviations)
    return mean, squared_deviations / (count - 1).clamp(min=1), deviations


def masked_whiten(
    x: torch.Tensor,
    mask: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    eps: float = 1e-8,
) -> torch.Tensor:
    """
    Shift and scale the masked entries to mean 0 and unbiased variance 1.

    Args:
        x (`torch.Tensor`): float tensor of any shape.
        mask (`torch.Tensor`): bool tensor of the same shape.
        reduce (`Callable`, *optional*): sums a tensor over all processes, see [`masked_moments`].
        eps (`float`, *optional*, defaults to `1e-8`): added to the variance.

    Returns:
        `torch.Tensor`: same shape, float32 or wider, 0 outside the mask.
    """
    _, variance, deviations = _moments(x, mask.bool(), reduce)
    return deviations * torch.rsqrt(variance + eps)
