"""Tree rollouts in the trainer: what is trained on, with which old log-probabilities, and what is logged."""

import math

import pytest
import torch

from tests.testing_utils import (
    Recorder,
    WeightRecorder,
    length_reward,
    logged,
    never_logged,
    sapo_trainer,
    state_of,
    unmoved,
)


FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


def tree_trainer(family, output_dir, recorder=None, reward=length_reward, **overrides):
    settings = {
        "critic": "tree",
        "segmentation": "sequence",
        "importance_sampling_level": "token",
        "tree_widths": [2, 2, 2],
        "tree_segment_length": 3,
        "tree_edges_per_prompt": 4,
        "tree_replay_age": 3,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "num_mini_batches": 2,
        "max_completion_length": 9,
        "whiten_advantages": False,
        "advantage_clamp": None,
        "beta": 0.0,
        "max_steps": 8,
        **overrides,
    }
    callbacks = [] if recorder is None else [recorder]
    return sapo_trainer(
        family, output_dir, trainer_kwargs={"reward_funcs": reward, "callbacks": callbacks}, **settings
    )


def batches_of(trainer) -> list[dict]:
    """Every rollout batch before it is shuffled, in order; filled while training."""
    batches, score = [], trainer.score_rollout

    def keep(batch, record):
        result = score(batch, record)
        batches.append({**result, "given": record.given})
        return result

    trainer.score_rollout = keep
    return batches


class TestEdges:
    @FAMILIES
    def test_only_the_edge_is_trained_on(self, family, tmp_path):
        recorder = Recorder()
        trainer = tree_trainer(family, tmp_path, recorder)
        batches = batches_of(trainer)
        trainer.train()
        assert len(recorder.rollouts) == 4
        for rollout, batch in zip(recorder.rollouts, batches, strict=True):
            given = batch["given"]
            for row, (start, length) in enumerate(
                zip(given.tensors["edge_start"].tolist(), map(len, given.completion_ids), strict=True)
            ):
                ids = torch.full((rollout.segments.ids.size(1),), -1)
                ids[start:length] = 0
                assert torch.equal(rollout.segments.ids[row], ids)
                assert start % 3 == 0 and 0 < length - start <= 3
                advantage = rollout.rewards[row] - given.tensors["parent_values"][row]
                assert advantage.abs() > 0
                torch.testing.assert_close(rollout.advantages[row][start:length], advantage.expand(length - start))
                assert rollout.advantages[row][:start].eq(0).all()

    @FAMILIES
    def test_old_log_probabilities_are_those_of_the_sampling_policy(self, family, tmp_path):
        """Drawn at once they are the policy's; replayed ones are not, unless the policy stands still."""
        moving, standing = Recorder(), Recorder()
        for recorder, learning_rate in ((moving, 0.1), (standing, 0.0)):
            trainer = tree_trainer(family, tmp_path, recorder, learning_rate=learning_rate)
            batches = batches_of(trainer)
            weights = WeightRecorder(trainer.model)
            trainer.add_callback(weights)
            start = state_of(trainer.model)
            trainer.train()
            ages = []
            for rollout, batch in enumerate(batches):
                # The policy that this rollout was made by.
                state = start if rollout == 0 else weights.states[2 * rollout - 1][0]
                trainer.model.load_state_dict(state, strict=False)
                with torch.no_grad():
                    logps = trainer.policy_forward(trainer.model, batch).logps
                mask = batch["segment_ids"] >= 0
                fresh = torch.isclose(logps, batch["old_per_token_logps"], rtol=0, atol=1e-4) | ~mask
                ages.append(fresh.all(dim=1).tolist())
            assert all(ages[0])
            if recorder is standing:
                assert all(map(all, ages))
            else:
                assert not all(map(all, ages[1:]))
                assert max(logged(trainer, "tree/edge_age")) > 0
                assert max(map(abs, logged(trainer, "approx_kl"))) > 0

    @TEXT_FAMILY
    def test_nothing_to_learn_is_no_gradient(self, family, tmp_path):
        trainer = tree_trainer(family, tmp_path, reward=lambda completions, **kwargs: [0.5] * len(completions))
        before = state_of(trainer.model)
        trainer.train()
        assert unmoved(before, trainer.model) == list(before)
        assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
        assert logged(trainer, "tree/dropped_edges") == [1.0] * 4
        assert logged(trainer, "reward") == [0.5] * 4


class TestLog:
    @TEXT_FAMILY
    def test_reward_is_the_roots_and_functions_log_nothing_twice(self, family, tmp_path):
        roots, calls = [], []

        def reward(completion_ids, log_metric, log_extra, **kwargs):
            calls.append(len(completion_ids))
            log_metric("noise", 7.0)
            log_extra("noise", [7.0] * len(completion_ids))
            return length_reward(completion_ids)

        trainer = tree_trainer(family, tmp_path, reward=reward, max_steps=4)
        batches = batches_of(trainer)
        trainer.train()
        roots = [batch["given"].tensors["root_values"].mean().item() for batch in batches]
        assert logged(trainer, "reward") == pytest.approx(roots, abs=1e-5)
        # Two prompts with eight leaves each, scored once, as many at a time as a rollout has rows.
        assert calls == [8, 8, 8, 8]
        assert never_logged(trainer, "noise")

    @TEXT_FAMILY
    def test_evaluation_samples_plain_responses(self, family, tmp_path):
        trainer = tree_trainer(family, tmp_path, max_steps=2, per_device_eval_batch_size=4, num_generations_eval=2)
        trainer.train()
        metrics = trainer.evaluate(family.dataset(4))
        assert 0.0 <= metrics["eval_reward"] <= 1.0 and "eval_tree/leaves" not in metrics


class TestErrors:
    @TEXT_FAMILY
    def test_trees_do_not_mix_with_other_rollouts(self, family, tmp_path):
        with pytest.raises(ValueError, match="`rollout_func` decides on responses in another way"):
            sapo_trainer(
                family,
                tmp_path,
                critic="tree",
                segmentation="sequence",
                beta=0.0,
                trainer_kwargs={"rollout_func": lambda prompts, trainer: {}},
            )

    @TEXT_FAMILY
    def test_a_value_model_would_not_be_used(self, family, tmp_path):
        with pytest.raises(ValueError, match="`value_model` was given, but `critic='monte_carlo'`"):
            sapo_trainer(
                family, tmp_path, critic="monte_carlo", beta=0.0, trainer_kwargs={"value_model": family.build_model()}
            )
