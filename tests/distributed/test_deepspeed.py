"""Two processes under DeepSpeed, policy and critic sharded by ZeRO, give the update of one process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sapo_trl.embedded import build_processor, build_tokenizer
from tests.distributed.distributed_run import main
from tests.testing_utils import FAMILIES


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: `make test-distributed`"
    ),
]
ROOT = Path(__file__).parents[2]
START = {"critic_initial_value": "reward_mean", "value_range": [0.0, 1.0]}
UPDATES = {"critic_updates_per_step": 2, **START}


def run_with_deepspeed(folder: Path, stage: int, family: str, settings: dict, zero3_init: bool = False) -> list[dict]:
    folder.mkdir(parents=True, exist_ok=True)
    deepspeed_config = {
        # Without the second, parameters as small as these are never sharded.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }
    if stage == 3:
        deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed_config))
    launch = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": zero3_init},
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
        "main_training_function": "main",
        "use_cpu": True,
    }
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(launch))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    command += ["-m", "tests.distributed.distributed_run", str(folder), family, "4", json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("stage", "family", "settings"),
    [
        (2, "qwen2", {"max_steps": 3, "critic": "separate", "gradient_accumulation_steps": 2, "beta": 0.1, **UPDATES}),
        (2, "qwen2", {"max_steps": 3, "critic": "adapter", "beta": 0.1}),
        (2, "qwen2_5_vl", {"max_steps": 3, "critic": "shared"}),
        (3, "qwen2", {"max_steps": 3, "critic": "shared", "gradient_accumulation_steps": 2}),
        (2, "qwen2_5_vl", {"max_steps": 3, "critic": "ladder", "gradient_checkpointing": True}),
        (3, "qwen2", {"max_steps": 3, "critic": "ladder", "critic_reads": 3, "gradient_accumulation_steps": 2}),
        # Further updates read the policy after its step.
        (2, "qwen2", {"max_steps": 3, "critic": "ladder", "learning_rate": 0.0, **UPDATES}),
        (3, "qwen2", {"max_steps": 3, "critic": "none", "advantage_estimator": "batch"}),
        (3, "qwen2_5_vl", {"max_steps": 3, "critic": "separate", "beta": 0.1, **UPDATES}),
    ],
)
def test_two_processes_equal_one(stage, family, settings, tmp_path):
    (tmp_path / "one").mkdir()
    main(tmp_path / "one", family, 4, settings)
    one = torch.load(tmp_path / "one" / "rank0.pt")
    first, second = run_with_deepspeed(tmp_path / "two", stage, family, settings)
    for run in (first, second):
        assert (run["world_size"], run["distributed_type"], run["zero_stage"]) == (
            2,
            "DistributedType.DEEPSPEED",
            stage,
        )
        # ZeRO-3 has really taken the weights apart: outside of a forward a process holds none.
        assert (run["policy_elements"] == 0) == (stage == 3)
        if settings["critic"] == "separate":
            assert (run["critic_elements"] == 0) == (stage == 3)
    for module in ("policy", "critic"):
        for name, tensor in first[module].items():
            assert torch.equal(tensor, second[module][name]), name
    assert_same(first, one)


def assert_same(run: dict, one: dict) -> None:
    for module in ("policy", "critic"):
        assert run[module].keys() == one[module].keys()
        for name, tensor in one[module].items():
            torch.testing.assert_close(run[module][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)
    for name, values in one["log"].items():
        assert run["log"][name] == pytest.approx(values, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"critic": "separate", "beta": 0.1}),
        ("qwen2", {"critic": "shared", "beta": 0.1}),
        ("qwen2_5_vl", {"critic": "separate"}),
        ("qwen2", {"critic": "shared", "loads_it": True}),
        ("qwen2", {"critic": "ladder", "loads_it": True}),
    ],
)
def test_weights_that_are_loaded_in_pieces(family, settings, tmp_path):
    """With `zero3_init_flag`, as in the launch files, no process ever holds a whole model."""
    model = FAMILIES[family](build_tokenizer() if family == "qwen2" else build_processor(build_tokenizer()))
    model.build_model().save_pretrained(tmp_path / "model")
    settings = {"max_steps": 3, "model": str(tmp_path / "model"), **settings}
    (tmp_path / "one").mkdir()
    main(tmp_path / "one", family, 4, settings)
    one = torch.load(tmp_path / "one" / "rank0.pt")
    for run in run_with_deepspeed(tmp_path / "two", 3, family, settings, zero3_init=True):
        assert (run["world_size"], run["zero_stage"], run["policy_elements"]) == (2, 3, 0)
        assert settings["critic"] in ("shared", "ladder") or run["critic_elements"] == 0
        assert_same(run, one)


@pytest.mark.parametrize("stage", [2, 3])
def test_four_steps_are_two_and_two_more(stage, tmp_path):
    """Policy, critic, both optimizers and the position in the data come back from the shards."""
    settings = {"critic": "separate", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "beta": 0.0}
    settings |= {"lr_scheduler_type": "linear", "learning_rate": 0.02, "critic_learning_rate": 0.02, **START}
    whole = run_with_deepspeed(tmp_path / "whole", stage, "qwen2", settings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "critic" / "value_head.safetensors").is_file()
    copy = tmp_path / "parts" / "checkpoint-2"
    shutil.copytree(checkpoint, copy)
    parts = run_with_deepspeed(tmp_path / "parts", stage, "qwen2", {**settings, "resume_from_checkpoint": str(copy)})
    for one, other in zip(whole, parts, strict=True):
        for module in ("policy", "critic"):
            for name, tensor in one[module].items():
                torch.testing.assert_close(other[module][name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (2, {"critic": "separate", "gradient_accumulation_steps": 2}),
        (2, {"critic": "adapter"}),
        (3, {"critic": "separate"}),
        (3, {"critic": "shared"}),
    ],
)
def test_a_step_with_a_bad_policy_loss_moves_neither_model(stage, settings, tmp_path):
    """One process has it; all of them and both models skip the step and go on, as one process does."""
    settings = {"max_steps": 3, "spoiled": ["policy_loss", 1], **settings}
    (tmp_path / "one").mkdir()
    main(tmp_path / "one", "qwen2", 4, settings)
    one = torch.load(tmp_path / "one" / "rank0.pt")
    assert one["log"]["skipped_steps"] == [0, 1, 0]
    del one["log"]["critic/grad_norm"]  # without DeepSpeed it is a number, of a gradient that is dropped
    for run in run_with_deepspeed(tmp_path / "two", stage, "qwen2", settings):
        assert (run["world_size"], run["zero_stage"]) == (2, stage)
        assert_same(run, one)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_with_a_bad_critic_loss_does_not_move_the_critic(stage, tmp_path):
    """The policy was updated before."""
    settings = {"critic": "separate", "max_steps": 3, "spoiled": ["critic_loss", 2]}
    (tmp_path / "one").mkdir()
    main(tmp_path / "one", "qwen2", 4, settings)
    one = torch.load(tmp_path / "one" / "rank0.pt")
    for run in run_with_deepspeed(tmp_path / "two", stage, "qwen2", settings):
        assert run["log"]["skipped_steps"] == one["log"]["skipped_steps"] == [0, 0, 1]
        for name, tensor in one["critic"].items():
            torch.testing.assert_close(run["critic"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
        assert all(tensor.isfinite().all() for tensor in run["policy"].values())
        assert any((tensor - one["policy"][name]).abs().max() > 1e-3 for name, tensor in run["policy"].items())


def test_too_many_bad_steps_stop_the_run(tmp_path):
    settings = {"critic": "separate", "max_steps": 3, "spoiled": ["policy_loss", 1], "max_skipped_steps": 1}
    with pytest.raises(AssertionError, match=r"last 1 optimizer steps \(max_skipped_steps=1\) were not finite"):
        run_with_deepspeed(tmp_path, 2, "qwen2", settings)


def test_a_model_in_pieces_is_not_copied(tmp_path):
    """One that was loaded before it was handed over, and not by its name."""
    FAMILIES["qwen2"](build_tokenizer()).build_model().save_pretrained(tmp_path / "model")
    settings = {"max_steps": 1, "critic": "separate", "model": str(tmp_path / "model"), "loads_it": True}
    with pytest.raises(AssertionError, match="The policy was loaded in pieces .*zero3_init_flag: true"):
        run_with_deepspeed(tmp_path / "two", 3, "qwen2", settings, zero3_init=True)


def test_an_adapter_critic_is_refused_with_zero_3(tmp_path):
    with pytest.raises(AssertionError, match="cannot be trained with ZeRO-3"):
        run_with_deepspeed(tmp_path, 3, "qwen2", {"max_steps": 1, "critic": "adapter"})


@pytest.mark.parametrize(("stage", "critic"), [(2, "separate"), (3, "separate"), (2, "adapter")])
def test_half_precision_stays_inside_of_the_models(stage, critic, tmp_path):
    """As the launch files have it: the engines keep weights in bfloat16, the head computes in float32."""
    settings = {"critic": critic, "max_steps": 2, "bf16": True, "learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    for run in run_with_deepspeed(tmp_path, stage, "qwen2", settings):
        assert run["values"].dtype == torch.float32
        assert (run["values"] != run["values"].bfloat16().float()).any()
        assert run["values"].isfinite().all() and run["logps"].isfinite().all()
