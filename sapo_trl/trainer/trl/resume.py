"""How a resumed run goes on where it stopped: position, order of the prompts, weights under other names."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from trl import GRPOTrainer

from ..checkpoint_files import recorded_best
from ..checkpoint_parts import Checkpointed


logger = logging.getLogger(__name__)


class TrainingIsOver(Exception):
    """A run is resumed from its last step: transformers would train one step more before it looks."""


class EpochOrder(TrainerCallback):
    """
    Shuffles each epoch's prompts as an uninterrupted run does.

    TRL's sampler draws one order after the other from a generator. A resumed run would draw the first order again.
    """

    def __init__(self):
        self.sampler: torch.utils.data.Sampler | None = None
        self.epoch = 0
        """The epoch that the trainer is in."""

    def begin(self, epoch: int) -> None:
        """Begin an epoch. Its number does not follow from `state.epoch`, because epochs may end early."""
        self.epoch = epoch
        self.shuffle(epoch)

    def shuffle(self, epoch: int) -> None:
        """Let the sampler's next order be the order of an epoch, counted from 0."""
        if getattr(self.sampler, "generator", None) is None:  # a stream, or in the order of the data
            return
        self.sampler.generator.manual_seed(self.sampler.seed)
        for _ in range(epoch):
            torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise TrainingIsOver


class AdaptersFirst(TrainerCallback):
    """
    Runs an FSDP2 policy once before anything else does.

    In its first forward FSDP2 looks up in which dtype trainable parameters want their gradients. In a run with a
    reference the first forward would be the reference's, whose adapters are off: FSDP2 would find no dtype, and the
    backward would fail in half precision.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        token = torch.zeros((1, 1), dtype=torch.long, device=self.trainer.accelerator.device)
        with torch.no_grad():
            self.trainer.model(input_ids=token)


class StepPosition(Checkpointed):
    """
    Where a run stands within its rollout, and the rest of the rollout.

    Args:
        trainer ([`~trl.GRPOTrainer`]): keeps both in private fields.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def state(self) -> dict[str, Any]:
        trainer = self.trainer
        state = {"step": trainer._step, "batch_sizes": self._batch_sizes()}
        if trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0:
            # In the middle of a rollout: the rest of it is trained on after resuming too.
            state["batches"] = trainer._buffered_inputs
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        own = self._batch_sizes()
        saved = state.get("batch_sizes", own)
        if saved != own:
            logger.warning(
                "The checkpoint was written with %s and is resumed with %s: training goes on with a new rollout.",
                *(", ".join(f"{name}={size}" for name, size in sizes.items()) for sizes in (saved, own)),
            )
            return
        self.trainer._step = state["step"]
        self.trainer._buffered_inputs = state.get("batches")

    def _batch_sizes(self) -> dict[str, int]:
        """The sizes that decide how a rollout is cut into micro-batches, and for how long it is trained on."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        sizes = {name: getattr(self.trainer.args, name) for name in names}
        return {**sizes, "num_iterations": self.trainer.num_iterations}


@contextlib.contextmanager
def own_intervals(trainer: GRPOTrainer, max_steps: int, checkpoint: str | None) -> Iterator[None]:
    """
    Let a resumed run keep its own intervals for logging, evaluation and saving, and find its best checkpoint.

    Args:
        trainer ([`~trl.GRPOTrainer`]): whose state is read from the checkpoint inside.
        max_steps (`int`): optimizer steps of the run.
        checkpoint (`str`, *optional*): its folder.
    """
    with held_back("transformers.trainer", ("The best checkpoint",)) as warnings:
        yield
    if checkpoint is None:
        return
    state: TrainerState = trainer.state
    state.compute_steps(trainer.args, max_steps)
    state.best_model_checkpoint = recorded_best(checkpoint)
    if state.best_model_checkpoint is None:
        say(warnings)


@contextlib.contextmanager
def complete_load(policy: PreTrainedModel, folder: str, is_fsdp: bool) -> Iterator[None]:
    """
    Load the policy from a checkpoint even if its weights have other names there than in the model.

    transformers saves Qwen2.5-VL, for one, under older names, which only `from_pretrained` translates. Its trainer
    does not, and goes on with the weights it had, after a warning about missing keys.

    Also if a critic has an adapter in a folder of its own: transformers 5.17 then leaves the policy's adapter out.

    And in the dtypes that it is trained in: PEFT loads adapters in float32, where TRL trains adapters on a quantized
    base in bfloat16.

    Args:
        policy ([`~transformers.PreTrainedModel`]): without the wrappers of distributed training.
        folder (`str`): the checkpoint.
        is_fsdp (`bool`): whether FSDP shards the policy.
    """
    missing: list[str] = []
    dtypes = {name: parameter.dtype for name, parameter in policy.named_parameters() if parameter.requires_grad}
    handle = policy.register_load_state_dict_post_hook(lambda _, keys: missing.extend(keys.missing_keys))
    try:
        with held_back("transformers.trainer", ("There were missing keys", "There were unexpected keys")) as warnings:
            yield
    finally:
        handle.remove()
    if isinstance(policy, PeftModel) and not is_fsdp and any(Path(folder).glob("*/adapter_model.*")):
        active = policy.active_adapters[0]
        policy.load_adapter(folder, "default", is_trainable=active == "default")
        policy.set_adapter(active)
    for name, parameter in policy.named_parameters():
        if parameter.dtype != dtypes.get(name, parameter.dtype):
            parameter.data = parameter.data.to(dtypes[name])
    if missing and isinstance(policy, PreTrainedModel) and not is_fsdp:
        logger.info("Loading %d weights that %s holds under other names.", len(missing), folder)
        policy.load_state_dict(type(policy).from_pretrained(folder, dtype=policy.dtype).state_dict())
        return
    say(warnings)


@contextlib.contextmanager
def held_back(name: str, beginnings: tuple[str, ...]) -> Iterator[list[logging.LogRecord]]:
    """Collect the messages of a logger that begin in one of these ways, instead of printing them."""
    records: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        held = record.getMessage().startswith(beginnings)
        if held:
            records.append(record)
        return not held

    named = logging.getLogger(name)
    named.addFilter(keep)
    try:
        yield records
    finally:
        named.removeFilter(keep)


def say(records: list[logging.LogRecord]) -> None:
    """Pass records that were held back to their loggers."""
    for record in records:
        logging.getLogger(record.name).handle(record)
