"""
What `trl.GRPOTrainer` does with its own settings, `SAPOTrainer` does too: runs that differ in nothing but the class
end with the same losses and weights, bit for bit. And what TRL refuses is refused.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict, IterableDataset, IterableDatasetDict
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForSequenceClassification, set_seed
from trl import GRPOConfig, GRPOTrainer

from sapo_trl import SAPOConfig, SAPOTrainer
from tests.testing_utils import QUIET_ON_CPU, Family, fixed_rollout, length_reward, logged, random_completions


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)

SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 3,
    "learning_rate": 0.01,
    "beta": 0.0,
    **QUIET_ON_CPU,
    # TRL's defaults, where this package has others.
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "epsilon_high": None,
    "use_bias_correction_kl": True,
}


def unequal(prompts: list, trainer) -> list[list[int]]:
    """Completions of unequal lengths; every third one comes to its end."""
    rows, end = random_completions(7)(prompts, trainer), trainer.eos_token_ids[0]
    return [[*ids[:-1], end] if index % 3 == 0 else ids for index, ids in enumerate(rows)]


def variety(completion_ids, **kwargs) -> list[float]:
    return [len(set(ids)) / 8 for ids in completion_ids]


def sometimes(completion_ids, **kwargs) -> list[float | None]:
    return [None if sum(ids) % 3 == 0 else float(sum(ids) % 2) for ids in completion_ids]


async def awaited(completion_ids, **kwargs) -> list[float]:
    await asyncio.sleep(0)
    return [float(ids[0] % 5) for ids in completion_ids]


def run(trainer_class: type, args: Any, family: Family, folder: Path, **kwargs) -> tuple[Any, dict[str, torch.Tensor]]:
    trainer = trainer_class(
        family.model_class.from_pretrained(folder),
        **{
            "reward_funcs": length_reward,
            "train_dataset": family.dataset(),
            "processing_class": family.processing_class,
            "rollout_func": fixed_rollout(unequal),
            **kwargs,
        },
        args=args,
    )
    set_seed(3)
    trainer.train()
    return trainer, {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def compare(
    family: Family, tmp_path: Path, settings: dict[str, Any], tolerance: float = 0.0, **kwargs
) -> tuple[Any, Any]:
    folder = tmp_path / "model"
    family.build_model().save_pretrained(folder)
    settings = {**SETTINGS, **settings}
    level = {"importance_sampling_level": "token", "loss_type": "dapo"}
    trl_args = GRPOConfig(str(tmp_path / "theirs"), **level | settings)
    theirs, expected = run(GRPOTrainer, trl_args, family, folder, **kwargs)
    args = SAPOConfig.from_preset("grpo", str(tmp_path / "ours"), avoid_padding=False, **level | settings)
    ours, found = run(SAPOTrainer, args, family, folder, **kwargs)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=tolerance)
    assert len(logged(ours, "loss")) == 3
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m)
    before = dict(family.model_class.from_pretrained(folder).named_parameters())
    moved = [name for name in expected if name not in before or not torch.equal(expected[name], before[name])]
    assert moved
    return ours, theirs


@pytest.mark.slow
class TestSettings:
    @TEXT_FAMILY
    @pytest.mark.parametrize(
        "settings",
        [
            {"loss_type": "cispo", "epsilon_high": 5.0},
            {"loss_type": "luspo", "importance_sampling_level": "sequence"},
            {"loss_type": "vespo"},
            {"loss_type": "bnpo"},
            {"entropy_coef": 0.1},
            {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 6.0, "entropy_coef_delta": 0.01},
            {"top_entropy_quantile": 0.4},
            {"delta": 1.5, "num_iterations": 2},
            {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
            {"cast_lm_head_to_fp32": True},
            {"pad_to_multiple_of": 8},
            {"mask_truncated_completions": True},
            {"scale_rewards": "batch"},
            {"scale_rewards": "none"},
            {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
            {"beta": 0.1, "num_iterations": 2, "use_bias_correction_kl": False},
            {"num_generations": 8},
            {"dataloader_num_workers": 2},
            {"max_grad_norm": 0.01},
        ],
        ids=lambda settings: "-".join(settings),
    )
    def test_runs_are_equal(self, family, settings, tmp_path, request):
        # LUSPO adds a response's tokens up, in an order that depends on whether its advantage is one number or many.
        compare(family, tmp_path, settings, tolerance=1e-4 if settings.get("loss_type") == "luspo" else 0.0)

    @TEXT_FAMILY
    @pytest.mark.parametrize("generation_kwargs", [{"top_k": 20}, {"min_p": 0.1, "no_repeat_ngram_size": 2}])
    def test_sampled_responses(self, family, generation_kwargs, tmp_path):
        compare(family, tmp_path, {"generation_kwargs": generation_kwargs}, rollout_func=None)

    @TEXT_FAMILY
    def test_adapters(self, family, tmp_path):
        ours, _ = compare(family, tmp_path, {"beta": 0.1}, peft_config=LoraConfig(r=2, target_modules="all-linear"))
        trained = {name for name, parameter in ours.model.named_parameters() if parameter.requires_grad}
        assert trained and all("lora_" in name for name in trained)

    @TEXT_FAMILY
    def test_chat_template_arguments(self, family, tmp_path):
        """They reach the template: another prompt, another run."""
        template = family.tokenizer.chat_template
        family.tokenizer.chat_template = template + "{% if shout is defined %}{{ shout }}{% endif %}"
        try:
            lengths = []
            for kwargs in ({}, {"shout": "Find it now."}):
                ours, _ = compare(family, tmp_path, {"chat_template_kwargs": kwargs}, rollout_func=None)
                lengths.append(ours.micro_batches[0]["prompt_ids"].size(1))
            assert lengths[1] > lengths[0]
        finally:
            family.tokenizer.chat_template = template


@pytest.mark.slow
class TestRewards:
    @TEXT_FAMILY
    @pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
    def test_several_functions(self, family, how, tmp_path):
        """Plain and awaited ones, some without a word on some responses, with weights."""
        ours, theirs = compare(
            family,
            tmp_path,
            {"multi_objective_aggregation": how, "reward_weights": [1.0, 0.5, -0.25]},
            reward_funcs=[variety, sometimes, awaited],
        )
        functions = [f"rewards/{function.__name__}" for function in (variety, sometimes, awaited)]
        names = ["reward", "reward_std", *(f"{name}/{x}" for name in functions for x in ("mean", "std"))]
        for name in names:
            assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-6) and logged(ours, name)

    @TEXT_FAMILY
    def test_a_reward_model_beside_a_function(self, family, tmp_path):
        set_seed(0)
        config = Qwen2Config.from_dict({**family.config(family.tokenizer).to_dict(), "num_labels": 1})
        model = Qwen2ForSequenceClassification(config).eval()
        settings = {"num_generations": 4}
        ours, _ = compare(
            family,
            tmp_path,
            settings,
            reward_funcs=[model, variety],
            reward_processing_classes=[family.tokenizer, None],
        )
        name = next(
            name for name in ours.state.log_history[0] if name.startswith("rewards/") and "variety" not in name
        )
        assert len(set(logged(ours, name))) > 1

    @TEXT_FAMILY
    def test_as_many_processing_classes_as_functions(self, family, tmp_path):
        args = SAPOConfig.from_preset("grpo", str(tmp_path), **SETTINGS)
        with pytest.raises(ValueError, match="number of reward processing classes"):
            SAPOTrainer(
                family.build_model(),
                [variety, length_reward],
                args,
                family.dataset(),
                processing_class=family.processing_class,
                reward_processing_classes=[None],
            )


EVALUATIONS = {
    "rows": lambda rows: rows,
    "stream": lambda rows: rows.to_iterable_dataset(),
    "dict of rows": lambda rows: {"one": rows, "two": rows},
    "dict of streams": lambda rows: {"one": rows.to_iterable_dataset(), "two": rows.to_iterable_dataset()},
    "DatasetDict": lambda rows: DatasetDict({"one": rows, "two": rows}),
    "IterableDatasetDict": lambda rows: IterableDatasetDict(
        {"one": rows.to_iterable_dataset(), "two": rows.to_iterable_dataset()}
    ),
}


class TestData:
    @TEXT_FAMILY
    @pytest.mark.parametrize("kind", EVALUATIONS)
    def test_every_kind_of_evaluation_data(self, family, kind, tmp_path):
        trainer = SAPOTrainer(
            family.build_model(),
            length_reward,
            SAPOConfig.from_preset(
                "sapo_official",
                str(tmp_path),
                **{**SETTINGS, "num_generations": 1, "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
                per_device_eval_batch_size=2,
                eval_on_start=True,
            ),
            family.dataset(16),
            eval_dataset=EVALUATIONS[kind](family.dataset(4)),
            processing_class=family.processing_class,
            rollout_func=fixed_rollout(unequal),
        )
        trainer.train()
        for prefix in ("eval_one", "eval_two") if "ict" in kind else ("eval",):
            # Before the first step and after it.
            assert len(logged(trainer, f"{prefix}_loss")) == 2, prefix
        assert len(logged(trainer, "eval_reward")) == (4 if "ict" in kind else 2)

    @TEXT_FAMILY
    def test_a_stream_of_training_rows_repeats_prompts(self, family, tmp_path):
        seen = []

        def reward(prompts, **kwargs):
            seen.append([prompt[0]["content"] for prompt in prompts])
            return [0.5] * len(prompts)

        rows = [{"prompt": [{"role": "user", "content": f"Find {index}."}]} for index in range(64)]
        dataset = IterableDataset.from_generator(lambda: iter(rows))
        args = SAPOConfig.from_preset(
            "grpo",
            str(tmp_path),
            **{**SETTINGS, "dataloader_num_workers": 2, "num_iterations": 2, "max_steps": 8},
            shuffle_dataset=False,
        )
        trainer = SAPOTrainer(
            family.build_model(), reward, args, dataset, processing_class=family.processing_class,
            rollout_func=fixed_rollout(unequal),
        )  # fmt: skip
        assert trainer.args.dataloader_num_workers == 0  # workers would each go through the stream
        trainer.train()
        # Two rollouts of four prompts, each trained on twice and answered four times.
        assert seen == [[f"Find {4 * rollout + row // 4}." for row in range(16)] for rollout in range(2)]

    @TEXT_FAMILY
    def test_a_stream_cannot_be_dispatched(self, family, tmp_path):
        args = SAPOConfig.from_preset("grpo", str(tmp_path), **SETTINGS, accelerator_config={"dispatch_batches": True})
        with pytest.raises(ValueError, match="Iterable datasets require `dispatch_batches=False`"):
            SAPOTrainer(
                family.build_model(),
                length_reward,
                args,
                family.dataset().to_iterable_dataset(),
                processing_class=family.processing_class,
            )

    @TEXT_FAMILY
    def test_rollouts_take_the_rows_in_turn(self, family, tmp_path):
        """Without shuffling: a rollout's prompts, each next to itself, and then the next ones."""
        seen = []

        def reward(answer, **kwargs):
            seen.append(answer)
            return [0.5] * len(answer)

        args = SAPOConfig.from_preset("grpo", str(tmp_path), **{**SETTINGS, "shuffle_dataset": False, "max_steps": 4})
        SAPOTrainer(
            family.build_model(), reward, args, family.dataset(8), processing_class=family.processing_class,
            rollout_func=fixed_rollout(unequal),
        ).train()  # fmt: skip
        assert seen == [[str(4 * rollout + row // 4) for row in range(16)] for rollout in range(2)]


class TestRefusals:
    @TEXT_FAMILY
    def test_a_rollout_function_without_a_field(self, family, tmp_path):
        args = SAPOConfig.from_preset("grpo", str(tmp_path), **SETTINGS)
        trainer = SAPOTrainer(
            family.build_model(),
            length_reward,
            args,
            family.dataset(),
            processing_class=family.processing_class,
            rollout_func=lambda prompts, trainer: {"prompt_ids": [[5]] * len(prompts)},
        )
        with pytest.raises(ValueError, match=r"must return keys \['completion_ids', 'logprobs'\]"):
            trainer.train()

    @TEXT_FAMILY
    def test_no_reward(self, family, tmp_path):
        args = SAPOConfig.from_preset("grpo", str(tmp_path), **SETTINGS)
        with pytest.raises(ValueError, match="reward"):
            SAPOTrainer(family.build_model(), None, args, family.dataset(), processing_class=family.processing_class)

    @TEXT_FAMILY
    def test_rewards_of_which_none_scores_a_response(self, family, tmp_path, caplog):
        """A warning, and a step that changes nothing."""
        args = SAPOConfig.from_preset("grpo", str(tmp_path), **{**SETTINGS, "max_steps": 1})
        trainer = SAPOTrainer(
            family.build_model(),
            lambda completions, **kwargs: [None] * len(completions),
            args,
            family.dataset(),
            processing_class=family.processing_class,
            rollout_func=fixed_rollout(unequal),
        )
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        assert "All reward functions returned None" in caplog.text
        assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
