"""Where other segmenters would have cut recorded responses: asked of the segmenters themselves."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from ..segmentation import EntropySegmenter, NewlineSegmenter, RandomCuts, Segmenter, StepSegmenter, accepted_inputs
from ..segments import Segments


_ROWS = 512  # at a time: padded tensors of all responses at once might not fit into memory


class RecordedVocabulary:
    """
    The texts that occur in a recording, instead of the tokenizer, which is not recorded.

    Args:
        texts (`list[str]`): of each id.
        special (`list[bool]`): whether each is a special token.
    """

    def __init__(self, texts: list[str], special: list[bool]):
        self.texts = texts
        self.all_special_ids = [index for index, flag in enumerate(special) if flag]

    def __len__(self) -> int:
        return len(self.texts)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(self.texts[index] for index in row) for row in rows]


def segmenters(recorded: Segmenter) -> dict[str, Segmenter]:
    """The segmenters to compare with the recorded cuts, at most seven, by their names on the page."""
    return {
        **{f"entropy, top {percent} %": EntropySegmenter(percent) for percent in (10, 20, 30, 50)},
        "lines": NewlineSegmenter(),
        "steps": StepSegmenter(),
        "random, as many as recorded": RandomCuts(recorded),
    }


def cut_marks(
    responses: pd.DataFrame, token_ids: list[np.ndarray], vocabulary: RecordedVocabulary
) -> tuple[list[str], list[np.ndarray]]:
    """
    Every partition of every response.

    Args:
        responses (`pd.DataFrame`): of a [`~sapo_trl.viewer.Recording`].
        token_ids (`list[np.ndarray]`): of each response, the ids of its loss tokens in `vocabulary`.
        vocabulary ([`RecordedVocabulary`]): texts of the ids.

    Returns:
        `tuple[list[str], list[np.ndarray]]`: the names of the partitions, the recorded one first; and for each
        response a uint8 per loss token, whose bit `j` is set if the token ends a segment of partition `j`.
    """
    names = ["recorded", *segmenters(EntropySegmenter())]
    marks: list[np.ndarray] = []
    for start in range(0, len(responses), _ROWS):
        rows = responses.iloc[start : start + _ROWS]
        # Tokens that the policy did not write are recorded apart. One hole stands for each run of them.
        holes = [np.unique(np.asarray(places, dtype=np.int64)) for places in rows["masked_positions"]]
        ids = _padded(token_ids[start : start + _ROWS], holes, 0).long()
        recorded = Segments(_padded(rows["segment_ids"], holes, -1).long())
        mask = recorded.mask
        entropies, logps = (_padded(rows[name], holes, 0.0).float() for name in ("entropies", "logps"))
        inputs = {"logps": logps, "completion_ids": ids, "tokenizer": vocabulary}
        bits = recorded.is_last.byte()
        for bit, segmenter in enumerate(segmenters(lambda entropies, mask, same=recorded: same).values(), start=1):
            cuts = segmenter(entropies, mask, **{name: inputs[name] for name in accepted_inputs(segmenter)})
            bits |= cuts.is_last.byte() << bit
        marks += [row[kept] for row, kept in zip(bits.numpy(), mask.numpy(), strict=True)]
    return names, marks


def _padded(rows: Iterable[ArrayLike], holes: list[np.ndarray], filling: float) -> torch.Tensor:
    """One row for each response, with a `filling` before the tokens at `holes`, and behind the last."""
    wide = [np.insert(np.asarray(row, dtype=np.float64), at, filling) for row, at in zip(rows, holes, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(list(map(torch.as_tensor, wide)), batch_first=True, padding_value=filling)
