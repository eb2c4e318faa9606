"""Settings of [`SAPOTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from .config_checks import CHOICES, LEARNED_CRITICS, SEGMENT_LOSS_TYPES, TRL_LOSS_TYPES, check_config
from .losses import AGGREGATIONS
from .names import nearest_name
from .presets import AXES, preset_settings
from .role_aware import PERCEPTION_PATTERN, REASONING_PATTERN


class _OneGeneration(int):
    """`1` that passes for enough generations: GRPO needs a group to compare with, a critic does not."""

    def __lt__(self, other: int) -> bool:
        return False if other == 2 else int(self) < other


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
            Where responses are cut: `"entropy"` (at the highest-entropy tokens), `"probability"` (at a fixed number of
            least probable tokens), `"cutpoints"` (at every n-th uncertain token, as in SPO-chain), `"newline"`,
            `"step"` (at "Step 1:" …), `"token"` (every token is a segment, as in PPO) or `"sequence"` (the response is
            one segment). To cut in another way, pass `segmenter` to the trainer.
        top_percent (`float`, *optional*, defaults to `30.0`):
            For `"entropy"`: share of each response's tokens to cut at, in percent, in (0, 100].
        segment_cut (`str`, *optional*, defaults to `"end"`):
            For `"entropy"` and `"probability"`: whether a selected token ends (`"end"`) or starts (`"start"`) its
            segment.
        num_cuts (`int`, *optional*, defaults to `8`):
            For `"probability"`: number of tokens to cut each response at.
        cutpoint_threshold (`float`, *optional*, defaults to `0.9`):
            For `"cutpoints"`: a token with probability below it is a cut-point.
        cutpoint_interval (`int`, *optional*, defaults to `5`):
            For `"cutpoints"`: number of cut-points in a segment.
        step_pattern (`str`, *optional*, defaults to `r"Step\s*\d+\s*[:.]"`):
            For `"step"`: regular expression of a step's announcement.

        > Parameters that control the critic

        critic (`str`, *optional*, defaults to `"separate"`):
            `"separate"`: a backbone of its own, initialised from the policy; `"shared"`: a head on the policy's hidden
            states, through which no gradient reaches the policy; `"adapter"`: a second adapter on the base model that
            carries the policy's (with `peft_config`); `"monte_carlo"`: no model, but the mean reward of
            fresh continuations from each segment's start (VinePPO, SPO-chain); `"tree"`: responses are sampled as a
            tree, whose nodes are valued by their children (SPO-tree); `"none"`: every value is 0.
        value_state (`str`, *optional*, defaults to `"start"`):
            State whose value stands for a segment: before its first token (`"start"`, the paper) or before its last
            token (`"end"`, the official code).
        critic_learning_rate (`float`, *optional*, defaults to `2e-6`):
            Initial learning rate of the critic.
        critic_lr_scheduler_type (`str`, *optional*):
            Learning rate schedule of the critic. Defaults to `lr_scheduler_type`.
        critic_lr_warmup_steps (`int`, *optional*, defaults to `0`):
            Steps over which the critic's learning rate rises linearly from 0.
        critic_weight_decay (`float`, *optional*):
            Weight decay of the critic. Defaults to `weight_decay`.
        critic_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Norm to which the critic's gradient is clipped.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps at the beginning of training in which only the critic learns (VC-PPO's value pretraining).
        critic_warmup_tolerance (`float`, *optional*):
            If set, the warm-up ends before `critic_warmup_steps` when the value loss has settled: when no rollout of
            the last three lowered the smallest value loss so far by more than this share of it.
        cliprange_value (`float`, *optional*, defaults to `0.5`):
            How far a value may move from its rollout-time prediction before its loss is clipped; `None` for no
            clipping.
        value_loss_aggregation (`str`, *optional*, defaults to `"token-mean"`):
            How the losses of segments are averaged: over all segments (`"token-mean"`) or per response first
            (`"seq-mean-token-mean"`, the paper's equation).

        > Parameters that control Monte-Carlo values and tree rollouts

        num_continuations (`int`, *optional*, defaults to `9`):
            For `critic="monte_carlo"`: continuations sampled from each valued state.
        continuation_batch_size (`int`, *optional*):
            For Monte-Carlo values and diagnostics: continuations generated at a time on a process. By default as many
            as a rollout has responses, which are known to fit into memory; more are faster.
        max_valued_segments (`int`, *optional*):
            For `critic="monte_carlo"`: largest number of states of a response that are valued after the prompt's. The
            reward is the value of later states; later tokens therefore get advantage 0. `None` for no limit.
        truncated_continuation_reward (`float`, *optional*):
            Reward of a continuation, or of a tree's leaf, that was cut off at `max_completion_length`. By default the
            result of the reward functions.
        tree_widths (`list[int]`, *optional*, defaults to `[6, 6, 6]`):
            For `critic="tree"`: children of the nodes of each level.
        tree_segment_length (`int`, *optional*, defaults to `100`):
            For `critic="tree"`: tokens of an edge, but on the last level, where responses run to their end.
        tree_edges_per_prompt (`int`, *optional*, defaults to `32`):
            For `critic="tree"`: largest number of a prompt's edges that one rollout draws to train on.
        tree_replay_age (`int`, *optional*, defaults to `8`):
            For `critic="tree"`: rollouts for which edges can be drawn, with the log-probabilities they had when they
            were sampled. `1` for no replay.

        > Parameters that control what happens when something fails

        reward_timeout (`float`, *optional*):
            Seconds that a call of a reward function may take. A call that takes longer, or raises, is repeated for
            each completion alone, and those for which it does so again have no reward. `None` for no limit.
        max_sampler_logp_difference (`float`, *optional*, defaults to `0.05`):
            If the responses come from another engine (vLLM): largest mean absolute difference between its
            log-probabilities and the training model's in the first rollout of a run, above which training stops with
            an error. `None` for no check.
        max_skipped_steps (`int`, *optional*, defaults to `5`):
            An optimizer step with a non-finite loss or gradient is skipped; after so many in a row training stops with
            an error, and the last one's batch is saved in `output_dir`. Under DeepSpeed a step in which only the
            critic's numbers are not finite still updates the policy, and without ZeRO training stops after the first.

        > Parameters that control rewards and advantages

        advantage_estimator (`str`, *optional*, defaults to `"gae"`):
            `"gae"`: generalized advantage estimation over segments; `"group"`: [`~trl.GRPOTrainer`]'s, the reward
            among the responses to a prompt, see `scale_rewards`; `"leave_one_out"`: the reward minus the mean reward
            of the other responses to the prompt (RLOO); `"batch"`: the reward among all responses of the rollout,
            shifted and scaled to mean 0 and variance 1 (REINFORCE).
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per segment.
        lam (`float`, *optional*, defaults to `0.99`):
            λ of the generalized advantage estimation over segments.
        critic_lam (`float`, *optional*):
            λ of the critic's targets. Defaults to `lam`; `1.0` regresses on Monte-Carlo returns (VC-PPO).
        length_adaptive_lam (`float`, *optional*):
            If set, the α of VAPO's `λ = max(0, 1 - 1 / (α * l))` for a response of `l` segments, in the place of
            `lam`.
        advantage_weighting (`str`, *optional*, defaults to `"none"`):
            `"role_aware"` multiplies the advantages of perception and reasoning tokens by positive weights with mean
            one (SRPO). Its settings are the following five.
        role_perception_pattern (`str`, *optional*, defaults to `r"<perception>(.*?)</perception>"`):
            Regular expression whose first group (or whole match) is the perception span.
        role_reasoning_pattern (`str`, *optional*, defaults to `r"<think>(.*?)</think>"`):
            The same for the reasoning span.
        role_mask_ratio (`float`, *optional*, defaults to `0.6`):
            Share of image patches that are hidden to measure how far a token depends on the image.
        role_temperature (`float`, *optional*, defaults to `1.0`):
            The larger, the closer the weights are to one.
        role_clip (`float`, *optional*, defaults to `1.0`):
            Bound on the absolute value of a weight's logarithm, before the weights are scaled to mean one.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whether to shift and scale the advantages of all tokens of a rollout batch to mean 0 and variance 1.
        advantage_clamp (`float`, *optional*, defaults to `5.0`):
            Bound on the absolute value of advantages, after whitening if they are whitened; `None` for no bound.
        kl_placement (`str`, *optional*, defaults to `"reward"`):
            Where the KL penalty with coefficient `beta` goes: into the tokens' rewards or into the `"loss"`.
        kl_estimator (`str`, *optional*, defaults to `"k1"`):
            Estimator of the KL divergence: `"k1"`, `"k2"` or `"k3"`. `"k1"` cannot be used in the loss, where its
            expected gradient is zero.

        > Parameters that control the policy loss

        loss_type (`str`, *optional*, defaults to `"segment_clip"`):
            `"segment_clip"`: PPO's clipped loss; `"soft_adaptive_gate"`: Qwen's Soft Adaptive gate (what TRL calls
            `"sapo"`, with `sapo_temperature_pos` and `sapo_temperature_neg`) in the place of the clip. Both at any
            `importance_sampling_level`. Also TRL's own losses `"grpo"`, `"dr_grpo"`, `"bnpo"`, `"dapo"`, `"cispo"`,
            `"luspo"` and `"vespo"`, which know no segments. They need `importance_sampling_level` `"token"` or
            `"sequence"`, and `kl_placement="loss"` with `kl_estimator="k3"` (or `beta=0`); `ratio_reduction`,
            `confident_token_threshold`, `positive_lm_coef`, `loss_aggregation` and `kl_aggregation` must stay at their
            defaults. The preset `grpo` sets all this.
        importance_sampling_level (`str`, *optional*, defaults to `"segment"`):
            What shares an importance ratio: the tokens of a `"segment"`, of a `"sequence"`, or none (`"token"`).
        ratio_reduction (`str`, *optional*, defaults to `"mean"`):
            Whether a shared log-ratio is the `"mean"` of its tokens' (SAPO, GSPO) or their `"sum"` (RLOO).
        confident_token_threshold (`float`, *optional*):
            Tokens that the old policy gave at least this probability are left out of the policy loss, of its KL and
            of whitening (SPO's mask). `None` for no mask.
        positive_lm_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the negative log-likelihood of responses with a reward above `positive_lm_threshold` (VAPO).
        positive_lm_threshold (`float`, *optional*, defaults to `0.5`):
            Reward above which a response counts as correct there.
        loss_aggregation (`str`, *optional*, defaults to `"token-mean"`):
            How token losses are averaged over an optimizer step: over all its tokens (`"token-mean"`), per response
            first (`"seq-mean-token-mean"`, the paper's equation), summed per response (`"seq-mean-token-sum"`), or
            that divided by `max_completion_length` (`"seq-mean-token-sum-norm"`, as in Dr. GRPO).
        kl_aggregation (`str`, *optional*):
            The same for the KL term of the loss. Defaults to `loss_aggregation`.
        avoid_padding (`bool`, *optional*, defaults to `True`):
            Whether rows of like length go through the model together, without the padding that they have in common.
            Optimizer steps see the same responses and give the same gradients; sums of floats differ in their order,
            so that TRL's own losses are TRL's to the last bit only without it. Where TRL takes a mean or a quantile
            over the tokens of a micro-batch (`"bnpo"`; with its losses the entropy bonus, `top_entropy_quantile` and
            the experts' load) rows keep their micro-batch. Models that see absolute positions keep the padding.
        reuse_image_features (`bool`, *optional*, defaults to `True`):
            Whether a frozen vision tower (LoRA on the language model alone, for example) computes the features of an
            image once a rollout, for all responses to its prompt and all forwards. They stay on the device until the
            next rollout: with Qwen2.5-VL-3B in bfloat16 1 MiB for each different image of 448 x 448 pixels. It works
            for models that take patches and their grids, as Qwen's and GLM's do, without training or adapters in the
            vision tower, and without sharding (ZeRO-3, FSDP). Otherwise features are recomputed in every forward.
        num_mini_batches (`int`, *optional*):
            Optimizer steps per rollout batch. Defaults to 4, or to what `steps_per_generation` or
            `generation_batch_size` imply if one of those is set.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `num_generations`: Defaults to `1` instead of `8`. One response per prompt suffices, as the critic is the
    >   baseline.
    > - `beta`: Defaults to `0.001` instead of `0.0`.
    > - `epsilon_high`: Defaults to `0.28` instead of `None`.
    > - `delta`: Defaults to `3.0` instead of `None`. On negative advantages, the only ones it can change, it is PPO's
    >   dual clip.
    > - `loss_type`: Defaults to `"segment_clip"` instead of `"dapo"`.
    > - `importance_sampling_level`: Defaults to `"segment"` instead of `"token"`.
    > - `max_completion_length`: Defaults to `2048` instead of `512`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `weight_decay`: Defaults to `0.01` instead of `0.0`.
    """

    # Parameters whose default values are overridden from GRPOConfig
    num_generations: int = field(
        default=1,
        metadata={"help": "Number of generations to sample per prompt. One suffices: the critic is the baseline."},
    )
    beta: float = field(
        default=0.001,
        metadata={"help": "KL coefficient. If `0.0`, no reference model is used. See `kl_placement`."},
    )
    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "The importance ratio is clipped above at `1 + epsilon_high`."}
    )
    delta: float | None = field(
        default=3.0,
        metadata={"help": "Bound on the importance ratio where the advantage is negative (dual clip). Must be > 1."},
    )
    loss_type: str = field(
        default="segment_clip",
        metadata={
            "help": "'segment_clip', 'soft_adaptive_gate' (Qwen's Soft Adaptive Policy Optimization, which TRL calls "
            "'sapo'), or one of TRL's own losses, which know no segments.",
            "choices": [*SEGMENT_LOSS_TYPES, *TRL_LOSS_TYPES],
        },
    )
    importance_sampling_level: str = field(
        default="segment",
        metadata={
            "help": "What shares an importance ratio: the tokens of a 'segment', of a 'sequence', or none ('token').",
            "choices": list(CHOICES["importance_sampling_level"]),
        },
    )
    max_completion_length: int | None = field(
        default=2048, metadata={"help": "Maximum length of the generated completion."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule of the policy."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})

    # Parameters that control the segmentation
    segmentation: str = field(
        default="entropy",
        metadata={"help": "Where responses are cut into segments.", "choices": list(CHOICES["segmentation"])},
    )
    top_percent: float = field(
        default=30.0,
        metadata={"help": "For 'entropy': share of each response's tokens to cut at, in percent, in (0, 100]."},
    )
    segment_cut: str = field(
        default="end",
        metadata={
            "help": "For 'entropy' and 'probability': whether a selected token ends or starts its segment.",
            "choices": list(CHOICES["segment_cut"]),
        },
    )
    num_cuts: int = field(default=8, metadata={"help": "For 'probability': number of tokens to cut each response at."})
    cutpoint_threshold: float = field(
        default=0.9, metadata={"help": "For 'cutpoints': a token with probability below it is a cut-point."}
    )
    cutpoint_interval: int = field(default=5, metadata={"help": "For 'cutpoints': number of cut-points in a segment."})
    step_pattern: str = field(
        default=r"Step\s*\d+\s*[:.]",
        metadata={"help": "For 'step': regular expression of a step's announcement."},
    )

    # Parameters that control the critic
    critic: str = field(
        default="separate",
        metadata={
            "help": "'separate': a backbone of its own, initialised from the policy; 'shared': a head on the policy's "
            "detached hidden states; 'adapter': a second adapter on the policy's base model; 'monte_carlo': the mean "
            "reward of fresh continuations; 'tree': responses are sampled as a tree, whose nodes are valued by their "
            "children; 'none': every value is 0.",
            "choices": list(CHOICES["critic"]),
        },
    )
    value_state: str = field(
        default="start",
        metadata={
            "help": "State whose value stands for a segment: before its first token ('start', the paper) or before "
            "its last token ('end', the official code).",
            "choices": list(CHOICES["value_state"]),
        },
    )
    critic_learning_rate: float = field(default=2e-6, metadata={"help": "Initial learning rate of the critic."})
    critic_lr_scheduler_type: str | None = field(
        default=None, metadata={"help": "Learning rate schedule of the critic. Defaults to `lr_scheduler_type`."}
    )
    critic_lr_warmup_steps: int = field(
        default=0, metadata={"help": "Steps over which the critic's learning rate rises linearly from 0."}
    )
    critic_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the critic. Defaults to `weight_decay`."}
    )
    critic_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Norm to which the critic's gradient is clipped."}
    )
    critic_warmup_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps at the beginning of training in which only the critic learns."},
    )
    critic_warmup_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "If set, the critic's warm-up ends early when no rollout of the last three lowered the smallest "
            "value loss so far by more than this share of it."
        },
    )
    cliprange_value: float | None = field(
        default=0.5,
        metadata={
            "help": "How far a value may move from its rollout-time prediction before its loss is clipped; `None` for "
            "no clipping."
        },
    )
    value_loss_aggregation: str = field(
        default="token-mean",
        metadata={
            "help": "How the value losses of segments are averaged.",
            "choices": list(CHOICES["value_loss_aggregation"]),
        },
    )

    # Parameters that control Monte-Carlo values and tree rollouts
    num_continuations: int = field(
        default=9, metadata={"help": "For critic='monte_carlo': continuations sampled from each valued state."}
    )
    continuation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Continuations generated at a time on a process; by default as many as a rollout has responses."
        },
    )
    max_valued_segments: int | None = field(
        default=None,
        metadata={
            "help": "For critic='monte_carlo': how many states of a response are valued after the prompt's; the "
            "reward stands for later ones. `None` for no limit."
        },
    )
    truncated_continuation_reward: float | None = field(
        default=None,
        metadata={
            "help": "Reward of a continuation cut off at `max_completion_length`. Defaults to what the reward "
            "functions say."
        },
    )
    tree_widths: list[int] = field(
        default_factory=lambda: [6, 6, 6],
        metadata={"help": "For critic='tree': children of the nodes of each level."},
    )
    tree_segment_length: int = field(
        default=100,
        metadata={"help": "For critic='tree': tokens of an edge; on the last level responses run to their end."},
    )
    tree_edges_per_prompt: int = field(
        default=32,
        metadata={"help": "For critic='tree': largest number of a prompt's edges that one rollout trains on."},
    )
    tree_replay_age: int = field(
        default=8,
        metadata={"help": "For critic='tree': rollouts for which edges can be drawn. `1` for no replay."},
    )

    # Parameters that control what happens when something fails
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that a call of a reward function may take. A call that takes longer, or raises, is "
            "repeated for each completion alone. `None` for no limit."
        },
    )
    max_sampler_logp_difference: float | None = field(
        default=0.05,
        metadata={
            "help": "Largest mean absolute difference between the sampler's log-probabilities and the training "
            "model's in the first rollout. `None` for no check."
        },
    )
    max_skipped_steps: int = field(
        default=5,
        metadata={
            "help": "Optimizer steps with a non-finite loss or gradient are skipped; after so many in a row training "
            "stops with an error."
        },
    )

    # Parameters that control rewards and advantages
    advantage_estimator: str = field(
        default="gae",
        metadata={
            "help": "'gae' over segments, TRL's 'group' advantage, the 'leave_one_out' baseline of RLOO, or 'batch': "
            "the reward, shifted and scaled to mean 0 and variance 1 over all responses of the rollout.",
            "choices": list(CHOICES["advantage_estimator"]),
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per segment."})
    lam: float = field(default=0.99, metadata={"help": "λ of the generalized advantage estimation over segments."})
    critic_lam: float | None = field(
        default=None,
        metadata={"help": "λ of the critic's targets. Defaults to `lam`; `1.0` regresses on Monte-Carlo returns."},
    )
    length_adaptive_lam: float | None = field(
        default=None,
        metadata={"help": "If set, the α of VAPO's λ = max(0, 1 - 1 / (α * segments)), in the place of `lam`."},
    )
    advantage_weighting: str = field(
        default="none",
        metadata={
            "help": "'role_aware' weighs the advantages of perception and reasoning tokens (SRPO).",
            "choices": list(CHOICES["advantage_weighting"]),
        },
    )
    role_perception_pattern: str = field(
        default=PERCEPTION_PATTERN,
        metadata={"help": "Regular expression whose first group (or whole match) is the perception span."},
    )
    role_reasoning_pattern: str = field(
        default=REASONING_PATTERN,
        metadata={"help": "Regular expression whose first group (or whole match) is the reasoning span."},
    )
    role_mask_ratio: float = field(
        default=0.6,
        metadata={"help": "Share of image patches hidden to measure how far a token depends on the image."},
    )
    role_temperature: float = field(
        default=1.0, metadata={"help": "The larger, the closer the role-aware weights are to one."}
    )
    role_clip: float = field(
        default=1.0, metadata={"help": "Bound on the logarithm of a role-aware weight, before scaling to mean one."}
    )
    whiten_advantages: bool = field(
        default=True,
        metadata={"help": "Whether to shift and scale the advantages of a rollout batch to mean 0 and variance 1."},
    )
    advantage_clamp: float | None = field(
        default=5.0,
        metadata={"help": "Bound on the absolute value of advantages, after whitening; `None` for no bound."},
    )
    kl_placement: str = field(
        default="reward",
        metadata={
            "help": "Where the KL penalty with coefficient `beta` goes: the tokens' rewards or the loss.",
            "choices": list(CHOICES["kl_placement"]),
        },
    )
    kl_estimator: str = field(
        default="k1",
        metadata={"help": "Estimator of the KL divergence.", "choices": list(CHOICES["kl_estimator"])},
    )

    # Parameters that control the policy loss
    ratio_reduction: str = field(
        default="mean",
        metadata={
            "help": "Whether a shared log-ratio is the 'mean' or the 'sum' of its tokens'.",
            "choices": list(CHOICES["ratio_reduction"]),
        },
    )
    confident_token_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Tokens that the old policy gave at least this probability are left out of the policy loss, of "
            "its KL and of whitening. `None` for no mask."
        },
    )
    positive_lm_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the negative log-likelihood of responses above `positive_lm_threshold`."},
    )
    positive_lm_threshold: float = field(
        default=0.5, metadata={"help": "Reward above which a response counts as correct there."}
    )
    loss_aggregation: str = field(
        default="token-mean",
        metadata={
            "help": "How token losses are averaged over an optimizer step.",
            "choices": list(CHOICES["loss_aggregation"]),
        },
    )
    kl_aggregation: str | None = field(
        default=None,
        metadata={
            "help": "The same for the KL term of the loss. Defaults to `loss_aggregation`.",
            "choices": list(AGGREGATIONS),
        },
    )
    avoid_padding: bool = field(
        default=True,
        metadata={
            "help": "Whether rows of like length go through the model together, without the padding that they have in "
            "common. The gradients of optimizer steps stay the same."
        },
    )
    reuse_image_features: bool = field(
        default=True,
        metadata={
            "help": "Whether a frozen vision tower of a model like Qwen's computes the features of an image once a "
            "rollout, for all responses to its prompt and all forwards."
        },
    )
    num_mini_batches: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps per rollout batch. Defaults to 4, or to what `steps_per_generation` or "
            "`generation_batch_size` imply if one of those is set."
        },
    )

    @classmethod
    def from_preset(cls, preset: str, output_dir: str | None = None, **overrides) -> SAPOConfig:
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
    def learns_critic(self) -> bool:
        """Whether a value model is trained."""
        return self.critic in LEARNED_CRITICS

    def __post_init__(self):
        check_config(self)

        if self.num_mini_batches is None and self.steps_per_generation is None and self.generation_batch_size is None:
            self.num_mini_batches = 4
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = self.num_mini_batches * self.gradient_accumulation_steps

        if self.num_generations == 1:
            self.num_generations = _OneGeneration(1)
        super().__post_init__()
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


def default_settings() -> dict[str, Any]:
    """The defaults of [`SAPOConfig`] for all settings of [`~sapo_trl.presets.AXES`]."""
    defaults = {setting.name: setting.default for setting in fields(SAPOConfig)}
    return {name: defaults[name] for names in AXES.values() for name in names}
