"""
The stages that turn a rollout into a training batch.

Each is a function of its arguments. It returns its result and measurements for the log, and writes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import compress

import torch
from transformers import PreTrainedTokenizerBase

from ..advantages import (
    leave_one_out_advantages,
    length_adaptive_lam,
    masked_whiten,
    mean_baseline_advantages,
    segment_gae,
)
from ..config import TRL_LOSS_TYPES, SAPOConfig
from ..distributed import Processes
from ..metrics import Measurements, explained_variance
from ..rollouts.types import GivenRollout, PolicyForward, RolloutBatch, RolloutRecord, SegmentedRollout
from ..sampler_correction import importance_correction, logp_difference
from ..segmentation import is_uncertain
from ..segments import Segments
from ..token_mask import largest_share
from ..token_rewards import kl_estimate, outcome_token_rewards


GATED = "critic/gated"
"""The metric of [`gated`]: 1 while the gate on the critic is closed."""


def last_edges(forward: PolicyForward, mask: torch.Tensor, given: GivenRollout) -> tuple[torch.Tensor, PolicyForward]:
    """
    The last edge of each path of a tree, which alone is trained on.

    Args:
        forward ([`PolicyForward`]): of the policy now.
        mask (`torch.Tensor`): bool `(B, T)`, all tokens of the paths.
        given ([`GivenRollout`]): the paths.

    Returns:
        `tuple`: bool `(B, T)`; and the forward with the log-probabilities of when the edges were sampled.
    """
    position = torch.arange(mask.size(1), device=mask.device)
    mask = mask & (position >= given.tensors["edge_start"].unsqueeze(1))
    old_logps = given.tensors["old_logps"][:, : mask.size(1)]
    old_logps = torch.nn.functional.pad(old_logps, (0, mask.size(1) - old_logps.size(1)))
    return mask, replace(forward, logps=torch.where(mask, old_logps, forward.logps))


def mean_root_value(given: GivenRollout, processes: Processes) -> float:
    """The mean reward below the roots of all processes' trees; roots without any reward do not count."""
    roots = given.tensors["root_values"]
    total = processes.sum(torch.stack([roots.nansum(), (~roots.isnan()).sum().to(roots.dtype)]))
    return float(total[0] / total[1])


def sampler_correction(
    forward: PolicyForward, batch: RolloutBatch, mask: torch.Tensor, args: SAPOConfig
) -> tuple[torch.Tensor | None, Measurements]:
    """
    The correction for an engine that samples from a distribution other than the policy's.

    Args:
        forward ([`PolicyForward`]): of the policy.
        batch (`RolloutBatch`): the rollout, with `sampling_per_token_logps` if the engine reported them.
        mask (`torch.Tensor`): bool `(B, T)`, the tokens that count.
        args ([`SAPOConfig`]): settings of the run.

    Returns:
        `tuple`: float32 `(B, T)` or `(B, 1)`, TRL's own where TRL has corrected, `None` without any; and metrics.
    """
    sampling_logps = batch.get("sampling_per_token_logps")
    if sampling_logps is None or args.use_vllm:  # with vLLM, TRL logs and corrects
        return batch.get("importance_sampling_ratio"), {}
    metrics: Measurements = {
        "sampling/sampling_logp_difference/mean": logp_difference(forward.logps, sampling_logps, mask)
    }
    if not args.vllm_importance_sampling_correction:
        return batch.get("importance_sampling_ratio"), metrics
    ratio = importance_correction(
        forward.logps,
        sampling_logps,
        mask,
        args.vllm_importance_sampling_mode,
        args.vllm_importance_sampling_clip_min,
        args.vllm_importance_sampling_clip_max,
    )
    return ratio, metrics


def sampler_difference(
    forward: PolicyForward, sampling_logps: torch.Tensor, mask: torch.Tensor, processes: Processes
) -> float:
    """Mean absolute difference between the policy's and the sampler's log-probabilities, over all processes."""
    total, count = logp_difference(forward.logps, sampling_logps, mask)
    total, count = processes.sum(torch.stack([total, count.to(total.dtype)])).tolist()
    return total / max(count, 1)


def learned_tokens(
    forward: PolicyForward,
    dependency: torch.Tensor | None,
    segments: Segments,
    args: SAPOConfig,
    processes: Processes,
) -> tuple[torch.Tensor, Measurements]:
    """bool `(B, T)`: the tokens that the policy learns from, which pass every mask of the settings."""
    chosen = mask = segments.mask
    if args.confident_token_threshold is not None:
        chosen = chosen & is_uncertain(forward.logps, args.confident_token_threshold)
    if args.entropy_token_share is not None and args.entropy_token_scope == "response":
        chosen = chosen & largest_share(forward.entropies, mask, args.entropy_token_share)
    elif args.entropy_token_share is not None:
        entropies, everyone = processes.gather_padded(forward.entropies), processes.gather_padded(mask.int()).bool()
        uncertain = largest_share(entropies.view(1, -1), everyone.view(1, -1), args.entropy_token_share)
        chosen = chosen & processes.own_rows(uncertain.view_as(everyone), len(mask))[:, : mask.size(1)]
    if args.visual_token_share is not None:
        # Equal numbers tell no tokens apart: a response that depends on no image, or has none, keeps its tokens.
        depends = (dependency > 0).any(dim=1, keepdim=True)
        chosen = chosen & (largest_share(dependency, mask, args.visual_token_share) | ~depends)
    return chosen, {"policy_mask/share": (chosen.sum(), mask.sum())} if args.masks_tokens else {}


