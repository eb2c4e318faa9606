"""How long only the critic learns at the beginning of training (VC-PPO's value pretraining)."""

from __future__ import annotations

import json
from pathlib import Path


WARMUP_STATE_NAME = "critic_warmup.json"


class CriticWarmup:
    """
    Decides when the policy starts to learn: after a number of optimizer steps, or before that when the value loss has
    settled. Too short a warm-up starts from random advantages, too long a one overfits the critic to one policy
    (VC-PPO, https://huggingface.co/papers/2503.01491).

    If it ends early it ends between two rollouts, so that a rollout's mini-batches are treated alike.

    Args:
        max_steps (`int`): optimizer steps after which it ends in any case; 0 for none.
        tolerance (`float`, *optional*):
            it has settled when none of the last `patience` rollouts lowered the smallest value loss before them by
            more than this share of it. `None` waits for `max_steps`.
        steps_per_rollout (`int`): optimizer steps of a rollout.
        patience (`int`, *optional*, defaults to `3`): rollouts without progress.
    """

    def __init__(self, max_steps: int, tolerance: float | None, steps_per_rollout: int, patience: int = 3):
        self.max_steps = max_steps
        self.tolerance = tolerance
        self.steps_per_rollout = steps_per_rollout
        self.patience = patience
        self.has_settled = False
        self._step_losses: list[float] = []
        self._rollout_losses: list[float] = []

    def is_active(self, step: int) -> bool:
        """Whether only the critic learns in optimizer step `step`, counted from 0."""
        return step < self.max_steps and not self.has_settled

    def record(self, value_loss: float) -> None:
        """Take note of an optimizer step's value loss."""
        if self.tolerance is None:
            return
        self._step_losses.append(value_loss)
        if len(self._step_losses) < self.steps_per_rollout:
            return
        self._rollout_losses.append(sum(self._step_losses) / len(self._step_losses))
        self._step_losses = []
        before, recent = self._rollout_losses[: -self.patience], self._rollout_losses[-self.patience :]
        self.has_settled = bool(before) and min(recent) >= (1 - self.tolerance) * min(before)

    def save(self, folder: str | Path) -> None:
        """Write the state to a checkpoint."""
        state = {
            "has_settled": self.has_settled,
            "step_losses": self._step_losses,
            "rollout_losses": self._rollout_losses,
        }
        (Path(folder) / WARMUP_STATE_NAME).write_text(json.dumps(state) + "\n")

    def load(self, folder: str | Path) -> bool:
        """Read the state from a checkpoint. Returns whether it has one."""
        path = Path(folder) / WARMUP_STATE_NAME
        if not path.is_file():
            return False
        state = json.loads(path.read_text())
        self.has_settled = state["has_settled"]
        self._step_losses, self._rollout_losses = state["step_losses"], state["rollout_losses"]
        return True
