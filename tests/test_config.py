"""`SAPOConfig`: the paper's and the official script's values, and clear errors."""

import inspect
import math

import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

from sapo_trl import SAPOConfig
from tests.testing_utils import sapo_config


@pytest.fixture
def make(tmp_path):
    """A configuration of its own defaults, but for where it runs."""
    return lambda **settings: SAPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


class TestDefaults:
    def test_paper_table_7_and_official_script(self, make):
        expected = {
            # The paper's Table 7
            "lam": 0.99,
            "gamma": 1.0,
            "critic_learning_rate": 2e-6,
            "learning_rate": 1e-6,
            "beta": 0.001,
            "kl_estimator": "k1",
            "kl_placement": "reward",
            "segmentation": "entropy",
            "top_percent": 30.0,
            "num_mini_batches": 4,
            "value_state": "start",
            "critic": "separate",
            # The official script
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "delta": 3.0,
            "cliprange_value": 0.5,
            "whiten_advantages": True,
            "advantage_clamp": 5.0,
            "critic_max_grad_norm": 1.0,
            "critic_warmup_steps": 0,
            "importance_sampling_level": "segment",
            "num_generations": 1,
        }
        args = make()
        assert {name: getattr(args, name) for name in expected} == expected

    def test_a_rollout_batch_is_four_mini_batches(self, make):
        args = make(per_device_train_batch_size=2, gradient_accumulation_steps=3)
        assert (args.num_mini_batches, args.steps_per_generation, args.generation_batch_size) == (4, 12, 24)
        args = make(per_device_train_batch_size=2, gradient_accumulation_steps=3, num_mini_batches=2)
        assert (args.num_mini_batches, args.steps_per_generation, args.generation_batch_size) == (2, 6, 12)

    def test_mini_batches_follow_trl_settings(self, make):
        assert make(per_device_train_batch_size=2, generation_batch_size=12).num_mini_batches == 6
        assert make(gradient_accumulation_steps=2, steps_per_generation=6).num_mini_batches == 3
        assert make(gradient_accumulation_steps=2, steps_per_generation=6, num_mini_batches=3).num_mini_batches == 3

    def test_parser_reads_it(self, tmp_path):
        path = tmp_path / "config.yaml"
        path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\ntop_percent: 20\nnum_generations: 1\n")
        (args,) = TrlParser(SAPOConfig).parse_args_and_config(["--config", str(path), "--lam", "0.5"])
        assert (args.top_percent, args.num_generations, args.lam) == (20, 1, 0.5)

    def test_every_setting_of_ours_has_help_and_documentation(self):
        ours = {field.dest for field in HfArgumentParser(SAPOConfig)._actions} - {
            field.dest for field in HfArgumentParser(GRPOConfig)._actions
        }
        assert len(ours) > 15
        helps = {action.dest: action.help for action in HfArgumentParser(SAPOConfig)._actions}
        for name in ours:
            assert helps[name], name
            assert f"\n    {name} (`" in inspect.getdoc(SAPOConfig), name

    def test_learning_rate_of_a_critic_has_its_scale(self, make):
        assert make(critic="ladder").critic_learning_rate == 1e-4
        assert [make(critic=critic).critic_learning_rate for critic in ("shared", "adapter", "none")] == [2e-6] * 3
        assert make(critic="ladder", critic_learning_rate=0.0).critic_learning_rate == 0.0

    @pytest.mark.parametrize(
        ("settings", "error"),
        [
            ({"critic_layers": 2}, "`critic_layers` has no meaning with `critic='separate'`, got 2.*'ladder'"),
            ({"critic_width": 64, "critic": "shared"}, "`critic_width` has no meaning with `critic='shared'`"),
            ({"critic_reads": 2, "critic": "adapter"}, "`critic_reads` .* `critic` to 'shared' or 'ladder'"),
            ({"critic_width": 96, "critic": "ladder"}, "`critic_width` must be a multiple of 64, .* got 96"),
        ],
    )
    def test_sizes_are_for_critics_that_have_them(self, make, settings, error):
        with pytest.raises(ValueError, match=error):
            make(**settings)

    def test_math_inf_switches_critic_clipping_off(self, make):
        assert make(critic_max_grad_norm=math.inf).critic_max_grad_norm == math.inf