def placed_rewards(
    record: RolloutRecord,
    batch: RolloutBatch,
    mask: torch.Tensor,
    weights: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> torch.Tensor:
    """
    The rewards, placed on tokens: a span's reward on its last token, all other rewards on the response's last token.

    Args:
        record ([`RolloutRecord`]): its rewards.
        batch (`RolloutBatch`): the rollout, with its `rewards`.
        mask (`torch.Tensor`): bool `(B, T)`, the tokens that the policy learns from.
        weights (`torch.Tensor`): float32 `(F,)`, of the reward functions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the completions.

    Returns:
        `torch.Tensor`: float32 `(B, T)`, 0 outside the mask.
    """
    if not record.has_steps:
        return outcome_token_rewards(batch["rewards"], mask)
    token_rewards = outcome_token_rewards(record.final_rewards, mask)
    prompts = zip(batch["prompt_ids"].tolist(), batch["prompt_mask"].tolist(), strict=True)
    prompt_ids = [list(compress(ids, kept)) for ids, kept in prompts]
    places = record.steps.placed(tokenizer, prompt_ids, mask.tolist())
    if not places:
        return token_rewards
    columns = zip(*places, strict=True)
    rows, positions, functions, rewards = (torch.tensor(column, device=mask.device) for column in columns)
    rewards = rewards.to(token_rewards.dtype) * weights.to(mask.device)[functions]
    return token_rewards.index_put((rows, positions), rewards, accumulate=True)


def rewards_of_tokens(
    forward: PolicyForward, batch: RolloutBatch, mask: torch.Tensor, args: SAPOConfig
) -> tuple[torch.Tensor, Measurements]:
    """float32 `(B, T)`: the rewards, placed on tokens, minus the KL penalty if it is part of the reward."""
    token_rewards = batch["token_rewards"]
    if "ref_per_token_logps" not in batch:
        return token_rewards, {}
    kl = torch.where(mask, kl_estimate(forward.logps, batch["ref_per_token_logps"], args.kl_estimator), 0)
    # TRL's losses log it themselves.
    metrics: Measurements = {} if args.loss_type in TRL_LOSS_TYPES else {"kl": (kl.sum(), mask.sum())}
    return (token_rewards - args.beta * kl if args.kl_placement == "reward" else token_rewards), metrics


def advantages_and_returns(
    token_rewards: torch.Tensor,
    values: torch.Tensor,
    segments: Segments,
    batch: RolloutBatch,
    args: SAPOConfig,
    generations: int,
    processes: Processes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`SAPOTrainer.estimate_advantages`]; `generations` are the responses to each prompt."""
    if args.advantage_estimator == "gae":
        lam = args.lam
        if args.length_adaptive_lam is not None:
            lam = length_adaptive_lam(segments, args.length_adaptive_lam, args.length_adaptive_lam_rule)
        return segment_gae(token_rewards, values, segments, args.gamma, lam, args.value_state, args.critic_lam)
    # A response without tokens to learn from (truncated and masked, or unscored: NaN) keeps its reward.
    outcomes = torch.where(segments.count > 0, token_rewards.sum(dim=1), batch["rewards"])
    if args.advantage_estimator == "group":
        advantages = batch["advantages"]
    elif args.advantage_estimator == "leave_one_out":
        everyone = leave_one_out_advantages(processes.gather(outcomes), generations)
        advantages = processes.own_rows(everyone, len(outcomes))
    else:
        advantages = masked_whiten(outcomes, ~outcomes.isnan(), processes.sum)
    return tuple(torch.where(segments.mask, row.unsqueeze(1), 0) for row in (advantages, outcomes))


def gated(
    advantages: torch.Tensor,
    token_rewards: torch.Tensor,
    values: torch.Tensor,
    segments: Segments,
    args: SAPOConfig,
    processes: Processes,
) -> tuple[torch.Tensor, Measurements]:
    """
    The gate on the critic: advantages without it as long as it explains too little of the rollout's returns.

    The values were estimated before the critic learns from this rollout, so the measurement is out of sample. It is
    taken over the rollout of all processes, which therefore all decide alike.

    Args:
        advantages (`torch.Tensor`): float32 `(B, T)`, computed with the critic's values.
        token_rewards (`torch.Tensor`): float32 `(B, T)`.
        values (`torch.Tensor`): float32 `(B, T)`, the critic's.
        segments ([`Segments`]): the partition.
        args ([`SAPOConfig`]): settings of the run; without `critic_min_explained_variance` nothing changes.
        processes ([`~sapo_trl.distributed.Processes`]): of the run.

    Returns:
        `tuple`: float32 `(B, T)`, of [`~sapo_trl.advantages.mean_baseline_advantages`] where the gate is closed; and
        metrics.
    """
    if args.critic_min_explained_variance is None:
        return advantages, {}
    fallback, returns = mean_baseline_advantages(token_rewards, segments, args.gamma, processes.sum)
    explained = explained_variance(values, returns, segments.state_mask(args.value_state), processes.sum)
    # Returns that do not vary (NaN) leave nothing to explain: the critic has nothing to tell responses apart by.
    is_trusted = explained >= args.critic_min_explained_variance
    metrics: Measurements = {
        GATED: ((~is_trusted).float(), 1.0),
        "critic/monte_carlo_explained_variance": (explained, 1.0),
    }
    return torch.where(is_trusted, advantages, fallback.to(advantages.dtype)), metrics


def lacks_differences(rewards: torch.Tensor) -> bool:
    """Whether two or more rewards of a rollout `(N,)` are there, and all are equal; NaN is a missing one."""
    known = rewards[~rewards.isnan()]
    return len(known) > 1 and bool(known.amax() == known.amin())


def normalized(
    advantages: torch.Tensor, policy_mask: torch.Tensor, record: RolloutRecord, args: SAPOConfig, processes: Processes
) -> tuple[torch.Tensor, Measurements]:
    """
    float32 `(B, T)`: whitened and clamped, as the loss uses them; 0 where the policy does not learn.

    If the rewards of all processes are equal, nothing tells good tokens from bad ones but the critic, whose errors
    whitening would scale to size 1: with a constant critic, the distance of a token to the end. An optimizer like Adam
    scales small gradients as well. So the advantages are 0. Sampled values are measurements: they differ where states
    do, also in a rollout of equal rewards. And rewards of steps tell tokens apart, although their sums may be equal.
    """
    advantages = torch.where(policy_mask, advantages, 0)
    metrics: Measurements = {"advantages/raw_mean": (advantages.sum(), policy_mask.sum())}
    if args.whiten_advantages:
        advantages = masked_whiten(advantages, policy_mask, processes.sum)
    if args.whiten_advantages and args.critic not in ("monte_carlo", "tree"):
        is_empty = lacks_differences(record.rewards) and not processes.max(int(record.has_steps))
        advantages = torch.zeros_like(advantages) if is_empty else advantages
        metrics["advantages/zeroed"] = (torch.tensor(float(is_empty)), 1.0)
    if args.advantage_clamp is not None:
        advantages = advantages.clamp(-args.advantage_clamp, args.advantage_clamp)
    return advantages, metrics


def measured(
    rollout: SegmentedRollout, policy_mask: torch.Tensor, args: SAPOConfig, processes: Processes
) -> Measurements:
    """Measurements of a rollout's advantages, returns and values."""
    states = rollout.segments.state_mask(args.value_state)
    values, returns = rollout.values, rollout.returns
    metrics: Measurements = {
        "advantages/abs_mean": (rollout.advantages.abs().sum(), policy_mask.sum()),
        "returns/mean": (torch.where(states, returns, 0).sum(), states.sum()),
    }
    if args.learns_critic:
        metrics["critic/mean_value"] = (torch.where(states, values, 0).sum(), states.sum())
        metrics["critic/explained_variance"] = (explained_variance(values, returns, states, processes.sum), 1.0)
    return metrics


def training_columns(rollout: SegmentedRollout, args: SAPOConfig, processes: Processes) -> RolloutBatch:
    """The columns that the losses read besides TRL's, of a rollout."""
    policy_mask, columns = rollout.policy_mask, {}
    if args.masks_tokens and args.loss_type in TRL_LOSS_TYPES:
        # TRL multiplies its mask by this one, and divides by a number of tokens that it has counted before.
        columns = {"tool_mask": policy_mask.long(), "num_items_in_batch": processes.sum(policy_mask.sum())}
    return {
        **columns,
        "advantages": rollout.advantages,
        "returns": rollout.returns,
        "old_values": rollout.values,
        "segment_ids": rollout.segments.ids,
        # On the host: a micro-batch that had to ask the device for its largest would wait for it.
        "segment_counts": rollout.segments.count.tolist(),
        "policy_mask": policy_mask,
        # TRL shuffles: with these, callbacks know the rows of micro-batches again.
        "rollout_rows": torch.arange(len(rollout.rewards), device=rollout.rewards.device),
    }
