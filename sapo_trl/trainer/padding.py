"""
How little padding a model can be made to compute: which rows go through it together, and where in them they lie.

A rollout comes as prompts padded on the left beside responses padded on the right, all as wide as the longest of each.
Rows of similar length go through the model together ([`group_rows`]), moved so that all of them end in the last column
([`RightAligned`]): what is left of the padding is the difference between a row and the longest of its group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid


def group_rows(lengths: Sequence[int], num_groups: int, max_tokens: int | None = None) -> list[list[int]]:
    """
    Partition rows into groups of similar length such that the padded groups have the fewest tokens altogether.

    Args:
        lengths (`Sequence[int]`): tokens of each row without padding; B of them.
        num_groups (`int`): number of groups, none of them empty; at most B.
        max_tokens (`int`, *optional*):
            what a group may have, its number of rows times its longest. Ignored where no partition keeps to it.

    Returns:
        `list[list[int]]`: rows of each group, the longest ones first: what does not fit into memory is found at once.
    """
    lengths = np.asarray(lengths)
    if not 1 <= num_groups <= len(lengths):
        raise ValueError(f"num_groups={num_groups} must lie between 1 and the number of rows, {len(lengths)}.")
    order = np.argsort(-lengths, kind="stable")
    # Of the rows sorted, a group from i to j - 1 has j - i rows as long as row i: (B, B + 1), infinite for j <= i.
    sizes = np.arange(len(lengths) + 1) - np.arange(len(lengths))[:, None]
    tokens = np.where(sizes > 0, sizes * lengths[order][:, None], np.inf)
    cuts = None
    if max_tokens is not None:
        cuts = _cheapest_cuts(np.where(tokens <= max_tokens, tokens, np.inf), num_groups)
    if cuts is None:
        cuts = _cheapest_cuts(tokens, num_groups)
    return [order[start:end].tolist() for start, end in zip(cuts[:-1], cuts[1:], strict=True)]


def equal_groups(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    """
    The same with as many rows in each group, for losses that weigh micro-batches alike.

    Args:
        lengths (`Sequence[int]`): tokens of each row without padding.
        num_groups (`int`): number of groups; divides the number of rows.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return order.reshape(num_groups, -1).tolist()


def _cheapest_cuts(tokens: np.ndarray, num_groups: int) -> list[int] | None:
    """Where to cut sorted rows for the fewest tokens, by dynamic programming; `None` if every way is infinite."""
    best, choices = tokens[0], []
    for _ in range(num_groups - 1):
        # The first rows up to i are groups already, those from i to j - 1 become one more.
        totals = best[:-1, None] + tokens
        choices.append(totals.argmin(0))
        best = totals.min(0)
    if not np.isfinite(best[-1]):
        return None
    cuts = [len(tokens)]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return [0, *reversed(cuts)]


def merge_rows(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Batches of one rollout as one, in which images come apart by row: for [`take_rows`]."""
    parts = [split_pixel_values_by_grid(batch) for batch in batches]
    merged = {}
    for name, first in parts[0].items():
        if isinstance(first, list):
            merged[name] = [value for part in parts for value in part[name]]
        elif torch.is_tensor(first) and first.ndim > 0:
            merged[name] = torch.cat([part[name] for part in parts])
        else:
            merged[name] = first
    return merged


def take_rows(merged: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of what [`merge_rows`] returns, in this order, as a batch of their own."""
    taken = {}
    for name, value in merged.items():
        if isinstance(value, list):
            taken[name] = [value[row] for row in rows]
        elif torch.is_tensor(value) and value.ndim > 0:
            taken[name] = value[torch.tensor(rows, device=value.device)]
        else:
            taken[name] = value
    return unsplit_pixel_values_by_grid(taken)


@dataclass(frozen=True)
class RightAligned:
    """
    Rows moved so that all of them end in the last column, and the columns in front that none of them needs left out.

    Args:
        width (`int`): columns that are left.
        source (`torch.Tensor`): int64 `(B, width)`, the column that each token comes from.
        target (`torch.Tensor`): int64 `(B, W)`, the column that each token has gone to; negative: none.
    """

    width: int
    source: torch.Tensor
    target: torch.Tensor

    @classmethod
    def of(cls, attention_mask: torch.Tensor, width: int | None = None) -> RightAligned:
        """
        Args:
            attention_mask (`torch.Tensor`): `(B, W)`, each row's tokens without a gap between the first and the last.
            width (`int`, *optional*): length of the longest row, where it is known: else it is asked of the device.
        """
        columns = torch.arange(attention_mask.size(1), device=attention_mask.device)
        is_token = attention_mask.bool()
        # Tokens end in front of column `end`; a row of padding alone stays where it is.
        end = torch.where(is_token, columns + 1, 0).amax(1)
        end = torch.where(end == 0, len(columns), end)
        if width is None:
            first = torch.where(is_token, columns, len(columns)).amin(1)
            width = max(int((end - first).max()), 1)
        shift = (len(columns) - end)[:, None]
        moved = torch.arange(len(columns) - width, len(columns), device=attention_mask.device)
        source = (moved - shift) % len(columns)
        target = columns + shift - (len(columns) - width)
        return cls(width, source, torch.where(target < width, target, -1))

    def move(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, W)` to `(B, width)`."""
        return tokens.gather(1, self.source)

    def restore(self, outputs: torch.Tensor) -> torch.Tensor:
        """What was computed at moved tokens, `(B, width)` or fewer columns, at their places: `(B, W)`, else 0."""
        if outputs.size(1) == 0:
            return outputs.new_zeros(self.target.shape)
        is_there = (self.target >= 0) & (self.target < outputs.size(1))
        return torch.where(is_there, outputs.gather(1, self.target.clamp(0, outputs.size(1) - 1)), 0)
