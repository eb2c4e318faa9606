"""Rollouts whose rewards are all equal: whitening must not make a signal of positions and of the critic's errors."""

import math
from types import SimpleNamespace

import pytest
import torch

from sapo_trl import Segments
from sapo_trl.advantages import masked_whiten, segment_gae
from sapo_trl.rollouts.types import RolloutRecord
from sapo_trl.trainer.stages import lacks_differences, normalized
from tests.testing_utils import Recorder, logged, sapo_trainer, state_of, unmoved


PROCESSES = SimpleNamespace(max=int, sum=lambda totals: totals)


def settings(critic: str = "separate", whiten: bool = True) -> SimpleNamespace:
    return SimpleNamespace(critic=critic, whiten_advantages=whiten, advantage_clamp=5.0)


def advantages_of(rewards: list[float], lam: float = 0.99) -> tuple[torch.Tensor, torch.Tensor]:
    """Of responses of 100 tokens under a constant critic."""
    length = 100
    segments = Segments(torch.arange(length).repeat(len(rewards), 1))
    token_rewards = torch.zeros(len(rewards), length)
    token_rewards[:, -1] = torch.tensor(rewards)
    advantages, _ = segment_gae(token_rewards, torch.full_like(token_rewards, 0.4), segments, lam=lam)
    return advantages, segments.mask


def test_positions_alone_move_nothing():
    advantages, mask = advantages_of([1.0, 1.0, 1.0])
    # The fault: every response has the same advantages, of size 1, by the distance to the end alone.
    whitened = masked_whiten(advantages, mask)
    assert whitened.amax() > 1.6 and whitened.amin() < -1.3 and torch.equal(whitened[0], whitened[1])
    result, metrics = normalized(advantages, mask, RolloutRecord(rewards=torch.ones(3)), settings(), PROCESSES)
    assert not result.any()
    assert metrics["advantages/zeroed"][0].item() == 1.0
    # The critic's bias still shows.
    assert metrics["advantages/raw_mean"][0] / metrics["advantages/raw_mean"][1] == pytest.approx(
        advantages.mean().item()
    )


@pytest.mark.parametrize("rewards", [[1.0, 0.0, 1.0], [1.0, 1.0, 1.0 - 1e-6], [1.0]])
def test_rewards_that_differ_change_nothing(rewards):
    """A single response has nothing to be compared with: it keeps its advantages."""
    advantages, mask = advantages_of(rewards)
    result, metrics = normalized(advantages, mask, RolloutRecord(rewards=torch.tensor(rewards)), settings(), PROCESSES)
    assert torch.equal(result, masked_whiten(advantages, mask)) and result.any()
    assert metrics["advantages/zeroed"][0].item() == 0.0


def test_other_processes_rewards_count():
    """This process's rewards are equal, all processes' are not: the decision is the same everywhere."""
    advantages, mask = advantages_of([1.0, 1.0])
    result, _ = normalized(
        advantages, mask, RolloutRecord(rewards=torch.tensor([1.0, 1.0, 0.0, 0.0])), settings(), PROCESSES
    )
    assert torch.equal(result, masked_whiten(advantages, mask))


@pytest.mark.parametrize("critic", ["monte_carlo", "tree"])
def test_sampled_values_are_measurements(critic):
    advantages, mask = advantages_of([1.0, 1.0])
    result, metrics = normalized(advantages, mask, RolloutRecord(rewards=torch.ones(2)), settings(critic), PROCESSES)
    assert torch.equal(result, masked_whiten(advantages, mask))
    assert "advantages/zeroed" not in metrics


def test_raw_advantages_stay_as_they_are():
    advantages, mask = advantages_of([1.0, 1.0])
    result, metrics = normalized(
        advantages, mask, RolloutRecord(rewards=torch.ones(2)), settings(whiten=False), PROCESSES
    )
    assert torch.equal(result, advantages)
    assert "advantages/zeroed" not in metrics


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 1.0], True),
        ([1.0, math.nan, 1.0], True),
        ([1.0, 0.0, math.nan], False),
        ([1.0, math.nan], False),
        ([math.nan, math.nan], False),
        ([], False),
    ],
)
def test_missing_rewards_are_no_difference(rewards, expected):
    assert lacks_differences(torch.tensor(rewards)) is expected


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
@pytest.mark.parametrize("critic", ["separate", "shared", "none"])
def test_the_policy_stays_and_the_critic_learns(family, critic, tmp_path):
    recorder = Recorder()

    def reward(completion_ids, **kwargs) -> list[float]:
        return [1.0 for _ in completion_ids]

    trainer = sapo_trainer(
        family, tmp_path, critic=critic, trainer_kwargs={"reward_funcs": reward, "callbacks": [recorder]}
    )
    policy = state_of(trainer.model)
    head = None if trainer.critic is None else trainer.critic.value_head.head.weight.detach().clone()
    trainer.train()
    assert len(unmoved(policy, trainer.model)) == len(policy)
    assert logged(trainer, "advantages/zeroed") == [1.0] and logged(trainer, "advantages/abs_mean") == [0.0]
    assert recorder.rollouts[0].returns.abs().sum() > 0
    if head is not None:
        assert not torch.equal(head, trainer.critic.value_head.head.weight)


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
def test_a_policy_with_other_rewards_moves(family, tmp_path):
    trainer = sapo_trainer(family, tmp_path)
    policy = state_of(trainer.model)
    trainer.train()
    assert len(unmoved(policy, trainer.model)) < len(policy)
    assert logged(trainer, "advantages/zeroed") == [0.0]
