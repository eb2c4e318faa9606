"""Policy and value losses over segments. Pure functions on tensors; a row without tokens contributes exactly zero."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .segments import Segments, accumulation_dtype


AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


@dataclass
class LossOutput:
    """
    A loss and what to log about it.

    Args:
        loss (`torch.Tensor`): 0-dimensional, differentiable.
        metrics (`dict[str, torch.Tensor]`): 0-dimensional, detached; means over the tokens the loss reads.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def aggregate(
    x: torch.Tensor,
    mask: torch.Tensor,
    aggregation: str = "token-mean",
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Reduce per-token losses to a scalar: a sum divided by `normalizer`.

    Args:
        x (`torch.Tensor`): float tensor of shape `(B, T)`. Masked-out entries are ignored, NaN included.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`.
        aggregation (`str`, *optional*, defaults to `"token-mean"`):
            what is summed: `"token-mean"` every token, `"seq-mean-token-mean"` each row's mean over its tokens,
            `"seq-mean-token-sum"` each row's sum.
        normalizer (`float` or `torch.Tensor`, *optional*):
            what the sum is divided by. Defaults to this batch's number of tokens (`"token-mean"`) or of rows (the
            others). Pass the totals of the whole optimizer step to make the gradient independent of how it is cut into
            micro-batches.

    Returns:
        `torch.Tensor`: 0-dimensional; 0 with zero gradient when no token is unmasked.
    """
    mask = mask.bool()
    x = torch.where(mask, x, 0)
    if aggregation == "token-mean":
        total, default_normalizer = x.sum(), mask.sum().clamp(min=1)
    elif aggregation == "seq-mean-token-mean":
        total, default_normalizer = (x.sum(1) / mask.sum(1).clamp(min=1)).sum(), max(x.size(0), 1)
    elif aggregation == "seq-mean-token-sum":
        total, default_normalizer = x.sum(), max(x.size(0), 1)
    else:
        raise ValueError(f"`aggregation` must be one of {AGGREGATIONS}, got {aggregation!r}.")
    return total / (default_normalizer if normalizer is None else normalizer)


def segment_log_ratio(
    logps: torch.Tensor, old_logps: torch.Tensor, segments: Segments, clamp: float = 20.0
) -> torch.Tensor:
    """
    Mean log-ratio of each token's segment; its exponential is the geometric mean of the token ratios.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, log-probabilities under the current policy.
        old_logps (`torch.Tensor`): the same under the policy that produced the rollout.
        segments ([`Segments`]): the partition of the tokens.
        clamp (`float`, *optional*, defaults to `20.0`):
            bound on each token's log-ratio before averaging, so that one token cannot make a segment's ratio overflow.

    Returns:
        `torch.Tensor`: `(B, T)`, float32 or wider, 0 outside the segments; the gradient flows through the mean.
    """
    return segments.expand(segments.mean(_token_log_ratio(logps, old_logps, clamp)))


def log_ratio(
    logps: torch.Tensor, old_logps: torch.Tensor, segments: Segments | None = None, clamp: float = 20.0
) -> torch.Tensor:
    """
    Log importance ratio of each token: its own without `segments`, its segment's ([`segment_log_ratio`]) with them.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`.
        old_logps (`torch.Tensor`): float tensor of shape `(B, T)`.
        segments ([`Segments`], *optional*): the partition of the tokens.
        clamp (`float`, *optional*, defaults to `20.0`): bound on each token's log-ratio.

    Returns:
        `torch.Tensor`: `(B, T)`, float32 or wider.
    """
    if segments is not None:
        return segment_log_ratio(logps, old_logps, segments, clamp)
    return _token_log_ratio(logps, old_logps, clamp)


def _token_log_ratio(logps: torch.Tensor, old_logps: torch.Tensor, clamp: float) -> torch.Tensor:
    dtype = accumulation_dtype(logps, old_logps)
    return torch.clamp(logps.to(dtype) - old_logps.to(dtype), -clamp, clamp)


def clipped_policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    segments: Segments | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
    aggregation: str = "token-mean",
    normalizer: float | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
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

    Returns:
        [`LossOutput`]: the loss, and the metrics `clip_fraction` (tokens where the clipped term is the larger one),
        `clip_fraction_low` and `clip_fraction_high` (its two sides), `dual_clip_fraction`, `approx_kl` (mean of minus
        the log-ratio), `approx_kl_k3` (mean of `ratio - 1 - log(ratio)`), `ratio_mean` and `ratio_max`.
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"`dual_clip` must be greater than 1 (or `None`), got {dual_clip}.")
    mask = mask.bool()
    # Positions outside the mask hold whatever the padding produced; a NaN there would poison the gradient even though
    # its loss is dropped, so they are replaced before any arithmetic.
    known = mask if segments is None else segments.mask
    logps = torch.where(known, logps, 0)
    old_logps = torch.where(known, old_logps.detach(), 0)
    log_ratios = torch.where(mask, log_ratio(logps, old_logps, segments), 0)
    advantages = torch.where(mask, advantages.detach(), 0).to(log_ratios.dtype)

    ratio = torch.exp(log_ratios)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    token_loss = torch.maximum(unclipped, clipped)
    is_dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        is_dual_clipped = (advantages < 0) & (token_loss > bound)
        token_loss = torch.where(advantages < 0, torch.minimum(token_loss, bound), token_loss)
    if weights is not None:
        token_loss = token_loss * torch.where(mask, weights.to(token_loss.dtype), 0)

    with torch.no_grad():
        is_clipped = clipped > unclipped
        count = mask.sum().clamp(min=1)

        def mean(x: torch.Tensor) -> torch.Tensor:
            # Outside the mask log-ratios and advantages are 0, so everything averaged here is 0 there.
            return x.sum(dtype=log_ratios.dtype) / count

        metrics = {
            "clip_fraction": mean(is_clipped),
            "clip_fraction_low": mean(is_clipped & (ratio < 1)),
            "clip_fraction_high": mean(is_clipped & (ratio > 1)),
            "dual_clip_fraction": mean(is_dual_clipped),
            "approx_kl": mean(-log_ratios),
            "approx_kl_k3": mean(ratio - 1 - log_ratios),
            "ratio_mean": 1 + mean(ratio - 1),
            "ratio_max": torch.where(mask, ratio, 0).amax() if mask.numel() else ratio.new_zeros(()),
        }
    return LossOutput(aggregate(token_loss, mask, aggregation, normalizer), metrics)


def segment_value_loss(
    value_preds: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    segments: Segments,
    value_state: str = "start",
    cliprange_value: float | None = 0.5,
    aggregation: str = "token-mean",
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
            which state is regressed, see [`Segments.state_mask`].
        cliprange_value (`float`, *optional*, defaults to `0.5`):
            how far a prediction may move from the old value before its gradient stops; `None` for a plain squared
            error.
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
        near_old = torch.clamp(value_preds, old_values - cliprange_value, old_values + cliprange_value)
        clipped_error = (near_old - returns).square()
        is_clipped = clipped_error > error
        error = torch.maximum(error, clipped_error)
    metrics = {"value_clip_fraction": aggregate(is_clipped.float(), mask)}
    return LossOutput(0.5 * aggregate(error, mask, aggregation, normalizer), metrics)
