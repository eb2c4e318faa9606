"""The lines of training without a terminal: algorithm, time left, each reward."""

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from sapo_trl.callbacks.progress import TrainingProgress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    return now


def lines(clock, logs: dict[str, float], first_step: int = 0, steps: int = 10, seconds: float = 30.0) -> list[str]:
    text = io.StringIO()
    progress = TrainingProgress(Console(file=text, width=200), algorithm="vc_ppo")
    state = SimpleNamespace(is_world_process_zero=True, global_step=first_step, max_steps=100)
    progress.on_train_begin(None, state, None)
    clock.seconds += seconds
    state.global_step = first_step + steps
    progress.on_log(None, state, None, logs=logs)
    return text.getvalue().splitlines()


def test_a_line_has_the_time_left_and_each_reward(clock):
    rewards = {"reward": 0.7, "rewards/accuracy_reward/mean": 0.5, "rewards/format_reward/mean": 0.2}
    began, line = lines(clock, {"entropy": 1.5, **rewards, "rewards/format_reward/std": 9.0})
    assert began == "Training vc_ppo"
    # 3 s a step, 90 steps left.
    assert line == "step 10/100, 0:04:30 left: reward 0.7, accuracy_reward 0.5, format_reward 0.2, entropy 1.5"


def test_a_resumed_run_counts_its_own_steps(clock):
    _, line = lines(clock, {"reward": 1.0, "rewards/accuracy_reward/mean": 1.0}, first_step=80)
    assert line == "step 90/100, 0:00:30 left: reward 1"  # one function: its reward is the total


def test_no_step_no_estimate(clock):
    _, line = lines(clock, {"reward": 1.0}, steps=0)
    assert line == "step 0/100: reward 1"
