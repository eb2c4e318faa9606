"""[`ResumableTrainer`]: TRL's trainer whose runs go on from their checkpoints as if they had not been interrupted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from ...distributed import Processes
from ...resumed_settings import Settings, optimizer_settings, restore_settings
from ...run_folder import checkpoint_name
from ..checks import check_finite_weights
from .checkpoints import WholeCheckpoints, holds_optimizer
from .log import PendingLog
from .repeated_rows import RepeatedRows
from .resume import AdaptersFirst, EpochOrder, StepPosition, complete_load, own_intervals


class ResumableTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with whole checkpoints.

    They hold every part in `checkpoints.parts`, are written beside and published in one step, and a run resumed from
    one sees the same prompts in the same order, with its own settings.
    """

    def __init__(self, model: str | PreTrainedModel, reward_funcs=None, args=None, **kwargs):
        self._optimizer_settings: Settings = []
        super().__init__(model, reward_funcs, args, **kwargs)
        self.processes = Processes(self.accelerator)
        self.pending_log = PendingLog(self, self.processes)
        self.checkpoints = WholeCheckpoints(args, self.processes, [self.pending_log, StepPosition(self)])
        self._epoch_order = EpochOrder()
        self.add_callback(self._epoch_order)
        self.add_callback(self.pending_log)
        if self.accelerator.is_fsdp2 and hasattr(self.model, "peft_config"):
            self.add_callback(AdaptersFirst(self))

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the current step, to resume from, and return its folder."""
        with self.checkpoints.run_folder():
            self._save_checkpoint(self.model, None)
        return Path(self.args.output_dir) / checkpoint_name(self.state.global_step)

    def end_of_training(self) -> TrainOutput:
        """End a run that was resumed from its last step as transformers ends one, with the best model if asked for."""
        return self._finalize_training(None, 0, time.time())

    def get_train_dataloader(self) -> DataLoader:
        dataset = self.train_dataset
        if isinstance(dataset, Dataset):
            self.train_dataset = RepeatedRows(dataset, self.args.steps_per_generation * self.num_iterations)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        self._epoch_order.sampler = super()._get_train_sampler(dataset)
        return self._epoch_order.sampler

    def _run_epoch(self, *args, epoch: int, **kwargs) -> None:
        self._epoch_order.begin(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def create_scheduler(self, num_training_steps: int, *args, **kwargs):
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        self._optimizer_settings = optimizer_settings(self.optimizer)
        return scheduler

    def _get_output_dir(self, trial: Any) -> str:
        staging = self.checkpoints.staging
        return super()._get_output_dir(trial) if staging is None else str(staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.checkpoints.writing(self._get_output_dir(trial), self.state) as folder:
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        self.processes.wait()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploads run in the background: a checkpoint that is still being written would move away under them, and go to
        # the Hub as a part of the run folder.
        if self.checkpoints.staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # The process that saves the model makes the folder, and another one may be here before it.
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        super()._save_optimizer_and_scheduler(output_dir)
        self.checkpoints.save(output_dir)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        with own_intervals(self, max_steps, checkpoint):
            return super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        missing = []
        if holds_optimizer(checkpoint) or self.is_deepspeed_enabled:  # which refuses checkpoints without its own state
            restore_settings("policy", self.optimizer, self.lr_scheduler, self._optimizer_settings)
        else:
            missing.append("the policy's optimizer and learning rate schedule (optimizer.pt, scheduler.pt)")
        self.checkpoints.load(checkpoint, missing)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with complete_load(self.accelerator.unwrap_model(self.model), resume_from_checkpoint, self.is_fsdp_enabled):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        check_finite_weights(self.model if model is None else model, f"The policy in {resume_from_checkpoint!r}")

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        with complete_load(self.accelerator.unwrap_model(self.model), best, self.is_fsdp_enabled):
            super()._load_best_model()
        self.checkpoints.load_best(best)

    def _finalize_training(self, *args, **kwargs) -> TrainOutput:
        # transformers would delete the newest checkpoint if only one is to be kept and another one is the best, and in
        # a way that leaves half a checkpoint if it is killed meanwhile.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
