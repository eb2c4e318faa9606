"""Segmenters that spoil another segmenter's cuts at random, to learn how much the places of cuts matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..segments import Segments, turn_ends
from .entropy import cut_at_largest
from .segmenter import Segmenter, accepted_inputs


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Recut:
    """
    A segmenter that cuts another segmenter's partition anew, inside of turns. A subclass has a `seed` and implements
    `_cut`.

    Args:
        segmenter ([`~sapo_trl.segmentation.Segmenter`]): segmenter whose partition is cut anew.
    """

    segmenter: Segmenter

    def __post_init__(self):
        if isinstance(self.segmenter, type) or not callable(self.segmenter):
            raise TypeError(f"`segmenter` must be a callable `(entropies, mask) -> Segments`, got {self.segmenter!r}.")

    def __call__(
        self,
        entropies: torch.Tensor,
        mask: torch.Tensor,
        logps: torch.Tensor,
        completion_ids: torch.Tensor,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Segments:
        mask = mask.bool()
        available = {"logps": logps, "completion_ids": completion_ids, "tokenizer": tokenizer}
        given = {name: available[name] for name in accepted_inputs(self.segmenter)}
        segments = self.segmenter(entropies, mask, **given)
        return self._cut(segments, mask, _random_numbers(completion_ids, mask, self.seed))

    def _cut(self, segments: Segments, mask: torch.Tensor, draw: Callable[[int], torch.Tensor]) -> Segments:
        raise NotImplementedError


@dataclass(frozen=True)
class NoisyBoundaries(_Recut):
    """
    Another segmenter's partition in which each inner boundary is moved with a given probability.

    A boundary moves to a position drawn uniformly from the response's positions without a boundary. Two boundaries
    never take the same position, so the number of segments stays. If more boundaries would move than there are free
    positions, only as many move as there are positions. The end of a turn is no inner boundary and stays.

    The draw depends only on `seed` and on the response's own loss tokens, so a response is cut alike wherever and
    whenever it appears. The same numbers decide at every `rate`: with one seed, the boundaries that move at a lower
    rate also move at a higher one.

    Args:
        segmenter ([`~sapo_trl.segmentation.Segmenter`]): segmenter whose partition is spoiled.
        rate (`float`): probability of each inner boundary to be moved, in [0, 1].
        seed (`int`, *optional*, defaults to `0`): seed of the draws.

    Example:

    ```python
    trainer = SAPOTrainer(..., segmenter=NoisyBoundaries(EntropySegmenter(), rate=0.3))
    ```
    """

    rate: float
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(
                f"`rate` is the probability of a boundary to move: it must lie in [0, 1], got {self.rate}."
            )

    def _cut(self, segments: Segments, mask: torch.Tensor, draw: Callable[[int], torch.Tensor]) -> Segments:
        is_slot = _inner_positions(mask)
        is_boundary = segments.is_last & is_slot
        reluctance = draw(0)
        moves = is_boundary & (reluctance < self.rate)
        # The boundaries that stay come first, then free positions in random order. If these do not suffice, boundaries
        # that would have moved follow.
        scores = torch.where(moves, reluctance - 1, draw(1)).masked_fill(is_boundary & ~moves, 2.0)
        return cut_at_largest(scores.masked_fill(~is_slot, -torch.inf), mask, is_boundary.sum(dim=1), "end")


@dataclass(frozen=True)
class RandomCuts(_Recut):
    """
    Random cuts, as many per response as another segmenter makes inside of turns: every choice of that many different
    inner positions is equally likely.

    The draw depends only on `seed` and on the response's own loss tokens, see [`NoisyBoundaries`].

    Args:
        segmenter ([`~sapo_trl.segmentation.Segmenter`]): segmenter that decides on the number of segments.
        seed (`int`, *optional*, defaults to `0`): seed of the draws.
    """

    seed: int = 0

    def _cut(self, segments: Segments, mask: torch.Tensor, draw: Callable[[int], torch.Tensor]) -> Segments:
        is_slot = _inner_positions(mask)
        num_cuts = (segments.is_last & is_slot).sum(dim=1)
        return cut_at_largest(draw(2).masked_fill(~is_slot, -torch.inf), mask, num_cuts, "end")


def _inner_positions(mask: torch.Tensor) -> torch.Tensor:
    """bool `(B, T)`: the tokens that can close a segment without being the last of their turn."""
    return mask & ~turn_ends(mask)


def _random_numbers(completion_ids: torch.Tensor, mask: torch.Tensor, seed: int) -> Callable[[int], torch.Tensor]:
    """
    Streams of uniform numbers in (0, 1) of the mask's shape, `(B, T)` float64. They follow from the seed and each
    row's own tokens. Its place in the batch, padding and other random draws of the process do not matter.
    """
    # Positions are counted within the mask, and a row's key is an order-dependent sum of hashes of its tokens.
    position = torch.cumsum(mask, dim=1)
    hashed = _mix(_mix(completion_ids.long()) + position * _GOLDEN)
    start = _mix(torch.tensor(seed, dtype=torch.int64, device=mask.device))
    key = _mix(torch.where(mask, hashed, 0).sum(dim=1, keepdim=True) + start)

    def draw(stream: int) -> torch.Tensor:
        bits = _mix(_mix(key + stream) + position * _GOLDEN)
        # 52 bits and a half: with more, float64 could round up to 1.
        return (_shifted(bits, 12).double() + 0.5) * 2.0**-52

    return draw


# Constants of SplitMix64 (Steele, Lea and Flood, 2014) as signed integers. Integer tensors wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A permutation of the 64-bit integers without visible structure (SplitMix64's finaliser)."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right with zeros coming in: torch's shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
