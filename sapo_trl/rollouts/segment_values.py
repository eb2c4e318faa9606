"""Monte-Carlo values at the starts of segments (VinePPO, SPO-chain)."""

from __future__ import annotations

import torch

from ..advantages import discounted_suffix_sum
from ..segments import Segments
from .continuations import ContinuationSampler, StateValues


def monte_carlo_values(
    sampler: ContinuationSampler,
    segments: Segments,
    policy_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    token_rewards: torch.Tensor,
    num_continuations: int,
    max_valued_segments: int | None = None,
    truncated_reward: float | None = None,
) -> tuple[torch.Tensor, StateValues]:
    """
    Value the states that the advantages of learned tokens depend on.

    A state gets the response's own rewards from there on if it lies beyond `max_valued_segments`, or if none of its
    continuations was scored. Then nothing is gained or lost from there on.

    Args:
        sampler ([`ContinuationSampler`]): over this rollout's prompts.
        segments ([`Segments`]): partition of the `(B, T)` tokens.
        policy_mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens that the policy learns from.
        completion_ids (`torch.Tensor`): int64 tensor of shape `(B, T)`.
        token_rewards (`torch.Tensor`): float tensor of shape `(B, T)`: the rewards, placed on their tokens.
        num_continuations (`int`): continuations of each state.
        max_valued_segments (`int`, *optional*): number of states to value in each response, besides the prompt's.
        truncated_reward (`float`, *optional*): reward of a continuation that did not end.

    Returns:
        `tuple[torch.Tensor, StateValues]`:
            values in the dtype of `token_rewards`, `(B, T)`, on the first token of each valued segment and 0
            elsewhere; and the sampler's result.
    """
    # States before the first segment with a token to learn need no value.
    beyond = torch.iinfo(segments.ids.dtype).max
    first_learned = torch.where(policy_mask, segments.ids, beyond).amin(dim=1, keepdim=True)
    states = segments.is_first & (segments.ids >= first_learned)
    valued = states
    if max_valued_segments is not None:
        valued = states & (segments.ids <= max_valued_segments)
    sampled = sampler.values_at(valued, completion_ids, num_continuations, truncated_reward)
    values = torch.where(states, discounted_suffix_sum(token_rewards, 1.0), 0)
    estimates = sampled.values.to(values)
    values[valued] = torch.where(estimates.isnan(), values[valued], estimates)
    return values, sampled
