"""The benchmarks of sampling one rollout ahead run, and the stand-in server answers like a server."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_one_rollout_ahead_is_faster_than_one_after_the_other(tmp_path):
    options = ["--ratios", "1", "--update", "2", "--rollouts", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / "ahead.py"), *options]
    subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    (row,) = json.loads((tmp_path / "ahead.json").read_text())["rows"]
    assert row["update"] >= 2 and row["generate"] == row["update"]
    assert row["ahead"] < 0.8 * row["waiting"]
    assert f"| {row['ahead']:.2f} s | {row['relative']:.2f} |" in (tmp_path / "ahead.md").read_text()


def test_entropies_of_the_most_probable_tokens(monkeypatch):
    """With every token they are exact. A rest that is even is spread rightly."""
    scores = load("sampler_scores", monkeypatch)
    logps = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    exact = -(logps.exp() * logps).sum(-1)
    torch.testing.assert_close(scores.entropy_of_top(logps, 7), exact, atol=1e-6, rtol=0)
    even = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64).log().view(1, 1, 5)
    expected = -(even.exp() * even).sum(-1)
    torch.testing.assert_close(scores.entropy_of_top(even, 1), expected, atol=1e-6, rtol=0)


def test_the_learning_benchmark_groups_its_runs(monkeypatch):
    learning = load("ahead_learning", monkeypatch)
    runs = [
        {"preset": "sapo", "ahead": ahead, "accuracy": accuracy, "difference": [gap]}
        for ahead, accuracy, gap in ((0, 0.5, 0.0), (1, 0.25, 0.5), (0, 0.75, 0.5))
    ]
    rows = learning.as_markdown({"runs": runs}).splitlines()[2:]
    assert rows == [
        "| `sapo` | 0 | 2 | 0.625 | 0.500, 0.750 | 0.2500 |",
        "| `sapo` | 1 | 1 | 0.250 | 0.250 | 0.5000 |",
    ]
