"""Optimizer steps whose losses or gradients are not numbers: skipped, and after too many the run stops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from ..config import SAPOConfig


logger = logging.getLogger(__name__)


class StepGuard:
    """
    Tells which optimizer steps to skip, and stops a run in which nothing else happens any more.

    Args:
        args ([`SAPOConfig`]): settings of the run.
        accelerator ([`~accelerate.Accelerator`]): of the run.
    """

    def __init__(self, args: SAPOConfig, accelerator: Accelerator):
        self.engines_skip = False
        self.max_in_a_row = args.max_skipped_steps
        self._is_fp16 = accelerator.mixed_precision == "fp16"
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # It steps as soon as it has added gradients up, and its ZeRO optimizers drop infinite gradients and NaN.
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            stage = config["zero_optimization"]["stage"]
            self.engines_skip = stage == 3 or (stage > 0 and config.get("bf16", {}).get("check_grad_overflow", True))
            if not self.engines_skip:
                self.max_in_a_row = 1
        # Whether a policy's step can be left out by taking its gradients away: an engine has stepped by then, and a
        # gradient scaler refuses an optimizer without gradients.
        self.can_drop_gradients = (
            accelerator.distributed_type != DistributedType.DEEPSPEED and accelerator.scaler is None
        )
        self.output_dir = Path(args.output_dir)
        self.accelerator = accelerator
        self.in_a_row = 0

    def for_backward(self, loss: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """
        The tensor to run backward from, so that a DeepSpeed engine skips a bad step: it looks at gradients only.

        Args:
            loss (`torch.Tensor`): 0-dimensional.
            others (`torch.Tensor`): further numbers that must be finite.

        Returns:
            `torch.Tensor`: the loss; under DeepSpeed one whose gradients are NaN if any of them is not finite.
        """
        if not self.engines_skip or self._is_fp16:
            return loss
        finite = torch.stack([number.detach().isfinite() for number in (loss, *others)]).all()
        return loss * torch.where(finite, 1.0, torch.nan)

    def must_skip(self, numbers: list[torch.Tensor]) -> bool:
        """
        Whether a step has to be skipped, on all processes alike. Counts the skipped steps in a row.

        Args:
            numbers (`list[torch.Tensor]`): 0-dimensional, the step's losses and the norms of its gradients.

        Returns:
            `bool`: whether one of them is not finite.
        """
        skip = self.must_drop(numbers)
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip

    def must_drop(self, numbers: list[torch.Tensor]) -> bool:
        """
        Whether an update of a model has to be dropped, on all processes alike.

        Args:
            numbers (`list[torch.Tensor]`): 0-dimensional, the update's losses and the norms of its gradients.

        Returns:
            `bool`: whether one of them is not finite.
        """
        if self.accelerator.scaler is not None or (self.engines_skip and self._is_fp16):
            return False  # in half precision an overflow is how a gradient scaler finds its scale; it skips by itself
        finite = torch.stack([number.detach().isfinite().float() for number in numbers]).amin()
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce(finite, reduction="sum") / self.accelerator.num_processes
        return bool(finite < 1)

    def are_empty(self, *counts: torch.Tensor) -> list[bool]:
        """
        Which of some counts are 0 on all processes.

        Args:
            counts (`torch.Tensor`): 0-dimensional, of this process.
        """
        totals = torch.stack(counts)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        return (totals == 0).tolist()

    def report(self, step: int, batches: Callable[[], list[dict[str, Any]]]) -> None:
        """
        Warn of a skipped step; after too many in a row, save its micro-batches and stop.

        Args:
            step (`int`): optimizer steps before this one.
            batches (`Callable`): returns the step's micro-batches.

        Raises:
            FloatingPointError: after `max_skipped_steps` skipped steps in a row.
        """
        logger.warning("Optimizer step %d is skipped: a loss or gradient is not finite.", step)
        if self.in_a_row < self.max_in_a_row:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / f"skipped_step_{step}_{self.accelerator.process_index}.pt"
        torch.save(batches(), path)
        raise FloatingPointError(
            f"The losses or gradients of the last {self.in_a_row} optimizer steps (max_skipped_steps="
            f"{self.max_in_a_row}) were not finite. The micro-batches of the last one are in {str(path)!r} "
            "(torch.load). Usual causes: a learning rate that is too large, half-precision weights, a reference or "
            "sampler with other weights."
        )
