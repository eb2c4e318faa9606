"""
[`GRPOBridge`]: TRL's trainer with its rollout and its loss opened up.

Every private method and attribute of TRL's `GRPOTrainer` that this package calls, overrides or reads appears in this
folder and nowhere else. `tests/trainer/trl/test_contract.py` fails when TRL moves one of them. An override here calls
a collaborator in a file of its own, which needs no trainer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...critic.value_head import SegmentValueHead
from ...distributed import keep_output_dtype, weights_are_in_pieces
from ...generation.model_settings import own_settings_ignored
from ...metrics import Measurements
from ...rollouts import ContinuationSampler, TokenizedPrompts
from ...rollouts.placeholders import cut_turn, placeholder_ids
from ...rollouts.prompts import has_images_by_row, one_entry_a_row
from ...rollouts.types import GivenRollout, PolicyForward, RolloutBatch, RolloutRecord
from ..checks import check_token_ids
from ..image_features import ImageFeatures
from ..padding import can_move_rows
from .ahead import AheadTrainer
from .batching import by_length, may_exchange_rows
from .continuations import Continuations
from .forward import FORWARD_KEYS, CompletionForward
from .generation import (
    at_most,
    checked_rollout_func,
    for_vllm,
    prompts_of,
    warn_of_sampling_settings,
    with_image_lists,
)
from .reference import copy_for_reference, no_reference_by_name, prepared_reference
from .rewards import RewardCalls


class GRPOBridge(AheadTrainer):
    """
    [`~trl.GRPOTrainer`] whose rollouts and micro-batches go through methods of this package. Generation, data loading,
    rewards, weight sync and logging stay TRL's; nothing of it is copied.

    Subclasses implement [`GRPOBridge.score_rollout`] and [`GRPOBridge.policy_loss`].
    """

    def __init__(self, model: str | PreTrainedModel, reward_funcs=None, args=None, **kwargs):
        self._record: RolloutRecord | None = None
        reference = copy_for_reference(model, args, kwargs.get("peft_config"))
        with no_reference_by_name(args, apply=reference is not None):
            super().__init__(model, reward_funcs, args, **kwargs)
        if reference is not None:
            self.ref_model, self.beta = prepared_reference(reference, args, self.accelerator), args.beta
        calculate, functions, names = super()._calculate_rewards, self.reward_funcs, self.reward_func_names
        self.reward_calls = RewardCalls(calculate, functions, names, self.pending_log)
        self.reward_funcs = self.reward_calls.functions
        self.placeholder_ids = placeholder_ids(self.model.config)
        # Nobody shows a video here. TRL would look for the frames of a video token that the policy writes.
        self._video_pad_token_id = None
        # A model that knows absolute positions is given the same ones each time: its rows stay where they are. And a
        # masked response counts as padding: moved, it would leave behind the images that a tool has put into it.
        tool_images = args.mask_truncated_completions and self.tools and self.placeholder_ids
        text_config = self.model.config.get_text_config()
        self.can_move_rows = args.avoid_padding and can_move_rows(text_config) and not tool_images
        self._exchanges_rows = self.can_move_rows and may_exchange_rows(args, self.aux_loss_enabled)
        image_features = None
        if args.reuse_image_features and not weights_are_in_pieces(self.accelerator):
            image_features = ImageFeatures()
            self.add_callback(image_features)
        self.completion_forward = CompletionForward(
            super()._get_per_token_logps_and_entropies,
            self.accelerator,
            args,
            self.model,
            moves_rows=self.can_move_rows,
            pad_token_id=self._tokenizer.pad_token_id,
            placeholder_ids=self.placeholder_ids,
            has_aux_loss=self.aux_loss_enabled,
            reading_critic=self.reading_critic if args.reads_policy else None,
            image_features=image_features,
        )
        self.continuations = Continuations(
            generate=self._continue,
            rewards=self.reward_calls.score_unlogged,
            weigh=self.weighted_rewards,
            processing_class=self.processing_class,
            tokenizer=self._tokenizer,
            tools=self.tools,
            end_token_ids=frozenset(self.eos_token_ids),
            placeholder_ids=self.placeholder_ids,
            max_completion_length=self.max_completion_length,
            processes=self.processes,
        )
        if self.rollout_func is not None:
            self.rollout_func = checked_rollout_func(self.rollout_func, self.placeholder_ids, self._vocab_size)
        elif not self.use_vllm and self.accelerator.is_main_process:
            settings = self.generation_kwargs
            warn_of_sampling_settings(self._unwrapped_policy, self.generation_config, settings, args)

    # ------------------------------------------------------------------ hooks

    def plan_rollout(self, inputs: list[dict[str, Any]]) -> tuple[GivenRollout | None, Measurements]:
        """
        Provide a training rollout's responses, or `None` to let TRL sample them; and measurements for the log.

        Args:
            inputs (`list[dict]`): rows of the data set, each repeated for each of its responses.
        """
        return None, {}

    def score_rollout(self, batch: RolloutBatch, record: RolloutRecord) -> RolloutBatch:
        """
        Turn a generated rollout into a training batch, which TRL shuffles and splits into micro-batches.

        Args:
            batch (`RolloutBatch`): TRL's rollout: token ids, masks, images, reference log-probabilities, …
            record ([`RolloutRecord`]): its rewards and the forwards already run over it.
        """
        raise NotImplementedError

    def policy_loss(self, model: nn.Module, batch: RolloutBatch) -> torch.Tensor:
        """
        Loss of one micro-batch, 0-dimensional, scaled for gradient accumulation.

        Args:
            model (`torch.nn.Module`): the policy, wrapped for distributed training.
            batch (`RolloutBatch`): one micro-batch of what [`GRPOBridge.score_rollout`] returned.
        """
        raise NotImplementedError

    def reading_critic(self) -> SegmentValueHead:
        """The critic that reads the policy's hidden states, see [`~sapo_trl.trainer.policy_reader.PolicyReader`]."""
        raise NotImplementedError

    # ------------------------------------------------- for subclasses and stages

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the completions, also for a multimodal processor."""
        return self._tokenizer

    @property
    def mode(self) -> str:
        """`"train"` or `"eval"`."""
        return "train" if self.model.training else "eval"

    @property
    def micro_batches(self) -> list[RolloutBatch]:
        """The latest rollout in the order in which it is trained on."""
        return self._buffered_inputs

    @micro_batches.setter
    def micro_batches(self, batches: list[RolloutBatch]) -> None:
        self._buffered_inputs = batches

    def optimizer_step_batches(self, batch: RolloutBatch) -> list[RolloutBatch]:
        """All micro-batches of the optimizer step that a micro-batch belongs to, this process's share of them."""
        window = self.args.gradient_accumulation_steps
        index = next(index for index, other in enumerate(self.micro_batches) if other is batch)
        first = index // window * window
        return self.micro_batches[first : first + window]

    def policy_forward(
        self, model: nn.Module, batch: RolloutBatch, batch_size: int | None = None, frozen: bool = False
    ) -> PolicyForward:
        """Run the policy, `batch_size` rows at a time, see [`CompletionForward.policy`]."""
        return self.completion_forward.policy(model, batch, batch_size, frozen)

    def critic_forward(self, critic: nn.Module, batch: RolloutBatch, batch_size: int | None = None) -> torch.Tensor:
        """Values of the states before each token, see [`CompletionForward.critic`]."""
        # In the policy's mode: a checkpoint loads in evaluation mode, in which gradient checkpointing is off.
        critic.train(self.model.training)
        return self.completion_forward.critic(critic, batch, batch_size)

    def trl_loss(self, model: nn.Module, batch: RolloutBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        TRL's own loss (`loss_type`) of a micro-batch.

        Returns:
            `tuple`: loss, `()`, scaled for gradient accumulation; and a reading critic's values, `(B, T)`, or `None`.
        """
        with self._recording(RolloutRecord()) as record:
            loss = super()._compute_loss(model, batch)
        return loss, record.forwards[-1][1].values if record.forwards else None

    def tokenized_prompts(self, inputs: list[dict[str, Any]]) -> TokenizedPrompts:
        """Prompts of rows of the data set, as TRL tokenizes them for generation."""
        return TokenizedPrompts(*self._tokenize_prompts(prompts_of(inputs)), self.placeholder_ids)

    def continuation_sampler(
        self, prompts: TokenizedPrompts, inputs: list[dict[str, Any]], given: GivenRollout | None = None
    ) -> ContinuationSampler:
        """Samples from the prompts of this process's rollout, see [`Continuations.sampler`]."""
        # A call gets as many rows as a rollout has responses, because that many fitted into memory.
        args, generations, rows = self.args, self.num_generations_eval, self.args.per_device_eval_batch_size
        if self.mode == "train":
            generations, rows = self.num_generations, args.per_device_train_batch_size * args.steps_per_generation
        return self.continuations.sampler(prompts, inputs, generations, args.continuation_batch_size or rows, given)

    def weighted_rewards(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """One reward of each response, `(B,)`, of `(B, F)`, weighted like TRL does; NaN without any."""
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        return rewards.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)

    # -------------------------------------------- TRL's rollout, loss and data
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> RolloutBatch:
        record = RolloutRecord(inputs=with_image_lists(inputs))
        self.completion_forward.forget_images()
        record.given, record.metrics = self.plan_rollout(record.inputs)
        record.inputs = record.inputs if record.given is None else record.given.inputs
        with self._recording(record), self.taking_ahead(inputs, record):
            batch = super()._generate_and_score_completions(record.inputs)
        if has_images_by_row(batch):
            batch["num_images"] = one_entry_a_row(batch)
        backbone = self.completion_forward.backbone_of(self.model)
        if (keys := self.completion_forward.image_keys(batch, backbone)) is not None:
            batch["image_keys"] = keys  # once: micro-batches find them beside their rows
        return self.score_rollout(batch, record)

    def _tokenize_prompts(self, prompts: list):
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        for ids in prompt_ids:
            check_token_ids(ids, self._vocab_size, "A prompt")
        # A prompt without image among prompts with some has `None` from TRL; transformers' processors take only lists.
        images = images and [row or [] for row in images]
        if self._record is not None and self._record.prompts is None:
            self._record.prompts = TokenizedPrompts(prompt_ids, images, multimodal_fields, self.placeholder_ids)
        return prompt_ids, images, multimodal_fields

    def _generate_single_turn(self, prompt_ids, images, *args, **kwargs):
        if self._record is not None and self._record.given is not None:
            return self._record.given.completion_ids, None
        return self._sampled_turn(prompt_ids, images, *args, **kwargs)

    def _sampled_turn(self, prompt_ids, images, *args, **kwargs):
        if self.use_vllm:
            image_token = getattr(self.processing_class, "image_token_id", None)
            prompt_ids, images = for_vllm(prompt_ids, images, image_token if self.vllm_mode == "colocate" else None)
        with own_settings_ignored(self._unwrapped_policy):
            sampled = super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        return cut_turn(*sampled, self.placeholder_ids, may_go_on=bool(self.tools))

    @torch.no_grad()
    def _continue(self, prompts: TokenizedPrompts, max_new_tokens: int) -> list[list[int]]:
        """One sampled continuation of each prompt, by the backend that the trainer generates with."""
        with at_most(max_new_tokens, self.vllm_generation if self.use_vllm else self.generation_config):
            return self._sampled_turn(prompts.ids, prompts.images, prompts.fields, num_generations=1)[0]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        record = self._record
        record.mark_generated()
        record.reward_started = time.perf_counter()
        if record.given is not None:
            rewards_per_func = self.processes.gather(record.given.rewards_per_func)
            record.rewards = self.processes.gather(record.given.outcomes)
        else:
            rewards_per_func, record.steps = self.reward_calls.score(inputs, prompts, completions, completion_ids_list)
            record.rewards = self.weighted_rewards(rewards_per_func)
            record.rewards_per_func = self.processes.own_rows(rewards_per_func, len(inputs))
            record.final_rewards = self.weighted_rewards(record.steps.finals(record.rewards_per_func))
        record.reward_seconds = time.perf_counter() - record.reward_started
        return rewards_per_func

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._record is not None:
            self._record.mark_generated()
        inputs = dict(zip(FORWARD_KEYS, args, strict=False)) | kwargs
        rows = inputs.pop("batch_size", None)
        if self._record is None or model is self.ref_model:
            outputs = self.completion_forward.run(model, inputs, rows)
            if model is self.ref_model:
                self.completion_forward.forget_images(model)
            return outputs[:3]
        # The fused head computes the entropies in the same pass anyway: they are kept, and the values, so that the
        # policy need not run again.
        outputs = self.completion_forward.run(model, inputs | {"compute_entropy": True}, rows, with_values=True)
        self._record.forwards.append((outputs.logps, outputs.of_policy()))
        return outputs[:3]

    @contextlib.contextmanager
    def _recording(self, record: RolloutRecord) -> Iterator[RolloutRecord]:
        """Record TRL's work inside, the forwards of the policy above all."""
        self._record = record
        try:
            yield record
        finally:
            self._record = None

    def _compute_loss(self, model: nn.Module, inputs: RolloutBatch) -> torch.Tensor:
        return self.policy_loss(model, inputs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        keep_output_dtype(self.accelerator)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.mode == "train" and self._buffered_inputs is not before and self._exchanges_rows:
            self._buffered_inputs = by_length(self._buffered_inputs, self.args, self.processes)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    @property
    def _vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def _unwrapped_policy(self) -> PreTrainedModel:
        """The policy without the wrappers of distributed training and `torch.compile`."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
