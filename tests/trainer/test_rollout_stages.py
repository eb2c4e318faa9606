"""Rewards, rollouts, segmentation and evaluation under the settings of GRPOTrainer and of this package."""

import json
import math

import pytest
import torch

from sapo_trl import Segments
from tests.testing_utils import (
    Recorder,
    fixed_rollout,
    length_reward,
    logged,
    random_completions,
    sapo_trainer,
    state_of,
    unmoved,
)


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
BOTH_FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
CRITICS = pytest.mark.parametrize("critic", ["separate", "shared"])


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


class TestRewards:
    @TEXT_FAMILY
    def test_async_rewards(self, family, tmp_path):
        async def score(completion_ids, **kwargs):
            return length_reward(completion_ids)

        recorder = Recorder()
        trainer = sapo_trainer(
            family, tmp_path, trainer_kwargs={"reward_funcs": [score, length_reward], "callbacks": [recorder]}
        )
        trainer.train()
        rollout = recorder.rollouts[0]
        expected = [2 * reward for reward in length_reward(rollout.completion_ids.tolist())]
        assert rollout.rewards.tolist() == pytest.approx(expected)
        assert logged(trainer, "rewards/score/mean") == pytest.approx([sum(expected) / 8])

    @TEXT_FAMILY
    @CRITICS
    def test_response_that_nothing_scored_takes_no_part(self, family, critic, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            trainer_kwargs={
                "reward_funcs": [
                    lambda completions, **kwargs: [1.0, None, None, 0.0],
                    lambda completions, **kwargs: [None, None, 0.5, None],
                ],
                "callbacks": [recorder],
            },
        )
        trainer.train()
        rollout = recorder.rollouts[0]
        assert rollout.rewards.isnan().tolist() == [False, True, False, False]
        assert rollout.rewards[[0, 2, 3]].tolist() == [1.0, 0.5, 0.0]
        assert (rollout.segments.count == 0).tolist() == [False, True, False, False]
        for tensor in (rollout.advantages, rollout.returns, rollout.token_rewards):
            assert tensor[1].abs().max() == 0
            assert tensor.isfinite().all()
        for module in (trainer.model, trainer.critic.value_head):
            assert all(parameter.isfinite().all() for parameter in module.parameters())

    @TEXT_FAMILY
    def test_extra_columns_reach_the_reward_function(self, family, tmp_path):
        seen = []

        def score(completions, answer, log_metric, **kwargs):
            seen.extend(answer)
            log_metric("my_metric", 3.0)
            return [float(x) for x in answer]

        trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"reward_funcs": score})
        trainer.train()
        assert len(seen) == 4 and set(seen) <= set(family.dataset()["answer"])
        assert logged(trainer, "my_metric") == [3.0]
        assert logged(trainer, "reward") == pytest.approx([sum(map(float, seen)) / 4])