BAD = {
    "top_percent": [0.0, -1.0, 100.5, math.nan],
    "gamma": [-0.1, 1.1],
    "lam": [-0.1, 1.1],
    "critic_lam": [-0.1, 1.1],
    "critic_learning_rate": [-1e-6, "1e-6"],
    "critic_layers": [0, -1],
    "critic_width": [0, 100],
    "critic_reads": [0],
    "critic_warmup_steps": [-1],
    "critic_lr_warmup_steps": [-1],
    "critic_weight_decay": [-0.1],
    "beta": [-0.1, math.nan, "0.1"],
    "epsilon": [-0.1],
    "epsilon_high": [-0.1],
    "cliprange_value": [0.0, -1.0],
    "advantage_clamp": [0.0, -1.0],
    "critic_max_grad_norm": [0.0, -1.0, None],
    "num_cuts": [0, 2.5],
    "max_completion_length": [0],
    "num_mini_batches": [0],
    "num_generations": [0],
    "delta": [1.0, 0.5],
    "segmentation": ["sentences"],
    "segment_cut": ["middle"],
    "value_state": ["mean"],
    "critic": ["both"],
    "kl_placement": ["advantage"],
    "kl_estimator": ["k4"],
    "importance_sampling_level": ["word"],
    "loss_aggregation": ["sum"],
    "value_loss_aggregation": ["sum"],
    "critic_lr_scheduler_type": ["reduce_lr_on_plateau", "ramp"],
    "top_entropy_quantile": [0.2],
    "off_policy_mask_threshold": [0.5],
    "use_adaptive_entropy": [True],
    "multi_objective_aggregation": ["normalize_then_sum"],
    "loss_type": ["sapo", "ppo"],
}


class TestErrors:
    @pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
    def test_bad_value_is_named(self, make, name, value):
        with pytest.raises(ValueError) as error:
            make(**{name: value})
        message = str(error.value)
        assert f"`{name}`" in message
        assert (repr(value) if isinstance(value, str) else str(value)) in message

    def test_trl_sapo_is_another_algorithm(self, make):
        with pytest.raises(ValueError, match="Soft Adaptive Policy Optimization.*2605.01327"):
            make(loss_type="sapo")

    @pytest.mark.parametrize(("name", "value"), [("num_return_sequences", 2), ("return_dict_in_generate", True)])
    def test_sampling_that_gives_something_else_than_one_response_a_row(self, make, name, value):
        with pytest.raises(ValueError, match=f"`generation_kwargs` sets `{name}={value}`"):
            make(generation_kwargs={name: value})
        make(generation_kwargs={name: 1 if value == 2 else False})

    def test_k1_in_the_loss(self, make):
        with pytest.raises(ValueError, match='`kl_estimator="k1"`.*`kl_placement="reward"`'):
            make(kl_placement="loss", kl_estimator="k1")
        assert make(kl_placement="loss", kl_estimator="k1", beta=0.0).beta == 0.0

    def test_batch_sizes_that_do_not_divide(self, make):
        with pytest.raises(ValueError, match=r"steps_per_generation \(3\).*gradient_accumulation_steps \(2\)"):
            make(steps_per_generation=3, gradient_accumulation_steps=2)
        with pytest.raises(ValueError, match=r"generation_batch_size \(7\).*\(2\)"):
            make(generation_batch_size=7, per_device_train_batch_size=2)
        with pytest.raises(ValueError, match=r"generation_batch_size \(8\).*num_generations \(3\)"):
            make(generation_batch_size=8, per_device_train_batch_size=2, num_generations=3)

    def test_a_rollout_that_is_no_whole_number_of_groups(self, tmp_path):
        small = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2}
        small |= {"gradient_accumulation_steps": 1, "num_mini_batches": 2}
        with pytest.raises(ValueError) as caught:
            SAPOConfig.from_preset("grpo", **small)
        assert str(caught.value) == (
            "A rollout has 4 responses (per_device_train_batch_size 2 × gradient_accumulation_steps 1 × "
            "num_mini_batches 2 × processes 1), which num_generations=8 does not divide: set num_generations=4, or "
            "raise per_device_train_batch_size to 4."
        )
        # Both remedies help.
        assert SAPOConfig.from_preset("grpo", **small, num_generations=4).generation_batch_size == 4
        assert SAPOConfig.from_preset("grpo", **small | {"per_device_train_batch_size": 4}).generation_batch_size == 8

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            # No smaller group divides 7, and twice 7 responses are no multiple of 3.
            (
                {"steps_per_generation": 7, "num_generations": 3},
                r"\(.* 1 × steps_per_generation 7 × .*: raise .* to 3\.",
            ),
            ({"num_mini_batches": 6, "num_generations": 4}, "set num_generations=3, or raise .* to 2"),
        ],
    )
    def test_remedies_for_a_rollout_that_is_no_whole_number_of_groups(self, make, settings, message):
        with pytest.raises(ValueError, match=message):
            make(per_device_train_batch_size=1, gradient_accumulation_steps=1, **settings)

    def test_mini_batches_that_contradict(self, make):
        with pytest.raises(ValueError, match=r"num_mini_batches \(4\) contradicts steps_per_generation \(6\)"):
            make(num_mini_batches=4, steps_per_generation=6)
        with pytest.raises(ValueError, match=r"num_mini_batches \(4\) contradicts"):
            make(num_mini_batches=4, generation_batch_size=16, per_device_train_batch_size=8)

    def test_trainer_refuses_another_configuration(self, tmp_path, tokenizer):
        from sapo_trl import SAPOTrainer

        args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
        with pytest.raises(TypeError, match="`args` must be a `SAPOConfig`, got `GRPOConfig`"):
            SAPOTrainer(model="unused", args=args)

    def test_helper_of_these_tests_overrides_defaults(self, tmp_path):
        assert sapo_config(tmp_path, lam=0.25).lam == 0.25
