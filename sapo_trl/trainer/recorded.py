"""Parts of a rollout that only its callbacks and recordings read: no loss needs them."""

from __future__ import annotations

from typing import Any

import torch

from ..advantages import td_errors
from ..config import SAPOConfig
from ..data.columns import row_answer, row_images
from ..metrics import Measurements
from ..rollouts.types import RewardParts, RolloutRecord
from ..segments import Segments
from .stages import GATED


def used_values(
    token_rewards: torch.Tensor, values: torch.Tensor, segments: Segments, args: SAPOConfig, gate: Measurements
) -> dict[str, torch.Tensor]:
    """
    The values that the advantages are computed from, and the TD errors between them.

    Args:
        token_rewards (`torch.Tensor`): float32 `(B, T)`.
        values (`torch.Tensor`): float32 `(B, T)`.
        segments ([`Segments`]): the partition.
        args ([`SAPOConfig`]): settings of the run.
        gate (`Measurements`): the metrics of [`~sapo_trl.trainer.stages.gated`].

    Returns:
        `dict[str, torch.Tensor]`: `value_states`, bool `(B, T)`, the tokens before which a value is used, and
        `td_errors`, float32 `(B, T)`, each segment's on all of its tokens. Without values the dictionary is empty.
    """
    if args.advantage_estimator != "gae" or args.critic == "none":
        return {}
    deltas = td_errors(token_rewards, values, segments, args.gamma, args.value_state)
    # Behind a closed gate the advantages come from the mean return.
    is_used = gate[GATED][0] == 0 if GATED in gate else torch.ones((), dtype=torch.bool)
    is_used = is_used.to(values.device)
    return {
        "value_states": segments.state_mask(args.value_state) & is_used,
        "td_errors": torch.where(is_used, segments.expand(deltas), torch.nan),
    }


def parts_of_rewards(record: RolloutRecord, names: list[str], weights: torch.Tensor) -> RewardParts | None:
    """The reward functions, and their rewards of this process's responses."""
    rewards = record.rewards_per_func if record.given is None else record.given.rewards_per_func
    return None if rewards is None else RewardParts(names, weights.tolist(), rewards)


def images_of(inputs: list[dict[str, Any]]) -> list[list[Any]] | None:
    """The images of each row of a data set; `None` if there are none."""
    images = [row_images(row) for row in inputs]
    return images if any(images) else None


def answers_of(inputs: list[dict[str, Any]]) -> list[Any]:
    """The right answer of each row of a data set; `None` for a row without any."""
    return [row_answer(row) for row in inputs]
