"""The SAPO trainer: orchestrates score → segment → value → reward → advantage → losses, and computes none of them."""

from __future__ import annotations

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

from ..callbacks import RolloutCallback, SegmentationCallback
from ..completions_table import segment_columns
from ..config import TRL_LOSS_TYPES, SAPOConfig
from ..critic.training import CRITIC_FOLDER, Critic
from ..critic.value_head import SegmentValueHead
from ..critic.warmup import CriticWarmup
from ..distributed import gradient_norm
from ..metrics import Measurements, MetricAccumulator
from ..rewards.calls import checked_rewards
from ..role_aware import RoleAwareWeighting
from ..rollouts import ContinuationSampler
from ..rollouts.placeholders import final_placeholders
from ..rollouts.types import GivenRollout, PolicyForward, RolloutBatch, RolloutRecord, SegmentedRollout
from ..segmentation import Segmenter, accepted_inputs
from ..segments import Segments
from . import recorded, stages
from .adapters import prepare_adapters
from .checkpoint_parts import CallbackStates, CriticPart, ReplayPart, SkippedSteps, WarmupPart
from .checks import (
    check_finite_weights,
    check_images,
    check_padding_side,
    check_sampler,
    check_segments,
    check_size,
    check_special_tokens,
    datasets_of,
)
from .critic_updates import further_updates
from .model_card import complete_model_card
from .setup import (
    check_arguments,
    check_tokenizer_of,
    default_arguments,
    make_critic,
    make_segmenter,
    make_token_weighting,
    make_value_head,
)
from .sight import CorruptedForward, columns_of_images, corrupted_images, dependency_of, looking_again, token_weights
from .step import MicroBatchLoss, StepInProgress, StepTotals, combined, loss_mask, weighted_responses
from .step_guard import StepGuard
from .tree_rollout import TreeRollouts
from .trl.bridge import GRPOBridge
from .trl.resume import TrainingIsOver
from .update import PolicyObjective, ValueObjective
from .values import checked_estimate, make_value_estimator


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
            How to cut responses: any callable `(entropies, mask) -> Segments`. By default
            `args.segmentation` decides.
        token_weighting ([`~sapo_trl.role_aware.RoleAwareWeighting`], *optional*):
            How to weigh the tokens' advantages. By default `args.advantage_weighting` decides.
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
            @inproceedings{gao2026segment,
                title        = {{Segment-Aligned Policy Optimization for Multi-Modal Reasoning}},
                author       = {Gao, Lei and Li, Zhuoming and Jia, Mengxi and Yuan, Jiakang and
                                Sun, Hongbo and Sun, Hao and Li, Xuelong},
                booktitle    = {International Conference on Machine Learning},
                year         = 2026,
                note         = {arXiv:2605.01327},
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
        **kwargs: Any,
    ) -> None:
        model, value_model = (str(m) if isinstance(m, Path) else m for m in (model, value_model))
        args = default_arguments(model) if args is None else args
        others = {**kwargs, "train_dataset": train_dataset}
        check_arguments(model, args, value_model, segmenter, token_weighting, {**others, "reward_funcs": reward_funcs})
        # The critic is made before TRL sees the model, because TRL may put adapters into it and the critic starts from
        # the policy as it is now. Its random numbers begin at the common seed, as TRL's do.
        set_seed(args.seed)
        value_head = None
        if args.learns_critic and args.critic != "adapter":
            value_head = make_value_head(model, value_model, args)
        super().__init__(model, checked_rewards(reward_funcs, args.reward_timeout), args, **others)

        check_padding_side(self.processing_class)
        check_special_tokens(self.tokenizer, self.model)
        for dataset in (train_dataset, *datasets_of(kwargs.get("eval_dataset")).values()):
            check_images(dataset, self.processing_class, self.model, self.chat_template_kwargs)
        self.segmenter: Segmenter = segmenter if segmenter is not None else make_segmenter(args)
        self._segmenter_is_configured = segmenter is None
        self._segmenter_inputs = accepted_inputs(self.segmenter)
        self.token_weighting = token_weighting or make_token_weighting(args)
        policy = self.accelerator.unwrap_model(self.model)
        prepare_adapters(policy, args)
        self.corrupted_images = corrupted_images(policy, self.processing_class, args, self.token_weighting)

        if args.critic == "adapter":
            # On the policy as TRL has wrapped it. By now each process has random numbers of its own, but the critic is
            # one: it is drawn from the common seed, and later draws do not depend on it.
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)
                value_head = make_value_head(policy, value_model, args)
        self.critic: Critic | None = None
        if value_head is not None:
            if isinstance(value_model, str):
                check_tokenizer_of(value_model, self.tokenizer)
            decayed = self.get_decay_parameter_names
            self.critic = make_critic(value_head, self.model, self.tokenizer, args, self.accelerator, decayed)
        self.critic_warmup = CriticWarmup(
            args.critic_warmup_steps, args.critic_warmup_tolerance, args.num_mini_batches * args.num_iterations
        )
        self.trees: TreeRollouts | None = None
        if args.critic == "tree":
            self.trees = TreeRollouts(args, seed=args.seed + self.accelerator.process_index)
        self.value_estimator = make_value_estimator(
            args,
            critic_forward=lambda batch: self.critic_forward(self.critic.at(self.mode), batch, self._rows_per_forward),
            sampler=lambda record: self._continuations(record) if self.mode == "train" else None,
        )
        self.policy_objective = PolicyObjective(args, self.router_aux_loss_coef)
        self.value_objective = ValueObjective(args)
        self._step_guard = StepGuard(args, self.accelerator)
        self._compared_with_sampler = False
        self._update: StepInProgress | None = None

        parts = [CriticPart(self.critic, args.critic), SkippedSteps(self._step_guard)]
        parts.append(CallbackStates(lambda: self._rollout_callbacks))
        if self.critic is not None:
            parts.append(WarmupPart(self.critic_warmup, args.should_save))
        if self.trees is not None:
            parts.append(ReplayPart(self.trees.replay))
        self.checkpoints.parts += parts
        if not any(isinstance(callback, SegmentationCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(SegmentationCallback())

    # ------------------------------------------------------------------------------------------------- the rollout

    def plan_rollout(self, inputs: list[dict[str, Any]]) -> tuple[GivenRollout | None, Measurements]:
        if self.trees is None or self.mode != "train":
            return None, {}
        examples = inputs[:: self.args.num_generations]
        prompts = self.tokenized_prompts(examples)

        def score(rows: list[int], completions: list[list[int]]) -> torch.Tensor:
            pad, device = self.tokenizer.pad_token_id, self.accelerator.device
            return self.policy_forward(self.model, prompts.model_inputs(rows, completions, pad, device)).logps

        sampler = self.continuation_sampler(prompts, examples)
        return self.trees.plan(examples, prompts, sampler, score, self._rows_per_forward, len(inputs))

    @torch.no_grad()
    def score_rollout(self, batch: RolloutBatch, record: RolloutRecord) -> RolloutBatch:
        args, seconds = self.args, record.stage_seconds()
        rewards = self.processes.own_rows(record.rewards, len(batch["completion_ids"]))
        # Without tool outputs, padding, masked truncations, and responses that no reward function could score.
        mask = loss_mask(batch) & ~rewards.isnan().unsqueeze(1)
        started = time.perf_counter()
        forward = record.forward_behind(batch.get("old_per_token_logps"))
        starts = self.critic is not None and self.mode == "train" and self.critic.start_at(record.rewards)
        if forward is None or (starts and forward.values is not None):  # values from before the critic's start
            forward = self.policy_forward(self.model, batch, self._rows_per_forward)
        seed = args.seed + self.state.global_step
        look = CorruptedForward(self.corrupted_images, batch, forward.logps, self._logps, seed, self.tokenizer)
        if record.given is not None:
            mask, forward = stages.last_edges(forward, mask, record.given)
        batch = {**batch, "rewards": rewards}
        batch["token_rewards"] = stages.placed_rewards(record, batch, mask, self.reward_weights, self.tokenizer)
        seconds["score"] += time.perf_counter() - started
        self._check_sampler_once(forward, batch, mask)
        correction, sampler_metrics = stages.sampler_correction(forward, batch, mask, args)
        segments = self.segment(forward, batch, mask)
        dependency, sight_metrics = dependency_of(look, segments.mask, args)
        policy_mask, mask_metrics = stages.learned_tokens(forward, dependency, segments, args, self.processes)
        started = time.perf_counter()
        values, value_metrics = checked_estimate(self.estimate_values(forward, batch, segments, policy_mask, record))
        seconds["value"] = time.perf_counter() - started
        token_rewards, reward_metrics = stages.rewards_of_tokens(forward, batch, mask, args)
        advantages, returns = self.estimate_advantages(token_rewards, values, segments, batch)
        raw, gate_metrics = stages.gated(advantages, token_rewards, values, segments, args, self.processes)
        advantages, changes = stages.normalized(raw, policy_mask, record, args, self.processes)
        weights, weight_metrics = token_weights(self.token_weighting, forward, look, mask, self.processes)
        advantages = advantages if weights is None else advantages * weights
        if args.loss_type in TRL_LOSS_TYPES and not args.use_vllm and correction is not None:
            # TRL's losses correct for its own samplers alone. A positive factor may as well go into the advantage.
            advantages, correction = advantages * correction, None
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
            images=recorded.images_of(record.inputs),
            policy_mask=policy_mask,
            visual_dependency=dependency,
            raw_advantages=raw,
            **recorded.used_values(token_rewards, values, segments, args, gate_metrics),
            reward_parts=recorded.parts_of_rewards(record, self.reward_func_names, self.reward_weights),
            answers=recorded.answers_of(record.inputs),
            corrupted_images=look.pictures if look.changes_images else None,
            sampled_at=record.sampled_at,
        )
        metrics = record.metrics | stages.measured(rollout, policy_mask, args, self.processes)
        metrics |= sampler_metrics | sight_metrics | mask_metrics | value_metrics | reward_metrics | changes
        metrics |= weight_metrics | gate_metrics
        self._log_rollout(rollout, metrics, seconds | look.seconds)
        if record.given is not None:
            # TRL's is the mean over the edges that were drawn. All edges matter.
            self.pending_log.replace("reward", stages.mean_root_value(record.given, self.processes), self.mode)

        columns = stages.training_columns(rollout, args, self.processes)
        columns |= columns_of_images(dependency, look, segments.mask, args)
        if args.loss_type not in TRL_LOSS_TYPES or record.given is not None or "old_per_token_logps" in batch:
            # Without them TRL's losses take the ratio as exactly 1, which it is when it needs none.
            columns["old_per_token_logps"] = forward.logps
        kept = {name: x for name, x in batch.items() if name not in ("importance_sampling_ratio", "token_rewards")}
        return {**kept, **columns, **({} if correction is None else {"importance_sampling_ratio": correction})}

    def _logps(self, batch: RolloutBatch) -> torch.Tensor:
        return self.policy_forward(self.model, batch, self._rows_per_forward).logps

    def segment(self, forward: PolicyForward, batch: RolloutBatch, mask: torch.Tensor) -> Segments:
        """
        Partition a rollout, once. Everything downstream reads the result.

        Args:
            forward ([`PolicyForward`]): of the policy that produced the rollout.
            batch (`RolloutBatch`): the rollout.
            mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens to partition.
        """
        others = {"logps": forward.logps, "completion_ids": batch["completion_ids"], "tokenizer": self.tokenizer}
        inputs = {name: others[name] for name in self._segmenter_inputs}
        segments = self.segmenter(forward.entropies, mask, **inputs)
        check_segments(segments, mask)
        return segments

    def estimate_values(
        self,
        forward: PolicyForward,
        batch: RolloutBatch,
        segments: Segments,
        policy_mask: torch.Tensor,
        record: RolloutRecord,
    ) -> tuple[torch.Tensor, Measurements]:
        """
        Values of the states that the advantages are computed from.

        Args:
            forward ([`PolicyForward`]): of the policy that produced the rollout.
            batch (`RolloutBatch`): the rollout.
            segments ([`Segments`]): its partition.
            policy_mask (`torch.Tensor`): bool `(B, T)`, the tokens that the policy learns from.
            record ([`RolloutRecord`]): its prompts and rewards.

        Returns:
            `tuple[torch.Tensor, Measurements]`: float32 `(B, T)`, at `t` the value of the state before token `t`; and
            measurements for the log, for each name a sum and its number of items (`{}` for none).
        """
        return self.value_estimator(forward, batch, segments, policy_mask, record)

    def estimate_advantages(
        self, token_rewards: torch.Tensor, values: torch.Tensor, segments: Segments, batch: RolloutBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Advantages, not normalized yet, and the critic's targets.

        Args:
            token_rewards (`torch.Tensor`): float32 `(B, T)`.
            values (`torch.Tensor`): float32 `(B, T)`, of [`SAPOTrainer.estimate_values`].
            segments ([`Segments`]): the partition.
            batch (`RolloutBatch`): the rollout; TRL's own advantages are in it.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: float32 `(B, T)` each, 0 outside the segments.
        """
        generations = self.args.num_generations if self.mode == "train" else self.num_generations_eval
        return stages.advantages_and_returns(
            token_rewards, values, segments, batch, self.args, generations, self.processes
        )

    def reading_critic(self) -> SegmentValueHead:
        return self.critic.at(self.mode)

    def _continuations(self, record: RolloutRecord) -> ContinuationSampler | None:
        """The sampler of continuations of this rollout's responses, if they are made of tokens alone."""
        if record.prompts is None or self.tools or self.environments or self.max_completion_length is None:
            return None
        return self.continuation_sampler(record.prompts, record.inputs, record.given)

    def _check_sampler_once(self, forward: PolicyForward, batch: RolloutBatch, mask: torch.Tensor) -> None:
        """Compare the engine that sampled with the policy, in the first training rollout."""
        if self._compared_with_sampler or self.mode != "train" or "sampling_per_token_logps" not in batch:
            return
        self._compared_with_sampler = True
        difference = stages.sampler_difference(forward, batch["sampling_per_token_logps"], mask, self.processes)
        check_sampler(difference, self.args.max_sampler_logp_difference)

    def _log_rollout(self, rollout: SegmentedRollout, metrics: Measurements, seconds: dict[str, float]) -> None:
        """Show a rollout to the callbacks, and write the measurements to the log."""
        measured = MetricAccumulator()
        measured.add(metrics)
        if self.placeholder_ids:
            cut = final_placeholders(rollout.completion_ids, self.placeholder_ids, self.tokenizer.pad_token_id)
            measured.add_total("completions/placeholder_ratio", cut.any(dim=1).sum(), len(cut))
        for callback in self._rollout_callbacks:
            callback.on_rollout(self.args, self.state, self.control, rollout, measured)
        tokens = rollout.segments.mask.sum(dim=1).clamp(min=1)
        advantages = self.processes.gather(rollout.advantages.sum(dim=1) / tokens)
        self.pending_log.replace_advantages(advantages.tolist())
        if self.args.log_completions:
            self.pending_log.add_columns(segment_columns(rollout))
        self.pending_log.add({f"time/{stage}": spent for stage, spent in seconds.items()}, self.mode)
        self.pending_log.add(measured.flush(self.accelerator), self.mode)

    @property
    def _rollout_callbacks(self) -> list[RolloutCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, RolloutCallback)]

    @property
    def _rows_per_forward(self) -> int:
        return self.args.per_device_train_batch_size if self.mode == "train" else self.args.per_device_eval_batch_size

    # -------------------------------------------------------------------------------------------------- the update

    def policy_loss(self, model: nn.Module, batch: RolloutBatch) -> torch.Tensor:
        totals, values, is_training = self._totals(batch), None, self.mode == "train"
        if is_training:
            self._update = self._update.begin(batch)
        if is_training and self.critic_warmup.is_active(self.state.global_step):
            values = self._frozen_values(batch)
            # A leaf: its gradient reaches no parameter, so the optimizer has nothing to apply.
            loss = torch.zeros((), device=self.accelerator.device, requires_grad=True)
        elif self.args.loss_type in TRL_LOSS_TYPES:
            loss, values = self.trl_loss(model, weighted_responses(batch, totals, self.args))
        else:
            forward = looking_again(lambda rows: self.policy_forward(model, rows), self.corrupted_images, batch)
            output = self.policy_objective(forward, weighted_responses(batch, totals, self.args), totals)
            loss, values = self._measured(output), forward.values
            if is_training and "rollout_rows" in batch:  # the rest of a rollout may be an older checkpoint's
                log_ratios = forward.logps.detach() - batch["old_per_token_logps"]
                for callback in self._rollout_callbacks:
                    callback.on_policy_forward(self.args, self.state, self.control, batch["rollout_rows"], log_ratios)
        if not is_training:
            return loss
        self._update = replace(self._update, values=values)
        return self._step_guard.for_backward(loss)

    def critic_loss(self, batch: RolloutBatch, values: torch.Tensor | None) -> torch.Tensor:
        """
        Loss of the critic on one micro-batch, 0-dimensional, scaled for gradient accumulation.

        Args:
            batch (`RolloutBatch`): the micro-batch that the policy's loss was computed on.
            values (`torch.Tensor`, *optional*): float32 `(B, T)`, if read in the policy's forward.
        """
        if values is None:
            values = self.critic_forward(self.critic.at(self.mode), batch)
        return self._measured(self.value_objective(values, batch, self._totals(batch)))

    def _critic_loss_again(self, batch: RolloutBatch) -> torch.Tensor:
        return self.critic_loss(batch, self._frozen_values(batch))

    def _frozen_values(self, batch: RolloutBatch) -> torch.Tensor | None:
        return self.policy_forward(self.model, batch, frozen=True).values if self.args.reads_policy else None

    def _totals(self, batch: RolloutBatch) -> StepTotals:
        """Totals of the optimizer step that a micro-batch belongs to; its first micro-batch begins the step."""
        if self.mode != "train":
            return StepTotals.of([batch], self.args)
        if self._update is None or not self._update.has(batch):
            batches, forwards = self.optimizer_step_batches(batch), self.current_gradient_accumulation_steps
            totals = StepTotals.of(batches, self.args, self.processes, forwards)
            self._update = StepInProgress(batches, totals, batch)
        return self._update.totals

    def _measured(self, output: MicroBatchLoss) -> torch.Tensor:
        """The loss. The step keeps its measurements; in evaluation they go to the log at once."""
        if self.mode == "train":
            self._update = self._update.measured(output)
        else:
            self.pending_log.add(combined([output], self.accelerator), self.mode)
        return output.loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        losses, step = [loss.detach()], self._update
        if self.critic is not None:
            # After the policy's backward, so that only one of the two models' activations is alive at a time.
            with self.critic.accumulate():
                critic_loss = self.critic_loss(step.micro_batch, step.values)
                others = []
                if self._step_guard.engines_skip and self.accelerator.sync_gradients:
                    # DeepSpeed has updated the policy by now, or skipped its step: then the critic's goes too.
                    others = [gradient_norm(self.model, self.accelerator)]
                self.critic.backward(self._step_guard.for_backward(critic_loss, *others))
            losses.append(critic_loss.detach())
        self._update = self._update.after(losses)
        if self.accelerator.sync_gradients:
            self._finish_optimizer_step()
        return loss

    def _finish_optimizer_step(self) -> None:
        step = self._update
        numbers = [*step.losses, gradient_norm(self.model, self.accelerator)]
        metrics: Measurements = {"time/update": (torch.tensor(step.seconds), 1.0)}
        if self.critic is not None:
            numbers.append(self.critic.clip_gradient())
            metrics["critic/learning_rate"] = (torch.tensor(self.critic.learning_rate), 1.0)
            metrics["critic/grad_norm"] = (numbers[-1], 1.0)
        skip = self._step_guard.must_skip(numbers)
        if skip:
            # Gradients that are not there move nothing, nor do they decay weights.
            self.model.zero_grad(set_to_none=True)
            self._step_guard.report(self.state.global_step, lambda: step.batches)
        metrics["skipped_steps"] = (torch.tensor(float(skip)), 1.0)
        no_tokens, no_segments = self._step_guard.are_empty(step.totals.own_tokens, step.totals.own_segments)
        if no_tokens:
            metrics["empty_steps"] = (torch.tensor(1.0), 1.0)
            if self._step_guard.can_drop_gradients:
                # Gradients of zero would let weights decay and follow the momentum of earlier steps.
                self.optimizer.zero_grad()
        if self.critic is not None:
            self.critic.step(skip or no_segments)
            if not (skip or no_segments):
                further_updates(self.critic, self.args, step.batches, self._critic_loss_again, self._step_guard)
        logged = combined(self._update.outputs, self.accelerator, metrics)
        self._update = None
        if self.critic_warmup.is_active(self.state.global_step):
            self.critic_warmup.record(logged["critic/loss"])
            logged["critic/warmup"] = 1.0
        self.pending_log.add(logged, self.mode)

    # ---------------------------------------------------------------------------------------- schedule, checkpoints

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
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
