"""The benchmarks run, and what they claim about scaling holds without a clock."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_one_another(monkeypatch):
    """Scripts import one another by their bare names, as Python lets a script do."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OperationCounter(TorchDispatchMode):
    """Counts the tensor operations that are dispatched inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_segment_operations_have_no_loop_over_rows_or_tokens():
    """64 times the rows: not one operation more. 16 times the length: a few more for each doubling, in the GAE."""
    benchmark = load("segment_ops")
    counts = {}
    for rows, length in ((4, 64), (256, 64), (4, 1024)):
        with OperationCounter() as counter:
            benchmark.vectorised(benchmark.make_rollout(rows, length, "cpu"))
        counts[rows, length] = counter.count
    assert counts[4, 64] == counts[256, 64]
    per_doubling = (counts[4, 1024] - counts[4, 64]) / math.log2(1024 / 64)
    assert per_doubling <= 6


def test_segment_ops_benchmark_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["segment_ops.py", "--rows", "16", "--length", "128", "--repeats", "2"])
    speedup = load("segment_ops").main()
    assert speedup > 1
    assert "times as fast" in capsys.readouterr().out


def test_vectorised_and_loops_agree_on_a_realistic_rollout():
    benchmark = load("segment_ops")
    rollout = {
        name: x.double() if x.is_floating_point() else x for name, x in benchmark.make_rollout(8, 100, "cpu").items()
    }
    for found, expected in zip(benchmark.vectorised(rollout), benchmark.loops(rollout), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_memory_and_speed_benchmark_runs(tmp_path, capsys):
    """TRL's trainer and ours on a batch of the same tokens; what the table says is what the file holds."""
    arguments = ["--size", "tiny", "--rows", "sapo_adapter", "grpo", "--steps", "2", "--accumulation", "1"]
    arguments += ["--completion_length", "16", "--image_size", "84", "--out", str(tmp_path)]
    assert load("memory_and_speed").main(arguments) == 0
    report = json.loads((tmp_path / "memory_and_speed.json").read_text())
    ours, trl = (report["rows"][name] for name in ("sapo_adapter", "grpo"))
    # Two responses of 16 tokens to prompts in which nine tokens are the picture's.
    assert ours["tokens_per_step"] == trl["tokens_per_step"] == 2 * (16 + ours["prompt_tokens"])
    assert ours["prompt_tokens"] > 9
    table = (tmp_path / "memory_and_speed.md").read_text()
    assert table in capsys.readouterr().out
    for row in (ours, trl):
        assert row["tokens_per_second"] == pytest.approx(row["tokens_per_step"] / row["seconds_per_step"])
        assert 1e6 < row["peak_bytes"] < 16e9  # a tiny model, its gradients and activations
        assert f"| {row['seconds_per_step']:.2f} | {row['tokens_per_second']:.0f} |" in table
    assert torch.__version__ in table


def test_a_row_without_enough_memory_says_so(tmp_path, monkeypatch):
    benchmark = load("memory_and_speed")

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(benchmark, "measure", out_of_memory)
    result = tmp_path / "result.json"
    assert benchmark.main(["--size", "tiny", "--row", "grpo", "--result", str(result)]) == 0
    found = json.loads(result.read_text())
    report = {"on_gpu": True, "machine": "GPU", "versions": {}, "rows": {"grpo": found}}
    report["options"] = vars(benchmark.parser().parse_args([]))
    assert "| TRL GRPO | out of memory |" in benchmark.as_markdown(report)


@pytest.mark.parametrize(("option", "value"), [("--steps", "1"), ("--image_size", "100")])
def test_memory_and_speed_refuses(option, value, capsys):
    with pytest.raises(SystemExit):
        load("memory_and_speed").main([option, value])
    assert option in capsys.readouterr().err.splitlines()[-1]


def test_planned_memory_of_the_benchmark_counts_weights_and_optimizer(tmp_path):
    """A second model that is trained costs its weights, gradients and AdamW: 16 bytes a parameter in float32."""
    benchmark = load("memory_and_speed")
    options = benchmark.parser().parse_args(["--size", "tiny", "--dtype", "float32", "--image_size", "84"])
    separate, shared = (benchmark.planned_bytes(critic, False, options, 300) for critic in ("separate", "shared"))
    config = benchmark.build_model_config(options, benchmark.build_tokenizer())
    with torch.device("meta"):
        model = benchmark.Qwen2_5_VLForConditionalGeneration(config)
    backbone = sum(parameter.numel() for parameter in model.base_model.parameters())
    assert separate - shared == pytest.approx(16 * backbone, rel=1e-3)


