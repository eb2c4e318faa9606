"""The update: the losses of a micro-batch, their normalizers, and the progress of an optimizer step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..config import TRL_LOSS_TYPES, SAPOConfig
from ..distributed import Processes
from ..losses import (
    LossOutput,
    aggregate,
    clipped_policy_loss,
    log_ratio,
    segment_value_loss,
    soft_adaptive_policy_loss,
)
from ..metrics import Measurements, mean_over
from ..rollouts.types import PolicyForward, RolloutBatch
from ..segments import Segments
from ..token_rewards import kl_estimate


# The losses' metrics by their names in the log.
_POLICY_METRICS = {
    "clip_fraction": "clip_ratio/region_mean",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
    "dual_clip_fraction": "clip_ratio/dual_mean",
    "approx_kl": "approx_kl",
    "approx_kl_k3": "approx_kl_k3",
    "ratio_mean": "ratio/mean",
}
_SEGMENT_RATIO_METRICS = {
    "geometric_bias": "ratio/geometric_bias",
    "geometric_bias_bound": "ratio/geometric_bias_bound",
}


def segments_of(batch: RolloutBatch) -> Segments:
    """The partition that a batch carries."""
    counts = batch.get("segment_counts")  # the rest of a rollout in an older checkpoint has none
    return Segments(batch["segment_ids"], max_count=max(counts) if counts else None)


def loss_mask(batch: RolloutBatch) -> torch.Tensor:
    """bool `(B, T)`: tokens that the policy produced and that count."""
    mask = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


@dataclass(frozen=True)
class StepTotals:
    """
    The normalizers of the losses of an optimizer step's micro-batches.

    They are totals over the whole step, so that its gradient does not depend on how its responses are cut into
    micro-batches; and means over processes, because distributed training averages over processes.

    Args:
        tokens (`torch.Tensor`): 0-dimensional, tokens that the policy learns from.
        segments (`torch.Tensor`): 0-dimensional.
        positive_tokens (`torch.Tensor`): 0-dimensional, tokens of responses above `positive_lm_threshold`.
        rows (`int`): responses of this process.
        micro_batches (`int`): forwards of the step.
        own_tokens (`torch.Tensor`): 0-dimensional, this process's tokens that any loss reads.
        own_segments (`torch.Tensor`): 0-dimensional, this process's segments.
        own_read_tokens (`torch.Tensor`): 0-dimensional, this process's tokens, prompts included.
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    positive_tokens: torch.Tensor
    rows: int
    micro_batches: int
    own_tokens: torch.Tensor
    own_segments: torch.Tensor
    own_read_tokens: torch.Tensor

    @classmethod
    def of(
        cls,
        batches: list[RolloutBatch],
        args: SAPOConfig,
        processes: Processes | None = None,
        micro_batches: int | None = None,
    ) -> StepTotals:
        """
        Args:
            batches (`list[RolloutBatch]`): this process's micro-batches of an optimizer step.
            args ([`SAPOConfig`]): settings of the run.
            processes ([`~sapo_trl.distributed.Processes`], *optional*): of the run; by default this one alone counts.
            micro_batches (`int`, *optional*): forwards of the step; by default as many as there are batches.
        """
        segments = _total(segments_of(batch).count.sum() for batch in batches)
        # No indexing by a mask: it would wait for the device.
        positive = (
            (batch["policy_mask"] & (batch["rewards"] > args.positive_lm_threshold).unsqueeze(1)).sum()
            for batch in batches
        )
        counts = (_total(batch["policy_mask"].sum() for batch in batches), segments, _total(positive))
        if processes is None:
            totals = [count.clamp(min=1) for count in counts]
        else:
            totals = processes.mean(torch.stack(counts).float()).clamp(min=1 / processes.count)
        return cls(
            *totals,
            rows=sum(len(batch["segment_ids"]) for batch in batches),
            micro_batches=micro_batches or len(batches),
            own_tokens=_total(_trained_tokens(batch, args) for batch in batches),
            own_segments=segments,
            own_read_tokens=_total(_read_tokens(batch) for batch in batches),
        )

    def normalizer(self, aggregation: str, unit: str, max_completion_length: int | None) -> torch.Tensor | float:
        """
        Args:
            aggregation (`str`): see [`~sapo_trl.losses.aggregate`].
            unit (`str`): `"tokens"` or `"segments"`: each has one of the losses to be summed.
            max_completion_length (`int`, *optional*): tokens of a response at most.
        """
        if aggregation == "token-mean":
            return getattr(self, unit)
        return self.rows * max_completion_length if aggregation == "seq-mean-token-sum-norm" else self.rows


