"""Settings of [`SAPOTrainer`]: each with its type, range and default, then the rules for several of them together."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

from transformers import SchedulerType
from trl import GRPOConfig

from .advantages import LengthRule
from .image_corruption import ImageCorruption
from .losses import Aggregation, RatioReduction
from .names import nearest_name
from .presets import AXES, preset_settings
from .role_aware import PERCEPTION_PATTERN, REASONING_PATTERN
from .settings import (
    Bounds,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Share,
    UnitInterval,
    check_setting,
    check_settings,
    help_from_docstring,
)
from .token_mask import TokenScope
from .token_rewards import KLEstimator


SegmentLoss = Literal["segment_clip", "soft_adaptive_gate", "double_sided_mask", "divergence_mask"]
"""Losses of this package, of any segmentation."""

logger = logging.getLogger(__name__)

TRLLoss = Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo", "luspo", "vespo"]
"""Losses of [`~trl.GRPOTrainer`], computed by its own code."""

TRL_LOSS_TYPES = get_args(TRLLoss)

LEARNED_CRITICS = ("separate", "shared", "adapter", "ladder")
"""Values of `critic` with a model that is trained."""

READING_CRITICS = ("shared", "ladder")
"""Values of `critic` with a model that reads the policy's hidden states, in the policy's own forward."""

# A ladder starts from random numbers, and has a width that learns at a larger rate than a whole policy's.
_CRITIC_LEARNING_RATES = {"ladder": 1e-4}
_CRITIC_LEARNING_RATE = 2e-6

# Settings of TRL's, which it does not check.
_TRL_RANGES = {
    "epsilon": NonNegativeFloat,
    "sapo_temperature_pos": PositiveFloat,
    "sapo_temperature_neg": PositiveFloat,
}

# GRPO settings that have no meaning in this package's losses, with the only value they may have there.
_SETTINGS_OF_TRL_LOSSES = {
    "off_policy_mask_threshold": None,
    "use_adaptive_entropy": False,
}

# Settings of this package's losses that have no meaning in TRL's, with the only value they may have there.
_SETTINGS_OF_SEGMENT_LOSSES = {
    "positive_lm_coef": 0.0,
    "entropy_penalty_coef": 0.0,
    "perception_kl_coef": 0.0,
    "ratio_reduction": "mean",
    "loss_aggregation": "token-mean",
    "kl_aggregation": None,
}

# Settings of some critics alone.
_SETTINGS_OF_CRITICS = {"critic_layers": ("ladder",), "critic_width": ("ladder",), "critic_reads": READING_CRITICS}

# Schedules that follow a metric. The critic's schedule gets none.
_METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


class _OneGeneration(int):
    """`1` that passes for enough generations: GRPO needs a group to compare with, a critic does not."""

    def __lt__(self, other: int) -> bool:
        return False if other == 2 else int(self) < other


@help_from_docstring
@dataclass
class SAPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`SAPOTrainer`] (Segment-Aligned Policy Optimization,
    https://huggingface.co/papers/2605.01327).

    Not to be confused with Qwen's *Soft Adaptive* Policy Optimization, which TRL calls `loss_type="sapo"` and whose
    settings start with `sapo_temperature`: those act only with `loss_type="soft_adaptive_gate"`.

    This class includes only the parameters that are specific to SAPO training, and the parameters of
    [`~trl.GRPOConfig`] with another default. Defaults are the paper's (Table 7). Where the paper gives no value, or
    its value is unstable, we use the official script's. The preset `sapo` is the paper to the letter.
    [`SAPOConfig.from_preset`] has every other algorithm of the comparison (PPO, GRPO, VinePPO, SPO, …).

    Parameters:
        > Parameters that control the segmentation

        segmentation (`str`, *optional*, defaults to `"entropy"`):
            Place of the cuts: `entropy`, `probability`, `cutpoints`, `newline`, `step`, `token` or `sequence`.
            `"entropy"`: at the highest-entropy tokens; `"probability"`: at a fixed number of least probable tokens;
            `"cutpoints"`: at every n-th uncertain token, as in SPO-chain; `"newline"`: at the ends of lines; `"step"`:
            at "Step 1:" …; `"token"`: every token is a segment, as in PPO; `"sequence"`: the response is one segment.
            To cut in another way, pass `segmenter` to the trainer.
        top_percent (`float`, *optional*, defaults to `30.0`):
            For `"entropy"`: share of each response's tokens to cut at, in percent, in (0, 100].
        segment_cut (`str`, *optional*, defaults to `"end"`):
            For `"entropy"` and `"probability"`: place of a selected token in its segment, `"end"` or `"start"`.
        num_cuts (`int`, *optional*, defaults to `8`):
            For `"probability"`: number of tokens to cut each response at.
        cutpoint_threshold (`float`, *optional*, defaults to `0.9`):
            For `"cutpoints"`: a token with a smaller probability is a cut-point.
        cutpoint_interval (`int`, *optional*, defaults to `5`):
            For `"cutpoints"`: number of cut-points in a segment.
        step_pattern (`str`, *optional*, defaults to `r"Step\s*\d+\s*[:.]"`):
            For `"step"`: regular expression for the announcement of a step.

        > Parameters that control the critic

        critic (`str`, *optional*, defaults to `"separate"`):
            Source of values: `separate`, `shared`, `adapter`, `ladder`, `monte_carlo`, `tree` or `none`. `"separate"`:
            a backbone of its own, initialised from the policy; `"shared"`: a head on the policy's hidden states,
            through which no gradient reaches the policy; `"adapter"`: a second adapter on the base model that carries
            the policy's (with `peft_config`); `"ladder"`: a small transformer that reads several of the policy's
            hidden states, also without a gradient to the policy; `"monte_carlo"`: no model, but the mean reward
            of fresh continuations from each segment's start (VinePPO, SPO-chain); `"tree"`: responses are sampled as
            a tree, and a node's value comes from its children (SPO-tree); `"none"`: every value is 0.
        critic_layers (`int`, *optional*):
            For `"ladder"`: number of its transformer layers; by default 2 to 4, one for 8 layers of the policy.
        critic_width (`int`, *optional*):
            For `"ladder"`: its width, a multiple of 64; by default a quarter of the policy's width.
        critic_reads (`int`, *optional*):
            For `"ladder"` and `"shared"`: number of the policy's hidden states that the critic reads. They are evenly
            spread from the embeddings to the last hidden state, and normalised. A ladder reads as many as it has
            layers by default. `"shared"` reads by default the last hidden state alone, as it is.
        value_state (`str`, *optional*, defaults to `"start"`):
            State that gives a segment its value: before its first (`"start"`) or its last token (`"end"`). The paper
            has `"start"`, the official code `"end"`.
        critic_initial_value (`str`, *optional*, defaults to `"zero"`):
            Start of a new critic's values: about 0 (`"zero"`), or the first rollout's mean reward (`"reward_mean"`).
            With `"reward_mean"` the critic need not learn this number first, while its errors already move the
            policy. A critic that was saved keeps its values.
        value_range (`list[float]`, *optional*):
            Range of the rewards, `[low, high]`, to bound a learned critic's values to; `None` for no bounds. The
            value is `low + (high - low) * (1/2 + atan(z) / pi)` of the head's output `z` (BPCO).
        critic_updates_per_step (`int`, *optional*, defaults to `1`):
            Updates of the critic for each optimizer step of the policy, on the same micro-batches and targets. With
            DeepSpeed, which has updated the policy by then, a critic that reads the policy's hidden states reads the
            new ones from its second update on.
        freeze_critic_attention (`bool`, *optional*, defaults to `False`):
            For `critic="separate"`: leave the critic's attention layers as they are (SAO).
        critic_learning_rate (`float`, *optional*):
            Initial learning rate of the critic; by default 2e-6, and 1e-4 with `critic="ladder"`.
        critic_lr_scheduler_type (`str`, *optional*):
            Learning rate schedule of the critic; by default `lr_scheduler_type`.
        critic_lr_warmup_steps (`int`, *optional*, defaults to `0`):
            Steps over which the critic's learning rate rises linearly from 0.
        critic_weight_decay (`float`, *optional*):
            Weight decay of the critic; by default `weight_decay`.
        critic_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Norm to which the critic's gradient is clipped. `math.inf` clips nothing.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps at the start of training in which only the critic learns. VC-PPO calls them value
            pretraining.
        critic_warmup_tolerance (`float`, *optional*):
            End the critic's warm-up early, once the value loss falls by less than this share. In detail: the value
            losses of the last three rollouts are compared with the smallest value loss before them. The warm-up ends
            if none of the three is lower by more than this share.
        critic_min_explained_variance (`float`, *optional*):
            Smallest explained variance with which the critic's values enter the advantages; `None` for no gate.
            It is the share of the variance of the rollout's Monte-Carlo returns that the critic's values explain,
            before the critic learns from them. Below it, a segment's advantage is its return minus the mean return of
            the rollout's segments, and the critic goes on learning. `0.0` asks for values that predict better than
            the mean (EVPO).
        cliprange_value (`float`, *optional*, defaults to `0.5`):
            Clip range of the value loss: a value's change since its rollout; `None` for no clipping.
        value_loss_aggregation (`str`, *optional*, defaults to `"token-mean"`):
            How the value losses of segments are averaged. `"token-mean"`: over all segments; `"seq-mean-token-mean"`:
            per response first (the paper's equation).

        > Parameters that control Monte-Carlo values and tree rollouts

        num_continuations (`int`, *optional*, defaults to `9`):
            For `critic="monte_carlo"`: continuations sampled from each valued state.
        continuation_batch_size (`int`, *optional*):
            Continuations that a process generates at a time; by default as many as a rollout has responses. They are
            for Monte-Carlo values and diagnostics. The default is known to fit into memory; more are faster.
        max_valued_segments (`int`, *optional*):
            For `critic="monte_carlo"`: largest number of valued states after the prompt; `None` for no limit.
            Later states have the response's reward as their value. So later tokens get advantage 0.
        truncated_continuation_reward (`float`, *optional*):
            Reward of a continuation or leaf that `max_completion_length` cut off. By default the result of the reward
            functions.
        tree_widths (`list[int]`, *optional*, defaults to `[6, 6, 6]`):
            For `critic="tree"`: children of each node, one number for each level.
        tree_segment_length (`int`, *optional*, defaults to `100`):
            For `critic="tree"`: tokens of an edge. On the last level responses run to their end.
        tree_edges_per_prompt (`int`, *optional*, defaults to `32`):
            For `critic="tree"`: largest number of edges that a rollout draws from each prompt.
        tree_replay_age (`int`, *optional*, defaults to `8`):
            For `critic="tree"`: number of rollouts in which an edge can be drawn; `1` for no replay. An edge keeps
            the log-probabilities from its sampling.

        > Parameters that control sampling beside training

        rollouts_ahead (`int`, *optional*, defaults to `0`):
            Rollouts that a vLLM server samples ahead, while the policy is updated: `0` or `1`.
            `0`: each rollout comes from the present policy, and the trainer waits for it. `1`: the server samples the
            next rollout meanwhile, so a step costs the longer of the two, not their sum. Its responses come from the
            policy before the update, and the importance correction is for them. It needs a
            [`~sapo_trl.generation.VLLMServerRollout`] as `rollout_func`.

        > Parameters that control the handling of failures

        reward_timeout (`float`, *optional*):
            Seconds that a call of a reward function may take; `None` for no limit. A call that takes longer, or
            raises, is repeated for each completion alone. A completion that fails again has no reward. C code that
            keeps Python's lock cannot be interrupted, such as a regular expression that backtracks without end: run it
            in a process of its own.
        max_sampler_logp_difference (`float`, *optional*, defaults to `0.05`):
            Largest mean difference between the sampler's and the model's log-probabilities; `None` for no check. It
            concerns responses from another engine (vLLM). A larger mean absolute difference in the first rollout of a
            run stops training with an error.
        max_skipped_steps (`int`, *optional*, defaults to `5`):
            Number of skipped optimizer steps in a row after which training stops with an error. A step with a
            non-finite loss or gradient is skipped. The batch of the last skipped step is saved in `output_dir`. Under
            DeepSpeed a step still updates the policy if only the critic's numbers are not finite. Without ZeRO,
            training stops after the first skipped step.

        > Parameters that control rewards and advantages

        advantage_estimator (`str`, *optional*, defaults to `"gae"`):
            Source of the advantages: values (`"gae"`) or rewards (`"group"`, `"leave_one_out"`, `"batch"`).
            `"gae"`: generalized advantage estimation over segments; `"group"`: [`~trl.GRPOTrainer`]'s, which compares
            the responses to a prompt, see `scale_rewards`; `"leave_one_out"`: the reward minus the mean reward of the
            other responses to the prompt (RLOO); `"batch"`: the rewards of the rollout's responses, shifted and
            scaled to mean 0 and variance 1 (REINFORCE).
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per segment.
        lam (`float`, *optional*, defaults to `0.99`):
            λ of the generalized advantage estimation over segments.
        critic_lam (`float`, *optional*):
            λ of the critic's targets; by default `lam`. `1.0` regresses on Monte-Carlo returns (VC-PPO).
        length_adaptive_lam (`float`, *optional*):
            Number that makes λ grow with a response's length, see `length_adaptive_lam_rule`. That λ replaces `lam`.
        length_adaptive_lam_rule (`str`, *optional*, defaults to `"reciprocal"`):
            λ of a response of `l` segments: `"reciprocal"` is `max(0, 1 - 1 / (x * l))`, `"root"` is `x ** (1 / l)`.
            `x` is `length_adaptive_lam`. VAPO, SAO and BPCO take `"reciprocal"`, JustRL-II takes `"root"` with 0.5.
        advantage_weighting (`str`, *optional*, defaults to `"none"`):
            Weights on the tokens' advantages: `"none"`, or by the token's role (`"role_aware"`, SRPO). The weights of
            perception and reasoning tokens are positive, with mean one. The next five parameters are for them.
        role_perception_pattern (`str`, *optional*, defaults to `r"<perception>(.*?)</perception>"`):
            Regular expression whose first group (or whole match) is the perception span.
        role_reasoning_pattern (`str`, *optional*, defaults to `r"<think>(.*?)</think>"`):
            Regular expression whose first group (or whole match) is the reasoning span.
        role_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the role-aware weights. The larger it is, the closer the weights are to one.
        role_clip (`float`, *optional*, defaults to `1.0`):
            Bound on the absolute logarithm of a role-aware weight. It acts before the weights are scaled to mean one.
        response_weighting (`str`, *optional*, defaults to `"none"`):
            Weights of whole responses. `"visual_dependency"`: a response's advantages are multiplied by a weight that
            rises linearly with the mean dependence of its tokens on its images (VPPO). It goes from
            `smallest_response_weight` up, with a mean of 1 over the responses of an optimizer step.
        smallest_response_weight (`float`, *optional*, defaults to `0.9`):
            Weight of the response of an optimizer step that depends least on its images.
        image_corruption (`str`, *optional*, defaults to `"tokens"`):
            Images to compare with, to measure the dependence of tokens on images. `"tokens"`: a share of the visual
            tokens is black; `"blur"`: a Gaussian blur as wide as a patch; `"other_image"`: another image of this
            process's rollout; `"none"`: the images themselves, so that no token depends on them.
        image_corruption_share (`float`, *optional*, defaults to `0.5`):
            Share of the visual tokens that `image_corruption="tokens"` hides. Others are hidden in each rollout.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Shift and scale the advantages of all tokens of a rollout to mean 0 and variance 1. Where all rewards of
            a rollout are equal, there is nothing to scale but the position and the critic's errors: the advantages
            are then 0, unless the values are sampled (`critic="monte_carlo"`, `"tree"`).
        advantage_clamp (`float`, *optional*, defaults to `5.0`):
            Bound on the absolute value of advantages; `None` for no bound. It acts after whitening.
        kl_placement (`str`, *optional*, defaults to `"reward"`):
            Place of the KL penalty with coefficient `beta`: in the tokens' rewards or in the loss.
        kl_estimator (`str`, *optional*, defaults to `"k1"`):
            Estimator of the KL divergence. `"k1"` cannot be used in the loss, where its expected gradient is zero.

        > Parameters that control the policy loss

        loss_type (`str`, *optional*, defaults to `"segment_clip"`):
            Policy loss: PPO's clip (`"segment_clip"`), a gate or a mask in its place, or one of TRL's own losses.
            `"soft_adaptive_gate"` is Qwen's Soft Adaptive gate instead of the clip (TRL calls it `"sapo"`, with
            `sapo_temperature_pos` and `sapo_temperature_neg`). `"double_sided_mask"` drops tokens whose ratio is not
            between `1 - epsilon` and `1 + epsilon_high`, for advantages of both signs (SAO). These three work at any
            `importance_sampling_level`. `"divergence_mask"` drops tokens whose probability has moved by more than
            `epsilon` or `epsilon_high` in their advantage's direction (DPPO); it needs the level `"token"`. Dropped
            tokens still count in the mean. `delta` acts with `"segment_clip"` alone. TRL's
            losses `"grpo"`, `"dr_grpo"`, `"bnpo"`, `"dapo"`, `"cispo"`, `"luspo"` and `"vespo"` know no segments. They
            need `importance_sampling_level` `"token"` or `"sequence"`, and `kl_placement="loss"` with
            `kl_estimator="k3"` (or `beta=0`); `ratio_reduction`, `confident_token_threshold`, `positive_lm_coef`,
            `loss_aggregation` and `kl_aggregation` must stay at their defaults. The preset `grpo` sets all this.
        importance_sampling_level (`str`, *optional*, defaults to `"segment"`):
            Unit that has one importance ratio: `"segment"`, `"sequence"` or `"token"`.
        ratio_reduction (`str`, *optional*, defaults to `"mean"`):
            Whether a shared log-ratio is the mean or the sum of its tokens' log-ratios. SAPO and GSPO take the
            `"mean"`, RLOO takes the `"sum"`.
        confident_token_threshold (`float`, *optional*):
            Leave tokens with at least this probability out of the policy loss (SPO); `None` for no mask. It is the
            probability under the old policy. The tokens are also left out of the loss's KL term and of whitening.
            A token must pass this mask, `entropy_token_share` and `visual_token_share` to be learned from.
        entropy_token_share (`float`, *optional*):
            Learn from the tokens with the highest entropy under the old policy alone: this share of them, rounded up.
            `None` for no mask. Values, returns and segments stay the same.
        entropy_token_scope (`str`, *optional*, defaults to `"response"`):
            Tokens that `entropy_token_share` is a share of: each response's, or the rollout's (`"batch"`).
        visual_token_share (`float`, *optional*):
            Learn only from the tokens of each response that depend most on its images: this share (VPPO). It is
            rounded up. `None` for no mask. It costs one more forward per rollout, see `image_corruption`. A response
            without a token that depends on an image keeps all its tokens.
        entropy_penalty_coef (`float`, *optional*, defaults to `0.0`):
            Weight of a penalty on the entropy, which is estimated from sampled tokens (VPPO, PAPO). It is minus the
            mean log-probability of all sampled tokens, also of tokens that a mask leaves out of the policy loss.
            `entropy_coef` is a bonus, on exact entropies.
        perception_kl_coef (`float`, *optional*, defaults to `0.0`):
            Weight of PAPO's perception loss. It raises the divergence between the policy with the images and with
            corrupted images, up to 10 per token.
        perception_kl_gradient (`bool`, *optional*, defaults to `False`):
            Whether the perception loss also has a gradient through the log-probabilities with corrupted images. This
            costs one more forward and backward per micro-batch. Otherwise they are the old policy's, computed once.
        corrupted_entropy_penalty_coef (`float`, *optional*, defaults to `0.0`):
            `entropy_penalty_coef` for the policy with corrupted images. It needs `perception_kl_gradient=True`.
        positive_lm_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the negative log-likelihood of correct responses (VAPO).
        positive_lm_threshold (`float`, *optional*, defaults to `0.5`):
            Reward above which a response counts as correct for `positive_lm_coef`.
        loss_aggregation (`str`, *optional*, defaults to `"token-mean"`):
            How token losses are averaged over an optimizer step. `"token-mean"`: over all its tokens;
            `"seq-mean-token-mean"`: per response first (the paper's equation); `"seq-mean-token-sum"`: summed per
            response; `"seq-mean-token-sum-norm"`: that sum divided by `max_completion_length`, as in Dr. GRPO.
        kl_aggregation (`str`, *optional*):
            How the KL term of the loss is averaged; by default like `loss_aggregation`.
        avoid_padding (`bool`, *optional*, defaults to `True`):
            Put rows of similar length into one micro-batch, without the padding that they have in common. Each
            optimizer step sees the same responses and gives the same gradient, but adds floats in another order. So
            set it to `False` to get TRL's own losses to the last bit. Rows keep their micro-batch where TRL takes a
            mean or a quantile over its tokens: with `"bnpo"`, and with TRL's losses and an entropy bonus,
            `top_entropy_quantile` or the experts' load. Models that see absolute positions keep the padding.
        reuse_image_features (`bool`, *optional*, defaults to `True`):
            Compute the features of an image once per rollout if the vision tower is frozen. For example, LoRA on the
            language model alone leaves the tower frozen. All responses to a prompt and all forwards share the
            features. They stay on the device until the next rollout. With Qwen2.5-VL-3B in bfloat16 they take 1 MiB
            for each different image of 448 x 448 pixels. The model must take patches and their grids, as Qwen's and
            GLM's do, and must not be sharded (ZeRO-3, FSDP). Otherwise features are computed in every forward.
        num_mini_batches (`int`, *optional*):
            Optimizer steps per rollout; by default 4. If `steps_per_generation` or
            `generation_batch_size` is set, the number follows from it.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `num_generations`: Defaults to `1` instead of `8`. One response per prompt suffices, as the critic is the
    >   baseline.
    > - `beta`: Defaults to `0.001` instead of `0.0`.
    > - `epsilon_high`: Defaults to `0.28` instead of `None`.
    > - `delta`: Defaults to `3.0` instead of `None`. It is PPO's dual clip, which concerns negative advantages alone.
    > - `loss_type`: Defaults to `"segment_clip"` instead of `"dapo"`.
    > - `importance_sampling_level`: Defaults to `"segment"` instead of `"token"`.
    > - `max_completion_length`: Defaults to `2048` instead of `512`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `weight_decay`: Defaults to `0.01` instead of `0.0`.
    """

    # Parameters whose default values are overridden from GRPOConfig
    num_generations: PositiveInt = field(
        default=1, metadata={"help": "Responses sampled per prompt. One suffices: the critic is the baseline."}
    )
    beta: NonNegativeFloat = field(
        default=0.001, metadata={"help": "KL coefficient, see `kl_placement`. If `0.0`, no reference model is loaded."}
    )
    epsilon_high: NonNegativeFloat | None = field(
        default=0.28, metadata={"help": "The importance ratio is clipped above at `1 + epsilon_high`."}
    )
    delta: Annotated[float, Bounds(gt=1)] | None = field(
        default=3.0,
        metadata={"help": "Bound on the importance ratio where the advantage is negative (dual clip), above 1."},
    )
    max_completion_length: PositiveInt | None = field(default=2048, metadata={"help": "Longest response, in tokens."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule of the policy."})
    weight_decay: NonNegativeFloat = field(default=0.01, metadata={"help": "Weight decay of the policy."})

    # Parameters that control the segmentation
    segmentation: Literal["entropy", "probability", "cutpoints", "newline", "step", "token", "sequence"] = "entropy"
    top_percent: Annotated[float, Bounds(gt=0, le=100, note="It is the share of tokens to cut at, in percent.")] = 30.0
    segment_cut: Literal["end", "start"] = "end"
    num_cuts: PositiveInt = 8
    cutpoint_threshold: Probability = 0.9
    cutpoint_interval: PositiveInt = 5
    step_pattern: str = r"Step\s*\d+\s*[:.]"

    # Parameters that control the critic
    critic: Literal["separate", "shared", "adapter", "ladder", "monte_carlo", "tree", "none"] = "separate"
    critic_layers: PositiveInt | None = None
    critic_width: PositiveInt | None = None
    critic_reads: PositiveInt | None = None
    value_state: Literal["start", "end"] = "start"
    critic_initial_value: Literal["zero", "reward_mean"] = "zero"
    value_range: list[float] | None = None
    critic_updates_per_step: PositiveInt = 1
    freeze_critic_attention: bool = False
    critic_learning_rate: NonNegativeFloat | None = None
    critic_lr_scheduler_type: str | None = None
    critic_lr_warmup_steps: NonNegativeInt = 0
    critic_weight_decay: NonNegativeFloat | None = None
    critic_max_grad_norm: Annotated[float, Bounds(gt=0, note="`math.inf` clips nothing.")] = 1.0
    critic_warmup_steps: NonNegativeInt = 0
    critic_warmup_tolerance: NonNegativeFloat | None = None
    critic_min_explained_variance: Annotated[float, Bounds(lt=1, note="No critic explains more than 1.")] | None = None
    cliprange_value: PositiveFloat | None = 0.5
    value_loss_aggregation: Aggregation = "token-mean"

    # Parameters that control Monte-Carlo values and tree rollouts
    num_continuations: PositiveInt = 9
    continuation_batch_size: PositiveInt | None = None
    max_valued_segments: NonNegativeInt | None = None
    truncated_continuation_reward: FiniteFloat | None = None
    tree_widths: list[int] = field(default_factory=lambda: [6, 6, 6])
    tree_segment_length: PositiveInt = 100
    tree_edges_per_prompt: PositiveInt = 32
    tree_replay_age: PositiveInt = 8

    # Parameters that control sampling beside training
    rollouts_ahead: Annotated[int, Bounds(ge=0, le=1, note="Older responses are not supported.")] = 0

    # Parameters that control the handling of failures
    reward_timeout: PositiveFloat | None = None
    max_sampler_logp_difference: PositiveFloat | None = 0.05
    max_skipped_steps: PositiveInt = 5

    # Parameters that control rewards and advantages
    advantage_estimator: Literal["gae", "group", "leave_one_out", "batch"] = "gae"
    gamma: UnitInterval = 1.0
    lam: UnitInterval = 0.99
    critic_lam: UnitInterval | None = None
    length_adaptive_lam: PositiveFloat | None = None
    length_adaptive_lam_rule: LengthRule = "reciprocal"
    advantage_weighting: Literal["none", "role_aware"] = "none"
    role_perception_pattern: str = PERCEPTION_PATTERN
    role_reasoning_pattern: str = REASONING_PATTERN
    role_temperature: PositiveFloat = 1.0
    role_clip: PositiveFloat = 1.0
    response_weighting: Literal["none", "visual_dependency"] = "none"
    smallest_response_weight: UnitInterval = 0.9
    image_corruption: ImageCorruption = "tokens"
    image_corruption_share: UnitInterval = 0.5
    whiten_advantages: bool = True
    advantage_clamp: PositiveFloat | None = 5.0
    kl_placement: Literal["reward", "loss"] = "reward"
    kl_estimator: KLEstimator = "k1"

    # Parameters that control the policy loss
    loss_type: Literal[SegmentLoss, TRLLoss] = "segment_clip"
    importance_sampling_level: Literal["segment", "token", "sequence"] = "segment"
    ratio_reduction: RatioReduction = "mean"
    confident_token_threshold: Probability | None = None
    entropy_token_share: Share | None = None
    entropy_token_scope: TokenScope = "response"
    visual_token_share: Share | None = None
    entropy_penalty_coef: NonNegativeFloat = 0.0
    perception_kl_coef: NonNegativeFloat = 0.0
    perception_kl_gradient: bool = False
    corrupted_entropy_penalty_coef: NonNegativeFloat = 0.0
    positive_lm_coef: NonNegativeFloat = 0.0
    positive_lm_threshold: float = 0.5
    loss_aggregation: Aggregation = "token-mean"
    kl_aggregation: Aggregation | None = None
    avoid_padding: bool = True
    reuse_image_features: bool = True
    num_mini_batches: PositiveInt | None = None

    @classmethod
    def from_preset(cls, preset: str, output_dir: str | None = None, **overrides: Any) -> SAPOConfig:
        """
        The configuration of a named algorithm; `docs/algorithms.md` lists them.

        Args:
            preset (`str`): such as `"sapo"`, `"ppo"`, `"grpo"`, `"vineppo"`, see [`~sapo_trl.presets.PRESETS`].
            output_dir (`str`, *optional*): as in [`~transformers.TrainingArguments`].
            overrides: further settings, and settings of the preset to change.

        Returns:
            [`SAPOConfig`]

        Raises:
            ValueError: if there is no such preset or no such setting.
        """
        settings = preset_settings(preset)
        known = {setting.name for setting in fields(cls) if setting.init}
        for name in overrides.keys() - known:
            raise ValueError(f"`{name}` is no setting of `{cls.__name__}`.{nearest_name(name, known)}")
        return cls(output_dir=output_dir, **{**settings, **overrides})

    @property
    def masks_tokens(self) -> bool:
        """Whether the policy learns from a part of its tokens."""
        masks = (self.confident_token_threshold, self.entropy_token_share, self.visual_token_share)
        return any(mask is not None for mask in masks)

    @property
    def reads_visual_dependency(self) -> bool:
        """Whether every token's dependence on its images is measured."""
        return self.visual_token_share is not None or self.response_weighting == "visual_dependency"

    @property
    def compares_images(self) -> bool:
        """Whether the policy also sees corrupted images."""
        weighs_tokens = self.advantage_weighting == "role_aware"
        return self.reads_visual_dependency or weighs_tokens or self.perception_kl_coef != 0.0

    @property
    def learns_critic(self) -> bool:
        """Whether a value model is trained."""
        return self.critic in LEARNED_CRITICS

    @property
    def reads_policy(self) -> bool:
        """Whether the value model reads the policy's hidden states instead of running a forward of its own."""
        return self.critic in READING_CRITICS

    def __post_init__(self):
        if self.loss_type == "sapo":
            raise ValueError(
                "`loss_type` must not be 'sapo': in TRL that is Qwen's Soft Adaptive Policy Optimization (arXiv "
                "2511.20347), whose gate is 'soft_adaptive_gate' here. This is Segment-Aligned Policy Optimization "
                "(arXiv 2605.01327)."
            )
        check_settings(self)
        for name, hint in _TRL_RANGES.items():
            check_setting(name, getattr(self, name), hint)
        _check_combinations(self)
        if self.critic_learning_rate is None:
            self.critic_learning_rate = _learning_rate_of(self.critic)
            _warn_of_one_learning_rate(self)

        if self.num_mini_batches is None and self.steps_per_generation is None and self.generation_batch_size is None:
            self.num_mini_batches = 4
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = self.num_mini_batches * self.gradient_accumulation_steps

        if self.num_generations == 1:
            self.num_generations = _OneGeneration(1)
        chose_rollout = self.generation_batch_size is not None
        try:
            super().__post_init__()
        except ValueError:
            if not chose_rollout and self.generation_batch_size is not None:  # so TRL has computed it
                _check_groups(self)
            raise
        self.num_generations = int(self.num_generations)

        mini_batches, rest = divmod(self.steps_per_generation, self.gradient_accumulation_steps)
        if rest != 0:
            raise ValueError(
                f"A rollout batch must hold a whole number of optimizer steps: steps_per_generation "
                f"({self.steps_per_generation}) must be a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps})."
            )
        if self.num_mini_batches is not None and self.num_mini_batches != mini_batches:
            raise ValueError(
                f"num_mini_batches ({self.num_mini_batches}) contradicts steps_per_generation "
                f"({self.steps_per_generation}) / gradient_accumulation_steps ({self.gradient_accumulation_steps}) = "
                f"{mini_batches}. Set one of the two."
            )
        self.num_mini_batches = mini_batches


def _check_groups(args: SAPOConfig) -> None:
    """Raise a `ValueError` in the names of our settings if a rollout is no whole number of groups."""
    responses, group = args.generation_batch_size, int(args.num_generations)
    if responses % group == 0:
        return
    micro_batch = args.per_device_train_batch_size
    others = {"steps_per_generation": args.steps_per_generation}
    if args.num_mini_batches is not None:
        others = {
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "num_mini_batches": args.num_mini_batches,
        }
    others["processes"] = responses // (micro_batch * args.steps_per_generation)
    factors = {"per_device_train_batch_size": micro_batch, **others}
    divisors = [size for size in range(2, group) if responses % size == 0]
    smaller = f"set num_generations={divisors[-1]}, or " if divisors else ""
    step = group // math.gcd(group, responses // micro_batch)
    raise ValueError(
        f"A rollout has {responses} responses ({' × '.join(f'{name} {value}' for name, value in factors.items())}), "
        f"which num_generations={group} does not divide: {smaller}raise per_device_train_batch_size to "
        f"{math.ceil(micro_batch / step) * step}."
    )


def _learning_rate_of(critic: str) -> float:
    """The default of `critic_learning_rate`."""
    return _CRITIC_LEARNING_RATES.get(critic, _CRITIC_LEARNING_RATE)


def _warn_of_one_learning_rate(args: SAPOConfig) -> None:
    """Warn if only the policy's learning rate was changed. A ladder's does not follow the policy's."""
    default = next(setting.default for setting in fields(SAPOConfig) if setting.name == "learning_rate")
    if args.learns_critic and args.critic != "ladder" and args.learning_rate != default:
        logger.warning(
            "learning_rate=%g is the policy's alone: the critic keeps its default, critic_learning_rate=%g. Set both. "
            "The paper's are %g and %g.",
            *(args.learning_rate, args.critic_learning_rate, default, _CRITIC_LEARNING_RATE),
        )


def default_settings() -> dict[str, Any]:
    """The defaults of [`SAPOConfig`] for all settings of [`~sapo_trl.presets.AXES`]."""
    defaults = {setting.name: setting.default for setting in fields(SAPOConfig)}
    defaults["critic_learning_rate"] = _learning_rate_of(defaults["critic"])
    return {name: defaults[name] for names in AXES.values() for name in names}


def _check_combinations(args: SAPOConfig) -> None:
    """Raise a `ValueError` for settings that contradict each other or would have no effect."""
    schedules = [schedule.value for schedule in SchedulerType if schedule.value not in _METRIC_SCHEDULES]
    schedule = args.critic_lr_scheduler_type or args.lr_scheduler_type
    if args.learns_critic and schedule not in schedules:
        raise ValueError(
            f"`critic_lr_scheduler_type` (by default `lr_scheduler_type`) must be one of {schedules}, got "
            f"{str(schedule)!r}."
        )
    for name, critics in _SETTINGS_OF_CRITICS.items():
        if getattr(args, name) is not None and args.critic not in critics:
            raise ValueError(
                f"`{name}` has no meaning with `critic={args.critic!r}`, got {getattr(args, name)}: leave it out, or "
                f"set `critic` to {' or '.join(map(repr, critics))}."
            )
    if args.critic_width is not None and args.critic_width % 64 != 0:
        raise ValueError(f"`critic_width` must be a multiple of 64, as attention heads are, got {args.critic_width}.")
    if not args.tree_widths or min(args.tree_widths) < 1:
        raise ValueError(
            f"`tree_widths` must be a list of numbers of children, each at least 1, got {args.tree_widths}."
        )
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
        if args.masks_tokens and args.importance_sampling_level == "sequence":
            raise ValueError(
                f"`loss_type={args.loss_type!r}` is TRL's, which would take a response's ratio over the tokens that "
                'the policy learns from alone: `importance_sampling_level` must be "token", or '
                '`loss_type="segment_clip"`, got "sequence".'
            )
        _check_unused(args, _SETTINGS_OF_SEGMENT_LOSSES)
    else:
        _check_unused(args, _SETTINGS_OF_TRL_LOSSES)
        if args.top_entropy_quantile != 1.0:
            raise ValueError(
                f"`top_entropy_quantile` is read by TRL's losses alone, and `loss_type={args.loss_type!r}` is none of "
                f"them: it must stay 1.0, got {args.top_entropy_quantile}. Set "
                f'`entropy_token_share={args.top_entropy_quantile}` and `entropy_token_scope="batch"` instead.'
            )
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
                '`critic="tree"` also trains on edges of earlier rollouts, without log-probabilities of the sampler: '
                "set `vllm_importance_sampling_correction=False`."
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
    if args.loss_type == "divergence_mask" and args.importance_sampling_level != "token":
        raise ValueError(
            '`loss_type="divergence_mask"` compares the probabilities of single tokens: `importance_sampling_level` '
            f'must be "token", got {args.importance_sampling_level!r}.'
        )
    if args.length_adaptive_lam_rule == "root" and not 0 < (args.length_adaptive_lam or 0) <= 1:
        raise ValueError(
            '`length_adaptive_lam_rule="root"` takes a root of `length_adaptive_lam`, which must lie in (0, 1], got '
            f"{args.length_adaptive_lam}."
        )
    _check_perception(args)
    _check_critic(args)
    if not args.learns_critic and args.critic_warmup_steps > 0:
        raise ValueError(
            f"`critic_warmup_steps={args.critic_warmup_steps}` with `critic={args.critic!r}` would train nothing: "
            "it must be 0."
        )
    if not args.learns_critic and args.critic_min_explained_variance is not None:
        raise ValueError(
            f"`critic_min_explained_variance={args.critic_min_explained_variance}` is a gate on a critic that learns, "
            f"but `critic` is {args.critic!r}: it must be one of {', '.join(LEARNED_CRITICS)}, or the gate None."
        )
    sampling = args.generation_kwargs or {}
    if sampling.get("num_return_sequences") not in (None, 1):
        raise ValueError(
            f"`generation_kwargs` sets `num_return_sequences={sampling['num_return_sequences']!r}`: set "
            "`num_generations` instead."
        )
    if sampling.get("return_dict_in_generate"):
        raise ValueError("`generation_kwargs` sets `return_dict_in_generate=True`: training reads tokens; drop it.")
    if args.critic_warmup_tolerance is not None and args.critic_warmup_steps == 0:
        raise ValueError(
            f"`critic_warmup_tolerance={args.critic_warmup_tolerance}` ends a warm-up early, but "
            "`critic_warmup_steps`, its longest duration, is 0."
        )
    if args.kl_placement == "loss" and args.kl_estimator == "k1" and args.beta != 0.0:
        raise ValueError(
            '`kl_estimator="k1"` has zero expected gradient in the loss: use "k2" or "k3", or `kl_placement="reward"`.'
        )


def _check_perception(args: SAPOConfig) -> None:
    """Raise a `ValueError` for settings of the perception loss that would have no effect or cannot be had."""
    if args.perception_kl_gradient and args.perception_kl_coef == 0.0:
        raise ValueError(
            "`perception_kl_gradient=True` is about the perception loss, but `perception_kl_coef` is 0.0: it must be "
            "False."
        )
    if args.corrupted_entropy_penalty_coef != 0.0 and not args.perception_kl_gradient:
        raise ValueError(
            f"`corrupted_entropy_penalty_coef={args.corrupted_entropy_penalty_coef}` would have no gradient: it must "
            "be 0.0, or `perception_kl_gradient=True`."
        )
    if args.perception_kl_gradient and args.image_corruption == "other_image":
        raise ValueError(
            '`image_corruption="other_image"` needs a whole rollout, and `perception_kl_gradient=True` corrupts the '
            'images of each micro-batch again: it must be "tokens" or "blur", got "other_image".'
        )


def _check_critic(args: SAPOConfig) -> None:
    """Raise a `ValueError` for settings of a learned critic that do not fit it, or that no critic would read."""
    if args.value_range is not None:
        bounds = args.value_range
        are_numbers = isinstance(bounds, list | tuple) and all(isinstance(bound, int | float) for bound in bounds)
        if not are_numbers or len(bounds) != 2 or not all(map(math.isfinite, bounds)) or bounds[0] >= bounds[1]:
            raise ValueError(f"`value_range` must be `[low, high]`, two finite numbers with low < high, got {bounds}.")
    only_for_learned = {"critic_initial_value": "zero", "value_range": None, "critic_updates_per_step": 1}
    for name, only in only_for_learned.items():
        if not args.learns_critic and getattr(args, name) != only:
            raise ValueError(
                f"`{name}` has no meaning with `critic={args.critic!r}`, which learns nothing: it must stay {only!r}, "
                f"got {getattr(args, name)!r}."
            )
    if args.freeze_critic_attention and args.critic != "separate":
        raise ValueError(
            f"`freeze_critic_attention=True` with `critic={args.critic!r}`, which has no attention layers of its own: "
            'it must be False, or `critic="separate"`.'
        )


def _check_unused(args: SAPOConfig, settings: dict[str, object]) -> None:
    for name, only in settings.items():
        if getattr(args, name) != only:
            raise ValueError(
                f"`{name}` has no meaning with `loss_type={args.loss_type!r}` and "
                f"`advantage_estimator={args.advantage_estimator!r}`: it must stay {only!r}, got "
                f"{getattr(args, name)!r}."
            )