TINY_UPDATES = ["--size", "tiny", "--rollouts", "2", "--turns", "1", "--micro_batch", "2", "--accumulation", "2"]
TINY_UPDATES += ["--completion_length", "32", "--image_size", "56"]


@pytest.mark.slow
def test_update_cost_benchmark_runs(tmp_path):
    arguments = [sys.executable, str(BENCHMARKS / "update_cost.py"), *TINY_UPDATES, "--out", str(tmp_path)]
    subprocess.run([*arguments, "--rows", "grpo", "sapo_shared"], check=True, capture_output=True, timeout=600)
    report = json.loads((tmp_path / "update_cost.json").read_text())
    counts, (times,) = report["counts"], report["turns"]
    for rows in (counts, times):
        assert rows.keys() == {"grpo", "sapo_shared"} and not any("error" in row for row in rows.values())
    ours, trl = counts["sapo_shared"], counts["grpo"]
    # TRL pads everything to the longest prompt and the longest response of the rollout.
    assert 0 <= ours["padding"] < trl["padding"] < 1
    assert 0 < ours["operations"] < trl["operations"]
    assert 1e6 < ours["peak_bytes"] < 16e9  # a tiny model, its gradients and activations
    ratios = [f"{ours[what] / trl[what]:.3f}" for what in ("operations", "peak_bytes")]
    for what in ("cpu_seconds", "seconds"):
        time = f"{times['sapo_shared'][what] / times['grpo'][what]:.2f}"
        ratios.append(f"{time} / **{time}** / {time}")
    assert f"| TRL GRPO | {' | '.join(ratios)} |" in (tmp_path / "update_cost.md").read_text()


def test_update_cost_without_a_time(monkeypatch):
    """`--turns 0` only counts; a row that did not run says so."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = load("update_cost")
    options = benchmark.parser().parse_args(["--size", "tiny"])
    benchmark.complete(options)
    counts = {"grpo": {"operations": 2e9, "peak_bytes": 2**30, "padding": 0.5}, "sapo_none": {"error": "a | b"}}
    counts["sapo_shared"] = {"operations": 3e9, "peak_bytes": 2**29, "padding": 0.25}
    report = {"machine": "CPU", "versions": {}, "options": vars(options), "counts": counts, "turns": []}
    rows = benchmark.as_markdown(report).splitlines()[2:5]
    assert rows[0] == "| TRL GRPO | 2.00 | 1.000 | 50.0% |  |  |  |  |  |  |"
    assert rows[1].startswith('| SAPO, `critic="none"` | a   b |')
    assert rows[2] == '| SAPO, `critic="shared"` | 3.00 | 0.500 | 25.0% |  | TRL GRPO | 1.500 | 0.500 |  |  |'
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.slow
def test_profile_benchmark_accounts_for_the_whole_step(tmp_path):
    arguments = [sys.executable, str(BENCHMARKS / "profile_step.py"), *TINY_UPDATES, "--out", str(tmp_path)]
    subprocess.run(arguments, check=True, capture_output=True, timeout=600)
    found = json.loads((tmp_path / "profile_sapo_separate.json").read_text())
    stages = found["stages"]
    assert {f"{who}, forward to {what}" for who in ("policy", "critic") for what in ("score", "train")} < stages.keys()
    assert {"optimizers", "everything else"} < stages.keys() and min(stages.values()) > 0
    assert "frozen vision tower" not in stages
    # The critic is a copy of the policy but for the LM head: none of its work may hide in everything else.
    assert 0.2 < stages["critic, backward"] / stages["policy, backward"] < 2
    assert sum(stages.values()) == pytest.approx(found["seconds_per_rollout"])


@pytest.mark.slow
def test_profile_benchmark_sees_a_frozen_tower(tmp_path):
    """Of one, features are computed outside of the model's forward, for each image once."""
    arguments = [sys.executable, str(BENCHMARKS / "profile_step.py"), *TINY_UPDATES, "--out", str(tmp_path)]
    arguments += ["--row", "sapo_adapter", "--lora_layers", "language", "--gradient_checkpointing"]
    subprocess.run(arguments, check=True, capture_output=True, timeout=600)
    found = json.loads((tmp_path / "profile_sapo_adapter.json").read_text())
    assert 0 < found["stages"]["frozen vision tower"] < found["seconds_per_rollout"] / 2


