"""Every algorithm as loops over responses and tokens, written from its definition."""

import math
from collections.abc import Callable
from typing import Any

from tests.trainer.preset_references.responses import (
    MAX_COMPLETION_LENGTH,
    Response,
    at_entropies,
    at_every_token,
    at_improbable_tokens,
    at_lines,
    at_steps,
    cut_before,
    nowhere,
)


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def token_rewards(row: Response, beta: float = 0.0) -> dict[int, float]:
    """The outcome on the last token, and minus beta times k1 = logp - ref on each."""
    rewards = {t: -beta * (row.logps[t] - row.ref_logps[t]) for t in row.tokens}
    if row.tokens:
        rewards[row.tokens[-1]] += row.reward
    return rewards


def gae(rewards: list[float], values: list[float], lam: float) -> list[float]:
    """delta_m = r_m + V_{m+1} - V_m, A_m = delta_m + lam A_{m+1}; nothing comes behind the last."""
    advantages, following_advantage, following_value = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        following_advantage = reward + following_value - value + lam * following_advantage
        following_value = value
        advantages.append(following_advantage)
    return advantages[::-1]


def whiten(rows: list[Response], bound: float = math.inf) -> None:
    """To mean 0 and unbiased variance 1 over the rollout's tokens."""
    everything = [a for row in rows for a in row.advantages.values()]
    center = mean(everything)
    variance = sum((a - center) ** 2 for a in everything) / (len(everything) - 1)
    for row in rows:
        for t, a in row.advantages.items():
            row.advantages[t] = max(-bound, min(bound, (a - center) / math.sqrt(variance + 1e-8)))


