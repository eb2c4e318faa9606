"""The optimizer step: its normalizers, how far it is, and its measurements."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator

from ..config import TRL_LOSS_TYPES, SAPOConfig
from ..distributed import Processes
from ..metrics import Measurements, MetricAccumulator
from ..rollouts.types import RolloutBatch
from ..segments import Segments
from ..visual_dependency import ResponseScale


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
        response_tokens (`torch.Tensor`): 0-dimensional, tokens of segments, with and without the policy's mask.
        rows (`int`): responses of this process.
        micro_batches (`int`): forwards of the step.
        own_tokens (`torch.Tensor`): 0-dimensional, this process's tokens that any loss reads.
        own_segments (`torch.Tensor`): 0-dimensional, this process's segments.
        own_read_tokens (`torch.Tensor`): 0-dimensional, this process's tokens, prompts included.
        response_scale ([`~sapo_trl.visual_dependency.ResponseScale`], *optional*):
            from a response's dependence on its images to its weight.
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    positive_tokens: torch.Tensor
    response_tokens: torch.Tensor
    rows: int
    micro_batches: int
    own_tokens: torch.Tensor
    own_segments: torch.Tensor
    own_read_tokens: torch.Tensor
    response_scale: ResponseScale | None = None

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
        tokens = _total(batch["policy_mask"].sum() for batch in batches)
        responses = _total((batch["segment_ids"] >= 0).sum() for batch in batches)
        counts = (tokens, segments, _total(positive), responses)
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
            own_read_tokens=_total(read_tokens(batch) for batch in batches),
            response_scale=_response_scale(batches, args, processes),
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
        if aggregation == "seq-mean-token-sum-norm":
            return self.rows * max_completion_length
        if aggregation in ("seq-mean-token-mean", "seq-mean-token-sum"):
            return self.rows
        raise ValueError(f"{aggregation!r} has no denominator here.")


def _response_scale(
    batches: list[RolloutBatch], args: SAPOConfig, processes: Processes | None
) -> ResponseScale | None:
    """Of the responses of all processes."""
    if args.response_weighting == "none":
        return None
    own = torch.cat([batch["response_dependency"] for batch in batches])
    return ResponseScale.of(own if processes is None else processes.gather(own), args.smallest_response_weight)


def weighted_responses(batch: RolloutBatch, totals: StepTotals, args: SAPOConfig) -> RolloutBatch:
    """A micro-batch whose advantages are multiplied by the weights of its responses, if they have any."""
    if totals.response_scale is None:
        return batch
    weights = totals.response_scale.weights(batch["response_dependency"], args.smallest_response_weight)
    return {**batch, "advantages": batch["advantages"] * weights.unsqueeze(1)}


def _total(numbers: Any) -> torch.Tensor:
    return torch.stack(list(numbers)).sum()


def read_tokens(batch: RolloutBatch) -> torch.Tensor:
    """0-dimensional, the tokens that the policy reads, prompts included."""
    return batch["prompt_mask"].sum() + batch["completion_mask"].sum()


def _trained_tokens(batch: RolloutBatch, args: SAPOConfig) -> torch.Tensor:
    regularized = args.beta != 0.0 or args.entropy_coef != 0.0 or args.use_adaptive_entropy
    if args.loss_type in TRL_LOSS_TYPES and regularized:
        return loss_mask(batch).sum()  # also of responses without a reward
    if args.entropy_penalty_coef != 0.0 or args.perception_kl_coef != 0.0:
        return (batch["segment_ids"] >= 0).sum()  # also of tokens that a mask leaves out of the policy loss
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
        values (`torch.Tensor`, *optional*): float32 `(b, T)`, read for it in the policy's forward.
        outputs (`tuple[MicroBatchLoss, ...]`): this package's losses so far, detached, for their measurements.
    """

    batches: list[RolloutBatch]
    totals: StepTotals
    micro_batch: RolloutBatch
    losses: tuple[torch.Tensor, ...] = ()
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    values: torch.Tensor | None = None
    outputs: tuple[MicroBatchLoss, ...] = ()

    def has(self, batch: RolloutBatch) -> bool:
        """Whether a micro-batch is one of the step's."""
        return any(other is batch for other in self.batches)

    def begin(self, batch: RolloutBatch) -> StepInProgress:
        """The step with this micro-batch as the latest."""
        return replace(self, micro_batch=batch, values=None, started=time.perf_counter())

    def measured(self, output: MicroBatchLoss) -> StepInProgress:
        """The step with a loss's measurements, without its graph."""
        maxima = {name: value.detach() for name, value in output.maxima.items()}
        output = replace(output, loss=output.loss.detach(), maxima=maxima)
        return replace(self, outputs=(*self.outputs, output))

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


def combined(
    outputs: Iterable[MicroBatchLoss], accelerator: Accelerator, metrics: Measurements | None = None
) -> dict[str, float]:
    """The measurements of some losses and of their optimizer step (`metrics`), combined over processes."""
    measured = MetricAccumulator()
    for output in outputs:
        measured.add(output.metrics)
        for name, value in output.maxima.items():
            measured.add_max(name, value)
    measured.add(metrics or {})
    return measured.flush(accelerator)
