"""Every preset trains the embedded vision-language task."""

import math

import pytest
import torch
from transformers import AutoModelForImageTextToText

from sapo_trl import PRESETS, SAPOConfig, SAPOTrainer
from sapo_trl.data import to_prompts
from sapo_trl.embedded import load_processor, make_problems
from sapo_trl.rewards import accuracy_reward
from tests.testing_utils import logged, state_of, unmoved


# The embedded task's answers have no tags: its readings are the perception, its sums the reasoning.
ROLES = {
    "role_perception_pattern": r"^((?:[A-D]{2}=\d\n)+)",
    "role_reasoning_pattern": r"((?:\d+[-+]\d+=-?\d+\n)+)",
}
# Smaller than published, so that 30 steps take seconds.
SMALL = {
    "vineppo": {"num_continuations": 2, "max_valued_segments": 3},
    "spo_chain": {"num_continuations": 2},
    "spo_tree": {"tree_widths": [3, 2, 2], "tree_segment_length": 12},
    "srpo": ROLES,
    "vc_ppo": {"critic_warmup_steps": 12},
    "vapo": {"critic_warmup_steps": 8},
    "bpco": {"critic_warmup_steps": 8},
}
# What an algorithm logs that others do not.
OWN_METRICS = {
    "vapo": ["positive_lm_loss", "critic/warmup", "critic/loss"],
    "vc_ppo": ["critic/warmup", "critic/loss"],
    "vineppo": ["monte_carlo/states", "monte_carlo/tokens", "time/monte_carlo"],
    "spo_chain": ["monte_carlo/unique_states", "policy_mask/share"],
    "spo_tree": ["tree/leaves", "tree/dropped_edges", "tree/edge_age"],
    "entropy_mask": ["policy_mask/share"],
    "vppo": ["policy_mask/share", "visual_dependency/mean", "response_weight/max", "entropy_penalty"],
    "papo": ["perception_kl", "entropy_penalty"],
    "srpo": ["role/perception_weight", "role/reasoning_weight", "role/visual_dependency"],
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_thirty_steps_on_pictures(preset, warm_folder, tmp_path):
    args = SAPOConfig.from_preset(
        preset,
        str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=16,
        max_completion_length=56,
        learning_rate=1e-4,
        **({"critic_learning_rate": 3e-4} if PRESETS[preset].settings.get("critic", "separate") == "separate" else {}),
        **SMALL.get(preset, {}),
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    model = AutoModelForImageTextToText.from_pretrained(warm_folder)
    trainer = SAPOTrainer(
        model, accuracy_reward, args, to_prompts(make_problems(512)), processing_class=load_processor(warm_folder)
    )
    before = state_of(model)
    trainer.train()

    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 30
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in steps)
    infinite = {
        name
        for entry in trainer.state.log_history
        for name, value in entry.items()
        if isinstance(value, float) and math.isinf(value)
    }
    assert infinite == set()
    rewards = logged(trainer, "reward")
    assert len(rewards) == 8 and all(0.0 <= reward <= 1.0 for reward in rewards)
    for name in OWN_METRICS.get(preset, []):
        values = [value for value in logged(trainer, name) if value is not None]
        assert values and any(math.isfinite(value) for value in values), name
    # Only attention's key biases, whose gradient is zero, may stay where they were.
    still = unmoved(before, model)
    assert all("k_proj.bias" in name for name in still), still
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert torch.isfinite(torch.tensor(rewards)).all()
