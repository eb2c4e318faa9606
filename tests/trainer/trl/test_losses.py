"""
The baselines that TRL has too, against TRL: the same losses and the same parameters after several optimizer steps, of
which every second one is off-policy.
"""

import ast
import itertools
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from sapo_trl import SAPOConfig, SAPOTrainer
from tests.testing_utils import QUIET_ON_CPU, Family, fixed_rollout, length_reward, random_completions


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)

SETTINGS = {
    "num_generations": 4,
    "max_completion_length": 8,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 0.1,
    # Adam would blow the rounding errors of gradients that are zero up to whole steps.
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    **QUIET_ON_CPU,
}
# Two rollouts of two optimizer steps, each step of one micro-batch or of two.
BATCHES = {
    "mini-batches": {"gradient_accumulation_steps": 1, "steps_per_generation": 2},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
}


class FixedRLOOTrainer(RLOOTrainer):
    """TRL's, which takes no `rollout_func`, with the completions that one would return."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return completions(prompt_ids, self)


def completions(prompts: list, trainer) -> list[list[int]]:
    """Of unequal lengths; every other one comes to its end."""
    rows, end = random_completions(5)(prompts, trainer), trainer.eos_token_ids[0]
    return [[*row[:-1], end] if index % 2 else row for index, row in enumerate(rows)]


def some_unscored(completion_ids, **kwargs) -> list[float | None]:
    """Like `length_reward`, but a sixth of the responses have no reward."""
    rewards = length_reward(completion_ids)
    return [None if sum(ids) % 6 == 0 else reward for ids, reward in zip(completion_ids, rewards, strict=True)]


def trained(
    trainer_class: type,
    args: Any,
    family: Family,
    folder: Path,
    *,
    fixed: bool,
    reward=length_reward,
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, shares of clipped tokens and final parameters of a run that starts from the model in a folder."""
    # From a folder, from which TRL's trainers load the reference once more.
    model = family.model_class.from_pretrained(folder)
    kwargs = {}
    if fixed and trainer_class is not RLOOTrainer:
        kwargs["rollout_func"] = fixed_rollout(completions)
    if fixed and trainer_class is RLOOTrainer:
        trainer_class = FixedRLOOTrainer
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=family.dataset(),
        processing_class=family.processing_class,
        **kwargs,
    )
    set_seed(3)
    trainer.train()
    history = trainer.state.log_history
    return (
        [entry["loss"] for entry in history if "loss" in entry],
        [entry["clip_ratio/region_mean"] for entry in history if "clip_ratio/region_mean" in entry],
        {name: parameter.detach() for name, parameter in trainer.model.named_parameters()},
    )


def compare(
    ours: SAPOConfig,
    theirs: GRPOConfig | RLOOConfig,
    family: Family,
    tmp_path: Path,
    *,
    fixed: bool = True,
    loss_tolerance: float = 1e-6,
    reward=length_reward,
) -> None:
    folder = tmp_path / "model"
    family.build_model().save_pretrained(folder)
    before = dict(family.model_class.from_pretrained(folder).named_parameters())
    trl_class = RLOOTrainer if isinstance(theirs, RLOOConfig) else GRPOTrainer
    run = {"family": family, "folder": folder, "fixed": fixed, "reward": reward}
    expected_losses, clip_ratios, expected = trained(trl_class, theirs, **run)
    losses, _, found = trained(SAPOTrainer, ours, **run)
    assert len(losses) == len(expected_losses) == SETTINGS["max_steps"]
    assert losses == pytest.approx(expected_losses, rel=0, abs=loss_tolerance)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)
    # There was something to compare: the policy moved, and away from the one that sampled.
    assert max((expected[name] - before[name]).abs().max().item() for name in expected) > 5e-3
    assert ours.loss_type == "soft_adaptive_gate" or max(clip_ratios) > 0


TRL_SETTINGS = {
    "grpo": {"loss_type": "grpo", "beta": 0.01, "epsilon": 0.2},
    "dr_grpo": {"loss_type": "dr_grpo", "beta": 0.0, "epsilon": 0.2, "scale_rewards": "none"},
    "gspo": {
        "loss_type": "grpo",
        "beta": 0.0,
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "importance_sampling_level": "sequence",
    },
}
CASES = list(itertools.product(TRL_SETTINGS, BATCHES))


