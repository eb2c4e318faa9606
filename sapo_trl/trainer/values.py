"""The values of states, one estimator for each kind of `critic`: learned, shared, sampled, of a tree, or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..config import SAPOConfig
from ..metrics import Measurements
from ..rollouts import ContinuationSampler, monte_carlo_values
from ..rollouts.types import PolicyForward, RolloutBatch, RolloutRecord
from ..segments import Segments


class ValueEstimator(Protocol):
    """How the states of a rollout are valued."""

    def __call__(
        self,
        forward: PolicyForward,
        batch: RolloutBatch,
        segments: Segments,
        policy_mask: torch.Tensor,
        record: RolloutRecord,
    ) -> tuple[torch.Tensor, Measurements]:
        """See [`SAPOTrainer.estimate_values`]."""
        ...


def checked_estimate(estimate: Any) -> tuple[torch.Tensor, Measurements]:
    """An estimator's result, or a `TypeError` unless it is `(values, metrics)`: a tensor might unpack by chance."""
    if not isinstance(estimate, tuple) or len(estimate) != 2:
        raise TypeError(
            "`estimate_values` must return `(values, metrics)`: float32 `(B, T)` and a dictionary of measurements for "
            f"the log (`{{}}` for none), got a {type(estimate).__name__}."
        )
    return estimate


@dataclass(frozen=True)
class LearnedValues:
    """
    The values of a critic that is run on the rollout.

    Args:
        critic_forward (`Callable`): runs the critic on a rollout, float32 `(B, T)`.
    """

    critic_forward: Callable[[RolloutBatch], torch.Tensor]

    def __call__(self, forward, batch, segments, policy_mask, record) -> tuple[torch.Tensor, Measurements]:
        return self.critic_forward(batch), {}


class SharedValues:
    """The values that a critic has read from the policy's hidden states, in the policy's forward."""

    def __call__(self, forward, batch, segments, policy_mask, record) -> tuple[torch.Tensor, Measurements]:
        return forward.values, {}


class NoValues:
    """Values of 0."""

    def __call__(self, forward, batch, segments, policy_mask, record) -> tuple[torch.Tensor, Measurements]:
        return torch.zeros_like(forward.logps), {}


class TreeValues:
    """The mean rewards below the nodes of a tree; 0 for responses of no tree, as in evaluation."""

    def __call__(self, forward, batch, segments, policy_mask, record) -> tuple[torch.Tensor, Measurements]:
        if record.given is None:
            return torch.zeros_like(forward.logps), {}
        values = record.given.tensors["parent_values"].unsqueeze(1)
        return values.expand_as(forward.logps).to(forward.logps.dtype), {}


@dataclass(frozen=True)
class SampledValues:
    """
    The mean rewards of continuations from the starts of segments.

    Args:
        args ([`SAPOConfig`]): settings of the run.
        sampler (`Callable`): returns a rollout's sampler of continuations; `None` in evaluation, where values are 0.
    """

    args: SAPOConfig
    sampler: Callable[[RolloutRecord], ContinuationSampler | None]

    def __call__(self, forward, batch, segments, policy_mask, record) -> tuple[torch.Tensor, Measurements]:
        sampler = self.sampler(record)
        if sampler is None:
            return torch.zeros_like(forward.logps), {}
        values, sampled = monte_carlo_values(
            sampler,
            segments,
            policy_mask,
            batch["completion_ids"],
            batch["token_rewards"],
            self.args.num_continuations,
            self.args.max_valued_segments,
            self.args.truncated_continuation_reward,
        )
        scored = sampled.values[~sampled.values.isnan()]
        numbers = {
            "monte_carlo/states": len(sampled.values),
            "monte_carlo/unique_states": sampled.num_states,
            "monte_carlo/tokens": sampled.num_tokens,
            "time/monte_carlo": sampled.seconds,
        }
        metrics: Measurements = {name: (torch.tensor(float(number)), 1.0) for name, number in numbers.items()}
        return values, {"monte_carlo/value": (scored.sum(), len(scored)), **metrics}


def make_value_estimator(
    args: SAPOConfig,
    critic_forward: Callable[[RolloutBatch], torch.Tensor],
    sampler: Callable[[RolloutRecord], ContinuationSampler | None],
) -> ValueEstimator:
    """The estimator that `critic` asks for, see [`LearnedValues`] and [`SampledValues`] for the arguments."""
    if args.critic in ("separate", "adapter"):
        return LearnedValues(critic_forward)
    if args.critic == "monte_carlo":
        return SampledValues(args, sampler)
    if args.reads_policy:
        return SharedValues()
    return {"tree": TreeValues, "none": NoValues}[args.critic]()
