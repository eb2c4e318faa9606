"""The types of a rollout: a batch with its columns, a forward, a record of TRL's part, a segmented rollout."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from transformers import PreTrainedTokenizerBase

from ..metrics import Measurements
from ..rewards.steps import StepRewards
from ..segments import Segments
from .continuations import ContinuationSampler
from .prompts import TokenizedPrompts


class RolloutBatch(TypedDict, total=False):
    """
    A rollout of this process, or a micro-batch of it: `B` rows, prompts of `P` tokens padded on the left, completions
    of `T` tokens padded on the right. TRL shuffles the rows and cuts them into micro-batches, lists like tensors.
    """

    # From TRL.
    prompt_ids: torch.Tensor  # int64 (B, P)
    prompt_mask: torch.Tensor  # int64 (B, P), 1 on tokens
    completion_ids: torch.Tensor  # int64 (B, T)
    completion_mask: torch.Tensor  # int64 (B, T), 1 on tokens, 0 on all of a truncated response that is masked
    tool_mask: torch.Tensor  # int64 (B, T), 0 on tokens that a tool wrote
    num_items_in_batch: torch.Tensor  # int64 (), tokens of the optimizer step
    old_per_token_logps: torch.Tensor  # float32 (B, T), under the policy at the time of the rollout
    ref_per_token_logps: torch.Tensor  # float32 (B, T), under the reference model
    sampling_per_token_logps: torch.Tensor  # float32 (B, T), as the engine that sampled reported them
    importance_sampling_ratio: torch.Tensor  # float32 (B, T) or (B, 1), the correction for that engine
    advantages: torch.Tensor  # float32: (B,) from TRL, (B, T) in the training batch, 0 where the policy does not learn

    # From the processor of an image-text model; each model family has some of them.
    pixel_values: torch.Tensor  # float, patches or tiles of all images
    image_grid_thw: torch.Tensor  # int64 (N, 3), patches of each image by time, height and width
    num_images: list[int]  # B, images of each row
    num_tiles: list[int]  # B, tiles of each row
    pixel_attention_mask: torch.Tensor  # int64, which pixels or patches are no padding
    spatial_shapes: torch.Tensor  # int64, height and width of each tile
    image_sizes: torch.Tensor  # int64 (N, 2)
    image_position_ids: torch.Tensor  # int64, place of each patch
    token_type_ids: torch.Tensor  # int64 (B, P + T)
    mm_token_type_ids: torch.Tensor  # int64 (B, P + T), 1 on image tokens

    # From the stages that score a rollout.
    rewards: torch.Tensor  # float32 (B,), NaN for a response without a reward
    token_rewards: torch.Tensor  # float32 (B, T): rewards, placed on their tokens; not in the training batch
    returns: torch.Tensor  # float32 (B, T), the critic's targets
    old_values: torch.Tensor  # float32 (B, T), the critic's values at the time of the rollout
    segment_ids: torch.Tensor  # int64 (B, T), -1 outside the segments
    segment_counts: list[int]  # B, segments of each row
    policy_mask: torch.Tensor  # bool (B, T), the tokens that the policy learns from
    response_dependency: torch.Tensor  # float32 (B,), mean dependence of tokens on images, NaN without tokens
    corrupted_per_token_logps: torch.Tensor  # float32 (B, T), under the old policy with corrupted images
    corruption_seeds: list[int]  # B, seed of the corruption of each row's images
    has_image: torch.Tensor  # bool (B,)
    rollout_rows: torch.Tensor  # int64 (B,), place of each row in the rollout

    # From the bridge: known once for a rollout, so that no micro-batch asks the device for them.
    image_keys: list[list[tuple[int, int, int, int]]]  # B, a key of each image
    token_counts: list[int]  # B, tokens of each row without padding


@dataclass
class PolicyForward:
    """
    The result of one forward of the policy over completions.

    Args:
        logps (`torch.Tensor`):
            float32 (float64 of a model in float64) `(B, T)`, log-probabilities of the completion tokens at the
            sampling temperature.
        entropies (`torch.Tensor`): the same, entropies of these distributions.
        values (`torch.Tensor`, *optional*): the same, with a critic that reads the policy's hidden states.
        aux_loss (`torch.Tensor`, *optional*): 0-dimensional, the load-balancing loss of a mixture of experts.
        corrupted_logps (`torch.Tensor`, *optional*): the same as `logps`, with corrupted images.
    """

    logps: torch.Tensor
    entropies: torch.Tensor
    values: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    corrupted_logps: torch.Tensor | None = None


@dataclass
class GivenRollout:
    """
    Responses that TRL scores and trains on instead of responses that it samples.

    Args:
        inputs (`list[dict]`): the row of the data set of each response, as many as TRL asked for.
        completion_ids (`list[list[int]]`): token ids of each response.
        rewards_per_func (`torch.Tensor`): float32 `(B, F)`, this process's rewards by reward function, for the log.
        outcomes (`torch.Tensor`): float32 `(B,)`, the rewards that count.
        tensors (`dict[str, torch.Tensor]`, *optional*): more about each response, for the stages that score it.
    """

    inputs: list[dict[str, Any]]
    completion_ids: list[list[int]]
    rewards_per_func: torch.Tensor
    outcomes: torch.Tensor
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class RolloutRecord:
    """
    TRL's intermediate results of a rollout, which it does not return, and their times (seconds).

    `rewards` are all processes' responses' rewards. `final_rewards` are of this process's responses, without the parts
    that have a place in the text; `steps` has these parts. `rewards_per_func` are this process's rewards by reward
    function, `(B, F)`. All three are `None` for a given rollout. `sampled_at` are the optimizer
    steps behind the weights that sampled the responses, with `rollouts_ahead`; `None` for the present ones.
    """

    started: float = field(default_factory=time.perf_counter)
    generated: float | None = None
    reward_started: float | None = None
    reward_seconds: float = 0.0
    rewards: torch.Tensor | None = None
    final_rewards: torch.Tensor | None = None
    rewards_per_func: torch.Tensor | None = None
    steps: StepRewards | None = None
    inputs: list[dict[str, Any]] = field(default_factory=list)
    prompts: TokenizedPrompts | None = None
    given: GivenRollout | None = None
    metrics: Measurements = field(default_factory=dict)
    sampled_at: int | None = None
    forwards: list[tuple[torch.Tensor, PolicyForward]] = field(default_factory=list)

    @property
    def has_steps(self) -> bool:
        """Whether some rewards of this process have places in the text."""
        return self.steps is not None and bool(self.steps.by_function)

    def forward_behind(self, logps: torch.Tensor | None) -> PolicyForward | None:
        """The recorded forward that produced these very log-probabilities (the same tensor), if any did."""
        return next((forward for produced, forward in self.forwards if produced is logps), None)

    def mark_generated(self) -> None:
        """The first thing TRL does with completions ends their generation."""
        if self.generated is None:
            self.generated = time.perf_counter()

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of TRL's part of the rollout, by stage."""
        return {
            "generate": self.generated - self.started,
            "score": self.reward_started - self.generated,
            "reward": self.reward_seconds,
        }


