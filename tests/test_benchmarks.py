"""The benchmarks run, and what they claim about scaling holds without a clock."""

import importlib.util
import math
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


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