def _total(numbers: Any) -> torch.Tensor:
    return torch.stack(list(numbers)).sum()


def _read_tokens(batch: RolloutBatch) -> torch.Tensor:
    return batch["prompt_mask"].sum() + batch["completion_mask"].sum()


def _trained_tokens(batch: RolloutBatch, args: SAPOConfig) -> torch.Tensor:
    regularized = args.beta != 0.0 or args.entropy_coef != 0.0 or args.use_adaptive_entropy
    if args.loss_type in TRL_LOSS_TYPES and regularized:
        return loss_mask(batch).sum()  # also of responses without a reward
    return batch["policy_mask"].sum()


@dataclass(frozen=True)
class StepInProgress:
    """
    How far an optimizer step is. Each micro-batch replaces it as a whole.

    Args:
        batches (`list[RolloutBatch]`): the step's micro-batches.
        totals ([`StepTotals`]): of the step.
        losses (`tuple[torch.Tensor, ...]`): of the micro-batches so far, detached.
        seconds (`float`): spent on them.
        started (`float`): when the latest micro-batch began.
        micro_batch (`RolloutBatch`): the latest.
        values (`torch.Tensor`, *optional*): float32 `(b, T)`, a shared critic's for it.
    """

    batches: list[RolloutBatch]
    totals: StepTotals
    micro_batch: RolloutBatch
    losses: tuple[torch.Tensor, ...] = ()
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    values: torch.Tensor | None = None

    def has(self, batch: RolloutBatch) -> bool:
        """Whether a micro-batch is one of the step's."""
        return any(other is batch for other in self.batches)

    def begin(self, batch: RolloutBatch) -> StepInProgress:
        """The step with this micro-batch as the latest."""
        return replace(self, micro_batch=batch, values=None, started=time.perf_counter())

    def after(self, losses: list[torch.Tensor]) -> StepInProgress:
        """The step once the latest micro-batch has these losses. Its values are let go, and their graph."""
        seconds = self.seconds + time.perf_counter() - self.started
        return replace(self, losses=(*self.losses, *losses), seconds=seconds, values=None)