@pytest.mark.slow
def test_length_benchmark_finds_how_stages_grow(tmp_path):
    arguments = [sys.executable, str(BENCHMARKS / "length_scaling.py"), *TINY_UPDATES, "--out", str(tmp_path)]
    arguments += ["--lengths", "16", "256", "--row", "sapo_shared"]
    printed = subprocess.run(arguments, check=True, capture_output=True, timeout=600, text=True).stdout
    found = json.loads((tmp_path / "length_scaling_sapo_shared.json").read_text())
    assert found["seconds"].keys() == {"model", "optimizers", "everything else"}
    for name, (short, long) in found["seconds"].items():
        assert 0 < short and 0 < long
        assert found["powers"][name] == pytest.approx(math.log(long / short) / math.log(16))
        assert f"| {name} | {short:.3f} | {long:.3f} | {found['powers'][name]:.2f} |" in printed


class TestPadding:
    OPTIONS = ("--draws", "3", "--rows", "16", "--optimizer_steps", "2", "--prompts", "10", "50", "--processes")

    @pytest.fixture
    def script(self):
        return load("padding")

    def test_what_it_writes_is_what_it_prints(self, script, tmp_path, capsys):
        assert script.main([*self.OPTIONS, "1", "3", "--out", str(tmp_path)]) == 0
        report = json.loads((tmp_path / "padding.json").read_text())
        assert report["options"]["rows"] == 16 and report["options"]["processes"] == [1, 3]
        found = report["counts"]
        for values in found.values():
            assert values["min"] <= values["median"] <= values["max"]
        for stage in ("train", "score"):
            assert 0 < found[f"padding/{stage}/own"]["median"] < found["padding/trl"]["median"] < 1
            # Nobody else to wait for; among several the cuts that are common are better than each one's own.
            assert found[f"saved/1/{stage}"] == {"min": 0, "median": 0, "max": 0}
            assert found[f"saved/3/{stage}"]["median"] > 0
        table = (tmp_path / "padding.md").read_text()
        assert table in capsys.readouterr().out
        own, common = (found[f"waited_for/3/train/{way}"] for way in ("own", "common"))
        cells = [" / ".join([f"{x['min']:.2f}", f"**{x['median']:.2f}**", f"{x['max']:.2f}"]) for x in (own, common)]
        assert f"| {cells[0]} | {cells[1]} |" in table

    def test_tokens_are_counted_as_by_hand(self, script):
        options = script.parser().parse_args(["--rows", "4", "--micro_batch", "2", "--optimizer_steps", "1"])
        options.processes = [2]
        prompts = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 2]]).numpy()
        responses = torch.tensor([[8, 8, 1, 1], [8, 1, 1, 1]]).numpy()
        found = script.count(prompts, responses, options)
        # Lengths 9, 9, 2, 2 and 9, 2, 2, 3: 38 tokens.
        assert found["padding/trl"] == pytest.approx(1 - 38 / (4 * 9 + 4 * 10))
        assert found["padding/train/equal"] == pytest.approx(1 - 38 / (18 + 4 + 18 + 4))
        assert found["padding/train/own"] == pytest.approx(1 - 38 / (18 + 4 + 9 + 9))
        # The largest of each micro-batch: 18 and 4, 18 and 9, 18 and 4.
        waited_for = [found[f"waited_for/2/train/{way}"] for way in ("equal", "own", "common")]
        assert waited_for == pytest.approx([2 * 22 / 38, 2 * 27 / 38, 2 * 22 / 38])
        assert found["saved/2/train"] == pytest.approx(5 / 27)

    def test_rows_that_do_not_fill_micro_batches_are_refused(self, script, capsys):
        with pytest.raises(SystemExit):
            script.main(["--rows", "20"])
        assert "--rows must be a multiple" in capsys.readouterr().err


def test_the_page_of_the_demo_has_the_recorded_seeds(tmp_path, capsys):
    script = load("demo_seeds")
    assert script.main(["--out", str(BENCHMARKS / "results" / "demo")]) == 0
    table = capsys.readouterr().out.strip()
    assert "| 0 | " in table and table in (BENCHMARKS.parent / "docs" / "demo_run.md").read_text()

    for seed, accuracy in ((1, 0.5), (0, 0.25)):
        folder = tmp_path / f"run_{seed}"
        folder.mkdir()
        results = dict.fromkeys(script.KEPT, 0.125) | {"seed": seed, "accuracy_after": accuracy, "response": "long"}
        (folder / "results.json").write_text(json.dumps(results | {"explained_variance": [0.25, 0.75]}))
    assert script.main([str(tmp_path / "run_1"), str(tmp_path / "run_0"), "--out", str(tmp_path)]) == 0
    first, second, mean = capsys.readouterr().out.strip().splitlines()[2:]
    assert first.startswith("| 0 | 12.5% | 25.0% |") and second.startswith("| 1 | 12.5% | 50.0% |")
    assert mean.startswith("| mean | 12.5% | 37.5% |") and mean.split("|")[-3].strip() == "0.50"
    assert "response" not in json.loads((tmp_path / "seeds.json").read_text())[0]
