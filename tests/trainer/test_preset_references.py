"""
Every preset against its definition: the advantages, critic targets and losses that the trainer computes under it, next
to the same numbers from loops over responses and tokens in plain Python.

The references are written from the algorithms' definitions, with their published numbers, and share nothing with the
package. What a model would predict is made up: random log-probabilities and values in float64, so that both sides
agree to 1e-9 where the package does not round to float32 on its way.
"""

import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from sapo_trl import Segments
from sapo_trl.advantages import length_adaptive_lam, masked_whiten, segment_gae
from sapo_trl.losses import soft_adaptive_policy_loss
from sapo_trl.presets import PRESETS, preset_settings
from sapo_trl.rollouts import ContinuationSampler, StateValues, TokenizedPrompts
from sapo_trl.rollouts.types import PolicyForward, RolloutRecord
from sapo_trl.segmentation import CutpointSegmenter
from tests.testing_utils import sapo_trainer


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
IMAGE_FAMILY = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
MAX_COMPLETION_LENGTH = 64
NUM_ROWS, ROWS_PER_STEP, ROWS_PER_MICRO_BATCH = 8, 4, 2
NUM_CONTINUATIONS = 9
EXACT = 1e-9


# ------------------------------------------------------------------------------------------------ made-up responses


@dataclass
class Response:
    """A response, what the models say about it, and what an algorithm makes of it."""

    prompt: list[int]
    ids: list[int]
    texts: list[str]
    kept: list[int]  # positions that the policy wrote; the others are a tool's
    reward: float
    logps: list[float]
    entropies: list[float]
    values: list[float]
    ref_logps: list[float]
    new_logps: list[float]  # of the policy that is being updated
    new_values: list[float]
    # What a reference fills in, by position.
    segments: list[list[int]] = field(default_factory=list)
    advantages: dict[int, float] = field(default_factory=dict)
    targets: dict[int, float] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """Positions that take part: none in a response without a reward."""
        return [] if math.isnan(self.reward) else self.kept

    def segment_of(self, t: int) -> list[int]:
        return next(segment for segment in self.segments if t in segment)


def made_up_responses(
    tokenizer,
    seed: int,
    generations: int = 1,
    holes: bool = False,
    drift: float = 0.15,
    texts: list[str] | None = None,
) -> list[Response]:
    """Eight responses, the responses to a prompt next to each other; `drift` is how far the policy moved."""
    rng = random.Random(seed)
    pieces = ["ab", "cd=3", "\n", "\n\n", ".\n", "Step 1: ", "Step 2.", "Step", " x", "7"]
    kinds = ["one token", "unscored", "confident", "many lines", *["any"] * (NUM_ROWS - 4)]
    rng.shuffle(kinds)
    rewards = [0.0, 0.3] if seed == 2 else [0.0, 0.3, 0.8, 1.0]  # of the third case no response is correct
    rows = []
    for index, kind in enumerate(kinds):
        if texts is not None:
            ids = tokenizer(texts[index])["input_ids"]
        elif kind == "one token":
            ids = tokenizer("a")["input_ids"]
        elif kind == "many lines":
            ids = tokenizer("a\n" * 30)["input_ids"]
        else:
            ids = tokenizer("a" + "".join(rng.choice(pieces) for _ in range(30)))["input_ids"][: rng.randint(2, 40)]
        length = len(ids)
        kept = [t for t in range(length) if not holes or length == 1 or rng.random() < 0.75] or [0]
        probabilities = [
            rng.uniform(0.92, 0.999) if kind == "confident" or rng.random() < 0.4 else rng.uniform(0.02, 0.85)
            for _ in ids
        ]
        logps = [math.log(p) for p in probabilities]
        values = [rng.uniform(-0.5, 1.5) for _ in ids]
        group = index // generations
        rows.append(
            Response(
                prompt=[20 + group, *[100] * group, 40],
                ids=ids,
                texts=[tokenizer.decode([token]) for token in ids],
                kept=kept,
                reward=math.nan if kind == "unscored" else rng.choice(rewards),
                logps=logps,
                entropies=[round(rng.uniform(0, 3), 1) for _ in ids],  # with ties
                values=values,
                ref_logps=[logp + rng.gauss(0, 0.3) for logp in logps],
                new_logps=[logp + rng.gauss(0, drift) + rng.choice([0] * 8 + [-10, 10]) * drift for logp in logps],
                new_values=[value + rng.gauss(0, 0.5) for value in values],
            )
        )
    if seed == 1:
        # An outlier, for what bounds advantages.
        next(row for row, kind in zip(rows, kinds, strict=True) if kind == "one token").reward = 40.0
    return rows


# -------------------------------------------------------------------------------------------- where responses are cut


def cut_behind(tokens: list[int], last_tokens: set[int]) -> list[list[int]]:
    segments, current = [], []
    for t in tokens:
        current.append(t)
        if t in last_tokens:
            segments.append(current)
            current = []
    return segments + ([current] if current else [])


def cut_before(tokens: list[int], first_tokens: set[int]) -> list[list[int]]:
    segments = []
    for t in tokens:
        if t in first_tokens or not segments:
            segments.append([])
        segments[-1].append(t)
    return segments


