"""Presets that learn from a part of the tokens, as loops over responses and tokens."""

import math
import random
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


class Pictured(GroupRelative):
    """A policy that is also asked without the picture. `blind` and `new_blind`: its log-probabilities then."""

    def __init__(self):
        super().__init__("dapo")
        self.blind: dict[int, list[float]] = {}
        self.new_blind: dict[int, list[float]] = {}
        self.has_image: dict[int, bool] = {}

    def see(self, rows: list[Response], has_image: list[bool], seed: int) -> None:
        rng = random.Random(seed)
        for row, image in zip(rows, has_image, strict=True):
            self.has_image[id(row)] = image
            self.blind[id(row)] = [logp + rng.choice([0.0, rng.gauss(0, 0.5), -30.0, 30.0]) for logp in row.logps]
            self.new_blind[id(row)] = [logp + rng.gauss(0, 0.4) for logp in row.new_logps]

    @staticmethod
    def divergence(logp: float, blind: float) -> float:
        x = max(-20.0, min(20.0, blind - logp))
        return max(0.0, min(10.0, math.exp(x) - x - 1))


class VPPO(Pictured):
    """
    The top 40 % of a response's tokens by d, the whole response weighted by its mean d among the mini-batch's, and .06
    times the entropy, minus the mean log-probability of all tokens. The policy's loss is a mean over the tokens that
    learn.
    """

    def d(self, row: Response, t: int) -> float:
        return self.divergence(row.logps[t], self.blind[id(row)][t]) if self.has_image[id(row)] else 0.0

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        super().rollout(rows, value)
        for row in rows:
            ranked = sorted(row.tokens, key=lambda t: (-self.d(row, t), t))  # noqa: B023
            chosen = set(ranked[: math.ceil(0.4 * len(ranked) - 1e-9)])
            if any(self.d(row, t) > 0 for t in row.tokens):  # else nothing to choose by
                row.advantages = {t: a for t, a in row.advantages.items() if t in chosen}

    def weights(self, rows: list[Response]) -> dict[int, float]:
        scores = {id(row): mean([self.d(row, t) for t in row.tokens]) for row in rows if row.tokens}
        low, high = min(scores.values()), max(scores.values())
        if high - low <= 1e-6:
            return dict.fromkeys(scores, 1.0)
        n = {key: (score - low) / (high - low) for key, score in scores.items()}
        m = 0.9 + (1 - 0.9) / mean(list(n.values()))
        return {key: 0.9 + (m - 0.9) * n[key] for key in n}

    def policy_loss(self, rows: list[Response]) -> float:
        weights = self.weights(rows)
        losses = [
            clipped(math.exp(log_ratio(row, t)), a * weights[id(row)], 0.2, 0.28, dual=3.0)
            for row in rows
            for t, a in row.advantages.items()
        ]
        return mean(losses) + 0.06 * mean([-row.new_logps[t] for row in rows for t in row.tokens])


class PAPO(Pictured):
    """DAPO's loss minus .01 times the mean k3 from the blind policy, plus .03 times each policy's entropy."""

    def policy_loss(self, rows: list[Response]) -> float:
        tokens = [(row, t) for row in rows for t in row.tokens]
        losses = [clipped(math.exp(log_ratio(row, t)), row.advantages[t], 0.2, 0.28, dual=3.0) for row, t in tokens]
        # A response without a picture is in the means, with nothing in it.
        seen = [(row.new_logps[t], self.new_blind[id(row)][t]) for row, t in tokens if self.has_image[id(row)]]
        kl = sum(self.divergence(*pair) for pair in seen) / len(tokens)
        blind_entropy = -sum(blind for _, blind in seen) / len(tokens)
        entropy = mean([-row.new_logps[t] for row, t in tokens])
        return mean(losses) - 0.01 * kl + 0.03 * entropy + 0.03 * blind_entropy


TOKEN_REFERENCES: dict[str, Any] = {"entropy_mask": EntropyMask()}
