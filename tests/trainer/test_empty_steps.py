"""Optimizer steps without a single token to learn from: nothing changes, in any algorithm."""

import copy

import pytest
import torch
from accelerate import DistributedType
from peft import LoraConfig
from transformers import TrainerCallback

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.trainer.step_guard import StepGuard
from tests.testing_utils import QUIET_ON_CPU, WeightRecorder, fixed_rollout, length_reward, logged, random_completions


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)

# Three rollouts of two optimizer steps; of the second one every response is cut off, and masked for that.
SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_mini_batches": 2,
    "num_generations": 2,
    "max_steps": 6,
    "max_completion_length": 8,
    "learning_rate": 0.01,
    "critic_learning_rate": 0.01,
    "weight_decay": 0.1,
    "lr_scheduler_type": "linear",
    "mask_truncated_completions": True,
    **QUIET_ON_CPU,
}


class OptimizerRecorder(TrainerCallback):
    """Keeps the states of optimizers after every step."""

    def __init__(self, trainer: SAPOTrainer):
        self.trainer = trainer
        self.states: list[list[dict]] = []

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        critic = self.trainer.critic
        optimizers = [optimizer] if critic is None else [optimizer, critic.optimizer]
        self.states.append([copy.deepcopy(one.state_dict()["state"]) for one in optimizers])


def finished(rows: list[int], rollouts: set[int]):
    """Completions of which those of some rollouts are cut off, but for the rows that are not among `rows`."""
    calls = iter(range(100))

    def completions(prompts, trainer):
        call = next(calls)
        return [
            ids if call in rollouts and index in rows else [*ids[:-1], trainer.eos_token_ids[0]]
            for index, ids in enumerate(random_completions(call, min_length=2)(prompts, trainer))
        ]

    return completions


def train(family, tmp_path, preset, completions, peft_config=None, reward=length_reward, **settings):
    trainer = SAPOTrainer(
        family.build_model(),
        reward,
        SAPOConfig.from_preset(preset, str(tmp_path), **{**SETTINGS, **settings}),
        train_dataset=family.dataset(),
        processing_class=family.processing_class,
        rollout_func=fixed_rollout(completions),
        peft_config=peft_config,
    )
    modules = [trainer.model] if trainer.critic is None else [trainer.model, trainer.critic.value_head]
    weights, optimizers = WeightRecorder(*modules), OptimizerRecorder(trainer)
    trainer.add_callback(weights)
    trainer.add_callback(optimizers)
    trainer.train()
    return trainer, weights.states, optimizers.states


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@TEXT_FAMILY
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("sapo_official", {}),
        ("sapo_official", {"critic": "shared"}),
        ("sapo_official", {"critic": "adapter"}),
        ("sapo_official", {"critic": "ladder"}),
        ("sapo_official", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("grpo", {}),
        ("dr_grpo", {}),
        ("grpo", {"loss_type": "dapo", "beta": 0.0}),
        ("rloo", {}),
        ("reinforce", {}),
    ],
    ids=["separate", "shared", "adapter", "ladder", "accumulation", "grpo", "dr_grpo", "dapo", "rloo", "reinforce"],
)
def test_nothing_changes(family, preset, settings, tmp_path):
    peft_config = LoraConfig(r=2, target_modules="all-linear") if settings.get("critic") == "adapter" else None
    trainer, weights, optimizers = train(
        family, tmp_path, preset, finished(list(range(8)), {1}), peft_config=peft_config, **settings
    )
    for step in (2, 3):
        for before, after in zip(weights[1], weights[step], strict=True):
            assert moved(before, after) == []
        for before, after in zip(optimizers[1], optimizers[step], strict=True):
            assert before.keys() == after.keys() and len(before) > 0
            for index, state in before.items():
                assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[index][k])) for k, v in state.items())
    # Before and after there is something to learn from, and the schedule goes on by steps.
    for before, after in ((0, 1), (3, 4), (4, 5)):
        for module in range(len(weights[0])):
            assert moved(weights[before][module], weights[after][module])
    assert [entry.get("empty_steps") for entry in trainer.state.log_history[:6]] == [None, None, 1.0, 1.0, None, None]
    assert logged(trainer, "learning_rate") == pytest.approx([0.01 * (6 - step) / 6 for step in range(6)])
    assert logged(trainer, "skipped_steps") == [0.0] * 6


@TEXT_FAMILY
@pytest.mark.parametrize("preset", ["sapo_official", "grpo"])
def test_one_token_is_enough(family, preset, tmp_path):
    """Of two micro-batches one has a response to learn from: the step is an ordinary one."""
    completions = finished(list(range(1, 8)), {1})
    settings = {"num_mini_batches": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer, weights, _ = train(family, tmp_path, preset, completions, beta=0.01, **settings)
    assert moved(weights[0][0], weights[1][0])
    assert len(trainer.state.log_history) >= 2
    assert not any("empty_steps" in entry for entry in trainer.state.log_history)


@TEXT_FAMILY
def test_a_critic_learns_from_segments_that_the_policy_does_not(family, tmp_path):
    trainer, weights, _ = train(
        family, tmp_path, "sapo_official", finished([], set()), confident_token_threshold=1e-9, max_steps=2
    )
    assert moved(weights[0][0], weights[1][0]) == []
    assert moved(weights[0][1], weights[1][1])
    assert logged(trainer, "empty_steps") == [1.0, 1.0]


@TEXT_FAMILY
def test_unscored_responses_keep_the_penalty_of_trls_losses(family, tmp_path):
    """TRL's losses hold responses without a reward to the reference too; without a penalty they are no signal."""

    def unscored(completions, **kwargs):
        return [None] * len(completions)

    for beta in (0.0, 0.1):
        _, weights, _ = train(family, tmp_path, "grpo", finished([], set()), reward=unscored, beta=beta, max_steps=2)
        assert bool(moved(weights[0][0], weights[1][0])) == (beta > 0)


class Processes:
    """As much of an accelerator as counting needs: this process and another one, whose counts are known."""

    distributed_type, mixed_precision, scaler, num_processes = DistributedType.MULTI_CPU, "no", None, 2

    def __init__(self, others: list[int]):
        self.others = torch.tensor(others)

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return tensor + self.others


@pytest.mark.parametrize(
    ("others", "empty"), [([0, 0], [True, False]), ([1, 0], [False, False]), ([0, 5], [True, False])]
)
def test_a_token_on_another_process_counts(others, empty, tmp_path):
    args = SAPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    guard = StepGuard(args, Processes(others))
    assert guard.are_empty(torch.tensor(0), torch.tensor(3)) == empty