class TestRollouts:
    @TEXT_FAMILY
    def test_holes_of_env_mask_carry_nothing(self, family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            beta=0.1,
            trainer_kwargs={
                "callbacks": [recorder],
                "rollout_func": fixed_rollout(
                    lambda prompts, _: [list(range(30, 38))] * len(prompts),
                    env_mask=lambda prompts, completions: [[1, 1, 0, 0, 1, 1, 1, 0]] * len(prompts),
                ),
            },
        )
        trainer.train()
        rollout = recorder.rollouts[0]
        holes = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1]).bool()
        assert torch.equal(rollout.segments.mask, ~holes.expand(4, 8))
        for tensor in (rollout.advantages, rollout.returns, rollout.token_rewards):
            assert tensor[:, holes].abs().max() == 0
        # The outcome's reward is on the last token of the policy's own.
        rewards = torch.tensor(length_reward([list(range(30, 38))] * 4))
        assert torch.allclose(rollout.token_rewards[:, 6], rewards)
        # Holes are 37.5 % of the tokens: means over tokens leave them out.
        assert logged(trainer, "completions/mean_length") == [5.0]

    @pytest.mark.parametrize(
        ("family", "shuffled"),
        [
            ("qwen2", False),
            ("qwen2", True),
            pytest.param("qwen2_5_vl", False, marks=pytest.mark.slow),
            ("qwen2_5_vl", True),
        ],
        indirect=["family"],
    )
    def test_iterable_data_set(self, family, shuffled, tmp_path):
        recorder, dataset = Recorder(), family.dataset(8)
        trainer = sapo_trainer(
            family,
            tmp_path,
            shuffle_dataset=shuffled,
            max_steps=4,
            trainer_kwargs={"train_dataset": dataset.to_iterable_dataset(), "callbacks": [recorder]},
        )
        policy = state_of(trainer.model)
        trainer.train()
        assert unmoved(policy, trainer.model) == []
        texts = [
            trainer.tokenizer.decode(ids[mask.bool()])
            for rollout in recorder.rollouts
            for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
        ]
        assert len(texts) == 8
        if not shuffled:
            questions = [json.dumps(row["prompt"], default=str) for row in dataset]
            for text, question in zip(texts, questions, strict=True):
                assert text.split("Find ")[1].split(".")[0] in question

    @TEXT_FAMILY
    def test_several_generations_and_iterations(self, family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            num_generations=4,
            num_iterations=2,
            per_device_train_batch_size=4,
            max_steps=8,
            trainer_kwargs={"callbacks": [recorder]},
        )
        trainer.train()
        # Two mini-batches, each seen twice, per rollout.
        assert recorder.steps == [0, 4]
        for rollout in recorder.rollouts:
            prompts = [tuple(row) for row in rollout.prompt_ids.tolist()]
            assert prompts[0:4] == prompts[:1] * 4 and prompts[4:] == prompts[4:5] * 4 and prompts[0] != prompts[4]
            assert len({tuple(row) for row in rollout.completion_ids.tolist()}) > 4
        # Off-policy in the second iteration, on-policy in the first step after each rollout.
        ratios = logged(trainer, "ratio/max")
        assert ratios[0] == pytest.approx(1.0, abs=1e-5) and ratios[4] == pytest.approx(1.0, abs=1e-5)
        assert max(ratios[1:4]) > 1.1

    @TEXT_FAMILY
    @pytest.mark.parametrize("shape", ["token", "sequence"])
    def test_importance_correction_of_the_sampler_weighs_the_tokens(self, family, shape, tmp_path):
        """vLLM's correction arrives under this key, `(B, T)` or `(B, 1)`."""
        trainer = sapo_trainer(
            family,
            tmp_path,
            learning_rate=0.0,
            trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5))},
        )
        trainer.train()
        trainer.model.train()
        batch = trainer.micro_batches[0]
        mask = batch["completion_mask"]
        torch.manual_seed(0)
        weights = torch.rand(mask.shape if shape == "token" else (len(mask), 1)) + 0.5
        plain = trainer.policy_loss(trainer.model, batch)
        batch["importance_sampling_ratio"] = weights
        weighted = trainer.policy_loss(trainer.model, batch)
        # The weights have not moved since the rollout, so every ratio is 1.
        losses = -batch["advantages"] * mask
        torch.testing.assert_close(plain, losses.sum() / mask.sum())
        torch.testing.assert_close(weighted, (losses * weights).sum() / mask.sum())
        assert (weighted - plain).abs() > 1e-3


class TestSegmentation:
    TEXT = "Step 1: AB=3\nStep 2: BC=4\n\nSo 7."

    def segment_texts(self, family, folder, **settings):
        recorder = Recorder()
        ids = family.tokenizer.encode(self.TEXT)
        trainer = sapo_trainer(
            family,
            folder,
            max_completion_length=len(ids),
            trainer_kwargs={
                "callbacks": [recorder],
                "rollout_func": fixed_rollout(lambda prompts, _: [ids] * len(prompts)),
            },
            **settings,
        )
        trainer.train()
        assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
        rollout = recorder.rollouts[0]
        row = rollout.segments.ids[0]
        texts = [
            family.tokenizer.decode(rollout.completion_ids[0][row == m]) for m in range(int(rollout.segments.count[0]))
        ]
        assert "".join(texts) == self.TEXT
        return texts, rollout

    @TEXT_FAMILY
    def test_newline(self, family, tmp_path):
        texts, _ = self.segment_texts(family, tmp_path, segmentation="newline")
        assert texts == ["Step 1: AB=3\n", "Step 2: BC=4\n\n", "So 7."]

    @TEXT_FAMILY
    def test_step(self, family, tmp_path):
        texts, _ = self.segment_texts(family, tmp_path, segmentation="step")
        assert texts == ["Step 1: AB=3\n", "Step 2: BC=4\n\nSo 7."]
        texts, _ = self.segment_texts(family, tmp_path, segmentation="step", step_pattern="So")
        assert texts == ["Step 1: AB=3\nStep 2: BC=4\n\n", "So 7."]

    @TEXT_FAMILY
    def test_token_and_sequence(self, family, tmp_path):
        texts, rollout = self.segment_texts(family, tmp_path, segmentation="token")
        assert len(texts) == rollout.completion_ids.size(1)
        assert self.segment_texts(family, tmp_path, segmentation="sequence")[0] == [self.TEXT]

    @TEXT_FAMILY
    @pytest.mark.parametrize("cut", ["end", "start"])
    def test_entropy_and_probability(self, family, cut, tmp_path):
        length = len(family.tokenizer.encode(self.TEXT))
        for settings, count, score in (
            ({"segmentation": "entropy", "top_percent": 25.0}, math.ceil(length / 4), "entropies"),
            ({"segmentation": "probability", "num_cuts": 3}, 3, "logps"),
        ):
            _, rollout = self.segment_texts(family, tmp_path, segment_cut=cut, **settings)
            scores = getattr(rollout, score)[0] * (1 if score == "entropies" else -1)
            selected = set(scores.topk(count).indices.tolist())
            if cut == "end":
                marked = set(rollout.segments.is_last[0].nonzero().flatten().tolist())
                assert marked == selected | {length - 1}
            else:
                marked = set(rollout.segments.is_first[0].nonzero().flatten().tolist())
                assert marked == selected | {0}

    @TEXT_FAMILY
    def test_any_callable(self, family, tmp_path):
        seen = []

        def halves(entropies, mask):
            seen.append((entropies, mask))
            middle = torch.arange(mask.size(1)) == mask.size(1) // 2
            return Segments.from_last_tokens(middle.expand_as(mask), mask)

        recorder = Recorder()
        trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"segmenter": halves, "callbacks": [recorder]})
        trainer.train()
        assert recorder.rollouts[0].segments.count.tolist() == [2] * 4
        # Once per rollout, of the policy that produced it.
        assert len(seen) == 1
        assert torch.equal(seen[0][0], recorder.rollouts[0].entropies) and seen[0][1].all()

    @TEXT_FAMILY
    def test_further_inputs_by_name(self, family, tmp_path):
        seen = {}

        def with_some(entropies, mask, completion_ids):
            seen["some"] = {"completion_ids"}
            assert completion_ids.shape == mask.shape
            return Segments.from_last_tokens(mask, mask)

        def with_all(entropies, mask, **kwargs):
            seen["all"] = kwargs.keys()
            return Segments.from_last_tokens(mask, mask)

        for segmenter in (with_some, with_all):
            sapo_trainer(family, tmp_path, trainer_kwargs={"segmenter": segmenter}).train()
        assert seen == {"some": {"completion_ids"}, "all": {"logps", "completion_ids", "tokenizer"}}


