"""Columns with segments for TRL's completions table (`log_completions=True`)."""

from __future__ import annotations

from .foreign_text import visible
from .rollouts.types import SegmentedRollout


CUT = "│"
"""Separates segments."""


def segment_columns(rollout: SegmentedRollout) -> dict[str, list]:
    """
    Columns for the completions table, one entry per response.

    Args:
        rollout ([`SegmentedRollout`]): the rollout.

    Returns:
        `dict[str, list]`: `segments/text`, the text with [`CUT`] between segments; `segments/advantages`, a list with
        the mean advantage of each segment, and `segments/rewards`, a list with the sum of its tokens' rewards, to 4
        decimals. The text includes special tokens, has names for invisible controls, and omits tokens outside
        segments.
    """
    texts, advantages, rewards = [], [], []
    for ids, segment_ids, means, sums, count in zip(
        rollout.completion_ids.tolist(),
        rollout.segments.ids.tolist(),
        rollout.segments.mean(rollout.advantages).tolist(),
        rollout.segments.sum(rollout.token_rewards).tolist(),
        rollout.segments.count.tolist(),
        strict=True,
    ):
        pieces: list[list[int]] = [[] for _ in range(count)]
        for token, segment in zip(ids, segment_ids, strict=True):
            if segment >= 0:
                pieces[segment].append(token)
        # Decode whole segments, because a single token may be only a part of a character. For no segments
        # `batch_decode` would return one text. A control of the writing direction would also move other segments.
        texts.append(CUT.join(map(visible, rollout.tokenizer.batch_decode(pieces) if pieces else [])))
        advantages.append([round(mean, 4) for mean in means[:count]])
        rewards.append([round(total, 4) for total in sums[:count]])
    return {"segments/text": texts, "segments/advantages": advantages, "segments/rewards": rewards}