@pytest.mark.parametrize(
    ("family", "preset", "batches"),
    [
        *(("qwen2", *case) for case in CASES),
        # With images one is fast: how a loss and its micro-batches are made does not depend on them.
        *(pytest.param("qwen2_5_vl", *c, marks=() if c == CASES[0] else pytest.mark.slow) for c in CASES),
    ],
    indirect=["family"],
)
def test_group_presets_on_sampled_responses(family, preset, batches, tmp_path):
    """Both trainers sample, with the same random numbers."""
    common = SETTINGS | BATCHES[batches] | {"use_bias_correction_kl": False}
    ours = SAPOConfig.from_preset(preset, str(tmp_path / "ours"), **common)
    theirs = GRPOConfig(str(tmp_path / "theirs"), **common, **TRL_SETTINGS[preset])
    compare(ours, theirs, family, tmp_path, fixed=False)


@TEXT_FAMILY
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("preset", TRL_SETTINGS)
def test_group_presets_on_responses_of_unequal_length(family, preset, batches, tmp_path):
    common = SETTINGS | BATCHES[batches] | {"use_bias_correction_kl": False}
    ours = SAPOConfig.from_preset(preset, str(tmp_path / "ours"), **common)
    theirs = GRPOConfig(str(tmp_path / "theirs"), **common, **TRL_SETTINGS[preset])
    compare(ours, theirs, family, tmp_path, reward=some_unscored)


@TEXT_FAMILY
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("fixed", [True, False], ids=["unequal lengths", "sampled"])
def test_rloo(family, fixed, batches, tmp_path):
    common = SETTINGS | BATCHES[batches]
    ours = SAPOConfig.from_preset("rloo", str(tmp_path / "ours"), **common)
    theirs = RLOOConfig(
        str(tmp_path / "theirs"), **common, beta=0.05, epsilon=0.2, epsilon_high=0.2, normalize_advantages=False
    )
    # TRL takes the difference of two sums of about -40, which float32 rounds to 4e-6, where we sum differences.
    compare(ours, theirs, family, tmp_path, fixed=fixed, loss_tolerance=1e-5, reward=some_unscored)


@TEXT_FAMILY
def test_rloo_with_truncated_responses_masked(family, tmp_path):
    """
    They are not trained on, but others are compared with them. In TRL's loss they are constants, which move nothing.
    """
    common = SETTINGS | BATCHES[next(iter(BATCHES))] | {"mask_truncated_completions": True}
    ours = SAPOConfig.from_preset("rloo", str(tmp_path / "ours"), **common)
    theirs = RLOOConfig(
        str(tmp_path / "theirs"), **common, beta=0.05, epsilon=0.2, epsilon_high=0.2, normalize_advantages=False
    )
    compare(ours, theirs, family, tmp_path, loss_tolerance=torch.inf)


# This package's losses with the advantages and the average that TRL's have.
LIKE_TRL = {
    "segmentation": "sequence",
    "advantage_estimator": "group",
    "critic": "none",
    "loss_aggregation": "seq-mean-token-mean",
    "whiten_advantages": False,
    "advantage_clamp": None,
    "delta": None,
}


@TEXT_FAMILY
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_soft_gate(family, level, batches, tmp_path):
    """Qwen's Soft Adaptive gate, TRL's `loss_type="sapo"`."""
    common = SETTINGS | BATCHES[batches] | {"importance_sampling_level": level, "beta": 0.0}
    common |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.3}
    ours = SAPOConfig(str(tmp_path / "ours"), loss_type="soft_adaptive_gate", **common, **LIKE_TRL)
    theirs = GRPOConfig(str(tmp_path / "theirs"), loss_type="sapo", **common)
    compare(ours, theirs, family, tmp_path)


