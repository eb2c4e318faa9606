"""SAO and BPCO as loops over responses and tokens: one response per prompt, values per token, Monte-Carlo targets."""

import math
from typing import Any

from tests.trainer.preset_references.definitions import StateValue, gae, log_ratio, mean, token_rewards
from tests.trainer.preset_references.responses import Response, at_every_token


class SingleRollout:
    """lambda = 1 - 1 / (alpha l), no less than 0; the critic's targets are sums of rewards; nothing is whitened."""

    alpha: float

    def value_of(self, output: float) -> float:
        """A value from the number that a value head puts out."""
        return output

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        for row in rows:
            row.segments = at_every_token(row)
            rewards = list(token_rewards(row).values())
            values = [self.value_of(value(row, t)) for t in row.tokens]
            lam = max(0.0, 1 - 1 / (self.alpha * max(len(row.tokens), 1)))
            row.advantages = dict(zip(row.tokens, gae(rewards, values, lam), strict=True))
            row.targets = {t: sum(rewards[i:]) for i, t in enumerate(row.tokens)}


class SAO(SingleRollout):
    """
    Direct double-sided importance sampling for mathematics: the weight is the ratio r where 0.7 < r < 6, and 0
    elsewhere, whatever the advantage. Rejected tokens stay in the denominator. Plain squared errors.

    SAO writes -mean(sg(w) A log pi). The gradient is that of -mean(w A), whose value is compared here.
    """

    alpha = 1.5

    def policy_loss(self, rows: list[Response]) -> float:
        losses = []
        for row in rows:
            for t in row.tokens:
                ratio = math.exp(log_ratio(row, t))
                weight = ratio if 1 - 0.3 < ratio < 1 + 5.0 else 0.0
                losses.append(-weight * row.advantages[t])
        return mean(losses)

    def value_loss(self, rows: list[Response]) -> float:
        return mean([0.5 * (row.new_values[t] - row.targets[t]) ** 2 for row in rows for t in row.tokens])


class BPCO(SingleRollout):
    """
    Values within [0, 1] by a scaled arctangent. A token is left out where its probability has moved by more than 0.2
    in the direction of its advantage. Sums over a response, then the mean over responses.
    """

    alpha = 0.4

    def value_of(self, output: float) -> float:
        return (math.atan(output) * (2 / math.pi) + 1) / 2

    def policy_loss(self, rows: list[Response]) -> float:
        total = 0.0
        for row in rows:
            for t in row.tokens:
                a, change = row.advantages[t], math.exp(row.new_logps[t]) - math.exp(row.logps[t])
                is_valid = change <= 0.2 if a > 0 else change >= -0.2
                total -= math.exp(log_ratio(row, t)) * a if is_valid else 0.0
        return total / len(rows)

    def value_loss(self, rows: list[Response]) -> float:
        errors = []
        for row in rows:
            for t in row.tokens:
                value, old, target = self.value_of(row.new_values[t]), self.value_of(row.values[t]), row.targets[t]
                near_old = min(max(value, old - 0.5), old + 0.5)
                errors.append(0.5 * max((value - target) ** 2, (near_old - target) ** 2))
        return mean(errors)


SINGLE_ROLLOUT_REFERENCES: dict[str, Any] = {"sao": SAO(), "bpco": BPCO()}
