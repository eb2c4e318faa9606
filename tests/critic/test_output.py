"""Values between a head and the advantages: their start at the mean reward, and their range."""

import json
import math

import pytest
import torch
from peft import LoraConfig

from sapo_trl import SegmentValueHead
from sapo_trl.critic.output import ValueOutput
from tests.testing_utils import Recorder, fixed_rollout, random_completions, sapo_trainer, state_of


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
CRITICS = pytest.mark.parametrize("critic", ["separate", "shared", "adapter", "ladder"])


def run(family, folder, critic, *, resume=None, reward_funcs=None, value_model=None, **settings):
    """A run on given responses, with its rollouts."""
    recorder = Recorder()
    kwargs = {"rollout_func": fixed_rollout(random_completions(3)), "callbacks": [recorder]}
    if critic == "adapter":
        kwargs["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    if reward_funcs is not None:
        kwargs["reward_funcs"] = reward_funcs
    if value_model is not None:
        kwargs["value_model"] = value_model
    settings = {"learning_rate": 0.02, "critic_learning_rate": 0.02, **settings}
    trainer = sapo_trainer(family, folder, critic=critic, trainer_kwargs=kwargs, **settings)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, recorder.rollouts


def states_of(rollout) -> torch.Tensor:
    return rollout.values[rollout.segments.state_mask("start")]


class TestOutput:
    def test_without_settings_it_is_the_heads(self):
        output = torch.randn(3, 4)
        assert ValueOutput()(output) is output

    @pytest.mark.parametrize("value_range", [[0.0, 1.0], [-1.0, 3.0]])
    def test_a_range_is_a_scaled_arctangent(self, value_range):
        low, high = value_range
        outputs = torch.linspace(-50, 50, 101, dtype=torch.float64).requires_grad_()
        values = ValueOutput(value_range)(outputs)
        for output, value in zip(outputs.tolist(), values.tolist(), strict=True):
            # The angle of the point (1, output), as a share of the half circle.
            assert value == pytest.approx(low + (high - low) * (math.atan2(output, 1) / math.pi + 0.5))
            assert low < value < high
        (slope,) = torch.autograd.grad(values.sum(), outputs)
        assert torch.allclose(slope, (high - low) / math.pi / (1 + outputs**2))

    @pytest.mark.parametrize(
        ("value_range", "value", "expected"),
        [
            (None, 0.3, 0.3),
            (None, -7.0, -7.0),
            ([0.0, 1.0], 0.3, 0.3),
            ([-1.0, 3.0], 0.0, 0.0),
            ([0.0, 1.0], 0.0, 0.05),  # an end is at infinity
            ([0.0, 1.0], 1.0, 0.95),
            ([-1.0, 3.0], 9.0, 2.8),
        ],
    )
    def test_an_output_of_zero_stands_for_the_start(self, value_range, value, expected):
        output = ValueOutput(value_range)
        output.start_at(value)
        assert output(torch.zeros(2, dtype=torch.float64)).tolist() == pytest.approx([expected] * 2)

    def test_they_are_saved_with_the_head(self, tmp_path):
        head = SegmentValueHead(8)
        head.output.set_range([0.0, 2.0])
        head.output.start_at(0.7)
        head.save_pretrained(tmp_path)
        loaded = SegmentValueHead.from_pretrained(tmp_path)
        hidden_states = torch.randn(2, 3, 8)
        assert torch.equal(loaded(hidden_states=hidden_states), head(hidden_states=hidden_states))
        assert loaded.output == head.output

    def test_a_range_is_the_same_as_a_tuple_or_a_list(self, tmp_path):
        head = SegmentValueHead(8)
        head.output.set_range((0, 2))
        head.save_pretrained(tmp_path)
        for same in ((0, 2), [0.0, 2.0]):
            again = SegmentValueHead(8)
            again.output.set_range(same)
            again.load_weights(tmp_path)
            assert again.output.value_range == [0.0, 2.0]

    def test_a_head_without_them_is_saved_as_before(self, tmp_path):
        SegmentValueHead(8).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "value_head.json").read_text()) == {"mode": "shared", "hidden_size": 8}


