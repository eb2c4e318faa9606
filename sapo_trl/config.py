"""Settings of [`SAPOTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import SchedulerType
from trl import GRPOConfig

from .losses import AGGREGATIONS
from .segmentation import check_top_percent
from .token_rewards import KL_ESTIMATORS


LOSS_TYPE = "segment_clip"

_CHOICES = {
    "segmentation": ("entropy", "probability", "newline", "step", "token", "sequence"),
    "segment_cut": ("end", "start"),
    "value_state": ("start", "end"),
    "critic": ("separate", "shared", "none"),
    "kl_placement": ("reward", "loss"),
    "kl_estimator": KL_ESTIMATORS,
    "importance_sampling_level": ("segment", "token", "sequence"),
    "loss_aggregation": AGGREGATIONS,
    "value_loss_aggregation": AGGREGATIONS,
}

# GRPO settings that have no meaning in the segment loss, with the only value they may have.
_UNUSED_GRPO_SETTINGS = {
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_adaptive_entropy": False,
    "multi_objective_aggregation": "sum_then_normalize",
}

# Schedules that follow a metric, which the critic's schedule is not given.
_METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


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
    settings start with `sapo_temperature`: those have no effect here.

    This class includes only the parameters that are specific to SAPO training, and those of [`~trl.GRPOConfig`] with
    another default. Defaults are the paper's (Table 7) where it states them, otherwise those of its official script.

    Parameters:
        > Parameters that control the segmentation

        segmentation (`str`, *optional*, defaults to `"entropy"`):
            Where responses are cut: `"entropy"` (at the highest-entropy tokens), `"probability"` (at a fixed number of
            least probable tokens), `"newline"`, `"step"` (at "Step 1:" …), `"token"` (every token is a segment, as in
            PPO) or `"sequence"` (the response is one segment). To cut in another way, pass `segmenter` to the trainer.
        top_percent (`float`, *optional*, defaults to `30.0`):
            For `"entropy"`: share of each response's tokens to cut at, in percent, in (0, 100].
        segment_cut (`str`, *optional*, defaults to `"end"`):
            For `"entropy"` and `"probability"`: whether a selected token ends (`"end"`) or starts (`"start"`) its
            segment.
        num_cuts (`int`, *optional*, defaults to `8`):
            For `"probability"`: number of tokens to cut each response at.
        step_pattern (`str`, *optional*, defaults to `r"Step\s*\d+\s*[:.]"`):
            For `"step"`: regular expression of a step's announcement.

        > Parameters that control the critic

        critic (`str`, *optional*, defaults to `"separate"`):
            `"separate"`: a backbone of its own, initialised from the policy; `"shared"`: a head on the policy's hidden
            states, through which no gradient reaches the policy; `"none"`: every value is 0.
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
            Optimizer steps at the beginning of training in which only the critic learns.
        cliprange_value (`float`, *optional*, defaults to `0.5`):
            How far a value may move from its rollout-time prediction before its loss is clipped; `None` for no
            clipping.
        value_loss_aggregation (`str`, *optional*, defaults to `"token-mean"`):
            How the losses of segments are averaged: over all segments (`"token-mean"`) or per response first
            (`"seq-mean-token-mean"`, the paper's equation).

        > Parameters that control rewards and advantages

        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per segment.
        lam (`float`, *optional*, defaults to `0.99`):
            λ of the generalized advantage estimation over segments.
        critic_lam (`float`, *optional*):
            λ of the critic's targets. Defaults to `lam`; `1.0` regresses on Monte-Carlo returns (VC-PPO).
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

        importance_sampling_level (`str`, *optional*, defaults to `"segment"`):
            What shares an importance ratio: the tokens of a `"segment"`, of a `"sequence"`, or none (`"token"`).
        loss_aggregation (`str`, *optional*, defaults to `"token-mean"`):
            How token losses are averaged over an optimizer step: over all its tokens (`"token-mean"`), per response
            first (`"seq-mean-token-mean"`, the paper's equation), or summed per response and divided by
            `max_completion_length` (`"seq-mean-token-sum"`).
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
    > - `loss_type`: Defaults to `"segment_clip"`, the only one, instead of `"dapo"`.
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
        default=LOSS_TYPE,
        metadata={
            "help": "Only 'segment_clip'. TRL's 'sapo' is Qwen's Soft Adaptive Policy Optimization, not this.",
            "choices": [LOSS_TYPE],
        },
    )
    importance_sampling_level: str = field(
        default="segment",
        metadata={
            "help": "What shares an importance ratio: the tokens of a 'segment', of a 'sequence', or none ('token').",
            "choices": list(_CHOICES["importance_sampling_level"]),
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
        metadata={"help": "Where responses are cut into segments.", "choices": list(_CHOICES["segmentation"])},
    )
    top_percent: float = field(
        default=30.0,
        metadata={"help": "For 'entropy': share of each response's tokens to cut at, in percent, in (0, 100]."},
    )
    segment_cut: str = field(
        default="end",
        metadata={
            "help": "For 'entropy' and 'probability': whether a selected token ends or starts its segment.",
            "choices": list(_CHOICES["segment_cut"]),
        },
    )
    num_cuts: int = field(default=8, metadata={"help": "For 'probability': number of tokens to cut each response at."})
    step_pattern: str = field(
        default=r"Step\s*\d+\s*[:.]",
        metadata={"help": "For 'step': regular expression of a step's announcement."},
    )

    # Parameters that control the critic
    critic: str = field(
        default="separate",
        metadata={
            "help": "'separate': a backbone of its own, initialised from the policy; 'shared': a head on the policy's "
            "detached hidden states; 'none': every value is 0.",
            "choices": list(_CHOICES["critic"]),
        },
    )
    value_state: str = field(
        default="start",
        metadata={
            "help": "State whose value stands for a segment: before its first token ('start', the paper) or before "
            "its last token ('end', the official code).",
            "choices": list(_CHOICES["value_state"]),
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
            "choices": list(_CHOICES["value_loss_aggregation"]),
        },
    )

    # Parameters that control rewards and advantages
    gamma: float = field(default=1.0, metadata={"help": "Discount per segment."})
    lam: float = field(default=0.99, metadata={"help": "λ of the generalized advantage estimation over segments."})
    critic_lam: float | None = field(
        default=None,
        metadata={"help": "λ of the critic's targets. Defaults to `lam`; `1.0` regresses on Monte-Carlo returns."},
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
            "choices": list(_CHOICES["kl_placement"]),
        },
    )
    kl_estimator: str = field(
        default="k1",
        metadata={"help": "Estimator of the KL divergence.", "choices": list(_CHOICES["kl_estimator"])},
    )

    # Parameters that control the policy loss
    loss_aggregation: str = field(
        default="token-mean",
        metadata={
            "help": "How token losses are averaged over an optimizer step.",
            "choices": list(_CHOICES["loss_aggregation"]),
        },
    )
    num_mini_batches: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps per rollout batch. Defaults to 4, or to what `steps_per_generation` or "
            "`generation_batch_size` imply if one of those is set."
        },
    )

    def __post_init__(self):
        self._check_choices()
        self._check_ranges()

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

    def _check_choices(self) -> None:
        if self.loss_type != LOSS_TYPE:
            hint = ""
            if self.loss_type == "sapo":
                hint = (
                    ' In TRL, "sapo" is Qwen\'s Soft Adaptive Policy Optimization (arXiv 2511.20347); this is '
                    "Segment-Aligned Policy Optimization (arXiv 2605.01327)."
                )
            raise ValueError(
                f"`loss_type` must be {LOSS_TYPE!r}, got {self.loss_type!r}.{hint} For TRL's losses use "
                "`trl.GRPOTrainer`."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        for name, only in _UNUSED_GRPO_SETTINGS.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"`{name}` has no meaning in the segment loss: it must stay {only!r}, got {getattr(self, name)!r}."
                )
        schedules = [schedule.value for schedule in SchedulerType if schedule.value not in _METRIC_SCHEDULES]
        schedule = self.critic_lr_scheduler_type or self.lr_scheduler_type
        if self.critic != "none" and schedule not in schedules:
            raise ValueError(
                f"`critic_lr_scheduler_type` (by default `lr_scheduler_type`) must be one of {schedules}, got "
                f"{str(schedule)!r}."
            )
        if self.critic == "none" and self.critic_warmup_steps > 0:
            raise ValueError(
                f'`critic_warmup_steps={self.critic_warmup_steps}` with `critic="none"` would train nothing: it must '
                "be 0."
            )
        if self.kl_placement == "loss" and self.kl_estimator == "k1" and self.beta != 0.0:
            raise ValueError(
                '`kl_estimator="k1"` has zero expected gradient in the loss: use "k2" or "k3", or '
                '`kl_placement="reward"`.'
            )

    def _check_ranges(self) -> None:
        check_top_percent(self.top_percent)
        for name in ("gamma", "lam", "critic_lam"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")
        for name in (
            "critic_learning_rate",
            "critic_warmup_steps",
            "critic_lr_warmup_steps",
            "critic_weight_decay",
            "beta",
            "epsilon",
            "epsilon_high",
        ):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        for name in ("cliprange_value", "advantage_clamp"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive (or `None`), got {value}.")
        if self.critic_max_grad_norm is None or self.critic_max_grad_norm <= 0:
            raise ValueError(
                f"`critic_max_grad_norm` must be positive, got {self.critic_max_grad_norm}; `math.inf` clips nothing."
            )
        for name in ("num_cuts", "num_mini_batches", "num_generations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.delta is not None and self.delta <= 1.0:
            raise ValueError(f"`delta` must be greater than 1 (or `None`), got {self.delta}.")
