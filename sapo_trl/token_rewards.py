"""From rewards of responses and their steps to one reward per token. Pure functions on tensors."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from .segments import accumulation_dtype


KLEstimator = Literal["k1", "k2", "k3"]


def outcome_token_rewards(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Place each response's reward on its last token.

    Args:
        rewards (`torch.Tensor`): float tensor of shape `(B,)`.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens the policy produced; holes are allowed.

    Returns:
        `torch.Tensor`: float32 or wider `(B, T)`, all 0 for a row without tokens.
    """
    mask = mask.bool()
    position = torch.cumsum(mask, dim=1)
    is_last = mask & (position == position[:, -1:])
    return torch.where(is_last, rewards.unsqueeze(1), 0).to(accumulation_dtype(rewards))


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, estimator: KLEstimator = "k1") -> torch.Tensor:
    """
    Per-token estimate of KL(policy ‖ reference) from samples of the policy (http://joschu.net/blog/kl-approx.html).

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, log-probabilities of the sampled tokens.
        ref_logps (`torch.Tensor`): the same under the reference model.
        estimator (`str`, *optional*, defaults to `"k1"`):
            with `d = logps - ref_logps`: `"k1"` is `d` (unbiased, signed), `"k2"` is `d**2 / 2`, `"k3"` is
            `exp(-d) + d - 1` (unbiased, never negative).

    Returns:
        `torch.Tensor`: `(B, T)`, float32 or wider.
    """
    dtype = accumulation_dtype(logps, ref_logps)
    difference = logps.to(dtype) - ref_logps.to(dtype)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.exp(-difference) + difference - 1
    raise ValueError(f"`estimator` must be one of {get_args(KLEstimator)}, got {estimator!r}.")
