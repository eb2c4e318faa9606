"""
Every algorithm of the comparison as data: the settings in which it differs from [`SAPOConfig`]'s defaults.

`docs/algorithms.md` shows them as one table and names the source of each number; `trainer_configs/algorithms/` has
them as YAML. Both are written from this file, see `docs/generate/preset_table.py`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .names import nearest_name


AXES: dict[str, tuple[str, ...]] = {
    "Segmentation": ("segmentation",),
    "Value estimate": (
        "critic",
        "critic_layers",
        "critic_width",
        "critic_reads",
        "value_state",
        "cliprange_value",
        "value_loss_aggregation",
        "critic_lam",
        "critic_warmup_steps",
        "critic_warmup_tolerance",
        "critic_learning_rate",
        "critic_updates_per_step",
        "freeze_critic_attention",
        "value_range",
        "max_valued_segments",
        "truncated_continuation_reward",
    ),
    "Advantage": (
        "advantage_estimator",
        "lam",
        "length_adaptive_lam",
        "length_adaptive_lam_rule",
        "whiten_advantages",
        "advantage_clamp",
        "scale_rewards",
        "advantage_weighting",
        "response_weighting",
        "image_corruption",
        "image_corruption_share",
    ),
    "Ratio": ("importance_sampling_level", "ratio_reduction"),
    "Clip and loss": (
        "loss_type",
        "epsilon",
        "epsilon_high",
        "delta",
        "loss_aggregation",
        "confident_token_threshold",
        "entropy_token_share",
        "entropy_token_scope",
        "visual_token_share",
        "entropy_penalty_coef",
        "perception_kl_coef",
        "perception_kl_gradient",
        "corrupted_entropy_penalty_coef",
        "positive_lm_coef",
    ),
    "KL": ("beta", "kl_placement", "kl_estimator", "kl_aggregation", "use_bias_correction_kl"),
    "Rollouts": ("num_generations",),
}
"""The axes on which algorithms differ, with their settings: every setting of a preset is in exactly one axis."""

RUN_SETTINGS = frozenset({"critic_learning_rate"})
"""Settings of a run, to which a recipe may give a value. They depend on the model: all other presets leave them."""


@dataclass(frozen=True)
class Preset:
    """
    A named algorithm.

    Args:
        summary (`str`): the algorithm in one line.
        source (`str`): paper or code that it comes from.
        settings (`dict[str, Any]`): settings of [`SAPOConfig`] that differ from its defaults.
    """

    summary: str
    source: str
    settings: dict[str, Any] = field(default_factory=dict)


def _derived(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**base, **changes}


# With `epsilon_high=None` the clip is symmetric for every value of `epsilon`.

# The paper's equations and its Table 7, without the official script's additions.
_SAPO = {
    "value_state": "start",
    "whiten_advantages": False,
    "advantage_clamp": None,
    "epsilon_high": None,
    "delta": None,
    "cliprange_value": None,
    "loss_aggregation": "seq-mean-token-mean",
    "value_loss_aggregation": "seq-mean-token-mean",
}

# Table 7(d) except for λ; where it gives no value, verl 0.4.1's defaults.
_PPO = {
    "segmentation": "token",
    "importance_sampling_level": "token",
    "advantage_clamp": None,
    "epsilon_high": None,
}

# No critic; several responses to a prompt are compared with each other.
_GROUP = {
    "segmentation": "sequence",
    "critic": "none",
    "whiten_advantages": False,
    "advantage_clamp": None,
    "epsilon_high": None,
    "delta": None,
    "num_generations": 8,
}

# Table 7(b).
_GRPO = {
    **_GROUP,
    "advantage_estimator": "group",
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "kl_placement": "loss",
    "kl_estimator": "k3",
    "use_bias_correction_kl": False,
    "beta": 0.01,
}

# DAPO's loss: a higher upper clip, a mean over tokens, no KL. Its sampling of further prompts is not part of it.
_DAPO = {
    **_GROUP,
    "advantage_estimator": "group",
    "importance_sampling_level": "token",
    "epsilon_high": 0.28,
    "beta": 0.0,
}

# Shared by VinePPO and SPO: one-step differences of sampled values, PPO's token ratio, a small KL loss.
_SAMPLED_VALUES = {
    "importance_sampling_level": "token",
    "lam": 0.0,
    "advantage_clamp": None,
    "epsilon_high": None,
    "delta": None,
    "kl_placement": "loss",
    "kl_estimator": "k3",
    "kl_aggregation": "seq-mean-token-sum",
    "use_bias_correction_kl": False,
    "beta": 1e-4,
    "num_generations": 8,
}

# One response for each prompt, values per token, Monte-Carlo targets, no KL, no whitening.
_SINGLE_ROLLOUT = {
    "segmentation": "token",
    "importance_sampling_level": "token",
    "critic_lam": 1.0,
    "critic_learning_rate": 5e-6,
    "whiten_advantages": False,
    "advantage_clamp": None,
    "delta": None,
    "beta": 0.0,
}

_SAPO_PAPER = "arXiv 2605.01327"
_SPO_PAPER = "arXiv 2505.23564"

PRESETS = MappingProxyType(
    {
        "sapo": Preset("The paper to the letter: its equations and its Table 7", _SAPO_PAPER, _SAPO),
        "sapo_official": Preset(
            "The official script: value before a segment's last token, whitening, clamp, dual clip, value clip",
            "its code",
            {"value_state": "end"},
        ),
        "sapo_naive_is": Preset(
            "Ablation: segment advantages with token ratios",
            f"{_SAPO_PAPER}, Table 2",
            _derived(_SAPO, importance_sampling_level="token"),
        ),
        "sapo_newline": Preset(
            "Ablation: segments are lines", f"{_SAPO_PAPER}, Table 3", _derived(_SAPO, segmentation="newline")
        ),
        "sapo_step": Preset(
            'Ablation: segments are announced steps ("Step 1:" …)',
            f"{_SAPO_PAPER}, Table 3",
            _derived(_SAPO, segmentation="step"),
        ),
        "sapo_prob": Preset(
            "Ablation: cuts at a fixed number of least probable tokens",
            f"{_SAPO_PAPER}, Table 6",
            _derived(_SAPO, segmentation="probability"),
        ),
        "ppo": Preset(
            "PPO per token, as the paper's baseline", f"{_SAPO_PAPER}, Table 7(d)", _derived(_PPO, lam=0.95)
        ),
        "ppo_long_horizon": Preset(
            "PPO per token with SAPO's λ: is it the horizon?", "control", _derived(_PPO, lam=0.99)
        ),
        "ppo_full_horizon": Preset(
            "PPO per token with λ = 1: the horizon's limit", "control", _derived(_PPO, lam=1.0)
        ),
        "vc_ppo": Preset(
            "PPO with value pretraining until the value loss settles, and decoupled λ",
            f"arXiv 2503.01491; {_SAPO_PAPER}, Table 7(c)",
            _derived(_PPO, lam=0.99, critic_lam=1.0, critic_warmup_steps=50, critic_warmup_tolerance=0.02),
        ),
        "vapo": Preset(
            "VC-PPO with length-adaptive λ, higher upper clip, LM loss on correct responses, groups",
            "arXiv 2504.05118",
            _derived(
                _PPO,
                length_adaptive_lam=0.05,
                critic_lam=1.0,
                critic_warmup_steps=50,
                epsilon_high=0.28,
                delta=None,
                positive_lm_coef=0.1,
                beta=0.0,
                num_generations=16,
            ),
        ),
        "sao": Preset(
            "One response per prompt: double-sided mask, length-adaptive λ, two critic updates, frozen attention",
            "arXiv 2607.07508, from notes and ports of it",
            _derived(
                _SINGLE_ROLLOUT,
                loss_type="double_sided_mask",
                epsilon=0.3,
                epsilon_high=5.0,
                length_adaptive_lam=1.5,
                cliprange_value=None,
                critic_updates_per_step=2,
                freeze_critic_attention=True,
                critic_warmup_steps=10,
            ),
        ),
        "bpco": Preset(
            "One response per prompt: bounded values, divergence mask, length-adaptive λ, raw advantages",
            "arXiv 2608.23566, its code",
            _derived(
                _SINGLE_ROLLOUT,
                loss_type="divergence_mask",
                epsilon_high=None,
                loss_aggregation="seq-mean-token-sum",
                length_adaptive_lam=0.4,
                value_range=[0.0, 1.0],
                critic_warmup_steps=60,
            ),
        ),
        "grpo": Preset("Group-relative advantages, TRL's loss", f"arXiv 2402.03300; {_SAPO_PAPER}, Table 7(b)", _GRPO),
        "dr_grpo": Preset(
            "GRPO without its two normalisations",
            "arXiv 2503.20783",
            _derived(_GRPO, loss_type="dr_grpo", scale_rewards="none", beta=0.0),
        ),
        "gspo": Preset(
            "GRPO with one ratio per response",
            "arXiv 2507.18071",
            _derived(_GRPO, importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4, beta=0.0),
        ),
        "entropy_mask": Preset(
            "DAPO's loss on the fifth of the tokens with the highest entropy",
            "arXiv 2506.01939",
            _derived(_DAPO, entropy_token_share=0.2, entropy_token_scope="batch"),
        ),
        "rloo": Preset(
            "Leave-one-out baseline, one ratio per response (the product of its tokens')",
            "arXiv 2402.14740, as trl.RLOOTrainer",
            _derived(
                _GROUP,
                advantage_estimator="leave_one_out",
                importance_sampling_level="sequence",
                ratio_reduction="sum",
                loss_aggregation="seq-mean-token-mean",
                beta=0.05,
            ),
        ),
        "reinforce": Preset(
            "Control: no critic, one response per prompt, the batch's mean as baseline",
            "control",
            {
                "segmentation": "sequence",
                "critic": "none",
                "advantage_estimator": "batch",
                "importance_sampling_level": "token",
                "whiten_advantages": False,
                "advantage_clamp": None,
                "epsilon_high": None,
            },
        ),
        "vineppo": Preset(
            "Monte-Carlo values at the starts of lines",
            "arXiv 2410.01679",
            _derived(_SAMPLED_VALUES, segmentation="newline", critic="monte_carlo", max_valued_segments=25),
        ),
        "spo_chain": Preset(
            "Monte-Carlo values at every fifth cut-point, only uncertain tokens learn",
            _SPO_PAPER,
            _derived(
                _SAMPLED_VALUES,
                segmentation="cutpoints",
                critic="monte_carlo",
                truncated_continuation_reward=0.0,
                confident_token_threshold=0.9,
            ),
        ),
        "spo_tree": Preset(
            "Responses sampled as a 6-6-6 tree whose edges are trained on, with replay",
            _SPO_PAPER,
            _derived(
                _SAMPLED_VALUES,
                segmentation="sequence",
                critic="tree",
                confident_token_threshold=0.9,
                num_generations=32,
            ),
        ),
        "vppo": Preset(
            "DAPO's loss on the tokens that depend most on the picture, more of it for responses that do",
            "arXiv 2510.09285, its code",
            _derived(
                _DAPO,
                delta=3.0,
                visual_token_share=0.4,
                response_weighting="visual_dependency",
                entropy_penalty_coef=0.06,
            ),
        ),
        "papo": Preset(
            "DAPO's loss, and a divergence between the policy with and without the picture that is raised",
            "arXiv 2507.06448, its code",
            _derived(
                _DAPO,
                delta=3.0,
                entropy_penalty_coef=0.03,
                perception_kl_coef=0.01,
                perception_kl_gradient=True,
                corrupted_entropy_penalty_coef=0.03,
                image_corruption_share=0.6,
            ),
        ),
        "srpo": Preset(
            "GRPO with role-aware weights on perception and reasoning tokens",
            "arXiv 2605.07274 (abstract; formulas ours)",
            _derived(_GRPO, advantage_weighting="role_aware", image_corruption_share=0.6),
        ),
    }
)
"""The presets, by name."""

RECIPES = MappingProxyType({"restem": "ReSTEMConfig", "dpop": "DPOPConfig"})
"""Baselines without reinforcement learning, which are not settings of [`SAPOConfig`], with their configurations."""


def preset_settings(preset: str) -> dict[str, Any]:
    """
    Settings of a preset, a new dictionary with each call.

    Args:
        preset (`str`): name of the preset.

    Returns:
        `dict[str, Any]`: settings of [`SAPOConfig`].

    Raises:
        ValueError: if there is no preset of this name.
    """
    if preset in RECIPES:
        raise ValueError(
            f"{preset!r} does no reinforcement learning and is no preset of `SAPOConfig`: use "
            f"`sapo_trl.recipes.{RECIPES[preset]}`."
        )
    if preset not in PRESETS:
        raise ValueError(
            f"There is no preset {preset!r}.{nearest_name(preset, PRESETS)} Presets: {', '.join(PRESETS)}."
        )
    return copy.deepcopy(PRESETS[preset].settings)