def at_entropies(row: Response) -> list[list[int]]:
    """Behind the max(ceil(0.3 n), 1) tokens of highest entropy, the earlier of equals."""
    count = max(-(-3 * len(row.tokens) // 10), 1)
    ranked = sorted(row.tokens, key=lambda t: (-row.entropies[t], t))
    return cut_behind(row.tokens, set(ranked[:count]))


def at_improbable_tokens(row: Response) -> list[list[int]]:
    """Behind the 8 least probable tokens."""
    return cut_behind(row.tokens, set(sorted(row.tokens, key=lambda t: row.logps[t])[:8]))


def at_lines(row: Response) -> list[list[int]]:
    """Behind line breaks. A line has text: blanks go to the next one that has, behind the last text to that."""
    last_tokens = set()
    for t, following in zip(row.tokens, [*row.tokens[1:], None], strict=False):
        if "\n" in row.texts[t] and (following is None or "\n" not in row.texts[following]):
            last_tokens.add(t)
    lines, blank = [], []
    for piece in cut_behind(row.tokens, last_tokens):
        blank += piece
        if any(row.texts[t].strip() and not row.texts[t].startswith("<|") for t in piece):
            lines.append(blank)
            blank = []
    if blank and lines:
        lines[-1] += blank
    elif blank:
        lines.append(blank)
    return lines


def at_steps(row: Response) -> list[list[int]]:
    """Before "Step 1:", "Step 2." and so on."""
    token_of_character = [t for t in row.tokens for _ in row.texts[t]]
    text = "".join(row.texts[t] for t in row.tokens)
    return cut_before(row.tokens, {token_of_character[m.start()] for m in re.finditer(r"Step\s*\d+\s*[:.]", text)})


def at_every_token(row: Response) -> list[list[int]]:
    return [[t] for t in row.tokens]


def nowhere(row: Response) -> list[list[int]]:
    return [row.tokens] if row.tokens else []


# ------------------------------------------------------------------------------------------------ common definitions


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


# ------------------------------------------------------------------------------------------------------ the algorithms

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

    def rollout(self, rows: list[Response], value: StateValue) -> None:
        for row in rows:
            row.segments = at_lines(row)
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


# -------------------------------------------------------------------------------------------------------- the trainer


def trainer_of(preset: str, family, tmp_path, **overrides):
    """A trainer whose models say what the batch says."""
    settings = {**preset_settings(preset), **overrides}
    if settings.get("num_generations", 1) > 1:
        settings["num_generations"] = 4
    trainer = sapo_trainer(
        family,
        tmp_path,
        **settings,
        per_device_train_batch_size=ROWS_PER_MICRO_BATCH,
        gradient_accumulation_steps=ROWS_PER_STEP // ROWS_PER_MICRO_BATCH,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps

    def policy_forward(model, batch, batch_size=None, frozen=False) -> PolicyForward:
        return PolicyForward(
            batch["current_logps" if "current_logps" in batch else "made_up_logps"], batch["entropies"]
        )

    def critic_forward(critic, batch, batch_size=None) -> torch.Tensor:
        return batch["current_values" if "current_values" in batch else "made_up_values"]

    trainer.policy_forward = policy_forward
    trainer.critic_forward = critic_forward
    # What TRL's own losses call.
    latest, policy_loss = [], trainer.policy_loss

    def noted_policy_loss(model, batch) -> torch.Tensor:
        latest[:] = [batch]
        return policy_loss(model, batch)

    trainer.policy_loss = noted_policy_loss
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        latest[0]["current_logps"],
        latest[0]["entropies"],
        None,
    )
    return trainer


def padded(rows: list[list[float]], fill: Callable[[], float]) -> torch.Tensor:
    length = max(map(len, rows))
    data = [[*row, *(fill() for _ in range(length - len(row)))] for row in rows]
    integer = all(isinstance(x, int) for row in data for x in row)
    return torch.tensor(data, dtype=torch.long if integer else torch.float64)


def batch_of(rows: list[Response], tool_mask: bool, pad_id: int) -> dict[str, Any]:
    """What TRL hands to the trainer, and the models' predictions; padding holds whatever it holds."""
    rng = random.Random(0)

    def garbage() -> float:
        return rng.gauss(0, 3)

    longest_prompt = max(len(row.prompt) for row in rows)
    batch = {
        "prompt_ids": torch.tensor([[pad_id] * (longest_prompt - len(row.prompt)) + row.prompt for row in rows]),
        "prompt_mask": torch.tensor(
            [[0] * (longest_prompt - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
        ),
        "completion_ids": padded([row.ids for row in rows], lambda: pad_id),
        "completion_mask": padded([[1] * len(row.ids) for row in rows], lambda: 0),
        "ref_per_token_logps": padded([row.ref_logps for row in rows], garbage),
        "made_up_logps": padded([row.logps for row in rows], garbage),
        "made_up_values": padded([row.values for row in rows], garbage),
        "entropies": padded([row.entropies for row in rows], garbage),
        # What a group's responses are worth is TRL's business: here the reference's.
        "advantages": torch.tensor([next(iter(row.advantages.values()), 0.0) for row in rows], dtype=torch.float64),
        "num_items_in_batch": torch.tensor(0),
    }
    # TRL has them when a rollout is trained on in several steps.
    batch["old_per_token_logps"] = batch["made_up_logps"].clone()
    if tool_mask:
        # TRL pads it with ones.
        masks = [[int(t in row.kept) for t in range(len(row.ids))] for row in rows]
        batch["tool_mask"] = padded(masks, lambda: 1)
    return batch


def record_of(rows: list[Response], **kwargs) -> RolloutRecord:
    now = time.perf_counter()
    rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    return RolloutRecord(generated=now, reward_started=now, rewards=rewards, **kwargs)


@dataclass
class Continuations:
    """Random continuations of whatever is asked for, and the plain record of them."""

    end_token: int
    rng: random.Random
    of_state: dict[tuple[int, ...], list[list[int]]] = field(default_factory=dict)
    num_sampled: int = 0

    @staticmethod
    def reward(completion: list[int]) -> float:
        return math.nan if sum(completion) % 13 == 0 else (sum(completion) % 11) / 10

    def generate(self, prompts: TokenizedPrompts, max_new_tokens: int) -> list[list[int]]:
        results = []
        for state in prompts.ids:
            self.num_sampled += 1
            # The first token differs from state to state and within a state.
            result = [20 + self.num_sampled % 230]
            result += [self.rng.randint(20, 250) for _ in range(self.rng.randint(0, max_new_tokens - 1))]
            if self.rng.random() < 0.7:
                result[-1] = self.end_token
            self.of_state.setdefault(tuple(state), []).append(result)
            results.append(result)
        return results

    def sampler(self, prompts: TokenizedPrompts, groups: list[int], weigh, max_completion_length: int):
        return ContinuationSampler(
            prompts=prompts,
            groups=groups,
            generate=self.generate,
            score=lambda rows, completions: torch.tensor(
                [[self.reward(ids)] for ids in completions], dtype=torch.float64
            ).view(-1, 1),
            weigh=weigh,
            end_token_ids=frozenset([self.end_token]),
            max_completion_length=max_completion_length,
            rows_per_call=7,
        )


def micro_batches_of(trainer, batch: dict[str, Any], order: list[int], rows: list[Response]) -> list[dict[str, Any]]:
    """The rollout in the order in which it is trained on, with the predictions of the models being updated."""
    current = {
        "current_logps": padded([row.new_logps for row in rows], lambda: 1.0),
        "current_values": padded([row.new_values for row in rows], lambda: 1.0),
    }
    micro_batches = []
    for start in range(0, len(rows), ROWS_PER_MICRO_BATCH):
        chosen = order[start : start + ROWS_PER_MICRO_BATCH]
        micro_batch = {
            name: value[chosen] if torch.is_tensor(value) and value.dim() else value for name, value in batch.items()
        }
        micro_batch |= {name: value[chosen].requires_grad_() for name, value in current.items()}
        micro_batches.append(micro_batch)
    trainer.micro_batches = micro_batches
    return micro_batches


def slope(loss: Callable[[], float], numbers: list[float], t: int) -> float:
    """Derivative by central differences."""
    step, there = 1e-5, numbers[t]
    numbers[t] = there + step
    above = loss()
    numbers[t] = there - step
    below = loss()
    numbers[t] = there
    return (above - below) / (2 * step)


@dataclass
class Comparison:
    """Compares and remembers the largest difference."""

    tolerance: float
    worst: float = 0.0

    def __call__(self, found: float, expected: float, what: Any, tolerance: float | None = None) -> None:
        error = abs(found - expected) / max(1.0, abs(expected))
        assert error <= (tolerance or self.tolerance), (what, found, expected)  # NaN fails too
        if tolerance is None:
            self.worst = max(self.worst, error)


def compare_rollout(compare: Comparison, batch: dict[str, Any], rows: list[Response], with_targets: bool) -> None:
    for index, row in enumerate(rows):
        expected_ids = {t: i for i, segment in enumerate(row.segments) for t in segment}
        for t in range(batch["advantages"].size(1)):
            where = (index, t)
            assert batch["segment_ids"][index, t] == expected_ids.get(t, -1), where
            assert batch["policy_mask"][index, t] == (t in row.advantages), where
            compare(batch["advantages"][index, t].item(), row.advantages.get(t, 0.0), ("advantage", where))
            if with_targets:
                compare(batch["returns"][index, t].item(), row.targets.get(t, 0.0), ("target", where))


def compare_losses(
    compare: Comparison, trainer, reference: Any, batch: dict[str, Any], rows: list[Response], seed: int
) -> None:
    rng = random.Random(seed)
    order = rng.sample(range(len(rows)), len(rows))
    micro_batches = micro_batches_of(trainer, batch, order, rows)
    for start in range(0, len(rows), ROWS_PER_STEP):
        members = [rows[index] for index in order[start : start + ROWS_PER_STEP]]
        first = start // ROWS_PER_MICRO_BATCH
        losses, value_losses = [], []
        step = micro_batches[first : first + ROWS_PER_STEP // ROWS_PER_MICRO_BATCH]
        for micro_batch in step:
            losses.append(trainer.policy_loss(trainer.model, micro_batch))
            if trainer.critic is not None:
                value_losses.append(trainer.critic_loss(micro_batch, None))
        sum(losses).backward()
        compare(sum(losses).item(), reference.policy_loss(members), ("policy loss", start))
        if value_losses:
            sum(value_losses).backward()
            compare(sum(value_losses).item(), reference.value_loss(members), ("value loss", start))
        for index, row in enumerate(members):
            micro_batch, inner = step[index // ROWS_PER_MICRO_BATCH], index % ROWS_PER_MICRO_BATCH
            gradient = micro_batch["current_logps"].grad[inner]
            assert not gradient[len(row.ids) :].any()
            for t in rng.sample(range(len(row.ids)), min(6, len(row.ids))):
                expected = slope(partial(reference.policy_loss, members), row.new_logps, t)  # noqa: B023
                compare(
                    gradient[t].item(), expected, ("policy gradient", start, index, t), max(compare.tolerance, 1e-8)
                )
                if value_losses:
                    expected = slope(partial(reference.value_loss, members), row.new_values, t)  # noqa: B023
                    found = micro_batch["current_values"].grad[inner, t].item()
                    compare(found, expected, ("value gradient", start, index, t), max(compare.tolerance, 1e-8))


def test_every_preset_is_compared():
    assert REFERENCES.keys() | {"spo_tree", "srpo"} == PRESETS.keys()


def compare_preset(compare: Comparison, trainer, preset: str, tokenizer, seed: int) -> list[Response]:
    """A made-up rollout and its updates; returns the responses with what the reference makes of them."""
    generations, reference = trainer.args.num_generations, REFERENCES[preset]
    # Values of sampled continuations know no tools.
    samples = trainer.args.critic == "monte_carlo"
    holes = seed % 2 == 1 and not samples
    drift = 4e-4 if preset == "gspo" else 0.15
    rows = made_up_responses(tokenizer, seed, generations, holes, drift)
    if trainer.args.advantage_estimator == "group":
        reference.rollout(rows, None)
    batch, kwargs = batch_of(rows, holes, tokenizer.pad_token_id), {}
    if trainer.args.beta == 0.0:
        del batch["ref_per_token_logps"]
    continuations = Continuations(tokenizer.eos_token_id, random.Random(seed))
    if samples:
        groups = [index // generations for index in range(len(rows))]
        kwargs["prompts"] = TokenizedPrompts([row.prompt for row in rows])
        trainer.continuation_sampler = lambda prompts, inputs, *_: continuations.sampler(
            prompts, groups, trainer.weighted_rewards, MAX_COMPLETION_LENGTH
        )
    scored = trainer.score_rollout(batch, record_of(rows, **kwargs))

    visited = set()

    def sampled_value(row: Response, t: int) -> float:
        state = (*row.prompt, *row.ids[:t])
        visited.add(state)
        results = continuations.of_state[state]
        assert len(results) == NUM_CONTINUATIONS  # once for all responses that pass through it
        rewards = []
        for result in results:
            completion = (row.ids[:t] + result)[:MAX_COMPLETION_LENGTH]
            is_cut_off = preset == "spo_chain" and completion[-1] != tokenizer.eos_token_id
            rewards.append(0.0 if is_cut_off else Continuations.reward(completion))
        rewards = [reward for reward in rewards if not math.isnan(reward)]
        return mean(rewards) if rewards else row.reward

    reference.rollout(rows, sampled_value if samples else lambda row, t: row.values[t])
    if samples:
        assert visited == continuations.of_state.keys()
    compare_rollout(compare, scored, rows, with_targets=trainer.critic is not None)
    compare_losses(compare, trainer, reference, scored, rows, seed)
    return rows


@TEXT_FAMILY
@pytest.mark.parametrize("preset", REFERENCES)
def test_rollout_and_losses(family, preset, tmp_path):
    trainer = trainer_of(preset, family, tmp_path)
    trainer.state.global_step = 50  # behind VC-PPO's and VAPO's value pretraining
    compare = Comparison(EXACT)
    rows = [compare_preset(compare, trainer, preset, family.tokenizer, seed) for seed in range(4)]
    if preset == "sapo_official":
        assert max(a for row in rows[1] for a in row.advantages.values()) == 5.0


@IMAGE_FAMILY
@pytest.mark.parametrize("preset", ["grpo", "srpo", "vineppo", "spo_chain", "spo_tree"])
def test_kl_penalty_in_the_loss(family, preset, tmp_path):
    """Without advantages the loss is the KL penalty: beta times k3, off-policy too."""
    trainer = trainer_of(preset, family, tmp_path)
    rows = made_up_responses(family.tokenizer, 0, 4)
    batch = batch_of(rows, False, family.tokenizer.pad_token_id)
    mask = batch["completion_mask"].bool()
    batch |= {
        "segment_ids": torch.where(mask, 0, -1),
        "policy_mask": mask,
        "old_per_token_logps": batch["made_up_logps"],
        "advantages": torch.zeros_like(batch["made_up_logps"]),
        "rewards": torch.zeros(NUM_ROWS),
    }
    step = micro_batches_of(trainer, batch, list(range(NUM_ROWS)), rows)[: ROWS_PER_STEP // ROWS_PER_MICRO_BATCH]
    loss = sum(trainer.policy_loss(trainer.model, micro_batch) for micro_batch in step).item()
    penalties = [[k3(row, t) for t in row.kept] for row in rows[:ROWS_PER_STEP]]
    if preset in ("grpo", "srpo"):
        expected = 0.01 * mean([mean(penalty) for penalty in penalties])
    else:
        expected = 1e-4 * mean([sum(penalty) for penalty in penalties])
    assert loss == pytest.approx(expected, rel=EXACT)


@TEXT_FAMILY
def test_unscored_response_cannot_spoil_the_kl_penalty(family, tmp_path):
    """However far the policy is from the reference there: k3 overflows at a distance of 709, in float32 at 88."""
    trainer = trainer_of("vineppo", family, tmp_path)
    rows = made_up_responses(family.tokenizer, 0, 4)
    batch = batch_of(rows, False, family.tokenizer.pad_token_id)
    scored = torch.tensor([[not math.isnan(row.reward)] for row in rows])
    mask = batch["completion_mask"].bool() & scored
    batch |= {
        "segment_ids": torch.where(mask, 0, -1),
        "policy_mask": mask,
        "old_per_token_logps": batch["made_up_logps"],
        "ref_per_token_logps": torch.where(scored, batch["ref_per_token_logps"], 1000.0),
        "advantages": torch.zeros_like(batch["made_up_logps"]),
        "rewards": torch.zeros(NUM_ROWS),
    }
    for micro_batch in micro_batches_of(trainer, batch, list(range(NUM_ROWS)), rows):
        loss = trainer.policy_loss(trainer.model, micro_batch)
        loss.backward()
        assert loss.isfinite() and micro_batch["current_logps"].grad.isfinite().all()


@TEXT_FAMILY
@pytest.mark.parametrize("preset", ["vc_ppo", "vapo"])
def test_only_the_critic_learns_during_value_pretraining(family, preset, tmp_path):
    trainer = trainer_of(preset, family, tmp_path)
    rows = made_up_responses(family.tokenizer, 0, trainer.args.num_generations)
    batch = batch_of(rows, False, family.tokenizer.pad_token_id)
    micro_batch, *_ = micro_batches_of(
        trainer, trainer.score_rollout(batch, record_of(rows)), list(range(len(rows))), rows
    )
    for step in (0, 49):
        trainer.state.global_step = step
        loss = trainer.policy_loss(trainer.model, micro_batch)
        loss.backward()
        assert loss.item() == 0.0 and micro_batch["current_logps"].grad is None
        trainer.critic_loss(micro_batch, None).backward()
        assert micro_batch["current_values"].grad.abs().sum() > 0


@TEXT_FAMILY
def test_response_without_cut_points_has_no_gradient(family, tmp_path):
    """Of SPO-chain: neither from the advantages nor from the KL penalty, and no NaN if no response has any."""
    trainer = trainer_of("spo_chain", family, tmp_path)
    rows = made_up_responses(family.tokenizer, 0, 4)
    for row in rows:
        row.logps = [-0.01 for _ in row.ids]
    continuations = Continuations(family.tokenizer.eos_token_id, random.Random(0))
    trainer.continuation_sampler = lambda prompts, inputs, *_: continuations.sampler(
        prompts, [0] * len(rows), trainer.weighted_rewards, MAX_COMPLETION_LENGTH
    )
    batch = batch_of(rows, False, family.tokenizer.pad_token_id)
    record = record_of(rows, prompts=TokenizedPrompts([row.prompt for row in rows]))
    batch = trainer.score_rollout(batch, record)
    assert continuations.num_sampled == 0
    assert not batch["advantages"].any() and not batch["policy_mask"].any()
    for micro_batch in micro_batches_of(trainer, batch, list(range(len(rows))), rows):
        loss = trainer.policy_loss(trainer.model, micro_batch)
        loss.backward()
        assert loss.item() == 0.0 and not micro_batch["current_logps"].grad.any()


# ------------------------------------------------------------------------------------------------------------ SPO-tree

TREE_WIDTHS, EDGE_LENGTH, TREE_COMPLETION_LENGTH = [2, 2, 2], 3, 12


def made_up_logp(version: str, tokens: tuple[int, ...]) -> float:
    """Log-probability of the last of some tokens behind the others."""
    rng = random.Random(f"{version} {tokens}")
    return math.log(rng.uniform(0.92, 0.999) if rng.random() < 0.4 else rng.uniform(0.02, 0.85))


class TreeReward(Continuations):
    # Multiples of a quarter, and nodes of at most two children: exact also in float32, in which the package keeps the
    # values of nodes between growing a tree and training on it.
    @staticmethod
    def reward(completion: list[int]) -> float:
        return math.nan if sum(completion) % 6 == 0 else (sum(completion) % 5) / 4


@dataclass
class Node:
    value: float
    parent: "Node | None"
    tokens: tuple[int, ...]  # prompt and response
    length: int  # tokens of the edge above
    version: str


def grown(continuations: TreeReward, prompt: tuple[int, ...], version: str) -> list[Node]:
    """The nodes of the tree below a prompt, from what was sampled."""
    nodes = []

    def visit(tokens: tuple[int, ...], depth: int, length: int) -> Node:
        node = Node(math.nan, None, tokens, length, version)
        nodes.append(node)
        response = list(tokens[len(prompt) :])
        if depth == 3 or response[-1:] == [continuations.end_token] or len(response) == TREE_COMPLETION_LENGTH:
            node.value = continuations.reward(response)
            return node
        samples = continuations.of_state[tokens]
        assert len(samples) == TREE_WIDTHS[depth]
        children = []
        for sample in samples:
            room = TREE_COMPLETION_LENGTH - len(response)
            edge = sample[: room if depth == 2 else min(EDGE_LENGTH, room)]
            children.append(visit((*tokens, *edge), depth + 1, len(edge)))
            children[-1].parent = node
        known = [child.value for child in children if not math.isnan(child.value)]
        node.value = mean(known) if known else math.nan
        return node

    visit(prompt, 0, 0)
    return nodes


@TEXT_FAMILY
def test_tree(family, tmp_path):
    """SPO-tree: edges of a grown tree, trained on in this rollout and in the next one."""
    trainer = trainer_of(
        "spo_tree",
        family,
        tmp_path,
        tree_widths=TREE_WIDTHS,
        tree_segment_length=EDGE_LENGTH,
    )
    tokenizer, reference = family.tokenizer, SampledValues()
    continuations = TreeReward(tokenizer.eos_token_id, random.Random(0))
    version = ["first"]
    trainer.continuation_sampler = lambda prompts, inputs, *_: continuations.sampler(
        prompts, list(range(len(inputs))), trainer.weighted_rewards, TREE_COMPLETION_LENGTH
    )

    def made_up_row(name: str, prompt: list[int], ids: list[int]) -> list[float]:
        return [made_up_logp(name, (*prompt, *ids[: t + 1])) for t in range(len(ids))]

    def policy_forward(model, batch, batch_size=None, frozen=False) -> PolicyForward:
        if "current_logps" in batch:
            return PolicyForward(batch["current_logps"], batch["entropies"])
        logps = []
        for row in range(len(batch["prompt_ids"])):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            logps.append(made_up_row(version[0], prompt, ids))
        logps = padded(logps, lambda: 7.0)
        return PolicyForward(logps, torch.zeros_like(logps))

    trainer.policy_forward = policy_forward
    compare = Comparison(EXACT)
    nodes: dict[tuple[int, ...], Node] = {}
    versions_trained_on = set()
    for rollout, name in enumerate(("first", "second")):
        version[0] = name
        examples = [trainer.train_dataset[2 * rollout + i] for i in range(2)]
        given = trainer.plan_rollout([example for example in examples for _ in range(4)])
        assert len(given.completion_ids) == NUM_ROWS
        for prompt in trainer.tokenized_prompts(examples).ids:
            grown_nodes = grown(continuations, tuple(prompt), name)
            nodes |= {node.tokens: node for node in grown_nodes}
            root = given.tensors["root_values"].tolist()
            assert any(value == grown_nodes[0].value for value in root)

        prompts = trainer.tokenized_prompts(given.inputs)
        batch = prompts.model_inputs(
            range(NUM_ROWS), given.completion_ids, tokenizer.pad_token_id, torch.device("cpu")
        )
        rows, rng = [], random.Random(name)
        for index, ids in enumerate(given.completion_ids):
            prompt = prompts.ids[index]
            node = nodes[(*prompt, *ids)]
            assert not math.isnan(node.value) and node.value != node.parent.value
            versions_trained_on.add(node.version)
            start = len(ids) - node.length
            logps = made_up_row(node.version, prompt, ids)
            row = Response(
                prompt=prompt,
                ids=ids,
                texts=[""] * len(ids),
                kept=list(range(start, len(ids))),
                reward=node.value,
                logps=logps,
                entropies=[0.0] * len(ids),
                values=[0.0] * len(ids),
                ref_logps=[logp + rng.gauss(0, 0.3) for logp in logps],
                new_logps=[logp + rng.gauss(0, 0.3) for logp in logps],
                new_values=[0.0] * len(ids),
            )
            row.segments = [row.kept]
            row.advantages = {t: node.value - node.parent.value for t in row.kept if math.exp(row.logps[t]) < 0.9}
            rows.append(row)
        whiten(rows)
        batch["ref_per_token_logps"] = padded([row.ref_logps for row in rows], lambda: 0.0)
        batch["entropies"] = padded([row.entropies for row in rows], lambda: 0.0)
        batch["advantages"] = torch.zeros(NUM_ROWS)
        record = record_of(rows, given=given, inputs=given.inputs)
        record.rewards = trainer.weighted_rewards(given.rewards_per_func).double()
        assert record.rewards.tolist() == [row.reward for row in rows]
        scored = trainer.score_rollout(batch, record)
        compare_rollout(compare, scored, rows, with_targets=False)
        compare_losses(compare, trainer, reference, scored, rows, rollout)
    assert versions_trained_on == {"first", "second"} and version == ["second"]


# ---------------------------------------------------------------------------------------------------------------- SRPO


class RoleAware(GroupRelative):
    """GRPO whose advantages are multiplied by the weights of perception and reasoning tokens."""

    def __init__(self):
        super().__init__("srpo", beta=0.01)

    @staticmethod
    def spans(row: Response) -> tuple[list[int], list[int]]:
        """Positions of the perception and of the reasoning, both empty if malformed."""
        text, starts = "", {}
        for t in row.tokens:
            starts[t] = len(text)
            text += row.texts[t]
        found = []
        for name in ("perception", "think"):
            opening, closing = f"<{name}>", f"</{name}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return [], []
            first, last = text.index(opening) + len(opening), text.index(closing)
            found.append([t for t in row.tokens if first <= starts[t] < last])
        return found[0], found[1]

    def weigh(self, rows: list[Response], has_image: list[bool], corrupted: list, shortened: list) -> None:
        """`corrupted` and `shortened`: log-probabilities with a corrupted image, and without the perception."""
        for row, image, blind, without in zip(rows, has_image, corrupted, shortened, strict=True):
            perception, reasoning = self.spans(row) if image else ([], [])
            if not perception:
                continue
            z = {}
            for role, other in ((perception, blind), (reasoning, without)):
                scores = {t: row.logps[t] - other[t] for t in role}
                center = mean(list(scores.values()))
                std = math.sqrt(mean([(s - center) ** 2 for s in scores.values()]))
                z |= {t: s / (std + 1e-6) for t, s in scores.items()}
            baseline = mean(list(z.values()))
            weights = {t: math.exp(max(-1.0, min(1.0, z[t] - baseline))) for t in z}
            for t, weight in weights.items():
                row.advantages[t] *= weight / mean(list(weights.values()))


@IMAGE_FAMILY
@pytest.mark.parametrize("seed", range(3))
def test_role_aware_weights(family, seed, tmp_path):
    trainer = trainer_of("srpo", family, tmp_path)
    tokenizer, reference, compare = family.tokenizer, RoleAware(), Comparison(EXACT)
    good = "<perception>AB=3 and CD</perception><think>so {} it is</think>\\boxed{{4}}"
    texts = [
        *(good.format("x" * (seed + 2 * i)) for i in range(5)),
        "<perception>AB</perception> no more",
        "<perception>A</perception>" + good.format("twice"),
        "4",
    ]
    rows, rng = made_up_responses(tokenizer, seed, 4, texts=texts), random.Random(seed)
    if seed == 1:  # the policy wrote all but some of the reasoning
        for row in rows[:5]:
            reasoning = reference.spans(row)[1]
            row.kept = [t for t in row.kept if t not in reasoning[2:4]]
    has_image = [index != 3 for index in range(NUM_ROWS)]
    corrupted = [[logp + rng.gauss(0, 0.5) for logp in row.logps] for row in rows]
    shortened = [[logp + rng.gauss(0, 0.5) for logp in row.logps] for row in rows]
    remaining = [
        [t for t in range(len(row.ids)) if not image or t not in reference.spans(row)[0]]
        for row, image in zip(rows, has_image, strict=True)
    ]
    reference.rollout(rows, None)
    batch = batch_of(rows, seed == 1, tokenizer.pad_token_id)
    batch["pixel_values"] = torch.randn(4 * sum(has_image), 3, generator=torch.Generator().manual_seed(seed))
    batch["image_grid_thw"] = torch.tensor([[1, 2, 2]] * sum(has_image))
    batch["num_images"] = [int(image) for image in has_image]
    seen = []

    def policy_forward(model, given, batch_size=None, frozen=False) -> PolicyForward:
        if "current_logps" in given:
            return PolicyForward(given["current_logps"], given["entropies"])
        logps = given["made_up_logps"]
        if not torch.equal(given["pixel_values"], batch["pixel_values"]):
            seen.append("corrupted")
            assert torch.equal(given["completion_ids"], batch["completion_ids"])
            logps = padded(corrupted, lambda: 9.0)
        elif not torch.equal(given["completion_ids"], batch["completion_ids"]):
            seen.append("shortened")
            logps = torch.full_like(logps, 9.0)
            for index, (row, positions) in enumerate(zip(rows, remaining, strict=True)):
                mask = given["completion_mask"][index].bool()
                assert given["completion_ids"][index][mask].tolist() == [row.ids[t] for t in positions]
                logps[index, : len(positions)] = torch.tensor(shortened[index], dtype=torch.float64)[positions]
        return PolicyForward(logps, given["entropies"])

    trainer.policy_forward = policy_forward
    scored = trainer.score_rollout(batch, record_of(rows))
    assert seen == ["corrupted", "shortened"]
    before = [dict(row.advantages) for row in rows]
    reference.weigh(rows, has_image, corrupted, shortened)
    assert any(row.advantages != advantages for row, advantages in zip(rows, before, strict=True))
    compare_rollout(compare, scored, rows, with_targets=False)
    for name in ("pixel_values", "image_grid_thw", "num_images"):
        del scored[name]
    compare_losses(compare, trainer, reference, scored, rows, seed)


# ------------------------------------------------------------------------------------------------------ golden values


def test_golden_spo_chain():
    probabilities = torch.tensor([[0.95, 0.5, 0.99, 0.8, 0.3, 0.97, 0.85, 0.2]], dtype=torch.float64)
    mask = torch.ones(1, 8, dtype=torch.bool)
    segments = CutpointSegmenter(threshold=0.9, interval=2)(torch.zeros(1, 8), mask, probabilities.log())
    assert [t for t in range(1, 8) if segments.is_first[0, t]] == [1, 4, 7]
    # The first segment, which is confident, has no value of its own.
    values, rewards = torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)
    values[0, [1, 4, 7]] = torch.tensor([0.4, 0.6, 0.2], dtype=torch.float64)
    rewards[0, 7] = 1.0
    advantages, _ = segment_gae(rewards, values, segments, gamma=1.0, lam=0.0)
    learns = probabilities < 0.9
    advantages = torch.where(learns, advantages, 0)
    assert advantages[0].tolist() == pytest.approx([0, 0.2, 0, 0.2, -0.4, 0, -0.4, 0.8], abs=1e-12)
    whitened = masked_whiten(advantages, learns)[0].tolist()
    assert whitened == pytest.approx([0, 0.2390, 0, 0.2390, -0.9562, 0, -0.9562, 1.4343], abs=5e-5)


@TEXT_FAMILY
@pytest.mark.parametrize(
    ("text", "cap", "sampled", "expected"),
    [("a\nb\nc", None, [0.3, 0.6, 0.9], [0.3, 0.3, 0.1]), ("a\nb\nc\nd", 1, [0.3, 0.6], [0.3, 0.4, 0, 0])],
    ids=["three steps", "four steps, cap 1"],
)
def test_golden_vineppo(family, text, cap, sampled, expected, tmp_path):
    trainer = trainer_of("vineppo", family, tmp_path, max_valued_segments=cap, whiten_advantages=False)
    ids = family.tokenizer(text)["input_ids"]
    states = []

    class Sampler:
        def values_at(self, mask, completion_ids, num_continuations, truncated_reward=None) -> StateValues:
            assert num_continuations == NUM_CONTINUATIONS
            positions = mask.nonzero(as_tuple=True)[1].tolist()
            states.extend(family.tokenizer.decode(completion_ids[0, :position]) for position in positions)
            return StateValues(torch.tensor(sampled, dtype=torch.float64), torch.zeros(0), len(positions), 0, 0.0)

    trainer.continuation_sampler = lambda prompts, inputs, *_: Sampler()
    zeros = [0.0] * len(ids)
    row = Response([20], ids, [], list(range(len(ids))), 1.0, [-1.0] * len(ids), zeros, zeros, zeros, zeros, zeros)
    record = record_of([row], prompts=TokenizedPrompts([row.prompt]))
    scored = trainer.score_rollout(batch_of([row], False, family.tokenizer.pad_token_id), record)
    assert states == ["", "a\n", "a\nb\n"][: len(sampled)]
    lines = Segments(scored["segment_ids"]).is_first[0]
    assert scored["advantages"][0][lines].tolist() == pytest.approx(expected, abs=1e-12)


@TEXT_FAMILY
def test_golden_decoupled_gae_of_vc_ppo(family, tmp_path):
    trainer = trainer_of("vc_ppo", family, tmp_path, lam=0.5)
    segments = Segments(torch.tensor([[0, 1]]))
    rewards, values = torch.tensor([[[0.0, 1.0]], [[0.2, 0.5]]], dtype=torch.float64)
    advantages, targets = trainer.estimate_advantages(rewards, values, segments, {})
    assert advantages[0].tolist() == pytest.approx([0.55, 0.5], abs=1e-12)
    assert targets[0].tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


@pytest.mark.parametrize(("length", "expected"), [(100, 0.8), (1000, 0.98), (20, 0.0), (19, 0.0), (1, 0.0)])
def test_golden_lambda_of_vapo(length, expected):
    alpha = preset_settings("vapo")["length_adaptive_lam"]
    lam = length_adaptive_lam(Segments(torch.arange(length).unsqueeze(0)), alpha)
    assert lam.tolist() == [[pytest.approx(expected, abs=1e-7)]]


@pytest.mark.parametrize(
    ("advantage", "ratio", "gate"),
    [(1.0, 1.0, 2.0), (-1.0, 1.0, 1.904762), (1.0, 1.2, 2.199336), (-1.0, 1.2, 2.104030)],
)
def test_golden_soft_gate(advantage, ratio, gate):
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    output = soft_adaptive_policy_loss(logps, torch.zeros_like(logps), advantage * torch.ones_like(logps), mask)
    assert output.loss.item() == pytest.approx(-advantage * gate, abs=5e-7)


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope_of_gate"),
    [(1.0, 1.0, 1.0), (-1.0, 1.0, 1.0), (1.0, 2.0, 0.786448), (-1.0, 2.0, 0.768110)],
)
def test_golden_slope_of_soft_gate(advantage, ratio, slope_of_gate):
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    advantages = torch.full((1, 1), advantage, dtype=torch.float64)
    soft_adaptive_policy_loss(logps, torch.zeros(1, 1, dtype=torch.float64), advantages, mask).loss.backward()
    assert logps.grad.item() == pytest.approx(-advantage * ratio * slope_of_gate, abs=1e-6)
