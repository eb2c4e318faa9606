"""
Less padding to compute: rows are grouped by length and moved to the last column.

A rollout pads its prompts on the left and its responses on the right, to the longest prompt and the longest response.
Rows of similar length go through the model together ([`group_rows`]), moved so that all of them end in the last column
([`RightAligned`]). The remaining padding is the difference between a row and the longest row of its group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid


# The largest group may be this many times the smallest possible one, for the sake of less padding.
_SLACK = 1.2


def group_rows(lengths: Sequence[int], num_groups: int, max_tokens: int | None = None) -> list[list[int]]:
    """
    Partition rows into groups of similar length, so that the padded groups have few tokens in total.

    Minimising padding alone gives very unequal groups if lengths are nearly the same: one group may have a single row,
    another half of all rows (and images). So two limits hold: a group has at most twice as many rows as in an equal
    partition, and the largest group is at most 1.2 times the smallest possible one. A tie goes to the partition with
    the most even numbers of rows.

    Args:
        lengths (`Sequence[int]`): tokens of each row without padding; B of them.
        num_groups (`int`): number of groups, none of them empty; at most B.
        max_tokens (`int`, *optional*):
            limit on a group's number of rows times the length of its longest row. Ignored if no partition keeps to it.

    Returns:
        `list[list[int]]`: rows of each group, the longest rows first: a lack of memory shows at once.
    """
    return cut_rows(lengths, common_cuts([lengths], num_groups, max_tokens))


def common_cuts(
    lengths: Sequence[Sequence[int]] | np.ndarray, num_groups: int, max_tokens: int | None = None
) -> list[int]:
    """
    Find cuts for processes that go through their groups in lockstep. Each cuts its own rows, all at the same places.

    At its k-th group, every process waits for the process with the largest k-th group. The cuts minimise the sum of
    the tokens of these largest groups. The limits of [`group_rows`] hold, over all processes.

    Args:
        lengths (`Sequence[Sequence[int]]`): `(P, B)`, tokens of each process's rows without padding.
        num_groups (`int`): number of groups, none of them empty; at most B.
        max_tokens (`int`, *optional*):
            limit on a group's padded tokens, on every process. Ignored if no cuts keep to it.

    Returns:
        `list[int]`: `num_groups + 1` cuts from 0 to B, for [`cut_rows`].
    """
    # The k-th groups have equally many rows on all processes, so the longest row decides which of them is the largest.
    # Only the longest row at each place in the order counts.
    longest = np.sort(lengths, axis=1)[:, ::-1].max(0)
    if not 1 <= num_groups <= len(longest):
        raise ValueError(f"num_groups={num_groups} must lie between 1 and the number of rows, {len(longest)}.")
    max_rows = min(2 * -(-len(longest) // num_groups), len(longest))
    # Padded tokens of each possible group of the sorted rows, (max_rows, B + 1). The group at (k, j) has k + 1 rows
    # and ends in front of row j.
    sizes = np.arange(1, max_rows + 1)[:, None]
    starts = np.arange(len(longest) + 1) - sizes
    tokens = np.where(starts >= 0, sizes * longest[starts], np.inf)
    largest, _ = _best_cuts(tokens, num_groups, np.maximum)
    tokens[tokens > _SLACK * largest] = np.inf
    # Sums of tokens are whole numbers. The squares add up to less than 1, so they only decide between equal sums.
    costs = tokens + sizes**2 / (len(longest) ** 2 + 1)
    total = np.inf
    if max_tokens is not None:
        total, cuts = _best_cuts(np.where(tokens <= max_tokens, costs, np.inf), num_groups, np.add)
    if not np.isfinite(total):
        _, cuts = _best_cuts(costs, num_groups, np.add)
    return cuts


def cut_rows(lengths: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    """
    Cut rows into groups, from the longest row to the shortest; rows of equal length stay in their order.

    Args:
        lengths (`Sequence[int]`): tokens of each row without padding; B of them.
        cuts (`Sequence[int]`): where a group ends and the next one begins, from 0 to B.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start:end].tolist() for start, end in zip(cuts[:-1], cuts[1:], strict=True)]


