"""
Where this package touches TRL.

Every private method and attribute of TRL's `GRPOTrainer` that is called, overridden or read appears in this file and
nowhere else; `tests/test_trl_contract.py` fails when TRL moves one of them. `GRPOBridge` turns them into two hooks:
`score_rollout`, called once per rollout, and `policy_loss`, called once per micro-batch.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer, is_conversational, prepare_multimodal_messages
from trl.chat_template_utils import parse_response
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, get_config_model_id

from ...distributed import gradients_are_in_pieces, total_norm, weights_are_in_pieces
from ...folder_lock import FolderInUseError, locked
from ...generation.model_settings import left_to_the_model, own_settings_ignored, shaping_settings
from ...resumed_settings import Settings, optimizer_settings, restore_settings
from ...rollouts import ContinuationSampler, TokenizedPrompts
from ...rollouts.placeholders import (
    cut_rollout,
    final_placeholders,
    length_until_placeholder,
    placeholder_ids,
)
from ...rollouts.portable import from_portable, to_portable
from ...rollouts.prompts import has_images_by_row, one_entry_a_row
from ...rollouts.types import GivenRollout, PolicyForward, RolloutBatch, RolloutRecord
from ...run_folder import TRAINER_STATE_NAME, checkpoint_name, newest_checkpoint
from ..checkpoint_files import (
    PROCESS_STATE_NAME,
    STAGING_FOLDER,
    check_checkpoint,
    finish_publication,
    publish,
    recorded_best,
    rotate,
    staging_folder,
    write_error,
)
from ..checks import check_finite_rewards, check_rollout, check_token_ids
from ..image_features import ImageFeatures
from ..padding import (
    can_move_rows,
    common_cuts,
    cut_rows,
    equal_groups,
    group_rows,
    merge_rows,
    take_rows,
)
from .forward import FORWARD_KEYS, CompletionForward
from .repeated_rows import RepeatedRows


logger = logging.getLogger(__name__)

_GENERATE = inspect.getsource(VLLMGeneration.generate)
# Whether TRL hands a colocated vLLM the trainer's own ids beside the images. A TRL that collapses the placeholders, or
# sends features to put in their place, needs no help; what a new version does wrong, the comparison of
# log-probabilities in the first rollout tells.
TRL_EXPANDS_PLACEHOLDERS_TWICE = '{"prompt_token_ids": ids}' in _GENERATE and "collapse" not in _GENERATE.lower()


class GRPOBridge(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with its rollout and its loss opened up. Generation, data loading, rewards, weight sync,
    logging and checkpoints stay TRL's; nothing of it is copied.

    Subclasses implement [`GRPOBridge.score_rollout`] and [`GRPOBridge.policy_loss`].
    """

    def __init__(self, model: str | PreTrainedModel, reward_funcs=None, args=None, **kwargs):
        self._record: RolloutRecord | None = None
        self._forwards: list[tuple[torch.Tensor, PolicyForward]] | None = None
        self._staging: Path | None = None
        self._optimizer_settings: Settings = []
        self._train_sampler: Sampler | None = None
        reference = _copy_for_reference(model, args, kwargs.get("peft_config"))
        if reference is None:
            super().__init__(model, reward_funcs, args, **kwargs)
        else:
            # TRL can only load a reference by name; this policy has none.
            beta, args.beta = args.beta, 0.0
            try:
                super().__init__(model, reward_funcs, args, **kwargs)
            finally:
                args.beta = beta
            self._use_reference(reference)
        self.placeholder_ids = placeholder_ids(self.model.config)
        # A model that knows absolute positions is given the same ones each time: its rows stay where they are.
        text_config = self.model.config.get_text_config()
        self.can_move_rows = args.avoid_padding and can_move_rows(text_config)
        if args.mask_truncated_completions and self.tools and self.placeholder_ids:
            # A masked response counts as padding, and would leave behind the images that a tool has put into it.
            self.can_move_rows = False
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
            shared_values=self.shared_values if args.critic == "shared" else None,
            image_features=image_features,
        )
        if self.rollout_func is not None:
            self.rollout_func = self._checked_and_cut(self.rollout_func)
        if not self.use_vllm and self.rollout_func is None and self.accelerator.is_main_process:
            self._warn_of_sampling_settings()
        self.add_callback(_EpochOrder(self))
        self._pending_log = _PendingLog(self)
        self.add_callback(self._pending_log)
        if self.accelerator.is_fsdp2 and hasattr(self.model, "peft_config"):
            self.add_callback(_AdaptersFirst(self))

    # ------------------------------------------------------------------ hooks

    def score_rollout(self, batch: RolloutBatch, record: RolloutRecord) -> RolloutBatch:
        """
        Turn a generated rollout into a training batch.

        Args:
            batch (`dict`): TRL's rollout: token ids, masks, images, reference log-probabilities, …
            record ([`RolloutRecord`]): its rewards and the forwards already run over it.

        Returns:
            `dict`: the batch with further tensors of `B` rows each, which TRL shuffles and splits into micro-batches.
        """
        raise NotImplementedError

    def plan_rollout(self, inputs: list[dict[str, Any]]) -> GivenRollout | None:
        """
        Provide a training rollout's responses, or `None` to let TRL sample them.

        Args:
            inputs (`list[dict]`): rows of the data set, each as often as it is to be responded to.

        Returns:
            [`GivenRollout`], *optional*: with as many rows.
        """
        return None

    def policy_loss(self, model: nn.Module, batch: RolloutBatch) -> torch.Tensor:
        """
        Loss of one micro-batch, scaled for gradient accumulation.

        Args:
            model (`torch.nn.Module`): the policy, wrapped for distributed training.
            batch (`dict`): one micro-batch of what [`GRPOBridge.score_rollout`] returned.

        Returns:
            `torch.Tensor`: 0-dimensional.
        """
        raise NotImplementedError

    def may_exchange_rows(self) -> bool:
        """Whether the micro-batches of an optimizer step may exchange rows without a change of its gradient."""
        raise NotImplementedError

    def weighs_rows_alike(self) -> bool:
        """Whether the loss may be computed on micro-batches with different numbers of rows."""
        raise NotImplementedError

    def shared_values(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """
        Values from the policy's hidden states, or `None` when they are not wanted.

        Args:
            hidden_states (`torch.Tensor`): float tensor of shape `(b, S, H)`, detached.

        Returns:
            `torch.Tensor`, *optional*: float32 `(b, S)`.
        """
        return None

    def save_training_state(self, folder: str) -> None:
        """Write to a checkpoint what training needs besides the policy's state; called on the saving process only."""

    def save_process_files(self, folder: str) -> None:
        """Write to a checkpoint what processes can only write together; called on all of them."""

    def process_state(self) -> dict[str, Any]:
        """What each process has for itself and needs to go on: tensors, numbers, strings and containers of them."""
        return {}

    def load_process_state(self, state: dict[str, Any]) -> None:
        """Restore what [`GRPOBridge.process_state`] returned."""

    def load_training_state(self, folder: str) -> list[str]:
        """
        Restore what [`GRPOBridge.save_training_state`] wrote, and further models, to resume training.

        Args:
            folder (`str`): the checkpoint.

        Returns:
            `list[str]`: the parts that begin anew because the checkpoint lacks them, each with the name of its file.
        """
        return []

    def load_best_state(self, folder: str) -> None:
        """Restore further models from the best checkpoint, at the end of training."""

    # ------------------------------------------------- what subclasses can use

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the completions, also for a multimodal processor."""
        return self._tokenizer

    @property
    def mode(self) -> str:
        """`"train"` or `"eval"`."""
        return "train" if self.model.training else "eval"

    def policy_forward(
        self, model: nn.Module, batch: RolloutBatch, batch_size: int | None = None, frozen: bool = False
    ) -> PolicyForward:
        """
        Run the policy over a batch's completions.

        Args:
            model (`torch.nn.Module`): the policy, wrapped or not.
            batch (`dict`): a rollout or a micro-batch.
            batch_size (`int`, *optional*): rows per forward; all at once by default.
            frozen (`bool`, *optional*, defaults to `False`):
                whether the policy is not to learn from it: only the shared critic's values carry gradients then.

        Returns:
            [`PolicyForward`]
        """
        return self.completion_forward.policy(model, batch, batch_size, frozen)

    def critic_forward(self, critic: nn.Module, batch: RolloutBatch, batch_size: int | None = None) -> torch.Tensor:
        """
        Values of the states before each completion token.

        Args:
            critic (`torch.nn.Module`): a [`SegmentValueHead`] with a backbone, wrapped or not.
            batch (`dict`): a rollout or a micro-batch.
            batch_size (`int`, *optional*): rows per forward; all at once by default.

        Returns:
            `torch.Tensor`: float32 `(B, T)`.
        """
        # In the policy's mode: a checkpoint loads in evaluation mode, in which gradient checkpointing is off.
        critic.train(self.model.training)
        return self.completion_forward.critic(critic, batch, batch_size)

    def trl_loss(self, model: nn.Module, batch: RolloutBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        TRL's own loss (`loss_type`) of a micro-batch, and a shared critic's values from its forward.

        Args:
            model (`torch.nn.Module`): the policy, wrapped for distributed training.
            batch (`dict`): the micro-batch; its `advantages` may be `(B, T)`.

        Returns:
            `tuple`: the loss, 0-dimensional and scaled for gradient accumulation, and float32 `(B, T)` or `None`.
        """
        with self._recorded([]) as forwards:
            loss = super()._compute_loss(model, batch)
        return loss, forwards[-1][1].values if forwards else None

    def continuation_sampler(
        self, prompts: TokenizedPrompts, inputs: list[dict[str, Any]], given: GivenRollout | None = None
    ) -> ContinuationSampler:
        """
        Monte-Carlo rollouts from the prompts of a rollout, by the trainer's generation backend and reward functions.

        Args:
            prompts ([`TokenizedPrompts`]): this process's.
            inputs (`list[dict]`): the rows of the data set that they come from.
            given ([`GivenRollout`], *optional*): the rollout's plan, if TRL did not sample its responses.

        Returns:
            [`~sapo_trl.rollouts.ContinuationSampler`]
        """
        train = self.mode == "train"
        generations = self.num_generations if train else self.num_generations_eval
        # As many at a time as a rollout has responses: these fitted into memory.
        rows_per_call = self.args.per_device_eval_batch_size
        if train:
            rows_per_call = self.args.per_device_train_batch_size * self.args.steps_per_generation
        rows_per_call = self.args.continuation_batch_size or rows_per_call
        first_row = self.accelerator.process_index * len(inputs)
        # TRL repeats a prompt's row next to itself; a plan's rows come in any order, but are the same objects.
        groups = [(first_row + row) // generations if given is None else id(inputs[row]) for row in range(len(inputs))]
        return ContinuationSampler(
            prompts=prompts,
            groups=groups,
            generate=self._generate_from,
            score=lambda rows, completions: self._score_completions(
                [inputs[row] for row in rows], [prompts.ids[row] for row in rows], completions
            ),
            weigh=self.weighted_rewards,
            end_token_ids=frozenset(self.eos_token_ids),
            breaking_token_ids=self.placeholder_ids,
            max_completion_length=self.max_completion_length,
            rows_per_call=rows_per_call,
            max_over_processes=self._max_over_processes,
        )

    def tokenized_prompts(self, inputs: list[dict[str, Any]]) -> TokenizedPrompts:
        """Prompts of rows of the data set, as TRL tokenizes them for generation."""
        prompts = _prompts_of(inputs)
        return TokenizedPrompts(*self._tokenize_prompts(prompts), self.placeholder_ids)

    def cut_at_placeholder(self, batch: RolloutBatch) -> torch.Tensor:
        """bool `(B,)`: responses that were cut because the policy wrote an image placeholder."""
        ids = batch["completion_ids"]
        return final_placeholders(ids, self.placeholder_ids, self._tokenizer.pad_token_id).any(dim=1)

    def weighted_rewards(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """
        One reward per response, weighted like TRL does.

        Args:
            rewards_per_func (`torch.Tensor`): float tensor of shape `(B, F)`, NaN where a function did not apply.

        Returns:
            `torch.Tensor`: `(B,)`, NaN for a response that no function could score.
        """
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        return rewards.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)

    def local_slice(self, gathered: torch.Tensor, local_rows: int) -> torch.Tensor:
        """This process's rows of a tensor gathered over all processes."""
        start = self.accelerator.process_index * local_rows
        return gathered[start : start + local_rows]

    def optimizer_step_batches(self, batch: RolloutBatch) -> list[RolloutBatch]:
        """All micro-batches of the optimizer step that a micro-batch belongs to, this process's share of them."""
        window = self.args.gradient_accumulation_steps
        index = next(index for index, buffered in enumerate(self._buffered_inputs) if buffered is batch)
        first = index // window * window
        return self._buffered_inputs[first : first + window]

    def policy_gradient_norm(self) -> torch.Tensor:
        """0-dimensional, of the gradients that this process holds, under DeepSpeed of all at its last step; or 0."""
        if self.is_deepspeed_enabled:
            norm = self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
            return torch.as_tensor(0.0 if norm is None else norm, device=self.accelerator.device).float()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return total_norm(gradients).to(self.accelerator.device)

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the current step, to resume from, and return its folder."""
        with self.run_folder():
            self._save_checkpoint(self.model, None)
        return Path(self.args.output_dir) / checkpoint_name(self.state.global_step)

    @contextlib.contextmanager
    def run_folder(self) -> Iterator[None]:
        """
        Keep the output folder to this run while the block runs. The processes that save hold its lock.

        Raises:
            [`~sapo_trl.folder_lock.FolderInUseError`]: on all processes, if another run uses it.
        """
        with contextlib.ExitStack() as stack:
            problem = None
            if self.args.should_save:
                try:
                    stack.enter_context(locked(self.args.output_dir, "trains"))
                    finish_publication(self.args.output_dir)
                except FolderInUseError as error:
                    problem = str(error)
            problems = gather_object([problem]) if self.accelerator.num_processes > 1 else [problem]
            for problem in filter(None, problems):
                raise FolderInUseError(problem)
            yield

    def checkpoint_to_resume(self, wanted: str | Path | bool | None) -> str | None:
        """
        Find the checkpoint for `resume_from_checkpoint` and check its files.

        Args:
            wanted (`str` or `Path` or `bool`, *optional*): a checkpoint, or `True` for the newest one.

        Returns:
            `str`, *optional*: its folder.

        Raises:
            ValueError: if there is none, or a file in it is damaged.
        """
        if wanted is None or wanted is False:
            return None
        checkpoint = newest_checkpoint(self.args.output_dir) if wanted is True else Path(wanted)
        if checkpoint is None:
            raise ValueError(
                f"`resume_from_checkpoint=True`, but output_dir={self.args.output_dir!r} holds no complete checkpoint "
                f"(a folder {checkpoint_name('<step>')} with a {TRAINER_STATE_NAME}): leave the argument out to begin."
            )
        check_checkpoint(checkpoint)
        return str(checkpoint)

    def end_of_training(self) -> TrainOutput:
        """End a run that was resumed from its last step as transformers ends one, with the best model if asked for."""
        return self._finalize_training(None, 0, time.time())

    def add_to_log(self, metrics: dict[str, float]) -> None:
        """Add values to the averages that the next log reports."""
        for name, value in metrics.items():
            self._metrics[self.mode][name].append(value)

    def replace_in_log(self, name: str, value: float) -> None:
        """Replace what TRL has just added to the averages that the next log reports."""
        self._metrics[self.mode][name][-1:] = [value]

    def replace_logged_advantages(self, advantages: list[float]) -> None:
        """Put the rollout's advantages (all processes') in the completions table in the place of GRPO's."""
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages)

    def add_to_completions_table(self, columns: dict[str, list]) -> None:
        """Add columns about the latest rollout to the completions table: one entry for each of this process's rows."""
        for name, values in columns.items():
            self._logs["extra"][name].extend(gather_object(values))
        # wandb refuses a table whose cells are lists of dictionaries with unequal keys, which is how TRL writes down
        # prompts with images: the run would end at its first log.
        prompts = [_with_plain_content(prompt) for prompt in self._logs["prompt"]]
        self._logs["prompt"].clear()
        self._logs["prompt"].extend(prompts)

    # ------------------------------------------------------- overrides of TRL

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> RolloutBatch:
        inputs = _with_image_lists(inputs)
        started = time.perf_counter()
        self.completion_forward.forget_images()
        given = self.plan_rollout(inputs)
        inputs = inputs if given is None else given.inputs
        self._record = RolloutRecord(started=started, inputs=inputs, given=given)
        try:
            with self._recorded(self._record.forwards):
                batch = super()._generate_and_score_completions(inputs)
        finally:
            record, self._record = self._record, None
        if has_images_by_row(batch):
            batch["num_images"] = one_entry_a_row(batch)
        backbone = self.completion_forward.backbone_of(self.model)
        if (keys := self.completion_forward.image_keys(batch, backbone)) is not None:
            # Once: micro-batches find them beside their rows.
            batch["image_keys"] = keys
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

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        if self._record is not None and self._record.given is not None:
            return self._record.given.completion_ids, None
        prompt_ids, images = self._as_backend_takes_them(prompt_ids, images)
        with own_settings_ignored(self._unwrapped_policy):
            sampled = super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        return self._cut(*sampled)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        self._record.mark_generated()
        self._record.reward_started = time.perf_counter()
        if self._record.given is not None:
            rewards_per_func = self.accelerator.gather(self._record.given.rewards_per_func)
        else:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        check_finite_rewards(rewards_per_func, self.reward_func_names)
        self._record.rewards = self.weighted_rewards(rewards_per_func)
        if self._record.given is not None:
            self._record.rewards = self.accelerator.gather(self._record.given.outcomes)
        self._record.reward_seconds = time.perf_counter() - self._record.reward_started
        return rewards_per_func

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._record is not None:
            self._record.mark_generated()
        inputs = dict(zip(FORWARD_KEYS, args, strict=False)) | kwargs
        rows = inputs.pop("batch_size", None)
        if self._forwards is None or model is self.ref_model:
            outputs = self.completion_forward.run(model, inputs, rows)
            if model is self.ref_model:
                self.completion_forward.forget_images(model)
            return outputs[:3]
        # The fused head computes the entropies in the same pass anyway: they are kept, and the values, so that the
        # policy need not run again.
        outputs = self.completion_forward.run(model, inputs | {"compute_entropy": True}, rows, with_values=True)
        self._forwards.append((outputs.logps, outputs.of_policy()))
        return outputs[:3]

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            # accelerate would have modules' outputs in half precision: log-probabilities in steps of 1/64, and values.
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.mixed_precision_policy is not None:
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    def _prepare_inputs(self, generation_batch):
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        is_new = self._buffered_inputs is not buffered
        if self.mode == "train" and is_new and self.can_move_rows and self.may_exchange_rows():
            self._buffered_inputs = self._by_length(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _compute_loss(self, model: nn.Module, inputs: RolloutBatch) -> torch.Tensor:
        return self.policy_loss(model, inputs)

    def get_train_dataloader(self) -> DataLoader:
        dataset = self.train_dataset
        if isinstance(dataset, Dataset):
            self.train_dataset = RepeatedRows(dataset, self.args.steps_per_generation * self.num_iterations)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = self._get_output_dir(trial)
        name = checkpoint_name(self.state.global_step)
        staging = Path(run_folder) / STAGING_FOLDER
        try:
            if self.args.should_save:
                staging_folder(run_folder)
            self.accelerator.wait_for_everyone()
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(staging / name):
                self.state.best_model_checkpoint = str(Path(run_folder) / name)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                publish(staging / name, run_folder)
        except Exception as error:
            number = write_error(error, run_folder)
            if self.args.should_save:
                finish_publication(run_folder)
            shutil.rmtree(staging, ignore_errors=True)
            if number is None:
                raise
            raise OSError(
                number,
                f"the checkpoint of step {self.state.global_step} could not be written ({error}). The newest complete "
                f"one is {newest_checkpoint(run_folder)}: make room and resume from it.",
            ) from error
        if self.args.should_save:
            rotate(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(Path(run_folder) / name))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploads run in the background: a checkpoint that is still being written would move away under them, and go to
        # the Hub as a part of the run folder.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, *args, **kwargs) -> TrainOutput:
        # transformers would delete the newest checkpoint if only one is to be kept and another one is the best, and in
        # a way that leaves half a checkpoint if it is killed meanwhile.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # The process that saves the model makes the folder, and another one may be here before it.
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.save_training_state(output_dir)
        self.save_process_files(output_dir)
        state = {
            "num_processes": self.accelerator.num_processes,
            "step": self._step,
            "batch_sizes": self._batch_sizes(),
            "log": self._pending_log.state(),
            **self.process_state(),
        }
        if self._step % (self.args.steps_per_generation * self.num_iterations) != 0:
            # In the middle of a rollout: what is left of it is trained on after resuming too.
            state["batches"] = self._buffered_inputs
        torch.save(state, Path(output_dir) / PROCESS_STATE_NAME.format(self.accelerator.process_index))

    def create_scheduler(self, num_training_steps: int, *args, **kwargs):
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        self._optimizer_settings = optimizer_settings(self.optimizer)
        return scheduler

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        with _held_back("transformers.trainer", ("The best checkpoint",), warnings := []):
            position = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
            )
        if resume_from_checkpoint is not None:
            # The checkpoint has intervals of its own for logging, evaluation and saving.
            self.state.compute_steps(self.args, max_steps)
            self.state.best_model_checkpoint = recorded_best(resume_from_checkpoint)
            if self.state.best_model_checkpoint is None:
                _say(warnings)
        return position

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder, anew = Path(checkpoint), []
        has_optimizer = any(folder.glob(f"{Path(OPTIMIZER_NAME).stem}*")) and (folder / SCHEDULER_NAME).is_file()
        if has_optimizer or self.is_deepspeed_enabled:  # which refuses checkpoints without its own state
            restore_settings("policy", self.optimizer, self.lr_scheduler, self._optimizer_settings)
        else:
            anew.append(f"the policy's optimizer and learning rate schedule ({OPTIMIZER_NAME}, {SCHEDULER_NAME})")
        anew += self.load_training_state(checkpoint)
        path = folder / PROCESS_STATE_NAME.format(self.accelerator.process_index)
        # All processes or none: one that samples while the others train on waits for them in vain.
        if self._max_over_processes(int(not path.is_file())):
            anew.append(f"the rollout, and the measurements since the last log entry ({path.name})")
        else:
            device = self.accelerator.device
            # torch restores nothing on "cpu:0", as a CPU is called in a run of several processes.
            state = torch.load(path, "cpu" if device.type == "cpu" else device, weights_only=True)
            self._load_process_state(checkpoint, state)
        if not any(folder.glob("rng_state*")):
            anew.append("the random numbers (rng_state.pth)")
        if anew and self.accelerator.is_main_process:
            logger.warning(
                "The checkpoint %s lacks a part of the run's state, so this is no exact continuation "
                "(`save_only_model=True` saves the models alone). These begin anew: %s.",
                checkpoint,
                "; ".join(anew),
            )

    def _load_process_state(self, checkpoint: str, state: dict[str, Any]) -> None:
        if state["num_processes"] != self.accelerator.num_processes:
            logger.warning(
                "The checkpoint %s was written by %d processes and is resumed by %d: training goes on with a new "
                "rollout.",
                checkpoint,
                state["num_processes"],
                self.accelerator.num_processes,
            )
            return
        self.load_process_state(state)
        self._pending_log.load_state(state.get("log"))
        saved, own = state.get("batch_sizes", self._batch_sizes()), self._batch_sizes()
        if saved != own:
            logger.warning(
                "The checkpoint %s was written with %s and is resumed with %s: training goes on with a new rollout.",
                checkpoint,
                *(", ".join(f"{name}={size}" for name, size in sizes.items()) for sizes in (saved, own)),
            )
            return
        self._step = state["step"]
        self._buffered_inputs = state.get("batches")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._complete_load(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._complete_load(self.state.best_model_checkpoint):
            super()._load_best_model()
        self.load_best_state(self.state.best_model_checkpoint)

    # ---------------------------------------------------------------- details

    @contextlib.contextmanager
    def _recorded(self, forwards: list[tuple[torch.Tensor, PolicyForward]]) -> Iterator[list]:
        """Collect the forwards of the policy that TRL runs inside."""
        self._forwards = forwards
        try:
            yield forwards
        finally:
            self._forwards = None

    @property
    def _vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def _checked_and_cut(self, sample: Callable) -> Callable:
        """A `rollout_func` whose output is checked, and whose responses end with an image placeholder."""

        def rollout(prompts: list, trainer: GRPOBridge) -> dict[str, Any]:
            output = sample(prompts, trainer)
            check_rollout(output, len(prompts), self._vocab_size)
            complete = output.get("completion_ids") is not None
            return cut_rollout(output, self.placeholder_ids) if complete and self.placeholder_ids else output

        return rollout

    @property
    def _unwrapped_policy(self) -> PreTrainedModel:
        """The policy without the wrappers of distributed training and `torch.compile`."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _warn_of_sampling_settings(self) -> None:
        """Warn of settings that training ignores because they change what is sampled, and of settings that do so."""
        ignored = left_to_the_model(self._unwrapped_policy, self.generation_config)
        if ignored:
            logger.warning(
                "The model's `generation_config` sets %s. Training ignores it, because responses would come from "
                "another distribution than the policy that is trained. To sample with it all the same, set "
                "`generation_kwargs`.",
                _named(ignored),
            )
        settings = dict(self.generation_kwargs)
        if "suppress_tokens" not in (self.args.generation_kwargs or {}):
            settings.pop("suppress_tokens", None)  # TRL's, of the image placeholder
        if shaping := shaping_settings(settings, self.temperature):
            logger.warning(
                "Responses are sampled with %s, as `args` says: from another distribution than the policy's, whose "
                "log-probabilities the loss takes. The gradient is biased by the difference.",
                _named(shaping),
            )

    @torch.no_grad()
    def _generate_from(self, prompts: TokenizedPrompts, max_new_tokens: int) -> list[list[int]]:
        """One sampled continuation of each prompt, by the backend that the trainer generates with."""
        generator = self.vllm_generation if self.use_vllm else self.generation_config
        name = "max_completion_length" if self.use_vllm else "max_new_tokens"
        usual = getattr(generator, name)
        setattr(generator, name, max_new_tokens)
        try:
            prompt_ids, images = self._as_backend_takes_them(prompts.ids, prompts.images)
            with own_settings_ignored(self._unwrapped_policy):
                sampled = super()._generate_single_turn(prompt_ids, images, prompts.fields, num_generations=1)
        finally:
            setattr(generator, name, usual)
        return self._cut(*sampled)[0]

    def _cut(
        self, completion_ids: list[list[int]], logps: list[list[float]] | None
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Responses of one turn up to their first image placeholder, with the sampler's log-probabilities."""
        if not self.placeholder_ids:
            return completion_ids, logps
        lengths = [length_until_placeholder(ids, self.placeholder_ids) for ids in completion_ids]
        if self.tools:
            # What a tool answers would come behind it, and be predicted from it: it goes, unless it is all there is,
            # which calls no tool.
            lengths = [
                max(length - (ids[length - 1] in self.placeholder_ids), 1)
                for ids, length in zip(completion_ids, lengths, strict=True)
            ]
        completion_ids, logps = (
            rows and [row[:length] for row, length in zip(rows, lengths, strict=True)]
            for rows in (completion_ids, logps)
        )
        return completion_ids, logps

    def _as_backend_takes_them(
        self, prompt_ids: list[list[int]], images: list | None
    ) -> tuple[list[list[int]], list | None]:
        """
        Prompts and images as the generation backend reads them.

        For a prompt without image transformers' processors want a list and vLLM wants `None`. And a colocated vLLM
        expands image placeholders itself: of prompts in which they are expanded it would make others, which are not
        those that are trained on (https://github.com/huggingface/trl/issues/6294).
        """
        if not images or not self.use_vllm:
            return prompt_ids, images
        if self.vllm_mode == "colocate" and TRL_EXPANDS_PLACEHOLDERS_TWICE:
            prompt_ids = [collapsed(ids, self.processing_class.image_token_id) for ids in prompt_ids]
        return prompt_ids, [row or None for row in images]

    def _score_completions(
        self, inputs: list[dict[str, Any]], prompt_ids: list[list[int]], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        """float32 `(N, F)`: this process's rewards of responses that are not part of the rollout."""
        prompts = _prompts_of(inputs)
        completions = self._decoded(prompts, prompt_ids, completion_ids)
        # What reward functions log is about the rollout's responses.
        logged = copy.deepcopy((self._pending_metrics, self._pending_extra_logs))
        try:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        finally:
            self._pending_metrics, self._pending_extra_logs = logged
        check_finite_rewards(rewards_per_func, self.reward_func_names)
        return self.local_slice(rewards_per_func, len(inputs))

    def _decoded(self, prompts: list, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list:
        """Completions as reward functions get them."""
        if not is_conversational({"prompt": prompts[0]}):
            return self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        templates = (getattr(self._tokenizer, name, None) for name in ("response_template", "response_schema"))
        if any(template is not None for template in templates):
            return [
                [parse_response(self._tokenizer, ids, prefix=prefix, tools=self.tools)]
                for prefix, ids in zip(prompt_ids, completion_ids, strict=True)
            ]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _batch_sizes(self) -> dict[str, int]:
        """What decides on how a rollout is cut into micro-batches, and on how long it is trained on."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        return {**{name: getattr(self.args, name) for name in names}, "num_iterations": self.num_iterations}

    def _max_over_processes(self, number: int) -> int:
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    @contextlib.contextmanager
    def _complete_load(self, folder: str) -> Iterator[None]:
        """
        Load the policy from a checkpoint even if its weights have other names there than in the model.

        transformers saves Qwen2.5-VL, for one, under older names, which only `from_pretrained` translates. Its trainer
        does not, and goes on with the weights it had, after a warning about missing keys.

        And in the dtypes that it is trained in: PEFT loads adapters in float32, where TRL trains those on a quantized
        base in bfloat16.
        """
        policy, missing, warnings = self.accelerator.unwrap_model(self.model), [], []
        dtypes = {name: parameter.dtype for name, parameter in policy.named_parameters() if parameter.requires_grad}
        handle = policy.register_load_state_dict_post_hook(lambda _, keys: missing.extend(keys.missing_keys))
        try:
            with _held_back(
                "transformers.trainer", ("There were missing keys", "There were unexpected keys"), warnings
            ):
                yield
        finally:
            handle.remove()
        for name, parameter in policy.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])
        if missing and isinstance(policy, PreTrainedModel) and not self.is_fsdp_enabled:
            logger.info("Loading %d weights that %s holds under other names.", len(missing), folder)
            policy.load_state_dict(type(policy).from_pretrained(folder, dtype=policy.dtype).state_dict())
            return
        _say(warnings)

    def _by_length(self, batches: list[RolloutBatch]) -> list[RolloutBatch]:
        """Micro-batches of a rollout, their rows exchanged within each optimizer step so that like lengths meet."""
        regrouped, window = [], self.args.gradient_accumulation_steps
        lengths = torch.stack([batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1) for batch in batches])
        lengths = lengths.view(len(batches) // window, -1).tolist()
        columns = batches[0]["prompt_mask"].size(1) + batches[0]["completion_mask"].size(1)
        for step, groups in enumerate(self._groups_of_steps(lengths, columns)):
            rows = merge_rows(batches[step * window : (step + 1) * window])
            # With their lengths, which the device need not be asked for again.
            rows["token_counts"] = lengths[step]
            regrouped += [take_rows(rows, group) for group in groups]
        return regrouped

    def _groups_of_steps(self, lengths: list[list[int]], columns: int) -> list[list[list[int]]]:
        """
        Which rows share a micro-batch.

        Args:
            lengths (`list[list[int]]`): of each optimizer step of a rollout the tokens of this process's rows.
            columns (`int`): of the rollout, padding included.

        Returns:
            `list[list[list[int]]]`: of each optimizer step the rows of each micro-batch.
        """
        num_groups, batch_size = self.args.gradient_accumulation_steps, self.args.per_device_train_batch_size
        if not self.weighs_rows_alike():
            return [equal_groups(step, num_groups) for step in lengths]
        if not gradients_are_in_pieces(self.accelerator):
            return [group_rows(step, num_groups, batch_size * columns) for step in lengths]
        # In each micro-batch, at its backward if not before, all processes wait for the one that has the most tokens.
        # They exchange lengths once a rollout, which they begin to train on together.
        own = torch.tensor([[columns, *itertools.chain(*lengths)]], device=self.accelerator.device)
        everyone = self.accelerator.gather(own).cpu().numpy()
        max_tokens = batch_size * int(everyone[:, 0].max())
        steps = everyone[:, 1:].reshape(len(everyone), len(lengths), -1)
        cuts = [common_cuts(steps[:, index], num_groups, max_tokens) for index in range(len(lengths))]
        return [cut_rows(step, at) for step, at in zip(lengths, cuts, strict=True)]

    def _use_reference(self, reference: PreTrainedModel) -> None:
        """Install a frozen copy of the policy where TRL keeps the reference model."""
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.beta = self.args.beta


@contextlib.contextmanager
def _held_back(name: str, beginnings: tuple[str, ...], records: list[logging.LogRecord]) -> Iterator[None]:
    """What a logger says with one of these beginnings is put into `records` instead."""

    def keep(record: logging.LogRecord) -> bool:
        held = record.getMessage().startswith(beginnings)
        if held:
            records.append(record)
        return not held

    named = logging.getLogger(name)
    named.addFilter(keep)
    try:
        yield
    finally:
        named.removeFilter(keep)


def _say(records: list[logging.LogRecord]) -> None:
    """Pass records that were held back to their loggers."""
    for record in records:
        logging.getLogger(record.name).handle(record)


def collapsed(ids: list[int], token_id: int) -> list[int]:
    """Token ids with each run of one token reduced to a single one."""
    return [
        token for position, token in enumerate(ids) if token != token_id or ids[position - 1 : position] != [token]
    ]


class TrainingIsOver(Exception):
    """A run is resumed from its last step: transformers would train one step more before it looks."""


class _EpochOrder(TrainerCallback):
    """
    Shuffles each epoch's prompts as an uninterrupted run does.

    TRL's sampler draws one order after the other from a generator, of which a resumed run would draw the first again.
    """

    def __init__(self, trainer: GRPOBridge):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        sampler = self.trainer._train_sampler
        if getattr(sampler, "generator", None) is None:  # a stream, or in the order of the data
            return
        sampler.generator.manual_seed(sampler.seed)
        for _ in range(math.floor((state.epoch or 0.0) + 1e-6)):
            torch.randperm(sampler.num_samples, generator=sampler.generator)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise TrainingIsOver


class _PendingLog(TrainerCallback):
    """
    Puts the measurements since the last log entry into the checkpoint: a resumed run's next entry equals an
    uninterrupted run's.
    """

    def __init__(self, trainer: GRPOBridge):
        self.trainer = trainer
        self._loaded: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them."""
        trainer = self.trainer
        metrics = trainer._metrics["train"]
        state = {
            "metrics": {name: [float(value) for value in values] for name, values in metrics.items()},
            "loss": trainer._tr_loss,
            "last_logged": trainer._globalstep_last_logged,
        }
        if trainer.log_completions and trainer.accelerator.is_main_process:
            try:
                state["table"] = to_portable(_lists(trainer._logs))
            except TypeError as error:
                logger.warning("The checkpoint is written without the completions table: %s", error)
        return state

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Restore a [`_PendingLog.state`] once training begins; checkpoints of earlier versions have none."""
        self._loaded = state

    def on_train_begin(self, args, state, control, **kwargs):
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        trainer = self.trainer
        for name, values in loaded["metrics"].items():
            trainer._metrics["train"][name] = list(values)
        # The final entry's mean loss is of the steps that this call of `train` runs.
        trainer._total_loss_scalar -= loaded["loss"].item()
        trainer._tr_loss += loaded["loss"]
        trainer._globalstep_last_logged = loaded["last_logged"]
        _extend(trainer._logs, from_portable(loaded.get("table", {})))


class _AdaptersFirst(TrainerCallback):
    """
    Runs an FSDP2 policy once before anything else does.

    In its first forward FSDP2 looks up in which dtype trainable parameters want their gradients. That of a run with a
    reference would be the reference's, with the adapters off: of none, and in half precision the backward would fail.
    """

    def __init__(self, trainer: GRPOBridge):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        token = torch.zeros((1, 1), dtype=torch.long, device=self.trainer.accelerator.device)
        with torch.no_grad():
            self.trainer.model(input_ids=token)


def _lists(columns: dict[str, Any]) -> dict[str, Any]:
    """The completions table with lists instead of queues."""
    return {name: _lists(rows) if isinstance(rows, dict) else list(rows) for name, rows in columns.items()}


def _extend(columns: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Put rows of [`_lists`] back into the completions table."""
    for name, rows in loaded.items():
        if isinstance(rows, dict):
            _extend(columns[name], rows)
        else:
            columns[name].extend(rows)


def _prompts_of(inputs: list[dict[str, Any]]) -> list:
    """Prompts with their images in place, as TRL makes them from rows of the data set."""
    images = [row.get("images") or ([row["image"]] if row.get("image") is not None else []) for row in inputs]
    prompts = [copy.deepcopy(row["prompt"]) for row in inputs]
    if not any(images):
        return prompts
    return [prepare_multimodal_messages(prompt, images=row) for prompt, row in zip(prompts, images, strict=True)]


def _with_plain_content(prompt: Any) -> Any:
    """A conversation whose messages hold text, `[IMAGE]` for an image; plain text as it is."""
    if isinstance(prompt, str):
        return prompt
    return [
        {**message, "content": "".join(part.get("text", f"[{part['type'].upper()}]") for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _with_image_lists(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a rollout, with an empty list for a prompt without image instead of the `None` of data sets."""
    if any(row.get("images", []) is None for row in inputs):
        return [{**row, "images": row.get("images") or []} for row in inputs]
    if any(row.get("image", []) is None for row in inputs):
        return [{**row, "images": [] if row["image"] is None else [row["image"]]} for row in inputs]
    return inputs


def _named(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in settings.items())


def _copy_for_reference(model: str | PreTrainedModel, args: Any, peft_config: Any) -> PreTrainedModel | None:
    """A frozen copy of a policy that exists in memory only and needs a reference; otherwise `None`."""
    if isinstance(model, str) or args is None or args.beta == 0.0 or peft_config is not None:
        return None
    if hasattr(model, "peft_config") or get_config_model_id(model.config):
        return None
    if args.sync_ref_model:
        raise ValueError(
            "`sync_ref_model=True` needs a model that was loaded from a folder or the Hub: save this one first."
        )
    return copy.deepcopy(model).requires_grad_(False).eval()
