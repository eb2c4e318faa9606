"""The quality of a critic: its values beside Monte-Carlo values of the same states, as in VinePPO's paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers.trainer_callback import TrainerControl, TrainerState

from ..config import SAPOConfig
from ..metrics import MetricAccumulator
from ..recordings.columns import file_name
from ..recordings.writing import write_frame
from ..rollouts.types import SegmentedRollout
from .rollout import RolloutCallback


class ValueDiagnostics(RolloutCallback):
    """
    Compares a critic's values with Monte-Carlo values at the states that the critic is trained on.

    The policy continues each state `num_continuations` times; the mean reward is an unbiased estimate of the state's
    value (https://huggingface.co/papers/2410.01679). This works for any critic of [`SAPOTrainer`]. With
    `"monte_carlo"` it measures the error of that critic's own estimate.

    Logged: `critic/diagnostics/mae`, `…/rank_correlation` (Spearman), `…/explained_variance` (of the Monte-Carlo
    values, whose noise no critic can explain), `…/critic_mean`, `…/monte_carlo_mean`, and `…/standard_error`, the mean
    standard error of the Monte-Carlo values. A perfect critic's `mae` is about 0.8 of the standard error. Several
    processes compare their own states and average the results. The callback does not change training.

    Args:
        every (`int`, *optional*, defaults to `10`): examine every `every`-th training rollout, the first one included.
        num_continuations (`int`, *optional*, defaults to `9`): continuations of each state.
        max_responses (`int`, *optional*, defaults to `8`): responses of a rollout to examine, on each process.
        output_dir (`str` or `Path`, *optional*):
            folder for one Parquet file per examined rollout and process, with a row per state; by default none.

    Example:

    ```python
    trainer = SAPOTrainer(..., callbacks=[ValueDiagnostics(every=20, output_dir="values")])
    ```
    """

    def __init__(
        self,
        every: int = 10,
        num_continuations: int = 9,
        max_responses: int = 8,
        output_dir: str | Path | None = None,
    ):
        for name, value in (("every", every), ("max_responses", max_responses)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if num_continuations < 2:
            raise ValueError(f"`num_continuations` must be at least 2 for a standard error, got {num_continuations}.")
        self.every = every
        self.num_continuations = num_continuations
        self.max_responses = max_responses
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._num_rollouts = 0

    def state_dict(self) -> dict[str, Any]:
        return {"num_rollouts": self._num_rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_rollouts = state["num_rollouts"]

    def on_rollout(
        self,
        args: SAPOConfig,
        state: TrainerState,
        control: TrainerControl,
        rollout: SegmentedRollout,
        metrics: MetricAccumulator,
    ) -> None:
        if rollout.mode != "train":
            return
        self._num_rollouts += 1
        if (self._num_rollouts - 1) % self.every != 0:
            return
        if rollout.continuations is None:
            raise ValueError(
                "`ValueDiagnostics` continues responses from their tokens alone, up to `max_completion_length`; with "
                "`rollout_func`, tools, environments or no `max_completion_length` that is not possible."
            )
        states = rollout.segments.state_mask(args.value_state)[: self.max_responses]
        devices = [rollout.values.device] if rollout.values.is_cuda else []
        # Training must continue with the random numbers that it has without this callback.
        with torch.random.fork_rng(devices):
            result = rollout.continuations.values_at(
                states, rollout.completion_ids, self.num_continuations, args.truncated_continuation_reward
            )
        rows, positions = states.nonzero(as_tuple=True)
        table = pd.DataFrame(
            {
                "step": state.global_step,
                "response": rows.tolist(),
                "segment": rollout.segments.ids[rows, positions].tolist(),
                "token": positions.tolist(),
                "value": rollout.values[rows, positions].tolist(),
                "monte_carlo_value": result.values.tolist(),
                "standard_error": (result.rewards.std(dim=1) / self.num_continuations**0.5).tolist(),
                "reward": rollout.rewards[rows].tolist(),
            }
        )
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            name = file_name("values", state.global_step, args.process_index, "parquet")
            write_frame(self.output_dir / name, table)
        table = table[["value", "monte_carlo_value", "standard_error"]].dropna()
        for name, value in value_agreement(table["value"], table["monte_carlo_value"]).items():
            known = value == value  # NaN where one of the two does not vary
            metrics.add_total(f"critic/diagnostics/{name}", torch.tensor(value if known else 0.0), float(known))
        metrics.add_total("critic/diagnostics/standard_error", torch.tensor(table["standard_error"].sum()), len(table))
        metrics.add_total("critic/diagnostics/tokens", torch.tensor(float(result.num_tokens)), 1.0)
        metrics.add_total("time/value_diagnostics", torch.tensor(result.seconds), 1.0)


def value_agreement(values: pd.Series, monte_carlo_values: pd.Series) -> dict[str, float]:
    """
    Agreement of values with Monte-Carlo values of the same states.

    Args:
        values (`pd.Series`): values of `N` states.
        monte_carlo_values (`pd.Series`): Monte-Carlo values of the same states.

    Returns:
        `dict[str, float]`: `mae`, `rank_correlation` (Spearman, ties at their mean rank), `explained_variance`
        (`1 - Var(monte_carlo_values - values) / Var(monte_carlo_values)`), `critic_mean`, `monte_carlo_mean`; NaN
        where not defined.
    """
    variance = monte_carlo_values.var()
    residual_variance = (monte_carlo_values - values).var()
    return {
        "mae": float((values - monte_carlo_values).abs().mean()),
        # Pearson's correlation of ranks.
        "rank_correlation": float(values.rank().corr(monte_carlo_values.rank())),
        "explained_variance": float(1 - residual_variance / variance) if variance > 0 else float("nan"),
        "critic_mean": float(values.mean()),
        "monte_carlo_mean": float(monte_carlo_values.mean()),
    }
