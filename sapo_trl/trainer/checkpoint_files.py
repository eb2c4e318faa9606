"""Checkpoints that are complete or not there at all: how they are written, deleted and looked over."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..critic.training import CRITIC_OPTIMIZER_NAME
from ..run_folder import PUBLICATION_NAME, TRAINER_STATE_NAME, complete_checkpoints, publication_number


STAGING_FOLDER = "incomplete-checkpoint"
"""A checkpoint is written here and deleted here. No tool takes this name for a checkpoint."""
PROCESS_STATE_NAME = "process_state_{}.pt"

_REPLACED = "replaced-"
_CONTENTS = {
    PROCESS_STATE_NAME.format("*"): ("num_processes", "step"),
    CRITIC_OPTIMIZER_NAME: ("optimizer", "scheduler", "scaler"),
}


def staging_folder(run_folder: str | Path) -> Path:
    """
    An empty folder to write a checkpoint into.

    Args:
        run_folder (`str` or `Path`): where the run's checkpoints are.

    Returns:
        `Path`: a folder beside the checkpoints, so that renaming it moves no data. Files that a process left there
            when it died are removed.
    """
    folder = Path(run_folder) / STAGING_FOLDER
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    finish_publication(run_folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish(staged: Path, run_folder: str | Path) -> Path:
    """
    Give a complete checkpoint its name, in one step.

    Args:
        staged (`Path`): the checkpoint, within the staging folder.
        run_folder (`str` or `Path`): where the run's checkpoints are.

    Returns:
        `Path`: the checkpoint. An older one of this name is replaced.
    """
    final = Path(run_folder) / staged.name
    number = 1 + max(map(publication_number, complete_checkpoints(run_folder)), default=0)
    (staged / PUBLICATION_NAME).write_text(json.dumps({"number": number}) + "\n", encoding="utf-8")
    if final.exists():  # of the same step, written before a run was resumed from an earlier one
        os.rename(final, staged.parent / f"{_REPLACED}{staged.name}")
    os.rename(staged, final)
    shutil.rmtree(staged.parent, ignore_errors=True)
    return final


def finish_publication(run_folder: str | Path) -> None:
    """Publish the checkpoint whose process was killed after it had moved an older one of the same name away."""
    staging = Path(run_folder) / STAGING_FOLDER
    for replaced in staging.glob(f"{_REPLACED}*"):
        staged = staging / replaced.name.removeprefix(_REPLACED)
        final = Path(run_folder) / staged.name
        if staged.is_dir() and not final.exists():
            os.rename(staged, final)


def rotate(run_folder: str | Path, limit: int | None, best: str | Path | None = None) -> None:
    """
    Delete the checkpoints that were published first, if there are more complete ones than wanted.

    Args:
        run_folder (`str` or `Path`): where the run's checkpoints are.
        limit (`int`, *optional*): how many to keep; all by default.
        best (`str` or `Path`, *optional*): a checkpoint to keep in any case, as the newest one is.
    """
    if not limit or limit < 0:
        return
    checkpoints = complete_checkpoints(run_folder)
    kept = {path.resolve() for path in [*checkpoints[-1:], *([Path(best)] if best is not None else [])]}
    others = [path for path in checkpoints if path.resolve() not in kept]
    surplus = len(checkpoints) - limit
    trash = Path(run_folder) / STAGING_FOLDER
    for checkpoint in others[: max(surplus, 0)]:
        # Renamed first: a process that is killed while it deletes leaves nothing that looks like a checkpoint.
        trash.mkdir(exist_ok=True)
        os.rename(checkpoint, trash / f"deleted-{checkpoint.name}")
    shutil.rmtree(trash, ignore_errors=True)


def recorded_best(checkpoint: str | Path) -> str | None:
    """
    The best checkpoint that a checkpoint's state names.

    Args:
        checkpoint (`str` or `Path`): its folder.

    Returns:
        `str`, *optional*: the folder beside it, if there is one of this name, because run folders are moved and
        copied; else the folder as it was recorded; `None` if it is not there or none was recorded.
    """
    state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint") is None:
        return None
    recorded = Path(state["best_model_checkpoint"])
    places = (Path(checkpoint).parent / recorded.name, recorded)
    return next((str(place) for place in places if (place / TRAINER_STATE_NAME).is_file()), None)


def write_error(error: Exception, folder: str | Path) -> int | None:
    """
    The error number of a file that could not be written, or `None` for an error of another kind.

    Args:
        error (`Exception`): raised while a checkpoint was written; not every library raises an `OSError`.
        folder (`str` or `Path`): a folder on the same disk.

    Returns:
        `int`, *optional*: as in [`errno`].
    """
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return int(number[1]) if number else None
    # torch.save keeps the cause back.
    if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "iostream error" in str(error)):
        return errno.ENOSPC if shutil.disk_usage(folder).free < 2**20 else errno.EIO
    return None


def check_checkpoint(checkpoint: str | Path) -> None:
    """
    Find damaged files before anything is loaded from a checkpoint.

    Tensors are not read: this is quick for checkpoints of any size.

    Args:
        checkpoint (`str` or `Path`): its folder.

    Raises:
        ValueError: if a file is cut off or lacks something; it names the file and the checkpoint to take instead.
    """
    checkpoint = Path(checkpoint)
    for path in sorted(checkpoint.rglob("*")):
        problem = _damage(path)
        if problem is not None:
            others = [str(other) for other in complete_checkpoints(checkpoint.parent) if other != checkpoint]
            remedy = f"Resume from {others[-1]!r}" if others else "Begin anew from the model"
            raise ValueError(f"{str(path)!r} is damaged ({problem}). {remedy}.")


def _damage(path: Path) -> str | None:
    """The fault of a file, if it has one."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"no JSON: {error}"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):  # compares the header with the size
                return None
        except SafetensorError as error:
            return str(error)
    if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
        return "it is cut off"
    for pattern, names in _CONTENTS.items():
        if path.match(pattern):
            return _missing_contents(path, names)
    return None


def _missing_contents(path: Path, names: tuple[str, ...]) -> str | None:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes can be any instruction to the reader
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__}"
    missing = [name for name in names if name not in state]
    return f"it has no {missing[0]!r}" if missing else None
