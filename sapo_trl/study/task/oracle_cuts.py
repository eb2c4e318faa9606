"""Cuts where the task itself has its borders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers import PreTrainedTokenizerBase

from ...segmentation import token_texts
from ...segments import Segments
from .vocabulary import CELLS, LABELS


# The chosen cell of a step, for any rest of its line.
_DECISION = re.compile(rf"(?:^|(?<=\n))[{LABELS}] [^\n]*? ([{CELLS}])(?=\d)")
_STEP_END = re.compile(r"\n")

CUTS = ("steps", "line_pairs", "decisions")


@dataclass(frozen=True)
class OracleSegmenter:
    """
    Cut at the true borders of a response, which only the task knows.

    Args:
        cuts (`str`, *optional*, defaults to `"steps"`):
            `"steps"`: a segment ends with a step. `"line_pairs"`: a segment ends with every second step.
            `"decisions"`: a segment ends with the token that names the chosen cell, so that the next segment begins in
            the first state that knows the choice.
    """

    cuts: str = "steps"

    def __post_init__(self):
        if self.cuts not in CUTS:
            raise ValueError(f"`cuts` must be one of {', '.join(map(repr, CUTS))}, got {self.cuts!r}.")

    def __call__(
        self,
        entropies: torch.Tensor,
        mask: torch.Tensor,
        completion_ids: torch.Tensor,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Segments:
        mask = mask.bool()
        texts = token_texts(tokenizer, completion_ids)
        is_last = torch.zeros_like(mask)
        for row, (ids, keep) in enumerate(zip(completion_ids.tolist(), mask.tolist(), strict=True)):
            positions = [position for position, kept in enumerate(keep) if kept]
            pieces = [texts[ids[position]] for position in positions]
            for token in tokens_at(border_characters("".join(pieces), self.cuts), pieces):
                is_last[row, positions[token]] = True
        return Segments.from_last_tokens(is_last, mask)


def border_characters(response: str, cuts: str = "steps") -> list[int]:
    """The characters of a response that end a step, or every second step, or that name the chosen cells."""
    steps = [match.start() for match in _STEP_END.finditer(response)]
    if cuts == "steps":
        return steps
    if cuts == "line_pairs":
        return steps[1::2]
    return [match.start(1) for match in _DECISION.finditer(response)]


def tokens_at(characters: list[int], pieces: list[str]) -> list[int]:
    """Indices of the tokens (given by their texts) that cover certain characters of the joined text."""
    ends = torch.tensor(list(accumulate(len(piece) for piece in pieces)), dtype=torch.long)
    return torch.searchsorted(ends, torch.tensor(characters, dtype=torch.long), right=True).tolist()