@TEXT_FAMILY
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("corrected", [False, True], ids=["k3", "k3 times ratio"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_loss(family, level, corrected, batches, tmp_path):
    common = SETTINGS | BATCHES[batches] | {"importance_sampling_level": level, "use_bias_correction_kl": corrected}
    common |= {"beta": 0.05, "epsilon": 0.1, "epsilon_high": 0.15}
    ours = SAPOConfig(
        str(tmp_path / "ours"),
        loss_type="segment_clip",
        kl_placement="loss",
        kl_estimator="k3",
        **common,
        **LIKE_TRL,
    )
    theirs = GRPOConfig(str(tmp_path / "theirs"), loss_type="grpo", **common)
    compare(ours, theirs, family, tmp_path)


def documented_arguments() -> dict[str, Any]:
    """The arguments that `docs/algorithms.md` prints beside the claim."""
    page = Path(__file__).parents[3] / "docs" / "algorithms.md"
    section = page.read_text(encoding="utf-8").partition("## GRPO as TRL has it by default")[2]
    call = ast.parse(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]).body[0].value
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert [ast.literal_eval(argument) for argument in call.args] == ["grpo"]
    return {name: value for name, value in arguments.items() if name not in ("output_dir", "use_cpu", "bf16")}


class TestDefaults:
    """`GRPOConfig`'s defaults, with the arguments that the docs print."""

    def test_all_settings_are_equal(self, tmp_path):
        common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
        theirs = GRPOConfig(**common)
        ours = SAPOConfig.from_preset("grpo", **common, **documented_arguments())
        settings = [field.name for field in fields(GRPOConfig) if field.init]
        assert len(settings) > 150
        different = [name for name in settings if getattr(ours, name) != getattr(theirs, name)]
        assert different == []

    @pytest.mark.parametrize(
        ("family", "epsilon"),
        [("qwen2", 0.1), pytest.param("qwen2_5_vl", 0.2, marks=pytest.mark.slow)],
        indirect=["family"],
    )
    def test_runs_are_equal_bit_for_bit(self, family, epsilon, tmp_path):
        """With TRL's optimizer and schedule, and a clip that follows the one setting."""
        folder = tmp_path / "model"
        family.build_model().save_pretrained(folder)
        # Small and without a network; several steps a rollout, so that something is clipped.
        small = {
            **{name: value for name, value in QUIET_ON_CPU.items() if name != "gradient_checkpointing"},
            **{"max_completion_length": 8, "max_steps": 4, "learning_rate": 0.01, "steps_per_generation": 2},
            "epsilon": epsilon,
        }
        arguments = {k: v for k, v in documented_arguments().items() if k not in small and k != "num_mini_batches"}
        run = {"family": family, "folder": folder, "fixed": False}
        expected = trained(GRPOTrainer, GRPOConfig(str(tmp_path / "theirs"), **small), **run)
        ours = SAPOConfig.from_preset("grpo", str(tmp_path / "ours"), **arguments, **small)
        found = trained(SAPOTrainer, ours, **run)
        assert found[0] == expected[0] and len(found[0]) == 4
        assert found[1] == expected[1] and max(found[1]) > 0
        assert found[2].keys() == expected[2].keys()
        assert all(torch.equal(found[2][name], expected[2][name]) for name in expected[2])
        before = dict(family.model_class.from_pretrained(folder).named_parameters())
        assert not any(torch.equal(expected[2][name], before[name]) for name in ("lm_head.weight",))


@TEXT_FAMILY
@pytest.mark.parametrize("preset", ["ppo", *(pytest.param(p, marks=pytest.mark.slow) for p in ("sapo", "reinforce"))])
def test_the_upper_clip_follows_the_lower_one(family, preset, tmp_path):
    folder = tmp_path / "model"
    family.build_model().save_pretrained(folder)

    def losses(**clips) -> list[float]:
        settings = {**SETTINGS, **BATCHES["mini-batches"], "max_steps": 2, "num_generations": 1, **clips}
        args = SAPOConfig.from_preset(preset, str(tmp_path / "ours"), **settings)
        return trained(SAPOTrainer, args, family, folder, fixed=True)[0]

    assert losses(epsilon=0.01) == losses(epsilon=0.01, epsilon_high=0.01) != losses(epsilon=0.01, epsilon_high=0.2)
