"""Segmenters that read text: lines and announced steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ..segments import Segments, turn_ends, turn_starts


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class NewlineSegmenter:
    """
    One segment per line: a segment ends with the last token of a run of tokens that contain a line break.

    Every line has text. Blank lines before the first line of a turn belong to it. Blanks and special tokens (the end
    of the turn) after the last line belong to the last line. A turn without text is one segment.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            tokenizer of the completions; by default the trainer's, passed with each call.
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
        # Of no texts at all, torch would make float32.
        as_flags = partial(torch.tensor, dtype=torch.bool, device=completion_ids.device)
        has_newline = as_flags(["\n" in text for text in texts])
        has_text = as_flags([text.strip() != "" and index not in special for index, text in enumerate(texts)])
        is_newline, is_text = has_newline[completion_ids] & mask, has_text[completion_ids] & mask
        # If the next token of the turn is a newline too, this one does not end the line.
        ends_line = is_newline & ~torch.cat([is_newline[:, 1:], torch.zeros_like(is_newline[:, :1])], dim=1)
        # A stretch without text is no line of its own. Neither is the rest of a turn after its last text.
        lines = Segments.from_last_tokens(ends_line, mask)
        line_has_text = lines.expand(lines.sum(is_text)) > 0
        turns = Segments.from_last_tokens(torch.zeros_like(mask), mask)
        text_so_far = torch.cumsum(is_text, dim=1)
        text_follows = text_so_far < turns.expand(turns.at_state(text_so_far, "end"))
        return Segments.from_last_tokens(ends_line & line_has_text & text_follows, mask)


@dataclass(frozen=True)
class StepSegmenter:
    """
    One segment per announced step: a segment starts with the token in which a match of `pattern` starts. Each turn is
    a text of its own.

    Only this segmenter works turn by turn on strings, once per rollout, because it must find text in token sequences.

    Args:
        pattern (`str`, *optional*, defaults to `r"Step\\s*\\d+\\s*[:.]"`):
            regular expression of a step's announcement.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            tokenizer of the completions; by default the trainer's, passed with each call.
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
        turns = zip(turn_starts(mask).nonzero().tolist(), turn_ends(mask).nonzero().tolist(), strict=True)
        for (row, first), (_, last) in turns:
            pieces = [texts[index] for index in completion_ids[row, first : last + 1].tolist()]
            starts = torch.tensor([0, *accumulate(len(piece) for piece in pieces)])
            text = "".join(pieces)
            # A pattern may also match the empty end of the text, where no token starts.
            offsets = torch.tensor([m.start() for m in re.finditer(self.pattern, text) if m.start() < len(text)])
            # The token that covers a character is the last one that starts at or before it.
            tokens = torch.searchsorted(starts, offsets, right=True) - 1
            is_first[row, first + tokens.long()] = True
        return Segments.from_first_tokens(is_first, mask)


def _given(own: PreTrainedTokenizerBase | None, passed: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    tokenizer = passed if own is None else own
    if tokenizer is None:
        raise ValueError("This segmenter reads text: give it a `tokenizer`.")
    return tokenizer


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """Text of every token id up to at least the largest in `ids`; "" for ids that only padded embeddings have."""
    texts = _decoded_vocabulary(tokenizer)
    largest_id = int(ids.max()) if ids.numel() else -1
    return texts + [""] * (largest_id + 1 - len(texts))


@lru_cache(maxsize=4)
def _decoded_vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # Decoded one by one, so that the texts of a response's tokens join to text whose offsets map back to tokens.
    return tokenizer.batch_decode([[token_id] for token_id in range(len(tokenizer))])
