"""Two processes under FSDP2, policy and critic in pieces, give the update of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.distributed_run import main


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# What `accelerate launch --config_file trainer_configs/accelerate/fsdp2_8gpu.yaml` sets.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def run_with_fsdp(folder: Path, family: str, settings: dict, **environment: str) -> list[dict]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed.fsdp_run", str(folder), family, "4", json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **FSDP2, **environment}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def elements(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"critic": "none", "advantage_estimator": "batch"}),
        ("qwen2", {"critic": "separate", "gradient_accumulation_steps": 2, "beta": 0.1}),
        ("qwen2", {"critic": "shared", "gradient_accumulation_steps": 2}),
        ("qwen2", {"critic": "ladder", "critic_reads": 3, "gradient_accumulation_steps": 2}),
        ("qwen2_5_vl", {"critic": "ladder", "gradient_checkpointing": True}),
        ("qwen2", {"critic": "adapter", "gradient_accumulation_steps": 2, "beta": 0.1}),
        (
            "qwen2",
            {
                "critic": "separate",
                "gradient_accumulation_steps": 2,
                "critic_updates_per_step": 2,
                "critic_initial_value": "reward_mean",
                "value_range": [0.0, 1.0],
                "freeze_critic_attention": True,
            },
        ),
        # Its LM head is not tied: TRL's gradient of it is one process's (see `_whole_lm_head`).
        ("qwen2_5_vl", {"critic": "separate", "beta": 0.1, "gradient_accumulation_steps": 2}),
        # With the default optimizer, whose fused step takes no mixture of pieces and whole tensors.
        (
            "qwen2_5_vl",
            {"critic": "adapter", "gradient_checkpointing": True, "optim": "adamw_torch_fused", "learning_rate": 1e-3},
        ),
    ],
)
def test_two_processes_equal_one(family, settings, tmp_path):
    settings = {"max_steps": 3, **settings}
    (tmp_path / "one").mkdir()
    main(tmp_path / "one", family, 4, settings)
    one = torch.load(tmp_path / "one" / "rank0.pt")
    first, second = run_with_fsdp(tmp_path / "two", family, settings)
    for run in (first, second):
        assert (run["world_size"], run["distributed_type"]) == (2, "DistributedType.FSDP")
    # Each process holds its half of the weights (a tied or uneven one makes it a little more or less).
    for module in ("policy", "critic")[: 2 if settings["critic"] == "separate" else 1]:
        held = [run[f"{module}_elements"] for run in (first, second)]
        whole = one[f"{module}_elements"]
        assert sum(held) == whole and max(held) < 0.6 * whole
    for module in ("policy", "critic"):
        assert first[module].keys() == one[module].keys()
        for name, tensor in one[module].items():
            assert torch.equal(first[module][name], second[module][name]), name
            torch.testing.assert_close(first[module][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)
    for name, values in one["log"].items():
        assert first["log"][name] == pytest.approx(values, abs=1e-4), name


def test_processes_cut_their_rows_into_micro_batches_at_the_same_places(tmp_path):
    """They wait for each other in each. What is learned is what one process learns with all the padding."""
    settings = {"max_steps": 3, "critic": "separate", "gradient_accumulation_steps": 4, "beta": 0.1}
    # Lengths of which each process alone would make other micro-batches.
    settings |= {"numbered": True, "max_completion_length": 200}
    (tmp_path / "one").mkdir()
    main(tmp_path / "one", "qwen2", 4, {**settings, "avoid_padding": False})
    one = torch.load(tmp_path / "one" / "rank0.pt")
    first, second = run_with_fsdp(tmp_path / "two", "qwen2", settings)
    rows, others = ([rows for rows, _ in run["micro_batches"]] for run in (first, second))
    assert len(rows) == 12 and set(rows) > {2} and rows == others
    for name in ("policy_loss", "critic/loss"):
        assert first["log"][name] == pytest.approx(one["log"][name], abs=5e-6), name
    for module in ("policy", "critic"):
        for name, tensor in one[module].items():
            assert torch.equal(first[module][name], second[module][name]), name
            torch.testing.assert_close(first[module][name], tensor, rtol=0, atol=5e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(
    ("critic", "state_dict_type"),
    [
        ("separate", "FULL_STATE_DICT"),
        ("adapter", "FULL_STATE_DICT"),
        ("shared", "FULL_STATE_DICT"),
        ("ladder", "FULL_STATE_DICT"),
        ("separate", "SHARDED_STATE_DICT"),
    ],
)
def test_four_steps_are_two_and_two_more(critic, state_dict_type, tmp_path):
    """Policy, critic, both optimizers and the position in the data come back from the pieces."""
    settings = {"critic": critic, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "beta": 0.0}
    settings |= {
        "lr_scheduler_type": "linear",
        "learning_rate": 0.02,
        "critic_learning_rate": 0.02,
        "optim": "adamw_torch_fused",
    }
    whole = run_with_fsdp(tmp_path / "whole", "qwen2", settings, FSDP_STATE_DICT_TYPE=state_dict_type)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "critic" / "value_head.safetensors").is_file()
    copy = tmp_path / "parts" / "checkpoint-2"
    shutil.copytree(checkpoint, copy)
    settings["resume_from_checkpoint"] = str(copy)
    parts = run_with_fsdp(tmp_path / "parts", "qwen2", settings, FSDP_STATE_DICT_TYPE=state_dict_type)
    for one, other in zip(whole, parts, strict=True):
        for module in ("policy", "critic"):
            for name, tensor in one[module].items():
                torch.testing.assert_close(other[module][name], tensor, rtol=0, atol=1e-6, msg=name)


def test_the_policy_samples_its_own_responses(tmp_path):
    """Generation gathers the weights; each process samples continuations for Monte-Carlo values too."""
    first, second = run_with_fsdp(tmp_path, "qwen2", {"critic": "monte_carlo", "max_steps": 2, "num_continuations": 2})
    for name, tensor in first["policy"].items():
        assert tensor.isfinite().all() and torch.equal(second["policy"][name], tensor), name
    assert max(first["log"]["monte_carlo/tokens"]) > 0


@pytest.mark.parametrize("critic", ["separate", "adapter"])
def test_half_precision_stays_inside_of_the_models(critic, tmp_path):
    """As the launch file has it: weights are gathered in bfloat16, log-probabilities and values have more digits."""
    settings = {"critic": critic, "max_steps": 2, "bf16": True, "optim": "adamw_torch_fused"}
    settings |= {"learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    (tmp_path / "one").mkdir()
    main(tmp_path / "one", "qwen2", 4, settings)
    one = torch.load(tmp_path / "one" / "rank0.pt")
    for run in run_with_fsdp(tmp_path / "two", "qwen2", settings, ACCELERATE_MIXED_PRECISION="bf16"):
        for name in ("logps", "values"):
            numbers = run[name]
            assert numbers.dtype == torch.float32
            assert (numbers != numbers.bfloat16().float()).any(), name
        for module in ("policy", "critic"):
            for name, tensor in one[module].items():
                torch.testing.assert_close(run[module][name], tensor, rtol=0.05, atol=0.01, msg=name)
