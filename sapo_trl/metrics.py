"""Measurements of a rollout, and their way from micro-batches to the log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from .advantages import masked_moments
from .segments import Segments


# For each mean its sum and its number of items, so that micro-batches and processes can be combined exactly.
Measurements = dict[str, tuple[torch.Tensor, torch.Tensor | float]]


def mean_over(mean: torch.Tensor, count: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor | float]:
    """A mean over `count` items as an entry of [`Measurements`]."""
    return mean.detach() * count, count


def explained_variance(
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Share of the returns' variance that the critic's values explain: `1 - Var(returns - values) / Var(returns)`.

    Args:
        values (`torch.Tensor`): float tensor of shape `(B, T)`.
        returns (`torch.Tensor`): float tensor of shape `(B, T)`.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the states that count.
        reduce (`Callable`, *optional*): sums a tensor over all processes, see [`~sapo_trl.advantages.masked_moments`].

    Returns:
        `torch.Tensor`: 0-dimensional, at most 1; 0 means no better than the mean; NaN if the returns do not vary.
    """
    _, residual_variance = masked_moments(returns - values, mask, reduce)
    _, variance = masked_moments(returns, mask, reduce)
    # Below float32 resolution "variance" is rounding noise of equal returns.
    return torch.where(variance > 1e-12, 1 - residual_variance / variance, torch.nan)


def segment_statistics(
    segments: Segments, entropies: torch.Tensor, values: torch.Tensor | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Describe a partition: number and length of segments, and whether entropy and value change at its cuts.

    A *cut* is the last token of a segment. The value change at a token is `|V(after it) - V(before it)|`, known for
    every token that another one follows.

    Args:
        segments ([`Segments`]): partition of `(B, T)` tokens.
        entropies (`torch.Tensor`): float tensor of shape `(B, T)`.
        values (`torch.Tensor`, *optional*): float tensor of shape `(B, T)`; the value of the state before each token.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`:
            for each mean its sum and its number of items (0-dimensional), so that processes can be combined exactly:
            `segments/count`, `segments/length`, `segments/single_token_share`, `segments/entropy_at_cuts`,
            `segments/entropy_elsewhere`, and with `values` `segments/value_change_at_cuts` and
            `segments/value_change_elsewhere`.
    """
    mask, cut = segments.mask, segments.is_last
    exists = segments.lengths > 0
    has_tokens = segments.count > 0

    def total(x: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.where(where, x, 0).sum().float(), where.sum().float()

    statistics = {
        "segments/count": total(segments.count, has_tokens),
        "segments/length": total(segments.lengths, exists),
        "segments/single_token_share": total((segments.lengths == 1).float(), exists),
        "segments/entropy_at_cuts": total(entropies, cut),
        "segments/entropy_elsewhere": total(entropies, mask & ~cut),
    }
    if values is not None:
        # Tokens are compared with the next token of the same row's mask, across holes.
        order = torch.argsort((~mask).int(), dim=1, stable=True)
        packed_values, packed_mask, packed_cut = values.gather(1, order), mask.gather(1, order), cut.gather(1, order)
        change = (packed_values[:, 1:] - packed_values[:, :-1]).abs()
        followed = packed_mask[:, 1:]
        statistics["segments/value_change_at_cuts"] = total(change, followed & packed_cut[:, :-1])
        statistics["segments/value_change_elsewhere"] = total(change, followed & ~packed_cut[:, :-1])
    return statistics


class MetricAccumulator:
    """
    Weighted means gathered on the device, reduced over processes and read back once per flush.

    Reading every metric of every micro-batch with `.item()` would stall the device dozens of times a step.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = defaultdict(float)
        self._weights: dict[str, torch.Tensor] = defaultdict(float)
        self._maxima: dict[str, torch.Tensor] = {}

    def add_mean(self, name: str, value: torch.Tensor, weight: torch.Tensor | float = 1.0) -> None:
        """Add a mean over `weight` items."""
        self.add_total(name, *mean_over(value, weight))

    def add(self, measurements: Measurements) -> None:
        """Add several means."""
        for name, (total, count) in measurements.items():
            self.add_total(name, total, count)

    def add_total(self, name: str, total: torch.Tensor, count: torch.Tensor | float) -> None:
        """Add the sum of `count` items."""
        self._sums[name] = self._sums[name] + total
        self._weights[name] = self._weights[name] + count

    def add_max(self, name: str, value: torch.Tensor) -> None:
        """Add a value to a running maximum."""
        value = value.detach().float()
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def flush(self, accelerator) -> dict[str, float]:
        """
        Combine the processes' numbers, return them and start anew. Every process must have added the same names.

        Args:
            accelerator ([`~accelerate.Accelerator`]): of the run.

        Returns:
            `dict[str, float]`: NaN for a mean over no items.
        """
        device = accelerator.device
        names, max_names = sorted(self._sums), sorted(self._maxima)
        result: dict[str, float] = {}
        if names:
            rows = [[_scalar(self._sums[name], device), _scalar(self._weights[name], device)] for name in names]
            totals = torch.stack([torch.stack(row) for row in rows])
            totals = accelerator.reduce(totals, reduction="sum")
            result.update(zip(names, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))
        if max_names:
            maxima = torch.stack([_scalar(self._maxima[name], device) for name in max_names])
            maxima = accelerator.gather(maxima.unsqueeze(0)).amax(dim=0)
            result.update(zip(max_names, maxima.tolist(), strict=True))
        for accumulated in (self._sums, self._weights, self._maxima):
            accumulated.clear()
        return result


def _scalar(x: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float32, device=device)
