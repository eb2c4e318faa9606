"""
Segmenters: where to cut a response.

A segmenter is any callable `(entropies, mask) -> Segments`. One that also names `logps`, `completion_ids` or
`tokenizer` among its parameters gets those too; see [`Segmenter`]. Everything handed to a segmenter comes from the
policy that produced the rollout.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch

from .segments import Segments


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


__all__ = [
    "CutpointSegmenter",
    "EntropySegmenter",
    "NewlineSegmenter",
    "ProbabilitySegmenter",
    "Segmenter",
    "Segments",
    "SequenceSegmenter",
    "StepSegmenter",
    "TokenSegmenter",
    "accepted_inputs",
    "entropy_segments",
    "is_uncertain",
    "token_texts",
]


class Segmenter(Protocol):
    """
    What the trainer calls once per rollout.

    Args:
        entropies (`torch.Tensor`): float32 tensor of shape `(B, T)`, entropy of the old policy at each token.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens to partition; holes are allowed.
        logps (`torch.Tensor`): float32 tensor of shape `(B, T)`, log-probability of each sampled token. Optional.
        completion_ids (`torch.Tensor`): int64 tensor of shape `(B, T)`. Optional.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): optional.

    Returns:
        [`Segments`]: must cover the mask exactly.
    """

    def __call__(self, entropies: torch.Tensor, mask: torch.Tensor) -> Segments: ...


def accepted_inputs(segmenter: Segmenter) -> list[str]:
    """Which of the optional inputs a segmenter takes."""
    optional = ["logps", "completion_ids", "tokenizer"]
    parameters = inspect.signature(segmenter).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return optional
    return [name for name in optional if name in parameters]


def entropy_segments(
    entropies: torch.Tensor, mask: torch.Tensor, top_percent: float = 30.0, cut: str = "end"
) -> Segments:
    """
    Cut each response at its own highest-entropy tokens (the SAPO paper's segmentation).

    A response of `n` tokens is cut at its `max(1, ceil(n * top_percent / 100))` highest-entropy tokens; of equal
    entropies the earlier token is taken. Rows do not influence each other.

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
    # In float64 with the product first, the quotient of exact integers is exact; the small offset keeps a percentage
    # that has no exact representation (33.3) from being pushed over the next integer.
    num_cuts = torch.ceil(mask.sum(dim=1).double() * top_percent / 100 - 1e-9).long().clamp(min=1)
    return _cut_at_largest(entropies, mask, num_cuts, cut)


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
    Cut at a fixed number of tokens per response: those the old policy found least probable (the paper's "prob"
    ablation).

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
        return _cut_at_largest(-logps, mask.bool(), num_cuts, self.cut)


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
class NewlineSegmenter:
    """
    One segment per line: a segment ends with the last token of a run of tokens that contain a line break.

    A line has text. Blank lines before the first one belong to it, and so do blanks and special tokens (the end of the
    sequence) behind the last one to that.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            tokenizer of the completions; by default the one that the trainer passes with each call.
    """

    tokenizer: PreTrainedTokenizerBase | None = None

    def __call__(
        self,
        entropies: torch.Tensor,
        mask: torch.Tensor,
        completion_ids: torch.Tensor,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Segments:
        mask = mask.bool()
        tokenizer = _given(self.tokenizer, tokenizer)
        texts, special = token_texts(tokenizer, completion_ids), set(tokenizer.all_special_ids)
        has_newline = torch.tensor(["\n" in text for text in texts], device=completion_ids.device)
        has_text = torch.tensor(
            [text.strip() != "" and index not in special for index, text in enumerate(texts)],
            device=completion_ids.device,
        )
        is_newline, is_text = has_newline[completion_ids] & mask, has_text[completion_ids] & mask
        # Whether the next token of the row (across holes) is a newline too: then this one does not end the line.
        ends_line = is_newline & ~_next_in_mask(is_newline, mask)
        # A line without text is none, and neither is what follows the last text.
        lines = Segments.from_last_tokens(ends_line, mask)
        line_has_text = lines.expand(lines.sum(is_text)) > 0
        text_so_far = torch.cumsum(is_text, dim=1)
        text_follows = text_so_far < text_so_far[:, -1:]
        return Segments.from_last_tokens(ends_line & line_has_text & text_follows, mask)


@dataclass(frozen=True)
class StepSegmenter:
    """
    One segment per announced step: a segment starts with the token in which a match of `pattern` starts.

    Finding text in token sequences is the one thing here that works row by row on strings, once per rollout.

    Args:
        pattern (`str`, *optional*, defaults to `r"Step\\s*\\d+\\s*[:.]"`):
            regular expression of a step's announcement.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            tokenizer of the completions; by default the one that the trainer passes with each call.
    """

    pattern: str = r"Step\s*\d+\s*[:.]"
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"`pattern` is not a regular expression: {self.pattern!r} ({error}).") from error

    def __call__(
        self,
        entropies: torch.Tensor,
        mask: torch.Tensor,
        completion_ids: torch.Tensor,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Segments:
        mask = mask.bool()
        texts = token_texts(_given(self.tokenizer, tokenizer), completion_ids)
        is_first = torch.zeros_like(mask)
        for row, (ids, keep) in enumerate(zip(completion_ids.tolist(), mask.tolist(), strict=True)):
            positions = [position for position, kept in enumerate(keep) if kept]
            pieces = [texts[ids[position]] for position in positions]
            starts = torch.tensor([0, *accumulate(len(piece) for piece in pieces)])
            text = "".join(pieces)
            # A pattern may also match the empty end of the text, where no token starts.
            offsets = torch.tensor([m.start() for m in re.finditer(self.pattern, text) if m.start() < len(text)])
            # The token that covers a character is the last one that starts at or before it.
            tokens = torch.searchsorted(starts, offsets, right=True) - 1
            is_first[row, torch.tensor(positions, dtype=torch.long)[tokens.long()]] = True
        return Segments.from_first_tokens(is_first, mask)


@dataclass(frozen=True)
class TokenSegmenter:
    """Every token is a segment: token-level PPO."""

    def __call__(self, entropies: torch.Tensor, mask: torch.Tensor) -> Segments:
        return Segments.from_last_tokens(mask, mask)


@dataclass(frozen=True)
class SequenceSegmenter:
    """Every response is one segment: the ratio is GSPO's."""

    def __call__(self, entropies: torch.Tensor, mask: torch.Tensor) -> Segments:
        return Segments.from_last_tokens(torch.zeros_like(mask), mask)


def _check_cut(cut: str) -> Callable[[torch.Tensor, torch.Tensor], Segments]:
    if cut == "end":
        return Segments.from_last_tokens
    if cut == "start":
        return Segments.from_first_tokens
    raise ValueError(f'`cut` must be "end" or "start", got {cut!r}.')


def _cut_at_largest(scores: torch.Tensor, mask: torch.Tensor, num_cuts: torch.Tensor, cut: str) -> Segments:
    """Cut each row at its `num_cuts` (`(B,)`) largest unmasked scores; the earlier of equal scores first."""
    build = _check_cut(cut)
    if scores.shape != mask.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and mask {tuple(mask.shape)} must have the same shape.")
    most = min(int(num_cuts.max()), scores.size(1)) if scores.numel() else 0
    if most == 0:
        return build(torch.zeros_like(mask), mask)
    scores = scores.masked_fill(~mask, -torch.inf)
    # The smallest score that is cut at is found faster than the order of all. `topk` orders equal scores as it likes:
    # which of those at the threshold are taken is counted from the left.
    num_cuts = num_cuts.unsqueeze(1)
    threshold = scores.topk(most, dim=1).values.gather(1, num_cuts.clamp(1, most) - 1)
    above, at_threshold = scores > threshold, scores == threshold
    num_left = num_cuts - above.sum(dim=1, keepdim=True)
    selected = above | (at_threshold & (at_threshold.cumsum(dim=1) <= num_left))
    return build(selected & mask, mask)


def _next_in_mask(flags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """For each position, the flag of the nearest masked position to its right (`False` without one)."""
    positions = torch.arange(mask.size(1), device=mask.device).expand_as(mask)
    beyond = mask.size(1)
    nearest = torch.cummin(positions.masked_fill(~mask, beyond).flip(1), dim=1).values.flip(1)
    following = torch.cat([nearest[:, 1:], torch.full_like(nearest[:, :1], beyond)], dim=1)
    return torch.cat([flags, torch.zeros_like(flags[:, :1])], dim=1).gather(1, following)


def _given(own: PreTrainedTokenizerBase | None, passed: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    tokenizer = passed if own is None else own
    if tokenizer is None:
        raise ValueError("This segmenter reads text: give it a `tokenizer`.")
    return tokenizer


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """The text of every token id up to the largest of `ids` at least; "" for ids that only padded embeddings have."""
    texts = _decoded_vocabulary(tokenizer)
    largest_id = int(ids.max()) if ids.numel() else -1
    return texts + [""] * (largest_id + 1 - len(texts))


@lru_cache(maxsize=4)
def _decoded_vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # Decoded one by one, so that the texts of a response's tokens join to text whose offsets map back to tokens.
    return tokenizer.batch_decode([[token_id] for token_id in range(len(tokenizer))])
