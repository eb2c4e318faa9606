"""Checkpoints that are complete or not there at all."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path


logger = logging.getLogger(__name__)

STAGING_FOLDER = "incomplete-checkpoint"
"""Where a checkpoint is written; no name that anything takes for a checkpoint."""


def staging_folder(run_folder: str | Path) -> Path:
    """
    An empty folder to write a checkpoint into.

    Args:
        run_folder (`str` or `Path`): where the run's checkpoints are.

    Returns:
        `Path`: beside them, so that renaming moves no data. What a process that died left there is removed.
    """
    folder = Path(run_folder) / STAGING_FOLDER
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
    if final.exists():  # of the same step, written before a run was resumed from an earlier one
        replaced = staged.parent / f"replaced-{staged.name}"
        os.rename(final, replaced)
    os.rename(staged, final)
    shutil.rmtree(staged.parent, ignore_errors=True)
    return final