def clipped(ratio: float, a: float, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> float:
    """PPO's loss of a token: -min(ratio A, clip(ratio) A), and at most -c A where A < 0."""
    loss = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
    return min(loss, -dual * a) if dual is not None and a < 0 else loss


def log_ratio(row: Response, t: int) -> float:
    return row.new_logps[t] - row.logps[t]


def k3(row: Response, t: int) -> float:
    d = row.ref_logps[t] - row.new_logps[t]
    return math.exp(d) - d - 1


StateValue = Callable[[Response, int], float]
"""Value of the state before a token."""


class SegmentAligned:
    """SAPO as in the paper's equations; its ablations cut elsewhere or have a ratio per token."""

    def __init__(self, cut: Callable = at_entropies, ratio_of: str = "segment"):
        self.cut, self.ratio_of = cut, ratio_of

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        for row in rows:
            row.segments = self.cut(row)
            rewards = token_rewards(row, beta=0.001)
            values = [value(row, segment[0]) for segment in row.segments]
            advantages = gae([sum(rewards[t] for t in segment) for segment in row.segments], values, lam=0.99)
            for segment, a, v in zip(row.segments, advantages, values, strict=True):
                for t in segment:
                    row.advantages[t], row.targets[t] = a, a + v

    def policy_loss(self, rows: list[Response]) -> float:
        total = 0.0
        for row in rows:
            losses = []
            for t in row.tokens:
                sharing = row.segment_of(t) if self.ratio_of == "segment" else [t]
                ratio = math.exp(mean([log_ratio(row, s) for s in sharing]))
                losses.append(clipped(ratio, row.advantages[t]))
            # An unscored response is one of the mean, with nothing in it.
            total += mean(losses) if losses else 0.0
        return total / len(rows)

    def value_loss(self, rows: list[Response]) -> float:
        total = 0.0
        for row in rows:
            states = [segment[0] for segment in row.segments]
            # Half of the paper's squared error, as in PPO's and the official code: a factor on the learning rate.
            total += mean([0.5 * (row.new_values[t] - row.targets[t]) ** 2 for t in states]) if states else 0.0
        return total / len(rows)


class OfficialSegmentAligned:
    """SAPO as in the official script; means are over an optimizer step, where it takes them over micro-batches."""

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        for row in rows:
            row.segments = at_entropies(row)
            rewards = token_rewards(row, beta=0.001)
            values = [value(row, segment[-1]) for segment in row.segments]
            advantages = gae([sum(rewards[t] for t in segment) for segment in row.segments], values, lam=0.99)
            for segment, a, v in zip(row.segments, advantages, values, strict=True):
                for t in segment:
                    row.advantages[t], row.targets[t] = a, a + v
        whiten(rows, bound=5.0)

    def policy_loss(self, rows: list[Response]) -> float:
        losses = []
        for row in rows:
            for segment in row.segments:
                ratio = math.exp(mean([min(max(log_ratio(row, t), -20), 20) for t in segment]))
                losses += [clipped(ratio, row.advantages[t], 0.2, 0.28, dual=3.0) for t in segment]
        return mean(losses)

    def value_loss(self, rows: list[Response]) -> float:
        return clipped_value_loss(rows, state=-1)


def clipped_value_loss(rows: list[Response], state: int) -> float:
    errors = []
    for row in rows:
        for segment in row.segments:
            t = segment[state]
            near_old = min(max(row.new_values[t], row.values[t] - 0.5), row.values[t] + 0.5)
            errors.append(0.5 * max((row.new_values[t] - row.targets[t]) ** 2, (near_old - row.targets[t]) ** 2))
    return mean(errors)


class PPO:
    """Per token, with verl's defaults: whitened advantages, dual clip 3, value clip 0.5, means over tokens."""

    def __init__(self, lam: float):
        self.lam = lam
        self.beta, self.high, self.dual = 0.001, 0.2, 3.0

    def lam_of(self, row: Response) -> float:
        return self.lam

    def targets(self, rewards: list[float], values: list[float], advantages: list[float]) -> list[float]:
        return [a + v for a, v in zip(advantages, values, strict=True)]

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        for row in rows:
            row.segments = at_every_token(row)
            rewards = list(token_rewards(row, self.beta).values())
            values = [value(row, t) for t in row.tokens]
            advantages = gae(rewards, values, self.lam_of(row))
            row.advantages = dict(zip(row.tokens, advantages, strict=True))
            row.targets = dict(zip(row.tokens, self.targets(rewards, values, advantages), strict=True))
        whiten(rows)

    def policy_loss(self, rows: list[Response]) -> float:
        return mean(
            [
                clipped(math.exp(log_ratio(row, t)), row.advantages[t], 0.2, self.high, dual=self.dual)
                for row in rows
                for t in row.tokens
            ]
        )

    def value_loss(self, rows: list[Response]) -> float:
        return clipped_value_loss(rows, state=0)


class ValueCalibratedPPO(PPO):
    """VC-PPO: the critic's targets are sums of future rewards."""

    def __init__(self):
        super().__init__(lam=0.99)

    def targets(self, rewards: list[float], values: list[float], advantages: list[float]) -> list[float]:
        return [sum(rewards[t:]) for t in range(len(rewards))]


class VAPO(ValueCalibratedPPO):
    """lambda = 1 - 1 / (0.05 l), no less than 0; upper clip 0.28; 0.1 times the NLL of correct responses."""

    def __init__(self):
        super().__init__()
        self.beta, self.high, self.dual = 0.0, 0.28, None

    def lam_of(self, row: Response) -> float:
        return max(0.0, 1 - 1 / (0.05 * max(len(row.tokens), 1)))

    def policy_loss(self, rows: list[Response]) -> float:
        correct = [-row.new_logps[t] for row in rows for t in row.tokens if row.reward > 0.5]
        return super().policy_loss(rows) + 0.1 * (mean(correct) if correct else 0.0)


class GroupRelative:
    """GRPO and its variants, with TRL's 1e-4 and its standard deviation of a sample."""

    def __init__(self, kind: str, beta: float = 0.0):
        self.kind, self.beta = kind, beta

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        for row in rows:
            row.segments = nowhere(row)
            group = [other.reward for other in rows if other.prompt == row.prompt and not math.isnan(other.reward)]
            for t in row.tokens:
                row.advantages[t] = row.reward - mean(group)
                if self.kind != "dr_grpo":
                    variance = sum((reward - mean(group)) ** 2 for reward in group) / (len(group) - 1)
                    row.advantages[t] /= math.sqrt(variance) + 1e-4

    def policy_loss(self, rows: list[Response]) -> float:
        total = 0.0
        for row in rows:
            losses = []
            # TRL leaves unscored responses in the loss: without an advantage, but with their KL penalty.
            for t in row.kept:
                a = row.advantages.get(t, 0.0)
                if self.kind == "gspo":
                    ratio = math.exp(mean([log_ratio(row, s) for s in row.kept]))
                    losses.append(clipped(ratio, a, 3e-4, 4e-4))
                else:
                    losses.append(clipped(math.exp(log_ratio(row, t)), a) + self.beta * k3(row, t))
            total += sum(losses) / (MAX_COMPLETION_LENGTH if self.kind == "dr_grpo" else len(losses))
        return total / len(rows)


class LeaveOneOut:
    """RLOO as TRL has it: KL (k1) of the whole response in its reward, one ratio, the product of the tokens'."""

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        outcomes = [
            row.reward - 0.05 * sum(row.logps[t] - row.ref_logps[t] for t in row.kept) for row in rows
        ]  # NaN without a reward
        for index, row in enumerate(rows):
            row.segments = nowhere(row)
            others = [
                outcomes[other]
                for other in range(len(rows))
                if other != index and rows[other].prompt == row.prompt and not math.isnan(outcomes[other])
            ]
            for t in row.tokens:
                row.advantages[t] = outcomes[index] - mean(others)

    def policy_loss(self, rows: list[Response]) -> float:
        losses = []
        for row in rows:
            ratio = math.exp(sum(log_ratio(row, t) for t in row.kept))
            losses.append(clipped(ratio, row.advantages[row.kept[0]]) if row.tokens else 0.0)
        return mean(losses)


class Reinforce:
    """The control: the outcome, KL included, among all responses of the batch; PPO's loss."""

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        outcomes = {
            index: sum(token_rewards(row, beta=0.001).values()) for index, row in enumerate(rows) if row.tokens
        }
        center = mean(list(outcomes.values()))
        variance = sum((outcome - center) ** 2 for outcome in outcomes.values()) / (len(outcomes) - 1)
        for index, row in enumerate(rows):
            row.segments = nowhere(row)
            if row.tokens:
                advantage = (outcomes[index] - center) / math.sqrt(variance + 1e-8)
                row.advantages = dict.fromkeys(row.tokens, advantage)

    policy_loss = PPO(lam=1.0).policy_loss


class SampledValues:
    """What VinePPO and SPO share: PPO's loss over the tokens that learn, and 1e-4 times k3 summed over a response."""

    def policy_loss(self, rows: list[Response]) -> float:
        losses = [clipped(math.exp(log_ratio(row, t)), a) for row in rows for t, a in row.advantages.items()]
        kl = mean([sum(k3(row, t) for t in row.advantages) for row in rows])
        return (mean(losses) if losses else 0.0) + 1e-4 * kl


class VinePPO(SampledValues):
    """A_i = r_i + V_{i+1} - V_i over lines; from the 26th state after the prompt's on the reward is the value."""

    cut = staticmethod(at_lines)

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        for row in rows:
            row.segments = self.cut(row)
            values = [value(row, line[0]) if i <= 25 else row.reward for i, line in enumerate(row.segments)]
            for i, line in enumerate(row.segments):
                is_last = i == len(row.segments) - 1
                following = row.reward if is_last else values[i + 1]
                for t in line:
                    row.advantages[t] = following - values[i]
        whiten(rows)


class SPOChain(SampledValues):
    """Boundaries at every fifth token with p < 0.9, from the first on; only tokens with p < 0.9 learn."""

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        for row in rows:
            cut_points = [t for t in row.tokens if math.exp(row.logps[t]) < 0.9]
            boundaries = cut_points[::5]
            row.segments = cut_before(row.tokens, set(boundaries))
            for i, boundary in enumerate(boundaries):
                end = boundaries[i + 1] if i + 1 < len(boundaries) else None
                following = row.reward if end is None else value(row, end)
                for t in cut_points:
                    if boundary <= t and (end is None or t < end):
                        row.advantages[t] = following - value(row, boundary)
        whiten(rows)


REFERENCES: dict[str, Any] = {
    "sapo": SegmentAligned(),
    "sapo_official": OfficialSegmentAligned(),
    "sapo_naive_is": SegmentAligned(ratio_of="token"),
    "sapo_newline": SegmentAligned(at_lines),
    "sapo_step": SegmentAligned(at_steps),
    "sapo_prob": SegmentAligned(at_improbable_tokens),
    "ppo": PPO(lam=0.95),
    "ppo_long_horizon": PPO(lam=0.99),
    "ppo_full_horizon": PPO(lam=1.0),
    "vc_ppo": ValueCalibratedPPO(),
    "vapo": VAPO(),
    "grpo": GroupRelative("grpo", beta=0.01),
    "dr_grpo": GroupRelative("dr_grpo"),
    "gspo": GroupRelative("gspo"),
    "rloo": LeaveOneOut(),
    "reinforce": Reinforce(),
    "vineppo": VinePPO(),
    "spo_chain": SPOChain(),
}
