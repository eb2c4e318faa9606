"""Checkpoints that hold every part of a run: written beside, published in one step, read part by part."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ...config import SAPOConfig
from ...distributed import Processes
from ...folder_lock import FolderInUseError, locked
from ...run_folder import TRAINER_STATE_NAME, checkpoint_name, newest_checkpoint
from ..checkpoint_files import (
    PROCESS_STATE_NAME,
    STAGING_FOLDER,
    check_checkpoint,
    finish_publication,
    publish,
    rotate,
    staging_folder,
    write_error,
)
from ..checkpoint_parts import Checkpointed


logger = logging.getLogger(__name__)


class WholeCheckpoints:
    """
    Writes and reads checkpoints around transformers' own methods.

    Args:
        args ([`SAPOConfig`]): settings of the run; checkpoints are in its `output_dir`.
        processes ([`~sapo_trl.distributed.Processes`]): of the run.
        parts (`list[Checkpointed]`): the parts of the run's state besides transformers'. More may be appended.
    """

    def __init__(self, args: SAPOConfig, processes: Processes, parts: list[Checkpointed]):
        self.args = args
        self.processes = processes
        self.parts = parts
        self.staging: Path | None = None
        """Where transformers shall write the checkpoint that is being written."""

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
            if problems := list(filter(None, self.processes.gather_objects([problem]))):
                raise FolderInUseError(problems[0])
            yield

    def to_resume(self, wanted: str | Path | bool | None) -> str | None:
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

    @contextlib.contextmanager
    def writing(self, run_folder: str, state: TrainerState) -> Iterator[Path]:
        """
        Write a checkpoint in the block, beside the run's checkpoints; then publish it and delete surplus ones.

        Args:
            run_folder (`str`): where the run's checkpoints are.
            state ([`~transformers.TrainerState`]): of the run.

        Returns:
            `Path`: the folder of the checkpoint once it is complete.

        Raises:
            OSError: if a file cannot be written. It names the newest complete checkpoint.
        """
        name = checkpoint_name(state.global_step)
        staging, final = Path(run_folder) / STAGING_FOLDER, Path(run_folder) / name
        try:
            if self.args.should_save:
                staging_folder(run_folder)
            self.processes.wait()
            self.staging = staging
            try:
                yield final
            finally:
                self.staging = None
            self.processes.wait()
            if state.best_model_checkpoint == str(staging / name):
                state.best_model_checkpoint = str(final)
            if self.args.should_save:
                state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
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
                f"the checkpoint of step {state.global_step} could not be written ({error}). The newest complete "
                f"one is {newest_checkpoint(run_folder)}: make room and resume from it.",
            ) from error
        if self.args.should_save:
            rotate(run_folder, self.args.save_total_limit, state.best_model_checkpoint)

    def save(self, folder: str) -> None:
        """Write all parts to a checkpoint; called on all processes."""
        state: dict[str, Any] = {"num_processes": self.processes.count}
        for part in self.parts:
            part.save(Path(folder))
            state |= part.state()
        torch.save(state, Path(folder) / PROCESS_STATE_NAME.format(self.processes.index))

    def load(self, checkpoint: str, missing: list[str]) -> None:
        """
        Read all parts of a checkpoint. A warning names the parts that begin anew.

        Args:
            checkpoint (`str`): its folder.
            missing (`list[str]`): parts of transformers' own state that it lacks.
        """
        folder, missing = Path(checkpoint), list(missing)
        for part in self.parts:
            missing += part.load(folder)
        path = folder / PROCESS_STATE_NAME.format(self.processes.index)
        # All processes or none: one that samples while the others train on waits for them in vain.
        if self.processes.max(int(not path.is_file())):
            missing.append(f"the rollout, and the measurements since the last log entry ({path.name})")
        else:
            device = self.processes.accelerator.device
            # torch restores nothing on "cpu:0", as a CPU is called in a run of several processes.
            self._load_state(
                checkpoint, torch.load(path, "cpu" if device.type == "cpu" else device, weights_only=True)
            )
        if not any(folder.glob("rng_state*")):
            missing.append("the random numbers (rng_state.pth)")
        if missing and self.processes.accelerator.is_main_process:
            logger.warning(
                "The checkpoint %s lacks a part of the run's state, so this is no exact continuation "
                "(`save_only_model=True` saves the models alone). These begin anew: %s.",
                checkpoint,
                "; ".join(missing),
            )

    def load_best(self, checkpoint: str) -> None:
        """Read the models besides the policy from the best checkpoint."""
        for part in self.parts:
            part.load_best(Path(checkpoint))

    def _load_state(self, checkpoint: str, state: dict[str, Any]) -> None:
        if state["num_processes"] != self.processes.count:
            logger.warning(
                "The checkpoint %s was written by %d processes and is resumed by %d: training goes on with a new "
                "rollout.",
                checkpoint,
                state["num_processes"],
                self.processes.count,
            )
            return
        for part in self.parts:
            part.load_state(state)


def holds_optimizer(checkpoint: str) -> bool:
    """Whether a checkpoint has the state of the policy's optimizer and schedule."""
    folder = Path(checkpoint)
    return any(folder.glob(f"{Path(OPTIMIZER_NAME).stem}*")) and (folder / SCHEDULER_NAME).is_file()
