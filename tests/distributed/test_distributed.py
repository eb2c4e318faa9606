"""Two processes do what one does with the same responses."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.distributed_run import main


ROOT = Path(__file__).parents[2]
# The mean reward is of all processes; an update synchronises gradients on its last micro-batch.
CRITIC_SETTINGS = {
    "max_steps": 2,
    "gradient_accumulation_steps": 2,
    "critic_updates_per_step": 2,
    "critic_initial_value": "reward_mean",
    "value_range": [0.0, 1.0],
}


def run_in_two_processes(folder: Path, family: str, settings: dict, global_batch: int = 4) -> list[dict]:
    return launch(folder, "tests.distributed.distributed_run", family, str(global_batch), json.dumps(settings))


def launch(folder: Path, module: str, *arguments: str) -> list:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", module, str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"max_steps": 2, "critic": "shared", "gradient_accumulation_steps": 2, "critic_warmup_steps": 1}),
        ("qwen2", {"max_steps": 3, "critic": "ladder", "gradient_accumulation_steps": 2, "critic_warmup_steps": 1}),
        ("qwen2_5_vl", {"max_steps": 2, "critic": "ladder", "gradient_checkpointing": True}),
        ("qwen2_5_vl", {"max_steps": 3, "value_loss_aggregation": "seq-mean-token-mean", "critic_warmup_steps": 1}),
        # One process has correct responses, the other has none; confident tokens are spread unevenly.
        (
            "qwen2",
            {
                "max_steps": 2,
                "critic": "shared",
                "positive_lm_coef": 0.5,
                "positive_lm_threshold": 0.7,
                "confident_token_threshold": 0.004,
                "length_adaptive_lam": 0.2,
            },
        ),
        # A group on two processes.
        (
            "qwen2",
            {
                "max_steps": 2,
                "critic": "none",
                "advantage_estimator": "leave_one_out",
                "importance_sampling_level": "sequence",
                "ratio_reduction": "sum",
                "num_generations": 4,
            },
        ),
        ("qwen2", {"max_steps": 2, "critic": "none", "advantage_estimator": "batch"}),
        # The gate on the critic: one decision for all processes, by the explained variance of the whole rollout.
        ("qwen2", {"max_steps": 2, "critic": "separate", "critic_min_explained_variance": 0.0, "lam": 0.9}),
        # Its gradients are averaged by hand.
        ("qwen2", {"max_steps": 3, "critic": "adapter", "gradient_accumulation_steps": 2, "beta": 0.1}),
        ("qwen2", {**CRITIC_SETTINGS, "critic": "separate", "freeze_critic_attention": True}),
        ("qwen2", {**CRITIC_SETTINGS, "critic": "shared"}),
    ],
)
def test_two_processes_equal_one(family, settings, tmp_path):
    one_and_two_processes(family, settings, tmp_path)


def one_and_two_processes(family: str, settings: dict, folder: Path) -> tuple[dict, dict, dict]:
    """Runs with the same responses, which end in the same weights and logs."""
    (folder / "one").mkdir()
    main(folder / "one", family, 4, settings)
    one = torch.load(folder / "one" / "rank0.pt")
    first, second = run_in_two_processes(folder / "two", family, settings)
    # A wrong launch is one process, twice.
    assert [run["world_size"] for run in (one, first, second)] == [1, 2, 2]
    for module in ("policy", "critic"):
        assert first[module].keys() == one[module].keys()
        for name, tensor in one[module].items():
            assert torch.equal(first[module][name], second[module][name]), name
            torch.testing.assert_close(first[module][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)
    for name, values in one["log"].items():
        assert first["log"][name] == pytest.approx(values, abs=1e-4), name
    return one, first, second


WITHOUT_CRITIC = {"max_steps": 2, "critic": "none", "advantage_estimator": "batch"}


@pytest.mark.slow
def test_the_most_uncertain_tokens_of_all_processes(tmp_path):
    share = {"entropy_token_share": 0.3, "entropy_token_scope": "batch"}
    one, *two = one_and_two_processes("qwen2", {**WITHOUT_CRITIC, **share}, tmp_path)
    assert two[0]["learned"] + two[1]["learned"] == one["learned"]
    learned, tokens = ([sum(map(count, run["learned"])) for run in two] for count in (sum, len))
    # The share is of all tokens. No process has it of its own tokens.
    assert sum(learned) == math.ceil(0.3 * sum(tokens))
    assert math.ceil(0.3 * tokens[0]) != learned[0] and math.ceil(0.3 * tokens[1]) != learned[1]


@pytest.mark.slow
def test_weights_of_responses_are_1_on_average_over_all_processes(tmp_path):
    settings = {"visual_token_share": 0.4, "response_weighting": "visual_dependency"}
    settings |= {**WITHOUT_CRITIC, "smallest_response_weight": 0.5, "gradient_accumulation_steps": 2}
    one, *two = one_and_two_processes("qwen2_5_vl", settings, tmp_path)
    # Two optimizer steps of two micro-batches.
    by_step = [torch.tensor(run["response_weights"]).view(2, -1) for run in (one, *two)]
    together = torch.cat(by_step[1:], dim=1)
    torch.testing.assert_close(together.mean(dim=1), torch.ones(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(together.sort(dim=1).values, by_step[0].sort(dim=1).values, rtol=0, atol=1e-3)
    # The smallest weight is there once among all, and the mean of one process's responses is another number.
    assert together.amin(dim=1).tolist() == [0.5, 0.5]
    assert (by_step[1].mean(dim=1) - 1).abs().min() > 1e-2
    assert two[0]["learned"] + two[1]["learned"] == one["learned"]


@pytest.mark.slow
def test_two_forwards_of_the_policy_before_its_backward(tmp_path):
    """PAPO's divergence from the policy that sees corrupted images, with a gradient through both forwards."""
    settings = {"perception_kl_coef": 0.5, "perception_kl_gradient": True, "corrupted_entropy_penalty_coef": 0.03}
    one, *_ = one_and_two_processes("qwen2_5_vl", {**WITHOUT_CRITIC, **settings}, tmp_path)
    assert min(one["log"]["perception_kl"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpointing", "critics"),
    [
        ("qwen2", False, ["shared", "ladder", "separate"]),
        ("qwen2_5_vl", True, ["shared", "ladder", "separate"]),
        ("qwen2", True, ["adapter"]),
        ("qwen2_5_vl", False, ["adapter"]),
    ],
)
def test_a_critic_leaves_the_policys_updates_as_they_are(family, checkpointing, critics, tmp_path):
    """With equal advantages, the policy's weights equal the weights of a run without a critic, bit for bit."""
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing}
    settings |= {"equal_advantages": True, "beta": 0.0, "lora": critics == ["adapter"]}
    without = run_in_two_processes(tmp_path / "none", family, {**settings, "critic": "none"})
    for critic in critics:
        reads = {"critic_reads": 3} if critic == "ladder" else {}
        runs = run_in_two_processes(tmp_path / critic, family, {**settings, **reads, "critic": critic})
        for own, other in zip(runs, without, strict=True):
            assert own["world_size"] == other["world_size"] == 2
            assert min(own["log"]["grad_norm"]) > 1e-3 and min(own["log"]["critic/grad_norm"]) > 1e-3
            for name, tensor in other["policy"].items():
                assert torch.equal(own["policy"][name], tensor), (critic, name)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "frozen_tower"), [("qwen2", False), ("qwen2_5_vl", False), ("qwen2_5_vl", True)])