@dataclass(frozen=True)
class MicroBatchLoss:
    """
    A loss of one micro-batch, scaled for gradient accumulation.

    Args:
        loss (`torch.Tensor`): 0-dimensional, differentiable.
        metrics ([`~sapo_trl.metrics.Measurements`]): for the log.
        maxima (`dict[str, torch.Tensor]`, *optional*): 0-dimensional; the log has the largest of each.
    """

    loss: torch.Tensor
    metrics: Measurements
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyObjective:
    """
    This package's losses of the policy: policy, KL, entropy, likelihood of correct responses, experts.

    Args:
        args ([`SAPOConfig`]): settings of the run.
        router_aux_loss_coef (`float`, *optional*, defaults to `0.0`): weight of the experts' load-balancing loss.
    """

    args: SAPOConfig
    router_aux_loss_coef: float = 0.0

    def __call__(self, forward: PolicyForward, batch: RolloutBatch, totals: StepTotals) -> MicroBatchLoss:
        """
        Args:
            forward ([`PolicyForward`]): of the policy being updated.
            batch (`RolloutBatch`): the micro-batch.
            totals ([`StepTotals`]): of its optimizer step.
        """
        args, segments, mask = self.args, segments_of(batch), batch["policy_mask"]
        ratio_segments = segments if args.importance_sampling_level == "segment" else None
        if args.importance_sampling_level == "sequence":
            ratio_segments = Segments(torch.where(segments.mask, 0, segments.ids), max_count=1)

        output = self._policy_term(forward.logps, batch, ratio_segments, totals)
        loss, share = output.loss, 1 / totals.micro_batches
        # Losses of micro-batches add up to the optimizer step's loss.
        metrics: Measurements = {"policy_loss": (output.loss.detach(), share)}
        for key in _POLICY_METRICS.keys() & output.metrics.keys():
            metrics[_POLICY_METRICS[key]] = mean_over(output.metrics[key], mask.sum())
        for key in _SEGMENT_RATIO_METRICS.keys() & output.metrics.keys():
            metrics[_SEGMENT_RATIO_METRICS[key]] = mean_over(output.metrics[key], ratio_segments.count.sum())
        entropies = torch.where(segments.mask, forward.entropies.detach(), 0)
        metrics["entropy"] = (entropies.sum(), segments.mask.sum())

        if args.beta != 0.0 and args.kl_placement == "loss":
            loss = loss + args.beta * self._kl_term(forward.logps, batch, ratio_segments, totals)
        if args.positive_lm_coef != 0.0:
            positive = mask & (batch["rewards"] > args.positive_lm_threshold).unsqueeze(1)
            likelihood = aggregate(forward.logps, positive, normalizer=totals.positive_tokens)
            metrics["positive_lm_loss"] = (-likelihood.detach(), share)
            loss = loss - args.positive_lm_coef * likelihood
        if args.entropy_coef != 0.0:
            loss = loss - args.entropy_coef * aggregate(forward.entropies, mask, normalizer=totals.tokens)
            metrics["entropy_coef"] = (torch.tensor(args.entropy_coef), 1.0)
        if forward.aux_loss is not None:
            metrics["aux_loss"] = (forward.aux_loss.detach(), 1.0)
            # By tokens that the policy reads.
            loss = loss + self.router_aux_loss_coef * forward.aux_loss * (_read_tokens(batch) / totals.own_read_tokens)
        return MicroBatchLoss(loss, metrics, {"ratio/max": output.metrics["ratio_max"]})

    def _policy_term(
        self, logps: torch.Tensor, batch: RolloutBatch, ratio_segments: Segments | None, totals: StepTotals
    ) -> LossOutput:
        args = self.args
        inputs = (logps, batch["old_per_token_logps"], batch["advantages"], batch["policy_mask"])
        common = {
            "segments": ratio_segments,
            "aggregation": args.loss_aggregation,
            "normalizer": totals.normalizer(args.loss_aggregation, "tokens", args.max_completion_length),
            "weights": batch.get("importance_sampling_ratio"),
            "ratio_reduction": args.ratio_reduction,
        }
        if args.loss_type == "soft_adaptive_gate":
            return soft_adaptive_policy_loss(
                *inputs,
                temperature_pos=args.sapo_temperature_pos,
                temperature_neg=args.sapo_temperature_neg,
                **common,
            )
        return clipped_policy_loss(
            *inputs,
            clip_low=args.epsilon,
            clip_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            dual_clip=args.delta,
            **common,
        )

    def _kl_term(
        self, logps: torch.Tensor, batch: RolloutBatch, ratio_segments: Segments | None, totals: StepTotals
    ) -> torch.Tensor:
        args, mask = self.args, batch["policy_mask"]
        # Masked before the exponential: an overflow there would come back as a NaN gradient.
        kl = kl_estimate(
            torch.where(mask, logps, 0), torch.where(mask, batch["ref_per_token_logps"], 0), args.kl_estimator
        )
        if args.use_bias_correction_kl:
            kl = kl * torch.exp(
                log_ratio(logps, batch["old_per_token_logps"], ratio_segments, reduction=args.ratio_reduction)
            )
        aggregation = args.kl_aggregation or args.loss_aggregation
        return aggregate(kl, mask, aggregation, totals.normalizer(aggregation, "tokens", args.max_completion_length))


@dataclass(frozen=True)
class ValueObjective:
    """
    The critic's loss.

    Args:
        args ([`SAPOConfig`]): settings of the run.
    """

    args: SAPOConfig

    def __call__(self, values: torch.Tensor, batch: RolloutBatch, totals: StepTotals) -> MicroBatchLoss:
        """
        Args:
            values (`torch.Tensor`): float32 `(b, T)`, of the critic being updated.
            batch (`RolloutBatch`): the micro-batch.
            totals ([`StepTotals`]): of its optimizer step.
        """
        args, segments = self.args, segments_of(batch)
        aggregation = args.value_loss_aggregation
        output = segment_value_loss(
            values,
            batch["old_values"],
            batch["returns"],
            segments,
            value_state=args.value_state,
            cliprange_value=args.cliprange_value,
            aggregation=aggregation,
            normalizer=totals.normalizer(aggregation, "segments", args.max_completion_length),
        )
        metrics: Measurements = {
            "value_loss": (output.loss.detach(), 1 / totals.micro_batches),
            "value/clip_ratio": mean_over(output.metrics["value_clip_fraction"], segments.count.sum()),
        }
        return MicroBatchLoss(output.loss, metrics)
