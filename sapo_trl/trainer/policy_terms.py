"""The policy loss that a configuration asks for, among this package's."""

from __future__ import annotations

import torch

from ..config import SAPOConfig
from ..losses import LossOutput, clipped_policy_loss, masked_policy_loss, soft_adaptive_policy_loss
from ..rollouts.types import RolloutBatch
from ..segments import Segments


def policy_term(
    logps: torch.Tensor,
    batch: RolloutBatch,
    ratio_segments: Segments | None,
    normalizer: float | torch.Tensor,
    args: SAPOConfig,
) -> LossOutput:
    """
    Args:
        logps (`torch.Tensor`): float32 `(b, T)`, of the policy being updated.
        batch (`RolloutBatch`): the micro-batch.
        ratio_segments ([`Segments`], *optional*): units that share an importance ratio; `None` for single tokens.
        normalizer (`float` or `torch.Tensor`): divisor of the sum over the optimizer step.
        args ([`SAPOConfig`]): settings of the run.
    """
    inputs = (logps, batch["old_per_token_logps"], batch["advantages"], batch["policy_mask"])
    common = {
        "segments": ratio_segments,
        "aggregation": args.loss_aggregation,
        "normalizer": normalizer,
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
    low, high = args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "double_sided_mask":
        return masked_policy_loss(*inputs, low=low, high=high, trust_region="ratio", **common)
    if args.loss_type == "divergence_mask":
        return masked_policy_loss(*inputs, low=low, high=high, trust_region="probability", **common)
    if args.loss_type == "segment_clip":
        return clipped_policy_loss(*inputs, clip_low=low, clip_high=high, dual_clip=args.delta, **common)
    raise ValueError(f"`loss_type={args.loss_type!r}` has no policy loss here.")
