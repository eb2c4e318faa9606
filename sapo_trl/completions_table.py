"""What TRL's completions table (`log_completions=True`) shows of segments."""

from __future__ import annotations

from .foreign_text import visible
from .rollouts.types import SegmentedRollout


CUT = "│"
"""Stands between segments."""


def segment_columns(rollout: SegmentedRollout) -> dict[str, list]:
    """
    Columns for the completions table, one entry per response.

    Args:
        rollout ([`SegmentedRollout`]): the rollout.

    Returns:
        `dict[str, list]`: `segments/text`, the text with [`CUT`] between segments, special tokens included, tokens
        of no segment left out and invisible controls written out; `segments/advantages`, a list with the mean
        advantage of each segment, to 4 decimals.
    """
    texts, advantages = [], []
    for ids, segment_ids, means, count in zip(
        rollout.completion_ids.tolist(),
        rollout.segments.ids.tolist(),
        rollout.segments.mean(rollout.advantages).tolist(),
        rollout.segments.count.tolist(),
        strict=True,
    ):
        pieces: list[list[int]] = [[] for _ in range(count)]
        for token, segment in zip(ids, segment_ids, strict=True):
            if segment >= 0:
                pieces[segment].append(token)
        # Whole segments at once: of a single token a character may be a part only. Of none `batch_decode` makes one.
        # What turns the writing direction in one segment would move the others, too.
        texts.append(CUT.join(map(visible, rollout.tokenizer.batch_decode(pieces) if pieces else [])))
        advantages.append([round(mean, 4) for mean in means[:count]])
    return {"segments/text": texts, "segments/advantages": advantages}
