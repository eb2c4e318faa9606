"""The partition of completions into segments: computed once per rollout, read by all later stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Widest dtype of `tensors`, float32 at least: values, advantages and ratios are never computed in half."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def turn_ends(mask: torch.Tensor) -> torch.Tensor:
    """
    The last token of each turn.

    A turn is a run of tokens that the policy wrote. Behind it, the policy reads a new observation, such as a tool's
    answer.

    Args:
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the policy's tokens.

    Returns:
        `torch.Tensor`: bool tensor of shape `(B, T)`.
    """
    return mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def turn_starts(mask: torch.Tensor) -> torch.Tensor:
    """The first token of each turn; see [`turn_ends`]."""
    return mask & ~torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)


@dataclass(frozen=True, eq=False)
class Segments:
    """
    A partition of each row's tokens into consecutive segments.

    Only `ids` is stored, so a partition can travel through a batch as one tensor; everything else follows from it. A
    row's tokens need not be contiguous: tool outputs and padding are holes (`-1`) that belong to no segment. A hole
    ends a turn. The two constructors from marks end a segment there; `ids` of your own may go on behind a hole.

    Args:
        ids (`torch.Tensor`):
            int64 tensor of shape `(B, T)`: the index of each token's segment, `0..count-1` from left to right without
            gaps, and `-1` for positions that belong to no segment.
        max_count (`int`, *optional*):
            the largest number of segments in a row, if known. Otherwise it is read from the device, once.

    Example:

    ```python
    >>> is_last = torch.tensor([[False, True, False, True, False]])
    >>> mask = torch.tensor([[True, True, False, True, True]])
    >>> segments = Segments.from_last_tokens(is_last, mask)
    >>> segments.ids
    tensor([[ 0,  0, -1,  1,  2]])
    >>> segments.mean(torch.tensor([[1.0, 3.0, 100.0, 5.0, 7.0]]))
    tensor([[2., 5., 7.]])
    ```
    """

    ids: torch.Tensor
    max_count: int | None = None

    def __post_init__(self):
        if self.ids.dim() != 2 or self.ids.dtype != torch.int64:
            raise ValueError(
                f"`ids` must be an int64 tensor of shape (batch, length), got {self.ids.dtype} of shape "
                f"{tuple(self.ids.shape)}."
            )

    def __repr__(self) -> str:
        """Short, without the tensor: the sizes and the numbers of segments."""
        counts = self.count
        rows, length = self.ids.shape
        numbers = f"{int(counts.min())} to {int(counts.max())}" if rows else "no"
        return f"Segments({rows} rows of {length} positions, {numbers} segments in a row, {self.ids.device})"

    @classmethod
    def from_last_tokens(cls, is_last: torch.Tensor, mask: torch.Tensor) -> Segments:
        """
        Build the partition whose segments end at the marked tokens.

        The last token of every turn, see [`turn_ends`], closes a segment whether or not it is marked; marks outside
        the mask are ignored.

        Args:
            is_last (`torch.Tensor`): bool tensor of shape `(B, T)`.
            mask (`torch.Tensor`): bool tensor of shape `(B, T)`, `True` for the tokens to partition.

        Returns:
            [`Segments`]
        """
        is_last, mask = _check_marks("is_last", is_last, mask)
        closes = (is_last & mask) | turn_ends(mask)
        # A token that closes a segment still belongs to it.
        ids = torch.cumsum(closes, dim=1) - closes.long()
        return cls(ids.masked_fill(~mask, -1))

    @classmethod
    def from_first_tokens(cls, is_first: torch.Tensor, mask: torch.Tensor) -> Segments:
        """
        Build the partition whose segments begin at the marked tokens.

        The first token of every turn, see [`turn_starts`], opens a segment whether or not it is marked; marks outside
        the mask are ignored.

        Args:
            is_first (`torch.Tensor`): bool tensor of shape `(B, T)`.
            mask (`torch.Tensor`): bool tensor of shape `(B, T)`, `True` for the tokens to partition.

        Returns:
            [`Segments`]
        """
        is_first, mask = _check_marks("is_first", is_first, mask)
        ids = torch.cumsum((is_first & mask) | turn_starts(mask), dim=1) - 1
        return cls(ids.masked_fill(~mask, -1))

    @cached_property
    def mask(self) -> torch.Tensor:
        """bool `(B, T)`: the tokens that belong to a segment."""
        return self.ids >= 0

    @cached_property
    def is_first(self) -> torch.Tensor:
        """bool `(B, T)`: the first token of each segment."""
        # `ids` never decreases over a row's tokens, so the running maximum is the id of the nearest token to the left.
        running = torch.cummax(self.ids, dim=1).values
        previous = torch.cat([torch.full_like(running[:, :1], -1), running[:, :-1]], dim=1)
        return self.mask & (self.ids > previous)

    @cached_property
    def is_last(self) -> torch.Tensor:
        """bool `(B, T)`: the last token of each segment."""
        beyond = torch.iinfo(torch.int64).max
        upcoming = torch.cummin(self.ids.masked_fill(~self.mask, beyond).flip(1), dim=1).values.flip(1)
        following = torch.cat([upcoming[:, 1:], torch.full_like(upcoming[:, :1], beyond)], dim=1)
        return self.mask & (self.ids < following)

    @cached_property
    def count(self) -> torch.Tensor:
        """int64 `(B,)`: number of segments in each row; 0 for a row without tokens."""
        if self.ids.size(1) == 0:
            return self.ids.new_zeros(self.ids.size(0))
        return self.ids.amax(dim=1) + 1

    @cached_property
    def lengths(self) -> torch.Tensor:
        """int64 `(B, M)`: number of tokens in each segment, 0 beyond a row's count."""
        return self._scatter(torch.ones_like(self.ids))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """
        Sum `x` over the tokens of each segment.

        Args:
            x (`torch.Tensor`): tensor of shape `(B, T)`. Outside the segments it may hold anything, NaN included.

        Returns:
            `torch.Tensor`: `(B, M)` with `M` the largest count in the batch, 0 beyond a row's count; float32 or wider.
            Differentiable.
        """
        return self._scatter(x.to(accumulation_dtype(x)))

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Like [`Segments.sum`], averaged over the tokens of each segment."""
        return self.sum(x) / self.lengths.clamp(min=1)

    def expand(self, y: torch.Tensor) -> torch.Tensor:
        """
        Give every token its segment's value.

        Args:
            y (`torch.Tensor`): tensor of shape `(B, M)`, as returned by [`Segments.sum`].

        Returns:
            `torch.Tensor`: `(B, T)`, 0 outside the segments. Differentiable.
        """
        if y.size(1) != self._max_count:
            raise ValueError(f"`y` must have one column a segment, {self._max_count}, got {y.size(1)}.")
        # One column of zeros for the tokens of no segment; it also keeps the gather legal when there are no segments.
        y = torch.cat([y, y.new_zeros(y.size(0), 1)], dim=1)
        return y.gather(1, self._columns)

    def at_state(self, x: torch.Tensor, value_state: str) -> torch.Tensor:
        """
        Read per-token `x` at the token whose preceding state stands for the segment.

        Args:
            x (`torch.Tensor`): tensor of shape `(B, T)`.
            value_state (`str`): see [`Segments.state_mask`].

        Returns:
            `torch.Tensor`: `(B, M)`, 0 beyond a row's count. Differentiable.
        """
        return self.sum(torch.where(self.state_mask(value_state), x, 0))

    def state_mask(self, value_state: str) -> torch.Tensor:
        """
        The one token of each segment whose preceding state stands for the segment.

        Args:
            value_state (`str`):
                `"start"`: the segment's first token, i.e. the state before the segment (the paper, Eq. 6);
                `"end"`: its last token, i.e. the state before that last token (the official code).

        Returns:
            `torch.Tensor`: bool tensor of shape `(B, T)`.
        """
        if value_state == "start":
            return self.is_first
        if value_state == "end":
            return self.is_last
        raise ValueError(f'`value_state` must be "start" or "end", got {value_state!r}.')

    @cached_property
    def _max_count(self) -> int:
        if self.max_count is not None:
            return self.max_count
        # The only host synchronisation of the class, once per partition.
        return int(self.count.max()) if self.ids.size(0) else 0

    @cached_property
    def _columns(self) -> torch.Tensor:
        """int64 `(B, T)`: each token's column in a `(B, M + 1)` tensor of segments; the last one is for no segment."""
        return torch.where(self.mask, self.ids, self._max_count)

    def _scatter(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape != self.ids.shape:
            raise ValueError(f"`x` must have the shape of the ids, {tuple(self.ids.shape)}, got {tuple(x.shape)}.")
        # Tokens of no segment are summed into one extra column that is then dropped, together with its gradient.
        sums = x.new_zeros(x.size(0), self._max_count + 1).scatter_add(1, self._columns, x)
        return sums[:, :-1]


def _check_marks(name: str, marks: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if marks.dim() != 2 or marks.shape != mask.shape:
        raise ValueError(
            f"`{name}` and `mask` must have the same shape (batch, length), got {tuple(marks.shape)} and "
            f"{tuple(mask.shape)}."
        )
    return marks.bool(), mask.bool()
