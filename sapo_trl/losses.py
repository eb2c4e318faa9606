"""Policy and value losses over segments. Pure functions on tensors; a row without tokens contributes exactly zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch

from .segments import Segments, accumulation_dtype


Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
RatioReduction = Literal["mean", "sum"]
TrustRegion = Literal["ratio", "probability"]


@dataclass
class LossOutput:
    """
    A loss and its metrics.

    Args:
        loss (`torch.Tensor`): 0-dimensional, differentiable.
        metrics (`dict[str, torch.Tensor]`):
            0-dimensional, detached. They are means over the tokens that the loss reads, except `geometric_bias*`,
            which are means over segments.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def aggregate(
    x: torch.Tensor,
    mask: torch.Tensor,
    aggregation: Aggregation = "token-mean",
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Reduce per-token losses to a scalar: a sum divided by `normalizer`.

    Args:
        x (`torch.Tensor`): float tensor of shape `(B, T)`. Masked-out entries are ignored, NaN included.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`.
        aggregation (`str`, *optional*, defaults to `"token-mean"`):
            the terms of the sum: `"token-mean"` every token, `"seq-mean-token-mean"` each row's mean over its tokens,
            `"seq-mean-token-sum"` and `"seq-mean-token-sum-norm"` each row's sum.
        normalizer (`float` or `torch.Tensor`, *optional*):
            divisor of the sum. Defaults to this batch's number of tokens (`"token-mean"`), of rows times `T`
            (`"seq-mean-token-sum-norm"`, Dr. GRPO's constant), or of rows (the others). Pass the totals of the whole
            optimizer step: then the gradient does not depend on its division into micro-batches.

    Returns:
        `torch.Tensor`: 0-dimensional; 0 with zero gradient when no token is unmasked.
    """
    mask = mask.bool()
    return _sum_up(torch.where(mask, x, 0), mask, aggregation, normalizer)


def _sum_up(
    x: torch.Tensor, mask: torch.Tensor, aggregation: Aggregation, normalizer: float | torch.Tensor | None
) -> torch.Tensor:
    """[`aggregate`] for `x` that is already 0 outside the mask."""
    if aggregation == "token-mean":
        total, default_normalizer = x.sum(), mask.count_nonzero().clamp(min=1)
    elif aggregation == "seq-mean-token-mean":
        total, default_normalizer = (x.sum(1) / mask.sum(1).clamp(min=1)).sum(), max(x.size(0), 1)
    elif aggregation == "seq-mean-token-sum":
        total, default_normalizer = x.sum(), max(x.size(0), 1)
    elif aggregation == "seq-mean-token-sum-norm":
        total, default_normalizer = x.sum(), max(x.numel(), 1)
    else:
        raise ValueError(f"`aggregation` must be one of {get_args(Aggregation)}, got {aggregation!r}.")
    return total / (default_normalizer if normalizer is None else normalizer)


def segment_log_ratio(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    segments: Segments,
    clamp: float = 20.0,
    reduction: RatioReduction = "mean",
) -> torch.Tensor:
    """
    Log-ratio that the tokens of a segment share.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, log-probabilities under the current policy.
        old_logps (`torch.Tensor`): the same under the policy that produced the rollout.
        segments ([`Segments`]): the partition of the tokens.
        clamp (`float`, *optional*, defaults to `20.0`):
            bound on each token's log-ratio before it is averaged (and on the sum), so that one token cannot make a
            segment's ratio overflow.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"`: the shared ratio is the geometric mean of the segment's token ratios (SAPO, GSPO). `"sum"`: the
            shared ratio is their product, the ratio of the segment's probabilities (RLOO with one segment).

    Returns:
        `torch.Tensor`: `(B, T)`, float32 or wider, 0 outside the segments; the gradient flows through the reduction.
    """
    return segments.expand(_reduce_log_ratio(_token_log_ratio(logps, old_logps, clamp), segments, reduction, clamp))


def _reduce_log_ratio(
    token_log_ratio: torch.Tensor, segments: Segments, reduction: RatioReduction, clamp: float = 20.0
) -> torch.Tensor:
    """`(B, M)`: one log-ratio for each segment."""
    if reduction == "mean":
        return segments.mean(token_log_ratio)
    if reduction == "sum":
        return segments.sum(token_log_ratio).clamp(-clamp, clamp)
    raise ValueError(f"`reduction` must be one of {get_args(RatioReduction)}, got {reduction!r}.")


def log_ratio(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    segments: Segments | None = None,
    clamp: float = 20.0,
    reduction: RatioReduction = "mean",
) -> torch.Tensor:
    """
    Log importance ratio of each token: its own without `segments`, its segment's with them ([`segment_log_ratio`]).

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`.
        old_logps (`torch.Tensor`): float tensor of shape `(B, T)`.
        segments ([`Segments`], *optional*): the partition of the tokens.
        clamp (`float`, *optional*, defaults to `20.0`): bound on each token's log-ratio.
        reduction (`str`, *optional*, defaults to `"mean"`): see [`segment_log_ratio`].

    Returns:
        `torch.Tensor`: `(B, T)`, float32 or wider.
    """
    if segments is not None:
        return segment_log_ratio(logps, old_logps, segments, clamp, reduction)
    return _token_log_ratio(logps, old_logps, clamp)


def _token_log_ratio(logps: torch.Tensor, old_logps: torch.Tensor, clamp: float = 20.0) -> torch.Tensor:
    dtype = accumulation_dtype(logps, old_logps)
    return torch.clamp(logps.to(dtype) - old_logps.to(dtype), -clamp, clamp)


def geometric_bias(log_ratio: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Distance by which the geometric mean of each segment's token ratios lies below their arithmetic mean, and a bound.

    With `l` a token's log-ratio, `m` the segment's mean of them, `d = l - m` and `G = exp(m)` the geometric mean, the
    arithmetic mean exceeds `G` by `G * mean(exp(d) - 1)`, and `mean(d) = 0`. Taylor's theorem with Lagrange's form of
    the remainder gives `exp(d) - 1 - d = exp(x) * d^2 / 2` for some `x` between 0 and `d`, which is at least 0 and at
    most `max(1, exp(d)) * d^2 / 2`. So

    `0 <= bias <= mean(max(G, exp(l)) * d^2) / 2 <= max(exp(l)) * Var(l) / 2`.

    The middle term is returned as the bound. The paper's App. D (Eq. 26) bounds the same difference. That equation was
    not available to us, so this bound is our own.

    Args:
        log_ratio (`torch.Tensor`):
            float tensor of shape `(B, T)`, each token's own log-ratio. Outside the segments it may hold anything.
        segments ([`Segments`]): the partition of the tokens.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: bias and bound, both `(B, M)`, float32 or wider, at least 0, and 0 beyond
        a row's count. Equal up to third order in `d`; in float32 rounding may lift a tiny bias over its bound.
    """
    log_ratio = torch.where(segments.mask, log_ratio.to(accumulation_dtype(log_ratio)), 0)
    return _geometric_bias(log_ratio, segments.mean(log_ratio), segments)


def _geometric_bias(
    log_ratio: torch.Tensor, mean: torch.Tensor, segments: Segments
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`geometric_bias`] of log-ratios that are 0 outside the segments, given each segment's mean of them."""
    deviation, geometric = log_ratio - segments.expand(mean), torch.exp(mean)
    # Rounding leaves the mean deviation a little off zero. Where the bias is of second order this matters: subtract
    # it.
    excess = torch.expm1(deviation)
    bias = geometric * segments.mean(excess - deviation).clamp(min=0)
    # max(G, exp(l)) is G * max(1, exp(d)).
    return bias, geometric * segments.mean((1 + excess).clamp(min=1) * deviation.square()) / 2


class _PolicyInputs(NamedTuple):
    """The policy losses' inputs, per token; 0 where a token does not count."""

    log_ratios: torch.Tensor
    advantages: torch.Tensor
    bias_metrics: dict[str, torch.Tensor]


def _masked_policy_inputs(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    segments: Segments | None,
    ratio_reduction: str,
) -> _PolicyInputs:
    # Positions outside the mask hold results of padding. A NaN there would poison the gradient although its loss is
    # dropped, so it is replaced before any multiplication. After that a product with the mask does the same as
    # `torch.where`, in a fraction of its time on a CPU.
    known = mask if segments is None else segments.mask
    token_log_ratios = torch.where(known, _token_log_ratio(logps, old_logps.detach()), 0)
    advantages = torch.where(mask, advantages.detach(), 0).to(token_log_ratios.dtype)
    if segments is None:
        return _PolicyInputs(token_log_ratios, advantages, {})
    segment_log_ratios = _reduce_log_ratio(token_log_ratios, segments, ratio_reduction)
    metrics = {}
    if ratio_reduction == "mean":
        metrics = _bias_metrics(token_log_ratios.detach(), segment_log_ratios.detach(), segments)
    return _PolicyInputs(segments.expand(segment_log_ratios) * mask, advantages, metrics)


def _bias_metrics(
    token_log_ratios: torch.Tensor, segment_log_ratios: torch.Tensor, segments: Segments
) -> dict[str, torch.Tensor]:
    """[`geometric_bias`] as means over segments."""
    bias, bound = _geometric_bias(token_log_ratios, segment_log_ratios, segments)
    count = segments.count.sum().clamp(min=1)
    return {"geometric_bias": bias.sum() / count, "geometric_bias_bound": bound.sum() / count}


@torch.no_grad()
def _ratio_metrics(log_ratios: torch.Tensor, ratio: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every policy loss's metrics of its importance ratios, from log-ratios that are 0 outside the mask."""
    count = mask.count_nonzero().clamp(min=1)
    return {
        "approx_kl": (-log_ratios).sum() / count,
        "approx_kl_k3": (ratio - 1 - log_ratios).sum() / count,
        "ratio_mean": 1 + (ratio - 1).sum() / count,
        "ratio_max": (ratio * mask).amax() if mask.numel() else ratio.new_zeros(()),
    }


def _weighted(token_loss: torch.Tensor, weights: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    return token_loss if weights is None else token_loss * torch.where(mask, weights.to(token_loss.dtype), 0)


def clipped_policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    segments: Segments | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
    aggregation: Aggregation = "token-mean",
    normalizer: float | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    ratio_reduction: str = "mean",
) -> LossOutput:
    """
    PPO's clipped surrogate with a ratio per segment (SAPO) or per token (PPO).

    The loss of a token is `max(-ratio * A, -clip(ratio, 1 - clip_low, 1 + clip_high) * A)`, and at most
    `-dual_clip * A` where `A < 0`.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, log-probabilities under the current policy.
        old_logps (`torch.Tensor`): the same under the policy that produced the rollout.
        advantages (`torch.Tensor`): float tensor of shape `(B, T)`.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens that count.
        segments ([`Segments`], *optional*): the partition; `None` gives every token its own ratio.
        clip_low (`float`, *optional*, defaults to `0.2`): the ratio is clipped below at `1 - clip_low`.
        clip_high (`float`, *optional*, defaults to `0.28`): the ratio is clipped above at `1 + clip_high`.
        dual_clip (`float`, *optional*, defaults to `3.0`):
            bound (> 1) on the ratio's weight where the advantage is negative; `None` for no bound.
        aggregation (`str`, *optional*, defaults to `"token-mean"`): see [`aggregate`].
        normalizer (`float` or `torch.Tensor`, *optional*): see [`aggregate`].
        weights (`torch.Tensor`, *optional*):
            factors of shape `(B, T)` or `(B, 1)` on the token losses, e.g. the sampler's importance correction.
        ratio_reduction (`str`, *optional*, defaults to `"mean"`): see [`segment_log_ratio`].

    Returns:
        [`LossOutput`]: the loss, and the metrics `clip_fraction` (tokens where the clipped term is the larger one),
        `clip_fraction_low` and `clip_fraction_high` (its two sides), `dual_clip_fraction`, `approx_kl` (mean of minus
        the log-ratio), `approx_kl_k3` (mean of `ratio - 1 - log(ratio)`), `ratio_mean` and `ratio_max`; with a ratio
        per segment that is a geometric mean also `geometric_bias` and `geometric_bias_bound` ([`geometric_bias`]).
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"`dual_clip` must be greater than 1 (or `None`), got {dual_clip}.")
    mask = mask.bool()
    log_ratios, advantages, bias_metrics = _masked_policy_inputs(
        logps, old_logps, advantages, mask, segments, ratio_reduction
    )
    ratio = torch.exp(log_ratios)
    unclipped = -ratio * advantages
    with torch.no_grad():
        # A clipped term does not depend on the ratio, so its gradient is 0: autograd need not track it.
        clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
        is_clipped = clipped > unclipped
        is_dual_clipped, is_fixed = torch.zeros_like(mask), is_clipped
        if dual_clip is not None:
            bound = -dual_clip * advantages
            is_dual_clipped = (advantages < 0) & (torch.maximum(unclipped, clipped) > bound)
            is_fixed, clipped = is_clipped | is_dual_clipped, torch.where(is_dual_clipped, bound, clipped)
    token_loss = torch.where(is_fixed, clipped, unclipped)

    with torch.no_grad():
        count = mask.count_nonzero().clamp(min=1)

        def share(flags: torch.Tensor) -> torch.Tensor:
            # Outside the mask log-ratios and advantages are 0, so no flag is set there.
            return flags.count_nonzero().to(log_ratios.dtype) / count

        metrics = {
            "clip_fraction": share(is_clipped),
            "clip_fraction_low": share(is_clipped & (ratio < 1)),
            "clip_fraction_high": share(is_clipped & (ratio > 1)),
            "dual_clip_fraction": share(is_dual_clipped),
            **_ratio_metrics(log_ratios, ratio, mask),
            **bias_metrics,
        }
    token_loss = _weighted(token_loss, weights, mask)
    return LossOutput(_sum_up(token_loss, mask, aggregation, normalizer), metrics)


def soft_adaptive_policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    segments: Segments | None = None,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
    aggregation: Aggregation = "seq-mean-token-mean",
    normalizer: float | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    ratio_reduction: str = "mean",
) -> LossOutput:
    """
    Surrogate with a smooth gate instead of a clip, from Qwen's *Soft Adaptive* Policy Optimization
    (https://huggingface.co/papers/2511.20347, TRL's `loss_type="sapo"`), with a ratio per segment or per token.

    The loss of a token is `-A * sigmoid(tau * (ratio - 1)) * 4 / tau`, with `tau = temperature_pos` where `A > 0` and
    `tau = temperature_neg` elsewhere. At `ratio = 1` the gate has slope 1. On both sides the slope decays, for
    advantages of either sign.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, log-probabilities under the current policy.
        old_logps (`torch.Tensor`): the same under the policy that produced the rollout.
        advantages (`torch.Tensor`): float tensor of shape `(B, T)`.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens that count.
        segments ([`Segments`], *optional*): the partition; `None` gives every token its own ratio.
        temperature_pos (`float`, *optional*, defaults to `1.0`): temperature of tokens with positive advantage.
        temperature_neg (`float`, *optional*, defaults to `1.05`): temperature of the other tokens.
        aggregation (`str`, *optional*, defaults to `"seq-mean-token-mean"`): see [`aggregate`].
        normalizer (`float` or `torch.Tensor`, *optional*): see [`aggregate`].
        weights (`torch.Tensor`, *optional*): factors on the token losses, see [`clipped_policy_loss`].
        ratio_reduction (`str`, *optional*, defaults to `"mean"`): see [`segment_log_ratio`].

    Returns:
        [`LossOutput`]: the loss, and the metrics `approx_kl`, `approx_kl_k3`, `ratio_mean` and `ratio_max`, and
        `geometric_bias*` as in [`clipped_policy_loss`].
    """
    for name, temperature in (("temperature_pos", temperature_pos), ("temperature_neg", temperature_neg)):
        if temperature <= 0.0:
            raise ValueError(f"`{name}` must be positive, got {temperature}.")
    mask = mask.bool()
    log_ratios, advantages, bias_metrics = _masked_policy_inputs(
        logps, old_logps, advantages, mask, segments, ratio_reduction
    )
    # `torch.where` with two Python numbers would give float32, also among float64 tensors. A tensor made of a number
    # would have to be copied to the device. So the numbers are filled in.
    temperature = torch.full_like(advantages, temperature_neg).masked_fill(advantages > 0, temperature_pos)
    ratio = torch.exp(log_ratios)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    token_loss = _weighted(-gate * advantages, weights, mask)
    metrics = {**_ratio_metrics(log_ratios, ratio, mask), **bias_metrics}
    return LossOutput(_sum_up(token_loss, mask, aggregation, normalizer), metrics)


def masked_policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    segments: Segments | None = None,
    low: float = 0.3,
    high: float = 5.0,
    trust_region: TrustRegion = "ratio",
    aggregation: Aggregation = "token-mean",
    normalizer: float | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    ratio_reduction: str = "mean",
) -> LossOutput:
    """
    Surrogate that drops tokens outside of a trust region, where PPO clips their ratio.

    The loss of a token is `-ratio * A` inside of the region and 0 outside. Dropped tokens still count in the mean. The
    gradient of the ratio is the ratio times the log-probability's gradient. So this has the gradient of
    `-ratio.detach() * A * logp`, the form in which SAO is written.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, log-probabilities under the current policy.
        old_logps (`torch.Tensor`): the same under the policy that produced the rollout.
        advantages (`torch.Tensor`): float tensor of shape `(B, T)`.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens that count.
        segments ([`Segments`], *optional*): the partition; `None` gives every token its own ratio.
        low (`float`, *optional*, defaults to `0.3`): bound on the lower side.
        high (`float`, *optional*, defaults to `5.0`): bound on the upper side.
        trust_region (`str`, *optional*, defaults to `"ratio"`):
            `"ratio"`: `1 - low < ratio < 1 + high`, for advantages of both signs (SAO,
            https://huggingface.co/papers/2607.07508). `"probability"`: `p - p_old <= high` where `A > 0` and
            `p - p_old >= -low` elsewhere, the total variation of DPPO (https://huggingface.co/papers/2602.04879). It
            needs each token's own ratio.
        aggregation (`str`, *optional*, defaults to `"token-mean"`): see [`aggregate`].
        normalizer (`float` or `torch.Tensor`, *optional*): see [`aggregate`].
        weights (`torch.Tensor`, *optional*): factors on the token losses, see [`clipped_policy_loss`].
        ratio_reduction (`str`, *optional*, defaults to `"mean"`): see [`segment_log_ratio`].

    Returns:
        [`LossOutput`]: the loss, and the metrics `clip_fraction` (dropped tokens), `clip_fraction_low` and
        `clip_fraction_high` (dropped tokens with a ratio below and above 1), and all others of
        [`soft_adaptive_policy_loss`].
    """
    if trust_region not in get_args(TrustRegion):
        raise ValueError(f"`trust_region` must be one of {get_args(TrustRegion)}, got {trust_region!r}.")
    if trust_region == "probability" and segments is not None:
        raise ValueError('`trust_region="probability"` needs each token\'s own ratio: `segments` must be None.')
    mask = mask.bool()
    log_ratios, advantages, bias_metrics = _masked_policy_inputs(
        logps, old_logps, advantages, mask, segments, ratio_reduction
    )
    ratio = torch.exp(log_ratios)
    with torch.no_grad():
        if trust_region == "ratio":
            is_dropped = (ratio <= 1 - low) | (ratio >= 1 + high)
        else:
            change = torch.exp(torch.where(mask, old_logps, 0).to(ratio.dtype)) * (ratio - 1)
            is_dropped = torch.where(advantages > 0, change > high, change < -low)
        is_dropped = is_dropped & mask
    token_loss = torch.where(is_dropped, 0, -ratio * advantages)
    with torch.no_grad():
        count = mask.count_nonzero().clamp(min=1)
        metrics = {
            "clip_fraction": is_dropped.count_nonzero().to(ratio.dtype) / count,
            "clip_fraction_low": (is_dropped & (ratio < 1)).count_nonzero().to(ratio.dtype) / count,
            "clip_fraction_high": (is_dropped & (ratio > 1)).count_nonzero().to(ratio.dtype) / count,
            **_ratio_metrics(log_ratios, ratio, mask),
            **bias_metrics,
        }
    return LossOutput(_sum_up(_weighted(token_loss, weights, mask), mask, aggregation, normalizer), metrics)


def segment_value_loss(
    value_preds: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    segments: Segments,
    value_state: str = "start",
    cliprange_value: float | None = 0.5,
    aggregation: Aggregation = "token-mean",
    normalizer: float | torch.Tensor | None = None,
) -> LossOutput:
    """
    Squared error of the critic at one state per segment, optionally clipped around the old values.

    Args:
        value_preds (`torch.Tensor`):
            float tensor of shape `(B, T)`; `value_preds[:, t]` is the predicted value of the state before token `t`.
        old_values (`torch.Tensor`): the predictions at rollout time, same layout.
        returns (`torch.Tensor`): float tensor of shape `(B, T)`, the targets, see [`segment_gae`].
        segments ([`Segments`]): the partition of the tokens.
        value_state (`str`, *optional*, defaults to `"start"`):
            the regressed state, see [`Segments.state_mask`].
        cliprange_value (`float`, *optional*, defaults to `0.5`):
            distance that a prediction may move from the old value before its gradient stops; `None` for a plain
            squared error.
        aggregation (`str`, *optional*, defaults to `"token-mean"`):
            see [`aggregate`], with one "token" per segment: `"seq-mean-token-mean"` is the paper's per-response mean.
        normalizer (`float` or `torch.Tensor`, *optional*): see [`aggregate`].

    Returns:
        [`LossOutput`]: half the mean squared error, and the metric `value_clip_fraction`.
    """
    mask = segments.state_mask(value_state)
    dtype = accumulation_dtype(value_preds, returns)
    value_preds = torch.where(mask, value_preds, 0).to(dtype)
    old_values = torch.where(mask, old_values.detach(), 0).to(dtype)
    returns = torch.where(mask, returns.detach(), 0).to(dtype)

    error = (value_preds - returns).square()
    is_clipped = torch.zeros_like(mask)
    if cliprange_value is not None:
        with torch.no_grad():  # where the clipped error is the larger one, it does not depend on the prediction
            near_old = torch.clamp(value_preds, old_values - cliprange_value, old_values + cliprange_value)
            clipped_error = (near_old - returns).square()
            is_clipped = clipped_error > error
        error = torch.where(is_clipped, clipped_error, error)
    metrics = {"value_clip_fraction": is_clipped.count_nonzero().float() / mask.count_nonzero().clamp(min=1)}
    return LossOutput(0.5 * _sum_up(error, mask, aggregation, normalizer), metrics)