def equal_groups(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    """
    Partition rows by length into groups with equally many rows, for losses that weigh micro-batches alike.

    Args:
        lengths (`Sequence[int]`): tokens of each row without padding.
        num_groups (`int`): number of groups. If it does not divide the number of rows, the first have one more.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [group.tolist() for group in np.array_split(order, num_groups)]


def _best_cuts(costs: np.ndarray, num_groups: int, combine: np.ufunc) -> tuple[float, list[int]]:
    """
    Find the cheapest cuts of sorted rows into groups, by dynamic programming.

    Args:
        costs (`np.ndarray`): float `(max_rows, B + 1)`, at `(k, j)` the cost of the group of `k + 1` rows that ends in
            front of row `j`. An infinite cost forbids the group.
        num_groups (`int`): number of groups.
        combine (`np.ufunc`): combines the costs of two groups: `np.add` for the sum, `np.maximum` for the largest.

    Returns:
        `tuple[float, list[int]]`: the lowest cost, infinite if no cuts are possible, and the `num_groups + 1` cuts.
    """
    starts = np.arange(costs.shape[1]) - np.arange(1, len(costs) + 1)[:, None]
    # Lowest cost of the rows in front of j, without any group so far: 0 for no rows, impossible for some.
    best, choices = np.full(costs.shape[1], np.inf), []
    best[0] = 0
    for _ in range(num_groups):
        totals = combine(best[starts], costs)
        choices.append(totals.argmin(0))
        best = totals.min(0)
    cuts = [costs.shape[1] - 1]
    for choice in reversed(choices):
        cuts.append(cuts[-1] - int(choice[cuts[-1]]) - 1)
    return float(best[-1]), cuts[::-1]


def merge_rows(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the batches of one rollout, with the images split by row, for [`take_rows`]."""
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
    """Make a batch of some rows of the result of [`merge_rows`], in the order of `rows`."""
    taken = {}
    for name, value in merged.items():
        if isinstance(value, list):
            taken[name] = [value[row] for row in rows]
        elif torch.is_tensor(value) and value.ndim > 0:
            taken[name] = value[torch.tensor(rows, device=value.device)]
        else:
            taken[name] = value
    return unsplit_pixel_values_by_grid(taken)


def can_move_rows(text_config: PreTrainedConfig) -> bool:
    """
    Whether a model's outputs at a row depend neither on the columns that it lies in nor on the other rows.

    This holds for rotary position embeddings, with two exceptions: embeddings that depend on the longest row of a
    batch, and attention that is scaled by the position.
    """
    parameters = getattr(text_config, "rope_parameters", None)
    if parameters is None or getattr(text_config, "attn_temperature_tuning", False):
        return False
    # The parameters hold for the whole model, or are nested by type of layer.
    nested = all(isinstance(value, Mapping) or value is None for value in parameters.values())
    return all(
        each is not None
        and each.get("llama_4_scaling_beta") is None
        and not any(name in each.get("rope_type", "default") for name in ("dynamic", "longrope"))
        for each in (parameters.values() if nested else [parameters])
    )


def token_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """int64 `(B, W)`: the number of tokens before each token in its row, wherever the row lies."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True)
class RightAligned:
    """
    Rows moved so that all of them end in the last column, without the columns in front that no row needs.

    Args:
        width (`int`): number of columns that are left.
        source (`torch.Tensor`): int64 `(B, width)`, the column that each token comes from.
        target (`torch.Tensor`): int64 `(B, W)`, the column that each token has gone to; negative: none.
    """

    width: int
    source: torch.Tensor
    target: torch.Tensor

    @classmethod
    def of(cls, attention_mask: torch.Tensor, width: int | None = None, multiple: int | None = None) -> RightAligned:
        """
        Args:
            attention_mask (`torch.Tensor`): `(B, W)`, each row's tokens without a gap between the first and the last.
            width (`int`, *optional*): length of the longest row, if it is known: else the device must be asked.
            multiple (`int`, *optional*): round the width up to a multiple of this, but not beyond `W`.
        """
        columns = torch.arange(attention_mask.size(1), device=attention_mask.device)
        is_token = attention_mask.bool()
        # Tokens end in front of column `end`; a row of padding alone stays where it is.
        end = torch.where(is_token, columns + 1, 0).amax(1)
        end = torch.where(end == 0, len(columns), end)
        if width is None:
            first = torch.where(is_token, columns, len(columns)).amin(1)
            width = max(int((end - first).max()), 1)
        if multiple is not None:
            width = min(-(-width // multiple) * multiple, len(columns))
        shift = (len(columns) - end)[:, None]
        moved = torch.arange(len(columns) - width, len(columns), device=attention_mask.device)
        source = (moved - shift) % len(columns)
        target = columns + shift - (len(columns) - width)
        return cls(width, source, torch.where(target < width, target, -1))

    def move(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, W)` to `(B, width)`."""
        return tokens.gather(1, self.source)

    def restore(self, outputs: torch.Tensor) -> torch.Tensor:
        """Put outputs at moved tokens, `(B, width)` or fewer columns, back in their places: `(B, W)`, else 0."""
        if outputs.size(1) == 0:
            return outputs.new_zeros(self.target.shape)
        is_there = (self.target >= 0) & (self.target < outputs.size(1))
        return torch.where(is_there, outputs.gather(1, self.target.clamp(0, outputs.size(1) - 1)), 0)

    def move_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A model's inputs, the `(B, W)` tensors among them moved."""
        shape = inputs["input_ids"].shape
        return {
            name: self.move(value) if torch.is_tensor(value) and value.shape == shape else value
            for name, value in inputs.items()
        }

    def restore_outputs(self, outputs: Any) -> Any:
        """
        Put TRL's fused outputs at moved tokens back in their places.

        Position p predicts token p + 1, so the last position is left out: it predicts nothing.
        """
        outputs.log_probs = self.restore(outputs.log_probs)[:, :-1]
        if getattr(outputs, "entropy", None) is not None:
            outputs.entropy = self.restore(outputs.entropy)[:, :-1]
        return outputs
