"""Finds the checkpoints in a run's folder, and the newest one. This module imports nothing slow."""

from __future__ import annotations

import json
import re
from pathlib import Path


# Names from transformers.
TRAINER_STATE_NAME = "trainer_state.json"
CHECKPOINT_PREFIX = "checkpoint"

PUBLICATION_NAME = "publication.json"
"""File in each checkpoint with its number in the order of publication."""

_NAME = re.compile(rf"{CHECKPOINT_PREFIX}-(\d+)")


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of an optimizer step."""
    return f"{CHECKPOINT_PREFIX}-{step}"


def complete_checkpoints(run_folder: str | Path) -> list[Path]:
    """
    The complete checkpoints of a run folder, in the order of publication.

    Neither their steps nor the times of their files tell this order. A run that goes back to an early checkpoint
    writes lower steps after higher steps, and clocks may be set back.

    Args:
        run_folder (`str` or `Path`): folder of the run's checkpoints. It need not exist.

    Returns:
        `list[Path]`: oldest first. Checkpoints of other trainers have no publication number. They come first, in the
        order of their steps.
    """
    found = []
    for folder in Path(run_folder).glob(f"{CHECKPOINT_PREFIX}-*"):
        match = _NAME.fullmatch(folder.name)
        # Only a trainer writes this file, and it writes the file last.
        if match and (folder / TRAINER_STATE_NAME).is_file():
            found.append((publication_number(folder), int(match[1]), folder))
    return [folder for *_, folder in sorted(found)]


def newest_checkpoint(run_folder: str | Path) -> Path | None:
    """The last published complete checkpoint, if there is one."""
    return next(reversed(complete_checkpoints(run_folder)), None)


def publication_number(checkpoint: Path) -> int:
    """A checkpoint's number in the order of publication, from 1; 0 for another trainer's checkpoint."""
    try:
        return int(json.loads((checkpoint / PUBLICATION_NAME).read_text(encoding="utf-8"))["number"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(checkpoint / PUBLICATION_NAME)!r} is damaged ({error!r}): delete this file."
        ) from error
