"""The SAPO trainer: orchestrates score → segment → value → reward → advantage → losses, and computes none of them."""

from __future__ import annotations

import logging
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from transformers.trainer_utils import TrainOutput
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

from ..advantages import leave_one_out_advantages, length_adaptive_lam, masked_whiten, segment_gae
from ..callbacks import RolloutCallback, SegmentationCallback
from ..completions_table import segment_columns
from ..config import SAPOConfig
from ..config_checks import TRL_LOSS_TYPES
from ..critic.deepspeed import DeepSpeedCritic
from ..critic.training import CRITIC_FOLDER, Critic
from ..critic.value_head import SegmentValueHead
from ..critic.warmup import CriticWarmup
from ..distributed import gradient_norm
from ..losses import (
    LossOutput,
    aggregate,
    clipped_policy_loss,
    log_ratio,
    segment_value_loss,
    soft_adaptive_policy_loss,
)
from ..metrics import MetricAccumulator, explained_variance
from ..reward_calls import checked_rewards
from ..role_aware import RoleAwareWeighting
from ..rollouts import ContinuationSampler, monte_carlo_values
from ..rollouts.placeholders import final_placeholders
from ..rollouts.types import GivenRollout, PolicyForward, RolloutBatch, RolloutRecord, SegmentedRollout
from ..sampler_correction import importance_correction, logp_difference
from ..segmentation import Segmenter, accepted_inputs, is_uncertain
from ..segments import Segments
from ..token_rewards import kl_estimate, outcome_token_rewards
from .checkpoint_parts import CallbackStates, Checkpointed, CriticPart, ReplayPart, SkippedSteps, WarmupPart
from .checks import (
    check_adapter_name,
    check_adapters,
    check_finite_weights,
    check_images,
    check_padding_side,
    check_prompt_column,
    check_sampler,
    check_segments,
    check_size,
    check_special_tokens,
    check_takes_images,
    check_value_model,
    datasets_of,
)
from .model_card import complete_model_card
from .setup import check_tokenizer_of, make_role_aware_weighting, make_segmenter, make_value_head
from .step_guard import StepGuard
from .tree_rollout import TreeRollouts
from .trl.bridge import GRPOBridge
from .trl.resume import TrainingIsOver


logger = logging.getLogger(__name__)


