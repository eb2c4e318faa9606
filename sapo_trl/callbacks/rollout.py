"""[`RolloutCallback`]: a callback that sees every rollout and every forward of the policy in training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from ..config import SAPOConfig
from ..metrics import MetricAccumulator
from ..rollouts.types import SegmentedRollout


class RolloutCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that [`SAPOTrainer`] also calls with every rollout, also in evaluation.

    Example:

    ```python
    from sapo_trl import RolloutCallback


    class Lengths(RolloutCallback):  # the mean number of tokens of a segment, in the log
        def on_rollout(self, args, state, control, rollout, metrics):
            metrics.add_total("tokens_per_segment", rollout.segments.mask.sum(), rollout.segments.count.sum())


    trainer.add_callback(Lengths())
    ```
    """

    def on_rollout(
        self,
        args: SAPOConfig,
        state: TrainerState,
        control: TrainerControl,
        rollout: SegmentedRollout,
        metrics: MetricAccumulator,
    ) -> None:
        """
        Called once per rollout, on every process.

        Args:
            args ([`SAPOConfig`]): settings of the run.
            state ([`~transformers.TrainerState`]): state of the training.
            control ([`~transformers.TrainerControl`]): influences the training loop.
            rollout ([`SegmentedRollout`]): this process's responses.
            metrics ([`MetricAccumulator`]):
                collects metrics for the next log entry. Every process must add the same names.
        """

    def on_policy_forward(
        self,
        args: SAPOConfig,
        state: TrainerState,
        control: TrainerControl,
        rows: torch.Tensor,
        log_ratios: torch.Tensor,
    ) -> None:
        """
        Called in training after the policy's forward of each micro-batch, before the optimizer step. It is not called
        while only the critic learns, nor for TRL's own losses, because they do not expose their log-probabilities.

        Args:
            args ([`SAPOConfig`]): settings of the run.
            state ([`~transformers.TrainerState`]): state of the training.
            control ([`~transformers.TrainerControl`]): influences the training loop.
            rows (`torch.Tensor`): int64 `(b,)`, the indices of these responses in the latest rollout.
            log_ratios (`torch.Tensor`):
                float32 `(b, T)`, each token's log-probability minus its log-probability at rollout time; arbitrary
                outside the segments.
        """

    def state_dict(self) -> dict[str, Any]:
        """
        The callback's state on this process, for a checkpoint. A resumed run restores it and continues as if it had
        never been interrupted.

        Returns:
            `dict[str, Any]`: tensors, numbers, strings and images, or lists and dictionaries of them.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restore a state from [`RolloutCallback.state_dict`].

        Args:
            state (`dict[str, Any]`): the state. Several callbacks of one class get their states in their own order.
        """
