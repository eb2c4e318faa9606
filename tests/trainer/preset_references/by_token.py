"""Presets that learn from a part of the tokens, as loops over responses and tokens."""

import math
from typing import Any

from tests.trainer.preset_references.definitions import GroupRelative, StateValue, clipped, log_ratio, mean
from tests.trainer.preset_references.responses import Response


class EntropyMask(GroupRelative):
    """DAPO's loss on the ceil(0.2 n) tokens of highest entropy among the rollout's n, the earlier of equals."""

    def __init__(self):
        super().__init__("dapo")

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        super().rollout(rows, value)
        everything = [(-row.entropies[t], i, t) for i, row in enumerate(rows) for t in row.tokens]
        chosen = {(i, t) for _, i, t in sorted(everything)[: math.ceil(len(everything) / 5)]}
        for i, row in enumerate(rows):
            row.advantages = {t: a for t, a in row.advantages.items() if (i, t) in chosen}

    def policy_loss(self, rows: list[Response]) -> float:
        losses = [
            clipped(math.exp(log_ratio(row, t)), a, 0.2, 0.28) for row in rows for t, a in row.advantages.items()
        ]
        return mean(losses) if losses else 0.0


TOKEN_REFERENCES: dict[str, Any] = {"entropy_mask": EntropyMask()}
