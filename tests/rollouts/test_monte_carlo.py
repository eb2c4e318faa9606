"""Monte-Carlo values in the trainer: which states are valued, and what stands for the others."""

import pytest
import torch

from sapo_trl import SAPOConfig, Segments
from sapo_trl.rollouts import ContinuationSampler, StateValues, TokenizedPrompts
from tests.testing_utils import Recorder, logged, sapo_trainer
from tests.trainer.test_trainer import mixed_dataset


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
RAW = {"whiten_advantages": False, "advantage_clamp": None, "beta": 0.0, "lam": 0.0}
TREE = {
    **RAW,
    "critic": "tree",
    "segmentation": "sequence",
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "tree_widths": [2, 2],
    "tree_segment_length": 3,
    "max_steps": 1,
}


class KnownValues:
    """Instead of sampling: a state's value is a function of its length."""

    def __init__(self, value_of):
        self.value_of, self.lengths = value_of, []

    def values_at(self, states, completion_ids, num_continuations, truncated_reward=None) -> StateValues:
        lengths = states.nonzero(as_tuple=True)[1].tolist()
        self.lengths.append(lengths)
        values = torch.tensor([self.value_of(length) for length in lengths])
        return StateValues(values, values.unsqueeze(1), len(lengths), 0, 0.0)


def thirds(entropies, mask) -> Segments:
    position = torch.cumsum(mask, dim=1)
    return Segments.from_last_tokens(position % 3 == 0, mask)


class TestStates:
    @TEXT_FAMILY
    @pytest.mark.parametrize(
        ("confident", "valued"),
        [
            # Segments of three tokens: a confident one in the middle is valued, because the one before it ends there.
            (set(range(3, 6)), [0, 3, 6]),
            # Before the first token that learns nothing is.
            (set(range(0, 3)), [3, 6]),
            (set(range(0, 9)), []),
        ],
        ids=["middle", "first", "all"],
    )
    def test_no_advantage_where_all_states_are_worth_the_same(self, family, confident, valued, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic="monte_carlo",
            confident_token_threshold=0.5,
            max_completion_length=9,
            max_steps=1,
            num_mini_batches=1,
            importance_sampling_level="token",
            **RAW,
            trainer_kwargs={
                "segmenter": thirds,
                "reward_funcs": lambda completions, **kwargs: [0.8] * len(completions),
                "callbacks": [recorder],
            },
        )
        known = KnownValues(lambda length: 0.8)
        trainer.continuation_sampler = lambda *args: known
        forward = trainer.policy_forward

        def with_confidence(model, batch, *args, **kwargs):
            result = forward(model, batch, *args, **kwargs)
            position = torch.arange(result.logps.size(1))
            is_confident = torch.isin(position, torch.tensor(sorted(confident)))
            # Not in place: the update differentiates through them.
            result.logps = result.logps * 0 + torch.where(is_confident, -0.1, -2.0)
            return result

        trainer.policy_forward = with_confidence
        trainer.train()
        (rollout,) = recorder.rollouts
        assert (rollout.segments.mask.sum(1) == 9).all()
        assert known.lengths == [valued * 2]
        torch.testing.assert_close(rollout.advantages, torch.zeros_like(rollout.advantages), rtol=0, atol=1e-6)

    @TEXT_FAMILY
    def test_the_reward_stands_behind_the_cap(self, family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family, tmp_path, critic="monte_carlo", segmentation="token", max_valued_segments=2, max_steps=1,
            num_mini_batches=1, **RAW, trainer_kwargs={"callbacks": [recorder]},
        )  # fmt: skip
        known = KnownValues(lambda length: 0.1 * length)
        trainer.continuation_sampler = lambda *args: known
        trainer.train()
        (rollout,) = recorder.rollouts
        assert known.lengths == [[0, 1, 2, 0, 1, 2]]
        for row, reward in enumerate(rollout.rewards.tolist()):
            length = int(rollout.segments.mask[row].sum())
            expected = [0.1, 0.1, reward - 0.2] + [0.0] * (length - 3)
            assert rollout.advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-6)


class TestImages:
    @pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
    @pytest.mark.parametrize(
        "settings",
        [
            {"critic": "monte_carlo", "segmentation": "entropy", "num_continuations": 3},
            {
                "critic": "tree",
                "segmentation": "sequence",
                "num_generations": 2,
                "tree_widths": [2, 2],
                "tree_segment_length": 3,
            },
        ],
        ids=["monte_carlo", "tree"],
    )
    @pytest.mark.parametrize("without", [None, []])
    def test_prompts_without_image_among_prompts_with_one(self, family, settings, without, tmp_path):
        trainer = sapo_trainer(
            family,
            tmp_path,
            **{**RAW, "per_device_train_batch_size": 1, "num_mini_batches": 4, "max_steps": 4, **settings},
            trainer_kwargs={"train_dataset": mixed_dataset(family, without)},
        )
        trainer.train()
        assert len(logged(trainer, "loss")) == 4

    def test_fields_of_one_tensor_per_prompt_stay_so(self):
        """As Idefics' processor returns them: images padded to one row of the batch."""
        pixel_values = torch.arange(2 * 2 * 3 * 4).reshape(2, 2, 3, 2, 2).float()
        prompts = TokenizedPrompts([[1], [2]], [["a"], ["b", "c"]], {"pixel_values": pixel_values})
        taken = prompts.extended([1, 0, 1], [[], [], []])
        assert torch.equal(taken.fields["pixel_values"], pixel_values[[1, 0, 1]])

    def test_families_without_a_way_to_split_are_an_error(self):
        fields = {"pixel_values": torch.zeros(4, 3), "spatial_shapes": torch.zeros(2, 2)}
        with pytest.raises(ValueError, match="cannot be told apart by prompt"):
            TokenizedPrompts([[1], [2]], [["a"], ["b"]], fields).extended([0], [[]])


