"""Requests each training rollout while the policy is updated on the rollout before it (`rollouts_ahead=1`)."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ...config import SAPOConfig
from ...rollouts.types import RolloutRecord
from .generation import prompts_of, with_image_lists
from .resumable import ResumableTrainer


Rows = list[dict[str, Any]]


class Requested(Protocol):
    """A rollout that a sampler works on, such as [`~sapo_trl.generation.vllm_server.RequestedRollout`]."""

    sampled_at: int

    def collect(self) -> dict[str, list] | None:
        """The output of a `rollout_func`; `None` if the rollout must be requested again."""

    def abandon(self) -> None:
        """Give the rollout up."""


class AheadSampler(Protocol):
    """A `rollout_func` that can also be asked in advance, such as [`~sapo_trl.generation.VLLMServerRollout`]."""

    def __call__(self, prompts: list, trainer: Any) -> dict[str, list]:
        """Responses of the present policy."""

    def request(self, prompts: list, trainer: Any, step: int) -> Requested:
        """Ask for responses of the present policy, which are needed before optimizer step `step`."""


class BatchesAhead:
    """
    Batches of a loader in its own order. Some are read before the trainer asks for them, and each is read once.

    Args:
        start_epoch (`Callable`): the batches of an epoch, by its number.
    """

    def __init__(self, start_epoch: Callable[[int], Iterator[Rows]]):
        self._start_epoch = start_epoch
        self._read: deque[tuple[int, Rows]] = deque()
        self._epoch = -1
        """The epoch that the trainer is in."""
        self._source: Iterator[Rows] = iter(())
        self._source_epoch = -1
        self._source_is_empty = True

    def take(self, epoch_iterator: Iterator[Rows], epoch: int, count: int) -> list[Rows]:
        """
        The batches that the trainer asks for.

        Args:
            epoch_iterator (`Iterator`): the trainer's own iterator of the epoch.
            epoch (`int`): its number.
            count (`int`): number of batches.

        Returns:
            `list`: `count` batches, or fewer at the end of the epoch.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            # An epoch may have ended early.
            self._read = deque(item for item in self._read if item[0] >= self._epoch)
            if self._source_epoch < self._epoch:
                self._use(epoch_iterator, self._epoch)
        batches: list[Rows] = []
        while len(batches) < count:
            if not self._read and not (self._source_epoch == self._epoch and self._read_one()):
                break
            if self._read[0][0] != self._epoch:
                break
            batches.append(self._read.popleft()[1])
        return batches

    def peek(self, distance: int) -> Rows | None:
        """The batch that follows after `distance` others, perhaps in the next epoch; `None` if there is none."""
        while len(self._read) <= distance:
            if self._read_one():
                continue
            if self._source_is_empty:
                return None
            epoch = self._source_epoch + 1
            self._use(self._start_epoch(epoch), epoch)
        return self._read[distance][1]

    def _use(self, source: Iterator[Rows], epoch: int) -> None:
        self._source, self._source_epoch, self._source_is_empty = source, epoch, True

    def _read_one(self) -> bool:
        """Read one more batch of the epoch that is being read. Returns whether there was one."""
        for batch in self._source:
            self._read.append((self._source_epoch, batch))
            self._source_is_empty = False
            return True
        return False


