"""How noisy the policy's gradient is at a frozen policy, to compare token, segment and sequence level (App. C)."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from ..config import SAPOConfig
from ..files import write_text
from ..json_files import NUMBER, read_json


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GradientNoise:
    """
    Noise and signal of the gradient of one optimizer step, from `n` steps at the same weights.

    Args:
        steps (`int`): `n`, the number of steps with a gradient.
        parameters (`int`): numbers in the gradient.
        trace (`float`): trace of the gradient's covariance, unbiased for independent steps.
        squared_mean (`float`): squared norm of the mean gradient, unbiased, so it may be negative where noise is all.
        noise_to_signal (`float`): `trace / squared_mean`; NaN unless `squared_mean` is positive.
        trace_error (`float`): standard error of `trace`; NaN with fewer than two blocks.
        squared_mean_error (`float`): of `squared_mean`.
        noise_to_signal_error (`float`): of `noise_to_signal`.
    """

    steps: int
    parameters: int
    trace: float
    squared_mean: float
    noise_to_signal: float
    trace_error: float
    squared_mean_error: float
    noise_to_signal_error: float


class GradientVariance(TrainerCallback):
    """
    Measures the covariance of the policy's gradient over the optimizer steps of a run whose policy does not move.

    With `learning_rate=0` every step draws another gradient of the same distribution. Runs that differ in one setting
    (such as `segmentation`) and start from the same weights can then be compared. All ratios are 1, so token and
    segment level of the ratio give the same gradient where advantages are constant in segments.

    Let `S` be the sum of `n` gradients and `Q` the sum of their squared norms. Then `(Q - |S|^2 / n) / (n - 1)` is the
    trace of the covariance. `(|S|^2 - Q) / (n * (n - 1))` is the squared norm of the mean, without the noise in
    `|S / n|^2`. Sums are float64. Standard errors are a jackknife over blocks of rollouts.

    Scale: a loss twice as large has four times the trace and the same noise-to-signal ratio. So compare settings by
    the ratio.

    Steps should be independent draws. Steps of one rollout are nearly but not quite independent, because advantages
    are whitened over the rollout: take `num_mini_batches=1`, or many responses. Also freeze the critic
    (`critic_learning_rate=0`), or the gradient's mean drifts and counts as noise.

    Memory: `8 * num_blocks` bytes for each trainable parameter, on the parameters' device.

    Args:
        path (`str` or `Path`, *optional*): JSON file for the result, written at the end of training.
        num_blocks (`int`, *optional*, defaults to `8`): blocks of the jackknife; `1` for no standard errors.

    Example:

    ```python
    noise = GradientVariance("token.json")
    args = SAPOConfig(
        "token", segmentation="token", learning_rate=0, critic_learning_rate=0, max_grad_norm=0, max_steps=64
    )
    SAPOTrainer(..., args=args, callbacks=[noise]).train()
    noise.result()
    ```
    """

    def __init__(self, path: str | Path | None = None, num_blocks: int = 8):
        if num_blocks < 1:
            raise ValueError(f"`num_blocks` must be at least 1, got {num_blocks}.")
        self.path = None if path is None else Path(path)
        self.num_blocks = num_blocks
        self._reset()

    def _reset(self) -> None:
        self._sums: list[list[torch.Tensor]] = []  # of each block, one tensor a parameter
        self._squares = [0.0] * self.num_blocks
        self._counts = [0] * self.num_blocks
        self._steps_per_rollout = 1

    def on_train_begin(self, args: SAPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        check_frozen(args)
        self._reset()
        self._steps_per_rollout = getattr(args, "num_mini_batches", None) or 1

    def on_pre_optimizer_step(
        self, args: SAPOConfig, state: TrainerState, control: TrainerControl, *, optimizer: Any, **kwargs: Any
    ) -> None:
        # The optimizer's parameters and no others: beside the policy, the model may hold a critic's adapter.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        if all(gradient is None for gradient in gradients):
            return  # a skipped step, or the critic's warm-up
        if not self._sums:
            self._sums = [
                [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
                for _ in range(self.num_blocks)
            ]
        block = state.global_step // self._steps_per_rollout % self.num_blocks
        square = 0.0
        for total, gradient in zip(self._sums[block], gradients, strict=True):
            if gradient is not None:
                exact = gradient.detach().to(torch.float64)
                total += exact
                square = square + exact.square().sum()
        self._squares[block] += float(square)
        self._counts[block] += 1

    def on_train_end(self, args: SAPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if sum(self._counts) < 2:
            logger.warning("No gradient variance: %d steps had a gradient, at least 2 must.", sum(self._counts))
            return
        result = self.result()
        logger.info("Gradient variance: %s", result)
        if self.path is not None and state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(asdict(result), indent=2) + "\n")

    def result(self) -> GradientNoise:
        """
        The measurements so far.

        Returns:
            [`GradientNoise`]

        Raises:
            ValueError: before the second step with a gradient.
        """
        steps = sum(self._counts)
        if steps < 2:
            raise ValueError(f"A variance takes at least 2 steps with a gradient, got {steps}.")
        used = [block for block in range(self.num_blocks) if self._counts[block]]
        # All that the estimates need of the sums, with or without any block, are the blocks' inner products.
        products = torch.tensor(
            [
                [
                    float(sum(torch.sum(x * y) for x, y in zip(self._sums[one], self._sums[other], strict=True)))
                    for other in used
                ]
                for one in used
            ],
            dtype=torch.float64,
        )
        counts = torch.tensor([self._counts[block] for block in used], dtype=torch.float64)
        squares = torch.tensor([self._squares[block] for block in used], dtype=torch.float64)

        def estimates(kept: torch.Tensor) -> torch.Tensor:
            n, total = (kept * counts).sum(), (kept * squares).sum()
            product = kept @ products @ kept
            trace, signal = (total - product / n) / (n - 1), (product - total) / (n * (n - 1))
            return torch.stack([trace, signal, torch.where(signal > 0, trace / signal, torch.nan)])

        ones = torch.ones(len(used), dtype=torch.float64)
        trace, signal, ratio = estimates(ones).tolist()
        errors = [float("nan")] * 3
        if len(used) > 1 and bool((steps - counts > 1).all()):
            left_out = torch.stack([estimates(ones - row) for row in torch.eye(len(used), dtype=torch.float64)])
            spread = (left_out - left_out.mean(dim=0)).square().sum(dim=0)
            errors = ((len(used) - 1) / len(used) * spread).sqrt().tolist()
        return GradientNoise(
            steps=steps,
            parameters=sum(total.numel() for total in self._sums[0]),
            trace=trace,
            squared_mean=signal,
            noise_to_signal=ratio,
            trace_error=errors[0],
            squared_mean_error=errors[1],
            noise_to_signal_error=errors[2],
        )


def check_frozen(args: SAPOConfig) -> None:
    """
    Raise a `ValueError` unless the gradients of a run are draws at the same weights and as the loss gives them; warn
    of a critic that moves.
    """
    if args.learning_rate != 0:
        raise ValueError(
            "`GradientVariance` compares gradients at the same weights: set `learning_rate=0`, got "
            f"{args.learning_rate}."
        )
    if args.max_grad_norm:
        raise ValueError(
            "`GradientVariance` needs gradients that are not clipped: set `max_grad_norm=0`, got "
            f"{args.max_grad_norm}."
        )
    if getattr(args, "num_iterations", 1) != 1:
        raise ValueError(
            "`GradientVariance` needs another draw in each step, and a rollout that is used again is none: set "
            f"`num_iterations=1`, got {args.num_iterations}."
        )
    if args.fp16:
        raise ValueError("`GradientVariance` needs gradients that are not scaled: use `bf16` or float32, got `fp16`.")
    if args.deepspeed or args.fsdp:
        raise ValueError("`GradientVariance` reads whole gradients, which DeepSpeed and FSDP keep in pieces: use DDP.")
    if getattr(args, "learns_critic", False) and args.critic_learning_rate != 0:
        logger.warning(
            "`critic_learning_rate` is %s: a critic that moves changes the gradient's mean, and the drift counts as "
            "noise.",
            args.critic_learning_rate,
        )


def read_results(paths: dict[str, Path]) -> dict[str, GradientNoise]:
    """
    Read the results that runs have written.

    Args:
        paths (`dict[str, Path]`): files of [`GradientVariance`], by the name of their setting.

    Returns:
        `dict[str, GradientNoise]`

    Raises:
        ValueError: if a file is not there, or is not one of them.
    """
    results = {}
    for name, path in paths.items():
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file.")
        content = read_json(path, dict.fromkeys((field.name for field in fields(GradientNoise)), NUMBER))
        try:
            results[name] = GradientNoise(**content)
        except TypeError as error:
            raise ValueError(f"{path}: not a file of `GradientVariance` ({error}).") from error
    return results
