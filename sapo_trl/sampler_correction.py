"""Difference between the sampler's log-probabilities and the trained model's, and the correction for it."""

from __future__ import annotations

import torch

from .segments import accumulation_dtype


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def logp_difference(
    logps: torch.Tensor, sampling_logps: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Difference between the sampler's and the training model's log-probabilities, for the same weights and tokens.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, the training model's log-probabilities.
        sampling_logps (`torch.Tensor`): the sampler's log-probabilities; NaN if the sampler gave none for a token.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens to count.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: sum of the absolute differences and number of tokens, 0-dimensional.
    """
    known = mask.bool() & ~sampling_logps.isnan()
    dtype = accumulation_dtype(logps, sampling_logps)
    difference = torch.where(known, logps.to(dtype) - sampling_logps.to(dtype), 0).abs()
    return difference.sum(), known.sum()


def importance_correction(
    logps: torch.Tensor,
    sampling_logps: torch.Tensor,
    mask: torch.Tensor,
    mode: str = "sequence_mask",
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> torch.Tensor:
    """
    Ratio of the training model's probabilities to the sampler's. Token losses are multiplied by it. TRL computes the
    same ratio for its own vLLM modes.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, the training model's log-probabilities.
        sampling_logps (`torch.Tensor`):
            the sampler's log-probabilities; NaN if the sampler gave none for a token. The token's ratio is then 1.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens to count.
        mode (`str`, *optional*, defaults to `"sequence_mask"`):
            `"token_…"` for a ratio per token, `"sequence_…"` for a ratio per sequence. The ratio is clipped to the
            bounds (`"…_truncate"`), or set to 0 outside the bounds (`"…_mask"`).
        clip_min (`float`, *optional*): lower bound.
        clip_max (`float`, *optional*, defaults to `3.0`): upper bound.

    Returns:
        `torch.Tensor`: float32 or wider, `(B, T)` or, for sequences, `(B, 1)`.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}, got {mode!r}.")
    dtype = accumulation_dtype(logps, sampling_logps)
    difference = torch.where(mask.bool(), logps.to(dtype) - sampling_logps.to(dtype), 0).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(dim=1, keepdim=True)
    ratio = torch.exp(difference)
    if mode.endswith("truncate"):
        return ratio.clamp(clip_min, clip_max) if (clip_min, clip_max) != (None, None) else ratio
    too_small = torch.zeros_like(ratio, dtype=torch.bool) if clip_min is None else ratio < clip_min
    too_large = torch.zeros_like(ratio, dtype=torch.bool) if clip_max is None else ratio > clip_max
    return ratio.masked_fill(too_small | too_large, 0.0)