class RolloutsAhead(TrainerCallback):
    """
    A `rollout_func` that keeps one rollout ahead of the trainer.

    When the trainer needs the responses of a rollout, they have been requested before. It gets them, the sampler gets
    the present policy, and the prompts of the next rollout are requested. The first rollout of a run cannot be
    requested in advance. Evaluation and other calls pass through to the sampler.

    Args:
        sampler ([`AheadSampler`]): the user's `rollout_func`.
        args ([`SAPOConfig`]): settings of the run.
        shuffle (`Callable`): prepares the order of the prompts of an epoch, by its number.
    """

    def __init__(self, sampler: AheadSampler, args: SAPOConfig, shuffle: Callable[[int], None]):
        self.sampler = sampler
        self.micro_batches = args.steps_per_generation * args.num_iterations
        self.optimizer_steps = self.micro_batches // args.gradient_accumulation_steps
        self.sampled_at: int | None = None
        """Optimizer steps behind the weights that have sampled the latest training rollout."""
        self._shuffle = shuffle
        self._loader: DataLoader | None = None
        self._batches = BatchesAhead(self._start_epoch)
        self._taken: list[Rows] = []
        self._rows: Rows | None = None
        self._requested: tuple[Rows, Requested] | None = None

    # ------------------------------------------------------------------------------------------------- the prompts

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.abandon()
        self._loader, self._batches = train_dataloader, BatchesAhead(self._start_epoch)

    def take(self, epoch_iterator: Iterator[Rows], epoch: int, count: int) -> list[Rows]:
        """The next `count` batches of an epoch, see [`BatchesAhead.take`]."""
        self._taken = self._batches.take(epoch_iterator, epoch, count)
        return self._taken

    def _start_epoch(self, epoch: int) -> Iterator[Rows]:
        self._shuffle(epoch)
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(epoch)
        return iter(self._loader)

    # ----------------------------------------------------------------------------------------------- the responses

    @contextlib.contextmanager
    def rollout_of(self, rows: Rows) -> Iterator[None]:
        """The first responses that are asked for inside are a training rollout of these rows."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def __call__(self, prompts: list, trainer: Any) -> dict[str, list]:
        rows, self._rows = self._rows, None  # a reward function may sample, too
        if rows is None:
            return self.sampler(prompts, trainer)
        output, self.sampled_at = self._collected(rows)
        if output is None:
            output, self.sampled_at = self.sampler(prompts, trainer), trainer.state.global_step
        self._request_next(rows, trainer)
        return output

    def _collected(self, rows: Rows) -> tuple[dict[str, list] | None, int | None]:
        """The responses that were requested for these rows, and the step behind their weights."""
        if self._requested is None:
            return None, None
        (requested_rows, requested), self._requested = self._requested, None
        if requested_rows is not rows:
            requested.abandon()
            return None, None
        return requested.collect(), requested.sampled_at

    def _request_next(self, present: Rows, trainer: Any) -> None:
        """Request the next rollout after the present rows, if the run needs it."""
        step = trainer.state.global_step + self.optimizer_steps
        if step >= trainer.state.max_steps:
            return
        # The trainer has taken the micro-batches of an optimizer step, and the rollout begins at one of them. This is
        # the first, unless an earlier call of `train` was interrupted within a step.
        before = next((place for place, batch in enumerate(self._taken) if batch is present), 0)
        rows = self._batches.peek(self.micro_batches - (len(self._taken) - before))
        if rows is not None:
            prompts = prompts_of(with_image_lists(rows))
            self._requested = (rows, self.sampler.request(prompts, trainer, step))

    def age(self, step: int) -> float:
        """Rollouts that the policy has been updated on since the weights of the latest one, before step `step`."""
        return (step - self.sampled_at) / self.optimizer_steps

    def abandon(self) -> None:
        """Give up the rollout that was requested, if any."""
        if self._requested is not None:
            self._requested[1].abandon()
            self._requested = None


class AheadTrainer(ResumableTrainer):
    """[`ResumableTrainer`] whose training rollouts may be requested ahead."""

    def __init__(self, model: str | PreTrainedModel, reward_funcs=None, args=None, **kwargs):
        super().__init__(model, reward_funcs, args, **kwargs)
        self.rollouts_ahead: RolloutsAhead | None = None
        if args.rollouts_ahead > 0:
            self.rollouts_ahead = RolloutsAhead(self.rollout_func, args, self._epoch_order.shuffle)
            self.rollout_func = self.rollouts_ahead
            self.add_callback(self.rollouts_ahead)

    @contextlib.contextmanager
    def taking_ahead(self, rows: Rows, record: RolloutRecord) -> Iterator[None]:
        """A training rollout of these rows inside takes the responses that were requested for it, if any."""
        if self.rollouts_ahead is None or not self.model.training:
            yield
            return
        with self.rollouts_ahead.rollout_of(rows):
            yield
        record.sampled_at = self.rollouts_ahead.sampled_at
        record.metrics["sampling/age"] = (torch.tensor(self.rollouts_ahead.age(self.state.global_step)), 1.0)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.rollouts_ahead is not None:
            epoch_iterator = iter(self.rollouts_ahead.take(epoch_iterator, self._epoch_order.epoch, num_batches))
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def train(self, *args, **kwargs) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.rollouts_ahead is not None:
                self.rollouts_ahead.abandon()
