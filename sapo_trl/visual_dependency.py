"""
The dependence of each token on the picture: how far its log-probability moves when the images are corrupted. Pure
functions on tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .segments import accumulation_dtype


LOG_RATIO_BOUND = 20.0
DEPENDENCY_BOUND = 10.0


def visual_dependency(logps: torch.Tensor, logps_corrupted: torch.Tensor) -> torch.Tensor:
    """
    VPPO's dependency of each token: `exp(x) - x - 1`, at most 10, with `x = logps_corrupted - logps` within ±20.

    It is the k3 estimate of the divergence between the distributions with and without the picture, at least 0, and 0
    where both give the token the same probability. PAPO's perception loss is its mean under the current policy.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, log-probabilities given the images.
        logps_corrupted (`torch.Tensor`): the same given corrupted images.

    Returns:
        `torch.Tensor`: `(B, T)`, float32 or wider, differentiable.
    """
    dtype = accumulation_dtype(logps, logps_corrupted)
    x = (logps_corrupted.to(dtype) - logps.to(dtype)).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    # `expm1`: in float32 the two terms of a small difference would cancel to noise.
    return (torch.expm1(x) - x).clamp(0, DEPENDENCY_BOUND)


def mean_dependency(dependency: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`(B,)`: each response's mean over its tokens `(B, T)`, NaN for a response without tokens."""
    return torch.where(mask, dependency, 0).sum(dim=1) / mask.sum(dim=1)


class ResponseScale(NamedTuple):
    """The way from a response's mean dependency to its weight; 0-dimensional tensors."""

    low: torch.Tensor
    high: torch.Tensor
    slope: torch.Tensor

    @classmethod
    def of(cls, dependencies: torch.Tensor, smallest: float) -> ResponseScale:
        """
        The scale of the responses of a mini-batch, so that their mean weight is 1.

        With `n` a response's dependency, scaled from the smallest to the largest to `[0, 1]`, the weight is
        `b + (m - b) n` with `m = b + (1 - b) / mean(n)` and `b` the smallest weight.

        Args:
            dependencies (`torch.Tensor`): `(N,)`, NaN for a response without tokens.
            smallest (`float`): the smallest weight, in `[0, 1]`.
        """
        known = ~dependencies.isnan()
        low = torch.where(known, dependencies, torch.inf).amin()
        high = torch.where(known, dependencies, -torch.inf).amax()
        n = torch.where(known, (dependencies - low) / (high - low), 0)
        return cls(low, high, (1 - smallest) * known.to(n.dtype).sum() / n.sum())

    def largest(self, smallest: float) -> torch.Tensor:
        """0-dimensional, the largest weight."""
        return self.weights(self.high.unsqueeze(0), smallest)[0]

    def weights(self, dependencies: torch.Tensor, smallest: float) -> torch.Tensor:
        """`(B,)`: the responses' weights. They are 1 without tokens, or if dependencies differ by less than 1e-6."""
        weights = smallest + self.slope * (dependencies - self.low) / (self.high - self.low)
        compares = ~dependencies.isnan() & (self.high - self.low > 1e-6)
        return torch.where(compares, weights, 1)
