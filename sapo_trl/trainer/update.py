"""The losses of a micro-batch: the policy's and the critic's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import SAPOConfig
from ..losses import aggregate, log_ratio, segment_value_loss
from ..metrics import Measurements, mean_over
from ..rollouts.types import PolicyForward, RolloutBatch
from ..segments import Segments
from ..token_rewards import kl_estimate
from ..visual_dependency import visual_dependency
from .policy_terms import policy_term
from .step import MicroBatchLoss, StepTotals, read_tokens, segments_of


# The losses' metrics by their names in the log.
POLICY_METRICS = {
    "clip_fraction": "clip_ratio/region_mean",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
    "dual_clip_fraction": "clip_ratio/dual_mean",
    "approx_kl": "approx_kl",
    "approx_kl_k3": "approx_kl_k3",
    "ratio_mean": "ratio/mean",
}
SEGMENT_RATIO_METRICS = {
    "geometric_bias": "ratio/geometric_bias",
    "geometric_bias_bound": "ratio/geometric_bias_bound",
}


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

        normalizer = totals.normalizer(args.loss_aggregation, "tokens", args.max_completion_length)
        output = policy_term(forward.logps, batch, ratio_segments, normalizer, args)
        loss, share = output.loss, 1 / totals.micro_batches
        # Losses of micro-batches add up to the optimizer step's loss.
        metrics: Measurements = {"policy_loss": (output.loss.detach(), share)}
        for key in POLICY_METRICS.keys() & output.metrics.keys():
            metrics[POLICY_METRICS[key]] = mean_over(output.metrics[key], mask.sum())
        for key in SEGMENT_RATIO_METRICS.keys() & output.metrics.keys():
            metrics[SEGMENT_RATIO_METRICS[key]] = mean_over(output.metrics[key], ratio_segments.count.sum())
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
        if args.entropy_penalty_coef != 0.0:
            surprise = -aggregate(forward.logps, segments.mask, normalizer=totals.response_tokens)
            metrics["entropy_penalty"] = (surprise.detach(), share)
            loss = loss + args.entropy_penalty_coef * surprise
        if args.perception_kl_coef != 0.0:
            loss, metrics["perception_kl"] = self._with_perception(loss, forward, batch, totals)
        if forward.aux_loss is not None:
            metrics["aux_loss"] = (forward.aux_loss.detach(), 1.0)
            # By tokens that the policy reads.
            loss = loss + self.router_aux_loss_coef * forward.aux_loss * (read_tokens(batch) / totals.own_read_tokens)
        maxima = {"ratio/max": output.metrics["ratio_max"]}
        if totals.response_scale is not None:
            maxima["response_weight/max"] = totals.response_scale.largest(args.smallest_response_weight)
        return MicroBatchLoss(loss, metrics, maxima)

    def _with_perception(
        self, loss: torch.Tensor, forward: PolicyForward, batch: RolloutBatch, totals: StepTotals
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, float]]:
        """The loss with PAPO's perception loss, and the divergence from the policy with corrupted images."""
        args, mask = self.args, (batch["segment_ids"] >= 0) & batch["has_image"].unsqueeze(1)
        corrupted = forward.corrupted_logps
        corrupted = batch["corrupted_per_token_logps"] if corrupted is None else corrupted
        # Masked before the exponential, as the KL term.
        divergence = visual_dependency(torch.where(mask, forward.logps, 0), torch.where(mask, corrupted, 0))
        divergence = aggregate(divergence, mask, normalizer=totals.response_tokens)
        loss = loss - args.perception_kl_coef * divergence
        if args.corrupted_entropy_penalty_coef != 0.0:
            likelihood = aggregate(corrupted, mask, normalizer=totals.response_tokens)
            loss = loss - args.corrupted_entropy_penalty_coef * likelihood
        return loss, (divergence.detach(), 1 / totals.micro_batches)

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
            "critic/loss": (output.loss.detach(), 1 / totals.micro_batches),
            "critic/clip_ratio": mean_over(output.metrics["value_clip_fraction"], segments.count.sum()),
        }
        return MicroBatchLoss(output.loss, metrics)