class TestEvaluation:
    @BOTH_FAMILIES
    @CRITICS
    def test_metrics_are_there_and_nothing_moves(self, family, critic, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            per_device_eval_batch_size=4,
            num_generations_eval=2,
            trainer_kwargs={"eval_dataset": family.dataset(4), "callbacks": [recorder]},
        )
        policy, value_head = state_of(trainer.model), state_of(trainer.critic.value_head)
        metrics = trainer.evaluate()
        assert len(unmoved(policy, trainer.model)) == len(policy)
        assert len(unmoved(value_head, trainer.critic.value_head)) == len(value_head)
        names = "loss reward policy_loss critic/mean_value critic/explained_variance segments/count entropy kl"
        names += " time/generate"
        logs = trainer.state.log_history[-1]
        assert all(math.isfinite(logs[f"eval_{name}"]) for name in names.split())
        assert math.isfinite(metrics["eval_loss"])
        assert {rollout.mode for rollout in recorder.rollouts} == {"eval"}
        assert sum(len(rollout.rewards) for rollout in recorder.rollouts) == 8
        rewards = torch.cat([rollout.rewards for rollout in recorder.rollouts])
        assert logs["eval_reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)

    @TEXT_FAMILY
    @CRITICS
    @pytest.mark.parametrize("warm_up", [0, 1])
    def test_evaluation_between_mini_batches_changes_nothing(self, family, critic, warm_up, tmp_path):
        """Nor does it leak into the training log."""
        runs = []
        for evaluate in (False, True):
            trainer = sapo_trainer(
                family,
                tmp_path,
                critic=critic,
                critic_warmup_steps=warm_up,
                per_device_eval_batch_size=2,
                eval_strategy="steps" if evaluate else "no",
                eval_steps=1,
                trainer_kwargs={
                    "eval_dataset": family.dataset(4),
                    "rollout_func": fixed_rollout(random_completions(5)),
                },
            )
            trainer.train()
            runs.append(trainer)
        assert len(logged(runs[1], "eval_reward")) == 2
        for one, other in ((runs[0].model, runs[1].model), (runs[0].critic.value_head, runs[1].critic.value_head)):
            assert torch.equal(flat(state_of(one)), flat(state_of(other)))
        for name in ("policy_loss", "critic/loss", "reward", "segments/count", "critic/grad_norm"):
            assert logged(runs[0], name) == logged(runs[1], name), name

    @TEXT_FAMILY
    def test_critic_is_in_the_mode_of_the_policy(self, family, tmp_path):
        """Dropout acts in training only, in both."""
        model = family.build_model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            model=model,
            per_device_eval_batch_size=4,
            trainer_kwargs={
                "eval_dataset": family.dataset(4),
                "rollout_func": fixed_rollout(random_completions(5)),
                "callbacks": [recorder],
            },
        )
        trainer.evaluate()
        trainer.evaluate()
        one, other = recorder.rollouts
        assert torch.equal(one.values, other.values) and torch.equal(one.logps, other.logps)
        trainer.model.train()
        with torch.no_grad():
            batch = {
                "prompt_ids": one.prompt_ids,
                "prompt_mask": one.prompt_mask,
                "completion_ids": one.completion_ids,
                "completion_mask": one.segments.mask.long(),
            }
            values = trainer.critic_forward(trainer.critic.module, batch)
        assert (values - one.values)[one.segments.mask].abs().max() > 1e-3
