"""Value pretraining: how long the policy stays frozen, alone and in the trainer."""

import pytest
import torch

from sapo_trl.critic.warmup import CriticWarmup
from tests.testing_utils import WeightRecorder, logged, sapo_trainer, state_of


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


def steps_until_over(losses: list[float], **settings) -> int:
    arguments = {"max_steps": 100, "tolerance": 0.1, "steps_per_rollout": 1, "patience": 2}
    warmup = CriticWarmup(**{**arguments, **settings})
    for step, loss in enumerate(losses):
        if not warmup.is_active(step):
            return step
        warmup.record(loss)
    return len(losses)


class TestSettling:
    def test_it_lasts_as_long_as_the_loss_falls(self):
        assert steps_until_over([0.5 * 0.8**i for i in range(50)]) == 50

    def test_it_ends_after_patience_without_progress(self):
        # The smallest of two rollouts must be a tenth below the smallest before them: .91 and .95 are not.
        assert steps_until_over([1.0, 0.91, 0.95, 0.1, 0.1]) == 3

    def test_one_good_rollout_among_the_last_is_progress(self):
        assert steps_until_over([1.0, 2.0, 0.5, 2.0, 2.0, 0.1]) == 5

    def test_it_never_lasts_longer_than_the_maximum(self):
        assert steps_until_over([0.8**i for i in range(50)], max_steps=7) == 7
        assert steps_until_over([1.0], max_steps=0) == 0

    def test_without_tolerance_only_the_maximum_counts(self):
        assert steps_until_over([1.0] * 50, tolerance=None, max_steps=20) == 20

    def test_it_ends_between_rollouts(self):
        # Rollouts of three steps with the means 1, 1, 1: settled with the third.
        assert steps_until_over([0.0, 1.0, 2.0] * 5, steps_per_rollout=3) == 9

    def test_state_survives(self, tmp_path):
        losses = [1.0, 0.91, 0.95]
        one = CriticWarmup(100, 0.1, 1, patience=2)
        one.record(losses[0])
        one.save(tmp_path)
        other = CriticWarmup(100, 0.1, 1, patience=2)
        other.load(tmp_path)
        for loss in losses[1:]:
            assert other.is_active(0)
            other.record(loss)
        assert not other.is_active(0)
        other.save(tmp_path)
        one.load(tmp_path)
        assert not one.is_active(0)


class TestInTheTrainer:
    @TEXT_FAMILY
    def test_policy_is_frozen_until_the_value_loss_settles(self, family, tmp_path):
        # A critic that hardly learns settles at once: after three rollouts behind the first.
        trainer = sapo_trainer(
            family,
            tmp_path,
            max_steps=10,
            critic_learning_rate=1e-9,
            critic_warmup_steps=100,
            critic_warmup_tolerance=0.999,
            num_mini_batches=2,
        )
        before = state_of(trainer.model)
        recorder = WeightRecorder(trainer.model)
        trainer.add_callback(recorder)
        trainer.train()
        moved = [any(not torch.equal(state[0][name], before[name]) for name in before) for state in recorder.states]
        frozen_steps = 2 * 4
        assert moved == [False] * frozen_steps + [True] * (10 - frozen_steps)
        assert len(logged(trainer, "critic/warmup")) == frozen_steps

    @TEXT_FAMILY
    def test_a_resumed_run_does_not_start_over(self, family, tmp_path):
        settings = {
            "critic_learning_rate": 1e-9,
            "critic_warmup_steps": 100,
            "critic_warmup_tolerance": 0.999,
            "num_mini_batches": 1,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        sapo_trainer(family, tmp_path, max_steps=2, **settings).train()
        trainer = sapo_trainer(family, tmp_path, max_steps=6, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert len(logged(trainer, "critic/warmup")) == 4  # two before, two after