@dataclass(frozen=True)
class RewardParts:
    """
    The reward functions of a run and their rewards.

    Args:
        names (`list[str]`): names of the `F` functions.
        weights (`list[float]`): their weights in the reward of a response.
        rewards (`torch.Tensor`): float32 `(B, F)`, not weighted, NaN where a function has not scored the response.
    """

    names: list[str]
    weights: list[float]
    rewards: torch.Tensor


@dataclass
class SegmentedRollout:
    """
    A scored and segmented rollout of this process, before it is cut into micro-batches. `(B, T)` tensors are 0 or
    arbitrary outside the segments.

    Args:
        segments ([`Segments`]): the partition.
        completion_ids (`torch.Tensor`): int64 `(B, T)`.
        prompt_ids (`torch.Tensor`): int64 `(B, P)`.
        prompt_mask (`torch.Tensor`): int64 `(B, P)`.
        logps (`torch.Tensor`): float32 `(B, T)`, log-probabilities under the policy that produced the rollout.
        entropies (`torch.Tensor`): float32 `(B, T)`, of the same policy.
        values (`torch.Tensor`): float32 `(B, T)`, values of the states before each token.
        token_rewards (`torch.Tensor`):
            float32 `(B, T)`: rewards, placed on their tokens, minus the KL penalty if it is part of the reward.
        advantages (`torch.Tensor`): float32 `(B, T)`, as the loss uses them.
        returns (`torch.Tensor`): float32 `(B, T)`.
        rewards (`torch.Tensor`): float32 `(B,)`, NaN for a response that no reward function could score.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the completions.
        mode (`str`): `"train"` or `"eval"`.
        continuations ([`~sapo_trl.rollouts.ContinuationSampler`], *optional*):
            continues a response's prefix with the policy; `None` if the trainer did not generate the rollout itself.
        completion_mask (`torch.Tensor`, *optional*):
            int64 `(B, T)`, 1 on every token. It includes tools' answers, which are in no segment.
        images (`list[list]`, *optional*): the images of each response's prompt.
        policy_mask (`torch.Tensor`, *optional*): bool `(B, T)`, the tokens that the policy learns from.
        visual_dependency (`torch.Tensor`, *optional*):
            float32 `(B, T)`, each token's dependence on the images, see [`~sapo_trl.visual_dependency`]; `None` if no
            setting asks for it.
        raw_advantages (`torch.Tensor`, *optional*):
            float32 `(B, T)`: the advantages before whitening, clamp, weights of tokens, and mask.
        value_states (`torch.Tensor`, *optional*):
            bool `(B, T)`, the tokens before which a value is used for advantages; `None` if they use no values.
        td_errors (`torch.Tensor`, *optional*):
            float32 `(B, T)`, the TD error of each token's segment, see [`~sapo_trl.advantages.td_errors`]; `None` as
            for `value_states`, NaN while the gate on the critic is closed.
        reward_parts ([`RewardParts`], *optional*): the reward of each function.
        answers (`list`, *optional*): the right answer of each response's row, `None` if its row has none.
        corrupted_images (`Callable`, *optional*):
            `number -> list[list[PIL.Image.Image]]`: the corrupted images of the first responses, as the policy saw
            them; `None` if no setting compares images.
        sampled_at (`int`, *optional*):
            optimizer steps behind the weights that sampled the responses, with `rollouts_ahead`; `None` for the
            present ones.
    """

    segments: Segments
    completion_ids: torch.Tensor
    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor
    values: torch.Tensor
    token_rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    rewards: torch.Tensor
    tokenizer: PreTrainedTokenizerBase
    mode: str
    continuations: ContinuationSampler | None = None
    completion_mask: torch.Tensor | None = None
    images: list[list[Any]] | None = None
    policy_mask: torch.Tensor | None = None
    visual_dependency: torch.Tensor | None = None
    raw_advantages: torch.Tensor | None = None
    value_states: torch.Tensor | None = None
    td_errors: torch.Tensor | None = None
    reward_parts: RewardParts | None = None
    answers: list[Any] | None = None
    corrupted_images: Callable[[int], list[list[Any]]] | None = None
    sampled_at: int | None = None