class TestTreeGroups:
    @TEXT_FAMILY
    def test_states_of_different_prompts_stay_apart(self, family, tmp_path):
        """A tree's rows come in any order: where a row stands does not say which prompt it is of."""
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            **TREE,
            trainer_kwargs={"callbacks": [recorder]},
        )
        trainer.train()
        (rollout,) = recorder.rollouts
        sampler: ContinuationSampler = rollout.continuations
        prompts = [tuple(ids) for ids in sampler.prompts.ids]
        assert len(set(prompts)) == 2
        same_group = {(a, b) for a in range(8) for b in range(8) if sampler.groups[a] == sampler.groups[b]}
        assert same_group == {(a, b) for a in range(8) for b in range(8) if prompts[a] == prompts[b]}

    @TEXT_FAMILY
    def test_a_function_that_skips_leaves(self, family, tmp_path):
        """An edge is worth what its responses are worth, whichever functions scored them."""

        def first(completion_ids, **kwargs):
            return [float(index % 2 == 0) for index in range(len(completion_ids))]

        def second(completion_ids, **kwargs):
            return [None if index % 2 == 0 else 1.0 for index in range(len(completion_ids))]

        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            **TREE,
            trainer_kwargs={"callbacks": [recorder], "reward_funcs": [first, second]},
        )
        trainer.train()
        # Every leaf is worth one: nothing to learn.
        (rollout,) = recorder.rollouts
        assert rollout.advantages.abs().max() == 0
        assert logged(trainer, "reward") == [1.0]


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"critic": "tree"},
                "`segmentation` must be \"sequence\", so that each edge is one segment, got 'entropy'",
            ),
            ({"critic": "monte_carlo", "gamma": 0.9}, "`gamma` must be 1, got 0.9"),
            (
                {"critic": "monte_carlo", "max_completion_length": None},
                "`critic='monte_carlo'` needs a `max_completion_length`",
            ),
            (
                {"loss_aggregation": "seq-mean-token-sum-norm", "max_completion_length": None},
                "`loss_aggregation='seq-mean-token-sum-norm'` needs a",
            ),
            ({"kl_aggregation": "token-mean"}, '`kl_placement` is "reward": it must be "loss"'),
            ({"truncated_continuation_reward": float("nan")}, "must be finite"),
            ({"sapo_temperature_pos": 0.0}, "`sapo_temperature_pos` must be positive"),
        ],
    )
    def test_errors(self, settings, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            SAPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{"beta": 0.0, **settings})

    @TEXT_FAMILY
    def test_trees_must_fit_into_a_rollout(self, family, tmp_path):
        settings = {"critic": "tree", "segmentation": "sequence", "num_generations": 4, "num_mini_batches": 2}
        with pytest.raises(ValueError, match="which num_generations=4 does not divide"):
            sapo_trainer(family, tmp_path, **RAW, **settings, per_device_train_batch_size=3)

    @TEXT_FAMILY
    def test_token_weighting_is_checked_at_once(self, family, tmp_path):
        with pytest.raises(TypeError, match="`token_weighting` must be a `RoleAwareWeighting`"):
            sapo_trainer(family, tmp_path, trainer_kwargs={"token_weighting": lambda **kwargs: None})

    @TEXT_FAMILY
    def test_role_aware_weights_need_a_model_with_images(self, family, tmp_path):
        with pytest.raises(ValueError, match="a model of type 'qwen2' takes none"):
            sapo_trainer(family, tmp_path, advantage_weighting="role_aware")

    @TEXT_FAMILY
    def test_kl_is_logged_once_with_trls_losses(self, family, tmp_path):
        """TRL's own, of the policy being updated: 0 before the first step."""
        trainer = sapo_trainer(
            family,
            tmp_path,
            loss_type="grpo",
            advantage_estimator="group",
            critic="none",
            importance_sampling_level="token",
            kl_placement="loss",
            kl_estimator="k3",
            beta=0.1,
            num_generations=2,
            max_steps=4,
        )
        trainer.train()
        kls = logged(trainer, "kl")
        assert len(kls) == 4 and kls[0] == 0.0 and min(kls[1:]) > 0.0
