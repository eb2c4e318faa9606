"""What values the settings of [`SAPOConfig`] may have, alone and together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from transformers import SchedulerType

from .losses import AGGREGATIONS, RATIO_REDUCTIONS
from .segmentation import check_top_percent
from .token_rewards import KL_ESTIMATORS


if TYPE_CHECKING:
    from .config import SAPOConfig


SEGMENT_LOSS_TYPES = ("segment_clip", "soft_adaptive_gate")
"""Losses of this package, of any segmentation."""

TRL_LOSS_TYPES = ("grpo", "dr_grpo", "bnpo", "dapo", "cispo", "luspo", "vespo")
"""Losses of [`~trl.GRPOTrainer`], computed by its own code."""

LEARNED_CRITICS = ("separate", "shared", "adapter")
"""Values of `critic` with a model that is trained."""

CHOICES = {
    "segmentation": ("entropy", "probability", "cutpoints", "newline", "step", "token", "sequence"),
    "segment_cut": ("end", "start"),
    "value_state": ("start", "end"),
    "critic": (*LEARNED_CRITICS, "monte_carlo", "tree", "none"),
    "advantage_estimator": ("gae", "group", "leave_one_out", "batch"),
    "advantage_weighting": ("none", "role_aware"),
    "kl_placement": ("reward", "loss"),
    "kl_estimator": KL_ESTIMATORS,
    "importance_sampling_level": ("segment", "token", "sequence"),
    "ratio_reduction": RATIO_REDUCTIONS,
    "loss_aggregation": AGGREGATIONS,
    "kl_aggregation": (None, *AGGREGATIONS),
    "value_loss_aggregation": AGGREGATIONS,
}

# GRPO settings that have no meaning in this package's losses, with the only value they may have there.
_SETTINGS_OF_TRL_LOSSES = {
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_adaptive_entropy": False,
}

# Settings of this package's losses that have no meaning in TRL's, with the only value they may have there.
_SETTINGS_OF_SEGMENT_LOSSES = {
    "confident_token_threshold": None,
    "positive_lm_coef": 0.0,
    "ratio_reduction": "mean",
    "loss_aggregation": "token-mean",
    "kl_aggregation": None,
}

# Schedules that follow a metric, which the critic's schedule is not given.
_METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


def check_config(args: SAPOConfig) -> None:
    """
    Check settings before they are used.

    Args:
        args ([`SAPOConfig`]): the settings.

    Raises:
        ValueError: for a value that is not allowed, or for settings that contradict each other; the message names the
            setting, its value and what would be right.
    """
    _check_choices(args)
    _check_ranges(args)
    _check_combinations(args)


def _check_choices(args: SAPOConfig) -> None:
    if args.loss_type not in (*SEGMENT_LOSS_TYPES, *TRL_LOSS_TYPES):
        hint = ""
        if args.loss_type == "sapo":
            hint = (
                ' In TRL, "sapo" is Qwen\'s Soft Adaptive Policy Optimization (arXiv 2511.20347): set '
                '"soft_adaptive_gate" for its gate. This is Segment-Aligned Policy Optimization (arXiv 2605.01327).'
            )
        raise ValueError(
            f"`loss_type` must be one of {(*SEGMENT_LOSS_TYPES, *TRL_LOSS_TYPES)}, got {args.loss_type!r}.{hint}"
        )
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {getattr(args, name)!r}.")
    schedules = [schedule.value for schedule in SchedulerType if schedule.value not in _METRIC_SCHEDULES]
    schedule = args.critic_lr_scheduler_type or args.lr_scheduler_type
    if args.learns_critic and schedule not in schedules:
        raise ValueError(
            f"`critic_lr_scheduler_type` (by default `lr_scheduler_type`) must be one of {schedules}, got "
            f"{str(schedule)!r}."
        )


def _check_ranges(args: SAPOConfig) -> None:
    check_top_percent(args.top_percent)
    for name in ("gamma", "lam", "critic_lam", "role_mask_ratio"):
        value = getattr(args, name)
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")
    for name in (
        "critic_learning_rate",
        "critic_warmup_steps",
        "critic_warmup_tolerance",
        "critic_lr_warmup_steps",
        "critic_weight_decay",
        "beta",
        "epsilon",
        "epsilon_high",
        "max_valued_segments",
        "positive_lm_coef",
    ):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")
    for name in (
        "cliprange_value",
        "advantage_clamp",
        "length_adaptive_lam",
        "role_temperature",
        "role_clip",
        "sapo_temperature_pos",
        "sapo_temperature_neg",
        "reward_timeout",
        "max_sampler_logp_difference",
    ):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"`{name}` must be positive (or `None`), got {value}.")
    for name in ("cutpoint_threshold", "confident_token_threshold"):
        value = getattr(args, name)
        if value is not None and not 0.0 < value <= 1.0:
            raise ValueError(f"`{name}` is a probability: it must lie in (0, 1], got {value}.")
    if args.critic_max_grad_norm is None or args.critic_max_grad_norm <= 0:
        raise ValueError(
            f"`critic_max_grad_norm` must be positive, got {args.critic_max_grad_norm}; `math.inf` clips nothing."
        )
    for name in (
        "num_cuts",
        "cutpoint_interval",
        "num_continuations",
        "continuation_batch_size",
        "tree_segment_length",
        "tree_edges_per_prompt",
        "tree_replay_age",
        "max_skipped_steps",
        "num_mini_batches",
        "num_generations",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if args.truncated_continuation_reward is not None and not math.isfinite(args.truncated_continuation_reward):
        raise ValueError(
            f"`truncated_continuation_reward` must be finite (or `None`), got {args.truncated_continuation_reward}."
        )
    if not args.tree_widths or min(args.tree_widths) < 1:
        raise ValueError(
            f"`tree_widths` must be a list of numbers of children, each at least 1, got {args.tree_widths}."
        )
    if args.delta is not None and args.delta <= 1.0:
        raise ValueError(f"`delta` must be greater than 1 (or `None`), got {args.delta}.")


def _check_combinations(args: SAPOConfig) -> None:
    """Raise a `ValueError` for settings that contradict each other or would have no effect."""
    if args.loss_type in TRL_LOSS_TYPES:
        if args.importance_sampling_level == "segment":
            raise ValueError(
                f"`loss_type={args.loss_type!r}` is TRL's and knows no segments: `importance_sampling_level` must "
                'be "token" or "sequence", got "segment".'
            )
        if args.beta != 0.0 and (args.kl_placement, args.kl_estimator) != ("loss", "k3"):
            raise ValueError(
                f"`loss_type={args.loss_type!r}` is TRL's, which has the KL penalty as k3 in the loss: set "
                '`kl_placement="loss"` and `kl_estimator="k3"`, or `beta=0`; got '
                f"kl_placement={args.kl_placement!r}, kl_estimator={args.kl_estimator!r}, beta={args.beta}."
            )
        _check_unused(args, _SETTINGS_OF_SEGMENT_LOSSES)
    else:
        _check_unused(args, _SETTINGS_OF_TRL_LOSSES)
    if args.enable_jit_checkpoint:
        raise ValueError(
            "`enable_jit_checkpoint=True` may save between the critic's update and the policy's: it must be False. "
            "`sapo_trl.StopOnSignal`, which `sapo-trl train` installs, saves after the step."
        )
    if args.advantage_estimator != "group":
        _check_unused(args, {"multi_objective_aggregation": "sum_then_normalize"})
    if args.advantage_estimator != "gae":
        if args.critic != "none":
            raise ValueError(
                f"`advantage_estimator={args.advantage_estimator!r}` reads no values: set "
                f'`critic="none"`, got {args.critic!r}.'
            )
        if args.advantage_estimator != "batch" and args.num_generations < 2:
            raise ValueError(
                f"`advantage_estimator={args.advantage_estimator!r}` compares the responses to a prompt: "
                f"`num_generations` must be at least 2, got {args.num_generations}."
            )
    if args.advantage_estimator == "group" and args.kl_placement == "reward" and args.beta != 0.0:
        raise ValueError(
            '`advantage_estimator="group"` is computed from the rewards alone: `kl_placement="reward"` would have '
            f'no effect (beta={args.beta}). Set `kl_placement="loss"`, or `beta=0`.'
        )
    if args.critic == "tree":
        if args.mask_truncated_completions:
            raise ValueError(
                '`mask_truncated_completions=True` would drop all inner edges of `critic="tree"`, which end in '
                "the middle of a response: it must be False."
            )
        if args.kl_placement == "reward" and args.beta != 0.0:
            raise ValueError(
                '`critic="tree"` values its edges by the outcomes below them: the KL penalty can only go into the '
                f'loss. Set `kl_placement="loss"` (and `kl_estimator="k3"`), or `beta=0`; got beta={args.beta}.'
            )
        if args.segmentation != "sequence":
            raise ValueError(
                '`critic="tree"` knows the values of an edge\'s two ends alone: `segmentation` must be "sequence", so '
                f"that each edge is one segment, got {args.segmentation!r}."
            )
        if args.use_vllm and args.vllm_importance_sampling_correction:
            raise ValueError(
                '`critic="tree"` trains on edges of earlier rollouts too, for which there are no log-probabilities of '
                "the sampler: set `vllm_importance_sampling_correction=False`."
            )
    if args.critic in ("monte_carlo", "tree"):
        if args.value_state == "end":
            raise ValueError(f'`critic={args.critic!r}` values the start of segments: `value_state` must be "start".')
        if args.gamma != 1.0:
            raise ValueError(
                f"`critic={args.critic!r}` values states by rewards that are not discounted: `gamma` must be 1, got "
                f"{args.gamma}."
            )
    if args.max_completion_length is None:
        for name, value in (
            ("critic", args.critic),
            ("loss_aggregation", args.loss_aggregation),
            ("kl_aggregation", args.kl_aggregation),
        ):
            if value in ("monte_carlo", "tree", "seq-mean-token-sum-norm"):
                raise ValueError(f"`{name}={value!r}` needs a `max_completion_length`, got None.")
    if args.kl_aggregation is not None and args.kl_placement == "reward":
        raise ValueError(
            f"`kl_aggregation={args.kl_aggregation!r}` averages the KL term of the loss, but `kl_placement` is "
            '"reward": it must be "loss".'
        )
    if not args.learns_critic and args.critic_warmup_steps > 0:
        raise ValueError(
            f"`critic_warmup_steps={args.critic_warmup_steps}` with `critic={args.critic!r}` would train nothing: "
            "it must be 0."
        )
    if args.critic_warmup_tolerance is not None and args.critic_warmup_steps == 0:
        raise ValueError(
            f"`critic_warmup_tolerance={args.critic_warmup_tolerance}` ends a warm-up early, but "
            "`critic_warmup_steps`, its longest duration, is 0."
        )
    if args.kl_placement == "loss" and args.kl_estimator == "k1" and args.beta != 0.0:
        raise ValueError(
            '`kl_estimator="k1"` has zero expected gradient in the loss: use "k2" or "k3", or `kl_placement="reward"`.'
        )


def _check_unused(args: SAPOConfig, settings: dict[str, object]) -> None:
    for name, only in settings.items():
        if getattr(args, name) != only:
            raise ValueError(
                f"`{name}` has no meaning with `loss_type={args.loss_type!r}` and "
                f"`advantage_estimator={args.advantage_estimator!r}`: it must stay {only!r}, got "
                f"{getattr(args, name)!r}."
            )