@TEXT_FAMILY
@CRITICS
class TestStartAtTheMeanReward:
    def test_the_first_rollouts_values_are_shifted_by_it(self, family, critic, tmp_path):
        """The same run with the other start has the same values but for the mean reward."""
        _, (plain, *_) = run(family, tmp_path / "plain", critic)
        _, (shifted, *_) = run(family, tmp_path / "shifted", critic, critic_initial_value="reward_mean")
        assert torch.equal(plain.completion_ids, shifted.completion_ids)
        mean = plain.rewards.mean()
        assert mean > 0.2
        assert torch.allclose(states_of(shifted), states_of(plain) + mean, atol=1e-5)

    def test_within_a_range(self, family, critic, tmp_path):
        settings = {"critic_initial_value": "reward_mean", "value_range": [0.0, 1.0]}
        trainer, rollouts = run(family, tmp_path, critic, max_steps=6, critic_learning_rate=0.3, **settings)
        mean = rollouts[0].rewards.mean().item()
        output = trainer.critic.value_head.output
        assert 0.5 + math.atan(output.offset) / math.pi == pytest.approx(mean)
        assert (states_of(rollouts[0]) - mean).abs().mean() < 0.25
        for rollout in rollouts:
            assert ((states_of(rollout) > 0) & (states_of(rollout) < 1)).all()

    def test_it_is_set_once(self, family, critic, tmp_path):
        rewards = iter([0.25, 0.75, 5.0, 5.0, 9.0, 9.0, 9.0, 9.0])

        def reward(completion_ids, **kwargs) -> list[float]:
            offset = next(rewards)
            return [offset + (index % 2) for index in range(len(completion_ids))]

        trainer, rollouts = run(
            family, tmp_path, critic, max_steps=4, critic_initial_value="reward_mean", reward_funcs=reward
        )
        assert len(rollouts) == 2 and trainer.critic.value_head.output.offset == pytest.approx(0.75)

    def test_resuming_goes_on_bit_for_bit(self, family, critic, tmp_path):
        settings = {"critic_initial_value": "reward_mean", "value_range": [0.0, 1.0], "max_steps": 4}
        whole, rollouts = run(family, tmp_path / "whole", critic, save_strategy="steps", save_steps=2, **settings)
        checkpoint = tmp_path / "whole" / "checkpoint-2"
        parts, second = run(family, tmp_path / "parts", critic, resume=checkpoint, **settings)
        assert parts.critic.value_head.output == whole.critic.value_head.output
        assert len(second) == 1 and torch.equal(second[0].values, rollouts[1].values)
        expected = state_of(whole.critic.value_head)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(parts.critic.value_head).items())

    def test_a_saved_critic_keeps_its_values(self, family, critic, tmp_path):
        trainer, _ = run(family, tmp_path / "first", critic, critic_initial_value="reward_mean")
        before = trainer.critic.value_head.output.offset
        trainer.save_model(str(tmp_path / "saved"))
        again, _ = run(
            family,
            tmp_path / "again",
            critic,
            critic_initial_value="reward_mean",
            value_model=str(tmp_path / "saved" / "critic"),
            reward_funcs=lambda completion_ids, **kwargs: [7.0 + i for i in range(len(completion_ids))],
        )
        assert again.critic.value_head.output.offset == before > 0

    def test_another_range_than_the_checkpoints_is_an_error(self, family, critic, tmp_path):
        run(family, tmp_path / "first", critic, save_strategy="steps", save_steps=2, value_range=[0.0, 1.0])
        with pytest.raises(ValueError, match=r"trained with `value_range=\[0.0, 1.0\]`, but the run's is None"):
            run(family, tmp_path / "second", critic, resume=tmp_path / "first" / "checkpoint-2", max_steps=4)


@TEXT_FAMILY
def test_a_rollout_without_rewards_sets_no_start(family, tmp_path):
    calls = []

    def reward(completion_ids, **kwargs) -> list[float | None]:
        calls.append(len(completion_ids))
        return [None if len(calls) == 1 else 0.5 + index for index in range(len(completion_ids))]

    trainer, rollouts = run(
        family, tmp_path, "separate", max_steps=4, critic_initial_value="reward_mean", reward_funcs=reward
    )
    assert rollouts[0].rewards.isnan().all() and len(rollouts) == 2
    assert trainer.critic.value_head.output.offset == pytest.approx(rollouts[1].rewards.mean().item())


@TEXT_FAMILY
def test_evaluation_sets_no_start(family, tmp_path):
    trainer = sapo_trainer(
        family, tmp_path, critic_initial_value="reward_mean", trainer_kwargs={"eval_dataset": family.dataset(2)}
    )
    trainer.evaluate()
    assert trainer.critic.value_head.output == ValueOutput()


@pytest.mark.parametrize(
    "value_range", [[1.0, 0.0], [0.0], [0.0, 1.0, 2.0], [0.0, math.inf], [math.nan, 1.0], ["0", "1"], 1.0]
)
@TEXT_FAMILY
def test_ranges_that_are_none(family, value_range, tmp_path):
    with pytest.raises(ValueError, match=r"`value_range` must be `\[low, high\]`"):
        sapo_trainer(family, tmp_path, value_range=value_range)


@TEXT_FAMILY
@pytest.mark.parametrize(
    ("name", "value"),
    [("critic_initial_value", "reward_mean"), ("value_range", [0.0, 1.0]), ("critic_updates_per_step", 2)],
)
def test_no_critic_reads_them(family, name, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` has no meaning with `critic='none'`"):
        sapo_trainer(family, tmp_path, critic="none", **{name: value})
