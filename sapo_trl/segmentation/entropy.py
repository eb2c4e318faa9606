"""Segmenters that read probabilities: entropy, least probable tokens, cut-points; and the two extremes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..segments import Segments


def entropy_segments(
    entropies: torch.Tensor, mask: torch.Tensor, top_percent: float = 30.0, cut: str = "end"
) -> Segments:
    """
    Cut each response at its own highest-entropy tokens (the SAPO paper's segmentation).

    A response of `n` tokens is cut at its `max(1, ceil(n * top_percent / 100))` highest-entropy tokens, and at the
    ends of its turns. Among equal entropies the earlier token is taken. Rows do not influence each other.

    Args:
        entropies (`torch.Tensor`): float tensor of shape `(B, T)`. Values outside the mask are ignored.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens to partition; holes are allowed.
        top_percent (`float`, *optional*, defaults to `30.0`):
            share of each response's tokens to cut at, in percent: in `(0, 100]`. `100` makes every token a segment.
        cut (`str`, *optional*, defaults to `"end"`):
            `"end"`: a selected token is the last of its segment (the paper); `"start"`: the first of its segment.

    Returns:
        [`Segments`]

    Raises:
        ValueError: if `top_percent` or `cut` is out of range.
    """
    check_top_percent(top_percent)
    mask = mask.bool()
    # In float64 with the product first, the quotient of exact integers is exact. The small offset keeps a percentage
    # without exact representation (33.3) from exceeding the next integer.
    num_cuts = torch.ceil(mask.sum(dim=1).double() * top_percent / 100 - 1e-9).long().clamp(min=1)
    return cut_at_largest(entropies, mask, num_cuts, cut)


def check_top_percent(top_percent: float) -> None:
    """Raise a `ValueError` unless `top_percent` is in `(0, 100]`."""
    if not 0.0 < top_percent <= 100.0:
        raise ValueError(
            f"`top_percent` is the share of tokens to cut at, in percent: it must lie in (0, 100], got {top_percent}."
        )


@dataclass(frozen=True)
class EntropySegmenter:
    """
    [`entropy_segments`] as a segmenter.

    Args:
        top_percent (`float`, *optional*, defaults to `30.0`): share of tokens to cut at, in percent, in `(0, 100]`.
        cut (`str`, *optional*, defaults to `"end"`): whether a selected token ends or starts its segment.
    """

    top_percent: float = 30.0
    cut: str = "end"

    def __post_init__(self):
        check_top_percent(self.top_percent)
        _check_cut(self.cut)

    def __call__(self, entropies: torch.Tensor, mask: torch.Tensor) -> Segments:
        return entropy_segments(entropies, mask, self.top_percent, self.cut)


@dataclass(frozen=True)
class ProbabilitySegmenter:
    """
    Cut each response at a fixed number of tokens: the tokens that the old policy found least probable (the paper's
    "prob" ablation).

    Args:
        num_cuts (`int`, *optional*, defaults to `8`):
            number of tokens to cut at; a shorter response is cut everywhere.
        cut (`str`, *optional*, defaults to `"end"`): whether a selected token ends or starts its segment.
    """

    num_cuts: int = 8
    cut: str = "end"

    def __post_init__(self):
        if self.num_cuts < 1:
            raise ValueError(f"`num_cuts` must be at least 1, got {self.num_cuts}.")
        _check_cut(self.cut)

    def __call__(self, entropies: torch.Tensor, mask: torch.Tensor, logps: torch.Tensor) -> Segments:
        num_cuts = torch.full((mask.size(0),), self.num_cuts, device=mask.device)
        return cut_at_largest(-logps, mask.bool(), num_cuts, self.cut)


@dataclass(frozen=True)
class CutpointSegmenter:
    """
    Cut where the old policy was unsure, at every `interval`-th such token (SPO-chain,
    https://huggingface.co/papers/2505.23564, as its official code does it).

    A *cut-point* is a token with probability below `threshold`. The first, the `interval + 1`-th, … cut-point of a
    response opens a segment. The tokens before the first cut-point, all of them confident, are a segment of their own.

    Args:
        threshold (`float`, *optional*, defaults to `0.9`): probability below which a token is a cut-point, in (0, 1].
        interval (`int`, *optional*, defaults to `5`): cut-points in a segment.
    """

    threshold: float = 0.9
    interval: int = 5

    def __post_init__(self):
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"`threshold` must lie in (0, 1], got {self.threshold}.")
        if self.interval < 1:
            raise ValueError(f"`interval` must be at least 1, got {self.interval}.")

    def __call__(self, entropies: torch.Tensor, mask: torch.Tensor, logps: torch.Tensor) -> Segments:
        is_cutpoint = is_uncertain(logps, self.threshold) & mask.bool()
        index = torch.cumsum(is_cutpoint, dim=1) - 1
        return Segments.from_first_tokens(is_cutpoint & (index % self.interval == 0), mask)


def is_uncertain(logps: torch.Tensor, threshold: float) -> torch.Tensor:
    """bool tensor of the shape of `logps`: the tokens whose probability is below `threshold`."""
    return logps.exp() < threshold


@dataclass(frozen=True)
class TokenSegmenter:
    """Every token is a segment: token-level PPO."""

    def __call__(self, entropies: torch.Tensor, mask: torch.Tensor) -> Segments:
        return Segments.from_last_tokens(mask, mask)


@dataclass(frozen=True)
class SequenceSegmenter:
    """Every response is one segment, over all of its turns: the ratio is GSPO's."""

    def __call__(self, entropies: torch.Tensor, mask: torch.Tensor) -> Segments:
        return Segments(mask.long() - 1)


def _check_cut(cut: str) -> Callable[[torch.Tensor, torch.Tensor], Segments]:
    if cut == "end":
        return Segments.from_last_tokens
    if cut == "start":
        return Segments.from_first_tokens
    raise ValueError(f'`cut` must be "end" or "start", got {cut!r}.')


def cut_at_largest(scores: torch.Tensor, mask: torch.Tensor, num_cuts: torch.Tensor, cut: str) -> Segments:
    """Cut each row at its `num_cuts` (`(B,)`) largest unmasked scores; the earlier of equal scores first."""
    build = _check_cut(cut)
    if scores.shape != mask.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and mask {tuple(mask.shape)} must have the same shape.")
    most = min(int(num_cuts.max()), scores.size(1)) if scores.numel() else 0
    if most == 0:
        return build(torch.zeros_like(mask), mask)
    scores = scores.masked_fill(~mask, -torch.inf)
    # Finding the threshold, the smallest score that is cut at, is faster than sorting all scores. `topk` orders equal
    # scores arbitrarily, so scores equal to the threshold are taken from the left.
    num_cuts = num_cuts.unsqueeze(1)
    threshold = scores.topk(most, dim=1).values.gather(1, num_cuts.clamp(1, most) - 1)
    above, at_threshold = scores > threshold, scores == threshold
    num_left = num_cuts - above.sum(dim=1, keepdim=True)
    selected = above | (at_threshold & (at_threshold.cumsum(dim=1) <= num_left))
    return build(selected & mask, mask)