class SAPOTrainer(GRPOBridge):
    """
    Trainer for Segment-Aligned Policy Optimization (SAPO), https://huggingface.co/papers/2605.01327.

    A response is cut into segments at its high-entropy tokens; a critic values the states between them; advantages and
    importance ratios are computed per segment. Everything else (prompts, generation with transformers or vLLM, reward
    functions, tools, PEFT, distributed training, logging) is [`~trl.GRPOTrainer`]'s.

    Not to be confused with Qwen's *Soft Adaptive* Policy Optimization, TRL's `loss_type="sapo"`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to train: a causal LM or an image-text model, see [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Reward functions, see [`~trl.GRPOTrainer`].
        args ([`SAPOConfig`], *optional*):
            Configuration. If `None`, the default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Data set with a column `prompt`, and `images` or `image` for image-text models; further columns go to the
            reward functions.
        value_model (`str` or [`SegmentValueHead`] or [`~transformers.PreTrainedModel`], *optional*):
            Critic, or the model to make it from. By default a copy of the policy, as `args.critic` says.
        segmenter ([`Segmenter`], *optional*):
            How to cut responses: any callable `(entropies, mask) -> Segments`. By default what `args.segmentation`
            says.
        token_weighting ([`~sapo_trl.role_aware.RoleAwareWeighting`], *optional*):
            How to weigh the tokens' advantages. By default what `args.advantage_weighting` says.
        kwargs:
            All other arguments of [`~trl.GRPOTrainer`], unchanged: `eval_dataset`, `processing_class`,
            `reward_processing_classes`, `callbacks`, `optimizers`, `quantization_config`, `peft_config`, `tools`,
            `rollout_func`, `environment_factory`.

    Example:

    ```python
    from datasets import load_dataset
    from sapo_trl import SAPOConfig, SAPOTrainer
    from sapo_trl.data import to_prompts
    from sapo_trl.rewards import accuracy_reward

    dataset = load_dataset("hiyouga/geometry3k", split="train")
    trainer = SAPOTrainer(
        model="Qwen/Qwen2.5-VL-3B-Instruct",
        reward_funcs=accuracy_reward,
        args=SAPOConfig(output_dir="sapo"),
        train_dataset=to_prompts(dataset, prompt_template="boxed"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "sapo", "segment-aligned-policy-optimization"]
    _name = "SAPO"
    _paper = {
        "title": "Segment-Aligned Policy Optimization for Multi-Modal Reasoning",
        "id": "2605.01327",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{gao2026segment,
                title        = {{Segment-Aligned Policy Optimization for Multi-Modal Reasoning}},
                author       = {Gao, Lei and Li, Zhuoming and Jia, Mengxi and Yuan, Jiakang and others},
                year         = 2026,
                eprint       = {arXiv:2605.01327},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: SAPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *,
        value_model: str | SegmentValueHead | PreTrainedModel | None = None,
        segmenter: Segmenter | None = None,
        token_weighting: RoleAwareWeighting | None = None,
        **kwargs,
    ):
        model, value_model = (str(m) if isinstance(m, Path) else m for m in (model, value_model))
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SAPOConfig(f"{model_name.split('/')[-1]}-SAPO")
        if not isinstance(args, SAPOConfig):
            raise TypeError(f"`args` must be a `SAPOConfig`, got `{type(args).__name__}`.")
        if kwargs.get("environment_factory") is None:  # an environment may bring the prompts
            check_prompt_column(train_dataset, "train_dataset")
            for name, dataset in datasets_of(kwargs.get("eval_dataset")).items():
                check_prompt_column(dataset, name)
        if token_weighting is not None and not isinstance(token_weighting, RoleAwareWeighting):
            raise TypeError(
                f"`token_weighting` must be a `RoleAwareWeighting`, got {token_weighting!r}. Its fields take other "
                "functions."
            )
        if segmenter is not None and (isinstance(segmenter, type) or not callable(segmenter)):
            raise TypeError(
                f"`segmenter` must be a callable `(entropies, mask) -> Segments`, got {segmenter!r}. Pass an "
                "instance, or name one of the built-in ones with `SAPOConfig(segmentation=...)`."
            )
        if value_model is not None and not args.learns_critic:
            raise ValueError(f"`value_model` was given, but `critic={args.critic!r}`: drop one of the two.")
        if args.critic in ("monte_carlo", "tree"):
            for name in ("rollout_func", "environment_factory", "tools"):
                if kwargs.get(name):
                    raise ValueError(
                        f"`critic={args.critic!r}` continues responses from their tokens alone; `{name}` decides on "
                        "responses in another way and cannot be combined with it."
                    )

        check_adapter_name(model, args.beta)

        # Made before TRL sees the model, because it may put adapters into it and the critic starts from the policy as
        # it is now; seeded like TRL seeds what it initialises.
        set_seed(args.seed)
        value_head = None
        if args.critic == "adapter" and kwargs.get("peft_config") is None and not hasattr(model, "peft_config"):
            raise ValueError(
                '`critic="adapter"` lives beside the policy\'s adapter: pass a `peft_config` (or a policy that has an '
                "adapter)."
            )
        if args.learns_critic and args.critic != "adapter":
            quantized = kwargs.get("quantization_config") or (args.model_init_kwargs or {}).get("quantization_config")
            if quantized is not None and args.critic == "separate" and value_model is None:
                raise ValueError(
                    'A quantized policy cannot be copied into a trainable critic: use `critic="adapter"` or '
                    '`critic="shared"`, or pass a `value_model` in a floating-point dtype.'
                )
            value_head = make_value_head(model, value_model, args)

        reward_funcs = checked_rewards(reward_funcs, args.reward_timeout)
        super().__init__(model, reward_funcs, args, train_dataset=train_dataset, **kwargs)

        check_adapters(self.accelerator.unwrap_model(self.model))
        check_padding_side(self.processing_class)
        check_special_tokens(self.tokenizer, self.model)
        for dataset in (train_dataset, *datasets_of(kwargs.get("eval_dataset")).values()):
            check_images(dataset, self.processing_class, self.model, self.chat_template_kwargs)
        self.segmenter: Segmenter = segmenter if segmenter is not None else make_segmenter(args)
        self._segmenter_is_configured = segmenter is None
        self._segmenter_inputs = accepted_inputs(self.segmenter)
        self.token_weighting = token_weighting
        if token_weighting is None and args.advantage_weighting == "role_aware":
            self.token_weighting = make_role_aware_weighting(args)
        if self.token_weighting is not None:
            check_takes_images(self.model)

        if args.critic == "adapter":
            # On the policy as TRL has wrapped it. By now each process has random numbers of its own, but the critic is
            # one: it is drawn from the common seed, and what is drawn later does not depend on it.
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)
                value_head = make_value_head(self.accelerator.unwrap_model(self.model), value_model, args)
        self.critic: Critic | None = None
        if value_head is not None:
            if isinstance(value_model, str):
                check_tokenizer_of(value_model, self.tokenizer)
            self.critic = self._make_critic(value_head)
        self.critic_warmup = CriticWarmup(
            args.critic_warmup_steps, args.critic_warmup_tolerance, args.num_mini_batches * args.num_iterations
        )
        self._compared_with_sampler = False
        self._step_guard = StepGuard(args, self.accelerator)
        self._trees: TreeRollouts | None = None
        if args.critic == "tree":
            self._trees = TreeRollouts(args, seed=args.seed + self.accelerator.process_index)

        self.checkpoints.parts += self._checkpoint_parts()
        self._accumulator = MetricAccumulator()
        self._micro_batch: RolloutBatch | None = None
        self._micro_batch_values: torch.Tensor | None = None
        self._step_totals: dict[str, torch.Tensor] | None = None
        self._step_losses: list[torch.Tensor] = []
        self._rollout_seconds = 0.0
        self._update_seconds = 0.0
        if not any(isinstance(callback, SegmentationCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(SegmentationCallback())

    def _make_critic(self, value_head: SegmentValueHead) -> Critic:
        check_value_model(value_head, self.model, self.tokenizer)
        if self.args.disable_dropout:
            disable_dropout_in_model(value_head)
        if value_head.backbone is not None and self.args.gradient_checkpointing:
            value_head.backbone.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        decayed = [*self.get_decay_parameter_names(value_head), *self.get_decay_parameter_names(self.model)]
        sharded = value_head.mode == "separate" and self.is_deepspeed_enabled
        critic_class = DeepSpeedCritic if sharded else Critic
        return critic_class(value_head, self.args, self.accelerator, decayed)

    def _checkpoint_parts(self) -> list[Checkpointed]:
        parts = [
            CriticPart(self.critic, self.args.critic),
            SkippedSteps(self._step_guard),
            CallbackStates(lambda: self._rollout_callbacks),
        ]
        if self.critic is not None:
            parts.append(WarmupPart(self.critic_warmup, self.args.should_save))
        if self._trees is not None:
            parts.append(ReplayPart(self._trees.replay))
        return parts

    # ------------------------------------------------------------------------------------------------- the rollout

    def plan_rollout(self, inputs: list[dict[str, Any]]) -> GivenRollout | None:
        if self._trees is None or self.mode != "train":
            return None
        examples = inputs[:: self.args.num_generations]
        prompts = self.tokenized_prompts(examples)

        @torch.no_grad()
        def score(rows: list[int], completions: list[list[int]]) -> list[torch.Tensor]:
            logps = []
            # RolloutBatch by batch, because each row brings its images along.
            for start in range(0, len(rows), self._rows_per_forward):
                chunk = slice(start, start + self._rows_per_forward)
                pad, device = self.tokenizer.pad_token_id, self.accelerator.device
                batch = prompts.model_inputs(rows[chunk], completions[chunk], pad, device)
                scored = self.policy_forward(self.model, batch).logps.cpu()
                logps.extend(row[: len(ids)].clone() for row, ids in zip(scored, completions[chunk], strict=True))
            return logps

        sampler = self.continuation_sampler(prompts, examples)
        return self._trees.plan(examples, prompts, sampler, score, len(inputs), self._accumulator)

    @torch.no_grad()
    def score_rollout(self, batch: RolloutBatch, record: RolloutRecord) -> RolloutBatch:
        seconds = record.stage_seconds()
        rewards = self.processes.own_rows(record.rewards, batch["completion_ids"].size(0))
        # Tool outputs, padding, masked truncations, and responses that no reward function could score.
        mask = _loss_mask(batch) & ~rewards.isnan().unsqueeze(1)

        started = time.perf_counter()
        forward = record.forward_behind(batch.get("old_per_token_logps"))
        if forward is None:
            forward = self.policy_forward(self.model, batch, self._rows_per_forward)
        if record.given is not None:
            mask, forward = self._given_edges(forward, mask, record.given)
        seconds["score"] += time.perf_counter() - started

        self._compare_with_sampler(forward, batch, mask)
        if self.placeholder_ids:
            ids, pad = batch["completion_ids"], self.tokenizer.pad_token_id
            cut = final_placeholders(ids, self.placeholder_ids, pad).any(dim=1)
            self._accumulator.add_total("completions/placeholder_ratio", cut.sum(), len(cut))
        batch["rewards"] = rewards
        segments = self.segment(forward, batch, mask)
        policy_mask = self._policy_mask(forward, segments)

        started = time.perf_counter()
        values = self.estimate_values(forward, batch, segments, policy_mask, record)
        seconds["value"] = time.perf_counter() - started

        token_rewards = self._token_rewards(rewards, forward, batch, mask)
        advantages, returns = self.estimate_advantages(token_rewards, values, segments, batch)
        advantages = self._normalized(advantages, policy_mask)
        if self.token_weighting is not None:
            advantages = advantages * self._token_weights(forward, batch, mask)
        if self.args.loss_type in TRL_LOSS_TYPES and not self.args.use_vllm:
            # TRL's losses correct for its own samplers alone. A positive factor may as well go into the advantage.
            advantages = advantages * batch.pop("importance_sampling_ratio", 1.0)

        batch["advantages"] = advantages
        batch["returns"] = returns
        batch["old_values"] = values
        batch["segment_ids"] = segments.ids
        # On the host: a micro-batch that had to ask the device for its largest would wait for it.
        batch["segment_counts"] = segments.count.tolist()
        batch["policy_mask"] = policy_mask
        # TRL shuffles: with these, callbacks know the rows of micro-batches again.
        batch["rollout_rows"] = torch.arange(len(rewards), device=rewards.device)
        if self.args.loss_type not in TRL_LOSS_TYPES or record.given is not None or "old_per_token_logps" in batch:
            # Without them TRL's losses take the ratio as exactly 1, which it is when it needs none.
            batch["old_per_token_logps"] = forward.logps

        rollout = SegmentedRollout(
            segments=segments,
            completion_ids=batch["completion_ids"],
            prompt_ids=batch["prompt_ids"],
            prompt_mask=batch["prompt_mask"],
            logps=forward.logps,
            entropies=forward.entropies,
            values=values,
            token_rewards=token_rewards,
            advantages=advantages,
            returns=returns,
            rewards=rewards,
            tokenizer=self.tokenizer,
            mode=self.mode,
            continuations=self._continuations(record),
            completion_mask=batch["completion_mask"],
            images=_images_of(record.inputs),
        )
        self._log_rollout(rollout, policy_mask, seconds)
        if record.given is not None:
            roots = record.given.tensors["root_values"]
            total = self._sum_over_processes(torch.stack([roots.nansum(), (~roots.isnan()).sum().to(roots.dtype)]))
            # TRL's would be the mean over the edges that were drawn, all of which matter.
            self.pending_log.replace("reward", float(total[0] / total[1]), self.mode)
        self._rollout_seconds += time.perf_counter() - record.started
        return batch

    def _continuations(self, record: RolloutRecord) -> ContinuationSampler | None:
        """What samples continuations of this rollout's responses, if they are made of tokens alone."""
        if record.prompts is None or self.tools or self.environments or self.max_completion_length is None:
            return None
        return self.continuation_sampler(record.prompts, record.inputs, record.given)

    def _compare_with_sampler(self, forward: PolicyForward, batch: RolloutBatch, mask: torch.Tensor) -> None:
        """Measure how far the engine that sampled differs from the policy; correct for it where TRL does not."""
        args, sampling_logps = self.args, batch.get("sampling_per_token_logps")
        if sampling_logps is None:
            return
        total, count = logp_difference(forward.logps, sampling_logps, mask)
        if not args.use_vllm:  # else TRL logs and corrects
            self._accumulator.add_total("sampling/sampling_logp_difference/mean", total, count)
            if args.vllm_importance_sampling_correction:
                batch["importance_sampling_ratio"] = importance_correction(
                    forward.logps,
                    sampling_logps,
                    mask,
                    args.vllm_importance_sampling_mode,
                    args.vllm_importance_sampling_clip_min,
                    args.vllm_importance_sampling_clip_max,
                )
        if self.mode == "train" and not self._compared_with_sampler:
            self._compared_with_sampler = True
            total, count = self._sum_over_processes(torch.stack([total, count.to(total.dtype)])).tolist()
            check_sampler(total / max(count, 1), args.max_sampler_logp_difference)

    def _given_edges(
        self, forward: PolicyForward, mask: torch.Tensor, given: GivenRollout
    ) -> tuple[torch.Tensor, PolicyForward]:
        """Of a given path only its last edge is trained on, with the log-probabilities of when it was sampled."""
        position = torch.arange(mask.size(1), device=mask.device)
        mask = mask & (position >= given.tensors["edge_start"].unsqueeze(1))
        old_logps = given.tensors["old_logps"][:, : mask.size(1)]
        old_logps = torch.nn.functional.pad(old_logps, (0, mask.size(1) - old_logps.size(1)))
        return mask, replace(forward, logps=torch.where(mask, old_logps, forward.logps))

    def segment(self, forward: PolicyForward, batch: RolloutBatch, mask: torch.Tensor) -> Segments:
        """
        Partition a rollout, once. Everything downstream reads the result.

        Args:
            forward ([`PolicyForward`]): of the policy that produced the rollout.
            batch (`dict`): the rollout.
            mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens to partition.

        Returns:
            [`Segments`]
        """
        available = {
            "logps": forward.logps,
            "completion_ids": batch["completion_ids"],
            "tokenizer": self.tokenizer,
        }
        inputs = {name: available[name] for name in self._segmenter_inputs}
        segments = self.segmenter(forward.entropies, mask, **inputs)
        check_segments(segments, mask)
        return segments

    def shared_values(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.critic.module(hidden_states=hidden_states)

    def _policy_mask(self, forward: PolicyForward, segments: Segments) -> torch.Tensor:
        """bool `(B, T)`: the tokens that the policy learns from."""
        if self.args.confident_token_threshold is None:
            return segments.mask
        return segments.mask & is_uncertain(forward.logps, self.args.confident_token_threshold)

    def estimate_values(
        self,
        forward: PolicyForward,
        batch: RolloutBatch,
        segments: Segments,
        policy_mask: torch.Tensor,
        record: RolloutRecord,
    ) -> torch.Tensor:
        """
        Values of the states that the advantages are computed from.

        Args:
            forward ([`PolicyForward`]): of the policy that produced the rollout.
            batch (`dict`): the rollout.
            segments ([`Segments`]): its partition.
            policy_mask (`torch.Tensor`): bool `(B, T)`, the tokens that the policy learns from.
            record ([`RolloutRecord`]): its prompts and rewards.

        Returns:
            `torch.Tensor`: float32 `(B, T)`, at `t` the value of the state before token `t`.
        """
        critic = self.args.critic
        if critic in ("separate", "adapter"):
            return self.critic_forward(self.critic.module, batch, self._rows_per_forward)
        if critic == "shared":
            return forward.values
        if critic == "tree" and record.given is not None:
            return record.given.tensors["parent_values"].unsqueeze(1).expand_as(forward.logps).to(forward.logps.dtype)
        if critic == "monte_carlo" and self.mode == "train":
            return self._monte_carlo_values(batch, segments, policy_mask, record)
        return torch.zeros_like(forward.logps)

    def _monte_carlo_values(
        self, batch: RolloutBatch, segments: Segments, policy_mask: torch.Tensor, record: RolloutRecord
    ) -> torch.Tensor:
        args = self.args
        values, sampled = monte_carlo_values(
            self._continuations(record),
            segments,
            policy_mask,
            batch["completion_ids"],
            batch["rewards"],
            args.num_continuations,
            args.max_valued_segments,
            args.truncated_continuation_reward,
        )
        scored = sampled.values[~sampled.values.isnan()]
        self._accumulator.add_total("monte_carlo/value", scored.sum(), len(scored))
        for name, number in (
            ("monte_carlo/states", len(sampled.values)),
            ("monte_carlo/unique_states", sampled.num_states),
            ("monte_carlo/tokens", sampled.num_tokens),
            ("time/monte_carlo", sampled.seconds),
        ):
            self._accumulator.add_total(name, torch.tensor(float(number)), 1.0)
        return values

    def _token_rewards(
        self, rewards: torch.Tensor, forward: PolicyForward, batch: RolloutBatch, mask: torch.Tensor
    ) -> torch.Tensor:
        """float32 `(B, T)`: the outcome on each response's last token, and the KL penalty if it goes there."""
        token_rewards = outcome_token_rewards(rewards, mask)
        if "ref_per_token_logps" not in batch:
            return token_rewards
        kl = kl_estimate(forward.logps, batch["ref_per_token_logps"], self.args.kl_estimator)
        kl = torch.where(mask, kl, 0)
        if self.args.loss_type not in TRL_LOSS_TYPES:  # those log it themselves
            self._accumulator.add_total("kl", kl.sum(), mask.sum())
        return token_rewards - self.args.beta * kl if self.args.kl_placement == "reward" else token_rewards

    def estimate_advantages(
        self, token_rewards: torch.Tensor, values: torch.Tensor, segments: Segments, batch: RolloutBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Advantages, not normalized yet, and the critic's targets.

        Args:
            token_rewards (`torch.Tensor`): float32 `(B, T)`.
            values (`torch.Tensor`): float32 `(B, T)`, of [`SAPOTrainer.estimate_values`].
            segments ([`Segments`]): the partition.
            batch (`dict`): the rollout; TRL's own advantages are in it.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: float32 `(B, T)` each, 0 outside the segments.
        """
        args = self.args
        if args.advantage_estimator == "gae":
            lam = args.lam
            if args.length_adaptive_lam is not None:
                lam = length_adaptive_lam(segments, args.length_adaptive_lam)
            return segment_gae(token_rewards, values, segments, args.gamma, lam, args.value_state, args.critic_lam)
        # A response without tokens to learn from (truncated and masked, or unscored: NaN) keeps its reward.
        outcomes = torch.where(segments.count > 0, token_rewards.sum(dim=1), batch["rewards"])
        if args.advantage_estimator == "group":
            advantages = batch["advantages"]
        elif args.advantage_estimator == "leave_one_out":
            generations = args.num_generations if self.mode == "train" else self.num_generations_eval
            everyone = leave_one_out_advantages(self.accelerator.gather(outcomes), generations)
            advantages = self.processes.own_rows(everyone, outcomes.size(0))
        else:
            advantages = masked_whiten(outcomes, ~outcomes.isnan(), self._sum_over_processes)
        return torch.where(segments.mask, advantages.unsqueeze(1), 0), torch.where(
            segments.mask, outcomes.unsqueeze(1), 0
        )

    def _normalized(self, advantages: torch.Tensor, policy_mask: torch.Tensor) -> torch.Tensor:
        """float32 `(B, T)`: whitened and clamped, as the loss uses them; 0 where the policy does not learn."""
        advantages = torch.where(policy_mask, advantages, 0)
        self._accumulator.add_total("advantages/raw_mean", advantages.sum(), policy_mask.sum())
        if self.args.whiten_advantages:
            advantages = masked_whiten(advantages, policy_mask, self._sum_over_processes)
        if self.args.advantage_clamp is not None:
            advantages = advantages.clamp(-self.args.advantage_clamp, self.args.advantage_clamp)
        return advantages

    def _token_weights(self, forward: PolicyForward, batch: RolloutBatch, mask: torch.Tensor) -> torch.Tensor:
        # Other patches are hidden in every rollout.
        weighting = replace(self.token_weighting, seed=self.token_weighting.seed + self.state.global_step)
        weights, metrics = weighting(
            batch=batch,
            completion_ids=batch["completion_ids"],
            mask=mask,
            logps=forward.logps,
            tokenizer=self.tokenizer,
            forward=lambda changed: self.policy_forward(self.model, changed, self._rows_per_forward).logps,
            pad_id=self.tokenizer.pad_token_id,
            reduce=self._sum_over_processes,
        )
        for name, (total, count) in metrics.items():
            self._accumulator.add_total(name, total, count)
        return weights

    def _log_rollout(self, rollout: SegmentedRollout, policy_mask: torch.Tensor, seconds: dict[str, float]) -> None:
        """Measure a rollout, show it to the callbacks, and write what was measured to the log."""
        mask, states = rollout.segments.mask, rollout.segments.state_mask(self.args.value_state)
        values, returns = rollout.values, rollout.returns
        self._accumulator.add_total("advantages/abs_mean", rollout.advantages.abs().sum(), policy_mask.sum())
        if self.args.confident_token_threshold is not None:
            self._accumulator.add_total("policy_mask/share", policy_mask.sum(), mask.sum())
        self._accumulator.add_total("returns/mean", torch.where(states, returns, 0).sum(), states.sum())
        if self.critic is not None:
            self._accumulator.add_total("value/mean", torch.where(states, values, 0).sum(), states.sum())
            self._accumulator.add_mean(
                "value/explained_variance", explained_variance(values, returns, states, self._sum_over_processes)
            )
        for callback in self._rollout_callbacks:
            callback.on_rollout(self.args, self.state, self.control, rollout, self._accumulator)
        mean_advantages = rollout.advantages.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        self.pending_log.replace_advantages(self.accelerator.gather(mean_advantages).tolist())
        if self.args.log_completions:
            self.pending_log.add_columns(segment_columns(rollout))
        self.pending_log.add({f"time/{stage}": spent for stage, spent in seconds.items()}, self.mode)
        self.pending_log.add(self._accumulator.flush(self.accelerator), self.mode)

    @property
    def _rollout_callbacks(self) -> list[RolloutCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, RolloutCallback)]

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    @property
    def _rows_per_forward(self) -> int:
        train = self.mode == "train"
        return self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size

    # -------------------------------------------------------------------------------------------------- the update

    def policy_loss(self, model: nn.Module, batch: RolloutBatch) -> torch.Tensor:
        args = self.args
        training = self.mode == "train"
        self._micro_batch, self._micro_batch_values = batch, None
        policy_is_frozen = training and self.critic_warmup.is_active(self.state.global_step)
        if policy_is_frozen:
            if args.critic == "shared":
                self._micro_batch_values = self.policy_forward(model, batch, frozen=True).values
            # A leaf: its gradient reaches no parameter, so the optimizer has nothing to apply.
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)

        if args.loss_type in TRL_LOSS_TYPES:
            loss, self._micro_batch_values = self.trl_loss(model, batch)
        else:
            loss = self._segment_loss(model, batch)
        if not training:
            self.pending_log.add(self._accumulator.flush(self.accelerator), self.mode)
            return loss
        return self._step_guard.for_backward(loss)

    def _segment_loss(self, model: nn.Module, batch: RolloutBatch) -> torch.Tensor:
        """This package's losses of one micro-batch: policy, KL, entropy, likelihood of correct responses, experts."""
        args = self.args
        segments, mask, old_logps = _segments_of(batch), batch["policy_mask"], batch["old_per_token_logps"]
        forward = self.policy_forward(model, batch)
        self._micro_batch_values = forward.values
        if self.mode == "train" and "rollout_rows" in batch:  # the rest of a rollout may be an older checkpoint's
            log_ratios = forward.logps.detach() - old_logps
            for callback in self._rollout_callbacks:
                callback.on_policy_forward(self.args, self.state, self.control, batch["rollout_rows"], log_ratios)

        ratio_segments = segments if args.importance_sampling_level == "segment" else None
        if args.importance_sampling_level == "sequence":
            ratio_segments = Segments(torch.where(segments.mask, 0, segments.ids), max_count=1)
        output = self._policy_term(forward.logps, batch, mask, ratio_segments)
        loss = output.loss
        self._accumulate_loss("policy_loss", output.loss)
        names = {key: name for key, name in _POLICY_METRICS.items() if key in output.metrics}
        self._accumulate_metrics(output.metrics, names, weight=mask.sum())
        if "geometric_bias" in output.metrics:
            self._accumulate_metrics(output.metrics, _SEGMENT_RATIO_METRICS, weight=ratio_segments.count.sum())
        self._accumulator.add_max("ratio/max", output.metrics["ratio_max"])
        with torch.no_grad():
            known = segments.mask
            self._accumulator.add_total("entropy", torch.where(known, forward.entropies, 0).sum(), known.sum())

        if args.beta != 0.0 and args.kl_placement == "loss":
            # Masked before the exponential: what overflows there would come back as a NaN gradient.
            kl = kl_estimate(
                torch.where(mask, forward.logps, 0),
                torch.where(mask, batch["ref_per_token_logps"], 0),
                args.kl_estimator,
            )
            if args.use_bias_correction_kl:
                kl = kl * torch.exp(
                    log_ratio(forward.logps, old_logps, ratio_segments, reduction=args.ratio_reduction)
                )
            aggregation = args.kl_aggregation or args.loss_aggregation
            kl_loss = aggregate(kl, mask, aggregation, self._normalizer(aggregation, batch, "tokens"))
            loss = loss + args.beta * kl_loss
        if args.positive_lm_coef != 0.0:
            positive = mask & (batch["rewards"] > args.positive_lm_threshold).unsqueeze(1)
            likelihood = aggregate(forward.logps, positive, normalizer=self._totals(batch)["positive_tokens"])
            self._accumulate_loss("positive_lm_loss", -likelihood)
            loss = loss - args.positive_lm_coef * likelihood
        if args.entropy_coef != 0.0:
            tokens = self._normalizer("token-mean", batch, "tokens")
            loss = loss - args.entropy_coef * aggregate(forward.entropies, mask, normalizer=tokens)
            self._accumulator.add_mean("entropy_coef", torch.tensor(args.entropy_coef))
        if forward.aux_loss is not None:
            self._accumulator.add_mean("aux_loss", forward.aux_loss)
            loss = loss + self.router_aux_loss_coef * forward.aux_loss * self._share_of_tokens(batch)
        return loss

    def _policy_term(
        self, logps: torch.Tensor, batch: RolloutBatch, mask: torch.Tensor, ratio_segments: Segments | None
    ) -> LossOutput:
        args = self.args
        common = {
            "segments": ratio_segments,
            "aggregation": args.loss_aggregation,
            "normalizer": self._normalizer(args.loss_aggregation, batch, "tokens"),
            "weights": batch.get("importance_sampling_ratio"),
            "ratio_reduction": args.ratio_reduction,
        }
        inputs = (logps, batch["old_per_token_logps"], batch["advantages"], mask)
        if args.loss_type == "soft_adaptive_gate":
            temperatures = (args.sapo_temperature_pos, args.sapo_temperature_neg)
            return soft_adaptive_policy_loss(
                *inputs, temperature_pos=temperatures[0], temperature_neg=temperatures[1], **common
            )
        return clipped_policy_loss(
            *inputs,
            clip_low=args.epsilon,
            clip_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            dual_clip=args.delta,
            **common,
        )

    def critic_loss(self, batch: RolloutBatch, values: torch.Tensor | None) -> torch.Tensor:
        """
        Loss of the critic on one micro-batch, scaled for gradient accumulation.

        Args:
            batch (`dict`): the micro-batch that the policy's loss was computed on.
            values (`torch.Tensor`, *optional*): float32 `(B, T)`, a shared critic's, from the policy's forward.

        Returns:
            `torch.Tensor`: 0-dimensional.
        """
        args = self.args
        segments = _segments_of(batch)
        if values is None:
            values = self.critic_forward(self.critic.module, batch)
        output = segment_value_loss(
            values,
            batch["old_values"],
            batch["returns"],
            segments,
            value_state=args.value_state,
            cliprange_value=args.cliprange_value,
            aggregation=args.value_loss_aggregation,
            normalizer=self._normalizer(args.value_loss_aggregation, batch, "segments"),
        )
        self._accumulate_loss("value_loss", output.loss)
        self._accumulate_metrics(output.metrics, _VALUE_METRICS, weight=segments.count.sum())
        return output.loss

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args, **kwargs) -> TrainOutput:
        check_size(self.train_dataset, self.args.generation_batch_size, self.args.num_generations)
        check_finite_weights(self.model, "The policy")
        if self.critic is not None:
            check_finite_weights(self.critic.module, "The critic")
        with self.checkpoints.run_folder():
            checkpoint = self.checkpoints.to_resume(resume_from_checkpoint)
            try:
                return super().train(checkpoint, *args, **kwargs)
            except TrainingIsOver:
                return self.end_of_training()

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        started, rollouts_before = time.perf_counter(), self._rollout_seconds
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_losses.append(loss.detach())
        if self.critic is not None:
            # After the policy's backward, so that only one of the two models' activations is alive at a time.
            with self.critic.accumulate():
                critic_loss = self.critic_loss(self._micro_batch, self._micro_batch_values)
                others = []
                if self._step_guard.engines_skip and self.accelerator.sync_gradients:
                    # DeepSpeed has updated the policy by now, or skipped its step: then the critic's goes too.
                    others = [gradient_norm(self.model, self.accelerator)]
                self.critic.backward(self._step_guard.for_backward(critic_loss, *others))
            self._step_losses.append(critic_loss.detach())
        batch, self._micro_batch, self._micro_batch_values = self._micro_batch, None, None
        # TRL produces rollouts within its training step; their seconds are logged by stage.
        rollout_seconds = self._rollout_seconds - rollouts_before
        self._update_seconds += time.perf_counter() - started - rollout_seconds
        if self.accelerator.sync_gradients:
            self._finish_optimizer_step(batch)
        return loss

    def _finish_optimizer_step(self, batch: RolloutBatch) -> None:
        numbers = [*self._step_losses, gradient_norm(self.model, self.accelerator)]
        if self.critic is not None:
            numbers.append(self.critic.clip_gradient())
            self._accumulator.add_mean("critic_lr", torch.tensor(self.critic.learning_rate))
            self._accumulator.add_mean("critic_grad_norm", numbers[-1])
        skip = self._step_guard.must_skip(numbers)
        if skip:
            # Gradients that are not there move nothing, nor do they decay weights.
            self.model.zero_grad(set_to_none=True)
            self._step_guard.report(self.state.global_step, lambda: self.optimizer_step_batches(batch))
        self._accumulator.add_mean("skipped_steps", torch.tensor(float(skip)))
        batches = self.optimizer_step_batches(batch)
        no_tokens, no_segments = self._step_guard.are_empty(
            torch.stack([self._trained_tokens(part) for part in batches]).sum(),
            torch.stack([_segments_of(part).count.sum() for part in batches]).sum(),
        )
        if no_tokens and self._step_guard.can_drop_gradients:
            # Gradients of zero would let weights decay and follow the momentum of earlier steps.
            self.optimizer.zero_grad()
        if no_tokens:
            self._accumulator.add_mean("empty_steps", torch.tensor(1.0))
        if self.critic is not None:
            self.critic.step(skip or no_segments)
        self._accumulator.add_mean("time/update", torch.tensor(self._update_seconds))
        metrics = self._accumulator.flush(self.accelerator)
        if self.critic_warmup.is_active(self.state.global_step):
            self.critic_warmup.record(metrics["value_loss"])
            metrics["critic_warmup"] = 1.0
        self.pending_log.add(metrics, self.mode)
        self._step_totals = None
        self._step_losses = []
        self._update_seconds = 0.0

    def _trained_tokens(self, batch: RolloutBatch) -> torch.Tensor:
        """0-dimensional, number of the tokens of a micro-batch that the policy learns from."""
        args = self.args
        regularized = args.beta != 0.0 or args.entropy_coef != 0.0 or args.use_adaptive_entropy
        if args.loss_type in TRL_LOSS_TYPES and regularized:
            return _loss_mask(batch).sum()  # also of responses without a reward
        return batch["policy_mask"].sum()

    @property
    def _micro_batches_per_step(self) -> int:
        return self.current_gradient_accumulation_steps if self.mode == "train" else 1

    def _normalizer(self, aggregation: str, batch: RolloutBatch, unit: str) -> torch.Tensor | float:
        """
        What a micro-batch's summed losses are divided by.

        The total over the whole optimizer step, so that the step's gradient does not depend on how its responses are
        cut into micro-batches; per process, because distributed training averages over processes.

        Args:
            aggregation (`str`): see [`~sapo_trl.losses.aggregate`].
            batch (`dict`): the micro-batch.
            unit (`str`): `"tokens"` or `"segments"`, what the summed losses are one of.
        """
        if aggregation == "token-mean":
            return self._totals(batch)[unit]
        batches = self.optimizer_step_batches(batch) if self.mode == "train" else [batch]
        rows = sum(part["segment_ids"].size(0) for part in batches)
        return rows * self.max_completion_length if aggregation == "seq-mean-token-sum-norm" else rows

    def _share_of_tokens(self, batch: RolloutBatch) -> torch.Tensor:
        """0-dimensional: of the tokens that the policy reads in an optimizer step, prompts included."""
        batches = self.optimizer_step_batches(batch) if self.mode == "train" else [batch]
        everything = sum(part["prompt_mask"].sum() + part["completion_mask"].sum() for part in batches)
        return (batch["prompt_mask"].sum() + batch["completion_mask"].sum()) / everything

    def _totals(self, batch: RolloutBatch) -> dict[str, torch.Tensor]:
        threshold = self.args.positive_lm_threshold
        if self.mode != "train":
            return {name: count.clamp(min=1) for name, count in _count([batch], threshold).items()}
        if self._step_totals is None:
            counts = _count(self.optimizer_step_batches(batch), threshold)
            summed = self.accelerator.reduce(torch.stack(list(counts.values())).float(), reduction="mean")
            self._step_totals = dict(zip(counts, summed.clamp(min=1 / self.accelerator.num_processes), strict=True))
        return self._step_totals

    def _accumulate_loss(self, name: str, loss: torch.Tensor) -> None:
        # Micro-batch losses are shares of the optimizer step's loss and add up to it.
        self._accumulator.add_total(name, loss.detach(), 1 / self._micro_batches_per_step)

    def _accumulate_metrics(
        self, metrics: dict[str, torch.Tensor], names: dict[str, str], weight: torch.Tensor
    ) -> None:
        for key, name in names.items():
            self._accumulator.add_mean(name, metrics[key], weight)

    # ---------------------------------------------------------------------------------------- schedule, checkpoints

    def create_scheduler(self, num_training_steps: int, *args, **kwargs):
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if self.critic is not None:
            self.critic.create_scheduler(num_training_steps)
        return scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as TRL does, and the critic in the folder `critic` beside it."""
        # The critic first: saving the policy may push the folder to the Hub.
        if self.critic is not None:
            self.critic.save_weights(Path(output_dir or self.args.output_dir) / CRITIC_FOLDER)
        super().save_model(output_dir, _internal_call)
        own_folder = output_dir is None or Path(output_dir) == Path(self.args.output_dir)
        if own_folder and not _internal_call and not self.args.push_to_hub:  # pushing writes it
            self.create_model_card()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """TRL's model card, completed with the algorithm, its settings and the last logged results."""
        folder = Path(self.args.output_dir)
        model_id = self.args.hub_model_id or folder.name
        super().create_model_card(model_name or model_id.split("/")[-1], dataset_name, tags)
        if self.is_world_process_zero():
            complete_model_card(
                folder / "README.md",
                self.args,
                self.state.log_history,
                model_id,
                takes_images=isinstance(self.processing_class, ProcessorMixin),
                segmenter=None if self._segmenter_is_configured else self.segmenter,
            )


# How the losses' metrics are called in the log.
_POLICY_METRICS = {
    "clip_fraction": "clip_ratio/region_mean",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
    "dual_clip_fraction": "clip_ratio/dual_mean",
    "approx_kl": "approx_kl",
    "approx_kl_k3": "approx_kl_k3",
    "ratio_mean": "ratio/mean",
}
_SEGMENT_RATIO_METRICS = {
    "geometric_bias": "ratio/geometric_bias",
    "geometric_bias_bound": "ratio/geometric_bias_bound",
}
_VALUE_METRICS = {"value_clip_fraction": "value/clip_ratio"}


def _segments_of(batch: RolloutBatch) -> Segments:
    """The partition that a batch carries."""
    counts = batch.get("segment_counts")  # not of the rest of a rollout in an older checkpoint
    return Segments(batch["segment_ids"], max_count=max(counts) if counts else None)


def _loss_mask(batch: RolloutBatch) -> torch.Tensor:
    """bool `(B, T)`: tokens that the policy produced and that count."""
    mask = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


def _images_of(inputs: list[dict[str, Any]]) -> list[list[Any]] | None:
    """The images of each row of a data set, from the columns in which TRL looks for them; `None` without any."""
    images = [row.get("images") or ([row["image"]] if row.get("image") is not None else []) for row in inputs]
    return images if any(images) else None


def _count(batches: list[RolloutBatch], positive_lm_threshold: float) -> dict[str, torch.Tensor]:
    """What the losses of some micro-batches are normalized by."""
    tokens = torch.stack([batch["policy_mask"].sum() for batch in batches]).sum()
    # No indexing by a mask, for which the device would have to be waited for.
    positive = [
        (batch["policy_mask"] & (batch["rewards"] > positive_lm_threshold).unsqueeze(1)).sum() for batch in batches
    ]
    return {
        "tokens": tokens,
        "segments": torch.stack([Segments(batch["segment_ids"]).count.sum() for batch in batches]).sum(),
        "positive_tokens": torch.stack(positive).sum(),
    }
