"""A trainer whose models predict made-up numbers, and its rollouts."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from sapo_trl.presets import preset_settings
from sapo_trl.rollouts import ContinuationSampler, TokenizedPrompts
from sapo_trl.rollouts.types import PolicyForward, RolloutRecord
from sapo_trl.trainer.trl.forward import TokenOutputs
from tests.testing_utils import sapo_trainer
from tests.trainer.preset_references.responses import (
    MAX_COMPLETION_LENGTH,
    ROWS_PER_MICRO_BATCH,
    ROWS_PER_STEP,
    Response,
)


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
IMAGE_FAMILY = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
NUM_CONTINUATIONS = 9


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
        output = batch["current_values" if "current_values" in batch else "made_up_values"]
        return trainer.critic.value_head.output(output)

    trainer.policy_forward = policy_forward
    trainer.critic_forward = critic_forward
    # What TRL's own losses call.
    latest, policy_loss = [], trainer.policy_loss

    def noted_policy_loss(model, batch) -> torch.Tensor:
        latest[:] = [batch]
        return policy_loss(model, batch)

    trainer.policy_loss = noted_policy_loss
    trainer.completion_forward.run = lambda *args, **kwargs: TokenOutputs(
        latest[0]["current_logps"], latest[0]["entropies"], aux_loss=None, values=None
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
            score=lambda rows, completions, starts: torch.tensor(
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