def test_two_processes_without_padding_equal_one_with_it(family, frozen_tower, tmp_path):
    """Each sorts its own rows into micro-batches: other ones than one process has. In float64, by SGD."""
    settings = {"max_steps": 4, "critic": "separate", "gradient_accumulation_steps": 2, "beta": 0.1}
    settings |= {"in_float64": True, "frozen_tower": frozen_tower}
    fast, slow = ({"avoid_padding": fast, "reuse_image_features": fast} for fast in (True, False))
    (tmp_path / "one").mkdir()
    main(tmp_path / "one", family, 8, {**settings, **slow})
    one = torch.load(tmp_path / "one" / "rank0.pt")
    first, second = run_in_two_processes(tmp_path / "two", family, {**settings, **fast}, global_batch=8)
    assert [run["world_size"] for run in (one, first, second)] == [1, 2, 2]
    for module in ("policy", "critic"):
        for name, tensor in one[module].items():
            assert torch.equal(first[module][name], second[module][name]), name
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(first[module][name], tensor, rtol=0, atol=1e-9, msg=lambda m, n=name: n + m)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        # Cut-points of a flat policy: one process may have more states than the other, or none.
        (
            "qwen2",
            {
                "critic": "monte_carlo",
                "segmentation": "cutpoints",
                "cutpoint_threshold": 0.004,
                "confident_token_threshold": 0.004,
                "num_continuations": 3,
            },
        ),
        (
            "qwen2_5_vl",
            {
                "critic": "tree",
                "segmentation": "sequence",
                "num_generations": 2,
                "tree_widths": [2, 2],
                "tree_segment_length": 3,
                "beta": 0.0,
            },
        ),
    ],
)
def test_processes_with_unequal_work_stay_in_step(family, settings, tmp_path):
    """Each samples for itself, calls of generation and rewards are collective, and the policy is one."""
    first, second = run_in_two_processes(tmp_path / "two", family, {"max_steps": 3, **settings})
    assert [run["world_size"] for run in (first, second)] == [2, 2]
    for name, tensor in first["policy"].items():
        assert tensor.isfinite().all() and torch.equal(second["policy"][name], tensor), name
    assert first["log"] == second["log"]
    kind = "tree/tokens" if settings["critic"] == "tree" else "monte_carlo/tokens"
    assert max(first["log"][kind]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adapter", "shared", "ladder"])
def test_gradients_of_a_critic_are_averaged_once_a_step(mode, tmp_path):
    """Also where a process has none, as of a vision tower's LoRA without an image; where none has, nothing moves."""
    steps = list(zip(*launch(tmp_path / "two", "tests.distributed.critic_run", mode), strict=True))
    absent = [[], []]
    for (first, second), nowhere in zip(steps, absent, strict=True):
        for name, weight in first["before"].items():
            assert torch.equal(weight, second["before"][name]), name
            own = [run["own"][name] for run in (first, second)]
            if all(gradient is None for gradient in own):
                nowhere.append(name)
                assert first["mean"][name] is None and second["mean"][name] is None, name
                assert torch.equal(first["after"][name], weight), name  # not decayed either
                continue
            # Its rows are the process's own, and so is its gradient until the step.
            assert own[0] is None or own[1] is None or not torch.allclose(*own), name
            expected = sum(gradient for gradient in own if gradient is not None) / 2
            for run in (first, second):
                torch.testing.assert_close(run["mean"][name], expected, msg=lambda m, n=name: n + m)
            assert not torch.equal(first["after"][name], weight), name
            assert torch.equal(first["after"][name], second["after"][name]), name
    vision = {name for name in steps[0][0]["before"] if "visual" in name}
    assert absent[0] == [] and set(absent[1]) == vision and bool(vision) == (mode == "adapter")
    # Else the first step is no test of processes that differ.
    assert all(steps[0][0]["own"][name] is not None and steps[0][1]["own"][name] is None for name in vision)


@pytest.mark.slow
def test_two_processes_resume_in_the_middle_of_a_rollout(tmp_path):
    """Weights and log are an undisturbed run's; a rollout that one process has lost is begun anew by both."""
    settings = {"max_steps": 4, "num_iterations": 2, "critic": "none", "advantage_estimator": "batch"}
    settings |= {"logging_steps": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    whole = run_in_two_processes(tmp_path / "whole", "qwen2", settings)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    settings["resume_from_checkpoint"] = str(checkpoint)
    parts = run_in_two_processes(tmp_path / "parts", "qwen2", settings)
    for one, other in zip(whole, parts, strict=True):
        assert other["log"] == one["log"] and len(one["log"]["reward"]) == 2
        for name, tensor in one["policy"].items():
            assert torch.equal(other["policy"][name], tensor), name

    (checkpoint / "process_state_1.pt").unlink()
    first, second = run_in_two_processes(tmp_path / "anew", "qwen2", settings)
    for name, tensor in first["policy"].items():
        assert torch.equal(second["policy"][name], tensor), name
