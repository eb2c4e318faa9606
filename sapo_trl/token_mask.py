"""Masks of the tokens with the largest scores, from which a policy learns. Pure functions on tensors."""

from __future__ import annotations

from typing import Literal

import torch


TokenScope = Literal["response", "batch"]


def largest_share(scores: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    """
    Mark the tokens of each row with the largest scores: `ceil(share * n)` of the row's `n` tokens.

    Among equal scores the earlier token is taken. Rows do not influence each other.

    Args:
        scores (`torch.Tensor`): float tensor of shape `(B, T)`. Scores outside the mask are ignored, NaN included.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens to choose from; holes are allowed.
        share (`float`): in `(0, 1]`.

    Returns:
        `torch.Tensor`: bool `(B, T)`, a part of the mask.

    Raises:
        ValueError: if `share` is out of range.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"`share` is a share of the tokens: it must lie in (0, 1], got {share}.")
    mask = mask.bool()
    # The small offset keeps a share without exact representation (0.3 of 10 tokens) from exceeding the next integer.
    wanted = torch.ceil(mask.sum(dim=1, keepdim=True).double() * share - 1e-9)
    # Two sorts instead of a fill with the lowest number, which a score may equal.
    by_score = torch.argsort(torch.where(mask, scores, 0), dim=1, descending=True, stable=True)
    order = by_score.gather(1, torch.argsort((~mask).gather(1, by_score).int(), dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mask.size(1), device=mask.device).expand_as(order))
    return mask & (rank < wanted)
